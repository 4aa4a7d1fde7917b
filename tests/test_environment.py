"""What the training script promises in surroundings that are not its own."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import CLASSES, small_model
from draw_flowers import draw_flower
from keras import layers
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import Stop

SCRIPT = Path(study.__file__)
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell and terminal")
NOT_UTF8 = os.fsdecode(b"tulipe \xe9")


def record_of(classes):
    """The history of a training that never was."""
    history = {name: [1.1, 0.9] for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
    phases = {"head": 1, "fine-tuning": 1}
    return {"history": history, "classes": classes, "settings": {"phases": phases}}


@pytest.fixture
def saved(tmp_path):
    """A folder with nothing but a small model, small.keras, and its history."""
    keras.utils.set_random_seed(0)
    small_model(32, channels=4).save(tmp_path / "small.keras")
    (tmp_path / "small_history.json").write_text(json.dumps(record_of(CLASSES)))
    return tmp_path


@pytest.fixture
def quick_patterns(monkeypatch):
    """Short ascents on small images: what they look like is tested elsewhere."""
    monkeypatch.setattr(study, "PATTERN_STEPS", 2)
    monkeypatch.setattr(study, "PATTERN_SIZE", 48)


def draw_saved(folder, monkeypatch, *arguments):
    """Call the script's main() in the folder, as the command line does."""
    monkeypatch.chdir(folder)
    words = ["script", "--skip-training", "--model", "small.keras", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    study.main()


def pictures(folder):
    files = [path for path in folder.iterdir() if path.suffix not in (".html", ".js")]
    return {path.name: np.asarray(Image.open(path).convert("RGB"), int) for path in files}


# ---- The command line ----


@pytest.mark.parametrize(("option", "exit_code"), [("--help", 0), ("--epoch-count", 2)])
def test_help_and_a_mistyped_option_do_not_wait_for_tensorflow(option, exit_code):
    command = [sys.executable, "-X", "importtime", SCRIPT, option]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == exit_code
    assert "numpy" in run.stderr and "tensorflow" not in run.stderr
    assert "default: None" not in run.stdout and "default: False" not in run.stdout


@POSIX_ONLY
def test_a_terminal_shows_one_bar_of_what_is_drawn_and_ctrl_c_says_how_to_go_on(
    saved, split_flowers
):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, SCRIPT, "--skip-training", "--model", "small.keras"]
    command += ["--data", split_flowers]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.STDOUT}
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    shown, interrupted = b"", False
    with subprocess.Popen(command, cwd=saved, **streams, env=settings) as run:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the end of the program is the end of the terminal
            while part := os.read(ours, 10_000):
                shown += part
                if b"patterns of convolution 3, " in shown and not interrupted:
                    run.send_signal(signal.SIGINT)
                    interrupted = True
    os.close(ours)
    text = shown.decode()
    assert run.returncode == 130, text
    assert "The model is saved in small.keras; --skip-training draws it." in text
    assert ".jpg" not in text  # no list of files beside the bar
    assert "Traceback" not in text


# ---- Settings, streams and names that a machine may have ----

MATPLOTLIBRC = """
image.origin: lower
text.usetex: True
savefig.transparent: True
figure.constrained_layout.use: True
font.family: Comic Sans MS
font.size: 40
axes.grid: True
image.cmap: jet
"""
KERAS_JSON = {"backend": "theano", "image_data_format": "channels_first", "floatx": "float16"}
HOSTILE = {
    "MPLBACKEND": "a_backend_that_is_missing",
    "KERAS_BACKEND": "torch",
    "TF_USE_LEGACY_KERAS": "1",
    "PYTHONOPTIMIZE": "2",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
}


@POSIX_ONLY
def test_pictures_depend_on_no_setting_of_the_machine_and_on_no_encoding(
    saved, split_flowers, monkeypatch
):
    classes = ["daisy", "rose", NOT_UTF8]
    for name, folder in zip(CLASSES, classes, strict=True):
        shutil.copytree(split_flowers / "test" / name, saved / "test" / folder)
    (saved / "small_history.json").write_text(json.dumps(record_of(classes)))
    (saved / "keras.json").write_text(json.dumps(KERAS_JSON))
    (saved / "matplotlibrc").write_text(MATPLOTLIBRC)
    command = [sys.executable, SCRIPT, "--skip-training", "--model", "small.keras"]
    command += ["--output", f"theirs {NOT_UTF8}"]
    line = " ".join(shlex.quote(os.fspath(word)) for word in command) + " 2>&-"
    settings = {**os.environ, **HOSTILE, "KERAS_HOME": str(saved)}
    run = subprocess.run(line, shell=True, cwd=saved, env=settings, capture_output=True)
    assert run.returncode == 0, run.stdout.decode()
    # As in the script: without graph optimizations nothing is computed in bfloat16.
    study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
    draw_saved(saved, monkeypatch, "--output", "ours")
    study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    theirs, ours = pictures(saved / f"theirs {NOT_UTF8}"), pictures(saved / "ours")
    assert set(theirs) == set(ours) and "CAM_1.jpeg" in ours
    for name, picture in ours.items():
        assert picture.shape == theirs[name].shape, name
        assert np.abs(picture - theirs[name]).mean() < 0.5, name
    data = (saved / f"theirs {NOT_UTF8}" / "run.js").read_text("ascii")
    told = json.loads(data.removeprefix("const run = ").removesuffix(";\n"))
    # The command on the page can be pasted.
    assert "--output $'theirs tulipe \\xe9'" in told["command"]
    assert told["classes"] == ["daisy", "rose", "tulipe \\xe9"]


@POSIX_ONLY
def test_settings_that_keras_cannot_take_are_named_whatever_is_closed(tmp_path):
    (tmp_path / "keras.json").write_text('{"floatx": "float8"}')
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))} --skip-training >&-"
    settings = {**os.environ, "KERAS_HOME": str(tmp_path)}
    run = subprocess.run(command, shell=True, env=settings, capture_output=True, text=True)
    *_, message, remedy = run.stderr.splitlines()
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert message.startswith(f"{tmp_path / 'keras.json'}: ") and "float8" in message
    assert remedy == "Mend or remove that file."


def test_keras_that_was_loaded_on_another_backend_is_named(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(Stop, match=r"Keras runs on torch here\. Restart Python"):
        study.load_libraries()


@pytest.mark.usefixtures("quick_patterns")
def test_it_runs_in_a_thread_with_streams_that_are_no_files(saved, split_flowers, monkeypatch):
    """As in a notebook or behind a window."""
    shown, errors = io.StringIO(), []

    def call():
        try:
            study.run(lambda: draw_saved(saved, monkeypatch, "--data", split_flowers))
        except BaseException as error:
            errors.append(error)

    with contextlib.redirect_stdout(shown), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert not errors
    lines = shown.getvalue().splitlines()
    drawn = {path.name for path in (saved / "Images").iterdir()}
    assert drawn - {"index.html", "run.js"} <= set(lines)  # a line a picture
    page = (saved / "Images" / "index.html").as_uri()
    assert page.startswith("file:///") and lines[-1].endswith(page)


def test_hidden_folders_hold_no_photos(split_flowers, tmp_path):
    shutil.copytree(split_flowers / "test", tmp_path / "test")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        for folder in (tmp_path / "test", tmp_path / "test" / "rose"):
            (folder / hidden).mkdir()
            shutil.copy(tmp_path / "test" / "rose" / "0.jpg", folder / hidden / "0.jpg")
    shutil.copy(tmp_path / "test" / "rose" / "0.jpg", tmp_path / "test" / "rose" / "._0.jpg")
    batches, class_names = study.open_split(tmp_path / "test", (32, 32), 4)
    assert class_names == CLASSES
    assert [path.name for path in batches.paths] == ["0.jpg", "1.jpg", "2.jpg"] * 3


@pytest.mark.parametrize(
    ("read_only", "settings", "expected"),
    [
        ([], {}, "HOME/.keras"),
        (["HOME"], {}, "/tmp/.keras"),
        (["HOME/.keras"], {}, "/tmp/.keras"),
        ([], {"KERAS_HOME": "HOME/elsewhere"}, "HOME/elsewhere"),
        (["HOME"], {"KERAS_HOME": "HOME/elsewhere"}, "HOME/elsewhere"),
        ([], {"KERAS_HOME": "~/elsewhere"}, "HOME/elsewhere"),
    ],
)
@POSIX_ONLY
def test_the_weights_are_looked_for_where_keras_looks(
    monkeypatch, tmp_path, read_only, settings, expected
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("HOME", str(tmp_path)))
    closed = [it.replace("HOME", str(tmp_path)) for it in read_only]
    monkeypatch.setattr(os, "access", lambda path, _: os.fspath(path) not in closed)
    assert str(study.download_folder()) == expected.replace("HOME", str(tmp_path))


# ---- Own photos and own models ----


@pytest.fixture
def banner(tmp_path):
    """A photo of 160 × 12,000 pixels."""
    photo = draw_flower("rose", np.random.default_rng(7), 160)[0]
    Image.fromarray(np.tile(photo, (1, 75, 1))).save(tmp_path / "banner.jpg")
    return tmp_path / "banner.jpg"


NEED_TEST_PHOTOS = {"CAM_mistakes.jpg", "confusion_matrix.png", "training_curves.png"}


@pytest.mark.usefixtures("quick_patterns")
def test_photos_are_explained_with_nothing_but_a_model_and_its_history(
    saved, banner, monkeypatch, capsys
):
    model = keras.saving.load_model(saved / "small.keras")
    head = model.layers[-1]
    head.set_weights([np.zeros((12, 3)), np.log([0.29, 0.69, 0.02])])  # whatever the photo
    model.save(saved / "small.keras")
    draw_saved(saved, monkeypatch, "--photos", banner)
    lines = capsys.readouterr().out.splitlines()
    assert "banner.jpg: rose 69 %, daisy 29 %, tulip 2 %" in lines
    drawn = set(pictures(saved / "Images"))
    assert {"CAM_1.jpeg", "heatmap_1.jpg", "CAM_layers.jpg", "strip.jpg", "ReLU.png"} <= drawn
    assert "conv2d_1_grid.jpg" in drawn and "conv2d_3_filters.jpg" in drawn
    assert not NEED_TEST_PHOTOS & drawn


def test_class_names_come_from_the_history_or_else_from_a_split_or_else_are_numbers(
    saved, banner, monkeypatch, split_flowers
):
    def names(data):
        arguments = ["--skip-training", "--model", "small.keras", "--photos", "banner.jpg"]
        monkeypatch.setattr(sys, "argv", ["script", *arguments, "--data", str(data)])
        return study.open_saved(study.parse_options())[1]

    monkeypatch.chdir(saved)
    (saved / "small_history.json").write_text(json.dumps(record_of(["a", "b", "c"])))
    assert names(".") == ["a", "b", "c"]
    (saved / "small_history.json").unlink()
    assert names(".") == ["class 0", "class 1", "class 2"]
    shutil.copytree(split_flowers / "train", saved / "data" / "train")
    assert names("data") == CLASSES


def test_a_model_is_never_drawn_under_the_names_of_other_classes(saved, split_flowers, monkeypatch):
    shutil.copytree(split_flowers / "test", saved / "test")
    (saved / "test" / "daisy").rename(saved / "test" / "marguerite")
    with pytest.raises(Stop, match=r"daisy, rose, tulip;.*marguerite, rose, tulip") as stop:
        draw_saved(saved, monkeypatch)
    assert stop.value.exit_code == 2
    shutil.rmtree(saved / "test" / "marguerite")
    (saved / "small_history.json").unlink()
    with pytest.raises(Stop, match=r"small\.keras: has 3 classes, .*test 2") as stop:
        draw_saved(saved, monkeypatch)
    assert stop.value.exit_code == 2
    (saved / "small_history.json").write_text(json.dumps(record_of(["rose", "tulip"])))
    with pytest.raises(Stop, match=r"small\.keras: has 3 classes, .*test 2"):
        draw_saved(saved, monkeypatch)
    with pytest.raises(Stop, match=r"small\.keras: has 3 classes, .*small_history\.json 2"):
        draw_saved(saved, monkeypatch, "--data", "nowhere", "--photos", *split_flowers.rglob("0.*"))
    assert not (saved / "Images").exists()


@pytest.mark.parametrize("content", ["[1, 2]", "5", "{", '{"classes": ["daisy"]}'])
def test_a_history_that_is_none_is_named(saved, monkeypatch, content):
    (saved / "small_history.json").write_text(content)
    with pytest.raises(Stop, match=r"^small_history\.json: .*\nMend or remove it\.$") as stop:
        draw_saved(saved, monkeypatch)
    assert stop.value.exit_code == 2


def with_head(policy, head):
    """A small classifier under a dtype policy, with one of the usual softmax heads."""
    keras.config.set_dtype_policy(policy)
    try:
        model = small_model(32)
        means = model.layers[-2].output
        if head == "dense":
            return model
        logits = layers.Dense(3)(means)
        softmax = layers.Softmax() if head == "layer" else layers.Activation("softmax")
        return keras.Model(model.input, softmax(logits))
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("head", ["dense", "layer", "activation"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"])
def test_a_model_is_drawn_in_float32_however_it_was_saved(policy, head, tmp_path):
    keras.utils.set_random_seed(0)
    model = with_head(policy, head)
    model.save(tmp_path / "model.keras")
    photo = draw_flower("rose", np.random.default_rng(0), 32)[0].astype("float32")
    expected = np.asarray(model(photo[None])[0], "float32")
    loaded = study.load_model(tmp_path / "model.keras", 32)
    probabilities = study.classifier(loaded)(photo[None])[0].numpy()
    assert probabilities.dtype == np.float32 and probabilities.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(probabilities, expected, atol=0.01)
    heatmap = study.grad_cam(loaded, photo, "maps_3", 1)
    assert heatmap.dtype == np.float32 and np.isfinite(heatmap).all()

"""What the training script promises in surroundings that are not its own."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import CLASSES, NOT_UTF8, full_disk_at, save_small, small_model
from draw_flowers import draw_flower
from keras import layers
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import Stop

SCRIPT = Path(study.__file__)
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell and terminal")


@pytest.fixture
def saved(tmp_path):
    """A folder with nothing but a small model, small.keras, and its history."""
    save_small(tmp_path)
    return tmp_path


SHORT = {"pattern_size": 48, "pattern_steps": 2}  # what patterns look like is tested elsewhere


def draw_saved(folder, monkeypatch, *arguments, **pattern_settings):
    """Call the script's main() in the folder, as the command line does."""
    monkeypatch.chdir(folder)
    words = ["--skip-training", "--model", "small.keras", *map(str, arguments)]
    study.main(study.parse_options(words), **SHORT | pattern_settings)


def pictures(folder):
    files = [path for path in folder.iterdir() if path.suffix not in (".html", ".js", ".csv")]
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
    started_in_a_terminal,
):
    run, shown = started_in_a_terminal
    text = shown.result(timeout=300)
    assert run.wait(timeout=60) == 130, text
    assert "small.keras" in text and "--skip-training" in text
    assert "━" in text and ".jpg" not in text  # a bar, and no list of files beside it
    assert "Traceback" not in text
    assert "oneDNN" not in text and "InitializeLog" not in text  # nor TensorFlow's start-up


KNOWN = (
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    "I0000 00:00:1 port.cc:153] oneDNN custom operations are on.\n"
)
OTHER = "W0 no such device\n"


@POSIX_ONLY
@pytest.mark.parametrize(
    ("lines", "end", "shown"),
    [
        (KNOWN, "raise ImportError('broken')", ""),
        (KNOWN + OTHER, "raise ImportError('broken')", OTHER),
        (OTHER + KNOWN, "os.abort()", OTHER),
    ],
)
def test_of_what_tensorflow_says_while_it_loads_only_harmless_lines_are_left_out(
    tmp_path, lines, end, shown
):
    fake = f"import os\nos.write(2, {lines.encode()!r})\n{end}\n"
    (tmp_path / "tensorflow.py").write_text(fake)
    settings = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, SCRIPT]
    run = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    text, broken, _ = run.stderr.partition("broken.\n")
    assert text == shown
    assert bool(broken) == (run.returncode == 1) == end.startswith("raise")


# ---- Settings, streams and names that a machine may have ----


@POSIX_ONLY
def test_pictures_depend_on_no_setting_of_the_machine_and_on_no_encoding(
    started_hostile_run, monkeypatch
):
    folder, run = started_hostile_run
    # As in the script: without graph optimizations nothing is computed in bfloat16.
    study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
    as_the_script = {"pattern_size": study.PATTERN_SIZE, "pattern_steps": study.PATTERN_STEPS}
    draw_saved(folder, monkeypatch, "--output", "ours", **as_the_script)
    study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    theirs, ours = pictures(folder / f"theirs {NOT_UTF8}"), pictures(folder / "ours")
    assert set(theirs) == set(ours) and "CAM_1.jpeg" in ours
    for name, picture in ours.items():
        assert picture.shape == theirs[name].shape, name
        assert np.abs(picture - theirs[name]).mean() < 0.5, name
    data = (folder / f"theirs {NOT_UTF8}" / "run.js").read_text("ascii")
    told = json.loads(data.removeprefix("const run = ").removesuffix(";\n"))
    assert "--output" in told["command"].split()
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


def run_as_a_notebook_does(monkeypatch, *words):
    """What %run does; returns the exit code. Its words have no other way in than sys.argv."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_keras_that_was_loaded_on_another_backend_is_named(monkeypatch, capsys):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")  # which is not installed
    assert run_as_a_notebook_does(monkeypatch, "--skip-training", "--model", "absent.keras") == 1
    message = capsys.readouterr().err.strip()
    assert "torch" in message and "Restart Python" in message


def test_the_backend_of_a_notebook_stays(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert run_as_a_notebook_does(monkeypatch, "--skip-training", "--model", "absent.keras") == 2
    assert "absent.keras" in capsys.readouterr().err
    assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"


@pytest.mark.filterwarnings("ignore:Even though the")
def test_it_trains_where_python_found_its_streams_closed(split_flowers, tmp_path, monkeypatch):
    """Python has None in the place of a closed stream."""
    words = ["--data", split_flowers, "--model", tmp_path / "net.keras", "--output", tmp_path / "I"]
    words += ["--weights", "none", "--epochs", 1, "--batch-size", 24, "--image-size", 75]
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    study.tf.config.run_functions_eagerly(True)  # to trace a graph takes longer than one step
    try:
        study.run(lambda: study.train_and_save(study.parse_options(list(map(str, words))), one))
    finally:
        study.tf.config.run_functions_eagerly(False)
    assert len(json.loads((tmp_path / "net_history.json").read_text())["history"]["loss"]) == 1


def one(class_count, image_size, weights):
    return small_model(image_size, class_count, channels=1)


def test_it_runs_in_a_thread_with_streams_that_are_no_files(saved, three_photos, monkeypatch):
    """As in a notebook or behind a window."""
    shown, errors = io.StringIO(), []

    def call():
        try:
            study.run(lambda: draw_saved(saved, monkeypatch, "--data", three_photos))
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
    assert drawn - {"index.html", "run.js", "predictions.csv"} <= set(lines)  # a line a picture
    page = (saved / "Images" / "index.html").as_uri()
    assert page.startswith("file:///") and lines[-1].endswith(page)


def test_a_split_that_is_half_in_its_place_or_was_not_looked_through_is_named(
    split_flowers, tmp_path, capsys
):
    study.require_whole_split(split_flowers)  # made by hand: it has no split.csv
    line = capsys.readouterr().out.strip()
    assert "create_train_val_test.py" in line and "--check" in line and str(split_flowers) in line
    (tmp_path / "split.csv").touch()
    study.require_whole_split(tmp_path)
    assert capsys.readouterr().out == ""
    waiting = (
        tmp_path / ".split.building" / "split.csv"
    )  # where the split makes ready what it moves
    waiting.parent.mkdir()
    waiting.touch()
    with pytest.raises(Stop, match="half") as stop:
        study.require_whole_split(tmp_path)
    assert stop.value.exit_code == 2 and "create_train_val_test.py" in str(stop.value)


def test_every_photo_is_read_and_nothing_hidden_or_else(split_flowers, tmp_path):
    shutil.copytree(split_flowers / "test", tmp_path / "test")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        for folder in (tmp_path / "test", tmp_path / "test" / "rose"):
            (folder / hidden).mkdir()
            shutil.copy(tmp_path / "test" / "rose" / "0.jpg", folder / hidden / "0.jpg")
    shutil.copy(tmp_path / "test" / "rose" / "0.jpg", tmp_path / "test" / "rose" / "._0.jpg")
    (tmp_path / "test" / "tulip" / "2.jpg").rename(tmp_path / "test" / "tulip" / "2.JPG")
    # What is inside counts, whatever the name says.
    shutil.copy(tmp_path / "test" / "rose" / "0.jpg", tmp_path / "test" / "tulip" / "3.jpg_large")
    (tmp_path / "test" / "tulip" / "thumbs.db").write_bytes(bytes(600))
    batches, class_names = study.open_split(tmp_path / "test", (32, 32), 4)
    assert class_names == CLASSES
    names = [path.name for path in batches.paths]
    expected = [*(["0.jpg", "1.jpg", "2.jpg"] * 2), "0.jpg", "1.jpg", "2.JPG", "3.jpg_large"]
    assert names == expected


# ---- Own photos and own models ----


@pytest.fixture
def banner(tmp_path):
    """A photo of 160 × 12,000 pixels."""
    photo = draw_flower("rose", np.random.default_rng(7), 160)[0]
    Image.fromarray(np.tile(photo, (1, 75, 1))).save(tmp_path / "banner.jpg")
    return tmp_path / "banner.jpg"


NEED_TEST_PHOTOS = {"CAM_mistakes.jpg", "confusion_matrix.png", "training_curves.png"}


def test_photos_are_explained_with_nothing_but_a_model_and_its_history(
    saved, banner, monkeypatch, capsys
):
    model = keras.saving.load_model(saved / "small.keras")
    head = model.layers[-1]
    head.set_weights([np.zeros((3, 3)), np.log([0.29, 0.69, 0.02])])  # whatever the photo
    model.save(saved / "small.keras")
    draw_saved(saved, monkeypatch, "--photos", banner)
    lines = capsys.readouterr().out.splitlines()
    assert "banner.jpg: rose 69 %, daisy 29 %, tulip 2 %" in lines
    drawn = set(pictures(saved / "Images"))
    assert {"CAM_1.jpeg", "CAM_layers.jpg", "strip.jpg", "ReLU.png"} <= drawn
    assert "conv2d_1_grid.jpg" in drawn and "conv2d_3_filters.jpg" in drawn
    assert not NEED_TEST_PHOTOS & drawn


def test_class_names_come_from_the_history_or_the_test_folder_or_are_numbers(
    saved, banner, monkeypatch, split_flowers
):
    def names(data):
        words = ["--skip-training", "--model", "small.keras", "--photos", "banner.jpg"]
        return study.open_saved(study.parse_options([*words, "--data", str(data)]))[1]

    monkeypatch.chdir(saved)
    save_small(saved, ["a", "b", "c"])
    assert names(".") == ["a", "b", "c"]
    (saved / "small_history.json").unlink()
    assert names(".") == ["class 0", "class 1", "class 2"]
    assert names(split_flowers) == CLASSES
    # The photos of another split may be of another data set.
    shutil.copytree(split_flowers / "train", saved / "data" / "train")
    assert names("data") == ["class 0", "class 1", "class 2"]


def test_a_model_is_never_drawn_under_the_names_of_other_classes(saved, split_flowers, monkeypatch):
    shutil.copytree(split_flowers / "test", saved / "test")
    (saved / "test" / "daisy").rename(saved / "test" / "marguerite")

    def refusal(*arguments):
        with pytest.raises(Stop) as stop:
            draw_saved(saved, monkeypatch, *arguments)
        assert stop.value.exit_code == 2 and "small.keras" in str(stop.value)
        return str(stop.value)

    message = refusal()
    assert "daisy, rose, tulip" in message and "marguerite, rose, tulip" in message
    shutil.rmtree(saved / "test" / "marguerite")
    (saved / "small_history.json").unlink()
    assert re.search(r"3 classes.*test\D*2", refusal())
    save_small(saved, ["rose", "tulip"])
    assert re.search(r"3 classes.*test\D*2", refusal())
    photos = ("--data", "nowhere", "--photos", *split_flowers.rglob("0.*"))
    assert re.search(r"3 classes.*small_history\.json\D*2", refusal(*photos))
    assert not (saved / "Images").exists()


@pytest.mark.parametrize("content", ["[1, 2]", "5", "{", '{"classes": ["daisy"]}'])
def test_a_history_that_is_none_is_named(saved, monkeypatch, content):
    (saved / "small_history.json").write_text(content)
    with pytest.raises(Stop, match=r"small_history\.json: .*\n") as stop:
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


@pytest.mark.parametrize(
    ("policy", "head"),
    [
        ("float32", "dense"),
        ("mixed_float16", "dense"),
        ("mixed_bfloat16", "layer"),
        ("float16", "activation"),
    ],
)
def test_a_model_is_drawn_in_float32_however_it_was_saved(policy, head, tmp_path):
    keras.utils.set_random_seed(0)
    model = with_head(policy, head)
    model.save(tmp_path / "model.keras")
    photo = draw_flower("rose", np.random.default_rng(0), 32)[0].astype("float32")
    expected = np.asarray(model(photo[None])[0], "float32")
    loaded = study.load_model(tmp_path / "model.keras")
    probabilities = loaded(photo[None])[0].numpy()
    assert probabilities.dtype == np.float32 and probabilities.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(probabilities, expected, atol=0.01)
    heatmap = study.grad_cam(loaded, photo, "maps_3", 1)
    assert heatmap.dtype == np.float32 and np.isfinite(heatmap).all()


def test_a_file_that_holds_no_model_is_named(saved, split_flowers, monkeypatch, tmp_path):
    shutil.copytree(split_flowers / "test", saved / "test")
    whole = (saved / "small.keras").read_bytes()
    sequence = keras.Input((75,))
    keras.Model(sequence, layers.Dense(3, activation="softmax")(sequence)).save(
        saved / "sequence.keras"
    )
    photo = keras.Input((32, 32, 3))
    keras.Model(photo, layers.Lambda(lambda x: x / 255)(photo)).save(saved / "unsafe.keras")
    (saved / "corrupt.keras").write_bytes(whole[: len(whole) // 2])
    for name in ("absent", "corrupt", "sequence", "unsafe"):
        with pytest.raises(Stop, match=rf"--model .*{name}\.keras") as stop:
            draw_saved(saved, monkeypatch, "--model", f"{name}.keras")
        assert stop.value.exit_code == 2 and str(stop.value).count("\n") <= 2
    assert not (saved / "Images").exists()


# ---- A disk that is full ----


@pytest.fixture
def drawn(saved, split_flowers, monkeypatch):
    """What an earlier run drew, and the words of the next one."""
    photo = split_flowers / "test" / "rose" / "0.jpg"
    draw_saved(saved, monkeypatch, "--photos", photo, "--data", "nowhere")
    return saved / "Images", ("--photos", photo, "--data", "nowhere", "--seed", 1)


@POSIX_ONLY
def test_a_full_disk_leaves_the_pictures_and_the_page_of_the_earlier_run(
    saved, drawn, monkeypatch, capsys
):
    folder, arguments = drawn
    for file in ("OriginalImage.jpeg", "CAM_1.jpeg", "run.js"):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with full_disk_at(file), pytest.raises(SystemExit) as end:
            study.run(lambda: draw_saved(saved, monkeypatch, *arguments))
        message = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 1 and file in message[0] and len(message) <= 3
        after = {path: path.read_bytes() for path in folder.iterdir()}
        assert set(after) == set(before) and after[folder / file] == before[folder / file]
        for path in after:
            if path.suffix in (".jpg", ".jpeg", ".png"):
                Image.open(path).load()  # each picture is whole, of this run or of the earlier one

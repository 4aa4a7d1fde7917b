"""What the training promises: true augmentation, honest phases, and that nothing good is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, small_model
from draw_flowers import draw_flower
from keras import layers
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import Stop, locked

ROOT = Path(__file__).parents[1]
STOCK = tf.keras.preprocessing.image.ImageDataGenerator
# What TensorFlow writes on the standard error stream while it starts.
START_UP = re.compile(r"(WARNING: All log messages before absl::InitializeLog\(\)|I0000 ).*\n")


# The script with short ascents, whose strength is tested elsewhere, and with a training that is not
# traced, which takes longer than its few steps.
WHOLE_RUN = """
import model_training_and_visualization as study
study.PATTERN_STEPS, study.PATTERN_SIZE = 2, 48
study.computes_in_bfloat16 = lambda: False  # as in the tests' own process
draw, run_eagerly = study.draw, study.tf.config.run_functions_eagerly

def draw_traced(*arguments, **options):
    run_eagerly(False)
    draw(*arguments, **options)

study.draw = draw_traced
run_eagerly(True)
study.run(study.main)
"""


def start_script(*arguments):
    """Start the script in a process of its own."""
    warnings = ("-W", "ignore:Even though the")
    command = [sys.executable, *warnings, "-c", WHOLE_RUN, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **streams)


def run_code(code, **paths):
    """Run code in a process of its own, with the paths filled in."""
    paths = {name: str(path) for name, path in paths.items()}
    code = code.format(root=str(ROOT), tests=str(ROOT / "tests"), **paths)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def started_run(split_flowers, tmp_path_factory):
    """A whole run that goes on in the background."""
    folder = tmp_path_factory.mktemp("run")
    options = ("--data", split_flowers, "--model", folder / "net.keras")
    options += ("--output", folder / "Images")
    small = ("--weights", "none", "--epochs", 2, "--image-size", 75, "--batch-size", 8)
    with start_script(*options, *small) as run:
        yield folder, options, run
        run.kill()


@pytest.fixture(scope="session", autouse=True)
def start_early(request):
    """Start the run before the tests that do not need it, where others do."""
    if any("whole_run" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("started_run")


# ---- Augmentation ----


@pytest.mark.parametrize("fill_mode", ["nearest", "wrap"])
def test_the_warp_gives_the_same_picture_as_the_stock_generator(fill_mode):
    ranges = dict(study.AUGMENTATION, shear_range=10, zoom_range=0.2, fill_mode=fill_mode, cval=77)
    ours, stock = study.PhotoGenerator(**ranges), STOCK(**ranges)
    photo = draw_flower("daisy", np.random.default_rng(0), 160)[0].astype("float32")
    for seed in range(8):
        parameters = stock.get_random_transform(photo.shape, seed)
        expected = stock.apply_transform(photo, parameters)
        assert np.abs(ours.apply_transform(photo, parameters) - expected).mean() < 0.5
        assert np.abs(expected - photo).mean() > 2  # there was something to do


def train_batches(folder, seed=3):
    generator = study.PhotoGenerator(**study.AUGMENTATION)
    return study.open_split(folder / "train", (48, 48), 5, seed, generator)[0]


def fed_batches(folder, workers, epochs=1, seed=3):
    """What Keras feeds a model in training."""
    photos = train_batches(folder, seed)
    photos.workers = workers
    fed = []

    class Recorder(keras.Sequential):
        def train_step(self, data):
            fed.append(data[0].numpy())
            return {"loss": 0.0}

    model = Recorder([keras.Input((48, 48, 3)), layers.Flatten(), layers.Dense(3)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(photos, epochs=epochs, verbose=0, shuffle=False)
    return fed


def test_batches_are_the_same_whatever_the_number_of_workers(split_flowers):
    alone, together = fed_batches(split_flowers, 1), fed_batches(split_flowers, 4)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_epoch_and_every_seed_augments_anew_but_the_same_seed_alike(split_flowers):
    first = np.concatenate(fed_batches(split_flowers, 2, epochs=2))
    different = np.unique(first.reshape(len(first), -1), axis=0)
    assert len(different) == len(first) == 2 * 8 * len(CLASSES)
    again = np.concatenate(fed_batches(split_flowers, 2, epochs=2))
    np.testing.assert_array_equal(first, again)
    other_seed = np.concatenate(fed_batches(split_flowers, 2, epochs=2, seed=4))
    assert not np.array_equal(first, other_seed)


def test_photos_that_are_no_longer_kept_give_the_same_batches(split_flowers, monkeypatch):
    photos = train_batches(split_flowers)
    kept = photos[1][0]
    monkeypatch.setattr(study, "model_input", study.model_input.__wrapped__)
    np.testing.assert_array_equal(photos[1][0], kept)


def test_only_training_photos_are_augmented_and_each_label_is_its_folder(split_flowers):
    splits, names = study.open_all_splits(split_flowers, (48, 48), 100, seed=0)
    assert names == CLASSES
    photos, labels = splits["test"][0]
    for photo, label, path in zip(photos, labels, splits["test"].paths, strict=True):
        plain = Image.open(path).resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(photo - np.asarray(plain)).mean() < 3  # a JPEG is decoded at half its size
        assert CLASSES[label.argmax()] == path.parent.name and label.sum() == 1
    assert splits["train"].generator and not splits["validation"].generator


# ---- Phases ----


def weights_of(model, layer_names):
    weights = (model.get_layer(name).get_weights() for name in layer_names)
    return [weight.copy() for of_layer in weights for weight in of_layer]


def changed(before, after):
    return [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.fixture
def eagerly():
    """To trace the graph of a large model takes longer than its few steps do without."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.filterwarnings("ignore:Even though the")
def test_the_head_learns_first_then_the_blocks_from_freeze_below_up(
    split_flowers, inception, tmp_path
):
    """A saved model stands in for the pretrained one."""
    pretrained, file = inception
    model = study.build_model(3, 75, str(file))
    splits, _ = study.open_all_splits(split_flowers, (75, 75), batch_size=8, seed=0)
    phases = study.training_phases(2, str(file), "mixed9", learning_rate=5e-3)
    assert [(it.name, it.start_epoch, it.end_epoch, it.learning_rate) for it in phases] == [
        ("head", 0, 1, 1e-3),
        ("fine-tuning", 1, 2, 5e-3),
    ]
    frozen = keras.Model(model.input, model.get_layer("mixed8").output).layers
    below = [layer.name for layer in model.layers if layer.weights and layer in frozen]
    head = [layer.name for layer in model.layers if isinstance(layer, layers.Dense)]
    with_weights = [layer.name for layer in model.layers if layer.weights]
    above = [name for name in with_weights if name not in [*below, *head]]
    assert len(below) > 100 and len(above) > 30
    start_below, start_above = weights_of(model, below), weights_of(model, above)
    start_layers = {name: weights_of(model, [name]) for name in above}
    start_head = weights_of(model, head)
    np.testing.assert_array_equal(start_below[0], pretrained.layers[2].get_weights()[0])
    checkpoints = study.Checkpoints(tmp_path / "checkpoints", {})
    study.train(model, splits, phases[:1], checkpoints)
    assert not any(changed(start_below, weights_of(model, below)))  # BatchNormalization too
    assert not any(changed(start_above, weights_of(model, above)))
    assert all(changed(start_head, weights_of(model, head)))
    study.train(model, splits, phases, checkpoints)
    assert not any(changed(start_below, weights_of(model, below)))
    for name, start in start_layers.items():
        learns = not isinstance(model.get_layer(name), layers.BatchNormalization)
        assert set(changed(start, weights_of(model, [name]))) == {learns}, name
    assert checkpoints.epochs == 2


def test_the_fine_tuning_rate_warms_up_to_its_peak_and_falls_to_zero_along_a_cosine():
    model = small_model()
    phase = study.Phase("scratch", 0, 10, "none", 0.01, cosine=True)
    study.compile_for(model, phase, steps_per_epoch=20)
    rate = model.optimizer._learning_rate
    rates = np.array([float(rate(step)) for step in (0, 10, 20, 110, 200)])
    np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.005, 0], atol=1e-6)


def test_in_training_the_head_loses_about_a_tenth_of_its_features(inception):
    (dropout,) = [layer for layer in inception[0].layers if isinstance(layer, layers.Dropout)]
    lost = dropout(np.ones((1, 20_000), "float32"), training=True) == 0
    assert np.mean(lost) == pytest.approx(0.1, abs=0.02)


def small_inception():
    """What --weights knows of InceptionV3: a flat model with mixed10, and that backbone alone."""
    photo = keras.Input((16, 16, 3))
    maps = layers.BatchNormalization(name="mixed10")(layers.Conv2D(4, 3)(photo))
    means = layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(photo, layers.Dense(3, activation="softmax")(means))
    return model, keras.Model(photo, maps)


def test_a_new_model_starts_from_the_weights_of_a_saved_one(inception):
    model, path = inception
    again = study.build_model(2, 80, str(path))
    old, new = (
        keras.Model(it.input, it.get_layer("mixed10").output).get_weights() for it in (model, again)
    )
    assert not any(changed(old, new))
    assert again.output_shape == (None, 2) and again.input_shape == (None, 80, 80, 3)


# ---- Nothing lost ----


def small_splits(folder):
    splits, _ = study.open_all_splits(folder, (32, 32), batch_size=6, seed=5)
    splits["train"].workers = 1
    return splits


SMALL_PHASES = [
    study.Phase("head", 0, 2, "none", 1e-3, cosine=False),
    study.Phase("fine-tuning", 2, 5, "none", 3e-3, cosine=True),
]


def train_small(folder, checkpoint_folder, resume=False, epochs=5):
    keras.utils.set_random_seed(1)
    model, checkpoints = small_model(), study.Checkpoints(checkpoint_folder, {"seed": 5})
    if resume:
        checkpoints.resume(model)
    save_epoch = checkpoints.on_epoch_end

    def interrupted_after(epoch, logs=None):
        if epoch == epochs:
            raise KeyboardInterrupt
        save_epoch(epoch, logs)

    checkpoints.on_epoch_end = interrupted_after
    study.train(model, small_splits(folder), SMALL_PHASES, checkpoints)
    return model, checkpoints


@pytest.fixture(scope="session")
def uninterrupted(split_flowers, tmp_path_factory):
    return train_small(split_flowers, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def interrupted_after_4(split_flowers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        train_small(split_flowers, folder, epochs=4)
    return folder


def assert_same_run(ours, theirs):
    (model, checkpoints), (reference, whole) = ours, theirs
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        values, expected = checkpoints.history[name], whole.history[name]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert checkpoints.epochs == 5
    assert checkpoints.file_of(checkpoints.best_epoch).is_file()


def test_a_run_resumed_in_its_second_phase_equals_an_uninterrupted_one(
    split_flowers, tmp_path, interrupted_after_4, uninterrupted
):
    shutil.copytree(interrupted_after_4, tmp_path / "checkpoints")
    resumed = train_small(split_flowers, tmp_path / "checkpoints", resume=True)
    assert_same_run(resumed, uninterrupted)


def test_a_run_resumed_between_its_phases_equals_an_uninterrupted_one(
    split_flowers, tmp_path, uninterrupted
):
    with pytest.raises(KeyboardInterrupt):
        train_small(split_flowers, tmp_path / "checkpoints", epochs=2)
    resumed = train_small(split_flowers, tmp_path / "checkpoints", resume=True)
    assert_same_run(resumed, uninterrupted)


@pytest.mark.parametrize("bytes_left", [0, -200])
def test_a_broken_checkpoint_falls_back_to_the_epoch_before_it(
    split_flowers, tmp_path, interrupted_after_4, uninterrupted, bytes_left, capsys
):
    shutil.copytree(interrupted_after_4, tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").glob("*epoch_004.keras"))
    newest.write_bytes(newest.read_bytes()[:bytes_left])
    resumed = train_small(split_flowers, tmp_path / "checkpoints", resume=True)
    assert_same_run(resumed, uninterrupted)
    assert f"{newest}: cannot be read" in capsys.readouterr().out


def test_a_checkpoint_is_an_ordinary_keras_model_that_carries_its_history(interrupted_after_4):
    for file in interrupted_after_4.glob("*.keras"):
        assert keras.saving.load_model(file).output_shape == (None, 3)
        record = json.loads(zipfile.ZipFile(file).read("record.json"))
        epochs = int(file.stem.rpartition("_")[2])
        assert {len(values) for values in record["history"].values()} == {epochs}


def test_resuming_with_other_settings_is_refused_naming_them(interrupted_after_4, tmp_path):
    with pytest.raises(Stop, match=r"seed 5, not 6") as stop:
        study.Checkpoints(interrupted_after_4, {"seed": 6}).resume(small_model())
    assert stop.value.exit_code == 2
    with pytest.raises(Stop, match="no epoch in"):
        study.Checkpoints(tmp_path, {"seed": 5}).resume(small_model())


def train_until_a_signal(folder, checkpoint_folder, kind):
    """Send the signal in the fourth epoch, whose weights are written but do not count yet."""
    write_record = zipfile.ZipFile.writestr

    def interrupted(archive, name, content):
        if name == "record.json" and len(json.loads(content)["history"]["loss"]) == 4:
            os.kill(os.getpid(), signal.Signals[kind])
        write_record(archive, name, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", interrupted)
        study.run(lambda: train_small(Path(folder), Path(checkpoint_folder)))


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_training import train_until_a_signal
train_until_a_signal({data!r}, {checkpoints!r}, "SIGKILL")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("kind", "exit_code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)]
)
def test_a_run_killed_while_it_writes_a_checkpoint_is_resumed_with_every_epoch_once(
    split_flowers, tmp_path, uninterrupted, kind, exit_code, capsys
):
    if kind == "SIGKILL":
        run = run_code(KILLED, data=split_flowers, checkpoints=tmp_path)
        assert run.returncode == exit_code, run.stderr
    else:
        with pytest.raises(SystemExit) as end:
            train_until_a_signal(split_flowers, tmp_path, kind)
        assert end.value.code == exit_code
        assert ("Epochs kept: 3;" in capsys.readouterr().out) == (kind == "SIGINT")
    assert sorted(tmp_path.glob("*_epoch_*.keras"))[-1].name.endswith("_epoch_003.keras")
    assert_same_run(train_small(split_flowers, tmp_path, resume=True), uninterrupted)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_earlier_checkpoints_and_says_what_to_do(
    split_flowers, tmp_path, interrupted_after_4, capsys
):
    import resource

    shutil.copytree(interrupted_after_4, tmp_path / "checkpoints")
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))  # 10,000 bytes left
    try:
        with pytest.raises(SystemExit) as end:
            study.run(lambda: train_small(split_flowers, tmp_path / "checkpoints", resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    message = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and "another place" in message[-1] and len(message) <= 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    study.Checkpoints(tmp_path / "checkpoints", {"seed": 5}).resume(small_model())


def test_a_loss_of_nan_stops_at_once_and_keeps_the_best_weights(split_flowers, tmp_path):
    checkpoints = study.Checkpoints(tmp_path / "checkpoints", {})
    model, splits = small_model(), small_splits(split_flowers)
    first = study.Phase("scratch", 0, 1, "none", 1e-3, cosine=False)
    study.train(model, splits, [first], checkpoints)
    head = model.layers[-1]
    head.set_weights([weight * np.nan for weight in head.get_weights()])
    second = study.Phase("scratch", 1, 9, "none", 0.5, cosine=False)
    with pytest.raises(Stop, match=r"NaN in epoch 2 at learning rate 0.5") as stop:
        study.train(model, splits, [second], checkpoints)
    assert stop.value.exit_code == 1 and str(checkpoints.file_of(1)) in str(stop.value)
    fresh = small_model()
    fresh.load_weights(checkpoints.file_of(1))
    assert all(np.isfinite(weight).all() for weight in fresh.get_weights())
    assert checkpoints.epochs == 1


def test_running_out_of_memory_names_the_options_that_help(split_flowers, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(keras.Model, "fit", exhausted)
    with pytest.raises(Stop, match=r"smaller --batch-size or --image-size") as stop:
        train_small(split_flowers, tmp_path / "checkpoints")
    assert stop.value.exit_code == 1


TWO_DEVICES = """
import sys, tensorflow as tf
sys.path[:0] = [{root!r}, {tests!r}]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import model_training_and_visualization as study
from pathlib import Path
from conftest import small_model
strategy = study.training_strategy()
assert strategy.num_replicas_in_sync == 2, strategy
splits, _ = study.open_all_splits(Path({data!r}), (32, 32), batch_size=6, seed=0)
with strategy.scope():
    checkpoints = study.Checkpoints(Path({folder!r}), {{}})
    phase = study.Phase("scratch", 0, 2, "none", 1e-2, cosine=True)
    study.train(small_model(), splits, [phase], checkpoints)
assert checkpoints.epochs == 2
"""


def test_several_devices_train_mirrored(split_flowers, tmp_path):
    run = run_code(TWO_DEVICES, data=split_flowers, folder=tmp_path / "checkpoints")
    assert run.returncode == 0, run.stderr


# ---- From the photos to the saved model ----


def training_options(data, folder, monkeypatch, *arguments):
    """The options of a run that writes into a folder."""
    options = ["--data", data, "--model", folder / "net.keras", "--output", folder / "Images"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, [*options, *arguments])])
    return study.parse_options()


@pytest.fixture
def small_run(split_flowers, tmp_path, monkeypatch):
    """The options of a training of three epochs of a small model."""
    monkeypatch.setattr(study, "build_model", lambda classes, size, _: small_model(size, classes))
    small = ("--weights", "none", "--epochs", 3, "--image-size", 75, "--batch-size", 8)
    return training_options(split_flowers, tmp_path, monkeypatch, *small)


def test_the_model_that_is_saved_is_the_one_of_the_best_epoch(small_run, monkeypatch):
    validation_losses, weights = [3.0, 1.0, 2.0], []

    class Checkpoints(study.Checkpoints):
        def on_epoch_end(self, epoch, logs=None):
            weights.append(self.model.get_weights())
            super().on_epoch_end(epoch, dict(logs, val_loss=validation_losses[epoch]))

    monkeypatch.setattr(study, "Checkpoints", Checkpoints)
    _, class_names, test, record = study.train_and_save(small_run)
    saved = keras.saving.load_model(small_run.model).get_weights()
    assert not any(changed(saved, weights[1]))
    assert all(any(changed(saved, weights[epoch])) for epoch in (0, 2))
    assert record["history"]["val_loss"] == validation_losses
    assert class_names == CLASSES and len(test.paths) == 9
    assert json.loads(small_run.model.with_name("net_history.json").read_text()) == record
    assert {path.name for path in small_run.model.parent.iterdir()} == {
        "net.keras",
        "net_history.json",
    }


def test_training_takes_no_notice_of_what_a_settings_file_of_keras_holds(small_run, monkeypatch):
    monkeypatch.setattr(study, "draw", lambda *_, **__: None)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_floatx("float16")
    try:
        study.main()
    finally:
        keras.config.set_image_data_format("channels_last")
        keras.config.set_floatx("float32")
    model = keras.saving.load_model(small_run.model)
    assert {layer.data_format for layer in model.layers if hasattr(layer, "kernel_size")} == {
        "channels_last"
    }
    assert {weight.dtype for weight in model.weights} == {"float32"}


def test_a_second_training_of_the_same_model_is_refused_and_leaves_the_first_alone(
    small_run, tmp_path
):
    (tmp_path / "net_checkpoints").mkdir()
    kept = tmp_path / "net_checkpoints" / "18_epoch_001.keras"
    kept.write_bytes(b"of the first training")
    with (
        locked(tmp_path / ".net.keras.lock", "held by the first training"),
        pytest.raises(Stop, match=r"net\.keras: another training writes it\.\n.*--model") as stop,
    ):
        study.train_and_save(small_run)
    assert stop.value.exit_code == 2 and kept.read_bytes() == b"of the first training"


def test_a_run_tells_at_its_start_what_it_trains_and_where_photos_are_few(split_flowers, capsys):
    splits = small_splits(split_flowers)
    study.describe(splits, CLASSES, SMALL_PHASES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Photos: 24 train, 9 validation, 9 test. Classes: daisy, rose, tulip. "
        "Epochs: head 2, fine-tuning 3."
    )
    assert len(lines) == 3 and all("class of 3 photos" in line for line in lines[1:])
    enough = Namespace(paths=range(30), labels=np.repeat([0, 1, 2], 10))
    study.describe(dict.fromkeys(splits, enough), CLASSES, SMALL_PHASES)
    assert "Warning" not in capsys.readouterr().out


# ---- Evaluation ----

# Ten photos of three classes, of which the model never says tulip.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
PROBABILITIES = np.array(
    [
        [0.50, 0.30, 0.20],
        [0.90, 0.05, 0.05],
        [0.30, 0.60, 0.10],
        [0.20, 0.70, 0.10],
        [0.10, 0.80, 0.10],
        [0.20, 0.70, 0.10],
        [0.15, 0.75, 0.10],
        [0.25, 0.65, 0.10],
        [0.55, 0.40, 0.05],
        [0.80, 0.15, 0.05],
    ]
)
EVALUATION = study.Evaluation(CLASSES, LABELS, PROBABILITIES)


def test_the_report_of_ten_photos_is_what_one_counts_by_hand():
    # Daisy is said four times, of which two are daisies; of the four daisies two are found.
    # Rose is said six times, of which four are roses; of the five roses four are found.
    assert study.evaluation_report(EVALUATION).splitlines() == [
        "Test: loss 0.8822  accuracy 0.6000",
        "class  precision  recall  photos",
        "daisy       0.50    0.50       4",
        "rose        0.67    0.80       5",
        "tulip          —    0.00       1",
        "Most confused: daisy and rose, 3 of 9 photos.",
        "Warning: this accuracy is no better than chance; train longer, on more photos.",
    ]


def test_rows_of_the_confusion_matrix_are_true_classes_and_columns_predicted_ones():
    assert EVALUATION.confusion.tolist() == [[2, 2, 0], [1, 4, 0], [1, 0, 0]]


@pytest.mark.parametrize(("correct", "warned"), [(60, True), (65, False)])
def test_an_accuracy_that_guessing_reaches_is_called_so(correct, warned):
    # Guessing daisy for 50 of 100 photos gets 50 of them right, 60 within two deviations of 5.
    labels = np.repeat([0, 1], 50)
    predicted = np.where(np.arange(100) < correct, labels, 1 - labels)
    report = study.evaluation_report(study.Evaluation(CLASSES[:2], labels, np.eye(2)[predicted]))
    assert ("no better than chance" in report) == warned


@pytest.mark.parametrize(
    ("confusion", "sentence"),
    [
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], "No class is taken for another."),
        ([[5, 0, 0], [2, 3, 0], [0, 0, 5]], "Most confused: a and b, 2 of 10 photos."),
        ([[4, 1, 0], [0, 4, 0], [1, 0, 4]], "Most confused: a and b, a and c, 1 photo each."),
        ([[4, 1, 0], [1, 2, 2], [0, 0, 5]], "Most confused: a and b, b and c, 2 photos each."),
    ],
)
def test_one_pair_is_called_the_most_confused_only_when_it_is_one(confusion, sentence):
    assert study.most_confused(np.array(confusion), ["a", "b", "c"]) == sentence


def test_examples_are_the_surest_correct_photo_then_the_worst_mistakes_then_the_least_sure():
    # Photo 1 is right with 0.90; photos 9, 3, 2, 8 are wrong with 0.05, 0.20, 0.30, 0.40 for
    # their true class; the others are right with 0.50, 0.65, 0.70, 0.75, 0.80.
    assert study.choose_examples(EVALUATION) == [1, 9, 3, 2, 8, 0, 7, 5, 6, 4]


def test_without_a_correct_photo_the_examples_are_the_worst_mistakes():
    labels = np.array([1, 1, 0])
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    evaluation = study.Evaluation(CLASSES[:2], labels, probabilities)
    assert study.choose_examples(evaluation) == [1, 2, 0]


@pytest.fixture
def figures(monkeypatch):
    """{file name: figure} in place of files."""
    figures = {}
    monkeypatch.setattr(
        study, "save_figure", lambda path, figure, *_: figures.setdefault(path.name, figure)
    )
    return figures


def test_the_drawn_matrix_has_its_counts_where_its_axes_say(figures, tmp_path):
    study.save_confusion_matrix(tmp_path / "confusion_matrix.png", EVALUATION)
    (axes,) = figures["confusion_matrix.png"].axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == CLASSES
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts[1, 0] == "2" and counts[0, 1] == "1"  # (column, row)
    shades = axes.images[0].get_array()
    np.testing.assert_allclose(shades, [[0.5, 0.5, 0], [0.2, 0.8, 0], [1, 0, 0]])


def test_each_curve_shows_the_values_that_its_label_names(figures, tmp_path):
    history = {
        "loss": [3, 2, 1],
        "val_loss": [4, 2.5, 5],
        "accuracy": [0.3, 0.5, 0.9],
        "val_accuracy": [0.2, 0.6, 0.4],
    }
    phases = {"head": 1, "fine-tuning": 2}
    study.save_training_curves(tmp_path / "training_curves.png", history, phases)
    loss, accuracy = figures["training_curves.png"].axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    drawn = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert drawn["training"] == [3, 2, 1] and drawn["validation"] == [4, 2.5, 5]
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert drawn["training"] == [0.3, 0.5, 0.9] and drawn["validation"] == [0.2, 0.6, 0.4]
    kept = next(line for line in loss.lines if line.get_label() == "kept")
    assert (kept.get_xdata()[0], kept.get_ydata()[0]) == (2, 2.5)  # the lowest validation loss


# ---- Found before the first epoch ----


def test_missing_empty_and_differing_splits_are_named(split_flowers, tmp_path):
    settings = {"size": (32, 32), "batch_size": 4, "seed": 0}
    with pytest.raises(Stop, match="train: no such folder"):
        study.open_all_splits(tmp_path, **settings)
    shutil.copytree(split_flowers, tmp_path / "data")
    (tmp_path / "data" / "test" / "rose").rename(tmp_path / "data" / "test" / "orchid")
    with pytest.raises(Stop, match=r"train.*test hold different classes: orchid, rose"):
        study.open_all_splits(tmp_path / "data", **settings)
    for photo in (tmp_path / "data" / "train" / "tulip").iterdir():
        photo.unlink()
    with pytest.raises(Stop, match=r"train: no photos in tulip"):
        study.open_all_splits(tmp_path / "data", **settings)


def test_a_photo_that_is_cut_off_is_named_before_training(split_flowers, tmp_path):
    shutil.copytree(split_flowers / "train", tmp_path / "train")
    cut = tmp_path / "train" / "rose" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(Stop, match=r"rose.3\.jpg: is damaged.*\nRemove it") as stop:
        study.open_split(tmp_path / "train", (32, 32), batch_size=4)
    assert stop.value.exit_code == 2


def test_missing_corrupt_foreign_and_unsafe_files_are_named(inception, tmp_path):
    corrupt, foreign = tmp_path / "corrupt.keras", tmp_path / "foreign.keras"
    corrupt.write_bytes(inception[1].read_bytes()[:5000])
    sequence = keras.Input((75,))
    keras.Model(sequence, layers.Dense(3, activation="softmax")(sequence)).save(foreign)
    unsafe = tmp_path / "unsafe.keras"
    photo = keras.Input((75, 75, 3))
    keras.Model(photo, layers.Lambda(lambda x: x / 255)(photo)).save(unsafe)
    for function, option in (
        (lambda path: study.load_model(path, 75), "--model"),
        (lambda path: study.load_backbone_weights(small_inception()[1], path), "--weights"),
    ):
        with pytest.raises(Stop, match=rf"{option} .*absent\.keras: no such file"):
            function(tmp_path / "absent.keras")
        for path in (corrupt, foreign, unsafe):
            with pytest.raises(Stop, match=rf"{option} .*{path.name}: ") as stop:
                function(path)
            assert stop.value.exit_code == 2 and str(stop.value).count("\n") <= 2


def test_an_imagenet_download_that_fails_names_address_file_and_other_choices(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    real = keras.applications.InceptionV3

    def unreachable(*arguments, weights=None, **options):
        if weights == "imagenet":
            raise Exception("URL fetch failure: no route to host")
        return real(*arguments, weights=weights, **options)

    unreachable.__module__ = real.__module__
    monkeypatch.setattr(keras.applications, "InceptionV3", unreachable)
    with pytest.raises(Stop) as stop:
        study.build_model(3, 75, "imagenet")
    message = str(stop.value)
    file = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert f"/{file}" in message and "https://" in message
    assert str(tmp_path / "models" / file) in message
    assert "--weights FILE" in message and "--weights none" in message
    assert message.count("\n") <= 2 and stop.value.exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--image-size", "74"],
        ["--learning-rate", "-1"],
        ["--learning-rate", "nan"],
        ["--freeze-below", "x"],
        ["--seed", "4294967296"],
        ["--model", "a.h5"],
        ["--model", "folder.keras"],
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(monkeypatch, capsys, arguments, tmp_path):
    (tmp_path / "folder.keras").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stop:
        study.parse_options()
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_bad_input_ends_with_exit_code_2_in_few_lines_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    training_options(tmp_path / "nowhere", tmp_path / "new", monkeypatch)
    with pytest.raises(SystemExit) as end:
        study.run(study.main)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "nowhere" in message and "create_train_val_test.py" in message
    assert len(message.strip().splitlines()) <= 3 and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Stop, match="file"):
        study.require_writable(tmp_path / "file" / "Images")
    study.require_writable(tmp_path / "new" / "Images")
    assert not (tmp_path / "new").exists()


# ---- The whole run ----


@pytest.fixture(scope="session")
def whole_run(started_run):
    folder, options, run = started_run
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    return folder, options, stdout, stderr


EXPECTED = [
    "strip.jpg", "OriginalImage.jpeg", "ReLU.png", "training_curves.png", "confusion_matrix.png",
    "CAM_layers.jpg", "CAM_mistakes.jpg",
    *(f"{kind}_{k}_grid.jpg" for kind in ("conv2d", "activation") for k in (1, 4, 9)),
    *(f"conv2d_{k}_filters.jpg" for k in (3, 8, 40)),
    *(f"conv2d_{k}_examples.jpg" for k in (8, 40)),
    *(f"{name}" for k in (1, 2, 3) for name in (f"CAM_{k}.jpeg", f"heatmap_{k}.jpg")),
]  # fmt: skip
MAPS = [f"conv2d_{k}_maps.jpg" for k in (3, 8, 40)]  # which are dark where a filter does not fire
OF_THE_PAGE = ["photos.jpg", "photos_1.jpg", *MAPS]


def test_a_run_writes_every_picture_whole_and_none_of_them_flat(whole_run):
    folder, *_ = whole_run
    written = {path.name for path in (folder / "Images").iterdir()}
    assert written == {*EXPECTED, *OF_THE_PAGE, "run.js", "index.html"}
    for name in (*EXPECTED, "photos.jpg", "photos_1.jpg"):
        picture = np.asarray(Image.open(folder / "Images" / name).convert("RGB"), float)
        assert picture.std() > 8, name


def test_a_run_reports_the_test_split_and_saves_model_and_history(whole_run):
    folder, _, stdout, stderr = whole_run
    record = json.loads((folder / "net_history.json").read_text("utf-8"))
    assert set(record) == {"history", "test", "classes", "settings"}
    assert record["classes"] == CLASSES
    assert {len(values) for values in record["history"].values()} == {2}
    metrics = "Test: loss {loss:.4f}  accuracy {accuracy:.4f}".format(**record["test"])
    lines = stdout.splitlines()
    assert metrics in lines and "Epoch 2/2" in lines
    assert {*EXPECTED, *OF_THE_PAGE} <= set(lines)  # a line a picture
    assert lines[-1].endswith((folder / "Images" / "index.html").as_uri())
    assert START_UP.sub("", stderr) == ""
    model = keras.saving.load_model(folder / "net.keras")
    assert np.sum(model(np.zeros((1, 75, 75, 3)))) == pytest.approx(1)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert not (folder / "net_checkpoints").exists()


def test_the_page_is_told_of_every_picture_and_of_how_it_was_trained(whole_run):
    folder, *_ = whole_run
    text = (folder / "Images" / "run.js").read_text("ascii")
    told = json.loads(text.removeprefix("const run = ").removesuffix(";\n"))
    assert {picture["file"] for picture in told["pictures"]} == set(EXPECTED)
    assert set(re.findall(r'"file":"([^"]*)"', text)) == {*EXPECTED, *OF_THE_PAGE}
    assert "--image-size 75" in told["command"] and "image_size: 75" in told["settings"]
    assert told["lead"][0].startswith("InceptionV3 learnt 3 classes (daisy, rose, tulip) from 24 ")
    assert sum(count for row in told["test"] for count in row if isinstance(count, int)) == 9


def test_skip_training_draws_the_same_pictures_as_the_run_that_trained(
    whole_run, tmp_path, monkeypatch
):
    folder, options, *_ = whole_run
    before = (folder / "net.keras").read_bytes()
    arguments = [*options[:4], "--output", tmp_path, "--skip-training"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    monkeypatch.setattr(study, "PATTERN_CONVOLUTIONS", (3,))
    monkeypatch.setattr(study, "PATTERN_SIZE", 48)
    monkeypatch.setattr(study, "PATTERN_STEPS", 2)
    study.main()
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix not in (".html", ".js")}
    missing = {f"conv2d_{k}_{kind}.jpg" for k in (8, 40) for kind in ("filters", "maps")}
    assert {*EXPECTED, *OF_THE_PAGE} - drawn == missing
    for name in drawn - {"strip.jpg"}:  # which shows another convolution's patterns
        one, other = (
            np.asarray(Image.open(it / name).convert("RGB"), int)
            for it in (folder / "Images", tmp_path)
        )
        assert one.shape == other.shape and np.abs(one - other).mean() < 0.5, name
    assert (folder / "net.keras").read_bytes() == before

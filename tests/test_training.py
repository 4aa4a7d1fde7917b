"""What the training promises: true augmentation, honest phases, and that nothing good is lost."""

import base64
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    BLOCKS,
    CLASSES,
    FOUR_EPOCHS,
    STEM,
    TWO_STEPS,
    full_disk_at,
    remembered_figures,
    small_inception,
    small_model,
    when,
    words,
)
from draw_flowers import draw_flower
from keras import layers
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import Stop, locked

STOCK = tf.keras.preprocessing.image.ImageDataGenerator
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="needs signals and limits of POSIX")
# What TensorFlow writes on the standard error stream while it starts.
START_UP = re.compile(r"(WARNING: All log messages before absl::InitializeLog\(\)|I0000 ).*\n")
pytestmark = pytest.mark.filterwarnings("ignore:Even though the")


@pytest.fixture(autouse=True)
def eagerly():
    """To trace the graph of a model takes longer than its few steps do without."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def options_of(data, folder, *more):
    return study.parse_options(words(data, folder, *more))


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


@dataclass
class Step:
    """A training step, as the model meets it."""

    rate: float  # of the optimizer
    photos: np.ndarray
    labels: np.ndarray
    learning: list  # names of the layers with weights that can be trained
    weights: dict  # {layer name: weights} before the step


class Recorder:
    """Builds models that record what they are trained and validated on.

    validation_losses: what validation is to find after each epoch of two steps.
    """

    def __init__(self, build=small_inception, validation_losses=None):
        self.build_model, self.validation_losses = build, validation_losses
        self.steps, self.validated = [], []

    def build(self, *arguments):
        self.arguments = arguments
        return self.recorded(self.build_model(*arguments))

    def recorded(self, model):
        train_step, test_step = model.train_step, model.test_step

        def recorded_train_step(data):
            photos, labels = (np.array(it) for it in data[:2])
            learning = [layer.name for layer in model.layers if layer.trainable_weights]
            rate = float(model.optimizer.learning_rate)
            self.steps.append(Step(rate, photos, labels, learning, weights_of(model)))
            return train_step(data)

        def recorded_test_step(data):
            self.validated.append(tuple(np.array(it) for it in data[:2]))
            logs = test_step(data)
            if self.validation_losses:
                # Another name beside the metrics, or Keras asks the metrics once more.
                epoch = (len(self.steps) - 1) // 2
                logs = {"loss": self.validation_losses[epoch], "accuracy": 0.5, "other": 0.0}
            return logs

        model.train_step, model.test_step = recorded_train_step, recorded_test_step
        return model


def weights_of(model):
    return {layer.name: [np.array(it) for it in layer.get_weights()] for layer in model.layers}


def changed(before, after):
    """The names of the layers that have a weight which is not the same any more."""
    same = {
        name: all(np.array_equal(*pair) for pair in zip(before[name], after[name], strict=True))
        for name in before
    }
    return {name for name, is_same in same.items() if not is_same}


SIDE, RAMPS = 48, 60


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Photos whose red tells the column, green the row, and blue the number of the photo."""
    folder = tmp_path_factory.mktemp("ramps")
    row, column = np.mgrid[:SIDE, :SIDE]
    for split, count in (("train", RAMPS), ("validation", 2), ("test", 2)):
        for k in range(count):
            place = folder / split / ("first" if k < count / 2 else "second")
            place.mkdir(parents=True, exist_ok=True)
            photo = np.dstack([5 * column, 5 * row, np.full_like(row, 4 * k)])
            Image.fromarray(photo.astype("uint8")).save(place / f"{k:02}.png")
    return folder


def fed_ramps(folder, tmp_path, seed=3, workers=None, epochs=2, batch_size=7):
    """(epochs, photos) as the model receives them in training, and their labels."""
    splits, _ = study.open_all_splits(folder, (SIDE, SIDE), batch_size, seed)
    splits["train"].workers = workers or splits["train"].workers
    photo = keras.Input((SIDE, SIDE, 3))
    classes = layers.Dense(2, activation="softmax")(layers.Flatten()(photo))
    recorder = Recorder()
    model = recorder.recorded(keras.Model(photo, classes))
    phase = study.Phase("scratch", 0, epochs, "none", 1e-6, cosine=False)
    study.train(model, splits, [phase], study.Checkpoints(tmp_path / "checkpoints", {}))
    photos = np.concatenate([step.photos for step in recorder.steps])
    labels = np.concatenate([step.labels for step in recorder.steps])
    return photos.reshape(epochs, RAMPS, SIDE, SIDE, 3), labels.reshape(epochs, RAMPS, 2)


def test_each_photo_of_each_epoch_is_turned_shifted_and_mirrored_in_its_own_way(ramps, tmp_path):
    """What was done to a ramp is read off its middle: where it came from, and its two slopes."""
    photos, labels = fed_ramps(ramps, tmp_path)
    middle = photos[:, :, SIDE // 2 - 2 : SIDE // 2 + 2, SIDE // 2 - 2 : SIDE // 2 + 2]
    numbers = np.rint(middle[..., 2].mean((2, 3)) / 4).astype(int)
    assert [sorted(epoch) for epoch in numbers.tolist()] == 2 * [list(range(RAMPS))]
    assert numbers[0].tolist() != numbers[1].tolist() and numbers[0].tolist() != sorted(numbers[0])
    np.testing.assert_array_equal(labels, np.eye(2)[numbers // (RAMPS // 2)])

    place = middle[..., :2].mean((2, 3)) / 5 - (SIDE - 1) / 2  # (x, y) from the middle, pixels
    to_right = (middle[:, :, :, -1, :2] - middle[:, :, :, 0, :2]).mean(2) / 15
    to_bottom = (middle[:, :, -1, :, :2] - middle[:, :, 0, :, :2]).mean(2) / 15
    mirrored = to_right[..., 0] < 0
    assert 0.3 < mirrored.mean() < 0.7
    upright = np.where(mirrored[..., None], -to_right, to_right)
    angle = np.rad2deg(np.arctan2(-to_bottom[..., 0], to_bottom[..., 1]))  # 180 is upside down
    assert np.abs(angle).max() <= 20.2 and 9 < angle.std() < 14  # 40 / √12 is 11.5
    np.testing.assert_allclose(np.linalg.norm(upright, axis=-1), 1, atol=0.03)  # never zoomed
    np.testing.assert_allclose(np.linalg.norm(to_bottom, axis=-1), 1, atol=0.03)
    for direction in (upright, to_bottom):
        shift = (place * direction).sum(-1)
        assert np.abs(shift).max() <= 0.2 * SIDE + 0.3 and 4 < shift.std() < 7  # 19.2 / √12 is 5.5
    of_photo = np.argsort(numbers, axis=1)
    first, second = np.take_along_axis(angle, of_photo, axis=1).round(3)
    assert len(np.unique(first)) == RAMPS and (first != second).all()
    for flags in mirrored:
        assert 0 < flags.sum() < RAMPS


def test_batches_depend_on_the_seed_and_not_on_the_number_of_workers(ramps, tmp_path):
    settings = {"epochs": 1, "batch_size": 16}
    photos, _ = fed_ramps(ramps, tmp_path, seed=3, workers=1, **settings)
    together, _ = fed_ramps(ramps, tmp_path, seed=3, workers=4, **settings)
    np.testing.assert_array_equal(photos, together)
    other, _ = fed_ramps(ramps, tmp_path, seed=4, **settings)
    numbers, others = (it[0, :, 24, 24, 2].round() for it in (photos, other))
    assert numbers.tolist() != others.tolist()
    aligned = photos[0, np.argsort(numbers)], other[0, np.argsort(others)]
    assert not any(np.array_equal(*pair) for pair in zip(*aligned, strict=True))


def test_photos_of_validation_and_test_are_plain_and_each_label_is_its_folder(split_flowers):
    splits, names = study.open_all_splits(split_flowers, (48, 40), 100, seed=0)
    assert names == CLASSES
    for name in ("validation", "test"):
        photos, labels = splits[name][0]
        assert photos.shape == (9, 48, 40, 3) and photos.dtype == np.float32
        for photo, label, path in zip(photos, labels, splits[name].paths, strict=True):
            plain = Image.open(path).resize((40, 48), Image.Resampling.BILINEAR)
            assert np.abs(photo - np.asarray(plain)).mean() < 3  # a JPEG is decoded at half size
            assert label.tolist() == [path.parent.name == name for name in CLASSES]


# ---- A run as the model meets it ----


@pytest.fixture(scope="module")
def recorded_run(split_flowers, tmp_path_factory):
    """A training of one epoch of the head and three of fine-tuning, each of 2 steps."""
    folder = tmp_path_factory.mktemp("recorded")
    recorder = Recorder(validation_losses=[3.0, 1.0, 2.0, 4.0])
    tf.config.run_functions_eagerly(True)
    options = options_of(split_flowers, folder, *FOUR_EPOCHS, "--batch-size", 16)
    result = study.train_and_save(options, build=recorder.build)
    return folder, recorder, result


def cosine_by_hand(steps, peak):
    """The rate of each step: from 0 to its peak in a tenth of the steps, then back along a
    cosine."""
    warm_up = max(1, steps // 10)
    rates = [peak * step / warm_up for step in range(warm_up)]
    falling = range(steps - warm_up)
    return rates + [
        peak * (1 + math.cos(math.pi * step / (steps - warm_up))) / 2 for step in falling
    ]


def test_the_optimizer_meets_the_rates_of_the_phases_step_by_step(recorded_run):
    _, recorder, _ = recorded_run
    rates = [step.rate for step in recorder.steps]
    assert recorder.arguments == (3, 75, "imagenet")
    np.testing.assert_allclose(rates, [1e-3] * 2 + cosine_by_hand(6, 0.01), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("more", "steps", "peak"),
    [(("--batch-size", 2), 24, 5e-4), (("--batch-size", 24, "--learning-rate", 0.02), 2, 0.02)],
)
def test_from_scratch_the_rate_of_the_command_line_is_the_peak_of_a_cosine_of_all_batches(
    split_flowers, tmp_path, more, steps, peak
):
    recorder = Recorder(one_channel)
    scratch = ("--weights", "none", "--epochs", 2, *more)
    study.train_and_save(options_of(split_flowers, tmp_path, *scratch), build=recorder.build)
    rates = [step.rate for step in recorder.steps]
    assert recorder.arguments == (3, 75, "none") and len(rates) == steps
    np.testing.assert_allclose(rates, cosine_by_hand(steps, peak), rtol=1e-5, atol=1e-9)


def test_the_head_learns_first_then_the_blocks_from_freeze_below_up(recorded_run):
    _, recorder, _ = recorded_run
    steps, head = recorder.steps, {"hidden", "classes"}
    weights = [step.weights for step in steps]
    assert all(set(step.learning) == head for step in steps[:2])
    assert changed(weights[0], weights[2]) == head  # statistics of BatchNormalization stay, too
    above = {"mixed9_conv", "mixed10_conv"} | head
    assert all(set(step.learning) == above for step in steps[2:])
    assert changed(weights[2], weights[3]) == set()  # the rate of the first step is 0
    assert changed(weights[3], weights[4]) == above
    assert changed(weights[2], weights[7]) == above


def test_each_epoch_brings_every_training_photo_once_and_validates_on_plain_ones(
    recorded_run, split_flowers
):
    _, recorder, _ = recorded_run
    assert [len(step.photos) for step in recorder.steps] == [16, 8] * 4
    for start in range(0, 8, 2):
        labels = np.concatenate([step.labels for step in recorder.steps[start : start + 2]])
        assert labels.sum(0).tolist() == [8, 8, 8] and (labels.max(1) == 1).all()
    assert 200 < max(step.photos.max() for step in recorder.steps) <= 255
    batches, _ = study.open_split(split_flowers / "validation", (75, 75), 16)
    assert len(recorder.validated) == 4
    for photos, labels in recorder.validated:
        np.testing.assert_array_equal(photos, batches[0][0])
        assert labels.argmax(1).tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_the_model_that_is_saved_is_the_one_of_the_best_epoch(recorded_run):
    folder, recorder, (model, class_names, test, record) = recorded_run
    saved = weights_of(keras.saving.load_model(folder / "net.keras"))
    after_epoch = [recorder.steps[2 * epoch].weights for epoch in (1, 2, 3)]
    assert [not changed(saved, weights) for weights in after_epoch] == [False, True, False]
    assert changed(weights_of(model), saved) == set()
    assert record["history"]["val_loss"] == [3, 1, 2, 4]
    assert class_names == CLASSES and len(test.paths) == 9
    assert json.loads((folder / "net_history.json").read_text()) == record
    assert {path.name for path in folder.iterdir()} == {"net.keras", "net_history.json"}


def test_the_history_holds_the_settings_of_the_run(recorded_run):
    *_, (*_, record) = recorded_run
    assert record["classes"] == CLASSES
    assert {len(values) for values in record["history"].values()} == {4}
    assert set(record["history"]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    settings = record["settings"]
    expected = {"weights": "imagenet", "epochs": 4, "batch_size": 16, "image_size": 75, "seed": 3}
    expected |= {"freeze_below": "mixed9", "learning_rate": 0.01, "mixed_precision": False}
    expected |= {"photos": {"train": 24, "validation": 9, "test": 9}, "balance": False}
    assert settings == expected | {"phases": {"head": 1, "fine-tuning": 3}}


def test_the_seed_decides_on_the_first_weights(split_flowers, tmp_path):
    first = {}
    for seed in (3, 3, 4):
        recorder = Recorder(stopped_at_once)
        more = ("--epochs", 1, "--weights", "none", "--seed", seed, "--batch-size", 24)
        with pytest.raises(KeyboardInterrupt):
            study.train_and_save(options_of(split_flowers, tmp_path, *more), build=recorder.build)
        again = first.setdefault(seed, recorder.steps[0])
        assert changed(again.weights, recorder.steps[0].weights) == set()
        np.testing.assert_array_equal(again.photos, recorder.steps[0].photos)
    pairs = zip(first[3].weights.values(), first[4].weights.values(), strict=True)
    assert not any(np.array_equal(one[0], other[0]) for one, other in pairs if one)
    assert not np.array_equal(first[3].labels, first[4].labels)


def stopped_at_once(*arguments):
    """A model that is not trained: what comes after the first batch is not asked."""

    def stop(data):
        raise KeyboardInterrupt

    model = one_channel(*arguments)
    model.train_step = stop
    return model


# ---- Phases ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # name, start, end, frozen below, rate, cosine, statistics of the batches
        (
            (10, "imagenet", "mixed2"),
            [
                ("head", 0, 2, "head", 1e-3, False, False),
                ("fine-tuning", 2, 10, "mixed2", 3e-4, True, False),
            ],
        ),
        (
            (6, "a_file.keras", "none", 0.5),
            [
                ("head", 0, 2, "head", 1e-3, False, False),
                ("fine-tuning", 2, 6, "none", 0.5, True, False),
            ],
        ),
        ((1, "imagenet", "mixed2"), [("head", 0, 1, "head", 1e-3, False, False)]),
        ((8, "none", "mixed2"), [("scratch", 0, 8, "none", 5e-4, True, True)]),
        ((8, "none", "mixed7", 0.5), [("scratch", 0, 8, "none", 0.5, True, True)]),
    ],
)
def test_the_head_has_a_fifth_of_the_epochs_and_from_scratch_there_is_one_phase(
    arguments, expected
):
    fields = ("name", "start_epoch", "end_epoch", "freeze_below", "learning_rate", "cosine")
    fields += ("batch_statistics",)
    phases = study.training_phases(*arguments)
    assert [tuple(getattr(phase, name) for name in fields) for phase in phases] == expected


@pytest.mark.parametrize("below", ["none", "head", *BLOCKS])
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_the_layers_from_a_block_up_learn_and_normalization_only_where_it_may(
    small_net, below, batch_statistics
):
    phase = study.Phase("any", 0, 1, below, 1e-3, cosine=True, batch_statistics=batch_statistics)
    study.freeze(small_net, phase)
    names = [*STEM, *BLOCKS]
    start = {"none": 0, "head": len(names)}.get(below)
    learning = names[names.index(below) if start is None else start :]
    expected = {f"{name}_conv" for name in learning} | {"hidden", "classes"}
    if batch_statistics:
        expected |= {f"{name}_norm" for name in learning}
    assert {layer.name for layer in small_net.layers if layer.trainable_weights} == expected


@pytest.fixture(scope="module")
def small_net():
    return small_inception(3, 75)


# ---- Nothing lost ----


def files_in(folder):
    """{path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="session")
def uninterrupted(split_flowers, whole_folder):
    tf.config.run_functions_eagerly(True)
    options = options_of(split_flowers, whole_folder, *TWO_STEPS)
    model, _, _, record = study.train_and_save(options, build=small_inception)
    return weights_of(model), record


def assert_same_run(model, record, uninterrupted):
    weights, reference = uninterrupted
    for name, expected in reference["history"].items():
        np.testing.assert_allclose(record["history"][name], expected, rtol=1e-3, atol=1e-4)
    for name, expected in weights.items():
        for one, other in zip(weights_of(model)[name], expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    looks, expected = record["looks"], reference["looks"]
    assert looks["photos"] == expected["photos"]
    np.testing.assert_allclose(looks["heatmaps"], expected["heatmaps"], rtol=0.01, atol=1e-3)


def test_the_look_of_the_epoch_that_was_kept_is_that_of_the_saved_model(
    split_flowers, whole_folder, uninterrupted
):
    _, record = uninterrupted
    model = keras.saving.load_model(whole_folder / "net.keras")
    looks, losses = record["looks"], record["history"]["val_loss"]
    kept = int(np.argmin(losses)) + 1  # the first look is that before the first epoch
    assert len(looks["heatmaps"]) == len(looks["probabilities"]) == len(losses) + 1
    assert [name for name, _ in looks["photos"]] == CLASSES
    read = study.photo_reader((75, 75))
    for label, (name, encoded) in enumerate(looks["photos"]):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(float)
        photos = [read(path) for path in (split_flowers / "validation" / name).iterdir()]
        distances = [np.abs(cv2.resize(it, shown.shape[:2]) - shown).mean() for it in photos]
        photo = photos[int(np.argmin(distances))]
        heatmap = study.grad_cam(model, photo, "mixed10", label)
        np.testing.assert_allclose(looks["heatmaps"][kept][label], heatmap, rtol=0.01, atol=1e-3)
        probability = model(photo[None].astype("float32"))[0, label]
        assert looks["probabilities"][kept][label] == pytest.approx(float(probability), abs=1e-3)


@POSIX_ONLY
def test_an_interrupted_run_keeps_its_whole_epochs_and_goes_on_as_if_nothing_had_happened(
    split_flowers, tmp_path, uninterrupted, capsys
):
    """In epoch 2, which is between the phases, and in epoch 4, in the midst of the second one."""

    def interrupt(kind, epoch, *more):
        """Train until the signal comes, before that epoch's checkpoint is in its place."""
        options = options_of(split_flowers, tmp_path, *TWO_STEPS, *more)
        send = partial(os.kill, os.getpid(), signal.Signals[kind])
        with when("os.rename", f"_epoch_{epoch:03}.keras", send):
            code = exit_code_of(lambda: study.train_and_save(options, build=small_inception))
        checkpoints = sorted((tmp_path / "net_checkpoints").iterdir())
        assert checkpoints[-1].name.endswith(f"_epoch_{epoch - 1:03}.keras")
        assert {file.suffix for file in checkpoints} == {".keras"}  # nothing half-written
        return code, checkpoints[-1]

    assert interrupt("SIGTERM", 2)[0] == 143
    assert "--resume" not in capsys.readouterr().out
    code, newest = interrupt("SIGINT", 4, "--resume")
    told = capsys.readouterr().out
    assert code == 130 and re.search(r"\b3\b.*--resume", told)
    assert "cannot be read" not in told
    # Nor does it take harm where its newest checkpoint was cut off.
    newest.write_bytes(newest.read_bytes()[:-200])
    options = options_of(split_flowers, tmp_path, *TWO_STEPS, "--resume")
    model, _, _, record = study.train_and_save(options, build=small_inception)
    assert_same_run(model, record, uninterrupted)
    told = capsys.readouterr().out
    assert newest.name in told and "epochs 3 to 4" in told
    assert not (tmp_path / "net_checkpoints").exists()


def test_resuming_with_other_settings_is_refused_naming_them(split_flowers, tmp_path):
    (tmp_path / "net_checkpoints").mkdir()
    more = ("--epochs", 2, "--weights", "none", "--batch-size", 24)
    send = partial(signal.raise_signal, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), when("os.rename", "_epoch_002.keras", send):
        study.train_and_save(options_of(split_flowers, tmp_path, *more), build=one_channel)
    before = files_in(tmp_path)
    other = ("--seed", 6, "--resume")
    with pytest.raises(Stop, match=r"seed 0\b.*\b6\b") as stop:
        study.train_and_save(options_of(split_flowers, tmp_path, *more, *other), build=one_channel)
    assert stop.value.exit_code == 2 and files_in(tmp_path) == before
    nothing = options_of(split_flowers, tmp_path / "new", *more, "--resume")
    with pytest.raises(Stop, match="net_checkpoints") as stop:
        study.train_and_save(nothing, build=one_channel)
    assert stop.value.exit_code == 2


def test_a_checkpoint_is_an_ordinary_keras_model_that_carries_its_history(split_flowers, tmp_path):
    splits, _ = study.open_all_splits(split_flowers, (32, 32), batch_size=12, seed=5)
    checkpoints = study.Checkpoints(tmp_path / "checkpoints", {"seed": 5})
    phase = study.Phase("scratch", 0, 2, "none", 1e-3, cosine=True)
    study.train(small_model(), splits, [phase], checkpoints)
    for epoch in (1, 2):
        file = checkpoints.file_of(epoch)
        assert keras.saving.load_model(file).output_shape == (None, 3)
        record = json.loads(zipfile.ZipFile(file).read("record.json"))
        assert record["settings"] == {"seed": 5}
        assert record["history"] == {name: it[:epoch] for name, it in checkpoints.history.items()}


def trained_on(chosen, folder, tmp_path, balance):
    """The weights of a small model after two steps on all of some photos, (class, number) each."""
    paths = [folder / "train" / CLASSES[label] / f"{number}.jpg" for label, number in chosen]
    labels = [label for label, _ in chosen]
    batches = study.PhotoBatches(paths, labels, 2, study.photo_reader((32, 32)), batch_size=8)
    keras.utils.set_random_seed(0)
    model = small_model(class_count=2)
    checkpoints = study.Checkpoints(tmp_path / f"{len(chosen)}{balance}", {})
    phase = study.Phase("scratch", 0, 2, "none", 1e-3, cosine=False)
    study.train(model, dict.fromkeys(study.SPLITS, batches), [phase], checkpoints, balance)
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def test_balanced_a_photo_of_twice_the_weight_teaches_what_the_same_photo_twice_does(
    split_flowers, tmp_path
):
    daisy, roses = (0, 0), [(1, 0), (1, 1)]
    balanced = trained_on([daisy, *roses], split_flowers, tmp_path, True)
    twice = trained_on([daisy, daisy, *roses], split_flowers, tmp_path, False)
    unlike = trained_on([daisy, *roses], split_flowers, tmp_path, False)
    np.testing.assert_allclose(balanced, twice, atol=2e-5)
    assert np.abs(unlike - twice).max() > 5e-4


@pytest.mark.parametrize(("more", "told"), [((), "--balance lets"), (("--balance",), "weighed")])
def test_classes_of_unlike_size_are_told_before_training(
    more, told, split_flowers, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(split_flowers, data)
    for number in range(3, 8):
        (data / "train" / "tulip" / f"{number}.jpg").unlink()
    options = options_of(data, tmp_path, *ONE_EPOCH, *more)
    _, _, _, record = study.train_and_save(options, build=one_channel)
    before_training, _, _ = capsys.readouterr().out.partition("Phase")
    assert "8 of daisy, 3 of tulip" in before_training and told in before_training
    assert record["settings"]["balance"] == bool(more)


ONE_EPOCH = ("--epochs", 1, "--weights", "none", "--batch-size", 24)


def one_channel(class_count, image_size, weights):
    """The quickest model that can be trained."""
    return small_model(image_size, class_count, channels=1)


@pytest.fixture
def earlier(tmp_path):
    """An earlier model and its history, which a failing run must not touch."""
    (tmp_path / "net.keras").write_bytes(b"the earlier model")
    (tmp_path / "net_history.json").write_bytes(b"its history")
    return tmp_path


def exit_code_of(function):
    with pytest.raises(SystemExit) as end:
        study.run(function)
    return end.value.code


@POSIX_ONLY
@pytest.mark.parametrize("file", ["_epoch_001.keras", "net.keras", "net_history.json"])
def test_a_full_disk_leaves_what_stood_there_before_and_says_what_to_do(
    split_flowers, earlier, file, capsys
):
    before = files_in(earlier)
    options = options_of(split_flowers, earlier, *ONE_EPOCH)
    with full_disk_at(file):
        code = exit_code_of(lambda: study.train_and_save(options, build=one_channel))
    message = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and file in message[0] and len(message) <= 3
    after = files_in(earlier)
    kept = before if file != "net_history.json" else {earlier / file: before[earlier / file]}
    assert {path: after[path] for path in kept} == kept
    written = {path.name for path in after if path.parent.name == "net_checkpoints"}
    assert len(written) == (0 if "epoch" in file else 1)  # the epoch can still be used
    assert not [path for path in earlier.rglob(".*") if "lock" not in path.name]


def poisoned(finite_loss, from_epoch=1):
    """Builds a model that NaN gets into, in the first step of an epoch, whether or not the loss
    shows it."""
    steps = []

    def build(*arguments):
        model = one_channel(*arguments)
        train_step, test_step = model.train_step, model.test_step

        def poisoned_step(data):
            logs = train_step(data)
            steps.append(len(steps))
            if len(steps) >= from_epoch:
                kernel = model.layers[-1].kernel
                kernel.assign(kernel * np.nan)
                # Another name beside the metrics, or Keras asks the metrics once more.
                logs = {"loss": 0.5 if finite_loss else np.nan, "accuracy": 0.5, "other": 0.0}
            return logs

        def harmless_test_step(data):
            return {"loss": 0.5, "accuracy": 0.5, "other": 0.0}

        model.train_step = poisoned_step
        model.test_step = harmless_test_step if finite_loss else test_step
        return model

    return build


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_loss_of_nan_stops_a_training_whether_of_training_or_validation(losses, tmp_path):
    checkpoints, model = study.Checkpoints(tmp_path / "checkpoints", {}), small_model()
    model.compile("adam", "categorical_crossentropy")
    checkpoints.set_model(model)
    with pytest.raises(Stop, match="NaN in epoch 1"):
        checkpoints.on_epoch_end(0, dict(zip(("loss", "val_loss"), losses, strict=True)))
    assert not (tmp_path / "checkpoints").exists()


def test_a_loss_of_nan_stops_at_once_and_keeps_the_best_weights_and_the_earlier_model(
    split_flowers, earlier, capsys
):
    before = files_in(earlier)
    words = (*ONE_EPOCH, "--epochs", 5, "--learning-rate", 0.25)
    options = options_of(split_flowers, earlier, *words)
    build = poisoned(finite_loss=False, from_epoch=2)
    code = exit_code_of(lambda: study.main(options, build=build))
    message = capsys.readouterr().err.strip()
    assert code == 1 and "epoch 2" in message and "--learning-rate" in message
    assert len(message.splitlines()) <= 3
    after = files_in(earlier)
    assert {path: after[path] for path in before} == before
    (kept,) = set(after) - set(before)
    assert str(kept) in message and not (earlier / "Images").exists()
    model = keras.saving.load_model(kept, compile=False)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (poisoned(finite_loss=True), ()),  # no loss tells of it
        (small_inception, ("--learning-rate", "1e30", "--batch-size", 6)),
    ],
    ids=["finite-loss", "rate-of-1e30"],
)
def test_a_model_of_no_use_is_named_and_takes_the_place_of_no_earlier_one(
    split_flowers, earlier, build, more, capsys
):
    before = files_in(earlier)
    options = options_of(split_flowers, earlier, *ONE_EPOCH, *more)
    code = exit_code_of(lambda: study.main(options, build=build))
    message = capsys.readouterr().err.strip()
    assert code == 1 and "--learning-rate" in message and len(message.splitlines()) <= 3
    assert {path: path.read_bytes() for path in before} == before
    assert not (earlier / "Images").exists()


def test_running_out_of_memory_names_the_options_that_help(split_flowers, tmp_path):
    def build(*arguments):
        model = one_channel(*arguments)

        def exhausted(data):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

        model.train_step = exhausted
        return model

    options = options_of(split_flowers, tmp_path, *ONE_EPOCH)
    with pytest.raises(Stop, match=r"--batch-size or --image-size") as stop:
        study.train_and_save(options, build=build)
    assert stop.value.exit_code == 1


def test_training_takes_no_notice_of_what_a_settings_file_of_keras_holds(split_flowers, tmp_path):
    policies = []

    def build(*arguments):
        policies.append(keras.config.dtype_policy().name)
        policies.append(keras.config.image_data_format())
        raise KeyboardInterrupt  # nothing is left to be seen

    keras.config.set_image_data_format("channels_first")
    keras.config.set_floatx("float16")
    keras.config.set_dtype_policy("float16")
    try:
        with pytest.raises(KeyboardInterrupt):
            study.main(options_of(split_flowers, tmp_path, *ONE_EPOCH), build=build)
        assert policies == ["float32", "channels_last"] and keras.config.floatx() == "float32"
    finally:
        keras.config.set_image_data_format("channels_last")
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def test_half_precision_is_for_training_alone_and_full_where_the_machine_lacks_it(
    split_flowers, tmp_path
):
    policies = []

    def build(*arguments):
        policies.append(keras.config.dtype_policy().name)
        return one_channel(*arguments)

    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.is_file() else set()
    half = "mixed_bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"
    half = "mixed_float16" if tf.config.list_physical_devices("GPU") else half
    for more in ((), ("--mixed-precision",)):
        options = options_of(split_flowers, tmp_path, *ONE_EPOCH, *more)
        model, *_ = study.train_and_save(options, build=build)
        for it in (model, keras.saving.load_model(options.model)):
            assert {layer.dtype_policy.name for layer in it.layers} == {"float32"}
        assert keras.config.dtype_policy().name == "float32"
    assert policies == ["float32", half]


def test_a_second_training_of_the_same_model_is_refused_and_leaves_the_first_alone(
    split_flowers, tmp_path
):
    (tmp_path / "net_checkpoints").mkdir()
    kept = tmp_path / "net_checkpoints" / "18_epoch_001.keras"
    kept.write_bytes(b"of the first training")
    with (
        locked(tmp_path / ".net.keras.lock", "held by the first training"),
        pytest.raises(Stop, match=r"net\.keras: .*\n.*--model") as stop,
    ):
        options = options_of(split_flowers, tmp_path, *ONE_EPOCH)
        study.train_and_save(options, build=one_channel)
    assert stop.value.exit_code == 2 and kept.read_bytes() == b"of the first training"


def test_after_nan_the_best_epoch_is_named_not_the_last(tmp_path):
    checkpoints = study.Checkpoints(tmp_path, {})
    values = {"loss": [1.0, 0.8], "accuracy": [0.5, 0.6]}
    checkpoints.history = values | {"val_loss": [0.7, 0.9], "val_accuracy": [0.5, 0.4]}
    model = small_model()
    model.compile("adam", "categorical_crossentropy")
    checkpoints.set_model(model)
    with pytest.raises(Stop) as stop:
        checkpoints.on_epoch_end(2, dict.fromkeys(study.METRICS, np.nan))
    assert str(checkpoints.file_of(1)) in str(stop.value) and "epoch 3" in str(stop.value)
    assert str(checkpoints.file_of(2)) not in str(stop.value) and stop.value.exit_code == 1


def test_a_photo_is_decoded_at_least_as_large_as_the_longer_side_that_the_model_takes():
    asked = []

    def decode(path, at_least):
        asked.append(at_least)
        return np.zeros((90, 90, 3), "uint8")

    assert study.photo_reader((20, 60), decode)("a.jpg").shape == (20, 60, 3)
    assert asked == [60]


def test_the_last_two_epochs_stay_each_with_the_best_one_by_then(tmp_path):
    checkpoints = study.Checkpoints(tmp_path, {})
    model = small_model()
    model.compile("adam", "categorical_crossentropy")
    checkpoints.set_model(model)
    for epoch, loss in enumerate([1.0, 0.5, 0.9, 0.8, 0.4]):
        checkpoints.on_epoch_end(epoch, dict.fromkeys(study.METRICS, loss))
    # 4 is the last but one, by which 2 was the best; 5 is the last, and the best.
    stay = {checkpoints.file_of(epoch) for epoch in (2, 4, 5)}
    assert set(tmp_path.iterdir()) == stay


def test_checkpoints_are_sorted_by_their_epoch(tmp_path):
    checkpoints = study.Checkpoints(tmp_path, {})
    names = [checkpoints.file_of(epoch).name for epoch in (2, 9, 10, 99, 100)]
    assert names == sorted(names)


# ---- From a killed run to the pictures: the command line, --resume and --photos ----


@pytest.fixture(scope="module")
def resumed_run(started_killed_run, split_flowers):
    """The run that was killed, gone on with from the command line, with a photo of one's own.

    Returns its folder, what it printed, and its figures: {file name: figure}.
    """
    folder, run = started_killed_run
    _, errors = run.communicate(timeout=300)
    assert run.returncode == -signal.SIGKILL, errors
    photo = folder / "own photo.jpg"
    shutil.copy(split_flowers / "train" / "rose" / "0.jpg", photo)
    more = (*TWO_STEPS, "--resume", "--photos", photo)
    shown = io.StringIO()
    with remembered_figures() as figures, contextlib.redirect_stdout(shown):
        tf.config.run_functions_eagerly(True)
        options = options_of(split_flowers, folder, *more)
        study.main(options, build=small_inception, pattern_size=48, pattern_steps=2)
    return folder, shown.getvalue(), figures


def plain_photos(paths):
    photos = [
        np.asarray(Image.open(path).resize((75, 75), Image.Resampling.BILINEAR)) for path in paths
    ]
    return np.stack(photos).astype("float32")


@POSIX_ONLY
def test_a_killed_run_goes_on_with_resume_on_the_command_line(resumed_run, uninterrupted):
    folder, *_ = resumed_run
    record = json.loads((folder / "net_history.json").read_text())
    assert_same_run(keras.saving.load_model(folder / "net.keras"), record, uninterrupted)
    assert not (folder / "net_checkpoints").exists()
    assert [path.name for path in folder.glob(".*")] == []


@POSIX_ONLY
def test_the_test_photos_are_evaluated_with_the_model_that_was_saved_own_photos_or_not(
    resumed_run, split_flowers
):
    folder, printed, _ = resumed_run
    paths = sorted((split_flowers / "test").rglob("*.jpg"))
    labels = np.repeat([0, 1, 2], 3)
    model = keras.saving.load_model(folder / "net.keras")
    probabilities = model(plain_photos(paths)).numpy()
    loss = -np.log(probabilities[np.arange(9), labels]).mean()
    accuracy = (probabilities.argmax(1) == labels).mean()
    test = json.loads((folder / "net_history.json").read_text())["test"]
    # A JPEG may be decoded at half its size, which changes a pixel a little.
    assert test["loss"] == pytest.approx(loss, rel=0.02) and test["accuracy"] == accuracy
    (line,) = (line for line in printed.splitlines() if line.startswith("Test:"))
    assert f"{test['loss']:.4f}" in line and f"{test['accuracy']:.4f}" in line
    (line,) = (line for line in printed.splitlines() if line.startswith("own photo.jpg:"))
    own = model(plain_photos([folder / "own photo.jpg"])).numpy()[0]
    named = re.findall(r"(daisy|rose|tulip) (\d+) %", line)
    assert [name for name, _ in named] == [CLASSES[k] for k in np.argsort(-own)][: len(named)]
    for name, share in named:
        assert int(share) == pytest.approx(100 * own[CLASSES.index(name)], abs=2)


@POSIX_ONLY
def test_the_drawn_matrix_has_its_counts_where_its_axes_say(resumed_run, split_flowers):
    folder, _, figures = resumed_run
    model = keras.saving.load_model(folder / "net.keras")
    counts = np.zeros((3, 3), int)
    for true, name in enumerate(CLASSES):
        photos = plain_photos(sorted((split_flowers / "test" / name).iterdir()))
        for predicted in model(photos).numpy().argmax(1):
            counts[true, predicted] += 1
    axes = figures["confusion_matrix.png"].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == CLASSES
    drawn = {text.get_position(): text.get_text() for text in axes.texts}
    for true in range(3):
        for predicted in range(3):
            assert drawn.get((predicted, true), "0") in (str(counts[true, predicted]), "")
            assert counts[true, predicted] == int(drawn.get((predicted, true)) or 0)
    np.testing.assert_allclose(axes.images[0].get_array(), counts / 3)


@POSIX_ONLY
def test_each_curve_shows_the_values_that_its_label_names(resumed_run):
    folder, _, figures = resumed_run
    history = json.loads((folder / "net_history.json").read_text())["history"]
    loss, accuracy = figures["training_curves.png"].axes
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        assert axes.get_ylabel() == metric
        drawn = {line.get_label(): line for line in axes.lines}
        for label, name in (("training", metric), ("validation", f"val_{metric}")):
            assert list(drawn[label].get_xdata()) == [1, 2, 3, 4]
            assert list(drawn[label].get_ydata()) == history[name]
    best = int(np.argmin(history["val_loss"]))
    kept = next(line for line in loss.lines if line.get_label() == "kept")
    assert (kept.get_xdata()[0], kept.get_ydata()[0]) == (best + 1, history["val_loss"][best])


# ---- What a run tells ----


def test_a_run_tells_at_its_start_what_it_trains_and_where_photos_are_few(
    split_flowers, tmp_path, capsys
):
    """Its counts, its classes and its phases, and a warning for less than 10 photos of a class."""

    def build(*_):
        raise KeyboardInterrupt  # what follows is not asked

    def told(data):
        with pytest.raises(KeyboardInterrupt):
            study.train_and_save(options_of(data, tmp_path, "--epochs", 10), build=build)
        return capsys.readouterr().out

    text = told(split_flowers)
    for fact in ("24 train", "9 validation", "9 test", ", ".join(CLASSES), "head 2", "tuning 8"):
        assert fact in text, fact
    warned = [line for line in text.splitlines() if line.startswith("Warning")]
    assert all("3 photos" in line for line in warned)
    assert ["validation" in line for line in warned] == [True, False]
    assert ["test" in line for line in warned] == [False, True]
    enough = tmp_path / "enough"
    for split, count in (("train", 1), ("validation", 10), ("test", 9)):
        for name in "ab":
            (enough / split / name).mkdir(parents=True)
            for k in range(count + (name == "b")):
                Image.new("RGB", (8, 8)).save(enough / split / name / f"{k}.png")
    (warned,) = (line for line in told(enough).splitlines() if line.startswith("Warning"))
    assert "test" in warned and "9 photos" in warned


@pytest.mark.parametrize(("count", "is_told"), [(9, True), (10, False)])
def test_a_page_warns_of_classes_with_less_than_10_test_photos(count, is_told):
    labels = np.repeat([0, 1], [count, 20])
    warned = study.warnings_about(study.Evaluation(CLASSES[:2], labels, np.eye(2)[labels]))
    assert [str(count) in it for it in warned] == [True] * is_told


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


def test_the_metrics_of_ten_photos_are_what_one_counts_by_hand():
    # Daisy is said four times, of which two are daisies; of the four daisies two are found.
    # Rose is said six times, of which four are roses; of the five roses four are found.
    assert EVALUATION.predicted.argmax(1).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    # Rows are true classes, columns predicted ones.
    assert EVALUATION.confusion.tolist() == [[2, 2, 0], [1, 4, 0], [1, 0, 0]]
    np.testing.assert_allclose(EVALUATION.precision, [2 / 4, 4 / 6, np.nan])
    np.testing.assert_allclose(EVALUATION.recall, [2 / 4, 4 / 5, 0])
    assert EVALUATION.accuracy == pytest.approx(0.6)
    of_true_class = [0.5, 0.9, 0.3, 0.2, 0.8, 0.7, 0.75, 0.65, 0.4, 0.05]
    assert EVALUATION.loss == pytest.approx(-sum(map(math.log, of_true_class)) / 10, rel=1e-5)
    # Always rose gets 5 of 10 right; two standard deviations are 2 √(0.5 × 0.5 / 10).
    assert EVALUATION.chance == pytest.approx(0.5 + 2 * 0.158114, rel=1e-5)
    absent = study.Evaluation(CLASSES, np.array([0, 1]), np.eye(3)[[0, 1]])
    assert np.isnan(absent.recall[2]) and np.isnan(absent.precision[2])


def wilson(right, count):
    """Wilson's interval of a share at 95 %, by his formula (1927)."""
    z, share = 1.959964, right / count
    middle = share + z**2 / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [(middle + sign * reach) / (1 + z**2 / count) for sign in (-1, 1)]


def test_the_accuracy_comes_with_how_sure_it_is_and_balanced_where_sizes_differ():
    labels = np.repeat([0, 1], [100, 70])
    predicted = np.where(np.arange(170) < 8, 1 - labels, labels)
    evaluation = study.Evaluation(CLASSES[:2], labels, np.eye(2)[predicted])
    np.testing.assert_allclose(evaluation.accuracy_interval, wilson(162, 170), atol=1e-6)
    # (0.953 + 0.0113 ± 1.96 · √(0.0448 / 170 + 0.0000332)) / 1.0226
    assert study.accuracy_text(evaluation) == "95 % of 170 test photos (91 to 98 %)"
    # Of the ten photos two of four, four of five and none of one are right: 60 %, and a mean of
    # (0.5 + 0.8 + 0) / 3.
    assert EVALUATION.balanced_accuracy == pytest.approx(1.3 / 3)
    # Without the tulip there is no recall of tulips: a mean of (0.5 + 0.8) / 2.
    known = EVALUATION.labels < 2
    of_two = EVALUATION.labels[known], EVALUATION.probabilities[known]
    assert study.Evaluation(CLASSES, *of_two).balanced_accuracy == pytest.approx(1.3 / 2)
    assert "60 % of 10" in study.accuracy_text(EVALUATION)
    assert study.accuracy_text(EVALUATION) in study.evaluation_report(EVALUATION)
    assert "43 %" in study.accuracy_text(EVALUATION)


SEVERAL = study.Evaluation(
    CLASSES,
    np.array([0, 0, 1, 1, 2]),
    np.array([[0.9, 0.7, 0.1], [0.4, 0.6, 0.1], [0.2, 0.8, 0.1], [0.1, 0.5, 0.9], [0.1, 0.2, 0.3]]),
    is_multi_label=True,
)


def test_of_several_sigmoids_each_class_is_judged_by_itself():
    # From 0.5 up: daisy and rose, rose, rose, rose and tulip, none.
    assert SEVERAL.confusion.tolist() == [[1, 2, 0], [0, 2, 1], [0, 0, 0]]
    np.testing.assert_allclose(SEVERAL.precision, [1 / 1, 2 / 4, 0 / 1])
    np.testing.assert_allclose(SEVERAL.recall, [1 / 2, 2 / 2, 0 / 1])
    true = np.eye(3)[SEVERAL.labels]
    losses = -np.log(np.where(true == 1, SEVERAL.probabilities, 1 - SEVERAL.probabilities))
    assert SEVERAL.loss == pytest.approx(losses.mean(), rel=1e-5)
    report = study.evaluation_report(SEVERAL)
    of_class = {line.split()[0]: line.split()[1:] for line in report.splitlines()[1:]}
    assert of_class["rose"] == ["0.50", "1.00", "2"] and of_class["daisy"] == ["1.00", "0.50", "2"]
    for meaningless in ("accuracy", "confused", "chance"):
        assert meaningless not in report
    # The misses come first after the surest hit, the least probable true class first.
    assert study.example_order(SEVERAL)[:3] == [0, 4, 1]


def test_what_is_said_of_a_photo_need_not_add_up_to_one():
    said = study.verdict(CLASSES, np.array([0.74, 0.91, 0.2]), None, is_multi_label=True)
    assert said == "It says rose 91 % and daisy 74 %"
    said = study.verdict(CLASSES, np.array([0.74, 0.91, 0.2]), 0, is_multi_label=True)
    assert said == "It says rose 91 % and daisy 74 %; its class is daisy"
    said = study.verdict(CLASSES, np.array([0.3, 0.1, 0.2]), 2, is_multi_label=True)
    assert "none" in said and "daisy, 30 %" in said and "its class is tulip, 20 %" in said


def test_the_report_holds_the_metrics_in_the_lines_of_their_classes():
    lines = study.evaluation_report(EVALUATION).splitlines()
    assert "0.8822" in lines[0] and "0.6000" in lines[0]
    of_class = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    header = lines[1].split()
    assert header[1:] == ["precision", "recall", "photos"]
    assert of_class["daisy"] == ["0.50", "0.50", "4"]
    assert of_class["rose"] == ["0.67", "0.80", "5"]
    assert of_class["tulip"][1:] == ["0.00", "1"] and "nan" not in of_class["tulip"][0]
    assert "daisy" in lines[5] and "rose" in lines[5] and "tulip" not in lines[5]
    assert "calibration" in lines[6] and "10 bins" in lines[6]


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_accuracy():
    # Of ten photos, four at 0.6 (one right), five at 0.9 (all right), one at 1 (wrong).
    sure = np.array([0.6] * 4 + [0.9] * 5 + [1.0])
    labels = np.array([0, 1, 1, 1, 0, 0, 0, 0, 0, 1])
    evaluation = study.Evaluation(["a", "b"], labels, np.column_stack([sure, 1 - sure]))
    expected = 0.4 * (0.6 - 0.25) + 0.5 * (1 - 0.9) + 0.1 * (1 - 0)
    assert study.calibration_error(evaluation) == pytest.approx(expected)
    bins = study.reliability(evaluation)
    assert bins[[5, 8, 9]].round(6).tolist() == [[4, 2.4, 1], [5, 4.5, 5], [1, 1, 0]]
    assert bins.sum() == pytest.approx(10 + sure.sum() + 6)


def test_of_ten_classes_all_are_asked_for_and_of_more_the_probable_and_the_true_one():
    shares = np.arange(1, 12) / 66  # the last class is the most probable one
    asked = study.classes_in_question(shares[None, :10], [3])
    assert asked.tolist() == [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
    asked = study.classes_in_question(np.stack([shares, shares]), [3, -1])
    assert asked.tolist() == [[10, 9, 8, 7, 3], [10, 9, 8, 7, 10]]


@pytest.mark.parametrize(("correct", "warned"), [(60, True), (65, False)])
def test_an_accuracy_that_guessing_reaches_is_called_so(correct, warned):
    # Guessing daisy for 50 of 100 photos gets 50 of them right, 60 within two deviations of 5.
    labels = np.repeat([0, 1], 50)
    predicted = np.where(np.arange(100) < correct, labels, 1 - labels)
    report = study.evaluation_report(study.Evaluation(CLASSES[:2], labels, np.eye(2)[predicted]))
    assert ("chance" in report) == warned


@pytest.mark.parametrize(
    ("confusion", "named", "numbers"),
    [
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], [], []),
        ([[5, 0, 0], [2, 3, 0], [0, 0, 5]], ["ann", "bob"], [2, 10]),
        ([[4, 2, 1], [1, 4, 0], [0, 0, 5]], ["ann", "bob"], [3, 12]),  # of their 7 and 5 photos
        ([[4, 1, 0], [0, 4, 0], [1, 0, 4]], ["ann", "bob", "ann", "cy"], [1]),
        ([[4, 1, 0], [1, 2, 2], [0, 0, 5]], ["ann", "bob", "bob", "cy"], [2]),
    ],
)
def test_one_pair_is_called_the_most_confused_only_when_it_is_one(confusion, named, numbers):
    sentence = study.most_confused(np.array(confusion), ["ann", "bob", "cy"])
    assert re.findall(r"\b(?:ann|bob|cy)\b", sentence) == named
    assert [int(number) for number in re.findall(r"\d+", sentence)] == numbers


def test_the_chance_of_guessing_is_that_of_the_true_classes():
    labels = np.repeat([0, 1], [30, 10])
    evaluation = study.Evaluation(CLASSES[:2], labels, np.eye(2)[np.ones(40, int)])  # all say rose
    assert evaluation.largest_share == 0.75
    # Two deviations of 40 guesses of which three of four are right.
    assert evaluation.chance == pytest.approx(0.75 + 2 * np.sqrt(0.75 * 0.25 / 40))


# ---- Found before the first epoch ----


def never_built(*_):
    raise AssertionError("the photos are to be checked before a model is built")


def refusal(data, folder, capsys, *more):
    """The message of a run that ends with exit code 2 before its first epoch, with nothing
    written."""
    before = files_in(folder)
    options = options_of(data, folder, *more)
    code = exit_code_of(lambda: study.main(options, build=never_built))
    message = capsys.readouterr().err.strip()
    assert code == 2 and len(message.splitlines()) <= 3 and files_in(folder) == before
    assert not (folder / "Images").exists()
    return message


def test_missing_empty_and_differing_splits_are_named(split_flowers, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "output"
    message = refusal(data, output, capsys)
    assert f"{data / 'train'}:" in message and "create_train_val_test.py" in message
    shutil.copytree(split_flowers, data)
    (data / "test" / "rose").rename(data / "test" / "orchid")
    message = refusal(data, output, capsys)
    assert str(data / "test") in message and "orchid, rose" in message
    assert "daisy" not in message and "--overwrite" in message
    for photo in (data / "train" / "tulip").iterdir():
        photo.unlink()
    message = refusal(data, output, capsys)
    assert str(data / "train") in message and "tulip" in message and "rose" not in message
    for name in ("rose", "tulip"):
        shutil.rmtree(data / "train" / name)
    assert str(data / "train") in refusal(data, output, capsys)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def renamed_page(path):
    path.write_text("<!DOCTYPE html><title>404</title>")


def no_bytes(path):
    path.write_bytes(b"")


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def circular_link(path):
    path.unlink()
    path.symlink_to(path)


def folder_like_a_photo(path):
    path.unlink()
    path.mkdir()


@POSIX_ONLY
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "spoil", [cut_off, renamed_page, no_bytes, fifo, circular_link, folder_like_a_photo]
)
def test_a_file_that_is_no_whole_photo_is_named_before_training(
    split_flowers, tmp_path, spoil, split, capsys
):
    data = tmp_path / "data"
    shutil.copytree(split_flowers, data)
    spoilt = data / split / "rose" / "1.jpg"
    spoil(spoilt)
    started = time.monotonic()
    # Who waits for a FIFO's writer is set free after ten seconds.
    freed = threading.Timer(10, lambda: os.close(os.open(spoilt, os.O_RDWR | os.O_NONBLOCK)))
    freed.start()
    try:
        message = refusal(data, tmp_path / "output", capsys)
    finally:
        freed.cancel()
    assert str(spoilt) in message and time.monotonic() - started < 10


def test_own_photos_that_do_not_decode_are_named_before_training(split_flowers, tmp_path, capsys):
    shutil.copytree(split_flowers / "test" / "rose", tmp_path / "own")
    photos = sorted((tmp_path / "own").iterdir())
    cut_off(photos[1])
    message = refusal(split_flowers, tmp_path, capsys, "--photos", *photos)
    assert "--photos" in message and str(photos[1]) in message and str(photos[0]) not in message


@pytest.mark.parametrize("option", ["--output", "--model"])
def test_a_place_that_cannot_be_written_to_is_found_before_training(
    split_flowers, tmp_path, capsys, option
):
    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" / ("Images" if option == "--output" else "net.keras")
    message = refusal(split_flowers, tmp_path, capsys, option, place)
    assert str(tmp_path / "file") in message


# ---- Options ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--batch-size", "0"],
        ["--image-size", "74"],
        ["--learning-rate", "-1"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--freeze-below", "x"],
        ["--freeze-below", "mixed11"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
        ["--model", "a.h5"],
        ["--model", "folder.keras"],
        ["--model", "a.txt", "--skip-training"],
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(monkeypatch, capsys, arguments, tmp_path):
    (tmp_path / "folder.keras").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        study.parse_options(arguments)
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_options_have_the_values_that_the_readme_promises():
    expected = {"data": Path(), "output": Path("Images"), "model": Path("inceptionv3.keras")}
    expected |= {"weights": "imagenet", "epochs": 10, "batch_size": 32, "image_size": 299}
    expected |= {"freeze_below": "mixed2", "learning_rate": None, "seed": 0, "photos": []}
    expected |= {"skip_training": False, "mixed_precision": False, "resume": False, "quick": False}
    expected |= {"pixels": "0..255", "balance": False}
    assert vars(study.parse_options([])) == expected
    least = ["--epochs", "1", "--image-size", "75", "--seed", "4294967295", "--skip-training"]
    options = study.parse_options([*least, "--model", "my.h5", "--photos", "a.jpg", "b.jpg"])
    assert (options.epochs, options.image_size, options.seed) == (1, 75, 2**32 - 1)
    assert options.photos == [Path("a.jpg"), Path("b.jpg")]


# ---- Several devices ----


@pytest.mark.skipif(os.name == "nt", reason="starts a POSIX shell")
def test_several_devices_train_mirrored(started_mirrored_run):
    _, errors = started_mirrored_run.communicate(timeout=300)
    assert started_mirrored_run.returncode == 0, errors


# ---- The whole run ----


@pytest.fixture(scope="session")
def whole_run(started_run):
    folder, run = started_run
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    text = (folder / "Images" / "run.js").read_text("ascii")
    return (
        folder,
        stdout,
        stderr,
        json.loads(text.removeprefix("const run = ").rstrip().rstrip(";")),
    )


PICTURES = {
    "strip.jpg", "OriginalImage.jpeg", "ReLU.png", "training_curves.png", "confusion_matrix.png",
    "CAM_layers.jpg", "CAM_mistakes.jpg", "CAM_1.jpeg", "CAM_2.jpeg", "CAM_3.jpeg",
    *(f"{kind}_{k}_grid.jpg" for kind in ("conv2d", "activation") for k in (1, 4, 9)),
    *(f"conv2d_{k}_filters.jpg" for k in (3, 8, 40)),
    *(f"conv2d_{k}_examples.jpg" for k in (8, 40)),
}  # fmt: skip
MAPS = {f"conv2d_{k}_maps.jpg" for k in (3, 8, 40)}  # which are dark where a filter does not fire
OF_THE_PAGE = {"photos.jpg", "photos_1.jpg"}


def test_a_run_writes_every_picture_whole_and_none_of_them_flat(whole_run):
    folder, _, _, told = whole_run
    written = {path.name for path in (folder / "Images").iterdir()}
    assert written >= PICTURES | MAPS | OF_THE_PAGE | {"run.js", "index.html"}
    for name in PICTURES | OF_THE_PAGE:
        picture = np.asarray(Image.open(folder / "Images" / name).convert("RGB"), float)
        assert picture.std() > 8, name
    assert {picture["file"] for picture in told["pictures"]} >= PICTURES
    seen = [share for entry in told["filters"] for share in entry["field"]["size"]]
    assert 0 < min(seen) < max(seen) == 1  # convolution 40 sees more than the photo of 75 pixels
    assert set(re.findall(r'"file": "([^"]*)"', json.dumps(told))) == written - {
        "run.js",
        "index.html",
    }


def test_a_run_reports_the_test_split_and_saves_model_and_history(whole_run):
    folder, stdout, stderr, told = whole_run
    record = json.loads((folder / "net_history.json").read_text("utf-8"))
    assert record["classes"] == CLASSES
    assert {len(values) for values in record["history"].values()} == {1}
    lines = stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("Test:"))
    assert f"{record['test']['loss']:.4f}" in line
    assert f"{record['test']['accuracy']:.4f}" in line
    assert set(lines) >= PICTURES | MAPS | OF_THE_PAGE  # a line a picture
    assert lines[-1].endswith((folder / "Images" / "index.html").as_uri())
    assert START_UP.sub("", stderr) == ""
    model = keras.saving.load_model(folder / "net.keras")
    assert np.sum(model(np.zeros((1, 75, 75, 3)))) == pytest.approx(1)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert {path.name for path in folder.iterdir()} == {"net.keras", "net_history.json", "Images"}
    assert "--image-size 75" in told["command"] and "image_size: 75" in told["settings"]
    assert sum(count for row in told["test"] for count in row if isinstance(count, int)) == 3

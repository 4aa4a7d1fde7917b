"""What the training promises: true augmentation, honest phases, and that nothing good is ever lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, small_network
from draw_flowers import draw_flower
from keras import layers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import Stop

ROOT = Path(__file__).parents[1]
STOCK = tf.keras.preprocessing.image.ImageDataGenerator


def start_script(*arguments):
    """Starts the script in a process of its own, with short climbs: the patterns' strength is tested elsewhere."""
    small = "study.PATTERN_STEPS, study.PATTERN_SIZE = 2, 48"
    plain_graphs = 'study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})'
    code = f"import model_training_and_visualization as study; {small}; {plain_graphs}; study.run(study.main)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_code(code, **paths):
    """Runs code in a process of its own, with the paths filled in."""
    code = code.format(root=str(ROOT), tests=str(ROOT / "tests"), **{name: str(path) for name, path in paths.items()})
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session", autouse=True)
def started_run(split_flowers, tmp_path_factory):
    """The whole run, started with the first of these tests and looked at by the last: it takes a minute."""
    folder = tmp_path_factory.mktemp("run")
    options = ("--data", split_flowers, "--model", folder / "net.keras", "--output", folder / "Images")
    small = ("--weights", "none", "--epochs", 2, "--image-size", 75, "--batch-size", 8)
    with start_script(*options, *small) as run:
        yield folder, options, run
        run.kill()


# ---- Augmentation ----


@pytest.mark.parametrize("fill_mode", ["nearest", "wrap"])
def test_the_warp_gives_the_same_picture_as_the_stock_generator(fill_mode):
    ranges = dict(study.AUGMENTATION, shear_range=10, zoom_range=0.2, fill_mode=fill_mode, cval=77)
    ours, stock = study.PhotoGenerator(**ranges), STOCK(**ranges)
    photo = draw_flower("daisy", np.random.default_rng(0), 160)[0].astype("float32")
    for seed in range(8):
        parameters = stock.get_random_transform(photo.shape, seed)
        difference = np.abs(ours.apply_transform(photo, parameters) - stock.apply_transform(photo, parameters))
        assert difference.mean() < 0.5
        assert np.abs(stock.apply_transform(photo, parameters) - photo).mean() > 2  # there was something to do


def batches(folder, workers, epochs=1, seed=3):
    photos = study.open_splits(folder, ["train"], 48, 5, seed)["train"]
    photos.workers = workers
    seen = []
    model = keras.Sequential([keras.Input((48, 48, 3)), layers.Flatten(), layers.Dense(3, activation="softmax")])

    class Recorder(type(model)):
        def train_step(self, data):
            seen.append(data[0].numpy())
            return {"loss": 0.0}

    model.__class__ = Recorder
    model.compile("sgd", "categorical_crossentropy", run_eagerly=True)
    model.fit(photos, epochs=epochs, verbose=0, shuffle=False)
    return seen


def test_batches_are_the_same_whatever_the_number_of_workers(split_flowers):
    for alone, together in zip(batches(split_flowers, 1), batches(split_flowers, 4), strict=True):
        np.testing.assert_array_equal(alone, together)


def test_every_epoch_and_every_seed_augments_anew_but_the_same_seed_alike(split_flowers):
    first = np.concatenate(batches(split_flowers, 2, epochs=2))
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(first) == 2 * 8 * len(CLASSES)
    np.testing.assert_array_equal(first, np.concatenate(batches(split_flowers, 2, epochs=2)))
    assert not np.array_equal(first, np.concatenate(batches(split_flowers, 2, epochs=2, seed=4)))


def test_photos_that_are_no_longer_kept_give_the_same_batches(split_flowers, monkeypatch):
    photos = study.open_splits(split_flowers, ["train"], size=48, batch_size=5, seed=3)["train"]
    kept = photos[1][0]
    monkeypatch.setattr(study, "network_input", study.network_input.__wrapped__)
    np.testing.assert_array_equal(photos[1][0], kept)


# ---- Phases ----


def weights_of(network, layer_names):
    return [weight.copy() for name in layer_names for weight in network.get_layer(name).get_weights()]


def changed(before, after):
    return [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.fixture
def eagerly():
    """To trace the graph of a large network takes longer than its few steps do without."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.filterwarnings("ignore:Even though the")
def test_the_head_learns_first_then_the_blocks_from_freeze_below_up(split_flowers, inception, tmp_path):
    """A saved network stands in for the pretrained one."""
    network = study.build_network(3, 75, str(inception[1]))
    splits = study.open_splits(split_flowers, ["train", "validation"], size=75, batch_size=8, seed=0)
    phases = study.training_phases(2, str(inception[1]), "mixed9", learning_rate=5e-3)
    assert [(p.name, p.first, p.last, p.learning_rate) for p in phases] == [
        ("head", 0, 1, 1e-3),
        ("fine-tuning", 1, 2, 5e-3),
    ]
    frozen = [layer.name for layer in keras.Model(network.input, network.get_layer("mixed8").output).layers]
    below = [layer.name for layer in network.layers if layer.weights and layer.name in frozen]
    head = [layer.name for layer in network.layers if isinstance(layer, layers.Dense)]
    above = [layer.name for layer in network.layers if layer.weights and layer.name not in [*below, *head]]
    assert len(below) > 100 and len(above) > 30
    backup = study.EpochBackup(tmp_path / "backup", {})
    start = {part: weights_of(network, names) for part, names in (("below", below), ("above", above), ("head", head))}
    np.testing.assert_array_equal(
        start["below"][0], inception[0].get_layer(inception[0].layers[2].name).get_weights()[0]
    )
    study.train(network, splits, phases[:1], backup)
    assert not any(
        changed(start["below"] + start["above"], weights_of(network, below + above))
    )  # BatchNormalization too
    assert all(changed(start["head"], weights_of(network, head)))
    study.train(network, splits, phases, backup)
    assert not any(changed(start["below"], weights_of(network, below)))
    assert np.mean(changed(start["above"], weights_of(network, above))) > 0.9
    assert backup.epochs == 2


def test_the_fine_tuning_rate_warms_up_to_its_peak_and_falls_to_zero_along_a_cosine():
    network = small_network()
    study.compile_for(network, study.Phase("scratch", 0, 10, "none", 0.01, cosine=True), steps_per_epoch=20)
    rate = network.optimizer._learning_rate
    rates = np.array([float(rate(step)) for step in (0, 10, 20, 110, 200)])
    np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.005, 0], atol=1e-6)


def test_statistics_keep_up_with_short_runs_from_scratch(inception):
    assert {layer.momentum for layer in study.in_creation_order(inception[0], layers.BatchNormalization)} == {0.9}


def small_inception():
    """What load_backbone_weights knows of InceptionV3: a flat network with mixed10, and that backbone alone."""
    photo = keras.Input((16, 16, 3))
    maps = layers.BatchNormalization(name="mixed10")(layers.Conv2D(4, 3)(photo))
    network = keras.Model(photo, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(maps)))
    return network, keras.Model(photo, maps)


def test_every_kind_of_file_gives_its_weights_to_a_new_network(tmp_path):
    network, base = small_inception()
    base.save_weights(tmp_path / "backbone.weights.h5")
    network.save(tmp_path / "whole.keras")
    network.save(tmp_path / "whole.h5")
    with h5py.File(tmp_path / "downloaded.h5", "w") as file:  # the layout of the files that Keras downloads
        save_weights_to_hdf5_group(file, base)
    _, fresh = small_inception()
    for path in sorted(tmp_path.iterdir()):
        fresh.set_weights([np.zeros_like(weight) for weight in fresh.get_weights()])
        study.load_backbone_weights(fresh, path)
        assert all(np.array_equal(a, b) for a, b in zip(fresh.get_weights(), base.get_weights(), strict=True)), path


def test_a_new_network_starts_from_the_weights_of_a_saved_one(inception):
    network, path = inception
    again = study.build_network(2, 80, str(path))
    backbones = (keras.Model(net.input, net.get_layer("mixed10").output).get_weights() for net in (again, network))
    assert all(np.array_equal(a, b) for a, b in zip(*backbones, strict=True))
    assert again.output_shape == (None, 2) and again.input_shape == (None, 80, 80, 3)


# ---- Nothing lost ----


def small_splits(folder):
    splits = study.open_splits(folder, ["train", "validation"], size=32, batch_size=6, seed=5)
    splits["train"].workers = 1
    return splits


def small_phases():
    return [
        study.Phase("head", 0, 2, "none", 1e-3, cosine=False),
        study.Phase("fine-tuning", 2, 5, "none", 3e-3, cosine=True),
    ]


def train_small(folder, backup_folder, resume=False, epochs=5):
    keras.utils.set_random_seed(1)
    network, backup = small_network(), study.EpochBackup(backup_folder, {"seed": 5})
    if resume:
        backup.resume(network)
    save_epoch = backup.on_epoch_end

    def interrupted_after(epoch, logs=None):
        if epoch == epochs:
            raise KeyboardInterrupt
        save_epoch(epoch, logs)

    backup.on_epoch_end = interrupted_after
    study.train(network, small_splits(folder), small_phases(), backup)
    return network, backup


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
    (network, backup), (reference, whole) = ours, theirs
    for name in study.METRICS:
        np.testing.assert_allclose(backup.history[name], whole.history[name], rtol=1e-4, atol=1e-5)
    for one, other in zip(network.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert backup.epochs == 5 and backup.weights_file(backup.best_epoch).is_file()


def test_a_run_resumed_in_its_second_phase_equals_an_uninterrupted_one(
    split_flowers, tmp_path, interrupted_after_4, uninterrupted
):
    shutil.copytree(interrupted_after_4, tmp_path / "backup")
    assert_same_run(train_small(split_flowers, tmp_path / "backup", resume=True), uninterrupted)


def test_a_run_resumed_between_its_phases_equals_an_uninterrupted_one(split_flowers, tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        train_small(split_flowers, tmp_path / "backup", epochs=2)
    assert_same_run(train_small(split_flowers, tmp_path / "backup", resume=True), uninterrupted)


def test_a_broken_backup_falls_back_to_the_epoch_before_it(split_flowers, tmp_path, interrupted_after_4, uninterrupted):
    shutil.copytree(interrupted_after_4, tmp_path / "backup")
    newest = max((tmp_path / "backup").glob("*epoch_004.keras"))
    newest.write_bytes(newest.read_bytes()[:2000])
    assert_same_run(train_small(split_flowers, tmp_path / "backup", resume=True), uninterrupted)


def test_resuming_with_other_settings_is_refused_naming_them(interrupted_after_4, tmp_path):
    with pytest.raises(Stop, match=r"seed 5, not 6") as stop:
        study.EpochBackup(interrupted_after_4, {"seed": 6}).resume(small_network())
    assert stop.value.exit_code == 2
    with pytest.raises(Stop, match="no interrupted run"):
        study.EpochBackup(tmp_path, {"seed": 5}).resume(small_network())


def train_until_a_signal(folder, backup_folder, kind):
    """Sends the signal in the fourth epoch, whose weights are written but do not count yet."""
    write_json = study.write_json

    def interrupted(path, state):
        if len(state["history"]["loss"]) == 4:
            os.kill(os.getpid(), signal.Signals[kind])
        write_json(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "write_json", interrupted)
        study.run(lambda: train_small(Path(folder), Path(backup_folder)))


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_training import train_until_a_signal
train_until_a_signal({data!r}, {backup!r}, "SIGKILL")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("kind", "exit_code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_killed_while_it_writes_its_backup_is_resumed_with_every_epoch_once(
    split_flowers, tmp_path, uninterrupted, kind, exit_code, capsys
):
    if kind == "SIGKILL":
        run = run_code(KILLED, data=split_flowers, backup=tmp_path)
        assert run.returncode == exit_code, run.stderr
    else:
        with pytest.raises(SystemExit) as end:
            train_until_a_signal(split_flowers, tmp_path, kind)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert end.value.code == exit_code
        assert ("Epochs kept: 3;" in capsys.readouterr().out) == (kind == "SIGINT")
    assert len(json.loads((tmp_path / "state.json").read_text())["history"]["loss"]) == 3
    assert_same_run(train_small(split_flowers, tmp_path, resume=True), uninterrupted)


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_earlier_backup_and_says_what_to_do(
    split_flowers, tmp_path, interrupted_after_4, capsys
):
    import resource

    shutil.copytree(interrupted_after_4, tmp_path / "backup")
    before = sorted(path.name for path in (tmp_path / "backup").iterdir())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))  # a disk with 10,000 bytes left
    try:
        with pytest.raises(SystemExit) as end:
            study.run(lambda: train_small(split_flowers, tmp_path / "backup", resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    message = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and "Free some space" in message[-1] and len(message) <= 3
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == before
    study.EpochBackup(tmp_path / "backup", {"seed": 5}).resume(small_network())


def test_a_loss_of_nan_stops_at_once_and_keeps_the_best_weights(split_flowers, tmp_path):
    backup = study.EpochBackup(tmp_path / "backup", {})
    network, splits = small_network(), small_splits(split_flowers)
    study.train(network, splits, [study.Phase("scratch", 0, 1, "none", 1e-3, cosine=False)], backup)
    network.layers[-1].set_weights([weight * np.nan for weight in network.layers[-1].get_weights()])
    with pytest.raises(Stop, match=r"NaN in epoch 2 at learning rate 0.5") as stop:
        study.train(network, splits, [study.Phase("scratch", 1, 9, "none", 0.5, cosine=False)], backup)
    assert stop.value.exit_code == 1 and str(backup.weights_file(1)) in str(stop.value)
    fresh = small_network()
    fresh.load_weights(backup.weights_file(1))
    assert all(np.isfinite(weight).all() for weight in fresh.get_weights())
    assert backup.epochs == 1


def test_running_out_of_memory_names_the_options_that_help(split_flowers, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(keras.Model, "fit", exhausted)
    with pytest.raises(Stop, match=r"smaller --batch-size or --image-size") as stop:
        train_small(split_flowers, tmp_path / "backup")
    assert stop.value.exit_code == 1


TWO_DEVICES = """
import sys, tensorflow as tf
sys.path[:0] = [{root!r}, {tests!r}]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import model_training_and_visualization as study
from pathlib import Path
from conftest import small_network
strategy = study.training_strategy()
assert strategy.num_replicas_in_sync == 2, strategy
splits = study.open_splits(Path({data!r}), ["train", "validation"], size=32, batch_size=6, seed=0)
with strategy.scope():
    backup = study.EpochBackup(Path({backup!r}), {{}})
    study.train(small_network(), splits, [study.Phase("scratch", 0, 2, "none", 1e-2, cosine=True)], backup)
assert backup.epochs == 2
"""


def test_several_devices_train_mirrored(split_flowers, tmp_path):
    run = run_code(TWO_DEVICES, data=split_flowers, backup=tmp_path / "backup")
    assert run.returncode == 0, run.stderr


def test_half_precision_is_used_where_the_machine_has_it_and_said_where_not(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    assert study.half_precision() == "mixed_float16"
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(study, "Path", lambda _: cpuinfo)
    assert study.half_precision() == "float32" and "float32" in capsys.readouterr().out
    cpuinfo.write_text("flags : fpu avx512_bf16 sse")
    assert study.half_precision() == "mixed_bfloat16"


# ---- Found before the first epoch ----


def test_missing_empty_and_differing_splits_are_named(split_flowers, tmp_path):
    open_all = {"names": ["train", "test"], "size": 32, "batch_size": 4, "seed": 0}
    with pytest.raises(Stop, match="train: no such folder"):
        study.open_splits(tmp_path, **open_all)
    shutil.copytree(split_flowers, tmp_path / "data")
    (tmp_path / "data" / "test" / "rose").rename(tmp_path / "data" / "test" / "orchid")
    with pytest.raises(Stop, match=r"train.*test hold different classes: orchid, rose"):
        study.open_splits(tmp_path / "data", **open_all)
    for photo in (tmp_path / "data" / "train" / "tulip").iterdir():
        photo.unlink()
    with pytest.raises(Stop, match=r"train: no photos in tulip"):
        study.open_splits(tmp_path / "data", **open_all)


def test_a_photo_that_is_cut_off_is_named_before_training(split_flowers, tmp_path):
    shutil.copytree(split_flowers, tmp_path / "data")
    cut = tmp_path / "data" / "train" / "rose" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(Stop, match=r"rose.3\.jpg: is damaged.*\nRemove it") as stop:
        study.open_splits(tmp_path / "data", ["train"], size=32, batch_size=4, seed=0)
    assert stop.value.exit_code == 2


def test_networks_that_cannot_be_drawn_from_are_refused_with_what_they_lack(inception, tmp_path):
    network, _ = inception
    assert study.what_network_lacks(network) is None
    assert "94 convolutions" in study.what_network_lacks(small_network())
    nested = keras.Sequential([keras.Input((75, 75, 3)), network])
    assert "flat graph" in study.what_network_lacks(nested)
    unscaled = keras.applications.InceptionV3(weights=None, classes=3, include_top=False, input_shape=(75, 75, 3))
    pooled = layers.GlobalAveragePooling2D()(unscaled.output)
    unscaled = keras.Model(unscaled.input, layers.Dense(3, activation="softmax")(pooled))
    assert "scaling" in study.what_network_lacks(unscaled)
    linear = keras.Model(network.input, layers.Dense(3)(network.layers[-1].input))
    assert "softmax" in study.what_network_lacks(linear)


def test_a_network_of_other_classes_than_the_test_folders_is_refused(split_flowers, inception, tmp_path, monkeypatch):
    shutil.copytree(split_flowers / "test", tmp_path / "test", ignore=lambda *_: [CLASSES[0]])
    arguments = ["--skip-training", "--model", inception[1], "--data", tmp_path, "--output", tmp_path / "Images"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(Stop, match=r"inception\.keras: has 3 classes, .*test 2") as stop:
        study.main()
    assert stop.value.exit_code == 2 and not (tmp_path / "Images").exists()


def test_missing_corrupt_foreign_and_unsafe_files_are_named(inception, tmp_path):
    for function, option in (
        (lambda path: study.load_network(path), "--model"),
        (lambda path: study.load_backbone_weights(small_inception()[1], path), "--weights"),
    ):
        with pytest.raises(Stop, match=rf"{option} .*absent\.keras: no such file"):
            function(tmp_path / "absent.keras")
        corrupt = tmp_path / "corrupt.keras"
        corrupt.write_bytes(inception[1].read_bytes()[:5000])
        with pytest.raises(Stop, match=rf"{option} .*corrupt\.keras"):
            function(corrupt)
        foreign = tmp_path / "foreign.keras"
        small_network().save(foreign)
        with pytest.raises(Stop, match=rf"{option} .*foreign\.keras"):
            function(foreign)
        unsafe = tmp_path / "unsafe.keras"
        photo = keras.Input((75, 75, 3))
        keras.Model(photo, layers.Lambda(lambda x: x / 255)(photo)).save(unsafe)
        with pytest.raises(Stop, match=rf"{option} .*unsafe\.keras"):
            function(unsafe)


def test_an_imagenet_download_that_fails_names_address_cache_file_and_other_choices(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    real = keras.applications.InceptionV3

    def unreachable(*arguments, weights=None, **options):
        if weights == "imagenet":
            raise Exception("URL fetch failure: no route to host")
        return real(*arguments, weights=weights, **options)

    unreachable.__module__ = real.__module__
    monkeypatch.setattr(keras.applications, "InceptionV3", unreachable)
    with pytest.raises(Stop) as stop:
        study.build_network(3, 75, "imagenet")
    message = str(stop.value)
    assert "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5" in message and "https://" in message
    assert str(tmp_path / "models") in message and "--weights FILE" in message and "--weights none" in message
    assert message.count("\n") <= 2 and stop.value.exit_code == 1


# ---- The whole run ----


class Links(HTMLParser):
    """Collects the links of a page, checks that tags close, and that each picture has an alternative text."""

    def __init__(self, page):
        super().__init__()
        self.links, self.open = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        assert tag != "img" or attrs["alt"]
        assert tag not in ("script", "link")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


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
    *(f"{name}" for k in (1, 2, 3) for name in (f"CAM_{k}.jpeg", f"heatmap_{k}.jpg")),
]  # fmt: skip


def test_a_run_writes_every_picture_whole_and_none_of_them_flat(whole_run):
    folder, *_ = whole_run
    written = {path.name for path in (folder / "Images").iterdir()}
    assert written == {*EXPECTED, "index.html"}
    for name in EXPECTED:
        picture = np.asarray(Image.open(folder / "Images" / name).convert("RGB"), float)
        assert picture.std() > 8, name


def test_a_run_reports_the_test_split_and_saves_model_and_history(whole_run):
    folder, _, stdout, stderr = whole_run
    record = json.loads((folder / "net_history.json").read_text("utf-8"))
    assert set(record) == {"history", "test", "classes", "settings"} and record["classes"] == CLASSES
    assert set(record["history"]) == set(study.METRICS) and {len(v) for v in record["history"].values()} == {2}
    assert f"Test: loss {record['test']['loss']:.4f}  accuracy {record['test']['accuracy']:.4f}" in stdout
    assert "Epoch 2/2" in stdout and "precision" in stdout and stderr == ""
    network = keras.saving.load_model(folder / "net.keras")
    assert np.sum(network(np.zeros((1, 75, 75, 3)))) == pytest.approx(1) and network.dtype_policy.name == "float32"
    assert not (folder / "net_backup").exists()


def test_every_link_of_the_page_leads_to_a_picture_and_nowhere_else(whole_run):
    folder, *_ = whole_run
    page = (folder / "Images" / "index.html").read_text("utf-8")
    links = Links(page)
    assert links.open == ["html", "body"] or links.open == []
    assert set(links.links) == set(EXPECTED)
    assert "http" not in page and "--image-size 75" in page


def test_skip_training_draws_the_same_pictures_as_the_run_that_trained(whole_run, tmp_path, monkeypatch):
    folder, options, *_ = whole_run
    before = (folder / "net.keras").read_bytes()
    monkeypatch.setattr(sys, "argv", ["script", *map(str, options[:4]), "--output", str(tmp_path), "--skip-training"])
    monkeypatch.setattr(study, "PATTERN_CLIMBS", {3: study.PATTERN_CLIMBS[3]})
    monkeypatch.setattr(study, "PATTERN_SIZE", 48)
    monkeypatch.setattr(study, "PATTERN_STEPS", 2)
    study.main()
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix != ".html"}
    assert set(EXPECTED) - drawn == {"conv2d_8_filters.jpg", "conv2d_40_filters.jpg"}
    for name in drawn:
        one, other = (np.asarray(Image.open(f / name).convert("RGB"), int) for f in (folder / "Images", tmp_path))
        assert one.shape == other.shape and np.abs(one - other).mean() < 0.5, name
    assert (folder / "net.keras").read_bytes() == before


def test_bad_input_ends_with_exit_code_2_in_few_lines_and_writes_nothing(tmp_path, monkeypatch, capsys):
    options = ("--output", tmp_path / "Images", "--model", tmp_path / "a.keras", "--data", tmp_path / "nowhere")
    monkeypatch.setattr(sys, "argv", ["script", *map(str, options)])
    with pytest.raises(SystemExit) as end:
        study.run(study.main)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "nowhere" in message and "create_train_val_test.py" in message
    assert len(message.strip().splitlines()) <= 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--image-size", "74"],
        ["--learning-rate", "-1"],
        ["--freeze-below", "x"],
        ["--model", "a.h5"],
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stop:
        study.parse_options()
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Stop, match="file"):
        study.require_writable(tmp_path / "file" / "Images")
    study.require_writable(tmp_path / "new" / "Images")
    assert not (tmp_path / "new").exists()

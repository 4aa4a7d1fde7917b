"""See what a convolutional network sees: fine-tune InceptionV3 on photos, then draw what it has learnt.

    python create_train_val_test.py flowers
    python model_training_and_visualization.py

The sections follow a run: 1 photos, 2 network, 3 training, 4 judgement, 5 activation grids, 6 filter patterns,
7 heatmaps, 8 gallery. Functions compute and return arrays; only save_*, write_*, draw_* and main touch the disk.
"""

import argparse
import contextlib
import html
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from create_train_val_test import Stop, class_folders, cores, decode_photos, read_photo, replace_when_whole, run

stderr = os.dup(2)
try:  # what TensorFlow says while it loads stays off the terminal, unless TF_CPP_MIN_LOG_LEVEL asks for it
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import keras
    import tensorflow as tf
    from keras import layers
finally:
    os.dup2(stderr, 2)

# ---- Settings: what a reader of this study would change --------------------------------------------------------------

AUGMENTATION = {"rotation_range": 20, "width_shift_range": 0.2, "height_shift_range": 0.2, "horizontal_flip": True}
GRID_CONVOLUTIONS = (1, 4, 9)  # in the order of their creation, counted from 1
HEATMAP_LAYER = "mixed10"
DELETED_FRACTION = 0.2  # of a photo, blurred away to see what its heatmap is worth
PHOTO_MEMORY = 2**30  # bytes of decoded photos to keep; those beyond are decoded again in every epoch

BLOCKS = [f"mixed{number}" for number in range(11)]  # InceptionV3's blocks, from the photo to the classes
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
BACKGROUND, INK, PANEL_SIZE = 24, 235, 320  # the sheets' grey levels, and the side of a panel in pixels

# ---- 1. Photos: from the split folders to augmented batches ----------------------------------------------------------
#
# Each photo is squeezed to the square that the network takes, as 0–255 RGB. Training photos are turned, shifted and
# mirrored at random in every epoch, so that the network never meets the same picture twice and learns none by heart.


def resize_photo(photo, size):
    """Squeezes an (h, w, 3) uint8 photo into (size, size, 3), each new pixel a bilinear mean over its own area."""
    return np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BILINEAR))


def network_input(path, size):
    """Reads a photo as the network is to see it: (size, size, 3) uint8 RGB. Raises Stop if it does not decode."""
    return resize_photo(read_photo(path, at_least=size), size)


class PhotoGenerator(tf.keras.preprocessing.image.ImageDataGenerator):
    """ImageDataGenerator whose affine step is one OpenCV warp: the same picture as SciPy's, many times faster."""

    seeding = threading.Lock()

    def get_random_transform(self, img_shape, seed=None):
        with self.seeding:  # Keras draws from NumPy's global generator, which all workers share
            return super().get_random_transform(img_shape, seed)

    def apply_transform(self, x, transform_parameters):
        nothing = {"theta": 0, "tx": 0, "ty": 0, "shear": 0, "zx": 1, "zy": 1}
        affine = nothing | {name: value for name, value in transform_parameters.items() if name in nothing}
        if affine != nothing and self.fill_mode == "nearest":  # edges go on; the other modes stay with SciPy
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            matrix = affine_matrix(x.shape[:2], **affine)[:2]
            x = cv2.warpAffine(x, matrix, x.shape[1::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
            transform_parameters = transform_parameters | nothing
        return super().apply_transform(x, transform_parameters)

    def flow_from_directory(self, directory, **options):
        return PhotoIterator(directory, self, **options)


def affine_matrix(shape, theta, tx, ty, shear, zx, zy):
    """The (3, 3) matrix from output to input pixels (x, y) that Keras composes of these; angles in degrees."""
    theta, shear = np.deg2rad([theta, shear])
    rotation = np.array([[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]])
    shift = np.array([[1, 0, tx], [0, 1, ty], [0, 0, 1]])
    shearing = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    centre = np.eye(3)
    centre[:2, 2] = np.array(shape) / 2 - 0.5
    return centre @ rotation @ shift @ shearing @ np.diag([zx, zy, 1]) @ np.linalg.inv(centre)


class PhotoIterator(tf.keras.preprocessing.image.DirectoryIterator):
    """Batches ((n, size, size, 3) float32 0–255, (n, classes) one-hot) of the photos in a split folder.

    What a batch holds depends on the seed, the epoch and the batch's number alone, whichever worker builds it.
    """

    epoch = 0

    def __init__(self, directory, generator, **options):
        super().__init__(directory, generator, **options)
        self.workers, self.kept = min(8, cores()), {}  # number of the photo -> (size, size, 3) uint8

    def check_photos(self):
        """Decodes each photo, in parallel, and keeps what fits into memory. Raises Stop naming the first bad one."""
        decode, description = partial(network_input, size=self.target_size[0]), f"Checking {Path(self.directory).name}"
        try:
            for number, photo in enumerate(decode_photos(self.filepaths, decode, description)):
                if photo.nbytes * (number + 1) <= PHOTO_MEMORY:
                    self.kept[number] = photo
        except Stop as stop:
            raise Stop(
                f"{stop}.\nRemove it, or split again, with --overwrite: a split leaves such photos out."
            ) from stop

    def __getitem__(self, batch_number):
        numbers = np.arange(self.n)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(numbers)
        numbers = numbers[batch_number * self.batch_size :][: self.batch_size]
        return np.stack([self.augmented(number) for number in numbers]), np.eye(self.num_classes)[self.classes[numbers]]

    def augmented(self, number):
        photo = self.kept.get(number)
        if photo is None:
            photo = network_input(self.filepaths[number], self.target_size[0])
        seed = np.random.SeedSequence([self.seed, self.epoch, number]).generate_state(1)[0]
        photo = self.image_data_generator.random_transform(photo.astype("float32"), seed)
        return self.image_data_generator.standardize(photo)

    def on_epoch_end(self):
        self.epoch += 1


def split_classes(data, split):
    """The names of the class folders in data/split. Raises Stop where there are not two."""
    folder = data / split
    names = class_folders(folder) if folder.is_dir() else []
    if len(names) < 2:
        lack = "needs two class folders or more" if folder.is_dir() else "no such folder"
        raise Stop(f"{folder}: {lack}.\nSplit your photos: python create_train_val_test.py PHOTOS --output {data}")
    return names


def open_splits(data, names, size, batch_size, seed):
    """Opens the named split folders, training photos augmented, and checks each photo: {name: PhotoIterator}.

    Raises Stop where a class is empty, a photo does not decode, or the splits hold different classes.
    """
    classes, splits = {name: split_classes(data, name) for name in names}, {}
    for name in names:
        if different := set(classes[name]) ^ set(classes[names[0]]):
            folders, lists = f"{data / names[0]} and {data / name}", ", ".join(sorted(different))
            raise Stop(f"{folders} hold different classes: {lists}.\nSplit again, with --overwrite.")
        training = name == "train"
        options = {"classes": classes[name], "target_size": (size, size), "shuffle": training, "seed": seed}
        generator = PhotoGenerator(**AUGMENTATION if training else {})
        splits[name] = generator.flow_from_directory(str(data / name), batch_size=batch_size, **options)
        if empty := [k for k, label in splits[name].class_indices.items() if label not in splits[name].classes]:
            raise Stop(f"{data / name}: no photos in {', '.join(empty)}.\nSplit again, with --overwrite.")
    for photos in splits.values():
        photos.check_photos()
    return splits


# ---- 2. Network: InceptionV3 with a new head -------------------------------------------------------------------------
#
# The convolutions of InceptionV3 turn a photo into 2048 small maps ("mixed10"); their means go through a small
# classifier, the head. The graph is flat, so that every layer can be asked for by its name, and the network scales the
# pixels itself: whoever loads the saved file feeds plain photos and cannot get the range wrong.


def build_network(class_count, image_size, weights):
    """InceptionV3 on 0–255 RGB with a softmax over the classes.

    weights: "none" (random), "imagenet" (Keras's download), a weights file or a saved model of the same backbone.
    Raises Stop for a file without InceptionV3's weights, and where the download fails.
    """
    photo = keras.Input((image_size, image_size, 3), name="photo")
    scaled = layers.Rescaling(1 / 127.5, offset=-1, name="scaled")(photo)  # to [-1, 1], as ImageNet's weights expect
    base = keras.applications.InceptionV3(include_top=False, weights=None, input_tensor=scaled)
    for layer in in_creation_order(base, layers.BatchNormalization):
        layer.momentum = 0.9  # at 0.99 the statistics lag hundreds of steps behind, and validation looks random
    if weights == "imagenet":
        load_imagenet_weights(base)
    elif weights != "none":
        load_backbone_weights(base, Path(weights))
    pooled = layers.GlobalAveragePooling2D()(base.output)
    hidden = layers.Dropout(0.1)(layers.Dense(256, activation="relu")(pooled))
    return keras.Model(photo, layers.Dense(class_count, activation="softmax", dtype="float32")(hidden))


def load_imagenet_weights(base):
    address = sys.modules[keras.applications.InceptionV3.__module__].WEIGHTS_PATH_NO_TOP
    try:
        pretrained = keras.applications.InceptionV3(include_top=False, weights="imagenet")
    except Exception as error:  # Keras raises a bare Exception where it cannot reach the address
        cache = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models" / address.rpartition("/")[2]
        raise Stop(
            f"ImageNet's weights cannot be fetched from {address}\n"
            f"Put that file by hand at {cache},\n"
            "or start from a file of your own with --weights FILE, or from scratch with --weights none.",
            exit_code=1,
        ) from error
    base.set_weights(pretrained.get_weights())


def load_backbone_weights(base, path):
    if not path.is_file():
        raise Stop(f"--weights {path}: no such file. Give imagenet, none, or a weights file or model of InceptionV3.")
    try:
        if path.suffix == ".keras" or holds_a_network(path):
            saved = keras.saving.load_model(path, compile=False)  # in safe mode: no code from the file is run
            base.set_weights(keras.Model(saved.inputs, saved.get_layer(BLOCKS[-1]).output).get_weights())
        else:
            base.load_weights(path)
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        raise Stop(
            f"--weights {path}: does not hold InceptionV3's weights ({first_line(error)}).\n"
            "Give a .keras model of this script, or an .h5 weights file of InceptionV3 without its top."
        ) from error


def holds_a_network(path):
    """True for an .h5 file of a whole model; one of weights alone does not tell how the network is built."""
    with h5py.File(path) as file:
        return "model_config" in file.attrs


def load_network(path, class_count):
    """Loads a saved classifier to draw the pictures from. Raises Stop naming what it lacks."""
    if not path.is_file():
        raise Stop(f"--model {path}: no such file. Train one first (without --skip-training), or name another.")
    try:
        network = keras.saving.load_model(path, compile=False)  # in safe mode: no code from the file is run
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        raise Stop(f"--model {path}: cannot be loaded ({first_line(error)}).\nTrain one, or name another.") from error
    if lack := what_network_lacks(network, class_count):
        raise Stop(f"--model {path}: the pictures need {lack}.\nName another, or train one.")
    return network


def what_network_lacks(network, class_count):
    """What keeps a network from being a flat InceptionV3 classifier of 0–255 RGB, in words; None if nothing does."""
    convolutions, shape = in_creation_order(network, layers.Conv2D), network.input_shape[1:]
    if len(convolutions) != 94 or not set(BLOCKS) <= {layer.name for layer in network.layers}:
        return "InceptionV3's 94 convolutions and its blocks mixed0 to mixed10 in one flat graph"
    if None in shape or shape != (shape[0], shape[0], 3):
        return "a square RGB input of a fixed size"
    black_and_white = np.stack([np.zeros(shape, "float32"), np.full(shape, 255, "float32")])
    black, white = np.mean(keras.Model(network.input, convolutions[0].input)(black_and_white), axis=(1, 2, 3))
    if not 0.5 < white - black < 2.5:
        return "a scaling of 0–255 RGB inside, as Rescaling(1/127.5, offset=-1) after the input"
    if getattr(network.layers[-1], "activation", None) is not keras.activations.softmax:
        return "a softmax at its end"
    if network.output_shape[-1] != class_count:
        return f"{class_count} classes like the split folders, not {network.output_shape[-1]}"
    return None


def in_creation_order(network, layer_type):
    """The network's layers of one type, first created first.

    Keras sorts network.layers by depth, and its names count on over all networks of a process: the first convolution
    may be called "conv2d" or "conv2d_94". The number at the end of the name still tells the order of creation.
    """
    chosen = [layer for layer in network.layers if isinstance(layer, layer_type)]
    return sorted(chosen, key=lambda layer: int(re.search(r"(?:_(\d+))?$", layer.name)[1] or 0))


def first_line(error):
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:150]


# ---- 3. Training: first the head, then the network -------------------------------------------------------------------
#
# Pretrained layers know edges, petals and textures; a new head knows nothing, and its first wild gradients would spoil
# them. So the head learns alone on the frozen base ("head"), then the upper blocks follow at a low learning rate that
# falls along a cosine ("fine-tuning"). From scratch all layers learn at once, after a short warm-up ("scratch").


@dataclass
class Phase:
    """A stretch of epochs, counted from 0, in which the layers from a block up learn at one peak learning rate."""

    name: str
    first: int
    last: int  # the epoch after its last
    freeze_below: str  # a block, "head" or "none"
    learning_rate: float
    cosine: bool


def training_phases(epochs, weights, freeze_below, learning_rate=None):
    """The phases of a run: one from scratch; from given weights a fifth of the epochs for the head, then the rest."""
    if weights == "none":
        return [Phase("scratch", 0, epochs, "none", learning_rate or 5e-4, cosine=True)]
    head_epochs = math.ceil(epochs / 5)
    head = Phase("head", 0, head_epochs, "head", 1e-3, cosine=False)
    fine_tuning = Phase("fine-tuning", head_epochs, epochs, freeze_below, learning_rate or 2e-4, cosine=True)
    return [head, fine_tuning] if epochs > head_epochs else [head]


def freeze(network, below):
    """Lets the layers from a block up learn and no others; "head" leaves only the head, "none" freezes nothing.

    BatchNormalization of a frozen layer runs in inference mode: Keras couples the two.
    """
    stem_end = in_creation_order(network, layers.MaxPooling2D)[1].name if below != "none" else None
    last_frozen = {"none": None, "head": BLOCKS[-1], **dict(zip(BLOCKS, [stem_end, *BLOCKS], strict=False))}[below]
    frozen = keras.Model(network.input, network.get_layer(last_frozen).output).layers if last_frozen else []
    for layer in network.layers:
        layer.trainable = layer not in frozen


def compile_for(network, phase, steps_per_epoch):
    """Freezes what the phase freezes, and gives the network its loss and an Adam at the phase's learning rate."""
    freeze(network, phase.freeze_below)
    rate, steps = phase.learning_rate, steps_per_epoch * (phase.last - phase.first)
    if phase.cosine:
        warm_up = max(1, steps // 10)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - warm_up), warmup_target=rate, warmup_steps=warm_up
        )
    network.compile(keras.optimizers.Adam(rate), loss="categorical_crossentropy", metrics=["accuracy"])
    # Optimizer and metrics make their variables now: made in the first step, they would have it traced twice.
    network.optimizer.build(network.trainable_variables)
    nothing = np.zeros((1, *network.output_shape[1:]), "float32")
    network.compute_metrics(None, nothing, nothing)
    network.reset_metrics()


class EpochBar(keras.callbacks.Callback):
    """A progress bar for each epoch with photos per second and time left; then a line with the epoch's figures."""

    def __init__(self, bar, phase, photos):
        super().__init__()
        self.bar, self.phase, self.photos = bar, phase, photos

    def on_epoch_begin(self, epoch, logs=None):
        self.title = f"Epoch {epoch + 1}/{self.params['epochs']} {self.phase.name}"
        self.start = time.perf_counter()
        self.task = self.bar.add_task(self.title, total=self.photos.n, speed="")

    def on_train_batch_end(self, batch, logs=None):
        seen = min(self.photos.n, (batch + 1) * self.photos.batch_size)
        speed = f"{seen / (time.perf_counter() - self.start):.0f} photos/s"
        self.bar.update(self.task, completed=seen, speed=speed)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.remove_task(self.task)
        figures = "  ".join(f"{name} {logs[name]:.4f}" for name in METRICS if name in logs)
        print(f"{self.title}: {figures}  ({time.perf_counter() - self.start:.0f} s)", flush=True)


class EpochBackup(keras.callbacks.Callback):
    """Keeps weights, optimizer and history of whole epochs in a folder, so that an interrupted run can go on.

    Keras's BackupAndRestore overwrites its files in place and keeps neither history nor best epoch. Here an epoch
    counts once state.json, written last, names it: a kill at any moment leaves whole epochs. The last two stay, in case
    the last cannot be read, and the best so far of both.
    """

    def __init__(self, folder, settings):
        super().__init__()
        self.folder, self.settings, self.run_name = folder, settings, f"{time.time_ns():x}"
        self.history = {name: [] for name in METRICS}
        self.failed = False

    @property
    def epochs(self):
        return len(self.history["loss"])

    @property
    def best_epoch(self):
        """The epoch of the lowest validation loss, counted from 1."""
        return int(np.argmin(self.history["val_loss"])) + 1

    def weights_file(self, epoch):
        return self.folder / f"{self.run_name}_epoch_{epoch:03}.keras"  # HDF5 itself crashes on a full disk

    def on_epoch_end(self, epoch, logs=None):
        self.failed = not np.isfinite([logs[name] for name in ("loss", "val_loss") if name in logs]).all()
        if self.failed:
            return
        before, needed = self.history, set()
        if self.epochs:
            needed |= {self.weights_file(self.epochs), self.weights_file(self.best_epoch)}
        self.history = {name: [*values, float(logs[name])] for name, values in before.items()}
        needed |= {self.weights_file(self.epochs), self.weights_file(self.best_epoch)}
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with replace_when_whole(self.weights_file(self.epochs)) as partial:
                self.model.save(partial)
            state = {"run_name": self.run_name, "settings": self.settings, "history": self.history}
            write_json(self.folder / "state.json", state)
        except BaseException:  # Ctrl-C among them: an epoch that is not written is not kept
            self.history = before
            raise
        for file in set(self.folder.glob("*.keras")) - needed:
            file.unlink()

    def resume(self, network):
        """Loads the newest epoch that can be read into an uncompiled network. Raises Stop if the settings differ."""
        state = read_json(self.folder / "state.json")
        if state is None:
            raise Stop(f"--resume: no interrupted run in {self.folder}. Leave out --resume to start a new one.")
        before = state["settings"]
        if differing := [name for name in self.settings if before.get(name) != self.settings[name]]:
            was = "; ".join(f"{name} {before.get(name)}, not {self.settings[name]}" for name in differing)
            raise Stop(f"--resume: the run in {self.folder} had {was}.\nGive the same, or leave out --resume.")
        self.run_name = state["run_name"]
        for epoch in range(len(state["history"]["loss"]), 0, -1):
            try:
                network.load_weights(self.weights_file(epoch))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                print(f"{self.weights_file(epoch)}: {first_line(error)}. Going on from the epoch before it.")
                continue
            self.history = {name: values[:epoch] for name, values in state["history"].items()}
            return
        raise Stop(f"--resume: no epoch in {self.folder} can be read. Leave out --resume to start a new run.", 1)


def read_json(path):
    """The content of a JSON file, or None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text("utf-8"))


def write_json(path, content):
    with replace_when_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


def train(network, splits, phases, backup):
    """Trains through the phases, from the epoch where backup stands. Raises Stop on NaN and when memory runs out."""
    photos = splits["train"]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    for phase in phases:
        if backup.epochs >= phase.last:
            continue
        compile_for(network, phase, len(photos))
        if backup.epochs > phase.first:
            network.load_weights(backup.weights_file(backup.epochs))  # now with the optimizer's own state
        photos.epoch = backup.epochs
        with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
            callbacks = [keras.callbacks.TerminateOnNaN(), backup, EpochBar(bar, phase, photos)]  # told when it is kept
            options = {"initial_epoch": backup.epochs, "epochs": phase.last, "verbose": 0}
            options["shuffle"] = False  # photos shuffles itself, by seed and epoch; Keras would shuffle the batches too
            try:
                network.fit(photos, validation_data=splits["validation"], callbacks=callbacks, **options)
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                raise Stop("Out of memory. Train with a smaller --batch-size or --image-size.", 1) from error
            except KeyboardInterrupt:
                if backup.epochs:
                    print(f"Epochs kept: {backup.epochs}; the same command with --resume goes on.", flush=True)
                raise
        if backup.failed:
            rate = float(network.optimizer.learning_rate)
            kept = f"Best weights so far: {backup.weights_file(backup.best_epoch)}. " if backup.epochs else ""
            raise Stop(
                f"The loss became NaN in epoch {backup.epochs + 1} at learning rate {rate:.2g}.\n"
                f"{kept}Train with a smaller --learning-rate.",
                exit_code=1,
            )


def training_policy(mixed_precision):
    """Keras's dtype policy: half precision where it is asked for and the machine computes in it."""
    if not mixed_precision:
        return "float32"
    if tf.config.list_physical_devices("GPU"):
        return "mixed_float16"
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file() and {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu.read_text().split()):
        return "mixed_bfloat16"
    print("--mixed-precision: no GPU, nor a CPU that is known to compute in bfloat16; going on in float32.")
    return "float32"


def training_strategy():
    """Mirrors the network over all GPUs (or logical CPUs) where there are several."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


# ---- 4. Judgement: what the network gets right and wrong -------------------------------------------------------------
#
# The test photos took no part in training, nor in the choice of the best epoch: their figures tell how the network does
# on photos that it has never met. They are asked for once, at the end.


def loss_and_accuracy(probabilities, labels):
    """Mean cross-entropy and accuracy of (n, classes) probabilities for (n,) true classes."""
    true = np.maximum(probabilities[np.arange(len(labels)), labels], keras.config.epsilon())
    return {"loss": float(-np.log(true).mean()), "accuracy": float((probabilities.argmax(1) == labels).mean())}


def confusion_matrix(probabilities, labels):
    """(classes, classes) counts; row: true class, column: predicted class."""
    counts = np.zeros((probabilities.shape[1],) * 2, int)
    np.add.at(counts, (labels, probabilities.argmax(1)), 1)
    return counts


def precision_and_recall(confusions, class_names):
    """Precision and recall of each class, as the lines of a table."""
    width = max(map(len, class_names))
    yield f"{'class':{width}}  precision  recall  photos"
    for k, name in enumerate(class_names):
        predicted, photos = confusions[:, k].sum(), confusions[k].sum()
        precision = f"{confusions[k, k] / predicted:.2f}" if predicted else "-"
        yield f"{name:{width}}  {precision:>9}  {confusions[k, k] / photos:6.2f}  {photos:6}"


def most_confused(confusions, class_names):
    """A sentence on the two classes that are most often taken for each other."""
    mixed_up = np.triu(confusions + confusions.T, 1)
    if not mixed_up.any():
        return "No class is taken for another."
    one, other = np.unravel_index(mixed_up.argmax(), mixed_up.shape)
    photos = confusions[[one, other]].sum()
    return f"Most confused: {class_names[one]} and {class_names[other]}, {mixed_up[one, other]} of {photos} photos."


def telling_photos(probabilities, labels):
    """Numbers of the photos, most telling first: the surest right one, the worst mistakes, the least certain."""
    true = probabilities[np.arange(len(labels)), labels]
    right = probabilities.argmax(1) == labels
    surest = np.argmax(np.where(right, true, -1))
    return [surest, *(number for number in np.lexsort((true, right)) if number != surest)]


def save_training_curves(path, history, phases):
    """Draws loss and accuracy after each epoch; shaded: the phases, {name: epochs}; red: the epoch that is kept."""
    figure = Figure(figsize=(11, 4))
    epochs, best = np.arange(1, len(history["loss"]) + 1), int(np.argmin(history["val_loss"]))
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, values in (("training", history[metric]), ("validation", history[f"val_{metric}"])):
            axes.plot(epochs, values, "o-", label=name)
        axes.plot(best + 1, history[f"val_{metric}"][best], "o", color="crimson", markersize=10, label="kept")
        start = 0.5
        for k, (name, length) in enumerate(phases.items()):
            axes.axvspan(start, start + length, color="grey", alpha=0.16 / (k + 1), linewidth=0)
            axes.text(start + 0.1, 1.01, name, transform=axes.get_xaxis_transform(), color="dimgrey")
            start += length
        axes.set(xlabel="epoch", ylabel=metric, xlim=(0.5, len(epochs) + 0.5))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(path, figure)


def save_confusion_matrix(path, confusions, class_names):
    """Draws how often each true class (row) is taken for each class (column)."""
    shares = confusions / np.maximum(1, confusions.sum(1, keepdims=True))
    axes = axes_of_numbers(confusions, shares, "Blues", white=shares > 0.5)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(confusions)} of {confusions.sum()} test photos right")
    save_figure(path, axes.figure)


def axes_of_numbers(numbers, shares, colours, white):
    """Axes with a cell for each of the (h, w) numbers, coloured by its share, 0–1; where white, in white letters."""
    figure = Figure(figsize=(1.6 + 0.9 * numbers.shape[1], 1.2 + 0.8 * len(numbers)))
    axes = figure.subplots()
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(numbers):
        axes.text(
            column, row, f"{value:.3g}", ha="center", va="center", color="white" if white[row, column] else "black"
        )
    return axes


def save_figure(path, figure):
    with replace_when_whole(path) as partial:
        figure.savefig(partial, dpi=130, bbox_inches="tight")
    print(path, flush=True)


# ---- 5. Activation grids: what each channel of a layer answers -------------------------------------------------------
#
# A convolution turns the photo into channels, one for each of its filters: maps of where the filter found its pattern.
# The first look like edge and colour drawings of the photo; deeper ones are coarser and answer to parts. The ReLU that
# follows (ReLU.png) keeps what is positive, and that is all that the next layer gets to see.


def activations(network, photo, layer_names):
    """Answers of the named layers to one (size, size, 3) photo, from one forward pass: a list of (h, w, channels)."""
    probe = keras.Model(network.input, [network.get_layer(name).output for name in layer_names])
    return [np.asarray(answer[0], "float32") for answer in probe(photo[None].astype("float32"))]


def channel_cells(activation, size):
    """Pictures of the channels of an (h, w, channels) activation: (channels, size, size, 3) uint8, and which are dead.

    Black is 0, blue is negative, red to yellow positive; the 99.5th percentile of a channel's absolute values has full
    colour, so that one hot pixel does not turn all others black. A dead channel, 0 everywhere, is a grey cross.
    """
    strength = np.abs(activation)
    dead = ~activation.any((0, 1))
    full = np.percentile(strength, 99.5, axis=(0, 1))
    full = np.where(full > 0, full, strength.max((0, 1))) + dead
    scaled = np.clip(activation / full, -1, 1)
    warm, cold = matplotlib.colormaps["inferno"](np.abs(scaled)), matplotlib.colormaps["berlin"](0.5 + scaled / 2)
    colours = (255 * np.where(scaled[..., None] >= 0, warm, cold)[..., :3]).astype("uint8")
    smooth = cv2.INTER_AREA if activation.shape[0] > size else cv2.INTER_NEAREST
    cells = np.stack([cv2.resize(colours[:, :, k], (size, size), interpolation=smooth) for k in range(len(dead))])
    diagonals = np.eye(size, dtype=bool) | np.eye(size, dtype=bool)[::-1]
    cells[dead] = np.where(diagonals[..., None], 150, 70)
    return cells, dead


def tile(cells, columns, gap=2):
    """One (height, width, 3) sheet of the (n, h, w, 3) cells in reading order, the last row filled up."""
    count, height, width, _ = cells.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height + gap, width + gap, 3), BACKGROUND, "uint8")
    sheet[:count, :height, :width] = cells
    sheet = sheet.reshape(rows, columns, height + gap, width + gap, 3).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + gap), columns * (width + gap), 3)
    return np.pad(sheet, ((gap, 0), (gap, 0), (0, 0)), constant_values=BACKGROUND)


def with_title(picture, title):
    """The (h, w, 3) picture below its title, whose letters shrink where a line is too long for the width: uint8 RGB."""
    width, lines = picture.shape[1], title.count("\n") + 1
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    size = max(12, width / 64)
    band = Image.new("RGB", (width, int((1.35 * lines + 0.6) * size)), (BACKGROUND,) * 3)
    widest = max(ImageFont.truetype(file, size).getlength(line) for line in title.splitlines())
    font = ImageFont.truetype(file, size * min(1, (width - 12) / widest))
    ImageDraw.Draw(band).multiline_text((6, size / 3), title, (INK,) * 3, font, spacing=size / 4)
    return np.concatenate([np.asarray(band), picture])


def activation_grid(activation, layer_name, photo_name):
    """Titled sheet of all channels of an (h, w, channels) activation, 16 in a row: (height, width, 3) uint8."""
    height, width, channels = activation.shape
    cells, dead = channel_cells(activation, int(np.clip(1800 / math.sqrt(channels), 24, 96)))
    fired = f"{dead.sum()} did not fire (crossed)" if dead.any() else "all channels fired"
    return with_title(
        tile(cells, columns=16),
        f"{layer_name}: {height} × {width} cells × {channels} channels, on {photo_name}\n"
        f"black 0, red to yellow positive, blue negative, each channel on a scale of its own; {fired}",
    )


def save_picture(path, picture):
    """Writes an (h, w, 3) uint8 picture in the format that the suffix names."""
    with replace_when_whole(path) as partial:
        Image.fromarray(picture).save(partial, quality=92, subsampling=0)  # colours as sharp as brightness
    print(path, flush=True)


def save_relu(path):
    """Draws the function that follows each convolution."""
    figure = Figure(figsize=(5, 3.5))
    axes = figure.subplots()
    x = np.linspace(-5, 5, 201)
    axes.plot(x, np.maximum(0, x), color="crimson", linewidth=3)
    axes.set(title="ReLU(x) = max(0, x)", xlabel="x: answer of a filter", ylabel="what the next layer sees")
    axes.grid(alpha=0.3)
    save_figure(path, figure)


# ---- 6. Filter patterns: what each filter looks for ------------------------------------------------------------------
#
# Each filter gets a blank image of its own, which climbs the gradient of the filter's mean answer: it becomes what the
# filter looks for. As in "Feature Visualization" (Olah et al., 2017) what climbs are not pixels but the waves that the
# image is made of, long ones faster than short ones, in colours that are as independent as those of photos.

# How the filters of each convolution climb, chosen by looking at the sheets and by the filters' answers:
# longest_wavelength, pixels: about what a filter sees (the 3rd convolution 11 pixels, the 8th 63, the 40th the whole
# canvas); longer waves would end in one flat colour. shift, pixels either way: early filters climb alike everywhere and
# fill the canvas; deep ones, moved less, build whole flowers. damping of waves that hardly matter: without it they
# drown deep filters in noise; early filters need them.
PATTERN_CLIMBS = {
    3: {"longest_wavelength": 16, "shift": 64, "damping": 0.1},
    8: {"longest_wavelength": 64, "shift": 32, "damping": 1.0},
    40: {"longest_wavelength": 128, "shift": 32, "damping": 1.0},
}
PATTERN_SIZE = 128  # pixels: the canvas is the cell of the sheet
PATTERN_STEPS = 30  # by then the pictures are strong; more steps only drive colours into black and white
PATTERN_RATE = 0.3
PATTERN_STARTS = 3  # a blank image, then noise for the filters that did not fire
SHORTEST_WAVELENGTH = 4  # pixels: without shorter waves the answer hardly drops, and the speckle is gone
FILTERS_AT_ONCE = 16  # more are no faster on a CPU and take more memory

# Square root of the colour correlation of ImageNet's photos, published with Lucid: rows are red, green and blue,
# columns are brightness, blue to yellow and green to magenta. Scaled to the length of the first column, and the last
# two 2.5 times as strong as in photos, where patterns come out muted.
COLOUR_CORRELATION_ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], "float32")
COLOURS = COLOUR_CORRELATION_ROOT / np.linalg.norm(COLOUR_CORRELATION_ROOT[:, 0]) * np.array([1, 2.5, 2.5], "float32")


def fourier_basis(size, longest_wavelength):
    """The waves of a real Fourier transform, (waves, size), and the 1/f scale of their coefficients, (waves, waves).

    The waves cos + sin of positive and negative frequencies (Hartley, 1942) span what complex Fourier waves span, with
    real coefficients; two small matrix products then cost less than a fast transform, which keeps all frequencies.
    """
    cycles = np.fft.fftfreq(size, 1 / size)
    cycles = cycles[np.abs(cycles) <= size / SHORTEST_WAVELENGTH]
    angle = 2 * np.pi * np.outer(cycles, np.arange(size)) / size
    frequency = np.maximum(np.hypot(cycles[:, None], cycles), size / longest_wavelength)
    return (np.cos(angle) + np.sin(angle)).astype("float32"), (1 / frequency).astype("float32")


def fourier_to_image(coefficients, waves, scale):
    """Coefficients (n, 3, waves, waves) of independent colours as RGB images (n, size, size, 3), 0–255.

    The sigmoid keeps each value in range, so that the picture shown is exactly the one that the network was given.
    """
    planes = tf.matmul(waves, tf.matmul(scale * coefficients, waves), transpose_a=True)  # (n, 3, size, size)
    return 255 * tf.sigmoid(tf.einsum("ncyx,rc->nyxr", planes, COLOURS))


def cut_network(network, layer_names):
    """The flat network cut after the named layers, for images of any size; it shares the network's weights."""
    cut = keras.Model(network.inputs, [network.get_layer(name).output for name in layer_names])
    any_size = keras.Input((None, None, 3))
    return keras.models.clone_model(cut, input_tensors=[any_size], clone_function=lambda layer: layer)


def ascent_function(cut, waves, scale, damping):
    """A function that climbs to images which raise the mean of their own filter in the first output of the cut network.

    It takes coefficients (n, 3, waves, waves), filters (n,) and one shift (down, right) a step, and returns the
    coefficients at the top. All that varies is a tensor of a declared shape, so that it is traced once.
    """
    shapes = [
        tf.TensorSpec((None, 3, *scale.shape)),
        tf.TensorSpec((None,), tf.int32),
        tf.TensorSpec((None, 2), tf.int32),
    ]

    @tf.function(input_signature=shapes)
    def climb(coefficients, filters, shifts):
        mean, variance, step = tf.zeros_like(coefficients), tf.zeros_like(coefficients), 0.0
        for shift in shifts:
            with tf.GradientTape() as tape:
                tape.watch(coefficients)
                # Waves close up at the edges, so that an image may be rolled: no pixel stays at the edge, and only
                # what fires at any place survives (without the shifts the climb ends in coloured noise).
                images = tf.roll(fourier_to_image(coefficients, waves, scale), shift, axis=(1, 2))
                answers = cut([images], training=False)[0]
                # The sum over the images leaves each its own gradient: none has a part in another's answer.
                own = tf.reduce_sum(tf.gather(tf.reduce_mean(answers, (1, 2)), filters, axis=1, batch_dims=1))
            gradient = tape.gradient(own, coefficients)
            # Adam (Kingma and Ba, 2015) with two changes. The rate rises from 0: on a blank image only the edges have
            # a gradient, and at full rate the first steps would print them into the pattern. And damping adds the
            # image's mean variance to each wave's own: Adam moves waves that hardly matter as fast as all others.
            step += 1.0
            mean = 0.9 * mean + 0.1 * gradient
            variance = 0.999 * variance + 0.001 * gradient**2
            damped = variance + damping * tf.reduce_mean(variance, (1, 2, 3), keepdims=True)
            rate = PATTERN_RATE * step / tf.cast(tf.shape(shifts)[0], tf.float32)
            coefficients += rate * mean / (1 - 0.9**step) / (tf.sqrt(damped / (1 - 0.999**step)) + 1e-12)
        return coefficients

    climb.get_concrete_function()  # traced now: two threads that call it at once would each trace it
    return climb


def filter_patterns(network, convolution, relu, filters, longest_wavelength, shift, damping, seed=0):
    """Pictures that fire the filters of a convolution, and whether they do: (n, size, size, 3) uint8, (n,) booleans.

    They climb together, on the convolution's own answer before BatchNormalization and ReLU: a dead ReLU passes no
    gradient. A filter fires if the ReLU that follows is above 0 anywhere on its finished 8-bit picture; one that does
    not is started again from noise.
    """
    filters, rng = np.asarray(filters, "int32"), np.random.default_rng(seed)
    cut = cut_network(network, [convolution, relu])
    waves, scale = fourier_basis(PATTERN_SIZE, longest_wavelength)
    climb = ascent_function(cut, waves, scale, damping)
    pictures, fires = np.zeros((len(filters), PATTERN_SIZE, PATTERN_SIZE, 3), "uint8"), np.zeros(len(filters), bool)
    for start in range(PATTERN_STARTS):
        silent = np.flatnonzero(~fires)
        pieces = [silent[first : first + FILTERS_AT_ONCE] for first in range(0, len(silent), FILTERS_AT_ONCE)]
        beginnings = []
        for piece in pieces:
            noise = rng.normal(scale=0.5, size=(len(piece), 3, *scale.shape)).astype("float32")
            shifts = rng.integers(-shift, shift, (PATTERN_STEPS, 2), dtype="int32", endpoint=True)
            beginnings.append((noise if start else np.zeros_like(noise), filters[piece], shifts))
        with ThreadPoolExecutor(2) as pool:  # one piece alone leaves cores idle
            climbs = pool.map(climb, *zip(*beginnings, strict=True))
        for piece, coefficients in zip(pieces, climbs, strict=True):
            pictures[piece] = np.rint(fourier_to_image(coefficients, waves, scale))
            peaks = np.max(cut([pictures[piece].astype("float32")], training=False)[1], axis=(1, 2))  # (n, channels)
            fires[piece] = peaks[np.arange(len(piece)), filters[piece]] > 0
    return pictures, fires


def framed(pictures, fires):
    """The (n, h, w, 3) pictures in thin frames: grey where the filter fires, red where it never fired."""
    frames = np.where(fires[:, None, None, None], 120, np.array([200, 50, 50])).astype("uint8")
    framed = np.broadcast_to(frames, (len(pictures), *(side + 4 for side in pictures.shape[1:3]), 3)).copy()
    framed[:, 2:-2, 2:-2] = pictures
    return framed


def pattern_sheet(network, number, seed):
    """Titled sheet of the patterns of the first 64 filters of a convolution, counted from 1: uint8 RGB, 8 in a row."""
    convolution = in_creation_order(network, layers.Conv2D)[number - 1]
    relu = in_creation_order(network, layers.Activation)[number - 1]
    filters = range(min(64, convolution.filters))
    pictures, fires = filter_patterns(
        network, convolution.name, relu.name, filters, **PATTERN_CLIMBS[number], seed=seed
    )
    silent = f"{(~fires).sum()} never fired from any of {PATTERN_STARTS} starts (red frame)"
    title = f"{convolution.name}: what filters 0 to {len(filters) - 1} of {convolution.filters} look for, row by row; "
    return with_title(tile(framed(pictures, fires), columns=8), title + ("all of them fire" if fires.all() else silent))


# ---- 7. Heatmaps: where the network found its class ------------------------------------------------------------------
#
# Grad-CAM asks how much each channel of a layer raises the logit of a class (the mean of its gradient), and adds up the
# channels' maps with these weights: where the sum is positive, there is evidence for the class. It takes the logit, as
# the softmax is flat, and its gradient nothing, where the network is sure.


def class_evidence(model, photo, layer_names, class_indices):
    """Grad-CAM maps of some layers, in the order of the graph, for some classes: a list of (classes, h, w) floats >= 0.

    All of the model's paths must meet in the first layer: up to it the photo is taken through the model but once.
    """
    size = model.input_shape[1] or len(photo)
    if photo.shape[:2] != (size, size):
        photo = resize_photo(np.asarray(photo, "uint8"), size)
    below, above = evidence_probes(model, tuple(layer_names))
    first_answer = tf.repeat(below(np.asarray(photo, "float32")[None]), len(class_indices), axis=0)
    with tf.GradientTape() as tape:
        tape.watch(first_answer)
        *answers, logits = tf.nest.flatten(above(first_answer))  # a lone output comes without a list
        # The sum leaves each copy of the answers the gradient of its own class alone.
        own = tf.reduce_sum(tf.gather(logits, class_indices, axis=1, batch_dims=1))
    answers = [first_answer, *answers]
    channel_weights = (tf.reduce_mean(gradient, (1, 2), keepdims=True) for gradient in tape.gradient(own, answers))
    return [np.maximum(0, tf.reduce_sum(a * w, -1)) for a, w in zip(answers, channel_weights, strict=True)]


@lru_cache(maxsize=2)  # to build them takes as long as to run them
def evidence_probes(model, layer_names):
    """The model up to the first of the layers, and from there to the answers of the others and the logits."""
    first, *others = (model.get_layer(name).output for name in layer_names)
    return keras.Model(model.input, first), keras.Model(first, [*others, logits_of(model)])


def logits_of(model):
    """The symbolic tensor that the softmax at the model's end is taken of."""
    head = model.layers[-1]
    if getattr(head, "activation", None) is not keras.activations.softmax:
        return model.output
    if not isinstance(head, layers.Dense):
        return head.input
    linear = layers.Dense(head.units, use_bias=head.use_bias, name=f"{head.name}_logits")
    logits = linear(head.input)
    linear.set_weights(head.get_weights())
    return logits


def grad_cam(model, photo, layer_name, class_index):
    """Grad-CAM (Selvaraju et al., 2017): the ReLU of a layer's channels, weighted by their mean gradient of the logit.

    photo: one (height, width, 3) RGB photo, 0–255, squeezed to the model's input where its size differs. Returns the
    (h, w) float map of the layer, not scaled, not enlarged; 0 everywhere where nothing speaks for the class.
    """
    return class_evidence(model, photo, [layer_name], [class_index])[0][0]


def cell_geometry(model, layer_name):
    """Where the cells of a layer look: (first, step), the input pixel at the centre of cell 0 and the cells' distance.

    InceptionV3 does not pad its strided layers: the 8 × 8 cells of mixed10 look at the pixels 37, 69, … 261 of 299. A
    heatmap that is just stretched over the photo lies up to 19 pixels beside them.
    """
    chain = [model.get_layer(layer_name)]
    while not isinstance(chain[-1], layers.InputLayer):
        tensor = chain[-1].input[0] if isinstance(chain[-1].input, list) else chain[-1].input
        chain.append(tensor._keras_history.operation)
    first, step = 0.0, 1
    for layer in reversed(chain):
        if hasattr(layer, "strides"):
            kernel = getattr(layer, "kernel_size", None) or layer.pool_size
            inputs, outputs, stride = layer.input.shape[1], layer.output.shape[1], layer.strides[0]
            padding = max((outputs - 1) * stride + kernel[0] - inputs, 0) // 2
            first += step * ((kernel[0] - 1) / 2 - padding)
            step *= stride
    return first, step


def enlarge(heatmap, shape, geometry, input_size, interpolated=True):
    """Lays an (h, w) heatmap over a photo of a (height, width): interpolated, or as the cells that it is made of.

    Each cell's value lies where the cell looks (see cell_geometry); beyond the outermost centres it stays the same.
    """
    first, step = geometry
    weights = []
    for length, cells in zip(shape, heatmap.shape, strict=True):
        pixel = (np.arange(length) + 0.5) * input_size / length - 0.5
        cell = np.clip((pixel - first) / step, 0, cells - 1)
        cell = cell if interpolated else np.round(cell)
        weights.append(np.maximum(0, 1 - np.abs(cell[:, None] - np.arange(cells))))
    return weights[0] @ heatmap @ weights[1].T


def on_photo(network, layer_name, heatmap, shape, interpolated=True):
    """Lays a heatmap of one of the network's layers over a photo of a (height, width)."""
    return enlarge(heatmap, shape, cell_geometry(network, layer_name), network.input_shape[1], interpolated)


def colour(evidence, peak, signed=False):
    """(h, w) evidence as (h, w, 3) uint8 on a scale from 0, or from -peak, to peak; all 0 where peak is 0."""
    share = np.clip(evidence / (peak or 1), -1, 1)
    scale, place = ("coolwarm", 0.5 + share / 2) if signed else ("turbo", share)
    return (255 * matplotlib.colormaps[scale](place)[..., :3]).astype("uint8")


def overlay(photo, evidence, peak, signed=False):
    """The (h, w, 3) photo under its heatmap: the more evidence, the more of its colour; without evidence, bare."""
    strength = 0.7 * np.clip(np.abs(evidence) / (peak or 1), 0, 1)[..., None]
    return (photo * (1 - strength) + colour(evidence, peak, signed) * strength).astype("uint8")


def with_scale(picture, peak, label, signed=False):
    """The (h, w, 3) picture above its colour scale from 0 (no evidence), or from -peak, to peak."""
    ramp = np.linspace(-peak if signed else 0, peak, picture.shape[1])
    bar = colour(np.tile(ramp, (max(8, picture.shape[1] // 90), 1)), peak, signed)
    ends = f"{-peak:.2g} at the left, 0 (no evidence) in the middle" if signed else "0 (no evidence) at the left"
    return np.concatenate([picture, with_title(bar, f"{label}: {ends}, {peak:.2g} at the right")])


def most_marked(heatmap, fraction):
    """Boolean mask of the given fraction of an (h, w) heatmap's pixels: those with the highest values."""
    mask = np.zeros(heatmap.size, bool)
    mask[np.argsort(-heatmap, axis=None, kind="stable")[: round(fraction * heatmap.size)]] = True
    return mask.reshape(heatmap.shape)


def centred_blob(size, fraction):
    """Boolean mask of a disc in the middle of a (size, size) photo: a heatmap's simplest rival."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return most_marked(-np.hypot(y, x), fraction)


def deletion(model, photo, masks):
    """Probabilities (1 + masks, classes) of a (size, size, 3) photo as it is, and with each mask's pixels blurred away.

    One step of the deletion game of RISE (Petsiuk et al., 2018): a heatmap is worth something if the probability falls
    further without the part that it marks than without as large a part that anyone would have guessed.
    """
    blurred = cv2.GaussianBlur(photo.astype("float32"), (0, 0), len(photo) / 12)
    return class_probabilities(model, [photo, *(np.where(mask[..., None], blurred, photo) for mask in masks)])


def class_probabilities(model, photos):
    """(n, classes) for a few (size, size, 3) photos; called as it is, a network needs no tracing as in predict."""
    return np.asarray(model(np.stack(photos).astype("float32"), training=False))


def explain_photo(path, name, size, probabilities, class_names, true=None):
    """A photo as decoded and as the network sees it, and what the network makes of it.

    Its target, the class whose evidence is shown, is the true class, or the predicted one where the true is not known;
    its rival is the most probable of the others.
    """
    predicted, second = np.argsort(-probabilities)[:2].tolist()
    target = predicted if true is None else int(true)
    rival = second if predicted == target else predicted
    shares = {"predicted": predicted} | ({} if true is None else {"true": true})
    return SimpleNamespace(
        name=name,
        photo=read_photo(path),  # (height, width, 3) uint8
        pixels=network_input(path, size),  # (size, size, 3) uint8
        probabilities=probabilities,  # (classes,)
        verdict=", ".join(f"{word} {class_names[k]} {probabilities[k]:.2f}" for word, k in shares.items()),
        target=target,
        rival=rival,
        target_name=class_names[target],
        rival_name=class_names[rival],
    )


def trust(network, explained, heatmap):
    """Probabilities of the target: of the photo, without its fifth that the heatmap marks, without a centred fifth."""
    size = len(explained.pixels)
    marked = most_marked(on_photo(network, HEATMAP_LAYER, heatmap, (size, size)), DELETED_FRACTION)
    return deletion(network, explained.pixels, [marked, centred_blob(size, DELETED_FRACTION)])[:, explained.target]


def heatmap_panels(network, explained, heatmap):
    """Photo, heatmap with its true cells, and overlay, side by side at the photo's own resolution: uint8 RGB."""
    photo, target, peak = explained.photo, explained.target_name, heatmap.max()
    cells = colour(on_photo(network, HEATMAP_LAYER, heatmap, photo.shape[:2], interpolated=False), peak)
    smooth = overlay(photo, on_photo(network, HEATMAP_LAYER, heatmap, photo.shape[:2]), peak)
    worth = f"No evidence for {target}: the heatmap is empty."
    if peak > 0:
        before, unmarked, uncentred = trust(network, explained, heatmap)
        worth = f"Most marked fifth blurred: {target} {before:.2f} → {unmarked:.2f}; centred fifth: → {uncentred:.2f}"
    sheet = with_title(tile(np.stack([photo, cells, smooth]), 3), f"{explained.name}: {explained.verdict}\n{worth}")
    return with_scale(sheet, peak, f"Evidence for {target} in {HEATMAP_LAYER}")


def layer_panels(network, explained):
    """One photo through mixed0 … mixed10, the evidence of each block as a share of its own peak: uint8 RGB."""
    view = resize_photo(explained.photo, PANEL_SIZE)
    panels = [with_title(view, explained.verdict)]
    evidence = class_evidence(network, explained.pixels, BLOCKS, [explained.target])
    for name, (heatmap,) in zip(BLOCKS, evidence, strict=True):
        strength = f"peak {heatmap.max():.2g}" if heatmap.any() else "no evidence"
        marked = overlay(view, on_photo(network, name, heatmap, view.shape[:2]), heatmap.max())
        panels.append(with_title(marked, f"{name}, {len(heatmap)} × {len(heatmap)} cells, {strength}"))
    title = f"Evidence for {explained.target_name} in {explained.name}, block by block"
    return with_scale(with_title(tile(np.stack(panels), 4, gap=6), title), 1.0, "Share of the block's peak")


def compared_evidence(model, photo, layer_name, one_class, other_class):
    """(3, h, w): the evidence for one class, for the other, and one minus other, positive where one has more."""
    ((one, other),) = class_evidence(model, photo, [layer_name], [one_class, other_class])
    return np.stack([one, other, one - other])


def mistake_panels(network, mistakes):
    """For each photo the evidence for the rival and for the true class, and their difference, all on one scale."""
    maps = [compared_evidence(network, e.pixels, HEATMAP_LAYER, e.rival, e.target) for e in mistakes]
    peak, panels = np.abs(maps).max(), []
    for explained, triple in zip(mistakes, maps, strict=True):
        rival, true = explained.rival_name, explained.target_name
        view = resize_photo(explained.photo, PANEL_SIZE)
        grey = np.repeat(view.mean(2, keepdims=True) / 2 + 60, 3, axis=2)  # colour tells of the evidence alone
        panels.append(with_title(view, explained.verdict))
        for evidence, caption in zip(triple, (f"for {rival}", f"for {true}", f"{rival} minus {true}"), strict=True):
            enlarged = on_photo(network, HEATMAP_LAYER, evidence, view.shape[:2])
            caption += "" if evidence.any() else ": no evidence"
            panels.append(with_title(overlay(grey, enlarged, peak, signed=True), caption))
    title = f"What misled the network: evidence in {HEATMAP_LAYER} for the class it leans to, and for the true class"
    return with_scale(with_title(tile(np.stack(panels), 4, gap=6), title), peak, "Evidence", signed=True)


def save_heatmap_grid(path, heatmap, title):
    """Draws the raw scores of an (h, w) heatmap with its axes; 0 is no evidence."""
    shares = heatmap / (heatmap.max() or 1)
    axes = axes_of_numbers(heatmap, shares, "turbo", white=np.abs(shares - 0.5) > 0.25)
    axes.set(title=title, xlabel="column", ylabel="row", xticks=range(heatmap.shape[1]), yticks=range(len(heatmap)))
    save_figure(path, axes.figure)


# ---- 8. Gallery: the run as one page ---------------------------------------------------------------------------------
#
# Each draw_* function writes its pictures and returns {file: caption}, from which the page is made.


def draw_grids(output, network, explained):
    save_picture(output / "OriginalImage.jpeg", explained.photo)
    save_relu(output / "ReLU.png")
    pictures = {"OriginalImage.jpeg": f"The photo, {explained.name}", "ReLU.png": "ReLU keeps what is positive"}
    layer_of = {}
    for number in GRID_CONVOLUTIONS:
        layer_of[f"conv2d_{number}_grid.jpg"] = in_creation_order(network, layers.Conv2D)[number - 1].name
        layer_of[f"activation_{number}_grid.jpg"] = in_creation_order(network, layers.Activation)[number - 1].name
    answers = activations(network, explained.pixels, layer_of.values())
    for (file, name), answer in zip(layer_of.items(), answers, strict=True):
        save_picture(output / file, activation_grid(answer, name, explained.name))
        pictures[file] = f"{name}: {answer.shape[2]} channels, one a cell"
    return pictures


def draw_patterns(output, network, seed):
    pictures = {}
    for number in PATTERN_CLIMBS:
        save_picture(output / f"conv2d_{number}_filters.jpg", pattern_sheet(network, number, seed))
        pictures[f"conv2d_{number}_filters.jpg"] = f"What the filters of convolution {number} look for"
    return pictures


def draw_heatmaps(output, network, photos):
    pictures = {}
    for number, explained in enumerate(photos, start=1):
        heatmap = grad_cam(network, explained.pixels, HEATMAP_LAYER, explained.target)
        save_picture(output / f"CAM_{number}.jpeg", heatmap_panels(network, explained, heatmap))
        save_heatmap_grid(output / f"heatmap_{number}.jpg", heatmap, f"{explained.target_name} in {explained.name}")
        pictures[f"CAM_{number}.jpeg"] = f"{explained.name}: {explained.verdict}"
        pictures[f"heatmap_{number}.jpg"] = f"Heatmap {number} as its raw grid of scores"
    save_picture(output / "CAM_layers.jpg", layer_panels(network, photos[0]))
    pictures["CAM_layers.jpg"] = f"{photos[0].name} through all blocks of the network"
    return pictures


def draw_mistakes(output, network, photos, confusions, class_names):
    save_picture(output / "CAM_mistakes.jpg", mistake_panels(network, photos))
    save_confusion_matrix(output / "confusion_matrix.png", confusions, class_names)
    return {
        "CAM_mistakes.jpg": "Evidence for the class that it leans to, for the true class, and their difference",
        "confusion_matrix.png": "How often each true class (row) is taken for each class (column)",
    }


def draw_strip(output, network, explained):
    """The run at a glance, cut in part from the sheets that stand in the folder."""
    grid, patterns = GRID_CONVOLUTIONS[len(GRID_CONVOLUTIONS) // 2], min(PATTERN_CLIMBS)
    sheets = (output / f"activation_{grid}_grid.jpg", output / f"conv2d_{patterns}_filters.jpg")
    corners = [resize_photo(np.asarray(Image.open(sheet))[-400:, :400], 400) for sheet in sheets]
    view = resize_photo(explained.photo, 400)
    heatmap = grad_cam(network, explained.pixels, HEATMAP_LAYER, explained.target)
    marked = overlay(view, on_photo(network, HEATMAP_LAYER, heatmap, view.shape[:2]), heatmap.max())
    save_picture(output / "strip.jpg", tile(np.stack([view, *corners, marked]), 4, gap=6))
    return {"strip.jpg": "A photo, what a layer answers, what filters look for, where the network looks"}


GALLERY_STYLE = """
:root { color-scheme: light dark; --quiet: #777; --line: #8884; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.55 system-ui, sans-serif; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
figcaption { color: var(--quiet); overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: 0.8rem; border: 1px solid var(--line); border-radius: 6px; }
dl { display: grid; grid-template-columns: 10rem 1fr; margin: 0.2rem 0; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def gallery_section(heading, text="", pictures=None, table=None):
    """A part of the page: its pictures {file: caption}, each a link to itself, and its table {name: value}."""
    parts = [f"<h2>{html.escape(heading)}</h2>\n<p>{html.escape(text)}</p>"]
    for file, caption in (pictures or {}).items():
        caption = html.escape(caption)
        image = f'<a href="{file}"><img src="{file}" alt="{caption}" loading="lazy"></a>'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    for name, value in (table or {}).items():
        parts.append(f"<dl><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></dl>")
    return "\n".join(parts)


def gallery_page(sections, command):
    """One HTML page that needs nothing from elsewhere."""
    sections = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>What a convolutional network sees</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{GALLERY_STYLE}</style>
</head>
<body>
<h1>What a convolutional network sees</h1>
{sections}
<h2>The command</h2>
<pre>{html.escape(command)}</pre>
</body>
</html>
"""


# ---- The run ---------------------------------------------------------------------------------------------------------


def parse_options():
    parser = argparse.ArgumentParser(
        description="Fine-tune InceptionV3 on split photos, then draw what it sees.",
        usage="python model_training_and_visualization.py [options], --help for all",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, folder, blocks = parser.add_argument, {"type": Path, "metavar": "DIR"}, ["none", *BLOCKS]
    add("--data", **folder, default=".", help="the folder that holds train, validation and test")
    add("--output", **folder, default="Images", help="where the pictures go")
    add("--model", type=Path, default="inceptionv3.keras", metavar="FILE", help="the network: saved, or drawn from")
    add("--skip-training", action="store_true", help="draw from the network in --model")
    add("--photos", type=Path, nargs="+", metavar="PHOTO", help="own photos to explain; the first feeds the grids")
    add("--weights", default="imagenet", metavar="START", help="imagenet, none (from scratch), weights or model file")
    add("--epochs", type=int, default=10, metavar="N", help="epochs of all phases together")
    add("--batch-size", type=int, default=32, metavar="N", help="photos in a step")
    add("--image-size", type=int, default=299, metavar="N", help="side of the network's square input")
    add("--freeze-below", default="mixed7", choices=blocks, metavar="BLOCK", help="fine-tune from it up; none: all")
    add("--learning-rate", type=float, metavar="RATE", help="peak; else 2e-4, from scratch 5e-4")
    add("--mixed-precision", action="store_true", help="compute in half precision where the machine can")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result")
    options = parser.parse_args()
    for name, least in {"epochs": 1, "batch_size": 1, "image_size": 75, "seed": 0, "learning_rate": 1e-9}.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be {least} or more, not {value}")
    if options.model.suffix != ".keras":
        parser.error(f"argument --model: the name must end in .keras, not {options.model}")
    return options


def require_writable(folder):
    """Raises Stop if no file can be written to the folder, or to where it would be made."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise Stop(f"{folder}: cannot be written to ({error.strerror}). Choose another place.") from error


def train_and_save(options, splits, backup_folder):
    """Trains, and saves the network of the best epoch: (network, {"history", "classes", "settings"})."""
    class_count = splits["train"].num_classes
    phases = training_phases(options.epochs, options.weights, options.freeze_below, options.learning_rate)
    apart = ("data", "output", "model", "skip_training", "photos", "resume")  # a run may go on with others of these
    settings = {name: value for name, value in vars(options).items() if name not in apart}
    settings["photos"] = {name: photos.n for name, photos in splits.items()}
    settings["phases"] = {phase.name: phase.last - phase.first for phase in phases}
    backup = EpochBackup(backup_folder, settings)
    if (state := read_json(backup_folder / "state.json")) and not options.resume:
        print(f"An interrupted run stands in {backup_folder} after epoch {len(state['history']['loss'])}.")
        print(
            "Ctrl-C now, and --resume goes on with it; this new run replaces it after its own first epoch.", flush=True
        )
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(training_policy(options.mixed_precision))
    with training_strategy().scope():
        network = build_network(class_count, options.image_size, options.weights)
        if options.resume:
            backup.resume(network)
        train(network, splits, phases, backup)
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session()  # so that the names of the layers count from the start again
    network = build_network(class_count, options.image_size, "none")
    network.load_weights(backup.weights_file(backup.best_epoch))
    options.model.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_whole(options.model) as partial:
        network.save(partial)
    return network, {"history": backup.history, "classes": list(splits["train"].class_indices), "settings": settings}


def draw_all(options, network, test, probabilities, record):
    """Writes all pictures and the page that shows them; returns the path of the page."""
    names, confusions = list(test.class_indices), confusion_matrix(probabilities, test.classes)
    size, own = network.input_shape[1], options.photos or []
    chosen = [
        explain_photo(test.filepaths[k], test.filenames[k], size, probabilities[k], names, true=test.classes[k])
        for k in telling_photos(probabilities, test.classes)[:4]
    ]
    own_probabilities = (class_probabilities(network, [network_input(path, size)])[0] for path in own)
    explained = [explain_photo(path, path.name, size, p, names) for path, p in zip(own, own_probabilities, strict=True)]
    explained = explained or chosen[:3]
    output, first = options.output, explained[0]
    output.mkdir(parents=True, exist_ok=True)
    taken_for = sorted(zip(first.probabilities, names, strict=True), reverse=True)
    sections = [gallery_section(f"What it takes {first.name} for", table={k: f"{share:.3f}" for share, k in taken_for})]
    text = "Each cell is the answer of one filter to the photo, ever coarser."
    sections.append(gallery_section("What the layers answer", text, draw_grids(output, network, first)))
    text = "Each cell began blank and changed until its filter fired."
    sections.append(gallery_section("What the filters look for", text, draw_patterns(output, network, options.seed)))
    text = "Grad-CAM marks what speaks for a class; each title tells how far the probability falls without it."
    sections.append(gallery_section("Where the network looks", text, draw_heatmaps(output, network, explained)))
    pictures = draw_mistakes(output, network, chosen[1:], confusions, names)
    sections.append(gallery_section("What it gets wrong", most_confused(confusions, names), pictures))
    figures = loss_and_accuracy(probabilities, test.classes)
    sections.append(gallery_section("How well it does on the test photos", table=figures))
    if record:
        save_training_curves(output / "training_curves.png", record["history"], record["settings"]["phases"])
        pictures = {"training_curves.png": "Loss and accuracy after each epoch; the red one is kept, tested and drawn"}
        sections.append(gallery_section("How it learnt", "", pictures, record["settings"]))
    sections.insert(0, gallery_section("At a glance", pictures=draw_strip(output, network, first)))
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    with replace_when_whole(output / "index.html") as partial:
        partial.write_text(gallery_page(sections, command), "utf-8")
    return output / "index.html"


def main():
    options = parse_options()
    keras.config.disable_interactive_logging()
    require_writable(options.output)
    try:
        for path in options.photos or []:
            read_photo(path)
    except Stop as stop:
        raise Stop(f"--photos {stop}.\nName another photo.") from stop
    record_file = options.model.with_name(f"{options.model.stem}_history.json")
    backup_folder = options.model.with_name(f"{options.model.stem}_backup")
    sizes = {"size": options.image_size, "batch_size": options.batch_size, "seed": options.seed}
    if options.skip_training:
        network = load_network(options.model, len(split_classes(options.data, "test")))
        test = open_splits(options.data, ["test"], **sizes | {"size": network.input_shape[1]})["test"]
        record = read_json(record_file)
    else:
        require_writable(options.model.parent)
        splits = open_splits(options.data, ["train", "validation", "test"], **sizes)
        network, record = train_and_save(options, splits, backup_folder)
        test = splits["test"]
    probabilities = network.predict(test, verbose=0)
    figures = loss_and_accuracy(probabilities, test.classes)
    confusions, class_names = confusion_matrix(probabilities, test.classes), list(test.class_indices)
    print(f"\nTest: loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.4f}")
    print(*precision_and_recall(confusions, class_names), most_confused(confusions, class_names) + "\n", sep="\n")
    if not options.skip_training:
        write_json(record_file, record | {"test": figures})
        shutil.rmtree(backup_folder)
    page = draw_all(options, network, test, probabilities, record)
    print(f"\nAll pictures on one page: {page}")


if __name__ == "__main__":
    run(main)

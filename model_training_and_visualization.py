"""See what a convolutional network sees: fine-tune InceptionV3 on photos, then draw what it learnt.

    python create_train_val_test.py flowers
    python model_training_and_visualization.py

The chapter follows a run: 1 photos, 2 model, 3 training, 4 evaluation, 5 activation grids, 6 filter
patterns, 7 what fires a filter, 8 Grad-CAM heatmaps, 9 concepts, 10 everything drawn. The workshop
behind it holds the tools, and may be skipped. Four techniques work on their own, for any functional
or Sequential Keras classifier that takes 0–255 RGB (or the Network of another), and return arrays:

    activation_grid(model, photo, "conv2d_3")
    filter_patterns(model, "conv2d_39", range(64))
    grad_cam(model, photo, "mixed10", class_index=2)
    concepts(model, photos)
"""

import argparse
import base64
import contextlib
import csv
import hashlib
import http.client
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from create_train_val_test import (
    BUILDING,
    SPLITS,
    Stop,
    beside_this_script,
    class_folders,
    cores,
    is_hidden,
    is_photo,
    locked,
    map_photos,
    pasteable,
    printable,
    read_photo,
    replace_when_whole,
    run,
)

# ---- Settings: what a reader of this study would change ------------------------------------------

AUGMENTATION = {
    "rotation_range": 20,  # degrees either way
    "width_shift_range": 0.2,  # of the side, either way
    "height_shift_range": 0.2,
    "horizontal_flip": True,
}
DEFAULTS = {
    "weights": "imagenet",
    "image_size": 299,
    "batch_size": 32,
    "epochs": 10,
    "mixed_precision": False,
}
# --quick: at 235 pixels a heatmap has 6 × 6 positions; with 5 × 5 of them, at 203 pixels, it was no
# better than a guess at the middle of the photo. From scratch it takes more epochs.
QUICK = DEFAULTS | {"image_size": 235, "batch_size": 16, "epochs": 2}
QUICK_FROM_SCRATCH = QUICK | {"weights": "none", "image_size": 139, "epochs": 8}
# In the order of the graph, counted from 1; Keras's names count from 0: the 4th is conv2d_3.
GRID_CONVOLUTIONS = (1, 4, 9)
PATTERN_CONVOLUTIONS = (3, 8, 40)
EXAMPLE_CONVOLUTIONS = (8, 40)  # of those with patterns: shown beside the photos that fire them
DELETED_FRACTION = 0.2  # of a photo, blurred away for its heatmap's deletion score


def main(options, build=None, **pattern_settings):
    """Train a model or load one, evaluate it, and draw what it sees.

    build: makes the model to be trained, in place of build_model, with InceptionV3's names of
    blocks. pattern_settings: see draw_survey.
    """
    prepare_libraries()
    tell_of_unused_gpu(tf.config.list_physical_devices("GPU"))
    require_writable(options.output)
    require_photos(options.photos)
    if options.skip_training:
        model, class_names, test, record = open_saved(options)
    else:
        model, class_names, test, record = train_and_save(options, build or build_model)
    try:
        photos, labels = photos_and_labels(options.photos, test)
        read = test.read if test else None
        network, seed = network_of(model), options.seed
        survey = survey_photos(network, photos, labels, class_names, read, seed)
        if options.skip_training:
            warn_of_pixels(survey, printable(options.model.name), "--pixels {}")
        report(survey, options)
        command = pasteable("python", *without_folders(sys.argv))
        training = training_photos(options.data / "train", class_names)
        settings = {"seed": seed, "training": training} | pattern_settings
        draw_survey(survey, options.output, record, command, **settings)
    except KeyboardInterrupt:
        print(f"\nThe model is saved in {printable(options.model)}; --skip-training draws it.")
        raise
    page = (options.output / "index.html").resolve().as_uri()
    print(f"\nAll pictures on one page: {page}")


# ---- Options, which are read before TensorFlow loads: --help need not wait for seconds -----------

BLOCKS = [f"mixed{number}" for number in range(11)]  # InceptionV3's, from the photo to the classes
# What a model can take for a photo's 0–255; the last three are the modes of Keras's
# preprocess_input: −1 to 1, BGR less ImageNet's mean, and normalized by its mean and deviation.
PIXELS = ("0..255", "0..1", "tf", "caffe", "torch")
PIXELS_OF_COLOURS = ("caffe", "torch")  # which a model of grey photos cannot take


def parse_options(words=None):
    """The options of the command line, or of these words. Ends the process where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Fine-tune InceptionV3 on split photos, then draw what it sees.",
        usage="python model_training_and_visualization.py [options], --help for all",
    )
    add = parser.add_argument
    folder, number = {"type": Path, "metavar": "DIR"}, {"type": int, "metavar": "N"}
    add("--data", **folder, default=".", help="holds train, validation and test (default: here)")
    add("--output", **folder, default="Images", help="where the pictures go (default: Images)")
    add(
        "--model",
        type=Path,
        default="inceptionv3.keras",
        metavar="FILE",
        help="where the model is saved, or drawn from (default: inceptionv3.keras)",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--quick",
        action="store_true",
        help="a first look in minutes: smaller photos, fewer epochs, from scratch where ImageNet's "
        "weights cannot be had",
    )
    way.add_argument(
        "--skip-training", action="store_true", help="draw from the saved model in --model"
    )
    add(
        "--pixels",
        default=PIXELS[0],
        choices=PIXELS,
        help="what the saved model was trained on: 0..255, 0..1, or a mode of Keras's "
        "preprocess_input, where tf is -1..1 (default: 0..255)",
    )
    add(
        "--photos",
        type=Path,
        nargs="+",
        default=[],
        metavar="PHOTO",
        help="own photos to explain; the first one feeds the activation grids",
    )
    add(
        "--weights",
        metavar="START",
        help="imagenet, none (from scratch), or a file of weights or a model (default: imagenet)",
    )
    add("--epochs", **number, help="of all phases (default: 10)")
    add("--batch-size", **number, help="photos a step (default: 32)")
    add(
        "--image-size",
        **number,
        help="side of the model's square input, if the model leaves it open (default: 299)",
    )
    add(
        "--freeze-below",
        default="mixed2",
        choices=["none", *BLOCKS],
        metavar="BLOCK",
        help="fine-tune from this block up (default: mixed2); "
        "mixed7 takes 0.7 of the time and learns less, none (all blocks) takes 1.4 of it",
    )
    add(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="its peak, except while the head learns alone (default: 3e-4; from scratch 5e-4)",
    )
    add("--balance", action="store_true", help="let classes of unlike size weigh alike")
    half = "half precision where the machine can (default: with --quick, on a CPU with bfloat16)"
    add("--mixed-precision", action="store_true", default=None, help=half)
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--seed", **number, default=0, help="same seed, same result (default: 0)")
    options = parser.parse_args(words)
    _check_options(parser, options)
    return options if options.quick else _completed(options, DEFAULTS)


def _completed(options, settings):
    """The options, with these settings where nothing was given."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**vars(options) | settings | given)


def _check_options(parser, options):
    """End the process with exit code 2 where an option makes no sense."""
    limits = {
        "epochs": (1, math.inf),
        "batch_size": (1, math.inf),
        "image_size": (75, math.inf),
        "seed": (0, 2**32 - 1),
        "learning_rate": (1e-9, math.inf),
    }
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= min(most, sys.float_info.max):
            limit = f"from {least} to {most}" if most < math.inf else f"{least} or more"
            parser.error(f"argument --{name.replace('_', '-')}: must be {limit}, not {value}")
    if options.pixels != PIXELS[0] and not options.skip_training:
        parser.error("argument --pixels: is for a saved model; add --skip-training")
    file = printable(options.model)
    suffixes = (".keras", ".h5", ".hdf5") if options.skip_training else (".keras",)
    if options.model.suffix not in suffixes:
        parser.error(f"argument --model: the name must end in {' or '.join(suffixes)}, not {file}")
    if options.model.is_dir():
        parser.error(f"argument --model: {file} is a folder; name a file")


# TensorFlow writes these when it is loaded, whatever its settings say, and they mean nothing here.
START_UP_LINES = (
    "WARNING: All log messages before absl::InitializeLog",
    "oneDNN custom operations are on",
    "Could not find cuda drivers on your machine",
)
FILTER = """
import sys
known = [words.encode() for words in sys.argv[1:]]
for line in sys.stdin.buffer:
    if not any(words in line for words in known):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


@contextlib.contextmanager
def _without_lines(known):
    """Leave out the lines on the standard error that hold known words.

    Another process passes on the others, so that they come even if this one crashes, as TensorFlow
    does on a processor that it cannot use.
    """
    command = [sys.executable, "-I", "-S", "-c", FILTER, *known]
    # A session of its own, as Ctrl-C would end it too.
    others = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    stderr = os.dup(2)
    os.dup2(others.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        others.communicate()


@_without_lines(START_UP_LINES)
def _load_libraries():
    """Load TensorFlow, Keras and the rest. Raises Stop, saying what to change, where one fails."""
    if not os.environ.get("MPLBACKEND", "").startswith("module://"):  # that is a notebook's
        # It may name a backend that is not installed, and the import fails; files need no backend.
        os.environ.pop("MPLBACKEND", None)
    for name in ("matplotlib", "cv2", "keras", "tensorflow"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            remedy = "Install what is missing: pip install -r requirements.txt"
            raise Stop(f"{error}.\n{remedy}", 1) from error
        except (ValueError, AttributeError, TypeError) as error:
            settings = Path(os.environ.get("KERAS_HOME", "~/.keras"), "keras.json").expanduser()
            file = "matplotlibrc" if name == "matplotlib" else settings
            reason = f"{name} cannot take its settings: {printable(str(error))[:200]}"
            raise Stop(f"{printable(file)}: {reason}\nMend or remove that file.", 1) from error
    backend = sys.modules["keras"].backend.backend()
    if backend != "tensorflow":  # only where Keras was loaded before, as in a notebook
        raise Stop(f"Keras runs on {backend} here. Restart Python, and run this first.", 1)


# This code is written for Keras 3 on TensorFlow, whatever a settings file or a shell says.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_USE_LEGACY_KERAS"] = "0"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # 3: only what ends the process
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # keeps freed memory: faster ascent

if __name__ == "__main__":
    OPTIONS = run(parse_options)
    run(_load_libraries)

import cv2
import h5py
import keras
import matplotlib
import matplotlib.style
import numpy as np
import rich.progress
import scipy.sparse.linalg
import tensorflow as tf
from keras import layers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

# ---- 1. Photos: from the split folders to augmented batches --------------------------------------
# Each photo is squeezed to the square that the model takes, as 0–255 RGB. Training photos are
# turned, shifted and mirrored at random in every epoch, so that the model hardly ever meets the
# same picture twice, and learns none by heart.


def open_all_splits(data, size, batch_size, seed):
    """{"train", "validation", "test": PhotoBatches}, training photos augmented, and class names.

    size: (height, width) in pixels. Raises Stop where a split cannot be used, or the splits hold
    different classes.
    """
    read = photo_reader(size)
    opened = {}
    for name in SPLITS:
        generator = PhotoGenerator(**AUGMENTATION) if name == "train" else None
        opened[name] = open_split(data / name, size, batch_size, seed, generator, read)
    _, class_names = opened["train"]
    for name, (_, others) in opened.items():
        if others != class_names:
            different = ", ".join(map(printable, sorted(set(others) ^ set(class_names))))
            folders = f"{printable(data / 'train')} and {printable(data / name)}"
            message = f"{folders} hold different classes: {different}."
            raise Stop(f"{message}\nSplit again: {_split_command(data)}")
    return {name: batches for name, (batches, _) in opened.items()}, class_names


def open_split(folder, size, batch_size, seed=0, generator=None, read=None):
    """The photos of a split folder, as (PhotoBatches, class names).

    read: a photo_reader of this size that others share. Raises Stop where classes or their photos
    are missing, or a photo does not decode.
    """
    remedy = "Split your photos: " + _split_command(folder.parent)
    if not folder.is_dir():
        raise Stop(f"{printable(folder)}: no such folder.\n{remedy}")
    class_names = class_folders(folder)
    if len(class_names) < 2:
        raise Stop(f"{printable(folder)}: needs two class folders or more.\n{remedy}")
    paths, labels = _photos_of(folder, class_names)
    empty = [printable(name) for k, name in enumerate(class_names) if k not in labels]
    if empty:
        raise Stop(f"{printable(folder)}: no photos in {', '.join(empty)}.\n{remedy}")
    read = read or photo_reader(size)
    try:
        # All are decoded now, so that a broken one ends the run here and not in a later epoch.
        for _ in map_photos(paths, read, f"Checking {folder.name}"):
            pass
    except Stop as stop:
        raise Stop(f"{stop}\nRemove it, or split again: {_split_command(folder.parent)}") from stop
    batches = PhotoBatches(paths, labels, len(class_names), read, batch_size, generator, seed)
    return batches, class_names


def photo_reader(size, decode=read_photo):
    """A function that reads a photo as the model is to see it, and keeps it for the next time.

    size: (height, width) in pixels. decode: read_photo, or what a Network puts in its place. The
    function takes a path, returns (height, width, 3) uint8 RGB, 0–255, and raises Stop if the file
    does not decode.
    """
    height, width = size

    @lru_cache(maxsize=4000)  # about 1 GB at 299 pixels; more are decoded again in every epoch
    def read(path):
        photo = Image.fromarray(decode(path, at_least=max(height, width)))
        return np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))

    return read


class PhotoBatches(keras.utils.PyDataset):
    """Batches of photos (n, height, width, 3) float32 RGB, 0–255, and labels (n, classes) one-hot.

    read: see photo_reader. With a generator the photos are shuffled and augmented anew in every
    epoch. The same seed and epoch give the same batches, whichever worker builds them.
    """

    seeding = threading.Lock()  # Keras draws from NumPy's global generator, which workers share

    def __init__(self, paths, labels, class_count, read, batch_size, generator=None, seed=0):
        super().__init__(workers=min(8, cores()))
        self.paths, self.labels, self.class_count = paths, np.asarray(labels), class_count
        self.read, self.batch_size = read, batch_size
        self.generator, self.seed = generator, seed
        self.epoch = 0

    def __len__(self):
        return math.ceil(len(self.paths) / self.batch_size)

    def __getitem__(self, batch_index):
        order = np.arange(len(self.paths))
        if self.generator:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        start = batch_index * self.batch_size
        chosen = order[start : start + self.batch_size]
        photos = np.stack([self.photo(index) for index in chosen])
        return photos, np.eye(self.class_count, dtype="float32")[self.labels[chosen]]

    def photo(self, index):
        """One photo, augmented if there is a generator: (height, width, 3) float32, 0–255."""
        photo = self.read(self.paths[index]).astype("float32")
        if self.generator is None:
            return photo
        sequence = np.random.SeedSequence([self.seed, self.epoch, index])
        with self.seeding:
            seed = sequence.generate_state(1)[0]
            parameters = self.generator.get_random_transform(photo.shape, seed)
        return self.generator.apply_transform(photo, parameters)

    def on_epoch_end(self):
        self.epoch += 1


class PhotoGenerator(tf.keras.preprocessing.image.ImageDataGenerator):
    """ImageDataGenerator whose affine step is an OpenCV warp: the result of SciPy's, but faster."""

    def apply_transform(self, x, transform_parameters):
        """Turn, shift, shear, zoom and mirror a (height, width, 3) float photo; see Keras."""
        rest = dict(transform_parameters)
        if self.fill_mode == "nearest":  # the other modes stay with SciPy
            names = rest.keys() & {"theta", "tx", "ty", "shear", "zx", "zy"}
            x = _affine_warp(x, **{name: rest.pop(name) for name in names})
        return super().apply_transform(x, rest)


def _split_command(folder):
    """The command that fills the folder with train, validation and test."""
    words = ["python", "create_train_val_test.py", "PHOTOS", "--output", os.fspath(folder)]
    if any((folder / name).exists() for name in SPLITS):
        words.append("--overwrite")
    return pasteable(*words)


def _affine_warp(photo, theta=0, tx=0, ty=0, shear=0, zx=1, zy=1):
    """Keras's affine transform of a (height, width, 3) photo, its edge pixels carried on outwards.

    theta and shear in degrees, tx and ty in pixels, zx and zy as factors of the scale.
    """
    theta, shear = np.deg2rad([theta, shear])
    rotation = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    linear = rotation @ [[zx, -np.sin(shear) * zy], [0, np.cos(shear) * zy]]
    centre = np.array(photo.shape[:2]) / 2 - 0.5
    offset = centre + rotation @ [tx, ty] - linear @ centre
    return cv2.warpAffine(
        photo,
        np.column_stack([linear, offset]),  # from a pixel of the result to its place in the photo
        photo.shape[1::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _photos_of(folder, class_names):
    """(paths, class indices) of the photos in class folders, sorted, without what is hidden."""
    paths, labels = [], []
    for label, name in enumerate(class_names):
        of_class = folder / name
        found = filter(is_photo, of_class.rglob("*"))
        visible = [it for it in found if not any(map(is_hidden, it.relative_to(of_class).parts))]
        paths += sorted(visible)
        labels += [label] * len(visible)
    return paths, np.array(labels, int)


# ---- 2. Model: InceptionV3 with a new head -------------------------------------------------------
# The convolutions of InceptionV3 turn a photo into 2048 small feature maps ("mixed10"); their means
# go through a small classifier, the head. The model scales the pixels itself: whoever loads the
# saved file feeds plain photos and cannot get the range wrong.

# Where training starts from scratch, the last strides are left out if the last feature maps would
# have fewer positions along a side. Weights that are given keep the strides they were learnt with.
FEWEST_POSITIONS = 5


def build_model(class_count, image_size, weights):
    """InceptionV3 on (n, size, size, 3) RGB, 0–255, with a softmax over the classes.

    weights: "imagenet", "none" (from scratch) or a file. Raises Stop where they cannot be had.
    """
    photo = keras.Input((image_size, image_size, 3), name="photo")
    # ImageNet's weights expect [-1, 1].
    scaled = layers.Rescaling(1 / 127.5, offset=-1, name="scaled")(photo)
    base = _backbone(scaled, weights)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            # Where it learns, from scratch: at Keras's 0.99 the moving statistics lag hundreds of
            # steps, too far for a short run.
            layer.momentum = 0.9
    pooled = layers.GlobalAveragePooling2D()(base.output)
    hidden = layers.Dense(256, activation="relu")(pooled)
    hidden = layers.Dropout(0.1)(hidden)
    probabilities = layers.Dense(class_count, activation="softmax", dtype="float32")(hidden)
    return keras.Model(photo, probabilities)


def without_last_stride(base):
    """The same model, untrained, with strides of 1 after mixed7: an output stride of 16, not 32.

    This leaves small photos more positions: 5 × 5 instead of 3 × 3 at 139 pixels. The idea is that
    of DeepLab (Chen et al., 2016), here without dilation.
    """
    unchanged = _layers_up_to(base, base.get_layer("mixed7"))

    def with_stride_1(layer):
        config = layer.get_config()
        if layer not in unchanged and "strides" in config:
            config["strides"] = (1, 1)
        return type(layer).from_config(config)

    return keras.models.clone_model(base, base.inputs, with_stride_1)


def _layers_up_to(model, layer):
    """The layers that a layer's output depends on, itself included."""
    return keras.Model(model.inputs, layer.output).layers


def _backbone(scaled, weights):
    """InceptionV3 without its top on scaled photos, with the weights that build_model is given."""
    if weights == "imagenet":
        try:
            weights = imagenet_weights()
        except OSError as error:
            raise Stop(imagenet_failure(error), exit_code=1) from error
    base = keras.applications.InceptionV3(include_top=False, input_tensor=scaled, weights=None)
    if weights != "none":
        return load_backbone_weights(base, Path(weights))
    if base.output.shape[1] < FEWEST_POSITIONS:
        return without_last_stride(base)
    return base


# ---- 3. Training: first the head, then the upper blocks ------------------------------------------
# Pretrained layers know edges, petals and textures; a new head knows nothing, and its first wild
# gradients would spoil them. So the head learns alone on the frozen base ("head"), then the upper
# blocks follow at a low learning rate ("fine-tuning"). From scratch all layers learn at once
# ("scratch"). In fine-tuning and from scratch the rate warms up for a tenth of the steps, then
# falls to 0 along a cosine.


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which the layers from a block up learn."""

    name: str
    start_epoch: int  # counted from 0
    end_epoch: int  # the first that no longer belongs to it
    freeze_below: str  # a block; "head": only the head learns; "none": everything does
    learning_rate: float  # with a cosine the highest one
    cosine: bool  # the rate warms up and falls to 0 along a cosine
    batch_statistics: bool = True  # BatchNormalization learns, on each batch's mean and variance


def training_phases(epochs, weights, freeze_below, learning_rate=None):
    """From scratch one phase; else the head for a fifth of the epochs, then upper blocks too."""
    if weights == "none":
        return [Phase("scratch", 0, epochs, "none", learning_rate or 5e-4, cosine=True)]
    head_end = math.ceil(epochs / 5)
    head = Phase("head", 0, head_end, "head", 1e-3, cosine=False, batch_statistics=False)
    fine_tuning = Phase(
        "fine-tuning",
        head_end,
        epochs,
        freeze_below,
        learning_rate or 3e-4,
        cosine=True,
        batch_statistics=False,
    )
    return [head, fine_tuning] if epochs > head_end else [head]


def train(model, splits, phases, checkpoints, balance=False):
    """Train through the phases, from the epoch where the checkpoints stand.

    balance: photos weigh in the loss so that all classes weigh alike. Raises Stop where the loss
    becomes NaN or the memory runs out.
    """
    batches = splits["train"]
    weights = _balancing_weights(batches.labels) if balance else None
    for phase in phases:
        if checkpoints.epochs >= phase.end_epoch:
            continue
        _compile_for(model, phase, len(batches))
        if checkpoints.epochs > phase.start_epoch:
            # Loaded again: there is an optimizer now, which gets its state back.
            model.load_weights(checkpoints.file_of(checkpoints.epochs))
        batches.epoch = checkpoints.epochs
        stretch = f"epochs {checkpoints.epochs + 1} to {phase.end_epoch}"
        print(f"Phase {phase.name}: {stretch}, learning rate {phase.learning_rate:g}.")
        print("Its first step takes a while, as the model is compiled.", flush=True)
        try:
            model.fit(
                batches,
                validation_data=splits["validation"],
                class_weight=weights,
                shuffle=False,  # the photos shuffle themselves, by seed and epoch
                initial_epoch=checkpoints.epochs,
                epochs=phase.end_epoch,
                callbacks=[keras.callbacks.TerminateOnNaN(), checkpoints],
                verbose=1 if sys.stdout.isatty() else 2,  # a bar, or a line an epoch
            )
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            remedy = "Train with a smaller --batch-size or --image-size."
            raise Stop(f"Out of memory. {remedy}", 1) from error
        except KeyboardInterrupt:
            if checkpoints.epochs:
                kept = f"Epochs kept: {checkpoints.epochs}"
                print(f"\n{kept}; the same command with --resume goes on.", flush=True)
            raise


def freeze(model, phase):
    """Let the phase's layers learn, and no others; BatchNormalization with batch_statistics only.

    A frozen BatchNormalization scales by the moving mean and variance that came with the weights,
    in training as in validation. It stays so in all phases but that from scratch: the head learns
    on features that are scaled that way, and would have to learn again if they changed when the
    blocks are unfrozen.
    """
    frozen = []
    if phase.freeze_below != "none":
        frozen = _layers_up_to(model, _last_layer_below(model, phase.freeze_below))
    for layer in model.layers:
        learns = layer not in frozen
        if isinstance(layer, layers.BatchNormalization):
            learns = learns and phase.batch_statistics
        layer.trainable = learns


def _balancing_weights(labels):
    """{class index: weight of its photos in the loss}: all classes weigh alike, 1 in the mean.

    labels: (n,) class indices, with each class among them.
    """
    counts = np.bincount(labels)
    weights = len(labels) / (len(counts) * counts)
    return dict(enumerate(weights.tolist()))


def _compile_for(model, phase, steps_per_epoch):
    """Freeze what the phase freezes; set the loss, and an Adam at the phase's learning rate.

    steps_per_epoch: batches, not photos.
    """
    freeze(model, phase)
    rate = phase.learning_rate
    if phase.cosine:
        steps = steps_per_epoch * (phase.end_epoch - phase.start_epoch)
        warm_up = max(1, steps // 10)  # Adam knows nothing of the gradients yet: small steps first
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0,
            warmup_target=phase.learning_rate,
            warmup_steps=warm_up,
            decay_steps=max(1, steps - warm_up),
        )
    optimizer = keras.optimizers.Adam(rate)
    model.compile(optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    # Optimizer and metrics get their variables now: if the first step made them, it would be traced
    # a second time.
    model.optimizer.build(model.trainable_variables)
    nothing = np.zeros((1, *model.output_shape[1:]), "float32")
    model.compute_metrics(None, nothing, nothing)
    model.reset_metrics()


def _last_layer_below(model, block):
    """The layer that ends what comes before a block, or before the head."""
    if block == "head":
        return model.get_layer(BLOCKS[-1])
    if block == BLOCKS[0]:  # below it is the stem, which ends with the second pooling
        poolings = [layer for layer in model.layers if isinstance(layer, layers.MaxPooling2D)]
        return poolings[1]
    return model.get_layer(BLOCKS[BLOCKS.index(block) - 1])


# ---- 4. Evaluation: what the model gets right and wrong ------------------------------------------
# The test photos took no part in training, nor in the choice of the best epoch: their metrics tell
# how the model does on photos that it has never met. They are computed once, at the end.

FEW_PHOTOS = 10  # of a class: with fewer, one of them is more than ten percent of its accuracy
CONFIDENCE_BINS = 10  # of the same width, from 0 to 1


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for photos whose class is known."""

    class_names: list  # as they are printed
    labels: np.ndarray  # (n,) true class indices
    probabilities: np.ndarray  # (n, classes) float, each row sums to 1 unless is_multi_label
    is_multi_label: bool = False  # the model tells of each class by itself whether it is there

    @cached_property
    def predicted(self):
        """(n, classes) booleans; see _predicted_classes."""
        return _predicted_classes(self.probabilities, self.is_multi_label)

    @cached_property
    def correct(self):
        """(n,) booleans: whether the true class is predicted."""
        return self.predicted[np.arange(len(self.labels)), self.labels]

    @cached_property
    def accuracy(self):
        return float(np.mean(self.correct))

    @cached_property
    def accuracy_interval(self):
        """(lowest, highest) accuracy that goes with these photos at 95 %: Wilson's interval."""
        from scipy.stats import binomtest  # which takes a second to load

        test = binomtest(int(self.correct.sum()), len(self.labels))
        return tuple(test.proportion_ci(confidence_level=0.95, method="wilson"))

    @cached_property
    def balanced_accuracy(self):
        """The mean of the classes' recall: each class counts alike, however many photos it has."""
        return float(np.nanmean(self.recall))

    @cached_property
    def loss(self):
        if self.is_multi_label:
            true = np.eye(len(self.class_names))[self.labels]
            losses = keras.losses.binary_crossentropy(true, self.probabilities)
        else:
            losses = keras.losses.sparse_categorical_crossentropy(self.labels, self.probabilities)
        return float(np.mean(losses))

    @cached_property
    def photo_counts(self):
        """(classes,) the number of photos of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    @cached_property
    def confusion(self):
        """(classes, classes) counts: row the true class, column the predicted one or ones."""
        counts = np.zeros((len(self.class_names),) * 2, int)
        np.add.at(counts, self.labels, self.predicted)
        return counts

    @property
    def precision(self):
        """(classes,) share of the photos called a class that belong to it; nan for none."""
        return _shares(np.diag(self.confusion), self.confusion.sum(0))

    @property
    def recall(self):
        """(classes,) share of a class's photos that are called so; nan for a class without any."""
        return _shares(np.diag(self.confusion), self.photo_counts)

    @property
    def largest_share(self):
        """The accuracy of always guessing the most frequent class."""
        return self.photo_counts.max() / len(self.labels)

    @property
    def chance(self):
        """What such guessing reaches with luck: largest_share and two standard deviations."""
        share = self.largest_share
        return share + 2 * math.sqrt(share * (1 - share) / len(self.labels))

    @property
    def is_no_better_than_chance(self):
        # Who may name several classes is not right by chance alone, but by naming all.
        return not self.is_multi_label and self.accuracy <= self.chance


def doubt(probabilities, labels, is_multi_label=False):
    """A sort key (n,): the worst mistake is lowest, the most certain photo highest.

    A mistake is the worse the less probable its true class is (from -1 to 0); of the others the
    least confident are lowest (0 to 1). labels: true class indices, -1 where not known.
    """
    confidence = probabilities.max(1)
    rows = np.arange(len(labels))
    of_true_class = probabilities[rows, labels]  # of -1 the last, which is unused
    predicted = _predicted_classes(probabilities, is_multi_label)
    is_mistake = (labels >= 0) & ~predicted[rows, labels]
    return np.where(is_mistake, of_true_class - 1, confidence)


def example_order(evaluation):
    """All photo indices: the most confident correct one, then by doubt, worst mistakes first."""
    doubts = doubt(evaluation.probabilities, evaluation.labels, evaluation.is_multi_label)
    by_doubt = np.argsort(doubts, kind="stable").tolist()
    if doubts.max() < 0:
        return by_doubt
    most_confident = int(doubts.argmax())
    return [most_confident, *(index for index in by_doubt if index != most_confident)]


def reliability(evaluation):
    """How often the model is right when it is so sure: (CONFIDENCE_BINS, 3).

    For each bin of confidence, the probability of the predicted class, its number of photos, the
    sum of their confidences, and how many of them are right. A bin holds its upper end.
    """
    confidence = evaluation.probabilities.max(1).astype(float).round(6)
    ends = np.linspace(0, 1, CONFIDENCE_BINS + 1).round(6)
    bins = np.digitize(confidence, ends[1:-1], right=True)
    columns = np.column_stack([np.ones(len(bins)), confidence, evaluation.correct])
    sums = np.zeros((CONFIDENCE_BINS, 3))
    np.add.at(sums, bins, columns)
    return sums


def calibration_error(evaluation):
    """The mean distance of confidence and accuracy, bin by bin: 0 where it is as sure as it should.

    Guo et al., "On Calibration of Modern Neural Networks" (2017).
    """
    counts, confidences, right = reliability(evaluation).T
    return float(np.abs(confidences - right).sum() / counts.sum())


def draw_evaluation(output, evaluation, record=None):
    """Draw the confusion matrix and, where the training is recorded, its curves: [Picture].

    record: see _read_record; its settings hold {"phases": {name: number of epochs}}.
    """
    save_confusion_matrix(output / "confusion_matrix.png", evaluation)
    caption = "How often each true class (row) is taken for each class (column)"
    if evaluation.is_multi_label:
        caption = "How often each class (column) is named, from 0.5 up, in photos of each (row)"
    pictures = [Picture("confusion_matrix.png", caption)]
    if record:
        path = output / "training_curves.png"
        save_training_curves(path, record["history"], record["settings"]["phases"])
        caption = "Loss and accuracy after each epoch; the red one was kept"
        pictures.append(Picture(path.name, caption))
    return pictures


def _shares(counts, totals):
    return np.divide(counts, totals, out=np.full(len(counts), np.nan), where=totals > 0)


def _predicted_classes(probabilities, is_multi_label=False):
    """(n, classes) booleans: the most probable class; in a multi-label model all from 0.5 up."""
    if is_multi_label:
        return probabilities >= 0.5
    return np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(1)]


def _most_probable(probabilities):
    """The class indices of (…, classes), most probable first; of equal ones in order, as argmax."""
    return np.argsort(-probabilities, axis=-1, kind="stable")


# ---- 5. Activation grids: what each channel of a layer shows -------------------------------------
# A convolution turns what it is given, the first one the photo, into channels, one for each of its
# filters: feature maps of how much each place looks like what the filter looks for. Those of the
# first layers look like drawings of the photo in edges and colours; deeper ones are coarser and
# react to parts. They are normalized, and the ReLU that follows (ReLU.png) keeps what is positive:
# that is all that the next layer gets to see.
#
# What there is to know of a model is found by its Network, in the workshop: `activations` of any
# layer, `compute` to differentiate them, all `convolutions` (each with its `layer`, whose output is
# raw, and its `activation`, the layer whose output tells whether a filter fires), the
# `receptive_fields` (where a position looks, in pixels), and the `heatmap_layer`, the last layer
# with positions.
#
# What it finds in many photos is their Survey, also there: own photos, whose label is −1 for
# unknown, come first, and each has its `probabilities`, and for some `classes` its `uncut` Grad-CAM
# and `concept_shares`. What is told of a single photo is an Explanation: the `photo`, the `heatmap`
# for the class explained (the true one, or else the predicted one), and the `contrast`, the most
# probable other class.

# Blue for negative activations, black for 0, red to yellow for positive ones.
ACTIVATION_COLOURS = LinearSegmentedColormap.from_list(
    "activation", ["#9be7ff", "#2a6fdb", "black", "#d9431e", "#ffe34d"]
)
GRID_COLUMNS = 16


def activation_grid(model, photo, layer_name):
    """All channels of a layer for a photo, 16 a row: a (height, width, 3) uint8 RGB sheet.

    model: a Keras model or a Network. photo: (height, width, 3) RGB, 0–255, of any size. Raises
    Stop for a layer that the model lacks.
    """
    network = network_of(model)
    (activation,) = network.activations(network.as_batch(photo), [layer_name])
    return tile(_channel_tiles(activation[0]), GRID_COLUMNS)


def draw_grids(output, network, explanation):
    """Draw an explained photo, the ReLU, and all channels of some layers for it: [Picture]."""
    save_photo(output / "OriginalImage.jpeg", explanation.photo)
    save_relu(output / "ReLU.png")
    pictures = [
        Picture("OriginalImage.jpeg", explanation.name),
        Picture("ReLU.png", "ReLU keeps what is positive"),
    ]
    batch = network.as_batch(explanation.pixels)
    for convolution in network.nearest_convolutions(GRID_CONVOLUTIONS):
        number, activation_layer = convolution.number, convolution.activation
        sheets = [(f"conv2d_{number}_grid.jpg", convolution.layer, str(convolution))]
        if activation_layer != convolution.layer:
            title = f"{activation_layer}, after {convolution}"
            sheets.append((f"activation_{number}_grid.jpg", activation_layer, title))
        activations = network.activations(batch, [layer for _, layer, _ in sheets])
        for (file, layer, title), (activation,) in zip(sheets, activations, strict=True):
            silent = ~activation.any((0, 1))
            caption = _grid_caption(title, activation, silent.sum(), explanation.name)
            place = save_sheet(output / file, _channel_tiles(activation), GRID_COLUMNS, caption)
            pictures.append(Picture(file, caption, sheet_facts(convolution, layer, silent, place)))
    return pictures


def _channel_tiles(activation):
    """Pictures (channels, side, side, 3) uint8 of an (h, w, channels) activation.

    Each channel has a scale of its own. One that is 0 everywhere becomes a light cross on grey.
    """
    channels = activation.shape[2]
    side = int(np.clip(1800 / math.sqrt(channels), 24, 96))  # smaller where there are many
    interpolation = cv2.INTER_AREA if activation.shape[0] > side else cv2.INTER_NEAREST
    tiles = np.empty((channels, side, side, 3), "uint8")
    for index in range(channels):
        channel = activation[..., index]
        if channel.any():
            strength = np.abs(channel)
            # Full colour for the highest value would let one hot pixel turn all others black.
            full = np.percentile(strength, 99.5) or strength.max()
            colours = ACTIVATION_COLOURS(CenteredNorm(0, full)(channel), bytes=True)[..., :3]
            tiles[index] = cv2.resize(colours, (side, side), interpolation=interpolation)
        else:
            cross = np.eye(side, dtype=bool) | np.eye(side, dtype=bool)[::-1]
            tiles[index] = np.where(cross[..., None], 150, 70)
    return tiles


def _grid_caption(title, activation, silent, photo_name):
    """Two lines: what the sheet of an (h, w, channels) activation shows, and its colours.

    silent: how many channels are 0 everywhere.
    """
    height, width, channels = activation.shape
    which = {0: "no channel is", 1: "1 channel is"}.get(silent, f"{silent} channels are")
    firing = f"{which} 0 everywhere" + (" (crossed)" if silent else "")
    negative = "blue negative, " if activation.min() < 0 else ""
    return (
        f"{title} for {photo_name}: {channels} channels of {height} × {width} positions\n"
        f"{negative}black 0, red to yellow positive, each channel on its own scale; {firing}"
    )


# ---- 6. Filter patterns: what each filter looks for ----------------------------------------------
# Each filter gets an image of its own, faint noise at first, that follows the gradient of the
# filter's mean activation upwards: it becomes what the filter looks for ("Feature Visualization",
# Olah et al., 2017). The gradient is that of the convolution's own output, as a dead ReLU passes
# none (so a BatchNormalization of negative gamma, which InceptionV3 does not have, turns it round);
# the activation after it tells whether the filter fires.
#
# The ascent does not change single pixels, which would end in noise. It changes the waves that the
# image is the sum of (its Fourier coefficients), in decorrelated colours: three that vary almost
# independently in photos. While it rises, the image is larger than the picture that is kept, its
# middle: the waves go on beyond the picture by a margin, so that all that a filter sees is pattern.

FILTERS_DRAWN = 64  # of a convolution, the first ones
# Pixels; a multiple of the layer's stride, so that each repetition of the picture meets the
# positions alike.
PATTERN_SIZE = 128
PATTERN_STEPS = 18
PATTERN_RATE = 5  # grey levels by which a step changes the image (root mean square)
PATTERN_MOMENTUM = 0.75  # with less, weak filters do not get far in so few steps; more overshoots
# Grey levels of the noise at the start (root mean square). From faint noise the ascent finds
# the strongest pattern, from strong noise only what happens to lie there. A filter that stays
# silent all the same is started again from stronger noise.
PATTERN_STARTS = (4, 20, 60)
PATTERN_COLUMNS = 8  # of a sheet
FILTERS_AT_ONCE = 16  # 32 are no faster on a CPU and take more memory
# How far the image goes on beyond the picture, in pixels. A filter that sees the zeros which pad
# the edge of an image draws a frame there. A wider margin would take more time, and a filter hardly
# sees what lies so far out.
PATTERN_MARGIN = 24
PATTERN_CONTRAST = 60  # grey levels of the finished picture (standard deviation before the bounds)
SHORTEST_WAVELENGTH = 3.5  # pixels: shorter waves raise the activation as noise no eye resolves
FLAT_COLOUR = 0.8  # strength of the mean colour; at 1 some early filters paint nothing else

# Square root of the colour correlation of ImageNet's photos, published with Lucid: rows are red,
# green and blue, columns are brightness, red to blue and green to magenta.
COLOUR_CORRELATION_ROOT = np.array(
    [[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], "float32"
)
# Divided by the length of the first column. The last two are 3 times as strong as in photos: with
# the colours of photos patterns look muted.
BRIGHTNESS_LENGTH = np.linalg.norm(COLOUR_CORRELATION_ROOT[:, 0])
COLOUR_BASIS = COLOUR_CORRELATION_ROOT / BRIGHTNESS_LENGTH * np.array([1, 3, 3], "float32")


def filter_patterns(
    model, layer_name, filters, seed=0, *, size=PATTERN_SIZE, steps=PATTERN_STEPS, on_progress=None
):
    """Pictures that fire the filters of a convolution, and whether they do.

    model: a Keras model or a Network. filters: their numbers. size: pixels, a multiple of the
    layer's stride; steps: of the ascent. Returns (n, size, size, 3) uint8 pictures, which can be
    repeated without a seam, and (n,) booleans: whether the activation that follows the convolution
    is above 0 anywhere on the finished picture, its edges included. on_progress: called with the
    place in `filters` that is reached, lower again where silent ones are started anew. Raises Stop
    for a layer that is no convolution of the model.
    """
    network = network_of(model)
    convolution = network.convolution(layer_name)
    field = network.receptive_fields[layer_name]
    margin = _pattern_margin(field)
    basis, spectrum = _waves(max(field.size), margin, size)
    step = _ascent_step(network, layer_name, basis, spectrum, margin)
    of_picture = basis[:, margin : margin + size]
    filters = np.asarray(filters, "int32")
    pictures = np.zeros((len(filters), size, size, 3), "uint8")
    fires = np.zeros(len(filters), bool)
    for attempt, strength in enumerate(PATTERN_STARTS):
        remaining = np.flatnonzero(~fires)
        for piece in batched(remaining, FILTERS_AT_ONCE):
            noise = _start_noise(filters[piece], (seed, attempt), spectrum)
            coefficients = tf.constant(strength * noise)
            momentum = tf.zeros_like(coefficients)
            with bfloat16_where_fast():
                for _ in range(steps):
                    coefficients, momentum = step(coefficients, momentum, filters[piece])
            image = network.as_seen(_sum_of_waves(coefficients, of_picture, spectrum))
            pictures[piece] = np.rint(_full_contrast(image))
            finished = tf.constant(pictures[piece], tf.float32)
            (activation,) = network.compute(finished, [convolution.activation], folded=True)
            peaks = np.max(activation, axis=(1, 2))  # (n, channels)
            fires[piece] = peaks[np.arange(len(piece)), filters[piece]] > 0
            if on_progress:
                on_progress(int(piece[-1]) + 1)
    return pictures, fires


@dataclass(frozen=True)
class Patterns:
    """The patterns of the first filters of a convolution."""

    convolution: object  # a Convolution of the network
    pictures: np.ndarray  # (n, size, size, 3) uint8
    fires: np.ndarray  # (n,) booleans


def find_patterns(network, seed=0, progress=None, size=PATTERN_SIZE, steps=PATTERN_STEPS):
    """[Patterns] of the first filters of some convolutions, FILTERS_DRAWN of each."""
    found = []
    for convolution in network.nearest_convolutions(PATTERN_CONVOLUTIONS):
        count = min(FILTERS_DRAWN, convolution.channels)
        tell = progress and partial(progress.tell_filters, convolution, count, len(found))
        pictures, fires = filter_patterns(
            network, convolution.layer, range(count), seed, size=size, steps=steps, on_progress=tell
        )
        found.append(Patterns(convolution, pictures, fires))
    return found


def draw_patterns(output, patterns):
    """Draw a sheet of the patterns of a convolution: [Picture]."""
    convolution, fires = patterns.convolution, patterns.fires
    count, silent = len(fires), int((~fires).sum())
    firing = f"{silent} never fired (red frame)" if silent else "all of them fire"
    caption = (
        f"What filters 0 to {count - 1} of {convolution} look for\n"
        f"{count} of its {convolution.channels} filters, row by row; {firing}"
    )
    grey, red = 120, np.array([200, 50, 50])
    frames = np.where(fires[:, None, None, None], grey, red)
    file = f"conv2d_{convolution.number}_filters.jpg"
    place = save_sheet(output / file, patterns.pictures, PATTERN_COLUMNS, caption, frames)
    return [Picture(file, caption, sheet_facts(convolution, convolution.layer, ~fires, place))]


def _ascent_step(network, layer_name, basis, spectrum, margin):
    """A function of coefficients (n, 3, k, k), momentum and filters (n,): one step further.

    It returns the coefficients and the momentum after a step up the gradient of each filter's mean
    activation on its own image.
    """
    field, size = network.receptive_fields[layer_name], basis.shape[1] - 2 * margin
    # The positions that look at the picture: it has a whole number of them, and each counts once.
    centre, stride = np.array(field.centre), np.array(field.stride)
    start = np.ceil((margin - centre) / stride).clip(0).astype(int)
    end = start + np.maximum(1, size // stride.astype(int))
    coefficients = tf.TensorSpec((None, 3, *spectrum.shape))

    # All that varies is a tensor of a declared shape, so that it is traced once.
    @tf.function(
        input_signature=[coefficients, coefficients, tf.TensorSpec((None,), tf.int32)],
        autograph=False,
    )
    def step(coefficients, momentum, filters):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(coefficients)
            images = _bounded(network.as_seen(_sum_of_waves(coefficients, basis, spectrum)))
            (maps,) = network.compute(images, [layer_name], folded=True)
            means = tf.reduce_mean(maps[:, start[0] : end[0], start[1] : end[1]], (1, 2))
            # An image changes only its own mean, so the gradient of the sum is each image's own.
            activation = tf.reduce_sum(tf.gather(means, filters, axis=1, batch_dims=1))
        momentum = PATTERN_MOMENTUM * momentum + tape.gradient(activation, coefficients)
        change = PATTERN_RATE * momentum / _contrast(momentum, spectrum)
        return coefficients + change, momentum

    return step


def _pattern_margin(field):
    """Pixels by which the waves go on beyond the picture, for a layer's receptive field.

    About half of what a filter sees, at most PATTERN_MARGIN or one stride. In whole strides, so
    that the positions look at the same places of the finished picture as in the ascent: a filter
    that fires on a pattern may not fire on the same one moved by some pixels.
    """
    stride = int(max(field.stride))
    reach = min(PATTERN_MARGIN, int(max(field.size)) // 2 + stride - 1)
    return max(1, reach // stride) * stride


def _waves(longest_wavelength, margin, size):
    """The basis (k, size + 2 * margin) of k waves along a side, and their spectrum (k, k).

    The spectrum is how strong a wave of so many cycles down and across is where its coefficient is
    1. Waves longer than the filter sees are as strong as the longest one that it sees.
    """
    # cos + sin of positive and negative frequencies (Hartley, 1942): they span what complex waves
    # span, with real coefficients. Two small matrix products cost less than a fast transform.
    cycles = np.fft.fftfreq(size, 1 / size)
    cycles = cycles[np.abs(cycles) <= size / SHORTEST_WAVELENGTH]
    pixels = np.arange(-margin, size + margin)
    angle = 2 * np.pi * np.outer(cycles, pixels) / size
    frequency = np.hypot(cycles[:, None], cycles)
    wavelength = size / np.maximum(frequency, size / longest_wavelength)
    # The square root lies between a flat spectrum, which gives speckle, and that of photos (1/f),
    # which gives blotches.
    spectrum = np.sqrt(wavelength / longest_wavelength)
    spectrum[frequency > size / SHORTEST_WAVELENGTH] = 0  # a round cut, which prefers no direction
    spectrum[frequency == 0] *= FLAT_COLOUR
    basis = np.cos(angle) + np.sin(angle)
    return basis.astype("float32"), spectrum.astype("float32")


def _start_noise(filters, seeds, spectrum):
    """Coefficients (n, 3, k, k) of noise with a root mean square of 1 grey level.

    A filter gets the same noise whichever other filters are drawn with it.
    """
    shape = (3, *spectrum.shape)
    noise = [np.random.default_rng([*seeds, k]).normal(size=shape) for k in filters]
    noise = np.stack(noise).astype("float32")
    return noise / _contrast(noise, spectrum).numpy()


def _contrast(coefficients, spectrum):
    """Root mean square of the images that waves add up to, in grey levels: (n, 1, 1, 1).

    As the waves are orthogonal, no image need be drawn for it (Parseval's theorem).
    """
    squares = tf.reduce_sum(_in_rgb(coefficients, spectrum) ** 2, (2, 3), keepdims=True)
    return tf.sqrt(tf.reduce_mean(squares, 1, keepdims=True)) + 1e-12


def _sum_of_waves(coefficients, basis, spectrum):
    """The images, RGB about 0, (n, size, size, 3) float32, that coefficients (n, 3, k, k) make.

    Of each colour: the transposed basis times the waves' strengths times the basis (k, size).
    """
    strengths = _in_rgb(coefficients, spectrum)
    planes = tf.matmul(basis, tf.matmul(strengths, basis), transpose_a=True)
    return tf.transpose(planes, (0, 2, 3, 1))


def _in_rgb(coefficients, spectrum):
    """The strengths of the waves in red, green and blue, from their coefficients."""
    return tf.einsum("ncyx,rc->nryx", spectrum * coefficients, COLOUR_BASIS)


def _bounded(image):
    """The image about 0 as RGB from 8 to 247, bent smoothly towards the bounds, not clipped."""
    return 127.5 + 119.5 * tf.tanh(image / 119.5)


def _full_contrast(image):
    """The image (n, size, size, 3) stretched about its mean colour, as RGB from 8 to 247."""
    mean = tf.reduce_mean(image, (1, 2), keepdims=True)
    variance = tf.reduce_mean((image - mean) ** 2, (1, 2, 3), keepdims=True)
    return _bounded(mean + PATTERN_CONTRAST * (image - mean) / (tf.sqrt(variance) + 1e-12))


# ---- 7. What fires a filter: its pattern beside photos -------------------------------------------
# A pattern shows what a filter could look for, photos what it does find: for some filters the
# patches of photos on which they fire most, cut out at what that position sees (Zeiler and Fergus,
# 2013). Where pattern and patches disagree, the filter has more than one meaning, or the photos do
# not hold what it looks for.

EXAMPLE_FILTERS = 16  # the most selective of those whose patterns are drawn
EXAMPLE_PATCHES = 5
PATCH_SIDE = 160  # pixels, also of the pattern beside it


class Peaks(NamedTuple):
    """Where in each of n photos the filters of a layer fire most."""

    values: np.ndarray  # (n, filters), the highest activation
    positions: np.ndarray  # (n, filters, 2), its row and column in the feature map


def top_photos(peaks, filter_index, count=EXAMPLE_PATCHES):
    """Indices of the photos on which a filter fires most, strongest first; each photo once."""
    strongest = np.argsort(-peaks.values[:, filter_index], kind="stable")[:count]
    return [int(index) for index in strongest if peaks.values[index, filter_index] > 0]


def most_selective(peaks):
    """Numbers of the EXAMPLE_FILTERS most selective filters, without those that never fire."""
    selectivity = _selectivity_of(peaks)
    ranking = np.argsort(-selectivity, kind="stable")[:EXAMPLE_FILTERS]
    return [int(index) for index in ranking if selectivity[index] >= 0]


def cut_patch(photo, size, field, position):
    """What one position of a layer sees of a photo: (PATCH_SIDE, PATCH_SIDE, 3) uint8 RGB.

    photo: (height, width, 3) uint8. size: the model's input, to which the photo is squeezed. field:
    the layer's receptive field, which is clipped to the photo. The patch keeps the photo's shape.
    """
    middle, reach = np.array(field.place(position)), np.array(field.size) / 2
    to_photo = np.array(photo.shape[:2]) / size
    start = np.floor((middle - reach) * to_photo + 1e-6).astype(int).clip(0)
    end = np.ceil((middle + reach) * to_photo - 1e-6).astype(int).clip(start + 1)
    seen = photo[start[0] : end[0], start[1] : end[1]]
    return in_square(seen, PATCH_SIDE)


def draw_examples(output, network, patterns, peaks, paths):
    """Draw for a convolution's most selective filters pattern and patches: [Picture].

    patterns: of the convolution. peaks: those of its activation in the photos of these paths.
    Nothing is drawn where no filter fires.
    """
    convolution = patterns.convolution
    field = network.receptive_fields[convolution.activation]
    filters = most_selective(peaks)
    if not filters:
        return []
    rows = []
    for number in filters:
        patches = []
        for k in top_photos(peaks, number):
            photo, position = network.read_photo(paths[k]), peaks.positions[k, number]
            patch = cut_patch(photo, network.input_size, field, position)
            patches.append((patch, f"{peaks.values[k, number]:.2f}"))
        rows.append([(patterns.pictures[number], ""), *patches])
    caption = (
        f"What fires {convolution}: {len(filters)} of its first {len(patterns.fires)} filters, the "
        f"most selective first\nnumber, pattern, and the patches of {len(paths)} photos that "
        "fire it most, with the activation"
    )
    file = f"conv2d_{convolution.number}_examples.jpg"
    save_rows(output / file, [str(number) for number in filters], rows, caption)
    return [Picture(file, caption)]


def _peaks_of(activation):
    """The Peaks of feature maps, a tensor (n, h, w, filters)."""
    highest = tf.reduce_max(activation, axis=2).numpy()  # of each row: (n, h, filters)
    rows = highest.argmax(1)
    photos, filters = np.indices(rows.shape)
    columns = activation.numpy()[photos, rows, :, filters].argmax(-1)
    return Peaks(highest.max(1), np.stack([rows, columns], axis=-1))


def _selectivity_of(peaks):
    """How far a filter's best photos stand out: (filters,); -1 where it fires on no photo.

    It is how far the mean peak of its EXAMPLE_PATCHES best photos lies above that of all photos, in
    standard deviations of the peaks.
    """
    best = np.sort(peaks.values, axis=0)[-EXAMPLE_PATCHES:].mean(0)
    spread = peaks.values.std(0)
    distance = (best - peaks.values.mean(0)) / np.maximum(spread, 1e-12)
    # Of so few photos that all are the best ones it is 0, and not what rounding makes of it.
    selectivity = np.maximum(0, distance.round(4))
    selectivity[(best <= 0) | (spread < 1e-12)] = -1
    return selectivity


# ---- 8. Grad-CAM heatmaps: where the model found its class ---------------------------------------
# Grad-CAM asks how much each channel of a layer raises the logit of a class (the mean of its
# gradient), and adds up the channels' feature maps with these weights: where the sum is positive,
# something speaks for the class. It takes the logit, not the probability after the softmax: where
# the model is sure, that is flat and has no gradient.
#
# A heatmap has one value a position. It is laid on the photo where the receptive fields of these
# positions lie, and judged by deletion: how far the probability falls when what it marks is blurred
# away, beside a part of the same size in the middle of the photo, the control.

DELETION_MARGIN = 0.01  # probabilities that differ by less are called the same
PLACES = 8  # rows and columns of a photo's places that are covered one by one
HEATMAP_COLOURS = "inferno"  # from black to yellow: brighter is more, also for colour-blind eyes
EPOCHS_SHOWN = 8  # at most, of the training


def grad_cam(model, photo, layer_name, class_index):
    """Grad-CAM heatmap of a class at a layer: (h, w) float32 >= 0, one value a position.

    model: a Keras model or a Network. photo: (height, width, 3) RGB, 0–255, of any size. The values
    are in units of the logit, neither scaled nor enlarged; all 0 where nothing speaks for the
    class. Selvaraju et al., "Grad-CAM" (2017). Raises Stop for a layer that the model lacks.
    """
    network = network_of(model)
    batch = network.as_batch(photo)
    with tf.GradientTape() as tape:
        tape.watch(batch)  # so that all that is computed from it is recorded
        feature_maps, logits = network.compute(batch, [layer_name, LOGITS])
        logit = logits[0, class_index]
    gradient = tape.gradient(logit, feature_maps, unconnected_gradients="zero")
    weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)  # (1, 1, 1, channels)
    heatmap = tf.reduce_sum(weights * feature_maps, axis=-1)  # (1, h, w)
    return np.maximum(0, heatmap[0].numpy())


def place_heatmap(heatmap, field, size):
    """Lay an (h, w) heatmap where its positions look: float32 of this size, (height, width).

    size: that of the model's input, in whose pixels the receptive field is given. Between the
    centres of the fields the heatmap is interpolated, beyond the outermost it fades to 0 within a
    stride: no position looks there, and few see it.
    """
    (first_y, first_x), (stride_y, stride_x) = field.centre, field.stride
    to_positions = np.array(
        [[1 / stride_x, 0, -first_x / stride_x], [0, 1 / stride_y, -first_y / stride_y]]
    )
    return cv2.warpAffine(
        heatmap.astype("float32"),
        to_positions,
        tuple(size[::-1]),
        flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    )


def placed(network, layer_name, heatmap):
    """A heatmap of a layer laid where its positions look; see place_heatmap."""
    return place_heatmap(heatmap, network.receptive_fields[layer_name], network.input_size)


def heatmap_of_all_blocks(model, photo, class_index):
    """A finer heatmap of a class, from all blocks of a model: (height, width) float32, 0 to 1.

    model: a Keras model or a Network, whose input size the heatmap has. photo: (height, width, 3)
    RGB, 0–255, of any size. The mean of each block's HiResCAM, gradient times activation position
    by position (Draelos and Carin, 2020), cut at 0, divided by its peak, and laid where the block's
    positions look. The early blocks add outlines, the last ones what they belong to.
    """
    network = network_of(model)
    batch = network.as_batch(photo)
    with tf.GradientTape() as tape:
        tape.watch(batch)
        *features, logits = network.compute(batch, [*network.heatmap_layers, LOGITS])
        logit = logits[0, class_index]
    gradients = tape.gradient(logit, features, unconnected_gradients="zero")
    shares = []
    for name, maps, gradient in zip(network.heatmap_layers, features, gradients, strict=True):
        heatmap = np.maximum(0, tf.reduce_sum(maps * gradient, axis=-1)[0].numpy())
        shares.append(placed(network, name, heatmap / (heatmap.max() or 1)))
    return np.mean(shares, axis=0)


class Deletion(NamedTuple):
    """The probability of a class for a photo as it is, and without a part of it.

    After the deletion game of RISE (Petsiuk et al., 2018), but blurred, and in one step.
    """

    before: float
    without_hottest: float  # where the heatmap is highest
    without_central: float  # the control: a part of the same size in the middle

    @property
    def is_better(self):
        """Whether the probability falls, and further than without the control."""
        return self.without_hottest < min(self.before, self.without_central) - DELETION_MARGIN


def deletions_of(predict, photo, before, heatmaps, classes):
    """The Deletion of each of some heatmaps of a photo, each for a class of its own.

    predict: see probabilities_without. photo: (height, width, 3) as the model sees it. before: its
    (classes,) probabilities. heatmaps: (height, width) each, over the whole photo.
    """
    masks = [central_part(photo.shape[:2]), *map(top_fraction, heatmaps)]
    without_central, *without_hottest = probabilities_without(predict, photo, masks)
    return [
        Deletion(float(before[k]), float(without[k]), float(without_central[k]))
        for k, without in zip(classes, without_hottest, strict=True)
    ]


def probabilities_without(predict, photo, masks):
    """Probabilities (n, classes) of a (height, width, 3) photo with each of n masks blurred away.

    predict: a function of photos (n, height, width, 3), such as Network.probabilities. masks:
    (height, width) booleans. What is blurred still has its colour, but no shape.
    """
    blurred = cv2.GaussianBlur(photo.astype("float32"), (0, 0), max(photo.shape) / 12)
    return predict(np.stack([np.where(mask[..., None], blurred, photo) for mask in masks]))


def probabilities_without_places(predict, photo):
    """Probabilities of a photo with one place blurred away: (PLACES, PLACES, classes).

    The places are rectangles of the same size, with plain edges, that fill the (height, width, 3)
    photo: Zeiler and Fergus (2013), who cover them in grey. predict: see probabilities_without.
    """
    height, width = photo.shape[:2]
    row_of = np.arange(height) * PLACES // height  # of each of the photo's rows of pixels
    column_of = np.arange(width) * PLACES // width
    places = np.ndindex(PLACES, PLACES)
    masks = [(row_of == row)[:, None] & (column_of == column) for row, column in places]
    without = probabilities_without(predict, photo, masks)
    return without.reshape(PLACES, PLACES, -1)


def top_fraction(heatmap, fraction=DELETED_FRACTION):
    """Boolean mask of that fraction of an (h, w) heatmap's pixels which has the highest values.

    Of equal values, such as the 0 where nothing is marked, those nearest to the highest come first.
    """
    count = round(fraction * heatmap.size)
    lowest = np.partition(heatmap, -count, axis=None)[-count]
    mask = heatmap > lowest
    equal = np.argwhere(heatmap == lowest)
    peak = np.unravel_index(heatmap.argmax(), heatmap.shape)
    nearest_first = np.argsort(np.linalg.norm(equal - peak, axis=1), kind="stable")
    rows, columns = equal[nearest_first[: count - mask.sum()]].T
    mask[rows, columns] = True
    return mask


def centred_blob(size):
    """The control of a heatmap: (height, width) values that fall away from the middle."""
    rows, columns = np.indices(size)
    return -np.hypot(rows - (size[0] - 1) / 2, columns - (size[1] - 1) / 2)


@lru_cache(1)  # of all photos of a model
def central_part(size):
    """The control of a heatmap's hottest part: the mask of the middle of (height, width) pixels."""
    return top_fraction(centred_blob(size))


def draw_heatmaps(output, network, explanations):
    """Draw for each photo the photo, its heatmap and the overlay: [Picture]."""
    layer = network.heatmap_layer
    pictures = []
    for number, explanation in enumerate(explanations, start=1):
        heatmap, name = explanation.heatmap, explanation.class_name
        worth = deletion_caption(name, explanation.deletions.get(explanation.class_index))
        caption = f"{explanation.name}: {explanation.verdict}.\n{worth}"
        if explanation.deletion_of_all_blocks:
            worth = deletion_caption(name, explanation.deletion_of_all_blocks)
            caption += f"\nBy all blocks: {worth}"
        height, width = heatmap.shape
        title, over = f"Grad-CAM for {name}, {height} × {width}", f"laid over the photo, for {name}"
        panels = [
            Panel(explanation, "the photo"),
            Panel(explanation, title, heatmap, network.receptive_fields[layer]),
            Panel(explanation, over, placed(network, layer, heatmap)),
        ]
        norm = Normalize(0, heatmap.max() or 1)
        if explanation.of_all_blocks is not None:
            of_all_blocks = explanation.of_all_blocks
            title = "HiResCAM of all blocks,\nfrom 0 to its own peak"
            own_norm = Normalize(0, of_all_blocks.max() or 1)
            panels.append(Panel(explanation, title, of_all_blocks, norm=own_norm))
        dpi = np.clip(explanation.photo.shape[1] / 3.7, 100, 300)  # the photo's own resolution
        label = f"at {layer}; 0: nothing for {name}"
        save_panels(output / f"CAM_{number}.jpeg", [panels], caption, label, norm, dpi=dpi)
        pictures.append(Picture(f"CAM_{number}.jpeg", caption))
    return pictures


def draw_blocks(output, network, explanation):
    """Draw one photo's heatmaps block by block, each as a share of its own peak: [Picture]."""
    panels = [Panel(explanation, "the photo")]
    for name in network.blocks:
        heatmap = np.maximum(0, explanation.uncut[name][explanation.class_index])
        height, width = heatmap.shape
        peak = f"peak {heatmap.max():.2g}" if heatmap.any() else "empty"
        share = placed(network, name, heatmap / (heatmap.max() or 1))
        panels.append(Panel(explanation, f"{name}, {height} × {width}\n{peak}", share))
    name = explanation.class_name
    caption = f"Grad-CAM for {name}, block by block, in {explanation.name}. {explanation.verdict}."
    label = f"share of the block's peak; 0: nothing for {name}"
    rows = batched(panels, 4)
    save_panels(output / "CAM_layers.jpg", rows, caption, label, Normalize(0, 1))
    return [Picture("CAM_layers.jpg", caption)]


def draw_mistakes(output, network, explanations):
    """Draw for up to three photos what speaks for each of two classes, and for one rather than the
    other, in one scale: [Picture].

    They are mistakes, with the predicted and the true class. Without mistakes they are the least
    certain photos, with the most probable other class and the true one.
    """
    most = 3  # rows, so that the picture stays high enough to be read
    mistakes = [explanation for explanation in explanations if explanation.is_mistake][:most]
    layer = network.heatmap_layer
    rows, peak = [], 0
    for it in mistakes or explanations[-most:]:
        other = it.uncut[layer][it.contrast_index]
        own = it.uncut[layer][it.class_index]
        titled = {
            f"for {it.contrast_name}": np.maximum(0, other),
            f"for {it.class_name}": np.maximum(0, own),
            f"{it.contrast_name} rather\nthan {it.class_name}": other - own,
        }
        peak = max(peak, *(np.abs(heatmap).max() for heatmap in titled.values()))
        row = [Panel(it, it.verdict.replace("; ", ";\n"))]
        for title, heatmap in titled.items():
            title += "" if heatmap.any() else ": empty"
            row.append(Panel(it, title, placed(network, layer, heatmap)))
        rows.append(row)
    told, other = "What it nearly took for something else (it made no mistake)", "the next class"
    if mistakes:
        told, other = "What misled the model", "the class that it says"
    if mistakes and mistakes[0].is_multi_label:
        told, other = "Photos whose own class it does not name", "the most probable other class"
    compared = f"Grad-CAM for {other}, for the true one, and for one rather than the other"
    caption = f"{told}\n{compared}"
    norm = CenteredNorm(0, peak or 1)
    label = f"Grad-CAM at {layer}; 0: nothing"
    save_panels(output / "CAM_mistakes.jpg", rows, caption, label, norm, ACTIVATION_COLOURS)
    return [Picture("CAM_mistakes.jpg", caption)]


def draw_learning(output, network, record):
    """Draw how the model learnt to look, epoch by epoch, at a photo of each class: [Picture].

    record: see _read_record. Nothing is drawn where nobody looked on.
    """
    looks, history = record.get("looks"), record["history"]
    if not looks:
        return []
    kept = int(np.argmin(history["val_loss"])) + 1
    epochs = len(looks["heatmaps"]) - 1  # the first are those before the first epoch
    chosen = np.linspace(0, epochs, min(EPOCHS_SHOWN, epochs + 1)).round().astype(int)
    nearest = 1 + np.abs(chosen[1:] - kept).argmin()
    chosen[nearest] = kept  # which is always shown
    labels, rows = [], []
    for row, (name, encoded) in enumerate(looks["photos"]):
        photo = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        heatmaps = {epoch: np.array(looks["heatmaps"][epoch][row]) for epoch in chosen.tolist()}
        peak = max(heatmap.max() for heatmap in heatmaps.values()) or 1
        pictures = []
        for epoch, heatmap in heatmaps.items():
            when = f"epoch {epoch}"
            if epoch == 0:
                when = "before"
            elif epoch == kept:
                when = f"kept, {epoch}"
            share = placed(network, network.heatmap_layer, heatmap / peak)
            text = f"{when}: {percent(looks['probabilities'][epoch][row])}"
            pictures.append((overlay(photo, share), text))
        labels.append(printable(name))
        rows.append(pictures)
    caption = (
        "How it learnt to look: Grad-CAM for the class of each photo, after some epochs\n"
        "each photo on one scale, brighter is more; with the probability of its class"
    )
    save_rows(output / "learning.jpg", labels, rows, caption)
    return [Picture("learning.jpg", caption)]


# ---- 9. Concepts: what the evidence for a class is made of ---------------------------------------
# A heatmap tells where something speaks for a class, not what it is. Single channels do not tell
# either, as hundreds of them share the work. But they fire in company: at each position the
# channels of the last layer are nearly a sum of a few *concepts*, each a set of channels that fire
# together, such as a white seed ball or the whorl of a rose. Non-negative matrix factorization
# finds them ("The Building Blocks of Interpretability", Olah et al., 2018; CRAFT, Fel et al.,
# 2023). What a concept adds to the logit of a class is its share, in which Grad-CAM's sum over the
# positions falls apart.

CONCEPT_COUNTS = (6, 10, 16, 24)  # the first of these that keeps CONCEPTS_KEEP is taken
CONCEPTS_KEEP = 0.95  # of the photos must keep their predicted class on the concepts alone
CONCEPT_PHOTOS = 300  # in which concepts are looked for, chosen by seed
CONCEPT_VALUES = 10**8  # of the feature maps of these photos: 0.4 GB
FACTORIZATION_STEPS = 15  # more explain hardly more
CONCEPTS_A_CLASS = 3  # drawn, the strongest ones
CONCEPTS_A_PHOTO = 4
CLASSES_DRAWN = 10  # at most, on the sheet of concepts
SMALLEST_SHARE = 0.05  # of what speaks for a class: what makes up less is not named
CONCEPT_EXAMPLES = 5  # photos beside a concept that hold most of it
DARKEST = 0.15  # brightness of a photo where a concept does not lie


@dataclass(frozen=True)
class Concepts:
    """What the feature maps of a layer are made of, the strongest concept first."""

    vectors: np.ndarray  # (k, channels) float32 >= 0, of length 1
    maps: np.ndarray  # (n, h, w, k) float32 >= 0: how strong each is in the photos it was found in
    explained: float  # share of the activations' squares that the sum of the concepts makes up
    kept: float  # share of the photos whose predicted class the sum alone keeps


def concepts(model, photos, count=None):
    """The Concepts of a model in these photos.

    model: a Keras model or a Network. photos: (height, width, 3) RGB each, 0–255, of any size.
    count: how many; without it the fewest of CONCEPT_COUNTS that are true to CONCEPTS_KEEP.
    """
    network = network_of(model)
    layer = [network.heatmap_layer]
    found = [network.activations(network.as_batch(photo), layer)[0] for photo in photos]
    return factorize(network, np.concatenate(found), count)


def factorize(network, feature_maps, count=None):
    """The Concepts in feature maps (n, h, w, channels) of the network's last layer with positions.

    What is negative in them is left out. There are no concepts where that leaves nothing.
    """
    activations = np.maximum(0, feature_maps).reshape(-1, feature_maps.shape[-1])
    most = min(activations.shape) - 1
    if most < 1 or not activations.any():
        nothing = np.zeros((0, feature_maps.shape[-1]), "float32")
        return Concepts(nothing, feature_maps @ nothing.T, explained=0.0, kept=0.0)
    counts = sorted({min(it, most) for it in ([count] if count else CONCEPT_COUNTS)})
    left, right = _nndsvd(activations, counts[-1])
    predicted = _logits_of(network, feature_maps).argmax(1)
    for k in counts:
        vectors = _non_negative_factor(activations, left[:k], right[:k])
        maps = concept_maps(feature_maps, vectors)  # as in photos that were not factorized
        sums = maps @ vectors
        kept = np.mean(_logits_of(network, sums).argmax(1) == predicted)
        if kept >= CONCEPTS_KEEP:
            break
    order = np.argsort(-maps.sum((0, 1, 2)), kind="stable")
    missing = np.sum((feature_maps - sums) ** 2) / np.sum(feature_maps**2)
    return Concepts(vectors[order], maps[..., order], float(1 - missing), float(kept))


def concept_maps(feature_maps, vectors, steps=30):
    """How strong each concept is at each position: (n, h, w, k) float32 >= 0.

    The non-negative sum of the (k, channels) vectors that is nearest to feature maps
    (n, h, w, channels), found one concept after the other.
    """
    products, overlaps = feature_maps @ vectors.T, vectors @ vectors.T
    maps = np.maximum(0, products)
    for _ in range(steps):
        _hals_update(maps, products, overlaps)
    return maps


def concept_shares(model, photo, found, class_index):
    """What each of the found Concepts adds to the logit of a class on a photo, and the rest.

    Returns (k,) float32 shares, in units of the logit, and the share of what no concept makes up:
    together they are the sum of the uncut Grad-CAM heatmap. Where the features go through a mean
    and one Dense layer, they are the logit without its bias.
    """
    network = network_of(model)
    last = network.heatmap_layer
    forward = partial(network.compute, names=[last, LOGITS])
    classes = np.array([[class_index]])
    ((feature_maps, weights),) = channel_weights(forward, network.as_batch(photo), classes)
    maps = concept_maps(feature_maps.numpy(), found.vectors)
    shares = _shares_of_classes(weights, found.vectors, maps)[0, 0]
    whole = np.sum(weights[0, 0] * feature_maps.numpy().sum((0, 1, 2)))
    return shares, float(whole - shares.sum())


def logit_falls(network, feature_maps, found, concept, class_index):
    """(n,) how far a class's logit falls without a concept in feature maps (n, h, w, channels)."""
    maps = concept_maps(feature_maps, found.vectors)
    without = feature_maps - maps[..., concept, None] * found.vectors[concept]
    falls = _logits_of(network, feature_maps) - _logits_of(network, without)
    return falls[:, class_index]


def draw_concepts(output, survey):
    """Draw for each class its strongest concepts, and the photos that hold most of each: [Picture].

    Nothing is drawn where there are none.
    """
    labels, rows = [], []
    for class_index in np.unique(survey.class_indices)[:CLASSES_DRAWN]:
        name = survey.class_names[class_index]
        for concept, share, fall in class_concepts(survey, class_index):
            labels.append(f"{name}\nconcept {concept}\n{percent(share)}\nlogit {-fall:+.1f}")
            rows.append(
                [_spotlight(survey, k, concept) for k in photos_of_concept(survey, concept)]
            )
    if not rows:
        return []
    caption = (
        "What speaks for each class: its strongest concepts, each in the photos that hold most\n"
        "concept, its share of all that speaks for the class, the change of the logit without it\n"
        f"{concept_truth(survey.concepts)}"
    )
    save_rows(output / "concepts.jpg", labels, rows, caption)
    return [Picture("concepts.jpg", caption)]


def draw_photo_concepts(output, survey, number):
    """Draw what the evidence for a photo's class is made of, and where it is known from: [Picture].

    number: of the photo. Of a mistake also for the true class. Nothing is drawn without concepts.
    """
    predicted, label = int(survey.probabilities[number].argmax()), int(survey.labels[number])
    shown = [predicted] if label in (-1, predicted) else [predicted, label]
    strongest = {
        class_index: strongest_shares(survey, number, class_index) for class_index in shown
    }
    if not strongest[predicted]:
        return []
    photo = survey.network.read_photo(survey.paths[number])
    labels, rows = ["the photo"], [[(in_square(photo, PATCH_SIDE), "")]]
    for class_index, concepts_of_class in strongest.items():
        for concept, share in concepts_of_class:
            name = survey.class_names[class_index]
            labels.append(f"for {name}\nconcept {concept}\n{percent(share)}")
            known = [k for k in photos_of_concept(survey, concept) if k != number][:3]
            here, _ = _spotlight(survey, number, concept)
            rows.append([(here, "here"), *(_spotlight(survey, k, concept) for k in known)])
    (concept, share), *_ = strongest[predicted]
    caption = (
        f"{survey.name(number)}: {survey.verdict(number)}. Of what speaks for "
        f"{survey.class_names[predicted]} {percent(share)} is concept {concept}\n"
        "where each concept lies in this photo, and in those that hold most of it\n"
        f"{concept_truth(survey.concepts)}"
    )
    save_rows(output / "CAM_concepts.jpg", labels, rows, caption)
    return [Picture("CAM_concepts.jpg", caption)]


def _non_negative_factor(activations, left, right):
    """The (k, channels) vectors of length 1 of which (n, channels) activations are sums.

    left: (k, n) and right: (k, channels), how to start. Alternating least squares, one concept
    after the other (HALS, Cichocki and Phan, 2009), which get as far in ten steps as the usual
    multiplicative updates in sixty.
    """
    weights, vectors = left.T.copy(), right.T.copy()
    for _ in range(FACTORIZATION_STEPS):
        _hals_update(weights, activations @ vectors, vectors.T @ vectors)
        _hals_update(vectors, activations.T @ weights, weights.T @ weights)
        lengths = np.linalg.norm(vectors, axis=0).clip(1e-12)
        vectors /= lengths
        weights *= lengths
    return vectors.T


def _hals_update(weights, products, overlaps):
    """A step of least squares: each column of (…, k) weights in turn takes its best value >= 0."""
    for k in range(len(overlaps)):
        missing = products[..., k] - weights @ overlaps[k]
        weights[..., k] += missing / max(overlaps[k, k], 1e-12)
        np.maximum(0, weights[..., k], out=weights[..., k])


def _nndsvd(activations, count):
    """Non-negative (count, n) and (count, channels) to start from.

    Of each of the first singular pairs the part, positive or negative, that holds more (NNDSVD,
    Boutsidis and Gallopoulos, 2008).
    """
    same_start = np.ones(min(activations.shape), "float32")
    left, strengths, right = scipy.sparse.linalg.svds(activations, count, v0=same_start)
    of_rows, of_columns = [], []
    for k in np.argsort(-strengths):
        row, column = _larger_part(left[:, k], right[k])
        # A little everywhere, as what is 0 on both sides would stay so.
        of_rows.append(strengths[k] * row + 1e-6)
        of_columns.append(column + 1e-6)
    return np.stack(of_rows).astype("float32"), np.stack(of_columns).astype("float32")


def _larger_part(row, column):
    """The positive parts of two vectors, or of their opposites, if these are longer together."""
    positive = np.maximum(0, row), np.maximum(0, column)
    negative = np.maximum(0, -row), np.maximum(0, -column)
    return max(positive, negative, key=lambda pair: np.prod([np.linalg.norm(it) for it in pair]))


def _logits_of(network, feature_maps):
    """The logits (n, classes) of feature maps (n, h, w, channels) of the last layer."""
    feature_maps = tf.constant(feature_maps)
    (logits,) = network.compute(feature_maps, [LOGITS], start=network.heatmap_layer)
    return logits.numpy()


def _spotlight(survey, number, concept):
    """A photo, lit where a concept lies and dark elsewhere: a square tile, and its class's name."""
    network, heatmap = survey.network, survey.concept_maps[number, ..., concept]
    photo = network.read_photo(survey.paths[number])
    light = placed(network, network.heatmap_layer, heatmap / (heatmap.max() or 1))
    light = cv2.resize(light, photo.shape[1::-1])[..., None]
    square = in_square((photo * (DARKEST + (1 - DARKEST) * light)).astype("uint8"), PATCH_SIDE)
    label = survey.labels[number]
    return square, survey.name(number) if label < 0 else survey.class_names[label]


def _shares_of_classes(weights, vectors, maps):
    """(n, classes, k) shares, from Grad-CAM's (n, classes, channels) weights of the channels."""
    logit_per_unit = weights @ vectors.T  # (n, classes, k)
    amount = maps.sum((1, 2))  # (n, k)
    return logit_per_unit * amount[:, None]


# ---- 10. Everything drawn ------------------------------------------------------------------------
# One pass over all photos, the survey, finds what the model says of each, where it looks, and where
# each filter fires most. Evaluation, examples and page are taken from it.

EXAMPLES_SHOWN = 3  # photos of known class with a picture each, where there are no own photos


def draw(model, photos, class_names, output, labels=None, *, seed=0, pixels=PIXELS[0], **settings):
    """Draw every picture, and the page that shows them, into the folder `output`.

    model: a Keras model or a Network. photos: paths. labels: the true class index of each photo, or
    None for one whose class is not known, as it is for all without labels. Photos without a label
    are all explained; only where there are none, examples of the others take their place.
    pixels: what the model was trained on, one of PIXELS. settings: see draw_survey. Raises Stop,
    naming what the model lacks, or where names, labels and classes do not match.
    """
    network = network_of(model, pixels)
    if network.class_count != len(class_names):
        raise Stop(f"The model has {network.class_count} classes, not {len(class_names)} names.")
    if network.remark:
        print(network.remark)
    survey = survey_photos(network, photos, labels, class_names, seed=seed)
    warn_of_pixels(survey, "The model", 'pixels="{}"')
    draw_survey(survey, output, seed=seed, **settings)


def draw_survey(
    survey,
    output,
    record=None,
    command="",
    seed=0,
    training=None,
    pattern_size=PATTERN_SIZE,
    pattern_steps=PATTERN_STEPS,
):
    """Draw every picture of a survey, and the page that shows them, into the folder `output`.

    record: {"history", "settings"} of the training, and command: that of the run, for the page.
    training: (paths, class indices) of training photos, for those that a photo is most like.
    pattern_size: pixels; pattern_steps: of the gradient ascent.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    explained = explain_chosen(survey)
    with Progress() as progress:
        patterns = find_patterns(survey.network, seed, progress, pattern_size, pattern_steps)
        pictures = draw_pictures(output, survey, explained, patterns, record, progress)
        nearest = nearest_photos(survey, training, seed) if training else None
        draw_page(output, survey, explained, pictures, record, command, progress, nearest)


def draw_pictures(output, survey, explained, patterns, record, progress):
    """Draw all pictures but the page's own sheets: {what they show: [Picture]}.

    explained: see explain_chosen. patterns: see find_patterns. The other arguments are those of
    draw_survey.
    """
    network, evaluation = survey.network, survey.evaluation
    own = [it for it in explained.values() if it.true_index is None]
    examples = [it for it in explained.values() if it.true_index is not None]
    shown = own or examples[:EXAMPLES_SHOWN]
    tell = progress.tell_pictures
    pictures = {"layers": tell(draw_grids(output, network, shown[0])), "filters": []}
    for it in patterns:
        pictures["filters"] += tell(draw_patterns(output, it))
    with_photos = network.nearest_convolutions(EXAMPLE_CONVOLUTIONS) if evaluation else []
    for it in patterns:
        if it.convolution in with_photos:
            peaks = survey.peaks[it.convolution.activation]
            pictures["filters"] += tell(draw_examples(output, network, it, peaks, survey.paths))
    pictures["heatmaps"] = tell(draw_heatmaps(output, network, shown))
    pictures["blocks"] = tell(draw_blocks(output, network, shown[0]))
    pictures["concepts"] = tell(draw_concepts(output, survey))
    puzzling = _photo_to_take_apart(survey, explained)
    pictures["concepts"] += tell(draw_photo_concepts(output, survey, puzzling))
    if evaluation:
        pictures["mistakes"] = tell(draw_mistakes(output, network, examples))
        pictures["evaluation"] = tell(draw_evaluation(output, evaluation, record))
    if record:
        pictures["learning"] = tell(draw_learning(output, network, record))
    pictures["strip"] = tell(draw_strip(output, network, shown[0], patterns))
    return pictures


def draw_strip(output, network, explanation, patterns):
    """Draw the run at a glance: a photo, activations, patterns and a heatmap: [Picture]."""
    grid = _last_but_one(network.nearest_convolutions(GRID_CONVOLUTIONS))
    pattern = _last_but_one(patterns)
    sheet = activation_grid(network, explanation.pixels, grid.layer)
    activations = _corner(sheet, min(GRID_COLUMNS, grid.channels))
    sheet = tile(pattern.pictures, PATTERN_COLUMNS, frames=120)
    patterns = _corner(sheet, min(PATTERN_COLUMNS, len(pattern.pictures)))
    middle = {
        f"activations, convolution {grid.number}": activations,
        f"what filters look for, convolution {pattern.convolution.number}": patterns,
    }
    title = f"where it looks for {explanation.class_name}"
    heatmap = placed(network, network.heatmap_layer, explanation.heatmap)
    overlay = Panel(explanation, title, heatmap)
    save_strip(output / "strip.jpg", Panel(explanation, "a photo"), overlay, middle)
    return [Picture("strip.jpg", ", ".join(["A photo", *middle, title]))]


def _photo_to_take_apart(survey, explained):
    """The number of the photo whose evidence is drawn: an own one, or the worst mistake."""
    numbers = list(explained)
    mistakes = [number for number in numbers if explained[number].is_mistake]
    return numbers[0] if survey.own_count else [*mistakes, *numbers][0]


def _last_but_one(items):
    """The last but one: neither the plainest nor the noisiest; the only one where there is one."""
    return items[max(0, len(items) - 2)]


def _corner(sheet, columns):
    """A square of whole tiles from the top left corner of a sheet of so many columns."""
    side = sheet.shape[1] // columns
    tiles = max(1, min(400, *sheet.shape[:2]) // side)
    return sheet[: tiles * side, : tiles * side]


# ==================================================================================================
# The workshop: the tools that the chapter above uses. It may be skipped.
# ==================================================================================================

# ---- A classifier as a graph ---------------------------------------------------------------------
# A Keras model is a graph: nodes that call a layer on tensors. Whatever the pictures need to know
# of a model (which layers there are, in which order, where their positions look) is read off that
# graph, so that they can be drawn for any convolutional classifier, nested base models included.

PHOTO = "(photo)"  # by which Network.compute knows the photo as the model takes it
LOGITS = "(logits)"  # by which Network.compute knows the scores that softmax takes
CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
ACTIVATIONS = (layers.Activation, layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU)
MOST_BLOCKS = 11  # as many as InceptionV3 has
INPUT = 0  # the number of the tensor that goes into a network


@dataclass(frozen=True)
class Convolution:
    """A convolution of a model, by its place among all of them in the order of the graph."""

    number: int  # counted from 1
    count: int
    layer: str
    activation: str  # the layer whose output tells whether a filter fires
    channels: int

    def __str__(self):
        return f"convolution {self.number} of {self.count} (layer {self.layer})"


@dataclass(eq=False)
class Step:
    """A call of a layer in a classifier's graph, from numbered tensors to numbered tensors."""

    name: str
    operation: object  # a layer, or another Keras operation
    sources: list  # numbers of the tensors that go in
    results: list  # numbers of the tensors that come out
    call: object  # a function of the tensors that go in: the list of those that come out


def network_of(model, pixels=PIXELS[0]):
    """The Network, in float32, of a Keras model that was trained on these pixels.

    A Network stays as it is.
    """
    if isinstance(model, Network):
        return model
    network = Network(model, pixels=pixels)
    kinds = {getattr(step.operation, "compute_dtype", "float32") for step in network.steps}
    return network if kinds == {"float32"} else Network(in_float32(model), pixels=pixels)


class Network:
    """All that the pictures need to know of a classifier of photos, read off its graph.

    It takes (n, height, width, 3) RGB, 0–255, and turns them into what the model was trained on:
    one of PIXELS, and grey where it has one channel. An input of open size becomes open_side ×
    open_side. Nested models are unfolded into one list of steps, in inference; where two layers
    have one name, the later is called name_b here. The logits are found whether the model ends in a
    softmax or in sigmoids, as activation or as layer, or in logits; several sigmoids give each
    class a probability of its own (is_multi_label), a single one, p, gives two classes, 1 - p and
    p. The model itself is never changed. Raises Stop, naming what it lacks.
    """

    def __init__(self, model, open_side=299, pixels=PIXELS[0]):
        shape, outputs = getattr(model, "input_shape", None), getattr(model, "outputs", None) or []
        needed = "The pictures need a"
        if len(outputs) != 1 or isinstance(shape, list | dict):
            raise Stop(f"{needed} functional or Sequential model of one input and one output.")
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise Stop(f"{needed} model that takes RGB or grey photos; this one takes {shape[1:]}.")
        self.input_size = tuple(side or open_side for side in shape[1:3])  # height, width in pixels
        self.is_grey, self.pixels = shape[3] == 1, pixels
        self.steps = [first_step(pixels, self.is_grey)]
        _unfold(model, self.steps[0].results, self.steps)
        photos = np.random.default_rng(0).uniform(0, 255, (4, *self.input_size, 3))
        photos = tf.constant(photos, tf.float32)
        outputs = model.output_shape[-1]
        step, activation, self.remark = _logits_step(self.steps, model.output_shape, photos)
        self.steps.append(step)
        self.class_count = max(2, outputs)
        self.is_multi_label = activation is keras.activations.sigmoid and outputs > 1
        self._by_name = {step.name: step for step in self.steps}

    def compute(self, inputs, names, start=None, folded=False):
        """The outputs of the layers of these names, or LOGITS, as tensors to be differentiated.

        inputs: photos (n, height, width, 3), or the output of the layer `start`, if all that is
        asked depends on it alone. folded: BatchNormalization is computed within the convolution
        before it, which is a fifth faster. Raises Stop for a layer that the model lacks.
        """
        lacking = [name for name in names if name not in self._by_name]
        if lacking:
            last = ", ".join(list(self._by_name)[-9:-1])
            raise Stop(f"The model has no layer {lacking[0]}. It has {last}, …")
        calls = self._folded_calls(names) if folded else {}
        first = self._by_name[start].results[0] if start else INPUT
        tensors = {first: inputs if start else tf.cast(inputs, tf.float32)}
        wanted = [self._by_name[name].results[0] for name in names]
        _run(self._steps_between(first, wanted), tensors, calls)
        return [tensors[number] for number in wanted]

    def activations(self, photos, names):
        """What some layers put out for photos (n, height, width, 3): [(n, h, w, channels)]."""
        return [output.numpy() for output in self.compute(photos, names)]

    def probabilities(self, photos):
        """(n, classes) float32 for photos (n, height, width, 3) RGB, 0–255."""
        (logits,) = self.compute(photos, [LOGITS])
        return self.to_probabilities(logits).numpy()

    def to_probabilities(self, logits):
        """Probabilities (n, classes), each of its own in a multi-label model, else with sum 1."""
        return tf.sigmoid(logits) if self.is_multi_label else tf.nn.softmax(logits)

    def read_photo(self, path, at_least=None):
        """A photo as read_photo reads it, grey where the model takes grey ones."""
        photo = read_photo(path, at_least)
        if not self.is_grey:
            return photo
        return np.asarray(Image.fromarray(photo).convert("L").convert("RGB"))

    def as_seen(self, images):
        """RGB images (n, height, width, 3), grey where the model takes grey ones."""
        if not self.is_grey:
            return images
        return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(images))

    def as_batch(self, photo):
        """A (height, width, 3) photo as a batch of one float32 photo of the network's size.

        Raises Stop for what has another shape, such as a path, or a batch.
        """
        shape = np.shape(photo)
        if len(shape) != 3 or shape[2] != 3:
            given = shape or f"a {type(photo).__name__}"
            raise Stop(f"A photo must be (height, width, 3), see read_photo; this one is {given}.")
        photo = tf.convert_to_tensor(photo, tf.float32)[None]
        return tf.image.resize(photo, self.input_size, antialias=True)

    @cached_property
    def shapes(self):
        """{number of a tensor: its shape, without that of photos}, found by a black photo."""
        tensors = {INPUT: tf.zeros((1, *self.input_size, 3))}
        _run(self.steps, tensors)
        return {number: tuple(tensor.shape[1:]) for number, tensor in tensors.items()}

    def shape(self, name):
        """The shape of what a layer puts out for a photo: (rows, columns, channels)."""
        return self.shapes[self._by_name[name].results[0]]

    def positions(self, name):
        """The (rows, columns) of a layer's feature maps."""
        return self.shape(name)[:2]

    @cached_property
    def receptive_fields(self):
        """{layer name: ReceptiveField} of all layers with positions, in the order of the graph.

        See Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks"
        (Distill, 2019). InceptionV3 does not pad its strided layers, so that its positions look at
        the inner part of the photo; models that pad look elsewhere again.
        """
        by_number = {INPUT: ReceptiveField((0, 0), (1, 1), (1, 1))}
        by_layer = {}
        for step in self.steps:
            sources = [number for number in step.sources if number in by_number]
            before = [(self.shapes[number][:2], by_number[number]) for number in sources]
            after = self.shapes[step.results[0]]
            if before and _keeps_positions(step.operation, before[0][0], after):
                field = _field_after(step.operation, before, after[:2])
                by_number |= dict.fromkeys(step.results, field)
                if len(after) == 3:
                    by_layer[step.name] = field
        return by_layer

    @cached_property
    def convolutions(self):
        """All convolutions whose output has positions, in the order of the graph."""
        kinds = [step for step in self.steps if isinstance(step.operation, CONVOLUTIONS)]
        found = [step for step in kinds if step.name in self.receptive_fields]
        chosen = []
        for number, step in enumerate(found, start=1):
            names, channels = (step.name, self._activation_of(step)), self.shapes[step.results[0]]
            chosen.append(Convolution(number, len(found), *names, channels[-1]))
        return chosen

    def convolution(self, name):
        """The Convolution of this name. Raises Stop if there is none."""
        for convolution in self.convolutions:
            if convolution.layer == name:
                return convolution
        names = ", ".join(convolution.layer for convolution in self.convolutions[:8])
        raise Stop(f"The model has no convolution {name}. Its convolutions are {names}, …")

    def nearest_convolutions(self, numbers):
        """The convolutions of these numbers, or the nearest that a smaller model has."""
        if not self.convolutions:
            raise Stop("The pictures need a model with convolutions; this one has none.")
        count = len(self.convolutions)
        chosen = sorted({min(number, count) for number in numbers})
        return [self.convolutions[number - 1] for number in chosen]

    @cached_property
    def heatmap_layer(self):
        """The name of the last layer with positions whose output alone feeds all that follows.

        It is the usual layer for Grad-CAM. A layer with a single position, which tells no place, is
        taken only if there is no other.
        """
        names = [name for name in self._bottlenecks() if name in self.receptive_fields]
        several = [name for name in names if math.prod(self.positions(name)) > 1]
        return (several or names)[-1]

    @cached_property
    def blocks(self):
        """Names of the layers that end the model's blocks, at most MOST_BLOCKS, evenly chosen.

        They are merges (add or concatenate) that do not just feed another merge; in a model without
        merges the last layer of each resolution.
        """
        fields = self.receptive_fields
        merges = [step for step in self.steps if _merges(step) and step.name in fields]
        ends = [it for it in merges if not all(map(_merges, self._consumers[it.results[0]]))]
        names = [step.name for step in ends]
        if not names:
            start = list(fields).index(self.convolutions[0].layer)
            of_resolution = {self.positions(name): name for name in list(fields)[start:]}
            names = list(of_resolution.values())
        chosen = np.linspace(0, len(names) - 1, min(MOST_BLOCKS, len(names))).round().astype(int)
        return [names[index] for index in chosen]

    @cached_property
    def heatmap_layers(self):
        """The ends of the blocks, and at last the layer whose heatmap every photo has."""
        last = self.heatmap_layer
        return [*(name for name in self.blocks if name != last), last]

    @cached_property
    def _consumers(self):
        """{number of a tensor: the steps that take it}"""
        consumers = {number: [] for step in self.steps for number in step.results}
        for step in self.steps:
            for source in step.sources:
                consumers.setdefault(source, []).append(step)
        return consumers

    def _steps_between(self, first, wanted):
        """The steps from the tensor `first` to the wanted ones, in order."""
        needed, chosen = set(wanted), []
        for step in reversed(self.steps):
            if first not in step.results and not needed.isdisjoint(step.results):
                needed.update(step.sources)
                chosen.append(step)
        return reversed(chosen)

    def _activation_of(self, step):
        """The layer that activates a convolution's output, through its BatchNormalization.

        Where none does (the convolution has an activation of its own, or a merge comes first): the
        BatchNormalization, or without one the convolution.
        """
        while True:
            following = self._consumers[step.results[0]]
            if len(following) != 1:
                return step.name
            (after,) = following
            if isinstance(after.operation, ACTIVATIONS):
                return after.name
            if not isinstance(after.operation, layers.BatchNormalization):
                return step.name
            step = after

    def _bottlenecks(self):
        """Names of the layers that no connection bypasses: all later ones depend on them alone."""
        last_use = {source: k for k, step in enumerate(self.steps) for source in step.sources}
        names, needed_until = [], last_use[INPUT]  # how far down the outputs of earlier ones go
        for k, step in enumerate(self.steps):
            if needed_until <= k:
                names.append(step.name)
            needed_until = max(needed_until, *(last_use.get(it, 0) for it in step.results))
        return names

    @cached_property
    def _foldable(self):
        """{convolution's step: (its normalization's step, a call that does the work of both)}"""
        uses = [step.operation for step in self.steps]
        found = {}
        for step in self.steps:
            following = self._consumers[step.results[0]]
            linear = getattr(step.operation, "activation", None) is keras.activations.linear
            if type(step.operation) is not layers.Conv2D or not linear or len(following) != 1:
                continue
            (after,) = following
            if not isinstance(after.operation, layers.BatchNormalization):
                continue
            shared = uses.count(step.operation) > 1 or uses.count(after.operation) > 1
            if not shared and after.operation.axis in (-1, 3):  # channels
                with tf.init_scope():  # its weights are made once, also while a function is traced
                    found[step] = after, _normalized(step.operation, after.operation)
        return found

    def _folded_calls(self, names):
        """{step: another call}, by which BatchNormalization is computed within convolutions.

        What a convolution that is asked for puts out itself must stay as it is.
        """
        calls = {}
        for step, (normalization, both) in self._foldable.items():
            if step.name not in names:
                calls[step] = both
                calls[normalization] = lambda tensor: [tensor]
        return calls


def first_step(pixels, is_grey):
    """The Step from 0–255 RGB to what a model was trained on: one of PIXELS, and maybe grey.

    Raises Stop for other pixels, and for those of three colours where the model takes one.
    """
    if pixels not in PIXELS:
        raise Stop(f"pixels: must be one of {', '.join(PIXELS)}, not {pixels}")
    if is_grey and pixels in PIXELS_OF_COLOURS:
        raise Stop(f"A model of grey photos has no pixels of the kind {pixels}, which has colours.")

    def call(photos):
        photos = tf.image.rgb_to_grayscale(photos) if is_grey else photos
        if pixels == "0..1":
            photos = photos / 255
        elif pixels != "0..255":
            photos = keras.applications.imagenet_utils.preprocess_input(photos, mode=pixels)
        return [photos]

    return Step(PHOTO, None, [INPUT], [INPUT + 1], call)


@dataclass(frozen=True)
class ReceptiveField:
    """Where a layer's positions look, in pixels of the model's input: (rows, columns) each."""

    centre: tuple  # of the first position; the centre of pixel k is k
    stride: tuple  # from one position to the next
    size: tuple  # what a position can see

    def place(self, position):
        """The middle (y, x) of what a position sees, where pixel k lies between k and k + 1.

        position: (row, column), or a fraction between positions.
        """
        y, x = np.array(self.centre) + 0.5 + np.array(position) * self.stride
        return float(y), float(x)

    def after_window(self, kernel, strides, padding):
        """The field after a window of this kernel size; padding: positions put before the first."""
        centre, stride, size = map(np.array, (self.centre, self.stride, self.size))
        kernel, strides, padding = map(np.array, (kernel, strides, padding))
        centre = centre + ((kernel - 1) / 2 - padding) * stride
        size = size + (kernel - 1) * stride
        stride = stride * strides
        return ReceptiveField(*(tuple(it.tolist()) for it in (centre, stride, size)))


def require_finite(*arrays):
    """Raises Stop where an array holds nan or infinity."""
    if not all(np.isfinite(array).all() for array in arrays):
        reason = "what it computes for a photo are no finite numbers"
        remedy = "Train one with a smaller --learning-rate."
        raise Stop(f"The model is of no use: {reason}.\n{remedy}", exit_code=1)


def _run(steps, tensors, calls=None):
    """Put what comes out of steps into tensors, {number: tensor}. calls: {step: another call}"""
    for step in steps:
        call = (calls or {}).get(step, step.call)
        results = call(*(tensors[source] for source in step.sources))
        tensors.update(zip(step.results, results, strict=True))


def _unfold(model, sources, steps):
    """Append the steps of a model's graph, and of the models in it: the numbers of its outputs."""
    numbers = dict(zip(map(id, model.inputs), sources, strict=True))
    for node in _nodes(model.outputs):
        if node.is_input:
            continue
        entering = [numbers[id(tensor)] for tensor in node.input_tensors]
        if isinstance(node.operation, keras.Model) and getattr(node.operation, "inputs", None):
            leaving = _unfold(node.operation, entering, steps)
        else:
            start = _next_number(steps)
            leaving = list(range(start, start + len(node.outputs)))
            name = node.operation.name
            while any(step.name == name for step in steps):
                name += "_b"
            steps.append(Step(name, node.operation, entering, leaving, _caller(node)))
        numbers.update(zip(map(id, node.outputs), leaving, strict=True))
    return [numbers[id(tensor)] for tensor in model.outputs]


def _next_number(steps):
    """The number of the tensor after those of these steps."""
    return INPUT + 1 + sum(len(step.results) for step in steps)


def _nodes(outputs):
    """The nodes that these tensors come from, each after its inputs.

    Branches come in the order they are merged. For the models of keras.applications that is the
    order in which their layers were created; model.layers is sorted by depth instead.
    """
    ordered, done = [], set()
    waiting = [_node_of(output) for output in reversed(outputs)]
    while waiting:  # no recursion: deep models exceed the depth that Python allows
        node = waiting[-1]
        missing = next((it for it in map(_node_of, node.input_tensors) if it not in done), None)
        if missing:
            waiting.append(missing)
            continue
        waiting.pop()
        if node not in done:
            ordered.append(node)
            done.add(node)
    return ordered


# What is private in Keras is touched in the next two functions alone.


def _node_of(tensor):
    """The node that a tensor is an output of."""
    layer, node_index, _ = tensor._keras_history
    return layer._inbound_nodes[node_index]


def _caller(node):
    """A function of a node's input tensors: calls its layer in inference, returns its outputs."""
    operation, options = node.operation, {}
    if type(operation) is layers.Conv2D and operation.groups > 1:
        return lambda tensor: [_convolved(operation, tensor)]
    if "training" in inspect.signature(operation.call).parameters:
        options = {"training": False}  # layers that augment photos do so by default

    def call(*tensors):
        values = dict(zip(map(id, node.input_tensors), tensors, strict=True))
        arguments, named = node.arguments.fill_in(values)
        return tf.nest.flatten(operation(*arguments, **named | options))

    return call


def _logits_step(steps, output_shape, photos):
    """The Step to the logits (n, classes), the activation that takes them, and a remark or "".

    steps: of the model, whose outputs have this shape. Where it ends in something else than a
    softmax, sigmoids or logits, the outputs for some photos tell what they are, as the remark says.
    Raises Stop where they are no scores of classes.
    """
    last, count, remark = steps[-1], output_shape[-1], ""
    if any(side != 1 for side in output_shape[1:-1]):
        raise Stop("The pictures need a model that gives a photo one score a class, not a map.")
    head = _head(steps)
    source, to_logits, activation = _before_activation(head)
    if head is not last or activation is None:
        tensors = {INPUT: photos}
        _run(steps, tensors)
        outputs = tf.reshape(tensors[last.results[0]], (-1, count))
        if activation:
            expected = activation(tf.reshape(to_logits(tensors[source]), (-1, count)))
        if activation is None or not np.allclose(expected, outputs, atol=1e-5):
            source = last.results[0]
            to_logits, activation, remark = _told_by_outputs(last.operation, outputs.numpy())

    def call(features):
        logits = tf.reshape(to_logits(features), (-1, count))
        if count == 1:  # softmax(-z/2, z/2) = (1 - sigmoid(z), sigmoid(z))
            logits = tf.concat([-logits / 2, logits / 2], axis=-1)
        return [logits]

    return Step(LOGITS, None, [source], [last.results[-1] + 1], call), activation, remark


def _head(steps):
    """The last step that changes values: those after it only change the shape."""
    producers = {number: step for step in steps for number in step.results}
    head = steps[-1]
    while _passes_values_on(head.operation):
        head = producers[head.sources[0]]
    return head


def _passes_values_on(operation):
    if isinstance(operation, layers.Activation):
        return operation.activation is keras.activations.linear
    shaping = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout")  # Dropout: in training only
    return type(operation).__name__ in shaping  # layers, and operations of keras.ops


def _before_activation(head):
    """(number of a tensor, a function from it to the logits, the activation that takes them).

    The activation is None where the step is neither a softmax nor a sigmoid, nor a linear layer.
    """
    layer, source = head.operation, head.sources[0]
    kind = type(layer).__name__
    if kind in ("Softmax", "Sigmoid"):  # layers, and operations of keras.ops
        return source, tf.identity, getattr(keras.activations, kind.lower())
    activation = getattr(layer, "activation", None)
    if activation in (keras.activations.softmax, keras.activations.sigmoid):
        if isinstance(layer, layers.Activation):
            return source, tf.identity, activation
    elif activation is not keras.activations.linear:
        return source, tf.identity, None
    if isinstance(layer, layers.Dense | layers.Conv2D):
        return source, partial(_linear, layer), activation
    return source, tf.identity, None


def _told_by_outputs(operation, outputs):
    """(a function from outputs to logits, the activation that takes them, a remark).

    outputs: (n, outputs) of a model for some photos, whose last step is of no known kind.
    """
    kind = type(operation).__name__
    if (outputs >= 0).all() and np.allclose(outputs.sum(1), 1, atol=1e-3):
        remark = f"It ends in {kind}: as what it puts out adds up to 1, it is taken as probability."
        return _logarithm, keras.activations.softmax, remark
    if (outputs < 0).any() and not hasattr(operation, "activation"):
        remark = f"It ends in {kind}: as what it puts out is negative too, it is taken as logits."
        return tf.identity, keras.activations.linear, remark
    needed = "The pictures need a model that ends in a softmax, in sigmoids or in logits"
    raise Stop(f"{needed}; this one ends in {kind}.")


def _logarithm(probabilities):
    return tf.math.log(tf.maximum(probabilities, 1e-30))


def _linear(layer, features):
    """What a Dense layer or a convolution puts out without its activation."""
    multiply = getattr(layer, "convolution_op", tf.matmul)
    logits = multiply(features, layer.kernel)
    return logits + layer.bias if layer.use_bias else logits


def _merges(step):
    """Whether a step joins branches, and does not just add a constant."""
    return type(step.operation).__name__ in ("Add", "Concatenate") and len(step.sources) > 1


def _normalized(convolution, normalization):
    """A call that does what these two layers do one after the other in inference.

    BatchNormalization then only scales and shifts each channel, as a convolution with scaled
    weights and a shifted bias does.
    """
    settings = convolution.get_config() | {"use_bias": True, "activation": None}
    both = layers.Conv2D.from_config(settings)
    both.build((None, None, None, convolution.kernel.shape[2] * convolution.groups))
    scale = (normalization.moving_variance + normalization.epsilon) ** -0.5
    scale = scale * normalization.gamma if normalization.scale else scale
    shift = -normalization.moving_mean * scale
    shift = shift + normalization.beta if normalization.center else shift
    shift = shift + convolution.bias * scale if convolution.use_bias else shift
    both.set_weights([convolution.kernel * scale, shift])
    return lambda tensor: [_convolved(both, tensor)]


def _convolved(layer, tensor):
    """What a Conv2D puts out, group by group where it has several.

    Keras leaves groups to XLA, whose gradient takes a hundred times as long on a CPU.
    """
    groups, channels = layer.groups, tensor.shape[-1]
    of_stock = layer.compute_dtype == "float32" and layer.data_format == "channels_last"
    if groups == 1 or not of_stock:
        return layer(tensor)
    window = {name: getattr(layer, name) for name in ("strides", "padding", "dilation_rate")}
    if groups == channels and len(set(layer.strides)) == 1:
        kernel = tf.reshape(layer.kernel, (*layer.kernel_size, channels, -1))
        output = keras.ops.depthwise_conv(tensor, kernel, **window)
    else:
        pieces = zip(*(tf.split(it, groups, axis=-1) for it in (tensor, layer.kernel)), strict=True)
        output = tf.concat([keras.ops.conv(*piece, **window) for piece in pieces], axis=-1)
    return layer.activation(output + layer.bias if layer.use_bias else output)


def _keeps_positions(layer, before, after):
    """Whether a layer's output of shape `after`, without n, has positions in the photo.

    before: the (rows, columns) that go in. A layer that gathers all positions into one looks at no
    place. What happens to channels alone (slices, stacks) keeps the positions, also without an axis
    of channels.
    """
    if len(after) == 2:
        return after == before
    gathering = layers.GlobalAveragePooling2D | layers.GlobalMaxPooling2D
    if len(after) != 3 or isinstance(layer, gathering):
        return False
    windows = hasattr(layer, "kernel_size") or hasattr(layer, "pool_size")
    return windows or after[:2] != (1, 1) or before == (1, 1)


def _field_after(layer, before, after):
    """The receptive field of a layer's output, from what goes in.

    before: [((rows, columns), ReceptiveField)]; after: (rows, columns).
    """
    sides, field = before[0]
    if isinstance(layer, layers.ZeroPadding2D):
        return field.after_window((1, 1), (1, 1), [pair[0] for pair in layer.padding])
    if isinstance(layer, layers.Cropping2D):
        return field.after_window((1, 1), (1, 1), [-pair[0] for pair in layer.cropping])
    if isinstance(layer, layers.CenterCrop | layers.RandomCrop):
        return field.after_window((1, 1), (1, 1), -((np.array(sides) - after) // 2))
    window = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
    if window and not isinstance(layer, layers.Conv2DTranspose):
        dilation = getattr(layer, "dilation_rate", 1)
        kernel = (np.array(window) - 1) * dilation + 1
        padding = np.zeros(2, int)
        if layer.padding == "same":  # as TensorFlow pads: half of what is missing, rounded down
            missing = (np.array(after) - 1) * layer.strides + kernel - sides
            padding = np.maximum(missing, 0) // 2
        return field.after_window(kernel, layer.strides, padding)
    if sides != after:  # resized in a way unknown here: taken as evenly stretched
        scale = np.array(sides) / after
        return field.after_window((1, 1), scale, (1 - scale) / 2)
    return _union([field for sides, field in before if sides == after])


def _union(fields):
    """The smallest receptive field that covers several, as after a merge."""
    centres = np.array([field.centre for field in fields])
    reaches = (np.array([field.size for field in fields]) - 1) / 2
    start, end = (centres - reaches).min(0), (centres + reaches).max(0)
    centre, size = ((start + end) / 2).tolist(), (end - start + 1).tolist()
    return ReceptiveField(tuple(centre), fields[0].stride, tuple(size))


# ---- Grad-CAM of many photos ---------------------------------------------------------------------


def uncut_grad_cam(forward, inputs, classes):
    """Grad-CAM of many photos at once, for k classes each: (n, k, h, w) float32 for each layer.

    Negative values, which grad_cam cuts at 0, are what speaks against a class. Uncut, the map is
    linear in the logit: the difference of two is that of the difference of their logits.

    forward: a function of the inputs, a tensor (n, …), that returns the feature maps of one layer
    or more, (n, h, w, channels), and then the logits. classes: (n, k) indices.
    """
    found = channel_weights(forward, inputs, classes)
    return [weighted_sum(feature_maps, weights) for feature_maps, weights in found]


def channel_weights(forward, inputs, classes):
    """Grad-CAM's weights of the channels, for k classes of n photos: for each layer a pair.

    Its feature maps (n, h, w, channels), and (n, k, channels), how much each channel raises the
    logit: its gradient's mean over the positions. The arguments are those of uncut_grad_cam.
    """
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        *features, logits = forward(inputs)
        # A photo changes only its own logit, so the gradient of the sum is each photo's own.
        sums = [tf.reduce_sum(tf.gather(logits, column, batch_dims=1)) for column in classes.T]
    weights = [[] for _ in features]
    for logit_sum in sums:
        gradients = tape.gradient(logit_sum, features, unconnected_gradients="zero")
        for of_layer, gradient in zip(weights, gradients, strict=True):
            of_layer.append(tf.reduce_mean(gradient, axis=(1, 2)).numpy())
    return [(features[k], np.stack(of_layer, axis=1)) for k, of_layer in enumerate(weights)]


def weighted_sum(feature_maps, weights):
    """Feature maps (n, h, w, channels) summed with (n, k, channels) weights: (n, k, h, w)."""
    return tf.einsum("nhwc,nkc->nkhw", feature_maps, weights).numpy()


def heatmaps_of(network, photos, labels):
    """[(probability, (h, w) heatmap)] of the true classes of (n, height, width, 3) photos."""
    last = network.heatmap_layer
    (feature_maps,) = network.compute(photos, [last])
    from_features = partial(network.compute, names=[last, LOGITS], start=last)
    _, logits = from_features(feature_maps)
    probabilities = network.to_probabilities(logits).numpy()[np.arange(len(labels)), labels]
    (uncut,) = uncut_grad_cam(from_features, feature_maps, labels[:, None])
    return list(zip(probabilities.tolist(), np.maximum(0, uncut[:, 0]), strict=True))


# ---- Checkpoints, and the machine ----------------------------------------------------------------

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


class Checkpoints(keras.callbacks.Callback):
    """Keeps whole epochs in a folder, so that an interrupted run can go on.

    A checkpoint is one .keras file with weights, optimizer, settings and history. Unlike Keras's
    BackupAndRestore it is never written in place. The last two epochs stay, in case the last cannot
    be read, and with each the epoch that was the best by then. Raises Stop where the loss is NaN.

    watched: photos (n, height, width, 3) and their labels (n,). Before the first epoch and after
    each, where the model looks for their class is added to `looks`; see heatmaps_of.
    """

    RECORD = "record.json"  # in the file, beside what Keras writes: settings, history and looks

    def __init__(self, folder, settings, watched=None):
        super().__init__()
        self.folder, self.settings, self.watched = folder, settings, watched
        self.run_name = f"{time.time_ns():x}"  # sorts later runs after earlier ones
        self.history = {name: [] for name in METRICS}
        self.looks = {"probabilities": [], "heatmaps": []}

    @property
    def epochs(self):
        """How many epochs are done."""
        return len(self.history["loss"])

    @property
    def best_epoch(self):
        """The epoch of the lowest validation loss, counted from 1; 0 before the first."""
        return int(np.argmin(self.history["val_loss"])) + 1 if self.epochs else 0

    def file_of(self, epoch):
        return self.folder / f"{self.run_name}_epoch_{epoch:03}.keras"

    def on_train_begin(self, logs=None):
        if self.watched:
            self.network = Network(self.model)
            if not self.looks["heatmaps"]:
                self.looks = self._looks_now()

    def _looks_now(self):
        """The looks so far, and those of now."""
        if self.watched is None:
            return self.looks
        found = heatmaps_of(self.network, *self.watched)
        probabilities = [round(probability, 4) for probability, _ in found]
        heatmaps = [np.round(heatmap, 5).tolist() for _, heatmap in found]
        return {
            "probabilities": [*self.looks["probabilities"], probabilities],
            "heatmaps": [*self.looks["heatmaps"], heatmaps],
        }

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            rate = f"at learning rate {float(self.model.optimizer.learning_rate):.2g}"
            best = printable(self.file_of(self.best_epoch))
            kept = f"Best weights so far: {best}. " if self.epochs else ""
            remedy = f"{kept}Train with a smaller --learning-rate."
            raise Stop(f"The loss became NaN in epoch {epoch + 1} {rate}.\n{remedy}", exit_code=1)
        history = {name: [*values, float(logs[name])] for name, values in self.history.items()}
        looks = self._looks_now()
        record = json.dumps({"settings": self.settings, "history": history, "looks": looks})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(self.file_of(epoch + 1)) as partial_path:
            self.model.save(partial_path)
            with zipfile.ZipFile(partial_path, "a") as archive:
                archive.writestr(self.RECORD, record)
        before = {self.epochs, self.best_epoch}
        self.history, self.looks = history, looks
        kept = {self.file_of(number) for number in before | {self.epochs, self.best_epoch}}
        for file in set(self.folder.glob("*.keras")) - kept:
            file.unlink()

    def newest(self):
        """Yield (file, record) of each epoch that can be read, the newest one first."""
        for file in sorted(self.folder.glob("*_epoch_*.keras"), reverse=True):
            try:
                with zipfile.ZipFile(file) as archive:
                    record = json.loads(archive.read(self.RECORD))
                yield file, {name: record[name] for name in ("settings", "history", "looks")}
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                print(f"{printable(file)}: cannot be read; the epoch before it is tried.")

    def resume(self, model):
        """Load the newest epoch that can be read into an uncompiled model.

        Raises Stop if there is none, or its settings differ.
        """
        folder = printable(self.folder)
        for file, record in self.newest():
            settings = record["settings"]
            different = [
                f"{name} {settings.get(name)}, not {value}"
                for name, value in self.settings.items()
                if settings.get(name) != value
            ]
            if different:
                message = f"--resume: the run in {folder} had {'; '.join(different)}."
                raise Stop(f"{message}\nGive the same, or leave out --resume to start a new run.")
            try:
                model.load_weights(file)
            except Exception:  # a damaged file can fail in many ways
                print(f"{printable(file)}: cannot be read; the epoch before it is tried.")
                continue
            self.run_name = file.name.partition("_epoch_")[0]
            self.history, self.looks = record["history"], record["looks"]
            return
        message = f"--resume: no epoch in {folder} can be read."
        raise Stop(f"{message}\nLeave out --resume to start a new run.")


def prepare_libraries():
    """Set what a settings file may say otherwise: a model that is saved so could not be drawn."""
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def tell_of_unused_gpu(gpus, driver="/proc/driver/nvidia", programs=None):
    """Print how TensorFlow is to see an NVIDIA card where there is one and it sees none.

    gpus: those that it sees; programs: the folders in which nvidia-smi may lie, as in $PATH.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # on purpose
    card = Path(driver).exists() or shutil.which("nvidia-smi", path=programs)
    if card and not gpus and not hidden:
        install = f'pip install "tensorflow[and-cuda]=={tf.__version__}"'
        print(f"The NVIDIA card is not used: {install} makes it seen, on Windows only in WSL2.")


def half_precision():
    """Keras's dtype policy for half precision, or for full where the machine lacks it."""
    if tf.config.list_physical_devices("GPU"):
        return "mixed_float16"
    if _computes_in_bfloat16():
        return "mixed_bfloat16"
    print("--mixed-precision: no GPU, nor a CPU known to compute in bfloat16; float32 is used.")
    return "float32"


@contextlib.contextmanager
def bfloat16_where_fast():
    """Convolve in bfloat16 on CPUs that are made for it: a third faster, and no eye sees it."""
    option = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: _computes_in_bfloat16()})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: False})


def training_strategy():
    """Mirrors the model over all GPUs (or logical CPUs) where there are several."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def _computes_in_bfloat16():
    """Whether the CPU is known to have instructions for bfloat16."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.is_file() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


# ---- Figures and sheets --------------------------------------------------------------------------

# All figures: dark, whatever a matplotlibrc says, with texts that can be read at half size.
BACKGROUND = 24  # grey level, 0–255
figure_style = matplotlib.style.context(
    [
        "default",
        "dark_background",
        {f"{part}.facecolor": "#181818" for part in ("figure", "axes", "savefig")},
        {"font.size": 13, "axes.titlesize": 13, "figure.titlesize": 14},
        {"text.parse_math": False},  # a $ in a file's name is just a $
    ]
)
OVERLAY_OPACITY = 0.6
JPEG = {"quality": 92, "subsampling": 0}  # colours as sharp as brightness
SHEET_BORDER = 10  # pixels around a sheet and its title
TILE_GAP = 2  # pixels around each tile of a sheet


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn: a file in the output folder, and what it shows."""

    file: str
    caption: str
    sheet: dict | None = None  # where its tiles lie, for the page; see sheet_facts


def tile(pictures, columns, frames=BACKGROUND, gap=TILE_GAP):
    """One sheet of (n, h, w, 3) uint8 pictures in reading order; the last row is filled up.

    frames: the colours of the frames, which broadcast to (n, h, w, 3); gap: their width in pixels.
    """
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = np.full((rows * columns, height + 2 * gap, width + 2 * gap, 3), BACKGROUND, "uint8")
    sheet[:count] = frames
    sheet[:count, gap : gap + height, gap : gap + width] = pictures
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * sheet.shape[1], -1, 3)


def in_square(picture, side):
    """A (height, width, 3) uint8 picture scaled to fit in the middle of a square of this side."""
    height, width = np.maximum(1, np.round(side / max(picture.shape) * np.array(picture.shape[:2])))
    picture = cv2.resize(picture, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    square = np.full((side, side, 3), BACKGROUND, "uint8")
    top, left = (side - picture.shape[0]) // 2, (side - picture.shape[1]) // 2
    square[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return square


def save_sheet(path, pictures, columns, title, frames=BACKGROUND):
    """Write (n, side, side, 3) uint8 pictures, pixel for pixel, as a sheet under its title.

    frames: see tile. Returns how the sheet is cut again; see tiling.
    """
    sheet = tile(pictures, columns, frames)
    title = _wrap(title, max(8, sheet.shape[1] / 100))
    width = max(sheet.shape[1], *(math.ceil(100 * _text_width(it)) for it in title.split("\n")))
    above = _title_picture(title, width + 2 * SHEET_BORDER)
    below = np.full((sheet.shape[0] + SHEET_BORDER, *above.shape[1:]), BACKGROUND, "uint8")
    below[: sheet.shape[0], SHEET_BORDER : SHEET_BORDER + sheet.shape[1]] = sheet
    picture = np.concatenate([above, below])
    save_image(path, picture, **JPEG)
    return tiling(path, picture, pictures, columns, SHEET_BORDER, len(above), TILE_GAP)


def tiling(path, picture, tiles, columns, left=0, top=0, gap=0):
    """Where the tiles lie in the picture of a file, in pixels; the sheet begins at left and top."""
    side = tiles.shape[1]
    return {
        "file": path.name,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "left": left + gap,
        "top": top + gap,
        "tile": side,
        "pitch": side + 2 * gap,
        "columns": min(columns, len(tiles)),
    }


@dataclass(frozen=True)
class Panel:
    """A photo, or a heatmap on it, in a figure of panels."""

    explanation: object  # an Explanation
    title: str = ""
    heatmap: np.ndarray | None = None  # (h, w), over the whole photo
    field: ReceptiveField | None = None  # of its positions: these are shown, without the photo
    norm: Normalize | None = None  # its own scale, where that is not the figure's


@figure_style
def save_panels(path, rows, title, label, norm, colours=HEATMAP_COLOURS, dpi=100):
    """Draw rows of panels under a title, beside the colour scale (norm, colours) they share."""
    # All in inches, from the top left corner, as matplotlib's own layouts take seconds.
    side = 12 / max(map(len, rows))
    title, line_height, gap = _wrap(title, 13), 0.26, 0.1
    below = 2 * gap + line_height * (1 + title.count("\n"))
    places = []
    for row in rows:
        row = [replace(panel, title=_wrap(panel.title, side - 2 * gap)) for panel in row]
        below += gap + line_height * max(1 + panel.title.count("\n") for panel in row)
        height = side * max(_shown_aspect(panel.explanation.photo) for panel in row)
        for column, panel in enumerate(row):
            places.append((panel, (gap + column * side, below, side - gap, height - gap)))
        below += height
    top = places[0][1][1]
    bar_height = max(below - top - gap, 2.8)
    figure_height = top + bar_height + 2 * gap
    figure = Figure(figsize=(14, figure_height))
    figure.text(gap / 14, 1 - gap / figure_height, title, va="top", fontsize=14)
    for panel, place in places:
        _draw_panel(_axes_at(figure, place), panel, panel.norm or norm, colours)
    bar_axes = _axes_at(figure, (12.2, top, 0.25, bar_height))
    label = _wrap(label, bar_height)
    scale = ScalarMappable(norm, colours)
    bar = figure.colorbar(scale, cax=bar_axes, label=label, alpha=OVERLAY_OPACITY)
    bar.formatter.set_powerlimits((-2, 3))  # short numbers, also for small heatmaps
    bar.ax.set_facecolor("0.5")  # a photo's mean grey, on which the overlay's colours lie
    _save_figure(path, figure, dpi, cut=False)


def overlay(photo, heatmap):
    """A heatmap of shares, 0 to 1, over a photo in grey: (height, width, 3) uint8.

    heatmap: of any size, over the whole photo.
    """
    heatmap = cv2.resize(heatmap, photo.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = 255 * matplotlib.colormaps[HEATMAP_COLOURS](heatmap)[..., :3]
    grey = photo.mean(2, keepdims=True)
    return np.rint(OVERLAY_OPACITY * colours + (1 - OVERLAY_OPACITY) * grey).astype("uint8")


@figure_style
def save_strip(path, photo, overlay, middle):
    """Draw the middle square of a photo, square pictures {title: array}, and an overlay."""
    figure = Figure(figsize=(16, 4.4), layout="compressed")
    first, *between, last = figure.subplots(1, 2 + len(middle))
    norm = Normalize(0, overlay.explanation.heatmap.max() or 1)
    height, width = photo.explanation.photo.shape[:2]
    side = min(height, width)
    for axes, panel in ((first, photo), (last, overlay)):
        _draw_panel(axes, replace(panel, title=_wrap(panel.title, 3.6)), norm, HEATMAP_COLOURS)
        axes.set_xlim((width - side) / 2, (width + side) / 2)
        axes.set_ylim((height + side) / 2, (height - side) / 2)
        axes.set_aspect("equal")
    for axes, (title, picture) in zip(between, middle.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(_wrap(title, 3.6), loc="left")
        axes.set_axis_off()
    _save_figure(path, figure)


@figure_style
def save_rows(path, labels, rows, title):
    """Draw rows of square pictures under a title, each row after its label.

    rows: [[((height, width, 3) uint8 picture, a line of text below it)]].
    """
    pitch = PATCH_SIDE + 8  # pixels from a tile to the next
    line = 28  # of the text below a tile
    lines = [text for label in labels for text in label.split("\n")]
    margin = 30 + math.ceil(100 * max(map(_text_width, lines)))
    height, width = len(rows) * (pitch + line), margin + max(map(len, rows)) * pitch
    sheet = np.full((height, width, 3), BACKGROUND, "uint8")
    figure = Figure(figsize=(width / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    for row, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        top = row * (pitch + line)
        axes.text(margin / 2, top + PATCH_SIDE / 2, label, ha="center", va="center")
        for column, (picture, text) in enumerate(pictures):
            left = margin + column * pitch
            picture = cv2.resize(picture, (PATCH_SIDE, PATCH_SIDE), interpolation=cv2.INTER_CUBIC)
            sheet[top : top + PATCH_SIDE, left : left + PATCH_SIDE] = picture
            if text:
                text = _shorten(text, PATCH_SIDE / 100)
                style = {"ha": "center", "va": "top"}
                axes.text(left + PATCH_SIDE / 2, top + PATCH_SIDE + 4, text, **style)
    axes.imshow(sheet)
    axes.set_axis_off()
    axes.set_title(_wrap(title, width / 100), loc="left")
    _save_figure(path, figure)


@figure_style
def save_relu(path):
    """Draw the function that follows a convolution."""
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    x = np.linspace(-5, 5, 201)
    axes.plot(x, np.maximum(0, x), linewidth=4)
    labels = {"xlabel": "x, the normalized convolution", "ylabel": "activation"}
    axes.set(title="ReLU(x) = max(0, x)", **labels)
    _save_figure(path, axes.figure)


@figure_style
def save_training_curves(path, history, phases):
    """Draw loss and accuracy after each epoch; dotted: the phases' starts; red: the epoch kept.

    history: {metric: values}; phases: {name: number of epochs}.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    best = int(np.argmin(history["val_loss"]))
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        curves = {"training": history[metric], "validation": history[f"val_{metric}"]}
        for label, values in curves.items():
            axes.plot(range(1, len(values) + 1), values, "o-", label=label)
        kept = history[f"val_{metric}"][best]
        axes.plot(best + 1, kept, "o", color="red", markersize=12, label="kept")
        start = 0.5
        for name, epochs in phases.items():
            axes.axvline(start, linestyle=":")
            axes.text(start, 1.01, name, transform=axes.get_xaxis_transform())
            start += epochs
        axes.set(xlabel="epoch", ylabel=metric)
        axes.legend()
    _save_figure(path, figure)


@figure_style
def save_confusion_matrix(path, evaluation):
    """Draw how often each true class (row) is taken for each class (column)."""
    counts = evaluation.confusion
    classes = len(counts)
    names = [_shorten(name, 3) for name in evaluation.class_names]
    few = classes <= 25  # so that a number fits into each square
    side = 0.8 if few else 20 / classes
    figure = Figure(figsize=(3.5 + side * classes, 2.5 + side * classes), layout="constrained")
    axes = figure.subplots()
    photos = np.maximum(1, evaluation.photo_counts[:, None])
    drawn = axes.imshow(counts / photos, cmap="Blues_r", vmin=0, vmax=1)
    size = min(13, 55 * side)  # points
    axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    large = max(13, 1.2 * side * classes)  # points: to be read however far one steps back
    axes.set_xlabel("predicted", fontsize=large)
    axes.set_ylabel("true", fontsize=large)
    title = f"{np.trace(counts)} of {len(evaluation.labels)} test photos right"
    if evaluation.is_multi_label:
        title = f"{len(evaluation.labels)} test photos, each called all classes from 0.5 up"
    axes.set_title(title, loc="left", fontsize=large)
    if few:
        for (row, column), share in np.ndenumerate(drawn.get_array()):
            colour = "black" if share > 0.4 else "white"  # on light blue, or on dark
            style = {"ha": "center", "va": "center", "color": colour}
            axes.text(column, row, counts[row, column], **style)
    _save_figure(path, figure)


def save_photo(path, photo):
    """Write a (height, width, 3) uint8 photo, of at most 2048 pixels a side."""
    image = Image.fromarray(photo)
    image.thumbnail((2048, 2048))
    save_image(path, image, quality=92)


def save_image(path, picture, **options):
    """Write a Pillow image, or (height, width, 3) uint8 pixels, as a JPEG with these options."""
    jpeg = io.BytesIO()  # as Pillow does not notice where a disk takes only a part of a file
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(jpeg, "JPEG", **options)
    with replace_when_whole(path) as partial_path:
        partial_path.write_bytes(jpeg.getvalue())


def batched(items, size):
    """The items in lists of that size, the last one maybe smaller: itertools' from Python 3.12."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def percent(share):
    return f"{100 * share:.0f} %"


class Progress(rich.progress.Progress):
    """Tells what is being drawn: one bar on a terminal, a line for each picture elsewhere."""

    def __init__(self):
        self.on_terminal = sys.stdout.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        super().__init__(*columns, transient=True, disable=not self.on_terminal)
        self.task = self.add_task("", total=len(PATTERN_CONVOLUTIONS) * FILTERS_DRAWN)

    def say(self, what):
        """Say what is being done, on a terminal."""
        self.update(self.task, description=what)

    def tell_filters(self, convolution, count, sheet, done):
        """Say how many of the count filters are drawn of a sheet, counted from 0."""
        self.say(f"patterns of convolution {convolution.number}, {done}/{count}")
        self.update(self.task, completed=sheet * FILTERS_DRAWN + done)

    def tell_pictures(self, pictures):
        """Say that these pictures are drawn, and return them."""
        for picture in pictures:
            self.tell(picture.file)
        return pictures

    def tell(self, file):
        """Say that a file is written."""
        self.say(f"{Path(file).stem} is drawn")
        if not self.on_terminal:
            print(file, flush=True)


@figure_style
def _title_picture(title, width):
    """A title in a (height, width, 3) uint8 strip."""
    height = SHEET_BORDER + 24 * (1 + title.count("\n"))
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    left, top = SHEET_BORDER / width, 1 - SHEET_BORDER / height
    figure.text(left, top, title, va="top")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]
    strip = np.full((height, width, 3), BACKGROUND, "uint8")
    strip[: drawn.shape[0], : drawn.shape[1]] = drawn[:height, :width]  # a pixel may be rounded off
    return strip


def _draw_panel(axes, panel, norm, colours):
    """Draw a panel on matplotlib axes."""
    photo = panel.explanation.photo
    height, width = photo.shape[:2]
    extent = (0, width, height, 0)
    # No picture shows more pixels, and a large photo takes seconds to draw.
    photo = cv2.resize(photo, (min(width, 1200), min(height, 1200)), interpolation=cv2.INTER_AREA)
    axes.set_title(panel.title, loc="left")
    axes.set_axis_off()
    if panel.heatmap is None:
        axes.imshow(photo, extent=extent)
    else:
        heatmap, below = panel.heatmap, photo.mean(2)
        if panel.field:
            extent, below = _positions_extent(panel), np.full((1, 1), 127)
        # Over grey, and at one opacity everywhere, so that each colour has one meaning.
        axes.imshow(below, cmap="gray", vmin=0, vmax=255, extent=extent)
        drawn = axes.imshow(heatmap, colours, norm, alpha=OVERLAY_OPACITY, extent=extent)
        drawn.set_interpolation("nearest" if panel.field else "bilinear")
    axes.set_aspect(_shown_aspect(panel.explanation.photo) * width / height)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _positions_extent(panel):
    """Where a heatmap's positions lie, a stride each: (left, right, bottom, top) in the photo."""
    scale = np.divide(panel.explanation.photo.shape[:2], panel.explanation.pixels.shape[:2])
    half_a_stride = np.array([0.5, 0.5])
    last = np.array(panel.heatmap.shape) - 1
    top, left = panel.field.place(-half_a_stride) * scale
    bottom, right = panel.field.place(last + half_a_stride) * scale
    return left, right, bottom, top


def _shown_aspect(photo):
    """A panel's height / width: that of its photo, but at least 0.4 and at most 2.5."""
    return float(np.clip(photo.shape[0] / photo.shape[1], 0.4, 2.5))


def _axes_at(figure, place):
    """Axes at a place (left, top, width, height) in inches from the figure's top left corner."""
    left, top, width, height = place
    all_width, all_height = figure.get_size_inches()
    bottom = all_height - top - height
    corner = (left / all_width, bottom / all_height)
    return figure.add_axes((*corner, width / all_width, height / all_height), anchor="NW")


def _save_figure(path, figure, dpi=100, cut=True):
    """Write a figure in the format that the suffix names; cut: to what is drawn on it."""
    border = {"bbox_inches": "tight", "pad_inches": 0.1} if cut else {}
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format=path.suffix[1:], **border, pil_kwargs=JPEG)
    with replace_when_whole(path) as partial_path:
        partial_path.write_bytes(file.getvalue())


def _wrap(text, inches):
    """A text in lines no wider than so many inches; words too long for one lose their middle."""
    lines = []
    for line in text.replace(" %", "\N{NO-BREAK SPACE}%").split("\n"):
        line, *words = [_shorten(word, inches) for word in line.split(" ")]
        for word in words:
            if _text_width(f"{line} {word}") > inches:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}"
        lines.append(line)
    return "\n".join(lines)


def _shorten(word, inches):
    """A word no wider than so many inches: its start and its end, where it is too long."""
    kept = len(word)
    shortened = word
    while _text_width(shortened) > inches:
        kept -= 2
        shortened = f"{word[: kept // 2]}…{word[-(kept // 2) :]}"
    return shortened


@lru_cache(maxsize=1000)
def _text_width(text):
    """The width in inches of a line in the size of the titles."""
    if not text:
        return 0.0
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=14), False)
    return width / 72


# ---- What is said of photos and models -----------------------------------------------------------


def evaluation_report(evaluation):
    """Loss and accuracy; a line of precision and recall for each class; the pairs most confused.

    Of a multi-label model, which may name several classes or none, only what has a meaning then.
    """
    names = evaluation.class_names
    width = max(5, *map(len, names))
    measured = f" accuracy {evaluation.accuracy:.4f}  ({accuracy_text(evaluation)})"
    if evaluation.is_multi_label:
        measured = "(each class by itself, called so from 0.5 up)"
    lines = [f"Test: loss {evaluation.loss:.4f} {measured}"]
    lines.append(f"{'class':{width}}  precision  recall  photos")
    columns = zip(
        names, evaluation.precision, evaluation.recall, evaluation.photo_counts, strict=True
    )
    for name, precision, recall, count in columns:
        precision, recall = share_text(precision), share_text(recall)
        lines.append(f"{name:{width}}  {precision:>9}  {recall:>6}  {count:6}")
    if not evaluation.is_multi_label:
        lines.append(most_confused(evaluation.confusion, names))
        error = calibration_error(evaluation)
        lines.append(f"Expected calibration error: {error:.3f} ({CONFIDENCE_BINS} bins)")
    if evaluation.is_no_better_than_chance:
        remedy = "train longer, on more photos"
        lines.append(f"Warning: this accuracy is no better than chance; {remedy}.")
    return "\n".join(lines)


def accuracy_text(evaluation):
    """The accuracy and how sure it is: "95 % of 170 test photos (91 to 98 %)"."""
    low, high = evaluation.accuracy_interval
    count = len(evaluation.labels)
    text = f"{percent(evaluation.accuracy)} of {count:,} test photos"
    text += f" ({100 * low:.0f} to {percent(high)})"
    if differ_in_size(evaluation.photo_counts):
        text += f", {percent(evaluation.balanced_accuracy)} where all classes count alike"
    return text


def share_text(share):
    """A share in two digits, or a dash where there is none (nan)."""
    return "—" if np.isnan(share) else f"{share:.2f}"


def most_confused(confusion, names):
    """A sentence on the two classes most often taken for each other, or on all pairs that tie."""
    mutual = np.triu(confusion + confusion.T, 1)
    if not mutual.any():
        return "No class is taken for another."
    pairs = np.argwhere(mutual == mutual.max())
    named = ", ".join(f"{names[one]} and {names[other]}" for one, other in pairs[:3])
    if len(pairs) > 3:
        named += f" and {len(pairs) - 3} more pairs"
    photos = mutual.max()
    if len(pairs) == 1:
        return f"Most confused: {named}, {photos} of {confusion[pairs[0]].sum()} photos."
    return f"Most confused: {named}, {photos} {'photo' if photos == 1 else 'photos'} each."


def differ_in_size(counts):
    """Whether the largest of classes with so many photos has more than twice the smallest's."""
    return max(counts) > 2 * min(counts)


def verdict(class_names, probabilities, true_index, is_multi_label=False):
    """What the model says of a photo and, where that is known (not None), what is true."""
    ranking = _most_probable(probabilities)
    first, second = ranking[:2]
    named = {k: f"{class_names[k]}, {percent(probabilities[k])}" for k in (first, second)}
    said = f"It says {named[first]}"
    if is_multi_label:
        (predicted,) = _predicted_classes(probabilities[None], is_multi_label)
        several = [k for k in ranking[:5] if predicted[k]]
        listed = " and ".join(f"{class_names[k]} {percent(probabilities[k])}" for k in several)
        said = f"It says {listed or f'none of its classes; {named[first]}'}"
        if true_index in several:
            return f"{said}; its class is {class_names[true_index]}"
    elif true_index is None:
        return f"{said}; {named[second]}"
    elif first == true_index:
        return f"{said}, and is right"
    if true_index is None:
        return said
    share = percent(probabilities[true_index])
    return f"{said}; its class is {class_names[true_index]}, {share}"


def deletion_caption(name, deletion):
    """The Deletion of a heatmap for a class of this name, in words; None where it is empty."""
    if deletion is None:
        return f"Nothing speaks for {name}: the heatmap is empty."
    _, without_hottest, without_central = deletion
    judgement = "No better than a guess here."
    if deletion.is_better:
        judgement = "Better than a guess here."
    elif abs(without_hottest - without_central) < DELETION_MARGIN:
        judgement = "The same as a guess here."
    part = _deleted_part()
    # A third digit where two would hide which of them is lower.
    digits = 3 if f"{without_hottest:.2f}" == f"{without_central:.2f}" else 2
    before, hottest, central = (f"{it:.{digits}f}" for it in deletion)
    return (
        f"Without the hottest {part}: P({name}) {before} → {hottest}; "
        f"without a central {part}: {central}. {judgement}"
    )


def deletion_summary(explanations, which="photos"):
    """How far the heatmaps of some photos are worth more than a guess, in words.

    which: what these photos are called.
    """
    of_each = [it.deletions.get(it.class_index) for it in explanations]
    found = [deletion for deletion in of_each if deletion]
    if not found:
        return ""
    before, without_hottest, without_central = np.array(found).T
    better = np.mean([deletion.is_better for deletion in found])
    falls = [np.mean(before - without) for without in (without_hottest, without_central)]
    part = _deleted_part()
    return (
        f"In the mean of {len(found)} {which} the probability falls by {falls[0]:z.2f} without the "
        f"hottest {part} of the heatmap, by {falls[1]:z.2f} without a central {part}; "
        f"{percent(better)} of the heatmaps are better than a guess."
    )


def _deleted_part():
    return "fifth" if DELETED_FRACTION == 0.2 else percent(DELETED_FRACTION)


def concept_truth(found):
    """How far the concepts stand for the model, in words."""
    count, photos = found.maps.shape[-1], len(found.maps)
    alone = f"with them alone {percent(found.kept)} of {photos} photos keep their class"
    warning = "" if found.kept >= CONCEPTS_KEEP else ", so they tell only a part"
    return f"{count} concepts; {alone}{warning}"


# ---- The survey: what one pass over all photos finds ---------------------------------------------

EXAMPLES = 4  # photos of known class that are explained
PHOTOS_AT_ONCE = 8  # through the model; more take more memory, and no less time on a CPU
HEADS_AT_ONCE = 32  # feature maps through its head
ALL_CLASSES = 10  # so many classes have all a heatmap of each photo; of more,
PROBABLE_CLASSES = 4  # the most probable ones and the true one have


@dataclass(frozen=True)
class Explanation:
    """A photo, what the model predicts for it, and where it looks for the classes in question."""

    name: str
    photo: np.ndarray  # (height, width, 3) uint8 RGB
    pixels: np.ndarray  # the same, as the model sees it
    class_names: list  # as they are printed
    probabilities: np.ndarray  # (classes,)
    true_index: int | None  # None: not known
    # {layer: {class index: (h, w) uncut Grad-CAM}}; the last is the model's last with positions
    uncut: dict
    # {class index: Deletion}, of the class explained and of the predicted one; no empty heatmaps
    deletions: dict
    of_all_blocks: np.ndarray | None = None  # see heatmap_of_all_blocks; None where not asked for
    deletion_of_all_blocks: Deletion | None = None
    is_multi_label: bool = False

    @property
    def class_index(self):
        """The class explained: the true one, or where that is not known the predicted one."""
        return int(self.probabilities.argmax()) if self.true_index is None else self.true_index

    @property
    def contrast_index(self):
        """The most probable of the other classes: of a mistake, the predicted class."""
        ranking = _most_probable(self.probabilities)
        return int(ranking[ranking != self.class_index][0])

    @property
    def heatmap(self):
        """The (h, w) heatmap of the class explained, at the model's last layer with positions."""
        *_, at_last_layer = self.uncut.values()
        return np.maximum(0, at_last_layer[self.class_index])

    @property
    def class_name(self):
        return self.class_names[self.class_index]

    @property
    def contrast_name(self):
        return self.class_names[self.contrast_index]

    @property
    def is_mistake(self):
        if self.true_index is None:
            return False
        (predicted,) = _predicted_classes(self.probabilities[None], self.is_multi_label)
        return not predicted[self.true_index]

    @property
    def verdict(self):
        known = (self.class_names, self.probabilities, self.true_index, self.is_multi_label)
        return verdict(*known)


@dataclass(frozen=True)
class Survey:
    """What one pass over n photos found: first those of unknown class, the user's own.

    The k classes of a photo that have a heatmap begin with the two most probable ones.
    """

    network: object  # a Network
    extract: object  # see traced_extractor
    class_names: list  # as they are printed
    paths: list
    read: object  # see photo_reader
    labels: np.ndarray  # (n,) true class indices, -1 where not known
    probabilities: np.ndarray  # (n, classes)
    classes: np.ndarray  # (n, k) indices of the classes that have a heatmap
    uncut: np.ndarray  # (n, k, h, w) uncut Grad-CAM at the model's last layer with positions
    concepts: Concepts  # found in the sample
    concept_maps: np.ndarray  # (n, h, w, concepts) how strong each is
    concept_shares: np.ndarray  # (n, k, concepts) what each adds to the logits of these classes
    sample: np.ndarray  # the numbers of up to CONCEPT_PHOTOS photos
    sample_features: np.ndarray  # (sample, h, w, channels), at that last layer
    features: np.ndarray  # (n, channels), the means of that layer's feature maps
    peaks: dict  # {layer: Peaks of its first filters}

    @cached_property
    def class_indices(self):
        """(n,) the true class of each photo, or where that is not known the predicted one."""
        return np.where(self.labels < 0, self.probabilities.argmax(1), self.labels)

    @cached_property
    def own_count(self):
        """How many of the photos, the first ones, are of unknown class."""
        return int((self.labels < 0).sum())

    @cached_property
    def evaluation(self):
        """The Evaluation of the photos whose class is known; None without any."""
        known = slice(self.own_count, None)
        if self.own_count == len(self.paths):
            return None
        of_known = self.labels[known], self.probabilities[known]
        return Evaluation(self.class_names, *of_known, self.network.is_multi_label)

    def predict(self, photos):
        """(n, classes) probabilities of photos (n, height, width, 3), a few at once."""
        network, last = self.network, self.network.heatmap_layer
        found = []
        for some in batched(photos, PHOTOS_AT_ONCE):
            feature_maps, *_ = self.extract(some)
            (logits,) = network.compute(feature_maps, [LOGITS], start=last)
            found.append(network.to_probabilities(logits).numpy())
        return np.concatenate(found)

    def uncut_of(self, number):
        """{class index: (h, w) uncut Grad-CAM} of a photo at the last layer with positions."""
        return dict(zip(self.classes[number].tolist(), self.uncut[number], strict=True))

    def verdict(self, number):
        """What the model says of a photo, and what is true; see verdict."""
        label = int(self.labels[number])
        known = (self.class_names, self.probabilities[number], None if label < 0 else label)
        return verdict(*known, self.network.is_multi_label)

    def name(self, number):
        """The name of a photo as it is shown, that of a test photo with its folder."""
        parts = self.paths[number].parts[-1 if self.labels[number] < 0 else -2 :]
        return printable("/".join(parts))


def survey_photos(network, photos, labels, class_names, read=None, seed=0):
    """The Survey of photos, given as in draw. read: a photo_reader of the network's size.

    seed: chooses the photos in which concepts are looked for.
    """
    read = read or photo_reader(network.input_size, network.read_photo)
    photos = list(photos)
    labels = _label_indices(labels, len(photos), network.class_count)
    own_first = np.argsort(labels >= 0, kind="stable")
    labels, paths = labels[own_first], [Path(photos[k]) for k in own_first]
    chosen = network.nearest_convolutions(PATTERN_CONVOLUTIONS)
    layer_names = [convolution.activation for convolution in chosen]
    extract = traced_extractor(network, layer_names)

    def features_and_peaks(numbers):
        parts = []
        for some in batched(numbers, PHOTOS_AT_ONCE):
            pixels = np.stack([read(paths[k]) for k in some]).astype("float32")
            feature_maps, *activations = extract(pixels)
            peaks = dict(zip(layer_names, map(_peaks_of, activations), strict=True))
            parts.append((feature_maps.numpy(), peaks))
        return joined(parts)

    # The sample comes first: concepts are found in the features of all its photos.
    sample = _concept_sample(network, labels, seed)
    others = np.setdiff1d(np.arange(len(paths)), sample)
    first = batched(sample, HEADS_AT_ONCE)
    kept = [features_and_peaks(numbers) for numbers in first]
    sample_features = np.concatenate([feature_maps for feature_maps, _ in kept])
    require_finite(sample_features)
    found = factorize(network, sample_features)
    surveyed = []
    for numbers in [*first, *batched(others, HEADS_AT_ONCE)]:
        feature_maps, peaks = kept.pop(0) if kept else features_and_peaks(numbers)
        of_batch = _what_the_head_makes(network, feature_maps, labels[numbers], found)
        surveyed.append(of_batch | {"peaks": peaks})
    back = np.argsort(np.concatenate([sample, others]))
    surveyed = keras.tree.map_structure(lambda array: array[back], joined(surveyed))
    given = (network, extract, list(map(printable, class_names)), paths, read, labels)
    of_sample = {"concepts": found, "sample": sample, "sample_features": sample_features}
    return Survey(*given, **of_sample, **surveyed)


def _label_indices(labels, photo_count, class_count):
    """(n,) class indices of labels as draw takes them, -1 for None.

    Raises Stop without photos, or where labels are too few, too many or no class.
    """
    labels = [None] * photo_count if labels is None else list(labels)
    if not photo_count:
        raise Stop("There are no photos. Name one or more.")
    if len(labels) != photo_count:
        raise Stop(f"{len(labels)} labels for {photo_count} photos. Give each photo one, or None.")
    for label in labels:
        if np.ndim(label) or label not in (None, *range(class_count)):
            needed = f"None, or the index of a class, 0 to {class_count - 1}"
            raise Stop(f"A label must be {needed}; this one is {label}.")
    return np.array([-1 if label is None else label for label in labels], int)


def joined(parts):
    """Structures of arrays, such as {name: array}, as one with the arrays end to end."""
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def explain(survey, number, by_block=True):
    """The Explanation of a photo of a survey, with the deletion score of its heatmap.

    by_block: with heatmaps at the end of each block, too, and that of all blocks.
    """
    network, path, label = survey.network, survey.paths[number], int(survey.labels[number])
    pixels, probabilities = survey.read(path), survey.probabilities[number]
    of_blocks = _uncut_by_block(survey, number) if by_block else {}
    of_last = survey.uncut_of(number)
    explained = int(survey.class_indices[number])
    heatmaps = {
        k: placed(network, network.heatmap_layer, np.maximum(0, of_last[k]))
        for k in (explained, int(probabilities.argmax()))
        if (of_last[k] > 0).any()
    }
    classes, maps = list(heatmaps), list(heatmaps.values())
    of_all_blocks = None
    if by_block and explained in heatmaps:
        of_all_blocks = heatmap_of_all_blocks(network, pixels, explained)
        classes, maps = [*classes, explained], [*maps, of_all_blocks]
    deletions = []
    if maps:
        deletions = deletions_of(survey.predict, pixels, probabilities, maps, classes)
    return Explanation(
        name=survey.name(number),
        photo=network.read_photo(path) if by_block else pixels,
        pixels=pixels,
        class_names=survey.class_names,
        probabilities=probabilities,
        true_index=None if label < 0 else label,
        uncut=of_blocks | {network.heatmap_layer: of_last},
        deletions=dict(zip(heatmaps, deletions, strict=False)),
        of_all_blocks=of_all_blocks,
        deletion_of_all_blocks=None if of_all_blocks is None else deletions[-1],
        is_multi_label=network.is_multi_label,
    )


def explain_chosen(survey):
    """{photo number: Explanation} of the own photos, and then of some examples of the others."""
    examples = example_order(survey.evaluation)[:EXAMPLES] if survey.evaluation else []
    known = [survey.own_count + index for index in examples]
    return {k: explain(survey, k) for k in [*range(survey.own_count), *known]}


def classes_in_question(probabilities, labels):
    """(n, k) class indices for each photo: of up to ALL_CLASSES all, the most probable first; of
    more the PROBABLE_CLASSES most probable, then the true one.

    labels: true class indices; where one is -1, not known, the most probable stands for it.
    """
    ranking = _most_probable(probabilities)
    if ranking.shape[1] <= ALL_CLASSES:
        return ranking
    probable = ranking[:, :PROBABLE_CLASSES]
    return np.column_stack([probable, np.where(np.less(labels, 0), probable[:, 0], labels)])


def traced_extractor(network, layer_names):
    """A function of photos: the last feature maps, and some layers' first filters' activations.

    It is traced, as a graph frees each feature map once the next layers have used it.
    """
    photos = tf.TensorSpec((None, *network.input_size, 3))
    names = [network.heatmap_layer, *layer_names]

    @tf.function(input_signature=[photos], autograph=False)
    def extract(photos):
        feature_maps, *activations = network.compute(photos, names, folded=True)
        return feature_maps, *(it[..., :FILTERS_DRAWN] for it in activations)

    return extract


def _concept_sample(network, labels, seed):
    """Numbers of up to CONCEPT_PHOTOS photos: of known class, or where there are none of any.

    Fewer where the last layer is so large that their feature maps would fill the memory.
    """
    fitting = max(1, CONCEPT_VALUES // math.prod(network.shape(network.heatmap_layer)))
    known = np.flatnonzero(labels >= 0) if (labels >= 0).any() else np.arange(len(labels))
    return np.random.default_rng(seed).permutation(known)[: min(CONCEPT_PHOTOS, fitting)]


def _what_the_head_makes(network, feature_maps, labels, found):
    """What the head makes of feature maps, (n, h, w, channels): {field of a Survey: array}."""
    # From the last layer with positions on, which is handed through: nothing before it need be
    # computed again.
    last = network.heatmap_layer
    from_features = partial(network.compute, names=[last, LOGITS], start=last)
    feature_maps = tf.constant(feature_maps)
    _, logits = from_features(feature_maps)
    probabilities = network.to_probabilities(logits).numpy()
    classes = classes_in_question(probabilities, labels)
    ((_, weights),) = channel_weights(from_features, feature_maps, classes)
    uncut = weighted_sum(feature_maps, weights)
    require_finite(probabilities, uncut)
    maps = concept_maps(feature_maps.numpy(), found.vectors)
    return {
        "probabilities": probabilities,
        "classes": classes,
        "uncut": uncut,
        "features": tf.reduce_mean(feature_maps, axis=(1, 2)).numpy(),
        "concept_maps": maps,
        "concept_shares": _shares_of_classes(weights, found.vectors, maps),
    }


def _uncut_by_block(survey, number):
    """{block: {class index: (h, w) uncut Grad-CAM}} of a photo, without the last layer.

    Of its two most probable classes and the true one: each more costs a pass through the model.
    """
    network = survey.network
    *blocks, _ = network.heatmap_layers
    classes = [*survey.classes[number, :2].tolist(), int(survey.class_indices[number])]
    classes = list(dict.fromkeys(classes))
    forward = partial(network.compute, names=[*blocks, LOGITS])
    photo = tf.constant(survey.read(survey.paths[number])[None], tf.float32)
    of_blocks = uncut_grad_cam(forward, photo, np.array([classes]))
    return {
        block: dict(zip(classes, of_photo, strict=True))
        for block, (of_photo,) in zip(blocks, of_blocks, strict=True)
    }


def relative_shares(shares, whole):
    """Shares (k,) as parts of all that speaks for a class; below 0: against it.

    whole: the sum of the uncut heatmap. What no concept makes up is a share too.
    """
    rest = whole - shares.sum()
    speaking_for = np.maximum(0, [*shares, rest]).sum()
    return shares / max(speaking_for, 1e-12)


class ClassConcept(NamedTuple):
    """A concept in the photos of a class, on average."""

    concept: int
    share: float  # of all that speaks for the class
    fall: float  # of the class's logit without the concept


def class_concepts(survey, class_index):
    """The ClassConcepts of a class, the strongest first: up to CONCEPTS_A_CLASS.

    Those that make up less than SMALLEST_SHARE are left out.
    """
    photos = np.flatnonzero(survey.class_indices == class_index)
    of_sample = survey.sample_features[survey.class_indices[survey.sample] == class_index]
    if not len(of_sample):
        return []
    rank = np.argmax(survey.classes[photos] == class_index, axis=1)
    shares = survey.concept_shares[photos, rank].mean(0)
    whole = survey.uncut[photos, rank].sum((1, 2)).mean()
    relative = relative_shares(shares, whole)
    strongest = [int(k) for k in _most_probable(relative) if relative[k] >= SMALLEST_SHARE]
    found = []
    for k in strongest[:CONCEPTS_A_CLASS]:
        falls = logit_falls(survey.network, of_sample, survey.concepts, k, class_index)
        found.append(ClassConcept(k, float(relative[k]), float(falls.mean())))
    return found


def photos_of_concept(survey, concept):
    """Numbers of the CONCEPT_EXAMPLES photos that hold most of a concept, strongest first."""
    held = survey.concept_maps[..., concept].sum((1, 2))
    ranking = np.argsort(-held, kind="stable")[:CONCEPT_EXAMPLES]
    return [int(k) for k in ranking if held[k] > 0.01 * held.max()]


def strongest_shares(survey, number, class_index):
    """[(concept, share of what speaks for the class)] of a photo: CONCEPTS_A_PHOTO at most.

    The strongest comes first; what makes up less than SMALLEST_SHARE is left out. The class is one
    of those that have a heatmap.
    """
    rank = survey.classes[number].tolist().index(class_index)
    whole = survey.uncut[number, rank].sum()
    relative = relative_shares(survey.concept_shares[number, rank], whole)
    ranking = _most_probable(relative)[:CONCEPTS_A_PHOTO]
    return [(int(k), float(relative[k])) for k in ranking if relative[k] >= SMALLEST_SHARE]


# ---- Which training photos a photo is like -------------------------------------------------------

NEAREST = 3  # training photos of a class that are shown beside a photo
TRAINING_PHOTOS = 300  # at most, that these are looked for among


@dataclass(frozen=True)
class Nearest:
    """The training photos that each of n photos is most like, class by class."""

    paths: list  # of the training photos that were looked at, m
    labels: np.ndarray  # (m,) their class indices
    similarity: np.ndarray  # (n, m) cosine of the means of the last feature maps

    def of_class(self, number, class_index):
        """Indices of the NEAREST training photos of a class, the most alike first."""
        of_class = np.flatnonzero(self.labels == class_index)
        order = np.argsort(-self.similarity[number, of_class], kind="stable")
        return of_class[order[:NEAREST]].tolist()


def nearest_photos(survey, training, seed=0):
    """The Nearest of a survey's photos, among TRAINING_PHOTOS by seed, evenly of all classes.

    training: (paths, class indices). Photos that do not decode are left out; None without any.
    """
    paths, labels = list(map(Path, training[0])), np.asarray(training[1], int)
    kept, pixels = [], []
    for k in evenly_by_class(labels, TRAINING_PHOTOS, seed):
        with contextlib.suppress(Stop):
            pixels.append(survey.read(paths[k]))
            kept.append(k)
    if not kept:
        return None
    features = []
    # That no eye sees what bfloat16 rounds holds here, too: it is only a ranking.
    with bfloat16_where_fast():
        extract = traced_extractor(survey.network, [])
        for some in batched(pixels, PHOTOS_AT_ONCE):
            (feature_maps,) = extract(np.stack(some).astype("float32"))
            features.append(tf.reduce_mean(feature_maps, axis=(1, 2)).numpy())
    directions, others = map(keras.utils.normalize, (survey.features, np.concatenate(features)))
    return Nearest([paths[k] for k in kept], labels[kept], directions @ others.T)


def evenly_by_class(labels, most, seed=0):
    """Indices of at most so many labels, drawn by seed, as many of each class as it has."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.zeros(len(labels), int)
    for class_index in np.unique(labels):
        of_class = labels[order] == class_index
        rank_in_class[of_class] = np.arange(of_class.sum())
    return order[np.argsort(rank_in_class, kind="stable")[:most]].tolist()


# ---- The page: what it shows of the run ----------------------------------------------------------
# Images/index.html is the same for every run. What it shows lies beside it: the pictures, sheets of
# photos and activation maps, from which it cuts what one asks for, and run.js, which holds all the
# rest as JSON. It is a script, as a browser reads no other data file from a local folder.

PAGE = Path(__file__).with_name("Images") / "index.html"
LISTED_PHOTOS = 500  # of a larger test: the mistakes, then the least confident
LISTED_CLASSES = 20  # of a photo's probabilities; a thousand for each would fill the file
PATCHES = 9  # photos shown for a filter
JUDGED_PHOTOS = 170  # the first ones: with a deletion score
MAPPED_PHOTOS = 24  # the first ones: with activation maps
COVERED_PHOTOS = 4  # own ones, mistakes and the least sure: place by place

# Pixels. Multiples of 16 keep JPEG's blocks within their tile, so that no colour leaks out of it.
THUMBNAIL_SIDE = 80
ALL_BLOCKS_SIDE = 40  # of the heatmap of all blocks
PHOTO_SIDE = 256
MAP_SIDE = 48
PHOTO_COLUMNS = 6  # and rows of a sheet of photos, which a browser loads whole


def draw_page(output, survey, explained, pictures, record, command, progress, nearest=None):
    """Write the page, run.js and the sheets that the page cuts, beside the pictures.

    explained: {photo number: Explanation}, of the photos that can be followed through the layers.
    pictures: {what they show: [Picture]}. nearest: see nearest_photos; None without.
    """
    stored, listed = _stored_photos(survey, explained)
    judged = stored[: min(JUDGED_PHOTOS, listed)]
    explanations = dict(explained)
    for done, k in enumerate(judged):
        progress.say(f"heatmaps are judged, {done}/{len(judged)}")
        explanations[k] = explained.get(k) or explain(survey, k, by_block=False)
    facts = _run_facts(survey, record, command)
    which = "photos" if len(judged) == len(survey.paths) else "of the most doubtful photos"
    facts["judged"] = deletion_summary(list(explanations.values()), which)
    facts |= _photo_facts(output, survey, explanations, stored, listed, progress)
    facts["concepts"] = _concept_facts(survey, stored)
    facts["training"] = nearest and _training_facts(output, survey, stored, nearest, progress)
    mapped = judged[:MAPPED_PHOTOS]
    facts |= _picture_facts(output, survey, mapped, pictures, stored, progress)
    save_predictions(output / facts["predictions"]["file"], survey)
    with replace_when_whole(output / "run.js") as partial_path:
        partial_path.write_text(_script_text(facts), "ascii")
    _remove_old_sheets(output, facts)
    _copy_page(output)


def sheet_facts(convolution, layer, silent, place):
    """What the page needs to cut a sheet of a layer, whose tile k is filter or channel k.

    silent: (n,) booleans. place: see tiling.
    """
    count = {"count": len(silent), "silent": np.flatnonzero(silent).tolist()}
    return {"convolution": asdict(convolution), "layer": layer} | place | count


def _run_facts(survey, record, command):
    """What the page says of the run: sentences, settings, versions, classes and evaluation."""
    evaluation, network = survey.evaluation, survey.network
    settings = (record or {}).get("settings", {})
    versions = {"Python": sys.version.split()[0], "TensorFlow": tf.__version__}
    named = (settings | versions | {"Keras": keras.__version__}).items()
    class_names = survey.class_names
    return {
        "format": 5,
        "lead": [training_sentence(class_names, settings), _test_sentence(evaluation)],
        "warnings": warnings_about(evaluation),
        "command": command,
        "settings": [f"{name}: {printable(str(value))}" for name, value in named],
        "classes": class_names,
        "multi_label": network.is_multi_label,
        "test": None if evaluation is None else _test_table(evaluation),
        "reliability": _reliability_entry(evaluation),
        "predictions": {"file": "predictions.csv"},
        "colours": list(map(to_hex, matplotlib.colormaps[HEATMAP_COLOURS](range(256)))),
        "heatmap_layers": [_layer_entry(network, name) for name in network.heatmap_layers],
        "all_blocks_side": ALL_BLOCKS_SIDE,
    }


def training_sentence(class_names, settings):
    """What was trained on what, as far as the settings of the training tell."""
    names = ", ".join(class_names[:10])
    names += ", …" if len(class_names) > 10 else ""
    classes = f"{len(class_names)} classes ({names})"
    if not {"weights", "epochs", "photos"} <= set(settings):
        return f"This model tells {classes} apart. How it was trained is not recorded here."
    starts = {"imagenet": "starting from ImageNet's weights", "none": "from scratch"}
    start = starts.get(settings["weights"], "starting from the weights of a file")
    photos = settings["photos"]["train"]
    epochs = settings["epochs"]
    return f"InceptionV3 learnt {classes} from {photos:,} photos in {epochs} epochs, {start}."


def _test_sentence(evaluation):
    """How well the model does, in words."""
    if evaluation is None:
        return "No test photos were given: how well it does is not known."
    if evaluation.is_multi_label:
        return (
            "It tells of each class by itself whether a photo holds it (from 0.5 up), so that the "
            "probabilities of a photo need not add up to 1: a photo may be called several classes "
            f"or none. Test loss {evaluation.loss:.3g}."
        )
    return (
        f"It names {accuracy_text(evaluation)} right, with a loss of {evaluation.loss:.3g}; always "
        f"saying the most frequent class would get {percent(evaluation.largest_share)} right."
    )


def warnings_about(evaluation):
    """Sentences on what weakens the run."""
    found = []
    if evaluation and evaluation.is_no_better_than_chance:
        found.append("⚠ It does no better than chance: its pictures show little learning.")
    fewest = min(evaluation.photo_counts) if evaluation else math.inf
    if fewest < FEW_PHOTOS:
        found.append(f"⚠ A class has only {fewest} test photos: each changes the result by much.")
    return found


def _test_table(evaluation):
    """The confusion matrix as rows for the page: counts as numbers, all else as texts."""
    names = evaluation.class_names
    rows = zip(names, evaluation.confusion.tolist(), evaluation.recall, strict=True)
    return [
        ["true \\ predicted", *names, "recall"],
        *([name, *counts, share_text(recall)] for name, counts, recall in rows),
        ["precision", *map(share_text, evaluation.precision), ""],
    ]


def _reliability_entry(evaluation):
    """The photos, their mean confidence, and the right ones, for each bin; None where not known."""
    if evaluation is None or evaluation.is_multi_label:
        return None
    bins = [
        [int(count), round(float(confidence / max(1, count)), 4), int(right)]
        for count, confidence, right in reliability(evaluation)
    ]
    return {"error": round(calibration_error(evaluation), 4), "bins": bins}


def save_predictions(path, survey):
    """Write a table of all photos for spreadsheets: file, classes, and a probability a class.

    A multi-label model may predict several classes of a photo, or none.
    """
    names = survey.class_names
    predicted = _predicted_classes(survey.probabilities, survey.network.is_multi_label)
    true = ["" if label < 0 else names[label] for label in survey.labels]
    # With a mark in front, by which a spreadsheet knows UTF-8.
    encoding = {"encoding": "utf-8-sig", "newline": ""}
    with replace_when_whole(path) as partial_path, partial_path.open("w", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(map(_cell, ["file", "true class", "predicted class", *names]))
        for number, probabilities in enumerate(survey.probabilities):
            said = ", ".join(names[k] for k in np.flatnonzero(predicted[number]))
            texts = [survey.name(number), true[number], said]
            writer.writerow([*map(_cell, texts), *(f"{it:.4f}" for it in probabilities)])


def _cell(text):
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _photo_facts(output, survey, explained, stored, listed, progress):
    """What the page shows of photos. Writes sheets of them, and of their thumbnails.

    explained: {photo number: Explanation}, of those that are judged. stored, listed: see
    _stored_photos.
    """
    covered = [k for k in _doubtful_first(survey) if k in explained][:COVERED_PHOTOS]
    paths, decode = [survey.paths[k] for k in stored], survey.network.read_photo
    sheets, ratios = _save_photos(output, paths, decode, listed, progress)
    photos = []
    for index, (k, ratio) in enumerate(zip(stored, ratios, strict=True)):
        sheet, place = divmod(index, PHOTO_COLUMNS**2)
        photo = {"number": index, "sheet": sheet, "place": place}
        photo |= {"ratio": ratio, "listed": index < listed}
        photo |= _photo_entry(survey, k)
        if k in explained:
            heatmaps = _heatmap_entries(list(explained[k].uncut.values()))
            photo |= {"heatmaps": heatmaps, "worth": _worth_entries(explained[k])}
            if explained[k].of_all_blocks is not None:
                photo["all_blocks"] = _all_blocks_entry(explained[k])
        if k in covered:
            listed_classes = [class_index for class_index, _ in photo["probabilities"]]
            without = probabilities_without_places(survey.predict, explained[k].pixels)
            photo["covered"] = _as_base64(without[..., listed_classes])
        photos.append(photo)
    counts = {"photo_count": len(survey.paths), "places": PLACES}
    return {**counts, "photos": photos, **sheets}


def _all_blocks_entry(explanation):
    """The heatmap of all blocks, of few enough values for the page, its class and its worth."""
    sides = (ALL_BLOCKS_SIDE, ALL_BLOCKS_SIDE)
    small = cv2.resize(explanation.of_all_blocks, sides, interpolation=cv2.INTER_AREA)
    worth = deletion_caption(explanation.class_name, explanation.deletion_of_all_blocks)
    return {"class": explanation.class_index, "map": _encoded(small)[0], "worth": worth}


def _worth_entries(explanation):
    """[class, sentence] on the heatmaps of the class explained and of the predicted one."""
    classes = dict.fromkeys([explanation.class_index, int(explanation.probabilities.argmax())])
    return [
        [k, deletion_caption(explanation.class_names[k], explanation.deletions.get(k))]
        for k in classes
    ]


def _doubtful_first(survey):
    """Numbers of all photos: own ones, then mistakes, the worst first, then the least sure."""
    doubts = doubt(survey.probabilities, survey.labels, survey.network.is_multi_label)
    doubtful = np.argsort(doubts, kind="stable").tolist()
    return [*range(survey.own_count), *(k for k in doubtful if k >= survey.own_count)]


def _training_facts(output, survey, stored, nearest, progress):
    """The training photos that each of the page's photos is most like. Writes a sheet of them.

    like: for each photo [class, [[tile, cosine], …]] of the predicted class, and of the true one
    where that is another.
    """
    likest = []  # for each photo {class index: numbers of training photos}
    for k in stored:
        predicted, label = int(survey.probabilities[k].argmax()), int(survey.labels[k])
        asked = dict.fromkeys([predicted, predicted if label < 0 else label])
        likest.append({it: nearest.of_class(k, it) for it in asked})
    used = sorted({number for of_photo in likest for some in of_photo.values() for number in some})
    paths = [nearest.paths[number] for number in used]
    squeezed = partial(_squeezed, survey.network.read_photo)
    with ThreadPoolExecutor(cores()) as pool:
        thumbnails = [_thumbnail(*it) for it in pool.map(squeezed, paths)]
    columns = math.ceil(math.sqrt(len(used)))
    sheet = _save_tiles(output / "photos_training.jpg", np.stack(thumbnails), columns, quality=70)
    progress.tell("photos_training.jpg")
    tile_of = {number: place for place, number in enumerate(used)}
    like = [
        [
            [it, [[tile_of[m], round(float(nearest.similarity[k, m]), 3)] for m in some]]
            for it, some in of_photo.items()
        ]
        for k, of_photo in zip(stored, likest, strict=True)
    ]
    names = [printable("/".join(path.parts[-2:])) for path in paths]
    return {"count": len(nearest.paths), "sheet": sheet, "names": names, "like": like}


def _stored_photos(survey, explained):
    """Numbers of the photos that the page stores, and how many of the first ones it lists.

    Own photos come first, then the explained ones and the rest of the test, the most doubtful
    first; then those that only lend a patch to a filter.
    """
    in_order = dict.fromkeys([*explained, *_doubtful_first(survey)])
    tests = [k for k in in_order if survey.labels[k] >= 0]
    listed = [*range(survey.own_count), *tests[:LISTED_PHOTOS]]
    lenders = {
        k
        for peaks in survey.peaks.values()
        for number in range(peaks.values.shape[1])
        for k in top_photos(peaks, number, PATCHES)
    }
    for concept in range(len(survey.concepts.vectors)):
        lenders.update(photos_of_concept(survey, concept))
    return [*listed, *sorted(lenders - set(listed))], len(listed)


def _photo_entry(survey, number):
    """What the survey found of one photo."""
    label, probabilities = int(survey.labels[number]), survey.probabilities[number]
    doubts = doubt(probabilities[None], np.array([label]), survey.network.is_multi_label)
    return {
        "name": survey.name(number),
        "verdict": survey.verdict(number),
        "own": label < 0,
        "true": None if label < 0 else label,
        "mistake": bool(doubts[0] < 0),
        "confidence": round(float(probabilities.max()), 4),
        "doubt": round(float(doubts[0]), 4),
        "probabilities": _probability_entries(probabilities, label),
        "heatmaps": _heatmap_entries([survey.uncut_of(number)]),
        "concepts": _concept_entries(survey, number),
    }


def _concept_entries(survey, number):
    """Where each concept lies in a photo, and the strongest shares of its classes' evidence."""
    encoded = list(map(_encoded, np.moveaxis(survey.concept_maps[number], -1, 0)))
    classes = dict.fromkeys(survey.classes[number].tolist())
    shares = [
        [k, [[c, round(share, 3)] for c, share in strongest_shares(survey, number, k)]]
        for k in classes
    ]
    return {"maps": [it[0] for it in encoded], "peaks": [it[1] for it in encoded], "shares": shares}


def _concept_facts(survey, stored):
    """What the page shows of the concepts: how true they are, and for each photos and classes.

    stored: the numbers of the photos that the page has.
    """
    count = len(survey.concepts.vectors)
    found = []
    for concept in range(count):
        photos = [stored.index(k) for k in photos_of_concept(survey, concept)]
        found.append({"photos": photos, "classes": []})
    for class_index in np.unique(survey.class_indices)[:CLASSES_DRAWN].tolist():
        for concept, share, fall in class_concepts(survey, class_index):
            found[concept]["classes"].append([class_index, round(share, 3), round(fall, 2)])
    return {"truth": concept_truth(survey.concepts), "found": found}


def _probability_entries(probabilities, label):
    """[class, probability] pairs, most probable first: LISTED_CLASSES of them and the true one."""
    ranking = _most_probable(probabilities).tolist()
    kept = [k for rank, k in enumerate(ranking) if rank < LISTED_CLASSES or k == label]
    return [[k, round(float(probabilities[k]), 4)] for k in kept]


def _heatmap_entries(of_layers):
    """The entries of a photo's classes, from {class index: (h, w) uncut Grad-CAM} of each layer.

    What speaks for a class and what speaks against it are two maps. A class that the first layers
    lack has those of the last ones.
    """
    entries = []
    for class_index in of_layers[-1]:
        uncut = [of_layer[class_index] for of_layer in of_layers if class_index in of_layer]
        maps, peaks = zip(*(_encoded(np.maximum(0, it)) for it in uncut), strict=True)
        against, against_peaks = zip(*(_encoded(np.maximum(0, -it)) for it in uncut), strict=True)
        entry = {"class": class_index, "peaks": peaks, "maps": maps}
        entries.append(entry | {"against_peaks": against_peaks, "against": against})
    return entries


def _encoded(heatmap):
    """An (h, w) heatmap as base64 of bytes, row by row, and the value that 255 stands for."""
    peak = float(heatmap.max())
    return _as_base64(heatmap / (peak or 1)), float(f"{peak:.4g}")


def _as_base64(shares):
    """Shares from 0 to 1 as base64 of bytes, in the order of the array."""
    return base64.b64encode(np.rint(255 * shares).astype("uint8").tobytes()).decode()


def _save_photos(output, paths, decode, listed, progress):
    """Write sheets of the photos, and one of thumbnails of the first `listed` ones.

    decode: see photo_reader. Returns the entries of the sheets, and the width / height of each
    photo.
    """
    quality = 66 if len(paths) <= LISTED_PHOTOS else 50
    entries, ratios, thumbnails = [], [], []
    with ThreadPoolExecutor(cores()) as pool:
        for some in batched(paths, PHOTO_COLUMNS**2):
            squares = pool.map(partial(_squeezed, decode), some)
            tiles, some_ratios = zip(*squares, strict=True)
            path = output / f"photos_{len(entries) + 1}.jpg"
            entries.append(_save_tiles(path, np.stack(tiles), PHOTO_COLUMNS, quality))
            progress.tell(path.name)
            ratios += some_ratios
            thumbnails += map(_thumbnail, tiles, some_ratios)
    thumbnails = np.stack(thumbnails[:listed])
    columns = math.ceil(math.sqrt(listed))
    sheet = _save_tiles(output / "photos.jpg", thumbnails, columns, quality=70)
    progress.tell("photos.jpg")
    return {"thumbnails": sheet, "photo_sheets": entries}, ratios


def _squeezed(decode, path):
    """A photo as a square of PHOTO_SIDE, and its width / height."""
    photo = decode(path, at_least=PHOTO_SIDE)
    square = cv2.resize(photo, (PHOTO_SIDE, PHOTO_SIDE), interpolation=cv2.INTER_AREA)
    return square, max(0.001, round(photo.shape[1] / photo.shape[0], 3))


def _thumbnail(square, ratio):
    """The middle of a squeezed photo of that ratio, in its true proportions."""
    top, left = (int(PHOTO_SIDE * max(0, 1 - share) / 2) for share in (ratio, 1 / ratio))
    middle = square[top : PHOTO_SIDE - top, left : PHOTO_SIDE - left]
    return cv2.resize(middle, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)


def _save_tiles(path, tiles, columns, quality):
    """Write (n, side, side, 3) uint8 tiles edge to edge; returns their tiling."""
    sheet = tile(tiles, columns, gap=0)
    save_image(path, sheet, quality=quality, optimize=True)
    return tiling(path, sheet, tiles, columns)


def _picture_facts(output, survey, mapped, pictures, stored, progress):
    """What the page shows of the pictures, filters and layers. Writes activation maps.

    mapped: numbers of the photos that have activation maps; stored: of all that the page has.
    """
    filters = _convolution_entries(pictures["filters"])
    maps = _activation_maps(survey, mapped)
    for entry in filters:
        path = output / f"conv2d_{entry['number']}_maps.jpg"
        tiles = maps[entry["activation"]]
        entry["maps"] = _save_tiles(path, tiles, len(tiles) // len(mapped), quality=72)
        entry |= _firing_entries(survey, mapped, stored, entry["activation"])
        progress.tell(path.name)
    shown = []
    for picture in itertools.chain(*pictures.values()):
        width, height = Image.open(output / picture.file).size
        size = {"width": width, "height": height}
        shown.append({"file": picture.file, "caption": picture.caption} | size)
    channels = _convolution_entries(pictures["layers"])
    return {"filters": filters, "channels": channels, "pictures": shown}


def _convolution_entries(pictures):
    """The sheets of convolutions, each with that of its activation where it has one."""
    entries = {}
    for picture in pictures:
        if picture.sheet:
            sheet = picture.sheet | {"caption": picture.caption}
            convolution = sheet.pop("convolution")
            entry = entries.setdefault(convolution["number"], convolution | {"sheets": []})
            entry["sheets"].append(sheet)
    return list(entries.values())


def _firing_entries(survey, mapped, stored, layer):
    """What fires each filter of a layer, and how selective it is; see _selectivity_of.

    patches: for each filter [photo, row, column, activation], strongest first.
    """
    peaks = survey.peaks[layer]
    values, positions = peaks.values.astype(float).round(3).tolist(), peaks.positions.tolist()
    index_of = {k: index for index, k in enumerate(stored)}
    patches = [
        [
            [index_of[k], *positions[k][number], values[k][number]]
            for k in top_photos(peaks, number, PATCHES)
        ]
        for number in range(peaks.values.shape[1])
    ]
    return {
        "field": _layer_entry(survey.network, layer),
        "patches": patches,
        "peaks": [values[k] for k in mapped],
        "selectivity": _selectivity_of(peaks).astype(float).round(3).tolist(),
    }


def _activation_maps(survey, numbers):
    """{layer: tiles (n, MAP_SIDE, MAP_SIDE, 3) uint8} of the filters drawn, photo by photo.

    Black is 0, and a filter has one scale for all photos of the survey, so that they can be
    compared.
    """
    tiles = {layer: [] for layer in survey.peaks}
    colours = matplotlib.colormaps[HEATMAP_COLOURS]
    for some in batched(numbers, 8):  # so many feature maps are in memory together
        pixels = [survey.read(survey.paths[k]) for k in some]
        _, *activations = survey.extract(np.stack(pixels).astype("float32"))
        for layer, activation in zip(survey.peaks, activations, strict=True):
            highest = np.maximum(survey.peaks[layer].values.max(0), 1e-12)
            shares = activation.numpy().clip(0) / highest
            smooth = cv2.INTER_AREA if shares.shape[1] > MAP_SIDE else cv2.INTER_LINEAR
            for of_photo in shares:
                for share in np.moveaxis(of_photo, -1, 0):
                    small = cv2.resize(share, (MAP_SIDE, MAP_SIDE), interpolation=smooth)
                    tiles[layer].append(colours(small, bytes=True)[..., :3])
    return {layer: np.stack(of_layer) for layer, of_layer in tiles.items()}


def _layer_entry(network, name):
    """How many positions a layer has, and where they look, in shares of the photo's sides.

    (down, across) each. start: the middle of the first; step: to the next; size: what each sees.
    """
    field, sides = network.receptive_fields[name], np.array(network.input_size)
    pixels = {"start": field.place((0, 0)), "step": field.stride}
    pixels["size"] = np.minimum(field.size, sides)
    shares = {what: (it / sides).round(5).tolist() for what, it in pixels.items()}
    return {"layer": name, "positions": network.positions(name), **shares}


def _script_text(run):
    """The text of run.js: JSON after its prefix, in ASCII, and harmless whatever a name holds."""
    text = json.dumps(run, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":  # "</script>" would end the script
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f"const run = {text};\n"


def _remove_old_sheets(output, facts):
    """Remove the page's sheets that an earlier run left, and this one has no use for."""
    shown = [*facts["photo_sheets"], *(entry["maps"] for entry in facts["filters"])]
    kept = {sheet["file"] for sheet in shown}
    if facts["training"]:
        kept.add(facts["training"]["sheet"]["file"])
    for names in ("photos_[0-9]*.jpg", "photos_training.jpg", "conv2d_*_maps.jpg"):
        for path in output.glob(names):
            if path.name not in kept:
                path.unlink()


def _copy_page(output):
    """Put a copy of the page beside run.js, where it is not there already."""
    page = output / "index.html"
    if not PAGE.is_file():
        print(f"{printable(PAGE)} is missing: the pictures have no page to show them.")
    elif not (page.exists() and page.samefile(PAGE)):
        with replace_when_whole(page) as partial_path:
            shutil.copyfile(PAGE, partial_path)


# ---- ImageNet's weights, and a first look without them -------------------------------------------

IMAGENET_MD5 = "bcbd6486424b2319ff4ef7d526e38f63"  # of the file without a classifier on top


def quick_options(options, fetch=None, bfloat16=None):
    """The options of a --quick run: whatever was not given is chosen for it.

    fetch: imagenet_weights, or what takes its place. Where it raises OSError and no weights were
    given, the run starts from scratch, and a line says why. bfloat16: whether to compute in it; by
    default where no GPU is used, and the CPU is made for it.
    """
    weights = options.weights
    if weights is None:
        try:
            (fetch or imagenet_weights)()
        except OSError as error:
            print(f"ImageNet's weights cannot be had ({error}): this run starts from scratch.")
            weights = "none"
    if weights == "none":
        return _completed(options, QUICK_FROM_SCRATCH)
    if bfloat16 is None:
        bfloat16 = _computes_in_bfloat16() and not tf.config.list_physical_devices("GPU")
    return _completed(options, QUICK | {"mixed_precision": bfloat16})


def imagenet_address():
    """Where Keras downloads the weights of InceptionV3 without its top from."""
    return sys.modules[keras.applications.InceptionV3.__module__].WEIGHTS_PATH_NO_TOP


def imagenet_weights(address=None, md5=IMAGENET_MD5, seconds=15):
    """The path of ImageNet's weights in Keras's cache, where they are downloaded if need be.

    A file that was cut short is downloaded again. Raises OSError where the server does not answer,
    or falls silent, for so many seconds, or where another file comes.
    """
    address = address or imagenet_address()
    file = _cached_file(address)
    if not (file.is_file() and _md5(file) == md5):
        try:
            _download(address, file, md5, seconds)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # urllib wraps what the socket says
            if isinstance(reason, TimeoutError):
                raise OSError(f"no answer for {seconds} s") from error
            raise OSError(getattr(reason, "strerror", None) or str(error)) from error
    return file


def imagenet_failure(error):
    """The message where ImageNet's weights cannot be fetched: where from, why, other choices."""
    address = imagenet_address()
    return (
        f"ImageNet's weights cannot be fetched from {address} ({error}).\n"
        f"Put that file by hand at {printable(_cached_file(address))},\n"
        "or start from a file with --weights FILE, or from scratch with --weights none."
    )


def _cached_file(address):
    """Where Keras looks for the weights of that address."""
    home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    if not os.access(home, os.W_OK):
        home = Path(tempfile.gettempdir(), ".keras")  # as Keras does
    return home / "models" / address.rpartition("/")[2]


def _md5(file):
    with file.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()


def _download(address, file, md5, seconds):
    """Download a file, showing how far it is. Raises ValueError where another file comes."""
    with _response(address, seconds) as response:
        size = int(response.headers.get("Content-Length", 0))
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(file) as partial_path:
            shown = rich.progress.wrap_file(response, size, description="ImageNet's weights")
            with partial_path.open("wb") as target, shown as source:
                shutil.copyfileobj(source, target)
            if _md5(partial_path) != md5:
                raise ValueError("what came is not the whole file")


def _response(address, seconds):
    """The response of a server, to be read. Raises TimeoutError if none begins within the seconds.

    The limit of a socket is not enough: it holds for each of a server's addresses anew, for each
    byte of its response, and not at all for looking up its name.
    """
    response = Future()

    def ask():
        try:
            response.set_result(urllib.request.build_opener().open(address, timeout=seconds))
        except Exception as error:
            response.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return response.result(seconds)


# ---- From options to a model, and messages -------------------------------------------------------


def require_writable(folder):
    """Raises Stop if no file can be written to the folder, or to where it would be made."""
    places = (folder, *folder.absolute().parents)
    existing = next(place for place in places if os.path.lexists(place))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        raise Stop(f"{printable(folder)}: {reason}. Choose another place.") from error


def require_whole_split(data):
    """Raises Stop where a split is only half in its place; says where nobody looked for copies."""
    script = beside_this_script("create_train_val_test.py")
    if (data / BUILDING / "split.csv").exists():
        remedy = f"{pasteable('python', script, 'PHOTOS', '--output', data)} moves the rest."
        raise Stop(f"{printable(data)}: its split is half in its place.\n{remedy}")
    if (data / "train").is_dir() and not (data / "split.csv").is_file():
        check = pasteable("python", script, data, "--check")
        print(f"No split.csv in {printable(data)}: {check} looks for copies across the parts.")


def require_photos(paths):
    """Raises Stop if one of the photos does not decode."""
    try:
        for path in paths:
            read_photo(path)
    except Stop as stop:
        raise Stop(f"--photos {stop}\nName another photo.") from stop


def open_saved(options):
    """The saved model's Network, its class names, the test photos or None, its record or None."""
    network = Network(load_model(options.model), options.image_size, options.pixels)
    record_file = _history_file(options.model)
    record = _read_record(record_file)
    folder = options.data / "test"
    if options.photos and not folder.is_dir():
        numbered = [f"class {index}" for index in range(network.class_count)]
        test, source, names = None, record_file, record["classes"] if record else numbered
    else:
        read = photo_reader(network.input_size, network.read_photo)
        test, names = open_split(folder, network.input_size, options.batch_size, read=read)
        source = folder
    trained_names = record["classes"] if record else names
    _require_same_classes(options.model, network.class_count, trained_names, names, source)
    return network, names, test, record


def load_model(path):
    """Load a saved classifier to draw pictures from, computing in float32.

    Raises Stop where the file cannot be loaded, saying why, and naming what the model lacks.
    """
    file = printable(path)
    if not path.is_file():
        remedy = "Train one first (without --skip-training), or name another."
        raise Stop(f"--model {file}: no such file. {remedy}")
    try:
        model = _load_saved(path)
    except Stop as stop:
        raise Stop(f"--model {file}: {stop}") from stop
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        reason = _failure(error)
        raise Stop(f"--model {file}: Keras cannot load it: {reason}\nName another.") from error
    try:
        model = in_float32(model)
        network = Network(model)
        network.nearest_convolutions(GRID_CONVOLUTIONS)
    except (Stop, AttributeError, TypeError, IndexError) as error:
        reason = str(error) if isinstance(error, Stop) else "its inputs are not photos"
        raise Stop(f"--model {file}: {reason}\nName another, or train one.") from error
    if network.remark:
        print(f"--model {file}: {network.remark}")
    return model


def in_float32(model):
    """The model with all layers in float32, also if it was trained or saved in half precision."""
    description = model.to_json()
    full_precision = re.sub(r'"(mixed_)?b?float16"', '"float32"', description)
    if full_precision == description:
        return model
    weights = [np.asarray(weight, "float32") for weight in model.get_weights()]
    model = keras.models.model_from_json(full_precision)
    model.set_weights(weights)
    return model


def load_backbone_weights(base, path):
    """Give the backbone the weights of a file. Returns it, with the strides of the file's model.

    The file is a .keras or .h5 model whose backbone is InceptionV3, or weights without a classifier
    on top: .weights.h5, or the …_notop.h5 that Keras downloads. Raises Stop for other files.
    """
    name = printable(path)
    if not path.is_file():
        choices = "Give imagenet, none, or a file of InceptionV3's weights."
        raise Stop(f"--weights {name}: no such file. {choices}")
    try:
        if _description(path) is None:
            with warnings.catch_warnings(action="ignore"):  # one for each layer that a file lacks
                base.load_weights(path)
            return base
        saved = _load_saved(path)
        backbone = keras.Model(saved.inputs, saved.get_layer(BLOCKS[-1]).output)
        poolings = [layer for layer in backbone.layers if isinstance(layer, layers.MaxPooling2D)]
        if any(layer.strides == (1, 1) for layer in poolings):
            base = without_last_stride(base)
        base.set_weights(backbone.get_weights())
        return base
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        raise Stop(
            f"--weights {name}: does not hold InceptionV3's weights.\n"
            "Give a model of this script, a .weights.h5 file without a classifier on top, or\n"
            "Keras's own inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5."
        ) from error


def train_and_save(options, build=build_model):
    """Train, and save the model of the best epoch. Returns what open_saved returns."""
    require_writable(options.model.parent)
    require_whole_split(options.data)
    if options.quick:
        options = quick_options(options)
    size = (options.image_size, options.image_size)
    splits, class_names = open_all_splits(options.data, size, options.batch_size, options.seed)
    start, rate = options.weights, options.learning_rate
    phases = training_phases(options.epochs, start, options.freeze_below, rate)
    _describe(splits, class_names, phases, options.balance)
    options.model.parent.mkdir(parents=True, exist_ok=True)
    lock = options.model.with_name(f".{options.model.name}.lock")
    remedy = "Wait, or choose another --model."
    with locked(lock, f"{printable(options.model)}: another training writes it.\n{remedy}"):
        settings = _run_settings(options, splits, phases)
        same = settings | {"classes": class_names}  # what a resumed run must have in common
        watched = _photos_to_watch(splits["validation"], options.seed)
        folder = options.model.with_name(f"{options.model.stem}_checkpoints")
        checkpoints = Checkpoints(folder, same, watched)
        model = _train_from(options, splits, phases, checkpoints, build)
        photos, _ = splits["test"][0]
        network = Network(model)
        require_finite(*network.activations(photos, [network.heatmap_layer, LOGITS]))
        with replace_when_whole(options.model) as partial_path:
            model.save(partial_path)
        record = {"history": checkpoints.history, "classes": class_names, "settings": settings}
        record["looks"] = checkpoints.looks | {"photos": _shown_photos(*watched, class_names)}
        _write_json(_history_file(options.model), record)
        shutil.rmtree(checkpoints.folder)
    return model, class_names, splits["test"], record


CHECKED_PHOTOS = 64
FEWEST_MENDED = 10  # fewer mistakes that other pixels mend may be chance: 1 in 2 ** 10
SATURATED = 100  # no model is trained to logits that lie so far apart


def warn_of_pixels(survey, name, option):
    """Print a warning where a model was plainly trained on other pixels than it is fed.

    Where classes are known, that is where others of PIXELS get more photos right than chance
    explains. Else it is where only the present ones let the logits lie so far apart that all is
    certain. name: of the model. option: a format of what chooses the pixels.
    """
    known = np.flatnonzero(survey.labels >= 0)
    among = known if len(known) else np.arange(len(survey.paths))
    count = min(CHECKED_PHOTOS, len(among))
    chosen = among[np.linspace(0, len(among) - 1, count).round().astype(int)]
    warn = _warn_of_mistakes if len(known) else _warn_of_certainty
    warn(survey, chosen, name, option)


def _warn_of_mistakes(survey, chosen, name, option):
    """Print which pixels get clearly more of the chosen photos right, by a sign test."""
    labels, now = survey.labels[chosen], survey.network.pixels
    is_right = survey.probabilities[chosen].argmax(1) == labels
    right = is_right.sum()
    # Only mistakes can be mended, and few pixels mend any: hardly a photo is predicted anew.
    if len(chosen) - right < FEWEST_MENDED:
        return
    mended = _right_by_pixels(survey, chosen[~is_right], PIXELS)
    mended = {pixels: count for pixels, count in mended.items() if count >= FEWEST_MENDED}
    kept = _right_by_pixels(survey, chosen[is_right], mended)
    if not mended:
        return
    best = max(mended, key=lambda pixels: mended[pixels] + kept[pixels])
    from scipy.stats import binomtest  # which takes a second to load

    differ = mended[best] + right - kept[best]
    if binomtest(mended[best], differ, alternative="greater").pvalue < 0.001:
        print(
            f"Warning: {name} gets {kept[best] + mended[best]} of {len(chosen)} test photos right "
            f"on pixels in {best}, and {right} on {now}: add {option.format(best)}"
        )


def _warn_of_certainty(survey, chosen, name, option):
    """Print which pixels leave a doubt about the chosen photos, where the present leave none."""
    now = survey.network.pixels
    if np.median(survey.probabilities[chosen].max(1)) < 1:
        return
    gaps = {
        pixels: np.median(np.diff(np.sort(logits)[:, -2:]))
        for pixels, logits in _logits_by_pixels(survey, chosen, PIXELS).items()
    }
    gap = gaps.pop(now)
    fitting = [option.format(pixels) for pixels in gaps if gaps[pixels] < SATURATED]
    if fitting and gap > SATURATED:
        print(
            f"Warning: {name} is certain of everything on pixels in {now} (its two highest logits "
            f"differ by {gap:.0f}).\nIf it was trained on others, add what fits: "
            f"{', '.join(fitting)}"
        )


def without_folders(words):
    """The words of a command with the bare names of files: a page is there to be published."""
    for word in words:
        option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
        yield option + equals + (Path(value).name or value)


def training_photos(folder, class_names):
    """(paths, class indices) of the photos in a train folder; None where it is none of the model's.

    They are not looked at: what does not decode is found where they are read.
    """
    if not folder.is_dir() or class_folders(folder) != class_names:
        return None
    return _photos_of(folder, class_names)


def photos_and_labels(own_photos, test):
    """All photos of a run, own ones first, and their labels, None for own ones.

    test: PhotoBatches, or None where there are only own photos.
    """
    paths, labels = (test.paths, test.labels.tolist()) if test else ([], [])
    return [*own_photos, *paths], [*([None] * len(own_photos)), *labels]


def report(survey, options):
    """Print what the model makes of test photos and own ones; add the metrics to the history."""
    evaluation = survey.evaluation
    if evaluation:
        print(f"\n{evaluation_report(evaluation)}\n", flush=True)
        if not options.skip_training:
            file = _history_file(options.model)
            metrics = {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
            _write_json(file, _read_record(file) | {"test": metrics})
    for path, probabilities in zip(options.photos, survey.probabilities, strict=False):
        best = _most_probable(probabilities)[:3]
        named = (f"{survey.class_names[k]} {percent(probabilities[k])}" for k in best)
        print(f"{printable(path.name)}: {', '.join(named)}", flush=True)


def _require_same_classes(model_file, count, trained_names, names, source):
    """Raises Stop where the class names found in `source` are not those of the model."""
    file, where = printable(model_file), printable(source)
    if trained_names != names:
        trained, found = (", ".join(map(printable, it)) for it in (trained_names, names))
        message = f"--model {file}: was trained on the classes {trained}; {where} holds {found}."
        raise Stop(f"{message}\nName the folders as in training, or name another --data.")
    if count != len(names):
        message = f"--model {file}: has {count} classes, {where} {len(names)}."
        raise Stop(f"{message}\nName another, or train one.")


# A layer of ConvNeXt, the only one of keras.applications that Keras saves but cannot find again.
CONVNEXT = sys.modules[keras.applications.ConvNeXtTiny.__module__]
keras.saving.get_custom_objects()["LayerScale"] = CONVNEXT.LayerScale

# What Keras 2 wrote of layers that do nothing with it, and Keras 3 refuses. groups: of 1.
OLD_ARGUMENTS = (
    "groups",
    "rng_type",
    "kernel_initializer",
    "kernel_regularizer",
    "kernel_constraint",
    "batch_input_shape",
)


def _load_saved(path):
    """The Keras model of a .keras or .h5 file, also of one that Keras 2 wrote, uncompiled.

    Raises Stop for one of Keras 2 that Keras 3 lacks the layers for, and whatever Keras raises for
    other files that it cannot load.
    """
    try:
        # Safe mode, which is Keras's default, runs no code from the file.
        return keras.saving.load_model(path, compile=False)
    except Exception:
        old = _description(path)
        new = _in_keras_3(old)
        if new == old and "OpLambda" not in json.dumps(old):
            raise
    try:
        kind = keras.Sequential if new["class_name"] == "Sequential" else keras.Model
        model = kind.from_config(new["config"])
        model.load_weights(path)
        return model
    except Exception as error:
        raise Stop(
            f"was saved by Keras 2; Keras 3 cannot load it: {_failure(error)}.\n"
            "Build that model anew, call its load_weights() with this file, and save it as .keras."
        ) from error


def _failure(error):
    """Why Keras could not load a file, without its dump of the configuration."""
    text = printable(" ".join(str(error).split()))
    text = text.rpartition("Exception encountered: ")[2]  # the innermost of several
    text = re.split(r"\. |[.,:]? (?:using config|config)=", text)[0]
    return text[:160].rstrip(".")


def _description(path):
    """The configuration of a model, as its file holds it; None where that holds weights alone."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json"))
    with h5py.File(path) as file:
        text = file.attrs.get("model_config")
        return json.loads(text) if text else None


def _in_keras_3(part):
    """A part of a saved configuration as Keras 3 writes it, where Keras 2 wrote it otherwise."""
    if isinstance(part, list):
        return [_in_keras_3(it) for it in part]
    if not isinstance(part, dict):
        return part
    part = {name: _in_keras_3(value) for name, value in part.items()}
    config, kind = part.get("config"), part.get("class_name")
    if not isinstance(config, dict) or not isinstance(kind, str):
        return part
    if "module" in part and kind == "Functional":
        part["module"] = "keras.src.models.functional"  # as Keras 3 writes it
    for ends in ("input_layers", "output_layers"):  # a list of one is more than the one in Keras 3
        if len(config.get(ends, ())) == 1:
            config[ends] = config[ends][0]
    if isinstance(config.get("axis"), list) and len(config["axis"]) == 1:
        config["axis"] = config["axis"][0]
    layer = getattr(layers, kind, None)
    if layer and config.get("groups", 1) == 1:
        known = inspect.signature(layer.__init__).parameters
        refused = set(OLD_ARGUMENTS) - set(known)
        if kind == "InputLayer":
            refused -= {"batch_input_shape"}
        part["config"] = {name: value for name, value in config.items() if name not in refused}
    return part


def _train_from(options, splits, phases, checkpoints, build):
    """Train from the start, or from the newest checkpoint: the model of the best epoch."""
    newest = next(checkpoints.newest(), None)
    if newest and not options.resume:
        _, saved = newest
        epochs = len(saved["history"]["loss"])
        folder = printable(checkpoints.folder)
        print(f"{folder} holds an interrupted run of {epochs} epochs. To go on with it, press")
        print("Ctrl-C and add --resume. Otherwise this run deletes it after its first epoch.")
    keras.utils.clear_session()  # the names of the layers count from the start again
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(half_precision() if options.mixed_precision else "float32")
    with training_strategy().scope():
        model = build(splits["train"].class_count, options.image_size, options.weights)
        if options.resume:
            checkpoints.resume(model)
        train(model, splits, phases, checkpoints, options.balance)
    keras.config.set_dtype_policy("float32")
    best = checkpoints.file_of(checkpoints.best_epoch)
    return in_float32(keras.saving.load_model(best, compile=False))


PHOTOS_WATCHED = 5  # of a class each: where the model looks in them is kept after each epoch


def _photos_to_watch(batches, seed):
    """Photos (n, height, width, 3) float32 and labels (n,): one each of some classes, by seed."""
    order = np.random.default_rng(seed).permutation(len(batches.paths))
    _, first = np.unique(batches.labels[order], return_index=True)
    chosen = order[first[:PHOTOS_WATCHED]]
    return np.stack([batches.photo(index) for index in chosen]), batches.labels[chosen]


def _shown_photos(photos, labels, class_names):
    """[[class name, the photo as base64 of a small JPEG]]"""
    shown = []
    for photo, label in zip(photos, labels, strict=True):
        jpeg = io.BytesIO()
        image = Image.fromarray(photo.astype("uint8"))
        image.resize((160, 160)).save(jpeg, "JPEG", quality=90)
        shown.append([class_names[label], base64.b64encode(jpeg.getvalue()).decode()])
    return shown


def _describe(splits, class_names, phases, balance):
    """Print what is about to be trained, and warnings: of few photos, or classes unlike in size."""
    counts = ", ".join(f"{len(batches.paths)} {name}" for name, batches in splits.items())
    stretches = ", ".join(f"{it.name} {it.end_epoch - it.start_epoch}" for it in phases)
    names = ", ".join(map(printable, class_names[:20])) + (", …" if len(class_names) > 20 else "")
    print(f"Photos: {counts}. Classes: {names}. Epochs: {stretches}.", flush=True)
    for split in ("validation", "test"):
        fewest = np.bincount(splits[split].labels).min()
        if fewest < FEW_PHOTOS:
            few = f"{split} has a class of {fewest} photos"
            print(f"Warning: {few}; fewer than {FEW_PHOTOS} tell little.")
    sizes = np.bincount(splits["train"].labels)
    if differ_in_size(sizes):
        extremes = (sizes.argmax(), sizes.argmin())
        largest, smallest = (f"{sizes[k]} of {printable(class_names[k])}" for k in extremes)
        remedy = "weighed alike (--balance)" if balance else "--balance lets them weigh alike"
        print(f"The classes differ in size ({largest}, {smallest}): {remedy}.")


def _run_settings(options, splits, phases):
    """What the training depends on, for its record."""
    names = ["weights", "epochs", "batch_size", "image_size", "freeze_below", "learning_rate"]
    names += ["balance", "mixed_precision", "seed"]
    settings = {name: getattr(options, name) for name in names}
    settings["weights"] = Path(options.weights).name  # as the page shows it, which is published
    settings["photos"] = {name: len(batches.paths) for name, batches in splits.items()}
    settings["phases"] = {phase.name: phase.end_epoch - phase.start_epoch for phase in phases}
    return settings


def _right_by_pixels(survey, numbers, choices):
    """{pixels: how many of these photos of a survey are right on them}, for some of PIXELS."""
    if not len(numbers):
        return dict.fromkeys(choices, 0)
    labels = survey.labels[numbers]
    return {
        pixels: int(np.sum(logits.argmax(1) == labels))
        for pixels, logits in _logits_by_pixels(survey, numbers, choices).items()
    }


def _logits_by_pixels(survey, numbers, choices):
    """{pixels: (n, classes) logits} of photos of a survey, for each of these PIXELS."""
    network = survey.network
    photos = tf.constant(np.stack([survey.read(survey.paths[k]) for k in numbers]), tf.float32)
    photo_shape = network.shapes[INPUT + 1]

    @tf.function(input_signature=[tf.TensorSpec((None, *photo_shape))], autograph=False)
    def logits_of(seen):
        return network.compute(seen, [LOGITS], start=PHOTO, folded=True)[0]

    found = {}
    for pixels in choices:
        if not (network.is_grey and pixels in PIXELS_OF_COLOURS):
            (seen,) = first_step(pixels, network.is_grey).call(photos)
            found[pixels] = np.concatenate([logits_of(it) for it in batched(seen, PHOTOS_AT_ONCE)])
    return found


def _history_file(model_file):
    return model_file.with_name(f"{model_file.stem}_history.json")


def _read_record(path):
    """{"history", "classes", "settings"} of a training; None if there is no such file.

    Raises Stop if the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        lacking = [name for name in ("history", "classes", "settings") if name not in record]
    except (ValueError, TypeError) as error:
        raise Stop(f"{printable(path)}: is no JSON ({error}).\nMend or remove it.") from error
    if lacking:
        raise Stop(f"{printable(path)}: lacks {', '.join(lacking)}.\nMend or remove it.")
    return record


def _write_json(path, content):
    with replace_when_whole(path) as partial_path:
        # ASCII, as a class name may hold bytes that are no UTF-8.
        partial_path.write_text(json.dumps(content, indent=2), "utf-8")


if __name__ == "__main__":
    run(partial(main, OPTIONS))

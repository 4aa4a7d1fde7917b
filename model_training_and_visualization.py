"""See what a convolutional network sees: fine-tune InceptionV3 on photos, then draw what it learnt.

    python create_train_val_test.py flowers
    python model_training_and_visualization.py

The sections follow a run: 1 photos, 2 model, 3 training, 4 evaluation; then what can be seen in any
convolutional classifier: 5 its layers, 6 activation grids, 7 filter patterns and 8 the waves that
they are made of, 9 what fires a filter, 10 Grad-CAM heatmaps, 11 explanations of photos; at last
12 everything drawn, 13 the page, 14 the run. Three functions work on their own, for any
functional or Sequential Keras classifier that takes 0–255 RGB, and return arrays:

    activation_grid(model, photo, "conv2d_3")
    filter_patterns(model, "conv2d_39", range(64))
    grad_cam(model, photo, "mixed10", class_index=2)
"""

import argparse
import base64
import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

from create_train_val_test import (
    PHOTO_SUFFIXES,
    SPLITS,
    Stop,
    class_folders,
    cores,
    is_hidden,
    locked,
    map_photos,
    pasteable,
    printable,
    read_photo,
    replace_when_whole,
    run,
)



def keras_home():
    return Path(os.path.expanduser("~/.keras"))


download_folder = keras_home
# ---- Settings: what a reader of this study would change ------------------------------------------

AUGMENTATION = {
    "rotation_range": 20,  # degrees either way
    "width_shift_range": 0.2,  # of the side, either way
    "height_shift_range": 0.2,
    "horizontal_flip": True,
}
# In the order of the graph, counted from 1; Keras's names count from 0: the 4th is conv2d_3.
GRID_CONVOLUTIONS = (1, 4, 9)
PATTERN_CONVOLUTIONS = (3, 8, 40)
DELETED_FRACTION = 0.2  # of a photo, blurred away for its heatmap's deletion score

# ---- What can be asked for, before the libraries are loaded --------------------------------------
# TensorFlow takes seconds to load; whoever asks for --help or mistypes an option need not wait.

BLOCKS = [f"mixed{number}" for number in range(11)]  # InceptionV3's, from the photo to the classes


def parse_options():
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune InceptionV3 on split photos, then draw what it sees.",
        usage="python model_training_and_visualization.py [options], --help for all",
    )
    add = parser.add_argument
    folder = {"type": Path, "metavar": "DIR"}
    add("--data", **folder, default=".", help="holds train, validation and test (default: here)")
    add("--output", **folder, default="Images", help="where the pictures go (default: Images)")
    add(
        "--model",
        type=Path,
        default="inceptionv3.keras",
        metavar="FILE",
        help="where the model is saved, or drawn from (default: inceptionv3.keras)",
    )
    add("--skip-training", action="store_true", help="draw from the saved model in --model")
    add(
        "--photos",
        type=Path,
        nargs="+",
        metavar="PHOTO",
        help="own photos to explain; the first one feeds the activation grids",
    )
    add(
        "--weights",
        default="imagenet",
        metavar="START",
        help="imagenet, none (from scratch), or a file of weights or a model (default: imagenet)",
    )
    add("--epochs", type=int, default=10, metavar="N", help="of all phases (default: 10)")
    add("--batch-size", type=int, default=32, metavar="N", help="photos a step (default: 32)")
    add(
        "--image-size",
        type=int,
        default=299,
        metavar="N",
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
    add("--mixed-precision", action="store_true", help="half precision where the machine can")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result (default: 0)")
    options = parser.parse_args()
    check_options(parser, options)
    return options


def check_options(parser, options):
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
    file = printable(options.model)
    suffixes = (".keras", ".h5", ".hdf5") if options.skip_training else (".keras",)
    if options.model.suffix not in suffixes:
        parser.error(f"argument --model: the name must end in {' or '.join(suffixes)}, not {file}")
    if options.model.is_dir():
        parser.error(f"argument --model: {file} is a folder; name a file")


def load_libraries():
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
            settings = "matplotlibrc" if name == "matplotlib" else keras_home() / "keras.json"
            reason = f"{name} cannot take its settings: {printable(str(error))[:200]}"
            raise Stop(f"{printable(settings)}: {reason}\nMend or remove that file.", 1) from error
    backend = sys.modules["keras"].backend.backend()
    if backend != "tensorflow":  # only where Keras was loaded before, as in a notebook
        raise Stop(f"Keras runs on {backend} here. Restart Python, and run this first.", 1)


# This code is written for Keras 3 on TensorFlow, whatever a settings file or a shell says.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_USE_LEGACY_KERAS"] = "0"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # 3: only what ends the process
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # keeps freed memory: faster ascent

if __name__ == "__main__":
    run(parse_options)
    gc.disable()  # while the libraries load: they make millions of objects, and hardly any garbage
    run(load_libraries)

import cv2
import h5py
import keras
import matplotlib
import matplotlib.style
import numpy as np
import rich.progress
import tensorflow as tf
from keras import layers
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

if __name__ == "__main__":
    gc.freeze()
    gc.enable()

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

# ---- 1. Photos: from the split folders to augmented batches --------------------------------------
# Each photo is squeezed to the square that the model takes, as 0–255 RGB. Training photos are
# turned, shifted and mirrored at random in every epoch, so that the model never meets the same
# picture twice and learns none by heart.


@lru_cache(maxsize=4000)  # about 1 GB at 299 pixels; more photos are decoded again in every epoch
def model_input(path, height, width):
    """A photo as the model is to see it: (height, width, 3) uint8 RGB, 0–255.

    Raises Stop if it does not decode.
    """
    photo = Image.fromarray(read_photo(path, at_least=max(height, width)))
    return np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))


class PhotoGenerator(tf.keras.preprocessing.image.ImageDataGenerator):
    """ImageDataGenerator whose affine step is an OpenCV warp: the result of SciPy's, but faster."""

    def apply_transform(self, x, transform_parameters):
        """Turn, shift, shear, zoom and mirror a (height, width, 3) float photo; see Keras."""
        if self.fill_mode == "nearest":  # the other modes stay with SciPy
            names = ("theta", "tx", "ty", "shear", "zx", "zy")
            affine = {
                name: transform_parameters[name] for name in names if name in transform_parameters
            }
            x = affine_warp(x, **affine)
            transform_parameters = {
                name: value for name, value in transform_parameters.items() if name not in names
            }
        return super().apply_transform(x, transform_parameters)


def affine_warp(photo, theta=0, tx=0, ty=0, shear=0, zx=1, zy=1):
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


class PhotoBatches(keras.utils.PyDataset):
    """Batches of photos (n, height, width, 3) float32 RGB, 0–255, and labels (n, classes) one-hot.

    With a generator the photos are shuffled and augmented anew in every epoch. The same seed and
    epoch give the same batches, whichever worker builds them.
    """

    seeding = threading.Lock()  # Keras draws from NumPy's global generator, which workers share

    def __init__(self, paths, labels, class_count, size, batch_size, generator=None, seed=0):
        super().__init__(workers=min(8, cores()))
        self.paths, self.labels, self.class_count = paths, np.asarray(labels), class_count
        self.height, self.width = size
        self.batch_size, self.generator, self.seed = batch_size, generator, seed
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
        photo = model_input(self.paths[index], self.height, self.width).astype("float32")
        if self.generator is None:
            return photo
        sequence = np.random.SeedSequence([self.seed, self.epoch, index])
        with self.seeding:
            seed = sequence.generate_state(1)[0]
            parameters = self.generator.get_random_transform(photo.shape, seed)
        return self.generator.apply_transform(photo, parameters)

    def on_epoch_end(self):
        self.epoch += 1


def photo_files(folder):
    """The sorted paths of the photos in a folder and its visible subfolders."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    return sorted(path for path in files if not any(map(is_hidden, path.relative_to(folder).parts)))


def open_split(folder, size, batch_size, seed=0, generator=None):
    """The photos of a split folder, as (PhotoBatches, class names).

    Raises Stop where classes or their photos are missing, or a photo does not decode.
    """
    remedy = "Split your photos: " + split_command(folder.parent)
    if not folder.is_dir():
        raise Stop(f"{printable(folder)}: no such folder.\n{remedy}")
    class_names = class_folders(folder)
    if len(class_names) < 2:
        raise Stop(f"{printable(folder)}: needs two class folders or more.\n{remedy}")
    files = [photo_files(folder / name) for name in class_names]
    empty = [printable(name) for name, found in zip(class_names, files, strict=True) if not found]
    if empty:
        raise Stop(f"{printable(folder)}: no photos in {', '.join(empty)}.\n{remedy}")
    paths = [path for found in files for path in found]
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
    decode = partial(model_input, height=size[0], width=size[1])
    try:
        for _ in map_photos(paths, decode, f"Checking {folder.name}"):
            pass
    except Stop as stop:
        raise Stop(f"{stop}\nRemove it, or split again: {split_command(folder.parent)}") from stop
    batches = PhotoBatches(paths, labels, len(class_names), size, batch_size, generator, seed)
    return batches, class_names


def split_command(folder):
    """The command that fills the folder with train, validation and test."""
    words = ["python", "create_train_val_test.py", "PHOTOS", "--output", os.fspath(folder)]
    if any((folder / name).exists() for name in SPLITS):
        words.append("--overwrite")
    return pasteable(*words)


def open_all_splits(data, size, batch_size, seed):
    """{"train", "validation", "test": PhotoBatches}, training photos augmented, and class names.

    Raises Stop where a split cannot be used, or the splits hold different classes.
    """
    generator = PhotoGenerator(**AUGMENTATION)
    opened = {
        name: open_split(
            data / name, size, batch_size, seed, generator if name == "train" else None
        )
        for name in SPLITS
    }
    _, class_names = opened["train"]
    for name, (_, others) in opened.items():
        if others != class_names:
            different = ", ".join(map(printable, sorted(set(others) ^ set(class_names))))
            folders = f"{printable(data / 'train')} and {printable(data / name)}"
            message = f"{folders} hold different classes: {different}."
            raise Stop(f"{message}\nSplit again: {split_command(data)}")
    return {name: batches for name, (batches, _) in opened.items()}, class_names


# ---- 2. Model: InceptionV3 with a new head -------------------------------------------------------
# The convolutions of InceptionV3 turn a photo into 2048 small feature maps ("mixed10"); their means
# go through a small classifier, the head. The model scales the pixels itself: whoever loads the
# saved file feeds plain photos and cannot get the range wrong.


# Along each side of the last feature maps, from scratch: with fewer a heatmap tells little. Weights
# that are given keep the strides that they were learnt with.
FEWEST_POSITIONS = 5


def build_model(class_count, image_size, weights):
    """InceptionV3 on (n, size, size, 3) RGB, 0–255, with a softmax over the classes.

    weights: "imagenet", "none" (from scratch) or a file. Raises Stop where they cannot be had.
    """
    photo = keras.Input((image_size, image_size, 3), name="photo")
    # ImageNet's weights expect [-1, 1].
    scaled = layers.Rescaling(1 / 127.5, offset=-1, name="scaled")(photo)
    base = keras.applications.InceptionV3(include_top=False, weights=None, input_tensor=scaled)
    if weights == "imagenet":
        load_imagenet_weights(base)
    elif weights != "none":
        base = load_backbone_weights(base, Path(weights))
    elif base.output.shape[1] < FEWEST_POSITIONS:
        base = without_last_stride(base)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            # At Keras's 0.99 the moving statistics lag hundreds of steps: too far for a short run.
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
    unchanged = keras.Model(base.input, base.get_layer("mixed7").output).layers

    def with_stride_1(layer):
        config = layer.get_config()
        if layer not in unchanged and "strides" in config:
            config["strides"] = (1, 1)
        return type(layer).from_config(config)

    return keras.models.clone_model(base, base.inputs, with_stride_1)


def lacks_last_stride(backbone):
    poolings = [layer for layer in backbone.layers if isinstance(layer, layers.MaxPooling2D)]
    return any(layer.strides == (1, 1) for layer in poolings)


def load_imagenet_weights(base):
    """Give the backbone ImageNet's weights, which Keras downloads once.

    Raises Stop, naming the file and where to put it, where they cannot be fetched.
    """
    address = sys.modules[keras.applications.InceptionV3.__module__].WEIGHTS_PATH_NO_TOP
    try:
        pretrained = keras.applications.InceptionV3(include_top=False, weights="imagenet")
    except Exception as error:  # Keras raises a bare Exception where it cannot reach the address
        file = download_folder() / "models" / address.rpartition("/")[2]
        raise Stop(
            f"ImageNet's weights cannot be fetched from {address}\n"
            f"Put that file by hand at {printable(file)},\n"
            "or start from a file with --weights FILE, or from scratch with --weights none.",
            exit_code=1,
        ) from error
    base.set_weights(pretrained.get_weights())


def load_backbone_weights(base, path):
    """Give the backbone the weights of a file, with a classifier on top of them or without.

    Returns the backbone, with the strides of the file's model. The file is a .keras or .h5 model, a
    .weights.h5 file, or one that Keras itself downloads (…_kernels_notop.h5, and …_kernels.h5 with
    its 1000 classes). Raises Stop for other files.
    """
    name = printable(path)
    if not path.is_file():
        choices = "Give imagenet, none, or a file of InceptionV3's weights."
        raise Stop(f"--weights {name}: no such file. {choices}")
    try:
        with warnings.catch_warnings(action="ignore"):  # one for each layer that a file lacks
            if holds_model(path):
                # Safe mode, which is Keras's default, runs no code from the file.
                saved = keras.saving.load_model(path, compile=False)
                backbone = keras.Model(saved.inputs, saved.get_layer(BLOCKS[-1]).output)
                if lacks_last_stride(backbone):
                    base = without_last_stride(base)
                base.set_weights(backbone.get_weights())
            else:
                with_top(base, classes_of_top(path)).load_weights(path)
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        raise Stop(
            f"--weights {name}: does not hold InceptionV3's weights.\n"
            "Give a model of this script, a .weights.h5 file, or a file that Keras downloads:\n"
            "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5 or …_kernels.h5."
        ) from error
    return base


def holds_model(path):
    """Whether a file holds a model, its graph and its weights, and not weights alone."""
    if path.suffix == ".keras":
        return True
    with h5py.File(path) as file:
        return "model_config" in file.attrs


def classes_of_top(path):
    """How many classes a weights file in Keras 2's layout was trained on; 0 without a top."""
    with h5py.File(path) as file:
        if "predictions" not in file:  # the name of Keras's own last layer
            return 0
        top = file["predictions"]
        return len(top[top.attrs["weight_names"][-1]])


def with_top(base, class_count):
    """The backbone with Keras's own classifier on top, as files with a top expect it.

    Such a file names no layer that can be relied on: its weights go to the layers in order.
    """
    if not class_count:
        return base
    pooled = layers.GlobalAveragePooling2D()(base.output)
    return keras.Model(base.input, layers.Dense(class_count)(pooled))


# ---- 3. Training: first the head, then the upper blocks ------------------------------------------
# Pretrained layers know edges, petals and textures; a new head knows nothing, and its first wild
# gradients would spoil them. So the head learns alone on the frozen base ("head"), then the upper
# blocks follow at a low learning rate ("fine-tuning"). From scratch all layers learn at once
# ("scratch"). In both of these the rate warms up for a tenth of the steps, then falls to 0 along a
# cosine.


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


def freeze(model, phase):
    """Let the phase's layers learn, and no others; BatchNormalization only in phase "scratch".

    Frozen, it scales by the moving mean and variance that came with the weights, in training as in
    validation. In every phase but "scratch" it stays so: the head learns on features that are
    scaled that way, and would have to learn again if they changed when the blocks are unfrozen.
    """
    below = phase.freeze_below
    poolings = [layer for layer in model.layers if isinstance(layer, layers.MaxPooling2D)]
    last_frozen = {"none": None, "head": BLOCKS[-1]}
    if below in BLOCKS:
        # What comes before mixed0 is the stem, which ends with the second pooling.
        ends = [poolings[1].name, *BLOCKS]
        last_frozen[below] = ends[BLOCKS.index(below)]
    frozen = []
    if last_frozen[below]:
        frozen = keras.Model(model.input, model.get_layer(last_frozen[below]).output).layers
    for layer in model.layers:
        normalizes = isinstance(layer, layers.BatchNormalization)
        layer.trainable = layer not in frozen and (phase.batch_statistics or not normalizes)


def compile_for(model, phase, steps_per_epoch):
    """Freeze what the phase freezes; set the loss, and an Adam at the phase's learning rate."""
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
    # Optimizer and metrics get their variables now: made in the first step, it is traced twice.
    model.optimizer.build(model.trainable_variables)
    nothing = np.zeros((1, *model.output_shape[1:]), "float32")
    model.compute_metrics(None, nothing, nothing)
    model.reset_metrics()


def train(model, splits, phases, checkpoints):
    """Train through the phases, from the epoch where the checkpoints stand.

    Raises Stop where the loss becomes NaN or the memory runs out.
    """
    photos = splits["train"]
    for phase in phases:
        if checkpoints.epochs >= phase.end_epoch:
            continue
        compile_for(model, phase, len(photos))
        if checkpoints.epochs > phase.start_epoch:
            # Loaded again: there is an optimizer now, which gets its state back.
            model.load_weights(checkpoints.file_of(checkpoints.epochs))
        photos.epoch = checkpoints.epochs
        epochs = f"epochs {checkpoints.epochs + 1} to {phase.end_epoch}"
        print(f"Phase {phase.name}: {epochs}, learning rate {phase.learning_rate:g}.")
        print("Its first step takes a while, as the model is compiled.", flush=True)
        try:
            model.fit(
                photos,
                validation_data=splits["validation"],
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


METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


class Checkpoints(keras.callbacks.Callback):
    """Keeps whole epochs in a folder, so that an interrupted run can go on.

    A checkpoint is one .keras file with weights, optimizer, settings and history. Unlike Keras's
    BackupAndRestore it is never written in place. The last two epochs stay, in case the last cannot
    be read, and with each the epoch that was the best by then. Raises Stop where the loss is NaN.
    """

    RECORD = "record.json"  # in the file, beside what Keras writes: settings and history

    def __init__(self, folder, settings):
        super().__init__()
        self.folder, self.settings = folder, settings
        self.run_name = f"{time.time_ns():x}"  # sorts later runs after earlier ones
        self.history = {name: [] for name in METRICS}

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

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            rate = f"at learning rate {float(self.model.optimizer.learning_rate):.2g}"
            best = printable(self.file_of(self.best_epoch))
            kept = f"Best weights so far: {best}. " if self.epochs else ""
            remedy = f"{kept}Train with a smaller --learning-rate."
            raise Stop(f"The loss became NaN in epoch {epoch + 1} {rate}.\n{remedy}", exit_code=1)
        history = {name: [*values, float(logs[name])] for name, values in self.history.items()}
        record = json.dumps({"settings": self.settings, "history": history})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(self.file_of(epoch + 1)) as partial_path:
            self.model.save(partial_path)
            with zipfile.ZipFile(partial_path, "a") as archive:
                archive.writestr(self.RECORD, record)
        needed = {self.epochs, self.best_epoch}
        self.history = history
        needed |= {self.epochs, self.best_epoch}
        for file in set(self.folder.glob("*.keras")) - {self.file_of(number) for number in needed}:
            file.unlink()

    def newest(self):
        """Yield (file, settings, history) of each epoch that can be read, the newest one first."""
        for file in sorted(self.folder.glob("*_epoch_*.keras"), reverse=True):
            try:
                with zipfile.ZipFile(file) as archive:
                    record = json.loads(archive.read(self.RECORD))
                yield file, record["settings"], record["history"]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                print(f"{printable(file)}: cannot be read; the epoch before it is tried.")

    def resume(self, model):
        """Load the newest epoch that can be read into an uncompiled model.

        Raises Stop if there is none, or its settings differ.
        """
        folder, remedy = printable(self.folder), "leave out --resume to start a new run."
        for file, settings, history in self.newest():
            different = [
                name for name in self.settings if settings.get(name) != self.settings[name]
            ]
            if different:
                was = (
                    f"{name} {settings.get(name)}, not {self.settings[name]}" for name in different
                )
                message = f"--resume: the run in {folder} had {'; '.join(was)}."
                raise Stop(f"{message}\nGive the same, or {remedy}")
            try:
                model.load_weights(file)
            except Exception:  # a damaged file can fail in many ways
                print(f"{printable(file)}: cannot be read; the epoch before it is tried.")
                continue
            self.run_name, self.history = file.name.partition("_epoch_")[0], history
            return
        raise Stop(f"--resume: no epoch in {folder} can be read.\nL{remedy[1:]}")


def half_precision():
    """Keras's dtype policy for half precision, or for full where the machine lacks it."""
    if tf.config.list_physical_devices("GPU"):
        return "mixed_float16"
    if computes_in_bfloat16():
        return "mixed_bfloat16"
    print("--mixed-precision: no GPU, nor a CPU known to compute in bfloat16; float32 is used.")
    return "float32"


def computes_in_bfloat16():
    """Whether the CPU is known to have instructions for bfloat16."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.is_file() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def training_strategy():
    """Mirrors the model over all GPUs (or logical CPUs) where there are several."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


# ---- 4. Evaluation: what the model gets right and wrong ------------------------------------------
# The test photos took no part in training, nor in the choice of the best epoch: their metrics tell
# how the model does on photos that it has never met. They are computed once, at the end.


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for photos whose class is known."""

    class_names: list
    labels: np.ndarray  # (n,) true class indices
    probabilities: np.ndarray  # (n, classes) float, each row sums to 1

    @cached_property
    def predicted(self):
        return self.probabilities.argmax(1)

    @cached_property
    def accuracy(self):
        return float(np.mean(self.predicted == self.labels))

    @cached_property
    def loss(self):
        losses = keras.losses.sparse_categorical_crossentropy(self.labels, self.probabilities)
        return float(np.mean(losses))

    @cached_property
    def confusion(self):
        """(classes, classes) counts: row the true class, column the predicted one."""
        counts = np.zeros((len(self.class_names),) * 2, int)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    @property
    def chance(self):
        """The accuracy of always guessing the most frequent class, plus 2 standard deviations."""
        share = np.bincount(self.labels).max() / len(self.labels)
        return share + 2 * math.sqrt(share * (1 - share) / len(self.labels))


def evaluation_report(evaluation):
    """Loss and accuracy; a line of precision and recall for each class; the pairs most confused."""
    names = [printable(name) for name in evaluation.class_names]
    width = max(map(len, names))
    lines = [
        f"Test: loss {evaluation.loss:.4f}  accuracy {evaluation.accuracy:.4f}",
        f"{'class':{width}}  precision  recall  photos",
    ]
    for index, name in enumerate(names):
        correct = evaluation.confusion[index, index]
        predicted = evaluation.confusion[:, index].sum()
        photos = evaluation.confusion[index].sum()
        precision = f"{correct / predicted:.2f}" if predicted else "—"
        recall = f"{correct / photos:.2f}" if photos else "—"
        lines.append(f"{name:{width}}  {precision:>9}  {recall:>6}  {photos:6}")
    lines.append(most_confused(evaluation.confusion, names))
    if evaluation.accuracy <= evaluation.chance:
        lines.append(
            "Warning: this accuracy is no better than chance; train longer, on more photos."
        )
    return "\n".join(lines)


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


def choose_examples(evaluation):
    """Photo indices: the most confident correct one, then worst mistakes, then least confident."""
    count = len(evaluation.labels)
    true_probability = evaluation.probabilities[np.arange(count), evaluation.labels]
    correct = evaluation.predicted == evaluation.labels
    by_mistake = np.lexsort((true_probability, correct)).tolist()
    if not correct.any():
        return by_mistake
    most_confident = int(np.argmax(np.where(correct, true_probability, -1)))
    return [most_confident, *(index for index in by_mistake if index != most_confident)]


# ---- 5. The layers of any classifier -------------------------------------------------------------
# A Keras model is a graph: nodes that call a layer on tensors. Whatever the pictures need to know
# of a model (which layers there are, in which order, where their positions look) is read off that
# graph, so that they can be drawn for any convolutional classifier, nested base models included.


def nodes(model):
    """The nodes of a model's graph, each after its inputs, branches in the order they are merged.

    For the models of keras.applications that is the order in which their layers were created;
    model.layers and model.operations are sorted by depth instead.
    """
    return nodes_before(model.outputs)


def nodes_before(outputs):
    """The nodes that these tensors come from, each after its inputs."""
    ordered, done = [], set()
    waiting = [node_of(output) for output in reversed(outputs)]
    while waiting:  # no recursion: deep models exceed the depth that Python allows
        node = waiting[-1]
        missing = next((it for it in map(node_of, node.input_tensors) if it not in done), None)
        if missing:
            waiting.append(missing)
            continue
        waiting.pop()
        if node not in done:
            ordered.append(node)
            done.add(node)
    return ordered


def node_of(tensor):
    """The node that a tensor is an output of."""
    layer, node_index, _ = tensor._keras_history
    return layer._inbound_nodes[node_index]


def rebuild(model, photo, replaced=None):
    """Call the model's layers anew on another input tensor: the list of its outputs.

    Nested models are unfolded. The layers are the same ones and keep their weights, but for those
    that are replaced: {layer: another one, or a function}.
    """
    replaced = replaced or {}
    tensors = {id(model.inputs[0]): photo}
    for node in nodes(model):
        if node.is_input:
            continue
        arguments, options = node.arguments.fill_in(tensors)
        if isinstance(node.operation, keras.Model):
            outputs = rebuild(node.operation, arguments[0])
        else:
            operation = replaced.get(node.operation, node.operation)
            outputs = tf.nest.flatten(operation(*arguments, **options))
        tensors.update(zip(map(id, node.outputs), outputs, strict=True))
    return [tensors[id(output)] for output in model.outputs]


def flatten(model, photo):
    """The model as one flat graph from another input tensor, its nested models unfolded.

    Where two layers then have the same name, which Keras forbids, the second one is renamed.
    """
    outputs = rebuild(model, photo)
    name_apart(outputs)
    return keras.Model(photo, outputs)


def name_apart(outputs):
    """Rename each layer before these tensors that has the name of an earlier one: add to add_b."""
    named = {}
    for node in nodes_before(outputs):
        layer = node.operation
        while named.setdefault(layer.name, layer) is not layer:
            layer.name += "_b"


@lru_cache(maxsize=2)
def classifier(model):
    """The model as one flat graph from (n, height, width, 3) RGB, 0–255, to class probabilities.

    It shares the model's layers. Its last layer is a softmax on the logits, whatever the model ends
    in: softmax or a single sigmoid, as activation or as layer, or logits. A single sigmoid p gives
    two classes, 1 - p and p. An input of open size becomes 299 × 299. Raises Stop, naming what the
    model lacks.
    """
    shape = getattr(model, "input_shape", None)
    if not getattr(model, "outputs", None) or len(model.outputs) != 1 or isinstance(shape, list):
        raise Stop(
            "The pictures need a functional or Sequential model of one input and one output."
        )
    if len(shape) != 4 or shape[3] != 3:
        raise Stop(f"The pictures need a model that takes RGB photos; this one takes {shape[1:]}.")
    photo = keras.Input([side or 299 for side in shape[1:3]] + [3], name="rgb")
    probabilities = layers.Softmax(name="class_probabilities")(class_logits(flatten(model, photo)))
    name_apart([probabilities])
    return keras.Model(photo, probabilities)


def class_logits(flat):
    """The logits (n, classes) that a flat classifier's probabilities are made of.

    Raises Stop where they are not those of a softmax or a single sigmoid.
    """
    node = nodes(flat)[-1]
    head, features = node.operation, node.input_tensors[0]
    activation = getattr(head, "activation", None)
    if isinstance(head, layers.Softmax):
        logits, activation = features, keras.activations.softmax
    elif isinstance(head, layers.Activation):
        logits = features
    elif isinstance(head, layers.Dense):
        logits = keras.ops.matmul(features, head.kernel)
        logits = logits + head.bias if head.use_bias else logits
    else:
        logits, activation = flat.outputs[0], keras.activations.linear
    single = logits.shape[-1] == 1
    fitting = (keras.activations.sigmoid,) if single else (keras.activations.softmax,)
    if len(logits.shape) != 2 or activation not in (*fitting, keras.activations.linear):
        raise Stop("The pictures need a model that ends in a softmax or in a single sigmoid.")
    if single:  # softmax(-z/2, z/2) = (1 - sigmoid(z), sigmoid(z))
        logits = keras.ops.concatenate([-logits / 2, logits / 2], axis=-1)
    return logits


def layer_outputs(model):
    """{layer name: its output tensor} of the model as a classifier, in the order of the graph."""
    graph = nodes(classifier(model))
    return {node.operation.name: node.outputs[0] for node in graph if not node.is_input}


@lru_cache(maxsize=8)  # to build it takes as long as to run it
def feature_extractor(model, layer_names):
    """A model from (n, height, width, 3) RGB, 0–255, to the outputs of some layers.

    layer_names: a tuple. Raises Stop for a layer that the model lacks.
    """
    outputs = layer_outputs(model)
    lacking = [name for name in layer_names if name not in outputs]
    if lacking:
        raise Stop(
            f"The model has no layer {lacking[0]}. It has {', '.join(list(outputs)[-8:])}, …"
        )
    return keras.Model(classifier(model).input, [outputs[name] for name in layer_names])


def folded(extractor):
    """The same extractor for images of any size, a fifth faster, for inference alone.

    In inference BatchNormalization only scales and shifts each channel. The convolution before it
    does the same with scaled weights and a shifted bias: the two become one.
    """
    graph = nodes(extractor)
    consumers, calls = consumers_of(graph), Counter(node.operation for node in graph)
    asked, replaced = set(map(id, extractor.outputs)), {}
    for node in graph:
        convolution, output = node.operation, node.outputs[0]
        following = [after.operation for after in consumers.get(id(output), [])]
        linear = getattr(convolution, "activation", None) is keras.activations.linear
        if type(convolution) is not layers.Conv2D or not linear:
            continue
        if len(following) != 1 or not isinstance(following[0], layers.BatchNormalization):
            continue
        (normalization,) = following
        shared = calls[convolution] > 1 or calls[normalization] > 1
        of_channels = normalization.axis in (-1, 3)
        if of_channels and not shared and id(output) not in asked:
            replaced[convolution] = normalized(convolution, normalization)
            replaced[normalization] = lambda inputs, **_: inputs
    image = keras.Input((None, None, 3))
    return keras.Model(image, rebuild(extractor, image, replaced))


def normalized(convolution, normalization):
    """A convolution that does what these two layers do one after the other in inference."""
    settings = convolution.get_config() | {"use_bias": True, "activation": None}
    both = layers.Conv2D.from_config(settings)
    both.build((None, None, None, convolution.kernel.shape[2] * convolution.groups))
    scale = (normalization.moving_variance + normalization.epsilon) ** -0.5
    scale = scale * normalization.gamma if normalization.scale else scale
    shift = -normalization.moving_mean * scale
    shift = shift + normalization.beta if normalization.center else shift
    shift = shift + convolution.bias * scale if convolution.use_bias else shift
    both.set_weights([convolution.kernel * scale, shift])
    return both


def input_size(model):
    """The (height, width) in pixels of the photos that the model takes."""
    return classifier(model).input_shape[1:3]


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


CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
ACTIVATIONS = (layers.Activation, layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU)


def convolutions(model):
    """All convolutions of the model whose output has positions, in the order of the graph."""
    fields, graph = receptive_fields(model), nodes(classifier(model))
    consumers = consumers_of(graph)
    found = [
        node
        for node in graph
        if isinstance(node.operation, CONVOLUTIONS) and node.operation.name in fields
    ]
    return [
        Convolution(
            number,
            len(found),
            node.operation.name,
            activation_of(node, consumers),
            node.outputs[0].shape[-1],
        )
        for number, node in enumerate(found, start=1)
    ]


def consumers_of(graph):
    """{id of a tensor: the nodes that take it}."""
    consumers = {}
    for node in graph:
        for tensor in node.input_tensors:
            consumers.setdefault(id(tensor), []).append(node)
    return consumers


def activation_of(node, consumers):
    """The layer that activates a convolution's output, through its BatchNormalization.

    Where none does (the convolution has an activation of its own, or a merge comes first): the
    BatchNormalization, or without one the convolution.
    """
    while True:
        following = consumers.get(id(node.outputs[0]), [])
        if len(following) != 1:
            return node.operation.name
        (after,) = following
        if isinstance(after.operation, ACTIVATIONS):
            return after.operation.name
        if not isinstance(after.operation, layers.BatchNormalization):
            return node.operation.name
        node = after


def choose_convolutions(model, numbers):
    """The convolutions of these numbers, or the nearest that a smaller model has."""
    available = convolutions(model)
    if not available:
        raise Stop("The pictures need a model with convolutions; this one has none.")
    chosen = sorted({min(number, len(available)) for number in numbers})
    return [available[number - 1] for number in chosen]


def heatmap_layer(model):
    """The name of the last layer with positions whose output alone feeds all that comes after it.

    It is the usual layer for Grad-CAM. A layer with a single position, which tells no place, is
    taken only if there is no other.
    """
    fields, outputs = receptive_fields(model), layer_outputs(model)
    names = [name for name in bottlenecks(model) if name in fields]
    several = [name for name in names if math.prod(outputs[name].shape[1:3]) > 1]
    return (several or names)[-1]


def bottlenecks(model):
    """Names of the layers that no connection bypasses: all later ones depend on them alone."""
    graph = nodes(classifier(model))
    last_use = {}
    for place, node in enumerate(graph):
        last_use |= {id(tensor): place for tensor in node.input_tensors}
    names, needed_until = [], 0  # how far down the graph the outputs of earlier layers are taken
    for place, node in enumerate(graph):
        if needed_until <= place and not node.is_input:
            names.append(node.operation.name)
        needed_until = max(needed_until, *(last_use.get(id(it), 0) for it in node.outputs))
    return names


def block_layers(model, most=11):
    """Names of the layers that end the model's blocks, evenly chosen if there are more than `most`.

    They are merges (add or concatenate) that do not just feed another merge; in a model without
    merges the last layer of each resolution.
    """
    fields, graph = receptive_fields(model), nodes(classifier(model))
    consumers = consumers_of(graph)

    def merges(node):
        merge = type(node.operation).__name__ in ("Add", "Concatenate")
        return merge and len(node.input_tensors) > 1  # not just with a constant

    names = [
        node.operation.name
        for node in graph
        if merges(node)
        and node.operation.name in fields
        and not all(map(merges, consumers[id(node.outputs[0])]))
    ]
    if not names:
        start = list(fields).index(convolutions(model)[0].layer)
        outputs = layer_outputs(model)
        names = list({outputs[name].shape[1:3]: name for name in list(fields)[start:]}.values())
    chosen = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return [names[index] for index in chosen]


def heatmap_layers(model):
    """The ends of the blocks, and at last the layer whose heatmap every photo has."""
    last = heatmap_layer(model)
    return [*(name for name in block_layers(model) if name != last), last]


@dataclass(frozen=True)
class ReceptiveField:
    """Where a layer's positions look, in pixels of the model's input: (rows, columns) each."""

    centre: tuple  # of the first position; the centre of pixel k is k
    stride: tuple  # from one position to the next
    size: tuple  # what a position can see

    def after_window(self, kernel, strides, padding):
        """The field after a window of this kernel size; padding: positions put before the first."""
        centre, stride, size = map(np.array, (self.centre, self.stride, self.size))
        kernel, strides, padding = map(np.array, (kernel, strides, padding))
        centre = centre + ((kernel - 1) / 2 - padding) * stride
        size = size + (kernel - 1) * stride
        stride = stride * strides
        return ReceptiveField(*(tuple(it.tolist()) for it in (centre, stride, size)))


@lru_cache(maxsize=2)
def receptive_fields(model):
    """{layer name: ReceptiveField} of all layers that have positions, in the order of the graph.

    See Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks"
    (Distill, 2019). InceptionV3 does not pad its strided layers, so that its positions look at the
    inner part of the photo; models that pad look elsewhere again.
    """
    flat = classifier(model)
    by_tensor = {id(flat.input): ReceptiveField((0, 0), (1, 1), (1, 1))}
    by_layer = {}
    for node in nodes(flat):
        sources = [tensor for tensor in node.input_tensors if id(tensor) in by_tensor]
        output = node.outputs[0]
        if sources and len(output.shape) == 4 and not is_global(node.operation, sources, output):
            field = field_after(node.operation, sources, output, by_tensor)
            by_tensor[id(output)] = by_layer[node.operation.name] = field
    return by_layer


def is_global(layer, sources, output):
    """Whether a layer gathers all positions into one, which then looks at no place."""
    if isinstance(layer, layers.GlobalAveragePooling2D | layers.GlobalMaxPooling2D):
        return True
    windows = hasattr(layer, "kernel_size") or hasattr(layer, "pool_size")
    return not windows and output.shape[1:3] == (1, 1) != sources[0].shape[1:3]


def field_after(layer, sources, output, by_tensor):
    """The receptive field of a layer's output, from those of its inputs."""
    before, after = sources[0].shape[1:3], output.shape[1:3]
    field = by_tensor[id(sources[0])]
    if isinstance(layer, layers.ZeroPadding2D):
        return field.after_window((1, 1), (1, 1), [pair[0] for pair in layer.padding])
    if isinstance(layer, layers.Cropping2D):
        return field.after_window((1, 1), (1, 1), [-pair[0] for pair in layer.cropping])
    if isinstance(layer, layers.CenterCrop | layers.RandomCrop):
        return field.after_window((1, 1), (1, 1), -((np.array(before) - after) // 2))
    window = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
    if window and not isinstance(layer, layers.Conv2DTranspose):
        dilation = getattr(layer, "dilation_rate", 1)
        kernel = (np.array(window) - 1) * dilation + 1
        padding = np.zeros(2, int)
        if layer.padding == "same":  # as TensorFlow pads: half of what is missing, rounded down
            missing = (np.array(after) - 1) * layer.strides + kernel - before
            padding = np.maximum(missing, 0) // 2
        return field.after_window(kernel, layer.strides, padding)
    if before != after:  # resized in a way unknown here: taken as evenly stretched
        scale = np.array(before) / after
        return field.after_window((1, 1), scale, (1 - scale) / 2)
    fields = [by_tensor[id(source)] for source in sources if source.shape[1:3] == after]
    return union(fields)


def union(fields):
    """The smallest receptive field that covers several, as after a merge."""
    centres, sizes = (
        np.array([getattr(field, name) for field in fields]) for name in ("centre", "size")
    )
    start = (centres - (sizes - 1) / 2).min(0)
    end = (centres + (sizes - 1) / 2).max(0)
    centre, size = ((start + end) / 2).tolist(), (end - start + 1).tolist()
    return ReceptiveField(tuple(centre), fields[0].stride, tuple(size))


def load_model(path, image_size):
    """Load a saved classifier to draw pictures from, computing in float32.

    image_size: the side of its input in pixels if the file leaves it open. Raises Stop where the
    file cannot be loaded, saying why, and naming what the model lacks.
    """
    file = printable(path)
    if not path.is_file():
        remedy = "Train one first (without --skip-training), or name another."
        raise Stop(f"--model {file}: no such file. {remedy}")
    try:
        # Safe mode, which is Keras's default, runs no code from the file.
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        reason = printable(" ".join(str(error).split()))[:300]
        raise Stop(f"--model {file}: Keras cannot load it: {reason}\nName another.") from error
    try:
        model = in_float32(model)
        if None in model.input_shape[1:3]:
            photo = keras.Input((image_size, image_size, model.input_shape[3]), name="rgb")
            model = flatten(model, photo)
        choose_convolutions(model, GRID_CONVOLUTIONS)
    except (Stop, AttributeError, TypeError, IndexError) as error:
        reason = str(error) if isinstance(error, Stop) else "its inputs are not photos"
        raise Stop(f"--model {file}: {reason}\nName another, or train one.") from error
    warn_if_saturated(model, file)
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


def warn_if_saturated(model, file):
    """Print a warning where the model's first activations do not tell black from white."""
    size = (*input_size(model), 3)
    black_and_white = np.stack([np.zeros(size, "float32"), np.full(size, 255, "float32")])
    first = convolutions(model)[0].activation
    black, white = layer_activations(model, black_and_white, (first,))[0]
    if np.allclose(black, white, rtol=1e-4, atol=1e-6):
        print(f"Warning: {file}: its first activations are alike for a black and a white photo.")
        print("It is fed 0–255 RGB; if it needs other numbers, let a Rescaling follow its input.")


# ---- 6. Activation grids: what each channel of a layer shows -------------------------------------
# A convolution turns the photo into channels, one for each of its filters: feature maps of how much
# each place looks like what the filter looks for. The first ones look like drawings of the photo in
# edges and colours; deeper ones are coarser and react to parts. The ReLU that follows (ReLU.png)
# keeps what is positive, and that is all that the next layer gets to see.

# Blue for negative activations, black for 0, red to yellow for positive ones.
ACTIVATION_COLOURS = LinearSegmentedColormap.from_list(
    "activation", ["#9be7ff", "#2a6fdb", "black", "#d9431e", "#ffe34d"]
)


def activation_grid(model, photo, layer_name):
    """All channels of a layer for a photo, 16 a row: a (height, width, 3) uint8 RGB sheet.

    photo: (height, width, 3) RGB, 0–255, of any size. Raises Stop for a layer that the model lacks.
    """
    ((activation,),) = layer_activations(model, as_batch(model, photo), (layer_name,))
    return grid_sheet(activation)


def grid_sheet(activation):
    """A sheet of the channels of an (h, w, channels) activation, 16 a row."""
    return tile(channel_tiles(activation), columns=min(16, activation.shape[2]))


def layer_activations(model, photos, layer_names):
    """What some layers put out for photos (n, height, width, 3): [(n, h, w, channels) float32]."""
    outputs = feature_extractor(model, layer_names)(photos, training=False)
    return [output.numpy() for output in tf.nest.flatten(outputs)]


def as_batch(model, photo):
    """A (height, width, 3) photo as a batch (1, height, width, 3) float32 of the model's size."""
    photo = tf.convert_to_tensor(photo, tf.float32)[None]
    return tf.image.resize(photo, input_size(model), antialias=True)


def grid_tile_side(channels):
    """The side in pixels of a channel's tile, smaller where there are many."""
    return int(np.clip(1800 / math.sqrt(channels), 24, 96))


def channel_tiles(activation):
    """Pictures (channels, side, side, 3) uint8 of an (h, w, channels) activation.

    Each channel has a scale of its own. One that is 0 everywhere becomes a grey cross.
    """
    channels = activation.shape[2]
    side = grid_tile_side(channels)
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


def tile(pictures, columns, frames=BACKGROUND, gap=2):
    """One sheet of (n, h, w, 3) uint8 pictures in reading order; the last row is filled up.

    frames: the colours of the frames, which broadcast to (n, h, w, 3); gap: their width in pixels.
    """
    count, height, width, _ = pictures.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * columns, height + 2 * gap, width + 2 * gap, 3), BACKGROUND, "uint8")
    sheet[:count] = frames
    sheet[:count, gap : gap + height, gap : gap + width] = pictures
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * sheet.shape[1], -1, 3)


def draw_grids(output, model, explanation):
    """Draw the photo, the ReLU, and all channels of some convolutions and of their activations."""
    path = output / "OriginalImage.jpeg"
    photo = Image.fromarray(explanation.photo)
    photo.thumbnail((2048, 2048))
    with replace_when_whole(path) as partial_path:
        photo.save(partial_path, quality=92)
    yield Picture(path.name, explanation.name)
    save_relu(output / "ReLU.png")
    yield Picture("ReLU.png", "ReLU keeps what is positive")
    chosen = choose_convolutions(model, GRID_CONVOLUTIONS)
    names = tuple(name for it in chosen for name in (it.layer, it.activation))
    # One forward pass for all.
    outputs = iter(layer_activations(model, as_batch(model, explanation.pixels), names))
    for convolution in chosen:
        sheets = {f"conv2d_{convolution.number}_grid.jpg": str(convolution)}
        before, after = next(outputs)[0], next(outputs)[0]
        layer_names = convolution.layer, convolution.activation
        if convolution.activation != convolution.layer:
            title = f"{convolution.activation}, after {convolution}"
            sheets[f"activation_{convolution.number}_grid.jpg"] = title
        shown = zip(sheets.items(), layer_names, (before, after), strict=False)
        for (file, title), layer, activation in shown:
            caption = grid_caption(title, activation, explanation.name)
            save_sheet(output / file, grid_sheet(activation), caption)
            silent = (~activation.any((0, 1))).tolist()
            side, columns = grid_tile_side(len(silent)), min(16, len(silent))
            yield Picture(file, caption, Sheet(convolution, layer, side, columns, silent))


def grid_caption(title, activation, photo_name):
    """Two lines: what the sheet of an (h, w, channels) activation shows, and its colours."""
    height, width, channels = activation.shape
    silent = int((~activation.any((0, 1))).sum())
    which = {0: "no channel is", 1: "1 channel is"}.get(silent, f"{silent} channels are")
    firing = f"{which} 0 everywhere" + (" (crossed)" if silent else "")
    negative = "blue negative, " if activation.min() < 0 else ""
    return (
        f"{title} for {photo_name}: {channels} channels of {height} × {width} positions\n"
        f"{negative}black 0, red to yellow positive, each channel on its own scale; {firing}"
    )


@figure_style
def save_relu(path):
    """Draw the function that follows a convolution."""
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    x = np.linspace(-5, 5, 201)
    axes.plot(x, np.maximum(0, x), linewidth=4)
    axes.set(
        title="ReLU(x) = max(0, x)", xlabel="x, the normalized convolution", ylabel="activation"
    )
    save_figure(path, axes.figure)


# ---- 7. Filter patterns: what each filter looks for ----------------------------------------------
# Each filter gets an image of its own, faint noise at first, that follows the gradient of the
# filter's mean activation upwards: it becomes what the filter looks for ("Feature Visualization",
# Olah et al., 2017). The gradient is that of the convolution's own output, as a dead ReLU passes
# none; the activation after it tells whether the filter fires.

FILTERS_DRAWN = 64  # of a convolution, the first ones
PATTERN_SIZE = 128  # pixels; a multiple of the stride of the layers asked, so that the waves fit
# How far the image goes on beyond the canvas, in pixels. A filter that sees the zeros which pad
# the edge of an image draws a frame there. A wider margin would take more time, and a filter hardly
# sees what lies so far out.
PATTERN_MARGIN = 24
PATTERN_STEPS = 18
PATTERN_RATE = 5  # grey levels by which a step changes the image (root mean square)
PATTERN_MOMENTUM = 0.75  # with less, weak filters do not get far in so few steps; more overshoots
# Grey levels of the noise at the start (root mean square). From faint noise the ascent finds
# the strongest pattern, from strong noise only what happens to lie there. A filter that stays
# silent all the same is started again from stronger noise.
PATTERN_STARTS = (4, 20, 60)
FILTERS_AT_ONCE = 16  # 32 are no faster on a CPU and take more memory


def filter_patterns(model, layer_name, filters, seed=0, on_progress=None):
    """Pictures that fire the filters of a convolution, and whether they do.

    model: takes RGB, 0–255. filters: their numbers. Returns (n, 128, 128, 3) uint8 pictures, which
    can be repeated without a seam, and (n,) booleans: whether the activation that follows the
    convolution is above 0 anywhere on the finished picture. on_progress: called with the place in
    `filters` that is reached, lower again where silent ones are started anew. Raises Stop for a
    layer that is no convolution of the model.
    """
    convolution = find_convolution(model, layer_name)
    field = receptive_fields(model)[layer_name]
    extractor = folded(feature_extractor(model, (layer_name, convolution.activation)))
    margin = canvas_margin(field)
    waves, scale = wave_basis(max(field.size), margin)
    step = ascent_step(extractor, field, waves, scale, margin)
    canvas = waves[:, margin : margin + PATTERN_SIZE]
    filters = np.asarray(filters, "int32")
    pictures = np.zeros((len(filters), PATTERN_SIZE, PATTERN_SIZE, 3), "uint8")
    fires = np.zeros(len(filters), bool)
    for attempt, strength in enumerate(PATTERN_STARTS):
        silent = np.flatnonzero(~fires)
        for start in range(0, len(silent), FILTERS_AT_ONCE):
            piece = silent[start : start + FILTERS_AT_ONCE]
            noise = start_noise(filters[piece], (seed, attempt), scale)
            coefficients = tf.constant(strength * noise)
            momentum = tf.zeros_like(coefficients)
            with bfloat16_where_fast():
                for _ in range(PATTERN_STEPS):
                    coefficients, momentum = step(coefficients, momentum, filters[piece])
            image = waves_to_image(coefficients, canvas, scale)
            pictures[piece] = np.rint(full_contrast(image))
            activation = extractor(pictures[piece].astype("float32"), training=False)[1]
            peaks = np.max(activation, axis=(1, 2))  # (n, channels)
            fires[piece] = peaks[np.arange(len(piece)), filters[piece]] > 0
            if on_progress:
                on_progress(int(piece[-1]) + 1)
    return pictures, fires


def find_convolution(model, layer_name):
    """The Convolution of this name. Raises Stop if the model has none."""
    for convolution in convolutions(model):
        if convolution.layer == layer_name:
            return convolution
    names = ", ".join(convolution.layer for convolution in convolutions(model)[:8])
    raise Stop(f"The model has no convolution {layer_name}. Its convolutions are {names}, …")


@contextlib.contextmanager
def bfloat16_where_fast():
    """Convolve in bfloat16 on CPUs that are made for it: a third faster, and the same patterns."""
    option = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: computes_in_bfloat16()})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: False})


def ascent_step(extractor, field, waves, scale, margin):
    """A function of coefficients (n, 3, waves, waves), momentum and filters (n,): one step further.

    It returns the coefficients and the momentum after a step up the gradient of each filter's mean
    activation on its own image.
    """
    # The positions that look at the canvas, so that each of its places counts once.
    start = np.ceil((margin - np.array(field.centre)) / field.stride).clip(0).astype(int)
    end = start + np.maximum(1, PATTERN_SIZE // np.array(field.stride).astype(int))
    coefficients = tf.TensorSpec((None, 3, *scale.shape))

    # All that varies is a tensor of a declared shape, so that it is traced once.
    @tf.function(
        input_signature=[coefficients, coefficients, tf.TensorSpec((None,), tf.int32)],
        autograph=False,
    )
    def step(coefficients, momentum, filters):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(coefficients)
            images = bounded(waves_to_image(coefficients, waves, scale))
            maps = extractor(images, training=False)[0]
            means = tf.reduce_mean(maps[:, start[0] : end[0], start[1] : end[1]], (1, 2))
            # An image changes only its own mean, so the gradient of the sum is each image's own.
            activation = tf.reduce_sum(tf.gather(means, filters, axis=1, batch_dims=1))
        momentum = PATTERN_MOMENTUM * momentum + tape.gradient(activation, coefficients)
        return coefficients + PATTERN_RATE * momentum / wave_strength(momentum, scale), momentum

    return step


def draw_patterns(output, model, seed, progress, patterns):
    """Draw a sheet of the patterns of the first 64 filters of some convolutions.

    They are kept in patterns, {layer: pictures}.
    """
    chosen = choose_convolutions(model, PATTERN_CONVOLUTIONS)
    for index, convolution in enumerate(chosen):
        filters = range(min(FILTERS_DRAWN, convolution.channels))
        tell = partial(tell_filters_done, progress, convolution, len(filters), index, len(chosen))
        pictures, fires = filter_patterns(model, convolution.layer, filters, seed, tell)
        patterns[convolution.layer] = pictures
        file = f"conv2d_{convolution.number}_filters.jpg"
        caption = patterns_caption(convolution, fires)
        frames = np.where(fires[:, None, None, None], 120, np.array([200, 50, 50]))
        save_sheet(output / file, tile(pictures, columns=8, frames=frames), caption)
        layer, silent = convolution.layer, (~fires).tolist()
        yield Picture(file, caption, Sheet(convolution, layer, PATTERN_SIZE, 8, silent))


def tell_filters_done(progress, convolution, count, sheets_done, sheets, filters_done):
    """Tell how many of the filters of a sheet are drawn, and so how much of all sheets."""
    what = f"patterns of convolution {convolution.number}, {filters_done}/{count}"
    progress.part(what, (sheets_done + filters_done / count) / sheets)


def patterns_caption(convolution, fires):
    """Two lines: what a sheet of patterns shows, and how many of its filters do not fire."""
    count, silent = len(fires), int((~fires).sum())
    firing = f"{silent} never fired (red frame)" if silent else "all of them fire"
    return (
        f"What filters 0 to {count - 1} of {convolution} look for\n"
        f"{count} of its {convolution.channels} filters, row by row; {firing}"
    )


# ---- 8. Waves: what a pattern is made of ---------------------------------------------------------
# The ascent does not change single pixels, which would end in noise. It changes the waves that the
# image is the sum of (its Fourier coefficients), in decorrelated colours: three that vary almost
# independently in photos. The waves go on beyond the canvas: all that a filter sees is pattern.

PATTERN_CONTRAST = 60  # grey levels of the finished picture (standard deviation before the bounds)
SHORTEST_WAVELENGTH = 3.5  # pixels: shorter waves raise the activation as noise no eye resolves
FLAT_COLOUR = 0.8  # strength of the mean colour; at 1 some early filters paint nothing else

# Square root of the colour correlation of ImageNet's photos, published with Lucid: rows are red,
# green and blue, columns are brightness, blue to yellow and green to magenta. Divided by
# the length of the first column. The last two are 3 times as strong as in photos: with the colours
# of photos patterns look muted.
COLOUR_CORRELATION_ROOT = np.array(
    [[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], "float32"
)
BRIGHTNESS_LENGTH = np.linalg.norm(COLOUR_CORRELATION_ROOT[:, 0])
COLOURS = COLOUR_CORRELATION_ROOT / BRIGHTNESS_LENGTH * np.array([1, 3, 3], "float32")


def canvas_margin(field):
    """Pixels by which the waves go on outside the canvas, for a layer's receptive field.

    About half of what a filter sees, at most PATTERN_MARGIN. In whole strides, so that the
    positions look at the same places of the finished picture as of the canvas: a filter that fires
    on a pattern may not fire on the same one moved by some pixels.
    """
    stride = int(max(field.stride))
    reach = min(PATTERN_MARGIN, int(max(field.size)) // 2 + stride - 1)
    return max(1, reach // stride) * stride


def wave_basis(longest_wavelength, margin=0):
    """The waves of a canvas, (waves, PATTERN_SIZE + 2 * margin), and their (waves, waves) scale.

    Waves longer than the filter sees are scaled like the longest one that it sees.
    """
    # cos + sin of positive and negative frequencies (Hartley, 1942) span what complex waves span,
    # with real coefficients; two small matrix products then cost less than a fast transform.
    cycles = np.fft.fftfreq(PATTERN_SIZE, 1 / PATTERN_SIZE)
    cycles = cycles[np.abs(cycles) <= PATTERN_SIZE / SHORTEST_WAVELENGTH]
    pixels = np.arange(-margin, PATTERN_SIZE + margin)
    angle = 2 * np.pi * np.outer(cycles, pixels) / PATTERN_SIZE
    frequency = np.hypot(cycles[:, None], cycles)
    wavelength = PATTERN_SIZE / np.maximum(frequency, PATTERN_SIZE / longest_wavelength)
    # The square root lies between a flat spectrum, which gives speckle, and that of photos (1/f),
    # which gives blotches.
    scale = np.sqrt(wavelength / longest_wavelength)
    scale[frequency > PATTERN_SIZE / SHORTEST_WAVELENGTH] = 0  # alike in all directions
    scale[frequency == 0] *= FLAT_COLOUR
    return (np.cos(angle) + np.sin(angle)).astype("float32"), scale.astype("float32")


def start_noise(filters, seeds, scale):
    """Coefficients (n, 3, waves, waves) of noise with a root mean square of 1 grey level.

    A filter gets the same noise whichever other filters are drawn with it.
    """
    shape = (3, *scale.shape)
    noise = [np.random.default_rng([*seeds, k]).normal(size=shape) for k in filters]
    noise = np.stack(noise).astype("float32")
    return noise / wave_strength(noise, scale).numpy()


def wave_strength(coefficients, scale):
    """Root mean square of the images that waves add up to, in grey levels: (n, 1, 1, 1).

    As the waves are orthogonal, no image need be drawn for it (Parseval's theorem).
    """
    squares = tf.reduce_sum(in_rgb(coefficients, scale) ** 2, (2, 3), keepdims=True)
    return tf.sqrt(tf.reduce_mean(squares, 1, keepdims=True)) + 1e-12


def waves_to_image(coefficients, waves, scale):
    """The sum of waves, (n, 3, waves, waves), as RGB about 0: (n, size, size, 3) float32."""
    planes = tf.matmul(waves, tf.matmul(in_rgb(coefficients, scale), waves), transpose_a=True)
    return tf.transpose(planes, (0, 2, 3, 1))


def in_rgb(coefficients, scale):
    """The strengths of the waves in red, green and blue, from their coefficients."""
    return tf.einsum("ncyx,rc->nryx", scale * coefficients, COLOURS)


def bounded(image):
    """The image about 0 as RGB from 8 to 247, bent smoothly towards the bounds, not clipped."""
    return 127.5 + 119.5 * tf.tanh(image / 119.5)


def full_contrast(image):
    """The image (n, size, size, 3) stretched about its mean colour, as RGB from 8 to 247."""
    mean = tf.reduce_mean(image, (1, 2), keepdims=True)
    variance = tf.reduce_mean((image - mean) ** 2, (1, 2, 3), keepdims=True)
    return bounded(mean + PATTERN_CONTRAST * (image - mean) / (tf.sqrt(variance) + 1e-12))


# ---- 9. What fires a filter: its pattern beside photos -------------------------------------------
# A pattern shows what a filter could look for, photos what it does find: for some filters the
# patches of test photos on which they fire most, cut out at what that position sees (Zeiler and
# Fergus, 2013). Where pattern and patches disagree, the filter has more than one meaning, or the
# photos do not hold what it looks for.

EXAMPLE_CONVOLUTIONS = (8, 40)
EXAMPLE_FILTERS = 16  # the most selective of those whose patterns are drawn
EXAMPLE_PATCHES = 5
EXAMPLE_PHOTOS = 300  # of the test photos at most; more would hardly change the patches
PATCH_SIDE = 160  # pixels, also of the pattern beside it


@dataclass(frozen=True)
class Peaks:
    """Where in each of n photos the filters of a layer fire most."""

    values: np.ndarray  # (n, filters), the highest activation
    positions: np.ndarray  # (n, filters, 2), its row and column in the feature map


def filter_peaks(model, paths, layer_names):
    """{layer: Peaks} of its first filters, from one pass over the photos."""
    found = {name: [] for name in layer_names}
    for photos in pixel_batches(model, paths):
        outputs = feature_extractor(model, tuple(layer_names))(photos, training=False)
        for name, activation in zip(layer_names, tf.nest.flatten(outputs), strict=True):
            found[name].append(peaks_of(activation[..., :FILTERS_DRAWN]))
    return {name: joined_peaks(parts) for name, parts in found.items()}


def pixel_batches(model, paths, batch_size=32):
    """The photos of these paths as the model sees them: (n, height, width, 3) float32 batches."""
    size = input_size(model)
    for start in range(0, len(paths), batch_size):
        batch = [model_input(path, *size) for path in paths[start : start + batch_size]]
        yield np.stack(batch).astype("float32")


def joined_peaks(parts):
    """The Peaks of all photos from those of the batches."""
    return Peaks(
        *(np.concatenate([getattr(it, name) for it in parts]) for name in ("values", "positions"))
    )


def peaks_of(activation):
    """The Peaks of feature maps, a tensor (n, h, w, channels)."""
    count, height, width, channels = activation.shape
    flat = tf.reshape(activation, (count, height * width, channels))
    places = np.unravel_index(tf.argmax(flat, axis=1).numpy(), (height, width))
    return Peaks(tf.reduce_max(flat, axis=1).numpy(), np.stack(places, axis=-1))


def top_photos(peaks, filter_index, count=EXAMPLE_PATCHES):
    """Indices of the photos on which a filter fires most, strongest first; each photo once."""
    strongest = np.argsort(-peaks.values[:, filter_index], kind="stable")[:count]
    return [int(index) for index in strongest if peaks.values[index, filter_index] > 0]


def most_selective(peaks, count=EXAMPLE_FILTERS):
    """Numbers of the filters whose best photos stand out most, the most selective first.

    Measured by how far the mean peak of its five best photos lies above that of all photos, in
    standard deviations of the peaks. A filter that fires on no photo is left out.
    """
    best = np.sort(peaks.values, axis=0)[-EXAMPLE_PATCHES:].mean(0)
    spread = peaks.values.std(0)
    selectivity = (best - peaks.values.mean(0)) / np.maximum(spread, 1e-12)
    selectivity[(best <= 0) | (spread < 1e-12)] = -1
    ranking = np.argsort(-selectivity, kind="stable")[:count]
    return [int(index) for index in ranking if selectivity[index] >= 0]


def cut_patch(photo, size, field, position, side=PATCH_SIDE):
    """What one position of a layer sees of a photo: (side, side, 3) uint8 RGB.

    photo: (height, width, 3) uint8. size: the model's input, to which the photo is squeezed. field:
    the layer's receptive field, which is clipped to the photo. The patch keeps the photo's shape.
    """
    centre = np.array(field.centre) + np.array(position) * field.stride + 0.5
    reach = np.array(field.size) / 2
    to_photo = np.array(photo.shape[:2]) / size
    start = np.floor((centre - reach) * to_photo + 1e-6).astype(int).clip(0)
    end = np.ceil((centre + reach) * to_photo - 1e-6).astype(int).clip(start + 1)
    seen = photo[start[0] : end[0], start[1] : end[1]]
    height, width = np.maximum(1, np.round(side / max(seen.shape) * np.array(seen.shape[:2])))
    seen = cv2.resize(seen, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    patch = np.full((side, side, 3), BACKGROUND, "uint8")
    top, left = (side - seen.shape[0]) // 2, (side - seen.shape[1]) // 2
    patch[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
    return patch


def draw_examples(output, model, paths, seed, patterns, peaks=None):
    """Draw for the most selective filters the pattern, and the patches that fire them most.

    patterns: {layer: pictures of its first filters}, as far as they are drawn. peaks: {layer:
    Peaks} of all the photos, where they are known.
    """
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.permutation(len(paths))[:EXAMPLE_PHOTOS].tolist())
    asked = [paths[index] for index in chosen]
    shown = choose_convolutions(model, EXAMPLE_CONVOLUTIONS)
    if peaks is None:
        all_peaks = filter_peaks(model, asked, tuple(it.activation for it in shown))
    else:
        all_peaks = {
            name: Peaks(it.values[chosen], it.positions[chosen]) for name, it in peaks.items()
        }
    for convolution in shown:
        peaks = all_peaks[convolution.activation]
        filters = most_selective(peaks)
        if not filters:
            continue
        if convolution.layer in patterns:
            pictures = patterns[convolution.layer][filters]
        else:
            pictures, _ = filter_patterns(model, convolution.layer, filters, seed)
        rows = [example_row(model, convolution, peaks, number, asked) for number in filters]
        file = f"conv2d_{convolution.number}_examples.jpg"
        caption = (
            f"What fires {convolution}: {len(filters)} of its {convolution.channels} filters, the "
            f"most selective first\nnumber, pattern, and the patches of {len(asked)} test photos "
            "that fire it most, with the activation"
        )
        save_examples(output / file, filters, pictures, rows, caption)
        yield Picture(file, caption)


def example_row(model, convolution, peaks, number, paths):
    """[(patch, activation)] of the photos that fire a filter most, strongest first."""
    field = receptive_fields(model)[convolution.activation]
    return [
        (
            cut_patch(read_photo(paths[k]), input_size(model), field, peaks.positions[k, number]),
            float(peaks.values[k, number]),
        )
        for k in top_photos(peaks, number)
    ]


@figure_style
def save_examples(path, filters, patterns, rows, title):
    """Draw a row for each filter: its number, its pattern, and patches with their activations."""
    pitch, line, gap = (
        PATCH_SIDE + 8,
        28,
        70,
    )  # pixels: a tile and its gap, the line of text below it, the margin for the numbers
    sheet = np.full(
        (len(filters) * (pitch + line), gap + (1 + EXAMPLE_PATCHES) * pitch, 3), BACKGROUND, "uint8"
    )
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    for row, (number, pattern, patches) in enumerate(zip(filters, patterns, rows, strict=True)):
        top = row * (pitch + line)
        axes.text(gap / 2, top + PATCH_SIDE / 2, number, ha="center", va="center")
        for column, (picture, value) in enumerate([(pattern, None), *patches]):
            left = gap + column * pitch
            picture = cv2.resize(picture, (PATCH_SIDE, PATCH_SIDE), interpolation=cv2.INTER_CUBIC)
            sheet[top : top + PATCH_SIDE, left : left + PATCH_SIDE] = picture
            if value is not None:
                style = {"ha": "center", "va": "top"}
                axes.text(left + PATCH_SIDE / 2, top + PATCH_SIDE + 4, f"{value:.2f}", **style)
    axes.imshow(sheet)
    axes.set_axis_off()
    axes.set_title(title, loc="left")
    save_figure(path, figure, dpi=100)


# ---- 10. Grad-CAM heatmaps: where the model found its class --------------------------------------
# Grad-CAM asks how much each channel of a layer raises the logit of a class (the mean of its
# gradient), and adds up the channels' feature maps with these weights: where the sum is positive,
# something speaks for the class. It takes the logit, not the probability after the softmax: where
# the model is sure, that is flat and has no gradient.

HEATMAP_COLOURS = "inferno"  # from black to yellow: brighter is more, also for colour-blind eyes
OVERLAY_OPACITY = 0.6


def grad_cam(model, photo, layer_name, class_index):
    """Grad-CAM heatmap of a class at a layer: (h, w) float32 >= 0, one value a position.

    photo: (height, width, 3) RGB, 0–255, of any size. The values are in units of the logit, neither
    scaled nor enlarged; all 0 where nothing speaks for the class. Selvaraju et al., "Grad-CAM"
    (2017). Raises Stop for a layer that the model lacks.
    """
    inputs = as_batch(model, photo)
    forward = partial(features_and_logits(model, (layer_name,)), training=False)
    if layer_name == heatmap_layer(model):
        # What comes before this layer needs no gradient: less than half the time.
        inputs = feature_extractor(model, (layer_name,))(inputs, training=False)
        forward = partial(maps_and_logits, model)
    (heatmaps,) = batch_grad_cam(forward, inputs, np.array([[class_index]]))
    return heatmaps[0, 0]


def batch_grad_cam(forward, inputs, classes):
    """Grad-CAM heatmaps of many photos at once, for k classes each: (n, k, h, w) for each layer.

    forward: a function of the inputs, a tensor (n, …), that returns the feature maps of one layer
    or more, (n, h, w, channels), and then the logits. classes: (n, k) indices.
    """
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        *features, logits = forward(inputs)
        # A photo changes only its own logit, so the gradient of the sum is each photo's own.
        sums = [tf.reduce_sum(tf.gather(logits, column, batch_dims=1)) for column in classes.T]
    heatmaps = [[] for _ in features]
    for logit_sum in sums:
        gradients = tape.gradient(logit_sum, features, unconnected_gradients="zero")
        for of_layer, feature_maps, gradient in zip(heatmaps, features, gradients, strict=True):
            weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)  # (n, 1, 1, channels)
            of_layer.append(tf.nn.relu(tf.reduce_sum(weights * feature_maps, axis=-1)).numpy())
    return [np.stack(of_layer, axis=1) for of_layer in heatmaps]


@lru_cache(maxsize=4)  # to build it takes as long as to run it
def features_and_logits(model, layer_names):
    """A model from RGB photos, 0–255, to the outputs of some layers and then the logits."""
    flat, outputs = classifier(model), feature_extractor(model, layer_names).outputs
    logits = nodes(flat)[-1].input_tensors[0]
    return keras.Model(flat.input, [*outputs, logits])


def maps_and_logits(model, feature_maps):
    """The feature maps of the last layer with positions as they are, and the logits from them."""
    return feature_maps, head_of(model)(feature_maps, training=False)


@lru_cache(maxsize=2)
def head_of(model):
    """A model from the output of the last layer with positions to the logits."""
    feature_maps, logits = features_and_logits(model, (heatmap_layer(model),)).outputs
    return keras.Model(feature_maps, logits)


def place_heatmap(heatmap, field, size):
    """Lay an (h, w) heatmap where its positions look: float32 of this size, (height, width).

    Between the centres of the receptive fields it is interpolated. Beyond the outermost it fades to
    0 within a stride: fewer positions see the edge of a photo than see its middle.
    """
    (centre_y, centre_x), (stride_y, stride_x) = field.centre, field.stride
    to_positions = np.array(
        [[1 / stride_x, 0, -centre_x / stride_x], [0, 1 / stride_y, -centre_y / stride_y]]
    )
    return cv2.warpAffine(
        heatmap.astype("float32"),
        to_positions,
        tuple(size[::-1]),
        flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    )


def top_fraction(heatmap, fraction=DELETED_FRACTION):
    """Boolean mask of that fraction of an (h, w) heatmap's pixels which has the highest values.

    Of equal values, such as the 0 where nothing is marked, those nearest to the highest come first.
    """
    peak_row, peak_column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    rows, columns = np.indices(heatmap.shape)
    distance = np.hypot(rows - peak_row, columns - peak_column)
    order = np.lexsort((distance.ravel(), -heatmap.ravel()))
    mask = np.zeros(heatmap.size, bool)
    mask[order[: round(fraction * heatmap.size)]] = True
    return mask.reshape(heatmap.shape)


def centred_blob(size):
    """The control: (height, width) values that fall with the distance to the middle."""
    rows, columns = np.indices(size)
    return -np.hypot(rows - (size[0] - 1) / 2, columns - (size[1] - 1) / 2)


def deletion_scores(model, photos, masks):
    """Probabilities (n, classes) of n (height, width, 3) photos, each with its mask blurred away.

    One step of the deletion game of RISE (Petsiuk et al., 2018): a heatmap is worth something if
    the probability falls further when what it marks is blurred than when a part of the same size
    in the middle is.
    """
    without = []
    for photo, mask in zip(photos, masks, strict=True):
        blurred = cv2.GaussianBlur(photo.astype("float32"), (0, 0), max(photo.shape) / 12)
        without.append(np.where(mask[..., None], blurred, photo))
    return classifier(model)(np.stack(without), training=False).numpy()


# ---- 11. Explanations: a photo, what the model says, and where it looks --------------------------
# What is known of an explained photo stands in one place; captions are made of it, and figures are
# rows of panels that show it.


@dataclass(frozen=True)
class Explanation:
    """A photo, what the model predicts for it, and where it looks for the classes in question."""

    name: str
    photo: np.ndarray  # (height, width, 3) uint8 RGB
    pixels: np.ndarray  # the same, as the model sees it
    class_names: list
    probabilities: np.ndarray  # (classes,)
    true_index: int | None  # None: not known
    # {layer: {class index: (h, w) Grad-CAM heatmap}}; the last is the model's last with positions
    heatmaps: dict
    # The class's probability as the photo is, without the hottest part, and without a central part
    # of the same size; None where the heatmap is empty.
    deletion: tuple | None = None

    @property
    def predicted_index(self):
        return int(self.probabilities.argmax())

    @property
    def class_index(self):
        """The class explained: the true one, or where that is not known the predicted one."""
        return self.predicted_index if self.true_index is None else self.true_index

    @property
    def heatmap(self):
        """The (h, w) heatmap of the class explained, at the model's last layer with positions."""
        return list(self.heatmaps.values())[-1][self.class_index]

    @property
    def contrast_heatmap(self):
        """The (h, w) heatmap of the most probable of the other classes, at the same layer."""
        return list(self.heatmaps.values())[-1][self.contrast_index]

    @property
    def contrast_index(self):
        """The most probable of the other classes."""
        others = np.where(
            np.arange(len(self.probabilities)) == self.class_index, -1, self.probabilities
        )
        return int(others.argmax())

    @property
    def class_name(self):
        return self.class_names[self.class_index]

    @property
    def contrast_name(self):
        return self.class_names[self.contrast_index]

    @property
    def is_mistake(self):
        return self.true_index is not None and self.predicted_index != self.true_index

    @property
    def verdict(self):
        return verdict(self.class_names, self.probabilities, self.true_index)


def verdict(class_names, probabilities, true_index):
    """What the model says of a photo and, where that is known (not None), what is true."""
    first, second = (*most_probable(probabilities), 0)[:2]
    named = {k: f"{class_names[k]}, {percent(probabilities[k])}" for k in (first, second)}
    if true_index is None:
        return f"It says {named[first]}; {named[second]}"
    if first == true_index:
        return f"It says {named[first]}, and is right"
    true_name = class_names[true_index]
    article = "an" if true_name[:1].lower() in "aeiou" else "a"
    share = percent(probabilities[true_index])
    return f"It says {named[first]}; it is {article} {true_name}, {share}"


def percent(share):
    return f"{100 * share:.0f} %"


def explain(model, paths, names, class_names, labels, probabilities=None):
    """The Explanations of some photos, from one pass over them.

    labels: true class indices, -1 where not known. probabilities: (n, classes), where known.
    """
    layer_names = tuple(heatmap_layers(model))
    photos = [model_input(path, *input_size(model)) for path in paths]
    inputs = tf.constant(np.stack(photos), tf.float32)
    if probabilities is None:
        probabilities = classifier(model)(inputs, training=False).numpy()
    classes = classes_in_question(probabilities, labels)
    if (classes[:, 2:] == classes[:, :2]).any(1).all():
        classes = classes[:, :2]  # the true class need not be asked about twice
    forward = partial(features_and_logits(model, layer_names), training=False)
    heatmaps = batch_grad_cam(forward, inputs, classes)
    explanations = [
        Explanation(
            name=printable(names[k]),
            photo=read_photo(paths[k]),
            pixels=photos[k],
            class_names=[printable(class_name) for class_name in class_names],
            probabilities=probabilities[k],
            true_index=None if labels[k] < 0 else int(labels[k]),
            heatmaps={
                layer: dict(zip(classes[k].tolist(), of_layer[k], strict=True))
                for layer, of_layer in zip(layer_names, heatmaps, strict=True)
            },
        )
        for k in range(len(paths))
    ]
    return with_deletion(model, explanations)


def most_probable(probabilities):
    """The class indices of (…, classes), most probable first; of equal ones in order, as argmax."""
    return np.argsort(-probabilities, axis=-1, kind="stable")


def classes_in_question(probabilities, labels):
    """(n, 3) class indices for each photo: the two most probable ones, then the true one.

    labels: true class indices; where one is -1, not known, the most probable stands for it.
    """
    probable = most_probable(probabilities)[:, :2]
    return np.column_stack([probable, np.where(np.less(labels, 0), probable[:, 0], labels)])


def with_deletion(model, explanations):
    """The same Explanations with the deletion scores of their heatmaps and of the control."""
    size, field = input_size(model), receptive_fields(model)[heatmap_layer(model)]
    central = top_fraction(centred_blob(size))
    photos, masks = [], []
    for it in explanations:
        photos += [it.pixels, it.pixels]
        masks += [top_fraction(place_heatmap(it.heatmap, field, size)), central]
    scores = deletion_scores(model, photos, masks).reshape(len(explanations), 2, -1)
    told = []
    for it, of_photo in zip(explanations, scores, strict=True):
        worth = it.probabilities[it.class_index], *of_photo[:, it.class_index]
        told.append(replace(it, deletion=tuple(map(float, worth)) if it.heatmap.any() else None))
    return told


def deletion_caption(explanation):
    """The deletion scores of the heatmap and of the control, in words; see deletion_scores."""
    name = explanation.class_name
    if explanation.deletion is None:
        return f"Nothing speaks for {name}: the heatmap is empty."
    before, without_hottest, without_central = (f"{score:.2f}" for score in explanation.deletion)
    better = float(without_hottest) < float(without_central)
    judgement = "Better than a guess here." if better else "No better than a guess here."
    part = "fifth" if DELETED_FRACTION == 0.2 else percent(DELETED_FRACTION)
    return (
        f"Without the hottest {part}: P({name}) {before} → {without_hottest}; "
        f"without a central {part}: {without_central}. {judgement}"
    )


@dataclass(frozen=True)
class Panel:
    """A photo, or a heatmap on it, in a figure of panels."""

    explanation: Explanation
    title: str = ""
    heatmap: np.ndarray | None = None  # (h, w)
    field: ReceptiveField | None = None  # of the heatmap's positions
    positions: bool = False  # the heatmap's own positions, without the photo


def draw_panel(axes, panel, norm, colours):
    """Draw a panel on matplotlib axes; return what a colour bar needs, None without a heatmap."""
    photo = panel.explanation.photo
    height, width = photo.shape[:2]
    extent = (0, width, height, 0)
    # No picture shows more pixels, and a large photo takes seconds to draw.
    photo = cv2.resize(photo, (min(width, 1200), min(height, 1200)), interpolation=cv2.INTER_AREA)
    axes.set_title(panel.title, loc="left")
    axes.set_axis_off()
    drawn = None
    if panel.heatmap is None:
        axes.imshow(photo, extent=extent)
    else:
        heatmap, below = panel.heatmap, photo.mean(2)
        if panel.positions:
            extent, below = positions_extent(panel), np.full((1, 1), 127)
        else:
            size = panel.explanation.pixels.shape[:2]
            heatmap = place_heatmap(heatmap, panel.field, size)
        # Over grey, and at one opacity everywhere, so that each colour has one meaning.
        axes.imshow(below, cmap="gray", vmin=0, vmax=255, extent=extent)
        drawn = axes.imshow(heatmap, colours, norm, alpha=OVERLAY_OPACITY, extent=extent)
        drawn.set_interpolation("nearest" if panel.positions else "bilinear")
    axes.set_aspect(shown_aspect(panel.explanation.photo) * width / height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return drawn


def positions_extent(panel):
    """Where a heatmap's positions lie, a stride each: (left, right, bottom, top) in the photo."""
    field, counts = panel.field, np.array(panel.heatmap.shape)
    scale = np.divide(panel.explanation.photo.shape[:2], panel.explanation.pixels.shape[:2])
    start = np.array(field.centre) + 0.5 - np.array(field.stride) / 2  # pixel k ends at k + 1
    top, left = start * scale
    bottom, right = (start + counts * field.stride) * scale
    return left, right, bottom, top


def shown_aspect(photo):
    """A panel's height / width: that of its photo, but at least 0.4 and at most 2.5."""
    return float(np.clip(photo.shape[0] / photo.shape[1], 0.4, 2.5))


@figure_style
def save_panels(path, rows, title, label, norm, colours=HEATMAP_COLOURS, dpi=100):
    """Draw rows of panels under a title, beside the colour scale (norm, colours) they share."""
    # All in inches, from the top left corner, as matplotlib's own layouts take seconds.
    side = 12 / max(map(len, rows))
    title, line_height, gap = fit(title, 13), 0.26, 0.1
    below = 2 * gap + line_height * (1 + title.count("\n"))
    places = []
    for row in rows:
        row = [replace(panel, title=fit(panel.title, side - 2 * gap)) for panel in row]
        below += gap + line_height * max(1 + panel.title.count("\n") for panel in row)
        height = side * max(shown_aspect(panel.explanation.photo) for panel in row)
        for column, panel in enumerate(row):
            places.append((panel, (gap + column * side, below, side - gap, height - gap)))
        below += height
    top = places[0][1][1]
    bar_height = max(below - top - gap, 2.8)
    figure_height = top + bar_height + 2 * gap
    figure = Figure(figsize=(14, figure_height))
    figure.text(gap / 14, 1 - gap / figure_height, title, va="top", fontsize=14)
    for panel, place in places:
        drawn = draw_panel(axes_at(figure, place), panel, norm, colours)
    bar_axes = axes_at(figure, (12.2, top, 0.25, bar_height))
    bar = figure.colorbar(drawn, cax=bar_axes, label=fit(label, bar_height))
    bar.formatter.set_powerlimits((-2, 3))  # short numbers, also for small heatmaps
    bar.ax.set_facecolor("0.5")  # a photo's mean grey, on which the overlay's colours lie
    save_figure(path, figure, dpi, cut=False)


def axes_at(figure, place):
    """Axes at a place (left, top, width, height) in inches from the figure's top left corner."""
    left, top, width, height = place
    all_width, all_height = figure.get_size_inches()
    bottom = all_height - top - height
    corner = (left / all_width, bottom / all_height)
    return figure.add_axes((*corner, width / all_width, height / all_height), anchor="NW")


def fit(text, inches):
    """A text in lines no wider than so many inches; words too long for one lose their middle."""
    lines = []
    for line in text.replace(" %", "\N{NO-BREAK SPACE}%").split("\n"):
        line, *words = [shorten(word, inches) for word in line.split(" ")]
        for word in words:
            if text_width(f"{line} {word}") > inches:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}"
        lines.append(line)
    return "\n".join(lines)


def shorten(word, inches):
    """A word no wider than so many inches: its start and its end, where it is too long."""
    kept = len(word)
    shortened = word
    while text_width(shortened) > inches:
        kept -= 2
        shortened = f"{word[: kept // 2]}…{word[-(kept // 2) :]}"
    return shortened


@lru_cache(maxsize=1000)
def text_width(text):
    """The width in inches of a line in the size of the titles."""
    if not text:
        return 0.0
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=14), False)
    return width / 72


@figure_style
def save_values(path, values, title, norm):
    """Draw the values of an (h, w) heatmap as numbers, where there is room, on their colours."""
    height, width = values.shape
    numbers = max(height, width) <= 16
    side = max(0.75, 5 / width) if numbers else 10 / max(height, width)
    figure = Figure(figsize=(2 + side * width, 1.6 + side * height), layout="compressed")
    axes = figure.subplots()
    drawn = axes.imshow(values, cmap=HEATMAP_COLOURS, norm=norm)
    axes.set(xlabel="column", ylabel="row")
    axes.set_title(fit(title, side * width), loc="left")
    axes.locator_params(integer=True)
    if numbers:
        decimals = max(0, 2 - math.floor(math.log10(values.max() or 1)))
        write_numbers(axes, drawn, values, f".{decimals}f")
    else:
        figure.colorbar(drawn, ax=axes)
    save_figure(path, figure)


def write_numbers(axes, drawn, values, number_format):
    """Write each of the (h, w) values on its square, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = drawn.cmap(drawn.norm(drawn.get_array()[row, column]))
        luminance = 0.3 * red + 0.6 * green + 0.1 * blue
        style = {"ha": "center", "va": "center", "color": "black" if luminance > 0.5 else "white"}
        axes.text(column, row, f"{value:{number_format}}", **style)


def draw_heatmaps(output, model, explanations):
    """Draw each photo, its heatmap and the overlay, and the heatmap's values as numbers."""
    layer = heatmap_layer(model)
    field = receptive_fields(model)[layer]
    for number, explanation in enumerate(explanations, start=1):
        heatmap, name = explanation.heatmap, explanation.class_name
        caption = f"{explanation.name}: {explanation.verdict}.\n{deletion_caption(explanation)}"
        height, width = heatmap.shape
        panels = [
            Panel(explanation, "the photo"),
            Panel(explanation, f"Grad-CAM for {name}, {height} × {width}", heatmap, field, True),
            Panel(explanation, f"laid over the photo, for {name}", heatmap, field),
        ]
        norm = Normalize(0, heatmap.max() or 1)
        dpi = np.clip(explanation.photo.shape[1] / 3.7, 100, 300)  # the photo's own resolution
        label = f"at {layer}; 0: nothing for {name}"
        save_panels(output / f"CAM_{number}.jpeg", [panels], caption, label, norm, dpi=dpi)
        yield Picture(f"CAM_{number}.jpeg", caption)
        title = f"Grad-CAM for {name} at {layer}\n{explanation.name}"
        save_values(output / f"heatmap_{number}.jpg", heatmap, title, norm)
        yield Picture(f"heatmap_{number}.jpg", f"The values of heatmap {number}, for {name}")


def draw_blocks(output, model, explanation):
    """Draw one photo's heatmaps block by block, each as a share of its own highest value."""
    fields = receptive_fields(model)
    panels = [Panel(explanation, "the photo")]
    for name in block_layers(model):
        heatmap = explanation.heatmaps[name][explanation.class_index]
        height, width = heatmap.shape
        peak = f"peak {heatmap.max():.2g}" if heatmap.any() else "empty"
        title = f"{name}, {height} × {width}\n{peak}"
        panels.append(Panel(explanation, title, heatmap / (heatmap.max() or 1), fields[name]))
    rows = [panels[start : start + 4] for start in range(0, len(panels), 4)]
    name = explanation.class_name
    caption = f"Grad-CAM for {name}, block by block, in {explanation.name}. {explanation.verdict}."
    label = f"share of the block's peak; 0: nothing for {name}"
    save_panels(output / "CAM_layers.jpg", rows, caption, label, Normalize(0, 1))
    yield Picture("CAM_layers.jpg", caption)


def draw_mistakes(output, model, explanations):
    """Draw for up to three mistakes the heatmaps of the predicted and the true class, compared.

    Without any mistakes, the true class is compared with the most probable other one.
    """
    mistakes = [explanation for explanation in explanations if explanation.is_mistake][:3]
    shown = mistakes or explanations[-3:]
    layer = heatmap_layer(model)
    field = receptive_fields(model)[layer]
    rows, peak = [], 0
    for it in shown:
        heatmaps = it.contrast_heatmap, it.heatmap, it.contrast_heatmap - it.heatmap
        peak = max(peak, *(np.abs(heatmap).max() for heatmap in heatmaps))
        class_name, contrast_name = it.class_name, it.contrast_name
        titles = f"for {contrast_name}", f"for {class_name}", f"{contrast_name} minus\n{class_name}"
        row = [Panel(it, it.verdict.replace("; ", ";\n"))]
        for title, heatmap in zip(titles, heatmaps, strict=True):
            title += "" if heatmap.any() else ": empty"
            row.append(Panel(it, title, heatmap, field))
        rows.append(row)
    caption = mistakes_caption(mistakes)
    norm = CenteredNorm(0, peak or 1)
    label = f"Grad-CAM at {layer}; 0: nothing"
    save_panels(output / "CAM_mistakes.jpg", rows, caption, label, norm, ACTIVATION_COLOURS)
    yield Picture("CAM_mistakes.jpg", caption)


def mistakes_caption(mistakes):
    """The title of the compared heatmaps, true to how many mistakes there are."""
    if not mistakes:
        compared = "Grad-CAM for the next class, for the true one, and the difference"
        return f"What it nearly took for something else (it made no mistake)\n{compared}"
    compared = "Grad-CAM for the class that it says, for the true one, and the difference"
    number = {1: " (its only mistake)", 2: " (its only two mistakes)"}.get(len(mistakes), "")
    return f"What misled the model{number}\n{compared}"


# ---- 12. Everything drawn ------------------------------------------------------------------------
# One pass over all photos, the survey, finds what the model says of each, where it looks, and where
# each filter fires most. Evaluation, examples and page are taken from it.

EXPLAINED_AT_ONCE = 2  # photos; their feature maps of all layers are in memory together
SHARES = {  # of the drawing time, roughly
    "layers": 2,
    "filters": 28,
    "heatmaps": 2,
    "mistakes": 1,
    "evaluation": 1,
    "strip": 1,
    "page": 2,
}


@dataclass(frozen=True)
class Survey:
    """What one pass over n photos found: own ones first, then those of the test.

    The k = 3 classes of a photo are the two most probable ones, then the true one; where that is
    not known, the most probable one again.
    """

    paths: list
    labels: np.ndarray  # (n,) true class indices, -1 for own photos
    probabilities: np.ndarray  # (n, classes)
    classes: np.ndarray  # (n, k) indices of the classes that have a heatmap
    heatmaps: np.ndarray  # (n, k, h, w) Grad-CAM at the model's last layer with positions
    peaks: dict  # {layer: Peaks}

    @property
    def own(self):
        """How many of the photos are own ones."""
        return int((self.labels < 0).sum())

    def name(self, number):
        """The name of a photo as it is shown, that of a test photo with its folder."""
        parts = self.paths[number].parts[-1 if self.labels[number] < 0 else -2 :]
        return printable("/".join(parts))

    def evaluation(self, class_names):
        """The Evaluation of the test photos, None without any."""
        if self.own == len(self.paths):
            return None
        return Evaluation(
            list(class_names), self.labels[self.own :], self.probabilities[self.own :]
        )

    def test_peaks(self):
        """{layer: Peaks} of the test photos."""
        start = self.own
        return {
            name: Peaks(peaks.values[start:], peaks.positions[start:])
            for name, peaks in self.peaks.items()
        }


def survey_photos(model, photos, labels=None, own_photos=()):
    """The Survey of own photos, whose class is not known, and of test photos.

    photos, own_photos: paths. labels: (n,) true class indices of `photos`; without them `photos`
    are own ones, unless own_photos are given, which then are all that is surveyed.
    """
    own = list(own_photos) or ([] if labels is not None else photos)
    tests = [] if labels is None else photos
    paths = [Path(path) for path in (*own, *tests)]
    labels = np.concatenate([np.full(len(own), -1), [] if labels is None else labels]).astype(int)
    numbers = (*PATTERN_CONVOLUTIONS, *EXAMPLE_CONVOLUTIONS)
    layer_names = tuple(it.activation for it in choose_convolutions(model, numbers))
    extract = traced_extractor(model, layer_names)
    parts, done = [], 0
    for pixels in pixel_batches(model, paths):
        parts.append(survey_batch(model, extract, pixels, labels[done : done + len(pixels)]))
        done += len(pixels)
    probabilities, classes, heatmaps, peaks = zip(*parts, strict=True)
    joined = [joined_peaks(of_layer) for of_layer in zip(*peaks, strict=True)]
    return Survey(
        paths,
        labels,
        *map(np.concatenate, (probabilities, classes, heatmaps)),
        dict(zip(layer_names, joined, strict=True)),
    )


def survey_batch(model, extract, pixels, labels):
    """Probabilities, classes and heatmaps of a Survey, and [Peaks], of some photos as pixels.

    extract: see traced_extractor.
    """
    feature_maps, *activations = extract(pixels)
    forward = partial(maps_and_logits, model)
    probabilities = tf.nn.softmax(forward(feature_maps)[1]).numpy()
    classes = classes_in_question(probabilities, labels)
    # From the last layer with positions on: nothing before it need be computed again.
    (heatmaps,) = batch_grad_cam(forward, feature_maps, classes)
    return probabilities, classes, heatmaps, [peaks_of(it) for it in activations]


def traced_extractor(model, layer_names):
    """A function of photos: the last feature maps, and some layers' first filters' activations.

    It is traced, as a graph frees each feature map once the next layers have used it.
    """
    extractor = folded(feature_extractor(model, (heatmap_layer(model), *layer_names)))
    photos = tf.TensorSpec((None, *input_size(model), 3))

    @tf.function(input_signature=[photos], autograph=False)
    def extract(photos):
        feature_maps, *activations = tf.nest.flatten(extractor(photos, training=False))
        return feature_maps, *(it[..., :FILTERS_DRAWN] for it in activations)

    return extract


@dataclass(frozen=True)
class Sheet:
    """How a picture shows filters or channels: tile k, in reading order, is number k."""

    convolution: Convolution
    layer: str
    side: int  # of a tile, pixels
    columns: int
    silent: list  # for each tile whether it is silent


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn: a file in the output folder, and what it shows."""

    file: str
    caption: str
    sheet: Sheet | None = None


def draw(
    model,
    photos,
    class_names,
    output,
    labels=None,
    *,
    own_photos=(),
    survey=None,
    record=None,
    command="",
    seed=0,
):
    """Draw every picture, and the page that shows them, into the folder `output`.

    model: any convolutional classifier of 0–255 RGB. photos: paths. labels: (n,) the photos' true
    class indices; without them what needs the truth is left out. own_photos: paths of photos to
    explain in place of the examples that are chosen from the labelled ones. survey: that of these
    photos, where it is known. record: {"history", "settings"} of the training. Raises Stop, naming
    what the model lacks.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if survey is None:
        survey = survey_photos(model, photos, labels, own_photos)
    evaluation = survey.evaluation(class_names)
    explained = explain_photos(model, survey, evaluation, class_names)
    with Progress() as progress:
        drawn = draw_pictures(
            output, model, survey, evaluation, list(explained.values()), record, seed, progress
        )
        progress.start("page")
        facts = run_facts(model, class_names, evaluation, record, command)
        facts |= page_facts(output, model, survey, explained, drawn, progress)
    with replace_when_whole(output / "run.js") as partial_path:
        partial_path.write_text(script_text(facts), "ascii")
    remove_old_sheets(output, facts)
    copy_page(output)


def explain_photos(model, survey, evaluation, class_names):
    """{photo number: Explanation} of own photos, and of the four examples of the evaluation."""
    numbers = list(range(survey.own))
    if evaluation:
        numbers += [survey.own + index for index in choose_examples(evaluation)[:4]]
    explained = {}
    for start in range(0, len(numbers), EXPLAINED_AT_ONCE):
        some = numbers[start : start + EXPLAINED_AT_ONCE]
        paths, names = [survey.paths[k] for k in some], [survey.name(k) for k in some]
        known = survey.labels[some], survey.probabilities[some]
        explanations = explain(model, paths, names, class_names, *known)
        explained |= zip(some, explanations, strict=True)
    return explained


def draw_pictures(output, model, survey, evaluation, explanations, record, seed, progress):
    """Draw all pictures but the page's own sheets: {what they show, a key of SHARES: [Picture]}.

    The draw_… functions are generators: each picture is drawn when it is asked for, in this order.
    """
    examples = explanations[survey.own :]
    shown = explanations[: survey.own] or examples[:3]
    parts = {"layers": draw_grids(output, model, shown[0])}
    patterns = {}
    parts["filters"] = draw_patterns(output, model, seed, progress, patterns)
    if evaluation:
        tests = survey.paths[survey.own :]
        beside_photos = draw_examples(output, model, tests, seed, patterns, survey.test_peaks())
        parts["filters"] = itertools.chain(parts["filters"], beside_photos)
    parts["heatmaps"] = itertools.chain(
        draw_heatmaps(output, model, shown), draw_blocks(output, model, shown[0])
    )
    if evaluation:
        parts["mistakes"] = draw_mistakes(output, model, examples)
        parts["evaluation"] = draw_evaluation(output, evaluation, record)
    parts["strip"] = draw_strip(output, model, shown[0])
    return {what: progress.draw(what, pictures) for what, pictures in parts.items()}


class Progress:
    """Tells what is being drawn: one bar on a terminal, a line for each picture elsewhere."""

    def __init__(self):
        self.on_terminal = sys.stdout.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.bar = rich.progress.Progress(*columns, transient=True, disable=not self.on_terminal)
        self.task = self.bar.add_task("", total=sum(SHARES.values()))
        self.share, self.done = 0, 0

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def start(self, what):
        """Say what is drawn from now on: a name in SHARES."""
        self.done += self.share
        self.share = SHARES[what]
        self.bar.update(self.task, description=what, completed=self.done)

    def draw(self, what, pictures):
        """Draw the pictures of a generator, and tell of each: the list of them."""
        self.start(what)
        drawn = []
        for picture in pictures:
            self.tell(picture.file)
            drawn.append(picture)
        return drawn

    def tell(self, file):
        """Say that a file is written."""
        if not self.on_terminal:
            print(file, flush=True)

    def part(self, what, share):
        """Say what is being drawn, and which share of its part is done."""
        self.bar.update(self.task, description=what, completed=self.done + share * self.share)


@figure_style
def save_training_curves(path, history, phases):
    """Draw loss and accuracy after each epoch; dotted: the phases' starts; red: the epoch kept.

    history: {metric: values}; phases: {name: number of epochs}.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    best = int(np.argmin(history["val_loss"]))
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for label, values in (
            ("training", history[metric]),
            ("validation", history[f"val_{metric}"]),
        ):
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
    save_figure(path, figure)


@figure_style
def save_confusion_matrix(path, evaluation):
    """Draw how often each true class (row) is taken for each class (column)."""
    counts = evaluation.confusion
    classes = len(counts)
    names = [shorten(printable(name), 3) for name in evaluation.class_names]
    few = classes <= 25  # so that a number fits into each square
    side = 0.8 if few else 20 / classes
    figure = Figure(figsize=(3.5 + side * classes, 2.5 + side * classes), layout="constrained")
    axes = figure.subplots()
    photos = np.maximum(1, counts.sum(1, keepdims=True))
    drawn = axes.imshow(counts / photos, cmap="Blues_r", vmin=0, vmax=1)
    size = min(13, 55 * side)  # points
    axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    correct = np.trace(counts)
    large = max(13, 1.2 * side * classes)  # points: to be read however far one steps back
    axes.set_xlabel("predicted", fontsize=large)
    axes.set_ylabel("true", fontsize=large)
    axes.set_title(f"{correct} of {counts.sum()} test photos right", loc="left", fontsize=large)
    if few:
        write_numbers(axes, drawn, counts, "d")
    save_figure(path, figure)


def draw_evaluation(output, evaluation, record):
    """Draw the confusion matrix and, where the training is known, its curves."""
    save_confusion_matrix(output / "confusion_matrix.png", evaluation)
    caption = "How often each true class (row) is taken for each class (column)"
    yield Picture("confusion_matrix.png", caption)
    if record:
        path = output / "training_curves.png"
        save_training_curves(path, record["history"], record["settings"]["phases"])
        yield Picture(path.name, "Loss and accuracy after each epoch; the red one was kept")


def draw_strip(output, model, explanation):
    """Draw the run at a glance; its patterns are cut from their sheet in the folder."""
    grid = choose_convolutions(model, GRID_CONVOLUTIONS)[-2:][0]
    pattern = choose_convolutions(model, PATTERN_CONVOLUTIONS)[-2:][0]
    sheet = activation_grid(model, explanation.pixels, grid.layer)
    activations = corner(sheet, sheet.shape[1] // min(16, grid.channels))
    rows, side = math.ceil(min(FILTERS_DRAWN, pattern.channels) / 8), PATTERN_SIZE + 4
    sheet = np.asarray(Image.open(output / f"conv2d_{pattern.number}_filters.jpg"))
    patterns = corner(sheet[-10 - rows * side : -10, 10:], side)  # within a border of 10 pixels
    middle = {
        f"activations, convolution {grid.number}": activations,
        f"what filters look for, convolution {pattern.number}": patterns,
    }
    field = receptive_fields(model)[heatmap_layer(model)]
    title = f"where it looks for {explanation.class_name}"
    overlay = Panel(explanation, title, explanation.heatmap, field)
    save_strip(output / "strip.jpg", Panel(explanation, "a photo"), overlay, middle)
    yield Picture("strip.jpg", ", ".join(["A photo", *middle, title]))


def corner(sheet, side):
    """A square of whole tiles, each so many pixels wide, from the top left corner of a sheet."""
    tiles = max(1, min(400, *sheet.shape[:2]) // side)
    return sheet[: tiles * side, : tiles * side]


@figure_style
def save_strip(path, photo, overlay, middle):
    """Draw the middle square of a photo, square pictures {title: array}, and an overlay."""
    figure = Figure(figsize=(16, 4.4), layout="compressed")
    first, *between, last = figure.subplots(1, 2 + len(middle))
    norm = Normalize(0, overlay.heatmap.max() or 1)
    height, width = photo.explanation.photo.shape[:2]
    side = min(height, width)
    for axes, panel in ((first, photo), (last, overlay)):
        draw_panel(axes, replace(panel, title=fit(panel.title, 3.6)), norm, HEATMAP_COLOURS)
        axes.set_xlim((width - side) / 2, (width + side) / 2)
        axes.set_ylim((height + side) / 2, (height - side) / 2)
        axes.set_aspect("equal")
    for axes, (title, picture) in zip(between, middle.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(fit(title, 3.6), loc="left")
        axes.set_axis_off()
    save_figure(path, figure, dpi=100)


@figure_style
def save_sheet(path, sheet, title):
    """Write a (height, width, 3) uint8 sheet, pixel for pixel, under its title."""
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet)
    axes.set_axis_off()
    axes.set_title(fit(title, max(8, sheet.shape[1] / 100)), loc="left")
    save_figure(path, figure, dpi=100)


def save_figure(path, figure, dpi=100, cut=True):
    """Write a figure in the format that the suffix names; cut: to what is drawn on it."""
    with replace_when_whole(path) as partial_path:
        jpeg = {"quality": 92, "subsampling": 0}  # colours as sharp as brightness
        border = {"bbox_inches": "tight", "pad_inches": 0.1} if cut else {}
        figure.savefig(partial_path, dpi=dpi, **border, pil_kwargs=jpeg)


# ---- 13. The page: what it shows of the run ------------------------------------------------------
# Images/index.html is the same for every run. What it shows lies beside it: the pictures, sheets of
# photos and activation maps, from which it cuts what one asks for, and run.js, which holds all the
# rest as JSON. It is a script, as a browser reads no other data file from a local folder.

PAGE = Path(__file__).with_name("Images") / "index.html"
LISTED_PHOTOS = 500  # of a larger test: the mistakes, then the least confident
LISTED_CLASSES = 20  # of a photo's probabilities; a thousand for each would fill the file
PATCHES = 9  # photos shown for a filter

# Pixels. Multiples of 16 keep JPEG's blocks within their tile, so that no colour leaks out of it.
THUMBNAIL_SIDE = 80
PHOTO_SIDE = 256
MAP_SIDE = 48
PHOTO_COLUMNS = 6  # and rows of a sheet of photos, which a browser loads whole


def run_facts(model, class_names, evaluation, record, command):
    """What the page says of the run: sentences, settings, versions, classes and evaluation."""
    settings = (record or {}).get("settings", {})
    versions = {"Python": sys.version.split()[0], "TensorFlow": tf.__version__}
    named = (settings | versions | {"Keras": keras.__version__}).items()
    return {
        "format": 2,
        "lead": [training_sentence(class_names, settings), test_sentence(evaluation)],
        "warnings": warnings_about(evaluation),
        "command": command,
        "settings": [f"{name}: {printable(str(value))}" for name, value in named],
        "classes": [printable(name) for name in class_names],
        "test": None if evaluation is None else test_table(evaluation),
    }


def test_table(evaluation):
    """The confusion matrix as rows for the page: counts as numbers, all else as texts."""
    names = [printable(name) for name in evaluation.class_names]
    counts, correct = evaluation.confusion, np.diag(evaluation.confusion)
    recall, precision = (
        [f"{k / n:.2f}" if n else "—" for k, n in zip(correct, counts.sum(axis), strict=True)]
        for axis in (1, 0)
    )
    rows = zip(names, counts.tolist(), recall, strict=True)
    return [
        ["true \\ predicted", *names, "recall"],
        *([name, *row, share] for name, row, share in rows),
        ["precision", *precision, ""],
    ]


def training_sentence(class_names, settings):
    """What was trained on what, as far as the settings of the training tell."""
    names = ", ".join(printable(name) for name in class_names[:10])
    names += ", …" if len(class_names) > 10 else ""
    classes = f"{len(class_names)} classes ({names})"
    if not {"weights", "epochs", "photos"} <= set(settings):
        return f"This model tells {classes} apart. How it was trained is not recorded here."
    starts = {"imagenet": "starting from ImageNet's weights", "none": "from scratch"}
    start = starts.get(settings["weights"], "starting from the weights of a file")
    photos = settings["photos"]["train"]
    epochs = settings["epochs"]
    return f"InceptionV3 learnt {classes} from {photos:,} photos in {epochs} epochs, {start}."


def test_sentence(evaluation):
    """How well the model does, in words."""
    if evaluation is None:
        return "No test photos were given: how well it does is not known."
    count = len(evaluation.labels)
    correct, most = int(np.trace(evaluation.confusion)), np.bincount(evaluation.labels).max()
    return (
        f"It names {correct:,} of {count:,} test photos right ({percent(correct / count)}, loss "
        f"{evaluation.loss:.3g}); always saying the most frequent class would get "
        f"{percent(most / count)} right."
    )


def warnings_about(evaluation):
    """Sentences on what weakens the run."""
    found = []
    if evaluation and evaluation.accuracy <= evaluation.chance:
        found.append("⚠ It does no better than chance: its pictures show little learning.")
    if evaluation and (fewest := evaluation.confusion.sum(1).min()) < 10:
        found.append(f"⚠ A class has only {fewest} test photos: each changes the result by much.")
    return found


def page_facts(output, model, survey, explained, drawn, progress):
    """What the page shows of photos, filters and layers. Writes the sheets that it cuts.

    explained: {photo number: Explanation}, of the photos that can be followed through the layers.
    drawn: {what they show: [Picture]}.
    """
    stored, listed = stored_photos(survey, explained)
    sheets, ratios = save_photos(output, [survey.paths[k] for k in stored], listed, progress)
    class_names = next(iter(explained.values())).class_names
    photos = []
    for index, (k, ratio) in enumerate(zip(stored, ratios, strict=True)):
        sheet, place = divmod(index, PHOTO_COLUMNS**2)
        photo = {"number": index, "sheet": sheet, "place": place}
        photo |= {"ratio": ratio, "listed": index < listed}
        photo |= photo_entry(survey, k, class_names)
        photos.append(photo | (explanation_entries(explained[k]) if k in explained else {}))
    filters = sheet_entries(output, drawn["filters"])
    for entry in filters:
        entry |= firing_entries(output, model, survey, explained, stored, entry)
        progress.tell(entry["maps"]["file"])
    pictures = [picture for pictures in drawn.values() for picture in pictures]
    return {
        "photo_count": len(survey.paths),
        "photos": photos,
        **sheets,
        "colours": list(map(to_hex, matplotlib.colormaps[HEATMAP_COLOURS](range(256)))),
        "heatmap_layers": [layer_entry(model, name) for name in heatmap_layers(model)],
        "filters": filters,
        "channels": sheet_entries(output, drawn["layers"]),
        "pictures": [{"file": it.file, "caption": it.caption} for it in pictures],
    }


def stored_photos(survey, explained):
    """Numbers of the photos that the page stores, and how many of the first ones it lists.

    Own photos come first, then the explained ones and the rest of the test, the most doubtful
    first; then those that only lend a patch to a filter.
    """
    doubtful = doubtful_first(survey.probabilities, survey.labels).tolist()
    tests = [k for k in dict.fromkeys([*explained, *doubtful]) if survey.labels[k] >= 0]
    listed = [*range(survey.own), *tests[:LISTED_PHOTOS]]
    lenders = {
        k
        for peaks in survey.peaks.values()
        for number in range(peaks.values.shape[1])
        for k in top_photos(peaks, number, PATCHES)
    }
    return [*listed, *sorted(lenders - set(listed))], len(listed)


def doubtful_first(probabilities, labels):
    """Photo numbers: mistakes, most confident first, then the others, least confident first."""
    confidence = probabilities.max(1)
    mistake = (probabilities.argmax(1) != labels) & (labels >= 0)
    return np.lexsort((np.where(mistake, -confidence, confidence), ~mistake))


def photo_entry(survey, number, class_names):
    """What the survey found of one photo."""
    label, probabilities = int(survey.labels[number]), survey.probabilities[number]
    true_index, confidence = None if label < 0 else label, round(float(probabilities.max()), 4)
    mistake = label >= 0 and int(probabilities.argmax()) != label
    return {
        "name": survey.name(number),
        "verdict": verdict(class_names, probabilities, true_index),
        "own": label < 0,
        "true": true_index,
        "mistake": mistake,
        "confidence": confidence,
        "doubt": -confidence if mistake else confidence,
        "probabilities": probability_entries(probabilities, label),
        "heatmaps": heatmap_entries(
            [dict(zip(survey.classes[number].tolist(), survey.heatmaps[number], strict=True))]
        ),
    }


def probability_entries(probabilities, label):
    """[class, probability] pairs, most probable first: LISTED_CLASSES of them and the true one."""
    ranking = most_probable(probabilities).tolist()
    kept = [k for rank, k in enumerate(ranking) if rank < LISTED_CLASSES or k == label]
    return [[k, round(float(probabilities[k]), 4)] for k in kept]


def heatmap_entries(layers_heatmaps):
    """The entries of a photo's classes, from {class index: (h, w) heatmap} for each layer."""
    entries = []
    for class_index in layers_heatmaps[0]:
        encoded = [encoded_heatmap(of_layer[class_index]) for of_layer in layers_heatmaps]
        maps, peaks = zip(*encoded, strict=True)
        entries.append({"class": class_index, "peaks": peaks, "maps": maps})
    return entries


def encoded_heatmap(heatmap):
    """An (h, w) heatmap as base64 of bytes, row by row, and the value that 255 stands for."""
    peak = float(heatmap.max())
    shares = np.rint(heatmap * (255 / (peak or 1))).astype("uint8")
    return base64.b64encode(shares.tobytes()).decode(), float(f"{peak:.4g}")


def layer_entry(model, name):
    """How many positions a layer has, and where they look, in shares of the photo's sides.

    (down, across) each. start: the middle of the first; step: to the next; size: what each sees.
    """
    field, sides = receptive_fields(model)[name], np.array(input_size(model))
    pixels = {"start": np.array(field.centre) + 0.5, "step": field.stride}
    pixels["size"] = np.minimum(field.size, sides)
    shares = {what: (it / sides).round(5).tolist() for what, it in pixels.items()}
    return {"layer": name, "positions": layer_outputs(model)[name].shape[1:3], **shares}


def explanation_entries(explanation):
    """The heatmaps of an explained photo at all blocks, and the deletion scores in words."""
    heatmaps = heatmap_entries(list(explanation.heatmaps.values()))
    return {"heatmaps": heatmaps, "worth": deletion_caption(explanation)}


def sheet_entries(output, pictures):
    """The sheets of convolutions, each with that of its activation where it has one."""
    entries = {}
    for picture in pictures:
        if picture.sheet:
            convolution = picture.sheet.convolution
            entry = entries.setdefault(convolution.number, asdict(convolution) | {"sheets": []})
            entry["sheets"].append(drawn_sheet(output, picture))
    return list(entries.values())


def firing_entries(output, model, survey, explained, stored, convolution):
    """What fires each filter of a sheet of patterns. Writes their activation maps."""
    layer = convolution["activation"]
    peaks, index_of = survey.peaks[layer], {k: index for index, k in enumerate(stored)}
    path = output / f"conv2d_{convolution['number']}_maps.jpg"
    return {
        "field": layer_entry(model, layer),
        "patches": patch_entries(peaks, index_of),
        "maps": save_activation_maps(path, model, layer, peaks, explained),
        "peaks": peaks.values[list(explained)].astype(float).round(3).tolist(),
    }


def drawn_sheet(output, picture):
    """How the page cuts a picture that save_sheet wrote, and which of its tiles are silent."""
    sheet = picture.sheet
    count = len(sheet.silent)
    entry = sheet_entry(output / picture.file, count, sheet.side, sheet.columns, gap=2, border=10)
    entry |= {"count": count, "silent": [k for k in range(count) if sheet.silent[k]]}
    return entry | {"layer": sheet.layer, "caption": picture.caption}


def sheet_entry(path, count, side, columns, gap=0, border=0):
    """How the page cuts a sheet of so many tiles, in pixels; above them may stand a title."""
    with Image.open(path) as picture:
        width, height = picture.size
    pitch = side + 2 * gap
    top = height - border - math.ceil(count / columns) * pitch + gap
    place = {"left": border + gap, "top": top, "tile": side, "pitch": pitch, "columns": columns}
    return {"file": path.name, "width": width, "height": height} | place


def patch_entries(peaks, index_of):
    """For each filter the [photo, row, column, activation] that fire it most, strongest first.

    index_of: {photo number: its index on the page}.
    """
    values, positions = peaks.values, peaks.positions
    return [
        [
            [index_of[k], *positions[k, number].tolist(), round(float(values[k, number]), 3)]
            for k in top_photos(peaks, number, PATCHES)
        ]
        for number in range(values.shape[1])
    ]


def save_tiles(path, tiles, columns, quality):
    """Write (n, side, side, 3) uint8 tiles edge to edge: the entry of the sheet."""
    columns = min(columns, len(tiles))
    sheet = Image.fromarray(tile(tiles, columns, gap=0))
    with replace_when_whole(path) as partial_path:
        sheet.save(partial_path, quality=quality, optimize=True)
    return sheet_entry(path, len(tiles), tiles.shape[1], columns)


def save_photos(output, paths, listed, progress):
    """Write sheets of the photos, and one of thumbnails of the first `listed` ones.

    Returns the entries of the sheets, and the width / height of each photo.
    """
    quality = 66 if len(paths) <= LISTED_PHOTOS else 50
    entries, ratios, thumbnails = [], [], []
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(paths), PHOTO_COLUMNS**2):
            squares = pool.map(squeezed, paths[start : start + PHOTO_COLUMNS**2])
            tiles, some_ratios = zip(*squares, strict=True)
            path = output / f"photos_{len(entries) + 1}.jpg"
            entries.append(save_tiles(path, np.stack(tiles), PHOTO_COLUMNS, quality))
            progress.tell(path.name)
            ratios += some_ratios
            thumbnails += map(thumbnail, tiles, some_ratios)
    thumbnails = np.stack(thumbnails[:listed])
    columns = math.ceil(math.sqrt(listed))
    sheet = save_tiles(output / "photos.jpg", thumbnails, columns, quality=70)
    progress.tell("photos.jpg")
    return {"thumbnails": sheet, "photo_sheets": entries}, ratios


def squeezed(path):
    """A photo as a square of PHOTO_SIDE, and its width / height."""
    photo = read_photo(path, at_least=PHOTO_SIDE)
    square = cv2.resize(photo, (PHOTO_SIDE, PHOTO_SIDE), interpolation=cv2.INTER_AREA)
    return square, max(0.001, round(photo.shape[1] / photo.shape[0], 3))


def thumbnail(square, ratio):
    """The middle of a squeezed photo of that ratio, in its true proportions."""
    top, left = (int(PHOTO_SIDE * max(0, 1 - share) / 2) for share in (ratio, 1 / ratio))
    middle = square[top : PHOTO_SIDE - top, left : PHOTO_SIDE - left]
    return cv2.resize(middle, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)


def save_activation_maps(path, model, layer, peaks, explained):
    """Write the activation maps of the filters drawn: a row for each of the explained photos.

    Black is 0, and a filter has one scale for all photos, so that they can be compared. Returns the
    entry of the sheet.
    """
    values = peaks.values[list(explained)]
    filters = values.shape[1]
    rows = []
    for explanation in explained.values():
        photo = as_batch(model, explanation.pixels)
        ((activation,),) = layer_activations(model, photo, (layer,))
        shares = activation[..., :filters].clip(0) / np.maximum(values.max(0), 1e-12)
        smooth = cv2.INTER_AREA if len(activation) > MAP_SIDE else cv2.INTER_LINEAR
        rows += [
            cv2.resize(shares[..., k], (MAP_SIDE, MAP_SIDE), interpolation=smooth)
            for k in range(filters)
        ]
    tiles = matplotlib.colormaps[HEATMAP_COLOURS](np.stack(rows), bytes=True)[..., :3]
    return save_tiles(path, tiles, filters, quality=72)


def script_text(run):
    """The text of run.js: JSON after its prefix, in ASCII, and harmless whatever a name holds."""
    text = json.dumps(run, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":  # "</script>" would end the script
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f"const run = {text};\n"


def remove_old_sheets(output, facts):
    """Remove the page's sheets that an earlier run left, and this one has no use for."""
    shown = [*facts["photo_sheets"], *(entry["maps"] for entry in facts["filters"])]
    kept = {sheet["file"] for sheet in shown}
    for names in ("photos_[0-9]*.jpg", "conv2d_*_maps.jpg"):
        for path in output.glob(names):
            if path.name not in kept:
                path.unlink()


def copy_page(output):
    """Put a copy of the page beside run.js, where it is not there already."""
    page = output / "index.html"
    if not PAGE.is_file():
        print(f"{printable(PAGE)} is missing: the pictures have no page to show them.")
    elif not (page.exists() and page.samefile(PAGE)):
        with replace_when_whole(page) as partial_path:
            shutil.copyfile(PAGE, partial_path)


# ---- 14. The run ---------------------------------------------------------------------------------


def main():
    """Train, or load a model; evaluate it; draw what it sees."""
    options = parse_options()
    # A settings file may say otherwise, and a model saved so could never be drawn.
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    require_writable(options.output)
    require_photos(options.photos)
    if options.skip_training:
        model, class_names, test, record = open_saved(options)
    else:
        model, class_names, test, record = train_and_save(options)
    try:
        evaluate_and_draw(options, model, class_names, test, record)
    except KeyboardInterrupt:
        print(f"\nThe model is saved in {printable(options.model)}; --skip-training draws it.")
        raise
    page = (options.output / "index.html").resolve().as_uri()
    print(f"\nAll pictures on one page: {page}")


def evaluate_and_draw(options, model, class_names, test, record):
    """Print what the model makes of the test photos and of own ones, and draw everything.

    test: PhotoBatches, or None where there are only own photos.
    """
    own = options.photos or []
    photos, labels = (test.paths, test.labels) if test else ([], None)
    survey = survey_photos(model, photos, labels, own)
    evaluation = survey.evaluation(class_names)
    if evaluation:
        print(f"\n{evaluation_report(evaluation)}\n", flush=True)
        if not options.skip_training:
            metrics = {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
            write_json(history_file(options.model), record | {"test": metrics})
    for path, probabilities in zip(own, survey.probabilities, strict=False):  # they come first
        print(prediction_line(path, probabilities, class_names), flush=True)
    draw(
        model,
        photos,
        class_names,
        options.output,
        labels,
        own_photos=own,
        survey=survey,
        record=record,
        command=pasteable("python", Path(sys.argv[0]).name, *sys.argv[1:]),
        seed=options.seed,
    )


def history_file(model_file):
    return model_file.with_name(f"{model_file.stem}_history.json")


def checkpoint_folder(model_file):
    return model_file.with_name(f"{model_file.stem}_checkpoints")


def require_writable(folder):
    """Raises Stop if no file can be written to the folder, or to where it would be made."""
    places = (folder, *folder.absolute().parents)
    existing = next(place for place in places if os.path.lexists(place))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        raise Stop(f"{printable(folder)}: {reason}. Choose another place.") from error


def require_photos(paths):
    """Raises Stop if one of the photos does not decode."""
    try:
        for path in paths or []:
            read_photo(path)
    except Stop as stop:
        raise Stop(f"--photos {stop}\nName another photo.") from stop


def prediction_line(path, probabilities, class_names):
    """The most probable classes of a photo in a line: "cat.jpg: rose 69 %, daisy 29 %"."""
    best = most_probable(probabilities)[:3]
    named = (f"{printable(class_names[k])} {percent(probabilities[k])}" for k in best)
    return f"{printable(path.name)}: {', '.join(named)}"


def open_saved(options):
    """The saved model, its class names, the test photos or None, and its record or None."""
    model = load_model(options.model, options.image_size)
    record = read_record(history_file(options.model))
    known_names = record["classes"] if record else None
    count = classifier(model).output_shape[-1]
    folder = options.data / "test"
    if options.photos and not folder.is_dir():
        test, source = None, history_file(options.model)
        names = known_names or names_without_history(options.data, count)
    else:
        test, names = open_split(folder, input_size(model), options.batch_size)
        source = folder
    require_same_classes(options.model, count, known_names or names, names, source)
    return model, names, test, record


def require_same_classes(model_file, count, known_names, names, source):
    """Raises Stop where the class names found in `source` are not those of the model."""
    file, where = printable(model_file), printable(source)
    if known_names != names:
        trained, found = (", ".join(map(printable, it)) for it in (known_names, names))
        message = f"--model {file}: was trained on the classes {trained}; {where} holds {found}."
        raise Stop(f"{message}\nName the folders as in training, or name another --data.")
    if count != len(names):
        message = f"--model {file}: has {count} classes, {where} {len(names)}."
        raise Stop(f"{message}\nName another, or train one.")


def names_without_history(data, count):
    """Class names from whichever split folder there is, or else "class 0", "class 1", …"""
    for split in SPLITS:
        if (data / split).is_dir() and len(names := class_folders(data / split)) == count:
            return names
    return [f"class {index}" for index in range(count)]


def train_and_save(options):
    """Train, and save the model of the best epoch. Returns what open_saved returns."""
    require_writable(options.model.parent)
    size = (options.image_size, options.image_size)
    splits, class_names = open_all_splits(options.data, size, options.batch_size, options.seed)
    phases = training_phases(
        options.epochs, options.weights, options.freeze_below, options.learning_rate
    )
    describe(splits, class_names, phases)
    options.model.parent.mkdir(parents=True, exist_ok=True)
    lock = options.model.with_name(f".{options.model.name}.lock")
    busy = (
        f"{printable(options.model)}: another training writes it.\nWait, or choose another --model."
    )
    with locked(lock, busy):
        settings = run_settings(options, splits, phases)
        same = settings | {"classes": class_names}  # what a resumed run must have in common
        checkpoints = Checkpoints(checkpoint_folder(options.model), same)
        model = train_from(options, splits, phases, checkpoints, len(class_names))
        with replace_when_whole(options.model) as partial_path:
            model.save(partial_path)
        record = {"history": checkpoints.history, "classes": class_names, "settings": settings}
        write_json(history_file(options.model), record)
        shutil.rmtree(checkpoints.folder)
    return model, class_names, splits["test"], record


def describe(splits, class_names, phases):
    """Print what is about to be trained, and a warning where the photos are too few to judge by."""
    counts = ", ".join(f"{len(batches.paths)} {name}" for name, batches in splits.items())
    stretches = ", ".join(f"{it.name} {it.end_epoch - it.start_epoch}" for it in phases)
    names = ", ".join(map(printable, class_names[:20])) + (", …" if len(class_names) > 20 else "")
    print(f"Photos: {counts}. Classes: {names}. Epochs: {stretches}.", flush=True)
    for split in ("validation", "test"):
        fewest = np.bincount(splits[split].labels).min()
        if fewest < 10:
            print(f"Warning: {split} has a class of {fewest} photos; fewer than 10 tell little.")


def run_settings(options, splits, phases):
    """What the training depends on, for its record."""
    names = ("weights", "epochs", "batch_size", "image_size", "freeze_below", "learning_rate")
    settings = {name: getattr(options, name) for name in (*names, "mixed_precision", "seed")}
    settings["photos"] = {name: len(batches.paths) for name, batches in splits.items()}
    settings["phases"] = {phase.name: phase.end_epoch - phase.start_epoch for phase in phases}
    return settings


def train_from(options, splits, phases, checkpoints, class_count):
    """Train from the start, or from the newest checkpoint: the model of the best epoch."""
    newest = next(checkpoints.newest(), None)
    if newest and not options.resume:
        epochs = len(newest[2]["loss"])
        folder = printable(checkpoints.folder)
        print(f"{folder} holds an interrupted run of {epochs} epochs. To go on with it, press")
        print("Ctrl-C and add --resume. Otherwise this run deletes it after its first epoch.")
    keras.utils.clear_session()  # the names of the layers count from the start again
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(half_precision() if options.mixed_precision else "float32")
    with training_strategy().scope():
        model = build_model(class_count, options.image_size, options.weights)
        if options.resume:
            checkpoints.resume(model)
        train(model, splits, phases, checkpoints)
    keras.config.set_dtype_policy("float32")
    best = checkpoints.file_of(checkpoints.best_epoch)
    return in_float32(keras.saving.load_model(best, compile=False))


def read_record(path):
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


def write_json(path, content):
    with replace_when_whole(path) as partial_path:
        # ASCII, as a class name may hold bytes that are no UTF-8.
        partial_path.write_text(json.dumps(content, indent=2), "utf-8")


if __name__ == "__main__":
    run(main)

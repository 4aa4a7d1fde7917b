"""See what a convolutional network sees: fine-tune InceptionV3 on photos, then draw what it has learnt.

    python create_train_val_test.py flowers
    python model_training_and_visualization.py

The sections follow a run: 1 photos, 2 network, 3 training, 4 judgement, 5 activation grids, 6 filter patterns,
7 heatmaps, 8 the page. Functions compute and return arrays; only save_*, write_*, draw_* and main touch the disk.
"""

import argparse
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
import warnings
from collections import namedtuple
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from create_train_val_test import Stop, class_folders, cores, decode_photos, read_photo, replace_when_whole, run

os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")  # keeps freed memory at hand: patterns climb faster
terminal = os.dup(2)
try:  # what TensorFlow says while it loads stays off the terminal, unless TF_CPP_MIN_LOG_LEVEL asks for it
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import keras
    import tensorflow as tf
    from keras import layers
finally:
    os.dup2(terminal, 2)

# ---- Settings: what a reader of this study would change --------------------------------------------------------------

AUGMENTATION = {"rotation_range": 20, "width_shift_range": 0.2, "height_shift_range": 0.2, "horizontal_flip": True}
GRID_CONVOLUTIONS = (1, 4, 9)  # in the order of their creation, counted from 1
HEATMAP_LAYER = "mixed10"
DELETED_FRACTION = 0.2  # of a photo, blurred away to see what its heatmap is worth

BLOCKS = [f"mixed{number}" for number in range(11)]  # InceptionV3's blocks, from the photo to the classes
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
BACKGROUND = 24  # the sheets' grey level, and in STYLE that of all figures, where a $ in a file's name is just a $
STYLE = {f"{part}.facecolor": "#181818" for part in ("figure", "axes", "savefig")} | {"text.parse_math": False}

# ---- 1. Photos: from the split folders to augmented batches ----------------------------------------------------------
# Each photo is squeezed to the square that the network takes, as 0–255 RGB. Training photos are turned, shifted and
# mirrored at random in every epoch, so that the network never meets the same picture twice and learns none by heart.


@lru_cache(maxsize=4000)  # about 1 GB at 299 pixels; a larger set is decoded again in every epoch
def network_input(path, size):
    """Reads a photo as the network is to see it: (size, size, 3) uint8 RGB. Raises Stop if it does not decode."""
    photo = Image.fromarray(read_photo(path, at_least=size))
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))


class PhotoGenerator(tf.keras.preprocessing.image.ImageDataGenerator):
    """ImageDataGenerator whose affine step is one OpenCV warp: the same picture as SciPy's, many times faster."""

    def apply_transform(self, x, transform_parameters):
        if self.fill_mode == "nearest":  # edges go on; the other modes stay with SciPy
            nothing = {"theta": 0, "shear": 0, "tx": 0, "ty": 0, "zx": 1, "zy": 1}
            theta, shear, *shift, zx, zy = (transform_parameters.get(name, nothing[name]) for name in nothing)
            theta, shear = np.deg2rad([theta, shear])
            rotation = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
            linear = rotation @ [[zx, -np.sin(shear) * zy], [0, np.cos(shear) * zy]]
            centre = np.array(x.shape[:2]) / 2 - 0.5
            # As Keras composes them: the place in the photo, (x, y), of each place in the result.
            matrix = np.column_stack([linear, centre + rotation @ shift - linear @ centre])
            options = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_REPLICATE}
            x = cv2.warpAffine(x, matrix, x.shape[1::-1], **options)
            transform_parameters = transform_parameters | nothing
        return super().apply_transform(x, transform_parameters)

    def flow_from_directory(self, directory, **options):
        return PhotoIterator(directory, self, **options)


class PhotoIterator(tf.keras.preprocessing.image.DirectoryIterator):
    """Batches ((n, size, size, 3) float32 0–255, (n, classes) one-hot) of the photos in a split folder."""

    epoch, seeding = 0, threading.Lock()  # Keras draws from NumPy's global generator, which all workers share

    def __getitem__(self, batch_number):  # the same for a seed, epoch and number, whichever worker builds it
        numbers = np.arange(self.n)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(numbers)
        numbers = numbers[batch_number * self.batch_size :][: self.batch_size]
        return np.stack([self.augmented(number) for number in numbers]), np.eye(self.num_classes)[self.classes[numbers]]

    def augmented(self, number):
        photo = network_input(self.filepaths[number], self.target_size[0]).astype("float32")
        seed = np.random.SeedSequence([self.seed, self.epoch, number]).generate_state(1)[0]
        with self.seeding:
            parameters = self.image_data_generator.get_random_transform(photo.shape, seed)
        return self.image_data_generator.standardize(self.image_data_generator.apply_transform(photo, parameters))

    def on_epoch_end(self):
        self.epoch += 1


def open_splits(data, names, size, batch_size, seed):
    """Opens the named split folders and decodes each photo once: {name: PhotoIterator}; "train" comes augmented.

    Raises Stop where a class is missing or empty, a photo does not decode, or the splits hold different classes.
    """
    splits, again = {}, f"split again: python create_train_val_test.py PHOTOS --output {data} --overwrite"
    for name in names:
        folder = data / name
        classes = class_folders(folder) if folder.is_dir() else []
        if len(classes) < 2:
            lack = "needs two class folders or more" if folder.is_dir() else "no such folder"
            raise Stop(f"{folder}: {lack}.\nSplit your photos: python create_train_val_test.py PHOTOS --output {data}")
        options = {"target_size": (size, size), "batch_size": batch_size, "seed": seed, "shuffle": name == "train"}
        generator = PhotoGenerator(**AUGMENTATION if name == "train" else {})
        splits[name] = generator.flow_from_directory(str(folder), classes=classes, **options)
        splits[name].workers = min(8, cores())
        if different := splits[name].class_indices.keys() ^ splits[names[0]].class_indices:
            lists = f"hold different classes: {', '.join(sorted(different))}"
            raise Stop(f"{data / names[0]} and {folder} {lists}.\nThen {again}")
        if empty := [classes[k] for k in set(range(len(classes))) - set(splits[name].classes)]:
            raise Stop(f"{folder}: no photos in {', '.join(empty)}.\nAdd some, and {again}")
    for name, photos in splits.items():
        try:
            for _ in decode_photos(photos.filepaths, partial(network_input, size=size), f"Checking {name}"):
                pass
        except Stop as stop:
            raise Stop(f"{stop}.\nRemove it, or {again}") from stop
    return splits


# ---- 2. Network: InceptionV3 with a new head -------------------------------------------------------------------------
# The convolutions of InceptionV3 turn a photo into 2048 small maps ("mixed10"); their means go through a small
# classifier, the head. The graph is flat, so that every layer can be asked for by its name, and the network scales the
# pixels itself: whoever loads the saved file feeds plain photos and cannot get the range wrong.


def build_network(class_count, image_size, weights):
    """InceptionV3 on 0–255 RGB with a softmax over the classes; weights: "none", "imagenet" or a file, see --help."""
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
    """Gives the backbone ImageNet's weights, which Keras downloads once. Raises Stop where it cannot."""
    address = sys.modules[keras.applications.InceptionV3.__module__].WEIGHTS_PATH_NO_TOP
    try:
        base.set_weights(keras.applications.InceptionV3(include_top=False, weights="imagenet").get_weights())
    except Exception as error:  # Keras raises a bare Exception where it cannot reach the address
        cache = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models" / address.rpartition("/")[2]
        raise Stop(
            f"ImageNet's weights cannot be fetched from {address}\nPut that file by hand at {cache},\n"
            "or start from a file of your own with --weights FILE, or from scratch with --weights none.",
            exit_code=1,
        ) from error


def load_backbone_weights(base, path):
    """Gives the backbone the weights of a file or of a saved model's backbone. Raises Stop for other files."""
    if not path.is_file():
        raise Stop(f"--weights {path}: no such file. Give imagenet, none, or a weights file or model of InceptionV3.")
    try:
        if path.suffix == ".keras" or "model_config" in h5py.File(path).attrs:  # a whole network
            saved = keras.saving.load_model(path, compile=False)  # in safe mode: no code from the file is run
            base.set_weights(keras.Model(saved.inputs, saved.get_layer(BLOCKS[-1]).output).get_weights())
        else:
            base.load_weights(path)
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        remedy = "Give a .keras model of this script, or an .h5 weights file of InceptionV3 without its top."
        raise Stop(f"--weights {path}: does not hold InceptionV3's weights.\n{remedy}") from error


def load_network(path):
    """Loads a saved classifier to draw the pictures from. Raises Stop naming what it lacks."""
    if not path.is_file():
        raise Stop(f"--model {path}: no such file. Train one first (without --skip-training), or name another.")
    try:
        network = keras.saving.load_model(path, compile=False)  # in safe mode: no code from the file is run
    except Exception as error:  # a foreign file can fail in as many ways as there are formats
        raise Stop(f"--model {path}: is no network that Keras can load.\nTrain one, or name another.") from error
    if lack := what_network_lacks(network):
        raise Stop(f"--model {path}: the pictures need {lack}.\nName another, or train one.")
    return network


def what_network_lacks(network):
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
    return None


def in_creation_order(network, layer_type):
    """The network's layers of one type, first created first."""
    # Keras sorts network.layers by depth, and its names count on over all networks of a process: the first convolution
    # may be called "conv2d" or "conv2d_94". The number at the end of the name still tells the order of creation.
    chosen = [layer for layer in network.layers if isinstance(layer, layer_type)]
    return sorted(chosen, key=lambda layer: int(re.search(r"(?:_(\d+))?$", layer.name)[1] or 0))


# ---- 3. Training: first the head, then the network -------------------------------------------------------------------
# Pretrained layers know edges, petals and textures; a new head knows nothing, and its first wild gradients would spoil
# them. So the head learns alone on the frozen base ("head"), then the upper blocks follow at a low learning rate that
# falls along a cosine ("fine-tuning"). From scratch all layers learn at once, after a short warm-up ("scratch").


# A stretch of epochs, from first to before last, counted from 0, in which the layers from a block up learn ("head": the
# head alone, "none": all) at one rate, or up to it and down to 0 along a cosine.
Phase = namedtuple("Phase", "name first last freeze_below learning_rate cosine")


def training_phases(epochs, weights, freeze_below, learning_rate=None):
    """The phases of a run: one from scratch; from given weights a fifth of the epochs for the head, then the rest."""
    if weights == "none":
        return [Phase("scratch", 0, epochs, "none", learning_rate or 5e-4, cosine=True)]
    head_epochs = math.ceil(epochs / 5)
    head = Phase("head", 0, head_epochs, "head", 1e-3, cosine=False)
    fine_tuning = Phase("fine-tuning", head_epochs, epochs, freeze_below, learning_rate or 2e-4, cosine=True)
    return [head, fine_tuning] if epochs > head_epochs else [head]


def freeze(network, below):
    """Lets the layers from a block up learn and no others; "head" leaves only the head, "none" freezes nothing."""
    stem_end = in_creation_order(network, layers.MaxPooling2D)[1].name if below != "none" else None
    last_frozen = {"none": None, "head": BLOCKS[-1], **dict(zip(BLOCKS, [stem_end, *BLOCKS], strict=False))}[below]
    frozen = keras.Model(network.input, network.get_layer(last_frozen).output).layers if last_frozen else []
    for layer in network.layers:
        layer.trainable = layer not in frozen  # a frozen BatchNormalization also runs in inference mode


def compile_for(network, phase, steps_per_epoch):
    """Freezes what the phase freezes, and gives the network its loss and an Adam at the phase's learning rate."""
    freeze(network, phase.freeze_below)
    rate, steps = phase.learning_rate, steps_per_epoch * (phase.last - phase.first)
    if phase.cosine:
        warm_up = max(1, steps // 10)
        cosine = partial(keras.optimizers.schedules.CosineDecay, warmup_target=rate, warmup_steps=warm_up)
        rate = cosine(0.0, max(1, steps - warm_up))
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
        self.title, self.start = f"Epoch {epoch + 1}/{self.phase.last} {self.phase.name}", time.perf_counter()
        self.task = self.bar.add_task(self.title, total=self.photos.n, speed="")

    def on_train_batch_end(self, batch, logs=None):
        seen = min(self.photos.n, (batch + 1) * self.photos.batch_size)
        speed = f"{seen / (time.perf_counter() - self.start):.0f} photos/s"
        self.bar.update(self.task, completed=seen, speed=speed)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.remove_task(self.task)
        figures = "  ".join(f"{name} {logs[name]:.4f}" for name in METRICS)
        print(f"{self.title}: {figures}  ({time.perf_counter() - self.start:.0f} s)", flush=True)


class EpochBackup(keras.callbacks.Callback):
    """Keeps weights, optimizer and history of whole epochs in a folder, so that an interrupted run can go on.

    Unlike Keras's BackupAndRestore it writes no file in place: an epoch counts once state.json, written last, names it.
    The last two stay, in case the last cannot be read, and the best so far of both. Raises Stop where the loss is NaN.
    """

    def __init__(self, folder, settings):
        super().__init__()
        self.folder, self.settings, self.run_name = folder, settings, f"{time.time_ns():x}"
        self.history = {name: [] for name in METRICS}

    @property
    def epochs(self):
        return len(self.history["loss"])

    @property
    def best_epoch(self):
        """The epoch of the lowest validation loss, counted from 1; 0 before the first."""
        return int(np.argmin(self.history["val_loss"])) + 1 if self.epochs else 0

    def weights_file(self, epoch):
        return self.folder / f"{self.run_name}_epoch_{epoch:03}.keras"  # HDF5 itself crashes on a full disk

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            rate = f"at learning rate {float(self.model.optimizer.learning_rate):.2g}"
            kept = f"Best weights so far: {self.weights_file(self.best_epoch)}. " if self.epochs else ""
            remedy = f"{kept}Train with a smaller --learning-rate."
            raise Stop(f"The loss became NaN in epoch {epoch + 1} {rate}.\n{remedy}", exit_code=1)
        history = {name: [*values, float(logs[name])] for name, values in self.history.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(self.weights_file(epoch + 1)) as partial:
            self.model.save(partial)
        state = {"run_name": self.run_name, "settings": self.settings, "history": history}
        write_json(self.folder / "state.json", state)
        needed = {self.epochs, self.best_epoch}
        self.history = history
        needed |= {self.epochs, self.best_epoch}
        for file in set(self.folder.glob("*.keras")) - {self.weights_file(number) for number in needed}:
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
                self.history = {name: values[:epoch] for name, values in state["history"].items()}
                return
            except Exception:  # a file that was cut off can fail in many ways
                print(f"{self.weights_file(epoch)}: cannot be read. Going on from the epoch before it.")
        raise Stop(f"--resume: no epoch in {self.folder} can be read. Leave out --resume to start a new run.", 1)


def read_json(path):
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


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
            callbacks = [keras.callbacks.TerminateOnNaN(), backup, EpochBar(bar, phase, photos)]
            options = {"initial_epoch": backup.epochs, "epochs": phase.last, "callbacks": callbacks, "verbose": 0}
            try:  # photos shuffles itself, by seed and epoch; Keras would shuffle the batches too
                network.fit(photos, validation_data=splits["validation"], shuffle=False, **options)
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                raise Stop("Out of memory. Train with a smaller --batch-size or --image-size.", 1) from error
            except KeyboardInterrupt:
                if backup.epochs:
                    print(f"Epochs kept: {backup.epochs}; the same command with --resume goes on.", flush=True)
                raise


def half_precision():
    """Keras's dtype policy for half precision, or for full precision where the machine does not compute in it."""
    cpu = Path("/proc/cpuinfo")
    if tf.config.list_physical_devices("GPU"):
        return "mixed_float16"
    if cpu.is_file() and {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu.read_text().split()):
        return "mixed_bfloat16"
    print("--mixed-precision: no GPU, nor a CPU that is known to compute in bfloat16; going on in float32.")
    return "float32"


def training_strategy():
    """Mirrors the network over all GPUs (or logical CPUs) where there are several."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    several = len(devices) > 1
    return tf.distribute.MirroredStrategy([it.name for it in devices]) if several else tf.distribute.get_strategy()


# ---- 4. Judgement: what the network gets right and wrong -------------------------------------------------------------
# The test photos took no part in training, nor in the choice of the best epoch: their figures tell how the network does
# on photos that it has never met. They are asked for once, at the end.


def class_report(confusions, class_names):
    """Lines of precision and recall of each class, and one on the two classes most often taken for each other."""
    width = max(map(len, class_names))
    lines = [f"{'class':{width}}  precision  recall  photos"]
    for k, name in enumerate(class_names):
        predicted, photos = confusions[:, k].sum(), confusions[k].sum()
        precision = f"{confusions[k, k] / predicted:.2f}" if predicted else "—"
        lines.append(f"{name:{width}}  {precision:>9}  {confusions[k, k] / photos:6.2f}  {photos:6}")
    mixed_up = np.triu(confusions + confusions.T, 1)
    one, other = np.unravel_index(mixed_up.argmax(), mixed_up.shape)
    pair = f"{class_names[one]} and {class_names[other]}, {mixed_up.max()} of {confusions[[one, other]].sum()} photos"
    return "\n".join([*lines, f"Most confused: {pair}." if mixed_up.any() else "No class is taken for another."])


def telling_photos(probabilities, labels):
    """Numbers of the photos, most telling first: the surest right one, the worst mistakes, the least certain."""
    true, right = probabilities[np.arange(len(labels)), labels], probabilities.argmax(1) == labels
    surest = np.argmax(np.where(right, true, -1))
    return [surest, *(number for number in np.lexsort((true, right)) if number != surest)]


def save_training_curves(path, history, phases):
    """Draws loss and accuracy after each epoch; dotted: the phases, {name: epochs}; red: the epoch that is kept."""
    figure, best = Figure(figsize=(11, 4), layout="constrained"), int(np.argmin(history["val_loss"]))
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, values in (("training", history[metric]), ("validation", history[f"val_{metric}"])):
            axes.plot(range(1, len(values) + 1), values, "o-", label=name)
        axes.plot(best + 1, history[f"val_{metric}"][best], "o", color="red", markersize=10, label="kept")
        for name, start in zip(phases, np.cumsum([0.5, *phases.values()])[:-1], strict=True):
            axes.axvline(start, linestyle=":")
            axes.text(start, 1.01, name, transform=axes.get_xaxis_transform())
        axes.set(xlabel="epoch", ylabel=metric)
        axes.legend()
    save_figure(path, figure)


def save_confusion_matrix(path, confusions, class_names):
    """Draws how often each true class (row) is taken for each class (column)."""
    axes = axes_of_numbers(confusions, confusions / np.maximum(1, confusions.sum(1, keepdims=True)), "Blues_r")
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{np.trace(confusions)} of {confusions.sum()} test photos right")
    save_figure(path, axes.figure)


def axes_of_numbers(numbers, shares, colours):
    """Axes with a cell for each of the (h, w) numbers, coloured by its share, 0–1."""
    axes = Figure(figsize=(1.6 + 0.9 * numbers.shape[1], 1.2 + 0.8 * len(numbers))).subplots()
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    axes.set(xticks=range(numbers.shape[1]), yticks=range(len(numbers)))
    for (row, column), value in np.ndenumerate(numbers):
        box = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 2}
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", color="white", bbox=box)
    return axes


def save_figure(path, figure, dpi=130):
    """Writes a figure, without a layout cut to what is drawn on it, in the format that the suffix names."""
    with replace_when_whole(path) as partial:
        colours = {"quality": 92, "subsampling": 0}  # as sharp as brightness
        border = None if figure.get_layout_engine() else "tight"  # which draws all twice
        figure.savefig(partial, dpi=dpi, bbox_inches=border, pad_inches=0.05, pil_kwargs=colours)
    print(path, flush=True)


# ---- 5. Activation grids: what each channel of a layer answers -------------------------------------------------------
# A convolution turns the photo into channels, one for each of its filters: maps of where the filter found its pattern.
# The first look like edge and colour drawings of the photo; deeper ones are coarser and answer to parts. The ReLU that
# follows (ReLU.png) keeps what is positive, and that is all that the next layer gets to see.

# Blue for negative answers, black for 0, red to yellow for positive ones.
ANSWERS = ListedColormap([*matplotlib.colormaps["berlin"].colors[:128], *matplotlib.colormaps["inferno"].colors])


def channel_cells(activation):
    """Pictures (channels, size, size, 3) uint8 of an (h, w, channels) activation, and which channels are dead."""
    size = int(np.clip(1800 / math.sqrt(activation.shape[2]), 24, 96))
    strength, dead = np.abs(activation), ~activation.any((0, 1))
    # Not the highest value has full colour: one hot pixel would turn all others black.
    full = np.percentile(strength, 99.5, axis=(0, 1))
    full = np.where(full > 0, full, strength.max((0, 1))) + dead
    places = np.clip(activation / full, -1, 1) * np.where(activation < 0, 127, 255) + 128
    colours = ANSWERS(places.astype(int), bytes=True)[..., :3]
    smooth = cv2.INTER_AREA if activation.shape[0] > size else cv2.INTER_NEAREST
    cells = np.stack([cv2.resize(colours[:, :, k], (size, size), interpolation=smooth) for k in range(len(dead))])
    diagonals = np.eye(size, dtype=bool) | np.eye(size, dtype=bool)[::-1]
    cells[dead] = np.where(diagonals[..., None], 150, 70)  # a grey cross
    return cells, dead


def tile(cells, columns, frames=BACKGROUND, gap=2):
    """One sheet of the (n, h, w, 3) cells in reading order, in frames of these colours; the last row is filled up."""
    count, height, width, _ = cells.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height + 2 * gap, width + 2 * gap, 3), BACKGROUND, "uint8")
    sheet[:count] = frames
    sheet[:count, gap:-gap, gap:-gap] = cells
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    return sheet.reshape(rows * sheet.shape[1], -1, 3)


def save_sheet(path, sheet, title):
    """Writes the (height, width, 3) sheet, pixel for pixel, under its title."""
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet)
    axes.set_axis_off()
    axes.set_title(title, loc="left")
    save_figure(path, figure, dpi=100)


def draw_grids(output, network, explained):
    """Draws the photo, and a sheet of all channels of some convolutions and of their ReLUs: {file: caption}."""
    with replace_when_whole(output / "OriginalImage.jpeg") as partial:
        Image.fromarray(explained.photo).save(partial, quality=92)
    axes, x = Figure(figsize=(5, 3.5)).subplots(), np.linspace(-5, 5, 201)
    axes.plot(x, np.maximum(0, x), linewidth=3)
    axes.set(title="ReLU(x) = max(0, x)", xlabel="x: answer of a filter", ylabel="what the next layer sees")
    save_figure(output / "ReLU.png", axes.figure)
    shown = {"OriginalImage.jpeg": explained.name, "ReLU.png": "ReLU keeps what is positive"}
    chosen = {}
    for number in GRID_CONVOLUTIONS:
        chosen[f"conv2d_{number}_grid.jpg"] = in_creation_order(network, layers.Conv2D)[number - 1]
        chosen[f"activation_{number}_grid.jpg"] = in_creation_order(network, layers.Activation)[number - 1]
    probe = keras.Model(network.input, [layer.output for layer in chosen.values()])  # one forward pass for all
    for (file, layer), answer in zip(chosen.items(), probe(explained.pixels[None].astype("float32")), strict=True):
        height, width, channels = answer.shape[1:]
        cells, dead = channel_cells(answer[0].numpy())
        shown[file] = f"{layer.name}: {height} × {width} cells × {channels} channels, on {explained.name}"
        fired = f"{dead.sum()} did not fire (crossed)" if dead.any() else "all channels fired"
        negative = "" if isinstance(layer, layers.Activation) else ", blue negative"
        scale = f"black 0, red to yellow positive{negative}, each channel on a scale of its own; {fired}"
        save_sheet(output / file, tile(cells, columns=16), f"{shown[file]}\n{scale}")
    return shown


# ---- 6. Filter patterns: what each filter looks for ------------------------------------------------------------------
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
PATTERN_STEPS = 22  # by then the pictures are strong; more steps only drive colours into black and white
PATTERN_RATE = 0.22
PATTERN_WARM_UP = 6  # steps in which the rate rises to it
PATTERN_STARTS = 3  # a blank image, then noise for the filters that did not fire
SHORTEST_WAVELENGTH = 4  # pixels: without shorter waves the answer hardly drops, and the speckle is gone
FILTERS_AT_ONCE = 16  # 32 are no faster on a CPU and take more memory

# Square root of the colour correlation of ImageNet's photos, published with Lucid: rows are red, green and blue,
# columns are brightness, blue to yellow and green to magenta. Scaled to the length of the first column, and the last
# two 2.5 times as strong as in photos, where patterns come out muted.
COLOUR_CORRELATION_ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], "float32")
COLOURS = COLOUR_CORRELATION_ROOT / np.linalg.norm(COLOUR_CORRELATION_ROOT[:, 0]) * np.array([1, 2.5, 2.5], "float32")


def fourier_basis(size, longest_wavelength):
    """The waves of a real Fourier transform, (waves, size), and the 1/f scale of their coefficients, (waves, waves)."""
    # cos + sin of positive and negative frequencies (Hartley, 1942) span what complex waves span, with real
    # coefficients; two small matrix products then cost less than a fast transform, which keeps all frequencies.
    cycles = np.fft.fftfreq(size, 1 / size)
    cycles = cycles[np.abs(cycles) <= size / SHORTEST_WAVELENGTH]
    angle = 2 * np.pi * np.outer(cycles, np.arange(size)) / size
    frequency = np.maximum(np.hypot(cycles[:, None], cycles), size / longest_wavelength)
    return (np.cos(angle) + np.sin(angle)).astype("float32"), (1 / frequency).astype("float32")


def fourier_to_image(coefficients, waves, scale):
    """Coefficients (n, 3, waves, waves) of independent colours as RGB images (n, size, size, 3), 0–255."""
    planes = tf.matmul(waves, tf.matmul(scale * coefficients, waves), transpose_a=True)  # (n, 3, size, size)
    # In range without being cut off: the picture shown is exactly the one that the network was given.
    return 255 * tf.sigmoid(tf.einsum("ncyx,rc->nyxr", planes, COLOURS))


def cut_network(network, layer_names):
    """The flat network cut after the named layers, for images of any size; it shares the network's weights."""
    cut = keras.Model(network.inputs, [network.get_layer(name).output for name in layer_names])
    any_size = keras.Input((None, None, 3))
    return keras.models.clone_model(cut, input_tensors=[any_size], clone_function=lambda layer: layer)


def ascent_function(cut, waves, scale, damping):
    """A function that climbs from coefficients (n, 3, waves, waves) to those whose images fire their filters (n,)."""
    # All that varies is a tensor of a declared shape, so that it is traced once, whatever the filters.
    coefficients, filters = tf.TensorSpec((None, 3, *scale.shape)), tf.TensorSpec((None,), tf.int32)

    @tf.function(input_signature=[coefficients, filters, tf.TensorSpec((None, 2), tf.int32)])
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
            rate = PATTERN_RATE * tf.minimum(1.0, step / PATTERN_WARM_UP)
            coefficients += rate * mean / (1 - 0.9**step) / (tf.sqrt(damped / (1 - 0.999**step)) + 1e-12)
        return coefficients

    return climb


def filter_patterns(network, convolution, relu, filters, longest_wavelength, shift, damping, seed=0):
    """Pictures that fire the filters of a convolution, and whether they do: (n, size, size, 3) uint8, (n,) booleans.

    They climb on the convolution's own answer, as a dead ReLU passes no gradient. A filter fires if the ReLU is above 0
    anywhere on its finished 8-bit picture; one that does not is started again from noise.
    """
    filters, rng = np.asarray(filters, "int32"), np.random.default_rng(seed)
    cut = cut_network(network, [convolution, relu])
    waves, scale = fourier_basis(PATTERN_SIZE, longest_wavelength)
    climb = ascent_function(cut, waves, scale, damping)
    pictures, fires = np.zeros((len(filters), PATTERN_SIZE, PATTERN_SIZE, 3), "uint8"), np.zeros(len(filters), bool)
    for start in range(PATTERN_STARTS):
        silent = np.flatnonzero(~fires)
        for piece in (silent[first : first + FILTERS_AT_ONCE] for first in range(0, len(silent), FILTERS_AT_ONCE)):
            noise = rng.normal(scale=0.5 if start else 0.0, size=(len(piece), 3, *scale.shape)).astype("float32")
            shifts = rng.integers(-shift, shift, (PATTERN_STEPS, 2), dtype="int32", endpoint=True)
            coefficients = climb(noise, filters[piece], shifts)
            pictures[piece] = np.rint(fourier_to_image(coefficients, waves, scale))
            peaks = np.max(cut([pictures[piece].astype("float32")], training=False)[1], axis=(1, 2))  # (n, channels)
            fires[piece] = peaks[np.arange(len(piece)), filters[piece]] > 0
    return pictures, fires


def draw_patterns(output, network, seed):
    """Draws a sheet of the patterns of the first 64 filters of some convolutions: {file: caption}."""
    shown = {}
    for number, climb in PATTERN_CLIMBS.items():
        convolution = in_creation_order(network, layers.Conv2D)[number - 1]
        relu = in_creation_order(network, layers.Activation)[number - 1]
        filters = range(min(64, convolution.filters))
        pictures, fires = filter_patterns(network, convolution.name, relu.name, filters, **climb, seed=seed)
        silent = f"{(~fires).sum()} never fired from any of {PATTERN_STARTS} starts (red frame)"
        frames = np.where(fires[:, None, None, None], 120, np.array([200, 50, 50]))
        file, title = f"conv2d_{number}_filters.jpg", f"{convolution.name}: what filters 0 to {filters[-1]} of "
        shown[file] = f"{title}{convolution.filters} look for, row by row; {'all fire' if fires.all() else silent}"
        save_sheet(output / file, tile(pictures, columns=8, frames=frames), shown[file])
    return shown


# ---- 7. Heatmaps: where the network found its class ------------------------------------------------------------------
# Grad-CAM asks how much each channel of a layer raises the logit of a class (the mean of its gradient), and adds up the
# channels' maps with these weights: where the sum is positive, there is evidence for the class. It takes the logit, as
# the softmax is flat, and its gradient nothing, where the network is sure.

# Where the cells of each block look: the pixel at the centre of the first one, and the distance to the next.
# InceptionV3 does not pad its strided layers: a map just stretched over a photo of 299 pixels lies up to 19 beside it.
CELLS = {name: (13, 8) if k < 3 else (21, 16) if k < 8 else (37, 32) for k, name in enumerate(BLOCKS)}


def grad_cam(model, photo, layer_name, class_index):
    """Grad-CAM (Selvaraju et al., 2017): the ReLU of a layer's channels, weighted by their mean gradient of the logit.

    photo: one (height, width, 3) RGB photo, 0–255, squeezed to the model's input where its size differs. Returns the
    (h, w) float map of the layer, not scaled, not enlarged; 0 everywhere where nothing speaks for the class.
    """
    return class_evidence(model, photo, (layer_name,), class_index)[0]


def class_evidence(model, photo, layer_names, class_index):
    """Grad-CAM maps of several layers, in the order of the graph, from one pass: a list of (h, w) floats >= 0."""
    below, above = evidence_probes(model, layer_names)
    first = below(tf.image.resize(photo[None], model.input_shape[1:3], antialias=True))
    with tf.GradientTape() as tape:
        tape.watch(first)
        features, *others = tf.nest.flatten(above(first))
        head = model.layers[-1]  # the softmax layer, whose bias would not change the gradient
        logits = features @ head.kernel if isinstance(head, layers.Dense) else features
        logit = logits[0, class_index]
    answers, maps = [first, *others], []
    for answer, gradient in zip(answers, tape.gradient(logit, answers), strict=True):
        weights = tf.reduce_mean(gradient, (1, 2), keepdims=True)
        maps.append(np.maximum(0, tf.reduce_sum(answer * weights, -1)[0]))
    return maps


@lru_cache(maxsize=2)  # to build them takes as long as to run them
def evidence_probes(model, layer_names):
    """The model up to the first of the layers; and from there to what its last layer weighs and to the other layers."""
    first, *others = (model.get_layer(name).output for name in layer_names)
    return keras.Model(model.input, first), keras.Model(first, [model.layers[-1].input, *others])


def enlarge(heatmap, size, first, step, cells=False):
    """Lays an (h, w) heatmap where its cells look, interpolated, or as cells with NaN around them: (size, size)."""
    to_cells = np.array([[1 / step, 0, -first / step], [0, 1 / step, -first / step]])
    flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_NEAREST if cells else cv2.INTER_LINEAR)
    border = {"borderMode": cv2.BORDER_CONSTANT if cells else cv2.BORDER_REPLICATE, "borderValue": np.nan}
    return cv2.warpAffine(heatmap.astype("float32"), to_cells, (size, size), flags=flags, **border)


def most_marked(heatmap, fraction=DELETED_FRACTION):
    """Boolean mask of that fraction of an (h, w) heatmap's pixels which has the highest values."""
    mask = np.zeros(heatmap.size, bool)
    mask[np.argsort(-heatmap, axis=None, kind="stable")[: round(fraction * heatmap.size)]] = True
    return mask.reshape(heatmap.shape)


def deletion(model, photo, masks):
    """Probabilities (1 + masks, classes) of a (size, size, 3) photo as it is, and with each mask's pixels blurred away.

    One step of the deletion game of RISE (Petsiuk et al., 2018): a heatmap is worth something if the probability falls
    further without the part that it marks than without as large a part that anyone would have guessed.
    """
    photo = photo.astype("float32")
    blurred = cv2.GaussianBlur(photo, (0, 0), len(photo) / 12)
    photos = np.stack([photo, *(np.where(mask[..., None], blurred, photo) for mask in masks)])
    return np.asarray(model(photos, training=False))


def explain_photo(network, path, name, class_names, true=None, probabilities=None):
    """A photo, what the network makes of it, and the evidence for its true (where not known, its predicted) class."""
    pixels = network_input(path, network.input_shape[1])
    probabilities = deletion(network, pixels, [])[0] if probabilities is None else probabilities
    predicted, second = np.argsort(-probabilities)[:2].tolist()
    target = predicted if true is None else int(true)
    rival = second if predicted == target else predicted  # the most probable of the other classes
    verdict = f"predicted {class_names[predicted]} {probabilities[predicted]:.2f}"
    if true is not None:
        verdict += f", true {class_names[target]} {probabilities[target]:.2f}"
    heatmap = grad_cam(network, pixels, HEATMAP_LAYER, target)  # (h, w)
    facts = {"name": name, "photo": read_photo(path), "pixels": pixels, "heatmap": heatmap, "verdict": verdict}
    names = {"target_name": class_names[target], "rival_name": class_names[rival]}
    return SimpleNamespace(probabilities=probabilities, target=target, rival=rival, **facts, **names)


def worth_of(network, explained):
    """What the heatmap is worth on this photo, in words: how far the probability falls without what it marks."""
    size, target = len(explained.pixels), explained.target_name
    if not explained.heatmap.any():
        return f"no evidence for {target}: the heatmap is empty"
    from_centre = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2))
    rivals = enlarge(explained.heatmap, size, *CELLS[HEATMAP_LAYER]), -from_centre
    before, unmarked, uncentred = deletion(network, explained.pixels, map(most_marked, rivals))[:, explained.target]
    return f"most marked fifth blurred: {target} {before:.2f} → {unmarked:.2f}; centred fifth: → {uncentred:.2f}"


def show(axes, explained, title="", heatmap=None, peak=None, layer=HEATMAP_LAYER, signed=False, cells=False):
    """Draws the photo and on it a layer's heatmap, from 0 (-peak if signed) to peak, clear where it is 0; or cells."""
    height, width = explained.photo.shape[:2]
    axes.imshow(explained.photo.mean(2) if signed else explained.photo, cmap="gray", extent=(0, width, height, 0))
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_axis_off()
    if heatmap is not None:
        peak, evidence = peak or heatmap.max() or 1, enlarge(heatmap, len(explained.pixels), *CELLS[layer], cells)
        colours = {"cmap": "seismic", "vmin": -peak} if signed else {"cmap": "turbo", "vmin": 0}
        colours |= {"vmax": peak, "alpha": 1 if cells else 0.7 * np.abs(evidence) / peak}
        return axes.imshow(evidence, extent=(0, width, height, 0), **colours)


def save_panels(path, rows, title, label, dpi=100):
    """Draws rows of panels (photo, [arguments of show, …]) under a title, beside the colour scale that they share."""
    (height, width, _), columns = rows[0][0].photo.shape, len(rows[0][1])
    figure = Figure(figsize=(13, 0.8 + len(rows) * (0.3 + 12 / columns * height / width)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (explained, panels), row in zip(rows, axes, strict=True):
        colours = [show(place, explained, **panel) for place, panel in zip(row, panels, strict=True)][-1]
    figure.colorbar(colours, ax=axes, label=label, aspect=40)
    save_figure(path, figure, dpi)


def draw_heatmaps(output, network, photos):
    """Draws each photo, its heatmap and the overlay, and the heatmap's raw scores: {file: caption}."""
    shown = {}
    for number, explained in enumerate(photos, start=1):
        file, raw, heatmap = f"CAM_{number}.jpeg", f"heatmap_{number}.jpg", explained.heatmap
        shown[file] = f"{explained.name}: {explained.verdict}\n{worth_of(network, explained)}"
        panels, label = [{}, {"heatmap": heatmap, "cells": True}, {"heatmap": heatmap}], f"in {HEATMAP_LAYER}; 0: none"
        resolution = np.clip(explained.photo.shape[1] / 3.7, 100, 500)  # the photo's own
        label = f"evidence for {explained.target_name} {label}"
        save_panels(output / file, [(explained, panels)], shown[file], label, resolution)
        axes = axes_of_numbers(heatmap, heatmap / (heatmap.max() or 1), "turbo")
        axes.set(title=f"{explained.target_name} in {explained.name}", xlabel="column", ylabel="row")
        save_figure(output / raw, axes.figure)
        shown[raw] = f"The raw scores of heatmap {number}"
    return shown


def draw_layers(output, network, explained):
    """Draws one photo through all blocks, the evidence of each as a share of its own peak: {file: caption}."""
    panels = [{}]
    heatmaps = class_evidence(network, explained.pixels, tuple(BLOCKS), explained.target)
    for name, heatmap in zip(BLOCKS, heatmaps, strict=True):
        strength = f"peak {heatmap.max():.2g}" if heatmap.any() else "no evidence"
        title = f"{name}, {len(heatmap)} × {len(heatmap)} cells, {strength}"
        panels.append({"title": title, "heatmap": heatmap / (heatmap.max() or 1), "peak": 1, "layer": name})
    caption = f"Evidence for {explained.target_name}, block by block, in {explained.name}: {explained.verdict}"
    rows = [(explained, panels[first : first + 4]) for first in (0, 4, 8)]
    save_panels(output / "CAM_layers.jpg", rows, caption, "share of the block's peak; 0: no evidence")
    return {"CAM_layers.jpg": caption}


def compared_evidence(model, photo, layer_name, one_class, other_class):
    """(3, h, w): the evidence for one class, for the other, and one minus other, positive where one has more."""
    one, other = (grad_cam(model, photo, layer_name, k) for k in (one_class, other_class))
    return np.stack([one, other, one - other])


def draw_mistakes(output, network, mistakes):
    """Draws the evidence for the rival, for the true class, and their difference, on one scale: {file: caption}."""
    maps = [compared_evidence(network, it.pixels, HEATMAP_LAYER, it.rival, it.target) for it in mistakes]
    rows, scale = [], {"peak": np.abs(maps).max(), "signed": True}
    for it, triple in zip(mistakes, maps, strict=True):
        titles = f"for {it.rival_name}", f"for {it.target_name}", f"{it.rival_name} minus {it.target_name}"
        panels = [{"title": it.verdict.replace(", ", "\n")}]
        for title, heatmap in zip(titles, triple, strict=True):
            title += "" if heatmap.any() else ": no evidence"
            panels.append({"title": title, "heatmap": heatmap, **scale})
        rows.append((it, panels))
    caption = "What misled the network: evidence for the class that it leans to, for the true class, and the difference"
    save_panels(output / "CAM_mistakes.jpg", rows, caption, f"evidence in {HEATMAP_LAYER}; 0: none")
    return {"CAM_mistakes.jpg": caption}


# ---- 8. The page: the run as a story ---------------------------------------------------------------------------------
# The draw_* functions tell which pictures they made and what these show; a page without scripts or links to elsewhere
# puts them in order.


def draw_strip(output, explained):
    """Draws the run at a glance, cut in part from the sheets that stand in the folder: {file: caption}."""
    sheets = f"activation_{GRID_CONVOLUTIONS[1]}_grid.jpg", f"conv2d_{min(PATTERN_CLIMBS)}_filters.jpg"
    figure = Figure(figsize=(16, 4))
    photo, *corners, overlay = figure.subplots(1, 4, gridspec_kw={"wspace": 0.02})
    for axes, sheet in zip(corners, sheets, strict=True):
        axes.imshow(np.asarray(Image.open(output / sheet))[-400:, :400])
        axes.set_axis_off()
    show(photo, explained)
    show(overlay, explained, heatmap=explained.heatmap)
    for axes in figure.axes:
        axes.set_aspect("auto")
    save_figure(output / "strip.jpg", figure, dpi=100)
    return {"strip.jpg": "A photo, what a layer answers, what filters look for, where the network looks"}


PAGE_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a convolutional network sees</title>
<style>
:root { color-scheme: light dark; } pre { overflow-x: auto; } figcaption { opacity: 0.7; } figure { margin: 1.5rem 0; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.55 system-ui, sans-serif; }
h2 { margin-top: 3rem; border-top: 1px solid #8884; padding-top: 1rem; }
img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
</style>
</head>
<body>
<h1>What a convolutional network sees</h1>
"""


def write_page(path, chapters):
    """Writes a page of chapters (heading, text, preformatted text, {file of a picture: caption})."""
    page = PAGE_HEAD
    for heading, text, numbers, pictures in chapters:
        page += f"<h2>{heading}</h2>\n<p>{html.escape(text)}</p>\n"
        page += f"<pre>{html.escape(numbers)}</pre>\n" if numbers else ""
        for file, caption in pictures.items():
            caption = html.escape(caption)
            image = f'<a href="{file}"><img src="{file}" alt="{caption}" loading="lazy"></a>'
            page += f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
    with replace_when_whole(path) as partial:
        partial.write_text(f"{page}</body>\n</html>\n", "utf-8")


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
        print("Ctrl-C and --resume go on with it; this new run replaces it after its own first epoch.", flush=True)
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(half_precision() if options.mixed_precision else "float32")
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
    if options.skip_training:
        network, record = load_network(options.model), read_json(record_file)
        test = open_splits(options.data, ["test"], network.input_shape[1], options.batch_size, options.seed)["test"]
        if network.output_shape[-1] != test.num_classes:
            counts = f"{network.output_shape[-1]} classes, {options.data / 'test'} {test.num_classes}"
            raise Stop(f"--model {options.model}: has {counts}.\nName another, or train one.")
    else:
        require_writable(options.model.parent)
        names = ["train", "validation", "test"]
        splits = open_splits(options.data, names, options.image_size, options.batch_size, options.seed)
        network, record = train_and_save(options, splits, backup_folder)
        test = splits["test"]
    probabilities, names = network.predict(test, verbose=0), list(test.class_indices)
    losses, right = keras.losses.sparse_categorical_crossentropy(test.classes, probabilities), probabilities.argmax(1)
    figures = {"loss": float(np.mean(losses)), "accuracy": float(np.mean(right == test.classes))}
    confusions = tf.math.confusion_matrix(test.classes, probabilities.argmax(1), len(names)).numpy()
    report = f"Test: loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.4f}\n{class_report(confusions, names)}"
    print(f"\n{report}\n")
    if not options.skip_training:
        write_json(record_file, record | {"test": figures})
        shutil.rmtree(backup_folder)
    draw_all(options, network, test, probabilities, confusions, report, record)


def draw_all(options, network, test, probabilities, confusions, report, record):
    """Draws all pictures, and the page that shows them as a story."""
    matplotlib.style.use(["dark_background", STYLE])
    warnings.filterwarnings("ignore", "Glyph")  # a file's name may hold letters that the font lacks
    output, names = options.output, list(test.class_indices)
    output.mkdir(parents=True, exist_ok=True)
    telling = [
        explain_photo(network, test.filepaths[k], test.filenames[k], names, test.classes[k], probabilities[k])
        for k in telling_photos(probabilities, test.classes)[:4]
    ]
    explained = [explain_photo(network, path, path.name, names) for path in options.photos or []] or telling[:3]
    first, surest = explained[0], np.argsort(-explained[0].probabilities)
    grids = draw_grids(output, network, first)
    patterns = draw_patterns(output, network, options.seed)
    heatmaps = draw_heatmaps(output, network, explained) | draw_layers(output, network, first)
    mistakes = draw_mistakes(output, network, telling[1:])
    figures = {"confusion_matrix.png": "How often each true class (row) is taken for each class (column)"}
    save_confusion_matrix(output / "confusion_matrix.png", confusions, names)
    if record:
        save_training_curves(output / "training_curves.png", record["history"], record["settings"]["phases"])
        figures["training_curves.png"] = "Loss and accuracy after each epoch; the red one is kept, tested and drawn"
    settings = "\n".join(f"{name}: {value}" for name, value in record["settings"].items()) if record else ""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    scores = "\n".join(f"{first.probabilities[k]:.3f} {names[k]}" for k in surest)
    chapters = [
        ("At a glance", f"{first.name}, and what the network takes it for:", scores, draw_strip(output, first)),
        ("What the layers answer", "Each cell is the answer of one filter to the photo, ever coarser.", "", grids),
        ("What the filters look for", "Each cell began blank and changed until its filter fired.", "", patterns),
        ("Where the network looks", "Grad-CAM marks what speaks for a class.", "", heatmaps),
        ("What misled it", "Evidence for the class that it leans to, and for the true one.", "", mistakes),
        ("How well it does", "The test photos took no part in training.", report, figures),
        ("The run", "Its command and settings.", f"{command}\n\n{settings}", {}),
    ]
    write_page(output / "index.html", chapters)
    print(f"\nAll pictures on one page: {output / 'index.html'}")


if __name__ == "__main__":
    run(main)

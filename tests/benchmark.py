"""Measure this project beside its peers, on this machine: each comparison takes turns.

    python tests/benchmark.py [--only NAME ...] [--model FILE] [--weights FILE] [--data DIR]
                              [--rounds 5] [--quick]

Peers: split-folders, the stock ImageDataGenerator, the tutorial's recipe and pictures and those of
the Keras book (ported to Keras 3), and tf-keras-vis. One that is not installed is named and left
out. All runs of a comparison take turns (A B A B …), so that whatever else slows the machine down
meets both; "2.0 × (1.9–2.2)" is the median of the rounds' own ratios and their range, and more than
1 speaks for us. It ends with a Markdown table.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cached_property, partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model_training_and_visualization as study  # noqa: I001 (first, as it silences TensorFlow's start-up)
import keras
import tensorflow as tf
from draw_flowers import CLASS_NAMES, draw_flower
from keras import layers

from create_train_val_test import class_folders, cores, likely_pairs, outlines

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SPLIT = ROOT / "create_train_val_test.py"

# How much is measured; --quick only shows that everything runs.
FULL = {
    "rounds": 5,
    "size": 299,  # pixels, the side of the model's input
    "drawn_per_class": 100,
    "split_per_class": 780,
    "searched": (4_000, 100_000),
    "altered": 320,  # photos, of each of which every kind of copy is made
    "augmented": 200,  # photos in a round
    "batch_size": 16,
    "steps": 8,  # of training in a round
    "recipe_epochs": 8,
    "recipe_size": 75,
    "fine_tuning_epochs": 10,
    "fine_tuning_size": 139,
    "sheet_filters": 64,
    "peer_filters": 13,  # that a slow peer draws in a round: in all rounds together the sheet
    "keras_vis_filters": 1,  # the same for the slowest
    "tutorial_steps": 80,
    "book_steps": 30,
    "keras_vis_steps": 200,
    "trust_photos": 150,  # at most
    "masked_per_class": 20,
    "page_photos": (170, 4000),
}
QUICK = FULL | {
    "rounds": 1,
    "size": 107,
    "drawn_per_class": 16,
    "split_per_class": 16,
    "searched": (500, 1_000),
    "altered": 6,
    "augmented": 4,
    "batch_size": 4,
    "steps": 2,
    "recipe_epochs": 1,
    "fine_tuning_epochs": 2,
    "fine_tuning_size": 75,
    "sheet_filters": 4,
    "peer_filters": 1,
    "keras_vis_filters": 1,
    "tutorial_steps": 3,
    "book_steps": 3,
    "keras_vis_steps": 3,
    "trust_photos": 6,
    "masked_per_class": 1,
    "page_photos": (10, 20),
}


# ---- Measuring -----------------------------------------------------------------------------------


def seconds(function, *arguments, **named):
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments, **named)
    return time.perf_counter() - start


def in_turn(rounds, *runs):
    """What the runs return, called one after the other in every round: an array (runs, rounds)."""
    return np.array([[run() for run in runs] for _ in range(rounds)]).T


def spread(values, unit=" ×"):
    """Median and range, in three digits."""
    middle, low, high = (
        f"{value:#.3g}".rstrip(".") for value in (np.median(values), min(values), max(values))
    )
    return f"{middle}{unit} ({low}–{high})" if len(values) > 1 else f"{middle}{unit} (once)"


def call(*command):
    """Runs a command in silence; what it said is shown only if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}"
        )
    return done.stdout


class Bench:
    """The settings, what is measured on (data, models), and the rows of the table."""

    def __init__(self, scratch, settings, options):
        self.scratch, self.rows = scratch, []
        self.model_file, self.weights = options.model, options.weights
        self.given_data = options.data
        self.__dict__.update(settings)

    def row(self, what, ours, peer="", ratio=""):
        self.rows.append(f"| {what} | {ours} | {peer} | {ratio} |")
        print(self.rows[-1], flush=True)

    def times(self, what, own, peer, peer_name, show):
        """A row of what the rounds took, own and peer in seconds, shown as show(seconds)."""
        self.row(
            what, show(np.median(own)), f"{show(np.median(peer))}: {peer_name}", spread(peer / own)
        )

    def without_keras_vis(self, what):
        """True, and a row that says so, where tf-keras-vis is not installed."""
        missing = importlib.util.find_spec("tf_keras_vis") is None
        if missing:
            self.row(what, "not measured", "tf-keras-vis is not installed")
        return missing

    @property
    def data(self):
        """The folder with train, validation and test: the given one, or drawn flowers."""
        return self.given_data or self.drawn_data

    @cached_property
    def drawn_data(self):
        # Of a seed of their own: a model trained on the usual drawn flowers has not seen these.
        options = "--per-class", self.drawn_per_class, "--size", 160, "--seed", 1000
        photos = self.scratch / "flowers"
        call(sys.executable, ROOT / "tests/draw_flowers.py", photos, *options)
        call(sys.executable, ROOT / "create_train_val_test.py", photos, "--output", self.scratch)
        return self.scratch

    @cached_property
    def class_count(self):
        return len(class_folders(self.data / "train"))

    def test_photos(self, count, size):
        """(count, size, size, 3) uint8, spread over the classes."""
        files = sorted(self.data.glob("test/*/*"))
        chosen = np.linspace(0, len(files) - 1, count).round().astype(int)
        read = study.photo_reader((size, size))
        return np.stack([read(files[k]) for k in chosen])

    def model(self, size=None):
        """The given model at its own size or another (no weight depends on it), else untrained."""
        saved = keras.saving.load_model(self.model_file, compile=False) if self.model_file else None
        keras.utils.set_random_seed(0)
        own_size = saved.input_shape[1] if saved else self.size
        class_count = saved.output_shape[-1] if saved else self.class_count
        model = study.build_model(class_count, size or own_size, self.weights)
        if saved:
            model.set_weights(saved.get_weights())
        return model


# ---- The split -----------------------------------------------------------------------------------


def write_tiled_flowers(folder, per_class, size=(320, 240)):
    """Writes 5 × per_class JPEGs of about 48 kB, nearly all different: crops of tiled drawn
    flowers, with grain."""
    rng = np.random.default_rng(0)
    for class_name in CLASS_NAMES:
        (folder / class_name).mkdir(parents=True)
        tiles = [draw_flower(class_name, rng, 160)[0] for _ in range(12)]
        for k in range(per_class):
            sheet = np.vstack([np.hstack([tiles[t] for t in rng.choice(12, 4)]) for _ in range(3)])
            top, left = (rng.integers(0, sheet.shape[axis] - size[1 - axis]) for axis in (0, 1))
            photo = sheet[top : top + size[1], left : left + size[0]].astype("int16")
            photo += rng.integers(-12, 13, photo.shape, dtype="int16")
            photo = Image.fromarray(np.clip(photo, 0, 255).astype("uint8"))
            photo.save(folder / class_name / f"{k:04d}.jpg", quality=96)


# A process of its own, as the split is one: in this one TensorFlow has changed how memory is kept.
DECODE_ALL = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from create_train_val_test import map_photos, read_photo
for _ in map_photos(Path(sys.argv[1]).glob("*/*"), lambda path: read_photo(path).shape, ""):
    pass
"""


def compare_split(bench):
    """The whole command, start to end, against split-folders' command and against decoding alone.

    On the photos of the given data's train folder, or on drawn ones.
    """
    photos = bench.scratch / "tiled"
    if bench.given_data:
        photos = bench.given_data / "train"
    else:
        write_tiled_flowers(photos, bench.split_per_class)
    count = sum(1 for _ in photos.glob("*/*"))
    fresh = iter(
        range(10**6)
    )  # new folders each time: a file system is slow where many files were just deleted
    ours = [sys.executable, ROOT / "create_train_val_test.py", photos, "--output"]
    runs = {
        "ours": lambda: seconds(call, *ours, bench.scratch / f"split{next(fresh)}"),
        "a script that decodes every photo in full on all cores, nothing else": lambda: seconds(
            call, sys.executable, "-c", DECODE_ALL, photos
        ),
    }
    command = shutil.which("splitfolders", path=str(Path(sys.executable).parent)) or shutil.which(
        "splitfolders"
    )
    if command:
        theirs = [command, photos, "--ratio", 0.68, 0.15, 0.17, "--output"]
        runs["split-folders, which copies only"] = lambda: seconds(
            call, *theirs, bench.scratch / f"split{next(fresh)}"
        )
    else:
        bench.row("split", "not measured", "split-folders is not installed")
    in_turn(1, *runs.values())  # warms the file cache up
    own, *peers = in_turn(bench.rounds, *runs.values())
    for name, times in zip(list(runs)[1:], peers, strict=True):
        bench.times(f"Split of {count:,} photos", own, times, name, "{:.2f} s".format)


def moved(image, share):
    """The image without a strip of that share of each side, as if the camera had moved."""
    width, height = image.size
    return image.crop((round(width * share), round(height * share), width, height))


def cropped(image, share):
    """The image without that share of each side all around."""
    left, top = (round(side * share) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def slanted(image, degrees):
    """The image turned by a few degrees, without the corners where nothing comes from."""
    lost = np.sin(np.radians(degrees)) / 2 * max(image.size) / min(image.size)
    return cropped(image.rotate(degrees, Image.Resampling.BICUBIC), lost)


def resized(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)))


def tinted(image):
    return Image.blend(image, Image.new("RGB", image.size, (200, 80, 20)), 0.3)


def watermarked(image):
    image, text = image.copy(), "(c) photo.com"
    size = image.width // 12
    place = (image.width * 0.55, image.height * 0.85)
    ImageDraw.Draw(image).text(place, text, fill="white", font_size=size)
    return image


ALTERATIONS = {
    "quality 40": lambda image: image,
    "half the size": partial(resized, factor=0.5),
    "a third of the size": partial(resized, factor=1 / 3),
    "twice the size": partial(resized, factor=2),
    "tinted": tinted,
    "grey": lambda image: image.convert("L"),
    "brighter by 15 %": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "more contrast, 30 %": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    **{f"shifted by {k} %": partial(moved, share=k / 100) for k in (1, 2, 3, 5)},
    **{f"cropped by {k} % a side": partial(cropped, share=k / 100) for k in (2, 4)},
    **{f"turned by {k}°": partial(slanted, degrees=k) for k in (1, 2, 3)},
    "mirrored": ImageOps.mirror,
    "turned by 90°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180°": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned by 270°": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "mirrored, shifted by 2 %": lambda image: moved(ImageOps.mirror(image), 0.02),
    "with a watermark": watermarked,
    "in a white frame of 4 %": lambda image: ImageOps.expand(image, image.width // 25, "white"),
}


def measure_copies(bench):
    """The search for likely pairs among soft blobs; and the altered copies of photos that the whole
    command finds, as the share of all."""
    rng = np.random.default_rng(0)

    def search(count):
        coarse = rng.integers(0, 256, (count, 6, 7), dtype=np.uint8)
        blobs = [cv2.resize(blob, (32, 32), interpolation=cv2.INTER_CUBIC) for blob in coarse]
        thumbnails = np.stack(blobs)
        return seconds(lambda: likely_pairs(outlines(thumbnails)))

    few, many = in_turn(bench.rounds, *(partial(search, count) for count in bench.searched))
    fewer, more = bench.searched
    growth = spread(many / few, unit=f" × the time for {more / fewer:.0f} × the photos")
    what = f"First look for copies among {more:,} photos ({fewer:,})"
    bench.row(what, f"{np.median(many):.2f} s ({np.median(few):.3f} s)", "none", growth)

    photos = sorted(path for path in bench.data.glob("*/*/*") if path.is_file())
    photos = [photos[k] for k in np.linspace(0, len(photos) - 1, bench.altered).astype(int)]
    for kind, alter in ALTERATIONS.items():
        source = bench.scratch / f"copies {kind}"
        found = altered_copies_found(photos, alter, source)
        bench.row(f"Copies found: {kind}", f"{found:.1%}")
        shutil.rmtree(source)


def altered_copies_found(photos, alter, folder):
    """The share of the photos whose altered copy the split takes for one."""
    for name in ("photos", "others"):
        (folder / "source" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(10):  # as there must be two classes
        drawn = Image.fromarray(draw_flower(CLASS_NAMES[k % len(CLASS_NAMES)], rng, 160)[0])
        drawn.save(folder / "source/others" / f"{k}.png")
    for k, path in enumerate(photos):
        image = Image.open(path).convert("RGB")
        image.save(folder / "source/photos" / f"{k}.jpg", quality=95)
        altered = folder / "source/photos" / f"{k} again.jpg"
        alter(image).save(altered, quality=40 if alter is ALTERATIONS["quality 40"] else 60)
    call(sys.executable, SPLIT, folder / "source", "--output", folder)
    with (folder / "split.csv").open(encoding="utf-8", newline="") as file:
        groups = {row["source"]: row["group"] for row in csv.DictReader(file)}
    pairs = [
        (groups[f"photos/{k}.jpg"], groups[f"photos/{k} again.jpg"]) for k in range(len(photos))
    ]
    return np.mean([one == other != "" for one, other in pairs])


# ---- Training ------------------------------------------------------------------------------------


def compare_augmentation(bench):
    """One thread: the same photos under the same random parameters, by OpenCV's warp and by
    SciPy's."""
    photos = bench.test_photos(5, bench.size).astype("float32")
    own = study.PhotoGenerator(**study.AUGMENTATION)
    stock = tf.keras.preprocessing.image.ImageDataGenerator(**study.AUGMENTATION)

    def augment(generator):
        return [
            generator.random_transform(photos[k % len(photos)], seed=k)
            for k in range(bench.augmented)
        ]

    difference = np.mean(
        [np.abs(a - b).mean() for a, b in zip(augment(own), augment(stock), strict=True)]
    )
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    ours, theirs = in_turn(
        bench.rounds, lambda: seconds(augment, own), lambda: seconds(augment, stock)
    )
    cv2.setNumThreads(threads)
    what = f"Augmentation at {bench.size} px; mean difference {difference:.1g} of 255"
    bench.times(
        what,
        ours,
        theirs,
        "stock ImageDataGenerator",
        lambda t: f"{bench.augmented / t:.0f} photos/s a core",
    )


def training_run(batch, class_count, steps):
    """A function that trains a new model for some steps on one batch, already traced; the model."""
    photos, labels = batch
    model = study.build_model(class_count, photos.shape[1], "none")
    model.compile(keras.optimizers.Adam(), "categorical_crossentropy", metrics=["accuracy"])
    in_memory = tf.data.Dataset.from_tensors((photos, labels)).repeat()
    run = partial(model.fit, in_memory, steps_per_epoch=steps, shuffle=False, verbose=0)
    run()
    return run, model


def compare_pipeline(bench):
    """Training on the folders, as the script does it, against training on one batch that is never
    read again."""
    generator = study.PhotoGenerator(**study.AUGMENTATION)
    size = (bench.size, bench.size)
    folder = bench.data / "train"
    photos, _ = study.open_split(folder, size, bench.batch_size, generator=generator)
    steps = min(bench.steps, len(photos.paths) // photos.batch_size)
    from_memory, model = training_run(photos[0], photos.class_count, steps)
    from_folders = partial(model.fit, photos, steps_per_epoch=steps, shuffle=False, verbose=0)
    from_folders()
    ours, theirs = in_turn(
        bench.rounds, partial(seconds, from_folders), partial(seconds, from_memory)
    )
    what = f"Training on the folders at {bench.size} px, batches of {photos.batch_size}"
    trained = steps * photos.batch_size
    bench.times(what, ours, theirs, "one batch in memory", lambda t: f"{trained / t:.2f} photos/s")


def multiply_adds(model):
    """Multiplications of one forward pass for one photo, in convolutions and dense layers."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D | layers.Dense):
            total += np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:-1])
    return float(total)


def compare_precision(bench):
    """Half against full precision, and what the full one reaches of the machine's rate of matrix
    products."""
    photos = bench.test_photos(bench.batch_size, bench.size).astype("float32")
    batch = (
        photos,
        np.eye(bench.class_count, dtype="float32")[np.arange(len(photos)) % bench.class_count],
    )
    matrix = tf.random.normal((4096, 4096))
    product = tf.function(lambda: tf.reduce_sum(matrix @ matrix))
    product()
    policy = study.half_precision()
    runs, models = {}, {}
    for name in dict.fromkeys(("float32", policy)):
        keras.config.set_dtype_policy(name)
        runs[name], models[name] = training_run(batch, bench.class_count, bench.steps)
    keras.config.set_dtype_policy("float32")

    def product_rate():
        return 2 * len(matrix) ** 3 / min(seconds(lambda: product().numpy()) for _ in range(3))

    products, full, *half = in_turn(
        bench.rounds, product_rate, *(partial(seconds, run) for run in runs.values())
    )
    trained = bench.steps * len(photos)
    if half:
        what = f"Training in {policy} at {bench.size} px"
        bench.times(what, half[0], full, "float32", lambda t: f"{trained / t:.2f} photos/s")
    else:
        bench.row(
            "Training in half precision", "not measured", "neither GPU nor CPU computes in it"
        )
    # Two operations a multiplication and addition; the backward pass takes twice the forward pass.
    reached = 2 * 3 * multiply_adds(models["float32"]) * trained / full
    gigaflops = [f"{np.median(rate) / 1e9:.0f} GFLOP/s" for rate in (reached, products)]
    what = f"Arithmetic of the float32 training step at {bench.size} px"
    bench.row(
        what,
        gigaflops[0],
        f"{gigaflops[1]}: the machine's matrix product",
        spread(reached / products),
    )


def our_recipe(bench, splits, seed, run, freeze_below="none"):
    """The model of the epoch that is kept, and what fine-tuning's first epoch adds to the
    validation loss."""
    keras.utils.set_random_seed(seed)
    model = study.build_model(bench.class_count, run["size"], run["weights"])
    checkpoints = study.Checkpoints(bench.scratch / "recipe", {})
    phases = study.training_phases(run["epochs"], run["weights"], freeze_below)
    study.train(model, splits, phases, checkpoints)
    model.load_weights(checkpoints.file_of(checkpoints.best_epoch))
    losses, start = checkpoints.history["val_loss"], phases[-1].start_epoch
    return model, losses[start] - losses[start - 1] if start else 0.0


def tutorial_recipe(bench, splits, seed, run):
    """The model of the last epoch: all layers at once on pixels in [0, 1], Adam and
    BatchNormalization by default."""
    keras.utils.set_random_seed(seed)
    model = study.build_model(bench.class_count, run["size"], run["weights"])
    model.get_layer("scaled").scale, model.get_layer("scaled").offset = 1 / 255, 0
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = layers.BatchNormalization().momentum
    model.compile(keras.optimizers.Adam(), "categorical_crossentropy", metrics=["accuracy"])
    options = {"epochs": run["epochs"], "shuffle": False, "verbose": 0}
    model.fit(splits["train"], validation_data=splits["validation"], **options)
    return model, 0.0


def compare_recipes(bench, what, data, run, recipes, once=()):
    """Same photos, augmentation, size, batch and epochs; other recipe: rows of the test photos.

    run: size, epochs and weights. recipes: {name: function}, ours first; each trains once a seed,
    those named in `once` only with the first.
    """
    figures = {name: [] for name in recipes}
    for seed in range(bench.rounds):
        for name, recipe in recipes.items():
            if seed and name in once:
                continue
            sizes = {"size": (run["size"],) * 2, "batch_size": 32}
            with contextlib.redirect_stdout(io.StringIO()):
                splits, _ = study.open_all_splits(data, **sizes, seed=seed)
                start = time.perf_counter()
                model, switch = recipe(bench, splits, seed, run)
                taken = time.perf_counter() - start
            model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
            loss, accuracy = model.evaluate(splits["test"], verbose=0)
            figures[name].append((loss, accuracy, switch, taken))
            told = f"loss {loss:.3f}, accuracy {accuracy:.3f}, switch {switch:+.2f}, {taken:.0f} s"
            print(f"seed {seed}, {name}: {told}", flush=True)
    counts = " + ".join(str(len(splits[name].paths)) for name in ("train", "validation", "test"))
    what = f"{what}, {run['epochs']} epochs at {run['size']} px, {counts} photos"
    (ours, own), *peers = ((name, np.array(rows).T) for name, rows in figures.items())
    for name, peer in peers:
        same = own[:, : peer.shape[1]]  # the same seeds
        losses, accuracies = spread(peer[0] / same[0]), spread(same[1] / peer[1])
        bench.row(f"Test loss {what}", tell(own[0]), f"{tell(peer[0])}: {name}", losses)
        bench.row(f"Test accuracy {what}", tell(own[1]), f"{tell(peer[1])}: {name}", accuracies)
        bench.times(f"Time {what}", same[3], peer[3], name, "{:.0f} s".format)
    if own[2].any():
        rises = f"Validation loss of fine-tuning's first epoch, minus the head's last, {what}"
        bench.row(rises, f"{tell(own[2])}: {ours}", "none", "")


def tell(values):
    """Mean and range of what the seeds gave."""
    return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f}, {len(values)} seeds)"


def compare_recipe(bench):
    """From scratch, on drawn flowers and on the given photos."""
    run = {"size": bench.recipe_size, "epochs": bench.recipe_epochs, "weights": "none"}
    recipes = {"ours": our_recipe, "the tutorial's recipe": tutorial_recipe}
    for kind, data in {"drawn": bench.drawn_data, "given": bench.given_data}.items():
        if data:
            compare_recipes(bench, f"from scratch ({kind})", data, run, recipes)


FROZEN = ("mixed7", "none")  # beside the default


def compare_fine_tuning(bench):
    """From pretrained weights: the default, other blocks to fine-tune from, and the tutorial."""
    if bench.weights == "none":
        bench.row("Fine-tuning", "not measured", "needs pretrained weights: --weights FILE")
        return
    run = {"size": bench.fine_tuning_size, "weights": bench.weights}
    run["epochs"] = bench.fine_tuning_epochs
    recipes = {"--freeze-below mixed2": partial(our_recipe, freeze_below="mixed2")}
    recipes["the tutorial's recipe"] = tutorial_recipe
    others = {f"--freeze-below {it}": partial(our_recipe, freeze_below=it) for it in FROZEN}
    compare_recipes(bench, "of fine-tuning", bench.data, run, recipes | others, once=others)


def measure_first_run(bench):
    """The README's first command with other seeds: its result, its time, its heatmaps' worth.

    It starts from --weights, which is from scratch where no file is given.
    """
    (command,) = re.findall(r"^python (model_training.*)$", README.read_text("utf-8"), re.M)[:1]
    drawn, figures = bench.scratch / "first", []
    call(sys.executable, ROOT / "tests/draw_flowers.py", drawn / "flowers", "--per-class", 200)
    call(sys.executable, ROOT / "create_train_val_test.py", drawn / "flowers", "--output", drawn)
    for seed in range(bench.rounds):
        script, *options = command.split()
        file = drawn / f"{seed}.keras"
        options += ["--seed", seed, "--data", drawn, "--output", drawn / "Images", "--model", file]
        options += ["--weights", bench.weights]
        start = time.perf_counter()
        printed = call(sys.executable, ROOT / script, *options)
        taken = time.perf_counter() - start
        loss, accuracy = re.search(r"Test: loss ([\d.]+)  accuracy ([\d.]+)", printed).groups()
        bench.model_file, bench.given_data = file, drawn
        network, photos, labels = network_and_test(bench)
        (fall, _, blob, _), _, _ = mean_falls(network, photos, labels)
        placed, _, area = energy_on_flower(network, bench.masked_per_class)
        energy = placed.mean() / area.mean()
        figures.append((float(accuracy), float(loss), taken, fall, blob, energy))
        print(f"seed {seed}: {figures[-1]}", flush=True)
    accuracy, loss, taken, fall, blob, energy = np.array(figures).T
    what = "of the README's first command"
    bench.row(f"Test accuracy {what}", tell(accuracy), "none", "")
    bench.row(f"Test loss {what}", tell(loss), "none", "")
    bench.row(f"Time {what}, drawing included", f"{np.median(taken):.0f} s", "none", "")
    bench.row(f"Fall without the hottest fifth {what}", tell(fall), f"{tell(blob)}: blob", "")
    bench.row(f"Heatmap energy over the flower's share {what}", tell(energy), "none", "")


# ---- Filter patterns -----------------------------------------------------------------------------


def tutorial_pattern(cut, filter_index, steps, size=299):
    """Keras blog and tutorial: pixels from grey noise, gradient divided by its root mean square,
    step 1."""

    @tf.function
    def normalised_gradient(image):
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = tf.reduce_mean(cut(image, training=False)[..., filter_index])
        gradient = tape.gradient(loss, image)
        return gradient / (tf.sqrt(tf.reduce_mean(tf.square(gradient))) + 1e-5)

    image = (np.random.default_rng(filter_index).random((1, size, size, 3)) * 20 + 128).astype(
        "float32"
    )
    for _ in range(steps):
        image = image + normalised_gradient(image).numpy()
    picture = (image[0] - image.mean()) / (image.std() + 1e-5) * 0.1 + 0.5
    return (np.clip(picture, 0, 1) * 255).astype("uint8")


def book_pattern(cut, filter_index, steps, size=200, learning_rate=10.0):
    """Chollet, Deep Learning with Python: pixels from uniform noise, unit gradient, the outputs'
    border left out."""
    # The book's model takes the noise's own range [0.4, 0.6]; this one takes 0–255, so noise and
    # rate are scaled up.
    image = tf.constant(
        np.random.default_rng(filter_index).uniform(0.4, 0.6, (1, size, size, 3)) * 255, "float32"
    )

    @tf.function
    def ascend(image):
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = tf.reduce_mean(cut(image, training=False)[:, 2:-2, 2:-2, filter_index])
        return image + 255 * learning_rate * tf.math.l2_normalize(tape.gradient(loss, image))

    for _ in range(steps):
        image = ascend(image)
    picture = image[0].numpy()
    picture = (picture - picture.mean()) / (picture.std() + 1e-5) * 64 + 128
    return np.clip(picture, 0, 255).astype("uint8")[25:-25, 25:-25]


def keras_vis_patterns(model, layer_name, filters, steps):
    """tf-keras-vis's ActivationMaximization with its defaults, at the model's own input size.

    In batches of 16, which spares it time. Returns [(size, size, 3) uint8].
    """
    from tf_keras_vis.activation_maximization import ActivationMaximization
    from tf_keras_vis.utils.scores import CategoricalScore

    keras.utils.set_random_seed(0)
    cut = keras.Model(model.input, model.get_layer(layer_name).output)
    maximize, pictures = ActivationMaximization(cut, clone=False), []
    for start in range(0, len(filters), 16):
        some = list(filters[start : start + 16])
        noise = np.random.uniform(0, 255, (len(some), *model.input_shape[1:]))
        done = maximize(CategoricalScore(some), seed_input=noise.astype("float32"), steps=steps)
        pictures += list(np.asarray(done).astype("uint8"))
    return pictures


def at_equal_contrast(picture, size, blur):
    """A (h, w, 3) uint8 picture at 40 grey levels about its mean colour, as (size, size, 3) float.

    It is repeated or cut to the size. A blur of 1 pixel leaves what the eye sees of it. Activations
    rise with contrast, so that pictures of different contrast cannot be compared.
    """
    picture = picture.astype("float32")
    mean = picture.mean((0, 1))
    pattern = (picture - mean) / max(np.std(picture - mean), 1e-6)
    picture = np.clip(mean + 40 * pattern, 0, 255)
    repeats = -(-size // min(picture.shape[:2]))
    picture = np.tile(picture, (repeats, repeats, 1))[:size, :size]
    return cv2.GaussianBlur(picture, (0, 0), blur) if blur else picture


def judge(extractor, pictures, size):
    """{judgement: {filter: mean activation of the filter on its own picture}}."""
    kinds = {
        "blurred": lambda picture: at_equal_contrast(picture, size, blur=1),
        "sharp": lambda picture: at_equal_contrast(picture, size, blur=None),
        "saved": lambda picture: picture.astype("float32"),
    }
    judgements = {}
    for kind, prepare in kinds.items():
        activations = ((k, extractor(prepare(it)[None])) for k, it in pictures.items())
        judgements[kind] = {k: float(tf.reduce_mean(it[..., k])) for k, it in activations}
    return judgements


def clipped_share(pictures):
    """The share of sub-pixels below 8 or above 247 in a list of pictures."""
    values = np.concatenate([picture.ravel() for picture in pictures])
    return np.mean((values < 8) | (values > 247))


def any_size_extractor(model, layer_name):
    """A function of images of any size that returns the output of a layer."""
    network = study.Network(model)
    return lambda images, training=False: network.compute(images, [layer_name])[0]


def pattern_peers(bench, model, layer_name):
    """{name: (function of filters that draws their patterns, how many it draws in a round)}."""
    extractor = any_size_extractor(model, layer_name)

    def tutorial(filters):
        return [tutorial_pattern(extractor, k, bench.tutorial_steps) for k in filters]

    def book(filters):
        return [book_pattern(extractor, k, bench.book_steps) for k in filters]

    many = bench.peer_filters
    peers = {"the tutorial's": (tutorial, many), "the Keras book's": (book, many)}
    if not bench.without_keras_vis(f"Patterns of {layer_name}"):
        draw = partial(keras_vis_patterns, model, layer_name, steps=bench.keras_vis_steps)
        peers["tf-keras-vis's"] = draw, bench.keras_vis_filters
    return peers


def compare_sheet(bench, model, convolution):
    """A sheet's time, and the filters' activations on their pictures, beside each peer's."""
    peers = pattern_peers(bench, model, convolution.layer)
    filters = range(min(bench.sheet_filters, convolution.channels))
    own_times, times, drawn = [], {name: [] for name in peers}, {name: {} for name in peers}
    order = np.random.default_rng(0).permutation(filters)  # so that a few stand for the sheet
    for chosen in np.resize(order, (bench.rounds, bench.peer_filters)).tolist():
        start = time.perf_counter()
        pictures, _ = study.filter_patterns(model, convolution.layer, filters)
        own_times.append(time.perf_counter() - start)
        for name, (draw, count) in peers.items():
            start = time.perf_counter()
            few = dict(zip(chosen, draw(chosen[:count]), strict=False))
            times[name].append((time.perf_counter() - start) / len(few) * len(filters))
            drawn[name] |= few
    extractor = any_size_extractor(model, convolution.layer)
    ours = judge(extractor, dict(zip(filters, pictures, strict=True)), bench.size)
    clipped = f"{clipped_share(pictures):.1%} clipped"
    for name in peers:
        theirs = judge(extractor, drawn[name], bench.size)
        own_share = f"{np.median(own_times):.1f} s; {clipped}"
        share = (
            f"{np.median(times[name]):.0f} s, scaled up; {clipped_share(drawn[name].values()):.1%}"
        )
        what = f"Sheet of {len(filters)} patterns, convolution {convolution.number}"
        faster = spread(np.array(times[name]) / own_times)
        bench.row(what, own_share, f"{share} clipped: {name}", faster)
        for kind in ours:
            compare_judgement(bench, convolution, name, kind, ours[kind], theirs[kind])


def compare_judgement(bench, convolution, name, kind, ours, theirs):
    """A row of the median activations of one judgement, and on how many filters ours is higher."""
    texts = {
        "blurred": "at equal contrast after a blur of 1 px",
        "sharp": "at equal contrast",
        "saved": "as saved",
    }
    pairs = np.array([(ours[k], theirs[k]) for k in theirs])
    own, peer = np.median(pairs, axis=0)
    ratio = f"{own / peer:.2f} ×, " if peer > 0 else ""
    bench.row(
        f"Mean activation {texts[kind]}, convolution {convolution.number}, {len(pairs)} filters",
        f"{own:.2f}",
        f"{peer:.2f}: {name}",
        f"{ratio}higher on {(pairs[:, 0] > pairs[:, 1]).sum()} of {len(pairs)}",
    )


def compare_patterns(bench):
    """Each of our sheets against three other ways to draw it."""
    model = bench.model()
    for convolution in study.Network(model).nearest_convolutions(study.PATTERN_CONVOLUTIONS):
        compare_sheet(bench, model, convolution)


# ---- The whole drawing job -----------------------------------------------------------------------


def tutorial_grids(model, pixels, folder):
    """The tutorial's and the book's grids: a prediction a layer, channels standardised one by one,
    shown by imshow."""
    for convolution in study.Network(model).nearest_convolutions(study.GRID_CONVOLUTIONS):
        for name in (convolution.layer, convolution.activation):
            output = model.get_layer(name).output
            activation = keras.Model(model.input, output).predict(pixels[None])[0]
            size, rows = activation.shape[0], activation.shape[-1] // 16
            grid = np.zeros((rows * size, 16 * size))
            for row, column in np.ndindex(rows, 16):
                channel = activation[..., row * 16 + column]
                channel = (channel - channel.mean()) / (channel.std() + 1e-5) * 64 + 128
                place = (
                    slice(row * size, (row + 1) * size),
                    slice(column * size, (column + 1) * size),
                )
                grid[place] = np.clip(channel, 0, 255)
            figure = Figure(figsize=(16, rows))
            figure.subplots().imshow(grid, aspect="auto", cmap="viridis")
            figure.savefig(folder / f"{name}.png")


def tutorial_heatmap(model, pixels, file):
    """The tutorial's heatmap: Grad-CAM of the predicted probability, stretched over the photo."""
    features = model.get_layer(study.Network(model).heatmap_layer).output
    gradient_model = keras.Model(model.input, [features, model.output])
    with tf.GradientTape() as tape:
        maps, probabilities = gradient_model(pixels[None].astype("float32"))
        score = tf.reduce_max(probabilities[0])
    weights = tf.reduce_mean(tape.gradient(score, maps), (0, 1, 2))
    heatmap = np.maximum(0, tf.reduce_mean(maps[0] * weights, -1))
    heatmap = cv2.resize(heatmap / (heatmap.max() or 1), pixels.shape[1::-1])
    coloured = cv2.applyColorMap((255 * heatmap).astype("uint8"), cv2.COLORMAP_JET)
    cv2.imwrite(str(file), np.clip(0.4 * coloured + pixels[..., ::-1], 0, 255).astype("uint8"))


def tutorial_pictures(bench, model, photos):
    """Seconds for the tutorial's 6 grids, 3 sheets of 64 patterns (one of each drawn and scaled
    up), 3 heatmaps."""
    total = seconds(tutorial_grids, model, photos[0], bench.scratch)
    for convolution in study.Network(model).nearest_convolutions(study.PATTERN_CONVOLUTIONS):
        extractor = keras.Model(model.input, model.get_layer(convolution.layer).output)
        options = {"steps": bench.tutorial_steps, "size": model.input_shape[1]}
        one = seconds(tutorial_pattern, extractor, convolution.channels // 2, **options)
        total += min(64, convolution.channels) * one
    file = bench.scratch / "heatmap.jpg"
    return total + sum(seconds(tutorial_heatmap, model, photo, file) for photo in photos)


def peak_memory(command):
    """Runs a command, in silence: the GiB that it needed at its peak, or None where the system does
    not tell."""
    if importlib.util.find_spec("resource") is None:
        call(*command)
        return None
    # From a small process of its own, as a child's count begins with the memory of the process that
    # started it.
    code = (
        "import resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    return int(call(sys.executable, "-c", code, *command)) / (
        2**30 if sys.platform == "darwin" else 2**20
    )


def compare_drawing(bench):
    """From the command to the last picture, start-up included on both sides."""
    file, photos = bench.scratch / "drawing.keras", bench.test_photos(3, bench.size)
    model = bench.model(bench.size)
    model.save(file)
    study_command = [
        sys.executable,
        ROOT / "model_training_and_visualization.py",
        "--skip-training",
        "--model",
        file,
    ]
    study_command += ["--data", bench.data, "--output", bench.scratch / "Images"]
    load = f"; import keras; keras.saving.load_model({str(file)!r}, compile=False)"
    ours_starts = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import model_training_and_visualization"
        + load
    )
    memory, pictures = [], []

    def draw_all():
        start = time.time()
        memory.append(peak_memory(study_command))
        end = time.time()
        # The last one; what the page shows of single photos comes after it.
        pictures.append((bench.scratch / "Images" / "strip.jpg").stat().st_mtime - start)
        return end - start

    whole, start, peer, peer_start = in_turn(
        bench.rounds,
        draw_all,
        lambda: seconds(call, sys.executable, "-c", ours_starts),
        lambda: tutorial_pictures(bench, model, photos),
        lambda: seconds(call, sys.executable, "-c", "import matplotlib.pyplot, cv2" + load),
    )
    peer = peer + peer_start
    what = f"All pictures at {bench.size} px, start-up included"
    needed = f", {max(memory):.1f} GiB at most" if None not in memory else ""
    own = (
        f"{np.median(whole):.0f} s{needed}; {np.median(start):.1f} s of them start-up, "
        f"{np.median(pictures):.0f} s to the last picture, before the page"
    )
    scaled = "its patterns scaled up from one a sheet"
    start_up = f"{np.median(peer_start):.1f} s start-up"
    theirs = f"{np.median(peer):.0f} s, {scaled}; {start_up}: the tutorial's code"
    bench.row(what, own, theirs, spread(peer / whole))
    bench.row(f"{what}, without the page", "", "", spread(peer / np.array(pictures)))


# ---- Heatmaps ------------------------------------------------------------------------------------


def compare_gradcam(bench):
    """The same layer, class and photo, both for the logit, before any scaling and enlarging."""
    if bench.without_keras_vis("Grad-CAM"):
        return
    from tf_keras_vis.gradcam import Gradcam
    from tf_keras_vis.utils.model_modifiers import ReplaceToLinear
    from tf_keras_vis.utils.scores import CategoricalScore

    model, rng = bench.model(), np.random.default_rng(0)
    network = study.Network(model)
    layer, size = network.heatmap_layer, model.input_shape[1]
    drawn = [draw_flower(CLASS_NAMES[k % 5], rng, size)[0] for k in range(10)]
    photos = [photo.astype("float32") for photo in drawn]
    targets = model.predict(np.stack(photos)).argmax(1)
    explain = Gradcam(model, model_modifier=ReplaceToLinear(), clone=True)
    raw = {"seek_penultimate_conv_layer": False, "expand_cam": False, "normalize_cam": False}

    def ours():
        pairs = zip(photos, targets, strict=True)
        return [study.grad_cam(network, photo, layer, target) for photo, target in pairs]

    def theirs():
        scores = [CategoricalScore(int(target)) for target in targets]
        pairs = zip(scores, photos, strict=True)
        return [np.asarray(explain(score, photo, layer, **raw))[0] for score, photo in pairs]

    pairs = [(a, b) for a, b in zip(ours(), theirs(), strict=True) if a.any() or b.any()]
    agreement = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    own, peer = in_turn(bench.rounds, lambda: seconds(ours) / 10, lambda: seconds(theirs) / 10)
    what = f"Grad-CAM on {len(pairs)} drawn photos; least correlation {min(agreement):.6f}"
    bench.times(what, own, peer, "tf-keras-vis", "{:.2f} s".format)


def network_and_test(bench, most=None):
    """The given model as a Network, the test photos as it sees them, and their labels.

    most: evenly chosen photos.
    """
    network = study.Network(bench.model())
    test, _ = study.open_split(bench.data / "test", network.input_size, 1)
    count = min(most or len(test.paths), len(test.paths))
    chosen = np.linspace(0, len(test.paths) - 1, count).round().astype(int)
    return network, [test.read(test.paths[k]) for k in chosen], test.labels[chosen]


def traced_probabilities(network):
    """A function like network.probabilities, traced: a third of its time for single photos."""
    photos = tf.TensorSpec((None, *network.input_size, 3))

    @tf.function(input_signature=[photos], autograph=False)
    def probabilities(photos):
        (logits,) = network.compute(photos, [study.LOGITS], folded=True)
        return network.to_probabilities(logits)

    return lambda photos: probabilities(tf.constant(photos, tf.float32)).numpy()


def mean_falls(network, photos, labels):
    """Mean falls of the true class's probability without the fifth of Grad-CAM, of the heatmap of
    all blocks, a centred blob and a random map; the same with nothing but that fifth; and of how
    many photos."""
    layer, size = network.heatmap_layer, network.input_size
    field, rng = network.receptive_fields[layer], np.random.default_rng(0)
    heatmaps = heatmaps_of(network, layer, photos, labels)
    # The others mark nothing, and their captions say so.
    marking = np.flatnonzero(heatmaps.any((1, 2)))
    photos, labels, count = [photos[k] for k in marking], np.asarray(labels)[marking], len(marking)
    predict = traced_probabilities(network)

    def probabilities(masks):
        scores = [
            study.probabilities_without(predict, photo, [mask])
            for photo, mask in zip(photos, masks, strict=True)
        ]
        return np.concatenate(scores)[range(count), labels]

    before = probabilities([np.zeros(size, bool)] * count)
    placed = [study.place_heatmap(heatmap, field, size) for heatmap in heatmaps[marking]]
    blobs = [study.centred_blob(size)] * count
    noise = [cv2.GaussianBlur(rng.normal(size=size), (0, 0), size[0] / 12) for _ in photos]
    of_blocks = [
        study.heatmap_of_all_blocks(network, photo, label)
        for photo, label in zip(photos, labels, strict=True)
    ]
    all_maps = (placed, of_blocks, blobs, noise)
    fractions = [[study.top_fraction(it) for it in maps] for maps in all_maps]
    falls = [np.mean(before - probabilities(masks)) for masks in fractions]
    alone = [np.mean(probabilities([~mask for mask in masks])) for masks in fractions]
    return falls, alone, count


def heatmaps_of(network, layer, photos, labels):
    """The (n, h, w) Grad-CAM heatmaps of n photos, each for its label."""
    forward, heatmaps = partial(network.compute, names=[layer, study.LOGITS]), []
    for start in range(0, len(photos), 16):
        inputs = tf.constant(np.stack(photos[start : start + 16]), "float32")
        (of_batch,) = study.uncut_grad_cam(forward, inputs, np.c_[labels[start : start + 16]])
        heatmaps.append(np.maximum(0, of_batch[:, 0]))
    return np.concatenate(heatmaps)


def energy_on_flower(network, per_class):
    """Shares (4, 5 classes) on the flower: of the energy of Grad-CAM, of the heatmap of all blocks
    and of Grad-CAM plainly stretched, and the flower's share of the photo."""
    layer, size, shares = network.heatmap_layer, network.input_size[0], np.zeros((4, 5))
    field, labels, drawn = network.receptive_fields[layer], [], []
    for label, k in np.ndindex(5, per_class):
        rng = np.random.default_rng([99, label, k])
        drawn.append(draw_flower(CLASS_NAMES[label], rng, size))
        labels.append(label)
    heatmaps = heatmaps_of(network, layer, [photo for photo, _ in drawn], labels)
    for heatmap, label, (photo, flower) in zip(heatmaps, labels, drawn, strict=True):
        if not heatmap.any():
            heatmap = np.ones_like(heatmap)  # an empty map is as good as one that marks everything
        placed = study.place_heatmap(heatmap, field, (size, size))
        of_blocks = study.heatmap_of_all_blocks(network, photo, label) + 1e-9
        stretched = cv2.resize(heatmap, (size, size))
        for row, values in enumerate((placed, of_blocks, stretched, np.ones((size, size)))):
            shares[row, label] += values[flower].sum() / values.sum()
    return shares / per_class


def measure_trust(bench):
    """What the heatmaps of the given model are worth."""
    if not bench.model_file:
        bench.row("Trust in heatmaps", "not measured", "needs a trained model: --model FILE")
        return
    network, photos, labels = network_and_test(bench, bench.trust_photos)
    falls, alone, count = mean_falls(network, photos, labels)
    counts = f"{count} of {len(photos)} test photos"
    peers = ("the heatmap of all blocks", "a centred blob", "a random smooth map")
    for what, (grad_cam, *others) in (
        (f"Mean fall of the true class's probability without the hottest fifth, {counts}", falls),
        (f"Its mean with nothing but the hottest fifth, {counts}", alone),
    ):
        for value, name in zip(others, peers, strict=True):
            ratio = f"{grad_cam / value:.2f} ×" if value > 0 else ""
            bench.row(what, f"{grad_cam:.3f}", f"{value:.3f}: {name}", ratio)
    if network.class_count == len(CLASS_NAMES):
        placed, of_blocks, stretched, area = energy_on_flower(network, bench.masked_per_class)
        count = bench.masked_per_class * 5
        what = f"Heatmap energy on the flower, {count} drawn flowers; range: classes"
        for peer, name in (
            (of_blocks, "the heatmap of all blocks"),
            (area, "the flower's share of the photo"),
            (stretched, "the map plainly stretched"),
        ):
            bench.row(
                what, f"{placed.mean():.1%}", f"{peer.mean():.1%}: {name}", spread(placed / peer)
            )


def measure_concepts(bench):
    """How far the concepts of the given model stand for it, and what they cost."""
    if not bench.model_file:
        bench.row("Concepts", "not measured", "needs a trained model: --model FILE")
        return
    network, photos, _ = network_and_test(bench)
    chosen = np.random.default_rng(0).permutation(len(photos))[: study.CONCEPT_PHOTOS]
    batches = [chosen[start : start + 16] for start in range(0, len(chosen), 16)]
    layer = [network.heatmap_layer]
    found = [
        network.activations(np.stack([photos[k] for k in some]).astype("float32"), layer)[0]
        for some in batches
    ]
    feature_maps = np.concatenate(found)
    for count in (*study.CONCEPT_COUNTS, None):
        start = time.perf_counter()
        concepts = study.factorize(network, feature_maps, count)
        took = time.perf_counter() - start
        which = f"{count} concepts" if count else f"the rule: {len(concepts.vectors)} concepts"
        bench.row(
            f"Concepts of {len(chosen)} test photos, {which}",
            f"{concepts.kept:.1%} keep their class",
            f"{concepts.explained:.1%} of the activations' squares explained",
            f"{took:.1f} s",
        )


# ---- The page ------------------------------------------------------------------------------------


def predictions_alone(network, read, paths):
    """What an evaluation needs of the photos, and no more."""
    predict = tf.function(lambda photos: network.compute(photos, [study.LOGITS], folded=True)[0])
    for start in range(0, len(paths), study.PHOTOS_AT_ONCE):
        pixels = [read(path) for path in paths[start : start + study.PHOTOS_AT_ONCE]]
        predict(tf.constant(np.stack(pixels), tf.float32)).numpy()


def measure_page(bench):
    """What the page adds to the evaluation and the pictures, for few and for many test photos."""
    model = bench.model()
    network = study.Network(model)
    test, names = study.open_split(bench.data / "test", network.input_size, 1)
    training = study.training_photos(bench.data / "train", names)
    for count in bench.page_photos:
        paths = [Path(path) for path in np.resize(test.paths, count)]
        labels = np.resize(test.labels, count)
        output = bench.scratch / f"page_{count}"
        output.mkdir()
        alone = seconds(predictions_alone, network, test.read, paths)
        start = time.perf_counter()
        survey = study.survey_photos(network, paths, labels, names, test.read)
        nearest = training and study.nearest_photos(survey, training)
        surveyed = time.perf_counter() - start
        explained = study.explain_chosen(survey)
        with contextlib.redirect_stdout(io.StringIO()), study.Progress() as progress:
            patterns = study.find_patterns(network, progress=progress)
            pictures = study.draw_pictures(output, survey, explained, patterns, None, progress)
            before = set(output.iterdir())
            written = seconds(
                study.draw_page, output, survey, explained, pictures, None, "", progress, nearest
            )
        megabytes = sum(path.stat().st_size for path in set(output.iterdir()) - before) / 1e6
        added = surveyed - alone + written
        memory = f", {own_peak_memory():.1f} GiB at most" if own_peak_memory() else ""
        bench.row(
            f"Page of {count:,} test photos at {model.input_shape[1]} px, added to the predictions",
            f"{added:.1f} s, {megabytes:.1f} MB{memory}",
            f"{alone:.1f} s: the predictions alone",
            "",
        )


def own_peak_memory():
    """The GiB that this process needed at its peak so far, or None where the system does not
    tell."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- The run -------------------------------------------------------------------------------------

COMPARISONS = {
    "split": compare_split,
    "copies": measure_copies,
    "augmentation": compare_augmentation,
    "pipeline": compare_pipeline,
    "precision": compare_precision,
    "recipe": compare_recipe,
    "fine-tuning": compare_fine_tuning,
    "first-run": measure_first_run,
    "patterns": compare_patterns,
    "drawing": compare_drawing,
    "gradcam": compare_gradcam,
    "trust": measure_trust,
    "concepts": measure_concepts,
    "page": measure_page,
}


def machine():
    """The machine and the software in a line."""
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [
            line.partition(": ")[2]
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = named[0] if named else processor
    gpus = len(tf.config.list_physical_devices("GPU"))
    software = f"TensorFlow {tf.__version__}, Keras {keras.__version__}"
    python = f"Python {platform.python_version()}"
    devices = f"{gpus} GPUs" if gpus else "no GPU"
    system = f"{cores()} cores of {processor}, {devices}, {platform.system()}"
    return f"{system}; {python}, {software}"


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=COMPARISONS, metavar="NAME", help=", ".join(COMPARISONS)
    )
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="a trained model; else an untrained one"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="holds train, validation, test; else drawn flowers"
    )
    parser.add_argument(
        "--weights", default="none", metavar="FILE", help="of the model where no --model is given"
    )
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    numbers = ("rounds", "peer_filters", "keras_vis_filters", "recipe_epochs", "recipe_size")
    for name in (*numbers, "fine_tuning_epochs", "fine_tuning_size"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"default: {FULL[name]}"
        )
    options = parser.parse_args()
    for path in (options.model, options.data):
        if path and not path.exists():
            parser.error(f"{path}: no such file or folder")
    return options


def main():
    options = parse_options()
    settings = QUICK if options.quick else FULL
    settings = settings | {
        name: value for name, value in vars(options).items() if name in FULL and value
    }
    keras.config.disable_interactive_logging()
    tf.get_logger().setLevel(
        "ERROR"
    )  # the peers trace anew for every filter, and each time it is pointed out
    warnings.filterwarnings(
        "ignore", "The structure of `inputs`"
    )  # tf-keras-vis gives a list for one input
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), settings, options)
        for name in options.only or COMPARISONS:
            start = time.perf_counter()
            COMPARISONS[name](bench)
            print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    print(
        f"\n{machine()}\n",
        "| what | ours | peer | ratio (median, range) |",
        "| --- | --- | --- | --- |",
        sep="\n",
    )
    print(*bench.rows, sep="\n")


if __name__ == "__main__":
    main()

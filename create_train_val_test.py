"""Split a folder of photos into train, validation and test so that no picture is in two of them.

    python create_train_val_test.py [SOURCE] [--output DIR] [--val-size 0.15] [--test-size 0.2]

    SOURCE/daisy/one.jpg …      DIR/train/daisy/one.jpg …
           rose/two.jpg …           validation/rose/two.jpg …
                                    test/…
                                    split.csv

A model that has seen a test photo in training remembers it, and its test accuracy is a lie.
Collections from the web hold many photos twice: the same file, or the same picture at another size,
quality or tint. Such copies form a group, which goes to one split as a whole. A picture that is
filed under two classes is left out, as one label must be wrong. split.csv tells for every file
where it went and why.

The last section holds what both scripts share: errors, safe writing, decoding, locks, printing.
"""

import argparse
import contextlib
import csv
import errno
import glob
import hashlib
import io
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SPLITS = ("train", "validation", "test")

# ---- The files of SOURCE -------------------------------------------------------------------------

LAYOUT = "Name a folder that you may read, with a folder of photos a class: flowers/daisy, …"
# What others call the three parts of a set that is already split.
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(eq=False)
class Photo:
    """A file seen in SOURCE: a row of split.csv, and what copies are found by."""

    source: str  # its path below SOURCE, with forward slashes
    class_name: str = ""
    split: str = "skipped"
    sha256: str = ""
    group: int | str = ""
    problem: str = ""  # why it is left out
    note: str = ""  # what is worth knowing of a photo that is kept
    thumbnail: bytes = b""  # 32 rows of 36 grey pixels
    linked: bool = False

    def __post_init__(self):
        self.copies = [self]  # a list that all copies of one picture share


def list_files(source):
    """The class names, and a Photo for every file in SOURCE and its class folders.

    Raises Stop if there are less than two classes, or if the source is itself a split.
    """
    try:
        folders = {name: class_folders(source / name) for name in class_folders(source)}
        # The Kaggle download once held the whole set a second time, as flowers/flowers.
        nested = [name for name in folders if len(folders.keys() & folders[name]) >= 2]
        classes = [name for name in folders if name not in nested]
        photos = [Photo(name) for name in names_in(source) if name not in classes]
        for photo in photos:
            is_nested = photo.source in nested
            photo.problem = "is a nested copy of the whole set" if is_nested else "is in no class"
        for name in classes:
            photos += [Photo(f"{name}/{file}", name) for file in names_in(source / name)]
    except OSError as error:  # it is missing, or a file, or may not be read
        advice, draw = LAYOUT, beside_this_script("tests/draw_flowers.py")
        if source == Path("flowers") and not source.exists() and draw.exists():
            advice += f"\nWithout photos of your own: {pasteable('python', draw, source)}"
        raise Stop(f"{printable(error.filename)}: {error.strerror}.\n{advice}") from error
    refuse_what_is_no_set_of_classes(source, classes, folders)
    return classes, photos


def names_in(folder):
    """The names of all that is in a folder, in an order that depends on no locale."""
    return sorted((path.name for path in folder.iterdir()), key=raw_name)


def refuse_what_is_no_set_of_classes(source, classes, folders):
    """Raise Stop if the folders of SOURCE, `folders` giving those in each, are no classes."""
    parts = [name for name in folders if name.lower() in PARTS and folders[name]]
    if len(parts) >= 2:
        found = " and ".join(printable(name) for name in parts)
        raise Stop(
            f"{printable(source)}: is itself split, into {found}.\nName the photos that it was "
            "made of, or first bring those of each class together in one folder."
        )
    if len(classes) < 2:
        deeper = [source / name for name in folders if len(folders[name]) >= 2]
        remedy = f"Try {printable(deeper[0])}." if deeper else LAYOUT
        raise Stop(f"{printable(source)}: two classes are needed, {len(classes)} found.\n{remedy}")


def examine(photo, source, folder, link):
    """Copy or link the photo into `folder` if it decodes in full; note what was found."""
    path, target = source / photo.source, folder / photo.source
    try:
        if is_hidden(path.name):
            raise ValueError("is hidden")
        if path.suffix.lower() not in PHOTO_SUFFIXES and not path.is_dir():
            raise ValueError(f"is of type {path.suffix or 'none'}, which Keras does not read")
        data = read_bytes(path)
        photo.sha256 = hashlib.sha256(data).hexdigest()
        grey, photo.note = decode(data, at_least=2 * max(THUMBNAIL), mode="L")
        photo.thumbnail = grey.resize(THUMBNAIL, Image.Resampling.BILINEAR).tobytes()
        with contextlib.suppress(OSError):  # another file system, or one that has no hard links
            if link:
                os.link(path.resolve(), target)
                photo.linked = True
        if not photo.linked:
            target.write_bytes(data)
            os.utime(target, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    except ValueError as error:
        photo.problem = str(error)
    except OSError as error:
        error.filename = os.fspath(target)  # which a full disk does not name
        raise


# ---- Copies of one picture -----------------------------------------------------------------------
# A difference hash (Krawetz, "Kind of Like That", 2013) says for each of 8 × 8 places whether the
# picture gets brighter to the right. Size, quality, tint and loss of colour hardly change that, so
# copies are found among near-equal hashes. The edges of two thumbnails then decide: on 320 real
# flowers and 11 kinds of altered copies of each, those of copies correlated at 0.93 and more, and
# those of two different photos at 0.54 and less, even at the best of all small shifts.

# Bits: 98 to 100 % of resized, recompressed or tinted copies differ from the original in no more.
MAX_DISTANCE = 6
MIN_CORRELATION = 0.8
# Width and height in pixels: four a side for each of the 9 × 8 places of the hash.
THUMBNAIL = (36, 32)
MIN_EDGE = 2.0  # grey levels of 255; weaker edges do not tell a plain picture from another
REACH = 64  # neighbours to compare in a crowded bucket; more would take quadratic time
# The same scene shot twice, or cut a little closer, is the same picture too.
MAX_SHIFT = 2  # pixels of the thumbnail, about 6 % of a side
ZOOM = 1.04
# Of soft pictures, such as digits of 8 × 8 pixels or a bare sky, even different ones correlate.
MIN_SHARPNESS = 0.55
MIN_CORRELATION_OF_SOFT = 0.97


def find_copies(photos, only_identical=False):
    """Bring copies together and number their groups, and find label conflicts among them.

    A group is one picture and what looks the same as that one, not a chain in which each looks like
    the next: in that way all frames of a video would be copies of each other.
    """
    same_bytes = {}
    for photo in photos:
        same_bytes.setdefault(photo.sha256, []).append(photo)
    files = list(same_bytes.values())
    alike = [set() for _ in files]
    if not only_identical:
        thumbnails = np.frombuffer(b"".join(same[0].thumbnail for same in files), np.uint8)
        for one, other in same_pictures(thumbnails.reshape(-1, *THUMBNAIL[::-1])):
            alike[one].add(other)
            alike[other].add(one)
    ungrouped = set(range(len(files)))
    for hub in sorted(ungrouped, key=lambda index: (-len(alike[index]), index)):
        if hub in ungrouped:
            members = sorted({hub} | (alike[hub] & ungrouped))
            ungrouped.difference_update(members)
            group = [photo for index in members for photo in files[index]]
            for photo in group:
                photo.copies = group
    number_groups(photos)


def number_groups(photos):
    """Number the groups of copies, and note a label conflict where one lies in several classes."""
    groups = {id(photo.copies): photo.copies for photo in photos if len(photo.copies) > 1}
    for number, group in enumerate(groups.values(), start=1):
        for photo in group:
            photo.group = number
            others = [other.source for other in group if other.class_name != photo.class_name]
            if others:
                named = ", ".join(others[:3])
                more = f" and {len(others) - 3} more" if len(others) > 3 else ""
                photo.problem = f"label conflict: the same picture as {named}{more}"


def same_pictures(thumbnails):
    """Yield the index pairs of (n, 32, 36) grey thumbnails that show one picture."""
    pairs = similar_pairs(difference_hashes(thumbnails))
    for start in range(0, len(pairs), 256):  # the edges of all at once would fill the memory
        block = pairs[start : start + 256]
        one, other = thumbnails[block].astype(np.float32).swapaxes(0, 1)  # (pairs, 32, 36) each
        soft = np.minimum(sharpness(one), sharpness(other)) < MIN_SHARPNESS
        needed = np.where(soft, MIN_CORRELATION_OF_SOFT, MIN_CORRELATION)
        same = correlation(edges(one), edges(other)) >= needed
        rest = ~same & ~soft
        same[rest] = correlation_when_moved(one[rest], other[rest]) >= MIN_CORRELATION
        yield from block[same].tolist()


def difference_hashes(thumbnails):
    """The 64-bit difference hashes of (n, 32, 36) grey thumbnails."""
    places = thumbnails.reshape(-1, 8, 4, 9, 4).mean((2, 4), dtype=np.float32)
    brighter = places[:, :, 1:] > places[:, :, :-1]
    return np.packbits(brighter.reshape(-1, 64), axis=1).view(np.uint64).ravel()


def similar_pairs(hashes):
    """The (n, 2) index pairs of 64-bit hashes that differ in at most 6 bits, in linear time.

    Six bits spoil at most six of the eight bytes, so two bytes are equal: for each of the 28
    choices of two bytes, the hashes are sorted into 65,536 buckets, and only neighbours in a bucket
    are compared.
    """
    count, found = len(hashes), []
    by_value = np.argsort(hashes)  # so that equal ones are neighbours in every bucket
    hash_bytes = hashes[by_value].view(np.uint8).reshape(count, 8)
    for choice in itertools.combinations(range(8), 2):
        buckets = np.ascontiguousarray(hash_bytes[:, choice]).view(np.uint16).ravel()
        order = np.argsort(buckets, kind="stable")
        buckets, order, left = buckets[order], by_value[order], np.arange(count)
        for step in range(1, REACH + 1):
            left = left[left + step < count]
            left = left[buckets[left] == buckets[left + step]]
            one, other = order[left], order[left + step]
            distance = np.bitwise_count(hashes[one] ^ hashes[other])
            # Equal hashes are neighbours for every choice of bytes: once is enough.
            near = (distance <= MAX_DISTANCE) & ((distance > 0) | (choice == (0, 1)))
            found.append(np.minimum(one, other)[near] * count + np.maximum(one, other)[near])
    return np.stack(np.divmod(np.unique(np.concatenate(found)), count), axis=1)


def edges(grey):
    """The steps to the right and down in (n, 32, 36) pictures: (n, 2, 31, 35)."""
    right = np.diff(grey, axis=2)[:, 1:, :]
    down = np.diff(grey, axis=1)[:, :, 1:]
    return np.stack([right, down], axis=1)


def correlation(one, other):
    """How well the edges of n pairs of pictures agree: (n,), 1 for the same picture."""
    # Without the mean there is no even slope of light, which a hundred skies have in common.
    one = one - one.mean((2, 3), keepdims=True)
    other = other - other.mean((2, 3), keepdims=True)
    covariance = (one * other).mean((1, 2, 3))
    strength_of_one = np.maximum(one.std((1, 2, 3)), MIN_EDGE)
    strength_of_other = np.maximum(other.std((1, 2, 3)), MIN_EDGE)
    return covariance / (strength_of_one * strength_of_other)


def correlation_when_moved(one, other):
    """The best correlation of n pairs of (32, 36) pictures after a small shift and zoom: (n,)."""
    best = np.full(len(one), -1, np.float32)
    shifts = range(-MAX_SHIFT, MAX_SHIFT + 1)
    for first, second in ((one, other), (zoomed(one), other), (one, zoomed(other))):
        first, second = edges(first), edges(second)
        for down, right in itertools.product(shifts, shifts):
            overlap = cut(first, down, right), cut(second, -down, -right)
            best = np.maximum(best, correlation(*overlap))
    return best


def cut(pictures, down, right):
    """(…, height, width) pictures without their first `down` rows and `right` columns.

    A negative number leaves out the last ones instead.
    """
    height, width = pictures.shape[-2:]
    rows = slice(max(down, 0), height + min(down, 0))
    columns = slice(max(right, 0), width + min(right, 0))
    return pictures[..., rows, columns]


def zoomed(grey):
    """The middle of (n, 32, 36) pictures, enlarged to the same size."""
    height, width = grey.shape[1:]
    return zoom_matrix(height) @ grey @ zoom_matrix(width).T


def zoom_matrix(size):
    """(size, size): each row mixes a pixel of the enlarged line from the two that are nearest."""
    pixels, centre = np.arange(size), (size - 1) / 2
    places = centre + (pixels - centre) / ZOOM
    distances = np.abs(places[:, None] - pixels)
    return np.maximum(1 - distances, 0).astype(np.float32)


def sharpness(grey):
    """How much of the edges of (n, 32, 36) pictures is fine detail: (n,), about 1 for photos."""
    steps = edges(grey)
    steps -= steps.mean((2, 3), keepdims=True)
    return np.diff(steps, axis=3).std((1, 2, 3)) / np.maximum(steps.std((1, 2, 3)), MIN_EDGE)


# ---- Which photo goes where ----------------------------------------------------------------------


def split_sizes(count, val_size, test_size):
    """How many of `count` photos each split gets, test being a share of what validation leaves."""
    validation = int(val_size * count)
    test = int(test_size * (count - validation))
    return {"train": count - validation - test, "validation": validation, "test": test}


def assign_splits(photos, classes, options):
    """Draw the split of every usable photo, copies together.

    Raises Stop, naming the class, where one is too small.
    """
    for name in classes:
        usable = [photo for photo in photos if photo.class_name == name and not photo.problem]
        groups = [photo.copies for photo in usable if photo.copies[0] is photo]
        sizes = split_sizes(len(usable), options.val_size, options.test_size)
        if len(groups) < len(SPLITS) or not all(sizes.values()):
            left_out = [photo for photo in photos if photo.class_name == name and photo.problem]
            raise Stop(too_small(name, usable, groups, left_out, options))
        # A new class leaves the splits of the others as they were.
        rng = random.Random(raw_name(f"{options.seed}/{name}"))
        deal(rng.sample(groups, len(groups)), sizes)


def deal(groups, free):
    """Deal groups of photos out to the splits, of which `free` tells the number of places.

    Groups go, largest first, where most places are free: copies mostly into train, and single
    photos fill each split up to its size. The last ones go where there is nothing yet.
    """
    groups, empty = sorted(groups, key=len), list(SPLITS)
    while groups:
        split = max(empty if len(groups) <= len(empty) else SPLITS, key=free.get)
        empty = [other for other in empty if other != split]
        for photo in groups.pop():
            photo.split = split
            free[split] -= 1


def too_small(name, usable, groups, left_out, options):
    """The message for a class that cannot fill three splits."""
    needed = next(
        count
        for count in itertools.count(3)
        if all(split_sizes(count, options.val_size, options.test_size).values())
    )
    ways = ["Add photos to it", "remove it"]
    if len(usable) < needed:
        lack = f"has {len(usable)} usable photos; three splits need {needed}."
        ways.append("choose larger --val-size and --test-size")
    else:
        lack = f"its {len(usable)} photos show only {len(groups)} different pictures, as the others"
        lack += f" are copies; three splits need {len(SPLITS)}."
    if left_out:
        lack += printable(f" {left_out[0].source}: {left_out[0].problem}.")
    if options.copies == "similar" and any(photo.group for photo in usable + left_out):
        ways.append("count only identical files as copies with --copies identical")
    return f"class {printable(name)}: {lack}\n{', '.join(ways[:-1])}, or {ways[-1]}."


# ---- All or nothing ------------------------------------------------------------------------------
# The new split is built in a hidden folder. Its split.csv comes last and in one step, and from then
# on the new split counts: a run killed before has changed nothing, and after it the next run moves
# the rest into place. All old folders leave before the first new one comes, so that old and new
# never stand side by side.

BUILDING = ".split.building"
RESULTS = (*SPLITS, "split.csv")


@contextlib.contextmanager
def only_run_in(output):
    """Keep other runs out of the folder and yield where to build; a whole split comes into place.

    Raises Stop if another run is writing there.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Stop(f"{printable(output)}: is no folder.\nChoose another --output.") from error
    busy = "another run is writing there.\nWait for its end, or choose another --output."
    try:
        with locked(output / ".split.lock", f"{printable(output)}: {busy}"):
            move_into_place(output)  # what a killed run has left
            try:
                yield output / BUILDING
            finally:
                move_into_place(output)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds the split
                path.rmdir()


def move_into_place(output):
    """Put a split that is built in the place of the old one, even if a run was killed on the way.

    Clears up all else that is left of a run.
    """
    building, old = output / BUILDING, output / BUILDING / "old"
    if (building / "split.csv").exists():
        old.mkdir(exist_ok=True)
        waiting = [name for name in RESULTS if (building / name).exists()]
        for name in waiting:
            if os.path.lexists(output / name):
                (output / name).rename(old / name)
        for name in waiting:
            (building / name).rename(output / name)
    shutil.rmtree(building, ignore_errors=True)


def build(photos, classes, building, options):
    """Make the three folders and split.csv in `building`.

    All photos start in train, where most of them will stay.
    """
    for split, name in itertools.product(SPLITS, classes):
        (building / split / name).mkdir(parents=True)
    train = building / "train"
    check = partial(examine, source=options.source, folder=train, link=options.link)
    in_classes = [photo for photo in photos if not photo.problem]
    list(decode_photos(in_classes, check, "Checking and copying"))
    usable = [photo for photo in photos if not photo.problem]
    find_copies(usable, only_identical=options.copies == "identical")
    assign_splits(photos, classes, options)
    for photo in usable:
        if photo.problem:  # a label conflict
            (train / photo.source).unlink()
        elif photo.split != "train":
            (train / photo.source).rename(building / photo.split / photo.source)
    write_table(building / "split.csv", photos)


def write_table(path, photos):
    """Write split.csv, a row for every file; names that are not UTF-8 keep their bytes."""
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with replace_when_whole(path) as partial_path, partial_path.open("w", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(("source", "class", "split", "sha256", "group", "note"))
        for photo in photos:
            note = "; ".join(filter(None, (photo.problem, photo.note)))
            row = (photo.source, photo.class_name, photo.split, photo.sha256, photo.group, note)
            writer.writerow(row)


# ---- The command line ----------------------------------------------------------------------------

FEW = 10  # photos of a class in validation or test: one of them is ten percent of its accuracy


def parse_options():
    """Read and check the command line."""
    summary = (__doc__ or "").partition("\n")[0]  # python -OO drops it
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        type=Path,
        default="flowers",
        metavar="SOURCE",
        help="one folder of photos per class (default: flowers)",
    )
    add(
        "--output",
        type=Path,
        default=".",
        metavar="DIR",
        help="where the three folders go (default: here)",
    )
    add("--val-size", type=float, default=0.15, help="share of the photos (default: 0.15)")
    add(
        "--test-size",
        type=float,
        default=0.2,
        help="share of what validation leaves (default: 0.2)",
    )
    add("--seed", type=int, default=0, help="another seed, another split (default: 0)")
    add(
        "--copies",
        choices=("similar", "identical"),
        default="similar",
        help="what are copies: what looks the same, or the same bytes only (default: similar)",
    )
    add("--overwrite", action="store_true", help="replace the split that is in DIR")
    add("--link", action="store_true", help="make hard links instead of copies")
    options = parser.parse_args()
    for option, size in (("--val-size", options.val_size), ("--test-size", options.test_size)):
        if not 0.01 <= size <= 0.99:
            remedy = "Choose one from 0.01 to 0.99, such as 0.15."
            raise Stop(f"{option} {size}: is no share of the photos.\n{remedy}")
    return options


def refuse_overlap(source, classes, output):
    """Raise Stop if the splits would land among the source's photos or take their place."""

    def inside(path, folder):  # compared as files, as some systems take "Flowers" for "flowers"
        parts = [part for part in (path.resolve(), *path.resolve().parents) if part.exists()]
        return folder.exists() and any(part.samefile(folder) for part in parts)

    place = printable(output)
    if inside(output, source):
        remedy = "Name a folder outside it with --output."
        raise Stop(f"{place}: lies in the source {printable(source)}.\n{remedy}")
    for folder in (source, *(source / name for name in classes)):
        if any(inside(folder, output / split) for split in SPLITS):
            problem = f"is itself part of the split in {place}"
            raise Stop(f"{printable(folder)}: {problem}.\nSplit the original photos.")


def refuse_second_split(options):
    """Raise Stop if the output holds a split, or part of one, that is not to be replaced."""
    present = [name for name in RESULTS if os.path.lexists(options.output / name)]
    if present and not options.overwrite:
        held = f"{printable(options.output)}: already holds {', '.join(present)}."
        raise Stop(f"{held}\n--overwrite replaces them as a whole.")


def report(photos, classes):
    """Print what was noticed, at most eight lines of each kind, and the table of counts."""
    kinds = {
        "Skipped": [photo for photo in photos if photo.problem and not photo.group],
        "Label conflicts, left out": [photo for photo in photos if photo.problem and photo.group],
        "Kept with a note": [photo for photo in photos if photo.note and not photo.problem],
    }
    for title, noticed in kinds.items():
        if noticed:
            lines = [f"{photo.source}: {photo.problem or photo.note}" for photo in noticed[:8]]
            print(f"{title}: {len(noticed)} (see split.csv)", *map(printable, lines), sep="\n  ")
    columns, width = (*SPLITS, "skipped"), max(len(printable(name)) for name in classes)
    print(" " * width, *(f"{column:>10}" for column in columns))
    counts = Counter((photo.class_name, photo.split) for photo in photos)
    for name in classes:
        row = (f"{counts[name, column]:>10}" for column in columns)
        print(f"{printable(name):{width}}", *row)
    evaluated = ("validation", "test")
    fewest = min(itertools.product(classes, evaluated), key=lambda place: counts[place])
    if counts[fewest] < FEW:
        found = f"Only {counts[fewest]} of {printable(fewest[0])} in {fewest[1]}"
        print(f"{found}: with fewer than {FEW} photos a class an accuracy is a rough guess.")


def show_next_step(output):
    """Print the command that trains on the split."""
    if not imagenet_weights().exists():
        print("ImageNet's weights (88 MB) are downloaded first; --weights none does without them.")
    training = beside_this_script("model_training_and_visualization.py")
    print(f"Next: {pasteable('python', training, '--data', output)}")


def imagenet_weights():
    """Where Keras keeps InceptionV3's weights without the top once they are downloaded."""
    file = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return download_folder() / "models" / file


def beside_this_script(name):
    """The path of a file in this script's folder, as short as a shell in this place takes it."""
    path = Path(__file__).parent / name
    with contextlib.suppress(ValueError):  # on another drive
        path = Path(os.path.relpath(path))
    return path


def main():
    """Split SOURCE as the command line says."""
    options = parse_options()
    classes, photos = list_files(options.source)
    refuse_overlap(options.source, classes, options.output)
    if not (options.output / BUILDING).exists():  # else what a killed run has left is seen to first
        refuse_second_split(options)
    with only_run_in(options.output) as building:
        refuse_second_split(options)
        build(photos, classes, building, options)
    report(photos, classes)
    copied = sum(photo.split != "skipped" and not photo.linked for photo in photos)
    if options.link and copied:
        place = printable(options.output)
        print(f"{copied} photos were copied, as {place} cannot hold hard links to them.")
    show_next_step(options.output)


# ---- What both scripts share ---------------------------------------------------------------------
# How a run ends, printing, photos, and files that are written whole or not at all.


class Stop(Exception):  # noqa: N818 (it ends a run, with or without an error)
    """Ends a run with a message of one to three lines that names the file and the remedy."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def run(main):
    """Call main(), and end the process with a message and an exit code where it does not succeed.

    The code is 1 after an I/O or runtime failure, 2 on bad input, 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    open_missing_streams()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about a photo is said by name
    try:
        with unwound_by_sigterm():
            main()
            sys.stdout.flush()
        return
    except Stop as stop:
        message, exit_code = str(stop), stop.exit_code
    except KeyboardInterrupt:
        message, exit_code = "Stopped by Ctrl-C.", 130
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has left; an ordinary exit would complain about it
    except OSError as error:
        message, exit_code = explain(error), 1
    try:
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:  # the full disk is the one that we print to
        os._exit(exit_code)
    sys.exit(exit_code)


def open_missing_streams():
    """Make sure that whatever is printed does no harm, wherever it goes.

    Of a program started with `>&-` the next file to be opened would become the standard output, and
    what a library prints would land in that file.
    """
    with contextlib.suppress(OSError):
        while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
            pass
        os.close(unused)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if getattr(stream, "closed", stream is None):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):  # a name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def unwound_by_sigterm():
    """Let SIGTERM unwind the block as Ctrl-C does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():  # which alone can be interrupted
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        if before is not None:  # which no Python code has set, and none can set again
            signal.signal(signal.SIGTERM, before)  # as the process of a notebook lives on


def explain(error):
    """The message for an OSError: what failed, why, and what to do about it."""
    place = error.filename2 or error.filename
    subject = "" if place is None else f"{printable(place)}: "
    if not error.errno:  # one of Pillow's own
        return subject + (" ".join(map(str, error.args)) or type(error).__name__)
    remedy = "Choose another place, then run it again."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space there, or choose another place, then run it again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "Check the permissions there, or choose another place, then run it again."
    return f"{subject}{os.strerror(error.errno)}.\n{remedy}"  # HDF5's own reason is a page


def printable(path):
    """A path as it can be printed on one line, whatever its name holds."""
    text = raw_name(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def pasteable(*words):
    """A command of these words that a shell takes as it is printed, whatever they hold."""
    return " ".join(quoted(word) for word in words)


def quoted(word):
    """A word quoted for the shell where it needs to be: $'…' if it cannot be printed as it is."""
    text = os.fsdecode(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = os.path.join(".", text)  # noqa: PTH118 (Path drops the dot); it is no option
    if os.name == "nt":
        return subprocess.list2cmdline([text])
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        if text.isprintable():
            return shlex.quote(text)
    safe = bytes(range(32, 127)).translate(None, b"'\\")
    letters = (chr(byte) if byte in safe else f"\\x{byte:02x}" for byte in raw_name(text))
    return f"$'{''.join(letters)}'"


def raw_name(path):
    """The bytes of a name: those on disk, which may be no UTF-8, or UTF-8."""
    lone = "backslashreplace" if os.name == "nt" else "surrogateescape"
    return os.fsdecode(path).encode("utf-8", lone)


# The types that Keras's ImageDataGenerator reads; it passes over all others without a word.
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff")
# What may be inside, whatever the suffix says: web photos often carry a wrong one. Nothing that
# starts another program.
PHOTO_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
# Pillow refuses what unpacks to over twice as many, and may not fit into memory.
Image.MAX_IMAGE_PIXELS = 45_000_000
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
JPEG_END = b"\xff\xd9"


def is_hidden(name):
    """Whether a file or folder is not meant to be seen, such as .ipynb_checkpoints or __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def class_folders(folder):
    """The sorted names of the visible folders in `folder`: its classes."""

    def is_folder(entry):
        try:
            return entry.is_dir()
        except OSError:  # a link that leads in a circle
            return False

    names = sorted(entry.name for entry in os.scandir(folder) if is_folder(entry))
    return [name for name in names if not is_hidden(name)]


def read_photo(path, at_least=None):
    """Decode a photo as a person sees it, EXIF rotation applied: (height, width, 3) uint8 RGB.

    With `at_least=pixels` a JPEG comes at the smallest of its scales 1, 1/2, 1/4, 1/8 that keeps
    both sides that long. Raises Stop, naming the file and the reason, if it is no whole photo.
    """
    try:
        image, _ = decode(read_bytes(Path(path)), at_least)
    except ValueError as error:
        raise Stop(f"{printable(path)}: {error}") from error
    return np.array(image)


def read_bytes(path):
    """The bytes of a regular file. Raises ValueError, saying why, for all else."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        reason = "is a folder or a device, not a photo"  # a FIFO would keep its reader waiting
    except OSError as error:
        reason = "is a broken link" if path.is_symlink() else error.strerror
    raise ValueError(reason)


def decode(data, at_least=None, mode="RGB"):
    """The bytes of a photo as a Pillow image of mode RGB or L (grey), and a note about it or "".

    See read_photo. Raises ValueError, saying why, if they are no photo or not whole.
    """
    try:
        image, note = load_or_mend(data, at_least, mode)
        with contextlib.suppress(Exception):  # a broken EXIF block does not make the pixels worse
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow would clip at 255
            image, note = in_8_bits(image)
        elif is_dark_16_bit_colour(image):
            note = "is nearly black, as it uses only the lower of its 16 bits a colour"
        if image.has_transparency_data:  # is laid on white
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert(mode), note
    except Image.DecompressionBombError:
        reason = f"is too large, over {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except Image.UnidentifiedImageError:
        reason = "is no image that can be read" if data else "is empty"
    except Exception as error:  # each of Pillow's decoders has its own ways to fail
        reason = f"is damaged or cut off ({error})"
    raise ValueError(reason)


def load_or_mend(data, at_least, mode):
    """The loaded Pillow image of a photo's bytes, and a note if that took an end to be added."""
    try:
        return load(data, at_least, mode), ""
    except (OSError, ValueError):
        if data.startswith(b"\x89PNG"):
            return load(without_text(data), at_least, mode), ""
        if data.startswith(b"\xff\xd8") and lacks_only_its_end(data):
            return load(data + JPEG_END, at_least, mode), "lacks its end marker, but no pixel"
        raise


def load(data, at_least=None, mode="RGB"):
    """The loaded Pillow image of a photo's bytes."""
    image = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
    if at_least:
        image.draft(mode, (at_least, at_least))
    image.load()
    return image


def without_text(png):
    """The bytes of a PNG without text and colour profile, of which Pillow refuses large ones."""
    kept, position = [png[:8]], 8
    while position < len(png):
        length = int.from_bytes(png[position : position + 4], "big")
        chunk = png[position : position + 12 + length]  # length, type, data, checksum
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(chunk)
        position += len(chunk)
    return b"".join(kept)


def lacks_only_its_end(jpeg):
    """Whether a JPEG that ends too early holds all of its pixels all the same.

    Then whatever follows its last byte makes no difference.
    """
    endings = (bytes(64), b"\x55" * 64)
    with contextlib.suppress(Exception):  # a damaged header has its own ways to fail
        if holds_every_scan(jpeg):
            one, other = (load(jpeg.rstrip(b"\xff") + end + JPEG_END) for end in endings)
            return one.tobytes() == other.tobytes()
    return False


def holds_every_scan(jpeg):
    """Whether the scans of a JPEG, of which a progressive one has many, bring every last bit.

    A frame header lists the components of the photo. Each scan header says which of their 64
    coefficients it brings, and how many of the last bits it leaves out (ITU-T T.81, B.2).
    """
    missing = {}
    for marker, content in jpeg_segments(jpeg):
        if marker in b"\xc0\xc1\xc2":
            missing = {component: set(range(64)) for component in content[6::3]}
        if marker == b"\xda":
            first, last, bits = content[-3:]
            if bits & 15 == 0:
                for component in content[1:-3:2]:
                    missing[component] -= set(range(first, last + 1))
    return bool(missing) and not any(missing.values())


def jpeg_segments(jpeg):
    """Yield the marker and the content of every segment of a JPEG; pixels lie between segments."""
    # Among pixels, 0xFF is followed by 0x00 or by a restart marker, 0xD0 to 0xD7.
    start, position = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])(..)", re.DOTALL), 2
    while found := start.search(jpeg, position):
        position = found.start() + 2 + int.from_bytes(found[2], "big")
        yield found[1], jpeg[found.end() : position]


def is_dark_16_bit_colour(image):
    """Whether it is a TIFF of 16 bits a colour whose upper bits, all that Pillow reads, are 0."""
    if image.format != "TIFF" or image.mode != "RGB":
        return False
    bits = image.tag_v2.get(BITS_PER_SAMPLE, [8])
    return max(bits) == 16 and max(high for _, high in image.getextrema()) < 64


def in_8_bits(image):
    """A grey picture of 16 bits and more, or of floats, in 8 bits, and a note on a guess."""
    samples = np.nan_to_num(np.asarray(image, np.float32))
    white, note = white_level(image, samples.max())
    samples = np.clip(samples * (255 / white), 0, 255)
    return Image.fromarray(samples.round().astype(np.uint8)), note


def white_level(image, brightest):
    """The sample that means white in a grey picture, and a note if that was a guess."""
    if ";16" not in image.mode:
        return next((level for level in (1, 255) if brightest <= level), 65535), ""
    if image.format != "TIFF":
        return 65535, ""
    bits = max(image.tag_v2.get(BITS_PER_SAMPLE, [16]))
    if bits < 16:
        return 2**bits - 1, ""
    stated = np.max(image.tag_v2.get(MAX_SAMPLE_VALUE, 0))
    if stated >= max(brightest, 1):
        return stated, ""
    # Cameras and microscopes store 10, 12 or 14 bits in 16 and mostly do not say so.
    bits = next(bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)
    note = "" if bits == 16 else f"holds {bits} bits in 16, to judge by its brightest pixel"
    return 2**bits - 1, note


def decode_photos(photos, function, description):
    """Yield function(photo) for every photo, in order, from threads on all cores.

    A terminal shows the progress.
    """
    photos, pool = list(photos), ThreadPoolExecutor(cores())
    try:
        results = pool.map(function, photos)
        if sys.stderr.isatty():
            # Only here, as it takes as long to import as 100 photos to check.
            from rich.console import Console
            from rich.progress import track

            results = track(results, description, len(photos), console=Console(stderr=True))
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the photos in work are finished


def keras_home():
    """The folder of Keras's settings and downloads: $KERAS_HOME, ~/.keras, or else /tmp/.keras."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path raises where there is no home)
    home = home if os.access(home, os.W_OK) else "/tmp"
    return Path(os.path.expanduser(os.environ.get("KERAS_HOME", f"{home}/.keras")))  # noqa: PTH111


def download_folder():
    """Where Keras looks for its downloads: in its home, or where that is read-only in /tmp."""
    temporary = "/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir()
    home = keras_home()
    return home if os.access(home, os.W_OK) else Path(temporary, ".keras")


def cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def locked(path, message):
    """Hold the lock file `path` during the block. Raises Stop(message) if another process holds it.

    The system lets go of it however this process ends.
    """
    try:
        if os.name == "nt":
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            handle = open_and_lock(path)
    except (BlockingIOError, FileExistsError) as error:
        raise Stop(message) from error
    try:
        yield
    finally:
        if os.name != "nt":  # where the file goes with its handle
            Path(path).unlink(missing_ok=True)
        os.close(handle)


def open_and_lock(path):
    """The descriptor of a file that only this process has locked. Raises BlockingIOError."""
    import fcntl  # which Windows does not have

    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink == 0:
            raise BlockingIOError  # the process that held it has just deleted it
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            os.close(handle)
            raise  # otherwise the file system has no locks; most who work there are alone
    return handle


@contextlib.contextmanager
def replace_when_whole(path):
    """Yield a temporary path beside `path`, which takes its place only when the block succeeds.

    Its name keeps all suffixes, as Keras goes by them, and tells the process, so that the next one
    can clear up.
    """
    path = Path(path)
    remove_partial_files(path)
    partial_path = path.with_name(f".partial{os.getpid()}-{path.name}")
    try:
        yield partial_path
        partial_path.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        partial_path.unlink(missing_ok=True)


def remove_partial_files(path):
    """Remove what a killed process has left of writing `path`, and nothing that one is writing."""
    for left_behind in path.parent.glob(f".partial[0-9]*-{glob.escape(path.name)}"):
        process = int(left_behind.name.removeprefix(".partial").partition("-")[0])
        with contextlib.suppress(PermissionError):  # another user is writing it, or on Windows any
            with contextlib.suppress(ProcessLookupError):
                if os.name != "nt":  # where the question would end the process
                    os.kill(process, 0)
                    continue
            left_behind.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)

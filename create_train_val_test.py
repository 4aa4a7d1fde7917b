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

The first half is the chapter, in the order of a run. The second half, the workshop, can be skipped:
options and messages, and what both scripts share.
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
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

SPLITS = ("train", "validation", "test")
# With fewer photos of a class in validation or test, one is over ten percent of its accuracy.
FEW = 10
# Width and height in pixels of what copies are found by.
THUMBNAIL = (36, 32)


def main(options):
    """Split the photos of SOURCE as the options say, or check a split that others made."""
    if options.check:
        check_split(options)
        return
    classes, photos = list_files(options.source)
    refuse_overlap(options.source, classes, options.output)
    refuse_second_split(options)
    with only_run_in(options.output) as building:
        refuse_second_split(options)
        copy_photos(photos, building, options)
        find_copies(photos, only_identical=options.copies == "identical")
        join_groups(photos)
        assign_splits(photos, classes, options)
        move_to_splits(photos, classes, building)
        write_table(photos, building / "split.csv")
    report(photos, classes, options)
    show_next_step(options.output)


# ---- The files of SOURCE -------------------------------------------------------------------------

LAYOUT = "Name a folder that you may read, with a folder of photos a class: flowers/daisy, …"
# What others call the three parts of a set that is already split.
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(eq=False)
class Photo:
    """A file seen in SOURCE: a row of split.csv, and what copies are found by."""

    source: str  # its path below SOURCE, with forward slashes
    class_name: str = ""
    folder: str = ""  # the one of several photos of the class that belong together
    split: str = "skipped"
    sha256: str = ""
    group: int | str = ""
    problem: str = ""  # why it is left out
    note: str = ""  # what is worth knowing of a photo that is kept
    thumbnail: bytes = b""  # what copies are found by
    in_conflict: bool = False  # left out, as its copies are of several classes
    linked: bool = False

    def __post_init__(self):
        self.copies = [self]  # a list that all copies of one picture share
        self.together = [self]  # a list that all photos share that must go to one split

    @property
    def reason(self):
        """Why it is in a group: the folder that it is in, its copies, or both."""
        in_folder = self.folder and sum(other.folder == self.folder for other in self.together) > 1
        kinds = {"folder": in_folder, "copies": len(self.copies) > 1}
        return " and ".join(kind for kind, is_one in kinds.items() if is_one)


def list_files(source):
    """The class names, and a Photo for every file in SOURCE and its class folders.

    Raises Stop if there are less than two classes, or if the source is itself a split.
    """
    try:
        folders = {name: class_folders(source / name) for name in class_folders(source)}
        # The Kaggle download once held the whole set a second time, as flowers/flowers.
        nested = [name for name in folders if len(folders.keys() & folders[name]) >= 2]
        classes = [name for name in folders if name not in nested]
        photos = [Photo(name) for name in _names_in(source) if name not in classes]
        for photo in photos:
            is_nested = photo.source in nested
            photo.problem = "is a nested copy of the whole set" if is_nested else "is in no class"
        for name in classes:
            photos += _photos_in(source, name, name)
    except OSError as error:  # it is missing, or a file, or may not be read
        advice, draw = LAYOUT, beside_this_script("tests/draw_flowers.py")
        if source == Path("flowers") and not source.exists() and draw.exists():
            advice += f"\nWithout photos of your own: {pasteable('python', draw, source)}"
        raise Stop(f"{printable(error.filename)}: {error.strerror}.\n{advice}") from error
    _refuse_what_is_no_set_of_classes(source, classes, folders)
    return classes, photos


def copy_photos(photos, building, options):
    """Copy or link every whole photo below the folder WAITING of the new split."""
    in_classes = [photo for photo in photos if not photo.problem]
    for folder in {Path(photo.source).parent for photo in in_classes}:
        (building / WAITING / folder).mkdir(parents=True, exist_ok=True)
    copy = partial(
        _copy_if_whole, source=options.source, folder=building / WAITING, link=options.link
    )
    for _ in map_photos(in_classes, copy, "Checking and copying"):
        pass


def _names_in(folder):
    """The names of all that is in a folder, in an order that depends on no locale."""
    return sorted((path.name for path in folder.iterdir()), key=raw_name)


def _photos_in(source, below, class_name):
    """A Photo for every file of the class in source/below; those of one folder there stay together.

    A link to a folder is not followed, as it may lead in a circle.
    """
    photos, folders = [], class_folders(source / below)
    for name in _names_in(source / below):
        place = f"{below}/{name}"
        if name in folders and not (source / place).is_symlink():
            files = (path for path in (source / place).rglob("*") if not path.is_dir())
            names = sorted((path.relative_to(source).as_posix() for path in files), key=raw_name)
            photos += [Photo(file, class_name, place) for file in names]
        else:
            photos.append(Photo(place, class_name))
    return photos


def _refuse_what_is_no_set_of_classes(source, classes, folders):
    """Raise Stop if the folders of SOURCE, `folders` giving those in each, are no classes."""
    parts = [name for name in folders if name.lower() in PARTS and folders[name]]
    if len(parts) >= 2:
        found = " and ".join(printable(name) for name in parts)
        raise Stop(
            f"{printable(source)}: is itself split, into {found}.\n--check looks for copies across "
            "them. To split anew, bring the photos of each class together in one folder."
        )
    if len(classes) < 2:
        deeper = [source / name for name in folders if len(folders[name]) >= 2]
        remedy = f"Try {printable(deeper[0])}." if deeper else LAYOUT
        raise Stop(f"{printable(source)}: two classes are needed, {len(classes)} found.\n{remedy}")


def _copy_if_whole(photo, source, folder, link):
    """Copy or link the photo into `folder` if it decodes in full; note what was found."""
    data = _examine(photo, source)
    if photo.problem:
        return
    path, target = source / photo.source, folder / photo.source
    try:
        with contextlib.suppress(OSError):  # another file system, or one that has no hard links
            if link:
                os.link(path.resolve(), target)
                photo.linked = True
        if not photo.linked:
            target.write_bytes(data)
            os.utime(target, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    except OSError as error:
        error.filename = os.fspath(target)  # which a full disk does not name
        raise


def _examine(photo, source):
    """The bytes of a photo that decodes in full, else None; note what was found."""
    path = source / photo.source
    try:
        if any(map(is_hidden, Path(photo.source).parts)):
            raise ValueError("is hidden")
        if path.suffix.lower() not in PHOTO_SUFFIXES and path.is_file():
            raise ValueError(f"is of type {path.suffix or 'none'}, which no photo has")
        data = _read_bytes(path)
        photo.sha256 = hashlib.sha256(data).hexdigest()
        grey, photo.note = decode(data, at_least=2 * max(THUMBNAIL), mode="L")
        photo.thumbnail = grey.resize(THUMBNAIL, Image.Resampling.BILINEAR).tobytes()
        return data
    except ValueError as error:
        photo.problem = str(error)
        return None


# ---- Copies of one picture -----------------------------------------------------------------------
# A difference hash (Krawetz, "Kind of Like That", 2013) says for each of 8 × 8 places whether the
# picture gets brighter to the right. Size, quality, tint and loss of colour hardly change that, so
# copies are found among near-equal hashes. The edges of two thumbnails then decide: on 320 real
# flowers and 11 kinds of altered copies of each, those of copies correlated at 0.93 and more, and
# those of two different photos at 0.54 and less, even at the best of all small shifts.

# Bits: 98 to 100 % of resized, recompressed or tinted copies differ from the original in no more.
MAX_DISTANCE = 6
MIN_CORRELATION = 0.8
MIN_EDGE = 2.0  # grey levels of 255; weaker edges do not tell a plain picture from another
REACH = 64  # neighbours to compare in a crowded bucket; more would take quadratic time
# The same scene shot twice, or cut a little closer, is the same picture too.
MAX_SHIFT = 2  # pixels of the thumbnail, about 6 % of a side
ZOOM = 1.04
# Of soft pictures, such as digits of 8 × 8 pixels or a bare sky, even different ones correlate.
MIN_SHARPNESS = 0.55
MIN_CORRELATION_OF_SOFT = 0.97


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


def same_pictures(photos):
    """Yield the index pairs of the photos that show one picture."""
    thumbnails = np.frombuffer(b"".join(photo.thumbnail for photo in photos), np.uint8)
    thumbnails = thumbnails.reshape(-1, *THUMBNAIL[::-1])
    pairs = similar_pairs(_difference_hashes(thumbnails))
    for start in range(0, len(pairs), 256):  # the edges of all at once would fill the memory
        block = pairs[start : start + 256]
        one, other = thumbnails[block].astype(np.float32).swapaxes(0, 1)  # (pairs, 32, 36) each
        soft = np.minimum(_sharpness(one), _sharpness(other)) < MIN_SHARPNESS
        needed = np.where(soft, MIN_CORRELATION_OF_SOFT, MIN_CORRELATION)
        same = _correlation(_edges(one), _edges(other)) >= needed
        rest = ~same & ~soft
        same[rest] = _correlation_when_moved(one[rest], other[rest]) >= MIN_CORRELATION
        yield from block[same].tolist()


def find_copies(photos, only_identical=False):
    """Bring the copies among the whole photos together, and note label conflicts among them."""
    same_bytes = {}
    for photo in photos:
        if not photo.problem:
            same_bytes.setdefault(photo.sha256, []).append(photo)
    files = list(same_bytes.values())
    pairs = [] if only_identical else same_pictures([same[0] for same in files])
    for members in star_groups(len(files), pairs):
        copies = [photo for index in members for photo in files[index]]
        for photo in copies:
            photo.copies = copies
            others = [other.source for other in copies if other.class_name != photo.class_name]
            if others:
                named = ", ".join(others[:3])
                more = f" and {len(others) - 3} more" if len(others) > 3 else ""
                photo.in_conflict = True
                photo.problem = f"label conflict: the same picture as {named}{more}"


def star_groups(count, pairs):
    """Group the numbers below `count`: each group is one of them, and all that are paired with it.

    It is no chain in which each resembles the next: in that way all frames of a video would be
    copies of each other. The number with the most pairs comes first.
    """
    alike = [set() for _ in range(count)]
    for one, other in pairs:
        alike[one].add(other)
        alike[other].add(one)
    ungrouped, groups = set(range(count)), []
    for hub in sorted(ungrouped, key=lambda index: (-len(alike[index]), index)):
        if hub in ungrouped:
            groups.append(sorted({hub} | (alike[hub] & ungrouped)))
            ungrouped.difference_update(groups[-1])
    return groups


def join_groups(photos):
    """Bring together what must go to one split, copies and photos of one folder; number the groups.

    Where a group of copies and a folder overlap, they become one.
    """
    folders = {}
    for photo in photos:
        if photo.folder and not photo.problem:
            folders.setdefault(photo.folder, []).append(photo)
    for relatives in (*(photo.copies for photo in photos), *folders.values()):
        parts = {id(photo.together): photo.together for photo in relatives}
        joined = list(itertools.chain.from_iterable(parts.values()))
        for photo in joined:
            photo.together = joined
    groups = {id(photo.together): photo.together for photo in photos if len(photo.together) > 1}
    for number, group in enumerate(groups.values(), start=1):
        for photo in group:
            photo.group = number


def _difference_hashes(thumbnails):
    """The 64-bit difference hashes of (n, 32, 36) grey thumbnails."""
    places = thumbnails.reshape(-1, 8, 4, 9, 4).mean((2, 4), dtype=np.float32)
    brighter = places[:, :, 1:] > places[:, :, :-1]
    return np.packbits(brighter.reshape(-1, 64), axis=1).view(np.uint64).ravel()


def _edges(grey):
    """The steps to the right and down in (n, 32, 36) pictures: (n, 2, 31, 35)."""
    right = np.diff(grey, axis=2)[:, 1:, :]
    down = np.diff(grey, axis=1)[:, :, 1:]
    return np.stack([right, down], axis=1)


def _correlation(one, other):
    """How well the edges of n pairs of pictures agree: (n,), 1 for the same picture."""
    # Without the mean there is no even slope of light, which a hundred skies have in common.
    one = one - one.mean((2, 3), keepdims=True)
    other = other - other.mean((2, 3), keepdims=True)
    covariance = (one * other).mean((1, 2, 3))
    strength_of_one = np.maximum(one.std((1, 2, 3)), MIN_EDGE)
    strength_of_other = np.maximum(other.std((1, 2, 3)), MIN_EDGE)
    return covariance / (strength_of_one * strength_of_other)


def _correlation_when_moved(one, other):
    """The best correlation of n pairs of (32, 36) pictures after a small shift and zoom: (n,)."""
    best = np.full(len(one), -1, np.float32)
    shifts = range(-MAX_SHIFT, MAX_SHIFT + 1)
    for first, second in ((one, other), (_zoomed(one), other), (one, _zoomed(other))):
        first, second = _edges(first), _edges(second)
        for down, right in itertools.product(shifts, shifts):
            overlap = _cut(first, down, right), _cut(second, -down, -right)
            best = np.maximum(best, _correlation(*overlap))
    return best


def _cut(pictures, down, right):
    """(…, height, width) pictures without their first `down` rows and `right` columns.

    A negative number leaves out the last ones instead.
    """
    height, width = pictures.shape[-2:]
    rows = slice(max(down, 0), height + min(down, 0))
    columns = slice(max(right, 0), width + min(right, 0))
    return pictures[..., rows, columns]


def _zoomed(grey):
    """The middle of (n, 32, 36) pictures, enlarged to the same size."""
    height, width = grey.shape[1:]
    return _zoom_matrix(height) @ grey @ _zoom_matrix(width).T


def _zoom_matrix(size):
    """(size, size): each row mixes a pixel of the enlarged line from the two that are nearest."""
    pixels, centre = np.arange(size), (size - 1) / 2
    places = centre + (pixels - centre) / ZOOM
    distances = np.abs(places[:, None] - pixels)
    return np.maximum(1 - distances, 0).astype(np.float32)


def _sharpness(grey):
    """How much of the edges of (n, 32, 36) pictures is fine detail: (n,), about 1 for photos."""
    steps = _edges(grey)
    steps -= steps.mean((2, 3), keepdims=True)
    return np.diff(steps, axis=3).std((1, 2, 3)) / np.maximum(steps.std((1, 2, 3)), MIN_EDGE)


# ---- Which photo goes where ----------------------------------------------------------------------


def split_sizes(count, val_size, test_size):
    """How many of `count` photos each split gets, test being a share of what validation leaves."""
    validation = int(val_size * count)
    test = int(test_size * (count - validation))
    return {"train": count - validation - test, "validation": validation, "test": test}


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


def assign_splits(photos, classes, options):
    """Draw the split of every usable photo, copies together.

    Raises Stop, naming the class, where one is too small.
    """
    for name in classes:
        usable = [photo for photo in photos if photo.class_name == name and not photo.problem]
        groups = list({id(photo.together): photo.together for photo in usable}.values())
        sizes = split_sizes(len(usable), options.val_size, options.test_size)
        if len(groups) < len(SPLITS) or not all(sizes.values()):
            left_out = [photo for photo in photos if photo.class_name == name and photo.problem]
            raise Stop(_too_small(name, usable, groups, left_out, options))
        # A new class leaves the splits of the others as they were.
        rng = random.Random(raw_name(f"{options.seed}/{name}"))
        deal(rng.sample(groups, len(groups)), sizes)


def _too_small(name, usable, groups, left_out, options):
    """The message for a class that cannot fill three splits."""
    needed = next(
        count
        for count in itertools.count(3)
        if all(split_sizes(count, options.val_size, options.test_size).values())
    )
    ways = ["Add photos to it", "remove it"]
    if len(usable) < needed:
        lack = f"has {len(usable)} usable photos; three splits need {needed}, "
        lack += f"so {needed - len(usable)} more."
        ways.append("choose larger --val-size and --test-size")
    else:
        lack = f"its {len(usable)} photos are only {len(groups)} groups of copies and folders; "
        lack += f"three splits need {len(SPLITS)}, so {len(SPLITS) - len(groups)} more."
    if left_out:
        lack += printable(f" {left_out[0].source}: {left_out[0].problem}.")
    if options.copies == "similar" and any(len(photo.copies) > 1 for photo in usable + left_out):
        ways.append("count only identical files as copies with --copies identical")
    return f"class {printable(name)}: {lack}\n{', '.join(ways[:-1])}, or {ways[-1]}."


# ---- All or nothing ------------------------------------------------------------------------------
# The new split is built in a hidden folder. Its split.csv comes last and in one step, and from then
# on the new split counts: a run killed before has changed nothing, and after it the next run moves
# the rest into place. All old folders leave before the first new one comes, so that old and new
# never stand side by side.

BUILDING = ".split.building"
RESULTS = (*SPLITS, "split.csv")
WAITING = "waiting"  # for their splits: where photos are in BUILDING until copies are found


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
    killed = (options.output / BUILDING).exists()  # a run, of which the next clears up first
    if present and not options.overwrite and not killed:
        held = f"{printable(options.output)}: already holds {', '.join(present)}."
        raise Stop(f"{held}\n--overwrite replaces them as a whole.")


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
            _move_into_place(output)  # what a killed run has left
            try:
                yield output / BUILDING
            finally:
                try:
                    _move_into_place(output)
                except BaseException:  # Ctrl-C between two moves: first the rest of them
                    _move_into_place(output)
                    raise
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds the split
                path.rmdir()


def move_to_splits(photos, classes, building):
    """Move every photo that is kept to its split, and remove the others."""
    for split, name in itertools.product(SPLITS, classes):
        (building / split / name).mkdir(parents=True)
    for photo in photos:
        if photo.split != "skipped":
            target = building / photo.split / photo.source
            target.parent.mkdir(parents=True, exist_ok=True)
            (building / WAITING / photo.source).rename(target)
    shutil.rmtree(building / WAITING)


def write_table(photos, path):
    """Write split.csv, a row for every file; names that are not UTF-8 keep their bytes."""
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with replace_when_whole(path) as partial_path, partial_path.open("w", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(("source", "class", "split", "sha256", "group", "reason", "note"))
        for photo in photos:
            note = "; ".join(filter(None, (photo.problem, photo.note)))
            place = (photo.source, photo.class_name, photo.split)
            writer.writerow((*place, photo.sha256, photo.group, photo.reason, note))


def _move_into_place(output):
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


# ---- A split that others made --------------------------------------------------------------------


def check_split(options):
    """Name the pictures that lie in several parts of a split, and those of several classes.

    Nothing is written. Raises Stop, with the exit code 1, where there are some.
    """
    source = options.source
    photos = _list_split(source)
    for _ in map_photos(photos, partial(_examine, source=source), "Checking"):
        pass
    find_copies(photos, only_identical=options.copies == "identical")
    groups = list({id(photo.copies): photo.copies for photo in photos}.values())
    leaks = [group for group in groups if len({photo.split for photo in group}) > 1]
    conflicts = [group for group in groups if group[0].in_conflict]
    damaged = [photo for photo in photos if photo.problem and not photo.in_conflict]
    for title, found in {"In several parts": leaks, "In several classes": conflicts}.items():
        print(f"{title}: {len(found)}")
        for group in found:
            print(" ", " = ".join(printable(photo.source) for photo in group))
    for photo in damaged:
        print(f"Not looked at: {printable(photo.source)}: {photo.problem}")
    if leaks or conflicts:
        remedy = "Remove all but one of each, or split anew what the parts hold."
        raise Stop(f"{printable(source)}: holds pictures that lie in two places.\n{remedy}", 1)


def _list_split(source):
    """A Photo for every file in source/part/class, the part being its split.

    Raises Stop where there are no two parts that share a class.
    """
    try:
        parts = {part: class_folders(source / part) for part in class_folders(source)}
        counts = Counter(itertools.chain.from_iterable(parts.values()))
        if max(counts.values(), default=0) < 2:
            remedy = "Name the folder that holds train/daisy, test/daisy, … with --check."
            raise Stop(
                f"{printable(source)}: is not split into parts with the same classes.\n{remedy}"
            )
        photos = []
        for part, name in [(part, name) for part, names in parts.items() for name in names]:
            found = _photos_in(source, f"{part}/{name}", name)
            for photo in found:
                photo.split = part
            photos += found
    except OSError as error:
        raise Stop(f"{printable(error.filename)}: {error.strerror}.\n{LAYOUT}") from error
    return photos


# ---- What is printed -----------------------------------------------------------------------------


def report(photos, classes, options):
    """Print what was noticed, at most eight lines of each kind, and the table of counts."""
    kinds = {
        "Skipped": [photo for photo in photos if photo.problem and not photo.in_conflict],
        "Label conflicts, left out": [photo for photo in photos if photo.in_conflict],
        "Kept with a note": [photo for photo in photos if photo.note and not photo.problem],
    }
    for title, noticed in kinds.items():
        if noticed:
            lines = [f"{photo.source}: {photo.problem or photo.note}" for photo in noticed[:8]]
            print(f"{title}: {len(noticed)} (see split.csv)", *map(printable, lines), sep="\n  ")
    counts = Counter((photo.class_name, photo.split) for photo in photos)
    _print_table(counts, classes)
    evaluated = ("validation", "test")
    fewest = min(itertools.product(classes, evaluated), key=lambda place: counts[place])
    if counts[fewest] < FEW:
        found = f"Only {counts[fewest]} of {printable(fewest[0])} in {fewest[1]}"
        print(f"{found}: with fewer than {FEW} photos a class an accuracy is a rough guess.")
    copied = sum(photo.split != "skipped" and not photo.linked for photo in photos)
    if options.link and copied:
        place = printable(options.output)
        print(f"{copied} photos were copied, as {place} cannot hold hard links to them.")


def show_next_step(output):
    """Print the command that trains on the split."""
    # Where Keras keeps InceptionV3's weights without the top once they are downloaded.
    weights = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    keras_home = os.path.expanduser(os.environ.get("KERAS_HOME", "~/.keras"))  # noqa: PTH111
    if not Path(keras_home, "models", weights).exists():
        print("ImageNet's weights (88 MB) are downloaded first; --weights none does without them.")
    training = beside_this_script("model_training_and_visualization.py")
    print(f"Next: {pasteable('python', training, '--data', output)}")


def _print_table(counts, classes):
    """Print how many photos of each class are in each split, and how many are skipped."""
    columns, width = (*SPLITS, "skipped"), max(len(printable(name)) for name in classes)
    print(" " * width, *(f"{column:>10}" for column in columns))
    for name in classes:
        row = (f"{counts[name, column]:>10}" for column in columns)
        print(f"{printable(name):{width}}", *row)


# ==================================================================================================
# The workshop: options and messages, and what both scripts share. It can be skipped.
# ==================================================================================================

# ---- What both scripts share: how a run ends, and printing ---------------------------------------


class Stop(Exception):  # noqa: N818 (it ends a run, with or without an error)
    """Ends a run with a message of one to three lines that names the file and the remedy."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def raw_name(path):
    """The bytes of a name: those on disk, which may be no UTF-8, or UTF-8."""
    lone = "backslashreplace" if os.name == "nt" else "surrogateescape"
    return os.fsdecode(path).encode("utf-8", lone)


def printable(path):
    """A path as it can be printed on one line, whatever its name holds."""
    text = raw_name(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def pasteable(*words):
    """A command of these words as a shell takes it."""
    words = [os.fsdecode(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def failure_message(error):
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


def run(main):
    """What main() returns; ends the process with a message and an exit code if it does not succeed.

    The code is 1 after an I/O or runtime failure, 2 on bad input, 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    _open_missing_streams()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about a photo is said by name
    try:
        with _unwound_by_sigterm():
            result = main()
            sys.stdout.flush()
        return result
    except Stop as stop:
        message, exit_code = str(stop), stop.exit_code
    except KeyboardInterrupt:
        message, exit_code = "Stopped by Ctrl-C.", 130
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has left; an ordinary exit would complain about it
    except OSError as error:
        message, exit_code = failure_message(error), 1
    try:
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:  # the full disk is the one that we print to
        os._exit(exit_code)
    sys.exit(exit_code)


def _open_missing_streams():
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
def _unwound_by_sigterm():
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


def beside_this_script(name):
    """The path of a file in this script's folder, as short as a shell in this place takes it."""
    path = Path(__file__).parent / name
    with contextlib.suppress(ValueError):  # on another drive
        path = Path(os.path.relpath(path))
    return path


def cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_photos(photos, function, description):
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


# ---- What both scripts share: photos -------------------------------------------------------------

# The still pictures that Pillow decodes without starting another program. What is inside counts,
# whatever the suffix says: web photos often carry a wrong one.
PHOTO_FORMATS = (
    *("JPEG", "PNG", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "GIF"),
    *("JPEG2000", "TGA", "QOI", "ICO", "PCX", "SGI"),
)
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".webp", ".avif", ".gif", ".jp2", ".j2k", ".tga", ".qoi", ".ico", ".pcx"),
    *(".sgi", ".mpo", ".apng"),
)
MAX_PIXELS = 90_000_000  # that are decoded; a JPEG of more is decoded at a smaller scale
# Pillow refuses what has over twice as many, and may not fit into memory.
Image.MAX_IMAGE_PIXELS = 250_000_000
# Pillow refuses a PNG for more text, or a larger colour profile, than this many bytes.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28


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


def decode(data, at_least=None, mode="RGB"):
    """The bytes of a photo as a Pillow image of mode RGB or L (grey), and a note about it or "".

    See read_photo. Raises ValueError, saying why, if they are no photo or not whole.
    """
    try:
        image, note = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS), ""
        if not at_least and image.width * image.height > MAX_PIXELS:
            at_least = min(image.size) // 2
        if at_least:
            image.draft(mode, (at_least, at_least))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block does not make the pixels worse
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow would clip at 255
            image, note = _in_8_bits(image)
        if image.has_transparency_data:  # is laid on white
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert(mode), note
    except Image.DecompressionBombError:
        reason = f"is too large, over {MAX_PIXELS:,} pixels"
    except Image.UnidentifiedImageError:
        reason = "is no image that can be read" if data else "is empty"
    except Exception as error:  # each of Pillow's decoders has its own ways to fail
        reason = f"is damaged or cut off ({error})"
    raise ValueError(reason)


def read_photo(path, at_least=None):
    """Decode a photo as a person sees it, EXIF rotation applied: (height, width, 3) uint8 RGB.

    With `at_least=pixels` a JPEG comes at the smallest of its scales 1, 1/2, 1/4, 1/8 that keeps
    both sides that long, and one of over 90 million pixels at a half. Raises Stop, naming the file
    and the reason, if it is no whole photo.
    """
    try:
        image, _ = decode(_read_bytes(Path(path)), at_least)
    except ValueError as error:
        raise Stop(f"{printable(path)}: {error}") from error
    return np.array(image)


def _read_bytes(path):
    """The bytes of a regular file. Raises ValueError, saying why, for all else."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        reason = "is a folder or a device, not a photo"  # a FIFO would keep its reader waiting
    except OSError as error:
        reason = "is a broken link" if path.is_symlink() else error.strerror
    raise ValueError(reason)


def _in_8_bits(image):
    """A grey picture of more than 8 bits a pixel in 8 bits, and a note on how.

    Which number means white is rarely said, so the brightest pixel becomes white.
    """
    samples = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
    brightest = samples.max()
    samples = np.clip(samples * (255 / brightest), 0, 255) if brightest > 0 else samples * 0
    note = f"has more than 8 bits: its brightest pixel, {brightest:g}, is taken for white"
    return Image.fromarray(samples.round().astype(np.uint8)), note


# ---- What both scripts share: files that are written whole or not at all -------------------------


@contextlib.contextmanager
def locked(path, message):
    """Hold the lock file `path` during the block. Raises Stop(message) if another process holds it.

    The system lets go of it however this process ends.
    """
    try:
        if os.name == "nt":
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            handle = _open_and_lock(path)
    except (BlockingIOError, FileExistsError) as error:
        raise Stop(message) from error
    try:
        yield
    finally:
        if os.name != "nt":  # where the file goes with its handle
            Path(path).unlink(missing_ok=True)
        os.close(handle)


def _open_and_lock(path):
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
    _remove_partial_files(path)
    partial_path = path.with_name(f".partial{os.getpid()}-{path.name}")
    try:
        yield partial_path
        partial_path.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        partial_path.unlink(missing_ok=True)


def _remove_partial_files(path):
    """Remove what a killed process has left of writing `path`, and nothing that one is writing."""
    for left_behind in path.parent.glob(f".partial[0-9]*-{glob.escape(path.name)}"):
        process = int(left_behind.name.removeprefix(".partial").partition("-")[0])
        with contextlib.suppress(PermissionError):  # another user is writing it, or on Windows any
            with contextlib.suppress(ProcessLookupError):
                if os.name != "nt":  # where the question would end the process
                    os.kill(process, 0)
                    continue
            left_behind.unlink(missing_ok=True)


# ---- Options -------------------------------------------------------------------------------------


def parse_options(words=None):
    """Read and check the command line, or the words of one."""
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
    add("--check", action="store_true", help="look for copies in SOURCE, which is split already")
    add("--link", action="store_true", help="make hard links instead of copies")
    options = parser.parse_args(words)
    for option, size in (("--val-size", options.val_size), ("--test-size", options.test_size)):
        if not 0.01 <= size <= 0.99:
            remedy = "Choose one from 0.01 to 0.99, such as 0.15."
            raise Stop(f"{option} {size}: is no share of the photos.\n{remedy}")
    return options


if __name__ == "__main__":
    run(lambda: main(parse_options()))

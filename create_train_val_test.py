"""Split a folder of photos into train, validation and test so that no picture is in two of them.

    python create_train_val_test.py [SOURCE] [--output DIR] [--val-size 0.15] [--test-size 0.2]

    SOURCE/daisy/one.jpg …      DIR/train/daisy/one.jpg …
           rose/two.jpg …           validation/rose/two.jpg …
                                    test/…
                                    split.csv

A model that has seen a test photo in training remembers it, and its test accuracy is a lie.
Collections from the web hold many photos twice: the same file, or the same picture at another size,
quality or tint, cut a little, mirrored or turned. Such copies form a group, which goes to one split
as a whole, and so do the photos of a folder inside a class, as of one patient or one video. A
picture that is filed under two classes is left out, as one label must be wrong. split.csv tells for
every file where it went and why. With --check, the parts of a set that others have split are
searched for copies, and nothing is written.

The first half is the chapter, in the order of a run. The second half, the workshop, can be skipped:
what both scripts share, and how two pictures are compared.
"""

import argparse
import contextlib
import csv
import errno
import glob
import hashlib
import io
import itertools
import math
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
from functools import lru_cache, partial
from pathlib import Path

SPLITS = ("train", "validation", "test")
# With fewer photos of a class in validation or test, one is over ten percent of its accuracy.
FEW = 10
THUMBNAIL = 32  # pixels, the side of what copies are found by
BUILDING = ".split.building"  # the hidden folder in which a split is built
WAITING = "waiting"  # the folder in it where photos wait for their split until copies are found


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
        find_copies(photos, options.source, only_identical=options.copies == "identical")
        join_groups(photos)
        assign_splits(photos, classes, options)
        move_to_splits(photos, building)
        write_table(photos, building / "split.csv")
    report(photos, classes, options)
    show_next_step(options.output)


# ---- Options, which are read before the libraries load: --help need not wait ---------------------


def parse_options(words=None):
    """The options of the command line, or of these words. Ends the process where they are wrong."""
    summary = (__doc__ or "").partition("\n")[0]  # python -OO drops it
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    add = parser.add_argument
    folder, size = {"type": Path, "metavar": "DIR"}, {"type": _share, "metavar": "SHARE"}
    source = "one folder of photos per class (default: flowers)"
    add("source", nargs="?", type=Path, default="flowers", metavar="SOURCE", help=source)
    add("--output", **folder, default=".", help="where the three folders go (default: here)")
    add("--val-size", **size, default=0.15, help="of the photos (default: 0.15)")
    add("--test-size", **size, default=0.2, help="of what validation leaves (default: 0.2)")
    seed = "another seed, another split (default: 0)"
    add("--seed", type=int, default=0, metavar="N", help=seed)
    copies = "what are copies: what looks the same, or the same bytes only (default: similar)"
    add("--copies", choices=("similar", "identical"), default="similar", help=copies)
    add("--overwrite", action="store_true", help="replace the split that is in DIR")
    add("--check", action="store_true", help="look for copies in SOURCE, which is split already")
    add("--link", action="store_true", help="make hard links instead of copies")
    return parser.parse_args(words)


def _share(word):
    if not 0.01 <= float(word) <= 0.99:
        raise argparse.ArgumentTypeError(f"{word} is none from 0.01 to 0.99, such as 0.15")
    return float(word)


if __name__ == "__main__":
    OPTIONS = parse_options()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's would wait for each other

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image, ImageOps, PngImagePlugin  # noqa: E402

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
        classes = [name for name in folders if len(folders.keys() & folders[name]) < 2]
        names = _in_order(path.name for path in source.iterdir())
        photos = [Photo(name, problem="is in no class") for name in names if name not in classes]
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


def _photos_in(source, below, class_name):
    """A Photo for every file of the class in source/below; those of one folder there stay together.

    A link to a folder is not followed, as it may lead in a circle.
    """
    paths = (source / below).rglob("*")
    files = [path for path in paths if path.is_symlink() or not path.is_dir()]
    photos = []
    for place in _in_order(path.relative_to(source).as_posix() for path in files):
        folder, slash, _ = place.removeprefix(f"{below}/").partition("/")
        photos.append(Photo(place, class_name, f"{below}/{folder}" if slash else ""))
    return photos


def _in_order(names):
    """Names sorted in an order that depends on no locale."""
    return sorted(names, key=raw_name)


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
            original = path.stat()
            os.utime(target, ns=(original.st_atime_ns, original.st_mtime_ns))
    except OSError as error:
        error.filename = os.fspath(target)  # which a full disk does not name
        raise


def _examine(photo, source):
    """The bytes of a photo that decodes in full, else None; note what was found."""
    path = source / photo.source
    try:
        if any(map(is_hidden, Path(photo.source).parts)):
            raise ValueError("is hidden")
        if not is_photo(path) and path.is_file():  # such as a film, which need not be read
            raise ValueError(NO_PHOTO)
        data = _read_bytes(path)
        photo.sha256 = hashlib.sha256(data).hexdigest()
        grey, photo.note = decode(data, at_least=2 * THUMBNAIL, mode="L")
        square = without_frame(grey).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
        photo.thumbnail = square.tobytes()
        return data
    except ValueError as error:
        photo.problem = str(error)
        return None


# ---- Copies of one picture -----------------------------------------------------------------------
# Three looks, each closer than the one before. The outlines of all photos are correlated with those
# of all others, also mirrored and turned, in a matrix product; then at their best small shift, turn
# or zoom (the tangent distance of Simard, LeCun and Denker, 1993). The thumbnails of those pairs
# that are left are aligned. Where they agree, both photos are read once more, aligned and compared
# block by block: two shirts on one sheet have one outline in one place, but not the same folds.

MIN_OUTLINE_CORRELATION = 0.8
MIN_TANGENT_CORRELATION = 0.915
REACH = 32  # pairs of a photo to look at; more would take quadratic time


def outlines(thumbnails):
    """What of (n, 32, 32) grey thumbnails a shift hardly changes: (n, 16, 16), of length 1.

    It is a difference of two blurs: neither fine detail nor the light as a whole.
    """
    fine, coarse = _blur(1.5), _blur(4)
    grey = thumbnails.astype(np.float32)
    return _of_length_1(fine @ grey @ fine.T - coarse @ grey @ coarse.T)


def likely_pairs(found):
    """Every (one, other, turn) of (n, 16, 16) outlines of which `one`, turned, may be `other`."""
    flat, pairs = found.reshape(len(found), -1), []
    batch = 64  # at once is six times as fast as one by one
    tangents_of_batch = lru_cache(64)(lambda k: _tangents(found[k * batch : (k + 1) * batch]))

    def tangents_of(index):
        return tangents_of_batch(index // batch)[index % batch]

    for one, others in _correlated(found):
        views = in_all_turns(found[one]).reshape(8, -1, 1)
        moved = in_all_turns(tangents_of(one)).reshape(8, -1, flat.shape[1])
        theirs = np.stack([tangents_of(other).reshape(len(moved[0]), -1) for other in others])
        # Of the two, moved a little, either may come nearer to the other: (8, others).
        there = np.linalg.norm(moved @ flat[others].T, axis=1)
        back = np.linalg.norm(theirs @ views[:, None], axis=(2, 3))
        closeness = np.maximum(there, back)
        best = np.argsort(-closeness, axis=None, kind="stable")[:REACH]
        best = best[closeness.flat[best] >= MIN_TANGENT_CORRELATION]
        turns, places = np.unravel_index(best, closeness.shape)
        chosen = np.stack([others[places], turns], axis=1).tolist()
        pairs += [(one, other, turn) for other, turn in chosen]
    return pairs


def same_pictures(photos, source):
    """Yield (one, other, in_place) for the indices of each two photos that show one picture.

    in_place: whether it is neither mirrored nor turned, and in the same colours.
    """
    thumbnails = np.frombuffer(b"".join(photo.thumbnail for photo in photos), np.uint8)
    thumbnails = thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL)
    # About 50 MB: where one photo is like many, it is not decoded for each of them.
    view = lru_cache(1000)(lambda index: close_view(source / photos[index].source))

    def compare(pair):
        one, other, turn = pair
        warp = align_thumbnails(turned(thumbnails[one], turn), thumbnails[other])
        if warp is None:
            return False, False
        return look_closer(turned(view(one), turn), view(other), warp)

    pairs = likely_pairs(outlines(thumbnails))
    results = map_photos(pairs, compare, "Comparing likely copies")
    for (one, other, turn), (is_same, in_same_colours) in zip(pairs, results, strict=True):
        if is_same:
            yield one, other, turn == 0 and in_same_colours


def star_groups(count, pairs):
    """Group the numbers below `count`: each group is one of them, and all that are paired with it.

    It is no chain in which each resembles the next: in that way all frames of a video would be
    copies of each other. The number with the most pairs comes first; one of which all others of its
    pairs are in groups already joins one of these.
    """
    alike = [set() for _ in range(count)]
    for one, other in pairs:
        alike[one].add(other)
        alike[other].add(one)
    groups, group_of = [], {}
    for hub in sorted(range(count), key=lambda index: (-len(alike[index]), index)):
        if hub not in group_of:
            free = {index for index in alike[hub] if index not in group_of}
            group = [] if free or not alike[hub] else group_of[min(alike[hub])]
            groups += [] if group else [group]
            group += [hub, *free]
            group_of |= dict.fromkeys([hub, *free], group)
    return [sorted(group) for group in groups]


def find_copies(photos, source, only_identical=False):
    """Bring the copies among the whole photos together, and note label conflicts among them.

    What is mirrored, turned or in other colours is no conflict, as 6 and 9 are none: under another
    class it is no copy.
    """
    same_bytes = {}
    for photo in photos:
        if not photo.problem:
            same_bytes.setdefault(photo.sha256, []).append(photo)
    files = list(same_bytes.values())
    one_of_each = [same[0] for same in files]
    found = [] if only_identical or len(files) < 2 else same_pictures(one_of_each, source)
    pairs = [
        (one, other)
        for one, other, in_place in found
        if in_place or one_of_each[one].class_name == one_of_each[other].class_name
    ]
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


def join_groups(photos):
    """Bring together what must go to one split, copies and photos of one folder; number the groups.

    Where a group of copies and a folder overlap, they become one.
    """
    folders = {}
    for photo in photos:
        if photo.folder and not photo.problem:
            folders.setdefault(photo.folder, []).append(photo)
    for relatives in (*(photo.copies for photo in photos), *folders.values()):
        parts = _distinct(photo.together for photo in relatives)
        joined = list(itertools.chain.from_iterable(parts))
        for photo in joined:
            photo.together = joined
    groups = _distinct(photo.together for photo in photos if len(photo.together) > 1)
    for number, group in enumerate(groups, start=1):
        for photo in group:
            photo.group = number


def _distinct(groups):
    """The lists, each of them once."""
    return list({id(group): group for group in groups}.values())


def _blur(sigma):
    """(16, 32): each row averages 32 pixels around one of 16 places, by a bell curve."""
    pixels = np.arange(THUMBNAIL, dtype=np.float32)
    places = pixels.reshape(-1, 2).mean(axis=1)
    weights = np.exp(-((places[:, None] - pixels) ** 2) / (2 * sigma**2))
    return weights / weights.sum(axis=1, keepdims=True)


def _of_length_1(pictures):
    """(n, side, side) pictures, so scaled that the product of two is their correlation."""
    lengths = np.linalg.norm(pictures, axis=(1, 2), keepdims=True)
    return pictures / np.maximum(lengths, 1e-3)


def _correlated(found):
    """Yield (one, others): the later ones of (n, 16, 16) outlines that it is like in any turn."""
    small = _of_length_1(found.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)))
    flat = small.reshape(-1, 64)
    for start in range(0, len(small), 64):
        views = in_all_turns(small[start : start + 64])  # (8, 64, 8, 8)
        correlations = views.reshape(-1, 64) @ flat[start:].T
        is_like = correlations.reshape(8, -1, len(flat) - start) >= MIN_OUTLINE_CORRELATION
        is_like = np.triu(is_like.any(axis=0), 1)  # each pair once, and no photo with itself
        for row in np.flatnonzero(is_like.any(axis=1)).tolist():
            yield start + row, start + np.flatnonzero(is_like[row])


def _tangents(found):
    """What (n, 16, 16) outlines become when shifted, enlarged or turned a little: (n, 5, 16, 16).

    The five are of length 1 and at right angles. The length of another outline's projection on
    them is its correlation with the most similar of all that they add up to.
    """
    down, right = np.gradient(found, axis=(1, 2))
    y, x = np.mgrid[-1:1:16j, -1:1:16j].astype(np.float32)
    moved = [found, down, right, y * down + x * right, x * down - y * right]
    basis, _ = np.linalg.qr(np.stack(moved, axis=-1).reshape(len(found), -1, len(moved)))
    return basis.swapaxes(1, 2).reshape(len(found), len(moved), *found.shape[1:])


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
        groups = _distinct(photo.together for photo in usable)
        sizes = split_sizes(len(usable), options.val_size, options.test_size)
        if len(groups) < len(SPLITS) or not all(sizes.values()):
            left_out = [photo for photo in photos if photo.class_name == name and photo.problem]
            raise Stop(_too_small(name, usable, groups, left_out, options))
        # A new class leaves the splits of the others as they were.
        rng = random.Random(raw_name(f"{options.seed}/{name}"))
        deal(rng.sample(groups, len(groups)), sizes)


def _too_small(name, usable, groups, left_out, options):
    """The message for a class that cannot fill three splits."""
    sizes = (split_sizes(n, options.val_size, options.test_size) for n in itertools.count())
    needed = next(sum(size.values()) for size in sizes if all(size.values()))
    lack = f"has {len(usable)} usable photos; three splits need {needed}"
    missing = needed - len(usable)
    if missing <= 0:
        lack = f"its {len(usable)} photos are only {len(groups)} groups of copies and folders"
        missing = len(SPLITS) - len(groups)
    example = printable(f" {left_out[0].source}: {left_out[0].problem}." if left_out else "")
    return (
        f"class {printable(name)}: {lack}, so {missing} more.{example}\nAdd photos to it, remove "
        "it, or choose larger --val-size and --test-size, or --copies identical."
    )


# ---- All or nothing ------------------------------------------------------------------------------
# The new split is built in a hidden folder. Its split.csv comes last and in one step, and from then
# on the new split counts: a run killed before has changed nothing, and after it the next run moves
# the rest into place. All old folders leave before the first new one comes, so that old and new
# never stand side by side.

RESULTS = (*SPLITS, "split.csv")


def refuse_overlap(source, classes, output):
    """Raise Stop if the splits would land among the source's photos or take their place."""

    def inside(path, folder):  # compared as files, as some systems take "Flowers" for "flowers"
        places = (path.resolve(), *path.resolve().parents)
        return any(p.samefile(folder) for p in places if p.exists() and folder.exists())

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
                _move_into_place(output)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds the split
                path.rmdir()


def move_to_splits(photos, building):
    """Move every photo that is kept to its split, and remove the others."""
    kept = [photo for photo in photos if photo.split != "skipped"]
    folders = {Path(photo.split, photo.source).parent for photo in kept}
    for folder in folders:
        (building / folder).mkdir(parents=True, exist_ok=True)
    for photo in kept:
        (building / WAITING / photo.source).rename(building / photo.split / photo.source)
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
    with ctrl_c_waits():
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
    find_copies(photos, source, only_identical=options.copies == "identical")
    groups = _distinct(photo.copies for photo in photos)
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

    Where two parts have usual names, such as train and test, no other folder is a part: the photos
    that the split was made of may lie beside them. Raises Stop where there are no two parts that
    share a class.
    """
    try:
        parts = {part: class_folders(source / part) for part in class_folders(source)}
        usual = {part: names for part, names in parts.items() if part.lower() in PARTS and names}
        parts = usual if len(usual) >= 2 else parts
        counts = Counter(itertools.chain.from_iterable(parts.values()))
        if max(counts.values(), default=0) < 2:
            remedy = "Name the folder that holds train/daisy, test/daisy, … with --check."
            raise Stop(
                f"{printable(source)}: is not split into parts with the same classes.\n{remedy}"
            )
        photos = []
        for part, names in parts.items():
            for name in names:
                photos += _photos_in(source, f"{part}/{name}", name)
    except OSError as error:
        raise Stop(f"{printable(error.filename)}: {error.strerror}.\n{LAYOUT}") from error
    for photo in photos:
        photo.split = photo.source.partition("/")[0]
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
# The workshop, which can be skipped: what both scripts share, and two pictures compared.
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
        # SIGTERM unwinds as Ctrl-C does, so that what is half written is removed.
        with _on_signals([signal.SIGTERM], lambda *_: sys.exit(143)):
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
def _on_signals(numbers, handler):
    """Let `handler` take these signals during the block, if they can interrupt this thread."""
    if threading.current_thread() is not threading.main_thread():  # which alone can be interrupted
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():  # as the process of a notebook lives on
            signal.signal(number, earlier or signal.SIG_DFL)  # none if no Python code has set it


@contextlib.contextmanager
def ctrl_c_waits():
    """Put Ctrl-C and SIGTERM off to the end of the block, which must not be left half done."""
    came = []
    with _on_signals((signal.SIGINT, signal.SIGTERM), lambda number, _: came.append(number)):
        yield
    for number in came[:1]:
        signal.raise_signal(number)


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
        with ctrl_c_waits():  # a second one would leave threads that write into what is cleared
            pool.shutdown(cancel_futures=True)  # after Ctrl-C only the photos in work are finished


# ---- What both scripts share: photos -------------------------------------------------------------

# The still pictures that Pillow decodes without starting another program. What is inside counts,
# whatever the suffix says: web photos often carry a wrong one, or none.
PHOTO_FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI", "PSD", "DIB"),
    *("ICO", "CUR", "ICNS", "DDS", "PCX", "SGI", "SUN", "MSP", "XBM", "XPM", "FITS", "TGA"),
)
NO_PHOTO = "holds no photo"
MAX_PIXELS = 90_000_000  # that are decoded; a JPEG of more is decoded at a smaller scale
# Pillow refuses what has over twice as many, and may not fit into memory.
Image.MAX_IMAGE_PIXELS = 250_000_000
# Pillow refuses a PNG for more text, or a larger colour profile, than this many bytes.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28


def is_hidden(name):
    """Whether a file or folder is not meant to be seen, such as .ipynb_checkpoints or __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_photo(path):
    """Whether a file has the suffix of a photo, even if it is damaged, or else begins as one."""
    if Image.registered_extensions().get(path.suffix.lower()) in PHOTO_FORMATS:
        return True
    try:
        if not path.is_file():  # a FIFO would keep its reader waiting
            return False
        with Image.open(path, formats=PHOTO_FORMATS):
            return True
    except Exception:  # each of Pillow's decoders has its own ways to fail
        return False


def class_folders(folder):
    """The sorted names of the visible folders in `folder`: its classes."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return [name for name in names if not is_hidden(name)]


def decode(data, at_least=None, mode="RGB"):
    """The bytes of a photo as a Pillow image of mode RGB or L (grey), and a note about it or "".

    See read_photo. Raises ValueError, saying why, if they are no photo or not whole.
    """
    try:
        image, note = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS), ""
        excess = image.width * image.height / MAX_PIXELS
        if not at_least and excess > 1:
            at_least = min(image.size) // 2 ** math.ceil(math.log(excess, 4))
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
        reason = NO_PHOTO if data else "is empty"
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
        with ctrl_c_waits():
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


# ---- Two pictures compared -----------------------------------------------------------------------
# Two pictures are laid on each other as by Evangelidis and Psarakis, "Parametric Image Alignment
# Using Enhanced Correlation Coefficient Maximization" (2008).

MIN_THUMBNAIL_CORRELATION = 0.8
# Of the blocks with detail a share may differ, and the others must correlate: the more closely the
# larger that share is, as under a watermark.
AGREEMENT = {0.2: 0.85, 0.3: 0.97}
IN_PLACE = np.eye(2, 3, dtype=np.float32)  # the map that moves nothing
CLOSE_SIZE, BLOCK = 128, 16  # pixels, the sides of the photos that are compared and of a block
MIN_CONTRAST = 2.0  # grey levels of 255 (standard deviation) of a block that has detail
WHITE = 250  # from where a brighter copy may have lost its detail
MIN_BLOCKS = 4  # that have detail; a bare sky has nothing to be known by
ALIGN_STEPS = 15
MAX_STRETCH = 0.15  # by which an alignment may stretch, turn (about 8 degrees) or shear
MIN_OVERLAP = 0.7  # of the area, after the alignment
MAX_GRAIN = 12  # grey levels by which the one colour of a frame around a photo may vary
MAX_FRAME = 0.1  # of the side; what is wider is the background of the picture
MIN_TINT = 6.0  # grey levels; a picture with less is grey
MIN_TINT_CORRELATION = 0.5


def turned(pictures, turn):
    """Square pictures (…, side, side), mirrored and turned in one of eight ways; 0 is as it is."""
    if turn & 1:
        pictures = pictures[..., ::-1]
    if turn & 2:
        pictures = pictures[..., ::-1, :]
    if turn & 4:
        pictures = pictures.swapaxes(-1, -2)
    return np.ascontiguousarray(pictures)


def in_all_turns(pictures):
    """All eight turns of square pictures (…, side, side): (8, …, side, side)."""
    return np.stack([turned(pictures, turn) for turn in range(8)])


def without_frame(image):
    """A picture without a frame of one colour and about one width around it."""
    row = image.crop((0, 0, image.width, 1)).convert("L").tobytes()
    top = np.frombuffer(row, np.uint8).astype(np.int16)
    # A few pixels of the frame may differ, as JPEG blurs the edge of the picture into it.
    if np.count_nonzero(np.abs(top - top[0]) > MAX_GRAIN) > 0.2 * len(top):  # none, as mostly
        return image
    is_picture = np.abs(np.asarray(image.convert("L"), np.int16) - top[0]) > MAX_GRAIN
    rows, columns = (np.flatnonzero(is_picture.mean(axis=axis) > 0.2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return image
    ends = (image.width - 1 - columns[-1], image.height - 1 - rows[-1])
    widths = tuple(map(int, (columns[0], rows[0], *ends)))
    is_even = 0 < max(widths) <= 3 * min(widths)
    is_frame = is_even and max(widths) <= MAX_FRAME * min(image.size)
    return ImageOps.crop(image, widths) if is_frame else image


def close_view(path):
    """A photo as (3, 128, 128) uint8 RGB, whatever its shape."""
    image = without_frame(decode(_read_bytes(path), at_least=2 * CLOSE_SIZE)[0])
    square = image.resize((CLOSE_SIZE, CLOSE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1)


def align_thumbnails(one, other):
    """The map of _align for two thumbnails that agree, aligned or as they are, else None."""
    details = [_detail(grey, 0.55, 2) for grey in (one, other)]
    for warp in (_align(one, other, IN_PLACE), IN_PLACE):
        moved, inside = _laid_on(details[1], warp)
        if _correlations(details[0][inside], moved[inside]) >= MIN_THUMBNAIL_CORRELATION:
            return warp
    return None


def look_closer(one, other, start):
    """Whether two close views show one picture, and whether in the same colours.

    start: the map of align_thumbnails. They are compared as they are first, as an alignment may
    lose its way where there is fine texture.
    """
    one, other = (np.ascontiguousarray(view.transpose(1, 2, 0)) for view in (one, other))
    grey_one, grey_other = (cv2.cvtColor(view, cv2.COLOR_RGB2GRAY) for view in (one, other))
    scale = np.array([1, 1, CLOSE_SIZE / THUMBNAIL], np.float32)
    for warp in (IN_PLACE, _align(grey_one, grey_other, start * scale)):
        moved, inside = _laid_on(other, warp)
        if _same_detail(grey_one, cv2.cvtColor(moved, cv2.COLOR_RGB2GRAY), inside):
            return True, _same_colours(one, moved, inside)
    return False, False


def _align(one, other, start):
    """The (2, 3) affine map by which one square grey picture shows what the other one shows.

    The search begins at `start`, which is the answer if it fails, or would stretch or turn too
    much.
    """
    until = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, ALIGN_STEPS, 1e-3)
    try:
        _, warp = cv2.findTransformECC(one, other, start.copy(), cv2.MOTION_AFFINE, until, None, 5)
    except cv2.error:  # it does not converge, as where one of them is plain
        return start
    is_near = np.abs(warp[:, :2] - np.eye(2)).max() <= MAX_STRETCH
    _, inside = _laid_on(other, warp)
    return warp if is_near and inside.mean() >= MIN_OVERLAP else start


def _laid_on(picture, warp):
    """A square picture moved by a map of _align, and where it then reaches: (side, side) bool."""
    size, flags = picture.shape[:2], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved, reach = (
        cv2.warpAffine(pixels, warp, size, flags=flags)
        for pixels in (picture, np.full(size, 255, np.uint8))
    )
    return moved, reach == 255


def _same_detail(one, other, inside):
    """Whether the blocks with fine detail agree in two aligned (128, 128) grey pictures.

    inside: where both are, as (128, 128) bool.
    """
    first, second = (_blocks(_detail(grey, 1, 4)) for grey in (one, other))
    contrasts = np.maximum(first.std(axis=1), second.std(axis=1))
    is_comparable = inside & (np.maximum(one, other) < WHITE)
    has_detail = (contrasts > MIN_CONTRAST) & (_blocks(is_comparable).mean(axis=1) > 0.9)
    if has_detail.sum() < MIN_BLOCKS:
        return False
    correlations = _correlations(first[has_detail], second[has_detail])
    quantiles = np.quantile(correlations, list(AGREEMENT))
    return bool((quantiles >= list(AGREEMENT.values())).any())


def _detail(grey, fine, coarse):
    """The difference of a picture's two blurs, of so many pixels each."""
    grey = grey.astype(np.float32)
    return cv2.GaussianBlur(grey, (0, 0), fine) - cv2.GaussianBlur(grey, (0, 0), coarse)


def _blocks(picture):
    """The blocks of a (128, 128) picture: (64, 256)."""
    count = CLOSE_SIZE // BLOCK
    return picture.reshape(count, BLOCK, count, BLOCK).swapaxes(1, 2).reshape(count**2, -1)


def _correlations(one, other):
    """The correlations along the last axis, 1 for the same picture in another light."""
    one = one - one.mean(axis=-1, keepdims=True)
    other = other - other.mean(axis=-1, keepdims=True)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(axis=-1) / np.maximum(lengths, 1e-3)


def _same_colours(one, other, inside):
    """Whether one (128, 128, 3) picture may be the other one tinted, or with less or no colour."""
    tints = []
    for picture in (one, other):
        smooth = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 2)
        tint = smooth[inside][:, [0, 2]] - smooth[inside][:, [1]]  # red and blue against green
        tints.append((tint - tint.mean(axis=0)).ravel())
    if min(tint.std() for tint in tints) < MIN_TINT:
        return True
    return bool(_correlations(*tints) >= MIN_TINT_CORRELATION)


if __name__ == "__main__":
    run(partial(main, OPTIONS))

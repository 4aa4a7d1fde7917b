"""Split a folder of photos into train, validation and test so that no picture is in two of them.

    python create_train_val_test.py [SOURCE] [--output DIR] [--val-size 0.15] [--test-size 0.2] [--seed 0]

    SOURCE/daisy/one.jpg …      DIR/train/daisy/one.jpg …
           rose/two.jpg …           validation/rose/two.jpg …
                                    test/…
                                    split.csv

A network that has seen a test photo in training remembers it, and its test accuracy is a lie. Collections from the web
hold many photos twice: the same file, or the same picture at another size, quality or tint. Such copies form a group,
which goes to one split as a whole. A picture that is filed under two classes is left out, as one label must be wrong.
split.csv tells for every file where it went and why.
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import os
import random
import shutil
import signal
import stat
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# ---- What both scripts share -----------------------------------------------------------------------------------------

# The types that Keras's ImageDataGenerator reads; it passes over all others without a word.
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff")
# What may be inside, whatever the suffix says: web photos often carry a wrong one. Nothing that starts another program.
PHOTO_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
Image.MAX_IMAGE_PIXELS = 45_000_000  # Pillow refuses what unpacks to over twice as many, and may not fit into memory


class Stop(Exception):  # noqa: N818 (it ends a run, with or without an error)
    """Ends a run with a message of one to three lines that names the file and the remedy."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def run(main):
    """Call main(); end the process with exit code 1 on I/O failure, 2 on bad input, 130 on Ctrl-C, 143 on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds as Ctrl-C does: what is half written is removed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about a photo is said once, by name
    try:
        main()
        sys.stdout.flush()
        return
    except Stop as stop:
        message, exit_code = str(stop), stop.exit_code
    except KeyboardInterrupt:
        message, exit_code = "Stopped by Ctrl-C.", 130
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has left; an ordinary exit would complain that it cannot be flushed
    except OSError as error:
        place, reason = error.filename2 or error.filename or "A file", error.strerror or str(error).partition("\n")[0]
        remedy = "Free some space and check the permissions there, or choose another place, then run it again."
        message, exit_code = f"{shown(place)}: {reason}.\n{remedy}", 1
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def shown(path):
    """A path as it can be printed on one line, whatever its name holds."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in os.fsdecode(path))


def read_photo(path, at_least=None):
    """Decode a photo as a person sees it, EXIF rotation applied: (height, width, 3) uint8 RGB, 0–255.

    With `at_least=pixels` a JPEG comes at the smallest of its scales 1, 1/2, 1/4, 1/8 that keeps both sides that long.
    Raises Stop, naming the file and the reason, if it is no photo or not whole.
    """
    try:
        return np.array(decode(read_bytes(Path(path)), at_least))
    except ValueError as error:
        raise Stop(f"{shown(path)}: {error}") from error


def read_bytes(path):
    """The bytes of a regular file. Raises ValueError, saying why, for all else."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        reason = "is a folder or a device, not a photo"  # a FIFO would keep its reader waiting for ever
    except OSError as error:
        reason = "is a broken link" if path.is_symlink() else error.strerror
    raise ValueError(reason)


def decode(data, at_least=None, mode="RGB"):
    """The bytes of a photo as a Pillow image of mode RGB or L (grey); see read_photo. Raises ValueError, saying why."""
    try:
        image = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
        if at_least:
            image.draft(mode, (at_least, at_least))
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block does not make the pixels worse
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow would clip at 255
            samples = np.nan_to_num(np.asarray(image, np.float32))
            top = 65535 if ";16" in image.mode else next((top for top in (1, 255) if samples.max() <= top), 65535)
            image = Image.fromarray(np.clip(samples * (255 / top), 0, 255).round().astype(np.uint8))
        if image.has_transparency_data:  # is laid on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode)
    except Image.DecompressionBombError:
        reason = f"is too large, over {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except Image.UnidentifiedImageError:
        reason = "is no image that can be read" if data else "is empty"
    except Exception as error:  # each of Pillow's decoders has its own ways to fail
        reason = f"is damaged or cut off ({error})"
    raise ValueError(reason)


def decode_photos(photos, function, description):
    """Yield function(photo) for every photo, in order, from threads on all cores; a terminal shows the progress."""
    photos, pool = list(photos), ThreadPoolExecutor(cores())
    try:
        results = pool.map(function, photos)
        if sys.stderr.isatty():
            from rich.console import Console  # only here, as it takes as long to import as 100 photos to check
            from rich.progress import track

            results = track(results, description, len(photos), console=Console(stderr=True))
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the photos in work are finished


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def replace_when_whole(path):
    """Yield a temporary path beside `path` to write to; it takes the place of `path` only when the block succeeds.

    Its name keeps all suffixes, as Keras goes by them, and tells the process, so that the next one can clear up.
    """
    path = Path(path)
    for left_behind in path.parent.glob(f".partial[0-9]*-{glob.escape(path.name)}"):
        with contextlib.suppress(PermissionError):  # another user is writing it, or somebody on Windows
            with contextlib.suppress(ProcessLookupError):
                if os.name != "nt":  # where the question would end the process
                    os.kill(int(left_behind.name.removeprefix(".partial").partition("-")[0]), 0)
                    continue
            left_behind.unlink(missing_ok=True)
    partial_path = path.with_name(f".partial{os.getpid()}-{path.name}")
    try:
        yield partial_path
        partial_path.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        partial_path.unlink(missing_ok=True)


def class_folders(folder):
    """The sorted names of the visible folders in `folder`: its classes."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [name for name in names if not name.startswith(".") and name != "__MACOSX"]


# ---- The files of SOURCE ---------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")
LAYOUT = "Name a folder that you may read, with a folder of photos for each class: flowers/daisy, flowers/rose, …"


@dataclass(eq=False)
class Photo:
    """A file seen in SOURCE: a row of split.csv, and what copies are found by."""

    source: str  # its path below SOURCE, with forward slashes
    class_name: str = ""
    split: str = "skipped"
    sha256: str = ""
    group: int | str = ""
    note: str = ""  # why it is skipped; of a photo in a group, the label conflict
    thumbnail: bytes = b""  # 32 rows of 36 grey pixels
    linked: bool = False

    def __post_init__(self):
        self.copies = [self]  # a list that all copies of one picture share


def list_files(source):
    """The class names, and a Photo for every file in SOURCE and its class folders. Raises Stop for less than two."""
    try:
        folders = {name: class_folders(source / name) for name in class_folders(source)}
        # The Kaggle download once held the whole set a second time, as flowers/flowers.
        nested = [name for name in folders if len(folders.keys() & folders[name]) >= 2]
        classes = [name for name in folders if name not in nested]
        photos = [Photo(path.name) for path in sorted(source.iterdir()) if path.name not in classes]
        for photo in photos:
            photo.note = "is a nested copy of the whole set" if photo.source in nested else "lies beside the classes"
        files = [(name, path.name) for name in classes for path in (source / name).iterdir()]
        photos += [Photo(f"{name}/{file}", name) for name, file in sorted(files)]
    except OSError as error:  # it is missing, or a file, or may not be read
        raise Stop(f"{shown(error.filename)}: {error.strerror}.\n{LAYOUT}") from error
    if len(classes) < 2:
        remedy = next((f"Try {shown(source / name)}." for name in folders if len(folders[name]) >= 2), LAYOUT)
        raise Stop(f"{shown(source)}: two classes are needed, {len(classes)} found.\n{remedy}")
    return classes, photos


def examine(photo, source, folder, link):
    """Copy the photo from `source` into `folder` if it decodes in full; note in it what was found, or what is wrong."""
    path, target = source / photo.source, folder / photo.source
    try:
        if path.name.startswith("."):
            raise ValueError("is a hidden file")
        if path.suffix.lower() not in PHOTO_SUFFIXES and not path.is_dir():
            raise ValueError(f"is of type {path.suffix or 'none'}, which Keras does not read")
        data = read_bytes(path)
        photo.sha256 = hashlib.sha256(data).hexdigest()
        grey = decode(data, at_least=2 * max(THUMBNAIL), mode="L")
        photo.thumbnail = grey.resize(THUMBNAIL, Image.Resampling.BILINEAR).tobytes()
        with contextlib.suppress(OSError):  # another file system, or one that has no hard links
            if link:
                os.link(path.resolve(), target)
                photo.linked = True
        if not photo.linked:
            target.write_bytes(data)
            os.utime(target, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    except ValueError as error:
        photo.note = str(error)
    except OSError as error:
        error.filename = os.fspath(target)  # which a full disk does not name
        raise


# ---- Copies of one picture -------------------------------------------------------------------------------------------
# A difference hash (Krawetz, "Kind of Like That", 2013) says for each of 8 × 8 places whether the picture gets brighter
# to the right. Size, quality, tint and loss of colour hardly change that, so copies are found among near-equal hashes.
# The edges of two thumbnails then decide. On 320 real flowers and 11 kinds of altered copies of each, copies correlated
# at 0.93 and more, two different photos at 0.53 and less, however alike their smooth backgrounds were.

MAX_DISTANCE = 6  # bits; holds 98 to 100 % of copies after any usual change of size, quality, tint or brightness
MIN_CORRELATION = 0.8
THUMBNAIL = (36, 32)  # width and height in pixels: four for each of the 9 × 8 places of a difference hash
MIN_EDGE = 2.0  # grey levels of 255; weaker edges do not tell a plain picture from another, only its bytes do
REACH = 64  # neighbours to compare in a crowded bucket; more would find little and cost quadratic time


def similar_pairs(hashes):
    """The (n, 2) index pairs of 64-bit hashes that differ in at most 6 bits; takes time linear in n.

    Six bits spoil at most six of the eight bytes, so two bytes are equal: for each of the 28 choices of two bytes, the
    hashes are sorted into 65,536 buckets, and only neighbours in a bucket are compared.
    """
    count, found = len(hashes), []
    by_value = np.argsort(hashes)  # so that the most alike are neighbours in every bucket
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


def same_pictures(thumbnails):
    """Yield the index pairs of (n, 32, 36) grey thumbnails that show one picture: alike in hash and in edges."""
    places = thumbnails.reshape(-1, 8, 4, 9, 4).mean((2, 4), dtype=np.float32)
    brighter = places[:, :, 1:] > places[:, :, :-1]
    pairs = similar_pairs(np.packbits(brighter.reshape(-1, 64), axis=1).view(np.uint64).ravel())
    for start in range(0, len(pairs), 1024):  # the edges of all at once would fill the memory
        block = pairs[start : start + 1024]
        grey = thumbnails[block].astype(np.float32)  # (pairs, 2, 32, 36)
        steps = [np.diff(grey, axis=axis).reshape(len(block), 2, -1) for axis in (2, 3)]
        # Without the mean there is no even slope of light, which a hundred skies have in common.
        edges = np.concatenate([step - step.mean(2, keepdims=True) for step in steps], axis=2)
        strength = np.maximum(edges.std(2), MIN_EDGE)
        correlation = (edges[:, 0] * edges[:, 1]).mean(1) / strength.prod(1)
        yield from block[correlation >= MIN_CORRELATION].tolist()


def find_copies(photos):
    """Bring copies together and number their groups; note a label conflict where a group lies in several classes."""
    thumbnails = np.frombuffer(b"".join(photo.thumbnail for photo in photos), np.uint8).reshape(-1, *THUMBNAIL[::-1])
    first_with = {}
    same_bytes = [(first_with.setdefault(photo.sha256, index), index) for index, photo in enumerate(photos)]
    for one, other in itertools.chain(same_bytes, same_pictures(thumbnails)):
        copies, more = photos[one].copies, photos[other].copies
        if copies is not more:
            copies += more
            for photo in more:
                photo.copies = copies
    groups = [photo.copies for photo in photos if photo.copies[0] is photo and len(photo.copies) > 1]
    for number, group in enumerate(groups, start=1):
        for photo in group:
            photo.group = number
            others = [other.source for other in group if other.class_name != photo.class_name]
            if others:
                photo.note = f"label conflict: the same picture as {', '.join(others)}"


# ---- Which photo goes where ------------------------------------------------------------------------------------------


def split_sizes(count, val_size, test_size):
    """How many of `count` photos each split gets, test being a share of what validation leaves."""
    validation = int(val_size * count)
    test = int(test_size * (count - validation))
    return {"train": count - validation - test, "validation": validation, "test": test}


def assign_splits(photos, classes, val_size, test_size, seed):
    """Draw the split of every usable photo, copies together. Raises Stop, naming the class, where one is too small."""
    needed = next(count for count in itertools.count(3) if all(split_sizes(count, val_size, test_size).values()))
    for name in classes:
        usable = [photo for photo in photos if photo.class_name == name and not photo.note]
        # Groups go, largest first and else in random order, where most places are free: copies mostly into train, and
        # single photos fill each split to exactly its size. The last ones go where there is nothing yet.
        rng = random.Random(f"{seed}/{name}")  # a new class leaves the splits of the others as they were
        groups = [photo.copies for photo in usable if photo.copies[0] is photo]
        groups = sorted(rng.sample(groups, len(groups)), key=len)
        free, empty = split_sizes(len(usable), val_size, test_size), list(SPLITS)
        while groups:
            split = max(empty if len(groups) <= len(empty) else SPLITS, key=free.get)
            empty = [other for other in empty if other != split]
            for photo in groups.pop():
                photo.split = split
                free[split] -= 1
        if len(usable) < needed or empty:
            skipped = [f" {photo.source} {photo.note}." for photo in photos if photo.class_name == name and photo.note]
            raise Stop(
                f"class {shown(name)}: has {len(usable)} usable photos, too few different ones for three splits; "
                f"it needs {needed}.{shown(''.join(skipped[:1]))}\n"
                "Add photos to it, remove it, or choose larger --val-size and --test-size."
            )


# ---- All or nothing --------------------------------------------------------------------------------------------------
# The new split is built in a hidden folder. Its split.csv comes last and in one step, and from then on the new split
# counts: a run killed before has changed nothing, and after it the next run moves the rest into place. All old folders
# leave before the first new one comes, so that old and new never stand side by side.

BUILDING = ".split.building"
RESULTS = (*SPLITS, "split.csv")


@contextlib.contextmanager
def only_run_in(output):
    """Keep other runs out of the folder and yield where to build; what is whole at the end comes into place."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    lock = output / ".split.lock"  # the system lets go of it however this run ends
    try:
        output.mkdir(parents=True, exist_ok=True)
        if os.name == "nt":
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            import fcntl

            handle = os.open(lock, os.O_CREAT | os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink == 0:
                raise BlockingIOError  # the run that held it has just deleted it
    except (BlockingIOError, FileExistsError, NotADirectoryError) as error:
        reason = "another run is writing there.\nWait for its end" if output.is_dir() else "is no folder.\nName one"
        raise Stop(f"{shown(output)}: {reason}, or choose another --output.") from error

    def leave():
        move_into_place(output)
        if os.name != "nt":
            lock.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):  # no folder is left behind by a run that came to nothing
            for path in made:
                path.rmdir()

    try:
        move_into_place(output)  # what a killed run has left
        yield output / BUILDING
    finally:
        with ThreadPoolExecutor() as undisturbed:  # as Ctrl-C stops the main thread only
            undisturbed.submit(leave).result()


def build(photos, classes, building, options):
    """Make the three folders and split.csv in `building`. All photos start in train, where most of them will stay."""
    for split, name in itertools.product(SPLITS, classes):
        (building / split / name).mkdir(parents=True)
    train = building / "train"
    check = partial(examine, source=options.source, folder=train, link=options.link)
    list(decode_photos([photo for photo in photos if not photo.note], check, "Checking and copying"))
    usable = [photo for photo in photos if not photo.note]
    find_copies(usable)
    assign_splits(photos, classes, options.val_size, options.test_size, options.seed)
    for photo in usable:
        if photo.note:  # a label conflict
            (train / photo.source).unlink()
        elif photo.split != "train":
            (train / photo.source).rename(building / photo.split / photo.source)
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with replace_when_whole(building / "split.csv") as partial_path, partial_path.open("w", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(("source", "class", "split", "sha256", "group", "note"))
        writer.writerows((it.source, it.class_name, it.split, it.sha256, it.group, it.note) for it in photos)


def move_into_place(output):
    """Put a split that is built in the place of the old one, even if a run was killed on the way; clear up."""
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


def parse_options():
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", nargs="?", default="flowers", metavar="SOURCE", help="one folder of photos per class")
    parser.add_argument("--output", default=".", metavar="DIR", help="where the three folders go (default: here)")
    parser.add_argument("--val-size", type=float, default=0.15, help="share of the photos (default: 0.15)")
    parser.add_argument("--test-size", type=float, default=0.2, help="share of what validation leaves (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another split (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the split that is in DIR")
    parser.add_argument("--link", action="store_true", help="make hard links instead of copies")
    options = parser.parse_args()
    options.source, options.output = Path(options.source), Path(options.output)
    for option, size in (("--val-size", options.val_size), ("--test-size", options.test_size)):
        if not 0.01 <= size <= 0.99:
            raise Stop(f"{option} {size}: is no share of the photos.\nChoose one from 0.01 to 0.99, such as 0.15.")
    return options


def refuse_overlap(source, classes, output):
    """Raise Stop if the splits would land among the source's photos or take their place."""

    def inside(path, folder):  # compared as files, as some systems take "Flowers" for "flowers"
        parts = [part for part in (path.resolve(), *path.resolve().parents) if part.exists()]
        return folder.exists() and any(part.samefile(folder) for part in parts)

    if inside(output, source):
        raise Stop(f"{shown(output)}: lies in the source {shown(source)}.\nName a folder outside it with --output.")
    for folder in (source, *(source / name for name in classes)):
        if any(inside(folder, output / split) for split in SPLITS):
            raise Stop(f"{shown(folder)}: is itself part of the split in {shown(output)}.\nSplit the original photos.")


def report(photos, classes):
    """Print what was left out and why, at most eight lines of each kind, and the table of counts."""
    for title, conflict in (("Skipped", False), ("Label conflicts, left out", True)):
        left_out = [photo for photo in photos if photo.note and bool(photo.group) == conflict]
        if left_out:
            lines = (shown(f"{photo.source}: {photo.note}") for photo in left_out[:8])
            print(f"{title}: {len(left_out)} (see split.csv)", *lines, sep="\n  ")
    columns, width = (*SPLITS, "skipped"), max(len(shown(name)) for name in classes)
    print(" " * width, *(f"{column:>10}" for column in columns))
    for name in classes:
        counts = Counter(photo.split for photo in photos if photo.class_name == name)
        print(f"{shown(name):{width}}", *(f"{counts[column]:>10}" for column in columns))


def main():
    """Split SOURCE as the command line says."""
    options = parse_options()
    classes, photos = list_files(options.source)
    refuse_overlap(options.source, classes, options.output)
    output = shown(options.output)
    with only_run_in(options.output) as building:
        present = [name for name in RESULTS if os.path.lexists(options.output / name)]
        if present and not options.overwrite:
            raise Stop(f"{output}: already holds {', '.join(present)}.\n--overwrite replaces them as a whole.")
        build(photos, classes, building, options)
    report(photos, classes)
    copied = sum(photo.split != "skipped" and not photo.linked for photo in photos)
    if options.link and copied:
        print(f"{copied} photos were copied, as {output} cannot hold hard links to them.")
    print(f"Next: python model_training_and_visualization.py --data {output}")


if __name__ == "__main__":
    run(main)

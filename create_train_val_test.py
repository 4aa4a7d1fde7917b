"""Split a folder of photos into train, validation and test so that no picture is in two of them.

    python create_train_val_test.py [SOURCE] [--output DIR] [--val-size 0.15] [--test-size 0.2] [--seed 0]

    SOURCE/                      DIR/
        daisy/                       train/
            one.jpg                      daisy/one.jpg …
            two.jpg                      rose/four.jpg …
        rose/                        validation/…
            four.jpg                 test/…
                                     split.csv

A network that has seen a test photo in training remembers it, and its test accuracy is a lie. Collections from the web
hold many photos twice: the same file, or the same picture at another size, quality or tint. Such copies form a group,
which goes to one split as a whole. A picture that is filed under two classes is left out, as one label must be wrong.
split.csv tells for every file where it went and why. SOURCE is only read.
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import stat
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
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
MAX_PIXELS = 90_000_000  # small files can unpack to more than the memory holds


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
    except BrokenExecutor:
        message, exit_code = "A worker process was killed, perhaps for want of memory.\nClose other programs.", 1
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has left; an ordinary exit would complain that it cannot be flushed
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        message = f"{shown(error.filename2 or error.filename or 'A file')}: {reason}.\n"
        message += "Free some space and check the permissions there, or choose another place, then run it again."
        exit_code = 1
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def shown(path):
    """A path as it can be printed on one line, whatever its name holds."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in os.fsdecode(path))


def progress(iterable, description, total):
    """The iterable, with a progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        return iterable
    from rich.console import Console  # only here, as it takes as long to import as 100 photos to check
    from rich.progress import track

    return track(iterable, description, total, console=Console(stderr=True))


def read_photo(path, at_least=None):
    """Decode a photo as a person sees it, EXIF rotation applied: (height, width, 3) uint8 RGB, 0–255.

    With `at_least=pixels` a JPEG comes at the smallest of its scales 1, 1/2, 1/4, 1/8 that keeps both sides that long.
    Raises Stop, naming the file and the reason, if it is no photo or not whole.
    """
    return np.array(decode_photo(read_bytes(path), path, at_least))


def read_bytes(path):
    """The bytes of a regular file. Raises Stop for all else; a FIFO would keep its reader waiting for ever."""
    path = Path(path)
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        reason = "is a folder or a device, not a photo"
    except OSError as error:
        reason = "is a broken link" if path.is_symlink() else error.strerror
    raise Stop(f"{shown(path)}: {reason}")


def decode_photo(data, path, at_least=None, mode="RGB"):
    """Decode the bytes of the photo at `path` to a Pillow image of mode RGB or L (grey); see read_photo."""
    try:
        with Image.open(io.BytesIO(data), formats=PHOTO_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if at_least:
                image.draft(mode, (at_least, at_least))
            image.load()
            with contextlib.suppress(Exception):  # a broken EXIF block does not make the pixels worse
                ImageOps.exif_transpose(image, in_place=True)
            return convert(image, mode)
    except Image.DecompressionBombError:
        reason = f"is too large, over {MAX_PIXELS:,} pixels"
    except Image.UnidentifiedImageError:
        reason = "is no image that can be read" if data else "is empty"
    except Exception as error:  # each of Pillow's decoders has its own ways to fail
        reason = f"is damaged or cut off ({error})"
    raise Stop(f"{shown(path)}: {reason}")


def convert(image, mode):
    """A Pillow image of any mode as RGB or L (grey): 16 bits scaled to 8, transparency laid on white."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        samples = np.nan_to_num(np.asarray(image, np.float32))
        top = 65535 if ";16" in image.mode else next((top for top in (1, 255) if samples.max() <= top), 65535)
        image = Image.fromarray(np.clip(samples * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def decode_photos(paths, function, description, pool=None):
    """Yield function(path) for every path, in order, from threads on all cores or the pool; raise what it raises."""
    paths, pool = list(paths), pool or ThreadPoolExecutor(cores())
    try:
        with interrupts_held():  # one that came while processes are forked would be lost
            results = pool.map(function, paths, chunksize=16)
        yield from progress(results, description, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the photos in work are finished


@contextlib.contextmanager
def interrupts_held():
    """Keep Ctrl-C and SIGTERM waiting until the block has ended. For the main thread, as all signals."""
    came, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


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
        process_id = int(left_behind.name.removeprefix(".partial").split("-")[0])
        with contextlib.suppress(PermissionError):  # another user is writing it, or somebody on Windows
            with contextlib.suppress(ProcessLookupError):
                if os.name != "nt":  # where the question would end the process
                    os.kill(process_id, 0)
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
LAYOUT = "SOURCE is a folder that holds one folder of photos for each class, such as flowers/daisy and flowers/rose."


@dataclass
class Photo:
    """A file seen in SOURCE: a row of split.csv, and the thumbnail that copies are found by."""

    source: str  # its path below SOURCE, with forward slashes
    class_name: str = ""
    split: str = "skipped"
    sha256: str = ""
    group: int | str = ""
    note: str = ""  # why it is skipped; of a photo in a group, the label conflict
    thumbnail: bytes = b""  # 32 rows of 36 grey pixels


def list_files(source):
    """The class names, and a Photo for every file in SOURCE and its class folders. Raises Stop for less than two."""
    if not source.is_dir():
        raise Stop(f"{shown(source)}: {'is a file' if source.exists() else 'there is no such folder'}.\n{LAYOUT}")
    try:
        folders = {name: class_folders(source / name) for name in class_folders(source)}
        # The Kaggle download once held the whole set a second time, as flowers/flowers.
        nested = [name for name in folders if len(folders.keys() & folders[name]) >= 2]
        classes = [name for name in folders if name not in nested]
        photos = [Photo(path.name) for path in sorted(source.iterdir()) if path.name not in classes]
        for photo in photos:
            photo.note = "is a nested copy of the whole set" if photo.source in nested else "lies beside the classes"
        for name in classes:
            photos += [
                Photo(f"{name}/{file}", name) for file in sorted(entry.name for entry in os.scandir(source / name))
            ]
    except PermissionError as error:
        raise Stop(f"{shown(error.filename)}: cannot be read.\nGive yourself the right to read it.") from error
    if len(classes) < 2:
        remedy = next((f"Try {shown(source / name)}." for name in folders if len(folders[name]) >= 2), LAYOUT)
        raise Stop(f"{shown(source)}: two classes are needed, {len(classes)} found.\n{remedy}")
    return classes, photos


def examine(name, source, folder, link):
    """Copy source/name into `folder` if it decodes in full: its SHA-256, why it is skipped or "", its thumbnail."""
    path, target, sha256 = source / name, folder / name, ""
    try:
        if path.name.startswith("."):
            raise Stop("is a hidden file")
        if path.suffix.lower() not in PHOTO_SUFFIXES and not path.is_dir():
            raise Stop(f"is of type {path.suffix or 'none'}, which Keras does not read")
        data = read_bytes(path)
        sha256 = hashlib.sha256(data).hexdigest()
        grey = decode_photo(data, path, at_least=2 * max(THUMBNAIL), mode="L")
    except Stop as stop:
        return sha256, str(stop).removeprefix(f"{shown(path)}: "), b""
    thumbnail = grey.resize(THUMBNAIL, Image.Resampling.BILINEAR).tobytes()
    if link:
        with contextlib.suppress(OSError):  # another file system, or one that has no hard links
            os.link(path.resolve(), target)
            return sha256, "", thumbnail
    try:
        target.write_bytes(data)
        os.utime(target, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    except OSError as error:
        error.filename = os.fspath(target)  # which a full disk does not name
        raise
    return sha256, "", thumbnail


def follow_parent():
    """Make this worker process leave Ctrl-C to its parent and end with it, even if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()


# ---- Copies of one picture -------------------------------------------------------------------------------------------
# A difference hash (Krawetz, "Kind of Like That", 2013) says for each of 8 × 8 places whether the picture gets brighter
# to the right. Size, quality, tint and loss of colour hardly change that, so copies are found among near-equal hashes.
# The edges of two thumbnails then decide. On 320 real flowers and 11 kinds of altered copies of each, copies correlated
# at 0.93 and more, two different photos at 0.53 and less, however alike their smooth backgrounds were.

MAX_DISTANCE = 6  # bits; holds 98 to 100 % of copies after any usual change of size, quality, tint or brightness
MIN_CORRELATION = 0.8
THUMBNAIL = (36, 32)  # width and height in pixels: four for each of the 9 × 8 places of a difference hash
MIN_EDGE = 2.0  # grey levels of 255; below, a plain picture has no edges to know it by, and only its bytes count
REACH = 64  # neighbours to compare in a crowded bucket; more would find little and cost quadratic time


def similar_pairs(hashes):
    """The (n, 2) index pairs of 64-bit hashes that differ in at most 6 bits; takes time linear in n.

    Six bits spoil at most six of the eight bytes, so two bytes are equal: for each of the 28 choices of two bytes, the
    hashes are sorted into 65,536 buckets, and only neighbours in a bucket are compared.
    """
    count, found = len(hashes), [np.empty(0, np.int64)]
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
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(count, 1)), axis=1)


def edges(thumbnails):
    """Differences of neighbours in (n, 32, 36) grey thumbnails as (n, 2236) vectors of length 1, or 0 if plain."""
    grey = thumbnails.astype(np.float32)
    across, down = (np.diff(grey, axis=axis).reshape(len(grey), -1) for axis in (2, 1))
    # Without the mean there is no even slope of light, which a hundred skies have in common.
    vectors = np.hstack([across - across.mean(1, keepdims=True), down - down.mean(1, keepdims=True)])
    strength = vectors.std(1, keepdims=True)
    return np.where(strength < MIN_EDGE, 0, vectors / np.maximum(strength, MIN_EDGE) / np.sqrt(vectors.shape[1]))


def same_pictures(thumbnails):
    """Yield the index pairs of (n, 32, 36) grey thumbnails that show one picture: alike in hash and in edges."""
    places = thumbnails.reshape(-1, 8, 4, 9, 4).mean((2, 4), dtype=np.float32)
    brighter = places[:, :, 1:] > places[:, :, :-1]
    pairs = similar_pairs(np.packbits(brighter.reshape(-1, 64), axis=1).view(np.uint64).ravel())
    for start in range(0, len(pairs), 1024):  # the edges of all at once would fill the memory
        block = pairs[start : start + 1024]
        correlation = (edges(thumbnails[block[:, 0]]) * edges(thumbnails[block[:, 1]])).sum(1)
        yield from block[correlation >= MIN_CORRELATION].tolist()


def find_copies(photos):
    """Number the groups of copies among the usable photos; note a label conflict where one lies in several classes."""
    thumbnails = np.frombuffer(b"".join(photo.thumbnail for photo in photos), np.uint8).reshape(-1, *THUMBNAIL[::-1])
    first_with, group_of = {}, {index: [index] for index in range(len(photos))}
    same_bytes = [(first_with.setdefault(photo.sha256, index), index) for index, photo in enumerate(photos)]
    for one, other in itertools.chain(same_bytes, same_pictures(thumbnails)):
        if group_of[one] is not group_of[other]:
            group_of[one] += group_of[other]
            group_of |= dict.fromkeys(group_of[other], group_of[one])
    groups = [group for index, group in group_of.items() if group[0] == index and len(group) > 1]
    for number, group in enumerate(groups, start=1):
        members = [photos[index] for index in group]
        for photo in members:
            photo.group = number
            others = [other.source for other in members if other.class_name != photo.class_name]
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
        members = [photo for photo in photos if photo.class_name == name]
        usable, groups = [photo for photo in members if not photo.note], {}
        if not usable:
            first = f" The first, {shown(members[0].source)}, {members[0].note}." if members else ""
            raise Stop(f"class {shown(name)}: none of its {len(members)} files is a usable photo.{first}")
        for photo in usable:
            groups.setdefault(photo.group or photo.source, []).append(photo)
        # Groups go, largest first and else in random order, where most places are free: copies mostly into train, and
        # single photos fill each split to exactly its size. The last ones go where there is nothing yet.
        rng = random.Random(f"{seed}/{name}")  # a new class leaves the splits of the others as they were
        groups = sorted(rng.sample([*groups.values()], len(groups)), key=len)
        free, empty = split_sizes(len(usable), val_size, test_size), list(SPLITS)
        while groups:
            split = max(empty if len(groups) <= len(empty) else SPLITS, key=free.get)
            empty = [other for other in empty if other != split]
            for photo in groups.pop():
                photo.split = split
                free[split] -= 1
        if len(usable) < needed or empty:
            raise Stop(
                f"class {shown(name)}: has {len(usable)} usable photos, too few different ones for three splits; "
                f"it needs {needed}.\nAdd photos to it, remove it, or choose larger --val-size and --test-size."
            )


# ---- All or nothing --------------------------------------------------------------------------------------------------
# The new split is built in BUILDING. Renaming that to READY is one step on any file system, and from it the new split
# counts: a run killed before has changed nothing, and after it the next run moves the rest into place. All old folders
# leave before the first new one comes, so that old and new never stand side by side.

BUILDING, READY = ".split.building", ".split.ready"
RESULTS = (*SPLITS, "split.csv")


@contextlib.contextmanager
def only_run_in(folder):
    """Make the folder and keep other runs out of it; the system lets go of the lock however this run ends."""
    made, lock = [path for path in (folder, *folder.parents) if not path.exists()], folder / ".split.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.name == "nt":
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            import fcntl

            handle = os.open(lock, os.O_CREAT | os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (lock.exists() and os.path.samestat(os.fstat(handle), lock.stat())):
                raise BlockingIOError  # the run that held it has just deleted it
    except (BlockingIOError, FileExistsError, NotADirectoryError) as error:
        reason = "another run is writing there.\nWait for its end" if folder.is_dir() else "is no folder.\nName one"
        raise Stop(f"{shown(folder)}: {reason}, or choose another --output.") from error
    try:
        yield
    finally:
        if os.name != "nt":
            lock.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):  # no folder is left behind by a run that came to nothing
            for path in made:
                path.rmdir()


def build(source, photos, classes, building, arguments):
    """Make the three folders and split.csv in `building`. All photos start in train, where most of them will stay."""
    for split, name in itertools.product(SPLITS, classes):
        (building / split / name).mkdir(parents=True)
    listed, train = [photo for photo in photos if not photo.note], building / "train"
    # Processes, as Pillow's part in Python would make threads wait for each other.
    pool = ProcessPoolExecutor(min(cores(), 61), initializer=follow_parent)
    check = partial(examine, source=source, folder=train, link=arguments.link)
    work = decode_photos([photo.source for photo in listed], check, "Checking and copying", pool)
    with contextlib.closing(work):  # whatever happens, its workers have ended when the folder is cleared away
        for photo, result in zip(listed, work, strict=True):
            photo.sha256, photo.note, photo.thumbnail = result
    find_copies([photo for photo in photos if not photo.note])
    assign_splits(photos, classes, arguments.val_size, arguments.test_size, arguments.seed)
    for photo in photos:
        if photo.group and photo.note:
            (train / photo.source).unlink()
        elif photo.split in ("validation", "test"):
            (train / photo.source).rename(building / photo.split / photo.source)
    with (building / "split.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("source", "class", "split", "sha256", "group", "note"))
        writer.writerows((it.source, it.class_name, it.split, it.sha256, it.group, it.note) for it in photos)


def move_into_place(output):
    """Put the splits in READY in the place of the old ones; goes on where an interrupted run stopped."""
    ready, old = output / READY, output / READY / "old"
    if ready.exists():
        old.mkdir(exist_ok=True)
        waiting = [name for name in RESULTS if (ready / name).exists()]
        for name in waiting:
            if os.path.lexists(output / name):
                (output / name).rename(old / name)
        for name in waiting:
            (ready / name).rename(output / name)
        shutil.rmtree(ready, ignore_errors=True)


# ---- The run ---------------------------------------------------------------------------------------------------------


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
    arguments = parser.parse_args()
    for option, size in (("--val-size", arguments.val_size), ("--test-size", arguments.test_size)):
        if not 0.01 <= size <= 0.99:
            raise Stop(f"{option} {size}: is no share of the photos.\nChoose one from 0.01 to 0.99, such as 0.15.")
    return arguments


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
    conflicts = {photo.group: photo for photo in photos if photo.note and photo.group}
    skipped = [photo for photo in photos if photo.note and not photo.group]
    for title, left_out in (("Skipped", skipped), ("Label conflicts, left out", [*conflicts.values()])):
        if left_out:
            lines = (shown(f"{photo.source}: {photo.note}") for photo in left_out[:8])
            print(f"{title}: {len(left_out)} (see split.csv)", *lines, sep="\n  ")
    columns, width = (*SPLITS, "skipped", "conflicts", "groups"), max(len(shown(name)) for name in classes)
    print(" " * width, *(f"{column:>10}" for column in columns))
    for name in classes:
        members = [photo for photo in photos if photo.class_name == name]
        counts = Counter("conflicts" if photo.group and photo.note else photo.split for photo in members)
        counts["groups"] = len({photo.group for photo in members if photo.group})
        print(f"{shown(name):{width}}", *(f"{counts[column]:>10}" for column in columns))


def main():
    """Split SOURCE as the command line says."""
    arguments = parse_options()
    source, output = Path(arguments.source), Path(arguments.output)
    classes, photos = list_files(source)
    refuse_overlap(source, classes, output)
    with only_run_in(output):
        building = output / BUILDING
        shutil.rmtree(building, ignore_errors=True)
        move_into_place(output)
        present = [name for name in RESULTS if os.path.lexists(output / name)]
        if present and not arguments.overwrite:
            raise Stop(f"{shown(output)}: already holds {', '.join(present)}.\n--overwrite replaces them as a whole.")
        try:
            build(source, photos, classes, building, arguments)
            with interrupts_held():
                building.rename(output / READY)
                move_into_place(output)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    report(photos, classes)
    used = [photo for photo in photos if arguments.link and photo.split != "skipped"]
    copied = [photo for photo in used if not (output / photo.split / photo.source).samefile(source / photo.source)]
    if copied:
        print(f"{len(copied)} photos were copied, as {shown(output)} cannot hold hard links to them.")
    print(f"Next: python model_training_and_visualization.py --data {shown(output)}")


if __name__ == "__main__":
    run(main)

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
import errno
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
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# ---- What both scripts share -----------------------------------------------------------------------------------------

# The types that Keras's ImageDataGenerator reads; it passes over all others without a word.
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff")
# What may be inside, whatever the suffix says: web photos often carry a wrong one. Nothing that starts another program.
PHOTO_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
# Pillow's own limit against files that unpack to more than the memory holds; about 9,500 × 9,500.
MAX_PIXELS = 89_000_000


class Stop(Exception):  # noqa: N818 (it ends a run, with or without an error)
    """Ends a run with a message of one to three lines that names the file and the remedy."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def run(main):
    """Call main() and end the process: exit code 0 done, 1 I/O failure, 2 bad input, 130 Ctrl-C, 143 SIGTERM.

    SIGTERM unwinds the stack as Ctrl-C does, so that whatever is half written is cleaned up.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about a photo is said once, by name
    try:
        main()
        sys.stdout.flush()
        sys.exit(0)
    except Stop as stop:
        message, exit_code = str(stop), stop.exit_code
    except KeyboardInterrupt:
        message, exit_code = "Stopped by Ctrl-C.", 130
    except BrokenPipeError:
        # The reader of our output has left: what is still in the buffer goes nowhere, or Python complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message, exit_code = explain(error), 1
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def explain(error):
    """What an OSError means for the user: the file, the reason, the remedy."""
    full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
    locked = (errno.EACCES, errno.EPERM, errno.EROFS)
    if error.errno in full:
        remedy = "Free some space there, or choose another place; nothing that was there before is lost."
    elif error.errno in locked:
        remedy = "Close the programs that use it and check its permissions, or choose another place."
    else:
        remedy = "Check the disk and the path, then run the same command again."
    return f"{shown(error.filename2 or error.filename or 'A file')}: {error.strerror or error}.\n{remedy}"


def shown(path):
    """A path as it can be printed on one line, whatever its name holds."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in os.fsdecode(path))


def progress(iterable, description, total):
    """Yield from the iterable beside a progress bar on stderr; without a terminal, in silence."""
    if not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console  # only here, as it takes as long to import as 100 photos to check
    from rich.progress import track

    yield from track(iterable, description, total, console=Console(stderr=True))


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
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Stop(f"{shown(path)}: is a folder or a device, not a photo")
        if status.st_size > 8 * MAX_PIXELS:
            raise Stop(f"{shown(path)}: is too large, {status.st_size:,} bytes")
        with path.open("rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        broken_link = isinstance(error, FileNotFoundError) and path.is_symlink()
        raise Stop(f"{shown(path)}: {'is a broken link' if broken_link else error.strerror}") from error


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
                image = ImageOps.exif_transpose(image)
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
        samples = np.asarray(image, np.float32)
        peak = max(float(samples.max()), 65535 * (";16" in image.mode))
        top = next(top for top in (1, 255, 65535, peak) if peak <= top)
        image = Image.fromarray(np.clip(samples * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def decode_photos(paths, function, description):
    """Yield function(path) for every path, in order, from threads on all cores, beside a progress bar.

    What the function raises is yielded in its place, so that one bad photo does not end the run. Threads are enough, as
    Pillow and hashlib work outside Python's global lock.
    """

    def attempt(paths):
        results = []
        for path in paths:
            try:
                results.append(function(path))
            except Exception as error:
                results.append(error)
        return results

    paths = list(paths)
    blocks = [paths[start : start + 8] for start in range(0, len(paths), 8)]  # a thread's errand costs some time itself
    pool = ThreadPoolExecutor(cores())
    try:
        yield from progress(itertools.chain.from_iterable(pool.map(attempt, blocks)), description, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the photos in work are finished


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def replace_when_whole(path):
    """Yield a temporary path beside `path` to write to; it takes the place of `path` only when the block succeeds.

    The temporary name is hidden and keeps all suffixes, as Keras goes by them. What a killed run has left behind is
    cleared by the next write to the same path; its process id tells it from the file of a run that is still writing.
    """
    path = Path(path)
    for left_behind in path.parent.glob(f".partial[0-9]*-{glob.escape(path.name)}"):
        if not is_running(int(left_behind.name.removeprefix(".partial").split("-")[0])):
            left_behind.unlink(missing_ok=True)
    partial = path.with_name(f".partial{os.getpid()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def is_running(process_id):
    """Whether a process of this id exists."""
    if os.name == "nt":  # where os.kill(process_id, 0) would end the process
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x00100000, False, process_id)  # SYNCHRONIZE
        if not handle:
            return False
        ended = ctypes.windll.kernel32.WaitForSingleObject(handle, 0) == 0
        ctypes.windll.kernel32.CloseHandle(handle)
        return not ended
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, under another user
    return True


def class_folders(folder):
    """The sorted names of the visible folders in `folder`: its classes."""
    return sorted(
        entry.name
        for entry in Path(folder).iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
    )


# ---- The files of SOURCE ---------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")
LAYOUT = "SOURCE is a folder that holds one folder of photos for each class, such as flowers/daisy and flowers/rose."


@dataclass
class Photo:
    """A file seen in SOURCE: a row of split.csv, and what the search for copies needs."""

    path: Path
    source: str  # relative to SOURCE, with forward slashes
    class_name: str = ""
    split: str = "skipped"
    sha256: str = ""
    group: int | str = ""
    note: str = ""  # why it is skipped
    conflict: bool = False
    linked: bool = False
    aspect_ratio: float = 0.0
    thumbnail: np.ndarray | None = None  # (32, 36) uint8, grey


def list_files(source):
    """The class names, and every file in SOURCE and its class folders by name; what is no class's photo has a note.

    Raises Stop if there are not two classes to tell apart.
    """
    if not source.is_dir():
        raise Stop(f"{shown(source)}: {'is a file' if source.exists() else 'there is no such folder'}.\n{LAYOUT}")
    try:
        names = class_folders(source)
        # The Kaggle download once held the whole set a second time, as flowers/flowers.
        nested = [name for name in names if len(set(class_folders(source / name)) & set(names)) >= 2]
        classes = [name for name in names if name not in nested]
        if len(classes) < 2:
            deeper = [name for name in names if len(class_folders(source / name)) >= 2]
            hint = f"The classes lie deeper: try {shown(source / deeper[0])}" if deeper else LAYOUT
            raise Stop(f"{shown(source)}: two classes are needed, {len(classes)} found.\n{hint}")
        notes = dict.fromkeys(nested, "is a nested copy of the whole set")
        beside = [path for path in sorted(source.iterdir()) if path.name not in classes]
        photos = [Photo(path, path.name, note=notes.get(path.name, "lies beside the class folders")) for path in beside]
        for name in classes:
            photos += [Photo(path, f"{name}/{path.name}", name) for path in sorted((source / name).iterdir())]
    except PermissionError as error:
        raise Stop(f"{shown(error.filename)}: cannot be read.\nGive yourself the right to read it.") from error
    return classes, photos


def examine(photo, folder, link):
    """Read, hash and fully decode one photo and put it into `folder`, or note why it cannot be used.

    Reading each file once, and writing it while other threads decode, is what makes this as fast as a mere copy.
    """
    if photo.note:
        return
    suffix = photo.path.suffix.lower()
    if photo.path.name.startswith("."):
        photo.note = "is a hidden file"
    elif suffix not in PHOTO_SUFFIXES:
        photo.note = (
            "is a folder" if photo.path.is_dir() else f"is of type {suffix or 'none'}, which Keras does not read"
        )
    else:
        try:
            data = read_bytes(photo.path)
            photo.sha256 = hashlib.sha256(data).hexdigest()
            grey = decode_photo(data, photo.path, at_least=2 * max(THUMBNAIL), mode="L")
        except Stop as stop:
            photo.note = str(stop).removeprefix(f"{shown(photo.path)}: ")
        else:
            photo.aspect_ratio = grey.width / grey.height
            photo.thumbnail = np.asarray(grey.resize(THUMBNAIL, Image.Resampling.BILINEAR))
            put(photo, data, folder / photo.class_name / photo.path.name, link)


def put(photo, data, target, link):
    """Write a copy of the photo, bytes and times, or make a hard link to it."""
    if link:
        with contextlib.suppress(OSError):  # another file system, or one that has no hard links
            os.link(os.path.realpath(photo.path), target)
            photo.linked = True
            return
    try:
        with target.open("xb") as file:
            file.write(data)
        status = photo.path.stat()
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    except FileExistsError as error:
        raise Stop(f"{shown(photo.path)}: the output cannot hold two names that differ only in case.") from error
    except OSError as error:
        error.filename = os.fspath(target)
        raise


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


def difference_hashes(thumbnails):
    """The 64-bit difference hashes of (n, 32, 36) grey thumbnails: 8 × 8 bits from 9 × 8 places."""
    places = thumbnails.reshape(-1, 8, 4, 9, 4).mean((2, 4), dtype=np.float32)
    brighter = places[:, :, 1:] > places[:, :, :-1]
    return np.packbits(brighter.reshape(-1, 64), axis=1).view(np.uint64).ravel()


def similar_pairs(hashes):
    """The (n, 2) index pairs of 64-bit hashes that differ in at most 6 bits; takes time linear in n.

    Six bits spoil at most six of the eight bytes, so two bytes are equal: for each of the 28 choices of two bytes, the
    hashes are sorted into 65,536 buckets, and only neighbours in a bucket are compared.
    """
    hashes = np.asarray(hashes, np.uint64)
    count = len(hashes)
    by_value = np.argsort(hashes)  # so that the most alike are neighbours in every bucket
    hash_bytes = hashes[by_value].view(np.uint8).reshape(count, 8)
    found = []
    for one, other in itertools.combinations(range(8), 2):
        buckets = hash_bytes[:, one].astype(np.uint16) << 8 | hash_bytes[:, other]
        by_bucket = np.argsort(buckets, kind="stable")
        buckets, order = buckets[by_bucket], by_value[by_bucket]
        ordered, left, pairs = hashes[order], np.arange(count), [np.empty((0, 2), np.int64)]
        for step in range(1, REACH + 1):
            left = left[left + step < count]
            left = left[buckets[left] == buckets[left + step]]
            if not len(left):
                break
            distance = np.bitwise_count(ordered[left] ^ ordered[left + step])
            # Equal hashes are neighbours for every choice of bytes: once is enough.
            near = left[(distance <= MAX_DISTANCE) & ((distance > 0) | ((one, other) == (0, 1)))]
            pairs.append(np.stack([order[near], order[near + step]], axis=1))
        found.append(np.sort(np.concatenate(pairs), axis=1))
    codes = np.unique(np.concatenate(found) @ [count, 1])
    return np.stack(np.divmod(codes, max(count, 1)), axis=1)


def edges(thumbnails):
    """Horizontal and vertical differences of (n, h, w) grey thumbnails, without their means: (n, number of edges).

    Taking the mean away takes away an even slope of light, which a hundred skies have in common.
    """
    thumbnails = thumbnails.astype(np.float32)
    across, down = (np.diff(thumbnails, axis=axis).reshape(len(thumbnails), -1) for axis in (2, 1))
    return np.hstack([across - across.mean(1, keepdims=True), down - down.mean(1, keepdims=True)])


def correlation(first, second):
    """Row by row, how alike two (n, k) arrays are: 1 for equal up to a factor, 0 for unrelated."""
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def same_pictures(photos):
    """Yield index pairs of photos that show one picture: alike in hash, in shape and in the thumbnails' edges."""
    blocks = [photos[start : start + 1024] for start in range(0, len(photos), 1024)]
    strong = [edges(np.array([photo.thumbnail for photo in block])).std(1) >= MIN_EDGE for block in blocks]
    known = np.flatnonzero(np.concatenate(strong)) if blocks else []
    thumbnails = np.array([photos[index].thumbnail for index in known]).reshape(-1, *THUMBNAIL[::-1])
    shapes = np.log([photos[index].aspect_ratio for index in known])
    pairs = similar_pairs(difference_hashes(thumbnails))
    for start in range(0, len(pairs), 1024):
        one, other = pairs[start : start + 1024].T
        same = correlation(edges(thumbnails[one]), edges(thumbnails[other])) >= MIN_CORRELATION
        same &= np.abs(shapes[one] - shapes[other]) < 0.03
        yield from zip(known[one[same]], known[other[same]], strict=True)


def find_copies(photos):
    """Number the groups of copies among the usable photos, and set aside groups that lie in more than one class."""
    parent = list(range(len(photos)))

    def root(index):
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first_with = {}
    for index, photo in enumerate(photos):
        parent[index] = first_with.setdefault(photo.sha256, index)
    different = list(first_with.values())
    for one, other in same_pictures([photos[index] for index in different]):
        parent[root(different[other])] = root(different[one])

    groups = {}
    for index, photo in enumerate(photos):
        groups.setdefault(root(index), []).append(photo)
    groups = [group for group in groups.values() if len(group) > 1]
    for number, group in enumerate(groups, start=1):
        for photo in group:
            photo.group = number
            others = [other.source for other in group if other.class_name != photo.class_name]
            if others:
                photo.conflict = True
                photo.note = f"label conflict: the same picture as {', '.join(others)}"


# ---- Which photo goes where ------------------------------------------------------------------------------------------


def split_sizes(count, val_size, test_size):
    """How many of a class's photos each split gets, test being a share of what validation leaves."""
    validation = int(val_size * count)
    test = int(test_size * (count - validation))
    return {"train": count - validation - test, "validation": validation, "test": test}


def assign_class(photos, val_size, test_size, rng):
    """Draw the split of each photo of one class; copies stay together. True if every split has got a photo.

    Each group, largest first, goes to a split drawn in proportion to the places that are free, among those that can
    hold it, so that without copies this is a plain random split of exactly the sizes asked for.
    """
    groups = {}
    for photo in sorted(photos, key=lambda photo: photo.source):
        groups.setdefault(photo.group or photo.source, []).append(photo)
    free = split_sizes(len(photos), val_size, test_size)
    empty = set(SPLITS)
    for left, group in zip(range(len(groups), 0, -1), sorted(groups.values(), key=len, reverse=True), strict=True):
        choices = [split for split in SPLITS if free[split] >= len(group)] or [max(SPLITS, key=free.get)]
        if left <= len(empty):
            choices = [split for split in SPLITS if split in empty]
        split = rng.choices(choices, [max(free[choice], 1) for choice in choices])[0]
        free[split] -= len(group)
        empty.discard(split)
        for photo in group:
            photo.split = split
    return not empty


def assign_splits(photos, classes, val_size, test_size, seed):
    """Set the split of every usable photo. Raises Stop, naming the class, where one is too small.

    Each class draws from its own random numbers, so that a new class leaves the others' splits as they were.
    """
    needed = next(n for n in itertools.count(3) if all(split_sizes(n, val_size, test_size).values()))
    for name in classes:
        members = [photo for photo in photos if photo.class_name == name]
        usable = [photo for photo in members if not photo.note]
        if not usable:
            reason = f" The first, {shown(members[0].path.name)}, {members[0].note}." if members else ""
            raise Stop(f"class {shown(name)}: none of its {len(members)} files is a usable photo.{reason}")
        rng = random.Random(f"{seed}/{name}")  # seeded by the text itself, not by Python's changing hash of it
        if len(usable) < needed or not assign_class(usable, val_size, test_size, rng):
            raise Stop(
                f"class {shown(name)}: has {len(usable)} usable photos, too few different ones for three splits; "
                f"it needs {needed}.\nAdd photos to it, remove it, or choose larger --val-size and --test-size."
            )


# ---- All or nothing --------------------------------------------------------------------------------------------------
# The new split is built in BUILDING. Renaming that to READY is one step on any file system, and from it the new split
# counts: a run killed before has changed nothing, and after it the next run moves the rest into place. All old folders
# leave before the first new one comes, so that old and new never stand side by side.

BUILDING, READY, LOCK = ".split.building", ".split.ready", ".split.lock"
RESULTS = (*SPLITS, "split.csv")
SHOWN = 8  # lines on screen about files that were left out; split.csv has them all


@contextlib.contextmanager
def only_run_in(folder):
    """Make the folder and keep other runs out of it; the system lets go of the lock however this run ends."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Stop(f"{shown(folder)}: is a file.\nName a folder with --output.") from error
    lock = folder / LOCK
    try:
        if os.name == "nt":
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            import fcntl

            handle = os.open(lock, os.O_CREAT | os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (lock.exists() and os.path.samestat(os.fstat(handle), lock.stat())):
                raise BlockingIOError  # the run that held it has just deleted it
    except (BlockingIOError, FileExistsError) as error:
        raise Stop(f"{shown(folder)}: another run is writing there.\nWait for its end.") from error
    try:
        yield
    finally:
        if os.name != "nt":
            lock.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):  # no folder is left behind by a run that came to nothing
            for path in made:
                path.rmdir()


def finish_killed_run(output):
    """Clear what a killed run was building, or finish moving into place what it had built."""
    shutil.rmtree(output / BUILDING, ignore_errors=True)
    if (output / READY).exists():
        print(f"{shown(output)}: an earlier run was killed at its end; its split is now whole.", file=sys.stderr)
        move_into_place(output)


def move_into_place(output):
    """Put the splits in READY in the place of the old ones; goes on where a killed run stopped."""
    ready, old = output / READY, output / READY / "old"
    old.mkdir(exist_ok=True)
    waiting = [name for name in RESULTS if (ready / name).exists()]
    for name in waiting:
        if os.path.lexists(output / name):
            (output / name).rename(old / name)
    for name in waiting:
        (ready / name).rename(output / name)
    shutil.rmtree(ready, ignore_errors=True)


@contextlib.contextmanager
def no_interrupts():
    """Keep Ctrl-C and SIGTERM out of the few milliseconds in which the folders change places."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def build(photos, classes, building, arguments):
    """Make the three folders and split.csv in `building`. All photos start in train, where most of them will stay."""
    for split, name in itertools.product(SPLITS, classes):
        (building / split / name).mkdir(parents=True)
    train = building / "train"
    work = decode_photos(photos, lambda photo: examine(photo, train, arguments.link), "Checking and copying")
    with contextlib.closing(work):  # whatever happens, its threads have ended when the folder is cleared away
        for result in work:
            if isinstance(result, Exception):
                raise result
    find_copies([photo for photo in photos if not photo.note])
    assign_splits(photos, classes, arguments.val_size, arguments.test_size, arguments.seed)
    for photo in photos:
        place = Path(photo.class_name, photo.path.name)
        if photo.conflict:
            (train / place).unlink()
        elif photo.split in ("validation", "test"):
            (train / place).rename(building / photo.split / place)
    write_table(photos, building / "split.csv")


def write_table(photos, path):
    """Write split.csv: a row for every file seen."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "class", "split", "sha256", "group", "note"])
        for photo in photos:
            writer.writerow([photo.source, photo.class_name, photo.split, photo.sha256, photo.group, photo.note])


# ---- The run ---------------------------------------------------------------------------------------------------------


def report_left_out(photos):
    """Print which files were left out and why, at most SHOWN of each kind."""
    skipped = [f"{photo.source}: {photo.note}" for photo in photos if photo.note and not photo.conflict]
    conflicts = {}
    for photo in photos:
        if photo.conflict:
            conflicts.setdefault(photo.group, []).append(photo.source)
    conflicts = [" = ".join(sources) for sources in conflicts.values()]
    for title, lines in (("Skipped", skipped), ("The same picture under two classes, left out", conflicts)):
        if lines:
            print(f"{title}: {len(lines)}", *(f"  {shown(line)}" for line in lines[:SHOWN]), sep="\n")
        if len(lines) > SHOWN:
            print(f"  and {len(lines) - SHOWN} more, all in split.csv")


def report_counts(photos, classes):
    """Print the table of counts; skipped, conflicts and the three splits add up to the files seen."""
    from rich import box, console, table

    columns = (*SPLITS, "skipped", "conflicts", "groups")
    counts = {name: Counter() for name in (*classes, "")}
    for photo in photos:
        counts[photo.class_name]["conflicts" if photo.conflict else photo.split] += 1
    for name in classes:
        counts[name]["groups"] = len({photo.group for photo in photos if photo.class_name == name} - {""})
    grid = table.Table("class", box=box.SIMPLE if sys.stdout.isatty() else None)
    for column in columns:
        grid.add_column(column, justify="right")
    for name, count in counts.items():
        if count:
            grid.add_row(shown(name) or "(none)", *(str(count[column]) for column in columns))
    console.Console(markup=False, highlight=False, emoji=False).print(grid)


def parse_arguments():
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [SOURCE] [options]", allow_abbrev=False
    )
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

    def inside(path, folder):
        path = path.resolve()
        return folder.exists() and any(part.exists() and part.samefile(folder) for part in (path, *path.parents))

    if inside(output, source):
        raise Stop(f"{shown(output)}: lies in the source {shown(source)}.\nName a folder outside it with --output.")
    for split, folder in itertools.product(SPLITS, [source, *(source / name for name in classes)]):
        if inside(folder, output / split):
            raise Stop(f"{shown(folder)}: is itself part of the split in {shown(output)}.\nSplit the original photos.")


def main():
    """Split SOURCE as the command line says."""
    arguments = parse_arguments()
    source, output = Path(arguments.source), Path(arguments.output)
    classes, photos = list_files(source)
    refuse_overlap(source, classes, output)
    with only_run_in(output):
        finish_killed_run(output)
        present = [name for name in RESULTS if os.path.lexists(output / name)]
        if present and not arguments.overwrite:
            raise Stop(f"{shown(output)}: already holds {', '.join(present)}.\n--overwrite replaces them as a whole.")
        building = output / BUILDING
        try:
            build(photos, classes, building, arguments)
            with no_interrupts():
                building.rename(output / READY)
                move_into_place(output)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    report_left_out(photos)
    report_counts(photos, classes)
    copied = [photo for photo in photos if photo.split != "skipped" and not photo.linked]
    if arguments.link and copied:
        print(f"{len(copied)} photos were copied, as {shown(output)} cannot hold hard links to them.")
    print(f"Next: python model_training_and_visualization.py --data {shown(output)}")


if __name__ == "__main__":
    run(main)

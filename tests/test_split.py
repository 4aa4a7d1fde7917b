"""What create_train_val_test.py promises, on pictures drawn here."""

import csv
import errno
import hashlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps, PngImagePlugin

import create_train_val_test as split_script
from create_train_val_test import SPLITS, Stop, pasteable, read_photo, replace_when_whole

SCRIPT = Path(split_script.__file__)
RESULTS = {"train", "validation", "test", "split.csv"}
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals, limits or file types")


def picture(seed, size=(96, 80)):
    """A picture like no other: soft coloured blobs and a few hard-edged patches."""
    rng = np.random.default_rng([seed, 1])
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    for _ in range(4):
        left, top = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        image.paste(tuple(rng.integers(0, 256, 3).tolist()), (left, top, left + 18, top + 18))
    return image


@cache
def jpeg(seed):
    """The bytes of a picture, drawn once for all tests."""
    picture(seed).save(file := io.BytesIO(), "JPEG", quality=92)
    return file.getvalue()


def make_source(folder, **counts):
    """Write folder/CLASS/photo_000.jpg …, `counts` giving the number of photos per class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        first = int.from_bytes(name.encode()[:3], "big") * 1000
        for index in range(count):
            (folder / name / f"photo_{index:03d}.jpg").write_bytes(jpeg(first + index))
    return folder


def options_for(source, output, *options):
    words = [source, "--output", output, *options]
    return split_script.parse_options([str(word) for word in words])


def split(source, output, *options):
    """Split in this process; the rows of split.csv."""
    split_script.main(options_for(source, output, *options))
    return rows_of(output)


def rows_of(output):
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with (output / "split.csv").open(**encoding) as file:
        return list(csv.DictReader(file))


def process(source, output, *options, on_event="", before="", **settings):
    """Start the script in a process of its own, as a shell would.

    `before` comes first. `on_event` is the body of an audit hook: it sees what the process does,
    such as "open" and "os.rename", whichever function of Python does it.
    """
    code = f"""
import os, resource, runpy, signal, sys, time
{textwrap.dedent(before)}
def hook(event, arguments):
{textwrap.indent(textwrap.dedent(on_event) or "pass", "    ")}
sys.addaudithook(hook)
sys.argv[0] = {os.fspath(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, source, "--output", output, *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=SCRIPT.parent, **(pipes | settings))


def finish(started):
    """Exit code and stderr of a started process."""
    _, messages = started.communicate(timeout=60)
    return started.returncode, messages


def tree(folder):
    """Every file below the folder with its bytes and time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


def below_the_splits(output):
    """The photos of the three splits as a tree like that of the source; split.csv is left out."""
    written = tree(output)
    del written["split.csv"]
    return {path.partition("/")[2]: entry for path, entry in written.items()}


def where(rows):
    return {row["source"]: row["split"] for row in rows}


def counts_of(rows, class_name):
    counts = Counter(row["split"] for row in rows if row["class"] == class_name)
    return [counts[name] for name in SPLITS]


def groups_of(rows):
    """The groups of copies as {number: sources}."""
    groups = defaultdict(set)
    for row in rows:
        if row["group"]:
            groups[row["group"]].add(row["source"])
    return groups


# ---- The split -----------------------------------------------------------------------------------


def test_each_class_gets_the_fractions_and_every_photo_is_in_one_split(tmp_path):
    source = make_source(tmp_path / "photos", daisy=20, rose=13)
    os.utime(source / "daisy" / "photo_000.jpg", (1_000_000_000, 1_000_000_001))
    before = tree(source)
    rows = split(source, tmp_path / "out")
    assert counts_of(rows, "daisy") == [14, 3, 3]  # int(0.15 × 20) = 3, int(0.2 × 17) = 3
    assert counts_of(rows, "rose") == [10, 1, 2]  # int(0.15 × 13) = 1, int(0.2 × 12) = 2
    assert len(tree(tmp_path / "out")) == 33 + 1
    assert below_the_splits(tmp_path / "out") == before  # names, bytes and times
    assert tree(source) == before
    halves = split(source, tmp_path / "half", "--val-size", 0.5, "--test-size", 0.3)
    assert counts_of(halves, "daisy") == [7, 10, 3]


def test_a_seed_gives_one_split_whatever_the_order_on_disk_and_another_seed_another(tmp_path):
    source = make_source(tmp_path / "photos", daisy=12, rose=12)
    again = tmp_path / "again"
    for path in sorted(source.rglob("*.jpg"), reverse=True):
        (again / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, again / path.parent.name)
    first = where(split(source, tmp_path / "out"))
    hashing = {**os.environ, "PYTHONHASHSEED": "77"}
    assert finish(process(again, tmp_path / "out2", "--seed=0", env=hashing)) == (0, "")
    assert where(rows_of(tmp_path / "out2")) == first
    assert where(split(source, tmp_path / "out3", "--seed", 1)) != first
    daisies, roses = (
        [first[f"{name}/photo_{k:03d}.jpg"] for k in range(12)] for name in ("daisy", "rose")
    )
    assert daisies != roses  # each class is drawn for itself


def test_a_new_class_leaves_the_splits_of_the_others_as_they_were(tmp_path):
    source = make_source(tmp_path / "photos", daisy=12, rose=12)
    before = where(split(source, tmp_path / "out"))
    make_source(source, anemone=9)
    after = where(split(source, tmp_path / "out2"))
    assert {path: name for path, name in after.items() if not path.startswith("anemone")} == before


def test_split_csv_tells_for_every_file_where_it_went_and_why(tmp_path):
    source = make_source(tmp_path / "photos", daisy=9, rose=9)
    (source / "flickr.py").write_text("print()")
    (source / "rose" / "notes.txt").write_text("mine")
    (source / "rose" / "empty.jpg").touch()
    shutil.copy(source / "rose/photo_001.jpg", source / "rose/z.jpg")
    for name in ("a", "b", "c", "d"):
        shutil.copy(source / "daisy/photo_002.jpg", source / f"rose/{name}.jpg")
    rows = split(source, tmp_path / "out")
    columns = ["source", "class", "split", "sha256", "group", "reason", "note"]
    assert list(rows[0]) == columns
    assert [row["source"] for row in rows] == [
        "flickr.py",
        *(f"daisy/photo_00{k}.jpg" for k in range(9)),
        *(f"rose/{name}" for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "empty.jpg")),
        "rose/notes.txt",
        *(f"rose/photo_00{k}.jpg" for k in range(9)),
        "rose/z.jpg",
    ]
    conflict = "label conflict: the same picture as "
    daisy = conflict + "daisy/photo_002.jpg"
    expected = {
        "flickr.py": ("", "skipped", "", "is in no class"),
        "daisy/photo_002.jpg": (
            "daisy",
            "skipped",
            "1",
            conflict + "rose/a.jpg, rose/b.jpg, rose/c.jpg and 1 more",
        ),
        **{f"rose/{k}.jpg": ("rose", "skipped", "1", daisy) for k in ("a", "b", "c", "d")},
        "rose/empty.jpg": ("rose", "skipped", "", "is empty"),
        "rose/notes.txt": ("rose", "skipped", "", "holds no photo"),
    }
    for row in rows:
        copy = tmp_path / "out" / row["split"] / row["source"]
        found = (row["class"], row["split"], row["group"], row["note"])
        if row["split"] == "skipped":
            assert found == expected.pop(row["source"])
        else:
            is_copied = row["source"] in ("rose/photo_001.jpg", "rose/z.jpg")
            assert row["class"] == row["source"].partition("/")[0]
            group = (row["group"], row["reason"], row["note"])
            assert group == (("2", "copies", "") if is_copied else ("", "", ""))
            assert hashlib.sha256(copy.read_bytes()).hexdigest() == row["sha256"]
    assert not expected
    moved = {row["source"] for row in rows if row["split"] != "skipped"}
    assert below_the_splits(tmp_path / "out").keys() == moved


def test_link_makes_hard_links_and_falls_back_to_copies_and_says_so(tmp_path, capsys, monkeypatch):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    (source / "rose" / "empty.jpg").touch()
    (source / "rose" / "photo_007.jpg").rename(tmp_path / "elsewhere.jpg")
    (source / "rose" / "photo_007.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    for row in split(source, tmp_path / "out", "--link"):
        if row["split"] != "skipped":
            linked = tmp_path / "out" / row["split"] / row["source"]
            assert linked.samefile(source / row["source"]) and not linked.is_symlink()
    assert "copied" not in capsys.readouterr().out

    def refuse(*_):  # as another file system would, which tests cannot mount
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "link", refuse)
    split(source, tmp_path / "out2", "--link")
    assert "\n16 photos were copied" in capsys.readouterr().out
    assert len(tree(tmp_path / "out2")) == 17


# ---- No picture in two splits --------------------------------------------------------------------


def shrink(image, factor):
    return image.resize((int(image.width * factor), int(image.height * factor)))


def turned(image, degrees):
    """The image turned, without the corners where nothing comes from."""
    width, height = image.size
    large = image.rotate(degrees, Image.Resampling.BICUBIC)
    return large.crop((width // 20, height // 20, width - width // 20, height - height // 20))


def with_watermark(image, place=(165, 135), size=10):
    image = image.copy()
    ImageDraw.Draw(image).text(place, "(c) photo.com", fill="white", font_size=size)
    return image


COPIES = {
    "lower quality": lambda image: image,
    "half the size": lambda image: shrink(image, 0.5),
    "twice the size": lambda image: shrink(image, 2),
    "grey": lambda image: image.convert("L"),
    "a tint": lambda image: Image.blend(image, Image.new("RGB", image.size, (200, 80, 20)), 0.3),
    "more light": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "a little closer": lambda image: image.crop((6, 6, 194, 144)),
    "moved to the right": lambda image: image.crop((7, 0, 200, 150)),
    "moved along both sides": lambda image: image.crop((6, 5, 200, 150)),
    "turned by 2 degrees": lambda image: turned(image, 2),
    "mirrored and moved": lambda image: ImageOps.mirror(image).crop((4, 0, 200, 147)),
    "on its side": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "with a watermark": with_watermark,
    "in a frame": lambda image: ImageOps.expand(image, 8, "white"),
    # It covers a fifth to a third of what has detail.
    "with a large watermark": lambda image: with_watermark(image, (20, 100), 14),
}


def test_every_kind_of_copy_is_found_and_nothing_else(tmp_path):
    source = make_source(tmp_path / "photos", daisy=10, rose=10)
    expected = []
    for seed, (kind, alter) in enumerate(COPIES.items()):
        original = picture(777 + seed, (200, 150))
        original.save(source / f"daisy/{kind}.jpg", quality=95)
        alter(original).save(source / f"daisy/{kind} again.jpeg", quality=60)
        expected.append({f"daisy/{kind}.jpg", f"daisy/{kind} again.jpeg"})
    shutil.copy(source / "rose/photo_003.jpg", source / "rose/same bytes.jpg")
    expected.append({"rose/photo_003.jpg", "rose/same bytes.jpg"})
    rows = split(source, tmp_path / "out")
    found = list(groups_of(rows).values())
    assert sorted(found, key=sorted) == sorted(expected, key=sorted)
    places = where(rows)
    assert all(len({places[path] for path in group}) == 1 for group in found)


def deal(sizes, **free):
    """The sizes of the groups that each split gets; a group is torn if a size is not found."""
    groups = [[split_script.Photo(f"{k} of {size}") for k in range(size)] for size in sizes]
    split_script.deal(groups, dict(free))
    dealt = {name: [] for name in SPLITS}
    for group in groups:
        (name,) = {photo.split for photo in group}
        dealt[name].append(len(group))
    return tuple(sorted(dealt[name]) for name in SPLITS)


def test_groups_are_dealt_out_whole_to_where_most_places_are_free_and_no_split_stays_empty():
    # By hand: 3 → train (14 places, then 11), 3 → train (8), 3 → train (5), then the singles.
    sizes = [1] * 11 + [3, 3, 3]
    train, validation, test = deal(sizes, train=14, validation=3, test=3)
    assert (sum(train), sum(validation), sum(test)) == (14, 3, 3) and train.count(3) == 3
    # A group of 9 is larger than the 6 places that are free anywhere: it goes to train as a whole.
    assert deal([9, 1, 1, 1], train=6, validation=3, test=3)[0] == [9]
    # As many groups as splits: each gets one, though train has most places for the second as well.
    assert deal([10, 7, 1], train=14, validation=2, test=3) == ([10], [1], [7])
    assert deal([8, 8, 2, 2], train=14, validation=3, test=3) == ([8, 8], [2], [2])


def test_a_group_goes_to_one_split_as_a_whole_with_fractions_as_near_as_it_allows(tmp_path):
    source = make_source(tmp_path / "photos", daisy=14, rose=7)
    for index, again in itertools.product(range(3), range(2)):
        original = source / f"daisy/photo_{index:03d}.jpg"
        shutil.copy(original, source / f"daisy/copy {index} {again}.jpg")
    for seed in range(4):
        rows = split(source, tmp_path / "out", "--seed", seed, "--overwrite")
        places = where(rows)
        groups = groups_of(rows).values()
        assert [len(members) for members in groups] == [3, 3, 3]
        assert all(len({places[path] for path in members}) == 1 for members in groups)
        assert counts_of(rows, "daisy") == [14, 3, 3]  # the singles fill up what the groups leave


def test_a_picture_under_two_classes_is_left_out_and_both_sides_are_named(tmp_path, capsys):
    source = make_source(tmp_path / "photos", rose=10, tulip=10)
    small = Image.open(source / "rose/photo_004.jpg").resize((60, 50))
    small.convert("L").save(source / "tulip/small.jpg")
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    assert rows["rose/photo_004.jpg"]["split"] == rows["tulip/small.jpg"]["split"] == "skipped"
    assert "tulip/small.jpg" in rows["rose/photo_004.jpg"]["note"]
    assert "rose/photo_004.jpg" in rows["tulip/small.jpg"]["note"]
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("Label conflicts") and ": 2 " in title
    assert [line.strip().partition(":")[0] for line in lines[:2]] == [
        "rose/photo_004.jpg",
        "tulip/small.jpg",
    ]
    written = below_the_splits(tmp_path / "out")
    assert written.keys().isdisjoint({"rose/photo_004.jpg", "tulip/small.jpg"})


def test_plain_pictures_are_not_taken_for_copies_of_each_other(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    rng = np.random.default_rng(0)
    for index in range(12):
        night = Image.fromarray(rng.integers(0, 12, (80, 96, 3), dtype=np.uint8))
        night.save(source / "daisy" / f"night {index}.png")
        grain = rng.normal(0, 2, (80, 96, 3))
        slope = np.linspace(100 + index, 180 + 3 * index, 96)[None, :, None] + grain
        Image.fromarray(slope.astype(np.uint8)).save(source / "rose" / f"sky {index}.png")
    assert {row["group"] for row in split(source, tmp_path / "out")} == {""}


def frames(seed, count=40, degrees=3):
    """The frames of a video: a picture turned by a few degrees from each to the next."""
    image = picture(seed, (180, 180))
    return [image.rotate(degrees * k).crop((45, 45, 135, 135)) for k in range(count)]


def digits(seed, count=25):
    """Handwritten zeros or sevens of 8 × 8 pixels, each another one, enlarged to 28 × 28."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        large = Image.new("L", (64, 64))
        left, top, right, bottom = rng.normal((14, 6, 50, 58), 3)
        width = int(rng.integers(7, 11))
        if seed == 0:
            ImageDraw.Draw(large).ellipse((left, top, right, bottom), outline=255, width=width)
        else:
            stroke = (left, top, right, top, left, bottom)
            ImageDraw.Draw(large).line(stroke, fill=255, width=width)
        turned = large.rotate(rng.normal(0, 8))
        yield turned.resize((8, 8), Image.Resampling.BOX).resize((28, 28), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("draw", [frames, digits])
def test_copies_are_no_chain_of_pictures_of_which_each_resembles_the_next(tmp_path, draw):
    for seed, name in enumerate(("daisy", "rose")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index, image in enumerate(draw(seed)):
            image.save(tmp_path / "photos" / name / f"{index:03d}.png")
    rows = split(tmp_path / "photos", tmp_path / "out")
    # A frame, two before and two after it, and as many a quarter turn on.
    assert max(map(len, groups_of(rows).values()), default=1) <= 2 * 5
    assert "skipped" not in where(rows).values()


def test_a_group_is_one_picture_and_all_that_resemble_that_one():
    # 0-1-2-3-4 is a chain, 5 to 9 hang on 7, and 10 is alone.
    pairs = [(1, 0), (1, 2), (2, 3), (3, 4), (5, 7), (6, 7), (7, 8), (7, 9)]
    groups = sorted(map(tuple, split_script.star_groups(11, pairs)))
    assert groups == [(0, 1, 2), (3, 4), (5, 6, 7, 8, 9), (10,)]
    # 3 is like 2 alone, which is with 1 already: it joins them, where 6, of the others, does not.
    joined = split_script.star_groups(7, [(0, 1), (1, 2), (1, 4), (2, 3), (5, 6)])
    assert sorted(map(tuple, joined)) == [(0, 1, 2, 3, 4), (5, 6)]
    # The one with the most pairs comes first, not the first one.
    assert sorted(map(tuple, split_script.star_groups(5, [(0, 1), (1, 2), (1, 3)]))) == [
        (0, 1, 2, 3),
        (4,),
    ]


def test_only_identical_files_are_copies_if_asked_for(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=0)
    for index in range(9):
        picture(1).save(source / f"rose/{index}.jpg", quality=70 + index)
    shutil.copy(source / "rose/0.jpg", source / "rose/again.jpg")
    message = refused(source, tmp_path / "out")
    assert "--copies identical" in message and "10 photos" in message
    assert "only 1 group" in message and "2 more" in message
    for index in (*range(6, 9), "again"):
        (source / f"rose/{index}.jpg").unlink()
    picture(2).save(source / "rose/another.jpg")  # seven, as are needed, but two groups
    assert "1 more" in refused(source, tmp_path / "out")
    (source / "rose/another.jpg").unlink()
    for index in range(6, 9):
        picture(1).save(source / f"rose/{index}.jpg", quality=70 + index)
    shutil.copy(source / "rose/0.jpg", source / "rose/again.jpg")
    rows = split(source, tmp_path / "out", "--copies", "identical")
    assert list(groups_of(rows).values()) == [{"rose/0.jpg", "rose/again.jpg"}]
    assert counts_of(rows, "rose") == [8, 1, 1]


@pytest.mark.parametrize("turn", range(8))
def test_likely_pairs_are_those_that_a_search_of_all_pairs_and_turns_finds(turn):
    rng = np.random.default_rng(turn)
    blurred = [picture(seed, (32, 32)).convert("L") for seed in range(300)]
    thumbnails = np.stack([np.asarray(image) for image in blurred])
    known = rng.permutation(300)[:40].reshape(-1, 2)
    # Mirrored left and right for 1, up and down for 2, about the diagonal for 4.
    for one, other in known:
        turned = thumbnails[one][:, ::-1] if turn & 1 else thumbnails[one]
        turned = turned[::-1] if turn & 2 else turned
        thumbnails[other] = turned.T if turn & 4 else turned
    pairs = split_script.likely_pairs(split_script.outlines(thumbnails))
    found = {frozenset(pair[:2]) for pair in pairs}
    assert found == {frozenset(pair) for pair in known.tolist()}


INNER = (20, 20, 220, 220)  # of a picture of 240 × 240 pixels
NEAR = {
    "shifted": lambda scene: scene.crop((27, 27, 227, 227)),
    "enlarged": lambda scene: scene.crop((32, 32, 208, 208)),
    "turned": lambda scene: scene.rotate(5, Image.Resampling.BICUBIC).crop(INNER),
}


@pytest.mark.parametrize("kind", NEAR)
def test_a_picture_shifted_enlarged_or_turned_a_little_is_a_likely_pair(kind):
    scenes = [picture(seed, (240, 240)).convert("L") for seed in range(40)]
    squares = [*(scene.crop(INNER) for scene in scenes), *map(NEAR[kind], scenes)]
    thumbnails = np.stack([np.asarray(square.resize((32, 32))) for square in squares])
    pairs = split_script.likely_pairs(split_script.outlines(thumbnails))
    assert {(k, 40 + k, 0) for k in range(40)} <= set(pairs)


def test_thumbnails_are_aligned_by_the_shift_between_them_and_others_are_told_apart():
    scenes = [np.asarray(picture(seed, (64, 64)).convert("L").resize((44, 44))) for seed in (7, 8)]
    one, moved, other = scenes[0][6:38, 6:38], scenes[0][3:35, 4:36], scenes[1][6:38, 6:38]
    warp = split_script.align_thumbnails(one, moved)  # it lies 2 pixels to the right, 3 down
    assert np.abs(warp - [[1, 0, 2], [0, 1, 3]]).max() < 0.1
    assert split_script.align_thumbnails(one, other) is None


def test_the_close_look_begins_where_the_thumbnails_lay_on_each_other():
    grain = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(grain).resize((160, 160))).transpose(2, 0, 1)
    one, other = scene[:, 16:144, 16:144], scene[:, 16:144, 4:132]  # 12 pixels to the right
    nowhere = np.eye(2, 3, dtype=np.float32)
    by_3_pixels = nowhere + np.float32([[0, 0, 3], [0, 0, 0]])  # of a thumbnail, a quarter as large
    assert split_script.look_closer(one, other, by_3_pixels) == (True, True)
    assert split_script.look_closer(one, other, nowhere) == (False, False)


def garment(outline, cloth, print_seed):
    """A shirt on a sheet: the same outline each time, other folds, colours and prints."""
    rng = np.random.default_rng([outline, print_seed])
    image = Image.new("RGB", (240, 240), (225, 220, 210))
    body = [(60, 50), (100, 40), (140, 40), (180, 50), (215, 95), (185, 110), (178, 95)]
    body += [(178, 205), (62, 205), (62, 95), (55, 110), (25, 95)]
    ImageDraw.Draw(image).polygon(body, fill=cloth)
    folds = Image.fromarray(rng.integers(0, 256, (30, 30), dtype=np.uint8)).resize((240, 240))
    shirt = Image.blend(image, ImageOps.colorize(folds, "black", "white"), 0.12)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(body, fill=255)
    return Image.composite(shirt, image, mask)


def test_the_same_place_and_outline_are_not_the_same_picture(tmp_path):
    source = make_source(tmp_path / "photos", shirt=8, skirt=8)
    for index, cloth in enumerate([(180, 30, 40), (30, 60, 160), (20, 20, 20), (90, 150, 80)]):
        garment(0, cloth, index).save(source / "shirt" / f"{index}.png")
        garment(0, cloth, 10 + index).save(source / "skirt" / f"{index}.png")
    garment(0, (180, 30, 40), 0).save(source / "skirt" / "the same as 0.jpg", quality=80)
    rows = split(source, tmp_path / "out")
    assert list(groups_of(rows).values()) == [{"shirt/0.png", "skirt/the same as 0.jpg"}]


def test_other_colours_mirrors_and_turns_are_copies_within_a_class_and_no_label_conflict(tmp_path):
    source = make_source(tmp_path / "photos", six=8, nine=8)
    scene = picture(50, (200, 150))
    light, blue, red = scene.convert("YCbCr").split()
    opposite = Image.merge("YCbCr", (light, ImageOps.invert(blue), ImageOps.invert(red)))
    altered = {
        "mirrored": ImageOps.mirror(scene),
        "upside down": ImageOps.flip(scene),
        "turned left": scene.transpose(Image.Transpose.ROTATE_90),
        "turned right": scene.transpose(Image.Transpose.ROTATE_270),
        "half turn": scene.transpose(Image.Transpose.ROTATE_180),
        "other colours": opposite.convert("RGB"),
    }
    # One grey scene twice, with blue where the other one has yellow.
    red = picture(52, scene.size).convert("L").point(lambda grey: 90 + grey // 3)
    blue = picture(51, scene.size).convert("L").filter(ImageFilter.GaussianBlur(30))
    blue = ImageOps.autocontrast(blue)
    in_blue = [Image.merge("RGB", (red, red, it)) for it in (blue, ImageOps.invert(blue))]
    for name, image in altered.items():
        image.save(source / "nine" / f"{name}.jpg", quality=85)
    for name, image in zip(("six", "nine"), in_blue, strict=True):
        image.save(source / name / "blue.png")
    (source / "six" / "photo_000.jpg").unlink()
    scene.save(source / "six" / "original.png")
    rows = split(source, tmp_path / "out")
    assert "skipped" not in where(rows).values()
    (group,) = groups_of(rows).values()
    assert group == {f"nine/{name}.jpg" for name in altered}
    scene.save(source / "nine" / "original.png")
    Image.merge("RGB", (red, red, red)).save(source / "nine" / "blue.png")
    rows = split(source, tmp_path / "again")
    conflict = {row["source"] for row in rows if row["note"].startswith("label conflict")}
    assert {
        f"{name}/{file}.png" for name in ("six", "nine") for file in ("original", "blue")
    } <= conflict


def test_no_folder_inside_a_class_and_no_pair_of_copies_is_ever_in_two_splits(tmp_path):
    """Random sets of patients and copies; the oracle looks at every pair of photos."""
    rng = np.random.default_rng(0)
    for trial in range(4):
        source = make_source(tmp_path / f"photos {trial}", daisy=14, rose=14)
        for name in ("daisy", "rose"):
            photos = sorted((source / name).iterdir())
            for patient in range(int(rng.integers(1, 5))):
                chosen = rng.choice(photos, int(rng.integers(1, 4)), replace=False)
                for visit, path in enumerate(chosen):
                    folder = source / name / f"patient{patient}" / f"visit{visit % 2}"
                    folder.mkdir(parents=True, exist_ok=True)
                    # A photo of another patient, or one that lies beside the patients' folders.
                    shutil.copy(path, folder / path.name)
        rows = split(source, tmp_path / f"out {trial}", "--seed", trial)
        assert "skipped" not in where(rows).values()
        for one, other in itertools.combinations(rows, 2):
            patients = [row["source"].split("/")[:2] for row in (one, other)]
            in_one_folder = patients[0] == patients[1] and one["source"].count("/") > 1
            if in_one_folder or one["sha256"] == other["sha256"]:
                assert one["split"] == other["split"]
                assert one["group"] == other["group"] != ""
        assert below_the_splits(tmp_path / f"out {trial}") == tree(source)


def test_split_csv_says_whether_a_folder_or_copies_made_a_group(tmp_path):
    source = make_source(tmp_path / "photos", daisy=9, rose=9)
    for patient, names in {"p0": ("a.jpg", "b.jpg"), "p1": ("c.jpg",)}.items():
        (source / "daisy" / patient).mkdir()
        for name in names:
            picture(ord(name[0])).save(source / "daisy" / patient / name)
    shutil.copy(source / "daisy/photo_000.jpg", source / "daisy/p0/copy.jpg")
    shutil.copy(source / "daisy/p1/c.jpg", source / "daisy/z.jpg")
    (source / "rose" / "p2").mkdir()
    shutil.copy(source / "daisy/photo_002.jpg", source / "rose/p2/in conflict.jpg")
    picture(77).save(source / "rose/p2/alone.jpg")
    (source / "rose" / "p0").mkdir()  # of the same name as a folder of daisies
    for number in (78, 79):
        picture(number).save(source / f"rose/p0/{number}.jpg")
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    reasons = {path: (row["group"], row["reason"]) for path, row in rows.items() if row["group"]}
    assert reasons == {
        "daisy/p0/a.jpg": ("1", "folder"),
        "daisy/p0/b.jpg": ("1", "folder"),
        "daisy/p0/copy.jpg": ("1", "folder and copies"),
        "daisy/photo_000.jpg": ("1", "copies"),
        "daisy/p1/c.jpg": ("2", "copies"),
        "daisy/z.jpg": ("2", "copies"),
        "daisy/photo_002.jpg": ("3", "copies"),
        "rose/p2/in conflict.jpg": ("3", "copies"),
        "rose/p0/78.jpg": ("4", "folder"),
        "rose/p0/79.jpg": ("4", "folder"),
    }
    kept = tmp_path / "out" / rows["daisy/p0/a.jpg"]["split"] / "daisy/p0/a.jpg"
    assert kept.read_bytes() == (source / "daisy/p0/a.jpg").read_bytes()
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_dir() and not any(path.iterdir())
    ]


# ---- A split that others made --------------------------------------------------------------------


def check(source, capsys, *options):
    """Exit code and lines of a check; it must not change a thing."""
    before = tree(source)
    try:
        split_script.main(split_script.parse_options(["--check", str(source), *options]))
        code = 0
    except Stop as stop:
        code = stop.exit_code
        assert str(stop).startswith(f"{source}: ")
    assert tree(source) == before
    return code, capsys.readouterr().out.splitlines()


def test_check_names_what_lies_in_several_parts_or_classes_of_a_split_that_others_made(
    tmp_path, capsys
):
    data = tmp_path / "data"
    split(make_source(tmp_path / "photos", daisy=12, rose=12), data)
    capsys.readouterr()
    assert check(data, capsys) == (0, ["In several parts: 0", "In several classes: 0"])
    for old, new in {"train": "seen", "test": "Unseen photos"}.items():
        (data / old).rename(data / new)
    (data / "seen/daisy/patient").mkdir()
    Image.new("RGB", (9, 9)).save(data / "seen/daisy/patient/a.jpg")
    picture(1, (200, 150)).save(data / "seen/daisy/large.jpg")
    picture(1, (200, 150)).resize((100, 75)).save(data / "Unseen photos/daisy/small.png")
    picture(2).save(data / "validation/rose/one.png")
    picture(2).save(data / "validation/daisy/other.png")
    (data / "seen/rose/empty.jpg").touch()
    code, lines = check(data, capsys)
    assert code == 1
    assert lines == [
        "In several parts: 1",
        "  Unseen photos/daisy/small.png = seen/daisy/large.jpg",
        "In several classes: 1",
        "  validation/daisy/other.png = validation/rose/one.png",
        "Not looked at: seen/rose/empty.jpg: is empty",
    ]


def test_check_fails_where_it_finds_something_and_only_there(tmp_path, capsys):
    for name in ("train", "test"):
        make_source(tmp_path / "data" / name, daisy=0, rose=0)
    (tmp_path / "data/train/rose/empty.jpg").touch()
    assert check(tmp_path / "data", capsys)[0] == 0
    picture(1).save(tmp_path / "data/test/rose/one.png")
    picture(1).save(tmp_path / "data/test/rose/other.png")  # in one part and one class
    assert check(tmp_path / "data", capsys)[0] == 0
    picture(2).save(tmp_path / "data/test/rose/two.png")
    picture(2).save(tmp_path / "data/test/daisy/two.png")
    assert check(tmp_path / "data", capsys)[0] == 1
    (tmp_path / "data/test/daisy/two.png").rename(tmp_path / "data/train/rose/two.png")
    assert check(tmp_path / "data", capsys)[0] == 1
    picture(2).save(tmp_path / "data/train/rose/two.jpg", quality=60)  # alike, but not identical
    (tmp_path / "data/train/rose/two.png").unlink()
    assert check(tmp_path / "data", capsys)[0] == 1
    assert check(tmp_path / "data", capsys, "--copies", "identical")[0] == 0


def test_check_takes_the_photos_beside_a_split_for_no_part_of_it(tmp_path, capsys):
    source = make_source(tmp_path / "data" / "flowers", daisy=8, rose=8)
    split(source, tmp_path / "data")
    capsys.readouterr()
    nothing = ["In several parts: 0", "In several classes: 0"]
    assert check(tmp_path / "data", capsys) == (0, nothing)
    shutil.copy(source / "rose/photo_003.jpg", tmp_path / "data/test/rose/again.jpg")
    shutil.copy(source / "rose/photo_003.jpg", tmp_path / "data/validation/rose/again.jpg")
    assert check(tmp_path / "data", capsys)[0] == 1


def test_a_label_conflict_names_three_others_and_counts_only_what_is_left(tmp_path):
    source = make_source(tmp_path / "photos", daisy=9, rose=9)
    for name in ("a", "b", "c"):
        shutil.copy(source / "daisy/photo_002.jpg", source / f"rose/{name}.jpg")
    rows = {row["source"]: row["note"] for row in split(source, tmp_path / "out")}
    assert rows["daisy/photo_002.jpg"].endswith("rose/a.jpg, rose/b.jpg, rose/c.jpg")


def test_check_refuses_what_is_not_split(tmp_path):
    make_source(tmp_path / "folders" / "daisy", patient0=1, patient1=1)
    make_source(tmp_path / "folders" / "rose", patient2=1)
    assert "is not split" in refused(tmp_path / "folders", tmp_path / "out", "--check")
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    assert "is not split" in refused(source, tmp_path / "out", "--check")
    assert "No such file" in refused(tmp_path / "missing", tmp_path / "out", "--check")


# ---- Bad files -----------------------------------------------------------------------------------


def write_jpeg(path, **options):
    picture(4242, (300, 200)).save(path, "JPEG", **options)


def cut_off(path, end, **options):
    write_jpeg(path, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if end == "half" else end])


def without_its_last_scan(path):
    write_jpeg(path, progressive=True)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\xff\xda")])  # right between two scans


def giant(path):
    path.write_bytes(b"P6 20000 20000 255\n" + bytes(300))


BAD_FILES = {
    "half-cut.jpg": (lambda path: cut_off(path, "half"), "cut off"),
    "cut by a byte of pixels.jpg": (lambda path: cut_off(path, -3), "cut off"),
    "without its end marker.jpg": (lambda path: cut_off(path, -2), "cut off"),
    "progressive half.jpg": (lambda path: cut_off(path, "half", progressive=True), "cut off"),
    "without its last scan.jpg": (without_its_last_scan, "cut off"),
    "zero bytes.jpg": (lambda path: path.touch(), "is empty"),
    "a web page.jpg": (lambda path: path.write_text("<html>404</html>" * 50), "holds no photo"),
    "a text.txt": (lambda path: path.write_text("mine"), "holds no photo"),
    "no suffix": (lambda path: path.write_text("mine"), "holds no photo"),
    ".hidden.jpg": (write_jpeg, "hidden"),
    "broken link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "broken link"),
    "circle.jpg": (lambda path: path.symlink_to(path), "broken link"),
    "circle": (lambda path: path.symlink_to(path), "broken link"),
    "link to a folder": (lambda path: path.symlink_to(path.parent), "is a folder"),
    ".ipynb_checkpoints/copy.jpg": (write_jpeg, "hidden"),
    "patient/__MACOSX/copy.jpg": (write_jpeg, "hidden"),
    "fifo.jpg": (lambda path: os.mkfifo(path), "not a photo"),
    "giant.ppm": (giant, "too large"),
}


def test_bad_files_are_skipped_with_their_reasons_and_nothing_else_is_lost(tmp_path, capsys):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    made = {}
    for name, (write, reason) in BAD_FILES.items():
        try:
            (source / "rose" / name).parent.mkdir(parents=True, exist_ok=True)
            write(source / "rose" / name)
            made[f"rose/{name}"] = reason
        except (OSError, AttributeError, NotImplementedError):
            continue  # this machine cannot make it
    assert len(made) == len(BAD_FILES) or os.name == "nt"
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    for path, reason in made.items():
        row = rows.pop(path)
        assert (row["class"], row["split"]) == ("rose", "skipped")
        assert reason in row["note"], path
    assert "skipped" not in {row["split"] for row in rows.values()}
    assert len(tree(tmp_path / "out")) == 17
    printed = capsys.readouterr()
    assert printed.err == ""
    title, *lines = printed.out.splitlines()
    assert title.startswith(f"Skipped: {len(made)} ")
    named = itertools.takewhile(lambda line: line.startswith("  rose/"), lines)
    in_order = sorted(made, key=os.fsencode)[:8]  # the table has them all
    assert [line.strip().partition(": ")[0] for line in named] == in_order


def test_hidden_folders_macosx_and_a_nested_copy_of_the_set_are_no_classes(tmp_path, capsys):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    shutil.copytree(source, tmp_path / "flowers")
    shutil.move(tmp_path / "flowers", source / "flowers")
    for name in ("__MACOSX", ".cache"):
        shutil.copytree(source / "rose", source / name)
    split(source, tmp_path / "out")
    assert split_script.class_folders(tmp_path / "out" / "train") == ["daisy", "rose"]
    assert "flowers: is in no class" in capsys.readouterr().out


LOCALES = [
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
]


@pytest.mark.parametrize("settings", LOCALES)
def test_any_name_that_the_file_system_holds_is_carried_over(tmp_path, settings):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    names = ["two words.JPG", "花 ü.Jpeg", "x" * 246 + ".png", "[red]50%;'$(x).bmp", 'a,"b".tif']
    names += [] if os.name == "nt" else ["new\nline.jpg", os.fsdecode(b"latin \xe9.jpg")]
    for k in range(0 if os.name == "nt" else 5):  # what sorts differently as bytes and as letters
        names += [os.fsdecode(b"\xe9%d.jpg" % k), f"한{k}.jpg"]
    written = []
    for index, name in enumerate(names):
        try:
            picture(index).save(source / "rose" / name, "JPEG")
            written.append(f"rose/{name}")
        except OSError:
            continue  # this file system cannot hold it
    (source / "rose" / "empty\n花.jpg").touch()
    giant(source / "rose" / "giant.ppm")  # of which Pillow has more to say than the table
    started = process(source, tmp_path / "out", env={**os.environ, **settings})
    printed, messages = started.communicate(timeout=60)
    assert (started.returncode, messages) == (0, "")
    flower = "\\u82b1" if "PYTHONIOENCODING" in settings else "花"
    assert f"  rose/empty\\n{flower}.jpg: is empty\n" in printed
    rows = where(rows_of(tmp_path / "out"))
    for path in written:
        assert (tmp_path / "out" / rows[path] / path).is_file()
    assert where(split(source, tmp_path / "again")) == rows  # whatever the locale


@posix_only
def test_the_command_that_is_printed_can_be_pasted(tmp_path, capsys):
    output = tmp_path / "it's 花 ${HOME} *"
    split(make_source(tmp_path / "photos", daisy=8, rose=8), output)
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("Next: ")
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {command}"], text=True)
    python, script, option, folder, _ = words.split("\0")
    assert (python, option, folder) == ("python", "--data", str(output))
    assert Path(script).resolve() == SCRIPT.with_name("model_training_and_visualization.py")
    assert pasteable("cat", Path("a b"), "") == "cat 'a b' ''"


def test_names_alike_but_for_case_are_two_photos(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    picture(1).save(source / "rose" / "a.jpg")
    if (source / "rose" / "A.JPG").exists():
        pytest.skip("the file system takes both names for one")
    picture(2).save(source / "rose" / "A.JPG")
    split(source, tmp_path / "out")
    assert below_the_splits(tmp_path / "out") == tree(source)


# ---- Refused with exit code 2 and nothing written ------------------------------------------------


def refused(source, output, *options):
    """The message of a run that must stop with exit code 2 and write nothing."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(Stop) as stop:
        split(source, output, *options)
    assert stop.value.exit_code == 2
    assert len(str(stop.value).splitlines()) <= 3
    assert sorted(source.parent.rglob("*")) == before
    return str(stop.value)


def test_a_source_that_is_missing_or_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, reason in {"missing": "No such file", "file": "Not a directory"}.items():
        message = refused(tmp_path / name, tmp_path / "out")
        assert message.startswith(f"{tmp_path / name}: {reason}") and "a class" in message


def test_a_missing_folder_flowers_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = refused(Path("flowers"), tmp_path / "out").splitlines()[-1].partition(": ")[2]
    _, script, folder = command.split()
    assert Path(script).samefile(SCRIPT.parent / "tests/draw_flowers.py") and folder == "flowers"


def test_a_source_that_is_itself_split_is_refused_by_that_name(tmp_path):
    for part in ("Training", "val", "test"):
        make_source(tmp_path / "photos" / part, daisy=1, rose=1)
    message = refused(tmp_path / "photos", tmp_path / "out")
    assert "is itself split, into Training and test and val" in message


@posix_only
@pytest.mark.parametrize("folder", [".", "daisy"])
def test_a_source_or_a_class_that_may_not_be_read_is_refused(tmp_path, folder):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    unreadable = os.fspath(source / folder)
    # As the file system would refuse it, were these tests not run by root.
    refuse = f"""
        if event in ("os.scandir", "os.listdir") and os.fspath(arguments[0]) == {unreadable!r}:
            raise PermissionError(13, "Permission denied", {unreadable!r})
    """
    code, message = finish(process(source, tmp_path / "out", on_event=refuse))
    assert code == 2
    assert message.startswith(f"{unreadable}: Permission denied") and "that you may read" in message
    assert not (tmp_path / "out").exists()


def test_no_class_and_one_class_are_refused_and_classes_one_folder_deeper_are_pointed_out(tmp_path):
    make_source(tmp_path / "photos", daisy=8)
    assert "two classes are needed, 1 found" in refused(tmp_path / "photos", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "two classes are needed, 0 found" in refused(tmp_path / "empty", tmp_path / "out")
    deeper = make_source(tmp_path / "unzipped" / "flowers", daisy=1, rose=1)
    assert str(deeper) in refused(tmp_path / "unzipped", tmp_path / "out")


def test_a_class_without_a_usable_photo_is_named(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=0)
    assert "class rose: has 0 usable photos" in refused(source, tmp_path / "out")
    (source / "rose" / "empty.jpg").touch()
    assert "rose/empty.jpg: is empty" in refused(source, tmp_path / "out")


def test_a_class_too_small_for_three_splits_is_named_with_the_number_it_needs(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=6)
    message = refused(source, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    assert "class rose: has 6 " in message and "need 7" in message  # int(0.15 × 7), int(0.2 × 6)
    assert "1 more" in message
    picture(5).save(source / "rose" / "seventh.jpg")
    assert counts_of(split(source, tmp_path / "out"), "rose") == [5, 1, 1]


@pytest.mark.parametrize("option", ["--val-size", "--test-size"])
@pytest.mark.parametrize("size", ["0", "1", "-0.2", "15", "nan"])
def test_fractions_that_make_no_sense_are_refused(option, size, capsys):
    with pytest.raises(SystemExit) as end:
        split_script.parse_options([f"{option}={size}"])
    assert end.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert f"{option}: {size} is none from 0.01 to 0.99" in last_line


def test_an_output_in_the_source_and_a_source_in_the_output_are_refused(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    assert "outside" in refused(source, source)
    assert "outside" in refused(source, source / "deep" / "er")
    (tmp_path / "file").touch()
    assert "is no folder" in refused(source, tmp_path / "file")
    split(source, tmp_path / "out")
    message = refused(tmp_path / "out" / "train", tmp_path / "out", "--overwrite")
    assert "part of the split" in message
    (source / "tulip").symlink_to(tmp_path / "out" / "train" / "daisy")
    message = refused(source, tmp_path / "out", "--overwrite")
    assert message.startswith(f"{source / 'tulip'}: is itself part of the split")


def test_a_second_run_is_refused_unless_overwrite_replaces_the_split_as_a_whole(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    first = split(source, tmp_path / "out")
    changed = (tmp_path / "out").stat().st_mtime_ns
    assert "--overwrite" in refused(source, tmp_path / "out", "--seed", "3")
    assert (tmp_path / "out").stat().st_mtime_ns == changed  # not even a lock came and went
    (tmp_path / "out" / "train" / "daisy" / "stray.jpg").touch()
    shutil.rmtree(source / "rose")
    make_source(source, tulip=8)
    rows = split(source, tmp_path / "out", "--seed", 3, "--overwrite")
    assert where(rows) != where(first)
    expected = {f"{row['split']}/{row['source']}" for row in rows} | {"split.csv"}
    assert set(tree(tmp_path / "out")) == expected
    assert {path.name for path in (tmp_path / "out").iterdir()} == RESULTS


# ---- All or nothing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory):
    """A folder with a source, "photos", and its splits of seed 0, "out", and 1, "other"."""
    folder = tmp_path_factory.mktemp("two_splits")
    source = make_source(folder / "photos", daisy=8, rose=8)
    split(source, folder / "out")
    split(source, folder / "other", "--seed", 1)
    return folder


@pytest.fixture
def whole(two_splits, tmp_path):
    """A source, and an output that holds the split of seed 0, as a tree."""
    for name in ("photos", "out"):
        shutil.copytree(two_splits / name, tmp_path / name)
    return tmp_path / "photos", tmp_path / "out", tree(tmp_path / "out")


# The last photo: by then all work is handed out, and the main thread waits for it.
IS_LAST_PHOTO = 'event == "open" and str(arguments[0]).endswith("photos/rose/photo_007.jpg")'


@posix_only
def test_a_write_that_fails_ends_the_run_with_exit_1_and_leaves_the_old_split(whole):
    source, output, before = whole
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "rose/big.png")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    code, message = finish(process(source, output, "--overwrite", before=limit))
    assert code == 1
    assert "big.png: File too large" in message and len(message.splitlines()) <= 3
    assert tree(output) == before


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_the_old_split_and_nothing_else(whole, number, code):
    source, output, before = whole
    interrupt = f"""
        if {IS_LAST_PHOTO}:
            os.kill(os.getpid(), {int(number)})
    """
    returned, message = finish(process(source, output, "--overwrite", on_event=interrupt))
    assert returned == code
    assert message == ("Stopped by Ctrl-C.\n" if code == 130 else "")
    assert tree(output) == before


@posix_only
@pytest.mark.parametrize("first", ["building", "moving"])
def test_ctrl_c_again_and_again_waits_until_nothing_hidden_is_left(whole, two_splits, first):
    source, output, before = whole
    begins = {
        "building": IS_LAST_PHOTO,
        "moving": 'event == "os.rename" and os.path.basename(arguments[1]) == "validation"',
    }
    interrupt = f"""
        global begun
        begun = globals().get("begun") or {begins[first]}
        if begun and event in ("open", "os.rename", "shutil.rmtree", "os.remove", "os.rmdir"):
            os.kill(os.getpid(), signal.SIGINT)
    """
    started = process(source, output, "--overwrite", "--seed=1", on_event=interrupt)
    assert finish(started) == (130, "Stopped by Ctrl-C.\n")
    assert {path.name for path in output.iterdir()} == RESULTS
    after, new = tree(output), tree(two_splits / "other")
    del after["split.csv"], before["split.csv"], new["split.csv"]
    assert after == (before if first == "building" else new)


@posix_only
def test_the_workers_of_a_killed_run_end_with_it(whole):
    source, output, _ = whole
    slow = f"""
        if {IS_LAST_PHOTO}:
            print("reading", flush=True)
            time.sleep(60)
    """
    started = process(source, output, "--overwrite", on_event=slow)
    assert started.stdout.readline() == "reading\n"
    with pytest.raises(Stop, match="another run"):
        split(source, output, "--overwrite")
    started.kill()
    started.communicate(timeout=10)  # the pipes close when the last worker has ended
    split(source, output, "--overwrite")  # and with it the lock


@posix_only
def test_a_run_killed_while_it_builds_leaves_the_old_split_and_the_next_clears_up(whole):
    source, output, before = whole
    kill = f"""
        if {IS_LAST_PHOTO}:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    started = process(source, output, "--overwrite", "--seed=1", on_event=kill)
    assert finish(started)[0] == -signal.SIGKILL
    left = tree(output)
    assert len(left) > len(before)
    assert {path: left[path] for path in left if not path.startswith(".")} == before
    with pytest.raises(Stop, match="--overwrite"):
        split(source, output)  # clears first, although it goes no further
    assert tree(output) == before


@posix_only
@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_killed_between_its_moves_never_shows_a_mix_and_the_next_finishes_it(
    whole, two_splits, step
):
    source, output, before = whole
    new = tree(two_splits / "other")
    # Nine moves: split.csv is complete, then four old ones leave, then four new ones come.
    kill = f"""
        global moves
        if event == "os.rename" and os.path.basename(arguments[1]) in {RESULTS}:
            moves = globals().get("moves", 0) + 1
            if moves == {step}:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    started = process(source, output, "--overwrite", "--seed=1", on_event=kill)
    assert finish(started)[0] == -signal.SIGKILL
    visible = {path for path in tree(output) if not path.startswith(".")}
    assert visible <= set(before) or visible <= set(new)
    with pytest.raises(Stop, match="--overwrite"):
        split(source, output)
    after = tree(output)
    del after["split.csv"], before["split.csv"], new["split.csv"]
    assert after == (before if step == 1 else new)  # the first move is the one that counts


@posix_only
@pytest.mark.parametrize("step", [1, 2, 5, 6, 9])
def test_ctrl_c_between_the_moves_leaves_one_whole_split_and_nothing_hidden(
    whole, two_splits, step
):
    source, output, before = whole
    new = tree(two_splits / "other")
    interrupt = f"""
        global moves
        if event == "os.rename" and os.path.basename(arguments[1]) in {RESULTS}:
            moves = globals().get("moves", 0) + 1
            if moves == {step}:
                os.kill(os.getpid(), signal.SIGINT)
    """
    started = process(source, output, "--overwrite", "--seed=1", on_event=interrupt)
    assert finish(started) == (130, "Stopped by Ctrl-C.\n")
    assert {path.name for path in output.iterdir()} == RESULTS
    after = tree(output)
    del after["split.csv"], before["split.csv"], new["split.csv"]
    assert after in (before, new) if step == 1 else after == new


# ---- What both scripts share ---------------------------------------------------------------------


def test_a_photo_is_read_as_a_person_sees_it_turned_by_its_exif_orientation(tmp_path):
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90° clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "turned.png"), np.rot90(np.array(image), -1))


def test_every_mode_is_read_as_rgb(tmp_path):
    red = (200, 40, 40)
    Image.new("RGB", (20, 10), red).quantize(4).save(tmp_path / "palette.png")
    Image.new("RGB", (20, 10), red).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.new("RGBA", (20, 10), (*red, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (20, 10), (40, 255)).save(tmp_path / "grey.png")
    expected = {"palette.png": red, "cmyk.tif": red, "clear.png": 255, "grey.png": 40}
    for name, colour in expected.items():
        photo = read_photo(tmp_path / name)
        assert (photo.shape, photo.dtype) == ((10, 20, 3), np.uint8), name
        assert np.abs(photo.astype(int) - colour).max() <= 6, name


SUFFIXES = ["webp", "avif", "jfif", "gif", "jp2", "qoi", "tga", "ppm", "tif", "pcx", "sgi", "dds"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_photos_of_all_types_that_phones_and_the_web_save_are_split_and_read(tmp_path, suffix):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    path = source / "rose" / f"photo.{suffix.upper()}"
    frames = [picture(5), picture(6)] if suffix == "gif" else [picture(5)]
    kind = {"jfif": "JPEG"}.get(suffix)
    more = {"save_all": True, "append_images": frames[1:]} if suffix == "gif" else {}
    frames[0].save(path, kind, **more)
    read = read_photo(path).astype(int)
    assert np.abs(read - np.array(frames[0])).mean() < 8  # the first frame, but for lossy pixels
    shutil.copy(path, source / "daisy" / "of any name")
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    assert rows[f"rose/{path.name}"]["note"].startswith("label conflict")
    assert rows["daisy/of any name"]["note"].startswith("label conflict")


def test_what_is_inside_makes_a_photo_whatever_its_name_says(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    kinds = {"photo": "JPEG", "a.jpg_large": "JPEG", "b.jpg.download": "PNG", "c.dat": "WEBP"}
    kinds |= {"scan": "TIFF", "raw.nef": "TIFF", "d.txt": "TGA", "e.db": "PCX"}
    for seed, (name, kind) in enumerate(kinds.items()):
        picture(seed).save(source / "rose" / name, kind)
    others = {
        "thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
        "a film.mp4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(600),
        "pages.pdf": b"%PDF-1.7\n" + bytes(600),
        "array.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}" + bytes(600),
        "cars.txt": b"BMW and Porsche\n" * 40,
        "paper sizes": b"P6 is no size\n" * 40,
        "zeros.bin": bytes(6000),
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    }
    for name, data in others.items():
        (source / "rose" / name).write_bytes(data)
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    for name in kinds:
        path = tmp_path / "out" / rows[f"rose/{name}"]["split"] / "rose" / name
        assert split_script.is_photo(path) and read_photo(path).shape == (80, 96, 3)
    for name in others:
        row = rows[f"rose/{name}"]
        assert (row["split"], row["note"]) == ("skipped", "holds no photo")


def test_a_jpeg_of_108_million_pixels_is_taken_and_another_type_of_as_many_is_not(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    large = Image.new("L", (12_000, 9_000), 40)
    large.paste(200, (0, 0, 6_000, 9_000))
    large.save(source / "rose" / "large.jpg", quality=30)
    (source / "rose" / "large.ppm").write_bytes(b"P5 12000 9000 255\n" + bytes(300))
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    assert rows["rose/large.jpg"]["split"] in SPLITS
    assert rows["rose/large.ppm"]["note"] == "is too large, over 90,000,000 pixels"
    photo = read_photo(source / "rose" / "large.jpg")  # at half its scale, as it would not fit
    assert photo.shape == (4_500, 6_000, 3)
    assert abs(photo[:, :2900].mean() - 200) < 2 and abs(photo[:, 3100:].mean() - 40) < 2
    Image.new("L", (20_000, 19_800)).save(tmp_path / "huge.jpg")
    assert read_photo(tmp_path / "huge.jpg").shape == (4_950, 5_000, 3)  # at a quarter


def test_a_grey_picture_of_more_than_8_bits_is_scaled_by_its_brightest_pixel(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    ramp = np.linspace(0, 1, 9 * 60).reshape(9, 60)
    deep = {
        "10 bits.tif": (ramp * 1023).astype(np.uint16),
        "16 bits.png": (ramp * 65535).astype(np.uint16),
        "floats.tif": (ramp * 0.5).astype(np.float32),
    }
    for name, samples in deep.items():
        Image.fromarray(samples).save(source / "rose" / name)
        photo = read_photo(source / "rose" / name)
        assert np.abs(photo - samples[..., None] * (255 / samples.max())).max() <= 0.51, name
    Image.fromarray(np.zeros((9, 60), np.uint16)).save(tmp_path / "black.png")
    assert not read_photo(tmp_path / "black.png").any()
    broken = (ramp * 0.5).astype(np.float32)
    broken[0, :3] = np.inf, -np.inf, np.nan  # pixels that a sensor lost: the rest stays as it is
    Image.fromarray(broken).save(tmp_path / "broken.tif")
    difference = read_photo(tmp_path / "broken.tif")[1:, :, 0] - ramp[1:] * 255
    assert np.abs(difference).max() <= 0.51
    notes = {row["source"]: row["note"] for row in split(source, tmp_path / "out")}
    found = {path: note for path, note in notes.items() if note}
    assert found.keys() == {f"rose/{name}" for name in deep}
    assert "1023" in found["rose/10 bits.tif"] and "0.5" in found["rose/floats.tif"]


@pytest.mark.parametrize("chunk", ["text", "compressed text", "international text", "profile"])
def test_a_png_with_a_lot_of_text_or_a_large_colour_profile_is_read(tmp_path, chunk):
    text, profile = PngImagePlugin.PngInfo(), None
    much = "text " * 400_000
    if chunk == "profile":
        profile = np.random.default_rng(0).bytes(2_000_000)
    elif chunk == "text":
        for index in range(40):
            text.add_text(f"part {index}", much)  # 80 MB in all
    elif chunk == "compressed text":
        text.add_text("much", much, zip=True)
    else:
        text.add_itxt("much", much, zip=True)
    picture(3).save(tmp_path / "large.png", pnginfo=text, icc_profile=profile)
    assert np.array_equal(read_photo(tmp_path / "large.png"), np.array(picture(3)))


def test_a_reduced_jpeg_is_the_same_picture_with_both_sides_long_enough(tmp_path):
    picture(9, (640, 400)).save(tmp_path / "large.jpg", quality=95)
    small = read_photo(tmp_path / "large.jpg", at_least=100)
    assert small.shape == (100, 160, 3)
    large = Image.fromarray(read_photo(tmp_path / "large.jpg"))
    expected = ImageOps.scale(large, 0.25, Image.Resampling.BOX)
    assert np.abs(np.asarray(expected, int) - small).mean() < 2


def test_a_photo_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(Stop, match=r"a b\.jpg: is a broken link|a b\.jpg: No such file"):
        read_photo(tmp_path / "a b.jpg")


def test_photos_are_mapped_in_order_by_as_many_threads_as_there_are_cores():
    threads = set()
    together = threading.Barrier(split_script.cores(), timeout=10)

    def work(number):
        if number < split_script.cores():
            together.wait()  # breaks where fewer threads than cores work at once
        threads.add(threading.get_ident())
        return -number

    assert list(split_script.map_photos(iter(range(40)), work, "")) == [-k for k in range(40)]
    assert len(threads) == split_script.cores()


def test_photos_that_nobody_waits_for_any_more_are_left():
    done = []

    def work(number):
        time.sleep(0.001)
        done.append(number)

    results = split_script.map_photos(range(1000), work, "")
    next(results)
    results.close()  # as Ctrl-C closes it
    assert len(done) < 500


@posix_only
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_only_the_cores_that_this_process_may_use_are_counted():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert split_script.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_file_is_replaced_only_when_its_successor_is_whole(tmp_path):
    target = tmp_path / "model.weights.h5"
    target.write_text("old")
    with pytest.raises(ValueError), replace_when_whole(target) as partial:
        partial.write_text("half")
        raise ValueError
    assert target.read_text() == "old"
    with replace_when_whole(target) as partial:
        assert partial.name.startswith(".") and partial.name.endswith(".weights.h5")
        partial.write_text("new")
        assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.weights.h5"]
    assert target.read_text() == "new"


def test_the_remains_of_a_killed_write_are_cleared_and_those_of_a_running_one_are_not(tmp_path):
    write = "import os; file = open(f'.partial{os.getpid()}-model.keras', 'w')"
    write += "; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    running = subprocess.Popen([sys.executable, "-c", write], cwd=tmp_path, **pipes)
    running.stdout.readline()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".partial{ended.pid}-model.keras").touch()
    (tmp_path / f".partial{ended.pid}-other.keras").touch()
    with replace_when_whole(tmp_path / "model.keras") as partial:
        partial.touch()
    running.communicate(b"\n")
    expected = {f".partial{running.pid}-model.keras", f".partial{ended.pid}-other.keras"}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"model.keras"}


@pytest.mark.parametrize(
    ("words", "unloaded"),
    [
        (["--help"], {"numpy", "PIL", "cv2"}),
        (["none"], {"tensorflow", "keras", "matplotlib", "scipy"}),
    ],
)
def test_what_a_run_does_not_need_is_not_loaded(words, unloaded):
    code = f"""
import runpy, sys
sys.argv = [{os.fspath(SCRIPT)!r}, *{words}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("loaded:", {unloaded} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "loaded: set()"


# ---- What is printed -----------------------------------------------------------------------------


def test_a_run_without_a_terminal_prints_only_its_table_and_what_to_run_next(tmp_path):
    source = make_source(tmp_path / "photos", daisy=80, rose=68)
    printed, messages = process(source, tmp_path / "out").communicate(timeout=60)
    assert messages == ""
    assert [line.split() for line in printed.splitlines()[:-1]] == [
        ["train", "validation", "test", "skipped"],
        ["daisy", "55", "12", "13", "0"],  # int(0.15 × 80) = 12, int(0.2 × 68) = 13
        ["rose", "47", "10", "11", "0"],  # ten photos are no longer few
    ]
    training = "python model_training_and_visualization.py"
    assert printed.splitlines()[-1] == f"Next: {training} --data {tmp_path / 'out'}"


def test_few_photos_and_those_that_are_skipped_are_counted(tmp_path, capsys):
    source = make_source(tmp_path / "photos", daisy=64, rose=80)
    (source / "daisy" / "empty.jpg").touch()
    split(source, tmp_path / "out")
    *_, daisy, rose, few, _ = capsys.readouterr().out.splitlines()
    assert daisy.split() == ["daisy", "44", "9", "11", "1"]  # int(0.15 × 64), int(0.2 × 55)
    assert rose.split() == ["rose", "55", "12", "13", "0"]
    assert "Only 9 of daisy in validation" in few


@posix_only
def test_a_terminal_sees_the_progress(whole):
    import pty

    source, output, _ = whole
    ours, terminal = pty.openpty()
    started = process(source, output, "--overwrite", stderr=terminal)
    started.communicate(timeout=60)
    os.close(terminal)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert started.returncode == 0 and "Checking and copying" in shown and "100%" in shown


FAILURES = [
    (
        OSError(errno.ENOSPC, "", "a.jpg"),
        "a.jpg: No space left on device.\nFree some space there, or",
    ),
    (
        OSError(errno.EACCES, "", "a.jpg"),
        "a.jpg: Permission denied.\nCheck the permissions there, or",
    ),
    (OSError(errno.EIO, "", "a.jpg"), "a.jpg: Input/output error.\nChoose another place"),
    (OSError("encoder error -2"), "encoder error -2\n"),
]


@posix_only
@pytest.mark.parametrize(("error", "message"), FAILURES)
def test_a_failure_is_told_with_its_own_reason_and_remedy(capsys, error, message):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        split_script.run(fail)
    assert end.value.code == 1 and capsys.readouterr().err.startswith(message)


def test_an_encoder_that_fails_is_told_with_the_file_and_its_reason(tmp_path, capsys):
    def write():
        with replace_when_whole(tmp_path / "large.jpg") as partial:
            Image.new("L", (160, 66_000)).save(partial, "JPEG")

    with pytest.raises(SystemExit):
        split_script.run(write)
    message = capsys.readouterr().err
    assert message.startswith(f"{tmp_path / 'large.jpg'}: ") and "None" not in message
    assert "space" not in message


@posix_only
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full", "| true"])
def test_a_run_survives_streams_that_are_closed_or_full(whole, tmp_path, closed):
    source, _, _ = whole
    words = (sys.executable, "-OO", SCRIPT, source, "--output", tmp_path / "new")
    # The reader of a pipe may leave before or after the last line is written.
    command = ["bash", "-c", f"{pasteable(*words)} {closed}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode in {"> /dev/full": {1}, "| true": {0, 1}}.get(closed, {0})
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    # Nothing that was printed has gone into a photo.
    assert below_the_splits(tmp_path / "new") == tree(source)
    if closed != "| true":
        assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 2  # it is there now


@pytest.mark.parametrize("stream", [None, io.StringIO])
def test_a_run_survives_a_thread_and_streams_that_are_no_files(
    whole, tmp_path, monkeypatch, stream
):
    source, _, _ = whole
    for name in ("stdout", "stderr"):  # as pythonw and a notebook have them
        monkeypatch.setattr(sys, name, stream and stream())
    options = options_for(source, tmp_path / "new")
    before = signal.getsignal(signal.SIGTERM)
    run = [lambda: split_script.main(options)]
    thread = threading.Thread(target=split_script.run, args=run)
    thread.start()
    thread.join()
    assert len(tree(tmp_path / "new")) == 17
    with pytest.raises(SystemExit) as end:  # in the main thread: refused, as the split is there
        split_script.run(*run)
    assert end.value.code == 2
    assert signal.getsignal(signal.SIGTERM) == before

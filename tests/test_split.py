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
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps, PngImagePlugin

import create_train_val_test as split_script
from create_train_val_test import SPLITS, Stop, pasteable, read_photo, replace_when_whole

SCRIPT = Path(split_script.__file__)
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


def split(source, output, *options):
    """Run main() in this process; the rows of split.csv."""
    arguments = [
        "create_train_val_test.py",
        str(source),
        "--output",
        str(output),
        *map(str, options),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        split_script.main()
    return rows_of(output)


def rows_of(output):
    with (output / "split.csv").open(
        encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        return list(csv.DictReader(file))


def process(source, output, *options, before="", **settings):
    """Start the script in a process of its own, after the statements `before`."""
    code = "import os, signal, sys, time, create_train_val_test as script"
    code = f"{code}\n{textwrap.dedent(before)}\nscript.run(script.main)"
    command = [sys.executable, "-c", code, str(source), "--output", str(output), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=SCRIPT.parent, **pipes, **settings)


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


def where(rows):
    return {row["source"]: row["split"] for row in rows}


def counts_of(rows, class_name):
    counts = Counter(row["split"] for row in rows if row["class"] == class_name)
    return [counts[name] for name in SPLITS]


# ---- The split -----------------------------------------------------------------------------------


def test_each_class_gets_the_fractions_and_every_photo_is_in_one_split(tmp_path):
    source = make_source(tmp_path / "photos", daisy=20, rose=13)
    rows = split(source, tmp_path / "out")
    assert counts_of(rows, "daisy") == [14, 3, 3]  # int(0.15 × 20) = 3, int(0.2 × 17) = 3
    assert counts_of(rows, "rose") == [10, 1, 2]  # int(0.15 × 13) = 1, int(0.2 × 12) = 2
    assert counts_of(
        split(source, tmp_path / "half", "--val-size", 0.5, "--test-size", 0.3), "daisy"
    ) == [7, 10, 3]
    written = [path.split("/", 1)[1] for path in tree(tmp_path / "out") if path != "split.csv"]
    assert sorted(written) == sorted(f"{path}" for path in tree(source))


def test_copies_are_byte_identical_with_their_times_and_the_source_is_untouched(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    os.utime(source / "daisy" / "photo_000.jpg", (1_000_000_000, 1_000_000_001))
    before = tree(source)
    split(source, tmp_path / "out")
    written = tree(tmp_path / "out")
    assert {
        path.split("/", 1)[1]: entry for path, entry in written.items() if path != "split.csv"
    } == before
    assert tree(source) == before


def test_a_seed_gives_one_split_whatever_the_order_on_disk_and_another_seed_another(tmp_path):
    source = make_source(tmp_path / "photos", daisy=12, rose=12)
    again = tmp_path / "again"
    for path in sorted(source.rglob("*.jpg"), reverse=True):
        (again / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, again / path.parent.name)
    first = where(split(source, tmp_path / "out"))
    started = process(again, tmp_path / "out2", env={**os.environ, "PYTHONHASHSEED": "77"})
    assert finish(started) == (0, "")
    assert where(rows_of(tmp_path / "out2")) == first
    assert where(split(source, tmp_path / "out3", "--seed", 1)) != first


def test_a_new_class_leaves_the_splits_of_the_others_as_they_were(tmp_path):
    source = make_source(tmp_path / "photos", daisy=12, rose=12)
    before = where(split(source, tmp_path / "out"))
    make_source(source, anemone=9)
    after = where(split(source, tmp_path / "out2"))
    assert {path: name for path, name in after.items() if not path.startswith("anemone")} == before


def test_split_csv_has_a_row_for_every_file_from_which_the_split_can_be_rebuilt(tmp_path):
    source = make_source(tmp_path / "photos", daisy=9, rose=9)
    (source / "flickr.py").write_text("print()")
    (source / "rose" / "notes.txt").write_text("mine")
    rows = split(source, tmp_path / "out")
    assert list(rows[0]) == ["source", "class", "split", "sha256", "group", "note"]
    assert sorted(row["source"] for row in rows) == sorted(tree(source))
    for row in rows:
        if row["split"] == "skipped":
            assert row["note"]
        else:
            copy = tmp_path / "out" / row["split"] / row["source"]
            assert hashlib.sha256(copy.read_bytes()).hexdigest() == row["sha256"]


def test_link_makes_hard_links_and_falls_back_to_copies_and_says_so(tmp_path, capsys, monkeypatch):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    rows = split(source, tmp_path / "out", "--link")
    for row in rows:
        assert (tmp_path / "out" / row["split"] / row["source"]).samefile(source / row["source"])
    assert "copied" not in capsys.readouterr().out

    def refuse(*_):
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "link", refuse)
    split(source, tmp_path / "out2", "--link")
    assert "16 photos were copied" in capsys.readouterr().out
    assert len(tree(tmp_path / "out2")) == 17


# ---- No picture in two splits --------------------------------------------------------------------

COPIES = {
    "the same bytes": None,
    "a lower quality": lambda image: image,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice the size": lambda image: image.resize((image.width * 2, image.height * 2)),
    "grey": lambda image: image.convert("L"),
    "a tint": lambda image: Image.blend(image, Image.new("RGB", image.size, (200, 80, 20)), 0.3),
    "more light": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_at(tmp_path, kind):
    source = make_source(tmp_path / "photos", daisy=10, rose=10)
    original, copy = source / "daisy" / "photo_003.jpg", source / "daisy" / "upload again.jpeg"
    picture(777, (200, 150)).save(original, quality=95)
    if COPIES[kind] is None:
        shutil.copy(original, copy)
    else:
        COPIES[kind](Image.open(original)).save(copy, quality=60)
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    pair = rows["daisy/photo_003.jpg"], rows["daisy/upload again.jpeg"]
    assert pair[0]["group"] == pair[1]["group"] != ""
    assert pair[0]["split"] == pair[1]["split"]
    assert sum(row["group"] != "" for row in rows.values()) == 2


@pytest.mark.parametrize("box", [(6, 6, 194, 144), (7, 0, 200, 150), (4, 4, 200, 150)])
def test_the_same_scene_a_little_closer_or_moved_is_found(tmp_path, box):
    source = make_source(tmp_path / "photos", daisy=10, rose=10)
    scene, (left, top, right, _) = picture(942, (200, 150)), box
    other_box = (0, 0, 200 - left, 150 - top) if right == 200 else (0, 0, 200, 150)
    scene.crop(box).save(source / "daisy/one.png")
    scene.crop(other_box).save(source / "daisy/other.png")
    rows = split(source, tmp_path / "out")
    assert {row["source"] for row in rows if row["group"]} == {"daisy/one.png", "daisy/other.png"}


def test_a_group_goes_to_one_split_as_a_whole_with_fractions_as_near_as_it_allows(tmp_path):
    source = make_source(tmp_path / "photos", daisy=14, rose=7)
    for index, quality in itertools.product(range(3), (50, 70)):
        Image.open(source / f"daisy/photo_{index:03d}.jpg").save(
            source / f"daisy/copy {index} {quality}.jpg", quality=quality
        )
    for seed in range(8):
        rows = split(source, tmp_path / "out", "--seed", seed, "--overwrite")
        groups = defaultdict(list)
        for row in rows:
            if row["group"]:
                groups[row["group"]].append(row["split"])
        assert [len(members) for members in groups.values()] == [3, 3, 3]
        assert all(len(set(members)) == 1 for members in groups.values())
        assert counts_of(rows, "daisy") == [
            14,
            3,
            3,
        ]  # 20 photos: the singles fill up what the groups leave


def test_a_picture_under_two_classes_is_left_out_and_both_sides_are_named(tmp_path, capsys):
    source = make_source(tmp_path / "photos", rose=10, tulip=10)
    Image.open(source / "rose/photo_004.jpg").resize((60, 50)).save(source / "tulip/small.jpg")
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    assert rows["rose/photo_004.jpg"]["split"] == rows["tulip/small.jpg"]["split"] == "skipped"
    assert "tulip/small.jpg" in rows["rose/photo_004.jpg"]["note"]
    assert "rose/photo_004.jpg" in rows["tulip/small.jpg"]["note"]
    printed = capsys.readouterr().out
    assert "tulip/small.jpg" in printed and "rose/photo_004.jpg" in printed
    assert not [
        path
        for path in tree(tmp_path / "out")
        if path.endswith(("small.jpg", "rose/photo_004.jpg"))
    ]


def test_plain_pictures_are_not_taken_for_copies_of_each_other(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    rng = np.random.default_rng(0)
    for index in range(12):
        night = Image.fromarray(rng.integers(0, 12, (80, 96, 3), dtype=np.uint8))
        night.save(source / "daisy" / f"night {index}.png")
        slope = np.linspace(100 + index, 180 + 3 * index, 96)[None, :, None] + rng.normal(
            0, 2, (80, 96, 3)
        )
        Image.fromarray(slope.astype(np.uint8)).save(source / "rose" / f"sky {index}.png")
    assert {row["group"] for row in split(source, tmp_path / "out")} == {""}


def frames(seed, count=40, degrees=3):
    """The frames of a video: a picture turned by a few degrees from each to the next."""
    image = picture(seed, (180, 180))
    return [image.rotate(degrees * k).crop((45, 45, 135, 135)) for k in range(count)]


def digits(seed, count=150):
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
    sizes = Counter(row["group"] for row in rows if row["group"])
    assert max(sizes.values(), default=1) <= 8
    assert "skipped" not in where(rows).values()


def test_a_group_is_one_picture_and_all_that_resemble_that_one(monkeypatch):
    # 0-1-2-3-4 is a chain, 5-8 and 9 hang on 7; 10 has the bytes of 4.
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (5, 7), (6, 7), (7, 8), (7, 9)]
    monkeypatch.setattr(split_script, "same_pictures", lambda _: pairs)
    photos = [
        split_script.Photo(str(k), "daisy", sha256=str(k % 10 if k < 10 else 4)) for k in range(11)
    ]
    for photo in photos:
        photo.thumbnail = bytes(32 * 36)
    split_script.find_copies(photos)
    groups = {tuple(photo.source for photo in it.copies) for it in photos}
    assert groups == {("0", "1", "2"), ("3", "4", "10"), ("5", "6", "7", "8", "9")}


def test_only_identical_files_are_copies_if_asked_for(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=0)
    for index in range(9):
        picture(1).save(source / f"rose/{index}.jpg", quality=70 + index)
    shutil.copy(source / "rose/0.jpg", source / "rose/again.jpg")
    assert "--copies identical" in refused(source, tmp_path / "out")
    rows = split(source, tmp_path / "out", "--copies", "identical")
    assert [row["source"] for row in rows if row["group"]] == ["rose/0.jpg", "rose/again.jpg"]
    assert counts_of(rows, "rose") == [8, 1, 1]


def test_the_bucket_search_finds_exactly_the_pairs_that_a_search_of_all_pairs_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    for index, distance in enumerate(np.tile(np.arange(10), 15)):
        flips = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
        hashes[399 - index] = hashes[index] ^ np.uint64(flips)
    every = {
        (one, other)
        for one, other in itertools.combinations(range(400), 2)
        if (int(hashes[one]) ^ int(hashes[other])).bit_count() <= 6
    }
    assert set(map(tuple, split_script.similar_pairs(hashes).tolist())) == every
    assert len(every) == 105  # 15 each at distance 0 to 6


def test_the_bucket_search_stays_linear_even_if_all_hashes_are_equal():
    assert len(split_script.similar_pairs(np.zeros(5_000, np.uint64))) <= 5_000 * split_script.REACH


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
    "progressive half.jpg": (lambda path: cut_off(path, "half", progressive=True), "cut off"),
    "without its last scan.jpg": (without_its_last_scan, "cut off"),
    "zero bytes.jpg": (lambda path: path.touch(), "is empty"),
    "a web page.jpg": (lambda path: path.write_text("<html>404</html>" * 50), "no image"),
    "type that Keras does not read.webp": (lambda path: picture(4243).save(path), "Keras"),
    ".hidden.jpg": (write_jpeg, "hidden"),
    "broken link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "broken link"),
    "circle.jpg": (lambda path: path.symlink_to(path), "broken link"),
    "circle": (lambda path: path.symlink_to(path), "not"),
    ".ipynb_checkpoints": (lambda path: shutil.copytree(path.parent, path), "hidden"),
    "__MACOSX": (lambda path: shutil.copytree(path.parent, path), "hidden"),
    "folder.jpg": (lambda path: path.mkdir(), "folder"),
    "fifo.jpg": (lambda path: os.mkfifo(path), "not a photo"),
    "giant.ppm": (giant, "too large"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_skipped_with_its_reason_and_nothing_else_is_lost(tmp_path, capsys, name):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    write, reason = BAD_FILES[name]
    try:
        write(source / "rose" / name)
    except (OSError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"this machine cannot make it: {error}")
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    row = rows.pop(f"rose/{name}")
    assert (row["class"], row["split"]) == ("rose", "skipped")
    assert reason in row["note"]
    assert "skipped" not in {row["split"] for row in rows.values()}
    printed = capsys.readouterr()
    assert name in printed.out and reason in printed.out
    assert printed.err == ""
    assert len(tree(tmp_path / "out")) == 17


@pytest.mark.parametrize("end", [-1, -2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_only_its_end_marker_is_kept_with_a_note(
    tmp_path, capsys, end, progressive
):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    write_jpeg(tmp_path / "whole.jpg", progressive=progressive)
    cut_off(source / "rose" / "cut.jpg", end, progressive=progressive)
    rows = {row["source"]: row for row in split(source, tmp_path / "out")}
    row = rows["rose/cut.jpg"]
    assert row["split"] in SPLITS and "end marker" in row["note"]
    assert "rose/cut.jpg: lacks its end marker" in capsys.readouterr().out
    copy = tmp_path / "out" / row["split"] / "rose" / "cut.jpg"
    for at_least in (None, 100):
        pixels = read_photo(tmp_path / "whole.jpg", at_least)
        assert np.array_equal(read_photo(copy, at_least), pixels)


def test_hidden_folders_macosx_and_a_nested_copy_of_the_set_are_no_classes(tmp_path, capsys):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    shutil.copytree(source, tmp_path / "flowers")
    shutil.move(tmp_path / "flowers", source / "flowers")
    for name in ("__MACOSX", ".cache"):
        shutil.copytree(source / "rose", source / name)
    split(source, tmp_path / "out")
    assert split_script.class_folders(tmp_path / "out" / "train") == ["daisy", "rose"]
    assert "flowers: is a nested copy of the whole set" in capsys.readouterr().out


LOCALES = [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]


@pytest.mark.parametrize("settings", LOCALES)
def test_any_name_that_the_file_system_holds_is_carried_over(tmp_path, settings):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    names = ["two words.JPG", "花 ü.Jpeg", "x" * 246 + ".png", "[red]50%;'$(x).bmp", 'a,"b".tif']
    names += [] if os.name == "nt" else ["new\nline.jpg", os.fsdecode(b"latin \xe9.jpg")]
    for k in range(0 if os.name == "nt" else 5):  # what sorts differently as bytes and as letters
        names += [os.fsdecode(b"\xe9%d.jpg" % k), f"한{k}.jpg"]
    for index, name in enumerate(names):
        try:
            picture(index).save(source / "rose" / name, "JPEG")
        except OSError:
            names.remove(name)
    assert finish(process(source, tmp_path / "out", env={**os.environ, **settings})) == (0, "")
    rows = where(rows_of(tmp_path / "out"))
    for name in names:
        assert (tmp_path / "out" / rows[f"rose/{name}"] / "rose" / name).is_file()
    assert where(split(source, tmp_path / "again")) == rows  # whatever the locale


@posix_only
@pytest.mark.parametrize("settings", LOCALES)
def test_a_printed_command_can_be_pasted_whatever_the_names_hold(tmp_path, settings):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    (source / "rose").rename(source / os.fsdecode(b"tulipe \xe9"))
    (source / os.fsdecode(b"tulipe \xe9") / os.fsdecode(b"\xe9.jpg")).touch()
    output = tmp_path / os.fsdecode(b"it's \xe9 \n ${HOME}")
    started = process(source, output, env={**os.environ, **settings})
    printed, messages = started.communicate(timeout=60)
    assert (started.returncode, messages) == (0, "")
    assert "tulipe \\xe9/\\xe9.jpg: is empty" in printed
    show = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[-1]))"
    command = printed.splitlines()[-1].replace("Next: python", f"{sys.executable} -c '{show}'")
    assert subprocess.check_output(["bash", "-c", command]) == os.fsencode(output)


@posix_only
def test_pasteable_words_come_back_from_a_shell_as_they_were():
    words = [
        "plain",
        "two words",
        "",
        "it's",
        "$HOME `ls` *",
        "花 ü",
        "tab\t",
        "\x1b[31m",
        "back\\slash\n",
    ]
    words += [os.fsdecode(b"\xe9a\xff'\\"), "~", "!x", "#"]
    assert pasteable(*words).isprintable() and "花 ü" in pasteable(*words)
    printed = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {pasteable(*words)}"])
    assert printed.split(b"\0")[:-1] == [os.fsencode(word) for word in words]
    assert pasteable("cat", Path("-rf")) == "cat ./-rf"


def test_names_alike_but_for_case_are_two_photos(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    picture(1).save(source / "rose" / "a.jpg")
    if (source / "rose" / "A.JPG").exists():
        pytest.skip("the file system takes both names for one")
    picture(2).save(source / "rose" / "A.JPG")
    rows = where(split(source, tmp_path / "out"))
    for name in ("a.jpg", "A.JPG"):
        assert read_photo(tmp_path / "out" / rows[f"rose/{name}"] / "rose" / name).shape == (
            80,
            96,
            3,
        )


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
    for name in ("missing", "file"):
        message = refused(tmp_path / name, tmp_path / "out")
        assert (
            message.startswith(f"{tmp_path / name}: ") and "a folder of photos a class" in message
        )


def test_a_missing_folder_flowers_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = refused(Path("flowers"), tmp_path / "out").splitlines()[-1].partition(": ")[2]
    _, script, folder = command.split()
    assert Path(script).samefile(SCRIPT.parent / "tests/draw_flowers.py") and folder == "flowers"


def test_a_source_that_is_itself_split_is_refused_by_that_name(tmp_path):
    for part in ("Training", "val", "test"):
        make_source(tmp_path / "photos" / part, daisy=1, rose=1)
    assert "is itself split, into Training and test and val" in refused(
        tmp_path / "photos", tmp_path / "out"
    )


@posix_only
@pytest.mark.parametrize("folder", [".", "daisy"])
def test_a_source_or_a_class_that_may_not_be_read_is_refused(tmp_path, folder):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    unreadable, scandir = os.fspath(source / folder), os.scandir

    def refusing(path):  # as the file system would, if these tests were not run by root
        if os.fspath(path) == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", unreadable)
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        message = refused(source, tmp_path / "out")
    assert message.startswith(f"{unreadable}: Permission denied") and "that you may read" in message


def test_no_class_and_one_class_are_refused_and_classes_one_folder_deeper_are_pointed_out(tmp_path):
    make_source(tmp_path / "photos", daisy=8)
    assert "two classes" in refused(tmp_path / "photos", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "two classes" in refused(tmp_path / "empty", tmp_path / "out")
    make_source(tmp_path / "unzipped" / "flowers", daisy=1, rose=1)
    assert str(tmp_path / "unzipped" / "flowers") in refused(
        tmp_path / "unzipped", tmp_path / "out"
    )


def test_a_class_without_a_usable_photo_is_named(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=0)
    assert "rose" in refused(source, tmp_path / "out")
    (source / "rose" / "empty.jpg").touch()
    assert "empty.jpg" in refused(source, tmp_path / "out")


def test_a_class_too_small_for_three_splits_is_named_with_the_number_it_needs(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=6)
    message = refused(source, tmp_path / "out")
    assert "rose" in message and "7" in message  # int(0.15 × 7) = 1, int(0.2 × 6) = 1
    assert "copies" not in message
    picture(5).save(source / "rose" / "seventh.jpg")
    assert counts_of(split(source, tmp_path / "out"), "rose") == [5, 1, 1]


@pytest.mark.parametrize("option", ["--val-size", "--test-size"])
@pytest.mark.parametrize("size", ["0", "1", "-0.2", "15", "nan"])
def test_fractions_that_make_no_sense_are_refused(tmp_path, option, size):
    source = make_source(tmp_path / "photos", daisy=1, rose=1)
    assert option in refused(source, tmp_path / "out", f"{option}={size}")


def test_an_output_in_the_source_and_a_source_in_the_output_are_refused(tmp_path):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    assert "outside" in refused(source, source)
    assert "outside" in refused(source, source / "deep" / "er")
    split(source, tmp_path / "out")
    assert "part of the split" in refused(
        tmp_path / "out" / "train", tmp_path / "out", "--overwrite"
    )


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


@posix_only
def test_a_write_that_fails_ends_the_run_with_exit_1_and_leaves_the_old_split(whole):
    source, output, before = whole
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(
        source / "rose/big.png"
    )
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    code, message = finish(process(source, output, "--overwrite", before=limit))
    assert code == 1
    assert "big.png: File too large" in message and len(message.splitlines()) <= 3
    assert tree(output) == before


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_the_old_split_and_nothing_else(whole, number, code):
    source, output, before = whole
    # The last photo: by then all work is handed out, and the main thread waits for it.
    interrupt = f"""
        examine = script.examine
        def interrupted(photo, **more):
            if photo.source == "rose/photo_007.jpg":
                os.kill(os.getpid(), {int(number)})
            examine(photo, **more)
        script.examine = interrupted
    """
    started = process(source, output, "--overwrite", before=interrupt)
    returned, message = finish(started)
    assert returned == code and "Traceback" not in message
    assert tree(output) == before


@posix_only
def test_the_workers_of_a_killed_run_end_with_it(whole):
    source, output, _ = whole
    slow = "script.examine = lambda *_, **__: print(flush=True) or time.sleep(60)"
    started = process(source, output, "--overwrite", before=slow)
    started.stdout.readline()
    started.kill()
    started.communicate(timeout=10)  # the pipes close when the last worker has ended
    split(source, output, "--overwrite")  # and with it the lock


@posix_only
def test_a_run_killed_while_it_builds_leaves_the_old_split_and_the_next_clears_up(whole):
    source, output, before = whole
    kill = "script.assign_splits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    assert (
        finish(process(source, output, "--overwrite", "--seed=1", before=kill))[0]
        == -signal.SIGKILL
    )
    visible = {path: entry for path, entry in tree(output).items() if not path.startswith(".")}
    assert visible == before
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
    kill = f"""
        from pathlib import Path
        rename, done = Path.rename, []
        def rename_or_die(self, target):
            if os.path.basename(target) in script.RESULTS:
                done.append(target)
                if len(done) == {step}:
                    os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)
        Path.rename = Path.replace = rename_or_die
    """
    assert (
        finish(process(source, output, "--overwrite", "--seed=1", before=kill))[0]
        == -signal.SIGKILL
    )
    visible = {path for path in tree(output) if not path.startswith(".")}
    assert visible <= set(before) or visible <= set(new)
    with pytest.raises(Stop, match="--overwrite"):
        split(source, output)
    after = tree(output)
    del after["split.csv"], before["split.csv"], new["split.csv"]
    assert after == (before if step == 1 else new)  # the first move is the one that counts


def test_of_two_runs_at_once_the_second_is_refused(whole):
    source, output, before = whole
    with split_script.only_run_in(output), pytest.raises(Stop, match="another run"):
        split(source, output, "--overwrite")
    assert tree(output) == before
    split(source, output, "--overwrite")


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
    Image.fromarray(np.full((10, 20), 40 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((10, 20), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.new("RGBA", (20, 10), (*red, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (20, 10), (40, 255)).save(tmp_path / "grey.png")
    expected = {
        "palette.png": red,
        "cmyk.tif": red,
        "deep.png": 40,
        "float.tif": 128,
        "clear.png": 255,
        "grey.png": 40,
    }
    for name, colour in expected.items():
        photo = read_photo(tmp_path / name)
        assert (photo.shape, photo.dtype) == ((10, 20, 3), np.uint8), name
        assert np.abs(photo.astype(int) - colour).max() <= 6, name


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


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("stated", [False, True])
def test_a_grey_tiff_is_scaled_by_the_bits_that_it_holds(tmp_path, bits, stated):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    white = 2**bits - 1
    ramp = np.linspace(0, white, 9 * 60).reshape(9, 60).astype(np.uint16)
    path = source / "rose" / "deep.tif"
    Image.fromarray(ramp).save(path, tiffinfo={281: white} if stated else {})
    assert np.abs(read_photo(path)[..., 0] - ramp * (255 / white)).max() <= 0.51
    notes = {row["source"]: row["note"] for row in split(source, tmp_path / "out")}
    guessed = bits < 16 and not stated
    assert (
        notes["rose/deep.tif"].startswith(f"holds {bits} bits")
        if guessed
        else not any(notes.values())
    )


def test_a_reduced_jpeg_is_the_same_picture_with_both_sides_long_enough(tmp_path):
    picture(9, (640, 400)).save(tmp_path / "large.jpg", quality=95)
    small = read_photo(tmp_path / "large.jpg", at_least=100)
    assert small.shape == (100, 160, 3)
    whole = ImageOps.scale(
        Image.fromarray(read_photo(tmp_path / "large.jpg")), 0.25, Image.Resampling.BOX
    )
    assert np.abs(np.asarray(whole, int) - small).mean() < 2


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
    with replace_when_whole(tmp_path / "model.keras") as partial:
        partial.touch()
    running.communicate(b"\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".partial{running.pid}-model.keras",
        "model.keras",
    ]


def test_the_script_starts_without_tensorflow_matplotlib_or_opencv():
    code = "import sys, create_train_val_test"
    code += "; print({'tensorflow', 'keras', 'matplotlib', 'cv2'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()"


def test_a_run_without_a_terminal_prints_only_its_table_and_what_to_run_next(tmp_path):
    source = make_source(tmp_path / "photos", daisy=80, rose=80)
    settings = {**os.environ, "KERAS_HOME": str(tmp_path / "keras")}
    weights = tmp_path / "keras/models/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    weights.parent.mkdir(parents=True)
    weights.touch()
    printed, messages = process(source, tmp_path / "out", env=settings).communicate(timeout=60)
    assert messages == ""
    lines = [line.split() for line in printed.splitlines()]
    assert lines[1:3] == [["daisy", "55", "12", "13", "0"], ["rose", "55", "12", "13", "0"]]
    training = "python model_training_and_visualization.py"
    assert printed.splitlines()[3:] == [f"Next: {training} --data {tmp_path / 'out'}"]


def test_few_photos_and_weights_that_must_be_downloaded_are_mentioned(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    split(make_source(tmp_path / "photos", daisy=80, rose=20), tmp_path / "out")
    few, weights, _ = capsys.readouterr().out.splitlines()[-3:]
    assert "Only 3 of rose in validation" in few and "--weights none" in weights


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
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full"])
def test_a_run_survives_streams_that_are_closed_or_full(tmp_path, closed):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    words = (sys.executable, "-OO", SCRIPT, source, "--output", tmp_path / "out")
    command = ["bash", "-c", f"{pasteable(*words)} {closed}"]
    code = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    assert code == (1 if "full" in closed else 0)
    written = tree(tmp_path / "out")
    assert written.pop("split.csv")
    # Nothing that was printed has gone into a photo.
    assert {path.split("/", 1)[1]: entry for path, entry in written.items()} == tree(source)
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 2  # it is there now


@pytest.mark.parametrize("stream", [None, io.StringIO])
def test_a_run_survives_a_thread_and_streams_that_are_no_files(tmp_path, monkeypatch, stream):
    source = make_source(tmp_path / "photos", daisy=8, rose=8)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream and stream())
    arguments = ["create_train_val_test.py", str(source), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=split_script.run, args=[split_script.main])
    thread.start()
    thread.join()
    assert len(tree(tmp_path / "out")) == 17
    with pytest.raises(SystemExit) as end:  # in the main thread: refused, as the split is there
        split_script.run(split_script.main)
    assert end.value.code == 2
    assert signal.getsignal(signal.SIGTERM) == before

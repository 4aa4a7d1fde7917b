"""What the page promises: data that it can read, whatever photos and classes are called."""

import csv
import os
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import remembered_figures, small_model
from known_model import TEST_PHOTOS, known_model, read_run, write_photos
from matplotlib.text import Text
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import printable

# No font has every letter that a file can be named with.
pytestmark = pytest.mark.filterwarnings("ignore:Glyph")
PAGE = Path(study.__file__).with_name("Images") / "index.html"
NOT_UTF8 = os.fsdecode(b"tulipe \xe9")
LONG = "a_class_name_that_somebody_made_by_joining_far_too_many_words_with_underscores"
HOSTILE = [
    '"rose"',
    "</script><b>",
    NOT_UTF8,
    "$x$ & 'y'",
    "daisy\n\u2028\\u0041",
    "Gänseblümchen 菊",
]
NAMES = [*HOSTILE, *(f"{LONG} {k}" for k in range(24))]
# Of the photos: the smallest, and such as hardly have a height or a width.
SHAPES = [(300, 4), (4, 300), (1, 1), (60, 90), (60, 90), (60, 90)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All pictures of photos and thirty classes of hostile names, which are all as probable."""
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    names = ["own <b>.png", f"{LONG}{LONG}.png", "'quo\"te.png", f"{NOT_UTF8}.png", "菊\n.png"]
    paths = [folder / name for name in (*names, "b&w $1$.png")]
    for path, shape in zip(paths, SHAPES, strict=True):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), "uint8")).save(path)
    for stale in ("photos_9.jpg", "photos_12.jpg", "photos_training.jpg", "conv2d_99_maps.jpg"):
        (folder / stale).write_bytes(b"")
    model = small_model(class_count=len(NAMES))
    model.layers[-1].set_weights([np.zeros_like(it) for it in model.layers[-1].get_weights()])
    labels = [None, None, None, 0, 1, 28]
    with remembered_figures() as figures:
        study.draw(
            model,
            paths,
            NAMES,
            folder,
            labels,
            command="python </script>",
            pattern_size=32,
            pattern_steps=1,
        )
    return folder, paths, read_run(folder), figures


def files_in(value):
    """All that run.js names as a file."""
    if isinstance(value, dict):
        own = [value["file"]] if "file" in value else []
        return own + [file for it in value.values() for file in files_in(it)]
    return [file for it in value for file in files_in(it)] if isinstance(value, list) else []


def test_run_js_is_one_line_of_ascii_that_ends_no_script(made):
    text = (made[0] / "run.js").read_bytes()
    assert text.isascii() and not set(b"<>&") & set(text) and b"\n" not in text[:-1]
    assert text.startswith(b"const run = ") and text.endswith(b";\n")


def test_names_are_told_as_they_are_shown_elsewhere(made):
    _, paths, run, _ = made
    assert run["classes"] == [printable(name) for name in NAMES]
    assert run["classes"][2] == "tulipe \\xe9" and "\n" not in "".join(run["classes"])
    own, tests = run["photos"][:3], run["photos"][3:]
    assert [it["name"] for it in own] == [printable(path.name) for path in paths[:3]]
    assert {it["name"] for it in tests} == {
        printable(f"{path.parent.name}/{path.name}") for path in paths[3:]
    }
    assert "</script><b>" in run["lead"][0] and run["command"] == "python </script>"


def test_every_file_that_run_js_names_is_there_and_what_an_earlier_run_left_is_gone(made):
    folder, paths, run, _ = made
    named = set(files_in(run))
    assert all((folder / file).stat().st_size for file in named)
    written = {path.name for path in folder.iterdir()} - {path.name for path in paths}
    assert written - named == {"run.js", "index.html"}


def test_of_equally_probable_classes_the_first_come_first_and_the_true_one_is_told(made):
    for photo in made[2]["photos"]:
        listed = [k for k, _ in photo["probabilities"]]
        true = [photo["true"]] if (photo["true"] or 0) >= 20 else []
        assert listed == [*range(20), *true]
        assert [it["class"] for it in photo["heatmaps"]][:2] == [0, 1]
        assert photo["mistake"] == (photo["true"] not in (None, 0))
        assert photo["ratio"] >= 0.001


def test_a_command_is_told_without_the_folders_of_whoever_ran_it():
    words = [
        "/home/ann/study.py",
        "--data",
        "../photos",
        "--model=/home/ann/net.keras",
        "--seed",
        "1",
    ]
    expected = ["study.py", "--data", "photos", "--model=net.keras", "--seed", "1"]
    assert list(study.without_folders(words)) == expected
    assert list(study.without_folders(["--data", "."])) == ["--data", "."]


def test_shares_of_classes_without_photos_are_not_told(made):
    _, *rows, precision = made[2]["test"]
    assert [row[-1] for row in rows[:3]] == ["1.00", "0.00", "—"]  # recall
    assert precision[1:4] == ["0.33", "—", "—"]


def test_a_convolution_with_an_activation_of_its_own_has_one_grid(made):
    channels = made[2]["channels"]
    assert [(it["number"], len(it["sheets"])) for it in channels] == [(1, 1), (3, 1)]


def test_no_text_runs_into_the_panel_beside_it_or_off_the_figure(made):
    figures = made[3]
    for file in ("CAM_1.jpeg", "CAM_2.jpeg", "CAM_3.jpeg", "CAM_layers.jpg", "CAM_mistakes.jpg"):
        figure = figures[file]
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert (np.round(box.min, 2) >= 0).all() and (box.max <= figure.get_size_inches()).all()
        for axes in figure.axes[:-1]:  # the last is the colour bar
            title = axes.get_title(loc="left")
            text = next(text for text in axes.findobj(Text) if text.get_text() == title)
            end = axes.get_position(original=True).x1 * figure.bbox.width
            assert text.get_window_extent().x1 <= end


def test_a_confusion_matrix_of_many_classes_stays_small_enough_to_be_seen(made):
    assert 1000 < max(Image.open(made[0] / "confusion_matrix.png").size) < 3500


# ---- More photos than the page lists -------------------------------------------------------------

# What a spreadsheet would take for formulas, quotes or lines of their own.
CLASSES_AS_CELLS = {"=a": "'=a", 'b"\n,': 'b"\\n,', "c": "c"}
FOLDERS_AS_CELLS = {
    "=1+2": "'=1+2",
    "+1": "'+1",
    "-1": "'-1",
    "@x": "'@x",
    'a"b,c': 'a"b,c',
    "d\ne": "d\\ne",
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """503 times a photo that is right, twice one that is not, and two of which it is surer.

    Some lie in folders whose names would be no texts to a spreadsheet. Of 400 training photos 300
    are drawn by seed 5. Returns folder and run.js.
    """
    folder = tmp_path_factory.mktemp("many")
    names = ("ruby/c.png", "emerald/b.png", "azure/b.png", "ruby/a.png")
    chosen = {name: TEST_PHOTOS[name] for name in names}
    right, wrong, *surer = write_photos(folder, chosen)
    again = {f"{name}/a.png": TEST_PHOTOS["ruby/c.png"] for name in FOLDERS_AS_CELLS}
    photos = [right] * 200 + [wrong] * 2 + [right] * 297 + write_photos(folder, again)
    paths, labels = zip(*((it.path, it.label) for it in [*photos, *surer]), strict=True)
    output = folder / "Images"
    classes = list(CLASSES_AS_CELLS)
    training = [folder / "ruby" / f"{k}.png" for k in range(400)]
    for copy in training:
        shutil.copy(right.path, copy)
    settings = {"pattern_size": 32, "pattern_steps": 1, "training": (training, [0] * 400)}
    study.draw(known_model(), paths, classes, output, labels, seed=5, **settings)
    return output, read_run(output)


def test_what_the_model_learnt_is_told_with_where_it_began():
    trained = {"epochs": 12, "photos": {"train": 3456, "validation": 78, "test": 90}}
    names = [f"kind {number}" for number in range(11)]
    told = {
        start: study.training_sentence(names, trained | {"weights": start})
        for start in ("imagenet", "none", "my.weights.h5")
    }
    for sentence in told.values():
        assert "11 classes" in sentence and "kind 9, …)" in sentence
        assert "3,456 photos in 12 epochs" in sentence
    assert ["ImageNet" in it for it in told.values()] == [True, False, False]
    assert ["scratch" in it for it in told.values()] == [False, True, False]
    assert "a file" in told["my.weights.h5"]
    assert "…" not in study.training_sentence(names[:10], trained | {"weights": "none"})


def test_of_many_photos_the_doubtful_ones_are_listed(many):
    _, run = many
    assert run["photo_count"] == 507
    # The worth of the heatmaps of the first 170 of them is known.
    assert sum("worth" in it for it in run["photos"]) == 170 and "doubtful" in run["judged"]
    assert all("worth" in it for it in run["photos"][:170])
    listed = [it for it in run["photos"] if it["listed"]]
    assert len(listed) == 500 and sum(it["mistake"] for it in listed) == 2
    assert [it["listed"] for it in run["photos"][:500]] == [True] * 500
    lent = {number for entry in run["filters"] for it in entry["patches"] for number, *_ in it}
    assert all(it["listed"] or it["number"] in lent for it in run["photos"])
    most = max(len(patches) for patches in run["filters"][0]["patches"])
    assert most == 9 and all(
        len({number for number, *_ in it}) == len(it) for it in run["filters"][0]["patches"]
    )


def test_a_photo_beyond_the_first_sheet_lies_in_its_place(many):
    folder, run = many
    photo = next(it for it in run["photos"][36:] if it["name"] == "ruby/c.png")
    sheet = run["photo_sheets"][photo["sheet"]]
    row, column = divmod(photo["place"], sheet["columns"])
    top, left = sheet["top"] + row * sheet["pitch"], sheet["left"] + column * sheet["pitch"]
    picture = np.asarray(Image.open(folder / sheet["file"]).convert("RGB")).astype(int)
    tile = picture[top : top + sheet["tile"], left : left + sheet["tile"]]
    whole = Image.fromarray(TEST_PHOTOS["ruby/c.png"][1]).resize(tile.shape[:2], 2)
    assert photo["sheet"] > 0 and np.abs(tile - np.asarray(whole)).mean() < 6


def test_an_activation_map_is_scaled_by_all_photos(many):
    folder, run = many
    (entry,) = run["filters"]
    assert len(entry["peaks"]) == 24  # the first photos
    picture = np.asarray(Image.open(folder / entry["maps"]["file"]).convert("L")).astype(int)
    side = entry["maps"]["tile"]
    rows = picture.reshape(24, side, entry["maps"]["columns"], side).max((0, 1, 3))
    shown = np.max(entry["peaks"], axis=0)
    highest = np.array([it[0][3] if it else 0 for it in entry["patches"]])
    # Some filter fires more on azure/b.png, of which it is too sure: it has no map.
    shares = shown[shown > 0] / highest[shown > 0]
    assert shares[shares < 1].min() < 0.9 and shares.max() == 1
    colours = 255 * matplotlib.colormaps["inferno"](shares)[:, :3]
    luminance = colours @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(rows[shown > 0], luminance, atol=12)


def test_the_training_photos_among_which_the_most_alike_are_found_are_those_of_the_seed(many):
    drawn = study.evenly_by_class(np.zeros(400, int), 300, seed=5)
    names = many[1]["training"]["names"]
    assert many[1]["training"]["count"] == 300 and len(names) >= 3
    assert {int(Path(name).stem) for name in names} <= set(drawn)


def test_names_are_texts_to_a_spreadsheet(many):
    with (many[0] / "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[3:] == list(CLASSES_AS_CELLS.values())
    last = [*(f"{cell}/a.png" for cell in FOLDERS_AS_CELLS.values()), "azure/b.png", "ruby/a.png"]
    assert len(rows) == 507 and [row[0] for row in rows[-8:]] == last
    of_class = {row[0]: row[1] for row in rows}
    assert of_class["ruby/a.png"] == "'=a" and of_class["emerald/b.png"] == 'b"\\n,'


def test_of_many_classes_the_four_most_probable_and_the_true_one_have_heatmaps(made):
    for photo in made[2]["photos"]:
        true = [] if photo["true"] is None else [photo["true"]]
        assert {it["class"] for it in photo["heatmaps"]} == {0, 1, 2, 3, *true}


def test_training_photos_are_drawn_evenly_by_class_and_by_seed():
    labels = np.repeat([0, 1, 2], [50, 4, 30])
    chosen = study.evenly_by_class(labels, 24, seed=5)
    assert np.bincount(labels[chosen]).tolist() == [10, 4, 10] and len(set(chosen)) == 24
    assert chosen == study.evenly_by_class(labels, 24, seed=5)
    assert chosen != study.evenly_by_class(labels, 24, seed=6)
    assert sorted(study.evenly_by_class(labels, 100)) == list(range(84))


# ---- The page as a file --------------------------------------------------------------------------


def test_the_page_reads_what_is_written(made):
    used = set(re.findall(r"\brun\.(\w+)", PAGE.read_text("utf-8"))) - {"js"}
    assert used <= set(made[2]) and len(used) > 10


def test_the_page_needs_nothing_from_elsewhere():
    page = PAGE.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|fetch\(|innerHTML|\beval\b", page)
    assert re.findall(r'<script src="([^"]*)"', page) == ["run.js"] and "<link" not in page
    pictures = re.findall(r"<img [^>]*>", page)
    assert pictures and all(re.search(r'alt="[^"]{10,}"', picture) for picture in pictures)

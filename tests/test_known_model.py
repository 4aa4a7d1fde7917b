"""End to end: all pictures and the page's data of a network of which every value is known.

What is drawn is read back from the files: run.js is decoded, tiles and panels are cut from the
pictures. What should stand there is worked out in known_model.py, without the script.
"""

import base64
import contextlib
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import keras
import matplotlib
import numpy as np
import pytest
import record
from conftest import remembered_figures
from known_model import (
    CLASSES,
    HEIGHT,
    MIDDLE,
    OWN_PHOTOS,
    RAISES,
    SEEN,
    SILENT,
    STRIDE,
    TEST_PHOTOS,
    WIDTH,
    class_weights,
    known_model,
    placed,
    read_run,
    top_fifth,
    write_photos,
)
from matplotlib.text import Text
from PIL import Image
from scipy import ndimage
from scipy.optimize import nnls

import model_training_and_visualization as study

SEED, PATTERN_SIZE, PATTERN_STEPS = 3, 32, 4
PAGE = Path(study.__file__).with_name("Images") / "index.html"


def one_bright_position(row, column, value):
    heatmap = np.zeros((4, 7))
    heatmap[row, column] = value
    return heatmap.tolist()


def as_jpeg(photo):
    """A photo as base64 of a square JPEG."""
    file = io.BytesIO()
    Image.fromarray(photo).resize((160, 160)).save(file, "JPEG", quality=95)
    return base64.b64encode(file.getvalue()).decode()


# Of two photos before the first of four epochs and after each: probability and heatmap.
LOOKS = {
    "photos": [
        ["azure", as_jpeg(TEST_PHOTOS["azure/a.png"][1])],
        ["ruby", as_jpeg(TEST_PHOTOS["ruby/c.png"][1])],
    ],
    "probabilities": [[0.31, 0.22], [0.42, 0.11], [0.53, 0.94], [0.64, 0.87], [0.75, 0.06]],
    "heatmaps": [
        [one_bright_position(k % 4, k, k / 2), one_bright_position(3 - k % 4, 6 - k, 2)]
        for k in range(5)
    ],
}
RECORD = {
    "looks": LOOKS,
    "history": {
        "loss": [1.5, 0.9, 0.6, 0.5],
        "accuracy": [0.3, 0.6, 0.7, 0.9],
        "val_loss": [1.4, 0.8, 1.0, 1.1],  # the second epoch is kept
        "val_accuracy": [0.35, 0.55, 0.65, 0.5],
    },
    "settings": {
        "weights": "imagenet",
        "epochs": 4,
        "learning_rate": 0.0123,
        "photos": {"train": 1234, "validation": 56, "test": 9},
        "phases": {"head": 1, "fine-tuning": 3},
    },
}
# Mistakes first, then by the probability of the true class. As worked out in known_model:
# 0.00, 0.16, 0.16 and 0.39 of what is taken for something else; then 0.38, 0.82, …
DOUBTFUL_FIRST = [
    "emerald/d.png",
    "emerald/c.png",
    "ruby/b.png",
    "emerald/b.png",
    "ruby/c.png",
    "emerald/a.png",
    "azure/b.png",
    "azure/a.png",
    "ruby/a.png",
]
# The most confident of the correct ones, then the worst mistakes.
EXAMPLES = ["ruby/a.png", "emerald/d.png", "emerald/c.png", "ruby/b.png"]


@dataclass
class Drawn:
    """What one call of draw left behind, and what is known of its photos."""

    folder: Path
    run: dict  # run.js
    known: dict  # {name: Known}
    figures: dict  # {file: matplotlib figure}
    printed: str

    @property
    def photos(self):
        """[(entry of run.js, Known)]"""
        return [(entry, self.known[entry["name"]]) for entry in self.run["photos"]]

    def shown(self, name):
        """The entry of run.js of a photo."""
        return next(entry for entry in self.run["photos"] if entry["name"] == name)

    def caption(self, file):
        return next(it["caption"] for it in self.run["pictures"] if it["file"] == file)

    def pixels(self, file):
        return np.asarray(Image.open(self.folder / file).convert("RGB")).astype(int)


def draw(folder, name, photos, **options):
    known, output = write_photos(folder / "photos", photos), folder / name
    # Whatever a matplotlibrc says.
    hostile = {"image.origin": "lower", "savefig.transparent": True, "lines.marker": "x"}
    printed = contextlib.redirect_stdout(io.StringIO())
    with printed as told, remembered_figures() as figures, matplotlib.rc_context(hostile):
        study.draw(
            known_model(),
            [it.path for it in known],
            CLASSES,
            output,
            [it.label for it in known],
            seed=SEED,
            pattern_size=PATTERN_SIZE,
            pattern_steps=PATTERN_STEPS,
            **options,
        )
    return Drawn(output, read_run(output), {it.name: it for it in known}, figures, told.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("known")


@pytest.fixture(scope="module")
def tested(folder):
    """Nine test photos of a training that is on record."""
    command = "python known.py --photos 'a b.jpg'"
    return draw(folder, "tested", TEST_PHOTOS, record=RECORD, command=command)


@pytest.fixture(scope="module")
def training(folder):
    """[Known] of the training photos beside the own photos: they are the test photos."""
    return write_photos(folder / "train", TEST_PHOTOS)


@pytest.fixture(scope="module")
def own(folder, tested, training):
    """Own photos among test photos; one file held another photo when the others were drawn.

    One of the training photos beside them does not decode.
    """
    no_photo = folder / "train" / "ruby" / "z.png"
    no_photo.write_bytes(b"no photo")
    paths = [*(it.path for it in training), no_photo]
    labels = [*(it.label for it in training), 0]
    return draw(folder, "own", OWN_PHOTOS, training=(paths, labels))


@pytest.fixture(params=["tested", "own"])
def drawn(request):
    return request.getfixturevalue(request.param)


# ---- Reading what is drawn -----------------------------------------------------------------------


def cut(drawn, sheet, number):
    """Tile `number` of a sheet, as the page cuts it: (side, side, 3)."""
    row, column = divmod(number, sheet["columns"])
    top, left = (sheet["top"] + row * sheet["pitch"], sheet["left"] + column * sheet["pitch"])
    picture = drawn.pixels(sheet["file"])
    assert picture.shape[:2] == (sheet["height"], sheet["width"])
    return picture[top : top + sheet["tile"], left : left + sheet["tile"]]


def at_positions(picture, count):
    """The colours (rows, columns, 3) in the middles of so many positions that fill a picture."""
    rows, columns = (
        ((np.arange(k) + 0.5) / k * side).astype(int)
        for k, side in zip(count, picture.shape[:2], strict=True)
    )
    return picture[np.ix_(rows, columns)]


def panels(picture, least=100):
    """The parts of a figure that stand out from its dark ground, whose sides are not shorter than
    `least`: [(array, top, left)] row by row."""
    differs = (np.abs(picture - 24) > 14).any(2)
    boxes = [
        (rows, columns)
        for rows, columns in ndimage.find_objects(ndimage.label(differs)[0])
        if min(rows.stop - rows.start, columns.stop - columns.start) >= least
    ]
    found, below = [], 0
    for rows, columns in sorted(boxes, key=lambda box: box[0].start):
        if rows.start >= below:
            found.append([])
            below = rows.stop
        found[-1].append((picture[rows, columns], rows.start, columns.start))
    return [it for row in found for it in sorted(row, key=lambda it: it[2])]


def bar_of(picture):
    """The colours of a figure's colour bar, from the least to the most: (length, 3)."""
    differs = (np.abs(picture - 24) > 14).any(2)
    for rows, columns in ndimage.find_objects(ndimage.label(differs)[0]):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height > 200 and width < height / 5:
            middle = (columns.start + columns.stop) // 2
            return picture[rows.start + 4 : rows.stop - 4, middle - 2][::-1]
    raise AssertionError("no colour bar")


def where_positions_look(panel, field=(MIDDLE, STRIDE), count=(4, 7)):
    """The colours (rows, columns, 3) of a photo's panel where the positions of a layer look."""
    middle, stride = field
    rows = (middle + stride * np.arange(count[0])) / HEIGHT * panel.shape[0]
    columns = (middle + stride * np.arange(count[1])) / WIDTH * panel.shape[1]
    return panel[np.ix_(rows.astype(int), columns.astype(int))]


def laid_over(grey, colours, shares):
    """What the colours of some shares (0–1) look like over grey, of which 0.4 shines through."""
    return 0.4 * grey + 0.6 * 255 * matplotlib.colormaps[colours](shares)[..., :3]


def texts(figure):
    return [text.get_text().replace("\n", " ") for text in figure.findobj(Text) if text.get_text()]


def numbers_in(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))]


def decoded(text, peak, shape):
    return np.frombuffer(base64.b64decode(text), "uint8").reshape(shape) * (peak / 255)


# ---- What the model says -------------------------------------------------------------------------


def test_every_photo_comes_with_its_probabilities_the_most_probable_first(drawn):
    for entry, known in drawn.photos:
        ranking = np.argsort(-known.probabilities)
        assert [k for k, _ in entry["probabilities"]] == ranking.tolist()
        shares = [share for _, share in entry["probabilities"]]
        np.testing.assert_allclose(shares, known.probabilities[ranking], atol=2e-4)
        assert entry["true"] == known.label and entry["own"] == (known.label is None)
        assert entry["mistake"] == known.is_mistake
        assert entry["confidence"] == pytest.approx(known.probabilities.max(), abs=2e-4)


def test_verdicts_name_what_it_says_and_what_is_true_each_with_its_own_probability(drawn):
    for entry, known in drawn.photos:
        percents = [f"{100 * share:.0f}" for share in known.probabilities]
        named = [CLASSES[known.predicted], percents[known.predicted]]
        if known.is_mistake:
            named += [CLASSES[known.label], percents[known.label]]
        elif known.label is None:
            second = known.contrast_class
            named += [CLASSES[second], percents[second]]
        found = re.findall("|".join([*CLASSES, r"\d+(?= %)"]), entry["verdict"])
        assert found == named
        assert ("right" in entry["verdict"]) == (known.label == known.predicted)


def test_the_page_lists_mistakes_first_then_by_the_probability_of_the_true_class(tested):
    listed = sorted(tested.run["photos"], key=lambda it: it["doubt"])
    assert [it["name"] for it in listed] == DOUBTFUL_FIRST
    worst_first = sorted(
        tested.known.values(), key=lambda it: (not it.is_mistake, it.probability)
    )  # as they were written down
    assert [it.name for it in worst_first] == DOUBTFUL_FIRST
    assert all(it["listed"] for it in listed) and tested.run["photo_count"] == 9


def test_own_photos_come_first_and_the_others_are_still_mistakes_first(own):
    names = [it["name"] for it in own.run["photos"]]
    assert names[:2] == ["a.png", "turned.jpg"] and set(names) == set(own.known)
    assert [it["own"] for it in own.run["photos"]] == [True, True, False, False]
    tests = sorted(own.run["photos"][2:], key=lambda it: it["doubt"])
    assert [it["name"] for it in tests] == ["emerald/d.png", "ruby/b.png"]
    assert own.run["photo_count"] == 4


def test_the_confusion_table_counts_true_classes_down_and_predicted_ones_across(tested):
    (_, *heads, _), *rows, (_, *precision, _) = tested.run["test"]
    assert heads == CLASSES
    assert [row[0] for row in rows] == CLASSES
    assert [row[1:4] for row in rows] == [[2, 1, 0], [1, 1, 2], [0, 0, 2]]
    assert [row[4] for row in rows] == ["0.67", "0.25", "1.00"]  # recall: shares of a row
    assert precision == ["0.67", "0.50", "0.50"]  # shares of a column


def test_the_lead_tells_the_training_and_how_well_the_model_does(tested):
    training, test = tested.run["lead"]
    assert all(name in training for name in CLASSES) and "ImageNet" in training
    assert {3, 1234, 4} <= set(numbers_in(training))
    # 5 of 9 are right: 56 %; by Wilson's formula 27 to 81 %. Always "emerald" would get 4, 44 %.
    loss = -np.mean([np.log(known.probability) for known in tested.known.values()])
    share, of_loss, always = numbers_in(test)[:4], numbers_in(test)[4], numbers_in(test)[5]
    assert share == [56, 9, 27, 81] and always == 44
    assert of_loss == pytest.approx(loss, abs=0.006)


def test_warnings_settings_and_command_are_those_of_the_run(tested, own):
    # "azure" has the fewest test photos: two, and none beside the own photos.
    for drawn, fewest in ((tested, 2), (own, 0)):
        assert [fewest] in [numbers_in(warning) for warning in drawn.run["warnings"]]
    assert any("chance" in warning for warning in own.run["warnings"])  # both are mistakes
    assert tested.run["command"] == "python known.py --photos 'a b.jpg'"
    told = " / ".join(tested.run["settings"])
    assert "learning_rate: 0.0123" in told and f"Keras: {keras.__version__}" in told
    assert tested.run["classes"] == own.run["classes"] == CLASSES
    assert "not recorded" in own.run["lead"][0]


# ---- Heatmaps ------------------------------------------------------------------------------------


def test_each_heatmap_is_filed_under_the_class_that_it_was_worked_out_for(drawn):
    for entry, known in drawn.photos:
        ranking = np.argsort(-known.probabilities).tolist()
        assert [it["class"] for it in entry["heatmaps"]] == ranking
        for it in entry["heatmaps"]:
            heatmap, peak = known.heatmap(it["class"]), it["peaks"][-1]
            assert peak == pytest.approx(heatmap.max(), rel=1e-3)
            found = decoded(it["maps"][-1], peak, (4, 7))
            np.testing.assert_allclose(found, heatmap, atol=peak / 500 + 1e-6)
            against, peak = known.against(it["class"]), it["against_peaks"][-1]
            found = decoded(it["against"][-1], peak, (4, 7))
            np.testing.assert_allclose(found, against, atol=peak / 400 + 1e-6)
            if len(it["maps"]) == 2:  # that of an explained photo
                at_mixed, peak = known.heatmap_at_mixed(it["class"]), it["peaks"][0]
                found = decoded(it["maps"][0], peak, (11, 17))
                np.testing.assert_allclose(found, at_mixed, atol=peak / 500 + 1e-6)


def test_photos_that_are_explained_have_the_heatmaps_of_all_blocks(tested, own):
    for drawn, explained in ((tested, EXAMPLES), (own, ["a.png", "turned.jpg"])):
        for name in explained:
            entry, known = drawn.shown(name), drawn.known[name]
            in_question = {*np.argsort(-known.probabilities)[:2], known.explained_class}
            blocks = {it["class"]: len(it["maps"]) for it in entry["heatmaps"]}
            assert blocks == {k: 2 if k in in_question else 1 for k in range(3)}
    others = [tested.shown(name) for name in DOUBTFUL_FIRST[3:-1]]
    assert {len(it["maps"]) for entry in others for it in entry["heatmaps"]} == {1}


def test_a_covered_place_is_what_the_model_says_of_the_photo_without_it(drawn):
    in_order = DOUBTFUL_FIRST
    if "a.png" in drawn.known:
        in_order = ["a.png", "turned.jpg", "emerald/d.png", "ruby/b.png"]
    covered = [entry["name"] for entry, _ in drawn.photos if "covered" in entry]
    assert set(covered) == set(in_order[:4])
    places = drawn.run["places"]
    row_of, column_of = (np.arange(side) * places // side for side in (HEIGHT, WIDTH))
    moved = 0
    for name in covered:
        entry, known = drawn.shown(name), drawn.known[name]
        listed = [k for k, _ in entry["probabilities"]]
        found = decoded(entry["covered"], 1, (places, places, 3))
        changes = np.abs(found - known.probabilities[listed]).max(2)
        furthest = np.unravel_index(changes.argmax(), changes.shape)
        for row, column in ((0, 0), (1, 4), (places - 1, 2), furthest):
            mask = (row_of == row)[:, None] & (column_of == column)
            expected = known.with_blurred(mask)
            np.testing.assert_allclose(found[row, column], expected[listed], atol=0.5 / 255 + 2e-4)
            moved += np.abs(expected - known.probabilities).max() > 0.05
    assert moved >= 1


@pytest.mark.parametrize(
    ("name", "row", "column", "class_name"),
    [("azure/a.png", 1, 1, "azure"), ("azure/b.png", 2, 4, "azure"), ("ruby/c.png", 2, 1, "ruby")],
)
def test_the_hottest_place_is_that_of_the_mark(tested, name, row, column, class_name):
    entry, layer = tested.shown(name), tested.run["heatmap_layers"][-1]
    heatmap = next(it for it in entry["heatmaps"] if CLASSES[it["class"]] == class_name)
    hottest = np.unravel_index(base64.b64decode(heatmap["maps"][-1]).index(255), (4, 7))
    assert hottest == (row, column)
    place = (np.add(layer["start"], np.multiply(hottest, layer["step"]))) * (HEIGHT, WIDTH)
    photo = TEST_PHOTOS[name][1].astype(int)
    mark = np.argwhere(np.ptp(photo, axis=2) > 20)
    np.testing.assert_allclose(place, mark.mean(0) + 0.5, atol=0.01)


def test_layers_look_where_their_unpadded_windows_lead(tested):
    mixed, looks = tested.run["heatmap_layers"]
    assert (mixed["layer"], looks["layer"]) == ("mixed", "looks_on")
    assert (mixed["positions"], looks["positions"]) == ([11, 17], [4, 7])
    sides = np.array([HEIGHT, WIDTH])
    for layer, expected in ((mixed, (2.5, 3, 5)), (looks, (MIDDLE, STRIDE, SEEN))):
        for what, pixels in zip(("start", "step", "size"), expected, strict=True):
            np.testing.assert_allclose(layer[what] * sides, pixels, atol=0.01)
    field = study.Network(known_model()).receptive_fields["looks_on"]
    assert field.place((2, 5)) == (MIDDLE + 2 * STRIDE, MIDDLE + 5 * STRIDE)


def test_deletion_scores_are_those_of_the_hottest_fifth_where_its_positions_look(drawn):
    told = 0
    for entry, known in drawn.photos:
        predicted = int(known.probabilities.argmax())
        classes = [k for k, _ in entry["worth"]]
        assert classes == list(dict.fromkeys([known.explained_class, predicted]))
        told += sum(
            judged_as_by_hand(known, class_index, words) for class_index, words in entry["worth"]
        )
    assert told >= 2


def judged_as_by_hand(known, class_index, words):
    """Whether the words on a heatmap of this class, which must be right, tell of numbers."""
    assert CLASSES[class_index] in words
    if not known.heatmap(class_index).any():
        assert numbers_in(words) == [] and "empty" in words
        return False
    before, hottest, central = known.deletion(class_index)
    np.testing.assert_allclose(numbers_in(words), [before, hottest, central], atol=0.011)
    judged = [it for it in ("Better", "The same", "No better") if it in words]
    if before - hottest > 0.01 and central - hottest > 0.01:
        assert judged == ["Better"]
    else:
        assert judged == ["The same" if abs(central - hottest) < 0.01 else "No better"]
    return True


def test_the_page_tells_what_the_heatmaps_are_worth_in_the_mean_of_all_photos(drawn):
    knowns = [it for _, it in drawn.photos if it.heatmap(it.explained_class).any()]
    before, hottest, central = np.array([it.deletion() for it in knowns]).T
    count, *found = numbers_in(drawn.run["judged"])
    better = np.mean(np.minimum(before, central) - hottest > 0.01)
    expected = [np.mean(before - hottest), np.mean(before - central), better]
    assert count == len(knowns)
    found[2] /= 100
    np.testing.assert_allclose(found, expected, atol=0.006)


# ---- What fires a filter -------------------------------------------------------------------------


def test_the_photos_that_fire_a_filter_most_come_first_with_place_and_activation(drawn):
    (layer,) = drawn.run["filters"]
    assert (layer["number"], layer["count"], layer["channels"]) == (3, 3, 5)
    assert (layer["layer"], layer["activation"]) == ("looks", "looks_on")
    assert layer["field"] == drawn.run["heatmap_layers"][-1]
    for k, patches in enumerate(layer["patches"]):
        firing = {name: it.peaks()[k][0] for name, it in drawn.known.items()}
        expected = sorted((it for it in firing if firing[it] > 1e-4), key=firing.get, reverse=True)
        assert [drawn.run["photos"][number]["name"] for number, *_ in patches] == expected
        for number, row, column, value in patches:
            known = drawn.known[drawn.run["photos"][number]["name"]]
            assert value == pytest.approx(known.peaks()[k][0], abs=2e-3)
            assert value == pytest.approx(known.looks_on[row, column, k], abs=2e-3)
    assert not layer["patches"][SILENT] and len(layer["patches"][2]) > 2


def test_the_activation_maps_of_a_photo_are_bright_where_each_filter_fires_on_one_scale(drawn):
    (layer,) = drawn.run["filters"]
    rows = layer["peaks"]  # one for each of the first photos
    explained = [known for _, known in drawn.photos[: len(rows)]]
    np.testing.assert_allclose(rows, [it.looks_on.max((0, 1)) for it in explained], atol=2e-3)
    assert len(rows) == len(drawn.known)
    highest = np.maximum(np.max(rows, axis=0), 1e-12)
    for number, known in enumerate(explained):
        for k in range(5):
            tile = cut(drawn, layer["maps"], number * layer["maps"]["columns"] + k)
            shares = known.looks_on[..., k] / highest[k]
            expected = 255 * matplotlib.colormaps["inferno"](shares)[..., :3]
            found = at_positions(tile, (4, 7))
            np.testing.assert_allclose(found.mean(2), expected.mean(2), atol=60)


def test_examples_stand_beside_their_pattern_strongest_first_with_their_activations(drawn):
    (layer,) = drawn.run["filters"]
    picture = drawn.pixels("conv2d_3_examples.jpg")
    caption = drawn.caption("conv2d_3_examples.jpg")
    assert "convolution 3 of 3" in caption and "looks" in caption
    assert {len(drawn.known), 5} <= set(numbers_in(caption))
    (axes,) = drawn.figures["conv2d_3_examples.jpg"].axes
    written = [(it.get_position(), it.get_text()) for it in axes.texts]
    numbers = [(y, int(text)) for (_, y), text in written if "." not in text]
    assert 3 <= len(numbers) == len({k for _, k in numbers}) and SILENT not in [
        k for _, k in numbers
    ]
    tiles = panels(picture, least=60)
    for place, (_, k) in enumerate(sorted(numbers)):
        patches = layer["patches"][k][:5]
        values = [it[3] for it in patches]
        below = sorted(
            (x, float(text))
            for (x, y), text in written
            if "." in text and sorted(numbers)[place][0] < y < sorted(numbers)[place][0] + 110
        )
        np.testing.assert_allclose([value for _, value in below], values, atol=0.006)
        row = [it for it in tiles if it[1] // 150 == sorted({it[1] // 150 for it in tiles})[place]]
        assert len(row) == 1 + len(patches)
        for (patch, _, _), (number, at_row, at_column, _) in zip(row[1:], patches, strict=True):
            known = drawn.known[drawn.run["photos"][number]["name"]]
            np.testing.assert_allclose(
                patch.mean((0, 1)), seen_of(known, at_row, at_column).mean((0, 1)), atol=6
            )


def seen_of(known, row, column):
    """What a position of `looks` sees of the photo in its full size."""
    down, across = np.array(known.photo.shape[:2]) // (HEIGHT, WIDTH)
    top, left = STRIDE * row * down, STRIDE * column * across
    return known.photo[top : top + SEEN * down, left : left + SEEN * across]


# ---- Sheets of patterns and channels -------------------------------------------------------------


def test_tile_k_of_the_patterns_is_filter_k_framed_red_where_it_never_fires(tested):
    (layer,) = tested.run["filters"]
    (sheet,) = layer["sheets"]
    assert (sheet["silent"], sheet["count"], sheet["layer"]) == ([SILENT], 5, "looks")
    assert "convolution 3 of 3" in sheet["caption"] and "1 never fired" in sheet["caption"]
    options = {"size": PATTERN_SIZE, "steps": PATTERN_STEPS}
    pictures, fires = study.filter_patterns(known_model(), "looks", range(5), SEED, **options)
    assert fires.tolist() == [True, True, True, False, True]
    picture = tested.pixels(sheet["file"])
    for k in range(5):
        tile = cut(tested, sheet, k)
        assert np.abs(tile - pictures[k]).mean() < 6
        row, column = divmod(k, sheet["columns"])
        frame = picture[
            sheet["top"] + row * sheet["pitch"] + 16, sheet["left"] + column * sheet["pitch"] - 1
        ]
        assert (frame[0] > frame[1] + 60) == (k == SILENT), k


def test_a_grid_for_each_convolution_and_then_for_its_activation(tested):
    channels = tested.run["channels"]
    assert [it["number"] for it in channels] == [1, 3]
    found = [[sheet["layer"] for sheet in it["sheets"]] for it in channels]
    assert found == [["marks", "marks_on"], ["looks", "looks_on"]]
    files = [sheet["file"] for it in channels for sheet in it["sheets"]]
    assert files == [f"{what}_{k}_grid.jpg" for k in (1, 3) for what in ("conv2d", "activation")]
    before, after = channels[0]["sheets"]
    assert (before["silent"], after["silent"]) == ([6], [1, 2, 4, 6])
    for sheet, silent in ((before, 1), (after, 4)):
        assert {7, 11, 17, silent} <= set(numbers_in(sheet["caption"]))
        assert "ruby/a.png" in sheet["caption"] and "marks" in sheet["caption"]
    assert "blue" in before["caption"] and "blue" not in after["caption"]


def test_tile_k_of_a_grid_is_channel_k_on_its_own_scale_in_signed_colours(drawn):
    shown = drawn.run["photos"][0]["name"] if drawn.run["photos"][0]["own"] else EXAMPLES[0]
    known = drawn.known[shown]
    layers = known.marks, np.maximum(0, known.marks), known.looks, known.looks_on
    sheets = [sheet for it in drawn.run["channels"] for sheet in it["sheets"]]
    for activation, sheet in zip(layers, sheets, strict=True):
        assert sheet["count"] == activation.shape[2]
        for k in range(sheet["count"]):
            tile = cut(drawn, sheet, k)
            channel = activation[..., k]
            if not channel.any():
                # Crossed: both diagonals are lighter than the rest.
                side = len(tile)
                assert tile[side // 4, side // 4].mean() > tile[side // 4, side // 2].mean() + 20
                assert tile[side // 4, -1 - side // 4].mean() > tile[side // 2, 4].mean() + 20
                continue
            full = np.percentile(np.abs(channel), 99.5)
            share = (channel / full).clip(-1, 1)
            red, green, blue = np.moveaxis(at_positions(tile, channel.shape), 2, 0)
            assert (red[share > 0.15] > blue[share > 0.15]).all()
            assert (blue[share < -0.15] > red[share < -0.15]).all()
            nothing, all_of_it = np.abs(share) < 0.01, share > 0.99
            assert (red + green + blue)[nothing].max(initial=0) < 100
            assert red[all_of_it].min(initial=255) > 200 and green[all_of_it].min(initial=255) > 180


def test_a_weak_channel_looks_like_the_strong_one_that_it_is_a_fiftieth_of(tested):
    for sheet in tested.run["channels"][0]["sheets"]:
        strong, weak, other = (cut(tested, sheet, k) for k in (0, 3, 1))
        assert np.abs(strong - weak).mean() < 2 < np.abs(strong - other).mean()


# ---- Figures of heatmaps -------------------------------------------------------------------------


@pytest.fixture(
    params=[
        ("tested", 2, "emerald/d.png"),
        ("tested", 1, "ruby/a.png"),
        ("tested", 3, "emerald/c.png"),
        ("own", 1, "a.png"),
        ("own", 2, "turned.jpg"),
    ]
)
def shown(request):
    """A drawn run, the number of a picture of a heatmap, and the Known photo in it."""
    fixture, number, name = request.param
    drawn = request.getfixturevalue(fixture)
    return drawn, number, drawn.known[name]


def test_the_overlay_has_the_colours_of_the_bar_where_each_position_looks(shown):
    drawn, number, known = shown
    picture = drawn.pixels(f"CAM_{number}.jpeg")
    (photo, top, _), (positions, positions_top, _), (overlay, _, _), *more = panels(picture)
    # The photo as it is, in its own proportions (not flatter than 0.4 and not steeper than 2.5).
    height, width = known.photo.shape[:2]
    assert photo.shape[0] / photo.shape[1] == pytest.approx(height / width, abs=0.03)
    small = Image.fromarray(photo.astype("uint8")).resize((width, height), Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - known.photo).mean() < 6
    heatmap = known.heatmap(known.explained_class)
    shares = heatmap / (heatmap.max() or 1)
    grey = where_positions_look(photo).mean(2, keepdims=True)
    expected = laid_over(grey, "inferno", shares)
    np.testing.assert_allclose(where_positions_look(overlay), expected, atol=22)
    assert bool(more) == heatmap.any()
    for of_all_blocks, *_ in more:
        fine = study.heatmap_of_all_blocks(known_model(), known.pixels, known.explained_class)
        rows, columns = (MIDDLE + STRIDE * np.arange(count) for count in heatmap.shape)
        fine = fine[np.ix_(rows.astype(int), columns.astype(int))] / fine.max()
        expected_there = laid_over(grey, "inferno", fine)
        np.testing.assert_allclose(where_positions_look(of_all_blocks), expected_there, atol=45)
    # The positions alone, each a stride wide around where it looks, over grey.
    expected = laid_over(127, "inferno", shares)
    np.testing.assert_allclose(at_positions(positions, (4, 7)), expected, atol=16)
    pixel = photo.shape[0] / HEIGHT, photo.shape[1] / WIDTH
    assert positions_top - top == pytest.approx((MIDDLE - STRIDE / 2) * pixel[0], abs=4)
    np.testing.assert_allclose(
        positions.shape[:2], (4 * STRIDE * pixel[0], 7 * STRIDE * pixel[1]), atol=5
    )
    bar = bar_of(picture)
    expected = laid_over(127.5, "inferno", np.linspace(0, 1, len(bar)))
    assert np.abs(bar - expected).mean() < 8


def test_a_heatmap_is_titled_with_its_class_and_captioned_with_verdict_and_score(shown):
    drawn, number, known = shown
    class_name = CLASSES[known.explained_class]
    figure, entry = drawn.figures[f"CAM_{number}.jpeg"], drawn.shown(known.name)
    of_panels = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes[1:3]]
    assert all(class_name in title for title in of_panels)
    assert "4 × 7" in of_panels[0]  # rows × columns of positions
    caption = drawn.caption(f"CAM_{number}.jpeg")
    assert known.name in caption and entry["verdict"] in caption and entry["worth"][0][1] in caption
    assert any(known.name in text and entry["verdict"][:12] in text for text in texts(figure))
    assert ("all blocks" in caption) == known.heatmap(known.explained_class).any()
    if "all blocks" in caption:
        fine = study.heatmap_of_all_blocks(known_model(), known.pixels, known.explained_class)
        without = known.with_blurred(top_fifth(fine.astype(float)))[known.explained_class]
        before, _, central = known.deletion()
        scores = numbers_in(caption.split("all blocks")[1])
        np.testing.assert_allclose(scores, [before, without, central], atol=0.011)
    scale = figure.axes[-1]
    peak = known.heatmap(known.explained_class).max() or 1
    np.testing.assert_allclose(scale.get_ylim(), (0, peak), rtol=1e-3)
    assert class_name in scale.get_ylabel() and "looks_on" in scale.get_ylabel()


def test_each_block_is_drawn_where_its_own_positions_look_as_a_share_of_its_peak(drawn):
    known = drawn.known["a.png" if "a.png" in drawn.known else EXAMPLES[0]]
    photo, mixed, looks = (it for it, _, _ in panels(drawn.pixels("CAM_layers.jpg")))
    for panel, heatmap, field in (
        (mixed, known.heatmap_at_mixed(known.explained_class), (2.5, 3)),
        (looks, known.heatmap(known.explained_class), (MIDDLE, STRIDE)),
    ):
        grey = where_positions_look(photo, field, heatmap.shape).mean(2, keepdims=True)
        expected = laid_over(grey, "inferno", heatmap / heatmap.max())
        found = where_positions_look(panel, field, heatmap.shape)
        assert np.abs(found - expected).mean() < 8
    said = drawn.caption("CAM_layers.jpg")
    assert CLASSES[known.explained_class] in said and known.name in said
    told = " ".join(texts(drawn.figures["CAM_layers.jpg"]))
    assert "mixed, 11 × 17" in told and "looks_on, 4 × 7" in told
    assert f"peak {known.heatmap(known.explained_class).max():.2g}" in told


def test_what_misled_the_model_is_what_speaks_for_one_class_and_not_the_other_worst_first(tested):
    worst = [tested.known[name] for name in DOUBTFUL_FIRST[:3]]
    picture, figure = tested.pixels("CAM_mistakes.jpg"), tested.figures["CAM_mistakes.jpg"]
    found = [it for it, _, _ in panels(picture)]
    assert len(found) == 12
    compared = [
        (
            it,
            it.heatmap(it.predicted),
            it.heatmap(it.label),
            it.for_one_rather_than(it.predicted, it.label),
        )
        for it in worst
    ]
    peak = max(np.abs(heatmap).max() for _, *heatmaps in compared for heatmap in heatmaps)
    np.testing.assert_allclose(figure.axes[-1].get_ylim(), (-peak, peak), rtol=1e-3)
    for row, (known, *heatmaps) in enumerate(compared):
        photo, *overlays = found[4 * row : 4 * row + 4]
        assert np.abs(np.median(photo, axis=(0, 1)) - np.median(known.photo, axis=(0, 1))).max() < 4
        says, true = CLASSES[known.predicted], CLASSES[known.label]
        titles = [
            axes.get_title(loc="left").replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")
            for axes in figure.axes[4 * row : 4 * row + 4]
        ]
        assert says in titles[0] and true in titles[0]
        assert says in titles[1] and true not in titles[1]
        assert true in titles[2] and says not in titles[2]
        assert titles[3].startswith(f"{says} rather than {true}")
        assert [("empty" in it) for it in titles[1:3]] == [not it.any() for it in heatmaps[:2]]
        for overlay, heatmap in zip(overlays, heatmaps, strict=True):
            red, _, blue = np.moveaxis(where_positions_look(overlay), 2, 0)
            assert (red - blue > 15)[heatmap > peak / 5].all()
            assert (blue - red > 15)[heatmap < -peak / 5].all()
            assert (np.abs(red - blue) < 10)[heatmap == 0].all()
    assert (compared[2][3] < -peak / 5).any()  # one of them shows the other sign too
    caption = tested.caption("CAM_mistakes.jpg")
    assert "says" in caption and "only" not in caption  # there are four, of which three are shown
    assert set(numbers_in(caption)) <= {4}


def mistakes_of(folder, photos):
    """[Known] of test photos; figure, pixels and caption of what misled the model in them."""
    known = write_photos(folder / "photos", photos)
    network, paths = study.Network(known_model()), [it.path for it in known]
    survey = study.survey_photos(network, paths, [it.label for it in known], CLASSES)
    explanations = list(study.explain_chosen(survey).values())
    with remembered_figures() as figures:
        (picture,) = study.draw_mistakes(folder, network, explanations)
    pixels = np.asarray(Image.open(folder / picture.file).convert("RGB")).astype(int)
    return known, figures[picture.file], pixels, picture.caption


def test_without_mistakes_the_next_class_is_compared_with_the_true_one(tmp_path):
    photos = {name: TEST_PHOTOS[name] for name in ("emerald/b.png", "azure/a.png")}
    photos["emerald/b.png"] = (2, photos["emerald/b.png"][1])  # azure and emerald speak for both
    all_known, figure, pixels, caption = mistakes_of(tmp_path, photos)
    assert not any(known.is_mistake for known in all_known)
    assert "no mistake" in caption and "misled" not in caption
    axes = figure.axes
    titles = [it.get_title(loc="left").replace("\n", " ") for it in axes]
    found = [it for it, _, _ in panels(pixels)]
    row = next(k for k in range(0, len(found), 4) if abs(np.median(found[k]) - 160) < 4)
    known = next(it for it in all_known if it.name == "emerald/b.png")
    assert "emerald" in titles[row + 1] and "azure" in titles[row + 2]
    assert titles[row + 3].startswith("emerald rather than azure")
    difference = known.for_one_rather_than(1, 2)
    red, _, blue = np.moveaxis(where_positions_look(found[row + 3]), 2, 0)
    strong = np.abs(difference) > np.abs(difference).max() / 2
    assert ((red > blue) == (difference > 0))[strong].all() and strong.sum() >= 1
    assert difference[strong].min() < 0
    # One scale for all, as far down as up.
    shown = [known.heatmap(k) for known in all_known for k in (1, 2)]
    shown += [known.for_one_rather_than(known.contrast_class, known.label) for known in all_known]
    peak = max(np.abs(it).max() for it in shown)
    assert peak > max(it.max() for it in shown) * 1.001  # what speaks against a class is strongest
    np.testing.assert_allclose(axes[-1].get_ylim(), (-peak, peak), rtol=1e-3)


def test_without_mistakes_the_three_least_sure_photos_are_compared(tmp_path):
    names = ["azure/b.png", "ruby/a.png", "emerald/a.png", "azure/a.png"]
    known, figure, *_ = mistakes_of(tmp_path, {name: TEST_PHOTOS[name] for name in names})
    titles = [it.get_title(loc="left") for it in figure.axes]
    said = [title for title in titles if title.startswith("It says")]
    least_sure = sorted(100 * it.probabilities.max() for it in known)[:3]
    np.testing.assert_allclose(sorted(numbers_in(" ".join(said))), least_sure, atol=0.5)


# ---- Concepts ------------------------------------------------------------------------------------


@pytest.fixture
def concepts(tested):
    """The Concepts of the test photos, and {name: (rows, columns, concepts) maps} by SciPy."""
    found = study.concepts(known_model(), [known.pixels for known in tested.known.values()])
    maps = {}
    for name, known in tested.known.items():
        columns = known.looks_on.reshape(-1, 5)
        of_photo = [nnls(found.vectors.T.astype(float), column)[0] for column in columns]
        maps[name] = np.reshape(of_photo, (*known.looks_on.shape[:2], -1))
    return found, maps


def shares_by_hand(concepts, known, class_index):
    """What each concept adds to the logit of a class on a photo, and at last the rest."""
    found, maps = concepts
    shares = maps[known.name].sum((0, 1)) * (found.vectors @ RAISES[:, class_index])
    whole = (known.looks_on @ RAISES[:, class_index]).sum()
    return np.array([*shares, whole - shares.sum()])


def test_a_photo_has_the_map_of_each_concept_and_its_classes_the_strongest_shares(tested, concepts):
    _, maps = concepts
    for entry, known in tested.photos:
        of_photo = np.moveaxis(maps[known.name], -1, 0)
        shown = zip(entry["concepts"]["maps"], entry["concepts"]["peaks"], of_photo, strict=True)
        for text, peak, expected in shown:
            limit = 0.02 * expected.max() + 0.005
            np.testing.assert_allclose(decoded(text, peak, expected.shape), expected, atol=limit)
        told_of = [class_index for class_index, _ in entry["concepts"]["shares"]]
        assert sorted(told_of) == [0, 1, 2]
        for class_index, told in entry["concepts"]["shares"]:
            shares = shares_by_hand(concepts, known, class_index)
            by_hand = shares[:-1] / max(np.maximum(0, shares).sum(), 1e-9)  # nothing may speak
            strongest = np.argsort(-by_hand)[:4]
            expected = [(k, by_hand[k]) for k in strongest if by_hand[k] >= 0.05]
            assert [k for k, _ in told] == [k for k, _ in expected]
            assert [it for _, it in told] == pytest.approx([it for _, it in expected], abs=0.01)


def test_each_concept_comes_with_the_photos_that_hold_most_of_it(tested, concepts):
    found, maps = concepts
    assert len(tested.run["concepts"]["found"]) == len(found.vectors)
    for concept, entry in enumerate(tested.run["concepts"]["found"]):
        held = {name: maps[name][..., concept].sum() for name in maps}
        strongest = sorted(held, key=held.get, reverse=True)[:5]
        strongest = [name for name in strongest if held[name] > 0.01 * held[strongest[0]]]
        names = [tested.run["photos"][index]["name"] for index in entry["photos"]]
        assert [held[it] for it in names] == pytest.approx([held[it] for it in strongest], rel=0.02)


def test_a_class_is_drawn_with_its_strongest_concepts_and_what_its_logit_loses(tested, concepts):
    found, maps = concepts
    figure = tested.figures["concepts.jpg"]
    rows = [it.get_text().split("\n") for it in figure.findobj(Text) if "logit" in it.get_text()]
    rows = [row for row in rows if len(row) == 4]
    for name in CLASSES:
        class_index = CLASSES.index(name)
        of_class = [known for known in tested.known.values() if known.label == class_index]
        shares = np.mean([shares_by_hand(concepts, it, class_index) for it in of_class], axis=0)
        speaking = np.maximum(0, shares).sum()  # the last share is that of the rest
        strongest = [k for k in np.argsort(-shares[:-1]) if shares[k] / speaking >= 0.05][:3]
        expected = []
        for k in strongest:
            # The head is linear, but weighs each position on its own.
            raised = np.einsum("hwc,kc->hwk", class_weights()[..., class_index], found.vectors)
            falls = [(maps[known.name][..., k] * raised[..., k]).sum() for known in of_class]
            expected.append((k, shares[k] / speaking, -np.mean(falls)))
        drawn = [row[1:] for row in rows if row[0] == name]
        assert [row[0] for row in drawn] == [f"concept {k}" for k, _, _ in expected]
        for (_, part, fall), (_, by_hand, change) in zip(drawn, expected, strict=True):
            assert int(part.removesuffix(" %")) == pytest.approx(100 * by_hand, abs=1.5)
            assert float(fall.removeprefix("logit ")) == pytest.approx(change, abs=0.1)


def tiles_of(figure):
    """{(row, column): (text, (160, 160, 3) picture)} of a figure of rows, and its row labels."""
    (axes,) = figure.axes
    sheet = np.asarray(axes.images[0].get_array())
    texts = [(it.get_position(), it.get_text()) for it in axes.texts]
    left = min(x for (x, _), text in texts)
    labels = {round(y): text for (x, y), text in texts if x == left}
    rows = sorted(labels)
    tiles = {}
    for (x, y), text in texts:
        if x > left:
            row = max(k for k, middle in enumerate(rows) if middle < y)
            top, start = round(y) - 164, round(x) - 80
            tiles.setdefault(row, []).append((text, sheet[top : top + 160, start : start + 160]))
    return [labels[y] for y in rows], tiles


def test_each_row_of_concepts_shows_its_photos_lit_where_the_concept_lies(tested, concepts):
    _, maps = concepts
    labels, tiles = tiles_of(tested.figures["concepts.jpg"])
    assert {label.split("\n")[0] for label in labels} == set(CLASSES)
    for row, label in enumerate(labels):
        concept = int(re.search(r"concept (\d+)", label)[1])
        held = {name: maps[name][..., concept].sum() for name in maps}
        strongest = sorted(held, key=held.get, reverse=True)[: len(tiles[row])]
        assert [text for text, _ in tiles[row]] == [name.split("/")[0] for name in strongest]
        for name, (_, tile) in zip(strongest, tiles[row], strict=True):
            known = tested.known[name]
            height = round(160 * min(1, known.photo.shape[0] / known.photo.shape[1]))
            width = round(160 * min(1, known.photo.shape[1] / known.photo.shape[0]))
            top, left = (160 - height) // 2, (160 - width) // 2
            shown = tile[top : top + height, left : left + width].astype(float)
            light = placed(maps[name][..., concept] / maps[name][..., concept].max())
            for at in (light.argmax(), light.argmin()):
                y, x = np.unravel_index(at, light.shape)
                expected = known.pixels[y, x] * (0.15 + 0.85 * light[y, x])
                pixel = shown[int((y + 0.5) * height / HEIGHT), int((x + 0.5) * width / WIDTH)]
                np.testing.assert_allclose(pixel, expected, atol=25)


def test_the_worst_mistake_is_taken_apart_into_concepts_for_both_classes(tested, concepts):
    labels, tiles = tiles_of(tested.figures["CAM_concepts.jpg"])
    known = tested.known["emerald/d.png"]
    named = {CLASSES[known.predicted]: known.predicted, CLASSES[known.label]: known.label}
    expected = []
    for name, class_index in named.items():
        shares = shares_by_hand(concepts, known, class_index)
        parts = shares[:-1] / np.maximum(0, shares).sum()
        strongest = [k for k in np.argsort(-parts)[:4] if parts[k] >= 0.05]
        expected += [(name, k, 100 * parts[k]) for k in strongest]
    assert len(labels) == 1 + len(expected)
    for row, (name, concept, part) in enumerate(expected, start=1):
        of_class, number, share = labels[row].split("\n")
        assert name in of_class and number == f"concept {concept}"
        assert numbers_in(share)[0] == pytest.approx(part, abs=1.1)
        assert tiles[row][0][0] == "here" and len(tiles[row]) > 1
        here, *others = (tile for _, tile in tiles[row])
        assert not any(np.array_equal(here, other) for other in others)
    caption = tested.caption("CAM_concepts.jpg")
    assert "emerald/d.png" in caption and tested.shown("emerald/d.png")["verdict"] in caption
    assert f"speaks for {CLASSES[known.predicted]} {round(expected[0][2])} % " in caption


def test_of_many_epochs_those_before_the_first_and_the_kept_one_are_always_shown(tmp_path):
    network = study.Network(known_model())
    for kept in (1, 2, 11, 20):
        losses = [1.0] * 20
        losses[kept - 1] = 0.5
        looks = LOOKS | {"heatmaps": LOOKS["heatmaps"][:1] * 21}
        looks["probabilities"] = [[0.01 * epoch, 0.5] for epoch in range(21)]
        with remembered_figures() as figures:
            record = {"looks": looks, "history": {"val_loss": losses}}
            study.draw_learning(tmp_path, network, record)
        _, tiles = tiles_of(figures["learning.jpg"])
        first, *later = [text for text, _ in tiles[0]]
        assert "before" in first and numbers_in(first) == [0] and len(later) == 7
        epochs, shares = zip(*map(numbers_in, later), strict=True)
        assert epochs == shares == tuple(sorted(epochs)) and epochs[0] < 5 and epochs[-1] > 16
        assert [numbers_in(text)[0] for text in later if "kept" in text] == [kept]


def test_how_it_learnt_to_look_is_shown_epoch_by_epoch_each_photo_on_one_scale(tested):
    labels, tiles = tiles_of(tested.figures["learning.jpg"])
    assert labels == ["azure", "ruby"]
    for row in range(2):
        texts = [text for text, _ in tiles[row]]
        shares = [round(100 * of_epoch[row]) for of_epoch in LOOKS["probabilities"]]
        assert [numbers_in(text)[-1] for text in texts] == shares
        assert [numbers_in(text)[:-1] for text in texts] == [[], [1], [2], [3], [4]]
        assert [index for index, text in enumerate(texts) if "kept" in text] == [2]
        peak = max(np.max(of_epoch[row]) for of_epoch in LOOKS["heatmaps"])
        for epoch, (_, tile) in enumerate(tiles[row]):
            heatmap = np.array(LOOKS["heatmaps"][epoch][row])
            r, c = np.unravel_index(heatmap.argmax(), heatmap.shape)
            y, x = (MIDDLE + STRIDE * r) / HEIGHT, (MIDDLE + STRIDE * c) / WIDTH
            colour = np.array(matplotlib.colormaps["inferno"](heatmap.max() / peak)[:3])
            # 0.6 of the colour of its value, the rest is the photo in grey.
            grey = tile[int(160 * y), int(160 * x)] - 0.6 * 255 * colour
            assert np.ptp(grey) < 40 and 0 < grey.mean() < 110


# ---- Evaluation, training, the run at a glance ---------------------------------------------------


def test_the_confusion_matrix_shows_each_count_in_its_row_and_column(tested):
    axes = tested.figures["confusion_matrix.png"].axes[0]
    places = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    counts = [[2, 1, 0], [1, 1, 2], [0, 0, 2]]
    assert places == {(x, y): str(counts[y][x]) for y in range(3) for x in range(3)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == CLASSES
    assert numbers_in(axes.get_title(loc="left")) == [5, 9]
    (image,) = axes.images
    shares = image.norm(image.get_array())
    np.testing.assert_allclose(shares, np.array(counts) / [[3], [4], [2]], atol=1e-6)
    for text in axes.texts:  # each can be read on its square
        column, row = text.get_position()
        ground = np.mean(image.cmap(shares[row, column])[:3])
        assert abs(ground - np.mean(matplotlib.colors.to_rgb(text.get_color()))) > 0.3
    matrix = tested.pixels("confusion_matrix.png").sum(2)
    assert matrix.max() - matrix.min() > 300


def test_training_curves_hold_the_history_with_phases_and_the_epoch_that_was_kept(tested):
    losses, accuracies = tested.figures["training_curves.png"].axes
    for axes, metric, kept in ((losses, "loss", 0.8), (accuracies, "accuracy", 0.55)):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for label, key in (("training", metric), ("validation", f"val_{metric}")):
            expected = [[k, value] for k, value in enumerate(RECORD["history"][key], start=1)]
            assert lines[label] == expected
        assert lines["kept"] == [[2, kept]]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", metric)
        phases = {it.get_text(): it.get_position()[0] for it in axes.texts}
        assert phases == {"head": 0.5, "fine-tuning": 1.5}


def test_the_strip_shows_a_photo_its_activations_patterns_and_where_it_looks(drawn):
    known = drawn.known["a.png" if "a.png" in drawn.known else EXAMPLES[0]]
    photo, activations, patterns, overlay = (it for it, _, _ in panels(drawn.pixels("strip.jpg")))
    height, width = known.photo.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(known.photo[top : top + side, left : left + side])
    shown = np.asarray(square.resize(photo.shape[1::-1], Image.Resampling.NEAREST)).astype(int)
    assert np.abs(photo - shown).mean() < 6
    grid, sheet = drawn.run["channels"][0]["sheets"][0], drawn.run["filters"][0]["sheets"][0]
    for panel, tile in ((activations, cut(drawn, grid, 0)), (patterns, cut(drawn, sheet, 0))):
        shrunk = Image.fromarray(panel.astype("uint8")).resize((36, 36), Image.Resampling.BOX)
        inner = np.asarray(shrunk)[2:34, 2:34].mean(2).ravel()
        expected = Image.fromarray(tile.astype("uint8")).resize((32, 32), Image.Resampling.BOX)
        assert np.corrcoef(inner, np.asarray(expected).mean(2).ravel())[0, 1] > 0.7
    hottest = np.argwhere(overlay.sum(2) > overlay.sum(2).max() - 20).mean(0) / overlay.shape[:2]
    heat = study.place_heatmap(
        known.heatmap(known.explained_class),
        study.Network(known_model()).receptive_fields["looks_on"],
        (HEIGHT, WIDTH),
    )
    place = np.argwhere(heat > 0.97 * heat.max()).mean(0) + 0.5
    in_photo = place / (HEIGHT, WIDTH) * (height, width)
    np.testing.assert_allclose(hottest, (in_photo - (top, left)) / side, atol=0.08)
    assert CLASSES[known.explained_class] in drawn.caption("strip.jpg")


def test_every_picture_is_listed_once_with_a_caption_and_its_file_is_there(drawn):
    files = [picture["file"] for picture in drawn.run["pictures"]]
    assert len(files) == len(set(files)) and all(it["caption"] for it in drawn.run["pictures"])
    sheets = [drawn.run["thumbnails"], *drawn.run["photo_sheets"]]
    sheets += [entry["maps"] for entry in drawn.run["filters"]]
    named = {*files, *(sheet["file"] for sheet in sheets)}
    if "a.png" in drawn.known:
        assert "training_curves.png" not in files  # there is no record of a training
    assert all((drawn.folder / file).stat().st_size for file in named)
    assert (drawn.folder / "index.html").read_bytes() == PAGE.read_bytes()


def test_the_photo_that_the_layers_are_shown_for_is_the_first_one_explained(drawn):
    known = drawn.known["a.png" if "a.png" in drawn.known else EXAMPLES[0]]
    assert np.abs(drawn.pixels("OriginalImage.jpeg") - known.photo).mean() < 4
    assert known.name in drawn.caption("OriginalImage.jpeg")


def test_relu_keeps_what_is_positive(tested):
    (line,) = tested.figures["ReLU.png"].axes[0].lines
    x, y = line.get_xydata().T
    np.testing.assert_allclose(y, (x + np.abs(x)) / 2, atol=1e-9)
    assert x.min() < -1 and x.max() > 1


# ---- Tables and training photos -----------------------------------------------------------------


def test_the_table_of_predictions_holds_every_photo(drawn):
    with (drawn.folder / "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "true class", "predicted class", *CLASSES]
    assert sorted(row[0] for row in rows) == sorted(drawn.known)
    for name, true, predicted, *probabilities in rows:
        known = drawn.known[name]
        assert true == ("" if known.label is None else CLASSES[known.label])
        assert predicted == CLASSES[known.predicted]
        np.testing.assert_allclose([*map(float, probabilities)], known.probabilities, atol=2e-4)


def test_bins_of_confidence_hold_how_often_the_model_is_right(tested):
    found = tested.run["reliability"]
    assert len(found["bins"]) == 10
    sureness = {name: max(known.probabilities) for name, known in tested.known.items()}
    distance = 0
    for k, (count, confidence, right) in enumerate(found["bins"]):
        inside = [name for name, sure in sureness.items() if k / 10 < sure <= (k + 1) / 10]
        assert count == len(inside)
        assert right == sum(not tested.known[name].is_mistake for name in inside)
        if inside:
            mean = np.mean([sureness[name] for name in inside])
            assert confidence == pytest.approx(mean, abs=2e-4)
            distance += count / 9 * abs(mean - right / count)
    assert found["error"] == pytest.approx(distance, abs=2e-4)


def test_the_training_photos_most_alike_are_those_of_the_nearest_feature_means(
    tested, own, training
):
    assert tested.run["training"] is None
    facts, known = own.run["training"], own.known["ruby/b.png"]
    assert facts["count"] == 9 and known.is_mistake
    like = facts["like"][own.shown("ruby/b.png")["number"]]
    assert [k for k, _ in like] == [known.predicted, known.label]

    def cosine(other):
        one, two = (it.looks_on.mean((0, 1)) for it in (known, other))
        return one @ two / (np.linalg.norm(one) * np.linalg.norm(two))

    for class_index, nearest in like:
        of_class = [it for it in training if it.label == class_index]
        expected = sorted(of_class, key=cosine, reverse=True)[:3]
        assert [facts["names"][place] for place, _ in nearest] == [it.name for it in expected]
        assert [value for _, value in nearest] == pytest.approx(
            list(map(cosine, expected)), abs=0.01
        )
        for (place, _), it in zip(nearest, expected, strict=True):
            thumbnail = cut(own, facts["sheet"], place)
            assert np.abs(np.median(thumbnail, (0, 1)) - np.median(it.photo, (0, 1))).max() < 5
    assert like[1][1][0][1] == pytest.approx(1, abs=0.01)  # the photo itself is among them


# ---- The page's own sheets -----------------------------------------------------------------------


def test_each_photo_lies_in_its_place_whole_and_as_a_thumbnail(drawn):
    for number, (entry, known) in enumerate(drawn.photos):
        height, width = known.photo.shape[:2]
        assert entry["number"] == number
        assert entry["ratio"] == pytest.approx(width / height, abs=1e-3)
        tile = cut(drawn, drawn.run["photo_sheets"][entry["sheet"]], entry["place"])
        whole = Image.fromarray(known.photo).resize(tile.shape[:2], Image.Resampling.BILINEAR)
        assert np.abs(tile - np.asarray(whole)).mean() < 5
        thumbnail = cut(drawn, drawn.run["thumbnails"], number)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        middle = Image.fromarray(known.photo[top : top + side, left : left + side])
        middle = middle.resize(thumbnail.shape[:2], Image.Resampling.BILINEAR)
        assert np.abs(thumbnail - np.asarray(middle)).mean() < 8


def test_the_colours_of_the_page_are_those_of_the_pictures(tested):
    expected = np.rint(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3])
    found = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in tested.run["colours"]]
    assert found == expected.tolist()


# ---- All of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tested", "own"])
def test_all_that_is_shown_is_as_it_was_when_it_was_looked_at(name, request):
    drawn = request.getfixturevalue(name)
    pictures = [path for path in drawn.folder.iterdir() if path.suffix in (".jpg", ".jpeg", ".png")]
    found = {
        "printed": record.facts_of(drawn.printed, CLASSES),
        "run": record.facts_of_run(drawn.run, CLASSES),
        "figures": {
            file: record.facts_of_figure(figure, CLASSES) for file, figure in drawn.figures.items()
        },
        "pictures": {
            path.name: record.squares(drawn.pixels(path.name))
            for path in sorted(pictures)
            if path.name not in drawn.figures
        },
    }
    record.check(name, found, request.config.option.record)

"""What the page promises: data that it can read, heatmaps and patches in their places."""

import base64
import json
import os
import re
from dataclasses import replace
from functools import partial

import keras
import matplotlib
import numpy as np
import pytest
from conftest import small_model
from keras import layers
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import printable

HOSTILE = ['"rose"', "</script><b>", "$x$ & 'y'", "daisy\n\u2028\\u0041", "Gänseblümchen 菊"]
NOT_UTF8 = os.fsdecode(b"tulipe \xe9")
PAGE = study.PAGE.read_text("utf-8")


def parsed(text):
    assert text.startswith("const run = ") and text.endswith(";\n")
    return json.loads(text[len("const run = ") : -2])


# ---- run.js --------------------------------------------------------------------------------------


def test_names_arrive_as_they_are_and_end_no_script():
    text = study.script_text({"classes": HOSTILE})
    assert parsed(text) == {"classes": HOSTILE}
    assert text.isascii() and not set("<>&") & set(text) and "\n" not in text[:-1]


def test_run_js_refuses_what_is_no_json():
    with pytest.raises(ValueError, match="JSON"):
        study.script_text({"loss": float("nan")})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All pictures of a small model, own and test photos of hostile names: folder, paths, run."""
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    names = ["own <b>.png", "b&w $1$.png", "'quo\"te.png", f"{NOT_UTF8}.png", "菊\n.png"]
    paths = [folder / name for name in names]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), "uint8")).save(path)
    for stale in ("photos_9.jpg", "conv2d_99_maps.jpg"):
        (folder / stale).write_bytes(b"")
    classes = [*HOSTILE[:2], NOT_UTF8]
    record = {
        "history": {name: [1.0, 0.5] for name in study.METRICS},
        "settings": {"weights": "none", "epochs": 2, "photos": {"train": 9}, "phases": {"all": 2}},
    }
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "PATTERN_SIZE", 32)
        patch.setattr(study, "PATTERN_STEPS", 1)
        study.draw(
            small_model(),
            paths[1:],
            classes,
            folder,
            [0, 1, 2, 0],
            own_photos=paths[:1],
            record=record,
            command="python </script>",
        )
    return folder, paths, parsed((folder / "run.js").read_text("ascii"))


def files_in(value):
    """All that run.js names as a file."""
    if isinstance(value, dict):
        own = [value["file"]] if "file" in value else []
        return own + [file for it in value.values() for file in files_in(it)]
    return [file for it in value for file in files_in(it)] if isinstance(value, list) else []


def test_every_file_that_run_js_names_is_there_and_the_page_beside_it(made):
    folder, _, run = made
    named = set(files_in(run))
    written = {path.name for path in folder.iterdir() if path.suffix in (".jpg", ".jpeg")}
    assert named - written == {"ReLU.png", "confusion_matrix.png", "training_curves.png"}
    assert all((folder / file).stat().st_size for file in named)
    assert written <= named  # and what an earlier run left is gone
    assert (folder / "index.html").read_bytes() == study.PAGE.read_bytes()


def test_names_are_told_as_they_are_shown_elsewhere(made):
    _, paths, run = made
    assert run["classes"] == [*HOSTILE[:2], "tulipe \\xe9"]
    own, *tests = (photo["name"] for photo in run["photos"])
    assert own == "own <b>.png"
    assert set(tests) == {printable(f"{path.parent.name}/{path.name}") for path in paths[1:]}
    assert "</script><b>" in run["lead"][0] and run["command"] == "python </script>"


def test_each_photo_has_what_the_page_shows(made):
    _, _, run = made
    # The first photos are the explained ones, in the order of the rows of activation maps.
    assert len(run["filters"][0]["peaks"]) == run["photo_count"] == 5 and run["photos"][0]["own"]
    for number, photo in enumerate(run["photos"]):
        assert (photo["number"], photo["sheet"], photo["place"]) == (number, 0, number)
        classes = [entry["class"] for entry in photo["heatmaps"]]
        top = [class_index for class_index, _ in photo["probabilities"]]
        assert classes[:2] == top[:2] and photo["true"] in [*classes, None]
        assert photo["ratio"] == 1.5 and photo["own"] == (photo["true"] is None)
        assert photo["mistake"] == (photo["true"] not in (top[0], None))
        assert photo["confidence"] == photo["probabilities"][0][1]
        assert photo["doubt"] == photo["confidence"] * (-1 if photo["mistake"] else 1)
        assert photo["verdict"].startswith(f"It says {run['classes'][top[0]]}, ")
        explained = photo["true"] if photo["true"] is not None else top[0]
        assert run["classes"][explained] in photo["worth"]
        for entry in photo["heatmaps"]:
            for layer, peak, text in zip(
                run["heatmap_layers"], entry["peaks"], entry["maps"], strict=True
            ):
                heatmap = base64.b64decode(text)
                assert len(heatmap) == np.prod(layer["positions"])
                assert max(heatmap) == (255 if peak else 0)


def test_filters_and_layers_have_sheets_fields_and_patches(made):
    _, _, run = made
    (one,) = run["filters"]
    # The third 3 × 3 convolution of strides 2, 2, 1, of 24 filters: of 32 pixels each sees 15, the
    # middle pixel of the first is number 7, and the next one looks 4 further on.
    where = {"start": [7.5 / 32] * 2, "step": [4 / 32] * 2, "size": [15 / 32] * 2}
    shares = {what: pytest.approx(share, abs=1e-5) for what, share in where.items()}
    assert one["field"] == {"layer": "maps_3", "positions": [5, 5], **shares}
    assert one["maps"]["columns"] == 24 and one["sheets"][0]["count"] == 24
    assert len(one["patches"]) == one["channels"] == 24
    for patches in one["patches"]:
        strengths = [patch[3] for patch in patches]
        assert strengths == sorted(strengths, reverse=True)
        assert len({patch[0] for patch in patches}) == len(patches) <= 5
    grids = {channels["number"]: channels["sheets"] for channels in run["channels"]}
    assert list(grids) == [1, 3] and [sheet["layer"] for sheet in grids[3]] == ["maps_3"]
    assert "for own <b>.png: 24 channels of 5 × 5 positions" in grids[3][0]["caption"]


def test_each_grid_comes_before_that_of_its_activation(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("before", "after")]
    for path in paths:
        study.save_tiles(path, np.zeros((3, 16, 16, 3), "uint8"), 3, quality=95)
    convolution = study.Convolution(2, 9, "conv2d_1", "activation_1", 3)
    layers_, silent = ("conv2d_1", "activation_1"), ([False] * 3, [False, True, False])
    pictures = [
        study.Picture(path.name, path.stem, study.Sheet(convolution, layer, 16, 3, flags))
        for path, layer, flags in zip(paths, layers_, silent, strict=True)
    ]
    (entry,) = study.sheet_entries(tmp_path, [*pictures, study.Picture("other.png", "no sheet")])
    assert (entry["number"], entry["activation"]) == (2, "activation_1")
    assert [sheet["layer"] for sheet in entry["sheets"]] == list(layers_)
    assert [sheet["silent"] for sheet in entry["sheets"]] == [[], [1]]
    assert [sheet["caption"] for sheet in entry["sheets"]] == ["before", "after"]


def test_counts_recall_and_precision_stand_in_one_table():
    # Three of class a, two of them taken for b; one of b, taken for a; none of c nor taken for it.
    probabilities = np.eye(3)[[0, 1, 1, 0]]
    evaluation = study.Evaluation(["a", "b\n", "c"], np.array([0, 0, 0, 1]), probabilities)
    assert study.test_table(evaluation) == [
        ["true \\ predicted", "a", "b\\n", "c", "recall"],
        ["a", 1, 2, 0, "0.33"],
        ["b\\n", 1, 0, 0, "0.00"],
        ["c", 0, 0, 0, "—"],
        ["precision", "0.50", "0.00", "—", ""],
    ]


def test_the_colours_of_the_page_are_those_of_the_pictures(made):
    expected = np.rint(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3])
    found = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in made[2]["colours"]]
    assert found == expected.tolist()


def expected_loss(run):
    """The mean surprise at the true classes of the test photos."""
    tests = [photo for photo in run["photos"] if photo["true"] is not None]
    return -np.mean([np.log(dict(map(tuple, it["probabilities"]))[it["true"]]) for it in tests])


def test_lead_and_warnings_say_what_is_known_and_no_more(made):
    _, _, run = made
    assert run["lead"][0].endswith("from 9 photos in 2 epochs, from scratch.")
    counts = [[cell for cell in row if isinstance(cell, int)] for row in run["test"][1:-1]]
    correct = int(np.trace(counts))
    assert f"{correct} of 4 test photos" in run["lead"][1] and "would get 50 %" in run["lead"][1]
    loss = float(re.search(r"loss ([\d.]+)\)", run["lead"][1])[1])
    assert loss == pytest.approx(expected_loss(run), rel=0.01)
    assert {"epochs: 2", "weights: none", f"Keras: {keras.__version__}"} <= set(run["settings"])
    assert any("only 1 test photos" in warning for warning in run["warnings"])
    assert "not recorded" in study.training_sentence(["a", "b"], {})
    assert study.warnings_about(None) == []


# ---- One pass over all photos --------------------------------------------------------------------


def test_heatmaps_of_a_batch_are_those_of_each_photo_alone():
    keras.utils.set_random_seed(0)
    photo = keras.Input((24, 24, 3))
    low = layers.Conv2D(4, 3, strides=2, activation="relu", name="low")(photo)
    high = layers.Conv2D(5, 3, activation="relu", name="high")(low)
    pooled = layers.GlobalAveragePooling2D()(high)
    model = keras.Model(photo, layers.Dense(3, activation="softmax", name="head")(pooled))
    photos = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3)).astype("float32")
    classes = np.array([[0, 1], [2, 0], [1, 1], [0, 2]])
    forward = partial(study.features_and_logits(model, ("low", "high")), training=False)
    of_low, of_high = study.batch_grad_cam(forward, study.tf.constant(photos), classes)
    assert of_low.shape == (4, 2, 11, 11) and of_high.shape == (4, 2, 9, 9)
    # Behind a mean, the gradient of a logit is the weight of the head over the number of positions.
    activation = np.asarray(keras.Model(model.input, model.get_layer("high").output)(photos))
    kernel = np.asarray(model.get_layer("head").kernel)
    for k, row in enumerate(classes):
        for column, class_index in enumerate(row):
            expected = np.maximum(0, activation[k] @ kernel[:, class_index] / 81)
            np.testing.assert_allclose(of_high[k, column], expected, rtol=1e-4, atol=1e-5)
            alone = study.grad_cam(model, photos[k], "low", class_index)
            np.testing.assert_allclose(of_low[k, column], alone, rtol=1e-4, atol=1e-5)


def test_the_survey_finds_what_the_model_says_and_where_each_photo_alone_looks(made):
    _, paths, _ = made
    model = small_model()
    survey = study.survey_photos(model, paths[1:], [0, 1, 2, 0], paths[:1])
    assert survey.own == 1 and survey.labels.tolist() == [-1, 0, 1, 2, 0]
    for k, path in enumerate(paths):
        pixels = study.model_input(path, 32, 32)
        expected = np.asarray(model(pixels[None].astype("float32")))[0]
        np.testing.assert_allclose(survey.probabilities[k], expected, atol=1e-5)
        assert survey.classes[k, 0] == expected.argmax()
        for heatmap, class_index in zip(survey.heatmaps[k], survey.classes[k], strict=True):
            alone = study.grad_cam(model, pixels, "maps_3", class_index)
            np.testing.assert_allclose(heatmap, alone, rtol=1e-3, atol=1e-5)
    assert survey.classes[:, 2].tolist() == [survey.classes[0, 0], 0, 1, 2, 0]


def test_patches_lie_where_the_mark_is(tmp_path):
    # A filter that sums 3 × 3 pixels of red, at every second position: on a photo that is black but
    # for one red square it peaks at the square's place, the higher the brighter.
    photo = keras.Input((21, 21, 3))
    red = layers.Conv2D(1, 3, strides=2, use_bias=False, name="red")(photo)
    pooled = layers.GlobalAveragePooling2D(name="pooled")(red)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(pooled))
    kernel = np.zeros((3, 3, 3, 1))
    kernel[:, :, 0] = 1
    model.get_layer("red").set_weights([kernel])
    places, paths = [(2, 7), (0, 1), (9, 4)], [tmp_path / f"{k}.png" for k in range(3)]
    for path, (row, column), brightness in zip(paths, places, (50, 250, 0), strict=True):
        marked = np.zeros((21, 21, 3), "uint8")
        marked[2 * row : 2 * row + 3, 2 * column : 2 * column + 3, 0] = brightness
        Image.fromarray(marked).save(path)
    peaks = study.survey_photos(model, paths, [0, 1, 0]).peaks["red"]
    patches = study.patch_entries(peaks, {0: 5, 1: 7, 2: 9})
    assert patches == [[[7, 0, 1, 2250.0], [5, 2, 7, 450.0]]]  # the black photo does not fire it


# ---- Which photos, and how they are stored -------------------------------------------------------

PROBABILITIES = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.55, 0.45], [0.3, 0.7]])
LABELS = np.array([-1, 0, 0, 0, 0])


def test_mistakes_come_first_then_the_least_confident():
    assert study.doubtful_first(PROBABILITIES[[1, 2, 3, 0]], LABELS[1:]).tolist() == [1, 0, 2, 3]
    # A photo of unknown class is no mistake.
    assert study.doubtful_first(PROBABILITIES, LABELS).tolist() == [2, 4, 1, 3, 0]


def test_photos_beyond_the_limit_are_stored_only_for_their_patches(monkeypatch):
    monkeypatch.setattr(study, "LISTED_PHOTOS", 2)
    monkeypatch.setattr(study, "PATCHES", 1)
    peaks = study.Peaks(np.array([[1.0], [0], [0], [2], [0]]), np.zeros((5, 1, 2), int))
    survey = study.Survey(None, LABELS, PROBABILITIES, None, None, {"layer": peaks})
    assert study.stored_photos(survey, []) == ([0, 2, 4, 3], 3)
    assert study.stored_photos(survey, [0, 1]) == ([0, 1, 2, 3], 3)
    silent = replace(survey, peaks={"layer": replace(peaks, values=np.zeros((5, 1)))})
    assert study.stored_photos(silent, []) == ([0, 2, 4], 3)


@pytest.mark.parametrize("titled", [False, True])
def test_the_page_cuts_whole_tiles(tmp_path, titled):
    shades = np.arange(11, dtype="uint8") * 20 + 20
    tiles = np.broadcast_to(shades[:, None, None, None], (11, 48, 48, 3)).copy()
    path = tmp_path / "sheet.jpg"
    if titled:
        title = "a title that is\nwider than the sheet, in two lines"
        study.save_sheet(path, study.tile(tiles, columns=4), title)
        convolution = study.Convolution(1, 1, "conv2d", "conv2d", 11)
        sheet = study.Sheet(convolution, "conv2d", 48, 4, [k == 2 for k in range(11)])
        drawn = study.drawn_sheet(tmp_path, study.Picture(path.name, title, sheet))
        assert drawn["silent"] == [2] and drawn["count"] == 11
        assert (drawn["caption"], drawn["layer"]) == (title, "conv2d")
        cut = drawn
    else:
        cut = study.save_tiles(path, tiles, 4, quality=95)
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    assert (cut["height"], cut["width"]) == pixels.shape
    for k, shade in enumerate(shades):
        top = cut["top"] + k // cut["columns"] * cut["pitch"]
        left = cut["left"] + k % cut["columns"] * cut["pitch"]
        shown = pixels[top : top + cut["tile"], left : left + cut["tile"]]
        assert shown.shape == (48, 48) and abs(shown - shade).max() <= 12


@pytest.mark.parametrize("ratio", [3, 1 / 3, 0.001, 1])
def test_a_thumbnail_is_the_middle_of_its_photo(ratio):
    # Of a photo three times as wide as high, the middle third; in its square as in the photo.
    square = np.zeros((study.PHOTO_SIDE, study.PHOTO_SIDE, 3), "uint8")
    down, across = (min(0.5, share / 2) * study.PHOTO_SIDE for share in (ratio, 1 / ratio))
    inside = np.abs(np.arange(study.PHOTO_SIDE) + 0.5 - study.PHOTO_SIDE / 2)
    square[np.ix_(inside <= down + 1, inside <= across + 1)] = 200
    shown = study.thumbnail(square, ratio)
    assert shown.shape == (study.THUMBNAIL_SIDE, study.THUMBNAIL_SIDE, 3) and (shown == 200).all()


def test_a_heatmap_survives_its_bytes():
    heatmap = np.array([[0, 1.0, 2.0], [3.0, 0.5, 4.0]])
    text, peak = study.encoded_heatmap(heatmap)
    decoded = np.frombuffer(base64.b64decode(text), "uint8").reshape(2, 3) * (peak / 255)
    np.testing.assert_allclose(decoded, heatmap, atol=peak / 510)
    assert study.encoded_heatmap(np.zeros((1, 1))) == ("AA==", 0)


# ---- The page as a file --------------------------------------------------------------------------


def test_a_run_goes_on_without_the_page_and_writes_none_over_itself(tmp_path, monkeypatch, capsys):
    page = tmp_path / "index.html"
    monkeypatch.setattr(study, "PAGE", page)
    study.copy_page(tmp_path)
    message = capsys.readouterr().out
    assert "index.html is missing" in message and message.count("\n") == 1 and not page.exists()
    page.write_text("the page")
    study.copy_page(tmp_path)
    assert page.read_text() == "the page" and list(tmp_path.iterdir()) == [page]


def test_the_page_reads_what_is_written(made):
    used = set(re.findall(r"\brun\.(\w+)", PAGE)) - {"js"}
    assert used <= set(made[2]) and len(used) > 10


def test_the_page_needs_nothing_from_elsewhere():
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|fetch\(|innerHTML|\beval\b", PAGE)
    assert re.findall(r'<script src="([^"]*)"', PAGE) == ["run.js"] and "<link" not in PAGE
    pictures = re.findall(r"<img [^>]*>", PAGE)
    assert pictures and all(re.search(r'alt="[^"]{10,}"', picture) for picture in pictures)

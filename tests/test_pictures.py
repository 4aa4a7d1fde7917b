"""What the pictures promise: that they show what is there, where it is, and how much of it."""

from dataclasses import replace

import cv2
import keras
import matplotlib
import numpy as np
import pytest
from conftest import CLASSES, small_model, write_flowers
from draw_flowers import draw_flower
from keras import layers
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import model_training_and_visualization as study


def two_channel_model(kernel, bias=(0.0, 0.0)):
    """2 × 2 photo -> "maps": channel 0 red, channel 1 green -> means -> logits of two classes."""
    photo = keras.Input((2, 2, 3))
    maps = layers.Conv2D(2, 1, use_bias=False, name="maps")(photo)
    means = layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(means))
    model.layers[1].set_weights([np.array([[[[1, 0], [0, 1], [0, 0]]]], "float32")])
    model.layers[-1].set_weights([np.array(kernel, "float32"), np.array(bias, "float32")])
    return model


# Red 8 4 0 2, green 0 4 8 0.
PHOTO = np.array([[[8, 0, 9], [4, 4, 9]], [[0, 8, 9], [2, 0, 9]]], "uint8")
# Its logits: the mean of red for one class, that of green for the other.
RED_OR_GREEN = [[4, 0], [0, 4]]
RED, GREEN = np.array([[8, 4], [0, 2]]), np.array([[0, 4], [8, 0]])


def explanation(photo=PHOTO, heatmaps=(1, 1, 1), **facts):
    """An explanation of a photo that is a rose, and taken for a tulip.

    heatmaps: of each class, at the only layer.
    """
    known = {
        "name": "rose/a.jpg",
        "photo": photo,
        "pixels": photo,
        "class_names": ["daisy", "rose", "tulip"],
        "probabilities": np.array([0.02, 0.29, 0.69]),
        "true_index": 1,
        "heatmaps": {
            "maps": {k: np.zeros((2, 2), "float32") + it for k, it in enumerate(heatmaps)}
        },
    }
    return study.Explanation(**(known | facts))


@pytest.fixture
def panels(monkeypatch):
    """What save_panels is asked to draw, in place of drawing it: [(file, rows, title, norm)]."""
    asked = []

    def save_panels(path, rows, title, label, norm, *_, **__):
        asked.append((path.name, rows, title, norm))

    monkeypatch.setattr(study, "save_panels", save_panels)
    return asked


# ---- Grad-CAM ------------------------------------------------------------------------------------


def test_grad_cam_of_a_2_by_2_photo_is_what_one_computes_by_hand():
    # Means pass a quarter of the logit's weights to each position: (4 red - 8 green) / 4.
    heatmap = study.grad_cam(two_channel_model([[0, 4], [0, -8]]), PHOTO, "maps", 1)
    np.testing.assert_allclose(heatmap, [[8, 0], [0, 2]], atol=1e-5)


def test_grad_cam_explains_the_logit_where_the_softmax_is_saturated():
    model = two_channel_model([[0, 4], [0, -8]], bias=[0, 1000])
    assert model(PHOTO[None].astype("float32"))[0, 1] == 1
    heatmap = study.grad_cam(model, PHOTO, "maps", 1)
    np.testing.assert_allclose(heatmap, [[8, 0], [0, 2]], atol=1e-5)


def test_shifting_the_photo_shifts_the_heatmap():
    photo = keras.Input((64, 64, 3))
    ones = {"kernel_initializer": "ones", "use_bias": False}
    maps = layers.Conv2D(1, 4, strides=4, name="maps", **ones)(photo)
    means = layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(photo, layers.Dense(2, activation="softmax", **ones)(means))
    spot = np.zeros((64, 64, 3), "uint8")
    spot[20:27, 12:30] = np.random.default_rng(0).integers(50, 256, (7, 18, 3))
    before = study.grad_cam(model, spot, "maps", 0)
    after = study.grad_cam(model, np.roll(spot, (8, 20), axis=(0, 1)), "maps", 0)
    assert before.max() > 0 and (before == 0).any()
    np.testing.assert_allclose(after, np.roll(before, (2, 5), axis=(0, 1)), rtol=1e-5)


def test_the_heatmap_of_a_trained_model_lies_on_the_flower(tmp_path):
    keras.utils.set_random_seed(0)
    write_flowers(tmp_path / "train", CLASSES, 100, size=64)
    photos, _ = study.open_split(tmp_path / "train", (64, 64), 20, generator=study.PhotoGenerator())
    model = small_model(64, channels=16)
    model.compile(keras.optimizers.Adam(3e-3), loss="categorical_crossentropy")
    model.fit(photos, epochs=12, verbose=0)
    field = study.receptive_fields(model)["maps_3"]
    assert field.centre == (7, 7) and field.stride == (4, 4)  # 1 + 2 + 4 pixels
    hits, chance = [], []
    for label, name in enumerate(CLASSES):
        for k in range(20):
            photo, mask = draw_flower(name, np.random.default_rng([9, label, k]), 64)
            heatmap = study.grad_cam(model, photo, "maps_3", label)
            placed = study.place_heatmap(heatmap, field, (64, 64))
            hits.append(mask[np.unravel_index(placed.argmax(), mask.shape)])
            chance.append(mask.mean())
    assert np.mean(hits) > np.mean(chance) + 0.25


# ---- A heatmap on its photo ----------------------------------------------------------------------


@pytest.mark.parametrize(("position", "pixel"), [((0, 0), 3), ((2, 2), 11)])
def test_a_marker_in_the_corner_and_in_the_centre_is_placed_to_the_pixel(position, pixel):
    heatmap = np.zeros((4, 4))
    heatmap[position] = 1
    field = study.ReceptiveField((3, 3), (4, 4), (7, 7))
    placed = study.place_heatmap(heatmap, field, (19, 19))
    assert placed[pixel, pixel] == 1
    # Half-way to the next position, two pixels on, half of it is left; at the next one nothing.
    np.testing.assert_allclose(placed[pixel, [pixel + 2, pixel + 4]], [0.5, 0], atol=1e-6)
    # Beyond the outermost centre it fades likewise: of a stride of 4, the edge is 3 away.
    assert placed[0, pixel] == placed[pixel, 0] == (0.25 if position == (0, 0) else 0)


def test_each_position_is_drawn_as_a_stride_around_its_centre():
    field = study.ReceptiveField((3, 5), (5, 6), (7, 7))
    photo, pixels = np.zeros((42, 63, 3), "uint8"), np.zeros((21, 21, 3), "uint8")
    heatmap = np.arange(6, dtype="float32").reshape(3, 2)
    shown = explanation(photo, pixels=pixels)
    below, drawn = drawn_images(study.Panel(shown, "", heatmap, field, positions=True))
    # Rows: pixel 3 lies at 3.5, half a stride before it is 1, three on 16; the photo is twice as
    # large. Columns: 5.5, 2.5 and 14.5, three times as large.
    assert drawn.get_extent() == below.get_extent() == [7.5, 43.5, 32, 2]
    np.testing.assert_array_equal(drawn.get_array(), heatmap)
    assert drawn.axes.get_xlim() == (0, 63) and drawn.axes.get_ylim() == (42, 0)


def drawn_images(panel):
    """The arrays that a panel draws one over another, each of the photo's extent."""
    axes = Figure().subplots()
    study.draw_panel(axes, panel, study.Normalize(0, 1), "inferno")
    return axes.images


def test_an_overlay_is_hottest_where_the_position_looks_not_where_a_stretch_puts_it():
    heatmap = np.zeros((4, 4), "float32")
    heatmap[0, 3] = 1
    field = study.ReceptiveField((10, 10), (2, 2), (21, 21))  # all look at the middle
    shown = explanation(np.full((66, 33, 3), 90, "uint8"), pixels=np.zeros((33, 33, 3), "uint8"))
    photo, overlay = drawn_images(study.Panel(shown, "", heatmap, field))
    assert photo.get_extent() == overlay.get_extent() == [0, 33, 66, 0]
    assert (np.asarray(photo.get_array()) == 90).all()
    placed = np.asarray(overlay.get_array())
    assert np.argwhere(placed == 1).tolist() == [[10, 16]]  # column 10 + 3 · 2
    assert placed[[8, 10], [16, 18]].tolist() == [0, 0]  # a stride further out
    assert overlay.get_alpha() == study.OVERLAY_OPACITY


def test_the_colours_of_overlay_positions_and_bar_agree(tmp_path):
    photo = np.full((40, 40, 3), 127, "uint8")
    heatmap, field = (
        np.full((2, 2), 0.7, "float32"),
        study.ReceptiveField((10, 10), (20, 20), (1, 1)),
    )
    row = [
        study.Panel(explanation(photo), "positions", heatmap, field, positions=True),
        study.Panel(explanation(photo), "overlay", heatmap, field),
    ]
    study.save_panels(tmp_path / "a.png", [row], "title", "label", study.Normalize(0, 1))
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    at = [picture[height * 3 // 5, int(width * share)] for share in (3.1 / 14, 9.1 / 14)]
    np.testing.assert_allclose(*at, atol=2)
    bar = picture[:, int(width * 12.32 / 14)]
    assert (np.abs(bar - at[0]).max(1) <= 3).any()


# ---- What captions and titles say ----------------------------------------------------------------


def test_the_verdict_names_classes_with_their_own_probabilities():
    mistaken = explanation()
    assert mistaken.verdict == "It says tulip, 69 %; it is a rose, 29 %"
    assert mistaken.is_mistake and mistaken.contrast_name == "tulip"
    correct = explanation(true_index=2)
    assert correct.verdict == "It says tulip, 69 %, and is right" and not correct.is_mistake
    unknown = explanation(true_index=None)
    assert unknown.verdict == "It says tulip, 69 %; rose, 29 %" and not unknown.is_mistake


@pytest.mark.parametrize("sure_of", [None, 700])
def test_of_equally_probable_classes_the_first_are_in_question_as_they_are_predicted(sure_of):
    probabilities = np.zeros((1, 1000), "float32")  # so many are sorted in another way than few
    probabilities[0, sure_of or 0] = sure_of is not None
    found = explanation(probabilities=probabilities[0], true_index=None, class_names=[""] * 1000)
    expected = [found.predicted_index, found.contrast_index, found.predicted_index]
    assert study.classes_in_question(probabilities, [-1]).tolist() == [expected]


def test_a_photo_of_unknown_class_is_explained_for_the_predicted_one(tmp_path):
    photo = np.zeros((2, 2, 3), "uint8")
    photo[0, 0] = (0, 200, 0)
    Image.fromarray(photo).save(tmp_path / "green.png")
    model = two_channel_model(RED_OR_GREEN)
    twice = [tmp_path / "green.png"] * 2, ["green.png", "again"], ["red", "green"]
    found, known = study.explain(model, *twice, labels=[-1, 0])
    assert (found.class_name, found.contrast_name, found.true_index) == ("green", "red", None)
    np.testing.assert_allclose(found.heatmap, [[200, 0], [0, 0]], atol=1e-3)
    np.testing.assert_array_equal(known.contrast_heatmap, found.heatmap)
    assert known.class_name == "red" and known.is_mistake and not known.heatmap.any()
    assert (found.name, known.name) == ("green.png", "again") and known.deletion is None


def test_the_caption_tells_hottest_from_central_and_whether_the_heatmap_beats_a_guess(monkeypatch):
    photo = np.zeros((40, 40, 3), "uint8")
    hot_corner = {"maps": {1: np.zeros((40, 40), "float32")}}
    hot_corner["maps"][1][:16, :20] = 1  # a fifth of all pixels
    marked = replace(explanation(photo), heatmaps=hot_corner)
    model = small_model(40)
    monkeypatch.setattr(study, "heatmap_layer", lambda model: "rescaling")
    monkeypatch.setattr(
        study,
        "receptive_fields",
        lambda model: {"rescaling": study.ReceptiveField((0, 0), (1, 1), (1, 1))},
    )

    def without(model, photos, masks):
        """A class that hangs on the corner: 0.1 without it, 0.2 without the middle, or 0.29."""
        p = [0.1 if mask[:16, :20].all() else 0.2 if mask[20, 20] else 0.29 for mask in masks]
        assert [mask.sum() for mask in masks] == [320] * len(masks)
        return np.array([[0, value, 1 - value] for value in p])

    monkeypatch.setattr(study, "deletion_scores", without)

    other_corner = {"maps": {1: hot_corner["maps"][1][::-1, ::-1].copy()}}
    shown = marked, replace(marked, heatmaps=other_corner), explanation(photo, heatmaps=(1, 0, 1))
    better, no_better, empty = map(study.deletion_caption, study.with_deletion(model, shown))
    assert better == (
        "Without the hottest fifth: P(rose) 0.29 → 0.10; without a central fifth: 0.20. "
        "Better than a guess here."
    )
    assert "0.29 → 0.29; without a central fifth: 0.20. No better" in no_better
    assert empty == "Nothing speaks for rose: the heatmap is empty."


def test_deleting_everything_leaves_the_blurred_photo_and_deleting_nothing_the_photo():
    keras.utils.set_random_seed(1)
    model = small_model()
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype="uint8")
    everything, nothing = np.ones((32, 32), bool), np.zeros((32, 32), bool)
    without_all, without_nothing = study.deletion_scores(
        model, [photo, photo], [everything, nothing]
    )
    blurred = cv2.GaussianBlur(photo.astype("float32"), (0, 0), 32 / 12)
    np.testing.assert_allclose(without_all, model(blurred[None])[0], atol=1e-5)
    as_it_is = model(photo[None].astype("float32"))[0]
    np.testing.assert_allclose(without_nothing, as_it_is, atol=1e-6)
    assert np.abs(without_all - as_it_is).max() > 1e-3


def test_the_hottest_fifth_holds_the_highest_values():
    heatmap = np.arange(100.0).reshape(10, 10)
    assert study.top_fraction(heatmap, 0.2).nonzero()[0].tolist() == [8] * 10 + [9] * 10
    spot = np.zeros((10, 10))
    spot[6, 7] = 1  # nothing else is marked: the rest of a twentieth lies around it
    around = [(5, 7), (6, 6), (6, 7), (6, 8), (7, 7)]
    assert np.argwhere(study.top_fraction(spot, 0.05)).tolist() == [list(it) for it in around]


def test_each_heatmap_is_titled_with_the_class_that_it_explains(panels, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "save_values", lambda *_: None)
    model = two_channel_model(RED_OR_GREEN)
    named = {"class_names": ["red", "green"], "probabilities": np.array([0.3, 0.7])}
    worth = (0.3, 0.1, 0.2)
    shown = explanation(true_index=0, heatmaps=(RED, GREEN), deletion=worth, **named)
    captions = [picture.caption for picture in study.draw_heatmaps(tmp_path, model, [shown])]
    ((file, [[photo, positions, overlay]], title, norm),) = panels
    assert file == "CAM_1.jpeg" and "It says green, 70 %; it is a red, 30 %" in title
    assert "P(red) 0.30 → 0.10;" in title and photo.heatmap is None and norm.vmax == 8
    assert "for red" in positions.title and "for red" in overlay.title
    assert "for red" in captions[1]
    np.testing.assert_array_equal(overlay.heatmap, RED)


def test_what_misled_the_model_is_the_class_that_it_says_minus_the_true_one(panels, tmp_path):
    named = {"class_names": ["red", "green"], "probabilities": np.array([0.3, 0.7])}
    mistaken = explanation(true_index=0, heatmaps=(RED, GREEN), **named)
    correct = explanation(true_index=1, heatmaps=(RED, GREEN), **named)
    model = two_channel_model(RED_OR_GREEN)
    list(study.draw_mistakes(tmp_path, model, [correct, mistaken]))
    ((_, [[photo, *compared]], title, norm),) = panels
    assert photo.explanation is mistaken and title.startswith("What misled the model (its only")
    by_title = {panel.title.replace("\n", " "): panel.heatmap for panel in compared}
    assert list(by_title) == ["for green", "for red", "green minus red"]
    for name, expected in zip(by_title, (GREEN, RED, GREEN - RED), strict=True):
        np.testing.assert_allclose(by_title[name], expected, atol=1e-5)
    assert norm(0) == 0.5 and norm.vmax == pytest.approx(8)
    list(study.draw_mistakes(tmp_path, model, [correct]))
    assert panels[1][2].startswith("What it nearly took for something else")


def test_each_block_is_drawn_where_its_own_positions_look(panels, tmp_path):
    model = small_model(64)
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    (shown,) = study.explain(model, [tmp_path / "photo.png"], ["a photo"], CLASSES, labels=[1])
    list(study.draw_blocks(tmp_path, model, shown))
    ((_, rows, _, _),) = panels
    blocks = [panel for row in rows for panel in row][1:]
    looks = {
        panel.title.split(",")[0]: (panel.field.centre, panel.field.stride) for panel in blocks
    }
    # Unpadded 3 × 3 windows of strides 2, 2, 1: first centres 1, 1 + 2 and 3 + 4.
    assert looks == {
        "maps_1": ((1, 1), (2, 2)),
        "maps_2": ((3, 3), (4, 4)),
        "maps_3": ((7, 7), (4, 4)),
    }
    for panel in blocks:
        own = study.grad_cam(model, photo, panel.title.split(",")[0], 1)
        np.testing.assert_allclose(panel.heatmap, own / (own.max() or 1), atol=1e-6)


# ---- Grids ---------------------------------------------------------------------------------------


def test_tile_k_of_a_grid_holds_channel_k_and_the_last_row_is_filled_up():
    photo = keras.Input((5, 5, 3))
    maps = layers.Conv2D(19, 5, padding="same", use_bias=False, name="maps")(photo)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(layers.Flatten()(maps)))
    kernel = np.zeros((5, 5, 3, 19), "float32")
    for k in range(19):  # moves the bright middle pixel to row k % 5, column k // 5
        kernel[4 - k % 5, 4 - k // 5 % 5, 0, k] = 1
    model.get_layer("maps").set_weights([kernel])
    bright = np.zeros((5, 5, 3), "uint8")
    bright[2, 2] = 200
    sheet = study.activation_grid(model, bright, "maps")
    side = 96 + 4
    assert sheet.shape == (2 * side, 16 * side, 3)
    for k in range(19):
        row, column = 2 + side * (k // 16), 2 + side * (k % 16)
        brightness = sheet[row : row + 96, column : column + 96].astype(int).sum(2)
        brightest = np.argwhere(brightness == brightness.max()).mean(0) / 96 * 5
        np.testing.assert_allclose(brightest, [k % 5 + 0.5, k // 5 % 5 + 0.5], atol=0.2)
    assert (sheet[side:, 3 * side :] == study.BACKGROUND).all()


def test_a_channel_that_is_0_is_crossed_and_one_that_fires_evenly_is_bright():
    zero_and_even = np.stack([np.zeros((6, 6)), np.full((6, 6), 0.3)], axis=-1)
    zero, even = study.channel_tiles(zero_and_even.astype("float32"))
    assert np.ptp(zero.astype(int)) > 50
    assert np.ptp(even.reshape(-1, 3).astype(int), axis=0).max() == 0 and even.max() > 200


def test_negative_activations_are_blue_and_positive_ones_red_to_yellow():
    channel = np.array([[-1.0, 0.0, 1.0]], "float32")[..., None]
    (tile,) = study.channel_tiles(channel)
    negative, zero, positive = tile[48, [16, 48, 80]].astype(int)
    assert negative[2] > 200 > 170 > negative[0] and zero.max() < 10
    assert positive[0] > 200 > 100 > positive[2]


def test_a_grid_for_each_layer_whose_title_counts_the_zero_channels(monkeypatch, tmp_path):
    titles = {}
    monkeypatch.setattr(
        study, "save_sheet", lambda path, sheet, title: titles.update({path.name: title})
    )
    photo = keras.Input((20, 20, 3))
    maps = layers.Conv2D(6, 3, name="maps")(photo)
    fired = layers.ReLU(name="fired")(maps)
    fused = layers.Conv2D(4, 1, activation="relu", bias_initializer="ones", name="fused")(fired)
    means = layers.GlobalAveragePooling2D()(fused)
    model = keras.Model(photo, layers.Dense(3, activation="softmax")(means))
    kernel, bias = model.get_layer("maps").get_weights()
    model.get_layer("maps").set_weights([kernel * (~np.isin(np.arange(6), [1, 3])), bias])
    shown = explanation(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype="uint8"))
    list(study.draw_grids(tmp_path, model, shown))
    assert set(titles) == {"conv2d_1_grid.jpg", "activation_1_grid.jpg", "conv2d_2_grid.jpg"}
    title = titles["conv2d_1_grid.jpg"]
    assert title.startswith("convolution 1 of 2 (layer maps) for rose/a.jpg: 6 channels of 18 × 18")
    assert "2 channels are 0 everywhere" in title and "blue negative" in title
    assert "fired" in titles["activation_1_grid.jpg"]
    assert "blue" not in titles["activation_1_grid.jpg"]


def test_one_hot_pixel_does_not_darken_the_rest_of_its_channel():
    channel = np.full((40, 40, 1), 1.0, "float32")
    calm = study.channel_tiles(channel)
    channel[7, 7] = 1000
    np.testing.assert_array_equal(study.channel_tiles(channel)[0, 20], calm[0, 20])


@pytest.mark.parametrize("channels", [192, 2048])
def test_tiles_of_a_grid_never_shrink_below_24_pixels(channels):
    tiles = study.channel_tiles(np.ones((3, 3, channels), "float32"))
    assert tiles.shape[0] == channels and tiles.shape[1] == tiles.shape[2] >= 24


# ---- Figures -------------------------------------------------------------------------------------


def test_a_sheet_is_saved_pixel_for_pixel_whatever_its_title_and_settings(tmp_path):
    sheet = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype="uint8")
    title = "A title that is a good deal longer than the sheet is wide\nand names $\\no_such{$.jpg"
    with matplotlib.rc_context({"image.origin": "lower", "savefig.transparent": True}):
        study.save_sheet(tmp_path / "sheet.png", sheet, title)
    saved = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    places = np.argwhere((saved[:-89, :-129] == sheet[0, 0]).all(2))
    assert any((saved[y : y + 90, x : x + 130] == sheet).all() for y, x in places)


def test_a_rotated_photo_is_explained_upright_and_at_its_own_resolution(tmp_path):
    model = small_model(75)
    photo = np.zeros((120, 200, 3), "uint8")
    photo[:, :100] = (200, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(photo).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    (found,) = study.explain(model, [tmp_path / "turned.jpg"], ["turned.jpg"], CLASSES, labels=[-1])
    assert found.photo.shape == (200, 120, 3)
    assert found.photo[50, 60, 0] > 150 > found.photo[150, 60, 0]
    assert found.pixels[20, 37, 0] > 150 > found.pixels[60, 37, 0]


LONG = "a_class_name_that_somebody_made_by_joining_far_too_many_words_with_underscores"


SHORT = ["dandelion", "sunflower", "WWWWWWWW MMMMMMMM"]


@pytest.mark.parametrize(
    ("names", "shape"),
    [(SHORT, (80, 60)), ([LONG] * 3, (300, 4)), ([LONG] * 3, (4, 300)), (SHORT, (1, 1))],
)
def test_no_text_runs_into_the_panel_beside_it_or_off_the_figure(
    names, shape, monkeypatch, tmp_path
):
    figures = []
    monkeypatch.setattr(study, "save_figure", lambda path, figure, *_, **__: figures.append(figure))
    pixels = np.full((32, 32, 3), 120, "uint8")
    shown = explanation(
        np.full((*shape, 3), 120, "uint8"),
        pixels=pixels,
        class_names=names,
        name=f"{LONG} {LONG}/{LONG}.jpg",
    )
    model = small_model()
    of_classes = {k: np.ones((5, 5), "float32") for k in range(3)}
    shown = replace(shown, heatmaps=dict.fromkeys(study.block_layers(model), of_classes))
    list(study.draw_blocks(tmp_path, model, shown))
    list(study.draw_mistakes(tmp_path, model, [shown, shown]))
    list(study.draw_heatmaps(tmp_path, model, [shown]))
    for figure in figures[:3]:  # those of panels; the others are cut to what they hold
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert (np.round(box.min, 2) >= 0).all() and (box.max <= figure.get_size_inches()).all()
        for axes in figure.axes[:-1]:  # the last is the colour bar
            title = axes.get_title(loc="left")
            text = next(text for text in axes.findobj(Text) if text.get_text() == title)
            end = axes.get_position(original=True).x1 * figure.bbox.width
            assert text.get_window_extent().x1 <= end


def test_a_confusion_matrix_of_200_classes_is_drawn_within_a_few_thousand_pixels(tmp_path):
    labels = np.arange(400) % 200
    names = [f"species {k:03}" for k in range(200)]
    probabilities = np.eye(200)[np.roll(labels, 1)]
    study.save_confusion_matrix(
        tmp_path / "matrix.png", study.Evaluation(names, labels, probabilities)
    )
    assert 1500 < max(Image.open(tmp_path / "matrix.png").size) < 6000


def test_the_row_of_a_confusion_matrix_is_the_true_class(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(study, "save_figure", lambda path, figure, *_: figures.append(figure))
    evaluation = study.Evaluation(
        ["rose", "tulip"], np.array([0, 0, 0, 1]), np.eye(2)[[0, 1, 1, 1]]
    )
    study.save_confusion_matrix(tmp_path / "matrix.png", evaluation)
    (axes,) = figures[0].axes
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "1", (1, 0): "2", (0, 1): "0", (1, 1): "1"}  # column, row
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_all_is_drawn_for_any_model_from_paths_and_labels_or_without(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "PATTERN_SIZE", 32)
    monkeypatch.setattr(study, "PATTERN_STEPS", 1)
    photos = sorted(write_flowers(tmp_path / "test", CLASSES, 2))
    model = small_model()
    study.draw(model, photos, CLASSES, tmp_path / "with", [0, 0, 1, 1, 2, 2])
    study.draw(model, photos[:1], CLASSES, tmp_path / "without")
    with_truth, without = ({p.name for p in (tmp_path / n).iterdir()} for n in ("with", "without"))
    needs_truth = {"confusion_matrix.png", "CAM_mistakes.jpg"}
    assert needs_truth <= with_truth and not needs_truth & without
    always = {
        "conv2d_1_grid.jpg",
        "conv2d_3_filters.jpg",
        "CAM_1.jpeg",
        "CAM_layers.jpg",
        "strip.jpg",
    }
    assert always | {"index.html", "run.js", "photos.jpg"} <= with_truth & without

"""What the three techniques return for a photo: heatmaps, and sheets of channels."""

from dataclasses import replace

import keras
import matplotlib
import numpy as np
import pytest
from conftest import small_model
from keras import layers
from known_model import HEIGHT, WIDTH, known_model
from PIL import Image
from scipy import ndimage

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


# ---- Grids, and the photos of a filter -----------------------------------------------------------


def test_a_channel_of_one_hot_pixel_has_full_colour_there_and_black_elsewhere():
    photo = keras.Input((20, 20, 3))
    faint = layers.Conv2D(1, 1, use_bias=False, name="faint")
    scores = layers.Dense(2)(layers.GlobalAveragePooling2D()(faint(photo)))
    model = keras.Model(photo, layers.Softmax()(scores))
    faint.set_weights([np.full((1, 1, 3, 1), 1e-4)])
    pixels = np.zeros((20, 20, 3), "uint8")
    pixels[5, 10] = 100  # 0.03 of activation
    sheet = study.activation_grid(model, pixels, "faint")
    side = (sheet.shape[0] - 2 * study.TILE_GAP) / 20
    middles = np.round(study.TILE_GAP + (np.arange(20) + 0.5) * side - 0.5).astype(int)
    found = sheet[np.ix_(middles, middles)].astype(int)
    assert np.abs(found[5, 10] - [255, 227, 77]).max() <= 2
    assert np.delete(found.reshape(400, 3), 5 * 20 + 10, axis=0).max() <= 2


def test_photos_on_which_a_filter_does_not_fire_are_none_of_its_best():
    values = np.array([[0.0], [2.0], [0.0], [3.0]])
    peaks = study.Peaks(values, np.zeros((4, 1, 2), int))
    assert study.top_photos(peaks, 0) == [3, 1]


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


def test_the_heatmap_of_all_blocks_is_the_mean_of_gradient_times_activation_block_by_block():
    photo = keras.Input((4, 4, 3))
    red = layers.Conv2D(1, 1, use_bias=False, name="red")(photo)
    pooled = layers.AveragePooling2D(2, name="pooled")(red)
    logits = layers.Dense(2)(layers.Flatten()(pooled))
    model = keras.Model(photo, logits)
    weights = np.array([[3.0, -1.0], [0.5, 2.0]])  # of the second class, for each position
    model.layers[1].set_weights([np.array([[[[1], [0], [0]]]], "float32")])
    model.layers[-1].set_weights([np.stack([np.zeros(4), weights.ravel()], axis=1), np.zeros(2)])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype("uint8")
    reds = pixels[..., 0].astype(float)
    early = np.maximum(0, reds * weights.repeat(2, 0).repeat(2, 1))
    late = np.maximum(0, reds.reshape(2, 2, 2, 2).mean((1, 3)) * weights)
    rows, columns = np.indices((4, 4))
    at = [(rows - 0.5) / 2, (columns - 0.5) / 2]  # a position looks at the middle of its pixels
    placed = ndimage.map_coordinates(late / late.max(), at, order=1, mode="grid-constant")
    heatmap = study.heatmap_of_all_blocks(model, pixels, 1)
    np.testing.assert_allclose(heatmap, (early / early.max() + placed) / 2, atol=0.02)


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


def test_the_hottest_fifth_holds_the_highest_values():
    heatmap = np.arange(100.0).reshape(10, 10)
    assert study.top_fraction(heatmap, 0.2).nonzero()[0].tolist() == [8] * 10 + [9] * 10
    spot = np.zeros((10, 10))
    spot[6, 7] = 1  # nothing else is marked: the rest of a twentieth lies around it
    around = [(5, 7), (6, 6), (6, 7), (6, 8), (7, 7)]
    assert np.argwhere(study.top_fraction(spot, 0.05)).tolist() == [list(it) for it in around]


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
    assert np.ptp(sheet[side:, 3 * side :]) == 0 and sheet[-1, -1].max() < 50


def red_channel(*, size=40, channels=1):
    """A model whose layer "maps" passes on the red of each pixel, so many times."""
    photo = keras.Input((size, size, 3))
    maps = layers.Conv2D(channels, 1, use_bias=False, name="maps")(photo)
    means = layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(means))
    kernel = np.zeros((1, 1, 3, channels), "float32")
    kernel[0, 0, 0] = 1
    model.get_layer("maps").set_weights([kernel])
    return model


def test_one_hot_pixel_does_not_darken_the_rest_of_its_channel():
    photo = np.ones((40, 40, 3), "uint8")
    calm = study.activation_grid(red_channel(), photo, "maps")
    photo[7, 7] = 255
    hot = study.activation_grid(red_channel(), photo, "maps")
    np.testing.assert_array_equal(hot[50], calm[50])
    assert calm[50, 50].max() > 200  # a channel that fires evenly is bright


def test_tiles_of_a_grid_never_shrink_below_24_pixels():
    model = red_channel(size=3, channels=2048)
    sheet = study.activation_grid(model, np.ones((3, 3, 3), "uint8"), "maps")
    assert sheet.shape[0] // (2048 // 16) == sheet.shape[1] // 16 >= 24


def test_a_photo_of_another_size_is_squeezed_to_what_the_model_takes():
    photo = np.zeros((80, 20, 3), "uint8")
    photo[40:] = 200
    sheet = study.activation_grid(red_channel(), photo, "maps").astype(int)
    assert sheet.shape == (100, 100, 3)
    assert sheet[30, 50].max() < 20 < 200 < sheet[70, 50].max()


def test_of_as_many_photos_as_are_shown_no_filter_is_more_selective_than_another():
    values = np.random.default_rng(0).random((5, 12)).astype("float32")
    values[:, 3] = 0  # it never fires
    peaks = study.Peaks(values, np.zeros((5, 12, 2), int))
    assert study.most_selective(peaks) == [k for k in range(12) if k != 3]


def test_a_filter_is_selective_where_five_photos_stand_out_not_where_one_does():
    values = np.ones((20, 3))
    values[7, 0] = 10  # of filter 0 one photo: the five best lie 0.7 deviations above the mean
    values[10:15, 1] = 5  # of filter 1 five photos: 1.7 deviations
    values[:, 2] = 0  # filter 2 never fires
    peaks = study.Peaks(values, np.zeros((20, 3, 2), int))
    assert study.most_selective(peaks) == [1, 0]


@pytest.mark.parametrize(
    ("without_hottest", "without_central", "judgement", "digits"),
    [
        (0.2, 0.5, "Better", 2),
        (0.5, 0.2, "No better", 2),
        (0.495, 0.5, "The same", 2),
        (0.498, 0.502, "The same", 3),
        (0.95, 0.97, "No better", 2),  # than 0.9 as it is: nothing falls
    ],
)
def test_a_heatmap_is_judged_by_its_control_and_by_whether_anything_falls(
    without_hottest, without_central, judgement, digits
):
    deletion = study.Deletion(0.9, without_hottest, without_central)
    words = study.deletion_caption("daisy", deletion)
    assert judgement in words and "daisy" in words
    numbers = [f"{value:.{digits}f}" for value in (0.9, without_hottest, without_central)]
    places = [words.index(number) for number in dict.fromkeys(numbers)]
    assert places == sorted(places)


def test_the_heatmap_of_all_blocks_weighs_what_speaks_for_and_against_at_each_position():
    # For class 1 red speaks with 2, green against it with 1: 16, 4, -8 and 4.
    model = two_channel_model([[0, 2], [0, -1]])
    found = study.heatmap_of_all_blocks(model, PHOTO, 1)
    np.testing.assert_allclose(found, [[1, 4 / 16], [0, 4 / 16]], atol=1e-6)


def test_stripes_finer_than_the_pixels_of_the_input_become_grey():
    stripes = np.zeros((7 * HEIGHT, 7 * WIDTH, 3), "uint8")
    stripes[:, ::2] = 254
    flat = np.full((HEIGHT, WIDTH, 3), 127, "uint8")
    shown = [study.grad_cam(known_model(), photo, "marks", 0) for photo in (stripes, flat)]
    batch = study.Network(known_model()).as_batch(stripes).numpy()
    assert np.abs(batch - 127).max() < 12
    np.testing.assert_allclose(*shown, atol=0.02)


def test_each_heatmap_of_a_photo_is_captioned_with_what_it_is_worth_itself(tmp_path):
    network = study.Network(two_channel_model([[0, 4], [0, -8]]))
    explanation = study.Explanation(
        name="a.jpg",
        photo=PHOTO,
        pixels=PHOTO,
        class_names=["daisy", "rose"],
        probabilities=np.array([0.9, 0.1]),
        true_index=0,
        uncut={"maps": {k: np.ones((2, 2), "float32") for k in range(2)}},
        of_all_blocks=np.full((2, 2), 0.5, "float32"),
        deletions={0: study.Deletion(0.9, 0.21, 0.55)},
        deletion_of_all_blocks=study.Deletion(0.9, 0.78, 0.55),
    )
    (picture,) = study.draw_heatmaps(tmp_path, network, [explanation])
    of_last_layer, of_all_blocks = picture.caption.split("\n")[1:]
    assert "0.21" in of_last_layer and "Better" in of_last_layer
    assert "all blocks" in of_all_blocks
    assert "0.78" in of_all_blocks and "No better" in of_all_blocks
    # A fall that is none in two digits has no sign.
    unmoved = replace(explanation, deletions={0: study.Deletion(0.5, 0.501, 0.6)})
    assert "by 0.00" in (told := study.deletion_summary([unmoved])) and "by -0.10" in told
    # The middle of the fourth panel has the colour of the heatmap's own peak, over grey.
    drawn = np.asarray(Image.open(tmp_path / picture.file).convert("RGB"), int)
    peak = 255 * np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    expected = 0.6 * peak + 0.4 * PHOTO.mean(2).mean()
    assert np.abs(drawn[-160, 1055] - expected).max() < 12


def test_each_heatmap_of_a_photo_is_judged_without_its_own_hottest_fifth(tmp_path):
    keras.utils.set_random_seed(1)
    network, path = study.Network(small_model()), tmp_path / "a.png"
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), "uint8")
    Image.fromarray(photo).save(path)
    survey = study.survey_photos(network, [path], [0], ["daisy", "rose", "tulip"])
    explanation = study.explain(survey, 0)

    def without(heatmap):
        mask = study.top_fraction(heatmap)
        found = study.probabilities_without(network.probabilities, photo, [mask])
        return pytest.approx(float(found[0, 0]), abs=1e-6)

    of_last_layer = study.placed(network, network.heatmap_layer, explanation.heatmap)
    assert explanation.deletions[0].without_hottest == without(of_last_layer)
    score = explanation.deletion_of_all_blocks.without_hottest
    assert score == without(explanation.of_all_blocks) and score != without(of_last_layer)


def test_the_caption_of_examples_counts_the_filters_that_were_looked_at(tmp_path):
    network = study.Network(two_channel_model([[0, 4], [0, -8]]))
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    Image.fromarray(PHOTO // 2).save(tmp_path / "b.png")
    pictures = np.zeros((1, 16, 16, 3), "uint8")  # of the first of two filters
    patterns = study.Patterns(network.convolution("maps"), pictures, np.array([True]))
    peaks = study.Peaks(np.array([[8.0], [4.0]]), np.zeros((2, 1, 2), int))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    (picture,) = study.draw_examples(tmp_path, network, patterns, peaks, paths)
    assert "1 of its first 1 filters" in picture.caption and "2 photos" in picture.caption
    (picture,) = study.draw_patterns(tmp_path, patterns)
    assert "1 of its 2 filters" in picture.caption and "all of them fire" in picture.caption

"""What the pictures promise: that they show what is there, where it is, and how much of it."""

import io
from types import SimpleNamespace

import cv2
import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, small_network, write_flowers
from draw_flowers import draw_flower
from keras import layers
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import model_training_and_visualization as study


def two_channel_network(kernel, bias=(0.0, 0.0)):
    """2 × 2 photo -> "maps": channel 0 red, channel 1 green -> means -> logits of two classes."""
    photo = keras.Input((2, 2, 3))
    maps = layers.Conv2D(2, 1, use_bias=False, name="maps")(photo)
    network = keras.Model(photo, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(maps)))
    network.layers[1].set_weights([np.array([[[[1, 0], [0, 1], [0, 0]]]], "float32")])
    network.layers[-1].set_weights([np.array(kernel, "float32"), np.array(bias, "float32")])
    return network


PHOTO = np.array([[[8, 0, 9], [4, 4, 9]], [[0, 8, 9], [2, 0, 9]]], "uint8")  # red 8 4 0 2, green 0 4 8 0


def test_grad_cam_of_a_2_by_2_photo_is_what_one_computes_by_hand():
    # Means pass a quarter of the logit's weights to each cell: class 1 gets (4 red - 8 green) / 4 = red - 2 green.
    heatmap = study.grad_cam(two_channel_network([[0, 4], [0, -8]]), PHOTO, "maps", 1)
    np.testing.assert_allclose(heatmap, [[8, 0], [0, 2]], atol=1e-5)


def test_grad_cam_explains_the_logit_where_the_softmax_is_saturated():
    network = two_channel_network([[0, 4], [0, -8]], bias=[0, 1000])
    assert network(PHOTO[None].astype("float32"))[0, 1] == 1
    np.testing.assert_allclose(study.grad_cam(network, PHOTO, "maps", 1), [[8, 0], [0, 2]], atol=1e-5)


def test_the_evidence_difference_of_two_classes_is_antisymmetric():
    network = two_channel_network([[4, 1], [-2, 3]])
    one, other, difference = study.compared_evidence(network, PHOTO, "maps", 0, 1)
    assert (difference > 0).any() and (difference < 0).any()
    np.testing.assert_array_equal(difference, one - other)
    np.testing.assert_array_equal(difference, -study.compared_evidence(network, PHOTO, "maps", 1, 0)[2])


def test_shifting_the_photo_shifts_the_heatmap():
    photo = keras.Input((64, 64, 3))
    maps = layers.Conv2D(1, 4, strides=4, kernel_initializer="ones", use_bias=False, name="maps")(photo)
    means = layers.GlobalAveragePooling2D()(maps)
    network = keras.Model(photo, layers.Dense(2, activation="softmax", kernel_initializer="ones")(means))
    spot = np.zeros((64, 64, 3), "uint8")
    spot[20:27, 12:30] = np.random.default_rng(0).integers(50, 256, (7, 18, 3))
    before = study.grad_cam(network, spot, "maps", 0)
    after = study.grad_cam(network, np.roll(spot, (8, 20), axis=(0, 1)), "maps", 0)
    assert before.max() > 0 and (before == 0).any()
    np.testing.assert_allclose(after, np.roll(before, (2, 5), axis=(0, 1)), rtol=1e-5)  # cells are 4 pixels wide


def test_the_cells_of_the_blocks_look_where_the_table_says():
    """At 267 pixels the cells fit exactly: what the middle one sees is as wide to the left as to the right."""
    network = study.build_network(2, 267, "none")
    for convolution in study.in_creation_order(network, layers.Conv2D):  # a plain mean, so that every pixel in sight
        convolution.set_weights([np.full_like(weight, 1 / weight[..., 0].size) for weight in convolution.get_weights()])
    description = network.to_json().replace("MaxPooling2D", "AveragePooling2D")  # … counts, also in the gradient
    averaging = keras.models.model_from_json(description)
    averaging.set_weights(network.get_weights())
    blocks = "mixed0", "mixed2", "mixed3", "mixed7", "mixed8", "mixed10"
    probe = keras.Model(averaging.input, [averaging.get_layer(name).output for name in blocks])
    photo = tf.Variable(tf.fill((1, 267, 267, 3), 200.0))
    with tf.GradientTape(persistent=True) as tape:
        answers = probe(photo)
        middles = [answer.shape[1] // 2 for answer in answers]
        cells = [tf.reduce_sum(answer[0, middle, middle]) for answer, middle in zip(answers, middles, strict=True)]
    for name, answer, middle, cell in zip(blocks, answers, middles, cells, strict=True):
        seen = tape.gradient(cell, photo)[0].numpy().sum((0, 2))
        first, step = study.CELLS[name]
        assert answer.shape[1] == 2 * middle + 1 == (266 - 2 * first) / step + 1, name
        assert abs(np.average(np.arange(267), weights=seen) - (first + step * middle)) < 0.01, name


@pytest.mark.parametrize(("cell", "pixel"), [((0, 0), 3), ((2, 2), 11)])
def test_a_marker_in_the_corner_and_in_the_centre_is_marked_to_the_pixel(cell, pixel):
    heatmap = np.zeros((4, 4))
    heatmap[cell] = 1
    enlarged = study.enlarge(heatmap, 19, 3, 4)
    assert enlarged[pixel, pixel] == 1
    # Half-way to the next cell, two pixels on, half of it is left; at the next cell nothing.
    np.testing.assert_allclose(enlarged[pixel, [pixel + 2, pixel + 4]], [0.5, 0], atol=1e-6)
    assert enlarged[0, 0] == (cell == (0, 0))  # beyond the outermost centre it stays the same
    cells, centre = study.enlarge(heatmap, 21, 3, 5, cells=True), 3 + 5 * cell[0]
    assert cells[centre - 2 : centre + 3, centre - 2 : centre + 3].all() and np.nansum(cells) == 25
    assert np.isnan(cells[0]).all() and not np.isnan(cells[1:, 1:]).any()  # no cell looks at the first pixels


def drawn(explained, **panel):
    """What show() draws, as pixels."""
    figure = Figure(figsize=(2, 2))
    study.show(figure.subplots(), explained, **panel)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file))


def test_a_heatmap_without_evidence_leaves_the_photo_bare_and_one_with_evidence_does_not():
    photo = draw_flower("rose", np.random.default_rng(0), 139)[0]
    explained = SimpleNamespace(photo=photo, pixels=photo)
    np.testing.assert_array_equal(drawn(explained, heatmap=np.zeros((3, 3))), drawn(explained))
    assert np.abs(drawn(explained, heatmap=np.ones((3, 3))).astype(int) - drawn(explained)).mean() > 10


def test_the_title_says_what_the_heatmap_is_worth_or_that_it_is_empty(monkeypatch):
    photo, heatmap = np.zeros((75, 75, 3), "uint8"), np.array([[0.0, 0.0], [0.0, 1.0]])
    explained = SimpleNamespace(pixels=photo, heatmap=heatmap, target=1, target_name="rose")
    masks = []

    def counted(network, photo, given):
        masks.extend(given)
        return np.array([[0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])

    monkeypatch.setattr(study, "deletion", counted)
    assert study.worth_of(None, explained) == "most marked fifth blurred: rose 0.90 → 0.40; centred fifth: → 0.70"
    marked, centred = masks
    assert marked.sum() == centred.sum() == 75 * 75 // 5
    assert marked[74, 74] and not marked[:37].any() and centred[37, 37] and not centred[0].any()
    explained.heatmap = np.zeros((2, 2))
    assert "no evidence for rose" in study.worth_of(None, explained)


def test_deleting_everything_leaves_the_blurred_photo_and_deleting_nothing_the_photo():
    keras.utils.set_random_seed(1)
    network = small_network()
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype="uint8")
    everything, nothing = np.ones((32, 32), bool), np.zeros((32, 32), bool)
    as_it_is, without_all, without_nothing = study.deletion(network, photo, [everything, nothing])
    blurred = cv2.GaussianBlur(photo.astype("float32"), (0, 0), 32 / 12)
    np.testing.assert_allclose(without_all, network(blurred[None])[0], atol=1e-5)
    np.testing.assert_allclose(without_nothing, as_it_is, atol=1e-6)
    assert np.abs(without_all - as_it_is).max() > 1e-3


def test_the_most_marked_fifth_holds_the_highest_values():
    heatmap = np.arange(100.0).reshape(10, 10)
    assert study.most_marked(heatmap, 0.2).nonzero()[0].tolist() == [8] * 10 + [9] * 10


def test_the_heatmap_of_a_trained_network_lies_on_the_flower(tmp_path):
    keras.utils.set_random_seed(0)
    write_flowers(tmp_path / "train", CLASSES, 100, size=64)
    photos = study.open_splits(tmp_path, ["train"], 64, 20, 0)["train"]
    network = small_network(64, channels=16)
    network.compile(keras.optimizers.Adam(3e-3), loss="categorical_crossentropy")
    network.fit(photos, epochs=12, verbose=0)
    hits, chance = [], []
    for label, name in enumerate(CLASSES):
        for k in range(20):
            photo, mask = draw_flower(name, np.random.default_rng([9, label, k]), 64)
            heatmap = study.enlarge(study.grad_cam(network, photo, "maps_3", label), 64, 7, 4)  # at pixels 7, 11, …
            hits.append(mask[np.unravel_index(heatmap.argmax(), mask.shape)])
            chance.append(mask.mean())
    assert np.mean(hits) > np.mean(chance) + 0.25


def test_tile_k_of_a_grid_holds_channel_k_and_the_last_row_is_filled_up():
    activation = np.zeros((5, 5, 19), "float32")
    for k in range(19):
        activation[k % 5, (k // 5) % 5, k] = 1 + k
    cells, _ = study.channel_cells(activation)
    size = cells.shape[1]
    sheet = study.tile(cells, columns=16)
    assert sheet.shape == (2 * (size + 4), 16 * (size + 4), 3)
    for k in range(19):
        row, column = 2 + (size + 4) * (k // 16), 2 + (size + 4) * (k % 16)
        brightness = sheet[row : row + size, column : column + size].sum(2)
        brightest = np.argwhere(brightness == brightness.max()).mean(0) / size * 5  # the middle of the bright square
        np.testing.assert_allclose(brightest, [k % 5 + 0.5, k // 5 % 5 + 0.5], atol=0.2)
    assert (sheet[size + 4 :, 3 * (size + 4) :] == study.BACKGROUND).all()


def test_a_dead_channel_is_marked_and_looks_unlike_one_that_fires_evenly():
    activation = np.stack([np.zeros((6, 6)), np.full((6, 6), 0.3)], axis=-1).astype("float32")
    cells, dead = study.channel_cells(activation)
    assert dead.tolist() == [True, False]
    assert np.ptp(cells[0].astype(int)) > 50  # crossed
    assert np.ptp(cells[1].reshape(-1, 3).astype(int), axis=0).max() == 0 and cells[1].max() > 200  # evenly bright


def test_a_grid_for_each_layer_whose_title_counts_the_dead_channels(inception, monkeypatch, tmp_path):
    network, _ = inception
    titles, first = {}, study.in_creation_order(network, layers.Conv2D)[0]
    monkeypatch.setattr(study, "save_sheet", lambda path, sheet, title: titles.update({path.name: title}))
    before = first.get_weights()
    first.set_weights([before[0] * (~np.isin(np.arange(32), [1, 3]))])
    photo = np.random.default_rng(0).integers(0, 256, (75, 75, 3), dtype="uint8")
    try:
        study.draw_grids(tmp_path, network, SimpleNamespace(photo=photo, pixels=photo, name="a.jpg"))
    finally:
        first.set_weights(before)
    assert set(titles) == {f"{kind}_{k}_grid.jpg" for kind in ("conv2d", "activation") for k in (1, 4, 9)}
    title = titles["conv2d_1_grid.jpg"]
    assert (
        "2 did not fire" in title
        and first.name in title
        and "37 × 37 cells × 32 channels" in title
        and "a.jpg" in title
    )
    assert "all channels fired" in titles["conv2d_4_grid.jpg"]


def test_one_hot_pixel_does_not_darken_the_rest_of_its_channel():
    channel = np.full((40, 40, 1), 1.0, "float32")
    calm = study.channel_cells(channel.copy())[0]
    channel[7, 7] = 1000
    hot = study.channel_cells(channel)[0]
    np.testing.assert_array_equal(hot[0, 20], calm[0, 20])


@pytest.mark.parametrize("channels", [192, 2048])
def test_cells_of_a_grid_never_shrink_below_24_pixels(channels):
    cells, _ = study.channel_cells(np.ones((3, 3, channels), "float32"))
    assert cells.shape[0] == channels and cells.shape[1] == cells.shape[2] >= 24


def test_a_sheet_is_saved_pixel_for_pixel_whatever_its_title(tmp_path):
    sheet = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype="uint8")
    with matplotlib.style.context(study.STYLE):
        title = "A title that is a good deal longer than the sheet is wide\nand names $\\no_such{$.jpg"
        study.save_sheet(tmp_path / "sheet.png", sheet, title)
    saved = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    rows, columns, _ = saved.shape
    places = [(y, x) for y in range(rows - 89) for x in range(columns - 129) if (saved[y, x] == sheet[0, 0]).all()]
    assert any((saved[y : y + 90, x : x + 130] == sheet).all() for y, x in places)


def test_the_kth_relu_follows_the_kth_convolution_after_a_second_network_was_built(inception):
    second = study.build_network(2, 75, "none")
    convolutions = study.in_creation_order(second, layers.Conv2D)
    relus = study.in_creation_order(second, layers.Activation)
    assert [layer.filters for layer in convolutions[:5]] == [32, 32, 64, 80, 192]  # Szegedy et al. (2015), table 1
    for convolution, relu in zip(convolutions, relus, strict=True):
        normalization = relu.input._keras_history.operation
        assert normalization.input._keras_history.operation is convolution


def test_a_rotated_photo_is_explained_upright_and_at_its_own_resolution(inception, tmp_path):
    network, _ = inception
    photo = np.zeros((120, 200, 3), "uint8")
    photo[:, :100] = (200, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(photo).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    explained = study.explain_photo(network, tmp_path / "turned.jpg", "turned.jpg", CLASSES)
    assert explained.photo.shape == (200, 120, 3)
    assert explained.photo[50, 60, 0] > 150 > explained.photo[150, 60, 0]
    assert explained.pixels[20, 37, 0] > 150 > explained.pixels[60, 37, 0]
    assert explained.verdict.startswith(f"predicted {explained.target_name}") and "true" not in explained.verdict
    study.draw_heatmaps(tmp_path, network, [explained])
    height, width = Image.open(tmp_path / "CAM_1.jpeg").size[::-1]
    assert width >= 3 * 120 and height >= 200


def test_a_mistake_is_explained_for_the_true_class_and_compared_with_the_predicted_one(inception, tmp_path):
    network, _ = inception
    Image.fromarray(np.full((80, 80, 3), 120, "uint8")).save(tmp_path / "grey.png")
    predicted = study.explain_photo(network, tmp_path / "grey.png", "grey.png", CLASSES).target
    true = (predicted + 1) % 3
    explained = study.explain_photo(network, tmp_path / "grey.png", "grey.png", CLASSES, true=true)
    assert (explained.target, explained.rival) == (true, predicted)
    assert f"predicted {CLASSES[predicted]}" in explained.verdict and f"true {CLASSES[true]}" in explained.verdict


def test_no_title_runs_into_the_panel_beside_it(inception, monkeypatch, tmp_path):
    network, _ = inception
    Image.fromarray(np.full((80, 80, 3), 120, "uint8")).save(tmp_path / "grey.png")
    names = ["dandelion", "sunflower", "tulip"]  # the longest come first
    probabilities = np.array([0.88, 0.03, 0.09])
    mistake = study.explain_photo(network, tmp_path / "grey.png", "grey.png", names, 1, probabilities)
    figures = []
    monkeypatch.setattr(study, "save_figure", lambda path, figure, dpi: figures.append(figure))
    study.draw_layers(tmp_path, network, mistake)
    study.draw_mistakes(tmp_path, network, [mistake])
    for figure in figures:
        figure.draw_without_rendering()
        for axes in figure.axes[:-1]:  # the last is the colour scale
            title = next(text for text in axes.findobj(Text) if text.get_text() == axes.get_title(loc="left"))
            assert title.get_window_extent().x1 <= axes.bbox.x1

"""What the pictures promise: that they show what is there, where it is, and how much of it."""

import cv2
import keras
import matplotlib
import numpy as np
import pytest
from conftest import CLASSES, small_network, write_flowers
from draw_flowers import draw_flower
from keras import layers
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


def test_cells_are_laid_where_they_look():
    photo = keras.Input((19, 19, 3))
    maps = layers.Conv2D(1, 3, strides=2, name="strided")(photo)  # cells look at pixels 1, 3, … 17
    maps = layers.Conv2D(1, 3, padding="same", name="padded")(maps)
    network = keras.Model(photo, layers.MaxPooling2D(3, 2, name="pooled")(maps))  # at pixels 3, 7, 11, 15
    assert study.cell_geometry(network, "padded") == (1, 2)
    assert study.cell_geometry(network, "pooled") == (3, 4)


def test_mixed10_looks_at_pixels_37_to_261_of_299(inception):
    assert study.cell_geometry(study.build_network(2, 299, "none"), "mixed10") == (37, 32)
    assert study.cell_geometry(inception[0], "mixed10") == (37, 32)


@pytest.mark.parametrize(("cell", "pixel"), [((0, 0), 3), ((2, 2), 11)])
def test_a_marker_in_the_corner_and_in_the_centre_is_marked_to_the_pixel(cell, pixel):
    heatmap = np.zeros((4, 4))
    heatmap[cell] = 1
    enlarged = study.enlarge(heatmap, (19, 19), (3, 4), 19)
    assert enlarged[pixel, pixel] == 1
    # Half-way to the next cell, two pixels on, half of it is left; at the next cell nothing.
    np.testing.assert_allclose(enlarged[pixel, [pixel + 2, pixel + 4]], [0.5, 0])
    assert enlarged[0, 0] == (cell == (0, 0))  # beyond the outermost centre it stays the same
    cells = study.enlarge(heatmap, (19, 19), (3, 4), 19, interpolated=False)
    assert set(cells.ravel()) == {0, 1} and cells[pixel - 1 : pixel + 2, pixel - 1 : pixel + 2].all()


def test_a_heatmap_without_evidence_stays_empty_and_leaves_the_photo_bare():
    nothing, photo = np.zeros((4, 6)), np.full((4, 6, 3), 90, "uint8")
    zero = (255 * np.array(matplotlib.colormaps["turbo"](0.0)[:3])).astype("uint8")
    assert (study.colour(nothing, 0.0) == zero).all()
    np.testing.assert_array_equal(study.overlay(photo, nothing, 0.0), photo)


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


def test_the_most_marked_fifth_and_the_centred_fifth_are_fifths():
    heatmap = np.arange(100.0).reshape(10, 10)
    assert study.most_marked(heatmap, 0.2).nonzero()[0].tolist() == [8] * 10 + [9] * 10
    blob = study.centred_blob(50, 0.2)
    assert blob.sum() == 500 and blob[25, 25] and not blob[0, 0]


def test_the_heatmap_of_a_trained_network_lies_on_the_flower(tmp_path):
    keras.utils.set_random_seed(0)
    write_flowers(tmp_path / "train", CLASSES, 100, size=64)
    photos = study.open_splits(tmp_path, ["train"], 64, 20, 0)["train"]
    network = small_network(64, channels=16)
    network.compile(keras.optimizers.Adam(3e-3), loss="categorical_crossentropy")
    network.fit(photos, epochs=12, verbose=0)
    hits, chance, geometry = [], [], study.cell_geometry(network, "maps_3")
    for label, name in enumerate(CLASSES):
        for k in range(20):
            photo, mask = draw_flower(name, np.random.default_rng([9, label, k]), 64)
            heatmap = study.enlarge(study.grad_cam(network, photo, "maps_3", label), (64, 64), geometry, 64)
            hits.append(mask[np.unravel_index(heatmap.argmax(), mask.shape)])
            chance.append(mask.mean())
    assert np.mean(hits) > np.mean(chance) + 0.25


def test_tile_k_of_a_grid_holds_channel_k_and_the_last_row_is_filled_up():
    activation = np.zeros((5, 5, 19), "float32")
    for k in range(19):
        activation[k % 5, (k // 5) % 5, k] = 1 + k
    cells, _ = study.channel_cells(activation, 25)
    sheet = study.tile(cells, columns=16, gap=2)
    assert sheet.shape == (2 * 27 + 2, 16 * 27 + 2, 3)
    for k in range(19):
        row, column = 2 + 27 * (k // 16), 2 + 27 * (k % 16)
        brightness = sheet[row : row + 25, column : column + 25].sum(2)
        assert np.unravel_index(brightness.argmax(), (25, 25)) == (5 * (k % 5), 5 * (k // 5 % 5))
    assert (sheet[29:, 2 + 27 * 3 :] == study.BACKGROUND).all()


def test_a_dead_channel_is_marked_and_looks_unlike_one_that_fires_evenly():
    activation = np.stack([np.zeros((6, 6)), np.full((6, 6), 0.3)], axis=-1).astype("float32")
    cells, dead = study.channel_cells(activation, 24)
    assert dead.tolist() == [True, False]
    assert np.ptp(cells[0].astype(int)) > 50  # crossed
    assert np.ptp(cells[1].reshape(-1, 3).astype(int), axis=0).max() == 0 and cells[1].max() > 200  # evenly bright


def test_the_title_of_a_grid_counts_the_dead_channels(monkeypatch):
    titles = []
    monkeypatch.setattr(study, "with_title", lambda picture, title: titles.append(title) or picture)
    activation = np.random.default_rng(0).random((6, 6, 5)).astype("float32")
    activation[..., [1, 3]] = 0
    study.activation_grid(activation, "activation_7", "a.jpg")
    assert "2 did not fire" in titles[0] and "activation_7" in titles[0] and "6 × 6" in titles[0]


def test_one_hot_pixel_does_not_darken_the_rest_of_its_channel():
    channel = np.full((40, 40, 1), 1.0, "float32")
    calm = study.channel_cells(channel.copy(), 40)[0]
    channel[7, 7] = 1000
    hot = study.channel_cells(channel, 40)[0]
    np.testing.assert_array_equal(hot[0, 20], calm[0, 20])


@pytest.mark.parametrize("channels", [192, 2048])
def test_cells_of_a_grid_never_shrink_below_24_pixels(channels):
    grid = study.activation_grid(np.ones((3, 3, channels), "float32"), "deep", "a.jpg")
    assert grid.shape[1] >= 16 * 24 and grid.shape[0] >= channels / 16 * 24


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
    explained = study.explain_photo(tmp_path / "turned.jpg", "turned.jpg", 75, np.array([0.2, 0.5, 0.3]), CLASSES)
    assert (explained.target_name, explained.rival_name) == ("rose", "tulip")
    assert explained.photo.shape == (200, 120, 3)
    assert explained.photo[50, 60, 0] > 150 > explained.photo[150, 60, 0]
    assert explained.pixels[20, 37, 0] > 150 > explained.pixels[60, 37, 0]
    heatmap = study.grad_cam(network, explained.pixels, "mixed10", explained.target)
    panels = study.heatmap_panels(network, explained, heatmap)
    assert panels.shape[0] > 200 and panels.shape[1] >= 3 * 120

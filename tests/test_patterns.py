"""What the patterns of filters promise."""

import keras
import numpy as np
import pytest
from keras import layers

import model_training_and_visualization as study


def one_convolution(kernel, relu_bias=0.0, size=24):
    """A classifier of one convolution (height, width, 3, filters), normalization and ReLU."""
    photo = keras.Input((size, size, 3))
    convolution = layers.Conv2D(kernel.shape[-1], kernel.shape[:2], use_bias=False, name="conv2d")
    normalization = layers.BatchNormalization(scale=False)
    scaled = layers.Rescaling(1 / 127.5, offset=-1)(photo)
    maps = layers.ReLU(name="activation")(normalization(convolution(scaled)))
    head = layers.Dense(2, activation="softmax")
    model = keras.Model(photo, head(layers.GlobalAveragePooling2D()(maps)))
    convolution.set_weights([kernel.astype("float32")])
    normalization.beta.assign(np.broadcast_to(np.float32(relu_bias), kernel.shape[-1]))
    return model


def patterns(model, filters, seed=0):
    return study.filter_patterns(model, "conv2d", filters, seed, size=32)


def colour_filters():
    """Three 1 x 1 filters: each fires on one of red, green and blue, the other two hold it back."""
    return (2 * np.eye(3) - 1).reshape(1, 1, 3, 3)


def nothing_but_noise(seed=0, count=48):
    """Pictures about their mean colour after a single step from noise: filters of weights 0 add
    nothing to it."""
    model = one_convolution(np.zeros((5, 5, 3, count)), size=24)
    pictures, _ = study.filter_patterns(model, "conv2d", range(count), seed, size=32, steps=1)
    # The bend towards the bounds, undone: 127.5 + 119.5 tanh(image / 119.5).
    images = np.arctanh((pictures.astype(float) - 127.5) / 120) * 119.5
    return images - images.mean((1, 2), keepdims=True)


def test_noise_has_the_colours_of_photos_with_three_times_as_strong_hues():
    # Published with Lucid: the square root of the correlation of red, green and blue in ImageNet.
    # A row for each colour; columns: brightness, blue to yellow, green to magenta.
    root = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    root = root * [1, 3, 3]
    expected = root @ root.T
    found = np.cov(nothing_but_noise().reshape(-1, 3).T)
    np.testing.assert_allclose(found / np.trace(found), expected / np.trace(expected), atol=0.03)


def test_waves_shorter_than_the_shortest_are_absent_and_long_ones_are_stronger():
    images = nothing_but_noise()
    power = (np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2).mean((0, 3))
    cycles = np.fft.fftfreq(32, 1 / 32)
    frequency = np.hypot(cycles[:, None], cycles)
    short = frequency > 32 / 3.5  # in all directions alike; what is left is rounding and the bend
    assert power[short].max() < 0.02 * power[~short & (frequency > 0)].min()
    # The filter sees 5 pixels: longer waves are as strong as those of 5. Shorter ones are weaker
    # with the root of their length, in power with their length.
    long, near_end = (frequency > 0) & (frequency < 32 / 5), (frequency > 8.4) & (frequency < 9.1)
    expected = (32 / frequency[near_end]).mean() / 5
    assert power[near_end].mean() / power[long].mean() == pytest.approx(expected, rel=0.12)
    lower, upper = power[long & (frequency < 3)].mean(), power[long & (frequency > 5)].mean()
    assert lower == pytest.approx(upper, rel=0.15)


def test_a_pattern_can_be_repeated_without_a_seam():
    model = one_convolution(np.random.default_rng(0).normal(size=(5, 5, 3, 4)))
    pictures, _ = patterns(model, range(4))
    pictures = pictures.astype(float)
    for axis in (1, 2):
        steps = np.abs(np.diff(pictures, axis=axis, append=pictures.take([0], axis))).mean((0, 3))
        steps = steps.mean(2 - axis)  # between each row or column and the next, the last and first
        assert steps[-1] < 1.5 * steps.mean()


def test_an_edge_detector_draws_its_own_edges():
    upright = np.repeat(np.array([[-1, -1, 1, 1]] * 4)[..., np.newaxis], 3, axis=2)
    kernel = np.stack([upright, upright.transpose(1, 0, 2)], axis=-1).astype("float32")
    # Over a whole picture dark-to-bright edges cancel bright-to-dark ones unless the convolution
    # rectifies them itself.
    photo = keras.Input((24, 24, 3))
    scaled = layers.Rescaling(1 / 127.5, offset=-1)(photo)
    detector = layers.Conv2D(2, 4, use_bias=False, activation="relu", name="conv2d")
    pooled = layers.GlobalAveragePooling2D()(detector(scaled))
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(pooled))
    detector.set_weights([kernel])
    pictures, fires = patterns(model, [0, 1])
    assert fires.all()
    # The kernel is most active on 6 to 10 cycles in 32 pixels, and in one direction only.
    for picture, own_axis in zip(pictures, (1, 0), strict=True):
        brightness = picture.astype(float).mean(2)
        spectrum = np.abs(np.fft.fft2(brightness - brightness.mean()))
        peak = np.unravel_index(spectrum.argmax(), spectrum.shape)
        cycles = np.abs(np.fft.fftfreq(32, 1 / 32))[list(peak)]
        assert 4 <= cycles[own_axis] <= 9 and cycles[1 - own_axis] <= 1


def test_each_filter_climbs_on_its_own_picture_more_than_on_any_other():
    pictures, _ = patterns(one_convolution(colour_filters()), [2, 0, 1])
    # At 1 x 1 the mean activation follows from the picture's mean colour alone.
    mean_colour = pictures.astype(float).mean((1, 2)) / 127.5 - 1
    means = mean_colour @ colour_filters()[0, 0]
    np.testing.assert_array_equal(means.argmax(1), [2, 0, 1])
    assert (means[[0, 1, 2], [2, 0, 1]] > 0.1).all()


def test_no_pixel_of_a_pattern_is_clipped_and_its_contrast_is_full():
    model = one_convolution(np.random.default_rng(0).normal(size=(5, 5, 3, 8)))
    pictures, _ = patterns(model, range(8))
    assert pictures.dtype == np.uint8 and pictures.min() >= 8 and pictures.max() <= 247
    # 60 grey levels, of which the bounds take about a third where the mean colour is strong too.
    deviations = (pictures - pictures.mean((1, 2), keepdims=True)).std((1, 2, 3))
    assert (deviations > 34).all() and (deviations < 60).all()


def test_a_filter_that_never_fires_is_told_from_those_that_do():
    # Inputs lie in -1 to 1, so that no picture lifts a filter of three weights of 1 by more than 3.
    model = one_convolution(colour_filters(), relu_bias=[0.0, -100.0, 0.0])
    assert patterns(model, [0, 1, 2])[1].tolist() == [True, False, True]


def test_only_a_silent_filter_is_started_again():
    model, reached = one_convolution(colour_filters(), relu_bias=[0.0, -100.0, 0.0]), []
    study.filter_patterns(model, "conv2d", [0, 1, 2], size=32, on_progress=reached.append)
    assert reached == [3, 2, 2]  # all three, then the second alone, from two stronger noises


def test_a_filter_whose_relu_is_dead_on_the_grey_start_is_brought_to_fire():
    assert patterns(one_convolution(colour_filters(), relu_bias=-1.0), [0, 1, 2])[1].all()


def test_the_same_seed_gives_the_same_pictures_whatever_is_drawn_beside_them():
    model = one_convolution(np.random.default_rng(0).normal(size=(3, 3, 3, 4)))
    first, again, other = (patterns(model, range(4), seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    alone = patterns(model, [2], 5)[0]  # rounding may differ with the size of the batch
    assert np.abs(alone[0].astype(int) - first[2]).mean() < 1


def test_a_layer_that_is_no_convolution_is_named():
    with pytest.raises(study.Stop, match=r"no convolution activation.*conv2d"):
        study.filter_patterns(one_convolution(colour_filters()), "activation", [0])


def test_progress_is_told_up_to_the_last_filter():
    told = []
    model = one_convolution(colour_filters())
    study.filter_patterns(model, "conv2d", [0, 1, 2], size=32, steps=1, on_progress=told.append)
    assert told[0] == 3 and max(told) == 3


def test_the_size_of_a_pattern_is_the_one_asked_for():
    pictures, fires = study.filter_patterns(
        one_convolution(colour_filters()), "conv2d", [2], size=48, steps=1
    )
    assert pictures.shape == (1, 48, 48, 3) and fires.shape == (1,)

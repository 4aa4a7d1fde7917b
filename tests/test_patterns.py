"""What the filter patterns promise."""

import keras
import numpy as np
import pytest

import model_training_and_visualization as study


@pytest.fixture(autouse=True)
def small_canvas(monkeypatch):
    monkeypatch.setattr(study, "PATTERN_SIZE", 32)


GENTLE = {"longest_wavelength": 32, "shift": 32, "damping": 1.0}


def patterns(model, filters, seed=0):
    return study.filter_patterns(model, "conv2d", "activation", filters, **GENTLE, seed=seed)


def one_convolution(kernel, relu_bias=0.0):
    """A network of one convolution (kernel: height, width, 3, filters), batch normalization and ReLU."""
    image = keras.Input((24, 24, 3))
    convolution = keras.layers.Conv2D(kernel.shape[-1], kernel.shape[:2], use_bias=False, name="conv2d")
    normalization = keras.layers.BatchNormalization(scale=False, name="batch_normalization")
    outputs = keras.layers.ReLU(name="activation")(
        normalization(convolution(keras.layers.Rescaling(1 / 127.5, offset=-1)(image)))
    )
    model = keras.Model(image, outputs)
    convolution.set_weights([kernel.astype("float32")])
    normalization.beta.assign(np.broadcast_to(np.float32(relu_bias), kernel.shape[-1]))
    return model


def colour_filters():
    """Three 1 x 1 filters: each fires on one of red, green and blue, and is held back by the other two."""
    return (2 * np.eye(3) - 1).reshape(1, 1, 3, 3)


def test_fourier_image_is_the_sum_of_its_waves_bounded_to_0_255(monkeypatch):
    monkeypatch.setattr(study, "COLOURS", np.eye(3, dtype="float32"))
    waves, scale = study.fourier_basis(32, 32)
    coefficients = np.zeros((1, 3, *scale.shape), "float32")
    coefficients[0, 0, 0, 2] = 3.0  # red, no cycle down, two cycles across
    image = study.fourier_to_image(coefficients, waves, scale).numpy()
    angle = 2 * np.pi * 2 * np.arange(32) / 32
    row = 255 / (1 + np.exp(-3.0 / 2 * (np.cos(angle) + np.sin(angle))))  # 1/f: two cycles count half
    np.testing.assert_allclose(image[0, :, :, 0], np.tile(row, (32, 1)), atol=1e-3)
    np.testing.assert_allclose(image[0, :, :, 1:], 127.5)

    huge = np.random.default_rng(0).normal(scale=100, size=(2, 3, *scale.shape)).astype("float32")
    wild = study.fourier_to_image(huge, waves, scale).numpy()
    assert wild.dtype == np.float32 and wild.shape == (2, 32, 32, 3)
    assert wild.min() >= 0 and wild.max() <= 255


def test_blank_coefficients_are_a_grey_image():
    waves, scale = study.fourier_basis(32, 16)
    np.testing.assert_allclose(study.fourier_to_image(np.zeros((1, 3, *scale.shape), "float32"), waves, scale), 127.5)


def test_an_edge_detector_draws_its_own_edges():
    upright = np.repeat(np.array([[-1, -1, 1, 1]] * 4)[..., np.newaxis], 3, axis=2)
    kernel = np.stack([upright, upright.transpose(1, 0, 2)], axis=-1)
    # Over a whole picture dark-to-bright edges cancel bright-to-dark ones unless the judged layer has rectified them.
    image = keras.Input((24, 24, 3))
    detector = keras.layers.Conv2D(2, 4, use_bias=False, activation="relu", name="conv2d")
    model = keras.Model(image, keras.layers.ReLU(name="activation")(detector(image / 127.5 - 1)))
    detector.set_weights([kernel.astype("float32")])
    pictures, fires = patterns(model, [0, 1])
    assert fires.all()
    # -1 -1 1 1 answers most to 6 cycles of brightness in 32 pixels, the 1/f scale leans to fewer; no other direction.
    for picture, own_axis in zip(pictures, (1, 0), strict=True):
        brightness = picture.astype(float).mean(2)
        spectrum = np.abs(np.fft.fft2(brightness - brightness.mean()))
        cycles = np.abs(np.fft.fftfreq(32, 1 / 32))[list(np.unravel_index(spectrum.argmax(), spectrum.shape))]
        assert 3 <= cycles[own_axis] <= 8 and cycles[1 - own_axis] <= 1


def test_each_filter_climbs_on_its_own_picture_more_than_on_any_other():
    model = one_convolution(colour_filters())
    pictures, _ = patterns(model, [2, 0, 1])
    # At 1 x 1 the response to a picture follows from its mean colour alone.
    mean_colour = pictures.astype(float).mean((1, 2)) / 127.5 - 1
    responses = mean_colour @ colour_filters()[0, 0]
    np.testing.assert_array_equal(responses.argmax(1), [2, 0, 1])
    assert (responses[[0, 1, 2], [2, 0, 1]] > 0.5).all()


def test_a_dead_filter_is_told_from_one_that_fires_after_all_starts(monkeypatch):
    starts = []
    monkeypatch.setattr(np, "rint", lambda array, rint=np.rint: starts.append(len(array)) or rint(array))
    # Inputs lie in -1 to 1, so that no picture lifts a filter of three weights of size 1 by more than 3.
    model = one_convolution(colour_filters(), relu_bias=[0.0, -100.0, 0.0])
    _, fires = patterns(model, [0, 1, 2])
    assert fires.tolist() == [True, False, True]
    assert starts == [3] + [1] * (study.PATTERN_STARTS - 1)


def test_a_filter_whose_relu_is_dead_on_the_blank_image_is_brought_to_fire():
    model = one_convolution(colour_filters(), relu_bias=-1.0)
    assert patterns(model, [0, 1, 2])[1].all()


def test_a_sheet_is_traced_once_however_many_filters_and_pieces(monkeypatch):
    functions = []
    build = study.ascent_function
    monkeypatch.setattr(study, "ascent_function", lambda *a: functions.append(build(*a)) or functions[-1])
    monkeypatch.setattr(study, "FILTERS_AT_ONCE", 2)
    patterns(one_convolution(colour_filters(), [0, -100, 0]), [0, 1, 2])
    assert [function.experimental_get_tracing_count() for function in functions] == [1]


def test_the_same_seed_gives_the_same_pictures_and_the_model_is_left_as_it_was():
    model = one_convolution(np.random.default_rng(0).normal(size=(3, 3, 3, 4)))
    photo = np.random.default_rng(1).uniform(0, 255, (1, 24, 24, 3))
    before = model.predict(photo, verbose=0)
    first, again, other = (patterns(model, range(4), seed=s)[0] for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(model.predict(photo, verbose=0), before)
    clone = keras.models.Model.from_config(model.get_config())
    assert clone.input_shape == (None, 24, 24, 3) and len(clone.layers) == len(model.layers)


def test_tile_k_of_the_sheet_holds_filter_k_in_a_frame_of_its_own():
    pictures = np.stack([np.full((20, 20, 3), 10 * k, "uint8") for k in range(10)])
    frames = np.stack([np.full((1, 1, 3), 100 + k, "uint8") for k in range(10)])
    sheet = study.tile(pictures, columns=8, frames=frames)
    assert sheet.shape == (2 * 24, 8 * 24, 3)
    for k in range(10):
        y, x = 24 * (k // 8), 24 * (k % 8)
        assert (sheet[y + 2 : y + 22, x + 2 : x + 22] == 10 * k).all()
        assert (sheet[[y, y + 1, y + 22, y + 23], x : x + 24] == 100 + k).all()


def test_a_sheet_frames_and_counts_the_dead_filters(monkeypatch, tmp_path):
    sheets = []
    monkeypatch.setattr(study, "save_sheet", lambda *sheet: sheets.append(sheet))
    photo = keras.Input((24, 24, 3))
    relu = keras.layers.Activation("relu")
    network = keras.Model(photo, relu(keras.layers.Conv2D(3, 1, name="conv2d")(photo)))
    network.get_layer("conv2d").set_weights([colour_filters().astype("float32"), np.array([0, -1e6, 0], "float32")])
    monkeypatch.setattr(study, "PATTERN_CLIMBS", {1: GENTLE})
    shown = study.draw_patterns(tmp_path, network, seed=0)
    ((path, sheet, title),) = sheets
    assert path == tmp_path / "conv2d_1_filters.jpg" and shown == {path.name: title}
    assert "conv2d" in title and "1 never fired" in title
    red, green, _ = sheet[0, [0, 36, 72]].astype(int).T  # the first pixel of the three cells
    assert (red > green + 50).tolist() == [False, True, False]

"""What the filter patterns promise, and the photos that fire a filter beside them."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

import model_training_and_visualization as study


@pytest.fixture(autouse=True)
def small_canvas(monkeypatch):
    monkeypatch.setattr(study, "PATTERN_SIZE", 32)


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
    return study.filter_patterns(model, "conv2d", filters, seed)


def colour_filters():
    """Three 1 x 1 filters: each fires on one of red, green and blue, the other two hold it back."""
    return (2 * np.eye(3) - 1).reshape(1, 1, 3, 3)


def test_an_image_is_the_sum_of_its_waves_and_stays_within_8_to_247(monkeypatch):
    monkeypatch.setattr(study, "COLOURS", np.eye(3, dtype="float32"))
    waves, scale = study.wave_basis(32)
    coefficients = np.zeros((1, 3, *scale.shape), "float32")
    coefficients[0, 0, 0, 2] = 3.0  # red, no cycle down, two cycles across
    image = study.waves_to_image(coefficients, waves, scale).numpy()
    angle = 2 * np.pi * 2 * np.arange(32) / 32
    # A wave of 16 pixels, where the filter sees 32: scaled by the root of a half.
    row = 3.0 * np.sqrt(0.5) * (np.cos(angle) + np.sin(angle))
    np.testing.assert_allclose(image[0, :, :, 0], np.tile(row, (32, 1)), atol=1e-5)
    np.testing.assert_allclose(image[0, :, :, 1:], 0, atol=1e-6)
    wild = study.bounded(1000 * image).numpy()
    assert wild.min() >= 8 and wild.max() <= 247
    np.testing.assert_allclose(study.bounded(np.zeros(3, "float32")), 127.5)


def test_the_strength_of_waves_is_the_root_mean_square_of_their_image():
    waves, scale = study.wave_basis(32)
    coefficients = np.random.default_rng(0).normal(size=(2, 3, *scale.shape)).astype("float32")
    coefficients[1] *= 7
    images = study.waves_to_image(coefficients, waves, scale).numpy()
    expected = np.sqrt((images**2).mean((1, 2, 3)))
    np.testing.assert_allclose(
        np.ravel(study.wave_strength(coefficients, scale)), expected, rtol=1e-4
    )


def test_waves_shorter_than_the_shortest_are_absent_in_every_direction():
    waves, scale = study.wave_basis(32)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 3, *scale.shape)).astype("float32")
    spectrum = np.abs(np.fft.fft2(study.waves_to_image(noise, waves, scale)[0, :, :, 0]))
    cycles = np.fft.fftfreq(32, 1 / 32)
    frequency = np.hypot(cycles[:, None], cycles)
    short = frequency > 32 / study.SHORTEST_WAVELENGTH
    assert spectrum[short].max() < 1e-3 * spectrum.max() and spectrum[~short].min() > 0


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


def test_a_filter_whose_relu_is_dead_on_the_grey_start_is_brought_to_fire():
    assert patterns(one_convolution(colour_filters(), relu_bias=-1.0), [0, 1, 2])[1].all()


def test_a_step_is_traced_once_however_many_filters_and_pieces(monkeypatch):
    steps, build = [], study.ascent_step
    monkeypatch.setattr(study, "ascent_step", lambda *a: steps.append(build(*a)) or steps[-1])
    monkeypatch.setattr(study, "FILTERS_AT_ONCE", 2)
    patterns(one_convolution(colour_filters(), [0, -100, 0]), [0, 1, 2])
    assert [step.experimental_get_tracing_count() for step in steps] == [1]


def test_the_same_seed_gives_the_same_pictures_and_the_model_is_left_as_it_was():
    model = one_convolution(np.random.default_rng(0).normal(size=(3, 3, 3, 4)))
    photo = np.random.default_rng(1).uniform(0, 255, (1, 24, 24, 3))
    before = model.predict(photo, verbose=0)
    first, again, other = (patterns(model, range(4), seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    alone = patterns(model, [2], 5)[0]  # rounding may differ with the size of the batch
    assert np.abs(alone[0].astype(int) - first[2]).mean() < 1
    np.testing.assert_array_equal(model.predict(photo, verbose=0), before)
    clone = keras.Model.from_config(model.get_config())
    assert clone.input_shape == (None, 24, 24, 3) and len(clone.layers) == len(model.layers)


def test_a_layer_that_is_no_convolution_is_named():
    with pytest.raises(study.Stop, match=r"no convolution activation.*conv2d"):
        study.filter_patterns(one_convolution(colour_filters()), "activation", [0])


def test_tile_k_of_the_sheet_holds_filter_k_in_a_frame_of_its_own():
    pictures = np.stack([np.full((20, 20, 3), 10 * k, "uint8") for k in range(10)])
    frames = np.stack([np.full((1, 1, 3), 100 + k, "uint8") for k in range(10)])
    sheet = study.tile(pictures, columns=8, frames=frames)
    assert sheet.shape == (2 * 24, 8 * 24, 3)
    for k in range(10):
        y, x = 24 * (k // 8), 24 * (k % 8)
        assert (sheet[y + 2 : y + 22, x + 2 : x + 22] == 10 * k).all()
        assert (sheet[[y, y + 1, y + 22, y + 23], x : x + 24] == 100 + k).all()


def test_a_sheet_frames_and_counts_the_silent_filters_and_progress_is_told(monkeypatch, tmp_path):
    sheets, told = [], []
    monkeypatch.setattr(study, "save_sheet", lambda *sheet, **_: sheets.append(sheet))
    progress = SimpleNamespace(part=lambda what, share: told.append((what, share)))
    model = one_convolution(colour_filters(), [0, -1e6, 0])
    kept = {}
    drawn = list(study.draw_patterns(tmp_path, model, 0, progress, kept))
    assert kept["conv2d"].shape == (3, 32, 32, 3)
    ((path, sheet, title),) = sheets
    assert path == tmp_path / "conv2d_1_filters.jpg"
    assert [(it.file, it.caption) for it in drawn] == [(path.name, title)]
    assert "convolution 1 of 1 (layer conv2d)" in title and "1 never fired" in title
    assert told[0] == ("patterns of convolution 1, 3/3", 1.0)
    red, green, _ = sheet[0, [0, 36, 72]].astype(int).T  # the first pixel of the three tiles
    assert (red > green + 50).tolist() == [False, True, False]


# ---- Photos that fire a filter -------------------------------------------------------------------


def mark_detector(size=32):
    """Filter 0 sees only a white 4 x 4 square on black, filter 1 only a red one; strides of 2."""
    white = np.full((4, 4, 3), 1 / 48)
    red = np.zeros((4, 4, 3))
    red[..., 0], red[..., 1:] = 1 / 16, -1 / 16
    kernel = np.stack([white, red], axis=-1).astype("float32")
    photo = keras.Input((size, size, 3))
    convolution = layers.Conv2D(2, 4, strides=2, use_bias=False, name="conv2d")
    maps = layers.ReLU(name="activation")(convolution(layers.Rescaling(1 / 255)(photo)))
    pooled = layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(pooled))
    convolution.set_weights([kernel])
    return model


@pytest.fixture
def marked_photos(tmp_path):
    """Seven black photos with a mark of 4 pixels: photo k's at (2k, 4), white of 20 (k + 1) grey
    levels in the even ones, red in the odd ones."""
    paths = []
    for k in range(7):
        photo = np.zeros((32, 32, 3), "uint8")
        photo[2 * k : 2 * k + 4, 4:8, : 3 if k % 2 == 0 else 1] = 20 * (k + 1)
        paths.append(tmp_path / f"{k}.png")
        Image.fromarray(photo).save(paths[-1])
    return paths


def test_the_peaks_are_where_the_marks_are_and_as_high(marked_photos):
    peaks = study.filter_peaks(mark_detector(), marked_photos, ("activation",))["activation"]
    for k in range(7):
        expected = 20 * (k + 1) / 255
        np.testing.assert_allclose(peaks.values[k, k % 2], expected, rtol=1e-5)
        assert peaks.positions[k, k % 2].tolist() == [k, 2]  # strides of 2


def test_the_strongest_photo_comes_first_and_none_twice(marked_photos):
    peaks = study.filter_peaks(mark_detector(), marked_photos, ("activation",))["activation"]
    assert study.top_photos(peaks, 1) == [5, 3, 1]  # the white ones do not fire it
    white = study.top_photos(peaks, 0)
    assert white[:2] == [6, 4] and len(set(white)) == len(white) == study.EXAMPLE_PATCHES


def test_a_patch_holds_what_its_position_sees_clipped_to_the_photo(marked_photos):
    model = mark_detector()
    field = study.receptive_fields(model)["activation"]
    assert (field.centre, field.stride, field.size) == ((1.5, 1.5), (2, 2), (4, 4))
    photo = np.asarray(Image.open(marked_photos[6]))
    patch = study.cut_patch(photo, (32, 32), field, (6, 2), side=32)
    assert (patch == 140).all()  # the whole mark and nothing else
    # One position on, half of the mark is left, on the left.
    patch = study.cut_patch(photo, (32, 32), field, (6, 3), side=32)
    assert (patch[:, :12] == 140).all() and (patch[:, 20:] == 0).all()
    # A photo twice as wide as high: the model sees it squeezed, the patch shows it as it is.
    wide = np.zeros((32, 64, 3), "uint8")
    wide[12:16, 8:16] = 140
    patch = study.cut_patch(wide, (32, 32), field, (6, 2), side=32)
    assert (patch[8:24] == 140).all() and (patch[[0, 7, 24, 31]] == study.BACKGROUND).all()
    # A field that reaches over the corner by 2 pixels each way shows what is left, in full size.
    reaching = study.ReceptiveField((1.5, 1.5), (2, 2), (8, 8))
    photo = np.zeros((32, 32, 3), "uint8")
    photo[:6, :6] = 200
    assert (study.cut_patch(photo, (32, 32), reaching, (0, 0), side=60) == 200).all()


def test_the_most_selective_filters_are_those_whose_best_photos_stand_out():
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 1.1, (60, 4))
    values[:5, 2] = 9  # five photos fire it, the others hardly
    values[:, 3] = 0  # no photo does
    peaks = study.Peaks(values, np.zeros((60, 4, 2), int))
    chosen = study.most_selective(peaks, 3)
    assert chosen[0] == 2 and 3 not in chosen


def test_examples_are_drawn_with_numbers_and_a_caption_that_says_of_what(
    marked_photos, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(study, "save_examples", lambda *arguments: drawn.append(arguments))
    sheet = np.stack([np.full((32, 32, 3), 10 * k, "uint8") for k in range(2)])
    model = mark_detector()
    (picture,) = study.draw_examples(tmp_path, model, marked_photos, 0, {"conv2d": sheet})
    ((path, filters, patterns, rows, caption),) = drawn
    assert path.name == picture.file == "conv2d_1_examples.jpg" and picture.caption == caption
    assert "convolution 1 of 1 (layer conv2d)" in caption and "7 test photos" in caption
    for number, row in zip(filters, rows, strict=True):
        values = [value for _, value in row]
        assert values == sorted(values, reverse=True) and len(values) == (5, 3)[number]
    np.testing.assert_allclose(rows[filters.index(1)][0][1], 120 / 255, rtol=1e-5)
    assert patterns[:, 0, 0, 0].tolist() == [10 * number for number in filters]

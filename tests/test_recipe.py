"""How a model is made: what its first layer sees, and the weights that it starts from."""

import os

import h5py
import keras
import numpy as np
import pytest
from conftest import small_inception
from keras import layers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

import model_training_and_visualization as study


def of_type(model, layer_type):
    return [layer for layer in model.layers if isinstance(layer, layer_type)]


# ---- The model ----


def test_the_first_convolution_receives_pixels_from_minus_one_to_one_as_rgb(inception):
    """Its activations are worked out by hand from the photo and the kernel."""
    model, _ = inception
    first = of_type(model, layers.Conv2D)[0]
    (kernel,) = first.get_weights()  # (3, 3, 3, 32): rows, columns, red to blue, channels
    photos = np.zeros((4, 75, 75, 3), "float32")
    photos[1] = 255
    photos[2, ..., 0] = 255
    photos[3] = np.random.default_rng(0).uniform(0, 255, (75, 75, 3))
    black, white, red, noise = keras.Model(model.input, first.output)(photos).numpy()
    of_channel = kernel.sum((0, 1, 2))
    np.testing.assert_allclose(black[5, 7], -of_channel, atol=1e-5)
    np.testing.assert_allclose(white[5, 7], of_channel, atol=1e-5)
    np.testing.assert_allclose(red[5, 7], 2 * kernel[:, :, 0].sum((0, 1)) - of_channel, atol=1e-5)
    patch = photos[3, 10:13, 14:17] / 127.5 - 1  # strides of 2, nothing padded
    np.testing.assert_allclose(noise[5, 7], (patch[..., None] * kernel).sum((0, 1, 2)), atol=1e-4)


def test_the_head_takes_means_loses_a_tenth_in_training_and_ends_in_a_softmax(inception):
    model, _ = inception
    photos = np.random.default_rng(1).uniform(0, 255, (2, 75, 75, 3)).astype("float32")
    hidden, classes = of_type(model, layers.Dense)
    (dropout,) = of_type(model, layers.Dropout)
    blocks = model.get_layer("mixed10").output
    outputs = [blocks, hidden.output, model.output]
    maps, learnt, probabilities = (np.array(it) for it in keras.Model(model.input, outputs)(photos))
    weights, bias = hidden.get_weights()
    by_hand = np.maximum(0, maps.mean((1, 2)) @ weights + bias)
    np.testing.assert_allclose(learnt, by_hand, rtol=1e-3, atol=1e-4)
    weights, bias = classes.get_weights()
    powers = np.exp(by_hand @ weights + bias)
    np.testing.assert_allclose(probabilities, powers / powers.sum(1, keepdims=True), atol=1e-4)
    lost = np.array(dropout(np.ones((1, 20_000), "float32"), training=True)) == 0
    assert np.mean(lost) == pytest.approx(0.1, abs=0.02)


def test_moving_statistics_follow_within_the_steps_of_a_short_run(inception):
    """After 50 steps they have left 0.9 ** 50 of what they were, half a percent; Keras's momentum
    would leave 60."""
    momenta = {layer.momentum for layer in of_type(inception[0], layers.BatchNormalization)}
    assert all(momentum**50 < 0.01 for momentum in momenta)


# ---- Phases ----


def test_the_first_fine_tuning_step_has_the_loss_of_the_heads_last_on_the_same_batch():
    """As BatchNormalization keeps its statistics, which here are unlike those of any batch."""
    keras.utils.set_random_seed(0)
    model, rng = small_inception(3, 75), np.random.default_rng(0)
    for layer in of_type(model, layers.BatchNormalization):
        gamma, beta, mean, variance = layer.get_weights()
        statistics = [rng.normal(size=mean.shape), rng.uniform(0.5, 2, variance.shape)]
        layer.set_weights([gamma, beta, *statistics])
    photos = rng.uniform(0, 255, (4, 75, 75, 3)).astype("float32")
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0]]
    entropy, losses = keras.losses.CategoricalCrossentropy(), []
    for phase in study.training_phases(10, "imagenet", "mixed2"):
        study.freeze(model, phase)
        losses.append(float(entropy(labels, model(photos, training=True))))
    validation = float(entropy(labels, model(photos, training=False)))
    np.testing.assert_allclose(losses, validation, rtol=1e-5)
    study.freeze(model, study.training_phases(10, "none", "mixed2")[0])
    from_scratch = float(entropy(labels, model(photos, training=True)))
    assert abs(from_scratch - validation) > 1e-3  # there the statistics of the batch count


@pytest.mark.parametrize(
    ("below", "frozen"), [("none", 0), ("mixed0", 5), ("mixed2", 19), ("mixed7", 60)]
)
def test_in_inceptionv3_the_convolutions_below_a_block_are_frozen(inception, below, frozen):
    # The stem has 5 convolutions, mixed0 to mixed2 have 7 each, mixed3 has 4, mixed4 to mixed6 10.
    model, _ = inception
    head, fine_tuning = study.training_phases(10, "imagenet", below)
    scratch = study.training_phases(10, "none", below)[0]
    for phase, learning in ((head, 0), (fine_tuning, 94 - frozen), (scratch, 94)):
        study.freeze(model, phase)
        assert sum(layer.trainable for layer in of_type(model, layers.Conv2D)) == learning
        normalizing = sum(it.trainable for it in of_type(model, layers.BatchNormalization))
        assert normalizing == (94 if phase is scratch else 0)
        assert all(layer.trainable for layer in of_type(model, layers.Dense))


# ---- Weights ----


def weights_by_name(model):
    """The weights of the 94 convolutions and normalizations, in the order of their creation.

    Keras numbers the layers of a type: conv2d_9, conv2d_10.
    """

    def number(layer):
        return int(layer.name.rpartition("_")[2]) if layer.name[-1].isdigit() else 0

    ordered = [
        sorted(of_type(model, it), key=number) for it in (layers.Conv2D, layers.BatchNormalization)
    ]
    assert [len(layers_of_type) for layers_of_type in ordered] == [94, 94]
    return [weight for of_type in ordered for layer in of_type for weight in layer.get_weights()]


def assert_same_weights(model, expected):
    for got, wanted in zip(weights_by_name(model), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def positions(model):
    return [model.get_layer(name).output.shape[1:3] for name in ("mixed7", "mixed10")]


def write_keras_2_layout(path, model):
    """The layout of the files that Keras downloads."""
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)


def test_every_kind_of_file_gives_its_weights_and_the_strides_of_its_model(
    inception, stock_inception, tmp_path
):
    write_keras_2_layout(tmp_path / "inception_v3_kernels_notop.h5", stock_inception)
    model = study.build_model(2, 139, str(tmp_path / "inception_v3_kernels_notop.h5"))
    assert_same_weights(model, weights_by_name(stock_inception))
    assert model.output_shape == (None, 2) and model.input_shape == (None, 139, 139, 3)
    # A window of 3 × 3 on 7 × 7 positions has 5 × 5 places; every second one is 3 × 3.
    assert positions(model) == [(7, 7), (3, 3)]

    base = keras.Model(model.inputs, model.get_layer("mixed10").output)
    of_small_photos, path = inception  # from scratch
    further = study.load_backbone_weights(base, path)
    assert_same_weights(further, weights_by_name(of_small_photos))
    assert positions(further) == [(7, 7), (5, 5)]

    # Weights alone are loaded whatever the network is.
    small = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(2, 3)])
    kernel = small.get_weights()[0]
    small.save_weights(tmp_path / "notop.weights.h5")
    small.set_weights([np.zeros(it.shape) for it in small.get_weights()])
    again = study.load_backbone_weights(small, tmp_path / "notop.weights.h5")
    np.testing.assert_array_equal(again.get_weights()[0], kernel)


@pytest.mark.parametrize(
    ("size", "expected"), [(202, [(10, 10), (8, 8)]), (203, [(11, 11), (5, 5)])]
)
def test_from_scratch_photos_of_less_than_203_pixels_keep_more_positions(size, expected):
    assert positions(study.build_model(2, size, "none")) == expected


def test_files_that_do_not_hold_inceptions_weights_are_named(inception, tmp_path):
    small = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    small.save(tmp_path / "foreign.keras")
    corrupt = inception[1].read_bytes()[:5000]
    (tmp_path / "corrupt.keras").write_bytes(corrupt)
    small.save_weights(tmp_path / "foreign.weights.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    # To build the whole backbone anew for each of them takes seconds.
    base = keras.Sequential([keras.Input((75, 75, 3)), layers.Conv2D(2, 3)])
    for path in [*tmp_path.iterdir(), tmp_path / "absent.keras"]:
        with pytest.raises(study.Stop) as stop:
            study.load_backbone_weights(base, path)
        message = str(stop.value)
        assert stop.value.exit_code == 2 and message.startswith("--weights"), path
        assert str(path) in message and message.count("\n") <= 2


def test_an_imagenet_download_that_fails_names_address_file_and_other_choices(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens: there is no network
    with pytest.raises(study.Stop) as stop:
        study.build_model(3, 75, "imagenet")
    message = str(stop.value)
    file = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert f"/{file}" in message and "https://" in message
    assert os.path.join(os.environ["KERAS_HOME"], "models", file) in message  # noqa: PTH118
    assert "--weights FILE" in message and "--weights none" in message
    assert message.count("\n") <= 2 and stop.value.exit_code == 1

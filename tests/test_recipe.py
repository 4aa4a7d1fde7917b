"""How a run starts from given weights: nothing jumps, and every kind of file is taken."""

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

import model_training_and_visualization as study

PHOTOS = np.random.default_rng(1).uniform(0, 255, (4, 75, 75, 3)).astype("float32")
LABELS = np.eye(3, dtype="float32")[[0, 1, 2, 0]]


@pytest.fixture(scope="module")
def used_model():
    """InceptionV3 whose BatchNormalization has statistics unlike those of any batch of PHOTOS."""
    keras.utils.set_random_seed(0)
    model = study.build_model(3, 75, "none")
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            beta, mean, variance = layer.get_weights()
            beta = beta + rng.normal(size=beta.shape)
            layer.set_weights([beta, mean, rng.uniform(0.5, 2, variance.shape)])
        if isinstance(layer, layers.Dropout):
            layer.rate = 0  # the only part that may differ from call to call
    return model


def of_type(model, layer_type):
    return [layer for layer in model.layers if isinstance(layer, layer_type)]


def test_the_first_fine_tuning_step_has_the_loss_of_the_heads_last_on_the_same_batch(used_model):
    head, fine_tuning = study.training_phases(10, "imagenet", "mixed2")
    entropy = keras.losses.CategoricalCrossentropy()
    study.freeze(used_model, head)
    before = float(entropy(LABELS, used_model(PHOTOS, training=True)))
    study.freeze(used_model, fine_tuning)
    after = float(entropy(LABELS, used_model(PHOTOS, training=True)))
    validation = float(entropy(LABELS, used_model(PHOTOS, training=False)))
    np.testing.assert_allclose([after, validation], before, rtol=1e-5)


@pytest.mark.parametrize("below", ["none", "mixed2", "mixed7"])
def test_normalization_keeps_its_statistics_in_fine_tuning_and_learns_from_scratch(
    used_model, below
):
    for phase in study.training_phases(10, "imagenet", below):
        study.freeze(used_model, phase)
        assert not any(it.trainable for it in of_type(used_model, layers.BatchNormalization))
    learning = sum(it.trainable for it in of_type(used_model, layers.Conv2D))
    # The stem has 5 convolutions, mixed0 to mixed2 have 7 each, mixed3 has 4, mixed4 to mixed6 10.
    below_mixed2, below_mixed7 = 5 + 2 * 7, 5 + 3 * 7 + 4 + 3 * 10
    frozen = {"none": 0, "mixed2": below_mixed2, "mixed7": below_mixed7}[below]
    assert learning == 94 - frozen
    study.freeze(used_model, study.training_phases(10, "none", below)[0])
    assert all(layer.trainable for layer in used_model.layers)


def write_keras_2_layout(path, model):
    """The layout of the files that Keras downloads."""
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)


def weights_in_order(model):
    """The weights of the convolutions and normalizations, in the order of their creation."""
    kept = (layers.Conv2D, layers.BatchNormalization)
    graph = study.nodes(model)
    return [node.operation.get_weights() for node in graph if isinstance(node.operation, kept)]


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    """Files of every kind that hold the same InceptionV3, and its weights."""
    folder = tmp_path_factory.mktemp("weights")
    full = keras.applications.InceptionV3(weights=None)  # as Keras makes it: 299 px, 1000 classes
    rng = np.random.default_rng(0)
    # A value of its own for each weight, so that a swap of two layers of one shape shows.
    full.set_weights([rng.random(it.shape, "float32") for it in full.get_weights()])
    backbone = keras.Model(full.input, full.get_layer("mixed10").output)
    write_keras_2_layout(folder / "inception_v3_kernels.h5", full)
    write_keras_2_layout(folder / "inception_v3_kernels_notop.h5", backbone)
    backbone.save_weights(folder / "notop.weights.h5")
    full.save_weights(folder / "full.weights.h5")
    full.save(folder / "full.keras")
    return sorted(folder.iterdir()), weights_in_order(backbone)


def test_every_kind_of_file_gives_its_weights_to_the_layers_they_belong_to(weight_files):
    paths, expected = weight_files
    base = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(75, 75, 3))
    for path in paths:
        base.set_weights([np.zeros_like(weight) for weight in base.get_weights()])
        study.load_backbone_weights(base, path)
        for got, wanted in zip(weights_in_order(base), expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)), path


def test_from_scratch_small_photos_keep_more_positions_and_weights_keep_their_strides(
    weight_files, tmp_path
):
    def positions(model):
        return [model.get_layer(name).output.shape[1:3] for name in ("mixed7", "mixed10")]

    fresh = study.build_model(2, 139, "none")
    fresh.save(tmp_path / "fresh.keras")
    further = study.build_model(2, 139, str(tmp_path / "fresh.keras"))
    for old, new in zip(weights_in_order(fresh), weights_in_order(further), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))
    # A window of 3 × 3 on 7 × 7 positions has 5 × 5 places; every second one is 3 × 3.
    assert positions(fresh) == positions(further) == [(7, 7), (5, 5)]
    field = study.receptive_fields(fresh)["mixed10"]
    assert field.stride == (16, 16) and field.centre == (37, 37)
    (pretrained,) = (path for path in weight_files[0] if path.suffix == ".keras")
    assert positions(study.build_model(2, 139, str(pretrained))) == [(7, 7), (3, 3)]
    assert positions(study.build_model(2, 203, "none")) == [(11, 11), (5, 5)]


def test_a_file_of_another_model_is_refused_with_the_names_of_files_that_fit(tmp_path):
    small = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    write_keras_2_layout(tmp_path / "other.h5", small)
    small.save(tmp_path / "other.keras")
    small.save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    base = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(75, 75, 3))
    for path in tmp_path.iterdir():
        with pytest.raises(study.Stop) as stop:
            study.load_backbone_weights(base, path)
        assert str(path) in str(stop.value), path
        assert "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5" in str(stop.value)

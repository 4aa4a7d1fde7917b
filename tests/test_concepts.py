"""Concepts: what they are on maps that are sums of known ones, and what they add to a logit."""

import keras
import numpy as np
import pytest
from conftest import small_model, write_flowers
from keras import layers
from scipy.optimize import nnls

import model_training_and_visualization as study
from create_train_val_test import Stop


def linear_network(channels, classes, kernel=None):
    """3 × 3 photos -> "maps", their channels -> means -> logits; and the weights of the logits."""
    photo = keras.Input((3, 3, 3))
    maps = layers.Conv2D(channels, 1, activation="relu", name="maps")(photo)
    means = layers.GlobalAveragePooling2D()(maps)
    model = keras.Model(photo, layers.Dense(classes, activation="softmax")(means))
    random = np.random.default_rng(0)
    model.layers[1].set_weights([random.normal(size=(1, 1, 3, channels)), np.ones(channels)])
    kernel = random.normal(size=(channels, classes)) if kernel is None else kernel
    bias = random.normal(size=classes)
    model.layers[-1].set_weights([kernel, bias])
    return study.Network(model), kernel, bias


def logits_of(feature_maps, kernel, bias):
    return feature_maps.mean((1, 2)) @ kernel + bias


def groups(count, channels):
    """(count, channels) vectors of length 1, each of channels of its own, of different strength."""
    vectors = np.zeros((count, channels), "float32")
    for k in range(channels):
        vectors[k % count, k] = 1 + k
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_maps_that_are_sums_of_three_groups_of_channels_are_taken_apart_into_these():
    network, *_ = linear_network(9, 4)
    vectors = groups(3, 9)
    strengths = np.random.default_rng(1).gamma(0.5, size=(30, 3, 3, 3)) * [2, 9, 5]
    found = study.factorize(network, (strengths @ vectors).astype("float32"), count=3)
    strongest_first = [1, 2, 0]
    np.testing.assert_allclose(found.vectors, vectors[strongest_first], atol=0.01)
    np.testing.assert_allclose(found.maps, strengths[..., strongest_first], atol=0.1)
    assert found.explained > 0.999 and found.kept == 1


def test_the_fewest_concepts_are_taken_that_keep_the_predicted_classes():
    # Eight groups of channels, each a class of its own: six concepts cannot tell them all.
    vectors = groups(8, 16)
    network, kernel, bias = linear_network(16, 8, kernel=100 * vectors.T)
    # Of unlike strengths, as the singular vectors of like ones could be any mixture of them.
    strengths = np.diag(np.linspace(1, 2, 8))[np.arange(80) % 8][:, None, None]
    feature_maps = (strengths * np.ones((1, 3, 3, 1)) @ vectors).astype("float32")
    found = study.factorize(network, feature_maps)
    assert len(found.vectors) == 10 and found.kept == 1
    six = study.factorize(network, feature_maps, count=6)
    sums = six.maps @ six.vectors
    expected = logits_of(feature_maps, kernel, bias).argmax(1)
    same = logits_of(sums, kernel, bias).argmax(1) == expected
    assert six.kept == pytest.approx(same.mean()) and six.kept < 0.95
    missing = ((feature_maps - sums) ** 2).sum() / (feature_maps**2).sum()
    assert six.explained == pytest.approx(1 - missing, abs=1e-5)


def test_maps_of_other_photos_are_the_nearest_sums_that_take_nothing_away():
    random = np.random.default_rng(2)
    vectors = random.random((4, 12)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    feature_maps = random.random((2, 3, 3, 12)).astype("float32")
    expected = [nnls(vectors.T, column)[0] for column in feature_maps.reshape(-1, 12)]
    maps = study.concept_maps(feature_maps, vectors, steps=300)
    np.testing.assert_allclose(maps.reshape(-1, 4), expected, atol=1e-3)


def test_where_the_head_is_linear_shares_rest_and_bias_are_the_logit_and_fall_with_it():
    network, kernel, bias = linear_network(9, 4)
    photos = np.random.default_rng(3).integers(0, 256, (20, 3, 3, 3)).astype("uint8")
    found = study.concepts(network, photos, count=3)
    (feature_maps,) = network.activations(photos.astype("float32"), ["maps"])
    logits = logits_of(feature_maps, kernel, bias)
    for class_index in range(4):
        shares, rest = study.concept_shares(network, photos[5], found, class_index)
        assert shares.sum() + rest + bias[class_index] == pytest.approx(
            logits[5, class_index], rel=1e-4
        )
        for concept in range(3):
            falls = study.logit_falls(network, feature_maps, found, concept, class_index)
            assert falls[5] == pytest.approx(shares[concept], rel=1e-3, abs=1e-2)


def test_parts_of_the_evidence_are_shares_of_all_that_speaks_for_the_class():
    # 2 and 1 speak for it, and so does the rest, 3 - (2 - 1 + 1) = 1.
    parts = study.relative_shares(np.array([2.0, -1.0, 1.0]), 3.0)
    assert parts.tolist() == [0.5, -0.25, 0.25]
    # Here the rest, -2, speaks against it.
    parts = study.relative_shares(np.array([3.0, -1.0, 1.0]), 1.0)
    assert parts.tolist() == [0.75, -0.25, 0.25]


def test_a_layer_that_shows_nothing_holds_no_concepts():
    network, *_ = linear_network(9, 4)
    found = study.factorize(network, np.zeros((5, 3, 3, 9), "float32"))
    assert found.vectors.shape == (0, 9) and found.maps.shape == (5, 3, 3, 0)


def test_a_model_that_computes_no_numbers_is_named_before_concepts_are_looked_for(tmp_path):
    write_flowers(tmp_path / "test", ["daisy", "rose"], 2)
    paths = sorted((tmp_path / "test").rglob("*.jpg"))
    model = small_model(class_count=2)
    weights = model.get_weights()
    weights[-4][...] = np.nan  # of the last convolution
    model.set_weights(weights)
    with pytest.raises(Stop, match="finite"):
        study.survey_photos(study.Network(model), paths, [0, 0, 1, 1], ["daisy", "rose"])

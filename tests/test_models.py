"""Any convolutional classifier: what is read off its graph, compared with what it computes."""

import csv
import json
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import small_model
from keras import layers
from PIL import Image

import model_training_and_visualization as study
from create_train_val_test import Stop


def headed(*head, size=(16, 16, 3)):
    """A model of one convolution, and the layers given after its mean."""
    photo = keras.Input(size)
    maps = layers.Conv2D(4, 3, strides=2, activation="relu", name="maps")(photo / 255)
    output = layers.GlobalAveragePooling2D()(maps)
    for layer in head:
        output = layer(output)
    return keras.Model(photo, output)


def photos(*size):
    return np.random.default_rng(0).uniform(0, 255, (2, *(size or (16, 16)), 3)).astype("float32")


def probabilities(model, batch):
    return study.Network(model).probabilities(batch)


# ---- Where the positions of a layer look ---------------------------------------------------------


def with_centred_weights(model):
    """The model's copy in which each convolution passes on its middle pixel; for max, the mean."""
    model = keras.models.model_from_json(
        model.to_json().replace("MaxPooling2D", "AveragePooling2D")
    )
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D):
            kernel, *biases = layer.get_weights()
            centred = np.zeros_like(kernel)
            if "_se_" not in layer.name:  # these look at the whole photo
                channels = 1 if isinstance(layer, layers.DepthwiseConv2D) else kernel.shape[2]
                centred[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1 / channels
            layer.set_weights([centred, *biases])
    return model


def centre_of_gradient(model, layer_name, position):
    """The centre (row, column) of the pixels that the activation at a position depends on."""
    extractor = keras.Model(model.input, model.get_layer(layer_name).output)
    photo = tf.fill((1, *model.input_shape[1:3], 3), 0.001)  # too little to saturate a ReLU6
    with tf.GradientTape() as tape:
        tape.watch(photo)
        activation = tf.reduce_sum(extractor(photo, training=False)[(0, *position)])
    gradient = np.abs(tape.gradient(activation, photo)[0]).sum(2)
    return [
        float(np.average(np.arange(len(it)), weights=it))
        for it in (gradient.sum(1), gradient.sum(0))
    ]


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("VGG16", (97, 129)), ("ResNet50", (97, 128)), ("EfficientNetB0", (96, 129))],
)
def test_a_heatmap_lies_where_the_gradient_says_that_its_positions_look(architecture, size):
    build = getattr(keras.applications, architecture)
    base = build(weights=None, include_top=False, input_shape=(*size, 3))
    output = layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(base.output))
    model = with_centred_weights(keras.Model(base.input, output))
    network = study.Network(model)
    blocks = network.blocks
    for name in dict.fromkeys([blocks[0], blocks[len(blocks) // 2], network.heatmap_layer]):
        heatmap = np.zeros(model.get_layer(name).output.shape[1:3], "float32")
        position = (heatmap.shape[0] // 2, heatmap.shape[1] // 2)
        heatmap[position] = 1
        measured = centre_of_gradient(model, name, position)
        field = network.receptive_fields[name]
        # The middle of pixel k lies at k + 0.5.
        np.testing.assert_allclose(field.place(position), np.add(measured, 0.5), atol=0.01)
        placed = study.place_heatmap(heatmap, field, size)
        peak = np.average(np.argwhere(placed == placed.max()), axis=0)
        np.testing.assert_allclose(peak, measured, atol=0.51, err_msg=name)


@pytest.fixture(scope="module")
def original(stock_inception):
    """Keras's own InceptionV3, with a head that is drawn."""
    means = layers.GlobalAveragePooling2D()(stock_inception.output)
    return keras.Model(stock_inception.input, layers.Dense(2, activation="softmax")(means))


def test_the_blocks_of_inceptionv3_look_where_its_unpadded_strides_lead(inception, original):
    own, _ = inception  # at 75 px: its last reduction has strides of 1
    for model, last_stride in ((own, 16), (original, 32)):
        fields = study.Network(model).receptive_fields
        # The stem's unpadded 3 × 3 windows (strides 2, 1, 2, 1, 2) shift the first centre by
        # 1 + 2 + 2 + 4 + 4 pixels; each of the two reductions shifts it by one position more.
        looks = [(13, 8)] * 3 + [(21, 16)] * 5 + [(37, last_stride)] * 3
        blocks = [f"mixed{number}" for number in range(11)]
        for name, (centre, stride) in zip(blocks, looks, strict=True):
            assert fields[name].centre == (centre, centre), name
            assert fields[name].stride == (stride, stride), name


def test_a_receptive_field_is_as_large_as_the_pixels_that_change_the_activation():
    photo = keras.Input((61, 61, 3))
    x = layers.Conv2D(2, (5, 3), strides=2, kernel_initializer="ones")(photo)
    x = layers.AveragePooling2D(2)(x)
    x = layers.ZeroPadding2D(((1, 0), (2, 0)))(x)
    x = layers.Conv2D(2, 3, dilation_rate=2, kernel_initializer="ones", name="dilated")(x)
    y = layers.Conv2D(2, (1, 5), padding="same", kernel_initializer="ones")(x)
    x = layers.Add(name="merged")([x, y])
    model = keras.Model(
        photo, layers.Dense(2, activation="softmax")(layers.GlobalMaxPooling2D()(x))
    )
    # Rows: 5, then + 1 · 2, + 4 · 4; columns: 3, then + 1 · 2, + 4 · 4, and in the branch + 4 · 4.
    fields = study.Network(model).receptive_fields
    assert fields["dilated"].size == (23, 21) and fields["merged"].size == (23, 37)
    assert fields["merged"].stride == (4, 4)
    extractor = keras.Model(photo, x)
    image = tf.fill((1, 61, 61, 3), 100.0)
    with tf.GradientTape() as tape:
        tape.watch(image)
        activation = tf.reduce_sum(extractor(image)[0, 5, 5])
    seen = np.argwhere(np.abs(tape.gradient(activation, image)[0]).sum(2) > 0)
    np.testing.assert_array_equal(np.ptp(seen, axis=0) + 1, (23, 37))
    middle = (seen.min(0) + seen.max(0) + 1) / 2
    np.testing.assert_allclose(fields["merged"].place((5, 5)), middle)


@pytest.mark.parametrize(("size", "centre"), [(10, 1), (11, 0)])
def test_same_padding_is_counted_at_the_actual_size_of_the_layer(size, centre):
    photo = keras.Input((size, size, 3))
    maps = layers.Conv2D(2, 3, strides=2, padding="same", name="maps")(photo)
    means = layers.GlobalAveragePooling2D()(maps)
    model = with_centred_weights(keras.Model(photo, layers.Dense(2, activation="softmax")(means)))
    # An even side lacks one pixel, which TensorFlow adds at its end; an odd one lacks one at each.
    assert study.Network(model).receptive_fields["maps"].centre == (centre, centre)
    assert centre_of_gradient(model, "maps", (1, 1)) == [centre + 2, centre + 2]


def test_a_centre_crop_moves_the_positions_and_a_resizing_stretches_them():
    photo = keras.Input((40, 60, 3))
    cropped = layers.CenterCrop(20, 20, name="cropped")(photo)
    resized = layers.Resizing(10, 10, name="resized")(cropped)
    maps = layers.Conv2D(2, 1)(resized)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(layers.Flatten()(maps)))
    fields = study.Network(model).receptive_fields
    assert fields["cropped"].centre == (10, 20)
    assert fields["resized"].centre == (10.5, 20.5) and fields["resized"].stride == (2, 2)


# ---- Which layers --------------------------------------------------------------------------------


def test_convolutions_come_in_the_order_of_the_graph_also_of_a_second_model(inception, original):
    found = study.Network(original).convolutions
    assert len(found) == 94 and found[39].number == 40
    assert [it.channels for it in found[:5]] == [32, 32, 64, 80, 192]  # Szegedy et al., table 1
    # Keras counts convolutions and activations alike: conv2d_7 and activation_7 belong together.
    counted = [
        [
            int(name.rpartition("_")[2]) if name[-1].isdigit() else 0
            for name in (it.layer, it.activation)
        ]
        for it in found
    ]
    assert len({convolution - activation for convolution, activation in counted}) == 1


def residual_model():
    """Two blocks of a residual network; the first convolution to be created comes last."""
    late = layers.Conv2D(6, 3, padding="same", name="late")
    photo = keras.Input((32, 32, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="stem")(photo)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization()(x))
    y = layers.Conv2D(4, 3, padding="same", name="inner")(x)
    y = layers.ReLU(name="inner_relu")(y)
    y = layers.Conv2D(4, 1, name="outer")(y)
    x = layers.Add(name="block_1")([layers.BatchNormalization(name="outer_bn")(y), x])
    x = layers.Concatenate(name="block_2")([late(layers.ReLU(name="block_1_relu")(x)), x])
    means = layers.GlobalAveragePooling2D()(layers.Dropout(0.1, name="last")(x))
    return keras.Model(photo, layers.Dense(3, activation="softmax")(means))


def test_the_activation_of_a_convolution_is_what_consumes_it_and_blocks_end_in_merges():
    network = study.Network(residual_model())
    found = network.convolutions
    assert [it.layer for it in found] == ["stem", "inner", "outer", "late"]
    assert [it.activation for it in found] == ["stem_relu", "inner_relu", "outer_bn", "late"]
    assert network.blocks == ["block_1", "block_2"]
    assert network.heatmap_layer == "last"
    assert str(found[2]) == "convolution 3 of 4 (layer outer)"


def test_without_merges_the_last_layer_of_each_resolution_ends_a_block():
    photo = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 255)(photo)
    for size in (32, 16):
        x = layers.Conv2D(2, 3, padding="same", name=f"first_{size}")(x)
        x = layers.Conv2D(2, 3, padding="same", name=f"second_{size}")(x)
        x = layers.MaxPooling2D(name=f"pooled_{size}")(x)
    model = keras.Model(photo, layers.Dense(2, activation="softmax")(layers.Flatten()(x)))
    assert study.Network(model).blocks == ["second_32", "second_16", "pooled_16"]


def test_the_heatmap_layer_has_more_than_one_position_and_lies_in_no_branch(inception):
    model, _ = inception  # at 75 pixels the last three blocks have one position
    assert study.Network(model).heatmap_layer == "mixed7"


# ---- Heads, nested models, precision -------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        lambda: [layers.Dense(3, activation="softmax")],
        lambda: [layers.Dense(3), layers.Softmax()],
        lambda: [layers.Dense(3, use_bias=False), layers.Activation("softmax")],
    ],
)
def test_a_softmax_as_activation_or_layer_gives_the_models_own_probabilities(head):
    model = headed(*head())
    np.testing.assert_allclose(probabilities(model, photos()), model(photos()), atol=1e-6)


def test_logits_get_a_softmax_and_a_sigmoid_gets_its_second_class():
    logits = headed(layers.Dense(3))
    raw = np.exp(logits(photos()).numpy())
    expected = raw / raw.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities(logits, photos()), expected, atol=1e-6)
    for head in (
        [layers.Dense(1, activation="sigmoid")],
        [layers.Dense(1), layers.Activation("sigmoid")],
    ):
        model = headed(*head)
        p = model(photos()).numpy()
        np.testing.assert_allclose(probabilities(model, photos()), np.hstack([1 - p, p]), atol=1e-6)


@pytest.mark.parametrize(
    "head",
    [
        lambda: [layers.Dense(3, activation="softmax"), layers.Reshape((3,))],
        lambda: [layers.Dense(3), layers.Softmax(), layers.Activation("linear")],
        lambda: [layers.Dense(3), keras.ops.softmax, layers.Flatten()],
        lambda: [
            layers.Reshape((1, 1, 4)),
            layers.Conv2D(3, 1, activation="softmax"),
            layers.Flatten(),
        ],
        lambda: [layers.Dense(6, activation="softmax"), layers.Reshape((2, 3)), of_three],
    ],
)
def test_a_softmax_is_not_applied_again_whatever_follows_it(head):
    model = headed(*head())
    network = study.Network(model)
    np.testing.assert_allclose(network.probabilities(photos()), model(photos()), atol=1e-6)
    # Of the last one only the outputs tell that they are probabilities.
    assert ("adds up to 1" in network.remark) == model.operations[-1].name.startswith("sum")


def of_three(shares):
    """Two shares for each of three classes, (n, 2, 3), which add up to 1, become one: (n, 3)."""
    return keras.ops.sum(shares, axis=1)


def test_several_sigmoids_give_each_class_its_own_probability_and_logit():
    model = headed(layers.Dense(3, name="scores"), layers.Activation("sigmoid"))
    own = model(photos()).numpy()
    np.testing.assert_allclose(probabilities(model, photos()), own, atol=1e-6)
    scores = keras.Model(model.input, model.get_layer("scores").output)
    for index in range(3):
        ours, logits_alone = (
            study.grad_cam(it, photos()[0], "maps", index) for it in (model, scores)
        )
        np.testing.assert_allclose(ours, logits_alone, atol=1e-6)


def test_the_table_of_predictions_names_all_classes_from_a_half_up_of_several_sigmoids(tmp_path):
    Image.fromarray(photos()[0].astype("uint8")).save(path := tmp_path / "a.png")
    for bias, said in (([1, -1, 0.5], "daisy, tulip"), ([-1, -1, -1], "")):
        scores = layers.Dense(3)
        model = headed(scores, layers.Activation("sigmoid"))
        scores.set_weights([np.zeros((4, 3)), np.array(bias)])
        names = ["daisy", "rose", "tulip"]
        survey = study.survey_photos(study.Network(model), [path], [0], names)
        study.save_predictions(tmp_path / "table.csv", survey)
        _, row = (tmp_path / "table.csv").read_text("utf-8-sig").splitlines()
        assert next(csv.reader([row]))[1:3] == ["daisy", said]


def test_to_draw_needs_a_name_for_each_class(tmp_path):
    for names in (["daisy", "rose"], list("abcd")):
        with pytest.raises(Stop, match=f"3 classes, not {len(names)}"):
            study.draw(small_model(), [], names, tmp_path)


@pytest.mark.parametrize(
    ("photo", "said"),
    [
        ("cat.jpg", "this one is a str"),
        (np.zeros((8, 8)), r"\(8, 8\)"),
        (np.zeros((1, 8, 8, 3)), r"\(1, 8, 8, 3\)"),
        (np.zeros((8, 8, 4)), r"\(8, 8, 4\)"),
    ],
)
def test_a_technique_alone_tells_what_is_no_photo(photo, said):
    with pytest.raises(Stop, match=said):
        study.grad_cam(small_model(), photo, "relu_1", 0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0], "1 labels for 2 photos"),
        ([0, 1, 2], "3 labels for 2 photos"),
        ([0, 3], "0 to 2; this one is 3"),
        ([None, -1], "0 to 2; this one is -1"),
        (["rose", "tulip"], "this one is rose"),
        (np.eye(3)[:2], r"this one is \[1"),
    ],
)
def test_to_draw_needs_a_class_or_none_for_each_photo(labels, said, tmp_path):
    for path in (paths := [tmp_path / "a.png", tmp_path / "b.png"]):
        Image.fromarray(photos()[0].astype("uint8")).save(path)
    names = ["daisy", "rose", "tulip"]
    with pytest.raises(Stop, match=said):
        study.draw(small_model(), paths, names, tmp_path / "out", labels)
    with pytest.raises(Stop, match="no photos"):
        study.draw(small_model(), [], names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nested_models_are_unfolded_and_give_the_heatmaps_of_the_flat_one():
    flat = residual_model()
    base = keras.Model(flat.input, flat.get_layer("last").output)
    augmentation = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.3)])
    inner = keras.Sequential([keras.Input((32, 32, 3)), augmentation, base])
    photo = keras.Input((32, 32, 3))
    means = layers.GlobalAveragePooling2D()(inner(photo, training=False))
    nested = keras.Model(photo, keras.Sequential([flat.layers[-1]])(means))
    image = photos(32, 32)[0]
    for index in range(3):
        ours, expected = (study.grad_cam(it, image, "block_2", index) for it in (nested, flat))
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    of_nested, of_flat = study.Network(nested), study.Network(flat)
    assert of_nested.receptive_fields["block_2"] == of_flat.receptive_fields["block_2"]
    assert of_nested.convolutions == of_flat.convolutions


def nested_model():
    """A base in a model, both with a layer "conv2d" and one "add", and normalizations of all kinds.

    Only the first two of them can be folded into the convolution before.
    """
    inner_photo = keras.Input((24, 24, 3))
    x = layers.Conv2D(4, 3, name="conv2d", bias_initializer="normal")(
        layers.Rescaling(1 / 255, name="add")(inner_photo)
    )
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(4, 3, padding="same", groups=2, use_bias=False, name="grouped")(x)
    x = layers.ReLU()(layers.BatchNormalization(scale=False, center=False)(x))
    x = layers.Conv2D(4, 3, activation="relu", name="active")(
        x
    )  # a ReLU lies between: the two cannot be one
    x = layers.BatchNormalization(trainable=False)(x)
    twice = layers.Conv2D(4, 3, padding="same", name="twice")
    x = layers.BatchNormalization()(twice(twice(x)))  # folded, it would be applied twice
    base = keras.Model(inner_photo, x, name="base")
    photo = keras.Input((24, 24, 3))
    x = base(layers.Rescaling(1.0, name="add")(photo))
    x = layers.BatchNormalization()(layers.Conv2D(5, 3, name="conv2d")(x))
    x = layers.ReLU(name="fires")(x)
    head = layers.Dense(3, activation="softmax", name="matmul")
    model = keras.Model(photo, head(layers.GlobalAveragePooling2D(name="pooled")(x)))
    rng = np.random.default_rng(0)
    for layer in [*base.layers, *model.layers]:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2, it.shape) for it in layer.get_weights()])
    return model


def test_layers_of_one_name_in_a_model_and_its_base_are_told_apart():
    model = nested_model()
    batch = photos(24, 24)
    np.testing.assert_allclose(probabilities(model, batch), model(batch), atol=1e-6)
    first, *_, last = study.Network(model).convolutions
    assert first.layer != last.layer and (first.channels, last.channels) == (4, 5)
    # 4 channels and 5, of tiles of 96 pixels and 2 around each.
    for convolution in (first, last):
        sheet = study.activation_grid(model, batch[0], convolution.layer)
        assert sheet.shape == (100, 100 * convolution.channels, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": 6, "padding": "same", "activation": "gelu"},
        {"groups": 6, "strides": 2},
        {"groups": 6, "strides": (1, 2), "use_bias": False},
        {"groups": 3, "strides": 2, "padding": "same"},
        {"groups": 2, "dilation_rate": 2, "activation": "relu"},
    ],
)
def test_convolutions_in_groups_are_those_of_keras(settings):
    photo = keras.Input((24, 24, 3))
    maps = layers.Conv2D(6, 1)(photo / 255)
    maps = layers.Conv2D(12, 3, bias_initializer="normal", name="grouped", **settings)(maps)
    head = layers.Dense(2, activation="softmax")
    model = keras.Model(photo, head(layers.GlobalAveragePooling2D()(maps)))
    (ours,) = study.Network(model).activations(photos(24, 24), ["grouped"])
    np.testing.assert_allclose(ours, keras.Model(photo, maps)(photos(24, 24)), atol=1e-5)


def description(model):
    """All that makes a model what it is: configuration, names, what learns, and weights."""
    inner = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    names = [(layer.name, layer.trainable, layer.dtype_policy.name) for layer in model.layers]
    weights = [np.asarray(weight).tobytes() for weight in model.get_weights()]
    return json.dumps(model.get_config()), names, weights, [description(it) for it in inner]


@pytest.fixture(scope="module")
def drawn_nested(tmp_path_factory):
    """The nested model before and after everything is drawn for two photos of no known class."""
    folder, model = tmp_path_factory.mktemp("nested"), nested_model()
    paths = [folder / "one.png", folder / "other.png"]
    for path, photo in zip(paths, photos(24, 24), strict=True):
        Image.fromarray(photo.astype("uint8")).save(path)
    before = description(model)
    network = study.Network(model)
    last = network.convolutions[-1].layer
    study.activation_grid(model, photos(24, 24)[0], last)
    study.grad_cam(model, photos(24, 24)[0], "fires", 1)
    study.filter_patterns(model, last, [0, 1], size=16, steps=1)
    study.draw(model, paths, ["a", "b", "c"], folder / "Images", pattern_size=16, pattern_steps=1)
    return model, before, folder / "Images"


def test_the_users_model_is_never_changed(drawn_nested):
    model, before, _ = drawn_nested
    assert description(model) == before


def test_normalizations_of_all_kinds_leave_the_activations_as_they_are(drawn_nested):
    model, _, folder = drawn_nested
    run = json.loads((folder / "run.js").read_text("ascii")[len("const run = ") : -2])
    batch = photos(24, 24).astype("uint8").astype("float32")
    fires = keras.Model(model.input, model.get_layer("fires").output)(batch, training=False)
    (peaks,) = [entry["peaks"] for entry in run["filters"] if entry["activation"] == "fires"]
    np.testing.assert_allclose(peaks, np.max(fires, axis=(1, 2)), rtol=1e-3, atol=1e-3)


def test_photos_of_no_known_class_are_drawn_without_what_needs_the_truth(drawn_nested):
    files = {path.name for path in drawn_nested[2].iterdir()}
    assert {"CAM_1.jpeg", "CAM_2.jpeg", "CAM_layers.jpg", "strip.jpg", "index.html"} <= files
    assert not {"confusion_matrix.png", "CAM_mistakes.jpg", "training_curves.png"} & files


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_a_model_in_half_precision_is_drawn_in_float32(policy, tmp_path):
    keras.utils.set_random_seed(0)
    model = small_model()
    keras.config.set_dtype_policy(policy)
    try:
        half = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    half.set_weights(model.get_weights())
    half.save(tmp_path / "half.keras")
    loaded = study.load_model(tmp_path / "half.keras")
    assert all(layer.compute_dtype == "float32" for layer in loaded.layers)
    assert all(weight.dtype == "float32" for weight in loaded.weights)
    ours = probabilities(loaded, photos(32, 32))
    np.testing.assert_allclose(ours, model(photos(32, 32)), atol=0.01)
    # So is one that was never saved, and it stays as it is.
    (activation,) = study.network_of(half).activations(photos(32, 32), [half.layers[-3].name])
    assert activation.dtype == np.float32 and half.layers[-1].compute_dtype != "float32"
    np.testing.assert_array_equal(study.network_of(half).probabilities(photos(32, 32)), ours)


def built_by_fit():
    """A Sequential model without an Input, whose shape fit has found out; it ends in logits."""
    model = keras.Sequential(
        [
            layers.RandomFlip(),
            layers.RandomZoom(0.2),
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3, strides=2, activation="relu", name="maps"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(photos(), np.array([0, 1]), verbose=0)
    return model


def separable_with_residuals():
    photo = keras.Input((16, 16, 3))
    x = layers.SeparableConv2D(4, 3, padding="same", activation="relu")(photo / 255)
    maps = layers.Add(name="maps")([x, layers.SeparableConv2D(4, 3, padding="same")(x)])
    head = layers.Dense(3, activation="softmax")
    return keras.Model(photo, head(layers.GlobalAveragePooling2D()(maps)))


def attention_after_convolutions():
    photo = keras.Input((16, 16, 3))
    normal = layers.Normalization(mean=120.0, variance=3600.0)(photo)
    maps = layers.Conv2D(4, 3, strides=2, activation="relu", name="maps")(normal)
    words = layers.Reshape((49, 4))(maps)
    words = layers.MultiHeadAttention(2, 4)(words, words)
    head = layers.Dense(3, activation="softmax")
    return keras.Model(photo, head(layers.GlobalAveragePooling1D()(words)))


@pytest.mark.parametrize(
    "build", [built_by_fit, separable_with_residuals, attention_after_convolutions]
)
def test_classifiers_of_these_kinds_are_loaded_and_explained(build, tmp_path):
    model = build()
    model.save(tmp_path / "kind.keras")
    network = study.Network(study.load_model(tmp_path / "kind.keras"))
    outputs = model(photos(), training=False).numpy()
    if build is built_by_fit:
        outputs = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    np.testing.assert_allclose(network.probabilities(photos()), outputs, atol=1e-5)
    assert network.heatmap_layer == "maps"
    heatmap = study.grad_cam(network, photos()[0], "maps", 1)
    assert heatmap.shape == network.positions("maps") and np.isfinite(heatmap).all()
    pictures, _ = study.filter_patterns(
        network, network.convolutions[0].layer, [0], size=16, steps=1
    )
    assert pictures.shape == (1, 16, 16, 3)


# ---- Files ---------------------------------------------------------------------------------------


def of_many_layers():
    """A model in a model, with the layers that Keras 2 described otherwise than Keras 3."""
    inner_photo = keras.Input((16, 16, 3))
    x = layers.DepthwiseConv2D(3)(inner_photo)
    x = layers.BatchNormalization()(layers.SeparableConv2D(4, 3)(x))
    inner = keras.Model(inner_photo, layers.Conv2DTranspose(4, 3)(x), name="inner")
    head = [layers.GlobalAveragePooling2D(), layers.Dense(3, activation="softmax")]
    return keras.Sequential([keras.Input((16, 16, 3)), layers.RandomFlip(), inner, *head])


def as_keras_2(part):
    """A configuration of Keras 3 as tf_keras 2.20 writes it, where the two differ."""
    if isinstance(part, list):
        return [as_keras_2(it) for it in part]
    if not isinstance(part, dict):
        return part
    part = {name: as_keras_2(value) for name, value in part.items()}
    kind, config = part.get("class_name"), part.get("config")
    if kind == "Functional":
        part["module"] = "tf_keras.src.engine.functional"
        for ends in ("input_layers", "output_layers"):
            config[ends] = [config[ends]]
    if kind in ("DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"):
        config["groups"] = 1
    if kind == "SeparableConv2D":
        config |= {f"kernel_{what}": None for what in ("initializer", "regularizer", "constraint")}
    if kind == "BatchNormalization":
        config["axis"] = [3]
    if kind == "RandomFlip":
        config |= {"rng_type": "stateful", "batch_input_shape": [None, 16, 16, 3]}
    return part


def rewrite_description(path, change):
    """Change the configuration in a saved model's file."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = json.dumps(change(json.loads(file.attrs["model_config"])))
        return
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["config.json"] = json.dumps(change(json.loads(files["config.json"])))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_files_of_keras_2_are_loaded_where_only_their_description_differs(suffix, tmp_path):
    model, path = of_many_layers(), tmp_path / f"old{suffix}"
    model.save(path)
    rewrite_description(path, as_keras_2)
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(path)
    before = path.read_bytes()
    loaded = study.load_model(path)
    ours, expected = (it(photos(), training=False) for it in (loaded, model))
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert path.read_bytes() == before


def test_an_argument_that_changes_what_a_layer_does_is_not_dropped(tmp_path):
    def with_groups(description):
        return json.loads(json.dumps(as_keras_2(description)).replace('"groups": 1', '"groups": 2'))

    of_many_layers().save(tmp_path / "old.h5")
    rewrite_description(tmp_path / "old.h5", with_groups)
    with pytest.raises(Stop, match="groups"):
        study.load_model(tmp_path / "old.h5")


@pytest.mark.parametrize("name", ["TFOpLambda", "MyLayer"])
def test_a_layer_that_keras_lacks_is_named_in_two_short_lines(name, tmp_path):
    def with_it(description):
        return json.loads(json.dumps(description).replace("GlobalAveragePooling2D", name))

    path = tmp_path / "foreign.h5"
    of_many_layers().save(path)
    rewrite_description(path, with_it)
    with pytest.raises(Stop) as stop:
        study.load_model(path)
    first, second = str(stop.value).replace(str(path), "foreign.h5").splitlines()
    assert name in first and "foreign.h5" in first and max(len(first), len(second)) <= 100
    assert ("load_weights" in second) == (name == "TFOpLambda")


def test_the_layer_of_convnext_is_found_again(tmp_path):
    photo = keras.Input((16, 16, 3))
    scale = sys.modules[keras.applications.ConvNeXtTiny.__module__].LayerScale
    x = scale(0.5, 4)(layers.Conv2D(4, 3)(photo))
    head = layers.Dense(2, activation="softmax")
    model = keras.Model(photo, head(layers.GlobalAveragePooling2D()(x)))
    model.save(tmp_path / "scaled.h5")
    loaded = study.load_model(tmp_path / "scaled.h5")
    ours, expected = (it(photos(), training=False) for it in (loaded, model))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


# ---- What is refused, and what is warned of ------------------------------------------------------


def two_inputs():
    one, other = keras.Input((16, 16, 3)), keras.Input((16, 16, 3))
    return keras.Model([one, other], layers.Dense(2)(layers.Flatten()(layers.Add()([one, other]))))


@pytest.mark.parametrize(
    ("build", "lacking"),
    [
        (lambda: headed(layers.Dense(3, activation="softmax"), size=(16, 16, 4)), "RGB"),
        (lambda: headed(layers.Dense(3, activation="relu")), "softmax"),
        (lambda: headed(layers.Dense(3, activation="softmax"), layers.Rescaling(2)), "Rescaling"),
        (two_inputs, "one input"),
        (
            lambda: keras.Sequential(
                [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2, activation="softmax")]
            ),
            "convolutions",
        ),
    ],
)
def test_a_model_that_cannot_be_drawn_is_refused_naming_what_it_lacks(build, lacking, tmp_path):
    build().save(tmp_path / "odd.keras")
    with pytest.raises(Stop, match=lacking) as stop:
        study.load_model(tmp_path / "odd.keras")
    assert "odd.keras" in str(stop.value) and stop.value.exit_code == 2


def test_an_input_of_open_size_becomes_as_large_as_asked(tmp_path):
    headed(layers.Dense(2, activation="softmax"), size=(None, None, 3)).save(
        tmp_path / "open.keras"
    )
    network = study.Network(study.load_model(tmp_path / "open.keras"), open_side=96)
    assert network.input_size == (96, 96)
    assert study.grad_cam(network, photos()[0], "maps", 0).shape == (47, 47)


def test_what_happens_to_channels_alone_keeps_the_positions():
    photo = keras.Input((21, 25, 3))
    # It takes the channels apart, turns their order round and stacks them again.
    scaled = keras.applications.resnet50.preprocess_input(photo)
    maps = layers.Conv2D(4, 3, strides=2, name="maps")(scaled)
    head = layers.Dense(2, activation="softmax")
    model = keras.Model(photo, head(layers.GlobalAveragePooling2D()(maps)))
    network = study.Network(model)
    assert [it.layer for it in network.convolutions] == ["maps"] and network.heatmap_layer == "maps"
    field = network.receptive_fields["maps"]
    assert (field.centre, field.stride, field.size) == ((1, 1), (2, 2), (3, 3))
    batch = photos(21, 25)
    np.testing.assert_allclose(network.probabilities(batch), model(batch), atol=1e-6)


# ---- Photos as the model takes them --------------------------------------------------------------

# What Keras documents of its modes: BGR less ImageNet's mean, or normalized by mean and deviation.
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TAKEN = {
    "0..255": lambda photo: photo,
    "0..1": lambda photo: photo / 255,
    "tf": lambda photo: photo / 127.5 - 1,
    "caffe": lambda photo: photo[..., ::-1] - [103.939, 116.779, 123.68],
    "torch": lambda photo: (photo / 255 - MEAN) / DEVIATION,
}


@pytest.mark.parametrize("pixels", study.PIXELS)
def test_photos_are_turned_into_the_pixels_that_the_model_was_trained_on(pixels):
    model = headed(layers.Dense(3, activation="softmax"))
    network = study.Network(model, pixels=pixels)
    expected = model(TAKEN[pixels](photos()))
    np.testing.assert_allclose(network.probabilities(photos()), expected, atol=1e-5)
    assert network.receptive_fields["maps"] == study.Network(model).receptive_fields["maps"]
    (maps,) = network.activations(photos(), ["maps"])
    expected = keras.Model(model.input, model.get_layer("maps").output)(TAKEN[pixels](photos()))
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def brightness_model(pixels):
    """Tells bright photos from dark ones, at 160, if it is fed these pixels."""
    photo = keras.Input((8, 8, 3))
    brightness = layers.Conv2D(1, 1)
    scores = layers.Dense(2)(layers.GlobalAveragePooling2D()(brightness(photo)))
    model = keras.Model(photo, layers.Softmax()(scores))
    black, white = (TAKEN[pixels](np.full(3, level)) for level in (0.0, 255.0))
    of_channel = 255 / (white - black) / 3  # what leads back to 0–255, for the mean of channels
    brightness.set_weights(
        [of_channel.reshape(1, 1, 3, 1), np.array([-np.sum(of_channel * black)])]
    )
    model.layers[-2].set_weights([np.array([[-0.1, 0.1]]), np.array([16.0, -16.0])])
    return model


@pytest.fixture(scope="module")
def dark_and_bright(tmp_path_factory):
    """The paths of 24 dark photos and 24 bright ones, and their labels, 0 and 1."""
    folder, paths = tmp_path_factory.mktemp("dark_and_bright"), []
    for number, level in enumerate([*range(100, 148, 2), *range(174, 222, 2)]):
        paths.append(folder / f"{number:02}.png")
        Image.new("RGB", (8, 8), (level, level, level)).save(paths[-1])
    return paths, [0] * 24 + [1] * 24


@pytest.mark.parametrize("pixels", study.PIXELS)
def test_a_model_that_is_fed_other_pixels_than_it_was_trained_on_is_told(
    pixels, dark_and_bright, capsys
):
    paths, labels = dark_and_bright
    model = brightness_model(pixels)
    for fed in study.PIXELS:
        network = study.Network(model, pixels=fed)
        survey = study.survey_photos(network, paths, labels, ["dark", "bright"])
        study.warn_of_pixels(survey, "my.keras", "--pixels {}")
        told = capsys.readouterr().out
        right = int((survey.probabilities.argmax(1) == labels).sum())
        if right > 38:  # ten mistakes can be few by chance
            assert told == "" and (fed != pixels or right == 48)
        else:
            assert "my.keras gets 48 of 48 test photos right" in told and f"and {right} on" in told
            assert told.endswith(f": add --pixels {pixels}\n")


def test_concepts_are_found_in_photos_of_known_class_where_there_are_any(dark_and_bright):
    paths, _ = dark_and_bright
    network = study.Network(brightness_model("0..255"))
    survey = study.survey_photos(network, paths[:5], [None, 0, None, 1, 1], ["dark", "bright"])
    assert sorted(survey.sample) == [2, 3, 4]  # own photos come first
    survey = study.survey_photos(network, paths[:3], None, ["dark", "bright"])
    assert sorted(survey.sample) == [0, 1, 2]


def test_a_few_photos_more_that_are_right_are_taken_for_chance(dark_and_bright, capsys):
    paths, _ = dark_and_bright
    # The right pixels get 14 + 14 photos right, the wrong ones, which are all bright, 24.
    labels = [0] * 14 + [1] * 10 + [0] * 10 + [1] * 14
    network = study.Network(brightness_model("0..1"))
    survey = study.survey_photos(network, paths, labels, ["dark", "bright"])
    assert survey.evaluation.correct.sum() == 24
    study.warn_of_pixels(survey, "my.keras", "--pixels {}")
    assert "test photos right" not in capsys.readouterr().out


def test_without_labels_only_what_saturates_is_told(dark_and_bright, capsys):
    paths, _ = dark_and_bright
    for pixels, told_of in (("0..1", "fits: --pixels 0..1, "), ("0..255", ""), ("caffe", "")):
        network = study.Network(brightness_model(pixels))
        survey = study.survey_photos(network, paths[:3], None, ["dark", "bright"])
        study.warn_of_pixels(survey, "my.keras", "--pixels {}")
        told = capsys.readouterr().out
        assert told_of in told and bool(told) == bool(told_of)


@pytest.fixture(scope="module")
def drawn_grey(tmp_path_factory):
    """A model that takes grey photos, a coloured photo, and the folder where it is drawn."""
    folder = tmp_path_factory.mktemp("grey")
    model = headed(layers.Dense(2, activation="softmax"), size=(16, 16, 1))
    photo = photos(16, 16)[0].astype("uint8")
    Image.fromarray(photo).save(folder / "coloured.png")
    study.draw(
        model, [folder / "coloured.png"], ["a", "b"], folder, pattern_size=16, pattern_steps=2
    )
    return model, photo, folder


def test_a_grey_model_gets_grey_photos_and_the_pictures_show_them(drawn_grey):
    model, photo, folder = drawn_grey
    grey = np.asarray(Image.fromarray(photo).convert("L"), "float32")
    ours = study.Network(model).probabilities(photo[None])
    np.testing.assert_allclose(ours, model(grey[None, ..., None]), atol=0.01)
    for file in ("OriginalImage.jpeg", "photos_1.jpg", "photos.jpg", "conv2d_1_filters.jpg"):
        shown = np.asarray(Image.open(folder / file).convert("RGB"), int)
        # Beside the grey tiles there are red frames and a title.
        assert np.median(np.ptp(shown, axis=2)) <= 3, file
    shown = np.asarray(Image.open(folder / "OriginalImage.jpeg").convert("RGB"), int)
    assert np.ptp(shown, axis=2).max() <= 3 and np.abs(shown[..., 0] - grey).mean() < 5


def test_the_patterns_of_a_grey_model_are_grey_and_of_full_contrast(drawn_grey):
    model, *_ = drawn_grey
    pictures, _ = study.filter_patterns(model, "maps", range(4), size=32, steps=4)
    assert (pictures == pictures[..., :1]).all()
    np.testing.assert_allclose(pictures.std((1, 2, 3)), study.PATTERN_CONTRAST, rtol=0.2)


def test_a_grey_model_takes_no_pixels_of_three_colours():
    model = headed(layers.Dense(2, activation="softmax"), size=(16, 16, 1))
    with pytest.raises(Stop, match="caffe"):
        study.Network(model, pixels="caffe")


@pytest.mark.parametrize(("more", "side"), [((), 299), (("--image-size", "85"), 85)])
def test_a_model_that_takes_any_size_is_drawn_at_the_one_that_is_asked_for(tmp_path, more, side):
    photo = keras.Input((None, None, 3))
    means = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(photo))
    saved, own = tmp_path / "any.keras", tmp_path / "own.png"
    keras.Model(photo, layers.Dense(3, activation="softmax")(means)).save(saved)
    Image.new("RGB", (90, 90)).save(own)
    words = ["--skip-training", "--model", saved, "--data", tmp_path, "--photos", own, *more]
    network, *_ = study.open_saved(study.parse_options([str(word) for word in words]))
    assert tuple(network.input_size) == (side, side)

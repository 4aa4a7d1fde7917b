"""Small drawn flowers, and a model small enough to be trained on them within seconds."""

import signal

import keras
import numpy as np
import pytest
from draw_flowers import draw_flower
from keras import layers
from PIL import Image

import model_training_and_visualization as study

CLASSES = ["daisy", "rose", "tulip"]
# A shell starts a job in the background with Ctrl-C ignored, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# To optimize a graph takes longer than it saves in the few steps of a test.
study.tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def write_flowers(folder, classes, per_class, size=96):
    """Draw folder/CLASS/K.jpg and return {path: mask of the flower}."""
    masks = {}
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            path = folder / name / f"{k}.jpg"
            photo, masks[path] = draw_flower(name, np.random.default_rng([label, k]), size)
            Image.fromarray(photo).save(path, quality=92)
    return masks


@pytest.fixture(scope="session")
def split_flowers(tmp_path_factory):
    """A folder with train (8 photos a class), validation (3) and test (3)."""
    folder = tmp_path_factory.mktemp("split")
    for split, per_class in (("train", 8), ("validation", 3), ("test", 3)):
        write_flowers(folder / split, CLASSES, per_class)
    return folder


def small_model(size=32, class_count=3, channels=8):
    """Three convolutions under a softmax, on 0–255 RGB, that learn drawn flowers within seconds."""
    photo = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(photo)
    for number, strides in enumerate((2, 2, 1), start=1):
        name = f"maps_{number}"
        x = layers.Conv2D(channels * number, 3, strides, activation="relu", name=name)(x)
    means = layers.GlobalAveragePooling2D()(x)
    return keras.Model(photo, layers.Dense(class_count, activation="softmax")(means))


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """An untrained InceptionV3 classifier of three classes at 75 px, and the file that holds it."""
    keras.utils.set_random_seed(0)
    model = study.build_model(3, 75, "none")
    path = tmp_path_factory.mktemp("model") / "inception.keras"
    model.save(path)
    return model, path

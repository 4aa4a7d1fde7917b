"""A network whose weights are set by hand, photos with marks of colour, and what it makes of them.

What a photo goes through is worked out here a second time, in plain NumPy and SciPy:

    photo (35, 53) -> marks: 5 × 5, stride 3, unpadded -> (11, 17) -> ReLU
                   -> mixed: 1 × 1 with a ReLU of its own
                   -> looks: 5 × 5, stride 2, unpadded -> (4, 7) -> BatchNormalization -> ReLU
                   -> a weight for each position and channel -> softmax over three classes

Only the middle 3 × 3 of each 5 × 5 kernel is not 0. The first position of `looks` sees the pixels
from 0 to 17, and its middle is at 8.5; the next one looks 6 pixels further on.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
from keras import layers
from numpy.lib.stride_tricks import sliding_window_view
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage

HEIGHT, WIDTH = 35, 53
CLASSES = ["ruby", "emerald", "azure"]  # not in the order of the alphabet
MIDDLE, STRIDE, SEEN = 8.5, 6, 17  # of the positions of `looks`, in pixels
ROWS, COLUMNS = 4, 7  # of `looks`

# What each channel of `marks` is a mean of, in red, green and blue.
RED, GREEN, BLUE = (1, -0.55, -0.55), (-0.55, 1, -0.55), (-0.55, -0.55, 1)  # below 0 on grey
WEAK_RED = (0.02, -0.011, -0.011)
DARK = (-1 / 3, -1 / 3, -1 / 3)  # below 0 everywhere
NOTHING = (0, 0, 0)
EDGE = 5  # the channel of `marks` that takes the row above from the row below; also below 0 on grey
MARKS = np.array([RED, GREEN, BLUE, WEAK_RED, DARK, NOTHING, NOTHING], "float32")

# Rows: channels of `marks`; columns: those of `mixed`.
MIXED = np.zeros((7, 4), "float32")
MIXED[0, 0], MIXED[1, 1], MIXED[2, 2], MIXED[EDGE, 3] = 1.0, 0.5, 2.0, 0.4
MIXED_BIAS = np.array([0.0, -0.01, 0.02, 0.0], "float32")

# Rows: channels of `mixed`; columns: those of `looks`, of which number 3 never fires.
LOOKS = np.array(
    [
        [1.0, 0.0, 0.2, 1.0, 0.1],
        [0.0, 2.5, 0.0, 1.0, 0.6],
        [0.1, 0.0, 0.9, 1.0, 0.2],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ],
    "float32",
)
SILENT = 3
NORMALIZATION = {
    "gamma": np.array([1.5, 0.8, 1.0, 1.0, 2.0], "float32"),
    "beta": np.array([0.1, -0.1, 0.0, -1000.0, 0.05], "float32"),
    "mean": np.array([0.2, 0.1, 0.1, 0.0, 0.1], "float32"),
    "variance": np.array([0.5, 0.3, 0.4, 1.0, 2.0], "float32"),
}
# By how much each channel of `looks` (row) raises the logit of each class, on average over the
# positions; lower and further right by more.
RAISES = np.array(
    [
        [0.60, -0.30, -0.15],
        [-0.20, 0.70, -0.30],
        [-0.1, -0.35, 0.60],
        [1, 1, 1],
        [0.05, 0.15, -0.1],
    ],
    "float32",
)
BY_POSITION = (1 + 0.1 * (np.arange(ROWS)[:, None] - 1.5) + 0.08 * (np.arange(COLUMNS) - 3)).astype(
    "float32"
)
CLASS_BIAS = np.array([0.1, 0.0, -0.1], "float32")


def in_the_middle(kernel):
    """A (5, 5, inputs, filters) kernel of means over the middle 3 × 3, from (inputs, filters)."""
    spread = np.zeros((5, 5, *kernel.shape), "float32")
    spread[1:4, 1:4] = kernel / 9
    return spread


def marks_kernel():
    kernel = in_the_middle(MARKS.T)
    kernel[1, 1:4, :, EDGE] = -1.1 / 9
    kernel[3, 1:4, :, EDGE] = 1 / 9
    return kernel


def known_model():
    """The network as a Keras model on (n, 35, 53, 3) RGB, 0–255."""
    photo = keras.Input((HEIGHT, WIDTH, 3))
    scaled = layers.Rescaling(1 / 255, name="scaled")(photo)
    marks = layers.Conv2D(7, 5, strides=3, use_bias=False, name="marks")(scaled)
    marks_on = layers.ReLU(name="marks_on")(marks)
    mixed = layers.Conv2D(4, 1, activation="relu", name="mixed")(marks_on)
    looks = layers.Conv2D(5, 5, strides=2, use_bias=False, name="looks")(mixed)
    normalized = layers.BatchNormalization(epsilon=1e-3, name="normalized")(looks)
    looks_on = layers.ReLU(name="looks_on")(normalized)
    flat = layers.Flatten()(looks_on)
    output = layers.Dense(3, activation="softmax", name="classes")(flat)
    model = keras.Model(photo, output)
    weights = {
        "marks": [marks_kernel()],
        "mixed": [MIXED[None, None], MIXED_BIAS],
        "looks": [in_the_middle(LOOKS)],
        "normalized": [NORMALIZATION[name] for name in ("gamma", "beta", "mean", "variance")],
        "classes": [class_weights().reshape(-1, 3), CLASS_BIAS],
    }
    for name, values in weights.items():
        model.get_layer(name).set_weights(values)
    return model


def class_weights():
    """(rows, columns, channels, classes)."""
    return BY_POSITION[:, :, None, None] * RAISES


def normalization_scale():
    return NORMALIZATION["gamma"] / np.sqrt(NORMALIZATION["variance"] + 1e-3)


def convolve(maps, kernel, stride):
    """The unpadded convolution of (h, w, inputs) maps, position by position."""
    windows = sliding_window_view(maps, kernel.shape[:2], axis=(0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijck->hwk", windows, kernel, dtype="float64")


@dataclass
class Known:
    """A photo, and all that the network makes of it."""

    name: str  # as it is shown
    path: Path
    label: int | None
    photo: np.ndarray  # (height, width, 3) uint8, upright

    @cached_property
    def pixels(self):
        """The photo in the size of the network's input."""
        squeezed = Image.fromarray(self.photo).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        return np.asarray(squeezed)

    @cached_property
    def marks(self):
        return convolve(self.pixels / 255, marks_kernel(), 3)

    @cached_property
    def mixed(self):
        return np.maximum(0, np.maximum(0, self.marks) @ MIXED + MIXED_BIAS)

    @cached_property
    def looks(self):
        """What the third convolution puts out, before normalization and ReLU."""
        return convolve(self.mixed, in_the_middle(LOOKS), 2)

    @cached_property
    def looks_on(self):
        scaled = (self.looks - NORMALIZATION["mean"]) * normalization_scale()
        return np.maximum(0, scaled + NORMALIZATION["beta"])

    @cached_property
    def probabilities(self):
        logits = np.einsum("hwk,hwkc->c", self.looks_on, class_weights()) + CLASS_BIAS
        return np.exp(logits) / np.exp(logits).sum()

    @property
    def predicted(self):
        return int(self.probabilities.argmax())

    @property
    def explained_class(self):
        """The true class, or where it is not known the predicted one."""
        return self.predicted if self.label is None else self.label

    @property
    def is_mistake(self):
        return self.label is not None and self.label != self.predicted

    @property
    def contrast_class(self):
        """The most probable of the classes but the explained one."""
        ranking = np.argsort(-self.probabilities).tolist()
        ranking.remove(self.explained_class)
        return ranking[0]

    @property
    def probability(self):
        """That of the true class, or where it is not known of the predicted one."""
        return self.probabilities[self.explained_class]

    def heatmap(self, class_index):
        """Grad-CAM at `looks_on`: a weight's mean over the positions is its entry in RAISES."""
        return np.maximum(0, self.looks_on @ RAISES[:, class_index])

    def against(self, class_index):
        """What Grad-CAM cuts away: what speaks against a class."""
        return np.maximum(0, -self.looks_on @ RAISES[:, class_index])

    def for_one_rather_than(self, one, other):
        """Grad-CAM of the difference of two logits, not cut at 0."""
        return self.looks_on @ (RAISES[:, one] - RAISES[:, other])

    def heatmap_at_mixed(self, class_index):
        """Grad-CAM at `mixed`.

        Each position of `looks` that fires passes its gradient back through the whole kernel; the
        mean over all positions of `mixed` is a sum over both, divided by their number.
        """
        gradient = class_weights()[..., class_index] * (self.looks_on > 0) * normalization_scale()
        channel_weights = LOOKS @ gradient.sum((0, 1)) / self.mixed[..., 0].size
        return np.maximum(0, self.mixed @ channel_weights)

    def peaks(self):
        """{filter of the third convolution: (activation, row, column)} where it fires most."""
        found = {}
        for k in range(self.looks_on.shape[2]):
            channel = self.looks_on[..., k]
            row, column = np.unravel_index(channel.argmax(), channel.shape)
            found[k] = (channel[row, column], int(row), int(column))
        return found

    def with_blurred(self, mask):
        """The probabilities without what is in the (35, 53) mask."""
        spread = WIDTH / 12
        blurred = ndimage.gaussian_filter(
            self.pixels.astype(float), (spread, spread, 0), mode="mirror"
        )
        changed = np.where(mask[..., None], blurred, self.pixels)
        known = Known(self.name, self.path, self.label, self.photo)
        known.pixels = changed
        return known.probabilities

    def deletion(self, class_index=None):
        """The probability of a class, by default the explained one: as it is, without the hottest
        fifth, and without a central one."""
        class_index = self.explained_class if class_index is None else class_index
        heatmap = self.heatmap(class_index)
        hottest = top_fifth(placed(heatmap))
        rows, columns = np.indices((HEIGHT, WIDTH))
        central = top_fifth(-np.hypot(rows - (HEIGHT - 1) / 2, columns - (WIDTH - 1) / 2))
        masks = np.zeros((HEIGHT, WIDTH), bool), hottest, central
        return [float(self.with_blurred(mask)[class_index]) for mask in masks]


def placed(heatmap):
    """A heatmap of `looks_on` on the (35, 53) pixels that its positions look at."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    at = [(rows + 0.5 - MIDDLE) / STRIDE, (columns + 0.5 - MIDDLE) / STRIDE]
    return ndimage.map_coordinates(heatmap, at, order=1, mode="grid-constant")


def top_fifth(values):
    """The mask of the highest fifth; of equal values the ones nearest to the highest."""
    rows, columns = np.indices(values.shape)
    peak_row, peak_column = np.unravel_index(values.argmax(), values.shape)
    distance = np.hypot(rows - peak_row, columns - peak_column)
    order = np.lexsort((distance.ravel(), -values.round(6).ravel()))
    mask = np.zeros(values.size, bool)
    mask[order[: round(values.size / 5)]] = True
    return mask.reshape(values.shape)


def marked(grey, *marks, enlarged=(1, 1)):
    """A grey photo with squares of a colour, each around the middle of a position of `looks`.

    marks: (channel of the colour, row, column, brightness, side in pixels). enlarged: how many
    pixels each pixel of the input becomes, down and across.
    """
    photo = np.full((HEIGHT, WIDTH, 3), grey, "uint8")
    for channel, row, column, brightness, side in marks:
        top, left = (max(0, int(MIDDLE) + STRIDE * at - side // 2) for at in (row, column))
        photo[top : top + side, left : left + side] = 20
        photo[top : top + side, left : left + side, channel] = brightness
    return photo.repeat(enlarged[0], axis=0).repeat(enlarged[1], axis=1)


# name: (label, photo); each with a grey of its own, by which it can be told in a picture.
TEST_PHOTOS = {
    "azure/b.png": (2, marked(100, (2, 2, 4, 170, 9))),
    "ruby/a.png": (0, marked(110, (0, 0, 5, 130, 21), enlarged=(4, 2))),
    "ruby/c.png": (0, marked(120, (0, 2, 1, 66, 9))),
    "emerald/d.png": (1, marked(130, (2, 0, 3, 250, 13), (0, 3, 1, 150, 9))),
    "ruby/b.png": (0, marked(140, (1, 3, 5, 230, 9), (0, 0, 0, 170, 9))),
    "emerald/a.png": (1, marked(150, (1, 0, 0, 140, 21), enlarged=(3, 3))),
    "emerald/b.png": (1, marked(160, (2, 3, 0, 150, 9), (1, 3, 6, 111, 19))),
    "azure/a.png": (2, marked(170, (2, 1, 1, 230, 9))),
    "emerald/c.png": (1, marked(180, (0, 1, 1, 200, 9))),
}


# Drawn after the others, own photos (without a label) between test photos that are all mistakes.
# The first one stands where a test photo stood before.
OWN_PHOTOS = {
    "ruby/a.png": (None, marked(115, (2, 0, 0, 90, 23), enlarged=(2, 2))),
    "emerald/d.png": TEST_PHOTOS["emerald/d.png"],
    "turned.jpg": (None, marked(125, (1, 0, 5, 90, 23), enlarged=(2, 1))),
    "ruby/b.png": TEST_PHOTOS["ruby/b.png"],
}


def write_photos(folder, photos):
    """Write {name: (label, photo)}, a JPEG lying on its side with a mark that says so: [Known].

    A test photo is shown by the names of its folder and its file, an own one by that of its file.
    """
    known = []
    for name, (label, photo) in photos.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise
            lying = Image.fromarray(np.rot90(photo))
            lying.save(path, exif=exif, quality=95, subsampling=0)
        else:
            Image.fromarray(photo).save(path)
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        shown_as = path.name if label is None else name
        known.append(Known(shown_as, path, label, np.asarray(upright)))
    return known


def read_run(folder):
    """What run.js in a folder holds."""
    text = (folder / "run.js").read_text("ascii")
    return json.loads(text.removeprefix("const run = ").removesuffix(";\n"))

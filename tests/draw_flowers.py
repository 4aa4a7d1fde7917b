"""Draw flower photos of five classes, for machines without the Kaggle flowers.

    python tests/draw_flowers.py FOLDER [--per-class 120] [--size 256] [--seed 0]

    FOLDER/daisy/daisy_0001.jpg … FOLDER/tulip/tulip_0120.jpg

The shape names the class, the colour does not: all classes draw their petals from overlapping
palettes.
Photo k of a class depends on the seed, the class and k alone, so a larger set begins with the
smaller one.
"""

import argparse
import colorsys
import io
import math
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASS_NAMES = ("daisy", "dandelion", "rose", "sunflower", "tulip")
SMALLEST_SIZE = 32
SUPERSAMPLING = 1.25  # drawn larger and averaged down, which softens every edge
SHADE_TINT = (0.85, 1.05, 1.0)  # light that has passed through petals makes shade warm
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))

# Hue, saturation, value. Every class wears the first five, but for white, which turns a sunflower
# into a daisy.
PETAL_COLOURS = (
    (0.12, 0.05, 0.95),  # white
    (0.13, 0.30, 0.96),  # cream
    (0.125, 0.85, 0.98),  # yellow
    (0.08, 0.85, 0.96),  # orange
    (0.99, 0.82, 0.80),  # red
    (0.94, 0.42, 0.94),  # pink
    (0.90, 0.72, 0.82),  # magenta
    (0.78, 0.50, 0.76),  # purple
)
DISC_COLOURS = (
    (0.12, 0.40, 0.85),  # straw
    (0.13, 0.85, 0.90),  # yellow
    (0.09, 0.85, 0.80),  # amber
    (0.20, 0.65, 0.60),  # green
    (0.07, 0.70, 0.45),  # brown
    (0.06, 0.60, 0.26),  # dark brown
)
BACKDROPS = (  # far and near colour: meadow, shade, sky over grass, earth, evening, wall
    ((0.27, 0.50, 0.60), (0.30, 0.65, 0.28)),
    ((0.35, 0.45, 0.22), (0.30, 0.50, 0.10)),
    ((0.58, 0.40, 0.88), (0.27, 0.50, 0.45)),
    ((0.10, 0.35, 0.50), (0.08, 0.45, 0.22)),
    ((0.08, 0.45, 0.80), (0.28, 0.50, 0.30)),
    ((0.60, 0.10, 0.75), (0.20, 0.25, 0.45)),
)


# ---------------------------------------------------------------- petals and leaves


@dataclass(frozen=True)
class Blade:
    """Outline and relief of a petal or leaf; lengths in units of its own length."""

    width: float
    base: (
        float  # power of the outline at the base and at the tip: 0.2 is blunt, 0.5 round, 1 pointed
    )
    tip: float
    ruffle: float = 0.0  # waves of the tip
    hollow: float = 0.25  # shade towards the edges
    depth: float = 0.3  # shade towards the base
    rim: float = 0.0  # light on the curled edge
    veins: float = 0.1
    rib: float = 0.0  # the midrib, lighter than the blade
    teeth: int = 0


DAISY_PETAL = Blade(width=0.24, base=0.35, tip=0.22, ruffle=0.03, veins=0.12)
SUNFLOWER_PETAL = Blade(width=0.34, base=0.5, tip=0.85, rib=0.08, veins=0.14, depth=0.4)
DANDELION_RAY = Blade(
    width=0.12, base=0.15, tip=0.12, ruffle=0.03, hollow=0.35, veins=0.06, depth=0.45
)
ROSE_PETAL = Blade(
    width=1.25, base=0.6, tip=0.32, ruffle=0.02, hollow=0.08, depth=0.55, rim=0.3, veins=0.05
)
TULIP_PETAL = Blade(
    width=0.56, base=0.42, tip=0.62, hollow=0.3, depth=0.15, rim=0.08, veins=0.13, rib=-0.05
)
GRASS_BLADE = Blade(width=0.05, base=0.2, tip=0.7, rib=0.2)
LEAVES = {
    "daisy": Blade(width=0.30, base=0.8, tip=0.35, rib=0.2, teeth=5),
    "dandelion": Blade(width=0.26, base=0.6, tip=0.5, rib=0.3, teeth=6),
    "rose": Blade(width=0.58, base=0.5, tip=0.8, rib=0.2, teeth=14),
    "sunflower": Blade(width=0.75, base=0.4, tip=0.9, rib=0.2),
    "tulip": Blade(width=0.20, base=0.35, tip=0.8, veins=0.16, rib=0.1),
}


def rgb(hue, saturation, value):
    """Colour as a float32 RGB vector in [0, 1]."""
    return np.float32(colorsys.hsv_to_rgb(hue % 1, np.clip(saturation, 0, 1), np.clip(value, 0, 1)))


def vary(colour, rng, amount=1.0):
    """A neighbour of an HSV colour, as RGB."""
    hue, saturation, value = colour
    return rgb(
        hue + amount * rng.normal(0, 0.012),
        saturation * (1 + amount * rng.normal(0, 0.10)),
        value * (1 + amount * rng.normal(0, 0.05)),
    )


def paint_blade(blade, length, base_colour, tip_colour, rng, bend=0.0, pad=2):
    """One petal or leaf pointing right from the middle of the left edge: premultiplied RGBA,
    float32."""
    length = float(length)  # a float64 scalar would turn every array below into float64
    rows = int(np.ceil(length * (blade.width + 2 * abs(bend)))) + 2 * pad
    columns = int(np.ceil(length)) + 2 * pad
    along = ((np.arange(columns, dtype=np.float32) - pad + 0.5) / length)[None, :]
    across = ((np.arange(rows, dtype=np.float32) - rows / 2 + 0.5) / length)[
        :, None
    ] - bend * along**2

    waves = np.sin(across * (rng.uniform(8, 14) / blade.width) + rng.uniform(0, 6))
    reach = np.clip(along * (1 + blade.ruffle * (1 + waves)), 0, 1)
    peak_at = blade.base / (blade.base + blade.tip)
    peak = peak_at**blade.base * (1 - peak_at) ** blade.tip
    half_width = blade.width / 2 / peak * reach**blade.base * (1 - reach) ** blade.tip
    if blade.teeth:
        half_width = half_width * (1 - min(0.35, 2 / blade.teeth) * ((reach * blade.teeth) % 1))
    alpha = np.clip((half_width - np.abs(across)) * length + 0.5, 0, 1) * (half_width > 0)
    side = np.clip(across / np.maximum(half_width, 1e-3), -1, 1)

    streaks = rng.normal(0, 1, 12).astype(np.float32)
    vein = cv2.remap(streaks[None, :], (side + 1) * 5.5, np.zeros_like(side), cv2.INTER_LINEAR)
    edge = np.maximum(reach, np.abs(side)) ** 10
    shade = 1 - blade.hollow * side**2 - blade.depth * (1 - reach) ** 2 + blade.rim * edge * reach
    shade += blade.veins * 0.6 * vein * (1 - 0.5 * reach) + blade.rib * np.exp(-((side * 7) ** 2))
    blend = np.clip(reach * 1.5 - 0.2, 0, 1)
    lit = (shade - 1) * alpha
    channels = [
        (start + (end - start) * blend) * (alpha + tint * lit)
        for start, end, tint in zip(
            base_colour.tolist(), tip_colour.tolist(), SHADE_TINT, strict=True
        )
    ]
    return cv2.merge([np.maximum(channel, 0) for channel in channels] + [alpha])


# ---------------------------------------------------------------- the scene


@dataclass
class Scene:
    """What is being drawn: RGB in [0, 1] and, as fourth channel, how much of each pixel the head
    covers."""

    layers: np.ndarray  # float32 (size, size, 4)
    light: np.ndarray  # unit vector towards the light, x right and y down

    @property
    def size(self):
        return self.layers.shape[0]


def rotation(angle):
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def stamp(scene, sprite, linear, anchor, place, *, head=True, shadow=0.0, gain=1.0):
    """Lay a sprite over the scene: its point `anchor` comes to `place`, `linear` (2, 2) turns and
    scales it.

    `shadow` in [0, 1] darkens what the head already shows beneath, on the side away from the light.
    """
    matrix = np.column_stack((linear, place - linear @ anchor))
    height, width = sprite.shape[:2]
    corners = matrix @ np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]])
    margin = 0.02 * scene.size if shadow else 1
    left, top = np.maximum(np.floor(corners.min(axis=1) - margin), 0).astype(int).tolist()
    right, bottom = (
        np.minimum(np.ceil(corners.max(axis=1) + margin), scene.size).astype(int).tolist()
    )
    if right <= left or bottom <= top:
        return
    matrix[:, 2] -= (left, top)
    patch = cv2.warpAffine(sprite, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    under = scene.layers[top:bottom, left:right]
    alpha = cv2.extractChannel(patch, 3)
    keep = visible = 1 - alpha
    if shadow:
        reach = max(1, int(0.012 * scene.size))
        anchor = (
            np.round(reach - reach * scene.light).astype(int).tolist()
        )  # off-centre, so the blur also shifts
        blurred = cv2.blur(
            alpha, (2 * reach + 1,) * 2, anchor=anchor, borderType=cv2.BORDER_CONSTANT
        )
        visible = keep * (1 - shadow * blurred * under[..., 3])
    under *= cv2.merge((visible, visible, visible, keep))
    under += cv2.multiply(patch, (gain, gain, gain, float(head)))


def stamp_ray(scene, sprite, place, angle, view, *, pad=2, **look):
    """Stamp a blade that points away from `place`; `view` (2, 2) foreshortens the head; lit by its
    direction."""
    linear = view @ rotation(angle)
    facing = float(linear[:, 0] @ scene.light) / math.hypot(*linear[:, 0])
    look["gain"] = look.get("gain", 1.0) * (1 + 0.13 * facing)
    stamp(scene, sprite, linear, np.array([pad, sprite.shape[0] / 2]), place, **look)


def paint_background(size, rng):
    """Something far out of focus: a gradient, blossoms, blades and circles of light. RGB float32
    (size, size, 3)."""
    small = 96
    far, near = BACKDROPS[rng.integers(len(BACKDROPS))]
    far, near = vary(far, rng, 2), vary(near, rng, 2)
    ramp = np.clip(np.linspace(-0.3, 1.3, small) + rng.uniform(-0.3, 0.3), 0, 1)[:, None, None]
    canvas = np.ascontiguousarray(
        np.broadcast_to(far * (1 - ramp) + near * ramp, (small, small, 3)), np.float32
    )
    for _ in range(rng.integers(10, 40)):
        start = rng.uniform(-10, small + 10, 2)
        end = start + rng.normal(0, 12, 2) + (0, rng.uniform(-40, 0))
        tone = near * rng.uniform(0.5, 1.7) + rng.uniform(0, 0.08)
        cv2.line(
            canvas,
            start.astype(int).tolist(),
            end.astype(int).tolist(),
            tone.tolist(),
            int(rng.integers(1, 6)),
        )
    blossoms = PETAL_COLOURS + DISC_COLOURS
    for _ in range(rng.integers(0, 8)):
        place, radius = rng.uniform(0, small, 2), rng.uniform(3, 13)
        tone = vary(blossoms[rng.integers(len(blossoms))], rng, 2) * rng.uniform(0.6, 1)
        for angle in rng.uniform(0, 2 * np.pi, 6):
            spot = place + 0.6 * radius * np.array([np.cos(angle), np.sin(angle)])
            cv2.circle(canvas, spot.astype(int).tolist(), int(radius * 0.6) + 1, tone.tolist(), -1)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(3.5, 7))
    lights = np.zeros_like(canvas)
    for _ in range(rng.integers(0, 14)):
        place, radius = rng.integers(0, small, 2), int(rng.integers(2, 9))
        spot = np.zeros((small, small), np.float32)
        cv2.circle(spot, place.tolist(), radius, rng.uniform(0.05, 0.25), -1)
        lights += spot[..., None] * (0.5 + 0.5 * vary(far, rng, 2))
    canvas += cv2.GaussianBlur(lights, (0, 0), 0.8)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_CUBIC)


def draw_clutter(scene, rng, count, blur):
    """Grass and twigs that cross the picture, `blur` pixels out of focus."""
    coarse = 3  # what is to be blurred can be drawn small
    for _ in range(count):
        brown = rng.random() < 0.35
        tone = vary((0.08, 0.45, 0.35) if brown else (0.26, 0.6, 0.5), rng, 2) * rng.uniform(
            0.5, 1.2
        )
        blade = replace(GRASS_BLADE, width=rng.uniform(0.02, 0.09))
        pad = int(3 * blur) + 2
        length = rng.uniform(0.4, 1.0) * scene.size / coarse
        sprite = paint_blade(
            blade, length, tone, tone * 1.15, rng, bend=rng.uniform(-0.2, 0.2), pad=pad
        )
        sprite = cv2.GaussianBlur(sprite, (0, 0), blur / coarse)
        place = np.array([rng.uniform(0, 1), rng.uniform(0.8, 1.1)]) * scene.size
        stamp_ray(
            scene,
            sprite,
            place,
            -np.pi / 2 + rng.normal(0, 0.45),
            coarse * np.eye(2),
            pad=pad,
            head=False,
        )


def draw_stem(scene, rng, start, width, leaf, leaf_length):
    """A stem from the head (`start`) down out of the picture, with leaves of the class's kind."""
    size = scene.size
    green = (rng.uniform(0.22, 0.33), rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.6))
    foot = np.array([start[0] + rng.normal(0, 0.12) * size, 1.1 * size])
    middle = (start + foot) / 2 + (rng.normal(0, 0.05) * size, 0)
    steps = np.linspace(0, 1, 24)[:, None]
    curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * middle + steps**2 * foot

    for _ in range(rng.integers(1, 4)):
        at = curve[rng.integers(8, 22)]
        turn = rng.choice([-1, 1]) * rng.uniform(0.4, 1.2)
        tone = vary(green, rng)
        length = leaf_length * rng.uniform(0.75, 1.15) * size
        sprite = paint_blade(leaf, length, tone * 0.8, tone, rng, bend=rng.uniform(-0.15, 0.15))
        stamp_ray(scene, sprite, at, -np.pi / 2 + turn, np.eye(2), head=False)
    layer = np.zeros((size, size, 4), np.uint8)
    toward_light = scene.light * (1, 0) * width * 0.25
    for share, brightness in ((1.0, 0.55), (0.7, 0.8), (0.35, 1.05)):
        points = np.round((curve + toward_light * (1 - share)) * 16).astype(np.int32)
        colour = (*np.clip(rgb(*green) * brightness * 255, 0, 255).tolist(), 255)
        cv2.polylines(layer, [points], False, colour, max(1, int(width * share)), cv2.LINE_AA, 4)
    layer = cv2.GaussianBlur(layer, (0, 0), 0.8).astype(np.float32) / 255
    stamp(scene, layer, np.eye(2), np.zeros(2), np.zeros(2), head=False)


# ---------------------------------------------------------------- heads


@dataclass
class Head:
    """Where a flower head stands: centre and radius in pixels, foreshortening (2, 2), petal colours
    (RGB)."""

    centre: np.ndarray
    radius: float
    view: np.ndarray
    lean: np.ndarray  # vector from the rim's plane to what stands nearest to the camera, in radii
    base_colour: np.ndarray
    tip_colour: np.ndarray


def draw_petal_ring(scene, head, rng, blade, count, inner, outer, gain, shadow=0.3):
    """A ring of `count` petals from radius `inner` to `outer` (in head radii), in shuffled
    overlap."""
    length = (outer - inner) * head.radius
    sprites = [
        paint_blade(blade, length, head.base_colour, head.tip_colour, rng, bend=rng.normal(0, 0.06))
        for _ in range(4)
    ]
    angles = (np.arange(count) + rng.normal(0, 0.16, count) + rng.random()) * 2 * np.pi / count
    for angle in rng.permutation(angles):
        sprite = sprites[rng.integers(len(sprites))]
        place = head.centre + head.view @ rotation(angle)[:, 0] * inner * head.radius
        stretch = np.diag([rng.uniform(0.9, 1.08), rng.uniform(0.85, 1.1)])
        tilt = rotation(angle + rng.normal(0, 0.05)) @ stretch @ rotation(-angle)
        look = {"gain": gain * rng.uniform(0.9, 1.06), "shadow": shadow}
        stamp_ray(scene, sprite, place, angle, head.view @ tilt, **look)


def paint_disc(radius, count, colour, rim_colour, rng, light):
    """A dome of `count` florets along Fermat's spiral (Vogel 1979): premultiplied RGBA, float32."""
    size = int(2 * radius) + 6
    layer = np.zeros((size, size, 3), np.uint8)
    layer[:] = (np.clip(colour * 0.35, 0, 1) * 255).astype(np.uint8)
    grain = radius / np.sqrt(count)
    share = np.sqrt(np.arange(count, 0, -1) / count)[:, None]
    angle = (np.arange(count, 0, -1) * GOLDEN_ANGLE)[:, None]
    spots = size / 2 + share * (radius - grain) * np.hstack((np.cos(angle), np.sin(angle)))
    tones = (colour + (rim_colour - colour) * share**2) * rng.uniform(0.85, 1.1, (count, 1))
    glints = np.round((spots + 0.3 * grain * light) * 16).astype(int).tolist()
    bodies = np.round(spots * 16).astype(int).tolist()
    for body, glint, tone in zip(bodies, glints, (tones * 255).tolist(), strict=True):
        cv2.circle(layer, body, int(grain * 15), [0.75 * part for part in tone], -1, cv2.LINE_AA, 4)
        cv2.circle(
            layer,
            glint,
            int(grain * 8),
            [min(255, 1.25 * part) for part in tone],
            -1,
            cv2.LINE_AA,
            4,
        )
    axis = (np.arange(size, dtype=np.float32) - size / 2 + 0.5) / radius
    x, y = axis[None, :], axis[:, None]
    distance = np.sqrt(x**2 + y**2)
    dome = 0.95 + 0.25 * (x * light[0] + y * light[1]) - 0.3 * distance**4
    alpha = np.clip((1 - distance) * radius, 0, 1)
    return np.dstack((layer / np.float32(255) * (dome * alpha)[..., None], alpha)).astype(
        np.float32
    )


def draw_disc(scene, head, rng, radius, count, palette):
    """The seed head in the middle, raised towards the camera."""
    colour, rim_colour = (vary(palette[i], rng) for i in rng.integers(len(palette), size=2))
    turned = np.linalg.inv(head.view) @ scene.light
    sprite = paint_disc(
        radius * head.radius, count, colour, 0.5 * (colour + rim_colour), rng, turned
    )
    middle = np.full(2, sprite.shape[0] / 2)
    stamp(
        scene, sprite, head.view, middle, head.centre + 0.08 * head.radius * head.lean, shadow=0.5
    )


def draw_daisy(scene, head, rng):
    """Two rings of narrow, blunt petals around a small yellow-or-other disc."""
    disc = rng.uniform(0.24, 0.32)
    blade = replace(DAISY_PETAL, width=rng.uniform(0.22, 0.30))
    count = int(rng.integers(13, 19))
    draw_petal_ring(scene, head, rng, blade, count, 0.6 * disc, 1.0, gain=0.84)
    draw_petal_ring(scene, head, rng, blade, count - 2, 0.6 * disc, 0.95, gain=1.0)
    draw_disc(scene, head, rng, disc, int(rng.integers(90, 150)), DISC_COLOURS[:4])


def draw_sunflower(scene, head, rng):
    """Three rings of pointed petals around a wide disc of seeds."""
    disc = rng.uniform(0.42, 0.54)
    count = int(rng.integers(17, 24))
    for outer, gain in ((1.0, 0.74), (0.96, 0.88), (0.88, 1.0)):
        blade = replace(SUNFLOWER_PETAL, width=rng.uniform(0.34, 0.44))
        draw_petal_ring(scene, head, rng, blade, count, 0.85 * disc, outer, gain)
    draw_disc(scene, head, rng, disc, int(rng.integers(260, 420)), DISC_COLOURS[3:])


def draw_dandelion(scene, head, rng):
    """In flower, thin rays in ring upon ring to the very middle; three in ten are in seed."""
    if rng.random() < 0.3:
        draw_dandelion_clock(scene, head, rng)
        return
    for share in np.linspace(1, 0.15, 7).tolist():
        blade = replace(DANDELION_RAY, width=0.1 / share**0.6, depth=0.1 + 0.4 * share)
        shifted = replace(head, centre=head.centre + 0.15 * (1 - share) * head.radius * head.lean)
        count = int(13 + 24 * share)
        draw_petal_ring(
            scene, shifted, rng, blade, count, -0.02, share, 1.1 - 0.22 * share, shadow=0.2
        )


def paint_parachutes(size, centre, radius, rng):
    """Stalks and stars of hairs on a globe, the far half fainter: coverage in [0, 1], float32
    (size, size)."""
    layer = np.zeros((size, size), np.uint8)
    count, hairs = int(rng.integers(70, 110)), 14
    height = np.linspace(-0.99, 0.99, count)  # towards the camera
    angle = np.arange(count) * GOLDEN_ANGLE + rng.normal(0, 0.1, count)
    out = np.column_stack((np.cos(angle), np.sin(angle)))
    outward = out * np.sqrt(1 - height**2)[:, None]
    tips = centre + 0.82 * radius * outward
    stalks = np.stack((centre + 0.12 * radius * outward, tips), axis=1)
    spoke = np.arange(hairs) * 2 * np.pi / hairs + rng.random((count, 1))
    reach = 0.19 * radius * rng.uniform(0.85, 1.1, (count, hairs))
    tangent = np.column_stack((-out[:, 1], out[:, 0]))
    flat = np.maximum(0.25, np.abs(height))[:, None]  # stars near the rim are seen from the side
    hair = (reach * flat * np.cos(spoke))[..., None] * out[:, None] + (reach * np.sin(spoke))[
        ..., None
    ] * tangent[:, None]
    ends = tips[:, None] + hair + 0.1 * radius * outward[:, None]
    stars = np.stack((np.broadcast_to(tips[:, None], ends.shape), ends), axis=2)
    for half, brightness in ((height < 0, 90), (height >= 0, 150)):
        for lines, strength in ((stalks[half], 0.5), (stars[half].reshape(-1, 2, 2), 1.0)):
            cv2.polylines(
                layer,
                list(np.round(lines * 16).astype(np.int32)),
                False,
                brightness * strength,
                1,
                cv2.LINE_AA,
                4,
            )
    return layer / np.float32(255)


def draw_dandelion_clock(scene, head, rng):
    """In seed: a see-through globe of parachutes around a brown core."""
    size, radius = scene.size, head.radius
    axis = np.arange(size, dtype=np.float32)
    distance = np.hypot(axis[None, :] - head.centre[0], axis[:, None] - head.centre[1]) / radius
    haze = np.clip((1.0 - distance) * 6, 0, 1)
    alpha = np.clip(paint_parachutes(size, head.centre, radius, rng) + 0.28 * haze, 0, 0.95)
    tint = 0.75 + 0.25 * head.tip_colour
    sprite = np.dstack(
        (alpha[..., None] * tint * (1.05 - 0.15 * distance[..., None]), alpha)
    ).astype(np.float32)
    stamp(scene, sprite, np.eye(2), np.zeros(2), np.zeros(2))
    np.maximum(scene.layers[..., 3], haze, out=scene.layers[..., 3])
    core = paint_disc(
        0.11 * radius,
        40,
        vary((0.09, 0.5, 0.45), rng),
        vary((0.1, 0.4, 0.6), rng),
        rng,
        scene.light,
    )
    stamp(scene, core, np.eye(2), np.full(2, core.shape[0] / 2), head.centre)


def draw_rose(scene, head, rng):
    """A whorl: ever smaller, ever steeper petals, each a golden angle on from the last."""
    count = int(rng.integers(24, 32))
    start = rng.uniform(0, 2 * np.pi)
    coarse = 1.4  # soft petals need no more pixels than the finished photo has
    for index in range(count):
        share = 1 - index / count
        length = max(6.0, head.radius * (0.1 + 0.9 * share)) / coarse
        angle = start + index * GOLDEN_ANGLE + rng.normal(0, 0.12)
        width = rng.uniform(1.15, 1.4) + 0.5 * (
            1 - share
        )  # the inner petals wrap further around the heart
        blade = replace(ROSE_PETAL, width=width, depth=0.6 + 0.35 * (1 - share))
        sprite = paint_blade(
            blade, length, head.base_colour, head.tip_colour, rng, bend=rng.normal(0, 0.06)
        )
        place = head.centre + 0.3 * (1 - share) * head.radius * head.lean
        look = {"gain": rng.uniform(0.88, 1.06) * (0.8 + 0.2 * share), "shadow": 0.55}
        stamp_ray(scene, sprite, place, angle, coarse * head.view, **look)


def draw_tulip(scene, head, rng):
    """A cup from the side: three petals behind, two flanks, one in front; `centre` is the cup's
    middle."""
    height = 1.8 * head.radius
    lean = rng.normal(0, 0.2)
    upright = rotation(lean)
    foot = head.centre + upright @ np.array([0, 0.5 * height])
    spread, flare = rng.uniform(0.10, 0.30), rng.uniform(-0.16, 0.08)
    front = rng.uniform(-0.25, 0.25)
    blade = replace(TULIP_PETAL, width=rng.uniform(0.52, 0.64), tip=rng.uniform(0.5, 0.85))
    plan = (
        (-0.55, 0.90, 0.72),
        (0.55, 0.90, 0.72),
        (0.0, 0.97, 0.8),
        (-1.0, 0.97, 0.93),
        (1.0, 0.97, 0.93),
    )
    for side, share, gain in (*plan, (front, rng.uniform(0.83, 0.93), 1.04)):
        length = height * share * rng.uniform(0.96, 1.04)
        bend = side * (flare + rng.uniform(-0.04, 0.04))
        sprite = paint_blade(blade, length, head.base_colour, head.tip_colour, rng, bend=bend)
        place = foot + upright @ np.array([side * 0.07 * height, 0])
        lit = gain + 0.12 * side * scene.light[0]
        stamp_ray(scene, sprite, place, -np.pi / 2 + side * spread, upright, gain=lit, shadow=0.5)


DRAW_HEAD = {
    "daisy": draw_daisy,
    "dandelion": draw_dandelion,
    "rose": draw_rose,
    "sunflower": draw_sunflower,
    "tulip": draw_tulip,
}


# ---------------------------------------------------------------- the photo


def compose_head(class_name, size, rng):
    """Place, size, tilt and petal colours of the flower."""
    closed = class_name in ("rose", "tulip")  # more colour for the same radius
    radius = size * (rng.uniform(0.29, 0.37) if closed else rng.uniform(0.33, 0.42))
    room = max(0.03, 0.5 - radius / size)
    centre = size * (0.5 + np.clip(rng.normal(0, 0.5, 2), -1, 1) * room)
    if class_name == "tulip":
        centre[1] -= 0.02 * size  # room for the stem
    axis = rng.uniform(0, 2 * np.pi)
    view = rotation(axis) @ np.diag([rng.uniform(0.78, 1.0), 1.0]) @ rotation(-axis)
    lean = rotation(axis)[:, 0] * np.sqrt(1 - np.linalg.det(view) ** 2)
    shared = PETAL_COLOURS[:5]
    palette = {"dandelion": shared, "sunflower": shared[1:]}.get(class_name)
    if palette is None:
        palette = shared if rng.random() < 0.8 else PETAL_COLOURS
    tip_colour = vary(palette[rng.integers(len(palette))], rng)
    second = vary(shared[rng.integers(len(shared))], rng)
    base_colour = tip_colour**1.4 if rng.random() < 0.6 else 0.45 * tip_colour + 0.5 * second
    return Head(centre, radius, view, lean, base_colour, tip_colour)


def develop(picture, rng):
    """Camera and film: focus, exposure, colour temperature, vignette, grain. Returns RGB uint8
    (size, size, 3)."""
    size = picture.shape[0]
    picture = cv2.GaussianBlur(
        np.ascontiguousarray(picture), (0, 0), rng.uniform(0.25, 0.7) * size / 256 + 0.05
    )
    warmth = rng.normal(0, 0.06)
    balance = np.float32([1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth])
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    falloff = 1 - rng.uniform(0, 0.22) * (axis[None, :] ** 2 + axis[:, None] ** 2)
    picture = np.maximum(picture, 0) * (balance * rng.uniform(0.9, 1.25)) * falloff[..., None]
    picture = np.where(picture > 0.8, 0.8 + 0.2 * np.tanh((picture - 0.8) / 0.2), picture)
    grain = rng.standard_normal((size, size, 1), np.float32) * rng.uniform(0.003, 0.012)
    return np.clip((picture + grain) * 255 + 0.5, 0, 255).astype(np.uint8)


def draw_flower(class_name, rng, size):
    """Draw one flower: RGB uint8 (size, size, 3), and the boolean mask (size, size) of its head,
    stem left out."""
    canvas_size = int(size * SUPERSAMPLING)
    angle = rng.uniform(-np.pi, 0)
    light = np.array([np.cos(angle), np.sin(angle)])
    backdrop = paint_background(canvas_size, rng)
    scene = Scene(np.dstack((backdrop, np.zeros((canvas_size, canvas_size), np.float32))), light)
    head = compose_head(class_name, canvas_size, rng)
    draw_clutter(scene, rng, int(rng.integers(0, 5)), blur=rng.uniform(0.006, 0.02) * canvas_size)
    leaf_length = {"tulip": 0.75, "dandelion": 0.5}.get(class_name, 0.35)
    draw_stem(
        scene,
        rng,
        head.centre,
        rng.uniform(0.02, 0.045) * canvas_size,
        LEAVES[class_name],
        leaf_length,
    )
    DRAW_HEAD[class_name](scene, head, rng)
    draw_clutter(scene, rng, int(rng.random() < 0.2), blur=0.012 * canvas_size)
    layers = cv2.resize(scene.layers, (size, size), interpolation=cv2.INTER_AREA)
    return develop(layers[..., :3], rng), layers[..., 3] > 0.5


# ---------------------------------------------------------------- the folder


def encode_photo(task):
    """JPEG bytes of photo `number` (from 1) of a class; `task` is (class_name, number, size,
    seed)."""
    class_name, number, size, seed = task
    rng = np.random.default_rng([seed, CLASS_NAMES.index(class_name), number])
    photo, _ = draw_flower(class_name, rng, size)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def photo_path(folder, task):
    class_name, number, _, _ = task
    return folder / class_name / f"{class_name}_{number:04d}.jpg"


def prepare_worker():
    """One thread each, as there is one worker per core; the parent alone answers Ctrl-C."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def encode_photos(tasks):
    """Yield (task, JPEG bytes) in order, drawn on all cores when there are enough photos to pay for
    it."""
    workers = min(os.cpu_count() or 1, len(tasks) // 16)
    if workers < 2:
        yield from ((task, encode_photo(task)) for task in tasks)
        return
    with ProcessPoolExecutor(workers, initializer=prepare_worker) as pool:
        yield from zip(tasks, pool.map(encode_photo, tasks, chunksize=4), strict=True)


def check_folder(folder, tasks):
    """Raise ValueError unless the folder holds nothing but photos that this very command draws."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a new or empty folder")
    wanted = {photo_path(folder, task) for task in tasks}
    for path in folder.rglob("*"):
        expected = path in wanted or (
            path.is_dir() and path.parent == folder and path.name in CLASS_NAMES
        )
        if not expected and not path.name.startswith("."):
            raise ValueError(f"{path} is not drawn by this command: name a new or empty folder")
    for task, data in encode_photos([task for task in tasks if photo_path(folder, task).exists()]):
        if photo_path(folder, task).read_bytes() != data:
            raise ValueError(
                f"{photo_path(folder, task)} is another picture: name a new or empty folder"
            )


def write_photos(folder, tasks):
    """Draw the photos that the folder lacks; each appears under its name only when complete."""
    missing = [task for task in tasks if not photo_path(folder, task).exists()]
    for class_name in CLASS_NAMES:
        (folder / class_name).mkdir(parents=True, exist_ok=True)
    for task, data in encode_photos(missing):
        path = photo_path(folder, task)
        unfinished = path.with_name(f".{path.name}.part")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return len(missing)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw flower photos of five classes.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--per-class",
        type=int,
        default=120,
        metavar="N",
        help="photos of each class (default: 120)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="S",
        help="width and height in pixels (default: 256)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed draws other flowers (default: 0)"
    )
    options = parser.parse_args(arguments)
    if options.per_class < 1 or options.size < SMALLEST_SIZE or options.seed < 0:
        print(
            f"--per-class must be at least 1, --size at least {SMALLEST_SIZE}, --seed at least 0",
            file=sys.stderr,
        )
        return 2
    numbers = range(1, options.per_class + 1)
    tasks = [
        (class_name, number, options.size, options.seed)
        for class_name in CLASS_NAMES
        for number in numbers
    ]
    try:
        check_folder(options.folder, tasks)
        drawn = write_photos(options.folder, tasks)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{error.filename or options.folder}: {error.strerror}: choose another folder",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to draw the rest", file=sys.stderr)
        return 130
    print(f"{drawn} photos drawn, {len(tasks)} in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Procedural street scenes with Cityscapes' 19 classes: the dataset that needs no download.

A scene is a list of objects in metres (a car, a facade, a person) in front of a pinhole camera in a car. Objects are
made of polygons; all polygons of a scene are projected at once and painted back to front. Image and label are the four
channels of one canvas, and every polygon writes all four, so that labels always match the image.

World coordinates are in metres: x to the right of the road's middle, y up, z ahead of the camera. An object has its own
axes along, up and across, rotated about y: along points away from the camera at turn 0, and to the right at 90 degrees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segjax.data import specs

SPLITS = ("train", "val", "test")
MIN_SIZE = 32  # pixels; below it even a person at 6 m is less than two pixels wide

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, PLANT, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
IGNORE = specs.STREETS.ignore_label

SUPERSAMPLE = 2  # canvas pixels per image pixel along each axis, to antialias the image; labels are not blended
SHIFT = 4  # fractional bits of the corners that cv2 gets
NEAR = 0.8  # metres; nearer points are moved to this distance, below the picture's lower edge
LANE, PARKING, TRACK = 3.4, 2.4, 3.2  # widths, metres


class Mood(NamedTuple):
    tint: tuple[float, float, float]
    ambient: float  # light on every face
    direct: float  # light of the sun on a face towards it
    zenith: tuple[int, int, int]
    horizon: tuple[int, int, int]
    visibility: float  # metres over which contrast falls to 1/e
    cover: float  # 0..1, the clouds' share of the sky
    elevation: float  # tangent of the sun's elevation; large under clouds, to keep shadows below their objects


DAY = Mood((1.00, 1.00, 1.00), 0.68, 0.52, (72, 128, 205), (196, 218, 236), 420, 0.45, 0.9)
WARM = Mood((1.08, 1.00, 0.86), 0.60, 0.66, (92, 146, 208), (238, 226, 200), 280, 0.25, 0.5)
OVERCAST = Mood((0.94, 0.97, 1.02), 0.92, 0.08, (158, 166, 176), (206, 210, 215), 170, 0.85, 4.0)
DUSK = Mood((1.02, 0.84, 0.80), 0.62, 0.40, (66, 78, 132), (240, 166, 118), 190, 0.50, 0.4)
MOODS = (DAY, WARM, OVERCAST, DUSK)

# Per class, the standard deviations of fine and of coarse brightness noise, and the channel of the ground's texture.
GRAIN = np.full((256, 2), 0.02, np.float32)
GRAIN[PLANT] = 0.20, 0.14
GRAIN[[BUILDING, WALL]] = 0.03, 0.05
GRAIN[[ROAD, SIDEWALK, TERRAIN, SKY, IGNORE]] = 0.0
GROUND = np.full(256, 3)
GROUND[[ROAD, SIDEWALK, TERRAIN]] = 0, 1, 2

ASPHALT = ((106, 106, 109), (88, 89, 94), (122, 119, 116), (98, 96, 100))
PAVING = ((168, 162, 158), (150, 148, 150), (182, 170, 156), (162, 138, 130))
GRASS = ((112, 146, 66), (134, 150, 78), (92, 130, 62), (162, 150, 92), (142, 116, 82))
LEAVES = ((62, 98, 44), (78, 116, 52), (98, 118, 48), (50, 82, 50), (70, 108, 58), (150, 120, 44), (164, 92, 46))
BARK = ((84, 66, 52), (104, 90, 76))
PLASTER = (
    (164, 92, 74),
    (222, 208, 178),
    (150, 150, 152),
    (186, 152, 118),
    (120, 128, 140),
    (204, 168, 96),
    (226,) * 3,
)
ROOFS = ((128, 70, 54), (84, 82, 88), (104, 88, 78))
MASONRY = ((150, 146, 140), (176, 168, 152), (142, 92, 76), (124, 120, 118), (206, 200, 190))
PICKETS = ((232, 230, 226), (132, 96, 66), (84, 108, 88), (60, 62, 66), (176, 180, 184))
METAL = ((120, 124, 126), (92, 96, 98), (150, 152, 152), (78, 90, 84))
SILVER, NAVY = (160, 164, 168), (36, 62, 120)
CARS = ((226, 226, 228), (40, 42, 46), SILVER, NAVY, (164, 34, 34), (46, 84, 66), (196, 168, 62), (90, 132, 170))
LIVERY = ((236, 192, 40), (198, 40, 40), (40, 96, 172), (56, 140, 84), (230, 230, 226), (224, 120, 40), (120, 60, 130))
CLOTHES = ((40, 44, 60), (180, 48, 48), (60, 90, 150), (224, 220, 212), (96, 84, 72), (214, 170, 60), (30, 30, 32))
SKIN = ((232, 190, 160), (198, 148, 112), (140, 96, 70), (96, 66, 50))
HAIR = ((40, 30, 26), (96, 68, 44), (180, 150, 100), (150, 148, 146))
GLASS, TYRE, DARK, GREY, SHINE = (58, 70, 82), (34, 34, 36), (46, 46, 50), (142, 144, 148), (96, 116, 132)
RED, AMBER, GREEN, BLUE = (206, 38, 34), (244, 170, 40), (60, 220, 120), (30, 84, 176)
WHITE, BEAM = (240, 240, 236), (244, 240, 214)


# Shapes: corners (..., 2), (right, up), in metres or fractions of a face; (n, corners, 2) are n polygons of one colour.

CIRCLE = np.array([(math.cos(math.tau * i / 20), math.sin(math.tau * i / 20)) for i in range(20)])


def _disc(x, y, radius, height=None):
    return (x, y) + CIRCLE * (radius, height or radius)


def _rects(*bounds):
    return np.array([((x0, y0), (x1, y0), (x1, y1), (x0, y1)) for x0, y0, x1, y1 in bounds])


def _pair(x0, y0, x1, y1):
    """A rectangle and its mirror image on a face whose middle is 0.5: lamps, tyres."""
    return _rects((x0, y0, x1, y1), (1 - x1, y0, 1 - x0, y1))


def _bars(width, *ends):
    bars = []
    for x0, y0, x1, y1 in ends:
        scale = width / 2 / math.hypot(x1 - x0, y1 - y0)
        dx, dy = (y0 - y1) * scale, (x1 - x0) * scale
        bars.append(((x0 + dx, y0 + dy), (x0 - dx, y0 - dy), (x1 - dx, y1 - dy), (x1 + dx, y1 + dy)))
    return np.array(bars)


def _grid(x0, y0, x1, y1, nx, ny, share_x, share_y):
    """nx × ny rectangles that fill the given shares of their cells."""
    x, y = np.arange(nx) + (1 - share_x) / 2, np.arange(ny)[:, None] + (1 - share_y) / 2
    cells = np.empty((ny, nx, 4, 2))
    cells[..., 0] = x0 + (x1 - x0) / nx * (x[..., None] + np.array((0, share_x, share_x, 0)))
    cells[..., 1] = y0 + (y1 - y0) / ny * (y[..., None] + np.array((0, 0, share_y, share_y)))
    return cells.reshape(-1, 4, 2)


def _shrink(shapes, share):
    middle = shapes.mean(-2, keepdims=True)
    return middle + (shapes - middle) * share


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _tone(rng, palette):
    """A random colour of a palette, with random brightness and hue. Values may leave 0..255; painting clips them."""
    noise = rng.standard_normal(4) * 12.0
    return _pick(rng, palette) + noise[3] + noise[:3] / 3


# Objects are lists of faces. A face has a label and (shape, colour) pairs, the first of which is the whole face; its
# plane is an origin and two axes in (along, up, across). Solid faces are lit by the sun and visible only from their
# front.


class Face(NamedTuple):
    plane: tuple
    solid: bool
    label: int
    shapes: Sequence


def _cutout(label, *shapes):
    return [Face((0, 0, 0, 0, 0, 1, 0, 1, 0), False, label, shapes)]


def _solid(label, color, profile, half, side=(), skin=None):
    """Extrudes a profile ((along, up), ...), given from the rear foot over the top, to across = -half..half.

    Args:
      label: Label of all faces.
      color: Colour of all faces.
      profile: Points of the profile.
      half: Half of the width in metres.
      side: Details on the two profile faces, in (along, up).
      skin: i -> details on the face between points i and i + 1, in 0..1 across and 0..1 from i to i + 1.
    """
    faces = []
    for sign in (-1, 1):
        outline = np.array(profile[::-sign], float)
        faces.append(Face((0, 0, sign * half, 1, 0, 0, 0, 1, 0), True, label, [(outline, color), *side]))
    for i, ((a0, y0), (a1, y1)) in enumerate(itertools.pairwise(profile)):
        plane = (a0, y0, -half, 0, 0, 2 * half, a1 - a0, y1 - y0, 0)
        faces.append(Face(plane, True, label, [(_rects((0, 0, 1, 1)), color), *(skin or {}).get(i, ())]))
    return faces


def _person(rng):
    legs, top, skin, hair = (_tone(rng, palette) for palette in (CLOTHES, CLOTHES, SKIN, HAIR))
    size, stride, swing, dress, bag = rng.uniform((0.92, 0.1, 0.25, 0, 0), (1.1, 0.32, 0.42, 1, 1)).tolist()
    shapes = [
        (_bars(0.17, (-0.08, 0.85, -stride, 0.05), (0.08, 0.85, stride, 0.05)), legs),
        (_bars(0.12, (-0.2, 1.42, -swing, 0.82), (0.2, 1.42, swing, 0.82)), top * 0.82),
        (np.array(((-0.2, 0.8), (0.2, 0.8), (0.25, 1.42), (0.1, 1.5), (-0.1, 1.5), (-0.25, 1.42))), top),
        (_disc(0, 1.7, 0.13, 0.12), hair),
        (_disc(0, 1.63, 0.12, 0.15), skin),
    ]
    if dress < 0.25:
        shapes.append((np.array(((-0.3, 0.4), (0.3, 0.4), (0.19, 0.95), (-0.19, 0.95))), top * 0.9))
    if bag < 0.3:
        shapes.append((_rects((0.2, 0.6, 0.5, 0.95)), hair * 1.2))
    return _cutout(PERSON, *((shape * size, color) for shape, color in shapes))


# Two-wheelers are drawn from the side; rotated by 60 degrees or more, they look as if seen from behind.


def _bicycle(rng):
    frame, wheels = _tone(rng, LIVERY), np.stack((_disc(-0.54, 0.38, 0.38), _disc(0.54, 0.38, 0.38)))
    spokes = [(c - x, 0.38 - y, c + x, 0.38 + y) for c in (-0.54, 0.54) for x, y in CIRCLE[:10:3] * 0.32]
    thin = (-0.54, 0.38, -0.05, 0.36), (-0.54, 0.38, -0.2, 0.84), (0.54, 0.38, 0.36, 1.0)
    thick = (-0.05, 0.36, -0.22, 0.92), (-0.05, 0.34, 0.38, 0.8), (-0.2, 0.84, 0.4, 0.86)
    shapes = (wheels, TYRE), (_shrink(wheels, 0.8), GREY), (_bars(0.03, *spokes), WHITE)
    frames = (_bars(0.07, *thin), frame * 0.85), (_bars(0.09, *thick), frame)
    return _cutout(BICYCLE, *shapes, *frames, (_rects((-0.38, 0.92, -0.1, 1.0), (0.3, 1.0, 0.54, 1.06)), TYRE))


def _motorcycle(rng):
    body, wheels = _tone(rng, LIVERY), np.stack((_disc(-0.7, 0.33, 0.33), _disc(0.7, 0.33, 0.33)))
    tail = np.array(((-1.0, 0.86), (-0.95, 0.7), (-0.4, 0.55), (-0.15, 0.6), (-0.15, 0.82), (-0.5, 0.88)))
    tank = np.array(((-0.2, 0.6), (0.5, 0.55), (0.52, 0.85), (0.3, 1.02), (0.0, 0.98), (-0.2, 0.8)))
    fork, exhaust = (0.7, 0.33, 0.42, 1.05), (-0.9, 0.38, 0.1, 0.28)
    below = (wheels, TYRE), (_shrink(wheels, 0.45), GREY), (_rects((-0.4, 0.25, 0.36, 0.62)), (84, 86, 90))
    above = (tail, body * 0.8), (tank, body), (_rects((-0.75, 0.8, -0.1, 0.92), (0.2, 1.04, 0.46, 1.12)), TYRE)
    return _cutout(MOTORCYCLE, *below, (_bars(0.11, fork, exhaust), SILVER), *above, (_disc(0.58, 0.9, 0.12), BEAM))


def _rider(rng):
    """A rider on a bicycle or motorcycle."""
    machine = _bicycle(rng) if rng.random() < 0.6 else _motorcycle(rng)
    legs, top, skin, helmet = (_tone(rng, palette) for palette in (CLOTHES, CLOTHES, SKIN, LIVERY))
    return machine + _cutout(
        RIDER,
        (_bars(0.19, (-0.24, 1.02, 0.22, 0.74), (0.16, 0.8, 0.0, 0.36)), legs),
        (_bars(0.34, (-0.22, 0.96, 0.12, 1.56)), top),
        (_bars(0.13, (0.12, 1.5, 0.44, 1.1)), top * 0.85),
        (_disc(0.22, 1.74, 0.13, 0.15), skin),
        (_disc(0.18, 1.81, 0.17, 0.12), helmet),
    )


# Clumps of a tree's crown, in fractions of its width and height: x, y, half width, half height, brightness.
CLUMPS = np.array([(0, 0.5, 0.5, 0.5, 0.8), *((0, 0.25 + 0.14 * i, 0.24, 0.2, 0.62 + 0.145 * i) for i in range(5))])


def _plant(rng, width, height, trunk):
    """A tree, or a hedge if trunk is 0; trunk is the share of the height without leaves."""
    leaf, moved = _tone(rng, LEAVES), rng.uniform(-1, 1, (6, 1, 2)) * (0.28, 0.06)
    ragged = CIRCLE * (1 + 0.14 * rng.standard_normal((6, 20, 1)))
    moved[0] = 0
    crown = (CLUMPS[:, None, :2] + moved + ragged * CLUMPS[:, None, 2:4]) * (width, height * (1 - trunk))
    crown[..., 1] += height * trunk
    stem = [(_bars(0.055 * height, (0, 0, 0, height * 0.5)), _tone(rng, BARK))] if trunk else []
    return _cutout(PLANT, *stem, *((clump, leaf * c[4]) for clump, c in zip(crown, CLUMPS, strict=True)))


def _lamp(rng, s):
    height, reach, metal = rng.uniform(5.0, 7.5), -s * rng.uniform(1.2, 2.2), _tone(rng, METAL)
    arms = _bars(0.24, (0, 0, 0, height + 0.1), (0, height, reach, height + 0.3), (0, 0, 0, 0.9))
    head = _bars(0.3, (reach * 0.75, height + 0.25, reach * 1.3, height + 0.3))
    return _cutout(POLE, (arms, metal), (_rects((-0.22, 0, 0.22, 0.9)), metal * 0.8), (head, metal * 1.2))


def _traffic_light(rng, s):
    """A light on a pole, or on a mast with a second head over the lane. Heads of 1.5 m are visible at 128 pixels."""
    lit, foot, reach, mast = rng.uniform((0, 2.2, 3.0, 0), (3, 2.9, 4.2, 1)).tolist()
    heads, bars = [(0.0, foot)], [(0, 0, 0, foot + 1.5)]
    if mast < 0.4:
        heads, bars = [*heads, (-s * reach, 4.6)], [(0, 0, 0, 5.9), (0, 5.6, -s * reach, 5.8)]
    shapes: list = [(_rects(*((x - 0.31, y, x + 0.31, y + 1.5) for x, y in heads)), (24, 26, 26))]
    for i, color in enumerate((GREEN, AMBER, RED)):
        lamps = np.stack([_disc(x, y + 0.28 + 0.47 * i, 0.19) for x, y in heads])
        shapes.append((lamps, np.multiply(color, 1.0 if i == int(lit) else 0.28)))
    return _cutout(POLE, (_bars(0.24, *bars), _tone(rng, METAL))) + _cutout(LIGHT, *shapes)


TRIANGLE = np.array(((-1, -0.7), (1, -0.7), (0, 1.0)))
SIGNS = (
    ((CIRCLE, RED), (CIRCLE * 0.7, WHITE)),
    ((CIRCLE, RED), (_rects((-0.65, -0.22, 0.65, 0.22)), WHITE)),
    ((CIRCLE, BLUE), (_bars(0.35, (0, -0.6, 0, 0.6)), WHITE)),
    ((TRIANGLE, RED), (TRIANGLE * 0.6, WHITE)),
    ((CIRCLE[::5] * 1.2, WHITE), (CIRCLE[::5] * 0.9, (240, 200, 40))),
    ((_rects((-1, -0.9, 1, 1)), BLUE), (_rects((-0.4, -0.5, 0.4, 0.6)), WHITE)),
)


def _sign(rng):
    radius, y = rng.uniform((0.5, 2.2), (0.7, 2.8)).tolist()
    shapes = [(shape * radius + np.array((0, y)), color) for shape, color in _pick(rng, SIGNS)]
    return _cutout(POLE, (_bars(0.18, (0, 0, 0, y + radius * 0.5)), _tone(rng, METAL))) + _cutout(SIGN, *shapes)


# Vehicles, as (faces, length in metres). Along is 0 at the rear.


def _wheels(radius, *along):
    tyres = np.stack([_disc(a, radius, radius) for a in along])
    return [(tyres, TYRE), (_shrink(tyres, 0.55), GREY)]


# Points 2 to 5 of a car's profile are its cabin: rear foot, rear top, front top, front foot.
CAR_PROFILES = (
    ((0, 0.3), (0, 0.86), (0.7, 0.98), (1.15, 1.42), (2.35, 1.46), (3.15, 0.98), (4.3, 0.8), (4.4, 0.5), (4.4, 0.3)),
    ((0, 0.3), (0, 0.92), (0.1, 1.0), (0.5, 1.5), (2.3, 1.54), (3.05, 1.0), (3.9, 0.86), (4.05, 0.55), (4.05, 0.3)),
    ((0, 0.36), (0, 1.02), (0.08, 1.12), (0.4, 1.74), (2.8, 1.78), (3.5, 1.16), (4.5, 1.04), (4.65, 0.7), (4.65, 0.36)),
    ((0, 0.34), (0, 1.0), (0.05, 1.12), (0.2, 1.98), (3.3, 2.0), (4.05, 1.2), (4.7, 1.02), (4.85, 0.65), (4.85, 0.34)),
)


def _car(rng):
    profile, paint = _pick(rng, CAR_PROFILES), _tone(rng, CARS)
    (a2, y2), (a3, y3), (a4, y4), (a5, y5) = profile[2:6]
    length, pillar = profile[-1][0], (a3 + a4) / 2
    windows = ((a2 + 0.25, y2 + 0.03), (a3 + 0.14, y3 - 0.09), (a4 - 0.08, y4 - 0.1), (a5 - 0.28, y5 + 0.03))
    side = [
        (_rects((0.05, 0.36, length - 0.05, 0.48)), paint * 0.45),
        (np.array(windows), GLASS),
        (_rects((pillar, y2 + 0.03, pillar + 0.1, y4 - 0.1), (0.1, y2 - 0.14, length - 0.3, y2 - 0.1)), paint * 0.78),
        *_wheels(0.34, length * 0.19, length * 0.81),
    ]
    bumper, plate = (_rects((0.02, 0.02, 0.98, 0.3)), paint * 0.5), (_rects((0.38, 0.42, 0.62, 0.62)), WHITE)
    skin = {
        0: [(_pair(0.04, -0.5, 0.18, 0.1), TYRE), bumper, plate, (_pair(0.04, 0.6, 0.2, 0.92), RED)],
        2: [(_rects((0.1, 0.08, 0.9, 0.88)), GLASS)],
        4: [(_rects((0.08, 0.08, 0.92, 0.94)), GLASS)],
        6: [(_pair(0.04, 0.1, 0.22, 0.8), BEAM), (_rects((0.28, 0.1, 0.72, 0.85)), DARK)],
        7: [(_pair(0.04, 0.9, 0.18, 2.0), TYRE), (_rects((0.02, 0.5, 0.98, 0.95)), paint * 0.5), plate],
    }
    return _solid(CAR, paint, profile, 0.92, side, skin), length


def _truck(rng):
    cab, mark, box = _tone(rng, LIVERY), _tone(rng, LIVERY), _tone(rng, (WHITE, SILVER, NAVY, *MASONRY[:3]))
    length, top = rng.uniform((6.5, 3.1), (9.5, 3.7)).tolist()
    back = length - 2.3  # the cargo box's length
    side = [
        (_grid(0.1, 1.2, back - 0.1, top - 0.05, 9, 1, 0.06, 1), box * 0.82),
        (_rects((back * 0.2, top * 0.52, back * 0.75, top * 0.72)), mark),
    ]
    doors = [
        (_grid(0.03, 0.12, 0.97, 0.97, 2, 1, 0.94, 0.96), box * 0.86),
        (_pair(0.4, 0.2, 0.43, 0.9), box * 0.5),
        (_rects((0.0, 0.0, 1.0, 0.1)), WHITE),
        (_grid(0.0, 0.0, 1.0, 0.1, 8, 1, 0.5, 1.0), RED),
    ]
    under = [(_pair(0.04, -0.9, 0.24, 0.1), TYRE), (_pair(0.04, 0.35, 0.2, 0.75), RED)]
    nose = [(_rects((0.2, 0.1, 0.8, 0.5), (0, 0.85, 1, 1)), DARK), (_pair(0.05, 0.6, 0.22, 0.8), BEAM)]
    door = [(_rects((back + 0.8, 1.65, length - 0.35, 2.55)), GLASS), *_wheels(0.5, length - 1.0)]
    profile = ((back + 0.2, 0.5), (back + 0.2, 2.9), (length - 0.35, 2.95), (length - 0.05, 1.6), (length, 0.5))
    cabin = _solid(TRUCK, cab, profile, 1.22, door, {2: [(_rects((0.06, 0.12, 0.94, 0.95)), GLASS)], 3: nose})
    cargo = _solid(TRUCK, box, ((0, 0.95), (0, top), (back, top), (back, 0.95)), 1.25, side, {0: doors})
    frame = ((0.05, 0.45), (0.05, 0.94), (back + 0.2, 0.94), (back + 0.2, 0.45))
    return cargo + _solid(TRUCK, DARK, frame, 1.15, _wheels(0.5, 1.1, 2.2), {0: under}) + cabin, length


def _bus(rng):
    paint, band, length = _tone(rng, LIVERY), _tone(rng, LIVERY), rng.uniform(10.0, 12.0)
    side = [
        (_rects((0.05, 0.4, length - 0.05, 0.8)), band),
        (_rects((0.2, 1.38, length - 0.3, 2.62)), DARK),
        (_grid(0.3, 1.45, length - 0.4, 2.55, 7, 1, 0.93, 1), SHINE),
        (_rects(*((a, 0.45, a + 1.15, 2.55) for a in (length * 0.42, length - 1.7))), GLASS),
        *_wheels(0.5, 2.4, length - 2.6),
    ]
    rear = [
        (_rects((0.1, 0.48, 0.9, 0.82), (0.3, 0.86, 0.7, 0.95)), GLASS),
        (_rects((0.42, 0.88, 0.6, 0.93)), AMBER),
        (_grid(0.22, 0.1, 0.78, 0.34, 1, 4, 1, 0.5), paint * 0.6),
        (_pair(0.04, 0.14, 0.2, 0.4), RED),
        (_pair(0.04, -0.13, 0.2, 0.1), TYRE),
    ]
    glass, sign = _rects((0.04, 0.3, 0.96, 1.0), (0.12, 0.05, 0.88, 0.24)), _rects((0.25, 0.09, 0.75, 0.2))
    lamps, plate = _pair(0.04, 0.3, 0.2, 0.55), _rects((0.3, 0.1, 0.7, 0.4))
    nose = [(_rects((0, 0.6, 1, 0.95)), band), (lamps, BEAM), (plate, WHITE)]
    profile = ((0, 0.36), (0, 3.05), (length - 0.2, 3.1), (length, 1.2), (length, 0.36))
    return _solid(BUS, paint, profile, 1.28, side, {0: rear, 2: [(glass, GLASS), (sign, AMBER)], 3: nose}), length


def _tram(rng):
    paint, skirt, cars = _tone(rng, LIVERY), _tone(rng, (WHITE, DARK, SILVER)), int(rng.integers(2, 4))
    length = 8.0 * cars
    side = [
        (_rects((0.1, 0.35, length - 0.1, 0.95), (0.8, 3.05, length - 0.8, 3.2)), skirt),
        (_rects((0.6, 1.4, length - 0.6, 2.75)), skirt * 0.55),
        (_grid(1.0, 1.5, length - 1.0, 2.6, 5 * cars, 1, 0.86, 1), SHINE),
        (_grid(2.5, 0.5, length - 2.5, 2.6, 2 * cars, 1, 0.3, 1), GLASS),
        (_rects(*((8.0 * i - 0.25, 0.35, 8.0 * i + 0.25, 3.3) for i in range(1, cars))), DARK),
    ]
    low = [(_rects((0, 0, 1, 0.5)), skirt), (_disc(0.5, 0.72, 0.09, 0.2), WHITE), (_pair(0.04, 0.6, 0.2, 0.85), RED)]
    high = [(_rects((0.08, 0.1, 0.92, 0.8), (0.2, 0.86, 0.8, 0.97)), GLASS), (_rects((0.3, 0.88, 0.7, 0.95)), AMBER)]
    turned = [[(np.array((0, 1)) + shape * (1, -1), color) for shape, color in face] for face in (high, low)]
    profile = ((0.1, 0.3), (0, 1.2), (0.8, 3.35), (length - 0.8, 3.35), (length, 1.2), (length - 0.1, 0.3))
    crest = ((1.5, 3.35), (1.5, 3.75), (length - 1.5, 3.75), (length - 1.5, 3.35))
    body = _solid(TRAIN, paint, profile, 1.25, side, {0: low, 1: high, 3: turned[0], 4: turned[1]})
    return _solid(TRAIN, GREY, crest, 0.85) + body, length


VEHICLES = (_car, _truck, _bus, _tram)


# Objects along the street, as (faces, height in metres). Along is 0 at the street and grows away from it.


def _building(rng, length, depth, dusk):
    wall, trim, pane, awning = (_tone(rng, palette) for palette in (PLASTER, PLASTER, (GLASS, GREY, DARK), LIVERY))
    low, high = (2, 2.9, 1.9, -4.0, 0.4, 0.45, 0), (7, 3.5, 3.2, 3.5, 0.75, 0.68, 1)
    floors, storey, bay, ridge, wide, tall, shop = rng.uniform(low, high).tolist()
    floors, columns, doors = int(floors), max(2, int(length / bay)), max(1, int(length / 4.5))
    height = floors * storey + 0.8
    ground = storey / height  # the ground floor's share of the facade

    def windows(n):
        frames = _grid(0.02, ground, 0.98, floors * ground, n, floors - 1, wide, tall)
        panes = _shrink(frames, 0.82)
        lit = panes[rng.random(len(panes)) < (0.4 if dusk else 0.06)]
        return [(frames, trim), (panes, pane), *([(lit, (250, 206, 128) if dusk else SILVER)] if len(lit) else [])]

    street = [*windows(columns), (_rects((0, 0.97, 1, 1)), trim * 0.8)]
    if shop < 0.55:
        panes = _grid(0.02, 0.01, 0.98, ground * 0.8, doors, 1, 0.86, 0.9)
        street += [(panes, trim * 0.6), (_shrink(panes, 0.9), AMBER if dusk else GLASS)]
        street.append((_grid(0.02, ground * 0.72, 0.98, ground * 0.95, doors, 1, 0.92, 1), awning))
    else:
        street.append((_grid(0.02, 0.0, 0.98, ground * 0.7, doors, 1, 0.22, 1), trim * 0.5))
    ends = [(shape * (depth, height), color) for shape, color in windows(3)]
    profile, skin = [(0, 0), (0, height), (depth, height), (depth, 0)], {0: street}
    if ridge > 1.5:
        profile.insert(2, (depth / 2, height + ridge))
        skin[1] = [(_rects((0, 0, 1, 1)), _tone(rng, ROOFS))]
    return _solid(BUILDING, wall, profile, length / 2, ends, skin), height


def _barrier(rng, kind, length):
    """A wall of stones or a fence of pickets."""
    low, high, palette = ((2.2, 0), (3.8, 0), MASONRY) if kind == WALL else ((1.5, 0.28), (2.6, 0.5), PICKETS)
    (height, spacing), paint = rng.uniform(low, high).tolist(), _tone(rng, palette)
    if kind == WALL:
        rows, columns = int(height / 0.45), int(length / 1.1)
        stones = _grid(0, 0, 1, 0.9, columns, rows, 0.9, 0.82).reshape(rows, columns, 4, 2)
        stones[1::2, ..., 0] += 0.5 / columns  # every second course is shifted by half a stone
        front = [(stones.reshape(-1, 4, 2).clip(0, 1), paint * 1.1), (_rects((0, 0.9, 1, 1)), paint * 1.25)]
    else:
        front = [(_grid(0, 0.03, 1, 0.97, int(length / spacing), 1, 0.45, 1), paint * 1.1)]
        front.append((_rects((0, 0.2, 1, 0.28), (0, 0.8, 1, 0.88)), paint * 0.9))
        front.append((_grid(0, 0, 1, 1, int(length / 2.5), 1, 0.07, 1), paint * 0.8))
    profile, base = ((0, 0), (0, height), (0.2, height), (0.2, 0)), paint * (0.78 if kind == WALL else 0.35)
    return _solid(kind, base, profile, length / 2, (), {0: front}), height


# The street: positions of the objects.


class Camera(NamedTuple):
    focal: float  # picture heights
    height: float  # metres
    horizon: float  # share of the picture above it
    x: float  # metres right of the road's middle
    yaw: float  # tangent
    bend: float  # of the road, metres sideways per square of metres ahead

    def project(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """World metres to shares of a picture's width and height, for a picture twice as wide as it is high."""
        z = np.maximum(z, NEAR)
        x = x - self.x + z * (self.yaw + self.bend * z)
        return np.stack((0.5 + 0.5 * self.focal * x / z, self.horizon + self.focal * (self.height - y) / z), -1)


AHEAD = np.geomspace(NEAR, 400.0, 16)  # intermediate corners let a long strip follow the road's bend


def _strip(x0, x1):
    return np.column_stack((np.repeat((x0, x1), 16), np.concatenate((AHEAD, AHEAD[::-1]))))


class Street:
    """Objects as (x, z, sine and cosine of turn, depth), footprints as (object, along 0 and 1, half width, height)."""

    def __init__(self):
        self.objects, self.owners, self.faces, self.footprints = [], [], [], []

    def put(
        self,
        faces: Sequence[Face],
        x: float,
        z: float,
        turn: float = 0.0,
        depth: float | None = None,
        foot: tuple[float, float, float, float] = (-0.15, 0.15, 0.25, 1.7),
    ) -> None:
        """Places an object at (x, z). Larger depths are painted first; foot is the block that casts its shadow."""
        self.footprints.append((len(self.objects), *foot))
        self._add(faces, x, z, turn, z if depth is None else depth)

    def lay(self, shape: np.ndarray, color: Sequence[float] | np.ndarray, label: int) -> None:
        """Paints a shape in (x, z) on the ground."""
        self._add([Face((0, 0, 0, 0, 0, 1, 1, 0, 0), False, label, [(shape, color)])], 0, 0, 0.0, math.inf)

    def _add(self, faces, x, z, turn, depth):
        self.owners += [len(self.objects)] * len(faces)
        self.faces += faces
        self.objects.append((x, z, math.sin(turn), math.cos(turn), depth))


# Chances of building, wall, fence and hedge behind the sidewalk, and ranges of verge, sidewalk and yard in metres.
DISTRICTS = (
    ((0.56, 0.20, 0.19, 0.05), (0.0, 2.4, 0.0), (0.0, 4.5, 0.0)),
    ((0.25, 0.25, 0.35, 0.15), (0.5, 1.8, 1.0), (2.5, 2.8, 5.0)),
    ((0.08, 0.26, 0.34, 0.32), (1.0, 1.6, 3.0), (3.0, 2.8, 7.0)),
)


def _backdrop(street, rng, s, back, odds, crossing, dusk):
    """Closes the view on one side, s = -1 or 1, `back` metres from the road's middle."""
    turn, z = s * math.pi / 2, rng.uniform(3, 7)
    while z < 75:
        kind, length = (BUILDING, WALL, FENCE, PLANT)[rng.choice(4, p=odds)], rng.uniform(8, 16)
        if z < crossing + 8:  # only up to the side street
            length = min(length, crossing - 1.5 - z)
            if length < 4:
                z = crossing + 8
                continue
        middle, end = z + length / 2, z + length
        if kind == PLANT:
            for ahead in np.arange(0.5, length, 3.4):
                width, height = rng.uniform((3.4, 1.2), (5.0, 2.8)).tolist()
                street.put(_plant(rng, width, height, 0), s * (back + 0.5), z + ahead, foot=(-1, 1, width / 2, height))
        else:
            faces, height = _building(rng, length, 10.0, dusk) if kind == BUILDING else _barrier(rng, kind, length)
            street.put(faces, s * back, middle, turn, end, (0, 0.3, length / 2, height))
        if kind != BUILDING and rng.random() < 0.4:  # a building behind low objects
            faces, height = _building(rng, length * 0.8, 9.0, dusk)
            street.put(faces, s * (back + rng.uniform(4, 9)), middle, turn, end + 1, (0, 9, length * 0.4, height))
        elif kind != BUILDING:
            for ahead in np.arange(2.0, length, rng.uniform(4, 7)):
                _tree(street, rng, s * (back + rng.uniform(2, 6)), z + ahead, 8.0)
        z = end + rng.choice((0, 0, 5.0))


def _tree(street, rng, x, z, height):
    height, slim, trunk = (rng.uniform((0.75, 0.45, 0.1), (1.25, 0.7, 0.4)) * (height, 1, 1)).tolist()
    street.put(_plant(rng, slim * height, height, trunk), x, z, foot=(-1.2, 1.2, slim * height * 0.35, height * 0.8))


def _row(rng, start, gap, crossing):
    """Distances of trees or lamps in a row along the road, none in the side street."""
    ahead = np.arange(start + gap * rng.random(), 70, gap * rng.uniform(0.75, 1.25))
    return ahead[(ahead < crossing - 1) | (ahead > crossing + 8)]


def _roadside(street, rng, s, edge, crossing, dusk):
    """Fills one side of the road, s = -1 left or 1 right, from the kerb at `edge` metres outwards."""
    odds, low, high = _pick(rng, DISTRICTS)
    verge, walk, yard = rng.uniform(low, high).tolist()
    x1, x2 = edge + verge, edge + verge + walk
    paving, grass = _tone(rng, PAVING), _tone(rng, GRASS)
    street.lay(_strip(s * edge, s * 200), grass, TERRAIN)
    street.lay(_strip(s * x1, s * (x2 if yard else x2 + 9)), paving, SIDEWALK)
    street.lay(_strip(s * edge, s * (edge + 0.18)), paving * 1.12, SIDEWALK)
    _backdrop(street, rng, s, x2 + yard, odds, crossing, dusk)

    trees, lamps, light = rng.random(3) < (0.6, 0.75, 0.45)
    for z in _row(rng, 7, 11, crossing) if trees else ():
        _tree(street, rng, s * (edge + 0.8 + 0.5 * verge), z, 6.5)
    for z in _row(rng, 6, 17, crossing) if lamps else ():
        street.put(_lamp(rng, s), s * (edge + 0.45), z, foot=(-0.1, 0.1, 0.1, 5.0))
    if light:
        street.put(_traffic_light(rng, s), s * (edge + 0.5), rng.uniform(7, 15), foot=(-0.1, 0.1, 0.15, 3.5))
    for _ in range(rng.integers(0, 3)):
        street.put(_sign(rng), s * (edge + 0.7), rng.uniform(6, 20), foot=(-0.1, 0.1, 0.1, 3.0))
    for _ in range(rng.poisson(2.2)):
        street.put(_person(rng), s * rng.uniform(x1 + 0.3, x2 - 0.3), 5.5 + rng.exponential(9))
    for make, chance in ((_bicycle, 0.35), (_motorcycle, 0.25)):  # parked
        for z in rng.uniform(6, 14, rng.integers(1, 4) * (rng.random() < chance)):
            x, turn = rng.uniform(x1 + 0.2, x1 + 1.2), rng.normal(0, 0.5)
            street.put(make(rng), s * x, z, turn, foot=(-0.1, 0.1, 0.6, 1.0))


def _drive(street, rng, x, z, turn, odds):
    """Places a vehicle with its nearer end at z, or its middle at x if it crosses; returns its length in metres."""
    faces, length = VEHICLES[rng.choice(4, p=odds)](rng)
    x, start = x - math.sin(turn) * length / 2, z + length * (turn == math.pi)
    street.put(faces, x, start, turn, z, (0, length, 1.0, 1.5 if length < 5 else 3.2))
    return length


def _lane(street, rng, x, turn, z, gap, odds):
    """Fills a lane from z on with vehicles; `gap` is the mean gap in metres."""
    while z < 70:
        z += _drive(street, rng, x + rng.normal(0, 0.15), z, turn, odds) + 1.0 + rng.exponential(gap)


def _markings(street, rng, edges, track, crossing):
    paint, asphalt = np.array(WHITE) * rng.uniform(0.8, 0.98), _tone(rng, ASPHALT)
    street.lay(_strip(-edges[0], edges[1]), asphalt, ROAD)
    for x in (0.25 - edges[0], edges[1] - 0.25):
        street.lay(_strip(x - 0.06, x + 0.06), paint, ROAD)
    if crossing > 0:
        street.lay(_rects((-90, crossing - 1, 90, crossing + 7)), asphalt, ROAD)
        bars = [(x, crossing - 4.0, x + 0.5, crossing - 1.5) for x in np.arange(0.4 - edges[0], edges[1] - 0.6, 0.95)]
        street.lay(_rects(*bars), paint, ROAD)
    dash, gap = rng.uniform(2, 4), rng.uniform(3, 5)
    for x in (-track / 2, track / 2) if track else (0.0,):
        dashes = [(x - 0.07, z, x + 0.07, z + dash) for z in np.arange(max(2.0, crossing + 8), 80, dash + gap)]
        street.lay(_rects(*dashes), paint, ROAD)
    for x in (-0.72, 0.72) if track else ():  # rails
        street.lay(_strip(x - 0.05, x + 0.05), asphalt * 0.5, ROAD)
        street.lay(_strip(x + 0.05, x + 0.1), GREY, ROAD)


def _layout(rng, dusk):
    """Draws a street with all its objects, and the camera."""
    street, track = Street(), TRACK * (rng.random() < 0.35)
    parking = PARKING * (rng.random(2) < 0.6)
    edges = track / 2 + LANE + parking  # left and right kerb, metres from the middle
    ours = track / 2 + LANE / 2  # middle of the camera's lane
    low, high = (1.25, 1.4, 0.42, ours - 0.4, -0.12, -0.002), (1.6, 2.0, 0.52, ours + 0.4, 0.12, 0.002)
    camera = Camera(*rng.uniform(low, high).tolist())
    crossing = rng.uniform(9, 16) if rng.random() < 0.5 else -math.inf  # a side street's near kerb
    for s, edge in zip((-1, 1), edges.tolist(), strict=True):
        _roadside(street, rng, s, edge, crossing, dusk)
    _markings(street, rng, edges, track, crossing)

    if crossing > 0:
        if rng.random() < 0.55:
            turn = _pick(rng, (-1, 1)) * math.pi / 2
            _drive(street, rng, rng.uniform(-4, 7), crossing + 2.5, turn, (0.22, 0.26, 0.26, 0.26))
        for _ in range(rng.integers(1, 4)):
            x, z = rng.uniform((-edges[0], crossing - 4.0), (edges[1], crossing - 1.5)).tolist()
            if rng.random() < 0.45:
                street.put(_person(rng), x, z)
            else:
                turn = _pick(rng, (0.0, math.pi)) + rng.uniform(-0.5, 0.5)
                street.put(_rider(rng), x, z, turn, foot=(-0.15, 0.15, 0.6, 1.6))
    mixed, clear = (0.60, 0.20, 0.20, 0.0), crossing + 8  # where the lanes begin
    _lane(street, rng, ours, 0.0, max(clear, rng.uniform(9, 24)), 14, mixed)
    _lane(street, rng, -ours, math.pi, max(clear, rng.uniform(5, 20)), 12, mixed)
    if track and rng.random() < 0.8:
        _lane(street, rng, 0.0, _pick(rng, (0.0, math.pi)), max(clear, rng.uniform(7, 16)), 60, (0, 0, 0, 1))
    for x, turn, free in zip((-1, 1) * (edges - PARKING / 2), (math.pi, 0.0), parking, strict=True):
        if free:
            _lane(street, rng, x, turn, max(clear, rng.uniform(5, 14)), 4, (0.88, 0.12, 0.0, 0.0))
    if rng.random() < 0.5:  # a rider next to the traffic, in its direction, but not seen edge-on
        s, turn = _pick(rng, (-1, 1)), rng.uniform(0.5, 1.15)
        x = s * ((edges - parking)[(s + 1) // 2] - 0.7)
        street.put(_rider(rng), x, rng.uniform(5.5, 10), math.pi + s * turn, foot=(-0.15, 0.15, 0.6, 1.6))

    for x in np.arange(-230, 230, 24.0):  # the far end of the town
        if rng.random() < 0.6:
            street.put(_building(rng, 27.0, 10.0, dusk)[0], x, rng.uniform(150, 170), 0.0)
        else:
            street.put(_plant(rng, 32.0, rng.uniform(8, 14), 0), x, 149)
    return street, camera


# The picture.


def _pixels(shares, size):
    """Converts fractions of a picture's width and height to cv2's fixed point, with 0 at the first pixel's centre."""
    height, width = size
    pixels = shares * (width, height) - 0.5
    return np.rint(pixels.clip(-20 * width, 20 * width) * (1 << SHIFT)).astype(np.int32)


def _paint(street, camera, mood, sun, canvas):
    """Projects, lights and paints a street onto canvas, uint8 (H, W, 4): RGB and label."""
    import cv2

    x0, z0, sine, cosine, depth = np.array(street.objects)[street.owners].T  # each (F,), per face
    solid = np.array([face.solid for face in street.faces])
    label = np.array([face.label for face in street.faces])
    along, up, across = np.moveaxis(np.array([face.plane for face in street.faces], float).reshape(-1, 3, 3), 2, 0)
    sine, cosine = sine[:, None], cosine[:, None]
    plane = np.stack((along * sine + across * cosine, up, along * cosine - across * sine), 2)  # in x, y, z
    plane[:, 0, 0] += x0
    plane[:, 0, 2] += z0

    # Parts are the (shape, colour) pairs of all faces; a part's corners begin at `first`, a face's parts at `leader`.
    parts = [part for face in street.faces for part in face.shapes]
    counts = np.array([len(face.shapes) for face in street.faces])
    leader, face = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
    sides, corners = np.array([(shape.shape[-2], shape.size // 2) for shape, _ in parts]).T
    first = np.cumsum(corners) - corners
    points = np.concatenate([shape.reshape(-1, 2) for shape, _ in parts])
    planes = plane[np.repeat(face, corners)]
    world = planes[:, 0] + points[:, :1] * planes[:, 1] + points[:, 1:] * planes[:, 2]
    shares = camera.project(*world.T)

    a, b, c = (shares[first[leader] + i] for i in range(3))  # clockwise on a face that faces the camera
    facing = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) < (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    distance = (np.add.reduceat(world[:, 2], first) / corners)[leader]
    normal = np.cross(plane[:, 1], plane[:, 2])
    eye = np.array((camera.x, camera.height, 0.0)) - world[first[leader]]
    normal *= np.sign((normal * eye).sum(1, keepdims=True)) / np.linalg.norm(normal, axis=1, keepdims=True)
    light = mood.ambient + mood.direct * np.where(solid, np.maximum(normal @ sun, 0.0), 0.6)
    haze = np.where(np.isinf(depth), 0.0, 1 - np.exp(-np.maximum(distance, 0.0) / mood.visibility))[face, None]
    color = np.array([color for _, color in parts], float) * light[face, None]
    color = (color + (np.array(mood.horizon) - color) * haze).clip(0, 255)
    color = np.column_stack((color, label[face]))

    low, high = np.minimum.reduceat(shares, first), np.maximum.reduceat(shares, first)
    seen = (high > 0).all(1) & (low < 1).all(1) & (np.maximum.reduceat(world[:, 2], first) > NEAR)
    seen &= (facing | ~solid)[face]
    order = np.lexsort((np.arange(len(face)), (-distance * solid)[face], np.array(street.owners)[face], -depth[face]))
    pixels = _pixels(shares, canvas.shape[:2])
    for i in order[seen[order]]:
        polygons = pixels[first[i] : first[i] + corners[i]].reshape(-1, sides[i], 2)
        cv2.fillPoly(canvas, polygons, tuple(color[i]), shift=SHIFT)


def _shadows(street, camera, sun, size):
    """Shadows on the ground, float32 (H, W); 1 is full shadow."""
    import cv2

    owner, along0, along1, half, height = np.array(street.footprints).T[..., None]
    x0, z0, sine, cosine, _ = np.array(street.objects)[owner[:, 0].astype(int)].T[..., None]
    along, across = np.hstack((along0, along0, along1, along1)), half * (-1, 1, 1, -1)
    x, z = x0 + along * sine + across * cosine, z0 + along * cosine - across * sine
    x, z = np.hstack((x, x - height * sun[0] / sun[1])), np.hstack((z, z - height * sun[2] / sun[1]))
    shade = np.zeros(size, np.uint8)
    for corners in _pixels(camera.project(x, 0.0, z), size):
        cv2.fillConvexPoly(shade, cv2.convexHull(corners), 255, shift=SHIFT)
    return cv2.GaussianBlur(shade, (0, 0), size[0] / 160).astype(np.float32) / 255


def _noise(rng, size, *grids):
    """Mean of normal noise on grids of (rows, columns), each upsampled to the picture, float32 (H, W)."""
    import cv2

    fields = [rng.standard_normal(grid, dtype=np.float32) for grid in grids]
    return np.add.reduce([cv2.resize(field, size[::-1], interpolation=cv2.INTER_CUBIC) for field in fields]) / len(
        grids
    )


def _sky(rng, camera, mood, size):
    """Sky from zenith to horizon with clouds, float32 (H, W, 3)."""
    zenith, horizon = np.array(mood.zenith, np.float32), np.array(mood.horizon, np.float32)
    t = np.linspace(0, 1 / camera.horizon, size[0], dtype=np.float32).clip(0, 1)[:, None, None] ** 1.4
    clear = zenith + (horizon - zenith) * t
    cloud = _noise(rng, size, (10, 6), (24, 16), (56, 40))[..., None]
    return clear + (horizon * 0.5 + 118 - clear) * (1.4 * cloud + 1.5 * mood.cover - 0.8).clip(0, 0.85)


def _ground(rng, camera, mood, size):
    """Brightness of road, sidewalk, terrain and the rest in perspective, (H, W, 4), and haze (H, 1), float32."""
    import cv2

    tile = rng.standard_normal((128, 128, 3), dtype=np.float32) * np.array((0.07, 0.045, 0.16), np.float32)  # 8 × 8 m
    tile += cv2.resize(rng.standard_normal((16, 16, 3), dtype=np.float32) * 0.05, (128, 128))
    tile[::16, :, 1] -= 0.25  # joints between slabs of 1 m
    tile[:, ::16, 1] -= 0.25
    v, u = ((np.arange(n) + 0.5) / n for n in size)
    z = (camera.focal * camera.height / np.maximum(v - camera.horizon, 1e-3))[:, None]
    x = (u - 0.5) * z * 2 / camera.focal + camera.x - z * (camera.yaw + camera.bend * z)
    maps = np.stack((x, np.broadcast_to(z, size))).astype(np.float32) * (128 / 8)
    texture = np.zeros((*size, 4), np.float32)
    texture[..., :3] = cv2.remap(tile, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    near = np.minimum(1, 14 / z).astype(np.float32)  # farther off, the texture is finer than a pixel
    return 1 + texture * near[..., None], (1 - np.exp(-z / mood.visibility)).astype(np.float32)


def _bonnet(rng, canvas):
    """The camera's own car along the lower edge."""
    import cv2

    rise, middle = rng.uniform((0.02, 0.46), (0.045, 0.54))
    paint = _tone(rng, CARS)
    for size in (1.0, 0.8, 0.55):  # brighter towards the windscreen
        arc = np.array((middle, 1.0)) - CIRCLE * (0.5 * size**0.5, rise * size)
        color = (paint * (1.2 - 0.6 * size)).clip(0, 255)
        cv2.fillPoly(canvas, _pixels(arc[None], canvas.shape[:2]), (*color.tolist(), IGNORE), shift=SHIFT)


def scene(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws one street.

    Args:
      seed: Seed of the dataset, not negative.
      index: Number of the scene, not negative. A scene depends only on (seed, index).
      size: (height, width) in pixels, at least MIN_SIZE each. The layout is the same at every size: that of a picture
        twice as wide as it is high, stretched.

    Returns:
      Image, RGB, uint8 (H, W, 3), and labels, uint8 (H, W): train ids of specs.STREETS, and its ignore label on the
      car's own bonnet and along the border.

    Raises:
      ValueError: `size` is too small, or `seed` or `index` is negative.
    """
    import cv2

    height, width = size
    if min(size) < MIN_SIZE:
        raise ValueError(f"streets: {height} × {width} pixels are too few to draw on; use at least {MIN_SIZE} each way")
    if seed < 0 or index < 0:
        raise ValueError(f"streets: seed {seed} and index {index} must not be negative; count both from 0")
    rng = np.random.default_rng([seed, index])
    mood = _pick(rng, MOODS)
    street, camera = _layout(rng, mood is DUSK)
    azimuth = rng.uniform(-math.pi, math.pi)
    sun = np.array((math.sin(azimuth), mood.elevation, math.cos(azimuth))) / math.hypot(1.0, mood.elevation)

    canvas = np.empty((height * SUPERSAMPLE, width * SUPERSAMPLE, 4), np.uint8)
    canvas[..., :3] = cv2.resize(_sky(rng, camera, mood, size), canvas.shape[1::-1])
    canvas[..., 3] = SKY
    _paint(street, camera, mood, sun, canvas)
    _bonnet(rng, canvas)
    label = canvas[1::SUPERSAMPLE, 1::SUPERSAMPLE, 3].copy()
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)[..., :3].astype(np.float32)

    # The ground is too large for one shade; its texture, shadows and haze are computed per pixel.
    texture, haze = _ground(rng, camera, mood, size)
    ground = GROUND[label]
    brightness = np.take_along_axis(texture, ground[..., None], 2)[..., 0]
    sunlight = 0.6 * mood.direct / (mood.ambient + 0.6 * mood.direct)  # its share of the light on the ground
    brightness *= 1 - (0.2 + 0.7 * sunlight) * _shadows(street, camera, sun, size) * (ground < 3)
    fine, coarse = _noise(rng, size, (128, 256)), _noise(rng, size, (32, 64))
    brightness *= 1 + GRAIN[label, 0] * fine + GRAIN[label, 1] * coarse
    image *= brightness[..., None]
    image += (np.array(mood.horizon, np.float32) - image) * (haze * (ground < 3))[..., None]

    # The camera: exposure, saturation, focus in pixels, sensor noise in grey levels.
    exposure, saturation, focus, sensor = rng.uniform((0.9, 0.75, 0.3, 1.5), (1.2, 1.15, 0.6, 5.0)).tolist()
    grey = image.mean(2, keepdims=True)
    image = (grey + (image - grey) * saturation) * (np.array(mood.tint, np.float32) * exposure)
    image = cv2.GaussianBlur(image, (0, 0), focus)
    image += sensor * rng.standard_normal((height, width, 3), dtype=np.float32)
    border = max(1, height // 128)  # one pixel in 128, as in rectified pictures
    label[:border], label[:, :border], label[:, -border:] = IGNORE, IGNORE, IGNORE
    return np.rint(image).clip(0, 255).astype(np.uint8), label


def load(split: str, *, num_images: int, size: tuple[int, int], seed: int) -> specs.Split:
    """Draws the first `num_images` scenes of a split, of `size` (height, width) in pixels.

    The splits share no scene: the first split has the scenes 0, 3, 6, ... of a seed, the second 1, 4, 7, ... Names are
    streets_val_000012 and the like, and count within the split.

    Raises:
      ValueError: `split` is not in SPLITS, `num_images` is less than 1, or `size` or `seed` is invalid for `scene`.
    """
    if split not in SPLITS:
        raise ValueError(f"streets: no split '{split}'; use one of {', '.join(SPLITS)}")
    if num_images < 1:
        raise ValueError(f"streets: num_images is {num_images}; ask for at least one")
    indices = range(SPLITS.index(split), len(SPLITS) * num_images, len(SPLITS))
    images, labels = (np.stack(arrays) for arrays in zip(*(scene(seed, i, size) for i in indices), strict=True))
    sizes = np.tile(np.array(size, np.int32), (num_images, 1))
    return specs.Split(images, labels, sizes, tuple(f"streets_{split}_{i:06d}" for i in range(num_images)))

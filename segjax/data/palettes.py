"""Coloured masks, RGB or with a palette: the colours of a mask, and the label of each colour.

The colours of classes.json are tried first, then known palettes, whose classes are found by name: Cityscapes (labels.py
of cityscapesScripts), VOC (its development kit), ADE20K (color150) and CamVid (label_colors.txt, whose classes form
SegNet's 11 groups). All masks of a data set are read by one palette, so that a colour has one meaning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from segjax.data import specs
from segjax.data.codec import StoredMask
from segjax.data.sources import Problems

_SHOWN = 10  # number of unknown colours of a mask that are kept with their pixels and places
_SEVERAL = -1  # label of a colour that several classes have
# Class of a colour that a benchmark does not evaluate.
_IGNORED = ""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)

Color = tuple[int, int, int]


class Palette(NamedTuple):
    """Labels by colour.

    Attributes:
      name: Origin of the colours, for messages.
      labels: Colour as 0xRRGGBB -> label, or `_SEVERAL`.
    """

    name: str
    labels: dict[int, int]

    def of(self, colors: np.ndarray) -> np.ndarray:
        """Labels, uint16 (...), of colours (...) as 0xRRGGBB, all of which the palette must have."""
        keys = np.array(sorted(self.labels))
        return np.array([self.labels[key] for key in keys.tolist()], np.uint16)[np.searchsorted(keys, colors)]


# -------------------------------------------------------------------------------------------------------- known colours

# Labels of Cityscapes that are not evaluated; pole groups and licence plates have the colours of poles and cars.
_CITYSCAPES = """
    dynamic 6f4a00, ground 510051, parking faaaa0, rail track e6968c, guard rail b4a5b4, bridge 966464, tunnel 96785a,
    caravan 00005a, trailer 00006e
"""
# SegNet's class -> the classes of CamVid that belong to it.
_CAMVID = {
    "building": "archway c00080, bridge 008040, tunnel 400040, wall 40c000",
    "pole": "column_pole c0c080, trafficcone 000040",
    "road": "lanemkgsdriv 8000c0, lanemkgsnondriv c00040",
    "pavement": "sidewalk 0000c0, parkingblock 40c080, roadshoulder 8080c0",
    "tree": "vegetationmisc c0c000",
    "sign_symbol": "signsymbol c08080, misc_text 808040, trafficlight 004040",
    "car": "suvpickuptruck 4080c0, truck_bus c080c0, train c04080, othermoving 804040",
    "pedestrian": "child c08040, cartluggagepram 4000c0, animal 408040",
    "bicyclist": "motorcyclescooter c000c0",
}


class _Entry(NamedTuple):
    """A colour of a palette: its class there, and the class it counts as if a data set lacks that class."""

    name: str
    color: Color
    otherwise: str | None = None


def _entries(text: str, otherwise: str) -> list[_Entry]:
    return [_Entry(name, color, otherwise) for name, color in specs.named_colors(text).items()]


def _evaluated(spec: specs.DatasetSpec) -> list[_Entry]:
    return [_Entry(name, color) for name, color in zip(spec.class_names, spec.colors, strict=True)]


KNOWN = {
    "Cityscapes": [
        *_evaluated(specs.CITYSCAPES),
        *_entries(_CITYSCAPES, _IGNORED),
        _Entry("unlabeled", _BLACK, _IGNORED),
    ],
    "VOC": [*_evaluated(specs.VOC), _Entry("border", (224, 224, 192), _IGNORED)],
    "ADE20K": [*_evaluated(specs.ADE20K), _Entry("unlabeled", _BLACK, _IGNORED)],
    "CamVid": [
        *_evaluated(specs.CAMVID),
        *(entry for group, text in _CAMVID.items() for entry in _entries(text, group)),
        _Entry("void", _BLACK, _IGNORED),
    ],
}


def known_colors(names: Sequence[str]) -> list[Color] | None:
    """Colours of the classes in the first known palette that has all of their names; None if none has."""
    for entries in KNOWN.values():
        colors = {_plain(entry.name): entry.color for entry in reversed(entries)}
        if all(_plain(name) in colors for name in names):
            return [colors[_plain(name)] for name in names]
    return None


def palettes_for(spec: specs.DatasetSpec, *, has_colors: bool, ignored: Iterable[Color]) -> list[Palette]:
    """Palettes that masks of these classes may have, in the order in which they are tried.

    Args:
      spec: Classes and their colours.
      has_colors: Whether the colours of the classes were given, not chosen.
      ignored: Colours of the ignore label.
    """
    found = []
    if has_colors:
        labels = dict.fromkeys(map(_packed, ignored), spec.ignore_label)
        if spec.num_classes == 1 and _BLACK not in spec.colors:
            labels.setdefault(_packed(_BLACK), 0)
        colors = map(_packed, spec.label_colors)
        own = [(color, label) for label, color in enumerate(colors) if spec.num_classes > 1 or label]
        found.append(_palette('"colors" in classes.json', own, labels))
    numbers = {_plain(name): label for label, name in enumerate(spec.label_names)}
    for name, entries in KNOWN.items():
        pairs = []
        for entry in entries:
            for of in (entry.name, entry.otherwise):
                if of == _IGNORED:
                    pairs.append((_packed(entry.color), spec.ignore_label))
                elif of is None or _plain(of) not in numbers:
                    continue
                else:
                    pairs.append((_packed(entry.color), numbers[_plain(of)]))
                break
        if any(label != spec.ignore_label for _, label in pairs):
            found.append(_palette(f"the palette of {name}", pairs, {}))
    if len(spec.label_names) == 2:
        found.append(Palette("black for 0 and white for 1", {_packed(_BLACK): 0, _packed(_WHITE): 1}))
    return found


def _palette(name: str, pairs: Iterable[tuple[int, int]], labels: dict[int, int]) -> Palette:
    for color, label in pairs:
        labels[color] = label if labels.get(color, label) == label else _SEVERAL
    return Palette(name, labels)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _packed(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def packed(colors: np.ndarray) -> np.ndarray:
    """Packs colours, uint8 (..., 3), into integers 0xRRGGBB, int32 (...)."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


# ----------------------------------------------------------------------------------------------------- colours of masks


@dataclasses.dataclass(frozen=True)
class MaskColors:
    """The colours of one mask.

    Attributes:
      listed: (0xRRGGBB, number of pixels, row and column of the first pixel) of each colour; for an RGB mask, of the
        colours that some palette has, and of the most frequent others.
      others: Number of colours that are not listed, and of their pixels.
      indices: Index of each listed colour in a palette mask; () for an RGB mask.
    """

    listed: tuple[tuple[int, int, int, int], ...]
    others: tuple[int, int] = (0, 0)
    indices: tuple[int, ...] = ()

    def counts(self, palette: Palette) -> list[tuple[int, int]]:
        """(label, number of pixels) of each listed colour."""
        return [(palette.labels[color], pixels) for color, pixels, *_ in self.listed]


def colors_of(mask: StoredMask, palettes: Collection[Palette]) -> MaskColors:
    """The colours of a mask that is RGB or has a palette."""
    is_rgb = mask.values.ndim == 3
    flat = (packed(mask.values) if is_rgb else mask.values).ravel()
    values, first, counts = np.unique(flat, return_index=True, return_counts=True)
    rows, columns = np.divmod(first, mask.values.shape[1])
    colors = values if mask.palette is None else packed(mask.palette[values])
    entries = list(zip(*(array.tolist() for array in (colors, counts, rows, columns)), strict=True))
    if not is_rgb:
        return MaskColors(tuple(entries), indices=tuple(values.tolist()))
    known = set().union(*(palette.labels for palette in palettes))
    strange = sorted((entry for entry in entries if entry[0] not in known), key=lambda entry: -entry[1])
    kept = [entry for entry in entries if entry[0] in known]
    rest = strange[_SHOWN:]
    return MaskColors((*kept, *strange[:_SHOWN]), (len(rest), sum(entry[1] for entry in rest)))


class Reading(NamedTuple):
    """Palettes by which coloured masks are read.

    Attributes:
      rgb: Palette of RGB masks; None if there are none.
      indexed: Palette of palette masks; None if there are none, or if their indices are the labels.
    """

    rgb: Palette | None = None
    indexed: Palette | None = None


def choose(
    found: Sequence[tuple[str, MaskColors]],
    palettes: Sequence[Palette],
    spec: specs.DatasetSpec,
    problems: Problems,
    *,
    has_colors: bool,
) -> Reading:
    """Finds the palette that has all colours of all masks; if there is none, palette masks are read by their indices.

    Args:
      found: Name and colours of each coloured mask.
      palettes: Result of `palettes_for`.
      spec: Classes of the data set.
      problems: Receives colours without a meaning, and palette masks that could be read in two ways.
      has_colors: As for `palettes_for`.
    """
    if not found:
        return Reading()
    own = palettes[0] if has_colors else None

    def fits(palette: Palette, masks: Sequence[tuple[str, MaskColors]]) -> bool:
        if any(_unknown(colors, palette) for _, colors in masks):
            return False
        # Most known palettes ignore black, so that only the colour of a class identifies a palette.
        counts = (count for _, colors in masks for count in colors.counts(palette))
        return palette is own or any(label != spec.ignore_label for label, _ in counts)

    rgb, indexed = ([each for each in found if bool(each[1].indices) == has_indices] for has_indices in (False, True))
    indices = {index for _, colors in indexed for index in colors.indices}
    are_labels = all(index < len(spec.label_names) or index == spec.ignore_label for index in indices)
    palette = next((each for each in palettes if fits(each, found)), None)
    if palette is not None:
        differing = [
            name
            for name, colors in indexed
            if any(a != b for a, (b, _) in zip(colors.indices, colors.counts(palette), strict=True))
        ]
        if differing and are_labels and palette is not own:
            problems[
                f"palette masks whose indices mean other classes than their colours, which are those of "
                f'{palette.name}; give "colors" in classes.json to read them by their colours, or save their indices '
                "as 8-bit grey"
            ] += differing
        return Reading(palette if rgb else None, palette if indexed else None)
    # The indices are not labels if one of them has the colour of another class.
    agree = own is None or all(
        own.labels.get(color, index) == index
        for _, of in indexed
        for index, (color, *_) in zip(of.indices, of.listed, strict=True)
    )
    if indexed and are_labels and agree:
        palette = next((each for each in palettes if fits(each, rgb)), None)
        if not rgb or palette is not None:
            return Reading(palette)
        found = rgb
    _add_unknown(found, palettes, problems, has_colors=has_colors)
    return Reading()


def _unknown(colors: MaskColors, palette: Palette) -> list[tuple[int, int, int, int]]:
    """The listed colours that a palette lacks, or that several of its classes have."""
    # Listed colours suffice: if a mask has colours that are not listed, some listed ones are in no palette either.
    return [entry for entry in colors.listed if palette.labels.get(entry[0], _SEVERAL) == _SEVERAL]


def _add_unknown(
    found: Sequence[tuple[str, MaskColors]], palettes: Sequence[Palette], problems: Problems, *, has_colors: bool
) -> None:
    if has_colors:
        palette = palettes[0]
        kind = (
            'RGB or palette masks with colours that no class has in "colors" of classes.json, or that several have; '
            'correct the masks or the classes, or list ignored colours as "ignore_colors": [[r, g, b], '
            "...]. Masks of 8-bit grey hold ids instead"
        )
    else:
        # The known palette that lacks the colours of the fewest pixels.
        lacks = {
            each.name: sum(entry[1] for _, colors in found for entry in _unknown(colors, each)) for each in palettes
        }
        palette = min(palettes, key=lambda each: lacks[each.name], default=Palette("no palette", {}))
        kind = (
            'RGB or palette masks, while classes.json has no "colors", and with colours that are not in '
            f'{palette.name}; give the colour of each class as "colors": [[r, g, b], ...]. Masks of 8-bit grey hold '
            "ids instead"
        )
    if all(entry[0] % 0x10101 == 0 for _, colors in found for entry in colors.listed):
        kind += "; all colours are grey: if they are ids, save one channel as 8-bit grey"
    places: dict[int, list[tuple[int, str]]] = {}
    for name, colors in found:
        for color, pixels, row, column in _unknown(colors, palette):
            places.setdefault(color, []).append((pixels, f"{name}, row {row}, column {column}"))
    pixels = {color: sum(number for number, _ in of) for color, of in places.items()}
    problems[kind] += [
        f"{_text(color)}: {pixels[color]:,} pixels in {len(of)} masks, first in {of[0][1]}"
        + "; it is the colour of several classes" * (color in palette.labels)
        for color, of in sorted(places.items(), key=lambda entry: -pixels[entry[0]])
    ]
    if rest := sum(colors.others[1] for _, colors in found):
        problems[kind].append(f"{rest:,} pixels of further colours, each rare in its mask")


def _text(color: int) -> str:
    return json.dumps([color >> 16, color >> 8 & 255, color & 255])

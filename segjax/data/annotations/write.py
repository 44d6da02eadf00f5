"""Writes the result of a reader as a folder of images and masks; see `segjax.data.folder`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from segjax.data import codec, specs
from segjax.data.annotations.found import BACKGROUND, IGNORED, MISSING, Annotated, Found
from segjax.data.masks import in_threads
from segjax.data.sources import DataError, Problems, shorten
from segjax.runtime import atomic, console

_UNREADABLE = "images that cannot be used"
_OTHER_SIZE = "images of another size (height x width) than their annotations state"
_TURNED = (
    "images that EXIF rotates, with annotations that fit either way; save them upright, and correct the annotations"
)
# Maximum bytes of a name in the output; file systems allow 255.
_LONGEST = 200


@dataclasses.dataclass
class Written:
    """Counts of the images and annotations that were written.

    Attributes:
      images, background: Split -> number of images, and of images that are all background.
      objects: Split -> class id -> number of objects.
      pixels: Number of pixels of each label, int64 (65536,), with IGNORED for ignored pixels.
      skipped: Reason -> places.
      renamed: Names that were changed to fit into one folder per split.
      encoded: Number of images that were converted to PNG, because of their format or EXIF rotation.
      undrawn: Number of annotations that were not drawn, or only in part.
    """

    skipped: Problems
    images: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    background: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    objects: dict[str, collections.Counter[int]] = dataclasses.field(default_factory=dict)
    pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(IGNORED + 1, np.int64))
    renamed: list[str] = dataclasses.field(default_factory=list)
    encoded: int = 0
    undrawn: int = 0

    def absent(self, names: Sequence[str]) -> list[str]:
        """Names of the classes without any pixel."""
        return [name for number, name in enumerate(names) if not self.pixels[number]]


def refuse_occupied(folder: Path) -> None:
    """Raises DataError if the output folder is not empty, or cannot be written."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise DataError(f"{folder} exists and is not a folder; name a new one")
    # The folder is replaced as a whole; a shell in it would stay in the old one.
    if folder.is_dir() and os.path.samefile(folder, os.curdir):
        raise DataError(f"{folder} is the current folder; name another one")
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; name a new folder, or remove it first")
    if why := atomic.why_not_writable(folder.parent):
        raise DataError(f"{folder} cannot be written: {why}")


def write(found: Found, folder: Path) -> Written:
    """Writes images, masks and classes.json; `folder` appears only when all files are written.

    PNG and JPEG images are copied byte for byte. WebP, BMP and GIF images, and images that EXIF rotates, become PNG.

    Raises:
      DataError: No image can be used, or no annotation marks a pixel; the message lists the reasons.
    """
    written = Written(found.skipped)
    with atomic.replacing_folder(folder, durable=False) as temporary:
        temporary.mkdir()
        # In masks of two classes, 0 and 255 can mean the classes; 255 would then not be an ignore value.
        ignore = specs.default_ignore_label(len(found.names)) if len(found.names) > 2 else 254
        for split, images in found.splits.items():
            _write_split(temporary, split, images, ignore, written)
        if not written.images:
            raise DataError("\n".join(["no image can be used, and nothing was written:", *listed(written.skipped)]))
        if written.undrawn and not written.pixels[1:].any():
            lines = ["no annotation marks a pixel, and nothing was written:", *listed(written.skipped)]
            raise DataError("\n".join(lines))
        content = {
            "names": found.names,
            "colors": _colors(len(found.names)),
            "ignore": ignore,
        }
        if absent := written.absent(found.names):
            content["absent"] = absent
        atomic.write_text(temporary / "classes.json", json.dumps(content, indent=1) + "\n")
    return written


def _colors(count: int) -> list[tuple[int, int, int]]:
    """VOC's colours for up to 256 classes, else `specs.distinct_colors`."""
    return list(map(specs.voc_color, range(count))) if count <= 256 else specs.distinct_colors(count)


def _write_split(root: Path, split: str, images: Sequence[Annotated], ignore: int, written: Written) -> None:
    stems = _stems(images, written.renamed)
    for part in ("images", "labels"):
        (root / part / split).mkdir(parents=True)

    def write_one(entry: tuple[str, Annotated]) -> _One | tuple[str, str]:
        stem, image = entry
        try:
            data, size, is_encoded = _usable(image.read(), image)
            drawn = image.draw(size)
        except FileNotFoundError:
            return MISSING, image.place
        except DataError:
            raise
        except _SkippedError as error:
            return error.args
        except (ValueError, OSError) as error:
            why = getattr(error, "strerror", None) or str(error).rpartition(f"{image.place}: ")[2]
            return _UNREADABLE, f"{image.place}: {why}"
        suffix = ".jpg" if data.startswith(codec.JPEG) else ".png"
        (root / "images" / split / (stem + suffix)).write_bytes(data)
        labels = np.where(drawn.labels == IGNORED, ignore, drawn.labels).astype(specs.dtype_of_labels(ignore))
        (root / "labels" / split / f"{stem}.png").write_bytes(codec.encode_mask(labels))
        pixels = np.bincount(drawn.labels.ravel())
        values = np.flatnonzero(pixels)
        return _One(drawn.objects, drawn.skipped, values, pixels[values], is_encoded)

    objects = written.objects[split] = collections.Counter()
    with contextlib.closing(in_threads(write_one, zip(stems, images, strict=True))) as results:
        for result in console.ProgressBar(f"importing {split}", len(images), "images").over(results):
            if not isinstance(result, _One):
                reason, place = result
                written.skipped[reason].append(place)
                continue
            for reason, place in result.skipped:
                written.skipped[reason].append(place)
            written.undrawn += len(result.skipped)
            written.images[split] += 1
            written.background[split] += not result.values.any()
            written.encoded += result.is_encoded
            written.pixels[result.values] += result.counts
            objects.update(result.objects)
    if not written.images[split]:
        # Preparing the folder would refuse a split without images.
        del written.images[split]
        for part in ("images", "labels"):
            (root / part / split).rmdir()


class _One(NamedTuple):
    """Counts of one written image. Labels are not kept, because threads may be far ahead of the counting loop.

    Attributes:
      objects, skipped: See `Drawn`.
      values, counts: Labels that occur, and number of pixels of each, int64 (N,).
      is_encoded: Whether the image was converted to PNG.
    """

    objects: collections.Counter[int]
    skipped: list[tuple[str, str]]
    values: np.ndarray
    counts: np.ndarray
    is_encoded: bool


class _SkippedError(ValueError):
    """An image that is skipped: the reason, and its place with details."""


def _usable(data: bytes, image: Annotated) -> tuple[bytes, tuple[int, int], bool]:
    """Content of the file to write, its (height, width), and whether it differs from the original."""
    kind = codec.format_of(data[:32])
    if not data or kind in (None, "TIFF"):
        raise codec.ImageError("is empty" if not data else "is not PNG, JPEG, WebP, BMP or GIF; save it as PNG")
    is_stored = kind in ("PNG", "JPEG")
    if fault := (codec.damage(data) if is_stored else None) or codec.fault_of_image(data):
        raise codec.ImageError(fault)
    pixels = codec.decode_undamaged(data) if is_stored else codec.decode_upright(data)[0]
    if pixels is None:
        raise codec.ImageError("does not decode")
    upright = codec.decode_undamaged(data, upright=True) if is_stored and codec.has_exif(data) else None
    if upright is not None and not np.array_equal(upright, pixels):
        pixels = _turned(pixels, upright, image)
        is_stored = False
    size = (pixels.shape[0], pixels.shape[1])
    if image.size not in (None, size):
        raise _SkippedError(_OTHER_SIZE, f"{image.place}: {_by(size)}, annotated {_by(image.size)}")
    return data if is_stored else _png(pixels), size, not is_stored


def _turned(stored: np.ndarray, upright: np.ndarray, image: Annotated) -> np.ndarray:
    """The stored or the upright pixels, whichever the annotations belong to."""
    if image.is_upright is not None:
        return upright if image.is_upright else stored
    fitting = [pixels for pixels in (upright, stored) if pixels.shape[:2] == image.size]
    if len(fitting) == 2 or image.size is None:
        raise _SkippedError(_TURNED, image.place)
    return fitting[0] if fitting else upright


def _by(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else ""


def _png(pixels: np.ndarray) -> bytes:
    """Encodes grey (H, W) or (H, W, 1), or RGB (H, W, 3), uint8 or uint16, as PNG."""
    import cv2

    rgb = pixels.ndim == 3 and pixels.shape[2] == 3
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if rgb else pixels)[1].tobytes()


def _stems(images: Sequence[Annotated], renamed: list[str]) -> list[str]:
    """A file name for each image: not hidden, short enough, and unique when case is ignored."""
    taken: set[str] = set()
    stems = []
    for image in images:
        path = PurePosixPath(image.name.replace("\\", "/"))
        plain = path.with_suffix("") if path.suffix else path
        stem = first = _shortened(console.one_line("_".join(part for part in plain.parts if part not in ("/", ".."))))
        number = 1
        while unicodedata.normalize("NFC", stem).casefold() in taken:
            number += 1
            stem = f"{first}_{number}"
        taken.add(unicodedata.normalize("NFC", stem).casefold())
        if stem != path.stem:
            renamed.append(f"{image.name} to {stem}")
        stems.append(stem)
    return stems


def _shortened(stem: str) -> str:
    # The folder reader skips hidden files.
    stem = f"_{stem}" if stem[:1] in (".", "") else stem
    encoded = os.fsencode(stem)
    if len(encoded) <= _LONGEST:
        return stem
    start = encoded[: _LONGEST // 2].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def listed(skipped: Problems) -> list[str]:
    """Lines of a report: each reason with its count, followed by the first places."""
    lines = []
    for reason, places in skipped.items():
        lines += [f"- {reason}: {len(places):,}", *(f"    {entry}" for entry in shorten(places))]
    return lines


def describe(found: Found, written: Written) -> list[str]:
    """Lines of at most 80 columns: images per split, objects per class, and everything that was skipped."""
    lines = [*found.notes, "", f"{'split':<20} {'images':>9} {'background':>11} {'objects':>10}"]
    for split, count in written.images.items():
        total = written.objects[split].total()
        lines.append(f"{console.cell(split, 20)} {count:>9,} {written.background[split]:>11,} {total:>10,}")
    splits = list(written.images)
    counted = sum((written.objects[split] for split in splits), collections.Counter())
    pixels, every = written.pixels, max(int(written.pixels.sum()), 1)
    lines += ["", f"{'class':<32} {'objects':>10} {'% pixels':>9}"]
    for number, name in enumerate(found.names):
        # Masks of whole images have no objects to count.
        objects = f"{counted[number]:,}" if counted and name != BACKGROUND else "-"
        lines.append(f"{console.cell(name, 32)} {objects:>10} {100 * pixels[number] / every:>9.4f}")
    lines.append(f"{console.cell('(ignored)', 32)} {'':>10} {100 * pixels[IGNORED] / every:>9.4f}")
    if written.encoded:
        lines += ["", f"images converted to PNG because of their format or orientation: {written.encoded:,}"]
    for what, entries in (
        ("images whose names were changed", written.renamed),
        ('classes that no image shows, "absent" in classes.json', written.absent(found.names)),
    ):
        if entries:
            lines += ["", f"{what}: {len(entries):,}", *(f"    {entry}" for entry in shorten(entries))]
    lines += ["", "skipped, completely or in part:" if written.skipped else "nothing was skipped"]
    return lines + listed(written.skipped)


def refuse(problems: Problems, what: str) -> None:
    """Raises DataError if there are problems; the message lists them all."""
    if problems:
        lines = [f"{what} cannot be imported, and nothing was written:"]
        for kind, entries in problems.items():
            lines += [f"- {kind}:", *(f"    {entry}" for entry in shorten(entries))]
        raise DataError("\n".join(lines))

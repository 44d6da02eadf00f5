"""Folders of images with any number of channels, for tests of everything that reads them."""

import json
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

KINDS = [(1, "uint8"), (2, "float32"), (4, "uint16"), (13, "uint8"), (3, "float32")]
SIZES = ((40, 56), (33, 61), (48, 40))


def array(seed: int, size: tuple[int, int], channels: int, dtype: str) -> np.ndarray:
    """Noise whose mean and deviation differ from channel to channel, in the range of the dtype."""
    rng, steps = np.random.default_rng(seed), np.arange(channels)
    values = rng.normal(size=(*size, channels)) * (1 + 0.2 * steps)
    if dtype == "float32":
        return (300 + 7 * steps + 0.25 * values).astype(np.float32)
    unit, middle = (12, 90) if dtype == "uint8" else (900, 9000)
    return (middle + 3 * steps + unit * values).clip(0, np.iinfo(dtype).max).astype(dtype)


def mask(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), size)


def save(path: Path, image: np.ndarray) -> None:
    """Writes an image (H, W, C) by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    single = image[..., 0] if image.shape[2] == 1 else image
    if path.suffix == ".npy":
        np.save(path, single)
    elif path.suffix == ".tif":
        # Shapes with one axis more than a page has would become pages.
        tifffile.imwrite(path, single, photometric="minisblack", planarconfig="contig" if single.ndim == 3 else None)
    else:
        Image.fromarray(single).save(path)


def folder(
    root: Path, channels: int, dtype: str, /, *, suffix: str = ".npy", splits=("train", "val"), seed: int = 0, **classes
) -> dict[str, list[np.ndarray]]:
    """Three images of different sizes in each split, with masks of three classes; returns them by split."""
    made: dict[str, list[np.ndarray]] = {}
    for split in splits:
        for number, size in enumerate(SIZES):
            seed += 1
            image = array(seed, size, channels, dtype)
            save(root / "images" / split / f"{'abc'[number]}{suffix}", image)
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask(seed, size)).save(root / "labels" / split / f"{'abc'[number]}.png")
            made.setdefault(split, []).append(image)
    (root / "classes.json").write_text(json.dumps({"name": "bands", "names": ["a", "b", "c"], **classes}))
    return made

"""Generated annotation files for tests, and the command that imports them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from segjax.commands.data import main
from tests.made_archives import write


def picture(height: int, width: int, *, seed: int = 0, kind: str = "PNG", **settings) -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def turned(height: int, width: int, orientation: int = 6) -> bytes:
    """A JPEG that is stored as (height, width), and that EXIF turns; by a quarter for 6."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(height, width, kind="JPEG", exif=exif)


def write_json(path: Path, content) -> Path:
    return write(path, json.dumps(content).encode())


def imported(kind: str, source: Path, folder: Path, capsys) -> str:
    """What the command prints when it imports a source; it must succeed."""
    status = main(["import", kind, str(source), str(folder)])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


def refused(kind: str, source: Path, folder: Path, capsys) -> str:
    """What it prints when it refuses a source, on one line; it must leave nothing."""
    assert main(["import", kind, str(source), str(folder)]) == 2
    assert not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))
    return " ".join(capsys.readouterr().err.split())


def labels_of(folder: Path, split: str, stem: str) -> np.ndarray:
    with Image.open(folder / "labels" / split / f"{stem}.png") as image:
        return np.array(image)


def names_of(folder: Path) -> list[str]:
    return json.loads((folder / "classes.json").read_text())["names"]


def drawn(text: str) -> np.ndarray:
    """Labels that a test writes as rows of digits; # is the ignore value."""
    return np.array([[255 if c == "#" else int(c) for c in row] for row in text.split()], np.uint8)


def rectangle(left, top, right, bottom) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]

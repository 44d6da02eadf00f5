"""Imports annotations of other tools as a folder of images and masks.

    segjax data import coco|labelme|yolo|voc SRC DIR
    segjax data prepare folder --source DIR

coco     instances_*.json of COCO and CVAT, _annotations.coco.json of Roboflow,
         or other JSON with images, annotations and categories: polygons, RLE;
         panoptic_*.json with its PNGs
labelme  a JSON for each image: polygons, rectangles, circles and masks
yolo     data.yaml or classes.txt, images/ and labels/: polygons
voc      JPEGImages/ and SegmentationClass/, or Roboflow's *_mask.png and
         _classes.csv: masks

Images are copied. A pixel has the class of the polygon that covers its centre
(COCO's rule, by pycocotools); of several polygons, the smallest counts. Crowds,
and objects with only a box, get the ignore value. All other pixels are
background; in panoptic PNGs, pixels without annotation get the ignore value.
Skipped entries are counted. If annotations are damaged, nothing is written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from segjax.commands.arguments import Parser, as_path
from segjax.commands.ending import run_command
from segjax.runtime import console

if TYPE_CHECKING:
    from segjax.data.annotations.found import Found

FORMATS = ("coco", "labelme", "yolo", "voc")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="segjax data import",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("source", type=as_path, metavar="SRC", help="folder with images and annotations")
    parser.add_argument("folder", type=as_path, metavar="DIR", help="output folder, new or empty")
    options = parser.parse_args(arguments)
    return run_command("segjax data import", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from segjax.data.annotations import write
    from segjax.data.sources import DataError

    write.refuse_occupied(options.folder)
    if not options.source.exists():
        raise DataError(f"{options.source} does not exist")
    found = _reader(options.format)(options.source)
    written = write.write(found, options.folder)
    console.say("\n".join(write.describe(found, written)))
    console.show(f"\n{options.folder}: {written.images.total():,} images; next:")
    console.show(f"  segjax data prepare folder --source {shlex.quote(str(options.folder))}")


def _reader(format: str) -> Callable[[Path], Found]:
    from segjax.data.annotations import coco, labelme, rasterise, voc, yolo

    if format != "voc":
        rasterise.pycocotools()
    return {"coco": coco, "labelme": labelme, "yolo": yolo, "voc": voc}[format].read

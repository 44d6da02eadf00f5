"""What a dataset is: one frozen record per dataset, and nothing that reads a file."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

# Mean and standard deviation of ImageNet's RGB pixels in units of 0..255, the normalisation every published checkpoint
# of these models was trained with (0.485, 0.456, 0.406 and 0.229, 0.224, 0.225 of full scale).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Classes of a dataset and the one label value that no loss and no metric counts.

    Attributes:
      name: the dataset's own name, used in file names and messages.
      class_names: K names, position = train id.
      colors: K RGB triples in 0..255, position = train id.
      ignore_label: label value that is excluded everywhere; not a train id.
      splits: (name, number of images) pairs as published; empty where any number is right.
    """

    name: str
    class_names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ignore_label: int
    splits: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if len(self.class_names) != len(self.colors):
            raise ValueError(
                f"{self.name}: {len(self.class_names)} class names but {len(self.colors)} colours; give one colour each"
            )
        if not 0 <= self.ignore_label <= 255:
            raise ValueError(f"{self.name}: ignore label {self.ignore_label} does not fit an 8-bit mask (0..255)")
        if self.ignore_label < len(self.label_names):
            raise ValueError(
                f"{self.name}: ignore label {self.ignore_label} is also the label of "
                f"'{self.label_names[self.ignore_label]}'; use a value of at least {len(self.label_names)}"
            )

    @property
    def num_classes(self) -> int:
        """K, the width of a model's output; 1 is a binary task."""
        return len(self.class_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """What each label value means: the classes, or for a single class 0 background and 1 the class."""
        return self.class_names if self.num_classes > 1 else ("background", *self.class_names)

    @property
    def label_colors(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of each label value, as `label_names`."""
        return self.colors if self.num_classes > 1 else ((60, 60, 60), *self.colors)


class Split(NamedTuple):
    """One split in host memory. Images smaller than the largest are padded at the bottom and right.

    Attributes:
      images: uint8 (N, H, W, 3), RGB, zeros in the padding.
      labels: uint8 (N, H, W), train ids, ignore_label in the padding.
      sizes: int32 (N, 2), height and width of each image before padding.
      names: N names, for messages and file names.
    """

    images: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]


# Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016: the 19 evaluated classes
# in train-id order with the palette of the benchmark.
CITYSCAPES_CLASSES = (
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)),
    ("fence", (190, 153, 153)),
    ("pole", (153, 153, 153)),
    ("traffic light", (250, 170, 30)),
    ("traffic sign", (220, 220, 0)),
    ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)),
    ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)),
    ("truck", (0, 0, 70)),
    ("bus", (0, 60, 100)),
    ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)),
    ("bicycle", (119, 11, 32)),
)

STREETS = DatasetSpec(
    name="streets",
    class_names=tuple(name for name, _ in CITYSCAPES_CLASSES),
    colors=tuple(color for _, color in CITYSCAPES_CLASSES),
    ignore_label=255,
)

# Brostow et al., "Semantic object classes in video", 2009, in the 11-class form of SegNet (Badrinarayanan et al.,
# 2017); mask value 11 is "unlabelled".
CAMVID = DatasetSpec(
    name="camvid",
    class_names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign_symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colors=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignore_label=11,
    splits=(("train", 367), ("val", 101), ("test", 233)),
)

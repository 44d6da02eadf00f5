"""The table of datasets, and the classes and colours of each. This module reads no file and imports only NumPy.

`DATASETS`, at the end, is the only list of datasets: commands, recipes and readers look names up in it. The reader of a
dataset with official archives is in `archives.READERS`, that of a generated one in `open.GENERATORS`. CONTRIBUTING.md,
"Add a dataset", has the steps and the tests.
"""

from __future__ import annotations

import colorsys
import dataclasses
from typing import Literal, NamedTuple

import numpy as np

# Mean and standard deviation of ImageNet's RGB pixels in 0..255, with which every published checkpoint of these models
# was trained (0.485, 0.456, 0.406 and 0.229, 0.224, 0.225 of full scale).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


# Possible dtypes of images.
IMAGE_DTYPES = ("uint8", "uint16", "float32")


@dataclasses.dataclass(frozen=True)
class ImageKind:
    """Channels and dtype of all images of a dataset, or of the images that a model takes.

    Attributes:
      channels: Number of channels, C.
      dtype: One of `IMAGE_DTYPES`; None if a model does not state it.
    """

    channels: int = 3
    dtype: str | None = "uint8"

    @property
    def is_rgb(self) -> bool:
        """Whether the images are 8-bit RGB."""
        return self == RGB

    def __str__(self) -> str:
        channels = "1 channel" if self.channels == 1 else f"{self.channels} channels"
        return channels if self.dtype is None else f"{channels} of {self.dtype}"


RGB = ImageKind()

# Largest label; labels have 16 bits if 8 are not enough.
LARGEST_LABEL = 2**16 - 1


def dtype_of_labels(largest: int) -> type[np.uint8] | type[np.uint16]:
    """The dtype of arrays of labels up to `largest`."""
    return np.uint8 if largest < 256 else np.uint16


def default_ignore_label(num_classes: int) -> int:
    """Default ignore label: the largest value of the labels' dtype."""
    return 255 if num_classes < 256 else LARGEST_LABEL


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Different colours for classes that have none: hues by the golden ratio, three brightnesses."""
    golden, colors, number = 0.618033988749895, {}, 0
    while len(colors) < count:
        # The first 600 are different; then hues repeat, with other saturations.
        saturation = 0.75 - 0.5 * (golden * (number // 600) % 1)
        rgb = colorsys.hsv_to_rgb(golden * number % 1, saturation, (1.0, 0.8, 0.6)[number % 3])
        colors[tuple(round(255 * part) for part in rgb)] = None
        number += 1
    return list(colors)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Classes of a dataset and the one label value that losses and metrics ignore.

    Attributes:
      name: Name of the dataset, used in file names and messages.
      class_names: K names, in the order of the train ids.
      colors: K RGB triples in 0..255, in the order of the train ids.
      ignore_label: Label value that is excluded everywhere; not a train id, at most `LARGEST_LABEL`.
      splits: (name, number of images) pairs as published; empty if any number is accepted.

    Example:
      >>> from segjax import data
      >>> spec = data.DatasetSpec("yard", ("grass", "path"), ((0, 128, 0), (128, 128, 128)), ignore_label=255)
      >>> spec.num_classes
      2
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
        if not 0 <= self.ignore_label <= LARGEST_LABEL:
            raise ValueError(
                f"{self.name}: ignore label {self.ignore_label} does not fit a 16-bit mask (0..{LARGEST_LABEL})"
            )
        if self.ignore_label < len(self.label_names):
            raise ValueError(
                f"{self.name}: ignore label {self.ignore_label} is also the label of "
                f"'{self.label_names[self.ignore_label]}'; use a value of at least {len(self.label_names)}"
            )

    @property
    def num_classes(self) -> int:
        """K, the number of output channels of a model; 1 for a binary task."""
        return len(self.class_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each label value: the classes; for a single class, "background" (0) and the class (1)."""
        return self.class_names if self.num_classes > 1 else ("background", *self.class_names)

    @property
    def label_dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The dtype of label arrays: uint8, or uint16 for an ignore label of more than 255."""
        return dtype_of_labels(self.ignore_label)

    @property
    def label_colors(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of each label value, in the order of `label_names`."""
        return self.colors if self.num_classes > 1 else ((60, 60, 60), *self.colors)


class Split(NamedTuple):
    """One split in host memory. Images smaller than the largest are padded at the bottom and right.

    Attributes:
      images: Images, uint8, uint16 or float32 (N, H, W, C), with zeros in the padding; mostly RGB of uint8.
      labels: Train ids, uint8 or uint16 (N, H, W), with ignore_label in the padding; see `DatasetSpec.label_dtype`.
      sizes: Height and width of each image without its padding, int32 (N, 2).
      names: N names, for messages and file names.

    Example:
      >>> from segjax import data
      >>> (opened,) = data.open_splits("streets", ["val"], num_images=[2], size=(40, 64))
      >>> opened.data.images.shape, opened.data.labels.shape, opened.data.sizes.tolist()
      ((2, 40, 64, 3), (2, 40, 64), [[40, 64], [40, 64]])
    """

    images: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]


# Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016: the 19 evaluated classes
# in train-id order with the palette of the benchmark.
_CITYSCAPES_CLASSES = (
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

CITYSCAPES = DatasetSpec(
    name="cityscapes",
    class_names=tuple(name for name, _ in _CITYSCAPES_CLASSES),
    colors=tuple(color for _, color in _CITYSCAPES_CLASSES),
    ignore_label=255,
    splits=(("train", 2975), ("val", 500), ("test", 1525)),
)

# Scenes that `streets.py` draws, with the classes of Cityscapes.
STREETS = dataclasses.replace(CITYSCAPES, name="streets", splits=())

# Brostow et al., "Semantic object classes in video", 2009, with the 11 classes of SegNet (Badrinarayanan et al., 2017);
# mask value 11 is "unlabelled".
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

# Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017: the benchmark's 150 classes by their first names
# in objectInfo150, with the palette of color150 as rrggbb.
_ADE20K = """
    wall 787878, building b47878, sky 06e6e6, floor 503232, tree 04c803, ceiling 787850, road 8c8c8c, bed cc05ff,
    windowpane e6e6e6, grass 04fa07, cabinet e005ff, sidewalk ebff07, person 96053d, earth 787846, door 08ff33,
    table ff0652, mountain 8fff8c, plant ccff04, curtain ff3307, chair cc4603, car 0066c8, water 3de6fa,
    painting ff0633, sofa 0b66ff, shelf ff0747, house ff09e0, sea 0907e6, mirror dcdcdc, rug ff095c, field 7009ff,
    armchair 08ffd6, seat 07ffe0, fence ffb806, desk 0aff47, rock ff290a, wardrobe 07ffff, lamp e0ff08,
    bathtub 6608ff, railing ff3d06, cushion ffc207, base ff7a08, box 00ff14, column ff0829, signboard ff0599,
    chest of drawers 0633ff, counter eb0cff, sand a09614, sink 00a3ff, skyscraper 8c8c8c, fireplace fa0a0f,
    refrigerator 14ff00, grandstand 1fff00, path ff1f00, stairs ffe000, runway 99ff00, case 0000ff, pool table ff4700,
    pillow 00ebff, screen door 00adff, stairway 1f00ff, river 0bc8c8, bridge ff5200, bookcase 00fff5, blind 003dff,
    coffee table 00ff70, toilet 00ff85, flower ff0000, book ffa300, hill ff6600, bench c2ff00, countertop 008fff,
    stove 33ff00, palm 0052ff, kitchen island 00ff29, computer 00ffad, swivel chair 0a00ff, boat adff00, bar 00ff99,
    arcade machine ff5c00, hovel ff00ff, bus ff00f5, towel ff0066, light ffad00, truck ff0014, tower ffb8b8,
    chandelier 001fff, awning 00ff3d, streetlight 0047ff, booth ff00cc, television 00ffc2, airplane 00ff52,
    dirt track 000aff, apparel 0070ff, pole 3300ff, land 00c2ff, bannister 007aff, escalator 00ffa3, ottoman ff9900,
    bottle 00ff0a, buffet ff7000, poster 8fff00, stage 5200ff, van a3ff00, ship ffeb00, fountain 08b8aa,
    conveyer belt 8500ff, canopy 00ff5c, washer b800ff, plaything ff001f, swimming pool 00b8ff, stool 00d6ff,
    barrel ff0070, basket 5cff00, waterfall 00e0ff, tent 70e0ff, bag 46b8a0, minibike a300ff, cradle 9900ff,
    oven 47ff00, ball ff00a3, food ffcc00, step ff008f, tank 00ffeb, trade name 85ff00, microwave ff00eb, pot f500ff,
    animal ff007a, bicycle fff500, lake 0abed4, dishwasher d6ff00, screen 00ccff, blanket 1400ff, sculpture ffff00,
    hood 0099ff, sconce 0029ff, vase 00ffcc, traffic light 2900ff, tray 29ff00, ashcan ad00ff, fan 00f5ff,
    pier 4700ff, crt screen 7a00ff, plate 00ffb8, monitor 005cff, bulletin board b8ff00, shower 0085ff,
    radiator ffd600, glass 19c2c2, clock 66ff00, flag 5c00ff
"""


def named_colors(text: str) -> dict[str, tuple[int, int, int]]:
    """name -> RGB, from comma-separated "name rrggbb" entries."""
    pairs = (entry.strip().rpartition(" ") for entry in text.split(","))
    return {name: (int(color[:2], 16), int(color[2:4], 16), int(color[4:], 16)) for name, _, color in pairs}


ADE20K = DatasetSpec(
    name="ade20k",
    class_names=tuple(named_colors(_ADE20K)),
    colors=tuple(named_colors(_ADE20K).values()),
    ignore_label=255,
    splits=(("train", 20210), ("val", 2000)),
)


def voc_color(value: int) -> tuple[int, int, int]:
    """Colour of a mask value in VOC's development kit.

    Bits 0, 3 and 6 of the value are the highest bits of red, bits 1, 4 and 7 those of green, 2 and 5 those of blue.
    """
    red, green, blue = (sum((value >> 3 * i + channel & 1) << 7 - i for i in range(3)) for channel in range(3))
    return red, green, blue


# Everingham et al., "The PASCAL Visual Object Classes Challenge 2012"; 255 marks outlines and
# objects that are not evaluated.
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

VOC = DatasetSpec(
    name="voc",
    class_names=_VOC_CLASSES,
    colors=tuple(map(voc_color, range(len(_VOC_CLASSES)))),
    ignore_label=255,
    splits=(("train", 1464), ("val", 1449)),
)

# Parkhi et al., "Cats and Dogs", CVPR 2012: the animal against its background; segjax chose the colour. The train split
# is published as trainval.
PET = DatasetSpec(
    name="pet",
    class_names=("pet",),
    colors=((220, 20, 60),),
    ignore_label=255,
    splits=(("train", 3680), ("test", 3669)),
)

# As in HRNet's official Cityscapes recipe, in the order of the train ids.
_CITYSCAPES_WEIGHTS = (
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
    *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
)


class Scenes(NamedTuple):
    """Default number and size of the scenes of a generated dataset.

    Attributes:
      train_images: Number of scenes to train on.
      eval_images: Number of scenes to evaluate on.
      size: (height, width) of each scene in pixels.
    """

    train_images: int
    eval_images: int
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Properties of a dataset that are known before any of its files is read.

    Attributes:
      kind: "generated": drawn by a function in `open.py`. "archives": prepared from the official archives, by a reader
        in `archives.py`. "folder": prepared from a folder with the layout of `folder.py`.
      spec: Classes, colours and ignore label; None if the folder itself names its classes.
      evaluated_split: The split that is evaluated by default.
      crop: Default (height, width) of the training crop in pixels; recipes may have their own. With None, a run chooses
        it from the sizes of the images.
      class_weights: K weights by which a published recipe multiplies the loss of each class.
      guessed: Whether a checkpoint with the same number of unnamed classes is assumed to have these classes.
      scenes: Defaults of a generated dataset; None for all others.

    Example:
      >>> from segjax import data
      >>> data.DATASETS["cityscapes"].kind, data.DATASETS["cityscapes"].evaluated_split
      ('archives', 'val')
    """

    kind: Literal["generated", "archives", "folder"]
    spec: DatasetSpec | None
    evaluated_split: str
    crop: tuple[int, int] | None = None
    class_weights: tuple[float, ...] | None = None
    guessed: bool = False
    scenes: Scenes | None = None

    def __post_init__(self):
        if (self.scenes is not None) != (self.kind == "generated"):
            raise ValueError(
                f"a {self.kind} dataset with scenes={self.scenes}; a generated one needs them, no other does"
            )
        if self.spec is None and self.kind != "folder":
            raise ValueError(f"a dataset of kind '{self.kind}' without a spec; only a folder names its own classes")


DATASETS = {
    "streets": Dataset(
        kind="generated",
        spec=STREETS,
        evaluated_split="val",
        crop=(128, 256),
        scenes=Scenes(train_images=400, eval_images=64, size=(128, 256)),
    ),
    "camvid": Dataset(
        kind="folder",
        spec=CAMVID,
        evaluated_split="test",
        # The size of its images; a larger crop would be mostly padding.
        crop=(360, 480),
        guessed=True,
    ),
    # The labels of test are not published.
    "cityscapes": Dataset(
        kind="archives",
        spec=CITYSCAPES,
        evaluated_split="val",
        # SegFormer (Xie et al., 2021), section 4.1.
        crop=(1024, 1024),
        class_weights=_CITYSCAPES_WEIGHTS,
        guessed=True,
    ),
    # The benchmark has no test split.
    "ade20k": Dataset(kind="archives", spec=ADE20K, evaluated_split="val", guessed=True),
    # The labels of test are not published.
    "voc": Dataset(kind="archives", spec=VOC, evaluated_split="val", guessed=True),
    "pet": Dataset(kind="archives", spec=PET, evaluated_split="test"),
    "folder": Dataset(kind="folder", spec=None, evaluated_split="test"),
}

# Class names and weights of each dataset with published weights; `loss.class_weights` names the dataset.
CLASS_WEIGHTS = {
    name: (dataset.spec.class_names, dataset.class_weights)
    for name, dataset in DATASETS.items()
    if dataset.spec and dataset.class_weights
}


def is_generated(name: str) -> bool:
    """Whether the table has a dataset of this name that is generated, not prepared."""
    return name in DATASETS and DATASETS[name].kind == "generated"


def prepared_names() -> tuple[str, ...]:
    """Names of the datasets that are prepared from files: all except the generated ones."""
    return tuple(name for name in DATASETS if not is_generated(name))


def guess(num_classes: int) -> DatasetSpec | None:
    """The most likely training dataset of a checkpoint with this number of unnamed classes; None if there is none."""
    for dataset in DATASETS.values():
        if dataset.guessed and dataset.spec and dataset.spec.num_classes == num_classes:
            return dataset.spec
    return None

"""Generated archives for tests: a few random images in the folders and files of each published dataset."""

import dataclasses
import io
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segjax.data import specs

COUNTS = {
    "cityscapes": {"train": 3, "val": 2, "test": 2},
    "ade20k": {"train": 3, "val": 2},
    "voc": {"train": 3, "val": 2},
    "pet": {"train": 3, "test": 2},
}
VALUES = {"cityscapes": range(34), "ade20k": range(151), "voc": [*range(21), 255], "pet": (1, 2, 3)}
ARCHIVES = {
    "cityscapes": {"leftImg8bit_trainvaltest.zip": "leftImg8bit", "gtFine_trainvaltest.zip": "gtFine"},
    "ade20k": {"ADEChallengeData2016.zip": "ADEChallengeData2016"},
    "voc": {"VOCtrainval_11-May-2012.tar": "VOCdevkit"},
    "pet": {"images.tar.gz": "images", "annotations.tar.gz": "annotations"},
}


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def encoded(suffix: str, array: np.ndarray) -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def palette_png(mask: np.ndarray) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette([channel for value in range(256) for channel in specs.voc_color(value)])
    assert image.mode == "P"
    return saved(image, "PNG")


class Made:
    """A dataset of a few random images, as it lies on disk when its archives are extracted."""

    def __init__(self, root: Path, name: str, seed: int = 0, size: tuple[int, int] | None = None):
        """Images of `size`, (height, width) in pixels; each of another size unless given."""
        self.root, self.name = root, name
        self.images: dict[str, dict[str, bytes]] = {}
        self.masks: dict[str, dict[str, np.ndarray]] = {}
        rng = np.random.default_rng([seed, len(name)])
        for split, count in COUNTS[name].items():
            for i in range(count):
                shape = size or (30 + i, 50 - 3 * i)
                image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
                mask = rng.choice(np.array(VALUES[name], np.uint8), shape)
                getattr(self, f"_{name}")(split, i, image, mask)
        getattr(self, f"_{name}_rest")()

    def add(self, split, stem, image_path, image, mask_path, mask, encode=lambda mask: encoded(".png", mask)):
        self.images.setdefault(split, {})[stem] = image
        write(self.root / image_path, image)
        if mask_path:
            self.masks.setdefault(split, {})[stem] = mask
            write(self.root / mask_path, encode(mask))

    def _cityscapes(self, split, i, image, mask):
        city = "bern" if i else "aachen"
        stem = f"{city}_{i:06d}_000019"
        ground = self.root / f"gtFine/{split}/{city}/{stem}_gtFine"
        for suffix in ("color.png", "instanceIds.png", "labelTrainIds.png", "polygons.json"):
            write(ground.with_name(f"{ground.name}_{suffix}"), b"not to be read")
        if split == "test":
            write(ground.with_name(f"{ground.name}_labelIds.png"), encoded(".png", np.zeros_like(mask)))
        path = f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"
        label = None if split == "test" else f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"
        self.add(split, stem, path, encoded(".png", image), label, mask)

    def _cityscapes_rest(self):
        write(self.root / "leftImg8bit/train/bern/._bern_000001_000019_leftImg8bit.png", b"a Mac's")
        write(self.root / "leftImg8bit/train_extra/ulm/ulm_000000_000001_leftImg8bit.png", b"not to be read")

    def _ade20k(self, split, i, image, mask):
        long = {"train": "training", "val": "validation"}[split]
        stem, top = f"ADE_{split}_{i + 1:08d}", "ADEChallengeData2016"
        # A few of the images are grey.
        content = encoded(".jpg", image[..., 0] if i == 1 else image)
        self.add(split, stem, f"{top}/images/{long}/{stem}.jpg", content, f"{top}/annotations/{long}/{stem}.png", mask)

    def _ade20k_rest(self):
        write(self.root / "ADEChallengeData2016/annotations/training/._ADE_train_00000001.png", b"a Mac's")
        for name in ("objectInfo150.txt", "sceneCategories.txt"):
            write(self.root / "ADEChallengeData2016" / name, b"not to be read")

    def _voc(self, split, i, image, mask):
        top, stem = "VOCdevkit/VOC2012", f"200{7 + i}_000{'train val'.index(split)}32"
        label = f"{top}/SegmentationClass/{stem}.png"
        self.add(split, stem, f"{top}/JPEGImages/{stem}.jpg", encoded(".jpg", image), label, mask, palette_png)

    def _voc_rest(self):
        top = self.root / "VOCdevkit/VOC2012"
        write(top / "JPEGImages/2008_000001.jpg", b"in no list")
        write(top / "SegmentationObject/2007_000032.png", b"not to be read")
        for split, found in self.images.items():
            # Not in order, and one without the last line's end.
            names = "\n".join(sorted(found, reverse=True)) + ("\n" if split == "train" else "")
            write(top / f"ImageSets/Segmentation/{split}.txt", names.encode())

    def _pet(self, split, i, image, mask):
        stem = f"{'Abyssinian' if split == 'train' else 'yorkshire_terrier'}_{i + 1}"
        content = encoded(".jpg", image)
        if split == "test":
            # Some .jpg files are PNG inside, with alpha.
            content = encoded(".png", np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]))
        self.add(split, stem, f"images/{stem}.jpg", content, f"annotations/trimaps/{stem}.png", mask)

    def _pet_rest(self):
        write(self.root / "images/Abyssinian_100.mat", b"not to be read")
        write(self.root / "images/Abyssinian_34.jpg", b"GIF89a in no list")
        write(self.root / "annotations/list.txt", b"#Image CLASS-ID SPECIES BREED ID\n")
        write(self.root / "annotations/xmls/Abyssinian_1.xml", b"not to be read")
        for split, found in self.images.items():
            write(self.root / f"annotations/trimaps/._{next(iter(found))}.png", b"a Mac's")
            lines = "".join(f"{name} 1 1 1\n" for name in found)
            write(self.root / f"annotations/{'trainval' if split == 'train' else split}.txt", lines.encode())

    def packed(self, to: Path) -> list[Path]:
        """The official archives."""
        return [pack(self.root, to / name, part) for name, part in ARCHIVES[self.name].items()]


def pack(root: Path, archive: Path, part: str) -> Path:
    """Folder `part` of `root` in a new archive, in the order of the disk, with what systems add."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("README", "a readme")
            file.mkdir(part)
            for path in (root / part).rglob("*"):
                file.write(path, path.relative_to(root))
            file.writestr(f"__MACOSX/{part}/._x.png", "a Mac's")
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as file:
            file.add(root / part, f"./{part}" if part == "images" else part)
    return archive


def few_images():
    """The table's datasets with the numbers of images of `COUNTS` in place of the published ones."""
    cut = {}
    for name, counts in COUNTS.items():
        dataset = specs.DATASETS[name]
        spec = dataclasses.replace(dataset.spec, splits=tuple(counts.items()))
        cut[name] = dataclasses.replace(dataset, spec=spec)
    return cut

"""Fuzzed subjects: real files of every kind that segjax reads, their changes, and the commands that read them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from segjax.__main__ import main
from tests.fuzz import mutations
from tests.fuzz.mutations import Mutation

SPLITS = {"train": 3, "val": 2}
NAMES = ("ground", "thing", "other")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of input.

    Attributes:
      make: (folder) -> None; writes the originals.
      mutate: (folder, generator) -> what was changed, in a copy of that folder.
      commands: what is run in the copy: arguments of `segjax`, or a function that returns a status.
      outputs: names in the folder that a command writes, or may write.
      needs: an optional package without which there is no such input.
    """

    make: Callable[[Path], None]
    mutate: Callable[[Path, np.random.Generator], Mutation]
    commands: Sequence[Sequence[str] | Callable[[], int]]
    outputs: tuple[str, ...] = ()
    needs: str = ""


def refusing(function: Callable[[], object]) -> Callable[[], int]:
    """A function of the API as a command: what it refuses is printed, with status 2."""

    def run() -> int:
        try:
            function()
        except ValueError as error:
            print(f"refused: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            # Commands print these two.
            print(f"refused: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        return 0

    return run


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _model(family: str):
    from tests.tiny import tiny_model

    return tiny_model(3, family, num_classes=3)


def _metadata():
    from segjax.checkpoints.metadata import IMAGENET, dataset_metadata
    from segjax.data import specs

    spec = specs.DatasetSpec("shapes", NAMES, ((0, 0, 0), (200, 0, 0), (0, 200, 0)), 255)
    return {"dataset": dataset_metadata(spec), "normalisation": IMAGENET}


def _make_orbax(folder: Path, family: str = "plain with norm") -> None:
    """By default of a family with BatchNorm, whose running statistics can be wrong too."""
    from segjax.checkpoints import orbax_folder

    orbax_folder.save_model(folder / "model", _model(family), metadata=_metadata())


def _converted(destination: str, *flags: str, family: str = "plain with norm") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _make_orbax(folder, family)
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            assert main(["convert", "model", destination, *flags]) == 0
        import shutil

        shutil.rmtree(folder / "model")

    return make


def _mutate_pth(folder: Path, rng: np.random.Generator) -> Mutation:
    # By name, because tests need no torch; without it there is no such subject.
    torch = importlib.import_module("torch")
    path = folder / "m.pth"
    kind = rng.choice(["bytes", "zip", "tensors", "tensors", "odd", "folder"])
    if kind == "bytes":
        return mutations.of_bytes(path, rng)
    if kind == "zip":
        return mutations.of_zip(path, rng, is_read=True)
    if kind == "folder":
        return mutations.of_folder(folder, rng)
    state = torch.load(path, weights_only=True)
    if kind == "tensors":
        arrays = {name: value.numpy() for name, value in state.items()}
        mutation = mutations.of_tensors(arrays, rng)
        state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
    else:
        # Counters of batches are not read.
        names = sorted(name for name in state if not name.endswith("num_batches_tracked"))
        name = names[rng.integers(len(names))]
        odd: dict[str, Callable[[], object]] = {
            "stretched": lambda: torch.zeros(1).expand(1 << 40),
            "sparse": lambda: torch.eye(4).to_sparse(),
            "complex": lambda: state[name].to(torch.complex64),
            "quantized": lambda: torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8),
            "float8": lambda: state[name].to(torch.float8_e4m3fn),
            "list": lambda: [1, 2],
            "text": lambda: "x",
            "state dict": lambda: dict(state),
            "float64 beyond float32": lambda: torch.full_like(state[name], 1e300, dtype=torch.float64),
        }
        choice = sorted(odd)[rng.integers(len(odd))]
        state[name] = odd[choice]()
        mutation = Mutation(f"{name}: {choice}", is_bad=choice not in ("state dict", "float8"))
    torch.save(state, path)
    return mutation


def _make_pickles(folder: Path) -> None:
    """The weights of a model as people keep them in pickles without a zip, and in an archive of arrays."""
    torch = importlib.import_module("torch")
    _converted("m.pth")(folder)
    state = torch.load(folder / "m.pth", weights_only=True)
    (folder / "m.pth").unlink()
    # As before torch 1.6: pickles, and the numbers behind them.
    torch.save({"epoch": 3, "state_dict": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    arrays = {name: value.numpy() for name, value in state.items()}
    np.savez(folder / "arrays.npz", **arrays)
    for protocol in (0, 2):
        (folder / f"tensors{protocol}.pkl").write_bytes(pickle.dumps(state, protocol))
        (folder / f"arrays{protocol}.pkl").write_bytes(pickle.dumps(arrays, protocol))


def _mutate_pickle(folder: Path, rng: np.random.Generator) -> Mutation:
    files = sorted(folder.iterdir())
    path = files[rng.integers(len(files))]
    for other in files:
        if other != path:
            other.unlink()
    name, path = path.name, path.rename(folder / "m.pkl")
    kind = rng.choice(["bytes", "opcode", "opcode", "opcode", "arrays", "folder"])
    if kind == "bytes":
        return mutations.of_bytes(path, rng)
    if kind == "folder":
        return mutations.of_folder(folder, rng)
    if name == "arrays.npz":
        return mutations.of_zip(path, rng, is_read=True)
    if kind == "arrays" and name.startswith("arrays"):
        arrays = pickle.loads(path.read_bytes())
        mutation = mutations.of_tensors(arrays, rng)
        path.write_bytes(pickle.dumps(arrays, int(rng.integers(6))))
        return Mutation(f"{path.name}: {mutation.text}", mutation.is_bad)
    return mutations.of_pickle(path, rng)


def _mutate_safetensors(folder: Path, rng: np.random.Generator) -> Mutation:
    path = folder / "m.safetensors"
    kind = rng.choice(["bytes", "data", "header", "metadata", "tensors", "foreign tensors", "length", "folder"])
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if kind == "bytes":
        return mutations.of_bytes(path, rng)
    if kind == "folder":
        return mutations.of_folder(folder, rng)
    if kind == "data":
        at = int(rng.integers(8 + length, len(data)))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :])
        return Mutation(f"{path.name}: a bit of the tensors at {at}", is_bad=True)
    if kind == "length":
        path.write_bytes(struct.pack("<Q", int(rng.choice([0, 1, length - 1, length + 1, 10**8, 2**63]))) + data[8:])
        return Mutation(f"{path.name}: the length of the header", is_bad=path.read_bytes() != data)
    if kind in ("tensors", "foreign tensors"):
        from safetensors.numpy import load_file, save_file

        arrays = load_file(path)
        mutation = mutations.of_tensors(arrays, rng)
        # Those of other packages have no metadata of segjax, and so no hash.
        metadata = header["__metadata__"] if kind == "tensors" else None
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, metadata)
        return Mutation(f"{path.name}: {mutation.text}", mutation.is_bad)
    if kind == "metadata":
        key = "segjax"
        content, text = mutations.of_json(json.loads(header["__metadata__"][key]), rng)
        header["__metadata__"][key] = json.dumps(content)
    else:
        header, text = mutations.of_json(header, rng)
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length :])
    return Mutation(f"{path.name}: {kind} {text}")


def _mutate_orbax(folder: Path, rng: np.random.Generator) -> Mutation:
    files = sorted(path for path in (folder / "model").rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    kind = rng.choice(["bytes", "bytes", "json", "folder"])
    if kind == "folder":
        return mutations.of_folder(folder / "model", rng)
    if kind == "json":
        signed = folder / "model/about/metadata"
        before = json.loads(signed.read_text())
        mutation = mutations.of_json_file(signed, rng)
        # Except what JSON cannot tell apart, all of it is hashed; files of before have no hash.
        same = before, {key: value for key, value in before.items() if key != "sha256_record"}
        return Mutation(mutation.text, is_bad=mutation.is_bad or json.loads(signed.read_text()) not in same)
    mutation = mutations.of_bytes(path, rng)
    # Messages name the checkpoint.
    return Mutation(f"{path.relative_to(folder)} of model: {mutation.text}")


def _mutate_transformers(folder: Path, rng: np.random.Generator) -> Mutation:
    files = sorted((folder / "hf").iterdir())
    path = files[rng.integers(len(files))]
    kind = rng.choice(["json", "json", "json", "bytes", "folder"])
    if kind == "folder":
        return mutations.of_folder(folder / "hf", rng)
    if kind == "json" and path.suffix == ".json":
        return mutations.of_json_file(path, rng)
    return mutations.of_bytes(path, rng)


def _make_temperature(folder: Path) -> None:
    from segjax.checkpoints import load, temperature

    _make_orbax(folder)
    fitted = {"value": 1.3, "data": "streets:test", "nll_before": 0.5, "nll": 0.4}
    temperature.keep(folder / "model/temperature.json", load.load(folder / "model").model, fitted)


def _mutate_temperature(folder: Path, rng: np.random.Generator) -> Mutation:
    path = folder / "model/temperature.json"
    return mutations.of_json_file(path, rng) if rng.random() < 0.7 else mutations.of_bytes(path, rng)


def _of_checkpoint(name: str) -> list[list[str]]:
    return [["inspect", name], ["convert", name, "out.safetensors"]]


# ------------------------------------------------------------------------------------------------------- exported files


def _make_exported(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from PIL import Image

        from segjax.exports.export import export_model
        from tests.tiny import tiny_model

        (folder / "exported").mkdir()
        export_model(tiny_model(0), folder / f"exported/m{suffix}", size=(32, 48), preprocessing=True)
        Image.fromarray(_scene(0, 32, 48)).save(folder / "in.png")

    return make


def _mutate_exported(folder: Path, rng: np.random.Generator) -> Mutation:
    exported = folder / "exported"
    files = sorted(exported.iterdir())
    kind = rng.choice(["bytes", "bytes", "json", "folder"])
    if kind == "folder":
        return mutations.of_folder(exported, rng)
    if kind == "json" and files[-1].suffix == ".json":
        return mutations.of_json_file(files[-1], rng)
    # The metadata have a hash of the file.
    return mutations.of_bytes(files[0], rng, sealed=len(files) > 1)


def _predict_with(name: str) -> list[str]:
    return ["predict", "in.png", "--checkpoint", name, "--output", "out"]


# --------------------------------------------------------------------------------------------------------------- images


def _scene(seed: int, height: int, width: int) -> np.ndarray:
    import cv2

    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), (width, height))


def _make_images(folder: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(_scene(0, 33, 47))
    for suffix, settings in {
        "png": {},
        "jpg": {"quality": 90},
        "bmp": {},
        "webp": {},
        "tif": {"compression": "tiff_lzw"},
    }.items():
        picture.save(folder / f"image.{suffix}", **settings)
    picture.save(folder / "plain.tif")
    picture.quantize(16).save(folder / "palette.png")
    picture.convert("L").save(folder / "grey.tif", compression="tiff_deflate")


def _mutate_image(folder: Path, rng: np.random.Generator) -> Mutation:
    files = sorted(folder.iterdir())
    path = files[rng.integers(len(files))]
    kind = rng.choice(["bytes", "bytes", "bytes", "header", "folder"])
    # One image is read in a trial.
    for other in set(files) - {path}:
        other.unlink()
    if kind == "folder":
        return mutations.of_folder(folder, rng)
    is_png = path.suffix == ".png"
    if kind == "header" and is_png:
        import zlib

        data = bytearray(path.read_bytes())
        # A new width or height, with a CRC that fits.
        struct.pack_into(">I", data, int(rng.choice([16, 20])), int(rng.choice([0, 1, 30_000, 2**31 - 1, 2**32 - 1])))
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
        path.write_bytes(data)
        return Mutation(f"{path.name}: another size in the header", is_bad=True)
    if kind == "header" and path.suffix == ".tif":
        return mutations.of_tiff(path, rng)
    return mutations.of_bytes(path, rng, sealed=is_png)


def _read_image() -> int:
    from segjax.inference.images import as_rgb

    # The mutation may have removed it.
    path = next(Path().iterdir(), Path("removed.png"))
    return refusing(lambda: as_rgb(path))()


def _make_bands(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import tifffile

        from tests import made_bands

        made = made_bands.folder(folder / "data", 4, "uint16", suffix=suffix)["train"]
        others = [made_bands.array(5, (33, 47), channels, dtype) for channels, dtype in ((1, "uint8"), (3, "float32"))]
        (folder / "others").mkdir()
        for number, image in enumerate(others):
            if suffix == ".npy":
                np.save(folder / f"others/{number}.npy", np.asfortranarray(image).astype(image.dtype.newbyteorder(">")))
            else:
                path = folder / f"others/{number}.tif"
                settings = {"planarconfig": "contig"} if image.shape[2] > 1 else {}
                tifffile.imwrite(path, image.squeeze(), photometric="minisblack", compression="lzw", **settings)
        if suffix == ".tif":
            settings: dict = {"photometric": "minisblack", "compression": "zlib", "tile": (16, 32)}
            place = folder / "data/images/train"
            planes = np.moveaxis(made[0], 2, 0)
            tifffile.imwrite(place / "a.tif", planes, planarconfig="separate", predictor=2, **settings)
            # With a value for pixels without data, which makes it a scene that is predicted in parts.
            nodata = [(42113, "s", 0, "0", True)]
            tifffile.imwrite(place / "b.tif", made[1], planarconfig="contig", extratags=nodata, **settings)

    return make


def _mutate_bands(folder: Path, rng: np.random.Generator) -> Mutation:
    files = [path for path in sorted(folder.rglob("*.*")) if path.suffix in (".npy", ".tif")]
    path = files[rng.integers(len(files))]
    kind = rng.choice(["bytes", "header", "header", "folder"])
    if kind == "folder":
        return mutations.of_folder(path.parent, rng)
    if kind == "bytes":
        return mutations.of_bytes(path, rng)
    return (mutations.of_npy if path.suffix == ".npy" else mutations.of_tiff)(path, rng)


def _read_bands() -> None:
    from importlib.util import find_spec

    from segjax.data import specs
    from segjax.inference import geotiff, images

    paths = [*Path("data/images").rglob("*.*"), *Path("others").iterdir()]
    for path in sorted(path for path in paths if not path.is_dir()):
        kind = specs.ImageKind(*{"0": (1, "uint8"), "1": (3, "float32")}.get(path.stem, (4, "uint16")))
        images.as_image(path, kind)
        if path.suffix == ".tif" and find_spec("rasterio") and geotiff.kind(path, images.MAX_PIXELS) == "scene":
            try:
                with geotiff.opened(path, scale=None, images=kind) as scene:
                    height, width, _ = scene.shape
                    for top in range(0, height, 16):
                        scene[top : min(top + 16, height), 0:width]
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


def _make_video(folder: Path) -> None:
    import av

    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(_scene(number, 32, 48), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _read_video() -> int:
    from segjax.viz import video

    def read():
        try:
            with video.opened(Path("clip.mp4")) as (_, frames):
                for _ in frames:
                    pass
        except video.VideoError as error:
            # Who reads a video names it.
            raise ValueError(f"clip.mp4: {error}") from None

    return refusing(read)()


# ------------------------------------------------------------------------------------------------------------- datasets


def _make_folder(folder: Path) -> None:
    import cv2
    import tifffile

    rng = np.random.default_rng(1)
    for split, count in SPLITS.items():
        for kind in ("images", "labels"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for number in range(count):
            size = (33, 47 + number)
            suffix = "jpg" if number == 1 else "png"
            cv2.imwrite(str(folder / f"data/images/{split}/i{number}.{suffix}"), _scene(number, *size))
            label = rng.choice([0, 1, 2, 255], size).astype(np.uint8)
            place = folder / f"data/labels/{split}/i{number}"
            if split == "train":
                cv2.imwrite(f"{place}.png", label)
            elif number:
                np.save(f"{place}.npy", label.astype(np.int16))
            else:
                tifffile.imwrite(f"{place}.tif", label, photometric="minisblack", compression="lzw")
    classes = {"names": NAMES, "colors": [[0, 0, 0], [200, 0, 0], [0, 200, 0]], "ignore": 255}
    (folder / "data/classes.json").write_text(json.dumps(classes))


def _make_prepared(folder: Path) -> None:
    from segjax.data.open import open_splits

    _make_folder(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        open_splits("folder", ("train", "val"), source=folder / "data", data_dir=folder / "prepared")
    (path,) = (folder / "prepared").glob("*/*/*")
    path.rename(folder / "dataset")


def _mutate_prepared(folder: Path, rng: np.random.Generator) -> Mutation:
    dataset = folder / "dataset"
    kind = rng.choice(["json", "json", "bytes", "folder"])
    if kind == "folder":
        return mutations.of_folder(dataset, rng)
    files = sorted(path for path in dataset.iterdir() if (path.suffix == ".json") == (kind == "json"))
    path = files[rng.integers(len(files))]
    return mutations.of_json_file(path, rng) if kind == "json" else mutations.of_bytes(path, rng)


def _read_prepared() -> None:
    from segjax.data.prepared import open_prepared

    prepared = open_prepared(Path("dataset"))
    for split in SPLITS:
        prepared.load(split)
        prepared.pixel_counts(split)


PREDICTED = {"checkpoint": "m", "mode": "whole", "scales": [1.0], "flip": False}


def _make_records(folder: Path) -> None:
    """The records that commands write and read again: of the data of a run, and of an output folder."""
    hashes = {split: {f"i{n}": [f"{n:032x}", None] for n in range(count)} for split, count in SPLITS.items()}
    data = {"path": "/data", "source": "/source", "contents": hashes}
    (folder / "data.json").write_text(json.dumps(data))
    incomplete = {"/a.mp4": {"reason": "ends early", "size": 3, "modified": 4}}
    (folder / "predict.json").write_text(json.dumps(PREDICTED | {"format_version": 1, "incomplete": incomplete}))


def _mutate_records(folder: Path, rng: np.random.Generator) -> Mutation:
    path = folder / ("data.json", "predict.json")[rng.integers(2)]
    kind = rng.choice(["json", "json", "bytes", "folder"])
    if kind == "folder":
        return mutations.of_folder(folder, rng)
    return mutations.of_json_file(path, rng) if kind == "json" else mutations.of_bytes(path, rng)


def _read_records() -> None:
    from segjax.data import contents
    from segjax.inference import batch_run

    now = contents.read_run_data(Path("data.json"))
    if now is not None:
        contents.differences(now["contents"], {})
    batch_run.done_before([], Path(), PREDICTED)


def _mutate_dataset(folder: Path, rng: np.random.Generator) -> Mutation:
    data = folder / "data"
    kind = rng.choice(["json", "bytes", "bytes", "values", "folder", "twice"])
    files = sorted(path for path in data.rglob("*.*") if path.suffix in (".png", ".jpg", ".tif", ".npy"))
    path = files[rng.integers(len(files))]
    if kind == "bytes" and path.suffix in (".tif", ".npy") and rng.integers(2):
        return (mutations.of_tiff if path.suffix == ".tif" else mutations.of_npy)(path, rng)
    if kind == "json":
        return mutations.of_json_file(data / "classes.json", rng)
    if kind == "folder":
        return mutations.of_folder(data, rng)
    if kind == "twice":
        copy = path.with_suffix(".png" if path.suffix != ".png" else ".jpeg")
        copy.write_bytes(path.read_bytes())
        return Mutation(f"{copy.relative_to(data)} next to {path.name}", is_bad=True)
    if kind == "values":
        import cv2

        path = data / "labels/train/i0.png"
        label = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert label is not None
        value = int(rng.integers(3, 255))
        label[rng.integers(label.shape[0]), rng.integers(label.shape[1])] = value
        cv2.imwrite(str(path), label)
        return Mutation(f"a mask with the value {value}", is_bad=True)
    return mutations.of_bytes(path, rng, sealed=path.suffix == ".png")


def _make_archives(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tests.made_archives import Made

        (folder / "archives").mkdir()
        Made(folder.parent / "made", name).packed(folder / "archives")

    return make


def _mutate_archive(folder: Path, rng: np.random.Generator) -> Mutation:
    files = sorted((folder / "archives").iterdir())
    path = files[rng.integers(len(files))]
    kind = rng.choice(["bytes", "bytes", "members", "folder"])
    if kind == "folder":
        return mutations.of_folder(folder / "archives", rng)
    if kind == "members" and path.suffix == ".zip":
        return mutations.of_zip(path, rng, is_read=False)
    return mutations.of_bytes(path, rng)


def _prepare_archives(name: str) -> Callable[[], int]:
    def run() -> int:
        from segjax.data import specs
        from tests.made_archives import few_images

        with mock.patch.dict(specs.DATASETS, few_images()):
            return main(["data", "prepare", name, "--source", "archives", "--data-dir", "prepared"])

    return run


def _make_panoptic(folder: Path) -> None:
    """COCO's panoptic segments: a PNG for each image, whose colours are ids of segments."""
    import cv2

    rng = np.random.default_rng(3)
    images, annotations = [], []
    for place in ("train2017", "annotations/panoptic_train2017"):
        (folder / "panoptic" / place).mkdir(parents=True)
    for number, name in enumerate("abc"):
        cv2.imwrite(str(folder / f"panoptic/train2017/{name}.jpg"), _scene(number, 33, 47))
        ids = rng.choice([0, 7, 300, 70_001], (33, 47))
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65_536], axis=-1).astype(np.uint8)
        cv2.imwrite(str(folder / f"panoptic/annotations/panoptic_train2017/{name}.png"), colors[..., ::-1])
        images.append({"id": number, "file_name": f"{name}.jpg", "height": 33, "width": 47})
        parts = ((7, 3, 0), (300, 4, 0), (70_001, 4, 1))
        segments = [{"id": part, "category_id": of, "iscrowd": crowd} for part, of, crowd in parts]
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{"id": 3, "name": "cat", "isthing": 1}, {"id": 4, "name": "grass", "isthing": 0}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic/annotations/panoptic_train2017.json").write_text(json.dumps(content))


def _make_roboflow(folder: Path) -> None:
    """Exports of Roboflow: outlines as COCO has them, and masks with a table of their values."""
    import cv2

    rng = np.random.default_rng(4)
    for split, names in (("train", "abc"), ("valid", "de")):
        outlines, masks = folder / "roboflow" / split, folder / "roboflow-masks" / split
        images, annotations = [], []
        for place in (outlines, masks):
            place.mkdir(parents=True)
        for number, name in enumerate(names):
            file_name = f"{name}_jpg.rf.{number:032x}.jpg"
            for place in (outlines, masks):
                cv2.imwrite(str(place / file_name), _scene(number, 33, 47))
            label = rng.integers(0, 3, (33, 47)).astype(np.uint8)
            cv2.imwrite(str(masks / f"{Path(file_name).stem}_mask.png"), label)
            images.append({"id": number, "license": 1, "file_name": file_name, "height": 33, "width": 47})
            polygon = (rng.random((4, 2)) * (47, 33)).ravel().round(3).tolist()
            entry = {"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": [0, 0, 47, 33]}
            annotations.append({**entry, "area": 90, "segmentation": [polygon], "iscrowd": 0})
        names_of_classes = ("animals", "cat", "dog")
        categories = [{"id": n, "name": of, "supercategory": "none"} for n, of in enumerate(names_of_classes)]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (outlines / "_annotations.coco.json").write_text(json.dumps(content))
        (masks / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n")


def _make_annotations(folder: Path) -> None:
    """The same images with the annotations of every tool that `segjax data import` reads."""
    import base64

    import cv2

    scenes = {name: cv2.imencode(".jpg", _scene(number, 33, 47))[1].tobytes() for number, name in enumerate("abc")}
    mask = cv2.imencode(".png", np.tri(9, 12, dtype=np.uint8))[1].tobytes()
    polygon = [3.5, 2, 20, 4, 18.25, 25, 5, 20]
    for place in ("coco/train2017", "labelme", "yolo/images/train", "voc/JPEGImages"):
        (folder / place).mkdir(parents=True)
        for name, data in scenes.items():
            (folder / place / f"{name}.jpg").write_bytes(data)
    shapes: list = [polygon, polygon[2:], {"size": [33, 47], "counts": [40, 30, 1481]}]
    shapes = [[shape] if isinstance(shape, list) else shape for shape in shapes]
    shapes.append({"size": [33, 47], "counts": "X1n0Y^1"})
    content = {
        "images": [{"id": n, "file_name": f"{name}.jpg", "height": 33, "width": 47} for n, name in enumerate("abc")],
        "annotations": [
            {"image_id": n % 2, "category_id": 3 + n % 2, "segmentation": shape, "iscrowd": int(n == 2)}
            for n, shape in enumerate(shapes)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
    }
    (folder / "coco/annotations").mkdir()
    (folder / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))
    corners = np.reshape(polygon, (-1, 2)).tolist()
    marked = [
        {"label": "cat", "points": corners, "shape_type": "polygon"},
        {"label": "dog", "points": corners[:2], "shape_type": "circle"},
        {"label": "dog", "points": corners[::2], "shape_type": "rectangle"},
        {"label": "cat", "points": corners[:2], "shape_type": "mask", "mask": base64.b64encode(mask).decode()},
    ]
    inside = base64.b64encode(scenes["b"]).decode()
    for name, data in (("a", None), ("lost", inside)):
        entry = {"imagePath": f"{name}.jpg", "imageData": data, "imageHeight": 33, "imageWidth": 47, "shapes": marked}
        (folder / f"labelme/{name}.json").write_text(json.dumps(entry))
    (folder / "yolo/labels/train").mkdir(parents=True)
    shares = " ".join(str(number / 50) for number in polygon)
    (folder / "yolo/labels/train/a.txt").write_text(f"0 {shares}\n1 0.5 0.5 0.2 0.2\n1 {shares} 0.1 0.9\n")
    (folder / "yolo/data.yaml").write_text("path: .\ntrain: images/train\nnames:\n  0: cat\n  1: dog\n")
    (folder / "voc/SegmentationClass").mkdir()
    (folder / "voc/ImageSets/Segmentation").mkdir(parents=True)
    for name in scenes:
        label = np.random.default_rng(2).choice([0, 1, 2, 255], (33, 47)).astype(np.uint8)
        cv2.imwrite(str(folder / f"voc/SegmentationClass/{name}.png"), label)
    (folder / "voc/ImageSets/Segmentation/train.txt").write_text("a\nb\nc\n")
    (folder / "voc/class_names.txt").write_text("_background_\ncat\ndog\n")


def _mutate_annotations(kind: str) -> Callable[[Path, np.random.Generator], Mutation]:
    def mutate(folder: Path, rng: np.random.Generator) -> Mutation:
        files = sorted(path for path in (folder / kind).rglob("*") if path.is_file())
        # Images are alike, and there are more of them.
        others = [path for path in files if path.suffix in (".json", ".txt", ".yaml", ".csv", ".png")]
        files = others if rng.integers(4) else files
        path = files[rng.integers(len(files))]
        way = rng.choice(["bytes", "bytes", "json", "json", "json", "folder"])
        if way == "folder":
            found = mutations.of_folder(folder / kind, rng)
        elif way == "json" and path.suffix == ".json":
            found = mutations.of_json_file(path, rng)
        else:
            found = mutations.of_bytes(path, rng)
        # An image that cannot be used is counted and skipped.
        return Mutation(f"{kind}, {found.text}")

    return mutate


def _import_annotations(kind: str, source: str) -> Callable[[], int]:
    def run() -> int:
        if status := main(["data", "import", kind, source, "imported"]):
            return status
        # What was imported can be prepared as it is.
        assert main(["data", "prepare", "folder", "--source", "imported", "--data-dir", "prepared"]) == 0
        return 0

    return run


# ----------------------------------------------------------------------------------------------------------------- runs


def _run_config():
    from tests import runs

    return runs.make_config(eval__every=3, eval__pictures=0)


def _make_run(folder: Path) -> None:
    import pytest

    from tests import runs

    with pytest.MonkeyPatch.context() as patch:
        runs.cheap_step(patch)
        assert runs.run(_run_config(), folder / "run")[0] == 0


def _mutate_run(folder: Path, rng: np.random.Generator) -> Mutation:
    run = folder / "run"
    kind = rng.choice(["result", "result", "log", "bytes", "folder"])
    if kind == "result":
        return mutations.of_json_file(run / "result.json", rng)
    if kind == "log":
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines()
        number = int(rng.integers(len(lines)))
        content, text = mutations.of_json(json.loads(lines[number]), rng)
        lines[number] = json.dumps(content)
        path.write_text("\n".join(lines) + "\n")
        return Mutation(f"metrics.jsonl line {number + 1}: {text}")
    if kind == "folder":
        return mutations.of_folder(run, rng)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    # A run that has ended reads its result, and not all of its checkpoints.
    return Mutation(mutations.of_bytes(files[rng.integers(len(files))], rng).text)


def _train_again() -> int:
    """The same run again: it has ended, or goes on from a checkpoint, which is not carried out here."""
    from segjax.commands.ending import run_command
    from segjax.train import loop, setup
    from tests.forks import quickly

    def train() -> int:
        create = mock.patch.object(setup, "create_model", quickly(setup.create_model))
        goes_on = mock.patch.object(setup, "compile_step", side_effect=_GoesOnError)
        with create, goes_on, contextlib.suppress(_GoesOnError):
            return loop.train(_run_config(), Path("run"))
        return 0

    return run_command("segjax train", train)


class _GoesOnError(Exception):
    """The run would train now."""


# ------------------------------------------------------------------------------------------------------------- settings

_VALUES = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e400",
    "''",
    "None",
    "[]",
    "(1,)",
    "x",
    "True",
    "10**9",
    "99999999999999999999",
)
_CONFIG = '''"""A config of a person's own."""

from configs import segformer


def get_config(argument="b0,streets"):
    config = segformer.get_config(argument)
    config.train.steps = 20
    config.augment.crop = (64, 96)
    config.optim.lr = 1e-3
    config.data.update(train_images=7, eval_images=5)
    return config
'''


def _mutate_settings(folder: Path, rng: np.random.Generator) -> Mutation:
    from segjax.train import schema

    keys = [key for key in schema.SETTINGS if key not in ("seed",)]
    chosen = [keys[number] for number in rng.integers(len(keys), size=rng.integers(1, 4))]
    values = [str(rng.choice(_VALUES)) for _ in chosen]
    arguments = [f"--config.{key}={value}" for key, value in zip(chosen, values, strict=True)]
    (folder / "flags").write_text("\n".join(arguments))
    never = any(
        value in ("nan", "inf", "-inf", "1e400") and isinstance(schema.SETTINGS[key].default, float)
        for key, value in zip(chosen, values, strict=True)
    )
    return Mutation(" ".join(arguments), is_bad=never)


def _mutate_config(folder: Path, rng: np.random.Generator) -> Mutation:
    lines = _CONFIG.splitlines()
    number = int(rng.integers(2, len(lines)))
    kind = rng.choice(["removed", "cut", "spelled", "repeated", "raises"])
    line = lines[number]
    if kind == "removed":
        del lines[number]
    elif kind == "cut":
        lines[number] = line[: rng.integers(len(line) + 1)]
    elif kind == "spelled" and line:
        at = int(rng.integers(len(line)))
        lines[number] = line[:at] + chr(rng.integers(33, 127)) + line[at + 1 :]
    elif kind == "repeated":
        lines.insert(number, line)
    else:
        lines[number] = "    " + str(
            rng.choice(["1 / 0", "raise SystemExit(3)", "return None", "config.x = 1", "[][1]"])
        )
    (folder / "mine.py").write_text("\n".join(lines) + "\n")
    return Mutation(f"mine.py: line {number + 1} {kind}: {lines[min(number, len(lines) - 1)]!r}")


def _train(*arguments: str) -> int:
    """The command up to the point where every setting was checked."""
    from segjax.train import loop
    from segjax.train.config import check

    def checked(config, workdir, **_):
        check(config, workdir)
        return 0

    with mock.patch.object(loop, "train", checked):
        return main(["train", *arguments, "--workdir=run"])


SUBJECTS = {
    "pth": Subject(_converted("m.pth"), _mutate_pth, _of_checkpoint("m.pth"), ("out.safetensors",), "torch"),
    "pickle": Subject(_make_pickles, _mutate_pickle, _of_checkpoint("m.pkl"), ("out.safetensors",), "torch"),
    "safetensors": Subject(
        _converted("m.safetensors"), _mutate_safetensors, _of_checkpoint("m.safetensors"), ("out.safetensors",)
    ),
    "orbax": Subject(_make_orbax, _mutate_orbax, _of_checkpoint("model"), ("out.safetensors",)),
    "transformers": Subject(
        _converted("hf", "--to", "hf", family="segformer"),
        _mutate_transformers,
        _of_checkpoint("hf"),
        ("out.safetensors",),
    ),
    "temperature": Subject(_make_temperature, _mutate_temperature, _of_checkpoint("model"), ("out.safetensors",)),
    "stablehlo": Subject(
        _make_exported(".stablehlo"), _mutate_exported, [_predict_with("exported/m.stablehlo")], ("out",)
    ),
    **{
        suffix[1:]: Subject(
            _make_exported(suffix), _mutate_exported, [_predict_with(f"exported/m{suffix}")], ("out",), needs
        )
        for suffix, needs in ((".onnx", "onnxruntime"), (".pt2", "torch"))
    },
    "image": Subject(_make_images, _mutate_image, [_read_image]),
    **{
        suffix[1:]: Subject(
            _make_bands(suffix),
            _mutate_bands,
            [refusing(_read_bands), ["data", "prepare", "folder", "--source", "data", "--data-dir", "prepared"]],
            ("prepared",),
        )
        for suffix in (".npy", ".tif")
    },
    "video": Subject(
        _make_video, lambda folder, rng: mutations.of_bytes(folder / "clip.mp4", rng), [_read_video], (), "av"
    ),
    "folder": Subject(
        _make_folder,
        _mutate_dataset,
        [["data", "prepare", "folder", "--source", "data", "--data-dir", "prepared"]],
        ("prepared",),
    ),
    **{
        name: Subject(_make_archives(name), _mutate_archive, [_prepare_archives(name)], ("prepared",))
        for name in ("cityscapes", "voc", "pet")
    },
    **{
        name: Subject(
            _make_annotations,
            _mutate_annotations(name),
            [_import_annotations(name, name)],
            ("imported", "prepared"),
            "pycocotools",
        )
        for name in ("coco", "labelme", "yolo")
    },
    "masks": Subject(
        _make_annotations, _mutate_annotations("voc"), [_import_annotations("voc", "voc")], ("imported", "prepared")
    ),
    **{
        name: Subject(
            make, _mutate_annotations(name), [_import_annotations(kind, name)], ("imported", "prepared"), needs
        )
        for name, make, kind, needs in (
            ("panoptic", _make_panoptic, "coco", ""),
            ("roboflow", _make_roboflow, "coco", "pycocotools"),
            ("roboflow-masks", _make_roboflow, "voc", ""),
        )
    },
    "prepared": Subject(_make_prepared, _mutate_prepared, [refusing(_read_prepared)]),
    "records": Subject(_make_records, _mutate_records, [refusing(_read_records)]),
    "run": Subject(_make_run, _mutate_run, [_train_again], ("run",)),
    "settings": Subject(
        lambda folder: None, _mutate_settings, [lambda: _train(*Path("flags").read_text().splitlines())]
    ),
    "config": Subject(lambda folder: None, _mutate_config, [lambda: _train("--config", "mine.py")], ("__pycache__",)),
}

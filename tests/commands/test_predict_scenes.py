"""GeoTIFFs through the command: location, nodata and labels of scenes that are read and written in parts."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine

import segjax
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import predict
from segjax.data import specs
from segjax.inference import geotiff, outputs, sliding_window
from tests.pixels import SPEC, Pixels, scene

NORTH_UP = Affine(0.5, 0, 399960, 0, -0.5, 5800020)
ROTATED = Affine.translation(399960, 5800020) @ Affine.rotation(31) @ Affine.scale(2, -3)
MANY = specs.DatasetSpec("many", tuple(f"c{n}" for n in range(5)), SPEC.colors, 700)
MODELS = {"seen": (Pixels(5, 1, context=True), SPEC), "other": (Pixels(5, 2, context=True), MANY)}
SLIDE = ("--mode", "slide", "--crop", 32, 24, "--stride", 20, 17)
SLIDING = dict(mode="slide", crop=(32, 24), stride=(20, 17))


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr("segjax.checkpoints.load.load", lambda path, weights=None: loaded(path.name))
    monkeypatch.setattr("segjax.runtime.environment.prepare", lambda: None)
    monkeypatch.setattr(sliding_window, "WIDEST", 70)


def loaded(name):
    model, spec = MODELS[name]
    return LoadedCheckpoint(model, spec, {})


def put(path, image, **profile):
    """A TIFF of uint8 or other (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, bands = image.shape
    size = dict(height=height, width=width, count=bands, dtype=image.dtype.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **size, **{"photometric": "RGB"} | profile) as file:
            file.write(np.moveaxis(image, -1, 0))
    return path


def run(*arguments, checkpoint="seen"):
    return predict.main([*map(str, arguments), "--checkpoint", checkpoint])


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def opened(path):
    """The label map, and the file itself."""
    with rasterio.open(path) as file:
        return file.read(1), file


LAYOUTS = {
    "striped": dict(crs="EPSG:32633", transform=NORTH_UP),
    "strips of several rows": dict(crs="EPSG:32633", transform=ROTATED, blockysize=7, compress="lzw", predictor=2),
    "tiled": dict(crs="EPSG:32633", transform=ROTATED, tiled=True, blockxsize=32, blockysize=16, compress="deflate"),
    "bands one after the other": dict(
        crs="EPSG:4326", transform=NORTH_UP, tiled=True, interleave="band", bigtiff="YES"
    ),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed, layout", list(enumerate(LAYOUTS)))
def test_labels_of_parts_equal_those_of_the_whole_scene(seed, layout, batch, tmp_path, capfd):
    image = scene(seed, 93 + seed, 171 - seed)
    path = put(tmp_path / "in" / "a.tif", image, **LAYOUTS[layout])
    assert run(path, "--output", tmp_path / "out", "--batch", batch, *SLIDE) == 0
    said = capfd.readouterr()
    assert said.err == "" and "lost" not in said.out
    assert below(tmp_path / "out") == ["labels/a.tif", "overlay/a.jpg", "predict.json"]
    labels, file = opened(tmp_path / "out" / "labels" / "a.tif")
    expected = segjax.Predictor(loaded("seen"), **SLIDING, batch=batch)(image)
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(expected)) > 1 and labels.dtype == np.uint8
    assert (file.crs, file.transform, file.nodata) == (LAYOUTS[layout]["crs"], LAYOUTS[layout]["transform"], 255)
    with rasterio.open(tmp_path / "out" / "labels" / "a.tif") as file:
        assert file.block_shapes == [(256, 256)] and file.compression.name == "deflate"
        assert file.colormap(1)[1] == (*SPEC.colors[1], 255)


@pytest.mark.parametrize("mode", [SLIDE, ()])
@pytest.mark.parametrize("checkpoint, ignored, dtype", [("seen", 255, np.uint8), ("other", 700, np.uint16)])
def test_nodata_is_kept_and_changes_no_other_label(mode, checkpoint, ignored, dtype, tmp_path):
    image = scene(3, 61, 83)
    image[10:30, :40] = 0
    # One band alone is a colour.
    image[50, 50:60] = (0, 9, 0)
    path = put(tmp_path / "a.tif", image, crs="EPSG:32633", transform=NORTH_UP, nodata=0)
    assert run(path, "--output", tmp_path / "out", *mode, checkpoint=checkpoint) == 0
    labels, file = opened(tmp_path / "out" / "labels" / "a.tif")
    expected = segjax.Predictor(loaded(checkpoint), **(SLIDING if mode else {}))(image)
    np.testing.assert_array_equal(labels, np.where((image == 0).all(axis=-1), ignored, expected.astype(int)))
    assert labels.dtype == dtype and file.nodata == ignored and (labels == ignored).sum() == 800


@pytest.mark.parametrize("kind", ["alpha", "mask"])
def test_masks_and_alpha_are_nodata(kind, tmp_path):
    image, there = scene(4, 50, 66), np.ones((50, 66), bool)
    there[5:25, 30:] = False
    path = tmp_path / "a.tif"
    if kind == "alpha":
        alpha = np.where(there, 255, 0).astype(np.uint8)[..., None]
        put(path, np.concatenate([image, alpha], axis=-1), alpha="YES", crs="EPSG:32633", transform=ROTATED)
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            put(path, image, crs="EPSG:32633", transform=ROTATED)
            with rasterio.open(path, "r+") as file:
                file.write_mask(there)
    assert run(path, "--output", tmp_path / "out", *SLIDE) == 0
    expected = segjax.Predictor(loaded("seen"), **SLIDING)(image)
    labels, _ = opened(tmp_path / "out" / "labels" / "a.tif")
    np.testing.assert_array_equal(labels, np.where(there, expected, 255))


@pytest.mark.parametrize("dtype, nodata", [("uint16", 0), ("float32", np.nan), ("float64", -9999), ("int16", -1)])
def test_reflectances_with_a_scale_are_predicted_like_the_array(dtype, nodata, tmp_path, capsys):
    values = (scene(5, 47, 90).astype(dtype) * 10).astype(dtype)
    values[:9, 60:] = nodata
    path = put(tmp_path / "a.tif", values, crs="EPSG:32633", transform=NORTH_UP, nodata=nodata)
    arguments = (path, "--output", tmp_path / "out", *SLIDE)
    assert run(*arguments) == 1
    assert "--scale LOW HIGH" in " ".join(capsys.readouterr().err.split())
    assert run(*arguments, "--scale", 0, 2600) == 0
    predictor = segjax.Predictor(loaded("seen"), **SLIDING, scale=(0, 2600))
    is_nodata = np.zeros(values.shape[:2], bool)
    is_nodata[:9, 60:] = True
    expected = predictor(np.where(is_nodata[..., None], 0, values).astype(dtype))
    labels, _ = opened(tmp_path / "out" / "labels" / "a.tif")
    np.testing.assert_array_equal(labels, np.where(is_nodata, 255, expected))


def test_nan_outside_nodata_is_refused(tmp_path, capsys):
    values = scene(5, 47, 90).astype(np.float32)
    values[3, 4] = np.nan
    path = put(tmp_path / "a.tif", values, crs="EPSG:32633", transform=NORTH_UP)
    assert run(path, "--output", tmp_path / "out", *SLIDE, "--scale", 0, 255) == 1
    assert "3 of its values are NaN" in " ".join(capsys.readouterr().err.split())
    assert below(tmp_path / "out") == []


def test_control_points_and_rational_polynomials_are_kept(tmp_path):
    corners = [(0, 0), (0, 60), (50, 0), (50, 60)]
    points = [
        GroundControlPoint(row, col, 11 + col / 100, 50 - row / 100, 0, id=f"{row} {col}") for row, col in corners
    ]
    rpcs = RPC(
        *(10.0, 100.0, 50.0, 0.5, [1.0] + [0.0] * 19, [0.5, 1.0] + [0.0] * 18, 25.0, 25.0, 11.0, 0.5),
        *([1.0] + [0.0] * 19, [0.25, 0.0, 1.0] + [0.0] * 17, 30.0, 30.0),
        err_bias=0.5,
        err_rand=0.25,
    )
    put(tmp_path / "gcps.tif", scene(6, 50, 60), gcps=points, crs="EPSG:4326")
    put(tmp_path / "rpcs.tif", scene(7, 50, 60), rpcs=rpcs)
    assert run(tmp_path / "gcps.tif", tmp_path / "rpcs.tif", "--output", tmp_path / "out", *SLIDE) == 0
    with rasterio.open(tmp_path / "out" / "labels" / "gcps.tif") as file:
        found, system = file.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert system == "EPSG:4326"
    with rasterio.open(tmp_path / "out" / "labels" / "rpcs.tif") as file:
        assert file.rpcs.to_gdal() == rpcs.to_gdal()


def test_small_scenes_are_batched_and_keep_their_georeference(tmp_path):
    images = [scene(seed, 32, 40) for seed in range(5)]
    for seed, image in enumerate(images):
        put(tmp_path / "in" / f"{seed}.tif", image, crs="EPSG:32633", transform=Affine.translation(40 * seed, 7))
    kinds = ("labels", "overlay", "sidebyside", "probabilities")
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--batch", 4, "--write", *kinds) == 0
    suffixes = {"labels": "tif", "overlay": "jpg", "sidebyside": "jpg", "probabilities": "npz"}
    names = sorted(f"{kind}/{seed}.{suffix}" for kind, suffix in suffixes.items() for seed in range(5))
    assert below(tmp_path / "out") == sorted([*names, "predict.json"])
    predictor = segjax.Predictor(loaded("seen"))
    for seed, image in enumerate(images):
        labels, file = opened(tmp_path / "out" / "labels" / f"{seed}.tif")
        np.testing.assert_array_equal(labels, predictor(image))
        assert file.transform == Affine.translation(40 * seed, 7)


def test_a_scene_above_max_pixels_is_predicted_only_in_parts(tmp_path, capsys):
    path = put(tmp_path / "a.tif", scene(8, 90, 130), crs="EPSG:32633", transform=NORTH_UP)
    plain = put(tmp_path / "plain.tif", scene(9, 90, 130))
    limit = ("--max-pixels", 5000)
    assert run(path, plain, "--output", tmp_path / "out", *limit, *SLIDE) == 0
    assert below(tmp_path / "out" / "labels") == ["a.tif", "plain.tif"]
    labels, file = opened(tmp_path / "out" / "labels" / "plain.tif")
    np.testing.assert_array_equal(labels, segjax.Predictor(loaded("seen"), **SLIDING)(scene(9, 90, 130)))
    assert file.crs is None and file.transform.is_identity
    capsys.readouterr()
    for arguments, remedy in [
        ((), "use --mode slide"),
        ((*SLIDE, "--flip"), "omit --scales, --flip"),
        ((*SLIDE, "--write", "probabilities"), "omit probabilities from --write"),
        ((*SLIDE, "--pad-multiple", 8), "omit --pad-multiple"),
    ]:
        assert run(path, "--output", tmp_path / "refused", *limit, *arguments) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "has 90x130 pixels, 11,700, more than 5,000" in said and remedy in said
    assert below(tmp_path / "refused") == []


def test_a_compressed_strip_as_large_as_the_scene_is_refused_in_parts(tmp_path, capsys):
    profile = dict(crs="EPSG:32633", transform=NORTH_UP, blockysize=90, compress="deflate")
    path = put(tmp_path / "a.tif", scene(8, 90, 130), **profile)
    assert run(path, "--output", tmp_path / "out", "--max-pixels", 5000, *SLIDE) == 1
    assert "gdal_translate -co TILED=YES" in " ".join(capsys.readouterr().err.split())


def test_a_small_tiff_without_a_georeference_is_an_image(tmp_path):
    put(tmp_path / "a.tif", scene(9, 40, 52))
    assert run(tmp_path / "a.tif", "--output", tmp_path / "out", *SLIDE) == 0
    assert below(tmp_path / "out") == ["labels/a.png", "overlay/a.jpg", "predict.json"]


def test_palette_scenes_also_keep_their_georeference(tmp_path):
    indices, colours = scene(2, 44, 60)[..., :1] // 64, np.random.default_rng(0).integers(0, 256, (4, 3), np.uint8)
    path = tmp_path / "a.tif"
    size = dict(height=44, width=60, count=1, dtype="uint8")
    with rasterio.open(path, "w", driver="GTiff", **size, crs="EPSG:32633", transform=ROTATED) as file:
        file.write_colormap(1, dict(enumerate([(*colour.tolist(), 255) for colour in colours])))
        file.write(indices[..., 0], 1)
    assert run(path, "--output", tmp_path / "out", *SLIDE) == 0
    labels, file = opened(tmp_path / "out" / "labels" / "a.tif")
    np.testing.assert_array_equal(labels, segjax.Predictor(loaded("seen"), **SLIDING)(colours[indices[..., 0]]))
    assert file.transform == ROTATED


def test_pictures_of_large_scenes_are_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "LARGEST_PICTURE", 50)
    drawn = []
    monkeypatch.setitem(outputs.DRAWN, "overlay", lambda *given: drawn.append(given[:2]) or given[0])
    image = scene(1, 93, 171)
    image[20:40, 60:90] = 0
    path = put(tmp_path / "a.tif", image, crs="EPSG:32633", transform=NORTH_UP, nodata=0)
    for mode in (SLIDE, ()):
        assert run(path, "--output", tmp_path / "out", *mode) == 0
        labels, _ = opened(tmp_path / "out" / "labels" / "a.tif")
        np.testing.assert_array_equal(drawn[-1][0], image[::4, ::4])
        np.testing.assert_array_equal(drawn[-1][1], labels[::4, ::4])


def test_without_rasterio_labels_are_png_and_the_loss_is_reported(tmp_path, monkeypatch, capsys):
    images = {name: scene(seed, 40, 52) for seed, name in enumerate("ab")}
    for name, image in images.items():
        put(tmp_path / "in" / f"{name}.tif", image, crs="EPSG:32633", transform=NORTH_UP)
    put(tmp_path / "in" / "plain.tif", scene(2, 40, 52))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert run(tmp_path / "in", "--output", tmp_path / "out", *SLIDE, "--write", "labels") == 0
    assert below(tmp_path / "out" / "labels") == ["a.png", "b.png", "plain.png"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("georeference") == 1
    assert re.search(r"the georeference of \S+a\.tif and of 1 more is lost; .*pip install 'segjax\[geo\]'", said)


@pytest.mark.parametrize("bands, words", [(2, "has 2 bands"), (6, "has 6 bands")])
def test_other_numbers_of_bands_are_refused_by_name(bands, words, tmp_path, capsys):
    image = np.random.default_rng(bands).integers(0, 256, (30, 41, bands), np.uint8)
    path = put(tmp_path / "a.tif", image, crs="EPSG:32633", transform=NORTH_UP, photometric="MINISBLACK")
    assert run(path, "--output", tmp_path / "out", *SLIDE) == 1
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mode", [SLIDE, ()])
@pytest.mark.parametrize("fault", ["truncated", "damaged"])
def test_a_damaged_scene_is_named_and_leaves_nothing(mode, fault, tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (93, 171, 3), np.uint8)
    good = put(tmp_path / "b.tif", scene(0, 40, 52), crs="EPSG:32633", transform=NORTH_UP)
    tiles = dict(tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    path = put(tmp_path / "a.tif", noise, crs="EPSG:32633", transform=NORTH_UP, **tiles)
    data = bytearray(path.read_bytes())
    if fault == "truncated":
        del data[-5000:]
    else:
        data[-30000:-20000] = bytes(10000)
    path.write_bytes(data)
    assert run(path, good, "--output", tmp_path / "out", *mode) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"1 of 2 inputs failed: \S+a\.tif: is (truncated|a TIFF that cannot be decoded)", said)
    assert "rasterio" not in said and "Error" not in said.replace("decoded (", "")
    assert below(tmp_path / "out") == ["labels/b.tif", "overlay/b.jpg", "predict.json"]


def test_missing_blocks_of_a_sparse_file_are_nodata(tmp_path):
    size = dict(height=70, width=90, count=3, dtype="uint8", photometric="RGB", sparse_ok=True)
    place = dict(crs="EPSG:32633", transform=NORTH_UP, nodata=0, tiled=True, blockxsize=32, blockysize=32)
    image = np.zeros((70, 90, 3), np.uint8)
    image[:32, :64] = 50 + scene(1, 32, 64) // 2
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **size, **place) as file:
        file.write(np.moveaxis(image[:32, :64], -1, 0), window=((0, 32), (0, 64)))
    assert run(tmp_path / "a.tif", "--output", tmp_path / "out", *SLIDE) == 0
    labels, _ = opened(tmp_path / "out" / "labels" / "a.tif")
    expected = segjax.Predictor(loaded("seen"), **SLIDING)(image)
    np.testing.assert_array_equal(labels, np.where(image.any(axis=-1), expected, 255))


def test_an_interrupted_scene_leaves_no_file_and_is_resumed(tmp_path, monkeypatch, capsys):
    for name in "ab":
        put(tmp_path / "in" / f"{name}.tif", scene(ord(name), 93, 171), crs="EPSG:32633", transform=NORTH_UP)
    arguments = (tmp_path / "in", "--output", tmp_path / "out", *SLIDE)
    original, parts = outputs.SceneOutputs.write, []

    def write(self, *part):
        original(self, *part)
        parts.append(part)
        # In the second scene, of which some parts were written.
        if sum(labels.size for _, _, labels in parts) > 93 * 171 + 9000:
            raise KeyboardInterrupt

    monkeypatch.setattr(outputs.SceneOutputs, "write", write)
    assert run(*arguments) == 130
    assert below(tmp_path / "out") == ["labels/a.tif", "overlay/a.jpg", "predict.json"]
    before = (tmp_path / "out" / "labels" / "a.tif").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr("segjax.checkpoints.load.load", lambda path, weights=None: loaded(path.name))
    monkeypatch.setattr("segjax.runtime.environment.prepare", lambda: None)
    capsys.readouterr()
    assert run(*arguments, "--resume") == 0
    assert "1 of 2 are done" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "labels" / "a.tif").stat().st_mtime_ns == before
    labels, _ = opened(tmp_path / "out" / "labels" / "b.tif")
    np.testing.assert_array_equal(labels, segjax.Predictor(loaded("seen"), **SLIDING)(scene(ord("b"), 93, 171)))


@pytest.mark.parametrize("limit", [400, 30_000])
def test_a_full_disk_is_reported_and_leaves_no_label_map(limit, tmp_path, capfd):
    """400 bytes are too few for the header, 30,000 for the blocks, which GDAL writes when it closes the file."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    path = put(tmp_path / "a.tif", noise, crs="EPSG:32633", transform=NORTH_UP)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with geotiff.opened(path, scale=None) as opened_scene:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OSError, match="File too large"):
                geotiff.save_labels(tmp_path / "out.tif", opened_scene, noise[..., 0], SPEC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert below(tmp_path) == ["a.tif"] and capfd.readouterr().err == ""


def test_progress_is_counted_in_rows(tmp_path, monkeypatch):
    counts = []

    class Bar:
        def __init__(self, what, total, unit):
            self.count, self.settings = 0, (what, total, unit)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            counts.append((*self.settings, self.count))

        def advance(self, number=1):
            assert number >= 0
            self.count += number

    monkeypatch.setattr("segjax.inference.batch_run.ProgressBar", Bar)
    path = put(tmp_path / "a.tif", scene(0, 93, 171), crs="EPSG:32633", transform=NORTH_UP)
    assert run(path, "--output", tmp_path / "out", *SLIDE) == 0
    assert counts == [("a.tif", 93, "rows", 93)]


PREDICT_A_SCENE = """
import json, re, sys
from unittest import mock
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import predict
from tests.tiny import tiny_model
from tests.pixels import SPEC
with mock.patch("segjax.checkpoints.load.load", lambda path, weights=None: LoadedCheckpoint(tiny_model(0), SPEC, {})):
    status = predict.main(sys.argv[1:])
# Not ru_maxrss, which a process inherits from the one that starts it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(json.dumps([status, int(peak)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(tiled=True, compress="deflate"), {}], ids=["tiled", "striped"])
def test_memory_does_not_grow_with_the_scene(layout, tmp_path):
    peaks = []
    for side in (4000, 12000):
        path = tmp_path / f"{side}.tif"
        size = dict(height=side, width=side, count=3, dtype="uint8", photometric="RGB", nodata=0)
        with rasterio.open(path, "w", driver="GTiff", **size, crs="EPSG:32633", transform=NORTH_UP, **layout) as file:
            for top in range(0, side, 500):
                file.write(np.moveaxis(scene(top, 500, side), -1, 0), window=((top, top + 500), (0, side)))
        arguments = ["x.pth", str(path), "--output", str(tmp_path / f"out {side}"), "--mode", "slide"]
        command = [sys.executable, "-c", PREDICT_A_SCENE, *arguments, "--max-pixels", "10000000"]
        repo = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(repo), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        status, peak = json.loads(done.stdout.splitlines()[-1])
        assert status == 0, done.stdout + done.stderr
        peaks.append(peak)
    assert abs(peaks[1] - peaks[0]) < 0.1 * peaks[0], peaks

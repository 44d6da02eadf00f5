"""Maps of confidence and entropy from the command, against probabilities in NumPy."""

import cv2
import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

import segjax
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import predict
from segjax.inference import outputs, sliding_window
from tests.pixels import BINARY, SPEC, Pixels, scene

MODELS = {5: (Pixels(5, 1, context=True), SPEC), 1: (Pixels(1, 2, context=True), BINARY)}
SIZE = (45, 71)
PLACE = dict(crs="EPSG:32633", transform=Affine(0.5, 0, 399960, 0, -0.5, 5800020))
PROTOCOLS = {
    "whole": ((), {}),
    "temperature": (("--temperature", 2.0), dict(temperature=2.0)),
    "slide": (("--mode", "slide", "--crop", 32, 24), dict(mode="slide", crop=(32, 24))),
    "scales": (("--scales", 0.75, 1.25, "--flip"), dict(scales=(0.75, 1.25), flip=True)),
    "padded": (("--pad-multiple", 32, "--batch", 3), dict(pad_multiple=32, batch=3)),
}


def loaded(path, weights=None):
    model, spec = MODELS[int(path.name)]
    return LoadedCheckpoint(model, spec, {})


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr("segjax.checkpoints.load.load", loaded)
    monkeypatch.setattr("segjax.runtime.environment.prepare", lambda: None)


def run(classes, *arguments):
    return predict.main([*map(str, arguments), "--checkpoint", str(classes)])


def expected_maps(probabilities, labels):
    """Confidence and entropy in 0..255, not rounded, from float (H, W, K)."""
    probabilities = probabilities.astype(np.float64)
    if probabilities.shape[-1] == 1:
        probabilities = np.concatenate([1 - probabilities, probabilities], axis=-1)
    logarithms = np.log(np.maximum(probabilities, 1e-38))
    entropy = -(probabilities * logarithms).sum(axis=-1) / np.log(probabilities.shape[-1])
    confidence = np.take_along_axis(probabilities, labels[..., None].astype(int), axis=-1)[..., 0]
    return {"confidence": 255 * confidence, "entropy": 255 * entropy}


@pytest.mark.parametrize("classes", [5, 1])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_confidence_and_entropy_maps_follow_from_the_probabilities(name, classes, tmp_path):
    arguments, settings = PROTOCOLS[name]
    (tmp_path / "in").mkdir()
    images = {f"{number}.png": scene(number, *SIZE) for number in range(2)}
    for file, image in images.items():
        cv2.imwrite(str(tmp_path / "in" / file), image[..., ::-1])
    given = (tmp_path / "in", *arguments, "--write")
    assert run(classes, *given, "labels", "confidence", "entropy", "--output", tmp_path / "out") == 0
    # With probabilities, all files come from these.
    assert run(classes, *given, "probabilities", "entropy", "--output", tmp_path / "all") == 0
    predictor = segjax.Predictor(loaded(tmp_path / str(classes)), **settings)
    for file, image in images.items():
        labels = cv2.imread(str(tmp_path / "out" / "labels" / file), cv2.IMREAD_UNCHANGED)
        expected = expected_maps(predictor.probabilities(image), predictor(image))
        for kind in outputs.MAPS:
            found = cv2.imread(str(tmp_path / "out" / kind / file), cv2.IMREAD_UNCHANGED)
            assert found.dtype == np.uint8 and found.shape == SIZE and labels.shape[:2] == SIZE
            assert len(np.unique(found)) > 20
            # Half a step, and the rounding of float32.
            np.testing.assert_allclose(found, expected[kind], atol=0.51)
        again = cv2.imread(str(tmp_path / "all" / "entropy" / file), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(again, expected["entropy"], atol=0.51)


@pytest.mark.parametrize("arguments", [(), ("--mode", "slide", "--crop", 32, 24)])
@pytest.mark.parametrize("classes", [5, 1])
def test_maps_of_a_scene_keep_its_georeference_and_nodata(classes, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sliding_window, "WIDEST", 40)
    image = scene(3, *SIZE)
    image[8:20, :30] = 0
    path = tmp_path / "a.tif"
    size = dict(height=SIZE[0], width=SIZE[1], count=3, dtype="uint8", photometric="RGB", nodata=0)
    with rasterio.open(path, "w", driver="GTiff", **size, **PLACE) as file:
        file.write(np.moveaxis(image, -1, 0))
    assert run(classes, path, *arguments, "--write", "labels", *outputs.MAPS, "--output", tmp_path / "out") == 0
    settings = dict(mode="slide", crop=(32, 24)) if arguments else {}
    predictor = segjax.Predictor(loaded(tmp_path / str(classes)), **settings)
    expected = expected_maps(predictor.probabilities(image), predictor(image))
    nodata = (image == 0).all(axis=-1)
    for kind in outputs.MAPS:
        with rasterio.open(tmp_path / "out" / kind / "a.tif") as file:
            found = file.read(1)
            assert (file.crs, file.transform, file.nodata) == (PLACE["crs"], PLACE["transform"], 0)
        assert nodata.any() and (found[nodata] == 0).all()
        np.testing.assert_allclose(found[~nodata], np.maximum(expected[kind][~nodata], 1), atol=0.51)
    with rasterio.open(tmp_path / "out" / "labels" / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.where(nodata, 255, predictor(image)))


def test_frames_of_a_video_also_have_maps(tmp_path):
    import av

    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(scene(number, 48, 64), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert run(5, tmp_path / "v.mp4", "--write", "entropy", "--output", tmp_path / "out") == 0
    frames = sorted((tmp_path / "out" / "entropy" / "v.mp4").iterdir())
    assert [frame.name for frame in frames] == ["000000.png", "000001.png"]
    assert len(np.unique(cv2.imread(str(frames[1]), cv2.IMREAD_UNCHANGED))) > 20

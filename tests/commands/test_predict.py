"""The command `segjax predict`: its output files equal the model's predictions, and every error is reported."""

import errno
import io
import json
import os
import re
import sys
import threading
import time

import cv2
import jax
import numpy as np
import pytest
import tifffile
from PIL import Image

from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import predict
from segjax.data import codec
from segjax.inference import batch_run, outputs, planning
from segjax.inference import overlapped as inference_overlapped
from segjax.inference.engine import Inference, labels_of
from segjax.runtime import memory
from segjax.viz import overlay
from tests.pixels import BINARY, PROGRAMS, SPEC, Pixels, scene

MODELS = {5: (Pixels(5), SPEC), 1: (Pixels(1), BINARY)}


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """`--checkpoint 5` and `--checkpoint 1` are models with so many classes."""

    def load(path, weights=None):
        if path.name not in "51":
            raise ValueError(f"{path}: there is no such file")
        model, spec = MODELS[int(path.name)]
        return LoadedCheckpoint(model, spec, {})

    monkeypatch.setattr("segjax.checkpoints.load.load", load)
    monkeypatch.setattr("segjax.runtime.environment.prepare", lambda: None)


def put(path, image, **settings):
    """A file with these pixels, lossless where its suffix can be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **settings)
    return path


def run(*arguments, checkpoint=5):
    return predict.main([*map(str, arguments), "--checkpoint", str(checkpoint)])


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------- planning


def test_outputs_keep_the_folder_structure_below_an_input(tmp_path):
    for name in ("in/a.png", "in/trip/b.jpg", "in/trip/deep/c.TIFF", "in/notes.txt", "in/.hidden.png", "in/.git/d.png"):
        put(tmp_path / "in" / "x.png", scene(0, 8, 9))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    out = tmp_path / "out"
    (tmp_path / "in" / "x.png").unlink()
    jobs, skipped = planning.plan([str(tmp_path / "in")], out, ["labels", "overlay"])
    assert [str(job.outputs["labels"].relative_to(out)) for job in jobs] == [
        "labels/a.png",
        "labels/trip/b.png",
        "labels/trip/deep/c.png",
    ]
    assert jobs[1].outputs["overlay"] == out / "overlay" / "trip" / "b.jpg"
    assert {str(path.relative_to(tmp_path / "in")) for path, _ in skipped} == {"notes.txt", ".hidden.png", ".git"}
    pattern, _ = planning.plan([str(tmp_path / "i*" / "**" / "*.[jT]*")], out, ["labels"])
    assert [str(job.outputs["labels"].relative_to(out)) for job in pattern] == [
        "labels/in/trip/b.png",
        "labels/in/trip/deep/c.png",
    ]


def test_inputs_are_processed_once_in_the_order_of_the_arguments(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/1.png"):
        put(tmp_path / name, scene(0, 8, 9))
    inputs = [str(tmp_path / name) for name in ("b/2.png", "a", "b", "a/1.png")]
    jobs, _ = planning.plan(inputs, tmp_path / "out", ["labels"])
    assert [str(job.source.relative_to(tmp_path)) for job in jobs] == ["b/2.png", "a/1.png", "b/10.png"]


def test_all_problems_with_inputs_are_reported_before_anything_starts(tmp_path, capsys):
    put(tmp_path / "a" / "x.png", scene(0, 8, 9))
    put(tmp_path / "b" / "x.jpg", scene(1, 8, 9))
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("")
    names = ("a/x.png", "b/x.jpg", "missing.png", "no*thing", "empty", "texts", "texts/x.txt")
    assert run(*(tmp_path / name for name in names), "--output", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a/x.png and" in said and "b/x.jpg would both be written to" in said and "out/labels/x.png" in said
    assert "missing.png: there is no such file" in said and "no*thing: no file matches" in said
    assert (
        "empty: a folder without" in said
        and "texts: no image or video; skipped 1; neither an image nor a video that can be read" in said
        and "x.txt: is neither an image nor a video" in said
    )
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten_and_outputs_never_become_inputs(tmp_path, capsys):
    source = put(tmp_path / "labels" / "x.png", scene(0, 8, 9))
    before = source.read_bytes()
    assert run(source, "--output", tmp_path) == 2
    assert "would be overwritten" in capsys.readouterr().err and source.read_bytes() == before
    for _ in range(2):
        assert run(tmp_path, "--output", tmp_path / "out") == 0
        assert below(tmp_path / "out") == ["labels/labels/x.png", "overlay/labels/x.jpg", "predict.json"]


def test_images_with_the_same_output_name_are_refused(tmp_path, capsys):
    for name in ("x.png", "x.bmp"):
        put(tmp_path / "in" / name, scene(0, 8, 9))
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    assert "would both be written to" in " ".join(capsys.readouterr().err.split())


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    stored = cv2.GaussianBlur(scene(orientation, 24, 40), (9, 9), 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = put(tmp_path / f"x{suffix}", stored, exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
    # The standard's words for where row 0 and column 0 of what is stored are seen.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    found = batch_run.read_image(path)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 3


def test_every_kind_of_image_is_read_as_it_is_displayed(tmp_path):
    image = scene(0, 21, 30)
    grey = image[..., 0]
    alpha = np.random.default_rng(0).integers(0, 256, (21, 30, 1), dtype=np.uint8)
    fine = np.random.default_rng(1).integers(0, 65536, (21, 30, 3), dtype=np.uint16)
    for name in ("a.png", "a.bmp", "a.tif", "a.tiff"):
        np.testing.assert_array_equal(batch_run.read_image(put(tmp_path / name, image)), image)
    np.testing.assert_array_equal(batch_run.read_image(put(tmp_path / "a.webp", image, lossless=True)), image)
    threefold = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(batch_run.read_image(put(tmp_path / "grey.png", grey)), threefold)
    rgba = np.concatenate([image, alpha], axis=-1)
    np.testing.assert_array_equal(batch_run.read_image(put(tmp_path / "rgba.png", rgba)), image)
    few = image // 64 * 64
    Image.fromarray(few).quantize(64).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(batch_run.read_image(tmp_path / "palette.png"), few)
    for name in ("fine.png", "fine.tif"):
        cv2.imwrite(str(tmp_path / name), fine[..., ::-1])
        np.testing.assert_array_equal(batch_run.read_image(tmp_path / name), np.round(fine / 257).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "fine-grey.png"), fine[..., 0])
    found = batch_run.read_image(tmp_path / "fine-grey.png")
    np.testing.assert_array_equal(found[..., 2], np.round(fine[..., 0] / 257).astype(np.uint8))


def test_unreadable_images_are_refused_with_the_reason(tmp_path):
    whole = put(tmp_path / "whole.png", scene(0, 40, 50)).read_bytes()
    file = io.BytesIO()
    Image.fromarray(scene(0, 40, 50)).save(file, "jpeg")
    cv2.imwrite(str(tmp_path / "float.tif"), np.zeros((8, 9, 3), np.float32))
    cv2.imwrite(str(tmp_path / "12bits.png"), np.full((8, 9), 4000, np.uint16))
    for name, data, words in (
        ("empty.jpg", b"", "is empty"),
        ("cut.png", whole[:-40], "truncated"),
        ("cut.jpg", file.getvalue()[:-40], "truncated"),
        ("damaged.png", whole[:100] + b"\0\0" + whole[102:], "damaged at byte"),
        ("text.jpg", b"<html>gone", "b'<html>go"),
        ("float.tif", None, "float32"),
        ("12bits.png", None, "4000 of 65535"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            batch_run.read_image(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("checkpoint", [1, 5])
def test_every_kind_of_output_shows_the_models_predictions(checkpoint, tmp_path, capsys):
    model, spec = MODELS[checkpoint]
    images = {"a": scene(0, 33, 50), "sub/b": scene(1, 40, 31), "c": scene(2, 33, 50)}
    for name, image in images.items():
        put(tmp_path / "in" / f"{name}.png", image)
    out = tmp_path / "out"
    assert run(tmp_path / "in", "--output", out, "--write", *outputs.KINDS, checkpoint=checkpoint) == 0
    kinds = [("labels", "png"), ("overlay", "jpg"), ("sidebyside", "jpg"), ("probabilities", "npz")]
    kinds += [("confidence", "png"), ("entropy", "png")]
    expected = [f"{kind}/{name}.{suffix}" for kind, suffix in kinds for name in images]
    assert below(out) == sorted([*expected, "predict.json"])
    for name, image in images.items():
        truth = model.labels(image)
        with Image.open(out / "labels" / f"{name}.png") as labels:
            assert labels.mode == "P"
            np.testing.assert_array_equal(np.array(labels), truth)
            shown = np.array(labels.convert("RGB"))
        np.testing.assert_array_equal(shown, np.array(spec.label_colors, np.uint8)[truth])
        np.testing.assert_array_equal(codec.decode_mask((out / "labels" / f"{name}.png").read_bytes()), truth)
        with np.load(out / "probabilities" / f"{name}.npz") as saved:
            assert saved["probabilities"].dtype == np.float32 and saved["class_names"].tolist() == list(
                spec.class_names
            )
            probabilities = saved["probabilities"].astype(float)
            np.testing.assert_array_equal(labels_of(saved["probabilities"], threshold=0.5), truth)
        if checkpoint == 1:
            probabilities = np.concatenate([1 - probabilities, probabilities], axis=-1)
        entropy = -np.sum(probabilities * np.log(np.maximum(probabilities, 1e-30)), axis=-1)
        certainty = {"confidence": probabilities.max(axis=-1), "entropy": entropy / np.log(probabilities.shape[-1])}
        for kind, expected in certainty.items():
            with Image.open(out / kind / f"{name}.png") as drawn:
                assert drawn.mode == "L" and np.abs(np.array(drawn) - 255 * expected).max() <= 0.51
        drawn = cv2.imread(str(out / "overlay" / f"{name}.jpg"))[..., ::-1].astype(float)
        blended = (1 - overlay.OPACITY) * image + overlay.OPACITY * shown
        assert drawn.shape[0] > 33 and np.abs(drawn[: truth.shape[0], : truth.shape[1]] - blended).mean() < 6
        pair = cv2.imread(str(out / "sidebyside" / f"{name}.jpg"))[..., ::-1].astype(float)
        assert np.abs(pair[: truth.shape[0], : truth.shape[1]] - image).mean() < 6
    said = capsys.readouterr().out
    assert "wrote 3 images" in said and str(out / "labels" / "a.png") in "".join(said.split("\n  "))
    assert all(len(line) <= 80 for line in said.splitlines() if " " in line.strip() and str(tmp_path) not in line)
    record = json.loads((out / "predict.json").read_text())
    assert [entry["name"] for entry in record["classes"]] == list(spec.label_names)


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("draw", [overlay.over, overlay.side_by_side])
def test_the_legend_has_only_the_colours_of_predicted_classes(draw, still):
    image, labels = np.full((60, 400, 3), 128, np.uint8), np.zeros((60, 400), np.uint8)
    labels[:, 100:] = 3
    picture = draw(image, labels, SPEC, still=still)
    legend = picture[60:]
    assert len(legend) >= 20
    for k, color in enumerate(SPEC.colors):
        there = (legend == color).all(axis=-1).sum()
        assert (there > 50) == (k in (0, 3) or not still)
    assert ((legend == 0).all(axis=-1)).sum() > 20  # letters


def test_a_video_of_many_classes_keeps_its_height_and_shows_the_largest():
    from segjax.data.specs import ADE20K

    image = np.zeros((200, 800, 3), np.uint8)
    shapes = set()
    for number in (1, 30, 150):
        labels = np.repeat(np.arange(800) * number // 800, 200).reshape(800, 200).T.astype(np.uint8)
        picture = overlay.over(image, labels, ADE20K, still=False)
        shapes.add(picture.shape)
        assert (picture[200:] == ADE20K.colors[0]).all(axis=-1).any()
    assert len(shapes) == 1


def test_a_picture_narrower_than_its_legend_is_padded_with_white():
    labels = np.zeros((30, 40), np.uint8)
    picture = overlay.over(np.zeros((30, 40, 3), np.uint8), labels, SPEC)
    assert picture.shape[1] == overlay.NARROWEST and (picture[:30, 40:] == 255).all()


# -------------------------------------------------------------------------------------------------------------- running


def test_a_bad_file_is_reported_at_the_end_and_the_others_are_done(tmp_path, capsys):
    for seed in range(6):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 20, 30))
    (tmp_path / "in" / "2.png").write_bytes((tmp_path / "in" / "2.png").read_bytes()[:60])
    (tmp_path / "in" / "4.png").write_bytes(b"")
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 1
    said = capsys.readouterr()
    assert "wrote 4 images" in said.out and "2 of 6 inputs failed:" in said.err
    told = " ".join(said.err.split())
    assert "2.png: is truncated" in told and "4.png: is empty" in told
    assert below(tmp_path / "out") == ["labels/0.png", "labels/1.png", "labels/3.png", "labels/5.png", "predict.json"]


def test_an_image_that_the_model_refuses_is_reported_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("segjax.inference.predictor.LARGEST_WHOLE", 25 * 30)
    for name, size in (("a", (20, 30)), ("b", (40, 30)), ("c", (20, 30))):
        put(tmp_path / "in" / f"{name}.png", scene(0, *size))
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels", "--batch", "2") == 1
    assert "b.png: an image of 40x30 is too large" in " ".join(capsys.readouterr().err.split())
    assert below(tmp_path / "out") == ["labels/a.png", "labels/c.png", "predict.json"]


@pytest.mark.parametrize(
    "given, words",
    [
        ((), "a batch of 4 images of 20x30 needs"),
        (("--batch", "2"), "a batch of 2 images of 20x30 needs"),
        (("--batch", "4096"), "a batch of 4 images of 20x30 needs"),
        (("--mode", "slide", "--crop", "16", "12", "--batch", "2"), "a batch of 2 crops of 16x12 needs"),
        (("--flip", "--scales", "0.5", "2"), "an image of 20x30 that is resized to 40x60 needs"),
    ],
)
def test_exceeding_memory_gives_one_message_before_writing(given, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "host", lambda: 1000)
    for seed, size in enumerate([(40, 70), (20, 30), (50, 40), (30, 30)]):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, *size))
    assert run(tmp_path / "in", "--output", tmp_path / "out", *given) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith(f"segjax predict: {words}") and told.count("segjax predict:") == 1
    assert ("a smaller --batch" in told) == ("--batch" in given) and ("a smaller --crop" in told) == ("slide" in given)
    assert ("--mode slide" in told) == ("slide" not in given) and ("--scales and --flip" in told) == ("--flip" in given)
    assert not (tmp_path / "out").exists()


def test_an_image_too_large_for_memory_is_named_and_the_others_are_done(tmp_path, capsys, monkeypatch):
    for name, size in (("a", (90, 80)), ("b", (20, 30)), ("c", (100, 80)), ("d", (20, 30))):
        put(tmp_path / "in" / f"{name}.png", scene(0, *size))
    # A label takes a byte.
    monkeypatch.setattr(memory, "needed", lambda compiled: compiled.memory_analysis().output_size_in_bytes)
    monkeypatch.setattr(memory, "limit", lambda *_, **__: 25 * 30)
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "2 of 4 inputs failed" in told and "a.png: a batch of 4 images of 90x80 needs" in told and "c.png" in told
    assert below(tmp_path / "out") == ["labels/b.png", "labels/d.png", "predict.json"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")])
def test_running_out_of_memory_at_the_first_image_gives_one_message(error, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(Inference, "labels", fails)
    for seed in range(3):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 20, 30))
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("segjax predict: there is not enough memory; use --mode slide")
    assert not (tmp_path / "out" / "predict.json").exists()


@pytest.mark.parametrize("settings, size", [((), (21, 30)), (("--mode", "slide", "--crop", "16", "14"), (16, 14))])
def test_every_device_gets_one_image_or_crop_at_a_time(settings, size, tmp_path):
    for seed in range(6):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 21, 30))
    PROGRAMS.clear()
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels", *settings) == 0
    assert set(PROGRAMS) == {(4, *size, 3)} and len(jax.devices()) == 4
    for seed in range(6):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "out" / "labels" / f"{seed}.png")),
            MODELS[5][0].labels(scene(seed, 21, 30)),
        )


def test_a_batch_is_not_larger_than_the_number_of_images(tmp_path):
    for seed in range(3):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 21, 30))
    PROGRAMS.clear()
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels", "--batch", "4000") == 0
    assert set(PROGRAMS) == {(-(-3 // jax.local_device_count()) * jax.local_device_count(), 21, 30, 3)}


def test_resume_predicts_only_what_is_missing(tmp_path, capsys):
    for seed in range(3):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 20, 30))
    out = tmp_path / "out"
    arguments = (tmp_path / "in", "--output", out, "--resume")
    assert run(*arguments) == 0
    (out / "overlay" / "1.jpg").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "2 of 3 are done" in capsys.readouterr().out
    changed = {str(path.relative_to(out)) for path, then in times.items() if path.stat().st_mtime_ns != then}
    assert changed == {"labels/1.png"} and (out / "overlay" / "1.jpg").exists()
    assert run(*arguments) == 0
    assert "everything is done already" in capsys.readouterr().out


def test_resume_overwrites_outputs_of_other_settings(tmp_path, capsys):
    """Of two runs with other settings into one folder, the second was for a part of the images, or was killed."""
    for name in ("a", "b"):
        put(tmp_path / "in" / f"{name}.png", scene(len(name), 20, 30))
    arguments = ("--output", tmp_path / "out", "--write", "probabilities")
    assert run(tmp_path / "in", *arguments) == 0
    time.sleep(0.01)
    assert run(tmp_path / "in" / "a.png", *arguments, "--mode", "slide", "--crop", 16, 16) == 0
    files = {name: tmp_path / "out" / "probabilities" / f"{name}.npz" for name in "ab"}
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    capsys.readouterr()
    assert run(tmp_path / "in", *arguments, "--mode", "slide", "--crop", 16, 16, "--resume") == 0
    assert "1 of 2 are done" in capsys.readouterr().out
    assert [name for name, path in files.items() if path.stat().st_mtime_ns != times[name]] == ["b"]


def test_resume_refuses_outputs_of_other_weights_or_settings(tmp_path, capsys):
    put(tmp_path / "x.png", scene(0, 20, 30))
    arguments = (tmp_path / "x.png", "--output", tmp_path / "out")
    assert run(*arguments) == 0
    assert run(*arguments, "--resume", "--flip") == 2
    assert run(*arguments, "--resume", checkpoint=1) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "other flip (" in said and "weights_sha256" in said
    assert run(*arguments, "--flip") == 0


def test_resume_compares_the_base_size_and_the_divisor(tmp_path, capsys):
    put(tmp_path / "x.png", scene(0, 20, 30))
    arguments, resized = (
        (tmp_path / "x.png", "--output", tmp_path / "out"),
        ("--base-size", 60, 48, "--size-divisor", 8),
    )
    assert run(*arguments, *resized) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "resized to 60x48 with their aspect ratio kept, resized to multiples of 8" in said
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert record["base_size"] == [60, 48] and record["size_divisor"] == 8
    assert run(*arguments, *resized, "--resume") == 0
    assert run(*arguments, "--resume") == 2
    assert "other base_size, size_divisor (" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "predict.json: not JSON"),
        (b"[1]", "predict.json: should be a valid dictionary"),
        (b"[" * 100_000, "predict.json: not JSON"),
        (b"\xff\xfe", "predict.json: not JSON"),
        (b"{}", "made with other classes, flip, mode,"),
        (None, "files next to it, is missing; "),
        ("format_version", "predict.json: has format version 99"),
        ("classes", "made with other classes ("),
        ("weights_sha256", "made with other weights_sha256 ("),
    ],
)
def test_resume_with_a_damaged_record_changes_nothing_and_names_the_fault(content, words, tmp_path, capsys):
    for seed in range(2):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 20, 30))
    out = tmp_path / "out"
    arguments = (tmp_path / "in", "--output", out, "--write", "labels")
    assert run(*arguments) == 0
    record = out / "predict.json"
    if content is None:
        record.unlink()
    elif isinstance(content, str):
        record.write_text(json.dumps(json.loads(record.read_text()) | {content: 99}))
    else:
        record.write_bytes(content)
    (out / "labels" / "1.png").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert run(*arguments, "--resume") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said and str(record) in said
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}
    # Without it everything is made anew.
    assert run(*arguments) == 0 and len(below(out)) == 3


def test_resume_in_a_folder_without_outputs_needs_no_record(tmp_path):
    put(tmp_path / "x.png", scene(0, 20, 30))
    (tmp_path / "out").mkdir()
    assert run(tmp_path / "x.png", "--output", tmp_path / "out", "--resume") == 0


def test_resume_compares_the_scale(tmp_path, capsys):
    image = scene(0, 20, 30)
    cv2.imwrite(str(tmp_path / "x.tif"), image[..., ::-1].astype(np.uint16) * 10)
    arguments = (tmp_path / "x.tif", "--output", tmp_path / "out", "--write", "labels")
    assert run(*arguments) == 1
    assert "x.tif: an image that cannot be used" in (said := " ".join(capsys.readouterr().err.split()))
    assert "--scale LOW HIGH" in said
    assert run(*arguments, "--scale", 0, 2550) == 0
    with Image.open(tmp_path / "out" / "labels" / "x.png") as labels:
        np.testing.assert_array_equal(np.array(labels), MODELS[5][0].labels(image))
    assert run(*arguments, "--scale", 0, 2550, "--resume") == 0
    capsys.readouterr()
    assert run(*arguments, "--scale", 0, 5000, "--resume") == 2
    assert "made with other scale (" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        run(*arguments, "--scale", 5, 5)
    assert "--scale has two numbers" in capsys.readouterr().err


def test_skipped_files_are_counted_and_named(tmp_path, capsys):
    put(tmp_path / "in" / "a.png", scene(0, 20, 30))
    for name in ("notes.txt", "table.csv", ".DS_Store"):
        (tmp_path / "in" / name).write_text("text")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in")
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped 4; " in said and "neither an image nor a video that can be read: " in said
    assert all(name in said for name in ("notes.txt", "table.csv", "hidden: ", ".DS_Store", "in/self"))


def test_files_with_several_images_are_named(tmp_path, capsys):
    """Pages and frames; not previews, reduced copies or masks of a page, and not one image in a format of several."""
    first, *others = (Image.fromarray(scene(seed, 20, 30)) for seed in range(3))
    (tmp_path / "in").mkdir()
    for suffix in ("gif", "webp", "png", "tif"):
        first.save(tmp_path / "in" / f"one_{suffix}.{suffix}")
        first.save(tmp_path / "in" / f"many_{suffix}.{suffix}", save_all=True, append_images=others)
    with tifffile.TiffWriter(tmp_path / "in" / "pyramid.tif") as file:
        file.write(np.asarray(first))
        file.write(np.asarray(first)[::2, ::2], subfiletype=1)
        file.write(np.ones((20, 30), bool), subfiletype=4)
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 0
    said = " ".join(capsys.readouterr().out.split())
    named = said.partition("4 files have several pages or frames, of which only the first was predicted: ")[2]
    assert sorted(re.findall(r"(\w+\.\w+)", named)) == [
        f"many_{suffix}.{suffix}" for suffix in ("gif", "png", "tif", "webp")
    ]
    assert "wrote 9 images" in said


def test_every_undecodable_input_is_named_and_the_others_are_done(tmp_path, capfd):
    """Damage, bombs, FIFOs and links to nothing; nothing is made up, and no library prints to the terminal."""
    put(tmp_path / "in" / "whole.jpg", scene(0, 40, 50))
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    jpeg = bytearray(put(tmp_path / "in" / "damaged.jpg", noise, quality=90).read_bytes())
    jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 2000] = bytes(2000)
    (tmp_path / "in" / "damaged.jpg").write_bytes(jpeg)
    tiff = bytearray(put(tmp_path / "in" / "torn.tif", noise, compression="tiff_adobe_deflate").read_bytes())
    tiff[len(tiff) // 2 : len(tiff) // 2 + 64] = bytes(64)
    (tmp_path / "in" / "torn.tif").write_bytes(tiff)
    put(tmp_path / "in" / "large.webp", scene(0, 90, 120), lossless=True)
    (tmp_path / "in" / "nowhere.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "text.png").write_text("<html>")
    arguments = (tmp_path / "in", "--output", tmp_path / "out", "--write", "labels")
    assert run(*arguments, "--max-pixels", 96 * 128 - 2000) == 1
    said = capfd.readouterr()
    told = " ".join(said.err.split())
    assert "wrote 1 image in" in said.out and "6 of 7 inputs failed" in told
    for words in (
        "damaged.jpg: has 96x128 pixels",
        "torn.tif: has 96x128 pixels",
        "large.webp: has 90x120 pixels, 10,800, more than 10,288; to decode it, raise the limit: --max-pixels",
        "nowhere.png: No such file or directory",
        "pipe.png: a FIFO, not a file",
        "text.png: is not an image that can be decoded",
    ):
        assert words in told
    assert run(*arguments) == 1
    said = capfd.readouterr()
    told = " ".join(said.err.split())
    assert "wrote 2 images in" in said.out and "5 of 7 inputs failed" in told
    assert "damaged.jpg: is damaged, and part of its pixels would be made up (Corrupt JPEG data" in told
    assert "torn.tif: is a TIFF that cannot be decoded" in told
    # One line of our own each, and none of a library's.
    assert said.err.count("Corrupt JPEG") == 1 and "libpng" not in said.err
    assert below(tmp_path / "out") == ["labels/large.png", "labels/whole.png", "predict.json"]


def test_outputs_are_complete_or_absent(tmp_path, monkeypatch, capsys):
    put(tmp_path / "a.png", scene(0, 20, 30))
    out = tmp_path / "out"
    old = out / "labels" / "a.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")

    def replace(temporary, path, original=os.replace):
        if path.suffix == ".json":
            return original(temporary, path)
        assert temporary.parent == path.parent and temporary.name.startswith(".") and temporary.stat().st_size > 50
        assert path != old or path.read_bytes() == b"old"
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", replace)
    assert run(tmp_path / "a.png", "--output", out) == 1
    assert "a.png: Input/output error" in " ".join(capsys.readouterr().err.split())
    assert old.read_bytes() == b"old"
    assert below(out) == ["labels/a.png", "predict.json"]


def test_an_output_that_is_removed_during_prediction_is_reported(tmp_path, monkeypatch, capsys):
    for seed in range(3):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 20, 30))
    save = batch_run.save

    def saved(path, *arguments):
        save(path, *arguments)
        if path.name == "1.png":
            path.unlink()

    monkeypatch.setattr(batch_run, "save", saved)
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 1
    said = capsys.readouterr()
    assert "wrote 2 images" in said.out and "1 of 3 inputs failed:" in said.err
    assert "labels/1.png was written but no longer exists" in " ".join(said.err.split())


def test_the_checkpoint_is_the_first_argument_or_an_option(tmp_path, capsys):
    put(tmp_path / "a.png", scene(0, 20, 30))
    put(tmp_path / "b.png", scene(1, 20, 30))
    for number, arguments in enumerate(
        (
            ("5", tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "0"),
            ("5", "--output", tmp_path / "1", tmp_path / "a.png", tmp_path / "b.png"),
            (tmp_path / "a.png", tmp_path / "b.png", "--checkpoint=5", "--output", tmp_path / "2"),
            ("--checkpoint", "5", "--output", tmp_path / "3", tmp_path / "a.png", tmp_path / "b.png"),
        )
    ):
        assert predict.main([str(argument) for argument in arguments]) == 0
        assert len(below(tmp_path / str(number))) == 5
    with pytest.raises(SystemExit):
        predict.main(["5", "--output", str(tmp_path / "4")])
    assert "the following arguments are required: INPUT" in capsys.readouterr().err


def test_a_full_disk_stops_prediction_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    for seed in range(30):
        put(tmp_path / "in" / f"{seed:02d}.png", scene(seed, 20, 30))
    written = []

    def full(path, *_):
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(batch_run, "save", full)
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 2
    assert "No space left" in (said := capsys.readouterr().err) and "--resume" in said
    assert len(written) < 12


@pytest.mark.parametrize("name, problem", [("labels", "labels is a file"), ("labels/sub", "sub is a file")])
def test_an_unwritable_output_folder_is_refused_before_prediction(name, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch_run.Predictor, "labels", lambda *_: pytest.fail("computes"))
    put(tmp_path / "in" / "a.png", scene(0, 20, 30))
    put(tmp_path / "in" / "sub" / "b.png", scene(1, 20, 30))
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("a file")
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.startswith("segjax predict: nothing can be written to") and f"{problem}; choose another --output" in said
    )
    assert below(tmp_path / "out") == [name]


def test_an_output_that_cannot_be_replaced_is_named_with_its_input(tmp_path, capsys):
    for name in "ab":
        put(tmp_path / "in" / f"{name}.png", scene(0, 20, 30))
    (tmp_path / "out" / "labels" / "a.png").mkdir(parents=True)
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'in' / 'a.png'}: {tmp_path / 'out' / 'labels' / 'a.png'}: Is a directory" in said
    assert below(tmp_path / "out" / "labels") == ["b.png"]


def test_an_unreadable_checkpoint_leaves_nothing_behind(tmp_path, capsys):
    put(tmp_path / "x.png", scene(0, 20, 30))
    assert run(tmp_path / "x.png", "--output", tmp_path / "out", checkpoint="nowhere") == 2
    assert capsys.readouterr().err == "segjax predict: nowhere: there is no such file\n"
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "x.png", "--output", tmp_path / "out", "--crop", "8", "8")
    assert caught.value.code == 2 and "--crop and --stride go with --mode slide" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_advice_for_many_sizes_and_large_images_is_printed_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch_run, "LARGE", 21 * 30)
    monkeypatch.setattr(batch_run, "MANY_SIZES", 3)
    for seed in range(4):
        put(tmp_path / "in" / f"{seed}.png", scene(seed, 20 + 2 * seed, 30))
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 0
    said = capsys.readouterr().out
    assert said.count("--pad-multiple 32") == 1 and said.count("--mode slide") == 1
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels", "--pad-multiple", "64") == 0
    assert "--pad-multiple 32" not in capsys.readouterr().out


def test_a_sliding_window_gives_the_labels_of_the_whole_image(tmp_path):
    image = scene(0, 50, 70)
    put(tmp_path / "x.png", image)
    windows = ("--mode", "slide", "--crop", "24", "32", "--stride", "16", "20", "--batch", "2")
    assert run(tmp_path / "x.png", "--output", tmp_path / "out", *windows) == 0
    with Image.open(tmp_path / "out" / "labels" / "x.png") as labels:
        np.testing.assert_array_equal(np.array(labels), MODELS[5][0].labels(image))


# ------------------------------------------------------------------------------------------------------------- pipeline


def overlapped(number, *, failed=None, threads=2, batch=1, **functions):
    done, errors = [], []
    given = {
        "read": lambda item: item,
        "compute": lambda contents: contents,
        "write": lambda *_: None,
        "key": lambda content: 0,
    } | functions
    inference_overlapped.overlapped(
        range(number),
        done=done.append,
        failed=failed or (lambda item, error: errors.append((item, str(error)))),
        threads=threads,
        batch=batch,
        **given,
    )
    return done, errors


@pytest.mark.parametrize("batch", [1, 3])
def test_reading_computing_and_writing_overlap_and_keep_the_order(batch):
    written, groups = {}, []

    def compute(contents):
        groups.append(contents)
        time.sleep(0.01)
        return [content + 100 for content in contents]

    # Each read waits for another that has begun too, and so does each write. Alone they would wait for ever.
    reads, writes = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)
    done, errors = overlapped(
        12,
        read=lambda item: (reads.wait(), item)[1],
        compute=compute,
        write=lambda item, content, result: (writes.wait(), written.update({item: (content, result)})),
        batch=batch,
    )
    assert done == list(range(12)) and not errors
    assert written == {item: (item, item + 100) for item in range(12)}
    assert groups == [list(range(at, at + batch)) for at in range(0, 12, batch)]


def test_the_number_of_items_in_memory_is_limited():
    held, most, lock = 0, 0, threading.Lock()

    def change(by):
        nonlocal held, most
        with lock:
            held += by
            most = max(most, held)

    overlapped(40, read=lambda item: (change(1), item)[1], write=lambda *_: (time.sleep(0.005), change(-1)))
    assert held == 0 and 3 <= most <= 8


@pytest.mark.parametrize("place", ["read", "compute", "write"])
def test_an_error_in_any_stage_is_assigned_to_its_item(place):
    def fault(*given):
        if given[0] == 3 or given[0] == [3]:
            raise ValueError("three")
        return given[0]

    done, errors = overlapped(6, **{place: fault})
    assert done == [0, 1, 2, 4, 5] and errors == [(3, "three")]


@pytest.mark.parametrize("place", ["read", "compute", "write"])
def test_a_reraised_error_stops_everything(place):
    seen = []

    def fault(*given):
        seen.append(given[0])
        if given[0] == 3 or given[0] == [3]:
            raise ValueError("three")
        return given[0]

    def failed(item, error):
        raise error

    with pytest.raises(ValueError, match="three"):
        overlapped(100, failed=failed, **{place: fault})
    assert len(seen) < 12
    assert threading.active_count() < 20


def test_groups_end_where_the_key_changes_and_at_the_last_item():
    groups = []
    done, _ = overlapped(
        10,
        read=lambda item: item if item < 8 else None,
        key=lambda content: content // 3,
        compute=lambda contents: (groups.append(contents), contents)[1],
        batch=2,
    )
    assert groups == [[0, 1], [2], [3, 4], [5], [6, 7]] and done == list(range(8))


def test_without_pyav_a_video_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(tmp_path / "clip.mp4", "--output", tmp_path / "out") == 2
    assert "pip install 'segjax[video]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

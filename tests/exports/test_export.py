"""StableHLO files: their results, the platforms that run them, and refusals. Other formats: parity/test_export.py."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

import segjax
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import export as command
from segjax.data import specs
from segjax.exports import export, stablehlo
from segjax.exports.format import ExportFormat
from segjax.inference import runtimes
from segjax.kernels import choice, resize
from segjax.models.functional import FunctionalModel
from segjax.runtime import atomic, memory
from tests.tiny import FAMILIES, tiny_model

REPO = Path(__file__).parents[2]
# No module of the model's own code, nor what it is built from.
WITHOUT_SEGJAX = "import sys\nsys.modules.update(segjax=None, flax=None, parity=None)\n"


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def saved(folder, model, **about):
    orbax_folder.save_model(folder, model, metadata=about)
    return folder


def normalised(images):
    return ((images - np.array(specs.IMAGENET_MEAN)) / np.array(specs.IMAGENET_STD)).astype(np.float32)


def pictures(batch, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def relative_error(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(np.float64) - b).max() / np.abs(b).max()


def readme_example(name):
    """The Python example of the README that opens the file `name`."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs/export.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f'"{name}"' in block]
    return block


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "segformer")) for name in FAMILIES]
)
def test_a_file_with_dynamic_sizes_equals_the_model_at_another_size(family, tmp_path):
    model, path = tiny_model(3, family), tmp_path / "a.stablehlo"
    form = ExportFormat("stablehlo", (64, 96), dynamic=True)
    stablehlo.write_stablehlo(path, model, form, {})
    program = runtimes.open_stablehlo(path).run
    images = normalised(pictures(3, (97, 65) if model.size_multiple == 1 else (96, 64)))
    theirs = np.asarray(jax.jit(lambda images: model(images)[0])(images))
    assert relative_error(program(images), theirs) < 1e-5


def test_a_file_runs_without_segjax_as_documented(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "checked_sizes", lambda form, size_multiple: [(2, (67, 70))])
    model = tiny_model(1, num_classes=19)
    saved(tmp_path / "b0", model)
    command = ["b0", "b0.stablehlo", "--format", "stablehlo", "--size", "64", "80"]
    assert run(*command, "--dynamic", "--with-preprocessing", "--with-argmax") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  in   images  uint8 RGB (batch, height, width, 3)" in lines
    assert "  out  labels  uint8 (batch, height, width)" in lines
    assert any(line.startswith("  classes of cityscapes: road, sidewalk") for line in lines)
    assert max(map(len, lines)) <= 80
    images = pictures(2, (67, 70))
    np.save("images.npy", images)
    # Smaller images than the example's, which compile sooner.
    example = readme_example("b0.stablehlo").replace("np.zeros((1, 512, 1024, 3), np.uint8)", 'np.load("images.npy")')
    code = WITHOUT_SEGJAX + example + 'np.save("labels.npy", labels)\nprint(labels.shape, labels.dtype, names[0])'
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(2, 67, 70) uint8 road"
    scores = resize.resize_plain(model(normalised(images))[0], (67, 70))
    assert (np.load("labels.npy") == np.asarray(scores).argmax(axis=-1)).mean() > 0.999


def test_one_file_has_the_implementations_for_cpus_and_for_gpus(tmp_path):
    stablehlo.write_stablehlo(tmp_path / "a", tiny_model(0), ExportFormat("stablehlo", (32, 64)), {})
    exported = jax_export.deserialize(bytearray((tmp_path / "a").read_bytes()))
    assert exported.platforms == ("cpu", "cuda")
    cpu, cuda = (lowered_for(platform) for platform in ("cpu", "cuda"))
    # A depthwise convolution has as many groups as channels; on a CPU it is a sum of products.
    assert not re.search(r"feature_group_count = (?!1\b)", cpu) and re.search(r"feature_group_count = (?!1\b)", cuda)
    assert re.search(r"feature_group_count = (?!1\b)", exported.mlir_module())


def lowered_for(platform):
    def forward(images):
        with choice.meant_for(platform):
            return tiny_model(0)(images)[0]

    return jax.jit(forward).lower(jnp.zeros((1, 32, 64, 3))).as_text()


def test_an_export_is_reproducible_and_contains_no_local_paths(tmp_path):
    programs = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "m.stablehlo"
        stablehlo.write_stablehlo(path, tiny_model(3), ExportFormat("stablehlo", (64, 96), argmax=True), {"a": [1]})
        programs.append(path.read_bytes())
    assert programs[0] == programs[1]
    for folder in (tmp_path, REPO, sys.prefix, Path(jax.__file__).parent):
        assert str(folder).encode() not in programs[0]


def test_a_file_uses_the_normalisation_of_the_checkpoint(tmp_path):
    model, normalisation = tiny_model(1), {"mean": [1.5, 2.5, 3.5], "std": [10.0, 20.0, 40.0]}
    saved(tmp_path / "a", model, normalisation=normalisation)
    path, options = tmp_path / "a.stablehlo", ("--size", 32, 64, "--with-preprocessing")
    assert run(tmp_path / "a", path, "--format", "stablehlo", *options) == 0
    assert (
        json.loads(runtimes.metadata_path(path).read_text(encoding="utf-8"))["normalisation"].items()
        >= normalisation.items()
    )
    images = pictures(1, (32, 64))
    by_hand = model((images - np.float32([1.5, 2.5, 3.5])) / np.float32([10, 20, 40]))[0]
    assert relative_error(runtimes.open_stablehlo(path).run(images), np.asarray(by_hand)) < 1e-5
    assert relative_error(np.asarray(model(normalised(images))[0]), np.asarray(by_hand)) > 0.01


def test_a_file_with_one_class_outputs_its_mask(tmp_path):
    model = tiny_model(2, num_classes=1)
    form = ExportFormat("stablehlo", (40, 64), preprocessing=True, argmax=True)
    stablehlo.write_stablehlo(tmp_path / "a", model, form, {})
    images = pictures(1, form.size)
    labels = runtimes.open_stablehlo(tmp_path / "a").run(images)
    scores = np.asarray(resize.resize_plain(model(normalised(images))[0], form.size))[..., 0]
    assert 0.01 < labels.mean() < 0.99
    assert (labels == (scores > 0)).mean() > 0.999


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
def test_16_bit_weights_halve_the_file_and_the_agreement_is_printed(dtype, tmp_path, capsys):
    model = tiny_model(1, dims=(32, 32, 40, 64), decoder_dim=64)
    saved(tmp_path / "a", model)
    path = tmp_path / "a.stablehlo"
    assert run(tmp_path / "a", path, "--format", "stablehlo", "--size", 64, 96, "--dtype", dtype) == 0
    (share,) = re.findall(r"([\d.]+)% of the labels equal those in float32", capsys.readouterr().out)
    assert 80 < float(share) <= 100
    assert jax_export.deserialize(bytearray(path.read_bytes())).out_avals[0].dtype == jnp.float32
    stablehlo.write_stablehlo(tmp_path / "wide", model, ExportFormat("stablehlo", (64, 96)), {})
    weights = sum(value.size for value in FunctionalModel(model).arrays()[0].values())
    assert (tmp_path / "wide").stat().st_size - path.stat().st_size > 1.9 * weights


def test_class_names_and_colours_are_in_the_json_next_to_the_file(tmp_path):
    spec = specs.DatasetSpec("rooms", ("floor", "wall", "door"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), 255)
    record = dict(name=spec.name, class_names=spec.class_names, colors=spec.colors, ignore_label=255)
    saved(tmp_path / "a", tiny_model(0, num_classes=3), dataset=record)
    assert run(tmp_path / "a", tmp_path / "new" / "a.stablehlo", "--format", "stablehlo", "--size", 32, 64) == 0
    about = json.loads((tmp_path / "new" / "a.stablehlo.json").read_text())
    assert about["classes"] == ["floor", "wall", "door"] and about["colors"][2] == [7, 8, 9]
    assert about["dataset"] == "rooms" and about["normalisation"]["mean"] == [123.675, 116.28, 103.53]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.stablehlo", "a.stablehlo.json"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_flipped_bit_in_a_stablehlo_file_is_detected_before_running(seed, tmp_path):
    path = tmp_path / "a.stablehlo"
    export.export_model(tiny_model(seed), path, size=(32, 64))
    content = bytearray(path.read_bytes())
    assert segjax.open_exported(path).model.size == (32, 64)
    for at in np.random.default_rng(seed).integers(0, len(content), 5).tolist():
        content[at] ^= 4
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.stablehlo: is not the file that a\.stablehlo\.json describes"):
            segjax.open_exported(path)
        content[at] ^= 4
    # Metadata of another export.
    path.write_bytes(content)
    export.export_model(tiny_model(seed), tmp_path / "b.stablehlo", size=(40, 64))
    (tmp_path / "b.stablehlo.json").replace(tmp_path / "a.stablehlo.json")
    with pytest.raises(CheckpointError, match="one of the two is damaged or was replaced"):
        segjax.open_exported(path)


def test_metadata_of_an_earlier_export_are_removed_and_foreign_ones_kept(tmp_path):
    path, place = tmp_path / "a.onnx", tmp_path / "a.onnx.json"
    assert export._own_metadata(path) == []
    place.write_text('{"segjax_version": "0.1.0", "quantisation": {}}')
    assert export._own_metadata(path) == [place]
    for text in ('{"classes": ["a"]}', "no JSON"):
        place.write_text(text)
        assert export._own_metadata(path) == []


def test_the_default_size_is_that_of_the_checkpoint(tmp_path, capsys):
    saved(tmp_path / "a", tiny_model(0), input_size=[40, 64])
    assert run(tmp_path / "a", tmp_path / "a.stablehlo") == 0
    assert "in images float32 normalised RGB (1, 40, 64, 3)" in " ".join(capsys.readouterr().out.split())
    saved(tmp_path / "b", tiny_model(0))
    assert run(tmp_path / "b", tmp_path / "b.stablehlo") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the checkpoint does not say at which size it is used; give the size (--size H W)" in said
    assert export.default_size(
        LoadedCheckpoint(tiny_model(0), specs.STREETS, {"config": {"augment": {"crop": [8, 9]}}})
    ) == (8, 9)


def test_a_file_that_differs_from_the_model_is_not_kept(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "a", tiny_model(0))
    write = stablehlo.write_stablehlo
    monkeypatch.setattr(stablehlo, "write_stablehlo", lambda path, model, *rest: write(path, tiny_model(5), *rest))
    (tmp_path / "b.stablehlo").write_text("the one before")
    assert run(tmp_path / "a", tmp_path / "b.stablehlo", "--format", "stablehlo", "--size", 32, 64) == 1
    printed = capsys.readouterr()
    assert "NOT equal (bound 1e-04)" in printed.out and "not written" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.stablehlo"]
    assert (tmp_path / "b.stablehlo").read_text() == "the one before"


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (
            "segformer",
            ("a.onnx", "--size", 32, 64),
            r"a\.onnx: stablehlo files must end in \.stablehlo",
        ),
        ("segformer", ("a.stablehlo", "--size", 16, 64), "the image is too small: stage 1 sees a map of 4x16"),
        ("hrnet", ("a.stablehlo", "--size", 63, 64, "--dynamic"), "dynamic sides must be at least 64"),
        ("simple", ("a.stablehlo", "--size", 60, 64), "60 64: segformer_simple takes multiples of 32: 64 64"),
        ("zuppichini", ("a.stablehlo", "--size", 64, 33), "takes multiples of 32: 64 64"),
    ],
)
def test_impossible_exports_are_refused_before_anything_is_written(family, arguments, message, tmp_path, capsys):
    saved(tmp_path / "model", tiny_model(0, family))
    assert run(tmp_path / "model", tmp_path / arguments[0], "--format", "stablehlo", *arguments[1:]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "given, of, words",
    [
        ((), "host", "the model on an image of 64x96 needs"),
        ((), "limit", "the model on an image of 64x96 needs"),
        (("--dynamic", "--with-argmax"), "limit", "give a smaller --size (with --dynamic the file takes larger images"),
    ],
)
def test_a_size_too_large_for_memory_is_refused_before_writing(given, of, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, of, lambda *_, **__: 20_000)
    monkeypatch.setattr(stablehlo, "write_stablehlo", lambda *_: pytest.fail("writes"))
    saved(tmp_path / "model", tiny_model(0))
    command = [tmp_path / "model", tmp_path / "a.stablehlo", "--format", "stablehlo", "--size", 64, 96, *given]
    assert run(*command) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error, is_full, words",
    [
        (
            RuntimeError("write failed: No space left on device"),
            False,
            "a.stablehlo: No space left on device. Make room",
        ),
        (RuntimeError("enforce fail at inline_container.cc"), True, "a.stablehlo: No space left on device. Make room"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), False, "there is not enough memory"),
        (MemoryError(), False, "there is not enough memory"),
        (RuntimeError("Cannot branch on h"), False, "the sizes of this model cannot be dynamic (Cannot branch on h)"),
    ],
)
def test_other_sizes_are_suggested_only_for_errors_about_sizes(error, is_full, words, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(stablehlo, "write_stablehlo", fail)

    def is_full_now(error, _):
        return errno.ENOSPC if is_full and not isinstance(error, ValueError) else None

    monkeypatch.setattr(atomic, "_is_full_now", is_full_now)
    saved(tmp_path / "model", tiny_model(0))
    command = [tmp_path / "model", tmp_path / "a.stablehlo", "--format", "stablehlo", "--size", 64, 96, "--dynamic"]
    assert run(*command) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert run(tmp_path / "no", tmp_path / "a.stablehlo", "--format", "stablehlo", "--size", 32, 64) == 2
    assert "there is no such file" in " ".join(capsys.readouterr().err.split())


def test_labels_may_differ_only_where_classes_are_equal_up_to_rounding():
    logits = np.zeros((1, 1, 2, 3), np.float32)
    logits[0, 0] = [[1.0, 1.0 - 1e-6, 0.0], [0.0, 2.0, 1.5]]
    form = ExportFormat("stablehlo", (1, 2), argmax=True)

    def error(*labels):
        return export.error_of(np.array(labels, np.uint8).reshape(1, 1, 2), logits, (1, 2), form, align_corners=False)

    assert error(0, 1) == 0
    assert error(1, 1) == pytest.approx(5e-7, rel=0.1)
    assert error(0, 2) == pytest.approx(0.25)
    assert error(0, 3) == np.inf


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(4, "uint16"), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, "uint8"), (13, "float32")))],
)
def test_a_file_takes_images_with_other_channels_and_dtypes(channels, dtype, tmp_path, capsys):
    model, rng = tiny_model(3, in_channels=channels), np.random.default_rng(channels)
    mean, std = [100.0 + number for number in range(channels)], [20.0 + number for number in range(channels)]
    saved(tmp_path / "a", model, normalisation={"mean": mean, "std": std}, image_dtype=dtype)
    images = (np.array(mean) + np.array(std) * rng.normal(size=(2, 67, 141, channels))).clip(0).astype(dtype)
    normal = ((images - np.array(mean)) / np.array(std)).astype(np.float32)
    expected = np.asarray(jax.jit(lambda images: model(images)[0])(normal))
    for inside, given, kind in ((True, images, dtype), (False, normal, "float32 normalised")):
        path = tmp_path / f"{inside}.stablehlo"
        options = ["--format", "stablehlo", "--size", 64, 96, "--dynamic"] + ["--with-preprocessing"] * inside
        assert run(tmp_path / "a", path, *options) == 0
        assert relative_error(runtimes.open_stablehlo(path).run(given), expected) < 1e-4
        assert f"in images {kind} (batch, height, width, {channels})" in " ".join(capsys.readouterr().out.split())
        about = json.loads(runtimes.metadata_path(path).read_text())["normalisation"]
        assert about == {"mean": mean, "std": std, "channels": channels, "dtype": dtype, "inside": inside}

"""Common folders: of a Trainer, with one file, in parts, with a LoRA adapter; and files without weights."""

import gzip
import io
import json
import logging
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import provenance_at, read_checkpoint
from segjax.checkpoints.load import load
from segjax.checkpoints.save import save
from segjax.checkpoints.state_dict import to_torch
from segjax.commands import convert, inspect
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(5)


@pytest.fixture(scope="module")
def weights(model):
    return to_torch(model, dialect="hf")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key, strict=True)


# ------------------------------------------------------------------------------------------------------------- folders


def test_the_newest_checkpoint_of_a_trainer_is_read(tmp_path, model, caplog):
    caplog.set_level(logging.INFO, "segjax")
    for step, seed in ((500, 1), (1500, 2), (1000, 3)):
        save(tiny_model(seed), tmp_path / "out" / f"checkpoint-{step}", dialect="hf")
    (tmp_path / "out" / "checkpoint-9999").write_text("a file")
    found = read_checkpoint(tmp_path / "out")
    assert_same(found.weights, to_torch(tiny_model(2), dialect="hf"))
    assert f"reads checkpoint-1500, the newest of 3 in {tmp_path / 'out'}" in caplog.messages
    assert found.source == "out/checkpoint-1500" and found.provenance == provenance_at(tmp_path / "out")
    # What it has saved in the end comes first, and a config alone does not count.
    shutil.copy(tmp_path / "out" / "checkpoint-500" / "config.json", tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").source == "out/checkpoint-1500"
    save(model, tmp_path / "out" / "final", dialect="hf")
    for path in (tmp_path / "out" / "final").iterdir():
        shutil.copy(path, tmp_path / "out")
    assert_same(read_checkpoint(tmp_path / "out").weights, to_torch(model, dialect="hf"))


@pytest.mark.parametrize("name", ["best.safetensors", "w.npz"])
def test_the_only_checkpoint_in_a_folder_is_read(tmp_path, weights, name, caplog):
    caplog.set_level(logging.INFO, "segjax")
    write = save_file if name.endswith(".safetensors") else lambda arrays, path: np.savez(path, **arrays)
    write(weights, tmp_path / name)
    (tmp_path / "log.txt").write_text("loss 0.1")
    assert_same(read_checkpoint(tmp_path).weights, weights)
    assert f"reads {name}, the only checkpoint in {tmp_path}" in caplog.messages
    write(weights, tmp_path / f"another.{name}")
    with pytest.raises(CheckpointError, match=f"several checkpoints; give one of another.{name}, {name}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["model", "diffusion_pytorch_model"])
def test_shards_are_read_through_their_index_or_the_folder(tmp_path, weights, prefix):
    keys = sorted(weights)
    parts = {f"{prefix}-{n:05}-of-00003.safetensors": keys[n - 1 :: 3] for n in (1, 2, 3)}
    for name, some in parts.items():
        save_file({key: weights[key] for key in some}, tmp_path / name)
    index = tmp_path / f"{prefix}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, some in parts.items() for key in some}}))
    for source in (tmp_path, index):
        assert_same(read_checkpoint(source).weights, weights)
    (tmp_path / f"{prefix}-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{prefix}-00002-of-00003.safetensors, not found next to it"):
        read_checkpoint(index)


FOLDERS = {
    "saved_model.pb": "TensorFlow",
    "__0_0.distcp": "dcp_to_torch",
    "mp_rank_00_model_states.pt": "zero_to_fp32",
    "model.ckpt-1.index": "TensorFlow",
    "notes.txt": "no checkpoint",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_other_kinds_of_folders_are_named(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(b"\x80\x02}." if name.endswith(".pt") else b"content")
    if name.endswith(".pt"):
        (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert inspect.main([str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert FOLDERS[name] in said and str(tmp_path) in said


def test_checkpoints_in_subfolders_are_named(tmp_path, weights, capsys):
    path = tmp_path / "version_0/checkpoints/epoch=3.safetensors"
    path.parent.mkdir(parents=True)
    save_file(weights, path)
    assert inspect.main([str(tmp_path / "version_0")]) == 2
    assert "give one of checkpoints/epoch=3.safetensors" in " ".join(capsys.readouterr().err.split())


def test_a_core_ml_package_is_named(tmp_path, capsys):
    (tmp_path / "m.mlpackage").mkdir()
    (tmp_path / "m.mlpackage/Manifest.json").write_text("{}")
    assert inspect.main([str(tmp_path / "m.mlpackage")]) == 2
    assert "Core ML" in capsys.readouterr().err


def test_the_advice_to_drop_names_the_unexpected_tensors(tmp_path, weights, capsys):
    more = {name: np.zeros(2, np.float32) for name in ("rng_state", "extra.a", "extra.b")}
    save_file(weights | more, tmp_path / "w.safetensors")
    convert_to = ["--to", "hf", str(tmp_path / "w.safetensors"), str(tmp_path / "out.safetensors")]
    assert convert.main(convert_to) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--drop 'extra.*' 'rng_state'` skips" in said or "--drop 'rng_state' 'extra.*'` skips" in said
    assert convert.main([*convert_to, "--drop", "rng_state", "extra.*"]) == 0


# ------------------------------------------------------------------------------------------------------- other files


def in_zip(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def in_tar(name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


FILES = {
    "script.pt": (in_zip("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "TorchScript"),
    "program.pt2": (in_zip("m/archive_format", "m/models/model.json"), "torch.export"),
    "old.pt2": (in_zip("serialized_exported_program.json", "version"), "torch.export"),
    "download.zip": (in_zip("best.pth", "readme.txt"), "best.pth"),
    "best.pth": (in_zip("checkpoints/last.pth"), "unpack"),
    "m.keras": (in_zip("config.json", "model.weights.h5", "metadata.json"), "Keras"),
    "m.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "m.tflite": (b"\x1c\0\0\0TFL3" + bytes(64), "TensorFlow Lite"),
    "m.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(64), "ONNX"),
    "saved_model.pb": (b"\x08\x01\x12\xff\x07" + bytes(64), "SavedModel"),
    "m.pth": (gzip.compress(b"weights" * 40), "gzip"),
    "m.tar": (in_tar("best.pth"), "tar archive"),
    "m.engine": (b"ftrt" + bytes(64), "TensorRT"),
    "m.gguf": (b"GGUF" + bytes(64), "GGUF"),
    "m.msgpack": (b"\x81\xa6params\x80" + bytes(64), "Flax"),
    "m.npy": (b"\x93NUMPY\x01\x00v\x00" + bytes(64), "array of numpy"),
    "m.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
    "photo.pth": (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG image"),
    "page.pth": (b"<!doctype html><html>404</html>", "text"),
    "m.ckpt.data-00000-of-00001": (bytes(range(64)), "TensorFlow"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_kinds_of_files_are_named_and_not_called_damaged(tmp_path, name, capsys):
    content, word = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert inspect.main([str(tmp_path / name)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert word in said and "damaged" not in said and name in said


def test_a_damaged_npz_is_refused(tmp_path, weights):
    np.savez(tmp_path / "w.npz", **weights)
    data = bytearray((tmp_path / "w.npz").read_bytes())
    data[len(data) // 3] ^= 255
    (tmp_path / "w.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"w\.npz: an \.npz that cannot be read"):
        read_checkpoint(tmp_path / "w.npz")
    np.savez(tmp_path / "o.npz", a=np.array([{}], object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"o\.npz: an \.npz that cannot be read: its array a .*objects"):
        read_checkpoint(tmp_path / "o.npz")
    # A header of a shape that fits no memory, and a member that needs a password.
    with zipfile.ZipFile(tmp_path / "h.npz", "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }\n"
        archive.writestr("big.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    np.savez(tmp_path / "p.npz", **weights)
    data = bytearray((tmp_path / "p.npz").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "p.npz").write_bytes(data)
    for name in ("h.npz", "p.npz"):
        with pytest.raises(CheckpointError, match=rf"{name}: an \.npz that cannot be read: its array"):
            read_checkpoint(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ adapters

QUERY, KEY = (f"segformer.encoder.block.2.0.attention.self.{part}" for part in ("query", "key"))
PATCHES, CLASSIFIER = "segformer.encoder.patch_embeddings.1.proj", "decode_head.classifier"


def adapter(folder, weights, seed, **settings):
    """An adapter of rank 3 for two linear layers and a convolution, and a classifier of 7 classes."""
    rng = np.random.default_rng(seed)

    def noise(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    arrays, change = {}, {}
    for module in (QUERY, KEY, PATCHES):
        shape = weights[f"{module}.weight"].shape
        a, b = noise(3, *shape[1:]), noise(shape[0], 3, *[1] * (len(shape) - 2))
        arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        # Of each tap of a convolution by itself.
        flat = b.reshape(shape[0], 3) @ a.reshape(3, -1)
        change[f"{module}.weight"] = flat.reshape(shape)
    arrays[f"{CLASSIFIER}.weight"] = noise(7, *weights[f"{CLASSIFIER}.weight"].shape[1:])
    arrays[f"{CLASSIFIER}.bias"] = noise(7)
    folder.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in arrays.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "base_model_name_or_path": "../base"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return arrays, change


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (4, 4, 4)),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, (12 / 3**0.5,) * 3),
        ({"alpha_pattern": {"query": 6, "encoder.patch_embeddings.1.proj": 1}}, (2, 4, 1 / 3)),
    ],
)
def test_an_adapter_is_merged_into_its_base(tmp_path, model, weights, seed, settings, scales, caplog):
    caplog.set_level(logging.INFO, "segjax")
    save(model, tmp_path / "base", dialect="hf")
    arrays, change = adapter(tmp_path / "lora", weights, seed, **settings)
    found = read_checkpoint(tmp_path / "lora")
    expected = dict(weights)
    for (key, value), scale in zip(change.items(), scales, strict=True):
        expected[key] = weights[key] + np.float64(scale) * value
    expected |= {key: arrays[key] for key in (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias")}
    assert found.weights.keys() == expected.keys()
    for key, value in expected.items():
        assert found.weights[key].dtype == weights[key].dtype
        np.testing.assert_allclose(found.weights[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    assert "merges the LoRA adapter lora into its base" in caplog.text
    assert len(found.paths) == 2
    assert inspect.main([str(tmp_path / "lora")]) == 0


# transformers 5 in memory: the names that an adapter gets there, while files keep the older ones.
IN_MEMORY = {
    QUERY: "segformer.stages.2.blocks.0.attention.q_proj",
    KEY: "segformer.stages.2.blocks.0.attention.k_proj",
    PATCHES: "segformer.stages.1.patch_embeddings.proj",
}


def test_an_adapter_may_use_the_names_of_transformers_in_memory(tmp_path, model, weights):
    save(model, tmp_path / "base", dialect="hf")
    adapter(tmp_path / "old", weights, 0)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    arrays = load_file(tmp_path / "old" / "adapter_model.safetensors")
    for old, new in IN_MEMORY.items():
        arrays = {key.replace(old, new): value for key, value in arrays.items()}
    save_file(arrays, tmp_path / "new" / "adapter_model.safetensors")
    assert len(read_checkpoint(tmp_path / "new").weights.keys() - read_checkpoint(tmp_path / "old").weights.keys()) > 9
    assert_same(to_torch(load(tmp_path / "new").model), to_torch(load(tmp_path / "old").model))


FAULTS = {
    "a base that is nowhere": ({"base_model_name_or_path": "/nowhere/mit"}, "/nowhere/mit"),
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    "itself": ({"base_model_name_or_path": "../lora"}, "it is its own base; set base_model_name_or_path"),
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "an expression": ({"alpha_pattern": {"(a+)+$": 2}}, "(a+)+$"),
    "a type": ({"lora_alpha": "x"}, "lora_alpha"),
    # Both subtract the first matrices from the base that is trained.
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "also changed its base; merge it where it was trained"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_missing_parts_of_an_adapter_are_named(tmp_path, model, weights, fault, capsys):
    settings, word = FAULTS[fault]
    save(model, tmp_path / "base", dialect="hf")
    adapter(tmp_path / "lora", weights, 0, **settings)
    assert inspect.main([str(tmp_path / "lora")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert word in said and "Traceback" not in said


def test_a_link_to_itself_is_named(tmp_path, weights, capsys):
    adapter(tmp_path / "lora", weights, 0, base_model_name_or_path="../loop.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "loop").symlink_to(tmp_path / "loop", target_is_directory=True)
    for source in ("loop.pth", "loop", "lora", "loop/below.safetensors"):
        assert inspect.main([str(tmp_path / source)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "loop" in said and "Traceback" not in said


def test_adapter_matrices_without_a_layer_or_a_scale_are_refused(tmp_path, model, weights):
    save(model, tmp_path / "base", dialect="hf")
    adapter(tmp_path / "lora", weights, 0)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    arrays = load_file(path)
    lone = f"base_model.model.{QUERY}.lora_B.weight"
    for odd in (
        {key: value for key, value in arrays.items() if key != lone},
        {key: value for key, value in arrays.items() if key != lone.replace("lora_B", "lora_A")},
        arrays | {lone: np.zeros((5, 3), np.float32)},
        arrays | {"base_model.model.head.lora_A.weight": np.zeros((3, 4), np.float32)},
        arrays | {f"base_model.model.{QUERY}.lora_magnitude_vector": np.zeros(8, np.float32)},
    ):
        save_file(odd, path)
        with pytest.raises(CheckpointError, match=r"its base has no place for .*merge_and_unload"):
            read_checkpoint(tmp_path / "lora")
    save_file(
        {key.removeprefix("base_model.model."): value for key, value in arrays.items()} | weights,
        tmp_path / "w.safetensors",
    )
    with pytest.raises(CheckpointError, match="lora_alpha"):
        read_checkpoint(tmp_path / "w.safetensors")

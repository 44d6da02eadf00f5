"""Checkpoints with impossible or altered weights are refused; the error names the tensor."""

import collections
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from segjax import load_torch, to_torch
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.load import load
from segjax.checkpoints.save import save
from segjax.checkpoints.soundness import refuse_unsound, tensors_hash
from segjax.checkpoints.state_dict import named_variables
from segjax.commands import convert, inspect, predict
from tests.tiny import tiny_model

DEEP = "[" * 100_000
NORM, CLASSIFIER = "backbone.norm2.weight", "decode_head.linear_pred.bias"
VARIANCE = "decode_head.linear_fuse.bn.running_var"


@pytest.fixture(scope="module")
def model():
    return tiny_model(3)


@pytest.fixture
def weights(model):
    return to_torch(model)


def tensors(weights):
    return {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}


def refused(source, *words):
    """The message with which a checkpoint is refused; it names the file and `words`."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(source)
    message = str(caught.value)
    assert all(word in message for word in (str(source), *words)), message
    return message


# --------------------------------------------------------------------------------------------- numbers that cannot be


@pytest.mark.parametrize(
    ("key", "value", "dtype", "word"),
    [
        (NORM, np.nan, np.float32, "NaN"),
        (CLASSIFIER, -np.inf, np.float32, "infinite"),
        (CLASSIFIER, np.inf, np.float16, "infinite"),
        (NORM, 1e200, np.float64, "infinite in float32"),
        (VARIANCE, -1e-3, np.float32, "variance"),
    ],
)
def test_every_way_to_load_refuses_invalid_numbers(tmp_path, capsys, model, weights, key, value, dtype, word):
    weights[key] = weights[key].astype(dtype)
    weights[key].flat[-1] = value
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    for way in (load, lambda path: initialize(model, path), lambda path: load_torch(model, weights)):
        with pytest.raises(CheckpointError, match=f"(?s){key}.*{word}"):
            way(path)
    assert (
        convert.main([str(path), str(tmp_path / "out.safetensors")]) == 2
        and not (tmp_path / "out.safetensors").exists()
    )
    assert key in capsys.readouterr().err
    assert inspect.main([str(path)]) == 2 and key in capsys.readouterr().err


def test_invalid_numbers_in_an_orbax_folder_are_refused(tmp_path, capsys, model):
    arrays = {path: np.array(variable[...]) for path, variable in named_variables(model).items()}
    about = {"model": {"name": "segformer_b0", "num_classes": 5, "param_dtype": "float32"}}
    about["model"]["overrides"] = {key: list(v) if isinstance(v, tuple) else v for key, v in model.spec.overrides}
    for name, value, word in (("backbone.norm2.scale", np.inf, "infinite"), (VARIANCE[:-11] + "var", -1, "variance")):
        spoilt = {key: array.copy() for key, array in arrays.items()}
        spoilt[name].flat[0] = value
        orbax_folder.save_weights(tmp_path / "folder", spoilt, metadata=about)
        with pytest.raises(CheckpointError, match=f"(?s)folder.*{name}.*{word}"):
            load(tmp_path / "folder")
    (tmp_path / "i.png").write_bytes(b"")
    arguments = ["--checkpoint", str(tmp_path / "folder"), str(tmp_path / "i.png"), "--output", str(tmp_path / "out")]
    assert predict.main(arguments) == 2 and VARIANCE[:-11] in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_a_single_non_finite_number_is_found_anywhere(seed, dtype):
    rng = np.random.default_rng(seed)
    # So large that sums overflow in float32 and float16.
    array = (rng.standard_normal((7, 311)) * (1e30 if np.dtype(dtype).itemsize > 2 else 1)).astype(dtype)
    dtypes = {"w": np.dtype(dtype)}
    refuse_unsound({"w": array}, dtypes, set())
    for value in (np.nan, np.inf, -np.inf):
        spoilt = array.copy()
        spoilt.flat[rng.integers(array.size)] = value
        for view in (spoilt, spoilt.T, spoilt[::-1]):
            with pytest.raises(CheckpointError, match="w: 1 of 2,177"):
                refuse_unsound({"w": view}, dtypes, set())


def test_unused_arrays_may_contain_anything(model, weights):
    load_torch(model, weights | {"loss.weight": np.full(3, np.nan, np.float32)}, drop=["loss.*"])


# ---------------------------------------------------------------------------------------- bits that are not those saved


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_in_a_pth_is_detected(tmp_path, weights, seed):
    path = tmp_path / "w.pth"
    torch.save(tensors(weights), path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        name = names[np.random.default_rng(seed).integers(len(names))]
        content, header = archive.read(name), archive.getinfo(name).header_offset
    data = bytearray(path.read_bytes())
    data[data.find(content, header) + len(content) // 2] ^= 64
    path.write_bytes(data)
    refused(path, name, "checksum")


def test_a_pth_with_an_undecodable_member_name_is_damaged(tmp_path, weights):
    path = tmp_path / "w.pth"
    torch.save(tensors(weights), path)
    with zipfile.ZipFile(path) as archive:
        member = [member for member in archive.infolist() if "/data/" in member.filename][1]
    data = bytearray(path.read_bytes())
    # The flag for UTF-8 in the header before the content, and a name that is not.
    data[member.header_offset + 7] |= 8
    data[member.header_offset + 30] = 255
    path.write_bytes(data)
    refused(path, member.filename, "damaged", "its name is damaged")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_repacked_pth_is_read_and_checked(tmp_path, weights, compression):
    torch.save(tensors(weights), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "v.pth", "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert tensors_hash(read_checkpoint(tmp_path / "v.pth").weights) == tensors_hash(weights)


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_in_a_safetensors_file_of_segjax_is_detected(tmp_path, model, seed):
    path = tmp_path / "w.safetensors"
    save(model, path)
    assert "xxh3_128_tensors" not in read_checkpoint(path).metadata
    data = bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    data[np.random.default_rng(seed).integers(begin, len(data))] ^= 1
    path.write_bytes(data)
    refused(path, "damaged")


def test_the_hash_depends_on_names_shapes_types_and_bits(weights):
    array = weights[NORM]
    others = ({"a": array}, {"b": array}, {"a": array[None]}, {"a": array.view(np.int32)}, {"a": array + 1}, {})
    assert len({tensors_hash(other) for other in others}) == len(others)
    assert tensors_hash({"a": np.asfortranarray(np.ones((2, 3)))}) == tensors_hash({"a": np.ones((2, 3))})
    assert tensors_hash({"a": np.ones((), jnp.bfloat16)}) != tensors_hash({"a": np.zeros((), jnp.bfloat16)})


# --------------------------------------------------------------------------------------------- one name, two tensors


def test_two_tensors_with_the_same_name_are_refused_everywhere(tmp_path, weights):
    first, second = (f"backbone.block{number}.0.norm1.weight" for number in (1, 2))
    torch.save(collections.OrderedDict(tensors(weights)), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as old:
        content = {name: old.read(name) for name in old.namelist()}
    for name in ("pickle.pth", "zip.pth"):
        with zipfile.ZipFile(tmp_path / name, "w") as new:
            for member, data in content.items():
                is_pickle = name == "pickle.pth" and member.endswith("data.pkl")
                new.writestr(member, data.replace(second.encode(), first.encode()) if is_pickle else data)
            if name == "zip.pth":
                with pytest.warns(UserWarning, match="Duplicate"):
                    new.writestr("w/data/3", content["w/data/4"])
    refused(tmp_path / "pickle.pth", first)
    refused(tmp_path / "zip.pth", "w/data/3")
    wrapped = {f"module.{key}": value for key, value in weights.items()} | {NORM: weights[NORM]}
    torch.save(tensors(wrapped), tmp_path / "prefix.pth")
    refused(tmp_path / "prefix.pth", f"module.{NORM}")
    save_file(weights, tmp_path / "w.safetensors")
    header, data = parts(tmp_path / "w.safetensors")
    twice = json.dumps(header)[:-1] + f", {json.dumps(NORM)}: {json.dumps(header[NORM])}}}"
    refused(joined(tmp_path / "header.safetensors", twice, data), NORM)


def test_a_tensor_in_two_shards_of_a_folder_is_refused(tmp_path, weights):
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    keys = sorted(weights)
    for file, some in zip(files, (keys[:60], keys[59:]), strict=True):
        save_file({key: weights[key] for key in some}, tmp_path / file)
    index = {"weight_map": {key: files[key in keys[60:]] for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert keys[59] in refused(tmp_path)


# ----------------------------------------------------------------------------------- claims that the file does not hold


def parts(path):
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def joined(path, header, data):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (10**6, 10**6)])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, weights, is_zip, shape):
    stretched = {"state_dict": tensors(weights) | {NORM: torch.zeros(1).expand(shape)}}
    torch.save(stretched, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    refused(tmp_path / "w.pth", NORM, str(shape))


def test_a_truncated_storage_is_refused_with_the_name_of_its_tensor(tmp_path, weights):
    torch.save({NORM: tensors(weights)[NORM]}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "v.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:8] if name.endswith("data/0") else old.read(name))
    refused(tmp_path / "v.pth", NORM, "2 numbers")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shape": [10**6, 10**6]}, "(1000000, 1000000)"),
        ({"data_offsets": [0, 10**13], "shape": [10**13 // 4]}, "end of the file"),
        ({"shape": [-1]}, "shape.0"),
        ({"shape": 5}, "shape"),
        ({"dtype": 3}, "dtype"),
    ],
)
def test_a_header_that_claims_missing_data_is_refused(tmp_path, weights, change, word):
    save_file(weights, tmp_path / "w.safetensors")
    header, data = parts(tmp_path / "w.safetensors")
    header[NORM] |= change
    refused(joined(tmp_path / "w.safetensors", header, data), NORM, word)


def test_a_zip_larger_than_memory_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("w/data/0", bytes(1 << 24))
    refused(tmp_path / "w.pth", "unpack")


def test_pickles_are_never_executed_and_damaged_ones_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "old.pth").write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in (1, 2, {}, {"a": Evil()})))
    with zipfile.ZipFile(tmp_path / "new.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))
        archive.writestr("x/version", "3\n")
    for name in ("old.pth", "new.pth"):
        refused(tmp_path / name)
    assert not (tmp_path / "made").exists()


# --------------------------------------------------------------------------------------------- files that are none


def test_fifos_sockets_and_devices_are_refused_at_once(tmp_path, model):
    os.mkfifo(tmp_path / "fifo.pth")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        refused(tmp_path / "socket", "a socket")
    refused(tmp_path / "fifo.pth", "a FIFO")
    refused("/dev/zero", "a device")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        folder = tmp_path / f"hf {name}"
        folder.mkdir()
        save_file(to_torch(model), folder / "model.safetensors")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused(folder, name, "a FIFO")


def test_fifos_in_an_orbax_folder_are_refused_at_once(tmp_path, model):
    save(model, tmp_path / "whole")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(files) > 6
    for number, file in enumerate(files):
        shutil.copytree(tmp_path / "whole", folder := tmp_path / f"folder{number}")
        (folder / file).unlink()
        os.mkfifo(folder / file)
        refused(folder, file.name, "a FIFO")
        if file.name in ("metadata", "_METADATA", "_CHECKPOINT_METADATA"):
            (folder / file).unlink()
            (folder / file).write_text(DEEP)
            refused(folder, file.name, "nested")


def test_json_that_is_nested_too_deeply_is_refused_with_its_file_name(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    header, data = parts(tmp_path / "w.safetensors")
    refused(joined(tmp_path / "a.safetensors", '{"a": ' + DEEP, b""), "nested")
    refused(joined(tmp_path / "b.safetensors", header | {"__metadata__": {"segjax": DEEP}}, data), "nested")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        if "index" not in name:
            save_file(weights, folder / "model.safetensors")
        (folder / name).write_text(DEEP)
        refused(folder, name, "nested")


def test_an_orbax_folder_that_claims_terabytes_is_refused_before_reading(tmp_path):
    class Claimed:
        shape, dtype = (10**6, 10**6), np.dtype(np.float32)

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "d").write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match=r"a\.scale has the shape \(1000000, 1000000\)"):
        orbax_folder._refuse_too_large(tmp_path, "weights", {"a.scale": Claimed()})

"""Files of torch.save and pickle, read without PyTorch: the same bits as from torch.load, whatever else the file
contains, and no code is run."""

import argparse
import collections
import os
import pickle
import struct
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import segjax
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.pickled import Standin, StoredTensor, opened
from segjax.commands import convert
from tests.tiny import tiny_model

NORM = "backbone.norm2.weight"


@pytest.fixture(scope="module")
def weights():
    return {key: torch.from_numpy(np.array(value)) for key, value in segjax.to_torch(tiny_model(4)).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        array = np.asarray(value)
        assert (found[key].dtype, found[key].shape, found[key].tobytes()) == (array.dtype, array.shape, array.tobytes())


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


# ------------------------------------------------------------------------------------------------------ every tensor

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
)


def tensor_bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("seed", range(2))
def test_every_tensor_has_the_bits_that_torch_saved(tmp_path, is_zip, seed):
    generator = torch.Generator().manual_seed(seed)
    made = {str(dtype): (40 * torch.randn(3, 5, generator=generator)).abs().to(dtype) for dtype in DTYPES}
    whole = torch.randn(7, 4, 6, generator=generator)
    made |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": whole.transpose(0, 2),
        "part": whole[2:5, :, 1:4],
        "tied": whole,
        "channels last": torch.randn(2, 3, 5, 4, generator=generator).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(4, generator=generator)),
        "buffer": torch.nn.Buffer(torch.randn(4, generator=generator)),
    }
    # The older format has no place for some dtypes.
    made = {name: value for name, value in made.items() if is_zip or value.dtype not in (torch.uint16, torch.uint32)}
    made = {name: value for name, value in made.items() if is_zip or ("float8" not in name and "uint64" not in name)}
    path = tmp_path / "w.pth"
    torch.save(made, path, _use_new_zipfile_serialization=is_zip)
    loaded = torch.load(path, weights_only=True)
    with opened(path) as content:
        assert content.keys() == made.keys()
        for name, stored in content.items():
            assert isinstance(stored, StoredTensor), name
            array = stored.read()
            assert (array.shape, array.tobytes()) == (tuple(loaded[name].shape), tensor_bits(loaded[name])), name


def test_views_of_other_storages_in_files_before_torch_1_are_read(tmp_path):
    # Such a file refers to a part of a storage by the key of the whole; torch no longer writes it.
    class Reference:
        def __init__(self, *parts):
            self.parts = parts

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.parts if isinstance(obj, Reference) else None

    class Rebuilt:
        def __init__(self, begin, count):
            view = ("8", begin, count) if count < 12 else None
            self.storage = Reference("storage", torch.FloatStorage, "9", "cpu", 12, view)
            self.count = count

        def __reduce__(self):
            return torch._utils._rebuild_tensor, (self.storage, 0, (self.count,), (1,))

    numbers = np.arange(12, dtype="<f4")
    path = tmp_path / "old.pth"
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(part, file, protocol=2)
        Pickler(file, protocol=2).dump({"part": Rebuilt(3, 5), "whole": Rebuilt(0, 12)})
        pickle.dump(["9"], file, protocol=2)
        file.write(struct.pack("<q", 12) + numbers.tobytes())
    with opened(path) as content:
        np.testing.assert_array_equal(content["whole"].read(), numbers)
        np.testing.assert_array_equal(content["part"].read(), numbers[3:8])


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_scalars_of_numpy_are_read(tmp_path, protocol):
    made = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">i4"),
        "scalar": np.float64(0.51),
        "zero": np.zeros((), np.int64),
        "text": np.array(["x", "yz"]),
        "objects": np.array([{}, None], object),
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(made, protocol=protocol))
    torch.save(made, tmp_path / "w.pth", pickle_protocol=max(protocol, 2))
    for name in ("w.pkl", "w.pth"):
        with opened(tmp_path / name) as content:
            for key in ("a", "fortran", "big", "scalar", "zero"):
                np.testing.assert_array_equal(content[key], made[key], strict=True)
            assert isinstance(content["text"], Standin) and isinstance(content["objects"], Standin)


@pytest.mark.parametrize("protocol", range(6))
def test_weights_are_read_from_pickles_of_arrays_and_of_tensors(tmp_path, weights, protocol):
    arrays = {key: tensor.numpy() for key, tensor in weights.items()}
    # Two of these share a storage, and one begins within it.
    whole = torch.arange(12.0)
    more = {"net": weights, "parts": {"rest": whole[3:], "whole": whole, "short": whole.bfloat16().reshape(3, 4).T}}
    for content in (weights, arrays, more, (weights, 3), [arrays]):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        assert_same(read_checkpoint(tmp_path / "w.pkl").weights, weights)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(more, protocol=protocol))
    with opened(tmp_path / "w.pkl") as content:
        for key, tensor in more["parts"].items():
            np.testing.assert_array_equal(content["parts"][key].read().astype(np.float32), tensor.float().numpy())


def test_an_invalid_storage_in_a_pickle_is_refused(tmp_path, weights):
    class Evil:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps({"a": 1}),)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Evil(), 0, (3,), (1,), False, {})

    (tmp_path / "w.pkl").write_bytes(pickle.dumps(weights | {NORM: Tensor()}))
    with pytest.raises(CheckpointError, match=NORM):
        read_checkpoint(tmp_path / "w.pkl")


@pytest.mark.parametrize("opcode", [b"\x95", b"\x8e", b"\x8d", b"\x96"], ids=["frame", "bytes", "text", "bytearray"])
def test_a_false_size_in_a_damaged_pickle_allocates_no_memory(tmp_path, opcode):
    for size in (2**40, 2**62):
        (tmp_path / "w.pkl").write_bytes(b"\x80\x05" + opcode + struct.pack("<Q", size) + b"abc.")
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            read_checkpoint(tmp_path / "w.pkl")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()


def test_empty_tensors_of_sharded_training_are_named(tmp_path, weights):
    torch.save({"module": dict.fromkeys(weights, torch.zeros(0))}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="its tensors are empty, as DeepSpeed's ZeRO-3"):
        read_checkpoint(tmp_path / "w.pth")


def test_weights_that_numpy_cannot_represent_are_refused_by_name(tmp_path, weights):
    with pytest.warns(UserWarning, match="deprecated"):
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    for odd in (torch.zeros(4, 4).to_sparse(), quantized):
        torch.save(weights | {NORM: odd}, tmp_path / "w.pth")
        with pytest.raises(
            CheckpointError, match=f"{NORM}: a tensor of the kind torch._utils._rebuild_.* cannot be read"
        ):
            read_checkpoint(tmp_path / "w.pth")
        torch.save({"state_dict": weights, "odd": odd}, tmp_path / "w.pth")
        assert_same(read_checkpoint(tmp_path / "w.pth").weights, weights)


# ------------------------------------------------------------------------------------------------- next to the weights


class HistoryBuffer:
    def __init__(self):
        self.values = np.zeros(3)


class Config(dict):
    """As mmengine's: a dict of a class that is not there."""


BESIDE = {
    "numbers of numpy": {"best_mIoU": np.float64(0.5), "classes": np.arange(5), "random": np.random.RandomState(0)},
    "namespace and path": {"args": argparse.Namespace(lr=1e-3, out=Path("/x")), "path": Path("/home")},
    "mmengine": {"message_hub": {"log_scalars": {"loss": HistoryBuffer()}, "runtime_info": Config(iter=3)}},
    "random states": {"rng": torch.get_rng_state(), "python": (3, (1, 2), None), "numpy": np.random.get_state()},
    "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]}},
    "functions": {"hook": os.getcwd, "type": torch.float32, "device": torch.device("cpu"), "size": torch.Size([1])},
}


@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
@pytest.mark.parametrize("name", BESIDE)
def test_weights_are_read_regardless_of_other_entries(tmp_path, weights, name, protocol, monkeypatch):
    for outer in ("state_dict", "net", "weights", "params_raw"):
        torch.save({**BESIDE[name], outer: weights}, tmp_path / "w.pth", pickle_protocol=protocol)
        assert_same(read_checkpoint(tmp_path / "w.pth").weights, weights)
    # Next to the weights themselves, too.
    torch.save({**BESIDE[name], **weights}, tmp_path / "w.pth", pickle_protocol=protocol)
    found = read_checkpoint(tmp_path / "w.pth").weights
    assert_same({key: value for key, value in found.items() if key in weights}, weights)


@pytest.mark.parametrize("outer", ["net", "model_state", "weights", "module", "network", "params", "ema_off/x", "G"])
def test_the_only_mapping_of_names_to_tensors_is_read(tmp_path, weights, outer):
    for inner in (weights, {"deeper": weights}, prefixed("module.", weights)):
        torch.save({"epoch": 3, outer: inner, "lr_scheduler": {"last": torch.ones(1)}}, tmp_path / "w.pth")
        assert_same(read_checkpoint(tmp_path / "w.pth").weights, weights)


def test_a_module_that_was_saved_whole_is_read_as_its_state_dict(tmp_path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.norm = torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)
            self.register_buffer("grid", torch.ones(2), persistent=False)
            self.register_buffer("kept", torch.full((2,), 3.0))
            self.register_parameter("absent", None)

    module = types.ModuleType("somebodys_networks")
    Block.__module__, Block.__qualname__, module.Block = module.__name__, "Block", Block
    network = torch.nn.Sequential(collections.OrderedDict(first=Block(), act=torch.nn.GELU(), second=Block()))
    sys.modules[module.__name__] = module
    try:
        torch.save({"model": network, "epoch": 2}, tmp_path / "w.pth")
        torch.save(network, tmp_path / "whole.pth")
    finally:
        del sys.modules[module.__name__]
    for name in ("w.pth", "whole.pth"):
        assert_same(read_checkpoint(tmp_path / name).weights, network.state_dict())


def test_a_whole_module_that_contains_itself_is_refused(tmp_path):
    module = torch.nn.Linear(2, 3)
    object.__setattr__(module, "parent", [module])
    module._modules["again"] = module
    torch.save(module, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_checkpoint(tmp_path / "w.pth")


# ------------------------------------------------------------------------------------------------- hostile pickles


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path, *, how):
        self.path, self.how = str(path), how

    def __reduce_ex__(self, protocol):
        return (
            {
                "call": (os.mkdir, (self.path,)),
                "evaluate": (eval, (f"__import__('os').mkdir({self.path!r})",)),
                "state": (argparse.Namespace, (), {"__class__": 1}, None, None),
                "items": (collections.OrderedDict, (), None, None, iter([("__class__", (os.mkdir, self.path))])),
                "setter": (list, (), None, iter([os.mkdir]), None, os.mkdir),
            }[self.how]
            if self.how != "setter" or protocol > 1
            else (os.mkdir, (self.path,))
        )


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("how", ["call", "evaluate", "state", "items", "setter"])
def test_no_call_in_a_pickle_is_executed(tmp_path, weights, how, protocol):
    evil = Evil(tmp_path / "made", how=how)
    torch.save({"state_dict": weights, "evil": evil}, tmp_path / "w.pth", pickle_protocol=max(protocol, 2))
    assert_same(read_checkpoint(tmp_path / "w.pth").weights, weights)
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02" + pickle.dumps({"evil": evil}, protocol=protocol))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "w.pkl")
    assert not (tmp_path / "made").exists()


RAW = {
    # GLOBAL, REDUCE; INST; OBJ; NEWOBJ; STACK_GLOBAL; NEWOBJ_EX; BUILD on a class; EXT1; a getattr chain.
    "reduce": b"cos\nmkdir\n(V{0}\ntR.",
    "inst": b"(V{0}\nios\nmkdir\n.",
    "obj": b"(cos\nmkdir\nV{0}\no.",
    "newobj": b"cos\nmkdir\n(V{0}\nt\x81.",
    "stack": b"\x8c\x02os\x8c\x05mkdir\x93(V{0}\ntR.",
    "build": b"cos\nmkdir\n(dVpath\nV{0}\nsb.",
    "slots": b"ccollections\nOrderedDict\n(N(dVupdate\ncos\nmkdir\nstb.",
    "extension": b"\x82\x01.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nmkdir\nV__call__\ntR(V{0}\ntR.",
}


@pytest.mark.parametrize("name", RAW)
def test_no_call_in_a_handwritten_pickle_is_executed(tmp_path, name):
    before = dict.update, dict.__setitem__
    data = RAW[name].replace(b"{0}", str(tmp_path / "made").encode())
    (tmp_path / "w.pkl").write_bytes(b"\x80\x04" + data)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "w.pkl")
    assert not (tmp_path / "made").exists() and (dict.update, dict.__setitem__) == before


def test_a_pickle_that_expands_to_billions_of_entries_is_refused_at_once(tmp_path):
    nested = {"w": np.zeros(1)}
    for _ in range(40):
        nested = {"a": nested, "b": nested}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(nested))
    with pytest.raises(CheckpointError, match="more than 1,000,000 entries"):
        read_checkpoint(tmp_path / "w.pkl")


# ---------------------------------------------------------------------------------------------- without PyTorch


def test_conversion_of_a_pth_needs_no_torch(tmp_path, weights, monkeypatch, capsys):
    torch.save({"state_dict": prefixed("model.", weights) | {"criterion.weight": torch.ones(5)}}, tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert.main([str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")]) == 0
    assert_same(read_checkpoint(tmp_path / "w.safetensors").weights, weights)
    assert "not used from the checkpoint (1): criterion.weight" in capsys.readouterr().out

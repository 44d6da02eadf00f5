"""Pickles are read without PyTorch: errors state the fault in plain English, and unbounded growth is refused."""

import pickle
import pickletools
import re
import time

import numpy as np
import pytest

from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.files import read_checkpoint

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
# What Python says of values that its own reader did not expect.
PYTHONS_WORDS = re.compile(
    r"attribute|codec|literal|unpack|index|None|Errno|Error|object is|object has|not supported|must be"
)


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {f"layer{number}.weight": rng.normal(size=(3, 2 + number)).astype(np.float32) for number in range(4)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_in_a_pickle_of_any_protocol_are_read(tmp_path, protocol, seed):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"epoch": 3, "net": arrays(seed)}, protocol))
    read = read_checkpoint(tmp_path / "m.pkl").weights
    assert read.keys() == arrays(seed).keys()
    for name, expected in arrays(seed).items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_errors_of_a_broken_pickle_never_quote_pythons_message(tmp_path, protocol):
    data, path = pickle.dumps(arrays(0), protocol), tmp_path / "m.pkl"
    begins = [place for _, _, place in pickletools.genops(data)]
    reasons = set()
    for begin, end in zip(begins[3:], [*begins[4:], len(data)], strict=True):
        # Without one opcode, with one twice, and with a number or a call instead.
        for new in (b"", data[begin:end] * 2, b"K\1", b"R"):
            path.write_bytes(data[:begin] + new + data[end:])
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                message = str(error).removeprefix(f"{path}: ")
                if "damaged or cut short" in message:
                    reasons.add(re.search(r"\((.*)\)", message)[1])
    assert len(reasons) > 20
    assert not [reason for reason in reasons if PYTHONS_WORDS.search(reason)]


class Module:
    """What torch.nn.Module keeps, as far as it is read."""

    def __init__(self, parts, modules):
        self._parameters, self._modules = parts, modules


@pytest.mark.parametrize("protocol", [0, 2])
def test_nested_modules_are_named_by_their_path(tmp_path, protocol):
    inner = Module({"weight": np.ones((2, 3))}, {})
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(Module({"bias": np.ones(2)}, {"a": inner, "b": inner}), protocol))
    assert sorted(read_checkpoint(tmp_path / "m.pkl").weights) == ["a.weight", "b.weight", "bias"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_in_the_other_byte_order_are_read(tmp_path, protocol):
    swapped = {name: value.astype(value.dtype.newbyteorder()) for name, value in arrays(2).items()}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(swapped, protocol))
    np.savez(tmp_path / "m.npz", **swapped)
    for file in ("m.pkl", "m.npz"):
        for name, value in read_checkpoint(tmp_path / file).weights.items():
            assert value.dtype.isnative
            np.testing.assert_array_equal(value, arrays(2)[name])


def test_exponentially_nested_mappings_are_refused_quickly(tmp_path):
    entries: dict = {}
    for _ in range(60):
        entries = {"a": entries, "b": entries}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"state_dict": entries | arrays(0)}))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="more than 1,000,000 entries"):
        read_checkpoint(tmp_path / "m.pkl")
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("depth", [22, 60])
def test_exponentially_nested_modules_are_refused_quickly(tmp_path, depth):
    module = Module({"weight": np.ones((2, 3))}, {})
    for _ in range(depth):
        module = Module({}, {"a": module, "b": module})
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(module))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="more than 1,000,000 entries"):
        read_checkpoint(tmp_path / "m.pkl")
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("protocol", [0, 2])
def test_the_position_of_the_damage_is_named(tmp_path, protocol):
    path = tmp_path / "m.pkl"
    data = pickle.dumps(arrays(0), protocol)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"m.pkl: .*damaged or cut short \(its pickle is broken before"):
        read_checkpoint(path)
    # An opcode that calls what cannot be called.
    path.write_bytes(data[:-1] + b")R.")
    with pytest.raises(CheckpointError, match=rf"its pickle is broken before byte {len(data) + 1:,}\)"):
        read_checkpoint(path)

"""The code of docs/deploy.md, with a small model: by the real packages where they are installed."""

import importlib.util
import re

import numpy as np
import pytest
import torch

from segjax.exports.export import export_model
from segjax.inference import runtimes
from tests.docs import test_pages
from tests.tiny import tiny_model

PAGE = "docs/deploy.md"
SMALL = (64, 96)


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs the package {name}")


def block_with(word, language="python"):
    (found,) = [code for _, code in test_pages.blocks(PAGE, language) if word in code]
    return re.sub(r"\b512, 1024\b", ", ".join(map(str, SMALL)), found)


@pytest.mark.slow
@installed("litert_torch")
@pytest.mark.filterwarnings("default")
def test_litert_gives_the_logits_of_the_pt2_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_model(tiny_model(1), "b0.pt2", size=SMALL)
    exec(block_with("litert_torch"), {})
    images = np.random.default_rng(0).normal(size=(1, 3, *SMALL)).astype(np.float32)
    expected = torch.export.load("b0.pt2").module()(torch.from_numpy(images)).numpy()
    found = runtimes.open_tflite(tmp_path / "b0.tflite").run(images)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@installed("coremltools")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["segformer", "hrnet", "segnext"])
def test_core_ml_converts_the_pt2_file(family, tmp_path, monkeypatch):
    import coremltools

    monkeypatch.chdir(tmp_path)
    export_model(tiny_model(1, family), "b0.pt2", size=SMALL)
    exec(block_with("coremltools"), {})
    spec = coremltools.utils.load_spec("b0.mlpackage").description
    (images,), (logits,) = spec.input, spec.output
    stride = 8 if family == "segnext" else 4
    assert list(images.type.multiArrayType.shape) == [1, 3, *SMALL]
    assert list(logits.type.multiArrayType.shape) in ([], [1, 5, *(side // stride for side in SMALL)])


@pytest.mark.slow
def test_the_configuration_of_triton_matches_the_onnx_file(tmp_path):
    export_model(tiny_model(1), tmp_path / "b0.onnx", size=SMALL, dynamic=True, preprocessing=True, argmax=True)
    session = runtimes.import_onnxruntime().InferenceSession(tmp_path / "b0.onnx", providers=["CPUExecutionProvider"])
    lines = block_with("max_batch_size", "text").splitlines()
    for side, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        (value,), (line,) = values, [line for line in lines if line.startswith(side)]
        dims = [entry if isinstance(entry, int) else -1 for entry in value.shape]
        assert f'name: "{value.name}"' in line and f"dims: {dims}" in line
        assert value.type == "tensor(uint8)" and "TYPE_UINT8" in line
    request = block_with("tritonclient")
    assert '"images"' in request and '"labels"' in request and '"UINT8"' in request

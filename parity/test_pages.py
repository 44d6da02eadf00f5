"""The Python code of README and docs runs unchanged, except for smaller images, next to the files that it names.

tests/docs parses the blocks that are skipped here: those that need packages outside the extra `test`.
"""

import contextlib
import re

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import segjax
from segjax.checkpoints import metadata, orbax_folder
from segjax.data import specs
from segjax.exports.export import export_model
from tests.docs import test_pages
from tests.tiny import numpy_draws, tiny_model

# Packages that the extra `test` does not have. parity/test_deploy.py runs blocks of docs/deploy.md where they are.
OTHERS = ("albumentations", "coremltools", "litert_torch", "peft", "tritonclient")
CLASSES = specs.STREETS.num_classes
LARGE, SMALL = (512, 1024), (64, 96)
BLOCKS = {
    f"{page}:{line}": code
    for page in test_pages.WRITTEN
    for line, code in test_pages.blocks(page, "python")
    if not any(package in code for package in OTHERS)
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the pages have made before, of a tiny SegFormer."""
    folder = tmp_path_factory.mktemp("pages")
    model = tiny_model(0, num_classes=CLASSES)
    kept = {"dataset": metadata.dataset_metadata(specs.STREETS)}
    orbax_folder.save_model(folder / "runs" / "segformer-b0-streets", model, metadata=kept)
    state = {key: torch.from_numpy(np.array(value)) for key, value in segjax.to_torch(model).items()}
    torch.save(state, folder / "segformer.b0.pth")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*SMALL, 3), np.uint8)).save(folder / "street.png")
    return folder


def run(code, folder, monkeypatch):
    """The names that a block has defined, where images of `LARGE` have become `SMALL`."""
    monkeypatch.chdir(folder)
    for name in re.findall(r'"(b0\.\w+)"', code):
        export_model(folder / "runs" / "segformer-b0-streets", name, size=SMALL, preprocessing=True, argmax=True)
    for large, small in zip(LARGE, SMALL, strict=True):
        code = re.sub(rf"\b{large}\b", str(small), code)
    names = {}
    # Not where a model is only traced, as it is to load a checkpoint.
    with numpy_draws() if "create(" in code else contextlib.nullcontext():
        exec(code, names)
    return names


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_block_runs_and_prints_the_documented_output(block, files, monkeypatch):
    names = run(BLOCKS[block], files, monkeypatch)
    (height, width), found = SMALL, []
    if "logits" in names:
        found.append("logits")
        assert names["logits"].shape == (2, height // 4, width // 4, CLASSES)
        assert list(names["taps"]) == [f"feature{k}" for k in range(4)]
        assert all(isinstance(value, np.ndarray) for value in names["state_dict"].values())
    if "labels" in names:
        found.append("labels")
        labels = np.asarray(names["labels"])
        assert labels.shape[-2:] == SMALL and labels.dtype in (np.uint8, np.int32) and labels.max() < CLASSES
        assert "names" not in names or set(names["names"]) <= set(specs.STREETS.class_names)
    if "four_bands" in names:
        found.append("four_bands")
        assert names["four_bands"].in_channels == 4 and names["model"].spec.num_classes == 19
    if "gamma" in names:
        found.append("gamma")
        image, label = np.full((*SMALL, 3), 100, np.float32), np.ones(SMALL, np.uint8)
        changed, kept = jax.jit(names["gamma"])(jax.random.key(3), image, label)
        assert changed.shape == image.shape and np.ptp(changed) == 0 and changed[0, 0, 0] != 100
        np.testing.assert_array_equal(kept, label)
    if "get_config" in names:
        found.append("get_config")
        config = names["get_config"]("b2,folder")
        assert (config.model.name, config.data.name, config.optim.lr) == ("segformer_b2", "folder", 1e-4)
    assert found, "a block whose result nobody looks at"


def test_every_python_block_is_found():
    assert len(BLOCKS) >= 9 and {"README.md", "docs/export.md"} <= {name.partition(":")[0] for name in BLOCKS}

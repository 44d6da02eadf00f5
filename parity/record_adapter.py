"""Records an adapter that peft writes, and its outputs, for tests/checkpoints/test_adapters.py.

    pip install peft
    python -m parity.record_adapter

It writes tests/checkpoints/peft: adapter_config.json, and recorded.npz with the bytes of adapter_model.safetensors,
peft's logits and the versions.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from segjax.checkpoints.save import save
from segjax.checkpoints.state_dict import from_torch, to_torch
from tests.checkpoints.test_adapters import RECORDED, base_weights, recorded_images
from tests.tiny import tiny_model

BLOCKS = r"segformer\.stages\.[03]\.blocks\.0\.(attention\.[qkvo]_proj|mlp\.fc1)"
CONFIG = dict(
    r=2,
    lora_alpha=5,
    target_modules=rf"{BLOCKS}|segformer\.stages\.1\.patch_embeddings\.proj",
    modules_to_save=["decode_head.classifier", "decode_head.batch_norm"],
    rank_pattern={"v_proj": 3, "patch_embeddings.proj": 4},
    alpha_pattern={"attention.q_proj": 7},
    use_rslora=True,
    bias="lora_only",
    init_lora_weights="gaussian",
)


def main() -> None:
    shapes = {key: value.shape for key, value in to_torch(tiny_model(0), dialect="hf").items()}
    with tempfile.TemporaryDirectory() as folder:
        save(from_torch(base_weights(shapes)), Path(folder) / "base", dialect="hf")
        base = transformers.SegformerForSemanticSegmentation.from_pretrained(Path(folder) / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**CONFIG)).eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
        logits = model(torch.from_numpy(recorded_images().transpose(0, 3, 1, 2))).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        weights = np.fromfile(Path(folder) / "adapter_model.safetensors", np.uint8)
    # The base was in a temporary folder.
    config["base_model_name_or_path"] = "base"
    (RECORDED / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    found = {"logits": logits.transpose(0, 2, 3, 1), "adapter_model": weights, "versions": json.dumps(versions)}
    np.savez_compressed(RECORDED / "recorded.npz", **found)


if __name__ == "__main__":
    main()

"""Adapters between segjax and peft itself, on transformers' SegFormer in float64; `pip install peft` for these tests.

tests/checkpoints/test_adapters.py reads an adapter that peft wrote, without peft.
"""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from parity import compare
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.load import model_of
from segjax.checkpoints.save import save
from segjax.models import lora
from segjax.torch_reference import verify
from segjax.torch_reference.randomise import randomise
from tests.checkpoints.test_adapters import adapted, write
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft"),
    # Of transformers and peft about their own.
    pytest.mark.filterwarnings("default"),
]

LINEAR = r".*\.(attention\.[qkvo]_proj|mlp\.fc[12])"
# Keyword arguments of peft's LoraConfig.
CONFIGS = {
    "linear layers": dict(target_modules=LINEAR),
    "by ends of names": dict(target_modules=["q_proj", "v_proj"], modules_to_save=["decode_head"], lora_dropout=0.1),
    "ranks and factors": dict(
        target_modules=LINEAR, use_rslora=True, rank_pattern={"v_proj": 4, "fc1": 1}, alpha_pattern={"q_proj": 9}
    ),
    "all biases": dict(target_modules=["k_proj"], bias="all"),
    "biases of its layers": dict(target_modules=["o_proj", "proj"], bias="lora_only"),
    "convolutions": dict(
        target_modules=r".*(patch_embeddings\.proj|sequence_reduction\.sequence_reduction|linear_fuse|classifier)",
        init_lora_weights="gaussian",
    ),
    "orthogonal": dict(target_modules=LINEAR, init_lora_weights="orthogonal"),
}
REFUSED = {
    "DoRA": dict(use_dora=True),
    "lora_B.bias": dict(lora_bias=True),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = transformers.SegformerConfig(
        num_labels=5,
        hidden_sizes=[8, 16, 20, 32],
        depths=[2, 1, 1, 1],
        decoder_hidden_size=24,
        num_attention_heads=[1, 2, 5, 8],
    )
    randomise(transformers.SegformerForSemanticSegmentation(config), 3).double().save_pretrained(folder)
    return folder


def network_of(folder, dtype=torch.float64):
    return transformers.SegformerForSemanticSegmentation.from_pretrained(folder, dtype=dtype).eval()


def trained_by_peft(base, folder, seed, dtype=torch.float64, **settings):
    """Writes an adapter whose trained arrays are all changed -> the network with it."""
    import peft

    torch.manual_seed(seed)
    # rslora and patterns need another rank than alpha.
    network = peft.get_peft_model(network_of(base, dtype), peft.LoraConfig(r=2, lora_alpha=5, **settings))
    network = network.to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in network.named_buffers():
            if "modules_to_save" in name and buffer.is_floating_point():
                buffer += 0.1 * torch.rand_like(buffer)
    network.save_pretrained(folder)
    return network


def logits_of(network, x):
    with torch.no_grad():
        return np.asarray(verify.to_nhwc(network(verify.to_nchw(x)).logits))


def model_at(folder):
    return model_of(read_checkpoint(folder), dtype=jnp.float64, param_dtype=jnp.float64)[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_peft_is_merged_as_peft_computes_it(kind, base, tmp_path, float64, within):
    network = trained_by_peft(base, tmp_path / "lora", seed=len(kind), **CONFIGS[kind])
    x = compare.images(2, (64, 96), seed=1, dtype="float64")
    theirs = logits_of(network, x)
    error = verify.relative_error(np.asarray(verify.compiled(model_at(tmp_path / "lora"))(x)[0]), theirs)
    within("output", "float64", error, f"an adapter of peft: {kind}")
    assert verify.relative_error(logits_of(network_of(base), x), theirs) > 0.01


@pytest.mark.parametrize("word", REFUSED)
def test_adapters_that_cannot_be_merged_are_refused_by_name(word, base, tmp_path):
    # PiSSA and OLoRA begin only in float32.
    trained_by_peft(base, tmp_path / "lora", 0, torch.float32, target_modules=["q_proj"], **REFUSED[word])
    with pytest.raises(CheckpointError, match=rf"{word}.*merge_and_unload"):
        read_checkpoint(tmp_path / "lora")


FULL = ("decode_head.linear_pred", "decode_head.linear_fuse.bn", "backbone.norm1")


def test_peft_loads_our_adapters_and_computes_the_same(tmp_path, float64, within, recwarn):
    import peft
    from safetensors.numpy import load_file

    # With the eps of transformers' norms.
    model = tiny_model(3, dtype=jnp.float64, block_norm_eps=1e-5)
    layers = [name for name, may in lora.adaptable(model).items() if may and name not in FULL]
    adapters, arrays, _ = adapted(model, layers, rank=3, alpha=4.5, full=FULL)
    save(model, tmp_path / "base", dialect="hf")
    write(tmp_path / "lora", model, adapters, arrays, FULL, tmp_path / "base")
    recwarn.clear()
    network = peft.PeftModel.from_pretrained(network_of(tmp_path / "base"), tmp_path / "lora").eval()
    # It warns of missing and of unexpected keys.
    assert not [str(warning.message) for warning in recwarn if "keys" in str(warning.message)]
    x = compare.images(2, (64, 96), seed=1, dtype="float64")
    ours = np.asarray(verify.compiled(model_at(tmp_path / "lora"))(x)[0])
    within("output", "float64", verify.relative_error(logits_of(network, x), ours), "our adapters in peft")
    # And merged there.
    within(
        "output",
        "float64",
        verify.relative_error(logits_of(network.merge_and_unload(), x), ours),
        "our adapters, merged by peft",
    )
    assert verify.relative_error(np.asarray(verify.compiled(model)(x)[0]), ours) > 0.01
    # What peft then saves is what we wrote.
    again = peft.PeftModel.from_pretrained(network_of(tmp_path / "base"), tmp_path / "lora")
    again.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "again"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key, strict=True)

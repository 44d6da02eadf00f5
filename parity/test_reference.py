"""The PyTorch reference is the original: it equals figures of the original code, and the transformers package.

The JAX models are compared with `segjax.torch_reference`: a misreading there would pass on both sides. Everything is
float64, where agreement means equal mathematics: errors measured are 1e-15 (gradients 1e-14), while a wrong head count
or LayerNorm eps makes 1e-6 or more.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segjax.torch_reference.randomise import randomise
from segjax.torch_reference.segformer import VARIANTS, Block, DropPath, SegFormer

IGNORE = 255
# The narrow model of the goldens.
NARROW = {"num_classes": 7, "dims": (4, 8, 10, 16), "depths": (2, 1, 1, 1), "decoder_dim": 12}

# Counted in the original code, without the unused decode_head.conv_seg.
PARAMETERS = {
    19: {"b0": 3719027, "b1": 13682131, "b2": 27361235, "b3": 47237075, "b4": 64007635, "b5": 84607955},
    150: {"b0": 3752694, "b1": 13715798, "b2": 27461974, "b3": 47337814, "b4": 64108374, "b5": 84708694},
}
BACKBONE_PARAMETERS = {"b0": 3319392, "b1": 13151424, "b2": 24196288, "b3": 44072128, "b4": 60842688, "b5": 81443008}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value of `want`; `want` all zero makes it absolute.

    Shapes must be equal (nothing is broadcast) and both float64, so a silent cast cannot hide in the comparison.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype == torch.float64, f"dtypes {got.dtype} and {want.dtype}, expected float64"
    scale = want.abs().max().item()
    return (got - want).abs().max().item() / (scale if scale > 0.0 else 1.0)


def assert_close(what: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    error = relative_error(got, want)
    print(f"{what}: relative error {error:.1e}")
    assert error <= bound, f"{what}: relative error {error:.3e} exceeds {bound:.0e}"


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter_count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- figures of the original code ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """Every array of the golden; weights and images stay float32 until a model in float64 takes them."""
    with np.load(Path(__file__).parent / "goldens" / "segformer_nvlabs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "about"}


def golden_model(golden: dict[str, torch.Tensor], **overrides) -> SegFormer:
    model = SegFormer(**NARROW, **overrides)
    weights = {name.removeprefix("sd/"): value for name, value in golden.items() if name.startswith("sd/")}
    model.load_state_dict(weights, strict=True)
    return model.double().eval()


def segmentation_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of (B, K, h, w) logits resized to the label's (B, H, W), over pixels that are not ignored."""
    upsampled = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, label.long(), ignore_index=IGNORE)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_logits_features_and_loss_equal_the_original_code(golden, case):
    model = golden_model(golden)
    with torch.no_grad():
        logits, taps = model(golden[f"{case}/input_nchw"].double())
        loss = segmentation_loss(logits, golden[f"{case}/label"])
    assert list(taps) == ["feature0", "feature1", "feature2", "feature3"]
    for name, feature in taps.items():
        assert_close(f"{case} {name}", feature, golden[f"{case}/eval/{name}"], 1e-13)
    assert_close(f"{case} logits", logits, golden[f"{case}/eval/output0"], 1e-13)
    assert_close(f"{case} loss", loss, golden[f"{case}/eval/loss"], 1e-13)


def test_gradient_of_every_parameter_equals_the_original_code(golden):
    model = golden_model(golden)
    logits, _ = model(golden["case0/input_nchw"].double())
    segmentation_loss(logits, golden["case0/label"]).backward()
    prefix = "case0/eval/grad/"
    wanted = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
    assert wanted.keys() == dict(model.named_parameters()).keys()
    errors = {name: relative_error(parameter.grad, wanted[name]) for name, parameter in model.named_parameters()}
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: relative error {errors[worst]:.1e}")
    assert errors[worst] <= 1e-12, f"gradient of {worst}: relative error {errors[worst]:.3e} exceeds 1e-12"


def test_training_forward_equals_the_original_code(golden):
    model = golden_model(golden, drop_path_rate=0.0, dropout_rate=0.0).train()
    with torch.no_grad():
        logits, _ = model(golden["case0/input_nchw"].double())
    assert_close("training logits", logits, golden["case0/train/output0"], 1e-13)


def test_running_statistics_move_a_tenth_towards_unbiased_batch_statistics(golden):
    """By BatchNorm's definition, and against transformers below, not against the golden's `case0/train/buffer/*`.

    Those are bit for bit the statistics before the forward pass, so they say nothing about the ones after it.
    """
    model = golden_model(golden, drop_path_rate=0.0, dropout_rate=0.0).train()
    seen = []
    model.decode_head.linear_fuse.bn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(golden["case0/input_nchw"].double())
    values = seen[0].transpose(0, 1).flatten(1)  # (D, B * H * W)
    bn, before = model.decode_head.linear_fuse.bn, "sd/decode_head.linear_fuse.bn."
    mean = 0.9 * golden[before + "running_mean"].double() + 0.1 * values.mean(dim=1)
    var = 0.9 * golden[before + "running_var"].double() + 0.1 * values.var(dim=1, correction=1)
    assert_close("running mean", bn.running_mean, mean, 1e-13)
    assert_close("running variance", bn.running_var, var, 1e-13)
    assert bn.num_batches_tracked.item() == 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_heads": (1, 2, 5, 4)},
        {"num_heads": (1, 2, 5, 16)},
        {"num_heads": (1, 1, 5, 8)},
        {"num_heads": (2, 2, 5, 8)},
        {"block_norm_eps": 1e-5},
        {"patch_norm_eps": 1e-6},
    ],
    ids=str,
)
def test_settings_that_weights_do_not_determine_change_the_output(golden, overrides):
    """Heads and eps change no shape, so only values can catch a wrong one. 1e-8 is 1e5 times the bound above.

    Measured 9e-7 to 2e-5: the golden's attention is nearly uniform, so in float32 it could not tell the heads.
    """
    with torch.no_grad():
        logits, _ = golden_model(golden, **overrides)(golden["case0/input_nchw"].double())
    error = relative_error(logits, golden["case0/eval/output0"])
    print(f"{overrides}: relative error {error:.1e}")
    assert error > 1e-8


# --- the transformers package ----------------------------------------------------------------------------------------

# Published layer -> transformers 5 in memory, which counts stages from 0 where the published names count from 1.
STAGE_LAYERS = {
    "backbone.patch_embed{}.proj": "segformer.stages.{}.patch_embeddings.proj",
    "backbone.patch_embed{}.norm": "segformer.stages.{}.patch_embeddings.layer_norm",
    "backbone.norm{}": "segformer.stages.{}.layer_norm",
    "decode_head.linear_c{}.proj": "decode_head.linear_projections.{}.proj",
}
BLOCK_LAYERS = {
    "norm1": "layernorm_before",
    "attn.q": "attention.q_proj",
    "attn.proj": "attention.o_proj",
    "attn.sr": "attention.sequence_reduction.sequence_reduction",
    "attn.norm": "attention.sequence_reduction.layer_norm",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
    "mlp.fc2": "mlp.fc2",
}
HEAD_LAYERS = {
    "decode_head.linear_fuse.conv": "decode_head.linear_fuse",
    "decode_head.linear_fuse.bn": "decode_head.batch_norm",
    "decode_head.linear_pred": "decode_head.classifier",
}


def to_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published keys -> transformers 5 in memory; `kv` is split into keys and values. An unknown key is a KeyError."""
    layers = dict(HEAD_LAYERS)
    for i in range(4):
        layers |= {ours.format(i + 1): theirs.format(i) for ours, theirs in STAGE_LAYERS.items()}
    renamed = {}
    for key, value in weights.items():
        layer, leaf = key.rsplit(".", 1)  # leaf: weight, bias, running_mean, ...
        if not layer.startswith("backbone.block"):
            renamed[f"{layers[layer]}.{leaf}"] = value
            continue
        stage, block, name = layer.removeprefix("backbone.block").split(".", 2)
        prefix = f"segformer.stages.{int(stage) - 1}.blocks.{block}"
        if name == "attn.kv":
            renamed[f"{prefix}.attention.k_proj.{leaf}"], renamed[f"{prefix}.attention.v_proj.{leaf}"] = value.chunk(2)
        else:
            renamed[f"{prefix}.{BLOCK_LAYERS[name]}.{leaf}"] = value
    return renamed


def transformers_model(*, num_classes: int, dims, depths, decoder_dim: int, **settings):
    """transformers' own defaults decide everything else, including heads and ratios."""
    config = SegformerConfig(
        num_labels=num_classes,
        hidden_sizes=list(dims),
        depths=list(depths),
        decoder_hidden_size=decoder_dim,
        **settings,
    )
    # sdpa is exact in float64; the eager implementation computes its softmax in float32.
    config._attn_implementation = "sdpa"
    return SegformerForSemanticSegmentation(config).eval()


def assert_equals_transformers(sizes: dict, image: torch.Tensor) -> None:
    ours = randomise(SegFormer(**sizes, block_norm_eps=1e-5).double(), seed=1).eval()
    theirs = transformers_model(**sizes).double()
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    with torch.no_grad():
        logits, taps = ours(image)
        output = theirs(image, output_hidden_states=True)
    B, _, H, W = image.shape
    assert logits.shape == (B, sizes["num_classes"], -(-H // 4), -(-W // 4))
    assert_close("logits", logits, output.logits, 1e-12)
    for (name, feature), hidden in zip(taps.items(), output.hidden_states[-4:], strict=True):
        assert_close(name, feature, hidden, 1e-12)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (40, 136)], ids=str)
@pytest.mark.parametrize("sizes", [NARROW, {"num_classes": 19, **VARIANTS["b0"]}], ids=["narrow", "b0"])
def test_output_equals_transformers(sizes, size):
    assert_equals_transformers(sizes, images(2, 3, *size))


def test_output_equals_transformers_for_b1():
    assert_equals_transformers({"num_classes": 19, **VARIANTS["b1"]}, images(2, 3, 40, 136))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b2", "b3", "b4", "b5"])
def test_output_equals_transformers_at_full_width(variant):
    assert_equals_transformers({"num_classes": 19, **VARIANTS[variant]}, images(1, 3, 40, 136))


def test_training_forward_and_running_statistics_equal_transformers():
    ours = SegFormer(**NARROW, block_norm_eps=1e-5, drop_path_rate=0.0, dropout_rate=0.0)
    ours = randomise(ours.double(), seed=1).train()
    theirs = transformers_model(**NARROW, drop_path_rate=0.0, classifier_dropout_prob=0.0).double().train()
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    image = images(2, 3, 64, 96)
    with torch.no_grad():
        assert_close("training logits", ours(image)[0], theirs(image).logits, 1e-12)
    our_norm, their_norm = ours.decode_head.linear_fuse.bn, theirs.decode_head.batch_norm
    assert_close("running mean", our_norm.running_mean, their_norm.running_mean, 1e-12)
    assert_close("running variance", our_norm.running_var, their_norm.running_var, 1e-12)
    assert our_norm.num_batches_tracked == their_norm.num_batches_tracked == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_transformers(variant):
    sizes = {"num_classes": 150, **VARIANTS[variant]}
    with torch.device("meta"):
        ours = to_transformers(SegFormer(**sizes).state_dict())
        theirs = transformers_model(**sizes).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", PARAMETERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_the_published_one(variant, num_classes):
    with torch.device("meta"):
        model = SegFormer(num_classes=num_classes, **VARIANTS[variant])
    assert parameter_count(model) == PARAMETERS[num_classes][variant]
    assert parameter_count(model.backbone) == BACKBONE_PARAMETERS[variant]


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim 10 is not divisible by num_heads 4"):
        SegFormer(**NARROW, num_heads=(1, 2, 4, 8))


def test_drop_path_rates_rise_linearly_from_zero():
    model = SegFormer(**{**NARROW, "depths": (2, 1, 3, 1)}, drop_path_rate=0.3)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


# --- randomness ------------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path = DropPath(0.25).double()
    x = torch.ones(4096, 2, 3, dtype=torch.float64)
    dropped = drop_path(x)
    assert ((dropped == 0.0).all(dim=(1, 2)) | (dropped == 1.0 / 0.75).all(dim=(1, 2))).all()
    # Four standard errors: 4 * sqrt(0.25 * 0.75 / 4096) = 0.027.
    assert (dropped == 0.0).double().mean().item() == pytest.approx(0.25, abs=0.027)
    assert drop_path.eval()(x) is x


def test_a_block_that_drops_both_branches_is_the_identity_only_in_training():
    torch.manual_seed(0)
    block = Block(
        8, num_heads=2, mlp_ratio=4, sr_ratio=2, drop_path_rate=1.0 - 1e-9, block_norm_eps=1e-6, patch_norm_eps=1e-5
    )
    randomise(block.double(), seed=2)
    tokens = images(3, 24, 8)
    assert torch.equal(block.train()(tokens, 4, 6), tokens)
    assert relative_error(block.eval()(tokens, 4, 6), tokens) > 0.1


def test_the_branches_of_a_block_are_dropped_independently():
    """At rate 1/2 a sample has four equally likely outcomes; 64 samples miss one with probability 4e-8."""
    torch.manual_seed(0)
    block = Block(4, num_heads=1, mlp_ratio=4, sr_ratio=1, drop_path_rate=0.5, block_norm_eps=1e-6, patch_norm_eps=1e-5)
    randomise(block.double(), seed=3)
    tokens = images(1, 24, 4).expand(64, 24, 4)
    with torch.no_grad():
        fates = {tuple(sample.flatten().round(decimals=9).tolist()) for sample in block.train()(tokens, 4, 6)}
    assert len(fates) == 4


def test_dropout_before_the_classifier_drops_whole_channels():
    def classifier_input(dropout_rate: float) -> torch.Tensor:
        model = SegFormer(**NARROW, drop_path_rate=0.0, dropout_rate=dropout_rate)
        randomise(model.double(), seed=4).train()
        seen = []
        model.decode_head.linear_pred.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(images(8, 3, 32, 64))
        return seen[0]

    torch.manual_seed(0)
    kept, dropped = classifier_input(0.0), classifier_input(0.5)
    whole = (dropped == 0.0).all(dim=(2, 3))  # (B, C)
    assert 0.3 < whole.double().mean().item() < 0.7
    torch.testing.assert_close(dropped, torch.where(whole[:, :, None, None], 0.0, 2.0 * kept))


# --- what other parity tests rely on ---------------------------------------------------------------------------------


def test_every_parameter_and_statistic_changes_the_output():
    """Relative to the largest gradient of all; only the keys' biases have none, as softmax ignores a common shift."""
    model = randomise(SegFormer(**NARROW).double(), seed=5).eval()
    image = images(2, 3, 64, 96)
    logits, taps = model(image)
    assert all(0.1 < x.abs().max().item() < 100.0 for x in (logits, *taps.values()))
    (logits * images(*logits.shape, seed=6)).sum().backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
    assert min(sizes.values()) > 1e-4 * max(sizes.values()), min(sizes, key=sizes.get)
    for name in ("running_mean", "running_var"):
        changed = randomise(SegFormer(**NARROW).double(), seed=5).eval()
        with torch.no_grad():
            getattr(changed.decode_head.linear_fuse.bn, name).mul_(1.1)
            assert relative_error(changed(image)[0], logits.detach()) > 1e-4


@pytest.mark.parametrize("num_heads", [(2, 2, 5, 8), (1, 1, 5, 8), (1, 2, 1, 8), (1, 2, 5, 4)], ids=str)
def test_a_wrong_head_count_changes_outputs_far_more_than_rounding(num_heads):
    image = images(2, 3, 64, 96)
    with torch.no_grad():
        right, _ = randomise(SegFormer(**NARROW).double(), seed=5).eval()(image)
        wrong, _ = randomise(SegFormer(**NARROW, num_heads=num_heads).double(), seed=5).eval()(image)
    error = relative_error(wrong, right)
    print(f"{num_heads}: relative error {error:.1e}")
    assert error > 1e-3


def test_randomise_depends_only_on_its_seed_and_not_on_the_dtype():
    before = torch.random.get_rng_state()
    model = torch.nn.BatchNorm2d(6)
    single = {name: value.clone() for name, value in randomise(model, seed=7).state_dict().items()}
    double = randomise(model.double(), seed=7).state_dict()
    assert all(torch.equal(single[name].double(), double[name].double()) for name in single)
    assert not torch.equal(single["weight"], randomise(model.float(), seed=8).weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_float32_and_float64_agree_up_to_float32_rounding():
    model = randomise(SegFormer(**NARROW), seed=9).eval()
    image = images(2, 3, 33, 70).float()
    with torch.no_grad():
        single, _ = model(image)
        double, _ = model.double()(image.double())
    assert single.dtype == torch.float32
    assert relative_error(single.double(), double) < 1e-5


def test_exported_program_equals_the_module():
    model = randomise(SegFormer(**NARROW).double(), seed=10).eval()
    image = images(1, 3, 64, 96)
    with torch.no_grad():
        exported, _ = torch.export.export(model, (image,)).module()(image)
        assert_close("exported logits", exported, model(image)[0], 1e-13)


def test_new_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = SegFormer(num_classes=19, **VARIANTS["b0"])
    weights = model.state_dict()
    assert weights["backbone.block4.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    # sqrt(2 / fan-out): 3 * 3 * 256 for a full convolution, 3 * 3 for a depthwise one.
    assert weights["backbone.patch_embed4.proj.weight"].std().item() == pytest.approx((2 / 2304) ** 0.5, rel=0.02)
    assert weights["backbone.block4.0.mlp.dwconv.dwconv.weight"].std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert all(value.eq(0.0).all() for name, value in weights.items() if name.endswith(".bias"))
    norms = [m.weight for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.BatchNorm2d)]
    assert len(norms) == 31 and all(weight.eq(1.0).all() for weight in norms)

"""The PyTorch references of the other SegFormers are their originals: jo-jstrm's, mmsegmentation's, Zuppichini's.

As in `test_reference.py` everything is float64 unless a test says otherwise, where agreement means equal mathematics.
Figures of the original code exist for two states of jo-jstrm's and for Zuppichini's. mmsegmentation's is held by what
there is: figures of the encoder that it shares with the official model, published parameter counts, its head by an
explicit formula, and a second model built the way mmsegmentation's checkpoints are.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parity import golden
from parity.mmseg_style import MMSegStyleSegFormer
from segjax.torch_reference import segformer_mmseg, segformer_plain
from segjax.torch_reference.randomise import randomise
from segjax.torch_reference.segformer import DropPath, Projection
from segjax.torch_reference.segformer_mmseg import SegFormerMMSeg
from segjax.torch_reference.segformer_plain import SegFormerPlain
from segjax.torch_reference.segformer_zuppichini import BatchDropPath, SegFormerZuppichini, block

NARROW = {"num_classes": 7, "dims": (4, 8, 10, 16), "depths": (2, 1, 1, 1), "decoder_dim": 12}
# Zuppichini's heads are named because 10 channels do not divide among the article's 4.
HEADS = {"num_heads": (1, 2, 5, 8)}
# Name of the golden -> its model. The settings are those of golden.MODELS, shared with the JAX side.
GOLDENS = {
    "segformer_jo_jstrm": SegFormerPlain,
    "segformer_camlaedtke": SegFormerPlain,
    "segformer_zuppichini": SegFormerZuppichini,
}
# Every reference of this file, narrow: how it is made from overrides.
NARROW_MODELS = {
    "plain conv": lambda **settings: SegFormerPlain(**NARROW, fuse="conv", **settings),
    "plain conv_bn": lambda **settings: SegFormerPlain(**NARROW, fuse="conv_bn", **settings),
    "mmseg": lambda **settings: SegFormerMMSeg(**NARROW, **settings),
    "mmseg style": lambda **settings: MMSegStyleSegFormer(**NARROW, **settings),
    "zuppichini": lambda **settings: SegFormerZuppichini(**NARROW, **(HEADS | settings)),
}
NO_DROPOUT = {"drop_path_rate": 0.0, "dropout_rate": 0.0}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value of `want`; nothing is broadcast and both are float64."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype == torch.float64, f"dtypes {got.dtype} and {want.dtype}, expected float64"
    scale = want.abs().max().item()
    return (got - want).abs().max().item() / (scale if scale > 0.0 else 1.0)


def assert_close(what: str, got: torch.Tensor, want: torch.Tensor, bound: float = 1e-12) -> None:
    error = relative_error(got, want)
    print(f"{what}: relative error {error:.1e}")
    assert error <= bound, f"{what}: relative error {error:.3e} exceeds {bound:.0e}"


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def without_randomness(name: str) -> nn.Module:
    """A randomised narrow model in float64 whose training mode draws nothing."""
    settings = {} if name == "zuppichini" else NO_DROPOUT  # Zuppichini's has no dropout, and 0 is its default rate
    return randomise(NARROW_MODELS[name](**settings).double(), seed=5)


# --- figures of the original code ------------------------------------------------------------------------------------


def golden_weights(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in golden.weights(name).items()}


def golden_model(name: str, **overrides) -> nn.Module:
    """The reference with a golden's weights, in evaluation mode; the keys must be the original's, all of them."""
    _, settings = golden.MODELS[name]
    model = GOLDENS[name](num_classes=golden.NUM_CLASSES, **(settings | overrides))
    model.load_state_dict(golden_weights(name), strict=True)
    return model.double().eval()


def golden_error(model: nn.Module, name: str) -> float:
    """Relative error of the logits on the golden's first case."""
    case = golden.cases(name)[0]
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(case.images))
    error = relative_error(logits, torch.from_numpy(case.outputs[-1]))
    print(f"relative error {error:.1e}")
    return error


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of (B, K, h, w) logits brought to the labels' (B, H, W), over pixels that are not ignored."""
    upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, labels.long(), ignore_index=golden.IGNORE)


@pytest.mark.parametrize("number", [0, 1], ids=["case0", "case1"])
@pytest.mark.parametrize("name", GOLDENS)
def test_logits_features_and_loss_equal_the_original_code(name, number):
    case = golden.cases(name)[number]
    with torch.no_grad():
        logits, taps = golden_model(name)(torch.from_numpy(case.images))
        loss = segmentation_loss(logits, torch.from_numpy(case.labels))
    assert list(taps) == ["feature0", "feature1", "feature2", "feature3"]
    assert len(case.outputs) == 1
    for (tap, feature), want in zip(taps.items(), case.features, strict=True):
        assert_close(tap, feature, torch.from_numpy(want))
    assert_close("logits", logits, torch.from_numpy(case.outputs[0]))
    assert_close("loss", loss, torch.tensor(case.loss, dtype=torch.float64))


@pytest.mark.parametrize("name", GOLDENS)
def test_gradient_of_every_parameter_equals_the_original_code(name):
    case, model = golden.cases(name)[0], golden_model(name)
    logits, _ = model(torch.from_numpy(case.images))
    segmentation_loss(logits, torch.from_numpy(case.labels)).backward()
    parameters = dict(model.named_parameters())
    assert case.gradients.keys() == parameters.keys()
    errors = {key: relative_error(parameters[key].grad, torch.from_numpy(g)) for key, g in case.gradients.items()}
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: relative error {errors[worst]:.1e}")
    assert errors[worst] <= 1e-12, f"gradient of {worst}: relative error {errors[worst]:.3e} exceeds 1e-12"


@pytest.mark.parametrize("name", ["segformer_camlaedtke", "segformer_zuppichini"])
def test_training_forward_equals_the_original_code(name):
    """jo-jstrm's has no BatchNorm: without drop path its training mode is its evaluation mode, see below."""
    case = golden.cases(name)[0]
    with torch.no_grad():
        logits, _ = golden_model(name, drop_path_rate=0.0).train()(torch.from_numpy(case.images))
    assert_close("training logits", logits, torch.from_numpy(case.training_outputs[-1]))
    assert relative_error(logits, torch.from_numpy(case.outputs[-1])) > 1e-2


def test_the_plain_decoder_without_batchnorm_is_the_same_in_training():
    assert golden_error(golden_model("segformer_jo_jstrm", drop_path_rate=0.0).train(), "segformer_jo_jstrm") <= 1e-12


@pytest.mark.parametrize("case", golden.cases("segformer_nvlabs"), ids=["case0", "case1"])
def test_mmseg_encoder_with_official_eps_gives_the_official_features(case):
    model = SegFormerMMSeg(**NARROW, patch_norm_eps=1e-5)
    weights = golden_weights("segformer_nvlabs")
    encoder = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    model.backbone.load_state_dict(encoder, strict=True)
    model.double().eval()
    with torch.no_grad():
        _, taps = model(torch.from_numpy(case.images))
    for (tap, feature), want in zip(taps.items(), case.features, strict=True):
        assert_close(tap, feature, torch.from_numpy(want))


# --- settings that weights cannot tell -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_heads": (1, 2, 5, 4)},
        {"num_heads": (1, 2, 10, 8)},
        {"num_heads": (1, 1, 5, 8)},
        {"num_heads": (2, 2, 5, 8)},
        {"block_norm_eps": 1e-5},
        {"patch_norm_eps": 1e-6},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["segformer_jo_jstrm", "segformer_camlaedtke"])
def test_heads_and_eps_of_the_plain_model_change_its_output(name, overrides):
    assert golden_error(golden_model(name, **overrides), name) > 1e-8


@pytest.mark.parametrize("num_heads", [(1, 2, 5, 4), (1, 2, 10, 8), (1, 1, 5, 8), (2, 2, 5, 8)], ids=str)
def test_heads_of_zuppichinis_model_change_its_output(num_heads):
    model = golden_model("segformer_zuppichini", num_heads=num_heads)
    assert golden_error(model, "segformer_zuppichini") > 1e-8


@pytest.mark.parametrize(
    "place, found",
    [
        (r"overlap_patch_merge\.1", 4),
        (r"blocks\.\d\.0\.fn\.0", 5),
        (r"reducer\.1", 5),
        (r"blocks\.\d\.1\.fn\.0", 5),
        (r"stages\.\d\.norm", 4),
        (r"head\.fuse\.2", 1),
    ],
)
def test_the_eps_of_every_norm_of_zuppichinis_model_changes_its_output(place, found):
    """Each is 1e-5, BatchNorm's too: the figures above are met with it, and not with 1e-6 in any one place."""
    model = golden_model("segformer_zuppichini")
    norms = [module for name, module in model.named_modules() if re.search(f"{place}$", name)]
    assert len(norms) == found
    for norm in norms:
        assert norm.eps == 1e-5
        norm.eps = 1e-6
    assert golden_error(model, "segformer_zuppichini") > 1e-8


def test_zuppichinis_decoder_resizes_with_aligned_corners():
    model = golden_model("segformer_zuppichini")
    for stage in model.decoder.stages:
        stage[0].align_corners = False
    assert golden_error(model, "segformer_zuppichini") > 1e-3


@pytest.mark.parametrize(
    "overrides",
    [{"num_heads": (1, 2, 5, 4)}, {"num_heads": (1, 1, 5, 8)}, {"block_norm_eps": 1e-5}, {"patch_norm_eps": 1e-5}],
    ids=str,
)
def test_heads_and_eps_of_the_mmseg_model_change_its_output(overrides):
    image = images(2, 3, 64, 96)
    with torch.no_grad():
        right, _ = randomise(SegFormerMMSeg(**NARROW).double(), seed=5).eval()(image)
        wrong, _ = randomise(SegFormerMMSeg(**NARROW, **overrides).double(), seed=5).eval()(image)
    assert relative_error(wrong, right) > 1e-8


@pytest.mark.parametrize("model", [SegFormerMMSeg, MMSegStyleSegFormer])
def test_every_layernorm_of_the_mmseg_model_has_eps_1e_6(model):
    norms = [module.eps for module in model(**NARROW).modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-6] * (4 + 4 + 2 * 5 + 4)  # patches, stages, two a block, and one a reduction


def test_an_unknown_fuse_is_refused():
    with pytest.raises(ValueError, match='fuse must be "conv" or "conv_bn", got \'bn\''):
        SegFormerPlain(**NARROW, fuse="bn")


# --- decoders, by definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segformer_jo_jstrm", "segformer_camlaedtke"])
def test_the_plain_decoder_is_affine_in_the_features(name):
    """It has no ReLU: a mixture of features gives the same mixture of logits."""
    case, head = golden.cases(name)[0], golden_model(name).decode_head
    ones = [torch.from_numpy(feature) for feature in case.features]
    others = [images(*feature.shape, seed=i) for i, feature in enumerate(ones)]
    with torch.no_grad():
        mixed = head([3.0 * one - 2.0 * other for one, other in zip(ones, others, strict=True)])
        assert_close("logits", mixed, 3.0 * head(ones) - 2.0 * head(others))


def bilinear(n_out: int, n_in: int) -> torch.Tensor:
    """(n_out, n_in): bilinear resizing along one axis with align_corners False, in which pixels are areas."""
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        place = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        low = min(int(place), n_in - 1)
        high = min(low + 1, n_in - 1)
        matrix[i, low] += 1.0 - (place - low)
        matrix[i, high] += place - low
    return matrix


@pytest.mark.parametrize("size", [(64, 96), (65, 97)], ids=str)
def test_the_mmseg_head_equals_its_formula(size):
    model = randomise(SegFormerMMSeg(**NARROW).double(), seed=5).eval()
    w = {key.removeprefix("decode_head."): value for key, value in model.state_dict().items()}

    def normalised(x, name):
        mean, var, scale, shift = (
            w[f"{name}.bn.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0.0)

    with torch.no_grad():
        logits, taps = model(images(2, 3, *size))
    H, W = taps["feature0"].shape[2:]
    fused = 0.0
    for i in range(4):
        feature = taps[f"feature{i}"]
        level = normalised(
            torch.einsum("dc,bchw->bdhw", w[f"convs.{i}.conv.weight"][:, :, 0, 0], feature), f"convs.{i}"
        )
        rows, columns = bilinear(H, feature.shape[2]), bilinear(W, feature.shape[3])
        level = torch.einsum("yh,xw,bdhw->bdyx", rows, columns, level)
        own = w["fusion_conv.conv.weight"][:, 12 * i : 12 * (i + 1), 0, 0]  # (D, D): c1 first
        fused = fused + torch.einsum("ed,bdyx->beyx", own, level)
    formula = torch.einsum("ke,beyx->bkyx", w["conv_seg.weight"][:, :, 0, 0], normalised(fused, "fusion_conv"))
    assert_close("logits", logits, formula + w["conv_seg.bias"][:, None, None])


@pytest.mark.parametrize("name, norms", [("plain conv_bn", 1), ("mmseg", 5), ("mmseg style", 5), ("zuppichini", 1)])
def test_running_statistics_move_a_tenth_towards_unbiased_batch_statistics(name, norms):
    """By BatchNorm's definition: the goldens' own are those from before their training forward."""
    model = without_randomness(name).train()
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(found) == norms
    before = [(bn.running_mean.clone(), bn.running_var.clone()) for bn in found]
    seen = {}
    for bn in found:
        bn.register_forward_hook(lambda bn, args, out: seen.__setitem__(bn, (args[0], out)))
    with torch.no_grad():
        model(images(2, 3, 64, 96))
    for bn, (mean, var) in zip(found, before, strict=True):
        values, out = (x.transpose(0, 1).flatten(1) for x in seen[bn])  # (D, B * H * W)
        n = values.shape[1]
        batch_mean = values.sum(dim=1) / n
        squares = (values - batch_mean[:, None]).square().sum(dim=1)
        assert_close("running mean", bn.running_mean, 0.9 * mean + 0.1 * batch_mean)
        assert_close("running variance", bn.running_var, 0.9 * var + 0.1 * squares / (n - 1))
        normalised = (values - batch_mean[:, None]) / (squares / n + 1e-5).sqrt()[:, None]
        assert_close("output", out, normalised * bn.weight.detach()[:, None] + bn.bias.detach()[:, None])
        assert bn.num_batches_tracked.item() == 1


def test_zuppichinis_model_refuses_sizes_whose_maps_do_not_align():
    model = NARROW_MODELS["zuppichini"]()
    with pytest.raises(ValueError, match=r"\(16, 40\), .*\(16, 33\)\]: H and W must be multiples of 32"):
        model(torch.zeros(1, 3, 64, 129))
    assert model(torch.zeros(1, 3, 61, 96))[0].shape == (1, 7, 16, 24)  # stage 1's map is that of 64 x 96


# --- mmsegmentation's own structure ----------------------------------------------------------------------------------


def to_mmseg_style(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our keys -> those of an mmsegmentation 1.x checkpoint. An unknown key is a KeyError.

    Their attention stacks queries over our keys and values; their feed-forward network has 1x1 convolutions for Linear.
    """
    plain = {"norm1": "norm1", "norm2": "norm2", "attn.sr": "attn.sr", "attn.norm": "attn.norm"}
    plain |= {"attn.proj": "attn.attn.out_proj", "mlp.dwconv.dwconv": "ffn.layers.1"}
    moved = {}
    for key, value in weights.items():
        if key.startswith("decode_head."):
            moved[key] = value
            continue
        part, stage, rest = re.fullmatch(r"backbone\.(patch_embed|block|norm)(\d)\.(.+)", key).groups()
        prefix = f"backbone.layers.{int(stage) - 1}"
        if part == "patch_embed":
            moved[f"{prefix}.0.{rest.replace('proj', 'projection')}"] = value
        elif part == "norm":
            moved[f"{prefix}.2.{rest}"] = value
        else:
            number, inner = rest.split(".", 1)
            layer, leaf = inner.rsplit(".", 1)
            prefix = f"{prefix}.1.{number}"
            if layer == "attn.q":
                keys_and_values = weights[key.replace("attn.q", "attn.kv")]
                moved[f"{prefix}.attn.attn.in_proj_{leaf}"] = torch.cat([value, keys_and_values])
            elif layer in ("mlp.fc1", "mlp.fc2"):
                to = f"{prefix}.ffn.layers.{0 if layer == 'mlp.fc1' else 4}.{leaf}"
                moved[to] = value[:, :, None, None] if leaf == "weight" else value
            elif layer != "attn.kv":
                moved[f"{prefix}.{plain[layer]}.{leaf}"] = value
    return moved


def mmseg_pair(**sizes) -> tuple[nn.Module, nn.Module]:
    ours = randomise(SegFormerMMSeg(**sizes, **NO_DROPOUT).double(), seed=5)
    theirs = MMSegStyleSegFormer(**sizes, **NO_DROPOUT).double()
    theirs.load_state_dict(to_mmseg_style(ours.state_dict()), strict=True)
    return ours, theirs


def assert_same_forward(ours: nn.Module, theirs: nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        (logits, taps), (their_logits, their_taps) = ours(image), theirs(image)
    B, _, H, W = image.shape
    assert logits.shape[0] == B and logits.shape[2:] == (-(-H // 4), -(-W // 4))
    assert taps.keys() == their_taps.keys()
    for tap in taps:
        assert_close(tap, taps[tap], their_taps[tap])
    assert_close("logits", logits, their_logits)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (40, 136)], ids=str)
@pytest.mark.parametrize("sizes", [NARROW, {"num_classes": 19, **segformer_mmseg.VARIANTS["b0"]}], ids=["narrow", "b0"])
def test_mmseg_features_and_logits_equal_those_of_mmsegs_structure(sizes, size):
    ours, theirs = mmseg_pair(**sizes)
    assert_same_forward(ours.eval(), theirs.eval(), images(2, 3, *size))


def test_mmseg_training_outputs_and_gradients_equal_mmsegs_structure():
    ours, theirs = mmseg_pair(**NARROW)
    ours.train()
    theirs.train()
    image = images(2, 3, 64, 96)
    cotangent = images(2, 7, 16, 24, seed=1)
    (ours(image)[0] * cotangent).sum().backward()
    (theirs(image)[0] * cotangent).sum().backward()
    moved = to_mmseg_style({name: parameter.grad for name, parameter in ours.named_parameters()})
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert moved.keys() == gradients.keys()
    # Stage 4's norm feeds nothing but a convolution without bias and a BatchNorm, which takes any constant away: the
    # true gradient of its shift is zero, and what rounding leaves of it is measured against the largest of all.
    left = [x.pop("backbone.layers.3.2.bias").abs().max().item() for x in (moved, gradients)]
    assert max(left) <= 1e-12 * max(gradient.abs().max().item() for gradient in gradients.values())
    errors = {name: relative_error(moved[name], gradient) for name, gradient in gradients.items()}
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: relative error {errors[worst]:.1e}")
    assert errors[worst] <= 1e-12, worst
    statistics = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert_close(name, buffer.double(), statistics[name].double())


@pytest.mark.parametrize("variant", segformer_mmseg.VARIANTS)
def test_mmseg_names_and_shapes_equal_those_of_mmsegs_structure(variant):
    sizes = {"num_classes": 19, **segformer_mmseg.VARIANTS[variant]}
    with torch.device("meta"):
        ours = to_mmseg_style(SegFormerMMSeg(**sizes).state_dict())
        theirs = MMSegStyleSegFormer(**sizes).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_keys_of_mmsegs_structure_are_those_of_its_checkpoints():
    """The published arithmetic, written out: of stage 1, of stage 4 (which reduces nothing) and of the head."""
    inside = [f"norm{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")]
    inside += ["attn.attn.in_proj_weight", "attn.attn.in_proj_bias"]
    inside += ["attn.attn.out_proj.weight", "attn.attn.out_proj.bias"]
    inside += [f"ffn.layers.{i}.{leaf}" for i in (0, 1, 4) for leaf in ("weight", "bias")]
    reduction = [f"attn.{layer}.{leaf}" for layer in ("sr", "norm") for leaf in ("weight", "bias")]
    around = [f"{layer}.{leaf}" for layer in ("0.projection", "0.norm", "2") for leaf in ("weight", "bias")]
    stage1 = around + [f"1.{i}.{key}" for i in (0, 1) for key in inside + reduction]
    stage4 = around + [f"1.0.{key}" for key in inside]
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    modules = ["convs.0", "convs.1", "convs.2", "convs.3", "fusion_conv"]
    head = [f"{module}.conv.weight" for module in modules] + [
        f"{module}.bn.{leaf}" for module in modules for leaf in bn
    ]
    head += ["conv_seg.weight", "conv_seg.bias"]
    keys = MMSegStyleSegFormer(**NARROW).state_dict()

    def under(prefix):
        return sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))

    assert under("backbone.layers.0.") == sorted(stage1)
    assert under("backbone.layers.3.") == sorted(stage4)
    assert under("decode_head.") == sorted(head)
    assert {re.match(r"backbone\.layers\.\d\.|decode_head\.", key)[0] for key in keys} == {
        *(f"backbone.layers.{i}." for i in range(4)),
        "decode_head.",
    }


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, fuse, count",
    [
        ("b0", "conv", 3718771),
        ("b0", "conv_bn", 3719283),
        ("b5", "conv", 84607187),
        ("b5", "conv_bn", 84608723),
    ],
)
def test_parameter_count_of_the_plain_model_is_the_measured_one(variant, fuse, count):
    with torch.device("meta"):
        model = SegFormerPlain(num_classes=19, **segformer_plain.VARIANTS[variant], fuse=fuse)
    assert parameter_count(model) == count


def test_counts_of_the_plain_b5_equal_the_published_table():
    """The README's table. Its tool counts the wrappers of convolutions and Linears a second time, and no LayerNorm.

    Its operations are weights x output H x W for a convolution and output elements x tokens for a Linear, in 1024^3.
    """
    with torch.device("meta"):
        model = SegFormerPlain(num_classes=19, **segformer_plain.VARIANTS["b5"], fuse="conv").eval()
        image = torch.empty(1, 3, 512, 1024)
    modules = list(model.modules())

    def count(*names):
        return sum(type(module).__name__ in names for module in modules)

    assert (count("Conv2d"), count("LayerNorm"), count("Linear")) == (107, 161, 264)
    assert (count("Block"), count("EfficientSelfAttention"), count("MixFFN"), count("DepthwiseConv")) == (52,) * 4
    assert (count("OverlapPatchEmbed"), count("Projection"), count("Dropout2d")) == (4, 4, 1)
    twice = [module for module in modules if isinstance(module, Projection) or type(module).__name__ == "DepthwiseConv"]
    norms = [module for module in modules if isinstance(module, nn.LayerNorm)]
    total = parameter_count(model) + sum(map(parameter_count, twice)) - sum(map(parameter_count, norms))
    assert total == 85915731

    operations = []

    def measure(module, args, out):
        if isinstance(module, nn.Conv2d):
            operations.append(module.weight.numel() * out.shape[2] * out.shape[3])
        else:
            operations.append(out.numel() * args[0].shape[1])

    for module in modules:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(measure)
    logits, _ = model(image)
    assert logits.shape == (1, 19, 128, 256)
    assert sum(operations) / 1024**3 == pytest.approx(2944.247, abs=5e-4)


@pytest.mark.parametrize(
    "variant, count",
    [("b0", 3720051), ("b1", 13683155), ("b2", 24728019), ("b3", 44603859), ("b4", 61374419), ("b5", 81974739)],
)
def test_parameter_count_of_the_mmseg_model_is_the_measured_one(variant, count):
    with torch.device("meta"):
        model = SegFormerMMSeg(num_classes=19, **segformer_mmseg.VARIANTS[variant])
        style = MMSegStyleSegFormer(num_classes=19, **segformer_mmseg.VARIANTS[variant])
    assert parameter_count(model) == parameter_count(style) == count


@pytest.mark.parametrize(
    "settings, count",
    [
        ({"num_classes": 100}, 17808356),
        (dict(num_classes=19, dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), **HEADS, decoder_dim=256), 3270515),
        (dict(num_classes=19, dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), **HEADS, decoder_dim=768), 70373011),
    ],
    ids=["article", "b0", "b5"],
)
def test_parameter_count_of_zuppichinis_model_is_the_measured_one(settings, count):
    with torch.device("meta"):
        model = SegFormerZuppichini(**settings)
    assert parameter_count(model) == count


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim 10 is not divisible by num_heads 4"):
        SegFormerZuppichini(**NARROW)


# --- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain conv", "mmseg", "mmseg style", "zuppichini"])
def test_drop_path_rates_rise_linearly_from_zero(name):
    settings = {"drop_path_rate": 0.3}
    modules = list(NARROW_MODELS[name](**settings).modules())
    rates = [m.rate for m in modules if isinstance(m, DropPath | BatchDropPath)]
    rates = rates or [m.drop_path_rate for m in modules if hasattr(m, "drop_path_rate")]
    assert rates == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_drop_path_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(ValueError, match=rf"drop path rate must be in \[0, 1\), got {rate}"):
        BatchDropPath(rate)


def test_zuppichinis_drop_path_drops_the_whole_batch_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path, x = BatchDropPath(0.25).double(), torch.ones(4, 2, 3, 3, dtype=torch.float64)
    results = torch.stack([drop_path(x) for _ in range(2000)])
    dropped = (results == 0.0).flatten(1).all(dim=1)
    assert (dropped | (results == 1.0 / 0.75).flatten(1).all(dim=1)).all()
    # Four standard errors: 4 * sqrt(0.25 * 0.75 / 2000) = 0.039.
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.039)
    assert drop_path.eval()(x) is x


def test_zuppichinis_drop_path_does_not_drop_the_attention():
    torch.manual_seed(0)
    one = block(8, num_heads=2, mlp_ratio=4, sr_ratio=2, drop_path_rate=1.0 - 1e-9)
    randomise(one.double(), seed=2)
    x = images(3, 8, 4, 6)
    with torch.no_grad():
        assert torch.equal(one.train()(x), one[0](x))
        assert relative_error(one[0](x), x) > 0.1
        assert relative_error(one.eval()(x), one[0](x)) > 0.1


def fates(name: str, tap: str) -> list[int]:
    """How often each different feature occurs in a batch of one image 16 times over, in training; three batches."""
    model = randomise(NARROW_MODELS[name](drop_path_rate=0.9).double(), seed=5).train()
    torch.manual_seed(0)
    image = images(1, 3, 32, 64).expand(16, 3, 32, 64)
    counts = []
    with torch.no_grad():
        for _ in range(3):
            samples = model(image)[1][tap].flatten(1).round(decimals=9)
            counts.append(len(samples.unique(dim=0)))
    return counts


def test_only_zuppichinis_model_drops_all_samples_of_a_batch_together():
    assert fates("zuppichini", "feature3") == [1, 1, 1]
    for name in ("plain conv", "mmseg", "mmseg style"):
        assert min(fates(name, "feature3")) > 1, name


@pytest.mark.parametrize(
    "name, classifier", [("plain conv", "linear_pred"), ("mmseg", "conv_seg"), ("mmseg style", "conv_seg")]
)
def test_dropout_before_the_classifier_drops_whole_channels(name, classifier):
    def classifier_input(rate: float) -> torch.Tensor:
        model = NARROW_MODELS[name](drop_path_rate=0.0, dropout_rate=rate)
        randomise(model.double(), seed=4).train()
        seen = []
        getattr(model.decode_head, classifier).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(images(8, 3, 32, 64))
        return seen[0]

    torch.manual_seed(0)
    kept, dropped = classifier_input(0.0), classifier_input(0.5)
    whole = (dropped == 0.0).all(dim=(2, 3))  # (B, C)
    assert 0.3 < whole.double().mean().item() < 0.7
    torch.testing.assert_close(dropped, torch.where(whole[:, :, None, None], 0.0, 2.0 * kept))


def test_zuppichinis_heads_default_to_those_of_the_article():
    with torch.device("meta"):
        model = SegFormerZuppichini(num_classes=100)
    heads = [module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    assert heads == [1] * 3 + [2] * 4 + [4] * 6 + [8] * 3


def test_the_plain_model_is_by_default_the_one_without_batchnorm():
    with torch.device("meta"):
        keys = SegFormerPlain(**NARROW).state_dict().keys()
    assert keys == golden.weights("segformer_jo_jstrm").keys()


def test_default_rates_are_those_of_the_originals():
    def dropout(model):
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout2d)]

    assert dropout(SegFormerPlain(**NARROW)) == [0.0]
    assert dropout(SegFormerMMSeg(**NARROW)) == dropout(MMSegStyleSegFormer(**NARROW)) == [0.1]
    assert dropout(NARROW_MODELS["zuppichini"]()) == []
    assert {m.rate for m in NARROW_MODELS["zuppichini"]().modules() if isinstance(m, BatchDropPath)} == {0.0}


# --- what other parity tests rely on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NARROW_MODELS)
def test_every_parameter_and_statistic_changes_the_output(name):
    """Relative to the largest gradient of all; a packed in_proj is judged by its three parts.

    Only the keys' biases have no gradient, as softmax ignores a common shift.
    """
    model = without_randomness(name).eval()
    image = images(2, 3, 64, 96)
    logits, taps = model(image)
    assert all(0.1 < x.abs().max().item() < 100.0 for x in (logits, *taps.values()))
    (logits * images(*logits.shape, seed=6)).sum().backward()
    sizes = {}
    for key, parameter in model.named_parameters():
        parts = parameter.grad.chunk(3) if "in_proj" in key else [parameter.grad]
        for i, part in enumerate(parts):
            if not (key.endswith("in_proj_bias") and i == 1):
                sizes[key, i] = part.abs().max().item()
    smallest = min(sizes, key=sizes.get)
    assert sizes[smallest] > 1e-4 * max(sizes.values()), smallest
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            before = buffer.clone()
            with torch.no_grad():
                buffer.mul_(1.1)
                assert relative_error(model(image)[0], logits.detach()) > 1e-4, key
                buffer.copy_(before)


@pytest.mark.parametrize("name", NARROW_MODELS)
def test_float32_and_float64_agree_up_to_float32_rounding(name):
    model = randomise(NARROW_MODELS[name](), seed=9).eval()
    image = images(2, 3, 64, 96).float()
    with torch.no_grad():
        single, _ = model(image)
        double, _ = model.double()(image.double())
    assert single.dtype == torch.float32
    assert relative_error(single.double(), double) < 1e-5


@pytest.mark.parametrize("name", NARROW_MODELS)
def test_exported_program_equals_the_module(name):
    model = randomise(NARROW_MODELS[name]().double(), seed=10).eval()
    image = images(1, 3, 64, 96)
    with torch.no_grad():
        exported, _ = torch.export.export(model, (image,)).module()(image)
        assert_close("exported logits", exported, model(image)[0])


def test_new_weights_have_the_spread_of_their_initialisation():
    torch.manual_seed(0)
    plain = SegFormerPlain(num_classes=19, **segformer_plain.VARIANTS["b0"]).state_dict()
    mmseg = SegFormerMMSeg(num_classes=19, **segformer_mmseg.VARIANTS["b0"]).state_dict()
    # sqrt(2 / fan-out) of a 1x1 convolution to 256 channels.
    assert plain["decode_head.linear_fuse.weight"].std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert mmseg["decode_head.fusion_conv.conv.weight"].std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    for weights in (plain, mmseg):
        assert weights["backbone.block4.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
        assert all(value.eq(0.0).all() for key, value in weights.items() if key.endswith(".bias"))

    own = SegFormerZuppichini(num_classes=19).state_dict()
    attention = "encoder.stages.3.blocks.0.0.fn.1.att."
    # Uniform within +-bound has the spread bound / sqrt(3): Xavier over the packed (3C, C), and 1 / sqrt(fan-in).
    assert own[attention + "in_proj_weight"].std().item() == pytest.approx((6 / 2048 / 3) ** 0.5, rel=0.02)
    assert own[attention + "in_proj_bias"].eq(0.0).all() and own[attention + "out_proj.bias"].eq(0.0).all()
    assert own["head.fuse.0.weight"].std().item() == pytest.approx((1 / 1024 / 3) ** 0.5, rel=0.02)
    assert own["encoder.stages.3.blocks.0.1.fn.1.0.bias"].abs().max().item() > 0.0

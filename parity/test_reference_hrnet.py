"""The PyTorch references of HRNet and HRNet-OCR are the originals: they equal figures of the original code.

The JAX models are compared with `segjax.torch_reference`: a misreading there would pass on both sides. Everything is
float64, where agreement means equal mathematics: errors measured are at most 1e-15 (gradients 2e-14), while each of the
misreadings below makes 0.1 or more.

What the goldens cannot tell is checked otherwise. In evaluation mode ReLU leaves the OCR golden's queries or keys all
zero, so that only its forward in training mode says how pixels look at regions; a second check is torch's own
attention. Nor does any file hold running statistics from after a forward: BatchNorm's definition does.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parity import golden
from segjax.torch_reference import hrnet
from segjax.torch_reference.hrnet import VARIANTS, HighResolutionNet, HRNet, HRNetOCR, ObjectAttention, gather_regions
from segjax.torch_reference.randomise import randomise

REFERENCES = {"hrnet_official": HRNet, "hrnet_seed": HRNet, "hrnet_ocr_official": HRNetOCR}
OFFICIAL = ["hrnet_official", "hrnet_ocr_official"]
CASES = [(name, case) for name in OFFICIAL for case in (0, 1)]
BOUND = 1e-12

# A narrow model whose every parameter shows: the goldens' width of 2 leaves whole channels dead behind ReLU.
NARROW = {
    "num_classes": 7,
    "width": 6,
    "stage1_channels": 8,
    "stage_modules": (1, 1, 2, 1),
    "stage_blocks": (2, 1, 1, 2),
}
OCR = {"ocr_channels": 24, "ocr_key_channels": 12}
FORMS = {"hrnet": (HRNet, NARROW), "ocr": (HRNetOCR, NARROW | OCR)}

# Counted in the original code, 19 classes.
PARAMETERS = {HRNet: {"w18": 9641119, "w48": 65859379}, HRNetOCR: {"w18": 12080818, "w48": 70372678}}
BACKBONE_PARAMETERS = {"w18": 9562260, "w32": 29305536, "w48": 65325120}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value of `want`; `want` all zero makes it absolute.

    Shapes must be equal (nothing is broadcast) and both float64, so a silent cast cannot hide in the comparison.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype == torch.float64, f"dtypes {got.dtype} and {want.dtype}, expected float64"
    scale = want.abs().max().item()
    return (got - want).abs().max().item() / (scale if scale > 0.0 else 1.0)


def assert_close(what: str, got: torch.Tensor, want, bound: float) -> None:
    error = relative_error(got, torch.as_tensor(want))
    print(f"{what}: relative error {error:.1e}")
    assert error <= bound, f"{what}: relative error {error:.3e} exceeds {bound:.0e}"


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- figures of the original code ------------------------------------------------------------------------------------


def golden_model(name: str, **overrides) -> nn.Module:
    """The golden's model with its weights, float64, in evaluation mode; OCR without dropout."""
    _, settings = golden.MODELS[name]
    if REFERENCES[name] is HRNetOCR:
        settings = settings | {"dropout_rate": 0.0}
    model = REFERENCES[name](num_classes=golden.NUM_CLASSES, **settings | overrides)
    weights = {key: torch.from_numpy(np.array(value)) for key, value in golden.weights(name).items()}
    model.load_state_dict(weights, strict=True)
    return model.double().eval()


def outputs(model: nn.Module, case: golden.Case) -> tuple[torch.Tensor, ...]:
    """What the original returns: the logits, after the auxiliary ones where there are any."""
    logits, taps = model(torch.from_numpy(case.images))
    return (taps["aux_logits"], logits) if "aux_logits" in taps else (logits,)


def segmentation_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """Mean cross-entropy of (B, K, h, w) logits brought to the labels' (B, H, W), over pixels that are not ignored."""
    upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, torch.from_numpy(labels).long(), ignore_index=golden.IGNORE)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_outputs_features_and_loss_equal_the_original_code(name, case):
    model, case = golden_model(name), golden.cases(name)[case]
    with torch.no_grad():
        found = outputs(model, case)
        _, taps = model(torch.from_numpy(case.images))
    assert list(taps) == ["feature0", "feature1", "feature2", "feature3", "aux_logits"][: 3 + len(found)]
    for i, (got, want) in enumerate(zip(found, case.outputs, strict=True)):
        assert_close(f"output{i}", got, want, BOUND)
    assert len(case.features) == 4
    for i, want in enumerate(case.features):
        assert_close(f"feature{i}", taps[f"feature{i}"], want, BOUND)
    loss = segmentation_loss(found[-1], case.labels)
    assert_close("loss", loss, torch.tensor(case.loss, dtype=torch.float64), BOUND)


@pytest.mark.parametrize("name", OFFICIAL)
def test_gradient_of_every_parameter_equals_the_original_code(name):
    model, case = golden_model(name), golden.cases(name)[0]
    segmentation_loss(outputs(model, case)[-1], case.labels).backward()
    assert case.gradients.keys() == dict(model.named_parameters()).keys()
    errors = {
        key: relative_error(parameter.grad, torch.from_numpy(case.gradients[key]))
        for key, parameter in model.named_parameters()
    }
    # What is zero up to rounding has no relative error: `aux_head.3.bias` moves all of a class's pixels alike, which
    # their softmax ignores.
    for key in list(errors):
        if np.abs(case.gradients[key]).max() < 1e-15:
            errors[key] = model.get_parameter(key).grad.abs().max().item()
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: error {errors[worst]:.1e}")
    assert errors[worst] <= BOUND, f"gradient of {worst}: error {errors[worst]:.3e} exceeds {BOUND:.0e}"


@pytest.mark.parametrize("name", OFFICIAL)
def test_training_forward_equals_the_original_code(name):
    model, case = golden_model(name).train(), golden.cases(name)[0]
    with torch.no_grad():
        found = outputs(model, case)
    for i, (got, want) in enumerate(zip(found, case.training_outputs, strict=True)):
        assert_close(f"training output{i}", got, want, BOUND)


def test_resized_logits_equal_those_of_jo_jstrms_repository():
    model, (case,) = golden_model("hrnet_seed"), golden.cases("hrnet_seed")
    with torch.no_grad():
        logits, taps = model(torch.from_numpy(case.images))
    upsampled = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
    (want,) = case.outputs
    assert_close("logits at the crop's size", upsampled, want, BOUND)
    for i, feature in enumerate(case.features):
        assert_close(f"feature{i}", taps[f"feature{i}"], feature, BOUND)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("hrnet_official", "bn1"),
        ("hrnet_official", "stage4.0.branches.3.1.bn2"),
        ("hrnet_official", "last_layer.1"),
        ("hrnet_ocr_official", "aux_head.1"),
        # Over B * K = 14 regions: unbiased and biased variance differ by 8 %.
        ("hrnet_ocr_official", "ocr_distri_head.object_context_block.f_object.1.0"),
        ("hrnet_ocr_official", "ocr_distri_head.conv_bn_dropout.1.0"),
    ],
)
def test_running_statistics_move_a_tenth_towards_unbiased_batch_statistics(name, layer):
    model, case = golden_model(name).train(), golden.cases(name)[0]
    norm = model.get_submodule(layer)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        outputs(model, case)
    (values,) = seen
    values = values.transpose(0, 1).flatten(1)  # (C, B * H * W)
    assert_close("running mean", norm.running_mean, 0.9 * mean + 0.1 * values.mean(dim=1), BOUND)
    assert_close("running variance", norm.running_var, 0.9 * var + 0.1 * values.var(dim=1, correction=1), BOUND)
    assert norm.num_batches_tracked.item() == golden.weights(name)[f"{layer}.num_batches_tracked"] + 1


# --- misreadings -----------------------------------------------------------------------------------------------------


def largest_error(name: str, model: nn.Module) -> float:
    """Of all outputs that the golden holds: two sizes in evaluation mode, one in training mode."""
    first, second = golden.cases(name)
    runs = [(False, first, first.outputs), (False, second, second.outputs), (True, first, first.training_outputs)]
    errors = []
    with torch.no_grad():
        for training, case, wanted in runs:
            for got, want in zip(outputs(model.train(training), case), wanted, strict=True):
                errors.append(relative_error(got, torch.from_numpy(want)))
    return max(errors)


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def fuse_layers(model: HighResolutionNet):
    """Each (target, source, layer) of each module."""
    for module in [*model.stage2, *model.stage3, *model.stage4]:
        for i, layers in enumerate(module.fuse_layers):
            for j, layer in enumerate(layers):
                yield i, j, layer


# A misreading changes the module, or a function of the file through `patch`; none shows in the weights' shapes.
def the_other_align_corners(model, patch):
    right = hrnet.resize
    patch.setattr(hrnet, "resize", lambda image, size, align_corners: right(image, size, not align_corners))


def nearest_resizing(model, patch):
    patch.setattr(hrnet, "resize", lambda image, size, align_corners: F.interpolate(image, size=size, mode="nearest"))


def relu_after_the_last_convolution_to_a_coarser_branch(model, patch):
    for i, j, layer in fuse_layers(model):
        if j < i:
            layer.append(nn.ReLU())


def no_relu_between_the_convolutions_to_a_coarser_branch(model, patch):
    for i, j, layer in fuse_layers(model):
        for step in layer[:-1] if j < i else ():
            step[2] = nn.Identity()


def relu_after_the_convolution_to_a_finer_branch(model, patch):
    for i, j, layer in fuse_layers(model):
        if j > i:
            layer.append(nn.ReLU())


def finest_branch_left_out_of_its_own_sum(model, patch):
    for module in [*model.stage2, *model.stage3, *model.stage4]:
        module.fuse_layers[0][0] = Times(0.0)


def no_relu_in_transitions(model, patch):
    for layers in (model.transition1, model.transition2, model.transition3):
        for layer in [layers[0], layers[-1][0]]:
            if isinstance(layer, nn.Sequential):
                layer[2] = nn.Identity()


def coarsest_branch_first(model, patch):
    right = model.concatenated

    def reversed_order(features):
        widths = [feature.shape[1] for feature in features]
        return torch.cat(right(features).split(widths, dim=1)[::-1], dim=1)

    model.concatenated = reversed_order


def another_batchnorm_eps(model, patch):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


def no_relu_in_the_classifier(model, patch):
    (model.last_layer if isinstance(model, HRNet) else model.aux_head)[2] = nn.Identity()


def features_before_context(model, patch):
    weight = model.ocr_distri_head.conv_bn_dropout[0].weight
    weight.data = torch.cat(weight.data.chunk(2, dim=1)[::-1], dim=1)


def regions_gathered_by_a_softmax_over_classes(model, patch):
    def gathered(features, aux_logits):
        return torch.einsum("bkhw,bchw->bck", aux_logits.softmax(dim=1), features).unsqueeze(3)

    patch.setattr(hrnet, "gather_regions", gathered)


def relation_without_scale(model, patch):
    block = model.ocr_distri_head.object_context_block
    block.f_pixel.append(Times(block.key_dim**0.5))


def no_relu_after_queries(model, patch):
    model.ocr_distri_head.object_context_block.f_pixel[3][1] = nn.Identity()


def no_relu_after_keys(model, patch):
    model.ocr_distri_head.object_context_block.f_object[3][1] = nn.Identity()


def no_relu_after_values(model, patch):
    model.ocr_distri_head.object_context_block.f_down[1][1] = nn.Identity()


def no_relu_after_context(model, patch):
    model.ocr_distri_head.object_context_block.f_up[1][1] = nn.Identity()


def no_relu_after_pixel_representations(model, patch):
    model.conv3x3_ocr[2] = nn.Identity()


BACKBONE_MISREADINGS = [
    the_other_align_corners,
    nearest_resizing,
    relu_after_the_last_convolution_to_a_coarser_branch,
    no_relu_between_the_convolutions_to_a_coarser_branch,
    relu_after_the_convolution_to_a_finer_branch,
    finest_branch_left_out_of_its_own_sum,
    no_relu_in_transitions,
    coarsest_branch_first,
    another_batchnorm_eps,
    no_relu_in_the_classifier,
]
OCR_MISREADINGS = [
    features_before_context,
    regions_gathered_by_a_softmax_over_classes,
    relation_without_scale,
    no_relu_after_queries,
    no_relu_after_keys,
    no_relu_after_values,
    no_relu_after_context,
    no_relu_after_pixel_representations,
]


@pytest.mark.parametrize(
    ("name", "misreading"),
    [
        *(pytest.param(name, m, id=f"{name}-{m.__name__}") for name in OFFICIAL for m in BACKBONE_MISREADINGS),
        *(pytest.param("hrnet_ocr_official", m, id=m.__name__) for m in OCR_MISREADINGS),
    ],
)
def test_goldens_detect_a_misreading_that_changes_no_shape(name, misreading, monkeypatch):
    model = golden_model(name)
    assert largest_error(name, model) <= BOUND
    misreading(model, monkeypatch)
    error = largest_error(name, model)
    print(f"{misreading.__name__}: relative error {error:.1e}")
    assert error > 0.01


@pytest.mark.parametrize("name", OFFICIAL)
def test_align_corners_defaults_to_the_published_cityscapes_models(name):
    """False without OCR, True with it; `the_other_align_corners` above shows that the golden tells."""
    _, settings = golden.MODELS[name]
    assert REFERENCES[name](num_classes=7, width=2).align_corners is settings["align_corners"]


def test_resizing_twice_equals_the_original_only_at_multiples_of_32(monkeypatch):
    """It upsamples by the power of two first: from ceil(H / 8) to 2 * ceil(H / 8), and only then to ceil(H / 4)."""
    model = golden_model("hrnet_official")
    divisible, odd = golden.cases("hrnet_official")

    def twice(image, size, align_corners):
        factor = 2 ** round(math.log2(size[0] / image.shape[2]))
        upsampled = F.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=align_corners)
        return F.interpolate(upsampled, size=size, mode="bilinear", align_corners=align_corners)

    monkeypatch.setattr(hrnet, "resize", twice)
    with torch.no_grad():
        assert_close("64 x 96", outputs(model, divisible)[0], divisible.outputs[0], BOUND)
        assert relative_error(outputs(model, odd)[0], torch.from_numpy(odd.outputs[0])) > 1e-3


# --- object attention by other means ---------------------------------------------------------------------------------


def test_a_region_is_the_softmax_weighted_mean_of_the_features():
    features, aux_logits = images(2, 5, 3, 4), images(2, 7, 3, 4, seed=1)
    regions = gather_regions(features, aux_logits)
    assert regions.shape == (2, 5, 7, 1)
    for b in range(2):
        for k in range(7):
            weights = aux_logits[b, k].exp() / aux_logits[b, k].exp().sum()  # (H, W)
            mean = (weights * features[b]).sum(dim=(1, 2))
            torch.testing.assert_close(regions[b, :, k, 0], mean, rtol=0.0, atol=1e-14)


def test_object_attention_equals_scaled_dot_product_attention_of_torch():
    attention = randomise(ObjectAttention(24, 12).double(), seed=1).eval()
    pixels, regions = images(2, 24, 3, 4), images(2, 24, 7, 1, seed=1)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)  # (B, N, D)

    with torch.no_grad():
        query, key, value = attention.f_pixel(pixels), attention.f_object(regions), attention.f_down(regions)
        context = F.scaled_dot_product_attention(tokens(query), tokens(key), tokens(value))
        want = attention.f_up(context.transpose(1, 2).unflatten(2, (3, 4)))
        assert_close("context", attention(pixels, regions), want, 1e-14)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["w18", "w48"])
@pytest.mark.parametrize("model", [HRNet, HRNetOCR])
def test_parameter_count_is_the_published_one(model, variant):
    with torch.device("meta"):
        assert parameter_count(model(num_classes=19, **VARIANTS[variant])) == PARAMETERS[model][variant]


@pytest.mark.parametrize("model", [HRNet, HRNetOCR])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_of_the_backbone_is_the_published_one(model, variant):
    with torch.device("meta"):
        whole = model(num_classes=19, **VARIANTS[variant])
    parts = ("conv1", "bn1", "conv2", "bn2", "layer1", "transition", "stage")
    backbone = sum(value.numel() for name, value in whole.named_parameters() if name.startswith(parts))
    # `conv3x3_ocr` is the head's and starts like none of them.
    assert backbone == BACKBONE_PARAMETERS[variant]


@pytest.mark.parametrize("size", [(32, 32), (65, 97), (97, 65), (40, 136), (33, 70)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_branch_has_half_the_size_of_the_previous_rounded_up(form, size):
    model, settings = FORMS[form]
    model = randomise(model(**settings).double(), seed=1).eval()
    with torch.no_grad():
        logits, taps = model(images(3, 3, *size))
    sizes = [tuple(-(-side // 2 ** (i + 2)) for side in size) for i in range(4)]
    assert logits.shape == (3, 7, *sizes[0])
    for i in range(4):
        assert taps[f"feature{i}"].shape == (3, 6 * 2**i, *sizes[i])
    if form == "ocr":
        assert taps["aux_logits"].shape == logits.shape


def test_a_branch_of_the_right_size_has_no_layer_in_a_transition():
    model = HRNet(num_classes=7, width=32, stage1_channels=8, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1))
    keys = {key.rpartition(".")[0] for key in model.state_dict() if key.startswith("transition")}
    new = ["transition1.1", "transition2.2", "transition3.3"]
    assert keys == {f"{prefix}.0.{i}" for prefix in new for i in (0, 1)}


def test_more_than_one_module_in_stage_1_is_refused():
    with pytest.raises(ValueError, match="must start with 1"):
        HRNet(num_classes=7, width=2, stage_modules=(2, 1, 4, 3))


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_before_the_classifier_drops_channels_at_rate_005():
    def classifier_input(**dropout) -> torch.Tensor:
        model = HRNetOCR(**NARROW, ocr_channels=200, ocr_key_channels=12, **dropout)
        randomise(model.double(), seed=4).train()
        seen = []
        model.cls_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(images(16, 3, 32, 64))
        return seen[0]

    torch.manual_seed(0)
    kept, dropped = classifier_input(dropout_rate=0.0), classifier_input()
    alive = (kept > 0.0).any(dim=3).any(dim=2)  # (B, C): ReLU leaves some channels without anything to drop
    whole = (dropped == 0.0).all(dim=(2, 3)) & alive
    # Four standard errors: 4 * sqrt(0.05 * 0.95 / 2400) = 0.018.
    assert alive.sum() > 2400
    assert (whole.sum() / alive.sum()).item() == pytest.approx(0.05, abs=0.018)
    torch.testing.assert_close(dropped, torch.where(whole[:, :, None, None], 0.0, kept / 0.95))


# --- what other parity tests rely on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_affects_the_output_of_a_randomised_model(form, training):
    """Relative to the largest gradient of all, of the auxiliary and the main logits together.

    `aux_head.3.bias` shows in the auxiliary logits alone, a bias in front of BatchNorm in evaluation mode alone. The
    last bias of the keys, which moves all of them alike, shows only where ReLU stops some: with seed 9 it does.
    """
    model, settings = FORMS[form]
    model = randomise(model(**settings).double(), seed=9).train(training)
    logits, taps = model(images(2, 3, 64, 96))
    assert all(0.1 < x.abs().max().item() < 100.0 for x in (logits, *taps.values()))
    total = (logits * images(*logits.shape, seed=6)).sum()
    if form == "ocr":
        total = total + (taps["aux_logits"] * images(*logits.shape, seed=7)).sum()
    total.backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
    largest = max(sizes.values())
    hidden = {"last_layer.0.bias", "aux_head.0.bias", "conv3x3_ocr.0.bias"} & sizes.keys() if training else set()
    assert all(sizes.pop(name) < 1e-12 * largest for name in hidden)
    smallest = min(sizes, key=sizes.get)
    print(f"smallest gradient, of {smallest}: {sizes[smallest] / largest:.1e} of the largest")
    assert sizes[smallest] > 1e-4 * largest, smallest


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("form", FORMS)
def test_every_running_statistic_affects_a_randomised_models_output(form, statistic):
    model, settings = FORMS[form]
    model = randomise(model(**settings).double(), seed=5).eval()
    image = images(1, 3, 32, 64)
    with torch.no_grad():
        logits, _ = model(image)
        for name, module in model.named_modules():
            if not isinstance(module, nn.BatchNorm2d):
                continue
            before = getattr(module, statistic).clone()
            getattr(module, statistic).mul_(1.5)
            changed, _ = model(image)
            getattr(module, statistic).copy_(before)
            assert relative_error(changed, logits) > 1e-6, name
        assert torch.equal(model(image)[0], logits)


def test_a_wrong_relation_changes_outputs_far_more_than_float32_rounding():
    """In evaluation mode too, where the golden has no relation to get wrong. Measured 0.015."""
    model = randomise(HRNetOCR(**NARROW, **OCR).double(), seed=9).eval()
    image = images(2, 3, 64, 96)
    with torch.no_grad():
        right, _ = model(image)
        relation_without_scale(model, None)
        assert relative_error(model(image)[0], right) > 1e-3


def test_float32_and_float64_agree_up_to_float32_rounding():
    for model, settings in FORMS.values():
        model = randomise(model(**settings), seed=9).eval()
        image = images(2, 3, 33, 70).float()
        with torch.no_grad():
            single, _ = model(image)
            double, _ = model.double()(image.double())
        assert single.dtype == torch.float32
        assert relative_error(single.double(), double) < 1e-5


def test_new_backbones_and_plain_heads_have_the_published_spread():
    torch.manual_seed(0)
    model = HRNet(num_classes=19, width=18, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1))
    kernels = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, kernel in kernels.items():
        # Five standard errors of a standard deviation: 5 / sqrt(2 n).
        spread = 5.0 / math.sqrt(2 * kernel.numel())
        assert kernel.std().item() == pytest.approx(0.001, rel=spread), name
    assert_norms_are_fresh(model)
    # torch's default: uniform within 1 / sqrt(fan-in), of standard deviation 1 / sqrt(3 fan-in).
    bias = model.last_layer[0].bias
    assert bias.abs().max().item() <= 270**-0.5
    assert bias.std().item() == pytest.approx((3 * 270) ** -0.5, rel=0.1)


def test_new_ocr_layers_have_torchs_spread_and_the_backbone_its_own():
    torch.manual_seed(0)
    model = HRNetOCR(num_classes=19, width=18, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1), ocr_channels=128)
    heads = ("conv3x3_ocr", "ocr_distri_head", "cls_head", "aux_head")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            std = (3 * module.weight[0].numel()) ** -0.5 if name.startswith(heads) else 0.001
            assert module.weight.std().item() == pytest.approx(std, rel=5.0 / math.sqrt(2 * module.weight.numel())), (
                name
            )
    assert_norms_are_fresh(model)


def assert_norms_are_fresh(model: nn.Module) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.weight.eq(1.0).all() and norm.bias.eq(0.0).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)

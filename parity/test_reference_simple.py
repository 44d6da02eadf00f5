"""The PyTorch reference of the simple SegFormer is the original: it equals the package and figures of the original.

The package is segformer-pytorch 0.0.6. Everything here is float64, where agreement means equal mathematics: errors
measured are 1e-15 (gradients 1e-14), while a wrong head count makes 3e-3 or more.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segformer_pytorch import Segformer

from parity import golden
from parity.test_reference import assert_close, images, parameter_count, relative_error, segmentation_loss
from segjax.torch_reference.randomise import randomise
from segjax.torch_reference.segformer_simple import ChannelNorm, EfficientSelfAttention, Patches, SegFormerSimple

GOLDEN = "segformer_simple"
NARROW = {"num_classes": 7, "dims": (4, 8, 10, 16), "depths": (2, 1, 1, 1), "decoder_dim": 12}
# No setting is the default, and no two stages share one.
OTHER = {
    "num_classes": 3,
    "dims": (6, 4, 12, 8),
    "depths": (1, 2, 1, 3),
    "num_heads": (3, 1, 4, 2),
    "mlp_ratios": (2, 3, 1, 5),
    "sr_ratios": (4, 2, 1, 1),
    "decoder_dim": 10,
}
DEFAULT = {"num_classes": 19}
B5_LIKE = {
    "num_classes": 19,
    "dims": (64, 128, 320, 512),
    "depths": (3, 6, 40, 3),
    "mlp_ratios": (4, 4, 4, 4),
    "decoder_dim": 768,
}


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def golden_model(**overrides) -> SegFormerSimple:
    """The golden's model in evaluation mode and float64."""
    _, settings = golden.MODELS[GOLDEN]
    model = SegFormerSimple(**{"num_classes": golden.NUM_CLASSES, **settings, **overrides})
    model.load_state_dict({key: tensor(value) for key, value in golden.weights(GOLDEN).items()}, strict=True)
    return model.double().eval()


def golden_error(model: SegFormerSimple) -> float:
    """Relative error of the logits of the golden's first case."""
    case = golden.cases(GOLDEN)[0]
    with torch.no_grad():
        logits, _ = model(tensor(case.images))
    return relative_error(logits, tensor(case.outputs[0]))


def package_model(settings: dict) -> Segformer:
    """The package's own defaults decide what `settings` leave out."""
    names = {"depths": "num_layers", "num_heads": "heads", "mlp_ratios": "ff_expansion", "sr_ratios": "reduction_ratio"}
    return Segformer(**{names.get(name, name): value for name, value in settings.items()})


# --- figures of the original code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_logits_features_and_loss_equal_the_original_code(index):
    case = golden.cases(GOLDEN)[index]
    with torch.no_grad():
        logits, taps = golden_model()(tensor(case.images))
        loss = segmentation_loss(logits, tensor(case.labels))
    assert list(taps) == ["feature0", "feature1", "feature2", "feature3"]
    for (name, feature), wanted in zip(taps.items(), case.features, strict=True):
        assert_close(name, feature, tensor(wanted), 1e-13)
    (wanted,) = case.outputs
    assert_close("logits", logits, tensor(wanted), 1e-13)
    assert loss.item() == pytest.approx(case.loss, rel=1e-13)


def test_gradient_of_every_parameter_equals_the_original_code():
    case, model = golden.cases(GOLDEN)[0], golden_model()
    logits, _ = model(tensor(case.images))
    segmentation_loss(logits, tensor(case.labels)).backward()
    parameters = dict(model.named_parameters())
    assert case.gradients.keys() == parameters.keys()
    errors = {name: relative_error(parameters[name].grad, tensor(value)) for name, value in case.gradients.items()}
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: relative error {errors[worst]:.1e}")
    assert errors[worst] <= 1e-12, f"gradient of {worst}: relative error {errors[worst]:.3e} exceeds 1e-12"


@pytest.mark.parametrize("num_heads", [(1, 2, 5, 4), (1, 2, 5, 16), (1, 1, 5, 8), (2, 2, 5, 8)], ids=str)
def test_the_number_of_heads_changes_the_output(num_heads):
    error = golden_error(golden_model(num_heads=num_heads))
    print(f"{num_heads}: relative error {error:.1e}")
    assert error > 1e-8


def test_eps_of_the_norm_changes_the_output():
    model = golden_model()
    for module in model.modules():
        if isinstance(module, ChannelNorm):
            assert module.eps == 1e-5
            module.eps = 1e-6
    assert golden_error(model) > 1e-8


def test_eps_added_to_the_deviation_differs_from_eps_under_the_root(monkeypatch):
    def layer_norm(norm: ChannelNorm, x: torch.Tensor) -> torch.Tensor:
        normalised = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=norm.eps).permute(0, 3, 1, 2)
        return normalised * norm.g + norm.b

    monkeypatch.setattr(ChannelNorm, "forward", layer_norm)
    assert golden_error(golden_model()) > 1e-8


def test_bilinear_resizing_changes_the_output():
    model = golden_model()
    for to_fused in model.to_fused[1:]:
        to_fused[1].mode = "bilinear"
    assert golden_error(model) > 1e-3


# --- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 160), (160, 32)], ids=str)
@pytest.mark.parametrize("settings", [NARROW, OTHER], ids=["narrow", "other"])
def test_outputs_features_and_gradients_equal_the_package(settings, size):
    assert_equals_package(settings, images(2, 3, *size))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 64), (96, 32)], ids=str)
def test_outputs_features_and_gradients_equal_the_package_at_default_width(size):
    assert_equals_package(DEFAULT, images(1, 3, *size))


def assert_equals_package(settings: dict, image: torch.Tensor) -> None:
    ours = randomise(SegFormerSimple(**settings).double(), seed=1)
    theirs = package_model(settings).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        features = theirs.mit(image, return_layer_outputs=True)
    logits, taps = ours(image)
    wanted = theirs(image)
    assert_close("logits", logits.detach(), wanted.detach(), 1e-12)
    for (name, feature), their_feature in zip(taps.items(), features, strict=True):
        assert_close(name, feature.detach(), their_feature, 1e-12)
    weight = images(*logits.shape, seed=2)
    (logits * weight).sum().backward()
    (wanted * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    errors = {name: relative_error(parameter.grad, gradients[name]) for name, parameter in ours.named_parameters()}
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: relative error {errors[worst]:.1e}")
    assert errors[worst] <= 1e-12, f"gradient of {worst}: relative error {errors[worst]:.3e} exceeds 1e-12"


@pytest.mark.parametrize("settings", [DEFAULT, NARROW, OTHER], ids=["default", "narrow", "other"])
def test_the_same_seed_draws_the_weights_of_the_package(settings):
    torch.manual_seed(0)
    ours = SegFormerSimple(**settings).state_dict()
    torch.manual_seed(0)
    theirs = package_model(settings).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_state_dict_of_the_package_loads_strictly_and_gives_its_output():
    torch.manual_seed(0)
    theirs = package_model(NARROW).double()
    ours = SegFormerSimple(**NARROW).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert_close("logits", ours(images(3, 3, 64, 32))[0], theirs(images(3, 3, 64, 32)), 1e-12)


def test_a_pixel_of_equal_channels_has_no_gradient_as_in_the_package():
    """The root of a variance of zero has none: torch gives NaN. The value itself is just the shift."""
    pixels = torch.full((1, 4, 1, 2), 3.0, dtype=torch.float64)
    pixels[0, 0, 0, 1] = 4.0
    theirs = package_model(NARROW).double().mit.stages[0][2][0][0].norm
    for norm in (ChannelNorm(4).double(), theirs):
        x = pixels.clone().requires_grad_()
        y = randomise(norm, seed=0)(x)
        (y * images(*y.shape)).sum().backward()
        assert torch.equal(y[:, :, 0, 0], norm.b[:, :, 0, 0])
        assert x.grad[:, :, :, 0].isnan().all() and x.grad[:, :, :, 1].isfinite().all()


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "count"), [(DEFAULT, 7722099), (B5_LIKE, 174780307)], ids=["default", "b5-like"])
def test_parameter_count_is_the_published_one(settings, count):
    """Counted in the original code, and the package's own names and shapes."""
    with torch.device("meta"):
        ours, theirs = SegFormerSimple(**settings), package_model(settings)
    assert parameter_count(ours) == parameter_count(theirs) == count
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


@pytest.mark.parametrize("size", [(33, 64), (64, 48), (31, 31)], ids=str)
def test_sizes_not_divisible_by_32_are_refused_as_in_the_package(size):
    with pytest.raises(ValueError, match=f"multiples of 32, got {size[0]} x {size[1]}"):
        SegFormerSimple(**NARROW)(torch.zeros(1, 3, *size))
    with pytest.raises((RuntimeError, ValueError)):
        package_model(NARROW)(torch.zeros(1, 3, *size))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim 10 is not divisible by num_heads 4"):
        SegFormerSimple(**NARROW, num_heads=(1, 2, 4, 8))


# --- parts, by definition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "stride"), [(7, 4), (3, 2)])
def test_unfold_and_a_1x1_convolution_equal_a_strided_convolution(patch_size, stride):
    image, weight = images(2, 3, 16, 24), images(5, 3 * patch_size * patch_size, seed=1)
    unfolded = F.conv2d(Patches(patch_size, stride)(image), weight[:, :, None, None])
    kernel = weight.reshape(5, 3, patch_size, patch_size)
    wanted = F.conv2d(image, kernel, stride=stride, padding=patch_size // 2)
    assert_close("embedding", unfolded, wanted, 1e-13)


def test_attention_equals_torch_attention_head_by_head():
    attention = randomise(EfficientSelfAttention(12, num_heads=3, sr_ratio=2).double(), seed=3)
    x = images(2, 12, 4, 6)
    with torch.no_grad():
        q = attention.to_q(x).flatten(2).transpose(1, 2)  # (B, N, C)
        k, v = attention.to_kv(x).flatten(2).transpose(1, 2).chunk(2, dim=-1)  # (B, M, C) each
        heads = [
            F.scaled_dot_product_attention(q[..., i : i + 4], k[..., i : i + 4], v[..., i : i + 4]) for i in (0, 4, 8)
        ]
        wanted = attention.to_out(torch.cat(heads, dim=-1).transpose(1, 2).reshape(2, 12, 4, 6))
        assert_close("attention", attention(x), wanted, 1e-13)


def test_training_and_evaluation_give_the_same_output():
    model = randomise(SegFormerSimple(**NARROW).double(), seed=4)
    with torch.no_grad():
        training, _ = model.train()(images(2, 3, 64, 32))
        evaluation, _ = model.eval()(images(2, 3, 64, 32))
    assert torch.equal(training, evaluation)
    assert list(model.buffers()) == []


# --- what other parity tests rely on ---------------------------------------------------------------------------------


def test_every_parameter_affects_the_output_of_a_randomised_model():
    """Relative to the largest gradient of all."""
    model = randomise(SegFormerSimple(**NARROW).double(), seed=5)
    logits, taps = model(images(2, 3, 64, 96))
    assert all(0.1 < x.abs().max().item() < 100.0 for x in (logits, *taps.values()))
    (logits * images(*logits.shape, seed=6)).sum().backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
    smallest = min(sizes, key=sizes.get)
    print(f"smallest {smallest}: {sizes[smallest] / max(sizes.values()):.1e}")
    assert sizes[smallest] > 1e-4 * max(sizes.values()), smallest


@pytest.mark.parametrize("num_heads", [(2, 2, 5, 8), (1, 1, 5, 8), (1, 2, 1, 8), (1, 2, 5, 4)], ids=str)
def test_a_wrong_head_count_changes_outputs_far_more_than_rounding(num_heads):
    image = images(2, 3, 64, 96)
    with torch.no_grad():
        right, _ = randomise(SegFormerSimple(**NARROW).double(), seed=5)(image)
        wrong, _ = randomise(SegFormerSimple(**NARROW, num_heads=num_heads).double(), seed=5)(image)
    error = relative_error(wrong, right)
    print(f"{num_heads}: relative error {error:.1e}")
    assert error > 1e-3


def test_float32_and_float64_agree_up_to_float32_rounding():
    model = randomise(SegFormerSimple(**NARROW), seed=9)
    image = images(2, 3, 64, 96).float()
    with torch.no_grad():
        single, _ = model(image)
        double, _ = model.double()(image.double())
    assert single.dtype == torch.float32
    assert relative_error(single.double(), double) < 1e-5

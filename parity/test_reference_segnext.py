"""The PyTorch reference of SegNeXt is the original: it equals figures of the original code.

Everything here is float64, where agreement means equal mathematics: errors measured are 5e-15 (gradients 3e-14), while
a wrong eps in the head's factorisation makes 2e-7, and any other misreading far more.
"""

import itertools

import numpy as np
import pytest
import torch

from parity import golden
from parity.test_reference import assert_close, images, parameter_count, relative_error, segmentation_loss
from segjax.torch_reference import segnext
from segjax.torch_reference.randomise import randomise
from segjax.torch_reference.segnext import VARIANTS, Block, DropPath, SegNeXt

GOLDEN = "segnext_official"
# Groups of two channels in the head's norms, where the golden's have one: see WITHOUT_GRADIENT.
NARROW = {"num_classes": 7, "dims": (4, 8, 10, 16), "depths": (2, 1, 1, 1), "ham_channels": 64, "ham_rank": 8}

# The golden's head has 32 channels in 32 groups, so `squeeze.gn` takes out what is constant over a map, and stage 4's
# last shift is just that: its true gradient is zero, and what either side computes for it is rounding.
WITHOUT_GRADIENT = "backbone.norm4.bias"

# Counted in the original code, 19 classes.
PARAMETERS = {"t": 4229747, "s": 13899219, "b": 27569107, "l": 48792275}
BACKBONE_PARAMETERS = {"t": 3903584, "s": 13450176, "b": 26277824, "l": 44636864}


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def golden_model(**overrides) -> SegNeXt:
    """The golden's model in evaluation mode and float64."""
    _, settings = golden.MODELS[GOLDEN]
    model = SegNeXt(**{"num_classes": golden.NUM_CLASSES, **settings, **overrides})
    model.load_state_dict({key: tensor(value) for key, value in golden.weights(GOLDEN).items()}, strict=True)
    return model.double().eval()


def golden_error(model: SegNeXt) -> float:
    """Relative error of the logits of the golden's first case."""
    case = golden.cases(GOLDEN)[0]
    with torch.no_grad():
        logits, _ = model(tensor(case.images), tensor(case.bases))
    return relative_error(logits, tensor(case.outputs[0] if not model.training else case.training_outputs[0]))


def gradient_errors(model: SegNeXt) -> dict[str, float]:
    """Relative error of every gradient of the golden's loss but WITHOUT_GRADIENT's, which must be mere rounding."""
    case = golden.cases(GOLDEN)[0]
    logits, _ = model(tensor(case.images), tensor(case.bases))
    segmentation_loss(logits, tensor(case.labels)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = {name: tensor(value) for name, value in case.gradients.items()}
    assert wanted.keys() == gradients.keys()
    largest = max(value.abs().max().item() for value in wanted.values())
    for rounding in (gradients.pop(WITHOUT_GRADIENT), wanted.pop(WITHOUT_GRADIENT)):
        assert rounding.abs().max().item() < 1e-14 * largest
    return {name: relative_error(gradients[name], wanted[name]) for name in wanted}


def bases_for(model: SegNeXt, batch: int, seed: int = 0) -> torch.Tensor:
    hamburger = model.decode_head.hamburger
    bases = images(batch, hamburger.ham_in.conv.in_channels, hamburger.rank, seed=seed).abs()
    return bases / bases.norm(dim=1, keepdim=True)


# --- figures of the original code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_logits_features_and_loss_equal_the_original_code(index):
    case = golden.cases(GOLDEN)[index]
    with torch.no_grad():
        logits, taps = golden_model()(tensor(case.images), tensor(case.bases))
        loss = segmentation_loss(logits, tensor(case.labels))
    assert list(taps) == ["feature0", "feature1", "feature2", "feature3"]
    for (name, feature), wanted in zip(taps.items(), case.features, strict=True):
        assert_close(name, feature, tensor(wanted), 1e-13)
    (wanted,) = case.outputs
    assert_close("logits", logits, tensor(wanted), 1e-12)
    assert loss.item() == pytest.approx(case.loss, rel=1e-12)


def test_gradient_of_every_parameter_equals_the_original_code():
    errors = gradient_errors(golden_model())
    worst = max(errors, key=errors.get)
    print(f"{len(errors)} gradients, worst {worst}: relative error {errors[worst]:.1e}")
    assert errors[worst] <= 1e-12, f"gradient of {worst}: relative error {errors[worst]:.3e} exceeds 1e-12"


@pytest.mark.parametrize("update", ["update_coefficients", "update_bases"])
def test_the_originals_gradient_flows_through_the_factorisation(monkeypatch, update):
    """Geng et al. also propose to run the steps without gradient: outputs stay, gradients do not."""
    original = getattr(segnext, update)
    monkeypatch.setattr(segnext, update, lambda *arguments: original(*arguments).detach())
    model = golden_model()
    assert golden_error(model) <= 1e-12
    assert max(gradient_errors(model).values()) > 0.1


def test_the_originals_gradient_flows_through_the_first_coefficients(monkeypatch):
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: softmax(x, dim).detach())
    model = golden_model()
    assert golden_error(model) <= 1e-12
    assert max(gradient_errors(model).values()) > 0.1


def test_training_forward_equals_the_original_code():
    error = golden_error(golden_model(drop_path_rate=0.0, dropout_rate=0.0).train())
    print(f"training logits: relative error {error:.1e}")
    assert error <= 1e-12


def test_running_statistics_move_a_tenth_towards_unbiased_batch_statistics():
    """By BatchNorm's definition: the golden's own statistics are those from before its training-mode forward."""
    case, weights = golden.cases(GOLDEN)[0], golden.weights(GOLDEN)
    model = golden_model(drop_path_rate=0.0, dropout_rate=0.0).train()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert len(norms) == 2 + 3 + 2 * 5  # stem, patch embeddings, two a block
    seen = {}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(tensor(case.images), tensor(case.bases))
    for name, norm in norms.items():
        values = seen[name].transpose(0, 1).flatten(1)  # (C, B * H * W)
        mean = 0.9 * tensor(weights[f"{name}.running_mean"]).double() + 0.1 * values.mean(dim=1)
        var = 0.9 * tensor(weights[f"{name}.running_var"]).double() + 0.1 * values.var(dim=1, correction=1)
        assert_close(f"{name} mean", norm.running_mean, mean, 1e-12)
        assert_close(f"{name} variance", norm.running_var, var, 1e-12)
        assert norm.num_batches_tracked.item() == 1


# --- what weights cannot tell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, torch.nn.LayerNorm, torch.nn.GroupNorm])
def test_eps_of_every_kind_of_norm_changes_the_output(norm):
    """1e-8 is 1e4 times the bound above. Measured 2e-5 (BatchNorm), 4e-3, 6e-5."""
    model = golden_model()
    for module in model.modules():
        if isinstance(module, norm):
            assert module.eps == 1e-5
            module.eps = 1e-6
    assert golden_error(model) > 1e-8


@pytest.mark.parametrize("eps", [1e-7, 1e-5])
def test_eps_of_the_factorisation_changes_the_output(monkeypatch, eps):
    monkeypatch.setattr(segnext, "FACTORISATION_EPS", eps)
    assert golden_error(golden_model()) > 1e-8  # measured 2e-7, 2e-6


def test_another_rank_loads_but_changes_the_output():
    """mmsegmentation's B and L have 16 where the published models have 64."""
    case = golden.cases(GOLDEN)[0]
    with torch.no_grad():
        logits, _ = golden_model(ham_rank=4)(tensor(case.images), tensor(case.bases)[:, :, :4])
    assert relative_error(logits, tensor(case.outputs[0])) > 1e-2


def test_bases_of_another_shape_are_refused():
    model, case = golden_model(), golden.cases(GOLDEN)[0]
    for bases in (case.bases[:, :, :4], case.bases[:1], case.bases.swapaxes(1, 2)):
        with pytest.raises(ValueError, match=r"bases must be \(B, C, R\) = \(2, 32, 8\)"):
            model(tensor(case.images), tensor(bases))


def test_other_numbers_of_factorisation_steps_change_the_output(monkeypatch):
    training = golden_model(drop_path_rate=0.0, dropout_rate=0.0).train()
    evaluation = golden_model()
    assert (segnext.TRAINING_STEPS, segnext.EVALUATION_STEPS) == (6, 7)
    for name, model, steps in (("TRAINING_STEPS", training, (5, 7)), ("EVALUATION_STEPS", evaluation, (6, 8))):
        for count in steps:
            monkeypatch.setattr(segnext, name, count)
            error = golden_error(model)
            print(f"{name} {count}: relative error {error:.1e}")
            assert error > 1e-2


# --- the factorisation -----------------------------------------------------------------------------------------------


def test_factorisation_equals_lee_and_seungs_elementwise_rule():
    x, bases = images(1, 3, 4).abs(), images(1, 3, 2, seed=1).abs()
    X, D = x[0].numpy(), bases[0].numpy().copy()
    A = np.stack([np.exp(D.T @ X[:, n]) / np.exp(D.T @ X[:, n]).sum() for n in range(4)])

    def improve_coefficients():
        wanted = [[sum(X[c, n] * D[c, r] for c in range(3)) for r in range(2)] for n in range(4)]
        product = D @ A.T
        present = [[sum(product[c, n] * D[c, r] for c in range(3)) for r in range(2)] for n in range(4)]
        A[:] = A * np.array(wanted) / (np.array(present) + 1e-6)

    def improve_bases():
        wanted = [[sum(X[c, n] * A[n, r] for n in range(4)) for r in range(2)] for c in range(3)]
        product = D @ A.T
        present = [[sum(product[c, n] * A[n, r] for n in range(4)) for r in range(2)] for c in range(3)]
        D[:] = D * np.array(wanted) / (np.array(present) + 1e-6)

    for steps in range(4):
        found, last = segnext.factorise(x, bases, steps)[0], (A.copy(), D.copy())
        improve_coefficients()
        assert_close(f"{steps} steps", found, torch.from_numpy(D @ A.T), 1e-13)
        A[:], D[:] = last
        improve_coefficients()
        improve_bases()


def test_every_step_of_the_factorisation_reduces_its_error():
    """Lee and Seung's theorem, for the norm of the difference."""
    x, bases = images(2, 12, 40).abs(), images(2, 12, 4, seed=1).abs()
    distances = [(segnext.factorise(x, bases, steps) - x).norm().item() for steps in range(30)]
    assert all(after < before for before, after in itertools.pairwise(distances))


def test_factorisation_recovers_a_product_of_the_same_rank():
    x = images(2, 12, 1).abs() @ images(2, 1, 40, seed=1).abs()
    bases = images(2, 12, 1, seed=2).abs()
    assert_close("rank 1", segnext.factorise(x, bases, 2), x, 1e-5)


def test_a_channel_without_signal_stays_zero_rather_than_nan():
    """What the eps is for: without it a dead channel is 0 / 0."""
    x = images(1, 5, 6).abs()
    x[:, 2] = 0.0
    x[:, :, 3] = 0.0
    found = segnext.factorise(x, images(1, 5, 3, seed=1).abs(), 7)
    assert found.isfinite().all()
    assert found[:, 2].eq(0.0).all() and found[:, :, 3].eq(0.0).all()


def test_the_samples_of_a_batch_are_factorised_independently():
    model = randomise(SegNeXt(**NARROW).double(), seed=4).eval()
    image, bases = images(3, 3, 40, 72), bases_for(model, 3)
    with torch.no_grad():
        together, _ = model(image, bases)
        for b in range(3):
            alone, _ = model(image[b : b + 1], bases[b : b + 1])
            assert_close(f"sample {b}", alone, together[b : b + 1], 1e-12)


# --- fresh bases -----------------------------------------------------------------------------------------------------


def test_without_bases_evaluation_outputs_differ_between_runs():
    model, case = golden_model(), golden.cases(GOLDEN)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        runs = [model(tensor(case.images))[0] for _ in range(3)]
        features = [model(tensor(case.images))[1]["feature3"] for _ in range(2)]
    for one, other in ((runs[0], runs[1]), (runs[1], runs[2])):
        assert relative_error(one, other) > 1e-2
    assert torch.equal(*features)


def test_without_bases_a_forward_pass_draws_new_ones_of_length_one():
    model, case = golden_model(), golden.cases(GOLDEN)[0]
    with torch.no_grad():
        torch.manual_seed(3)
        drawn = segnext.draw_bases(2, 32, 8, like=torch.empty(0, dtype=torch.float64))
        torch.manual_seed(3)
        assert torch.equal(model(tensor(case.images))[0], model(tensor(case.images), drawn)[0])
    assert drawn.shape == case.bases.shape and drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(2, 8, dtype=torch.float64), rtol=1e-14, atol=0.0)
    assert not torch.equal(drawn[0], drawn[1])


def test_new_bases_are_uniform_before_they_are_normalised():
    """Uniform in 0 .. m has mean m / 2 and deviation m / sqrt(12), so their ratio is sqrt(3) whatever the length."""
    torch.manual_seed(0)
    drawn = segnext.draw_bases(4, 4096, 8, like=torch.empty(0, dtype=torch.float64))
    ratio = drawn.mean(dim=1) / drawn.std(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0**0.5), rtol=0.06, atol=0.0)
    assert drawn.min().item() >= 0.0
    assert drawn.max(dim=1).values.mul(4096**0.5).sub(3.0**0.5).abs().max().item() < 0.06  # m / (m * sqrt(1 / 3))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_the_published_one(variant):
    with torch.device("meta"):
        model = SegNeXt(num_classes=19, **VARIANTS[variant])
    assert parameter_count(model) == PARAMETERS[variant]
    assert parameter_count(model.backbone) == BACKBONE_PARAMETERS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_the_published_rank_and_drop_path(variant):
    with torch.device("meta"):
        model = SegNeXt(num_classes=19, **VARIANTS[variant])
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert len(rates) == sum(VARIANTS[variant]["depths"])
    assert (rates[0], rates[-1]) == pytest.approx((0.0, 0.3 if variant == "l" else 0.1))
    assert model.decode_head.hamburger.rank == (64 if variant in "bl" else 16)
    assert model.decode_head.dropout.p == 0.1


def test_drop_path_rates_rise_linearly_from_zero():
    model = SegNeXt(**{**NARROW, "depths": (2, 1, 3, 1)}, drop_path_rate=0.3)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (40, 136), (33, 31)], ids=str)
def test_maps_have_an_eighth_of_the_image_size_rounded_up(size):
    model = randomise(SegNeXt(**NARROW).double(), seed=1).eval()
    H, W = size
    with torch.no_grad():
        logits, taps = model(images(2, 3, H, W), bases_for(model, 2))
    assert logits.shape == (2, 7, -(-H // 8), -(-W // 8))
    for stride, dim, feature in zip((4, 8, 16, 32), NARROW["dims"], taps.values(), strict=True):
        assert feature.shape == (2, dim, -(-H // stride), -(-W // stride))


# --- randomness ------------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path = DropPath(0.25).double()
    x = torch.ones(4096, 2, 3, 1, dtype=torch.float64)
    dropped = drop_path(x)
    assert ((dropped == 0.0).all(dim=(1, 2, 3)) | (dropped == 1.0 / 0.75).all(dim=(1, 2, 3))).all()
    # Four standard errors: 4 * sqrt(0.25 * 0.75 / 4096) = 0.027.
    assert (dropped == 0.0).double().mean().item() == pytest.approx(0.25, abs=0.027)
    assert drop_path.eval()(x) is x


def test_the_branches_of_a_block_are_dropped_independently():
    """At rate 1/2 a sample meets four fates of equal probability; 64 samples miss one with probability 4e-8."""
    torch.manual_seed(0)
    block = randomise(Block(4, mlp_ratio=4, drop_path_rate=0.5).double(), seed=3)
    x = images(1, 4, 4, 6).expand(64, 4, 4, 6)
    block.train()
    # Statistics of evaluation: those of the batch would tell each sample of the others' fates.
    block.norm1.eval()
    block.norm2.eval()
    with torch.no_grad():
        dropped = block(x)
    assert len({tuple(sample.flatten().round(decimals=9).tolist()) for sample in dropped}) == 4
    assert (dropped == x).all(dim=(1, 2, 3)).any()  # one of the four is the identity: attention's own residual goes too


def test_dropout_before_the_classifier_drops_whole_channels():
    def classifier_input(dropout_rate: float) -> torch.Tensor:
        model = SegNeXt(**NARROW, drop_path_rate=0.0, dropout_rate=dropout_rate)
        randomise(model.double(), seed=4).train()
        seen = []
        model.decode_head.conv_seg.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(images(8, 3, 32, 64), bases_for(model, 8))
        return seen[0]

    torch.manual_seed(0)
    kept, dropped = classifier_input(0.0), classifier_input(0.5)
    whole = (dropped == 0.0).all(dim=(2, 3))  # (B, C)
    assert 0.3 < whole.double().mean().item() < 0.7
    torch.testing.assert_close(dropped, torch.where(whole[:, :, None, None], 0.0, 2.0 * kept))


# --- what other parity tests rely on ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_parameter_and_statistic_changes_the_output():
    """Relative to the largest gradient of all; measured 4e-3 or more."""
    model = randomise(SegNeXt(**NARROW).double(), seed=5).eval()
    image, bases = images(2, 3, 64, 96), bases_for(model, 2)
    logits, taps = model(image, bases)
    assert all(0.1 < x.abs().max().item() < 100.0 for x in (logits, *taps.values()))
    (logits * images(*logits.shape, seed=6)).sum().backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
    assert min(sizes.values()) > 1e-4 * max(sizes.values()), min(sizes, key=sizes.get)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                before = buffer.clone()
                buffer.mul_(1.1)
                assert relative_error(model(image, bases)[0], logits.detach()) > 1e-4, name
                buffer.copy_(before)


def test_a_head_with_one_channel_per_group_hides_the_last_shift():
    """Why NARROW's head is 64 wide: at 32 a constant map leaves the head as it came."""
    for ham_channels, lowest, highest in ((32, 0.0, 1e-12), (64, 1e-3, 10.0)):
        model = randomise(SegNeXt(**{**NARROW, "ham_channels": ham_channels}).double(), seed=5).eval()
        image, bases = images(2, 3, 64, 96), bases_for(model, 2)
        with torch.no_grad():
            before, _ = model(image, bases)
            model.backbone.norm4.bias.add_(1.0)
            moved = relative_error(model(image, bases)[0], before)
        assert lowest <= moved <= highest


def test_float32_and_float64_agree_up_to_float32_rounding():
    model = randomise(SegNeXt(**NARROW), seed=9).eval()
    image, bases = images(2, 3, 33, 70).float(), bases_for(model, 2).float()
    with torch.no_grad():
        single, _ = model(image, bases)
        double, _ = model.double()(image.double(), bases.double())
    assert single.dtype == torch.float32
    error = relative_error(single.double(), double)
    print(f"relative error {error:.1e}")
    assert error < 1e-5


def test_new_weights_have_the_published_spread():
    torch.manual_seed(0)
    weights = SegNeXt(num_classes=150, **VARIANTS["t"]).state_dict()
    # sqrt(2 / fan-out): kernel area times output channels over groups.
    for name, fan_out in (
        ("backbone.patch_embed4.proj", 9 * 256),
        ("backbone.block4.0.attn.proj_1", 256),
        ("backbone.block4.0.attn.spatial_gating_unit.conv2_1", 21),
        ("backbone.block4.0.mlp.dwconv.dwconv", 9),
        ("decode_head.squeeze.conv", 256),
        ("decode_head.hamburger.ham_in.conv", 256),
    ):
        assert weights[f"{name}.weight"].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
    assert weights["decode_head.conv_seg.weight"].std().item() == pytest.approx(0.01, rel=0.03)
    assert all(value.eq(0.0).all() for name, value in weights.items() if name.endswith(".bias"))
    scales = [value for name, value in weights.items() if "layer_scale" in name]
    assert len(scales) == 2 * sum(VARIANTS["t"]["depths"]) and all(value.eq(0.01).all() for value in scales)
    norms = [value for name, value in weights.items() if name.endswith(".weight") and value.ndim == 1]
    assert len(norms) == 2 + 3 + 2 * 13 + 4 + 3 and all(value.eq(1.0).all() for value in norms)

"""Schedules, clipping and optimizers against Python and numpy code of what mmsegmentation and torch document."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import segjax
from configs import segformer
from segjax import layers
from segjax.recipes import common
from segjax.train import optim
from tests.tiny import abstract_family

# ---------------------------------------------------------------------------------------------------------- schedules


def poly_by_hand(step, *, base, steps, power, warmup, ratio, end):
    """mmsegmentation's PolyLrUpdaterHook with warmup='linear', and `end` after the last step."""
    progress = min(step / steps, 1.0)
    rate = (base - end) * (1 - progress) ** power + end
    if step < warmup:
        rate *= 1 - (1 - step / warmup) * (1 - ratio)
    return rate


@pytest.mark.parametrize("power, end, warmup, ratio", [(1.0, 0.0, 15, 1e-6), (0.9, 1e-5, 7, 0.1), (2.0, 0.0, 0, 0.5)])
def test_the_rate_is_a_polynomial_times_a_linear_warm_up(power, end, warmup, ratio):
    base, steps = 6e-4, 120
    rate = jax.jit(
        optim.poly_schedule(base, steps=steps, power=power, warmup_steps=warmup, warmup_ratio=ratio, end=end)
    )
    for step in (0, 1, 6, 7, 8, 14, 15, 16, 60, steps - 1, steps, steps + 1, 10 * steps):
        expected = poly_by_hand(step, base=base, steps=steps, power=power, warmup=warmup, ratio=ratio, end=end)
        np.testing.assert_allclose(rate(jnp.int32(step)), expected, rtol=2e-6, atol=1e-7 * base, err_msg=str(step))


def cosine_by_hand(step, *, base, steps, warmup, ratio, end):
    """Half a cosine period from `base` to `end`, under the same warm-up."""
    rate = end + (base - end) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
    return rate * (1 - (1 - step / warmup) * (1 - ratio)) if step < warmup else rate


@pytest.mark.parametrize("end, warmup, ratio", [(0.0, 15, 1e-6), (1e-5, 7, 0.1), (2e-4, 0, 0.5)])
def test_the_rate_is_half_a_cosine_times_a_linear_warm_up(end, warmup, ratio):
    base, steps = 6e-4, 120
    rate = jax.jit(optim.cosine_schedule(base, steps=steps, warmup_steps=warmup, warmup_ratio=ratio, end=end))
    for step in (0, 1, 6, 7, 8, 14, 15, 16, 40, 60, steps - 1, steps, steps + 1, 10 * steps):
        expected = cosine_by_hand(step, base=base, steps=steps, warmup=warmup, ratio=ratio, end=end)
        np.testing.assert_allclose(rate(jnp.int32(step)), expected, rtol=2e-6, atol=1e-7 * base, err_msg=str(step))


def test_schedules_are_computed_in_float64_if_jax_is(float64):
    shape = dict(steps=7, warmup_steps=3, warmup_ratio=0.1)
    for step in (1, 5):
        by_hand = dict(base=0.3, steps=7, warmup=3, ratio=0.1, end=0.0)
        cosine = optim.cosine_schedule(0.3, **shape)(jnp.int32(step))
        np.testing.assert_allclose(cosine, cosine_by_hand(step, **by_hand), rtol=1e-14)
        poly = optim.poly_schedule(0.3, power=0.9, **shape)(jnp.int32(step))
        np.testing.assert_allclose(poly, poly_by_hand(step, power=0.9, **by_hand), rtol=1e-14)


def test_an_unknown_schedule_is_refused_by_name():
    settings = common.get_config("streets").optim
    settings.schedule = "step"
    with pytest.raises(ValueError, match=r"optim\.schedule is one of poly, cosine; got 'step'"):
        optim.schedule(settings, steps=30)


def test_the_schedule_of_a_config_uses_all_of_its_settings():
    settings = common.get_config("streets").optim
    settings.update(lr=0.2, end_lr=0.01, power=0.7, warmup_steps=4, warmup_ratio=0.25)
    rate = optim.schedule(settings, steps=30)
    for step in (0, 3, 4, 11, 29, 30):
        expected = poly_by_hand(step, base=0.2, steps=30, power=0.7, warmup=4, ratio=0.25, end=0.01)
        np.testing.assert_allclose(rate(step), expected, rtol=2e-6)
    settings.schedule = "cosine"
    rate = optim.schedule(settings, steps=30)
    for step in (0, 3, 4, 11, 29, 30):
        expected = cosine_by_hand(step, base=0.2, steps=30, warmup=4, ratio=0.25, end=0.01)
        np.testing.assert_allclose(rate(step), expected, rtol=2e-6)


# ---------------------------------------------------------------------------------------------------- update by update

SHAPES = {
    "backbone.fc.kernel": (3, 5),
    "backbone.fc.bias": (5,),
    "backbone.norm1.scale": (5,),
    "decode_head.fuse.kernel": (1, 1, 5, 2),
    "decode_head.norm.bias": (2,),
}
LR, STEPS, DECAY = 0.03, 7, 0.05


def rate(step):
    """The poly schedule below: power 0.9, warm-up over two steps from a half."""
    return poly_by_hand(step, base=LR, steps=STEPS, power=0.9, warmup=2, ratio=0.5, end=0.0)


def settings_of(name):
    settings = common.get_config("streets").optim
    settings.update(name=name, lr=LR, power=0.9, warmup_steps=2, warmup_ratio=0.5, weight_decay=DECAY)
    settings.update(beta1=0.8, beta2=0.95, eps=1e-3, momentum=0.7, lr_multipliers=(("head", 10.0),))
    return settings


def group(name):
    """Learning rate multiplier and weight decay of a parameter, as torch's param groups would give them."""
    return 10.0 if name.startswith("decode_head") else 1.0, 0.0 if "norm" in name else DECAY


def adamw_by_hand(name, values, gradients):
    """torch.optim.AdamW: p *= 1 - lr * decay; p -= lr * m_hat / (sqrt(v_hat) + eps)."""
    multiplier, decay = group(name)
    m, v = np.zeros_like(values), np.zeros_like(values)
    for step, gradient in enumerate(gradients):
        lr = multiplier * rate(step)
        values = values * (1 - lr * decay)
        m = 0.8 * m + (1 - 0.8) * gradient
        v = 0.95 * v + (1 - 0.95) * gradient**2
        m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        values = values - lr * m_hat / (np.sqrt(v_hat) + 1e-3)
    return values


def sgd_by_hand(name, values, gradients):
    """torch.optim.SGD: g += decay * p; buffer = momentum * buffer + g (g at first); p -= lr * buffer."""
    multiplier, decay = group(name)
    buffer = None
    for step, gradient in enumerate(gradients):
        gradient = gradient + decay * values
        buffer = gradient if buffer is None else 0.7 * buffer + gradient
        values = values - multiplier * rate(step) * buffer
    return values


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, by_hand", [("adamw", adamw_by_hand), ("sgd", sgd_by_hand)])
def test_three_updates_equal_those_of_torch_with_param_groups(name, by_hand, seed, float64):
    rng = np.random.default_rng(seed)
    start = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
    gradients = [{key: rng.standard_normal(shape) for key, shape in SHAPES.items()} for _ in range(3)]
    transform = optim.optimizer(settings_of(name), SHAPES, steps=STEPS)
    params = jax.tree.map(jnp.array, start)
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(jax.tree.map(jnp.array, gradient), state, params)
        params = optax.apply_updates(params, updates)
    for key in SHAPES:
        expected = by_hand(key, start[key], [gradient[key] for gradient in gradients])
        np.testing.assert_allclose(params[key], expected, rtol=1e-12, err_msg=key)
        assert np.abs(expected - start[key]).max() > 1e-3, key


# --------------------------------------------------------------------------------------------- which parameters it is


@pytest.fixture(scope="module")
def b0():
    return nnx.eval_shape(lambda: segjax.create("segformer_b0", num_classes=19))


def parameter_names(model):
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def names_below(model, kind):
    """Parameters that belong to modules of one kind."""
    found = set()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, kind):
            found |= {".".join(map(str, (*path, name))) for name in ("scale", "bias")}
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_exactly_the_layer_norms_of_segformer_do_not_decay(b0, name):
    names = parameter_names(b0)
    settings = segformer.get_config("b0").optim
    settings.update(name=name, lr=0.1, warmup_steps=0)
    transform = optim.optimizer(settings, names, steps=10)
    ones = {key: jnp.ones(2) for key in names}
    # With no gradient, what moves is what decays.
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, ones), transform.init(ones), ones)
    still = {key for key in names if not np.asarray(updates[key]).any()}
    assert still == {key for key in names if "norm" in key}
    assert still == names_below(b0, layers.LayerNorm)
    # 4 patch embeddings, 4 stages, 2 in each of 8 blocks, and 1 in each of the 6 blocks that reduce; scale and bias.
    assert len(still) == 2 * (4 + 4 + 16 + 6)
    assert names_below(b0, layers.BatchNorm) == {f"decode_head.linear_fuse.bn.{part}" for part in ("scale", "bias")}
    assert not still & names_below(b0, layers.BatchNorm)


def test_exactly_the_decoder_of_segformer_learns_faster(b0):
    names = parameter_names(b0)
    settings = segformer.get_config("b0").optim
    settings.update(name="sgd", lr=0.1, warmup_steps=0, weight_decay=0.0, lr_multipliers=(("head", 10.0),))
    transform = optim.optimizer(settings, names, steps=10)
    ones = {key: jnp.ones(2) for key in names}
    updates, _ = transform.update(ones, transform.init(ones), ones)
    fast = {key for key in names if np.allclose(updates[key], -1.0)}
    slow = {key for key in names if np.allclose(updates[key], -0.1)}
    assert fast == {key for key in names if key.startswith("decode_head.")} and len(fast) == 2 * 4 + 1 + 2 + 2
    assert slow == {key for key in names if key.startswith("backbone.")}
    assert fast | slow == set(names)


def test_regular_expressions_match_anywhere_in_a_name():
    names = ["a.norm1.scale", "a.fc.bias", "b.head.norm.bias", "b.fc.kernel"]
    found = optim.found_in(r"norm\d|\.bias$", names, setting="optim.no_decay")
    assert found == {name for name in names if re.search(r"norm\d|\.bias$", name)} == set(names[:3])
    assert optim.found_in("head", iter(names), setting="optim.frozen") == {"b.head.norm.bias"}


@pytest.mark.parametrize(
    "setting, value", [("no_decay", "nrom"), ("lr_multipliers", (("head", 10.0), ("nrom", 2.0))), ("frozen", ("nrom",))]
)
def test_a_pattern_found_in_no_name_is_refused_with_its_setting(setting, value):
    settings = settings_of("adamw")
    settings[setting] = value
    message = rf"optim\.{setting}: 'nrom' is found in no parameter.*'backbone.fc.kernel' and 'decode_head.norm.bias'"
    with pytest.raises(ValueError, match=message):
        optim.frozen_names(settings.frozen, SHAPES)
        optim.optimizer(settings, SHAPES, steps=STEPS)


def test_without_a_pattern_everything_decays():
    settings = settings_of("sgd")
    settings.update(no_decay="", lr_multipliers=(), warmup_steps=0, momentum=0.0)
    transform = optim.optimizer(settings, SHAPES, steps=STEPS)
    ones = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, ones), transform.init(ones), ones)
    for name in SHAPES:
        np.testing.assert_allclose(updates[name], -LR * DECAY, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_pattern_may_match_only_frozen_parameters(name, float64):
    # All norms and the whole head: the patterns of the recipe are then found in no parameter that is trained.
    trained = {key: shape for key, shape in SHAPES.items() if key.startswith("backbone.fc")}
    settings = settings_of(name)
    settings.frozen = ("norm", "head")
    assert optim.frozen_names(settings.frozen, SHAPES) == SHAPES.keys() - trained.keys()
    rng = np.random.default_rng(4)
    start = {key: jnp.array(rng.standard_normal(shape)) for key, shape in trained.items()}
    gradients = {key: rng.standard_normal(shape) for key, shape in trained.items()}
    transform = optim.optimizer(settings, SHAPES, steps=STEPS)
    updates, _ = transform.update(jax.tree.map(jnp.array, gradients), transform.init(start), start)
    by_hand = {"adamw": adamw_by_hand, "sgd": sgd_by_hand}[name]
    for key in trained:
        expected = by_hand(key, np.asarray(start[key]), [gradients[key]]) - start[key]
        np.testing.assert_allclose(updates[key], expected, rtol=1e-10, err_msg=key)


def test_patterns_that_freeze_everything_are_refused():
    with pytest.raises(ValueError, match=r"optim\.frozen: \('backbone', 'head'\) leave no parameter to train"):
        optim.frozen_names(("backbone", "head"), SHAPES)


def test_multipliers_of_the_same_parameter_are_multiplied():
    pairs = (("head", 10.0), (r"\.bias$", 2.0), ("norm", 0.5))
    assert optim.lr_factors(pairs, SHAPES) == {
        "backbone.fc.kernel": 1.0,
        "backbone.fc.bias": 2.0,
        "backbone.norm1.scale": 0.5,
        "decode_head.fuse.kernel": 10.0,
        "decode_head.norm.bias": 10.0 * 2.0 * 0.5,
    }
    settings = settings_of("sgd")
    settings.update(lr_multipliers=pairs, weight_decay=0.0, warmup_steps=0, momentum=0.0)
    transform = optim.optimizer(settings, SHAPES, steps=STEPS)
    ones = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    updates, _ = transform.update(ones, transform.init(ones), ones)
    for name, factor in (("backbone.fc.kernel", 1.0), ("backbone.norm1.scale", 0.5), ("decode_head.norm.bias", 10.0)):
        np.testing.assert_allclose(updates[name], -LR * factor, rtol=1e-6)


def test_the_log_has_the_base_rate_and_one_for_every_trained_factor():
    settings = settings_of("adamw")
    settings.lr_multipliers = (("head", 10.0), (r"\.bias$", 0.25))
    rates = optim.learning_rates(settings, SHAPES, steps=STEPS)
    for step in (0, 1, 4, STEPS):
        found = rates(step)
        assert list(found) == ["lr", "lr x0.25", "lr x2.5", "lr x10"]
        expected = rate(step) * np.array([1, 0.25, 2.5, 10])
        np.testing.assert_allclose(list(found.values()), expected, rtol=2e-6, atol=1e-12)
    settings.frozen = ("head",)
    assert list(optim.learning_rates(settings, SHAPES, steps=STEPS)(0)) == ["lr", "lr x0.25"]
    settings.lr_multipliers = ()
    assert list(optim.learning_rates(settings, SHAPES, steps=STEPS)(0)) == ["lr"]


# ------------------------------------------------------------------------------------------------------ decay by depth

# Family of `tests.tiny.FAMILIES`, what its depths are, and the depth of names that begin so; all others are the head's.
_TWO = dict(depths=(1, 2, 1, 1))
_MIT = {
    "backbone.patch_embed1": 0,
    "backbone.block1.0.": 1,
    "backbone.norm1.": 1,
    "backbone.patch_embed2": 2,
    "backbone.block2.0.": 2,
    "backbone.block2.1.": 3,
    "backbone.norm2.": 3,
    "backbone.patch_embed3": 4,
    "backbone.block3.0.": 4,
    "backbone.norm3.": 4,
    "backbone.patch_embed4": 5,
    "backbone.block4.0.": 5,
    "backbone.norm4.": 5,
}
_HRNET = {
    ("conv1.", "conv2.", "bn1.", "bn2."): 0,
    "layer1.0.": 1,
    "layer1.1.": 2,
    ("transition1.", "stage2.0.branches.0.0.", "stage2.0.branches.1.0.", "stage2.0.fuse_layers."): 3,
    ("transition2.", "stage3.0.branches.0.0.", "stage3.0.branches.1.0.", "stage3.0.branches.2.0."): 4,
    ("stage3.0.branches.0.1.", "stage3.0.branches.1.1.", "stage3.0.branches.2.1.", "stage3.0.fuse_layers."): 5,
    ("stage3.1.branches.0.0.", "stage3.1.branches.1.0.", "stage3.1.branches.2.0."): 6,
    ("stage3.1.branches.0.1.", "stage3.1.branches.1.1.", "stage3.1.branches.2.1.", "stage3.1.fuse_layers."): 7,
    ("transition3.", *(f"stage4.0.branches.{branch}.0." for branch in range(4)), "stage4.0.fuse_layers."): 8,
}
_TWO_MODULES = dict(stage_modules=(1, 1, 2, 1), stage_blocks=(2, 1, 2, 1))
DEPTHS = {
    "segformer": (_TWO, _MIT, 6),
    "plain": (_TWO, _MIT, 6),
    "mmseg": (_TWO, _MIT, 6),
    "segnext": (_TWO, _MIT, 6),
    "simple": (
        _TWO,
        {
            "mit.stages.0.1.": 0,
            "mit.stages.0.2.0.": 1,
            ("mit.stages.1.1.", "mit.stages.1.2.0."): 2,
            "mit.stages.1.2.1.": 3,
            ("mit.stages.2.1.", "mit.stages.2.2.0."): 4,
            ("mit.stages.3.1.", "mit.stages.3.2.0."): 5,
        },
        6,
    ),
    "zuppichini": (
        _TWO,
        {
            "encoder.stages.0.overlap_patch_merge.": 0,
            ("encoder.stages.0.blocks.0.", "encoder.stages.0.norm."): 1,
            ("encoder.stages.1.overlap_patch_merge.", "encoder.stages.1.blocks.0."): 2,
            ("encoder.stages.1.blocks.1.", "encoder.stages.1.norm."): 3,
            "encoder.stages.2.": 4,
            "encoder.stages.3.": 5,
        },
        6,
    ),
    "hrnet": (_TWO_MODULES, _HRNET, 9),
    "ocr": (_TWO_MODULES, _HRNET, 9),
}


@pytest.mark.parametrize("family", DEPTHS)
def test_rates_decay_with_the_depth_in_the_table(family):
    sizes, table, head = DEPTHS[family]
    names = parameter_names(abstract_family(family, **sizes))
    settings = common.get_config("streets").optim
    settings.update(layer_decay=0.5, no_decay="", lr_multipliers=((r"\.bias$", 3.0),))
    found = optim.rules(settings, names)
    used = set()
    for name in names:
        prefixes = [prefix for prefix in table if name.startswith(prefix)]
        assert len(prefixes) <= 1, name
        used.update(prefixes)
        depth = table[prefixes[0]] if prefixes else head
        expected = 0.5 ** (head - depth) * (3 if name.endswith(".bias") else 1)
        assert found[name].factor == expected, name
    assert used == set(table) and any(rule.factor == 1 for rule in found.values())


def test_updates_decay_with_depth_and_the_log_has_only_the_multipliers():
    settings = settings_of("sgd")
    settings.update(layer_decay=0.5, lr_multipliers=(("head", 10.0),), weight_decay=0.0, warmup_steps=0, momentum=0.0)
    settings.no_decay = ""
    names = ["backbone.patch_embed1.proj.kernel", "backbone.block1.0.fc.kernel", "decode_head.fc.kernel"]
    ones = {name: jnp.ones((2, 3)) for name in names}
    transform = optim.optimizer(settings, names, steps=STEPS)
    updates, _ = transform.update(ones, transform.init(ones), ones)
    for name, factor in zip(names, (0.25, 0.5, 10.0), strict=True):
        np.testing.assert_allclose(updates[name], -LR * factor, rtol=1e-6)
    assert list(optim.learning_rates(settings, names, steps=STEPS)(0)) == ["lr", "lr x10"]


def test_layer_decay_for_unknown_parameters_is_refused():
    settings = settings_of("sgd")
    settings.layer_decay = 0.9
    with pytest.raises(ValueError, match=r"optim\.layer_decay: the depths of a model with parameters like 'backbone"):
        optim.rules(settings, SHAPES)
    with pytest.raises(ValueError, match=r"optim\.layer_decay: the depth of the parameter 'backbone\.pos_embed' is"):
        settings.update(no_decay="", lr_multipliers=())
        optim.rules(settings, ["backbone.block1.0.fc.kernel", "backbone.pos_embed"])


# ------------------------------------------------------------------------------------------------- optimizers of optax


def lion_by_hand(name, values, gradients):
    """Chen et al., 2023, algorithm 2, with b1 = 0.8 and optax's b2 = 0.99."""
    multiplier, decay = group(name)
    m = np.zeros_like(values)
    for step, gradient in enumerate(gradients):
        lr = multiplier * rate(step)
        values = values - lr * (np.sign(0.8 * m + 0.2 * gradient) + decay * values)
        m = 0.99 * m + 0.01 * gradient
    return values


def muon_by_hand(name, values, gradients):
    """Jordan et al., 2024, for matrices, with Nesterov momentum and optax's factor of shape; otherwise Adam without
    decay."""
    multiplier, decay = group(name)
    m, v = np.zeros_like(values), np.zeros_like(values)
    for step, gradient in enumerate(gradients):
        lr = multiplier * rate(step)
        if values.ndim == 2:
            m = 0.9 * m + (1 - 0.9) * gradient
            ahead = 0.9 * m / (1 - 0.9 ** (step + 2)) + (1 - 0.9) * gradient / (1 - 0.9 ** (step + 1))
            x = ahead.T if ahead.shape[0] > ahead.shape[1] else ahead
            x = x / (np.linalg.norm(x) + 1e-8)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            x = x.T if ahead.shape[0] > ahead.shape[1] else x
            update = x * np.sqrt(max(1, x.shape[1] / x.shape[0])) + decay * values
        else:
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            ahead = 0.9 * m / (1 - 0.9 ** (step + 2)) + 0.1 * gradient / (1 - 0.9 ** (step + 1))
            update = ahead / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        values = values - lr * update
    return values


@pytest.mark.parametrize(
    "name, options, by_hand",
    [("optax.lion", {"b1": 0.8}, lion_by_hand), ("optax.contrib.muon", {"beta": 0.9}, muon_by_hand)],
)
def test_an_optimizer_of_optax_follows_schedule_decay_and_multipliers(name, options, by_hand, float64):
    rng = np.random.default_rng(3)
    start = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
    gradients = [{key: rng.standard_normal(shape) for key, shape in SHAPES.items()} for _ in range(3)]
    settings = settings_of(name)
    settings.options = options
    optim.check(settings)
    assert not optim.can_stack(settings)
    transform = optim.optimizer(settings, SHAPES, steps=STEPS)
    params = jax.tree.map(jnp.array, start)
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(jax.tree.map(jnp.array, gradient), state, params)
        params = optax.apply_updates(params, updates)
    for key in SHAPES:
        expected = by_hand(key, start[key], [gradient[key] for gradient in gradients])
        np.testing.assert_allclose(params[key], expected, rtol=1e-6, err_msg=key)
    # A step that is not accepted leaves the state as it is.
    _, after = transform.update(jax.tree.map(jnp.array, gradients[0]), state, params, accepted=jnp.array(False))
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "name, given, key, problem",
    [
        ("optax.lyon", {}, "optim.name", "has no such function; did you mean optax.lion?"),
        ("optax.contrib.munon", {}, "optim.name", "did you mean optax.contrib.muon?"),
        ("optax._src.alias.lion", {}, "optim.name", "has no such function"),
        ("optax.contrib.sam", {}, "optim.name", "has no learning_rate"),
        ("optax.contrib", {}, "optim.name", "has no such function"),
        ("optax.contribs.muon", {}, "optim.name", "has no such function"),
        ("optax.AdaptState", {}, "optim.name", "has no such function"),
        ("optax.ScaleByAdamState", {}, "optim.name", "has no such function"),
        ("optax.ScalarOrSchedule", {}, "optim.name", "has no"),
        ("optax.contrib.schedule_free_adamw", {}, "optim.name", "needs other weights for evaluation"),
        ("optax.lbfgs", {"weight_decay": 0.0}, "optim.name", "'optax.lbfgs'; cannot be used for training: "),
        ("optax.adam", {}, "optim.weight_decay", "0.05; optax.adam has no weight decay; set 0"),
        ("optax.contrib.prodigy", {}, "optim.no_decay", "'norm'; optax.contrib.prodigy decays all parameters; set ''"),
        ("optax.lion", {"options": {"beta": 0.9}}, "optim.options", "optax.lion has no beta; it has b1, b2, mu_dtype"),
        ("optax.lion", {"options": {"learning_rate": 1.0}}, "optim.options", "learning_rate of optax.lion are other"),
        ("adamw", {"options": {"b1": 0.9}}, "optim.options", "adamw has settings of its own"),
    ],
)
def test_settings_that_an_optax_optimizer_cannot_follow_are_refused(name, given, key, problem):
    settings = settings_of(name)
    settings.update(given)
    with pytest.raises(optim.SettingError) as caught:
        optim.check(settings)
    assert caught.value.key == key and problem in caught.value.problem


@pytest.mark.parametrize(
    "name", ["adam", "adamax", "lamb", "lars", "adan", "nadamw", "rmsprop", "sgd", "contrib.ademamix"]
)
def test_other_optimizers_of_optax_are_usable(name):
    settings = settings_of(f"optax.{name}")
    settings.update(weight_decay=0.0, no_decay="")
    optim.check(settings)


# ------------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("largest, share", [(2.0, 2.0 / 13), (13.0, 1.0), (100.0, 1.0)])
def test_gradients_are_scaled_down_to_the_norm_over_all_parameters(largest, share, float64):
    # Norm 13, of which no parameter alone has more than 12.
    gradients = {"a": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([12.0])}
    transform = optim.clip_by_norm(largest)
    clipped, _ = transform.update(gradients, transform.init(gradients))
    for name, gradient in gradients.items():
        # 1e-6 is added to the norm.
        np.testing.assert_allclose(clipped[name], share * gradient, rtol=2e-7, err_msg=name)
    if largest > 13:
        assert all(np.array_equal(clipped[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_gradients_are_clipped_before_decay_momentum_and_moments(name, float64):
    rng = np.random.default_rng(5)
    start = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
    # The second of three lies below the bound.
    gradients = [
        {key: size * rng.standard_normal(shape) for key, shape in SHAPES.items()} for size in (3.0, 0.01, 50.0)
    ]
    settings = settings_of(name)
    settings.clip_norm = 0.5
    transform = optim.optimizer(settings, SHAPES, steps=STEPS)
    params = jax.tree.map(jnp.array, start)
    state, clipped = transform.init(params), []
    for gradient in gradients:
        updates, state = transform.update(jax.tree.map(jnp.array, gradient), state, params)
        params = optax.apply_updates(params, updates)
        total = np.sqrt(sum(np.square(value).sum() for value in gradient.values()))
        clipped.append({key: value * min(1, 0.5 / (total + 1e-6)) for key, value in gradient.items()})
    by_hand = {"adamw": adamw_by_hand, "sgd": sgd_by_hand}[name]
    for key in SHAPES:
        expected = by_hand(key, start[key], [gradient[key] for gradient in clipped])
        np.testing.assert_allclose(params[key], expected, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_update_changes_nothing_and_an_accepted_one_is_optaxs(name, monkeypatch, float64):
    settings = settings_of(name)
    transform = optim.optimizer(settings, SHAPES, steps=STEPS)
    with monkeypatch.context() as patch:
        # optax's own rules, which know of nothing refused.
        patch.setattr(optim, "_scale_by_adam", optax.scale_by_adam)
        patch.setattr(optim, "_if_accepted", lambda rule: rule)
        plain = optim.optimizer(settings, SHAPES, steps=STEPS)

    def chosen(accepted, new, old):
        return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)

    @jax.jit
    def refusing(params, state, gradients, accepted):
        updates, state = transform.update(gradients, state, params, accepted=accepted)
        return chosen(accepted, optax.apply_updates(params, updates), params), state

    @jax.jit
    def choosing(params, state, gradients, accepted):
        updates, new = plain.update(gradients, state, params)
        return chosen(accepted, (optax.apply_updates(params, updates), new), (params, state))

    rng = np.random.default_rng(0)
    params = {key: jnp.array(rng.normal(size=shape)) for key, shape in SHAPES.items()}
    one, other = (params, transform.init(params)), (params, plain.init(params))
    for step in range(7):
        # The very first is refused too, before there are moments.
        accepted = step % 3 != 0
        factor = 1.0 if accepted else np.nan
        gradients = {key: jnp.array(factor * rng.normal(size=shape)) for key, shape in SHAPES.items()}
        before = one
        one, other = refusing(*one, gradients, accepted), choosing(*other, gradients, accepted)
        if not accepted:
            jax.tree.map(np.testing.assert_array_equal, one, before)
        # Two programs: XLA may contract the products and sums of each in another way.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-15), one, other)
    assert np.isfinite(one[0][next(iter(SHAPES))]).all()

"""Models by name: published sizes and initial weights, settings, refusals, precision, and the two modes."""

import copy
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import segjax
from segjax import layers, models
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.state_dict import named_variables
from segjax.models import segnext
from segjax.models.functional import FunctionalModel
from tests.tiny import FAMILIES, abstract_family, abstract_model, numpy_draws, tiny_model

# What the published models hold at 19 classes, without NVlabs' unused conv_seg. Counted on the originals, but for plain
# b1 to b4 (official without its BatchNorm, 2 C, and with a bias, C) and HRNet W32's heads (layer by layer).
PARAMETERS = {
    "segformer_b0": 3_719_027,
    "segformer_b1": 13_682_131,
    "segformer_b2": 27_361_235,
    "segformer_b3": 47_237_075,
    "segformer_b4": 64_007_635,
    "segformer_b5": 84_607_955,
    "segformer_plain_b0": 3_718_771,
    # Its decoder is 768 wide.
    "segformer_plain_b1": 16_315_603,
    "segformer_plain_b2": 27_361_235 - 768,
    "segformer_plain_b3": 47_237_075 - 768,
    "segformer_plain_b4": 64_007_635 - 768,
    "segformer_plain_b5": 84_607_187,
    "segformer_mmseg_b0": 3_720_051,
    "segformer_mmseg_b1": 13_683_155,
    "segformer_mmseg_b2": 24_728_019,
    "segformer_mmseg_b3": 44_603_859,
    "segformer_mmseg_b4": 61_374_419,
    "segformer_mmseg_b5": 81_974_739,
    "segformer_simple": 7_722_099,
    # At 100 classes, as in the article, 17,808,356.
    "segformer_zuppichini": 17_808_356 - 81 * 257,
    "hrnet_w18": 9_641_119,
    "hrnet_w32": 29_546_515,
    "hrnet_w48": 65_859_379,
    "hrnet_w18_ocr": 12_080_818,
    "hrnet_w32_ocr": 32_953_894,
    "hrnet_w48_ocr": 70_372_678,
    "segnext_t": 4_229_747,
    "segnext_s": 13_899_219,
    "segnext_b": 27_569_107,
    "segnext_l": 48_792_275,
}
B5 = dict(dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), decoder_dim=768)
OTHER_SIZES = [
    ("segformer_b0", 150, {}, 3_752_694),
    ("segformer_b1", 150, {}, 13_715_798),
    ("segformer_b2", 150, {}, 27_461_974),
    ("segformer_b3", 150, {}, 47_337_814),
    ("segformer_b4", 150, {}, 64_108_374),
    ("segformer_b5", 150, {}, 84_708_694),
    ("segformer_plain_b0", 19, dict(fuse="conv_bn"), 3_719_283),
    ("segformer_plain_b5", 19, dict(fuse="conv_bn"), 84_608_723),
    ("segformer_simple", 19, B5 | dict(mlp_ratios=(4, 4, 4, 4)), 174_780_307),
    ("segformer_zuppichini", 100, {}, 17_808_356),
    (
        "segformer_zuppichini",
        19,
        dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), num_heads=(1, 2, 5, 8)),
        3_270_515,
    ),
    ("segformer_zuppichini", 19, B5 | dict(num_heads=(1, 2, 5, 8)), 70_373_011),
]
# What the encoders alone hold; the first words of the names of everything else.
MIT = {"b0": 3_319_392, "b1": 13_151_424, "b2": 24_196_288, "b3": 44_072_128, "b4": 60_842_688, "b5": 81_443_008}
ENCODERS = (
    {f"segformer_{form}{size}": count for form in ("", "plain_", "mmseg_") for size, count in MIT.items()}
    | {f"hrnet_{width}": n for width, n in (("w18", 9_562_260), ("w32", 29_305_536), ("w48", 65_325_120))}
    | {f"hrnet_{width}_ocr": n for width, n in (("w18", 9_562_260), ("w32", 29_305_536), ("w48", 65_325_120))}
    | {"segnext_t": 3_903_584, "segnext_s": 13_450_176, "segnext_b": 26_277_824, "segnext_l": 44_636_864}
)
HEADS = ("decode_head", "last_layer", "conv3x3_ocr", "ocr_distri_head", "cls_head", "aux_head")

# Sides: some that no stage divides evenly, upright and wide; families that upsample by whole factors take no others.
ANY, MULTIPLES = ((33, 64), (65, 97), (96, 40)), ((32, 64), (96, 32), (64, 160))
PICKY = ("simple", "zuppichini")
WITHOUT_BATCH_NORM = ("plain", "simple")
# What draws in training: settings, and whether every sample has a draw of its own.
HALF = dict(drop_path_rate=0.5, dropout_rate=0.5)
RANDOM = {
    "segformer": (HALF, True),
    "plain": (HALF, True),
    "plain with norm": (HALF, True),
    "mmseg": (HALF, True),
    "zuppichini": (dict(drop_path_rate=0.9), False),
    "ocr": (dict(dropout_rate=0.5), True),
    # Nothing is dropped: the bases alone.
    "segnext": (dict(drop_path_rate=0.0, dropout_rate=0.0), True),
}

# One program instead of a compilation per operation.
call = nnx.jit(lambda model, x: model(x)[0])
call_for_taps = nnx.jit(lambda model, x: model(x)[1])
call_with_bases = nnx.jit(lambda model, x, bases: model(x, bases=bases)[0])


def images(seed, batch=4, size=(32, 64), dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((batch, *size, 3)).astype(dtype)


def parameters(model):
    return {name: v.get_value() for name, v in named_variables(model).items() if isinstance(v, nnx.Param)}


def statistics(model):
    return {name: np.asarray(v[...]) for name, v in named_variables(model).items() if isinstance(v, nnx.BatchStat)}


# --------------------------------------------------------------------------------------------------- names and sizes


def test_every_name_is_a_published_model():
    assert list(segjax.MODELS) == list(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    sizes = {key: value.size for key, value in parameters(abstract_model(name)).items()}
    assert sum(sizes.values()) == PARAMETERS[name]
    if name in ENCODERS:
        assert sum(size for key, size in sizes.items() if not key.startswith(HEADS)) == ENCODERS[name]


@pytest.mark.parametrize("name, num_classes, overrides, count", OTHER_SIZES)
def test_parameter_counts_of_other_published_sizes_are_right(name, num_classes, overrides, count):
    model = abstract_model(name, num_classes, **overrides)
    assert sum(value.size for value in parameters(model).values()) == count
    assert (model.spec.name, model.spec.num_classes) == (name, num_classes)
    assert dict(model.spec.overrides) == overrides


def test_settings_are_the_arguments_of_create_with_their_defaults():
    shared = ["in_channels", "dims", "depths", "decoder_dim", "num_heads", "mlp_ratios", "sr_ratios"]
    rates, eps = ["drop_path_rate", "dropout_rate"], ["block_norm_eps", "patch_norm_eps"]
    widths = ["in_channels", "width", "stage1_channels", "stage_modules", "stage_blocks", "align_corners"]
    expected = {
        "segformer_b2": shared + rates + eps,
        "segformer_plain_b2": [*shared, "fuse", *rates, *eps],
        "segformer_mmseg_b2": shared + rates + eps,
        "segformer_simple": shared,
        "segformer_zuppichini": [*shared, "drop_path_rate"],
        "hrnet_w32": widths,
        "hrnet_w32_ocr": [*widths, "ocr_channels", "ocr_key_channels", "dropout_rate"],
        "segnext_b": ["in_channels", "dims", "depths", "ham_channels", "ham_rank", "mlp_ratios", *rates],
    }
    for name, keys in expected.items():
        assert sorted(models.settings(name)) == sorted(keys), name
    defaults = {
        ("segformer_b1", "depths"): (2, 2, 2, 2),
        ("segformer_b1", "decoder_dim"): 256,
        ("segformer_b1", "dropout_rate"): 0.1,
        ("segformer_plain_b2", "dropout_rate"): 0.0,
        ("segformer_mmseg_b5", "decoder_dim"): 256,
        ("segformer_mmseg_b5", "patch_norm_eps"): 1e-6,
        ("segformer_b5", "patch_norm_eps"): 1e-5,
        ("hrnet_w48", "align_corners"): False,
        ("hrnet_w48_ocr", "align_corners"): True,
        ("hrnet_w48_ocr", "width"): 48,
        ("segnext_t", "ham_rank"): 16,
        ("segnext_b", "ham_rank"): 64,
        ("segnext_b", "drop_path_rate"): 0.1,
        ("segnext_l", "drop_path_rate"): 0.3,
    }
    assert {(name, key): models.settings(name)[key] for name, key in defaults} == defaults


# ---------------------------------------------------------------------------------------------------------- refusals


def test_unknown_names_are_refused_with_the_existing_ones():
    with pytest.raises(KeyError, match=r"Did you mean 'segformer_b\d'\? The models are segformer_b0, .*segnext_l"):
        segjax.create("segformer_bo", num_classes=5)
    with pytest.raises(KeyError, match="no model 'unet'"):
        models.settings("unet")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        segjax.create("segformer_b0", num_classes=0)
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        segjax.create("segformer_b0", num_classes=5, dtype=jnp.float64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_unknown_setting_is_refused_with_the_existing_ones(name):
    with pytest.raises(TypeError) as caught:
        segjax.create(name, num_classes=5, decoder_width=3)
    assert f"{name} has no setting decoder_width; it has " in str(caught.value)
    assert all(key in str(caught.value) for key in models.settings(name))


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("segformer_b0", dict(dims=(1, 2, 3)), r"dims needs four numbers, one per stage; got \(1, 2, 3\)"),
        ("segformer_plain_b0", dict(depths=(1, 1, 1, 1, 1)), "depths needs four numbers"),
        ("segformer_mmseg_b0", dict(sr_ratios=(8, 4)), "sr_ratios needs four numbers"),
        ("segformer_simple", dict(mlp_ratios=4), "mlp_ratios needs four numbers, one per stage; got 4"),
        ("segformer_zuppichini", dict(num_heads=(1,)), "num_heads needs four numbers"),
        ("hrnet_w18", dict(stage_modules=(1, 1, 1)), "stage_modules needs four numbers"),
        ("hrnet_w18_ocr", dict(stage_blocks=[4] * 5), "stage_blocks needs four numbers"),
        ("segnext_t", dict(dims=(8, 16, 32)), "dims needs four numbers"),
        ("segformer_b0", dict(dims=(4, 8, 11, 16)), "stage 3: width 11 does not divide into 5 heads; set num_heads"),
        ("segformer_plain_b0", dict(num_heads=(1, 3, 5, 8)), "stage 2: width 64 does not divide into 3 heads"),
        ("segformer_mmseg_b0", dict(num_heads=(1, 2, 5, 7)), "stage 4: width 256 does not divide into 7 heads"),
        ("segformer_simple", dict(num_heads=(5, 2, 5, 8)), "stage 1: width 32 does not divide into 5 heads"),
        ("segformer_zuppichini", dict(num_heads=(1, 2, 5, 8)), "stage 3: width 256 does not divide into 5 heads"),
        ("segformer_plain_b0", dict(fuse="bn"), "fuse is one of 'conv', 'conv_bn'; got 'bn'"),
        ("segformer_zuppichini", dict(mlp_ratios=(4, 4, 2.5, 4)), r"mlp_ratios must be whole.*got \(4, 4, 2.5, 4\)"),
        ("hrnet_w18", dict(stage_modules=(2, 1, 4, 3)), "stage_modules: the first stage has one module; got 2"),
        ("hrnet_w48_ocr", dict(stage_modules=(3, 1, 4, 3)), "the first stage has one module; got 3"),
        ("segnext_t", dict(ham_channels=48, depths=(1, 1, 1, 1)), "48 channels do not divide into 32 groups"),
        ("segformer_b0", dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\); got 1.0"),
        ("segnext_t", dict(drop_path_rate=-0.1), r"drop_path_rate must be in \[0, 1\); got -0.1"),
        ("segnext_t", dict(ham_rank=0), "ham_rank must be positive and at most 65536; got 0"),
        ("segformer_b0", dict(decoder_dim=10**12), "decoder_dim must be positive and at most 65536; got 1000000000000"),
        ("segformer_b0", dict(block_norm_eps=float("inf")), "block_norm_eps must be positive and at most 65536"),
        ("segformer_b0", dict(depths=(2, 2, 0, 2)), r"depths must be positive and at most 65536; got \(2, 2, 0, 2\)"),
        ("segformer_b0", dict(depths=(3000, 2, 2, 2)), r"depths must be at most 512 together; got \(3000, 2, 2, 2\)"),
        ("segnext_t", dict(depths=(200, 200, 100, 13)), "depths must be at most 512 together"),
        ("hrnet_w18", dict(stage_modules=(1, 1, 600, 3)), "stage_modules must be at most 512 together"),
        (
            "hrnet_w18",
            dict(stage_modules=(1, 100, 4, 3)),
            "stage_modules and stage_blocks give 900 blocks; the maximum is 512",
        ),
    ],
)
def test_incompatible_settings_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: segjax.create(name, num_classes=5, **overrides))


def outputs(family, size, *, batch=2, channels=3, **overrides):
    """Shapes of logits and taps."""
    return nnx.eval_shape(
        lambda model: model(jnp.zeros((batch, *size, channels))), abstract_family(family, **overrides)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_another_rank_or_without_three_channels_are_refused(family):
    model = abstract_family(family)
    for shape in ((64, 96, 3), (2, 3, 64, 96), (2, 64, 96, 4), (1, 2, 64, 96, 3)):
        with pytest.raises(ValueError, match=r"\(B, H, W, 3\); got " + re.escape(str(shape))):
            model(jnp.zeros(shape))


@pytest.mark.parametrize("family", ["segformer", "plain", "mmseg"])
def test_images_that_are_too_small_are_refused_with_the_smallest_size(family):
    with pytest.raises(ValueError, match="29x29"):
        outputs(family, (28, 64))
    assert outputs(family, (29, 64))[0].shape == (2, 8, 16, 5)


@pytest.mark.parametrize("family", PICKY)
@pytest.mark.parametrize("size, named", [((65, 96), "96x96"), ((64, 360), "64x384"), ((20, 31), "32x32")])
def test_images_not_divisible_by_32_are_refused_with_a_size_to_use(family, size, named):
    with pytest.raises(ValueError, match=rf"divide by 32; got {size[0]}x{size[1]}.* for example to {named}\b"):
        outputs(family, size)


# ------------------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_taps_have_the_documented_shapes(family):
    sizes = FAMILIES[family][1]
    widths = sizes.get("dims") or [sizes["width"] * 2**level for level in range(4)]
    for size in MULTIPLES if family in PICKY else ANY:
        logits, taps = outputs(family, size)

        def over(stride, size=size):
            return tuple(-(-side // stride) for side in size)

        assert logits.shape == (2, *over(8 if family == "segnext" else 4), 5) and logits.dtype == jnp.float32
        auxiliary = {"aux_logits"} if family == "ocr" else set()
        assert set(taps) == {f"feature{i}" for i in range(4)} | auxiliary
        for i, width in enumerate(widths):
            assert taps[f"feature{i}"].shape == (2, *over(4 * 2**i), width)
        for name in auxiliary:
            assert taps[name].shape == logits.shape and taps[name].dtype == jnp.float32


# -------------------------------------------------------------------------------------------------- initial weights

# A drawn parameter is normal or uniform of a scale that follows from its shape, the rest are constants.
NORMS = {r"(scale|g|var)": 1.0, r"(bias|b|mean)": 0.0}


def fan_out_std(shape):
    # Depthwise kernels are (kh, kw, 1, C) and have a fan_out of their window alone.
    return math.sqrt(2 / (math.prod(shape[:2]) * (1 if shape[2] == 1 else shape[3])))


def fan_in_bound(shape):
    return 1 / math.sqrt(math.prod(shape[:-1]))


def xavier_bound(shape):
    # Of torch's joint projection of queries, keys and values, (3C, C), for any part of it.
    return math.sqrt(6 / (4 * min(shape)))


def constant(value):
    return "constant", lambda shape: value


MIT_LINEAR = ("normal", lambda shape: 0.02)
FAN_OUT, FAN_IN = ("normal", fan_out_std), ("uniform", fan_in_bound)
LINEAR_FAN_OUT = ("normal", lambda shape: math.sqrt(2 / shape[1]))
CLASSIFIER, HRNET_CONV = ("normal", lambda shape: 0.01), ("normal", lambda shape: 0.001)
BIAS_FAN_IN = ("bias", None)  # uniform within that of its kernel
# By regular expression over names, the first that matches.
NORM_VALUES = {r".*\.(scale|g)": constant(1.0), r".*\.b|.*(norm|bn|gn|_bn)\d?\.bias": constant(0.0)}
MIT_WEIGHTS = {
    r"backbone\..*(\.attn\.(q|kv|proj)|fc[12])\.kernel": MIT_LINEAR,
    r"backbone\..*\.(proj|sr|dwconv)\.kernel": FAN_OUT,
    r".*linear_fuse\.(conv\.)?kernel": FAN_OUT,
    r".*bias": constant(0.0),
}
INITIAL = {
    "segformer": {
        r"decode_head\.linear_(c\d\.proj|pred)\.kernel": FAN_IN,
        r"decode_head\.linear_(c\d\.proj|pred)\.bias": BIAS_FAN_IN,
    }
    | MIT_WEIGHTS,
    "plain": {
        r"decode_head\.linear_c\d\.proj\.kernel": MIT_LINEAR,
        r"decode_head\.linear_pred\.kernel": FAN_OUT,
    }
    | MIT_WEIGHTS,
    "mmseg": {
        r".*attn\.(q|kv)\.kernel": ("uniform", xavier_bound),
        r".*attn\.proj\.kernel": MIT_LINEAR,
        r".*fc[12]\.kernel": LINEAR_FAN_OUT,
        r"decode_head\.conv_seg\.kernel": CLASSIFIER,
        r".*kernel": FAN_OUT,
        r".*bias": constant(0.0),
    },
    "simple": {r".*kernel": FAN_IN, r".*bias": BIAS_FAN_IN},
    "zuppichini": {
        r".*in_proj_weight": ("uniform", xavier_bound),
        r".*in_proj_bias|.*out_proj\.bias": constant(0.0),
        r".*(overlap_patch_merge|reducer)\.1\.bias|.*fn\.0\.bias|.*fuse\.2\.bias": constant(0.0),
        r".*kernel": FAN_IN,
        r".*bias": BIAS_FAN_IN,
    },
    "hrnet": {
        r".*kernel": HRNET_CONV,
        r"last_layer\.[03]\.bias": BIAS_FAN_IN,
        r".*bias": constant(0.0),
    },
    "ocr": {
        r"(conv3x3_ocr|ocr_distri_head|cls_head|aux_head)\..*kernel": FAN_IN,
        r".*kernel": HRNET_CONV,
        r"(aux_head\.[03]|conv3x3_ocr\.0|cls_head)\.bias": BIAS_FAN_IN,
        r".*bias": constant(0.0),
    },
    "segnext": {
        r".*layer_scale_[12]": constant(1e-2),
        r"decode_head\.conv_seg\.kernel": CLASSIFIER,
        r".*kernel": FAN_OUT,
        r".*bias": constant(0.0),
    },
}


@functools.cache
def drawn(family, seed):
    """Initial parameters by name, and the keys of the random streams."""
    name, sizes = FAMILIES[family]
    with numpy_draws():
        model = segjax.create(name, num_classes=5, seed=seed, **sizes)
    streams = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model, nnx.RngKey))]
    values = {key: np.asarray(value) for key, value in parameters(model).items()}
    return values, [np.asarray(jax.random.key_data(key)) for key in streams]


@pytest.mark.parametrize("family", INITIAL)
def test_initial_weights_are_the_published_ones(family):
    values, _ = drawn(family, 3)
    pools = {"normal": [], "uniform": [], "bias": []}
    for name, value in values.items():
        rules = NORM_VALUES | INITIAL[family]
        kind, scale = next(rule for pattern, rule in rules.items() if re.fullmatch(pattern, name))
        if kind == "constant":
            np.testing.assert_array_equal(value, np.float32(scale(value.shape)), err_msg=name)
            continue
        scale = scale or (lambda _, name=name: fan_in_bound(values[name.removesuffix("bias") + "kernel"].shape))
        standard = value.ravel() / scale(value.shape)
        pools[kind].append(standard)
        if kind == "normal" and value.size > 100:
            assert abs(standard.std() - 1) < 5 / math.sqrt(2 * value.size), name
        if kind == "uniform" and value.size > 100:
            assert 0.9 < np.abs(standard).max() <= 1, name
    normal, uniform, biases = (np.concatenate(pool) if pool else None for pool in pools.values())
    if normal is not None:
        bound = 5 / math.sqrt(normal.size)
        assert abs(normal.mean()) < bound and abs(normal.std() - 1) < bound
        # Not cut anywhere near: of a normal 4.6% lie beyond two standard deviations.
        assert abs((np.abs(normal) > 2).mean() - 0.0455) < bound
    for pool in (uniform, biases):
        if pool is not None:
            assert np.abs(pool).max() <= 1 and abs(pool.mean()) < 4 / math.sqrt(pool.size)
            assert abs(pool.std() - 1 / math.sqrt(3)) < 4 / math.sqrt(pool.size)


@pytest.mark.parametrize("family", INITIAL)
def test_the_seed_determines_weights_and_streams(family):
    (first, keys), (other, others) = drawn(family, 3), drawn(family, 4)
    random = [name for name in first if np.unique(first[name]).size > 1]
    assert all(not np.array_equal(first[name], other[name]) for name in random) and len(random) > 20
    assert all(not np.array_equal(a, b) for a, b in zip(keys, others, strict=True))
    # No two parameters and no two streams share their numbers.
    assert len({first[name].ravel()[0] for name in random}) == len(random)
    assert len({key.tobytes() for key in keys}) == len(keys)


def test_only_the_seed_determines_the_weights():
    name, sizes = FAMILIES["segformer"]

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(seed, drop_path_rate, dropout_rate):
        rates = dict(drop_path_rate=drop_path_rate, dropout_rate=dropout_rate)
        return parameters(segjax.create(name, num_classes=5, seed=seed, **sizes | rates))

    first, again, other = draw(3, 0.1, 0.1), draw(3, 0.0, 0.5), draw(4, 0.1, 0.1)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert sum(not np.array_equal(first[key], other[key]) for key in first) > 20


# --------------------------------------------------------------------------------------------------- the two modes


def differences(outputs):
    """The largest difference between the samples of a batch, over the largest output."""
    return np.abs(outputs - outputs[:1]).max() / np.abs(outputs).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_repeatable_and_training_updates_the_statistics(family, float64):
    # In float32 rounding looks like a difference: statistics of equal samples amplify it.
    model = tiny_model(0, family, dtype=jnp.float64, **RANDOM.get(family, ({},))[0])
    x = images(0, dtype=np.float64)
    before = statistics(model)
    assert bool(before) == (family not in WITHOUT_BATCH_NORM)
    # A new model is in evaluation mode.
    evaluated = np.asarray(call(model, x))
    assert np.array_equal(evaluated, call(model, x))
    # One image several times: samples differ only by what is drawn for each.
    copies = np.broadcast_to(x[:1], x.shape)
    assert differences(np.asarray(call(model, copies))) < 1e-10
    unmoved = statistics(model)
    assert all(np.array_equal(before[name], unmoved[name]) for name in before)

    model.train()
    trained = [np.asarray(call(model, copies)) for _ in range(4)]
    moved = statistics(model)
    assert [name for name in before if np.array_equal(before[name], moved[name])] == []
    apart = list(map(differences, trained))
    if family not in RANDOM:
        assert all(np.array_equal(trained[0], other) for other in trained[1:]) and max(apart) < 1e-10
    else:
        _, per_sample = RANDOM[family]
        distinct = {output.tobytes() for output in trained}
        assert len(distinct) == 4 if per_sample else len(distinct) > 1
        assert min(apart) > 1e-3 if per_sample else max(apart) < 1e-10

    model.eval()
    after = np.asarray(call(model, x))
    assert np.array_equal(after, call(model, x))
    # Without running statistics a training leaves nothing behind.
    assert np.array_equal(after, evaluated) == (family in WITHOUT_BATCH_NORM)


def drops(model, kind):
    return [layer.rate for _, layer in nnx.iter_modules(model) if type(layer) is kind]


@pytest.mark.parametrize("family", ["segformer", "plain", "mmseg", "zuppichini", "segnext"])
def test_drop_path_grows_linearly_over_all_blocks(family):
    depths, rate = (1, 2, 1, 3), 0.3
    model = abstract_family(family, depths=depths, drop_path_rate=rate)
    kind, branches = (layers.DropPathOfBatch, 1) if family == "zuppichini" else (layers.DropPath, 2)
    other = layers.DropPath if family == "zuppichini" else layers.DropPathOfBatch
    expected = np.repeat(np.arange(7) * rate / 6, branches)
    np.testing.assert_allclose(sorted(drops(model, kind)), expected, rtol=1e-12)
    assert drops(model, other) == []
    first = model.encoder.stages[0].blocks if family == "zuppichini" else model.backbone.block1
    last = model.encoder.stages[3].blocks if family == "zuppichini" else model.backbone.block4
    assert set(drops(first, kind)) == {0.0} and max(drops(last, kind)) == pytest.approx(rate)


@pytest.mark.parametrize(
    "family, rates", [("segformer", [0.25]), ("plain", [0.25]), ("mmseg", [0.25]), ("ocr", [0.25])]
)
def test_one_layer_drops_channels_before_the_classifier(family, rates):
    assert drops(abstract_family(family, dropout_rate=0.25), layers.Dropout2d) == rates


# Outputs of the branches that drop path drops, of blocks behind the first, whose rate is zero.
BRANCHES = {
    "segformer": r"backbone\.block[234]\.0\.(attn\.proj|mlp\.fc2)\.(kernel|bias)",
    "mmseg": r"backbone\.block[234]\.0\.(attn\.proj|mlp\.fc2)\.(kernel|bias)",
    "zuppichini": r"encoder\.stages\.[123]\.blocks\.0\.1\.fn\.1\.3\.(kernel|bias)",
    "segnext": r"backbone\.block[234]\.0\.layer_scale_[12]",
}


@pytest.mark.parametrize("family", BRANCHES)
def test_always_dropping_equals_removing_exactly_these_branches(family):
    dropping, without = (tiny_model(1, family, drop_path_rate=0.5) for _ in range(2))
    dropping.set_attributes(layers.DropPath, layers.DropPathOfBatch, deterministic=False, raise_if_not_found=False)
    dropping.set_attributes(layers.DropPath, layers.DropPathOfBatch, survival=0.0, raise_if_not_found=False)
    emptied = 0
    for name, variable in named_variables(without).items():
        if re.fullmatch(BRANCHES[family], name):
            variable[...] = jnp.zeros_like(variable[...])
            emptied += 1
    assert emptied == {"zuppichini": 6, "segnext": 6}.get(family, 12)
    x = images(1, batch=2)
    found, expected = call_for_taps(dropping, x), call_for_taps(without, x)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_rebuilt_with_its_settings_and_weights(family, tmp_path):
    model = tiny_model(5, family)
    orbax_folder.save_model(tmp_path / "model", model, metadata={})
    again = segjax.load(tmp_path / "model").model
    assert again.spec == model.spec and nnx.graphdef(again) == nnx.graphdef(model)
    before, after = named_variables(model), named_variables(again)
    assert list(before) == list(after)
    assert all(np.array_equal(before[name][...], after[name][...]) for name in before)


def test_models_can_be_copied_and_passed_through_nnx_transforms():
    model, x = tiny_model(0), images(1, batch=2)
    duplicate = copy.deepcopy(model)
    expected = np.asarray(call(model, x))
    assert np.array_equal(call(duplicate, x), expected)
    duplicate.decode_head.linear_pred.bias[...] += 1
    np.testing.assert_allclose(call(duplicate, x), expected + 1, rtol=1e-5, atol=1e-5)
    assert np.array_equal(call(model, x), expected)
    gradients = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x)[0] ** 2)))(model)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    assert all(np.isfinite(leaf).all() for leaf in leaves) and sum(np.any(leaf) for leaf in leaves) > len(leaves) // 2


# ----------------------------------------------------------------------------------------------- SegNeXt's bases


def test_evaluation_bases_are_the_recorded_numbers():
    bases = segnext.evaluation_bases(64, 8)
    assert bases.shape == (64, 8) and bases.dtype == np.float64 and bases.min() >= 0
    np.testing.assert_allclose(np.sqrt((bases**2).sum(axis=0)), 1, rtol=1e-12)
    # The first and the ninth number of NumPy's legacy generator for seed 0, one below the other.
    np.testing.assert_allclose(bases[0, 0] / bases[1, 0], 0.5488135039273248 / 0.9636627605010293, rtol=1e-12)
    assert np.unique(bases).size == bases.size


def test_evaluation_uses_the_fixed_bases_for_any_seed():
    model, x = tiny_model(0, "segnext"), images(0)
    expected = np.asarray(call(model, x))
    fixed = np.broadcast_to(segnext.evaluation_bases(32, 7), (4, 32, 7)).astype(np.float32)
    np.testing.assert_allclose(call_with_bases(model, x, fixed), expected, rtol=1e-4, atol=1e-4)
    drawn = np.random.default_rng(0).uniform(size=(4, 32, 7)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    given = np.asarray(call_with_bases(model, x, drawn))
    assert np.abs(given - expected).max() > 1e-2
    # One sample's bases are its own.
    mixed = np.concatenate([fixed[:1], drawn[1:]])
    mixed = np.asarray(call_with_bases(model, x, mixed))
    np.testing.assert_allclose(mixed[:1], expected[:1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixed[1:], given[1:], rtol=1e-4, atol=1e-4)
    # Another seed of the model is another key of its stream.
    model.decode_head.hamburger.stream.key[...] = jax.random.key(99)
    assert np.array_equal(call(model, x), expected)


@pytest.mark.parametrize("shape", [(2, 32, 6), (1, 32, 7), (32, 7), (2, 7, 32)])
def test_bases_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"bases must be \(B, C, R\) = \(2, 32, 7\).*got " + re.escape(str(shape))):
        nnx.eval_shape(lambda m: m(jnp.zeros((2, 32, 64, 3)), bases=jnp.ones(shape)), abstract_family("segnext"))


# --------------------------------------------------------------------------------------------------------- precision


def equations(jaxpr):
    """All of a jaxpr, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def traced(family, *, training, dtype, param_dtype):
    """The jaxpr of a forward pass in evaluation, or of gradients in training with everything random on."""
    rates = {key: 0.5 for key in ("drop_path_rate", "dropout_rate") if key in models.settings(FAMILIES[family][0])}
    functional = FunctionalModel(abstract_family(family, dtype=dtype, param_dtype=param_dtype, **rates))
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), param_dtype)

    def evaluate(params, batch_stats, x):
        return functional.bind(params, batch_stats)(x)

    def loss_of(params, batch_stats, x):
        model = functional.bind(params, batch_stats, key=jax.random.key(0))
        return jnp.sum(model(x)[0] ** 2), functional.batch_stats_of(model)

    return jax.make_jaxpr(jax.grad(loss_of, has_aux=True) if training else evaluate)(*functional.arrays(), x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_float64_is_float64_throughout(family, training, float64):
    text = str(traced(family, training=training, dtype=jnp.float64, param_dtype=jnp.float64))
    assert "f64" in text and "f32" not in text and "bf16" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_norms_softmax_logits_and_weights_are_float32(family):
    model = abstract_family(family, dtype=jnp.bfloat16)
    assert {v.get_value().dtype for v in named_variables(model).values()} == {jnp.dtype("float32")}
    jaxpr = traced(family, training=False, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    kinds, logits = {}, []
    for equation in equations(jaxpr.jaxpr):
        name, outs = equation.primitive.name, [v.aval for v in equation.outvars]
        kinds.setdefault(name, set()).update(str(aval.dtype) for aval in outs)
        # Of a map, or of its pixels as rows, but not of an image's mean.
        if name == "dot_general" and outs[0].shape[-1] == 5 and outs[0].ndim in (2, 4) and outs[0].size > 2 * 5:
            logits.append(str(outs[0].dtype))
    for wide in ("rsqrt", "sqrt", "exp", "div", "reduce_max"):
        assert kinds.get(wide, {"float32"}) == {"float32"}, wide
    assert "bfloat16" in kinds["dot_general"] and "bfloat16" in kinds["conv_general_dilated"]
    assert logits and set(logits) == {"float32"}
    assert {v.aval.dtype for v in jaxpr.jaxpr.outvars[:1]} == {jnp.dtype("float32")}


def test_in_bfloat16_the_factorisation_is_float32():
    jaxpr = traced("segnext", training=False, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    # The rank, 7, is no other size of the model.
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    of_factors = [e for e in products if any(7 in v.aval.shape for v in (*e.invars, *e.outvars))]
    # Coefficients at first, 7 steps of 6 products, 3 of the last update, and the result.
    assert len(of_factors) == 1 + 7 * 6 + 3 + 1
    assert {str(v.aval.dtype) for e in of_factors for v in (*e.invars, *e.outvars)} == {"float32"}


def test_in_bfloat16_logits_are_summed_in_float32():
    logits = np.asarray(call(tiny_model(0, dtype=jnp.bfloat16, param_dtype=jnp.float32), images(2)))
    assert logits.dtype == np.float32
    rounded = logits.astype(jnp.bfloat16).astype(np.float32)
    assert (logits != rounded).mean() > 0.9


def test_narrow_parameters_lose_nothing_more_in_a_wider_computation(float64):
    x = images(3, dtype=np.float64)
    narrow = tiny_model(3, dtype=jnp.float64, param_dtype=jnp.float32)
    wide = tiny_model(4, dtype=jnp.float64)
    segjax.load_torch(wide, segjax.to_torch(narrow))
    np.testing.assert_allclose(call(narrow, x), call(wide, x), rtol=1e-12, atol=1e-14)

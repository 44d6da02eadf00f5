"""Every layer against torch's, and every fast implementation against its plain one, with gradients."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from segjax import layers
from segjax.kernels import attention, choice, convolution, gelu, resize
from segjax.models import segformer
from segjax.torch_reference import verify

DTYPES = ("float64", "float32")


def normal(*shape, seed, dtype):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def values_and_gradients(function, *arguments):
    """Output, and gradients of a fixed random weighting of it with respect to every argument.

    The output is that of the forward pass which a gradient takes: a form with a rule of its own computes it apart.
    """
    shape = jax.eval_shape(function, *arguments)
    weights = normal(*shape.shape, seed=99, dtype=shape.dtype)

    @jax.jit
    def run(*given):
        output, backward = jax.vjp(function, *given)
        return output, *backward(weights)

    return run(*arguments)


def torch_values_and_gradients(function, *arguments):
    """The same in torch; `function` maps channels-first tensors to a channels-first one."""
    leaves = [torch.from_numpy(np.array(argument)).requires_grad_() for argument in arguments]
    output = function(*leaves)
    weights = torch.from_numpy(normal(*output.shape, seed=99, dtype=output.detach().numpy().dtype))
    return output, *torch.autograd.grad((output * weights).sum(), leaves)


def assert_forms_equal(fast, plain, arguments, dtype, within, what):
    without_gradient = verify.relative_error(jax.jit(fast)(*arguments), jax.jit(plain)(*arguments))
    within("output", dtype, without_gradient, what)
    results = zip(values_and_gradients(fast, *arguments), values_and_gradients(plain, *arguments), strict=True)
    for kind, (one, other) in zip(("output", *["gradient"] * len(arguments)), results, strict=True):
        within(kind, dtype, verify.relative_error(one, other), what)


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 5), (1, 7), (21, 1)])
# The weight's gradient is summed over row tiles first: of a prime number one, of others up to eight.
@pytest.mark.parametrize("shape", [(2, 13, 22, 6), (3, 5, 4, 1), (2, 24, 7, 3)])
@pytest.mark.parametrize("form", [convolution.depthwise, convolution.depthwise_fused])
def test_depthwise_as_shifted_products_equals_the_grouped_convolution(form, shape, kernel_size, dtype, float64, within):
    x = normal(*shape, seed=0, dtype=dtype)
    kernel = normal(*kernel_size, 1, shape[-1], seed=1, dtype=dtype)
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)

    def plain(x, kernel):
        return convolution.conv_plain(x, kernel, stride=1, padding=padding, groups=shape[-1])

    assert_forms_equal(
        form,
        plain,
        (x, kernel),
        dtype,
        within,
        "depthwise, fast implementation = plain implementation",
    )


@pytest.mark.parametrize("height", [1, 2, 11, 12, 14, 16, 21, 45])
def test_the_depthwise_weight_gradient_is_exact_at_every_height(height, float64, within):
    x, kernel = normal(3, height, 5, 2, seed=height, dtype="float64"), normal(3, 3, 1, 2, seed=1, dtype="float64")

    def plain(x, kernel):
        return convolution.conv_plain(x, kernel, stride=1, padding=(1, 1), groups=2)

    ours, theirs = (values_and_gradients(form, x, kernel)[2] for form in (convolution.depthwise, plain))
    within(
        "gradient",
        "float64",
        verify.relative_error(ours, theirs),
        "depthwise, fast implementation = plain implementation",
    )


# Few pixels show how the sum of eight tiles is rounded, many how theirs is.
@pytest.mark.parametrize("shape", [(1, 8, 3, 64), (2, 48, 37, 4), (3, 31, 40, 2)])
def test_the_weight_gradient_of_depthwise_in_bfloat16_is_summed_in_float32(shape, float64):
    # Whole numbers, whose products and sums float32 holds exactly: what is left is one rounding, at the end.
    rng = np.random.default_rng(0)
    x, weights = (rng.integers(0, 16, shape).astype(jnp.bfloat16) for _ in range(2))
    kernel = normal(3, 3, 1, shape[-1], seed=1, dtype="float32").astype(jnp.bfloat16)

    def gradient(function, dtype):
        run = jax.jit(lambda x, kernel, weights: jax.vjp(lambda k: function(x, k), kernel)[1](weights)[0])
        return run(*(array.astype(dtype) for array in (x, kernel, weights)))

    def plain(x, kernel):
        return convolution.conv_plain(x, kernel, stride=1, padding=(1, 1), groups=shape[-1])

    ours, exact = gradient(convolution.depthwise, jnp.bfloat16), gradient(plain, jnp.float64)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, np.asarray(exact).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16"))
def test_once_changes_no_bit_forward_or_backward(dtype, float64):
    x = np.concatenate([normal(997, seed=70, dtype="float64"), [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-300]])
    x, gradient = x.astype(jnp.dtype(dtype)), x[::-1].astype(jnp.dtype(dtype))
    with choice.meant_for("cpu"):
        output, backward = jax.vjp(jax.jit(layers.once), x)
        for found, given in ((output, x), *zip(backward(gradient), (gradient,), strict=True)):
            assert found.dtype == given.dtype and np.asarray(found).tobytes() == given.tobytes()


def test_once_does_nothing_on_a_gpu_and_in_published_implementations():
    x = jnp.ones(3)
    with choice.meant_for("cpu"):
        assert layers.once(x) is not x
        with choice.published_implementations():
            assert layers.once(x) is x
    with choice.meant_for("cuda"):
        assert layers.once(x) is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [2, 4, 8])
def test_convolution_as_a_product_of_patches_equals_the_strided_one(r, dtype, float64, within):
    # Sizes that leave a rest, which both forms must leave out.
    x, kernel = normal(2, 2 * r + 1, 3 * r + r // 2, 5, seed=2, dtype=dtype), normal(r, r, 5, 7, seed=3, dtype=dtype)

    def plain(x, kernel):
        return convolution.conv_plain(x, kernel, stride=r, padding=(0, 0), groups=1)

    assert_forms_equal(
        convolution.conv_of_patches,
        plain,
        (x, kernel),
        dtype,
        within,
        "patches, fast implementation = plain implementation",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_by_one_convolution_as_a_product_equals_the_convolution(dtype, float64, within):
    x, kernel = normal(3, 5, 9, 6, seed=4, dtype=dtype), normal(1, 1, 6, 4, seed=5, dtype=dtype)
    settings = dict(stride=1, padding=(0, 0), groups=1)
    assert_forms_equal(
        lambda x, k: layers.conv(x, k, **settings),
        lambda x, k: convolution.conv_plain(x, k, **settings),
        (x, kernel),
        dtype,
        within,
        "1x1, fast implementation = plain implementation",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_by_slope_equals_the_plain_one_and_torch(dtype, float64, within):
    x = np.concatenate([normal(4000, seed=6, dtype=dtype), np.linspace(-40, 40, 999, dtype=dtype)])
    assert_forms_equal(
        gelu.gelu_by_slope, gelu.gelu_plain, (x,), dtype, within, "GELU, fast implementation = plain implementation"
    )
    ours, theirs = values_and_gradients(gelu.gelu_by_slope, x), torch_values_and_gradients(F.gelu, x)
    for kind, one, other in zip(("output", "gradient"), ours, theirs, strict=True):
        within(kind, dtype, verify.relative_error(one, other.detach()), "GELU = torch")


@pytest.mark.each_value_once
@pytest.mark.parametrize("fast", [resize.resize_by_phases, resize.resize_by_repeats])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "old, factors",
    [((5, 7), (2, 2)), ((5, 7), (4, 4)), ((5, 7), (8, 8)), ((5, 7), (3, 1)), ((5, 7), (1, 5)), ((1, 2), (4, 2))],
)
def test_resizing_by_whole_factors_equals_the_plain_one_and_torch(old, factors, dtype, fast, float64, within):
    x = normal(2, *old, 3, seed=7, dtype=dtype)
    size = (old[0] * factors[0], old[1] * factors[1])
    assert_forms_equal(
        lambda x: fast(x, factors),
        lambda x: resize.resize_plain(x, size),
        (x,),
        dtype,
        within,
        "resize, fast implementation = plain implementation",
    )
    theirs = F.interpolate(verify.to_nchw(x), size=size, mode="bilinear", align_corners=False)
    ours = fast(jnp.asarray(x), factors)
    within("output", dtype, verify.relative_error(ours, verify.to_nhwc(theirs)), "resize = torch")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [((5, 7), (17, 25)), ((9, 13), (3, 4)), ((1, 6), (4, 12)), ((8, 8), (1, 3)), ((3, 4), (3, 4))],
)
def test_resizing_by_any_ratio_equals_torch(old, new, align_corners, float64, within):
    x = normal(2, *old, 3, seed=8, dtype="float64")
    theirs = F.interpolate(verify.to_nchw(x), size=new, mode="bilinear", align_corners=align_corners)
    ours = layers.resize(jnp.asarray(x), new, align_corners=align_corners)
    within("output", "float64", verify.relative_error(ours, verify.to_nhwc(theirs)), "resize = torch")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 24), (17, 25)])
def test_the_fused_decoder_equals_the_published_one(size, dtype, float64, within):
    dims = (4, 8, 10, 16)
    head = segformer.SegFormerHead(
        dims=dims,
        decoder_dim=12,
        num_classes=7,
        dropout_rate=0.0,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(0),
    )
    for level in head.levels():
        level.bias[...] = normal(12, seed=9, dtype=dtype)
    maps = [(-(-size[0] // 2**i), -(-size[1] // 2**i)) for i in range(4)]
    features = [normal(2, *maps[i], dims[i], seed=10 + i, dtype=dtype) for i in range(4)]
    graphdef, state = nnx.split(head)

    def form(name):
        def run(state, *features):
            # As published it is `fuse_levels` itself, not what is attached to it.
            with choice.published_implementations() if name == "fuse_levels" else contextlib.nullcontext():
                return getattr(nnx.merge(graphdef, state), name)(list(features))

        return run

    weights = normal(2, *size, 12, seed=20, dtype=dtype)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    outputs, gradients = [], []
    for name in ("fuse_at_low_resolution", "fuse_levels"):
        outputs.append(jax.jit(form(name))(state, *features))

        def loss(params, features, name=name):
            return jnp.sum(form(name)(nnx.merge_state(params, rest), *features) * weights)

        gradients.append(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features))
    within("output", dtype, verify.relative_error(*outputs), "decoder, fused = plain")
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        if np.any(other):
            within("gradient", dtype, verify.relative_error(one, other), "decoder, fused = plain")


def to_torch_kernel(kernel):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(kernel).transpose(3, 2, 0, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 30)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"), [(7, 4, 3, 1), (3, 2, 1, 1), (3, 1, 1, 2), (8, 8, 0, 1)]
)
def test_convolution_equals_torch(kernel, stride, padding, groups, size, dtype, float64, within):
    layer = layers.Conv(
        4,
        6,
        kernel,
        stride=stride,
        padding=padding,
        groups=groups,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(1),
    )
    layer.bias[...] = normal(6, seed=30, dtype=dtype)
    x = normal(2, *size, 4, seed=31, dtype=dtype)
    bias = torch.from_numpy(np.array(layer.bias[...]))
    theirs = F.conv2d(verify.to_nchw(x), to_torch_kernel(layer.kernel[...]), bias, stride, padding, 1, groups)
    within("output", dtype, verify.relative_error(layer(jnp.asarray(x)), verify.to_nhwc(theirs)), "convolution = torch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_equals_torch_also_far_from_zero(dtype, float64, within):
    layer = layers.LayerNorm(24, epsilon=1e-6, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    layer.scale[...], layer.bias[...] = normal(24, seed=40, dtype=dtype), normal(24, seed=41, dtype=dtype)
    x = normal(2, 5, 7, 24, seed=42, dtype=dtype) + 100
    scale, bias = (torch.from_numpy(np.array(value[...])) for value in (layer.scale, layer.bias))
    theirs = F.layer_norm(torch.from_numpy(x), (24,), scale, bias, 1e-6)
    within("output", dtype, verify.relative_error(layer(jnp.asarray(x)), theirs), "LayerNorm = torch")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_and_its_running_statistics_equal_torch(training, dtype, float64, within):
    theirs = torch.nn.BatchNorm2d(5, eps=1e-5, momentum=0.1).to(getattr(torch, dtype))
    layer = layers.BatchNorm(5, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    for mine, other, seed in (
        (layer.scale, theirs.weight, 50),
        (layer.bias, theirs.bias, 51),
        (layer.mean, theirs.running_mean, 52),
        (layer.var, theirs.running_var, 53),
    ):
        value = np.abs(normal(5, seed=seed, dtype=dtype)) + 0.5
        mine[...] = value
        other.data.copy_(torch.from_numpy(value))
    layer.use_running_average = not training
    theirs.train(training)
    for seed in (54, 55):
        x = 3 * normal(2, 3, 4, 5, seed=seed, dtype=dtype) + 2
        ours = layer(jnp.asarray(x))
        within(
            "output",
            dtype,
            verify.relative_error(ours, verify.to_nhwc(theirs(verify.to_nchw(x)))),
            "BatchNorm = torch",
        )
    for mine, other in ((layer.mean, theirs.running_mean), (layer.var, theirs.running_var)):
        within("statistics", dtype, verify.relative_error(mine[...], other), "BatchNorm = torch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_equals_torch(dtype, float64, within):
    query, key, value = (normal(2, 5, n, 8, seed=60 + n, dtype=dtype) for n in (30, 12, 12))
    ours = layers.attention(*map(jnp.asarray, (query, key, value)))
    theirs = F.scaled_dot_product_attention(*map(torch.from_numpy, (query, key, value)))
    within("output", dtype, verify.relative_error(ours, theirs), "attention = torch")


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
# Of 30 queries: parts of equal length, a last part that is shorter, one row at a time, all in one part.
@pytest.mark.parametrize("rows, batch, heads", [(10, 2, 5), (7, 3, 2), (29, 2, 3), (1, 2, 2), (30, 3, 1)])
def test_attention_in_row_tiles_equals_the_plain_one_and_torch(rows, batch, heads, dtype, float64, within):
    arguments = [normal(batch, heads, n, 8, seed=60 + i, dtype=dtype) for i, n in enumerate((30, 12, 12))]
    by_rows = partial(attention.attention_by_rows, rows=rows)
    what = "attention, fast implementation = plain implementation"
    assert_forms_equal(by_rows, attention.attention_plain, arguments, dtype, within, what)
    ours = values_and_gradients(by_rows, *arguments)
    theirs = torch_values_and_gradients(F.scaled_dot_product_attention, *arguments)
    for kind, one, other in zip(("output", *["gradient"] * 3), ours, theirs, strict=True):
        within(kind, dtype, verify.relative_error(one, other.detach()), "attention by rows = torch")


def test_attention_uses_row_tiles_where_there_are_many_scores(monkeypatch):
    taken = []

    def record(query, key, value, *, rows):
        taken.append(rows)
        return by_rows(query, key, value, rows=rows)

    by_rows = attention.attention_by_rows
    monkeypatch.setattr(attention, "attention_by_rows", record)
    arguments = [normal(2, 3, n, 4, seed=60 + n, dtype="float32") for n in (31, 5, 5)]
    with choice.meant_for("cpu"):
        expected = layers.attention(*arguments)
        # 30 scores of every row. The 31 rows fit in 3 parts of 12 but are spread over them evenly.
        for most, rows in ((30 * 12, 11), (30 * 30, 16), (30, 1), (29, 1), (30 * 31, None)):
            monkeypatch.setattr(attention, "MOST_SCORES", most)
            found = layers.attention(*arguments)
            assert taken == ([] if rows is None else [rows]), most
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
            taken.clear()
        monkeypatch.setattr(attention, "MOST_SCORES", 1)
        with choice.published_implementations():
            layers.attention(*arguments)
    with choice.meant_for("cuda"):
        layers.attention(*arguments)
    assert not taken


def test_attention_in_row_tiles_never_holds_all_scores():
    arguments = [normal(2, 3, 512, 8, seed=i, dtype="float32") for i in range(3)]

    def temporaries(form):
        # Of forward and backward pass, where all scores are 1.
        gradient = jax.grad(lambda *given: jnp.sum(jnp.sin(form(*given))), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / (4 * 2 * 3 * 512**2)

    assert temporaries(attention.attention_plain) >= 1
    assert temporaries(partial(attention.attention_by_rows, rows=32)) < 0.5


def test_initial_weights_have_the_published_spread():
    kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(3))
    linear = np.asarray(layers.Linear(300, 400, **kinds).kernel[...])
    assert abs(linear.std() - 0.02) < 2e-4
    # A cut at two standard deviations, which is what jax's initializer of the same name does, would end at 0.04.
    assert 0.07 < np.abs(linear).max() < 0.12
    dense = np.asarray(layers.Conv(64, 96, 3, **kinds).kernel[...])
    assert abs(dense.std() / np.sqrt(2 / (9 * 96)) - 1) < 0.02
    depthwise = np.asarray(layers.Conv(512, 512, 3, groups=512, **kinds).kernel[...])
    assert abs(depthwise.std() / np.sqrt(2 / 9) - 1) < 0.03

"""Every known near miss of the right network: segjax equals torch, and the tempting variant differs."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

import segjax
from parity import compare
from parity.subjects import SUBJECTS
from segjax import layers
from segjax.inference.engine import labels_of
from segjax.models.functional import FunctionalModel
from segjax.torch_reference import verify

F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
NARROW = SUBJECTS["segformer"]


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def differ(ours, theirs):
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


def test_same_padding_on_a_strided_convolution_is_not_torchs():
    x, layer = normal(2, 64, 96, 3, seed=0), layers.Conv(3, 8, 3, stride=2, padding=1, rngs=nnx.Rngs(0), **F32)
    kernel = layer.kernel[...]
    weight = torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1)))
    theirs = verify.to_nhwc(F.conv2d(verify.to_nchw(x), weight, stride=2, padding=1))
    same = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert differ(layer(x), theirs) < 1e-5
    assert differ(same, theirs) > 1


def test_downsampling_without_antialiasing_is_torchs():
    x = normal(2, 40, 136, 3, seed=1)
    theirs = verify.to_nhwc(F.interpolate(verify.to_nchw(x), size=(13, 17), mode="bilinear", align_corners=False))
    assert differ(layers.resize(jnp.asarray(x), (13, 17)), theirs) < 1e-5
    assert differ(jax.image.resize(x, (2, 13, 17, 3), "bilinear"), theirs) > 0.5


def test_gelu_is_exact():
    x = np.linspace(-5, 5, 2001, dtype=np.float32)
    theirs = F.gelu(torch.from_numpy(x))
    assert differ(layers.gelu(jnp.asarray(x)), theirs) < 1e-6
    assert differ(jax.nn.gelu(x), theirs) > 4e-4


def test_the_eps_of_each_layer_norm_is_the_published_one():
    model = segjax.create("segformer_b0", num_classes=2)
    eps = {
        ".".join(map(str, path)): module.epsilon
        for path, module in nnx.iter_modules(model)
        if isinstance(module, layers.LayerNorm)
    }
    inner = {name for name in eps if "patch_embed" in name or ".attn." in name}
    assert {eps[name] for name in inner} == {1e-5}
    assert {eps[name] for name in eps.keys() - inner} == {1e-6}
    # 4 patch embeddings and 2 blocks in each of the three stages with a reduction; 2 norms a block and one a stage.
    assert (len(inner), len(eps) - len(inner)) == (4 + 6, 16 + 4)


def test_layer_norm_is_accurate_far_from_zero_unlike_one_pass_variance():
    x = normal(4, 7, 9, 32, seed=2) + 100
    theirs = F.layer_norm(torch.from_numpy(x), (32,), eps=1e-5)
    ours = layers.LayerNorm(32, epsilon=1e-5, **F32)(jnp.asarray(x))
    one_pass = nnx.LayerNorm(32, epsilon=1e-5, use_fast_variance=True, rngs=nnx.Rngs(0))(jnp.asarray(x))
    assert differ(ours, theirs) < 1e-4
    assert differ(one_pass, theirs) > 1e-3


def test_the_running_variance_is_unbiased_and_has_torchs_momentum():
    x = normal(2, 2, 3, 4, seed=3)
    layer = layers.BatchNorm(4, **F32)
    layer.use_running_average = False
    layer(jnp.asarray(x))
    flat = x.reshape(-1, 4)
    assert differ(layer.var[...], 0.9 + 0.1 * flat.var(axis=0, ddof=1)) < 1e-6
    assert differ(layer.var[...], 0.9 + 0.1 * flat.var(axis=0, ddof=0)) > 5e-3
    assert differ(layer.mean[...], 0.1 * flat.mean(axis=0)) < 1e-7


def test_variance_of_a_large_flat_map_is_never_negative():
    x = jnp.full((2, 512, 512, 3), 1000.125, jnp.float32) + 1e-4 * normal(2, 512, 512, 3, seed=4)
    layer = layers.BatchNorm(3, **F32)
    layer.use_running_average = False
    assert np.isfinite(np.asarray(layer(x))).all()
    assert (np.asarray(layer.var[...]) >= 0.9 * (1 - 1e-6)).all()


def test_every_drop_path_has_its_own_mask_and_every_step_new_ones():
    model = segjax.create("segformer_b0", num_classes=2, drop_path_rate=0.9, **NARROW.sizes)
    functional = FunctionalModel(model)
    arrays = functional.arrays()

    def masks(key):
        bound = functional.bind(*arrays, key=key)
        ones = jnp.ones((64, 1, 1, 1))
        drops = [
            module for _, module in nnx.iter_modules(bound) if isinstance(module, layers.DropPath) and module.stream
        ]
        return [np.asarray(drop(ones)).ravel() > 0 for drop in drops]

    first, second = masks(jax.random.key(0)), masks(jax.random.key(1))
    assert len(first) == 2 * (sum(NARROW.sizes["depths"]) - 1)
    everything = [tuple(mask) for mask in first + second]
    assert len(set(everything)) == len(everything)
    assert all(np.array_equal(a, b) for a, b in zip(first, masks(jax.random.key(0)), strict=True))


def test_a_wide_map_is_not_taken_for_a_square_one(float64):
    # 32 x 128 = 64 x 64 tokens: a reshape to sqrt(N) would run, and be wrong.
    model, reference = compare.randomised_pair(NARROW.name, num_classes=3, seed=0, dtype="float64", **NARROW.sizes)
    x = compare.images(2, (128, 512), seed=5, dtype="float64")
    with torch.no_grad():
        theirs = verify.to_nhwc(reference(verify.to_nchw(x))[0])
        square = verify.to_nhwc(reference(verify.to_nchw(x.reshape(2, 256, 256, 3)))[0])
    assert verify.relative_error(verify.compiled(model)(x)[0], theirs) < 1e-11
    assert verify.relative_error(square.reshape(theirs.shape), theirs) > 1e-2


def test_products_are_computed_in_full_float32_here():
    lowered = jax.jit(jnp.matmul).lower(jnp.ones((2, 3)), jnp.ones((3, 4))).as_text()
    assert "HIGHEST" in lowered, "parity/conftest.py must ask for float32 products, or a GPU computes in TF32"


def test_a_square_linear_layer_is_transposed():
    model, reference = compare.randomised_pair(NARROW.name, num_classes=3, seed=1, dtype="float32", **NARROW.sizes)
    x = normal(2, 30, 8, seed=6)
    layer = reference.get_submodule("backbone.block1.0.attn.q")
    with torch.no_grad():
        theirs = layer(torch.from_numpy(x)).numpy()
        untransposed = x @ layer.weight.numpy() + layer.bias.numpy()
    assert differ(model.backbone.block1[0].attn.q(jnp.asarray(x)), theirs) < 1e-5
    assert differ(untransposed, theirs) > 0.1


def test_labels_come_from_upsampled_logits():
    logits = normal(2, 9, 13, 5, seed=7)
    size = (36, 52)
    upsampled = F.interpolate(verify.to_nchw(logits), size=size, mode="bilinear", align_corners=False)
    theirs = upsampled.argmax(1).numpy()
    late = np.asarray(labels_of(layers.resize(jnp.asarray(logits), size)))
    early = logits.argmax(-1).repeat(4, axis=1).repeat(4, axis=2)
    assert (late == theirs).mean() > 0.9999
    assert (early == theirs).mean() < 0.95


def test_loading_a_torch_model_does_not_share_its_memory():
    model, reference = compare.randomised_pair(NARROW.name, num_classes=3, seed=2, dtype="float32", **NARROW.sizes)
    before = segjax.to_torch(model)
    with torch.no_grad():
        for tensor in reference.state_dict().values():
            tensor.add_(1)
    after = segjax.to_torch(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)

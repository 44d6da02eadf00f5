"""The implementations for GPUs against the plain ones, on a GPU. Without a GPU, no test is collected.

float32 products are multiplied as float32, as in all of parity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import segjax
from parity import tolerances
from segjax import losses
from segjax.kernels import attention, cells, choice
from segjax.models.functional import FunctionalModel
from segjax.recipes import common

pytestmark = pytest.mark.gpu

# Of full width, at sizes that are not square. Rounding of bfloat16 is 4e-3 of a number, through up to 52 blocks.
MODELS = ["segformer_b2", "segformer_simple", "segformer_zuppichini", "hrnet_w18", "hrnet_w18_ocr", "segnext_s"]
BFLOAT16 = 0.1


def relative(one, other):
    one, other = (np.asarray(array, np.float64) for array in (one, other))
    assert np.isfinite(one).all()
    return np.abs(one - other).max() / np.abs(other).max()


@functools.cache
def made(name, dtype):
    model = segjax.create(name, num_classes=19, dtype=jnp.dtype(dtype))
    functional = FunctionalModel(model)
    images = jax.random.normal(jax.random.key(1), (2, 256, 320, 3))
    labels = jax.random.randint(jax.random.key(2), (2, 256, 320), 0, 19).astype(jnp.uint8)
    return functional, *functional.arrays(), images, labels


def computed(name, dtype, platform):
    """Logits, loss and gradients in training mode, with one `platform`'s implementations."""
    functional, params, batch_stats, images, labels = made(name, dtype)
    criterion = losses.criterion(common.get_config("folder").loss, num_classes=19, ignore_label=255)

    @jax.jit
    def run(params):
        def loss(params):
            logits, _ = functional.bind(params, batch_stats, key=jax.random.key(0))(images)
            total = criterion.total(logits, labels, criterion.counts(labels), align_corners=functional.align_corners)
            return total, logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    with choice.meant_for(platform):
        (total, logits), gradients = run(params)
    return logits, total, gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_the_same_with_the_implementations_for_gpus(name, dtype):
    found, expected = (computed(name, dtype, platform) for platform in ("cuda", "plain"))
    within = BFLOAT16 if dtype == "bfloat16" else tolerances.bound("output", "float32")
    assert relative(found[0], expected[0]) <= within
    assert relative(found[1], expected[1]) <= within
    of_all = [jnp.concatenate([jnp.ravel(part[2][key]) for key in sorted(part[2])]) for part in (found, expected)]
    apart = float(jnp.linalg.norm(of_all[0] - of_all[1]) / jnp.linalg.norm(of_all[1]))
    assert apart <= (2 * BFLOAT16 if dtype == "bfloat16" else tolerances.bound("gradient", "float32"))


@pytest.mark.parametrize("heads, width", [(1, 32), (2, 64), (5, 32)])
def test_cudnn_runs_here_and_its_attention_equals_the_plain_one(heads, width):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (1000, 63, 63, 1000)
    given = [jax.random.normal(key, (2, heads, size, width)) for key, size in zip(keys, sizes, strict=True)]
    narrow = [x.astype(jnp.bfloat16) for x in given]
    assert attention.cudnn_has(narrow[0])
    found, back = jax.vjp(jax.jit(attention.attention_by_cudnn), *narrow[:3])
    expected, plain_back = jax.vjp(jax.jit(attention.attention_plain), *(x.astype(jnp.float32) for x in narrow[:3]))
    assert relative(found, expected) < 2e-2
    for one, other in zip(back(narrow[3]), plain_back(narrow[3].astype(jnp.float32)), strict=True):
        assert relative(one, other) < 3e-2


@pytest.mark.parametrize("factor", [4, 8])
def test_labels_are_the_argmax_of_upsampled_logits(factor):
    logits = jax.random.normal(jax.random.key(0), (2, 60, 44, 150))
    size = 60 * factor, 44 * factor
    found = jax.jit(lambda x: cells.labels_of(x, size))(logits)
    full = jax.image.resize(logits, (2, *size, 150), "bilinear", antialias=False, precision="highest")
    # Logits that round apart.
    assert float(jnp.mean(found == jnp.argmax(full, axis=-1))) > 0.9999


def test_two_steps_give_the_same_bits():
    first, second = (computed("segformer_b2", "bfloat16", "cuda") for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()

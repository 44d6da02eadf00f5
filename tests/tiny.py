"""Shared by several tests: the smallest model of every family that has all of its parts."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import segjax
from segjax import layers
from segjax.checkpoints import state_dict
from segjax.layers import initializers

SIZES = dict(dims=(4, 8, 10, 16), depths=(1, 1, 1, 1), decoder_dim=12)
_HRNET = dict(width=2, stage1_channels=4, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1))
_SEGNEXT = SIZES | dict(mlp_ratios=(2, 3, 1, 2), ham_channels=32, ham_rank=7)
del _SEGNEXT["decoder_dim"]

# Family: a name of segjax.MODELS, and what makes it small.
FAMILIES = {
    "segformer": ("segformer_b0", SIZES),
    "plain": ("segformer_plain_b0", SIZES),
    "plain with norm": ("segformer_plain_b0", SIZES | dict(fuse="conv_bn")),
    "mmseg": ("segformer_mmseg_b0", SIZES),
    "simple": ("segformer_simple", SIZES | dict(mlp_ratios=(2, 3, 1, 2))),
    "zuppichini": ("segformer_zuppichini", SIZES | dict(num_heads=(1, 2, 5, 8), mlp_ratios=(2, 3, 1, 2))),
    "hrnet": ("hrnet_w18", _HRNET),
    "ocr": ("hrnet_w18_ocr", _HRNET | dict(ocr_channels=8, ocr_key_channels=4)),
    "segnext": ("segnext_t", _SEGNEXT),
}

# For tests that compile each family for seconds: the plain run takes one of each architecture, and the others are slow.
ARCHITECTURES = ("segformer", "hrnet", "segnext")
EACH_FAMILY = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ARCHITECTURES)) for name in FAMILIES]


@functools.cache
def _abstract(name, num_classes, settings):
    return nnx.eval_shape(lambda: segjax.create(name, num_classes=num_classes, **dict(settings)))


def abstract_model(name, num_classes=19, **settings):
    """A model of which only the shapes are known; for reading, since all who ask get the same."""
    return _abstract(name, num_classes, tuple(sorted(settings.items())))


def abstract_family(family, **settings):
    """The same for one of `FAMILIES`, with 5 classes."""
    name, sizes = FAMILIES[family]
    return abstract_model(name, 5, **sizes | settings)


def tiny_model(seed, family="segformer", *, num_classes=5, dtype=jnp.float32, param_dtype=None, **overrides):
    """Random weights from numpy: to draw them with jax, every shape of them has to be compiled."""
    name, sizes = FAMILIES[family]
    settings = dict(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype)
    abstract = abstract_model(name, num_classes, **settings, **sizes | overrides)
    rng = np.random.default_rng(seed)
    values = {}
    for key, variable in state_dict.named_variables(abstract).items():
        noise = 0.3 * rng.standard_normal(variable.get_value().shape)
        kind = key.rpartition(".")[2]
        values[key] = {"scale": 1 + noise, "g": 1 + noise, "var": 1 + np.abs(noise)}.get(kind, noise)
    return state_dict.from_values(abstract, values)


class Net(nnx.Module):
    """A model that compiles at once, with a BatchNorm: images (B, H, W, 3) -> logits (B, H/4, W/4, 5)."""

    def __init__(self, seed, dtype=jnp.float32):
        kinds = dict(dtype=dtype, param_dtype=dtype)
        rngs = nnx.Rngs(seed)
        self.stem = layers.Conv(3, 6, 4, stride=4, kernel_init=layers.fan_in_init, rngs=rngs, **kinds)
        self.bn = layers.BatchNorm(6, **kinds)
        self.head = layers.Conv(6, 5, 1, kernel_init=layers.fan_in_init, rngs=rngs, **kinds)
        self.spec, self.size_multiple, self.align_corners = None, 1, False
        self.in_channels = 3
        self.eval()

    def __call__(self, images):
        return self.head(jax.nn.relu(self.bn(self.stem(images.astype(self.stem.dtype))))), {}


def _numbers(key):
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())


def _normal(key, shape, dtype):
    return _numbers(key).standard_normal(shape).astype(dtype)


def _uniform(key, shape, dtype, low=0.0, high=1.0):
    return _numbers(key).uniform(low, high, shape).astype(dtype)


@contextlib.contextmanager
def numpy_draws():
    """Initial weights drawn inside come from NumPy's generator, started from jax's key.

    The models' initializers and keys are what they are; jax's own generator takes seconds to compile for all the shapes
    of a family.
    """
    with (
        mock.patch.object(jax.random, "normal", _normal),
        mock.patch.object(jax.random, "uniform", _uniform),
        mock.patch.object(initializers, "_scaled_normal", initializers._scaled_normal.__wrapped__),
    ):
        yield

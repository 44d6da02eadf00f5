"""What several tests share: the smallest SegFormer that has all parts, and street scenes of few pixels."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import segjax
from segjax import weights

SIZES = dict(dims=(4, 8, 10, 16), depths=(1, 1, 1, 1), decoder_dim=12)


def tiny_model(seed, *, num_classes=5, dtype=jnp.float32, **overrides):
    """Random weights from numpy: to draw them with jax, every shape of them has to be compiled."""
    abstract = nnx.eval_shape(
        lambda: segjax.create(
            "segformer_b0", num_classes=num_classes, dtype=dtype, param_dtype=dtype, **SIZES, **overrides
        )
    )
    rng = np.random.default_rng(seed)
    values = {}
    for name, variable in weights.named_variables(abstract).items():
        noise = 0.3 * rng.standard_normal(variable.get_value().shape)
        kind = name.rpartition(".")[2]
        values[name] = {"scale": 1 + noise, "var": 1 + np.abs(noise)}.get(kind, noise)
    return weights.from_values(abstract, values)

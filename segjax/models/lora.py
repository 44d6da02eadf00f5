"""Low-rank adapters (LoRA) of linear layers and convolutions.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685: a layer's kernel W becomes
W + alpha / rank * A B, and only A and B are trained.

`FunctionalModel.bind` gives the layers these kernels. It does not wrap layers as `flax.nnx.LoRA` does, because
decoders, fast implementations and prepared weights read the kernels of their layers without calling them. The names,
shapes and equation are those of `nnx.LoRA`; a step also computes the gradient of W, on the way to those of A and B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import layers

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """The adapters of a model, as parameters by dotted name next to those of the model.

    A layer with the kernel (..., in, out) has A, "<layer>.lora_a", (..., in, rank), and B, "<layer>.lora_b",
    (rank, out). A convolution's A has the size of its kernel, so A B is what a convolution by A and then a 1x1
    convolution by B compute.

    Attributes:
      layers: Dotted paths of the layers.
      rank: Number of columns of A and of rows of B.
      alpha: Factor of A B, times the rank.
      initial: Initial arrays by name: A as torch initialises linear layers, and B zeros.

    Example:
      >>> from segjax import models
      >>> from segjax.models import lora
      >>> model = models.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> adapters = lora.Adapters.of(model, ["backbone.block1.0.attn.q"], rank=2, alpha=8, seed=0)
      >>> {name: array.shape for name, array in adapters.initial.items()}
      {'backbone.block1.0.attn.q.lora_a': (4, 2), 'backbone.block1.0.attn.q.lora_b': (2, 4)}
    """

    layers: tuple[str, ...]
    rank: int
    alpha: float
    initial: Mapping[str, jax.Array]

    @classmethod
    def of(cls, model: nnx.Module, of_layers: Sequence[str], *, rank: int, alpha: float, seed: int) -> Adapters:
        """New adapters.

        Args:
          model: The model.
          of_layers: Dotted paths of layers in `adaptable`.
          rank: Rank of A B, at least 1.
          alpha: Factor of A B, times the rank.
          seed: Seed of the random arrays.
        """
        kernels = {layer: _layer(model, layer).kernel for layer in of_layers}
        kinds = {layer: (kernel.shape, kernel.get_value().dtype) for layer, kernel in kernels.items()}

        def draw() -> dict[str, jax.Array]:
            drawn, keys = {}, jax.random.split(jax.random.key(seed), len(kinds))
            for key, (layer, ((*sides, out), dtype)) in zip(keys, kinds.items(), strict=True):
                a, b = names_of(layer)
                drawn[a] = layers.fan_in_init(key, (*sides, rank), dtype)
                drawn[b] = jnp.zeros((rank, out), dtype)
            return drawn

        # One program: otherwise every shape would compile its own.
        return cls(tuple(of_layers), rank, alpha, jax.jit(draw)())

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def merged(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The parameters of the model with the kernels W + scale * A B; parameters without adapters are unchanged.

        numpy arrays are merged in float64 and rounded once, as the weights that a run saves. Others are merged in their
        own dtype, differentiably.
        """
        arrays = {name: array for name, array in params.items() if name not in self.initial}
        for layer in self.layers:
            a, b = names_of(layer)
            if a in params:
                kernel = f"{layer}.kernel"
                arrays[kernel] = low_rank_sum(params[kernel], params[a], params[b], self.scale)
        return arrays

    def unmerged(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays that `merged` changes or removes, as they are: W, A and B."""
        names = (name for layer in self.layers for name in (f"{layer}.kernel", *names_of(layer)))
        return {name: params[name] for name in names}


NO_ADAPTERS = Adapters((), 1, 1.0, {})


def names_of(layer: str) -> tuple[str, str]:
    """The dotted names of A and B of the layer at this path."""
    return f"{layer}.lora_a", f"{layer}.lora_b"


def low_rank_sum(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """kernel + scale * a b, in float64 for numpy arrays, rounded to the dtype of the kernel.

    Args:
      kernel: (..., in, out).
      a: (..., in, rank).
      b: (rank, out).
      scale: Factor of the product.
    """
    if isinstance(kernel, np.ndarray):
        wide = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        return (kernel.astype(np.float64) + scale * wide).astype(kernel.dtype)
    # The product costs little, and a narrower one, the default on a GPU, would differ from the saved weights.
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel + jnp.asarray(scale, kernel.dtype) * product


def adaptable(model: nnx.Module) -> dict[str, bool]:
    """The layers of a model that have a kernel, by dotted path: whether they can have an adapter.

    Grouped convolutions cannot: A B would have to be zero between groups.
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, layers.Linear | layers.Conv):
            found[".".join(map(str, path))] = isinstance(module, layers.Linear) or module.groups == 1
    return found


def _layer(model: nnx.Module, path: str) -> layers.Linear | layers.Conv:
    found: dict[str, nnx.Module] = {".".join(map(str, parts)): module for parts, module in nnx.iter_modules(model)}
    layer = found[path]
    assert isinstance(layer, layers.Linear | layers.Conv)
    return layer

"""Compares segjax's models with PyTorch's, on the same weights and the same input.

    python -m parity.compare segformer_b0 [--size 64 96] [--batch 2] [--dtype float64] [--seed 0]

It prints the error of the whole model, and of every layer if it receives the reference's input to that layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity import tolerances
from segjax import losses, models
from segjax.checkpoints.architectures import family_of
from segjax.runtime import environment
from segjax.torch_reference.verify import bases_for, randomised_pair, relative_error, run_reference, to_nhwc

# The simple reference's block adds the shortcut that ours leaves to the encoder.
UNLIKE = {"segformer_simple": r"mit\.stages\.\d\.2\.\d+\.[01]"}


def images(batch: int, size: tuple[int, int], *, seed: int, dtype, channels: int = 3) -> np.ndarray:
    """Normal noise (B, H, W, C), which is what normalised images look like to a layer."""
    return np.random.default_rng(seed).normal(size=(batch, *size, channels)).astype(jnp.dtype(dtype))


def cross_entropy(logits: jax.Array, labels: jax.Array, *, ignore_label: int, align_corners: bool = False) -> jax.Array:
    """The mean that a training minimises: logits (B, h, w, K) and labels (B, H, W) -> scalar."""
    criterion = losses.Criterion(num_classes=logits.shape[-1], ignore_label=ignore_label)
    return criterion.total(logits, labels, criterion.counts(labels), align_corners=align_corners)


# ------------------------------------------------------------------------------------------------------ layer by layer


@dataclasses.dataclass(frozen=True)
class LayerError:
    """One layer given the reference's input to it.

    Attributes:
      name: attribute path, the same on both sides.
      shape: of our output.
      error: relative to the largest value of the reference's output.
    """

    name: str
    shape: tuple[int, ...]
    error: float


def layer_errors(model: nnx.Module, reference: torch.nn.Module, x: np.ndarray) -> list[LayerError]:
    """Runs the reference on (B, H, W, 3), then each of our layers on what its counterpart received."""
    received, produced = {}, {}
    unlike = UNLIKE.get(family_of(model.spec.name), "(?!)")

    def record(name):
        def hook(layer, arguments, output):
            received[name], produced[name] = _arguments(layer, arguments), _as_ours(layer, output)

        return hook

    handles = [
        layer.register_forward_hook(record(name))
        for name, layer in reference.named_modules()
        if _layer_at(model, name) is not None and not re.fullmatch(unlike, name)
    ]
    try:
        with torch.no_grad():
            run_reference(reference, x, *bases_for(model, len(x)))
    finally:
        for handle in handles:
            handle.remove()
    graphdef, state = nnx.split(model)

    # One program for all layers: a program each would spend minutes in the compiler.
    def run(state, received):
        bound = nnx.merge(graphdef, state)
        return {name: _first(_layer_at(bound, name)(*values)) for name, values in received.items()}

    with jax.default_matmul_precision("highest"):
        ours = jax.jit(run)(state, received)
    rows = []
    for name, theirs in produced.items():
        mine, theirs = (value if isinstance(value, list) else [value] for value in (ours[name], theirs))
        error = max(relative_error(a, b.reshape(a.shape)) for a, b in zip(mine, theirs, strict=True))
        rows.append(LayerError(name or "(whole model)", mine[-1].shape, error))
    return rows


def _layer_at(model: nnx.Module, name: str):
    """Our layer at a dotted path of the reference; None where ours has none that can be called."""
    layer = model
    for part in filter(None, name.split(".")):
        if part.isdigit():
            layer = layer[int(part)] if isinstance(layer, nnx.List) and int(part) < len(layer) else None
        else:
            layer = getattr(layer, part, None)
        if layer is None:
            return None
    return layer if isinstance(layer, nnx.Module) and callable(layer) else None


def _arguments(layer: torch.nn.Module, arguments: tuple) -> list:
    """What our counterpart of `layer` is called with."""
    first, *rest = arguments
    if len(rest) == 2 and all(isinstance(item, int) for item in rest):
        # Tokens (B, N, C), H, W.
        return [first.detach().numpy().reshape(first.shape[0], *rest, first.shape[-1])]
    if isinstance(layer, torch.nn.MultiheadAttention):
        # Keys and values are the same tokens.
        arguments = arguments[:2]
    return [_as_ours(layer, argument) for argument in arguments if argument is not None]


def _as_ours(layer: torch.nn.Module, value):
    """NCHW -> NHWC but for torch's LayerNorm, which is given NHWC; lists likewise; the first of several results."""
    if isinstance(value, torch.Tensor):
        channels_first = value.ndim == 4 and type(layer) is not torch.nn.LayerNorm
        return to_nhwc(value) if channels_first else value.detach().numpy()
    if isinstance(value, list):
        return [_as_ours(layer, item) for item in value]
    return _as_ours(layer, value[0])


def _first(output):
    return output[0] if isinstance(output, tuple) else output


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m parity.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=list(models.MODELS))
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--num-classes", type=int, default=19)
    parser.add_argument("--seed", type=int, default=0, help="of weights and input")
    options = parser.parse_args(arguments)
    environment.prepare()
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    model, reference = randomised_pair(
        options.model, num_classes=options.num_classes, seed=options.seed, dtype=options.dtype
    )
    x = images(options.batch, tuple(options.size), seed=options.seed, dtype=options.dtype)
    rows = layer_errors(model, reference, x)
    print(f"{options.model}, {options.dtype}, input {x.shape}; each layer is given the reference's own input")
    print(f"{'layer':<46} {'output':<20} {'relative error':>12}")
    for row in rows:
        print(f"{row.name:<46} {'x'.join(map(str, row.shape)):<20} {row.error:>12.1e}")
    worst = max(rows, key=lambda row: row.error)
    limit = tolerances.bound("output", options.dtype)
    verdict = "equal" if worst.error <= limit else "NOT equal"
    print(f"worst: {worst.error:.1e} in {worst.name}; bound {limit:.0e}: {verdict}")
    return 0 if worst.error <= limit else 1

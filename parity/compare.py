"""Our models beside PyTorch's, on the same weights and the same input.

    python -m parity.compare segformer_b0 [--size 64 96] [--batch 2] [--dtype float64] [--seed 0]

prints the error of every layer given the reference's input to that layer, and of the whole model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity import tolerances
from parity.reference import (
    hrnet,
    segformer,
    segformer_mmseg,
    segformer_plain,
    segformer_simple,
    segformer_zuppichini,
    segnext,
)
from parity.reference.randomise import randomise
from segjax import models, runtime
from segjax.data.augment import normalise
from segjax.dialects import BATCH_COUNTER, recognise
from segjax.families import FAMILIES, family_of
from segjax.losses import predictions
from segjax.models.segnext import evaluation_bases
from segjax.weights import as_arrays, from_torch, to_torch

REFERENCES = {
    "segformer": segformer.SegFormer,
    "segformer_plain": segformer_plain.SegFormerPlain,
    "segformer_mmseg": segformer_mmseg.SegFormerMMSeg,
    "segformer_simple": segformer_simple.SegFormerSimple,
    "segformer_zuppichini": segformer_zuppichini.SegFormerZuppichini,
    "hrnet": hrnet.HRNet,
    "hrnet_ocr": hrnet.HRNetOCR,
    "segnext": segnext.SegNeXt,
}
# The simple reference's block adds the shortcut that ours leaves to the encoder.
UNLIKE = {"segformer_simple": r"mit\.stages\.\d\.2\.\d+\.[01]"}

# ------------------------------------------------------------------------------------------------------- the two sides


def settings_of(model: nnx.Module) -> dict[str, object]:
    return models.settings(model.spec.name) | dict(model.spec.overrides)


def reference_for(model: nnx.Module, weights: Mapping[str, np.ndarray] | None = None) -> torch.nn.Module:
    """The PyTorch reference of our model in evaluation mode, strictly loaded with `weights` (its own by default)."""
    weights = to_torch(model) if weights is None else weights
    reference = REFERENCES[family_of(model.spec.name)](num_classes=model.spec.num_classes, **settings_of(model))
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
    (dtype,) = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    reference.to(dtype).load_state_dict(tensors, strict=True)
    return reference.eval()


def randomised_pair(
    name: str, *, num_classes: int, seed: int, dtype, **overrides
) -> tuple[nnx.Module, torch.nn.Module]:
    """A model and its reference with the same weights, of which every one shows in the output."""
    sizes = models.settings(name) | overrides
    reference = randomise(REFERENCES[family_of(name)](num_classes=num_classes, **sizes), seed)
    reference.to(torch.float64 if jnp.dtype(dtype) == jnp.float64 else torch.float32).eval()
    model = from_torch(
        reference.state_dict(), name=name, num_classes=num_classes, dtype=dtype, param_dtype=dtype, **sizes
    )
    return model, reference


def bases_for(model: nnx.Module, batch: int) -> tuple[np.ndarray, ...]:
    """What the model takes beside images: SegNeXt's bases (B, C, R), different for every image, else nothing."""
    if family_of(model.spec.name) != "segnext":
        return ()
    ham = model.decode_head.hamburger
    fixed = evaluation_bases(ham.channels, ham.rank)
    return (np.stack([np.roll(fixed, number, axis=0) for number in range(batch)]).astype(model.dtype),)


def run_reference(reference: torch.nn.Module, x: np.ndarray, *bases: np.ndarray):
    """The reference's (logits, taps), NCHW, on images (B, H, W, 3)."""
    return reference(to_nchw(x), *map(torch.from_numpy, bases))


def images(batch: int, size: tuple[int, int], *, seed: int, dtype) -> np.ndarray:
    """Normal noise (B, H, W, 3), which is what normalised images look like to a layer."""
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(jnp.dtype(dtype))


def to_nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def to_nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative_error(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise AssertionError(f"shapes differ: ours {ours.shape}, theirs {theirs.shape}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float64).tiny))


def compiled(model: nnx.Module) -> Callable:
    """The model as one compiled function of images, in float32 "highest" where the hardware has a choice."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x, *bases: nnx.merge(graphdef, state)(x, *bases))

    def call(x, *bases):
        with jax.default_matmul_precision("highest"):
            return run(state, jnp.asarray(x), *map(jnp.asarray, bases))

    return call


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


# ----------------------------------------------------------------------------------------- verification of a checkpoint


@dataclasses.dataclass(frozen=True)
class Report:
    """What `segjax.convert --verify` prints.

    Attributes:
      against: what ours was compared with.
      error: worst relative error of the logits.
      equal: share of pixels with the same label (of one class: the same side of probability 0.5).
      positives: share of pixels above 0.5, for one class alone.
    """

    against: str
    error: float
    equal: float
    positives: float | None
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        masks = f", {self.positives:.2%} of them positive" if self.positives is not None else ""
        what = "labels" if self.positives is None else "masks at 0.5"
        verdict = "equal" if self.passed else f"NOT equal (bound {self.bound:.0e})"
        return (
            f"verified against {self.against}, given the settings assumed: {verdict}; "
            f"worst relative error {self.error:.1e}, {self.equal:.4%} equal {what}{masks}"
        )


def verify(model: nnx.Module, state_dict: Mapping) -> Report:
    """Runs PyTorch on the checkpoint as given and our model as converted on one image."""
    from segjax.data import streets

    picture, _ = streets.scene(seed=0, index=46, size=(160, 224))
    x = np.asarray(normalise(picture[None]))
    dtype = next(iter(to_torch(model).values())).dtype
    x = x.astype(np.float64 if dtype == np.float64 else np.float32)
    against, theirs = _run_theirs(model, as_arrays(state_dict), x)
    ours = np.asarray(compiled(model)(x, *bases_for(model, len(x)))[0])
    size = picture.shape[:2]
    labels = [np.asarray(predictions(jnp.asarray(logits), size)) for logits in (ours, theirs)]
    return Report(
        against=against,
        error=relative_error(ours, theirs),
        equal=float((labels[0] == labels[1]).mean()),
        positives=float(labels[1].mean()) if model.spec.num_classes == 1 else None,
        bound=tolerances.bound("output", x.dtype),
    )


def _run_theirs(model: nnx.Module, foreign: dict[str, np.ndarray], x: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the PyTorch model and its logits (B, h, w, K), computed in the type of `x`."""
    family = family_of(model.spec.name)
    found = recognise(foreign, family=family)
    native = found.renaming.to_native(foreign)
    if found.form.dialect == "hf" and any(map(FAMILIES[family].in_head, native)):
        network = _transformers_model(model, foreign).to(torch.from_numpy(x).dtype).eval()
        import transformers

        with torch.no_grad():
            return f"transformers {transformers.__version__}", to_nhwc(network(to_nchw(x)).logits)
    weights = to_torch(model)
    # The file's own tensors, renamed but untouched by our layouts; what it lacks is what our model keeps.
    weights |= {key: value for key, value in native.items() if key in weights}
    weights = {key: value if value.dtype == np.int64 else value.astype(x.dtype) for key, value in weights.items()}
    with torch.no_grad():
        logits, _ = run_reference(reference_for(model, weights), x, *bases_for(model, len(x)))
    return "the PyTorch reference (parity/reference)", to_nhwc(logits)


def _transformers_model(model: nnx.Module, foreign: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """The checkpoint in the package that it comes from, loaded as that package loads files."""
    import transformers
    from safetensors.numpy import save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = settings_of(model)
    config = transformers.SegformerConfig(
        num_labels=model.spec.num_classes,
        hidden_sizes=list(settings["dims"]),
        depths=list(settings["depths"]),
        num_attention_heads=list(settings["num_heads"]),
        mlp_ratios=list(settings["mlp_ratios"]),
        sr_ratios=list(settings["sr_ratios"]),
        decoder_hidden_size=settings["decoder_dim"],
    )
    with tempfile.TemporaryDirectory() as folder:
        record = config.to_dict() | {"architectures": ["SegformerForSemanticSegmentation"]}
        Path(folder, "config.json").write_text(json.dumps(record))
        arrays = {key: _for_transformers(value) for key, value in foreign.items()}
        save_file(arrays, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        network, info = transformers.SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    # A counter moves no output, and files without one are common.
    if wrong := [key for key in wrong if not str(key).endswith(BATCH_COUNTER)]:
        raise AssertionError(f"transformers itself does not take the checkpoint: {wrong[:5]}")
    return network


def _for_transformers(value: np.ndarray) -> np.ndarray:
    return value if value.dtype == np.int64 else np.array(value, np.float32, order="C")


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
    runtime.prepare()
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


if __name__ == "__main__":
    sys.exit(main())

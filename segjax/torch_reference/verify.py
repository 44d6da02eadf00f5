"""Compares a converted model with PyTorch, by the published package or the reference."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from segjax import layers, models
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.checkpoint import Checkpoint
from segjax.checkpoints.key_maps import BATCH_COUNTER
from segjax.checkpoints.state_dict import from_torch, settings_of, to_torch
from segjax.data.augment import normalise
from segjax.inference.engine import labels_of
from segjax.models.segmentation_model import SegmentationModel
from segjax.models.segnext import SegNeXt, evaluation_bases
from segjax.torch_reference import (
    hrnet,
    segformer,
    segformer_mmseg,
    segformer_plain,
    segformer_simple,
    segformer_zuppichini,
    segnext,
)
from segjax.torch_reference.randomise import randomise

# Largest relative error of logits that counts as equal. Measured errors are 1e-15 in float64, and 3e-6 in float32 for
# SegFormer-B0, whose attention and LayerNorm add up to 1024 terms in another order than torch.
BOUNDS = {"float64": 1e-11, "float32": 5e-5}

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

# ------------------------------------------------------------------------------------------------------- the two sides


def reference_for(model: SegmentationModel, weights: Mapping[str, np.ndarray] | None = None) -> torch.nn.Module:
    """The PyTorch reference of a model in evaluation mode, strictly loaded from `weights`, by default the model's."""
    weights = to_torch(model) if weights is None else weights
    reference = REFERENCES[family_of(model.spec.name)](num_classes=model.spec.num_classes, **settings_of(model))
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
    (dtype,) = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    reference.to(dtype).load_state_dict(tensors, strict=True)
    return reference.eval()


def randomised_pair(
    name: str, *, num_classes: int, seed: int, dtype: DTypeLike, **overrides
) -> tuple[SegmentationModel, torch.nn.Module]:
    """A model and its reference with the same random weights, each of which affects the output."""
    sizes: dict[str, Any] = models.settings(name) | overrides
    reference = randomise(REFERENCES[family_of(name)](num_classes=num_classes, **sizes), seed)
    reference.to(torch.float64 if jnp.dtype(dtype) == jnp.float64 else torch.float32).eval()
    dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)
    model = from_torch(reference.state_dict(), name=name, num_classes=num_classes, **dtypes, **sizes)
    return model, reference


def bases_for(model: SegmentationModel, batch: int) -> tuple[np.ndarray, ...]:
    """Inputs of the model in addition to images: bases (B, C, R) for SegNeXt, different for every image, else none."""
    if not isinstance(model, SegNeXt):
        return ()
    ham = model.decode_head.hamburger
    fixed = evaluation_bases(ham.channels, ham.rank)
    return (np.stack([np.roll(fixed, number, axis=0) for number in range(batch)]).astype(model.dtype),)


def run_reference(
    reference: torch.nn.Module, x: np.ndarray, *bases: np.ndarray
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The reference's (logits, taps), NCHW, for images (B, H, W, C)."""
    return reference(to_nchw(x), *map(torch.from_numpy, bases))


def to_nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def to_nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative_error(found: ArrayLike, reference: ArrayLike) -> float:
    """max |found - reference| / max |reference|, or infinity if either has a value that is not finite.

    Raises:
      AssertionError: The shapes differ.
    """
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    if found.shape != reference.shape:
        raise AssertionError(f"shapes differ: {found.shape} from segjax, {reference.shape} from the reference")
    if not (np.isfinite(found).all() and np.isfinite(reference).all()):
        return float("inf")
    return float(np.abs(found - reference).max() / max(np.abs(reference).max(), np.finfo(np.float64).tiny))


def compiled(model: SegmentationModel) -> Callable:
    """The model as a compiled function of images, with matmul precision "highest"."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x, *bases: nnx.merge(graphdef, state)(x, *bases))

    def call(x, *bases):
        with jax.default_matmul_precision("highest"):
            return run(state, jnp.asarray(x), *map(jnp.asarray, bases))

    return call


# ----------------------------------------------------------------------------------------- verification of a checkpoint


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a verification, which `segjax convert --verify` prints.

    Attributes:
      against: Name of the PyTorch model.
      error: Largest error of the logits, relative to the largest logit.
      equal: Fraction of pixels with the same label (for one class, on the same side of probability 0.5).
      positives: Fraction of pixels above 0.5 for one class, otherwise None.
      bound: Largest accepted error.
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
            f"verified against {self.against} with the assumed settings: {verdict}; "
            f"worst relative error {self.error:.1e}, {self.equal:.4%} equal {what}{masks}"
        )


def verify(model: SegmentationModel, state_dict: Mapping | Checkpoint) -> Report:
    """Compares a model with PyTorch on the checkpoint that the model was made from, for one image.

    Args:
      model: Model made from the checkpoint.
      state_dict: As for `from_torch`.
    """
    from segjax.data import streets

    picture, _ = streets.scene(seed=0, index=46, size=(160, 224))
    # Channels repeat red, green and blue, for a model of any number of channels.
    x = np.asarray(normalise(picture[None]))[..., np.arange(model.in_channels) % 3]
    dtype = next(iter(to_torch(model).values())).dtype
    x = x.astype(np.float64 if dtype == np.float64 else np.float32)
    checkpoint = Checkpoint.of(state_dict).read_as(family=family_of(model.spec.name))
    against, theirs = _run_theirs(model, checkpoint, x)
    ours = np.asarray(compiled(model)(x, *bases_for(model, len(x)))[0])
    size = picture.shape[:2]
    upsampled = (
        layers.resize(jnp.asarray(logits), size, align_corners=model.align_corners) for logits in (ours, theirs)
    )
    labels = [np.asarray(labels_of(logits)) for logits in upsampled]
    return Report(
        against=against,
        error=relative_error(ours, theirs),
        equal=float((labels[0] == labels[1]).mean()),
        positives=float(labels[1].mean()) if model.spec.num_classes == 1 else None,
        bound=BOUNDS[x.dtype.name],
    )


def _run_theirs(model: SegmentationModel, checkpoint: Checkpoint, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the PyTorch model and its logits (B, h, w, K), computed in the dtype of `x`."""
    found = checkpoint.recognised
    if found.key_format.dialect == "hf" and found.has_head:
        network = _transformers_model(model, checkpoint.state_dict).to(torch.from_numpy(x).dtype).eval()
        import transformers

        with torch.no_grad():
            return f"transformers {transformers.__version__}", to_nhwc(network(to_nchw(x)).logits)
    weights = to_torch(model)
    # The file's own tensors, renamed, bypass segjax's layouts. The model provides those that the file lacks.
    native = found.renaming.to_native(checkpoint.state_dict)
    weights |= {key: value for key, value in native.items() if key in weights}
    weights = {key: value if value.dtype == np.int64 else value.astype(x.dtype) for key, value in weights.items()}
    with torch.no_grad():
        logits, _ = run_reference(reference_for(model, weights), x, *bases_for(model, len(x)))
    return "the PyTorch reference (segjax.torch_reference)", to_nhwc(logits)


def _transformers_model(model: SegmentationModel, foreign: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """The checkpoint as a model of transformers, loaded by its own loader."""
    import transformers
    from safetensors.numpy import save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = settings_of(model)
    # A setting of every transformers model, which is not in the signature of SegformerConfig.
    common: dict[str, Any] = dict(num_labels=model.spec.num_classes)
    config = transformers.SegformerConfig(
        **common,
        hidden_sizes=list(settings["dims"]),
        depths=list(settings["depths"]),
        num_attention_heads=list(settings["num_heads"]),
        mlp_ratios=list(settings["mlp_ratios"]),
        sr_ratios=list(settings["sr_ratios"]),
        decoder_hidden_size=settings["decoder_dim"],
        num_channels=settings["in_channels"],
    )
    with tempfile.TemporaryDirectory() as folder:
        record = config.to_dict() | {"architectures": ["SegformerForSemanticSegmentation"]}
        Path(folder, "config.json").write_text(json.dumps(record), encoding="utf-8")
        arrays = {key: _for_transformers(value) for key, value in foreign.items()}
        save_file(arrays, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        load = transformers.SegformerForSemanticSegmentation.from_pretrained
        # Its annotations cover only the call without the loading report.
        network, info = load(folder, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    # The counter of batches affects no output, and many files lack it.
    if wrong := [key for key in wrong if not str(key).endswith(BATCH_COUNTER)]:
        raise AssertionError(f"transformers cannot load the checkpoint: keys {wrong[:5]}")
    return network


def _for_transformers(value: np.ndarray) -> np.ndarray:
    return value if value.dtype == np.int64 else np.array(value, np.float32, order="C")

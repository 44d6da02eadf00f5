"""Figures of the original code, read from `goldens/*.npz`, with the key names of segjax's models.

Each file is one narrow model, run in float64 by the code that published it: weights, two inputs of different sizes,
outputs, features, loss, gradients, and a forward pass in training mode. The running statistics in the files are
those before that pass (bitwise those of the weights), so they prove nothing and are not read here.
"""

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

_FOLDER = Path(__file__).parent / "goldens"
_MIT = dict(dims=(4, 8, 10, 16), depths=(2, 1, 1, 1))
_HRNET = dict(width=2, stage1_channels=8, stage_modules=(1, 1, 2, 1), stage_blocks=(1, 1, 1, 2))
NUM_CLASSES = 7
IGNORE = 255

# File -> name in segjax.MODELS and the settings that make it the golden's model.
MODELS = {
    "segformer_nvlabs": ("segformer_b0", _MIT | dict(decoder_dim=12)),
    "segformer_jo_jstrm": ("segformer_plain_b0", _MIT | dict(decoder_dim=12, fuse="conv")),
    "segformer_camlaedtke": ("segformer_plain_b0", _MIT | dict(decoder_dim=12, fuse="conv_bn")),
    "segformer_simple": (
        "segformer_simple",
        _MIT | dict(num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), decoder_dim=12),
    ),
    "segformer_zuppichini": ("segformer_zuppichini", _MIT | dict(num_heads=(1, 2, 5, 8), decoder_dim=12)),
    "hrnet_official": ("hrnet_w18", _HRNET | dict(align_corners=False)),
    "hrnet_seed": ("hrnet_w18", _HRNET | dict(align_corners=False)),
    "hrnet_ocr_official": ("hrnet_w18_ocr", _HRNET | dict(align_corners=True, ocr_channels=8, ocr_key_channels=4)),
    "segnext_official": ("segnext_t", _MIT | dict(ham_channels=32, ham_rank=8)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One input and the original's results for it, in evaluation mode. All are NCHW and float64, except the labels.

    Attributes:
      images: (B, 3, H, W). labels: (B, H, W) uint8, 255 ignored.
      outputs: the last is the logits; before it the auxiliary ones, where there are any.
      features: the four maps of the encoder.
      loss: mean cross-entropy of the last output, upsampled to the labels' size (bilinear, align_corners False).
      gradients: of that loss, by key; only of the first case, and not in every file.
      training_outputs: in training mode with every dropout at 0; only of the first case of models with BatchNorm.
      bases: (B, C, R) given to SegNeXt's factorisation.
    """

    images: np.ndarray
    labels: np.ndarray
    outputs: tuple[np.ndarray, ...]
    features: tuple[np.ndarray, ...]
    loss: float
    gradients: dict[str, np.ndarray]
    training_outputs: tuple[np.ndarray, ...]
    bases: np.ndarray | None


def native_key(name: str, key: str) -> str:
    """The key in segjax's modules: jo-jstrm/segmentation_pytorch writes its SegFormer without prefixes."""
    if name not in ("segformer_jo_jstrm", "segformer_camlaedtke"):
        return key
    part = "backbone" if re.match(r"(patch_embed|block|norm)\d", key) else "decode_head"
    return f"{part}.{key}"


@functools.cache
def weights(name: str, *, native: bool = True) -> dict[str, np.ndarray]:
    """State dict of a golden, float32, under segjax's keys or, with `native=False`, under those in the file."""
    found = {key.removeprefix("sd/"): value for key, value in _arrays(name).items() if key.startswith("sd/")}
    return {native_key(name, key): value for key, value in found.items()} if native else found


@functools.cache
def cases(name: str) -> tuple[Case, ...]:
    """The two inputs of a golden (`hrnet_seed` has one) with the recorded results."""
    arrays = _arrays(name)
    found = []
    for case in ("case0", "case1"):
        if f"{case}/label" not in arrays:
            continue
        grad = f"{case}/eval/grad/"

        def numbered(prefix):
            return tuple(arrays[f"{prefix}{i}"] for i in range(4) if f"{prefix}{i}" in arrays)

        found.append(
            Case(
                images=arrays[f"{case}/input_nchw"].astype(np.float64),
                labels=arrays[f"{case}/label"],
                outputs=numbered(f"{case}/eval/output"),
                features=numbered(f"{case}/eval/feature"),
                loss=float(arrays[f"{case}/eval/loss"]),
                gradients={
                    native_key(name, key.removeprefix(grad)): value
                    for key, value in arrays.items()
                    if key.startswith(grad)
                },
                training_outputs=numbered(f"{case}/train/output"),
                bases=arrays.get(f"{case}/bases"),
            )
        )
    return tuple(found)


@functools.cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(_FOLDER / f"{name}.npz") as file:
        return dict(file)

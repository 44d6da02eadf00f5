"""segjax: semantic segmentation in JAX/Flax, proven equal to PyTorch.

model = segjax.from_torch(torch.load("segformer.b0.pth", weights_only=True))
logits, taps = model(images)          # (B, H, W, 3) normalised -> (B, H/4, W/4, K)
labels = segjax.Predictor("segformer.b0.pth")(image)  # uint8 (H, W, 3) -> uint8 (H, W)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segjax.checkpoints.state_dict import from_torch, load_torch, to_torch
    from segjax.inference.predictor import Predictor
    from segjax.models import MODELS, create

__version__ = "0.1.0"
__all__ = ["MODELS", "Predictor", "create", "from_torch", "load_torch", "to_torch"]

# Where each name is defined. A name is imported when it is asked for, so that `segjax --help` does not wait for jax.
_MODULES = {
    "MODELS": "segjax.models",
    "Predictor": "segjax.inference.predictor",
    "create": "segjax.models",
    "from_torch": "segjax.checkpoints.state_dict",
    "load_torch": "segjax.checkpoints.state_dict",
    "to_torch": "segjax.checkpoints.state_dict",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'segjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

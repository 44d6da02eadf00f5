"""segjax: semantic segmentation in JAX/Flax, proven equal to PyTorch.

model = segjax.from_torch(torch.load("segformer.b0.pth", weights_only=True))
logits, taps = model(images)          # (B, H, W, 3) normalised -> (B, H/4, W/4, K)
labels = segjax.Predictor("segformer.b0.pth")(image)  # uint8 (H, W, 3) -> uint8 (H, W)
"""

from typing import TYPE_CHECKING

from segjax.models import MODELS, create
from segjax.weights import from_torch, load_torch, to_torch

if TYPE_CHECKING:
    from segjax.predictor import Predictor

__all__ = ["MODELS", "Predictor", "create", "from_torch", "load_torch", "to_torch"]

__version__ = "0.1.0"


def __getattr__(name: str):
    # Only when asked for: it brings in what training is made of.
    if name == "Predictor":
        from segjax.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'segjax' has no attribute {name!r}")

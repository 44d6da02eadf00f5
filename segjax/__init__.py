"""segjax: semantic segmentation in JAX/Flax, proven equal to PyTorch.

model = segjax.from_torch(torch.load("segformer.b0.pth", weights_only=True))
logits, taps = model(images)          # (B, H, W, 3) normalised -> (B, H/4, W/4, K)
"""

from segjax.models import MODELS, create
from segjax.weights import from_torch, load_torch, to_torch

__all__ = ["MODELS", "create", "from_torch", "load_torch", "to_torch"]

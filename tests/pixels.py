"""A model whose labels NumPy can compute, and which counts the programs compiled from it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.data import specs

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 20), (150, 20, 220))
SPEC = specs.DatasetSpec("noise", ("red thing", "green thing", "blue", "yellow", "violet"), COLORS, 255)
BINARY = specs.DatasetSpec("one", ("thing",), COLORS[:1], 255)


class Spec(NamedTuple):
    name: str
    num_classes: int
    overrides: tuple = ()


# Shapes that any of these models was compiled for.
PROGRAMS = []


class Pixels(nnx.Module):
    """Scores of each pixel by its colour: images (B, H, W, 3) -> logits (B, H, W, K).

    With `context` the mean colour of what the model sees counts too, as in models that look around.
    """

    def __init__(self, num_classes=5, seed=0, *, context=False):
        kernels = np.random.default_rng(seed).standard_normal((2, 3, num_classes)) * [[[1]], [[2 * context]]]
        self.kernel, self.context = (nnx.Param(jnp.asarray(kernel, jnp.float32)) for kernel in kernels)
        self.spec, self.size_multiple, self.align_corners = Spec("pixels", num_classes), 1, False
        self.in_channels, self.dtype = 3, jnp.dtype(jnp.float32)
        self.eval()

    def __call__(self, images):
        PROGRAMS.append(images.shape)
        around = images.mean(axis=(1, 2), keepdims=True)
        parts = ((images, self.kernel), (around, self.context))
        return sum(jnp.einsum("bhwc,ck->bhwk", part, kernel[...], precision="highest") for part, kernel in parts), {}

    def scores(self, image):
        """float64 (H, W, K) of an image uint8 (H, W, 3)."""
        normalised = (image - np.array(specs.IMAGENET_MEAN)) / np.array(specs.IMAGENET_STD)
        kernel, context = (np.asarray(part[...], np.float64) for part in (self.kernel, self.context))
        return normalised @ kernel + normalised.mean(axis=(0, 1)) @ context

    def labels(self, image):
        scores = self.scores(image)
        return (scores[..., 0] > 0 if scores.shape[-1] == 1 else scores.argmax(axis=-1)).astype(np.uint8)


def scene(seed, height, width):
    """Smooth colours with a few edges, such as survive compression: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [
        np.sin(rows / rng.uniform(9, 20) + rng.uniform(0, 6)) + np.sin(columns / rng.uniform(9, 20)) for _ in "rgb"
    ]
    image = np.stack(waves, axis=-1) * 50 + 125
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(20, 235, 3)
    return image.round().clip(0, 255).astype(np.uint8)

"""Layers with the same arithmetic as torch's, shared by all models.

Activations are (B, H, W, C). Conversion relies on the attribute names: `kernel` is torch's `weight` of a convolution
(HWIO) or of a linear layer (in, out), `scale` is the `weight` of a norm, `mean` and `var` are its running statistics.
Every layer has two dtypes: `param_dtype` of its stored parameters and `dtype` of its computation. Norms, softmax and
sums of logits are computed in at least float32.

`functional` contains the operations that have several implementations, and chooses between them.
"""

from segjax.kernels.choice import (
    is_fast_on_cpu,
    is_fast_on_gpu,
    meant_for,
    published_implementations,
    weights_are_prepared,
)
from segjax.kernels.precision import at_least_float32
from segjax.layers.blocks import (
    GELU,
    PLAIN,
    BlockExecution,
    ReLU,
    Sequential,
    run_blocks,
)
from segjax.layers.checks import feature_taps, require_four, require_images, require_whole_heads
from segjax.layers.decoder import conv1x1_of_resized, decode, project_and_fuse
from segjax.layers.drop import Dropout2d, DropPath, DropPathOfBatch, RandomStream, draw_per_sample
from segjax.layers.functional import (
    attention,
    cheaper_order,
    conv,
    cpu_implementation,
    gelu,
    once,
    product,
    recomputed,
    residual,
    resize,
    upsample_nearest,
)
from segjax.layers.initializers import (
    classifier_init,
    fan_in_bias_init,
    fan_in_init,
    fan_out_init,
    joint_projection_init,
    linear_init,
)
from segjax.layers.linear import Conv, Linear, classify
from segjax.layers.mix_ffn import feed_forward
from segjax.layers.norm import BatchNorm, GroupNorm, LayerNorm, conv_norm

__all__ = [
    "GELU",
    "PLAIN",
    "BatchNorm",
    "BlockExecution",
    "Conv",
    "DropPath",
    "DropPathOfBatch",
    "Dropout2d",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "RandomStream",
    "ReLU",
    "Sequential",
    "at_least_float32",
    "attention",
    "cheaper_order",
    "classifier_init",
    "classify",
    "conv",
    "conv1x1_of_resized",
    "conv_norm",
    "cpu_implementation",
    "decode",
    "draw_per_sample",
    "fan_in_bias_init",
    "fan_in_init",
    "fan_out_init",
    "feature_taps",
    "feed_forward",
    "gelu",
    "is_fast_on_cpu",
    "is_fast_on_gpu",
    "joint_projection_init",
    "linear_init",
    "meant_for",
    "once",
    "product",
    "project_and_fuse",
    "published_implementations",
    "recomputed",
    "require_four",
    "require_images",
    "require_whole_heads",
    "residual",
    "resize",
    "run_blocks",
    "upsample_nearest",
    "weights_are_prepared",
]

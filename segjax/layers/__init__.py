"""What torch's layers compute, once, for every model of this package.

Activations are (B, H, W, C) throughout. Attribute names follow the one rule that conversion relies on: `kernel` is
torch's `weight` of a convolution (HWIO) or a linear layer (in, out), `scale` is the `weight` of a norm, `mean` and
`var` are the running statistics. Two dtypes meet in every layer: `param_dtype` is what is stored, `dtype` is what is
multiplied; norms, softmax and sums of logits never compute in less than float32.

Operations that have several implementations are in `functional`, which decides which one runs.
"""

from segjax.kernels.choice import as_published, fast_cpu_forms, meant_for, published_forms
from segjax.kernels.precision import at_least_float32
from segjax.kernels.units import compiled_apart, once
from segjax.layers.blocks import (
    CHANGED_BY_A_CALL,
    GELU,
    PLAIN,
    BlockExecution,
    ReLU,
    Sequential,
    blocks_executed,
    run_blocks,
)
from segjax.layers.checks import feature_taps, require_four, require_images, require_whole_heads
from segjax.layers.decoder import conv1x1_of_resized, decode, fused_projections, project_and_fuse, slices_by_level
from segjax.layers.drop import Dropout2d, DropPath, DropPathOfBatch, draw_per_sample
from segjax.layers.functional import attention, conv, enlarge_nearest, gelu, resize
from segjax.layers.initializers import (
    LINEAR_STD,
    classifier_init,
    fan_in_bias_init,
    fan_in_init,
    fan_out_init,
    joint_projection_init,
    linear_init,
)
from segjax.layers.linear import Conv, Linear, classify
from segjax.layers.mix_ffn import feed_forward
from segjax.layers.norm import BatchNorm, GroupNorm, LayerNorm

__all__ = [
    "CHANGED_BY_A_CALL",
    "GELU",
    "LINEAR_STD",
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
    "ReLU",
    "Sequential",
    "as_published",
    "at_least_float32",
    "attention",
    "blocks_executed",
    "classifier_init",
    "classify",
    "compiled_apart",
    "conv",
    "conv1x1_of_resized",
    "decode",
    "draw_per_sample",
    "enlarge_nearest",
    "fan_in_bias_init",
    "fan_in_init",
    "fan_out_init",
    "fast_cpu_forms",
    "feature_taps",
    "feed_forward",
    "fused_projections",
    "gelu",
    "joint_projection_init",
    "linear_init",
    "meant_for",
    "once",
    "project_and_fuse",
    "published_forms",
    "require_four",
    "require_images",
    "require_whole_heads",
    "resize",
    "run_blocks",
    "slices_by_level",
]

"""Random weights, all of which affect the output, for any PyTorch module of this folder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter and BatchNorm statistic with values that affect the output, and returns `module`.

    Kernels are normal with variance 1 / fan-in, which keeps activations near 1 and attention far from uniform. Scales
    and running variances are uniform in 0.5 .. 1.5. Biases and running means are normal with standard deviation 0.2.
    Values are drawn in float32 on the CPU, without torch's global generator, so a seed gives exactly the same values in
    every wider dtype and on every device. Parameters are distinguished by name and rank: `bias` (also at the end of a
    longer name) and `b` are biases, `g` and other vectors are scales, all others kernels.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator, dtype=torch.float32)

    def around_one(like: Tensor) -> Tensor:
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float32)

    for name, parameter in module.named_parameters():
        own = name.rpartition(".")[2]
        if own.endswith("bias") or own == "b":
            parameter.copy_(normal(parameter, 0.2))
        elif own.startswith("layer_scale"):
            # Near 0.01, as published: near 1, the products in SegNeXt-L's 38 gated blocks would overflow.
            parameter.copy_(0.01 * around_one(parameter))
        elif parameter.ndim == 1 or own == "g":
            parameter.copy_(around_one(parameter))
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(normal(parameter, 1.0 / math.sqrt(fan_in)))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(normal(buffer, 0.2))
        elif name.endswith("running_var"):
            buffer.copy_(around_one(buffer))
    return module

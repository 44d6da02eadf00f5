"""Tolerances: the largest accepted differences between segjax and the PyTorch reference, each with its reason.

Each bound holds for every family, for whole models and single layers. Tests of other comparisons state their own: the
references against the original code (test_reference*.py), the optimizer step, key formats of transformers.

Errors are relative: for outputs max |segjax - reference| / max |reference|; for gradients the same for the worst
parameter (see test_grad.gradient_errors); for trajectories the norm of the difference divided by the norm of the
distance moved. float64 shows mistakes: everything except rounding exceeds its bounds by orders of magnitude. float32
shows what a user gets: sums in another order, through up to 52 blocks.
"""

import jax.numpy as jnp

from segjax.torch_reference import verify

BOUNDS = {
    # What `segjax convert --verify` holds users' checkpoints to.
    ("output", "float64"): verify.BOUNDS["float64"],
    ("output", "float32"): verify.BOUNDS["float32"],
    # Each gradient is a sum over all pixels, with cancellation: 1e-14 was measured on the largest parameters.
    ("gradient", "float64"): 1e-10,
    # 1e-4 was measured on B2 and on OCR. A ReLU input within rounding of zero can pass on one side only: then 4e-3 and
    # more, so that test_grad takes inputs that have none.
    ("gradient", "float32"): 1e-3,
    # AdamW divides by the root of the second moment: a gradient near zero turns a rounding into a step. 3e-10 measured,
    # and 2e-9 of OCR under SGD.
    ("trajectory", "float64"): 1e-8,
    # 1.5e-3 measured of parameters after 20 steps of AdamW at lr 1e-3, 2e-6 of SGD. The losses of HRNet and OCR, whose
    # path changes with each ReLU input within rounding of zero (see README.md), lie up to 1.5e-2 apart.
    ("trajectory", "float32"): 3e-2,
    # A loss and its gradient with respect to the logits: sums over pixels, and nothing deep. 5e-15 was measured.
    ("loss", "float64"): 1e-12,
    # 4e-6 was measured of the gradient of Lovász, for which torch subtracts neighbouring values near 1.
    ("loss", "float32"): 2e-5,
    # Means and variances over a batch.
    ("statistics", "float64"): 1e-11,
    ("statistics", "float32"): 5e-5,
}


def bound(kind: str, dtype) -> float:
    return BOUNDS[kind, jnp.dtype(dtype).name]

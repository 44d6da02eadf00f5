"""Records the region mutual information of the package rmi-pytorch, and its gradient, for tests/test_losses.py.

    pip install numpy torch
    pip install --no-deps rmi-pytorch
    python parity/record_rmi.py

It writes tests/rmi.npz with the inputs, the losses, their gradients and the packages' versions.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch
from rmi import RMILoss

CLASSES = 3
# A multiple of the 4x4 cells of the pooling, and a size that is not.
SIZES = ((16, 28), (21, 18))


def main():
    # The package calls a function that torch has since renamed.
    torch.cholesky = torch.linalg.cholesky
    # The settings of the published training script: averages of 4x4 pixels, and the trace of the Cholesky factor.
    loss = RMILoss(with_logits=True, radius=3, bce_weight=0, pool="avg", stride=4, use_log_trace=True)
    recorded = {}
    for seed, size in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        logits = (2 * rng.standard_normal((2, *size, CLASSES))).astype(np.float32)
        labels = rng.integers(0, CLASSES, (2, *(-(-side // 6) for side in size)))
        labels = np.kron(labels, np.ones((1, 6, 6), int))[:, : size[0], : size[1]].astype(np.uint8)
        leaf = torch.from_numpy(logits).double().permute(0, 3, 1, 2).requires_grad_()
        target = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).permute(0, 3, 1, 2).double()
        value = loss(leaf, target)
        value.backward()
        recorded |= {f"logits{seed}": logits, f"labels{seed}": labels, f"loss{seed}": value.detach().numpy()}
        recorded[f"gradient{seed}"] = leaf.grad.permute(0, 2, 3, 1).numpy()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("rmi-pytorch", "torch", "numpy")]
    np.savez_compressed(Path(__file__).parents[1] / "tests" / "rmi.npz", versions=np.array(versions), **recorded)


if __name__ == "__main__":
    main()

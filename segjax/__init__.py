"""segjax: semantic segmentation in JAX/Flax, proven equal to PyTorch."""

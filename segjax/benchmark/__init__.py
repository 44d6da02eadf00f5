"""Times models next to PyTorch's."""

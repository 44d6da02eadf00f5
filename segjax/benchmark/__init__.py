"""Times segjax's models and PyTorch's."""

"""PyTorch references of every model, for verification, ONNX and torch.export; needs the extra `parity`."""

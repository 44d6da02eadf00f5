"""Models as files that run without segjax: StableHLO, ONNX and torch.export."""

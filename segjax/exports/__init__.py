"""Exports of models to files that run without segjax: StableHLO, ONNX and torch.export."""

"""Exports of models to files that run without segjax: StableHLO, ONNX, OpenVINO and torch.export."""

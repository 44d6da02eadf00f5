"""The PyTorch reference with a model's weights as a program of `torch.export`, also the source of ONNX files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from segjax.exports.format import LEAST, ExportFormat
from segjax.inference.runtimes import ABOUT, quiet_torch
from segjax.models.segmentation_model import SegmentationModel
from segjax.models.segnext import SegNeXt, evaluation_bases
from segjax.torch_reference.verify import reference_for


class Program(torch.nn.Module):
    """Images -> logits (B, K, h, w) or labels (B, H, W), as `export_format` describes.

    Parameters are stored in `traced_dtype` and converted to float32 for each use.
    """

    mean: Tensor
    std: Tensor
    bases: Tensor | None

    def __init__(self, model: SegmentationModel, export_format: ExportFormat):
        super().__init__()
        self.export_format = export_format
        self.num_classes = model.spec.num_classes
        self.align_corners = model.align_corners
        self.reference = reference_for(model).requires_grad_(False)
        stored = getattr(torch, export_format.traced_dtype)
        for parameter in self.reference.parameters():
            parameter.data = parameter.data.to(stored)
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (export_format.mean, export_format.std))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        bases = None
        if isinstance(model, SegNeXt):
            # segjax evaluates with fixed bases. Without them the reference draws new ones at each call, as published.
            ham = model.decode_head.hamburger
            bases = torch.from_numpy(evaluation_bases(ham.channels, ham.rank)).float()  # (C, R)
        self.register_buffer("bases", bases)

    def forward(self, images: Tensor) -> Tensor:
        if self.export_format.preprocessing:
            images = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        bases = () if self.bases is None else (self.bases.expand(images.shape[0], -1, -1),)
        wide = {name: parameter.float() for name, parameter in self.reference.named_parameters()}
        logits, _ = torch.func.functional_call(self.reference, wide, (images, *bases))
        logits = self.export_format.scaled(logits)
        if not self.export_format.argmax:
            return logits
        scores = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=self.align_corners)
        labels = (scores[:, 0] > self.export_format.least_logit) if self.num_classes == 1 else scores.argmax(dim=1)
        return labels.to(torch.uint8 if self.num_classes <= 256 else torch.int32)


def traced(model: SegmentationModel, export_format: ExportFormat) -> torch.export.ExportedProgram:
    """The program as a graph of operations, with symbolic sizes if the format is dynamic."""
    # torch.export would treat a batch of 1 as a constant.
    batch, (height, width) = 2 if export_format.dynamic else 1, export_format.size
    axes = (1, 2) if export_format.channels_last else (2, 3)
    images = torch.zeros(
        export_format.input_shape(batch, height, width), dtype=getattr(torch, export_format.input_dtype)
    )
    open_sizes = None
    if export_format.dynamic:
        multiple = model.size_multiple
        sides = [torch.export.Dim(name, min=-(-LEAST // multiple)) for name in ("height", "width")]
        open_sizes = {0: torch.export.Dim("batch")} | {
            axis: side if multiple == 1 else multiple * side for axis, side in zip(axes, sides, strict=True)
        }
    with torch.no_grad(), quiet_torch():
        program = torch.export.export(Program(model, export_format).eval(), (images,), dynamic_shapes=(open_sizes,))
    _forget_origins(program)
    return program


def _forget_origins(program: torch.export.ExportedProgram) -> None:
    """Removes where operations come from: folders and numbers of this process, which would be written with each."""
    for graph_module in program.graph_module.modules():
        for node in getattr(getattr(graph_module, "graph", None), "nodes", ()):
            for origin in ("stack_trace", "from_node"):
                node.meta.pop(origin, None)


# ---------------------------------------------------------------------------------------------------------------- torch


def write_torch(path: Path, model: SegmentationModel, export_format: ExportFormat, metadata: dict[str, object]) -> None:
    """Writes a program of `torch.export`, which PyTorch runs without segjax, with the metadata as an extra file.

    It is not TorchScript, which is deprecated and checks no shapes. The operations are those of inference, which
    converters such as Core ML's take.
    """
    with quiet_torch():
        program = traced(model, export_format).run_decompositions({})
        _forget_origins(program)
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(metadata)})

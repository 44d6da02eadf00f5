"""segjax: semantic segmentation in JAX/Flax, proven equal to PyTorch.

    model = segjax.create("segformer_b2", num_classes=19)       # random weights
    logits, taps = model(images)                  # (B, H, W, 3) normalised -> (B, H/4, W/4, K)

    checkpoint = segjax.load("segformer.b0.pth")  # any checkpoint; also a folder or hf:owner/name
    checkpoint.model, checkpoint.classes, checkpoint.metadata
    segjax.list_weights("*cityscapes*")           # published weights that are loaded by name
    checkpoint = segjax.load("segformer_b2.cityscapes")
    segjax.save(checkpoint, "b0.safetensors")

    predictor = segjax.Predictor("runs/mine")
    labels = predictor(image)                     # uint8 (H, W, 3), a path or a PIL image -> uint8 (H, W)

    segjax.evaluate_dataset("runs/mine", "camvid:test")["mean_iou"]
    segjax.compare_models("runs/mine", "runs/other", "camvid:test")["difference"]
    segjax.audit_dataset("runs/mine", "camvid:test")[0]["box"]
    segjax.export_model("runs/mine", "mine.onnx", size=(512, 1024))
    segjax.evaluate_dataset("mine.onnx", reference="runs/mine")["reference"]["difference"]

    segjax.initialize(model, "mit_b2.pth")        # initial weights: an encoder, or a model of other classes
    model = segjax.from_torch(state_dict)         # a PyTorch state dict
    segjax.load_torch(model, state_dict)
    state_dict = segjax.to_torch(model, dialect="hf")

and the namespaces `layers`, `models`, `losses`, `metrics`, `data` and `train`. All of it is imported when it is first
used: `import segjax` itself does not import jax.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from segjax import data, layers, losses, metrics, models, train
    from segjax.checkpoints.initialize import initialize
    from segjax.checkpoints.load import LoadedCheckpoint, load
    from segjax.checkpoints.published import list_weights
    from segjax.checkpoints.save import save
    from segjax.checkpoints.state_dict import from_torch, load_torch, to_torch
    from segjax.exports.export import export_model
    from segjax.inference.audit import audit_dataset
    from segjax.inference.comparison import compare_models
    from segjax.inference.evaluate_dataset import evaluate_dataset
    from segjax.inference.open_exported import open_exported
    from segjax.inference.predictor import Predictor
    from segjax.models import MODELS, create

__all__ = [
    "MODELS",
    "LoadedCheckpoint",
    "Predictor",
    "__version__",
    "audit_dataset",
    "compare_models",
    "create",
    "data",
    "evaluate_dataset",
    "export_model",
    "from_torch",
    "initialize",
    "layers",
    "list_weights",
    "load",
    "load_torch",
    "losses",
    "metrics",
    "models",
    "open_exported",
    "save",
    "to_torch",
    "train",
]

_MODULE_OF = {
    "MODELS": "segjax.models",
    "LoadedCheckpoint": "segjax.checkpoints.load",
    "Predictor": "segjax.inference.predictor",
    "audit_dataset": "segjax.inference.audit",
    "compare_models": "segjax.inference.comparison",
    "create": "segjax.models",
    "evaluate_dataset": "segjax.inference.evaluate_dataset",
    "export_model": "segjax.exports.export",
    "from_torch": "segjax.checkpoints.state_dict",
    "initialize": "segjax.checkpoints.initialize",
    "list_weights": "segjax.checkpoints.published",
    "load": "segjax.checkpoints.load",
    "load_torch": "segjax.checkpoints.state_dict",
    "open_exported": "segjax.inference.open_exported",
    "save": "segjax.checkpoints.save",
    "to_torch": "segjax.checkpoints.state_dict",
}
_NAMESPACES = ("data", "layers", "losses", "metrics", "models", "train")


def __getattr__(name: str):
    if name in _NAMESPACES:
        return importlib.import_module(f"segjax.{name}")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'segjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

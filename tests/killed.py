"""Commands that `commands/test_replacing.py` kills. `forks` starts them, with models that are created instantly.

The checkpoint `N`, which is not a file, is a model with random weights from the seed N.
"""

import importlib.util
from types import SimpleNamespace
from unittest import mock

import numpy as np

from segjax.checkpoints import load, state_dict
from segjax.checkpoints.save import save as save_checkpoint
from segjax.commands import audit as audit_command
from segjax.commands import compare as compare_command
from segjax.commands import conversion, data
from segjax.commands import convert as convert_command
from segjax.commands import evaluate as evaluate_command
from segjax.commands import export as export_command
from segjax.commands import predict as predict_command
from segjax.data import specs
from segjax.inference import audit as audit_engine
from segjax.inference import comparison as comparison_engine
from segjax.inference import evaluate_dataset, evaluation
from segjax.inference.predictor import Predictor
from segjax.metrics import class_counts, confusion_matrix
from segjax.viz import audit as audit_page
from segjax.viz import comparison as comparison_page
from segjax.viz import report
from tests.made_archives import few_images
from tests.pixels import SPEC, Pixels
from tests.tiny import SIZES, abstract_model

# What they import late.
MODULES = "tests.killed", "av", "cv2", "orbax.checkpoint", "safetensors.numpy", "segjax.exports.export"
MODULES += ("matplotlib.figure", "matplotlib.backends.backend_agg", "tensorflow_datasets")
HAS_TORCH = importlib.util.find_spec("torch") is not None
MODULES += ("torch",) * HAS_TORCH

# Only its shapes, so that the server has no JAX backend.
_ABSTRACT = abstract_model("segformer_b0", 5, **SIZES)


def _segformer(checkpoint):
    """A tiny SegFormer of NumPy's arrays."""
    rng = np.random.default_rng(int(checkpoint))
    for variable in state_dict.named_variables(_ABSTRACT).values():
        variable.set_value(rng.standard_normal(variable.get_value().shape, np.float32))
    return _ABSTRACT


def _pixels(path, **_):
    return load.LoadedCheckpoint(Pixels(5, seed=int(path.name)), SPEC, {})


def convert(flags):
    checkpoint = SimpleNamespace(param_dtype=np.float32, is_orbax=False)
    with (
        mock.patch.object(conversion, "read_checkpoint", lambda *_, **__: mock.Mock(read_as=lambda **_: checkpoint)),
        mock.patch.object(conversion, "_model_of", lambda *_: (_segformer(flags[0]), {})),
        mock.patch.object(conversion, "_measure_transformers"),
    ):
        return convert_command.main(flags)


def save(flags):
    save_checkpoint(_segformer(flags[0]), *flags[1:])


def export(flags):
    with (
        mock.patch("segjax.exports.export.rounded", lambda model, **_: model),
        mock.patch("segjax.exports.export._is_equal", lambda *_: True),
        mock.patch.object(load, "load", _pixels),
    ):
        return export_command.main(flags)


def predict(flags):
    model = Pixels(5, seed=int(flags[flags.index("--checkpoint") + 1]))

    def labels(_, images):
        return list(map(model.labels, images))

    def probabilities(_, images):
        return [model.scores(image).astype(np.float32) for image in images]

    with (
        mock.patch.object(Predictor, "labels", labels),
        mock.patch.object(Predictor, "probabilities_of", probabilities),
        mock.patch.object(Predictor, "refuse_too_large", lambda *_: None),
        mock.patch.object(load, "load", _pixels),
    ):
        return predict_command.main(flags)


def evaluate(flags):
    def evaluated(checkpoint, *_, output, **__):
        rng = np.random.default_rng(int(checkpoint.name))
        images = rng.integers(0, 256, (3, 90, 110, 3), np.uint8)
        truth, predicted = rng.integers(0, 5, (2, 3, 90, 110), np.uint8)
        confusion = confusion_matrix(truth, predicted, num_classes=5, ignore_label=255)
        worst = list(map(report.Shown, "abc", images, truth, predicted))
        report.write(output, confusion, SPEC, worst, title="made up", facts={}, metadata={})
        by_image = np.stack([class_counts(confusion)])
        details = evaluation.Measured(confusion, by_image[0], by_image, [], {}).details()
        return report.summarise(confusion, SPEC) | details | {"step": None}

    with mock.patch.object(evaluate_dataset, "evaluate_dataset", evaluated):
        return evaluate_command.main(flags)


def compare(flags):
    def compared(checkpoint, *_, output, **__):
        rng = np.random.default_rng(int(checkpoint.name))
        image, (truth, *pair) = rng.integers(0, 256, (90, 110, 3), np.uint8), rng.integers(0, 5, (3, 90, 110), np.uint8)
        confusions = [confusion_matrix(truth, predicted, num_classes=5, ignore_label=255) for predicted in pair]
        by_image = np.stack([class_counts(confusion) for confusion in confusions])[:, None]
        found = comparison_engine._Compared(by_image, [0], truth.size, 1, {0: np.stack(pair)})
        summary = found.summary(SPEC, ["a"])
        shown = [comparison_page.Shown("a", image, truth, *pair)]
        comparison_page.write(output, summary, SPEC, shown, facts={}, metadata={})
        return summary

    with mock.patch.object(comparison_engine, "compare_models", compared):
        return compare_command.main(flags)


def audit(flags):
    def audited(checkpoint, *_, output, **__):
        rng = np.random.default_rng(int(checkpoint.name))
        names = {"image": "a", "given": SPEC.class_names[0], "predicted": SPEC.class_names[1]}
        regions = [{**names, "box": [1, 2, 3, 4], "pixels": 12, "score": float(rng.random()), "confidence": 0.5}] * 9
        image, (truth, predicted) = (
            rng.integers(0, 256, (90, 110, 3), np.uint8),
            rng.integers(0, 5, (2, 90, 110), np.uint8),
        )
        shown = [audit_page.Shown(image, truth, predicted, truth > 3)]
        audit_page.write(output, regions, SPEC, shown, title="made up", facts={}, metadata={})
        return regions

    with mock.patch.object(audit_engine, "audit_dataset", audited):
        return audit_command.main(flags)


def prepare(flags):
    with mock.patch.dict(specs.DATASETS, few_images()):
        return data.main(["prepare", *flags])

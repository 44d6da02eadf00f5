"""Gradients of the training loss with respect to every parameter, in evaluation and in training mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parity import compare, golden
from parity.subjects import AT_ONCE, FAMILIES, NUM_CLASSES, SUBJECTS
from parity.test_forward import channels_last, golden_model
from segjax.checkpoints import architectures
from segjax.checkpoints.layout import to_torch_layout, torch_name
from segjax.models.functional import FunctionalModel
from segjax.torch_reference import verify

DTYPES = ("float64", "float32")
AUX_WEIGHT = 0.4


def our_gradients(model, x, labels, *bases, training, align_corners, aux_weight=AUX_WEIGHT):
    """Loss, gradients by torch key and layout, and running statistics after the forward pass by torch key."""
    functional = FunctionalModel(model)
    params, batch_stats = functional.arrays()
    cross_entropy = partial(compare.cross_entropy, ignore_label=255, align_corners=align_corners)

    def loss_of(params):
        bound = functional.bind(params, batch_stats, key=jax.random.key(0) if training else None)
        logits, taps = bound(x, *bases)
        loss = cross_entropy(logits, labels)
        if "aux_logits" in taps:
            loss += aux_weight * cross_entropy(taps["aux_logits"], labels)
        return loss, functional.batch_stats_of(bound)

    (loss, stats), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    by_key = {torch_name(path): to_torch_layout(path, np.asarray(value)) for path, value in gradients.items()}
    return float(loss), by_key, {torch_name(path): np.asarray(value) for path, value in stats.items()}


def their_loss(reference, x, labels, *bases):
    """The loss that a published recipe trains on, from a reference in the mode it is in."""
    labels = torch.from_numpy(labels).long()
    # Of HRNets; the other families are published with False.
    align_corners = getattr(reference, "align_corners", False)

    def loss_of(logits):
        upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=align_corners)
        return F.cross_entropy(upsampled, labels, ignore_index=255)

    logits, taps = verify.run_reference(reference, x, *bases)
    return loss_of(logits) + (AUX_WEIGHT * loss_of(taps["aux_logits"]) if "aux_logits" in taps else 0)


def gradient_errors(ours, theirs, is_idle):
    """Per parameter, relative to its own largest gradient, or to the largest of all where the true one is zero."""
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    for key, value in theirs.items():
        scale = largest if is_idle(key) else np.abs(value).max()
        yield key, float(np.abs(ours[key] - value).max() / scale)


# Of the official models at once, and of their variants in the slow tier.
WITH_GRADIENTS = [file for file in golden.MODELS if golden.cases(file)[0].gradients]
OFFICIAL = ("segformer_nvlabs", "hrnet_official", "segnext_official")
ORIGINALS = [pytest.param(file, marks=[pytest.mark.slow] * (file not in OFFICIAL)) for file in WITH_GRADIENTS]


@pytest.mark.parametrize("file", ORIGINALS)
def test_gradients_equal_the_original_code(file, float64, within):
    case = golden.cases(file)[0]
    bases = () if case.bases is None else (case.bases,)
    # The golden's loss is that of the last output only, upsampled with align_corners=False for every model.
    settings = dict(training=False, align_corners=False, aux_weight=0)
    x, labels = channels_last(case.images), jnp.asarray(case.labels)
    _, ours, _ = our_gradients(golden_model(file), x, labels, *bases, **settings)
    theirs = case.gradients
    largest = max(np.abs(value).max() for value in theirs.values())

    def is_idle(key):
        # Rounding on the original's side: ReLU has stopped all that feeds it, or a softmax or norm takes it out.
        return np.abs(theirs[key]).max() < 1e-12 * largest

    assert sum(map(is_idle, theirs)) < len(theirs) / 4
    for _, error in gradient_errors(ours, theirs, is_idle):
        within("gradient", "float64", error, f"golden {file}")


# float64 finds mistakes; float32 shows what rounding does, in the slow tier. There too what the goldens hold already:
# gradients in evaluation, and of SegNeXt, which takes longest to compile.
CASES = [
    pytest.param(
        subject,
        *case,
        id=f"{name}-{what}",
        marks=[] if what == "training" and name in AT_ONCE and name != "segnext" else [pytest.mark.slow],
    )
    for name, subject in FAMILIES.items()
    for what, case in (
        ("evaluation", ("float64", 1, False)),
        ("training", ("float64", 1, True)),
        ("training in float32", ("float32", 2, True)),
    )
]


@pytest.mark.parametrize(("subject", "dtype", "which", "training"), CASES)
def test_gradient_of_every_parameter_equals_the_reference(subject, dtype, which, training, float64, within):
    batch, size = subject.inputs[which]
    # With seed 3, OCR's regions are so alike that its queries have a gradient of 1e-6 of the largest: 2e-10 in float64.
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=4, dtype=dtype, **subject.fixed
    )
    assert_gradients_equal(subject, model, reference, batch, size, dtype, training, within, "narrow")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2"])
def test_gradients_at_full_width_equal_the_reference(name, dtype, float64, within):
    still = dict.fromkeys(SUBJECTS["segformer"].still, 0.0)
    model, reference = compare.randomised_pair(name, num_classes=NUM_CLASSES, seed=2, dtype=dtype, **still)
    assert_gradients_equal(SUBJECTS["segformer"], model, reference, 2, (64, 96), dtype, True, within, name)


def assert_gradients_equal(subject, model, reference, batch, size, dtype, training, within, what):
    # With seed 13, one of HRNet's 462,244 ReLU inputs lies 6e-7 from zero and takes another sign in float32: 1.4e-2.
    x, bases = compare.images(batch, size, seed=15, dtype=dtype), verify.bases_for(model, batch)
    labels = np.random.default_rng(17).integers(0, NUM_CLASSES, (batch, *size)).astype(np.uint8)
    labels[:, : size[0] // 4] = 255
    reference.train(training)
    loss = their_loss(reference, x, labels, *bases)
    loss.backward()
    settings = dict(training=training, align_corners=model.align_corners)
    our_loss, ours, stats = our_gradients(model, x, jnp.asarray(labels), *bases, **settings)
    what = f"{architectures.family_of(model.spec.name)}, {what}, {'training' if training else 'evaluation'}"
    within("output", dtype, abs(our_loss - loss.item()) / loss.item(), f"{what}, loss")
    theirs = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}

    for _, error in gradient_errors(ours, theirs, partial(subject.is_idle, training=training)):
        within("gradient", dtype, error, f"{what}, worst parameter")
    their_stats = {key: value.numpy() for key, value in reference.named_buffers() if "running" in key}
    assert stats.keys() == their_stats.keys()
    for key, value in their_stats.items():
        within("statistics", dtype, verify.relative_error(stats[key], value), f"{what}, running statistics")

"""Gradients of the training loss with respect to every parameter, in evaluation and in training mode."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segjax
from parity import compare, narrow
from parity.test_forward import golden_weights
from segjax.losses import cross_entropy
from segjax.state import Skeleton
from segjax.weights import to_torch_layout, torch_name

DTYPES = ("float64", "float32")


def our_gradients(model, x, labels, *, training):
    """Loss, gradients by torch key and layout, and running statistics after the forward pass by torch key."""
    skeleton = Skeleton(model)
    params, batch_stats = skeleton.arrays()

    def loss_of(params):
        bound = skeleton.bind(params, batch_stats, key=jax.random.key(0) if training else None)
        total, count = cross_entropy(bound(x)[0], labels, ignore_label=255)
        return total / count, skeleton.batch_stats_of(bound)

    (loss, stats), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    by_key = {torch_name(path): to_torch_layout(path, np.asarray(value)) for path, value in gradients.items()}
    return float(loss), by_key, {torch_name(path): np.asarray(value) for path, value in stats.items()}


def gradient_errors(ours, theirs, *, training=False):
    """Per parameter, relative to its own largest gradient, or to the largest of all where the true one is zero."""
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    for key, value in theirs.items():
        is_idle = training and re.fullmatch(compare.WITHOUT_GRADIENT, key)
        yield key, float(np.abs(ours[key] - value).max() / (largest if is_idle else np.abs(value).max()))


def test_gradients_equal_the_original_code(golden, float64, within):
    model = segjax.from_torch(golden_weights(golden), dtype=jnp.float64, param_dtype=jnp.float64)
    x = np.moveaxis(golden["case0/input_nchw"], 1, -1).astype(np.float64)
    _, ours, _ = our_gradients(model, x, jnp.asarray(golden["case0/label"]), training=False)
    prefix = "case0/eval/grad/"
    theirs = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    for key, error in gradient_errors(ours, theirs):
        within("gradient", "float64", error, f"golden NVlabs, {'backbone' if 'backbone' in key else 'head'}")


def test_training_forward_equals_the_original_code(golden, float64, within):
    # The golden's running statistics are those from before its forward pass, so that they say nothing; those after it
    # are compared with the reference and with transformers.
    model = segjax.from_torch(
        golden_weights(golden), dtype=jnp.float64, param_dtype=jnp.float64, drop_path_rate=0.0, dropout_rate=0.0
    )
    model.train()
    x = np.moveaxis(golden["case0/input_nchw"], 1, -1).astype(np.float64)
    theirs = np.moveaxis(golden["case0/train/output0"], 1, -1)
    within(
        "output", "float64", compare.relative_error(compare.compiled(model)(x)[0], theirs), "golden NVlabs, training"
    )


# float64 finds mistakes, at every size; float32 shows what rounding does, for which one size is enough.
CASES = [("float64", *case) for case in narrow.INPUTS] + [("float32", *narrow.INPUTS[1])]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dtype", "batch", "size"), CASES)
def test_gradient_of_every_parameter_equals_the_reference(batch, size, dtype, training, float64, within):
    assert_gradients_equal(narrow.MODEL, batch, size, dtype, training, within, "narrow", **narrow.SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_gradients_at_full_width_equal_the_reference(variant, dtype, float64, within):
    assert_gradients_equal(f"segformer_{variant}", 2, (64, 96), dtype, True, within, variant)


def assert_gradients_equal(name, batch, size, dtype, training, within, what, **sizes):
    model, reference = compare.randomised_pair(
        name, num_classes=7, seed=batch, dtype=dtype, drop_path_rate=0.0, dropout_rate=0.0, **sizes
    )
    x = compare.images(batch, size, seed=13, dtype=dtype)
    labels = np.random.default_rng(17).integers(0, 7, (batch, *size)).astype(np.uint8)
    labels[:, : size[0] // 4] = 255
    reference.train(training)
    logits = F.interpolate(reference(compare.to_nchw(x))[0], size=size, mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, torch.from_numpy(labels).long(), ignore_index=255)
    loss.backward()
    our_loss, ours, stats = our_gradients(model, x, jnp.asarray(labels), training=training)
    mode = "training" if training else "evaluation"
    within("output", dtype, abs(our_loss - loss.item()) / loss.item(), f"{what}, loss, {mode}")
    theirs = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    for _, error in gradient_errors(ours, theirs, training=training):
        within("gradient", dtype, error, f"{what}, worst parameter, {mode}")
    their_stats = {key: value.numpy() for key, value in reference.named_buffers() if "running" in key}
    assert stats.keys() == their_stats.keys()
    for key, value in their_stats.items():
        within("statistics", dtype, compare.relative_error(stats[key], value), f"{what}, running statistics, {mode}")

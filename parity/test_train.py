"""Twenty steps of training: ours, with its own step, loss, optimizer and schedule, against torch's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs import segformer as config_file
from parity import compare, narrow
from segjax import optim
from segjax.state import Skeleton, TrainState
from segjax.step import Parallel, train_step
from segjax.weights import to_torch_layout, torch_name

STEPS = 20
RECIPES = {
    "adamw": dict(name="adamw", lr=1e-3, weight_decay=0.01, power=1.0, warmup_steps=5, warmup_ratio=1e-6),
    "sgd": dict(name="sgd", lr=1e-2, weight_decay=5e-4, power=0.9, warmup_steps=3, warmup_ratio=0.1),
}


def recipe(name):
    settings = config_file.get_config("b0,streets").optim
    settings.update(RECIPES[name])
    settings.head_multiplier = 10.0
    return settings


def torch_training(reference, settings, batches):
    """The published recipe in torch's terms: parameter groups, torch.optim, a learning rate set before each step."""
    groups = [
        {
            "params": [parameter],
            "factor": 10.0 if "head" in key else 1.0,
            "weight_decay": 0.0 if "norm" in key else settings.weight_decay,
        }
        for key, parameter in reference.named_parameters()
    ]
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    reference.train()
    losses = []
    for step, (x, labels) in enumerate(batches):
        rate = settings.lr * (1 - step / STEPS) ** settings.power
        if step < settings.warmup_steps:
            rate *= 1 - (1 - step / settings.warmup_steps) * (1 - settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        logits = F.interpolate(reference(compare.to_nchw(x))[0], size=labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, torch.from_numpy(labels).long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_training(model, settings, batches):
    parallel = Parallel("jit", jax.devices()[:1])
    skeleton = Skeleton(model)
    params, batch_stats = skeleton.arrays()
    optimizer = optim.optimizer(settings, params, steps=STEPS)
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    state = parallel.replicate(jax.tree.map(jnp.copy, state))

    def as_given(_, batch):
        return batch["image"], batch["label"]

    def body(state, batch, key):
        return train_step(skeleton, optimizer, as_given, 255, state, batch, key)

    step = parallel.compile_train(body)
    losses = []
    for x, labels in batches:
        batch = {"image": jnp.asarray(x), "label": jnp.asarray(labels), "position": jnp.arange(len(x))}
        state, scalars = step(state, batch, jax.random.key(0))
        losses.append(float(scalars["loss"]))
    return parallel.fetch(state), losses


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_twenty_steps_of_training_end_where_torch_ends(name, dtype, float64, within):
    settings = recipe(name)
    model, reference = compare.randomised_pair(
        narrow.MODEL,
        num_classes=narrow.NUM_CLASSES,
        seed=1,
        dtype=dtype,
        drop_path_rate=0.0,
        dropout_rate=0.0,
        **narrow.SIZES,
    )
    rng = np.random.default_rng(23)
    batches = []
    for seed in range(STEPS):
        labels = rng.integers(0, narrow.NUM_CLASSES, (3, 40, 72)).astype(np.uint8)
        labels[:, :, : rng.integers(4, 40)] = 255
        batches.append((compare.images(3, (40, 72), seed=seed, dtype=dtype), labels))
    before = {key: value.detach().numpy().copy() for key, value in reference.state_dict().items()}
    their_losses = torch_training(reference, settings, batches)
    state, our_losses = our_training(model, settings, batches)
    ours = {
        torch_name(path): to_torch_layout(path, value) for path, value in (state.params | state.batch_stats).items()
    }
    after = {key: value.numpy() for key, value in reference.state_dict().items() if "num_batches" not in key}
    assert ours.keys() == after.keys()

    def distance(one, other, keys):
        return np.sqrt(sum(np.square(one[key].astype(np.float64) - other[key]).sum() for key in keys))

    # AdamW scales what rounding leaves of a zero gradient up to whole steps. In float64 it stays below AdamW's eps, so
    # that these biases are compared there.
    idle = [key for key in after if dtype == "float32" and re.fullmatch(compare.WITHOUT_GRADIENT, key)]
    for what, keys in (
        ("parameters", [key for key in after if "running" not in key and key not in idle]),
        ("running statistics", [key for key in after if "running" in key]),
    ):
        moved = distance(after, before, keys)
        within("trajectory", dtype, distance(ours, after, keys) / moved, f"20 steps of {name}, {what}")
    worst = max(abs(a - b) / b for a, b in zip(our_losses, their_losses, strict=True))
    within("trajectory", dtype, worst, f"20 steps of {name}, loss")
    # The comparison would be empty if nothing had been learnt.
    assert their_losses[-1] != their_losses[0]

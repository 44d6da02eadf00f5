"""Clipping, frozen parameters and micro-batches against a loop in torch; runs that start from its files."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segjax
from parity import compare
from parity.subjects import NUM_CLASSES, SUBJECTS
from parity.test_grad import gradient_errors
from segjax import losses
from segjax.checkpoints import architectures
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.layout import to_torch_layout, torch_name
from segjax.models.functional import FunctionalModel
from segjax.recipes import common
from segjax.runtime.parallel import JitParallel
from segjax.torch_reference import verify
from segjax.train import optim
from segjax.train.state import TrainState
from segjax.train.step import TrainStep

STEPS = 4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("largest", [0.5, 1e3])
def test_gradients_are_clipped_as_torch_clips_them(largest, dtype, seed, float64):
    rng = np.random.default_rng(seed)
    gradients = {"a": rng.standard_normal((3, 5)), "b": 4 * rng.standard_normal(7), "c": rng.standard_normal((2, 1, 4))}
    gradients = {name: value.astype(dtype) for name, value in gradients.items()}
    parameters = [torch.nn.Parameter(torch.zeros(value.shape)) for value in gradients.values()]
    for parameter, value in zip(parameters, gradients.values(), strict=True):
        parameter.data = parameter.data.to(torch.from_numpy(value).dtype)
        parameter.grad = torch.from_numpy(value.copy())
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    transform = optim.clip_by_norm(largest)
    ours, _ = transform.update(jax.tree.map(jnp.array, gradients), transform.init(gradients))
    tolerance = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(optim.norm(gradients), norm.item(), rtol=tolerance)
    assert 1 < norm < 100
    for parameter, (name, value) in zip(parameters, ours.items(), strict=True):
        np.testing.assert_allclose(value, parameter.grad.numpy(), rtol=tolerance, err_msg=name)
        assert np.array_equal(value, gradients[name]) == (largest > norm)


# -------------------------------------------------------------------------------------------------------- whole steps


def torch_steps(reference, batches, *, name, frozen, clip_norm, accumulate):
    """Losses and norms of the gradients of a plain training loop."""
    reference.train()
    for key, parameter in reference.named_parameters():
        parameter.requires_grad_(not any(re.search(pattern, key) for pattern in frozen))
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not (module.weight.requires_grad or module.bias.requires_grad):
            module.eval()
    parameters = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    if name == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.01)
    curve, norms = [], []
    for x, labels in batches:
        optimizer.zero_grad()
        labels = torch.from_numpy(labels).long()
        count, total = (labels != 255).sum(), 0.0
        for part in range(accumulate):
            logits, _ = verify.run_reference(reference, x[part::accumulate])
            upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            truth = labels[part::accumulate]
            loss = F.cross_entropy(upsampled, truth, ignore_index=255, reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
        optimizer.step()
        curve.append(total)
        norms.append(norm.item())
    return curve, norms


def our_steps(model, batches, *, name, frozen, clip_norm, accumulate):
    config = common.get_config("folder")
    config.optim.update(name=name, lr=1e-3 if name == "adamw" else 1e-2, weight_decay=0.01, momentum=0.9, power=0.0)
    config.optim.update(warmup_steps=0, no_decay="", lr_multipliers=(), clip_norm=clip_norm)
    names = list(FunctionalModel(model).arrays()[0])
    functional = FunctionalModel(model, frozen=optim.frozen_names(frozen, names))
    params, batch_stats = functional.arrays()
    optimizer = optim.optimizer(config.optim, names, steps=STEPS)
    step = TrainStep(
        model=functional,
        optimizer=optimizer,
        augment=lambda _, batch: (batch["image"], batch["label"]),
        criterion=losses.criterion(config.loss, num_classes=NUM_CLASSES, ignore_label=255),
        accumulate=accumulate,
    )
    parallel = JitParallel(jax.devices()[:1])
    program = parallel.compile_train(step)
    state = TrainState.start(params, batch_stats, optimizer.init(functional.trained(params)))
    state = parallel.replicate(jax.tree.map(jnp.copy, state))
    curve, norms = [], []
    for x, labels in batches:
        batch = {"image": jnp.asarray(x), "label": jnp.asarray(labels), "position": jnp.arange(len(x))}
        state, scalars = program(state, batch, jax.random.key(0))
        curve.append(float(scalars["loss"]))
        norms.append(float(scalars["gradient_norm"]))
    return parallel.fetch(state), curve, norms


SEGFORMER_PARTS = (r"backbone\.(patch_embed|block)1", r"linear_fuse\.bn", r"linear_c4\.proj\.bias")
HRNET_ENCODER = (r"^(conv|bn)\d\.", r"^layer1\.", r"^transition\d", r"^stage\d")
CASES = [
    ("segformer", "sgd", (), 0.0, 2),
    ("segformer", "adamw", SEGFORMER_PARTS, 1.5, 1),
    ("segformer", "sgd", (r"\.bias$",), 1.4, 2),
    ("hrnet", "sgd", HRNET_ENCODER, 0.0, 1),
    pytest.param("hrnet", "sgd", (r"^(conv|bn)\d\.", r"^layer1\."), 0.0, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("label", "name", "frozen", "clip_norm", "accumulate"), CASES)
def test_steps_with_frozen_parts_clipping_and_micro_batches_equal_torchs(
    label, name, frozen, clip_norm, accumulate, float64, within
):
    subject = SUBJECTS[label]
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=1, dtype="float64", **subject.fixed
    )
    rng = np.random.default_rng(5)
    batches = []
    for seed in range(STEPS):
        labels = rng.integers(0, NUM_CLASSES, (4, 40, 56)).astype(np.uint8)
        for sample in range(4):
            # As unequal numbers of labels as can be.
            labels[sample, : 12 * sample] = 255
        batches.append((compare.images(4, (40, 56), seed=seed, dtype="float64"), labels))
    before = {key: value.detach().numpy().copy() for key, value in reference.state_dict().items()}
    settings = dict(name=name, frozen=frozen, clip_norm=clip_norm, accumulate=accumulate)
    their_curve, their_norms = torch_steps(reference, batches, **settings)
    state, curve, norms = our_steps(model, batches, **settings)
    np.testing.assert_allclose(curve, their_curve, rtol=1e-10)
    np.testing.assert_allclose(norms, their_norms, rtol=1e-9)
    assert not clip_norm or min(norms) < clip_norm < max(norms), norms

    ours = state.params | state.batch_stats
    ours = {torch_name(path): to_torch_layout(path, value) for path, value in ours.items()}
    after = {key: value.numpy() for key, value in reference.state_dict().items() if "num_batches" not in key}
    assert ours.keys() == after.keys()
    still = {key for key in after if np.array_equal(before[key], after[key])}
    assert still == {key for key in ours if np.array_equal(before[key], ours[key])}
    # All that is frozen, and the statistics of the norms of which nothing is trained.
    expected = {key for key, _ in reference.named_parameters() if any(re.search(pattern, key) for pattern in frozen)}
    statistics = {key for key in after if "running" in key}
    norms_of = {key.rpartition(".")[0] for key in statistics}
    whole = {norm for norm in norms_of if {f"{norm}.weight", f"{norm}.bias"} <= expected}
    assert still == expected | {key for key in statistics if key.rpartition(".")[0] in whole}

    what = f"{architectures.family_of(subject.name)}, {STEPS} steps of {name}, frozen, clipped or in parts"
    for part, keys in (("parameters", after.keys() - statistics), ("running statistics", statistics - still)):
        if keys:
            moved = np.sqrt(sum(np.square(after[key] - before[key]).sum() for key in keys))
            apart = np.sqrt(sum(np.square(after[key] - ours[key]).sum() for key in keys))
            within("trajectory", "float64", apart / moved, f"{what}, {part}")


# --------------------------------------------------------------------------------------------- the loss of OCR models


def test_ocr_trains_with_published_corners_ohem_and_auxiliary_loss(float64, within):
    subject = SUBJECTS["ocr"]
    kinds = dict(num_classes=NUM_CLASSES, seed=4, dtype="float64")
    small = subject.fixed | dict(width=4, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1))
    model, reference = compare.randomised_pair(subject.name, **kinds, **small)
    rng = np.random.default_rng(3)
    x, weights = compare.images(4, (40, 56), seed=5, dtype="float64"), rng.uniform(0.5, 2, NUM_CLASSES)
    labels = rng.integers(0, NUM_CLASSES, (4, 40, 56)).astype(np.uint8)
    labels[1, :30] = labels[:, 9:12] = 255

    config = common.get_config("folder").loss
    # Published with either of the two; with both, one program shows both.
    config.update(cross_entropy=0.7, ohem=1.0, ohem_images=2, ohem_threshold=0.2, ohem_min_kept=1 / 12)
    config.update(aux="cross_entropy")
    step = TrainStep(
        model=FunctionalModel(model),
        optimizer=None,
        augment=None,
        criterion=losses.criterion(config, num_classes=NUM_CLASSES, ignore_label=255, class_weights=weights),
        aux_weight=0.4,
    )
    state = TrainState.start(*step.model.arrays(), {})
    counts = step.counts(jnp.asarray(labels))
    loss, gradients, _ = jax.jit(step.gradients)(state, x, labels, counts, jax.random.key(0))
    ours = {torch_name(path): to_torch_layout(path, np.asarray(value)) for path, value in gradients.items()}

    truth, settings = torch.from_numpy(labels).long(), dict(weight=torch.from_numpy(weights), ignore_index=255)
    logits, taps = verify.run_reference(reference.train(), x)
    main, auxiliary = (
        F.interpolate(scores, size=(40, 56), mode="bilinear", align_corners=True)
        for scores in (logits, taps["aux_logits"])
    )
    of_gpu = []
    for scores, label in zip(main.split(2), truth.split(2), strict=True):
        valid = label != 255
        probability = scores.detach().softmax(1).gather(1, label.where(valid, 0)[:, None])[:, 0][valid]
        limit = max(0.2, probability.sort().values[round(label.numel() / 12)].item())
        assert 0.1 < (probability < limit).double().mean() < 0.9
        of_gpu.append(F.cross_entropy(scores, label, **settings, reduction="none")[valid][probability < limit])
    expected = 0.7 * F.cross_entropy(main, truth, **settings) + sum(of_pixel.mean() for of_pixel in of_gpu) / 2
    expected = expected + 0.4 * F.cross_entropy(auxiliary, truth, **settings)
    expected.backward()

    what = "hrnet_ocr, losses with aligned corners"
    within("loss", "float64", abs(loss - expected.item()) / expected.item(), what)
    theirs = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    for _, error in gradient_errors(ours, theirs, partial(subject.is_idle, training=True)):
        within("gradient", "float64", error, f"{what}, worst parameter")


# --------------------------------------------------------------------------------------------------------- the start


def test_initial_weights_from_a_pth_of_torch_give_that_network(tmp_path):
    subject = SUBJECTS["segformer"]
    source, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=1, dtype="float32", **subject.fixed
    )
    expected = segjax.to_torch(source)
    # As a training in torch saves it, wrapped and of several devices; and the encoder as files of ImageNet have it.
    whole = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in reference.state_dict().items()}}
    torch.save(whole, tmp_path / "whole.pth")
    prefix = "backbone."
    encoder = {key.removeprefix(prefix): v for key, v in reference.state_dict().items() if key.startswith(prefix)}
    torch.save(encoder | {"head.weight": torch.ones(1000, 32), "head.bias": torch.ones(1000)}, tmp_path / "mit.pth")
    for file, loaded in (("whole.pth", set(expected)), ("mit.pth", {prefix + key for key in encoder})):
        model, _ = compare.randomised_pair(
            subject.name, num_classes=NUM_CLASSES, seed=2, dtype="float32", **subject.fixed
        )
        before = segjax.to_torch(model)
        initialize(model, tmp_path / file)
        after = segjax.to_torch(model)
        for key in expected:
            np.testing.assert_array_equal(after[key], (expected if key in loaded else before)[key], err_msg=key)

"""A teacher: its part of the loss, computed by hand; what it must not change; refused teachers; and runs with one."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import segjax
from segjax import layers, losses
from segjax.checkpoints import load as load_module
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import convert
from segjax.data import specs
from segjax.recipes import common
from segjax.runtime.parallel import parallel_for
from segjax.train import distillation, state
from segjax.train.config import RunError
from tests.runs import make_config, power_cut_before, result_of, run
from tests.tiny import FAMILIES, tiny_model
from tests.train.test_step import K, TwoHeads, assert_close, assert_same, changed, make_batch, make_step, normalise
from tests.train.test_step import run as run_steps

pytestmark = pytest.mark.usefixtures("newer_emitters")

DIVERGENCE = losses.Divergence(channel_wise=2.0, pixel_wise=0.5, temperature=3.0)


class Coarse(nnx.Module):
    """A teacher of another stride than the student, with a BatchNorm: (B, H, W, 3) -> (B, H/8, W/8, K)."""

    def __init__(self, dtype=jnp.float64):
        settings = dict(kernel_init=layers.fan_in_init, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(5))
        self.stem, self.head = layers.Conv(3, 7, 8, stride=8, **settings), layers.Conv(7, K, 1, **settings)
        self.bn = layers.BatchNorm(7, dtype=dtype, param_dtype=dtype)
        self.bn.mean[...] = jnp.linspace(-0.2, 0.3, 7)
        self.spec, self.size_multiple, self.align_corners, self.in_channels = None, 8, True, 3
        self.eval()

    def __call__(self, images):
        return 4 * self.head(jax.nn.relu(self.bn(self.stem(images)))), {}


SCALE, SHIFT = np.array([1.1, 0.9, 1.3]), np.array([0.1, -0.2, 0.0])


@functools.cache
def steps_of(kind, devices, accumulate, taught=True):
    teacher = distillation.Teacher(Coarse(), DIVERGENCE, scale=SCALE, shift=SHIFT) if taught else None
    step, before = make_step(TwoHeads(), teacher=teacher, accumulate=accumulate, ema_decay=0.5)
    if teacher is not None:
        before = dataclasses.replace(before, teacher=teacher.arrays())
    batches = [make_batch(seed) for seed in (1, 2)]
    return run_steps(step, before, batches, parallel=parallel_for(kind, jax.devices()[:devices]))


def test_the_loss_includes_the_divergence_from_resized_teacher_logits(float64):
    _, plain = steps_of("jit", 1, 1, taught=False)
    states, scalars = steps_of("jit", 1, 1)
    images = np.asarray(normalise(make_batch(1)["image"]), float)
    logits = TwoHeads()(jnp.asarray(images))[0]
    taught = layers.resize(Coarse()(images * SCALE + SHIFT)[0], logits.shape[1:3], align_corners=True)
    expected = DIVERGENCE.total(logits, taught, jnp.array(8.0))
    assert expected > 0.05
    np.testing.assert_allclose(scalars[0]["loss"] - plain[0]["loss"], expected, rtol=1e-9)
    # Nothing of the teacher moves, its statistics neither, and neither the optimizer nor a checkpoint has any of it.
    assert_same(states[-1].teacher, states[0].teacher)
    assert len(states[0].teacher) == 8
    assert changed(states[0].params, states[-1].params) == set(states[0].params)
    kept = state.weights_of(states[-1]) | state.training_of(states[-1])
    assert not any("teacher" in name or "bn" in name for name in kept)


@pytest.mark.parametrize("kind, devices, accumulate", [("jit", 1, 2), ("jit", 4, 1), ("pmap", 4, 2)])
def test_distillation_does_not_depend_on_devices_or_micro_batches(kind, devices, accumulate, float64):
    states, scalars = steps_of(kind, devices, accumulate)
    expected_states, expected_scalars = steps_of("jit", 1, 1)
    assert_close([one.params for one in states], [one.params for one in expected_states], 1e-10)
    assert_close(scalars, expected_scalars, 1e-10)


def test_stacking_the_student_does_not_change_a_teacher_of_equal_names():
    teacher = distillation.Teacher(tiny_model(1, "plain", depths=(1, 2, 1, 1)), DIVERGENCE)
    step, before = make_step(tiny_model(0, "plain", depths=(1, 2, 1, 1)), execution=layers.BlockExecution(scan_from=2))
    before = dataclasses.replace(before, teacher=teacher.arrays())
    stacked = step.model.stacks.stacked(before)
    assert set(step.model.stacks.members) & set(stacked.params)
    assert_same(stacked.teacher, before.teacher)


def test_devices_hold_only_the_copy_in_the_state():
    def copies():
        gc.collect()
        return sum(array.shape == (1, 1, 7, 11) for array in jax.live_arrays())

    model = Coarse(jnp.float32)
    model.head = layers.Conv(7, 11, 1, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(5))
    teacher = distillation.Teacher(model, DIVERGENCE)
    assert copies() > 0
    del model
    assert copies() == 0
    held = jax.device_put(teacher.arrays())
    assert copies() == 1 and len(held) == 8


# ------------------------------------------------------------------------------------------------------ which teachers


def settings_of(**given):
    settings = common.get_config("streets").loss
    settings.update(given)
    return settings


def teacher_from(path, classes, images=specs.RGB, *, crop=(32, 64), mean=specs.IMAGENET_MEAN, std=specs.IMAGENET_STD):
    return distillation.load_teacher(settings_of(distill=str(path)), classes, images, crop=crop, mean=mean, std=std)


def classes_of(*names):
    return specs.DatasetSpec("mine", names, tuple((number, 0, 0) for number in range(len(names))), 255)


def saved(path, model, classes=None):
    known = {} if classes is None else {"dataset": dataset_metadata(classes)}
    segjax.save(load_module.LoadedCheckpoint(model, classes or classes_of(*"abcde"), known), path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_teach(family, tmp_path):
    path = saved(tmp_path / "teacher.safetensors", tiny_model(0, family))
    teacher = teacher_from(path, classes_of(*"abcde"))
    assert teacher.divergence == losses.Divergence(channel_wise=3.0, pixel_wise=0.0, temperature=4.0)
    images, logits = jax.ShapeDtypeStruct((2, 32, 64, 3), jnp.float32), jax.ShapeDtypeStruct((2, 5, 9, 5), jnp.bfloat16)
    total = jax.eval_shape(teacher.total, teacher.arrays(), images, logits, jax.ShapeDtypeStruct((), jnp.float32))
    assert total.shape == () and total.dtype == jnp.float32


def test_a_teacher_gets_images_in_its_own_normalisation(tmp_path):
    model = tiny_model(0)
    path = saved(tmp_path / "teacher.safetensors", model)
    mean, std = (10.0, 20.0, 30.0), (2.0, 3.0, 4.0)
    teacher = teacher_from(path, classes_of(*"abcde"), mean=mean, std=std)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 64, 3)).astype(np.uint8)
    logits = jax.jit(model)(normalise(pixels))[0]
    total, count = jax.jit(teacher.total), jnp.array(1)
    assert total(teacher.arrays(), normalise(pixels, mean, std), logits, count) < 1e-4
    assert total(teacher.arrays(), normalise(pixels), logits, count) > 0.01


FOUR, DEEP = specs.ImageKind(4, "uint8"), specs.ImageKind(3, "uint16")


@pytest.mark.parametrize(
    "classes, crop, images, message",
    [
        (classes_of(*"abcd"), (32, 64), specs.RGB, "the teacher has 5 classes and the data 4; a teacher must"),
        (classes_of(*"abced"), (32, 64), specs.RGB, "differ: 3 is 'e' and 'd', 4 is 'd' and 'e'; a teacher must"),
        (classes_of(*"abcde"), (32, 64), FOUR, "takes images of 3 channels of uint8, and the data have 4 channels of"),
        (classes_of(*"abcde"), (32, 64), DEEP, "of 3 channels of uint8, and the data have 3 channels of uint16"),
        (classes_of(*"abcde"), (32, 48), specs.RGB, r"multiples of 32; config\.augment\.crop=\(32, 48\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(classes, crop, images, message, tmp_path):
    path = saved(tmp_path / "teacher.safetensors", tiny_model(0, "simple"), classes_of(*"abcde"))
    with pytest.raises(RunError, match=message) as caught:
        teacher_from(path, classes, images, crop=crop, mean=(0.0,) * images.channels, std=(1.0,) * images.channels)
    assert str(caught.value).startswith(f"config.loss.distill={path}: ")


def test_a_teacher_in_a_file_with_several_weight_sets_is_refused(tmp_path):
    weights = segjax.to_torch(tiny_model(0))
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in weights.items()}
    np.savez(tmp_path / "both.npz", **both)
    with pytest.raises(CheckpointError, match=r"a file with one of them: segjax convert .*both\.npz teacher\.safe"):
        teacher_from(tmp_path / "both.npz", classes_of(*"abcde"))
    assert convert.main([str(tmp_path / "both.npz"), str(tmp_path / "t.safetensors"), "--weights", "teacher"]) == 0
    teacher_from(tmp_path / "t.safetensors", classes_of(*"abcde"))


def test_useless_distillation_settings_are_refused_at_the_start(tmp_path):
    with pytest.raises(RunError, match=r"config\.loss\.distill: .*nowhere.* does not exist"):
        run(make_config(loss__distill=str(tmp_path / "nowhere")), tmp_path / "run")
    path = saved(tmp_path / "teacher.safetensors", tiny_model(0))
    with pytest.raises(RunError, match=r"teaches nothing, because loss\.distill_cwd and loss\.distill_kl are 0"):
        run(make_config(loss__distill=str(path), loss__distill_cwd=0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_computes_in_16_bits_on_accelerators_and_the_loss_in_32(tmp_path, monkeypatch):
    path = saved(tmp_path / "teacher.safetensors", tiny_model(0))
    images, logits, count = jnp.zeros((2, 32, 64, 3)), jnp.zeros((2, 8, 16, 5)), jnp.array(2.0)
    for backend, in_16_bits in (("cpu", False), ("gpu", True)):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            teacher = teacher_from(path, classes_of(*"abcde"))
        traced = jax.make_jaxpr(teacher.total)(teacher.arrays(), images, logits, count)
        assert ("bf16[2,8,16" in str(traced)) is in_16_bits
        assert traced.out_avals[0].dtype == jnp.float32 and {x.dtype for x in teacher.arrays()} == {np.dtype("float32")}


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.one_python
def test_a_run_with_a_teacher_resumes_bit_for_bit_and_refuses_another(tmp_path, monkeypatch):
    path = saved(tmp_path / "teacher.safetensors", tiny_model(0, "segnext", num_classes=19))
    config = make_config(loss__distill=str(path), train__steps=4, checkpoint__every=2)
    _, printed = run(config, tmp_path / "whole")
    assert f"teacher from {path}" in " ".join(printed.split())
    with monkeypatch.context() as patch:
        power_cut_before(patch, 3)
        with pytest.raises(SystemError, match="power cut"):
            run(config, tmp_path / "killed")
    metadata = orbax_folder.read_metadata(tmp_path / "killed/checkpoints/2")
    assert metadata["teacher"]["model"] == "segnext_t" and len(metadata["teacher"]["sha256"]) == 64
    # Another teacher at the same place.
    kept = path.read_bytes()
    saved(path, tiny_model(1, "segnext", num_classes=19))
    with pytest.raises(RunError, match=r"other settings:\n  teacher\.sha256: \w{64} in the run, \w{64} now"):
        run(config, tmp_path / "killed")
    path.unlink()
    # The same teacher at another place.
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(kept)
    config.loss.distill = str(moved)
    status, printed = run(config, tmp_path / "killed")
    assert status == 0 and "resuming at step 2 of 4" in printed
    assert result_of(tmp_path / "killed")["params_sha256"] == result_of(tmp_path / "whole")["params_sha256"]
    # A finished run needs no teacher.
    moved.unlink()
    assert run(config, tmp_path / "killed")[0] == 0
    # Its own weights alone are in a checkpoint.
    weights, _ = orbax_folder.load_weights(tmp_path / "killed/checkpoints/4")
    assert not any("layer_scale" in name for name in weights)

"""Shared by tests of whole runs: settings of a tiny run, its files, and stand-ins for its slow parts."""

import contextlib
import io
import json
import signal
from typing import ClassVar

import jax
import jax.numpy as jnp

from configs import hrnet, segformer, segnext
from segjax import metrics
from segjax.data import pipeline
from segjax.train import loop, setup, start
from segjax.train.step import TrainStep
from tests.tiny import FAMILIES

STEPS = 6
_CONFIGS = {"segformer": (segformer, "b0"), "ocr": (hrnet, "small_ocr"), "segnext": (segnext, "small")}


def make_config(family="segformer", **changes):
    """Six steps of a tiny model; `changes` by dotted name, dots written as two underscores."""
    recipe, variant = _CONFIGS[family]
    config = recipe.get_config(f"{variant},streets")
    config.model.update(FAMILIES[family][1])
    config.data.update(train_images=7, eval_images=5, size=(40, 64))
    config.augment.crop = (32, 48)
    config.train.update(steps=STEPS, batch=4, log_every=2)
    config.optim.update(warmup_steps=2, lr=1e-3)
    config.eval.update(batch=4, pictures=0)
    config.checkpoint.every = 4
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def functional_model(config, num_classes, *, axis_name=None, initial=False):
    """The model of a config as a run trains it; with `initial`, on the weights of config.init."""
    if config.optim.lr_multipliers is None:
        # What a run chooses for random weights.
        config = config.copy_and_resolve_references()
        config.optim.lr_multipliers = ()
    module = setup.create_model(config.model, num_classes=num_classes, seed=config.seed)
    if initial:
        start.load_initial_weights(module, config.init)
    return setup.make_functional(module, config.optim, config.train, axis_name=axis_name)


def run(config, workdir):
    """-> exit status, what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = loop.train(config, workdir)
    return status, printed.getvalue()


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def signal_before(patch, step, number=signal.SIGINT):
    """A signal while step number `step` (from 0) is being made ready."""
    original = pipeline.TrainBatches.at

    def at(self, now):
        # The first batch is asked for once more, to compile with.
        if now == step and signal.getsignal(number) not in (signal.default_int_handler, signal.SIG_DFL):
            signal.raise_signal(number)
        return original(self, now)

    patch.setattr(pipeline.TrainBatches, "at", at)


def power_cut_before(patch, step):
    """The run is torn down at step number `step` (from 0) without a chance to save."""
    original = pipeline.TrainBatches.at

    def at(self, now):
        if now == step:
            raise SystemError("power cut")
        return original(self, now)

    patch.setattr(pipeline.TrainBatches, "at", at)


def power_cut_in_the_end(patch):
    """The run is torn down after its last evaluation, before it writes the result."""

    def draw(*_):
        raise SystemError("power cut")

    patch.setattr(loop, "draw", draw)


def scored(patch, *scores):
    """The evaluations of runs have these mean IoUs, one after the other."""
    left = list(scores)

    def summarise(confusion, original=metrics.summarise):
        return original(confusion) | {"mean_iou": left.pop(0)}

    patch.setattr(metrics, "summarise", summarise)


class CheapStep(TrainStep):
    """In place of a training step where only the loop is looked at: shifts all weights by what is in the batch."""

    # step (from 0) -> what loss and gradient norm are instead of their own.
    losses: ClassVar[dict[int, float]] = {}
    norms: ClassVar[dict[int, float]] = {}

    def __call__(self, state, batch, key, *, axis_name=None):
        total = jnp.sum(batch["image"], dtype=jnp.int32)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        shift = 1e-9 * total.astype(jnp.float32)
        loss, norm = 1000 * shift, 1e6 * shift
        for step, value in self.losses.items():
            loss = jnp.where(state.step == step, value, loss)
        for step, value in self.norms.items():
            norm = jnp.where(state.step == step, value, norm)
        params = {name: 0.9 * value + shift for name, value in state.params.items()}
        new = dict(params=params, batch_stats=state.batch_stats, opt_state=state.opt_state, ema=state.ema)
        state = self.advanced(state, self.accepts(state, loss, norm), new)
        return state, {"loss": loss, "gradient_norm": norm, "stopped": state.skipped[1] > self.may_skip}


def cheap_step(patch, losses=None, norms=None):
    """Has runs take a `CheapStep`, whose loss or norm is another at some steps (from 0)."""

    class Step(CheapStep):
        pass

    Step.losses, Step.norms = losses or {}, norms or {}
    patch.setattr(setup, "TrainStep", Step)

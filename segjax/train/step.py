"""The training and the evaluation step: pure bodies, and the two ways to run them on several devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from segjax import losses
from segjax.data.augment import step_keys
from segjax.models.functional import FunctionalModel
from segjax.train import optim
from segjax.train.state import TrainState

# An augmentation: (keys (B,), {"image", "label", "size", ...}) -> (normalised images (B, h, w, 3), labels (B, h, w)).
Augment = Callable[[jax.Array, dict], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """One update, as a pure function of state, batch and key.

    The gradient is that of (sum of losses) / (what they are counted by), both over all devices and micro-batches: it
    does not depend on how the batch is spread. Statistics of a BatchNorm do depend on micro-batches, each of which is
    normalised by its own, one after the other, as torch does it.

    Attributes:
      augment: uint8 batch -> normalised images and labels.
      criterion: of `losses.criterion`.
      aux_weight: of the loss of a model's auxiliary logits, where it has any.
      accumulate: number of micro-batches that a batch is computed in, for the sake of memory.
      ema_decay: of the moving average; 0 keeps none. It is smaller at first, (1 + step) / (10 + step), so that the
        random weights of the start are soon forgotten.
      may_skip: how many steps in a row may be left out because loss or gradient are not finite. One more, and no later
        step changes anything either, so that the state before it is there when the host finds out.
    """

    skeleton: FunctionalModel
    optimizer: optax.GradientTransformationExtraArgs
    augment: Augment
    criterion: losses.Criterion
    aux_weight: float = 0.0
    accumulate: int = 1
    ema_decay: float = 0.0
    may_skip: int = 0

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The next state, and scalars "loss", "gradient_norm" (before clipping) and "stopped".

        Args:
          batch: what `augment` takes, and "position" int32 (B,): each sample's place in the whole batch, from which its
            random numbers follow, whatever device it is on.
          key: of the run; the step's own is folded from it.
          axis_name: of the mapped axis under pmap.
        """
        images, labels, dropout_key = self.inputs(state, batch, key)
        across = (lambda tree: tree) if axis_name is None else (lambda tree: jax.lax.psum(tree, axis_name))
        # A count of labels alone, so that micro-batches and devices can divide by that of the whole batch.
        counts = across(self.criterion.counts(labels))
        loss, gradients, batch_stats = self.gradients(state, images, labels, counts, dropout_key)
        loss, gradients = across((loss, gradients))
        gradient_norm = optim.norm(gradients)
        trained = self.skeleton.trained(state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        accepted = finite & ~(state.skipped[1] > self.may_skip)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained, accepted=accepted)
        params = state.params | optax.apply_updates(trained, updates)
        ema = self._moved_ema(state, params | batch_stats)

        state = self._unless_not_finite(finite, state, dict(params=params, batch_stats=batch_stats, ema=ema))
        state = dataclasses.replace(state, opt_state=opt_state)
        stopped = state.skipped[1] > self.may_skip
        return state, {"loss": loss, "gradient_norm": gradient_norm, "stopped": stopped}

    def inputs(self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array):
        """Augmented images and labels, and the key of the model's own random streams."""
        sample_keys, dropout_key = step_keys(key, state.step, batch["position"])
        return *self.augment(sample_keys, batch), dropout_key

    def gradients(self, state, images, labels, counts, dropout_key):
        """Loss, gradients of the trained parameters, and the statistics that the batch has moved."""

        def loss_of(trained, batch_stats, images, labels, key):
            model = self.skeleton.bind(state.params | trained, batch_stats, key=key)
            logits, taps = model(images)
            total = self.criterion.total(logits, labels, counts)
            if "aux_logits" in taps:
                total = total + self.aux_weight * self.criterion.total(taps["aux_logits"], labels, counts)
            return total, self.skeleton.batch_stats_of(model)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        trained = self.skeleton.trained(state.params)
        if self.accumulate == 1:
            (loss, batch_stats), gradients = value_and_grad(trained, state.batch_stats, images, labels, dropout_key)
            return loss, gradients, batch_stats

        def add(sums, part):
            batch_stats, *sums = sums
            (loss, batch_stats), gradients = value_and_grad(trained, batch_stats, *part)
            return (batch_stats, *jax.tree.map(jnp.add, sums, [loss, gradients])), None

        nothing = jnp.zeros((), counts.dtype), jax.tree.map(jnp.zeros_like, trained)
        parts = self.micro_batches(images, labels, dropout_key)
        (batch_stats, loss, gradients), _ = jax.lax.scan(add, (state.batch_stats, *nothing), parts)
        return loss, gradients, batch_stats

    def micro_batches(self, images, labels, dropout_key):
        """Images, labels and key of each micro-batch, one after the other along a new first axis."""
        if self.accumulate == 1:
            return images[None], labels[None], dropout_key[None]

        def in_parts(x):
            # Every device keeps its own samples: (B, ...) -> (A, B / A, ...), part a has samples a, a + A, a + 2A ...
            return jnp.moveaxis(x.reshape(-1, self.accumulate, *x.shape[1:]), 1, 0)

        keys = jax.vmap(partial(jax.random.fold_in, dropout_key))(jnp.arange(self.accumulate))
        return in_parts(images), in_parts(labels), keys

    def _moved_ema(self, state: TrainState, new: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
        if state.ema is None:
            return None
        # 1 - decay, which float32 would leave three digits of.
        share = jnp.maximum(1 - self.ema_decay, 9 / (10 + state.step.astype(float)))
        return {name: old + share.astype(old.dtype) * (new[name] - old) for name, old in state.ema.items()}

    def _unless_not_finite(self, finite: jax.Array, before: TrainState, changed: dict) -> TrainState:
        """The state with what the step has changed, or without it."""
        in_all, in_a_row = before.skipped
        was_stopped = in_a_row > self.may_skip
        in_a_row = jnp.where(was_stopped, in_a_row, jnp.where(finite, 0, in_a_row + 1))
        stopped = in_a_row > self.may_skip
        kept = {name: getattr(before, name) for name in changed}
        # Where it is finite, it has stopped only if it had before.
        chosen = jax.tree.map(lambda new, old: jnp.where(finite & ~was_stopped, new, old), changed, kept)
        return dataclasses.replace(
            before,
            step=before.step + jnp.where(stopped, 0, 1),
            skipped=jnp.stack([in_all + jnp.where(finite | stopped, 0, 1), in_a_row]),
            **chosen,
        )

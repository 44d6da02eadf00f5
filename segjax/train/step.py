"""The training step: a pure function of state, batch and key, which `segjax.runtime.parallel` compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from segjax import losses
from segjax.data.augment import step_keys
from segjax.models.functional import FunctionalModel
from segjax.train import optim
from segjax.train.distillation import Teacher
from segjax.train.state import TrainState

# An augmentation: (keys (B,), {"image", "label", "size", ...}) -> (normalised images (B, h, w, C), labels (B, h, w)).
Augment = Callable[[jax.Array, dict], tuple[jax.Array, jax.Array]]
# `mixing.mix` with its settings: (keys (B,), images, labels, axis_name=...) -> (images, labels).
Mix = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """One update, as a pure function of state, batch and key.

    The gradient is that of (sum of losses) / (sum of their counts), with both sums over all devices and micro-batches,
    so it does not depend on the split of the batch. BatchNorm does: as in torch, each micro-batch is normalised by its
    own statistics, and the micro-batches update the running statistics in turn.

    Attributes:
      model: Model to train.
      optimizer: Transform from `optim.optimizer`.
      augment: Function from a batch to normalised images and labels.
      criterion: Loss from `losses.criterion`.
      aux_weight: Weight of the loss of auxiliary logits, for a model that has them.
      accumulate: Number of micro-batches of a batch; more of them need less memory.
      ema_decay: Decay of the moving average; 0 keeps none. At first it is smaller, (1 + step) / (10 + step), so that
        the average soon forgets the random initial weights.
      may_skip: Number of consecutive steps that may be skipped because loss or gradient is not finite. One more stops
        the training: no later step changes the state, so the host, which reads the losses later, still finds the state
        before that step.
      mix: Function that mixes the augmented samples of a batch; None for none.
      teacher: Model from whose logits the student also learns; the state then holds its arrays.
    """

    model: FunctionalModel
    optimizer: optax.GradientTransformationExtraArgs
    augment: Augment
    criterion: losses.Criterion
    aux_weight: float = 0.0
    accumulate: int = 1
    ema_decay: float = 0.0
    may_skip: int = 0
    mix: Mix | None = None
    teacher: Teacher | None = None

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the next state, and the scalars "loss", "gradient_norm" (before clipping) and "stopped".

        Args:
          state: State before the step.
          batch: Arrays for `augment`, and "position", int32 (B,), each sample's index in the whole batch. Its random
            numbers are derived from this index, so they do not depend on the device.
          key: Key of the run; the key of the step is folded from it.
          axis_name: Name of the mapped axis under pmap.
        """
        images, labels, dropout_key = self.inputs(state, batch, key, axis_name=axis_name)
        across = (lambda tree: tree) if axis_name is None else (lambda tree: jax.lax.psum(tree, axis_name))
        # Counts depend only on labels, so every micro-batch and device can divide by the counts of the whole batch.
        counts = across(self.counts(labels))
        loss, gradients, batch_stats = self.gradients(state, images, labels, counts, dropout_key)
        loss, gradients = across((loss, gradients))
        gradient_norm = optim.norm(gradients)
        trained = self.model.trained(state.params)
        accepted = self.accepts(state, loss, gradient_norm)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained, accepted=accepted)
        # optax returns a tree of the given structure, but annotates it as any tree.
        updated = cast(dict[str, jax.Array], optax.apply_updates(trained, updates))
        params = state.params | updated
        ema = self._moved_ema(state, params | batch_stats)

        state = self.advanced(state, accepted, dict(params=params, batch_stats=batch_stats, ema=ema))
        # The optimizer itself keeps its state if the step is not accepted.
        state = dataclasses.replace(state, opt_state=opt_state)
        stopped = state.skipped[1] > self.may_skip
        return state, {"loss": loss, "gradient_norm": gradient_norm, "stopped": stopped}

    def inputs(
        self, state: TrainState, batch: dict[str, jax.Array], key: jax.Array, *, axis_name: str | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Augmented and mixed images and labels, and the key for the model's random streams."""
        sample_keys, dropout_key = step_keys(key, state.step, batch["position"])
        images, labels = self.augment(sample_keys, batch)
        if self.mix is not None:
            images, labels = self.mix(sample_keys, images, labels, axis_name=axis_name)
        return images, labels, dropout_key

    def counts(self, labels: jax.Array) -> list[jax.Array]:
        """The counts of the loss, of the auxiliary loss if it is another one, and of images if there is a teacher."""
        auxiliary = self.criterion.auxiliary
        criteria = [self.criterion] if auxiliary == self.criterion else [self.criterion, auxiliary]
        counts = [criterion.counts(labels) for criterion in criteria]
        return counts if self.teacher is None else [*counts, jnp.asarray(labels.shape[0], float)]

    def gradients(
        self, state: TrainState, images: jax.Array, labels: jax.Array, counts: list[jax.Array], dropout_key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Loss, gradients of the trained parameters, and the running statistics after the batch.

        Args:
          state: State before the step.
          images: Augmented images (B, h, w, C).
          labels: Augmented labels (B, h, w).
          counts: Result of `self.counts`, summed over all devices.
          dropout_key: Key of the model's random streams.
        """
        align_corners = self.model.align_corners
        of_auxiliary = counts[0 if self.criterion.auxiliary == self.criterion else 1]

        def loss_of(trained, batch_stats, images, labels, key):
            model = self.model.bind(state.params | trained, batch_stats, key=key)
            logits, taps = model(images)
            total = self.criterion.total(logits, labels, counts[0], align_corners=align_corners)
            if "aux_logits" in taps:
                auxiliary = self.criterion.auxiliary.total
                total = total + self.aux_weight * auxiliary(
                    taps["aux_logits"], labels, of_auxiliary, align_corners=align_corners
                )
            if self.teacher is not None:
                total = total + self.teacher.total(state.teacher, images, logits, counts[-1])
            return total, self.model.batch_stats_of(model)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        trained = self.model.trained(state.params)
        if self.accumulate == 1:
            (loss, batch_stats), gradients = value_and_grad(trained, state.batch_stats, images, labels, dropout_key)
            return loss, gradients, batch_stats

        def add(sums, part):
            batch_stats, *sums = sums
            (loss, batch_stats), gradients = value_and_grad(trained, batch_stats, *part)
            return (batch_stats, *jax.tree.map(jnp.add, sums, [loss, gradients])), None

        nothing = jnp.zeros((), counts[0].dtype), jax.tree.map(jnp.zeros_like, trained)
        parts = self.micro_batches(images, labels, dropout_key)
        (batch_stats, loss, gradients), _ = jax.lax.scan(add, (state.batch_stats, *nothing), parts)
        return loss, gradients, batch_stats

    def micro_batches(
        self, images: jax.Array, labels: jax.Array, dropout_key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images, labels and key of each micro-batch, stacked along a new first axis."""
        if self.accumulate == 1:
            return images[None], labels[None], dropout_key[None]

        group = self.criterion.group

        def in_parts(x):
            # (B, ...) -> (A, B / A, ...); part a has groups a, a + A, a + 2A ..., so no sample leaves its device. A
            # group is one sample, or several if the loss selects hard pixels from them together.
            parts = jnp.moveaxis(x.reshape(-1, self.accumulate, group, *x.shape[1:]), 1, 0)
            return parts.reshape(self.accumulate, -1, *x.shape[1:])

        keys = jax.vmap(partial(jax.random.fold_in, dropout_key))(jnp.arange(self.accumulate))
        return in_parts(images), in_parts(labels), keys

    def _moved_ema(self, state: TrainState, new: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
        if state.ema is None:
            return None
        # `1 - ema_decay` is computed in Python floats: the difference in float32 would keep three digits.
        share = jnp.maximum(1 - self.ema_decay, 9 / (10 + state.step.astype(float)))
        return {name: old + share.astype(old.dtype) * (new[name] - old) for name, old in state.ema.items()}

    def accepts(self, state: TrainState, loss: jax.Array, gradient_norm: jax.Array) -> jax.Array:
        """Whether a step may change the state: it is finite, and the training has not stopped."""
        return jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (state.skipped[1] <= self.may_skip)

    def advanced(self, state: TrainState, accepted: jax.Array, new: dict[str, Any]) -> TrainState:
        """The state after a step.

        Args:
          state: State before the step.
          accepted: Result of `accepts`. A step that is not accepted is skipped and counted. If the `may_skip` steps
            before it were skipped too, it stops the training, and `step` does not advance.
          new: Fields of the state that an accepted step changes.
        """
        skipped, in_a_row = state.skipped
        # The count `may_skip + 1` marks a stopped training.
        in_a_row = jnp.where(accepted, 0, jnp.minimum(in_a_row + 1, self.may_skip + 1))
        stopped = in_a_row > self.may_skip
        skips = ~accepted & ~stopped
        old = {name: getattr(state, name) for name in new}
        return dataclasses.replace(
            state,
            step=state.step + jnp.where(stopped, 0, 1),
            skipped=jnp.stack([skipped + jnp.where(skips, 1, 0), in_a_row]),
            **jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old),
        )

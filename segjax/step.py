"""The training and the evaluation step: pure bodies, and the two ways to run them on several devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from segjax import losses, optim
from segjax.models import layers
from segjax.state import Skeleton, TrainState

AXIS = "data"

# An augmentation: (keys (B,), {"image", "label", "size", ...}) -> (normalised images (B, h, w, 3), labels (B, h, w)).
Augment = Callable[[jax.Array, dict], tuple[jax.Array, jax.Array]]


def step_keys(key: jax.Array, step: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a step draws from: a key (B,) for each sample at `positions` of the batch, and one for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
    return jax.vmap(partial(jax.random.fold_in, augment_key))(positions), dropout_key


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

    skeleton: Skeleton
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
            with layers.blocks_executed(self.skeleton.execution):
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


@functools.cache
def compiler_options(platform: str) -> dict[str, int] | None:
    """What programs for "cpu" or "gpu" are compiled with: `jax.jit(..., compiler_options=compiler_options(platform))`.

    XLA:CPU uses half of AVX-512's registers unless told otherwise; two cores, with / without: SegNeXt-T 1x512x512
    inference 0.89, the other models 0.95 to 1.0. An XLA that does not know the option refuses it, and goes without.
    """
    if platform != "cpu":
        return None
    options = {"xla_cpu_prefer_vector_width": 512}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


class Parallel:
    """Where arrays live and how a step body is compiled: `jit` over a data mesh, or `pmap`.

    Both give the numbers of one device with the whole batch: under jit the compiler sees whole arrays; under pmap the
    body sums over the named axis, and the model's layers do where they need to. Of several processes each one calls the
    same; arrays of `jit` span them all, while those of `pmap` are the process's own part.
    """

    def __init__(self, kind: str, devices: list[jax.Device] | None = None):
        if kind not in ("jit", "pmap"):
            raise ValueError(f"parallel is 'jit' or 'pmap'; got {kind!r}")
        self.kind = kind
        self.devices = jax.devices() if devices is None else devices
        mesh = Mesh(np.array(self.devices), (AXIS,))
        self.own_devices = list(mesh.local_mesh.devices)
        if kind == "pmap":
            mesh = mesh.local_mesh
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec(AXIS))
        self._compiler_options = compiler_options(self.devices[0].platform)

    @property
    def axis_name(self) -> str | None:
        """What `BatchNorm` and the drop layers must be told: `model.set_attributes(axis_name=...)`."""
        return AXIS if self.kind == "pmap" else None

    def check(self, batch_size: int) -> None:
        if batch_size % len(self.devices):
            raise ValueError(f"a batch of {batch_size} does not divide among {len(self.devices)} devices")

    def replicate(self, tree):
        """The same arrays on every device: under pmap with a leading axis of devices."""
        if self.kind == "jit":
            return jax.device_put(tree, self.whole)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.own_devices), *jnp.shape(x))), tree)
        return jax.device_put(stacked, self.split)

    def fetch(self, tree):
        """Undoes `replicate`: one copy of every array, on the host, which no later step can touch."""
        if self.kind == "jit":
            return jax.tree.map(np.array, jax.device_get(tree))
        first = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return jax.tree.map(lambda whole, part: np.array(part.reshape(-1, *whole.shape[1:])[0]), tree, first)

    def scalars(self, steps: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
        """What several steps gave, one number a step, by name."""
        rows = [{name: np.ravel(value)[0] for name, value in row.items()} for row in jax.device_get(steps)]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def rows(self, batch_size: int) -> np.ndarray:
        """Which rows of a batch the devices of this process hold, in their order: int64 (b,)."""
        share = batch_size // len(self.devices)
        own = [place for place, device in enumerate(self.devices) if device in self.own_devices]
        return np.concatenate([np.arange(place * share, (place + 1) * share) for place in own])

    def spread(self, batch):
        """Arrays (b, ...) of this process's `rows` -> the whole batch on the devices, as `compile_train` takes it."""
        if self.kind == "jit":
            return jax.make_array_from_process_local_data(self.split, batch)
        return jax.device_put(jax.tree.map(self._by_device, batch), self.split)

    def _by_device(self, array):
        return array.reshape(len(self.own_devices), -1, *array.shape[1:])

    def batch(self, gather: Callable) -> Callable:
        """Compiles `gather(arrays, rows (b,)) -> arrays (b, ...)`, whose result is spread over the devices.

        Under jit `rows` are those of the whole batch, under pmap those of this process.
        """

        def shaped(arrays, rows):
            batch = gather(arrays, rows)
            return batch if self.kind == "jit" else jax.tree.map(self._by_device, batch)

        return jax.jit(shaped, out_shardings=self.split)

    def compile_train(self, body: Callable) -> Callable:
        """`body(state, batch, key, axis_name=...)` over all devices; the state given to it is used up."""
        if self.kind == "jit":
            return jax.jit(body, donate_argnums=0, out_shardings=self.whole, compiler_options=self._compiler_options)
        return jax.pmap(
            partial(body, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=0,
            devices=self.devices,
        )

    def compile_eval(self, body: Callable) -> Callable:
        """`body(params, batch_stats, images (B, ...)) -> (B, ...)` over all devices; takes and gives whole batches.

        The devices are those of this process alone: each evaluates by itself.
        """
        if self.kind == "jit":
            compiled = jax.jit(body, out_shardings=self.split, compiler_options=self._compiler_options)
            # Of several processes, jit would take the images for those of all.
            return lambda params, batch_stats, images: compiled(params, batch_stats, jax.device_put(images, self.split))
        mapped = jax.pmap(body, axis_name=AXIS, devices=self.devices)

        def whole(params, batch_stats, images):
            spread = images.reshape(len(self.devices), -1, *images.shape[1:])
            predicted = mapped(params, batch_stats, spread)
            return predicted.reshape(-1, *predicted.shape[2:])

        return whole

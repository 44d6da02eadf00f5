"""The training and the evaluation step: pure bodies, and the two ways to run them on several devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from segjax import losses
from segjax.state import Skeleton, TrainState

AXIS = "data"

# An augmentation: (keys (B,), {"image", "label", "size", ...}) -> (normalised images (B, h, w, 3), labels (B, h, w)).
Augment = Callable[[jax.Array, dict], tuple[jax.Array, jax.Array]]


def step_keys(key: jax.Array, step: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a step draws from: a key (B,) for each sample at `positions` of the batch, and one for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
    return jax.vmap(partial(jax.random.fold_in, augment_key))(positions), dropout_key


def train_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    augment: Augment,
    ignore_label: int,
    aux_weight: float,
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. The gradient is that of (sum of losses) / (count of pixels), both over all devices.

    Args:
      aux_weight: of the loss of a model's auxiliary logits, where it has any.
      batch: what `augment` takes, and "position" int32 (B,): each sample's place in the whole batch, from which its
        random numbers follow, whatever device it is on.
      key: of the run; the step's own is folded from it.
      axis_name: of the mapped axis under pmap.

    Returns:
      The next state, and scalars "loss" and "gradient_norm".
    """
    sample_keys, dropout_key = step_keys(key, state.step, batch["position"])
    images, labels = augment(sample_keys, batch)
    across = (lambda tree: tree) if axis_name is None else (lambda tree: jax.lax.psum(tree, axis_name))
    # A batch without a labelled pixel has loss 0 and gradient 0 rather than 0 / 0.
    count = jnp.maximum(across(jnp.sum(labels != ignore_label, dtype=jnp.int32)), 1)

    def loss_of(params):
        model = skeleton.bind(params, state.batch_stats, key=dropout_key)
        logits, taps = model(images)
        total, _ = losses.cross_entropy(logits, labels, ignore_label=ignore_label)
        if "aux_logits" in taps:
            aux_total, _ = losses.cross_entropy(taps["aux_logits"], labels, ignore_label=ignore_label)
            total = total + aux_weight * aux_total
        return total / count, skeleton.batch_stats_of(model)

    (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    loss, gradients = across((loss, gradients))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "gradient_norm": _norm(gradients)}
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def _norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def eval_step(
    skeleton: Skeleton,
    normalise: Callable[[jax.Array], jax.Array],
    params: dict[str, jax.Array],
    batch_stats: dict[str, jax.Array],
    images: jax.Array,
) -> jax.Array:
    """Train ids of uint8 images at their own size: (B, H, W, 3) -> uint8 (B, H, W).

    A model that takes multiples of some size alone is given the image with zeros, the mean colour, below and to the
    right of it, and its prediction there is cut off.
    """
    height, width = images.shape[1:3]
    below, right = -height % skeleton.size_multiple, -width % skeleton.size_multiple
    padded = jnp.pad(normalise(images), ((0, 0), (0, below), (0, right), (0, 0)))
    logits, _ = skeleton.bind(params, batch_stats)(padded)
    predicted = losses.predictions(logits, (height + below, width + right))
    return predicted[:, :height, :width].astype(jnp.uint8)


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
        one = tree if self.kind == "jit" else jax.tree.map(lambda x: x[0], tree)
        return jax.tree.map(np.array, jax.device_get(one))

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
            return jax.jit(body, donate_argnums=0, out_shardings=self.whole)
        return jax.pmap(
            partial(body, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=0,
            devices=self.devices,
        )

    def compile_eval(self, body: Callable) -> Callable:
        """`body(params, batch_stats, images (B, ...)) -> (B, ...)` over all devices; takes and gives whole batches."""
        if self.kind == "jit":
            return jax.jit(body, in_shardings=(self.whole, self.whole, self.split), out_shardings=self.split)
        mapped = jax.pmap(body, axis_name=AXIS, devices=self.devices)

        def whole(params, batch_stats, images):
            spread = images.reshape(len(self.devices), -1, *images.shape[1:])
            predicted = mapped(params, batch_stats, spread)
            return predicted.reshape(-1, *predicted.shape[2:])

        return whole

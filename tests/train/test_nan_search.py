"""The layer that produced a non-finite value is found by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import losses
from segjax.checkpoints.state_dict import named_variables
from segjax.data.augment import normalise
from segjax.models.functional import FunctionalModel
from segjax.recipes import common
from segjax.runtime.parallel import AXIS, JitParallel, PmapParallel
from segjax.train import nan_search, optim
from segjax.train.state import TrainState
from segjax.train.step import TrainStep
from tests.tiny import Net, tiny_model

# A layer deep inside, what must grow for it to be the first that overflows, and the layer that is to be named.
DEEP = {
    "segformer": ("backbone.block3.0.mlp.fc2.kernel", "backbone.block3.0.mlp.fc2"),
    "hrnet": ("stage3.0.branches.1.0.conv2.kernel", "stage3.0.branches.1.0.conv2"),
}
# Each family at once on one of the two, both on both in the slow tier.
DEEP_ON_SOME = pytest.mark.parametrize(
    "family, devices",
    [
        ("segformer", None),
        ("hrnet", 2),
        pytest.param("segformer", 2, marks=pytest.mark.slow),
        pytest.param("hrnet", None, marks=pytest.mark.slow),
    ],
)


def as_it_is(_, batch):
    return normalise(batch["image"]), batch["label"]


def with_infinity(keys, batch):
    images, labels = as_it_is(keys, batch)
    return images.at[1, 2, 3].set(jnp.inf), labels


@dataclasses.dataclass(frozen=True)
class Changed:
    """A criterion with something added to its loss."""

    inner: losses.Criterion
    change: object
    group: int = 1

    @property
    def auxiliary(self):
        return self

    def counts(self, labels):
        return self.inner.counts(labels)

    def total(self, logits, labels, counts, *, align_corners):
        return self.inner.total(logits, labels, counts, align_corners=align_corners) + self.change(logits)


def asked(
    family, *, devices=None, spoil=lambda model: None, augmentation=as_it_is, change=lambda logits: 0.0, **options
):
    """What is answered about a step of a tiny model that `spoil` has changed."""
    model = Net(0) if family == "net" else tiny_model(0, family)
    spoil(model)
    model.set_attributes(axis_name=None if devices is None else AXIS, raise_if_not_found=False)
    config = common.get_config("folder")
    config.optim.update(name="sgd", no_decay="", lr_multipliers=())
    functional = FunctionalModel(model)
    params, batch_stats = functional.arrays()
    transform = optim.optimizer(config.optim, params, steps=10)
    criterion = losses.criterion(config.loss, num_classes=5, ignore_label=255)
    step = TrainStep(
        model=functional, optimizer=transform, augment=augmentation, criterion=Changed(criterion, change), **options
    )
    state = jax.device_get(TrainState.start(params, batch_stats, transform.init(params)))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 32, 64, 3), dtype=np.uint8),
        "label": rng.integers(0, 5, (4, 32, 64), dtype=np.uint8),
        "position": np.arange(4, dtype=np.int32),
    }
    # As a run has it: under jit a sample on each of four devices.
    parallel = JitParallel() if devices is None else PmapParallel(jax.devices()[:devices])
    batch = parallel.spread(batch)
    return nan_search.first_not_finite(step, state, batch, jax.random.key(0))


def scaled(name, factor):
    def spoil(model):
        variable = named_variables(model)[name]
        variable[...] = variable[...] * factor

    return spoil


# -------------------------------------------------------------------------------------------------------- forward pass


@DEEP_ON_SOME
def test_the_first_layer_that_overflows_is_named(family, devices):
    kernel, layer = DEEP[family]
    found = asked(family, devices=devices, spoil=scaled(kernel, 2e38))
    assert found == f"The first output that is not finite is that of {layer}. "


def test_every_micro_batch_is_searched():
    kernel, layer = DEEP["segformer"]
    found = asked("segformer", spoil=scaled(kernel, 2e38), accumulate=2)
    assert found == f"The first output that is not finite is that of {layer}. "


@DEEP_ON_SOME
def test_a_parameter_or_statistic_that_is_not_finite_is_named(family, devices):
    kernel, _ = DEEP[family]

    def spoil(model):
        variable = named_variables(model)[kernel]
        variable[...] = variable[...].at[0].set(jnp.nan)

    found = asked(family, devices=devices, spoil=spoil)
    assert found == f"Already not finite before the step: {kernel}. "


def test_of_many_non_finite_parameters_a_few_are_named_with_their_number():
    def spoil(model):
        for number, variable in enumerate(named_variables(model).values()):
            if number % 2:
                variable[...] = variable[...] * jnp.inf

    found = asked("hrnet", spoil=spoil)
    assert found.startswith("Already not finite before the step: ") and found.count(",") == 2
    names = len(named_variables(tiny_model(0, "hrnet")))
    assert found.endswith(f" and {names // 2 - 3} more. ")


def test_non_finite_images_are_reported_instead_of_a_layer():
    assert asked("net", augmentation=with_infinity) == "The augmented images are not finite. "


# ------------------------------------------------------------------------------------------------------- backward pass


FIRST_OF_THE_BACKWARD_PASS = "All outputs are finite, but not all gradients: the first in the backward pass is that of"


@jax.custom_jvp
def steep(x):
    """x, with an infinite slope."""
    return x


@steep.defjvp
def _steep_jvp(primals, tangents):
    return steep(*primals), jnp.inf * tangents[0]


@pytest.mark.parametrize(
    "family, last, devices",
    [
        ("segformer", "decode_head.linear_pred", 2),
        pytest.param("hrnet", "last_layer.3", None, marks=pytest.mark.slow),
    ],
)
def test_for_a_gradient_infinite_from_the_loss_the_last_layer_is_named(family, last, devices):
    found = asked(family, devices=devices, change=lambda logits: steep(jnp.sum(logits) * 1e-3))
    assert found.startswith(f"{FIRST_OF_THE_BACKWARD_PASS} {last}.")


# Layers that every form calls: a feed-forward network goes past its own.
@pytest.mark.parametrize(
    "family, devices, layer",
    [
        ("segformer", None, "backbone.block3.0.attn.proj"),
        pytest.param("hrnet", 2, DEEP["hrnet"][1], marks=pytest.mark.slow),
    ],
)
def test_the_inner_layer_where_a_gradient_becomes_infinite_is_named(family, devices, layer, monkeypatch):
    def spoil(model):
        modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
        modules[layer].is_steep = True
        kind = type(modules[layer])
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, x: steep(call(self, x)) if hasattr(self, "is_steep") else call(self, x)
        )

    found = asked(family, spoil=spoil)
    assert found.startswith(
        f"All outputs are finite, but not all gradients: the first in the backward pass is that of {layer}."
    )


def test_a_loss_that_is_itself_not_finite_is_reported():
    found = asked("net", change=lambda logits: jnp.log(jnp.sum(logits) * 0))
    assert found == "All outputs of layers are finite, but the loss is -inf. "


def test_gradients_of_which_only_the_square_overflows_are_reported():
    found = asked("net", change=lambda logits: 1e20 * jnp.sum(logits))
    assert found.startswith("All gradients are finite, but the square of the largest is not: that of ")


def test_a_step_that_is_finite_when_recomputed_is_reported():
    assert asked("net", devices=4) == "When recomputed, everything was finite. "

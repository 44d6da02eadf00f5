"""Models on several devices: they trace under a mesh with explicit axes, and a step communicates only sums."""

import collections
import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from segjax import losses
from segjax.kernels import choice
from segjax.models.functional import FunctionalModel
from segjax.runtime.parallel import JitParallel
from segjax.train.state import TrainState
from segjax.train.step import TrainStep
from tests.tiny import ARCHITECTURES, FAMILIES, abstract_family, abstract_model, tiny_model

LOSS = dict(cross_entropy=1.0, ohem=0.0, dice=0.0, focal=0.0, lovasz=0.0, tversky=0.0, rmi=0.0)
LOSS |= dict(label_smoothing=0.0, focal_gamma=2.0, ohem_threshold=0.7, ohem_min_kept=0.1)
LOSS |= dict(tversky_alpha=0.3, tversky_beta=0.7, tversky_power=1.0, ohem_images=0, mean_over="labelled", aux="same")


def on_mesh(mesh, tree, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


# At the sizes that are published: other layers apply to those of tiny models.
PUBLISHED = ("segformer_b0", "segformer_plain_b0", "segformer_mmseg_b0", "segformer_simple", "segformer_zuppichini")
PUBLISHED += (pytest.param("hrnet_w18_ocr", marks=pytest.mark.slow), "segnext_t")


@pytest.mark.parametrize("family", [*FAMILIES, *PUBLISHED])
def test_forward_and_backward_passes_work_on_an_explicit_mesh(family):
    model = abstract_model(family, 5) if family in PUBLISHED else abstract_family(family)
    if family in PUBLISHED:
        # A copy, since others read the same model.
        model = nnx.merge(*nnx.split(model), copy=True)
        model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    mesh = jax.make_mesh((4,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)

    def loss(params, rest, images):
        logits, taps = nnx.merge(graph, params, rest, copy=True)(images)
        return sum(jnp.mean(jnp.square(x)) for x in (logits, *taps.values())), logits

    with jax.set_mesh(mesh):
        images = on_mesh(mesh, jax.ShapeDtypeStruct((8, 64, 96, 3), jnp.float32), "data")
        arguments = on_mesh(mesh, params), on_mesh(mesh, rest), images
        gradients, logits = jax.eval_shape(jax.grad(loss, has_aux=True), *arguments)
    assert logits.sharding.spec[0] == "data"
    assert all("data" not in x.sharding.spec for x in jax.tree.leaves(gradients))


def test_explicit_axes_without_a_mesh_are_refused_with_the_remedy():
    model = tiny_model(0)
    for axis_type, refused in ((AxisType.Explicit, True), (AxisType.Auto, False)):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
        images = jax.device_put(jnp.zeros((8, 32, 64, 3)), NamedSharding(mesh, PartitionSpec("data")))
        with pytest.raises(ValueError, match=r"jax\.set_mesh") if refused else contextlib.nullcontext():
            jax.eval_shape(lambda model, x: model(x)[0], model, images)
        with jax.set_mesh(mesh):
            assert jax.eval_shape(lambda model, x: model(x)[0], model, images).shape == (8, 8, 16, 5)


def collectives(text):
    """How often each kind of communication between devices occurs in an optimised program."""
    found = re.findall(
        r"= .*? (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast)"
        r"(?:-start)?\(",
        text,
    )
    return collections.Counter(found)


# For a GPU each architecture; for a CPU, which takes twice as long to compile, those whose row tiles or layers could
# communicate. The rest is slow.
ON_CPU = ("simple", "zuppichini")
STEPS = [pytest.param("cuda", family, marks=[pytest.mark.slow] * (family not in ARCHITECTURES)) for family in FAMILIES]
STEPS += [pytest.param("cpu", family, marks=[pytest.mark.slow] * (family not in ON_CPU)) for family in FAMILIES]


@pytest.mark.parametrize(("platform", "family"), STEPS)
def test_a_training_step_only_sums_over_devices(family, platform):
    functional = FunctionalModel(tiny_model(0, family))
    params, batch_stats = functional.arrays()
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    step = TrainStep(
        functional,
        optax.GradientTransformationExtraArgs(
            optimizer.init, lambda updates, state, params, accepted: optimizer.update(updates, state, params)
        ),
        lambda keys, batch: (batch["image"], batch["label"]),
        losses.criterion(LOSS, num_classes=5, ignore_label=255),
        aux_weight=0.4,
    )
    parallel = JitParallel(jax.devices()[:4])
    state = parallel.replicate(TrainState.start(params, batch_stats, optimizer.init(params)))
    batch = parallel.spread(
        {
            "image": np.zeros((8, 64, 96, 3), np.float32),
            "label": np.zeros((8, 64, 96), np.uint8),
            "position": np.arange(8, dtype=np.int32),
        }
    )
    with choice.meant_for(platform):
        program = parallel.compile_train(step).lower(state, batch, jax.random.key(0)).compile()
    found = collectives(program.as_text())
    assert set(found) == {"all-reduce"}
    # XLA combines reductions; there are never more than one per gradient, two per BatchNorm's forward and backward
    # pass, and those of the loss's sum and counts.
    assert found["all-reduce"] <= len(params) + 2 * len(batch_stats) + 3

"""What the programs for CUDA contain, lowered on a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from segjax import layers, losses
from segjax.models.functional import FunctionalModel
from segjax.models.stacked import stacks_for
from segjax.recipes import common
from segjax.train import optim
from segjax.train.state import TrainState
from segjax.train.step import TrainStep
from tests.tiny import FAMILIES, abstract_family

K, BATCH, SIZE = 5, 2, (64, 96)


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """jax asks the installed cuDNN for its version before it writes a call of it; here none is installed."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def programs(family, dtype):
    """The texts of inference and of a training step."""
    model = abstract_family(family, dtype=jnp.dtype(dtype), param_dtype=jnp.float32)
    with layers.meant_for("cuda"):
        functional = FunctionalModel(model)
        params, batch_stats = functional.arrays()
        image = jax.ShapeDtypeStruct((BATCH, *SIZE, 3), jnp.float32)
        forward = lowered(lambda *arrays: functional.bind(*arrays[:2])(arrays[2])[0], params, batch_stats, image)
        config = common.get_config("folder")
        config.optim.update(no_decay="", lr_multipliers=())
        stacks = stacks_for(layers.PLAIN, params, batch_stats, alike=optim.rules(config.optim, params))
        functional = FunctionalModel(model, stacks=stacks)
        optimizer = optim.optimizer(config.optim, params, steps=100, stacks=stacks)
        step = TrainStep(
            model=functional,
            optimizer=optimizer,
            augment=lambda _, batch: (batch["image"], batch["label"]),
            criterion=losses.criterion(config.loss, num_classes=K, ignore_label=255),
            aux_weight=0.4,
        )

        def start(params, batch_stats):
            return stacks.stacked(TrainState.start(params, batch_stats, optimizer.init(params)))

        state = jax.eval_shape(start, params, batch_stats)
        label = jax.ShapeDtypeStruct((BATCH, *SIZE), jnp.uint8)
        batch = {"image": image, "label": label, "position": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}
        return forward, lowered(step, state, batch, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lowers_for_cuda_without_float64(family, dtype):
    for text in programs(family, dtype):
        assert "f64" not in text


FULL = f"{BATCH}x{SIZE[0]}x{SIZE[1]}x{K}xf32"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_has_no_logits_of_the_size_of_the_labels(family):
    _, train = programs(family, "bfloat16")
    assert FULL not in train


def test_a_loss_without_an_implementation_for_gpus_has_them():
    criterion = losses.criterion(common.get_config("folder").loss, num_classes=K, ignore_label=255)

    def total(logits, labels):
        return criterion.total(logits, labels, criterion.counts(labels))

    logits = jax.ShapeDtypeStruct((BATCH, 16, 24, K), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH, *SIZE), jnp.uint8)
    assert FULL in lowered(jax.grad(total), logits, labels)
    with layers.meant_for("cuda"):
        assert FULL not in lowered(jax.grad(total), logits, labels)


# Largest number of reductions and of selections in a training step: a tenth above those counted on 2026-11-30. One for
# each parameter would be 110 to 190 more.
MOST = {
    "segformer": (225, 30),
    "plain": (225, 25),
    "plain with norm": (228, 26),
    "mmseg": (225, 33),
    "simple": (173, 18),
}
MOST |= {"zuppichini": (229, 20), "hrnet": (129, 61), "ocr": (171, 81), "segnext": (253, 28)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_no_operations_for_each_parameter(family):
    _, train = programs(family, "bfloat16")
    reductions, selections = MOST[family]
    assert train.count("stablehlo.reduce") <= reductions and train.count("stablehlo.select") <= selections

"""The operations of programs for CUDA, lowered on a machine without a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from segjax import layers, losses
from segjax.benchmark.training import training_step
from segjax.kernels import convolution
from segjax.models.functional import FunctionalModel
from segjax.models.prepared import Prepared
from segjax.recipes import common
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
        arrays = functional.arrays()
        image = jax.ShapeDtypeStruct((BATCH, *SIZE, 3), jnp.float32)
        parts = Prepared(lambda arrays, images: functional.bind(*arrays)(images)[0], arrays, image)
        forward = lowered(parts.program, jax.eval_shape(parts.prepare, arrays), image)
        step, start = training_step(model, num_classes=K)
        state = jax.eval_shape(start, *arrays)
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
def test_training_never_has_logits_at_the_size_of_the_labels(family):
    _, train = programs(family, "bfloat16")
    assert FULL not in train


def test_a_loss_without_a_gpu_implementation_has_logits_at_label_size():
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
MOST |= {"zuppichini": (229, 20), "hrnet": (143, 61), "ocr": (171, 81), "segnext": (253, 28)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_no_separate_operations_for_each_parameter(family):
    _, train = programs(family, "bfloat16")
    reductions, selections = MOST[family]
    assert train.count("stablehlo.reduce") <= reductions and train.count("stablehlo.select") <= selections


def test_inference_has_no_norms_and_no_transposed_weights():
    forward, _ = programs("hrnet", "bfloat16")
    convolutions = forward.count("stablehlo.convolution")
    assert convolutions >= 40 and forward.count("rsqrt") == 0 and forward.count("stablehlo.transpose") == 0
    # Maps are cast, in upsampling and in the head; no weight is.
    casts = [line for line in forward.splitlines() if "stablehlo.convert " in line]
    assert casts and all(f": (tensor<{BATCH}x" in line for line in casts)


def grouped(text):
    """Number of convolutions with groups."""
    return len(re.findall(r"(?:feature|batch)_group_count = (?:[2-9]|[1-9]\d+) ", text))


@pytest.mark.parametrize("family", ["segformer", "simple", "zuppichini", "segnext"])
def test_inference_has_no_depthwise_convolution_that_nothing_is_fused_with(family):
    forward, _ = programs(family, "bfloat16")
    assert forward.count("stablehlo.convolution") >= 4 and grouped(forward) == 0


@pytest.mark.parametrize(("dtype", "each"), [("bfloat16", 1), pytest.param("float32", 3, marks=pytest.mark.slow)])
def test_training_in_16_bits_leaves_only_depthwise_gradients_to_cudnn(dtype, each):
    _, train = programs("segformer", dtype)
    parameters = jax.tree.leaves(nnx.state(abstract_family("segformer"), nnx.Param))
    layers_with_groups = sum(parameter.shape[:3] == (3, 3, 1) for parameter in parameters)
    assert layers_with_groups >= 4 and grouped(train) == each * layers_with_groups


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_fused_depthwise_convolutions_are_summed_in_float32(dtype):
    x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 5, 7, 3), (3, 3, 1, 3)))
    equations = jax.make_jaxpr(convolution.depthwise_fused.fun)(x, kernel).eqns
    arithmetic = [equation.outvars[0].aval.dtype for equation in equations if equation.primitive.name in ("mul", "add")]
    assert len(arithmetic) == 17 and set(arithmetic) == {jnp.dtype(jnp.float32)}


def test_large_maps_and_kernels_are_left_to_cudnn():
    def is_fused(height, side, *, is_inference=True, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((1, height, 2 * height, 32), dtype)
        kernel = jax.ShapeDtypeStruct((side, side, 1, 32), dtype)
        return convolution.is_fused_on_gpu(x, kernel, is_inference=is_inference)

    assert is_fused(128, 5) and not is_fused(512, 5) and is_fused(512, 3)
    assert not is_fused(128, 5, is_inference=False) and is_fused(128, 3, is_inference=False)
    assert not is_fused(128, 3, is_inference=False, dtype=jnp.float32)

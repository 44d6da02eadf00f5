"""The cost of a model, counted from its shapes.

The model is traced in evaluation mode for one image, with published layers (`layers.published_implementations`).
Nothing is computed, so the largest model takes seconds.

The figures:

- parameters: the number of trained values, each counted once. Running statistics are not parameters.
- multiply-adds: those of every matrix product and convolution, from its shapes, including products with the zeros of
  the padding. The number of FLOPs is twice as large. Norms, activations, softmax, sums and biases are not counted.
- reported separately and not counted: products that only move pixels, that is upsampling by a matrix product (two
  non-zero weights in each row of the matrix) and unfolding of patches by a convolution with ones and zeros. Their
  number depends on the implementation, not on the model.
- activation memory: the outputs of all counted products and convolutions, norms, ReLU, GELU, upsamplings and
  unfoldings, for one image, each in the dtype of its computation. For attention that includes the (h, N, M) weights.
  A training step that recomputes nothing keeps about this amount. Elementwise sums and products, and savings by the
  compiler, are ignored.
- layers: calls by class. Every application of ReLU and GELU counts, with or without a layer object.

`least_work` counts the products and the memory traffic of the cheapest known order, for comparison with measured times.

The convention "modelsummary" gives the figures that jo-jstrm/segmentation_pytorch publishes: see `modelsummary`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from segjax import layers, models
from segjax.kernels import choice, convolution
from segjax.layers import functional
from segjax.models import hrnet, hrnet_ocr, segformer, segformer_plain, segformer_simple, segnext
from segjax.models.segmentation_model import SegmentationModel

# Kinds of multiply-adds: their names in `Summary.multiply_adds` and in the printed table.
KINDS = {
    "dense_convolution": "dense convolution",
    "grouped_convolution": "depthwise or grouped convolution",
    "pointwise_convolution": "1x1 convolution",
    "linear": "linear layer",
    "attention": "attention products",
    "object_gathering": "gathering of objects (OCR)",
    "nmf": "factorisation (NMF)",
    "other": "other products",
}
NOT_COUNTED = {"interpolation": "upsampling as matrix products", "unfolding": "unfolding as a convolution"}
# Kind of the matrix products inside a layer or function; the innermost one listed here decides.
KIND_INSIDE = {
    "Conv": "pointwise_convolution",
    "Linear": "linear",
    "MultiheadAttention": "linear",  # its joint projection
    "attention": "attention",
    "gather_objects": "object_gathering",
    "factorise": "nmf",
    "resize": "interpolation",
    "Unfold": "unfolding",
}
# Functions that count as layers: module, attribute and name of the layer.
FUNCTIONS = (
    # Models call layers.X, layers call functional.X.
    *((place, "gelu", "GELU") for place in (layers, functional)),
    *((layers, name, name) for name in ("attention", "resize", "upsample_nearest")),
    (layers, "classify", "Conv"),
    (hrnet_ocr, "gather_objects", "gather_objects"),
    (segnext, "factorise", "factorise"),
    (jax.nn, "relu", "ReLU"),
)
UNLISTED = ("attention", "resize", "upsample_nearest", "gather_objects", "factorise")

# For the convention "modelsummary": the models of jo-jstrm/segmentation_pytorch; its names for segjax's layers (None if
# it has no such module); the number of dropouts of rate 0 that it calls inside a layer and segjax omits; and parts of
# class names, whose parameters its tool adds up.
PUBLISHED_MODELS = (segformer_plain.SegFormerPlain, segformer_simple.SegFormerSimple, hrnet.HRNet)
PUBLISHED_NAMES = {"Conv": "Conv2d", "BatchNorm": "BatchNorm2d", "MixTransformer": None, "PlainHead": None}
PUBLISHED_DROPOUTS = {"Attention": 2, "Mlp": 2}
PUBLISHED_PARAMETERS_OF = ("Conv", "BatchNorm", "Linear")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The cost of a model for one image; the docstring of the module defines each figure.

    Attributes:
      name: Key of `models.MODELS`.
      size: Height and width of the image in pixels.
      num_classes: Number of classes K.
      overrides: Settings that differ from the model's defaults.
      dtype: Name of the dtype of the computation.
      parameters: Number of trained values.
      multiply_adds: Multiply-adds by kind, in the order of `KINDS`.
      not_counted: Multiply-adds that only move pixels, by kind.
      activation_bytes: Activation memory in bytes.
      layers: Number of calls by class, in alphabetical order.
      logits: Shape (h, w, K) of the logits.
      output_stride: Pixels of the image per pixel of the logits, along each axis.
    """

    name: str
    size: tuple[int, int]
    num_classes: int
    overrides: Mapping[str, object]
    dtype: str
    parameters: int
    multiply_adds: Mapping[str, int]
    not_counted: Mapping[str, int]
    activation_bytes: int
    layers: Mapping[str, int]
    logits: tuple[int, int, int]
    output_stride: int

    @property
    def total_multiply_adds(self) -> int:
        return sum(self.multiply_adds.values())

    @property
    def activation_mib(self) -> float:
        return self.activation_bytes / 2**20


@dataclasses.dataclass(frozen=True)
class LeastWork:
    """The least work of a forward pass of a whole batch that runs layer by layer.

    Attributes:
      multiply_adds: Multiply-adds of all counted products.
      values: Number of values read from and written to memory. Every product and convolution reads its two operands,
        including weights, and writes its result, each once. Attention is one operation, which reads queries, keys and
        values and writes its output, and keeps its (h, N, M) weights out of memory. Norms, activations, sums,
        upsamplings and unfoldings count as fused into their neighbours and cost nothing.
      parameters: Number of trained values.
    """

    multiply_adds: int
    values: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class PublishedSummary:
    """The figures of `modelsummary`; `layers` has the calls by class, in the order in which the first calls end."""

    name: str
    size: tuple[int, int]
    num_classes: int
    overrides: Mapping[str, object]
    parameters: int
    multiply_adds: int
    layers: Mapping[str, int]

    @property
    def gflops(self) -> float:
        """The figure that the tool prints: multiply-adds in units of 1024³."""
        return self.multiply_adds / 1024**3


# ------------------------------------------------------------------------------------------------------------ tracing


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
      name: Class of the layer, or its name in `FUNCTIONS`.
      path: Path of the module in the model; None for a function without a module.
      given: Shapes and dtypes of its array arguments.
      output: Shape and dtype of its result.
      is_leaf: Whether it called no other layer.
      is_new: Whether its result is not one of its arguments.
    """

    name: str
    path: tuple | None
    given: tuple[jax.ShapeDtypeStruct, ...]
    output: jax.ShapeDtypeStruct
    is_leaf: bool
    is_new: bool


@contextlib.contextmanager
def _noting_calls(model: SegmentationModel, calls: list[_Call]) -> Iterator[None]:
    """Inside the context, each call of a layer of `model` has a `named_scope` and is appended to `calls` on return.

    It patches classes and functions for the whole process: nothing else may be traced at the same time.
    """
    paths = {id(module): path for path, module in nnx.iter_modules(model)}

    def noting(function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            before = len(calls)
            with jax.named_scope(name):
                output = function(*args, **kwargs)
            # The first argument is the layer itself, or the layer that a function receives.
            path = paths.get(id(args[0]))
            given = tuple(_shapes(argument) for argument in args if isinstance(argument, jax.Array))
            is_new = all(output is not argument for argument in args)
            calls.append(_Call(name, path, given, _shapes(output), is_leaf=len(calls) == before, is_new=is_new))
            return output

        return call

    containers = (type(model), layers.Sequential, nnx.List, layers.ReLU, layers.GELU)
    called = {type(module) for _, module in nnx.iter_modules(model) if callable(module)}
    exchanged = [(kind, "__call__", kind.__call__, kind.__name__) for kind in called if kind not in containers]
    exchanged += [(module, attribute, getattr(module, attribute), name) for module, attribute, name in FUNCTIONS]
    with contextlib.ExitStack() as stack:
        for owner, attribute, function, name in exchanged:
            if attribute in vars(owner):
                stack.callback(setattr, owner, attribute, function)
            else:
                stack.callback(delattr, owner, attribute)  # inherited
            setattr(owner, attribute, noting(function, name))
        yield


def _shapes(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


@contextlib.contextmanager
def _cheapest_order() -> Iterator[None]:
    """Inside the context, models compute their products in the cheapest order, each convolution as one operation."""
    conv = functional.conv
    functional.conv = convolution.conv_plain
    try:
        # Not the fast implementations: they have more products, compute them as sums, or hide them in a call.
        with choice.meant_for("plain"):
            yield
    finally:
        functional.conv = conv


def _trace(
    model: SegmentationModel,
    size: tuple[int, int],
    batch: int = 1,
    implementations: Callable[[], contextlib.AbstractContextManager] = choice.published_implementations,
) -> tuple[list[_Call], ClosedJaxpr]:
    """The layer calls and the jaxpr of an abstract `model` from images to logits, traced inside `implementations()`."""
    if any(side < 1 for side in size):
        raise ValueError(f"the image must have at least one pixel; got {size[0]}x{size[1]}")
    calls: list[_Call] = []
    graph, state = nnx.split(model)

    def run(state, images):
        concrete = nnx.merge(graph, state)
        with _noting_calls(concrete, calls):
            return concrete(images)[0]

    with implementations():
        return calls, jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((batch, *size, model.in_channels), model.dtype))


@dataclasses.dataclass(frozen=True)
class _Product:
    kind: str
    multiply_adds: int
    values: int
    output_bytes: int


def _products(jaxpr: Jaxpr, scope: tuple[str, ...] = (), times: int = 1) -> Iterator[_Product]:
    """Every matrix product and convolution of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        inner = (*scope, *str(equation.source_info.name_stack).split("/"))
        # Any: jax declares a variable's aval as AbstractValue, which has no shape.
        name, output = equation.primitive.name, cast(Any, equation.outvars[0].aval)
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (cast(Any, operand.aval) for operand in equation.invars[:2])
            within = next((KIND_INSIDE[label] for label in reversed(inner) if label in KIND_INSIDE), "other")
            if name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                terms, kind = math.prod(left.shape[axis] for axis in contracted), within
            else:
                out_axis, _, *window_axes = equation.params["dimension_numbers"].rhs_spec
                terms = right.size // right.shape[out_axis]
                is_pointwise = all(right.shape[axis] == 1 for axis in window_axes)
                kind = "pointwise_convolution" if is_pointwise else "dense_convolution"
                kind = "grouped_convolution" if equation.params["feature_group_count"] > 1 else kind
                kind = within if within in NOT_COUNTED else kind
            values = left.size + right.size + output.size
            output_bytes = output.size * output.dtype.itemsize
            yield _Product(kind, times * output.size * terms, times * values, times * output_bytes)
            continue
        found = [
            product
            for value in jax.tree.leaves(list(equation.params.values()))
            if hasattr(getattr(value, "jaxpr", value), "eqns")
            for product in _products(getattr(value, "jaxpr", value), inner, times * equation.params.get("length", 1))
        ]
        if found and name in ("while", "cond"):
            raise ValueError(f"{'/'.join(inner)}: the number of runs of a product inside {name} is unknown")
        yield from found


def _abstract(name: str, num_classes: int, overrides: Mapping) -> SegmentationModel:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: models.create(name, num_classes=num_classes, **overrides))


def _parameters(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


# ------------------------------------------------------------------------------------------------------------ counting


def summarise(name: str, size: tuple[int, int], num_classes: int = 19, **overrides: Any) -> Summary:
    """Count the cost of a model for one image. No other thread may trace a model at the same time.

    Args:
      name: A key of `models.MODELS`.
      size: Height and width of the image in pixels.
      num_classes: Number of classes K.
      **overrides: Other arguments of `models.create`.

    Returns:
      The figures, as the docstring of the module defines them.

    Raises:
      KeyError, TypeError: As `models.create`.
      ValueError: As `models.create`, and for a size that the model cannot take.

    Example:
      >>> from segjax.models.summary import summarise
      >>> summary = summarise("segformer_b0", (64, 96), num_classes=19)
      >>> summary.parameters, summary.logits
      (3719027, (16, 24, 19))
    """
    model = _abstract(name, num_classes, overrides)
    calls, jaxpr = _trace(model, size)
    counts = dict.fromkeys([*KINDS, *NOT_COUNTED], 0)
    activations = 0
    for product in _products(jaxpr.jaxpr):
        counts[product.kind] += product.multiply_adds
        activations += product.output_bytes if product.kind in KINDS else 0
    for call in calls:
        if call.is_leaf and call.is_new and KIND_INSIDE.get(call.name) not in KINDS:
            activations += sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(call.output))
    listed = Counter(call.name for call in calls if call.name not in UNLISTED)
    logits = jaxpr.out_avals[0].shape[1:]
    return Summary(
        name=name,
        size=(size[0], size[1]),
        num_classes=num_classes,
        overrides=overrides,
        dtype=jnp.dtype(model.dtype).name,
        parameters=_parameters(model),
        multiply_adds={kind: counts[kind] for kind in KINDS},
        not_counted={kind: counts[kind] for kind in NOT_COUNTED},
        activation_bytes=activations,
        layers=dict(sorted(listed.items())),
        logits=logits,
        output_stride=_stride(size, logits[:2]),
    )


def least_work(name: str, size: tuple[int, int], *, batch: int, num_classes: int = 19, **overrides: Any) -> LeastWork:
    """Count the least work of one forward pass. No other thread may trace a model at the same time.

    It is that of the cheapest order of products in segjax, whichever order this machine runs: a decoder's products, for
    example, are at each level's own resolution.

    Args:
      name: A key of `models.MODELS`.
      size: Height and width of the images in pixels.
      batch: Number of images.
      num_classes: Number of classes K.
      **overrides: Other arguments of `models.create`.

    Returns:
      The least work of the whole batch.

    Raises:
      KeyError, TypeError, ValueError: As `summarise`.
    """
    model = _abstract(name, num_classes, overrides)
    calls, jaxpr = _trace(model, size, batch, _cheapest_order)
    products = [p for p in _products(jaxpr.jaxpr) if p.kind in KINDS and p.kind != "attention"]
    multiply_adds, values = sum(p.multiply_adds for p in products), sum(p.values for p in products)
    for call in calls:
        if call.name == "attention":
            query, key, value = call.given  # (B, h, N, D), (B, h, M, D) twice
            multiply_adds += 2 * query.size * key.shape[2]
            values += query.size + key.size + value.size + call.output.size
    return LeastWork(multiply_adds, values, _parameters(model))


def _stride(size: tuple[int, int], map_size: tuple[int, int]) -> int:
    """The power of two by which the sides of `size` are divided, rounding up, to give `map_size`."""
    powers = (2**exponent for exponent in range(max(size).bit_length() + 1))
    return next(s for s in powers if all(-(-side // s) == m for side, m in zip(size, map_size, strict=True)))


def modelsummary(name: str, size: tuple[int, int], num_classes: int = 19, **overrides: Any) -> PublishedSummary:
    """Compute the figures that jo-jstrm/segmentation_pytorch publishes, by the rules of its summary tool.

    The tool records every call of a module, except of Sequential, ModuleList and the model itself. It adds up the
    parameters of the calls whose class name contains Conv, BatchNorm or Linear. So a wrapper (DWConv, LinearMLP,
    DsConv2d) counts its layer a second time, and LayerNorm is not counted. Its multiply-adds are weight values times
    output pixels for a convolution, and output values times `input.size(1)` for a linear layer: the number of tokens,
    where the width of the input would be right. It does not count the products of attention.

    Args:
      name: A key of `models.MODELS`, of a model that the repository has.
      size: Height and width of the image in pixels.
      num_classes: Number of classes K.
      **overrides: Other arguments of `models.create`.

    Raises:
      KeyError, TypeError: As `summarise`.
      ValueError: As `summarise`, and for a model that the repository does not have.
    """
    models.settings(name)  # KeyError for an unknown name
    if models.MODELS[name].func not in PUBLISHED_MODELS:
        known = [other for other, model in models.MODELS.items() if model.func in PUBLISHED_MODELS]
        raise ValueError(
            f"jo-jstrm/segmentation_pytorch, whose convention modelsummary is, has no {name}; it has {', '.join(known)}"
        )
    model = _abstract(name, num_classes, overrides)
    calls, _ = _trace(model, size)
    modules = dict(nnx.iter_modules(model))
    counts: Counter[str] = Counter()
    parameters = multiply_adds = 0
    for call in calls:
        for called, module in _published_calls(call, modules):
            counts[called] += 1
            if module is not None and any(part in called for part in PUBLISHED_PARAMETERS_OF):
                parameters += _parameters(module)
        module = _called_module(call, modules)
        if isinstance(module, layers.Conv):
            pixels = math.prod(call.output.shape[1:3])
            multiply_adds += module.kernel.size * pixels
        elif isinstance(module, layers.Linear):
            tokens = math.prod(call.output.shape[1:-1])
            multiply_adds += call.output.size * tokens
    return PublishedSummary(name, (size[0], size[1]), num_classes, overrides, parameters, multiply_adds, dict(counts))


def _published_calls(call: _Call, modules: Mapping[tuple, nnx.Module]) -> Iterator[tuple[str, nnx.Module | None]]:
    """Class names of the modules that the published code calls in place of `call`, with segjax's counterparts."""
    if call.name in UNLISTED:
        return
    module = _called_module(call, modules)
    for _ in range(PUBLISHED_DROPOUTS.get(call.name, 0)):
        yield "Dropout", None
    if isinstance(module, layers.DropPath) and module.rate == 0:
        yield "Identity", None
    elif name := PUBLISHED_NAMES.get(call.name, call.name):
        yield name, module
    # segjax's decoder calls the linear layer without its wrapper.
    if call.path is not None and isinstance(module, layers.Linear):
        wrapper = modules[call.path[:-1]]
        if isinstance(wrapper, segformer.LevelProjection):
            yield "LinearMLP", wrapper


def _called_module(call: _Call, modules: Mapping[tuple, nnx.Module]) -> nnx.Module | None:
    """The called module; None for a function without one."""
    return None if call.path is None else modules[call.path]

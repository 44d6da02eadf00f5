"""Times equivalent implementations of single layers, to choose the one for each device from a measurement.

    python -m benchmarks.gpu_forms --json benchmarks/records/2026-11-28-gpu-forms.json
    python -m benchmarks.gpu_forms --rehearse --only attention

Result and gradients of each implementation are first compared with those of the plain one in float32. Then the forward
pass, and both passes, are timed, in milliseconds per call with many calls queued. The time of a copy of all inputs and
outputs is printed next to them. The sizes are those of SegFormer, SegNeXt and HRNet for batches of 16 images of
512x512, which exceed a card's cache. `--rehearse` uses tiny sizes for a CPU, and skips cuDNN's attention.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from segjax import layers, losses
from segjax.benchmark import contenders, floor
from segjax.benchmark.machine import described, quartiles
from segjax.kernels import convolution, norm, resize
from segjax.kernels.attention import attention_plain, attention_recomputed
from segjax.recipes import common
from segjax.runtime import atomic

# Norm of the difference from float32 divided by the norm; rounding operands to bfloat16 gives 1e-3 to 1e-2.
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "HWIO", "NCHW")


class Form(NamedTuple):
    """A function of arrays. axes: Order of the axes (B, H, W, C) in its first argument and its result."""

    call: Callable
    axes: tuple[int, ...] = ()


class Case(NamedTuple):
    """A layer at one size. shapes: Shapes of its arguments. forms: Implementations by name, the plain one first."""

    what: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    forms: Mapping[str, Form]


# --------------------------------------------------------------------------------------------------------------- forms


def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns, _, channels = kernel.shape
    return convolution.conv_plain(x, kernel, stride=1, padding=(rows // 2, columns // 2), groups=channels)


def depthwise(rehearse: bool) -> Iterator[Case]:
    forms = {
        "lax, grouped": Form(grouped),
        "shifted": Form(convolution.depthwise_fused),
        "shifted, own rule": Form(convolution.depthwise),
    }
    # The Mix-FFN of SegFormer's first and third stage; SegNeXt's attention.
    maps = {(3, 3): [(16, 128, 128, 128), (16, 32, 32, 1280)]}
    maps |= {kernel: [(16, 128, 128, 64)] for kernel in ((5, 5), (1, 21), (21, 1))}
    for kernel, shapes in maps.items():
        for shape in [(1, 8, 10, 4)] if rehearse else shapes:
            yield Case("depthwise {}x{}".format(*kernel), "bfloat16", (shape, (*kernel, 1, shape[-1])), forms)


def ours_of_tokens(form: Callable, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """segjax's attention, with inputs and output of shape (B, N, h, D), the layout of the layers around it."""
    heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    return form(*heads_first).transpose(0, 2, 1, 3)


def attention(rehearse: bool) -> Iterator[Case]:
    forms = {
        "einsum, plain": Form(partial(ours_of_tokens, attention_plain)),
        "own rule": Form(partial(ours_of_tokens, attention_recomputed)),
    }
    names = ["xla"] if jax.default_backend() == "cpu" else ["xla", "cudnn"]
    for name in names:
        forms[f"jax.nn, {name}"] = Form(partial(jax.nn.dot_product_attention, implementation=name))
    # First and third stage of B0 (32 wide) and of B2 (64 wide).
    sizes = [(16, 16384, 256, 1, 32), (16, 16384, 256, 1, 64), (16, 1024, 256, 5, 32), (16, 1024, 256, 5, 64)]
    for B, N, M, h, D in [(2, 24, 6, 2, 32)] if rehearse else sizes:
        yield Case(f"attention to {M}", "bfloat16", ((B, N, h, D), (B, M, h, D), (B, M, h, D)), forms)


def by_matrices(x: jax.Array, factor: int) -> jax.Array:
    rows, columns = (
        jax.image.resize(jnp.eye(side, dtype=x.dtype), (factor * side, side), "bilinear") for side in x.shape[1:3]
    )
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns, precision=lax.Precision.HIGHEST)


def upsampling(rehearse: bool) -> Iterator[Case]:
    # Two levels of a decoder, and the logits of 150 classes in the loss.
    sizes = [((16, 64, 64, 256), 2, "bfloat16"), ((16, 16, 16, 256), 8, "bfloat16"), ((4, 128, 128, 150), 4, "float32")]
    for (B, H, W, C), factor, dtype in [((1, 6, 8, 4), 2, "float32")] if rehearse else sizes:
        forms = {
            "jax.image.resize": Form(partial(resize.resize_plain, size=(factor * H, factor * W))),
            "phases": Form(partial(resize.resize_by_phases, factors=(factor, factor))),
            "repeats": Form(lambda x, factor=factor: resize.resize_by_repeats(x, (factor, factor))),
            "matrices": Form(partial(by_matrices, factor=factor)),
        }
        yield Case(f"upsampling {factor}x", dtype, ((B, H, W, C),), forms)


def dense(x: jax.Array, kernel: jax.Array, dimensions: tuple[str, ...]) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=dimensions)


def layouts(rehearse: bool) -> Iterator[Case]:
    forms = {
        "NHWC": Form(partial(dense, dimensions=NHWC)),
        "NCHW": Form(partial(dense, dimensions=NCHW), axes=(0, 3, 1, 2)),
    }
    # First and third branch of HRNet-W48.
    for B, H, W, C in [(2, 8, 10, 6)] if rehearse else [(16, 128, 128, 48), (16, 32, 32, 192)]:
        yield Case("convolution 3x3", "bfloat16", ((B, H, W, C), (3, 3, C, C)), forms)


EPSILON = 1e-6


def plain_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    layer = layers.LayerNorm(x.shape[-1], epsilon=EPSILON, dtype=x.dtype, param_dtype=scale.dtype)
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
    with layers.meant_for("plain"):
        return layer(x)


def own_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return norm.layer_norm(x, scale, bias, EPSILON, x.dtype)


def norms(rehearse: bool) -> Iterator[Case]:
    forms = {"two passes, plain": Form(plain_norm), "own rule": Form(own_norm)}
    for shape in [(2, 6, 5, 8)] if rehearse else [(16, 128, 128, 64), (16, 32, 32, 320)]:
        yield Case("LayerNorm", "bfloat16", (shape, shape[-1:], shape[-1:]), forms)


def loss(platform: str, labels: jax.Array, logits: jax.Array) -> jax.Array:
    settings = common.get_config("folder").loss
    criterion = losses.criterion(settings, num_classes=logits.shape[-1], ignore_label=255)
    with layers.meant_for(platform):
        return criterion.total(logits, labels, criterion.counts(labels))


def cross_entropies(rehearse: bool) -> Iterator[Case]:
    # The logits of SegFormer and HRNet, and of SegNeXt.
    for B, H, W, K, factor in [(2, 6, 8, 5, 4)] if rehearse else [(16, 128, 128, 150, 4), (16, 64, 64, 150, 8)]:
        shape = (B, factor * H, factor * W)
        labels = jax.random.randint(jax.random.key(1), shape, 0, K).astype(jnp.uint8)
        forms = {
            "upsampled": Form(partial(loss, "plain", labels)),
            "in cells": Form(partial(loss, "cuda", labels)),
        }
        yield Case(f"cross-entropy {factor}x", "float32", ((B, H, W, K),), forms)


CASES = {
    "cross-entropy": cross_entropies,
    "depthwise": depthwise,
    "attention": attention,
    "upsampling": upsampling,
    "layouts": layouts,
    "norms": norms,
}

# ----------------------------------------------------------------------------------------------------------- measuring


def both_passes(call: Callable) -> Callable:
    """Returns a function (gradient of the result, arguments) -> (result, gradients of all arguments)."""

    def run(gradient, *arguments):
        result, back = jax.vjp(call, *arguments)
        return result, *back(gradient)

    return run


@jax.jit
def _distances(ours, theirs):
    def relative(one, other):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        return jnp.linalg.norm(jnp.ravel(one - other)) / jnp.linalg.norm(jnp.ravel(other))

    return jnp.stack([relative(one, other) for one, other in zip(ours, theirs, strict=True)])


def distance(ours, theirs) -> float:
    """Returns the norm of the difference divided by that of `theirs`, the worst over arrays; inf for non-finite values.

    Computed on the device, because fetching arrays of half a gigabyte takes seconds.
    """
    worst = float(jnp.max(_distances(list(ours), list(theirs))))
    return worst if np.isfinite(worst) else float("inf")


def milliseconds(program: Callable, arguments: tuple, *, rehearse: bool) -> list[float]:
    """Returns the time of one call of many that are queued: median and quartiles over repetitions of about 50 ms."""

    def queued(calls: int) -> float:
        since = time.perf_counter()
        for _ in range(calls):
            done = program(*arguments)
        jax.block_until_ready(done)
        return (time.perf_counter() - since) / calls

    queued(2)
    calls = 1 if rehearse else max(1, round(0.05 / queued(5)))
    return quartiles(1e3 * np.array([queued(calls) for _ in range(2 if rehearse else 7)]))


def measured(case: Case, *, rehearse: bool, bytes_per_second: float) -> Iterator[dict[str, object]]:
    """Yields one row per implementation."""
    keys = jax.random.split(jax.random.key(0), len(case.shapes) + 1)
    wide = [jax.random.normal(key, shape) for key, shape in zip(keys[1:], case.shapes, strict=True)]
    narrow = [x.astype(case.dtype) for x in wide]
    plain = next(iter(case.forms.values()))
    result = jax.eval_shape(plain.call, *narrow)
    gradient = jax.random.normal(keys[0], result.shape).astype(case.dtype)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(both_passes(plain.call))(*(x.astype(jnp.float32) for x in (gradient, *narrow)))
    moved = sum(x.nbytes for x in (*narrow, gradient))
    about = {"what": case.what, "shape": list(case.shapes[0]), "dtype": case.dtype}
    about["copy_milliseconds"] = [1e3 * moved / bytes_per_second, 2e3 * moved / bytes_per_second]
    for name, form in case.forms.items():
        yield about | {"form": name} | _of_form(form, gradient, narrow, exact, rehearse=rehearse)


def _of_form(form: Form, gradient, arguments, exact, *, rehearse: bool) -> dict[str, object]:
    axes, back = form.axes, tuple(np.argsort(form.axes).tolist())
    if axes:
        gradient, first, rest = gradient.transpose(axes), arguments[0].transpose(axes), arguments[1:]
    else:
        first, *rest = arguments

    def in_order(x):
        return x.transpose(back) if axes else x

    try:
        forward, both = jax.jit(form.call), jax.jit(both_passes(form.call))
        result, to_first, *to_rest = both(gradient, first, *rest)
        error = distance([in_order(result), in_order(to_first), *to_rest], exact)
        error = max(error, distance([in_order(forward(first, *rest))], exact[:1]))
        if not error <= CLOSE[result.dtype.name]:
            return {"error": error, "failed": f"computes something else: off by {error:.1e}"}
        return {
            "error": error,
            "forward": milliseconds(forward, (first, *rest), rehearse=rehearse),
            "both": milliseconds(both, (gradient, first, *rest), rehearse=rehearse),
        }
    except Exception as reason:  # Continue if a card or a version of jax lacks one.
        return {"failed": f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"}


def steps_per_dispatch(*, rehearse: bool) -> Iterator[dict[str, object]]:
    """Times whole steps of SegFormer-B0, one per program or several in a `lax.scan`: milliseconds per step."""
    size, counts = ((32, 64), (1, 2)) if rehearse else ((512, 512), (1, 8))
    for mode, batch in (("infer", 1), ("train", 2)):
        work = contenders.Work("segformer_b0", size, batch, mode, dtype="bfloat16")
        about = {"what": f"steps, {mode}", "shape": [batch, *size, 3], "dtype": work.dtype}
        first = None
        for count in counts:
            call = (_inference if mode == "infer" else _training)(work, count)
            outcome = np.concatenate([np.ravel(call()) for _ in range(max(counts) // count)])
            first = outcome if first is None else first
            error = distance([outcome], [first])
            row = about | {"form": f"{count} a dispatch", "error": error}
            if not error <= CLOSE["bfloat16"]:
                yield row | {"failed": f"computes something else: off by {error:.1e}"}
                continue
            whole = milliseconds(call, (), rehearse=rehearse)
            yield row | {"forward" if mode == "infer" else "both": [time / count for time in whole]}


def _inference(work: contenders.Work, count: int) -> Callable:
    """Returns a function that computes the mean logit of each image, with the memory of a single image."""
    from segjax.models.functional import FunctionalModel

    functional = FunctionalModel(_model(work))
    arrays = functional.arrays()
    images = jnp.stack([jnp.asarray(work.images())] * count)

    @jax.jit
    def run(params, batch_stats, images):
        model = functional.bind(params, batch_stats)
        return lax.scan(lambda _, x: (None, jnp.mean(jnp.square(model(x)[0]))), None, images)[1]

    return lambda: run(*arrays, images)


def _training(work: contenders.Work, count: int) -> Callable:
    """Returns a function that computes the losses of `count` steps."""
    step, compile_train, state, batch, key = contenders.training(work, _model(work))

    def several(state, batch, key):
        state, scalars = lax.scan(lambda state, _: step(state, batch, key), state, None, length=count)
        return state, scalars["loss"]

    program = compile_train(several)

    def run():
        nonlocal state
        state, losses = program(state, batch, key)
        return losses

    return run


def _model(work: contenders.Work):
    import segjax

    return segjax.create(work.model, num_classes=work.num_classes, dtype=work.dtype, drop_path_rate=0, dropout_rate=0)


# ------------------------------------------------------------------------------------------------------------- command


def line(row: Mapping) -> str:
    """Returns a line for one implementation, at most 80 columns: forward, both passes, error."""
    if "failed" in row:
        return f"  {row['form']:<24} {row['failed']}"[:80]
    times = "".join(f" {row[name][0]:>12.4f}" if name in row else " " * 13 for name in ("forward", "both"))
    return f"  {row['form']:<24}{times} {row['error']:>9.1e}"


def title(row: Mapping) -> str:
    shape = "x".join(map(str, row["shape"]))
    copies = row.get("copy_milliseconds")
    beside = f"; copied in {copies[0]:.3f}, {copies[1]:.3f} ms" if copies else ""
    return f"{row['what']}, {shape}, {row['dtype']}{beside}"


def main(arguments: list[str] | None = None) -> int:
    groups = [*CASES, "steps"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_forms", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="NAME", help=", ".join(groups))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, a few calls: for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written, after every layer")
    options = parser.parse_args(arguments)
    command = sys.argv[1:] if arguments is None else arguments
    device = jax.devices()[0]
    if device.platform == "cpu":
        if not options.rehearse:
            print("gpu_forms: there is no GPU here; --rehearse runs tiny sizes on the CPU", file=sys.stderr)
            return 2
        print("no GPU here: tiny sizes, and cuDNN's attention is skipped")
    ceiling = floor.ceilings("bfloat16")
    print(f"{'milliseconds':<26} {'forward':>12} {'both passes':>12} {'error':>9}", flush=True)
    rows = []
    for group in options.only:
        if group == "steps":
            found = steps_per_dispatch(rehearse=options.rehearse)
        else:
            given = dict(rehearse=options.rehearse, bytes_per_second=ceiling["bytes_per_second"])
            found = (row for case in CASES[group](options.rehearse) for row in measured(case, **given))
        for row in found:
            if not rows or title(rows[-1]) != title(row):
                print(title(row))
            print(line(row), flush=True)
            rows.append(row)
        if options.json:
            record = {
                "date": datetime.date.today().isoformat(),
                "command": "python -m benchmarks.gpu_forms " + " ".join(command),
                **described(),
                "device": device.device_kind,
                "ceilings": ceiling,
                "forms": rows,
            }
            atomic.write_text(options.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

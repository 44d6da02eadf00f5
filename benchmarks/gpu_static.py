"""Compiles a segjax model for an NVIDIA GPU on a machine without one, and prints the work of the compiled program.

    python -m benchmarks.gpu_static segformer_b0 --mode train --batch 32 --dtype bfloat16
    python -m benchmarks.gpu_static segformer_b5 --mode train --top 25 --keep b5 --json b5.json
    python -m benchmarks.gpu_static hrnet_w48 segnext_b --mode infer --batch 1 32 --dtype bfloat16 float32  # a table
    python -m benchmarks.gpu_static all --lower-only               # only checks that every model lowers for CUDA
    python -m benchmarks.gpu_static segformer_b0 --mode train --parallel pmap --devices 8
    python -m benchmarks.gpu_static segformer_b0 --mode train --patch my_forms.py  # with a change, see below
    python -m benchmarks.gpu_static forms.py                       # functions of arrays, see below

It needs jax's CUDA plugin (1.6 GB), but no GPU, driver or torch. `--no-deps` omits 3 GB of NVIDIA's libraries, which
are not needed here:

    python3.12 -m venv ~/gpu-static
    ~/gpu-static/bin/pip install "jax==0.11.2" "jaxlib==0.11.2" -e .
    ~/gpu-static/bin/pip install --no-deps "jax-cuda13-plugin==0.11.2" "jax-cuda13-pjrt==0.11.2"

XLA's CUDA compiler runs for a card that is described in text (`H200` below, or `--target FILE`, a
GpuTargetConfigProto), in a process that is ended once the optimised program and its memory are known. --full continues
to machine code for sm_90, which takes as long again, and proves that the program compiles completely. Without a card
the compiler cannot time algorithms, so products and convolutions get default ones. The kernels, their shapes, layouts
and traffic are therefore those of a card, except for the tiling of products; see the list of differences below.

Columns: kernel launches; GB that they read and write, each operand and result once (only the slice of a sliced
operand); TFLOP; roofline time, the sum over kernels of max(bytes / 4.3e12, products / rate, other arithmetic / 2e13) +
3 microseconds; memory as XLA assigns it, without arguments. The roofline is a lower bound for comparisons, not a
prediction: a kernel that runs at half the bandwidth takes twice as long.

Differences from a compilation on the card:
 - Algorithms of convolutions and their workspace are not chosen: a cuDNN convolution counts only as bytes and FLOP.
 - All products are Triton's, with a default tiling (--no-triton: all are cuBLAS's, with nothing fused into them). On a
   card XLA times both and takes the faster. `split-K`, which a card may also choose, is folded away by --no-triton.
 - The traffic of a Pallas kernel is known, its arithmetic is not.
 - No time was measured on a card. Grouped convolutions in particular may be far slower than their traffic suggests.

A name that ends in .py is a file with CASES = {"name": (function, [(shape, dtype), ...])}. Each function is compiled
forward and, with --mode train, with the gradients of all its arguments; this compares implementations in seconds.

--patch FILE executes Python code before the model is built, with `segjax` importable, for example to replace a function
(`from segjax.layers import functional; functional.attention = ...`) and compare the result.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before jax is imported, so that it does not look for a GPU or a driver.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Properties of an H200 (SXM) that XLA queries: public figures of the datasheet, and the values of a CUDA device query.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98  device_memory_size: 150754820096
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  scalar_unit_description {
    rate_infos { key: 10 value { clock_rate_ghz: 1.98 units_per_core: 128 ops_per_clock: 2 } }
    rate_infos { key: 11 value { clock_rate_ghz: 1.98 units_per_core: 128 ops_per_clock: 1 } }
    rate_infos { key: 12 value { clock_rate_ghz: 1.98 units_per_core: 64 ops_per_clock: 1 } }
    rate_infos { key: 16 value { clock_rate_ghz: 1.98 units_per_core: 128 ops_per_clock: 2 } }
  }
  matrix_unit_description {
    rate_infos { key: 10 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 } }
    rate_infos { key: 11 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 256 } }
    rate_infos { key: 16 value { clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 } }
  }
  device_vendor: "NVIDIA Corporation"  name: "NVIDIA H200"
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.15.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 15 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""

# Measured on an H200: a copy, and products of 8192 x 8192 in bfloat16. Assumed: TF32 at half that rate, as in the
# datasheet; flash attention with heads of 64; float32 products and other arithmetic, from the datasheet's 67e12.
BYTES, LAUNCH = 4.3e12, 3e-6
CUDNN_VERSION = 91300
RATES = {
    "bf16": 7.9e14,
    "f16": 7.9e14,
    "attention": 3.0e14,
    "tf32": 3.9e14,
    "f32": 5.0e13,
    "f64": 5.0e13,
    "other": 2.0e13,
}

# -------------------------------------------------------------------------------------------------- reading HLO text

SIZES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8, c128=16)
NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-update", "copy-done", "async-done", "domain", "add-dependency"),
}
MOVES = {"parameter", "transpose", "copy", "bitcast", "reshape", "tuple", "get-tuple-element", "convert"}
# Approximate number of instructions for one float32 value on an SM.
COSTS = collections.defaultdict(lambda: 1)
COSTS |= {"erf": 25, "exponential": 6, "log": 10, "tanh": 15, "rsqrt": 4, "sqrt": 8, "divide": 9, "power": 30}
COSTS |= {"logistic": 15, "exponential-minus-one": 15, "log-plus-one": 15, "sine": 20, "cosine": 20, "erf-inv": 30}
COSTS |= dict.fromkeys(
    [*MOVES, "constant", "broadcast", "iota", "slice", "pad", "concatenate", "dynamic-slice", "bitcast-convert"], 0
)


@dataclasses.dataclass
class Instruction:
    name: str
    shapes: list[tuple[str, tuple[int, ...]]]  # several if the result is a tuple
    layouts: list[tuple[int, ...]]
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool
    number: int | None = None  # index of a parameter

    @property
    def elements(self) -> int:
        return sum(math.prod(dims) for _, dims in self.shapes)

    @property
    def bytes(self) -> int:
        return sum(SIZES.get(kind, 4) * math.prod(dims) for kind, dims in self.shapes)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-$]+) = ")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-$]+) \(.*\{$")


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(text)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations by name, and the name of the entry computation."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _LINE.match(line):
            body = line[found.end() :]
            cut = _closing(body, 0) + 1 if body[0] == "(" else re.search(r"\s", body).start()
            given, body = body[:cut], body[cut:].lstrip()
            opcode = re.match(r"[\w\-]+", body)[0]
            start = len(opcode)
            end = _closing(body, start)
            operands = re.findall(r"%([\w.\-$]+(?:#\d+)?)", body[start : end + 1]) if opcode != "constant" else []
            shapes = _SHAPE.findall(given)
            current.append(
                Instruction(
                    found[2],
                    [(kind, _numbers(dims)) for kind, dims, _ in shapes],
                    [_numbers(layout) for *_, layout in shapes],
                    opcode,
                    operands,
                    body[end + 1 :] if opcode != "constant" else "",
                    bool(found[1]),
                    int(body[start + 1 : end]) if opcode == "parameter" else None,
                )
            )
    return computations, entry


class Table(dict):
    """Instructions by name; name#2 is the third element of a tuple."""

    def __missing__(self, operand: str) -> Instruction:
        name, _, part = operand.partition("#")
        whole = dict.__getitem__(self, name) if name in self else None
        if not part or whole is None:
            raise KeyError(operand)
        return dataclasses.replace(whole, shapes=[whole.shapes[int(part)]], layouts=[whole.layouts[int(part)]])

    def __contains__(self, operand: object) -> bool:
        return dict.__contains__(self, str(operand).partition("#")[0])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


class Sources:
    """Source locations of instructions, from the tables at the head of the text."""

    def __init__(self, text: str):
        head = text[: text.find("\n\n\n")] if "StackFrames" in text else ""
        tables = collections.defaultdict(dict)
        table = None
        for line in head.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = tables[line]
            elif table is not None and (found := re.match(r"(\d+) (.*)$", line)):
                table[int(found[1])] = found[2]
        self._tables = tables

    def of(self, instruction: Instruction) -> str:
        """Returns function:line of the innermost frame in segjax's models, losses or optimizer, else of any frame."""
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        names, inner = self._tables, ""
        number = int(frame) if frame else 0
        while number:
            fields = dict(re.findall(r"(\w+)=(\d+)", names["StackFrames"].get(number, "")))
            place = dict(
                re.findall(r"(\w+)=(\d+)", names["FileLocations"].get(int(fields.get("file_location_id", 0)), ""))
            )
            file = names["FileNames"].get(int(place.get("file_name_id", 0)), "").strip('"')
            function = names["FunctionNames"].get(int(place.get("function_name_id", 0)), "").strip('"')
            short = f"{os.path.basename(file).removesuffix('.py')}.{function.split('.<locals>')[0]}:{place.get('line')}"
            inner = inner or short
            if "segjax" in file.split(os.sep) or file.endswith(("optax", "patch")):
                return short
            parent = int(fields.get("parent_frame_id", 0))
            number = parent if parent != number else 0
        return inner


# -------------------------------------------------------------------------------------------------------- kernels


@dataclasses.dataclass
class Kernel:
    name: str
    kind: str
    bytes: float
    product_flops: float
    other_flops: float
    rate: str
    shape: str
    op: str
    source: str
    inside: tuple[str, ...]
    times: int = 1
    xla_us: float = 0.0

    @property
    def seconds(self) -> float:
        return (
            max(self.bytes / BYTES, self.product_flops / RATES[self.rate], self.other_flops / RATES["other"]) + LAUNCH
        )

    @property
    def bound(self) -> str:
        parts = {
            "memory": self.bytes / BYTES,
            "products": self.product_flops / RATES[self.rate],
            "arithmetic": self.other_flops / RATES["other"],
            "launch": LAUNCH,
        }
        return max(parts, key=parts.get)


class Program:
    """The kernels of an optimised module; kernels in a loop count once per iteration if the trip count is known."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self._sources = Sources(text)
        self.unknown_loops = 0
        self.kernels: list[Kernel] = []
        self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> None:
        shapes = Table({i.name: i for i in self.computations[name]})
        for i in self.computations[name]:
            if i.opcode in NO_KERNEL:
                continue
            if i.opcode == "while":
                trips = i.attribute(r'known_trip_count":\{"n":"(\d+)"')
                self.unknown_loops += trips is None
                self._walk(i.attribute(r"body=%?([\w.\-$]+)"), times * int(trips or 1))
            elif i.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-$]+)", i.attribute(r"branch_computations=\{([^}]*)\}") or ""):
                    self._walk(branch, times)
            elif i.opcode in ("call", "async-start"):
                called = i.attribute(r"(?:to_apply|calls)=%?([\w.\-$]+)")
                if called:
                    self._walk(called, times)
            else:
                self.kernels.append(self._kernel(i, shapes, times))

    def _kernel(self, i: Instruction, shapes: dict[str, Instruction], times: int) -> Kernel:
        body = self.computations.get(i.attribute(r"calls=%?([\w.\-$]+)") or "", [])
        opcodes = {part.opcode for part in body}
        target = i.attribute(r'custom_call_target="([^"]+)"') or ""
        products, rate = 0.0, "bf16"
        other = 0.0
        if i.opcode == "fusion":
            reads, writes = _fusion_traffic(i, body, shapes)
            table = Table({part.name: part for part in body})
            for part in body:
                if part.opcode in ("dot", "convolution"):
                    products += _flops(part, table)
                    rate = _rate(part, table)
                elif part.opcode in ("reduce", "reduce-window"):
                    other += sum(table[o].elements for o in part.operands[: len(part.operands) // 2] if o in table)
                else:
                    other += COSTS[part.opcode] * part.elements
            kind = self._kind_of_fusion(i, body, opcodes)
        else:
            reads = sum(shapes[o].bytes for o in dict.fromkeys(i.operands) if o in shapes)
            writes = i.bytes
            if i.opcode == "custom-call":
                kind = self._kind_of_call(i, target)
                if kind.startswith("conv"):
                    products, rate = _conv_flops(i, shapes), _rate(i, shapes)
                    writes = sum(SIZES[k] * math.prod(d) for k, d in i.shapes[:1])
                elif kind == "cudnn attention":
                    products, rate = _attention_flops(i, shapes), "attention"
                elif "gemm" in target or "matmul" in target:
                    products, rate = _gemm_flops(i, shapes), _rate(i, shapes)
                    writes = sum(SIZES[k] * math.prod(d) for k, d in i.shapes[:1])
            elif i.opcode in ("dot", "convolution"):
                products, rate, kind = _flops(i, shapes), _rate(i, shapes), "product"
            elif i.opcode in ("copy", "transpose", "copy-start"):
                kind = "copy/transpose"
            else:
                kind = i.opcode
        found = re.findall(r'"exec_time_us":([\d.e+\-]+)', i.rest)
        kind_of, dims = (i.shapes or [("", ())])[0]
        inside = tuple(dict.fromkeys(filter(None, (self._sources.of(part) for part in body if COSTS[part.opcode]))))
        root = next((part for part in body if part.is_root), i)
        return Kernel(
            i.name,
            kind,
            reads + writes,
            products,
            other,
            rate,
            f"{kind_of}[{','.join(map(str, dims))}]" + (f"+{len(i.shapes) - 1}" if len(i.shapes) > 1 else ""),
            (i.attribute(r'op_name="([^"]*)"') or root.attribute(r'op_name="([^"]*)"') or "").split(")/", 1)[-1],
            self._sources.of(i) or self._sources.of(root),
            inside,
            times,
            # XLA's cost model does not know Triton kernels.
            float(found[0]) if found and "triton" not in kind else 0.0,
        )

    def _kind_of_fusion(self, i, body, opcodes) -> str:
        backend = i.attribute(r'"kind":"(__[^"]+)"') or ""
        if "gemm" in backend or "dot" in opcodes:
            return "product (triton)"
        if "cudnn" in backend:
            return "cudnn fusion"
        if "convolution" in opcodes:
            return "conv (fusion)"
        if "triton" in backend:
            return "rows (triton)" if "reduce" in opcodes else "loop (triton)"
        if "scatter" in opcodes:
            return "scatter"
        if opcodes <= MOVES and opcodes & {"transpose", "copy"}:
            return "copy/transpose"
        if "reduce" in opcodes or "reduce-window" in opcodes:
            return "reduce"
        if "transpose" in opcodes:
            return "loop+transpose"
        return "loop"

    def _kind_of_call(self, i, target) -> str:
        if target.startswith("__cudnn$conv"):
            groups = int(i.attribute(r"feature_group_count=(\d+)") or 1)
            what = {"Forward": "fwd", "BackwardInput": "dgrad", "BackwardFilter": "wgrad"}
            end = next((short for long, short in what.items() if target.endswith(long)), "fwd+act")
            return f"conv {'grouped ' if groups > 1 else ''}{end}"
        if "fmha" in target or "Attention" in target:
            return "cudnn attention"
        if "gemm" in target or "matmul" in target:
            return "product (cublas)"
        return f"call {target}"


def _flops(i: Instruction, shapes: dict[str, Instruction]) -> float:
    if i.opcode == "convolution":
        return _conv_flops(i, shapes)
    contracted = _numbers(i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
    left = shapes[i.operands[0]].shapes[0][1]
    return 2.0 * i.elements * math.prod(left[d] for d in contracted)


def _gemm_flops(i: Instruction, shapes: dict[str, Instruction]) -> float:
    contracted = _numbers(",".join(re.findall(r"\d+", i.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or "")))
    left = shapes[i.operands[0]].shapes[0][1]
    return 2.0 * math.prod(i.shapes[0][1]) * math.prod(left[d] for d in contracted)


def _conv_flops(i: Instruction, shapes: dict[str, Instruction]) -> float:
    """Returns twice the multiply-adds, from the dimension labels; for a gradient, those of its forward convolution."""
    labels = i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    if not labels:
        return 0.0
    target = i.attribute(r'custom_call_target="([^"]+)"') or ""
    right = labels.split("_")[1].split("->")[0]
    given = [shapes[o].shapes[0][1] for o in i.operands[:2]]
    result = i.shapes[0][1]
    if target.endswith("BackwardFilter"):
        kernel, output = result, given[1]
    elif target.endswith("BackwardInput"):
        kernel, output = given[1], given[0]
    else:
        kernel, output = given[1], result
    spatial = [size for size, label in zip(kernel, right, strict=True) if label not in "io"]
    inputs = kernel[right.index("i")]
    return 2.0 * math.prod(output) * math.prod(spatial) * inputs


def _attention_flops(i: Instruction, shapes: dict[str, Instruction]) -> float:
    """Returns the FLOP for (B, N, h, D) and (B, M, h, D): two products forward, five backward."""
    query, key = (shapes[o].shapes[0][1] for o in i.operands[:2])
    return (10.0 if "Backward" in i.rest else 4.0) * math.prod(query) * key[1]


def _rate(i: Instruction, shapes: dict[str, Instruction]) -> str:
    kind = shapes[i.operands[0]].shapes[0][0] if i.operands and i.operands[0] in shapes else "bf16"
    if kind != "f32":
        return kind if kind in RATES else "bf16"
    highest = "highest" in i.rest.lower() or re.search(r"operand_precision.{0,20}HIGHEST", i.rest)
    return "f32" if highest else "tf32"


def _fusion_traffic(i: Instruction, body: list[Instruction], shapes: dict[str, Instruction]) -> tuple[float, float]:
    """Returns bytes read and written: of a sliced operand only the slices, of an update in place only the update."""
    users = collections.defaultdict(list)
    for part in body:
        for operand in part.operands:
            users[operand.partition("#")[0]].append(part)
    by_name = Table({part.name: part for part in body})

    def read(part: Instruction, whole: float) -> float:
        total = 0.0
        for user in users[part.name]:
            if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == part.name:
                total += user.elements * whole / max(part.elements, 1)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == part.name:
                continue
            elif (
                user.opcode in ("bitcast", "reshape", "convert", "copy", "transpose") and user.elements == part.elements
            ):
                total += read(user, whole)
            else:
                return whole
        return min(total, whole)

    parameters = [part for part in body if part.opcode == "parameter"]
    seen: dict[str, float] = {}
    for part in parameters:
        operand = i.operands[part.number] if part.number < len(i.operands) else part.name
        # An operand that is passed twice is a single array.
        seen[operand] = max(seen.get(operand, 0.0), read(part, part.bytes))
    reads = sum(seen.values())
    writes = i.bytes
    root = next((part for part in body if part.is_root), None)
    roots = (
        [by_name[o] for o in root.operands if o in by_name] if root is not None and root.opcode == "tuple" else [root]
    )
    for part in filter(None, roots):
        inner = part
        while inner.opcode in ("bitcast", "reshape", "convert") and inner.operands and inner.operands[0] in by_name:
            inner = by_name[inner.operands[0]]
        if inner.opcode == "dynamic-update-slice":
            writes += by_name[inner.operands[1]].bytes - part.bytes
    return reads, max(writes, 0.0)


# ------------------------------------------------------------------------------------------------------ what to compile


def described(target: str, devices: int):
    """Returns devices that support only compilation."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{devices}").devices


def lowered(
    name,
    size,
    batch,
    mode,
    dtype,
    num_classes,
    devices,
    parallel,
    *,
    execution=None,
    settings=None,
    implementations="cuda",
):
    """Lowers, without compiling, the segjax program that a user of these devices would get."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import segjax
    from segjax import layers
    from segjax.benchmark.training import training_step
    from segjax.models.functional import FunctionalModel
    from segjax.models.prepared import Prepared
    from segjax.runtime.parallel import parallel_for

    # Only shapes; no weights are drawn.
    model = nnx.eval_shape(
        lambda: segjax.create(name, num_classes=num_classes, dtype=jnp.dtype(dtype), **(settings or {}))
    )
    spread = parallel_for(parallel, list(devices))

    def placed(tree, where):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    with layers.meant_for(implementations):
        if mode == "infer":
            if parallel == "pmap":
                raise SystemExit("--mode infer is compiled with jit")
            functional = FunctionalModel(model)

            def forward(arrays, images):
                return functional.bind(*arrays)(images)[0]

            images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32, sharding=spread.split)
            prepared = Prepared(forward, functional.arrays(), images)
            weights = jax.eval_shape(prepared.prepare, functional.arrays())
            return jax.jit(prepared.program).lower(placed(weights, spread.whole), images)
        step, start = training_step(model, num_classes=num_classes, axis_name=spread.axis_name, **(execution or {}))
        state = jax.eval_shape(start, *FunctionalModel(model).arrays())
        examples = {
            "image": jax.ShapeDtypeStruct((batch, *size, 3), np.float32),
            "label": jax.ShapeDtypeStruct((batch, *size), np.uint8),
            "position": jax.ShapeDtypeStruct((batch,), np.int32),
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        train = spread.compile_train(step)
        if parallel == "jit":
            return train.lower(placed(state, spread.whole), placed(examples, spread.split), placed(key, spread.whole))
        count = len(devices)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), state)
        examples = {
            k: jax.ShapeDtypeStruct((count, v.shape[0] // count, *v.shape[1:]), v.dtype) for k, v in examples.items()
        }
        return train.lower(state, examples, key)


# -------------------------------------------------------------------------------------------------------------- report


def grouped(kernels, key) -> list[tuple[str, int, float, float, float]]:
    sums = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for k in kernels:
        row = sums[key(k)]
        row[0] += k.times
        row[1] += k.times * k.bytes
        row[2] += k.times * k.product_flops
        row[3] += k.times * k.seconds
    return sorted(((name, *row) for name, row in sums.items()), key=lambda row: -row[-1])


def summary(program: Program, memory: dict, seconds: dict) -> dict:
    kernels = program.kernels

    def total(key):
        return sum(k.times * key(k) for k in kernels)

    return {
        "kernels": sum(k.times for k in kernels),
        "by_kind": {
            name: {"kernels": n, "GB": b / 1e9, "ms": 1e3 * s}
            for name, n, b, _, s in grouped(kernels, lambda k: k.kind)
        },
        "GB": total(lambda k: k.bytes) / 1e9,
        "TFLOP": total(lambda k: k.product_flops) / 1e12,
        "ms": 1e3 * total(lambda k: k.seconds),
        "ms_without_launches": 1e3 * total(lambda k: k.seconds - LAUNCH),
        "xla_ms": total(lambda k: k.xla_us) / 1e3,
        "unknown_loops": program.unknown_loops,
        **memory,
        **seconds,
    }


def memory_of(text: str) -> dict[str, float]:
    """Returns memory in GiB from XLA's buffer assignment."""
    sums = collections.Counter()
    for size, what in re.findall(r"^allocation \d+: size (\d+), (.*)$", text, re.MULTILINE):
        if "preallocated-temp" in what:
            sums["temporaries_GiB"] += int(size)
        elif "parameter" in what:
            sums["arguments_GiB"] += int(size)
            sums["reused_GiB"] += int(size) if "maybe-live-out" in what else 0
        elif "maybe-live-out" in what:
            sums["output_GiB"] += int(size)
        elif "constant" in what:
            sums["constants_GiB"] += int(size)
    names = ("temporaries_GiB", "arguments_GiB", "reused_GiB", "output_GiB", "constants_GiB")
    return {name: sums[name] / 2**30 for name in names}


def show(title: str, program: Program, found: dict, top: int) -> None:
    print(f"\n{title}")
    print(
        f"  {found['kernels']} kernels, {found['GB']:.1f} GB, {found['TFLOP']:.2f} TFLOP of products; roofline "
        f"{found['ms']:.2f} ms ({found['ms_without_launches']:.2f} without launches)\n"
        f"  memory: temporaries {found['temporaries_GiB']:.2f} GiB, arguments {found['arguments_GiB']:.2f}, of which "
        f"reused {found['reused_GiB']:.2f}, results beside them {found['output_GiB']:.2f}\n"
        f"  lowered in {found['lower_s']:.0f} s, compiled in {found['compile_s']:.0f} s; "
        f"{found['cpu_s']:.0f} s of a core in all"
        f"{'' if found['to_machine_code'] else ' (no machine code made)'}"
        + (f"; {found['unknown_loops']} loops of unknown length counted once" if found["unknown_loops"] else "")
    )
    line = "  {:<44} {:>6} {:>9} {:>9} {:>9} {:>6}"
    all_ms = found["ms"]

    def table(head, rows):
        print("\n" + line.format(head, "number", "GB", "GFLOP", "ms", "share"))
        for name, number, moved, flops, seconds in rows:
            share = f"{1e3 * seconds / all_ms:.0%}"
            print(
                line.format(
                    name[:44], number, f"{moved / 1e9:.3f}", f"{flops / 1e9:.1f}", f"{1e3 * seconds:.3f}", share
                )
            )

    table("kind of kernel", grouped(program.kernels, lambda k: k.kind))
    table("bound by", grouped(program.kernels, lambda k: k.bound))
    if top:

        def way(k):
            return "back" if "transpose(" in k.op else "there"

        table(
            "written in (of a fusion: its last operation)",
            grouped(program.kernels, lambda k: f"{k.source} {way(k)}")[:top],
        )
        print(
            f"\n  the longest\n  {'ms':>7} {'GB':>7} {'GFLOP':>8} {'x':>3}  {'bound':<10} {'kind':<18} "
            "shape, operation, source"
        )
        for k in sorted(program.kernels, key=lambda k: -k.times * k.seconds)[:top]:
            print(
                f"  {1e3 * k.seconds:>7.3f} {k.bytes / 1e9:>7.3f} {k.product_flops / 1e9:>8.1f} {k.times:>3}  "
                f"{k.bound:<10} "
                f"{k.kind:<18} {k.shape} {k.op[-50:]} {k.source}"
            )


class CompilationError(Exception):
    """Raised with the output of the compiling process."""


def compiled(job: dict, folder: str, *, full: bool) -> dict[str, float]:
    """Compiles in a new process, which leaves the optimised program in `folder`; returns the seconds of its stages."""
    before_all = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = f"{job['flags']} --xla_gpu_collect_cost_model_stats=true --xla_dump_to={folder} --xla_dump_hlo_as_text"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(job | {"folder": folder}), "none"]
    with open(os.path.join(folder, "said"), "w+") as said:
        worker = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            before = None
            while worker.poll() is None:
                time.sleep(0.5)
                found = dumped(folder, "-memory-usage-report.txt"), dumped(folder, ".txt")
                sizes = [os.path.getsize(path) if path else 0 for path in found]
                if not full and all(sizes) and sizes == before:
                    worker.kill()
                before = sizes
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        said.seek(0)
        words = said.read()
    times = dict(re.findall(r"^(lower_s|compile_s) ([\d.]+)$", words, re.MULTILINE))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before_all.ru_utime - before_all.ru_stime
    program = dumped(folder, ".txt")
    if job["lower_only"] and "lower_s" in times:
        return {"lower_s": float(times["lower_s"])}
    if not program or (full and "compile_s" not in times):
        raise CompilationError(words[-3000:])
    began = os.path.getmtime(os.path.join(folder, "lowered"))
    took = float(times.get("compile_s") or os.path.getmtime(program) - began)
    return {"lower_s": float(times["lower_s"]), "compile_s": took, "cpu_s": spent, "to_machine_code": full}


def dumped(folder: str, ending: str) -> str | None:
    """Returns the largest optimised GPU program in a folder, or the file next to it with another ending."""
    ends = [name for name in os.listdir(folder) if name.endswith("_gpu_after_optimizations.txt")]
    largest = max(ends, key=lambda name: os.path.getsize(os.path.join(folder, name)), default=None)
    path = os.path.join(folder, largest.removesuffix(".txt") + ending) if largest else ""
    return path if os.path.exists(path) else None


def cases(path: str) -> dict:
    """Returns the CASES of a file of functions."""
    space = {"__name__": "cases", "__file__": path}
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), space)
    return space["CASES"]


def lowered_case(name, mode, devices):
    """Lowers one function of a file: forward, or forward and backward."""
    import jax
    import jax.numpy as jnp

    path, _, case = name.partition("::")
    function, given = cases(path)[case]
    whole = jax.sharding.SingleDeviceSharding(devices[0])
    given = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=whole) for shape, kind in given]
    if mode == "infer":
        return jax.jit(function).lower(*given)

    def both(gradient, *arguments):
        result, back = jax.vjp(function, *arguments)
        return result, *(part for part in back(gradient) if part.dtype != jax.dtypes.float0)

    result = jax.eval_shape(function, *given)
    return jax.jit(both).lower(jax.ShapeDtypeStruct(result.shape, result.dtype, sharding=whole), *given)


def work(job: dict) -> None:
    """Runs in the compiling process."""
    import jax

    if job["precision"]:
        jax.config.update("jax_default_matmul_precision", job["precision"])
    if job["patch"]:
        with open(job["patch"]) as file:
            exec(compile(file.read(), job["patch"], "exec"), {"__name__": "patch"})
    devices = described(Path(job["target"]).read_text() if job["target"] else H200, job["devices"])
    # jax queries the version of the installed cuDNN before it emits its attention; cuDNN may be missing here.
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION
    # Pallas queries the device, and a described device cannot be jax's default device.
    abstract = jax.sharding.AbstractDevice(device_kind=devices[0].device_kind, num_cores=132, platform="gpu")
    since = time.perf_counter()
    names = ("name", "size", "batch", "mode", "dtype", "num_classes")
    more = {key: job[key] for key in ("execution", "settings", "implementations")}
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        if "::" in job["name"]:
            program = lowered_case(job["name"], job["mode"], devices)
        else:
            program = lowered(*(job[name] for name in names), devices, job["parallel"], **more)
    print(f"\nlower_s {time.perf_counter() - since:.1f}", flush=True)
    with open(os.path.join(job["folder"], "lowered"), "w"):
        pass
    if job["lower_only"]:
        return
    since = time.perf_counter()
    program.compile()
    print(f"\ncompile_s {time.perf_counter() - since:.1f}", flush=True)


def write(path: str, programs: list[dict]) -> None:
    # The compiling process runs this file as a script, which has no package.
    from benchmarks import recorded

    about = recorded.about("benchmarks.gpu_static", sys.argv[1:])
    device = {"device": "NVIDIA H200, described; nothing was run on a GPU"}
    recorded.write(Path(path), about | device | {"programs": programs})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of segjax.MODELS, or all")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--mode", nargs="+", choices=["infer", "train"], default=["infer"])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--num-classes", type=int, default=150)
    parser.add_argument("--parallel", choices=["jit", "pmap"], default="jit")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--scan-blocks", action="store_true")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument(
        "--implementations", default="cuda", help="layers.meant_for: cuda, or cpu to see what that would cost"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the model")
    parser.add_argument("--no-triton", action="store_true", help="products by cuBLAS, nothing fused into them")
    parser.add_argument("--flags", default="", help="more XLA_FLAGS")
    parser.add_argument("--target", help="file with another GpuTargetConfigProto as text")
    parser.add_argument("--patch", help="Python file that is run before the model is made")
    parser.add_argument("--precision", help="jax_default_matmul_precision, such as highest")
    parser.add_argument("--lower-only", action="store_true", help="no compilation: does it lower for CUDA?")
    parser.add_argument("--full", action="store_true", help="to machine code, which proves that it can be made")
    parser.add_argument("--top", type=int, default=0, help="list so many kernels and places in the source")
    parser.add_argument("--keep", help="folder for what XLA dumps (of several programs, folders in it)")
    parser.add_argument("--json", help="file for the figures of all programs")
    parser.add_argument("--only", default="", help="of a file of functions, those whose name this is found in")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return 0
    names = options.models
    from segjax.commands.arguments import parse_overrides

    if names == ["all"]:
        from segjax import models

        names = list(models.MODELS)
    common = dict(
        size=options.size,
        num_classes=options.num_classes,
        parallel=options.parallel,
        devices=options.devices,
        execution=dict(scan_blocks=options.scan_blocks, remat=options.remat)
        if options.scan_blocks or options.remat
        else None,
        settings=parse_overrides(options.set),
        implementations=options.implementations,
        flags=("--xla_gpu_enable_triton_gemm=false " if options.no_triton else "") + options.flags,
        target=options.target,
        patch=options.patch,
        precision=options.precision,
        lower_only=options.lower_only,
    )
    if of_cases := [name for name in names if name.endswith(".py")]:
        # Only the names are needed here.
        names = [f"{name}::{case}" for name in of_cases for case in cases(name)]
        names = [name for name in names if re.search(options.only, name)]
        options.dtype, options.batch = options.dtype[:1], options.batch[:1]
    jobs = itertools.product(names, options.mode, options.dtype, options.batch)
    records, failed = [], 0
    for name, mode, dtype, batch in jobs:
        about = dict(name=name, mode=mode, dtype=dtype, batch=batch)
        short = name.partition("::")[2]
        title = (
            f"{short}, {mode}"
            if short
            else f"{name}, {mode} {batch}x{options.size[0]}x{options.size[1]}, {dtype}, {options.parallel}"
        )
        title += f" on {options.devices}" if options.devices > 1 else ""
        with contextlib.ExitStack() as stack:
            if options.keep:
                folder = os.path.join(
                    options.keep, f"{short or name}-{mode}-{batch}-{dtype}".replace("/", "_").replace(" ", "_")
                )
                shutil.rmtree(folder, ignore_errors=True)
                os.makedirs(folder)
            else:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
            try:
                seconds = compiled(common | about, folder, full=options.full)
            except CompilationError as error:
                failed += 1
                print(f"\n{title}: FAILED\n{error}", flush=True)
                records.append(about | {"failed": str(error)})
                continue
            if options.lower_only:
                print(f"{title}: lowered in {seconds['lower_s']:.1f} s", flush=True)
                records.append(about | seconds)
                continue
            with open(dumped(folder, ".txt")) as file:
                program = Program(file.read())
            with open(dumped(folder, "-buffer-assignment.txt")) as file:
                memory = memory_of(file.read())
        found = summary(program, memory, seconds)
        show(title, program, found, options.top)
        sys.stdout.flush()
        records.append(about | found)
        if options.json:
            write(options.json, records)
    done = [r for r in records if "ms" in r]
    if len(done) > 1:
        print(
            f"\n{'model':<38} {'work':<22} {'kernels':>7} {'GB':>8} {'TFLOP':>7} {'ms':>8} {'temp GiB':>8} "
            f"{'compile s':>9}"
        )
        for r in done:
            short = r["name"].partition("::")[2]
            what = r["mode"] if short else f"{r['mode']} {r['batch']} {r['dtype']}"
            print(
                f"{short or r['name']:<38} {what:<22} {r['kernels']:>7} {r['GB']:>8.2f} {r['TFLOP']:>7.2f} "
                f"{r['ms']:>8.2f} "
                f"{r['temporaries_GiB']:>8.2f} {r['compile_s']:>9.0f}"
            )
    if options.json:
        write(options.json, records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

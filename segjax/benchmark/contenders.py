"""The contenders of a benchmark: segjax's model and PyTorch models, with the same weights and the same input."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax
    import torch

    from segjax.models.segmentation_model import SegmentationModel
    from segjax.train.state import TrainState
    from segjax.train.step import TrainStep


class Work(NamedTuple):
    """The work of a step.

    Attributes:
      model: Key of `models.MODELS`.
      size: (height, width) of the images in pixels.
      batch: Number of images.
      mode: "infer", images to logits; or "train", forward, loss at the labels' resolution, backward and AdamW.
      dtype: "float32", or "bfloat16" (autocast in torch).
      num_classes: Number of classes K.
      seed: Seed of images, labels and weights.
    """

    model: str
    size: tuple[int, int]
    batch: int
    mode: str
    dtype: str = "float32"
    num_classes: int = 150
    seed: int = 0

    def images(self) -> np.ndarray:
        """Normalised noise (B, H, W, 3), float32."""
        return np.random.default_rng(self.seed).normal(size=(self.batch, *self.size, 3)).astype(np.float32)

    def labels(self) -> np.ndarray:
        """Train ids (B, H, W), uint8, in patches, a tenth of which are ignored."""
        rng = np.random.default_rng(self.seed + 1)
        height, width = self.size
        coarse = rng.integers(0, self.num_classes, (self.batch, -(-height // 16), -(-width // 16))).astype(np.uint8)
        coarse[rng.random(coarse.shape) < 0.1] = 255
        return coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]


class Contender(NamedTuple):
    """A step that is ready to be timed.

    Attributes:
      run: Function from a number of steps, by default 1, to the result of the last step. On a CPU it waits for the end
        of each step, on a GPU only for that of the last, as a training run or a queue of images does.
      outcome: Result of the first step: logits (B, h, w, K), or the loss.
      compile_seconds: Seconds of the preparation, including the first step.
      memory: Bytes of a step in addition to weights, optimizer moments and input; None if the device does not report
        them.
    """

    run: Callable[..., Any]
    outcome: np.ndarray
    compile_seconds: float
    memory: int | None


# Precision of float32 products, equal for all contenders and recorded with the times.
FLOAT32_PRODUCTS = "float32, never TF32"


def same_precision(work: Work) -> None:
    """Sets full precision for float32 products; on an NVIDIA GPU jax and torch would round some to TF32."""
    import jax
    import torch

    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if work.dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


def repeated(step: Callable[[], Any], wait: Callable[[Any], object], *, each: bool) -> Callable[..., Any]:
    """Creates `Contender.run`, which calls `wait` with the result of a step, after `each` step or only the last."""

    def run(steps: int = 1):
        given = None
        for number in range(1, steps + 1):
            given = step()
            if each or number == steps:
                wait(given)
        return given

    return run


def pair(work: Work) -> tuple[SegmentationModel, torch.nn.Module]:
    """A segjax model and its PyTorch reference, with the same weights and without dropout."""
    from segjax import models
    from segjax.torch_reference.verify import randomised_pair

    settings = models.settings(work.model)
    still = {key: 0.0 for key in ("drop_path_rate", "dropout_rate") if key in settings}
    return randomised_pair(work.model, num_classes=work.num_classes, seed=work.seed, dtype="float32", **still)


def ours(work: Work) -> Contender:
    """segjax's model, as `segjax train` and `segjax evaluate` run it."""
    import jax
    import jax.numpy as jnp

    import segjax
    from segjax.models.segnext import Hamburger
    from segjax.torch_reference import verify

    model, _ = pair(work)
    if work.dtype == "bfloat16":
        overrides: dict[str, Any] = dict(model.spec.overrides)
        model = segjax.from_torch(
            segjax.to_torch(model), name=work.model, num_classes=work.num_classes, dtype=jnp.bfloat16, **overrides
        )
    bases = verify.bases_for(model, work.batch)
    if bases:
        # Training draws bases at every step. Both sides get the same bases, so that their losses can be compared.
        Hamburger.bases_for = lambda self, x: jnp.asarray(bases[0], x.dtype)
    wrapped, arguments = program(work, model)
    since = time.perf_counter()
    compiled = wrapped.lower(*arguments).compile()
    step = stepping(compiled, work.mode, arguments)
    outcome = np.asarray(step())
    seconds = time.perf_counter() - since
    run = repeated(step, jax.block_until_ready, each=jax.default_backend() == "cpu")
    return Contender(run, outcome, seconds, _temporaries(compiled))


def program(work: Work, model: SegmentationModel) -> tuple[Any, tuple]:
    """What is timed of segjax: a jitted forward pass or training step, and its first arguments."""
    if work.mode == "infer":
        return _inference(work, model)
    step, compile_train, *arguments = training(work, model)
    return compile_train(step), tuple(arguments)


def stepping(program: Callable, mode: str, arguments: tuple) -> Callable[[], jax.Array]:
    """A function that calls a program of `program` once more and returns the logits, or the loss of the next step."""
    if mode == "infer":
        return lambda: program(*arguments)
    state, *others = arguments

    def train() -> jax.Array:
        nonlocal state
        state, scalars = program(state, *others)
        return scalars["loss"]

    return train


def _inference(work: Work, model: SegmentationModel) -> tuple[jax.stages.Wrapped, tuple]:
    import jax

    from segjax import layers
    from segjax.models.functional import FunctionalModel
    from segjax.models.prepared import Prepared
    from segjax.runtime.parallel import compiler_options

    functional = FunctionalModel(model)
    weights = jax.device_put(functional.arrays())
    images = jax.device_put(work.images())

    def forward(arrays, images):
        return functional.bind(*arrays)(images)[0]

    call: Callable = forward
    if layers.is_fast_on_gpu():
        # As `segjax.inference.engine` runs it.
        parts = Prepared(forward, weights, images)
        weights, call = jax.jit(parts.prepare)(weights), parts.program
    return jax.jit(call, compiler_options=compiler_options(jax.default_backend())), (weights, images)


def _temporaries(program) -> int | None:
    """Bytes of a compiled program's temporaries, or None if the device does not report them."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def training(
    work: Work, model: SegmentationModel
) -> tuple[TrainStep, Callable[[Callable], Callable], TrainState, dict[str, jax.Array], jax.Array]:
    """A training step as `train.py` compiles it, and its arguments.

    Returns:
      The step, a function that compiles it, and the arguments state, batch and key.
    """
    import jax
    import jax.numpy as jnp

    from segjax.benchmark.training import example, training_step
    from segjax.models.functional import FunctionalModel
    from segjax.runtime.parallel import JitParallel

    parallel = JitParallel(jax.devices()[:1])
    arrays = FunctionalModel(model).arrays()
    step, start = training_step(model, num_classes=work.num_classes)
    state = parallel.replicate(jax.tree.map(jnp.copy, start(*arrays)))
    batch = jax.device_put(example(work.images(), work.labels()))
    return step, parallel.compile_train, state, batch, jax.random.key(0)


# ------------------------------------------------------------------------------------------------------------- PyTorch


def torch_eager(work: Work) -> Contender:
    return _torch(work, pair(work)[1])


def torch_channels_last(work: Work) -> Contender:
    return _torch(work, pair(work)[1], channels_last=True)


def torch_compile(work: Work) -> Contender:
    return _torch(work, pair(work)[1], compiled="default")


def torch_compile_max_autotune(work: Work) -> Contender:
    """Compiles with kernels chosen by timing, replayed as CUDA graphs on a GPU."""
    return _torch(work, pair(work)[1], compiled="max-autotune")


def torch_sdpa(work: Work) -> Contender:
    """Uses PyTorch's scaled_dot_product_attention."""
    return _torch(work, _with_sdpa(pair(work)[1]))


def torch_fused(work: Work) -> Contender:
    """Uses segjax's order of the decoder's products, and scaled_dot_product_attention."""
    return _torch(work, _with_fused_decoder(_with_sdpa(pair(work)[1])))


def torch_fused_compile(work: Work) -> Contender:
    return _torch(work, _with_fused_decoder(_with_sdpa(pair(work)[1])), compiled="default")


def of_transformers(work: Work) -> Contender:
    """transformers' SegFormer, unchanged."""
    import torch
    import transformers

    from segjax.checkpoints import metadata
    from segjax.checkpoints.save import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        about = metadata.completed(metadata.guessed(work.num_classes), channels=3)
        write_checkpoint(Path(folder) / "model", pair(work)[0], dialect="hf", metadata=about)
        network = transformers.SegformerForSemanticSegmentation.from_pretrained(Path(folder) / "model")
    for module in network.modules():
        for rate in ("p", "drop_prob"):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)

    class Logits(torch.nn.Module):
        """The network with the output of the references, logits and taps."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images).logits, {}

    return _torch(work, Logits().eval())


def of_segformer_pytorch(work: Work) -> Contender:
    """The package segformer-pytorch from PyPI, unchanged."""
    import torch
    from segformer_pytorch import Segformer

    import segjax

    network = Segformer(num_classes=work.num_classes).eval()
    weights = segjax.to_torch(pair(work)[0])
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()})

    class Logits(torch.nn.Module):
        """The network with the output of the references, logits and taps."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images), {}

    return _torch(work, Logits().eval())


def _torch(work: Work, network, *, channels_last: bool = False, compiled: str | None = None) -> Contender:
    """A step of a torch module.

    Args:
      work: Work of the step.
      network: Module from images (B, C, H, W) to logits (B, K, h, w) and taps.
      channels_last: Whether to use torch's memory format channels_last.
      compiled: Mode of `torch.compile`, or None.
    """
    import torch
    import torch.nn.functional as F

    from segjax.benchmark.training import LR, WEIGHT_DECAY
    from segjax.torch_reference import verify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    # XLA also chooses its convolutions by timing them.
    torch.backends.cudnn.benchmark = True
    images = verify.to_nchw(work.images()).to(device)
    labels = torch.from_numpy(work.labels()).long().to(device)
    network.to(device).train(work.mode == "train")
    if channels_last:
        network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    model = pair(work)[0]
    extra = [torch.from_numpy(array).to(device) for array in verify.bases_for(model, work.batch)]
    half = torch.autocast(device.type, torch.bfloat16, enabled=work.dtype == "bfloat16")
    forward = torch.compile(network, mode=compiled) if compiled else network

    def loss_of(logits):
        size, align_corners = labels.shape[1:], model.align_corners
        upsampled = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=align_corners)
        return F.cross_entropy(upsampled, labels, ignore_index=255)

    def infer():
        if compiled:
            # A CUDA graph may overwrite the result of the last step.
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode(), half:
            return forward(images, *extra)[0]

    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=on_gpu)

    def train():
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with half:
            logits, taps = forward(images, *extra)
        loss = loss_of(logits)
        if "aux_logits" in taps:
            loss = loss + 0.4 * loss_of(taps["aux_logits"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def wait(_):
        if on_gpu:
            torch.cuda.synchronize()

    run = repeated(train if work.mode == "train" else infer, wait, each=not on_gpu)
    since = time.perf_counter()
    first = run()
    outcome = first.cpu().numpy() if work.mode == "train" else verify.to_nhwc(first.float().cpu())
    seconds = time.perf_counter() - since
    if not on_gpu:
        return Contender(run, outcome, seconds, None)
    # These steps record CUDA graphs, if there are any.
    run(3)
    torch.cuda.reset_peak_memory_stats()
    run()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = (*network.parameters(), *network.buffers(), *moments, *extra, images, labels)
    memory = torch.cuda.max_memory_allocated() - sum(tensor.nbytes for tensor in held if tensor.is_cuda)
    return Contender(run, outcome, seconds, memory)


def _with_sdpa(network):
    import torch.nn.functional as F

    from segjax.torch_reference.segformer import EfficientSelfAttention, to_image, to_tokens

    def forward(self, tokens, H, W):
        B, N, C = tokens.shape
        reduced = tokens
        if self.sr_ratio > 1:
            reduced = self.norm(to_tokens(self.sr(to_image(tokens, H, W)))[0])
        heads = map(self.split_heads, (self.q(tokens), *self.kv(reduced).split(C, dim=-1)))
        context = F.scaled_dot_product_attention(*heads)
        return self.proj(context.transpose(1, 2).reshape(B, N, C))

    for module in network.modules():
        if isinstance(module, EfficientSelfAttention):
            module.forward = MethodType(forward, module)
    return network


def _with_fused_decoder(network):
    """Merges each level's two products of the official decoder into one, at the level's own resolution."""
    import torch
    import torch.nn.functional as F

    def forward(self, features):
        size = features[0].shape[2:]
        levels = (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)
        slices = self.linear_fuse.conv.weight[:, :, 0, 0].chunk(4, dim=1)
        total = 0
        for feature, level, fuse in zip(reversed(features), levels, slices, strict=True):
            kernel, bias = fuse @ level.proj.weight, fuse @ level.proj.bias
            x = F.conv2d(feature, kernel[:, :, None, None], bias)
            total = total + F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return self.linear_pred(self.dropout(torch.relu(self.linear_fuse.bn(total))))

    network.decode_head.forward = MethodType(forward, network.decode_head)
    return network


CONTENDERS = {
    "segjax": ours,
    "torch": torch_eager,
    "torch-channels-last": torch_channels_last,
    "torch-compile": torch_compile,
    "torch-compile-max-autotune": torch_compile_max_autotune,
    "torch-sdpa": torch_sdpa,
    "torch-fused": torch_fused,
    "torch-fused-compile": torch_fused_compile,
    "transformers": of_transformers,
    "segformer-pytorch": of_segformer_pytorch,
}
# Prefix of the names of the models that a contender supports; others support all models.
ONLY = {
    "torch-sdpa": "segformer_b",
    "torch-fused": "segformer_b",
    "torch-fused-compile": "segformer_b",
    "transformers": "segformer_b",
    "segformer-pytorch": "segformer_simple",
}


# Contenders that are faster only on a GPU and take minutes to compile. On a CPU they are timed only if named.
FOR_GPUS = ("torch-compile-max-autotune",)


def rivals(model: str) -> list[str]:
    """Names of the contenders that support a model."""
    return [name for name in CONTENDERS if name != "segjax" and model.startswith(ONLY.get(name, ""))]


def chosen(model: str, against: Sequence[str] | None, *, on_gpu: bool) -> list[str]:
    """Names of the contenders to compare with: those in `against`, or by default all that suit the machine."""
    return [name for name in rivals(model) if (name in against if against else on_gpu or name not in FOR_GPUS)]

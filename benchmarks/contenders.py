"""Who is timed: our model and the PyTorch ones, on the same weights and the same input."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import numpy as np

LR, WEIGHT_DECAY = 6e-5, 0.01


class Work(NamedTuple):
    """What a step is.

    Attributes:
      mode: "infer", images to logits; or "train": forward, loss at the labels' resolution, backward, AdamW.
      dtype: "float32", or "bfloat16" (torch: autocast).
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
        """Train ids (B, H, W), uint8, in patches, a tenth of them ignored."""
        rng = np.random.default_rng(self.seed + 1)
        height, width = self.size
        coarse = rng.integers(0, self.num_classes, (self.batch, -(-height // 16), -(-width // 16))).astype(np.uint8)
        coarse[rng.random(coarse.shape) < 0.1] = 255
        return coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]


class Contender(NamedTuple):
    """A step that is ready to be timed.

    Attributes:
      run: does one step and waits for its end.
      outcome: of the first step: logits (B, h, w, K), or the loss.
      compile_seconds: how long it took to make ready, the first step included.
      memory: bytes that a step takes beside weights and input, where the device tells; else None.
    """

    run: Callable[[], object]
    outcome: np.ndarray
    compile_seconds: float
    memory: int | None


def pair(work: Work):
    """Our model and its reference, nothing random in either, with the same weights."""
    from parity import compare
    from segjax import models

    settings = models.settings(work.model)
    still = {key: 0.0 for key in ("drop_path_rate", "dropout_rate") if key in settings}
    return compare.randomised_pair(work.model, num_classes=work.num_classes, seed=work.seed, dtype="float32", **still)


def ours(work: Work) -> Contender:
    """Ours, as `train.py` and `segjax.evaluate` run it."""
    import jax.numpy as jnp

    import segjax
    from parity import compare
    from segjax.models.segnext import Hamburger

    model, _ = pair(work)
    if work.dtype == "bfloat16":
        overrides = dict(model.spec.overrides)
        model = segjax.from_torch(
            segjax.to_torch(model), name=work.model, num_classes=work.num_classes, dtype=jnp.bfloat16, **overrides
        )
    bases = compare.bases_for(model, work.batch)
    if bases:
        # Training draws bases at every step; both sides are given the same, so that their losses can be compared.
        Hamburger.bases_for = lambda self, x: jnp.asarray(bases[0], x.dtype)
    make = _our_training if work.mode == "train" else _our_inference
    return make(work, model)


def _our_inference(work: Work, model) -> Contender:
    import jax

    from segjax import runtime
    from segjax.state import Skeleton

    skeleton = Skeleton(model)
    arrays = jax.device_put(skeleton.arrays())
    images = jax.device_put(work.images())

    def forward(params, batch_stats, images):
        return skeleton.bind(params, batch_stats)(images)[0]

    since = time.perf_counter()
    options = runtime.compiler_options(jax.default_backend())
    program = jax.jit(forward, compiler_options=options).lower(*arrays, images).compile()
    outcome = np.asarray(program(*arrays, images))
    seconds = time.perf_counter() - since
    return Contender(
        lambda: program(*arrays, images).block_until_ready(),
        outcome,
        seconds,
        program.memory_analysis().temp_size_in_bytes,
    )


def _our_training(work: Work, model) -> Contender:
    import jax
    import jax.numpy as jnp

    from configs import common
    from segjax import losses, optim
    from segjax.state import Skeleton, TrainState
    from segjax.step import Parallel, TrainStep

    config = common.get_config("folder")
    config.optim.update(lr=LR, weight_decay=WEIGHT_DECAY, no_decay="", warmup_steps=0, lr_multipliers=())
    parallel, skeleton = Parallel("jit", jax.devices()[:1]), Skeleton(model)
    params, batch_stats = skeleton.arrays()
    optimizer = optim.optimizer(config.optim, params, steps=10**9)
    step = TrainStep(
        skeleton=skeleton,
        optimizer=optimizer,
        augment=lambda _, batch: (batch["image"], batch["label"]),
        criterion=losses.criterion(config.loss, num_classes=work.num_classes, ignore_label=255),
        aux_weight=config.loss.aux_weight,
    )
    state = TrainState.start(params, batch_stats, optimizer.init(params))
    state = parallel.replicate(jax.tree.map(jnp.copy, state))
    batch = {"image": work.images(), "label": work.labels(), "position": np.arange(work.batch, dtype=np.int32)}
    batch, key = jax.device_put(batch), jax.random.key(0)
    since = time.perf_counter()
    program = parallel.compile_train(step).lower(state, batch, key).compile()
    state, scalars = program(state, batch, key)
    outcome = np.asarray(scalars["loss"])
    seconds = time.perf_counter() - since

    def run():
        nonlocal state
        state, scalars = program(state, batch, key)
        return scalars["loss"].block_until_ready()

    return Contender(run, outcome, seconds, program.memory_analysis().temp_size_in_bytes)


# ------------------------------------------------------------------------------------------------------------- PyTorch


def torch_eager(work: Work) -> Contender:
    return _torch(work, pair(work)[1])


def torch_channels_last(work: Work) -> Contender:
    return _torch(work, pair(work)[1], channels_last=True)


def torch_compile(work: Work) -> Contender:
    return _torch(work, pair(work)[1], compiled=True)


def torch_sdpa(work: Work) -> Contender:
    """With PyTorch's own scaled_dot_product_attention."""
    return _torch(work, _with_sdpa(pair(work)[1]))


def torch_fused(work: Work) -> Contender:
    """With our order of the decoder's products, and scaled_dot_product_attention."""
    return _torch(work, _with_fused_decoder(_with_sdpa(pair(work)[1])))


def torch_fused_compile(work: Work) -> Contender:
    return _torch(work, _with_fused_decoder(_with_sdpa(pair(work)[1])), compiled=True)


def of_transformers(work: Work) -> Contender:
    """transformers' SegFormer as it comes."""
    import torch
    import transformers

    from segjax import record
    from segjax.files import write_file

    with tempfile.TemporaryDirectory() as folder:
        about = record.completed(record.guessed(work.num_classes))
        write_file(Path(folder) / "model", pair(work)[0], dialect="hf", about=about)
        network = transformers.SegformerForSemanticSegmentation.from_pretrained(Path(folder) / "model")
    for module in network.modules():
        for rate in ("p", "drop_prob"):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)

    class Logits(torch.nn.Module):
        """What the references give."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images).logits, {}

    return _torch(work, Logits().eval())


def of_segformer_pytorch(work: Work) -> Contender:
    """The package on PyPI, as it comes."""
    import torch
    from segformer_pytorch import Segformer

    import segjax

    network = Segformer(num_classes=work.num_classes).eval()
    weights = segjax.to_torch(pair(work)[0])
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights.items()})

    class Logits(torch.nn.Module):
        """What the references give."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images), {}

    return _torch(work, Logits().eval())


def _torch(work: Work, network, *, channels_last: bool = False, compiled: bool = False) -> Contender:
    import torch
    import torch.nn.functional as F

    from parity import compare

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = compare.to_nchw(work.images()).to(device)
    labels = torch.from_numpy(work.labels()).long().to(device)
    network.to(device).train(work.mode == "train")
    if channels_last:
        network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    extra = [torch.from_numpy(array).to(device) for array in compare.bases_for(pair(work)[0], work.batch)]
    half = torch.autocast(device.type, torch.bfloat16, enabled=work.dtype == "bfloat16")
    forward = torch.compile(network) if compiled else network

    def loss_of(logits):
        enlarged = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(enlarged, labels, ignore_index=255)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def infer():
        with torch.inference_mode(), half:
            logits = forward(images, *extra)[0]
        wait()
        return compare.to_nhwc(logits.float().cpu())

    if work.mode == "train":
        settings = dict(lr=LR, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
        optimizer = torch.optim.AdamW(network.parameters(), **settings)

    def train():
        with half:
            logits, taps = forward(images, *extra)
        loss = loss_of(logits)
        if "aux_logits" in taps:
            loss = loss + 0.4 * loss_of(taps["aux_logits"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()
        return np.asarray(loss.item(), np.float32)

    def run():
        # As `infer`, but that its result stays where it is.
        with torch.inference_mode(), half:
            forward(images, *extra)
        wait()

    since = time.perf_counter()
    outcome = train() if work.mode == "train" else infer()
    seconds = time.perf_counter() - since
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Contender(train if work.mode == "train" else run, outcome, seconds, memory)


def _with_sdpa(network):
    import torch.nn.functional as F

    from parity.reference.segformer import EfficientSelfAttention, to_image, to_tokens

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
    """The official decoder with each level's two products as one, at the level's own resolution."""
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
    "torch-sdpa": torch_sdpa,
    "torch-fused": torch_fused,
    "torch-fused-compile": torch_fused_compile,
    "transformers": of_transformers,
    "segformer-pytorch": of_segformer_pytorch,
}
# Beginnings of the names of models that a contender stands for; the others stand for all.
ONLY = {
    "torch-sdpa": "segformer_b",
    "torch-fused": "segformer_b",
    "torch-fused-compile": "segformer_b",
    "transformers": "segformer_b",
    "segformer-pytorch": "segformer_simple",
}


def rivals(model: str) -> list[str]:
    """Whom a model of ours can be timed against."""
    return [name for name in CONTENDERS if name != "segjax" and model.startswith(ONLY.get(name, ""))]

"""The tables of models, sizes and rivals that are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Few are enough on a card that nobody else uses, and time on it is scarce.
ROUNDS_ON_A_GPU = 7


class Row(NamedTuple):
    """One comparison of a table.

    Attributes:
      mode: "infer" or "train".
      batch: images of a step; on a GPU, the largest batch that is tried.
      size: (height, width) of the images, pixels.
      against: names of the contenders to compare with; all that exist for the model if empty.
    """

    model: str
    mode: str
    batch: int
    size: tuple[int, int]
    against: tuple[str, ...] = ()


TABLE = (
    *(Row(model, "infer", 1, (512, 512)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *(Row(model, "infer", 1, (512, 512)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
    *(Row(model, "train", 2, (256, 256)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *(Row(model, "train", 2, (256, 256)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
)


def _gpu_rows(models: Sequence[str], side: int, against: Sequence[str]) -> Iterator[Row]:
    """For each model training, inference of a batch and of one image, all of them `side` pixels square.

    Batches shrink as images grow, and by another half for the largest model.
    """
    for model in models:
        parts = (side // 512) ** 2 * (2 if model == "segformer_b5" else 1)
        for mode, batch in (("train", 64 // parts), ("infer", 32 // parts), ("infer", 1)):
            yield Row(model, mode, batch, (side, side), tuple(against))


_FIRST, _SECOND = ("segformer_b0", "segnext_t", "hrnet_w48"), ("segformer_b2", "segformer_b5", "segnext_b")
_RIVALS, _SLOW_RIVALS = ("torch", "torch-channels-last", "torch-compile"), ("torch-compile-max-autotune",)
# The most important first: one model of each family, other models, larger images, and last what takes minutes to
# compile.
GPU_TABLE = (
    *_gpu_rows(_FIRST, 512, _RIVALS),
    *_gpu_rows(_SECOND, 512, _RIVALS),
    *_gpu_rows(_FIRST, 1024, _RIVALS),
    *_gpu_rows(_SECOND, 1024, _RIVALS),
    *_gpu_rows((*_FIRST, *_SECOND), 512, _SLOW_RIVALS),
)
# The sizes that people use, where a model of 512x512 may be slow; one model of each family.
_SIZED = ("segformer_b0", "hrnet_w18", "segnext_t", "segformer_simple", "segformer_zuppichini")
_INFERRED = ((360, 480), (512, 512), (640, 640), (720, 1280), (1080, 1920), (1024, 2048))
_TRAINED = ((256, 256), (512, 512), (640, 640), (512, 1024), (1024, 1024))
SIZES_TABLE = (
    *(Row(model, "infer", 1, size, ("torch", "torch-compile")) for model in _SIZED for size in _INFERRED),
    *(Row(model, "train", 1, size, ("torch",)) for model in _SIZED for size in _TRAINED),
)
TABLES = {"cpu": TABLE, "gpu": GPU_TABLE, "sizes": SIZES_TABLE}

"""The tables of models, sizes and rivals that are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Of a card that nobody else works on; the minutes are what is scarce there.
ROUNDS_ON_A_GPU = 7


class Row(NamedTuple):
    """Of a table. batch: on a GPU, the largest that is tried. against: whom the row is for; all there are, if None."""

    model: str
    mode: str
    batch: int
    size: tuple[int, int]
    against: tuple[str, ...] | None = None


TABLE = (
    *(Row(model, "infer", 1, (512, 512)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *(Row(model, "infer", 1, (512, 512)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
    *(Row(model, "train", 2, (256, 256)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *(Row(model, "train", 2, (256, 256)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
)


def _gpu_rows(models: Sequence[str], side: int, against: Sequence[str]) -> Iterator[Row]:
    """Training, inference of many images and of one, of squares: batches by pixels, half as large where models are."""
    for model in models:
        parts = (side // 512) ** 2 * (2 if model == "segformer_b5" else 1)
        for mode, batch in (("train", 64 // parts), ("infer", 32 // parts), ("infer", 1)):
            yield Row(model, mode, batch, (side, side), tuple(against))


_FIRST, _SECOND = ("segformer_b0", "segnext_t", "hrnet_w48"), ("segformer_b2", "segformer_b5", "segnext_b")
_RIVALS, _SLOW_RIVALS = ("torch", "torch-channels-last", "torch-compile"), ("torch-compile-max-autotune",)
# By importance: a family each, then its other sizes, then larger images; what takes minutes to compile comes last.
GPU_TABLE = (
    *_gpu_rows(_FIRST, 512, _RIVALS),
    *_gpu_rows(_SECOND, 512, _RIVALS),
    *_gpu_rows(_FIRST, 1024, _RIVALS),
    *_gpu_rows(_SECOND, 1024, _RIVALS),
    *_gpu_rows((*_FIRST, *_SECOND), 512, _SLOW_RIVALS),
)
TABLES = {"cpu": TABLE, "gpu": GPU_TABLE}

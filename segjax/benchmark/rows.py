"""The benchmark's tables of models, sizes and rivals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# A few rounds are enough on an otherwise idle GPU, whose time is scarce.
ROUNDS_ON_A_GPU = 7


class Row(NamedTuple):
    """One comparison of a table.

    Attributes:
      model: Key of `models.MODELS`.
      mode: "infer" or "train".
      batch: Number of images per step; on a GPU, the largest batch to try.
      size: (height, width) of the images in pixels.
      against: Names of the contenders to compare with; if empty, all for the model.
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
    """For each model: training, inference of a batch and inference of one image, with square images of `side` pixels.

    Batches shrink as images grow, and the largest model has half the batch.
    """
    for model in models:
        parts = (side // 512) ** 2 * (2 if model == "segformer_b5" else 1)
        for mode, batch in (("train", 64 // parts), ("infer", 32 // parts), ("infer", 1)):
            yield Row(model, mode, batch, (side, side), tuple(against))


_FIRST, _SECOND = ("segformer_b0", "segnext_t", "hrnet_w48"), ("segformer_b2", "segformer_b5", "segnext_b")
_RIVALS, _SLOW_RIVALS = ("torch", "torch-channels-last", "torch-compile"), ("torch-compile-max-autotune",)
# In order of importance: one model of each family, other models, larger images, and contenders that take minutes to
# compile.
GPU_TABLE = (
    *_gpu_rows(_FIRST, 512, _RIVALS),
    *_gpu_rows(_SECOND, 512, _RIVALS),
    *_gpu_rows(_FIRST, 1024, _RIVALS),
    *_gpu_rows(_SECOND, 1024, _RIVALS),
    *_gpu_rows((*_FIRST, *_SECOND), 512, _SLOW_RIVALS),
)
# The sizes that people use, where a model of 512x512 may be slow; one model of each family. Those of the models that
# take only multiples of a number are rounded up to it, as prediction pads images.
_SIZED = {"segformer_b0": 1, "hrnet_w18": 1, "segnext_t": 1, "segformer_simple": 32, "segformer_zuppichini": 32}
_INFERRED = ((360, 480), (512, 512), (640, 640), (720, 1280), (1080, 1920), (1024, 2048))
_TRAINED = ((256, 256), (512, 512), (640, 640), (512, 1024), (1024, 1024))


def _sized(mode: str, sizes: Sequence[tuple[int, int]], against: tuple[str, ...]) -> Iterator[Row]:
    for model, multiple in _SIZED.items():
        for height, width in sizes:
            yield Row(model, mode, 1, (height + -height % multiple, width + -width % multiple), against)


SIZES_TABLE = (*_sized("infer", _INFERRED, ("torch", "torch-compile")), *_sized("train", _TRAINED, ("torch",)))
TABLES = {"cpu": TABLE, "gpu": GPU_TABLE, "sizes": SIZES_TABLE}

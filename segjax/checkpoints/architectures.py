"""The families of models, and functions that read their sizes from the keys and shapes of a state dict."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from segjax import models

Shapes = Mapping[str, tuple[int, ...]]


class MissingKeyError(KeyError):
    """A key that is needed to read the sizes is missing."""


class UnreadableShapeError(ValueError):
    """The array of a key that is needed to read the sizes lacks an axis, or has an empty one."""


class _Reader(dict):
    """Shapes by native key; a missing key raises `MissingKeyError`."""

    asked: str = ""

    def __getitem__(self, key: str) -> tuple[int, ...]:
        self.asked = key
        shape = super().__getitem__(key)
        if 0 in shape:
            raise UnreadableShapeError(key)
        return shape

    def __missing__(self, key: str):
        raise MissingKeyError(key)

    def has(self, prefix: str) -> bool:
        """Whether any key has this prefix. A layer that lacks a tensor counts, so that errors name the tensor."""
        return any(key.startswith(prefix) for key in self)

    def blocks(self, pattern: str) -> int:
        """Number of blocks, numbered from zero at `{}` in the pattern; the first block must have the key."""
        number = 1 if self[pattern.format(0)] else 0
        while self.has(f"{pattern.partition('{}')[0]}{number}."):
            number += 1
        return number


def _ratio(hidden: int, dim: int) -> float:
    return hidden // dim if hidden % dim == 0 else hidden / dim


def _reduction(shapes: _Reader, block: str) -> int:
    reduces = shapes.has(f"{block}.attn.sr.") or shapes.has(f"{block}.attn.norm.")
    return shapes[f"{block}.attn.sr.weight"][-1] if reduces else 1


def _mit(shapes: _Reader) -> dict[str, Any]:
    dims = tuple(shapes[f"backbone.patch_embed{s}.proj.weight"][0] for s in range(1, 5))
    blocks = [f"backbone.block{s}.0" for s in range(1, 5)]
    hidden = [shapes[f"{block}.mlp.fc1.weight"][0] for block in blocks]
    return {
        "dims": dims,
        "depths": tuple(shapes.blocks(f"backbone.block{s}.{{}}.norm1.weight") for s in range(1, 5)),
        "mlp_ratios": tuple(map(_ratio, hidden, dims)),
        "sr_ratios": tuple(_reduction(shapes, block) for block in blocks),
    }


def _official_head(shapes: _Reader) -> dict[str, Any]:
    return {
        "decoder_dim": shapes["decode_head.linear_c1.proj.weight"][0],
        "num_classes": shapes["decode_head.linear_pred.weight"][0],
    }


def _plain_head(shapes: _Reader) -> dict[str, Any]:
    normalised = shapes.has("decode_head.linear_fuse_bn.")
    return _official_head(shapes) | {"fuse": "conv_bn" if normalised else "conv"}


def _mmseg_head(shapes: _Reader) -> dict[str, Any]:
    return {
        "decoder_dim": shapes["decode_head.convs.0.conv.weight"][0],
        "num_classes": shapes["decode_head.conv_seg.weight"][0],
    }


def _simple(shapes: _Reader) -> dict[str, Any]:
    dims = tuple(shapes[f"mit.stages.{s}.1.weight"][0] for s in range(4))
    blocks = [f"mit.stages.{s}.2.0" for s in range(4)]
    hidden = [shapes[f"{block}.1.fn.net.0.weight"][0] for block in blocks]
    return {
        "dims": dims,
        "depths": tuple(shapes.blocks(f"mit.stages.{s}.2.{{}}.0.fn.to_q.weight") for s in range(4)),
        "mlp_ratios": tuple(map(_ratio, hidden, dims)),
        "sr_ratios": tuple(shapes[f"{block}.0.fn.to_kv.weight"][-1] for block in blocks),
    }


def _simple_head(shapes: _Reader) -> dict[str, Any]:
    return {
        "decoder_dim": shapes["to_fused.0.0.weight"][0],
        "num_classes": shapes["to_segmentation.1.weight"][0],
    }


def _zuppichini(shapes: _Reader) -> dict[str, Any]:
    dims = tuple(shapes[f"encoder.stages.{s}.norm.weight"][0] for s in range(4))
    blocks = [f"encoder.stages.{s}.blocks.0" for s in range(4)]
    hidden = [shapes[f"{block}.1.fn.1.1.weight"][0] for block in blocks]
    return {
        "dims": dims,
        "depths": tuple(shapes.blocks(f"encoder.stages.{s}.blocks.{{}}.0.fn.0.weight") for s in range(4)),
        "mlp_ratios": tuple(map(_ratio, hidden, dims)),
        "sr_ratios": tuple(shapes[f"{block}.0.fn.1.reducer.0.weight"][-1] for block in blocks),
    }


def _zuppichini_head(shapes: _Reader) -> dict[str, Any]:
    return {"decoder_dim": shapes["head.predict.weight"][1], "num_classes": shapes["head.predict.weight"][0]}


def _hrnet(shapes: _Reader) -> dict[str, Any]:
    return {
        "width": shapes["stage2.0.branches.0.0.conv1.weight"][0],
        "stage1_channels": shapes["layer1.0.conv1.weight"][0],
        "stage_modules": (1, *(shapes.blocks(f"stage{s}.{{}}.branches.0.0.conv1.weight") for s in (2, 3, 4))),
        "stage_blocks": (
            shapes.blocks("layer1.{}.conv1.weight"),
            *(shapes.blocks(f"stage{s}.0.branches.0.{{}}.conv1.weight") for s in (2, 3, 4)),
        ),
    }


def _hrnet_head(shapes: _Reader) -> dict[str, Any]:
    return {"num_classes": shapes["last_layer.3.weight"][0]}


def _ocr_heads(shapes: _Reader) -> dict[str, Any]:
    return {
        "ocr_channels": shapes["conv3x3_ocr.0.weight"][0],
        "ocr_key_channels": shapes["ocr_distri_head.object_context_block.f_down.0.weight"][0],
        "num_classes": shapes["cls_head.weight"][0],
    }


def _mscan(shapes: _Reader) -> dict[str, Any]:
    dims = tuple(shapes[f"backbone.norm{s}.weight"][0] for s in range(1, 5))
    hidden = [shapes[f"backbone.block{s}.0.mlp.fc1.weight"][0] for s in range(1, 5)]
    return {
        "dims": dims,
        "depths": tuple(shapes.blocks(f"backbone.block{s}.{{}}.norm1.weight") for s in range(1, 5)),
        "mlp_ratios": tuple(map(_ratio, hidden, dims)),
    }


def _ham_head(shapes: _Reader) -> dict[str, Any]:
    return {
        "ham_channels": shapes["decode_head.squeeze.conv.weight"][0],
        "num_classes": shapes["decode_head.conv_seg.weight"][0],
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share one constructor.

    Attributes:
      title: Name of the family, for messages.
      names: Names of its models in `segjax.MODELS`.
      head: Patterns of the native keys outside the encoder.
      stem: Native key of the first convolution's weight, (out, C, h, w), or (out, C * pixels, 1, 1) for patches.
      stem_pixels: Number of pixels of a patch; 1 without patches.
      read_encoder, read_head: Functions that read sizes from shapes by native key.
    """

    title: str
    names: tuple[str, ...]
    head: tuple[str, ...]
    stem: str
    stem_pixels: int
    read_encoder: Callable[[_Reader], dict[str, Any]]
    read_head: Callable[[_Reader], dict[str, Any]]

    def read(self, shapes: Shapes) -> tuple[dict[str, Any], int | None]:
        """Reads the settings of a model, and its number of classes (None without a head), from shapes by native key.

        Raises:
          MissingKeyError: A needed key is missing.
          UnreadableShapeError: The array of a needed key lacks an axis, or has an empty one.
        """
        reader = _Reader(shapes)
        try:
            sizes = self.read_encoder(reader) | self._channels(shapes)
            if not any(map(self.in_head, shapes)):
                return sizes, None
            sizes |= self.read_head(reader)
        except IndexError:
            raise UnreadableShapeError(reader.asked) from None
        return sizes, sizes.pop("num_classes")

    def _channels(self, shapes: Shapes) -> dict[str, int]:
        """{"in_channels": ...} of the first convolution; {} if it is missing or misshapen, which loading reports."""
        inputs = (*shapes.get(self.stem, ()), 0, 0)[1]
        return {} if not inputs or inputs % self.stem_pixels else {"in_channels": inputs // self.stem_pixels}

    def in_head(self, key: str) -> bool:
        return matches(key, self.head)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key matches one of several shell-style patterns."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _family(
    title: str, names: str, head: tuple[str, ...], stem: str, read_encoder, read_head, *, stem_pixels: int = 1
) -> Family:
    named = tuple(name for name in models.MODELS if re.fullmatch(names, name))
    return Family(title, named, head, stem, stem_pixels, read_encoder, read_head)


_DECODE_HEAD = ("decode_head.*",)
_MIT_STEM = "backbone.patch_embed1.proj.weight"

FAMILIES = {
    "segformer": _family("SegFormer", r"segformer_b\d", _DECODE_HEAD, _MIT_STEM, _mit, _official_head),
    "segformer_plain": _family(
        "the SegFormer of jo-jstrm/segmentation_pytorch",
        r"segformer_plain_b\d",
        _DECODE_HEAD,
        _MIT_STEM,
        _mit,
        _plain_head,
    ),
    "segformer_mmseg": _family(
        "the SegFormer of mmsegmentation", r"segformer_mmseg_b\d", _DECODE_HEAD, _MIT_STEM, _mit, _mmseg_head
    ),
    "segformer_simple": _family(
        "the simple SegFormer",
        "segformer_simple",
        ("to_fused.*", "to_segmentation.*"),
        "mit.stages.0.1.weight",
        _simple,
        _simple_head,
        stem_pixels=49,
    ),
    "segformer_zuppichini": _family(
        "the SegFormer of F. Zuppichini's article",
        "segformer_zuppichini",
        ("decoder.*", "head.*"),
        "encoder.stages.0.overlap_patch_merge.0.weight",
        _zuppichini,
        _zuppichini_head,
    ),
    "hrnet": _family("HRNet", r"hrnet_w\d+", ("last_layer.*",), "conv1.weight", _hrnet, _hrnet_head),
    "hrnet_ocr": _family(
        "HRNet with OCR",
        r"hrnet_w\d+_ocr",
        ("conv3x3_ocr.*", "ocr_distri_head.*", "cls_head.*", "aux_head.*"),
        "conv1.weight",
        _hrnet,
        _ocr_heads,
    ),
    "segnext": _family(
        "SegNeXt", r"segnext_\w", _DECODE_HEAD, "backbone.patch_embed1.proj.0.weight", _mscan, _ham_head
    ),
}


def family_of(name: str) -> str:
    """The key in `FAMILIES` of a name in `segjax.MODELS`."""
    return next(key for key, family in FAMILIES.items() if name in family.names)


# Settings of the encoder in which the variants of a family differ.
ENCODER_SIZES = ("dims", "depths", "width", "stage_modules", "stage_blocks")
# Settings that do not follow from an encoder. HRNet's align_corners is one: the encoder uses it too, but with the
# value with which the decoder was trained.
DECODER_SETTINGS = (
    "decoder_dim",
    "fuse",
    "ham_channels",
    "ham_rank",
    "ocr_channels",
    "ocr_key_channels",
    "align_corners",
)


def nearest_variant(family: Family, sizes: Mapping[str, Any]) -> str:
    """The model of a family with the most equal sizes, first in the encoder; of several, the first in the family."""

    def fit(name: str) -> tuple[int, int]:
        settings = models.settings(name)
        agreeing = [key for key, value in sizes.items() if settings[key] == value]
        return sum(key in ENCODER_SIZES for key in agreeing), len(agreeing)

    return max(family.names, key=fit)

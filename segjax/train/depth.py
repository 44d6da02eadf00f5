"""The depth of each parameter, for learning rates that decay with the distance from the head.

As in BEiT (Bao et al., 2022) and ConvNeXt (Liu et al., 2022), the stem has depth 0, blocks count from 1, and the head
is one deeper than the last block:

- All SegFormer families, and SegNeXt: the stem is the first patch embedding; blocks count through the stages. The
  patch embedding of a later stage has the depth of the stage's first block, the norm of a stage that of its last block.
- HRNet, with and without OCR: the stem is the first two convolutions; the blocks of layer1 and of the modules of the
  stages follow each other. Parallel branches have the same depths. A transition has the depth of the first block after
  it, the fusion of a module that of the module's last block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Patterns of names, without the head's. The groups are stage, module and block; a name without a block belongs to the
# first or the last block of its stage or module.
_BLOCKS = (
    r"backbone\.block(?P<stage>\d+)\.(?P<block>\d+)\.",
    r"mit\.stages\.(?P<stage>\d+)\.2\.(?P<block>\d+)\.",
    r"encoder\.stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.",
    r"layer(?P<stage>1)\.(?P<block>\d+)\.",
    r"stage(?P<stage>\d+)\.(?P<module>\d+)\.branches\.\d+\.(?P<block>\d+)\.",
)
_BEFORE_BLOCKS = (
    r"backbone\.patch_embed(?P<stage>\d+)\.",
    r"mit\.stages\.(?P<stage>\d+)\.1\.",
    r"encoder\.stages\.(?P<stage>\d+)\.overlap_patch_merge\.",
)
_AFTER_BLOCKS = (
    r"backbone\.norm(?P<stage>\d+)\.",
    r"encoder\.stages\.(?P<stage>\d+)\.norm\.",
    r"stage(?P<stage>\d+)\.(?P<module>\d+)\.fuse_layers\.",
)
_STEM = (r"(conv|bn)[12]\.",)
# transition1 leads to stage2.
_TRANSITION = (r"transition(?P<stage>\d+)\.",)
_ENCODERS = r"(backbone|mit|encoder|transition\d|stage\d|layer\d)\."


def depths(names: Iterable[str]) -> dict[str, int]:
    """The depth of each parameter by dotted name: 0 in the stem, the number of blocks + 1 in the head.

    Raises:
      ValueError: Names of a model whose depths are not known.
    """
    names = list(names)
    blocks = sorted({place for name in names if (place := _place(name, _BLOCKS)) is not None})
    if not blocks:
        raise ValueError(f"optim.layer_decay: the depths of a model with parameters like {names[0]!r} are not known")
    # Branches of a module may have different numbers of blocks.
    number = {place: depth for depth, place in enumerate(blocks, start=1)}
    first_stage = blocks[0][0]
    return {name: _depth(name, number, first_stage) for name in names}


def _depth(name: str, number: dict[tuple[int, int, int], int], first_stage: int) -> int:
    if (place := _place(name, _BLOCKS)) is not None:
        return number[place]
    if (place := _place(name, _BEFORE_BLOCKS)) is not None:
        stage = place[0]
        return 0 if stage == first_stage else min(depth for at, depth in number.items() if at[0] == stage)
    if (place := _place(name, _AFTER_BLOCKS)) is not None:
        return max(depth for at, depth in number.items() if at[:2] == place[:2])
    if (place := _place(name, _TRANSITION)) is not None:
        return min(depth for at, depth in number.items() if at[0] == place[0] + 1)
    if any(re.match(pattern, name) for pattern in _STEM):
        return 0
    if re.match(_ENCODERS, name):
        raise ValueError(f"optim.layer_decay: the depth of the parameter {name!r} is not known")
    return len(number) + 1


def _place(name: str, patterns: Iterable[str]) -> tuple[int, int, int] | None:
    """Stage, module and block of a name that begins with one of the patterns; 0 for a group that it lacks."""
    for pattern in patterns:
        if match := re.match(pattern, name):
            found = match.groupdict()
            return int(found["stage"]), int(found.get("module") or 0), int(found.get("block") or 0)
    return None

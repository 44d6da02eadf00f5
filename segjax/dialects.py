"""How other packages name the same weights: tables of renames and merges onto the native names, both ways.

A *naming* is a list of rules. A rule pairs a native module name with a foreign one, everything after it (`.weight`,
`.running_var`, ...) stays. In a name `{s}` is the stage 1..4, `{z}` the stage from zero, `{r}` the stage from the deep
end from zero, `{b}` the number of a block. Where the foreign side is a tuple, its tensors stacked along the first axis
make up the native one. A *dialect* is one package's naming, with the older ones it also reads and what it
leaves unsaid in its files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

BATCH_COUNTER = "num_batches_tracked"

# SegFormer. Native is what NVlabs publishes, and the attribute path of our modules.
_MIT = (
    ("patch_embed{s}.proj", "patch_embeddings.{z}.proj", "stages.{z}.patch_embeddings.proj"),
    ("patch_embed{s}.norm", "patch_embeddings.{z}.layer_norm", "stages.{z}.patch_embeddings.layer_norm"),
    ("block{s}.{b}.norm1", "block.{z}.{b}.layer_norm_1", "stages.{z}.blocks.{b}.layernorm_before"),
    ("block{s}.{b}.attn.q", "block.{z}.{b}.attention.self.query", "stages.{z}.blocks.{b}.attention.q_proj"),
    (
        "block{s}.{b}.attn.kv",
        ("block.{z}.{b}.attention.self.key", "block.{z}.{b}.attention.self.value"),
        ("stages.{z}.blocks.{b}.attention.k_proj", "stages.{z}.blocks.{b}.attention.v_proj"),
    ),
    (
        "block{s}.{b}.attn.sr",
        "block.{z}.{b}.attention.self.sr",
        "stages.{z}.blocks.{b}.attention.sequence_reduction.sequence_reduction",
    ),
    (
        "block{s}.{b}.attn.norm",
        "block.{z}.{b}.attention.self.layer_norm",
        "stages.{z}.blocks.{b}.attention.sequence_reduction.layer_norm",
    ),
    ("block{s}.{b}.attn.proj", "block.{z}.{b}.attention.output.dense", "stages.{z}.blocks.{b}.attention.o_proj"),
    ("block{s}.{b}.norm2", "block.{z}.{b}.layer_norm_2", "stages.{z}.blocks.{b}.layernorm_after"),
    ("block{s}.{b}.mlp.fc1", "block.{z}.{b}.mlp.dense1", "stages.{z}.blocks.{b}.mlp.fc1"),
    ("block{s}.{b}.mlp.dwconv.dwconv", "block.{z}.{b}.mlp.dwconv.dwconv", "stages.{z}.blocks.{b}.mlp.dwconv.dwconv"),
    ("block{s}.{b}.mlp.fc2", "block.{z}.{b}.mlp.dense2", "stages.{z}.blocks.{b}.mlp.fc2"),
    ("norm{s}", "layer_norm.{z}", "stages.{z}.layer_norm"),
)
# (native, transformers on disk, transformers v5 in memory, smp)
_HEAD = (
    ("linear_c{s}.proj", "linear_c.{z}.proj", "linear_projections.{z}.proj", "decoder.mlp_stage.{r}.linear"),
    ("linear_fuse.conv", "linear_fuse", "linear_fuse", "decoder.fuse_stage.0"),
    ("linear_fuse.bn", "batch_norm", "batch_norm", "decoder.fuse_stage.1"),
    ("linear_pred", "classifier", "classifier", "segmentation_head.0"),
)


def _prefixed(prefix: str, names):
    return tuple(prefix + name for name in names) if isinstance(names, tuple) else prefix + names


def _segformer(encoder: tuple[str, int], head: tuple[str, int]) -> tuple:
    """Rules from a prefix and a column of `_MIT`, and a prefix and a column of `_HEAD`."""
    (encoder_prefix, mit), (head_prefix, column) = encoder, head
    rules = [("backbone." + row[0], _prefixed(encoder_prefix, row[mit])) for row in _MIT]
    return tuple(rules + [("decode_head." + row[0], _prefixed(head_prefix, row[column])) for row in _HEAD])


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One package's way of writing a family of models.

    Attributes:
      name: as in `--dialect`.
      package: for messages.
      namings: rules; the first is the one that is written, all are read.
      unused: patterns of keys that the package writes but its model never reads, dropped without being asked.
      backbone_extras: patterns of keys that come with a backbone alone (an ImageNet classifier).
      settings: what the published model has that its checkpoint cannot tell, setting -> value.
    """

    name: str
    package: str
    namings: tuple[tuple, ...]
    unused: tuple[str, ...]
    backbone_extras: tuple[str, ...]
    settings: tuple[tuple[str, object], ...]


# Published for every MiT, in every package.
_MIT_HEADS = ("num_heads", (1, 2, 5, 8))

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="native",
            package="NVlabs SegFormer",
            namings=(
                _segformer(("backbone.", 0), ("decode_head.", 0)),
                # A backbone as published on its own: the same names without a prefix.
                _segformer(("", 0), ("decode_head.", 0)),
            ),
            unused=("decode_head.conv_seg.*",),
            backbone_extras=("head.*",),
            settings=(_MIT_HEADS, ("block_norm_eps", 1e-6), ("patch_norm_eps", 1e-5)),
        ),
        Dialect(
            name="hf",
            package="transformers",
            namings=(
                _segformer(("segformer.encoder.", 1), ("decode_head.", 1)),
                _segformer(("segformer.", 2), ("decode_head.", 2)),
                # SegformerModel saved on its own, in both namings.
                _segformer(("encoder.", 1), ("decode_head.", 1)),
                _segformer(("", 2), ("decode_head.", 2)),
            ),
            unused=(),
            backbone_extras=("classifier.*",),
            settings=(_MIT_HEADS, ("block_norm_eps", 1e-5), ("patch_norm_eps", 1e-5)),
        ),
        Dialect(
            name="smp",
            package="segmentation-models-pytorch",
            namings=(_segformer(("encoder.", 0), ("", 3)),),
            unused=(),
            backbone_extras=(),
            settings=(_MIT_HEADS, ("block_norm_eps", 1e-6), ("patch_norm_eps", 1e-5)),
        ),
    )
}


class Renaming:
    """One naming, ready to be applied in both directions to whole state dicts."""

    def __init__(self, rules: tuple):
        self._to_foreign: list[tuple[re.Pattern, tuple[str, ...]]] = []
        self._to_native: list[tuple[re.Pattern, str, int]] = []
        for native, foreign in rules:
            for stage in range(1, 5) if "{s}" in native else (0,):
                fields = {"s": stage, "z": stage - 1, "r": 4 - stage, "b": "{b}"}
                here = native.format(**fields)
                there = tuple(n.format(**fields) for n in (foreign if isinstance(foreign, tuple) else (foreign,)))
                self._to_foreign.append((_pattern(here), there))
                for part, name in enumerate(there):
                    self._to_native.append((_pattern(name), here, part))

    def foreign_names(self, key: str) -> tuple[str, ...]:
        """Foreign keys whose tensors make up the native `key`; empty where no rule fits."""
        for pattern, names in self._to_foreign:
            if match := pattern.match(key):
                return tuple(_fill(name, match) for name in names)
        return ()

    def native_name(self, key: str) -> str | None:
        """The native key that the foreign `key` is, or is a part of; None where no rule fits."""
        for pattern, name, _ in self._to_native:
            if match := pattern.match(key):
                return _fill(name, match)
        return None

    def to_foreign(self, native: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames and splits. Raises KeyError for a native key that the dialect has no place for."""
        foreign = {}
        for key, value in native.items():
            names = self.foreign_names(key)
            if not names:
                raise KeyError(key)
            # A counter is a scalar: nothing to split, and each part has its own.
            parts = np.split(value, len(names)) if value.ndim else [value] * len(names)
            foreign.update(zip(names, parts, strict=True))
        return foreign

    def to_native(self, foreign: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames and merges; keys that no rule fits are left out, incomplete merges too."""
        native = {}
        for key in foreign:
            name = self.native_name(key)
            if name is None or name in native:
                continue
            parts = self.foreign_names(name)
            if all(part in foreign for part in parts):
                values = [foreign[part] for part in parts]
                native[name] = values[0] if len(values) == 1 else np.concatenate(values)
        return native


def _pattern(name: str) -> re.Pattern:
    """Matches `name` + "." + the tensor's own name, which holds no dot."""
    return re.compile("^" + re.escape(name).replace(re.escape("{b}"), r"(?P<b>\d+)") + r"\.(?P<tensor>\w+)$")


def _fill(name: str, match: re.Match) -> str:
    return name.replace("{b}", match.groupdict().get("b", "")) + "." + match["tensor"]


RENAMINGS = {name: tuple(Renaming(rules) for rules in dialect.namings) for name, dialect in DIALECTS.items()}


def recognise(keys, *, dialect: str = "auto") -> tuple[Dialect, Renaming, int]:
    """The dialect and naming that fit most of `keys`, and how many they fit.

    Raises:
      KeyError: an unknown dialect; lists the names.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise KeyError(f"no dialect {dialect!r}; the dialects are auto, {', '.join(DIALECTS)}")
    names = DIALECTS if dialect == "auto" else (dialect,)
    candidates = [
        (sum(renaming.native_name(key) is not None for key in keys), DIALECTS[name], renaming)
        for name in names
        for renaming in RENAMINGS[name]
    ]
    fitting, found, renaming = max(candidates, key=lambda candidate: candidate[0])
    return found, renaming, fitting

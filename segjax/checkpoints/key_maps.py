"""Key maps: tables of renames, splits and merges between the keys of each package's state dicts and the native keys.

The packages are Hugging Face's transformers, mmsegmentation, timm, segmentation-models-pytorch and others.

Native keys are the attribute paths of segjax's modules, which are the keys of the first publisher of a family. A *rule*
pairs native keys with foreign ones. Templates have these fields: `{t}` is the name of the tensor (`weight`,
`running_var`, ...), appended to a template without it; `{s}` is the stage, 1 to 4; `{z}` is the stage, 0 to 3; `{r}` is
the stage counted from the deepest, 0 to 3; `{b}` is a number; `{rest}` is any text. If one side of a rule has several
keys, their tensors are concatenated along the first axis.

A *key map* is a tuple of rules. A *key format* describes how one package (the dialect) stores one family: the key map
to write, older key maps to read, and the settings that checkpoints do not contain.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

BATCH_COUNTER = "num_batches_tracked"
# A setting that a checkpoint does not contain, and that differs between the published variants of a family.
OF_VARIANT = object()


@dataclasses.dataclass(frozen=True)
class Rule:
    """Native and foreign keys of the same tensors.

    Attributes:
      native, foreign: Templates; tensors of several templates are concatenated along the first axis.
      shares: Relative lengths of several native tensors.
      as_conv: Whether a native linear layer (out, in) is a foreign 1x1 convolution (out, in, 1, 1).
    """

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    as_conv: bool = False


def _rule(native, foreign, **settings) -> Rule:
    return Rule(_names(native), _names(foreign), **settings)


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        name if "{t}" in name or "{rest}" in name else name + ".{t}"
        for name in (names if isinstance(names, tuple) else (names,))
    )


def _prefixed(native_prefix: str, foreign_prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(
        dataclasses.replace(
            rule,
            native=tuple(native_prefix + name for name in rule.native),
            foreign=tuple(foreign_prefix + name for name in rule.foreign),
        )
        for rule in rules
    )


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(_rule(name, name) for name in names)


# -------------------------------------------------------------------------------------------------- SegFormer's encoder

_MIT = _same(
    *(
        "patch_embed{s}.proj",
        "patch_embed{s}.norm",
        "block{s}.{b}.norm1",
        "block{s}.{b}.attn.q",
        "block{s}.{b}.attn.kv",
    ),
    *("block{s}.{b}.attn.sr", "block{s}.{b}.attn.norm", "block{s}.{b}.attn.proj", "block{s}.{b}.norm2"),
    *("block{s}.{b}.mlp.fc1", "block{s}.{b}.mlp.dwconv.dwconv", "block{s}.{b}.mlp.fc2", "norm{s}"),
)
# transformers: keys in files, and keys of models in memory since version 5.
_MIT_HF = (
    _rule("patch_embed{s}.proj", "patch_embeddings.{z}.proj"),
    _rule("patch_embed{s}.norm", "patch_embeddings.{z}.layer_norm"),
    _rule("block{s}.{b}.norm1", "block.{z}.{b}.layer_norm_1"),
    _rule("block{s}.{b}.attn.q", "block.{z}.{b}.attention.self.query"),
    _rule("block{s}.{b}.attn.kv", ("block.{z}.{b}.attention.self.key", "block.{z}.{b}.attention.self.value")),
    _rule("block{s}.{b}.attn.sr", "block.{z}.{b}.attention.self.sr"),
    _rule("block{s}.{b}.attn.norm", "block.{z}.{b}.attention.self.layer_norm"),
    _rule("block{s}.{b}.attn.proj", "block.{z}.{b}.attention.output.dense"),
    _rule("block{s}.{b}.norm2", "block.{z}.{b}.layer_norm_2"),
    _rule("block{s}.{b}.mlp.fc1", "block.{z}.{b}.mlp.dense1"),
    _rule("block{s}.{b}.mlp.dwconv.dwconv", "block.{z}.{b}.mlp.dwconv.dwconv"),
    _rule("block{s}.{b}.mlp.fc2", "block.{z}.{b}.mlp.dense2"),
    _rule("norm{s}", "layer_norm.{z}"),
)
_REDUCTION = "stages.{z}.blocks.{b}.attention.sequence_reduction"
_MIT_HF5 = (
    _rule("patch_embed{s}.proj", "stages.{z}.patch_embeddings.proj"),
    _rule("patch_embed{s}.norm", "stages.{z}.patch_embeddings.layer_norm"),
    _rule("block{s}.{b}.norm1", "stages.{z}.blocks.{b}.layernorm_before"),
    _rule("block{s}.{b}.attn.q", "stages.{z}.blocks.{b}.attention.q_proj"),
    _rule("block{s}.{b}.attn.kv", ("stages.{z}.blocks.{b}.attention.k_proj", "stages.{z}.blocks.{b}.attention.v_proj")),
    _rule("block{s}.{b}.attn.sr", f"{_REDUCTION}.sequence_reduction"),
    _rule("block{s}.{b}.attn.norm", f"{_REDUCTION}.layer_norm"),
    _rule("block{s}.{b}.attn.proj", "stages.{z}.blocks.{b}.attention.o_proj"),
    _rule("block{s}.{b}.norm2", "stages.{z}.blocks.{b}.layernorm_after"),
    _rule("block{s}.{b}.mlp.fc1", "stages.{z}.blocks.{b}.mlp.fc1"),
    _rule("block{s}.{b}.mlp.dwconv.dwconv", "stages.{z}.blocks.{b}.mlp.dwconv.dwconv"),
    _rule("block{s}.{b}.mlp.fc2", "stages.{z}.blocks.{b}.mlp.fc2"),
    _rule("norm{s}", "stages.{z}.layer_norm"),
)
# mmsegmentation: torch's joint projection of queries, keys and values; linear layers of the Mix-FFN as convolutions.
_MIT_MMSEG = (
    _rule("patch_embed{s}.proj", "layers.{z}.0.projection"),
    _rule("patch_embed{s}.norm", "layers.{z}.0.norm"),
    _rule("block{s}.{b}.norm1", "layers.{z}.1.{b}.norm1"),
    _rule(("block{s}.{b}.attn.q", "block{s}.{b}.attn.kv"), "layers.{z}.1.{b}.attn.attn.in_proj_{t}", shares=(1, 2)),
    _rule("block{s}.{b}.attn.sr", "layers.{z}.1.{b}.attn.sr"),
    _rule("block{s}.{b}.attn.norm", "layers.{z}.1.{b}.attn.norm"),
    _rule("block{s}.{b}.attn.proj", "layers.{z}.1.{b}.attn.attn.out_proj"),
    _rule("block{s}.{b}.norm2", "layers.{z}.1.{b}.norm2"),
    _rule("block{s}.{b}.mlp.fc1", "layers.{z}.1.{b}.ffn.layers.0", as_conv=True),
    _rule("block{s}.{b}.mlp.dwconv.dwconv", "layers.{z}.1.{b}.ffn.layers.1"),
    _rule("block{s}.{b}.mlp.fc2", "layers.{z}.1.{b}.ffn.layers.4", as_conv=True),
    _rule("norm{s}", "layers.{z}.2"),
)

# ------------------------------------------------------------------------------------------------- SegFormer's decoders

_OFFICIAL_HEAD = _same("linear_c{s}.proj", "linear_fuse.conv", "linear_fuse.bn", "linear_pred")
_HF_HEAD = (
    _rule("linear_c{s}.proj", "linear_c.{z}.proj"),
    _rule("linear_fuse.conv", "linear_fuse"),
    _rule("linear_fuse.bn", "batch_norm"),
    _rule("linear_pred", "classifier"),
)
_HF5_HEAD = (_rule("linear_c{s}.proj", "linear_projections.{z}.proj"), *_HF_HEAD[1:])
_SMP_HEAD = (
    _rule("linear_c{s}.proj", "decoder.mlp_stage.{r}.linear"),
    _rule("linear_fuse.conv", "decoder.fuse_stage.0"),
    _rule("linear_fuse.bn", "decoder.fuse_stage.1"),
    _rule("linear_pred", "segmentation_head.0"),
)
_PLAIN_HEAD = _same("linear_c{s}.proj", "linear_fuse", "linear_fuse_bn", "linear_pred")
_MMSEG_HEAD = _same("convs.{b}.conv", "convs.{b}.bn", "fusion_conv.conv", "fusion_conv.bn", "conv_seg")


def _segformer(encoder: str, mit: tuple[Rule, ...], head: str, decoder: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of an encoder and a decoder, each with its foreign prefix."""
    return _prefixed("backbone.", encoder, mit) + _prefixed("decode_head.", head, decoder)


# ------------------------------------------------------------------------------------------------------- other families

_HRNET = _same("conv1", "bn1", "conv2", "bn2", "layer1.{rest}", "transition{b}.{rest}", "stage{b}.{rest}")
_HRNET_HEAD = _same("last_layer.{b}")
_OCR_HEADS = _same("conv3x3_ocr.{rest}", "ocr_distri_head.{rest}", "cls_head", "aux_head.{b}")
_MMSEG_FCN = (
    _rule("0", "convs.0.conv"),
    _rule("1", "convs.0.bn"),
    _rule("3", "conv_seg"),
)
_CONTEXT = "ocr_distri_head.object_context_block"


def _mmseg_projection(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (_rule(f"{_CONTEXT}.{ours}.0", f"{theirs}.conv"), _rule(f"{_CONTEXT}.{ours}.1.0", f"{theirs}.bn"))


_MMSEG_OCR = (
    *(_rule("conv3x3_ocr.0", "bottleneck.conv"), _rule("conv3x3_ocr.1", "bottleneck.bn")),
    *_mmseg_projection("f_pixel", "object_context_block.query_project.0"),
    _rule(f"{_CONTEXT}.f_pixel.2", "object_context_block.query_project.1.conv"),
    _rule(f"{_CONTEXT}.f_pixel.3.0", "object_context_block.query_project.1.bn"),
    *_mmseg_projection("f_object", "object_context_block.key_project.0"),
    _rule(f"{_CONTEXT}.f_object.2", "object_context_block.key_project.1.conv"),
    _rule(f"{_CONTEXT}.f_object.3.0", "object_context_block.key_project.1.bn"),
    *_mmseg_projection("f_down", "object_context_block.value_project"),
    *_mmseg_projection("f_up", "object_context_block.out_project"),
    _rule("ocr_distri_head.conv_bn_dropout.0", "object_context_block.bottleneck.conv"),
    _rule("ocr_distri_head.conv_bn_dropout.1.0", "object_context_block.bottleneck.bn"),
    _rule("cls_head", "conv_seg"),
)


def _mscan(dwconv: str) -> tuple[Rule, ...]:
    attention = [f"spatial_gating_unit.conv{name}" for name in ("0", "0_1", "0_2", "1_1", "1_2", "2_1", "2_2", "3")]
    return (
        *_same("patch_embed1.proj.{b}", "patch_embed{s}.proj", "patch_embed{s}.norm", "norm{s}"),
        *_same("block{s}.{b}.norm1", "block{s}.{b}.norm2", "block{s}.{b}.layer_scale_{t}"),
        *_same(*(f"block{{s}}.{{b}}.attn.{name}" for name in ("proj_1", *attention, "proj_2"))),
        *_same("block{s}.{b}.mlp.fc1", "block{s}.{b}.mlp.fc2"),
        _rule("block{s}.{b}.mlp.dwconv.dwconv", f"block{{s}}.{{b}}.mlp.{dwconv}"),
    )


_HAM = _same(
    *("squeeze.conv", "squeeze.gn", "hamburger.ham_in.conv", "hamburger.ham_out.conv", "hamburger.ham_out.gn"),
    *("align.conv", "align.gn"),
)


def _segnext(encoder: str, dwconv: str, head: str, classifier: str) -> tuple[Rule, ...]:
    decoder = (*_HAM, _rule("conv_seg", classifier))
    return _prefixed("backbone.", encoder, _mscan(dwconv)) + _prefixed("decode_head.", head, decoder)


# --------------------------------------------------------------------------------------------------------- key formats


@dataclasses.dataclass(frozen=True, eq=False)
class KeyFormat:
    """Format in which one package stores one family.

    Attributes:
      dialect: Value of `--dialect`.
      family: Key of `segjax.checkpoints.architectures.FAMILIES`.
      package: Name of the package, for messages.
      key_maps: Key maps; the first is written, all are read.
      settings: (name, value) of the settings that checkpoints do not contain, as in the published model.
      of_classes: Number of classes -> the `settings` in which the model published with this number differs.
      unused: Patterns of keys that the package writes but its model never reads; they are skipped.
      backbone_extras: Patterns of keys that accompany an encoder (an ImageNet classifier).
      without_bias: (convolution, norm) pairs: the package's convolution has no bias, because a BatchNorm follows. The
        bias is read as zero, and written by subtracting it from the running mean of the norm.
      encoder_only: Whether the package has no decoder.
      note: Difference in the package's computation with the same weights; logged with every conversion.
    """

    dialect: str
    family: str
    package: str
    key_maps: tuple[tuple[Rule, ...], ...]
    settings: tuple[tuple[str, object], ...]
    of_classes: Mapping[int, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    backbone_extras: tuple[str, ...] = ()
    without_bias: tuple[tuple[str, str], ...] = ()
    encoder_only: bool = False
    note: str = ""

    def settings_for(self, num_classes: int | None) -> dict[str, object]:
        """`settings` by name, of the model published with this number of classes (None for an encoder)."""
        return dict(self.settings) | dict(self.of_classes.get(num_classes or 0, {}))


def _eps(block: float, patch: float) -> tuple[tuple[str, object], ...]:
    # All packages publish all MiTs with the same numbers of heads.
    return (("num_heads", (1, 2, 5, 8)), ("block_norm_eps", block), ("patch_norm_eps", patch))


# Names of top-level modules that training scripts keep next to the network: loss and metrics, normalisation of the
# input, and heads that only a loss reads.
NEXT_TO_NETWORK = re.compile(
    r"(?:\w+_)?(?:criterion|criteria|loss(?:es)?|loss_fn|loss_func|metrics?|iou|miou|jaccard|accuracy|confmat|mean|std|"
    r"normali[sz]e|normali[sz]er|normali[sz]ation|data_preprocessor|preprocessor|class_weights?|auxiliary_head)(?:\.|$)"
)
_IMAGENET_HRNET = ("incre_modules.*", "downsamp_modules.*", "final_layer.*", "classifier.*")
_SEED = "jo-jstrm/segmentation_pytorch"
_MMSEG = "mmsegmentation"
_HRNET_KEYS: dict[str, Any] = dict(backbone_extras=_IMAGENET_HRNET)
# In HRNet-Semantic-Segmentation, only the configurations for ADE20K and COCO-Stuff align corners.
_HRNET_ALIGNED: dict[int, dict[str, object]] = {150: {"align_corners": True}, 171: {"align_corners": True}}


def _backbone(family: str, package: str, *key_maps: tuple[Rule, ...], settings, backbone_extras) -> KeyFormat:
    """The encoder only, as in files pretrained on ImageNet."""
    return KeyFormat(
        dialect="backbone",
        family=family,
        package=package,
        key_maps=tuple(_prefixed("backbone.", "", key_map) for key_map in key_maps),
        settings=settings,
        backbone_extras=backbone_extras,
        encoder_only=True,
    )


_RESIZED_TWICE = (
    "its HRNet resizes twice between branches, and equals that of segjax if 32 divides the sides of the image"
)


def _hrnet_encoder(family: str, *, align_corners: bool) -> tuple[KeyFormat, ...]:
    """HRNet's encoder only: timm's features, and files pretrained on ImageNet, which have the same keys."""
    kinds: dict[str, Any] = dict(
        family=family,
        key_maps=(_HRNET,),
        settings=(("align_corners", align_corners),),
        backbone_extras=_IMAGENET_HRNET,
        encoder_only=True,
    )
    nearest = "its modules upsample between branches by nearest neighbours, those of segjax bilinearly"
    return (
        KeyFormat(dialect="timm", package="timm, features of the raw branches", note=nearest, **kinds),
        KeyFormat(dialect="backbone", package="an HRNet encoder", **kinds),
    )


# Of several formats that fit a file equally well, the first is used: a MiT encoder is read as mmsegmentation's if it
# has those keys, else as the official one; that of jo-jstrm, whose keys begin alike, comes after both.
KEY_FORMATS = (
    KeyFormat(
        dialect="native",
        family="segformer",
        package="NVlabs SegFormer",
        key_maps=(_segformer("backbone.", _MIT, "decode_head.", _OFFICIAL_HEAD),),
        unused=("decode_head.conv_seg.*",),
        settings=_eps(1e-6, 1e-5),
    ),
    KeyFormat(
        dialect="hf",
        family="segformer",
        package="transformers",
        key_maps=(
            _segformer("segformer.encoder.", _MIT_HF, "decode_head.", _HF_HEAD),
            _segformer("segformer.", _MIT_HF5, "decode_head.", _HF5_HEAD),
            # SegformerModel, saved without its decoder, in both key maps.
            _segformer("encoder.", _MIT_HF, "decode_head.", _HF_HEAD),
            _segformer("", _MIT_HF5, "decode_head.", _HF5_HEAD),
        ),
        backbone_extras=("classifier.*",),
        settings=_eps(1e-5, 1e-5),
    ),
    KeyFormat(
        dialect="smp",
        family="segformer",
        package="segmentation-models-pytorch",
        key_maps=(_segformer("encoder.", _MIT, "", _SMP_HEAD),),
        settings=_eps(1e-6, 1e-5),
        note="its model upsamples the logits four times, with align_corners=True",
    ),
    KeyFormat(
        dialect="native",
        family="segformer_mmseg",
        package=f"{_MMSEG}'s SegFormer, with the official encoder's names",
        key_maps=(_segformer("backbone.", _MIT, "decode_head.", _MMSEG_HEAD),),
        settings=_eps(1e-6, 1e-6),
    ),
    KeyFormat(
        dialect="mmseg",
        family="segformer_mmseg",
        package=_MMSEG,
        key_maps=(
            _segformer("backbone.", _MIT_MMSEG, "decode_head.", _MMSEG_HEAD),
            _segformer("", _MIT_MMSEG, "decode_head.", _MMSEG_HEAD),
        ),
        settings=_eps(1e-6, 1e-6),
    ),
    *(
        _backbone(
            family,
            "a MiT encoder",
            *(_MIT, _MIT_MMSEG),
            settings=_eps(1e-6, patch_eps),
            backbone_extras=("head.*",),
        )
        for family, patch_eps in (("segformer", 1e-5), ("segformer_plain", 1e-5), ("segformer_mmseg", 1e-6))
    ),
    KeyFormat(
        dialect="native",
        family="segformer_plain",
        package=f"{_SEED}, with the official prefixes",
        key_maps=(_segformer("backbone.", _MIT, "decode_head.", _PLAIN_HEAD),),
        settings=_eps(1e-6, 1e-5),
    ),
    KeyFormat(
        dialect="segmentation_pytorch",
        family="segformer_plain",
        package=_SEED,
        key_maps=(_segformer("", _MIT, "", _PLAIN_HEAD),),
        settings=_eps(1e-6, 1e-5),
    ),
    *(
        KeyFormat(
            dialect=dialect,
            family="segformer_simple",
            package=package,
            key_maps=(_same("mit.stages.{rest}", "to_fused.{rest}", "to_segmentation.{rest}"),),
            settings=(("num_heads", (1, 2, 5, 8)),),
        )
        for dialect, package in (("native", "segformer-pytorch"), ("segmentation_pytorch", _SEED))
    ),
    KeyFormat(
        dialect="native",
        family="segformer_zuppichini",
        package="F. Zuppichini's article",
        key_maps=(_same("encoder.stages.{rest}", "decoder.stages.{rest}", "head.fuse.{rest}", "head.predict"),),
        settings=(("num_heads", (1, 2, 4, 8)),),
    ),
    *(
        KeyFormat(
            dialect=dialect,
            family="hrnet",
            package=package,
            key_maps=(_HRNET + _HRNET_HEAD,),
            settings=(("align_corners", False),),
            of_classes=of_classes,
            note=note,
            **_HRNET_KEYS,
        )
        for dialect, package, of_classes, note in (
            ("native", "HRNet-Semantic-Segmentation", _HRNET_ALIGNED, ""),
            ("segmentation_pytorch", _SEED, {}, "its model upsamples the logits to the size of its training crop"),
        )
    ),
    *_hrnet_encoder("hrnet", align_corners=False),
    KeyFormat(
        dialect="mmseg",
        family="hrnet",
        package=_MMSEG,
        key_maps=(_prefixed("", "backbone.", _HRNET) + _prefixed("last_layer.", "decode_head.", _MMSEG_FCN),),
        without_bias=(("last_layer.0", "last_layer.1"),),
        settings=(("align_corners", False),),
        note=_RESIZED_TWICE,
    ),
    KeyFormat(
        dialect="native",
        family="hrnet_ocr",
        package="HRNet-Semantic-Segmentation, with OCR",
        key_maps=(_HRNET + _OCR_HEADS,),
        settings=(("align_corners", True),),
        **_HRNET_KEYS,
    ),
    *_hrnet_encoder("hrnet_ocr", align_corners=True),
    KeyFormat(
        dialect="mmseg",
        family="hrnet_ocr",
        package=_MMSEG,
        key_maps=(
            _prefixed("", "backbone.", _HRNET)
            + _prefixed("aux_head.", "decode_head.0.", _MMSEG_FCN)
            + _prefixed("", "decode_head.1.", _MMSEG_OCR),
        ),
        without_bias=(("aux_head.0", "aux_head.1"), ("conv3x3_ocr.0", "conv3x3_ocr.1")),
        settings=(("align_corners", False),),
        note=_RESIZED_TWICE,
    ),
    KeyFormat(
        dialect="native",
        family="segnext",
        package="Visual-Attention-Network/SegNeXt",
        key_maps=(_segnext("backbone.", "dwconv.dwconv", "decode_head.", "conv_seg"),),
        settings=(("ham_rank", OF_VARIANT),),
    ),
    KeyFormat(
        dialect="mmseg",
        family="segnext",
        package=_MMSEG,
        key_maps=(
            _segnext("backbone.", "dwconv", "decode_head.", "conv_seg"),
            _segnext("", "dwconv", "decode_head.", "conv_seg"),
        ),
        settings=(("ham_rank", 16),),
    ),
    KeyFormat(
        dialect="cvpytorch",
        family="segnext",
        package="CvPytorch",
        key_maps=(
            _segnext("backbone.", "dwconv.dwconv", "head.", "cls_seg"),
            _segnext("backbone.", "dwconv.dwconv", "head.", "classifier"),
        ),
        settings=(("ham_rank", 64),),
        note="if its head has `classifier`, not `cls_seg`, it upsamples with align_corners=True; segjax does not",
    ),
    _backbone(
        "segnext",
        "an MSCAN encoder",
        _mscan("dwconv.dwconv"),
        settings=(("ham_rank", OF_VARIANT),),
        backbone_extras=("head.*",),
    ),
)
# Sets of weights that one file may hold: averaged, raw, a student's and its teacher's.
WEIGHT_SETS = ("ema", "raw", "student", "teacher")
# Values of `dialect=`, in the order of their first appearance.
DIALECTS = tuple(dict.fromkeys(key_format.dialect for key_format in KEY_FORMATS))

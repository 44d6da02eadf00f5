"""The only table of all settings of a run: default, allowed values and help text.

`default_config` builds the config that recipes change, `problems` checks a whole config, and `segjax train --help`
prints the table. Other settings in config.model, such as config.model.dims, are those of the model's constructor.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, cast

from ml_collections import ConfigDict, config_dict

from segjax.checkpoints.key_maps import WEIGHT_SETS
from segjax.data.specs import DATASETS, Scenes, is_generated
from segjax.train.constraints import (
    BATCH,
    SEED,
    SIDE,
    Boolean,
    Choice,
    ClassWeights,
    Constraint,
    Integer,
    Multipliers,
    OptimizerName,
    Options,
    Pair,
    Real,
    RegularExpression,
    Several,
    Text,
)
from segjax.train.trackers import NAMES, TENSORBOARD


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      name: Name within its section.
      default: Default value.
      allowed: Constraint on its values.
      text: Sentence with the unit and the source of the default.
      optional: Whether None, for unset, is allowed too.
      generated: Whether only generated datasets have this setting.
    """

    name: str
    default: object
    allowed: Constraint
    text: str
    optional: bool = False
    generated: bool = False

    def problem(self, value: object) -> str | None:
        """The requirement that the value does not meet, or None for an allowed value."""
        if value is None and self.optional:
            return None
        return self.allowed.problem(value)


@dataclasses.dataclass(frozen=True)
class Section:
    """The settings of one part of a run; the name is empty for those at the top level of a config."""

    name: str
    title: str
    settings: tuple[Setting, ...]

    def key(self, setting: Setting) -> str:
        """The dotted name, for example optim.lr."""
        return f"{self.name}.{setting.name}" if self.name else setting.name


NOT_EMPTY = Text("text that is not empty", r".+")
SIZE = Integer(32, 16_384)
ADDRESS = Text("empty, FILE.py:function or package.module:function", r"(.+:[^\W\d]\w*)?")
# Constraint on settings of a model's constructor whose names end in _rate.
MODEL_RATE = Real(least=0, below=1)
SCENES = cast(Scenes, DATASETS["streets"].scenes)

RUN = Section(
    "",
    "the run",
    (
        Setting(
            "label",
            "",
            Text(
                "at most 100 printable characters without path separators (/ and \\)",
                r"[^/\\\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]{0,100}",
            ),
            "Name of the run. Without --workdir, the run is in runs/<label>-<dataset>.",
        ),
        Setting(
            "recipe",
            "",
            Text("a line of text", r"[^\x00-\x1f\x7f]*"),
            "Publication of the recipe's values, which a run prints first.",
        ),
        Setting(
            "seed",
            0,
            SEED,
            "Seed of the initial weights, the order of images, augmentation and dropout.",
        ),
        Setting(
            "parallel",
            "jit",
            Choice(("jit", "pmap")),
            "Division of a batch among all devices: jit over a mesh, or pmap.",
        ),
    ),
)

MODEL = Section(
    "model",
    "the model; its constructor has further settings",
    (
        Setting("name", "", NOT_EMPTY, "Model, a name in segjax.MODELS. Each recipe sets it."),
        Setting(
            "dtype",
            "float32",
            Choice(("float32", "bfloat16")),
            "Dtype of the computation; parameters stay float32.",
        ),
    ),
)

DATA = Section(
    "data",
    "images and labels",
    (
        Setting("name", "streets", Choice(DATASETS), "Dataset; streets are generated, folder is your own."),
        Setting(
            "source",
            None,
            NOT_EMPTY,
            "Folder from which a dataset is prepared at first use: the official archives or their contents; for "
            "camvid and folder, images/, labels/ and classes.json.",
            optional=True,
        ),
        Setting(
            "dir",
            None,
            NOT_EMPTY,
            "Folder of prepared datasets. Unset: TFDS_DATA_DIR, or else ~/tensorflow_datasets.",
            optional=True,
        ),
        Setting(
            "resident_gb",
            None,
            Real(least=0),
            "Maximum size of a split in memory, in gigabytes, decoded and padded; the training split is on every "
            "device. Larger splits are streamed. Unset: 2 on a CPU; on a GPU, a third of the memory that jax may use "
            "there, and at most a third of the host's.",
            optional=True,
        ),
        Setting(
            "cache_gb",
            None,
            Real(least=0),
            "Cache of each process for decoded images of a streamed split, in gigabytes. Unset: a third of the host's "
            "memory.",
            optional=True,
        ),
        Setting(
            "normalisation",
            "auto",
            Choice(("auto", "imagenet", "measured")),
            "Mean and standard deviation of the normalisation: imagenet, measured (on the training split), or auto: "
            "ImageNet's for 8-bit RGB, otherwise measured.",
        ),
        Setting(
            "changed",
            "refuse",
            Choice(("refuse", "accept")),
            "Whether a resumed run refuses or accepts images, masks or classes that have changed since it began.",
        ),
        Setting("train_split", "train", NOT_EMPTY, "Split to train on, or a sum of splits, as in train+val."),
        Setting(
            "eval_split",
            "test",
            NOT_EMPTY,
            "Split, or sum of splits, to evaluate and to draw predictions for. Unset: val, or else test.",
            optional=True,
        ),
        Setting(
            "train_images",
            SCENES.train_images,
            Integer(1, 1_000_000),
            "Number of generated training scenes; in a sum of splits, per split.",
            generated=True,
        ),
        Setting(
            "eval_images",
            SCENES.eval_images,
            Integer(1, 1_000_000),
            "Number of generated evaluation scenes; in a sum of splits, per split.",
            generated=True,
        ),
        Setting("size", SCENES.size, Pair(("height", "width"), SIZE), "Size of a scene, in pixels.", generated=True),
    ),
)

AUGMENT = Section(
    "augment",
    "augmentation of training images",
    (
        Setting(
            "crop",
            (512, 512),
            Pair(("height", "width"), SIZE),
            "Size of the training crop, in pixels. Unset: the median size of the images, at most 512, in multiples of "
            "32.",
            optional=True,
        ),
        Setting(
            "base_size",
            None,
            Pair(("long", "short"), SIDE),
            "Long and short side in pixels within which an image is resized, with its aspect ratio, before the random "
            "factor. Unset: its stored size. Published for ADE20K: (2048, 512).",
            optional=True,
        ),
        Setting(
            "scale",
            (0.5, 2.0),
            Pair(("smallest", "largest"), Real(least=0.01, most=100), ascending=True),
            "Range of the random factor by which an image is resized before the crop.",
        ),
        Setting(
            "scale_step",
            0.0,
            Real(least=0, most=100),
            "Step between the factors of scale, both ends included; 0 for any factor. HRNet: 0.1 from 0.5 to 2.1.",
        ),
        Setting(
            "cat_max_ratio",
            1.0,
            Real(above=0.5, most=1),
            "Maximum share of one class in a crop's labelled pixels; above it another crop is drawn, up to ten times. "
            "1 for no limit. mmsegmentation: 0.75.",
        ),
        Setting(
            "class_balance",
            0.0,
            Real(least=0, most=1),
            "Probability of placing a crop around a pixel of a class; the class is drawn from those of the image, by "
            "inverse frequency.",
        ),
        Setting(
            "rotation",
            0.0,
            Real(least=0, most=180),
            "Maximum rotation of a crop in either direction, in degrees.",
        ),
        Setting("flip", 0.5, Real(least=0, most=1), "Probability of a horizontal flip."),
        Setting(
            "photometric",
            True,
            Boolean(),
            "Random brightness, contrast, saturation and hue; only brightness and contrast if images are not RGB.",
        ),
        Setting(
            "brightness",
            0,
            Integer(0, 255),
            "Maximum change of brightness (of 255) in half of the crops; 0 for none. An alternative to photometric.",
        ),
        Setting(
            "cutmix",
            0.0,
            Real(least=0, most=1),
            "Probability that a random box of a crop is replaced by that of the next crop of the batch, labels "
            "included (CutMix).",
        ),
        Setting(
            "classmix",
            0.0,
            Real(least=0, most=1),
            "Probability that the pixels of half of the classes of the next crop of the batch replace those of a crop, "
            "labels included (ClassMix). cutmix + classmix is at most 1.",
        ),
        Setting(
            "on_device",
            "",
            ADDRESS,
            "Custom JAX function (key, image, label) for crops; see segjax/data/hooks.py.",
        ),
        Setting(
            "on_host",
            "",
            ADDRESS,
            "Custom NumPy function (rng, image, label) for whole images, for example with Albumentations; see "
            "segjax/data/hooks.py.",
        ),
    ),
)

TRAIN = Section(
    "train",
    "training",
    (
        Setting(
            "steps",
            40_000,
            Integer(0),
            "Updates of the weights. Unset: 200 epochs, at least 2,000 and at most 80,000.",
            optional=True,
        ),
        Setting("batch", 8, BATCH, "Images per update, over all devices."),
        Setting(
            "accumulate",
            1,
            BATCH,
            "Number of micro-batches of a batch, computed in sequence: less memory, the same gradient.",
        ),
        Setting(
            "ema",
            0.0,
            Real(least=0, below=1),
            "Decay of a moving average of weights and statistics, which replaces them in evaluations and saved "
            "weights; 0 for none.",
        ),
        Setting(
            "may_skip",
            0,
            Integer(0),
            "Consecutive steps that may be skipped because their loss is not finite; one more ends the run.",
        ),
        Setting(
            "scan_blocks",
            False,
            Boolean(),
            "Compile seven or more equal blocks once, as a loop: deep models compile sooner, with the same results.",
        ),
        Setting(
            "remat",
            False,
            Boolean(),
            "Recompute blocks in the backward pass: less memory, more time, the same results. On a CPU it needs "
            "scan_blocks, which then applies to every group of equal blocks.",
        ),
        Setting("log_every", 50, Integer(1), "Steps between two lines of metrics.jsonl."),
        Setting(
            "trackers",
            (TENSORBOARD,),
            Several(
                Choice(NAMES), f"a tuple of {', '.join(NAMES[:-1])} and {NAMES[-1]}, as in ('tensorboard', 'wandb')"
            ),
            "Programs that get the lines of metrics.jsonl, and pictures of predictions, too. The others have extras of "
            "their names.",
        ),
    ),
)

LOSS = Section(
    "loss",
    "the loss, a sum of terms; a factor of 0 omits a term (see segjax.losses)",
    (
        Setting("cross_entropy", 1.0, Real(least=0), "Factor of the cross-entropy."),
        Setting(
            "ohem",
            0.0,
            Real(least=0),
            "Factor of the cross-entropy of only the hard pixels, selected per image or per group of images.",
        ),
        Setting("dice", 0.0, Real(least=0), "Factor of the Dice loss."),
        Setting("focal", 0.0, Real(least=0), "Factor of the focal loss."),
        Setting("lovasz", 0.0, Real(least=0), "Factor of the Lovász loss."),
        Setting("tversky", 0.0, Real(least=0), "Factor of the Tversky loss."),
        Setting(
            "rmi",
            0.0,
            Real(least=0),
            "Factor of the region mutual information loss, a sum over classes that may be negative. Published with "
            "0.5, and 0.5 for the cross-entropy of sigmoids; cross_entropy is that of a softmax for several classes.",
        ),
        Setting(
            "class_weights",
            None,
            ClassWeights(),
            "Weights by class in cross_entropy, ohem and focal: none, weights that balance the training split, those "
            "of HRNet for Cityscapes, or a number per class.",
            optional=True,
        ),
        Setting(
            "mean_over",
            "labelled",
            Choice(("labelled", "all")),
            "Divisor of cross_entropy and focal: the number or weight of labelled pixels, as in torch, or the number "
            "of all pixels of the crops, as in mmsegmentation (avg_non_ignore=False).",
        ),
        Setting(
            "label_smoothing",
            0.0,
            Real(least=0, most=1),
            "Share of the label that cross_entropy spreads over all classes, as in torch.",
        ),
        Setting("focal_gamma", 2.0, Real(least=0), "Exponent of the focal loss; 2 was best in its paper."),
        Setting("tversky_alpha", 0.3, Real(least=0), "Weight of false positives in the Tversky loss."),
        Setting(
            "tversky_beta",
            0.7,
            Real(least=0),
            "Weight of false negatives in the Tversky loss; above tversky_alpha it favours recall.",
        ),
        Setting(
            "tversky_power",
            1.0,
            Real(above=0),
            "Exponent of the Tversky loss; the focal Tversky loss was published with 0.75.",
        ),
        Setting(
            "ohem_threshold",
            0.7,
            Real(least=0, most=1),
            "Probability of the true class below which a pixel is hard; mmsegmentation and BiSeNet: 0.7.",
        ),
        Setting(
            "ohem_min_kept",
            1 / 16,
            Real(least=0, most=1),
            "Minimum share of an image's labelled pixels, or of all pixels of a group, that ohem keeps, hardest "
            "first. BiSeNet: 1/16; mmsegmentation: 100,000 pixels of two crops of 512x1024, 1/10; HRNet: 131,072 of a "
            "group of three such crops, 1/12.",
        ),
        Setting(
            "ohem_images",
            0,
            Integer(0, BATCH.most),
            "Number of consecutive images from which ohem selects hard pixels together; 0 selects them per image. "
            "HRNet: the images of a GPU, 3 on Cityscapes.",
        ),
        Setting(
            "distill",
            "",
            Text(),
            "Teacher whose logits the model also learns: a checkpoint of the same classes and of any family, "
            "hf:owner/name, or a name of `segjax weights`; empty for none.",
        ),
        Setting(
            "distill_cwd",
            3.0,
            Real(least=0),
            "Factor of the channel-wise divergence from the teacher. Shu et al. (2021): 3 on logits.",
        ),
        Setting("distill_kl", 0.0, Real(least=0), "Factor of the pixel-wise divergence (KL) from the teacher."),
        Setting(
            "distill_temperature",
            4.0,
            Real(above=0, most=1000),
            "Number that divides logits in both divergences. Shu et al. (2021): 4.",
        ),
        Setting("aux_weight", 0.4, Real(least=0), "Weight of the loss of auxiliary logits; only OCR models have them."),
        Setting(
            "aux",
            "same",
            Choice(("same", "cross_entropy")),
            "Loss of auxiliary logits: the same, or cross-entropy only, as published for OCR with ohem.",
        ),
    ),
)

OPTIM = Section(
    "optim",
    "optimizer and learning rate",
    (
        Setting(
            "name",
            "adamw",
            OptimizerName(),
            "Optimizer: adamw or sgd, computed as in torch, or a function of optax, such as optax.contrib.muon.",
        ),
        Setting(
            "options",
            {},
            Options(),
            "Arguments of an optimizer of optax by name. Learning rate, weight decay and no_decay are those of the "
            "other settings.",
        ),
        Setting(
            "lr",
            6e-5,
            Real(above=0, most=100),
            "Learning rate at the peak of the schedule. SegFormer on Cityscapes: 6e-5 from pretrained weights. Unset: "
            "6e-5 from init.checkpoint, 1e-3 from random weights.",
            optional=True,
        ),
        Setting("end_lr", 0.0, Real(least=0, most=100), "Learning rate at the end of the schedule."),
        Setting(
            "schedule",
            "poly",
            Choice(("poly", "cosine")),
            "Decay of the learning rate; it is multiplied by a linear warm-up.",
        ),
        Setting("power", 1.0, Real(least=0, most=100), "Exponent of poly: lr * (1 - step / steps) ** power."),
        Setting(
            "warmup_steps",
            1500,
            Integer(0),
            "Steps of the warm-up. mmsegmentation: 1500. Unset: a tenth of train.steps, at most 1500.",
            optional=True,
        ),
        Setting("warmup_ratio", 1e-6, Real(least=0, most=1), "Factor of the learning rate where the warm-up begins."),
        Setting("weight_decay", 0.01, Real(least=0, most=100), "Weight decay; AdamW's is decoupled, SGD's is L2."),
        Setting("beta1", 0.9, Real(least=0, below=1), "AdamW: decay of the mean of gradients."),
        Setting("beta2", 0.999, Real(least=0, below=1), "AdamW: decay of the mean of squared gradients."),
        Setting("eps", 1e-8, Real(above=0, most=1), "AdamW: added to the denominator, as in torch."),
        Setting("momentum", 0.9, Real(least=0, below=1), "SGD: momentum."),
        Setting("clip_norm", 0.0, Real(least=0), "Gradients with a larger norm are scaled down to it; 0 for none."),
        Setting(
            "no_decay",
            "norm",
            RegularExpression(),
            "Parameters without weight decay: a regular expression searched for in dotted names; empty for none. "
            "Published: norm (biases decay).",
        ),
        Setting(
            "lr_multipliers",
            (("head", 10.0),),
            Multipliers(),
            "Factors of the learning rate by parameter name. Published: the head learns ten times as fast as the "
            "backbone.",
            optional=True,
        ),
        Setting(
            "layer_decay",
            1.0,
            Real(above=0, most=1),
            "Factor of the learning rate for each step of depth from the head down to the stem; 1 for none (see "
            "segjax/train/depth.py).",
        ),
        Setting(
            "frozen",
            (),
            Several(RegularExpression(), "a tuple of regular expressions, as in ('backbone',)"),
            "Parameters to exclude from training: regular expressions searched for in their names.",
        ),
    ),
)

INIT = Section(
    "init",
    "initial weights",
    (
        Setting(
            "checkpoint",
            "",
            Text(),
            "Checkpoint to start from: a file or folder that segjax convert reads, hf:owner/name, a name of `segjax "
            "weights`, or the folder of another run; an encoder is enough. The model adopts its sizes; a classifier "
            "of other classes stays random. Empty: random weights.",
            optional=True,
        ),
        Setting(
            "weights",
            "auto",
            Choice(("auto", *WEIGHT_SETS)),
            "Set of weights to start from, if the checkpoint has averaged (ema) and raw weights, or a student and a "
            "teacher. auto: raw weights.",
        ),
        Setting(
            "expected",
            "",
            Text(),
            "Pretrained weights for which the recipe is written; a run from random weights prints a warning.",
        ),
        Setting(
            "keep",
            (),
            Several(Text(), "a tuple of patterns, as in ('decode_head.linear_pred.*',)"),
            "Patterns (* and ?) of parameters that stay random although the checkpoint has them.",
        ),
    ),
)

LORA = Section(
    "lora",
    "low-rank adapters, trained in place of the weights",
    (
        Setting(
            "rank",
            0,
            Integer(0, 4096),
            "Rank of the adapters; 0 trains the weights themselves. Hu et al. (2021): 4 or 8.",
        ),
        Setting("alpha", 8.0, Real(above=0), "Factor of the adapters, divided by the rank (lora_alpha of peft)."),
        Setting(
            "targets",
            r"attn\.(q|kv|proj)|mlp\.fc|\.fn\.",
            RegularExpression(),
            "Layers with adapters: a regular expression searched for in the dotted paths of linear layers and "
            "convolutions; grouped convolutions get none. By default those of attention and feed-forward networks.",
        ),
        Setting(
            "full",
            None,
            Several(RegularExpression(), "a tuple of regular expressions, as in ('decode_head',)"),
            "Modules to train in full next to the adapters (modules_to_save of peft): regular expressions searched for "
            "in their dotted paths. Unset: those that init.checkpoint does not have, such as a new classifier.",
            optional=True,
        ),
    ),
)

EVAL = Section(
    "eval",
    "evaluation",
    (
        Setting(
            "mode",
            "whole",
            Choice(("whole", "slide")),
            "Whole images, or a sliding window; published for SegFormer and SegNeXt on Cityscapes: slide.",
        ),
        Setting(
            "crop",
            None,
            Pair(("height", "width"), SIZE),
            "Size of the sliding window, in pixels. Unset: 512 a side. Published on Cityscapes: (1024, 1024).",
            optional=True,
        ),
        Setting(
            "stride",
            None,
            Pair(("height", "width"), SIDE),
            "Steps of the sliding window, in pixels. Unset: three quarters of the window.",
            optional=True,
        ),
        Setting(
            "base_size",
            None,
            Pair(("long", "short"), SIZE),
            "Long and short side in pixels within which each image is first resized, with its aspect ratio. Unset: "
            "images keep their size. Published on ADE20K: (2048, 512).",
            optional=True,
        ),
        Setting(
            "size_divisor",
            1,
            Integer(1, 1024),
            "Images are resized up to multiples of this. Published for SegFormer on ADE20K: 32.",
        ),
        Setting(
            "scales",
            (1.0,),
            Several(Real(above=0, most=100), "a tuple of one or more numbers, as in (0.75, 1.0, 1.25)", least=1),
            "Factors of the image size, or of base_size; probabilities are averaged over them.",
        ),
        Setting("flip", False, Boolean(), "Average probabilities over each image and its mirror image."),
        Setting(
            "threshold",
            0.5,
            Real(above=0, below=1),
            "Probability above which a pixel belongs to the class, for a model of one class.",
        ),
        Setting(
            "batch",
            8,
            BATCH,
            "Number of images, or crops of a sliding window, to evaluate at a time, over all devices.",
        ),
        Setting("every", 0, Integer(0), "Steps between two evaluations; 0 evaluates only at the end."),
        Setting(
            "patience",
            0,
            Integer(0),
            "Consecutive evaluations without a better mIoU after which training ends; 0 never ends it early.",
        ),
        Setting("pictures", 8, Integer(0, 10_000), "Images whose predictions are drawn in predictions/."),
    ),
)

CHECKPOINT = Section(
    "checkpoint",
    "checkpoints",
    (
        Setting("every", 1000, Integer(1), "Steps between two checkpoints."),
        Setting("keep", 2, Integer(1), "Number of newest checkpoints to keep."),
    ),
)

DEBUG = Section(
    "debug",
    "debugging",
    (
        Setting(
            "nans",
            False,
            Boolean(),
            "When a loss is not finite, recompute the step layer by layer, to report the first layer that is not "
            "finite.",
        ),
    ),
)

SECTIONS = (RUN, MODEL, DATA, AUGMENT, TRAIN, LOSS, OPTIM, INIT, LORA, EVAL, CHECKPOINT, DEBUG)
SETTINGS: dict[str, Setting] = {section.key(setting): setting for section in SECTIONS for setting in section.settings}

# Names in runs and config files of segjax 0.1.0 -> present names.
RENAMED = {"init.from_": "init.checkpoint", "init.from": "init.checkpoint"}


def default_config(dataset: str) -> ConfigDict:
    """The defaults of all settings of a run on this dataset."""
    config = ConfigDict()
    for section in SECTIONS:
        part = ConfigDict() if section.name else config
        for setting in section.settings:
            default = dataset if section.key(setting) == "data.name" else setting.default
            if _has(dataset, setting):
                part[setting.name] = config_dict.placeholder(setting.allowed.kind) if default is None else default
        if section.name:
            config[section.name] = part
    return config


def unset(config: ConfigDict, key: str) -> None:
    """Unsets an optional setting by its dotted key: a run chooses its value, unless a flag gives one."""
    section, _, name = key.rpartition(".")
    part = config[section] if section else config
    # Deleted first: a field with a number would keep it as the default of its placeholder.
    with part.unlocked():
        del part[name]
        part[name] = config_dict.placeholder(SETTINGS[key].allowed.kind)


def problems(config: Mapping | ConfigDict) -> dict[str, str]:
    """The problem of each setting whose own value is wrong, by dotted key.

    It does not check whether settings fit together, nor settings of the model's constructor other than rates.

    Returns:
      "VALUE; must be ..." for values, "no such setting ..." for unknown keys, and the entries of `missing`.
    """
    values, found = flattened(config), missing(config)
    for key, value in values.items():
        if key in SETTINGS:
            if must_be := SETTINGS[key].problem(value):
                found[key] = f"{value!r}; must be {must_be}"
        elif key.startswith("model."):
            must_be = MODEL_RATE.problem(value) if key.endswith("_rate") else None
            found |= {key: f"{value!r}; must be {must_be}"} if must_be else {}
        elif key not in found:
            found[key] = why_unknown(key, prefix="config.")
    return found


def missing(config: Mapping | ConfigDict) -> dict[str, str]:
    """The problem, "missing; ...", of every section and setting that a config lacks, by dotted key."""
    values, found = flattened(config), {}
    for section in SECTIONS:
        if section.name and not isinstance(config.get(section.name), Mapping | ConfigDict):
            found[section.name] = "missing; a config has all sections that `segjax train --help` lists"
            continue
        for setting in section.settings:
            key = section.key(setting)
            if key not in values and _has(values.get("data.name"), setting):
                why = "a generated dataset needs it, and " if setting.generated else ""
                found[key] = f"missing; {why}the default is {setting.default!r}"
    return found


def require_complete(config: Mapping | ConfigDict) -> None:
    """Raises ValueError, with all problems of the config, if it lacks a section or a setting."""
    if missing(config):
        lines = "\n".join(f"  config.{key}: {problem}" for key, problem in problems(config).items())
        raise ValueError(f"the settings cannot be used:\n{lines}")


def flattened(config: Mapping | ConfigDict, prefix: str = "") -> dict[str, object]:
    """The settings of a config, or of its part of keys that begin with `prefix`, by dotted key."""
    flat = {}
    for name, value in config.items():
        key = prefix + name
        if not isinstance(value, Mapping | ConfigDict):
            flat[key] = value
        elif key in SETTINGS:
            # The value of a single setting.
            flat[key] = dict(value)
        else:
            flat |= flattened(value, f"{key}.")
    return flat


def in_current_terms(config: Mapping) -> dict[str, Any]:
    """A config, as JSON, of any earlier version, with present names and the defaults of settings that it lacks."""
    current: dict[str, Any] = {}
    for name, value in config.items():
        current[name] = dict(value) if isinstance(value, Mapping) else value
    for old, new in RENAMED.items():
        (section, before), (_, after) = old.split("."), new.split(".")
        settings = current.get(section)
        if isinstance(settings, dict) and before in settings:
            settings[after] = settings.pop(before)
    for section in SECTIONS if current else ():
        settings = current.setdefault(section.name, {}) if section.name else current
        for setting in section.settings:
            if setting.name not in settings and _has(current.get("data", {}).get("name"), setting):
                settings[setting.name] = json.loads(json.dumps(setting.default))
    return current


def _has(dataset: object, setting: Setting) -> bool:
    """Whether a config for this dataset has a setting."""
    return not setting.generated or (isinstance(dataset, str) and is_generated(dataset))


def similar(word: str) -> list[str]:
    """At most three settings that `word` may mean: those with this last name, or else those with similar names."""
    word = word.replace("-", "_")
    names = {key: key.rpartition(".")[2] for key in SETTINGS}
    last_names = difflib.get_close_matches(word, set(names.values()), n=1, cutoff=0.75)
    return (
        [key for key in SETTINGS if names[key] == word]
        or difflib.get_close_matches(word, SETTINGS, n=1, cutoff=0.75)
        or [key for key in SETTINGS if names[key] in last_names]
    )[:3]


def why_unknown(key: str, *, prefix: str) -> str:
    """The reason why a config has no setting of this dotted name, with similar names after `prefix`."""
    if key in RENAMED:
        return f"no such setting; it is {prefix}{RENAMED[key]} now"
    if key in SETTINGS:
        return "no such setting here; only generated datasets have it"
    close = [prefix + name for name in similar(key) or similar(key.rpartition(".")[2])]
    return f"no such setting; did you mean {' or '.join(close)}?" if close else "no such setting"

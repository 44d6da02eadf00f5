"""Every recipe: the model of each variant and dataset, the published numbers, and parameters with special rules."""

import importlib
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import segjax
from segjax import layers, losses, models
from segjax.checkpoints.architectures import family_of
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.inference.engine import predict_labels
from segjax.models import segformer_simple
from segjax.models.functional import FunctionalModel
from segjax.train import loop, optim, unset
from segjax.train.config import RunError, check, model_overrides
from tests.tiny import abstract_model

pytestmark = pytest.mark.one_python

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("[!_]*.py") if path.stem != "common")
CONFIGS = {name: importlib.import_module(f"configs.{name}") for name in NAMES}
VARIANTS = [(name, variant) for name in NAMES for variant in CONFIGS[name].VARIANTS]
FIRST = ("b0", "plain_b0", "mmseg_b0", "small", "small_ocr")
COMBINATIONS = [(name, variant, dataset) for name, variant in VARIANTS for dataset in specs.DATASETS]
NORMS = (layers.LayerNorm, layers.BatchNorm, layers.GroupNorm, segformer_simple.LayerNorm)
# First words of the names of an encoder's parameters; what is left is the head.
ENCODERS = {
    "segformer": ("backbone.",),
    "segformer_simple": ("mit.",),
    "segformer_zuppichini": ("encoder.",),
    "hrnet": ("conv1.", "bn1.", "conv2.", "bn2.", "layer1.", "transition", "stage"),
    "segnext": ("backbone.",),
}


def get(name, variant="", dataset=""):
    return CONFIGS[name].get_config(f"{variant},{dataset}")


def sizes_of(config):
    """What the config makes of its model, without rates, which change no parameter."""
    return {key: value for key, value in config.model.items() if key not in ("name", "dtype") and "rate" not in key}


def model_of(config):
    return abstract_model(config.model.name, **sizes_of(config))


def parameters(model):
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def of_modules(model, kinds):
    """Parameters of all modules of these kinds."""
    found = set()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, kinds):
            found |= {".".join(map(str, (*path, name))) for name in parameters(module)}
    return found


def biases(model):
    """Parameters that are called bias, whatever they belong to."""
    return {name for name in parameters(model) if name.endswith(".bias")}


def matched(model, pattern):
    return optim.found_in(pattern, parameters(model), setting="optim") if pattern else set()


def test_there_is_a_config_for_every_model():
    assert NAMES == ["hrnet", "segformer", "segformer_simple", "segformer_zuppichini", "segnext"]
    assert {get(name, variant).model.name for name, variant in VARIANTS} == set(segjax.MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_without_an_argument_a_config_is_its_first_variant_on_streets(name):
    config = CONFIGS[name].get_config()
    assert config.to_dict() == CONFIGS[name].get_config("").to_dict()
    assert config.to_dict() == get(name, CONFIGS[name].VARIANTS[0], "streets").to_dict()
    assert config.data.name == "streets"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("word", ["b9", "cityscape", "small-", "w18_ocr_", "B0"])
def test_an_unknown_variant_or_dataset_is_refused_with_both_lists(name, word):
    with pytest.raises(ValueError) as caught:
        CONFIGS[name].get_config(f"{word},camvid")
    assert f"{word!r} is not a variant ({', '.join(CONFIGS[name].VARIANTS)}) or dataset (" in str(caught.value)
    assert "streets, camvid, cityscapes, ade20k, voc, pet, folder" in str(caught.value)


@pytest.mark.parametrize("name, variant, dataset", COMBINATIONS)
def test_every_combination_can_be_run(name, variant, dataset, tmp_path):
    config = get(name, variant, dataset)
    check(config, tmp_path)
    assert config.to_dict() == CONFIGS[name].get_config(f" {dataset} ,{variant}").to_dict()
    assert config.data.name == dataset
    overrides = model_overrides(config.model)
    assert set(overrides) <= set(models.settings(config.model.name))
    assert all(0 <= value < 1 for key, value in overrides.items() if key.endswith("rate"))
    if config.train.steps is not None:
        assert config.optim.warmup_steps < config.train.steps


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_variant_builds_its_model(name, variant):
    config = get(name, variant, "cityscapes")
    assert model_of(config).spec.name == config.model.name


def test_every_combination_has_its_own_folder():
    folders = {loop.default_workdir(get(*combination)) for combination in COMBINATIONS}
    assert len(folders) == len(COMBINATIONS)
    assert str(loop.default_workdir(get("segformer", "mmseg_b2", "camvid"))) == "runs/segformer-mmseg-b2-camvid"
    assert str(loop.default_workdir(get("hrnet", "w48_ocr", "folder"))) == "runs/hrnet-w48-ocr-folder"


# Where a variant has the sizes of its model's name, and where it has others.
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_variants_other_than_small_have_the_published_sizes(name, variant):
    config = get(name, variant, "folder")
    expected = {
        ("segformer_simple", "b5"): 174_780_307,
        ("segformer_zuppichini", "article"): 17_808_356 - 81 * 257,
    }.get((name, variant))
    if variant.startswith("small"):
        small, whole = (
            sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
            for model in (model_of(config), abstract_model(config.model.name))
        )
        assert small < whole / 2
    elif expected is None:
        defaults = models.settings(config.model.name)
        assert {key: defaults[key] for key in sizes_of(config)} == sizes_of(config)
    else:
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model_of(config), nnx.Param))) == expected


# --------------------------------------------------------------------------------------------- what images there are

PICKY = ("segformer_simple", "segformer_zuppichini")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dataset", ["streets", "camvid"])
def test_models_accept_the_crops_and_evaluation_images_of_a_dataset(name, dataset):
    config = get(name, "", dataset)
    evaluated = tuple(config.data.size) if dataset == "streets" else (360, 480)
    functional = FunctionalModel(model_of(config))
    for size in (tuple(config.augment.crop), evaluated):
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8)
        predicted = jax.eval_shape(
            partial(predict_labels, functional, normalise=normalise), *functional.arrays(), images
        )
        assert predicted.shape == (1, *size)


@pytest.mark.parametrize("name", PICKY)
@pytest.mark.parametrize("dataset", specs.DATASETS)
def test_crops_for_models_that_upsample_by_whole_factors_divide_by_32(name, dataset):
    crop = get(name, "", dataset).augment.crop
    if crop is None:
        # Of data without a published recipe the run chooses it.
        crop = unset.crop(np.array([(361, 487), (361, 487)]))
    assert [side % 32 for side in crop] == [0, 0]
    assert crop == (specs.DATASETS[dataset].crop if dataset in ("streets", "cityscapes") else crop)


# ------------------------------------------------------------------------- published numbers: see test_published.py


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_training_on_a_folder_uses_adamw_and_only_cross_entropy(name, variant):
    config = get(name, variant, "folder")
    assert (config.optim.name, config.train.batch, config.augment.photometric) == ("adamw", 8, True)
    # Cross-entropy only, with OCR's auxiliary loss.
    terms = {key: config.loss[key] for key in losses.TERMS}
    assert terms == dict.fromkeys(losses.TERMS, 0.0) | {"cross_entropy": 1.0}
    assert (config.loss.aux_weight, config.loss.class_weights, config.loss.label_smoothing) == (0.4, None, 0.0)
    assert (config.train.accumulate, config.train.ema, config.train.may_skip) == (1, 0.0, 0)
    assert (config.optim.frozen, config.init.checkpoint, config.init.keep) == ((), "", ())
    assert tuple(config.augment.scale) == (0.5, 2.0) and config.augment.flip == 0.5


DROP_PATH = {"segformer": 0.1, "segformer_zuppichini": 0.0, "segnext": 0.1}


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_training_on_a_folder_uses_the_published_drop_rates(name, variant):
    config = get(name, variant, "folder")
    rates = models.settings(config.model.name) | dict(config.model)
    drop_path = 0.3 if (name, variant) == ("segnext", "l") else DROP_PATH.get(name)
    dropout = {"segformer": 0.1, "segnext": 0.1}.get(name)
    if variant.startswith("plain_"):
        dropout = 0.0
    if variant.endswith("_ocr"):
        dropout = 0.05
    assert rates.get("drop_path_rate") == drop_path and rates.get("dropout_rate") == dropout


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_training_on_streets_drops_nothing(name, variant):
    config = get(name, variant, "streets")
    rates = models.settings(config.model.name) | dict(config.model)
    assert [rates[key] for key in ("drop_path_rate", "dropout_rate") if rates.get(key)] == []


# ------------------------------------------------------------------------------------ which parameters it is about


# Wider and deeper variants have the same names.
@pytest.mark.parametrize(
    "name, variant",
    [pair if pair[1] in FIRST else pytest.param(*pair, marks=pytest.mark.slow) for pair in VARIANTS],
)
def test_parameters_without_decay_are_the_published_ones(name, variant):
    for dataset in specs.DATASETS:
        config = get(name, variant, dataset)
        model = model_of(config)
        still, norms = matched(model, config.optim.no_decay), of_modules(model, NORMS)
        assert config.optim.weight_decay > 0
        if name == "hrnet":
            # AdamW, for data without a published recipe and for random weights, decays no norm and no bias.
            expected = set() if config.optim.name == "sgd" else norms | biases(model)
            assert still == expected
        elif name in ("segformer_simple", "segformer_zuppichini"):
            assert still == norms
        elif name == "segformer":
            # By name, as in the published recipe: of the decoder's BatchNorms, called bn, none is meant.
            assert still == of_modules(model, layers.LayerNorm)
            batch_norms = 0 if variant.startswith("plain_") else 10 if variant.startswith("mmseg_") else 2
            assert len(norms - still) == batch_norms
        else:
            # Nor are the stem's BatchNorms, which have numbers, and the decoder's GroupNorms, called gn.
            stem = {f"backbone.patch_embed1.proj.{i}.{part}" for i in (1, 4) for part in ("scale", "bias")}
            assert norms - still == stem | of_modules(model, layers.GroupNorm) and still < norms
            assert len(of_modules(model, layers.GroupNorm)) == 6
        assert still or name == "hrnet"


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_the_head_is_everything_except_the_encoder(name, variant):
    for dataset in specs.DATASETS:
        config = get(name, variant, dataset)
        names = parameters(model_of(config))
        encoder = {key for key in names if key.startswith(ENCODERS[name])}
        assert 0 < len(names) - len(encoder) < len(encoder)
        # Published: one rate for all of HRNet, and for jo-jstrm's models. Random weights want one rate as well.
        one_rate = dataset in ("streets", "camvid") or (name == "hrnet" and dataset in ("cityscapes", "ade20k"))
        one_rate |= dataset == "cityscapes" and (name == "segformer_simple" or variant.startswith("plain_"))
        if one_rate:
            assert config.optim.lr_multipliers == ()
        else:
            # Unset where a run chooses it, from a checkpoint as published.
            chosen = unset.HEADS[family_of(config.model.name)], 10.0
            ((pattern, factor),) = config.optim.lr_multipliers or (chosen,)
            assert matched(model_of(config), pattern) == set(names) - encoder and factor == 10.0


# ----------------------------------------------------------------------------------------- settings that cannot be used

WRONG = {
    "optim.schedule": ("step", "'step'; must be 'poly' or 'cosine'"),
    "optim.clip_norm": (-1.0, "-1.0; must be finite and at least 0"),
    "optim.no_decay": (
        "norm(",
        "'norm('; must be a regular expression (missing ), unterminated subpattern at position 4)",
    ),
    "optim.frozen": (
        ("backbone", "*"),
        "('backbone', '*'); must be a tuple of regular expressions, as in ('backbone',)",
    ),
    "train.accumulate": (0, "0; must be at least 1 and at most 4096"),
    "train.batch": (6, "6; does not divide among 4 devices: 4 or 8 images do, or 3 devices"),
    "train.ema": (1.0, "1.0; must be at least 0 and less than 1"),
    "train.may_skip": (-1, "-1; must be at least 0"),
    "eval.patience": (2, "2; needs eval.every, the steps between two evaluations"),
    "eval.mode": ("windows", "'windows'; must be 'whole' or 'slide'"),
    "eval.crop": ((64, 96), "(64, 96); crop needs mode 'slide'; add it, or omit crop"),
    "eval.stride": ((48, 64), "(48, 64); stride needs mode 'slide'; add it, or omit stride"),
    "eval.scales": ((), "(); must be a tuple of one or more numbers, as in (0.75, 1.0, 1.25)"),
    "init.keep": (("head.*",), "('head.*',); names parameters of a checkpoint, and needs init.checkpoint"),
}


def changed(**values):
    config = get("segformer", "b0", "folder")
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


@pytest.mark.parametrize("key", WRONG)
def test_an_invalid_setting_is_refused_with_its_key(key, tmp_path):
    value, message = WRONG[key]
    with pytest.raises(RunError) as caught:
        check(changed(**{key: value}), tmp_path)
    assert str(caught.value) == f"the settings cannot be used:\n  config.{key}: {message}"


def test_all_problems_of_the_settings_are_in_one_error(tmp_path):
    absent = str(tmp_path / "absent")
    values = {key: value for key, (value, _) in WRONG.items()} | {"init.checkpoint": absent, "eval.mode": "whole"}
    with pytest.raises(RunError) as caught:
        check(changed(**values), tmp_path)
    lines = str(caught.value).splitlines()[1:]
    # Nothing follows from an accumulate that is wrong, a checkpoint is named, and the mode is one that exists.
    unsaid = ("init.keep", "train.batch", "eval.mode")
    expected = [f"  config.{key}: {message}" for key, (_, message) in WRONG.items() if key not in unsaid]
    assert sorted(lines) == sorted([*expected, f"  config.init.checkpoint: {absent} does not exist"])


@pytest.mark.parametrize("crop, sides", [(None, "(512, 512)"), ((64, 600), "(64, 600)")])
def test_a_stride_that_leaves_gaps_between_crops_is_refused(crop, sides, tmp_path):
    with pytest.raises(RunError) as caught:
        check(changed(**{"eval.mode": "slide", "eval.crop": crop, "eval.stride": (65, 640)}), tmp_path)
    (line,) = str(caught.value).splitlines()[1:]
    assert line == f"  config.eval.stride: (65, 640); a stride of (65, 640) leaves gaps between crops of {sides}"


@pytest.mark.parametrize(
    "devices, batch, accumulate, said",
    [
        (4, 8, 3, "8; does not divide among 4 devices and 3 micro-batches: 12 images do, or accumulate=2"),
        (8, 12, 1, "12; does not divide among 8 devices: 8 or 16 images do, or 6 devices"),
        (8, 7, 1, "7; does not divide among 8 devices: 8 images do, or 7 devices"),
        (8, 11, 2, "11; does not divide among 8 devices and 2 micro-batches: 16 images do"),
        (2, 9, 3, "9; does not divide among 2 devices and 3 micro-batches: 6 or 12 images do, or 1 device"),
        (2, 18, 4, "18; does not divide among 2 devices and 4 micro-batches: 16 or 24 images do, or accumulate=3"),
        (1, 5, 2, "5; does not divide among 1 device and 2 micro-batches: 4 or 6 images do, or accumulate=1"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_batches_that_do(
    devices, batch, accumulate, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = changed(**{"train.batch": batch, "train.accumulate": accumulate, "eval.batch": 8 * devices})
    with pytest.raises(RunError) as caught:
        check(config, tmp_path)
    said = said.replace("accumulate=", "train.accumulate=")
    assert str(caught.value).splitlines()[1:] == [f"  config.train.batch: {said}"]
    # What it names does divide.
    for number in map(int, re.findall(r"(\d+)(?= or| images)", said)):
        check(changed(**{"train.batch": number, "train.accumulate": accumulate, "eval.batch": devices}), tmp_path)
    if few := re.search(r"(\d+) devices?$", said.partition(":")[2]):
        monkeypatch.setattr(jax, "device_count", lambda: int(few[1]))
        check(changed(**{"train.batch": batch, "train.accumulate": accumulate, "eval.batch": int(few[1])}), tmp_path)
    if fewer := re.search(r"train\.accumulate=(\d+)", said):
        check(changed(**{"train.batch": batch, "train.accumulate": int(fewer[1]), "eval.batch": devices}), tmp_path)


def test_the_error_names_gpus_to_use_as_an_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RunError) as caught:
        check(changed(**{"train.batch": 12, "eval.batch": 12}), tmp_path)
    hint = "12; does not divide among 8 devices: 8 or 16 images do, or 6 devices (CUDA_VISIBLE_DEVICES=0,1,2,3,4,5)"
    lines = [f"  config.{section}.batch: {hint}" for section in ("train", "eval")]
    assert str(caught.value).splitlines()[1:] == lines


@pytest.mark.parametrize(
    ("batch", "accumulate", "group", "part", "divide"),
    [
        (8, 1, 3, 2, "train.batch=12"),
        (20, 1, 3, 5, "train.batch=12 or 24"),
        (8, 1, 4, 2, "train.batch=16, or 1 or 2 devices"),
        (24, 3, 4, 2, "train.batch=48, or 1 or 2 devices"),
        (12, 1, 12, 3, "train.batch=48, or 1 device"),
    ],
)
def test_ohem_groups_that_do_not_divide_are_refused_with_groups_that_do(
    batch, accumulate, group, part, divide, tmp_path
):
    sizes = {"train.batch": batch, "train.accumulate": accumulate, "loss.ohem_images": group}
    check(changed(**sizes), tmp_path)
    with pytest.raises(RunError) as caught:
        check(changed(**sizes, **{"loss.ohem": 1.0}), tmp_path)
    (line,) = str(caught.value).splitlines()[1:]
    assert line == (
        f"  config.loss.ohem_images: {group}; train.batch={batch} on 4 devices, train.accumulate={accumulate}, gives "
        f"parts of {part} images, which do not divide into groups of {group}; possible: {divide}"
    )
    for fitting in map(int, divide.partition(",")[0].removeprefix("train.batch=").split(" or ")):
        check(changed(**sizes | {"train.batch": fitting, "loss.ohem": 1.0}), tmp_path)


@pytest.mark.parametrize("value", [("head", 10.0), (("head",),), (("head", "10"),), ((),), (("head", -1.0),)])
def test_multipliers_that_are_not_pairs_are_refused_with_an_example(value, tmp_path):
    with pytest.raises(RunError) as caught:
        check(changed(**{"optim.lr_multipliers": value}), tmp_path)
    (line,) = str(caught.value).splitlines()[1:]
    must_be = "(regular expression, factor) pairs, as in (('head', 10.0),)"
    assert line == f"  config.optim.lr_multipliers: {value}; must be {must_be}"


def test_valid_settings_are_accepted(tmp_path):
    (tmp_path / "file.pth").touch()
    check(
        changed(
            **{
                "optim.schedule": "cosine",
                "optim.clip_norm": 1.0,
                "optim.no_decay": "",
                "optim.frozen": ("backbone",),
                "optim.lr_multipliers": (("head", 2), ("norm", 0.0)),
                "train.accumulate": 2,
                "train.ema": 0.999,
                "train.may_skip": 3,
                "eval.every": 10,
                "eval.patience": 2,
                "init.checkpoint": str(tmp_path / "file.pth"),
                "init.keep": ("head.*",),
            }
        ),
        tmp_path / "new" / "folder",
    )

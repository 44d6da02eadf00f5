"""Every published recipe against the values of its repository, copied here by hand.

Sources: NVlabs/SegFormer local_configs; Visual-Attention-Network/SegNeXt local_configs and section 4 of its paper;
HRNet/HRNet-Semantic-Segmentation (branch HRNet-OCR) experiments and lib/datasets; open-mmlab/mmsegmentation configs;
jo-jstrm/segmentation_pytorch configs.
"""

import importlib

import numpy as np
import pytest
from flax import nnx

from segjax.checkpoints.state_dict import torch_name
from segjax.train import optim
from tests.tiny import abstract_model

ADAMW = dict(name="adamw", lr=6e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, power=1.0, end_lr=0.0)
ADAMW |= dict(schedule="poly", warmup_steps=1500, warmup_ratio=1e-6, lr_multipliers=(("head", 10.0),), clip_norm=0.0)
SGD = dict(name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, power=0.9, end_lr=0.0, schedule="poly")
SGD |= dict(warmup_steps=0, lr_multipliers=(), no_decay="", clip_norm=0.0)
# Of mmsegmentation; of HRNet, without photometric changes; and of jo-jstrm, with brightness only.
MMSEG = dict(scale=(0.5, 2.0), scale_step=0.0, cat_max_ratio=0.75, flip=0.5, photometric=True, brightness=0.0)
MMSEG |= dict(rotation=0.0, class_balance=0.0)
HRNET = MMSEG | dict(scale=(0.5, 2.1), scale_step=0.1, cat_max_ratio=1.0, photometric=False)
SEED = HRNET | dict(scale=(0.5, 2.0), brightness=10.0)
WHOLE = dict(mode="whole", crop=None, stride=None, base_size=None, size_divisor=1, scales=(1.0,), flip=False)
SLIDE = WHOLE | dict(mode="slide", crop=(1024, 1024), stride=(768, 768))
ALL = dict(cross_entropy=1.0, ohem=0.0, dice=0.0, focal=0.0, lovasz=0.0, label_smoothing=0.0, class_weights=None)
ALL |= dict(mean_over="all", aux_weight=0.4)
LABELLED = ALL | dict(mean_over="labelled")
WEIGHTED = LABELLED | dict(class_weights="cityscapes")
OHEM = LABELLED | dict(cross_entropy=0.0, ohem=1.0, ohem_threshold=0.9, aux="cross_entropy")


def recipe(crop, base_size, batch, steps, *, optim, augment, loss, eval):
    return dict(
        augment=augment | dict(crop=crop, base_size=base_size),
        train=dict(batch=batch, steps=steps, accumulate=1, ema=0.0),
        optim=optim,
        loss=loss,
        eval=eval,
    )


def city(**changes):
    parts = dict(optim=ADAMW, augment=MMSEG, loss=ALL, eval=SLIDE) | changes
    return recipe((1024, 1024), (2048, 1024), 8, 160_000, **parts)


def ade(side=512, divisor=32, **changes):
    evaluation = WHOLE | dict(base_size=(2048, side), size_divisor=divisor)
    parts = dict(optim=ADAMW, augment=MMSEG, loss=ALL, eval=evaluation) | changes
    return recipe((side, side), (2048, side), 16, 160_000, **parts)


def hrnet_city():
    # 484 epochs of int(2975 / 3 / 4) steps.
    return recipe((512, 1024), (2048, 2048), 12, 119_548, optim=SGD, augment=HRNET, loss=WEIGHTED, eval=WHOLE)


def hrnet_ade(largest):
    # 120 epochs of int(20210 / 4 / 4) steps; the long side is resized to 520 times the scale.
    return recipe(
        (520, 520),
        (520, 520),
        16,
        151_560,
        optim=SGD | dict(lr=0.02, weight_decay=1e-4),
        augment=HRNET | dict(scale=(0.5, largest)),
        loss=OHEM | dict(ohem_images=4),
        eval=WHOLE | dict(base_size=(520, 520)),
    )


def mmseg_hrnet(crop, base_size, batch, evaluation):
    return recipe(
        crop, base_size, batch, 160_000, optim=SGD | dict(end_lr=1e-4), augment=MMSEG, loss=ALL, eval=evaluation
    )


def seed(crop, batch, steps, rates):
    return recipe(crop, (2048, 2048), batch, steps, optim=rates, augment=SEED, loss=WEIGHTED, eval=WHOLE)


PUBLISHED = {f"segformer:b{i},cityscapes": city() for i in range(6)}
PUBLISHED |= {f"segformer:b{i},ade20k": ade() for i in range(5)} | {"segformer:b5,ade20k": ade(640)}
PUBLISHED |= {f"segformer:mmseg_b{i},cityscapes": city() for i in range(6)}
PUBLISHED |= {f"segformer:mmseg_b{i},ade20k": ade(640 if i == 5 else 512, divisor=1) for i in range(6)}
PUBLISHED |= {
    f"segformer:plain_b{i},cityscapes": seed((1024, 1024), 8, 160_000, ADAMW | dict(lr_multipliers=()))
    for i in range(6)
}
PUBLISHED |= {f"segnext:{size},cityscapes": city() for size in "tsbl"}
PUBLISHED |= {f"segnext:{size},ade20k": ade() for size in "tsbl"}
PUBLISHED |= {f"segnext:{size},ade20k,mmseg": ade(divisor=1) for size in "tsbl"}
PUBLISHED |= {f"hrnet:{name},cityscapes": hrnet_city() for name in ("w48", "w48_ocr")}
PUBLISHED |= {"hrnet:w48,ade20k": hrnet_ade(1.6), "hrnet:w48_ocr,ade20k": hrnet_ade(2.1)}
for name in ("w18", "w18_ocr", "w48", "w48_ocr"):
    PUBLISHED[f"hrnet:{name},cityscapes,mmseg"] = mmseg_hrnet((512, 1024), (2048, 1024), 8, WHOLE)
    PUBLISHED[f"hrnet:{name},ade20k,mmseg"] = mmseg_hrnet(
        (512, 512), (2048, 512), 16, WHOLE | dict(base_size=(2048, 512))
    )
PUBLISHED["hrnet:w48,cityscapes,jo-jstrm"] = seed((512, 1024), 12, 120_000, SGD | dict(end_lr=1e-5))
# Of the logits too; False in the yaml of W48 on Cityscapes, True by default in the branch with OCR.
ALIGNED = {"hrnet:w48,cityscapes": False, "hrnet:w48_ocr,cityscapes": True, "hrnet:w48,ade20k": True}
ALIGNED |= {"hrnet:w48_ocr,ade20k": True, "hrnet:w48_ocr,cityscapes,mmseg": False, "hrnet:w48,ade20k,mmseg": False}
DROPOUT = {"hrnet:w48_ocr,cityscapes": 0.05, "hrnet:w48_ocr,ade20k": 0.05, "hrnet:w48_ocr,cityscapes,mmseg": 0.0}
DROPOUT |= {"segformer:b0,ade20k": 0.1, "segnext:l,cityscapes": 0.1, "segformer:mmseg_b5,ade20k": 0.1}
DROP_PATH = {"segformer:b0,cityscapes": 0.1, "segformer:b5,ade20k": 0.1, "segnext:t,ade20k": 0.1}
DROP_PATH |= {"segnext:b,cityscapes": 0.1, "segnext:l,cityscapes": 0.3, "segnext:l,ade20k,mmseg": 0.3}
RANKS = {"segnext:t,ade20k": 16, "segnext:b,cityscapes": 64, "segnext:l,ade20k": 64, "segnext:l,ade20k,mmseg": 16}


def load(reference):
    name, _, argument = reference.partition(":")
    return importlib.import_module(f"segjax.recipes.{name}").get_config(argument)


@pytest.mark.parametrize("reference", PUBLISHED)
def test_a_recipe_has_the_published_values(reference):
    config = load(reference)
    for section, expected in PUBLISHED[reference].items():
        assert {key: config[section][key] for key in expected} == expected, section
    assert config.recipe and "no recipe is published" not in config.recipe
    assert config.optim.frozen == () and config.train.scan_blocks is False and config.train.remat is False


@pytest.mark.parametrize("reference", ALIGNED)
def test_corners_are_aligned_as_published(reference):
    assert load(reference).model.align_corners == ALIGNED[reference]


@pytest.mark.parametrize(
    "setting, table", [("dropout_rate", DROPOUT), ("drop_path_rate", DROP_PATH), ("ham_rank", RANKS)]
)
def test_models_have_the_published_rates_and_ranks(setting, table):
    assert {reference: load(reference).model[setting] for reference in table} == table


def test_the_hardest_pixels_of_the_crops_of_a_gpu_are_131_072():
    for reference, crops, pixels in (
        ("hrnet:w48,ade20k", 4, 520 * 520),
        ("hrnet:w48_ocr,ade20k", 4, 520 * 520),
        ("hrnet:w48_ocr,cityscapes", 3, 512 * 1024),
    ):
        loss = load(reference).loss
        assert loss.ohem_images == crops and loss.ohem_threshold == 0.9
        assert round(loss.ohem_min_kept * crops * pixels) == 131_072


# Learning rates of the first group at four steps, by the formulas of the repositories: mmcv's poly policy times its
# linear warm-up; HRNet's adjust_learning_rate; mmengine's PolyLR.
RATES = {
    "segformer:b0,cityscapes": {0: 6e-11, 750: 2.985940e-5, 1500: 5.943750e-5, 159_999: 3.75e-10},
    "segnext:l,ade20k": {0: 6e-11, 750: 2.985940e-5, 80_000: 3.0e-5, 120_000: 1.5e-5},
    "hrnet:w48,cityscapes": {0: 0.01, 59_774: 0.01 * 0.5**0.9, 119_547: 0.01 * (1 / 119_548) ** 0.9, 1: 9.99992e-3},
    "hrnet:w48_ocr,ade20k": {0: 0.02, 75_780: 0.02 * 0.5**0.9, 113_670: 0.02 * 0.25**0.9, 151_559: 4.3525e-7},
    "hrnet:w48,ade20k,mmseg": {
        0: 0.01,
        80_000: 9.9e-3 * 0.5**0.9 + 1e-4,
        120_000: 9.9e-3 * 0.25**0.9 + 1e-4,
        160_000: 1e-4,
    },
    "hrnet:w48,cityscapes,jo-jstrm": {
        0: 0.01,
        60_000: 9.99e-3 * 0.5**0.9 + 1e-5,
        90_000: 9.99e-3 * 0.25**0.9 + 1e-5,
        120_000: 1e-5,
    },
}


@pytest.mark.parametrize("reference", RATES)
def test_the_learning_rate_follows_the_published_schedule(reference):
    config = load(reference)
    rates = optim.learning_rates(config.optim, parameters(reference), steps=config.train.steps)
    for step, expected in RATES[reference].items():
        # Relative to the peak, float32 has seven digits.
        np.testing.assert_allclose(rates(step)["lr"], expected, rtol=2e-5, atol=1e-7 * config.optim.lr)


@pytest.mark.parametrize("reference", PUBLISHED)
def test_every_recipe_has_its_repositorys_schedule_at_four_points(reference):
    published, config = PUBLISHED[reference], load(reference)
    of, steps = published["optim"], published["train"]["steps"]
    rates = optim.learning_rates(config.optim, ["backbone.norm1.scale", "head.kernel"], steps=config.train.steps)
    for step in (0, 700, steps // 3, steps - 1):
        # mmcv's poly policy and, where there is one, its linear warm-up, which multiplies it.
        expected = (of["lr"] - of["end_lr"]) * (1 - step / steps) ** of["power"] + of["end_lr"]
        if step < of["warmup_steps"]:
            expected *= 1 - (1 - step / of["warmup_steps"]) * (1 - of["warmup_ratio"])
        np.testing.assert_allclose(rates(step)["lr"], expected, rtol=2e-5, atol=1e-7 * of["lr"])


def parameters(reference):
    """Dotted names of the parameters of a recipe's model, as segjax has them."""
    model = abstract_model(load(reference).model.name)
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def mmcv_rule(name):
    """(decays, factor of the rate) by DefaultOptimizerConstructor: the longest key found in a name decides."""
    for key in ("pos_block", "head", "norm"):
        if key in name:
            return (key == "head", 10.0 if key == "head" else 1.0)
    return (True, 1.0)


SIZES_OF_FAMILIES = ["segformer:b0,cityscapes", "segformer:mmseg_b0,ade20k", "segnext:t,ade20k"]
SLOW = ["segformer:b5,ade20k", "segnext:l,cityscapes"]


@pytest.mark.parametrize("reference", SIZES_OF_FAMILIES + [pytest.param(each, marks=pytest.mark.slow) for each in SLOW])
def test_every_parameter_has_the_published_decay_and_factor(reference):
    rules = optim.rules(load(reference).optim, names := parameters(reference))
    assert {name: (rules[name].decays, rules[name].factor) for name in names} == {
        name: mmcv_rule(torch_name(name)) for name in names
    }
    assert len({*rules.values()}) == 3


@pytest.mark.parametrize("reference", ["hrnet:w48,cityscapes", "hrnet:w48_ocr,ade20k", "hrnet:w18,cityscapes,mmseg"])
def test_hrnet_has_one_rate_and_one_decay(reference):
    assert {*optim.rules(load(reference).optim, parameters(reference)).values()} == {optim.Rule(True, True, 1.0)}


# ------------------------------------------------------------------------------------------ pairs without a publication


@pytest.mark.parametrize("dataset", ["voc", "pet", "folder"])
@pytest.mark.parametrize(
    "variant", ["segformer:b2", "segformer:plain_b0", "hrnet:w48_ocr", "segnext:s", "segformer_simple:b5"]
)
def test_a_config_without_a_recipe_says_so_and_has_no_cityscapes_values(variant, dataset):
    config = load(f"{variant},{dataset}")
    assert config.recipe.startswith("no recipe is published for ")
    assert (config.augment.crop, config.train.steps, config.optim.lr) == (None, None, None)
    assert config.loss.class_weights is None and config.augment.base_size is None


@pytest.mark.parametrize(
    "reference",
    [
        "hrnet:small,cityscapes",
        "hrnet:w18_ocr,cityscapes",
        "hrnet:w32,ade20k",
        "hrnet:w32,ade20k,mmseg",
        "hrnet:small,cityscapes,jo-jstrm",
        "segnext:small,cityscapes",
        "segnext:small,ade20k",
        "segformer_zuppichini:article,ade20k",
    ],
)
def test_a_recipe_for_another_model_size_is_not_called_published(reference):
    config = load(reference)
    assert config.recipe.startswith("no recipe is published for ") and "; this is the one of " in config.recipe
    assert config.init.expected


def test_the_recipe_of_the_simple_segformer_expects_pretrained_weights():
    assert load("segformer_simple:b5,cityscapes").init.expected


@pytest.mark.parametrize(
    "reference, message",
    [
        ("hrnet:w48,voc,mmseg", "'mmseg' has recipes for cityscapes and ade20k only"),
        ("hrnet:w48,ade20k,jo-jstrm", "'jo-jstrm' has recipes for cityscapes only"),
        ("segnext:t,cityscapes,mmseg", "'mmseg' has recipes for ade20k only"),
        ("segformer:b0,mmsg", "'mmsg' is not a variant"),
    ],
)
def test_a_source_without_a_recipe_for_the_data_is_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        load(reference)

"""The table of settings: refused values, all problems in one error, and the functions that use the table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from segjax import models
from segjax.data.specs import DATASETS
from segjax.recipes import segformer
from segjax.train import config as config_module
from segjax.train import constraints, schema
from segjax.train.constraints import Integer, Pair, Real

REPO = Path(__file__).parents[2]
NAN, INF = math.nan, math.inf


def changed(dataset="streets", **values):
    """The default recipe with these settings, by key with dots written as two underscores, whatever their type."""
    config = segformer.get_config(dataset)
    for name, value in values.items():
        *section, last = name.split("__")
        owner = config[section[0]] if section else config
        with owner.ignore_type():
            owner[last] = value
    return config


def only_problem(key, value):
    """The problem of a config with this one setting changed: a dict, which unlike a ConfigDict converts no value."""
    config = segformer.get_config("").to_dict()
    *section, last = key.split(".")
    (config[section[0]] if section else config)[last] = value
    found = schema.problems(config)
    assert set(found) <= {key}
    return found.get(key)


# ------------------------------------------------------------------------------------------- every setting out of range


def beyond(allowed):
    """Values just outside the range of a number, and what is no number of the kind at all."""
    if isinstance(allowed, Integer):
        yield from (allowed.least - 1, allowed.most + 1, -(10**20), 10**20, 1.5, NAN, True)
        return
    yield from (NAN, INF, -INF, 1e39, True)
    yield from () if allowed.least is None else (math.nextafter(allowed.least, -INF), allowed.least - 5)
    yield from () if allowed.above is None else (allowed.above, allowed.above - 5)
    yield from () if allowed.most is None else (math.nextafter(allowed.most, INF), allowed.most + 1)
    yield from () if allowed.below is None else (allowed.below, allowed.below + 1)


def refused_by(allowed):
    """Values that a setting with this constraint must refuse."""
    yield from (None, object(), [], {1})
    match allowed:
        case Integer() | Real():
            yield from (*beyond(allowed), "1", (1,))
        case Pair():
            good = allowed.of.least
            yield from ((), (good,), (good,) * 3, good, [good, good], "ab")
            yield from ((bad, good) for bad in beyond(allowed.of))
            yield from ((good, bad) for bad in beyond(allowed.of))
            yield from ((good + 1, good),) if allowed.ascending else ()
        case constraints.Boolean():
            yield from (0, 1, "True", 1.0, ())
        case constraints.Choice():
            first = next(iter(allowed.options))
            yield from ("", "no such word", first.upper(), f"{first} ", 1, tuple(allowed.options))
        case constraints.Text():
            yield from (1, b"text", ("text",), 1.5)
        case constraints.RegularExpression():
            yield from ("(", "*", "[a", 3, ("norm",))
        case constraints.Several():
            good = 1.0 if isinstance(allowed.of, Real) else "fine"
            yield from ("text", (b"1",), (good, None), 3, [good])
            yield from (("fine", "("),) if isinstance(allowed.of, constraints.RegularExpression) else ()
            yield from ((good, bad) for bad in beyond(allowed.of)) if isinstance(allowed.of, Real) else ()
            yield from ((good,) * (allowed.least - 1),) if allowed.least else ()
        case constraints.Multipliers():
            yield from ("head", ("head", 10.0), (("head",),), (("head", 1.0, 2.0),), ((),))
            yield from ((("head", bad),) for bad in (-1.0, NAN, INF, "10", True, 10**400))
            yield from ((("(", 1.0),), ((1, 1.0),), (("head", 1.0), ["norm", 1.0]))
        case constraints.OptimizerName():
            yield from ("", "adam", "optax", "optax.", "optax._src.alias.lion", "torch.optim.Adam", "optax.lion()", 3)
        case constraints.Options():
            yield from ("b1", (("b1", 0.9),), {1: 0.9}, {"b 1": 0.9}, {"b1": NAN}, {"b1": {"b2": 1}}, {"b1": object()})
        case constraints.ClassWeights():
            yield from ("median", "Cityscapes", (), (0.0, 0.0), 3, (1.0, "2"))
            yield from ((1.0, bad) for bad in (-1.0, NAN, INF))
        case _:
            pytest.fail(f"this test has no values that {type(allowed).__name__} refuses; add some")


@pytest.mark.parametrize("key", schema.SETTINGS)
def test_every_value_out_of_range_is_refused_with_its_key(key):
    setting = schema.SETTINGS[key]
    values = [value for value in refused_by(setting.allowed) if not (value is None and setting.optional)]
    assert len(values) > 5
    for value in values:
        problem = only_problem(key, value)
        assert problem is not None and problem.startswith(f"{value!r}; must be "), value


@pytest.mark.parametrize("key", schema.SETTINGS)
def test_the_default_of_every_setting_except_the_model_is_allowed(key):
    setting = schema.SETTINGS[key]
    assert (setting.problem(setting.default) is None) == (key != "model.name")


# What the constraints let through must not follow from the constraints themselves.
PUBLISHED = {
    "optim.lr": (6e-5, 0.01, 1e-6, 0.1, 1),
    "optim.power": (0.9, 1.0, 0.0, 2.0),
    "optim.weight_decay": (0.0, 5e-4, 0.01, 0.05),
    "optim.beta2": (0.999, 0.95, 0.0),
    "optim.eps": (1e-8, 1e-3, 1.0),
    "optim.momentum": (0.0, 0.9, 0.99),
    "optim.warmup_ratio": (0.0, 1e-6, 0.1, 1.0),
    "augment.scale": ((0.5, 2.0), (1.0, 1.0), (0.25, 4.0)),
    "augment.crop": ((512, 1024), (32, 48), (1024, 1024)),
    "train.batch": (1, 8, 12, 4096),
    "train.steps": (0, 20, 160_000),
    "train.ema": (0.0, 0.999, 0.9999),
    "seed": (0, 1, 2**31, 2**32 - 1),
    "eval.scales": ((1.0,), (0.75, 0.875, 1, 1.125, 1.25), (0.5, 2.0)),
    "eval.base_size": (None, (2048, 512), (2048, 640), (512, 2048)),
    "eval.crop": (None, (1024, 1024), (512, 1024)),
    "eval.stride": (None, (768, 768), (341, 1)),
    "eval.size_divisor": (1, 32),
    "label": ("", "segformer-b0", "my run (2)", "größer", "a.b"),
    "data.resident_gb": (None, 0, 2.0, 80.0),
    "data.source": (None, "/data/camvid", "archive.zip"),
    "loss.class_weights": (None, "", "median_frequency", "cityscapes", (1.0, 2.5), [0, 1]),
    "optim.lr_multipliers": ((), (("head", 10.0),), (("head", 2), ("norm", 0.0))),
    "optim.name": ("adamw", "sgd", "optax.lion", "optax.contrib.muon"),
    "optim.options": ({}, {"b1": 0.95, "nesterov": False, "mu_dtype": None}, {"ns_coeffs": (3.4, -4.7, 2.0)}),
    "optim.layer_decay": (1.0, 0.9, 0.65),
    "optim.no_decay": ("", "norm", r"blocks\.\d+"),
    "init.checkpoint": (None, "", "hf:nvidia/mit-b0", "runs/mine"),
    "init.keep": ((), ("decode_head.linear_pred.*",)),
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in PUBLISHED.items() for value in values])
def test_values_used_in_practice_are_allowed(key, value):
    assert only_problem(key, value) is None


@pytest.mark.parametrize(
    "key, value, must_be",
    [
        ("optim.lr", -1.0, "greater than 0 and at most 100"),
        ("optim.lr", 0.0, "greater than 0 and at most 100"),
        ("optim.lr", NAN, "greater than 0 and at most 100"),
        ("optim.lr", 1e-50, "greater than 0 and at most 100 in float32"),
        ("optim.lr", "fast", "a number, greater than 0 and at most 100"),
        ("optim.power", -5.0, "at least 0 and at most 100"),
        ("optim.weight_decay", -1.0, "at least 0 and at most 100"),
        ("optim.eps", -1.0, "greater than 0 and at most 1"),
        ("optim.eps", 0.0, "greater than 0 and at most 1"),
        ("optim.momentum", 2.0, "at least 0 and less than 1"),
        ("optim.beta1", 2.0, "at least 0 and less than 1"),
        ("optim.beta2", 1.0, "at least 0 and less than 1"),
        ("optim.beta2", 0.99999999, "at least 0 and less than 1 in float32"),
        ("optim.clip_norm", NAN, "finite and at least 0"),
        ("optim.clip_norm", 1e300, "finite and at least 0 in float32"),
        ("augment.scale", (1.0, 1e9), "(smallest, largest), each at least 0.01 and at most 100"),
        ("augment.scale", (2.0, 0.5), "(smallest, largest) in this order"),
        ("augment.crop", (8, 512), "(height, width), each at least 32 and at most 16384"),
        ("augment.crop", (512.0, 512), "(height, width), each at least 32 and at most 16384"),
        ("augment.flip", 1.5, "at least 0 and at most 1"),
        ("train.steps", -1, "at least 0"),
        ("train.steps", 2**31, "at most 2147483647"),
        ("train.steps", 20.0, "a whole number, at least 0"),
        ("train.batch", 0, "at least 1 and at most 4096"),
        ("train.batch", True, "a whole number, at least 1 and at most 4096"),
        ("seed", -1, "at least 0 and at most 4294967295"),
        ("seed", 2**32, "at most 4294967295"),
        ("parallel", "vmap", "'jit' or 'pmap'"),
        ("data.name", "cityscape", "'streets', 'camvid', 'cityscapes', 'ade20k', 'voc', 'pet' or 'folder'"),
        ("optim.no_decay", "norm(", "a regular expression (missing ), unterminated subpattern at position 4)"),
    ],
)
def test_a_problem_names_the_value_and_the_allowed_ones(key, value, must_be):
    assert only_problem(key, value) == f"{value!r}; must be {must_be}"


@pytest.mark.parametrize("label", ["../../evil", "a/b", "a\\b", "/", "a\nb", "a\0b", "\x1b[31m"])
def test_a_label_cannot_leave_the_folder_of_runs(label, tmp_path):
    with pytest.raises(config_module.RunError, match=r"config\.label: .*; must be at most 100 printable characters"):
        config_module.check(changed(label=label), tmp_path)


# ------------------------------------------------------------------------------------------------------- a whole config


def test_all_problems_of_a_config_are_in_one_error(tmp_path):
    wrong = {
        "seed": -(10**20),
        "label": "../../evil",
        "optim__lr": -1.0,
        "optim__power": NAN,
        "optim__beta1": 2.0,
        "augment__scale": (1.0, 1e9),
        "augment__crop": (8, 8),
        "train__batch": 0,
        "train__steps": -5,
        "loss__dice": -1.0,
        "eval__patience": 2,
        "init__checkpoint": str(tmp_path / "absent"),
        "model__drop_path_rate": 1.0,
        "model__dropout_rate": NAN,
        "model__name": "segformer_b7",
        "optim__lrr": 1.0,
    }
    with pytest.raises(config_module.RunError) as caught:
        config_module.check(changed(**wrong), tmp_path / "run")
    first, *lines = str(caught.value).splitlines()
    assert first == "the settings cannot be used:"
    assert sorted(line.split(":")[0] for line in lines) == sorted(f"  config.{key.replace('__', '.')}" for key in wrong)
    assert "  config.optim.lr: -1.0; must be greater than 0 and at most 100" in lines
    assert "  config.model.drop_path_rate: 1.0; must be at least 0 and less than 1" in lines
    assert "  config.optim.lrr: no such setting; did you mean config.optim.lr?" in lines
    assert "  config.eval.patience: 2; needs eval.every, the steps between two evaluations" in lines


@pytest.mark.parametrize("key", schema.SETTINGS)
def test_a_config_without_a_setting_is_refused_with_its_key(key, tmp_path):
    config = segformer.get_config("b0,streets")
    *section, last = key.split(".")
    del (config[section[0]] if section else config)[last]
    assert set(schema.missing(config)) == {key}
    with pytest.raises(config_module.RunError, match=rf"config\.{key}: missing; "):
        config_module.check(config, tmp_path)


@pytest.mark.parametrize("name", [section.name for section in schema.SECTIONS if section.name])
@pytest.mark.parametrize("value", ["absent", None, 3])
def test_a_config_without_a_section_is_refused_with_its_name(name, value, tmp_path):
    config = segformer.get_config("b0,streets")
    if value == "absent":
        del config[name]
    else:
        with config.ignore_type():
            config[name] = value
    with pytest.raises(config_module.RunError) as caught:
        config_module.check(config, tmp_path)
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"  config.{name}"))
    assert "missing" in line


def test_settings_of_streets_are_required_only_for_streets(tmp_path):
    assert schema.problems(segformer.get_config("b0,camvid")) == {}
    assert set(schema.missing(changed("camvid", data__name="streets"))) == {
        "data.train_images",
        "data.eval_images",
        "data.size",
    }
    # --config.data.name=camvid leaves those of the streets behind.
    config_module.check(changed(data__name="camvid"), tmp_path)


@pytest.mark.parametrize(
    "key, hint",
    [
        ("optim__lrr", "did you mean config.optim.lr?"),
        ("trian__steps", "did you mean config.train.steps?"),
        ("learning_rate", "no such setting"),
        ("steps", "did you mean config.train.steps?"),
        ("batch", "did you mean config.train.batch or config.eval.batch?"),
        ("init__from_", "it is config.init.checkpoint now"),
    ],
)
def test_an_unknown_setting_is_refused_with_a_suggestion(key, hint):
    config = segformer.get_config("")
    *section, last = key.split("__")
    if section and section[0] not in config:
        config[section[0]] = ConfigDict()
    (config[section[0]] if section else config)[last] = 1
    (problem,) = schema.problems(config).values()
    assert problem.startswith("no such setting") and problem.endswith(hint)


@pytest.mark.parametrize(
    "key, hint",
    [("dimz", r"did you mean model\.dims\? It has dims, depths"), ("nothing_like_it", "it has dims, depths")],
)
def test_an_unknown_setting_of_a_model_is_refused_before_the_run(key, hint, tmp_path):
    config = segformer.get_config("b0,streets")
    config.model[key] = 1
    with pytest.raises(config_module.RunError, match=rf"config\.model\.{key}: no such setting of segformer_b0; {hint}"):
        config_module.check(config, tmp_path)
    config = segformer.get_config("b0,streets")
    config.model.name = "segformer_b7"
    with pytest.raises(
        config_module.RunError, match=r"config\.model\.name: 'segformer_b7'; no such model; did you mean 's"
    ):
        config_module.check(config, tmp_path)


@pytest.mark.parametrize("value", [-0.1, 1.0, NAN, INF, 0.99999999, True, "0.1", None, (0.1,)])
@pytest.mark.parametrize("name", ["drop_path_rate", "dropout_rate"])
def test_a_rate_of_a_model_that_is_not_below_1_is_refused_with_its_key(name, value):
    problem = only_problem(f"model.{name}", value)
    assert problem is not None and problem.startswith(f"{value!r}; must be ") and "less than 1" in problem
    assert only_problem(f"model.{name}", 0.3) is None and only_problem(f"model.{name}", 0) is None


@pytest.mark.parametrize("name", models.MODELS)
def test_the_published_rates_of_every_model_are_allowed(name):
    rates = {key: value for key, value in models.settings(name).items() if key.endswith("_rate")}
    config = segformer.get_config("").to_dict()
    config["model"] = {"name": name, "dtype": "float32"} | rates
    assert schema.problems(config) == {}


# --------------------------------------------------------------------------------------------------- what builds on it


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_default_config_has_every_setting_of_its_dataset(dataset):
    config = schema.default_config(dataset)
    of_scenes = ("data.train_images", "data.eval_images", "data.size")
    expected = {key: schema.SETTINGS[key] for key in schema.SETTINGS if dataset == "streets" or key not in of_scenes}
    values = schema.flattened(config)
    assert values == {key: setting.default for key, setting in expected.items()} | {"data.name": dataset}
    assert set(schema.problems(config)) == {"model.name"}


def test_a_default_config_keeps_the_types_of_settings():
    config = schema.default_config("streets")
    for key, setting in schema.SETTINGS.items():
        *section, last = key.split(".")
        assert (config[section[0]] if section else config).get_type(last) is setting.allowed.kind, key
    with pytest.raises(TypeError):
        config.train.steps = 1.5
    with pytest.raises(TypeError):
        config.data.source = 3


@pytest.mark.parametrize("key", schema.SETTINGS)
def test_every_setting_is_described_in_a_sentence(key):
    setting = schema.SETTINGS[key]
    assert setting.text[0].isupper() or setting.text.startswith("("), key
    assert setting.text.endswith(".") and "\n" not in setting.text and 8 < len(setting.text) < 260
    assert setting.allowed.words and "\n" not in setting.allowed.words


def test_a_run_with_the_old_name_of_a_setting_is_resumed(tmp_path):
    now = config_module.plain(segformer.get_config("b0,streets"))
    before = json.loads(json.dumps(now))
    before["init"]["from_"] = before["init"].pop("checkpoint")
    config_module.refuse_other_run({"config": before}, {"config": now}, tmp_path)
    assert "from_" in before["init"]
    before["init"]["from_"] = "mit_b0.pth"
    with pytest.raises(config_module.RunError, match=r"config\.init\.checkpoint: mit_b0\.pth in the run,  now"):
        config_module.refuse_other_run({"config": before}, {"config": now}, tmp_path)


def test_the_schema_and_the_recipes_are_read_without_jax():
    code = """if True:
        import sys
        from segjax.train import schema
        from segjax import recipes
        for name in recipes.RECIPES:
            assert not schema.problems(recipes.load(name))
        print(*sorted({"jax", "flax", "optax", "tensorflow", "torch"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""The start of a run: settings read from checkpoints, runs that resume without them, and older runs."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from segjax import models, recipes, save, to_torch
from segjax.checkpoints import layout, orbax_folder
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.initialize import read_settings, recipe_of
from segjax.checkpoints.load import load
from segjax.checkpoints.state_dict import named_variables, settings_of, torch_name
from segjax.commands import evaluate
from segjax.commands import train as command
from segjax.train import resume, schema, setup
from segjax.train.config import RunError, plain, refuse_other_run
from segjax.train.start import fitted, resumed_config
from tests.runs import cheap_step, make_config, result_of, run
from tests.tiny import FAMILIES, abstract_family, tiny_model

# Sizes that no variant has, of models that can be built.
ODD = {
    "segformer": dict(dims=(8, 12, 20, 24), depths=(1, 2, 1, 1), decoder_dim=20, sr_ratios=(4, 2, 2, 1)),
    "plain with norm": dict(dims=(8, 12, 20, 24), mlp_ratios=(2, 3, 4, 1), decoder_dim=10),
    "mmseg": dict(dims=(8, 12, 20, 24), depths=(2, 1, 1, 1), decoder_dim=20),
    "simple": dict(dims=(8, 12, 20, 24), decoder_dim=20),
    "zuppichini": dict(dims=(8, 8, 20, 24), num_heads=(1, 2, 4, 8), depths=(1, 1, 2, 1), decoder_dim=24),
    "hrnet": dict(width=3, stage1_channels=6, stage_modules=(1, 1, 2, 1), stage_blocks=(1, 2, 1, 1)),
    "ocr": dict(width=3, stage_modules=(1, 2, 1, 1), ocr_channels=12, ocr_key_channels=6),
    "segnext": dict(dims=(8, 12, 20, 24), depths=(1, 1, 2, 1), ham_channels=64, ham_rank=16),
}
# Dialects, and what the key format adds: settings that no array contains.
READ = [
    ("segformer", "native", {}),
    ("segformer", "hf", {"block_norm_eps": 1e-5}),
    ("segformer", "smp", {}),
    ("plain with norm", "segmentation_pytorch", {}),
    ("mmseg", "mmseg", {}),
    ("simple", "native", {}),
    ("zuppichini", "native", {}),
    ("hrnet", "native", {}),
    ("hrnet", "mmseg", {}),
    ("ocr", "native", {}),
    ("ocr", "mmseg", {"align_corners": False}),
    ("segnext", "native", {}),
    ("segnext", "mmseg", {}),
    ("segnext", "cvpytorch", {"ham_rank": 64}),
]
RECIPE_OF = {
    **{"segformer": "segformer:b0", "plain with norm": "segformer:plain_b0", "mmseg": "segformer:mmseg_b0"},
    **{"simple": "segformer_simple:small", "zuppichini": "segformer_zuppichini:small"},
    **{"hrnet": "hrnet:small", "ocr": "hrnet:small_ocr", "segnext": "segnext:small"},
}


def odd_model(family, seed=1, **others):
    return tiny_model(seed, family, **ODD[family] | others)


def saved(path, arrays):
    save_file(arrays, path)
    return path


def config_for(family, path, **changes):
    """The config of a packaged recipe that starts from a checkpoint."""
    config = recipes.load(RECIPE_OF[family])
    config.init.checkpoint = str(path)
    config.model.update(changes)
    return config


def effective(config):
    """All settings of the model of a config, without rates."""
    settings = models.settings(config.model.name) | {
        key: value for key, value in config.model.items() if key not in ("name", "dtype")
    }
    return {key: value for key, value in settings.items() if not key.endswith("_rate")}


def without_rates(settings):
    return {key: value for key, value in settings.items() if not key.endswith("_rate")}


# ----------------------------------------------------------------------------------------------- settings that are read


@pytest.mark.parametrize("family, dialect, assumed", READ)
def test_the_settings_of_a_model_are_read_from_the_checkpoint(family, dialect, assumed, tmp_path, capsys):
    source = odd_model(family)
    path = saved(tmp_path / "a.safetensors", to_torch(source, dialect=dialect))
    config = config_for(family, path)
    before = copy.deepcopy(config.to_dict())
    found = fitted(config, read_checkpoint(path), given=())
    assert effective(found) == without_rates(settings_of(source)) | assumed
    rates = {key: value for key, value in before["model"].items() if key.endswith("_rate")}
    assert {key: found.model[key] for key in rates} == rates
    # A copy, which differs in the model only.
    assert config.to_dict() == before
    assert {**found.to_dict(), "model": None} == {**before, "model": None}
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("model settings from the checkpoint: ")
    for key, value in effective(found).items():
        assert (f"{key}={value}" in said) == (value != effective(config)[key])


@pytest.mark.parametrize("family", ["segformer", "mmseg", "hrnet", "ocr", "segnext"])
def test_an_encoder_gives_only_the_sizes_of_the_encoder(family, tmp_path):
    path = saved(tmp_path / "a.safetensors", to_torch(odd_model(family), dialect="backbone"))
    config = config_for(family, path)
    found, before = effective(fitted(config, read_checkpoint(path), given=())), effective(config)
    of_decoder = {"decoder_dim", "ham_channels", "ham_rank", "ocr_channels", "ocr_key_channels", "align_corners"}
    expected = settings_of(odd_model(family))
    assert found == {key: before[key] if key in of_decoder else expected[key] for key in before}


def test_a_decoder_that_stays_random_has_the_sizes_of_the_config(tmp_path):
    path = saved(tmp_path / "a.safetensors", to_torch(odd_model("segformer")))
    config = config_for("segformer", path)
    config.init.keep = ("decode_head.*",)
    found = fitted(config, read_checkpoint(path), given=())
    assert found.model.dims == ODD["segformer"]["dims"] and "decoder_dim" not in found.model
    config.init.keep = ("decode_head.linear_pred.*",)
    assert fitted(config, read_checkpoint(path), given=()).model.decoder_dim == 20


def test_metadata_of_segjax_are_exact_except_for_rates(tmp_path):
    source = odd_model("zuppichini", drop_path_rate=0.4)
    heads = tiny_model(3, "zuppichini", **ODD["zuppichini"] | dict(num_heads=(2, 4, 5, 4)))
    for model, name in ((source, "folder"), (heads, "other")):
        save(model, tmp_path / name)
    config = config_for("zuppichini", tmp_path / "other")
    found = fitted(config, read_checkpoint(tmp_path / "other"), given=())
    # The key format would have (1, 2, 4, 8), and the recipe has (1, 2, 5, 8).
    assert found.model.num_heads == (2, 4, 5, 4)
    with pytest.raises(RunError, match=r"num_heads: \(1, 2, 5, 8\) is given, the checkpoint has \(2, 4, 5, 4\)"):
        fitted(config, read_checkpoint(tmp_path / "other"), given=("num_heads",))
    found = fitted(config, read_checkpoint(tmp_path / "folder"), given=())
    assert (found.model.num_heads, found.model.drop_path_rate) == ((1, 2, 4, 8), 0.0)


def test_a_setting_that_contradicts_the_checkpoint_is_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", to_torch(odd_model("segnext"), dialect="mmseg"))
    config = config_for("segnext", path, dims=(8, 12, 20, 28), ham_rank=24)
    with pytest.raises(RunError) as caught:
        fitted(config, read_checkpoint(path), given=("dims", "depths", "ham_rank"))
    assert str(caught.value).splitlines() == [
        f"{path} does not fit the settings of the model:",
        "  config.model.dims: (8, 12, 20, 28) is given, the checkpoint has (8, 12, 20, 24)",
        "  config.model.depths: (2, 2, 3, 2) is given, the checkpoint has (1, 1, 2, 1)",
        "  omit these settings to read them from the checkpoint, or start from another one",
    ]
    # A rank is in no array: what the key format publishes yields to what is given.
    found = fitted(config, read_checkpoint(path), given=("ham_rank",))
    assert (found.model.ham_rank, found.model.dims) == (24, (8, 12, 20, 24))
    assert fitted(config, read_checkpoint(path), given=()).model.ham_rank == 16
    # By default everything in config.model is given.
    with pytest.raises(RunError, match="dims"):
        fitted(config, read_checkpoint(path), given=None)


@pytest.mark.parametrize(
    "source, target, recipe, has_encoder",
    [
        ("mmseg", "segformer", "segformer:mmseg_b0", True),
        ("segformer", "mmseg", "segformer:b0", True),
        ("plain with norm", "segformer", "segformer:plain_b0", True),
        ("ocr", "hrnet", "hrnet:w18_ocr", True),
        ("hrnet", "ocr", "hrnet:w18", True),
        ("segnext", "hrnet", "segnext:t", False),
        ("simple", "segformer", "segformer_simple", False),
    ],
)
def test_a_checkpoint_of_another_family_is_refused_with_the_right_recipe(source, target, recipe, has_encoder, tmp_path):
    path = saved(tmp_path / "a.safetensors", to_torch(tiny_model(1, source)))
    config = config_for(target, path)
    with pytest.raises(CheckpointError) as caught:
        fitted(config, read_checkpoint(path), given=())
    first, *advice = str(caught.value).splitlines()
    assert first.startswith(f"{path}: it is ") and f"and {config.model.name} is " in first
    assert advice[0] == f"  to train that model: --config {recipe}"
    assert len(advice) == 1 + has_encoder
    if has_encoder:
        (text,) = re.findall(r'^  to start from its encoder only: "--config\.init\.keep=(.*)"$', advice[1])
        config.init.keep = eval(text)
        found = fitted(config, read_checkpoint(path), given=())
        sizes = ("width", "stage_modules") if "hrnet" in config.model.name else ("dims", "depths")
        assert {key: found.model[key] for key in sizes} == {key: FAMILIES[source][1][key] for key in sizes}


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_has_a_recipe(name):
    variant = {"segformer_simple": ":default", "segformer_zuppichini": ":article"}.get(name, "")
    assert recipes.load(recipe_of(name) + variant).model.name == name


def test_the_rank_that_segnext_publishes_depends_on_its_size():
    b = dict(models.settings("segnext_b"))
    model = abstract_family("segnext", dims=b["dims"], depths=b["depths"], mlp_ratios=b["mlp_ratios"])
    shapes = {path: variable.get_value().shape for path, variable in named_variables(model).items()}
    checkpoint = Checkpoint({torch_name(path): layout.blank_of(path, shape) for path, shape in shapes.items()})
    assert read_settings(checkpoint, "segnext_t").assumed == {"ham_rank": 64}
    small = Checkpoint(to_torch(odd_model("segnext")))
    assert read_settings(small, "segnext_b").assumed == {"ham_rank": 16}


# --------------------------------------------------------------------------------------------------- what was given


MINE = """
from segjax.recipes import segnext

def get_config(argument=""):
    config = segnext.get_config(argument)
    config.model.dims = (8, 12, 20, 24)
    config.model.drop_path_rate = 0.25
    return config
"""


@pytest.mark.parametrize(
    "arguments, given",
    [
        (["--config=segnext:small"], set()),
        (["--config=segnext:l,camvid"], set()),
        (["--config=configs/hrnet.py:small_ocr"], set()),
        (["--config=segnext:small", "--config.model.dims=(16,32,80,128)"], {"dims"}),
        (["--config=segnext:t", "--config.model.ham_channels", "128"], {"ham_channels"}),
        (["--config=hrnet:w48", "--noconfig.model.align_corners"], {"align_corners"}),
        (["--config=MINE:small"], {"dims", "drop_path_rate"}),
        (["--config=MINE:small", "--config.model.depths=(1,1,1,1)"], {"dims", "depths", "drop_path_rate"}),
    ],
)
def test_settings_on_the_command_line_and_in_config_files_are_explicit(arguments, given, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    arguments = [argument.replace("MINE", str(tmp_path / "mine.py")) for argument in arguments]
    seen = []
    monkeypatch.setattr("segjax.train.loop.train", lambda *_, given, changes: seen.append(given) or 0)
    assert command.main([*arguments, "--config.init.checkpoint=x.pth"]) == 0
    assert seen == [frozenset(given)]


# ---------------------------------------------------------------------------------------------- runs, from end to end


@pytest.fixture
def cheap(monkeypatch):
    cheap_step(monkeypatch)


def start_of(printed):
    (line,) = re.findall(r"^start\s+(.*(?:\n(?!device|data|images|steps|workdir).*)*)", printed, re.MULTILINE)
    return " ".join(line.split())


def test_a_run_resumes_without_its_initial_checkpoint(cheap, tmp_path, capsys):
    source = odd_model("segformer", num_classes=7)
    path = tmp_path / "odd.safetensors"
    save(source, path, dialect="hf")
    recipe = ["--config=segformer:b0", f"--config.init.checkpoint={path}", f"--workdir={tmp_path / 'run'}"]
    recipe += ["--config.data.train_images=7", "--config.data.eval_images=5", "--config.data.size=(40,64)"]
    recipe += ["--config.augment.crop=(32,48)", "--config.train.batch=4", "--config.eval.batch=4"]
    recipe += ["--config.eval.pictures=0", "--config.checkpoint.every=2"]
    assert command.main([*recipe, "--config.train.steps=2"]) == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert "model settings from the checkpoint: " in text and "depths=(1, 2, 1, 1)" in text
    assert "the checkpoint has 7 classes, the data 19: decode_head.linear_pred stays random" in text
    assert start_of(printed) == f"{path}: all weights, classifier random (7 classes there, 19 here)"
    recorded = result_of(tmp_path / "run")["config"]
    assert (recorded["model"]["dims"], recorded["model"]["decoder_dim"]) == ([8, 12, 20, 24], 20)

    path.unlink()
    finished = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").unlink()
    assert command.main([*recipe, "--config.train.steps=4"]) == 0
    printed = capsys.readouterr().out
    assert start_of(printed) == "step 2 of this run, which began with odd.safetensors"
    result = result_of(tmp_path / "run")
    assert result["step"] == 4 and result["config"]["model"] == finished["config"]["model"]
    assert command.main([*recipe, "--config.train.steps=4"]) == 0
    assert "run is finished: mIoU" in " ".join(capsys.readouterr().out.split())
    # A size that is given, and not that of the run, makes it another run.
    assert command.main([*recipe, "--config.train.steps=4", "--config.model.decoder_dim=24"]) == 2
    assert "config.model.decoder_dim: 20 in the run, 24 now" in capsys.readouterr().err

    assert evaluate.main([str(tmp_path / "run"), f"--output={tmp_path / 'report'}"]) == 0
    assert "exactly as in" in capsys.readouterr().out
    loaded = load(tmp_path / "run").model
    assert without_rates(settings_of(loaded)) == without_rates(settings_of(source)) and loaded.spec.num_classes == 19
    # The folder of a run is a start too.
    found = fitted(config_for("segformer", tmp_path / "run"), read_checkpoint(tmp_path / "run"), given=())
    assert effective(found) == without_rates(settings_of(source))


def test_a_run_prints_random_weights_and_warns_of_shared_images(cheap, tmp_path):
    config = make_config(train__steps=1, data__train_split="train+val", data__eval_split="val")
    _, printed = run(config, tmp_path)
    assert start_of(printed) == "random weights"
    text = " ".join(printed.split())
    assert "14 to train on (train+val), 5 to evaluate (val)" in text
    assert "warning: the run evaluates on images that it trains on: both splits contain val" in text
    _, printed = run(make_config(train__steps=2, data__train_split="train+val", data__eval_split="val"), tmp_path)
    assert start_of(printed) == "step 1 of this run, which began with random weights"


# ----------------------------------------------------------------------------------------------- runs of older versions


def test_a_setting_missing_from_a_recorded_config_has_its_default():
    now = plain(make_config())
    old = copy.deepcopy(now)
    for key in ("augment.photometric", "eval.patience", "optim.frozen", "data.cache_gb", "parallel"):
        section, _, last = key.rpartition(".")
        del (old[section] if section else old)[last]
    del old["debug"], old["init"]
    old["init"] = {"from_": ""}
    filled = schema.in_current_terms(old)
    flat = schema.flattened(filled)
    assert flat["optim.frozen"] == [] and flat["parallel"] == "jit" and flat["augment.photometric"] is True
    assert set(flat) == set(schema.flattened(now))
    assert "photometric" not in old["augment"] and "debug" not in old


def test_an_older_run_is_refused_if_a_new_setting_is_not_the_default(tmp_path):
    now = plain(make_config(augment__photometric=True))
    old = copy.deepcopy(now)
    del old["augment"]["photometric"], old["loss"]["dice"], old["model"]["drop_path_rate"]
    now["model"]["decoder_dim"] = old["model"].pop("decoder_dim")
    now["model"]["drop_path_rate"] = 0.1
    with pytest.raises(RunError) as caught:
        refuse_other_run({"config": old}, {"config": now}, tmp_path)
    assert str(caught.value).splitlines()[1:-1] == ["  config.model.decoder_dim: 256 in the run, 12 now"]
    now["model"]["decoder_dim"] = 256
    refuse_other_run({"config": old}, {"config": now}, tmp_path)
    now["loss"]["dice"] = 0.5
    with pytest.raises(RunError, match=r"config\.loss\.dice: 0\.0 in the run, 0\.5 now"):
        refuse_other_run({"config": old}, {"config": now}, tmp_path)


def test_a_run_recorded_without_a_setting_resumes_bit_for_bit(cheap, tmp_path, monkeypatch):
    def older_metadata(config, *parts, original=setup.run_metadata):
        config = copy.deepcopy(config)
        del config["augment"]["flip"], config["train"]["may_skip"], config["loss"]["dice"], config["eval"]["patience"]
        del config["debug"]
        return original(config, *parts)

    for name, steps in (("old", 4), ("whole", 6)):
        with monkeypatch.context() as patch:
            if name == "old":
                patch.setattr(setup, "run_metadata", older_metadata)
            assert run(make_config(train__steps=steps, augment__flip=0.5), tmp_path / name)[0] == 0
    assert "flip" not in result_of(tmp_path / "old")["config"]["augment"]
    assert "debug" not in orbax_folder.load_metadata(tmp_path / "old")["config"]
    status, printed = run(make_config(augment__flip=0.5), tmp_path / "old")
    assert status == 0 and "resuming at step 4 of 6" in printed
    assert result_of(tmp_path / "old")["params_sha256"] == result_of(tmp_path / "whole")["params_sha256"]
    assert result_of(tmp_path / "old")["config"]["augment"]["flip"] == 0.5
    with pytest.raises(RunError, match=r"config\.augment\.flip: 0\.5 in the run, 0\.25 now"):
        run(make_config(augment__flip=0.25, train__steps=8), tmp_path / "old")


def test_settings_of_a_resumed_run_come_from_its_recorded_config(tmp_path):
    path = saved(tmp_path / "a.safetensors", to_torch(odd_model("ocr"), dialect="mmseg"))
    config = config_for("ocr", path)
    first = fitted(config, read_checkpoint(path), given=())
    assert resumed_config(config, plain(first), given=()).to_dict() == first.to_dict()
    # Not where another checkpoint or none is named: that is another run.
    other = config_for("ocr", tmp_path / "b.safetensors")
    assert resumed_config(other, plain(first), given=()).to_dict() == other.to_dict()
    kept = resumed_config(config, plain(first), given=("align_corners",))
    assert kept.model.align_corners is True and first.model.align_corners is False


def test_the_recorded_config_is_that_of_the_newest_intact_checkpoint(tmp_path):
    assert resume.recorded_config(tmp_path) is None
    weights = {"a": np.zeros(3, np.float32)}
    for step in (3, 12, 20):
        orbax_folder.save_weights(tmp_path / "checkpoints" / str(step), weights, metadata={"config": {"seed": step}})
    assert resume.recorded_config(tmp_path) == {"seed": 20}
    shutil.rmtree(tmp_path / "checkpoints" / "20" / "about")
    assert resume.recorded_config(tmp_path) == {"seed": 12}
    scores = {"step": 20, "mean_iou": None, "pixel_accuracy": None, "per_class_iou": []}
    (tmp_path / "result.json").write_text(json.dumps({"config": {"seed": 7}, "format_version": 1, **scores}))
    assert resume.recorded_config(tmp_path)["seed"] == 7

"""`segjax train`: flags, help, and errors for a mistyped command line; nothing here trains for long."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from segjax import recipes
from segjax.commands import train
from segjax.data.specs import DATASETS
from segjax.train import config as train_config
from segjax.train import schema
from tests.tiny import SIZES

REPO = Path(__file__).parents[2]
SMALL = (
    "--config.data.train_images=4",
    "--config.data.eval_images=3",
    "--config.data.size=(32,64)",
    "--config.augment.crop=(32,64)",
    "--config.train.batch=4",
    "--config.train.log_every=1",
    "--config.eval.batch=4",
    "--config.eval.pictures=1",
    "--config.train.steps=2",
)


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(REPO)


@pytest.fixture
def no_run(monkeypatch):
    """Whatever main would run is returned instead."""
    started = []
    monkeypatch.setattr(train, "_run", lambda options: started.append(options) or 0)
    return started


def refused(arguments, capsys):
    """What is said of a command line that cannot be used: one line, with status 2 and nothing on stdout."""
    status = train.main(list(arguments))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("segjax train: ") and len(err.splitlines()) == 1
    return err.removeprefix("segjax train: ").strip()


# -------------------------------------------------------------------------------------------------------------- flags


def test_without_arguments_the_default_recipe_is_used(no_run):
    assert train.main([]) == 0
    (options,) = no_run
    assert options.config.to_dict() == recipes.load("segformer").to_dict()
    assert options[2:] == (None, None, None, None, frozenset())


@pytest.mark.parametrize("reference", ["hrnet:w48_ocr,camvid", "configs/hrnet.py:w48_ocr,camvid"])
@pytest.mark.parametrize("spelled", ["--config={}", "-config={}", "--config {}"])
def test_the_config_flag_takes_a_recipe_or_a_file(spelled, reference):
    options = train.parse(spelled.format(reference).split(" "))
    assert options.config.to_dict() == recipes.load("hrnet:w48_ocr,camvid").to_dict()


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--config.optim.lr=1e-4"], "optim.lr", 1e-4),
        (["--config.optim.lr", "1e-4"], "optim.lr", 1e-4),
        (["-config.optim.lr=3"], "optim.lr", 3.0),
        (["--config.optim.end_lr", "-1"], "optim.end_lr", -1.0),
        (["--config.train.steps=20", "--config.train.steps=30"], "train.steps", 30),
        (["--config.augment.crop=(64,96)"], "augment.crop", (64, 96)),
        (["--config.augment.crop=64", "--config.augment.crop=96"], "augment.crop", (64, 96)),
        (["--config.augment.photometric"], "augment.photometric", True),
        (["--config.augment.photometric=true"], "augment.photometric", True),
        (["--noconfig.train.remat"], "train.remat", False),
        (["--config.data.source=/data/x"], "data.source", "/data/x"),
        (["--config.data.source=a=b"], "data.source", "a=b"),
        (["--config.init.checkpoint=mit_b0.pth"], "init.checkpoint", "mit_b0.pth"),
        (["--config.init.keep=('decode_head.*',)"], "init.keep", ("decode_head.*",)),
        (["--config.optim.frozen=('patch_embed','block1')"], "optim.frozen", ("patch_embed", "block1")),
        (["--config.optim.lr_multipliers=(('head',3.0),)"], "optim.lr_multipliers", (("head", 3.0),)),
        (["--config.optim.options={'b1': 0.95}"], "optim.options", {"b1": 0.95}),
        (["--config.optim.name=optax.lion"], "optim.name", "optax.lion"),
        (["--config.loss.class_weights=median_frequency"], "loss.class_weights", "median_frequency"),
        (["--config.loss.class_weights=(1.0, 2.5)"], "loss.class_weights", (1.0, 2.5)),
        (["--config.model.drop_path_rate=0.25"], "model.drop_path_rate", 0.25),
        (["--config.seed=7"], "seed", 7),
        (["--config.label=mine"], "label", "mine"),
    ],
)
def test_every_kind_of_setting_is_a_flag(arguments, key, value):
    for order in ([*arguments, "--config=segformer:b1"], ["--config", "segformer:b1", *arguments]):
        config = train.parse(order).config
        assert config.model.name == "segformer_b1"
        assert schema.flattened(config)[key] == value
        default = schema.flattened(recipes.load("segformer:b1"))
        assert {name for name, entry in schema.flattened(config).items() if entry != default[name]} <= {key}


@pytest.mark.parametrize(
    "recipe, argument, key, value",
    [
        ("segformer:b2", "--config.model.decoder_dim=512", "decoder_dim", 512),
        ("segformer:b0", "--config.model.depths=(2,2,2,3)", "depths", (2, 2, 2, 3)),
        ("segformer:b0,camvid", "--config.model.mlp_ratios=(4,3.5,4,2)", "mlp_ratios", (4, 3.5, 4, 2)),
        ("segformer:plain_b1", "--config.model.fuse=conv_bn", "fuse", "conv_bn"),
        ("segformer:mmseg_b1", "--config.model.patch_norm_eps=1e-5", "patch_norm_eps", 1e-5),
        ("segformer_simple", "--config.model.num_heads=(1,2,4,8)", "num_heads", (1, 2, 4, 8)),
        ("hrnet:w48_ocr", "--config.model.ocr_channels=256", "ocr_channels", 256),
        ("hrnet:w18", "--noconfig.model.align_corners", "align_corners", False),
        ("segnext:t", "--config.model.ham_rank=24", "ham_rank", 24),
        ("configs/segnext.py:t", "--config.model.ham_channels=96", "ham_channels", 96),
    ],
)
def test_every_setting_of_the_model_is_a_flag(recipe, argument, key, value, tmp_path):
    for arguments in ([argument], argument.split("=", 1)):
        options = train.parse([f"--config={recipe}", *arguments])
        assert options.config.model[key] == value and options.model_flags == {key}
        assert type(options.config.model[key]) is type(value)
        rest = options.config.to_dict() | {"model": None}
        assert rest == recipes.load(recipe).to_dict() | {"model": None}
    train_config.check(options.config, tmp_path)


def test_a_model_setting_may_belong_to_the_model_named_on_the_command_line():
    options = train.parse(["--config.model.name", "segnext_t", "--config.model.ham_rank=24"])
    assert (options.config.model.name, options.config.model.ham_rank) == ("segnext_t", 24)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--config.model.dims=(8,16)", "(8, 16); must be 4 numbers, as in DIMS"),
        (
            "--config.model.dims=(8,16,32,6.5)",
            "(8, 16, 32, 6.5); must be 4 numbers, as in DIMS",
        ),
        ("--config.model.dims=narrow", "('narrow',); must be 4 numbers, as in DIMS"),
        (
            "--config.model.mlp_ratios=(4,4,4,True)",
            "(4, 4, 4, True); must be 4 numbers, as in RATIOS",
        ),
    ],
)
def test_a_model_setting_of_another_type_is_refused_with_its_default(argument, said, tmp_path):
    options = train.parse([argument])
    with pytest.raises(train_config.RunError) as caught:
        train_config.check(options.config, tmp_path)
    key = argument.removeprefix("--config.").partition("=")[0]
    said = said.replace("DIMS", "the default, (32, 64, 160, 256)").replace("RATIOS", "the default, (4, 4, 4, 4)")
    assert str(caught.value).splitlines()[1:] == [f"  config.{key}: {said}"]


def test_flags_other_than_settings_are_returned():
    arguments = ["--workdir=runs/x", "--coordinator", "auto", "--num_processes=4", "--process_id=3"]
    assert train.parse(arguments)[2:6] == ("runs/x", "auto", 4, 3)


@pytest.mark.parametrize("spelled", ["--flagfile={}", "-flagfile={}", "--flagfile {}"])
def test_flag_files_are_refused_without_opening_them(spelled, tmp_path, capsys):
    (tmp_path / "flags").write_text("--config.seed=2\n")
    os.mkfifo(tmp_path / "fifo")
    for name in ("flags", "fifo", "missing"):
        said = refused(spelled.format(tmp_path / name).split(), capsys)
        assert said.startswith("there is no flag --flagfile; ") and "--config" in said


def test_parsing_a_command_line_does_not_affect_the_next():
    argv, defined = list(sys.argv), set(flags.FLAGS)
    first = train.parse(["--config.optim.lr=0.5", "--workdir=a"])
    second = train.parse([])
    assert (first.config.optim.lr, first.workdir) == (0.5, "a")
    assert (second.config.optim.lr, second.workdir) == (recipes.load("segformer").optim.lr, None)
    assert sys.argv == argv and set(flags.FLAGS) == defined


# -------------------------------------------------------------------------------------------------- mistyped commands


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--steps=20", "there is no flag --steps; did you mean --config.train.steps?"),
        ("--lr=1e-4", "there is no flag --lr; did you mean --config.optim.lr?"),
        ("--batch=4", "there is no flag --batch; did you mean --config.train.batch or --config.eval.batch?"),
        ("--log-every=4", "there is no flag --log-every; did you mean --config.train.log_every?"),
        ("--optim.lr=1", "there is no flag --optim.lr; did you mean --config.optim.lr?"),
        ("--warmup_step=4", "there is no flag --warmup_step; did you mean --config.optim.warmup_steps?"),
        ("--workdri=x", "there is no flag --workdri; did you mean --workdir?"),
        ("--process-id=0", "there is no flag --process-id; did you mean --process_id?"),
        ("--conifg=segformer", "there is no flag --conifg; did you mean --config?"),
        ("--xyz", "there is no flag --xyz"),
        ("--config.trian.steps=3", "--config.trian.steps: no such setting; did you mean --config.train.steps?"),
        ("--config.steps=3", "--config.steps: no such setting; did you mean --config.train.steps?"),
        ("--config.xyz=3", "--config.xyz: no such setting"),
        ("--config.init.from=x", "--config.init.from: no such setting; it is --config.init.checkpoint now"),
        ("--config.model.dropout=0", "--config.model.dropout: no such setting of segformer_b0; did you mean "
         "--config.model.dropout_rate? It has dims, depths, decoder_dim, "),
        ("--config.model.xyz=0", "--config.model.xyz: no such setting of segformer_b0; it has dims, depths, "),
        ("--config.model.decoder_dim=x", "--config.model.decoder_dim=x: must be like the default, 256"),
        ("--config.model.block_norm_eps=x", "--config.model.block_norm_eps=x: must be like the default, 1e-06"),
        ("--config.train.steps=many", "--config.train.steps=many: must be a whole number, at least 0"),
        ("--config.train.steps=2.5", "--config.train.steps=2.5: must be a whole number, at least 0"),
        ("--config.optim.lr=fast", "--config.optim.lr=fast: must be a number, greater than 0 and at most 100"),
        ("--config.train.remat=maybe", "--config.train.remat=maybe: must be True or False"),
        ("--config.augment.crop=(64, ", "--config.augment.crop=(64, : must be (height, width), each at least 32"),
        ("--config.model.drop_path_rate=x", "--config.model.drop_path_rate=x: must be like the default, 0.1"),
        ("--num_processes=two", "--num_processes=two: must be a whole number, at least 0 and at most 1,000,000"),
        ("--process_id=-1", "--process_id=-1: must be a whole number, at least 0 and at most 1,000,000"),
        ("--config.train=x", "--config.train=x: train is a section of settings; give one of them, as in"),
        ("--config.augment=5", "--config.augment=5: augment is a section of settings; give one of them, as in"),
        ("--config.train", "--config.train=: train is a section of settings; give one of them, as in"),
        ("--config.optim=" + 200 * "(", "--config.optim=(((((((((("),
        ("--config.=3", "--config.: no such setting; a setting is --config.KEY=VALUE, see --help"),
        ("--config.augment.crop[0]=3", "--config.augment.crop[0]: no such setting; a setting is --config.KEY=VALUE"),
        ("--undefok=stepz", "there is no flag --undefok; "),
        ("--workdir=", "--workdir: the value is empty; a shell variable may be unset"),
        ("--coordinator=", "--coordinator: the value is empty; a shell variable may be unset"),
        ("--config", "--config needs a recipe or a file, as in --config segformer:b2,camvid"),
        ("--config=", "--config needs a recipe or a file, as in --config segformer:b2,camvid"),
        ("--config=segfromer", "segfromer: no such file or recipe; did you mean segformer?"),
        ("--config=segformer:b9", "segformer:b9: 'b9' is not a variant (b0, "),
        ("--config=configs/nothing.py", "configs/nothing.py: no such file or recipe"),
        ("segformer:b2", "unexpected argument 'segformer:b2'; did you mean --config segformer:b2?"),
        ("configs/hrnet.py", "unexpected argument 'configs/hrnet.py'; did you mean --config configs/hrnet.py?"),
        ("config.train.steps=3", "unexpected argument 'config.train.steps=3'; settings are flags, as in --config."),
    ],
)  # fmt: skip
def test_a_mistyped_argument_is_reported_in_one_line(argument, said, capsys, no_run):
    message = refused([argument], capsys)
    assert message.startswith(said)
    assert no_run == []


@pytest.mark.parametrize("key", schema.SETTINGS)
def test_the_bare_name_of_a_setting_is_refused_with_its_flag(key, capsys):
    message = refused([f"--{key.rpartition('.')[2]}=1"], capsys)
    assert re.search(rf"did you mean .*--config\.{re.escape(key)}\b", message)


def test_settings_of_another_dataset_are_refused(capsys):
    said = refused(["--config=segformer:camvid", "--config.data.size=(64,64)"], capsys)
    assert said == "--config.data.size: no such setting here; only generated datasets have it"


def test_a_replaced_section_must_be_complete(capsys):
    assert train.main(["--config.optim={'lr': 1.0}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "segjax train: the settings cannot be used:"
    assert "  config.optim.power: missing; the default is 1.0" in lines


def test_a_config_file_with_an_error_is_refused_with_the_line(tmp_path, capsys, no_run):
    (tmp_path / "mine.py").write_text("x = 1\nx = = 2\n")
    assert refused([f"--config={tmp_path / 'mine.py'}:b2"], capsys) == f"{tmp_path / 'mine.py'}:2: invalid syntax"
    assert no_run == []


# --------------------------------------------------------------------------------------------------------------- help


@pytest.fixture(scope="module")
def help_text():
    return train.help_text()


@pytest.mark.parametrize("word", ["--help", "-h", "-help", "--helpfull"])
def test_help_is_printed_despite_other_errors(word, capsys, help_text):
    assert train.main(["--steps=20", word, "--config=nothing"]) == 0
    assert capsys.readouterr().out == help_text + "\n"


@pytest.mark.parametrize("key", schema.SETTINGS)
def test_help_lists_every_setting_with_its_default_and_text(key, help_text):
    setting = schema.SETTINGS[key]
    block = re.search(rf"^  --config\.{re.escape(key)}=(.*)\n((?:      .*\n?)+)", help_text, flags=re.MULTILINE)
    assert setting.text in " ".join(block[2].split())
    default = block[1]
    if setting.default is None:
        assert default == ""
    elif isinstance(setting.default, str):
        assert default == setting.default
    else:
        assert ast.literal_eval(default.strip('"')) == setting.default


def test_defaults_copied_from_help_are_flags_that_change_nothing(help_text):
    lines = [line.strip() for line in help_text.splitlines() if line.startswith("  --config.")]
    assert len(lines) == len(schema.SETTINGS)
    (typed,) = (line for line in lines if "lr_multipliers" in line)
    assert typed == """--config.optim.lr_multipliers="(('head', 10.0),)\""""
    arguments = [line.replace('"', "") for line in lines if not line.endswith("=")]
    config = train.parse(arguments).config
    for argument in arguments:
        key = argument.removeprefix("--config.").partition("=")[0]
        assert schema.flattened(config)[key] == schema.SETTINGS[key].default


def test_help_lists_recipes_variants_and_datasets_in_80_columns(help_text):
    assert [line for line in help_text.splitlines() if len(line) > 80] == []
    text = " ".join(help_text.split())
    for name in recipes.RECIPES:
        variants = sys.modules[f"segjax.recipes.{name}"].VARIANTS
        assert f"{name}: {', '.join(variants)}" in text
    assert ", ".join(DATASETS) in text
    for name in ("config", "workdir", "coordinator", "num_processes", "process_id"):
        assert f"--{name} " in text


@pytest.mark.parametrize("command", [["train.py"], ["-m", "segjax.train"]])
def test_every_way_to_call_train_prints_the_same_help(command, help_text):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=REPO, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (help_text + "\n", "")


# -------------------------------------------------------------------------------------------------------------- start


def loaded_after(code):
    """Which of the slow modules are loaded after these lines, and what they printed before."""
    code += '\nprint(*sorted({"jax", "flax", "optax"} & set(sys.modules)))'
    command = [sys.executable, "-c", f"import sys\nfrom segjax.commands import train\n{code}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    *said, loaded = done.stdout.splitlines()
    return loaded.split(), said, done.stderr


def test_help_and_mistyped_arguments_are_handled_without_jax():
    loaded, said, err = loaded_after('train.main(["--help"]), train.main(["--steps=20"])')
    assert loaded == [] and len(said) > 100 and "did you mean --config.train.steps" in err


def test_the_first_lines_are_printed_before_jax_is_imported():
    code = """if True:
        import sys
        from segjax.commands import train

        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == "jax":
                    print("jax is imported")
                    sys.exit(0)

        sys.meta_path.insert(0, Finder)
        train.main(["--config=segformer:b2,camvid"])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "recipe   segformer:b2,camvid",
        "values   segjax's own, for random weights",
        "jax is imported",
    ]


@pytest.mark.parametrize("process, speaks", [("0", True), ("1", False)])
def test_only_the_first_of_several_processes_prints_a_first_line(process, speaks, no_run, capsys):
    assert train.main(["--coordinator=localhost:1", "--num_processes=2", f"--process_id={process}"]) == 0
    assert bool(capsys.readouterr().out) == speaks


# ---------------------------------------------------------------------------------------------------------------- runs

TINY = f"""
from segjax.recipes import segformer

def get_config(argument=""):
    config = segformer.get_config(argument)
    config.model.update({SIZES!r})
    return config
"""


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A run of two steps: its config file and its folder."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "tiny.py").write_text(TINY)
    arguments = [f"--config={folder / 'tiny.py'}:b0,streets", f"--workdir={folder / 'run'}", *SMALL]
    assert train.main(arguments) == 0
    return folder, arguments


def test_a_run_reports_settings_other_than_the_defaults(tiny_run, capsys):
    folder, arguments = tiny_run
    assert json.loads((folder / "run" / "result.json").read_text())["step"] == 2
    # The same command in the same process.
    assert train.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "is finished" in out and err == ""
    assert out.startswith(f"recipe   {folder / 'tiny.py'}:b0,streets\n")
    assert train.main([*arguments, "--config.train.steps=4"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "resuming at step 2 of 4" in out
    said = " ".join(out.split())
    for change in ("train.steps=4", "train.batch=4", "model.dims=[4, 8, 10, 16]", "label=segformer-b0"):
        assert change in said
    assert "optim.power" not in said and "init." not in said


def test_a_command_checks_its_settings_exactly_once(tiny_run, monkeypatch, capsys):
    checked = []
    monkeypatch.setattr(
        schema, "problems", lambda config, original=schema.problems: checked.append(config) or original(config)
    )
    assert train.main(tiny_run[1]) == 0
    (config,) = checked
    assert config.model.dims == SIZES["dims"]


def test_all_invalid_settings_are_reported_at_once(tmp_path, capsys):
    arguments = ["--config.optim.lr=-1", "--config.optim.power=nan", "--config.train.batch=3", "--config.label=a/b"]
    arguments += ["--config.data.name=cityscape", "--config.model.drop_path_rate=1.0"]
    assert train.main([f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "segjax train: the settings cannot be used:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "config.optim.lr",
        "config.optim.power",
        "config.train.batch",
        "config.label",
        "config.data.name",
        "config.model.drop_path_rate",
    }
    assert not (tmp_path / "run").exists()

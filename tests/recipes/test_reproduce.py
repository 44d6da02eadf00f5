"""Every command of docs/reproduce.md runs for two steps, on archives of the official structure and narrow models."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import save_file

import segjax
from benchmarks import hours
from segjax import recipes
from segjax.commands import train
from segjax.train.config import check, plain
from tests import made_archives
from tests.tiny import FAMILIES, numpy_draws

pytestmark = pytest.mark.one_python

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"
BLOCKS = [block.split("\n") for block in re.findall(r"^```bash\n(.*?)\n```$", PAGE.read_text(), re.M | re.S)]
PREPARE, RUNS = BLOCKS[0], BLOCKS[1:]
# The encoder is narrow because the checkpoint is; the head has to be told.
NARROW = {
    "segformer": ("--config.model.decoder_dim=12",),
    "hrnet": (),
    "ocr": ("--config.model.ocr_channels=8", "--config.model.ocr_key_channels=4"),
    "segnext": ("--config.model.ham_channels=32", "--config.model.ham_rank=7"),
}
SHORT = ("--config.train.steps=2", "--config.train.batch=2", "--config.eval.batch=2", "--config.eval.pictures=1")
# First words of the names of HRNet's parameters that the encoder pretrained on ImageNet does not have.
HRNET_HEAD = ("last_layer", "ocr", "conv3x3_ocr", "cls_head", "aux_head")


def family_of(line):
    recipe = re.search(r"--config (\w+):(\w+)", line)
    return {"hrnet": "ocr"}.get(recipe[1], recipe[1]) if recipe[2].endswith("_ocr") else recipe[1]


def save_encoder(path, family, name, sizes):
    """An encoder with the keys of the published one, of a model with these sizes."""
    with numpy_draws():
        arrays = segjax.to_torch(segjax.create(name, num_classes=5, **sizes))
    if family in ("hrnet", "ocr"):
        encoder = {key: array for key, array in arrays.items() if not key.startswith(HRNET_HEAD)}
    else:
        encoder = {key.removeprefix("backbone."): array for key, array in arrays.items() if key.startswith("backbone.")}
    assert 0 < len(encoder) < len(arrays)
    save_file(encoder, path)


def call(folder, flags, lines, *, data):
    """Runs commands in `folder`, with the prepared datasets in `data`; returns their output."""
    repo = str(PAGE.parents[1])
    environment = os.environ | {"TFDS_DATA_DIR": str(data), "PYTHONPATH": repo}
    command = [sys.executable, "-m", "tests.reproduce_commands", json.dumps(flags), *lines]
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the prepared datasets, which the commands of the page have made of archives."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("cityscapes", "ade20k"):
        # Large enough for half of it to be scored, and of one size, for which each program is compiled.
        made_archives.Made(folder / name, name, size=(66, 100)).packed(folder)
    output = call(folder, [], PREPARE, data=folder / "data")
    assert "cityscapes: " in output and "ade20k: " in output
    return folder / "data"


def recipe_of(lines):
    return re.search(r"--config (\S+)", lines[0])[1]


# Each takes one to three minutes of compilation.
FAST = ("segformer:b2,cityscapes",)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(lines, id=recipe_of(lines), marks=() if recipe_of(lines) in FAST else pytest.mark.slow)
        for lines in RUNS
    ],
)
def test_the_commands_of_the_page_run(lines, data, tmp_path):
    family = family_of(lines[0])
    flags = [*SHORT, "--config.augment.crop=(64,96)", *NARROW[family]]
    if recipes.load(recipe_of(lines)).loss.ohem_images:
        flags.append("--config.loss.ohem_images=2")
    run_as_published(lines, data, tmp_path, flags, *FAMILIES[family], crop=[64, 96])


FULL_WIDTH = ("segformer:mmseg_b0,ade20k", "hrnet:w48_ocr,ade20k", "segnext:t,cityscapes")
AT_FULL_WIDTH = [lines for lines in RUNS if recipe_of(lines) in FULL_WIDTH]
assert len(AT_FULL_WIDTH) == len(FULL_WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("lines", AT_FULL_WIDTH, ids=map(recipe_of, AT_FULL_WIDTH))
def test_the_commands_of_the_page_run_at_full_width(lines, data, tmp_path):
    config = recipes.load(recipe_of(lines))
    flags = list(SHORT) + ["--config.loss.ohem_images=2"] * bool(config.loss.ohem_images)
    run_as_published(lines, data, tmp_path, flags, config.model.name, {}, crop=list(config.augment.crop))


def run_as_published(lines, data, folder, flags, name, sizes, *, crop):
    """Runs a block of the page from an encoder of these sizes; all but the shortened settings are the recipe's."""
    family, recipe = family_of(lines[0]), recipe_of(lines)
    checkpoint = re.search(r"--config.init.checkpoint=(\S+)", lines[0])[1]
    save_encoder(folder / checkpoint, family, name, sizes)
    config = recipes.load(recipe)
    output = call(folder, flags, lines, data=data)
    assert f"recipe   {recipe}\nvalues   {config.recipe}"[:60] in output
    assert "random weights" not in output.split("compiling")[0]
    workdir = folder / "runs" / f"{config.label}-{config.data.name}"
    result = json.loads((workdir / "result.json").read_text())
    assert result["step"] == 2 and 0 <= result["mean_iou"] <= 1
    published, run = plain(config), result["config"]
    assert run["eval"] == published["eval"] | {"batch": 2, "pictures": 1}
    assert run["loss"] == published["loss"] | {key: run["loss"][key] for key in ("ohem_images",)}
    assert run["optim"] == published["optim"] and run["augment"] == published["augment"] | {"crop": crop}
    assert "exactly as in" in output
    for line in lines[2:]:
        # The published protocol in full, by flags; its report is in the folder where the command was given.
        report = json.loads((folder / "report" / "results.json").read_text())
        scales = re.search(r"--scales ([\d. ]+)", line)[1].split()
        assert report["protocol"]["scales"] == [float(scales[0]), float(scales[-1])]
        assert report["protocol"]["flip"] is True


def parsed(line):
    """The config of a training command of the page, and how many devices it is made for."""
    words = shlex.split(line.replace("CUDA_VISIBLE_DEVICES=", ""))
    visible = len(words.pop(0).split(",")) if words[0] != "segjax" else 0
    config = train.parse(words[2:]).config
    counts = [number for number in (1, 2, 3, 4, 6, 8) if config.train.batch % number == 0]
    return config, [number for number in counts if number <= visible] if visible else counts


@pytest.mark.parametrize("lines", RUNS, ids=map(recipe_of, RUNS))
def test_commands_fit_the_devices_that_they_name(lines, tmp_path, monkeypatch):
    config, counts = parsed(lines[0])
    # One GPU and, unless the batch cannot be divided, eight; HRNet's batch of twelve has a command with six.
    named = {"hrnet:w48_ocr,cityscapes": 6, "hrnet:w48_ocr,ade20k": 4, "hrnet:w48,cityscapes,jo-jstrm": 6}
    assert min(counts) == 1 and max(counts) == named.get(recipe_of(lines), 8)
    for number in counts:
        monkeypatch.setattr(jax, "device_count", lambda number=number: number)
        check(config, tmp_path, resumes=True)


# Flags in the text of the page, by their beginning: the recipe that they change, and how many devices they are for.
IN_TEXT = {
    "--config.init.checkpoint=segformer_b2.imagenet": ("segformer:b2,cityscapes", (1, 8)),
    "--config.train.accumulate=4": ("segformer:b2,cityscapes", (1, 2)),
    "--config.model.dtype=bfloat16": ("segformer:b2,cityscapes", (1, 8)),
    "--config.loss.cross_entropy=0 --config.loss.ohem=1": ("hrnet:w48,cityscapes", (1, 2, 4)),
    "--config.data.train_split=train+val --config.train.steps=139876": ("hrnet:w48,cityscapes", (1, 6)),
    "--config.train.steps=159900": ("segnext:t,cityscapes", (1, 8)),
    "--config.eval.every=247": ("hrnet:w48,cityscapes", (1, 6)),
}


def test_flags_in_the_text_are_accepted(tmp_path, monkeypatch):
    groups = [" ".join(group.split()) for group in re.findall(r"`(--config\.[^`]+=[^`]+)`", PAGE.read_text())]
    assert len(groups) == len(IN_TEXT)
    for begins, (recipe, counts) in IN_TEXT.items():
        (group,) = (group for group in groups if group.startswith(begins))
        config = train.parse(["--config", recipe, *shlex.split(group)]).config
        for number in counts:
            monkeypatch.setattr(jax, "device_count", lambda number=number: number)
            check(config, tmp_path, resumes=True)
    # The last one of these evaluates whole images, where its recipe has a sliding window.
    config = train.parse(["--config=segnext:t,cityscapes", "--config.eval.mode=whole"]).config
    assert (config.eval.mode, config.eval.crop, config.eval.stride) == ("whole", None, None)


def test_the_page_has_a_command_for_every_family_and_dataset():
    named = {re.search(r"--config (\w+):\w+,(\w+)", block[0]).groups() for block in RUNS}
    assert named == {(name, data) for name in ("segformer", "hrnet", "segnext") for data in ("cityscapes", "ade20k")}
    assert any("_ocr" in block[0] for block in RUNS) and any(",mmseg" in block[0] for block in RUNS)


IN_PLAIN = ("segformer:b0,cityscapes", "hrnet:w48,cityscapes", "segnext:t,ade20k")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(each, marks=() if each in IN_PLAIN else pytest.mark.slow) for each in hours.recipes_of_the_page()],
)
def test_hours_of_the_table_are_the_computed_bound(recipe):
    assert hours.recipes_of_the_page()[recipe] == round(hours.hours(recipe), 1)


def test_every_recipe_of_the_table_exists_and_is_published():
    references = re.findall(r"^\| `(\w+:\S+)` \|", PAGE.read_text(), re.M)
    assert len(references) == len(set(references)) > 30
    for reference in references:
        config = recipes.load(reference)
        assert not config.recipe.startswith("no recipe is published") and config.init.expected

"""Checkpoints are restored bit for bit; incomplete and incompatible ones are refused before they are used."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from segjax.checkpoints import orbax_folder, state_dict
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.load import load
from segjax.checkpoints.orbax_folder import load_weights, save_model
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.recipes import common
from segjax.runtime import atomic, console
from segjax.train import optim
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState, restored, training_of, weights_of
from tests.tiny import tiny_model

REPO = Path(__file__).parents[2]


def make_state(seed, *, name="adamw", step=3, ema=False):
    """A training state whose every array is noise, optimizer's and average's included."""
    params, batch_stats = FunctionalModel(tiny_model(seed)).arrays()
    settings = common.get_config("folder").optim
    settings.name = name
    state = TrainState.start(params, batch_stats, optim.optimizer(settings, params, steps=10).init(params), ema=ema)
    rng = np.random.default_rng(seed)

    def noise(array):
        if array.dtype == jnp.int32:
            return np.full(array.shape, step, np.int32)
        return rng.standard_normal(array.shape).astype(array.dtype)

    return jax.tree.map(noise, state)


def save(folder, state, *, keep=2, about=None, steps=(3,)):
    run = RunCheckpoints(folder, keep=keep)
    for step in steps:
        run.save(step, weights_of(state), training_of(state), about or {})
    run.wait()


def restore(folder, state, *, refuse=lambda about: None, say=lambda text: None, may_skip=9):
    """-> what was found, and the state in it; (None, None) where there is nothing."""
    run = RunCheckpoints(folder, keep=2)
    try:
        found = run.restore(weights_of(state), training_of(state), refuse=refuse, say=say)
    finally:
        run.wait()
    return found, found and restored(found.weights, found.training, state, may_skip=may_skip)


def assert_same_bits(a, b):
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b)]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, x), (_, y) in zip(*leaves, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------- a run's checkpoints


@pytest.mark.parametrize("seed, name, ema", [(0, "adamw", False), (1, "sgd", False), (2, "adamw", True)])
def test_a_training_state_is_restored_bit_for_bit(tmp_path, seed, name, ema):
    state = make_state(seed, name=name, ema=ema)
    save(tmp_path / "run", state, about={"what": [1, {"deep": None}]})
    found, again = restore(tmp_path / "run", make_state(seed + 5, name=name, step=0, ema=ema))
    assert found.step == 3 and found.metadata["what"] == [1, {"deep": None}]
    assert_same_bits(again, state)
    # What the model is used with.
    arrays, _ = orbax_folder.load_weights(tmp_path / "run")
    assert_same_bits(arrays, dict(state.ema) if ema else state.params | state.batch_stats)


@pytest.mark.parametrize("may_skip, in_a_row", [(3, 3), (2, 0)])
def test_a_batch_that_ended_the_run_is_tried_again(tmp_path, may_skip, in_a_row):
    state = make_state(0)
    save(tmp_path / "run", state)
    _, again = restore(tmp_path / "run", state, may_skip=may_skip)
    assert again.skipped.tolist() == [3, in_a_row]


def test_special_values_are_restored_bit_for_bit(tmp_path):
    special = np.array([np.nan, -0.0, np.inf, 1e-45, 3.4e38], np.float32)
    run = RunCheckpoints(tmp_path / "run", keep=1)
    run.save(1, {"a.scale": special}, {"step": np.int32(7)}, {})
    run.wait()
    run = RunCheckpoints(tmp_path / "run", keep=1)
    found = run.restore({"a.scale": special}, {"step": np.int32(0)}, refuse=lambda _: None, say=print)
    run.wait()
    assert found.weights["a.scale"].tobytes() == special.tobytes() and found.training["step"] == 7


def test_the_newest_checkpoints_are_kept_and_an_empty_folder_has_none(tmp_path):
    state = make_state(0)
    assert restore(tmp_path / "run", state) == (None, None)
    save(tmp_path / "run", state, steps=(1, 2, 5))
    run = RunCheckpoints(tmp_path / "run", keep=2)
    assert run.steps() == [2, 5]
    run.wait()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["2", "5"]


def test_saving_a_step_a_second_time_changes_nothing(tmp_path):
    first, second = make_state(0), make_state(1)
    save(tmp_path / "run", first)
    save(tmp_path / "run", second)
    assert_same_bits(restore(tmp_path / "run", second)[1], first)


def test_arrays_and_metadata_may_change_as_soon_as_save_returns(tmp_path):
    state = make_state(0)
    arrays = {name: jnp.array(value) for name, value in state.params.items()}
    host = {name: np.array(value) for name, value in state.params.items()}
    record = {"window": [[0.5, 1.0]] * 1000}
    run = RunCheckpoints(tmp_path / "run", keep=2)
    run.save(1, arrays, {"step": np.int32(1)}, record)
    run.save(2, host, {"step": np.int32(2)}, record)
    record["window"].clear()
    for name in arrays:
        arrays[name].delete()  # as a training step that is given its state for good
        host[name][:] = -1
    run.wait()
    for step in (1, 2):
        found, about = orbax_folder.read_items(tmp_path / "run" / str(step), "weights", "about")
        assert_same_bits(found, dict(state.params))
        assert about["window"] == [[0.5, 1.0]] * 1000


def test_a_state_that_does_not_fit_is_refused_with_everything_that_differs(tmp_path):
    save(tmp_path / "run", make_state(0))
    expected = make_state(0)
    params = dict(expected.params)
    params["decode_head.extra.kernel"] = params.pop("decode_head.linear_pred.kernel")
    params["backbone.norm1.bias"] = np.zeros(7, np.float32)
    params["backbone.norm2.scale"] = params["backbone.norm2.scale"].astype(np.float16)
    run = RunCheckpoints(tmp_path / "run", keep=2)
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        run.restore(params | expected.batch_stats, {"step": np.int32(0)}, refuse=lambda _: None, say=print)
    run.wait()
    message = str(caught.value)
    assert "missing: decode_head.extra.kernel" in message
    assert "unexpected: decode_head.linear_pred.kernel" in message
    assert "backbone.norm1.bias: (4, 'float32') instead of (7, 'float32')" in message
    assert "backbone.norm2.scale: (8, 'float32') instead of (8, 'float16')" in message
    assert "unexpected: optimizer" in message
    assert str(tmp_path / "run" / "3") in message
    assert files_below(tmp_path) == before


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    save(tmp_path / "run", make_state(0, name="sgd"))
    with pytest.raises(CheckpointError, match=r"missing: optimizer.*\.mu\."):
        restore(tmp_path / "run", make_state(0, name="adamw"))


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    state = make_state(0)
    save(tmp_path / "run", state)
    for name in ("run/7.orbax-checkpoint-tmp", ".model.part0/model.orbax-checkpoint-tmp", ".model.part1"):
        shutil.copytree(tmp_path / "run" / "3", tmp_path / name)
    save(tmp_path / "run", state, steps=(9,))
    save_model(tmp_path / "model", tiny_model(0), metadata={})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_leftovers_are_removed_before_another_save_of_the_process_begins(tmp_path):
    for step in range(200):
        for item in ("about", "weights"):
            (tmp_path / "run" / f"{step}.orbax-checkpoint-tmp" / item).mkdir(parents=True)
    run = RunCheckpoints(tmp_path / "run", keep=1)
    assert not list((tmp_path / "run").iterdir())
    run.wait()


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def flip(paths):
    for path in paths:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


def halve(paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def arrays_in(folder):
    # All of them: which of these files hold arrays and which an index that a later one replaces differs from save to
    # save, and so does whether one of them is larger than orbax's own records.
    return list(folder.glob("ocdbt.process_0/d/*"))


def record_in(folder):
    return max(files_below(folder / "about"), key=lambda path: path.stat().st_size)


DAMAGE = {
    "an array file cut short": lambda folder: halve(arrays_in(folder / "weights")),
    "a bit of the weights flipped": lambda folder: flip(arrays_in(folder / "weights")),
    "a bit of the optimizer flipped": lambda folder: flip(arrays_in(folder / "training")),
    "a bit of the record flipped": lambda folder: flip([record_in(folder)]),
    "a digit of the record changed": lambda folder: record_in(folder).write_bytes(
        record_in(folder).read_bytes().replace(b"0.75", b"0.95")
    ),
    "no record": lambda folder: shutil.rmtree(folder / "about"),
    "no weights": lambda folder: shutil.rmtree(folder / "weights"),
    "no training state": lambda folder: shutil.rmtree(folder / "training"),
    "an empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """The checkpoints of a run after 3 and after 5 steps."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    older, newer = make_state(0), make_state(1)
    save(folder, older, about={"mean_iou": 0.25}, steps=(3,))
    save(folder, newer, about={"mean_iou": 0.75}, steps=(5,))
    return folder, older


@pytest.mark.parametrize("what", DAMAGE)
def test_the_newest_intact_checkpoint_is_used_and_damaged_ones_set_aside(two_saved, tmp_path, what):
    saved, older = two_saved
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(saved, folder)
    DAMAGE[what](folder / "5")
    found, state = restore(folder, make_state(7, step=0), say=said.append)
    assert found.step == 3 and found.metadata["mean_iou"] == 0.25
    assert_same_bits(state, older)
    assert str(folder / "5") in said[0] and "damaged" in said[0] and str(tmp_path / "damaged" / "5") in said[1]
    printed = console.wrapped("\n".join(said).replace(str(tmp_path), "runs/name")).splitlines()
    assert max(map(len, printed)) <= 80
    assert [path.name for path in folder.iterdir()] == ["3"] and (tmp_path / "damaged" / "5").is_dir()
    # Its step can be saved again.
    save(folder, state, steps=(5,))
    assert restore(folder, older)[0].step == 5


def test_if_every_checkpoint_is_damaged_all_are_named_and_kept(two_saved, tmp_path):
    saved, older = two_saved
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step, what in (("3", "no record"), ("5", "a bit of the weights flipped")):
        DAMAGE[what](folder / step)
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged") as caught:
        restore(folder, older)
    assert all(str(folder / step) in str(caught.value) for step in ("3", "5"))
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("what", [None, "a bit of the weights flipped", "no record"])
def test_a_different_run_is_refused_before_anything_is_set_aside(two_saved, tmp_path, what):
    saved, older = two_saved
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    if what:
        DAMAGE[what](folder / "5")
    before = files_below(tmp_path)

    def refuse(about):
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        restore(folder, older, refuse=refuse)
    assert files_below(tmp_path) == before


def test_an_unwritable_folder_is_named_once_with_the_reason(tmp_path, monkeypatch, capfd, caplog):
    state = make_state(0)
    run = RunCheckpoints(tmp_path / "run", keep=2)

    def dump(*_args, **_settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # In a thread beside the training, as orbax writes.
    monkeypatch.setattr(epath.Path, "write_text", dump)
    run.save(3, weights_of(state), training_of(state), {})
    with pytest.raises(
        CheckpointError, match=r"run: cannot be written \(No space left on device\)\.\n  Earlier saves are"
    ):
        run.wait()
    with pytest.raises(CheckpointError, match=r"model: cannot be written \(No space left on device\)"):
        save_model(tmp_path / "model", tiny_model(0), metadata={})
    assert not any(path.name.startswith(".model") for path in tmp_path.iterdir())
    assert capfd.readouterr().err == "" and [record for record in caplog.records if record.levelno >= 40] == []


# ------------------------------------------------------------------------------------------------------------- a model


@pytest.mark.parametrize(
    "seed, num_classes, overrides", [(0, 5, {}), (1, 1, {"drop_path_rate": 0.25, "mlp_ratios": (2, 3, 4, 2)})]
)
def test_a_model_is_restored_bit_for_bit_with_its_settings(tmp_path, seed, num_classes, overrides):
    model = tiny_model(seed, num_classes=num_classes, **overrides)
    save_model(tmp_path / "deep" / "model", model, metadata={"licence": "noise's"})
    loaded = load(tmp_path / "deep" / "model")
    again = loaded.model
    assert loaded.metadata["licence"] == "noise's" and again.spec == model.spec
    assert_same_bits(state_dict.to_torch(again), state_dict.to_torch(model))
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["model"]


def test_a_model_is_loaded_in_evaluation_mode_and_can_be_trained(tmp_path):
    save_model(tmp_path / "model", tiny_model(0, dropout_rate=0.5, drop_path_rate=0.5), metadata={})
    model = load(tmp_path / "model").model
    images = jnp.array(np.random.default_rng(0).standard_normal((2, 32, 40, 3)), jnp.float32)
    logits = nnx.jit(lambda model, images: model(images)[0])
    np.testing.assert_array_equal(logits(model, images), logits(model, images))
    model.train()
    assert not np.array_equal(logits(model, images), logits(model, images))


def test_a_float64_model_is_restored_in_float64(tmp_path, float64):
    model = tiny_model(0, dtype=jnp.float64)
    save_model(tmp_path / "model", model, metadata={})
    again = load(tmp_path / "model").model
    with jax.enable_x64(False), pytest.raises(state_dict.CheckpointError, match="jax_enable_x64"):
        load(tmp_path / "model")
    assert_same_bits(state_dict.to_torch(again), state_dict.to_torch(model))
    assert again.dtype == jnp.float64


def test_an_older_model_at_the_same_path_is_replaced(tmp_path):
    old, new = tiny_model(0), tiny_model(1, num_classes=3)
    save_model(tmp_path / "model", old, metadata={})
    save_model(tmp_path / "model", new, metadata={})
    assert_same_bits(state_dict.to_torch(load(tmp_path / "model").model), state_dict.to_torch(new))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_a_checkpoint_is_never_overwritten(tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_bytes(b"dear")
    file = tmp_path / "file"
    file.write_text("also dear")
    for place in (foreign, file):
        with pytest.raises(CheckpointError, match=f"{place} exists and is not a checkpoint of segjax"):
            save_model(place, tiny_model(0), metadata={})
    assert files_below(tmp_path) == [file, foreign / "holiday.jpg"]
    assert file.read_text() == "also dear" and (foreign / "holiday.jpg").read_bytes() == b"dear"


def test_a_failed_save_leaves_the_older_model(tmp_path):
    model = tiny_model(0)
    save_model(tmp_path / "model", model, metadata={})
    with pytest.raises(TypeError):
        save_model(tmp_path / "model", tiny_model(1), metadata={"no JSON": object()})
    assert_same_bits(state_dict.to_torch(load(tmp_path / "model").model), state_dict.to_torch(model))


def test_a_model_is_found_in_a_checkpoint_and_in_the_newest_one_of_a_run(tmp_path):
    model = tiny_model(3)
    params, batch_stats = FunctionalModel(model).arrays()
    other = {name: value + 1 for name, value in (params | batch_stats).items()}
    run = RunCheckpoints(tmp_path / "checkpoints", keep=3)
    for step, arrays in ((9, other), (10, params | batch_stats)):
        # 10 comes before 9 in the order of letters.
        run.save(step, arrays, {"step": np.int32(step)}, {"model": state_dict.model_metadata(model)})
    run.wait()
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "10"):
        assert_same_bits(state_dict.to_torch(load(place).model), state_dict.to_torch(model))
    older = load(tmp_path / "checkpoints" / "9").model
    found = {name: variable.get_value() for name, variable in state_dict.named_variables(older).items()}
    assert params_sha256(found) == params_sha256(other)


def test_a_model_can_be_loaded_to_compute_in_another_dtype(tmp_path):
    save_model(tmp_path / "model", tiny_model(0), metadata={})
    model = load(tmp_path / "model", dtype=jnp.bfloat16).model
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype(np.float32)}


# ---------------------------------------------------------------------------------------------------- what is not whole


def test_an_empty_or_absent_folder_is_refused_by_name(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"{place}: no checkpoint of segjax in this folder"):
            load_weights(place)


@pytest.mark.each_value_once
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", ["orbax", "tensorstore", "json", "stat"])
def test_a_system_error_is_not_taken_for_damage(tmp_path, monkeypatch, number, place):
    """A run must not pass over its newest checkpoint, and move it away, because files are short."""
    save_model(tmp_path / "model", tiny_model(0), metadata={})
    error = OSError(number, os.strerror(number))

    def fail(*_, **__):
        raise (
            ValueError(f"NOT_FOUND: [OS error {number}: {os.strerror(number)}] x") if place == "tensorstore" else error
        )

    if place in ("orbax", "tensorstore"):
        monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", fail)
    else:
        monkeypatch.setattr(orbax_folder, {"json": "read_json", "stat": "refuse_irregular"}[place], fail)
    with pytest.raises(CheckpointError, match=f"cannot be read at the moment .{os.strerror(number)}") as caught:
        load_weights(tmp_path / "model")
    assert not isinstance(caught.value, orbax_folder.DamagedError)


def test_running_out_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    save_model(tmp_path / "model", tiny_model(0), metadata={})
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", lambda *_, **__: bytearray(1 << 62))
    with pytest.raises(MemoryError):
        load_weights(tmp_path / "model")


def test_a_folder_named_by_a_non_ascii_digit_is_not_a_step(tmp_path):
    save_model(tmp_path / "run" / "7", tiny_model(0), metadata={})
    (tmp_path / "run" / "7").rename(tmp_path / "run" / "\N{SUPERSCRIPT TWO}")
    with pytest.raises(CheckpointError, match="no checkpoint of segjax in this folder"):
        load_weights(tmp_path / "run")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    model = tiny_model(7)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, model, metadata={})
    return folder, state_dict.to_torch(model)


# Loads the folder, and after it the folder with each of its files harmed in turn. In a process of its own, because what
# background threads complain about reaches no exception handler, only stderr.
HARM_EVERY_FILE = """
import json, shutil, sys
from pathlib import Path
from segjax.checkpoints import state_dict
from segjax.checkpoints.load import load
from segjax.checkpoints.orbax_folder import CheckpointError
from segjax.models.functional import params_sha256

def outcome(place):
    try:
        return params_sha256(state_dict.to_torch(load(place).model))
    except CheckpointError as error:
        assert str(place) in str(error), error
        return "refused"

folder, broken = map(Path, sys.argv[1:3])
outcomes = {"whole": outcome(folder)}
print("", file=sys.stderr)
for file in [path for path in folder.rglob("*") if path.is_file()]:
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:] if content else b""
    for harm, changed in dict(removed=None, halved=content[:middle], flipped=flipped).items():
        shutil.copytree(folder, broken)
        victim = broken / file.relative_to(folder)
        victim.unlink() if changed is None else victim.write_bytes(changed)
        outcomes[f"{harm} {file.relative_to(folder)}"] = outcome(broken)
        shutil.rmtree(broken)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def harmed(saved_model, tmp_path_factory):
    folder, broken = saved_model[0], tmp_path_factory.mktemp("harmed") / "broken"
    command = [sys.executable, "-c", HARM_EVERY_FILE, folder, broken]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("harm", ["removed", "halved", "flipped"])
def test_a_model_with_a_damaged_file_is_refused_or_loaded_intact(harmed, harm):
    outcomes, _ = harmed
    whole = outcomes["whole"]
    assert whole != "refused"
    harmed_files = {what: result for what, result in outcomes.items() if what.startswith(harm)}
    assert list(harmed_files.values()).count("refused") >= 3
    assert {what: result for what, result in harmed_files.items() if result not in ("refused", whole)} == {}


def test_loading_an_intact_checkpoint_prints_nothing(harmed):
    assert harmed[1].splitlines()[0] == ""


def test_a_damaged_checkpoint_gives_its_error_without_tracebacks(harmed):
    tracebacks = [line for line in harmed[1].splitlines() if "Traceback" in line or "never retrieved" in line]
    assert tracebacks == []


def test_metadata_that_do_not_fit_the_weights_are_refused_with_the_names(saved_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved_model[0], broken)
    (record,) = (path for path in files_below(broken / "about") if b"segformer_b0" in path.read_bytes())
    content = json.loads(record.read_text())
    content["model"]["overrides"]["dims"] = [4, 8, 15, 16]
    record.write_text(json.dumps(orbax_folder.signed(content)))
    with pytest.raises(CheckpointError, match=r"do not fit segformer_b0, which its metadata names:\n.*\n.*instead of"):
        load(broken)


@pytest.mark.parametrize(
    "record", [{}, {"model": {"name": "segformer_b9", "num_classes": 5, "overrides": {}, "param_dtype": "float32"}}]
)
def test_metadata_of_an_unknown_model_are_refused(saved_model, tmp_path, record):
    broken = tmp_path / "broken"
    shutil.copytree(saved_model[0], broken)
    (path,) = (path for path in files_below(broken / "about") if b"segformer_b0" in path.read_bytes())
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=str(broken)):
        load(broken)


def test_text_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "result.json"
    atomic.write_text(path, "first")
    atomic.write_text(path, "second")
    assert path.read_text() == "second" and files_below(tmp_path) == [path]
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "third \ud800")
    assert path.read_text() == "second"

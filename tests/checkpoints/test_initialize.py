"""Initial weights: files in every key format, encoders only, folders of runs, parts of either, and refusals."""

import ast
import logging
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from configs import segformer
from segjax import to_torch
from segjax.checkpoints import orbax_folder, state_dict
from segjax.checkpoints.architectures import FAMILIES as OF_NAME
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.state_dict import named_variables, torch_name
from segjax.train import run_checkpoints, setup
from segjax.train.start import load_initial_weights
from tests.runs import functional_model
from tests.tiny import FAMILIES, SIZES, numpy_draws, tiny_model

# Head keys of ImageNet classifiers, as they come with the encoders.
EXTRAS = {
    "segformer": {"head.weight": (1000, 16), "head.bias": (1000,)},
    "hrnet": {
        "incre_modules.0.0.conv1.weight": (4, 2, 1, 1),
        "downsamp_modules.0.0.bias": (3,),
        "final_layer.0.weight": (8, 4, 1, 1),
        "classifier.weight": (1000, 8),
        "classifier.bias": (1000,),
    },
}
EXTRAS |= dict.fromkeys(("plain", "plain with norm", "mmseg", "segnext"), EXTRAS["segformer"]) | {
    "ocr": EXTRAS["hrnet"]
}


def forms(family):
    """Dialects with a place for the whole model."""
    of = family_of(FAMILIES[family][0])
    return dict.fromkeys(form.dialect for form in KEY_FORMATS if form.family == of and not form.encoder_only)


def in_head(family, name):
    return OF_NAME[family_of(FAMILIES[family][0])].in_head(torch_name(name))


def weights(model):
    return {name: np.array(variable[...]) for name, variable in named_variables(model).items()}


def save(path, arrays):
    save_file(arrays, path)
    return path


def equal(one, other):
    """Names of equal arrays."""
    return {name for name in one if one[name].tobytes() == other[name].tobytes()}


def lines_of(caplog, source, model, **settings):
    """What is said of a start."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "segjax"):
        initialize(model, source, **settings)
    return caplog.messages


def refusal(model, source, **settings):
    """The message of a refusal, which has changed nothing."""
    before = weights(model)
    with pytest.raises(CheckpointError) as caught:
        initialize(model, source, **settings)
    assert equal(before, weights(model)) == set(before)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family, dialect", [(family, dialect) for family in FAMILIES for dialect in forms(family)])
def test_a_file_of_any_dialect_fills_the_whole_model(family, dialect, tmp_path, caplog):
    arrays = to_torch(tiny_model(1, family), dialect=dialect)
    model = tiny_model(2, family)
    said = lines_of(caplog, save(tmp_path / "a.safetensors", arrays), model)
    # In the file's own names, since a form without some bias moves that into a mean.
    found = to_torch(model, dialect=dialect)
    assert found.keys() == arrays.keys() and equal(found, arrays) == set(arrays)
    # A file with the keys of two dialects is read as the first.
    assert said[0].startswith("read as ") and said[-1] == f"loaded {len(arrays)} arrays"
    assert not any(line.startswith(("not used", "left as")) for line in said)


@pytest.mark.parametrize("family", ["segformer", "ocr"])
def test_folders_of_models_and_runs_give_initial_weights_as_files_do(family, tmp_path):
    source = tiny_model(1, family)
    expected = weights(source)
    about = {"model": state_dict.model_metadata(source)}
    orbax_folder.save_model(tmp_path / "converted", source, metadata={})
    run = tmp_path / "run"
    orbax_folder.save_weights(run / "best", expected, metadata=about)
    saved = run_checkpoints.RunCheckpoints(run / "checkpoints", keep=2)
    saved.save(3, weights(tiny_model(7, family)), {"step": np.int32(3)}, about)
    saved.save(5, expected, {"step": np.int32(5)}, about)
    saved.wait()
    for place in ("converted", "run", "run/best", "run/checkpoints/5"):
        model = tiny_model(2, family)
        initialize(model, tmp_path / place)
        assert equal(weights(model), expected) == set(expected), place


def test_weights_are_cast_to_the_models_dtype_and_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arrays = {key: value.astype(np.float16) for key, value in to_torch(tiny_model(1)).items() if "num" not in key}
    save(tmp_path / "half.safetensors", arrays)
    model = tiny_model(2)
    initialize(model, "~/half.safetensors")
    assert {variable.get_value().dtype for variable in named_variables(model).values()} == {np.dtype(np.float32)}
    kernel = model.decode_head.linear_pred.kernel[...]
    np.testing.assert_array_equal(kernel, arrays["decode_head.linear_pred.weight"].transpose(2, 3, 1, 0))


# --------------------------------------------------------------------------------------------------- encoders alone


def encoder_files(family):
    """Name of a form, and an ImageNet-like file in it."""
    source = tiny_model(1, family)
    extras = {key: np.ones(shape, np.float32) for key, shape in EXTRAS.get(family, {}).items()}
    native = {key: value for key, value in to_torch(source).items() if not in_head(family, key)}
    yield "native", native | extras
    of = family_of(FAMILIES[family][0])
    for form in KEY_FORMATS:
        if form.family == of and form.encoder_only:
            yield form.dialect, to_torch(source, dialect=form.dialect) | extras
    if family == "segformer":
        # transformers' SegformerForImageClassification.
        hf = to_torch(source, dialect="hf")
        classifier = {
            "classifier.weight": np.ones((1000, 16), np.float32),
            "classifier.bias": np.ones(1000, np.float32),
        }
        yield "hf", {key: value for key, value in hf.items() if key.startswith("segformer.")} | classifier


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_leaves_the_decoder_unchanged(family, tmp_path, caplog):
    expected = weights(tiny_model(1, family))
    for dialect, arrays in encoder_files(family):
        model = tiny_model(2, family)
        before = weights(model)
        said = lines_of(caplog, save(tmp_path / "encoder.safetensors", arrays), model)
        after = weights(model)
        head = {name for name in before if in_head(family, name)}
        assert equal(after, before) == head and equal(after, expected) == set(before) - head, dialect
        assert said[0].startswith("read as ")
        assert "encoder only: the decoder stays as initialised" in said
        extras = [key for key in arrays if key in EXTRAS.get(family, ()) or key.startswith("classifier.")]
        if extras:
            (unused,) = [line for line in said if line.startswith("not used from the checkpoint (")]
            assert f"({len(extras)})" in unused and all(key in unused for key in extras)
        (kept,) = [line for line in said if line.startswith("left as initialised (")]
        assert f"({len(head)})" in kept
        assert said[-1] == f"loaded {len(arrays) - len(extras)} arrays"


def deeper(family):
    sizes = FAMILIES[family][1]
    return dict(stage_blocks=(2, 1, 2, 1)) if "stage_blocks" in sizes else dict(depths=(1, 1, 3, 1))


@pytest.mark.parametrize("family", ["segformer", "mmseg", "simple", "zuppichini", "hrnet", "segnext"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_encoder_with_more_or_fewer_blocks_is_refused(family, alone, tmp_path):
    for source, model in (
        (tiny_model(1, family, **deeper(family)), tiny_model(2, family)),
        (tiny_model(1, family), tiny_model(2, family, **deeper(family))),
    ):
        arrays = {key: v for key, v in to_torch(source).items() if not (alone and in_head(family, key))}
        message = refusal(model, save(tmp_path / "a.safetensors", arrays))
        assert message.startswith(f"{tmp_path / 'a.safetensors'}: the checkpoint (read as ")
        assert re.search(r"\d (unexpected in|missing from) the checkpoint:", message)
        assert "its encoder is another one" in message and "init.keep" not in message


# ------------------------------------------------------------------------------------------- parts that stay random


def advised(message):
    """The patterns that a refusal tells to set."""
    (text,) = re.findall(r'"--config\.init\.keep=(\(.*\))"', message)
    return ast.literal_eval(text)


CLASSIFIERS = {
    "segformer": ("decode_head.linear_pred.*",),
    "plain": ("decode_head.linear_pred.*",),
    "plain with norm": ("decode_head.linear_pred.*",),
    "mmseg": ("decode_head.conv_seg.*",),
    "simple": ("to_segmentation.1.*",),
    "zuppichini": ("head.predict.*",),
    "hrnet": ("last_layer.3.*",),
    "ocr": ("aux_head.3.*", "cls_head.*"),
    "segnext": ("decode_head.conv_seg.*",),
}


@pytest.mark.parametrize("family, dialect", [(family, dialect) for family in FAMILIES for dialect in forms(family)])
def test_only_a_classifier_for_other_classes_stays_random(family, dialect, tmp_path, caplog):
    source, model = tiny_model(1, family), tiny_model(2, family, num_classes=7)
    path = save(tmp_path / "a.safetensors", to_torch(source, dialect=dialect))
    before, layers = weights(model), CLASSIFIERS[family]
    said = lines_of(caplog, path, model)
    kept = {name for name in before if name.startswith(tuple(pattern.removesuffix("*") for pattern in layers))}
    after = weights(model)
    assert len(kept) == 2 * len(layers) and equal(after, before) & kept == kept == equal(after, before)
    modules = [pattern.removesuffix(".*") for pattern in layers]
    assert f"the checkpoint has 5 classes, the data 7: {' and '.join(modules)} stays random" in said
    assert any(line.startswith(f"left as initialised ({len(kept)}): ") for line in said)
    assert any(line.startswith(f"not used from the checkpoint ({len(kept)}): ") for line in said)


@pytest.mark.parametrize(
    "family, wider", [("segformer", "decoder_dim"), ("ocr", "ocr_channels"), ("segnext", "ham_channels")]
)
def test_a_classifier_with_other_classes_and_another_width_is_refused(family, wider, tmp_path):
    sizes = FAMILIES[family][1]
    source = tiny_model(1, family, num_classes=7, **{wider: 2 * sizes[wider]})
    message = refusal(tiny_model(2, family), save(tmp_path / "a.safetensors", to_torch(source)))
    assert "of another shape:" in message
    assert all(layer.removesuffix("*") in message for layer in CLASSIFIERS[family] if "aux" not in layer)


def test_a_classifier_without_its_bias_is_refused(tmp_path):
    arrays = to_torch(tiny_model(1, num_classes=7))
    del arrays["decode_head.linear_pred.bias"]
    message = refusal(tiny_model(2), save(tmp_path / "a.safetensors", arrays))
    assert "1 missing from the checkpoint:\n    decode_head.linear_pred.bias" in message


def test_a_summary_of_the_loaded_weights_is_returned(tmp_path):
    source = to_torch(tiny_model(1))
    whole = save(tmp_path / "a.safetensors", source)
    encoder = save(tmp_path / "b.safetensors", {key: v for key, v in source.items() if not in_head("segformer", key)})
    other = "all weights, classifier random (5 classes there, 7 here)"
    assert initialize(tiny_model(2), whole) == "all weights"
    assert initialize(tiny_model(2), encoder) == "encoder; decoder random"
    assert initialize(tiny_model(2, num_classes=7), whole) == other
    assert initialize(tiny_model(2), whole, keep=["decode_head.*"]) == "encoder; decoder random"
    kept = initialize(tiny_model(2, num_classes=7), whole, keep=["backbone.norm1.*"])
    assert kept == f"{other}; random by init.keep: backbone.norm1"


@pytest.mark.parametrize(
    "source, target",
    [
        ("segformer", "plain"),
        ("segformer", "plain with norm"),
        ("segformer", "mmseg"),
        ("plain", "segformer"),
        ("mmseg", "plain"),
        ("hrnet", "ocr"),
        ("ocr", "hrnet"),
    ],
)
def test_an_encoder_from_another_model_gets_a_random_head(source, target, tmp_path):
    expected = weights(tiny_model(1, source))
    path = save(tmp_path / "a.safetensors", to_torch(tiny_model(1, source)))
    model = tiny_model(2, target, num_classes=7)
    patterns = advised(refusal(model, path))
    assert patterns == OF_NAME[family_of(FAMILIES[target][0])].head
    before = weights(model)
    initialize(model, path, keep=patterns)
    after = weights(model)
    head = {name for name in before if in_head(target, name)}
    assert equal(after, before) == head
    assert equal({name: after[name] for name in before if name not in head}, expected) == set(before) - head


def test_any_part_may_stay_random(tmp_path):
    arrays = to_torch(tiny_model(1))
    model = tiny_model(2)
    before, expected = weights(model), weights(tiny_model(1))
    initialize(model, save(tmp_path / "a.safetensors", arrays), keep=["backbone.block2.*", "*.linear_fuse.bn.*"])
    after = weights(model)
    kept = {name for name in before if "block2" in name or "linear_fuse.bn" in name}
    assert len(kept) > 10 and equal(after, before) == kept and equal(after, expected) == set(before) - kept


def test_a_pattern_that_matches_nothing_is_refused_before_reading(tmp_path):
    message = refusal(tiny_model(2), tmp_path / "absent.pth", keep=("decode_head.*", "decoder.*", "head?"))
    assert "init.keep: no parameter of segformer_b0 is called 'decoder.*' or 'head?'" in message
    assert "'backbone.block1.0.attn.kv.bias' to 'decode_head.linear_pred.weight'" in message


def test_keys_of_no_model_are_refused_without_advice(tmp_path):
    arrays = to_torch(tiny_model(1)) | {"extra.weight": np.ones(3, np.float32)}
    message = refusal(tiny_model(2), save(tmp_path / "a.safetensors", arrays))
    assert "1 unexpected in the checkpoint:\n    extra.weight" in message
    assert "init.keep" not in message and "encoder" not in message.rpartition("extra.weight")[2]


def test_a_file_that_is_not_a_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "page.pth"
    path.write_text("<html>404</html>")
    assert refusal(tiny_model(2), path).startswith(f"{path}: neither a PyTorch checkpoint")
    assert refusal(tiny_model(2), tmp_path / "absent").startswith(f"{tmp_path / 'absent'}: there is no such file")
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path / 'folder'}: no checkpoint of segjax" in refusal(tiny_model(2), tmp_path / "folder")


# -------------------------------------------------------------------------------------------------------------- a run


def start(source, **settings):
    """The model of a run that starts from a checkpoint."""
    config = segformer.get_config("b0,folder")
    config.model.update(SIZES)
    config.init.checkpoint = str(source)
    config.init.update(settings)
    config.optim.lr_multipliers = ()
    with numpy_draws():
        module = setup.create_model(config.model, num_classes=5, seed=config.seed)
    begins, _ = load_initial_weights(module, config.init)
    return setup.make_functional(module, config.optim, config.train, axis_name=None), begins


def test_a_run_prints_its_initial_weights_at_any_logging_level(tmp_path, capsys, caplog):
    logger = logging.getLogger("segjax")
    logging.getLogger().setLevel(logging.WARNING)
    before = logger.level, logger.propagate, list(logger.handlers)
    (_, arrays), *_ = encoder_files("segformer")
    path = save(tmp_path / "mit.safetensors", arrays)
    # A command that ran in this process before may have left the level at which the file was made with messages.
    caplog.clear()
    functional, begins = start(path)
    assert begins == f"{path}: encoder; decoder random"
    params, batch_stats = functional.arrays()
    expected = weights(tiny_model(1))
    taken = equal({name: np.asarray(value) for name, value in (params | batch_stats).items()}, expected)
    assert taken == {name for name in expected if name.startswith("backbone.")}
    printed = capsys.readouterr().out
    assert printed.split()[:4] == ["initial", "weights", "from", str(path)]
    # What does not fit into a line goes on in the next.
    text, at = " ".join(printed.split()), 0
    for piece in [
        "read as native",
        "encoder only: the decoder stays as initialised",
        "not used from the checkpoint",
        "left as initialised",
        f"loaded {len(arrays) - 2} arrays",
    ]:
        at = text.index(piece, at)
    assert caplog.messages == []
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_resumed_run_and_one_from_random_weights_read_no_checkpoint(capsys):
    config = segformer.get_config("b0,folder")
    config.model.update(SIZES)
    with numpy_draws():
        functional_model(config, 5, initial=True)
        config.init.checkpoint = "/nowhere"
        functional_model(config, 5)
    assert capsys.readouterr().out == ""


def test_weights_that_do_not_fit_are_refused_with_the_setting_to_use(tmp_path):
    path = save(tmp_path / "a.safetensors", to_torch(tiny_model(1, decoder_dim=10)))
    with pytest.raises(CheckpointError, match=r"init\.keep=\('decode_head\.linear_c"):
        start(path)
    functional, begins = start(path, keep=("decode_head.*",))
    assert isinstance(functional.bind(*functional.arrays()), nnx.Module)
    assert begins.endswith(": encoder; decoder random")

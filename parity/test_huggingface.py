"""Folders of transformers, written by segjax and by transformers; and the content of mmsegmentation's `.pth`."""

import re

import numpy as np
import pytest
import torch
import transformers

from parity import compare
from parity.subjects import SUBJECTS
from parity.test_dialects import original
from segjax import from_torch
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.load import load
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import convert
from segjax.data import specs
from segjax.torch_reference import verify

NAMES = ["sky", "road", "kerb"]
SIZES = {**SUBJECTS["segformer"].sizes}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def model_of(seed, **settings):
    return from_torch(original("segformer", 3, seed=seed), **SUBJECTS["segformer"].fixed, **settings)


def save(folder, model):
    spec = specs.DatasetSpec("yard", tuple(NAMES), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), 200)
    about = {
        "dataset": dataset_metadata(spec),
        "normalisation": {"mean": [127.5, 63.75, 31.875], "std": [51.0, 102.0, 153.0]},
        "input_size": [64, 96],
    }
    orbax_folder.save_model(folder, model, metadata=about)
    return folder


def ours_and_theirs(model, folder, seed=0):
    network, info = transformers.SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    x = compare.images(2, (64, 96), seed=seed, dtype="float32")
    with torch.no_grad():
        theirs = verify.to_nhwc(network.eval()(verify.to_nchw(x)).logits)
    return np.asarray(verify.compiled(model)(x)[0]), np.asarray(theirs), network


@pytest.mark.parametrize("channels", [1, 4])
def test_checkpoints_with_other_channels_convert_to_transformers_and_back(tmp_path, within, channels):
    torch.manual_seed(channels)
    sizes = dict(hidden_sizes=[8, 16, 20, 32], depths=[2, 1, 1, 1], num_attention_heads=[1, 2, 5, 8])
    config = transformers.SegformerConfig(num_channels=channels, num_labels=3, decoder_hidden_size=24, **sizes)
    network = transformers.SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path / "theirs")
    assert convert.main([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--verify"]) == 0
    assert convert.main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf"]) == 0
    back = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "back").eval()
    assert back.config.num_channels == channels
    x = compare.images(2, (64, 96), seed=3, dtype="float32", channels=channels)
    with torch.no_grad():
        theirs, again = (verify.to_nhwc(each(verify.to_nchw(x)).logits) for each in (network, back))
    np.testing.assert_array_equal(theirs, again)
    ours = np.asarray(verify.compiled(load(tmp_path / "ours").model)(x)[0])
    within("output", "float32", verify.relative_error(ours, theirs), f"transformers, {channels} channels")


@pytest.mark.parametrize(("eps", "heads"), [(1e-5, (1, 2, 4, 8)), (1e-6, None)])
def test_transformers_loads_the_folder_and_differs_as_printed(tmp_path, within, capsys, eps, heads):
    settings = dict(block_norm_eps=eps, patch_norm_eps=1e-5) | ({"num_heads": heads} if heads else {})
    model = model_of(1, **settings)
    assert convert.main([str(save(tmp_path / "a", model)), str(tmp_path / "b"), "--to", "hf"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    ours, theirs, network = ours_and_theirs(model, tmp_path / "b")
    if eps == 1e-5:
        assert "transformers computes with the same settings" in printed
        within("output", "float32", verify.relative_error(ours, theirs), "transformers, from our folder")
    else:
        said = float(re.search(r"differ by at most (\S+) \(", printed)[1])
        measured = np.abs(ours - theirs).max()
        # On another image.
        assert said / 5 < measured < 5 * said and 1e-7 < said < 1e-2
    assert network.config.id2label == dict(enumerate(NAMES)) and network.config.label2id["kerb"] == 2
    assert network.config.semantic_loss_ignore_index == 200


def test_its_processor_normalises_an_image_as_segjax_does(tmp_path):
    convert.main([str(save(tmp_path / "a", model_of(1))), str(tmp_path / "b"), "--to", "hf"])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "b")
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = load(tmp_path / "b").normalise(image)
    np.testing.assert_allclose(np.asarray(ours), verify.to_nhwc(theirs)[0], atol=1e-5)
    assert (processor.size["height"], processor.size["width"]) == (64, 96)


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_transformers_gives_its_output(tmp_path, within, shards):
    sizes = dict(SIZES)
    config = transformers.SegformerConfig(
        hidden_sizes=list(sizes["dims"]),
        depths=list(sizes["depths"]),
        num_attention_heads=[1, 2, 4, 8] if sizes["dims"][2] % 4 == 0 else [1, 1, 1, 1],
        decoder_hidden_size=sizes["decoder_dim"],
        id2label=dict(enumerate(NAMES)),
        label2id={name: k for k, name in enumerate(NAMES)},
    )
    torch.manual_seed(3)
    network = transformers.SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path / "a", **({"max_shard_size": "20KB"} if shards else {}))
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == shards
    trained = load(tmp_path / "a")
    assert trained.classes.class_names == tuple(NAMES)
    ours, theirs, _ = ours_and_theirs(trained.model, tmp_path / "a")
    within("output", "float32", verify.relative_error(ours, theirs), "transformers, from its folder")


@pytest.mark.parametrize("label", ["plain, conv_bn", "mmseg", "simple", "hrnet", "segnext"])
def test_a_family_that_transformers_lacks_is_refused(label, tmp_path, capsys):
    torch.save({key: torch.from_numpy(value.copy()) for key, value in original(label).items()}, tmp_path / "a.pth")
    assert convert.main([str(tmp_path / "a.pth"), str(tmp_path / "b"), "--to", "hf"]) == 2
    assert "cannot be written as hf" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "b").exists()
    assert convert.main([str(tmp_path / "a.pth"), str(tmp_path / "b"), "--to", "native"]) == 2
    assert "(--to hf) one for transformers" in " ".join(capsys.readouterr().err.split())


def test_a_file_of_mmsegmentation_is_read_with_its_classes(tmp_path):
    weights = {key: torch.from_numpy(value.copy()) for key, value in original("mmseg").items()}
    count = next(value for key, value in weights.items() if key.endswith("conv_seg.bias")).shape[0]
    names, palette = tuple(f"kind {k}" for k in range(count)), [[k, 2 * k, 3 * k] for k in range(count)]
    torch.save({"meta": {"CLASSES": names, "PALETTE": palette}, "state_dict": weights}, tmp_path / "a.pth")
    trained = load(tmp_path / "a.pth")
    assert trained.classes.class_names == names and trained.classes.colors == tuple(map(tuple, palette))


def test_the_older_head_of_cvpytorch_is_also_read():
    weights = original("segnext")
    renamed = {}
    for key, value in weights.items():
        key = key.replace("decode_head.conv_seg.", "head.classifier.").replace("decode_head.", "head.")
        renamed[key] = value
    model = from_torch(renamed)
    assert model.spec.name.startswith("segnext")
    np.testing.assert_array_equal(
        np.asarray(model.decode_head.conv_seg.bias[...]), weights["decode_head.conv_seg.bias"]
    )

"""The table of published weights, and the classes of their datasets."""

import re
from importlib import resources

import pytest

import segjax
from segjax import models
from segjax.checkpoints import published
from segjax.checkpoints.architectures import DECODER_SETTINGS
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.key_maps import DIALECTS
from segjax.checkpoints.load import load
from segjax.commands import weights
from segjax.data.class_lists import CLASS_LISTS, classes_of_dataset
from segjax.inference.engine import Protocol

ROWS = list(published.table().values())
# K of the benchmarks, counted with the background where it is a class.
CLASSES = {
    **{"ade20k": 150, "cityscapes": 19, "voc": 21, "lip": 20, "pascal_context": 60, "pascal_context_59": 59},
    **{"coco_stuff10k": 171, "loveda": 7, "potsdam": 6, "vaihingen": 6, "isaid": 16},
}


def row(name):
    return published.table()[name]


def test_each_line_of_the_file_is_a_row_with_a_unique_source():
    lines = (resources.files("segjax.checkpoints") / published.FILE).read_text().splitlines()
    assert len(ROWS) == len(lines) - 1 == 162
    assert len({entry.source for entry in ROWS}) == len({entry.name for entry in ROWS}) == 162
    assert all(line.isascii() for line in lines)


def test_a_row_has_a_known_model_and_known_settings():
    for entry in ROWS:
        model, dot, rest = entry.name.partition(".")
        assert (model, dot) == (entry.model, ".") and re.fullmatch(r"[\w.-]+", rest), entry.name
        assert entry.model in models.MODELS, entry.name
        known = models.settings(entry.model)
        for key, value in entry.settings.items():
            assert key in known and models.problem_of(entry.model, key, value) is None, entry.name
        if entry.is_encoder:
            assert not entry.settings.keys() & set(DECODER_SETTINGS) and rest.startswith("imagenet"), entry.name
        # What no checkpoint of the family contains is in each row.
        expected = {"hrnet": "align_corners", "segnext": "ham_rank"}.get(entry.model.partition("_")[0])
        assert expected is None or entry.is_encoder or expected in entry.settings, entry.name
        assert not entry.model.startswith("segformer") or "block_norm_eps" in entry.settings, entry.name
        if "small" in rest:
            sizes = entry.settings["stage_modules"], entry.settings["stage_blocks"]
            assert sizes == ((1, 1, 3, 2), (2, 2, 2, 2)), entry.name


def test_a_row_has_a_source_hash_digits_and_terms():
    for entry in ROWS:
        assert re.fullmatch(r"hf:[\w.-]+/[\w.-]+(@[0-9a-f]{40})?|https://[\w./?=-]+", entry.source), entry.name
        named = re.search(r"-([0-9a-f]{8})\.pth$", entry.source)
        assert entry.digits == (named[1] if named else ""), entry.name
        assert entry.licence and entry.address.startswith("https://"), entry.name
        # Everything that started from NVIDIA's encoders is under its licence.
        assert entry.is_non_commercial == entry.model.startswith("segformer"), entry.name
        assert set(entry.keys.split(" or ")) <= set(DIALECTS), entry.name


def test_a_row_of_a_trained_model_has_classes_a_figure_and_a_protocol():
    for entry in ROWS:
        if entry.is_encoder:
            continue
        assert entry.classes == CLASSES[entry.dataset] == classes_of_dataset(entry.dataset).num_classes, entry.name
        figures = [figure for figure in (entry.miou, entry.miou_multi_scale) if figure is not None]
        assert bool(figures) == bool(entry.figure_source) and figures == sorted(figures), entry.name
        assert all(30 < figure < 90 for figure in figures), entry.name
        protocol = Protocol(**entry.protocol)
        assert protocol.scales == (1.0,) and (protocol.mode == "slide") == (protocol.window is not None), entry.name
        assert re.fullmatch(r"\d+x\d+", entry.crop) and re.fullmatch(r"\d+ (steps|epochs)", entry.schedule), entry.name


def test_an_encoder_has_neither_classes_nor_figures():
    for entry in ROWS:
        if entry.is_encoder:
            assert (entry.classes, entry.miou, entry.miou_multi_scale, dict(entry.protocol)) == (None, None, None, {})


def test_settings_that_differ_between_sources_are_right():
    assert row("hrnet_w48.ade20k-official").settings["align_corners"] is True
    assert row("hrnet_w48.coco_stuff10k").settings["align_corners"] is True
    assert row("hrnet_w48.ade20k").settings["align_corners"] is False
    assert row("hrnet_w48_ocr.cityscapes").settings["align_corners"] is False
    assert row("hrnet_w48_ocr.cityscapes-official").settings["align_corners"] is True
    ranks = {name: row(name).settings["ham_rank"] for name in ("segnext_b.ade20k", "segnext_b.ade20k-official")}
    assert ranks == {"segnext_b.ade20k": 16, "segnext_b.ade20k-official": 64}
    assert row("segformer_b2.cityscapes-hf").settings["block_norm_eps"] == 1e-6
    assert row("segformer_mmseg_b2.ade20k").settings["patch_norm_eps"] == 1e-6
    shifted = {entry.dataset for entry in ROWS if entry.zero_label_ignored}
    assert shifted == {"ade20k", "pascal_context_59", "coco_stuff10k", "loveda", "potsdam", "vaihingen"}


def test_each_pair_of_model_and_dataset_has_a_name_without_suffix():
    for entry in ROWS:
        assert f"{entry.model}.{entry.dataset or 'imagenet'}" in published.table()


# ----------------------------------------------------------------------------------------------------------- classes


def test_class_lists_match_those_of_the_benchmarks():
    assert {name: spec.num_classes for name, spec in CLASS_LISTS.items()} == {
        name: CLASSES[name] for name in CLASS_LISTS
    }
    for spec in CLASS_LISTS.values():
        assert len(set(spec.class_names)) == len(set(spec.colors)) == spec.num_classes
        assert all(name == name.strip() and name for name in spec.class_names)
    context, more = (CLASS_LISTS[name].class_names for name in ("pascal_context_59", "pascal_context"))
    assert more == ("background", *context) and list(context) == sorted(context)
    stuff = CLASS_LISTS["coco_stuff10k"].class_names
    # Things in the order of COCO's numbers, then stuff by name.
    assert stuff[:2] == ("person", "bicycle") and stuff[79] == "toothbrush"
    assert list(stuff[80:]) == sorted(stuff[80:]) and (stuff[80], stuff[-1]) == ("banner", "wood")
    assert CLASS_LISTS["loveda"].class_names[5] == "forest" and CLASS_LISTS["isaid"].class_names[8] == "large_vehicle"
    assert CLASS_LISTS["lip"].class_names[13] == "face"
    assert CLASS_LISTS["potsdam"].class_names == CLASS_LISTS["vaihingen"].class_names


def test_a_dataset_without_its_own_classes_has_no_class_list():
    with pytest.raises(KeyError):
        classes_of_dataset("folder")


# ----------------------------------------------------------------------------------------------------------- listing


def test_a_list_prints_one_line_for_each_row_with_figure_and_terms():
    found = segjax.list_weights("segformer_b2.*")
    lines = str(found).splitlines()
    assert [entry.name for entry in found] == [line.split()[0] for line in lines]
    assert lines[2].split() == [
        "segformer_b2.cityscapes",
        "1024x1024",
        "81",
        "slide",
        "1024",
        "non-commercial",
        "hf:smp-hub",
    ]
    assert repr(found) == str(found) and max(map(len, lines)) <= 80
    assert [entry.name for entry in segjax.list_weights("lip")] == ["hrnet_w48.lip", "hrnet_w48_ocr.lip"]
    assert str(segjax.list_weights("hrnet_w48_ocr.pascal_context_59")).split()[2] == "56.2*"
    assert len(segjax.list_weights()) == 162


def test_the_command_prints_the_list_or_the_nearest_names(capsys):
    assert weights.main(["*.isaid"]) == 0
    assert capsys.readouterr().out.split("\n") == [*str(segjax.list_weights("*.isaid")).splitlines(), ""]
    assert weights.main(["segformer_b2.citiscapes"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("segjax weights: no published weights match") and "segformer_b2.cityscapes" in error


def test_loading_an_encoder_is_refused_and_its_use_is_explained():
    with pytest.raises(CheckpointError) as caught:
        load("hrnet_w48.imagenet")
    message = str(caught.value)
    assert message.startswith("hrnet_w48.imagenet: an encoder") and "hrnet_w48.ade20k" in message
    assert "segjax train --config.init.checkpoint=hrnet_w48.imagenet" in message


def test_an_existing_path_takes_precedence_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published.find("segformer_b2.cityscapes").name == "segformer_b2.cityscapes"
    assert published.find("segformer_b2.nothing") is None
    (tmp_path / "segformer_b2.cityscapes").write_text("mine")
    assert published.find("segformer_b2.cityscapes") is None
    (tmp_path / "hrnet_w48.imagenet").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of segjax in this folder"):
        load("hrnet_w48.imagenet")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("segformer_b2.citiscapes", "segformer_b2.cityscapes"),
        ("segformer_b2", "segformer_b2.ade20k"),
        ("hrnet_w48.cityscape", "hrnet_w48.cityscapes"),
    ],
)
def test_an_unknown_source_is_refused_with_the_nearest_names(source, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(source)}: there is no such file, .* the nearest: {names}"):
        load(source)
    with pytest.raises(CheckpointError, match=r"there is no such file$"):
        load("other/" + source)

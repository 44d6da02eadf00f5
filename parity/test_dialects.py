"""Other packages' checkpoints are recognised automatically, loaded completely or not at all, and written back."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import segjax
from parity import compare, golden
from parity.mmseg_style import MMSegStyleSegFormer
from parity.subjects import NUM_CLASSES, SUBJECTS
from parity.test_forward import transformers_network
from segjax import models
from segjax.checkpoints.architectures import FAMILIES, family_of
from segjax.checkpoints.checkpoint import CheckpointError, as_arrays
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.renaming import renamings
from segjax.checkpoints.state_dict import settings_of
from segjax.torch_reference import verify
from segjax.torch_reference.randomise import randomise

# Every form with each subject of its family; alignment of corners is in no checkpoint.
TRIPS = [
    (label, form)
    for form in KEY_FORMATS
    for label, subject in SUBJECTS.items()
    if form.family == family_of(subject.name) and label != "hrnet, corners"
]
TRIP = pytest.mark.parametrize(
    ("label", "form"), TRIPS, ids=[f"{label}-{form.dialect}".replace(" ", "") for label, form in TRIPS]
)
WHOLE = [(label, form) for label, form in TRIPS if not form.encoder_only]
# mmsegmentation's convolutions without a bias, and the norms behind them.
FOLDED = {
    "hrnet": {"last_layer.0.bias": "last_layer.1.running_mean"},
    "ocr": {"aux_head.0.bias": "aux_head.1.running_mean", "conv3x3_ocr.0.bias": "conv3x3_ocr.1.running_mean"},
}


@functools.cache
def original(label, num_classes=NUM_CLASSES, seed=0):
    """A subject's weights under native names, float32, every one of them random; not to be written to."""
    subject = SUBJECTS[label]
    sizes = models.settings(subject.name) | subject.sizes
    reference = verify.REFERENCES[family_of(subject.name)](num_classes=num_classes, **sizes)
    return {key: value.numpy() for key, value in randomise(reference, seed).state_dict().items()}


@functools.cache
def model_of(label, dtype=jnp.float32):
    """The subject with its original weights in one of our models; not to be written to."""
    subject = SUBJECTS[label]
    if dtype != jnp.float32:
        return with_weights(model_of(label), lambda value: np.array(value).astype(dtype))
    return segjax.from_torch(original(label), name=subject.name, **subject.sizes)


def with_weights(model, change):
    """A copy with other weights."""
    graphdef, weights, rest = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    return nnx.merge(graphdef, jax.tree.map(lambda value: jnp.asarray(change(value)), weights), rest)


def empty(model):
    """The same model with zeros for weights, to load into."""
    return with_weights(model, lambda value: np.zeros(value.shape, value.dtype))


def renamed(native, form):
    """A native state dict as the form writes it, without a model."""
    if form.encoder_only:
        native = {key: value for key, value in native.items() if not FAMILIES[form.family].in_head(key)}
    return renamings(form)[0].to_foreign(native)


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def differing(one, other):
    """Keys that are not bit for bit the same in both."""
    return [
        key
        for key in one.keys() | other.keys()
        if not (key in one and key in other) or bits(one[key]) != bits(other[key])
    ]


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=["float32", "float16", "bfloat16"])
@TRIP
def test_the_round_trip_through_every_key_format_is_bitwise(label, form, dtype):
    model = model_of(label, dtype)
    before = segjax.to_torch(model)
    there = segjax.to_torch(model, dialect=form.dialect)
    assert {value.dtype for value in there.values()} <= {np.dtype(dtype), np.dtype(np.int64)}
    again = empty(model)
    head = FAMILIES[form.family].head if form.encoder_only else ()
    segjax.load_torch(again, there, dialect=form.dialect, keep=head)
    back = segjax.to_torch(again)
    expected = {
        key: np.zeros_like(value) if form.encoder_only and FAMILIES[form.family].in_head(key) else value
        for key, value in before.items()
    }
    assert any(value.any() for value in expected.values())
    folded = FOLDED[label] if form.dialect == "mmseg" and label in FOLDED else {}
    for bias, mean in folded.items():
        exact = before[mean].astype(np.float64) - before[bias].astype(np.float64)
        rounding = float(jnp.finfo(dtype).eps) * np.abs(exact) + float(jnp.finfo(dtype).smallest_subnormal)
        assert before[bias].any() and not back[bias].any()
        assert (np.abs(back[mean].astype(np.float64) - exact) <= rounding).all()
        expected |= {bias: back[bias], mean: back[mean]}
    assert differing(back, expected) == []


@pytest.mark.each_value_once
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("label", FOLDED)
def test_folding_a_bias_into_the_running_mean_changes_no_output(label, training, within, quick_to_compile):
    subject = SUBJECTS[label]
    settings = dict(name=subject.name, **subject.fixed, align_corners=label == "ocr")
    before = segjax.from_torch(original(label), **settings)
    after = segjax.from_torch(segjax.to_torch(before, dialect="mmseg"), **settings)
    x = compare.images(2, (40, 136), seed=0, dtype="float32")
    outputs = []
    for model in (before, after):
        model.train() if training else model.eval()
        graphdef, state = nnx.split(model)
        run = _running(graphdef)
        outputs.append(run(state, x))
    (ours, taps), (theirs, their_taps) = outputs
    within("output", "float32", verify.relative_error(ours, theirs), f"{label}, after mmseg's names and back")
    if label == "ocr":
        within(
            "output", "float32", verify.relative_error(taps["aux_logits"], their_taps["aux_logits"]), "ocr, auxiliary"
        )


@functools.cache
def _running(graphdef):
    # One program for both models.
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "model_state_dict", "module.", "model.", "nested"])
@pytest.mark.parametrize(("label", "form"), [trip for trip in WHOLE if trip[1].dialect != "native"][:4])
def test_wrapped_checkpoints_are_unwrapped(label, form, wrap):
    weights = renamed(original(label), form)
    wrapped = weights
    if wrap.endswith("."):
        wrapped = {f"{wrap}{key}": value for key, value in weights.items()}
    elif wrap == "nested":
        wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}
    elif wrap != "plain":
        wrapped = {wrap: weights, "optimizer": {"lr": 0.1}}
    assert differing(as_arrays(wrapped), weights) == []


def test_the_official_hrnet_loads_from_inside_its_loss_wrapper(caplog):
    caplog.set_level(logging.INFO, "segjax")
    weights = golden.weights("hrnet_ocr_official", native=False)
    wrapped = {f"model.{key}": value for key, value in weights.items()}
    wrapped["loss.criterion.weight"] = np.ones(19, np.float32)
    for prefix in ("", "module."):
        caplog.clear()
        model = segjax.from_torch({prefix + key: value for key, value in wrapped.items()})
        assert model.spec.name == "hrnet_w18_ocr"
        assert differing(segjax.to_torch(model), weights) == []
        assert f"not used from the checkpoint (1): {prefix}loss.criterion.weight" in caplog.messages


def test_batch_counters_may_be_missing():
    for label in ("segformer", "ocr"):
        weights = {key: value for key, value in original(label).items() if "num_batches" not in key}
        model = empty(model_of(label))
        segjax.load_torch(model, weights)
        assert differing(segjax.to_torch(model), segjax.to_torch(model_of(label))) == []


# --------------------------------------------------------------------------------------------- recognised by themselves


class FoundError(Exception):
    """What from_torch asks `create` for: name, classes, overrides."""


@pytest.fixture
def ask(monkeypatch, caplog):
    """ask(weights, ...): name, classes and overrides of the model that from_torch would make, without making it; what
    it said is in caplog."""
    caplog.set_level(logging.INFO, "segjax")

    def create(name, *, num_classes, dtype, param_dtype, **overrides):
        raise FoundError(name, num_classes, overrides)

    monkeypatch.setattr(models, "create", create)

    def asked(weights, **settings):
        caplog.clear()
        with pytest.raises(FoundError) as found:
            segjax.from_torch(weights, **settings)
        return found.value.args

    return asked


@functools.cache
def blank(name, num_classes=150):
    """A published variant's state dict, native names, its shapes filled with one zero."""
    with torch.device("meta"):
        reference = verify.REFERENCES[family_of(name)](num_classes=num_classes, **models.settings(name))
    zero = np.zeros((), np.float32)
    return {key: np.broadcast_to(zero, tuple(value.shape)) for key, value in reference.state_dict().items()}


# Of an encoder alone the family cannot be told: which one it is taken for. Where two packages write the same names, the
# first of them.
TAKEN_FOR = {
    ("backbone", "segformer_plain"): ("backbone", "segformer"),
    ("backbone", "segformer_mmseg"): ("backbone", "segformer"),
    ("segmentation_pytorch", "segformer_simple"): ("native", "segformer_simple"),
    ("segmentation_pytorch", "hrnet"): ("native", "hrnet"),
    ("timm", "hrnet"): ("native", "hrnet"),
    ("timm", "hrnet_ocr"): ("native", "hrnet"),
    ("backbone", "hrnet"): ("native", "hrnet"),
    ("backbone", "hrnet_ocr"): ("native", "hrnet"),
}


@pytest.mark.parametrize("name", models.MODELS)
def test_every_variant_is_recognised_in_every_key_format(name, ask, caplog):
    family = family_of(name)
    for form in KEY_FORMATS:
        if form.family != family:
            continue
        dialect, taken = TAKEN_FOR.get((form.dialect, family), (form.dialect, family))
        weights = renamed(blank(name), form)
        found, classes, overrides = ask(weights, num_classes=19 if form.encoder_only else None)
        renamed_to = name.replace(family, taken) if "segformer" in family else name
        assert found == (name.removesuffix("_ocr") if form.encoder_only and "hrnet" in name else renamed_to)
        assert classes == (19 if form.encoder_only else 150)
        assert any(text.startswith(f"read as {dialect} (") for text in caplog.messages)
        # Nothing is unlike the variant but what the package is known for.
        assert overrides.keys() <= {"block_norm_eps", "patch_norm_eps", "ham_rank", "align_corners"}


def test_a_variant_with_another_decoder_keeps_its_name(ask):
    # segmentation-models-pytorch gives every backbone a decoder of 256.
    sizes = models.settings("segformer_b2") | dict(decoder_dim=256)
    with torch.device("meta"):
        reference = verify.REFERENCES["segformer"](num_classes=3, **sizes)
    native = {key: np.zeros(value.shape, np.float32) for key, value in reference.state_dict().items()}
    (smp,) = (form for form in KEY_FORMATS if (form.dialect, form.family) == ("smp", "segformer"))
    assert ask(renamed(native, smp)) == ("segformer_b2", 3, {"decoder_dim": 256})


HEADS, HALVES = "num_heads=(1, 2, 5, 8)", ("block_norm_eps=1e-06", "patch_norm_eps=1e-05")


@pytest.mark.parametrize(
    ("name", "dialect", "assumptions"),
    [
        ("segformer_b1", "native", (HEADS, *HALVES)),
        ("segformer_b1", "hf", (HEADS, "block_norm_eps=1e-05", "patch_norm_eps=1e-05")),
        ("segformer_b1", "smp", (HEADS, *HALVES)),
        ("segformer_b1", "backbone", (HEADS, *HALVES)),
        ("segformer_plain_b1", "segmentation_pytorch", (HEADS, *HALVES)),
        ("segformer_mmseg_b1", "mmseg", (HEADS, "block_norm_eps=1e-06", "patch_norm_eps=1e-06")),
        ("segformer_simple", "native", (HEADS,)),
        ("segformer_zuppichini", "native", ("num_heads=(1, 2, 4, 8)",)),
        ("hrnet_w32", "native", ("align_corners=True",)),
        ("hrnet_w32", "timm", ("align_corners=False",)),
        ("hrnet_w32", "mmseg", ("align_corners=False",)),
        ("hrnet_w48_ocr", "native", ("align_corners=True",)),
        ("hrnet_w48_ocr", "mmseg", ("align_corners=False",)),
        ("segnext_t", "native", ("ham_rank=16",)),
        ("segnext_b", "native", ("ham_rank=64",)),
        ("segnext_l", "native", ("ham_rank=64",)),
        ("segnext_b", "backbone", ("ham_rank=64",)),
        ("segnext_b", "mmseg", ("ham_rank=16",)),
        ("segnext_l", "mmseg", ("ham_rank=16",)),
        ("segnext_b", "cvpytorch", ("ham_rank=64",)),
    ],
)
def test_settings_that_a_checkpoint_lacks_are_assumed_and_printed(name, dialect, assumptions, ask, caplog):
    (form,) = (form for form in KEY_FORMATS if (form.dialect, form.family) == (dialect, family_of(name)))
    weights = renamed(blank(name), form)
    found, _, overrides = ask(weights, num_classes=150)
    lines = (re.match(r"assumed (.*): a checkpoint does not contain", text) for text in caplog.messages)
    said = [line[1] for line in lines if line]
    assert (found, sorted(said)) == (name, sorted(assumptions))
    settings = models.settings(name) | overrides
    assert sorted(f"{key}={settings[key]}" for key in (text.partition("=")[0] for text in said)) == sorted(assumptions)
    # What is given is not assumed.
    setting = assumptions[0].partition("=")[0]
    given = ask(weights, num_classes=150, **{setting: "given"})[2]
    assert given[setting] == "given" and not any(text.startswith(f"assumed {setting}") for text in caplog.messages)


@pytest.mark.parametrize(
    ("dialect", "num_classes", "align_corners"),
    [
        ("native", 19, False),
        ("native", 20, False),
        ("native", 59, False),
        ("native", 150, True),
        ("native", 171, True),
        # Only the official repository has two kinds.
        ("mmseg", 150, False),
        ("segmentation_pytorch", 150, False),
    ],
)
def test_official_hrnets_of_ade20k_and_coco_stuff_have_aligned_corners(
    dialect, num_classes, align_corners, ask, caplog
):
    (form,) = (form for form in KEY_FORMATS if (form.dialect, form.family) == (dialect, "hrnet"))
    weights = renamed(blank("hrnet_w18", num_classes), form)
    _, classes, overrides = ask(weights, dialect=dialect)
    assert classes == num_classes
    assert overrides.get("align_corners", False) is align_corners
    package = f"{form.package} with {num_classes} classes" if align_corners else form.package
    line = f"assumed align_corners={align_corners}: a checkpoint does not contain it; published for {package}"
    assert line in caplog.messages


@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 1])
@pytest.mark.parametrize(("label", "form"), WHOLE, ids=[f"{label}-{form.dialect}" for label, form in WHOLE])
def test_sizes_of_no_variant_are_inferred_from_the_shapes(label, form, num_classes, ask):
    subject = SUBJECTS[label]
    found, classes, overrides = ask(renamed(original(label, num_classes), form))
    assert (family_of(found), classes) == (form.family, num_classes)
    settings = models.settings(found) | overrides
    told = subject.sizes.keys() - {"ham_rank", "num_heads", "align_corners"}
    assert {key: settings[key] for key in told} == {key: subject.sizes[key] for key in told}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("segformer_b0", dict(dims=(11, 22, 55, 88), hidden=15, sr_ratios=(8, 4, 2, 1))),
        ("segformer_b3", dict(dims=(26, 44, 60, 96), hidden=120, sr_ratios=(1, 2, 3, 4))),
        ("segformer_mmseg_b1", dict(dims=(13, 26, 65, 104), hidden=52, sr_ratios=(5, 1, 1, 1))),
    ],
)
def test_any_width_and_reduction_is_inferred(name, sizes):
    hidden = sizes.pop("hidden") if "hidden" in sizes else 8
    sizes |= dict(mlp_ratios=tuple(hidden / dim for dim in sizes["dims"]), depths=(1, 1, 2, 1), decoder_dim=8)
    reference = verify.REFERENCES[family_of(name)](num_classes=3, **models.settings(name) | sizes)
    weights = randomise(reference, 0).state_dict()
    model = segjax.from_torch(weights)
    assert differing(segjax.to_torch(model), as_arrays(weights)) == []


@pytest.mark.parametrize("file", golden.MODELS)
def test_files_of_the_original_code_are_recognised(file, caplog):
    caplog.set_level(logging.INFO, "segjax")
    name, sizes = golden.MODELS[file]
    weights = golden.weights(file, native=False)
    heads = dict(num_heads=sizes["num_heads"]) if name == "segformer_zuppichini" else {}
    model = segjax.from_torch(weights, **heads)
    seeds = file in ("segformer_jo_jstrm", "segformer_camlaedtke")
    dialect = "segmentation_pytorch" if seeds else "native"
    assert (model.spec.name, model.spec.num_classes) == (name, golden.NUM_CLASSES)
    settings = settings_of(model)
    assert {key: settings[key] for key in sizes if key != "ham_rank"} == {
        key: value for key, value in sizes.items() if key != "ham_rank"
    }
    assert any(text.startswith(f"read as {dialect} (") for text in caplog.messages)
    written = segjax.to_torch(model, dialect=dialect)
    assert differing(written, weights) == []
    if seeds:
        assert differing(segjax.to_torch(model), golden.weights(file)) == []
    elif dialects := {form.dialect for form in KEY_FORMATS if form.family == family_of(name)} & {
        "segmentation_pytorch"
    }:
        # The seed's HRNet and simple SegFormer have the official names.
        assert differing(segjax.to_torch(model, dialect=dialects.pop()), weights) == []


# ------------------------------------------------------------------- what we write is what the package reads and writes


def tensors(weights):
    return {key: torch.from_numpy(value.copy()) for key, value in weights.items()}


def torch_output(network, x):
    with torch.no_grad():
        output = network(verify.to_nchw(x))
    if isinstance(output, tuple):
        output = output[0]
    return verify.to_nhwc(output if isinstance(output, torch.Tensor) else output.logits)


def test_mmsegs_module_loads_our_weights_and_gives_our_output(within):
    model, sizes = model_of("mmseg"), SUBJECTS["mmseg"].sizes
    network = MMSegStyleSegFormer(num_classes=NUM_CLASSES, **sizes).eval()
    network.load_state_dict(tensors(segjax.to_torch(model, dialect="mmseg")), strict=True)
    x = compare.images(2, (65, 97), seed=1, dtype="float32")
    error = verify.relative_error(verify.compiled(model)(x)[0], torch_output(network, x))
    within("output", "float32", error, "mmseg's own module, loaded with what we write")
    again = segjax.from_torch(network.state_dict())
    assert (again.spec.name, again.spec.num_classes) == ("segformer_mmseg_b0", NUM_CLASSES)
    assert differing(segjax.to_torch(again), segjax.to_torch(model)) == []


def test_the_simple_package_loads_our_weights_and_gives_our_output(within):
    from segformer_pytorch import Segformer

    model, sizes = model_of("simple"), SUBJECTS["simple"].sizes
    network = Segformer(
        dims=sizes["dims"],
        ff_expansion=sizes["mlp_ratios"],
        num_layers=sizes["depths"],
        decoder_dim=sizes["decoder_dim"],
        num_classes=NUM_CLASSES,
    ).eval()
    x = compare.images(2, (64, 96), seed=1, dtype="float32")
    for dialect in ("native", "segmentation_pytorch"):
        network.load_state_dict(tensors(segjax.to_torch(model, dialect=dialect)), strict=True)
    error = verify.relative_error(verify.compiled(model)(x)[0], torch_output(network, x))
    within("output", "float32", error, "the simple package, loaded with what we write")


@pytest.fixture(scope="module")
def transformers_narrow():
    """A transformers model of sizes that no variant has."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=5,
        hidden_sizes=[8, 16, 20, 32],
        depths=[2, 1, 1, 1],
        decoder_hidden_size=24,
        num_attention_heads=[1, 2, 5, 8],
    )
    return randomise(transformers.SegformerForSemanticSegmentation(config), 3).eval()


def saved_by_transformers(network, folder):
    """What transformers writes to disk."""
    from safetensors.numpy import load_file

    network.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_both_key_maps_of_transformers_give_the_same_model_and_output(transformers_narrow, tmp_path, within):
    x = compare.images(2, (65, 97), seed=0, dtype="float32")
    on_disk = saved_by_transformers(transformers_narrow, tmp_path)
    in_memory = transformers_narrow.state_dict()
    assert on_disk.keys() != in_memory.keys()
    one, other = (segjax.from_torch(weights) for weights in (on_disk, in_memory))
    assert one.spec == other.spec
    assert differing(segjax.to_torch(one), segjax.to_torch(other)) == []
    error = verify.relative_error(verify.compiled(one)(x)[0], torch_output(transformers_narrow, x))
    within("output", "float32", error, "hf, narrow")


def test_our_weights_for_transformers_equal_its_own_and_load_there(transformers_narrow, tmp_path, within):
    on_disk = saved_by_transformers(transformers_narrow, tmp_path)
    model = segjax.from_torch(on_disk)
    written = segjax.to_torch(model, dialect="hf")
    counters = {key for key in differing(written, on_disk) if key.endswith("num_batches_tracked")}
    assert set(differing(written, on_disk)) == counters
    x = compare.images(2, (40, 136), seed=1, dtype="float32")
    loaded = verify._transformers_model(model, written).eval()
    error = verify.relative_error(torch_output(loaded, x), torch_output(transformers_narrow, x))
    within("output", "float32", error, "hf, written and reloaded")


# Published names, written out here apart from the tables under test: pattern of a native key -> the package's.
_MMSEG_HRNET = {
    r"(conv\d|bn\d|layer1|transition\d|stage\d)\.(.*)": r"backbone.\1.\2",
    r"last_layer\.0\.(.*)": r"decode_head.convs.0.conv.\1",
    r"last_layer\.1\.(.*)": r"decode_head.convs.0.bn.\1",
    r"last_layer\.3\.(.*)": r"decode_head.conv_seg.\1",
}
_OCR_BLOCK, _MMSEG_BLOCK = r"ocr_distri_head\.object_context_block\.", r"decode_head.1.object_context_block."
_MMSEG_OCR = {
    r"(conv\d|bn\d|layer1|transition\d|stage\d)\.(.*)": r"backbone.\1.\2",
    r"aux_head\.0\.(.*)": r"decode_head.0.convs.0.conv.\1",
    r"aux_head\.1\.(.*)": r"decode_head.0.convs.0.bn.\1",
    r"aux_head\.3\.(.*)": r"decode_head.0.conv_seg.\1",
    r"conv3x3_ocr\.0\.(.*)": r"decode_head.1.bottleneck.conv.\1",
    r"conv3x3_ocr\.1\.(.*)": r"decode_head.1.bottleneck.bn.\1",
    _OCR_BLOCK + r"f_pixel\.0\.(.*)": _MMSEG_BLOCK + r"query_project.0.conv.\1",
    _OCR_BLOCK + r"f_pixel\.1\.0\.(.*)": _MMSEG_BLOCK + r"query_project.0.bn.\1",
    _OCR_BLOCK + r"f_pixel\.2\.(.*)": _MMSEG_BLOCK + r"query_project.1.conv.\1",
    _OCR_BLOCK + r"f_pixel\.3\.0\.(.*)": _MMSEG_BLOCK + r"query_project.1.bn.\1",
    _OCR_BLOCK + r"f_object\.0\.(.*)": _MMSEG_BLOCK + r"key_project.0.conv.\1",
    _OCR_BLOCK + r"f_object\.1\.0\.(.*)": _MMSEG_BLOCK + r"key_project.0.bn.\1",
    _OCR_BLOCK + r"f_object\.2\.(.*)": _MMSEG_BLOCK + r"key_project.1.conv.\1",
    _OCR_BLOCK + r"f_object\.3\.0\.(.*)": _MMSEG_BLOCK + r"key_project.1.bn.\1",
    _OCR_BLOCK + r"f_down\.0\.(.*)": _MMSEG_BLOCK + r"value_project.conv.\1",
    _OCR_BLOCK + r"f_down\.1\.0\.(.*)": _MMSEG_BLOCK + r"value_project.bn.\1",
    _OCR_BLOCK + r"f_up\.0\.(.*)": _MMSEG_BLOCK + r"out_project.conv.\1",
    _OCR_BLOCK + r"f_up\.1\.0\.(.*)": _MMSEG_BLOCK + r"out_project.bn.\1",
    r"ocr_distri_head\.conv_bn_dropout\.0\.(.*)": _MMSEG_BLOCK + r"bottleneck.conv.\1",
    r"ocr_distri_head\.conv_bn_dropout\.1\.0\.(.*)": _MMSEG_BLOCK + r"bottleneck.bn.\1",
    r"cls_head\.(.*)": r"decode_head.1.conv_seg.\1",
}
_SMP = {
    r"backbone\.(.*)": r"encoder.\1",
    # The deepest first.
    r"decode_head\.linear_c4\.proj\.(.*)": r"decoder.mlp_stage.0.linear.\1",
    r"decode_head\.linear_c3\.proj\.(.*)": r"decoder.mlp_stage.1.linear.\1",
    r"decode_head\.linear_c2\.proj\.(.*)": r"decoder.mlp_stage.2.linear.\1",
    r"decode_head\.linear_c1\.proj\.(.*)": r"decoder.mlp_stage.3.linear.\1",
    r"decode_head\.linear_fuse\.conv\.(.*)": r"decoder.fuse_stage.0.\1",
    r"decode_head\.linear_fuse\.bn\.(.*)": r"decoder.fuse_stage.1.\1",
    r"decode_head\.linear_pred\.(.*)": r"segmentation_head.0.\1",
}
PUBLISHED = {
    ("segformer", "smp"): _SMP,
    ("segformer", "backbone"): {r"backbone\.(.*)": r"\1"},
    ("plain, conv", "segmentation_pytorch"): {r"(backbone|decode_head)\.(.*)": r"\2"},
    ("plain, conv_bn", "segmentation_pytorch"): {r"(backbone|decode_head)\.(.*)": r"\2"},
    ("hrnet", "timm"): {r"((layer1|transition\d|stage\d|conv\d|bn\d)\..*)": r"\1"},
    ("hrnet", "mmseg"): _MMSEG_HRNET,
    ("ocr", "mmseg"): _MMSEG_OCR,
    ("segnext", "mmseg"): {
        r"(backbone\.block\d\.\d+\.mlp)\.dwconv\.dwconv\.(.*)": r"\1.dwconv.\2",
        r"((backbone|decode_head)\..*)": r"\1",
    },
    ("segnext", "cvpytorch"): {
        r"decode_head\.conv_seg\.(.*)": r"head.cls_seg.\1",
        r"decode_head\.(.*)": r"head.\1",
        r"backbone\.(.*)": r"backbone.\1",
    },
    ("segnext", "backbone"): {r"backbone\.(.*)": r"\1"},
    ("hrnet", "backbone"): {r"((layer1|transition\d|stage\d|conv\d|bn\d)\..*)": r"\1"},
}


@pytest.mark.parametrize(("label", "dialect"), PUBLISHED, ids=[f"{label}-{to}" for label, to in PUBLISHED])
def test_the_names_we_write_are_the_published_ones(label, dialect):
    native = original(label)
    if dialect == "mmseg" and label in FOLDED:
        native = dict(native)
        for bias, mean in FOLDED[label].items():
            native[mean] = native[mean] - native.pop(bias)
    expected, unnamed, patterns = {}, set(), PUBLISHED[label, dialect]
    for key, value in native.items():
        names = [re.sub(pattern, name, key) for pattern, name in patterns.items() if re.fullmatch(pattern, key)]
        if names:
            expected[names[0]] = value
        else:
            unnamed.add(key.partition(".")[0])
    head = {"last_layer"} if label == "hrnet" else {"decode_head"}
    assert unnamed == (head if dialect in ("timm", "backbone") else set())
    assert differing(segjax.to_torch(model_of(label), dialect=dialect), expected) == []


# ------------------------------------------------------------------------------------------------------ encoders alone

IMAGENET_MIT = {"head.weight": (1000, 32), "head.bias": (1000,)}
IMAGENET_HRNET = {
    "incre_modules.0.0.conv1.weight": (32, 6, 1, 1),
    "downsamp_modules.0.0.bias": (256,),
    "final_layer.1.running_mean": (2048,),
    "classifier.weight": (1000, 2048),
}
# Subject, dialect, name to insist on (the family that the encoder alone is not taken for), extras of ImageNet.
ALONE = [
    ("segformer", "backbone", "auto", IMAGENET_MIT),
    ("hrnet", "timm", "auto", IMAGENET_HRNET),
    ("segnext", "backbone", "auto", IMAGENET_MIT),
    ("plain, conv", "backbone", "segformer_plain_b0", IMAGENET_MIT),
    ("mmseg", "backbone", "segformer_mmseg_b0", IMAGENET_MIT),
    ("ocr", "timm", "hrnet_w18_ocr", IMAGENET_HRNET),
]
VARIANTS = ("plain, conv", "mmseg", "ocr")
EACH_ALONE = [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (case[0] in VARIANTS)) for case in ALONE]


def alone(label, dialect, extras):
    """An encoder's weights as the package writes them, and the classifier that they were trained with."""
    family = family_of(SUBJECTS[label].name)
    (form,) = (form for form in KEY_FORMATS if (form.dialect, form.family) == (dialect, family))
    return renamed(original(label), form) | {key: np.ones(shape, np.float32) for key, shape in extras.items()}


def encoder_of(weights, label):
    family = FAMILIES[family_of(SUBJECTS[label].name)]
    return {key: value for key, value in weights.items() if not family.in_head(key)}


@pytest.mark.parametrize(("label", "dialect", "name", "extras"), EACH_ALONE)
def test_an_encoder_becomes_a_model_if_num_classes_is_given(label, dialect, name, extras, caplog):
    caplog.set_level(logging.INFO, "segjax")
    subject, weights = SUBJECTS[label], alone(label, dialect, extras)
    with pytest.raises(CheckpointError, match="give the number of classes"):
        segjax.from_torch(weights, name=name)
    decoder = {key: subject.sizes[key] for key in subject.sizes if re.match("decoder_dim|ham_channels|ocr_", key)}
    model = segjax.from_torch(weights, name=name, num_classes=9, **decoder)
    assert (model.spec.name, model.spec.num_classes) == (subject.name, 9)
    loaded = segjax.to_torch(model)
    assert differing(encoder_of(loaded, label), encoder_of(original(label), label)) == []
    classifiers = [key for key, value in loaded.items() if value.ndim == 4 and len(value) == 9]
    assert classifiers and all(loaded[key].std() > 0 for key in classifiers)
    said = " ".join(caplog.messages)
    assert all(key in said for key in extras) and f"not used from the checkpoint ({len(extras)})" in said
    assert "left as initialised" in said and "the decoder stays as initialised" in said


@pytest.mark.slow
def test_the_decoder_of_an_encoder_is_initialised_as_create_does():
    model = segjax.from_torch(alone("segformer", "backbone", {}), num_classes=9, decoder_dim=24)
    created = segjax.create("segformer_b0", num_classes=9, **SUBJECTS["segformer"].sizes)
    ours, theirs = segjax.to_torch(model), segjax.to_torch(created)
    for key in ours.keys() - encoder_of(ours, "segformer").keys():
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("published", ["mmseg", "hf", "hf, in memory"])
def test_encoders_in_other_key_formats_are_recognised_as_encoders(published, ask):
    if published == "mmseg":
        sizes = SUBJECTS["mmseg"].sizes
        state_dict = MMSegStyleSegFormer(num_classes=2, **sizes).backbone.state_dict()
        expected = "segformer_mmseg_b0"
    else:
        import transformers

        sizes = dict(hidden_sizes=[8, 16, 20, 32], depths=[2, 1, 1, 1])
        config = transformers.SegformerConfig(**sizes)
        # A classifier of ImageNet, and the encoder saved by itself.
        network = transformers.SegformerForImageClassification(config)
        state_dict = network.state_dict() if published == "hf" else network.segformer.state_dict()
        expected = "segformer_b0"
    name, classes, overrides = ask(state_dict, num_classes=4)
    assert (name, classes) == (expected, 4)
    assert (overrides["dims"], overrides["depths"]) == ((8, 16, 20, 32), (2, 1, 1, 1))
    assert ask(state_dict, num_classes=4, name="segformer_b0")[0] == "segformer_b0"


def test_an_image_classifier_of_transformers_gives_its_encoder():
    import transformers

    config = transformers.SegformerConfig(hidden_sizes=[8, 16, 20, 32], depths=[2, 1, 1, 1], num_labels=11)
    network = transformers.SegformerForImageClassification(config)
    ours = segjax.to_torch(segjax.from_torch(network.state_dict(), num_classes=4, decoder_dim=24), dialect="hf")
    theirs = network.state_dict()["segformer.stages.2.layer_norm.weight"].numpy()
    assert np.array_equal(ours["segformer.encoder.layer_norm.2.weight"], theirs)


@pytest.mark.parametrize(("label", "dialect", "name", "extras"), EACH_ALONE)
def test_load_torch_takes_an_encoder_if_given_what_to_drop_and_keep(label, dialect, name, extras, caplog):
    caplog.set_level(logging.INFO, "segjax")
    weights, model = alone(label, dialect, extras), empty(model_of(label))
    head = FAMILIES[family_of(SUBJECTS[label].name)].head
    drop = {f"{key.partition('.')[0]}.*" for key in extras}
    for partly in (dict(), dict(drop=drop), dict(keep=head)):
        with pytest.raises(CheckpointError) as raised:
            segjax.load_torch(model, weights, **partly)
        message = str(raised.value)
        classifiers = [key for key in original(label) if key.endswith(("linear_pred.weight", "conv_seg.weight"))]
        assert all((key in message) == ("drop" not in partly) for key in extras)
        assert all((key in message) == ("keep" not in partly) for key in classifiers)
        assert not any(value.any() for value in segjax.to_torch(model).values())
    segjax.load_torch(model, weights, drop=drop, keep=head)
    loaded = segjax.to_torch(model)
    assert differing(encoder_of(loaded, label), encoder_of(original(label), label)) == []
    assert not any(loaded[key].any() for key in loaded.keys() - encoder_of(loaded, label).keys())
    said = " ".join(caplog.messages)
    assert all(key in said for key in extras) and "left as initialised" in said


def test_a_string_is_one_pattern_and_may_name_foreign_keys_to_keep():
    form = next(form for form in KEY_FORMATS if form.dialect == "hf")
    weights, model = renamed(original("segformer"), form), empty(model_of("segformer"))
    del weights["decode_head.classifier.weight"]
    segjax.load_torch(model, weights | {"head.weight": np.ones(3)}, drop="head.*", keep="decode_head.classifier.*")
    assert differing(segjax.to_torch(model), original("segformer")) == ["decode_head.linear_pred.weight"]
    with pytest.raises(CheckpointError, match="nothing"):
        segjax.load_torch(model, weights, drop="*", keep="*")


def test_an_unused_classifier_of_the_original_is_dropped_and_named(caplog):
    caplog.set_level(logging.INFO, "segjax")
    unused = {
        "decode_head.conv_seg.weight": np.ones((3, 128, 1, 1), np.float32),
        "decode_head.conv_seg.bias": np.ones(3, np.float32),
    }
    model = empty(model_of("segformer"))
    segjax.load_torch(model, original("segformer") | unused)
    assert differing(segjax.to_torch(model), original("segformer")) == []
    assert "not used from the checkpoint (2): decode_head.conv_seg.bias, decode_head.conv_seg.weight" in caplog.messages


@pytest.mark.parametrize("label", ["mmseg", "hrnet", "ocr", "segnext"])
def test_mmsegs_data_preprocessor_is_dropped_automatically(label):
    form = next(form for label_, form in TRIPS if (label_, form.dialect) == (label, "mmseg"))
    weights, model = renamed(original(label), form), empty(model_of(label))
    extra = {"data_preprocessor.mean": np.ones((3, 1, 1), np.float32)}
    segjax.load_torch(model, weights | extra)
    expected = empty(model_of(label))
    segjax.load_torch(expected, weights)
    assert differing(segjax.to_torch(model), segjax.to_torch(expected)) == []


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def quick(monkeypatch):
    """Makes the models that from_torch asks for only once each, for tests of what does not fit them."""
    monkeypatch.setattr(models, "create", lambda name, **settings: _abstract(name, tuple(settings.items())))
    monkeypatch.setattr(nnx, "eval_shape", lambda make: make())


_eval_shape, _create = nnx.eval_shape, models.create


@functools.cache
def _abstract(name, settings):
    return _eval_shape(lambda: _create(name, **dict(settings)))


def refused(weights, **settings):
    """The message with which from_torch refuses."""
    with pytest.raises(CheckpointError) as raised:
        segjax.from_torch(weights, **settings)
    return str(raised.value)


@pytest.mark.parametrize(("label", "form"), WHOLE, ids=[f"{label}-{form.dialect}" for label, form in WHOLE])
def test_a_wrong_key_is_reported_under_its_name_in_the_file(label, form, quick):
    weights = renamed(original(label), form)
    keys = [key for key in weights if not key.endswith("num_batches_tracked")]
    # Some of them tell sizes, most do not.
    for key in keys[:: len(keys) // 5]:
        assert key in refused({other: value for other, value in weights.items() if other != key}), "missing"
    for key in (keys[0], keys[len(keys) // 2]):
        for what, value in (
            ("misshapen", np.zeros((*weights[key].shape, 2), np.float32)),
            ("scalar", np.zeros((), np.float32)),
            ("empty", np.zeros((0, *weights[key].shape[1:]), np.float32)),
            ("integers", weights[key].astype(np.int32)),
        ):
            assert key in refused(weights | {key: value}), what
    assert "neck.lateral.weight" in refused(weights | {"neck.lateral.weight": np.zeros(3, np.float32)})
    deeper = re.sub(r"\d+(?=\D*$)", "97", keys[len(keys) // 2])
    assert deeper in refused(weights | {deeper: np.zeros(3, np.float32)})


def zeros(**shapes):
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


RESNET = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "layer1.0.conv1.weight": (64, 64, 1, 1)}
RESNET |= {"layer2.0.conv1.weight": (128, 256, 1, 1), "fc.weight": (1000, 2048), "fc.bias": (1000,)}
CONVNEXT = {"downsample_layers.0.0.weight": (96, 3, 4, 4), "stages.0.0.dwconv.weight": (96, 1, 7, 7)}
CONVNEXT |= {"stages.0.0.gamma": (96,), "norm.weight": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}
UNET = {"inc.double_conv.0.weight": (64, 3, 3, 3), "down1.maxpool_conv.1.double_conv.0.weight": (128, 64, 3, 3)}
UNET |= {"up1.up.weight": (1024, 512, 2, 2), "outc.conv.weight": (2, 64, 1, 1)}
SMP_UNET = {"encoder.conv1.weight": (64, 3, 7, 7), "decoder.blocks.0.conv1.0.weight": (256, 3072, 3, 3)}
SMP_UNET |= {"segmentation_head.0.weight": (2, 16, 3, 3), "segmentation_head.0.bias": (2,)}
DEEPLAB = {f"backbone.{key}": shape for key, shape in RESNET.items() if "fc" not in key}
DEEPLAB |= {"classifier.0.convs.0.0.weight": (256, 2048, 1, 1), "classifier.4.weight": (21, 256, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "nearest", "lacking"),
    [
        (RESNET, "HRNet as native", "stage2.0.branches.0.0.conv1.weight"),
        (CONVNEXT, "SegFormer", "it lacks"),
        (UNET, "SegFormer", "it lacks"),
        (SMP_UNET, "SegFormer as smp", "encoder.patch_embed1.proj.weight"),
        (DEEPLAB, "HRNet as mmseg", "backbone.stage2.0.branches.0.0.conv1.weight"),
    ],
    ids=["resnet", "convnext", "unet", "unet of smp", "deeplab"],
)
def test_refusing_another_network_names_the_nearest_and_differences(shapes, nearest, lacking):
    message = refused(zeros(**shapes))
    assert f"The nearest family is {nearest}" in message and lacking in message
    assert re.search(rf"\d of {len(shapes)} keys have a place there", message)
    strangers = [key for key in shapes if key in message]
    assert strangers, "names what it has no place for"


def without(weights, pattern):
    return {key: value for key, value in weights.items() if not re.match(pattern, key)}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        (lambda: {}, "it is empty"),
        (lambda: {"epoch": 3}, "epoch: int"),
        (lambda: {"state_dict": {}}, "it is empty"),
        (lambda: [1, 2], "got list"),
        (lambda: None, "got None"),
        (lambda: {"a.b": np.array("text")}, "it lacks"),
        (lambda: {"a.b": np.array([None])}, "it lacks"),
        (lambda: {1: np.zeros(3)}, "it lacks"),
        (lambda: {"": np.zeros(3)}, "it lacks"),
        # The same number of keys for two families: a classifier, and nothing else.
        (
            lambda: zeros(**{"decode_head.conv_seg.weight": (7, 24, 1, 1), "decode_head.conv_seg.bias": (7,)}),
            "it lacks",
        ),
        (lambda: zeros(**{"decode_head.linear_pred.weight": (7, 24, 1, 1)}), "backbone.patch_embed1.proj.weight"),
        (lambda: without(original("segformer"), "backbone"), "backbone.patch_embed1.proj.weight"),
        (lambda: without(original("hrnet"), "stage4"), "stage4.0.branches.0.0.conv1.weight"),
        (lambda: without(original("segformer"), r".*attn\.kv"), "backbone.block2.0.attn.kv.weight"),
        (lambda: without(original("segformer"), r"backbone\.block3"), "backbone.block3.0.mlp.fc1.weight"),
        (lambda: without(original("ocr"), "aux_head"), "aux_head.3.weight"),
        (lambda: without(original("hrnet"), "last_layer.3"), "last_layer.3.weight"),
        (lambda: {key: value.astype(np.int32) for key, value in original("segformer").items()}, "not floating point"),
        (lambda: {key: value.astype(complex) for key, value in original("hrnet").items()}, "not floating point"),
        (lambda: {key: value[..., None] for key, value in original("segnext").items()}, "of another shape"),
        (lambda: {key: value.ravel() for key, value in original("zuppichini").items()}, "head.predict.weight"),
        (lambda: golden.weights("segformer_zuppichini"), "width 10 does not divide into 4 heads"),
        (lambda: original("segformer") | original("hrnet"), "unexpected in the checkpoint"),
        (lambda: {"loss.weight": np.ones(3, np.float32)}, "it lacks"),
        (lambda: torch.nn.Linear(2, 3), "got Linear"),
        (lambda: {"a.b": torch.ones(2).to_sparse()}, "a.b: a Tensor"),
        (lambda: {"a.b": torch.ones(2, device="meta")}, "a.b: a Tensor"),
    ],
)
def test_anything_but_a_checkpoint_gets_one_clear_error(weights, part):
    message = refused(weights())
    assert part in message
    assert len(message.splitlines()[0]) > 20


def test_fewer_than_one_class_is_refused_for_an_encoder():
    weights = alone("segformer", "backbone", {})
    assert "num_classes must be at least 1" in refused(weights, num_classes=0)


def test_one_error_lists_everything_and_nothing_is_loaded():
    model = empty(model_of("segformer"))
    weights = dict(original("segformer"))
    del weights["backbone.norm2.weight"]
    del weights["decode_head.linear_c3.proj.bias"]
    weights["decode_head.linear_pred.weight"] = np.zeros((9, 24, 1, 1), np.float32)
    weights["neck.weight"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError) as raised:
        segjax.load_torch(model, weights)
    message = str(raised.value)
    for part in (
        *("backbone.norm2.weight", "decode_head.linear_c3.proj.bias", "neck.weight"),
        *("(9, 24, 1, 1)", "(7, 24, 1, 1)", "2 missing", "1 unexpected", "1 of another shape"),
    ):
        assert part in message
    assert not any(value.any() for value in segjax.to_torch(model).values())


@pytest.mark.parametrize(("label", "form"), WHOLE, ids=[f"{label}-{form.dialect}" for label, form in WHOLE])
def test_load_torch_reports_keys_under_the_checkpoints_names(label, form):
    weights, model = renamed(original(label), form), model_of(label)
    key = [key for key in weights if key.endswith("weight")][-3]
    with pytest.raises(CheckpointError, match=re.escape(f"{key}: checkpoint (5, 5)")):
        segjax.load_torch(model, weights | {key: np.zeros((5, 5), np.float32)}, dialect=form.dialect)


def test_an_explicit_name_must_fit():
    weights = blank("segformer_b0", 3)
    message = refused(weights, name="segformer_b2")
    assert "not segformer_b2: dims is (32, 64, 160, 256)" in message and "nearest model is segformer_b0" in message
    assert "3 classes, not 4" in refused(weights, num_classes=4)
    with pytest.raises(KeyError, match="segformer_b0"):
        segjax.from_torch(weights, name="segformer_b9")
    # Of another family: nothing but the encoder fits, or not even that.
    assert "decode_head.linear_fuse.conv.weight" in refused(weights, name="segformer_plain_b0")
    assert "it lacks conv1" in refused(weights, name="hrnet_w18") or "it lacks stage" in refused(
        weights, name="hrnet_w18"
    )


def test_an_explicit_dialect_must_exist_for_the_family_and_fit():
    weights = original("segformer")
    with pytest.raises(KeyError, match="no dialect 'keras'; the dialects are auto, native, hf"):
        segjax.from_torch(weights, dialect="keras")
    with pytest.raises(KeyError, match="'mmseg' has no keys for segformer; use one of native, hf, smp"):
        segjax.from_torch(weights, dialect="mmseg", name="segformer_b0")
    with pytest.raises(KeyError, match="'hf' has no keys for hrnet; use one of native"):
        segjax.load_torch(model_of("hrnet"), original("hrnet"), dialect="hf")
    message = refused(weights, dialect="hf")
    assert "SegFormer as hf (transformers)" in message and "segformer.encoder.patch_embeddings.0.proj.weight" in message


@pytest.mark.parametrize("label", [label for label in SUBJECTS if label != "hrnet, corners"])
def test_an_impossible_dialect_is_refused_with_the_possible_ones(label):
    model = model_of(label)
    family = family_of(model.spec.name)
    able = {form.dialect for form in KEY_FORMATS if form.family == family}
    assert "native" in able
    for dialect in {form.dialect for form in KEY_FORMATS} - able:
        with pytest.raises(CheckpointError, match=f"{model.spec.name} cannot be written as {dialect}") as raised:
            segjax.to_torch(model, dialect=dialect)
        listed = str(raised.value).rpartition("can be written as ")[2].split(", ")
        assert sorted(listed) == sorted(able)
    with pytest.raises(KeyError, match="no dialect 'keras'"):
        segjax.to_torch(model, dialect="keras")


def test_settings_that_a_checkpoint_lacks_can_be_given():
    form = next(form for form in KEY_FORMATS if form.dialect == "hf")
    weights = renamed(original("segformer"), form)
    model = segjax.from_torch(weights, block_norm_eps=1e-6, num_heads=(1, 1, 1, 1))
    assert dict(model.spec.overrides)["num_heads"] == (1, 1, 1, 1)
    assert model.backbone.norm1.epsilon == 1e-6
    assert segjax.from_torch(weights).backbone.norm1.epsilon == 1e-5


@pytest.mark.slow
def test_a_full_transformers_b5_converts_and_verifies():
    network = transformers_network("segformer_b5", num_classes=150, seed=1).float()
    weights = network.state_dict()
    report = verify.verify(segjax.from_torch(weights), weights)
    assert report.passed and "transformers" in report.against

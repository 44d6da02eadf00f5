"""LoRA: against nnx.LoRA and convolutions, what a step changes, which layers are found, and runs with their files."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import segjax
from segjax import layers
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import Checkpoint
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.initialize import load_initial
from segjax.checkpoints.load import load
from segjax.checkpoints.state_dict import named_variables, to_torch
from segjax.models import lora as lora_models
from segjax.models.functional import FunctionalModel
from segjax.models.stacked import Vectors
from segjax.runtime.parallel import parallel_for
from segjax.train import lora, state
from segjax.train.config import RunError
from tests.runs import make_config, power_cut_before, result_of, run
from tests.tiny import FAMILIES, abstract_family, tiny_model
from tests.train.test_step import K, assert_close, changed, make_batch, make_step
from tests.train.test_step import run as run_steps

pytestmark = pytest.mark.usefixtures("newer_emitters")


class Mixed(nnx.Module):
    """A linear layer, convolutions with a stride, with padding and with groups, and a BatchNorm."""

    def __init__(self, seed=0, dtype=jnp.float64):
        kinds = dict(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(seed))
        random = dict(kernel_init=layers.fan_in_init, **kinds)
        self.stem = layers.Conv(3, 6, 4, stride=4, **random)
        self.linear = layers.Linear(6, 8, kernel_init=layers.fan_in_init, **kinds)
        self.bn = layers.BatchNorm(8, dtype=dtype, param_dtype=dtype)
        self.conv = layers.Conv(8, 10, (3, 1), padding=(1, 0), use_bias=False, **random)
        self.grouped = layers.Conv(10, 10, 3, padding=1, groups=5, **random)
        self.head = layers.Conv(10, K, 1, **random)
        self.spec, self.size_multiple, self.align_corners, self.in_channels = None, 4, False, 3
        self.eval()

    def __call__(self, images):
        x = jax.nn.relu(self.bn(self.linear(self.stem(images.astype(self.stem.dtype)))))
        return self.head(jax.nn.relu(self.grouped(self.conv(x)))), {}


TARGETS = ("stem", "linear", "conv")


def adapters_of(model, targets=TARGETS, *, rank=2, alpha=3.0, seed=5):
    """With B unlike its zeros."""
    found = lora_models.Adapters.of(model, targets, rank=rank, alpha=alpha, seed=seed)
    rng = np.random.default_rng(seed)
    filled = {name: jnp.asarray(0.3 * rng.standard_normal(array.shape)) for name, array in found.initial.items()}
    return dataclasses.replace(found, initial=filled)


class ByConvolutions(nnx.Module):
    """A convolution and its adapter as peft computes it: a convolution to few channels, then a 1x1."""

    def __init__(self, base, a, b, scale):
        kinds = dict(use_bias=False, dtype=a.dtype, param_dtype=a.dtype, rngs=nnx.Rngs(0))
        size = dict(stride=base.stride, padding=base.padding)
        self.base, self.scale, self.dtype = base, scale, base.dtype
        self.down = layers.Conv(a.shape[2], a.shape[3], a.shape[:2], **size, **kinds)
        self.up = layers.Conv(*b.shape, 1, **kinds)
        self.down.kernel[...], self.up.kernel[...] = a, b[None, None]

    def __call__(self, x):
        return self.base(x) + self.scale * self.up(self.down(x))


@pytest.mark.parametrize("rank, alpha", [(2, 3.0), (3, 1.5)])
def test_outputs_and_gradients_equal_those_of_unmerged_adapters(rank, alpha, float64):
    images = jnp.asarray(np.random.default_rng(1).standard_normal((3, 16, 24, 3)))
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 6, K)))
    adapters = adapters_of(Mixed(), rank=rank, alpha=alpha)
    functional = FunctionalModel(Mixed(), adapters=adapters)
    params, batch_stats = functional.arrays()
    arrays = dict(adapters.initial)

    def merged(arrays):
        logits, _ = functional.bind(params | arrays, batch_stats)(images)
        return jnp.sum(weights * logits), logits

    def apart(arrays):
        model, scale = Mixed(), alpha / rank
        # nnx.LoRA has no factor, so B has it.
        wrapped = nnx.LoRA(6, rank, 8, base_module=model.linear, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        wrapped.lora_a[...], wrapped.lora_b[...] = arrays["linear.lora_a"], scale * arrays["linear.lora_b"]
        model.linear = wrapped
        for name in ("stem", "conv"):
            a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
            setattr(model, name, ByConvolutions(getattr(model, name), a, b, scale))
        logits, _ = model(images)
        return jnp.sum(weights * logits), logits

    (_, expected), expected_gradients = jax.value_and_grad(apart, has_aux=True)(arrays)
    (_, logits), gradients = jax.value_and_grad(merged, has_aux=True)(arrays)
    assert_close(logits, expected, 1e-13)
    assert_close(gradients, expected_gradients, 1e-12)
    # As they begin, they change nothing; and merged on the host, they give the same model.
    unlike = Mixed()(images)[0]
    assert jnp.abs(unlike - logits).max() > 0.01
    fresh = lora_models.Adapters.of(Mixed(), TARGETS, rank=rank, alpha=alpha, seed=0)
    np.testing.assert_array_equal(functional.bind(params | dict(fresh.initial), batch_stats)(images)[0], unlike)
    host = adapters.merged({name: np.asarray(array) for name, array in params.items()})
    assert host.keys() == params.keys() - adapters.initial.keys()
    assert_close(FunctionalModel(Mixed()).bind(host, batch_stats)(images)[0], expected, 1e-13)


def test_new_adapters_are_drawn_as_in_torch_and_differ_by_layer_and_seed():
    one, same, other = (
        lora_models.Adapters.of(Mixed(dtype=jnp.float32), TARGETS, rank=64, alpha=1.0, seed=seed).initial
        for seed in (0, 0, 1)
    )
    assert not changed(one, same) and changed(one, other) == {f"{name}.lora_a" for name in TARGETS}
    for name, inputs in (("stem", 3 * 4 * 4), ("linear", 6), ("conv", 8 * 3)):
        a = np.asarray(one[f"{name}.lora_a"])
        # Uniform within 1 / sqrt(inputs): kaiming_uniform_ with a = sqrt(5).
        assert 0.9 < np.abs(a).max() * inputs**0.5 <= 1 and a.dtype == np.float32
        np.testing.assert_allclose(a.std() * inputs**0.5, 3**-0.5, rtol=0.1)
        assert not np.asarray(one[f"{name}.lora_b"]).any()


# ---------------------------------------------------------------------------------------------------------------- steps

ALL_BUT_ADAPTERS_AND_HEAD = (r"^(?!.*lora_|head)",)
LAST = dict(name="adamw", lr=0.01, weight_decay=0.1)


@functools.cache
def steps_of(kind, devices, accumulate, **options):
    step, before = make_step(
        Mixed(),
        adapters=adapters_of(Mixed()),
        frozen=ALL_BUT_ADAPTERS_AND_HEAD,
        accumulate=accumulate,
        ema_decay=0.5,
        optimizer=LAST,
        **options,
    )
    batches = [make_batch(seed) for seed in (1, 2)]
    return run_steps(step, before, batches, parallel=parallel_for(kind, jax.devices()[:devices]))


def test_a_step_changes_only_adapters_and_fully_trained_modules(float64):
    states, _ = steps_of("jit", 1, 1)
    trained = {f"{name}.lora_{part}" for name in TARGETS for part in "ab"} | {"head.kernel", "head.bias"}
    assert changed(states[0].params, states[-1].params) == trained
    assert changed(states[0].ema, states[-1].ema) == trained
    # A BatchNorm with frozen parameters keeps its statistics, and decay does not reach what is frozen.
    assert not changed(states[0].batch_stats, states[-1].batch_stats)
    moments = [tree for tree in jax.tree.leaves(states[0].opt_state, is_leaf=lambda x: isinstance(x, dict))]
    assert [set(tree) for tree in moments if isinstance(tree, dict)] == [trained, trained]


@pytest.mark.parametrize("kind, devices, accumulate", [("jit", 1, 2), ("jit", 4, 1), ("pmap", 4, 2)])
def test_devices_and_micro_batches_do_not_change_a_step(kind, devices, accumulate, float64):
    states, scalars = steps_of(kind, devices, accumulate)
    expected_states, expected_scalars = steps_of("jit", 1, 1)
    assert_close([one.params for one in states], [one.params for one in expected_states], 1e-9)
    assert_close(scalars, expected_scalars, 1e-10)


def test_storing_all_parameters_in_vectors_does_not_change_a_step(float64):
    with layers.meant_for("cuda"):
        step, before = make_step(
            Mixed(),
            adapters=adapters_of(Mixed()),
            frozen=ALL_BUT_ADAPTERS_AND_HEAD,
            ema_decay=0.5,
            optimizer=LAST,
        )
        assert isinstance(step.model.stacks, Vectors)
        states, scalars = run_steps(step, before, [make_batch(seed) for seed in (1, 2)])
    expected_states, expected_scalars = steps_of("jit", 1, 1)
    assert_close([one.params for one in states], [one.params for one in expected_states], 1e-9)
    assert_close(scalars, expected_scalars, 1e-10)


@pytest.mark.one_python
def test_adapters_of_stacked_blocks_are_stacked_with_the_same_gradients(float64):
    model = tiny_model(0, "plain", dtype=jnp.float64, depths=(1, 2, 1, 1))
    targets = [name for name, may in lora_models.adaptable(model).items() if may and "block" in name]
    options = dict(adapters=adapters_of(model, targets), frozen=(r"^(?!.*lora_)",))
    arrays = []
    for execution in (layers.PLAIN, layers.BlockExecution(scan_from=2)):
        step, before = make_step(model, execution=execution, **options)
        batch = make_batch(1, number=2, size=(64, 96))
        images, labels, key = step.inputs(before, batch, jax.random.key(7))
        stacked = step.model.stacks.stacked(before)
        found = jax.jit(step.gradients)(stacked, images, labels, step.counts(labels), key)
        arrays.append((set(stacked.params), *step.model.stacks.apart(found)))
    (_, *expected), (names, *found) = arrays
    assert "backbone.block2.0-1.attn.kv.lora_a" in names
    assert_close(found[:2], expected[:2], 1e-10)
    assert found[1].keys() == options["adapters"].initial.keys()


def test_a_bfloat16_step_keeps_adapters_in_float32():
    model = Mixed(dtype=jnp.float32)
    model.set_attributes(dtype=jnp.bfloat16)
    step, before = make_step(model, adapters=lora_models.Adapters.of(model, TARGETS, rank=2, alpha=3.0, seed=0))
    states, _ = run_steps(step, before, [make_batch(1)])
    moved = changed(states[0].params, states[-1].params)
    assert {f"{name}.lora_b" for name in TARGETS} <= moved
    assert {array.dtype for array in states[-1].params.values()} == {np.dtype(np.float32)}


def test_the_state_of_a_checkpoint_is_restored_and_its_weights_are_merged(float64):
    states, _ = steps_of("jit", 1, 1)
    adapters = adapters_of(Mixed())
    for before in (states[-1], dataclasses.replace(states[-1], ema=None)):
        weights, training = state.weights_of(before, adapters), state.training_of(before, adapters)
        assert weights.keys() == (before.params.keys() | before.batch_stats.keys()) - adapters.initial.keys()
        evaluated = before.evaluated[0]
        for name in TARGETS:
            a, b = (np.asarray(evaluated[f"{name}.lora_{part}"]) for part in "ab")
            expected = evaluated[f"{name}.kernel"] + 1.5 * np.einsum("...ir,ro->...io", a, b)
            np.testing.assert_allclose(weights[f"{name}.kernel"], expected, rtol=0, atol=1e-14)
        again = state.restored(weights, training, states[0] if before.ema else before, may_skip=0, adapters=adapters)
        assert jax.tree.all(jax.tree.map(lambda one, other: np.array_equal(one, other), again, before))


# --------------------------------------------------------------------------------------------------------------- layers


def settings_of(**given):
    settings = make_config().lora
    settings.update({"rank": 2, "full": ()} | given)
    return settings


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("hrnet", "ocr")])
def test_every_family_with_attention_has_default_targets_in_its_encoder(family):
    model = abstract_family(family)
    found = [name for name in lora_models.adaptable(model) if re.search(settings_of().targets, name)]
    assert found and all(name.split(".")[0] in ("backbone", "mit", "encoder") for name in found)
    if family == "segformer":
        expected = [f"attn.{part}" for part in ("q", "kv", "proj")] + ["mlp.fc1", "mlp.fc2"]
        assert {name.removeprefix("backbone.block3.0.") for name in found if "block3" in name} == set(expected)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"targets": "attn.query"}, r"'attn\.query' is found in no layer of this model; layers that can have one are"),
        ({"targets": "nothing"}, r"conv, head, linear, stem \(N: any number\)"),
        ({"targets": "grouped"}, "found only in grouped convolutions, which can have no adapter"),
        ({"targets": "^head", "full": ("head",)}, r"only in layers that config\.lora\.full trains in full"),
        ({"full": ("decoder",)}, r"config\.lora\.full: 'decoder' is found in no module of this model; they are"),
    ],
)
def test_a_pattern_that_finds_nothing_is_refused_with_the_candidates(given, message):
    with pytest.raises(RunError, match=message):
        lora.adapters_for(Mixed(dtype=jnp.float32), settings_of(**given), seed=0)


def test_fully_trained_layers_and_grouped_convolutions_have_no_adapter():
    model = Mixed(dtype=jnp.float32)
    found = lora.adapters_for(model, settings_of(targets="", full=("conv", "^bn")), seed=0)
    assert found.layers == ("head", "linear", "stem") and found.scale == 4
    names = FunctionalModel(model, adapters=found).arrays()[0]
    trained = names.keys() - lora.frozen_names(names, found, ("conv", "^bn"))
    assert trained == found.initial.keys() | {"conv.kernel", "bn.scale", "bn.bias"}


HEAD = {f"linear_c{level}.proj" for level in range(1, 5)} | {"linear_fuse.conv", "linear_fuse.bn", "linear_pred"}


@pytest.mark.parametrize(
    "dialect, settings, expected",
    [
        ("native", {}, set()),
        ("native", {"num_classes": 7}, {"decode_head.linear_pred"}),
        ("backbone", {}, {f"decode_head.{name}" for name in HEAD}),
        # A first convolution whose filters were made from those of red, green and blue is in no base.
        ("native", {"in_channels": 4}, {"backbone.patch_embed1.proj"}),
    ],
)
def test_modules_that_the_checkpoint_lacks_are_trained_in_full(dialect, settings, expected):
    model = tiny_model(1, **settings)
    _, random = load_initial(model, Checkpoint.of(to_torch(tiny_model(0), dialect=dialect)))
    config = make_config(lora__rank=2)
    full = lora.with_full(config, model, random).lora.full
    names = FunctionalModel(model).arrays()[0]
    assert lora.full_modules(full, names) == expected and config.lora.full is None
    with_all = make_config(lora__rank=2, lora__full=("^",))
    assert lora.with_full(with_all, model, random) is with_all


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of 5 classes; the generated scenes have 19."""
    path = tmp_path_factory.mktemp("start") / "base.safetensors"
    segjax.save(tiny_model(3), path)
    return path


def with_lora(start, **changes):
    # In smaller crops the attention has one key, and no gradient of its queries.
    large = dict(data__size=(64, 96), augment__crop=(64, 96))
    return make_config(
        **dict(**large, init__checkpoint=str(start), lora__rank=2, lora__alpha=6.0, train__steps=4, checkpoint__every=2)
        | changes
    )


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    status, printed = run(with_lora(start, train__ema=0.5), workdir)
    assert status == 0
    return workdir, " ".join(printed.split())


@pytest.mark.one_python
def test_a_run_saves_merged_weights_and_separate_adapters(whole, start):
    workdir, printed = whole
    before = {name: np.asarray(v[...]) for name, v in named_variables(load(start).model).items()}
    weights, metadata = orbax_folder.load_weights(workdir / "checkpoints/4")
    targets = {name for name in lora_models.adaptable(abstract_family("segformer")) if "block" in name}
    targets = {f"{name}.kernel" for name in targets if "dwconv" not in name and not name.endswith(".sr")}
    assert changed(before, weights) == targets | {"decode_head.linear_pred.kernel", "decode_head.linear_pred.bias"}
    assert metadata["config"]["lora"]["full"] == [r"^decode_head\.linear_pred$"]
    # 20 layers: 2 (in + out) each; and the new classifier of 12 inputs.
    own = sum(array.size for name, array in before.items() if not name.endswith((".mean", ".var"))) + 14 * 13
    extra = sum(2 * (array.shape[0] + array.shape[1]) for name, array in before.items() if name in targets)
    assert f"trained {extra + 19 * 13:,} of {own + extra:,} parameters (" in printed
    assert "adapters of rank 2 of 20 layers; in full decode_head.linear_pred" in printed

    # The file of the adapters and the base make the same weights.
    found = read_checkpoint(workdir / "adapter")
    assert found.paths == (workdir / "adapter/adapter_model.safetensors", start)
    model = load(workdir / "adapter").model
    for name, variable in named_variables(model).items():
        np.testing.assert_allclose(variable[...], weights[name], rtol=1e-7, atol=0, err_msg=name)
    assert model.spec.num_classes == 19 and found.metadata["step"] == 4
    assert result_of(workdir)["params_sha256"] != load(start).provenance["sha256"]
    config = json.loads((workdir / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, str(start))
    assert config["modules_to_save"] == ["decode_head.classifier"]
    stored = load_file(workdir / "adapter/adapter_model.safetensors")
    assert len(stored) == 2 * 24 + 2
    assert stored["base_model.model.segformer.stages.1.blocks.0.mlp.fc1.lora_B.weight"].shape == (32, 2)


@pytest.mark.one_python
def test_a_run_resumes_bit_for_bit_and_refuses_other_adapters(whole, start, tmp_path, monkeypatch):
    config = with_lora(start, train__ema=0.5)
    with monkeypatch.context() as patch:
        power_cut_before(patch, 3)
        with pytest.raises(SystemError, match="power cut"):
            run(config, tmp_path / "killed")
    for key, value in (("rank", 3), ("alpha", 8.0), ("targets", "mlp"), ("full", ("decode_head",)), ("rank", 0)):
        with pytest.raises(RunError, match=rf"other settings:\n  config\.lora\.(rank|{key}): .* in the run, .* now"):
            run(with_lora(start, train__ema=0.5, **{f"lora__{key}": value}), tmp_path / "killed")
    status, printed = run(config, tmp_path / "killed")
    assert status == 0 and "resuming at step 2 of 4" in printed
    assert result_of(tmp_path / "killed")["params_sha256"] == result_of(whole[0])["params_sha256"]
    one, other = (load_file(place / "adapter/adapter_model.safetensors") for place in (whole[0], tmp_path / "killed"))
    assert not changed(one, other)


@pytest.mark.one_python
def test_the_adapters_are_those_of_the_best_weights(start, tmp_path):
    run(with_lora(start, lora__full=("decode_head",), eval__every=1), tmp_path)
    weights, metadata = orbax_folder.load_weights(tmp_path / "best")
    found = load(tmp_path / "adapter")
    assert found.metadata["step"] == metadata["step"] and found.metadata["mean_iou"] == metadata["mean_iou"]
    for name, variable in named_variables(found.model).items():
        np.testing.assert_allclose(variable[...], weights[name], rtol=1e-7, atol=0, err_msg=name)
    # The BatchNorm of a decoder in full moves, and is in the file.
    assert not np.array_equal(
        weights["decode_head.linear_fuse.bn.mean"], load(start).model.decode_head.linear_fuse.bn.mean[...]
    )


def test_incompatible_settings_are_refused_before_anything_is_done(start, tmp_path):
    with pytest.raises(RunError, match=r"config\.lora\.rank: 2; adapters change .* give init\.checkpoint"):
        run(make_config(lora__rank=2), tmp_path / "run")
    with pytest.raises(RunError, match=r"config\.optim\.frozen: .* everything is frozen except adapters"):
        run(with_lora(start, optim__frozen=("backbone",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match=r"would stay random: decode_head\.linear_pred; add them"):
        run(with_lora(start, lora__full=("linear_fuse",)), tmp_path / "run")

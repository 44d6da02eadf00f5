"""One update: micro-batches, frozen parameters, the moving average, and steps that are skipped or end the run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import layers, losses
from segjax.data.augment import normalise
from segjax.layers import BlockExecution
from segjax.models.functional import FunctionalModel
from segjax.models.lora import NO_ADAPTERS
from segjax.models.stacked import Vectors, stacks_for
from segjax.recipes import common
from segjax.runtime.parallel import JitParallel, parallel_for
from segjax.train import optim
from segjax.train.state import TrainState
from segjax.train.step import TrainStep
from tests.tiny import Net, tiny_model

pytestmark = pytest.mark.usefixtures("newer_emitters")

K = 5


def as_it_is(_, batch):
    return normalise(batch["image"]).astype(float), batch["label"]


def with_infinity(keys, batch):
    """Samples whose `size` is zero have an infinite pixel."""
    images, labels = as_it_is(keys, batch)
    spoilt = batch["size"][:, :1, None, None] == 0
    return jnp.where(spoilt & (jnp.arange(images.shape[1]) == 3)[:, None, None], jnp.inf, images), labels


def make_batch(seed, *, number=8, size=(32, 40), spoilt=()):
    """Noise whose samples carry ever more labels; the first carries none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, (number, *size)).astype(np.uint8)
    for i in range(number):
        labels[i, i * size[0] // number :] = 255
    sizes = np.array([[0 if i in spoilt else side for side in size] for i in range(number)], np.int32)
    images = rng.integers(0, 256, (number, *size, 3), dtype=np.uint8)
    return {"image": images, "label": labels, "size": sizes, "position": np.arange(number, dtype=np.int32)}


def criterion_of(class_weights=None, **terms):
    settings = common.get_config("folder").loss
    settings.update(terms)
    return losses.criterion(settings, num_classes=K, ignore_label=255, class_weights=class_weights)


def make_step(
    model,
    *,
    frozen=(),
    execution=layers.PLAIN,
    augmentation=as_it_is,
    criterion=None,
    optimizer=None,
    adapters=NO_ADAPTERS,
    **options,
):
    """A training step by SGD with momentum, and the state before the first; a loop of blocks takes stacks, a GPU takes
    vectors."""
    settings = common.get_config("folder").optim
    settings.update(name="sgd", lr=0.05, warmup_steps=3, warmup_ratio=0.1, no_decay="", lr_multipliers=())
    settings.update(optimizer or {}, frozen=frozen)
    params, batch_stats = FunctionalModel(model, adapters=adapters).arrays()
    stacks = stacks_for(execution, params, batch_stats, alike=optim.rules(settings, params))
    functional = FunctionalModel(
        model,
        frozen=optim.frozen_names(frozen, params),
        execution=execution,
        stacks=stacks,
        adapters=adapters,
    )
    transform = optim.optimizer(settings, params, steps=20, stacks=stacks)
    state = TrainState.start(
        params, batch_stats, transform.init(functional.trained(params)), ema=options.get("ema_decay", 0) > 0
    )
    criterion = criterion_of() if criterion is None else criterion
    return (
        TrainStep(
            model=functional, optimizer=transform, augment=augmentation, criterion=criterion, aux_weight=0.4, **options
        ),
        state,
    )


def run(step, state, batches, *, parallel=None):
    """-> host copies of the state before and after every step, and of every step's scalars."""
    parallel = parallel or JitParallel(jax.devices()[:1])
    program, stacks = parallel.compile_train(step), step.model.stacks
    state = parallel.replicate(stacks.stacked(jax.tree.map(jnp.copy, state)))
    states, scalars = [stacks.apart(parallel.fetch(state))], []
    for batch in batches:
        state, now = program(state, parallel.spread(batch), jax.random.key(7))
        states.append(stacks.apart(parallel.fetch(state)))
        scalars.append(parallel.fetch(now))
    return states, scalars


def assert_close(found, expected, tolerance=1e-12):
    """To `tolerance` of the largest number of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(np.asarray(other, float)).max(), 1e-3)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def assert_same(found, expected):
    """Bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


def changed(one, other):
    """Names of arrays that differ."""
    return {name for name in one if np.asarray(one[name]).tobytes() != np.asarray(other[name]).tobytes()}


# ------------------------------------------------------------------------------------------------------- micro-batches

LOSS = dict(class_weights=(0.3, 1.0, 2.0, 0.0, 1.5), label_smoothing=0.1, dice=0.7)


@functools.cache
def of_plain(kind, devices, accumulate, execution=layers.PLAIN, depths=(1, 1, 1, 1)):
    """Three steps of a network without BatchNorm; nothing is dropped, since that is drawn by micro-batch."""
    parallel = parallel_for(kind, jax.devices()[:devices])
    model = tiny_model(0, "plain", dtype=jnp.float64, fuse="conv", drop_path_rate=0.0, depths=depths)
    model.set_attributes(axis_name=parallel.axis_name, raise_if_not_found=False)
    step, state = make_step(model, criterion=criterion_of(**LOSS), accumulate=accumulate, execution=execution)
    assert bool(step.model.stacks.members) == bool(execution.scan_from)
    return run(step, state, [make_batch(seed) for seed in (0, 1, 2)], parallel=parallel)


PARTS = [
    ("jit", 1, 4),
    pytest.param("pmap", 4, 2, marks=pytest.mark.slow),
    pytest.param("jit", 4, 2, marks=pytest.mark.slow),
    pytest.param("pmap", 1, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, devices, accumulate", PARTS)
def test_without_batch_norm_micro_batches_equal_the_whole_batch(kind, devices, accumulate, float64):
    states, scalars = of_plain(kind, devices, accumulate)
    expected_states, expected_scalars = of_plain("jit", 1, 1)
    assert_close(states, expected_states)
    assert_close(scalars, expected_scalars)
    # What it is compared with is an update of every parameter, from samples with labels of very unequal number.
    before, after = expected_states[0].params, expected_states[-1].params
    assert changed(before, after) == set(before)


@pytest.mark.slow
def test_micro_batches_and_scanned_blocks_can_be_combined(float64):
    depths = (2, 1, 3, 1)
    states, _ = of_plain("pmap", 4, 2, BlockExecution(scan_from=2, remat=True), depths)
    assert_close(states, of_plain("jit", 1, 1, depths=depths)[0])


@pytest.mark.parametrize(
    "family, name",
    [
        ("segformer", "adamw"),
        pytest.param("hrnet", "sgd", marks=pytest.mark.slow),
        pytest.param("segnext", "sgd", marks=pytest.mark.slow),
        pytest.param("ocr", "sgd", marks=pytest.mark.slow),
        pytest.param("simple", "sgd", marks=pytest.mark.slow),
        pytest.param("zuppichini", "sgd", marks=pytest.mark.slow),
    ],
)
def test_the_implementations_for_gpus_train_like_those_for_cpus(family, name, float64):
    """Of operations and losses, and vectors in place of parameters, which are named and frozen as before."""
    rules = dict(name=name, lr=0.003, no_decay=r"norm|bias", lr_multipliers=(("kernel$", 3.0),), clip_norm=0.5)

    def trained(platform):
        with layers.meant_for(platform):
            model = tiny_model(0, family, dtype=jnp.float64)
            frozen = next(key for key in FunctionalModel(model).arrays()[0] if key.endswith("kernel"))
            options = dict(optimizer=rules, frozen=(re.escape(frozen),), ema_decay=0.9, criterion=criterion_of())
            step, state = make_step(model, **options)
            batches = [make_batch(seed, number=2, size=(64, 96)) for seed in (0, 1)]
            return step.model.stacks, frozen, *run(step, state, batches)

    vectors, frozen, states, scalars = trained("cuda")
    stacks, _, expected_states, expected_scalars = trained("cpu")
    assert isinstance(vectors, Vectors) and len(vectors.members) <= 8 and not stacks.members
    # AdamW divides rounding by itself where a gradient is zero: of a bias before a normalisation.
    assert_close(states, expected_states, 1e-7 if name == "adamw" else 1e-9)
    assert_close(scalars, expected_scalars, 1e-9)
    before, after = expected_states[0].params, expected_states[-1].params
    moved = changed(before, after)
    # Biases before a normalisation have no gradient.
    assert frozen not in moved and len(moved) > 0.8 * len(before)


@pytest.mark.parametrize("kind", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_devices_communicate_once_for_each_batch_norm_and_direction(kind):
    """And a few times for loss and gradients: each exchange waits for all devices."""
    parallel = parallel_for(kind)
    with layers.meant_for("cuda"):
        model = tiny_model(0, "hrnet")
        model.set_attributes(axis_name=parallel.axis_name, raise_if_not_found=False)
        step, state = make_step(model, criterion=criterion_of())
        state = parallel.replicate(step.model.stacks.stacked(jax.tree.map(jnp.copy, state)))
        batch = parallel.spread(make_batch(0, number=4, size=(64, 96)))
        program = parallel.compile_train(step).lower(state, batch, jax.random.key(0)).compile()
    layers_of_norm = sum(name.endswith(".var") for name in FunctionalModel(model).arrays()[1])
    exchanges = len(re.findall(r" all-reduce(?:-start)?\(", program.as_text()))
    # Fewer than that means that the compiler has combined some.
    assert layers_of_norm == 54 and 10 < exchanges <= 2 * layers_of_norm + 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_stacks_of_parameters_are_trained_by_the_rules_of_their_members(name, float64):
    rules = dict(name=name, no_decay=r"norm|block2.*bias", lr_multipliers=((r"block3\.[12]\.mlp", 3.0),), clip_norm=0.5)

    def trained(execution):
        model = tiny_model(0, "segformer", dtype=jnp.float64, depths=(2, 1, 4, 1))
        options = dict(execution=execution, optimizer=rules, frozen=(r"block1\.", r"block3\.3"), ema_decay=0.9)
        step, state = make_step(model, **options)
        return step.model.stacks, run(step, state, [make_batch(seed) for seed in (0, 1, 2)])

    stacks, (states, scalars) = trained(BlockExecution(scan_from=2))
    # Blocks that are trained alike.
    assert {key for key in stacks.members if key.endswith("fc1.kernel")} == {
        "backbone.block1.0-1.mlp.fc1.kernel",
        "backbone.block3.1-2.mlp.fc1.kernel",
    }
    no_stacks, (expected_states, expected_scalars) = trained(layers.PLAIN)
    assert no_stacks.members == {}
    # AdamW divides rounding by itself where a gradient is zero: of a bias before a BatchNorm.
    assert_close(states, expected_states, 1e-9 if name == "adamw" else 1e-12)
    assert_close(scalars, expected_scalars, 1e-9 if name == "adamw" else 1e-12)
    before, after = expected_states[0].params, expected_states[-1].params
    moved = changed(before, after)
    assert not any("block1." in key or "block3.3" in key for key in moved)
    assert moved >= {
        member for key, members in stacks.members.items() if "block3.1-2.mlp." in key for member in members
    }


def test_the_mean_over_micro_batches_would_be_a_different_loss(float64):
    # The pitfall that counts of the whole batch are there for.
    criterion = criterion_of(**LOSS)
    batch = make_batch(0)
    logits = np.random.default_rng(0).standard_normal((8, 8, 10, K))
    whole = criterion.total(logits, batch["label"], criterion.counts(batch["label"]))
    parts = [(logits[i::4], batch["label"][i::4]) for i in range(4)]
    divided = [criterion.total(x, labels, criterion.counts(batch["label"])) for x, labels in parts]
    np.testing.assert_allclose(sum(divided), whole, rtol=1e-12)
    means = [criterion.total(x, labels, criterion.counts(labels)) for x, labels in parts]
    assert abs(np.mean(means) - whole) > 1e-4 * abs(whole)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_have_every_sample_once_and_their_own_keys(accumulate):
    step, _ = make_step(Net(0), accumulate=accumulate)
    images, labels = np.arange(8 * 6).reshape(8, 1, 2, 3), np.arange(8).reshape(8, 1, 1)
    parts, of_parts, keys = step.micro_batches(images, labels, jax.random.key(3))
    assert parts.shape[:2] == of_parts.shape[:2] == (accumulate, 8 // accumulate)
    np.testing.assert_array_equal(np.sort(np.ravel(of_parts)), np.arange(8))
    for part, truth in zip(parts, of_parts, strict=True):
        np.testing.assert_array_equal(part, images[np.ravel(truth)])
    # Otherwise all would drop the same branches.
    assert len({np.asarray(key).tobytes() for key in jax.random.key_data(keys)}) == accumulate


class TwoHeads(nnx.Module):
    """A model with auxiliary logits and aligned corners, without BatchNorm: (B, H, W, 3) -> (B, H/4, W/4, K)."""

    def __init__(self):
        settings = dict(kernel_init=layers.fan_in_init, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.stem = layers.Conv(3, 6, 4, stride=4, **settings)
        self.head, self.aux_head = layers.Conv(6, K, 1, **settings), layers.Conv(6, K, 1, **settings)
        self.spec, self.size_multiple, self.align_corners = None, 1, True
        self.in_channels = 3
        self.eval()

    def __call__(self, images):
        features = jax.nn.relu(self.stem(images))
        return self.head(features), {"aux_logits": self.aux_head(features)}


@functools.cache
def of_groups(kind, devices, accumulate):
    """Two steps with hard pixels of groups of two of eight images, and another loss of auxiliary logits."""
    loss = dict(ohem=1.0, dice=0.3, ohem_images=2, ohem_threshold=0.15, ohem_min_kept=0.1, aux="cross_entropy")
    criterion = criterion_of(class_weights=LOSS["class_weights"], cross_entropy=0.5, **loss)
    step, state = make_step(TwoHeads(), criterion=criterion, accumulate=accumulate)
    return run(step, state, [make_batch(seed) for seed in (3, 4)], parallel=parallel_for(kind, jax.devices()[:devices]))


@pytest.mark.parametrize("kind, devices, accumulate", [("jit", 1, 4), ("jit", 2, 2), ("pmap", 2, 2), ("pmap", 4, 1)])
def test_hard_pixels_of_groups_do_not_depend_on_devices_or_micro_batches(kind, devices, accumulate, float64):
    expected_states, expected_scalars = of_groups("jit", 1, 1)
    states, scalars = of_groups(kind, devices, accumulate)
    assert_close(states, expected_states)
    assert_close(scalars, expected_scalars)
    assert changed(expected_states[0].params, expected_states[-1].params) == set(expected_states[0].params)


def test_auxiliary_logits_have_their_own_loss_and_align_corners(float64):
    _, scalars = of_groups("jit", 1, 1)
    model, batch = TwoHeads(), make_batch(3)
    logits, taps = model(normalise(batch["image"]).astype(float))
    weights, size = np.array(LOSS["class_weights"]), (32, 40)
    scores, auxiliary = (
        np.asarray(layers.resize(each, size, align_corners=True)) for each in (logits, taps["aux_logits"])
    )

    def of_pixels(scores):
        negative_log = jax.nn.logsumexp(scores, axis=-1)[..., None] - scores
        return np.take_along_axis(np.asarray(negative_log), np.minimum(labels, K - 1)[..., None], axis=-1)[..., 0]

    labels = batch["label"]
    valid, weight = labels != 255, weights[np.minimum(labels, K - 1)]
    loss = of_pixels(scores)
    expected = 0.5 * (weight * loss)[valid].sum() / weight[valid].sum()
    expected += 0.4 * (weight * of_pixels(auxiliary))[valid].sum() / weight[valid].sum()
    means = []
    for group in range(0, 8, 2):
        chosen = np.zeros_like(valid)
        chosen[group : group + 2] = valid[group : group + 2]
        probabilities = np.exp(-loss[chosen])
        limit = max(0.15, np.sort(probabilities)[min(round(0.1 * 2 * 32 * 40), len(probabilities) - 1)])
        means.append((weight * loss)[chosen][probabilities < limit].mean())
    expected += np.mean(means)
    probability, truth = np.asarray(jax.nn.softmax(scores)), np.eye(256)[labels][..., :K]
    overlap, squares = (probability * truth).sum((1, 2)), (probability**2 * valid[..., None]).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (squares + truth.sum((1, 2)) + 1)
    expected += 0.3 * dice[valid.any((1, 2))].mean()
    np.testing.assert_allclose(scalars[0]["loss"], expected, rtol=1e-12)


def batch_norm_by_hand(model, images, momentum=0.1):
    """Mean and variance that the BatchNorm of `Net` would keep after each of several micro-batches, one by one."""
    mean, var = np.zeros(6), np.ones(6)
    for part in images:
        x = np.asarray(model.stem(jnp.asarray(part)))
        mean = (1 - momentum) * mean + momentum * x.mean((0, 1, 2))
        var = (1 - momentum) * var + momentum * x.var((0, 1, 2), ddof=1)
    return {"bn.mean": mean, "bn.var": var}


@pytest.mark.parametrize("seed", [0, 1])
def test_batch_norm_normalises_each_micro_batch_and_updates_statistics(seed, float64):
    model, batch = Net(seed, jnp.float64), make_batch(seed)
    x = np.asarray(normalise(batch["image"]).astype(float))
    found = {}
    for accumulate in (1, 2, 4):
        step, state = make_step(model, accumulate=accumulate)
        states, _ = run(step, state, [batch])
        found[accumulate], before = states[1].params, states[0].params
        # Part a has every accumulate-th sample from a on.
        assert_close(states[1].batch_stats, batch_norm_by_hand(model, [x[a::accumulate] for a in range(accumulate)]))
    # Hence they are another computation than the large batch, as in torch: of another gradient, too.
    for one, other in ((1, 2), (2, 4)):
        for name in ("stem.kernel", "head.kernel"):
            moved = np.abs(found[one][name] - before[name]).max()
            assert np.abs(found[one][name] - found[other][name]).max() > 1e-3 * moved


# -------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_parameters_and_statistics_stay_unchanged_bit_for_bit():
    for frozen, still, statistics in (
        ((), set(), True),
        (("stem",), {"stem.kernel", "stem.bias"}, True),
        # A BatchNorm of which something is trained goes on observing.
        (("stem", r"bn\.bias"), {"stem.kernel", "stem.bias", "bn.bias"}, True),
        (("stem", "bn"), {"stem.kernel", "stem.bias", "bn.bias", "bn.scale"}, False),
    ):
        step, state = make_step(Net(0, jnp.float32), frozen=frozen, ema_decay=0.9)
        states, _ = run(step, state, [make_batch(seed) for seed in range(3)])
        before, after = states[0], states[-1]
        assert changed(before.params, after.params) == set(before.params) - still
        assert bool(changed(before.batch_stats, after.batch_stats)) == statistics
        assert changed(before.ema, after.ema) & still == set()
        # Nor has the optimizer anything of them.
        traces = [
            leaf for path, leaf in jax.tree.leaves_with_path(after.opt_state) if "bn" in jax.tree_util.keystr(path)
        ]
        assert len(traces) == 2 - len(still & {"bn.bias", "bn.scale"})


def test_a_frozen_batch_norm_normalises_with_its_running_statistics(float64):
    model = Net(1, jnp.float64)
    model.bn.mean[...] = jnp.linspace(-0.3, 0.4, 6)
    model.bn.var[...] = jnp.linspace(0.5, 2.0, 6)
    batch = make_batch(3)
    labels, x = batch["label"], np.asarray(normalise(batch["image"]).astype(float))
    # Evaluated, the model computes what a frozen BatchNorm computes in training.
    expected = {}
    for frozen, logits in ((("bn",), model(x)[0]), (("stem",), None)):
        step, state = make_step(model, frozen=frozen)
        _, (scalars,) = run(step, state, [batch])
        expected[frozen] = scalars["loss"]
        if logits is not None:
            total = criterion_of().total(logits, labels, criterion_of().counts(labels))
            np.testing.assert_allclose(scalars["loss"], total, rtol=1e-12)
    assert abs(expected["bn",] - expected["stem",]) > 1e-3


def test_the_gradient_norm_is_over_trained_parameters():
    batch = make_batch(4)
    norms = {}
    for frozen in ((), ("stem",), ("stem", "bn.scale", "bn.bias")):
        step, state = make_step(Net(0, jnp.float32), frozen=frozen)
        norms[len(frozen)] = run(step, state, [batch])[1][0]["gradient_norm"]
    assert norms[0] > norms[1] > norms[3] > 0


# ------------------------------------------------------------------------------------------------------ moving average


@pytest.mark.parametrize("decay", [0.3, 0.9999])
@pytest.mark.parametrize("kind, devices", [("jit", 1), ("pmap", 4)])
def test_the_moving_average_follows_its_recurrence(decay, kind, devices, float64):
    parallel, model = parallel_for(kind, jax.devices()[:devices]), Net(0, jnp.float64)
    model.bn.axis_name = parallel.axis_name
    step, state = make_step(model, ema_decay=decay)
    states, _ = run(step, state, [make_batch(seed) for seed in range(5)], parallel=parallel)
    average = {name: np.asarray(value) for name, value in (states[0].params | states[0].batch_stats).items()}
    assert_same(states[0].ema, average)
    for number, after in enumerate(states[1:]):
        # Short at first: 1/10, 2/11, 3/12, ...
        now = min(decay, (1 + number) / (10 + number))
        new = after.params | after.batch_stats
        average = {name: now * average[name] + (1 - now) * new[name] for name in average}
        assert_close(after.ema, average, 1e-13)
    assert changed(states[-1].ema, states[-1].params | states[-1].batch_stats) == set(average)


def test_the_average_is_evaluated_and_training_uses_the_raw_weights():
    batches = [make_batch(seed) for seed in range(3)]
    with_average, _ = run(*make_step(Net(0, jnp.float32), ema_decay=0.5), batches)
    without, _ = run(*make_step(Net(0, jnp.float32)), batches)
    for one, other in zip(with_average, without, strict=True):
        assert_same((one.params, one.batch_stats, one.opt_state), (other.params, other.batch_stats, other.opt_state))
        assert other.ema is None
        assert_same(other.evaluated, (other.params, other.batch_stats))
        params, batch_stats = one.evaluated
        assert params.keys() == one.params.keys() and batch_stats.keys() == one.batch_stats.keys()
        assert_same(params | batch_stats, one.ema)


# -------------------------------------------------------------------------------------------------- what is not finite

GOOD, BAD = {}, dict(spoilt=(2,))


def rest(state):
    """All but the counters."""
    return state.params, state.batch_stats, state.opt_state, state.ema


def runs_through(kinds, *, may_skip, parallel=None, **options):
    """States and scalars of batches that are good or bad."""
    model = Net(0, jnp.float32)
    model.bn.axis_name = parallel.axis_name if parallel else None
    step, state = make_step(model, augmentation=with_infinity, may_skip=may_skip, ema_decay=0.9, **options)
    return run(step, state, [make_batch(0, **kind) for kind in kinds], parallel=parallel)


@pytest.mark.parametrize("kind, devices", [("jit", 1), ("jit", 4), ("pmap", 4)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(kind, devices):
    parallel = parallel_for(kind, jax.devices()[:devices])
    states, scalars = runs_through([GOOD, BAD, GOOD, BAD, BAD, GOOD], may_skip=2, parallel=parallel)
    assert [bool(np.isfinite(now["loss"])) for now in scalars] == [True, False, True, False, False, True]
    assert not any(now["stopped"] for now in scalars)
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5, 6]
    # In all, and in a row.
    assert [state.skipped.tolist() for state in states] == [[0, 0], [0, 0], [1, 1], [1, 0], [2, 1], [3, 2], [3, 0]]
    for number in (2, 4, 5):
        assert_same(rest(states[number]), rest(states[number - 1]))
    for number in (1, 3, 6):
        assert changed(states[number].params, states[number - 1].params) == set(states[0].params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))


def test_the_schedule_does_not_advance_with_skipped_steps():
    # Three times the same batch, as the warm-up rises: a step more or less would show.
    between, _ = runs_through([GOOD, BAD, GOOD, BAD, GOOD], may_skip=1)
    alone, _ = runs_through([GOOD, GOOD, GOOD], may_skip=1)
    assert_same(
        (between[-1].params, between[-1].batch_stats, between[-1].opt_state),
        (alone[-1].params, alone[-1].batch_stats, alone[-1].opt_state),
    )
    assert changed(alone[2].params, alone[3].params) == set(alone[0].params)


@pytest.mark.parametrize("may_skip", [0, 1])
def test_too_many_skipped_steps_stop_training_with_the_state_before(may_skip):
    bad = [BAD] * (may_skip + 1)
    states, scalars = runs_through([GOOD, GOOD, *bad, GOOD, BAD, GOOD], may_skip=may_skip)
    last = 2 + may_skip
    assert [bool(now["stopped"]) for now in scalars] == [False] * last + [True] * 4
    for state in states[last + 1 :]:
        assert_same(rest(state), rest(states[2]))
        assert int(state.step) == last
        assert state.skipped.tolist() == [may_skip, may_skip + 1]
    # The scalars go on telling what the batch would have given.
    assert np.isfinite(scalars[-1]["loss"]) and not np.isfinite(scalars[last]["loss"])


class InfiniteSlope(losses.Criterion):
    """Adds a zero whose gradient is not a number."""

    def total(self, logits, labels, counts, *, align_corners=False):
        total = super().total(logits, labels, counts, align_corners=align_corners)
        return total + jnp.sum(jnp.sqrt(0 * logits))


def test_a_non_finite_gradient_is_treated_like_a_non_finite_loss():
    step, state = make_step(Net(0, jnp.float32), criterion=InfiniteSlope(**vars(criterion_of())), may_skip=3)
    states, (scalars,) = run(step, state, [make_batch(0)])
    assert np.isfinite(scalars["loss"]) and not np.isfinite(scalars["gradient_norm"])
    assert_same(rest(states[1]), rest(states[0]))
    assert states[1].skipped.tolist() == [1, 1] and int(states[1].step) == 1


def test_one_bad_micro_batch_affects_only_its_batch():
    states, scalars = runs_through([GOOD, BAD, GOOD], may_skip=1, accumulate=4)
    assert [bool(np.isfinite(now["loss"])) for now in scalars] == [True, False, True]
    assert_same(rest(states[2]), rest(states[1]))
    assert states[3].skipped.tolist() == [1, 0]


def test_the_reported_gradient_norm_is_that_before_clipping():
    bound = 1e-3
    step, state = make_step(
        Net(0, jnp.float32), optimizer=dict(clip_norm=bound, momentum=0.0, weight_decay=0.0, warmup_steps=0, lr=1.0)
    )
    states, (scalars,) = run(step, state, [make_batch(0)])
    plain, state = make_step(Net(0, jnp.float32))
    _, (expected,) = run(plain, state, [make_batch(0)])
    np.testing.assert_allclose(scalars["gradient_norm"], expected["gradient_norm"], rtol=1e-6)
    moved = [states[1].params[name] - states[0].params[name] for name in states[0].params]
    np.testing.assert_allclose(optim.norm(moved), bound, rtol=2e-3)
    assert scalars["gradient_norm"] > 10 * bound


def test_scalars_of_several_steps_are_returned_as_one_array_each():
    for kind in ("jit", "pmap"):
        parallel = parallel_for(kind)
        found = parallel.scalars([parallel.replicate({"loss": 0.5 * step, "stopped": step > 1}) for step in range(3)])
        np.testing.assert_array_equal(found["loss"], [0, 0.5, 1])
        np.testing.assert_array_equal(found["stopped"], [False, False, True])

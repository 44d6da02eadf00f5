"""Four devices give the results of one, under jit and pmap, in float64, where rounding does not hide differences."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import segformer
from segjax import layers, losses
from segjax.data import specs
from segjax.data.augment import augment, normalise
from segjax.data.pipeline import TrainBatches
from segjax.inference.engine import Inference
from segjax.inference.evaluation import evaluate
from segjax.kernels import choice
from segjax.layers.drop import Drop
from segjax.models import segnext
from segjax.models.functional import FunctionalModel
from segjax.recipes import common
from segjax.runtime.parallel import AXIS, JitParallel, PmapParallel, ShardMapParallel, parallel_for
from segjax.train import optim
from segjax.train.schema import default_config
from segjax.train.state import TrainState
from segjax.train.step import TrainStep
from tests.runs import functional_model
from tests.tiny import SIZES, tiny_model

pytestmark = pytest.mark.usefixtures("newer_emitters")

SPEC = specs.DatasetSpec("noise", tuple("abcde"), ((0, 0, 0),) * 5, 255)
STEPS = 3
AUX_WEIGHT = 0.4


def make_split(number, size, seed):
    """Noise whose first images carry fewer labels than its last; the very first carries none."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, *size, 3), dtype=np.uint8)
    labels = rng.integers(0, 5, (number, *size), dtype=np.uint8)
    for i in range(number):
        labels[i, i * size[0] // number :] = 255
    sizes = np.array([size] * number, np.int32)
    return specs.Split(images, labels, sizes, tuple(f"image{i}" for i in range(number)))


def parallel_of(kind, devices):
    return PARALLEL[kind](jax.devices()[:devices])


# What is random in training, beside SegNeXt's bases.
RATES = {
    "segformer": dict(drop_path_rate=0.4, dropout_rate=0.4),
    "ocr": dict(dropout_rate=0.4),
    "segnext": dict(drop_path_rate=0.4, dropout_rate=0.4),
}


def step_of(functional, optimizer, augmentation, *, aux_weight=AUX_WEIGHT):
    settings = common.get_config("folder").loss
    criterion = losses.criterion(settings, num_classes=5, ignore_label=SPEC.ignore_label)
    return TrainStep(
        model=functional, optimizer=optimizer, augment=augmentation, criterion=criterion, aux_weight=aux_weight
    )


def tiny_functional(parallel, seed=0, family="segformer"):
    model = tiny_model(seed, family, dtype=jnp.float64, **RATES[family])
    model.set_attributes(axis_name=parallel.axis_name, raise_if_not_found=False)
    return FunctionalModel(model)


def train(parallel, functional, augmentation, size=(40, 56), seed=0):
    """Three steps of SGD -> the state on the devices, host copies of it, and of the scalars of every step."""
    settings = common.get_config("folder").optim
    settings.update(name="sgd", lr=0.05, warmup_steps=0, no_decay="", lr_multipliers=())
    params, batch_stats = functional.arrays()
    optimizer = optim.optimizer(settings, params, steps=10)
    state = TrainState.start(params, batch_stats, optimizer.init(params))
    step = parallel.compile_train(step_of(functional, optimizer, augmentation))
    batches = TrainBatches(make_split(11, size, seed), batch_size=8, seed=seed, parallel=parallel)
    state, scalars = parallel.replicate(jax.tree.map(jnp.copy, state)), []
    for i in range(STEPS):
        state, now = step(state, batches.at(i), jax.random.key(7 + seed))
        scalars.append(parallel.fetch(now))
        assert not scalars[-1].pop("stopped")
    return state, parallel.fetch(state), scalars


def as_it_is(keys, batch):
    return normalise(batch["image"]), batch["label"]


PARALLEL = {"jit": JitParallel, "pmap": PmapParallel, "shard_map": ShardMapParallel}
KINDS = [("jit", 4), ("pmap", 4), ("shard_map", 4), ("jit", 1)]


@functools.cache
def trained(kind, devices, family="segformer"):
    """With everything random on; of SegFormer every augmentation, too."""
    settings = default_config("folder").augment
    settings.update(crop=(32, 48), cat_max_ratio=0.75)
    everything = partial(augment, settings=settings, ignore_label=SPEC.ignore_label)
    parallel = parallel_of(kind, devices)
    functional = tiny_functional(parallel, family=family)
    if family == "segformer":
        return train(parallel, functional, everything)
    # Without the fast forms: SegNeXt's strips, written out, take four times as long to compile.
    with choice.published_implementations():
        return train(parallel, functional, as_it_is, (32, 40))


def distance(a, b):
    """Largest difference of two trees, relative to the largest entry of the same array."""
    ratios = jax.tree.map(lambda x, y: np.abs(x - y).max() / max(np.abs(y).max(), 1e-3), a, b)
    return max(jax.tree.leaves(ratios))


# Of the other families in the slow tier: what their layers must do by themselves under pmap is asked for further below.
FAMILY = [pytest.param(family, marks=[] if family == "segformer" else [pytest.mark.slow]) for family in RATES]


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), path


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.slow
def test_shard_map_trains_a_model_to_the_same_bits_as_pmap(family, float64):
    _, *found = trained("shard_map", 4, family)
    _, *expected = trained("pmap", 4, family)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
@pytest.mark.parametrize("family", FAMILY)
def test_training_on_four_devices_equals_training_on_one(kind, family, float64):
    _, state, metrics = trained(kind, 4, family)
    _, expected, expected_metrics = trained("jit", 1, family)
    assert int(state.step) == int(expected.step) == STEPS
    assert {array.dtype for array in state.params.values()} == {np.dtype(np.float64)}
    assert distance(state.params, expected.params) < 1e-10
    assert distance(state.batch_stats, expected.batch_stats) < 1e-10
    assert distance(state.opt_state, expected.opt_state) < 1e-10
    assert distance(metrics, expected_metrics) < 1e-10


@pytest.mark.parametrize("family", FAMILY)
def test_training_changes_weights_far_more_than_the_tolerance(family, float64):
    params, batch_stats = tiny_functional(parallel_of("jit", 1), family=family).arrays()
    _, state, scalars = trained("jit", 1, family)
    for before, after in ((params, state.params), (batch_stats, state.batch_stats)):
        for name in before:
            if not name.endswith(".bias"):  # in front of a norm some biases have no gradient
                assert np.abs(after[name] - before[name]).max() > 1e-5, name
    losses = [float(now["loss"]) for now in scalars]
    assert len(set(losses)) == STEPS and np.isfinite(losses).all() and min(losses) > 0.1


class Layers(nnx.Module):
    """One of each layer that looks at the batch as a whole."""

    def __init__(self, dtype=jnp.float64):
        kinds = dict(dtype=dtype, param_dtype=dtype)
        rngs = nnx.Rngs(0)
        self.conv = layers.Conv(3, 32, 4, stride=4, rngs=rngs, **kinds)
        self.bn = layers.BatchNorm(32, **kinds)
        self.path = layers.DropPath(0.5, rngs=rngs)
        self.dropout = layers.Dropout2d(0.5, rngs=rngs)
        self.ham = segnext.Hamburger(32, 3, rngs=rngs, **kinds)
        self.pred = layers.Conv(32, 5, 1, rngs=rngs, **kinds)
        self.spec, self.size_multiple, self.align_corners = None, 1, False
        self.in_channels = 3

    def __call__(self, images):
        x = self.bn(self.conv(images.astype(self.conv.dtype)))
        return self.pred(self.dropout(self.ham(x + self.path(jnp.sin(x)), None))), {}


LAYERS = ("bn", "path", "dropout", "ham")


def trained_layers(kind, devices, told=LAYERS, **options):
    """Trains `Layers`, of which those in `told` know the axis -> host copies of the state, and of every step's scalars.

    Options: dtype, seed.
    """
    parallel, model = parallel_of(kind, devices), Layers(options.pop("dtype", jnp.float64))
    for name in told:
        getattr(model, name).axis_name = parallel.axis_name
    return train(parallel, FunctionalModel(model), as_it_is, **options)[1:]


@pytest.mark.parametrize("seed", [0, 1])
def test_shard_map_trains_layers_in_float32_to_the_same_bits_as_pmap(seed):
    found, expected = (
        trained_layers(kind, 4, dtype=jnp.float32, seed=seed, size=(36, 44)) for kind in ("shard_map", "pmap")
    )
    assert_same_bits(found, expected)
    start = FunctionalModel(Layers(jnp.float32)).arrays()[0]
    assert all((found[0].params[name] != start[name]).any() for name in ("conv.kernel", "bn.scale", "pred.bias"))


def test_pmap_uses_jax_pmap_if_it_exists_and_otherwise_shard_map(monkeypatch):
    assert type(parallel_for("jit")) is JitParallel and type(parallel_for("pmap")) is PmapParallel
    monkeypatch.delattr(jax, "pmap")
    assert type(parallel_for("jit")) is JitParallel and type(parallel_for("pmap")) is ShardMapParallel
    assert [parallel_for(kind).kind for kind in ("jit", "pmap")] == ["jit", "pmap"]


def test_a_layer_that_ignores_the_axis_of_pmap_trains_differently(float64, monkeypatch):
    monkeypatch.setattr(segnext, "TRAINING_STEPS", 1)
    # The trap that axis_name is there for: statistics, masks and bases of each device's own part of the batch.
    expected, _ = trained_layers("jit", 1)
    assert distance(trained_layers("pmap", 4)[0].params, expected.params) < 1e-10
    for forgotten in LAYERS:
        state, _ = trained_layers("pmap", 4, [name for name in LAYERS if name != forgotten])
        assert distance(state.params, expected.params) > 1e-3, forgotten


def test_under_pmap_all_devices_have_the_same_state(float64):
    state, _, _ = trained("pmap", 4)
    for array in jax.tree.leaves(state):
        copies = np.asarray(array)
        assert copies.shape[0] == 4
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))


def test_every_layer_drops_with_its_own_key_that_changes_with_the_step():
    functional = FunctionalModel(tiny_model(0, drop_path_rate=0.5, dropout_rate=0.5))
    params, batch_stats = functional.arrays()

    def masks(key):
        """Which of 64 samples each layer keeps, by path; of the dropout that of its first channel."""
        model = functional.bind(params, batch_stats, key=key)
        drops = {path: layer for path, layer in nnx.iter_modules(model) if isinstance(layer, Drop)}
        # The first block drops nothing.
        drops = {path: layer for path, layer in drops.items() if layer.rate > 0}
        return {path: np.asarray(layer(jnp.ones((64, 1, 1, 12))))[:, 0, 0, 0] > 0 for path, layer in drops.items()}

    first, again, other = (masks(jax.random.key(seed)) for seed in (3, 3, 4))
    assert len(first) == 2 * 3 + 1
    for path in first:
        np.testing.assert_array_equal(first[path], again[path])
        assert 0 < first[path].sum() < 64
    patterns = [mask.tobytes() for drawn in (first, other) for mask in drawn.values()]
    assert len(set(patterns)) == 2 * 7


def test_the_loss_is_the_mean_over_all_pixels_and_not_over_devices(float64):
    # One device whose pixels are all ignored, one with a single row: their means must not count as much as the others'.
    logits = np.random.default_rng(0).standard_normal((5,))
    split = make_split(8, (32, 40), 1)
    labels = np.where(np.arange(8)[:, None, None] < 2, 255, split.labels)
    counts = [(part != 255).sum() for part in labels.reshape(4, -1)]
    assert counts[0] == 0 and len(set(counts)) == 4
    loss_of_class = np.log(np.exp(logits).sum()) - logits
    expected = loss_of_class[labels[labels != 255]].mean()

    class Constant(nnx.Module):
        """The same logits for every pixel."""

        def __init__(self):
            self.bias = nnx.Param(jnp.array(logits))
            self.spec, self.size_multiple, self.align_corners = None, 1, False
            self.in_channels = 3

        def __call__(self, images):
            return jnp.broadcast_to(self.bias[...], (*images.shape[:3], 5)), {}

    settings = common.get_config("folder").optim
    settings.update(name="sgd", lr=1.0, warmup_steps=0, momentum=0.0, weight_decay=0.0, no_decay="")
    settings.lr_multipliers = ()
    for kind, devices in KINDS:
        parallel, functional = parallel_of(kind, devices), FunctionalModel(Constant())
        params, _ = functional.arrays()
        optimizer = optim.optimizer(settings, params, steps=10)
        state = parallel.replicate(jax.tree.map(jnp.copy, TrainState.start(params, {}, optimizer.init(params))))
        batch = {"image": split.images, "label": labels, "size": split.sizes, "position": np.arange(8, dtype=np.int32)}
        step = parallel.compile_train(step_of(functional, optimizer, as_it_is))
        state, scalars = (parallel.fetch(part) for part in step(state, parallel.spread(batch), jax.random.key(0)))
        np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-13)
        share = np.bincount(labels[labels != 255], minlength=5) / (labels != 255).sum()
        gradient = np.exp(logits) / np.exp(logits).sum() - share
        np.testing.assert_allclose(state.params["bias"], logits - gradient, rtol=1e-6)
        np.testing.assert_allclose(scalars["gradient_norm"], np.linalg.norm(gradient), rtol=1e-12)


@pytest.mark.slow
def test_the_auxiliary_loss_has_its_weight_in_loss_and_update(float64):
    parallel = parallel_of("jit", 1)
    functional = tiny_functional(parallel, family="ocr")
    split = make_split(2, (32, 40), 1)
    batch = {"image": split.images, "label": split.labels % 5, "size": split.sizes, "position": np.arange(2)}
    settings = common.get_config("folder").optim
    settings.update(name="sgd", lr=1.0, warmup_steps=0, momentum=0.0, weight_decay=0.0, no_decay="")
    settings.lr_multipliers = ()
    params, batch_stats = functional.arrays()
    optimizer = optim.optimizer(settings, params, steps=10)
    state = TrainState.start(params, batch_stats, optimizer.init(params))

    @jax.jit
    def step(aux_weight):
        train_step = step_of(functional, optimizer, as_it_is, aux_weight=aux_weight)
        after, scalars = train_step(state, batch, jax.random.key(0))
        return {name: after.params[name] - params[name] for name in params}, scalars["loss"]

    with choice.published_implementations():
        without, main = step(0.0)
    found, loss = step(0.4)
    whole, both = step(1.0)
    # On its own the auxiliary loss of five classes is of the size of the main one.
    assert 0.5 < float(both - main) < 10
    np.testing.assert_allclose(loss, main + 0.4 * (both - main), rtol=1e-12)
    moved = 0
    for name in params:
        expected = without[name] + 0.4 * (whole[name] - without[name])
        scale = np.abs(whole[name]).max() + np.abs(without[name]).max()
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-9 * scale + 1e-13, err_msg=name)
        moved += float(np.abs(found[name] - without[name]).max()) > 1e-3 * scale
    assert moved > len(params) / 2
    # Behind the auxiliary head and beside it nothing changes.
    for name in ("cls_head.kernel", "ocr_distri_head.object_context_block.f_up.0.kernel"):
        np.testing.assert_allclose(found[name], without[name], rtol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind, devices", [("jit", 4), ("pmap", 4), ("jit", 1)])
def test_batch_norm_uses_the_statistics_of_the_whole_batch(kind, devices, seed, float64):
    rng = np.random.default_rng(seed)
    # Means that differ from device to device: averaged variances of the parts would be far too small.
    x = rng.standard_normal((8, 3, 5, 4)) + 3 * np.arange(8)[:, None, None, None] + 100
    layer = layers.BatchNorm(4, epsilon=1e-3, momentum=0.2, dtype=jnp.float64, param_dtype=jnp.float64)
    parallel = parallel_of(kind, devices)
    layer.use_running_average, layer.axis_name = False, parallel.axis_name
    graph, variables = nnx.split(layer)

    # The state as an argument: closed over, it sends jaxlib 0.11.2's compiler for pmap into a segmentation fault.
    def body(variables, x):
        module = nnx.merge(graph, variables, copy=True)
        return module(x), module.mean[...], module.var[...]

    if kind == "pmap":
        mapped = jax.pmap(body, axis_name=AXIS, in_axes=(None, 0), devices=parallel.devices)
        y, mean, var = mapped(variables, x.reshape(4, 2, *x.shape[1:]))
        y, mean, var = y.reshape(x.shape), mean[0], var[0]
    else:
        y, mean, var = jax.jit(body)(variables, jax.device_put(x, parallel.split))
    over = (0, 1, 2)
    np.testing.assert_allclose(y, (x - x.mean(over)) / np.sqrt(x.var(over) + 1e-3), rtol=0, atol=1e-11)
    np.testing.assert_allclose(mean, 0.2 * x.mean(over), rtol=1e-13)
    np.testing.assert_allclose(var, 0.8 + 0.2 * x.var(over, ddof=1), rtol=1e-12)


def test_evaluation_is_equal_on_one_and_on_four_devices(float64):
    split = make_split(6, (40, 48), 2)
    results = []
    for kind, devices in KINDS:
        parallel = parallel_of(kind, devices)
        functional = tiny_functional(parallel, seed=2)  # which predicts every class somewhere
        arrays = parallel.fetch(parallel.replicate(functional.arrays()))
        inference = Inference(functional, devices=parallel.own_devices).with_arrays(arrays)
        results.append(evaluate(inference.begin, split, SPEC, batch_size=4, keep=(0, 4, 5)))
    for confusion, kept in results:
        np.testing.assert_array_equal(confusion, results[0][0])
        assert sorted(kept) == [0, 4, 5]
        for number, labels in kept.items():
            assert labels.dtype == np.uint8 and labels.shape == (40, 48)
            np.testing.assert_array_equal(labels, results[0][1][number])
    assert results[0][0].sum() == (split.labels != 255).sum()
    assert (results[0][0].sum(0) > 0).all()


def test_evaluation_counts_equal_those_of_a_plain_loop_over_images():
    split = make_split(7, (6, 9), 3)
    guesses = np.random.default_rng(0).integers(0, 5, (7, 6, 9)).astype(np.uint8)

    def predict(images):
        # Finds the image again by its pixels: the order of the batches is the evaluation's own business.
        return np.stack([guesses[(split.images == image).all((1, 2, 3)).argmax()] for image in images])

    confusion, kept = evaluate(predict, split, SPEC, batch_size=3, keep=(2,))
    expected = np.zeros((5, 5), int)
    for truth, guess in zip(split.labels.ravel(), guesses.ravel(), strict=True):
        if truth != 255:
            expected[truth, guess] += 1
    np.testing.assert_array_equal(confusion, expected)
    np.testing.assert_array_equal(kept[2], guesses[2])


def test_an_evaluation_split_without_images_is_refused_by_name():
    empty = specs.Split(*(array[:0] for array in make_split(1, (6, 9), 0)[:3]), ())
    with pytest.raises(ValueError, match="no image in the evaluation split of noise"):
        evaluate(lambda images: [image[..., 0] for image in images], empty, SPEC, batch_size=3)


@pytest.mark.parametrize("kind, expected", [("jit", None), ("pmap", AXIS)])
def test_the_model_of_a_run_gets_the_axis_name(kind, expected):
    config = segformer.get_config("b0,folder")
    config.model.update(SIZES)
    functional = functional_model(config, 5, axis_name=parallel_for(kind).axis_name)
    model = functional.bind(*functional.arrays())
    told = [module for _, module in nnx.iter_modules(model) if hasattr(module, "axis_name")]
    assert len(told) == 1 + 1 + 2 * 4  # BatchNorm, dropout, and drop path twice a block
    assert {module.axis_name for module in told} == {expected}

"""Row tiles against the plain implementations and torch's, for maps that fill one tile, some, or many."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax

from parity import compare
from parity.subjects import NUM_CLASSES, SUBJECTS
from parity.test_grad import assert_gradients_equal
from parity.test_ops import normal, torch_values_and_gradients, values_and_gradients
from segjax import layers
from segjax.checkpoints import architectures
from segjax.kernels import choice, units
from segjax.kernels.decoder import blends
from segjax.torch_reference import verify


@pytest.fixture(autouse=True)
def on_a_cpu():
    """The forms of a CPU, also where the tests run on something else."""
    with choice.meant_for("cpu"):
        yield


@pytest.fixture
def tiles(monkeypatch):
    """How many tiles each map traced since goes through; a map in one piece is not among them."""
    numbers = []
    plain_map = lax.map

    def noted(function, over):
        numbers.append(len(over))
        return plain_map(function, over)

    monkeypatch.setattr(lax, "map", noted)
    return numbers


def assert_all_within(ours, theirs, dtype, within, what):
    """An output and gradients of it, each relative to its own largest value."""
    for kind, one, other in zip(("output", *["gradient"] * (len(theirs) - 1)), ours, theirs, strict=True):
        within(kind, dtype, verify.relative_error(one, other.detach()), what)


# ------------------------------------------------------------------------------------------------------- feed-forward

KINDS = ("linear", "pointwise", "several outputs")
# (B, H, W), rows that fit into a tile, and the tiles that these are: one, equal ones, a last one that is shorter (also
# where six fit but rows are spread evenly), one row a tile.
CASES = [
    ((2, 5, 7), 5, None),
    ((2, 8, 5), 2, 4),
    ((3, 7, 4), 3, 3),
    ((2, 11, 3), 6, 2),
    ((2, 5, 6), 1, 5),
    ((2, 5, 6), 0.2, 5),
    ((3, 1, 5), 0.5, None),
    ((2, 2, 3), 1, 2),
    ((3, 2, 1), 2, None),
]


def feed_forward_of(kind, dtype, *, channels=3, hidden=8, out=5):
    """Layers (first, depthwise, pointwise or None, last) with biases that are as large as everything else."""
    kinds = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    if kind == "linear":
        first, pointwise = layers.Linear(channels, hidden, **kinds), None
        depthwise = layers.Conv(hidden, hidden, 3, padding=1, groups=hidden, **kinds)
        last = layers.Linear(hidden, out, **kinds)
    elif kind == "pointwise":
        first, pointwise = layers.Conv(channels, hidden, 1, **kinds), layers.Conv(hidden, hidden, 1, **kinds)
        depthwise = layers.Conv(hidden, hidden, 3, padding=1, groups=hidden, **kinds)
        last = layers.Conv(hidden, out, 1, **kinds)
    else:
        first, pointwise = layers.Conv(channels, channels, 1, **kinds), None
        depthwise = layers.Conv(channels, 4 * channels, 3, padding=1, groups=channels, **kinds)
        last = layers.Conv(4 * channels, out, 1, **kinds)
    network = nnx.List([first, depthwise, last] if pointwise is None else [first, depthwise, pointwise, last])
    for index, layer in enumerate(network):
        kernel = normal(*layer.kernel.shape, seed=index, dtype="float64") / np.sqrt(layer.kernel[..., 0].size)
        layer.kernel[...] = kernel.astype(jnp.dtype(dtype))
        layer.bias[...] = 2 * normal(*layer.bias.shape, seed=10 + index, dtype="float64").astype(jnp.dtype(dtype))
    return network


def by_rows(first, depthwise, *others):
    """The network in row tiles where a CPU will run it, else layer by layer."""
    *pointwise, last = others
    middle = pointwise[0] if pointwise else None
    in_tiles = layers.cpu_implementation(lambda x: layers.feed_forward(first, depthwise, last, x, pointwise=middle))
    return in_tiles(one_by_one(first, depthwise, *others))


def one_by_one(first, depthwise, *others):
    *pointwise, last = others

    def run(x):
        hidden = depthwise(first(x))
        for layer in pointwise:
            hidden = layer(hidden)
        return last(layers.gelu(hidden))

    return run


def of_arrays(network, form):
    """form(*network) as a function of x and of every bias and kernel, and these."""
    graphdef, state = nnx.split(network)
    arrays, structure = jax.tree.flatten(state)
    return lambda x, *arrays: form(*nnx.merge(graphdef, structure.unflatten(arrays)))(x), arrays


def torch_feed_forward(x, *arrays):
    """The same network in torch, of our layouts."""
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))

    def linear(x, bias, kernel):
        return F.linear(x, kernel.reshape(kernel.shape[-2:]).T, bias)

    x = linear(x, *pairs[0]).permute(0, 3, 1, 2)
    bias, kernel = pairs[1]
    x = F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1, groups=x.shape[1]).permute(0, 2, 3, 1)
    for pair in pairs[2:-1]:
        x = linear(x, *pair)
    return linear(F.gelu(x), *pairs[-1])


def band_bytes(network, shape, rows_of_a_band, dtype):
    """What so many rows take of the widest map."""
    widest = network[1].kernel.shape[-1]
    return int(rows_of_a_band * shape[0] * shape[2] * widest * jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize(
    ("kind", "dtype", "cases"),
    [(kind, "float64", slice(None)) for kind in KINDS] + [("several outputs", "float32", slice(2, 3))],
)
def test_a_feed_forward_network_in_row_tiles_equals_torch(kind, dtype, cases, tiles, float64, within, monkeypatch):
    network = feed_forward_of(kind, dtype)
    run, arrays = of_arrays(network, by_rows)
    for shape, rows_of_a_band, expected in CASES[cases]:
        monkeypatch.setattr(units, "TILE_BYTES", band_bytes(network, shape, rows_of_a_band, dtype))
        x = normal(*shape, 3, seed=20, dtype=dtype)
        # Anew, since what was traced holds the tiles of its time.
        ours = jax.jit(lambda *given: run(*given))(x, *arrays)
        assert tiles == ([] if expected is None else [expected])
        tiles.clear()
        with torch.no_grad():
            theirs = torch_feed_forward(*(torch.from_numpy(np.array(array)) for array in (x, *arrays)))
        assert ours.dtype == jnp.dtype(dtype)
        within("output", dtype, verify.relative_error(ours, theirs), "feed-forward in row tiles = torch")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 5, 7), "float64"), ((3, 1, 4), "float64"), ((2, 2, 1), "float64"), ((3, 6, 5), "float32")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_of_a_feed_forward_network_equals_torchs(kind, shape, dtype, float64, within, monkeypatch):
    run, arrays = of_arrays(feed_forward_of(kind, dtype), by_rows)
    x = normal(*shape, 3, seed=21, dtype=dtype)
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    ours = values_and_gradients(run, x, *arrays)
    assert_all_within(
        ours,
        torch_values_and_gradients(torch_feed_forward, x, *arrays),
        dtype,
        within,
        "feed-forward, fewer passes = torch",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_forward_network_in_row_tiles_equals_its_layers(kind, tiles, float64, within, monkeypatch):
    network = feed_forward_of(kind, "float64")
    x = normal(2, 7, 5, 3, seed=22, dtype="float64")
    monkeypatch.setattr(units, "TILE_BYTES", band_bytes(network, x.shape, 2, "float64"))
    run, arrays = of_arrays(network, by_rows)
    plain, _ = of_arrays(network, one_by_one)
    ours = jax.jit(run)(x, *arrays)
    assert tiles.pop() == 4
    with choice.published_implementations():
        expected = jax.jit(plain)(x, *arrays)
        # The same function gives the plain implementation there, and on a GPU.
        np.testing.assert_array_equal(jax.jit(lambda *given: run(*given))(x, *arrays), expected)
    assert not tiles
    within("output", "float64", verify.relative_error(ours, expected), "feed-forward in row tiles = plain")
    with choice.meant_for("cuda"):
        jax.eval_shape(lambda *given: run(*given), x, *arrays)
    assert not tiles


@pytest.mark.parametrize("kind", ["pointwise", "several outputs"])
def test_bfloat16_row_tiles_are_as_near_to_float64_as_the_layers(kind, tiles, float64, monkeypatch):
    network = feed_forward_of(kind, "bfloat16", channels=4, hidden=12)
    x = normal(2, 9, 8, 4, seed=23, dtype="float64").astype(jnp.bfloat16)
    run, arrays = of_arrays(network, by_rows)
    plain, _ = of_arrays(network, one_by_one)
    wide = [np.asarray(array, np.float64) for array in (x, *arrays)]
    exact = torch_values_and_gradients(torch_feed_forward, *wide)
    with choice.published_implementations():
        others = values_and_gradients(plain, x, *arrays)
    monkeypatch.setattr(units, "TILE_BYTES", band_bytes(network, x.shape, 4, "bfloat16"))
    alone = jax.jit(lambda *given: run(*given))(x, *arrays)
    assert tiles == [3]
    ours = values_and_gradients(run, x, *arrays)
    for one, other, true in zip((alone, *ours), (others[0], *others), (exact[0], *exact), strict=True):
        assert one.dtype == jnp.bfloat16
        error = verify.relative_error(one.astype(np.float64), true.detach())
        assert error < 2 * verify.relative_error(other.astype(np.float64), true.detach())


# ----------------------------------------------------------------------------------------------------------- decoders

MODES = {
    "half": dict(mode="bilinear", align_corners=False),
    "aligned": dict(mode="bilinear", align_corners=True),
    "nearest": dict(mode="nearest"),
}


def as_wanted(mode, size):
    """Upsamples a map by the layers of the plain implementation."""
    if mode == "nearest":
        # By another factor on each axis, which no model asks `upsample_nearest` for.
        return lambda x: jnp.repeat(jnp.repeat(x, size[0] // x.shape[1], axis=1), size[1] // x.shape[2], axis=2)
    return lambda x: layers.resize(x, size, align_corners=mode == "aligned")


# Sizes of the levels, which of the layers there are, and rows of the smallest tile.
DECODERS = {
    "deepest first": (
        [(2, 3), (4, 6), (8, 12), (16, 24)],
        dict(projected=True, fuse_bias=False, classes=5),
        8,
    ),
    "largest first": (
        [(12, 6), (6, 3), (4, 2), (12, 2), (3, 6)],
        dict(projected=False, fuse_bias=True, classes=1),
        12,
    ),
    "one row, one column": (
        [(2, 1), (1, 8), (8, 8), (4, 2)],
        dict(projected=True, fuse_bias=True, classes=5),
        8,
    ),
    "one coarse level": (
        [(20, 9), (4, 3)],
        dict(projected=False, fuse_bias=False, classes=2),
        5,
    ),
    # Of an image of 112 rows. No factor is a multiple of all others.
    "factors 2, 4 and 7": (
        [(28, 4), (14, 2), (7, 1), (4, 1)],
        dict(projected=True, fuse_bias=False, classes=3),
        28,
    ),
    "factors 2 and 3": (
        [(12, 4), (6, 4), (4, 2)],
        dict(projected=True, fuse_bias=False, classes=3),
        6,
    ),
}


class Decoder(nnx.Module):
    """Levels of 2, 3, 4... channels -> logits, by way of something that is neither linear nor the same everywhere."""

    def __init__(self, levels, *, projected, fuse_bias, classes, dtype, channels=6):
        kinds = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(1))
        widths = range(2, 2 + levels)
        self.projections = nnx.List([layers.Linear(width, channels, **kinds) for width in widths] if projected else [])
        total = levels * channels if projected else sum(widths)
        self.fuse = layers.Conv(total, channels, 1, use_bias=fuse_bias, **kinds)
        self.classifier = layers.Conv(channels, classes, 1, **kinds)
        self.scale = nnx.Param(jnp.ones(channels, dtype))
        for index, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(self))):
            parameter[...] = normal(*parameter.shape, seed=40 + index, dtype="float64").astype(jnp.dtype(dtype))

    def finish(self, fused):
        return jax.nn.relu(fused * self.scale[...] + 0.5)

    def fused(self, levels, upsample):
        """As it is published."""
        if self.projections:
            levels = [layer(x) for layer, x in zip(self.projections, levels, strict=True)]
        return self.fuse(jnp.concatenate([upsample(x) for x in levels], axis=-1))

    def plain(self, levels, mode):
        size = tuple(max(x.shape[axis] for x in levels) for axis in (1, 2))
        return layers.classify(self.classifier, self.finish(self.fused(levels, as_wanted(mode, size))))

    def by_rows(self, levels, mode):
        projections = list(self.projections) or None
        settings = dict(projections=projections, **MODES[mode])
        return layers.decode(levels, self.fuse, self.finish, self.classifier, **settings)

    def chosen(self, levels, fused):
        """In row tiles where a CPU will run it and sizes allow it, else from the `fused` map."""

        @layers.cpu_implementation(lambda levels: self.by_rows(levels, "half"))
        def decode(levels):
            return layers.classify(self.classifier, self.finish(fused))

        return decode(levels)


def decoder_of(name, dtype):
    """(Decoder, levels, function of levels and all parameters -> logits, parameters by name)."""
    sizes, parts, _ = DECODERS[name]
    decoder = Decoder(len(sizes), **parts, dtype=dtype)
    levels = [
        normal(2, *size, 2 + index, seed=30 + index, dtype="float64").astype(jnp.dtype(dtype))
        for index, size in enumerate(sizes)
    ]
    graphdef, state = nnx.split(decoder)
    arrays, structure = jax.tree.flatten(state)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]

    def call(method, mode):
        def run(*given):
            bound = nnx.merge(graphdef, structure.unflatten(given[len(levels) :]))
            return getattr(bound, method)(given[: len(levels)], mode)

        return run

    return SimpleNamespace(decoder=decoder, levels=levels, call=call, arrays=arrays, names=names)


def torch_decoder(names, count, mode):
    def run(*given):
        levels, layer = given[:count], dict(zip(names, given[count:], strict=True))
        if "projections.0.kernel" in layer:
            levels = [
                F.linear(x, layer[f"projections.{index}.kernel"].T, layer[f"projections.{index}.bias"])
                for index, x in enumerate(levels)
            ]
        size = tuple(max(x.shape[axis] for x in levels) for axis in (1, 2))
        wide = [F.interpolate(x.permute(0, 3, 1, 2), size=size, **MODES[mode]) for x in levels]
        kernel = layer["fuse.kernel"].permute(3, 2, 0, 1)
        fused = F.conv2d(torch.cat(wide, 1), kernel, layer.get("fuse.bias")).permute(0, 2, 3, 1)
        finished = F.relu(fused * layer["scale"] + 0.5)
        return F.linear(finished, layer["classifier.kernel"][0, 0].T, layer["classifier.bias"])

    return run


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float64") for name in DECODERS] + [("one coarse level", "float32")], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_in_row_tiles_and_its_gradients_equal_torch(mode, name, dtype, tiles, float64, within, monkeypatch):
    given = decoder_of(name, dtype)
    sizes, _, smallest = DECODERS[name]
    height, width = max(sizes)
    everything = (*given.levels, *given.arrays)
    theirs = torch_values_and_gradients(torch_decoder(given.names, len(sizes), mode), *everything)
    run = given.call("by_rows", mode)
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    ours = values_and_gradients(run, *everything)
    assert_all_within(ours, theirs, dtype, within, "decoder in row tiles = torch")
    assert ours[0].dtype == jnp.dtype(dtype)
    if smallest == height:
        assert not tiles
        return
    assert tiles and set(tiles) == {height // smallest}
    # All rows fit: one tile, and no loop.
    monkeypatch.setattr(units, "TILE_BYTES", 2 * height * width * 6 * jnp.dtype(dtype).itemsize)
    tiles.clear()
    in_one = jax.jit(lambda *given: run(*given))(*everything)
    assert not tiles
    within("output", dtype, verify.relative_error(in_one, theirs[0].detach()), "decoder in one tile = torch")


def test_row_tiles_of_a_decoder_are_as_large_as_the_limit_allows(tiles, float64, within, monkeypatch):
    given = decoder_of("one coarse level", "float64")  # 20 rows, in steps of 5
    expected = given.call("plain", "half")(*given.levels, *given.arrays)
    row = 2 * 9 * 6 * 8
    for fits, number in ((19.9, 2), (10, 2), (9.9, 4), (5, 4), (0.1, 4)):
        monkeypatch.setattr(units, "TILE_BYTES", int(fits * row))
        ours = jax.jit(lambda *arrays: given.call("by_rows", "half")(*arrays))(*given.levels, *given.arrays)
        assert tiles == [number], fits
        tiles.clear()
        within("output", "float64", verify.relative_error(ours, expected), "decoder in row tiles = plain")


@pytest.mark.parametrize("mode", MODES)
def test_a_decoder_in_row_tiles_equals_the_plain_one(mode, float64, within, monkeypatch):
    given = decoder_of("deepest first", "float64")
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    with choice.published_implementations():
        expected = jax.jit(given.call("plain", mode))(*given.levels, *given.arrays)
    ours = jax.jit(given.call("by_rows", mode))(*given.levels, *given.arrays)
    within("output", "float64", verify.relative_error(ours, expected), "decoder in row tiles = plain")


def test_a_bfloat16_decoder_is_as_near_to_float64_as_the_plain_one(tiles, float64, monkeypatch):
    given = decoder_of("deepest first", "bfloat16")
    everything = (*given.levels, *given.arrays)
    wide = [torch.from_numpy(np.asarray(array, np.float64)) for array in everything]
    exact = torch_decoder(given.names, 4, "half")(*wide)
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    ours, plain = (jax.jit(given.call(form, "half"))(*everything) for form in ("by_rows", "plain"))
    assert tiles and ours.dtype == plain.dtype == jnp.float32
    assert verify.relative_error(ours, exact) < 2 * verify.relative_error(plain, exact)


EVEN = ((8, 12), (4, 6), (2, 3))


@pytest.mark.parametrize(
    ("sizes", "context"),
    [
        pytest.param(((17, 25), (9, 13), (5, 7), (3, 4)), choice.meant_for("cpu"), id="no multiples"),
        pytest.param(((8, 12), (4, 5), (2, 3)), choice.meant_for("cpu"), id="no multiples of columns"),
        pytest.param(((8, 12), (5, 6), (2, 3)), choice.meant_for("cpu"), id="no multiples of rows"),
        pytest.param(((8, 4), (4, 8)), choice.meant_for("cpu"), id="none is the largest"),
        pytest.param((*EVEN, (8, 12)), choice.meant_for("cpu"), id="two of the largest"),
        pytest.param(((8, 12),), choice.meant_for("cpu"), id="one level"),
        pytest.param(EVEN, choice.published_implementations(), id="published forms"),
        pytest.param(EVEN, choice.meant_for("cuda"), id="on a GPU"),
    ],
)
def test_a_decoder_is_computed_in_steps(sizes, context, tiles, float64):
    decoder = Decoder(len(sizes), projected=True, fuse_bias=True, classes=3, dtype="float64")
    levels = [normal(2, *size, 2 + index, seed=30 + index, dtype="float64") for index, size in enumerate(sizes)]
    fused = normal(2, *sizes[0], 6, seed=50, dtype="float64")
    with context:
        ours = decoder.chosen(levels, fused)
    finished = np.maximum(fused * decoder.scale[...] + 0.5, 0)
    expected = finished @ np.asarray(decoder.classifier.kernel[0, 0]) + np.asarray(decoder.classifier.bias[...])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    assert not tiles


def test_maps_of_unknown_size_are_computed_in_one_piece(tiles, monkeypatch):
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    b, h, w = jax.export.symbolic_shape("b, h, w")
    network = feed_forward_of("linear", "float32")
    x = jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32)
    out = jax.eval_shape(jax.jit(by_rows(*network)), x)
    assert out.shape == (b, h, w, 5)
    decoder = Decoder(2, projected=True, fuse_bias=True, classes=3, dtype="float32")
    levels = [jax.ShapeDtypeStruct((b, *size), jnp.float32) for size in ((2 * h, 2 * w, 2), (h, w, 3))]
    fused = jax.ShapeDtypeStruct((b, 2 * h, 2 * w, 6), jnp.float32)

    assert jax.eval_shape(decoder.chosen, levels, fused).shape == (b, 2 * h, 2 * w, 3)
    assert not tiles


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", range(1, 9))
@pytest.mark.parametrize("length", [1, 2, 5])
def test_interpolation_weights_are_torchs_and_sum_to_one(length, factor, mode, within):
    settings = dict(mode=MODES[mode]["mode"], align_corners=MODES[mode].get("align_corners", False))
    weights = blends(length, factor, **settings)
    assert weights.shape == (3, length, factor) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=0, atol=1e-12)
    # Every pixel in a channel of its own shows its weight.
    mode = dict(mode="nearest") if mode == "nearest" else dict(mode="linear", align_corners=mode == "aligned")
    theirs = F.interpolate(torch.eye(length, dtype=torch.float64)[None], scale_factor=factor, **mode)[0].T
    ours = np.zeros((length * factor, length))
    for tap, pixel, place in np.ndindex(3, length, factor):
        neighbour = np.clip(pixel + tap - 1, 0, length - 1)
        ours[factor * pixel + place, neighbour] += weights[tap, pixel, place]
    within("output", "float64", verify.relative_error(ours, theirs), "weights of an upsampling = torch")


# ------------------------------------------------------------------------------------------------------------- models

EVEN_IMAGE, ODD_IMAGE = (64, 32), (33, 50)
# One block a stage shows all that a second one would. Of the decoder that two families share one takes the odd image.
SHORT = dict(depths=(1, 1, 1, 1))
MODELS = [
    ("segformer", SHORT, ODD_IMAGE),
    pytest.param("plain, conv_bn", SHORT, EVEN_IMAGE, marks=pytest.mark.slow),
    ("mmseg", SHORT, EVEN_IMAGE),
    ("simple", SHORT, EVEN_IMAGE),
    ("zuppichini", SHORT, EVEN_IMAGE),
    ("hrnet", dict(stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1)), EVEN_IMAGE),
    ("hrnet", dict(stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1)), ODD_IMAGE),
    # Takes as long to compile as three of the others, for its networks alone.
    pytest.param("segnext", SHORT, EVEN_IMAGE, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "short", "size"), MODELS)
def test_a_model_in_row_tiles_equals_the_reference(name, short, size, tiles, float64, within, monkeypatch):
    subject = SUBJECTS[name]
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=6, dtype="float64", **subject.sizes | short
    )
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    x, bases = compare.images(2, size, seed=12, dtype="float64"), verify.bases_for(model, 2)
    ours, _ = verify.compiled(model)(x, *bases)
    with torch.no_grad():
        theirs, _ = verify.run_reference(reference, x, *bases)
    # Of the feed-forward networks one row a tile, of a decoder as many as a pixel of its smallest map becomes.
    height = -(-size[0] // 4)
    networks = [] if subject.name.startswith("hrnet") else [-(-height // 2**stage) for stage in range(4)]
    decoders = [height // 8] if size == EVEN_IMAGE and name != "segnext" else []
    assert tiles == [number for number in networks if number > 1] + decoders
    family = architectures.family_of(subject.name)
    within("output", "float64", verify.relative_error(ours, verify.to_nhwc(theirs)), f"{family}, in row tiles")


# Gradients of networks and decoders are compared above.
@pytest.mark.slow
def test_gradients_of_a_model_in_row_tiles_equal_the_reference(tiles, float64, within, monkeypatch):
    subject = SUBJECTS["simple"]
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=4, dtype="float64", **subject.fixed | SHORT
    )
    monkeypatch.setattr(units, "TILE_BYTES", 1)
    assert_gradients_equal(subject, model, reference, 2, EVEN_IMAGE, "float64", False, within, "in row tiles")
    assert 2 in tiles

"""The cost of models: published figures, formulas written by hand, the command."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import segjax
from segjax import layers
from segjax.commands import summary as command
from segjax.models import segformer, summary
from segjax.models.summary import least_work, modelsummary, summarise

B5 = dict(dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), decoder_dim=768)
PLAIN_B5_LAYERS = {
    "Conv2d": 107,
    "LayerNorm": 161,
    "OverlapPatchEmbed": 4,
    "Linear": 264,
    "Dropout": 208,
    "Attention": 52,
    "Identity": 2,
    "DWConv": 52,
    "GELU": 52,
    "Mlp": 52,
    "Block": 52,
    "DropPath": 102,
    "LinearMLP": 4,
    "Dropout2d": 1,
}
SIMPLE_LAYERS = {
    "MiT": 1,
    "Unfold": 4,
    "Conv2d": 374,
    "LayerNorm": 104,
    "EfficientSelfAttention": 52,
    "PreNorm": 104,
    "DsConv2d": 52,
    "GELU": 52,
    "MixFeedForward": 52,
    "Upsample": 4,
}
# Every width, depth and ratio of a stage differs from its neighbours', and so do the two sides of the image.
NARROW = dict(dims=(8, 16, 20, 32), depths=(2, 1, 3, 1), mlp_ratios=(4, 2, 3, 1), decoder_dim=24)
SIZE = (65, 97)
HEIGHTS, WIDTHS, REDUCTIONS = (17, 9, 5, 3), (25, 13, 7, 4), (8, 4, 2, 1)
TOKENS = [h * w for h, w in zip(HEIGHTS, WIDTHS, strict=True)]
REDUCED = [(h // r) * (w // r) for h, w, r in zip(HEIGHTS, WIDTHS, REDUCTIONS, strict=True)]
STAGES = list(zip(TOKENS, REDUCED, *(NARROW[key] for key in ("dims", "depths", "mlp_ratios")), REDUCTIONS, strict=True))
# The smallest of every family.
SMALL = {
    "segformer_b0": NARROW,
    "segformer_plain_b0": NARROW,
    "segformer_mmseg_b0": NARROW,
    "segformer_simple": dict(dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), decoder_dim=8),
    "segformer_zuppichini": dict(dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), decoder_dim=8),
    "hrnet_w18": dict(width=2, stage_modules=(1, 1, 2, 1), stage_blocks=(2, 1, 1, 1)),
    "hrnet_w18_ocr": dict(width=2, stage_blocks=(1, 1, 1, 1), ocr_channels=8, ocr_key_channels=4),
    "segnext_t": dict(dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), ham_channels=32, ham_rank=8),
}


@pytest.fixture(scope="module")
def built():
    return {}


@pytest.fixture(autouse=True)
def build_once(monkeypatch, built):
    """Every model is built once for all tests: of a B5, that takes longer than everything after it."""
    build = summary._abstract

    def build_or_take(name, num_classes, overrides):
        key = name, num_classes, repr(overrides)
        if key not in built:
            built[key] = build(name, num_classes, overrides)
        return built[key]

    monkeypatch.setattr(summary, "_abstract", build_or_take)


def run(capsys, *arguments):
    status = command.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "size", "overrides", "parameters", "gflops"),
    [
        ("segformer_plain_b5", (1024, 1024), {}, 85915731, "11,607"),
        ("segformer_plain_b5", (512, 1024), {}, 85915731, "2,944.247"),
        ("segformer_plain_b5", (512, 512), {}, 85915731, "757.303"),
        ("segformer_simple", (1024, 1024), B5, 255280531, "679"),
        ("hrnet_w48", (512, 1024), {}, 65859379, "174.044"),
    ],
)
def test_the_published_figures_are_reproduced(name, size, overrides, parameters, gflops):
    published = modelsummary(name, size, **overrides)
    assert published.parameters == parameters
    digits = len(gflops.partition(".")[2])
    assert f"{published.gflops:,.{digits}f}" == gflops
    if name == "segformer_plain_b5":
        assert list(published.layers.items()) == list(PLAIN_B5_LAYERS.items())
    elif name == "segformer_simple":
        assert published.layers == SIMPLE_LAYERS
    else:
        # The two that are published, and how often the official forward pass calls the rest.
        assert (published.layers["Conv2d"], published.layers["BatchNorm2d"]) == (307, 306)
        modules, blocks, bottlenecks = 1 + 4 + 3, 4 * (2 + 4 * 3 + 3 * 4), 4
        relus = 2 + 3 * bottlenecks + 2 * blocks + (2 + 4 * 3 + 3 * 4) + (2 + 1 + 1) + (4 * 1 + 3 * 4) + 1
        rest = {"Bottleneck": 4, "BasicBlock": blocks, "HighResolutionModule": modules, "ReLU": relus}
        assert published.layers == {"Conv2d": 307, "BatchNorm2d": 306} | rest


def test_the_published_convention_follows_the_structure():
    published = modelsummary("segformer_plain_b0", SIZE, 150, **NARROW, fuse="conv_bn", drop_path_rate=0.0)
    blocks, reducing, decoder = 7, 6, NARROW["decoder_dim"]
    assert published.layers == {
        "Conv2d": 4 + reducing + blocks + 2,
        "LayerNorm": 4 + 2 * blocks + reducing + 4,
        "OverlapPatchEmbed": 4,
        "Linear": 5 * blocks + 4,
        "Dropout": 4 * blocks,
        "Attention": blocks,
        "Identity": 2 * blocks,
        "DWConv": blocks,
        "GELU": blocks,
        "Mlp": blocks,
        "Block": blocks,
        "LinearMLP": 4,
        "BatchNorm2d": 1,
        "Dropout2d": 1,
    }
    true = summarise("segformer_plain_b0", SIZE, 150, **NARROW, fuse="conv_bn").parameters
    again = sum(depth * dim * ratio * 10 for _, _, dim, depth, ratio, _ in STAGES)
    again += sum((dim + 1) * decoder for dim in NARROW["dims"])
    norms = sum(2 * dim * (2 + depth * (2 + (r > 1))) for _, _, dim, depth, _, r in STAGES)
    assert published.parameters == true + again - norms
    expected = decoder * TOKENS[0] * (4 * decoder + 150)
    side = (7, 3, 3, 3)
    for stage, (N, M, dim, depth, ratio, r) in enumerate(STAGES):
        expected += side[stage] ** 2 * (3, *NARROW["dims"])[stage] * dim * N
        expected += depth * (2 * dim * N * N + 2 * dim * M * M + (ratio + 1) * dim * N * N)
        expected += depth * (9 * ratio * dim * N + (r * r * dim * dim * M if r > 1 else 0))
        expected += decoder * N * N
    assert published.multiply_adds == expected


def test_the_simple_default_has_the_published_convolutions():
    counted = summarise("segformer_simple", (224, 224))
    convolutions = [count for kind, count in counted.multiply_adds.items() if kind.endswith("convolution")]
    assert len(convolutions) == 3 and sum(convolutions) == 2517079040
    assert counted.parameters == 7722099


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [("segformer_b0", 19, 3719027), ("segformer_b0", 150, 3752694), ("segnext_t", 19, 4229747)],
)
def test_parameters_are_counted_exactly(name, num_classes, parameters):
    assert summarise(name, (64, 96), num_classes).parameters == parameters


def test_multiply_adds_of_a_segformer_match_a_hand_count():
    counted = summarise("segformer_b0", SIZE, 7, **NARROW)
    decoder = NARROW["decoder_dim"]
    expected = dict.fromkeys(summary.KINDS, 0)
    expected["pointwise_convolution"] = TOKENS[0] * decoder * (4 * decoder + 7)
    for stage, (N, M, dim, depth, ratio, r) in enumerate(STAGES):
        expected["dense_convolution"] += (49, 9, 9, 9)[stage] * (3, *NARROW["dims"])[stage] * dim * N
        expected["dense_convolution"] += depth * (r * r * dim * dim * M if r > 1 else 0)
        expected["grouped_convolution"] += depth * 9 * ratio * dim * N
        expected["linear"] += depth * dim * dim * (2 * N + 2 * M + 2 * ratio * N) + decoder * dim * N
        expected["attention"] += depth * 2 * N * M * dim
    assert counted.multiply_adds == expected
    assert counted.total_multiply_adds == sum(expected.values())


def test_multiply_adds_of_the_factorisation_match_a_hand_count():
    sizes = dict(SMALL["segnext_t"], ham_channels=64, ham_rank=12)
    N, C, R = 9 * 13, 64, 12
    coefficients = N * C * R + C * R * R + N * R * R
    bases = N * C * R + N * R * R + C * R * R
    start = product = N * C * R
    expected = start + 7 * (coefficients + bases) + coefficients + product
    assert summarise("segnext_t", SIZE, **sizes).multiply_adds["nmf"] == expected


def test_multiply_adds_of_object_contexts_match_a_hand_count():
    counted = summarise("hrnet_w18_ocr", SIZE, 5, **SMALL["hrnet_w18_ocr"]).multiply_adds
    N, C, D, K = 17 * 25, 8, 4, 5
    assert counted["object_gathering"] == N * K * C
    assert counted["attention"] == 2 * N * K * D


@pytest.mark.parametrize("name", SMALL)
def test_every_product_is_of_a_known_kind(name):
    counted = summarise(name, (64, 96), 5, **SMALL[name])
    assert counted.multiply_adds["other"] == 0
    # Pixels are moved by products here, which is no work of a layer.
    moves = {"segformer_simple": "unfolding"}.get(name, "interpolation")
    assert {kind for kind, count in counted.not_counted.items() if count} == {moves}


@pytest.mark.parametrize(("dtype", "narrow_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_activation_memory_matches_a_hand_count(dtype, narrow_bytes):
    decoder, K = NARROW["decoder_dim"], 7
    values = (3 + 1 + 1 + 1) * TOKENS[0] * decoder  # three upsamplings, convolution, BatchNorm, ReLU
    wide = TOKENS[0] * K
    for (N, M, dim, depth, ratio, r), heads in zip(STAGES, (1, 2, 5, 8), strict=True):
        values += 2 * N * dim + N * dim + N * decoder  # patches and their norm, the stage's norm, the decoder's level
        attention = N * dim + N * dim + 2 * M * dim + N * dim + N * dim + (2 * M * dim if r > 1 else 0)
        feed_forward = N * dim + 3 * N * ratio * dim + N * dim
        values += depth * (attention + feed_forward)
        wide += depth * heads * N * M  # what softmax sees, in float32 always
    counted = summarise("segformer_b0", SIZE, K, **NARROW, dtype=dtype)
    assert counted.activation_bytes == narrow_bytes * values + 4 * wide
    assert counted.activation_mib == counted.activation_bytes / 2**20


def test_layers_are_counted_as_calls_by_class():
    counted = summarise("segformer_b0", SIZE, **NARROW)
    assert counted.layers == {
        "Attention": 7,
        "BatchNorm": 1,
        "Block": 7,
        "Conv": 4 + 6 + 7 + 2,
        "DWConv": 7,
        "DropPath": 14,
        "Dropout2d": 1,
        "GELU": 7,
        "LayerNorm": 4 + 14 + 6 + 4,
        "Linear": 35 + 4,
        "MixTransformer": 1,
        "Mlp": 7,
        "OverlapPatchEmbed": 4,
        "ReLU": 1,
        "SegFormerHead": 1,
    }


@pytest.mark.parametrize(("name", "stride", "logits"), [("segformer_b0", 4, (17, 25, 5)), ("segnext_t", 8, (9, 13, 5))])
def test_the_output_stride_is_reported_at_sizes_it_does_not_divide(name, stride, logits):
    counted = summarise(name, SIZE, 5, **SMALL[name])
    assert (counted.output_stride, counted.logits) == (stride, logits)


@pytest.mark.parametrize("size", [(100, 100), (64, 96)])
def test_layers_and_functions_are_restored_afterwards(size):
    def watched():
        functions = [getattr(module, attribute) for module, attribute, _ in summary.FUNCTIONS]
        return [*functions, layers.Conv.__call__, layers.DropPath.__call__, segformer.Block.__call__, jax.nn.relu]

    before = watched()
    with contextlib.suppress(ValueError):
        summarise("segformer_simple", size, **SMALL["segformer_simple"])
    summarise("segformer_b0", (64, 96), **NARROW)
    assert all(now is then for now, then in zip(watched(), before, strict=True))
    assert "__call__" not in vars(layers.DropPath)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("segformer_b0", {}),
        ("hrnet_w48_ocr", dict(stage_modules=(1, 1, 1, 1))),
        ("segnext_l", dict(depths=(1, 1, 1, 1))),
    ],
)
def test_the_table_fits_80_columns_with_the_largest_figures(name, overrides, capsys):
    given = ["--overrides", *(f"{key}={value}" for key, value in overrides.items())] if overrides else []
    status, out, err = run(capsys, name, "--size", 8192, 16384, "--num-classes", 150, *given)
    assert (status, err) == (0, "")
    counted = summarise(name, (8192, 16384), 150, **overrides)
    assert max(len(line) for line in out.splitlines()) <= 80
    for figure in (counted.parameters, counted.total_multiply_adds, *counted.multiply_adds.values()):
        assert figure == 0 or f"{figure:,}" in out


def test_the_published_table_states_that_it_does_not_count_parameters(capsys):
    depths = "depths=(1,1,1,1)"
    status, out, err = run(
        capsys, "segformer_plain_b0", "--size", 64, 96, "--convention", "modelsummary", "--overrides", depths
    )
    assert (status, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "Not a parameter count" in out and "depths = (1, 1, 1, 1)" in out


def test_json_output_has_only_the_summary(capsys):
    arguments = ["segnext_t", "--size", 64, 96, "--num-classes", 5, "--json", "--overrides", "depths=(1,1,1,1)"]
    status, out, err = run(capsys, *arguments)
    assert (status, err, out.count("\n")) == (0, "", 1)
    counted = summarise("segnext_t", (64, 96), 5, depths=(1, 1, 1, 1))
    told = json.loads(out)
    assert told["multiply_adds"] == counted.multiply_adds
    assert told["total_multiply_adds"] == counted.total_multiply_adds
    assert told["parameters"] == counted.parameters and told["layers"] == counted.layers
    assert told["size"] == [64, 96] and told["overrides"] == {"depths": [1, 1, 1, 1]}

    arguments = ["segformer_simple", *arguments[1:], "--convention", "modelsummary"]
    status, out, err = run(capsys, *arguments)
    assert (status, err, out.count("\n")) == (0, "", 1)
    published = modelsummary("segformer_simple", (64, 96), 5, depths=(1, 1, 1, 1))
    assert json.loads(out)["gflops"] == published.gflops
    assert json.loads(out)["parameters"] == published.parameters


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["segformer_bo", "--size", 64, 64], "segformer_b0"),
        (["segformer_b0", "--size", 64, 64, "--overrides", "decoder_width=3"], "decoder_dim"),
        (["segformer_b0", "--size", 64, 64, "--overrides", "dims"], "KEY=VALUE"),
        (["segformer_simple", "--size", 100, 100], "128x128"),
        (["segformer_b0", "--size", 20, 64], "29x29"),
        (["segformer_b0", "--size", 64, 64, "--convention", "modelsummary"], "segformer_plain_b5, segformer_simple"),
        (["segformer_bo", "--size", 64, 64, "--convention", "modelsummary"], "segformer_b0"),
    ],
)
def test_an_error_gives_one_sentence_and_status_2(arguments, says, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("segjax summary: ")
    assert max(map(len, err.splitlines())) <= 80 and says in " ".join(err.split())


@pytest.mark.parametrize("arguments", [["--size", 64, 64, "--num-classes", 0], ["--size", 64, 0]])
def test_numbers_out_of_range_are_refused_by_name(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "segformer_b0", *arguments)
    assert f"argument {arguments[-2 if arguments[-2] == '--num-classes' else 0]}: 0; must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["segformer_b0", "segformer_mmseg_b5", "segformer_zuppichini", "hrnet_w48_ocr", "segnext_l"]
)
def test_the_published_convention_is_refused_if_nothing_was_published(name):
    with pytest.raises(ValueError, match=f"has no {name}; it has segformer_plain_b0"):
        modelsummary(name, (64, 64))
    assert name in segjax.MODELS


def test_the_command_needs_no_torch_and_prints_only_to_stdout():
    code = """if True:
        import sys
        from segjax.commands import summary as command
        status = command.main(["segformer_b0", "--size", "64", "96", "--json"])
        assert "torch" not in sys.modules
        sys.exit(status)
    """
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stderr == "" and json.loads(done.stdout)["name"] == "segformer_b0"


def test_least_work_matches_a_hand_count():
    batch, classes, decoder = 3, 11, NARROW["decoder_dim"]
    work, (h, w), in_channels = [], SIZE, 3  # multiply-adds and values of each product

    def product(rows, inner, columns):
        work.append((rows * inner * columns, rows * inner + inner * columns + rows * columns))

    for (N, M, C, depth, ratio, r), (H, W) in zip(STAGES, zip(HEIGHTS, WIDTHS, strict=True), strict=True):
        k = 7 if in_channels == 3 else 3
        kernel = k * k * in_channels * C
        work.append((batch * H * W * kernel, batch * h * w * in_channels + kernel + batch * N * C))
        for _ in range(depth):
            product(batch * N, C, C)  # queries
            product(batch * M, C, 2 * C)  # keys, values
            product(batch * N, C, C)  # what attention gives
            product(batch * N, C, ratio * C)
            product(batch * N, ratio * C, C)
            if r > 1:
                work.append((batch * M * r * r * C * C, batch * N * C + r * r * C * C + batch * M * C))
            work.append((batch * 2 * N * M * C, batch * 2 * (N + M) * C))  # the (h, N, M) weights cost nothing
            work.append((batch * 9 * N * ratio * C, batch * 2 * N * ratio * C + 9 * ratio * C))
        # Each level with projection and slice of the fuse as one matrix, at its own resolution.
        product(C, decoder, decoder)
        product(1, decoder, decoder)
        product(batch * N, C, decoder)
        h, w, in_channels = H, W, C
    product(batch * TOKENS[0], decoder, classes)
    least = least_work("segformer_b0", SIZE, batch=batch, num_classes=classes, **NARROW)
    assert (least.multiply_adds, least.values) == tuple(map(sum, zip(*work, strict=True)))
    assert least.parameters == summarise("segformer_b0", SIZE, classes, **NARROW).parameters


@pytest.mark.parametrize("name", list(SMALL))
def test_least_work_differs_only_in_the_decoders_order_of_products(name):
    published = summarise(name, (64, 96), **SMALL[name])
    least = least_work(name, (64, 96), batch=1, **SMALL[name])
    kept = sum(
        published.multiply_adds[kind] for kind in ("dense_convolution", "grouped_convolution", "attention", "nmf")
    )
    assert kept < least.multiply_adds
    # On images this small, multiplying a decoder's matrices with each other is worth something too.
    matrices = 4 * (64 * 64 + 64) * 64
    assert least.multiply_adds <= published.total_multiply_adds + matrices

"""Every term of the loss against torch: its own loss if it has one, otherwise the paper's formula and autograd."""

import functools

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segjax import losses
from segjax.kernels import choice, cross_entropy
from segjax.torch_reference import verify

DTYPES = ("float64", "float32")
IGNORE = 255
SIZES = [((5, 7), (20, 28)), ((6, 5), (13, 17))]
SETTINGS = dict.fromkeys(losses.TERMS, 0.0) | {
    "label_smoothing": 0.0,
    "focal_gamma": 2.0,
    "tversky_alpha": 0.3,
    "tversky_beta": 0.7,
    "tversky_power": 1.0,
    "ohem_threshold": 0.7,
    "ohem_min_kept": 1 / 16,
    "ohem_images": 0,
    "mean_over": "labelled",
    "aux": "same",
}


def draw(seed, small, large, classes, dtype, batch=3):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal((batch, *small, classes))).astype(dtype)
    # The first image lacks the last class.
    highest = np.array([max(classes - 1, 2)] + [max(classes, 2)] * (batch - 1))[:, None, None]
    labels = rng.integers(0, highest, (batch, *large)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    labels[1, : large[0] // 2] = IGNORE
    return logits, labels


def assert_equal(
    name, theirs, classes, dtype, within, *, weights=None, align_corners=False, drawn=draw, sizes=SIZES, **settings
):
    """Values and gradients; `theirs` maps upsampled logits (B, K, H, W) and labels (B, H, W), int64, to a scalar."""
    criterion = losses.criterion(
        SETTINGS | {name: 1.0} | settings, num_classes=classes, ignore_label=IGNORE, class_weights=weights
    )

    @jax.jit
    def ours(logits, labels):
        total = functools.partial(criterion.total, align_corners=align_corners)
        return jax.value_and_grad(total)(logits, labels, criterion.counts(labels))

    for seed, (small, large) in enumerate(sizes):
        logits, labels = drawn(seed, small, large, classes, dtype)
        leaf = verify.to_nchw(logits).requires_grad_()
        upsampled = F.interpolate(leaf, size=large, mode="bilinear", align_corners=align_corners)
        expected = theirs(upsampled, torch.from_numpy(labels).long())
        (slope,) = torch.autograd.grad(expected, leaf)
        loss, gradient = ours(logits, labels)
        within("loss", dtype, verify.relative_error(loss, expected.detach()), f"{name} = torch")
        within("loss", dtype, verify.relative_error(gradient, verify.to_nhwc(slope)), f"{name} = torch")


def weights_of(classes, dtype):
    values = np.random.default_rng(classes).uniform(0.2, 3.0, classes)
    return tuple(values), torch.from_numpy(values.astype(dtype))


def by_image(loss_of_image):
    """Mean over images; `loss_of_image` takes logits (N, K) and labels (N,) of the labelled pixels."""

    def mean(logits, labels):
        images = zip(logits.flatten(2).transpose(1, 2), labels.flatten(1), strict=True)
        return torch.stack(
            [loss_of_image(row[truth != IGNORE], truth[truth != IGNORE]) for row, truth in images]
        ).mean()

    return mean


# -------------------------------------------------------------------------------------------------------- torch's own


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_weights_and_smoothing_is_torchs(weighted, smoothing, dtype, float64, within):
    for classes in (2, 6):
        ours, theirs = weights_of(classes, dtype) if weighted else (None, None)
        torchs = torch.nn.CrossEntropyLoss(
            weight=theirs, label_smoothing=smoothing, ignore_index=IGNORE, reduction="mean"
        )
        assert_equal("cross_entropy", torchs, classes, dtype, within, weights=ours, label_smoothing=smoothing)


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_is_torchs_with_the_weight_of_positives(weighted, smoothing, dtype, float64, within):
    ours, theirs = weights_of(1, dtype) if weighted else (None, None)
    torchs = torch.nn.BCEWithLogitsLoss(pos_weight=theirs, reduction="mean")

    def of_labelled(logits, labels):
        truth = (labels == 1).to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return torchs(logits[:, 0][labels != IGNORE], truth[labels != IGNORE])

    assert_equal("cross_entropy", of_labelled, 1, dtype, within, weights=ours, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_with_aligned_corners_interpolates_as_torch_does(weighted, dtype, float64, within, monkeypatch):
    ours, theirs = weights_of(6, dtype) if weighted else (None, None)
    torchs = torch.nn.CrossEntropyLoss(weight=theirs, ignore_index=IGNORE)
    # In tiles of one row, if it were computed in row tiles.
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)
    with choice.meant_for("cpu"):
        assert_equal("cross_entropy", torchs, 6, dtype, within, weights=ours, align_corners=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes, smoothing", [(1, 0.0), (6, 0.0), (6, 0.1)])
def test_the_mean_over_all_pixels_is_torchs_mean_of_the_unreduced_loss(classes, smoothing, dtype, float64, within):
    ours, theirs = weights_of(classes, dtype)

    def over_all(logits, labels):
        if classes > 1:
            settings = dict(weight=theirs, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
            return F.cross_entropy(logits, labels, **settings).mean()
        truth = (labels == 1).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], truth, pos_weight=theirs, reduction="none")
        return (loss * (labels != IGNORE)).mean()

    settings = dict(weights=ours, label_smoothing=smoothing, mean_over="all")
    assert_equal("cross_entropy", over_all, classes, dtype, within, **settings)


# (h, w), (factor of each), rows of a tile.
BANDS = [((5, 7), (4, 4), 1), ((6, 5), (8, 8), 3), ((8, 6), (2, 4), 2), ((6, 4), (1, 3), 2), ((4, 9), (3, 1), 2)]


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small, factors, rows", BANDS)
@pytest.mark.parametrize("classes, weighted", [(2, True), (5, False), (40, True)])
def test_cross_entropy_in_row_tiles_equals_torchs_and_the_plain_one(
    classes, weighted, small, factors, rows, dtype, float64, within, monkeypatch
):
    ours, theirs = weights_of(classes, dtype) if weighted else (None, None)
    criterion = losses.criterion(
        SETTINGS | {"cross_entropy": 1.0}, num_classes=classes, ignore_label=IGNORE, class_weights=ours
    )
    large = small[0] * factors[0], small[1] * factors[1]
    logits, labels = draw(rows, small, large, classes, dtype)
    labels[2] = IGNORE
    one_row = 3 * factors[0] * large[1] * classes * np.dtype(dtype).itemsize
    computed = []
    # Of the CPU, whatever computes it here.
    with choice.meant_for("cpu"):
        for tile in (rows * one_row, 2**40):
            monkeypatch.setattr(cross_entropy, "TILE_BYTES", tile)
            assert cross_entropy.pays(logits, large) == (tile < 2**40)
            assert cross_entropy._rows(logits, large) == (rows if tile < 2**40 else small[0])
            computed.append(
                jax.jit(lambda x, y: jax.value_and_grad(criterion.total)(x, y, criterion.counts(y)))(logits, labels)
            )
    leaf = verify.to_nchw(logits).requires_grad_()
    upsampled = F.interpolate(leaf, size=large, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(upsampled, torch.from_numpy(labels).long(), weight=theirs, ignore_index=IGNORE)
    (slope,) = torch.autograd.grad(expected, leaf)
    in_row_tiles, at_once = computed
    for one, whole, torchs in zip(in_row_tiles, at_once, (expected.detach(), verify.to_nhwc(slope)), strict=True):
        assert one.dtype == dtype
        within("loss", dtype, verify.relative_error(one, torchs), "cross_entropy in row tiles = torch")
        within("loss", dtype, verify.relative_error(one, whole), "cross_entropy in row tiles = at once")
    # An image without labels.
    assert not np.asarray(in_row_tiles[1])[2].any()


# ----------------------------------------------------------------------------------------------------- by the papers


def negative_log(logits, labels):
    """(N, K), (N,) -> (N,)."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def probabilities(logits):
    return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, 1)


def truths(logits, labels):
    """(N, K), (N,) -> (N, K) of 0 and 1."""
    if logits.shape[1] == 1:
        return labels[:, None].to(logits.dtype)
    return F.one_hot(labels, logits.shape[1]).to(logits.dtype)


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.5])
@pytest.mark.parametrize("classes", [1, 6])
def test_focal_loss_is_lins(classes, gamma, dtype, float64, within):
    weights, alpha = weights_of(classes, dtype)

    def focal(logits, labels):
        flat = logits.permute(0, 2, 3, 1)[labels != IGNORE]
        labels = labels[labels != IGNORE]
        loss = negative_log(flat, labels)
        modulated = (1 - torch.exp(-loss)) ** gamma * loss
        if classes == 1:
            return (torch.where(labels == 1, alpha[0], torch.ones_like(loss)) * modulated).mean()
        return (alpha[labels] * modulated).sum() / alpha[labels].sum()

    assert_equal("focal", focal, classes, dtype, within, weights=weights, focal_gamma=gamma)


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold, min_kept", [(0.7, 1 / 16), (0.05, 0.4), (1.0, 0.0)])
@pytest.mark.parametrize("classes", [1, 6])
def test_ohem_is_the_mean_over_the_hard_pixels_of_each_image(classes, threshold, min_kept, dtype, float64, within):
    def ohem(logits, labels):
        loss = negative_log(logits, labels)
        ascending = torch.exp(-loss).detach().sort()
        number = max(1, int(np.ceil(min_kept * len(loss))), int((ascending.values < threshold).sum()))
        return loss[ascending.indices[:number]].mean()

    assert_equal("ohem", by_image(ohem), classes, dtype, within, ohem_threshold=threshold, ohem_min_kept=min_kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 6])
def test_ohem_with_weights_is_torchs_mean_over_the_kept_pixels(classes, dtype, float64, within):
    ours, theirs = weights_of(classes, dtype)

    def ohem(logits, labels):
        kept = torch.exp(-negative_log(logits, labels)) < 0.7
        if classes == 1:
            truth = labels[kept].to(logits.dtype)
            return F.binary_cross_entropy_with_logits(logits[kept, 0], truth, pos_weight=theirs)
        return F.cross_entropy(logits[kept], labels[kept], weight=theirs)

    assert_equal("ohem", by_image(ohem), classes, dtype, within, weights=ours)


def hard_pixels_of_groups(group, threshold, least, weights):
    """HRNet's OHEM, one GPU after the other, each with `group` images: mean over the GPUs with labels.

    Of the probabilities of the true classes in ascending order, that at place `least`, or the last one, is the
    threshold unless `threshold` is higher.
    """

    def loss_of(logits, labels):
        means = []
        for scores, truth in zip(logits.split(group), labels.split(group), strict=True):
            flat, truth = scores.permute(0, 2, 3, 1)[truth != IGNORE], truth[truth != IGNORE]
            if len(truth):
                loss = negative_log(flat, truth)
                probability = probabilities(flat) if flat.shape[1] > 1 else torch.sigmoid(flat).repeat(1, 2)
                if flat.shape[1] == 1:
                    probability[:, 0] = 1 - probability[:, 0]
                probability = probability.detach()[torch.arange(len(truth)), truth]
                limit = max(float(torch.sort(probability).values[min(least, len(truth) - 1)]), threshold)
                of_pixel = weights[truth] if len(weights) > 1 else torch.where(truth == 1, weights[0], 1.0)
                means.append((of_pixel * loss)[probability < limit].mean())
        return torch.stack(means).mean()

    return loss_of


def draw_groups(seed, small, large, classes, dtype):
    """Six images: two groups of three, or three of two, the last of which has no labels."""
    logits, labels = draw(10 + seed, small, large, classes, dtype, batch=6)
    labels[4:] = IGNORE
    # A group of two with fewer labels than are kept in any case.
    labels[2:4, 2:] = IGNORE
    # Upsampling repeats the edges, and which of two equally hard pixels is the last one kept depends on the last bit.
    labels[:, [0, -1]] = labels[:, :, [0, -1]] = IGNORE
    return logits, labels


GROUPS = [
    (6, 3, 0.9, 1 / 12, "float64"),
    (6, 3, 0.9, 1 / 12, "float32"),
    (6, 2, 0.05, 0.2, "float64"),
    (6, 2, 0.0, 0.45, "float64"),
    (1, 2, 0.9, 1 / 12, "float64"),
    (1, 3, 0.05, 0.2, "float32"),
]


@pytest.mark.parametrize("classes, group, threshold, min_kept, dtype", GROUPS)
def test_ohem_of_groups_is_hrnets_ohem_of_each_gpu(classes, group, threshold, min_kept, dtype, float64, within):
    ours, theirs = weights_of(classes, dtype)

    def ohem(logits, labels):
        least = round(min_kept * labels[:group].numel())
        return hard_pixels_of_groups(group, threshold, least, theirs)(logits, labels)

    settings = dict(ohem_images=group, ohem_threshold=threshold, ohem_min_kept=min_kept)
    assert_equal("ohem", ohem, classes, dtype, within, weights=ours, drawn=draw_groups, sizes=3 * SIZES, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 6])
def test_dice_is_milletaris_with_a_smoothing_of_one(classes, dtype, float64, within):
    def dice(logits, labels):
        p, y = probabilities(logits), truths(logits, labels)
        return (1 - (2 * (p * y).sum(0) + 1) / (p.pow(2).sum(0) + y.pow(2).sum(0) + 1)).mean()

    assert_equal("dice", by_image(dice), classes, dtype, within)


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [1.0, 0.75])
@pytest.mark.parametrize("classes", [1, 6])
def test_tversky_is_salehis_with_a_smoothing_of_one(classes, power, dtype, float64, within):
    def tversky(logits, labels):
        p, y = probabilities(logits), truths(logits, labels)
        index = ((p * y).sum(0) + 1) / ((p * y).sum(0) + 0.2 * (p * (1 - y)).sum(0) + 0.6 * ((1 - p) * y).sum(0) + 1)
        return ((1 - index) ** power).mean()

    settings = dict(tversky_alpha=0.2, tversky_beta=0.6, tversky_power=power)
    assert_equal("tversky", by_image(tversky), classes, dtype, within, **settings)


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 4])
def test_rmi_is_zhaos_on_average_pooled_maps(classes, dtype, float64, within):
    def regions(x):
        vectors = F.unfold(F.avg_pool2d(x, 4, 4, padding=2), 3).view(len(x), classes, 9, -1).double()
        return vectors - vectors.mean(-1, keepdim=True)

    def rmi(logits, labels):
        valid = (labels != IGNORE)[:, None]
        values = torch.arange(classes) if classes > 1 else torch.ones(1, dtype=torch.long)
        y = regions(((labels[:, None] == values[:, None, None]) & valid).to(logits.dtype))
        p = regions(torch.where(valid, torch.sigmoid(logits), 0.0))
        ridge = 5e-4 * torch.eye(9, dtype=torch.float64)
        unexplained = y @ y.mT - y @ p.mT @ torch.inverse(p @ p.mT + ridge) @ p @ y.mT
        return (torch.logdet(unexplained + ridge) / 2 / 9).sum(1).mean()

    def drawn(seed, small, large, classes, dtype):
        logits, labels = draw(seed, small, large, classes, dtype)
        # Of one class in blocks, so that there is structure to predict.
        blocks = np.kron(labels[:, ::6, ::6], np.ones((1, 6, 6), np.uint8))[:, : large[0], : large[1]]
        return logits, np.where(labels == IGNORE, labels, blocks)

    assert_equal("rmi", rmi, classes, dtype, within, drawn=drawn, sizes=[((11, 15), (44, 60)), ((10, 13), (37, 50))])


@pytest.mark.each_value_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("factors", [(3.0, 0.0), (0.0, 1.5), (2.0, 0.5)])
def test_distillation_is_torchs_kl_div(factors, classes, dtype, float64, within):
    channel_wise, pixel_wise = factors
    divergence = losses.Divergence(channel_wise=channel_wise, pixel_wise=pixel_wise, temperature=4.0)
    for seed, size in enumerate([(5, 7), (9, 4)]):
        rng = np.random.default_rng(seed)
        student, teacher = (3 * rng.standard_normal((2, 3, *size, classes))).astype(dtype)
        leaf, taught = verify.to_nchw(student).requires_grad_(), verify.to_nchw(teacher)
        by_channel = [x.flatten(2).flatten(0, 1) / 4 for x in (leaf, taught)]  # (B K, h w)
        expected = channel_wise * kl_div(*by_channel) / classes
        # With one class, the other logit is 0.
        both = [torch.cat([torch.zeros_like(x), x], 1) if classes == 1 else x for x in (leaf, taught)]
        by_pixel = [x.movedim(1, -1).flatten(0, 2) / 4 for x in both]  # (B h w, K)
        expected = (expected + pixel_wise * kl_div(*by_pixel) / np.prod(size)) * 16 / 3
        (slope,) = torch.autograd.grad(expected, leaf)
        loss, gradient = jax.jit(jax.value_and_grad(divergence.total))(student, teacher, np.array(3))
        within("loss", dtype, verify.relative_error(loss, expected.detach()), "distillation = torch")
        within("loss", dtype, verify.relative_error(gradient, verify.to_nhwc(slope)), "distillation = torch")


def kl_div(student, teacher):
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="sum")


def lovasz_gradient(truth):
    """Berman et al., algorithm 1, of the truth in decreasing order of the errors."""
    intersection = truth.sum() - truth.cumsum(0)
    union = truth.sum() + (1 - truth).cumsum(0)
    jaccard = 1 - intersection / union
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lovasz_softmax_is_bermans_over_the_classes_present(dtype, float64, within):
    def lovasz(logits, labels):
        values = []
        for c in labels.unique():
            truth = (labels == c).to(logits.dtype)
            errors = (truth - torch.softmax(logits, 1)[:, c]).abs()
            errors, order = errors.sort(descending=True)
            values.append(errors @ lovasz_gradient(truth[order]))
        return torch.stack(values).mean()

    assert_equal("lovasz", by_image(lovasz), 6, dtype, within)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_binary_lovasz_loss_is_bermans_hinge(dtype, float64, within):
    def hinge(logits, labels):
        errors = 1 - logits[:, 0] * (2 * labels - 1)
        errors, order = errors.sort(descending=True)
        return F.relu(errors) @ lovasz_gradient(labels[order].to(logits.dtype))

    assert_equal("lovasz", by_image(hinge), 1, dtype, within)

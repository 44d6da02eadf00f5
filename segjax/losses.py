"""Losses at the resolution of the labels.

Each term is a sum over pixels, images or groups, divided by a count that depends only on the labels. The mean is taken
once, over the whole batch: counts are first added up over devices and micro-batches, and each part of the batch then
divides its sums by the counts of the whole batch. So losses and gradients of the parts add up to those of the batch.

Sources: focal loss, Lin et al., "Focal Loss for Dense Object Detection", 2017. Dice loss, Milletari et al., "V-Net",
2016. Hard pixels only (OHEM), Shrivastava et al., 2016, applied to pixels as in Wu et al., "Bridging Category-level and
Instance-level Semantic Image Segmentation", 2016, and to groups of images as in HRNet-Semantic-Segmentation. Lovász
losses, Berman et al., "The Lovász-Softmax loss", 2018. Tversky loss, Salehi et al., 2017, and its focal form, Abraham
and Khan, "A novel Focal Tversky loss function", 2019. Region mutual information (RMI), Zhao et al., "Region Mutual
Information Loss for Semantic Segmentation", 2019. Weights by median frequency, Eigen and Fergus, "Predicting Depth,
Surface Normals and Semantic Labels", 2015.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from segjax import layers
from segjax.data.class_weights import problems_of_weights
from segjax.kernels import cells, precision
from segjax.kernels import cross_entropy as kernels_cross_entropy
from segjax.kernels.cross_entropy import pays

__all__ = ["Criterion", "Divergence", "criterion"]

TERMS = ("cross_entropy", "ohem", "dice", "focal", "lovasz", "tversky", "rmi")
ALL_ZERO = f"{', '.join(TERMS)} are all 0; set at least one above 0"
NO_ERRORS = "tversky_alpha and tversky_beta are 0, so the Tversky loss is 0 for all logits; set one above 0"
# Settings that may be any finite number of at least 0.
REALS = ("focal_gamma", "tversky_alpha", "tversky_beta", "tversky_power")
SHARES = ("label_smoothing", "ohem_threshold", "ohem_min_kept")
MEANS = ("labelled", "all")
AUXILIARY = ("same", "cross_entropy")
# Terms divided by the number or weight of pixels. The others are means over images, or ohem over groups of images.
PER_PIXEL = ("cross_entropy", "focal")
# RMI: side of the cells of the average pooling, and what is added to the diagonal of covariances; the values of the
# published training script.
_RMI_POOL, _RMI_RIDGE = 4, 5e-4
# Side of the labels from which RMI has a region of 3x3 pooled pixels.
_RMI_LEAST_SIDE = 2 * _RMI_POOL


def criterion(
    settings: Mapping, *, num_classes: int, ignore_label: int, class_weights: Sequence[float] | None = None
) -> Criterion:
    """Create the loss that the section `loss` of a config describes.

    Args:
      settings: Value for each of `TERMS` and for the settings of `Criterion`; other keys are ignored.
      num_classes: Number of classes K.
      ignore_label: Label of the pixels that do not count.
      class_weights: K numbers, used unchanged, or None; see `Criterion`.

    Returns:
      The loss.

    Raises:
      ValueError: Settings that are missing or out of range, only factors of 0, or invalid class weights; one error
        lists all problems.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import losses
      >>> settings = dict.fromkeys(losses.TERMS, 0.0) | dict(cross_entropy=1.0, mean_over="labelled", aux="same")
      >>> settings |= dict(focal_gamma=2.0, label_smoothing=0.0, ohem_threshold=0.7, ohem_min_kept=0.1, ohem_images=0)
      >>> settings |= dict(tversky_alpha=0.3, tversky_beta=0.7, tversky_power=1.0)
      >>> criterion = losses.criterion(settings, num_classes=4, ignore_label=255)
      >>> logits, labels = jnp.zeros((2, 4, 6, 4)), jnp.zeros((2, 16, 24), int)
      >>> print(f"{criterion.total(logits, labels, criterion.counts(labels)):.4f}")  # log 4
      1.3863
    """
    numbers_of, words = (*TERMS, *REALS, *SHARES), {"mean_over": MEANS, "aux": AUXILIARY}
    names = (*numbers_of, "ohem_images", *words)
    problems = [f"loss.{name} is missing" for name in names if name not in settings]
    # The schema of a config repeats these ranges, to report them together with the problems of all other settings.
    problems += [
        f"loss.{name} must be {'from 0 to 1' if name in SHARES else 'finite and at least 0'}; got {settings[name]!r}"
        for name in numbers_of
        if name in settings and not _is_within(settings[name], 1 if name in SHARES else sys.float_info.max)
    ]
    if settings.get("tversky_power") == 0:
        problems.append("loss.tversky_power must be above 0; got 0")
    if settings.get("tversky") and settings.get("tversky_alpha") == settings.get("tversky_beta") == 0:
        problems.append(f"loss: {NO_ERRORS}")
    if "ohem_images" in settings and not _is_count(settings["ohem_images"]):
        problems.append(f"loss.ohem_images must be a whole number, at least 0; got {settings['ohem_images']!r}")
    problems += [
        f"loss.{name} must be {' or '.join(map(repr, options))}; got {settings[name]!r}"
        for name, options in words.items()
        if name in settings and settings[name] not in options
    ]
    if not problems and not any(settings[name] for name in TERMS):
        problems.append(f"loss: {ALL_ZERO}")
    if class_weights is not None:
        class_weights = tuple(float(weight) for weight in class_weights)
        problems += [f"loss.{problem}" for problem in problems_of_weights(class_weights, num_classes)]
    if problems:
        raise ValueError("\n".join(problems))
    return Criterion(
        num_classes=num_classes,
        ignore_label=ignore_label,
        class_weights=class_weights,
        factors=tuple((name, float(settings[name])) for name in TERMS if settings[name]),
        ohem_images=settings["ohem_images"],
        mean_over=settings["mean_over"],
        aux=settings["aux"],
        **{name: float(settings[name]) for name in (*REALS, *SHARES)},
    )


def _is_within(value: object, largest: float) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= largest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A sum of terms, each factor * sum over pixels, images or groups / count.

    With K = 1 the model is binary: sigmoid, labels 0 and 1. `losses.criterion` creates a Criterion from the section
    `loss` of a config, whose defaults are the same.

    Attributes:
      num_classes: Number of classes K.
      ignore_label: Label of the pixels that do not count.
      class_weights: K weights, or None. The terms made of cross-entropies (cross_entropy, focal, where the weights are
        its alpha, and ohem) multiply a pixel's loss by the weight of its class. As in torch, K > 1 divides by the sum
        of the weights; K = 1 has one weight, of the pixels labelled 1 (torch's pos_weight), and divides by the number
        of pixels. `mean_over` "all" and ohem in groups divide by numbers of pixels for any K. Dice, Tversky and Lovász
        are means over classes, RMI is a sum over them, and none of these uses weights.
      factors: Pairs of a term's name and its factor above 0, in the order of `counts`.
      label_smoothing: Share of the label that cross_entropy spreads over all classes, as in torch. Other terms have no
        smoothing.
      focal_gamma: Exponent of the focal loss; with 0 it is cross-entropy without smoothing.
      tversky_alpha: Weight of false positives in the Tversky index.
      tversky_beta: Weight of false negatives in the Tversky index.
      tversky_power: Exponent of 1 - Tversky index: 1, or 3/4 for the focal Tversky loss.
      ohem_threshold: Probability of the true class below which ohem keeps a pixel.
      ohem_min_kept: Minimum share of pixels that ohem keeps, the hardest ones, at least one pixel: a share of an
        image's labelled pixels, or of all pixels of a group.
      ohem_images: Number of consecutive images of the batch from which ohem selects hard pixels together; 0 selects
        them per image. See `_ohem` and `_ohem_of_groups`.
      mean_over: Divisor of cross_entropy and focal: "labelled", the number or weight of the labelled pixels; or "all",
        the number of all pixels, as in mmsegmentation with avg_non_ignore=False.
      aux: Loss of auxiliary logits: "same"; or "cross_entropy" with a factor of 1 and no other term, as in
        HRNet-Semantic-Segmentation, whose auxiliary logits have no ohem.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import losses
      >>> criterion = losses.Criterion(num_classes=4, factors=(("cross_entropy", 1.0), ("dice", 0.5)))
      >>> criterion.counts(jnp.zeros((2, 16, 24), int)).tolist()  # pixels, images
      [768.0, 2.0]
    """

    num_classes: int
    ignore_label: int = 255
    class_weights: tuple[float, ...] | None = None
    factors: tuple[tuple[str, float], ...] = (("cross_entropy", 1.0),)
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    tversky_alpha: float = 0.3
    tversky_beta: float = 0.7
    tversky_power: float = 1.0
    ohem_threshold: float = 0.7
    ohem_min_kept: float = 0.0625
    ohem_images: int = 0
    mean_over: str = "labelled"
    aux: str = "same"

    @property
    def group(self) -> int:
        """Number of consecutive images that must be together in a micro-batch of a device."""
        return max(self.ohem_images, 1) if "ohem" in dict(self.factors) else 1

    @property
    def auxiliary(self) -> Criterion:
        """The loss of auxiliary logits."""
        if self.aux == "same":
            return self
        return dataclasses.replace(self, factors=(("cross_entropy", 1.0),), aux="same")

    def counts(self, labels: jax.Array) -> jax.Array:
        """Count the divisor of each term's sum.

        The counts of the parts of a batch add up to those of the batch. The counts of the auxiliary loss are
        `self.auxiliary.counts(labels)`.

        Args:
          labels: Integers (B, H, W).

        Returns:
          (T,), one count per term, float32, or float64 if jax has 64 bits enabled.

        Raises:
          ValueError: B is not a multiple of `self.group`.
        """
        valid = labels != self.ignore_label
        if self.mean_over == "all":
            pixels = labels.size
        elif self.class_weights is None or self.num_classes == 1:
            pixels = jnp.sum(valid, dtype=jnp.int32)
        else:
            # Pixels are counted as integers: a float32 sum of millions of weights would lose the last ones.
            of_class = jnp.sum(self._truth(labels), axis=(0, 1, 2), dtype=jnp.int32)
            pixels = jnp.sum(of_class * jnp.asarray(self.class_weights, float))
        images = jnp.sum(jnp.any(valid, axis=(1, 2)), dtype=jnp.int32)
        count_of = {name: pixels if name in PER_PIXEL else images for name in TERMS}
        if self.group > 1:
            count_of["ohem"] = jnp.sum(jnp.any(self._in_groups(valid), axis=1), dtype=jnp.int32)
        return jnp.stack([jnp.asarray(count_of[name], float) for name, _ in self.factors])

    def total(
        self, logits: jax.Array, labels: jax.Array, counts: jax.Array, *, align_corners: bool = False
    ) -> jax.Array:
        """Compute the contribution of these pixels to the mean loss of the whole batch.

        The logits are cast to at least float32 and upsampled bilinearly to the size of the labels.

        Args:
          logits: (B, h, w, K).
          labels: Integers (B, H, W); pixels labelled `ignore_label` do not count.
          counts: (T,), `self.counts` of the whole batch, summed over all devices and micro-batches.
          align_corners: Alignment of the upsampling, `SegmentationModel.align_corners` of the model.

        Returns:
          Scalar in at least float32. A term whose count is 0 has loss 0 and gradient 0. RMI may be negative.

        Raises:
          ValueError: B is not a multiple of `self.group`, or the labels are too small for RMI.
        """
        logits = logits.astype(precision.at_least_float32(logits.dtype))
        height, width = labels.shape[1:3]
        counts = counts.astype(logits.dtype)
        is_cross_entropy = [name for name, _ in self.factors] == ["cross_entropy"] and not self.label_smoothing
        in_row_tiles = is_cross_entropy and not align_corners and layers.is_fast_on_cpu()
        if in_row_tiles and pays(logits, (height, width)):
            weights = self._weighted((labels != self.ignore_label).astype(logits.dtype), labels)
            return self.factors[0][1] * _mean(kernels_cross_entropy.cross_entropy(logits, labels, weights), counts[0])
        scores = _Scores(logits, labels, align_corners=align_corners)
        sums = {
            "cross_entropy": self._cross_entropy,
            "ohem": self._ohem_of_groups if self.ohem_images else self._ohem,
            "dice": self._dice,
            "focal": self._focal,
            "lovasz": self._lovasz,
            "tversky": self._tversky,
            "rmi": self._rmi,
        }
        parts = [
            factor * _mean(sums[name](scores, labels), count)
            for (name, factor), count in zip(self.factors, counts, strict=True)
        ]
        return sum(parts[1:], start=parts[0])

    # Each of the following methods maps scores and labels (B, H, W) to a scalar sum.

    def _cross_entropy(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        loss = self._weighted(scores.loss, labels)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * self._mean_over_classes(scores)
        return jnp.sum(jnp.where(labels != self.ignore_label, loss, 0))

    def _focal(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        loss = scores.loss
        # Loss and gradient are 0 where the probability is 1. A power below 1 has no finite gradient there, so it is
        # computed only elsewhere.
        is_wrong = loss > jnp.finfo(loss.dtype).tiny
        safe = jnp.where(is_wrong, loss, 1)
        # 1 - p = -expm1(log p), exact for p near 1.
        loss = jnp.where(is_wrong, (-jnp.expm1(-safe)) ** self.focal_gamma * safe, 0)
        return jnp.sum(jnp.where(labels != self.ignore_label, self._weighted(loss, labels), 0))

    def _ohem(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        """The weighted mean over the hard pixels of each image, summed over images."""
        batch = labels.shape[0]
        valid = (labels != self.ignore_label).reshape(batch, -1)
        loss = scores.loss
        hardness = lax.stop_gradient(jnp.where(valid, loss.reshape(batch, -1), -jnp.inf))
        least = jnp.ceil(self.ohem_min_kept * jnp.sum(valid, axis=1)).astype(jnp.int32)
        position = valid.shape[1] - jnp.clip(least, 1, valid.shape[1])
        # All pixels that are as hard as the last kept one are kept, because equal losses have no order.
        cutoff = jnp.take_along_axis(jnp.sort(hardness, axis=1), position[:, None], axis=1)
        kept = valid & ((hardness >= cutoff) | (jnp.exp(-hardness) < self.ohem_threshold))
        total = jnp.sum(jnp.where(kept, self._weighted(loss, labels).reshape(batch, -1), 0), axis=1)
        weight = jnp.ones_like(loss) if self.num_classes == 1 else self._weighted(jnp.ones_like(loss), labels)
        return jnp.sum(_mean(total, jnp.sum(jnp.where(kept, weight.reshape(batch, -1), 0), axis=1)))

    def _ohem_of_groups(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        """The mean over the hard pixels of each group of `ohem_images` images, summed over groups.

        This is the rule of HRNet-Semantic-Segmentation, whose groups are the images of one GPU. A pixel is hard if the
        probability of its true class is below a cutoff, the larger of `ohem_threshold` and the probability at index n
        in increasing order, where n is `ohem_min_kept` times the number of the group's pixels, labelled or not. If at
        most n pixels are labelled, the highest probability takes the place of that at index n. The losses are weighted
        but divided by the number of hard pixels. A group without hard pixels has loss 0; in the original it has NaN.
        """
        valid = self._in_groups(labels != self.ignore_label)  # (G, N)
        loss = scores.loss
        hardness = lax.stop_gradient(jnp.where(valid, self._in_groups(loss), -jnp.inf))
        least = max(round(self.ohem_min_kept * valid.shape[1]), 1)
        place = jnp.clip(jnp.sum(valid, axis=1, dtype=jnp.int32) - 1, 0, least)
        cutoff = jnp.take_along_axis(jnp.sort(hardness, axis=1, descending=True), place[:, None], axis=1)
        kept = valid & ((hardness > cutoff) | (jnp.exp(-hardness) < self.ohem_threshold))
        total = jnp.sum(jnp.where(kept, self._in_groups(self._weighted(loss, labels)), 0), axis=1)
        return jnp.sum(_mean(total, jnp.sum(kept, axis=1, dtype=jnp.int32)))

    def _in_groups(self, x: jax.Array) -> jax.Array:
        """(B, H, W) -> (B / n, n * H * W) with n = `ohem_images`."""
        if len(x) % self.ohem_images:
            raise ValueError(
                f"loss.ohem_images={self.ohem_images}: {len(x)} images do not divide into groups of this size; the "
                f"batch must be a multiple of devices * micro-batches * {self.ohem_images}"
            )
        return x.reshape(len(x) // self.ohem_images, -1)

    def _dice(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        """1 - (2 Σ p y + 1) / (Σ p² + Σ y² + 1) over an image's pixels, mean over all K classes, summed over images.

        The squares are V-Net's, the smoothing by 1 is that of mmsegmentation's first DiceLoss. That loss also sums p²
        and y² over ignored pixels, which do not count here. A class that is absent from the image counts: its loss
        falls as fewer of its pixels are predicted. An image without labelled pixels has loss 0.
        """
        probability, truth = self._probability(scores.logits), self._truth(labels)
        valid = (labels != self.ignore_label)[..., None]
        overlap = jnp.sum(jnp.where(truth, probability, 0), axis=(1, 2))
        predicted = jnp.sum(jnp.where(valid, jnp.square(probability), 0), axis=(1, 2))
        labelled = jnp.sum(truth, axis=(1, 2), dtype=jnp.int32)
        dice = (2 * overlap + 1) / (predicted + labelled + 1)  # (B, K)
        return jnp.sum(jnp.mean(1 - dice, axis=1))

    def _tversky(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        """(1 - (TP + 1) / (TP + α FP + β FN + 1)) ** power of an image, mean over classes, summed over images.

        TP, FP and FN are soft counts: sums of p, of p and of 1 - p. α = β = 1/2 is Dice without squares. Absent classes
        and images without labelled pixels count as in `_dice`.
        """
        probability, truth = self._probability(scores.logits), self._truth(labels)
        is_other = (labels != self.ignore_label)[..., None] & ~truth
        right = jnp.sum(jnp.where(truth, probability, 0), axis=(1, 2))
        missed = jnp.sum(jnp.where(truth, 1 - probability, 0), axis=(1, 2))
        added = jnp.sum(jnp.where(is_other, probability, 0), axis=(1, 2))
        wrong = self.tversky_alpha * added + self.tversky_beta * missed
        loss = wrong / (right + wrong + 1)  # (B, K)
        if self.tversky_power != 1:
            # A power below 1 has no finite gradient at 0.
            is_wrong = loss > jnp.finfo(loss.dtype).tiny
            loss = jnp.where(is_wrong, jnp.where(is_wrong, loss, 1) ** self.tversky_power, 0)
        return jnp.sum(jnp.mean(loss, axis=1))

    def _lovasz(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        """Lovász-Softmax, mean over the classes present in an image, summed over images; Lovász hinge for K = 1."""
        truth = self._truth(labels)
        if self.num_classes == 1:
            errors = jnp.where(truth, 1 - scores.logits, 1 + scores.logits)
            counted = jnp.ones((labels.shape[0], 1), bool)
        else:
            probability = self._probability(scores.logits)
            errors = jnp.where(truth, 1 - probability, probability)
            counted = jnp.any(truth, axis=(1, 2))
        # An error of -inf sorts ignored pixels last, where they do not affect the terms of other pixels.
        errors = jnp.where((labels != self.ignore_label)[..., None], errors, -jnp.inf)
        losses = _lovasz_extension(_pixels_last(errors), _pixels_last(truth))  # (B, K)
        return jnp.sum(_mean(jnp.sum(jnp.where(counted, losses, 0), axis=1), jnp.sum(counted, axis=1)))

    def _rmi(self, scores: _Scores, labels: jax.Array) -> jax.Array:
        """½ log det(Σ_Y - Σ_YP (Σ_P + εI)⁻¹ Σ_PY + εI) / 9 of an image, summed over classes and over images.

        Y and P are the labels and the sigmoids of the logits of a class, averaged over cells of 4x4 pixels. Each 3x3
        cells are a vector, and Σ is the sum over these vectors, without their mean, of outer products; ε is 5e-4. The
        determinant bounds how much of the labels' structure the predictions leave unexplained. Ignored pixels are 0 in
        Y and in P. An image without labelled pixels has loss 0. The authors add it, in equal shares, to the
        cross-entropy of sigmoids; cross_entropy is that of a softmax for K > 1.

        The authors compute in float64. Here ε is at least the rounding error of the matrix, and the matrix is in the
        equal form Σ_R + ε A Aᵀ, with A = Σ_YP (Σ_P + εI)⁻¹ and R = Y - A P, which no rounding makes indefinite.
        """
        if min(labels.shape[1:]) < _RMI_LEAST_SIDE:
            size = "x".join(map(str, labels.shape[1:]))
            raise ValueError(
                f"loss.rmi needs labels of at least {_RMI_LEAST_SIDE}x{_RMI_LEAST_SIDE} pixels; got {size}"
            )
        valid = (labels != self.ignore_label)[..., None]
        probability = jnp.where(valid, jax.nn.sigmoid(scores.logits), 0)
        truth, predicted = _regions(self._truth(labels).astype(probability.dtype)), _regions(probability)
        of_predicted = _covariance(predicted, predicted)
        ridge = _ridge(of_predicted)
        # (B, K, 9, 9), transposed: the linear prediction of `truth` from `predicted`.
        linear = jnp.linalg.solve(_with_diagonal(of_predicted, ridge), _covariance(predicted, truth))
        rest = truth - jnp.einsum("bkij,bihwk->bjhwk", linear, predicted, precision=lax.Precision.HIGHEST)
        squares = jnp.einsum("bkpi,bkpj->bkij", linear, linear, precision=lax.Precision.HIGHEST)
        unexplained = _covariance(rest, rest) + ridge[..., None, None] * squares
        root = jnp.linalg.cholesky(_with_diagonal(unexplained, _ridge(unexplained)))
        diagonal = jnp.diagonal(root, axis1=-2, axis2=-1)  # (B, K, 9)
        loss = jnp.sum(jnp.log(diagonal), axis=(1, 2)) / diagonal.shape[-1]
        return jnp.sum(jnp.where(jnp.any(valid, axis=(1, 2, 3)), loss, 0))

    def _weighted(self, loss: jax.Array, labels: jax.Array) -> jax.Array:
        """`loss` (B, H, W) times the weight of each pixel's class."""
        if self.class_weights is None:
            return loss
        table = jnp.asarray((1.0, *self.class_weights) if self.num_classes == 1 else self.class_weights, loss.dtype)
        return loss * jnp.take(table, labels.astype(jnp.int32), mode="clip")

    def _mean_over_classes(self, scores: _Scores) -> jax.Array:
        """Mean over classes of the weighted -log p, (B, H, W)."""
        weights = self.class_weights or (1.0,) * self.num_classes
        if self.num_classes == 1:
            score = scores.logits[..., 0]
            return (jax.nn.softplus(score) + weights[0] * jax.nn.softplus(-score)) / 2
        return sum(weights) / self.num_classes * scores.normaliser - scores.blended(weights) / self.num_classes

    def _probability(self, logits: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(logits) if self.num_classes == 1 else jax.nn.softmax(logits, axis=-1)

    def _truth(self, labels: jax.Array) -> jax.Array:
        """Labels (B, H, W) as booleans (B, H, W, K) per class, False in ignored pixels."""
        classes = jnp.arange(self.num_classes, dtype=jnp.int32) if self.num_classes > 1 else jnp.ones(1, jnp.int32)
        return (labels[..., None] == classes) & (labels != self.ignore_label)[..., None]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The divergence of a student's logits from a teacher's, for distillation; all pixels count, labelled or not.

    Sources: channel-wise distillation, Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021;
    pixel-wise distillation, Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Attributes:
      channel_wise: Factor of τ² / K Σ_k KL(φ(teacher_k) | φ(student_k)), where φ is the softmax over all pixels of a
        channel's logits divided by τ.
      pixel_wise: Factor of the mean over pixels of τ² KL(softmax(teacher) | softmax(student)), where the softmax over
        classes is that of the logits divided by τ; with one class, of the two probabilities of a sigmoid.
      temperature: τ.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import losses
      >>> divergence = losses.Divergence(channel_wise=3.0, pixel_wise=0.0, temperature=4.0)
      >>> student = jnp.zeros((1, 2, 2, 1))
      >>> teacher = jnp.array([[[[4.0], [0.0]], [[0.0], [0.0]]]])
      >>> print(f"{divergence.total(student, teacher, jnp.array(1)):.4f}")
      5.6637
    """

    channel_wise: float
    pixel_wise: float
    temperature: float

    def total(self, student: jax.Array, teacher: jax.Array, count: jax.Array) -> jax.Array:
        """Compute the contribution of these images to the mean over the images of the whole batch.

        Args:
          student: Logits (B, h, w, K).
          teacher: Logits of the same shape.
          count: Number of images of the whole batch.

        Returns:
          Scalar in at least float32.
        """
        dtype = precision.at_least_float32(student.dtype)
        student, teacher = (logits.astype(dtype) / self.temperature for logits in (student, teacher))
        total = jnp.zeros((), dtype)
        if self.channel_wise:
            by_channel = _divergence(*(_pixels_last(logits) for logits in (student, teacher)))  # (B, K)
            total += self.channel_wise * jnp.sum(jnp.mean(by_channel, axis=1))
        if self.pixel_wise:
            if student.shape[-1] == 1:
                student, teacher = (jnp.concatenate([jnp.zeros_like(x), x], axis=-1) for x in (student, teacher))
            by_pixel = _divergence(student, teacher)  # (B, h, w)
            total += self.pixel_wise * jnp.sum(jnp.mean(by_pixel, axis=(1, 2)))
        return self.temperature**2 * total / count.astype(dtype)


def _divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(softmax(teacher) | softmax(student)) over the last axis."""
    log_taught = jax.nn.log_softmax(teacher, axis=-1)
    return jnp.sum(jnp.exp(log_taught) * (log_taught - jax.nn.log_softmax(student, axis=-1)), axis=-1)


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count, or 0 with gradient 0 where the count is 0."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)


def _regions(x: jax.Array) -> jax.Array:
    """The 3x3 neighbours of pixels that are averaged over cells of 4x4, without their mean.

    Args:
      x: (B, H, W, K); it is padded with 2 zeros on each side, which count in averages, as in torch's avg_pool2d.

    Returns:
      (B, 9, h, w, K).
    """
    batch, *size, classes = x.shape
    before = _RMI_POOL // 2
    # A negative padding removes a row that fills no cell.
    edges = [(before, _RMI_POOL - before - side % _RMI_POOL, 0) for side in size]
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    height, width = (side // _RMI_POOL for side in padded.shape[1:3])
    pooled = jnp.mean(padded.reshape(batch, height, _RMI_POOL, width, _RMI_POOL, classes), axis=(2, 4))
    height, width = height - 2, width - 2
    neighbours = [pooled[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    regions = jnp.stack(neighbours, axis=1)
    return regions - jnp.mean(regions, axis=(2, 3), keepdims=True)


def _covariance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum of outer products over space: twice (B, 9, h, w, K) -> (B, K, 9, 9)."""
    return jnp.einsum("bihwk,bjhwk->bkij", x, y, precision=lax.Precision.HIGHEST)


def _ridge(matrix: jax.Array) -> jax.Array:
    """ε of RMI for matrices (..., n, n): `_RMI_RIDGE`, or their rounding error if that is larger."""
    rounding = 10 * float(jnp.finfo(matrix.dtype).eps) * jnp.trace(matrix, axis1=-2, axis2=-1)
    return lax.stop_gradient(jnp.maximum(_RMI_RIDGE, rounding))


def _with_diagonal(matrix: jax.Array, ridge: jax.Array) -> jax.Array:
    """matrix (..., n, n) + ridge (...) * I."""
    return matrix + ridge[..., None, None] * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


class _Scores:
    """Functions of the upsampled logits that the terms of a loss read, at the size of the labels.

    On a GPU, cross-entropies are computed without upsampled logits in memory.

    Attributes:
      loss: -log p(label) per pixel, (B, H, W); finite where the label is not a class.
    """

    def __init__(self, small: jax.Array, labels: jax.Array, *, align_corners: bool):
        """Computes `loss` from logits (B, h, w, K), float32 or wider, and labels (B, H, W)."""
        self._small, self._size, self._align_corners = small, labels.shape[1:], align_corners
        if layers.is_fast_on_gpu() and small.shape[-1] > 1:
            if not align_corners and cells.applies(small.shape, self._size):
                self.normaliser, chosen = cells.normaliser_and_chosen(small, labels)
            else:
                by_rows = cells.normaliser_and_chosen_by_rows
                self.normaliser, chosen = by_rows(small, labels, align_corners=align_corners)
            self.loss = self.normaliser - chosen
        elif small.shape[-1] == 1:
            # -log sigmoid(±score) without overflow.
            score = self.logits[..., 0]
            self.loss = jnp.logaddexp(0, jnp.where(labels == 1, -score, score))
        else:
            # A comparison instead of a gather: its gradient is a subtraction, where a gather's is a scatter.
            is_label = labels.astype(jnp.int32)[..., None] == jnp.arange(small.shape[-1], dtype=jnp.int32)
            self.normaliser = jax.nn.logsumexp(self.logits, axis=-1)
            self.loss = self.normaliser - jnp.sum(jnp.where(is_label, self.logits, 0), axis=-1)

    @functools.cached_property
    def logits(self) -> jax.Array:
        """The logits, upsampled bilinearly, (B, H, W, K)."""
        return self._upsampled(self._small)

    def blended(self, weights: Sequence[float]) -> jax.Array:
        """The upsampled logits, weighted by class and summed over classes, (B, H, W)."""
        blend = jnp.sum(self._small * jnp.asarray(weights, self._small.dtype), axis=-1, keepdims=True)
        return self._upsampled(blend)[..., 0]

    def _upsampled(self, x: jax.Array) -> jax.Array:
        return layers.resize(x, self._size, align_corners=self._align_corners)


def _pixels_last(x: jax.Array) -> jax.Array:
    """(B, H, W, K) -> (B, K, H * W)."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1)


def _lovasz_extension(errors: jax.Array, truth: jax.Array) -> jax.Array:
    """Lovász extension of the Jaccard loss |wrong| / |truth ∪ wrong| at `errors`; negative errors count as 0.

    Args:
      errors: Floats (..., N).
      truth: Booleans (..., N), the pixels of the class.

    Returns:
      (...), the sum of each error times the increase of the Jaccard loss by its pixel, with pixels added in decreasing
      order of errors.
    """
    negated, truth = lax.sort((-errors, truth), dimension=-1, num_keys=1)
    size = jnp.sum(truth, axis=-1, keepdims=True, dtype=jnp.int32)
    right = size - jnp.cumsum(truth, axis=-1, dtype=jnp.int32)
    union = (size + jnp.cumsum(~truth, axis=-1, dtype=jnp.int32)).astype(errors.dtype)
    # The increases are in closed form: a difference of two float32 losses near 1 would keep one or two digits. A pixel
    # of the class does not change the union. Any other pixel adds one to it; the first pixel of an empty union raises
    # the loss from 0 to 1.
    step = jnp.where(truth, 1 / union, right / union / jnp.maximum(union - 1, 1))
    step = jnp.where(union == 1, 1, step)
    return jnp.sum(jax.nn.relu(-negated) * step, axis=-1)

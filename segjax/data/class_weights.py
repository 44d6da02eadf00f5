"""Class weights of the loss: from a published recipe (Cityscapes; numbers in specs.py), given, or computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from segjax.data import specs


def class_weights(
    choice: str | Sequence[float] | None, spec: specs.DatasetSpec, pixel_counts: np.ndarray | None = None
) -> tuple[float, ...] | None:
    """The K weights that the setting `loss.class_weights` selects, not normalised; None for no weights.

    Args:
      choice: None or "", a key of `BALANCED`, "cityscapes" (see `specs.DATASETS`), or the K numbers themselves.
      spec: Spec of the dataset.
      pixel_counts: Number of pixels of each label value, as for `median_frequency`; required for a key of `BALANCED`. A
        binary dataset has two label values, and one weight: that of class 1 divided by that of the background.

    Raises:
      ValueError: The word is unknown; the numbers are negative, not finite, all zero or not K; Cityscapes' weights are
        selected for other classes; or counts are missing or all zero.
    """
    match choice:
        case None | "":
            return None
        case str() if choice in BALANCED:
            return _balancing(choice, spec, pixel_counts)
        case str() if choice in specs.CLASS_WEIGHTS:
            names, weights = specs.CLASS_WEIGHTS[choice]
            if spec.class_names != names:
                raise ValueError(
                    f"loss.class_weights={choice} are weights of the {len(names)} classes of {choice} ({names[0]}, "
                    f"{names[1]}, ...), and {spec.name} has others ({', '.join(spec.class_names[:2])}, ...); use "
                    "median_frequency, or give one number for each class"
                )
            return weights
    try:
        weights = tuple(float(weight) for weight in choice) if not isinstance(choice, str) else ()
    except (TypeError, ValueError):
        weights = ()
    if not weights:
        raise ValueError(
            f"loss.class_weights is '', {', '.join(map(repr, (*BALANCED, *specs.CLASS_WEIGHTS)))} or "
            f"{spec.num_classes} numbers in parentheses, one for each class of {spec.name}; got {choice!r}"
        )
    if problems := problems_of_weights(weights, spec.num_classes):
        raise ValueError("\n".join(f"{spec.name}: loss.{problem}" for problem in problems))
    return weights


def median_frequency(pixel_counts: np.ndarray) -> np.ndarray:
    """Median of the class frequencies / frequency of the class, float64 (K,) (Eigen and Fergus, ICCV 2015).

    The frequency of a class is its share of the pixels in the images that contain it. A class without pixels has weight
    0 and is excluded from the median: its true weight is infinite, and no pixel is multiplied by it.

    Args:
      pixel_counts: Number of labelled pixels per image and class, (N, K); or their sums (K,), which treat the dataset
        as one image.

    Raises:
      ValueError: There is no pixel at all.
    """
    counts = np.atleast_2d(np.asarray(pixel_counts, np.float64))
    of_class = counts.sum(axis=0)
    present = of_class > 0
    if not present.any():
        raise ValueError("no class has a pixel, so there is no median frequency")
    in_its_images = (counts > 0).T @ counts.sum(axis=1)
    frequency = of_class[present] / in_its_images[present]
    weights = np.zeros(counts.shape[1])
    weights[present] = np.median(frequency) / frequency
    return weights


def inverse_sqrt(pixel_counts: np.ndarray) -> np.ndarray:
    """1 / sqrt(share of the class among all pixels), float64 (K,), as in SalsaNext (Cortinhal et al., 2020).

    Milder than `median_frequency`: a class with a hundredth of the pixels has ten times the weight. A class without
    pixels has weight 0, since no pixel is multiplied by it.

    Args:
      pixel_counts: As for `median_frequency`.

    Raises:
      ValueError: There is no pixel at all.
    """
    of_class = np.atleast_2d(np.asarray(pixel_counts, np.float64)).sum(axis=0)
    if not of_class.any():
        raise ValueError("no class has a pixel, so no class has a share")
    present = of_class > 0
    weights = np.zeros(len(of_class))
    weights[present] = np.sqrt(of_class.sum() / of_class[present])
    return weights


def class_balanced(pixel_counts: np.ndarray, *, beta: float | None = None) -> np.ndarray:
    """(1 - β) / (1 - β ** n) with n pixels of the class, scaled to mean 1, float64 (K,) (Cui et al., CVPR 2019).

    A class without pixels has weight 0 and is excluded from the mean.

    Args:
      pixel_counts: As for `median_frequency`.
      beta: β in [0, 1). By default 1 - 1 / (mean number of pixels per class): much rarer classes then have weights
        inversely proportional to their pixels, and more frequent ones hardly less weight than an average class. The
        published 0.9999 counts images; with millions of pixels per class, it would give all classes the same weight.

    Raises:
      ValueError: There is no pixel at all.

    Example:
      >>> import numpy as np
      >>> from segjax.data import class_weights
      >>> class_weights.class_balanced(np.array([1000, 500, 0])).round(3).tolist()
      [0.796, 1.204, 0.0]
    """
    of_class = np.atleast_2d(np.asarray(pixel_counts, np.float64)).sum(axis=0)
    present = of_class > 0
    if not present.any():
        raise ValueError("no class has a pixel, so there is nothing to balance")
    rest = 1 / max(of_class[present].mean(), 1.0) if beta is None else 1 - beta
    weights = np.zeros(len(of_class))
    # 1 - β ** n = -expm1(n log β), exact for β near 1; β = 0 gives 1.
    with np.errstate(divide="ignore"):
        weights[present] = rest / -np.expm1(of_class[present] * np.log1p(-rest))
    weights[present] /= weights[present].mean()
    return weights


# Class weights computed from the pixels of the training split.
BALANCED = {
    "median_frequency": median_frequency,
    "inverse_sqrt": inverse_sqrt,
    "class_balanced": class_balanced,
}


def _balancing(scheme: str, spec: specs.DatasetSpec, pixel_counts: np.ndarray | None) -> tuple[float, ...]:
    values = len(spec.label_names)
    if pixel_counts is None or np.shape(pixel_counts)[-1:] != (values,):
        raise ValueError(
            f"loss.class_weights={scheme} needs the pixels of each of the {values} label values of {spec.name}; got "
            f"{'none' if pixel_counts is None else f'an array of shape {np.shape(pixel_counts)}'}"
        )
    weights = BALANCED[scheme](pixel_counts)
    if spec.num_classes == 1:
        background, positive = weights
        # If one of the two is absent, there is nothing to balance.
        weights = [positive / background if background and positive else 1.0]
    return tuple(float(weight) for weight in weights)


def problems_of_weights(weights: tuple[float, ...], num_classes: int) -> list[str]:
    """Reasons why weights cannot be used, each beginning with the name of the setting."""
    wrong = {
        f"class_weights has {len(weights)} numbers for {num_classes} classes": len(weights) != num_classes,
        f"class_weights must be finite and not negative: {weights}": not all(map(_is_weight, weights)),
        "class_weights are all 0": not any(weights),
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def _is_weight(value: float) -> bool:
    return 0 <= value < math.inf

"""Computes a lower bound of the hours that the recipes of docs/reproduce.md take on one H200.

    python -m benchmarks.hours [RECIPE ...]

A training step has three times the products and three times the memory traffic of a forward pass.
`segjax.models.summary.least_work` counts both for the recipe's model, crop, batch and steps, in bfloat16. The bound is
the larger of the time for products at 790 TFLOP/s and that for traffic at 4.3 TB/s, rates that an H200 reaches. It does
not include the optimizer, the loss, augmentation and evaluation. Nothing is measured.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from segjax import recipes
from segjax.data.specs import DATASETS
from segjax.models.summary import least_work
from segjax.train.config import model_overrides

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"
FLOPS, BYTES = 790e12, 4.3e12  # per second


def hours(recipe: str) -> float:
    """Returns the bound for a recipe such as `hrnet:w48,cityscapes`."""
    config = recipes.load(recipe)
    work = least_work(
        config.model.name,
        tuple(config.augment.crop),
        batch=config.train.batch,
        num_classes=DATASETS[config.data.name].spec.num_classes,
        **model_overrides(config.model),
    )
    seconds = max(3 * 2 * work.multiply_adds / FLOPS, 3 * 2 * work.values / BYTES)
    return config.train.steps * seconds / 3600


def recipes_of_the_page() -> dict[str, float]:
    """Returns the hours in the table of docs/reproduce.md by recipe."""
    rows = re.findall(r"^\| `(\S+)` \|.*\| ([\d.]+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {recipe: float(bound) for recipe, bound in rows}


if __name__ == "__main__":
    for each in sys.argv[1:] or recipes_of_the_page():
        print(f"{hours(each):.1f}  {each}")

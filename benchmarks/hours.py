"""The least hours that the recipes of docs/reproduce.md take on one H200: a computed bound, nothing is measured.

    python -m benchmarks.hours [RECIPE ...]

A training step has three times the products of a forward pass, and reads and writes three times its numbers. Both are
counted by `segjax.models.summary.least_work` for the recipe's model, crop, batch and steps, in bfloat16. The bound is
the larger of products at 790 TFLOP/s and of traffic at 4.3 TB/s, which an H200 reaches. The optimizer, the loss,
augmentation and evaluation come on top.
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
FLOPS, BYTES = 790e12, 4.3e12  # a second


def hours(recipe: str) -> float:
    """The bound for a recipe, `hrnet:w48,cityscapes`."""
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
    """The hours in the table of docs/reproduce.md by recipe."""
    rows = re.findall(r"^\| `(\S+)` \|.*\| ([\d.]+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {recipe: float(bound) for recipe, bound in rows}


if __name__ == "__main__":
    for each in sys.argv[1:] or recipes_of_the_page():
        print(f"{hours(each):.1f}  {each}")

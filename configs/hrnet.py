"""`--config configs/hrnet.py` reads the recipe segjax/recipes/hrnet.py."""

from segjax.recipes.hrnet import VARIANTS, get_config

__all__ = ["VARIANTS", "get_config"]

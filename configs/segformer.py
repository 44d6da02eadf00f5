"""`--config configs/segformer.py` reads the recipe segjax/recipes/segformer.py."""

from segjax.recipes.segformer import VARIANTS, get_config

__all__ = ["VARIANTS", "get_config"]

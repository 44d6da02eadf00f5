"""`--config configs/segformer_simple.py` reads the recipe segjax/recipes/segformer_simple.py."""

from segjax.recipes.segformer_simple import VARIANTS, get_config

__all__ = ["VARIANTS", "get_config"]

"""`--config configs/segnext.py` reads the recipe segjax/recipes/segnext.py."""

from segjax.recipes.segnext import VARIANTS, get_config

__all__ = ["VARIANTS", "get_config"]

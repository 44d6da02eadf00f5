"""`--config configs/segformer_zuppichini.py` reads the recipe segjax/recipes/segformer_zuppichini.py."""

from segjax.recipes.segformer_zuppichini import VARIANTS, get_config

__all__ = ["VARIANTS", "get_config"]

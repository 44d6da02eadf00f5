"""What recipes share; see segjax/recipes/common.py."""

from segjax.recipes.common import from_scratch, get_config, minutes_on_a_cpu, parse

__all__ = ["from_scratch", "get_config", "minutes_on_a_cpu", "parse"]

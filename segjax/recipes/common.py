"""Parts of recipes: the words after the colon, the defaults of a dataset, and two ways to train from random weights.

The defaults of all settings are in segjax/train/schema.py.
"""

from ml_collections import ConfigDict

from segjax.data.specs import DATASETS
from segjax.train.schema import default_config


def parse(argument: str, variants: tuple[str, ...]) -> tuple[str, str]:
    """ "b2,camvid" -> ("b2", "camvid"); the order does not matter and either may be omitted.

    Raises:
      ValueError: a word that is neither a variant nor a dataset; lists both.
    """
    variant, dataset = variants[0], next(iter(DATASETS))
    for word in filter(None, (word.strip() for word in argument.split(","))):
        if word in variants:
            variant = word
        elif word in DATASETS:
            dataset = word
        else:
            raise ValueError(
                f"{word!r} is neither a variant ({', '.join(variants)}) nor a dataset ({', '.join(DATASETS)})"
            )
    return variant, dataset


def get_config(dataset: str) -> ConfigDict:
    """The defaults of all settings, with those of the dataset from its table (segjax/data/specs.py)."""
    config = default_config(dataset)
    config.data.eval_split = DATASETS[dataset].evaluated_split
    config.augment.crop = DATASETS[dataset].crop
    if scenes := DATASETS[dataset].scenes:
        config.data.update(scenes._asdict())
    if dataset == "camvid":
        config.train.steps = 20_000
    return config


def crop_in_multiples(config: ConfigDict, multiple: int) -> None:
    """Reduces the training crop to multiples of what the model needs, in both directions."""
    height, width = config.augment.crop
    config.augment.crop = (height // multiple * multiple, width // multiple * multiple)


def from_scratch(config: ConfigDict) -> None:
    """AdamW for random weights, which need one high rate for all parameters."""
    config.optim.lr = 2e-3
    config.optim.lr_multipliers = ()
    config.optim.warmup_steps = 200


def minutes_on_a_cpu(config: ConfigDict) -> None:
    """A short training on streets, which needs an even higher rate and little augmentation."""
    config.train.steps = 800
    config.train.batch = 4
    config.train.log_every = 10
    config.checkpoint.every = 200
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.augment.scale = (0.75, 1.5)
    config.augment.photometric = False

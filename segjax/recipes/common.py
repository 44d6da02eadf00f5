"""What recipes share: the words after the colon, the defaults of a dataset, and two ways to train from random weights.

The defaults of all settings are in segjax/train/schema.py.
"""

from ml_collections import ConfigDict

from segjax.train.schema import DATASETS, default_config


def parse(argument: str, variants: tuple[str, ...]) -> tuple[str, str]:
    """ "b2,camvid" -> ("b2", "camvid"); the order does not matter and either may be omitted.

    Raises:
      ValueError: a word that is neither a variant nor a dataset; lists both.
    """
    variant, dataset = variants[0], DATASETS[0]
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
    """The defaults of all settings, with the split that this dataset is evaluated on and a crop that suits it."""
    config = default_config(dataset)
    fit_to_dataset(config)
    return config


def fit_to_dataset(config: ConfigDict) -> None:
    """Sets the evaluation split, the crop and the number of steps for the dataset of a config."""
    match config.data.name:
        case "streets":
            config.data.eval_split = "val"
            config.augment.crop = (128, 256)
        case "camvid":
            # Images are 360x480; a larger crop would be mostly padding.
            config.augment.crop = (360, 480)
            config.train.steps = 20_000
        case "cityscapes":
            # The labels of test are not published. Crop: SegFormer, section 4.1.
            config.data.eval_split = "val"
            config.augment.crop = (1024, 1024)
        case "ade20k" | "voc":
            # The labels of VOC's test are not published, and ADE20K's benchmark has none.
            config.data.eval_split = "val"


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

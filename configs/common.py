"""Every default of a run, once, each with its unit and where it comes from."""

from ml_collections import ConfigDict, config_dict

from segjax.data.specs import DATASETS


def parse(argument: str, variants: tuple[str, ...]) -> tuple[str, str]:
    """ "b2,camvid" -> ("b2", "camvid"); the order does not matter and either may be left out.

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
    config = ConfigDict()
    # What a run is called: it lies in runs/<label>-<dataset> unless --workdir says otherwise.
    config.label = ""
    # Of initial weights, order of images, augmentation and dropout.
    config.seed = 0
    # "jit" over a data mesh of all devices, or "pmap".
    config.parallel = "jit"

    config.model = ConfigDict()
    # A name of segjax.MODELS; each configs/<family>.py sets it.
    config.model.name = ""
    # Type of the computation: "float32", or "bfloat16" (parameters stay float32).
    config.model.dtype = "float32"

    config.data = ConfigDict()
    config.data.name = dataset
    # Folder that a dataset is prepared from at first use: the official archives or what they hold, and for camvid and
    # folder images/, labels/ and classes.json. See segjax/data/builders.py.
    config.data.source = config_dict.placeholder(str)
    # Where prepared datasets are kept; unset is TFDS's own ~/tensorflow_datasets.
    config.data.dir = config_dict.placeholder(str)
    # Splits that take up to so many gigabytes, decoded and padded, are kept in memory, that for training on every
    # device; larger ones are streamed, with so many gigabytes of decoded images kept by each process.
    config.data.resident_gb = 2.0
    config.data.cache_gb = 8.0
    # Splits to train on, and to evaluate and draw predictions from.
    config.data.train_split = "train"
    config.data.eval_split = DATASETS[dataset].evaluated_split

    config.augment = ConfigDict()
    # Height and width of the training crop, pixels.
    config.augment.crop = DATASETS[dataset].crop
    # Smallest and largest random scale of the image before the crop.
    config.augment.scale = (0.5, 2.0)
    # Probability of a horizontal flip.
    config.augment.flip = 0.5
    # Random brightness, contrast, saturation and hue.
    config.augment.photometric = True

    config.train = ConfigDict()
    # Updates of the weights, and images per update over all devices.
    config.train.steps = 40_000
    config.train.batch = 8
    # Micro-batches that a batch is computed in, one after the other: less memory, the same gradient.
    config.train.accumulate = 1
    # Decay of a moving average of weights and statistics, evaluated and saved instead of them; 0 keeps none.
    config.train.ema = 0.0
    # Steps in a row that may be left out because their loss is not finite; one more ends the run.
    config.train.may_skip = 0
    # Compile seven equal blocks or more once, as a loop: deep models compile sooner. Compute blocks again in the
    # backward pass instead of keeping what is in them: less memory, more time; on a CPU only together with the former,
    # which then takes every row of equal blocks. Neither changes the result.
    config.train.scan_blocks = False
    config.train.remat = False
    # Steps between two lines of metrics.jsonl.
    config.train.log_every = 50

    config.loss = ConfigDict()
    # Factors of the terms whose sum is the loss; 0 leaves a term out. See segjax.losses for each.
    config.loss.cross_entropy = 1.0
    # Cross-entropy of the hard pixels of each image alone.
    config.loss.ohem = 0.0
    config.loss.dice = 0.0
    config.loss.focal = 0.0
    config.loss.lovasz = 0.0
    # Weights by class of the pixels of cross_entropy, ohem and focal: none, "median_frequency" of the training split,
    # "cityscapes" as published with HRNet, or one number for each class, as in "(1.0, 2.5)".
    config.loss.class_weights = config_dict.placeholder(object)
    # Share of the label that cross_entropy spreads over all classes, as torch does.
    config.loss.label_smoothing = 0.0
    # Exponent. The focal loss's paper: 2 was best.
    config.loss.focal_gamma = 2.0
    # Hard is a pixel whose true class has a lower probability than this; mmsegmentation and BiSeNet: 0.7.
    config.loss.ohem_threshold = 0.7
    # Share of the labelled pixels of an image that are kept in any case, the hardest first. Published: 1/16 of the
    # pixels (BiSeNet); 100,000 of two crops of 512x1024, 1/10 (mmsegmentation). A share suits crops of all sizes.
    config.loss.ohem_min_kept = 1 / 16
    # Weight of the loss of auxiliary logits beside that of the main ones; OCR alone has some.
    config.loss.aux_weight = 0.4

    config.optim = ConfigDict()
    # "adamw" or "sgd".
    config.optim.name = "adamw"
    # Learning rate at the height of the schedule. SegFormer's Cityscapes recipe: 6e-5 on pretrained weights.
    config.optim.lr = 6e-5
    config.optim.end_lr = 0.0
    # "poly" or "cosine".
    config.optim.schedule = "poly"
    # poly: lr * (1 - step / steps) ** power. Either one times a linear warm-up from warmup_ratio to 1 over
    # warmup_steps.
    config.optim.power = 1.0
    config.optim.warmup_steps = 1500
    config.optim.warmup_ratio = 1e-6
    config.optim.weight_decay = 0.01
    # AdamW's moments; eps as in torch.
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.eps = 1e-8
    # SGD's momentum.
    config.optim.momentum = 0.9
    # Gradients are scaled down to this norm where theirs is larger; 0 leaves them.
    config.optim.clip_norm = 0.0
    # Regular expressions over dotted parameter names; one that is found in none is an error. What does not decay (""
    # for nothing), (pattern, factor) pairs for the learning rate, and what is not trained at all. Published: whatever
    # has `norm` in its name does not decay (other biases do), and the head learns ten times as fast as the backbone.
    config.optim.no_decay = "norm"
    config.optim.lr_multipliers = (("head", 10.0),)
    config.optim.frozen = ()

    config.init = ConfigDict()
    # Checkpoint to start from: whatever segjax.convert reads, or the folder of another run. An encoder alone will do.
    # The flag is --config.init.from; in Python the word is taken.
    config.init.from_ = ""
    # Patterns (* and ?) of parameters that stay random all the same, such as "decode_head.linear_pred.*".
    config.init.keep = ()

    config.eval = ConfigDict()
    # Images per evaluation batch over all devices.
    config.eval.batch = 8
    # Steps between two evaluations; 0 evaluates at the end alone.
    config.eval.every = 0
    # Evaluations in a row without a better mIoU after which training ends; 0 goes on to the last step.
    config.eval.patience = 0
    # How many images get a picture in predictions/.
    config.eval.pictures = 8

    config.checkpoint = ConfigDict()
    # Steps between two checkpoints, and how many are kept.
    config.checkpoint.every = 1000
    config.checkpoint.keep = 2

    config.debug = ConfigDict()
    # When a loss is not finite, compute that step again layer by layer to say where it began.
    config.debug.nans = False

    if DATASETS[dataset].kind == "generated":
        # Numbers of images drawn for training and for evaluation, and their height and width, pixels.
        config.data.update(DATASETS[dataset].scenes._asdict())
    if dataset == "camvid":
        config.train.steps = 20_000
    return config


def from_scratch(config: ConfigDict) -> None:
    """AdamW for random weights, which want one high rate throughout."""
    config.optim.lr = 2e-3
    config.optim.lr_multipliers = ()
    config.optim.warmup_steps = 200


def minutes_on_a_cpu(config: ConfigDict) -> None:
    """A short training on the streets, which wants a higher rate still and little augmentation."""
    config.train.steps = 800
    config.train.batch = 4
    config.train.log_every = 10
    config.checkpoint.every = 200
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.augment.scale = (0.75, 1.5)
    config.augment.photometric = False

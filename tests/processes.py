"""The program that `test_processes.py` runs in two processes of two devices each, and in one process of one device.

python processes.py PORT NUMBER
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import losses
from segjax.data import specs
from segjax.data.augment import augment
from segjax.data.pipeline import StreamBatches, TrainBatches, order
from segjax.data.records import load
from segjax.inference import evaluation
from segjax.models.functional import FunctionalModel
from segjax.recipes import common
from segjax.runtime import environment
from segjax.runtime.parallel import JitParallel, PmapParallel, ShardMapParallel
from segjax.train import optim
from segjax.train.state import TrainState
from segjax.train.step import TrainStep

SPEC = specs.DatasetSpec("noise", tuple("abcde"), ((0, 0, 0),) * 5, 255)
SETTINGS = common.get_config("folder").augment
SETTINGS.crop = (16, 20)
KINDS = {"jit": JitParallel, "pmap": PmapParallel, "shard_map": ShardMapParallel}
BATCH, STEPS, SEED = 8, 3, 5


class Noise:
    """Records that tell which were read."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.sizes = rng.integers(20, 70, (30, 2)).astype(np.int32)
        self.names = tuple(f"image{i}" for i in range(30))
        self.pairs = [
            (rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 5, size, dtype=np.uint8))
            for size in self.sizes
        ]
        self.read = set()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, number):
        self.read.add(int(number))
        return self.pairs[number]


class Colours(nnx.Module):
    """Logits that are linear in a pixel's colour."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.array(np.random.default_rng(1).standard_normal((3, 5)), jnp.float32))
        self.spec, self.size_multiple, self.align_corners = None, 1, False
        self.in_channels = 3

    def __call__(self, images):
        return images @ self.kernel[...], {}


def trained(parallel, batches):
    """Weights and losses after a few steps of SGD on these batches, as lists."""
    config = common.get_config("folder")
    config.optim.update(name="sgd", lr=0.5, warmup_steps=0, no_decay="", lr_multipliers=())
    functional = FunctionalModel(Colours())
    params, _ = functional.arrays()
    optimizer = optim.optimizer(config.optim, params, steps=10)
    state = parallel.replicate(TrainState.start(params, {}, optimizer.init(params)))
    step = parallel.compile_train(
        TrainStep(
            model=functional,
            optimizer=optimizer,
            augment=partial(augment, settings=SETTINGS, ignore_label=SPEC.ignore_label),
            criterion=losses.criterion(config.loss, num_classes=SPEC.num_classes, ignore_label=SPEC.ignore_label),
        )
    )
    values = []
    for i in range(STEPS):
        state, scalars = step(state, batches.at(i), jax.random.key(SEED))
        values.append(float(parallel.fetch(scalars)["loss"]))
    return parallel.fetch(state).params["kernel"].tolist(), values


def results(parallel):
    records = Noise()
    split = load(records, ignore_label=255)
    records.read.clear()
    options = dict(batch_size=BATCH, seed=SEED, parallel=parallel)
    streaming = dict(settings=SETTINGS, ignore_label=SPEC.ignore_label, key=jax.random.key(SEED), threads=1)
    with StreamBatches(records, **options, **streaming) as streamed:
        from_stream = trained(parallel, streamed)
    read = sorted(records.read)
    confusion, kept = evaluation.evaluate(
        lambda images: [image[..., 0] % 5 for image in images], records, SPEC, batch_size=2, keep=range(30)
    )
    rows = parallel.rows(BATCH)
    # More steps than could have been read ahead.
    own = {int(number) for i in range(STEPS + 10) for number in _order(i)[rows]}
    return {
        "streamed": from_stream,
        "resident": trained(parallel, TrainBatches(split, **options)),
        "rows": rows.tolist(),
        "read others": sorted(set(read) - own),
        "read": len(read),
        "confusion": confusion.tolist(),
        "evaluated": sorted(kept),
        "large sum": evaluation.sum_over_processes(np.array([2**40 + jax.process_index()])).tolist(),
    }


def _order(step):
    return order(step, num_images=30, batch_size=BATCH, seed=SEED)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)
    environment.prepare()
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    print(json.dumps({kind: results(of_kind()) for kind, of_kind in KINDS.items()}))

"""Datasets: from files on disk to batches on the devices.

    training, test = segjax.data.open_splits("camvid", ["train", "test"], source="DIR")
    image, label = segjax.data.records_of(training.data)[0]    # uint8 (H, W, 3), RGB, and train ids (H, W)

`specs.py` has the table of datasets, and `open.py` opens a dataset by its name. Images pass through the other files in
this order: `archives.py` and `folder.py` find them, or `streets.py` draws them; `division.py` divides them into splits;
`masks.py` checks them and converts their masks, with `palettes.py` for colours; `builders.py` stores them;
`prepared.py` and `records.py` read them; `pipeline.py` makes batches of crops that `crops.py` draws and `augment.py`
augments on the device; `hooks.py` calls the user's own augmentations.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segjax.data.augment import normalise
    from segjax.data.builders import prepare
    from segjax.data.division import Division
    from segjax.data.open import OpenSplit, open_splits
    from segjax.data.pipeline import StreamBatches, TrainBatches, evaluation_batches
    from segjax.data.prepared import Prepared
    from segjax.data.records import RecordError, Records, records_of
    from segjax.data.sources import DataError
    from segjax.data.specs import DATASETS, Dataset, DatasetSpec, Split

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "DatasetSpec",
    "Division",
    "OpenSplit",
    "Prepared",
    "RecordError",
    "Records",
    "Split",
    "StreamBatches",
    "TrainBatches",
    "evaluation_batches",
    "normalise",
    "open_splits",
    "prepare",
    "records_of",
]
# File of each name. Files are imported when a name is first used, because `pipeline` and `augment` import jax.
_FILES = {
    "augment": ("normalise",),
    "builders": ("prepare",),
    "division": ("Division",),
    "open": ("OpenSplit", "open_splits"),
    "pipeline": ("StreamBatches", "TrainBatches", "evaluation_batches"),
    "prepared": ("Prepared",),
    "records": ("RecordError", "Records", "records_of"),
    "sources": ("DataError",),
    "specs": ("DATASETS", "Dataset", "DatasetSpec", "Split"),
}


def __getattr__(name: str):
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

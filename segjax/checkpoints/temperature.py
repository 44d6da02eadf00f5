"""The temperature of a checkpoint: a divisor of its logits that calibrates its probabilities.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. `segjax evaluate --fit-temperature` fits it on a
split and stores it next to the weights: in a folder as `temperature.json`, for a file as `FILE.temperature.json`.
`load`
and conversions copy it into the metadata, as the part `temperature`, if it was fitted for the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.checkpoints.metadata import Temperature, logger
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic
from segjax.runtime.reading import UnreadableError, checked, read_json, user_path

FILE = "temperature.json"
# Value for the stored temperature, in place of a number.
FITTED = "fitted"


class _Kept(TypedDict):
    weights_sha256: str
    temperature: Temperature


def place_for(source: object) -> Path | None:
    """The file for the temperature of a checkpoint; None if the checkpoint is not a local file or folder."""
    if not isinstance(source, str | Path):
        return None
    path = user_path(source)
    if path.is_dir():
        return path / FILE
    return path.with_name(f"{path.name}.{FILE}") if path.is_file() else None


def keep(place: Path, model: SegmentationModel, temperature: Temperature) -> None:
    """Writes the temperature that was fitted for the weights of a model, atomically."""
    content = stamped({"weights_sha256": _hash(model), "temperature": temperature})
    atomic.write_text(place, json.dumps(content, indent=1) + "\n")


def kept_with(source: object, model: SegmentationModel) -> dict[str, Temperature]:
    """{"temperature": ...} for the metadata of a model that was loaded from `source`; {} if none is stored.

    A temperature of other weights, for example of an earlier step, is not used, which is logged.

    Raises:
      CheckpointError: The file is damaged or of a newer format.
    """
    place = place_for(source)
    if place is None:
        return {}
    try:
        content = read_json(place)
        refuse_newer(content, place)
        kept = checked(content, _Kept, name=place)
    except FileNotFoundError:
        return {}
    except UnreadableError as error:
        raise CheckpointError(f"{error}; fit the temperature again, or remove this file") from None
    if kept["weights_sha256"] != _hash(model):
        logger.info("note: %s is not used: it was fitted for other weights", place)
        return {}
    return {"temperature": kept["temperature"]}


def chosen(temperature: float | str | None, metadata: Mapping[str, Any], source: object) -> float:
    """The requested temperature.

    Args:
      temperature: A number, `FITTED`, or None for 1.
      metadata: Metadata of the loaded checkpoint.
      source: Checkpoint, for messages.

    Raises:
      ValueError: The temperature is other text than `FITTED`, or none was fitted for the checkpoint.
    """
    if temperature is None:
        return 1.0
    if not isinstance(temperature, str):
        return float(temperature)
    if temperature != FITTED:
        raise ValueError(f"a temperature is a positive number or {FITTED!r}, not {temperature!r}")
    if (known := metadata.get("temperature")) is None:
        name = source if isinstance(source, str | Path) else "the model"
        raise ValueError(
            f"no temperature was fitted for the weights of {name}: segjax evaluate CHECKPOINT --data NAME:SPLIT "
            "--fit-temperature does so; or give a number"
        )
    return known["value"]


def described(temperature: Temperature) -> str:
    data = f", fitted on {temperature['data']}" if "data" in temperature else ""
    return f"{temperature['value']:.4g}{data}"


def _hash(model: SegmentationModel) -> str:
    params, batch_stats = FunctionalModel(model).arrays()
    return params_sha256(params | batch_stats)

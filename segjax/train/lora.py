"""LoRA in a run: the layers that get adapters, the modules that are trained in full, and the file of the adapters.

Everything else is frozen: it has no gradient, no moments and no decay. A frozen BatchNorm keeps its running statistics
and normalises with them, so that the file of the adapters holds everything that a run changes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from segjax.checkpoints import huggingface, published
from segjax.checkpoints.checkpoint import shorten
from segjax.checkpoints.metadata import LASTING
from segjax.checkpoints.save import save_adapter
from segjax.checkpoints.state_dict import named_variables
from segjax.models import lora
from segjax.models.functional import FunctionalModel
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime.reading import user_path
from segjax.train.config import RunError
from segjax.train.state import TrainState


def with_full(config: ConfigDict, module: SegmentationModel, random: Iterable[str]) -> ConfigDict:
    """The config of a new run, with `lora.full` chosen if it is unset: the modules that the checkpoint lacks.

    Args:
      config: Config of the run.
      module: Model of the run.
      random: Dotted paths of parameters that stayed random.

    Raises:
      RunError: `lora.full` leaves a random module frozen, or is found in no module.
    """
    if not config.lora.rank:
        return config
    random = modules_of(random)
    if config.lora.full is None:
        config = config.copy_and_resolve_references()
        config.lora.full = tuple(f"^{re.escape(name)}$" for name in random)
        return config
    full = full_modules(config.lora.full, named_variables(module))
    if frozen := [name for name in random if name not in full]:
        raise RunError(
            f"config.lora.full={config.lora.full} leaves modules frozen that config.init.checkpoint does not have, so "
            f"they would stay random: {shorten(frozen, most=6)}; add them, or omit it to train exactly these in full"
        )
    return config


def modules_of(names: Iterable[str]) -> list[str]:
    """Dotted paths of the modules of these parameters, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def full_modules(patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Dotted paths of the modules that are trained in full.

    Args:
      patterns: `lora.full`.
      names: Dotted names of all parameters.

    Raises:
      RunError: A pattern is found in no module.
    """
    modules, found = modules_of(names), set[str]()
    for pattern in patterns:
        matching = {name for name in modules if re.search(pattern, name)}
        if not matching:
            raise RunError(
                f"config.lora.full: {pattern!r} is found in no module of this model; they are {_kinds(modules)}"
            )
        found |= matching
    return frozenset(found)


def adapters_for(module: SegmentationModel, settings: ConfigDict, *, seed: int) -> lora.Adapters:
    """The adapters of a run; none if `lora.rank` is 0.

    Args:
      module: Model of the run.
      settings: `config.lora`, with `full`.
      seed: Seed of the random arrays.

    Raises:
      RunError: A pattern is found in no layer that can have an adapter.
    """
    if not settings.rank:
        return lora.NO_ADAPTERS
    full, layers = full_modules(settings.full, named_variables(module)), lora.adaptable(module)
    matching = [name for name in layers if re.search(settings.targets, name)]
    chosen = [name for name in matching if layers[name] and name not in full]
    if chosen:
        return lora.Adapters.of(module, chosen, rank=settings.rank, alpha=settings.alpha, seed=seed)
    possible = [name for name in layers if layers[name] and name not in full]
    why = "is found in no layer of this model"
    if any(not layers[name] for name in matching):
        why = "is found only in grouped convolutions, which can have no adapter"
    elif matching:
        why = "is found only in layers that config.lora.full trains in full"
    raise RunError(
        f"config.lora.targets: {settings.targets!r} {why}; layers that can have one are {_kinds(possible)} (N: any "
        "number)"
    )


def _kinds(names: Iterable[str]) -> str:
    """Names with N for each number, every kind once."""
    return shorten(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names), most=40)


def frozen_names(names: Collection[str], adapters: lora.Adapters, full: Iterable[str]) -> frozenset[str]:
    """The parameters that a run with adapters does not train.

    Args:
      names: Dotted names of all parameters, with those of adapters.
      adapters: Adapters of the run.
      full: `lora.full`.
    """
    own = [name for name in names if name not in adapters.initial]
    modules = full_modules(full, own)
    return frozenset(name for name in own if name.rpartition(".")[0] not in modules)


class AdapterFile:
    """Writes the adapters of a run, and the modules that it trains in full, in the format of peft.

    Attributes:
      folder: Folder of the file.
    """

    def __init__(self, folder: Path, model: FunctionalModel, config: ConfigDict, metadata: Mapping[str, object]):
        """Creates the writer, which writes nothing yet.

        Args:
          folder: Folder of the file.
          model: Functional model of the run.
          config: Config of the run.
          metadata: Metadata of the run, with the origin of its initial weights.
        """
        self.folder, self._model = folder, model
        own = [name for name in model.arrays()[0] if name not in model.adapters.initial]
        self._full = full_modules(config.lora.full, own)
        self._base, self._revision = _base_of(config.init.checkpoint, metadata)

    def __call__(self, state: TrainState, metadata: Mapping[str, object]) -> None:
        """Replaces the file by one of this state, which is on the host, with this metadata."""
        params, batch_stats = state.evaluated
        kept = ("model", *LASTING, "provenance", "step", "mean_iou")
        save_adapter(
            self.folder,
            self._model.spec.name,
            {name: np.asarray(array) for name, array in (params | batch_stats).items()},
            self._model.adapters,
            self._full,
            base=self._base,
            revision=self._revision,
            metadata={key: metadata[key] for key in kept if key in metadata},
        )


def _base_of(source: str, metadata: Mapping[str, object]) -> tuple[str, str | None]:
    """The name of the initial weights as peft writes it, and their revision on the Hub."""
    if huggingface.is_address(source):
        provenance = metadata.get("provenance")
        initial = provenance.get("initial_weights") if isinstance(provenance, Mapping) else None
        # With the commit.
        name = str(initial["source"]) if initial else source
        return huggingface.parsed_address(name if huggingface.is_address(name) else source)
    if published.find(source) is not None:
        return source, None
    return str(user_path(source).absolute()), None

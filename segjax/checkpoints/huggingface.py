"""Folders that transformers writes, and repositories of the Hugging Face Hub, which are such folders.

`hf:owner/name` or `hf:owner/name@revision` may replace the path of a checkpoint everywhere. huggingface_hub downloads
the needed files into its cache (HF_HOME); with HF_HUB_OFFLINE=1 it only reads the cache. `key_maps.py` has the keys.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.checkpoints import adapters
from segjax.checkpoints.checkpoint import CheckpointError, shorten
from segjax.checkpoints.metadata import NUMBERED_NAMES, checked_normalisation, classes_of, of_names
from segjax.checkpoints.state_dict import logger, settings_of
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic
from segjax.runtime.reading import UnreadableError, checked, read_json, user_path

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# The first existing file is read; an index lists the files of weights in several parts.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADDRESS = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_SPELLING = "a repository is written hf:owner/name or hf:owner/name@revision"
# transformers' SegFormer computes with this value and ignores layer_norm_eps in config.json.
LAYER_NORM_EPS = 1e-5
INDEX = ".index.json"
_WANTED = f"{WEIGHTS[0]} or {WEIGHTS[2]}, or an index of either with its parts"


def is_address(source: str | Path) -> bool:
    return str(source).startswith("hf:")


def problem_of(address: str | Path) -> str | None:
    """Reason why an address is not valid; None if it is."""
    return None if _ADDRESS.fullmatch(str(address)) else _SPELLING


def parsed_address(address: str) -> tuple[str, str | None]:
    """Repository and revision of an address. Raises CheckpointError if it is not valid."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise CheckpointError(f"{address}: {_SPELLING}")
    repository, revision = found.groups()
    return repository, revision


# ----------------------------------------------------------------------------------------------------------- the Hub


def fetched(source: str | Path) -> tuple[Path, str]:
    """Local path and name of a checkpoint.

    An address is downloaded to a folder; its name is the address with the commit.

    Raises:
      CheckpointError: The download fails; the message has the reason.
    """
    if not is_address(source):
        path = user_path(source)
        atomic.recover(path)
        return path, path.absolute().name
    return downloaded(str(source))


class UnreachableError(CheckpointError):
    """The Hub cannot be reached; the message is the reason."""


def downloaded(address: str, cache: Path | None = None) -> tuple[Path, str]:
    """Downloads a repository; returns the folder with its files, and its address with the commit.

    Args:
      address: hf:owner/name[@revision].
      cache: Folder of the downloads; by default huggingface_hub's.

    Raises:
      UnreachableError: `cache`, which is assumed to be empty, is given, and the Hub cannot be reached.
      CheckpointError: The download fails for another reason, which the message states.
    """
    repository, revision = parsed_address(address)
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        raise CheckpointError(f'{address}: needs huggingface_hub: pip install "segjax[hub]"') from None
    unreachable = _why_unreachable(repository, revision)
    if cache is not None and unreachable is not None:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the Hub cannot be reached: {unreachable}"
        raise UnreachableError(why)
    with _errors_of_the_hub(address, repository, revision, unreachable):
        folder = _download(address, repository, revision, offline=unreachable is not None, cache=cache)
    return folder, f"hf:{repository}@{folder.name}"


def _why_unreachable(repository: str, revision: str | None) -> str | None:
    """Reason why the Hub does not answer; None if it does. Avoids half a minute of retries without a network."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, CONFIG, revision=revision))
    except errors.HfHubHTTPError:
        # The Hub answers; the download reports its error.
        return None
    except Exception as error:
        return _first_line(error)
    return None


def _download(address: str, repository: str, revision: str | None, *, offline: bool, cache: Path | None) -> Path:
    """Downloads the files of one commit; returns their folder in the cache."""
    where: Any = dict(offline=offline, cache=cache)
    config = _file(repository, revision, CONFIG, **where)
    if config is not None:
        # All files come from one commit, even if the branch changes in the meantime.
        revision = config.parent.name
        try:
            refuse_other_models(config)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(f"{config}", f"{address}, {CONFIG}")) from None
    names = (*WEIGHTS, *adapters.WEIGHTS)
    weights = next(filter(None, (_file(repository, revision, name, **where) for name in names)), None)
    if weights is None:
        raise CheckpointError(f"{address}: this repository has no weights that can be read ({_WANTED})")
    for name in _shards(weights) if weights.suffix == ".json" else ():
        if _file(repository, revision, name, **where) is None:
            raise CheckpointError(f"{address}: {weights.name} names {name}, which is not in the repository")
    for name in (PREPROCESSOR, *([adapters.CONFIG] if weights.name in adapters.WEIGHTS else [])):
        _file(repository, revision, name, **where)
    return weights.parent


def _file(repository: str, revision: str | None, name: str, *, offline: bool, cache: Path | None) -> Path | None:
    """Downloads a file of a repository to the cache; None if the repository does not have it."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        where: Any = dict(cache_dir=cache, local_files_only=offline)
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, **where))
    except errors.LocalEntryNotFoundError:
        # Offline, the cache distinguishes a file that the repository lacks from a file that was never requested.
        known = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if known is None or isinstance(known, str):
            raise
        return None
    except errors.EntryNotFoundError:
        return None


@contextlib.contextmanager
def _errors_of_the_hub(address: str, repository: str, revision: str | None, unreachable: str | None) -> Iterator[None]:
    """Raises every error of a download as CheckpointError."""
    from huggingface_hub import constants, errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{address}: its owner requires an agreement: accept it at https://huggingface.co/{repository}, then log "
            "in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{address}: the Hub has no such repository, or it is private (`hf auth login` logs in)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{address}: the repository has no branch, tag or commit {revision!r}") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the Hub cannot be reached ({unreachable})"
        raise CheckpointError(f"{address}: {why}, and it is not in the cache, {constants.HF_HUB_CACHE}") from None
    except Exception as error:
        # Networks, proxies, full disks and the Hub each raise their own errors.
        raise CheckpointError(f"{address}: cannot be downloaded ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------------- folders


def is_folder(folder: Path) -> bool:
    """Whether the folder has files that transformers writes."""
    return any((folder / name).exists() for name in (CONFIG, *WEIGHTS))


def has_weights(folder: Path) -> bool:
    return _weights_in(folder) is not None


def _weights_in(folder: Path) -> Path | None:
    """The file of the weights, or their index, which may have another name, as in diffusers and accelerate."""
    named = (folder / name for name in WEIGHTS if (folder / name).exists())
    return next(named, None) or next(iter(sorted(folder.glob(f"*{INDEX}"))), None)


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights.

    Raises:
      CheckpointError: There are no weights, or a file that the index names is missing.
    """
    found = _weights_in(folder)
    if found is None:
        raise CheckpointError(f"{folder}: has {CONFIG} but no weights ({_WANTED})")
    return parts_of(found) if found.suffix == ".json" else [found]


def parts_of(index: Path) -> list[Path]:
    """The files that an index names, next to the index. Raises CheckpointError if one is missing."""
    names = _shards(index)
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise CheckpointError(f"{index}: names {shorten(missing, most=6)}, not found next to it")
    return [index.parent / name for name in names]


def keys_of_shards(folder: Path) -> set[str] | None:
    """The keys in the index; None if the weights are one file."""
    found = _weights_in(folder)
    return set(_index(found)) if found and found.suffix == ".json" else None


class _Index(TypedDict):
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _index(path: Path) -> dict[str, str]:
    try:
        return read_json(path, _Index)["weight_map"]
    except UnreadableError as error:
        raise CheckpointError(f"{error}. An index has a `weight_map` from keys to names of files next to it") from None


def _shards(index: Path) -> list[str]:
    names = sorted(set(_index(index).values()))
    # Names in an untrusted index must not lead out of the folder.
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: not an index (`weight_map` from keys to names of files next to it)")
    return names


# ------------------------------------------------------------------------------------------------------------ metadata

_Rate = Annotated[FiniteFloat, Field(ge=0, lt=1)]
_Numbers = Annotated[list[FiniteFloat], Field(min_length=1)]
_Side = Annotated[int, Field(ge=1)]


class _Config(TypedDict):
    """The settings of a SegFormer that are read from config.json; sizes are read from shapes."""

    model_type: NotRequired[str | None]
    num_attention_heads: NotRequired[
        Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=4, max_length=4)]
    ]
    decoder_hidden_size: NotRequired[Annotated[int, Field(ge=1, le=8192)]]
    drop_path_rate: NotRequired[_Rate]
    classifier_dropout_prob: NotRequired[_Rate]
    layer_norm_eps: NotRequired[Annotated[FiniteFloat, Field(gt=0)]]
    num_channels: NotRequired[Annotated[int, Field(ge=1, le=65536)]]


class _Type(TypedDict):
    model_type: NotRequired[str | None]


class _Names(TypedDict):
    id2label: NotRequired[dict[str, str] | None]
    label2id: NotRequired[dict[str, int] | None]


class _Preprocessor(TypedDict):
    do_rescale: NotRequired[bool | None]
    do_normalize: NotRequired[bool | None]
    do_resize: NotRequired[bool | None]
    rescale_factor: NotRequired[Annotated[FiniteFloat, Field(gt=0)] | None]
    image_mean: NotRequired[_Numbers | None]
    image_std: NotRequired[_Numbers | None]


class _Resize(TypedDict):
    height: _Side
    width: _Side


def refuse_other_models(config: Path) -> None:
    """Raises CheckpointError for the config.json of another network of transformers; other packages write no type."""
    kind = read_json(config, _Type).get("model_type")
    if kind not in (None, "segformer"):
        raise CheckpointError(f"{config}: a model of type {kind!r}; of transformers' models, segjax has only segformer")


def metadata_of(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The metadata in config.json and preprocessor_config.json, and notes for the user.

    Class names are under `metadata.NUMBERED_NAMES` if they are not numbered from 0 without gaps.

    Raises:
      CheckpointError: segjax does not have the model.
      UnreadableError: Settings or normalisation are invalid.
    """
    metadata, notes, channels = {}, [], 3
    if (folder / CONFIG).exists():
        refuse_other_models(folder / CONFIG)
        config = read_json(folder / CONFIG)
        metadata |= _classes(config, folder / CONFIG)
        if config.get("model_type") == "segformer":
            checked(config, _Config, name=folder / CONFIG)
            channels = config.get("num_channels", channels)
            metadata["model"] = {"overrides": _overrides(config, folder / CONFIG)}
            eps = config.get("layer_norm_eps", LAYER_NORM_EPS)
            if eps != LAYER_NORM_EPS:
                notes = [
                    f"{CONFIG} has layer_norm_eps={eps}; transformers ignores it and computes with {LAYER_NORM_EPS}"
                ]
    if (folder / PREPROCESSOR).exists():
        metadata |= _images(read_json(folder / PREPROCESSOR, _Preprocessor), folder / PREPROCESSOR, channels=channels)
    return metadata, notes


def names_and_normalisation(folder: Path) -> dict[str, Any]:
    """Class names and normalisation from the two JSON files of transformers, for a file of any network next to them.

    Raises:
      UnreadableError: The normalisation is invalid.
    """
    metadata: dict[str, Any] = {}
    if (folder / CONFIG).exists():
        metadata = _classes(read_json(folder / CONFIG), folder / CONFIG)
        metadata.pop(NUMBERED_NAMES, None)
    if (folder / PREPROCESSOR).exists():
        found = _images(read_json(folder / PREPROCESSOR, _Preprocessor), folder / PREPROCESSOR, channels=3)
        metadata |= {key: value for key, value in found.items() if key == "normalisation"}
    return metadata


def _classes(config: Mapping, path: Path) -> dict[str, Any]:
    """Metadata of the class names; {} if they are transformers' placeholders, or of other types."""
    try:
        names = checked(config, _Names, name=path)
        numbered = {int(number): name for number, name in (names.get("id2label") or {}).items()}
        # transformers writes id2label and label2id; a config made by hand may have only label2id.
        numbered = numbered or {number: name for name, number in (names.get("label2id") or {}).items()}
    except (UnreadableError, ValueError) as error:
        why = error if isinstance(error, UnreadableError) else f"{path}: id2label should have numbers as its keys"
        logger.info("%s; its class names are not used", why)
        return {}
    if all(name == f"LABEL_{number}" for number, name in numbered.items()):
        return {}
    ignored = config.get("semantic_loss_ignore_index")
    if sorted(numbered) == list(range(len(numbered))):
        return of_names([numbered[number] for number in range(len(numbered))], ignore_label=ignored)
    return {NUMBERED_NAMES: (numbered, ignored)}


# Settings of config.json for which segjax's SegFormer has a single value; and those that it has too, by segjax's name.
_FIXED = {"strides": [4, 2, 2, 2], "patch_sizes": [7, 3, 3, 3], "hidden_act": "gelu"}
_SETTINGS = {
    "in_channels": "num_channels",
    "num_heads": "num_attention_heads",
    "decoder_dim": "decoder_hidden_size",
    "drop_path_rate": "drop_path_rate",
    "dropout_rate": "classifier_dropout_prob",
}
_SIZES = {"dims": "hidden_sizes", "depths": "depths", "sr_ratios": "sr_ratios", "mlp_ratios": "mlp_ratios"}


def _overrides(config: Mapping, path: Path) -> dict[str, Any]:
    """Settings that the weights do not contain; all others are read from shapes."""
    other = [f"{key}={config[key]}" for key, value in _FIXED.items() if config.get(key, value) != value]
    if other:
        raise CheckpointError(f"{path}: a SegFormer with {', '.join(other)}, which segjax does not have")
    return {name: config[foreign] for name, foreign in _SETTINGS.items() if foreign in config}


def _images(preprocessor: Mapping, path: Path, *, channels: int) -> dict[str, Any]:
    given = {key: value for key, value in preprocessor.items() if value is not None}
    scale = 1 / given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    metadata: dict[str, Any] = {}
    parts = {key: given[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in given}
    if not given.get("do_normalize", True):
        parts = {"mean": [0.0] * channels, "std": [1.0] * channels}
    if parts:
        times = f" times {scale:g}" if scale != 1 else ""
        # Rounded, because 255 * 0.485 is not exact.
        normalisation = {key: [round(scale * value, 6) for value in values] for key, values in parts.items()}
        name = f"{path}: image_mean and image_std{times}"
        metadata["normalisation"] = checked_normalisation(normalisation, name=name)
    size = given.get("size")
    if given.get("do_resize", True) and size is not None:
        size = {"height": size, "width": size} if isinstance(size, int) else size
        try:
            checked(size, _Resize, name=f"{path}: size")
            metadata["input_size"] = [size["height"], size["width"]]
        except UnreadableError as error:
            # Other processors resize the shortest edge.
            if not isinstance(size, Mapping) or {"height", "width"} & size.keys():
                logger.info("%s; it is not used", error)
    return metadata


# ------------------------------------------------------------------------------------------------------------- writing


def config_of(model: SegmentationModel, metadata: Mapping) -> dict[str, Any]:
    """config.json for one of segjax's SegFormers.

    Raises:
      CheckpointError: transformers does not support the settings.
    """
    settings = settings_of(model)
    if any(ratio != int(ratio) for ratio in settings["mlp_ratios"]):
        raise CheckpointError(f"transformers takes whole numbers for mlp_ratios, not {settings['mlp_ratios']}")
    classes = classes_of(metadata, model.spec.num_classes)
    # Without names, transformers' placeholders, which `_classes` ignores.
    names = classes.class_names if metadata.get("dataset") else [f"LABEL_{k}" for k in range(classes.num_classes)]
    kept = {foreign: settings[name] for name, foreign in (_SETTINGS | _SIZES).items()}
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_encoder_blocks": 4,
        **_FIXED,
        **{key: list(map(int, value)) if isinstance(value, tuple) else value for key, value in kept.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": settings["block_norm_eps"],
        "semantic_loss_ignore_index": classes.ignore_label,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def preprocessor_of(metadata: Mapping) -> dict[str, Any]:
    """preprocessor_config.json; images keep their size if the metadata has none."""
    size, normalisation = metadata.get("input_size"), metadata["normalisation"]
    # Only the statistics of 8-bit RGB images are in units of 0..255.
    is_rgb = "image_dtype" not in metadata and len(normalisation["mean"]) == 3
    resize = {"size": dict(zip(("height", "width"), size, strict=True)), "resample": 2} if size else {}
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": bool(size),
        **resize,
        "do_rescale": is_rgb,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 6) if is_rgb else value for value in normalisation["mean"]],
        "image_std": [round(value / 255, 6) if is_rgb else value for value in normalisation["std"]],
        "do_reduce_labels": False,
    }

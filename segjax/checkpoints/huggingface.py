"""Folders as transformers writes them, and repositories of the Hugging Face Hub, which are such folders.

`hf:owner/name` or `hf:owner/name@revision` stands for a repository wherever a checkpoint does. huggingface_hub fetches
what is needed of it into its cache (HF_HOME), and with HF_HUB_OFFLINE=1 takes it from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from flax import nnx

from segjax import models
from segjax.checkpoints import metadata
from segjax.checkpoints.state_dict import CheckpointError, shorten

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# The first that is there is read; an index names the files that the weights are spread over.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADDRESS = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# What its SegFormer computes with, whatever layer_norm_eps its config.json has.
LAYER_NORM_EPS = 1e-5


def is_address(source: str | Path) -> bool:
    return str(source).startswith("hf:")


def problem_of(address: str | Path) -> str | None:
    """Why an address cannot be one; None where it can."""
    if _ADDRESS.fullmatch(str(address)):
        return None
    return "a repository is written hf:owner/name or hf:owner/name@revision"


# ----------------------------------------------------------------------------------------------------------- the Hub


def fetched(source: str | Path) -> tuple[Path, str]:
    """Where a checkpoint lies, and what it is called: a path itself, or the folder that an address was fetched to.

    Raises:
      CheckpointError: an address of nothing that can be fetched; says why.
    """
    if not is_address(source):
        path = Path(source).expanduser()
        return path, path.absolute().name
    address = str(source)
    if problem := problem_of(address):
        raise CheckpointError(f"{address}: {problem}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise CheckpointError(f'{address}: needs huggingface_hub: pip install "segjax[hub]"') from None
    repository, revision = _ADDRESS.fullmatch(address).groups()
    unreachable, config = None, None

    def file(name: str) -> Path | None:
        try:
            offline = unreachable is not None
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=offline))
        except errors.LocalEntryNotFoundError:
            # Offline the cache tells a file that is not in the repository from one that was never asked for.
            known = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
            if known is None or isinstance(known, str):
                raise
            return None
        except errors.EntryNotFoundError:
            return None

    try:
        try:
            # Without a network a download would try for half a minute.
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, CONFIG, revision=revision))
        except errors.HfHubHTTPError:
            # It answers; what it says is told below.
            pass
        except Exception as error:
            unreachable = _first_line(error)
        config = file(CONFIG)
        if config is not None:
            # One commit, whatever the branch becomes while this is read.
            revision = config.parent.name
            refuse_other_models(config)
        found = next((found for found in map(file, WEIGHTS) if found is not None), None)
        if found is None:
            raise CheckpointError(f"{address}: this repository has no weights that can be read ({_wanted()})")
        for name in _shards(found) if found.suffix == ".json" else ():
            if file(name) is None:
                raise CheckpointError(f"{address}: {found.name} names {name}, which is not in the repository")
        file(PREPROCESSOR)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(f"{config}", f"{address}, {CONFIG}")) from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{address}: its owner asks for an agreement: give it at https://huggingface.co/{repository}, then log in "
            "with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{address}: the Hub has no such repository, or it is private (`hf auth login` logs in)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{address}: the repository has no branch, tag or commit {revision!r}") from None
    except errors.LocalEntryNotFoundError:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be reached ({unreachable})"
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise CheckpointError(f"{address}: {why}, and it is not in the cache, {cache}") from None
    except Exception as error:
        # Of a network, a proxy, a full disk or the Hub itself: each has its own kind.
        raise CheckpointError(f"{address}: cannot be fetched ({_first_line(error)})") from None
    return found.parent, f"hf:{repository}@{found.parent.name}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------------- folders


def is_folder(folder: Path) -> bool:
    """Whether transformers would look for a model there."""
    return any((folder / name).is_file() for name in (CONFIG, *WEIGHTS))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, all of which are there.

    Raises:
      CheckpointError: there are none, or one that an index names is missing.
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: {CONFIG} but no weights ({_wanted()})")
    if found.suffix != ".json":
        return [found]
    names = _shards(found)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{found}: names {shorten(missing, most=6)}, and there is no such file beside it")
    return [folder / name for name in names]


def keys_of_shards(folder: Path) -> set[str] | None:
    """The keys that an index promises; None where the weights are one file."""
    found = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    return set(_json(found)["weight_map"]) if found.suffix == ".json" else None


def _wanted() -> str:
    return f"{WEIGHTS[0]} or {WEIGHTS[2]}, or an index of either with its parts"


def _shards(index: Path) -> list[str]:
    parts = _json(index).get("weight_map")
    names = sorted(set(map(str, parts.values()))) if isinstance(parts, Mapping) else []
    # The index may come from anybody, and must not lead out of its folder.
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: not an index of files beside it (`weight_map` of keys to file names)")
    return names


def _json(path: Path) -> dict:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(read, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return read


def refuse_other_models(config: Path) -> None:
    """Raises CheckpointError for the config.json of another network of transformers; other packages' name no type."""
    kind = _json(config).get("model_type")
    if kind not in (None, "segformer"):
        raise CheckpointError(f"{config}: a model of type {kind!r}; of transformers' models segjax has segformer alone")


def about_folder(folder: Path) -> tuple[dict[str, object], list[str]]:
    """What config.json and preprocessor_config.json tell, as a record has it; and what is to be said of it.

    Raises:
      CheckpointError: a model that segjax does not have.
    """
    about, notes = {}, []
    if (folder / CONFIG).is_file():
        refuse_other_models(folder / CONFIG)
        config = _json(folder / CONFIG)
        names = _class_names(config.get("id2label"))
        about |= metadata.of_names(names, ignore_label=config.get("semantic_loss_ignore_index"))
        if config.get("model_type") == "segformer":
            about["model"] = {"overrides": _overrides(config, folder / CONFIG)}
            eps = config.get("layer_norm_eps", LAYER_NORM_EPS)
            if eps != LAYER_NORM_EPS:
                notes = [f"{CONFIG} has layer_norm_eps={eps}; transformers computes with {LAYER_NORM_EPS} all the same"]
    if (folder / PREPROCESSOR).is_file():
        about |= _images(_json(folder / PREPROCESSOR))
    return about, notes


def _class_names(id2label: object) -> list[str]:
    """In the order of their numbers; none where transformers has made them up."""
    if not isinstance(id2label, Mapping) or {str(k) for k in id2label} != {str(k) for k in range(len(id2label))}:
        return []
    names = [str(id2label[str(number)]) for number in range(len(id2label))]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


_FIXED = {"strides": [4, 2, 2, 2], "patch_sizes": [7, 3, 3, 3], "hidden_act": "gelu", "num_channels": 3}
_SETTINGS = {
    "num_heads": "num_attention_heads",
    "decoder_dim": "decoder_hidden_size",
    "drop_path_rate": "drop_path_rate",
    "dropout_rate": "classifier_dropout_prob",
}
_SIZES = {"dims": "hidden_sizes", "depths": "depths", "sr_ratios": "sr_ratios", "mlp_ratios": "mlp_ratios"}


def _overrides(config: Mapping, path: Path) -> dict[str, object]:
    """Settings that the weights do not tell; what shapes tell is read off them."""
    other = [f"{key}={config[key]}" for key, value in _FIXED.items() if config.get(key, value) != value]
    if other:
        raise CheckpointError(f"{path}: a SegFormer with {', '.join(other)}, which segjax does not have")
    return {ours: config[theirs] for ours, theirs in _SETTINGS.items() if theirs in config}


def _images(preprocessor: Mapping) -> dict[str, object]:
    scale = 1 / preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1
    about = {}
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if not preprocessor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean and std:
        # Rounded, because 0.485 has no exact multiple of 255.
        about["normalisation"] = {
            "mean": [round(scale * value, 6) for value in mean],
            "std": [round(scale * value, 6) for value in std],
        }
    size = preprocessor.get("size")
    if preprocessor.get("do_resize", True) and size:
        size = size if isinstance(size, Mapping) else {"height": size, "width": size}
        if {"height", "width"} <= size.keys():
            about["input_size"] = [size["height"], size["width"]]
    return about


# ------------------------------------------------------------------------------------------------------------- writing


def config_of(model: nnx.Module, about: Mapping) -> dict[str, object]:
    """config.json of a SegFormer of ours.

    Raises:
      CheckpointError: settings that transformers has no place for.
    """
    settings = models.settings(model.spec.name) | dict(model.spec.overrides)
    if any(ratio != int(ratio) for ratio in settings["mlp_ratios"]):
        raise CheckpointError(f"transformers takes whole numbers for mlp_ratios, not {settings['mlp_ratios']}")
    spec = metadata.spec_of(about, model.spec.num_classes)
    kept = {theirs: settings[ours] for ours, theirs in (_SETTINGS | _SIZES).items()}
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_encoder_blocks": 4,
        **_FIXED,
        **{key: list(map(int, value)) if isinstance(value, tuple) else value for key, value in kept.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": settings["block_norm_eps"],
        "semantic_loss_ignore_index": spec.ignore_label,
        "id2label": {str(number): name for number, name in enumerate(spec.class_names)},
        "label2id": {name: number for number, name in enumerate(spec.class_names)},
    }


def preprocessor_of(about: Mapping) -> dict[str, object]:
    """preprocessor_config.json; images keep their size where the record has none."""
    size, normalisation = about.get("input_size"), about["normalisation"]
    resize = {"size": dict(zip(("height", "width"), size, strict=True)), "resample": 2} if size else {}
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": bool(size),
        **resize,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 6) for value in normalisation["mean"]],
        "image_std": [round(value / 255, 6) for value in normalisation["std"]],
        "do_reduce_labels": False,
    }

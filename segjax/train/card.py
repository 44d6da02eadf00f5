"""The model card of a run: the README.md that the Hugging Face Hub shows, with its metadata as YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from segjax.checkpoints import huggingface
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.load import LoadedCheckpoint, load
from segjax.checkpoints.state_dict import settings_of
from segjax.inference.engine import Protocol
from segjax.runtime.console import one_line, score
from segjax.runtime.reading import UnreadableError, read_json
from segjax.train.resume import read_result

NAME = "README.md"
# Stands for the name of the repository until the card is uploaded.
PLACEHOLDER = "USER/NAME"


class Card(NamedTuple):
    """A model card.

    Attributes:
      text: Markdown.
      checkpoint: The checkpoint that it describes.
      picture: Path of its picture relative to the folder of the run, or None.
    """

    text: str
    checkpoint: LoadedCheckpoint
    picture: Path | None


class _Evaluated(TypedDict):
    """The entries of an evaluation's results.json that are read."""

    step: int | None
    mean_iou: FiniteFloat | None
    mean_iou_interval: NotRequired[list[FiniteFloat] | None]


def is_transformers(checkpoint: LoadedCheckpoint) -> bool:
    """Whether transformers has this family, so that its folder format is uploaded."""
    return family_of(checkpoint.model.spec.name) == "segformer"


def card_of(workdir: Path, *, licence: str | None = None) -> Card:
    """Describes the last checkpoint of a run that has ended.

    Args:
      workdir: Folder of the run.
      licence: Identifier of a licence as the Hub lists them, such as "apache-2.0"; None for "other".

    Raises:
      CheckpointError: The folder is not that of a run, or the run has not ended.
    """
    try:
        result = read_result(workdir / "result.json")
    except FileNotFoundError:
        why = "the run has not ended" if (workdir / "checkpoints").is_dir() else "it is not the folder of a run"
        raise CheckpointError(f"{workdir}: there is no result.json: {why}") from None
    except UnreadableError as error:
        raise CheckpointError(str(error)) from None
    checkpoint = load(workdir)
    picture = next(iter(sorted(workdir.glob("predictions/**/*.png"))), None)
    picture = None if picture is None else picture.relative_to(workdir)
    lines = [
        "---",
        *_metadata(result, checkpoint, licence),
        "---",
        "",
        *_body(workdir, result, checkpoint, licence, picture),
    ]
    return Card("\n".join(lines) + "\n", checkpoint, picture)


def _metadata(result: Mapping[str, Any], checkpoint: LoadedCheckpoint, licence: str | None) -> Iterator[str]:
    """The lines of YAML; a text is quoted as in JSON, which is YAML too."""
    data, name = result["config"]["data"], checkpoint.model.spec.name
    yield f"library_name: {'transformers' if is_transformers(checkpoint) else 'segjax'}"
    yield "pipeline_tag: image-segmentation"
    yield f"license: {json.dumps(licence or 'other')}"
    if licence is None:
        yield "license_name: see-the-card"
    yield "tags:"
    yield from (f"- {json.dumps(tag)}" for tag in ("semantic-segmentation", "vision", "jax", "segjax", name))
    if result["mean_iou"] is None:
        return
    yield "model-index:"
    yield f"- name: {json.dumps(name)}"
    yield "  results:"
    yield "  - task:"
    yield "      type: image-segmentation"
    yield "      name: Semantic segmentation"
    yield "    dataset:"
    yield f"      name: {json.dumps(checkpoint.classes.name)}"
    yield f"      type: {json.dumps(data['name'])}"
    yield f"      split: {json.dumps(data['eval_split'])}"
    yield "    metrics:"
    for key, title in (("mean_iou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        yield f"    - type: {key}"
        yield f"      name: {title}"
        yield f"      value: {round(result[key], 6)}"


def _body(
    workdir: Path,
    result: Mapping[str, Any],
    checkpoint: LoadedCheckpoint,
    licence: str | None,
    picture: Path | None,
) -> Iterator[str]:
    classes, config, model = checkpoint.classes, result["config"], checkpoint.model
    data, name, split = config["data"], model.spec.name, config["data"]["eval_split"]
    yield f"# {name} on {_plain(classes.name)}"
    yield ""
    yield (
        f"Semantic segmentation into {classes.num_classes} classes, trained with segjax "
        f"on the split {_plain(data['train_split'])} of "
        f"{_plain(classes.name)}."
    )
    if picture is not None:
        yield from ("", f"![Image, truth and prediction]({'/'.join(map(_quoted, picture.parts))})")
    yield from ("", "## Figures", "", f"On the split {_plain(split)}, step {result['step']}:", "")
    yield from ("| | |", "|---|---|")
    interval = _interval(workdir, result)
    ends = f" (95% interval over images: {score(interval[0])} to {score(interval[1])})" if interval else ""
    yield f"| mIoU | {score(result['mean_iou'])}{ends} |"
    yield f"| pixel accuracy | {score(result['pixel_accuracy'])} |"
    yield f"| protocol | {Protocol.of(config['eval'])} |"
    yield from ("", "| class | IoU |", "|---|---|")
    for label, iou in zip(classes.label_names, result["per_class_iou"], strict=True):
        yield f"| {_plain(label)} | {score(iou)} |"
    yield from ("", "## Training", "")
    yield f"- {config['train']['steps']:,} steps of {config['train']['batch']} images"
    if (crop := config.get("augment", {}).get("crop")) is not None:
        yield f"- crops of {crop[0]}x{crop[1]} (height x width)"
    yield f"- from {_origin(checkpoint.provenance)}"
    mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in (checkpoint.mean, checkpoint.std))
    yield f"- images of {checkpoint.image_kind}, normalised with mean {mean} and deviation {std}"
    yield from ("", "## Licence", "")
    yield f"{licence or 'Not stated by the author of this card'}. Weights: {_plain(_licence(checkpoint))}."
    yield from ("", "## Use", "", "With segjax:", "", "```python", "import segjax", "")
    yield from (f'predictor = segjax.Predictor("hf:{PLACEHOLDER}")', 'labels = predictor("photo.jpg")', "```")
    if not is_transformers(checkpoint):
        return
    yield from ("", "With transformers:", "", "```python")
    yield "from transformers import AutoImageProcessor, SegformerForSemanticSegmentation"
    yield from ("", f'processor = AutoImageProcessor.from_pretrained("{PLACEHOLDER}")')
    yield from (f'model = SegformerForSemanticSegmentation.from_pretrained("{PLACEHOLDER}")', "```")
    settings = settings_of(model)
    if any(settings[key] != huggingface.LAYER_NORM_EPS for key in ("block_norm_eps", "patch_norm_eps")):
        yield from (
            "",
            f"transformers computes LayerNorm with an eps of {huggingface.LAYER_NORM_EPS:g}, segjax with",
        )
        yield f"{settings['block_norm_eps']:g} and {settings['patch_norm_eps']:g}, so its figures may differ slightly."


def _interval(workdir: Path, result: Mapping[str, Any]) -> list[float] | None:
    """The interval of mIoU that `segjax evaluate RUN` measured for the same checkpoint, or None."""
    try:
        found = read_json(workdir / "report" / "results.json", _Evaluated)
    except (OSError, UnreadableError):
        return None
    same = found["step"] == result["step"] and found["mean_iou"] == result["mean_iou"]
    return found.get("mean_iou_interval") if same else None


def _licence(checkpoint: LoadedCheckpoint) -> str:
    return checkpoint.metadata.get("licence", "unknown").rstrip(".")


def _origin(provenance: Mapping[str, Any]) -> str:
    """The initial weights of a run, in words."""
    made = provenance.get("made_from", provenance)
    if "initial_weights" not in made:
        return "weights of unknown origin"
    initial = made["initial_weights"]
    return "random weights" if initial is None else f"the weights {_plain(initial.get('source', 'of another file'))}"


def _plain(text: object) -> str:
    """Text from elsewhere, with all markup escaped."""
    text = one_line(text)
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+!|~$&" else sign for sign in text)


def _quoted(part: str) -> str:
    from urllib.parse import quote

    return quote(part)

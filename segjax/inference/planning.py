"""Selects the files, cameras and addresses to predict, and the paths of their outputs.

The content of a file decides whether it is an image or a video; its suffix counts only if the content is unknown.
Links to folders are followed, and each folder is read once. Every skipped file and folder is returned with the reason.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from segjax.data import codec
from segjax.data.codec import MAX_PIXELS
from segjax.inference import geotiff
from segjax.inference.outputs import KINDS, MAPS, Job
from segjax.runtime import reading
from segjax.runtime.reading import user_path
from segjax.viz import video

# Suffixes of images. A file with such a suffix is not skipped but reported if it cannot be read.
IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".npy")
_HIDDEN = "hidden"
_OTHER = "neither an image nor a video that can be read"
_ALREADY = "the same file as {}"


class Skipped(NamedTuple):
    """A file or folder that is not predicted."""

    path: Path
    reason: str


class _Found(NamedTuple):
    """The files of one input, and the folder to which the paths of their outputs are relative."""

    files: list[Path]
    root: Path


def plan(
    inputs: Sequence[str], output: Path, kinds: Sequence[str], *, max_pixels: int = MAX_PIXELS
) -> tuple[list[Job], list[Skipped]]:
    """Creates a job for every image and video in files, folders and patterns.

    Args:
      inputs: Paths, glob patterns, and addresses of videos, as the user gave them.
      output: Folder of all outputs, whose files are not read.
      kinds: Kinds of outputs, keys of `KINDS`.
      max_pixels: Number of pixels above which a TIFF is a scene, see `geotiff.kind`.

    Returns:
      The jobs, in the order of the inputs, and the skipped files and folders.

    Raises:
      ValueError: Inputs are missing or of another kind, or outputs would overwrite an input or each other; the message
        lists all problems.
    """
    problems: list[str] = []
    jobs: dict[Path | video.Live, Job] = {}
    skipped: list[Skipped] = []
    for given in inputs:
        before = len(skipped)
        found, is_single = _Found([], Path()), _is_single(given)
        try:
            if live := video.live(given):
                if live in jobs:
                    problems.append(f"{live}: was given twice")
                jobs[live] = _job(live, Path(live.name), output, kinds, "video")
                continue
            found = _files(given, output, skipped)
        except OSError as error:
            problems.append(f"{given}: {error.strerror or error}")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        usable = False
        for file in found.files:
            kind = _kind(file, max_pixels)
            if kind in ("image", "scene", "unplaced", "video"):
                job = _job(file, file.relative_to(found.root), output, kinds, kind)
                first = jobs.setdefault(Path(os.path.realpath(file)), job)
                if isinstance(first.source, Path) and os.path.abspath(first.source) != os.path.abspath(file):
                    skipped.append(Skipped(file, _ALREADY.format(first.source)))
                usable = True
            elif is_single:
                problems.append(f"{file}: {kind}" if kind != _OTHER else f"{file}: is {_OTHER}")
            else:
                skipped.append(Skipped(file, kind))
        if not usable and not (is_single and found.files):
            problems.append(_nothing(given, skipped[before:]))
    problems += _collisions(list(jobs.values()))
    if problems:
        raise ValueError("nothing was done:\n" + "\n".join(f"  {line}" for line in problems))
    return list(jobs.values()), skipped


def _kind(file: Path, max_pixels: int) -> str:
    """The kind of a file, "video" or a kind of `geotiff.kind`, by content or else by suffix; or a reason to skip it."""
    suffix = file.suffix.lower()
    by_suffix = "image" if suffix in IMAGES else "video" if suffix in video.SUFFIXES else None
    try:
        with reading.open_regular(file) as opened:
            head = opened.read(video.HEAD)
    except reading.UnreadableError as error:
        # A file with the suffix of an image is reported as an unreadable image.
        return by_suffix or str(error).removeprefix(f"{file}: ")
    except OSError as error:
        dangling = file.is_symlink() and not file.exists()
        return by_suffix or ("a broken link" if dangling else error.strerror or str(error))
    if found := codec.format_of(head[:32]):
        return geotiff.kind(file, max_pixels) if found == "TIFF" else "image"
    if suffix not in video.SOUND and video.is_video(head):
        return "video"
    return by_suffix or _OTHER


# --------------------------------------------------------------------------------------------------------------- files


def _is_single(given: str) -> bool:
    path = user_path(given)
    return os.path.lexists(path) and not path.is_dir()


def _files(given: str, output: Path, skipped: list[Skipped]) -> _Found:
    """The files of an input, sorted. Adds to `skipped`. Raises ValueError for irregular files, or below `output`."""
    path = user_path(given)
    if _is_single(given):
        reading.open_regular(path).close()
        return _Found([path], path.parent)
    if path.is_dir():
        own = Path(os.path.realpath(output))
        if own in (here := Path(os.path.realpath(path)), *here.parents):
            raise ValueError(f"{given}: is inside --output, whose files are not read; choose another --output")
        return _Found(sorted(_below(path, output, skipped)), path)
    if not glob.has_magic(given):
        return _Found([], path)
    parts = path.parts
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    if "**" not in parts:
        found = [place for place in map(Path, glob.glob(str(path))) if not _is_in(place, output)]
        folders = [place for place in found if place.is_dir()]
        files = {place for place in found if not place.is_dir()}
        return _Found(sorted(files.union(*(_below(folder, output, skipped) for folder in folders))), root)
    # Not by glob, which would follow a link to an enclosing folder forever.
    at = parts.index("**")
    files, passed = set(), []
    for folder in map(Path, glob.glob(str(Path(*parts[:at])) or ".")):
        if folder.is_dir() and not _is_in(folder, output):
            files |= {
                file for file in _below(folder, output, passed) if _matches(file.relative_to(folder).parts, parts[at:])
            }
    # Patterns do not match hidden files.
    skipped += [entry for entry in passed if entry.reason != _HIDDEN]
    return _Found(sorted(files), root)


def _is_in(place: Path, folder: Path) -> bool:
    own = Path(os.path.realpath(folder))
    return own in (real := Path(os.path.realpath(place)), *real.parents)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path matches a pattern, in which ** stands for any number of folders, or for all files at its end."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        if len(patterns) == 1:
            return bool(names)
        return any(_matches(names[at:], patterns[1:]) for at in range(len(names)))
    return bool(names) and fnmatch.fnmatch(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _below(root: Path, output: Path, skipped: list[Skipped]) -> Iterable[Path]:
    """All files below a folder. Each folder is read once, even if several links lead to it."""
    around = {_identity(folder) for folder in Path(os.path.realpath(root)).parents}
    own = _identity(output) if output.exists() else None
    seen = {_identity(root): root}
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            # Links come last, so that a folder is found under its own name first.
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            skipped.append(Skipped(folder, f"a folder that cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                # Unfinished files, or files of the system.
                skipped.append(Skipped(path, _HIDDEN))
            elif not path.is_dir():
                yield path
            elif (identity := _identity(path)) == own:
                skipped.append(Skipped(path, "the folder of outputs"))
            elif identity in around:
                skipped.append(Skipped(path, "a link to an enclosing folder"))
            elif identity in seen:
                skipped.append(Skipped(path, f"the same folder as {seen[identity]}"))
            else:
                seen[identity] = path
                pending.append(path)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _nothing(given: str, skipped: Sequence[Skipped]) -> str:
    if skipped:
        return f"{given}: no image or video; skipped {reasons(skipped)}"
    if user_path(given).is_dir():
        return f"{given}: a folder without images or videos"
    return f"{given}: {'no file matches' if glob.has_magic(given) else 'there is no such file or folder'}"


def reasons(skipped: Sequence[Skipped], *, most: int = 10) -> str:
    """The skipped files in one line: their number, and for each reason the first names."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in skipped:
        by_reason.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - most:,} more" if len(paths) > most else ""
        parts.append(f"{reason}: {', '.join(map(str, paths[:most]))}{more}")
    return "; ".join([f"{len(skipped):,}", *parts])


# ------------------------------------------------------------------------------------------------------------- outputs


def _job(file: Path | video.Live, relative: Path, output: Path, kinds: Sequence[str], what: str) -> Job:
    suffixes = {kind: KINDS[kind][what == "video"] for kind in kinds}
    if what == "scene":
        suffixes |= dict.fromkeys(suffixes.keys() & {"labels", *MAPS}, ".tif")
    # The end of "frame.0017" is not a suffix. A folder of frames keeps the suffix of its video, because a folder of
    # images may have the name without it.
    is_suffix = relative.suffix.lower() in (*IMAGES, *video.SUFFIXES)
    stem = relative.with_suffix("") if is_suffix else relative
    outputs = {
        kind: output / kind / (stem.with_name(stem.name + suffix) if suffix else relative)
        for kind, suffix in suffixes.items()
    }
    return Job(file, outputs, what == "video", is_scene=what == "scene", is_unplaced=what == "unplaced")


def _collisions(jobs: Sequence[Job]) -> list[str]:
    # Not Path.resolve, which raises for links to themselves.
    sources = {os.path.realpath(job.source): job.source for job in jobs if isinstance(job.source, Path)}
    owner: dict[str, Path | video.Live] = {}
    together, overwritten = [], []
    for job in jobs:
        for path in job.outputs.values():
            place = os.path.realpath(path)
            if place in sources:
                overwritten.append(f"{sources[place]}: would be overwritten; choose another --output")
            if place in owner:
                first = owner[place]
                if isinstance(first, video.Live) or isinstance(job.source, video.Live):
                    remedy = "give each an --output of its own"
                else:
                    is_near = first.parent == job.source.parent
                    remedy = "rename one of them" if is_near else "give the folder that contains both instead"
                together.append(f"{first} and {job.source} would both be written to {path}: {remedy}")
                break
            owner[place] = job.source
    if len(together) > 3:
        together[3:] = [f"and {len(together) - 3} more like this"]
    if together:
        together.append("or use a command for each, with an --output of its own")
    return together + overwritten

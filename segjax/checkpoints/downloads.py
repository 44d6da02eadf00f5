"""Downloads published weights into a cache, once; a download is kept only if it is complete and checked.

The cache is the folder SEGJAX_CACHE, by default pooch's folder for segjax (on Linux ~/.cache/segjax). It contains

    weights/NAME/       the downloaded file, or the files of a repository of the Hub
    weights/NAME.json   the source, with the commit, and the sha256 of each file of weights

Files may also be put there by hand. Every load checks the files: against the published digits, and against NAME.json,
which stays if the folder is removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from typing_extensions import TypedDict

from segjax.checkpoints import huggingface
from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.published import PublishedWeights
from segjax.runtime import atomic, console, lock
from segjax.runtime.reading import UnreadableError, read_json, sha256_of, user_path

if TYPE_CHECKING:
    import requests

CACHE = "SEGJAX_CACHE"
_SUFFIXES = (".pth", ".tar")


class _Record(TypedDict):
    """NAME.json."""

    source: str
    sha256: dict[str, str]


def fetched(row: PublishedWeights) -> tuple[Path, str]:
    """Local path of published weights, a file or folder, and a text with name and source.

    The weights are downloaded if the cache does not have them.

    Raises:
      CheckpointError: The weights cannot be downloaded, or differ from the published or first downloaded ones.
    """
    folder = cache_folder(row) / "weights" / row.name
    atomic.recover(folder)
    if not _is_there(row, folder):
        # Another process may be downloading them.
        with _turn(row, folder):
            if not _is_there(row, folder):
                _download(row, folder)
    return _place(row, folder), f"{row.name} ({_checked(row, folder)})"


def cache_folder(row: PublishedWeights) -> Path:
    """Path of the cache. Raises CheckpointError if pooch, which chooses the default, is not installed."""
    if given := os.environ.get(CACHE):
        return user_path(given).absolute()
    return Path(_pooch(row).os_cache("segjax"))


def _pooch(row: PublishedWeights):
    try:
        import pooch
    except ModuleNotFoundError:
        raise CheckpointError(f'{row.name}: needs pooch: pip install "segjax[hub]"') from None
    return pooch


def _is_hub(row: PublishedWeights) -> bool:
    return huggingface.is_address(row.source)


def _place(row: PublishedWeights, folder: Path) -> Path:
    """The folder of a repository, or the only file, named after its address."""
    if _is_hub(row):
        return folder
    name = urlsplit(row.source).path.rpartition("/")[2]
    return folder / (name if name.endswith(_SUFFIXES) else f"{row.name}.pth")


def _is_there(row: PublishedWeights, folder: Path) -> bool:
    return huggingface.has_weights(folder) if _is_hub(row) else _place(row, folder).exists()


@contextlib.contextmanager
def _turn(row: PublishedWeights, folder: Path) -> Iterator[None]:
    """Holds the lock of a download; waits while another process holds it."""
    waited = False
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock.held(folder.with_name(f"{row.name}.lock"), what=row.name, remedy="wait for it"))
                break
            except lock.HeldError as error:
                if not waited:
                    console.say(str(error), to=sys.stderr)
                waited = True
                time.sleep(0.1)
        yield


# ----------------------------------------------------------------------------------------------------------- download


def _download(row: PublishedWeights, folder: Path) -> None:
    # On stderr, with the progress, and not only in the log, so that every user sees the licence.
    console.show(f"fetching {row.name} from {row.address}; licence: {row.licence}", to=sys.stderr)
    with atomic.replacing_folder(folder) as new:
        new.mkdir()
        source = _from_hub(row, folder, new) if _is_hub(row) else _from_web(row, folder, new)
        digests = _digests(row, new)
        _refuse_others(row, digests, folder, where=f"{row.source} has", remedy="nothing was kept")
    if _read_record(row, folder) is None:
        _write_record(folder, source, digests)


def _from_web(row: PublishedWeights, folder: Path, new: Path) -> str:
    pooch = _pooch(row)
    import requests

    place = _place(row, new)
    logger = pooch.get_logger()
    level = logger.level
    # pooch would print the address and the hash.
    logger.setLevel(logging.WARNING)
    answers: list[requests.Response] = []
    # Any, because pooch declares a signature that differs from its own downloaders.
    downloader: Any = pooch.HTTPDownloader(
        progressbar=sys.stderr is not None and sys.stderr.isatty(),
        timeout=30,
        # Responses are collected, because pooch does not close one that it could not read.
        hooks={"response": lambda answer, **_: answers.append(answer)},
    )
    try:
        pooch.retrieve(row.source, known_hash=None, fname=place.name, path=new, downloader=downloader)
    except requests.RequestException as error:
        raise CheckpointError(_why_not(row, folder, _reason(error))) from None
    finally:
        logger.setLevel(level)
        for answer in answers:
            answer.close()
    with place.open("rb") as file:
        if file.read(64).lstrip()[:1] in (b"", b"<"):
            raise CheckpointError(_why_not(row, folder, "the answer is a web page or empty, not a file"))
    return row.source


def _reason(error: requests.RequestException) -> str:
    """A short description of an error of requests."""
    import requests

    host = urlsplit(error.request.url).hostname if error.request is not None and error.request.url else "it"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"it answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"{host} does not answer"
    if isinstance(error, requests.ConnectionError):
        return f"no connection to {host}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection ended before the file did"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _from_hub(row: PublishedWeights, folder: Path, new: Path) -> str:
    """Downloads the files of a repository; returns its address with the commit."""
    # The Hub's folder of links and blobs, of which only the files are kept.
    around = new / "hub"
    try:
        files, source = huggingface.downloaded(row.source, around)
    except huggingface.UnreachableError as error:
        raise CheckpointError(_why_not(row, folder, str(error))) from None
    except CheckpointError as error:
        raise CheckpointError(f"{row.name}: {error}") from None
    for path in files.iterdir():
        shutil.move(path.resolve(), new / path.name)
    shutil.rmtree(around)
    return source


def _why_not(row: PublishedWeights, folder: Path, reason: str) -> str:
    what = "its files, config.json among them, in" if _is_hub(row) else "the file at"
    return (
        f"{row.name}: {row.address} cannot be fetched ({reason}); nothing was kept. Fetch it on another machine, and "
        f"put {what} {_place(row, folder)}"
    )


# -------------------------------------------------------------------------------------------------------------- check


def _checked(row: PublishedWeights, folder: Path) -> str:
    """Checks the weights in a folder, and returns their source.

    Raises:
      CheckpointError: The weights differ from the published or first downloaded ones.
    """
    digests = _digests(row, folder)
    remedy = f"remove {folder}, and it is fetched again"
    _refuse_others(row, digests, folder, where=f"{folder} holds", remedy=remedy)
    record = _read_record(row, folder)
    if record is None:
        # The files were put there by hand.
        with contextlib.suppress(OSError):
            _write_record(folder, row.source, digests)
    return record["source"] if record else row.source


def _digests(row: PublishedWeights, folder: Path) -> dict[str, str]:
    """sha256 of each file of weights, by name."""
    paths = huggingface.weight_files(folder) if _is_hub(row) else [_place(row, folder)]
    return {path.name: sha256_of([path]) for path in paths}


def _refuse_others(row: PublishedWeights, digests: Mapping[str, str], folder: Path, *, where: str, remedy: str) -> None:
    """Raises CheckpointError if files differ from the published digits, or from the first download."""
    for digest in digests.values():
        if row.digits and not digest.startswith(row.digits):
            raise CheckpointError(
                f"{row.name}: {where} another file than the published one: its sha256 begins with {digest[:8]}, not "
                f"with {row.digits}; {remedy}"
            )
    first = (_read_record(row, folder) or {"sha256": {}})["sha256"]
    if first and first != digests:
        record = _record_of(folder)
        changed = sorted(name for name in first.keys() | digests.keys() if first.get(name) != digests.get(name))
        raise CheckpointError(
            f"{row.name}: {where} other weights than the first download: {', '.join(changed)} is not as in {record}; "
            f"{remedy}. To use them from now on, remove {record} too"
        )


def _record_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _read_record(row: PublishedWeights, folder: Path) -> _Record | None:
    try:
        return read_json(_record_of(folder), _Record)
    except FileNotFoundError:
        return None
    except UnreadableError as error:
        raise CheckpointError(f"{row.name}: {error}; remove it, and it is written again") from None


def _write_record(folder: Path, source: str, digests: Mapping[str, str]) -> None:
    atomic.write_text(_record_of(folder), json.dumps({"source": source, "sha256": digests}, indent=1) + "\n")

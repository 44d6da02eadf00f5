"""Checkpoint files: `.pth` and `.safetensors` in, out and told apart; orbax folders through `checkpoint.py`."""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.weights import CheckpointError, as_arrays, to_torch, torch_module


def read_file(source: Path) -> dict[str, np.ndarray] | nnx.Module:
    """A state dict from a `.pth` or `.safetensors` file, or a model from an orbax folder, told apart by content.

    Raises:
      CheckpointError: what the file is instead, and what to do.
    """
    if source.is_dir():
        from segjax import checkpoint

        return checkpoint.load_model(source)
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file")
    size = source.stat().st_size
    with source.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{source}: the file is empty; fetch it again")
    if size > 8 and 2 <= struct.unpack("<Q", head[:8])[0] <= max(size, 100_000_000) and head[8:9] == b"{":
        return _read_safetensors(source)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_pth(source)
    what = "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "something else"
    hint = " (a page that says why the download failed, or a git-lfs pointer?)" if what == "text" else ""
    raise CheckpointError(
        f"{source}: neither a PyTorch checkpoint, nor safetensors, nor an orbax folder; it begins with "
        f"{head[:24]!r}, which is {what}{hint}"
    )


def _read_safetensors(source: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(source)
    except (SafetensorError, AttributeError) as error:
        if isinstance(error, AttributeError):
            # The reader looks numpy up for a type that numpy does not have, such as float8.
            raise CheckpointError(f"{source}: holds a number type that cannot be read ({error})") from None
        raise CheckpointError(
            f"{source}: a safetensors file that is damaged or cut short ({error}); fetch it again"
        ) from None


def _read_pth(source: Path) -> dict[str, np.ndarray]:
    torch = torch_module()
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Weights only load failed" in reason and (
            "GLOBAL" in reason or "global" in reason or "Unsupported" in reason
        ):
            detail = next((line.strip() for line in reason.splitlines() if "WeightsUnpickler error" in line), "")
            raise CheckpointError(
                f"{source}: refused, because loading it would run code: it holds objects other than tensors and plain "
                f"containers. {detail}\n  If you trust its origin, load it where it was made and save "
                "model.state_dict() alone"
            ) from None
        raise CheckpointError(
            f"{source}: not a PyTorch checkpoint, or a damaged one ({reason.splitlines()[0]})"
        ) from None
    except Exception as error:
        # A damaged file makes torch raise almost anything, from struct.error to AssertionError.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source}: a PyTorch checkpoint that is damaged or cut short ({first}); fetch it again"
        ) from None
    try:
        return as_arrays(loaded)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def write_file(destination: Path, model: nnx.Module, *, dialect: str, about: Mapping[str, object]) -> None:
    """Writes beside `destination` and renames, so that a reader never sees half a file.

    `.pth` and `.safetensors` hold a state dict in the names of `dialect`; any other suffix is an orbax folder.
    """
    if destination.suffix not in (".pth", ".safetensors"):
        from segjax import checkpoint

        checkpoint.save_model(destination, model, about=about)
        return
    weights = to_torch(model, dialect=dialect)
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    os.close(handle)
    try:
        if destination.suffix == ".pth":
            torch = torch_module()
            torch.save({key: _as_tensor(torch, value) for key, value in weights.items()}, temporary)
        else:
            from safetensors.numpy import save_file

            # "format" is what transformers looks for before it reads a file.
            save_file(weights, temporary, metadata={"format": "pt"})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, destination)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _as_tensor(torch, value: np.ndarray):
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())

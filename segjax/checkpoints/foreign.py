"""Recognises foreign files and folders whose weights cannot be read, by their content, and names the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segjax.checkpoints.errors import shorten

# (offset, bytes at the offset, kind, remedy)
_SAVE = "save model.state_dict() where it was made"
_NO_TENSORFLOW = "segjax reads weights of PyTorch and of its own"
_UNPACK = "unpack it, and give the checkpoint in it"
_SIGNATURES = (
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras writes weights", _NO_TENSORFLOW),
    (4, b"TFL3", "a model of TensorFlow Lite", _NO_TENSORFLOW),
    (0, b"ftrt", "an engine of TensorRT", "give the checkpoint that it was built from"),
    (0, b"GGUF", "a GGUF file", _NO_TENSORFLOW),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"\x89PNG", "a PNG image", "give a checkpoint"),
    (0, b"\xff\xd8\xff", "a JPEG image", "give a checkpoint"),
    (0, b"\x93NUMPY", "a single array of numpy", "save the arrays by name, with numpy.savez or safetensors"),
    (0, b"version https://git-lfs", "a git-lfs pointer, not the file itself", "fetch it with `git lfs pull`"),
)
# Suffixes of TensorFlow's and Flax's files, whose content begins with no signature.
_NAMES = (
    (".index", "the index of a checkpoint of TensorFlow", _NO_TENSORFLOW),
    (".data-00000-of-00001", "a checkpoint of TensorFlow", _NO_TENSORFLOW),
    (".msgpack", "weights of Flax in msgpack", "load them in Flax, and save their PyTorch names as safetensors"),
)


def file_kind(path: Path, head: bytes) -> str | None:
    """Kind of a file and the remedy, as a clause for a message; None if the kind is unknown.

    Args:
      path: Path of the file.
      head: First 512 bytes of the file.
    """
    for offset, signature, kind, remedy in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return f"{kind}; {remedy}"
    # A protobuf message whose first field is a version: of the schema of TensorFlow's SavedModel, or of ONNX's.
    if head[:3] == b"\x08\x01\x12" and path.suffix == ".pb":
        return f"a SavedModel of TensorFlow; {_NO_TENSORFLOW}"
    if head[:1] == b"\x08" and 0 < head[1] < 64 and (path.suffix == ".onnx" or head[2:3] in (b"\x12", b":", b"B")):
        return "a model of ONNX; give the checkpoint that it was exported from"
    return next((f"{kind}; {remedy}" for suffix, kind, remedy in _NAMES if path.name.endswith(suffix)), None)


def zip_kind(names: Sequence[str]) -> str | None:
    """`file_kind` for a zip with these members; None for a checkpoint of `torch.save`."""
    last = {name.rpartition("/")[2] for name in names}
    if {"constants.pkl", "code"} & last or any("/code/" in name for name in names):
        return "a TorchScript program; load it with torch.jit.load, and save its state_dict()"
    if {"archive_format", "serialized_exported_program.json", "model.json"} & last:
        return f"a program of torch.export (.pt2); {_SAVE}"
    if "data.pkl" in last:
        return None
    if "model.weights.h5" in last:
        return f"a model of Keras; {_NO_TENSORFLOW}"
    return f"a zip archive with {shorten(names, most=4)}; {_UNPACK}"


def folder_kind(folder: Path) -> str | None:
    """`file_kind` for a folder without a checkpoint that can be read."""
    names = sorted(child.name for child in folder.iterdir())
    if "saved_model.pb" in names:
        return f"a SavedModel of TensorFlow; {_NO_TENSORFLOW}"
    if "Manifest.json" in names and folder.suffix == ".mlpackage":
        return "a model of Core ML; give the checkpoint that it was converted from"
    if any(name.endswith(".distcp") for name in names):
        return (
            "a sharded checkpoint of torch.distributed; make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth"
        )
    if any(name.startswith(("mp_rank_", "zero_pp_rank_")) for name in names) or any(
        name.startswith("global_step") for name in names
    ):
        return "a checkpoint of DeepSpeed; make one file of it with the zero_to_fp32.py that lies next to it"
    if any(name.endswith(".index") for name in names):
        return f"a checkpoint of TensorFlow; {_NO_TENSORFLOW}"
    return None

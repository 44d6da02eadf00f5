"""The user's own augmentations: the settings `augment.on_device` and `augment.on_host`.

Each setting is the address of a function, FILE.py:function or package.module:function.

    def on_device(key, image, label): ...    # jax: float32 (h, w, C) in 0..255 and uint8 (h, w), of one crop
    def on_host(rng, image, label): ...      # NumPy: uint8 (H, W, C) and uint8 (H, W), of one whole image

Images of uint16 and float32 keep their dtype in `on_host`, and their unit in both functions. Both functions return an
image and a label of the given shapes and dtypes. Labels are uint16 if the ignore label is above 255.

`on_device` is traced into the training step, after the geometric and photometric changes and before normalisation and
padding. Each sample has its own `key`. Outside of the image, the crop repeats the edge of the image and has the ignore
label; values that the function writes there are overwritten. Gamma, for example:

    def gamma(key, image, label):
        return 255 * (image / 255) ** jax.random.uniform(key, minval=0.7, maxval=1.5), label

`on_host` changes each decoded image before its crop is drawn, in threads that read ahead. The data are then streamed,
even from memory. `rng`, a `np.random.Generator`, depends only on the seed, the step and the sample's position in the
batch. An example with Albumentations; the function builds the pipeline, because several threads call it concurrently:

    import albumentations as A

    def weather(rng, image, label):
        transform = A.Compose(
            [A.RandomFog(p=0.2), A.GaussNoise(p=0.3), A.ElasticTransform(p=0.2, fill_mask=255)],
            seed=int(rng.integers(2**32)),
        )
        changed = transform(image=image, mask=label)
        return changed["image"], changed["mask"]

    segjax train --config segformer:b0,camvid --config.augment.on_host=weather.py:weather
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.runtime.reading import type_name, user_path


def function_at(setting: str, address: str) -> Callable:
    """The function at an address; a file is executed once per process.

    Args:
      setting: Name of the setting, for messages.
      address: FILE.py:function or package.module:function.

    Raises:
      ValueError: There is no such file, module or function, or its import fails.
    """
    source, colon, name = address.rpartition(":")
    if not (source and colon and name):
        raise ValueError(f"{setting}={address!r}; must be FILE.py:function or package.module:function")
    try:
        is_file = source.endswith(".py")
        module = _executed(os.path.realpath(user_path(source))) if is_file else importlib.import_module(source)
    except Exception as error:
        reason = str(error) if isinstance(error, FileNotFoundError | ModuleNotFoundError) else _described(error)
        raise ValueError(f"{setting}={address!r}; {source} cannot be imported: {reason}") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{setting}={address!r}; {source} has no function {name}, only {', '.join(defined) or 'none'}")
    return function


@functools.cache
def _executed(real_path: str) -> ModuleType:
    path = Path(real_path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def on_device(address: str, key: jax.Array, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Applies the function of `augment.on_device` to a crop: float32 (h, w, C) and labels (h, w) -> the same shapes.

    Raises:
      ValueError: There is no such function, it fails, or it returns something else.
    """
    return _applied("augment.on_device", address, key, image, label)


def on_host(
    address: str, rng: np.random.Generator, image: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Applies the function of `augment.on_host` to copies of an image (H, W, C) and its labels (H, W) -> the same
    shapes.

    Raises:
      ValueError: There is no such function, it fails, or it returns something else.
    """
    return _applied("augment.on_host", address, rng, image.copy(), label.copy())


def _applied(setting: str, address: str, random: Any, image: Any, label: Any) -> Any:
    function = function_at(setting, address)
    try:
        result = function(random, image, label)
    except Exception as error:
        raise ValueError(f"{setting}={address!r}; {_described(error)}") from error
    given, returned = _kinds((image, label)), _kinds(result)
    if given != returned:
        raise ValueError(f"{setting}={address!r}; must return an image and a label, {given}; it returned {returned}")
    return result


def _kinds(result: Any) -> str:
    """The dtypes and shapes of one or more arrays, and the types of anything else."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return " and ".join(
        f"{part.dtype} {part.shape}" if isinstance(part, jax.Array | np.ndarray) else type_name(part) for part in parts
    )


def problem_on_device(address: str, crop: Sequence[int], channels: int | None = 3) -> str | None:
    """Reason why `augment.on_device` cannot be used; None if it can. The function is traced, not run on data.

    Args:
      address: Address of the function.
      crop: (height, width) of the crops in pixels.
      channels: Number of channels of the images; None if it is not known, to only look the function up.
    """
    if channels is None:
        return _problem_of_address("augment.on_device", address)
    image, label = jax.ShapeDtypeStruct((*crop, channels), jnp.float32), jax.ShapeDtypeStruct(tuple(crop), jnp.uint8)
    try:
        jax.eval_shape(functools.partial(on_device, address), jax.random.key(0), image, label)
    except ValueError as error:
        return str(error).removeprefix("augment.on_device=")
    return None


def problem_on_host(address: str) -> str | None:
    """Reason why `augment.on_host` cannot be used; None if it can. The function is not called."""
    return _problem_of_address("augment.on_host", address)


def _problem_of_address(setting: str, address: str) -> str | None:
    try:
        function_at(setting, address)
    except ValueError as error:
        return str(error).removeprefix(f"{setting}=")
    return None

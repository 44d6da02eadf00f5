"""GeoTIFF: reads scenes in parts, and writes label maps that keep the georeference and the nodata pixels.

It needs rasterio, the extra `geo`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from segjax.data import codec, specs, tiff
from segjax.data.codec import ImageError
from segjax.data.scaling import Scale
from segjax.inference.images import as_rgb, of_kind, read_bands, read_image
from segjax.runtime import atomic, memory, native_messages

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# GDAL's cache of decoded blocks in MB. A large scene would fill the default, a share of the machine's memory.
_CACHE = 16
_BLOCK = 256  # pixels per side of the blocks of label maps


def is_available() -> bool:
    return _rasterio() is not None


def kind(path: Path, max_pixels: int) -> str:
    """The kind of a TIFF, which determines its prediction.

    Returns:
      "scene" for a GeoTIFF, with a georeference or a nodata value, and for any upright TIFF of more than `max_pixels`
      pixels, which can be read in parts; "unplaced" for a GeoTIFF whose georeference is lost because rasterio is
      missing or cannot read it; otherwise "image".
    """
    for library in ("rasterio", "tifffile"):
        # Errors are raised and need no log.
        logging.getLogger(library).propagate = False
    try:
        layout = tiff.layout(path)
    except (ValueError, OSError):
        # The code that reads the file reports the reason.
        return "image"
    if _rasterio() is not None:
        with contextlib.suppress(ImageError), _opened(path) as dataset:
            is_large = layout.size[0] * layout.size[1] > max_pixels and layout.orientation == 1
            is_placed = bool(_georeference(dataset)) or dataset.nodata is not None
            return "scene" if is_placed or is_large else "image"
    return "unplaced" if layout.is_geotiff else "image"


class Scene:
    """An opened TIFF as an image (H, W, C) that is read in parts: `scene[top:bottom, left:right]`.

    RGB is uint8. Images of another kind have all bands of the file, unscaled. Rows are those of the file, as in GDAL:
    the tag Orientation is ignored.

    Attributes:
      shape: H, W, C.
      dtype: Dtype of the parts.
    """

    def __init__(
        self,
        dataset: DatasetReader,
        layout: tiff.Layout,
        scale: Scale | None,
        kind: specs.ImageKind,
        fill: Sequence[float],
    ):
        bands = layout.colours if kind.is_rgb else dataset.count
        self.shape = (dataset.height, dataset.width, 3 if kind.is_rgb else bands)
        self.dtype = np.dtype(np.uint8 if kind.is_rgb else dataset.dtypes[0])
        self._dataset, self._bands, self._scale = dataset, list(range(1, bands + 1)), scale
        self._kind, self._fill = kind, np.array(fill)

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        with _heard() as messages:
            bands = self._dataset.read(self._bands, window=_window(part))
        if fault := codec.made_up(messages):
            raise ImageError(fault)
        image = np.ascontiguousarray(np.moveaxis(bands, 0, -1))
        del bands
        if image.dtype.kind == "f" and not (is_number := np.isfinite(image)).all():
            # Pixels without data may be NaN. They become black in RGB, and the mean in other images.
            place = ~is_number & self.nodata(part)[..., None]
            of_rgb = self._scale[0] if self._scale else 0
            image[place] = of_rgb if self._kind.is_rgb else np.broadcast_to(self._fill, image.shape)[place]
        image = as_rgb(image, scale=self._scale) if self._kind.is_rgb else of_kind(image, self._kind)
        # Otherwise the gaps between freed blocks add up over the parts of a large scene.
        memory.release_freed_memory()
        return image

    def nodata(self, part: tuple[slice, slice]) -> np.ndarray:
        """Mask, bool (h, w), of pixels of a part without data: the nodata value in all bands, or mask or alpha 0.

        GDAL takes the last of four bands for alpha. In images other than RGB every band is a channel, so alpha is
        ignored.
        """
        if not self._kind.is_rgb and any(flag.name == "alpha" for flag in self._dataset.mask_flag_enums[0]):
            return np.zeros([side.stop - side.start for side in part], bool)
        return self._dataset.dataset_mask(window=_window(part)) == 0

    def masked(self, top: int, left: int, labels: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
        """Labels (h, w) of a part, of `spec.label_dtype`, with the ignore label in pixels without data."""
        part = np.s_[top : top + labels.shape[0], left : left + labels.shape[1]]
        ignored = np.asarray(spec.ignore_label, spec.label_dtype)
        return np.where(self.nodata(part), ignored, labels.astype(spec.label_dtype))

    def whole(self) -> np.ndarray:
        return self[0 : self.shape[0], 0 : self.shape[1]]

    @property
    def georeference(self) -> dict[str, Any]:
        """Arguments of rasterio for a file with the same georeference."""
        return _georeference(self._dataset)


@contextlib.contextmanager
def opened(
    path: Path, *, scale: Scale | None, images: specs.ImageKind = specs.RGB, fill: Sequence[float] = (0,)
) -> Iterator[Scene]:
    """Opens a TIFF of `kind` "scene".

    Args:
      path: File.
      scale: Values of black and white, as for `images.as_rgb`.
      images: Kind of images that the model takes.
      fill: Values per channel in place of NaN in pixels without data.

    Raises:
      ImageError: The file cannot be read, also in the body of the context.
    """
    layout = _known_layout(path, images)
    with _opened(path) as dataset:
        if layout.missing and dataset.nodata is None:
            raise ImageError(f"is truncated: {layout.missing} of its {layout.parts} strips or tiles are missing")
        if not images.is_rgb and dataset.count != images.channels:
            found = specs.ImageKind(dataset.count, dataset.dtypes[0])
            raise ImageError(f"has {found}, and the model takes {images}")
        yield Scene(dataset, layout, scale, images, fill)


def _known_layout(path: Path, images: specs.ImageKind) -> tiff.Layout:
    """The layout of a TIFF. Raises ImageError if the model takes RGB and the bands are not known to be colours."""
    layout = tiff.layout(path)
    if images.is_rgb and layout.why_unknown:
        raise ImageError(layout.why_unknown)
    return layout


def why_whole(path: Path, *, scale: Scale | None, max_pixels: int, images: specs.ImageKind = specs.RGB) -> str | None:
    """The remedy for a scene that cannot be read in parts, or None. `images` is the kind that the model takes."""
    layout = _known_layout(path, images)
    if layout.largest_part > max_pixels:
        return "store it in tiles: gdal_translate -co TILED=YES IN.tif OUT.tif"
    if not layout.is_plain:
        return "convert it to 8-bit RGB"
    # The scale of 16-bit values depends on all values of an image.
    return None if not images.is_rgb or layout.dtype == np.uint8 or scale is not None else "give --scale LOW HIGH"


def read(
    path: Path,
    *,
    scale: Scale | None,
    max_pixels: int,
    in_parts: str,
    images: specs.ImageKind = specs.RGB,
    fill: Sequence[float] = (0,),
) -> np.ndarray:
    """Reads a whole scene, (H, W, C); see `Scene`.

    Args:
      path: File.
      scale: As for `opened`.
      max_pixels: Maximum number of pixels.
      in_parts: Advice on reading the scene in parts, as the end of a sentence.
      images: As for `opened`.
      fill: As for `opened`.

    Raises:
      ImageError: The file cannot be read, or has more than `max_pixels` pixels.
    """
    layout = _known_layout(path, images)
    (height, width), whole = layout.size, why_whole(path, scale=scale, max_pixels=max_pixels, images=images)
    if height * width > max_pixels:
        remedy = "; ".join(part for part in (in_parts, whole) if part)
        raise ImageError(
            f"has {height}x{width} pixels, {height * width:,}, more than {max_pixels:,}; to predict it in parts, "
            f"without a limit: {remedy}; to decode it completely, raise --max-pixels"
        )
    if whole is None:
        with opened(path, scale=scale, images=images, fill=fill) as scene:
            return scene.whole()
    if layout.orientation != 1:
        raise ImageError(f"has the tag Orientation, {layout.orientation}, next to a georeference; convert it to RGB")
    if not images.is_rgb:
        return read_bands(path, images, max_pixels=max_pixels)
    return read_image(path, scale=scale, max_pixels=max_pixels)


@contextlib.contextmanager
def label_map(path: Path, scene: Scene, spec: specs.DatasetSpec) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """Writes a tiled, compressed GeoTIFF with the georeference of a scene, atomically.

    Its values are uint8 with the colours of the classes, or uint16 (`DatasetSpec.label_dtype`); nodata is the ignore
    label.

    Yields:
      Function that writes a part: top, left, labels (h, w) from `Scene.masked`.
    """
    colours = None
    if spec.label_dtype == np.uint8:
        colours = {label: (*color, 255) for label, color in enumerate(spec.label_colors)}
    with _raster(path, scene, np.dtype(spec.label_dtype), nodata=spec.ignore_label, colours=colours) as write:
        yield write


@contextlib.contextmanager
def certainty_map(path: Path, scene: Scene) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """Writes one of `certainty.maps` as a GeoTIFF of uint8 like `label_map`; nodata is 0, and a value of 0 becomes 1.

    Yields:
      Function that writes a part: top, left, values (h, w).
    """
    with _raster(path, scene, np.dtype(np.uint8), nodata=0) as write:

        def write_masked(top: int, left: int, values: np.ndarray) -> None:
            part = np.s_[top : top + values.shape[0], left : left + values.shape[1]]
            write(top, left, np.where(scene.nodata(part), 0, np.maximum(values, 1)).astype(np.uint8))

        yield write_masked


@contextlib.contextmanager
def _raster(
    path: Path, scene: Scene, dtype: np.dtype, *, nodata: int, colours: dict[int, tuple[int, ...]] | None = None
) -> Iterator[Callable[[int, int, np.ndarray], None]]:
    """The file of `label_map`, for values of a dtype."""
    import rasterio

    profile = dict(count=1, dtype=dtype.name, nodata=nodata, compress="deflate")
    blocks = dict(tiled=True, blockxsize=_BLOCK, blockysize=_BLOCK, bigtiff="IF_SAFER")
    size = dict(height=scene.shape[0], width=scene.shape[1])
    # Not `replacing_file`: GDAL writes metadata that a TIFF cannot hold into a file next to it.
    with atomic.replacing_files(path) as temporary:
        with _writing():
            file = rasterio.open(temporary, "w", driver="GTiff", **size, **profile, **blocks, **scene.georeference)
        try:
            if colours is not None:
                file.write_colormap(1, colours)

            def write(top: int, left: int, values: np.ndarray) -> None:
                part = np.s_[top : top + values.shape[0], left : left + values.shape[1]]
                with _writing():
                    file.write(values, 1, window=_window(part))

            yield write
        finally:
            with _writing():
                file.close()
        # GDAL does not report every block that it failed to write.
        if missing := tiff.layout(temporary).missing:
            raise RuntimeError(f"cannot be written: {missing} blocks are missing")


def save_labels(path: Path, scene: Scene, labels: np.ndarray, spec: specs.DatasetSpec) -> None:
    """Writes the labels (H, W) of a whole scene, from `Scene.masked`; see `label_map`."""
    with label_map(path, scene, spec) as write:
        write(0, 0, labels)


def _window(part: tuple[slice, slice]) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = part
    return (rows.start, rows.stop), (columns.start, columns.stop)


def _georeference(dataset: DatasetReader) -> dict[str, Any]:
    gcps, system = dataset.gcps
    found = {
        "crs": dataset.crs or system or None,
        "transform": None if dataset.transform.is_identity else dataset.transform,
        "gcps": gcps or None,
        "rpcs": dataset.rpcs,
    }
    return {name: value for name, value in found.items() if value is not None}


def _rasterio() -> ModuleType | None:
    """rasterio, with its warnings silenced; None if it is not installed."""
    try:
        import rasterio
        from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning
    except ImportError:
        return None
    for category in (NodataShadowWarning, NotGeoreferencedWarning):
        warnings.simplefilter("ignore", category)
    return rasterio


def _errors() -> tuple[type[Exception], ...]:
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return CPLE_BaseError, RasterioError


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[DatasetReader]:
    rasterio = _rasterio()
    assert rasterio is not None
    try:
        # Only with this driver: others open files and addresses named in a file.
        with rasterio.Env(GDAL_CACHEMAX=_CACHE), rasterio.open(path.absolute(), driver="GTiff") as dataset:
            yield dataset
    except ImageError:
        raise
    # Tags may have any content and cause any error in numbers or text.
    except (*_errors(), ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        raise ImageError(f"is a TIFF that cannot be decoded ({reason[0]})") from error


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects GDAL's warnings of this thread while the body runs."""
    messages, thread = [], threading.get_ident()

    class Messages(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                messages.append(record.getMessage().rpartition("JPEGLib:")[2])

    handler, logger = Messages(logging.WARNING), logging.getLogger("rasterio")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Raises RuntimeError if a write fails; `atomic` then finds out whether the disk is full."""
    try:
        with native_messages.silenced():
            yield
    except _errors() as error:
        raise RuntimeError(f"cannot be written ({error})") from error

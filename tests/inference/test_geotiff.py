"""Scenes read in parts by GDAL equal whole files read by tifffile; both refuse damaged files."""

import contextlib

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segjax.data import tiff
from segjax.data.codec import ImageError
from segjax.inference import geotiff
from segjax.inference.images import read_image
from tests.pixels import SPEC, scene

PLACE = dict(crs="EPSG:32633", transform=rasterio.Affine(2, 0.5, 399960, 0.25, -3, 5800020))
TILES = dict(tiled=True, blockxsize=64, blockysize=32)


def put(path, image, **profile):
    size = dict(height=image.shape[0], width=image.shape[1], count=image.shape[2], dtype=image.dtype.name)
    with rasterio.open(path, "w", driver="GTiff", **size, **PLACE, **{"photometric": "RGB"} | profile) as file:
        file.write(np.moveaxis(image, -1, 0))
    return path


@pytest.mark.parametrize("compress", ["none", "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize(
    "seed, profile", [(0, {}), (1, TILES), (2, TILES | {"interleave": "band"}), (3, {"blockysize": 5})]
)
def test_any_part_equals_that_of_the_whole_image(seed, profile, compress, tmp_path):
    image = scene(seed, 93, 131)
    path = put(tmp_path / "a.tif", image, compress=compress, **profile)
    assert geotiff.kind(path, 10**6) == "scene" and geotiff.why_whole(path, scale=None, max_pixels=10**6) is None
    rng = np.random.default_rng(seed)
    with geotiff.opened(path, scale=None) as opened:
        assert opened.shape == image.shape
        np.testing.assert_array_equal(opened.whole(), read_image(path))
        for _ in range(5):
            (top, bottom), (left, right) = (
                np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in (93, 131)
            )
            np.testing.assert_array_equal(opened[top:bottom, left:right], image[top:bottom, left:right])


def test_grey_is_repeated(tmp_path):
    grey = scene(4, 40, 57)[..., :1]
    path = put(tmp_path / "a.tif", grey, photometric="MINISBLACK")
    with geotiff.opened(path, scale=None) as opened:
        np.testing.assert_array_equal(opened[3:20, 5:50], np.repeat(grey[3:20, 5:50], 3, axis=2))


def test_the_layout_describes_the_file_and_counts_missing_parts(tmp_path):
    path = put(tmp_path / "a.tif", scene(0, 93, 131), compress="deflate", **TILES)
    found = tiff.layout(path)
    assert (found.size, found.colours, found.dtype, found.orientation) == ((93, 131), 3, np.uint8, 1)
    assert found.is_plain and found.is_geotiff and (found.parts, found.missing, found.largest_part) == (9, 0, 2048)
    path.write_bytes(path.read_bytes()[:-20])
    assert tiff.layout(path).missing == 1
    with pytest.raises(ImageError, match="truncated: 1 of its 9"), geotiff.opened(path, scale=None):
        pass
    tifffile.imwrite(path, scene(0, 93, 131), photometric="rgb", rowsperstrip=31)
    found = tiff.layout(path)
    assert not found.is_geotiff and (found.parts, found.largest_part) == (3, 131)


def test_damaged_jpeg_tiles_are_refused(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    path = put(
        tmp_path / "a.tif", image, photometric="YCBCR", compress="jpeg", tiled=True, blockxsize=64, blockysize=64
    )
    with geotiff.opened(path, scale=None) as opened:
        # Decoders differ in how they interpolate colours.
        assert np.abs(opened.whole().astype(int) - read_image(path)).mean() < 20
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        start = file.pages.first.dataoffsets[4]
    data[start + 1500 : start + 1532] = b"\xff\xd9" * 16
    path.write_bytes(data)
    with geotiff.opened(path, scale=None) as opened:
        opened[0:64, 0:192]
        with pytest.raises(ImageError, match="part of its pixels would be made up"):
            opened[64:128, 0:192]


def test_nodata_pixels_get_the_ignore_label(tmp_path):
    image = 1 + scene(5, 60, 80) // 2
    image[10:20, 30:70] = 0
    with geotiff.opened(put(tmp_path / "a.tif", image, nodata=0, **TILES), scale=None) as opened:
        labels = np.full((30, 40), 3, np.uint8)
        expected = np.where((image == 0).all(axis=-1)[5:35, 20:60], 255, labels)
        np.testing.assert_array_equal(opened.masked(5, 20, labels, SPEC), expected)
    assert (expected == 255).sum() == 300


@pytest.mark.parametrize("compress", ["none", "deflate", "jpeg"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patches=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_arbitrary_tags_raise_only_image_errors(compress, patches, tmp_path):
    # rasterio would look into the file that it overwrites.
    (tmp_path / "a.tif").unlink(missing_ok=True)
    path = put(tmp_path / "a.tif", scene(0, 16, 21), compress=compress, nodata=7)
    changed = bytearray(path.read_bytes())
    for at, patch in patches:
        # Mostly in the tags.
        at %= min(len(changed), 600) if at % 3 else len(changed)
        changed[at : at + len(patch)] = patch
    path.write_bytes(changed)
    assert geotiff.kind(path, 10**6) in ("scene", "image", "unplaced")
    with contextlib.suppress(ImageError):
        geotiff.read(path, scale=(0, 255), max_pixels=2**20, in_parts="")

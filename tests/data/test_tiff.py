"""TIFF is read by its tags in any layout; damaged files, and files that the tags do not explain, are refused."""

import io
import itertools
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from segjax.data import codec
from segjax.inference.images import as_rgb, decode_upright
from tests.pixels import scene

HEIGHT, WIDTH = 37, 53


def written(array, **settings):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **settings)
    return file.getvalue()


def by_pillow(image, **settings):
    file = io.BytesIO()
    image.save(file, "TIFF", **settings)
    return file.getvalue()


@pytest.fixture
def seen(tmp_path):
    """uint8 (H, W, 3) as the model sees the content of a TIFF."""

    def read(data, **settings):
        path = tmp_path / "x.tif"
        path.write_bytes(data)
        return as_rgb(path, **settings)

    return read


# -------------------------------------------------------------------------------------------------------------- layout


COMPRESSIONS = (None, "lzw", "deflate", "packbits", "zstd", "lzma")


@pytest.mark.parametrize(("compression", "depth"), [*itertools.product(COMPRESSIONS, (8, 16)), ("webp", 8)])
def test_every_layout_of_the_same_pixels_gives_the_same_image(compression, depth, seen):
    image = scene(depth, HEIGHT, WIDTH)
    # Smooth, and every band another; with 16 bits the lower byte counts only in rounding.
    stored = image if depth == 8 else image.astype(np.uint16) * 257
    orders = (False, True) if compression in (None, "packbits", "webp") else (False,)
    tried = 0
    for order, big, planar, tile in itertools.product("<>", (False, True), (False, True), (None, (16, 32))):
        for predictor in (False,) if orders[-1] else (False, True):
            if compression == "webp" and (planar or order == ">"):
                continue
            data = written(
                np.moveaxis(stored, -1, 0) if planar else stored,
                photometric="rgb",
                planarconfig="separate" if planar else "contig",
                byteorder=order,
                bigtiff=big,
                tile=tile,
                rowsperstrip=None if tile else 10,
                compression=compression,
                predictor=predictor,
                compressionargs={"lossless": True} if compression == "webp" else None,
            )
            np.testing.assert_array_equal(seen(data), image)
            tried += 1
    assert tried >= 4


@pytest.mark.parametrize("tile", [None, (16, 32)])
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_jpeg_inside_a_tiff_has_the_colours_of_pillow(photometric, tile, seen):
    image = scene(3, HEIGHT, WIDTH)
    more = {"outcolorspace": "YCBCR"} if photometric == "ycbcr" else {}
    data = written(image, photometric="rgb", compression="jpeg", tile=tile, compressionargs={"level": 95} | more)
    assert np.abs(seen(data).astype(int) - image).mean() < 4
    file = by_pillow(Image.fromarray(image).convert("YCbCr"), compression="jpeg", quality=95)
    with Image.open(io.BytesIO(file)) as expected:
        np.testing.assert_array_equal(seen(file), np.asarray(expected.convert("RGB")))


def old_jpeg(content, height, width):
    """A TIFF as TIFF 6.0 first defined JPEG: Compression 6, and the stream named by JPEGInterchangeFormat."""
    place = 8 + 2 + 12 * 12 + 4
    entries = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, place), (259, 3, 1, 6), (262, 3, 1, 6)),
        *((273, 4, 1, place + 6), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(content)), (512, 3, 1, 1)),
        *((513, 4, 1, place + 6), (514, 4, 1, len(content))),
    ]
    packed = [
        struct.pack("<HHIHH" if kind == 3 and n == 1 else "<HHII", tag, kind, n, value, *[0] * (kind == 3 and n == 1))
        for tag, kind, n, value in entries
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(packed) + bytes(4)
    return head + struct.pack("<3H", 8, 8, 8) + content


@pytest.mark.parametrize(("seed", "size"), [(0, (37, 53)), (3, (48, 32))])
def test_jpeg_of_the_obsolete_kind_is_decoded_or_refused(seed, size, seen):
    image, file = scene(seed, *size), io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    content = file.getvalue()
    assert np.abs(seen(old_jpeg(content, *size)).astype(int) - image).mean() < 3
    damaged = content[: len(content) * 3 // 4] + b"\xff\xd9"
    for wrong in (content[:-60], damaged, content[2:], bytes(500), np.random.default_rng(seed).bytes(500)):
        with pytest.raises(codec.ImageError):
            decode_upright(old_jpeg(wrong, *size))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_extra_samples_that_the_tags_identify_are_dropped(planar, dtype, seen):
    image = scene(4, HEIGHT, WIDTH)
    rng = np.random.default_rng(0)
    factor = 1 if dtype == np.uint8 else 257
    extra = rng.integers(0, 256, (HEIGHT, WIDTH, 2), dtype=np.uint8)
    grey = np.stack([image[..., 0]] * 3, axis=-1)

    def file(bands, **more):
        array = np.dstack(bands).astype(dtype) * factor
        return written(np.moveaxis(array, -1, 0) if planar == "separate" else array, planarconfig=planar, **more)

    np.testing.assert_array_equal(
        seen(file([image, extra[..., :1]], photometric="rgb", extrasamples=["unassalpha"])), image
    )
    np.testing.assert_array_equal(seen(file([image, extra], photometric="rgb")), image)
    np.testing.assert_array_equal(
        seen(file([image[..., 0], extra[..., 0]], photometric="minisblack", extrasamples=["unassalpha"])), grey
    )
    # Without a photometric tag for RGB, GDAL writes three bands so.
    np.testing.assert_array_equal(seen(file([image], photometric="minisblack")), image)


@pytest.mark.parametrize("bands", [2, 4, 6, 12])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_bands_that_the_tags_do_not_explain_are_refused_and_counted(bands, planar, seen):
    array = np.random.default_rng(bands).integers(0, 256, (HEIGHT, WIDTH, bands), dtype=np.uint8)
    data = written(
        np.moveaxis(array, -1, 0) if planar == "separate" else array, photometric="minisblack", planarconfig=planar
    )
    with pytest.raises(ValueError, match=rf"x\.tif: has {bands} bands, and its tags do not state which are red.*gdal"):
        seen(data)


def test_palettes_negatives_and_few_bits_are_read_as_displayed(seen):
    image = scene(5, HEIGHT, WIDTH)
    grey, rng = image[..., 0], np.random.default_rng(0)
    threefold = np.stack([grey] * 3, axis=-1)
    palette = rng.integers(0, 256, (3, 256)).astype(np.uint16)
    for scale in (1, 256, 257):
        data = written(grey, photometric="palette", colormap=palette * scale)
        np.testing.assert_array_equal(seen(data), palette.T[grey])
    np.testing.assert_array_equal(seen(written(255 - grey, photometric="miniswhite")), threefold)
    wide = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(seen(written(65535 - wide, photometric="miniswhite")), threefold)
    bits = grey > 128
    np.testing.assert_array_equal(seen(written(bits, photometric="minisblack")), np.repeat(bits[..., None] * 255, 3, 2))
    np.testing.assert_array_equal(
        seen(written(~bits, photometric="miniswhite")), np.repeat(bits[..., None] * 255, 3, 2)
    )
    np.testing.assert_array_equal(
        seen(written(grey >> 4, photometric="minisblack", bitspersample=4)), threefold // 16 * 17
    )
    # The tag says that 4095 is white.
    twelve = written(grey.astype(np.uint16) * 16 + grey // 16, photometric="minisblack", bitspersample=12)
    np.testing.assert_array_equal(seen(twelve), threefold)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P", "1", "RGBA", "LA", "L"])
def test_every_mode_of_pillow_is_read_as_pillow_displays_it(mode, seen):
    image = Image.fromarray(scene(6, HEIGHT, WIDTH)).convert(mode)
    np.testing.assert_array_equal(seen(by_pillow(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_the_orientation_tag_is_that_of_exif(orientation, channels, seen):
    image = Image.fromarray(scene(7, HEIGHT, WIDTH))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = by_pillow(image.convert("L") if channels == 1 else image, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    np.testing.assert_array_equal(seen(data), np.asarray(expected))


def test_the_first_of_several_pages_is_read_unless_it_is_a_preview(seen):
    first, second = scene(8, HEIGHT, WIDTH), scene(9, 20, 31)
    for preview in (False, True):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            writer.write(first, photometric="rgb", subfiletype=int(preview))
            writer.write(second, photometric="rgb")
        if preview:
            with pytest.raises(ValueError, match="preview as its first page"):
                seen(file.getvalue())
        else:
            np.testing.assert_array_equal(seen(file.getvalue()), first)


def test_colour_spaces_other_than_rgb_are_refused_by_name(seen):
    image = scene(1, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="colours of the kind CIELAB"):
        seen(by_pillow(Image.merge("LAB", Image.fromarray(image).split())))
    with pytest.raises(ValueError, match="colours of the kind CFA"):
        seen(written(image[..., 0], photometric="cfa"))


# --------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.uint16, 0, 5700),
        (np.int16, -1000, 8000),
        (np.uint32, 0, 10**6),
        (np.float16, 0, 1),
        (np.float32, -0.5, 1.5),
        (np.float64, 0, 1e-3),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_without_a_known_scale_are_refused_unless_it_is_given(dtype, low, high, channels, seen):
    image = scene(2, HEIGHT, WIDTH)[..., :channels]
    stored = (image / 255.0 * (high - low) + low).astype(dtype)
    data = written(stored[..., 0] if channels == 1 else stored, photometric="minisblack" if channels == 1 else "rgb")
    with pytest.raises(ValueError, match=r"x\.tif: an image that cannot be used: .*--scale LOW HIGH"):
        seen(data)
    found = seen(data, scale=(low, high))
    assert np.abs(found.astype(int) - image).max() <= 1


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "jpeg"])
@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_a_truncated_tiff_is_refused_wherever_it_ends(compression, tile):
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    data = written(image, photometric="rgb", compression=compression, tile=tile, rowsperstrip=None if tile else 16)
    assert decode_upright(data)[0].shape == (64, 80, 3)
    for share in np.linspace(0.001, 0.999, 40):
        with pytest.raises(codec.ImageError):
            decode_upright(data[: int(len(data) * share)])


@pytest.mark.parametrize("compression", ["deflate", "lzma", "jpeg"])
@pytest.mark.parametrize("seed", [0, 1])
def test_damage_in_a_stream_with_a_checksum_is_refused(compression, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    data = written(image, photometric="rgb", compression=compression, rowsperstrip=16)
    whole, _ = decode_upright(data)
    refused = 0
    for _ in range(20):
        at = int(rng.integers(len(data) // 3, len(data) - 200))
        try:
            found, _ = decode_upright(data[:at] + bytes(64) + data[at + 64 :])
        except codec.ImageError:
            refused += 1
        else:
            # The last bits of a strip, which are not read.
            np.testing.assert_array_equal(found, whole)
    assert refused >= 15


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_missing_strips_and_tiles_are_counted_and_refused(tile):
    image = scene(0, 64, 80)
    data = bytearray(written(image, photometric="rgb", tile=tile, compression="deflate", rowsperstrip=8))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages.first.tags[325 if tile else 279]
    at = tag.valueoffset
    data[at : at + struct.calcsize("<H") * (2 if tag.dtype == 4 else 1)] = bytes(4 if tag.dtype == 4 else 2)
    total = 20 if tile else 8
    with pytest.raises(codec.ImageError, match=rf"truncated: 1 of its {total} strips or tiles are missing"):
        decode_upright(bytes(data))


WHOLE = [
    written(scene(0, 16, 21), photometric="rgb"),
    written(scene(0, 16, 21), photometric="rgb", compression="deflate", predictor=True, tile=(16, 16)),
    written(scene(0, 16, 21)[..., 0], photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
    written(scene(0, 16, 21), photometric="rgb", compression="jpeg", byteorder=">"),
    written(np.moveaxis(scene(0, 16, 21), -1, 0), photometric="rgb", planarconfig="separate", bigtiff=True),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), max_size=4)
)
def test_arbitrary_tags_raise_only_image_errors_and_repeatably(data, patches):
    changed = bytearray(data)
    for at, patch in patches:
        at %= len(changed)
        changed[at : at + len(patch)] = patch

    def read():
        try:
            return decode_upright(bytes(changed), max_pixels=2**20)[0]
        except codec.ImageError as error:
            return np.frombuffer(str(error).partition(" 0x")[0].encode(), np.uint8)

    # Memory that nobody wrote would differ.
    np.testing.assert_array_equal(read(), read())

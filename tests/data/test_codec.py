"""Image files are recognised by content, sized by their header, and refused if a decoder would invent pixels."""

import io
import resource
import struct
import subprocess
import sys
import zlib
from functools import partial

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segjax.data import codec
from segjax.inference.images import decode_upright
from tests.pixels import scene

FORMATS = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "TIFF": {},
    "WebP": {"lossless": True},
    "BMP": {},
    "GIF": {},
}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encoded(image, name, **more):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, name, **more)
    return file.getvalue()


def damaged_jpeg(seed=0, *, length=2000, at=0.5):
    """A JPEG of noise, 96 x 128, with zeros in its middle. Every structure of the file is whole."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    data = bytearray(encoded(pixels, "JPEG", quality=90))
    start = int(len(data) * at)
    data[start : start + length] = bytes(length)
    return bytes(data)


def png_of(size, rows, *, extra=b"", color_type=2):
    header = struct.pack(">IIBBBBB", size[1], size[0], 8, color_type, 0, 0, 0)
    pixels = rows if isinstance(rows, bytes) else zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return codec.PNG + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_format_is_read_from_the_content_and_the_size_from_the_header(name, seed):
    image = scene(seed, 21 + seed, 30)
    data = encoded(image, name, **FORMATS[name])
    assert codec.format_of(data[:32]) == name
    if name != "TIFF":
        assert codec.size_of(data) == (21 + seed, 30)
    found, white = decode_upright(data)
    assert found.shape == image.shape and white == 255
    assert np.abs(found.astype(int) - image).mean() < (8 if name in ("GIF", "JPEG") else 1e-9)


def test_the_header_of_every_kind_of_webp_jpeg_and_bmp_has_the_size():
    image = scene(0, 37, 53)
    alpha = np.dstack([image, image[..., 0]])
    for data in (
        encoded(image, "WebP", quality=80),
        encoded(alpha, "WebP", quality=80),
        encoded(alpha, "WebP", lossless=True),
        encoded(image, "JPEG", progressive=True),
        encoded(image[..., 0], "JPEG"),
        encoded(image[..., 0], "BMP"),
    ):
        assert codec.size_of(data) == (37, 53)


@pytest.mark.parametrize("head", [b"", b"BM: a text of biology, 1234567890", b"RIFF1234WAVE", b"<html>", b"\xff\xd8"])
def test_other_files_are_not_taken_for_images(head):
    assert codec.format_of(head) is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.binary(max_size=40), st.integers(0, 60), st.integers(0, 80))
def test_reading_the_size_of_arbitrary_bytes_raises_nothing(name, patch, start, cut):
    data = bytearray(encoded(scene(0, 9, 14), name))
    data[start : start + len(patch)] = patch
    data = bytes(data[: max(len(data) - cut, 0)])
    size = codec.size_of(data)
    assert size is None or len(size) == 2
    try:
        found, _ = decode_upright(data, max_pixels=2**16)
    except codec.ImageError as error:
        assert str(error)
    else:
        assert found.ndim in (2, 3) and found.size


def bomb(name):
    """A small file whose header has 30,000 x 40,000 pixels."""
    height, width = 30_000, 40_000
    if name == "PNG":
        return png_of((height, width), zlib.compress(bytes(10**6)))
    data = bytearray(encoded(scene(0, 16, 16), name, **FORMATS[name]))
    if name == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif name == "BMP":
        data[18:26] = struct.pack("<ii", width, -height)
    elif name == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif name == "WebP":
        # 14 bits each are the most that a header without VP8X holds.
        data[21:25] = struct.pack("<I", 16383 | 16382 << 14)
    else:
        tags = dict(struct.iter_unpack("<H10s", data[10 : 10 + 12 * struct.unpack_from("<H", data, 8)[0]]))
        assert {256, 257} <= set(tags)
        for number, value in ((256, width), (257, height)):
            at = 10 + 12 * list(tags).index(number)
            data[at : at + 12] = struct.pack("<HHII", number, 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_the_size_is_read_before_anything_is_decoded(name, tmp_path):
    data = bomb(name)
    assert len(data) < 10**5
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(codec.ImageError, match=r"pixels, [\d,]+, more than 178,956,970; .*--max-pixels"):
        decode_upright(data)
    # KiB; the image itself would take more than 700 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


@pytest.mark.parametrize("name", FORMATS)
def test_the_limit_on_pixels_is_enforced_and_can_be_raised(name):
    data = encoded(scene(0, 20, 30), name, **FORMATS[name])
    assert decode_upright(data, max_pixels=600)[0].shape == (20, 30, 3)
    # 16 bits take twice the memory.
    deep = cv2.imencode(".png", np.full((20, 30, 3), 40_000, np.uint16))[1].tobytes()
    assert decode_upright(deep, max_pixels=1200)[0].dtype == np.uint16
    with pytest.raises(codec.ImageError, match="600, more than 599"):
        decode_upright(deep, max_pixels=1199)
    with pytest.raises(codec.ImageError, match="has 20x30 pixels, 600, more than 599"):
        decode_upright(data, max_pixels=599)


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_datasets_refuse_decompression_bombs(name):
    data = bomb(name)
    assert codec.damage(data) is None
    assert codec.fault_of_image(data) == "images of more than 178,956,970 pixels; cut them up"
    if name == "PNG":
        grey = png_of((30_000, 40_000), b"", color_type=0)
        of_mask = partial(codec.fault_of_mask, wide=False, binary=False)
        assert all("178,956,970" in fault(grey) for fault in (of_mask, codec.fault_of_published_mask))


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_jpeg_with_a_damaged_middle_is_refused(seed, at):
    data = damaged_jpeg(seed, at=at)
    assert codec.damage(data) is None
    for decode in (decode_upright, codec.decode_undamaged):
        with pytest.raises(codec.ImageError, match="part of its pixels would be made up"):
            decode(data)
    # A published data set is read as it is.
    assert codec.decode_image(data).shape == (96, 128, 3)


@pytest.mark.parametrize("more", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 0}])
def test_an_intact_jpeg_is_not_refused(more):
    image = scene(1, 50, 70)
    found, _ = decode_upright(encoded(image, "JPEG", quality=95, **more))
    assert np.abs(found.astype(int) - image).mean() < 4
    odd = encoded(image, "JPEG", quality=95, **more) + b"what a camera appends"
    np.testing.assert_array_equal(decode_upright(odd)[0], found)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "WebP", "BMP", "GIF"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_truncated_file_is_refused(name, seed):
    image = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encoded(image, name, **FORMATS[name])
    for share in (0.05, 0.3, 0.6, 0.95):
        with pytest.raises(codec.ImageError):
            decode_upright(data[: int(len(data) * share)])


def test_a_png_with_missing_pixels_is_refused():
    image = scene(0, 40, 50)
    for rows in (zlib.compress(b"".join(b"\0" + row.tobytes() for row in image[:20])), b"no stream", b""):
        with pytest.raises(codec.ImageError, match="damaged PNG"):
            decode_upright(png_of((40, 50), rows))


@pytest.mark.parametrize("height", [1, 30, 39])
def test_a_png_with_more_rows_than_its_header_states_is_refused(height):
    data = png_of((height, 50), zlib.compress(b"".join(b"\0" + row.tobytes() for row in scene(0, 40, 50))))
    for decode in (decode_upright, codec.decode_undamaged):
        with pytest.raises(codec.ImageError, match="more pixels than the size in its header"):
            decode(data)


def test_messages_of_libraries_do_not_reach_the_terminal():
    """libjpeg, libpng and OpenCV write to descriptor 2 themselves."""
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))
    image = scene(0, 40, 50)
    files = [damaged_jpeg(), png_of((40, 50), image, extra=profile), png_of((40, 50), b"no stream", extra=profile)]
    code = (
        "import sys, numpy as np\n"
        "from segjax.data import codec\n"
        f"for data in {files!r}:\n"
        "    for decode in (codec.decode_upright, codec.decode_image, codec.decode_mask, codec.decode_undamaged):\n"
        "        try: decode(data)\n"
        "        except codec.ImageError: pass\n"
        "print('end', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "end\n"
    # Without the capture they are there.
    plain = f"import cv2, numpy as np\nfor data in {files!r}: cv2.imdecode(np.frombuffer(data, np.uint8), 1)"
    done = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert "Corrupt JPEG" in done.stderr and "libpng" in done.stderr


# ------------------------------------------------------------------------------------------------------------- formats


def test_a_gif_is_read_in_its_colours_also_for_datasets():
    """The published Oxford-IIIT Pet has GIFs named .jpg."""
    few = scene(0, 21, 30) // 64 * 64
    data = encoded(Image.fromarray(few).quantize(64), "GIF")
    assert codec.damage(data) is None and codec.fault_of_image(data) is None
    np.testing.assert_array_equal(codec.decode_undamaged(data), few)
    np.testing.assert_array_equal(decode_upright(data)[0], few)
    assert "GIF" in codec.fault_of_mask(data, wide=False, binary=False)
    assert codec.damage(data[:-60])


@pytest.mark.parametrize("color_type", [0, 2, 3, 4, 6])
def test_opencv_gives_the_colours_of_every_png(color_type):
    image = scene(1, 21, 30) // 64 * 64
    alpha = np.random.default_rng(0).integers(1, 256, (21, 30, 1), dtype=np.uint8)
    expected = np.stack([image[..., 0]] * 3, axis=-1) if color_type in (0, 4) else image
    data = {
        0: lambda: encoded(image[..., 0], "PNG"),
        2: lambda: encoded(image, "PNG"),
        3: lambda: encoded(Image.fromarray(image).quantize(64), "PNG"),
        4: lambda: encoded(np.dstack([image[..., :1], alpha]), "PNG"),
        6: lambda: encoded(np.dstack([image, alpha]), "PNG"),
    }[color_type]()
    assert data[25] == color_type
    np.testing.assert_array_equal(decode_upright(data)[0], expected)
    np.testing.assert_array_equal(codec.decode_image(data), expected)


def test_decoding_gives_opencvs_pixels():
    data = encoded(scene(2, 50, 70), "JPEG", quality=90)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(codec.decode_image(data), expected)
    np.testing.assert_array_equal(decode_upright(data)[0], expected)

"""What decodes to which pixels, and what is refused with which reason."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from manyheads.core.errors import BadRecord
from manyheads.vision import images

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@pytest.fixture
def picture():
    """A smooth picture of 60 x 80 pixels with a corner that tells how it is turned."""
    rows, columns = np.mgrid[0:60, 0:80]
    pixels = np.stack([rows * 4, columns * 3, 255 - rows - columns], axis=2).astype(np.uint8)
    pixels[:10, :20] = (255, 0, 0)
    return Image.fromarray(pixels)


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reason(data, **options):
    with pytest.raises(BadRecord) as caught:
        images.decode(data, **options)
    return str(caught.value)


def png(width, height, rows, bits=8, colour=0):
    """A PNG, chunk by chunk: rows are bytes without their filter byte."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_by_content_not_by_name(picture, tmp_path, kind):
    path = tmp_path / "lies.txt"
    path.write_bytes(encode(picture, kind))
    found = images.decode(path)
    assert (found.mode, found.size) == ("RGB", (80, 60))
    limit = {"JPEG": 30, "WEBP": 30, "GIF": 40}.get(kind, 0)  # lossy, or 256 colours
    assert np.abs(np.asarray(found).astype(int) - np.asarray(picture)).mean() <= limit / 10
    assert images.decode(path, channels=1).mode == "L"
    assert np.array_equal(images.decode(path), images.decode(path.read_bytes()))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7])
def test_truncated(picture, kind, share):
    data = encode(picture, kind)
    name = {"WEBP": "WebP", "PPM": "PPM"}.get(kind, kind)
    said = reason(data[: max(4, int(len(data) * share))])
    assert f"a damaged or truncated {name} (" in said


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(picture, kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind != "PNG" else {}
    data = encode(picture, kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    found = np.asarray(images.decode(data))
    assert found.shape == ((60, 80, 3) if orientation < 5 else (80, 60, 3))
    assert np.array_equal(found, wanted)


def test_damaged_exif_leaves_the_picture_upright(picture):
    data = encode(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense")
    assert images.decode(data).size == (80, 60)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_is_white(kind, channels):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    if kind != "GIF":
        image.putpixel((1, 0), (0, 0, 0, 128))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = np.asarray(images.decode(encode(image, kind, **options), channels)).reshape(2, 4, channels)
    assert (found[1] == 255).all()
    assert (found[0, 0] == 10).all()
    if kind != "GIF":
        assert (found[0, 1] == 127).all()


def test_palette_with_transparency_and_grey_with_alpha():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    data = encode(image, "PNG", transparency=0)
    assert np.asarray(images.decode(data)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    image = Image.new("LA", (1, 1), (100, 0))
    assert np.asarray(images.decode(encode(image, "PNG"))).tolist() == [[[255, 255, 255]]]
    found = images.decode(encode(Image.new("1", (2, 2), 1), "PNG"))
    assert np.asarray(found).min() == 255


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)
    assert np.abs(np.asarray(images.decode(data)).astype(int) - (255, 0, 0)).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    wanted = np.round(values / 257).astype(int).tolist()
    rows = [values.astype(">u2").tobytes()]
    assert np.asarray(images.decode(png(9, 1, rows, bits=16), 1)).tolist() == wanted
    grey = Image.fromarray(values)
    for kind in ("TIFF", "PPM"):
        assert np.asarray(images.decode(encode(grey, kind), 1)).tolist() == wanted
    big = encode(grey, "TIFF", compression="tiff_adobe_deflate")
    assert np.asarray(images.decode(big, 1)).tolist() == wanted


def test_a_tiff_whose_zero_is_white_is_inverted():
    values = np.array([[0, 65535, 257]], dtype=np.uint16)
    data = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.asarray(images.decode(data, 1)).tolist() == [[255, 0, 254]]


@pytest.mark.parametrize(
    ("mode", "says"),
    [("F", "floating-point samples"), ("I", "32-bit or signed integer samples"), ("LAB", "colours in LAB")],
)
def test_samples_without_a_range_are_refused(mode, says):
    assert says in reason(encode(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(images.decode(data)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"these are words, not pixels\n", "text, not an image"),
        (b"<!DOCTYPE html><html></html>", "not an image that is read here (HTML or XML)"),
        (b"%PDF-1.7\n\x93", "not an image that is read here (PDF)"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            "not an image that is read here (PostScript)",
        ),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "not an image that is read here (HEIC"),
        (bytes(range(128, 256)) * 8, "not an image that is read here"),
        (b"\x89PNG\r\n\x1a\n", "a damaged or truncated PNG"),
        (png(0, 4, []), "a damaged or truncated PNG"),
        (b"P5 0 0 255\n", "a damaged or truncated PPM"),
    ],
)
def test_what_is_no_image(data, says):
    assert says in reason(data)


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    data = png(30_000, 30_000, [])  # a header, and nothing after it
    assert "too many pixels" in reason(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a program that switched PIL's own guard off
    assert reason(data) == "too many pixels: 30000 x 30000, at most 178,956,970"
    monkeypatch.setattr(images, "MAX_BYTES", 10 << 20)
    assert reason(bytes(11 << 20)) == "too large: 11 MiB, at most 10"


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused():
    plain = png(1, 1, [b"\0"])
    content = b"k\0\0" + zlib.compress(bytes(20 << 20))
    bomb = struct.pack(">I", len(content)) + b"zTXt" + content
    bomb += struct.pack(">I", zlib.crc32(b"zTXt" + content))
    assert "a damaged or truncated PNG" in reason(plain[:33] + bomb + plain[33:])


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    assert reason(tmp_path / "missing.jpg") == "no such file"
    assert reason(tmp_path) == "not a file"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not a file"
    (tmp_path / "empty.jpg").touch()
    assert reason(tmp_path / "empty.jpg") == "an empty file"
    assert reason(tmp_path / ("x" * 300)) == "cannot be read: file name too long"
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(5 << 20)
    assert reason(tmp_path / "sparse.jpg") == "too large: 5 MiB, at most 1"


def test_a_large_jpeg_is_decoded_smaller_but_never_below_twice_the_target(picture):
    large = picture.resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encode(large, "JPEG", quality=95)
    sizes = {n: images.decode(data, at_least=n).size for n in (75, 76, 150, 300, 301, 600, 601)}
    assert sizes[75] == (200, 150)  # 1/8: 150 is twice 75
    assert sizes[76] == sizes[150] == (400, 300)
    assert sizes[300] == (800, 600)
    assert sizes[301] == sizes[600] == sizes[601] == (1600, 1200)
    whole = images.decode(data).resize((80, 60), Image.Resampling.BICUBIC)
    small = images.decode(data, at_least=60).resize((80, 60), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(whole).astype(int) - np.asarray(small))
    assert difference.mean() < 1.0
    assert np.array_equal(images.decode(data, at_least=60), images.decode(data, at_least=60))


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_anywhere_is_an_image_or_a_reason(picture, kind):
    """Bytes flipped at random: pixels or a BadRecord, and nothing else, from several threads."""
    data, failures = encode(picture, kind), []

    def flip(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 12)):
                broken[place] ^= rng.integers(1, 256)
            try:
                assert images.decode(bytes(broken)).mode == "RGB"
            except BadRecord as error:
                assert str(error)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=flip, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


SILENT = """
import io, sys
import numpy as np
from PIL import Image
from manyheads.core.errors import BadRecord
from manyheads.vision.images import decode
pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
for options in ({"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"}):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF", **options)
    for seed in range(60):
        broken, rng = bytearray(out.getvalue()), np.random.default_rng(seed)
        for place in rng.integers(8, len(broken), 20):
            broken[place] ^= 0xFF
        try:
            decode(bytes(broken))
        except BadRecord:
            pass
image = Image.new("1", (11000, 11000))  # PIL warns above 89 million pixels
out = io.BytesIO()
image.save(out, "PNG")
assert decode(out.getvalue(), 1).size == (11000, 11000)
"""


def test_nothing_is_printed():
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

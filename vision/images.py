"""Encoded images to pixels: what can be decoded is, everything else is a `BadRecord` with a plain reason.

JPEG, PNG, WebP, GIF, BMP, TIFF and PPM, told by their content, never by their name. Of an animation or a
TIFF of several pages the first frame counts. EXIF orientation is applied, colour profiles are not. What is
transparent is laid on white. Grey samples of 9 to 16 bits are scaled to 8, never clipped; integers of 32
bits, signed ones and floats have no range that a file would tell, and are refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import warnings
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin, _imaging

from manyheads.core.errors import BadRecord

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
NAMED = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"
MAX_PIXELS = 178_956_970  # where PIL raises, too
MAX_BYTES = 512 << 20
_LARGE = 25_000_000  # pixels; above this one image at a time is decoded in a process, for memory
_large = threading.Lock()
_ORIENTATION = 0x0112  # the tag, of EXIF and of TIFF
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHERS = (  # what is found in image folders and is none of ours: offset, bytes, name
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "HEIC or a film"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"<svg", "SVG"),
    (0, b"<", "HTML or XML"),
)
_OURS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"RIFF", "WebP"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    *((b"P%d" % n, "PPM") for n in range(1, 7)),
)

# PIL warns of odd files on the standard error, a line or more each; here each file gets its answer. A filter
# for the process, as those of warnings.catch_warnings are no thread's own.
warnings.filterwarnings("ignore", module=r"PIL\.")
with suppress(
    AttributeError, OSError
):  # a PIL without libtiff, or a system that does not look in libraries' own
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)  # it prints, too; PIL goes by what it returns


def decode(data: bytes | Path, channels: int = 3, at_least: int | None = None) -> Image.Image:
    """Decode an image.

    Args:
        data: The encoded bytes, or the file that has them.
        channels: 3 for mode RGB, 1 for mode L.
        at_least: Lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, which costs far less, as long as both
            sides keep at least twice this number of pixels; other formats come whole. Always the same
            pixels for the same bytes and number.

    Raises:
        BadRecord: It cannot be read or decoded, or is too large; with the reason.
    """
    if channels not in (1, 3):
        raise ValueError(f"an image has 3 channels or 1, not {channels}")
    content = read(data) if isinstance(data, Path) else data
    if len(content) > MAX_BYTES:
        raise BadRecord(f"too large: {len(content) >> 20} MiB, at most {MAX_BYTES >> 20}")
    if not content:
        raise BadRecord("an empty file")
    kind = next((name for magic, name in _OURS if content.startswith(magic)), "image")
    try:
        return _decode(content, channels, at_least)
    except BadRecord:
        raise
    except Image.DecompressionBombError:
        raise BadRecord(f"too many pixels: at most {MAX_PIXELS:,} are decoded") from None
    except UnidentifiedImageError:
        raise BadRecord(_unidentified(content, kind)) from None
    except MemoryError:
        raise BadRecord(f"a {kind} that asks for more memory than there is") from None
    except Exception as error:  # PIL's decoders raise what their parsers happen to: OSError, struct.error ...
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadRecord(f"a damaged or truncated {kind} ({said})") from None


def read(path: Path) -> bytes:
    """Read a file that should hold an image.

    Raises:
        BadRecord: It is missing, no regular file, too large, or may not be read.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise BadRecord("not a file")  # a pipe would wait for ever
        if about.st_size > MAX_BYTES:
            raise BadRecord(f"too large: {about.st_size >> 20} MiB, at most {MAX_BYTES >> 20}")
        return path.read_bytes()
    except FileNotFoundError:
        raise BadRecord("no such file") from None
    except ValueError:  # a zero byte in the name
        raise BadRecord("not the name of a file") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # this process' trouble, not the file's
        raise BadRecord(f"cannot be read: {os.strerror(error.errno or 0).lower()}") from None


def _decode(content: bytes, channels: int, at_least: int | None) -> Image.Image:
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise BadRecord(f"no pixels: {width} x {height}")
        if width * height > MAX_PIXELS:
            raise BadRecord(f"too many pixels: {width} x {height}, at most {MAX_PIXELS:,}")
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * at_least, 2 * at_least))
        large = image.size[0] * image.size[1] > _LARGE
        with _large if large else nullcontext():
            inverted = _is_inverted(image)
            bits = _bits(image)
            image.load()
            plain = _to_mode(image, channels, bits, inverted)
            turned = _TRANSPOSED.get(_orientation(image))
            return plain if turned is None else plain.transpose(turned)


def _to_mode(image: Image.Image, channels: int, bits: int, inverted: bool) -> Image.Image:
    """Convert to RGB or L."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I"):
        return _to_eight_bits(image, bits, inverted).convert(mode)
    if image.mode == "F":
        raise BadRecord("floating-point samples, which have no fixed range: convert it to 8 or 16 bits")
    if image.mode in ("LAB", "HSV"):
        raise BadRecord(f"colours in {image.mode}: convert it to RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        image = white
    elif image.mode in ("P", "CMYK", "YCbCr", "RGBX", "RGBA", "RGBa", "PA"):
        image = image.convert("RGB")
    plain = image.convert(mode)
    return plain.copy() if plain is image else plain  # the file's own image is closed with it


def _to_eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """Scale grey samples of up to 16 bits."""
    if not bits:
        raise BadRecord(
            "32-bit or signed integer samples, which have no fixed range: convert it to 8 or 16 bits"
        )
    top = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)  # I;16B comes in its own byte order
    values = (values * 255 + top // 2) // top  # rounded; 65535 is 255, and 257 is 1
    return Image.fromarray((255 - values if inverted else values).astype(np.uint8))


def _bits(image: Image.Image) -> int:
    """The bits of a grey sample beyond 8; 0 where they are of no fixed range."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 16  # PNG says so, and PIL scales PGM's maximum to it
    bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
    sign = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
    return int(bits) if sign == 1 and bits <= 16 else 0


def _is_inverted(image: Image.Image) -> bool:
    """Tell whether a TIFF's zero is white, which PIL minds up to 8 bits only."""
    return (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is left to apply; PIL applies a TIFF's itself."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF beside good pixels: upright, as every viewer shows it
        return 1


def _unidentified(content: bytes, kind: str) -> str:
    """Say what content is that PIL does not know."""
    if kind != "image":
        return f"a damaged or truncated {kind} (its header cannot be read)"
    start = content[:512].lstrip()
    for offset, magic, name in _OTHERS:
        if start[offset:].startswith(magic):
            return f"not an image that is read here ({name}): {NAMED}"
    try:
        content[:512].decode("ascii")
    except UnicodeDecodeError:
        return f"not an image that is read here: {NAMED}"
    return f"text, not an image: {NAMED}"


assert WebPImagePlugin.SUPPORTED  # imported for PIL's list of formats, which has it only then

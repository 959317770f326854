"""Encoded images to pixels: what can be decoded is, everything else is a `BadRecord` with a plain reason.

JPEG, PNG, WebP, GIF, BMP, TIFF and PPM, told by their content, never by their name. Of an animation or a
TIFF of several pages the first frame counts. EXIF orientation is applied; colour profiles are not. What is
transparent is laid on white. Samples of 16 bits (and 12, in TIFF) are scaled to 8, never clipped.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from manyheads.core.errors import BadRecord

MAX_PIXELS = 178_956_970  # twice PIL's own limit, where it raises instead of warning
MAX_BYTES = 512 << 20


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
    raise BadRecord("not written yet")

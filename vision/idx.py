"""The idx format of MNIST and its successors: images and labels in two files, packed or not.

Source: http://yann.lecun.com/exdb/mnist (the format's description).
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manyheads.core.errors import DataError

_MOST = 4 << 30  # bytes of one file, unpacked


class Pixels:
    """Images as arrays, of one size.

    Shape:
        pixels `[n, H, W]` or `[n, H, W, 3]`, uint8.
    """

    def __init__(self, pixels: NDArray[np.uint8], first_test: int) -> None:
        self.pixels, self.first_test = pixels, first_test

    def __len__(self) -> int:
        return len(self.pixels)

    def id(self, index: int) -> str:
        """Return the part and the number there."""
        test = index >= self.first_test
        return f"test/{index - self.first_test}" if test else f"train/{index}"

    def image(self, index: int, channels: int, at_least: int | None = None) -> Image.Image:
        """Return an image."""
        return Image.fromarray(self.pixels[index]).convert("RGB" if channels == 3 else "L")

    def digest(self, index: int) -> bytes:
        """Return a checksum of an image."""
        return hashlib.blake2b(self.pixels[index].tobytes(), digest_size=16).digest()


def read(path: Path) -> NDArray[np.uint8]:
    """Read a file of bytes of any shape.

    Raises:
        DataError: It is no such file, or not whole.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is no idx file of bytes")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", content[3], 4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if len(values) != int(np.prod(shape, dtype=object)):
        raise DataError(f"{path}: {len(values)} bytes after the header, which says {shape}")
    return values.reshape(shape)


def _file(folder: Path, part: str, kind: str) -> Path | None:
    name = f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def is_folder(folder: Path) -> bool:
    """Tell whether a folder holds such a data set."""
    return _file(folder, "train", "images") is not None


def read_folder(folder: Path) -> tuple[Pixels, NDArray[np.int64], int]:
    """Read the train and the test images (`train-*`, `t10k-*`).

    Returns:
        The images, the class of each, and the number of the first test image.

    Raises:
        DataError: A file is missing, or the files do not fit each other.
    """
    found: dict[str, list[NDArray[np.uint8]]] = {"images": [], "labels": []}
    for part in ("train", "t10k"):
        for kind, arrays in found.items():
            path = _file(folder, part, kind)
            if path is None:
                raise DataError(
                    f"{folder}: no file {part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte[.gz]"
                )
            arrays.append(read(path))
        images, labels = found["images"][-1], found["labels"][-1]
        if images.ndim not in (3, 4) or labels.shape != (len(images),):
            raise DataError(f"{folder}: {part} has images {images.shape}, but labels {labels.shape}")
    train, test = found["images"]
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{folder}: train images of {train.shape[1:]}, test images of {test.shape[1:]}")
    targets = np.concatenate(found["labels"]).astype(np.int64)
    return Pixels(np.concatenate([train, test]), len(train)), targets, len(train)

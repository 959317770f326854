"""What oneDNN keeps of each shape that it has seen: bounded, where every batch has another one."""

from __future__ import annotations

import os

# PyTorch's own cache, and the library's: each keeps what it made for 1024 shapes, half a MB and more apiece.
_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
_SHAPES = "8"  # those of one layer after another are used again


def forget_shapes() -> None:
    """Keep no more than a batch's shapes, from here on and where the environment says nothing else.

    Packed batches have another number of rows each, and by what was made for each of them memory would grow
    by a GiB. Both caches take their size when a process first uses them: call it before.
    """
    for name in _CACHES:
        os.environ.setdefault(name, _SHAPES)

"""How the kernels of window attention are launched: the shipped table.

A row belongs to a kernel, an architecture and the bits of the dtype. Its entries are (block of queries, block
of keys, warps, stages) for the padded head dims 16, 32, 64, 128 and (half precision only) 256. "short" is the
forward of windows, or packs of them, that fit 64 rows; "small" the backward that does all gradients of those
at once, where it fits the registers: elsewhere they take the three kernels of larger windows.
"""

from __future__ import annotations

from manyheads.core.ops.attention.triton_configs import Config, _row

SHORT = 64  # rows of a tile that holds whole windows

# fmt: off
CONFIGS: dict[tuple[str, int, int], dict[int, Config]] = {
    ("forward", 90, 16): _row((64,64,4,2), (64,64,4,2), (64,64,4,2), (64,64,8,2), (32,32,4,1)),
    ("forward", 80, 16): _row((64,64,4,2), (64,64,4,2), (64,64,4,2), (64,64,8,2), (32,32,8,1)),
    ("short", 90, 16): _row((64,32,4,1), (64,32,4,1), (64,64,4,1), (64,64,8,1), (32,32,4,1)),
    ("short", 80, 16): _row((64,32,4,1), (64,32,4,1), (64,64,4,1), (64,64,8,1), (32,32,8,1)),
    ("small", 90, 16): _row((64,64,4,1), (64,64,4,1), (64,64,8,1)),
    ("small", 80, 16): _row((64,64,4,1), (64,64,4,1), (64,64,8,1), (64,64,8,1)),
    ("key", 90, 16): _row((64,64,8,2), (64,64,8,2), (64,64,8,1), (32,64,8,1), (32,32,8,1)),
    ("key", 80, 16): _row((64,64,8,1), (64,64,8,1), (32,64,8,1), (32,32,8,1), (32,32,8,1)),
    ("query", 90, 16): _row((64,64,4,2), (64,64,4,2), (64,64,8,2), (64,32,8,1), (32,32,4,1)),
    ("query", 80, 16): _row((64,64,8,2), (64,64,8,2), (64,32,8,1), (32,32,8,1), (32,32,8,1)),
    ("bias", 90, 16): _row((64,64,8,1), (64,64,8,1), (64,64,8,1), (64,32,8,1), (16,16,8,1)),
    ("bias", 80, 16): _row((64,64,8,1), (64,64,8,1), (64,32,8,1), (32,16,8,1), (16,16,8,1)),
    ("forward", 90, 32): _row((64,32,8,1), (64,32,4,1), (32,32,8,1), (16,16,4,1)),
    ("forward", 80, 32): _row((64,32,4,1), (64,32,4,1), (32,32,8,1), (16,16,8,1)),
    ("short", 90, 32): _row((64,32,8,1), (64,32,8,1), (32,32,8,1), (16,16,4,1)),
    ("short", 80, 32): _row((64,32,4,1), (64,32,4,1), (32,32,8,1), (16,16,8,1)),
    ("small", 90, 32): _row((64,64,8,1), (64,64,8,1)),
    ("small", 80, 32): _row((64,64,8,1), (64,64,8,1)),
    ("key", 90, 32): _row((32,32,8,1), (32,32,8,1), (32,32,8,1), (16,16,8,1)),
    ("key", 80, 32): _row((32,32,4,1), (32,32,8,1), (32,32,8,1), (16,16,8,1)),
    ("query", 90, 32): _row((32,32,4,1), (32,32,8,1), (16,32,8,1), (16,16,8,1)),
    ("query", 80, 32): _row((32,32,4,1), (32,32,4,1), (32,32,8,1), (16,16,8,1)),
    ("bias", 90, 32): _row((32,32,8,1), (32,32,8,1), (32,32,8,1), (16,16,8,1)),
    ("bias", 80, 32): _row((32,32,8,1), (32,32,8,1), (32,32,8,1), (16,16,8,1)),
}
# fmt: on

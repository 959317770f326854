"""How the kernels of packed attention are launched: the shipped table.

A row belongs to a kernel, an architecture and the bits of the dtype. Its entries are (block of queries, block
of keys, warps, stages) for the padded head dims 16, 32, 64, 128 and (half precision only) 256. Each entry is
the first of those tried, largest first, that spills no registers with and without a bias.
"""

from __future__ import annotations

from manyheads.core.ops.attention.triton_configs import Config, _row

# fmt: off
CONFIGS: dict[tuple[str, int, int], dict[int, Config]] = {
    ("forward", 90, 16): _row((64,64,8,2), (64,64,8,2), (64,64,8,2), (64,32,8,2), (32,64,8,2)),
    ("forward", 80, 16): _row((128,64,8,2), (64,64,8,2), (64,64,8,2), (32,32,4,2), (32,32,8,1)),
    ("key", 90, 16): _row((64,64,4,2), (64,64,8,2), (32,64,8,2), (32,16,8,1), (32,32,8,1)),
    ("key", 80, 16): _row((64,32,4,2), (32,64,4,2), (32,32,8,1), (32,32,4,1), (32,32,8,1)),
    ("query", 90, 16): _row((64,64,4,2), (64,64,4,2), (64,64,4,2), (64,64,8,2), (32,32,4,2)),
    ("query", 80, 16): _row((64,64,8,2), (64,32,8,2), (64,32,8,2), (64,64,8,2), (16,16,8,1)),
    ("relative", 90, 16): _row((64,64,8,2), (64,64,8,2), (64,64,8,2), (32,32,8,2), (16,16,8,1)),
    ("relative", 80, 16): _row((64,64,8,2), (32,32,8,2), (32,32,8,2), (32,32,8,1), (16,16,8,1)),
    ("forward", 90, 32): _row((32,32,8,1), (64,32,4,1), (32,32,8,1), (16,16,4,1)),
    ("forward", 80, 32): _row((64,32,4,1), (64,32,4,1), (32,32,4,1), (16,16,4,1)),
    ("key", 90, 32): _row((32,16,8,1), (32,32,4,1), (32,32,8,1), (16,16,8,1)),
    ("key", 80, 32): _row((32,16,8,1), (32,32,4,1), (32,32,8,1), (16,16,8,1)),
    ("query", 90, 32): _row((32,32,4,1), (64,32,4,1), (32,32,8,1), (16,16,8,1)),
    ("query", 80, 32): _row((64,32,8,1), (64,32,8,1), (32,32,8,1), (16,16,8,1)),
    ("relative", 90, 32): _row((32,32,8,1), (32,32,8,1), (32,32,8,1), (16,16,8,2)),
    ("relative", 80, 32): _row((32,32,8,1), (32,32,8,1), (32,32,8,1), (16,16,4,2)),
}
# fmt: on

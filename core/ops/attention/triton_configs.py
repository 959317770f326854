"""How the kernels of attention are launched: the shipped table."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Block sizes of queries and keys, warps a block, stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


SHORT = 64
CONFIGS: dict[tuple[str, int, int, str], dict[int, Config]] = {
    (kernel, arch, bits, load): {d: Config(32, 32, 4, 1) for d in (16, 32, 64, 128, 256)}
    for kernel in ("forward", "forward short", "key", "query", "extra")
    for arch in (90, 80)
    for bits in (16, 32)
    for load in ("light", "heavy")
}

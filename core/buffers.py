"""Memory that is used again once nobody holds it.

What a training step needs of the same size at every step the C library may give back to the system and
fetch again, zeroed and page by page: on a CPU that can cost as much as the computation. Up to `MOST` bytes
stay here.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST = 1 << 29
_lock = threading.Lock()
_kept: list[np.ndarray[Any, Any]] = []
_FREE = 3  # references: of the list, of the loop over it, of the call that counts them


def empty(size: int) -> Tensor:
    """A tensor of so many float32 whose numbers are anything; its memory comes back when it is dropped."""
    with _lock:
        for buffer in _kept:
            if size <= buffer.size <= 2 * size and sys.getrefcount(buffer) == _FREE:
                return torch.from_numpy(buffer)[:size]
        memory = np.empty(size + 16, np.float32)
        first = -memory.ctypes.data // 4 % 16  # where a cache line begins
        buffer = memory[first : first + size]
        if 4 * (size + sum(other.size for other in _kept)) <= MOST:
            _kept.append(buffer)
        return torch.from_numpy(buffer)


def _forget() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # the parent's may have been held at the fork


os.register_at_fork(after_in_child=_forget)

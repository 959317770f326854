"""Encodings kept on disk, by what the graphs are and how they are encoded: computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.core.files import commit, flush, temporary

VERSION = 2  # raised where an encoding changes its numbers


def cached(
    folder: Path, encode: Callable[..., Tensor], edge_index: Tensor, starts: Tensor, **parameters: int
) -> Tensor:
    """Return `encode(edge_index, starts, **parameters)`, from disk where it has been computed before.

    A file is named by the encoding and a hash of edges, sizes and parameters, and is written whole or not at
    all; one that cannot be read is computed and written again.

    Args:
        folder: Where files are kept; made if it is not there.
        encode: One of `manyheads.graph.encodings`.
        edge_index: Sources in row 0, destinations in row 1.
        starts: Where each graph's nodes begin, and the end of the last.
        parameters: The encoding's.

    Example:
        >>> cached(folder, laplacian, edge_index, starts, k=8)
    """
    path = folder / f"{encode.__name__}-{_digest(edge_index, starts, parameters)}.safetensors"
    try:
        return load_file(path)["encoding"].to(edge_index.device)
    except (FileNotFoundError, SafetensorError, KeyError):
        pass
    found = encode(edge_index, starts, **parameters)
    folder.mkdir(parents=True, exist_ok=True)
    written = temporary(path)
    save_file({"encoding": found.cpu().contiguous()}, written)
    flush(written)
    commit(written, path)
    return found


def _digest(edge_index: Tensor, starts: Tensor, parameters: dict[str, int]) -> str:
    about = {"version": VERSION, "edges": edge_index.shape[1], "graphs": len(starts) - 1, **parameters}
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in (edge_index, starts):
        found.update(tensor.cpu().to(torch.int64).contiguous().numpy().tobytes())
    return found.hexdigest()[:32]

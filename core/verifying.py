"""Whether a model folder is whole: every hash, every shape, and its card."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from manyheads.core import files, hub_cache
from manyheads.core.errors import ManyheadsError
from manyheads.core.fitting import match, stored_tensors
from manyheads.core.model_config import CARD, CONFIG, WEIGHTS, read_config, regular


@dataclass(frozen=True)
class Verified:
    """What a verified folder holds.

    Args:
        folder: Which.
        name: The model's catalogue name.
        tensors, parameters: Of its weights.
        size: Bytes of the weights.
        licence: That the card names.
        source: Reference and commit, where the folder was downloaded.
    """

    folder: Path
    name: str
    tensors: int
    parameters: int
    size: int
    licence: str
    source: str


def verify(folder: Path) -> Verified:
    """Check a model folder: the record of its download, the config, the hash, names and shapes, the card.

    Raises:
        ManyheadsError: The first thing that is wrong.
    """
    record = hub_cache.read_record(folder)
    if record is not None:
        hub_cache.check_files(folder, record)
    config = read_config(folder)
    weights = regular(folder / WEIGHTS)
    if files.sha256(weights) != config.weights_sha256:
        raise ManyheadsError(f"{weights} is not the file that {CONFIG} names (SHA-256 differs)")
    match(folder, config)
    shapes = [shape for _, shape in stored_tensors(weights).values()]
    return Verified(
        folder=folder,
        name=config.name,
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes),
        size=weights.stat().st_size,
        licence=_licence(folder),
        source=f"{record.reference} at {record.commit}" if record else "",
    )


def _licence(folder: Path) -> str:
    card = folder / CARD
    if card.is_symlink() or not card.is_file() or card.stat().st_size > hub_cache.MAX_RECORD:
        raise ManyheadsError(f"{folder} has no model card ({CARD})")
    licence = licence_of(card)
    if not licence:
        raise ManyheadsError(f"{card} names no licence (a line `license: ...` in its head)")
    return licence


def licence_of(card: Path) -> str:
    """Return the licence that the head of a model card names; "" where it names none."""
    if card.is_symlink() or not card.is_file() or card.stat().st_size > hub_cache.MAX_RECORD:
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")[:8192]
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    if head is None:
        return ""
    found = dict(re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([\w.+() -]+)", head[1], re.M))
    return (found.get("license_name") or found.get("license", "")).strip()

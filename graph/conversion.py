"""Tables of SMILES to a set of graphs: bad rows by a policy, and what was converted before from disk."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.core.files import commit, flush, temporary
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import place
from manyheads.graph.molecules import Features, Molecule, rdkit, smiles_to_graph

log = logging.getLogger(__name__)

Errors: TypeAlias = Literal["error", "skip"]
VERSION = 1  # raised where a molecule's numbers change
_PARTS = ("x", "edge_index", "nodes", "edges", "edge_attr")


@dataclass(frozen=True)
class Converted:
    """Molecules as graphs.

    Args:
        graphs: Those that could be read, in order.
        rows: The row of each.
        bad: The others: row and reason.

    Shape:
        rows int64 `[G]`.
    """

    graphs: GraphSet
    rows: Tensor
    bad: tuple[tuple[int, str], ...] = ()


def convert(
    smiles: Sequence[object],
    features: Features,
    errors: Errors = "error",
    cache: Path | None = None,
    what: str = "SMILES",
) -> Converted:
    """Convert SMILES.

    Args:
        smiles: One a row.
        features: "zinc" or "ogb".
        errors: What a row that cannot be read does: "error" stops, "skip" leaves it out and counts it.
        cache: Folder of what was converted before; nothing is kept if None.
        what: Names the table in errors.

    Raises:
        DataError: A row cannot be read, and errors are not skipped; or none can be read.
    """
    path = None if cache is None else cache / f"molecules-{_digest(smiles, features)}.safetensors"
    found = None if path is None else _read(path)
    if found is None:
        found = _convert(smiles, features, what)
        if path is not None:
            _write(path, found)
    if found.bad:
        row, reason = found.bad[0]
        if errors == "error":
            more = f", and {len(found.bad) - 1} more rows are bad" if len(found.bad) > 1 else ""
            raise DataError(f"{place(what, row)}: {reason}{more} (they can be skipped)")
        log.warning(
            "%s: %s; %d of %d rows are left out", place(what, row), reason, len(found.bad), len(smiles)
        )
    return found


def _convert(smiles: Iterable[object], features: Features, what: str) -> Converted:
    molecules: list[Molecule] = []
    rows, bad, told = [], [], time.monotonic()
    for row, text in enumerate(smiles):
        try:
            molecules.append(smiles_to_graph(text, features))
            rows.append(row)
        except BadRecord as error:
            bad.append((row, str(error)))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            log.info("%s molecules converted", f"{row + 1:,}")
    if not molecules:
        raise DataError(
            f"no row has a molecule; row {bad[0][0]}: {bad[0][1]}" if bad else "there are no rows"
        )
    return Converted(GraphSet.of(molecules), torch.tensor(rows), tuple(bad))


def _digest(smiles: Sequence[object], features: Features) -> str:
    rdkit()
    from rdkit import rdBase

    texts = [text if isinstance(text, str) else None for text in smiles]
    about = [VERSION, rdBase.rdkitVersion, features, texts]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _read(path: Path) -> Converted | None:
    """What lies there; None where nothing does, or nothing that can be read."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_tensor(name) for name in (*_PARTS, "rows")}
            bad = json.loads(file.metadata()["bad"])
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None
    rows = parts.pop("rows")
    return Converted(GraphSet(**parts), rows, tuple((row, reason) for row, reason in bad))


def _write(path: Path, found: Converted) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = temporary(path)
    parts = {name: getattr(found.graphs, name).contiguous() for name in _PARTS}
    save_file(parts | {"rows": found.rows}, written, {"bad": json.dumps(found.bad)})
    flush(written)
    commit(written, path)

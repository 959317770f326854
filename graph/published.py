"""The published data sets as sets of graphs, with their standard splits."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import Column
from manyheads.graph.conversion import Errors, convert
from manyheads.graph.molecules import Features
from manyheads.graph.preprocessing import Preprocessing, Target, TargetKind
from manyheads.graph.splits import PARTS, Split, fold_parts, given
from manyheads.graph.targets import Loaded, standardised

__all__ = ["NAMES", "Loaded", "load", "standardised"]

_ZINC = ("train_10000_from_valid_pool", "val_1000", "test_1000")
_TOX21 = (
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE",
    "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53",
)  # fmt: skip
FOLDS = 10
STANDARD = Split()


@dataclass(frozen=True)
class _Molecules:
    """A table of SMILES: its targets' columns and their names here."""

    columns: tuple[str, ...]
    kind: TargetKind
    names: tuple[str, ...]


_MOLECULES = {
    "esol": _Molecules(
        ("measured log solubility in mols per litre",), "regression", ("log_solubility",)
    ),
    "tox21": _Molecules(_TOX21, "multilabel", _TOX21),
    "hiv": _Molecules(("HIV_active",), "multilabel", ("HIV_active",)),
}  # fmt: skip
_COLLECTIONS = ("mutag", "ptc", "proteins", "imdb_binary", "enzymes")
NAMES = ("zinc", "cora", *_MOLECULES, *_COLLECTIONS)


def load(
    dataset: str,
    split: Split = STANDARD,
    features: Features | None = None,
    errors: Errors = "skip",
    cache: Path | None = None,
) -> Loaded:
    """Load a data set by its name.

    Args:
        dataset: One of `NAMES`.
        split: Another split than its own; of the collections with folds `fold` chooses among the published.
        features: How SMILES become numbers; "zinc" for ZINC and "ogb" for the others if None.
        errors: What a SMILES that rdkit refuses does: "skip" counts it in the log, "error" stops.
        cache: Folder of molecules converted before; one in the cache folder if None.

    Raises:
        UsageError: No such data set, or not with this split.
        DataError: Its files are not here and cannot be had, or are not what they should be.

    Example:
        >>> graphs, parts, preprocessing = load("esol")
        >>> len(graphs), len(parts["train"]), preprocessing.target.kind
        (1128, 902, 'regression')
    """
    if dataset not in NAMES:
        raise UsageError(
            f"no data set {dataset!r} of graphs{did_you_mean(dataset, NAMES)} (there are {', '.join(NAMES)})"
        )
    path, cache = datasets.locate(dataset), cache or datasets.cache_folder() / "molecules"
    if dataset == "zinc":
        return _zinc(path, split, features or "zinc", errors, cache)
    if dataset == "cora":
        return _cora(path, split)
    if dataset in _COLLECTIONS:
        return _collection(path, split)
    return _molecules(path, _MOLECULES[dataset], split, features or "ogb", errors, cache)


def _zinc(folder: Path, split: Split, features: Features, errors: Errors, cache: Path) -> Loaded:
    import pandas as pd

    tables = [pd.read_parquet(folder / f"{name}.parquet", columns=["smiles", "y"]) for name in _ZINC]
    table = pd.concat(tables, ignore_index=True)
    found = convert(table["smiles"].tolist(), features, errors, cache, "zinc")
    sizes = [len(each) for each in tables]
    part = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[found.rows]
    names = np.repeat(PARTS, sizes)
    numbers = np.concatenate([np.arange(size) for size in sizes])
    y = torch.tensor(table["y"].to_numpy(), dtype=torch.float32)[found.rows, None]
    graphs = _named(found.graphs, [f"{names[i]}/{numbers[i]}" for i in found.rows.tolist()], y)
    if split.kind == "standard":
        parts = given(**{name: part == i for i, name in enumerate(PARTS)})
    else:
        parts = split.divide(len(graphs), smiles=table["smiles"].iloc[found.rows.numpy()].tolist())
    target = standardised(("y",), y[parts["train"]])
    return Loaded(graphs, parts, Preprocessing(features=features, target=target))


def _molecules(
    path: Path, about: _Molecules, split: Split, features: Features, errors: Errors, cache: Path
) -> Loaded:
    import pandas as pd

    table = pd.read_csv(path)
    found = convert(table["smiles"].tolist(), features, errors, cache, str(path))
    y = torch.tensor(table[list(about.columns)].to_numpy(np.float32))[found.rows]
    graphs = _named(found.graphs, [str(row) for row in found.rows.tolist()], y)
    if split.kind == "standard":
        split = Split("scaffold")
    parts = split.divide(len(graphs), smiles=table["smiles"].iloc[found.rows.numpy()].tolist())
    if about.kind == "regression":
        target = standardised(about.names, y[parts["train"]])
    else:
        target = Target(about.kind, about.names)
    return Loaded(graphs, parts, Preprocessing(features=features, target=target))


def _named(graphs: GraphSet, ids: Sequence[str], y: Tensor) -> GraphSet:
    return replace(graphs, ids=ids, y=y)


def _cora(path: Path, split: Split) -> Loaded:
    with np.load(path) as file:
        size, words = (int(i) for i in file["x_shape"])
        x = np.zeros((size, words), np.float32)
        rows = np.repeat(np.arange(size), np.diff(file["x_indptr"]))
        x[rows, file["x_indices"]] = file["x_data"]
        pairs = torch.from_numpy(file["edge_index_undirected"].astype(np.int64))
        y = torch.from_numpy(file["y"].astype(np.float32))
        parts = given(**{name: file[f"{name}_idx"].astype(np.int64) for name in PARTS})
    edge_index = torch.cat([pairs, pairs.flip(0)], 1)
    graphs = GraphSet(
        torch.from_numpy(x),
        edge_index,
        torch.tensor([0, size]),
        torch.tensor([0, edge_index.shape[1]]),
        y=y[:, None],
        level="node",
        ids=["cora"],
        node_ids=[str(i) for i in range(size)],
    ).check()
    if split.kind != "standard":
        parts = split.divide(size, classes=y)
    classes = tuple(str(i) for i in range(int(y.max()) + 1))
    target = Target("classification", ("class",), classes)
    columns = (Column("x", size=words),)
    about = Preprocessing("tables", node_columns=columns, row_normalise=True, level="node", target=target)
    return Loaded(graphs, parts, about)


def _collection(path: Path, split: Split) -> Loaded:
    """The text form of Zhang et al. 2018 (DGCNN): a zip with the graphs and the rows of ten folds."""
    with zipfile.ZipFile(path) as file:
        name = path.stem
        lines = file.read(f"{name}/{name}.txt").decode().splitlines()
        fold_rows = [
            np.array(file.read(f"{name}/10fold_idx/test_idx-{i + 1}.txt").split(), np.int64)
            for i in range(FOLDS)
        ]
    tags, labels, sizes, edges = _graphs(lines, name)
    classes, y = np.unique(labels, return_inverse=True)
    kinds, x = np.unique(tags, return_inverse=True)
    graphs = GraphSet(
        torch.from_numpy(x.astype(np.int64))[:, None],
        edges[0],
        torch.tensor([0, *np.cumsum(sizes).tolist()]),
        edges[1],
        y=torch.from_numpy(y.astype(np.float32))[:, None],
    ).check()
    if split.kind == "standard":
        fold_of = torch.full((len(graphs),), -1)  # a few graphs are in no test part
        for i, rows in enumerate(fold_rows):
            fold_of[torch.from_numpy(rows)] = i
        parts = fold_parts(fold_of, split.fold)
    else:
        parts = split.divide(len(graphs), classes=graphs.y[:, 0])  # type: ignore[index]
    # one tag for all says nothing: nodes without columns are one category too
    columns = (Column("tag", tuple(str(kind) for kind in kinds)),) if len(kinds) > 1 else ()
    target = Target("classification", ("class",), tuple(str(each) for each in classes))
    return Loaded(graphs, parts, Preprocessing("tables", node_columns=columns, target=target))


def _graphs(lines: Sequence[str], name: str) -> tuple[list[int], list[int], list[int], tuple[Tensor, Tensor]]:
    """Tags of all nodes, labels and sizes of the graphs, and their edges with the bounds of each graph's."""
    rows = iter(lines)
    tags, labels, sizes, counts, edges = [], [], [], [], []
    try:
        for _ in range(int(next(rows))):
            size, label = map(int, next(rows).split())
            pairs = set()
            for node in range(size):
                tag, count, *near = map(int, next(rows).split())
                if len(near) != count:
                    raise ValueError
                tags.append(tag)
                pairs |= {(node, other) for other in near} | {(other, node) for other in near}
            labels.append(label)
            sizes.append(size)
            counts.append(len(pairs))
            edges += sorted(pairs)
    except (ValueError, StopIteration):
        raise DataError(f"{name}.txt: graph {len(labels)} is not as it should be") from None
    edge_index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    return tags, labels, sizes, (edge_index, torch.tensor([0, *np.cumsum(counts).tolist()]))

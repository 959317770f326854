"""One large graph as arrays in a folder, mapped into memory: read and encoded once, shared by processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core import files
from manyheads.core.errors import ManyheadsError
from manyheads.graph import encodings
from manyheads.graph.collection import GraphSet
from manyheads.graph.graphs import Graphs
from manyheads.graph.sampling import Adjacency, Sampled, sample

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1  # raised where what is in a folder changes
IDS = "ids.arrow"
_PARTS = ("x", "edge_attr", "encoding", "roles")

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LargeGraph:
    """A graph of which models see what is sampled around some of its nodes.

    Args:
        adjacency: Its edges.
        x, edge_attr, encoding, roles: As in `GraphSet`.
        ids: The nodes' names.
    """

    adjacency: Adjacency
    x: Array
    edge_attr: Array | None
    encoding: Array | None
    roles: Array | None
    ids: pa.Array

    @staticmethod
    def save(graphs: GraphSet, folder: Path) -> None:
        """Write a set into a folder that is there: of many graphs, one with no edges between them."""
        import pyarrow as pa

        shift = torch.repeat_interleave(graphs.nodes[:-1], graphs.edges.diff())
        Adjacency.of(graphs.edge_index + shift, graphs.x.shape[0]).save(folder)
        for name in _PARTS:
            part = getattr(graphs, name)
            if part is not None:
                np.save(folder / f"{name}.npy", part.numpy())
        table = pa.table({"id": pa.array(names_of(graphs), pa.string())})
        with pa.OSFile(str(folder / IDS), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def load(cls, folder: Path) -> LargeGraph:
        """Map what `save` wrote into memory."""
        import pyarrow as pa

        def part(name: str) -> Array | None:
            path = folder / f"{name}.npy"
            return np.load(path, mmap_mode="r") if path.exists() else None

        x = part("x")
        assert x is not None
        ids = pa.ipc.open_file(pa.memory_map(str(folder / IDS))).read_all()["id"].combine_chunks()
        return cls(Adjacency.load(folder), x, part("edge_attr"), part("encoding"), part("roles"), ids)

    def sampled(self, seeds: Tensor, fanouts: Sequence[int], seed: int = 0) -> Sampled:
        """Return the numbers of what `around` takes.

        With -1 for all fanouts one hop more is taken: a model may divide by the degree of a node whose
        message comes in, and so a row's result is that of the whole graph.
        """
        hops = [*fanouts, -1] if all(each == -1 for each in fanouts) else fanouts
        return sample(self.adjacency, seeds, hops, seed)

    def around(
        self, seeds: Tensor, fanouts: Sequence[int], seed: int = 0, distances: int = 0
    ) -> tuple[Graphs, Tensor]:
        """Sample a graph around each row of nodes, by itself: what is found for a row depends on it alone.

        Args:
            seeds: Numbers of nodes.
            fanouts: Edges of a node that are taken in each hop; -1 for all.
            seed: Another one takes other neighbours.
            distances: The largest shortest path that is told from longer ones; 0 for none.

        Shape:
            seeds `[G, S]`; the places of the seeds among the graphs' nodes likewise.
        """
        found = self.sampled(seeds, fanouts, seed)
        nodes, edges = found.nodes.numpy(), found.edge_numbers.numpy()

        def taken(part: Array | None, rows: Array) -> Tensor | None:
            return None if part is None else torch.from_numpy(part[rows])

        graphs = Graphs(
            torch.from_numpy(self.x[nodes]),
            found.edge_index,
            found.starts,
            taken(self.edge_attr, edges),
            taken(self.encoding, nodes),
            taken(self.roles, nodes),
        )
        if distances:
            paths = encodings.shortest_paths(graphs.edge_index, graphs.starts, distances)
            graphs = graphs._replace(distances=paths)
        return graphs, found.seeds


def names_of(graphs: GraphSet) -> Sequence[str]:
    """Return the nodes' names; of many graphs with the graph's in front."""
    own = graphs.node_ids if graphs.node_ids is not None else [str(i) for i in range(graphs.x.shape[0])]
    if graphs.whole:
        return own
    owner = torch.repeat_interleave(torch.arange(len(graphs)), graphs.sizes).tolist()
    return [f"{graphs.ids[g]}/{name}" for g, name in zip(owner, own, strict=True)]


def stored(cache: Path, tables: Sequence[str], about: object, read: Callable[[], GraphSet]) -> Path:
    """Return the folder of a graph, written if it has not been before.

    Args:
        cache: Where such folders are; made if it is not there.
        tables: The files that the graph is made of: their content names the folder.
        about: What else the graph depends on, as plain JSON.
        read: Makes the graph.

    Raises:
        ManyheadsError: The folder cannot be written.
    """
    parts = [VERSION, *(files.sha256(Path(each)) for each in tables), about]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / digest
    if folder.is_dir():
        return folder
    graphs, written = read(), files.temporary(folder)
    try:
        written.mkdir(parents=True)
        LargeGraph.save(graphs, written)
        for file in written.iterdir():
            files.flush(file)
        _commit(written, folder)
    except OSError as error:
        where = "MANYHEADS_CACHE names another place"
        raise ManyheadsError(f"cannot write to the cache {cache} ({error.strerror}); {where}") from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return folder


def _commit(written: Path, folder: Path) -> None:
    try:
        files.commit(written, folder)
    except OSError:
        if not folder.is_dir():  # no other process was first
            raise


@lru_cache(maxsize=2)
def load(folder: Path) -> LargeGraph:
    """Map a graph's folder into memory, once a process."""
    return LargeGraph.load(folder)

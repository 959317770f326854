"""Molecules, graphs, nodes, pairs in, numbers or classes out: what jobs and serving see. No lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.predictor import Record, Row
from manyheads.graph.answers import Answers, OutputKind
from manyheads.graph.graphs import Graphs
from manyheads.graph.node_records import Nodes
from manyheads.graph.pair_records import Pair, Pairs
from manyheads.graph.preprocessing import Preprocessing
from manyheads.graph.records import Batch, Molecules, Records, WholeGraphs
from manyheads.graph.sources import Columns

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig

NEIGHBOURS = ("sampled", "all")


@dataclass(frozen=True)
class Options:
    """How a source is read and what rows are made of; a model has those that it has a use for.

    Args:
        output_kind: Of classes: "label" or "probabilities", which adds a column for each class.
        smiles_column, id_column: Columns of a table of SMILES; the model folder's own where it says others.
        neighbours: Of a model that was trained on samples of a graph's edges: "sampled", or "all": it sees
            graphs whole, which takes the memory of the whole at once.
    """

    output_kind: OutputKind = "label"
    smiles_column: str = Columns.smiles
    id_column: str = Columns.id
    neighbours: str = "sampled"


class Predictor:
    """Predicts of molecules, of graphs, of nodes, or of pairs of nodes.

    A source is a table of SMILES (`smiles`), or folders of tables of nodes and edges (`sources` says more).
    With samples of a graph's edges each node, or pair, has a sample of its own, always the same one.

    Args:
        model: A graph model of the catalogue.
        preprocessing: Of its folder.
        options: How sources are read and what rows are made of.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, options: Options | None = None
    ) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing
        names = preprocessing.names
        self.options = options or Options(smiles_column=names.smiles, id_column=names.id)
        self.answers = Answers(preprocessing.target, self.options.output_kind)
        self.records = _records(preprocessing, self.options)
        self._seen: tuple[Graphs, Tensor] | None = None

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing does not fit the model.
        """
        preprocessing = Preprocessing.from_json(config.preprocessing)
        readout = getattr(model, "readout", "node")
        about = {"node": "node", "pair": "pair"}.get(str(readout), "graph")
        if about != preprocessing.level:
            raise DataError(
                f"the model folder predicts of each {preprocessing.level}, its model of each {about}"
            )
        wanted = preprocessing.model_inputs()
        for name, value in config.arguments.items():
            if name in wanted and value != wanted[name]:
                raise DataError(f"the model folder's data has {name} {wanted[name]}, its model {value}")
        return cls(model, preprocessing)

    @property
    def columns(self) -> Mapping[str, str]:
        """`id`, and the targets' columns: numbers, `label` and `probability`, or a probability each.

        Of pairs also `source` and `target`.
        """
        found = self.answers.columns
        if self.preprocessing.level != "pair":
            return found
        return {"id": found.pop("id"), "source": "string", "target": "string"} | found

    @property
    def batch_size(self) -> int:
        """Records a batch where the caller names no number."""
        return self.records.batch_size

    @property
    def shard_size(self) -> int:
        """Records a part file where the caller names no number."""
        return self.records.shard_size

    @property
    def settings(self) -> dict[str, str | int]:
        """The options that this model has a use for, by name."""
        of = self.preprocessing
        used = ["output_kind"] if of.target.kind == "classification" else []
        used += ["smiles_column", "id_column"] if of.input == "smiles" else []
        used += ["neighbours"] if of.fanouts is not None else []
        return {name: getattr(self.options, name) for name in used}

    def configure(self, settings: core.Settings) -> Predictor:
        """Return this model's predictor with other options.

        Raises:
            UsageError: One has no such value.
        """
        options = replace(self.options, **cast(dict[str, Any], dict(settings)))
        return Predictor(self.model, self.preprocessing, options)

    def predict(
        self,
        source: core.Source,
        output_kind: OutputKind | None = None,
        smiles_column: str | None = None,
        id_column: str | None = None,
        neighbours: str | None = None,
    ) -> pd.DataFrame:
        """Predict a whole source in memory; arguments as `Options`.

        Raises:
            DataError: What is wrong with the source or a record.
            UsageError: An option has no such value, or the model no such option.

        Example:
            >>> manyheads.load("runs/esol/model").predict("molecules.csv")
        """
        asked = {"output_kind": output_kind, "smiles_column": smiles_column, "id_column": id_column}
        asked["neighbours"] = neighbours
        settings = {name: value for name, value in asked.items() if value is not None}
        return core.predict(core.configure(self, settings), source)

    def shards(self, source: core.Source, size: int) -> list[Any]:
        """Cut a source into shards of about `size` records; a graph that is sampled is read and kept.

        Raises:
            DataError: A table cannot be used.
            UsageError: No such source.
        """
        return self.records.shards(source, size)

    def count(self, shard: Any) -> int:
        """Return the records of a shard."""
        return self.records.count(shard)

    def read(self, shard: Any) -> Iterator[Record]:
        """Stream a shard's molecules, graphs or nodes."""
        return self.records.read(shard)

    def prepare(self, record: Record) -> Any:
        """Make a graph of a record.

        Raises:
            BadRecord: It cannot be used, and why.
        """
        return self.records.prepare(record)

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Put samples together, encoded."""
        return self.records.collate(samples)

    def forward(self, batch: Batch) -> Tensor:
        """Run the model.

        Shape:
            `[R, outputs]`, a row a record.
        """
        found = []
        for graphs, rows in batch:
            outputs = self._run(graphs)
            found.append(outputs if rows is None else outputs[rows])
        return torch.cat(found)

    def _run(self, graphs: Graphs) -> Tensor:
        if self._seen is not None and self._seen[0] is graphs:  # a whole graph, batch after batch
            return self._seen[1]
        self._seen = None
        weight = next(self.model.parameters())
        moved = Graphs(*(None if part is None else part.to(weight.device) for part in graphs))  # type: ignore[arg-type]
        with torch.inference_mode():
            outputs = cast(Tensor, self.model(moved)).float().cpu()
        if outputs.ndim != 2:
            raise DataError(f"the model gives {list(outputs.shape)} numbers, not a row each")
        self._seen = graphs, outputs
        return outputs

    def rows(self, outputs: Tensor, records: Sequence[Record]) -> list[Row]:
        """Make a row a record."""
        found = self.answers.rows(outputs, [record.id for record in records])
        for row, record in zip(found, records, strict=True):
            if isinstance(record, Pair):
                row["source"], row["target"] = record.ends
        return found


def _records(preprocessing: Preprocessing, options: Options) -> Records:
    """Choose how sources are read."""
    of = preprocessing
    if options.neighbours not in NEIGHBOURS:
        close = did_you_mean(options.neighbours, NEIGHBOURS)
        raise UsageError(f"--neighbours {options.neighbours}: it takes {', '.join(NEIGHBOURS)}{close}")
    if of.input == "smiles" and of.level == "graph":
        needed = options.id_column != of.names.id
        return Molecules(of, Columns(options.smiles_column, options.id_column, needed))
    if of.input == "tables" and of.level == "graph":
        return WholeGraphs(of)
    if of.input == "tables" and of.level == "node":
        return Nodes(of, of.fanouts if options.neighbours == "sampled" else None)
    if of.input == "tables" and of.level == "pair":
        return Pairs(of, of.fanouts if options.neighbours == "sampled" else None)
    raise UsageError(f"models of {of.input} that predict of each {of.level} cannot be used for prediction")

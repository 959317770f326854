"""The tables and pictures of `manyheads graph explain`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.apps.explain_graph import ExplainOptions
from manyheads.apps.picture_names import picture_name
from manyheads.core import files, hub
from manyheads.core.errors import UsageError
from manyheads.core.predictor import Bad, configure
from manyheads.graph import explain
from manyheads.graph.explained import Explained, explain_row, feature_names
from manyheads.graph.predictor import Predictor
from manyheads.graph.views import View, views

if TYPE_CHECKING:
    import pandas as pd

BAD_RECORDS = 3


def run(given: ExplainOptions) -> int:
    """Explain rows.

    Returns:
        0, or 3 if rows could not be used.

    Raises:
        UsageError: The model or the input has not got what is asked for.
    """
    import pandas as pd

    predictor = load(given)
    source = given.inputs[0] if len(given.inputs) == 1 else list(given.inputs)
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    taken: set[str] = set()
    with tables(given.output) as written:
        for view in views(predictor, source, given.rows, given.most):
            if isinstance(view, Bad):
                bad.append({"id": view.id, "reason": view.reason})
                print(f"manyheads: {view.id}: {view.reason}", file=sys.stderr)
                continue
            found = _explain(given, predictor, view)
            written.add(found, feature_names(predictor.preprocessing), each=given.weights == "each")
            about = found.summary()
            if given.pictures:
                path = given.output / "pictures" / picture_name(view.id, taken)
                _draw(found, path)
                about["picture"] = str(path)
            rows.append(about)
            if not given.json:
                print(_line(about))
        written.write("rows.csv", pd.DataFrame(rows))
    if given.json:
        print(json.dumps({"rows": rows, "bad": bad}))
    elif rows:
        print(f"in {given.output}: {', '.join(sorted(path.name for path in given.output.iterdir()))}")
    return BAD_RECORDS if bad else 0


def load(given: ExplainOptions) -> Predictor:
    """Load a graph model that can be explained as is asked.

    Raises:
        UsageError: There is none, its model is of another domain, or it has no attention.
    """
    folder = hub.find_folder(given.model)
    config = hub.read_config(folder)
    if config.domain != "graph":
        raise UsageError(f"{folder} holds {config.name}, a model of {config.domain}, not of graph")
    predictor = Predictor.from_folder(*hub.load_model(folder))
    if given.method == "attention" and not explain.attends(predictor.model):
        raise UsageError(f"{config.name} passes messages: it has no attention to show")
    columns = {"smiles_column": given.smiles_column, "id_column": given.id_column}
    settings = {name: value for name, value in columns.items() if value is not None}
    return configure(predictor, settings)  # type: ignore[return-value]


def _explain(given: ExplainOptions, predictor: Predictor, view: View) -> Explained:
    model, attention, asked, found = predictor.model, None, None, None
    if given.method != "attributions" and explain.attends(model):
        attention = explain.attention(model, view.graphs)
    if given.method != "attention":
        asked, found = explain_row(model, predictor.preprocessing, view, given.target, given.baseline)
    return Explained(view, asked, found, attention)


def _draw(found: Explained, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    written = files.temporary(path)
    try:
        found.draw(written)
        files.commit(written, path)
    finally:
        written.unlink(missing_ok=True)


def _line(about: dict[str, Any]) -> str:
    if "target" not in about:
        return str(about.get("picture", about["id"]))
    text = f"{about['id']}: {about['target']} {about['prediction']:.4g}, from {about['baseline']:.4g}:"
    text += f" nodes {about['nodes']:+.4g}"
    text += "" if about["edges"] is None else f", edges {about['edges']:+.4g}"
    return text if about["complete"] else f"{text} (after {about['steps']} steps off by {about['error']:.2g})"


@dataclass
class Tables:
    """Tables that grow row by row, and get their names when all are whole."""

    folder: Path
    writers: dict[str, Any] = field(default_factory=dict)
    last: object = None

    def add(self, found: Explained, features: list[str], *, each: bool) -> None:
        """Write what was found of a row; of a graph that several rows share, the attention once."""
        if found.found is not None:
            self._append("nodes", found.nodes())
            self._append("edges", found.edges())
            self._append("features", found.features(features))
        if found.view.graphs.edge_index is not self.last:
            self.last = found.view.graphs.edge_index
            self._append("attention", found.weights(each=each))

    def _append(self, name: str, table: pd.DataFrame | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if table is None:
            return
        if name not in self.writers:
            path = files.temporary(self.folder / f"{name}.parquet")
            rows = pa.Table.from_pandas(table, preserve_index=False)
            self.writers[name] = path, pq.ParquetWriter(path, rows.schema)
        writer = self.writers[name][1]
        writer.write_table(pa.Table.from_pandas(table, writer.schema, preserve_index=False))

    def write(self, name: str, table: pd.DataFrame) -> None:
        """Write a small table at once."""
        files.write_atomic(self.folder / name, table.to_csv(index=False))


@contextmanager
def tables(folder: Path) -> Iterator[Tables]:
    """Open the tables of a folder; they are there, whole, when all is done."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Tables(folder)
    try:
        yield found
        for name, (path, writer) in found.writers.items():
            writer.close()
            files.flush(path)
            files.commit(path, folder / f"{name}.parquet")
    finally:
        for path, writer in found.writers.values():
            writer.close()
            path.unlink(missing_ok=True)

"""From a request's rows to the body of its response: JSON, or a zip with the files that rows carry."""

from __future__ import annotations

import base64
import datetime
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyheads.apps.parts import arrow_type
from manyheads.core.predictor import AnyPredictor, File, Row


@dataclass(frozen=True)
class Result:
    """What a request comes to.

    Args:
        rows: In the types of a job's parts, as JSON knows them.
        files: By the names that the rows have for them.
    """

    rows: list[dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)


def finish(rows: Sequence[Row], predictor: AnyPredictor, folder: Callable[[], Path]) -> Result:
    """Give rows their types; where a job would make something of all of them, make it, too.

    Args:
        rows: Of one request.
        predictor: Theirs.
        folder: Makes one for files on the way.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    made: list[Path] = []
    if hasattr(predictor, "finish"):
        parts, results = folder() / "parts", folder() / "results"
        parts.mkdir()
        results.mkdir()
        rows = [_stored(row, number, parts) for number, row in enumerate(rows)]
        predictor.finish(iter(rows), parts, results)
        made = sorted(path for path in results.rglob("*") if path.is_file())
    schema = pa.schema([(name, arrow_type(kind)) for name, kind in predictor.columns.items()])
    tables = [path for path in made if path.suffix == ".parquet"]
    if getattr(predictor, "temporary_files", False):  # rows of parts are of no use then, those of results are
        found = [row for path in tables for row in pq.read_table(path).to_pylist()]
    else:
        found = pa.Table.from_pylist(list(rows), schema=schema).to_pylist()
    files = {str(path.relative_to(results)): path.read_bytes() for path in made if path not in tables}
    return Result([{name: plain(value) for name, value in row.items()} for row in found], files)


def _stored(row: Row, number: int, parts: Path) -> Row:
    """Write a row's files below a folder, as a job does, and return the row with their names."""
    found = dict(row)
    for name, value in row.items():
        if isinstance(value, File):
            found[name] = f"{number}-{name}{value.suffix}"
            (parts / str(found[name])).write_bytes(value.content)
    return found


def plain(value: Any) -> Any:
    """Return a cell as JSON knows it: times as ISO texts, NaN and infinite numbers as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime.datetime) else value


def as_json(name: str, result: Result, bad: Sequence[Mapping[str, str]]) -> bytes:
    """Return the response in JSON, files in base64."""
    found: dict[str, Any] = {"model": name, "rows": result.rows, "bad": list(bad)}
    if result.files:
        found["files"] = {file: base64.b64encode(content).decode() for file, content in result.files.items()}
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")  # half a character of an id becomes JSON's own escape


def as_zip(name: str, result: Result, bad: Sequence[Mapping[str, str]]) -> bytes:
    """Return a zip of the files, and `rows.json` with the rest."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("rows.json", as_json(name, Result(result.rows), bad))
        for file, content in result.files.items():
            archive.writestr(file, content)
    return packed.getvalue()

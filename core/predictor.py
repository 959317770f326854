"""What jobs and serving see of a domain: rows in, rows out. Torch at most, no lightning.

A domain's `predictor.py` has one class named `Predictor` with these methods and two attributes. The steps
are separate so that a job can stream: cut the source into shards, read a shard's records, prepare each, run
a batch, and make rows.

A predictor may also have, where it has a use for them:
- `settings`, what its rows depend on beside the model, by name, and `configure(settings)`, which returns one
  with others (raises UsageError for a value it has not got);
- `shard_size`, records a part file where the caller names no number;
- `count(shard)`, how many records a shard has, about, where that is often fewer: for the time left;
- `prepare_threads`, how many records are prepared side by side, while the model runs: `prepare` must then be
  safe in threads, and release Python's lock to gain anything;
- `named_files(source)`, the files that a source names without being in it: a job's fingerprint covers them;
- `finish(rows, parts, results)`, called once when all parts stand: it reads the rows of all of them in order
  and fills the empty folder `results` with what is made of several (a file a speaker, a table of totals).
  What rows name lies below `parts`. Called again from the start it must leave the same bytes;
- `temporary_files`, true where the files of rows are of no use behind `finish`: the job removes them then.

Outputs have a row a record, in order: a tensor, a sequence, or a NamedTuple of these; `part` cuts them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from manyheads.core.errors import BadRecord, DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from manyheads.core.hub import ModelConfig

Row: TypeAlias = dict[str, object]  # of what Arrow takes, and of `File`
Settings: TypeAlias = Mapping[str, str | int]
Source: TypeAlias = object  # a path, several paths, or a DataFrame; each domain says which it takes


@dataclass(frozen=True)
class File:
    """A file that a row carries: a job stores it beside the row's part, and the part has its name there.

    Its column is a `string`.
    """

    content: bytes
    suffix: str


class Record(Protocol):
    """Anything with an id; the id names the record in a job's bad file."""

    @property
    def id(self) -> str:
        """The record's name, unique within a source."""


R = TypeVar("R", bound=Record)
S = TypeVar("S")
B = TypeVar("B")
O = TypeVar("O")
H = TypeVar("H")


class Predictor(Protocol[H, R, S, B, O]):
    """The steps from a source to rows.

    `H` is a picklable shard, `R` a record, `S` a sample, `B` a batch, `O` outputs. A batch's
    rows equal the rows of its records one by one, and the model is in evaluation mode.
    """

    @property
    def batch_size(self) -> int:
        """Records a batch where the caller names no number."""

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns of a row in order, each with its Arrow type: `{"id": "string", "yhat": "float32"}`.

        The names are those of `pyarrow.type_for_alias`. They follow from the model folder alone, so that
        every part of a job has the same columns and types, one without rows too.
        """

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor[H, R, S, B, O]:
        """Build the predictor of a model folder that was read back."""

    def shards(self, source: Source, size: int) -> list[H]:
        """Cut a source into shards of about `size` records: cheap, and the same list each time."""

    def read(self, shard: H) -> Iterator[R]:
        """Stream a shard's records; memory does not grow with the shard's source."""

    def prepare(self, record: R) -> S:
        """Turn a record into a sample.

        Raises:
            BadRecord: This record cannot be used, and why.
        """

    def collate(self, samples: Sequence[S]) -> B:
        """Put samples into a batch."""

    def forward(self, batch: B) -> O:
        """Run the model."""

    def rows(self, outputs: O, records: Sequence[R]) -> list[Row]:
        """Make the output rows of a batch, records in order."""

    def predict(self, source: Source) -> pd.DataFrame:
        """Predict a whole source in memory: `predict` of this module, as a method."""


AnyPredictor: TypeAlias = Predictor[Any, Any, Any, Any, Any]


@dataclass(frozen=True)
class Bad:
    """A record that could not be used."""

    id: str
    reason: str


@dataclass
class Spent:
    """CPU seconds, of all threads, that reading and preparing records took."""

    preparing: float = 0.0


def settings_of(predictor: AnyPredictor) -> dict[str, str | int]:
    """Return what a predictor's rows depend on beside the model."""
    return dict(getattr(predictor, "settings", {}))


def configure(predictor: AnyPredictor, settings: Settings) -> AnyPredictor:
    """Return a predictor with other settings.

    Raises:
        UsageError: It has no such setting, or not that value.
    """
    if not settings:
        return predictor
    known = settings_of(predictor)
    for name in settings:
        if name not in known:
            has = ", ".join(map(_option, known)) or "none"
            raise UsageError(f"{_option(name)} is no option of this model (it has: {has})")
    return predictor.configure(settings)  # type: ignore[attr-defined]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(
    predictor: Predictor[H, R, S, B, O], records: Iterable[R], batch_size: int, spent: Spent | None = None
) -> Iterator[tuple[list[Row], list[Bad], int]]:
    """Predict a stream of records batch by batch.

    Args:
        predictor: The steps.
        records: The stream; no more than a batch of it is held, two where threads prepare the next.
        batch_size: Records taken for a batch, bad ones included: the cuts never depend on the content.
        spent: Counts what reading and preparing took.

    Yields:
        The rows of a batch, its bad records, and how many records it took from the stream.
    """
    for chunk in prepared(predictor, iter(records), batch_size, spent or Spent()):
        good, samples, bad = [], [], []
        for record, sample, reason in chunk:
            if reason is None:
                good.append(record)
                samples.append(sample)
            else:
                bad.append(Bad(record.id, reason))
        found = predictor.rows(predictor.forward(predictor.collate(samples)), good) if good else []
        yield found, bad, len(chunk)


def prepared(
    predictor: AnyPredictor, stream: Iterator[Any], batch_size: int, spent: Spent
) -> Iterator[list[tuple[Any, Any, str | None]]]:
    """Yield batches of records, each with its sample or the reason against it, in the stream's order."""
    threads = getattr(predictor, "prepare_threads", 1)

    def take() -> list[Any]:
        begin = time.thread_time()
        chunk = list(islice(stream, batch_size))
        spent.preparing += time.thread_time() - begin
        return chunk

    def finish(results: Iterable[tuple[Any, Any, str | None, float]]) -> list[tuple[Any, Any, str | None]]:
        found = list(results)
        spent.preparing += sum(each[3] for each in found)
        return [each[:3] for each in found]

    if threads <= 1:
        while chunk := take():
            yield finish(_prepare(predictor, record) for record in chunk)
        return
    pool = ThreadPoolExecutor(threads, "manyheads-prepare")
    try:
        ahead = [pool.submit(_prepare, predictor, record) for record in take()]
        while ahead:
            now = ahead
            ahead = [pool.submit(_prepare, predictor, record) for record in take()]
            yield finish(future.result() for future in now)
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(predictor: AnyPredictor, record: Any) -> tuple[Any, Any, str | None, float]:
    """Prepare a record: itself, its sample, the reason if it is bad, and the CPU seconds."""
    begin = time.thread_time()
    sample, reason = None, None
    try:
        sample = predictor.prepare(record)
    except BadRecord as error:
        reason = str(error)
    return record, sample, reason, time.thread_time() - begin


def part(outputs: Any, first: int, end: int) -> Any:
    """Return the outputs of some records of a batch, from the first to before the last.

    Example:
        >>> part(["a", "b", "c"], 1, 3)
        ['b', 'c']
    """
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*(part(each, first, end) for each in outputs))
    return outputs[first:end]


def rows(predictor: Predictor[H, R, S, B, O], source: Source, batch_size: int | None = None) -> Iterator[Row]:
    """Yield the rows of a whole source.

    Raises:
        DataError: A record is bad; jobs (`manyheads predict`) set bad records aside instead.
    """
    for shard in predictor.shards(source, size=1024):
        for found, bad, _ in run(predictor, predictor.read(shard), batch_size or predictor.batch_size):
            if bad:
                raise DataError(f"record {bad[0].id!r}: {bad[0].reason}")
            yield from found


def predict(
    predictor: Predictor[H, R, S, B, O], source: Source, batch_size: int | None = None
) -> pd.DataFrame:
    """Predict a whole source in memory.

    Raises:
        DataError: A record is bad; jobs (`manyheads predict`) set bad records aside instead.
    """
    import pandas as pd

    found = list(rows(predictor, source, batch_size))
    return pd.DataFrame(found, columns=list(predictor.columns))

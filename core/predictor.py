"""What jobs and serving see of a domain: rows in, rows out. Torch at most, no lightning.

A domain's `predictor.py` has one class named `Predictor` with these methods and two attributes. The steps
are separate so that a job can stream: cut the source into shards, read a shard's records, prepare each, run
a batch, and make rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from manyheads.core.errors import BadRecord, DataError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from manyheads.core.hub import ModelConfig

Row: TypeAlias = dict[str, object]
Source: TypeAlias = object  # a path, several paths, or a DataFrame; each domain says which it takes


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


def run(
    predictor: Predictor[H, R, S, B, O], records: Iterable[R], batch_size: int
) -> Iterator[tuple[list[Row], list[Bad], int]]:
    """Predict a stream of records batch by batch.

    Args:
        predictor: The steps.
        records: The stream; no more than a batch of it is held.
        batch_size: Records taken for a batch, bad ones included: the cuts never depend on the content.

    Yields:
        The rows of a batch, its bad records, and how many records it took from the stream.
    """
    stream = iter(records)
    while chunk := list(islice(stream, batch_size)):
        good, samples, bad = [], [], []
        for record in chunk:
            try:
                samples.append(predictor.prepare(record))
                good.append(record)
            except BadRecord as error:
                bad.append(Bad(record.id, str(error)))
        rows = predictor.rows(predictor.forward(predictor.collate(samples)), good) if good else []
        yield rows, bad, len(chunk)


def predict(
    predictor: Predictor[H, R, S, B, O], source: Source, batch_size: int | None = None
) -> pd.DataFrame:
    """Predict a whole source in memory.

    Raises:
        DataError: A record is bad; jobs (`manyheads predict`) set bad records aside instead.
    """
    import pandas as pd

    found: list[Row] = []
    for shard in predictor.shards(source, size=1024):
        for rows, bad, _ in run(predictor, predictor.read(shard), batch_size or predictor.batch_size):
            if bad:
                raise DataError(f"record {bad[0].id!r}: {bad[0].reason}")
            found.extend(rows)
    return pd.DataFrame(found, columns=list(predictor.columns))

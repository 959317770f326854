"""The steps from a source to rows: batches, bad records, a whole source in memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import pytest

from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Bad, predict, run


@dataclass(frozen=True)
class Number:
    """A record."""

    value: int

    @property
    def id(self):
        return f"n{self.value}"


class Halves:
    """Halves even numbers; shards of a source of so many numbers."""

    def __init__(self):
        self.batch_size = 3
        self.columns = {"id": "string", "half": "int64"}
        self.batches = []

    def shards(self, source, size):
        return [range(i, min(i + size, source)) for i in range(0, source, size)]

    def read(self, shard):
        return map(Number, shard)

    def prepare(self, record):
        if record.value % 2:
            raise BadRecord("odd")
        return record.value

    def collate(self, samples):
        self.batches.append(len(samples))
        return samples

    def forward(self, batch):
        return [value // 2 for value in batch]

    def rows(self, outputs, records):
        return [{"id": r.id, "half": half} for r, half in zip(records, outputs, strict=True)]


def test_batches_in_order_with_bad_records_aside():
    found = list(run(Halves(), map(Number, range(7)), 3))
    assert [taken for _, _, taken in found] == [3, 3, 1]
    assert [bad for _, bad, _ in found] == [[Bad("n1", "odd")], [Bad("n3", "odd"), Bad("n5", "odd")], []]
    rows = [row for rows, _, _ in found for row in rows]
    assert rows == [{"id": f"n{i}", "half": i // 2} for i in (0, 2, 4, 6)]


def test_model_does_not_run_on_a_batch_of_bad_records():
    predictor = Halves()
    assert list(run(predictor, map(Number, (1, 3)), 2)) == [([], [Bad("n1", "odd"), Bad("n3", "odd")], 2)]
    assert predictor.batches == []


def test_stream_is_not_read_ahead():
    numbers = count()
    next(run(Halves(), map(Number, numbers), 4))
    assert next(numbers) == 4


def test_other_errors_are_not_bad_records():
    class Broken(Halves):
        def prepare(self, record):
            raise ValueError("a fault of the code")

    with pytest.raises(ValueError, match="a fault of the code"):
        list(run(Broken(), [Number(0)], 1))


class Evens(Halves):
    """Has no bad records."""

    def read(self, shard):
        return (Number(2 * value) for value in shard)


def test_predict_a_source_of_several_shards():
    frame = predict(Evens(), 2000)
    assert list(frame.columns) == ["id", "half"]
    assert frame["half"].tolist() == list(range(2000))


def test_predict_takes_a_batch_size():
    predictor = Evens()
    predict(predictor, 10)
    predict(predictor, 10, batch_size=10)
    assert predictor.batches == [3, 3, 3, 1, 10]


def test_predict_raises_on_a_bad_record():
    with pytest.raises(DataError, match="record 'n1': odd"):
        predict(Halves(), 4)


def test_predict_of_nothing_has_the_columns():
    assert list(predict(Halves(), 0).columns) == ["id", "half"]

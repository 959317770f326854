"""Preparing MovieLens 100K for BERT4Rec, ours and RecBole's (`recsys_peer` says what that needs).

Both read RecBole's own `ml-100k.inter`, take the 5-core, leave one out, and have training, validation and
test ready; imports are left out. RecBole makes a padded row of every prefix of every history, ours are
windows cut when a batch is made: one epoch of batches is counted in ours, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import Case, Note, missing
from benchmarks.recsys_peer import configure, examples, installed, quiet, version

LENGTHS = (50, 200)
TARGET = 10.0
NAME = "prepare ML-100K and cut an epoch"


def ours(path: Path, length: int) -> int:
    """Make everything ready, and cut an epoch's batches; return the items."""
    from manyheads.recsys.logs import Columns, read_log
    from manyheads.recsys.sequences import Sequences, cells, k_core, packed, windows
    from manyheads.recsys.splits import leave_one_out

    log = read_log(path, Columns("user_id:token", "item_id:token", "timestamp:float"))
    found, _ = k_core(Sequences.of(log), 5, 5)
    split = leave_one_out(found)
    cut = windows(*split.span("train"), length, length // 2)
    for part in ("val", "test"):
        questions = split.questions(part)  # type: ignore[arg-type]
        cells(found.items, questions.first, questions.end)
    split.counts()
    for first in range(0, len(cut.users), 64):
        packed(found.items, cut.first[first : first + 64], cut.end[first : first + 64], 1)
    return found.num_items


def theirs(length: int) -> int:
    """Make everything ready by RecBole; return the items."""
    from recbole.data import create_dataset, data_preparation

    config = configure(length)
    with quiet():
        dataset = create_dataset(config)
        data_preparation(config, dataset)
    return int(dataset.item_num) - 1


def cases(device: str) -> Iterator[Case | Note]:
    """Two lengths of a window."""
    for length in LENGTHS:
        shape = f"99,287 events, length {length}"
        if not installed():
            yield missing(NAME, shape, "recbole")
            continue
        path = examples() / "ml-100k" / "ml-100k.inter"
        mine, other = partial(ours, path, length), partial(theirs, length)
        yield Case(
            NAME, shape, version("recbole"), mine, other, TARGET, partial(_differ, mine, other),
            tolerance=0.0, rounds=3,
        )  # fmt: skip


def _differ(mine: partial[int], other: partial[int]) -> float:
    """Whether both have found the same number of items."""
    return abs(mine() - other())

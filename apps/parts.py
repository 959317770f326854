"""One shard to one part file: the function that every engine runs.

A part is written under a temporary name and gets its own when it is whole (`stores` says how); its bad
records, and the folder of the files that its rows carry, get their final names before it. So a part that is
there is whole, and what belongs to it is there too. Its footer tells the job, the counts and the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from manyheads.apps import locks
from manyheads.apps.stores import Store, sha256
from manyheads.core import files
from manyheads.core.errors import ManyheadsError
from manyheads.core.predictor import AnyPredictor, Bad, File, Row, Settings, Spent, run

ROW_GROUP = 32_768  # rows; what a reader, and this writer, must hold at once
FOOTER = "manyheads"
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

Load: TypeAlias = Callable[[str], tuple[AnyPredictor, dict[str, str]]]
Fault: TypeAlias = Callable[[str, int], None]
OnBatch: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Counts:
    """What a shard, or several, came to."""

    records: int = 0
    rows: int = 0
    bad: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.records + other.records, self.rows + other.rows, self.bad + other.bad)


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a shard, or several, and those of them that went into reading and preparing records."""

    preparing: float = 0.0
    total: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.preparing + other.preparing, self.total + other.total)


@dataclass(frozen=True)
class Done:
    """A shard that is done; what it cost differs from run to run, and is in no file.

    Args:
        counts: What it came to.
        cost: What it cost.
        starting: Seconds until its worker was ready, where the shard was the worker's first.
    """

    counts: Counts
    cost: Cost
    starting: float = 0.0


@dataclass(frozen=True)
class Task:
    """What the shards of a job share; picklable, so that engines can send it to their workers.

    Args:
        model: The model's reference.
        identity: Name and hash of the model, as `load` returned them at the start.
        load: Returns predictor and identity of a reference.
        store: The job's folder.
        run: The number of this run, which the folder's lock holds.
        total: Shards of the job.
        batch_size: Records a batch.
        threads: Threads of torch in each process; part of the job, for sums depend on them in the last bit.
        fingerprint: The job's.
        settings: What the predictor is configured with.
        renamed: What stands for the beginning of a path, in the reasons against records: the addresses of
            inputs that were copied here.
        fault: Called at the steps of the protocol, for tests that end the process there.
    """

    model: str
    identity: dict[str, str]
    load: Load
    store: Store
    run: str
    total: int
    batch_size: int
    threads: int
    fingerprint: str
    settings: Settings = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    fault: Fault | None = None

    def part(self, index: int) -> str:
        """The final name of a shard's part."""
        return f"part-{index:05d}-of-{self.total:05d}.parquet"

    def bad(self, index: int) -> str:
        """The final name of a shard's bad records; there is none where all are good."""
        return f"bad-{index:05d}.jsonl"

    def files(self, index: int) -> str:
        """The final name of the folder of a shard's files; there is none where no row carries one."""
        return f"files-{index:05d}"

    def check_held(self) -> None:
        """Refuse to store anything for a run that holds the folder no longer.

        Raises:
            ManyheadsError: It does not.
        """
        text = locks.settled(self.store)
        if not locks.is_of(text, self.run):
            who = f"another runner took it over ({locks.holder(text)})" if text else "its lock is gone"
            raise ManyheadsError(f"{self.store.name} is no longer this run's: {who}")

    def reach(self, point: str, index: int) -> None:
        """Tell the tests' hook where the protocol stands."""
        if self.fault is not None:
            self.fault(point, index)


def arrow_type(kind: str) -> Any:
    """Return the Arrow type of a column: a name of `pyarrow.type_for_alias`, or `list<name>`."""
    import pyarrow as pa

    inner = re.fullmatch(r"list<(\w+)>", kind)
    return pa.list_(pa.type_for_alias(inner[1])) if inner else pa.type_for_alias(kind)


class Part:
    """Writes rows of the same columns and types to a parquet file, in row groups of a fixed size.

    Args:
        path: The file.
        columns: The columns and their Arrow types; the file has them even without rows.
    """

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.rows = 0
        self._names = columns.keys()
        self._schema = pa.schema([(name, arrow_type(kind)) for name, kind in columns.items()])
        self._pending: list[Any] = []
        self._held = 0
        self._writer = pq.ParquetWriter(str(path), self._schema, compression="zstd", write_page_checksum=True)

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(OSError):  # a full disk again; the file goes away in any case
                self._writer.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Raises:
            ManyheadsError: A row has other columns than the predictor declares.
        """
        import pyarrow as pa

        for row in rows:
            if row.keys() != self._names:
                raise ManyheadsError(
                    f"a row has columns {list(row)}, the predictor declares {list(self._names)}"
                )
        self._pending.append(pa.Table.from_pylist(list(rows), schema=self._schema))
        self._held += len(rows)
        self.rows += len(rows)
        if self._held >= ROW_GROUP:
            self._flush(self._held - self._held % ROW_GROUP)

    def _flush(self, count: int) -> None:
        import pyarrow as pa

        table = pa.concat_tables(self._pending)
        self._writer.write_table(table.slice(0, count), row_group_size=ROW_GROUP)
        self._pending = [table.slice(count)]
        self._held -= count

    def close(self, footer: Mapping[str, object]) -> None:
        """Write what is held, and the footer."""
        if self._held:
            self._flush(self._held)
        self._writer.add_key_value_metadata({FOOTER: json.dumps(footer, sort_keys=True)})
        self._writer.close()


class Carried:
    """Stores the files that a shard's rows carry, under a temporary folder.

    Args:
        store: The job's folder.
        name: The final name of theirs.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.written = store, name, store.scratch(name)
        self.digests: dict[str, str] = {}

    def replace(self, row: Row) -> Row:
        """Return the row with the names of its files, below the job's folder, in their place."""
        return {name: self._keep(value) if isinstance(value, File) else value for name, value in row.items()}

    def _keep(self, file: File) -> str:
        self.written.mkdir(exist_ok=True)
        name = f"{len(self.digests):05d}{file.suffix}"
        (self.written / name).write_bytes(file.content)
        self.digests[f"{self.name}/{name}"] = hashlib.sha256(file.content).hexdigest()
        return f"{self.name}/{name}"

    def commit(self) -> None:
        """Give the folder its final name, in place of what an earlier run left there."""
        if self.digests:
            self.store.commit(self.written, self.name)
        else:
            self.store.remove(self.name)


def run_shard(predictor: AnyPredictor, task: Task, index: int, shard: object, on_batch: OnBatch) -> Done:
    """Predict one shard into its part.

    Args:
        predictor: The model's steps.
        task: What the job's shards share.
        index: The shard's number.
        shard: The shard.
        on_batch: Called after each batch with its records and bad records; what it raises ends the shard.

    Raises:
        ManyheadsError: The disk is full, or the model failed; nothing is left under a final name.
    """
    store, part, bad = task.store, task.part(index), task.bad(index)
    written = [store.scratch(part), store.scratch(bad)]
    begin, spent, carried = time.process_time(), Spent(), Carried(store, task.files(index))
    try:
        counts = _write(predictor, task, index, shard, on_batch, spent, carried)
        if not counts.bad:
            written.pop().unlink()
        task.reach("written", index)
        task.check_held()
        carried.commit()
        if counts.bad:
            store.commit(written[1], bad)
        else:
            store.remove(bad)
        task.reach("bad", index)
        store.commit(written[0], part)
        task.reach("part", index)
    except ManyheadsError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ManyheadsError(f"shard {index}: {error}") from error
    except Exception as error:
        raise ManyheadsError(f"shard {index}: {type(error).__name__}: {error}") from error
    finally:
        for file in (*written, carried.written):
            files.remove(file)
    return Done(counts, Cost(spent.preparing, time.process_time() - begin))


def _write(
    predictor: AnyPredictor,
    task: Task,
    index: int,
    shard: object,
    on_batch: OnBatch,
    spent: Spent,
    carried: Carried,
) -> Counts:
    """Write the part, the bad records and the files of a shard under their temporary names."""
    counts, digest = Counts(), hashlib.sha256()
    written, lines = task.store.scratch(task.part(index)), task.store.scratch(task.bad(index))
    with Part(written, predictor.columns) as part, lines.open("wb") as bad_file:
        for rows, bad, taken in run(predictor, predictor.read(shard), task.batch_size, spent):
            part.write([carried.replace(row) for row in rows])
            for line in (_line(each, task.renamed) for each in bad):
                bad_file.write(line)
                digest.update(line)
            counts += Counts(taken, len(rows), len(bad))
            on_batch(taken, len(bad))
        footer = {"fingerprint": task.fingerprint, "shard": index, **asdict(counts)}
        if carried.digests:
            footer["files"] = carried.digests
        part.close({**footer, "bad_sha256": digest.hexdigest()})
    return counts


def _line(bad: Bad, renamed: Sequence[tuple[str, str]]) -> bytes:
    reason = bad.reason
    for path, address in renamed:
        reason = reason.replace(path, address)
    return (json.dumps({"id": bad.id, "reason": reason}, ensure_ascii=False) + "\n").encode()


def read_counts(task: Task, index: int) -> Counts | None:
    """Verify a part by its footer, its bad records and files by their hashes, and every page by its checksum.

    Returns:
        The part's counts; None where it is missing, damaged, or of another job, and must be made again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with task.store.open(task.part(index)) as content:
            file = pq.ParquetFile(content, page_checksum_verification=True)
            footer = json.loads(file.metadata.metadata[FOOTER.encode()])
            rows = sum(batch.num_rows for batch in file.iter_batches())
        counts = Counts(footer["records"], footer["rows"], footer["bad"])
        if (footer["fingerprint"], footer["shard"], counts.rows) != (task.fingerprint, index, rows):
            return None
        bad_sha256 = sha256(task.store, task.bad(index)) if counts.bad else hashlib.sha256().hexdigest()
        carried = dict(footer.get("files", {}))
        if any(sha256(task.store, name) != digest for name, digest in carried.items()):
            return None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return counts if bad_sha256 == footer["bad_sha256"] else None

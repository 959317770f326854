"""A job over a fake domain, as a script: `python fake_job.py OPTIONS`, where OPTIONS is JSON.

Needs no torch, so that the many processes of the fault tests start fast. A source is a text file, a record a
line `id value`; a record gives as many rows as its value says, and a value that is no number makes it bad.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from manyheads.apps import locks
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core.errors import BadRecord, ManyheadsError
from manyheads.core.predictor import File


class Disk(LocalFileSystem):
    """A folder of this machine as if it lay elsewhere, and one that shows files while they are written."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("disk://"))


fsspec.register_implementation("disk", Disk, clobber=True)


@dataclass(frozen=True)
class Line:
    """A record."""

    id: str
    value: str


class FakePredictor:
    """Counts; `delay` seconds a batch, and an error in the batch that holds the record `crash`."""

    def __init__(self, delay=0.0, crash=None):
        self.batch_size = 4
        self.columns = {"id": "string", "step": "int64", "yhat": "float64"}
        self.delay = delay
        self.crash = crash

    def shards(self, source, size):
        paths = source if isinstance(source, list) else [source]
        counts = [(path, len(Path(path).read_text().splitlines())) for path in paths]
        return [(path, start, size) for path, count in counts for start in range(0, count, size)]

    def read(self, shard):
        path, start, size = shard
        for line in Path(path).read_text().splitlines()[start : start + size]:
            yield Line(*line.split(" ", 1))

    def prepare(self, record):
        if not record.value.isdecimal():
            raise BadRecord(f"value {record.value!r} is no number")
        return int(record.value)

    def collate(self, samples):
        return list(samples)

    def forward(self, batch):
        time.sleep(self.delay)
        return [[value + step / 7 for step in range(value)] for value in batch]

    def rows(self, outputs, records):
        if self.crash in [record.id for record in records]:
            raise RuntimeError("the model failed")
        return [
            {"id": record.id, "step": step, "yhat": yhat}
            for record, out in zip(records, outputs, strict=True)
            for step, yhat in enumerate(out)
        ]


class Filing(FakePredictor):
    """Gives each row a file as well."""

    def __init__(self, delay=0.0, crash=None):
        super().__init__(delay, crash)
        self.columns = {**self.columns, "file": "string"}

    def rows(self, outputs, records):
        found = super().rows(outputs, records)
        return [{**row, "file": File(f"{row['yhat']}\n".encode(), ".txt")} for row in found]


class Joining(Filing):
    """Joins the files of a record; fails behind the first where a file `stumble` lies beside the job."""

    def finish(self, rows, parts, results):
        for row in rows:
            with (results / f"{row['id']}.txt").open("ab") as joined:
                joined.write((parts / row["file"]).read_bytes())
            if (parts.parent / "stumble").exists():
                raise RuntimeError("the disk stumbled")


class Consuming(Joining):
    """Has no use for the rows' files behind that."""

    temporary_files = True


KINDS = {"plain": FakePredictor, "filing": Filing, "joining": Joining, "consuming": Consuming}


def load(reference):
    """Read the reference, JSON: `kind`, `delay`, `crash` of the predictor; `name` alone identifies it."""
    known = json.loads(reference)
    kind = KINDS[known.get("kind", "plain")]
    return kind(known.get("delay", 0.0), known.get("crash")), {"name": known["name"], "sha256": "0"}


def end_at(point, index, signum, marker, reached, at):
    """Send this process a signal at a point of the protocol: each time, or once where there is a marker."""
    if (reached, at) == (point, index) and not (marker and os.path.exists(marker)):
        if marker:
            Path(marker).touch()
        os.kill(os.getpid(), signum)


def main():
    """Run the job; print the result, or the error and its exit code."""
    options = json.loads(sys.argv[1])
    fault = options.pop("fault", None)
    marker = options.pop("marker", None)
    limit = options.pop("file_limit", None)
    locks.BEAT_S = options.pop("beat", locks.BEAT_S)
    locks.SETTLE_S = min(locks.SETTLE_S, locks.BEAT_S)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    hook = partial(end_at, *fault, signal.SIGKILL, marker) if fault else None
    try:
        result = run_job(JobOptions(**options), load=load, fault=hook)
    except ManyheadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(vars(result)))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())

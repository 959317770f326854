"""Recordings of any length in, a file a speaker out: what batch jobs and serving see. Torch, no lightning.

A recording is cut in spans, the records of a job: a long file is separated in parallel, in flat memory, and
goes on where it was killed. A span is separated in chunks. `finish` finds which speakers of all a recording's
chunks are one, and joins the chunks.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torchaudio.functional as audio_functional
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.core.predictor import File, Row
from manyheads.speech.audio import Recording, check_channel, read
from manyheads.speech.separation import results as joined
from manyheads.speech.separation.alignment import Alignment
from manyheads.speech.separation.chunks import cuts, join
from manyheads.speech.separation.results import FORMATS, SampleFormat, Span
from manyheads.speech.sources import AudioRef, list_audio

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig

BATCH_SECONDS = 32  # of chunks that the model sees at once


@dataclass(frozen=True)
class Options:
    """How recordings are separated.

    Args:
        chunk_seconds: What the model sees of a recording at once.
        overlap_seconds: Of neighbouring chunks: by it, and by their voices, the speakers keep their order.
        span_seconds: What is done at once, and again where a job is killed.
        channel: "mix", the mean of a recording's channels, or the number of one.
        sample_format: Of the files: "pcm16" or "float".
        silent_db: A speaker below this level, of the mixture's, is called silent.

    Raises:
        UsageError: A value is out of range, or does not go with another.
    """

    chunk_seconds: int = 24
    overlap_seconds: int = 8  # over 3 s weak models were seen to lose the order
    span_seconds: int = 120
    channel: str = "mix"
    sample_format: SampleFormat = "pcm16"
    silent_db: int = -40

    def __post_init__(self) -> None:
        check_channel(self.channel)
        if self.sample_format not in FORMATS:
            close = did_you_mean(str(self.sample_format), FORMATS)
            raise UsageError(f"--sample-format {self.sample_format}: it takes {', '.join(FORMATS)}{close}")
        if not 1 <= self.overlap_seconds <= self.chunk_seconds / 2:
            raise UsageError(
                f"--overlap-seconds {self.overlap_seconds}: it takes 1 to half of the chunk's"
                f" {self.chunk_seconds} s"
            )
        if self.span_seconds < 2 * self.chunk_seconds:
            raise UsageError(f"--span-seconds {self.span_seconds}: it takes two chunks or more")


@dataclass(frozen=True)
class Record:
    """A span of a recording, not yet read; or a recording, and what is wrong with it.

    Args:
        id: The recording's, with the span's number where there are several.
        ref: The recording.
        number, count: The span's, and how many there are.
        start, stop: Its samples, at the model's rate, from where the recording begins.
        until: Where the next span begins.
        first: The recording's first sample, where it is a part of a file.
        fault: What is wrong.
    """

    id: str
    ref: AudioRef
    number: int = 0
    count: int = 1
    start: int = 0
    stop: int = 0
    until: int = 0
    first: int = 0
    fault: str | None = None


@dataclass(frozen=True)
class Separated:
    """A span's speakers.

    Args:
        mixture: What was separated, `[L]`.
        chunks: `[chunks, speakers, samples]`, the speakers of each in an order of its own.
        starts: Where the chunks begin.
    """

    mixture: Tensor
    chunks: Tensor
    starts: list[int]


class Predictor:
    """Separates the speakers of recordings.

    A source is a folder, a sound file, a pattern, a manifest (CSV, parquet, JSON lines) with a column
    `audio`, several of these, or a DataFrame; `speech.sources` says more. Results are at the model's rate.

    A row of a part is a span; a job's `results` have a WAV a speaker, and `speakers.parquet` with a row each:
    `id, speaker, file, seconds, sample_rate`, `level_db` of the mixture's level, `silent`, `gain_db` (not 0
    where 16-bit samples would have been clipped) and `doubtful_joins`, places where the overlap of two
    chunks does not tell the order of the speakers, for they are alike or silent there, or tells another than
    their voices do.

    Args:
        model: Gives `[B, speakers, L]` for mixtures `[B, L]` and `lengths`.
        sample_rate: Of its input, in Hz.
        options: How recordings are separated.
    """

    batch_size = 32  # spans of a shard; those of short recordings go through the model together
    shard_size = 256  # and no more seconds than a span has
    temporary_files = True
    columns: Mapping[str, str] = joined.COLUMNS

    def __init__(self, model: nn.Module, sample_rate: int, options: Options | None = None) -> None:
        self.model, self.sample_rate = model.eval(), sample_rate
        self.options = Options() if options is None else options
        self._open: tuple[AudioRef, Recording] | None = None  # what was read last

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: Its preprocessing names no sample rate.
        """
        rate = config.preprocessing.get("sample_rate")
        if not isinstance(rate, int) or rate < 1:
            raise DataError(f"the model folder's preprocessing has sample_rate = {rate!r}")
        return cls(model, rate)

    @property
    def settings(self) -> dict[str, str | int]:
        """The options by name."""
        return dict(vars(self.options))

    def configure(self, settings: core.Settings) -> Predictor:
        """Return this model's predictor with other options.

        Raises:
            UsageError: A value is out of range.
        """
        options = replace(self.options, **cast("dict[str, Any]", dict(settings)))
        return Predictor(self.model, self.sample_rate, options)

    def separate(self, samples: Tensor, sample_rate: int) -> Tensor:
        """Separate a recording that is in memory.

        Args:
            samples: `[L]`, or `[channels, L]`, of which the options choose.
            sample_rate: Theirs, in Hz.

        Shape:
            `[speakers, L]`, at the model's rate.

        Raises:
            BadRecord: No such channel, no samples, or NaN or infinite ones.
        """
        of = self.options
        channels = torch.atleast_2d(samples).float()
        if of.channel != "mix" and int(of.channel) >= len(channels):
            raise BadRecord(f"no channel {of.channel}: it has {len(channels)}")
        mono = channels.mean(0) if of.channel == "mix" else channels[int(of.channel)]
        if not len(mono) or not torch.isfinite(mono).all():
            raise BadRecord("NaN or infinite samples" if len(mono) else "it has no samples")
        found = self.forward([audio_functional.resample(mono, sample_rate, self.sample_rate)])[0]
        pieces = list(zip(found.chunks, found.starts, strict=True))
        orders, _ = Alignment.of(pieces, self.sample_rate).orders()
        return torch.cat(list(join(pieces, orders)), 1)

    def predict(self, source: core.Source, output: Path | str | None = None, **settings: Any) -> pd.DataFrame:
        """Separate a whole source; `manyheads predict` does it as a job.

        Args:
            source: As the class says.
            output: A folder for the speakers' files, new or empty; without it the frame's column `audio` has
                their samples.
            settings: Options by name.

        Raises:
            DataError: A recording cannot be used.
            UsageError: An option is out of range, or the folder holds something.

        Example:
            >>> manyheads.load("runs/mossformer/model").predict("talk.wav", output="voices")
        """
        import pandas as pd

        target = None if output is None else Path(output)
        if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target} is there already: choose another folder")
        if settings:
            return core.configure(self, settings).predict(source, target)  # type: ignore[call-arg]
        with tempfile.TemporaryDirectory(prefix="manyheads-") as name:
            parts, made = Path(name), Path(name) / "results"
            made.mkdir()
            self.finish(_stored(core.rows(self, source), parts), parts, made)
            frame = pd.read_parquet(made / joined.TABLE)
            if target is None:
                samples = [read(made / file, self.sample_rate).numpy() for file in frame["file"]]
                frame["audio"] = pd.Series(samples, dtype=object)
            else:
                shutil.copytree(made, target, dirs_exist_ok=True)
        return frame

    def shards(self, source: core.Source, size: int) -> list[tuple[Record, ...]]:
        """Cut a source into shards of a span's seconds, and at most `size` recordings; headers are read."""
        found: list[tuple[Record, ...]] = []
        shard: list[Record] = []
        seconds = 0.0
        for ref in list_audio(source):
            for record in self._spans(ref):
                length = (record.stop - record.start) / self.sample_rate
                if shard and (len(shard) == size or seconds + length > self.options.span_seconds):
                    found.append(tuple(shard))
                    shard, seconds = [], 0.0
                shard.append(record)
                seconds += length
        return [*found, tuple(shard)] if shard else found

    def named_files(self, source: core.Source) -> Iterator[str]:
        """Yield the sound files that a source's manifests name."""
        return list_audio(source).named_files()

    def _spans(self, ref: AudioRef) -> list[Record]:
        """Cut a recording into spans."""
        of = self.options
        try:
            with Recording(ref.load(), self.sample_rate, of.channel) as recording:
                first, last = ref.bounds(recording)
        except BadRecord as error:
            return [Record(ref.id, ref, fault=str(error))]
        seconds = (of.span_seconds, of.overlap_seconds, of.chunk_seconds)
        pieces = cuts(last - first, *(self.sample_rate * each for each in seconds))
        nexts = [start for start, _ in pieces[1:]] + [last - first]
        several = len(pieces) > 1
        return [
            Record(f"{ref.id}#{i}" if several else ref.id, ref, i, len(pieces), start, stop, until, first)
            for i, ((start, stop), until) in enumerate(zip(pieces, nexts, strict=True))
        ]

    def count(self, shard: Sequence[Record]) -> int:
        """Return how many spans a shard has."""
        return len(shard)

    def read(self, shard: Sequence[Record]) -> Iterator[Record]:
        """Yield a shard's spans."""
        return iter(shard)

    def prepare(self, record: Record) -> Tensor:
        """Read a span; its file stays open for the next one.

        Shape:
            `[L]`.

        Raises:
            BadRecord: It cannot be used, and why.
        """
        if record.fault is not None:
            raise BadRecord(record.fault)
        if self._open is None or self._open[0] != record.ref:
            recording = Recording(record.ref.load(), self.sample_rate, self.options.channel)
            if self._open is not None:
                self._open[1].close()
            self._open = record.ref, recording
        try:
            return self._open[1].read(record.first + record.start, record.first + record.stop)
        except BadRecord as error:
            if record.count == 1:
                raise
            raise BadRecord(f"{error}; so the whole recording has no result") from error

    def collate(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Leave spans as they are: chunks make the batches."""
        return list(samples)

    def forward(self, batch: Sequence[Tensor]) -> list[Separated]:
        """Separate spans `[L]`, chunks of about equal length together."""
        of = self.options
        size, overlap = of.chunk_seconds * self.sample_rate, of.overlap_seconds * self.sample_rate
        pieces = [
            (index, start, samples[start:stop])
            for index, samples in enumerate(batch)
            for start, stop in cuts(len(samples), size, overlap, least=size)
        ]
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][2]))  # stable
        separated: dict[int, Tensor] = {}
        while order:
            together = max(1, BATCH_SECONDS * self.sample_rate // len(pieces[order[0]][2]))
            now, order = order[:together], order[together:]
            separated.update(zip(now, self._separate([pieces[i][2] for i in now]), strict=True))
        found = []
        for index, samples in enumerate(batch):
            own = [i for i, piece in enumerate(pieces) if piece[0] == index]
            chunks = torch.stack([separated.pop(i) for i in own])
            found.append(Separated(samples, chunks, [pieces[i][1] for i in own]))
        return found

    def _separate(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """Run the model over chunks, the longest first."""
        weight = next(self.model.parameters(), torch.zeros(()))
        counts = torch.tensor([len(chunk) for chunk in chunks])
        mixture = nn.utils.rnn.pad_sequence(list(chunks), batch_first=True)
        equal = int(counts.min()) == mixture.shape[1]
        with torch.inference_mode():
            mixture = mixture.to(weight.device, weight.dtype)
            out = self.model(mixture, None if equal else counts.to(weight.device)).float().cpu()
        if not torch.isfinite(out).all():
            raise DataError("the model gives NaN or infinite samples: its weights are broken")
        return [each[:, :count] for each, count in zip(out, counts.tolist(), strict=True)]

    def rows(self, outputs: Sequence[Separated], records: Sequence[Record]) -> list[Row]:
        """Make a row a span."""
        found: list[Row] = []
        for out, record in zip(outputs, records, strict=True):
            content = io.BytesIO()
            np.save(content, out.chunks.numpy())
            own = out.mixture[: record.until - record.start].double()
            span = Span(
                record.ref.id,
                record.number,
                record.count,
                record.start,
                record.stop - record.start,
                float(own.square().sum()),
                float(out.chunks.abs().max()),
                [record.start + start for start in out.starts],
                File(content.getvalue(), ".npy"),
            )
            found.append(dict(vars(span)))
        return found

    def finish(self, rows: Iterator[Row], parts: Path, results: Path) -> None:
        """Join the spans of each recording: a file a speaker, and the table of all."""
        of, found = self.options, []
        for _, group in groupby(map(joined.span_of, rows), key=lambda span: span.id):
            spans = list(group)
            if joined.whole(spans):
                found += joined.write(spans, parts, results, self.sample_rate, of.sample_format, of.silent_db)
        joined.write_table(found, results)


def _stored(rows: Iterator[Row], parts: Path) -> Iterator[Row]:
    """Write the files of rows below a folder, as a job does."""
    for number, row in enumerate(rows):
        file = cast(File, row["audio"])
        (parts / f"{number}{file.suffix}").write_bytes(file.content)
        yield {**row, "audio": f"{number}{file.suffix}"}

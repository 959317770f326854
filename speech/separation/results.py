"""The spans of recordings put together: one WAV a speaker, and a table with a row each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from torch import Tensor

from manyheads.speech.separation.alignment import Alignment
from manyheads.speech.separation.chunks import join
from manyheads.speech.sources import file_stem

SampleFormat: TypeAlias = Literal["pcm16", "float"]
FORMATS: tuple[SampleFormat, ...] = get_args(SampleFormat)
TABLE = "speakers.parquet"
LARGEST_WAV = (1 << 32) - (1 << 16)  # bytes; a longer one is written as RF64
LOUDEST = 1 - 2**-15  # what a 16-bit sample holds
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("speaker", pa.int32()),
        ("file", pa.string()),
        ("seconds", pa.float64()),
        ("sample_rate", pa.int32()),
        ("level_db", pa.float64()),
        ("silent", pa.bool_()),
        ("gain_db", pa.float64()),
        ("doubtful_joins", pa.int32()),
    ]
)


COLUMNS: dict[str, str] = {
    "id": "string",
    "span": "int32",
    "spans": "int32",
    "start": "int64",
    "samples": "int64",
    "energy": "float64",
    "peak": "float64",
    "chunks": "list<int64>",
    "audio": "string",
}  # of a span's row: the fields of `Span`


@dataclass(frozen=True)
class Span:
    """A stretch of a recording, separated; its row in a part.

    Args:
        id: The recording's.
        span, spans: Its number, and how many there are.
        start, samples: Where it begins, and its length.
        energy: Of the mixture up to where the next span begins: the sum of squares.
        peak: The loudest sample of any speaker in any chunk.
        chunks: Where in the recording each of its chunks begins.
        audio: File of the chunks' samples, `[chunks, speakers, samples of a chunk]` float32; the speakers of
            each are in the order that the model gave.
    """

    id: str
    span: int
    spans: int
    start: int
    samples: int
    energy: float
    peak: float
    chunks: list[int]
    audio: object

    def load(self, parts: Path) -> Iterator[tuple[Tensor, int]]:
        """Yield the chunks, each `[speakers, samples]` with its start."""
        samples = np.load(parts / str(self.audio), allow_pickle=False)
        return zip(torch.from_numpy(samples), self.chunks, strict=True)


def whole(spans: Sequence[Span]) -> bool:
    """Whether a recording's spans are all there: a bad one leaves a gap, and the recording out."""
    return [span.span for span in spans] == list(range(spans[0].spans))


def write(
    spans: Sequence[Span],
    parts: Path,
    results: Path,
    sample_rate: int,
    sample_format: SampleFormat,
    silent_db: float,
) -> list[dict[str, Any]]:
    """Join the chunks of a recording's spans into one file a speaker.

    They are read twice: for the orders of their speakers, and to be written.

    The levels are the model's. Where 16-bit samples would be clipped, all speakers of the recording are made
    quieter by the same gain, and the rows say by how much.

    Args:
        spans: All of them, in order.
        parts: What their files lie below.
        results: Where the speakers' files go.
        sample_rate: In Hz.
        sample_format: 16-bit whole numbers, or 32-bit floating point.
        silent_db: A speaker below this level, of the mixture's, is called silent.

    Returns:
        A row a speaker.
    """
    peak = max(span.peak for span in spans)
    gain = LOUDEST / peak if sample_format == "pcm16" and peak > LOUDEST else 1.0
    length = spans[-1].start + spans[-1].samples
    orders, doubtful = Alignment.of(_chunks(spans, parts), sample_rate).orders()
    count = len(orders[0])
    stem, energies = file_stem(spans[0].id), torch.zeros(count, dtype=torch.float64)
    names = [f"{stem}.speaker{number}.wav" for number in range(1, count + 1)]
    (results / names[0]).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [stack.enter_context(_create(results / n, length, sample_rate, sample_format)) for n in names]
        for piece in join(_chunks(spans, parts), orders):
            energies += piece.double().square().sum(1)
            for file, samples in zip(files, piece.numpy() * np.float32(gain), strict=True):
                file.write(samples)
    if sample_format == "float":
        for name in names:
            _forget_the_time(results / name)
    mixture = sum(span.energy for span in spans)
    levels = [_decibel(float(energy), mixture) for energy in energies]
    return [
        {
            "id": spans[0].id,
            "speaker": number,
            "file": name,
            "seconds": length / sample_rate,
            "sample_rate": sample_rate,
            "level_db": level if math.isfinite(level) else None,
            "silent": level < silent_db,
            "gain_db": 20 * math.log10(gain),
            "doubtful_joins": doubtful,
        }
        for number, (name, level) in enumerate(zip(names, levels, strict=True), 1)
    ]


def write_table(rows: Sequence[dict[str, Any]], results: Path) -> None:
    """Write the rows of all speakers."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), results / TABLE, compression="zstd")


def _chunks(spans: Sequence[Span], parts: Path) -> Iterator[tuple[Tensor, int]]:
    return chain.from_iterable(span.load(parts) for span in spans)


def _decibel(energy: float, mixture: float) -> float:
    return 10 * math.log10(energy / mixture) if energy > 0 and mixture > 0 else -math.inf


def _create(path: Path, length: int, sample_rate: int, sample_format: SampleFormat) -> soundfile.SoundFile:
    size, subtype = (2, "PCM_16") if sample_format == "pcm16" else (4, "FLOAT")
    kind = "RF64" if length * size > LARGEST_WAV else "WAV"
    return soundfile.SoundFile(path, "w", sample_rate, 1, subtype, format=kind)


def _forget_the_time(path: Path) -> None:
    """Set to zero the time of writing that libsndfile notes beside the peak of a float WAV."""
    with path.open("r+b") as file:
        at = file.read(4096).find(b"PEAK")
        if at >= 0:
            file.seek(at + 12)  # name, size and version stand before it
            file.write(bytes(4))


def span_of(row: dict[str, object]) -> Span:
    """Return the span of a part's row."""
    return Span(**cast("dict[str, Any]", row))

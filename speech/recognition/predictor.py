"""Recordings of any length in, what is said and when out: what batch jobs and serving see.

Segments of speech are the records; a batch of them is sorted by length and recognised without padding. Torch
only, no lightning.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.core.predictor import Row
from manyheads.speech.audio import check_channel
from manyheads.speech.models.paraformer import Paraformer
from manyheads.speech.models.paraformer_streaming import Chunks
from manyheads.speech.recognition import subtitles
from manyheads.speech.recognition.decoding import Decoded, decode
from manyheads.speech.recognition.preprocessing import Preprocessing
from manyheads.speech.recognition.reading import Reader, Record, Unit
from manyheads.speech.recognition.segments import Rules
from manyheads.speech.recognition.stream import Stream
from manyheads.speech.recognition.vad import KINDS, Kind, make_detector
from manyheads.speech.sources import file_stem, list_audio

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from manyheads.core.hub import ModelConfig

SHARD_S = 900  # of recordings in a part file, about
LONGEST_S = 600  # that a segment may have
TALK_S = 5  # of a recording in which a detector finds one segment, about
MOST_THREADS = 8
SUBTITLES: dict[str, tuple[subtitles.Format, ...]] = {
    "none": (), "srt": ("srt",), "vtt": ("vtt",), "both": ("srt", "vtt"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How recordings are recognised.

    Args:
        vad: How speech is found: "silero", "energy", or "none": everything is recognised.
        channel: "mix", the mean of a recording's channels, or the number of one.
        batch_seconds: Of sound that the model sees at once, at most; a segment longer than that is alone.
        segment_seconds: Of a segment, at most.
        subtitles: Files that a job makes of each recording: "none", "srt", "vtt" or "both".

    Raises:
        UsageError: A value is none of these, or out of range.
    """

    vad: Kind = "silero"
    channel: str = "mix"
    batch_seconds: int = 120
    segment_seconds: int = 30
    subtitles: str = "none"

    def __post_init__(self) -> None:
        for name, known in (("vad", KINDS), ("subtitles", tuple(SUBTITLES))):
            value = getattr(self, name)
            if value not in known:
                close = did_you_mean(str(value), known)
                raise UsageError(f"--{name} {value}: it takes {', '.join(known)}{close}")
        check_channel(self.channel)
        if not 1 <= self.segment_seconds <= LONGEST_S:
            raise UsageError(f"--segment-seconds takes 1 to {LONGEST_S}, not {self.segment_seconds}")
        if self.batch_seconds < 1:
            raise UsageError(f"--batch-seconds must be at least 1, not {self.batch_seconds}")

    @property
    def rules(self) -> Rules:
        """How segments are made."""
        return Rules(longest_ms=1000 * self.segment_seconds)


class Predictor:
    """Recognises recordings.

    A source is a folder, a sound file, a pattern, a manifest (CSV, parquet, JSON lines) with a column
    `audio`, several of these, or a DataFrame; `speech.sources` says more.

    A row is a segment. A part of a recording (one of up to fifteen minutes has one part) in which nothing is
    said has one row over all of it, with an empty text: every recording that could be read is in the rows.

    Args:
        model: A Paraformer.
        preprocessing: Of its folder.
        options: How recordings are recognised.
    """

    batch_size = 32  # of 30 s: 61 MB of samples
    shard_size = 256
    columns: Mapping[str, str] = {
        "id": "string",
        "part": "int32",
        "segment": "int32",
        "start_ms": "int32",
        "end_ms": "int32",
        "text": "string",
        "words": "list<string>",
        "words_start_ms": "list<int32>",
        "words_end_ms": "list<int32>",
    }

    def __init__(
        self, model: Paraformer, preprocessing: Preprocessing, options: Options | None = None
    ) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing
        self.options = Options() if options is None else options
        self.front_end, self.tokens = preprocessing.front_end(), preprocessing.tokens()
        self.sample_rate = preprocessing.sample_rate

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing does not fit the model.
        """
        preprocessing = Preprocessing.from_json(config.preprocessing)
        if not isinstance(model, Paraformer):
            raise DataError(f"{config.name} is no recogniser")
        units = len(preprocessing.tokens())
        if model.vocab_size != units:
            raise DataError(f"the model folder lists {units} units, its model writes {model.vocab_size}")
        return cls(model, preprocessing)

    @property
    def settings(self) -> dict[str, str | int]:
        """The options by name."""
        return dict(vars(self.options))

    def configure(self, settings: core.Settings) -> Predictor:
        """Return this model's predictor with other options.

        Raises:
            UsageError: One is out of range, or silero-vad is not installed.
        """
        options = replace(self.options, **cast(dict[str, Any], dict(settings)))
        return Predictor(self.model, self.preprocessing, options)

    @property
    def prepare_threads(self) -> int:
        """The front end releases Python's lock: as many as torch may use here."""
        return min(MOST_THREADS, torch.get_num_threads())

    @cached_property
    def reader(self) -> Reader:
        """What finds the segments; made when it is needed, for it may need silero-vad."""
        of = self.options
        detector = make_detector(of.vad, self.sample_rate)
        return Reader(self.sample_rate, of.channel, detector, of.rules, self.front_end.window)

    def predict(
        self,
        source: core.Source,
        vad: Kind | None = None,
        channel: str | None = None,
        batch_seconds: int | None = None,
        segment_seconds: int | None = None,
    ) -> pd.DataFrame:
        """Predict a whole source in memory; arguments as `Options`.

        Raises:
            DataError: What is wrong with the source or a recording.
            UsageError: An option has no such value.

        Example:
            >>> manyheads.load("runs/digits/model").predict("calls/", vad="energy")[["id", "text"]]
        """
        asked: dict[str, str | int | None] = {"vad": vad, "channel": channel, "batch_seconds": batch_seconds}
        asked["segment_seconds"] = segment_seconds
        settings = {name: value for name, value in asked.items() if value is not None}
        return core.predict(self.configure(settings) if settings else self, source)

    def transcribe(self, samples: Tensor | np.ndarray, sample_rate: int) -> pd.DataFrame:
        """Predict one recording that is in memory; its id is "samples".

        Args:
            samples: Floating-point, full scale being 1.
            sample_rate: In Hz; another than the model's is resampled.

        Shape:
            samples `[L]`, or `[channels, L]`.

        Raises:
            DataError: The samples cannot be used, and why.
        """
        import pandas as pd
        import soundfile

        values = torch.as_tensor(samples)
        if not values.is_floating_point() or values.ndim not in (1, 2):
            kind = f"{list(values.shape)} of {values.dtype}"
            raise DataError(f"samples must be floating-point, [L] or [channels, L], not {kind}")
        content = io.BytesIO()
        soundfile.write(content, values.float().cpu().numpy().T, sample_rate, format="WAV", subtype="FLOAT")
        return self.predict(pd.DataFrame({"audio": [content.getvalue()], "id": ["samples"]}))

    def stream(self, endpoints: Kind = "none", chunks: Chunks | None = None) -> Stream:
        """Begin a recording that is still going on; `Stream` says the rest.

        Raises:
            UsageError: The model was not built with `streaming=True`.

        Example:
            >>> stream = manyheads.load("runs/online/model").stream(endpoints="energy")
            >>> for block in microphone:  # float32 arrays of any length
            ...     print(stream.push(block))
            >>> print(stream.finish())
        """
        return Stream(self.model, self.preprocessing, chunks, endpoints)

    def shards(self, source: core.Source, size: int) -> list[tuple[Unit, ...]]:
        """Cut a source into shards of at most `size` recordings and about fifteen minutes.

        Raises:
            DataError: A manifest cannot be used.
            UsageError: No such source, or speech cannot be found (silero-vad is not installed).
        """
        found: list[tuple[Unit, ...]] = []
        held: list[Unit] = []
        total = 0
        for unit in self.reader.units(list_audio(source)):
            if held and (len(held) >= size or total + unit.samples > SHARD_S * self.sample_rate):
                found.append(tuple(held))
                held, total = [], 0
            held.append(unit)
            total += unit.samples
        return [*found, tuple(held)] if held else found

    def named_files(self, source: core.Source) -> Iterator[str]:
        """Yield the sound files that a source's manifests name."""
        return list_audio(source).named_files()

    def count(self, shard: Sequence[Unit]) -> int:
        """Return how many segments a shard has, about: they are found when it is read."""
        of = self.options
        # Without a detector pieces are cut somewhere in the second half of what they may have.
        each = 0.75 * of.segment_seconds if of.vad == "none" else min(TALK_S, of.segment_seconds)
        return sum(max(1, round(unit.samples / self.sample_rate / each)) for unit in shard)

    def read(self, shard: Sequence[Unit]) -> Iterator[Record]:
        """Stream the segments of a shard's recordings; one part of a recording is held at a time."""
        return self.reader.read(shard)

    def prepare(self, record: Record) -> Tensor:
        """Make the model's input of a segment.

        Shape:
            `[T, front_end.size]`; T is 0 where nothing is said.

        Raises:
            BadRecord: It cannot be used, and why.
        """
        if isinstance(record.samples, BadRecord):
            raise record.samples
        if record.samples is None:
            return torch.zeros(0, self.front_end.size)
        return self.front_end(record.samples)

    def collate(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """A batch is a list: `forward` puts segments of similar lengths together."""
        return list(samples)

    def forward(self, batch: Sequence[Tensor]) -> list[Decoded]:
        """Run the model, on no more than `batch_seconds` at once."""
        most = int(self.options.batch_seconds * 1000 // self.front_end.row_ms)
        return decode(self.model, self.front_end, batch, most)

    def rows(self, outputs: Sequence[Decoded], records: Sequence[Record]) -> list[Row]:
        """Make a row a segment."""
        return [self._row(found, record) for found, record in zip(outputs, records, strict=True)]

    def _row(self, found: Decoded, record: Record) -> Row:
        start, end = record.start_ms, record.end_ms
        spans = [(min(start + a, end), min(start + b, end)) for a, b in found.spans]
        words = self.tokens.words(found.ids, spans)
        return {
            "id": record.id,
            "part": record.part,
            "segment": record.segment,
            "start_ms": start,
            "end_ms": end,
            "text": self.tokens.text(found.ids),
            "words": [word for word, _ in words],
            "words_start_ms": [times[0] for _, times in words],
            "words_end_ms": [times[1] for _, times in words],
        }

    def finish(self, rows: Iterable[Row], parts: Path, results: Path) -> None:
        """Write the subtitles of each recording, `ID.srt` or `ID.vtt`; `parts` is not used."""
        formats = SUBTITLES[self.options.subtitles]
        for id, said in groupby(rows, key=lambda row: row["id"]) if formats else ():
            base = results / file_stem(str(id))
            base.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                pairs = [(_create(stack, base, format), subtitles.Writer(format)) for format in formats]
                for file, writer in pairs:
                    file.write(writer.head)
                for each in map(_said, said):
                    for file, writer in pairs:
                        file.write(writer.write(each))


def _create(stack: ExitStack, base: Path, format: str) -> TextIO:
    path = base.with_name(f"{base.name}.{format}")
    return stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))


def _said(row: Row) -> subtitles.Said:
    """What a row gives to subtitles."""
    cells = cast(dict[str, Any], row)
    times = zip(cells["words_start_ms"], cells["words_end_ms"], strict=True)
    words = tuple(zip(cells["words"], times, strict=True))
    return subtitles.Said(cells["text"], cells["start_ms"], cells["end_ms"], words)

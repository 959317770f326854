"""Recordings of any length to segments of speech, in flat memory.

A long recording is cut in parts of about ten minutes, each at a quiet place near its nominal end: a part can
be read without the others, and so a job that is killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.core.errors import BadRecord
from manyheads.speech.audio import Channel, Recording
from manyheads.speech.recognition import segments
from manyheads.speech.recognition.segments import Rules, Span
from manyheads.speech.recognition.vad import WINDOW_MS, Detector, levels, window_of
from manyheads.speech.sources import AudioRef

PART_S = 600  # of a long recording, about
PIECE_S = 20  # that is read at once
SEARCH_S = 10  # to both sides of where a part should end


class Unit(NamedTuple):
    """A recording, or one part of a long one; nothing is open."""

    ref: AudioRef
    part: int | None  # None: all parts, of a recording that was not looked into
    samples: int = 0  # at the model's rate; 0 where they are not known


@dataclass(frozen=True)
class Record:
    """A segment of speech; a part of a recording in which nothing is said; or what is wrong with it.

    Args:
        id: Of the recording.
        part: Of the recording, counted from 0.
        segment: Of the part, counted from 0.
        start_ms, end_ms: In the recording.
        samples: None: nothing is said.
    """

    id: str
    part: int
    segment: int
    start_ms: int
    end_ms: int
    samples: Tensor | BadRecord | None


class Reader:
    """Reads recordings, and finds the segments in them.

    Args:
        sample_rate: Of the samples, in Hz.
        channel: "mix", the mean of a recording's channels, or the number of one.
        detector: Tells speech; None: everything is taken.
        rules: Of the segments.
        shortest: Samples that a recording must have.
    """

    def __init__(
        self, sample_rate: int, channel: Channel, detector: Detector | None, rules: Rules, shortest: int
    ) -> None:
        self.sample_rate, self.channel, self.detector = sample_rate, channel, detector
        self.rules, self.shortest = rules, shortest
        self.window = window_of(sample_rate)
        self._open: tuple[AudioRef, Recording] | None = None

    def units(self, refs: Iterable[AudioRef]) -> Iterator[Unit]:
        """Yield the parts of recordings.

        Headers are read, for the lengths; of recordings that lie in a table not even these.
        """
        for ref in refs:
            if not isinstance(ref.place, str):
                yield Unit(ref, None)
                continue
            try:
                ends = self._ends(ref, self._recording(ref))
            except BadRecord:
                yield Unit(ref, None)  # `read` says why
                continue
            for part, (start, stop) in enumerate(pairwise(ends)):
                yield Unit(ref, part, stop - start)
        self._close()

    def read(self, units: Iterable[Unit]) -> Iterator[Record]:
        """Stream the segments of units; one part of a recording is held at a time.

        The last recording stays open, for its next part to be read on from there: a format that is decoded
        from its start would cost much otherwise.
        """
        for ref, wanted, _ in units:
            part = wanted or 0
            try:
                recording = self._recording(ref)
                ends = self._ends(ref, recording)
                if part >= len(ends) - 1:
                    raise BadRecord("it became shorter since it was listed")
                last = len(ends) - 1 if wanted is None else part + 1
                while part < last:
                    yield from self._segments(ref, recording, ends, part)
                    part += 1
            except BadRecord as error:
                where = f"part {part + 1}: " if part else ""
                yield Record(ref.id, part, 0, 0, 0, BadRecord(f"{where}{error}"))

    def _recording(self, ref: AudioRef) -> Recording:
        """Open a recording, if it is not the one that is open."""
        if self._open is None or self._open[0] != ref:
            self._close()
            self._open = ref, Recording(ref.load(), self.sample_rate, self.channel)
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__()
            self._open = None

    def _ends(self, ref: AudioRef, recording: Recording) -> list[int]:
        """Where the parts should begin, and the last one ends."""
        start, stop = ref.bounds(recording)
        return [start + each for each in segments.parts(stop - start, PART_S * self.sample_rate)]

    def _segments(
        self, ref: AudioRef, recording: Recording, ends: Sequence[int], part: int
    ) -> Iterator[Record]:
        """Yield the segments of one part, or that nothing is said in it."""
        start, samples = self._part(recording, ends, part)
        if len(samples) < self.shortest:
            raise BadRecord(
                f"too short: {len(samples)} samples at {self.sample_rate} Hz, and it takes {self.shortest}"
            )
        longest = recording.info.frames * 1000 // recording.info.sample_rate

        def ms(place: int) -> int:
            return min((start + place) * 1000 // self.sample_rate, longest)

        spans = self.spans(samples)
        if not spans:
            yield Record(ref.id, part, 0, ms(0), ms(len(samples)), None)
        for number, (a, b) in enumerate(spans):
            yield Record(ref.id, part, number, ms(a), ms(b), samples[a:b].clone())

    def _part(self, recording: Recording, ends: Sequence[int], part: int) -> tuple[int, Tensor]:
        """Read a part of a recording: where it begins, and its samples.

        Both neighbours read the same stretch around the place where they meet, so that they find the same
        quietest place in it; and all is read forwards.
        """
        reach = SEARCH_S * self.sample_rate
        start, stop = ends[part], ends[part + 1]
        if part > 0:
            start -= reach
            start += self._calm(recording.read(start, start + 2 * reach))
        if part == len(ends) - 2:
            return start, self._samples(recording, start, stop, stop)
        samples = self._samples(recording, start, stop - reach, stop + reach)
        around = samples[stop - reach - start :]
        around[:] = recording.read(stop - reach, stop + reach)
        return start, samples[: len(samples) - len(around) + self._calm(around)]

    def _samples(self, recording: Recording, start: int, stop: int, room: int) -> Tensor:
        """Read a long stretch piece by piece, into one place that has room for more."""
        samples, step = torch.empty(room - start), PIECE_S * self.sample_rate
        for place in range(start, stop, step):
            end = min(place + step, stop)
            samples[place - start : end - start] = recording.read(place, end)
        return samples

    def _calm(self, around: Tensor) -> int:
        """The sample in the middle of the quietest place."""
        whole = len(around) // self.window
        loud = levels(around[: whole * self.window], self.window)
        return segments.quietest(loud, 0, whole, segments.WIDE) * self.window + self.window // 2

    def spans(self, samples: Tensor) -> list[Span]:
        """Find the segments of a part."""
        loud, speech = [], []
        if self.detector is not None:
            self.detector.reset()
        for block in samples.split(PIECE_S * 1000 // WINDOW_MS * self.window):
            filled = pad(block, (0, -len(block) % self.window))
            loud.append(levels(filled, self.window))
            if self.detector is not None:
                speech.append(self.detector.push(filled))
        if self.detector is None:
            longest = self.rules.longest_ms * self.sample_rate // 1000
            return segments.cut(Span(0, len(samples)), torch.cat(loud), self.window, longest)
        size, rate = len(samples), self.sample_rate
        return segments.segments(torch.cat(speech), torch.cat(loud), self.window, size, rate, self.rules)

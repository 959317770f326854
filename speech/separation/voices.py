"""Recordings by who speaks in them, read in pieces, kept in memory where they are few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.speech.audio import Recording
from manyheads.speech.sources import AudioRef


class Voices:
    """The recordings of several speakers.

    Args:
        source: Where they come from, for messages.
        refs: The recordings.
        speakers: Who speaks in each.
        sample_rate: Of what is read, in Hz.
        channel: What is read of recordings with several: "mix", their mean, or the number of one.
        cache_mib: They are kept in memory if all of them take no more than this.

    Raises:
        DataError: A recording cannot be used, and why.
    """

    def __init__(
        self,
        source: str,
        refs: Sequence[AudioRef],
        speakers: Sequence[str],
        sample_rate: int,
        channel: str = "mix",
        cache_mib: int = 1024,
    ) -> None:
        self.source, self.refs, self.sample_rate, self.channel = source, refs, sample_rate, channel
        self.ids = [ref.id.rsplit("/", 1)[-1].rsplit(".", 1)[0] for ref in refs]
        self._starts, self.lengths = (np.array(each) for each in zip(*map(self._bounds, refs), strict=True))
        self.names = sorted(set(speakers))
        numbers = np.array([self.names.index(name) for name in speakers])
        self.clips = [np.flatnonzero(numbers == n) for n in range(len(self.names))]
        # By their length: each second of a speaker is as likely as another.
        self.chances = [self.lengths[clips] / self.lengths[clips].sum() for clips in self.clips]
        self._kept: dict[int, Tensor] | None = {} if 4 * self.lengths.sum() <= cache_mib << 20 else None

    @property
    def seconds(self) -> float:
        """How long all of them last."""
        return float(self.lengths.sum()) / self.sample_rate

    def read(self, clip: int, start: int, stop: int) -> Tensor:
        """Return a piece of a recording, `[stop - start]`.

        Raises:
            DataError: It cannot be read.
        """
        if self._kept is None:
            return self._read(clip, start, stop)
        if clip not in self._kept:
            self._kept[clip] = self._read(clip, 0, int(self.lengths[clip]))
        return self._kept[clip][start:stop]

    def _read(self, clip: int, start: int, stop: int) -> Tensor:
        ref, first = self.refs[clip], int(self._starts[clip])
        try:
            with Recording(ref.load(), self.sample_rate, self.channel) as recording:
                return recording.read(first + start, first + stop)
        except BadRecord as error:
            raise self._bad(ref, error) from None

    def _bounds(self, ref: AudioRef) -> tuple[int, int]:
        """Return where a recording begins, and how many samples it has."""
        try:
            with Recording(ref.load(), self.sample_rate, self.channel) as recording:
                start, stop = ref.bounds(recording)
        except BadRecord as error:
            raise self._bad(ref, error) from None
        return start, stop - start

    def _bad(self, ref: AudioRef, error: BadRecord) -> DataError:
        return DataError(f"{self.source}: {ref.id} cannot be used ({error}); mend or remove it")

"""Recognition of a recording that is still going on.

Samples go through in blocks of a fixed size, whatever the sizes they come in: so the rows are the same to the
last bit, whether a recording is pushed sample by sample or whole.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.frontend import SHORTEST, check_samples
from manyheads.speech.models.paraformer import Paraformer
from manyheads.speech.models.paraformer_streaming import Chunks, SampleStream
from manyheads.speech.recognition.preprocessing import Preprocessing
from manyheads.speech.recognition.segments import Rules
from manyheads.speech.recognition.vad import Kind, make_detector
from manyheads.speech.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

ENDPOINTS = Rules(pause_ms=800, pad_ms=200)


class Heard(TypedDict):
    """What was recognised of a segment so far.

    Attributes:
        segment: Its number in the recording.
        text: All of its text so far: later rows of the segment go on with it.
        start_ms: Where it begins.
        end_ms: Up to where the recording was heard for this row; of a final one, where the segment ends.
        final: Nothing more comes of this segment.
    """

    segment: int
    text: str
    start_ms: int
    end_ms: int
    final: bool


class Utterance:
    """One segment, from its first sample on.

    Args:
        recogniser: At its start.
        tokens: Of the model.
        number: Of the segment in the recording.
        start: Of the segment in the recording, in samples.
    """

    def __init__(self, recogniser: SampleStream, tokens: Vocabulary, number: int, start: int) -> None:
        self.recogniser, self.tokens, self.number, self.start = recogniser, tokens, number, start
        self.sample_rate = recogniser.rows.front_end.sample_rate
        self.size = 0  # samples
        self.silent = 0  # of the last of them
        self.ids: list[int] = []

    def push(self, samples: Tensor) -> list[Heard]:
        """Take more samples; return a row if they complete a token."""
        self.size += len(samples)
        ids = self.recogniser.push(samples)
        self.ids += ids
        return [self._row(final=False)] if ids else []

    def finish(self) -> Heard:
        """End the segment."""
        if self.size >= SHORTEST:
            self.ids += self.recogniser.finish()
        return self._row(final=True)

    def _row(self, final: bool) -> Heard:
        start, end = (place * 1000 // self.sample_rate for place in (self.start, self.start + self.size))
        text = self.tokens.text(self.ids)
        return Heard(segment=self.number, text=text, start_ms=start, end_ms=end, final=final)


class Stream:
    """Recognise samples as they come: `push` and `finish` return rows.

    Args:
        model: Built with `streaming=True`, in evaluation mode.
        preprocessing: Of its folder.
        chunks: How the recording is cut; by default 600 ms and 300 ms of look-ahead, a latency of 900 ms
            (`latency_ms`).
        endpoints: How the ends of utterances are found: "energy", "silero", or "none": the whole recording is
            one segment, whose rows have its whole text each; not for hours.
        rules: Of the ends: a segment begins `pad_ms` before the threshold is reached, and ends after
            `pause_ms` without speech, or at `longest_ms`; its other numbers are not used.

    Raises:
        UsageError: The model is in training, or its decoder sees later tokens; or silero-vad is missing.

    Example:
        >>> stream = Stream(model, Preprocessing.from_json(config.preprocessing))
        >>> for block in microphone:  # float32 arrays of any length
        ...     for row in stream.push(block):
        ...         print(row["text"])
        >>> print(stream.finish()[-1]["text"])
    """

    def __init__(
        self,
        model: Paraformer,
        preprocessing: Preprocessing,
        chunks: Chunks | None = None,
        endpoints: Kind = "none",
        rules: Rules = ENDPOINTS,
    ) -> None:
        if not isinstance(model, Paraformer):
            raise UsageError(f"streaming: a Paraformer is needed, not a {type(model).__name__}")
        self.model, self.chunks, self.rules = model, Chunks() if chunks is None else chunks, rules
        self.front_end, self.tokens = preprocessing.front_end(), preprocessing.tokens()
        self.detector = make_detector(endpoints, preprocessing.sample_rate)
        row = self.front_end.hop * self.front_end.stride
        self.block = row if self.detector is None else self.detector.window
        self.pending = torch.zeros(0)  # less than a block
        self.before: deque[Tensor] = deque(maxlen=self._samples(rules.pad_ms) // self.block)
        self.taken = 0  # samples of whole blocks
        self.ended = False
        self.count = 0  # segments that began
        self.current: Utterance | None = None
        self._recogniser()  # refuses a model that cannot stream

    @property
    def latency_ms(self) -> int:
        """From when a sound begins to the samples that complete its row, at most; computing comes on top."""
        front, chunks = self.front_end, self.chunks
        row = front.hop * front.stride
        beyond = front.stack // 2 * front.hop + front.window - row  # where a row's last frame ends
        beyond = -(-beyond // row) * row if self.detector is None else beyond + self.block - 1
        return -(-((chunks.size + chunks.ahead) * row + beyond) * 1000 // front.sample_rate)

    def push(self, samples: Tensor | np.ndarray) -> list[Heard]:
        """Take more samples in [-1, 1], `[L]`, at the model's rate; return what is new, often nothing.

        Raises:
            DataError: The samples are not one finite floating-point row, or the recording has ended.
        """
        if self.ended:
            raise DataError("streaming: the recording has ended; begin another stream")
        samples = torch.as_tensor(samples)
        check_samples(samples)
        self.pending = torch.cat((self.pending, samples.float()))
        whole = len(self.pending) // self.block * self.block
        blocks, self.pending = self.pending[:whole].split(self.block), self.pending[whole:].clone()
        return [row for block in blocks if len(block) for row in self._take(block)]

    def finish(self) -> list[Heard]:
        """End the recording; return what is left, the last segment's final row at the end."""
        if self.ended:
            return []
        self.ended = True
        if self.current is None and (self.detector is not None or not len(self.pending)):
            return []
        return [*self._feed(self.pending), *self._end()]

    def _take(self, block: Tensor) -> list[Heard]:
        """Take one block: of a segment, or of what is between two."""
        if self.detector is None:
            return self._feed(block)
        chance = float(self.detector.push(block)[0])
        if self.current is None:
            if chance < self.rules.threshold:
                self.before.append(block)
                self.taken += len(block)
                return []
            return self._feed(block)
        rows = self._feed(block)
        speaks = chance >= self.rules.threshold - self.rules.slack
        self.current.silent = 0 if speaks else self.current.silent + len(block)
        pause, longest = self._samples(self.rules.pause_ms), self._samples(self.rules.longest_ms)
        if self.current.silent >= max(pause, 1) or self.current.size >= longest:
            rows += self._end()
        return rows

    def _feed(self, samples: Tensor) -> list[Heard]:
        """Give samples to the segment; without one, begin it."""
        rows = []
        if self.current is None:
            start = self.taken - sum(map(len, self.before))
            self.current = Utterance(self._recogniser(), self.tokens, self.count, start)
            self.count += 1
            rows = [row for block in self.before for row in self.current.push(block)]
            self.before.clear()
        self.taken += len(samples)
        return rows + self.current.push(samples)

    def _end(self) -> list[Heard]:
        """End the segment."""
        assert self.current is not None
        last, self.current = self.current.finish(), None
        return [last]

    def _recogniser(self) -> SampleStream:
        return SampleStream(self.model, self.front_end, self.chunks)

    def _samples(self, ms: int) -> int:
        return ms * self.front_end.sample_rate // 1000

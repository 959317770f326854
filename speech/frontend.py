"""Paraformer's front end: log-mel filter bank, stacked frames, mean and variance of the training set.

A recording at 16 kHz becomes a row of 80 x 7 numbers every 60 ms: log-mel frames every 10 ms (Kaldi's,
Hamming window, samples as 16-bit numbers), seven neighbours put side by side at every sixth, then shifted and
scaled by `am.mvn`. Source: Gao et al. 2022 (arXiv 2206.08317); the published front end's numbers exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from manyheads.core.errors import DataError

FULL_SCALE = 32768  # samples of 1.0 as 16-bit numbers
SHORTEST = 2  # samples that Kaldi's window needs


@dataclass(frozen=True, eq=False)
class FrontEnd:
    """Turn samples into the model's input.

    Args:
        cmvn: What is added to each channel, and what it is then multiplied with; None leaves it as it is.
        sample_rate: Of the samples, in Hz; the caller resamples.
        mels: Channels of the filter bank.
        frame_ms, hop_ms: Length and distance of its frames.
        stack, stride: How many frames are put side by side, and at every how many-th ("LFR").
        dither: Noise added to the 16-bit samples; published training uses 1, recognition should use 0.

    Shape:
        cmvn `[2, stack * mels]`; samples `[L]`, in [-1, 1]; the result `[T, stack * mels]`, float32, with
        T = ceil(frames / stride).

    Raises:
        DataError: cmvn does not fit; or when called, samples that are not one finite row of at least two.

    Example:
        >>> FrontEnd()(torch.zeros(16000)).shape
        torch.Size([17, 560])
    """

    cmvn: Tensor | None = None
    sample_rate: int = 16000
    mels: int = 80
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    stack: int = 7
    stride: int = 6
    dither: float = 0.0

    def __post_init__(self) -> None:
        if self.cmvn is not None and self.cmvn.shape != (2, self.size):
            raise DataError(
                f"front end: cmvn must be [2, {self.size}], {self.stack} frames of {self.mels}, not "
                f"{list(self.cmvn.shape)}"
            )

    @property
    def size(self) -> int:
        """Channels of a row."""
        return self.stack * self.mels

    @property
    def row_ms(self) -> float:
        """Milliseconds from a row to the next."""
        return self.hop_ms * self.stride

    @property
    def window(self) -> int:
        """Samples in a frame."""
        return int(self.sample_rate * self.frame_ms * 0.001)

    @property
    def hop(self) -> int:
        """Samples from a frame to the next."""
        return int(self.sample_rate * self.hop_ms * 0.001)

    def __call__(self, samples: Tensor) -> Tensor:
        """The rows of a whole recording; one shorter than a frame is one frame of its own length."""
        return self.normalise(stack_frames(self.filter_bank(samples), self.stack, self.stride))

    def batch(self, recordings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The rows of several recordings, `[B, T, size]`, zeros behind the shorter ones; how many, `[B]`."""
        rows = [self(samples) for samples in recordings]
        if not rows:
            raise DataError("front end: a batch needs a recording")
        lengths = torch.tensor([len(each) for each in rows])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def filter_bank(self, samples: Tensor) -> Tensor:
        """Log-mel frames `[frames, mels]`; only whole frames count, unless there is none."""
        from torchaudio.compliance import kaldi

        check_samples(samples)
        if len(samples) < SHORTEST:
            raise DataError(f"front end: {len(samples)} samples are too few; a frame needs {SHORTEST}")
        frames: Tensor = kaldi.fbank(
            samples.float()[None] * FULL_SCALE,
            num_mel_bins=self.mels,
            frame_length=min(self.frame_ms, len(samples) / self.sample_rate * 1000),
            frame_shift=self.hop_ms,
            dither=self.dither,
            energy_floor=0.0,
            window_type="hamming",
            sample_frequency=self.sample_rate,
            snip_edges=True,
        )
        return frames

    def normalise(self, rows: Tensor) -> Tensor:
        """Shift and scale the channels."""
        if self.cmvn is None:
            return rows
        shift, scale = self.cmvn.to(rows)
        return (rows + shift) * scale

    def stream(self) -> FrontEndStream:
        """Begin a recording of which the samples come in pieces."""
        return FrontEndStream(self)


class FrontEndStream:
    """The rows of a recording whose samples come in pieces: the whole's, each as soon as it is certain.

    A row's last frame ends 42.5 ms after the middle of its own: that much later it can come at best.

    Args:
        front_end: Of which the rows are.
    """

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self.samples = torch.zeros(0)  # not yet in a frame that is done
        self.frames = torch.zeros(0, front_end.mels)  # not yet in a row, or still needed by the next
        self.first = 0  # number of the first of these frames in the recording
        self.rows = 0  # given out
        self.ended = False

    def push(self, samples: Tensor) -> Tensor:
        """Take more samples; return the rows `[k, size]` that are now certain, often none.

        Raises:
            DataError: The samples are not one finite row, or the recording has ended.
        """
        if self.ended:
            raise DataError("front end: the stream has ended; begin another")
        check_samples(samples)
        self.samples = torch.cat((self.samples, samples.float()))
        window, hop = self.front_end.window, self.front_end.hop
        count = (len(self.samples) - window) // hop + 1 if len(self.samples) >= window else 0
        if count:
            whole = self.front_end.filter_bank(self.samples[: window + hop * (count - 1)])
            self.frames = torch.cat((self.frames, whole))
            self.samples = self.samples[hop * count :]
        ahead = self.front_end.stack - 1 - (self.front_end.stack - 1) // 2
        certain = (self.first + len(self.frames) - 1 - ahead) // self.front_end.stride + 1
        return self._rows(max(certain, self.rows))

    def finish(self) -> Tensor:
        """End the recording; return the rows that are left."""
        if not self.ended and self.first + len(self.frames) == 0 and len(self.samples):
            self.frames = self.front_end.filter_bank(self.samples)  # shorter than a frame
        self.ended = True
        return self._rows(-(-(self.first + len(self.frames)) // self.front_end.stride))

    def _rows(self, end: int) -> Tensor:
        stack, stride = self.front_end.stack, self.front_end.stride
        if end <= self.rows:
            return torch.zeros(0, self.front_end.size)
        starts = torch.arange(self.rows, end)[:, None] * stride - (stack - 1) // 2
        places = (starts + torch.arange(stack)).clamp(0, self.first + len(self.frames) - 1) - self.first
        found = self.front_end.normalise(self.frames[places].flatten(1))
        self.rows = end
        passed = max(end * stride - (stack - 1) // 2 - self.first, 0)
        passed = min(passed, len(self.frames) - 1)  # the last is repeated at the end
        self.frames, self.first = self.frames[passed:], self.first + passed
        return found


def check_samples(samples: Tensor) -> None:
    """Refuse what is not one row of finite samples.

    Raises:
        DataError: It is not; the message says what it is.
    """
    if samples.ndim != 1 or not samples.is_floating_point():
        raise DataError(
            f"front end: samples must be one floating-point row, not {list(samples.shape)} of {samples.dtype}"
        )
    if not samples.isfinite().all():
        place = int((~samples.isfinite()).nonzero()[0])
        raise DataError(f"front end: sample {place} is {float(samples[place])}")


def stack_frames(frames: Tensor, stack: int, stride: int) -> Tensor:
    """Put `stack` neighbours side by side at every `stride`-th frame, the edges repeated.

    Shape:
        frames `[T, D]`; the result `[ceil(T / stride), stack * D]`.
    """
    starts = torch.arange(0, len(frames), stride, device=frames.device) - (stack - 1) // 2
    places = starts[:, None] + torch.arange(stack, device=frames.device)
    return frames[places.clamp(0, len(frames) - 1)].flatten(1)


def parse_cmvn(text: str) -> Tensor:
    """Read the shift and the scale out of an `am.mvn` file's text (Kaldi's nnet form): `[2, D]`.

    Raises:
        DataError: It has no <AddShift> or <Rescale> with a row of numbers, or the two differ in size.
    """
    lines = text.splitlines()
    found = []
    for name in ("<AddShift>", "<Rescale>"):
        rows = [
            after.split()
            for line, after in pairwise(lines)
            if line.split()[:1] == [name] and after.split()[:1] == ["<LearnRateCoef>"]
        ]
        if len(rows) != 1:
            raise DataError(f"am.mvn: {name} needs one row <LearnRateCoef>, and {len(rows)} are there")
        numbers = rows[0][3:-1]  # <LearnRateCoef> 0 [ ... ]
        try:
            found.append(torch.tensor([float(number) for number in numbers]))
        except ValueError as error:
            raise DataError(f"am.mvn: {name} holds what is no number ({error})") from error
    shift, scale = found
    if len(shift) != len(scale) or not len(shift):
        raise DataError(f"am.mvn: {len(shift)} shifts and {len(scale)} scales")
    if not (shift.isfinite().all() and scale.isfinite().all()):
        raise DataError("am.mvn: a number is not finite")
    return torch.stack(found)


def read_cmvn(path: Path) -> Tensor:
    """Read an `am.mvn` file.

    Raises:
        DataError: It cannot be read, or is none.
    """
    try:
        return parse_cmvn(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error

"""Sound files of any length as samples at one rate: WAV, FLAC, MP3, OGG (Vorbis, Opus), others of libsndfile.

A piece of a recording equals the same piece of the whole, bit for bit where the rate stays, to 1e-6 where it
changes: files without loss are read from where the piece begins, the others are decoded from their start,
for after a jump their decoders give other samples (Opus, MP3) or those of another place (Vorbis). Resampling
takes as many samples around a piece as its filter reaches. Memory does not grow with the recording.

What is wrong with a recording is a `BadRecord`: not audio, truncated, empty, NaN, no such channel.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core.errors import BadRecord, DataError, UsageError

Source: TypeAlias = Path | bytes  # a file, or its content
Channel: TypeAlias = str  # "mix", the mean of all channels, or the number of one: "0", "1", ...

BLOCK = 1 << 16  # frames decoded at a time
HELD = 1 << 18  # frames kept of what was decoded last: 5 s at 48 kHz
RESAMPLED = 1 << 20  # samples that one call resamples, about
FILTER_WIDTH, ROLLOFF = 6, 0.99  # torchaudio's defaults
LARGEST_FILTER = 1 << 23  # numbers in a resampling filter, which common rates need by far not
UNKNOWN = 0xFFFF0000  # sizes above stand in headers of what was written to a pipe
LONGEST = 1 << 53  # frames that can be; libsndfile gives more where a header says nothing
EXACT = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # subtypes whose samples are found by their number
OGG_PAGE = 65_307  # bytes of the longest


@dataclass(frozen=True)
class AudioInfo:
    """What a recording's header says.

    Args:
        frames: Samples of each channel.
        sample_rate: In Hz.
        channels: How many.
    """

    frames: int
    sample_rate: int
    channels: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.frames / self.sample_rate

    def length(self, sample_rate: int) -> int:
        """Return how many samples it has at another rate."""
        return -(-self.frames * sample_rate // self.sample_rate)


class _Onward(soundfile.SoundFile):
    """A sound file that reads on: soundfile jumps after each read, which lossy decoders do not survive."""

    def seekable(self) -> bool:
        return False


class Recording:
    """One recording, open: pieces of it as `[L]` float32 samples at one rate.

    Pieces in order cost least: nothing is decoded twice.

    Args:
        source: A file, or its content.
        sample_rate: In Hz; the recording's own by default.
        channel: `"mix"`, the mean of all channels, or the number of one.

    Raises:
        BadRecord: It cannot be used, and why.
        UsageError: The channel is neither `mix` nor a number.
    """

    def __init__(self, source: Source, sample_rate: int | None = None, channel: Channel = "mix") -> None:
        check_channel(channel)
        self.source = source
        self._file, self.info = _open(source)
        self.sample_rate = sample_rate or self.info.sample_rate
        self.channel = None if channel == "mix" else int(channel)
        if self.channel is not None and self.channel >= self.info.channels:
            raise BadRecord(f"no channel {self.channel}: it has {self.info.channels}")
        self._at, self._seeks = 0, self._file.subtype.startswith(EXACT)
        self._held_from, self._held = 0, np.zeros(0, np.float32)
        common = math.gcd(self.info.sample_rate, self.sample_rate)
        self._from, self._to = self.info.sample_rate // common, self.sample_rate // common
        self._reach = math.ceil(FILTER_WIDTH * self._from / (min(self._from, self._to) * ROLLOFF))
        if self._from != self._to and self._to * (self._from + 2 * self._reach) > LARGEST_FILTER:
            raise BadRecord(f"{self.info.sample_rate} Hz cannot be turned into {self.sample_rate} Hz exactly")

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        return self.info.length(self.sample_rate)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a piece, float32 `[stop - start]`.

        Args:
            start, stop: Samples at this recording's `sample_rate`; the end by default, and at most.

        Raises:
            BadRecord: The piece is truncated, or has NaN or infinite samples.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        start = min(start, stop)
        if self._from == self._to:
            return torch.from_numpy(self._frames(start, stop).copy())
        step = max(1, RESAMPLED // self._from) * self._to
        pieces = [self._resampled(a, min(a + step, stop)) for a in range(start, stop, step)]
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def blocks(self, size: int) -> Iterator[Tensor]:
        """Yield the whole recording in pieces of `size` samples; the last may be shorter."""
        for start in range(0, len(self), size):
            yield self.read(start, start + size)

    def _resampled(self, start: int, stop: int) -> Tensor:
        """Resample from a whole number of the filter's steps before the piece to behind its reach."""
        context = -(-self._reach // self._from)
        first = max(0, start // self._to - context)
        last = -(-stop // self._to)
        begin, end = first * self._from, last * self._from + self._reach
        around = torch.zeros(end - begin)
        found = self._frames(begin, min(end, self.info.frames))
        around[: len(found)] = torch.from_numpy(found)
        resampled: Tensor = _resampler(self._from, self._to)(around)
        return resampled[start - first * self._to : stop - first * self._to]

    def _frames(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return samples of the recording's own rate; the last ones are kept: the next piece begins there."""
        held_to = self._held_from + len(self._held)
        kept = self._held[:0]
        if self._held_from <= start < held_to:
            kept = self._held[start - self._held_from : stop - self._held_from]
        begin = start + len(kept)
        if begin < stop:
            self._go(begin)
            found = np.concatenate([*self._decode(stop)])
            kept = np.concatenate([kept, found])
            before = self._held if begin == held_to else self._held[:0]
            self._held = np.concatenate([before, found])[-HELD:]
            self._held_from = stop - len(self._held)
        bad = ~np.isfinite(kept)
        if bad.any():
            at = (start + int(bad.argmax())) / self.info.sample_rate
            raise BadRecord(f"NaN or infinite samples, the first at {at:.3f} s")
        return kept

    def _go(self, frame: int) -> None:
        """Bring the file to a frame."""
        if self._seeks and self._at != frame:
            self._at = self._file.seek(frame)
        if self._at > frame:
            self._file.close()
            self._file, _ = _open(self.source)
            self._at = 0
        for _ in self._decode(frame):
            pass

    def _decode(self, stop: int) -> Iterator[NDArray[np.float32]]:
        """Yield samples of the channel from the file's place on."""
        while self._at < stop:
            count = min(BLOCK, stop - self._at)
            try:
                found = self._file.read(count, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                found = np.zeros((0, self.info.channels), np.float32)
            if len(found) < count:
                seconds = (self._at + len(found)) / self.info.sample_rate
                raise BadRecord(f"truncated or damaged behind {seconds:.3f} s of {self.info.seconds:.3f} s")
            yield found.mean(axis=1) if self.channel is None else found[:, self.channel]
            self._at += count


def inspect(source: Source) -> AudioInfo:
    """Return what a recording's header says, checked against its end.

    Raises:
        BadRecord: It is no audio, truncated or empty.
    """
    file, info = _open(source)
    file.close()
    return info


def read(
    source: Source, sample_rate: int, channel: Channel = "mix", start: int = 0, stop: int | None = None
) -> Tensor:
    """Read a recording, or a piece of it.

    Args:
        source: A file, or its content.
        sample_rate: In Hz, of the result.
        channel: `"mix"`, the mean of all channels, or the number of one: `"0"`, `"1"`, ...
        start, stop: Samples at that rate. A piece equals the same piece of the whole.

    Shape:
        `[L]`, float32.

    Raises:
        BadRecord: It cannot be used, and why.
    """
    with Recording(source, sample_rate, channel) as recording:
        return recording.read(start, stop)


def blocks(source: Source, sample_rate: int, size: int, channel: Channel = "mix") -> Iterator[Tensor]:
    """Yield a recording in pieces of `size` samples, the last perhaps shorter; `read` says the rest."""
    with Recording(source, sample_rate, channel) as recording:
        yield from recording.blocks(size)


def write(path: Path, samples: Tensor, sample_rate: int, subtype: str | None = None) -> None:
    """Write a sound file, in the format that its suffix names.

    Args:
        path: The file.
        samples: `[L]`, or `[channels, L]`.
        sample_rate: In Hz.
        subtype: libsndfile's name of the samples' form; the format's usual one by default (WAV: `PCM_16`).

    Raises:
        DataError: Samples are not finite, or beyond 1 and would be clipped (not with subtype `FLOAT`).
    """
    values = samples.detach().float().cpu().numpy().T
    peak = float(np.abs(values).max(initial=0))
    if not math.isfinite(peak):
        raise DataError(f"{path}: NaN or infinite samples cannot be written")
    if peak > 1 and subtype not in ("FLOAT", "DOUBLE"):
        raise DataError(f"{path}: samples reach {peak:.3g} and would be clipped at 1")
    soundfile.write(path, values, sample_rate, subtype=subtype)


def check_channel(channel: Channel) -> None:
    """Refuse what is no channel.

    Raises:
        UsageError: It is neither `mix` nor a number.
    """
    if channel != "mix" and not channel.isdecimal():
        raise UsageError(f"channel {channel!r}: it must be mix, or a number counted from 0")


@lru_cache(maxsize=8)
def _resampler(from_: int, to: int) -> nn.Module:
    """Return a resampler, its filter computed in float64."""
    from torchaudio.transforms import Resample

    return Resample(from_, to, lowpass_filter_width=FILTER_WIDTH, rolloff=ROLLOFF)


def _open(source: Source) -> tuple[_Onward, AudioInfo]:
    """Open a recording and check that its end is there."""
    if isinstance(source, Path) and not source.is_file():
        raise BadRecord("no such file" if not source.exists() else "not a file")
    if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
        raise BadRecord("an empty file")
    try:
        file = _handle(source)
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        raise BadRecord(
            "not audio that can be read (WAV, FLAC, MP3, OGG and others of libsndfile)"
        ) from error
    info = AudioInfo(file.frames, file.samplerate, file.channels)
    try:
        if not info.frames:
            raise BadRecord("it has no samples")
        if info.frames > LONGEST:
            raise BadRecord("its header does not say how long it is: write it anew as a file, not to a pipe")
        _check_end(file, source)
    except BadRecord:
        file.close()
        raise
    return file, info


def _handle(source: Source) -> _Onward:
    return _Onward(io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source))


def _check_end(file: soundfile.SoundFile, source: Source) -> None:
    """Refuse a file that ends before its header says.

    What a file's own bytes do not tell, an MP3 without a header of its length for one, passes.
    """
    for said, there in re.findall(r"(\d+) \(should be (\d+)\)", file.extra_info):
        if int(there) + 8 < int(said) < UNKNOWN:  # a byte or two may be missing for evenness
            raise BadRecord(f"truncated: {int(said) - int(there)} bytes are missing")
    if file.format == "OGG" and _ogg_is_cut(source):
        raise BadRecord("truncated: its last page is not whole")
    if file.format in ("FLAC", "MP3") and not _has_last(source):
        raise BadRecord("truncated: the last of its samples are missing")


def _has_last(source: Source) -> bool:
    """Whether a file has the last frame that its header counts; opened again, for this is a jump."""
    with _handle(source) as file:
        try:
            file.seek(file.frames - 1)
            return len(file.read(1)) == 1
        except soundfile.LibsndfileError:
            return False


def _ogg_is_cut(source: Source) -> bool:
    """Whether an OGG file ends within a page."""
    if isinstance(source, bytes):
        tail = source[-OGG_PAGE:]
    else:
        with source.open("rb") as file:
            file.seek(max(0, source.stat().st_size - OGG_PAGE))
            tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if not page.startswith(b"OggS"):
        return False  # something else stands behind its pages
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])

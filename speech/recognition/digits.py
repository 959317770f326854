"""Connected digits: recordings of single digits of one speaker, joined with short pauses.

The Free Spoken Digit Dataset has 50 takes of each digit by 6 speakers, at 8 kHz. Takes 0 to 4 are its test;
here takes 5 to 9 are the validation, the other 40 are trained on.
"""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core import files
from manyheads.core.errors import DataError, UsageError
from manyheads.speech import audio
from manyheads.speech.recognition.utterances import Utterance

NAME = "fsdd_connected"
RATE = 8000
FLOOR = 1e-4  # of the noise in pauses: recordings have no zeros, whose logarithm would be far from any other
_TAKES = {"test": range(5), "val": range(5, 10), "train": range(10, 50)}

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Joining:
    """How digits are joined.

    Args:
        train: Utterances an epoch.
        val: Utterances of the validation.
        test: Utterances of the test.
        longest: Digits in one, at most; each number of digits is as likely as the others.
        shortest_pause, longest_pause: Before, between and after digits, in milliseconds.
    """

    train: int = 6000
    val: int = 300
    test: int = 600
    longest: int = 8
    shortest_pause: float = 50.0
    longest_pause: float = 300.0


@dataclass(frozen=True, eq=False)
class Clip:
    """A recording of one digit."""

    samples: Tensor
    digit: str
    speaker: str
    take: int


class JoinedDigits:
    """Utterances of a part; those of training are other ones each epoch.

    What an utterance is follows from the seed, the epoch and its number alone. A speaker's recordings are
    dealt like cards: each is used as often as the others.

    Args:
        clips: Recordings of single digits.
        part: Which part they are of, for names.
        count: How many utterances there are.
        joining: How they are made.
        seed: Of what is drawn.

    Raises:
        UsageError: Numbers of `joining` cannot be meant.
    """

    def __init__(self, clips: Sequence[Clip], part: Part, count: int, joining: Joining, seed: int) -> None:
        if not (0 <= joining.shortest_pause <= joining.longest_pause):
            raise UsageError("joining: shortest_pause must be from 0 to longest_pause")
        if joining.longest < 1 or count < 1:
            raise UsageError("joining: longest and the numbers of utterances must be 1 or more")
        self.clips, self.part, self.joining, self.seed = tuple(clips), part, joining, seed
        self.speakers = sorted({clip.speaker for clip in clips})
        self._places = [[i for i, c in enumerate(self.clips) if c.speaker == s] for s in self.speakers]
        self.counts = np.random.default_rng([seed, count]).integers(1, joining.longest + 1, count)
        self._begins = np.zeros(count, int)  # of an utterance in its speaker's cards
        for speaker in range(len(self.speakers)):
            mine = self.counts[speaker :: len(self.speakers)]
            self._begins[speaker :: len(self.speakers)] = np.cumsum(mine) - mine
        self._dealt = lru_cache(maxsize=2)(self._deal)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def source(self) -> str:
        """Where they come from."""
        return NAME

    @cached_property
    def ids(self) -> list[str]:
        """Part, speaker and number."""
        return [f"{self.part}-{self.speakers[i % len(self.speakers)]}-{i:05}" for i in range(len(self))]

    @cached_property
    def texts(self) -> list[str]:
        """The digits of each in the first epoch."""
        return ["".join(self.clips[place].digit for place in self.chosen(i, 0)) for i in range(len(self))]

    @cached_property
    def seconds(self) -> NDArray[np.floating]:
        """About how long each is: its digits and pauses of mean length."""
        digit = float(np.mean([len(clip.samples) for clip in self.clips])) / RATE
        pause = (self.joining.shortest_pause + self.joining.longest_pause) / 2000
        return self.counts * (digit + pause) + pause

    def chosen(self, index: int, epoch: int) -> NDArray[np.integer]:
        """Return the numbers of the recordings of an utterance."""
        begin = self._begins[index]
        cards = self._dealt(epoch)[index % len(self.speakers)]
        return cards[begin : begin + self.counts[index]]

    def read(self, index: int, epoch: int = 0) -> Utterance:
        """Join the recordings of an utterance."""
        rng = np.random.default_rng([self.seed, epoch, index])
        low, high = self.joining.shortest_pause, self.joining.longest_pause
        chosen = [self.clips[place] for place in self.chosen(index, epoch)]
        parts = [_pause(rng, low, high)]
        for clip in chosen:
            parts += [clip.samples, _pause(rng, low, high)]
        return Utterance(torch.cat(parts), "".join(clip.digit for clip in chosen))

    def _deal(self, epoch: int) -> list[NDArray[np.integer]]:
        """Shuffle each speaker's recordings, as often as they are used up."""
        rng = np.random.default_rng([self.seed, epoch])
        found = []
        for speaker, places in enumerate(self._places):
            rounds = -(-int(self.counts[speaker :: len(self.speakers)].sum()) // len(places))
            found.append(np.concatenate([rng.permutation(places) for _ in range(max(1, rounds))]))
        return found


def write_recordings(utterances: JoinedDigits, folder: Path) -> Path:
    """Write utterances of the first epoch as sound files with a table, unless they are there.

    Returns:
        The table, with the columns id, audio and text.
    """
    table = folder / "metadata.csv"
    if table.is_file():
        return table
    written = files.temporary(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    with (written / table.name).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "audio", "text"])
        for index, name in enumerate(utterances.ids):
            samples, text = utterances.read(index)
            audio.write(written / f"{name}.flac", samples, RATE)
            rows.writerow([name, f"{name}.flac", text])
    files.replace_folder(written, folder)
    return table


def _pause(rng: np.random.Generator, low: float, high: float) -> Tensor:
    size = int(rng.uniform(low, high) * RATE / 1000)
    return torch.from_numpy(rng.standard_normal(size, np.float32) * np.float32(FLOOR))


def read_digits(folder: Path, part: Part, joining: Joining, seed: int) -> JoinedDigits:
    """Read the recordings of a part out of the data set's folder, and join them.

    Args:
        folder: With `fsdd_flac.tar` and `metadata.csv`.

    Raises:
        DataError: A file is missing, or is not what it must be.
    """
    clips = [clip for clip in _read_clips(folder) if clip.take in _TAKES[part]]
    count = {"train": joining.train, "val": joining.val, "test": joining.test}[part]
    return JoinedDigits(clips, part, count, joining, seed)


@lru_cache(maxsize=1)
def _read_clips(folder: Path) -> tuple[Clip, ...]:
    """Read all recordings, once a process: 42 MB."""
    import soundfile

    clips = []
    try:
        with (folder / "metadata.csv").open(encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
        with tarfile.open(folder / "fsdd_flac.tar") as archive:
            for row in rows:
                file = archive.extractfile(row["file"])
                assert file is not None
                samples, rate = soundfile.read(io.BytesIO(file.read()), dtype="float32")
                if rate != RATE or samples.ndim != 1:
                    raise DataError(f"{folder}: {row['file']} is not mono at {RATE} Hz")
                found = Clip(torch.from_numpy(samples), row["digit"], row["speaker"], int(row["take"]))
                clips.append(found)
    except (OSError, KeyError, ValueError, tarfile.TarError, soundfile.SoundFileError) as error:
        raise DataError(f"{folder} does not hold the spoken digits ({error})") from error
    return tuple(clips)

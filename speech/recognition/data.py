"""Recordings with text, or connected digits, to training, validation and test batches."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from manyheads.core import datasets
from manyheads.core.buckets import Buckets
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.core.loading import share_of
from manyheads.speech.audio import check_channel
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.recognition import digits
from manyheads.speech.recognition.augment import Augment
from manyheads.speech.recognition.digits import JoinedDigits, Joining, write_recordings
from manyheads.speech.recognition.loading import (
    Policy,
    Reasons,
    UtteranceLoader,
    UtterancePart,
    utterance_loader,
)
from manyheads.speech.recognition.manifest import Columns, Limits, Part, Splits, read_manifest
from manyheads.speech.recognition.metrics import Normalizer, normalize
from manyheads.speech.recognition.preprocessing import Features, Preprocessing
from manyheads.speech.recognition.start import read_preprocessing
from manyheads.speech.recognition.utterances import Utterances
from manyheads.speech.vocabulary import Characters, Pieces, Vocabulary

__all__ = ["Augment", "Columns", "Features", "Joining", "Loading", "RecognitionData", "Splits", "Units"]

log = logging.getLogger(__name__)

LEAST = 1e-3  # a channel whose deviation is below this does not vary


@dataclass(frozen=True)
class Units:
    """What the model writes.

    Args:
        kind: "characters" of the training texts, or "sentencepiece": pieces of words.
        size: Pieces that are looked for in the training texts.
        model: A sentencepiece model's file, instead.
        normalizer: What is done to texts first: none | basic (lower case, no punctuation, single spaces) |
            chinese (that, and no spaces).
    """

    kind: Literal["characters", "sentencepiece"] = "characters"
    size: int = 1000
    model: str | None = None
    normalizer: Normalizer = "none"


@dataclass(frozen=True)
class Loading:
    """How utterances are loaded.

    Args:
        batch_seconds: Seconds of a batch at most, with padding, before their speed is changed.
        buckets: Groups of like length that batches are taken from.
        workers: Processes that read and prepare; 0 does it in training's own.
        min_seconds: Shorter utterances are left out.
        max_seconds: Longer ones are, too.
        bad: What an utterance that cannot be used is: an "error", or left out ("skip") and reported.
        cmvn_seconds: Seconds of the training part that mean and deviation are measured on, at most.
    """

    batch_seconds: float = 120.0
    buckets: int = 20
    workers: int = 0
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    bad: Policy = "error"
    cmvn_seconds: float = 7200.0

    def __post_init__(self) -> None:
        for name in ("batch_seconds", "buckets", "max_seconds", "cmvn_seconds"):
            if getattr(self, name) <= 0:
                raise UsageError(f"loading.{name} must be above 0, not {getattr(self, name)}")
        if self.workers < 0 or self.min_seconds < 0:
            raise UsageError("loading.workers and loading.min_seconds must be 0 or more")


_COLUMNS, _SPLITS = Columns(), Splits()
_FEATURES, _UNITS, _AUGMENT, _LOADING, _JOINING = Features(), Units(), Augment(), Loading(), Joining()


class RecognitionData(LightningDataModule):
    """Utterances: found, divided, changed by chance for training, as rows and units.

    Args:
        dataset: `fsdd_connected`, or the path of a table of recordings.
        sample_rate: Of the model's input, in Hz; recordings are resampled.
        channel: What is read of recordings with several: "mix", their mean, or the number of one.
        seed: Of the division, the order, the joining and the augmentation.
        columns: A table's columns.
        splits: How a table's rows are divided where it does not say.
        features: How samples become rows.
        units: What the model writes.
        augment: What is changed in training by chance.
        loading: Batches, workers, what is left out.
        joining: How digits are joined, of `fsdd_connected`.
        start: A model folder whose units, mean and deviation are taken; the model's start says it.
    """

    def __init__(
        self,
        dataset: str = digits.NAME,
        sample_rate: int = 16000,
        channel: str = "mix",
        seed: int = 0,
        columns: Columns = _COLUMNS,
        splits: Splits = _SPLITS,
        features: Features = _FEATURES,
        units: Units = _UNITS,
        augment: Augment = _AUGMENT,
        loading: Loading = _LOADING,
        joining: Joining = _JOINING,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.sample_rate, self.seed = dataset, sample_rate, seed
        check_channel(channel)
        self.channel, self.columns, self.splits = channel, columns, splits
        self.features, self.units, self.augment = features, units, augment
        self.loading, self.joining, self.start = loading, joining, start
        self.bad: Reasons = {}
        self._ready = False

    @property
    def path(self) -> Path:
        """The table that the utterances come from; of digits, the test's: it is written to the cache."""
        if self.dataset != digits.NAME:
            return Path(self.dataset)
        self.setup()
        test = cast(JoinedDigits, self.utterances["test"])
        name = f"seed{self.seed}-" + "-".join(f"{value:g}" for value in asdict(self.joining).values())
        return write_recordings(test, datasets.cache_folder() / "data" / "speech" / digits.NAME / name)

    @property
    def vocab_size(self) -> int:
        """How many units there are."""
        self.setup()
        return len(self.vocabulary)

    @property
    def input_size(self) -> int:
        """Channels of a row."""
        return self.features.mels * self.features.stack

    @property
    def normalizer(self) -> Normalizer:
        """What is done to texts."""
        return self.units.normalizer

    def setup(self, stage: str | None = None) -> None:
        """Find and divide the utterances, the units, and the mean and deviation; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        self.utterances: dict[Part, Utterances] = self._read()
        self.vocabulary: Vocabulary
        if self.start is None:
            self.vocabulary = self._find_units()
            cmvn: torch.Tensor | None = self._measure(self.features.front_end(self.sample_rate))
        else:
            begun = read_preprocessing(self.start, self.sample_rate, self.features)
            self.vocabulary, cmvn = begun.tokens(), begun.front_end().cmvn
        self.front_end = self.features.front_end(self.sample_rate, cmvn)
        self._ready = True

    def _read(self) -> dict[Part, Utterances]:
        if self.dataset == digits.NAME:
            if self.sample_rate != digits.RATE:
                raise UsageError(f"{digits.NAME} is at {digits.RATE} Hz: set data.sample_rate to that")
            folder = datasets.locate("fsdd")
            return {
                part: digits.read_digits(folder, part, self.joining, self.seed)
                for part in ("train", "val", "test")
            }
        loading = self.loading
        limits = Limits(loading.min_seconds, loading.max_seconds, loading.bad == "skip")
        found = read_manifest(
            Path(self.dataset), self.columns, self.splits, limits, self.sample_rate, self.channel, self.seed
        )
        return dict(found)

    def _find_units(self) -> Vocabulary:
        """List the units of the training texts, or of a given model."""
        if self.units.kind == "sentencepiece" and self.units.model is not None:
            try:
                return Pieces.load(Path(self.units.model).read_bytes())
            except OSError as error:
                raise UsageError(f"units.model cannot be read ({error})") from error
        texts = (normalize(text, self.normalizer) for text in self.utterances["train"].texts)
        if self.units.kind == "characters":
            return Characters.of(texts)
        return Pieces.train(texts, self.units.size, self.seed)

    def _measure(self, plain: FrontEnd) -> torch.Tensor:
        """Measure what is added to and multiplied with each channel, on training utterances."""
        utterances = self.utterances["train"]
        share = min(1.0, self.loading.cmvn_seconds / float(utterances.seconds.sum()))
        count = max(1, round(share * len(utterances.ids)))
        first, second = torch.zeros(2, plain.size, dtype=torch.float64)
        rows = 0
        for index in np.unique(np.linspace(0, len(utterances.ids) - 1, count).astype(int)).tolist():
            try:
                found = plain(utterances.read(index).samples).double()
            except BadRecord:  # training will say so
                continue
            first += found.sum(0)
            second += found.square().sum(0)
            rows += len(found)
        if not rows:
            raise DataError(f"{utterances.source}: no training utterance can be read")
        mean = first / rows
        deviation = (second / rows - mean.square()).clamp(min=0).sqrt()
        if not bool((deviation > LEAST).all()):
            raise DataError(
                f"{utterances.source}: a channel of the front end is the same in all training rows"
            )
        return torch.stack((-mean, 1 / deviation)).float()

    def part(self, part: Part) -> UtterancePart:
        """Return the utterances of a part, as rows and units."""
        self.setup()
        augment = self.augment if part == "train" else None
        return UtterancePart(
            self.utterances[part],
            self.front_end,
            self.vocabulary,
            self.normalizer,
            augment,
            self.seed,
            self.loading.bad,
        )

    def _loader(self, part: Part) -> UtteranceLoader:
        found, loading = self.part(part), self.loading
        if not len(found.utterances.ids):
            raise DataError(f"{found.utterances.source} has no utterances in the part {part!r}")
        longest = float(found.utterances.seconds.max())
        if longest > loading.batch_seconds:
            raise UsageError(
                f"an utterance takes {longest:.1f} s, and a batch at most {loading.batch_seconds:g} s: raise "
                "loading.batch_seconds, or leave long utterances out with loading.max_seconds"
            )
        buckets = Buckets(
            found.utterances.seconds,
            loading.batch_seconds,
            loading.buckets,
            part == "train",
            self.seed,
            share_of(self.trainer),
        )
        return utterance_loader(found, buckets, loading.workers, self.bad)

    def train_dataloader(self) -> UtteranceLoader:
        """Return the training batches, others each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> UtteranceLoader:
        """Return all validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> UtteranceLoader:
        """Return all test batches."""
        return self._loader("test")

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new recordings as these; plain JSON."""
        self.setup()
        cmvn = self.front_end.cmvn
        return Preprocessing.of(self.sample_rate, self.features, cmvn, self.vocabulary).to_json()

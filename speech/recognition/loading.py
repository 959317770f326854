"""Utterances of a part to batches of rows and units, here or in worker processes.

A batch is a function of (seed, epoch, numbers of utterances): workers and resuming change nothing in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manyheads.core.buckets import Buckets
from manyheads.core.errors import BadRecord, DataError
from manyheads.core.loading import BatchLoader, Indices, Job
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.glancing import PADDING
from manyheads.speech.recognition.augment import Augment, change_speed, drawn_from, mask
from manyheads.speech.recognition.metrics import Normalizer, normalize
from manyheads.speech.recognition.utterances import Utterances
from manyheads.speech.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Policy = Literal["error", "skip"]
Reasons = dict[str, str]  # id of a bad utterance -> why
_NAMED = 5  # bad utterances named one by one; of the others, the number


class UtteranceBatch(TypedDict):
    """A batch of utterances."""

    features: Tensor  # [B, T, F] float32, zeros behind the shorter ones
    lengths: Tensor  # [B]
    text: Tensor  # [B, U], -1 behind the shorter ones
    text_lengths: Tensor  # [B]
    index: Tensor  # [B], numbers in the part


Gathered = tuple[UtteranceBatch | None, Reasons]


class UtterancePart:
    """The utterances of one part as rows and units.

    Args:
        utterances: What is read.
        front_end: Makes rows of samples.
        vocabulary: Makes units of text.
        normalizer: What is done to text before.
        augment: What is changed by chance; None for validation and test.
        seed: Of that.
        bad: What an utterance that cannot be used is: an "error", or left out ("skip") and reported.
    """

    def __init__(
        self,
        utterances: Utterances,
        front_end: FrontEnd,
        vocabulary: Vocabulary,
        normalizer: Normalizer = "none",
        augment: Augment | None = None,
        seed: int = 0,
        bad: Policy = "error",
    ) -> None:
        self.utterances, self.vocabulary, self.normalizer = utterances, vocabulary, normalizer
        self.front_end = front_end if augment is None else replace(front_end, dither=augment.dither)
        self.augment, self.seed, self.bad = augment, seed, bad

    def sample(self, index: int, epoch: int) -> tuple[Tensor, list[int]]:
        """Return rows and units of an utterance.

        Raises:
            BadRecord: It cannot be used; why.
        """
        samples, text = self.utterances.read(index, epoch)
        units = self.vocabulary.ids(normalize(text, self.normalizer))
        if not units:
            raise BadRecord("its text is empty")
        try:
            return self._rows(samples, index, epoch), units
        except DataError as error:
            raise BadRecord(str(error)) from error

    def _rows(self, samples: Tensor, index: int, epoch: int) -> Tensor:
        if self.augment is None:
            return self.front_end(samples)
        with drawn_from(self.seed, epoch, index):
            rows = self.front_end(change_speed(samples, self.augment.speeds))
            return mask(rows, self.front_end.mels, self.augment)

    def gather(self, indices: Indices, epoch: int) -> Gathered:
        """Return a batch, None if it has no usable utterance, and why utterances are missing in it.

        Raises:
            DataError: An utterance cannot be used, and that is an error.
        """
        rows, units, kept, reasons = [], [], [], dict[str, str]()
        for index in indices.tolist():
            try:
                row, unit = self.sample(index, epoch)
            except BadRecord as error:
                name = self.utterances.ids[index]
                if self.bad == "error":
                    raise DataError(
                        f"{self.utterances.source}: {name} cannot be used ({error}); mend or remove it, or "
                        "leave such ones out with loading.bad: skip"
                    ) from None
                reasons[name] = str(error)
                continue
            rows.append(row)
            units.append(torch.tensor(unit))
            kept.append(index)
        if not kept:
            return None, reasons
        return {
            "features": pad_sequence(rows, batch_first=True),
            "lengths": torch.tensor([len(row) for row in rows]),
            "text": pad_sequence(units, batch_first=True, padding_value=PADDING),
            "text_lengths": torch.tensor([len(unit) for unit in units]),
            "index": torch.tensor(kept),
        }, reasons


UtteranceLoader = BatchLoader[Gathered, UtteranceBatch]


def utterance_loader(part: UtterancePart, buckets: Buckets, workers: int, bad: Reasons) -> UtteranceLoader:
    """Return the batches of a part; one without any usable utterance is passed over.

    Args:
        part: The utterances.
        buckets: Which come when.
        workers: Worker processes; 0 reads here.
        bad: Reasons of bad utterances that are reported already; new ones are added.
    """

    def jobs(first: int) -> Iterator[Job]:
        epoch = buckets.schedule.epoch if buckets.shuffle else 0
        return ((indices, epoch) for indices in buckets.plan(first))

    def accept(made: Gathered) -> UtteranceBatch | None:
        report(made[1], bad, part.utterances.source)
        return made[0]

    return BatchLoader(buckets.schedule, jobs, part.gather, accept, workers)


def report(new: Reasons, known: Reasons, source: str) -> None:
    """Log utterances that were left out, each once, a few by name."""
    for name, why in new.items():
        if name not in known:
            known[name] = why
            if len(known) <= _NAMED:
                log.warning("%s: %s is left out (%s)", source, name, why)
            elif len(known) == _NAMED + 1:
                log.warning("%s: more utterances are left out", source)

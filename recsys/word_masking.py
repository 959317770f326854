"""Masks over whole words of texts, for the language half of Recformer's pretraining.

Source: Li et al. 2023 (arXiv 2305.13731) and the code beside it; here pads are neither candidates nor count.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.recsys.texts import SPECIAL, TextBatch, TextTokens

SPACE = "\u0120"  # what a space is written as, byte-level


class MaskedText(NamedTuple):
    """A batch with hidden words.

    Args:
        batch: The texts, changed where a word is hidden.
        at: Where, in the flattened batch, in order.
        targets: The tokens that stood there.

    Shape:
        at, targets `[M]`.
    """

    batch: TextBatch
    at: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> MaskedText:
        """Return it on a device."""
        return MaskedText(self.batch.to(device), self.at.to(device), self.targets.to(device))


class WordMasks:
    """Hides words: of the tokens to be guessed 8 of 10 become <mask>, one another token, one stays.

    Args:
        tokens: The vocabulary.
        rate: Which share of a text's tokens is to be guessed; one at least, if it has a word so short.
        most: How many of a text at most.
    """

    def __init__(self, tokens: TextTokens, rate: float = 0.15, most: int = 512) -> None:
        names = tokens.names()
        self.begins = np.array([name[0] == SPACE or _is_punctuation(name[0]) for name in names])
        self.special = np.isin(names, SPECIAL)
        self.mask_id, self.size, self.rate, self.most = tokens.mask_id, len(tokens), rate, most

    def words(self, ids: NDArray[np.integer]) -> list[NDArray[np.int64]]:
        """Return the places of each word of a text without pads; <s> is of none.

        A token that begins with neither a space nor a mark goes on the word before it. So does the first word
        of a value: names and values are cut into tokens without a space before them.
        """
        places = np.flatnonzero(~self.special[ids] | (ids == self.mask_id))
        if not len(places):
            return []
        cuts = np.flatnonzero(self.begins[ids[places]])
        return np.split(places, cuts[cuts > 0])

    def __call__(self, batch: TextBatch, rng: np.random.Generator) -> MaskedText:
        """Hide words of each text.

        Args:
            batch: On a CPU.
            rng: Of the draws.
        """
        ids = batch.input_ids.numpy()
        chosen = np.zeros(ids.shape, bool)
        for row, length in enumerate(batch.real.sum(1).tolist()):
            budget = min(self.most, max(1, round(length * self.rate)))
            words = self.words(ids[row, :length])
            for number in rng.permutation(len(words)):
                if len(words[number]) <= budget:
                    chosen[row, words[number]] = True
                    budget -= len(words[number])
                if not budget:
                    break
        at = np.flatnonzero(chosen & ~self.special[ids])
        targets = ids.reshape(-1)[at]
        fate = rng.random(len(at))
        written = np.where(fate < 0.8, self.mask_id, targets)
        written = np.where(fate >= 0.9, rng.integers(0, self.size, len(at)), written)
        changed = ids.copy()
        changed.reshape(-1)[at] = written
        hidden = batch._replace(input_ids=torch.from_numpy(changed))
        return MaskedText(hidden, torch.from_numpy(at), torch.from_numpy(targets))


def _is_punctuation(character: str) -> bool:
    """As BERT has it: what is neither letter nor digit of ASCII, and what Unicode calls punctuation."""
    code = ord(character)
    marks = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return marks or unicodedata.category(character).startswith("P")

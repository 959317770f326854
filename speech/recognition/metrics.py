"""How far what was recognised is from what was said: error rates, and of which kinds the errors are.

The error rate is (substitutions + deletions + insertions) / units of the references, over the whole set.
Which figure comes out depends on what is done to both texts before: that is the normaliser, and it is named
wherever a figure is. Between words a space is a character, too, unless the normaliser takes it out.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

Normalizer = Literal["none", "basic", "chinese"]


def normalize(text: str, normalizer: Normalizer) -> str:
    """Prepare a text.

    Args:
        text: What was said or recognised.
        normalizer: "none" leaves it as it is; "basic" takes lower case, no punctuation but apostrophes and
            hyphens within words, and one space between words; "chinese" beside that takes all spaces out and
            full-width forms as usual ones.

    Example:
        >>> normalize("Don't  stop, Mr. Bell!", "basic")
        "don't stop mr bell"
    """
    if normalizer == "none":
        return text
    plain = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(
        character if unicodedata.category(character)[0] not in "PS" or _within(plain, place) else " "
        for place, character in enumerate(plain)
    )
    return ("" if normalizer == "chinese" else " ").join(kept.split())


def _within(text: str, place: int) -> bool:
    """Tell whether an apostrophe or hyphen stands between two letters or digits."""
    around = text[place - 1 : place] + text[place + 1 : place + 2]
    return text[place] in "'\u2019-" and len(around) == 2 and around.isalnum()


class Edits(NamedTuple):
    """How many units are right, and how many errors of each kind there are."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def units(self) -> int:
        """Units of the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors of a unit of the references; of none, the number of errors."""
        return self.errors / max(1, self.units)


class Compared(NamedTuple):
    """Recognised texts beside the true ones.

    Attributes:
        edits: Of each pair.
        confused: How often which unit was taken for which; "" is none: it was left out, or added.
    """

    edits: list[Edits]
    confused: Counter[tuple[str, str]]


def compare(
    references: Sequence[str], hypotheses: Sequence[str], by: Literal["character", "word"]
) -> Compared:
    """Align texts unit by unit, with the fewest errors.

    Args:
        references: What was said, normalised.
        hypotheses: What was recognised, normalised.
        by: The units.
    """
    import jiwer

    edits, confused = [], Counter[tuple[str, str]]()
    for reference, hypothesis in zip(map(str.strip, references), map(str.strip, hypotheses), strict=True):
        true = list(reference) if by == "character" else reference.split()
        found = list(hypothesis) if by == "character" else hypothesis.split()
        if not true or not found:  # the library does not take empty ones
            edits.append(Edits(0, 0, len(true), len(found)))
            confused.update((unit, "") for unit in true)
            confused.update(("", unit) for unit in found)
            continue
        aligned = (jiwer.process_characters if by == "character" else jiwer.process_words)(
            reference, hypothesis
        )
        edits.append(Edits(aligned.hits, aligned.substitutions, aligned.deletions, aligned.insertions))
        for part in aligned.alignments[0]:
            left = aligned.references[0][part.ref_start_idx : part.ref_end_idx]
            right = aligned.hypotheses[0][part.hyp_start_idx : part.hyp_end_idx]
            if part.type == "substitute":
                confused.update(zip(left, right, strict=True))
            elif part.type == "delete":
                confused.update((unit, "") for unit in left)
            elif part.type == "insert":
                confused.update(("", unit) for unit in right)
    return Compared(edits, confused)


def total(edits: Sequence[Edits]) -> Edits:
    """Add up errors of several texts."""
    return Edits(*(sum(column) for column in zip(*edits, strict=True))) if edits else Edits()

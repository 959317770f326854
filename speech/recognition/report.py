"""What a test of a recogniser leaves beside its figures: the texts with their errors, and a picture."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyheads.speech.recognition.metrics import Edits, Normalizer, total

TEXTS, PICTURE = "texts.csv", "errors.png"
_SHOWN = 12  # most frequent confusions in the picture


@dataclass(frozen=True)
class Tested:
    """A tested split.

    Args:
        ids: Names of the utterances.
        references: What was said, normalised.
        hypotheses: What was recognised, normalised.
        characters: Errors of characters of each.
        words: Errors of words of each.
        confused: How often which character was taken for which; "" is none.
        normalizer: What was done to the texts.
    """

    ids: Sequence[str]
    references: Sequence[str]
    hypotheses: Sequence[str]
    characters: Sequence[Edits]
    words: Sequence[Edits]
    confused: Counter[tuple[str, str]]
    normalizer: Normalizer

    def write(self, folder: Path) -> list[str]:
        """Write a row an utterance, and the picture.

        Returns:
            Lines to print.
        """
        with (folder / TEXTS).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(
                ["id", "reference", "hypothesis", "substitutions", "deletions", "insertions", "characters"]
            )
            for name, said, written, edits in zip(
                self.ids, self.references, self.hypotheses, self.characters, strict=True
            ):
                rows.writerow(
                    [name, said, written, edits.substitutions, edits.deletions, edits.insertions, edits.units]
                )
        draw_errors(self.characters, self.confused, folder / PICTURE)
        lines = [
            _line(what, total(edits), self.normalizer)
            for what, edits in (("characters", self.characters), ("words", self.words))
        ]
        return [*lines, f"in {folder}: {TEXTS}, {PICTURE}"]


def _line(what: str, edits: Edits, normalizer: str) -> str:
    """Say an error rate with its parts and its normaliser, as it can be quoted."""
    return (
        f"{what}: {edits.rate:.2%} errors of {edits.units} (S {edits.substitutions}, D {edits.deletions}, "
        f"I {edits.insertions}; normaliser: {normalizer})"
    )


def draw_errors(edits: Sequence[Edits], confused: Counter[tuple[str, str]], path: Path) -> None:
    """Draw the error rate by length of the text, by kind, and the most frequent confusions."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    longest = max((each.units for each in edits), default=0)
    width = max(1, -(-longest // 10))  # characters of a bar
    bars = sorted({each.units // width for each in edits if each.units})
    parts = [total([each for each in edits if each.units // width == bar]) for bar in bars]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = [0.0] * len(parts)
    for name in ("substitutions", "deletions", "insertions"):
        heights = [100 * getattr(part, name) / max(1, part.units) for part in parts]
        left.bar([bar * width + (width - 1) / 2 for bar in bars], heights, 0.8 * width, base, label=name)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    left.set(xlabel="characters of the text", ylabel="errors, % of characters")
    left.set_ylim(0, 1.35 * max(base, default=0.0) or 1.0)  # room for the legend
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.legend(frameon=False, ncols=3, loc="upper center")
    left.grid(alpha=0.3, axis="y")
    most = confused.most_common(_SHOWN)[::-1]
    right.barh([_arrow(*pair) for pair, _ in most], [count for _, count in most])
    right.set(xlabel="times", title="most frequent errors")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def _arrow(said: str, written: str) -> str:
    """Name a confusion: what was said, what was written; nothing is a dot, a space an open box."""
    names = {"": "\u00b7", " ": "\u2423"}
    return f"{names.get(said, said)} \u2192 {names.get(written, written)}"

"""What a test of a separator leaves beside its figures: a table by mixture, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from manyheads.speech.separation.metrics import Score

TABLE, PICTURE = "mixtures.csv", "mixtures.png"


@dataclass(frozen=True)
class Measured:
    """One separated mixture.

    Args:
        index: Its number in the part.
        id: Its name.
        seconds: How long it is.
        score: How well it was separated.
    """

    index: int
    id: str
    seconds: float
    score: Score


@dataclass(frozen=True)
class Tested:
    """Separated mixtures, in order."""

    rows: Sequence[Measured]

    @cached_property
    def improvements(self) -> Tensor:
        """SI-SDRi of each, in dB."""
        return torch.tensor([row.score.improvement for row in self.rows], dtype=torch.float64)

    def write(self, folder: Path) -> list[str]:
        """Write a row a mixture, and the picture.

        Returns:
            Lines to print.
        """
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            count = len(self.rows[0].score.voices)
            voices = [f"si_sdr_{n}" for n in range(1, count + 1)]
            rows.writerow(["id", "seconds", "si_sdri", "si_sdr", "mixture_si_sdr", *voices, "order"])
            for row in self.rows:
                found = row.score
                figures = (found.improvement, found.si_sdr, found.mixture_si_sdr, *found.voices)
                order = " ".join(str(n + 1) for n in found.order)
                rows.writerow([row.id, f"{row.seconds:.3f}", *(f"{figure:.3f}" for figure in figures), order])
        draw(self, folder / PICTURE)
        gains = self.improvements
        worst = self.rows[int(gains.argmin())]
        return [
            f"SI-SDRi {gains.mean():.2f} dB (median {gains.quantile(0.5):.2f}, from {gains.min():.2f} to "
            f"{gains.max():.2f}) of {len(gains)} mixtures; the worst is {worst.id}",
            f"in {folder}: {TABLE}, {PICTURE}",
        ]


def draw(tested: Tested, path: Path) -> None:
    """Draw how many mixtures gained how much, and each voice before and after."""
    from matplotlib.figure import Figure

    gains = tested.improvements.numpy()
    before = [each for row in tested.rows for each in row.score.before]
    after = [each for row in tested.rows for each in row.score.voices]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(gains, bins=min(30, max(5, len(gains) // 5)))
    left.axvline(gains.mean(), color="black", linewidth=1, label=f"mean {gains.mean():.2f} dB")
    left.set(xlabel="SI-SDR improvement, dB", ylabel="mixtures")
    left.legend(frameon=False)
    left.grid(alpha=0.3, axis="y")
    right.scatter(before, after, s=12, alpha=0.6, linewidths=0)
    ends = [min(before), max(before)]
    right.plot(ends, ends, color="black", linewidth=1, label="no better than the mixture")
    right.set(xlabel="SI-SDR of a voice in the mixture, dB", ylabel="SI-SDR of the separated voice, dB")
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

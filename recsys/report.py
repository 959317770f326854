"""What a test of a recommender leaves beside its figures: every target's rank, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manyheads.recsys.evaluation import Ranked

RANKS, PICTURE = "ranks.csv", "ranks.png"
_SHOWN = ("hr", "ndcg", "mrr", "coverage", "novelty")


@dataclass(frozen=True)
class Tested:
    """A tested split, by a model and by popularity.

    Args:
        users: Ids, a question each.
        items: Ids of the catalogue.
        found: The model's ranks.
        popular: Popularity's, of the same targets.
        figures: The model's figures.
        beside: Popularity's.
        k: Of the lists that are told about.
    """

    users: Sequence[str]
    items: Sequence[str]
    found: Ranked
    popular: Ranked
    figures: Mapping[str, float]
    beside: Mapping[str, float]
    k: int

    def write(self, folder: Path) -> list[str]:
        """Write a row a target, and the picture.

        Returns:
            Lines to print.
        """
        questions, items, ranks = self.popular
        popular = dict(zip(zip(questions, items, strict=True), ranks, strict=True))
        with (folder / RANKS).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["user_id", "item_id", "rank", "popularity_rank"])
            for question, item, rank in zip(*self.found, strict=True):  # of the tested batches, if not of all
                row = [self.users[question], self.items[item], f"{rank:g}", f"{popular[question, item]:g}"]
                rows.writerow(row)
        draw_ranks(self, folder / PICTURE)
        width = max(map(len, _SHOWN)) + len(f"@{self.k}")
        lines = [f"{'':{width}}     model  popularity   (all {len(self.items):,} items ranked)"]
        for name in _SHOWN:
            key = f"{name}@{self.k}"
            lines.append(f"{key:{width}} {self.figures[key]:9.4f} {self.beside[key]:11.4f}")
        return [*lines, f"in {folder}: {RANKS}, {PICTURE}"]


def draw_ranks(tested: Tested, path: Path) -> None:
    """Draw which share of the targets is among the first k, by k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, ranked in (("model", tested.found), ("popularity", tested.popular)):
        ordered = np.sort(ranked.ranks)
        axes.plot(ordered, 100 * np.arange(1, len(ordered) + 1) / len(ordered), label=name)
    axes.set(xscale="log", xlim=(1, len(tested.items)), ylim=(0, 100))
    axes.set(xlabel="items recommended", ylabel="targets among them, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

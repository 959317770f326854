"""How well events with items that training never saw are foretold, beside what chance gives."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from manyheads.recsys.metrics import Floats, measure, standing
from manyheads.recsys.retrieval import Factors, Pairs

if TYPE_CHECKING:
    from manyheads.recsys.source import Asked
    from manyheads.recsys.text_data import TextData

RANKS = "cold_ranks.csv"
_SHOWN = ("hr", "ndcg")


@dataclass(frozen=True)
class Cold:
    """The ranks of such events.

    Args:
        users: Whose they are, by id.
        items: The items, by id.
        ranks: Among all items that the user had not chosen yet.
        only: Among those of them that training never saw.
        figures: `cold_hr@k` and so on, of all of them.
        count: Items that training never saw.
        k: Of the lists that are told about.

    Shape:
        `[events]`.
    """

    users: Sequence[str]
    items: Sequence[str]
    ranks: Floats
    only: Floats
    figures: dict[str, float]
    count: int
    k: int

    def write(self, folder: Path) -> list[str]:
        """Write a row an event.

        Returns:
            Lines to print.
        """
        with (folder / RANKS).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["user_id", "item_id", "rank", "rank_among_new"])
            for user, item, rank, only in zip(self.users, self.items, self.ranks, self.only, strict=True):
                rows.writerow([user, item, f"{rank:g}", f"{only:g}"])
        lines = [f"items that training never saw: {self.count:,}, in {len(self.ranks):,} events"]
        for name in _SHOWN:
            key = f"{name}@{self.k}"
            for before, among in (("cold_", "all items"), ("cold_only_", "these items alone")):
                found, chance = self.figures[f"{before}{key}"], self.figures[f"{before}chance_{key}"]
                lines.append(f"{key:8} among {among:18} {found:7.4f}   chance {chance:7.4f}")
        return [*lines, f"in {folder}: {RANKS}"]


def measure_cold(batches: Iterable[tuple[Factors, Asked]], data: TextData, ks: Sequence[int]) -> Cold:
    """Rank the targets of questions about items that training never saw.

    What chance gives is exact: the mean of the figure over all places among a question's candidates.

    Args:
        batches: Scores of all items, those never seen last, and the questions.
        data: The items.
        ks: Lengths of the lists.
    """
    first = data.num_items
    ranks: list[Floats] = []
    only: list[Floats] = []
    left: list[np.ndarray] = []
    for factors, asked in batches:
        total, rows = len(factors.items), len(factors.queries)
        seen = torch.unique(asked.seen.rows * total + asked.seen.items)
        seen = Pairs(seen.div(total, rounding_mode="floor"), seen % total)
        targets = asked.targets
        new = seen.items >= first
        ranks.append(standing(factors, targets, seen).ranks())
        few = Factors(factors.queries, factors.items[first:])
        of_new = Pairs(seen.rows[new], seen.items[new] - first)
        only.append(standing(few, Pairs(targets.rows, targets.items - first), of_new).ranks())
        again = torch.zeros(rows, dtype=torch.bool, device=seen.rows.device)  # the target, chosen before
        again[seen.rows[seen.items == targets.items[seen.rows]]] = True
        counts = [torch.bincount(part, minlength=rows) - again.long() for part in (seen.rows, of_new.rows)]
        left.append(np.stack([total - counts[0].cpu().numpy(), total - first - counts[1].cpu().numpy()]))
    questions = data.cold_questions()
    every, candidates = np.arange(len(questions.users)), np.concatenate(left, 1)
    figures: dict[str, float] = {}
    joined = np.concatenate(ranks), np.concatenate(only)
    for before, found, among in zip(("cold_", "cold_only_"), joined, candidates, strict=True):
        figures |= {f"{before}{key}": value for key, value in measure(found, every, ks).items()}
        figures |= {f"{before}chance_{key}": value for key, value in _chance(among, ks).items()}
    sequences = data.split.sequences
    return Cold(
        [sequences.user_ids.ids[user] for user in questions.users],
        [sequences.item_ids.ids[item] for item in questions.targets.items],
        *joined,
        figures,
        len(data.texts) - first,
        10 if 10 in ks else ks[-1],
    )


def _chance(candidates: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Return the figures of ranks that are all equally likely."""
    found: dict[str, float] = {}
    for k in ks:
        gains = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))))
        within = np.minimum(candidates, k)
        found[f"hr@{k}"] = float((within / candidates).mean())
        found[f"ndcg@{k}"] = float((gains[within] / candidates).mean())
    return found

"""The figures of a part's questions, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyheads.recsys import sampled
from manyheads.recsys.metrics import Floats, Spread, measure, standing
from manyheads.recsys.retrieval import Factors, top_k
from manyheads.recsys.source import Asked


class Ranked(NamedTuple):
    """Ranks of targets, in order of the questions.

    Args:
        questions: Whose they are.
        items: The targets.
        ranks: Their ranks.

    Shape:
        `[targets]`.
    """

    questions: NDArray[np.int64]
    items: NDArray[np.int64]
    ranks: Floats


class Evaluation:
    """Ranks of targets over the whole catalogue, and what lists of recommendations reach.

    Args:
        counts: How often each item was chosen in training.
        users: Users of training.
        ks: The lengths of lists.
        drawn: Items that the targets are ranked among, too, one row a question; None for none.

    Shape:
        counts `[items]`; drawn `[questions, n]`.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        users: int,
        ks: Sequence[int],
        drawn: NDArray[np.int32] | None = None,
    ) -> None:
        self.counts, self.ks, self.drawn = counts, tuple(ks), drawn
        self._spread = Spread(counts, users, ks)
        self._found: list[tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats]] = []

    def add(self, factors: Factors, asked: Asked) -> None:
        """Rank a batch's targets."""
        ranks = among = standing(factors, asked.targets, asked.seen).ranks()
        index = asked.questions.cpu().numpy()
        if self.drawn is not None:
            drawn = asked.questions.new_tensor(self.drawn[index])
            among = sampled.standing_among(factors, asked.targets.items, drawn).ranks()
        top = top_k(factors, max(self.ks), asked.seen)
        self._spread.add(top.items.cpu().numpy())
        questions = index[asked.targets.rows.cpu().numpy()]
        self._found.append((questions, asked.targets.items.cpu().numpy(), ranks, among))

    def join(self, others: Sequence[Evaluation]) -> None:
        """Add what other processes have found."""
        for other in others:
            self._found += other._found
        self._spread.join([other._spread for other in others])

    def ranked(self, among: bool = False) -> Ranked:
        """Return all ranks so far; those among drawn items, if wanted."""
        questions, items, ranks, drawn = (np.concatenate(each) for each in zip(*self._found, strict=True))
        order = np.argsort(questions, kind="stable")
        return Ranked(questions[order], items[order], (drawn if among else ranks)[order])

    def figures(self) -> dict[str, float]:
        """Return the figures of all targets so far; `metrics.measure` and `Spread.figures` say which."""
        found = self.ranked()
        by_item = self.counts[found.items]
        return measure(found.ranks, found.questions, self.ks, by_item) | self._spread.figures()

    def sampled_figures(self) -> dict[str, float]:
        """Return the figures among the drawn items."""
        found = self.ranked(among=True)
        return measure(found.ranks, found.questions, self.ks)

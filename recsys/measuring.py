"""What the tasks measure: ranks over the whole catalogue, popularity's beside them, what a test leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from manyheads.core.errors import UsageError
from manyheads.core.training import of_all
from manyheads.recsys import sampled
from manyheads.recsys.evaluation import Evaluation
from manyheads.recsys.popularity import popularity
from manyheads.recsys.report import Tested
from manyheads.recsys.retrieval import Factors
from manyheads.recsys.sequences import cells

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from manyheads.core.loading import BatchLoader
    from manyheads.recsys.source import Asked, Splitting
    from manyheads.recsys.splits import Part, Questions, Split

POPULARITY = "popularity_"
SHOWN = ("hr", "ndcg", "mrr")  # of validation


@dataclass(frozen=True)
class Sampled:
    """Figures of the test among a few drawn items, as older papers have them, beside the others.

    They flatter, and do not keep the order of models; their names begin with `sampled_`.

    Args:
        negatives: Items drawn for each user; 0 asks for no such figures.
        kind: Drawn by "popularity" in training, or "uniform".
        seed: Of the draws.
    """

    negatives: int = 0
    kind: Literal["uniform", "popularity"] = "popularity"
    seed: int = 0


class Asking(Protocol):
    """What a data module offers to be measured on.

    Args:
        split: All histories, divided.
        counts: How often each item was chosen in training.
        splitting: How they were divided.

    Shape:
        counts `[items]`.
    """

    split: Split
    counts: NDArray[np.int64]
    splitting: Splitting

    def asked(self, part: Part) -> Questions:
        """What a part asks."""

    def question_loader(self, part: Part, alone: bool = False) -> BatchLoader[Asked, Asked]:
        """Batches of that: this process' share, or all."""


class Measuring:
    """Ranks of a part's targets, of all batches and processes.

    Args:
        ks: Lengths of the lists that are measured; the best epoch is by 10, else by the last of them.
        among: Figures among drawn items, in the test.

    Raises:
        UsageError: These are no lengths.
    """

    def __init__(self, ks: Sequence[int], among: Sampled) -> None:
        if not ks or min(ks) < 1:
            raise UsageError(f"ks must be lengths of lists, not {list(ks)}")
        self.ks, self.sampled = tuple(ks), among
        self._evaluation: Evaluation | None = None
        self._popularity: dict[Part, Evaluation] = {}
        self.tested: Tested | None = None

    @property
    def k(self) -> int:
        """The length that is told about."""
        return 10 if 10 in self.ks else self.ks[-1]

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return f"val_ndcg@{self.k}", "max"

    def begin(self, data: Asking, part: Part) -> None:
        """Begin with no ranks; draw items for a test where that is asked for.

        Raises:
            UsageError: Sampled figures are asked for, of several targets a user.
        """
        of = self.sampled
        if part != "test" or not of.negatives:
            self._evaluation = self._new(data)
            return
        if data.splitting.target == "all":
            raise UsageError("sampled figures are of one target a user: set data.splitting.target to next")
        asked = data.asked(part)
        known = cells(data.split.sequences.items, asked.first, asked.end + 1)  # the target with them
        drawn = sampled.draw(known, len(asked.users), data.counts, of.negatives, of.kind, of.seed)
        self._evaluation = self._new(data, drawn)

    def add(self, factors: Factors, asked: Asked) -> None:
        """Rank a batch's targets."""
        assert self._evaluation is not None
        queries, items, bias = factors
        plain = Factors(queries.float(), items.float(), None if bias is None else bias.float())
        with torch.autocast(queries.device.type, enabled=False):  # bfloat16 makes ties of close scores
            self._evaluation.add(plain, asked)

    def end(self, task: LightningModule, data: Asking, part: Part) -> dict[str, float]:
        """Log a part's figures and popularity's: of validation those that a picture shows, of a test all.

        Returns:
            The model's figures.
        """
        found, self._evaluation = self._evaluation, None
        assert found is not None
        shares = of_all(task.trainer, [found])
        if len(shares) > 1:
            found = self._new(data, found.drawn)
            found.join(shares)
        if part not in self._popularity:
            beside = self._new(data)
            for asked in data.question_loader(part, alone=True):
                beside.add(popularity(data.counts, len(asked.questions)), asked)
            self._popularity[part] = beside
        figures, popular = found.figures(), self._popularity[part].figures()
        shown = [f"{name}@{self.k}" for name in SHOWN] if part == "val" else figures
        task.log_dict({f"{part}_{key}": figures[key] for key in shown})
        task.log_dict({f"{part}_{POPULARITY}{key}": popular[key] for key in shown})
        if part != "test":
            return figures
        if found.drawn is not None:
            before = f"test_{sampled.prefix(self.sampled.kind, self.sampled.negatives)}"
            task.log_dict({f"{before}{key}": value for key, value in found.sampled_figures().items()})
        sequences = data.split.sequences
        self.tested = Tested(
            [sequences.user_ids.ids[user] for user in data.asked("test").users],
            sequences.item_ids.ids,
            found.ranked(),
            self._popularity["test"].ranked(),
            figures,
            popular,
            self.k,
        )
        return figures

    def _new(self, data: Asking, drawn: NDArray[np.int32] | None = None) -> Evaluation:
        first, end = data.split.span("train")
        return Evaluation(data.counts, int((end > first).sum()), self.ks, drawn)

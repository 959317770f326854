"""Training and testing a recommender of the next item: losses over the catalogue, ranks over all of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core import optimization
from manyheads.core.catalog import create_model, find
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.recsys import losses, sampled
from manyheads.recsys.evaluation import Evaluation
from manyheads.recsys.masking import Masked, mask_items, next_items
from manyheads.recsys.models.bert4rec import BERT4Rec
from manyheads.recsys.models.encoder import Packed
from manyheads.recsys.models.sasrec import SASRec
from manyheads.recsys.popularity import popularity
from manyheads.recsys.report import Tested
from manyheads.recsys.retrieval import Factors
from manyheads.recsys.sequences import cells
from manyheads.recsys.start import load_weights

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.recsys.data import Asked, RecommendationData
    from manyheads.recsys.splits import Part

Plain = bool | int | float | str | None
TASK, POPULARITY = "recommendation", "popularity_"
SHOWN = ("hr", "ndcg", "mrr")  # of validation


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        loss: "cross_entropy" over the whole catalogue; "sampled_softmax" or "gbce" against drawn items, the
            same for a batch; "bpr" against one item a target.
        negatives: Items that are drawn a batch.
        power: Items are drawn by their counts to this power: 0 uniformly, 1 by popularity. The softmax is
            corrected for it.
        t: Of "gbce": how much of the overconfidence of few draws is undone, from 0 to 1.
        mask_rate: Which share of a window is hidden, of BERT4Rec.
        most_masks: How many of a window at most; 0 sets no limit.
        last_share: The share of windows of which the last item alone is hidden, as in a question.
    """

    loss: Literal["cross_entropy", "sampled_softmax", "gbce", "bpr"] = "cross_entropy"
    negatives: int = 256
    power: float = 0.0
    t: float = 0.75
    mask_rate: float = 0.2
    most_masks: int = 0
    last_share: float = 0.1

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("negatives", self.negatives >= 1, "at least 1"),
            ("power", self.power >= 0 and (self.power == 0 or self.loss != "gbce"), "0 or more; 0 for gbce"),
            ("t", 0 <= self.t <= 1, "from 0 to 1"),
            ("mask_rate", 0 < self.mask_rate <= 1, "above 0, at most 1"),
            ("most_masks", self.most_masks >= 0, "0 or more"),
            ("last_share", 0 <= self.last_share <= 1, "from 0 to 1"),
        ):
            if not holds:
                raise UsageError(f"objective.{name} must be {wanted}")


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


class Recommender(LightningModule):
    """Train a BERT4Rec or a SASRec, and measure it over the whole catalogue.

    Logs `train_loss`; of validation `val_hr@10`, `val_ndcg@10` and `val_mrr@10`; of the test all that
    `metrics.measure` and `metrics.Spread` say (`test_ndcg@20`, `test_mrr`, `test_coverage@10` ...); of both
    the same of popularity (`val_popularity_ndcg@10` ...). All items are ranked but those seen, ties count
    half. The best epoch is that of the highest `val_ndcg@10`.

    Args:
        num_items: Items of the catalogue; the data say it.
        max_len: Events of a window; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        objective: What is minimised.
        optimizer: Adam or AdamW, its rate by step, averaged weights.
        ks: Lengths of the lists that are measured; the best epoch is by 10, else by the last of them.
        sampled: Figures among drawn items, in the test.
        start: A model folder that training goes on from; items that it has not got are added to its own.

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.num_items", "model.num_items", "instantiate"),
        ("data.max_len", "model.max_len", "instantiate"),
        ("model.start", "data.start", "parse"),
    )

    def __init__(
        self,
        num_items: int,
        max_len: int,
        name: str = "bert4rec",
        arguments: dict[str, Plain] | None = None,
        objective: Objective = Objective(),  # frozen, as those below
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        ks: list[int] = [5, 10, 20],  # noqa: B006  # not changed
        sampled: Sampled = Sampled(),
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"name": name, "objective": asdict(objective), "optimizer": asdict(optimizer)}
        )
        if not ks or min(ks) < 1:
            raise UsageError(f"ks must be lengths of lists, not {ks}")
        self.name, self.objective, self.optimizer, self.ks = name, objective, optimizer, tuple(ks)
        self.sampled = sampled
        self.builder_arguments = _recipe(name, arguments or {}, num_items, max_len)
        model = create_model(name, **self.builder_arguments)
        if not isinstance(model, BERT4Rec | SASRec):
            raise UsageError(f"{name} is not trained here: a BERT4Rec or a SASRec is")
        if start is not None:
            load_weights(model, name, start, num_items)
        self.model = model
        self.negatives: losses.Negatives | None = None
        self._evaluation: Evaluation | None = None
        self._popularity: dict[Part, Evaluation] = {}
        self._tested: Tested | None = None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return f"val_ndcg@{self._shown}", "max"

    @property
    def _shown(self) -> int:
        return 10 if 10 in self.ks else self.ks[-1]

    def on_fit_start(self) -> None:
        """Take the chances of items to be drawn from training's counts."""
        if self.objective.loss != "cross_entropy":
            counts = torch.from_numpy(self._data.counts)
            self.negatives = losses.Negatives(counts, self.objective.power).to(self.device)

    def training_step(self, batch: Packed) -> Tensor:
        """Return the loss of a batch of windows."""
        asked = self._question(batch)
        loss = self._loss(self.model(asked.batch, asked.at), asked.targets)
        size = len(batch.starts) - 1
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=size)
        return loss

    def _question(self, batch: Packed) -> Masked:
        """Hide items for a model that guesses them; ask one that foretells for each next one."""
        if isinstance(self.model, SASRec):
            return next_items(batch)
        of, windows = self.objective, len(batch.starts) - 1
        last = torch.rand(windows, device=batch.tokens.device) < of.last_share
        most = of.most_masks or self._data.max_len
        return mask_items(batch, self.model.mask_token, of.mask_rate, most, last)

    def _loss(self, states: Tensor, targets: Tensor) -> Tensor:
        of, items = self.objective, self.model.items()
        if of.loss == "cross_entropy":
            return losses.cross_entropy(states, targets, items)
        assert self.negatives is not None
        if of.loss == "bpr":
            return losses.bpr(states, targets, items, self.negatives(len(targets)))
        drawn = self.negatives(of.negatives)
        if of.loss == "gbce":
            return losses.gbce(states, targets, items, drawn, of.t)
        chances = self.negatives.log_chance if of.power else None
        return losses.sampled_softmax(states, targets, items, drawn, chances)

    def on_validation_epoch_start(self) -> None:
        """Begin with no ranks."""
        self._evaluation = self._begin()

    def validation_step(self, batch: Asked) -> None:
        """Rank what came next."""
        self._rank(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures, and popularity's."""
        self._log("val", self._joined())

    def on_test_epoch_start(self) -> None:
        """Begin with no ranks, and draw items where they are asked for."""
        data, of = self._data, self.sampled
        if not of.negatives:
            self._evaluation = self._begin()
            return
        if data.splitting.target == "all":
            raise UsageError("sampled figures are of one target a user: set data.splitting.target to next")
        asked = data.asked("test")
        known = cells(data.split.sequences.items, asked.first, asked.end + 1)  # the target with them
        drawn = sampled.draw(known, len(asked.users), data.counts, of.negatives, of.kind, of.seed)
        self._evaluation = self._begin(drawn)

    def test_step(self, batch: Asked) -> None:
        """Rank what came next."""
        self._rank(batch)

    def on_test_epoch_end(self) -> None:
        """Log the figures, popularity's, and those among drawn items."""
        found = self._joined()
        figures, beside = self._log("test", found)
        if found.drawn is not None:
            before = f"test_{sampled.prefix(self.sampled.kind, self.sampled.negatives)}"
            self.log_dict({f"{before}{key}": value for key, value in found.sampled_figures().items()})
        data = self._data
        users = data.split.sequences.user_ids.ids
        self._tested = Tested(
            [users[user] for user in data.asked("test").users],
            data.split.sequences.item_ids.ids,
            found.ranked(),
            self._popularity["test"].ranked(),
            figures,
            beside,
            self._shown,
        )

    def report(self, folder: Path) -> list[str]:
        """Write the last test's ranks and picture into a folder.

        Returns:
            Lines to print.
        """
        assert self._tested is not None
        return self._tested.write(folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and a schedule by step.

        Raises:
            UsageError: The run has no end that the schedule needs.
        """
        batches = len(self._data.train_dataloader())
        return optimization.configure(self.model, self.optimizer, optimization.NEVER, self.trainer, batches)

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights, if that is wanted."""
        return optimization.make_callbacks(self.optimizer, optimization.NEVER, self.trainer, self.monitor)

    def _begin(self, drawn: NDArray[np.int32] | None = None) -> Evaluation:
        data = self._data
        first, end = data.split.span("train")
        return Evaluation(data.counts, int((end > first).sum()), self.ks, drawn)

    def _rank(self, batch: Asked) -> None:
        assert self._evaluation is not None
        queries = self.model.queries(batch.histories)
        self._evaluation.add(Factors(queries.float(), *self._items()), batch)

    def _items(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.model.items()
        return weight.float(), None if bias is None else bias.float()

    def _joined(self) -> Evaluation:
        """Return the evaluation of all processes."""
        found, self._evaluation = self._evaluation, None
        assert found is not None
        if self.trainer.world_size > 1:
            shares: list[Evaluation] = [found] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, found)
            found = self._begin(found.drawn)
            found.join(shares)
        return found

    def _log(self, part: Part, found: Evaluation) -> tuple[dict[str, float], dict[str, float]]:
        """Log a part's figures, the model's and popularity's; of validation those that a picture shows."""
        if part not in self._popularity:
            data, beside = self._data, self._begin()
            for asked in data.question_loader(part, alone=True):
                beside.add(popularity(data.counts, len(asked.questions)), asked)
            self._popularity[part] = beside
        figures, popular = found.figures(), self._popularity[part].figures()
        shown = [f"{name}@{self._shown}" for name in SHOWN] if part == "val" else figures
        self.log_dict({f"{part}_{key}": figures[key] for key in shown})
        self.log_dict({f"{part}_{POPULARITY}{key}": popular[key] for key in shown})
        return figures, popular

    @property
    def _data(self) -> RecommendationData:
        return cast("RecommendationData", self.trainer.datamodule)  # type: ignore[attr-defined]


def _recipe(name: str, arguments: dict[str, Plain], num_items: int, max_len: int) -> dict[str, Json]:
    """Return everything that the catalogue's builder gets.

    A window of a model that foretells each next item asks one question fewer than it has events.

    Raises:
        UsageError: `arguments` decide what is decided elsewhere, or the model is of another task.
    """
    entry = find(name)
    if entry.task != TASK:
        raise UsageError(f"{name} is for {entry.task}, not for {TASK}")
    for key, place in (("num_items", "the data"), ("max_len", "data.windows.length")):
        if key in arguments:
            raise UsageError(f"model.arguments.{key} is decided by {place}")
    length = max_len - 1 if name.startswith("sasrec") else max_len
    return {"num_items": num_items, "max_len": length} | dict(arguments)

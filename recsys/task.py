"""Training and testing a recommender of the next item: losses over the catalogue, ranks over all of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core import optimization
from manyheads.core.catalog import create_model, find
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.recsys import losses
from manyheads.recsys.masking import Masked, mask_items, next_items
from manyheads.recsys.measuring import Measuring, Sampled
from manyheads.recsys.models.bert4rec import BERT4Rec
from manyheads.recsys.models.encoder import Packed
from manyheads.recsys.models.sasrec import SASRec
from manyheads.recsys.retrieval import Factors
from manyheads.recsys.start import load_weights

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.recsys.data import RecommendationData
    from manyheads.recsys.source import Asked

Plain = bool | int | float | str | None
TASK = "recommendation"


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
        sampled: Sampled = Sampled(),  # noqa: B008
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"name": name, "objective": asdict(objective), "optimizer": asdict(optimizer)}
        )
        self.name, self.objective, self.optimizer = name, objective, optimizer
        self.measuring = Measuring(ks, sampled)
        self.builder_arguments = _recipe(name, arguments or {}, num_items, max_len)
        model = create_model(name, **self.builder_arguments)
        if not isinstance(model, BERT4Rec | SASRec):
            raise UsageError(f"{name} is not trained here: a BERT4Rec or a SASRec is")
        if start is not None:
            load_weights(model, name, start, num_items)
        self.model = model
        self.negatives: losses.Negatives | None = None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return self.measuring.monitor

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
        mean = loss.detach()
        self.log("train_loss", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
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
        self.measuring.begin(self._data, "val")

    def validation_step(self, batch: Asked) -> None:
        """Rank what came next."""
        self._rank(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures, and popularity's."""
        self.measuring.end(self, self._data, "val")

    def on_test_epoch_start(self) -> None:
        """Begin with no ranks, and draw items where they are asked for."""
        self.measuring.begin(self._data, "test")

    def test_step(self, batch: Asked) -> None:
        """Rank what came next."""
        self._rank(batch)

    def on_test_epoch_end(self) -> None:
        """Log the figures, popularity's, and those among drawn items."""
        self.measuring.end(self, self._data, "test")

    def report(self, folder: Path) -> list[str]:
        """Write the last test's ranks and picture into a folder.

        Returns:
            Lines to print.
        """
        assert self.measuring.tested is not None
        return self.measuring.tested.write(folder)

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

    def _rank(self, batch: Asked) -> None:
        queries = self.model.queries(batch.histories)
        self.measuring.add(Factors(queries, *self._items()), batch)

    def _items(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.model.items()
        return weight.float(), None if bias is None else bias.float()

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

"""Training and testing a recommender that reads texts: pretrained, then fine-tuned in two stages.

Source: Li et al. 2023 (arXiv 2305.13731) and the code beside it (AaronHeee/RecFormer, `pretrain.py`,
`finetune.py`).
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core import optimization
from manyheads.core.catalog import builder, create_model, find
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.core.training import run_steps
from manyheads.recsys import losses
from manyheads.recsys.cold import Cold, measure_cold
from manyheads.recsys.measuring import Measuring, Sampled
from manyheads.recsys.models.encoder import FIRST, Items, Packed, starts_of
from manyheads.recsys.models.recformer import Recformer, pretraining, unit
from manyheads.recsys.retrieval import Factors
from manyheads.recsys.stages import Stages, make_schedule
from manyheads.recsys.start import load_text_weights
from manyheads.recsys.text_encoding import encode, encode_items, place_items
from manyheads.recsys.texts import ItemTexts, TextBatch, text_batch
from manyheads.recsys.word_masking import MaskedText, WordMasks

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.recsys.drawing import Drawn
    from manyheads.recsys.source import Asked
    from manyheads.recsys.text_data import TextData

Plain = bool | int | float | str | None
TASK = "text_recommendation"


class TextRecommender(LightningModule):
    """Train a Recformer, and measure it over the whole catalogue.

    Logs what `task.Recommender` does; of the test also, where items were held out from training, how well
    events with them are foretold: `test_cold_hr@10` among all items, `test_cold_only_hr@10` among those held
    out alone, and beside each what chance gives (`test_cold_chance_hr@10`, `test_cold_only_chance_hr@10`).
    Patience counts in the last stage alone.

    Args:
        num_items: Items that are trained on; the data say it.
        vocab_size: Tokens; the data say it.
        max_items: Items of a history; the data say it.
        max_tokens: Tokens of a text; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        stages: Pretraining and fine-tuning.
        optimizer: Adam or AdamW, its rate by step.
        ks: Lengths of the lists that are measured; the best epoch is by 10, else by the last of them.
        sampled: Figures among drawn items, in the test.
        start: A model folder that training goes on from, with its vocabulary; new items are known by text.

    Raises:
        UsageError: The options do not go together.
    """

    _log_chance: Tensor | None
    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.num_items", "model.num_items", "instantiate"),
        ("data.vocab_size", "model.vocab_size", "instantiate"),
        ("data.max_items", "model.max_items", "instantiate"),
        ("data.max_tokens", "model.max_tokens", "instantiate"),
        ("model.start", "data.start", "parse"),
    )

    def __init__(
        self,
        num_items: int,
        vocab_size: int,
        max_items: int,
        max_tokens: int,
        name: str = "recformer",
        arguments: dict[str, Plain] | None = None,
        stages: Stages = Stages(),  # noqa: B008  # frozen, as those below
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        ks: list[int] = [5, 10, 20],  # noqa: B006  # not changed
        sampled: Sampled = Sampled(),  # noqa: B008
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"name": name, "stages": asdict(stages), "optimizer": asdict(optimizer)})
        if optimizer.ema_decay:
            raise UsageError(
                "optimizer.ema_decay: stages that begin with the best weights have no mean of them"
            )
        self.name, self.stages, self.optimizer = name, stages, optimizer
        self.max_items, self.max_tokens = max_items, max_tokens
        self.measuring = Measuring(ks, sampled)
        self.builder_arguments = _recipe(name, arguments or {}, num_items, vocab_size, max_items, max_tokens)
        if stages.words:
            self.builder_arguments["language_head"] = True
        model = create_model(name, **self.builder_arguments)
        assert isinstance(model, Recformer)  # the task's rows are
        sizes = model.longformer.sizes
        if max_items > sizes.max_items or max_tokens > sizes.max_tokens:
            raise UsageError(
                f"{name} takes {sizes.max_items} items and {sizes.max_tokens} tokens (data.drawing.length is"
                f" {max_items}, data.texts.max_tokens {max_tokens})"
            )
        if start is not None:
            load_text_weights(model, name, start)
        self.model = model
        self._best: tuple[float, dict[str, Tensor]] | None = None  # before the last stage
        self._texts: ItemTexts | None = None
        self._table: tuple[int, Items] | None = None
        self._cold: Tensor | None = None
        self._masks: WordMasks | None = None
        self.register_buffer("_log_chance", None, persistent=False)
        self._negatives: losses.Negatives | None = None
        self._tested_cold: Cold | None = None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return self.measuring.monitor

    def setup(self, stage: str) -> None:
        """Make what hides words and draws items."""
        data = self._data
        if self.stages.words:
            self._masks = WordMasks(data.kept.tokens, self.stages.mask_rate)
        if self.stages.batch_items == "corrected":
            self._log_chance = torch.from_numpy(data.chances()).log().float()
        if self.stages.negatives:
            counts = torch.from_numpy(data.counts[: data.num_items])
            self._negatives = losses.Negatives(counts)

    def on_train_epoch_start(self) -> None:
        """Encode the table anew; or, for the last stage, go on from the best epoch so far."""
        stage = self.stages.at(self.current_epoch)
        if stage == "refresh":
            self._encode_table()
        elif stage == "keep" and self.current_epoch == self.stages.begins()[1]:
            if self._best is None:
                self._encode_table()
            else:
                self.model.load_state_dict(self._best[1])
                self._best = None

    def training_step(self, batch: Drawn, batch_idx: int) -> Tensor:
        """Return the loss of a batch of events."""
        stage = self.stages.at(self.current_epoch)
        loss = self._pretraining(batch, batch_idx) if stage == "pretrain" else self._fine_tuning(batch)
        size = len(batch.targets)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def _pretraining(self, batch: Drawn, number: int) -> Tensor:
        """Tell each history's next item from the batch's others; guess hidden words."""
        known, targets = batch.targets.unique(return_inverse=True)
        texts = self._read(batch.histories), self._read(_alone(known))
        masked: tuple[MaskedText, ...] = ()
        if self._masks is not None:
            rng = np.random.default_rng([self._data.seed, self.current_epoch, number, self.global_rank])
            masked = tuple(self._masks(each.to("cpu"), rng).to(self.device) for each in texts)
        chances = None if self._log_chance is None else self._log_chance[known]
        return pretraining(self.model, *texts, masked, self.stages.language, targets, chances).loss

    def _fine_tuning(self, batch: Drawn) -> Tensor:
        """Tell each history's next item from all others; the table is not trained."""
        queries, items = self.model.queries(self._read(batch.histories)), self._catalogue()
        if self._negatives is None:
            return losses.cross_entropy(queries, batch.targets, items)
        drawn = self._negatives(self.stages.negatives)
        return losses.sampled_softmax(queries, batch.targets, items, drawn)

    def _catalogue(self) -> Items:
        """Return the table's items: made once for all steps between two changes of it."""
        assert self.model.item_embedding is not None
        version = self.model.item_embedding.weight._version
        if self._table is None or self._table[0] != version or self._table[1].weight.device != self.device:
            self._table = version, self.model.items()
        return self._table[1]

    def on_validation_epoch_start(self) -> None:
        """Encode the table where pretraining has changed the model; begin with no ranks."""
        if self._fitting and self.stages.at(self.current_epoch) == "pretrain":
            self._encode_table()
        self._begin("val")

    def validation_step(self, batch: Asked) -> None:
        """Rank what came next."""
        self.measuring.add(self._factors(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures, and popularity's; hold the best weights for the last stage."""
        figures = self.measuring.end(self, self._data, "val")
        if not self._fitting or self.stages.at(self.current_epoch) == "keep":
            return
        figure = figures[self.monitor[0].removeprefix("val_")]
        if self._best is None or figure > self._best[0]:
            self._best = (
                figure,
                {key: x.detach().to("cpu", copy=True) for key, x in self.model.state_dict().items()},
            )
        if self.trainer.early_stopping_callback is not None:
            self.trainer.early_stopping_callback.wait_count = -1  # it counts this one, too

    def on_test_epoch_start(self) -> None:
        """Begin with no ranks, and draw items where they are asked for."""
        self._begin("test")

    def test_step(self, batch: Asked) -> None:
        """Rank what came next."""
        self.measuring.add(self._factors(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Log the figures, popularity's, those among drawn items, and those of items held out."""
        data = self._data
        self.measuring.end(self, data, "test")
        self._tested_cold = None
        if data.num_items < len(data.texts):
            batches = (self.transfer_batch_to_device(each, self.device, 0) for each in data.cold_loader())
            ranked = ((self._factors(each), each) for each in batches)
            self._tested_cold = measure_cold(ranked, data, self.measuring.ks)
            self.log_dict({f"test_{key}": value for key, value in self._tested_cold.figures.items()})

    def report(self, folder: Path) -> list[str]:
        """Write the last test's ranks and picture into a folder.

        Returns:
            Lines to print.
        """
        assert self.measuring.tested is not None
        lines = self.measuring.tested.write(folder)
        return lines if self._tested_cold is None else [*lines, *self._tested_cold.write(folder)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and a schedule by step that begins anew with each stage.

        Raises:
            UsageError: The run has no end, or a stage no step behind the rise.
        """
        optimizer = optimization.make_optimizer(self.model, self.optimizer)
        steps, epoch = run_steps(self.trainer, len(self._data.train_dataloader()))
        schedule = make_schedule(optimizer, self.optimizer, self.stages, steps, epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best weights of the stages before the last."""
        checkpoint["best_of_stages"] = None if self._best is None else [self._best[0], self._best[1]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold them again."""
        found = checkpoint["best_of_stages"]
        self._best = None if found is None else (found[0], found[1])

    def _encode_table(self) -> None:
        """Put what the encoder makes of the items into the table."""
        trained = self._items.select(torch.arange(self._data.num_items, device=self.device))
        self.model.set_items(0, encode_items(self.model, trained, self.max_tokens))

    def _begin(self, part: Literal["val", "test"]) -> None:
        """Begin with no ranks; place items that were held out, as prediction does with new ones."""
        self.measuring.begin(self._data, part)
        numbers = torch.arange(len(self._items), device=self.device)
        known, cold = (self._items.select(each) for each in numbers.tensor_split([self._data.num_items]))
        self._cold = self.model.items().weight.new_zeros(0, self.model.longformer.sizes.hidden_size)
        if len(cold):
            self._cold = place_items(self.model, known, cold, self.max_tokens) / self.model.temperature

    def _factors(self, batch: Asked) -> Factors:
        """Return the scores of all items, those held out last."""
        assert self._cold is not None
        states = encode(self.model, self._items, batch.histories, self.max_items, self.max_tokens)
        return Factors(unit(states), torch.cat([self.model.items().weight.float(), self._cold]))

    def _read(self, histories: Packed) -> TextBatch:
        return text_batch(self._items, histories, self.max_items, self.max_tokens)

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

    @property
    def _items(self) -> ItemTexts:
        """Texts of all items, where the model is."""
        if self._texts is None or self._texts.ids.device != self.device:
            self._texts = self._data.texts.to(self.device)
        return self._texts

    @property
    def _data(self) -> TextData:
        return cast("TextData", self.trainer.datamodule)  # type: ignore[attr-defined]


def _alone(items: Tensor) -> Packed:
    """Return items as histories of one."""
    return Packed(items + FIRST, starts_of(torch.ones_like(items)))


def _recipe(
    name: str, arguments: dict[str, Plain], num_items: int, vocab_size: int, max_items: int, max_tokens: int
) -> dict[str, Json]:
    """Return everything that the catalogue's builder gets.

    Raises:
        UsageError: `arguments` decide what is decided elsewhere, or the model is of another task.
    """
    entry = find(name)
    if entry.task != TASK:
        raise UsageError(f"{name} is for {entry.task}, not for {TASK}")
    decided = {
        "num_items": (num_items, "the data"),
        "vocab_size": (vocab_size, "the data"),
        "language_head": (False, "model.stages"),
        "max_items": (max_items, "data.drawing.length"),
        "positions": (max_tokens + 2, "data.texts.max_tokens"),
    }
    takes = inspect.signature(builder(entry)).parameters
    for key, (_, place) in decided.items():
        if key in arguments:
            raise UsageError(f"model.arguments.{key} is decided by {place}")
    return {key: value for key, (value, _) in decided.items() if key in takes} | dict(arguments)

"""Training and testing graph models: numbers, one class or several labels of graphs, nodes or pairs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core import optimization
from manyheads.core.catalog import builder, create_model, find
from manyheads.core.errors import DataError, UsageError
from manyheads.core.optimization import Optimizer, Plateau
from manyheads.core.training import of_all
from manyheads.graph import metrics
from manyheads.graph.links import ranking
from manyheads.graph.losses import Criterion, Kind, Loss
from manyheads.graph.models.inputs import Inputs
from manyheads.graph.report import Tested

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.graph.data import GraphData
    from manyheads.graph.parts import GraphBatch

Plain = bool | int | float | str | list[int] | None
Level = Literal["graph", "node", "pair"]
Seen = tuple[Tensor, Tensor, Tensor]  # numbers of rows, outputs, targets

_OPTIMIZER = Optimizer(learning_rate=1e-3, weight_decay=0.0, beta2=0.999, warmup_steps=0)
_FIXED = ("node_types", "node_features", "edge_types", "edge_features")


class GraphTask(LightningModule):
    """Train a graph model of the catalogue, and measure it over whole splits.

    Logs `train_loss`, `val_loss` and of validation and test the figures of the targets' kind, means over the
    columns: `val_mae`, `val_rmse`, `val_r2` in the data's units; `val_accuracy`, `val_balanced_accuracy`,
    `val_f1`; or `val_roc_auc` and `val_average_precision`, of the labels that have both answers. The best
    epoch is that of the best `val_mae` (`val_rmse` where squares are minimised), `val_accuracy` or
    `val_roc_auc`. Of pairs also `val_sampled_mrr`, `val_sampled_hits_1` and `val_sampled_hits_10`: edges
    ranked among sampled pairs without one. A test logs the same and `test_rows`.

    Args:
        inputs: What nodes and edges are made of, and how many outputs there are; the data say it.
        level: What is predicted of: graphs, nodes or pairs; the data say it.
        kind: What is predicted: numbers, one class, or several labels; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        optimizer: Adam or AdamW, its rate by step, averaged weights.
        plateau: A rate that falls when validation gets no better, instead.
        loss: What is minimised.
        best_by: What says which epoch is best: the "figure", or the "loss" of the validation part.

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.model_inputs", "model.inputs", "instantiate"),
        ("data.level", "model.level", "instantiate"),
        ("data.kind", "model.kind", "instantiate"),
    )

    def __init__(
        self,
        inputs: dict[str, int | list[int] | None],
        level: Level = "graph",
        kind: Kind = "regression",
        name: str = "graph_transformer",
        arguments: dict[str, Plain] | None = None,
        optimizer: Optimizer = _OPTIMIZER,
        plateau: Plateau = Plateau(),  # noqa: B008  # frozen
        loss: Loss = Loss(),  # noqa: B008
        best_by: Literal["figure", "loss"] = "figure",
    ) -> None:
        super().__init__()
        optimization.check_plateau(optimizer, plateau)
        groups = {"optimizer": asdict(optimizer), "plateau": asdict(plateau), "loss": asdict(loss)}
        self.save_hyperparameters({"name": name, "best_by": best_by} | groups)
        self.name, self.level, self.kind = name, level, kind
        self.optimizer, self.plateau, self.loss, self.best_by = optimizer, plateau, loss, best_by
        self.outputs = cast(int, inputs["outputs"])
        self.builder_arguments = recipe(name, arguments or {}, inputs, level)
        self.model = create_model(name, **self.builder_arguments)
        _check_fixed(name, self.model, inputs)
        self.criterion = Criterion(kind, loss, self.outputs)
        self._seen: list[Seen] = []
        self._tested: Tested | None = None

    @classmethod
    def of(cls, data: GraphData, name: str, **options: Any) -> GraphTask:
        """Return a task for data in hand; options as above."""
        return cls(data.model_inputs, data.level, data.kind, name, **options)

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        if self.best_by == "loss":
            return "val_loss", "min"
        if self.kind == "regression":
            return ("val_mae" if self.loss.regression == "l1" else "val_rmse"), "min"
        return ("val_accuracy" if self.kind == "classification" else "val_roc_auc"), "max"

    def setup(self, stage: str) -> None:
        """Ask the data for the targets' mean and deviation, and for what weights are measured on."""
        data = self._data
        data.setup()
        target = data.prepared.target
        train = data.targets("train")
        self.criterion = Criterion(self.kind, self.loss, self.outputs, train, target.mean, target.std)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return the outputs of a batch's rows, as the model gives them.

        Shape:
            `[R, outputs]`.

        Raises:
            UsageError: The model scores something else than the data have targets of.
        """
        found: Tensor = self.model(batch["graphs"])
        rows = batch["rows"]
        found = found if rows is None else found[rows]
        if found.shape != (wanted := (len(batch["target"]), self.outputs)):
            raise UsageError(
                f"{self.name} gives {list(found.shape)} numbers where the data, with targets of the level "
                f"{self.level!r}, ask for {list(wanted)}: choose another model"
            )
        return found

    def training_step(self, batch: GraphBatch) -> Tensor:
        """Return the loss of a batch."""
        target = batch["target"]
        loss = cast(Tensor, self.criterion(self(batch), target, batch["weight"]))
        size = len(target)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size
        )
        return loss

    def validation_step(self, batch: GraphBatch) -> None:
        """Keep a batch's outputs."""
        self._seen.append((batch["index"], self(batch).float(), batch["target"]))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all rows.

        Raises:
            DataError: There is no figure that the best epoch could be chosen by.
        """
        found, _, _ = self._figures()
        figure, _ = self.monitor
        if math.isnan(found[figure.removeprefix("val_")]) and not math.isnan(found["loss"]):
            raise DataError(f"{figure} cannot be had: the validation part has too few different targets")
        self.log_dict({f"val_{key}": value for key, value in found.items()}, prog_bar=True)

    def test_step(self, batch: GraphBatch) -> None:
        """Keep a batch's outputs."""
        self._seen.append((batch["index"], self(batch).float(), batch["target"]))

    def on_test_epoch_end(self) -> None:
        """Log the figures of all rows, and how many these are."""
        found, values, target = self._figures()
        data = self._data
        ids = data.ids("test")
        values, target = values[: len(ids)], target[: len(ids)]  # behind these pairs are ranked among others
        self._tested = Tested(self.kind, ids, data.names, data.classes, values, target)
        self.log_dict({f"test_{key}": value for key, value in found.items()} | {"test_rows": len(target)})

    def report(self, folder: Path) -> list[str]:
        """Write the last test's rows, figures by column and picture into a folder.

        Returns:
            Lines to print.
        """
        assert self._tested is not None
        return self._tested.write(folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and a schedule by step, if the rate does not fall by the figure.

        Raises:
            UsageError: The run has no end that the schedule needs.
        """
        batches = len(self._data.train_dataloader())
        return optimization.configure(self.model, self.optimizer, self.plateau, self.trainer, batches)

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights and let the rate fall, if that is wanted."""
        return optimization.make_callbacks(self.optimizer, self.plateau, self.trainer, self.monitor)

    def _figures(self) -> tuple[metrics.Figures, Tensor, Tensor]:
        """Return the figures, values and targets of all rows since the last call, of all processes, in order.

        A row that several processes had counts once.
        """
        seen, self._seen = of_all(self.trainer, self._seen), []
        index, outputs, target = (torch.cat(each) for each in zip(*seen, strict=True))
        order = index.argsort(stable=True)
        kept = order[torch.diff(index[order], prepend=index.new_tensor([-1])) != 0]
        outputs, target = outputs[kept].to(self.device), target[kept].to(self.device)
        values = self.criterion.values(outputs)
        scores = values if self.kind == "regression" else outputs
        found = {"loss": float(self.criterion(outputs, target))}
        if self.level == "pair":
            found |= ranking(outputs[:, 0], target[:, 0])
        return found | metrics.figures(self.kind, scores, target), values.cpu(), target.cpu()

    @property
    def _data(self) -> GraphData:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def recipe(
    name: str, arguments: Mapping[str, Plain], inputs: Mapping[str, int | list[int] | None], level: Level
) -> dict[str, Json]:
    """Return everything that the catalogue's builder gets.

    A model that looks at no edge categories or features does not get them.

    Raises:
        UsageError: `arguments` decide what the data decide, or the model does not take what the data have.
    """
    entry = find(name)
    if entry.task != "graph":
        raise UsageError(f"{name} is for {entry.task}, not for graphs")
    known = inspect.signature(builder(entry)).parameters
    given = {key: value for key, value in inputs.items() if value}
    if arguments.get("edges") is False:
        given = {key: value for key, value in given.items() if not key.startswith("edge_")}
    for key in inputs:
        if key in arguments:
            raise UsageError(f"model.arguments.{key} is decided by the data")
    for key, cure in (("encoding_dim", "data.encoding.kind: none"), ("roles", "data.encoding.roles: 0")):
        if key in given and key not in known:
            raise UsageError(f"{name} takes no encodings of this kind: set {cure}")
    if "max_distance" in known and "max_distance" not in given:
        raise UsageError(f"{name} needs distances: set data.encoding.distances, to 20 as published")
    decided: dict[str, Json] = {key: cast("Json", value) for key, value in given.items() if key in known}
    if "readout" in known and level != "graph":
        if "readout" in arguments:
            raise UsageError(
                f"model.arguments.readout is decided by the data: they are of the level {level!r}"
            )
        decided["readout"] = level
    if "readout" in arguments and arguments["readout"] in ("node", "pair") and level == "graph":
        raise UsageError("model.arguments.readout must be mean, sum or max: the data have targets of graphs")
    return decided | cast("dict[str, Json]", dict(arguments))


def _check_fixed(name: str, model: torch.nn.Module, inputs: Mapping[str, int | list[int] | None]) -> None:
    """Refuse a model of one data set for data that have other nodes or edges.

    Raises:
        UsageError: It is.
    """
    of = getattr(model, "of", None)
    if not isinstance(of, Inputs):
        return
    for key in _FIXED:
        found, given = getattr(of, key), inputs.get(key)
        takes = list(found) if isinstance(found, tuple) else found
        has = given or ([] if isinstance(found, tuple) else 0)
        if takes and takes != has:
            raise UsageError(f"{name} is made for {key} {takes}, the data have {has}: choose another model")

"""Training and testing a separator: permutation-invariant SI-SDR."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core import hub, optimization
from manyheads.core.catalog import create_model, find
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer, Plateau
from manyheads.core.start import load_weights
from manyheads.core.training import of_all
from manyheads.speech.separation.fresh import cosine
from manyheads.speech.separation.metrics import MOST_SPEAKERS, best_order, pairwise_si_sdr, score
from manyheads.speech.separation.report import Measured, Tested

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.speech.separation.data import SeparationData
    from manyheads.speech.separation.loading import MixtureBatch

Plain = bool | int | float | str | None


@dataclass(frozen=True)
class Objective:
    """What is minimised: the negative SI-SDR of the best order.

    Args:
        threshold_db: Mixtures that are separated better than this add nothing to the loss; None for no such
            limit.
        halve_after: The learning rate is halved after so many epochs without a better validation, as in the
            published recipe; 0 for never. With `optimizer.schedule: constant`.
    """

    threshold_db: float | None = None
    halve_after: int = 0


class Separator(LightningModule):
    """Train a model to separate voices, and measure it over whole splits.

    Logs `train_loss` and `val_loss`, the negative SI-SDR in dB of the best order of the voices, and
    `val_si_sdri`, how much better in dB than the mixture that is, the mean over the mixtures; the best epoch
    is that of the highest. A test logs `test_si_sdri`, `test_si_sdri_median`, `test_si_sdr`,
    `test_mixture_si_sdr` and `test_mixtures`, by torchmetrics, with means taken out.

    Args:
        speakers: Voices of a mixture; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        start: A model folder that training goes on from.
        fresh: Without one, the weights that training begins with: as "published", or "cosine" filters and
            attention that sees, with which a short training gets further.
        objective: What is minimised.
        optimizer: AdamW, its rate by step, averaged weights.

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.speakers", "model.speakers", "parse"),
    )

    def __init__(
        self,
        speakers: int,
        name: str = "mossformer",
        arguments: dict[str, Plain] | None = None,
        start: str | None = None,
        fresh: Literal["published", "cosine"] = "published",
        objective: Objective = Objective(),  # frozen, as that below
        optimizer: Optimizer = Optimizer(),  # noqa: B008
    ) -> None:
        super().__init__()
        if not 1 <= speakers <= MOST_SPEAKERS:
            raise UsageError(f"data.speakers must be from 1 to {MOST_SPEAKERS}, not {speakers}")
        if find(name).task != "separation":
            raise UsageError(f"{name} is not trained here: it is for {find(name).task}")
        if "num_spks" in (arguments or {}):
            raise UsageError("model.arguments.num_spks is decided by data.speakers")
        if objective.halve_after and optimizer.schedule != "constant":
            raise UsageError("objective.halve_after goes with optimizer.schedule: constant")
        self.save_hyperparameters(
            {"name": name, "objective": asdict(objective), "optimizer": asdict(optimizer)}
        )
        self.name, self.objective, self.optimizer = name, objective, optimizer
        self.builder_arguments: dict[str, Json] = {"num_spks": speakers, **(arguments or {})}
        self.model = create_model(name, **self.builder_arguments)
        self._started_at: Json = None  # the sample rate of what training goes on from
        if start is not None:
            load_weights(self.model, name, start)
            self._started_at = hub.read_config(hub.find_folder(start)).preprocessing.get("sample_rate")
        elif fresh == "cosine":
            cosine(self.model)
        self._found: list[Measured] = []
        self._losses: list[Tensor] = []  # of validation's mixtures
        self._tested: Tested | None = None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return "val_si_sdri", "max"

    def setup(self, stage: str) -> None:
        """Refuse data at another rate than what training goes on from.

        Raises:
            UsageError: They are.
        """
        if self._started_at not in (None, self._data.sample_rate):
            raise UsageError(f"model.start is for {self._started_at} Hz: set data.sample_rate to that")

    def training_step(self, batch: MixtureBatch) -> Tensor:
        """Return the loss of a batch."""
        found = self._si_sdr(batch)[0]
        size = len(found)
        mean = -found.mean().detach()
        self.log("train_loss", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        if self.objective.threshold_db is not None:
            counted = (found <= self.objective.threshold_db).to(found)
            return -(found * counted).sum() / counted.sum().clamp(min=1)
        return -found.mean()

    def validation_step(self, batch: MixtureBatch) -> None:
        """Separate and measure a batch."""
        found, estimates = self._si_sdr(batch)
        self._losses.append(-found.detach())
        self._measure(batch, estimates)

    def on_validation_epoch_end(self) -> None:
        """Log how much better the voices are than the mixture."""
        losses, self._losses = of_all(self.trainer, self._losses), []
        self.log("val_loss", torch.cat(losses).mean(), prog_bar=True)
        self.log("val_si_sdri", self._gathered().improvements.mean(), prog_bar=True)

    def test_step(self, batch: MixtureBatch) -> None:
        """Separate and measure a batch."""
        self._measure(batch, self._si_sdr(batch)[1])

    def on_test_epoch_end(self) -> None:
        """Log the figures of all mixtures."""
        self._tested = found = self._gathered()
        scores = [row.score for row in found.rows]
        figures = {
            "si_sdri": found.improvements.mean(),
            "si_sdri_median": found.improvements.quantile(0.5),
            "si_sdr": torch.tensor([each.si_sdr for each in scores]).mean(),
            "mixture_si_sdr": torch.tensor([each.mixture_si_sdr for each in scores]).mean(),
            "mixtures": torch.tensor(float(len(scores))),
        }
        self.log_dict({f"test_{key}": value.float() for key, value in figures.items()})

    def report(self, folder: Path) -> list[str]:
        """Write the last test's figures by mixture and its picture into a folder.

        Returns:
            Lines to print.
        """
        assert self._tested is not None
        return self._tested.write(folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a schedule by step, if the rate is not halved by the figure.

        Raises:
            UsageError: The run has no end that the schedule needs.
        """
        batches = len(self._data.train_dataloader())
        return optimization.configure(
            self.model, self.optimizer, Plateau(self.objective.halve_after), self.trainer, batches
        )

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights and halve the rate, if that is wanted."""
        return optimization.make_callbacks(
            self.optimizer, Plateau(self.objective.halve_after), self.trainer, self.monitor
        )

    def _si_sdr(self, batch: MixtureBatch) -> tuple[Tensor, Tensor]:
        """Return the SI-SDR of each mixture's best order, and the estimates."""
        lengths: Tensor | None = batch["lengths"]
        if batch["mixture"].shape[1] == int(batch["lengths"].min()):
            lengths = None  # nothing was filled up
        estimates = self.model(batch["mixture"], lengths).float()
        with torch.autocast(self.device.type, enabled=False):  # ratios of sums, which bfloat16 rounds away
            found = pairwise_si_sdr(estimates, batch["sources"], lengths)
        return best_order(found)[0], estimates

    def _measure(self, batch: MixtureBatch, estimates: Tensor) -> None:
        """Keep the figures of each mixture, at its own length."""
        for row, (index, id, length) in enumerate(
            zip(batch["index"].tolist(), batch["ids"], batch["lengths"].tolist(), strict=True)
        ):
            own = (
                estimates[row, :, :length],
                batch["sources"][row, :, :length],
                batch["mixture"][row, :length],
            )
            seconds = length / self._data.sample_rate
            self._found.append(Measured(index, id, seconds, score(*own)))

    def _gathered(self) -> Tested:
        """Return the figures since the last call, of every mixture once."""
        found, self._found = of_all(self.trainer, self._found), []
        return Tested(sorted(found, key=lambda each: each.index))

    @property
    def _data(self) -> SeparationData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

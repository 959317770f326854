"""Training and testing an image classifier: one label an image, or several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchvision.transforms import v2

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.core.training import make_averaging, of_all, run_steps
from manyheads.vision import metrics, optimization
from manyheads.vision.calibration import fit_temperature
from manyheads.vision.losses import Criterion, Loss, smoothed
from manyheads.vision.optimization import Optimizer, Schedule
from manyheads.vision.report import Tested
from manyheads.vision.transfer import Transfer, classifier_of, freeze, load

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.vision.data import ImageBatch, ImageData

Plain = bool | int | float | list[int] | list[float] | str | None


@dataclass(frozen=True)
class Regularize:
    """What keeps a model from learning its images by heart.

    Args:
        label_smoothing: How far targets move towards the uniform ones.
        mixup: Both parameters of the beta distribution that two images are mixed by; 0 for none.
        cutmix: The same for a rectangle of the other image; with both, each batch takes one at random.
        mix_probability: Share of the batches that are mixed.
        drop_path: Rate of dropped residual branches in the last block; it rises from 0 along the depth.
        drop_rate: Rate of dropout before the classifier.
        ema_decay: Decay of the averaged weights, which are the ones validated and saved; 0 for none.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    drop_path: float = 0.0
    drop_rate: float = 0.0
    ema_decay: float = 0.0


class ImageClassifier(LightningModule):
    """Train a catalogue model to classify images, and measure it over whole splits.

    Logs `train_loss`, `val_loss` (without mixing and smoothing), and of one label an image `val_top1` and,
    from six classes on, `val_top5`; of several labels `val_map` and `val_auroc`, the means over the labels
    that have both answers. The best epoch is that of the highest `val_top1` or `val_map`. A test logs the
    same and `test_f1` (mean over the classes), `test_ece` and `test_ece_scaled` (calibration error before and
    after temperature scaling, in 15 bins), `test_temperature`, fitted on the validation images, and
    `test_images`.

    Args:
        classes: How many classes or labels there are; the data say it.
        channels: Channels of an image; the data say it.
        size: Height and width of an image; the data say it.
        multi_label: Whether an image can have several labels; the data say it.
        class_counts: Train images of each class, or with each label; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        transfer: What the training begins with.
        optimizer: AdamW and its groups of parameters.
        schedule: The learning rate by step.
        regularize: What keeps the model from learning its images by heart.
        loss: What is minimised.

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.classes", "model.classes", "instantiate"),
        ("data.channels", "model.channels", "instantiate"),
        ("data.size", "model.size", "instantiate"),
        ("data.multi_label", "model.multi_label", "instantiate"),
        ("data.class_counts", "model.class_counts", "instantiate"),
    )

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        size: int = 224,
        multi_label: bool = False,
        class_counts: list[int] | None = None,
        name: str = "vit_tiny_patch16_224",
        arguments: dict[str, Plain] | None = None,
        transfer: Transfer = Transfer(),  # noqa: B008  # frozen, as those below
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        regularize: Regularize = Regularize(),
        loss: Loss = Loss(),  # noqa: B008
    ) -> None:
        super().__init__()
        _check(regularize)
        optimization.check(optimizer, schedule)
        groups = (transfer, optimizer, schedule, regularize, loss)
        self.save_hyperparameters({"name": name} | {type(g).__name__.lower(): asdict(g) for g in groups})
        self.name = name
        self.builder_arguments = _recipe(arguments or {}, classes, channels, size, regularize)
        self.model = create_model(name, **self.builder_arguments)
        self.classes, self.multi_label = classes, multi_label
        self.transfer, self.optimizer, self.schedule, self.regularize = (
            transfer,
            optimizer,
            schedule,
            regularize,
        )
        if transfer.weights is not None:
            anew = load(self.model, name, transfer.weights)
            if anew:
                print(f"{name}: weights of {transfer.weights}, but {', '.join(anew)} begin anew")
        freeze(self.model, transfer.freeze)
        self.loss, self.class_counts = loss, class_counts
        known = class_counts  # of several labels setup asks the data
        self.criterion = Criterion(loss, classes, multi_label, class_counts, known)
        self._mixes = _mixes(regularize, classes)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._tested: Tested | None = None
        self.train()

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return ("val_map" if self.multi_label else "val_top1"), "max"

    def setup(self, stage: str) -> None:
        """Weigh positives by the negatives among the train images whose labels are known."""
        if self.multi_label and self.loss.pos_weight == "balanced":
            known = self._data.known_counts
            self.criterion = Criterion(self.loss, self.classes, True, self.class_counts, known)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a probed backbone stays in that of its use."""
        super().train(mode)
        if mode and self.transfer.freeze == "probe":
            self.model.eval()
            classifier_of(self.model).train()
        return self

    def forward(self, batch: ImageBatch) -> Tensor:
        """Return a batch's logits.

        Shape:
            `[B, classes]`.
        """
        return self.model(batch["image"])

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Return the loss of a batch, mixed and smoothed.

        Several labels: what is mixed of an unknown label is unknown.
        """
        image, target = batch["image"], batch["target"]
        if self._mixes or self.regularize.label_smoothing:
            target = smoothed(target, self.classes, self.regularize.label_smoothing)
        if self._mixes and torch.rand(()) < self.regularize.mix_probability:
            mix = self._mixes[int(torch.randint(len(self._mixes), ()))]
            image, target = mix(image, target)
        loss = self.criterion(self.model(image), target)
        size = len(image)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size
        )
        return loss

    def validation_step(self, batch: ImageBatch) -> None:
        """Keep a batch's logits."""
        self._seen.append((self(batch).float(), batch["target"]))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all images."""
        logits, target = self._gathered()
        self.log("val_loss", self.criterion(logits, target), prog_bar=True)
        self.log_dict({f"val_{key}": value for key, value in metrics.figures(logits, target).items()})

    def test_step(self, batch: ImageBatch) -> None:
        """Keep a batch's logits."""
        self._seen.append((self(batch).float(), batch["target"]))

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images, and how many these are."""
        logits, target = self._gathered()
        labels, temperature = self._data.labels, self._fitted_temperature()
        self._tested = Tested(logits.cpu(), target.cpu(), temperature, tuple(labels))
        found = {
            "loss": self.criterion(logits, target),
            **metrics.figures(logits, target),
            "f1": torch.tensor(self._tested.table["f1"].mean()),
            "ece": metrics.calibration_error(logits, target),
            "ece_scaled": metrics.calibration_error(logits, target, temperature),
            "temperature": torch.tensor(temperature),
            "images": torch.tensor(float(len(target))),
        }
        self.log_dict({f"test_{key}": value.float() for key, value in found.items()})

    def report(self, folder: Path) -> list[str]:
        """Write the last test's report by class, its confusion matrix and its pictures into a folder.

        Returns:
            Lines to print.
        """
        assert self._tested is not None
        return self._tested.write(folder)

    def calibration(self) -> dict[str, float]:
        """Return the temperature, fitted on the validation images, for the model folder."""
        return {"temperature": self._fitted_temperature()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a schedule by step.

        Raises:
            UsageError: The run has no end, or nothing is left to train.
        """
        optimizer = optimization.make_optimizer(self.model, self.optimizer)
        steps = run_steps(self.trainer, len(self._data.train_dataloader()))
        schedule = optimization.make_schedule(optimizer, self.schedule, *steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights, if that is wanted."""
        decay = self.regularize.ema_decay
        return [make_averaging(decay, self.trainer.strategy.root_device)] if decay else []

    @property
    def _data(self) -> ImageData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _fitted_temperature(self) -> float:
        """Fit the temperature on the validation images, as many as the trainer validates."""
        loader, seen, training = self._data.val_dataloader(alone=True), [], self.training
        limit = self.trainer.limit_val_batches
        count = limit if isinstance(limit, int) else math.ceil(limit * len(loader))
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in islice(loader, count):
                moved = self.transfer_batch_to_device(batch, self.device, 0)
                seen.append((self(moved).float().cpu(), batch["target"]))
        self.train(training)
        if not seen:
            raise UsageError(
                "no validation images to fit the temperature on: raise trainer.limit_val_batches"
            )
        logits, target = (torch.cat(each) for each in zip(*seen, strict=True))
        return fit_temperature(logits, target)

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Return all logits and targets since the last call, of all processes."""
        seen, self._seen = of_all(self.trainer, self._seen), []
        logits, target = (torch.cat(each).to(self.device) for each in zip(*seen, strict=True))
        return logits, target


def _check(regularize: Regularize) -> None:
    """Refuse numbers that cannot be meant."""
    for name, value in asdict(regularize).items():
        high = math.inf if name in ("mixup", "cutmix") else 1.0
        if not (0 <= value < high or (name == "mix_probability" and value == 1)):
            wanted = "0 or more" if high == math.inf else "from 0 to below 1"
            raise UsageError(f"regularize.{name} must be {wanted}, not {value:g}")


def _recipe(
    arguments: dict[str, Plain], classes: int, channels: int, size: int, regularize: Regularize
) -> dict[str, Json]:
    """Return everything that the catalogue's builder gets.

    Raises:
        UsageError: `arguments` decide what is decided elsewhere.
    """
    decided: dict[str, Json] = {"num_classes": classes, "in_chans": channels, "img_size": size}
    rates = {"drop_path_rate": regularize.drop_path, "drop_rate": regularize.drop_rate}
    for key, place in (
        *((key, "the data") for key in decided),
        ("drop_path_rate", "regularize.drop_path"),
        ("drop_rate", "regularize.drop_rate"),
    ):
        if key in arguments:
            raise UsageError(f"model.arguments.{key} is decided by {place}")
    found: dict[str, Json] = {**decided, **{key: rate for key, rate in rates.items() if rate}}
    for key, value in arguments.items():
        found[key] = list(value) if isinstance(value, list) else value
    return found


def _mixes(
    regularize: Regularize, classes: int
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...]:
    """Return the ways in which batches are mixed; they draw from torch's random numbers."""
    kinds = ((v2.MixUp, regularize.mixup), (v2.CutMix, regularize.cutmix))
    return tuple(kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha)

"""What tasks and data modules offer to training; what only some offer is a protocol of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import nn

from manyheads.core import hub


class Trained(Protocol):
    """What a task's LightningModule offers beside training: its plain module, and how that is built.

    `LINKS` names options that the data module decides for the task, as (source, target, when): when is
    "parse", or "instantiate" for what is known only of the data module itself.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]]
    model: nn.Module
    name: str

    @property
    def builder_arguments(self) -> Mapping[str, hub.Json]:
        """Everything that the catalogue needs to build the module again."""


@runtime_checkable
class Calibrated(Protocol):
    """A task that takes more than weights from the validation rows."""

    def calibration(self) -> Mapping[str, object]:
        """What the model folder's predictor needs of that; plain JSON."""


@runtime_checkable
class Monitored(Protocol):
    """A task whose best epoch is not that of the lowest `val_loss`."""

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The logged figure that says it, and which of its values is best."""


@runtime_checkable
class Reported(Protocol):
    """A task that leaves more of a test than its figures."""

    def report(self, folder: Path) -> list[str]:
        """Write files of the last test into a folder, and return lines to print."""


class Data(Protocol):
    """What a task's LightningDataModule offers: its file, and what prediction must repeat of it."""

    @property
    def path(self) -> Path:
        """The file that the data come from."""

    def preprocessing(self) -> Mapping[str, object]:
        """What the model folder's predictor needs; plain JSON."""


@runtime_checkable
class Labelled(Protocol):
    """A data module of classes."""

    @property
    def labels(self) -> Sequence[str]:
        """Their names, in the order of the model's outputs."""

"""A training that begins with a trained model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.hub import ModelConfig
from manyheads.core.weights import misfits


def find(name: str, folder: str) -> tuple[nn.Module, ModelConfig]:
    """Return the trained model of a folder, and what stands beside its weights.

    Raises:
        UsageError: It is another model.
        ManyheadsError: There is no such folder.
    """
    found, config = hub.load_model(hub.find_folder(Path(folder)))
    if config.name != name:
        raise UsageError(f"start: {folder} is of {config.name}, not of {name}")
    return found, config


def load(model: nn.Module, state: Mapping[str, Tensor], folder: str) -> None:
    """Load a folder's weights, all of them.

    Raises:
        UsageError: They do not fit.
    """
    if faults := misfits(model.state_dict(), state):
        raise UsageError(f"start: the weights of {folder} do not fit: {faults}")
    model.load_state_dict(state)


def load_weights(model: nn.Module, name: str, folder: str) -> None:
    """Load the weights of the same model's folder; errors as `find` and `load`."""
    load(model, find(name, folder)[0].state_dict(), folder)

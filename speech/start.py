"""A training that begins with a trained model's weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.weights import misfits


def load_weights(model: nn.Module, name: str, folder: str) -> None:
    """Load a model folder's weights, all of them.

    Raises:
        UsageError: They are another model's.
        ManyheadsError: There is no such folder.
    """
    found, config = hub.load_model(hub.find_folder(Path(folder)))
    if config.name != name:
        raise UsageError(f"start: {folder} is of {config.name}, not of {name}")
    state = found.state_dict()
    if faults := misfits(model.state_dict(), state):
        raise UsageError(f"start: the weights of {folder} do not fit: {faults}")
    model.load_state_dict(state)

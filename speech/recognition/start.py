"""A training that begins with a trained model: its weights, its units, its mean and deviation."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.weights import misfits
from manyheads.speech.recognition.preprocessing import Features, Preprocessing


def read_preprocessing(folder: str, sample_rate: int, features: Features) -> Preprocessing:
    """Read a model folder's units and normalisation.

    Args:
        sample_rate, features: What the data have; those of the folder must be the same.

    Raises:
        UsageError: They are not.
        ManyheadsError: There is no such folder, or it is no recogniser's.
    """
    config = hub.read_config(hub.find_folder(folder))
    found = Preprocessing.from_json(config.preprocessing)
    for name, ours, theirs in (
        ("sample_rate", sample_rate, found.sample_rate),
        ("features", features, found.features),
    ):
        if ours != theirs:
            raise UsageError(f"start: {folder} has {name} {theirs}, and the data {ours}: set data.{name}")
    return found


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

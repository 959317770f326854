"""A training that begins with a trained model: its units, its mean and deviation."""

from __future__ import annotations

from manyheads.core import hub
from manyheads.core.errors import UsageError
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

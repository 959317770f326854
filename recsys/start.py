"""A training that begins with a trained model's weights, over a catalogue that may have grown."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core import start
from manyheads.core.errors import UsageError
from manyheads.recsys.models.encoder import FIRST

TABLE, BIAS = "encoder.item_embedding.weight", "output_bias"
TEXT_TABLE, WORDS = "item_embedding.weight", "lm_head."  # of a model of texts


def load_weights(model: nn.Module, name: str, folder: str, num_items: int) -> int:
    """Load a model folder's weights; items that it has not got keep what the model was built with.

    Returns:
        How many items are new.

    Raises:
        UsageError: They are another model's.
        ManyheadsError: There is no such folder.
    """
    found, config = start.find(name, folder)
    old = int(str(config.arguments["num_items"]))
    if old > num_items:
        raise UsageError(f"start: {folder} has {old} items, and the model has {num_items}")
    fresh, state = model.state_dict(), dict(found.state_dict())
    for key in (TABLE, BIAS):
        if key in state:
            state[key] = _grown(state[key], fresh[key], FIRST + old)
    start.load(model, state, folder)
    return num_items - old


def load_text_weights(model: nn.Module, name: str, folder: str) -> None:
    """Load a model folder's weights into a model of texts.

    Its table of items, which is encoded anew, stays as the model was built; so does a head of words, where
    one of the two has none.

    Raises:
        UsageError: They are another model's.
        ManyheadsError: There is no such folder.
    """
    found, _ = start.find(name, folder)
    fresh, stored = model.state_dict(), found.state_dict()
    kept = {key: value for key, value in stored.items() if key != TEXT_TABLE}
    if any(key.startswith(WORDS) for key in fresh) != any(key.startswith(WORDS) for key in kept):
        kept = {key: value for key, value in kept.items() if not key.startswith(WORDS)}
    behind = {key: value for key, value in fresh.items() if key == TEXT_TABLE or key.startswith(WORDS)}
    start.load(model, behind | kept, folder)


@torch.no_grad()
def _grown(stored: Tensor, fresh: Tensor, known: int) -> Tensor:
    """Return a table with the stored rows: pad and items at its begin, what stands behind them at its end."""
    found = fresh.clone()
    found[:known] = stored[:known]
    if behind := len(stored) - known:
        found[-behind:] = stored[known:]
    return found

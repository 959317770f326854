"""Published Recformers, made our model folders.

The vocabulary is not in the weights, so the folder's preprocessing stays empty: `predict` refuses it, and the
model is used in Python.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from manyheads.core import hub
from manyheads.core.errors import DataError
from manyheads.recsys.models.recformer_checkpoints import read_recformer

_BASE = {"hidden_size": 768, "layers": 12, "heads": 12, "inner_size": 3072, "positions": 4098}
_BASE |= {"max_items": 50, "window": 64}


def convert(
    published: str | Path, folder: str | Path, *, longformer: str = "", heads: int = 0, window: int = 64
) -> hub.ModelConfig:
    """Write a model folder from a published file.

    Args:
        published: As `read_recformer` takes it.
        folder: The model folder to write.
        longformer: The file of the words' table, where the training's file lacks it.
        heads: Heads of attention; 0 is one for each 64 channels.
        window: Longformer's attention_window; no weight tells.

    Raises:
        DataError: A file cannot be read, or its weights are not a Recformer's.
    """
    published = Path(published)
    if published.is_dir():
        raise DataError(f"{published} is a folder: Recformer is published in one file")
    model = read_recformer(published, Path(longformer) if longformer else None, heads or None, window)
    state = model.state_dict()
    items = state.get("item_embedding.weight")
    arguments = {
        **asdict(model.longformer.sizes),
        "num_items": 0 if items is None else len(items),
        "language_head": "lm_head.bias" in state,
    }
    name = "recformer"
    if all(arguments[key] == value for key, value in _BASE.items()):
        name = "recformer_base"
        arguments = {key: arguments[key] for key in ("vocab_size", "num_items", "language_head", "dropout")}
    return hub.save(
        folder,
        model,
        domain="recsys",
        name=name,
        arguments=arguments,
        preprocessing={},
        training={"converted_from": published.name, "dialect": "recformer"},
    )

"""Every row of the table builds a model, without memory too, from arguments that a folder can keep."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.core.catalog import arguments, builder
from manyheads.recsys.catalog import MODELS, TASKS

ARGUMENTS = {
    "bert4rec": {"num_items": 1682},
    "sasrec": {"num_items": 1682},
    "recformer": {"vocab_size": 8192, "num_items": 1682},
    "recformer_base": {"num_items": 5},
    "cross_attention_fusion": {"vocab_size": 8192, "classes": 3, "numeric": 1, "categories": [2, 21]},
}
SIZES = {"bert4rec": 226_643, "sasrec": 220_608, "recformer_base": 148_110_336 + 5 * 768}


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_a_row_is_a_model(entry):
    build, kept = builder(entry), ARGUMENTS[entry.name]
    assert all(key in arguments(entry) for key in kept)
    assert entry.task in {task.name for task in TASKS}
    with torch.device("meta"):
        model = build(**json.loads(json.dumps(kept)))
    if entry.name in SIZES:
        assert sum(p.numel() for p in model.parameters()) == SIZES[entry.name]
    if entry.name == "recformer_base":
        return  # 600 MB
    whole = build(**kept)
    assert whole.state_dict().keys() == model.state_dict().keys()
    assert all(value.isfinite().all() for value in whole.state_dict().values())


def test_names_are_one_each():
    assert len({entry.name for entry in MODELS}) == len(MODELS) == len(ARGUMENTS)

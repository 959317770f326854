"""Every row of the table builds a model, without memory too, from arguments that a folder can keep."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.core.catalog import builder
from manyheads.recsys.catalog import MODELS, TASKS
from manyheads.recsys.models.cross_attention import cross_attention_fusion
from manyheads.recsys.models.recformer import recformer, recformer_base

ARGUMENTS = {
    "bert4rec": {"num_items": 1682},
    "sasrec": {"num_items": 1682},
    "recformer": {"vocab_size": 8192, "num_items": 1682},
    "recformer_base": {"num_items": 5},
    "cross_attention_fusion": {"vocab_size": 8192, "classes": 3, "numeric": 1, "categories": [2, 21]},
}
SIZES = {"bert4rec": 226_643, "sasrec": 220_608, "recformer_base": 148_110_336 + 5 * 768}


BUILDERS = {entry.name: builder(entry) for entry in MODELS}
TEXTS = {build.__name__: build for build in (recformer, recformer_base, cross_attention_fusion)}


@pytest.mark.parametrize(("name", "build"), (BUILDERS | TEXTS).items(), ids=(BUILDERS | TEXTS).keys())
def test_a_builder_makes_a_model(name, build):
    kept = ARGUMENTS[name]
    with torch.device("meta"):
        model = build(**json.loads(json.dumps(kept)))
    if name in SIZES:
        assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    if name == "recformer_base":
        return  # 600 MB
    whole = build(**kept)
    assert whole.state_dict().keys() == model.state_dict().keys()
    assert all(value.isfinite().all() for value in whole.state_dict().values())


def test_rows_have_a_task_and_a_name_each():
    assert {entry.task for entry in MODELS} == {task.name for task in TASKS}
    assert len({entry.name for entry in MODELS}) == len(MODELS)

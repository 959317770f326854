"""BERT4Rec and SASRec against tensors recorded from RecBole, weights copied."""

from __future__ import annotations

import pytest
import torch

from manyheads.recsys.losses import bpr, cross_entropy
from manyheads.recsys.models.bert4rec import bert4rec
from manyheads.recsys.models.encoder import FIRST, Items, Packed, from_recbole, pack
from manyheads.recsys.models.sasrec import sasrec

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def build(make, case):
    config = case.about["config"]
    model = make(
        num_items=config["n_items"] - 1,
        max_len=config["MAX_ITEM_LIST_LENGTH"],
        hidden_size=config["hidden_size"],
        layers=config["n_layers"],
        heads=config["n_heads"],
        inner_size=config["inner_size"],
        hidden_dropout=0.0,
        attn_dropout=0.0,
    )
    assert sum(p.numel() for p in model.parameters()) == case.about["param_count"]
    return case.load(model, from_recbole)


def every(model) -> Items:
    """The table with the pad, which RecBole scores too."""
    weight = model.encoder.item_embedding.weight[: model.num_items + FIRST]
    return Items(weight, getattr(model, "output_bias", None))


def scores(states, items: Items):
    found = states @ items.weight.T
    return found if items.bias is None else found + items.bias


@DTYPES
def test_bert4rec_scores(recorded, dtype):
    case = recorded("bert4rec_scores", dtype)
    model, given = build(bert4rec, case), case.group("input.")
    hidden = model(given["item_seq"])
    # RecBole drops the oldest item even when there is room
    length, history = given["item_length"], given["item_seq"]
    shifted = torch.cat([history[:, 1:], history.new_zeros(len(history), 1)], 1)
    test_seq = shifted.scatter(1, length[:, None] - 1, model.mask_token)
    at = torch.arange(len(length)) * shifted.shape[1] + length - 1
    full_sort = scores(model(test_seq, at), every(model))
    found = {"hidden": hidden, "test_seq": test_seq, "full_sort": full_sort}
    found["predict"] = full_sort.gather(1, given["item_id"][:, None])[:, 0]
    case.check(found, model, from_recbole)


@PACKED
@DTYPES
@pytest.mark.parametrize("loss", ["ce", "bpr"])
def test_bert4rec_loss(recorded, loss, dtype, packed):
    case = recorded(f"bert4rec_loss_{loss}", dtype)
    model, given = build(bert4rec, case), case.group("input.")
    rows, index = given["masked_item_seq"], given["masked_index"]
    counted = index > 0
    at = (torch.arange(len(rows))[:, None] * rows.shape[1] + index)[counted]
    batch = rows
    if packed:
        batch, at = pack(rows), (rows.flatten() != 0).cumsum(0)[at] - 1
    states, targets = model(batch, at), given["pos_items"][counted]
    if loss == "ce":
        found = cross_entropy(states, targets, every(model), cells=200)  # several blocks
    else:
        found = bpr(states, targets, every(model), given["neg_items"][counted])
    case.check({"loss": found}, model, from_recbole)


@PACKED
@DTYPES
@pytest.mark.parametrize("loss", ["ce", "bpr"])
def test_sasrec(recorded, loss, dtype, packed):
    case = recorded(f"sasrec_{loss}", dtype)
    model, given = build(sasrec, case), case.group("input.")
    rows, length = given["item_seq"], given["item_length"]
    if packed:
        user = model.queries(pack(rows))
    else:
        user = model(rows, torch.arange(len(rows)) * rows.shape[1] + length - 1)
    items, wanted = every(model), given["item_id"]
    full_sort = scores(user, items)
    found = {"user": user, "full_sort": full_sort, "predict": full_sort.gather(1, wanted[:, None])[:, 0]}
    if loss == "ce":
        found["loss"] = cross_entropy(user, wanted, items)
    else:
        found["loss"] = bpr(user, wanted, items, given["neg_item_id"])
    case.check(found, model, from_recbole)


def test_queries_are_the_scores_of_recbole(recorded):
    """Ours drops the oldest item only where there is no room: the one full history is RecBole's."""
    case = recorded("bert4rec_scores", torch.float32)
    model, given = build(bert4rec, case), case.group("input.")
    full = int((given["item_length"] == 20).nonzero())
    history = Packed(given["item_seq"][full], torch.tensor([0, 20], dtype=torch.int32))
    found = scores(model.queries(history), model.items())
    wanted = case.group("output.")["full_sort"][full : full + 1, FIRST:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_parameter_count_of_recbole():
    """MovieLens-100k at a length of 200: RecBole 1.2.1 counts 226,643."""
    assert sum(p.numel() for p in bert4rec(1682, max_len=200).parameters()) == 226_643

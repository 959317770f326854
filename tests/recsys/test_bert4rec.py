"""BERT4Rec and SASRec: pads, packed batches, positions, published variables, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.losses import cross_entropy
from manyheads.recsys.masking import mask_items, next_items
from manyheads.recsys.models.bert4rec import bert4rec, from_tensorflow
from manyheads.recsys.models.encoder import Packed, by_length, pack
from manyheads.recsys.models.sasrec import sasrec

LENGTHS = [20, 1, 7, 13]
MODELS = pytest.mark.parametrize("make", [bert4rec, sasrec])
COUNTED = pytest.mark.parametrize("count_from", ["start", "end"])


def histories(side: str = "right") -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    found = []
    for length in LENGTHS:
        row, pads = torch.randint(1, 51, (length,), generator=draw), 20 - length
        found.append(F.pad(row, (0, pads) if side == "right" else (pads, 0)))
    return torch.stack(found)


def small(make, **options):
    model = make(50, max_len=24, hidden_size=32, **options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@MODELS
@COUNTED
def test_a_batch_is_its_histories(make, count_from):
    """Pads on either side, none at all, or a history alone: the same states."""
    model = small(make, count_from=count_from)
    right, left = histories(), histories("left")
    packed = pack(right)
    assert torch.equal(packed.tokens, pack(left).tokens)
    assert packed.starts.tolist() == [0, 20, 21, 28, 41]
    alone = torch.cat([model(row[None, row != 0])[0] for row in right])
    for found in (model(right)[right != 0], model(left)[left != 0], model(packed)):
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)
    wider = F.pad(right, (0, 4))
    torch.testing.assert_close(model(wider)[wider != 0], alone, atol=2e-5, rtol=1e-5)
    one_by_one = torch.cat([model.queries(pack(row[None])) for row in right])
    torch.testing.assert_close(model.queries(packed), one_by_one, atol=2e-5, rtol=1e-5)


@MODELS
def test_the_newest_item_keeps_its_position(make):
    table = small(make, count_from="end").encoder
    found = []
    table.position_embedding.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    packed = pack(histories())
    table(packed)
    table(histories("left"))
    table(histories())
    assert found[0][packed.starts[1:].long() - 1].tolist() == [23] * 4
    assert found[0][:20].tolist() == list(range(4, 24))
    assert torch.equal(found[1][histories("left") != 0], found[0])
    assert torch.equal(found[2][histories() != 0], found[0])


def test_sasrec_sees_no_later_item():
    model, rows = small(sasrec), histories()
    changed = rows.clone()
    changed[0, 10:] = 3
    same = (model(rows) - model(changed))[0].abs().amax(1) == 0
    assert same.tolist() == [True] * 10 + [False] * 10


def test_bert4rec_sees_all():
    model, rows = small(bert4rec), histories()
    changed = rows.clone()
    changed[0, 10] = 3
    assert ((model(rows) - model(changed))[0].abs().amax(1) > 0).all()


@MODELS
def test_dropped_weights_of_packed_histories(make):
    """Attention that drops weights packs and pads by itself: with a chance of next to nothing, as without."""
    rows = histories()
    packed = pack(
        torch.cat([rows, rows.flip(0), F.pad(rows[:, :11], (0, 9))])
    )  # twelve: several are padded together
    torch.manual_seed(0)
    dropping = small(make, attn_dropout=1e-12, hidden_dropout=0.0)
    torch.manual_seed(0)
    other = small(make, attn_dropout=0.9, hidden_dropout=0.0)
    other.load_state_dict(dropping.state_dict())
    wanted = dropping(packed)
    torch.testing.assert_close(dropping.train()(packed), wanted, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(other.train()(packed), wanted, atol=1e-2)
    assert torch.isfinite(other(packed)).all()


def test_in_order_of_length():
    packed = pack(histories())
    found, order = by_length(packed)
    assert found.lengths.tolist() == [1, 7, 13, 20]
    assert torch.equal(found.tokens, packed.tokens[order])
    assert torch.equal(found.tokens[order.argsort()], packed.tokens)
    assert found.tokens[-20:].tolist() == packed.tokens[:20].tolist()


@MODELS
def test_a_long_history_is_cut_for_a_query_and_else_refused(make):
    model = small(make)
    tokens = torch.randint(1, 51, (40,))
    kept = 23 if make is bert4rec else 24
    found, wanted = (
        model.queries(Packed(part, torch.tensor([0, len(part)], dtype=torch.int32)))
        for part in (tokens, tokens[-kept:])
    )
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="a history of 40 tokens, and the model has 24 positions"):
        model(tokens[None])
    with pytest.raises(ValueError, match="a history of 40 tokens"):
        model(Packed(tokens, torch.tensor([0, 40], dtype=torch.int32)))


def test_a_user_without_history_is_asked_by_a_mask_alone():
    model = small(bert4rec)
    empty = Packed(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
    torch.testing.assert_close(model.queries(empty), model(torch.tensor([[model.mask_token]]))[0])
    with pytest.raises(ValueError, match="a history is empty"):
        small(sasrec).queries(Packed(torch.tensor([3]), torch.tensor([0, 1, 1], dtype=torch.int32)))


@MODELS
def test_learns_every_parameter(make):
    model = small(make).train()
    packed = pack(histories())
    asked = mask_items(packed, 51, 0.4, 20) if make is bert4rec else next_items(packed)
    cross_entropy(model(asked.batch, asked.at), asked.targets, model.items()).backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unreached


def as_tensorflow(model, mask_id: int, specials: torch.Tensor, types: torch.Tensor) -> dict:
    """The variables that the published code would hold: every name and shape of it."""
    state, items = model.state_dict(), model.num_items
    table = torch.cat([state["encoder.item_embedding.weight"][: items + 1], specials])
    table[mask_id] = state["encoder.item_embedding.weight"][-1]
    found = {
        "bert/embeddings/word_embeddings": table,
        "bert/embeddings/token_type_embeddings": types,
        "bert/embeddings/position_embeddings": state["encoder.position_embedding.weight"] - types[0],
        "cls/predictions/output_bias": torch.cat([state["output_bias"], torch.randn(3)]),
        "global_step": torch.tensor(400000),
        "bert/pooler/dense/kernel": torch.randn(32, 32),
    }
    layer = "encoder.trm_encoder.layer"
    for path, key in (
        ("bert/embeddings/LayerNorm", "encoder.LayerNorm"),
        ("cls/predictions/transform/dense", "output_ffn"),
        ("cls/predictions/transform/LayerNorm", "output_ln"),
        *(
            (f"bert/encoder/layer_{n}/{path}", f"{layer}.{n}.{key}")
            for n in (0, 1)
            for path, key in (
                ("attention/self/query", "multi_head_attention.query"),
                ("attention/self/key", "multi_head_attention.key"),
                ("attention/self/value", "multi_head_attention.value"),
                ("attention/output/dense", "multi_head_attention.dense"),
                ("attention/output/LayerNorm", "multi_head_attention.LayerNorm"),
                ("intermediate/dense", "feed_forward.dense_1"),
                ("output/dense", "feed_forward.dense_2"),
                ("output/LayerNorm", "feed_forward.LayerNorm"),
            )
        ),
    ):
        norm = path.endswith("LayerNorm")
        weight = state[f"{key}.weight"]
        found[f"{path}/{'gamma' if norm else 'kernel'}"] = weight if norm else weight.t()
        found[f"{path}/{'beta' if norm else 'bias'}"] = state[f"{key}.bias"]
        found[f"{path}/{'gamma' if norm else 'kernel'}/adam_m"] = weight
    return found


@pytest.mark.parametrize("mask_id", [51, 52, 53])
def test_published_variables(mask_id):
    model, back = small(bert4rec), small(bert4rec)
    variables = as_tensorflow(model, mask_id, torch.randn(3, 32), torch.randn(2, 32))
    back.load_state_dict(from_tensorflow(variables, mask_id), strict=True)
    rows = histories()
    torch.testing.assert_close(back(rows), model(rows), atol=1e-5, rtol=1e-5)
    for key, value in back.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], atol=1e-6, rtol=0)


def test_published_variables_that_are_not_a_models():
    model = small(bert4rec)
    variables = as_tensorflow(model, 51, torch.randn(3, 32), torch.randn(2, 32))
    with pytest.raises(DataError, match="mask_id 50 is not one of the last three of 54 rows"):
        from_tensorflow(variables, 50)
    with pytest.raises(DataError, match="unknown bert/other/kernel"):
        from_tensorflow({**variables, "bert/other/kernel": torch.zeros(1)}, 51)
    variables.pop("cls/predictions/output_bias")
    with pytest.raises(DataError, match="lack 'cls/predictions/output_bias'"):
        from_tensorflow(variables, 51)


@MODELS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, "num_items must be positive, not 0"),
        ({"hidden_size": 30, "heads": 4}, "hidden_size 30 is not a multiple of 4 heads"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and less than 1"),
        ({"inner_size": -1}, "inner_size must be positive, or 0"),
        ({"count_from": "middle"}, "count_from must be 'start' or 'end', not 'middle'"),
    ],
)
def test_what_does_not_fit_is_refused(make, options, message):
    with pytest.raises(UsageError, match=message):
        make(**{"num_items": 50, **options})

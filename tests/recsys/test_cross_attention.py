"""Texts and customers' variables."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.errors import UsageError
from manyheads.recsys.models.cross_attention import cross_attention_fusion
from manyheads.recsys.models.recformer import recformer
from manyheads.recsys.texts import TextBatch

NAN = float("nan")


def small(**options):
    known = {"classes": 3, "numeric": 2, "categories": [4, 7], "hidden_size": 64, "layers": 2}
    model = cross_attention_fusion(300, **known | options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def texts(*lengths: int) -> TextBatch:
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    draw = torch.Generator().manual_seed(4)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, 300, (length,), generator=draw)
    ids[:, 0] = 0
    return TextBatch(ids, (ids != 0).long(), (ids != 0).long())


NUMBERS = torch.tensor([[0.5, -1.0], [NAN, 2.0], [0.0, NAN]])
KINDS = torch.tensor([[3, 6], [0, -1], [-1, 0]])


def test_a_batch_is_its_customers():
    model, batch = small(), texts(90, 12, 45)
    found = model(batch, NUMBERS, KINDS)
    assert found.shape == (3, 3)
    for row, length in enumerate((90, 12, 45)):
        alone = TextBatch(*(x[row : row + 1, :length] for x in batch))
        one = model(alone, NUMBERS[row : row + 1], KINDS[row : row + 1])
        torch.testing.assert_close(found[row], one[0], atol=2e-5, rtol=1e-5)


def test_every_variable_has_a_say_and_what_is_not_known_another_than_zero():
    model, batch = small(), texts(20)
    plain = model(batch, NUMBERS[:1], KINDS[:1])
    for column in range(2):
        for other in (1.25, NAN):
            numbers = NUMBERS[:1].clone()
            numbers[0, column] = other
            assert not torch.allclose(model(batch, numbers, KINDS[:1]), plain, atol=1e-4)
        for kind in (1, -1):
            kinds = KINDS[:1].clone()
            kinds[0, column] = kind
            assert not torch.allclose(model(batch, NUMBERS[:1], kinds), plain, atol=1e-4)
    zero, unknown = (model(batch, torch.tensor([[x, 1.0]]), KINDS[:1]) for x in (0.0, NAN))
    assert not torch.allclose(zero, unknown, atol=1e-4)


def test_tokens_are_formulas():
    """A number scales its vector, a category is its row; both know their column."""
    layer = small().variables
    found = layer(NUMBERS, KINDS)
    assert torch.equal(found[0, 1], -1.0 * layer.scale[1] + layer.column[1])
    assert torch.equal(found[0, 3], layer.table[4 + 6] + layer.column[3])
    assert torch.equal(found[1, 0], layer.missing[0])
    assert torch.equal(found[2, 2], layer.missing[2])


def test_learns_every_parameter():
    model = small().train()
    loss = torch.nn.functional.cross_entropy(
        model(texts(90, 12, 45), NUMBERS, KINDS), torch.tensor([0, 1, 2])
    )
    loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unreached


def test_begins_with_the_encoder_of_a_recformer():
    model = small()
    trained = recformer(300, hidden_size=64, layers=2, positions=514)
    model.longformer.load_state_dict(trained.longformer.state_dict(), strict=True)
    states = model.longformer(texts(30))
    torch.testing.assert_close(states.pooled, trained.eval()(texts(30)))


def test_variables_of_one_kind_alone():
    none = torch.zeros(1, 0)
    assert small(numeric=0)(texts(9), none, KINDS[:1]).isfinite().all()
    assert small(categories=None)(texts(9), NUMBERS[:1], none.long()).isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="it needs variables"):
        small(numeric=0, categories=None)
    with pytest.raises(UsageError, match="classes must be positive"):
        small(classes=0)
    model = small()
    with pytest.raises(ValueError, match="must be 2 numbers and 2 categories"):
        model(texts(9), NUMBERS[:1, :1], KINDS[:1])
    with pytest.raises(IndexError, match="category 7 of variable 1, which has 7"):
        model(texts(9), NUMBERS[:1], torch.tensor([[3, 7]]))

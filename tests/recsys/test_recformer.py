"""Recformer: live beside transformers' Longformer, one text at a time, published files, what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.models.encoder import Packed, starts_of
from manyheads.recsys.models.recformer import pretraining, recformer, recformer_base
from manyheads.recsys.models.recformer_checkpoints import from_longformer, from_recformer, read_recformer
from manyheads.recsys.texts import ItemTexts, TextBatch, text_batch
from manyheads.recsys.word_masking import MaskedText

HISTORIES = [5, 1, 0, 12]


def texts(count: int = 18) -> ItemTexts:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(5, 40, (count,), generator=draw)
    ids = torch.randint(5, 300, (int(lengths.sum()),), generator=draw)
    types = torch.randint(1, 3, ids.shape, generator=draw)
    return ItemTexts(ids.int(), types.to(torch.int8), starts_of(lengths).long())


def batch() -> TextBatch:
    numbers = torch.arange(1, sum(HISTORIES) + 1)
    return text_batch(texts(), Packed(numbers, starts_of(torch.tensor(HISTORIES))), 10, 200)


def small(**options):
    known = {"vocab_size": 300, "hidden_size": 64, "layers": 2, "positions": 202, "max_items": 10}
    return recformer(**known | options).eval()


@pytest.fixture(scope="module")
def longformer():
    """transformers' own, with random weights and the published window."""
    from transformers import LongformerConfig, LongformerModel

    torch.manual_seed(0)
    config = LongformerConfig(
        attention_window=64,
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=522,
        type_vocab_size=1,
        pad_token_id=1,
        layer_norm_eps=1e-5,
    )
    model = LongformerModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("lengths", [(500, 333, 64, 7), (97, 12), (1,)])
def test_beside_transformers(longformer, lengths):
    ids = torch.full((len(lengths), max(lengths)), 1)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, 300, (length,))
    ids[:, 0] = 0
    options = {"layers": 3, "inner_size": 128, "positions": 522, "max_items": 50}
    model = small(**options)
    model.load_state_dict(from_longformer(longformer.state_dict()), strict=True)
    torch.nn.init.zeros_(model.longformer.embeddings.item_position_embeddings.weight)
    mask, everywhere = (ids != 1).long(), torch.zeros_like(ids)
    everywhere[:, 0] = 1
    with torch.no_grad():
        wanted = longformer(ids, attention_mask=mask, global_attention_mask=everywhere).last_hidden_state
        found = model.longformer(TextBatch(ids, torch.zeros_like(ids), torch.zeros_like(ids))).tokens
    real = ids != 1
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=0)


def test_tokens_beside_transformers(tmp_path):
    """A vocabulary of titles cuts text as transformers' Longformer tokenizer does with the same files."""
    from transformers import LongformerTokenizer

    from manyheads.recsys.texts import TextTokens

    titles = [
        f"The {a} {b} ({year})" for a in ("Red", "Old") for b in ("Tent", "Wine") for year in (1995, 1997)
    ]
    tokens = TextTokens.train([*titles, "title", "genres"], 300)
    tokens.tokenizer.model.save(str(tmp_path))
    back = TextTokens.read(tmp_path)
    theirs = LongformerTokenizer.from_pretrained(str(tmp_path))
    for text in (*titles, "title", "A caf\u00e9, 1996!", " spaced  out", ""):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokens.ids([text])[0] == back.ids([text])[0] == wanted


@pytest.mark.parametrize("pooler", ["cls", "avg"])
def test_a_batch_is_its_texts(pooler):
    model, together = small(pooler=pooler), batch()
    found = model(together)
    assert together.input_ids.shape == (4, 200)  # the longest is cut
    for row, length in enumerate(together.real.sum(1).tolist()):
        alone = model(TextBatch(*(x[row : row + 1, :length] for x in together)))
        torch.testing.assert_close(found[row], alone[0], atol=2e-5, rtol=1e-5)


def test_newest_items_first():
    items, histories = texts(), Packed(torch.tensor([3, 7, 2]), torch.tensor([0, 3], dtype=torch.int32))
    found = text_batch(items, histories, max_items=2, max_tokens=100)
    parts = [items.ids[items.starts[n - 1] : items.starts[n]] for n in (2, 7)]
    assert found.input_ids[0].tolist() == [0, *parts[0].tolist(), *parts[1].tolist()]
    assert found.item_position_ids[0].tolist() == [0, *[1] * len(parts[0]), *[2] * len(parts[1])]
    empty = text_batch(items, Packed(torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)))
    assert empty.input_ids.tolist() == [[0], [0]]


def test_scores_are_cosines_and_the_table_is_not_trained():
    model, items = small(num_items=18), texts()
    for first in range(0, 18, 5):
        numbers = torch.arange(first, min(18, first + 5))
        alone = Packed(numbers + 1, torch.arange(len(numbers) + 1).int())
        model.set_items(first, model(model.texts(items, alone)))
    scores = model.queries(batch()) @ model.items().weight.T
    cosines = torch.cosine_similarity(model(batch())[:, None], model.item_embedding.weight[None], dim=-1)
    torch.testing.assert_close(scores, cosines / 0.05, atol=1e-4, rtol=1e-5)
    assert not model.item_embedding.weight.requires_grad
    # an item alone is a history of one
    best = model(model.texts(items, Packed(torch.tensor([4]), torch.tensor([0, 1], dtype=torch.int32))))
    torch.testing.assert_close(model.item_embedding.weight[3:4], best, atol=2e-5, rtol=1e-5)


def test_learns_every_parameter():
    model, together = small(language_head=True).train(), batch()
    at = together.real.flatten().nonzero()[3::7, 0]
    masked = MaskedText(together, at, together.input_ids.flatten()[at])
    other = together._replace(item_position_ids=together.item_position_ids.roll(1, 1))
    pretraining(model, together, other, (masked,)).loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unreached


def test_attention_weights_are_dropped_in_training_alone():
    model, dropping = (small(attn_dropout=p, dropout=0.0) for p in (0.0, 0.3))
    dropping.load_state_dict(model.state_dict())
    plain = model(batch())
    torch.testing.assert_close(dropping(batch()), plain, atol=1e-5, rtol=1e-4)
    dropping.train()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(dropping(batch()))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-3)
    found[0].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in dropping.parameters())
    with pytest.raises(UsageError, match="attn_dropout must be at least 0 and less than 1"):
        small(attn_dropout=1.0)


def published(model, kind: str) -> dict[str, torch.Tensor]:
    """Our weights under the published names of a file."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    positions = len(state["longformer.embeddings.position_embeddings.weight"])
    state["longformer.embeddings.position_ids"] = torch.arange(positions)[None]
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    if kind == "training":
        words = state.pop("longformer.embeddings.word_embeddings.weight")
        assert words.shape == (300, 64)
        return {f"_forward_module.model.{key}": value for key, value in state.items()}
    if kind == "encoder":
        start = "longformer."
        return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    return state


@pytest.mark.parametrize("kind", ["encoder", "whole", "training"])
def test_published_files(tmp_path, kind):
    """Pickled, of each of the three layouts; every tensor is used, and the model is the same."""
    model = small(language_head=True)
    torch.save(published(model, kind), tmp_path / "model.bin")
    torch.save(published(model, "whole"), tmp_path / "longformer.bin")
    longformer = tmp_path / "longformer.bin" if kind == "training" else None
    back = read_recformer(tmp_path / "model.bin", longformer, heads=4)
    assert (back.lm_head is None) == (kind == "encoder")
    assert torch.equal(back(batch()), model(batch()))
    assert all(p.requires_grad for p in back.parameters())
    for key, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_published_files_of_fine_tuned_models(tmp_path):
    model = small(num_items=18)
    torch.save(model.state_dict(), tmp_path / "best.bin")
    back = read_recformer(tmp_path / "best.bin", heads=4)
    assert back.num_items == 18
    assert not back.item_embedding.weight.requires_grad
    assert torch.equal(back.items().weight, model.items().weight)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_files_that_are_not_a_models(tmp_path, capsys):
    model = small(language_head=True)
    state = published(model, "training")
    path = tmp_path / "model.bin"
    torch.save(state, path)
    with pytest.raises(DataError, match="lack the table of words"):
        read_recformer(path)
    whole = published(model, "whole")
    for change, message in (
        ({"longformer.more": torch.zeros(1)}, r"1 left over \(longformer\.more\)"),
        ({"lm_head.decoder.bias": torch.ones(300)}, "which are one, differ"),
        ({"longformer.embeddings.position_ids": torch.zeros(1, 202)}, "does not count"),
        ({"longformer.encoder.layer.1.output.dense.weight": torch.zeros(3, 3)}, "1 of another shape"),
    ):
        torch.save({**whole, **change}, path)
        with pytest.raises(DataError, match=message):
            read_recformer(path, heads=4)
    torch.save({key: whole[key] for key in list(whole)[:1]}, path)
    with pytest.raises(DataError, match="these are no weights of a Recformer"):
        read_recformer(path)
    path.write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(DataError, match="does not hold tensors alone"):
        read_recformer(path)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="one token type"):
        from_longformer(from_recformer(whole))


def test_size_of_the_published_model(longformer):
    """transformers' Longformer-base, its pooler left out, and three types and 51 items more."""
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1)
    with torch.device("meta"):
        theirs = LongformerModel(config, add_pooling_layer=False)
        ours = recformer_base()
        whole = recformer_base(language_head=True)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) + (3 + 51) * 768
    assert count == 148_110_336
    assert sum(p.numel() for p in whole.parameters()) == count + 768 * 768 + 3 * 768 + 50265 * 769


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of 4 heads"),
        ({"window": 63}, "window must be even and positive, not 63"),
        ({"pooler": "max"}, "pooler must be 'cls' or 'avg', not 'max'"),
        ({"num_items": -1}, "num_items must be positive, or 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ):
        with pytest.raises(UsageError, match=message):
            small(**options)
    model = small(positions=102)
    with pytest.raises(ValueError, match="a text of 200 tokens, and the model takes 100"):
        model(batch())
    with pytest.raises(UsageError, match="build it with num_items"):
        model.items()
    with pytest.raises(UsageError, match="build it with language_head"):
        model.language_loss(MaskedText(batch(), torch.zeros(0), torch.zeros(0)))

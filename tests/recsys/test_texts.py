"""Titles and genres of films as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.models.encoder import Packed, starts_of
from manyheads.recsys.published import read_titles
from manyheads.recsys.texts import ItemTexts, TextTokens, item_texts, text_batch
from manyheads.recsys.word_masking import WordMasks


@pytest.fixture
def titles(movielens):
    return read_titles("ml_100k", movielens.folder("ml_100k"))


def train(titles, size=2000) -> TextTokens:
    return TextTokens.train([text for film in titles.values() for text in (*film, *film.values())], size)


def test_a_vocabulary_of_films(titles):
    tokens = train(titles)
    assert len(tokens) == 2000
    assert tokens.names()[:5] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert train(titles).to_json() == tokens.to_json()
    items = item_texts(tokens, list(titles.values()), max_attribute_tokens=100)
    assert len(items) == 1682
    for number, film in enumerate(titles.values()):
        ids = items.ids[items.starts[number] : items.starts[number + 1]].tolist()
        text = tokens.tokenizer.decode(ids, skip_special_tokens=False)
        assert text == "".join(f"{name}{value}" for name, value in film.items())
    back = TextTokens.from_json(tokens.to_json())
    again = item_texts(back, list(titles.values()), max_attribute_tokens=100)
    assert all(torch.equal(a, b) for a, b in zip(items, again, strict=True))


def test_a_text_that_no_film_has(titles):
    """Every byte is a token: nothing is unknown, and what looks like a special token is text."""
    tokens = train(titles, 300)
    text = "\u6771\u4eac \U0001f40d <pad> <s> na\u00efve\n"
    ids = tokens.ids([text])[0]
    assert tokens.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert min(ids) >= 5
    assert TextTokens.from_json(tokens.to_json()).ids([text]) == [ids]


def test_a_vocabulary_in_a_config_is_packed_and_damage_is_told(titles):
    tokens = train(titles)
    packed = tokens.packed()
    assert len(packed) < 0.6 * len(tokens.to_json())
    assert TextTokens.from_packed(packed).to_json() == tokens.to_json()
    for damaged in (packed[: len(packed) // 2 // 4 * 4], "no base64", packed[:-8] + "AAAAAAA=", 5):
        with pytest.raises(DataError, match="vocabulary of texts"):
            TextTokens.from_packed(damaged)


def test_histories_of_films_equal_one_item_after_the_other(titles):
    items = item_texts(train(titles), list(titles.values()))
    rng = np.random.default_rng(0)
    lengths = [0, 1, 3, 60, 120]
    numbers = torch.from_numpy(rng.integers(0, 1682, sum(lengths)))
    batch = text_batch(items, Packed(numbers + 1, starts_of(torch.tensor(lengths))))
    first = 0
    for row, length in enumerate(lengths):
        newest = numbers[first : first + length].tolist()[::-1][:50]
        ids, types, places = [0], [0], [0]
        for place, number in enumerate(newest, 1):
            span = slice(int(items.starts[number]), int(items.starts[number + 1]))
            ids += items.ids[span].tolist()
            types += items.types[span].tolist()
            places += [place] * (span.stop - span.start)
        kept = min(1024, len(ids))
        pads = batch.input_ids.shape[1] - kept
        assert batch.input_ids[row].tolist() == ids[:1024] + [1] * pads
        assert batch.token_type_ids[row].tolist() == types[:1024] + [3] * pads
        assert batch.item_position_ids[row].tolist() == places[:1024] + [50] * pads
        first += length


def test_words_of_films(titles):
    tokens = train(titles)
    film = {"title": "Toy Story (1995)", "genres": "Animation, Comedy"}
    ids = np.array([0, *item_texts(tokens, [film]).ids.tolist()])
    names = tokens.names()
    found = ["".join(names[ids[at]] for at in word) for word in WordMasks(tokens).words(ids)]
    # a value goes on its name, and a name the value before it
    assert found == ["titleToy", "\u0120Story", "\u0120(1995", ")genresAnimation", ",", "\u0120Comedy"]


def test_masks_of_films(titles):
    items = item_texts(train(titles), list(titles.values()))
    batch = text_batch(items, Packed(torch.arange(1, 1683), starts_of(torch.full((60,), 28))), 50, 512)
    masks = WordMasks(train(titles))
    found = masks(batch, np.random.default_rng(0))
    lengths, counts = batch.real.sum(1), torch.bincount(found.at // batch.input_ids.shape[1], minlength=60)
    assert (counts <= (0.15 * lengths).round()).all()
    assert (counts >= (0.15 * lengths).round() - 1).all()  # single tokens fill what longer words leave
    fate = found.batch.input_ids.flatten()[found.at]
    hidden, same = fate == masks.mask_id, fate == found.targets
    assert abs(float(hidden.float().mean()) - 0.8) < 5 * (0.16 / len(fate)) ** 0.5
    assert abs(float(same.float().mean()) - 0.1) < 5 * (0.09 / len(fate)) ** 0.5


def test_attributes_that_are_missing_or_too_many(titles):
    tokens = train(titles)
    film = {"title": "Toy Story", "year": None, "a": "b", "c": "d", "e": "f"}
    found = item_texts(tokens, [film, {"title": ""}])
    assert tokens.tokenizer.decode(found.ids[: found.starts[1]].tolist()) == "titleToy Storyabcd"
    assert tokens.tokenizer.decode(found.ids[found.starts[1] :].tolist()) == "title"
    cut = item_texts(tokens, [{"title": "a " * 100, "b": "c"}], max_attribute_tokens=5)
    assert cut.lengths.tolist() == [7]
    assert cut.types.tolist() == [1, 2, 2, 2, 2, 1, 2]
    with pytest.raises(DataError, match="item 1 has no text"):
        item_texts(tokens, [film, {"title": None}])
    with pytest.raises(UsageError, match="at least 261 tokens, not 100"):
        TextTokens.train(["a"], 100)


def test_items_that_come_later(titles):
    tokens, films = train(titles), list(titles.values())
    joined = ItemTexts.join([item_texts(tokens, films[:1000]), item_texts(tokens, films[1000:])])
    assert all(torch.equal(a, b) for a, b in zip(joined, item_texts(tokens, films), strict=True))


def test_a_vocabulary_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no vocabulary that can be read"):
        TextTokens.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no vocabulary that can be read"):
        TextTokens.read(tmp_path)

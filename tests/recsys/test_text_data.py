"""Batches of histories read as texts: what is drawn, which items stay unseen, what a folder keeps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.data import RecommendationData
from manyheads.recsys.drawing import Drawn
from manyheads.recsys.models.encoder import FIRST
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.text_data import Core, Drawing, Loading, TextData, Texts
from manyheads.recsys.text_preprocessing import TextPreprocessing
from manyheads.recsys.texts import ItemTexts

COLOURS = ("red", "blue", "green", "black", "white", "gold")
THINGS = ("hat", "shoe", "shirt", "coat", "glove", "scarf", "belt", "sock")


def write(folder: Path, users: int = 120, items: int = 48) -> tuple[str, str]:
    """A log in which everybody buys things of one colour, and their table."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{colour * 8 + thing}", step)
        for user in range(users)
        for colour in (user % (items // 8),)
        for step, thing in enumerate(rng.permutation(8)[: 4 + user % 4])
    ]
    log, table = folder / f"log{items}.csv", folder / f"items{items}.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(log, index=False)
    films = [
        (f"i{n}", f"{COLOURS[n // 8]} {THINGS[n % 8]}", "clothes" if n % 2 else None) for n in range(items)
    ]
    pd.DataFrame(films, columns=["item_id", "title", "kind"]).to_csv(table, index=False)
    return str(log), str(table)


def data(folder: Path, **options: object) -> TextData:
    log, table = write(folder)
    known = {"core": Core(1, 1), "texts": Texts(vocab_size=300, max_tokens=64), "drawing": Drawing(4)}
    return TextData(log, table, **known | options)  # type: ignore[arg-type]


def pairs(batches: list[Drawn]) -> Counter[tuple[tuple[int, ...], int]]:
    """Histories with their targets."""
    return Counter(
        (tuple((batch.histories.tokens[a:b] - FIRST).tolist()), int(target))
        for batch in batches
        for a, b, target in zip(
            batch.histories.starts[:-1], batch.histories.starts[1:], batch.targets, strict=True
        )
    )


def test_what_is_drawn_is_an_event_and_the_newest_before_it(tmp_path: Path) -> None:
    found = data(tmp_path, drawing=Drawing(3, per_user=40, buckets=4), loading=Loading(7))
    loader = found.train_dataloader()
    first = pairs(list(loader))
    assert sum(first.values()) == 120 * 40
    histories = [found.training.history(user).tolist() for user in range(len(found.training))]
    wanted = {
        (tuple(history[max(0, place - 3) : place]), history[place])
        for history in histories
        for place in range(1, len(history))
    }
    assert set(first) == wanted  # 40 draws of at most 4 events miss none
    assert pairs(list(loader)) != first  # another epoch
    again = data(tmp_path, drawing=Drawing(3, per_user=40, buckets=4), loading=Loading(7))
    assert pairs(list(again.train_dataloader())) == first
    split = found.split
    for user, history in enumerate(histories):
        assert history == split.sequences.history(user)[:-2].tolist()


def test_chances_are_those_of_the_draws(tmp_path: Path) -> None:
    found = data(tmp_path, drawing=Drawing(4, per_user=300, cold=0.25))
    drawn = np.zeros(36)
    for batch in found.train_dataloader():
        drawn += np.bincount(batch.targets.numpy(), minlength=36)
    chances = found.chances()
    assert chances.shape == (36,) and chances.sum() == pytest.approx(1)
    assert np.abs(drawn / drawn.sum() - chances).max() < 6 * (chances.max() / drawn.sum()) ** 0.5


def test_batches_are_of_like_length_and_an_epoch_can_be_resumed(tmp_path: Path) -> None:
    options = {"drawing": Drawing(6, per_user=8, buckets=6), "loading": Loading(16)}
    one, other = (data(tmp_path, **options) for _ in range(2))
    whole = list(one.train_dataloader())
    sizes = [
        torch.tensor([len(history) for history, _ in pairs([batch]).elements()]).float() for batch in whole
    ]
    assert torch.stack([x.std(unbiased=False) for x in sizes]).mean() < 0.5 * torch.cat(sizes).std()
    loader = one.train_dataloader()
    batches = iter(loader)
    begun = [next(batches) for _ in range(5)]
    later = other.train_dataloader()
    later.load_state_dict(loader.state_dict())
    assert len(later) == len(whole)
    assert [pairs([x]) for x in [*begun, *later]] == [pairs([x]) for x in whole]


def test_items_are_held_out_of_training_wholly(tmp_path: Path) -> None:
    found = data(tmp_path, drawing=Drawing(4, cold=0.25))
    assert found.num_items == 36 and found.split.sequences.num_items == 48 == len(found.texts)
    assert found.training.items.max() < 36
    assert found.counts[:36].sum() == len(found.training.items) and not found.counts[36:].any()
    drawn = pairs([batch for _ in range(5) for batch in found.train_dataloader()])
    assert max(item for history, target in drawn for item in (*history, target)) < 36
    # The rest of the log is as it was: they are asked for, and stand in histories.
    whole = data(tmp_path)
    whole.setup()
    ids = found.split.sequences.item_ids.ids
    for user in range(0, 120, 7):
        mine = [ids[item] for item in found.split.sequences.history(user)]
        assert mine == [
            whole.split.sequences.item_ids.ids[item] for item in whole.split.sequences.history(user)
        ]
    asked = found.cold_questions()
    sequences = found.split.sequences
    events = sequences.items >= 36
    events[sequences.offsets[:-1]] = False  # with no history
    assert asked.end.tolist() == np.flatnonzero(events).tolist()
    assert asked.targets.items.tolist() == sequences.items[events].tolist()
    # Others with another seed; the same with the same.
    other = data(tmp_path, seed=1, drawing=Drawing(4, cold=0.25))
    again = data(tmp_path, drawing=Drawing(4, cold=0.25))
    for each in (other, again):
        each.setup()
    assert set(other.split.sequences.item_ids.ids[36:]) != set(ids[36:])
    assert again.split.sequences.item_ids.ids == ids
    with pytest.raises(UsageError, match=r"drawing.cold 0.001 is 0 items, and 48 can be held out"):
        data(tmp_path, drawing=Drawing(4, cold=0.001)).setup()


def test_without_cold_items_the_log_is_that_of_the_other_task(movielens, tmp_path: Path) -> None:
    movielens.folder("ml_100k")
    ours, theirs = TextData("ml_100k", texts=Texts(vocab_size=1000)), RecommendationData("ml_100k")
    assert ours.num_items == theirs.num_items == 1349
    assert ours.split.sequences.items.tolist() == theirs.split.sequences.items.tolist()
    assert ours.counts.tolist() == theirs.counts.tolist()
    text = ours.kept.tokens.tokenizer.decode(ours.texts.select(torch.tensor([0])).ids.tolist())
    assert ours.split.sequences.item_ids.ids[0] == "242" and text == "titleKolya (1996)genresComedy"


def test_what_a_model_folder_keeps_is_read_back(tmp_path: Path) -> None:
    found = data(tmp_path, drawing=Drawing(4, cold=0.25))
    plain = json.loads(json.dumps(found.preprocessing()))
    kept, texts = Preprocessing.from_json(plain), TextPreprocessing.from_json(plain, 36)
    assert kept.item_ids.ids == found.split.sequences.item_ids.ids[:36]
    assert texts.items is not None
    same = found.texts.select(torch.arange(36))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(texts.items, same, strict=True))
    assert texts.cut.attributes == ("title", "kind") and texts.cut.max_items == 4
    rows = [{"title": "red hat", "kind": None}]
    assert texts.texts(rows).ids.tolist() == found.kept.texts(rows).ids.tolist()
    for key, value, said in (
        ("texts", {"item": "item_id"}, "are not told by"),
        ("texts", plain["texts"] | {"max_items": 0}, "by numbers above 0"),
        ("texts", plain["texts"] | {"attributes": "title"}, "by numbers above 0"),
        ("tokens", "AAAA", "vocabulary of texts cannot be read"),
        ("item_texts", plain["item_texts"][:2], "not three arrays"),
        ("item_texts", ["AAAA"] * 3, "cannot be read"),
        ("item_texts", plain["item_texts"][::-1], "model folder"),
    ):
        with pytest.raises(DataError, match=said):
            TextPreprocessing.from_json(plain | {key: value}, 36)
    with pytest.raises(DataError, match="has 35 items, and texts of 36"):
        TextPreprocessing.from_json(plain, 35)


def test_texts_that_are_too_many_are_left_out_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("manyheads.recsys.text_preprocessing.MOST_KEPT", 100)
    plain = data(tmp_path).preprocessing()
    assert plain["item_texts"] is None
    assert "predict with --items" in caplog.text
    assert TextPreprocessing.from_json(plain, 48).items is None


def test_a_start_keeps_numbers_and_tokens(tmp_path: Path) -> None:
    log, table = write(tmp_path, items=32)
    before = TextData(
        log, table, core=Core(1, 1), texts=Texts(vocab_size=290, max_tokens=64), drawing=Drawing(4)
    )
    arguments = {"vocab_size": before.vocab_size, "num_items": 32, "hidden_size": 8, "heads": 1, "layers": 1}
    hub.save(
        tmp_path / "model",
        create_model("recformer", **arguments),
        domain="recsys",
        name="recformer",
        arguments=arguments,
        preprocessing=before.preprocessing(),
    )
    later = data(tmp_path, start=str(tmp_path / "model"), drawing=Drawing(4, cold=0.1))
    later.setup()
    ids = later.split.sequences.item_ids.ids
    assert ids[:32] == before.split.sequences.item_ids.ids and later.num_items == 48 - 5
    assert later.kept.tokens.to_json() == before.kept.tokens.to_json()
    assert all(torch.equal(a, b) for a, b in zip(first(later.texts, 32), before.texts, strict=True))
    # A table of the new items alone will do; what it says of a known one counts.
    rows = pd.read_csv(table.replace("32", "48")).iloc[31:]
    rows.loc[31, "title"] = "something else"
    rows.to_csv(tmp_path / "new.csv", index=False)
    grown = TextData(
        log.replace("32", "48"), str(tmp_path / "new.csv"), core=Core(1, 1), texts=Texts(max_tokens=64),
        drawing=Drawing(4), start=str(tmp_path / "model"),
    )  # fmt: skip
    grown.setup()
    changed = ids.index("i31")
    for number in range(32):
        one, other = (x.select(torch.tensor([number])).ids for x in (grown.texts, before.texts))
        assert torch.equal(one, other) == (number != changed)


def test_a_start_from_published_weights_needs_their_vocabulary(tmp_path: Path) -> None:
    before = data(tmp_path)
    arguments = {"vocab_size": before.vocab_size, "hidden_size": 8, "heads": 1, "layers": 1}
    model = create_model("recformer", **arguments)
    about = {"domain": "recsys", "name": "recformer", "arguments": arguments, "preprocessing": {}}
    hub.save(tmp_path / "model", model, **about)
    with pytest.raises(UsageError, match=r"keeps no vocabulary: name its own with data.texts.vocabulary"):
        data(tmp_path, start=str(tmp_path / "model")).setup()
    (tmp_path / "tokenizer.json").write_text(before.kept.tokens.to_json())
    named = Texts(vocabulary=str(tmp_path), max_tokens=64)
    later = data(tmp_path, start=str(tmp_path / "model"), texts=named)
    assert later.num_items == 48 and torch.equal(later.texts.ids, before.texts.ids)


def first(texts: ItemTexts, count: int) -> ItemTexts:
    return texts.select(torch.arange(count))


def test_what_cannot_be(tmp_path: Path) -> None:
    log, table = write(tmp_path)
    rows = pd.read_csv(table)
    rows[rows["item_id"] != "i9"].to_csv(tmp_path / "less.csv", index=False)
    less = {"core": Core(1, 1), "drawing": Drawing(4)}
    with pytest.raises(DataError, match=r"1 items of the log have no text, such as 'i9' \(`texts.missing"):
        TextData(log, str(tmp_path / "less.csv"), **less).setup()
    found = TextData(log, str(tmp_path / "less.csv"), texts=Texts(missing="leave_out"), **less)
    assert found.num_items == 47 and "i9" not in found.split.sequences.item_ids
    with pytest.raises(UsageError, match=r"data.items: name the table of items"):
        TextData(log).setup()
    with pytest.raises(DataError, match="no vocabulary that can be read"):
        TextData(log, table, texts=Texts(vocabulary=str(tmp_path))).setup()
    for make in (
        lambda: Drawing(0),
        lambda: Drawing(cold=1.0),
        lambda: Drawing(per_user=0),
        lambda: Texts(max_tokens=1),
        lambda: Texts(max_attributes=0),
    ):
        with pytest.raises(UsageError):
            make()

"""Recommendations by text: those of a sort of all scores, items that the model has never seen among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.logs import Columns
from manyheads.recsys.models.encoder import FIRST, Packed, starts_of
from manyheads.recsys.models.recformer import Recformer, unit
from manyheads.recsys.predictor import Predictor
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.text_encoding import encode, encode_items, place_items, text_lengths
from manyheads.recsys.text_preprocessing import TextCut, TextPreprocessing
from manyheads.recsys.texts import ItemTexts, TextTokens, item_texts, text_batch
from manyheads.recsys.vocabulary import Vocabulary

ITEMS, NEW = 40, 12
WORDS = ("red", "old", "sea", "night", "war", "love", "river", "king", "moon", "road")
COUNTS = np.array([(7 * number) % 23 for number in range(ITEMS)])
CUT = TextCut("item_id", ("title", "kind"), 3, 32, 5, 60)


def films(first: int, count: int) -> list[dict[str, str | None]]:
    rng = np.random.default_rng(first)
    return [
        {
            "title": " ".join(rng.choice(WORDS, rng.integers(1, 6))) + f" {n}",
            "kind": "film" if n % 3 else None,
        }
        for n in range(first, first + count)
    ]


def ids(first: int, count: int) -> list[str]:
    return [f"i{number}" for number in range(first, first + count)]


def tokens() -> TextTokens:
    return TextTokens.train([text for film in films(0, ITEMS) for text in film.values() if text], 300)


def model() -> Recformer:
    """Random weights, so large that texts differ; its table is what it makes of the items."""
    torch.manual_seed(1)
    found = create_model(
        "recformer", vocab_size=300, num_items=ITEMS, hidden_size=16, layers=1, heads=2, inner_size=32,
        positions=62, max_items=5,
    )  # fmt: skip
    assert isinstance(found, Recformer)
    for weight in found.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    found.set_items(0, encode_items(found, item_texts(tokens(), films(0, ITEMS)), 60))
    return found.eval()


def kept(texts: bool = True) -> TextPreprocessing:
    return TextPreprocessing(tokens(), CUT, item_texts(tokens(), films(0, ITEMS)) if texts else None)


def predictor(texts: bool = True) -> Predictor:
    return Predictor(model(), Preprocessing(Columns(), Vocabulary(ids(0, ITEMS)), COUNTS), texts=kept(texts))


def table(path: Path, first: int = 0, count: int = ITEMS + NEW) -> str:
    """A table of items, known and new ones mixed."""
    rows = [
        {"item_id": id, **film} for id, film in zip(ids(first, count), films_of(first, count), strict=True)
    ]
    pd.DataFrame(rows).sample(frac=1, random_state=3).to_csv(path, index=False)
    return str(path)


def films_of(first: int, count: int) -> list[dict[str, str | None]]:
    return [*films(0, ITEMS), *films(ITEMS, NEW)][first : first + count]


def log(items: int, users: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", step)
        for user in range(users)
        for step, item in enumerate(rng.permutation(items)[: rng.integers(1, 9)])
    ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).sample(frac=1, random_state=1)


@torch.no_grad()
def brute(frame: pd.DataFrame, k: int) -> dict[str, list[str]]:
    """Each user alone, each text alone, all scores sorted; new items stand as their file has them."""
    one, found = model(), {}
    order = pd.read_csv(frame.attrs["table"])["item_id"]
    everything = [*ids(0, ITEMS), *[id for id in order if id not in set(ids(0, ITEMS))]]
    text = dict(zip(ids(0, ITEMS + NEW), films_of(0, ITEMS + NEW), strict=True))
    texts = item_texts(tokens(), [text[id] for id in everything])

    def read(items: list[int]) -> torch.Tensor:
        history = Packed(torch.tensor(items) + FIRST, starts_of(torch.tensor([len(items)])))
        return unit(one(text_batch(texts, history, 5, 60)))[0]

    weight = torch.cat(
        [one.items().weight, torch.stack([read([n]) / 0.05 for n in range(ITEMS, ITEMS + NEW)])]
    )
    for user, part in frame.groupby("user_id"):
        items = [everything.index(item) for item in part.sort_values("timestamp")["item_id"]]
        scores = weight @ read(items)
        scores[items] = -torch.inf
        best = scores.sort(descending=True, stable=True).indices[:k]
        found[str(user)] = [everything[item] for item in best]
    return found


def lists(rows: pd.DataFrame) -> dict[str, list[str]]:
    return {str(user): part["item_id"].tolist() for user, part in rows.groupby("user_id")}


def test_new_items_are_recommended_and_read_by_their_texts(tmp_path: Path) -> None:
    frame = log(ITEMS + NEW)
    frame.attrs["table"] = table(tmp_path / "items.csv")
    found = predictor().predict(frame, items=frame.attrs["table"], top_k=7)
    assert lists(found) == brute(frame, 7)
    assert set(found["item_id"]) & set(ids(ITEMS, NEW))
    assert (found.groupby("user_id")["score"].diff().dropna() <= 0).all()
    without = predictor().predict(frame, top_k=7, unknown="skip")
    assert not set(without["item_id"]) & set(ids(ITEMS, NEW))


def test_a_batch_is_its_records_one_by_one(tmp_path: Path) -> None:
    one = core.configure(predictor(), {"items": table(tmp_path / "items.csv")})
    whole = one.predict(log(ITEMS + NEW))
    for size in (1, 7):
        found = pd.DataFrame(core.rows(one, log(ITEMS + NEW), size))
        pd.testing.assert_frame_equal(
            found.drop(columns="score"), whole.drop(columns="score"), check_dtype=False
        )
        np.testing.assert_allclose(found["score"], whole["score"], rtol=1e-5, atol=1e-5)


def test_policies_and_lists(tmp_path: Path) -> None:
    path, allow = table(tmp_path / "items.csv"), tmp_path / "allow.txt"
    allow.write_text("i3\ni45\ni50\n")
    one = core.configure(predictor(), {"items": path, "allow": str(allow), "seen": "keep"})
    assert list(one.named_files("log.csv")) == [str(allow), path]
    found = one.predict(log(ITEMS))
    assert all(set(items) == {"i3", "i45", "i50"} for items in lists(found).values())
    alien = pd.DataFrame({"user_id": ["a", "b", "b"], "item_id": ["x", "y", "i44"], "timestamp": [1, 2, 3]})
    with pytest.raises(DataError, match="record 'a': no item of the history is known"):
        predictor().predict(alien, items=path)
    popular = predictor().predict(alien, items=path, unknown="popular", top_k=3)
    best = sorted(range(ITEMS), key=lambda item: (-COUNTS[item], item))[:3]
    assert lists(popular)["a"] == [f"i{item}" for item in best]
    assert "i44" not in lists(popular)["b"]  # read by its text, and seen
    assert set(predictor().predict(alien, items=path, unknown="skip")["user_id"]) == {"b"}


def test_a_folder_without_texts_needs_the_table(tmp_path: Path) -> None:
    frame, path = log(ITEMS), table(tmp_path / "items.csv")
    with pytest.raises(UsageError, match="keeps no texts of its items: name their table with --items"):
        predictor(texts=False).predict(frame)
    wanted = predictor().predict(frame, items=path)
    pd.testing.assert_frame_equal(predictor(texts=False).predict(frame, items=path), wanted)
    with pytest.raises(DataError, match=r"has no text of 5 items of the model, such as 'i0'"):
        predictor(texts=False).predict(frame, items=table(tmp_path / "less.csv", 5, 40))


def test_new_items_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = core.configure(predictor(), {"items": table(tmp_path / "items.csv")})
    sizes: list[tuple[int, int]] = []

    def noted(recformer: Recformer, known: ItemTexts, new: ItemTexts, most: int) -> torch.Tensor:
        sizes.append((len(known), len(new)))
        return place_items(recformer, known, new, most)

    monkeypatch.setattr("manyheads.recsys.scorers.place_items", noted)
    list(core.rows(one, log(ITEMS), 4))
    assert sizes == [(ITEMS, NEW)]


def test_new_items_are_placed_where_the_table_has_their_like() -> None:
    """The table is of another encoder: what ours makes of items, turned and moved."""
    one, moved = model(), model()
    known, new = (item_texts(tokens(), films(first, count)) for first, count in ((0, ITEMS), (ITEMS, NEW)))
    same = place_items(one, known, new, 60)
    torch.testing.assert_close(same, unit(encode_items(one, new, 60)), atol=1e-5, rtol=0)
    turn, _ = torch.linalg.qr(torch.randn(16, 16))

    def elsewhere(texts: ItemTexts) -> torch.Tensor:
        return unit(unit(encode_items(one, texts, 60)) @ turn + 0.2)

    moved.set_items(0, elsewhere(known))
    found, wanted = place_items(moved, known, new, 60), elsewhere(new)
    assert float((found - wanted).norm(dim=1).mean()) < 0.2 * float((same - wanted).norm(dim=1).mean())


def test_texts_of_like_length_share_a_batch() -> None:
    """Encoding many texts equals each alone, hardly pads, and keeps to the tokens of a batch."""
    one, texts = model(), item_texts(tokens(), films(0, ITEMS))
    lengths = torch.tensor([1, 0, 5, 3, 9, 2, 2, 7])
    histories = Packed(torch.randint(1, ITEMS + 1, (int(lengths.sum()),)), starts_of(lengths))
    seen: list[torch.Tensor] = []
    one.register_forward_pre_hook(lambda _, args: seen.append(args[0].real))
    with torch.no_grad():
        found = encode(one, texts, histories, 5, 60, tokens=120)
        assert all(real.numel() <= 120 or len(real) == 1 for real in seen)
        counts = text_lengths(texts, histories, 5, 60)
        assert sorted(int(n) for real in seen for n in real.sum(1)) == sorted(counts.tolist())
        for row, (first, end) in enumerate(zip(histories.starts[:-1], histories.starts[1:], strict=True)):
            alone = Packed(histories.tokens[first:end], torch.tensor([0, end - first], dtype=torch.int32))
            wanted = one(text_batch(texts, alone, 5, 60))[0]
            torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=1e-5)
        seen.clear()
        encode_items(one, texts, 60)
    real = sum(int(each.sum()) for each in seen)
    assert real > 0.5 * sum(each.numel() for each in seen)


def test_a_model_folder_predicts_the_same(tmp_path: Path) -> None:
    arguments = {
        "vocab_size": 300, "num_items": ITEMS, "hidden_size": 16, "layers": 1, "heads": 2, "inner_size": 32,
        "positions": 62, "max_items": 5,
    }  # fmt: skip
    base = Preprocessing(Columns(), Vocabulary(ids(0, ITEMS)), COUNTS).to_json()

    def save(texts: TextPreprocessing) -> Predictor:
        hub.save(
            tmp_path / "model",
            model(),
            domain="recsys",
            name="recformer",
            arguments=arguments,
            preprocessing=base | texts.to_json(),
        )
        return hub.load(tmp_path / "model")

    loaded = save(kept())
    pd.testing.assert_frame_equal(loaded.predict(log(ITEMS)), predictor().predict(log(ITEMS)))
    assert loaded.settings["items"] == ""
    for cut, said in (
        (TextCut("item_id", ("title",), 3, 32, 6, 60), "6 items of a history, its model 5"),
        (TextCut("item_id", ("title",), 3, 32, 5, 61), "61 tokens of a text, its model 60"),
    ):
        with pytest.raises(DataError, match=said):
            save(TextPreprocessing(tokens(), cut, kept().items))


def test_models_of_numbers_take_no_table(tmp_path: Path) -> None:
    sasrec = create_model("sasrec", num_items=ITEMS, max_len=8, hidden_size=16, layers=1)
    by_number = Predictor(sasrec, Preprocessing(Columns(), Vocabulary(ids(0, ITEMS)), COUNTS))  # type: ignore[arg-type]
    assert "items" not in by_number.settings
    with pytest.raises(UsageError, match="--items is no option of this model"):
        core.configure(by_number, {"items": table(tmp_path / "items.csv")})
    with pytest.raises(UsageError, match="no file"):
        core.configure(predictor(), {"items": str(tmp_path / "none.csv")})
    pd.DataFrame({"item_id": ["a"], "name": ["b"]}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(DataError, match="has no column 'title'"):
        core.configure(predictor(), {"items": str(tmp_path / "other.csv")})

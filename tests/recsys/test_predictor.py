"""Recommendations for all users of a log: those of a sort of all scores, by options and policies."""

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
from manyheads.recsys.models.bert4rec import BERT4Rec
from manyheads.recsys.models.encoder import FIRST, Packed, starts_of
from manyheads.recsys.models.sasrec import SASRec
from manyheads.recsys.predictor import Options, Predictor
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.vocabulary import Vocabulary

ITEMS = 60
IDS = [f"i{number}" for number in range(ITEMS)]
COUNTS = np.array([(7 * number) % 23 for number in range(ITEMS)])


def model(name: str = "sasrec") -> BERT4Rec | SASRec:
    """Random weights, so large that histories differ."""
    torch.manual_seed(1)
    found = create_model(name, num_items=ITEMS, max_len=8, hidden_size=16, layers=1)
    for weight in found.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    assert isinstance(found, BERT4Rec | SASRec)
    return found.eval()


def predictor(name: str = "sasrec", **options: object) -> Predictor:
    kept = Preprocessing(Columns(), Vocabulary(IDS), COUNTS)
    return Predictor(model(name), kept, Options(**options))  # type: ignore[arg-type]


def log(users: int = 30) -> pd.DataFrame:
    """Histories of 1 to 14 items, rows of all users mixed."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", IDS[item], step)
        for user in range(users)
        for step, item in enumerate(rng.integers(0, ITEMS, rng.integers(1, 15)))
    ]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return frame.iloc[rng.permutation(len(frame))].reset_index(drop=True)


def brute(name: str, frame: pd.DataFrame, k: int, keep: bool = False) -> dict[str, list[str]]:
    """Each user alone, all scores sorted."""
    found = {}
    recommender = model(name)
    for user, part in frame.groupby("user_id"):
        items = torch.tensor([IDS.index(item) for item in part.sort_values("timestamp")["item_id"]])
        history = Packed(items + FIRST, starts_of(torch.tensor([len(items)])))
        with torch.no_grad():
            weight, bias = recommender.items()
            scores = (recommender.queries(history) @ weight.T)[0] + (0 if bias is None else bias)
        if not keep:
            scores[items] = -torch.inf
        order = scores.sort(descending=True, stable=True).indices[:k]
        found[str(user)] = [IDS[item] for item in order]
    return found


def lists(frame: pd.DataFrame) -> dict[str, list[str]]:
    return {str(user): part["item_id"].tolist() for user, part in frame.groupby("user_id")}


@pytest.mark.parametrize("name", ["bert4rec", "sasrec"])
def test_every_user_has_the_best_items_of_all(name: str) -> None:
    frame = log()
    found = predictor(name).predict(frame, top_k=7)
    assert list(found.columns) == ["user_id", "rank", "item_id", "score"]
    assert found["user_id"].drop_duplicates().tolist() == frame["user_id"].drop_duplicates().tolist()
    assert found.groupby("user_id")["rank"].apply(list).map(lambda ranks: ranks == list(range(1, 8))).all()
    assert (found.groupby("user_id")["score"].diff().dropna() <= 0).all()
    assert lists(found) == brute(name, frame, 7)
    assert lists(predictor(name, seen="keep").predict(frame)) == brute(name, frame, 10, keep=True)


def test_a_batch_is_its_records_one_by_one() -> None:
    frame = log()
    whole = predictor().predict(frame)
    for size in (1, 7):
        found = pd.DataFrame(core.rows(predictor(), frame, size))
        pd.testing.assert_frame_equal(
            found.drop(columns="score"), whole.drop(columns="score"), check_dtype=False
        )
        np.testing.assert_allclose(found["score"], whole["score"], rtol=1e-5, atol=1e-6)


def test_shards_hold_users_and_are_read_by_themselves(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    log().to_parquet(path)
    one = predictor()
    shards = one.shards(path, 8)
    assert [one.count(shard) for shard in shards] == [8, 8, 8, 6]
    ids = [record.id for shard in reversed(shards) for record in predictor().read(shard)]
    assert sorted(ids) == sorted(set(log()["user_id"]))
    # A file that is another now is read again.
    log(40).to_parquet(path)
    assert sum(one.count(shard) for shard in one.shards(path, 8)) == 40


def test_lists_of_items_are_kept_to(tmp_path: Path) -> None:
    allow, deny = tmp_path / "allow.txt", tmp_path / "deny.txt"
    allow.write_text("i3\n i9 \n\ni11\ni12\nnever heard of\n")
    deny.write_text("i11\nnor of this\n")
    found = lists(predictor(seen="keep").predict(log(), allow=str(allow), deny=str(deny)))
    assert {frozenset(items) for items in found.values()} == {frozenset(["i3", "i9", "i12"])}
    denied = predictor(seen="keep").predict(log(), deny=str(deny), top_k=ITEMS)
    assert "i11" not in set(denied["item_id"]) and len(denied) == 30 * (ITEMS - 1)
    asked = predictor(allow=str(allow), deny=str(deny))
    assert list(asked.named_files("log.csv")) == [str(allow), str(deny)]
    allow.write_text("nothing that is known\n")
    with pytest.raises(UsageError, match="nothing to recommend"):
        predictor().configure({"allow": str(allow)})
    with pytest.raises(UsageError, match="cannot be read"):
        predictor().configure({"deny": str(tmp_path / "none.txt")})


def test_users_without_a_known_item_go_by_policy() -> None:
    new = pd.DataFrame({"user_id": ["n1", "n1", "n2"], "item_id": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    frame = pd.concat([log(5), new], ignore_index=True)
    with pytest.raises(DataError, match=r"record 'n1': no item of the history is known \(--unknown"):
        predictor().predict(frame)
    skipped = predictor().predict(frame, unknown="skip")
    assert set(skipped["user_id"]) == {f"u{user}" for user in range(5)}
    popular = predictor().predict(frame, unknown="popular", top_k=4)
    best = sorted(range(ITEMS), key=lambda item: (-COUNTS[item], item))[:4]
    for user in ("n1", "n2"):
        rows = popular[popular["user_id"] == user]
        assert rows["item_id"].tolist() == [IDS[item] for item in best]
        np.testing.assert_allclose(rows["score"], COUNTS[best] / COUNTS.sum(), rtol=1e-6)
    known = popular[popular["user_id"].str.startswith("u")]
    assert lists(known) == lists(predictor().predict(log(5), top_k=4))
    # Of a known user, items that nobody knows are passed over.
    more = pd.concat([log(5), pd.DataFrame({"user_id": ["u0"], "item_id": ["x"], "timestamp": [99]})])
    assert lists(predictor().predict(more)) == lists(predictor().predict(log(5)))


def test_a_user_who_has_seen_almost_all_has_fewer_rows() -> None:
    frame = pd.DataFrame({"user_id": "u", "item_id": IDS[:-2], "timestamp": range(ITEMS - 2)})
    found = predictor().predict(frame)
    assert sorted(found["item_id"]) == sorted(IDS[-2:])
    assert found["rank"].tolist() == [1, 2]


def test_bad_rows_are_an_error_or_left_out() -> None:
    frame = pd.concat([log(3), pd.DataFrame({"user_id": ["u0"], "item_id": [None], "timestamp": [5]})])
    with pytest.raises(DataError, match="'item_id' is missing"):
        predictor().predict(frame)
    assert lists(predictor().predict(frame, bad_rows="skip")) == lists(predictor().predict(log(3)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 0}, "--top-k takes 1 to 1000, not 0"),
        ({"seen": "keeep"}, "did you mean 'keep'"),
        ({"unknown": "popularr"}, "did you mean 'popular'"),
        ({"bad_rows": "no"}, "--bad-rows no: it takes error, skip"),
        ({"tok_p": 3}, "--tok-p is no option"),
    ],
)
def test_options_that_cannot_be_are_refused(settings: dict[str, str | int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        core.configure(predictor(), settings)


@pytest.mark.parametrize("name", ["bert4rec", "sasrec"])
def test_a_model_folder_predicts_the_same(name: str, tmp_path: Path) -> None:
    kept = Preprocessing(Columns(), Vocabulary(IDS), COUNTS)
    arguments = {"num_items": ITEMS, "max_len": 8, "hidden_size": 16, "layers": 1}
    for known in (kept, Preprocessing(Columns(), Vocabulary(IDS[:-1]), COUNTS[:-1])):
        hub.save(
            tmp_path / "model",
            model(name),
            domain="recsys",
            name=name,
            arguments=arguments,
            preprocessing=known.to_json(),
        )
        loaded, config = hub.load_model(tmp_path / "model")
        if known is kept:
            found = Predictor.from_folder(loaded, config).predict(log())
            pd.testing.assert_frame_equal(found, predictor(name).predict(log()))
        else:
            with pytest.raises(DataError, match="lists 59 items, its model has 60"):
                Predictor.from_folder(loaded, config)

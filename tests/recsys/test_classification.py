"""Texts and customers' variables: tables in, batches, figures and rows out."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.core.model_config import ModelConfig
from manyheads.recsys.classification_data import Batches, Dividing, TextData
from manyheads.recsys.classification_predictor import Predictor
from manyheads.recsys.classification_report import figures
from manyheads.recsys.classification_task import TextClassifier
from manyheads.recsys.customers import Customers, Fields, TextLimits
from manyheads.recsys.published import write_opinions

FIELDS = Fields(["review", "title"], ["age"], ["gender", "town"], "mood", id="key")
LIMITS = TextLimits(300, 40, 60)
WORDS = ["good", "bad", "fine", "dull", "bright", "slow", "quick", "warm"]
SMALL = {"hidden_size": 32, "layers": 1, "heads": 2, "inner_size": 64, "window": 8, "fusion_layers": 1}


def frame(rows: int = 120, seed: int = 0) -> pd.DataFrame:
    """Moods that follow from a word and the age, with gaps in every column but the label."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, len(WORDS), rows)
    age = rng.integers(18, 80, rows).astype(float)
    moods = np.where(words % 2 == 0, np.where(age > 40, "glad", "calm"), "sad")
    found = pd.DataFrame(
        {
            "key": [f"k{row}" for row in range(rows)],
            "review": [f"it was {WORDS[word]}, \u00e9t\u00e9" for word in words],
            "title": [f"{WORDS[word]} day" for word in words],
            "age": age,
            "gender": rng.choice(["f", "m"], rows),
            "town": rng.choice(["Oslo", "Bergen", "Bod\u00f8"], rows),
            "mood": moods,
        }
    )
    for place, name in enumerate(("review", "title", "age", "gender", "town")):
        found.loc[found.index[place::17], name] = None
    return found


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    frame().to_csv(path, index=False)
    return path


def data(path, **options) -> TextData:
    found = TextData(str(path), **{"fields": FIELDS, "limits": LIMITS, "loading": Batches(16, 16)} | options)
    found.trainer = None
    found.setup()
    return found


def test_csv_parquet_and_rows_one_by_one_are_the_same(table, tmp_path):
    frame().to_parquet(tmp_path / "table.parquet")
    csv, parquet = data(table), data(tmp_path / "table.parquet")
    assert csv.preprocessing() == parquet.preprocessing()
    assert csv.labels == ["calm", "glad", "sad"] and csv.model_inputs["categories"] == [2, 3]
    assert csv.class_counts[-1] == len(csv.rows["train"]) == 96 == sum(csv.class_counts[:-1])
    batches = [list(each.train_dataloader()) for each in (csv, parquet)]
    for ours, other in zip(*batches, strict=True):
        for a, b in zip((*ours.inputs.texts, *ours.inputs[1:], ours.target),
                        (*other.inputs.texts, *other.inputs[1:], other.target), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    rows = csv.rows["val"]
    cells = frame().iloc[rows].to_dict("records")
    single = csv.customers.batch([csv.customers.sample(each) for each in cells])
    (batch,) = csv.val_dataloader()
    for a, b in zip((*single.texts, *single[1:]), (*batch.inputs.texts, *batch.inputs[1:]), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def test_what_training_knows_is_the_training_rows(table):
    found = data(table)
    train = frame().iloc[found.rows["train"]]
    assert found.customers.mean == [pytest.approx(train["age"].mean())]
    assert found.customers.std == [pytest.approx(train["age"].std(ddof=0))]
    numbers = found.numbers[found.rows["train"]]
    assert int(numbers.isnan().sum()) == int(train["age"].isna().sum()) > 0
    assert abs(float(numbers.nanmean())) < 1e-6
    for column, name in enumerate(("gender", "town")):
        assert torch.equal(
            found.kinds[found.rows["train"], column] == -1, torch.tensor(train[name].isna().to_numpy())
        )


def test_a_missing_text_is_its_columns_name(table):
    customers = data(table).customers
    cells = {"review": None, "title": "", "age": "NA", "gender": "x", "town": math.nan}
    sample = customers.sample(cells)
    assert sample.texts == {"review": "", "title": ""}
    assert math.isnan(sample.numbers[0]) and sample.kinds == [-1, -1]
    batch = customers.batch([sample])
    text = customers.tokens.tokenizer.decode(batch.texts.input_ids[0, 1:].tolist())
    assert text == "reviewtitle"
    with pytest.raises(BadRecord, match="column 'age' holds 'old', which is no number"):
        customers.sample(cells | {"age": "old"})


def test_hidden_parts_are_missing_in_prediction_too(table):
    for hidden in ("texts", "variables"):
        kept = Customers.from_json(data(table, hidden=hidden).preprocessing())
        sample = kept.sample(frame().iloc[1].to_dict())
        assert (set(sample.texts.values()) == {""}) == (hidden == "texts")
        assert (sample.kinds == [-1, -1] and math.isnan(sample.numbers[0])) == (hidden == "variables")


def test_parts_by_group_by_column_and_by_seed(table, tmp_path):
    rows = frame()
    rows["who"] = [f"u{row % 12}" for row in range(len(rows))]
    rows["part"] = [
        "test" if row % 5 == 0 else "val" if row % 5 == 1 else "train" for row in range(len(rows))
    ]
    path = tmp_path / "groups.parquet"
    rows.to_parquet(path)
    found = data(path, dividing=Dividing(0.25, 0.25, group="who"))
    groups = {part: set(rows.iloc[each]["who"]) for part, each in found.rows.items()}
    assert {part: len(each) for part, each in groups.items()} == {"train": 6, "val": 3, "test": 3}
    assert not groups["train"] & groups["val"] and not groups["test"] & (groups["train"] | groups["val"])
    told = data(path, dividing=Dividing(column="part"))
    assert told.rows["test"].tolist() == list(range(0, 120, 5))
    first, again, other = (data(table, seed=seed).rows["test"].tolist() for seed in (0, 0, 1))
    assert first == again != other
    rows.loc[7, "part"] = "valid"
    rows.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(DataError, match=r"bad.csv, line 9: part is 'valid', not train, val or test"):
        data(tmp_path / "bad.csv", dividing=Dividing(column="part"))


def test_several_labels_a_row(tmp_path):
    rows = frame()
    rows["mood"] = [None if row % 10 == 9 else "a|b" if row % 3 == 0 else "b" for row in range(len(rows))]
    rows.to_csv(tmp_path / "several.csv", index=False)
    fields = Fields(["review"], ["age"], [], "mood", separator="|")
    found = data(tmp_path / "several.csv", fields=fields)
    assert found.several and list(found.labels) == ["a", "b"]
    assert found.target.sum(0).tolist() == [rows["mood"].eq("a|b").sum(), rows["mood"].notna().sum()]
    inputs, counts = found.model_inputs, found.class_counts
    task = TextClassifier(inputs, True, counts, arguments=SMALL, class_weights="balanced")
    a, b, total = found.class_counts
    assert task.weight.tolist() == pytest.approx([(total - a) / a, (total - b) / b])


def test_rows_without_a_label(table, tmp_path):
    rows = frame()
    rows.loc[[4, 9], "mood"] = None
    path = tmp_path / "gaps.csv"
    rows.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"line 6: nothing in the label column 'mood' \(2 such rows"):
        data(path)
    found = data(path, unlabelled="skip")
    assert sum(map(len, found.rows.values())) == 118
    rows["age"] = rows["age"].astype(object)
    rows.loc[60, "age"] = "forty"
    rows.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"line 62: column 'age' holds 'forty'"):
        data(path, unlabelled="skip")


def broken(name, value):
    rows = frame()
    rows[name] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (broken("age", None), "no training row has a number in 'age'"),
        (broken("town", ""), "no training row has a category in 'town'"),
        (broken("mood", "glad"), "1 classes; 2 are needed"),
        (broken("review", None).assign(title=None), "no training row has a text"),
        (frame().drop(columns="gender"), "no column 'gender'"),
        (frame().iloc[:0], "has no rows"),
    ],
    ids=["numbers", "categories", "classes", "texts", "column", "rows"],
)
def test_tables_that_cannot_be_used(rows, message, tmp_path):
    rows.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(DataError, match=message):
        data(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fields([], ["a"]), "texts names no column"),
        (lambda: Fields(["a"]), "no variables"),
        (lambda: Fields(["a"], ["a"]), "'a' is named twice"),
        (lambda: Dividing(0.5, 0.5), "together below 1"),
        (lambda: Dividing(group="a", column="b"), "only one of them"),
        (lambda: Batches(0), "at least one row"),
        (lambda: TextLimits(max_tokens=1), "at least 2"),
        (lambda: TextClassifier({"classes": 2}, False, [1, 1, 2], "bert4rec"), "is for recommendation"),
        (lambda: TextClassifier({"classes": 2}, False, [1, 1, 2], arguments={"classes": 3}), "by the data"),
    ],
)
def test_options_that_do_not_go_together(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_class_weights():
    inputs = {"vocab_size": 300, "classes": 3, "numeric": 1, "categories": [2], "positions": 62}
    balanced = TextClassifier(inputs, False, [10, 20, 70, 100], arguments=SMALL, class_weights="balanced")
    torch.testing.assert_close(balanced.weight, 100 / (3 * torch.tensor([10.0, 20.0, 70.0])))
    with pytest.raises(UsageError, match="class_weights takes 3 weights"):
        TextClassifier(inputs, False, [10, 20, 70, 100], arguments=SMALL, class_weights=[1.0, 2.0])


def area(yes, score) -> float:
    """How often a yes has a higher score than a no; ties count half."""
    pairs = score[yes][:, None] - score[~yes][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def f1(yes, answer) -> float:
    return 2 * float((yes & answer).sum()) / max(1, yes.sum() + answer.sum())


def test_figures_are_their_definitions():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=draw).round(decimals=1)
    target = torch.randint(0, 3, (200,), generator=draw)
    found, p = figures(logits, target), logits.double().softmax(1).numpy()
    true, best = target.numpy(), logits.argmax(1).numpy()
    assert found["accuracy"] == pytest.approx((true == best).mean())
    assert found["macro_f1"] == pytest.approx(np.mean([f1(true == k, best == k) for k in range(4)]))
    areas = [area(true == k, p[:, k]) for k in range(3)]  # nobody is of class 3
    assert found["roc_auc"] == pytest.approx(np.mean(areas))
    labels = torch.rand(200, 4, generator=draw) < 0.3
    found, yes, score = figures(logits, labels.float()), labels.numpy(), logits.numpy()
    assert found["accuracy"] == pytest.approx(((score > 0) == yes).mean())
    assert found["macro_f1"] == pytest.approx(np.mean([f1(yes[:, k], score[:, k] > 0) for k in range(4)]))
    assert found["roc_auc"] == pytest.approx(np.mean([area(yes[:, k], score[:, k]) for k in range(4)]))
    assert math.isnan(figures(logits, torch.zeros(200).long())["roc_auc"])


@pytest.fixture
def predictor(table, tmp_path):
    found = data(table)
    arguments = found.model_inputs | SMALL
    torch.manual_seed(0)
    hub.save(
        tmp_path / "model", create_model("cross_attention_fusion", **arguments), domain="recsys",
        name="cross_attention_fusion", arguments=arguments, preprocessing=found.preprocessing(),
        labels=list(found.labels),
    )  # fmt: skip
    return hub.load(tmp_path / "model")


def test_rows_of_a_file_of_a_frame_and_one_by_one(predictor, table):
    assert isinstance(predictor, Predictor)
    assert list(predictor.columns) == [
        "id", "label", "probability", "label_2", "probability_2", "label_3", "probability_3",
    ]  # fmt: skip
    rows = predictor.predict(str(table))
    assert rows["id"].tolist() == frame()["key"].tolist()
    assert rows[["probability", "probability_2", "probability_3"]].sum(axis=1).to_numpy() == pytest.approx(1)
    assert (rows["probability"] >= rows["probability_2"]).all()
    whole = predictor.predict(frame())
    pd.testing.assert_frame_equal(rows, whole)
    alone = pd.concat([predictor.predict(frame().iloc[[row]]) for row in (0, 17, 33)], ignore_index=True)
    pd.testing.assert_frame_equal(alone, rows.iloc[[0, 17, 33]].reset_index(drop=True), rtol=1e-5)
    shards = predictor.shards([str(table)], 50)
    assert [predictor.count(shard) for shard in shards] == [50, 50, 20]
    assert [record.id for shard in shards for record in predictor.read(shard)] == rows["id"].tolist()


def test_settings_of_prediction(predictor, table):
    one = predictor.predict(str(table), top_k=1)
    assert list(one.columns) == ["id", "label", "probability"]
    all_of = predictor.predict(str(table), output_kind="probabilities")
    assert np.stack(all_of["probabilities"]).max(1) == pytest.approx(one["probability"].to_numpy())
    for settings, message in (
        ({"output_kind": "labels"}, "did you mean 'label'"),
        ({"top_k": 0}, "--top-k takes 1 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            predictor.predict(str(table), **settings)


def test_sources_that_cannot_be_used(predictor, table, tmp_path):
    for source, error, message in (
        (str(tmp_path / "none.csv"), UsageError, "no file or folder"),
        (5, UsageError, "rows come from"),
        (frame().drop(columns="age"), DataError, "no column 'age'"),
        ([str(table), str(table)], UsageError, "two files are called 'table'"),
    ):
        with pytest.raises(error, match=message):
            predictor.shards(source, 10)


def test_damaged_folders_are_refused(predictor, table):
    kept = data(table).preprocessing()
    about = {"name": "cross_attention_fusion", "arguments": data(table).model_inputs | SMALL}
    for change, message in (
        ({"mean": [math.nan]}, "not that of texts and variables"),
        ({"std": [0.0]}, "not that of texts and variables"),
        ({"kinds": [["f", "m"]]}, "not that of texts and variables"),
        ({"hidden": "all"}, "not that of texts and variables"),
        ({"fields": {"texts": []}}, "fields cannot be read"),
        ({"tokens": "AAAA"}, "vocabulary of texts"),
        ({"labels": ["a", "b"]}, "has classes 2, its model 3"),
        ({"more": 1}, "preprocessing has"),
    ):
        config = ModelConfig(
            format_version=1, domain="recsys", preprocessing=kept | change, labels=None, training={},
            weights_sha256="0" * 64, **about,
        )  # fmt: skip
        with pytest.raises(DataError, match=message):
            Predictor.from_folder(predictor.model, config)


def test_opinions_of_movielens(movielens, tmp_path):
    folder = movielens.folder("ml_100k")
    write_opinions(folder, tmp_path / "opinions.parquet")
    rows = pd.read_parquet(tmp_path / "opinions.parquet")
    assert len(rows) == 100_000 and rows["user_id"].nunique() == 943 and rows["item_id"].nunique() == 1682
    assert rows["liked"].eq("yes").sum() == 55_375
    first = rows.iloc[0]
    assert (first["user_id"], first["title"], first["age"]) == ("196", "Kolya (1996)", 49)
    assert (first["gender"], first["occupation"], first["genres"], first["liked"]) == (
        "M", "writer", "Comedy", "no",
    )  # fmt: skip

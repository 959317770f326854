"""Series classification: reading, splitting, the model on each encoder, training, prediction."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import manyheads
from manyheads.apps import cli
from manyheads.core.errors import DataError, UsageError
from manyheads.core.predictor import predict
from manyheads.timeseries.classification.data import LabelledData, pad, stratified
from manyheads.timeseries.classification.labelled import read_archive, read_long
from manyheads.timeseries.models.classifier import ENCODERS, classifier
from manyheads.timeseries.scaling import StandardScaler

SMALL = {"d_model": 16, "d_ff": 16, "e_layers": 1, "dropout": 0.0}


def waves(n: int = 60, seed: int = 0) -> pd.DataFrame:
    """Two classes, told apart by their frequency; lengths 12 to 20, two channels."""
    rng, frames = np.random.default_rng(seed), []
    for i in range(n):
        fast, length = i % 2 == 1, int(rng.integers(12, 21))
        phase = rng.uniform(0, 6) + np.arange(length) * (1.6 if fast else 0.4)
        values = {"a": np.sin(phase), "b": np.cos(phase) + 0.1 * rng.normal(size=length)}
        steps = np.arange(length)
        frames.append(
            pd.DataFrame({"id": f"s{i}", "time": steps, "label": "fast" if fast else "slow"} | values)
        )
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "waves.csv"
    waves().to_csv(path, index=False)
    return path


def test_a_long_table(table: Path) -> None:
    found = read_long(table, "label")
    assert found.columns == ("a", "b")
    assert found.ids[:3] == ["s0", "s1", "s2"]
    assert found.labels[:3] == ["slow", "fast", "slow"]
    frame = pd.read_csv(table)
    np.testing.assert_allclose(found.values[7], frame[frame.id == "s7"][["a", "b"]], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns="label"), "no label column 'label'"),
        (lambda f: f.rename(columns={"id": "name"}), "no usual id column; name it with id_column"),
        (
            lambda f: f.assign(label=["x", *f.label[1:]]),
            "line 3: series 's0' has label 'slow', but 'x' before",
        ),
        (lambda f: f.assign(label=[None, *f.label[1:]]), "line 2: nothing in column 'label'"),
        (lambda f: f.assign(a=["one", *f.a[1:]]), "line 2, column 'a'"),
        (lambda f: f[["id", "time", "label"]], "no channel beside"),
    ],
)
def test_tables_that_are_wrong(table: Path, change, says: str) -> None:
    change(pd.read_csv(table)).to_csv(table, index=False)
    with pytest.raises(DataError, match=says.replace("(", r"\(")):
        read_long(table, "label")


def test_an_archive(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {"X_train": x, "y_train": ["u", "v"], "len_train": [2, 4], "X_test": x, "y_test": ["u", "u"]}
    np.savez(tmp_path / "a.npz", **arrays)
    train, test = read_archive(tmp_path / "a.npz")
    assert [each.shape for each in train.values] == [(2, 3), (4, 3)]
    assert [each.shape for each in test.values] == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(train.values[1], x[1].T)
    np.savez(tmp_path / "b.npz", **{**arrays, "len_train": [2, 5]})
    with pytest.raises(DataError, match="no steps, or more than its array"):
        read_archive(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", **{**arrays, "y_train": np.array([{}, {}], object)})
    with pytest.raises(DataError, match="cannot be read"):  # objects would be run as code
        read_archive(tmp_path / "c.npz")


def test_the_split_keeps_every_class_in_the_train_part() -> None:
    labels = ["a"] * 10 + ["b"] * 5 + ["c"]
    first, second = stratified(labels, 0.2, seed=3)
    assert sorted(first + second) == list(range(16))
    assert [labels[i] for i in second] == ["a", "a", "b"]
    assert stratified(labels, 0.2, seed=3) == (first, second)


def test_padding_is_marked_and_longer_series_keep_their_end() -> None:
    scaler = StandardScaler(("v",), np.array([1.0]), np.array([2.0]))
    values = [np.array([[3.0], [np.nan], [5.0]], np.float32), np.arange(6, dtype=np.float32)[:, None]]
    x, observed = pad(values, scaler, 4)
    assert x[0, :, 0].tolist() == [1.0, 1.0, 2.0, 0.0]  # the gap takes the value before it
    assert observed[0].tolist() == [True, True, True, False]
    assert x[1, :, 0].tolist() == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("base", ENCODERS)
def test_every_encoder_classifies_and_ignores_padding_where_it_can(base: str) -> None:
    model = classifier(base, seq_len=20, channels=3, classes=4, arguments=SMALL)
    x, observed = torch.randn(5, 20, 3), torch.ones(5, 20, dtype=torch.bool)
    logits = model(x, observed)
    assert logits.shape == (5, 4)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_tokens_of_padded_steps_do_not_count() -> None:
    model = classifier("informer", 20, 3, 4, SMALL | {"distil": False}).eval()
    x, observed = torch.randn(1, 20, 3), torch.arange(20)[None] < 12
    tokens = torch.nn.functional.gelu(model._encode(x))[0, 0]
    expected = model.projection(tokens[:12].mean(dim=0))
    torch.testing.assert_close(model(x, observed)[0], expected)


def test_options_that_are_wrong() -> None:
    with pytest.raises(UsageError, match="no encoder 'dlinear'"):
        classifier("dlinear", 20, 3, 4)
    with pytest.raises(UsageError, match="did you mean 'd_model'"):
        classifier("informer", 20, 3, 4, {"d_modell": 8})
    with pytest.raises(UsageError, match="classes must be a positive integer"):
        classifier("informer", 20, 3, 0)
    with pytest.raises(UsageError, match="val_share must lie between 0 and 1"):
        LabelledData(val_share=1.0)


def test_data_splits_scales_and_says_its_sizes(table: Path) -> None:
    data = LabelledData(str(table), batch_size=8, seed=1)
    assert (data.seq_len, data.channels, data.classes) == (20, 2, 2)
    counts = [len(s) for s in (data.train_samples, data.val_samples, data.test_samples)]
    assert counts == [38, 10, 12]
    train = data.train_samples
    values = train.x[train.observed]  # standardised by the train series alone
    torch.testing.assert_close(values.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(values.std(dim=0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    batches = list(data.train_dataloader())
    assert [len(batch["y"]) for batch in batches] == [8, 8, 8, 8, 6]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, fitted on the waves through the command line."""
    folder = tmp_path_factory.mktemp("waves")
    waves(120).to_csv(folder / "waves.csv", index=False)
    options = {
        "--config": folder / "waves.yaml",
        "--output": folder / "run",
        "--data.dataset": folder / "waves.csv",
        "--trainer.max_epochs": 12,
        "--patience": 12,
    }
    (folder / "waves.yaml").write_text(
        "task: classification\nmodel: {arguments: {d_model: 16, d_ff: 16, e_layers: 1, distil: false}}\n"
    )
    args = [str(part) for option in options.items() for part in option]
    assert cli.main(["timeseries", "fit", *args]) == 0
    assert cli.main(["timeseries", "test", *args]) == 0
    return folder


def test_training_reaches_what_the_waves_allow(trained: Path) -> None:
    figures = json.loads((trained / "run/test.json").read_text())
    assert figures["test_accuracy"] == 1.0
    assert figures["test_series"] == 24


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_prediction_of_new_series(trained: Path, tmp_path: Path, kind: str) -> None:
    frame = waves(30, seed=5)
    source = frame.drop(columns="label")
    path = tmp_path / f"new.{kind}"
    if kind == "csv":
        source.to_csv(path, index=False)
    elif kind == "parquet":
        source.to_parquet(path)
    predictor = manyheads.load(trained / "run")
    found = predictor.predict(source if kind == "frame" else path)
    truth = frame.groupby("id", sort=False).label.first()
    assert found.columns.tolist() == ["unique_id", "label", "probability", "p_fast", "p_slow"]
    assert found.unique_id.tolist() == truth.index.tolist()
    assert (found.label.to_numpy() == truth.to_numpy()).mean() >= 0.96
    np.testing.assert_allclose(found.p_fast + found.p_slow, 1.0, rtol=1e-12)
    np.testing.assert_array_equal(found[["p_fast", "p_slow"]].max(axis=1), found.probability)
    one = pd.concat(predict(predictor, source[source.id == name], 1) for name in truth.index)
    np.testing.assert_allclose(one.p_fast, found.p_fast, atol=1e-6)  # a batch's rows are those one by one


def test_a_job_sets_bad_series_aside(trained: Path, tmp_path: Path) -> None:
    frame = waves(12, seed=6).drop(columns="label").astype({"a": object})
    frame.loc[frame.index[frame.id == "s3"][2], "a"] = "broken"
    frame.to_csv(tmp_path / "new.csv", index=False)
    args = [
        "predict",
        str(trained / "run"),
        str(tmp_path / "new.csv"),
        "-o",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert cli.main([*args, "--max-bad", "0.2"]) == 0
    rows = pd.concat(pd.read_parquet(part) for part in sorted((tmp_path / "out").glob("part-*.parquet")))
    assert rows.unique_id.tolist() == [f"s{i}" for i in range(12) if i != 3]
    (bad,) = [json.loads(line) for line in next((tmp_path / "out").glob("bad-*")).read_text().splitlines()]
    assert bad["id"] == "s3"
    assert "column 'a'" in bad["reason"]
    assert "line" in bad["reason"]


def test_columns_that_the_model_does_not_know(trained: Path) -> None:
    predictor = manyheads.load(trained / "run")
    with pytest.raises(DataError, match="no column 'b'"):
        predictor.predict(waves(2)[["id", "a"]])

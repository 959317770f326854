"""Windows rebuilt from themselves: gaps, models, data, scores, and training through the command line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import manyheads
from manyheads.apps import cli
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.models.reconstructor import BASES, reconstructor
from manyheads.timeseries.reconstruction.data import DetectionData, ImputationData
from manyheads.timeseries.reconstruction.masks import draw_gaps, last_value, linear, turns
from manyheads.timeseries.reconstruction.scores import figures, fit_thresholds, rebuild, row_scores
from manyheads.timeseries.reconstruction.task import Detector

L = 24
SMALL = {"d_model": 16, "e_layers": 1, "dropout": 0.0}


def hours(rows: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Three variates with a daily cycle each, so that one tells of the others, and some noise."""
    rng = np.random.default_rng(seed)
    phase = np.arange(rows)[:, None] * 2 * np.pi / 24 + np.array([0.0, 1.0, 2.0])
    values = 10 * np.sin(phase) + rng.normal(size=(rows, 3)) + [0.0, 50.0, -20.0]
    index = pd.date_range("2024-01-01", periods=rows, freq="h", name="date")
    return pd.DataFrame(values, columns=["a", "b", "c"], index=index)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    hours().to_csv(tmp_path / "hours.csv")
    return tmp_path / "hours.csv"


def small(base: str) -> dict[str, bool | int | float | str | None]:
    return {} if base == "dlinear" else SMALL


@pytest.mark.parametrize("base", BASES)
def test_every_base_reads_what_is_observed_alone_and_keeps_units(base: str) -> None:
    model = reconstructor(base, L, 3, small(base)).eval()
    x, observed = torch.randn(2, L, 3), torch.rand(2, L, 3) > 0.3
    marks = torch.randn(2, L, 4)
    made = model(x, observed, marks)
    assert made.shape == x.shape
    nonsense = torch.where(observed, x, torch.full_like(x, float("nan")))
    torch.testing.assert_close(model(nonsense, observed, marks), made)
    torch.testing.assert_close(model(x * 50 + 300, observed, marks), made * 50 + 300, atol=0.05, rtol=1e-3)
    shown = model(x, torch.ones_like(observed), marks)
    assert not torch.allclose(shown, made)
    made.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_windows_that_are_constant_or_empty() -> None:
    model = reconstructor("itransformer", L, 3, SMALL).eval()
    x, observed = torch.randn(1, L, 3), torch.ones(1, L, 3, dtype=torch.bool)
    x[..., 0], observed[..., 1] = 7.0, False
    observed[:, 5, 0] = False
    made = model(x, observed)
    assert made.isfinite().all()
    assert (made[..., 0] - 7).abs().max() < 0.02  # within some deviations of what is added to none
    assert model(x, torch.zeros_like(observed)).isfinite().all()


@pytest.mark.parametrize(
    ("base", "channels", "arguments", "says"),
    [
        ("itransfromer", 3, {}, "no base 'itransfromer' to reconstruct with; did you mean 'itransformer'"),
        ("seasonal_naive", 3, {}, "no base 'seasonal_naive'"),
        ("itransformer", 0, {}, "channels must be a positive integer"),
        ("itransformer", 3, {"use_norm": True}, "use_norm is no option here"),
        ("informer", 3, {"distil": True}, "distil halves the steps"),
        ("dlinear", 3, {"d_model": 8}, "dlinear takes no argument 'd_model'"),
    ],
)
def test_models_that_are_not_possible(base: str, channels: int, arguments: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        reconstructor(base, L, channels, arguments)


@pytest.mark.parametrize("gap", [1, 5])
def test_gaps_have_the_ratio_and_the_length(gap: int) -> None:
    hidden = draw_gaps(torch.rand(200, 100 + gap - 1, 4), 0.3, gap)
    assert hidden.shape == (200, 100, 4)
    assert abs(hidden.float().mean().item() - 0.3) < 0.01
    assert abs(hidden[:, 0].float().mean().item() - 0.3) < 0.05  # at the edge too
    flat = np.concatenate(
        [np.zeros((1, 800)), hidden.permute(1, 0, 2).reshape(100, -1).numpy(), np.zeros((1, 800))]
    )
    change = np.diff(flat, axis=0).T
    starts, ends = np.argwhere(change == 1)[:, 1], np.argwhere(change == -1)[:, 1]
    inner = (starts > 0) & (ends < 100)
    assert (ends - starts)[inner].min() == gap


def test_plain_fillings() -> None:
    nan = float("nan")
    x = torch.tensor([nan, 1.0, nan, nan, 4.0, nan])[None, :, None]
    observed = ~x.isnan()
    assert linear(x, observed).flatten().tolist() == [1.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert last_value(x, observed).flatten().tolist() == [1.0, 1.0, 1.0, 1.0, 4.0, 4.0]
    nothing = torch.zeros(1, 6, 1, dtype=torch.bool)
    assert linear(x, nothing).flatten().tolist() == [0.0] * 6
    rng = np.random.default_rng(0)
    values = np.where(rng.random((50, 3)) < 0.4, np.nan, rng.normal(size=(50, 3)))
    expected = pd.DataFrame(values).interpolate(limit_direction="both")
    got = linear(torch.from_numpy(values)[None], ~torch.from_numpy(values).isnan()[None])[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_imputation_data_hides_the_same_cells_whatever_the_batches(table: Path) -> None:
    def hidden(batch_size: int, seed: int = 0) -> Tensor:
        data = ImputationData(str(table), L, batch_size, mask_ratio=0.4, gap=3, seed=seed)
        return torch.cat([batch["hidden"] for batch in data.test_dataloader()])

    found = hidden(7)
    assert found.shape == (200 + L - L + 1, L, 3)  # as the forecasters' protocol: a window's length back
    torch.testing.assert_close(found, hidden(16))
    assert not torch.equal(found, hidden(7, seed=1))
    assert abs(found.float().mean().item() - 0.4) < 0.02
    data = ImputationData(str(table), L, 8)
    first, second = (next(iter(data.train_dataloader()))["hidden"] for _ in range(2))
    assert not torch.equal(first, second)  # training hides others each time


def test_cells_that_are_missing_anyway_are_never_asked_for(tmp_path: Path) -> None:
    frame = hours()
    frame.iloc[850:880, 1] = np.nan
    frame.to_csv(tmp_path / "gaps.csv")
    batch = next(iter(ImputationData(str(tmp_path / "gaps.csv"), L, 500, mask_ratio=0.5).test_dataloader()))
    assert (~batch["observed"]).sum() > 0
    assert not (batch["hidden"] & ~batch["observed"]).any()
    assert batch["x"].isfinite().all()


def test_detection_data_goes_once_over_each_row(table: Path) -> None:
    frame = hours(1000).assign(bad=(np.arange(1000) % 10 == 0).astype(int))
    frame.to_csv(table)
    data = DetectionData(str(table), L, 3, label_column="bad")
    assert data.parts.columns == ("a", "b", "c")
    batches = list(data.test_dataloader())
    fresh = torch.cat([batch["fresh"] for batch in batches])
    assert fresh.sum() == 200  # a fifth
    assert fresh[:-1].all()
    assert fresh[-1].tolist() == [False] * (L - 200 % L) + [True] * (200 % L)
    labels = torch.cat([batch["label"][batch["fresh"]] for batch in batches])
    np.testing.assert_array_equal(labels, frame["bad"][800:])
    rows = torch.cat([batch["x"][batch["fresh"]] for batch in batches]).numpy()
    expected = data.parts.treatment.scaler.transform(frame[["a", "b", "c"]].to_numpy()[800:])
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.assign(bad=2), "column 'bad': '2' is no label"),
        (lambda f: f.assign(bed=0), "no label column 'bad'; did you mean 'bed'"),
        (lambda f: f.assign(bad=0, b=np.nan), "column 'b': missing value"),
        (lambda f: f.assign(bad=0)[:80], "too short: the validation part has no window of 24 rows"),
    ],
)
def test_tables_that_are_wrong(table: Path, change, says: str) -> None:
    change(hours()).to_csv(table)
    with pytest.raises(DataError, match=says):
        DetectionData(str(table), L, label_column="bad").setup()


def test_a_column_without_any_value(table: Path) -> None:
    hours().assign(b=np.nan).to_csv(table)
    with pytest.raises(DataError, match="column 'b' has no value in the train rows"):
        ImputationData(str(table), L).setup()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_options_that_are_wrong(ratio: float) -> None:
    with pytest.raises(UsageError, match="mask_ratio must lie between 0 and 1"):
        ImputationData(mask_ratio=ratio)
    with pytest.raises(UsageError, match="gap must be 1 or more and shorter than the window of 96"):
        ImputationData(gap=96)
    with pytest.raises(UsageError, match="quantile must lie between 0 and 1"):
        Detector(3, arguments=SMALL, quantile=ratio)
    with pytest.raises(UsageError, match="passes 0"):
        Detector(3, arguments=SMALL, passes=0)


class Around(nn.Module):
    """Rebuilds every cell as the sum of what is observed of its column; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor, observed: Tensor, x_mark: Tensor) -> Tensor:
        self.shown.append(observed)
        return torch.where(observed, x, 0.0).sum(dim=1, keepdim=True).expand_as(x)


def test_each_cell_is_rebuilt_without_itself() -> None:
    x, observed, model = torch.randn(2, 12, 3), torch.ones(2, 12, 3, dtype=torch.bool), Around()
    made = rebuild(model, x, observed, x, passes=3, gap=2)
    assert sum((~each).int() for each in model.shown).eq(1).all()  # each is hidden once
    turn = turns(12, 3, 3, 2)
    assert turn[:7, 0].tolist() == [0, 0, 1, 1, 2, 2, 0]
    for t in range(12):
        same = turn[:, 1] == turn[t, 1]
        torch.testing.assert_close(made[:, t, 1], x[:, ~same, 1].sum(dim=1))
    whole = rebuild(model, x, observed, x, passes=1, gap=2)
    torch.testing.assert_close(whole[:, 0], x.sum(dim=1))


def test_scores_thresholds_and_figures() -> None:
    x = torch.tensor([[0.0, 3.0], [2.0, 9.0], [1.0, 1.0]])
    observed = torch.tensor([[True, True], [True, False], [False, False]])
    scores = row_scores(torch.zeros(3, 2), x, observed)
    expected = torch.tensor([[4.5, 0.0, 9.0], [4.0, 4.0, np.nan], [np.nan] * 3], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, equal_nan=True)
    thresholds = fit_thresholds(scores, 0.5, ("u", "v"))
    assert thresholds.tolist() == [4.25, 2.0, 9.0]
    with pytest.raises(DataError, match="column 'v' has no value in the validation rows"):
        fit_thresholds(scores[1:], 0.5, ("u", "v"))
    rows = torch.tensor([1.0, 200.0, 30.0, 4e5, np.nan, 7.0], dtype=torch.float64)
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, np.nan])
    found = figures(rows, labels, torch.tensor(10.0))
    assert {name: round(value.item(), 6) for name, value in found.items()} == {
        "precision": round(2 / 3, 6),
        "recall": 1.0,
        "f1": 0.8,
        "auroc": 1.0,
    }
    found = figures(rows, torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), torch.tensor(250.0))
    assert found["auroc"].item() == pytest.approx(5 / 6)  # of the pairs
    assert found["recall"] == 0.5  # nothing is adjusted to a neighbour
    with pytest.raises(DataError, match="the 2 labelled test rows are all usual"):
        figures(rows[:2], torch.zeros(2), torch.tensor(1.0))


def fit(folder: Path, task: str, table: Path, **more: object) -> dict[str, float]:
    """Fit and test through the command line; return the test's figures."""
    config = folder / f"{task}.yaml"
    arguments = "{d_model: 32, d_ff: 32, n_heads: 2, e_layers: 1, dropout: 0.0}"
    config.write_text(f"task: {task}\nmodel: {{arguments: {arguments}, learning_rate: 0.003}}\n")
    options = {"config": config, "output": folder / task, "data.dataset": table, "data.seq_len": L, **more}
    args = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    assert cli.main(["timeseries", "fit", *args]) == 0
    assert cli.main(["timeseries", "test", *args]) == 0
    return json.loads((folder / task / "test.json").read_text())


@pytest.mark.parametrize(("fill", "share"), [("zeros", 0.85), ("line", 0.6)])
def test_imputation_learns_more_than_interpolation_knows(
    table: Path, tmp_path: Path, fill: str, share: float
) -> None:
    more = {"data.gap": 4, "trainer.max_epochs": 10, "model.lr_decay": 1.0, "model.fill": fill}
    found = fit(tmp_path, "imputation", table, **more)
    assert found["test_windows"] == 201
    assert found["test_mse"] < share * found["test_mse_linear"] < share * found["test_mse_last"]
    assert found["test_mae"] < found["test_mae_linear"]
    again = tmp_path / "imputation/test.json"
    before = again.read_text()
    args = ["--config", str(tmp_path / "imputation/config.yaml"), "--data.batch_size", "50"]
    assert cli.main(["timeseries", "test", *args]) == 0
    for name, value in json.loads(again.read_text()).items():
        assert value == pytest.approx(json.loads(before)[name], rel=1e-5)


@pytest.mark.parametrize("passes", [1, 3])
def test_anomalies_are_told_from_usual_rows(table: Path, tmp_path: Path, passes: int) -> None:
    frame, at = hours(), np.arange(810, 1000, 17)
    frame.iloc[at, np.arange(len(at)) % 3] += 8.0
    frame.assign(bad=np.isin(np.arange(1000), at)).to_csv(table)  # truths are labels too
    more = {"data.label_column": "bad", "model.passes": passes, "model.gap": 2, "trainer.max_epochs": 5}
    found = fit(tmp_path, "anomaly", table, **more)
    assert found["test_rows"] == 200
    assert found["test_auroc"] > 0.95
    assert found["test_recall"] == 1
    assert found["test_flagged"] < 0.3  # rows beside an anomaly are rebuilt worse, too
    saved = json.loads((tmp_path / "anomaly/model/config.json").read_text())["preprocessing"]
    assert len(saved["thresholds"]) == 4
    assert (saved["passes"], saved["gap"]) == (passes, 2)
    rows = manyheads.load(tmp_path / "anomaly").predict(table)  # the label is no column of it
    assert set(rows["unique_id"]) == {"hours", "hours/a", "hours/b", "hours/c"}
    mine = rows[rows["unique_id"] == "hours"]
    assert len(mine) == 1000
    assert mine["anomaly"].to_numpy()[at].all()

"""Pictures: drawn whole, without touching matplotlib's state; attention maps by token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.timeseries.attention_map import attention_maps, token_names
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.plots import Panel, draw_attention, draw_forecasts
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.windows import Batch

ORANGE = np.array([0xD5, 0x5E, 0x00]) / 255


def panel(name: str, start: str = "2024-01-01", truth: bool = True) -> Panel:
    ds = np.datetime64(start, "us") + np.arange(60) * np.timedelta64(1, "h")
    values = np.sin(np.arange(60) / 4)
    fan = {0.05: values[40:] - 1, 0.5: values[40:], 0.95: values[40:] + 1}
    return Panel(name, ds[:40], values[:40], ds[40:], values[40:], fan, values[40:] if truth else None)


def test_forecasts_are_drawn_with_their_bands(tmp_path: Path) -> None:
    draw_forecasts([panel("a"), panel("b", truth=False)], tmp_path / "two.png", "two series")
    pixels = image.imread(tmp_path / "two.png")[..., :3]
    assert (pixels[0, 0] == 1).all()  # a light background
    assert (abs(pixels - ORANGE).max(axis=-1) < 0.02).sum() > 300  # the forecast's line
    band = 1 - 0.2 * (1 - ORANGE)
    assert (abs(pixels - band).max(axis=-1) < 0.02).sum() > 3000
    assert (pixels.max(axis=-1) < 0.02).sum() > 300  # the truth, and text


def test_series_of_other_times_have_axes_of_their_own(tmp_path: Path) -> None:
    for start in ("2024-01-01", "2020-01-01"):
        draw_forecasts([panel("a"), panel("b", start)], tmp_path / f"{start}.png", "")
    same, other = (image.imread(tmp_path / f"{start}.png") for start in ("2024-01-01", "2020-01-01"))
    assert not np.array_equal(same, other)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    picture = str(tmp_path / "x.png")
    code = (
        "import sys, numpy as np, matplotlib\n"
        "def state():  # asking for the backend would choose one\n"
        "    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = state()\n"
        "from pathlib import Path; from manyheads.timeseries.plots import draw_attention\n"
        "tokens = [('a', 'variate'), ('b', 'calendar')]\n"
        f"draw_attention(np.eye(2), tokens, Path({picture!r}), '')\n"
        "assert state() == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_large_attention_map_is_drawn(tmp_path: Path) -> None:
    n = 120
    tokens = [(f"variate number {i}", "variate" if i < 100 else "covariate") for i in range(n)]
    draw_attention(np.full((n, n), 1 / n), tokens, tmp_path / "large.png", "large")
    assert image.imread(tmp_path / "large.png").shape[0] > 1000


def saved(covariates: dict[str, object] | None = None) -> Preprocessing:
    more: dict[str, object] = {}
    if covariates:
        scaler = {"columns": ["price", "size"], "mean": [0.0, 0.0], "scale": [1.0, 1.0]}
        more = {"covariates": covariates, "covariate_scaler": scaler}
    return Preprocessing.from_json(
        {
            "seq_len": 8,
            "pred_len": 3,
            "columns": ["a", "b"],
            "targets": ["a", "b"],
            "time_column": None,
            "id_column": None,
            "freq": "h",
            "missing": "refuse",
            "time_features": list(feature_names("h")),
            "scaler": {"columns": ["a", "b"], "mean": [0.0, 0.0], "scale": [1.0, 1.0]},
            **more,
        }
    )


SIZES = {"d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 2}


def windows(**more: torch.Tensor) -> Batch:
    made = {"x": torch.randn(5, 8, 2), "y": torch.full((5, 3, 2), torch.nan)}
    made |= {"x_mark": torch.rand(5, 8, 4), "y_mark": torch.rand(5, 3, 4), **more}
    return made  # type: ignore[return-value]


def test_the_tokens_of_a_plain_model() -> None:
    model = create_model("itransformer", seq_len=8, pred_len=3, **SIZES).eval()
    tokens = token_names(model, saved(), ["a", "b"])
    assert [name for name, _ in tokens[:3]] == ["a", "b", "hour of day"]
    batch = windows()
    maps = attention_maps(model, batch)
    assert [each.shape for each in maps] == [(5, 2, len(tokens), len(tokens))] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(5, 2, len(tokens)))
    torch.testing.assert_close(maps, model.forward_with_attention(batch["x"], batch["x_mark"])[1])


def test_the_tokens_of_a_model_with_covariates_and_quantiles() -> None:
    roles = {
        "past": {"numeric": ["price"], "categories": {}},
        "future": {"numeric": [], "categories": {"day": ["fri", "sat", "sun"]}},
        "static": {"numeric": ["size"], "categories": {}},
    }
    of = saved(roles)
    sizes = of.treatment.covariates.sizes()
    model = create_model(
        "forecaster", base="itransformer", seq_len=8, pred_len=3, arguments=SIZES, output="quantile",
        quantiles=[0.1, 0.9], **sizes,
    ).eval()  # fmt: skip
    more = {"past": torch.randn(5, 8, 1), "future": torch.ones(5, 11, 1), "static": torch.randn(5, 1)}
    maps = attention_maps(model, windows(**more))
    tokens = token_names(model, of, ["a", "b"])
    assert tokens[-4:] == [(name, "covariate") for name in ("price", "day.0", "day.1", "size")]
    assert maps[1].shape == (5, 2, len(tokens), len(tokens))


@pytest.mark.parametrize("name", ["dlinear", "s_mamba"])
def test_other_models_have_no_map(name: str) -> None:
    arguments = {} if name == "dlinear" else {"d_model": 16, "d_ff": 16, "e_layers": 1}
    with pytest.raises(UsageError):
        attention_maps(create_model(name, seq_len=8, pred_len=3, **arguments).eval(), windows())

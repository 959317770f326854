"""The table of published figures."""

import subprocess
import sys

import pytest

from manyheads.core.catalog import find
from manyheads.timeseries import published as table
from manyheads.timeseries.published import Published, published


@pytest.mark.parametrize(
    ("dataset", "horizon", "model", "mse", "mae"),
    [
        ("etth1", 96, "itransformer", 0.386, 0.405),
        ("etth1", 720, "informer", 1.181, 0.865),
        ("etth2", 336, "s_mamba", 0.424, 0.431),
        ("exchange_rate", 192, "autoformer", 0.300, 0.369),
        ("exchange_rate", 96, "dlinear", 0.088, 0.218),
        ("weather", 96, "patchtst", 0.177, 0.218),
    ],
)
def test_figures(dataset: str, horizon: int, model: str, mse: float, mae: float) -> None:
    found = published(dataset, 96, horizon, model)
    assert found is not None
    assert (found.mse, found.mae) == (mse, mae)
    assert found.source


@pytest.mark.parametrize(
    "asked",
    [
        ("etth1", 336, 96, "itransformer"),  # another history
        ("etth1", 96, 48, "itransformer"),
        ("etth9", 96, 96, "itransformer"),
        ("etth1", 96, 96, "seasonal_naive"),
        ("exchange_rate", 96, 96, "s_mamba"),  # not in the source
    ],
)
def test_what_was_not_published_is_none(asked: tuple[str, int, int, str]) -> None:
    assert published(*asked) is None


def test_every_cell_is_of_a_catalogue_model_and_plausible() -> None:
    names, *rows = (line.split() for line in table.TABLE.strip().splitlines())
    assert names[2:] == list(table.SOURCES)
    assert all(find(name).task == "forecast" for name in table.SOURCES)
    assert len({(row[0], row[1]) for row in rows}) == len(rows) == 28
    for dataset, horizon, *cells in rows:
        for name, cell in zip(table.SOURCES, cells, strict=True):
            found = published(dataset, 96, int(horizon), name)
            assert found is None if cell == "-" else isinstance(found, Published)
            assert found is None or 0.05 < found.mse < 6 > found.mae > 0.1


def test_the_table_imports_no_torch() -> None:
    code = "import sys, manyheads.timeseries.published; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

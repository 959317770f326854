"""A trained model of each task leaves for both formats, compared on what its predictor prepares."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Small = Callable[..., list[str]]
SOURCES = {
    "timeseries": "hours.csv",
    "imputation": "hours.csv",
    "anomaly": "hours.csv",
    "vision": "images",
    "graph": "molecules.csv",
    "recsys": "log.csv",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOURCES, "recognition", "separation"])
def test_a_trained_model_is_exported(
    name: str, command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    """pytest -m slow tests/apps/scaling/test_exported.py (four minutes)."""
    args = small(name)
    assert command(*args, "--trainer.max_epochs", 1, "--output", tmp_path) == 0, command.printed
    folder = Path(args[args.index("--patience") - 5]).parent
    check = ("--check", folder / SOURCES[name]) if name in SOURCES else ()
    for format in ("torch", "onnx"):
        path = tmp_path / ("model.pt2" if format == "torch" else "model.onnx")
        made = command("export", tmp_path, "--format", format, "-o", path, *check)
        assert made == 0, command.printed
        parity = json.loads(path.with_name(f"{path.name}.json").read_text())["parity"]
        assert parity["inputs"].startswith("of ")  # no random numbers
        assert all(each["largest"] > 0 for each in parity["batches"])

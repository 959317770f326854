"""The picture of a training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from manyheads.apps.curves import draw_curves, read_log

FIRST = "epoch,step,train_loss,val_loss,val_ndcg@10\n0,9,2.0,,\n0,9,,2.1,0.05\n1,19,1.5,,\n1,19,,1.6,0.09\n"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(FIRST)
    return tmp_path / "logs"


def test_a_resumed_run_is_read_as_one(logs: Path) -> None:
    later = logs / "version_1"
    later.mkdir()
    (later / "metrics.csv").write_text("epoch,step,train_loss,val_loss\n1,19,1.4,\n2,29,1.2,\n2,29,,1.3\n")
    table = read_log(logs)
    assert table.index.tolist() == [1, 2, 3]
    assert table["train_loss"].tolist() == [2.0, 1.4, 1.2]
    assert table["val_loss"].tolist() == [2.1, 1.6, 1.3]


def test_values_of_others_are_marked(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self))
    with caplog.at_level(logging.WARNING):
        draw_curves(logs, tmp_path / "curves.png", {"val_ndcg@10": 0.15, "val_ndcg@5": 0.1})
    left, right = drawn[0].axes
    assert len(left.lines) == 2  # both losses, no mark
    curve, mark = right.lines
    assert curve.get_ydata().tolist() == [0.05, 0.09]
    assert list(mark.get_ydata()) == [0.15, 0.15] and mark.get_color() == curve.get_color()
    assert "'val_ndcg@5'" in caplog.text

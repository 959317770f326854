"""What a test of a recommender leaves, of all questions or of the first batches alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from manyheads.recsys import report
from manyheads.recsys.evaluation import Ranked


@pytest.mark.parametrize("tested", [3, 2])
def test_ranks_beside_popularitys(tested: int, tmp_path: Path) -> None:
    popular = Ranked(np.array([0, 1, 2]), np.array([2, 0, 1]), np.array([3.0, 1.0, 2.0]))
    found = Ranked(*(part[:tested] for part in (*popular[:2], np.array([1.0, 1.5, 4.0]))))
    figures = dict.fromkeys((f"{name}@10" for name in ("hr", "ndcg", "mrr", "coverage", "novelty")), 0.5)
    lines = report.Tested(["u", "v", "w"], ["a", "b", "c"], found, popular, figures, figures, 10).write(
        tmp_path
    )
    assert lines[-1] == f"in {tmp_path}: {report.RANKS}, {report.PICTURE}"
    with (tmp_path / report.RANKS).open() as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [["u", "c", "1", "3"], ["v", "a", "1.5", "1"], ["w", "b", "4", "2"]][:tested]
    assert (tmp_path / report.PICTURE).stat().st_size > 1000

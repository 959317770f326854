"""The table of the graph data sets."""

from __future__ import annotations

from manyheads.core.datasets import DataSet

DATASETS: tuple[DataSet, ...] = ()

"""The table of the image data sets."""

from __future__ import annotations

from manyheads.core.datasets import DataSet

DATASETS: tuple[DataSet, ...] = ()

"""Nodes are laid out so that distances in the plane are like steps along edges, at every number of nodes."""

import numpy as np
import pytest

from manyheads.graph.pictures import layout


@pytest.mark.parametrize("nodes", [2, 3, 5, 9, 10, 30])
def test_a_path_is_laid_out_in_a_line(nodes: int) -> None:
    path = np.stack([np.arange(nodes - 1), np.arange(1, nodes)])
    places = layout(np.concatenate([path, path[::-1]], 1), nodes)
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert steps == pytest.approx(np.ones(nodes - 1), abs=0.2)
    assert np.linalg.norm(places[-1] - places[0]) > 0.7 * (nodes - 1)


def test_parts_without_edges_between_them_are_apart() -> None:
    places = layout(np.array([[0, 1, 2, 3], [1, 0, 3, 2]]), 4)
    assert np.linalg.norm(places[:2].mean(0) - places[2:].mean(0)) > 1

"""Pictures: what they say, and that nothing in them lies on something else."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_calibration_error

from manyheads.vision import pictures


def matrix(classes: int, per_class: int = 100) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    found = rng.multinomial(per_class, rng.dirichlet(np.full(classes, 0.1), classes))
    found[np.arange(classes), np.arange(classes)] += per_class
    return found.astype(np.int64)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts, of all axes and the figure, that share pixels."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text().strip() and text.get_visible()]  # type: ignore[attr-defined]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    shown = [(text, box) for text, box in boxes if box.width and figure.bbox.overlaps(box)]
    return [
        (a, b)
        for (a, first), (b, second) in combinations(shown, 2)
        if first.shrunk(0.9, 0.9).overlaps(second.shrunk(0.9, 0.9))
    ]


@pytest.mark.parametrize("classes", [2, 3, 10, 20, 21, 60, 61, 200])
def test_nothing_overlaps_in_a_confusion_matrix(classes: int) -> None:
    labels = [f"class number {i}, also called $x_{i}" for i in range(classes)]
    figure = pictures.confusion_figure(matrix(classes, 100_000), labels)
    assert not overlaps(figure)


def test_confusion_says_accuracy_names_and_counts() -> None:
    counts = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    figure = pictures.confusion_figure(counts, ["cat", "dog", "a fox"])
    axis = figure.axes[0]
    assert figure.get_suptitle() == "accuracy 0.8500 of 20 images, 3 classes\ngrey: 1 without images"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert [text.get_text() for text in axis.get_yticklabels()] == ["cat", "dog", "a fox"]
    written = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    assert written == {(0, 0): "8", (1, 0): "2", (0, 1): "1", (1, 1): "9"}
    shares = axis.images[0].get_array()
    assert shares is not None
    assert np.allclose(shares[:2], [[0.8, 0.2, 0], [0.1, 0.9, 0]])
    assert np.ma.getmaskarray(np.ma.masked_invalid(shares))[2].all()


def test_confusion_of_a_thousand_classes_names_the_worst_mistakes(tmp_path: Path) -> None:
    counts = 50 * np.eye(1000, dtype=np.int64)
    counts[3, 7], counts[900, 2] = 50, 20
    labels = [f"name {i}" for i in range(1000)]
    figure = pictures.confusion_figure(counts, labels)
    assert not overlaps(figure)
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts[1:] == [
        "50% of name 3 (3)\n      taken for name 7 (7)",
        "29% of name 900 (900)\n      taken for name 2 (2)",
    ]
    drawn = figure.axes[0].images[0].get_array()
    assert drawn is not None
    assert np.allclose(drawn[898:903, 1:4].max(), 20 / 70)
    pictures.draw_confusion(counts, labels, tmp_path / "c.png")
    pixels = image.imread(tmp_path / "c.png")
    assert pixels.shape[1] > 1000  # a pixel a class at least
    assert pixels[..., :3].std() > 0.01


@pytest.mark.parametrize(
    ("counts", "labels", "message"),
    [
        (np.ones((2, 3)), ["a", "b"], "need a matrix"),
        (np.ones((2, 2)), ["a", "b", "c"], "need a matrix"),
        (np.zeros((2, 2)), ["a", "b"], "counts nothing"),
    ],
)
def test_confusion_refuses(counts: NDArray[np.float64], labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.confusion_figure(counts, labels)


def predictions(count: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rng = np.random.default_rng(1)
    confidences = rng.uniform(0.3, 1, count)
    return confidences, rng.uniform(size=count) < confidences**2


def test_calibration_error_is_that_of_torchmetrics() -> None:
    confidences, correct = predictions()
    expected = binary_calibration_error(
        torch.from_numpy(confidences), torch.from_numpy(correct).long(), n_bins=pictures.BINS
    )
    assert pictures.calibration_error(confidences, correct) == pytest.approx(expected.item(), abs=1e-6)


def test_reliability_shows_before_and_after() -> None:
    confidences, correct = predictions()
    figure = pictures.reliability_figure(np.stack([confidences, confidences**2]), correct, 1.7)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    before, after = (pictures.calibration_error(each, correct) for each in (confidences, confidences**2))
    assert texts == [
        "as sure as right",
        f"before: ECE {before:.4f}",
        f"after, temperature 1.7: ECE {after:.4f}",
    ]
    assert before > 3 * after
    top, bottom = figure.axes
    assert len(top.patches) == len(bottom.patches) == 2 * pictures.BINS
    assert sum(bar.get_height() for bar in bottom.patches) == pytest.approx(2)  # type: ignore[attr-defined]
    assert not overlaps(figure)


def test_reliability_of_one_set(tmp_path: Path) -> None:
    confidences, correct = predictions()
    (legend,) = pictures.reliability_figure(confidences, correct, None).legends
    assert legend.get_texts()[1].get_text().startswith("confidences: ECE 0.")
    pictures.draw_reliability(confidences, correct, None, tmp_path / "r.png")
    assert image.imread(tmp_path / "r.png")[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("confidences", "correct", "message"),
    [
        (np.ones((3, 4)), np.ones(4), r"\[3, 4\]"),
        (np.ones(4), np.ones(5), r"\[4\] and \[5\]"),
        (np.ones(0), np.ones(0), r"\[0\]"),
        (np.array([0.5, 1.5]), np.ones(2), "between 0 and 1"),
        (np.array([0.5, np.nan]), np.ones(2), "between 0 and 1"),
    ],
)
def test_reliability_refuses(
    confidences: NDArray[np.float64], correct: NDArray[np.float64], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.reliability_figure(confidences, correct, None)


def test_overlay_is_grey_where_the_map_is_low_and_bright_where_it_is_high() -> None:
    photo = np.full((8, 8, 3), (200, 40, 40), np.uint8)
    heat = np.zeros((8, 8))
    heat[:, 4:] = 1
    found = pictures.overlay(photo, heat).astype(int)
    assert found.shape == (8, 8, 3)
    assert np.ptp(found[0, 0]) < 5  # grey
    assert found[0, 4].sum() > found[0, 0].sum() + 200
    assert found[0, 4, 2] < found[0, 4, 0]  # yellow


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("top", [0, 1, 3, 10])
def test_explanations_are_drawn(tmp_path: Path, height: int, width: int, top: int) -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    labels = [(f"a class with a long name, the number {i} of all", 0.5**i) for i in range(1, top + 1)]
    name = "a_long_name_of_a_photo_" * 4
    heat = rng.uniform(size=(height, width))
    figure = pictures.explanation_figure(photo, heat, labels, name, "gradcam: some class")
    assert not overlaps(figure)
    pictures.draw_explanation(photo, heat, labels, tmp_path / "e.png", name, "gradcam: some class")
    assert image.imread(tmp_path / "e.png")[..., :3].std() > 0.1


def test_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    pictures.draw_confusion(matrix(3), ["a", "b", "c"], tmp_path / "c.png")
    pictures.draw_reliability(*predictions(), None, tmp_path / "r.png")
    assert dict(mpl.rcParams) == before

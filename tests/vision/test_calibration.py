"""Temperature scaling: a known temperature comes back, of one label and of several."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.vision.calibration import COLDEST, HOTTEST, fit_temperature
from manyheads.vision.metrics import calibration_error


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_drawn_classes_is_found(temperature: float) -> None:
    true = torch.randn(40_000, 10) * 2
    target = torch.multinomial(true.softmax(dim=-1), 1)[:, 0]
    assert fit_temperature(true * temperature, target) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_of_several_labels_is_found_among_the_known() -> None:
    true = torch.randn(20_000, 4) * 2
    target = torch.bernoulli(true.sigmoid())
    target[torch.rand_like(target) < 0.3] = torch.nan
    assert fit_temperature(true * 2.5, target) == pytest.approx(2.5, rel=0.03)


def test_it_minimises_the_loss() -> None:
    logits, target = torch.randn(500, 5).double() * 4, torch.randint(5, (500,))
    target[:250] = logits[:250].argmax(dim=-1)
    found = fit_temperature(logits, target)
    best = F.cross_entropy(logits / found, target)
    for other in (found * 0.99, found * 1.01):
        assert F.cross_entropy(logits / other, target) > best


def test_the_calibration_error_falls() -> None:
    true = torch.randn(20_000, 10) * 2
    target = torch.multinomial(true.softmax(dim=-1), 1)[:, 0]
    logits = true * 3
    scaled = calibration_error(logits, target, fit_temperature(logits, target))
    assert calibration_error(logits, target) > 0.1
    assert scaled < 0.02


def test_where_no_temperature_is_best_the_range_ends() -> None:
    logits = torch.eye(6) * 5
    assert COLDEST < fit_temperature(logits, torch.arange(6)) < 0.15  # nothing is left to gain
    assert fit_temperature(logits, (torch.arange(6) + 1) % 6) == pytest.approx(HOTTEST)

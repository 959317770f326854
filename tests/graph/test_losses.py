"""What is minimised: gaps add nothing, standardised numbers, weights of classes as published."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.graph.losses import Criterion, Loss

NAN = math.nan


def published_weights(label: Tensor, classes: int) -> Tensor:
    """The weights of the published code of PATTERN and CLUSTER: (V - n_c) / V, zero of absent classes."""
    v = label.numel()
    counts = torch.zeros(classes)
    for c in range(classes):
        counts[c] = sum(1 for each in label.tolist() if each == c)
    return (v - counts) / v * (counts > 0)


@pytest.mark.parametrize("kind", ["l1", "mse", "huber"])
def test_numbers_are_trained_standardised_and_gaps_add_nothing(kind: str) -> None:
    outputs = torch.randn(6, 2, requires_grad=True)
    target = torch.tensor([[5.0, 1], [7, NAN], [NAN, NAN], [4, 3], [NAN, 2], [6, 0]])
    criterion = Criterion("regression", Loss(regression=kind), 2, target, (5.0, 2.0), (2.0, 0.5))  # type: ignore[arg-type]
    loss = criterion(outputs, target)
    loss.backward()
    assert outputs.grad is not None
    assert torch.equal(outputs.grad == 0, target.isnan())
    pairs = [(i, j) for i in range(6) for j in range(2) if not math.isnan(target[i, j])]
    each = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": F.smooth_l1_loss}[kind]
    mean, std = (5.0, 2.0), (2.0, 0.5)
    wanted = sum(each(outputs[i, j], (target[i, j] - mean[j]) / std[j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(loss, wanted)
    back = criterion.values((target - torch.tensor(mean)) / torch.tensor(std))
    torch.testing.assert_close(back, target, equal_nan=True)


def test_batch_weights_are_the_published_ones() -> None:
    outputs, label = torch.randn(40, 4), torch.randint(0, 3, (40,))  # class 3 is absent
    criterion = Criterion("classification", Loss(class_weights="batch"), 4)
    wanted = F.cross_entropy(outputs, label, weight=published_weights(label, 4))
    torch.testing.assert_close(criterion(outputs, label[:, None].float()), wanted)


def test_balanced_weights_are_of_the_training_part() -> None:
    train = torch.tensor([0.0] * 30 + [1.0] * 10 + [NAN] * 5)[:, None]
    criterion = Criterion("classification", Loss(class_weights="balanced"), 2, train)
    assert criterion.weights is not None
    torch.testing.assert_close(criterion.weights, torch.tensor([40 / 60, 40 / 20]))
    outputs, label = torch.randn(9, 2), torch.randint(0, 2, (9,))
    wanted = F.cross_entropy(outputs, label, weight=criterion.weights)
    torch.testing.assert_close(criterion(outputs, label[:, None].float()), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unknown_classes_add_nothing(smoothing: float) -> None:
    outputs = torch.randn(5, 3, requires_grad=True)
    target = torch.tensor([0.0, NAN, 2, NAN, 1])[:, None]
    criterion = Criterion("classification", Loss(label_smoothing=smoothing), 3)
    loss = criterion(outputs, target)
    known = torch.tensor([0, 2, 4])
    wanted = F.cross_entropy(outputs[known], torch.tensor([0, 2, 1]), label_smoothing=smoothing)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad[[1, 3]].abs().max() == 0
    nothing = criterion(outputs, torch.full_like(target, NAN))
    assert float(nothing.detach()) == 0
    nothing.backward()


def test_several_labels_with_gaps() -> None:
    outputs = torch.randn(4, 2, requires_grad=True)
    target = torch.tensor([[1.0, NAN], [0, 0], [NAN, NAN], [0, 1]])
    loss = Criterion("multilabel", Loss(), 2)(outputs, target)
    known = ~target.isnan()
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(outputs[known], target[known]))
    loss.backward()
    assert outputs.grad is not None
    assert torch.equal(outputs.grad == 0, ~known)
    balanced = Criterion("multilabel", Loss(positive_weights="balanced"), 2, target)
    assert balanced.weights is not None
    assert balanced.weights.tolist() == [2.0, 1.0]


def test_rows_count_by_their_weight() -> None:
    outputs, target = torch.randn(4, 1), torch.tensor([[1.0], [2], [NAN], [3]])
    weight = torch.tensor([1.0, 0.5, 9.0, 0.0])
    loss = Criterion("regression", Loss(), 1)(outputs, target, weight)
    wanted = ((outputs[0, 0] - 1).abs() + 0.5 * (outputs[1, 0] - 2).abs()) / 1.5
    torch.testing.assert_close(loss, wanted)
    label = torch.tensor([[0.0], [1], [NAN], [1]])
    logits = torch.randn(4, 2)
    loss = Criterion("classification", Loss(), 2)(logits, label, weight)
    each = F.cross_entropy(logits[:2], torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(loss, (each[0] + 0.5 * each[1]) / 1.5)


def test_a_smoothing_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="label_smoothing"):
        Loss(label_smoothing=1.0)

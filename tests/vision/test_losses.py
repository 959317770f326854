"""Losses: torch's own figures where torch has them, and unknown labels that count nowhere."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from manyheads.core.errors import UsageError
from manyheads.vision.losses import Criterion, Loss, smoothed

NAN = float("nan")


def test_cross_entropy_is_torchs() -> None:
    logits, target = torch.randn(9, 5), torch.randint(5, (9,))
    plain = Criterion(Loss(), 5)
    torch.testing.assert_close(plain(logits, target), F.cross_entropy(logits, target))
    soft = torch.rand(9, 5).softmax(dim=-1)
    torch.testing.assert_close(plain(logits, soft), F.cross_entropy(logits, soft))
    smooth = plain(logits, smoothed(target, 5, 0.1))
    torch.testing.assert_close(smooth, F.cross_entropy(logits, target, label_smoothing=0.1))


def test_class_weights_are_torchs_and_balanced_ones_are_made_of_the_counts() -> None:
    logits, target = torch.randn(9, 3), torch.randint(3, (9,))
    given = [0.5, 2.0, 1.0]
    expected = F.cross_entropy(logits, target, weight=torch.tensor(given))
    torch.testing.assert_close(Criterion(Loss(class_weights=given), 3)(logits, target), expected)
    balanced = Criterion(Loss(class_weights="balanced"), 3, class_counts=[10, 20, 70])
    torch.testing.assert_close(balanced.weight, 100 / (3 * torch.tensor([10.0, 20.0, 70.0])))


def test_focal_is_cross_entropy_at_gamma_0_and_less_of_what_is_easy() -> None:
    logits, target = torch.randn(9, 4), torch.randint(4, (9,))
    flat = Criterion(Loss("focal", focal_gamma=0.0), 4)(logits, target)
    torch.testing.assert_close(flat, F.cross_entropy(logits, target))
    p = logits.softmax(dim=-1).gather(1, target[:, None])
    expected = (-((1 - p) ** 2) * p.log()).mean()
    torch.testing.assert_close(Criterion(Loss("focal"), 4)(logits, target), expected)


def test_several_labels_count_where_they_are_known() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([[1, 0, NAN], [NAN, 1, 1], [0, 0, 0], [NAN, NAN, NAN]])
    known = ~target.isnan()
    loss = Criterion(Loss(), 3, multi_label=True)(logits, target)
    expected = F.binary_cross_entropy_with_logits(logits[known], target[known])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[~known] == 0).all()
    assert (logits.grad[known] != 0).all()
    focal = Criterion(Loss("focal"), 3, multi_label=True)(logits, target)
    theirs = sigmoid_focal_loss(logits[known], target[known], alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(focal, theirs)
    assert Criterion(Loss(), 3, multi_label=True)(logits, torch.full((4, 3), NAN)) == 0


def test_pos_weight_is_torchs_and_a_balanced_one_is_negatives_by_positives() -> None:
    logits, target = torch.randn(8, 2), torch.randint(2, (8, 2)).float()
    given = Criterion(Loss(pos_weight=[3.0, 0.5]), 2, multi_label=True)
    weight = torch.tensor([3.0, 0.5])
    expected = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    torch.testing.assert_close(given(logits, target), expected)
    balanced = Criterion(Loss(pos_weight="balanced"), 2, True, class_counts=[10, 40], known_counts=[100, 50])
    assert balanced.weight.tolist() == [9.0, 0.25]


def test_bce_of_one_label_takes_soft_targets() -> None:
    logits, target = torch.randn(6, 4), torch.rand(6, 4)
    expected = F.binary_cross_entropy_with_logits(logits, target / target.sum(dim=-1, keepdim=True))
    loss = Criterion(Loss("bce"), 4)(logits, target / target.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(loss, expected)


def test_smoothing_leaves_unknown_labels_unknown() -> None:
    found = smoothed(torch.tensor([[1.0, 0.0, NAN]]), 3, 0.2)
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.1, NAN]]), equal_nan=True)


@pytest.mark.parametrize(
    ("loss", "multi", "counts", "says"),
    [
        (Loss("cross_entropy"), True, None, "several take bce or focal"),
        (Loss(class_weights="balanced"), True, [1, 1, 1], "several take loss.pos_weight"),
        (Loss(pos_weight="balanced"), False, [1, 1, 1], "one takes loss.class_weights"),
        (Loss(class_weights=[1.0, 2.0]), False, None, "takes 3 weights"),
        (Loss(class_weights=[1.0, -2.0, NAN]), False, None, "takes 3 weights of 0 or more"),
        (Loss(class_weights="balanced"), False, [4, 0, 2], "a train image of each class"),
        (Loss(focal_gamma=-1.0), False, None, "focal_gamma"),
    ],
)
def test_what_does_not_go_together_is_refused(
    loss: Loss, multi: bool, counts: list[int] | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        Criterion(loss, 3, multi, counts)

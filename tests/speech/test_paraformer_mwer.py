"""Minimum word error training: distances as the library counts them, and a toy whose expected errors fall."""

import pytest
import torch
from torchaudio.functional import edit_distance as library_distance

from manyheads.core.errors import UsageError
from manyheads.speech.models.paraformer import paraformer
from manyheads.speech.models.paraformer_losses import Objective
from manyheads.speech.models.paraformer_mwer import edit_distance, expected_errors


def test_edit_distance_is_the_librarys() -> None:
    generator = torch.Generator().manual_seed(0)
    found, true = (
        torch.randint(4, (64, 9), generator=generator),
        torch.randint(4, (64, 7), generator=generator),
    )
    found_lengths = torch.randint(0, 10, (64,), generator=generator)
    true_lengths = torch.randint(0, 8, (64,), generator=generator)
    ours = edit_distance(found, found_lengths, true, true_lengths)
    wanted = [
        library_distance(f[:n].tolist(), t[:m].tolist())
        for f, n, t, m in zip(found, found_lengths, true, true_lengths, strict=True)
    ]
    assert ours.tolist() == wanted
    assert len(set(wanted)) > 5


def test_loss_by_hand() -> None:
    """Two tokens; the best path is wrong once, the one candidate beside it, swapped there, is right."""
    probabilities = torch.tensor([[[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]])
    targets = torch.tensor([[1, 2, -1]])
    chance = torch.tensor([[[0.1, 0.9, 0.0]]])
    best, other = 0.6 * 0.7, 0.3 * 0.7
    loss = expected_errors(probabilities.log(), targets, 2, 0.2, chance)
    assert float(loss) == pytest.approx(best / (best + other) * 0.5 + other / (best + other) * -0.5, rel=1e-5)


def test_a_candidate_differs_in_one_place_at_least_and_never_in_padding() -> None:
    logits = torch.randn(3, 5, 6, requires_grad=True)
    behind = torch.arange(5) >= torch.tensor([5, 2, 1])[:, None]
    targets = logits.argmax(-1).masked_fill(behind, -1)
    loss = expected_errors(logits, targets, 6, 0.0, torch.rand(3, 5, 5))
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[targets == -1] == 0).all()
    moved = (logits.grad != 0).any(-1)
    assert moved.any(1).all()  # the best path is right in each row, and so is taken further from the others


def test_expected_errors_fall_when_it_alone_is_minimised() -> None:
    """A table of logits, seen by sampling from it: errors under its own probabilities."""
    torch.manual_seed(1)
    targets = torch.randint(8, (32, 6))
    logits = torch.randn(32, 6, 8).requires_grad_()

    def errors() -> float:
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample((200,)).flatten(0, 1)
        sizes = torch.full((len(drawn),), 6)
        return float(edit_distance(drawn, sizes, targets.repeat(200, 1), sizes).float().mean())

    before, optimizer = errors(), torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        expected_errors(logits, targets, 6, 0.3).backward()
        optimizer.step()
    assert errors() < 0.75 * before


def test_objective_adds_it() -> None:
    torch.manual_seed(0)
    model = paraformer(20, 40, dim=32, heads=2, units=32, encoder_blocks=1, decoder_blocks=1, dropout=0.0)
    features, lengths = torch.randn(2, 12, 40), torch.tensor([12, 9])
    text, counts = torch.tensor([[5, 6, 7], [8, 9, -1]]), torch.tensor([3, 2])

    def losses(**options: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return model.losses(features, lengths, text, counts, Objective(glancing=0.0, **options))

    plain, with_it = losses(), losses(mwer=0.5)
    assert "mwer" not in plain
    torch.testing.assert_close(with_it["loss"], plain["loss"] + 0.5 * with_it["mwer"])
    with pytest.raises(UsageError, match="candidates must be 2 or more"):
        Objective(mwer=0.1, candidates=1)

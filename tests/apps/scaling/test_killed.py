"""A run that is killed (SIGKILL) behind step k and resumed equals one that was left alone, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Small = Callable[..., list[str]]
SAVED, KILLED = 2, 5


@pytest.mark.parametrize("name", ["timeseries", "vision", "recognition", "separation", "graph", "recsys"])
def test_a_killed_run_goes_on_to_the_same_weights(
    name: str, command: Callable[..., int], small: Small, weights: Callable[[Path], str], tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    together = ("--trainer.accumulate_grad_batches", 2 if name == "timeseries" else 1)
    assert command(*small(name, options=together), "--output", straight) == 0, command.printed
    options = (*together, "--save_every_n_steps", SAVED, "--output", killed)
    assert command(*small(name), *options, kill_at=KILLED) == -9, command.printed
    state = torch.load(killed / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["global_step"]) == (0, KILLED - 1)  # within the first epoch
    assert not (killed / "model").exists()
    assert command(*small(name), *options, "--ckpt_path", killed / "last.ckpt") == 0, command.printed
    assert weights(killed) == weights(straight)

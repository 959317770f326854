"""Mixed precision and compiled blocks, by the trainer's options."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manyheads.apps.curves import read_log
from manyheads.apps.scaling import blocks
from manyheads.core.catalog import create_model

Small = Callable[..., list[str]]
NAMES = ("vision", "imputation", "anomaly", "recognition", "separation", "graph", "recsys")
EACH = ["timeseries", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)]


def trained(command: Callable[..., int], args: list[str], run: Path) -> tuple[dict[str, torch.Tensor], float]:
    """A run's last weights, and the mean loss of its last epoch."""
    assert command(*args, "--output", run) == 0, command.printed
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    return state, float(read_log(run / "logs")["train_loss"].iloc[-1])


@pytest.mark.parametrize("name", EACH)
def test_mixed_precision_trains_nearly_the_same(
    name: str, command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    """Every name: pytest -m "slow or not slow" tests/apps/scaling/test_arithmetic.py (six minutes)."""
    plain, loss = trained(command, small(name), tmp_path / "plain")
    options = ("--trainer.precision", "bf16-mixed")
    mixed, other = trained(command, small(name, options=options), tmp_path / "mixed")
    assert {key: value.dtype for key, value in mixed.items()} == {k: v.dtype for k, v in plain.items()}
    assert other == pytest.approx(loss, rel=0.02, abs=0.02)
    assert other != loss


@pytest.mark.parametrize("name", EACH)
def test_compiled_blocks_train_the_same_and_keep_their_names(
    name: str, command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    """What is dropped by chance is another thing in compiled code: none is."""
    plain, loss = trained(command, small(name, drops=False), tmp_path / "plain")
    options = ("--trainer.compile", "aot_eager")
    compiled, other = trained(command, small(name, options=options, drops=False), tmp_path / "compiled")
    assert compiled.keys() == plain.keys()
    assert other == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timeseries", "vision"])
def test_inductor_trains_the_same(
    name: str, command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    """pytest -m slow tests/apps/scaling/test_arithmetic.py -k inductor (three minutes)."""
    _, loss = trained(command, small(name, drops=False), tmp_path / "plain")
    options = ("--trainer.compile", "inductor")
    _, other = trained(command, small(name, options=options, drops=False), tmp_path / "compiled")
    assert math.isfinite(other)
    assert other == pytest.approx(loss, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 24, "num_heads": 2}, 3),
        ("itransformer", {"seq_len": 24, "pred_len": 12, "e_layers": 2, "d_model": 16, "n_heads": 2}, 2),
        ("sasrec", {"num_items": 20, "max_len": 8, "layers": 2, "hidden_size": 16}, 2),
    ],
)
def test_blocks_are_the_repeated_parts(name: str, arguments: dict[str, int], count: int) -> None:
    found = blocks(create_model(name, **arguments))
    assert len(found) == count
    assert len({type(block) for block in found}) == 1

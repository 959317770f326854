"""Fixtures of the recommenders' tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from manyheads.core.products import linear
from manyheads.recsys import retrieval
from manyheads.recsys.logs import Log
from manyheads.recsys.published import read_published
from manyheads.recsys.sequences import Sequences

FOLDERS = {"ml_100k": "ml-100k", "ml_1m": "ml-1m", "ml_latest_small": "ml-latest-small"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class MovieLens:
    """The MovieLens logs, each read once."""

    @staticmethod
    def folder(name: str) -> Path:
        """Where the files lie; skips where there are none."""
        path = (
            Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "recsys" / FOLDERS[name]
        )
        if not path.is_dir():
            pytest.skip(f"needs {path.name} in MANYHEADS_DATA")
        return path

    @staticmethod
    @cache
    def log(name: str) -> Log:
        """The log as it is."""
        return read_published(name, MovieLens.folder(name))

    @staticmethod
    def sequences(name: str) -> Sequences:
        """Its histories."""
        return Sequences.of(MovieLens.log(name))


@pytest.fixture
def movielens() -> MovieLens:
    """The MovieLens logs."""
    return MovieLens()


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all blocks of scores that a test makes."""
    found: list[int] = []

    def noted(*args: Tensor) -> Tensor:
        scores = linear(*args)
        found.append(scores.numel())
        return scores

    monkeypatch.setattr(retrieval, "linear", noted)
    return found


GOLDEN = Path(__file__).parents[1] / "golden" / "recsys"
EXACT = {"output": (1e-6, 1e-6), "grad": (1e-6, 1e-6)}  # of float64: absolute, relative
# Of float32, as the files say: outputs, and gradients
SINGLE = {"output": (1e-5, 1e-4), "grad": (2e-3, 2e-3)}


@dataclass(frozen=True)
class Recorded:
    """Tensors recorded from published code, in the dtype that a test asks for."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: torch.dtype

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins so, by the rest of their names."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def load(self, model: nn.Module, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> nn.Module:
        """Load the parameters, strictly; in the mode of the case."""
        model.load_state_dict(convert(self.group("param.")), strict=True)
        return model.to(self.dtype).train(self.about["mode"] == "train")

    def check(
        self,
        outputs: dict[str, Tensor],
        model: nn.Module,
        convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        """Compare outputs, and all gradients, with nothing left over."""
        self.same(outputs, self.group("output."), "output")
        cotangents = self.group("cotangent.")
        torch.autograd.backward([outputs[k] for k in cotangents], list(cotangents.values()))
        found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        self.same(found, convert(self.group("grad.")), "grad")

    def same(self, found: dict[str, Tensor], wanted: dict[str, Tensor], kind: str) -> None:
        """Compare tensors by name."""
        absolute, relative = (EXACT if self.dtype == torch.float64 else SINGLE)[kind]
        assert found.keys() == wanted.keys()
        for key, want in wanted.items():
            torch.testing.assert_close(
                found[key].detach(), want.to(found[key].dtype), atol=absolute, rtol=relative,
                msg=lambda text, key=key: f"{key}: {text}",
            )  # fmt: skip


@pytest.fixture
def recorded() -> Callable[..., Recorded]:
    """Load a recorded case by name and dtype."""

    def load(name: str, dtype: torch.dtype = torch.float64) -> Recorded:
        about = json.loads((GOLDEN / f"{name}_a.json").read_text())
        tensors = load_file(GOLDEN / f"{name}_a.safetensors")
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        return Recorded(about, tensors, dtype)

    return load

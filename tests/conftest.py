"""Fixtures for the whole suite."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """Tensors recorded from an official implementation, and how closely they must be met.

    Tensors are grouped by the part of their name before the first dot: param, input, output, cotangent (one
    an output), grad (one a parameter, of the sum over outputs of output * cotangent) and grad_input.
    """

    name: str
    config: dict[str, Any]
    tolerance: dict[str, float]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one group, by the rest of their names."""
        return {k.partition(".")[2]: v for k, v in self.tensors.items() if k.partition(".")[0] == prefix}

    def inputs(self) -> dict[str, Tensor]:
        """The inputs, requiring gradients where the case has one."""
        wanted = self.group("grad_input")
        return {k: v.clone().requires_grad_(k in wanted) for k, v in self.group("input").items()}

    def check(self, prefix: str, got: Mapping[str, Tensor | None]) -> None:
        """Assert that a group's tensors, all of them and no others, are met within the tolerance."""
        expected = self.group(prefix)
        assert set(got) == set(expected)
        assert expected, f"{self.name} has no {prefix}"
        for key, want in expected.items():
            have = got[key]
            assert have is not None, f"{key}: no {prefix}"
            assert have.shape == want.shape, f"{prefix}.{key}"
            error = (have.detach() - want).abs().max().item()
            assert error <= self.tolerance[prefix], f"{prefix}.{key}: off by {error:.2e}"

    def check_all(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        module: nn.Module | None = None,
        rename: Callable[[str], str] = lambda key: key,
    ) -> None:
        """Assert outputs, and after a backward pass the gradients of inputs and of a module's parameters.

        `rename` turns the module's parameter names into the recorded ones.
        """
        self.check("output", outputs)
        cotangents = self.group("cotangent")
        sum((outputs[k] * v).sum() for k, v in cotangents.items()).backward()  # type: ignore[union-attr]
        self.check("grad_input", {k: v.grad for k, v in inputs.items() if v.requires_grad})
        if module is not None:
            trained = {rename(k): p.grad for k, p in module.named_parameters() if p.requires_grad}
            self.check("grad", trained)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def golden() -> Callable[[str, str], GoldenCase]:
    """Load the case tests/golden/<domain>/<name>."""

    def load(domain: str, name: str) -> GoldenCase:
        path = GOLDEN / domain / name
        about = json.loads(path.with_suffix(".json").read_text())
        return GoldenCase(
            name, about["config"], about.get("tolerance", {}), load_file(path.with_suffix(".safetensors"))
        )

    return load


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model hub on loopback (tests/fake_hub.py), with an empty cache and nobody logged in."""
    path = Path(__file__).with_name("fake_hub.py")
    spec = importlib.util.spec_from_file_location("fake_hub", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.get("fake_hub") or importlib.util.module_from_spec(spec)
    if "fake_hub" not in sys.modules:
        sys.modules["fake_hub"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # loopback has no such store
    monkeypatch.setattr("manyheads.core.network.BACKOFF", 0.01)
    with module.FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub

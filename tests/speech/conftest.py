"""Fixtures of the speech tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

PEER = (
    "conformer.encoder", "paraformer.cif_predictor", "paraformer.decoder", "paraformer.model",
    "sanm.encoder",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: on a busy machine threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def funasr() -> Callable[[str], Any]:
    """Model classes of funasr's by their registered names, where it is installed (`pip install funasr`)."""
    pytest.importorskip("funasr")
    for module in PEER:
        importlib.import_module(f"funasr.models.{module}")
    classes: dict[str, Any] = importlib.import_module("funasr.register").tables.model_classes
    return classes.__getitem__

"""What every op's folder must have: files, a reference with the public arguments, dispatch, a gate list.

A new op joins by its name in `core.dispatch.OPS` and its functions in `core.ops.__all__`.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from manyheads.core import ops
from manyheads.core.aot import ARCHITECTURES, KERNEL_OPS
from manyheads.core.dispatch import BACKENDS, OPS, choose, triton_installed

FILES = {"__init__.py", "reference.py", "backends.py", "README.md"}
KERNEL_FILES = {"custom_op.py", "triton.py", "triton_kernels.py"}
FUNCTIONS = sorted(OPS.items())


@pytest.mark.parametrize("folder", sorted(set(OPS.values())))
def test_folder(folder):
    package = importlib.import_module(f"manyheads.core.ops.{folder}")
    wanted = FILES | (KERNEL_FILES if folder in KERNEL_OPS else set())
    missing = wanted - {file.name for file in Path(package.__file__).parent.iterdir()}
    assert not missing


def test_every_op_is_exported():
    assert set(OPS) <= set(ops.__all__)
    assert ops.__all__ == sorted(ops.__all__)


@pytest.mark.parametrize(("name", "folder"), FUNCTIONS)
def test_the_reference_takes_the_public_arguments(name, folder):
    """Same names, order, kinds and defaults, so that a test, or a user, can put one in the other's place."""
    public = inspect.signature(getattr(ops, name)).parameters
    reference = importlib.import_module(f"manyheads.core.ops.{folder}.reference")
    plain = inspect.signature(getattr(reference, name)).parameters
    assert [(p.name, p.kind, p.default) for p in public.values()] == [
        (p.name, p.kind, p.default) for p in plain.values() if p.name in public
    ]
    assert all(p.default is not p.empty for p in plain.values() if p.name not in public)


@pytest.mark.parametrize(("name", "folder"), FUNCTIONS)
def test_dispatch_and_documentation(name, folder):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert choose(name, device="cpu", dtype=dtype).backend in set(BACKENDS) - {"triton"}
    documented = inspect.getdoc(getattr(ops, name))
    assert "Source:" in documented


@pytest.mark.skipif(not triton_installed(), reason="needs triton")
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_gate_list(op):
    variants = list(importlib.import_module(f"manyheads.core.ops.{op}.triton").aot_variants())
    assert {v.arch for v in variants if not v.slow} == set(ARCHITECTURES)
    assert all(v.kernel.startswith(f"manyheads.core.ops.{op}.") for v in variants)

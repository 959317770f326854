"""Helpers that every op's tests share: the float64 error rule, NaN-filled empties, interpreter runs.

The rule: an op's error against a float64 reference is at most twice that of the same formula in plain torch
at the same dtype, forward and every gradient. Tolerances are never loosened; a failure has a reason to be
found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
# The floor of the rule, in units of eps * max|truth|: where the plain formula happens to be exact (a sum of
# one element, a value that rounds to itself), an op may still be off by the rounding of its own result.
FLOOR_ULPS = 2.0

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Comparison:
    """One tensor's error against float64, and what the rule allows."""

    name: str
    error: float
    baseline: float
    scale: float
    limit: float

    def __str__(self) -> str:
        """The line of a report."""
        mark = "ok" if self.error <= self.limit else "FAILS"
        return (
            f"{self.name:>10}: error {self.error:.2e}, plain torch {self.baseline:.2e}, "
            f"limit {self.limit:.2e}, scale {self.scale:.2e}  {mark}"
        )


def assert_accurate(
    op: Function, reference: Function, *inputs: Tensor | None, gradients: bool = True, seed: int = 0
) -> list[Comparison]:
    """Hold an op to the float64 rule: outputs, and the gradient of every floating input that requires one.

    Three runs on the same values: `op` and `reference` at the inputs' dtype, `reference` in float64.
    Cotangents are drawn once. An op's largest absolute error may be `2 * baseline + 2 eps * max|truth|`.

    Args:
        op: Takes `inputs`, returns a tensor or a tuple of tensors; bind options with a lambda.
        reference: The readable formula, with the same arguments.
        inputs: Tensors (or None) as the op takes them; those that require grad are compared.
        gradients: Compare gradients too.
        seed: Of the cotangents.

    Raises:
        AssertionError: An error above the limit, or a value that is not finite; all tensors are listed.

    Example:
        >>> x = torch.randn(63, 96, dtype=torch.bfloat16, requires_grad=True)
        >>> assert_accurate(lambda x: rms_norm(x), lambda x: reference.rms_norm(x), x)
    """
    got = _run(op, inputs, None, gradients, seed)
    plain = _run(reference, inputs, None, gradients, seed)
    truth = _run(reference, inputs, torch.float64, gradients, seed)
    assert got.keys() == truth.keys(), f"outputs or gradients differ: {list(got)} and {list(truth)}"
    rows = [_compare(name, got[name], plain[name], truth[name]) for name in truth]
    if any(not row.error <= row.limit for row in rows):
        raise AssertionError("the float64 rule is broken\n" + "\n".join(map(str, rows)))
    return rows


def _run(
    function: Function, inputs: Sequence[Tensor | None], dtype: torch.dtype | None, gradients: bool, seed: int
) -> dict[str, Tensor]:
    leaves = [_leaf(x, dtype) for x in inputs]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    wanted = {i: x for i, x in enumerate(leaves) if x is not None and x.requires_grad}
    if gradients and wanted:
        source = next(x for x in inputs if x is not None and x.is_floating_point())
        cotangents = [_cotangent(out, source.dtype, seed + i) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents)
        found |= {f"grad {i}": grad for i, grad in zip(wanted, grads, strict=True)}
    return found


def _leaf(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if x is None or not x.is_floating_point():
        return x
    # to() keeps the strides of a non-contiguous input, so the op sees the layout that the test made
    leaf = x.detach() if dtype is None else x.detach().to(dtype)
    return leaf.requires_grad_(x.requires_grad)


def _cotangent(out: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(out.shape, generator=generator).to(dtype)  # the same rounded values in all three runs
    return drawn.to(device=out.device, dtype=out.dtype)


def _compare(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> Comparison:
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, should be {tuple(truth.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, should be {plain.dtype}"
    scale = truth.abs().max().item() if truth.numel() else 0.0
    error, baseline = _largest(got, truth), _largest(plain, truth)
    limit = FACTOR * baseline + FLOOR_ULPS * torch.finfo(got.dtype).eps * scale
    return Comparison(name, error, baseline, scale, limit)


def _largest(x: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; NaN (which passes no comparison) when a value is not finite."""
    if not x.numel():
        return 0.0
    return (x.double() - truth).abs().max().item()


@contextmanager
def nan_filled_empties() -> Iterator[None]:
    """Fill what `torch.empty`, `empty_like`, `empty_strided` and `new_empty` return with NaN.

    An op that reads memory it never wrote then shows it. Integer tensors get their smallest value.

    Example:
        >>> with nan_filled_empties():
        ...     y = attention(q, k, v)
    """
    names = ("empty", "empty_like", "empty_strided")
    kept = {name: getattr(torch, name) for name in names}
    inherited = torch.Tensor.new_empty
    for name in names:
        setattr(torch, name, _filling(kept[name]))
    torch.Tensor.new_empty = _filling(inherited)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name in names:
            setattr(torch, name, kept[name])
        del torch.Tensor.new_empty  # the class inherits it


def _filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        if out.is_floating_point() or out.is_complex():
            return out.detach().fill_(float("nan")).requires_grad_(out.requires_grad)
        return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).min)

    return filled


def check_op(op: Any, args: Sequence[Any]) -> None:
    """Run `torch.library.opcheck` on a custom op: schema, fake kernel, autograd, compile with dynamic shapes.

    Raises:
        AssertionError: A check failed; its report follows.
    """
    failures = {
        k: v
        for k, v in torch.library.opcheck(op, tuple(args), raise_exception=False).items()
        if v != "SUCCESS"
    }
    assert not failures, f"opcheck of {op}: {failures}"


def check_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Run `torch.autograd.gradcheck` in float64: the gradients of a reference against finite differences.

    Raises:
        AssertionError: An analytic gradient differs from the numerical one.
    """
    doubles = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    assert torch.autograd.gradcheck(function, doubles, eps=1e-6, atol=1e-7, rtol=1e-5)


def assert_within(got: Tensor, want: Tensor, relative: float) -> None:
    """Assert that no value is off by more than a share of the largest, as recorded cases give tolerances.

    Raises:
        AssertionError: One is, or the shapes differ.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, should be {tuple(want.shape)}"
    error = (got.detach() - want).abs().max().item()
    assert error <= relative * want.abs().max().item(), f"off by {error:.2e}"


def run_interpreter_tests(path: Path, timeout: float = 600) -> int:
    """Run the tests of a file or folder that are marked `interpreter`, in a pytest process of their own.

    Triton reads TRITON_INTERPRET when a kernel is decorated, so one process cannot do both.

    Returns:
        How many passed.

    Raises:
        AssertionError: A test failed, or none ran; pytest's output follows.
    """
    assert importlib.util.find_spec("triton") is not None, "the interpreter tests need triton"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "interpreter",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        str(path),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    env.pop("MANYHEADS_BACKEND", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    output = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", output)
    assert done.returncode == 0 and passed is not None, f"{' '.join(command)}\n{output[-20000:]}"
    return int(passed.group(1))

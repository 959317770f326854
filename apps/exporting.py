"""Exporting a model to torch.export or ONNX, and comparing what was written with the model itself.

Ops run as their plain formulas while they are traced, so a file has torch's own operators alone, and runs
where Manyheads is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config

from manyheads import __version__
from manyheads.apps.exportable import RANGES, Exportable, Inputs
from manyheads.core import files
from manyheads.core.dispatch import use_backend
from manyheads.core.errors import ManyheadsError, UsageError

Format = Literal["torch", "onnx"]
OPSET = 20
TRACED, CHECKED, MOST = 2, (1, 3), 3  # samples of a batch
ALL_AT_ONCE = ("continuous_integrate_and_fire",)  # whose plain formula goes by what it finds, step by step
NEEDED = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
Names = Sequence[str]
Run = Callable[[Inputs], tuple[Tensor, ...]]


class NotExportable(ManyheadsError):
    """A model cannot be exported, and why."""


@dataclass(frozen=True)
class Parity:
    """How far a file is from the model, on one batch."""

    size: int
    difference: float  # the largest
    largest: float  # of the model's own outputs


def check_installed(format: Format) -> None:
    """Refuse a format whose libraries are not there.

    Raises:
        UsageError: Names them.
    """
    missing = [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format {format} needs {', '.join(missing)}: pip install 'manyheads[export]'")


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """Run every op as a formula of torch's own operators that can be traced."""
    with use_backend("reference"), contextlib.ExitStack() as stack:
        for op in ALL_AT_ONCE:
            stack.enter_context(use_backend("torch", op=op))
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' tables and warnings away: what they end with is said in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace(what: Exportable, inputs: Inputs) -> torch.export.ExportedProgram:
    """Return the program of a module, for batches of any size.

    Raises:
        NotExportable: What in the model stands in its way, in a line.
    """
    ranges = RANGES | dict(what.ranges)
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in ranges.items()}
    shapes = tuple(
        None if given is None else {axis: dims[count] for axis, count in what.axes[name].items()}
        for name, given in zip(what.inputs, inputs, strict=True)
    )
    failed: Exception | None = None
    for oblivious in (False, True):  # to whether a size is 1: some models need that, most need it not
        sizes = fx_config.patch(backed_size_oblivious=oblivious)  # type: ignore[attr-defined]
        try:
            with plain_ops(), torch.no_grad(), sizes, quiet():
                return torch.export.export(what.module.eval(), inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            failed = failed or error
    assert failed is not None
    raise NotExportable(f"torch.export: {first_line(failed)}") from failed


def write(
    program: torch.export.ExportedProgram, names: tuple[Names, Names], format: Format, path: Path
) -> None:
    """Write a program to a file.

    Args:
        names: Of the inputs that are there, and of the outputs.

    Raises:
        NotExportable: An operator has no counterpart in ONNX.
    """
    try:
        with quiet():
            if format == "torch":
                torch.export.save(program, path)
                return
            inputs, outputs = names
            made = torch.onnx.export(
                program,
                (),
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert made is not None
            made.save(str(path))
    except Exception as error:
        raise NotExportable(f"{format}: {first_line(error)}") from error


def load(format: Format, path: Path, names: Sequence[str]) -> Run:
    """Return what runs a file, away from the model it was made of."""
    if format == "torch":
        with quiet():
            module = torch.export.load(path).module()
        return lambda inputs: _listed(module(*inputs))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = [each.name for each in session.get_inputs()]

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        feeds = {k: v.numpy() for k, v in zip(names, inputs, strict=True) if v is not None and k in wanted}
        return tuple(torch.from_numpy(each) for each in session.run(None, feeds))

    return run


def compare(what: Exportable, run: Run, inputs: Inputs, size: int) -> Parity:
    """Run a batch through the model, by its fast backends, and through a file.

    Raises:
        NotExportable: The file gives other shapes, or fails.
    """
    with torch.inference_mode():
        wanted = _listed(what.module(*inputs))
    try:
        with torch.no_grad():
            found = run(inputs)
    except Exception as error:
        raise NotExportable(f"the file does not run on a batch of {size}: {first_line(error)}") from error
    difference, largest = 0.0, 0.0
    for name, one, other in zip(what.outputs, wanted, found, strict=True):
        if one.shape != other.shape:
            raise NotExportable(f"{name} of the file is {list(other.shape)}, not {list(one.shape)}")
        if not one.numel():
            continue
        apart = (one.double() - other.double()).abs()
        difference = max(difference, float(apart.nan_to_num(nan=torch.inf).max()))
        largest = max(largest, float(one.double().abs().max()))
    return Parity(size, difference, largest)


def _listed(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (cast(Tensor, found),)


def first_line(error: BaseException) -> str:
    """Return what an exporter's long error says first."""
    text = str(error).strip() or type(error).__name__
    cause = error.__cause__
    while cause is not None and "Failed to" in text:
        text, cause = str(cause).strip() or type(cause).__name__, cause.__cause__
    lines = [line.strip() for line in text.splitlines() if line.strip() and set(line.strip()) - set("=-#")]
    return " ".join(lines[:2])[:240]


def versions(format: Format) -> dict[str, str]:
    """Return the versions that a file was made with."""
    from importlib.metadata import version

    found = {"manyheads": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: version(name) for name in NEEDED[format]}


def describe(what: Exportable, inputs: Inputs) -> list[dict[str, object]]:
    """Return each input's name, type and axes, those that vary by what they count; plain JSON."""
    found: list[dict[str, object]] = []
    for name, given in zip(what.inputs, inputs, strict=True):
        if given is not None:
            names = what.axes[name]
            shape = [names.get(axis, size) for axis, size in enumerate(given.shape)]
            found.append({"name": name, "dtype": str(given.dtype).removeprefix("torch."), "shape": shape})
    return found


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the model."""

    inputs: list[dict[str, object]]
    outputs: Names
    parity: list[Parity]


def export(
    what: Exportable, batch: Callable[[int], Inputs], format: Format, path: Path, tolerance: float
) -> Exported:
    """Write a model to a file, whole or not at all, and compare the two at two batch sizes.

    Args:
        batch: Gives inputs of so many samples.
        tolerance: How far an output may be off: times the largest one, where that is above 1.

    Raises:
        NotExportable: It cannot be written, or is further off.
    """
    inputs = batch(TRACED)
    program = trace(what, inputs)
    given = [name for name, each in zip(what.inputs, inputs, strict=True) if each is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = files.temporary(path)
    try:
        write(program, (given, what.outputs), format, written)
        run = load(format, written, what.inputs)
        parity = [compare(what, run, batch(size), size) for size in CHECKED]
        for each in parity:
            if each.difference > tolerance * max(1.0, each.largest):
                raise NotExportable(
                    f"on a batch of {each.size} the file is off by {each.difference:.1e} of values up to "
                    f"{each.largest:.3g}; allowed is {tolerance:g}"
                )
        files.flush(written)
        files.commit(written, path)
    finally:
        written.unlink(missing_ok=True)
    return Exported(describe(what, inputs), what.outputs, parity)

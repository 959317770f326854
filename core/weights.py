"""Whether weights are a model's: every tensor used, every shape right, said in a line where not."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from manyheads.core.errors import DataError

SHOWN = 3  # names listed of each kind of fault
MOST_ENTRIES = 200_000  # files in a checkpoint's archive
MOST_PICKLED = 256 << 20  # bytes of what is no tensor's content


def misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say in what weights differ from those that are wanted; "" where every name and shape is the same.

    Example:
        >>> misfits({"a": torch.zeros(3)}, {"b": torch.zeros(3)})
        'tensors 1 missing (a); 1 left over (b)'
    """
    shapes = [
        f"{key} is {list(found[key].shape)}, not {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & found.keys())
        if found[key].shape != wanted[key].shape
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (
            ("missing", sorted(wanted.keys() - found.keys())),
            ("left over", sorted(found.keys() - wanted.keys())),
            ("of another shape", shapes),
        )
        if names
    ]
    return f"tensors {'; '.join(faults)}" if faults else ""


def check_fit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are not a model's, key by key and shape by shape.

    Args:
        model: Is not changed.
        state: The weights.
        name: What the model is called in the message.

    Raises:
        DataError: What is missing, left over, or of another shape.
    """
    if faults := misfits(model.state_dict(), state):
        raise DataError(f"the weights do not fit this {name}: {faults}")


def read_tensors(path: Path, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read a published file of weights: safetensors, or pickled tensors and nothing else.

    Args:
        path: The file.
        wrappers: Names under which training wraps them; each that is there is taken off, in this order.

    Raises:
        DataError: It cannot be read, or holds something else than tensors by name.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = load_pickle(path)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} does not hold tensors alone ({why})") from error
    for wrapper in wrappers:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    fine = isinstance(state, dict) and bool(state)
    if not fine or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):  # type: ignore[attr-defined]
        raise DataError(f"{path} is no state dict of tensors")
    return state  # type: ignore[return-value]


def load_pickle(path: Path, classes: Sequence[type] = ()) -> object:
    """Read what torch.save wrote: tensors and plain values; nothing in it is run.

    `weights_only` is one lock. The others: an archive may not unpack to more than it is, and no tensor may be
    larger than its storage, nor be of a kind that is not plain memory.

    Args:
        path: The file.
        classes: That it may hold beside; their instances are made without a call.

    Raises:
        Exception: What torch, or a check here, has against it.
    """
    _check_archive(path)
    with torch.serialization.safe_globals(list(classes)):
        found = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(found)
    return found


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # the layout before torch 1.6
    size, names = path.stat().st_size, set()
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len(entries) > MOST_ENTRIES:
        raise DataError("its archive has too many files")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError("its archive is compressed, which torch's are not: a bomb?")
        if entry.filename in names:
            raise DataError("its archive has a file twice")
        names.add(entry.filename)
        if entry.filename.endswith(".pkl") and entry.file_size > MOST_PICKLED:
            raise DataError("its archive has a pickle that is too large")
    if sum(entry.file_size for entry in entries) > size:
        raise DataError("its archive unpacks to more than it is: a bomb")


def _check_tensors(found: object) -> None:
    """Refuse tensors that would take more memory when they are used than they did in the file."""
    todo, seen = [found], set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.layout != torch.strided or each.device.type != "cpu" or each.is_quantized:
                raise DataError("it holds a tensor that is not plain memory")
            if each.numel() * each.element_size() > each.untyped_storage().nbytes():
                raise DataError("it holds a tensor larger than its storage")
        elif isinstance(each, Mapping):
            todo += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set):
            todo += each
        elif isinstance(each, argparse.Namespace):
            todo += vars(each).values()

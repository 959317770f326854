"""Whether weights are a model's: every tensor used, every shape right, said in a line where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from manyheads.core.errors import DataError

SHOWN = 3  # names listed of each kind of fault


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} does not hold tensors alone ({why})") from error
    for wrapper in wrappers:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path} is no state dict of tensors")
    return state

"""What a model does inside, read by hooks: nothing of it is changed, no kernel runs differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """A tensor inside a model: the first input of a module, or its output (the first, of several)."""

    module: nn.Module
    side: Literal["input", "output"] = "output"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def watched(places: Sequence[Place], detach: bool = False) -> Iterator[list[Tensor | None]]:
    """Keep the tensors of some places while the block runs.

    Args:
        places: Where.
        detach: Cut the graph at each, so that it is a leaf that gradients can be asked for, whether or not
            the parameters before it have any.

    Yields:
        A list that holds each place's last tensor after the model has run; None where it was not reached.
    """
    found: list[Tensor | None] = [None] * len(places)

    def keep(index: int, value: Any) -> Any:
        several = isinstance(value, tuple | list)
        tensor = value[0] if several else value
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a tensor was expected, not {type(tensor).__name__}")
        found[index] = tensor = tensor.detach().requires_grad_() if detach else tensor.detach()
        if not detach:
            return None
        return type(value)((tensor, *value[1:])) if several else tensor

    def input_hook(index: int) -> Any:
        return lambda module, args: keep(index, args)

    def output_hook(index: int) -> Any:
        return lambda module, args, output: keep(index, output)

    handles = [
        place.module.register_forward_pre_hook(input_hook(i))
        if place.side == "input"
        else place.module.register_forward_hook(output_hook(i))
        for i, place in enumerate(places)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def grids(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Keep the heights and widths of all maps that convolutions and poolings make while the block runs."""
    found: list[tuple[int, int]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append((output.shape[-2], output.shape[-1]))

    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    handles = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, kinds)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, image: Tensor, places: Sequence[Place]) -> tuple[list[Tensor], tuple[int, int]]:
    """Run a model once without gradients.

    Returns:
        The tensors of the places, and the grid of the tokens: the last map that its stem made.

    Raises:
        RuntimeError: A place was not reached.
    """
    with evaluating(model), torch.no_grad(), watched(places) as found, grids(model) as maps:
        model(image)
    return reached(found), maps[-1] if maps else (1, 1)


def reached(found: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors of all places.

    Raises:
        RuntimeError: One was not reached.
    """
    kept = [tensor for tensor in found if tensor is not None]
    if len(kept) != len(found):
        raise RuntimeError("the model did not run the module whose tensor was asked for")
    return kept

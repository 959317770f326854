"""Build a timm model by plain arguments, with our attention in place; what the families' builders share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import timm
from timm.models import is_model_in_modules
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.vision.models.core_attention import replace_attention


def build(
    family: str,
    variant: str,
    modules: Sequence[str],
    given: Mapping[str, object],
    renamed: Mapping[str, str] | None = None,
) -> nn.Module:
    """Build timm's model with random weights and our attention.

    Args:
        family: The builder's name, for messages.
        variant: timm's name of the architecture, without a tag of weights.
        modules: timm's modules that hold the family.
        given: The builder's arguments; None leaves the variant's own.
        renamed: timm's name for an argument, where it has another.

    Raises:
        UsageError: No such variant, or an argument that it does not take or that does not fit.
    """
    if not is_model_in_modules(variant, list(modules)):
        raise UsageError(f"{family} has no variant {variant!r} (`manyheads models` lists them)")
    renamed = renamed or {}
    args = {renamed.get(name, name): value for name, value in given.items() if value is not None}
    _check(family, given)
    try:
        model = timm.create_model(variant, pretrained=False, **args)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        names = {new: old for old, new in renamed.items()}
        what = f"no argument {names.get(found[1], found[1])!r}" if found else f"not these arguments: {error}"
        raise UsageError(f"{variant} takes {what}") from error
    except (AssertionError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value not in (None, 0.0))
        why = str(error) or type(error).__name__
        raise UsageError(f"{variant} cannot be built with {shown}: {why}") from error
    if not getattr(getattr(model, "patch_embed", None), "num_patches", 1):
        raise UsageError(f"{variant}: an image of img_size={given['img_size']} has not even one patch")
    replace_attention(model)
    return model


def _check(family: str, given: Mapping[str, object]) -> None:
    """Refuse numbers that no model has, by the argument's name."""
    for name, value in given.items():
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if name.endswith("rate"):
                fits, wanted = 0 <= number < 1, "in [0, 1)"
            elif name == "num_classes":
                fits, wanted = number >= 0, "at least 0"
            else:
                fits, wanted = number > 0, "positive"
            if not fits:
                raise UsageError(f"{family}: {name} must be {wanted}, not {value!r}")

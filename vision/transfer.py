"""Beginning a training with weights that are there, and saying what of a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from torch import Tensor, nn

from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.core.weights import misfits
from manyheads.vision.models.cct import CCT, filter_cct
from manyheads.vision.models.timm_weights import converter
from manyheads.vision.models.vim import VisionMamba
from manyheads.vision.models.vim_checkpoints import filter_vim


@dataclass(frozen=True)
class Transfer:
    """What a training begins with.

    Args:
        weights: A model folder (or a run folder with one) of the same model, or a .safetensors file with its
            names or timm's. All tensors must be there and fit; what depends on the image size is resized as
            timm does. A classifier of another number of classes begins anew, one of the same number is kept.
        freeze: backbone trains the classifier and the normalisation layers alone. probe trains the classifier
            alone, on the backbone as it is in use: without dropout, dropped paths or new batch statistics.
    """

    weights: str | None = None
    freeze: Literal["none", "backbone", "probe"] = "none"


def classifier_of(model: nn.Module) -> nn.Module:
    """Return a model's last layer, by timm's name for it.

    Raises:
        UsageError: It has none.
    """
    getter = cast("Callable[[], nn.Module | None] | None", getattr(model, "get_classifier", None))
    found = getter() if getter is not None else None
    if found is None or not any(True for _ in found.parameters()):
        raise UsageError("the model has no classifier of its own to train: transfer.freeze takes none")
    return found


def freeze(model: nn.Module, kind: Literal["none", "backbone", "probe"]) -> None:
    """Leave gradients to what `Transfer.freeze` says is trained."""
    if kind == "none":
        return
    model.requires_grad_(False)
    classifier_of(model).requires_grad_(True)
    if kind == "backbone":
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)


def load(model: nn.Module, name: str, weights: str) -> list[str]:
    """Load weights into a model, strictly but for a classifier of another number of classes.

    Returns:
        The tensors that begin anew.

    Raises:
        UsageError: There are no such weights, or they are not this model's.
    """
    path = Path(weights)
    state = _read_file(path) if path.suffix == ".safetensors" else _read_folder(weights, name)
    state = _converted(state, model)
    wanted = model.state_dict()
    known = {id(tensor): key for key, tensor in model.named_parameters()}
    classifier = {known[id(tensor)] for tensor in classifier_of(model).parameters()}
    anew = [key for key in classifier if key in state and state[key].shape != wanted[key].shape]
    if anew:  # a bias alone would not fit its matrix
        anew = sorted(classifier)
        state = {key: state[key] for key in state if key not in classifier}
    if faults := misfits({key: value for key, value in wanted.items() if key not in anew}, state):
        raise UsageError(f"transfer.weights {path} do not fit: {faults}")
    model.load_state_dict(state, strict=False)  # all that is not anew was checked
    return anew


def _read_folder(weights: str, name: str) -> dict[str, Tensor]:
    try:
        model, config = hub.load_model(hub.find_folder(weights))
    except UsageError as error:
        raise UsageError(f"transfer.weights: {error}; a file must end in .safetensors") from error
    if config.name != name:
        raise UsageError(f"transfer.weights {weights} are of {config.name}, not of {name}")
    return model.state_dict()


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"transfer.weights: no file {path}")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise UsageError(f"transfer.weights: {path} is no safetensors file ({error})") from error


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize what depends on the image size, and bring old layouts of timm up to date."""
    if isinstance(model, VisionMamba):
        return filter_vim(state, model)
    if isinstance(model, CCT):
        return filter_cct(state, model)
    cfg = cast("dict[str, object]", model.pretrained_cfg)
    return converter(str(cfg["architecture"]))(dict(state), model)

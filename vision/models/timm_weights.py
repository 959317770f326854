"""Load checkpoints that timm published or saved: strictly, through timm's own conversion of old layouts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from timm.models import is_model_in_modules
from torch import Tensor, nn

from manyheads.core.errors import DataError
from manyheads.core.weights import load_pickle, misfits
from manyheads.vision.models import maxvit, swin, vit

MODULES = (*vit.MODULES, *swin.MODULES, *maxvit.MODULES)
FILES = ("model.safetensors", "pytorch_model.bin")
State = Mapping[str, Tensor]


def load_timm_weights(model: nn.Module, weights: str | Path | State, *, reset_head: bool = False) -> None:
    """Load a timm checkpoint of the model's architecture; every tensor is used and fits, or nothing changes.

    Positions and tables of biases of another image or window size are resized, as timm does.

    Args:
        model: One of this package's timm families, or timm's own.
        weights: A `.safetensors`, `.bin` or `.pth` file of tensors, a folder as timm publishes it
            (`config.json` and `model.safetensors`), or a state dict.
        reset_head: Leave the checkpoint's classifier out and the model's as it is.

    Raises:
        DataError: No such file, not a file of tensors, another architecture, or names or shapes that do
            not fit.

    Example:
        >>> load_timm_weights(create_model("swin_tiny_patch4_window7_224"), "swin/")  # doctest: +SKIP
    """
    cfg: dict[str, object] = model.pretrained_cfg  # type: ignore[assignment]
    variant = str(cfg["architecture"])
    if isinstance(weights, str | Path):
        weights = read(Path(weights), variant)
    wanted = model.state_dict()
    found = converter(variant)(dict(weights), model)
    if reset_head:
        names = cfg["classifier"]
        heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names or []))  # type: ignore[attr-defined]
        found = {name: value for name, value in found.items() if not name.startswith(heads)}
        found |= {name: value for name, value in wanted.items() if name.startswith(heads)}
    _check(variant, wanted, found)
    model.load_state_dict(found)


def converter(variant: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """Return timm's conversion of an architecture's old layouts, as its own loading calls it."""
    family = next((name for name in MODULES if is_model_in_modules(variant, [name])), None)
    if family is None:
        raise DataError(f"{variant} is no architecture of timm's {', '.join(MODULES)}")
    at = "vision_transformer" if family == "deit" else family
    convert = importlib.import_module(f"timm.models.{at}").checkpoint_filter_fn
    if family == "deit":
        return partial(convert, adapt_layer_scale=True)
    if "flexi" in variant:
        return partial(convert, interpolation="bilinear", antialias=False)
    if "radio" in variant:
        aligned = variant.endswith(("base_patch16_radio_v3", "huge_patch16_radio_v3"))
        return partial(convert, interpolation="bilinear", antialias=False, align_corners=aligned)
    return convert


def read(path: Path, variant: str) -> dict[str, Tensor]:
    """Read a file of tensors, or a folder with timm's `config.json`; nothing in it is run.

    Raises:
        DataError: No such file, one that holds more than tensors, or a config of another architecture.
    """
    if path.is_dir():
        path = _in_folder(path, variant)
    if not path.is_file():
        raise DataError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        state = load_pickle(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is no file of tensors: {reason}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # timm's order
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _in_folder(folder: Path, variant: str) -> Path:
    """Check the config of a published folder, and find its weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = config["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} has no config.json that names an architecture of timm's") from error
    if stored != variant:
        raise DataError(f"{folder} holds weights of {stored}, not of {variant}")
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has neither {' nor '.join(FILES)}")


def _check(variant: str, wanted: State, found: State) -> None:
    """Refuse weights of which a tensor is missing, left over or of another shape."""
    if faults := misfits(wanted, found):
        shapes_alone = wanted.keys() == found.keys()
        hint = "; a classifier of other classes: reset_head=True" if shapes_alone else ""
        raise DataError(f"weights do not fit {variant}: {faults}{hint}")

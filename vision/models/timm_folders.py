"""timm's published layout, read and written: `config.json` with an architecture, and `model.safetensors`.

Ours and timm's tensors have the same names, so that a written folder is what timm itself would have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from manyheads.core import catalog, hub
from manyheads.core.dialects import Source
from manyheads.core.errors import DataError, UsageError
from manyheads.core.strict_json import Json, Wrong, parse
from manyheads.core.weights import check_fit, read_tensors
from manyheads.vision.models.timm_weights import FILES, load_timm_weights
from manyheads.vision.models.vim_checkpoints import imagenet_labels
from manyheads.vision.preprocessing import Preprocessing
from manyheads.vision.registration import CCT, VIM

MAX_CONFIG_BYTES = 8 << 20
_CROP_MODES = {"shorter": "center", "squash": "squash"}


def source(name: str) -> Source | None:
    """Return where timm publishes an architecture's weights, as the installed timm says; None if nowhere."""
    import timm

    if not timm.is_model(name) or name in VIM or name in CCT:
        return None
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.hf_hub_filename:
        return None
    return Source(cfg.hf_hub_id, "timm")


def convert(published: str | Path, folder: str | Path) -> hub.ModelConfig:
    """Write a model folder from one that timm, or `write`, has written.

    Args:
        published: With `config.json` and `model.safetensors` or `pytorch_model.bin`.
        folder: The model folder to write.

    Raises:
        DataError: It is of no architecture of the catalogue, or its tensors are not exactly that one's.
    """
    published = Path(published)
    config = _read_config(published / "config.json")
    name = str(config.get("architecture"))
    if name not in catalog.list_models("vision"):
        raise DataError(f"{published}: the catalogue has no architecture {name!r}")
    known = config.get("pretrained_cfg")
    cfg: dict[str, Any] = dict(known) if isinstance(known, dict) else {}
    arguments = _arguments(name, config, cfg)
    try:
        hub.check_buildable(name, arguments, _weights(published))
        model = catalog.create_model(name, **arguments)
    except UsageError as error:
        raise DataError(f"{published}: {error}") from error
    if name in VIM or name in CCT:
        state = read_tensors(_weights(published))
        check_fit(model, state, name)
        model.load_state_dict(state, strict=True)
    else:
        load_timm_weights(model, published)
    own: Mapping[str, object] = model.pretrained_cfg  # type: ignore[assignment]
    preprocessing = Preprocessing.from_timm({**own, **cfg}).to_json()
    return hub.save(
        folder,
        model,
        domain="vision",
        name=name,
        arguments=arguments,
        preprocessing={**preprocessing, "temperature": 1.0},
        labels=_labels(config, cfg, int(cast(int, model.num_classes))),
        training={"converted_from": str(cfg.get("tag") or published.name), "dialect": "timm"},
    )


def convert_cct(published: str | Path, folder: str | Path, *, name: str = "") -> hub.ModelConfig:
    """Write a model folder from a published file of CCT, which is named after its model.

    Args:
        published: The file.
        folder: The model folder to write.
        name: The catalogue name, where the file's name does not begin with it.

    Raises:
        DataError: It is of no CCT of the catalogue, or its tensors are not exactly that one's.
    """
    published = Path(published)
    found = name or max((each for each in CCT if published.stem.startswith(each)), key=len, default="")
    if found not in CCT:
        raise DataError(f"{published.name} is named after no CCT: say --option name=... ({', '.join(CCT)})")
    state = read_tensors(published, ("model",))
    head = state.get("classifier.fc.weight")
    if head is None or head.dim() != 2:
        raise DataError(f"{published.name} holds no weights of a CCT: no classifier.fc.weight")
    arguments = {"num_classes": len(head)}
    hub.check_buildable(found, arguments, published)
    model = catalog.create_model(found, **arguments)
    check_fit(model, state, found)
    model.load_state_dict(state, strict=True)
    cfg: Mapping[str, object] = model.pretrained_cfg  # type: ignore[assignment]
    return hub.save(
        folder,
        model,
        domain="vision",
        name=found,
        arguments=arguments,
        preprocessing={**Preprocessing.from_timm(cfg).to_json(), "temperature": 1.0},
        labels=imagenet_labels() if len(head) == 1000 else None,
        training={"converted_from": published.name, "dialect": "cct"},
    )


def write(folder: str | Path, target: str | Path) -> None:
    """Write a model folder of images as timm publishes its own.

    Args:
        folder: The model folder.
        target: The folder to write.

    Raises:
        UsageError: It is no model of images.
    """
    from timm.models import save_for_hf

    model, config = hub.load_model(folder)
    if config.domain != "vision":
        raise UsageError(f"timm's layout is for images, and {config.name} is a model of {config.domain}")
    model = _as_timm(model, config.name, config.arguments)
    saved = Preprocessing.from_json(config.preprocessing) if config.preprocessing else None
    cfg: dict[str, object] = {"tag": "", "num_classes": model.num_classes}
    if saved is not None:
        cfg |= {
            "input_size": [saved.channels, *saved.size],
            "mean": list(saved.mean),
            "std": list(saved.std),
            "interpolation": saved.interpolation,
            "crop_pct": saved.crop_pct,
            "crop_mode": _CROP_MODES[saved.resize],
        }
    about: dict[str, object] = {"pretrained_cfg": cfg}
    if config.labels:
        about["label_names"] = config.labels
    save_for_hf(model, str(target), model_config=about, safe_serialization=True, data_config=dict(cfg))


def _as_timm(model: nn.Module, name: str, arguments: Mapping[str, object]) -> nn.Module:
    """Return the model as timm builds it, which notes what it was built from; its own are so already."""
    import timm

    import manyheads.vision  # noqa: F401  # our models in timm's registry

    if name not in VIM and name not in CCT and timm.is_model(name):
        return model
    if not timm.is_model(name):
        raise UsageError(f"timm knows no {name}: only models of a fixed size are published in its layout")
    given = {key: value for key, value in arguments.items() if value is not None}
    found = timm.create_model(name, **given)
    check_fit(found, model.state_dict(), name)
    found.load_state_dict(model.state_dict(), strict=True)
    return cast(nn.Module, found)


def _read_config(file: Path) -> Mapping[str, Json]:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise DataError(f"{file} is too large for a config")
        found = parse(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error
    except Wrong as error:
        raise DataError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is no object")
    return found


def _weights(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has neither {' nor '.join(FILES)}")


def _arguments(name: str, config: Mapping[str, Json], cfg: Mapping[str, Any]) -> dict[str, object]:
    """The builder's arguments: those that timm noted, the classes, and the image's size if it is another."""
    import timm

    import manyheads.vision  # noqa: F401

    takes = {part.partition(":")[0] for part in catalog.arguments(catalog.find(name)).split(", ")}
    noted = config.get("model_args") or {}
    if not isinstance(noted, dict):
        raise DataError("config.json: model_args is no object")
    classes = config.get("num_classes", cfg.get("num_classes", 1000))
    if type(classes) is not int or not 0 <= classes <= 1 << 20:
        raise DataError(f"config.json: num_classes is {str(classes)[:40]}")
    found: dict[str, object] = {"num_classes": classes}
    for key, value in noted.items():
        if key not in takes:
            raise DataError(f"config.json: {name} takes no argument {key!r}")
        found[key] = value
    default = timm.get_pretrained_cfg(name)
    usual = list(default.input_size) if default is not None else [3, 224, 224]
    size = cfg.get("input_size", usual)
    if not isinstance(size, list | tuple) or len(size) != 3 or not all(type(n) is int for n in size):
        raise DataError(f"config.json: input_size is {str(size)[:40]}")
    if size[0] != usual[0]:
        found.setdefault("in_chans", size[0])
    if list(size[1:]) != usual[1:] and "img_size" in takes and cfg.get("fixed_input_size"):
        found.setdefault("img_size", list(size[1:]) if size[1] != size[2] else size[1])
    return found


def _labels(config: Mapping[str, Json], cfg: Mapping[str, Any], classes: int) -> list[str] | None:
    names = config.get("label_names") or cfg.get("label_names")
    if isinstance(names, dict):
        names = [names.get(str(index), "") for index in range(classes)]
    if isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names):
        described = config.get("label_descriptions")
        words = described if isinstance(described, dict) else {}
        return [str(words.get(str(name), name)) for name in names]
    return imagenet_labels() if classes == 1000 else None

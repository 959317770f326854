"""Vim's published files, which are whole training checkpoints, become model folders; nothing in them is run.

A file holds `{model, model_ema, optimizer, ..., args}`, args an `argparse.Namespace`, which is the one class
that is let in beside tensors and plain values.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from manyheads.core import hub
from manyheads.core.errors import DataError, UsageError
from manyheads.core.weights import load_pickle, misfits
from manyheads.vision.models import vim
from manyheads.vision.models.class_tokens import Grid, PosResize, resize_pos_embed, square_grid

State = Mapping[str, Tensor]
WIDTHS = {192: "tiny", 384: "small", 768: "base"}
NAMES = {
    "vim_tiny_patch16_224": vim.vim_tiny_patch16_224,
    "vim_tiny_patch16_stride8_224": vim.vim_tiny_patch16_stride8_224,
    "vim_small_patch16_224": vim.vim_small_patch16_224,
    "vim_small_patch16_stride8_224": vim.vim_small_patch16_stride8_224,
    "vim_base_patch16_224": vim.vim_base_patch16_224,
}
PATCH = 16


def convert(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    img_size: int | None = None,
    num_classes: int = 1000,
    ema: bool = False,
    labels: list[str] | None = None,
) -> hub.ModelConfig:
    """Write a model folder from a published `.pth` file, or another checkpoint of the same training code.

    Args:
        checkpoint: The file.
        folder: The model folder to write.
        name: The catalogue name; None means that of the weights' width and stride.
        img_size: Side of the training images; None means what the checkpoint says.
        num_classes: Of the classifier. Another number than the published 1000 has to be said.
        ema: Take the averaged weights.
        labels: Names of the classes; None means ImageNet's where the checkpoint says that it is ImageNet's.

    Raises:
        UsageError: No such name, or another number of labels than classes.
        DataError: The file cannot be read, holds more than tensors and plain values, or not exactly the
            weights of that model.

    Example:
        >>> convert("vim_t_midclstok_76p1acc.pth", "vim_tiny")  # doctest: +SKIP
    """
    from manyheads.vision.preprocessing import Preprocessing

    state, options = read_checkpoint(checkpoint, ema=ema)
    check_release(state)
    if name is not None and name not in NAMES:
        raise UsageError(f"no Vim {name!r} (known: {', '.join(NAMES)})")
    guessed, side = _guess(state, options)
    name, size = name or guessed, img_size or side
    if name not in NAMES:
        raise DataError(f"the catalogue has no {name}; name= says which Vim the weights are of")
    found = len(state["head.weight"]) if "head.weight" in state else 0
    if found not in (0, num_classes):
        raise DataError(
            f"the classifier has {found} classes, not {num_classes}: if so, say num_classes={found}"
        )
    model = NAMES[name](num_classes=num_classes, img_size=size)
    load_strictly(model, state, name)
    if labels is None and num_classes == 1000 and options.get("data_set") == "IMNET":
        labels = imagenet_labels()
    if labels is not None and len(labels) != num_classes:
        raise UsageError(f"{len(labels)} labels for {num_classes} classes")
    return hub.save(
        folder,
        model,
        domain="vision",
        name=name,
        arguments={"num_classes": num_classes, "in_chans": 3, "img_size": size},
        preprocessing={**Preprocessing.from_timm(model.pretrained_cfg, size).to_json(), "temperature": 1.0},
        labels=labels,
        training={"converted_from": Path(checkpoint).name, "ema": ema},
    )


def read_checkpoint(path: str | Path, *, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read a training checkpoint: the weights, and the options that it was trained with.

    Args:
        ema: The averaged weights instead.

    Raises:
        DataError: No such file, or damaged, or it holds more than tensors and plain values, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}")
    try:
        found = load_pickle(path, [argparse.Namespace])
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else "it is damaged or no checkpoint of torch's"
        raise DataError(
            f"{path} is refused: {reason}; tensors, plain values and argparse.Namespace are all that is read"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no training checkpoint: it holds a {type(found).__name__}, not a dict")
    given = found.get("args")
    options = dict(vars(given)) if isinstance(given, argparse.Namespace) else {}
    bare = bool(found) and all(isinstance(value, Tensor) for value in found.values())
    key = "model_ema" if ema else "model"
    state = found if bare and not ema else found.get(key)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        kept = ", ".join(sorted(map(str, found))[:6])
        raise DataError(f"{path} has no weights under {key!r} (it holds {kept})")
    return {str(name): value for name, value in state.items()}, options


def check_release(state: State) -> None:
    """Refuse what is not of the release that is built here, and say what it is.

    Raises:
        DataError: The first release, with rotary positions, or no Vim.
    """
    if any(name.startswith("rope.") for name in state):
        raise DataError(
            "these are weights of Vim's first release (rotary positions, such as vim_tiny_73p1.pth), whose"
            " model differs; the later files (vim_*_midclstok_*.pth) are read"
        )
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise DataError("these are no weights of Vim: no patch_embed.proj.weight or no pos_embed")


def load_strictly(model: nn.Module, state: State, name: str) -> None:
    """Load weights of which every tensor is used and fits; else change nothing.

    Raises:
        DataError: A tensor is missing, left over or of another shape.
    """
    if faults := misfits(model.state_dict(), state):
        raise DataError(f"these weights are not those of {name}: {faults}")
    model.load_state_dict(state, strict=True)


def fit_pos_embed(
    state: State,
    model: vim.VisionMamba,
    *,
    grid: Grid | None = None,
    pos_resize: PosResize | None = None,
) -> dict[str, Tensor]:
    """Return a state dict whose position embedding has the model's image size; the rest is as it was.

    Args:
        grid: Patches that the weights were trained with; None means a square.
        pos_resize: As `resize_pos_embed`; None means the model's.

    Raises:
        DataError: The embedding has another number of rows than the grid.
    """
    fitted = dict(state)
    if "pos_embed" in fitted and fitted["pos_embed"].shape != model.pos_embed.shape:
        old = grid or square_grid(fitted["pos_embed"].shape[1], model.class_token)
        fitted["pos_embed"] = resize_pos_embed(
            fitted["pos_embed"], old, model.grid_size, model.class_token, pos_resize or model.pos_resize
        )
    return fitted


def filter_vim(state: Mapping[str, object], model: vim.VisionMamba) -> dict[str, Tensor]:
    """What timm calls on a checkpoint before it loads it: take the weights out, and fit the positions."""
    found = state.get("model", state)
    check_release(found)  # type: ignore[arg-type]
    return fit_pos_embed(found, model)  # type: ignore[arg-type]


def imagenet_labels() -> list[str]:
    """ImageNet's 1000 classes in words; the two that share a word have their number beside it."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = [str(info.index_to_description(i)) for i in range(1000)]
    return [
        f"{word} ({info.index_to_label_name(i)})" if words.count(word) > 1 else word
        for i, word in enumerate(words)
    ]


def _guess(state: State, options: Mapping[str, object]) -> tuple[str, int]:
    """The catalogue name of weights, and the side of the images they were trained on."""
    width, rows = len(state["patch_embed.proj.weight"]), state["pos_embed"].shape[1]
    if width not in WIDTHS:
        raise DataError(f"no Vim of the catalogue has tokens of {width} numbers (they have 192, 384, 768)")
    trained = str(options.get("model", ""))
    stride = 8 if "stride8" in trained or (not trained and rows == 730) else 16
    patches = math.isqrt(rows - 1)
    side = (patches - 1) * stride + PATCH
    said = options.get("input_size")
    stated = said if isinstance(said, int) and not isinstance(said, bool) and said >= PATCH else side
    return f"vim_{WIDTHS[width]}_patch16_{'stride8_' if stride == 8 else ''}224", stated

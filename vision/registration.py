"""Our models in timm's registry: `timm.create_model("vim_tiny_patch16_224")` builds them like its own.

Weights: a state dict or a file of tensors comes in by `pretrained_cfg_overlay={"file": ...}`. Vim's published
files are whole training checkpoints, pickled, which are converted once instead (`vim_checkpoints`); the
`pretrained_cfg` says where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.vision.models import cct, vim
from manyheads.vision.models.pretrained_cfg import CIFAR10, IMAGENET, evaluation
from manyheads.vision.models.vim_checkpoints import filter_vim

Builder = Callable[..., nn.Module]
Cfg = dict[str, Any]

VIM: dict[str, tuple[Builder, tuple[str, str]]] = {  # builder; the hub's repository and file
    "vim_tiny_patch16_224": (
        vim.vim_tiny_patch16_224,
        ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    ),
    "vim_tiny_patch16_stride8_224": (
        vim.vim_tiny_patch16_stride8_224,
        ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
    ),
    "vim_small_patch16_224": (
        vim.vim_small_patch16_224,
        ("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
    ),
    "vim_small_patch16_stride8_224": (
        vim.vim_small_patch16_stride8_224,
        ("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
    ),
    "vim_base_patch16_224": (
        vim.vim_base_patch16_224,
        ("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
    ),
}
# Builder, image size, classes, and the file below shi-labs.com/projects/cct/checkpoints, where there is one.
CCT: dict[str, tuple[Builder, int, int, str]] = {
    "cct_2_3x2_32": (cct.cct_2_3x2_32, 32, 10, ""),
    "cct_4_3x2_32": (cct.cct_4_3x2_32, 32, 10, ""),
    "cct_6_3x1_32": (cct.cct_6_3x1_32, 32, 10, ""),
    "cct_7_3x1_32": (cct.cct_7_3x1_32, 32, 10, "pretrained/cct_7_3x1_32_cifar10_300epochs.pth"),
    "cct_7_3x2_32": (cct.cct_7_3x2_32, 32, 10, ""),
    "cct_14_7x2_224": (cct.cct_14_7x2_224, 224, 1000, "pretrained/cct_14_7x2_224_imagenet.pth"),
    "cct_14_7x2_384": (cct.cct_14_7x2_384, 384, 1000, "finetuned/cct_14_7x2_384_imagenet.pth"),
}


def _vim_cfg(repository: str, file: str) -> Cfg:
    cfg = evaluation((3, 224, 224), IMAGENET, 0.875, 1000, "patch_embed.proj", "head")
    return cfg | {"hf_hub_id": repository, "hf_hub_filename": file, "license": "apache-2.0",
                  "paper_ids": "arXiv:2401.09417"}  # fmt: skip


def _cct_cfg(size: int, classes: int, file: str) -> Cfg:
    settings = (CIFAR10, 1.0) if size == 32 else (IMAGENET, 0.9)
    names = ("tokenizer.conv_layers.0.0", "classifier.fc")
    cfg = evaluation((3, size, size), *settings, classes, *names)
    source = {"url": f"https://shi-labs.com/projects/cct/checkpoints/{file}"} if file else {}
    return cfg | source | {"license": "apache-2.0", "paper_ids": "arXiv:2104.05704"}


# timm reads this name in the module of an entry point.
default_cfgs = generate_default_cfgs(
    {name: _vim_cfg(*source) for name, (_, source) in VIM.items()}
    | {name: _cct_cfg(*rest) for name, (_, *rest) in CCT.items()}  # type: ignore[arg-type]
)


def _entry_point(
    name: str, build: Builder, convert: Callable[..., Any], published: tuple[str, ...]
) -> Builder:
    """The function that timm calls for a name.

    Args:
        convert: Makes a checkpoint's state dict fit the model.
        published: Where the weights are that timm cannot load; empty where it can.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and published and not (cfg.file or cfg.state_dict) and cfg.hf_hub_filename in published:
            raise UsageError(
                f"{name}: the published weights ({'/'.join(published)}) are a training checkpoint, not"
                " tensors alone. Convert it once (manyheads.vision.models.vim_checkpoints.convert), then give"
                " pretrained_cfg_overlay={'file': 'FOLDER/model.safetensors'}"
            )
        return build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_filter_fn=convert,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build {name}; arguments as timm.create_model's."
    return create


def register() -> None:
    """Enter our models in timm's registry, where they are not yet."""
    points = [_entry_point(name, build, filter_vim, source) for name, (build, source) in VIM.items()]
    points += [_entry_point(name, build, cct.filter_cct, ()) for name, (build, *_) in CCT.items()]
    for point in points:
        if not timm.is_model(point.__name__):
            register_model(point)

"""How others publish weights of our image models, and where ours by name are. Data only."""

from __future__ import annotations

from manyheads.core.dialects import Dialect, Source

DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="timm",
        summary="timm's folders: config.json names an architecture and its preprocessing",
        files=("config.json", "model.safetensors|pytorch_model.bin"),
        mark=("config.json", "architecture", ("*",)),
        converter="manyheads.vision.models.timm_folders:convert",
    ),
    Dialect(
        name="vim",
        summary="training checkpoints of Vim's authors",
        files=("vim_*.pth",),
        converter="manyheads.vision.models.vim_checkpoints:convert",
        options=("name", "img_size", "num_classes", "ema"),
    ),
    Dialect(
        name="cct",
        summary="state dicts of CCT's authors, named after the model",
        files=("cct_*.pth",),
        converter="manyheads.vision.models.timm_folders:convert_cct",
        options=("name",),
    ),
)


def _vim(size: str, file: str) -> Source:
    return Source(f"hustvl/Vim-{size}-midclstok", "vim", file)


SOURCES: dict[str, Source] = {
    "vim_tiny_patch16_224": _vim("tiny", "vim_t_midclstok_76p1acc.pth"),
    "vim_tiny_patch16_stride8_224": _vim("tiny", "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_small_patch16_224": _vim("small", "vim_s_midclstok_80p5acc.pth"),
    "vim_small_patch16_stride8_224": _vim("small", "vim_s_midclstok_ft_81p6acc.pth"),
    "vim_base_patch16_224": _vim("base", "vim_b_midclstok_81p9acc.pth"),
}
FIND = "manyheads.vision.models.timm_folders:source"  # timm's architectures, as timm says

"""Parity of every catalogue entry with its original: python -m benchmarks.parity [--full] [--only GLOB].

A line an entry. timm's architectures are compared with timm's own: names, shapes and numbers of parameters at
real size (without memory behind them), then outputs and gradients with the same weights, none of which is as
trivial as an initial bias or norm. By default that is at reduced size: the variant's flags and heads, with
fewer blocks, channels and pixels; --full takes the real size where a forward pass is cheap enough. Families
whose original is no package are held to recorded cases of the official code, in tests/golden.
Differences of outputs are relative to the largest output where that is above 1; of a gradient, relative to
its largest value. Exits with 1 where a line fails. --json FILE stores the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from timm.models.maxxvit import ConvNeXtBlock, MaxxVit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import recorded
from manyheads.core import catalog
from manyheads.core.catalog import Entry
from manyheads.vision.models.maxvit import RENAMED

OUTPUTS, GRADIENTS = 1e-4, 1e-3  # what is allowed, in float32
TABLES = ("relative_position_bias_table", "cpb_mlp", "meta_mlp", "rel_pos.mlp", "logit_scale")
AFFORDABLE = 12e9  # operations of a forward pass that --full still runs: a second or two on two cores
TIMM = ("vit", "swin", "maxvit")
Args = dict[str, object]


@dataclass(frozen=True)
class Line:
    """What was found for an entry; None where there is no such thing to count or compare."""

    name: str
    original: str
    size: str
    parameters: int
    original_parameters: int | None
    keys_equal: bool
    replaced: int | None
    outputs: float
    gradients: float
    tables: float | None
    ok: bool

    def text(self) -> str:
        """The line of the printed table."""
        tables = "-" if self.tables is None else f"{self.tables:.0e}"
        counted = "-" if self.original_parameters is None else f"{self.original_parameters:,}"
        replaced = "-" if self.replaced is None else self.replaced
        return (
            f"{self.name:<42} {self.size:<8} {self.parameters:>13,} {counted:>13} "
            f"{'equal' if self.keys_equal else 'DIFFER':<6} {replaced:>4} {self.outputs:>8.0e} "
            f"{self.gradients:>9.0e} {tables:>7}  {'ok' if self.ok else 'FAILS':<5} {self.original}"
        )


HEADER = (
    f"{'entry':<42} {'size':<8} {'parameters':>13} {'original':>13} {'keys':<6} {'ours':>4} {'outputs':>8} "
    f"{'gradients':>9} {'tables':>7}  {'':<5} against"
)


def compare_with_timm(entry: Entry, full: bool = False) -> Line:
    """Compare an entry with timm's model of its name."""
    with torch.device("meta"):
        ours, theirs = catalog.create_model(entry.name), timm.create_model(entry.name, num_classes=1000)
    shapes = [[(key, value.shape) for key, value in m.state_dict().items()] for m in (ours, theirs)]
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    size = image_size(theirs)
    real = full and operations(theirs, size) <= AFFORDABLE
    args = {} if real else reduced(theirs)
    found = values(entry.name, args, size if real else args.get("img_size", size))  # type: ignore[arg-type]
    # Differential attention is the one kind of self-attention that stays timm's.
    replaced, least = int(ours.core_attention), 0 if "_d" in entry.name.partition("patch")[0] else 1  # type: ignore[arg-type]
    outputs, gradients, tables = found
    ok = shapes[0] == shapes[1] and counts[0] == counts[1] and replaced >= least
    ok = ok and outputs <= OUTPUTS and gradients <= GRADIENTS
    return Line(
        entry.name, f"timm {timm.__version__}", "real" if real else "reduced", counts[0], counts[1],
        shapes[0] == shapes[1], replaced, outputs, gradients, tables, ok,
    )  # fmt: skip


def compare_with_recorded(entry: Entry) -> Line:
    """Hold an entry's family to the official code's recorded cases, and its size to the published one."""
    family = entry.name.partition("_")[0]
    with torch.device("meta"):
        count = sum(p.numel() for p in catalog.create_model(entry.name).parameters())
    origin, outputs, gradients = recorded.differences(family)
    published = recorded.COUNTS.get(entry.name)
    ok = outputs <= OUTPUTS and gradients <= GRADIENTS and published in (None, count)
    return Line(entry.name, origin, "recorded", count, published, True, None, outputs, gradients, None, ok)


def image_size(model: nn.Module) -> int:
    """The side of the images that a timm model is made for."""
    return int(model.pretrained_cfg["input_size"][-1])  # type: ignore[index]


def operations(model: nn.Module, size: int) -> int:
    """Floating point operations of a forward pass, counted on the model without memory."""
    model.eval().requires_grad_(False)  # the counter would follow gradients
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def reduced(model: nn.Module) -> Args:
    """Arguments for a small model of the same variant: its heads and windows, fewer blocks and channels."""
    if isinstance(model, MaxxVit):
        stages = range(len(model.stages))  # type: ignore[arg-type]
        widths = [32 * (i + 1) for i in stages]
        if any(isinstance(module, ConvNeXtBlock) for module in model.modules()):
            widths = [int(model.stem.out_chs) * 2**i for i in stages]  # type: ignore[arg-type, union-attr]
        return {"embed_dim": widths, "depths": [1 for _ in stages], "img_size": 128}
    if hasattr(model, "blocks"):  # ViT
        first = model.blocks[0]  # type: ignore[index]
        heads = next(int(m.num_heads) for m in first.modules() if hasattr(m, "num_heads"))
        by = max(int(info["reduction"]) for info in model.feature_info)  # type: ignore[union-attr]
        args: Args = {"depth": 2, "img_size": 5 * by}
        projected = not isinstance(getattr(model.patch_embed, "proj", None), nn.Identity)
        return args | {"embed_dim": 8 * heads} if projected else args
    stages = model.stages if "Cr" in type(model).__name__ else model.layers  # Swin
    block = stages[0].blocks[0]  # type: ignore[index, union-attr]
    heads, window = block.attn.num_heads, block.window_size[0]
    # Six blocks, as the largest of the CR variant have a norm more after every sixth.
    depths = [min(len(stage.blocks), 6 if i == 2 else 2) for i, stage in enumerate(stages)]  # type: ignore[arg-type, union-attr]
    size = 128 if "Cr" in type(model).__name__ else 4 * window * (4 if window < 10 else 2)
    return {"embed_dim": 8 * heads, "depths": depths, "img_size": size}


def values(name: str, args: Args, size: int) -> tuple[float, float, float | None]:
    """Compare outputs, gradients, and among them those of tables of relative positions."""
    torch.manual_seed(0)
    ours = catalog.create_model(name, **args).eval()
    renamed = {RENAMED.get(key, key): value for key, value in args.items()}
    theirs = timm.create_model(name, num_classes=1000, **renamed).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2 if args else 1, 3, size, size)
    with torch.no_grad():  # where other kernels may be taken
        found = [model(x) for model in (ours, theirs)]
    out, want = ours(x), theirs(x)
    cotangent = torch.randn(want.shape)
    for result in (out, want):
        result.backward(cotangent)
    errors = [(a - b).abs().max().item() for a, b in (found, (out, want))]
    difference = max(errors) / max(1.0, want.abs().max().item())
    gradients = dict(_gradient_errors(ours, theirs))
    tables = [error for key, error in gradients.items() if any(part in key for part in TABLES)]
    return difference, max(gradients.values()), max(tables, default=None)


def randomise(model: nn.Module) -> None:
    """Give biases, norms, scales, tables and running statistics other than their first, trivial values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or "table" in name or "logit_scale" in name:
                p.add_(0.2 * torch.randn(p.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.2 * torch.randn(buffer.shape))
            elif name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape))


def _gradient_errors(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, float]]:
    """The largest difference of each gradient, relative to its largest value.

    A gradient that is zero but for rounding (a constant added to all scores) is held to the others' size.
    """
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys(), "gradients of other parameters"
    sizes = {name: grad.abs().max().item() for name, grad in wanted.items()}
    least = 1e-2 * torch.tensor(list(sizes.values())).median().item()
    for name, grad in wanted.items():
        mine: Tensor | None = found[name]
        assert mine is not None
        yield name, (mine - grad).abs().max().item() / max(sizes[name], least)


def lines(found: list[Entry], full: bool) -> Iterator[Line]:
    """Compare entries, one by one."""
    for entry in found:
        if entry.builder.rpartition(":")[2] in TIMM:
            yield compare_with_timm(entry, full)
        else:
            yield compare_with_recorded(entry)


def store(path: Path, table: list[Line]) -> None:
    """Write the table so far."""
    facts = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    path.write_text(json.dumps({"facts": facts, "rows": [asdict(line) for line in table]}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", default="vision", choices=["vision"])
    parser.add_argument("--full", action="store_true", help="real sizes where a forward pass is cheap enough")
    parser.add_argument("--only", metavar="GLOB", help="entries whose names fit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also store the table here")
    options = parser.parse_args()
    start = time.perf_counter()
    print(HEADER)
    table: list[Line] = []
    for line in lines(catalog.matching(catalog.entries(options.domain), options.only), options.full):
        table.append(line)
        print(line.text(), flush=True)
        if options.json:
            store(options.json, table)
    failed = [line.name for line in table if not line.ok]
    print(f"{len(table) - len(failed)} of {len(table)} ok, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

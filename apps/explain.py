"""`manyheads vision explain`: what a model looks at in photos, as pictures.

Only options are read here; the work is in `apps.explaining`, which imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manyheads.apps.arguments import Parser, make_parser, positive
from manyheads.core.errors import UsageError

_EPILOG = """\
methods:
  rollout   which patches reach what the classifier reads, through all layers, whatever the class: ViT, DeiT,
            CCT, and Vim by the attention that its scans hide
  gradcam   which patches speak for a class: every model (the only method for Swin and MaxViT)
  auto      rollout where the model has it and neither --class nor a layer's name is given, else gradcam

examples:
  manyheads vision explain runs/vit/model photos/dog.jpg -o maps
  manyheads vision explain runs/vim photos -o maps --class "golden retriever"
  manyheads vision explain runs/swin/model photos/*.jpg -o maps --method gradcam --layer layers.2 --json"""


@dataclass(frozen=True)
class ExplainOptions:
    """What to explain.

    Args:
        model: A model folder or a run folder.
        images: Images, folders of them, or other sources that `manyheads predict` takes.
        output: The folder for the pictures.
        method: How.
        label: The class to explain, by name or number; None for each image's likeliest.
        layer: A layer's number from 1, or a module's name; None for the method's own.
        heads: How rollout makes one map of those of a layer's heads.
        discard: The share of each map's lowest weights that rollout drops.
        top: How many classes are drawn as bars.
        json: Print the results as JSON.
    """

    model: Path
    images: tuple[str, ...]
    output: Path
    method: Literal["auto", "rollout", "gradcam"] = "auto"
    label: str | None = None
    layer: int | str | None = None
    heads: Literal["mean", "max", "min"] = "mean"
    discard: float = 0.0
    top: int = 3
    json: bool = False


def _parser() -> Parser:
    parser = make_parser(
        "vision explain",
        "Draw what a model looks at: for each image the photo, the photo under the map, and the likeliest\n"
        "classes. Images that cannot be read are reported, the others drawn; the exit code is then 3.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a model folder, or a run folder")
    add("images", metavar="IMAGE", nargs="+", help="images, folders of them, or a CSV or parquet list")
    add("-o", "--output", metavar="DIR", type=Path, required=True, help="the folder for the pictures")
    add("--method", choices=("auto", "rollout", "gradcam"), default="auto", help="how (auto)")
    add(
        "--class", dest="label", metavar="NAME_OR_INDEX", help="the class to explain (each image's likeliest)"
    )
    add("--layer", help="a layer from 1, or for gradcam a module's name (all layers; gradcam: the last)")
    add(
        "--heads",
        choices=("mean", "max", "min"),
        default="mean",
        help="rollout: one map of all heads' (mean)",
    )
    add("--discard", type=float, default=0.0, help="rollout: share of lowest weights that is dropped (0)")
    add("--top", type=int, default=3, help="classes to draw as bars (3)")
    add("--json", action="store_true", help="print the results as JSON")
    return parser


def read_options(args: Sequence[str]) -> ExplainOptions:
    """Read and check the command line; imports no torch.

    Raises:
        UsageError: What is wrong.
    """
    given = _parser().parse(args)
    positive("--top", given.top)
    if not 0 <= given.discard < 1:
        raise UsageError(f"--discard takes a share from 0 to below 1, not {given.discard:g}")
    if given.method == "rollout" and given.label is not None:
        raise UsageError("--method rollout is the same for every class: leave --class out, or take gradcam")
    if given.method == "gradcam" and (given.heads != "mean" or given.discard):
        raise UsageError("--heads and --discard are for --method rollout")
    if given.output.exists() and not given.output.is_dir():
        raise UsageError(f"{given.output} is no folder")
    layer = given.layer
    if layer is not None and layer.lstrip("-").isdecimal():
        layer = positive("--layer", int(layer))
    elif layer is not None and given.method == "rollout":
        raise UsageError(f"--method rollout takes a layer's number, not {layer!r}")
    return ExplainOptions(
        model=given.model,
        images=tuple(given.images),
        output=given.output,
        method=given.method,
        label=given.label,
        layer=layer,
        heads=given.heads,
        discard=given.discard,
        top=given.top,
        json=given.json,
    )


def main(args: Sequence[str]) -> int:
    """Run the command."""
    read = read_options(args)
    from manyheads.apps.explaining import run

    return run(read)

"""`manyheads vision knn`: how well a model's features separate classes, by nearest neighbours.

Only options are read here; the work is in `apps.nearest`, which imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyheads.apps.arguments import Parser, make_parser, positive
from manyheads.core.errors import UsageError

_EPILOG = """\
sources: a folder of class folders (or of train/, val/ and test/ with them), a CSV or parquet table, a zip
archive, or a data set's name (`manyheads data list`). Of one that names its parts, --train takes the training
part and --test the test part (validation where there is none).

examples:
  manyheads vision knn runs/vit/model --train cifar10_10k
  manyheads vision knn runs/vim/model --train photos/train --test photos/val --k 10 20 100 --json"""


@dataclass(frozen=True)
class KnnOptions:
    """What to measure.

    Args:
        model: A model folder or a run folder.
        train: The images whose classes vote.
        test: The images to classify.
        ks: How many neighbours vote; each has its figures.
        temperature: Divides cosines.
        batch_size: Images a batch; None for the model's default.
        json: Print the results as JSON.
        quiet: Print results alone.
    """

    model: Path
    train: str
    test: str
    ks: tuple[int, ...] = (20,)
    temperature: float = 0.07
    batch_size: int | None = None
    json: bool = False
    quiet: bool = False


def _parser() -> Parser:
    parser = make_parser(
        "vision knn",
        "Classify images by their nearest neighbours in a model's features, as DINO is evaluated: cosine\n"
        "similarity, votes of exp(similarity / temperature). Nothing is trained.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a model folder, or a run folder")
    add("--train", metavar="SOURCE", required=True, help="the images whose classes vote")
    add("--test", metavar="SOURCE", help="the images to classify (the test part of --train's source)")
    add("--k", type=int, nargs="+", default=[20], help="how many neighbours vote, one number or several (20)")
    add("--temperature", type=float, default=0.07, help="the lower, the more the nearest count (0.07)")
    add("--batch-size", type=int, help="images a batch (the model's default)")
    add("--json", action="store_true", help="print the results as JSON")
    add("--quiet", action="store_true", help="no progress")
    return parser


def read_options(args: Sequence[str]) -> KnnOptions:
    """Read and check the command line; imports no torch.

    Raises:
        UsageError: What is wrong.
    """
    given = _parser().parse(args)
    for k in given.k:
        positive("--k", k)
    if len(set(given.k)) != len(given.k):
        raise UsageError("--k names a number twice")
    if not (given.temperature > 0 and math.isfinite(given.temperature)):
        raise UsageError(f"--temperature must be above 0, not {given.temperature:g}")
    return KnnOptions(
        model=given.model,
        train=given.train,
        test=given.test or given.train,
        ks=tuple(given.k),
        temperature=given.temperature,
        batch_size=positive("--batch-size", given.batch_size),
        json=given.json,
        quiet=given.quiet or given.json,
    )


def main(args: Sequence[str]) -> int:
    """Run the command."""
    read = read_options(args)
    from manyheads.apps.nearest import run

    return run(read)

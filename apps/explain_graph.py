"""`manyheads graph explain`: what a model's predictions of molecules, graphs or nodes rest on.

Only options are read here; the work is in `apps.explaining_graph`, which imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manyheads.apps.arguments import Parser, make_parser, positive
from manyheads.core.errors import UsageError

_EPILOG = """\
what is written:
  rows.csv            a line a row: the prediction, the baseline's, and what nodes and edges add up to
  nodes.parquet       what each node adds (integrated gradients)
  edges.parquet       what each edge adds, where edges are of kinds or have features
  features.parquet    of nodes with features: the largest of what each feature of a node adds
  attention.parquet   of graph transformers: how much each node takes from others
  pictures/           a picture a row

Numbers are in the target's units; of classes and labels they are log-odds. The baseline is the same graph
with nothing in its nodes and edges (zero: the default for features), or with each like the graph's average
one (mean: the default for categories, such as atoms).

examples:
  manyheads graph explain runs/esol/model molecules.csv -o why --most 10
  manyheads graph explain runs/zinc molecules.parquet -o why --row ZINC001 --weights each
  manyheads graph explain runs/cora/model cora -o why --row 1061127 --target Theory"""


@dataclass(frozen=True)
class ExplainOptions:
    """What to explain.

    Args:
        model: A model folder or a run folder.
        inputs: What `manyheads predict` takes.
        output: The folder to fill.
        rows: Ids of the rows to explain; none for the first ones.
        most: How many rows are explained where none are named.
        target: The target's name, or the class to explain; None where there is one target, or for each row's
            likeliest class.
        method: "attributions", "attention" or both, as far as the model has it.
        baseline: What attributions are measured from; None for the usual one of what nodes are.
        weights: "mean", or a row for "each" layer and head.
        pictures: Whether to draw.
        smiles_column, id_column: Of tables of SMILES.
        json: Print the results as JSON.
    """

    model: Path
    inputs: tuple[str, ...]
    output: Path
    rows: tuple[str, ...] = ()
    most: int = 20
    target: str | None = None
    method: Literal["both", "attributions", "attention"] = "both"
    baseline: Literal["zero", "mean"] | None = None
    weights: Literal["mean", "each"] = "mean"
    pictures: bool = True
    smiles_column: str | None = None
    id_column: str | None = None
    json: bool = False


def _parser() -> Parser:
    parser = make_parser(
        "graph explain",
        "Say what predictions rest on: what each node, edge and feature adds to a prediction, and how much\n"
        "nodes attend to each other; as tables and pictures. Rows that cannot be used are reported, the\n"
        "others explained; the exit code is then 3.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a model folder, or a run folder")
    add("inputs", metavar="INPUT", nargs="+", help="tables of SMILES, or folders of tables of graphs")
    add("-o", "--output", metavar="DIR", type=Path, required=True, help="the folder to fill")
    add(
        "--row", dest="rows", metavar="ID", nargs="+", action="extend", help="ids to explain (the first ones)"
    )
    add("--most", type=int, default=20, metavar="N", help="rows to explain where none are named (20)")
    add("--target", metavar="NAME", help="the target, or the class to explain (each row's likeliest class)")
    add(
        "--method", choices=("both", "attributions", "attention"), default="both", help="what to write (both)"
    )
    add("--baseline", choices=("zero", "mean"), help="what attributions start from (by the kind of nodes)")
    add(
        "--weights",
        choices=("mean", "each"),
        default="mean",
        help="attention: the mean of all layers and heads, or each (mean)",
    )
    add("--no-pictures", action="store_true", help="write tables alone")
    add("--smiles-column", metavar="NAME", help="column of SMILES (smiles)")
    add("--id-column", metavar="NAME", help="column of ids (id)")
    add("--json", action="store_true", help="print the results as JSON")
    return parser


def read_options(args: Sequence[str]) -> ExplainOptions:
    """Read and check the command line; imports no torch.

    Raises:
        UsageError: What is wrong.
    """
    given = _parser().parse(args)
    positive("--most", given.most)
    if given.output.exists() and not given.output.is_dir():
        raise UsageError(f"{given.output} is no folder")
    if given.method == "attention" and (given.target is not None or given.baseline is not None):
        raise UsageError(
            "--target and --baseline are for attributions: attention is the same for all targets"
        )
    return ExplainOptions(
        model=given.model,
        inputs=tuple(given.inputs),
        output=given.output,
        rows=tuple(given.rows or ()),
        most=given.most,
        target=given.target,
        method=given.method,
        baseline=given.baseline,
        weights=given.weights,
        pictures=not given.no_pictures,
        smiles_column=given.smiles_column,
        id_column=given.id_column,
        json=given.json,
    )


def main(args: Sequence[str]) -> int:
    """Run the command."""
    read = read_options(args)
    from manyheads.apps.explaining_graph import run

    return run(read)

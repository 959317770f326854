"""`manyheads export`: a model as a torch.export program or an ONNX file, checked against the model itself.

Only options are read here; the work is in `apps.exporting`, which imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from manyheads.apps.arguments import Parser, make_parser, positive
from manyheads.apps.export_table import EXPORTS
from manyheads.core.errors import BadRecord, ManyheadsError, UsageError

if TYPE_CHECKING:
    from manyheads.apps.exportable import Exportable, Inputs
    from manyheads.apps.exporting import Exported, Format
    from manyheads.core.hub import ModelConfig

SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}
# Real data of a domain that the model may take, where they are on this machine.
SAMPLES = {
    "vision": ("imagenet_samples", "cifar10_10k", "fashion_mnist"),
    "timeseries": ("etth1",),
    "speech": ("speechbrain_samples", "ljspeech_samples"),
    "graph": ("esol",),
    "recsys": ("ml_100k",),
}
_EPILOG = """\
The JSON beside the file names inputs, outputs, the axes that vary, the preprocessing and the labels: what
another runtime must do before and after. `.pt2` is read by torch.export.load, without Manyheads.

examples:
  manyheads export runs/vit/model --format onnx -o vit.onnx --check photos/
  manyheads export quickstart/model --format torch -o forecaster.pt2
  manyheads export --list"""


def _parser() -> Parser:
    parser = make_parser(
        "export",
        "Write a model for other runtimes, by torch.export or as ONNX, for batches of any size. Then run\n"
        "the file beside the model at two batch sizes, and keep it only if their outputs agree.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a model folder, a run folder, or org/name[@revision]")
    add("--format", choices=tuple(SUFFIX), help="torch (.pt2) or onnx")
    add("-o", "--output", metavar="FILE", type=Path, help="the file to write; FILE.json is written beside it")
    add(
        "--check",
        metavar="INPUT",
        nargs="+",
        help="what `manyheads predict` takes, to compare the outputs on that (a data set of the domain that\n"
        "is here; else random numbers, and it is said)",
    )
    add(
        "--tolerance",
        metavar="T",
        type=float,
        default=1e-4,
        help="how far an output may be off, times the largest one where that is above 1 (1e-4)",
    )
    add(
        "--seconds",
        metavar="S",
        type=float,
        default=4.0,
        help="of a mixture, and of a recording that a Conformer recognises: fixed in the file (4)",
    )
    add("--max-tokens", metavar="N", type=int, default=256, help="recognition: of a recording at most (256)")
    add("--list", action="store_true", help="say which models can be exported, and why others cannot")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(args: Sequence[str]) -> int:
    """Export a model, or list what can be exported."""
    parsed = _parser().parse(args)
    if parsed.list:
        _print_list(parsed.json)
        return 0
    if parsed.model is None or parsed.format is None or parsed.output is None:
        raise UsageError("export needs MODEL, --format torch or onnx, and -o FILE (or --list)")
    if not parsed.tolerance > 0 or not parsed.seconds > 0:
        raise UsageError("--tolerance and --seconds must be above 0")
    positive("--max-tokens", parsed.max_tokens)
    from manyheads.apps.exportable import Limits, of_predictor
    from manyheads.apps.exporting import check_installed, export
    from manyheads.core import catalog, files, hub

    check_installed(parsed.format)
    model, config = hub.load_model(hub.find_folder(parsed.model))
    predictor: Any = hub.make_predictor(model, config)
    task = catalog.find(config.name).task
    what = of_predictor(predictor, config.domain, task, Limits(parsed.seconds, parsed.max_tokens))
    batch, origin = _inputs(what, predictor, config.domain, parsed.check)
    made = export(what, batch, parsed.format, parsed.output, parsed.tolerance)
    about = _about(parsed.format, config, task, made, origin, parsed.tolerance)
    about["sha256"] = files.sha256(parsed.output)
    beside = parsed.output.with_name(f"{parsed.output.name}.json")
    files.write_atomic(beside, json.dumps(about, indent=2) + "\n")
    print(json.dumps(about) if parsed.json else "\n".join(_lines(parsed.output, beside, made, origin)))
    return 0


def _inputs(
    what: Exportable, predictor: Any, domain: str, check: Sequence[str] | None
) -> tuple[Callable[[int], Inputs], str]:
    """Return what gives inputs of so many samples, and where they come from, in words.

    Raises:
        UsageError: Nothing in the given input can be used, or this model has no random inputs.
    """
    if check is not None:
        given = _samples(predictor, check[0] if len(check) == 1 else list(check))
        return _of_samples(what, given), f"of {', '.join(check)}"
    for name, source in _known(domain, predictor):
        try:
            return _of_samples(what, _samples(predictor, source)), f"of {name}"
        except ManyheadsError:
            continue  # it is not what this model takes
    if what.draw is None:
        raise UsageError("nothing here can be put into this model: give a file that it predicts with --check")
    import torch

    torch.manual_seed(0)
    return what.draw, "random numbers"


def _log(path: Path) -> object:
    from manyheads.recsys.published import read_ratings

    return read_ratings(path)


def _known(domain: str, predictor: Any) -> Iterator[tuple[str, object]]:
    """Yield the domain's data that are on this machine."""
    from manyheads.core import datasets

    for name in SAMPLES[domain]:
        path = datasets.present(datasets.find(name))
        if path is not None:
            yield name, _log(path) if domain == "recsys" else str(path)
    if domain == "graph" and predictor.preprocessing.input == "smiles":
        import pandas as pd

        options, molecules = predictor.options, ["CCO", "c1ccccc1C(=O)O", "CC(=O)Oc1ccccc1C(=O)O"]
        columns = {
            options.id_column: ["ethanol", "benzoic acid", "aspirin"],
            options.smiles_column: molecules,
        }
        yield "three molecules", pd.DataFrame(columns)


def _samples(predictor: Any, source: object) -> list[Any]:
    """Prepare a few records of a source, as a prediction does.

    Raises:
        UsageError: None of it can be used.
    """
    from manyheads.apps.exporting import MOST

    found: list[Any] = []
    reason = "there is no record in it"
    for shard in predictor.shards(source, size=64):
        for record in predictor.read(shard):
            try:
                found.append(predictor.prepare(record))
            except BadRecord as error:
                reason = str(error)
            if len(found) == MOST:
                return found
    if not found:
        raise UsageError(f"nothing in the input can be used: {reason}")
    return found


def _of_samples(what: Exportable, samples: list[Any]) -> Callable[[int], Inputs]:
    """Return batches of samples, over and over where there are few."""
    return lambda size: what.take([samples[i % len(samples)] for i in range(size)])


def _about(
    format: Format, config: ModelConfig, task: str, made: Exported, origin: str, tolerance: float
) -> dict[str, object]:
    """Return what another runtime must know of a file; plain JSON."""
    from manyheads.apps.exporting import versions

    return {
        "format": format,
        "model": {
            "name": config.name,
            "domain": config.domain,
            "task": task,
            "sha256": config.weights_sha256,
        },
        "inputs": made.inputs,
        "outputs": list(made.outputs),
        "preprocessing": cast(object, config.preprocessing),
        "labels": cast(object, config.labels),
        "parity": {
            "inputs": origin,
            "tolerance": tolerance,
            "batches": [vars(each) for each in made.parity],
        },
        "versions": versions(format),
    }


def _lines(path: Path, beside: Path, made: Exported, origin: str) -> Iterator[str]:
    inputs = (f"{each['name']} {each['dtype']} {_axes(each['shape'])}" for each in made.inputs)
    yield f"{', '.join(inputs)} -> {', '.join(made.outputs)}"
    for each in made.parity:
        yield (
            f"batch of {each.size}: largest difference {each.difference:.1e} of values up to "
            f"{each.largest:.3g} (inputs: {origin})"
        )
    yield f"written to {path} ({path.stat().st_size / 1e6:.1f} MB) and {beside}"


def _axes(shape: object) -> str:
    return f"[{', '.join(map(str, cast('list[object]', shape)))}]"


def _print_list(as_json: bool) -> None:
    if as_json:
        print(json.dumps(EXPORTS))
        return
    width = max(map(len, EXPORTS))
    for family, formats in EXPORTS.items():
        said = [f"{name}: {'no, ' + reason if reason else 'yes'}" for name, reason in formats.items()]
        print(f"{family:{width}}  {'; '.join(said)}")

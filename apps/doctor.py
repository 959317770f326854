"""`manyheads doctor`: the options; what is looked at is in `apps.diagnosis`, which imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from manyheads.apps.arguments import Parser, make_parser


def parser() -> Parser:
    """Return the command's parser."""
    made = make_parser(
        "doctor",
        "What is installed and found here (packages, processor, GPUs, folders, data, hub, environment),\n"
        "what to do about what is wrong, and the backend that each op takes. Exit code 1: something is\n"
        "broken.",
    )
    made.add_argument("--device", choices=("cpu", "cuda"), help="as if for tensors there (default: the best)")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    made.add_argument("--verbose", action="store_true", help="also why the better backends stand back")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(args: Sequence[str]) -> int:
    """Say what is installed and found here, what is wrong, and which backend each op takes.

    Returns:
        1 where something is broken, else 0.
    """
    given = parser().parse(args)
    import torch

    from manyheads.apps import checkup, diagnosis

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype)
    found = checkup.look()
    print(
        json.dumps(diagnosis.as_json(found, device, dtype))
        if given.json
        else diagnosis.text(found, device, dtype, given.verbose)
    )
    return int(any(finding.broken for finding in found))

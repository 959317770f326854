"""`manyheads doctor`: the options; what is looked at is in `apps.diagnosis`, which imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from manyheads.apps.arguments import Parser, make_parser


def parser() -> Parser:
    """Return the command's parser."""
    made = make_parser(
        "doctor", "Versions, devices, and for each op of the core the backend it takes, and why."
    )
    made.add_argument("--device", choices=("cpu", "cuda"), help="as if for tensors there (default: the best)")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    made.add_argument("--verbose", action="store_true", help="also why the better backends stand back")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(args: Sequence[str]) -> int:
    """Say what this machine has and which backend each op takes."""
    given = parser().parse(args)
    import torch

    from manyheads.apps import diagnosis

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype)
    print(
        json.dumps(diagnosis.as_json(device, dtype))
        if given.json
        else diagnosis.text(device, dtype, given.verbose)
    )
    return 0

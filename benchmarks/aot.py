"""Compile every shipped Triton kernel variant for sm_90 and sm_80 and print what the compiler made of it.

python benchmarks/aot.py [--slow] [OP...]
"""

from __future__ import annotations

import argparse
import sys
import time

from manyheads.core import aot


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="*", default=list(aot.KERNEL_OPS))
    parser.add_argument("--slow", action="store_true", help="the whole table, not only the quick gate's rows")
    options = parser.parse_args()
    todo = aot.variants(options.op, slow=options.slow)
    start, broken = time.perf_counter(), 0
    print(aot.HEADER)
    for report in aot.compile_all(todo):
        print(report.row(), flush=True)
        broken += bool(report.violations())
    print(f"{len(todo)} variants in {time.perf_counter() - start:.0f} s, {broken} break the gate")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

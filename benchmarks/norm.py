"""Row norms with the residual add against torch's, interleaved in one run.

    python benchmarks/norm.py [--repeats 15]

On a CPU: float32, forward alone and forward with backward. On a GPU: bfloat16, and the bandwidth reached, in
bytes that must move over the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.norm import crms_norm, layer_norm, rms_norm

Function = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CPU_SIZES = [(7 * 32, 512), (8 * 197, 384), (16 * 512, 768)]
GPU_SIZES = [(256 * 197, 384), (64 * 512, 768), (16 * 1024, 1024), (8 * 1024, 4096), (4 * 1024, 8192)]


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    z = x + residual
    return F.layer_norm(z, z.shape[-1:], weight, bias), z


def torch_rms(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    z = x + residual
    return F.rms_norm(z, z.shape[-1:], weight, 1e-6), z


def plain_crms(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    z = x + residual
    square = z.square().sum(-1, keepdim=True) + z.sum(-1, keepdim=True).square()
    return z * (square / (z.shape[-1] + 1) + 1e-5).rsqrt() * weight + bias, z


PAIRS: dict[str, tuple[Function, Function]] = {
    "layer": (torch_layer, lambda x, w, b, r: layer_norm(x, w, b, residual=r)),
    "rms": (torch_rms, lambda x, w, b, r: rms_norm(x, w, residual=r)),
    "crms": (plain_crms, lambda x, w, b, r: crms_norm(x, w, b, residual=r)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    cuda = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}; medians of {repeats} interleaved runs, ms")
    print(
        f"{'rows x d':>13} {'norm':>6} {'pass':>8} {'torch':>9} {'ours':>9} {'torch/ours':>11}"
        + " GB/s" * cuda
    )
    for rows, d in GPU_SIZES if cuda else CPU_SIZES:
        for kind, functions in PAIRS.items():
            for backward in (False, True):
                report(kind, functions, rows, d, backward, repeats, cuda)


def report(
    kind: str,
    functions: tuple[Function, Function],
    rows: int,
    d: int,
    backward: bool,
    repeats: int,
    cuda: bool,
) -> None:
    theirs, ours = timings([closure(f, rows, d, backward, cuda) for f in functions], repeats, cuda)
    line = f"{rows:>7} x {d:<4}{kind:>6} {'fwd+bwd' if backward else 'fwd':>8} {theirs:>9.3f} {ours:>9.3f}"
    line += f" {theirs / ours:>11.2f}"
    if cuda:
        moved = 2 * rows * d * (8 if backward else 4)  # read x, r, write y, z; back read dy, dz, z, write dx
        line += f" {moved / ours / 1e6:.0f}"
    print(line, flush=True)


def closure(function: Function, rows: int, d: int, backward: bool, cuda: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    inputs = [draw(cuda, *shape) for shape in [(rows, d), (d,), (d,), (rows, d)]]
    if not backward:
        return lambda: function(*inputs) and None
    for tensor in inputs:
        tensor.requires_grad_()
    cotangents = [draw(cuda, rows, d) for _ in range(2)]

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, cotangents, allow_unused=True)

    return both


def draw(cuda: bool, *shape: int) -> Tensor:
    drawn = torch.randn(*shape)
    return drawn.to("cuda", torch.bfloat16) if cuda else drawn


def timings(functions: list[Callable[[], None]], repeats: int, cuda: bool) -> list[float]:
    """Median milliseconds of each, one run of each in turn."""
    found: list[list[float]] = [[] for _ in functions]
    with torch.set_grad_enabled(True):
        for turn in range(repeats + 3):
            for function, times in zip(functions, found, strict=True):
                elapsed = on_gpu(function) if cuda else on_cpu(function)
                if turn >= 3:
                    times.append(elapsed)
    return [statistics.median(times) for times in found]


def on_cpu(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def on_gpu(function: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


if __name__ == "__main__":
    main()

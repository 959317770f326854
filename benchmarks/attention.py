"""Attention with a learned bias against torch's scaled_dot_product_attention, side by side in one run.

    python benchmarks/attention.py [--tokens 1024] [--heads 6] [--dim 64] [--batch 1] [--rounds 30]

On a CPU a learned bias must stay near the fast path: forward and backward at most 1.4 times bias-free
attention, and inference at most 1.1 times. The limits are held against turns of ten calls; beside them stand
the figures of a run that changes with every call, where each finds the caches full of another's tensors. On a
GPU the Triton kernels are timed too. Medians are printed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import use_backend
from manyheads.core.ops import attention

LIMIT_TRAINING, LIMIT_INFERENCE = 1.4, 1.1
TURN = 10
Step = Callable[[], object]


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def detached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return sdpa(q, k, v, bias.detach())


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return attention(q, k, v, bias=bias)


def training(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    cotangent = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)


def inference(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    # As in a model: the bias is a parameter, and gradients are merely switched off.
    leaves = [*inputs[:3], *(x.detach().clone().requires_grad_() for x in inputs[3:])]

    def step() -> None:
        with torch.no_grad():
            function(*leaves)

    return step


def medians(steps: dict[str, Step], rounds: int, device: str, turn: int = 1) -> dict[str, float]:
    """Time the steps in turns of so many calls; the first call of a longer turn meets others' caches."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds // turn + 3):  # three to warm up
        random.Random(number).shuffle(order)  # what ran before leaves its mark on caches and memory
        for name in order:
            for call in range(turn):
                start = time.perf_counter()
                steps[name]()
                if device == "cuda":
                    torch.cuda.synchronize()
                if number >= 3 and (call or turn == 1):
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def on_cpu(options: argparse.Namespace) -> int:
    q, k, v, bias = draw(options, "cpu", torch.float32)
    steps = {
        "SDPA without bias, forward+backward": training(sdpa, q, k, v),
        "SDPA with learned bias, forward+backward": training(sdpa, q, k, v, bias),
        "ours with learned bias, forward+backward": training(ours, q, k, v, bias),
        "SDPA without bias, inference": inference(sdpa, q, k, v),
        "SDPA with the bias detached, inference": inference(detached, q, k, v, bias),
        "SDPA with the bias parameter, inference": inference(sdpa, q, k, v, bias),
        "ours with the bias parameter, inference": inference(ours, q, k, v, bias),
    }
    turns = {turn: medians(steps, options.rounds, "cpu", turn) for turn in (TURN, 1)}
    print(f"{'':<42}{f'in turns of {TURN}':>20}{'call by call':>20}")
    ratios: dict[str, float] = {}
    for name in steps:
        free = f"SDPA without bias, {name.rpartition(', ')[2]}"
        cells = [(found[name], found[name] / found[free]) for found in turns.values()]
        print(f"{name:<42}" + "".join(f"{ms:>10.2f} ms {ratio:>5.2f}x" for ms, ratio in cells))
        ratios[name] = cells[0][1]
    train = ratios["ours with learned bias, forward+backward"]
    infer = ratios["ours with the bias parameter, inference"]
    print(f"forward+backward {train:.2f}x of bias-free, limit {LIMIT_TRAINING}")
    print(f"inference        {infer:.2f}x of bias-free, limit {LIMIT_INFERENCE}")
    return 0 if train <= LIMIT_TRAINING and infer <= LIMIT_INFERENCE else 1


def on_gpu(options: argparse.Namespace) -> None:
    print(f"\n{torch.cuda.get_device_name()}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k, v, bias = draw(options, "cuda", dtype)
        post = torch.rand_like(bias)

        def forced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*inputs: Tensor) -> Tensor:
                with use_backend("triton"):
                    return function(*inputs)

            return run

        def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, kind="sigmoid")

        def scaled(q: Tensor, k: Tensor, v: Tensor, b: Tensor, p: Tensor) -> Tensor:
            return attention(q, k, v, bias=b, post_scale=p)

        steps: dict[str, Step] = {}
        for kind, make in (("forward+backward", training), ("inference", inference)):
            steps |= {
                f"SDPA without bias, {kind}": make(sdpa, q, k, v),
                f"SDPA with learned bias, {kind}": make(sdpa, q, k, v, bias),
                f"Triton without bias, {kind}": make(forced(ours), q, k, v),
                f"Triton with learned bias, {kind}": make(forced(ours), q, k, v, bias),
                f"Triton sigmoid, {kind}": make(forced(sigmoid), q, k, v),
                f"Triton bias and post_scale, {kind}": make(forced(scaled), q, k, v, bias, post),
            }
        flops = 4 * options.batch * options.heads * options.tokens**2 * options.dim
        for name, ms in medians(steps, options.rounds, "cuda").items():
            work = flops * (3.5 if "backward" in name else 1.0)
            print(f"{dtype!s:<15} {name:<45} {ms:8.3f} ms  {work / ms / 1e9:7.1f} TFLOP/s")


def draw(options: argparse.Namespace, device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (options.batch, options.tokens, options.heads, options.dim)
    bias = (1, options.heads, options.tokens, options.tokens)
    return [torch.randn(s, device=device, dtype=dtype) for s in (shape, shape, shape, bias)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("batch", 1), ("tokens", 1024), ("heads", 6), ("dim", 64), ("rounds", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {options.batch}, "
        f"{options.heads} heads x {options.dim}, {options.tokens} tokens, medians of {options.rounds}"
    )
    status = on_cpu(options)
    if torch.cuda.is_available():
        on_gpu(options)
    return status


if __name__ == "__main__":
    sys.exit(main())

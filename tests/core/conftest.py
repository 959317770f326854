"""What an op's tests share on the CPU, in the interpreter and on a GPU: its cases, and full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.attention import attention, reference
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d
from manyheads.core.ops.depthwise_conv1d.reference import depthwise_conv1d as plain_conv1d


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """The plain formulas that kernels are compared with must not round their products to TF32 on a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@dataclass
class AttentionCase:
    """Inputs of one attention call (q, k, v, bias, post_scale; all with gradients) and its fixed options."""

    inputs: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def op(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, post: Tensor | None) -> Tensor:
        return attention(q, k, v, bias=bias, post_scale=post, **self.options)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, post: Tensor | None) -> Tensor:
        return reference.attention(q, k, v, bias=bias, post_scale=post, **self.options)


@pytest.fixture
def attention_case() -> Callable[..., AttentionCase]:
    def build(
        nq: int,
        nk: int,
        *,
        batch: int = 2,
        heads: int = 2,
        key_heads: int | None = None,
        dim: int = 16,
        bias: tuple[int, ...] | None = None,
        mask: tuple[int, ...] | None = None,
        post: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **options: Any,
    ) -> AttentionCase:
        generator = torch.Generator().manual_seed(nq + 1000 * nk)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        hk = key_heads or heads
        inputs: list[Tensor | None] = [draw(batch, n, h, dim) for n, h in ((nq, heads), (nk, hk), (nk, hk))]
        inputs += [None if shape is None else draw(*shape) for shape in (bias, post)]
        if mask is not None:
            options["mask"] = (torch.rand(*mask, generator=generator) > 0.4).to(device)
        return AttentionCase(inputs, options)

    return build


@dataclass
class ConvCase:
    """Inputs of one depthwise_conv1d call (x, weight, bias and, in some forms, the state) and its options."""

    inputs: list[Tensor]
    options: dict[str, Any]

    def op(self, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> Any:
        return depthwise_conv1d(x, weight, bias, initial_state=state, **self.options)

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> Any:
        return plain_conv1d(x, weight, bias, initial_state=state, **self.options)


@pytest.fixture
def conv_case() -> Callable[..., ConvCase]:
    """Build a case from its form in words: "state, silu" is causal, with states, and SiLU."""

    def build(
        form: str,
        length: int,
        dim: int,
        width: int,
        *,
        cu_seqlens: list[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> ConvCase:
        generator = torch.Generator().manual_seed(length + 1000 * width)
        batch = 1 if cu_seqlens else 2
        count = len(cu_seqlens) - 1 if cu_seqlens else batch
        shapes = [(batch, length, dim), (dim, width), (dim,)] + [(count, dim, width - 1)] * ("state" in form)
        inputs = [
            torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes
        ]
        options: dict[str, Any] = {
            "causal": "centred" not in form,
            "reverse": "reverse" in form,
            "activation": "silu" if "silu" in form else None,
            "return_state": "state" in form,
        }
        if cu_seqlens:
            options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        return ConvCase(inputs, options)

    return build


@pytest.fixture
def delta_inputs() -> Callable[..., list[Tensor]]:
    """Draw queries, unit keys, values, rates, log-decays and first states of `delta_rule`, with gradients."""

    def draw(
        batch: int,
        length: int,
        heads: int,
        key: int,
        value: int,
        *,
        states: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> list[Tensor]:
        drawn = [
            torch.randn(batch, length, heads, key),
            F.normalize(torch.randn(batch, length, heads, key), dim=-1),
            torch.randn(batch, length, heads, value),
            torch.rand(batch, length, heads),
            F.logsigmoid(torch.randn(batch, length, heads) + 2),
            0.3 * torch.randn(states or batch, heads, key, value),
        ]
        return [x.to(device, dtype).requires_grad_() for x in drawn]

    return draw


@pytest.fixture
def scan_inputs() -> Callable[..., list[Tensor]]:
    """Draw u, delta, A, B, C, D, z, delta_bias and initial_state of `selective_scan`, all with gradients."""

    def draw(
        batch: int,
        length: int,
        d: int,
        n: int,
        dtype: torch.dtype = torch.float32,
        *,
        states: int | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        A = -4 * torch.rand(d, n, generator=generator) - 0.05
        rows = [normal(batch, length, d) for _ in range(3)]
        both = [normal(batch, length, n) for _ in range(2)]
        state = normal(batch if states is None else states, d, n).float()
        found = [*rows[:2], A, *both, normal(d), rows[2], normal(d), state]
        return [x.to(device).requires_grad_() for x in found]

    return draw


@dataclass
class OpCase:
    """Inputs of one call of an op, and the op and its reference with their fixed options."""

    inputs: list[Tensor | None]
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]


@pytest.fixture
def varlen_case() -> Callable[..., OpCase]:
    """Build a call of `varlen_attention`: inputs q, k, v, bias (a table up to the distance `far`)."""
    from manyheads.core.ops import varlen_attention as op

    def build(
        queries: list[int],
        keys: list[int] | None = None,
        *,
        heads: int = 2,
        key_heads: int | None = None,
        dim: int = 16,
        far: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        causal: bool = False,
        scale: float | None = None,
    ) -> OpCase:
        generator = torch.Generator().manual_seed(sum(queries))
        hk, total = key_heads or heads, sum(keys or queries)
        shapes: list[tuple[int, ...]] = [(sum(queries), heads, dim), (total, hk, dim), (total, hk, dim)]
        if far is not None:
            shapes.append((heads, 2 * far + 1))
        inputs: list[Tensor | None] = [
            torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes
        ]
        inputs += [None] * (4 - len(inputs))
        cu = [
            None if x is None else torch.tensor([0, *x], device=device).cumsum(0).to(torch.int32)
            for x in (queries, keys)
        ]

        def bind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q, k, v, bias: function(q, k, v, *cu, bias=bias, causal=causal, scale=scale)

        return OpCase(inputs, bind(op), bind(import_module(f"{op.__module__}.reference").varlen_attention))

    return build


@pytest.fixture
def local_case() -> Callable[..., OpCase]:
    """Build a call of `local_attention`: inputs q, k, v, global_rows (with `own`)."""
    from manyheads.core.ops import local_attention as op

    def build(
        tokens: int,
        window: int,
        *,
        places: int | list[list[int]] = 0,
        own: bool = False,
        masked: bool = False,
        batch: int = 2,
        heads: int = 2,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> OpCase:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        inputs: list[Tensor | None] = [draw(batch, tokens, heads, dim) for _ in range(3)]
        count = places if isinstance(places, int) else len(places[0])
        inputs.append(draw(batch, count, heads, dim) if own else None)
        mask = None
        if masked:  # holes, and the last sequence ends early
            mask = (torch.rand(batch, tokens, generator=generator) > 0.3).to(device)
            mask[-1, tokens // 2 :] = False
        where = places if isinstance(places, int) else torch.tensor(places, device=device)

        def bind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda q, k, v, rows: function(
                q, k, v, window, global_tokens=where, global_rows=rows, mask=mask
            )

        return OpCase(inputs, bind(op), bind(import_module(f"{op.__module__}.reference").local_attention))

    return build

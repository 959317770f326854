"""Cases that the attention tests share, on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.core.ops.attention import attention, reference


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

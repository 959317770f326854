"""Band and global attention against transformers' Longformer self-attention with the same weights.

Longformer-base's sizes, 1024 tokens, the first one global. First the attention proper, where both sides are
given the same projected queries, keys and values; then whole layers, where most of the time goes into the
projections: three products of matrices for us, five for the peer, at the same speed. `window` counts tokens
to each side; Longformer's attention_window is twice that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.layers.local_attention import LongformerAttention
from manyheads.core.ops import attention, local_attention

DIM, HEADS, TOKENS = 768, 12, 1024


def cases(device: str) -> Iterator[Case]:
    """The target's line, the window of Recformer, no global token, a batch, and training."""
    yield case(device, window=64, target=3.0, projected=True)
    yield case(device, window=64, batch=4, target=3.0, projected=True)
    yield case(device, window=64, target=3.0)
    yield case(device, window=64, batch=4)
    yield case(device, window=32)
    yield case(device, window=64, global_tokens=0)
    yield case(device, window=64, train=True)


class Given(nn.Module):
    """A projection that was done before."""

    def __init__(self, projection: nn.Module, x: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            self.found = projection(x)

    def forward(self, _: Tensor) -> Tensor:
        """Return what it gave."""
        return self.found


def case(
    device: str,
    window: int,
    batch: int = 1,
    global_tokens: int = 1,
    train: bool = False,
    target: float | None = None,
    projected: bool = False,
) -> Case:
    """One line."""
    config = LongformerConfig(
        attention_window=[2 * window], hidden_size=DIM, num_attention_heads=HEADS, num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peer = LongformerSelfAttention(config, 0).to(device)
    layer = LongformerAttention(DIM, HEADS, window).to(device)
    layer.load_state_dict(peer.state_dict())
    flags = torch.zeros(batch, TOKENS, device=device)  # 0: local, 10000: global
    flags[:, :global_tokens] = 10000.0
    x = torch.randn(batch, TOKENS, DIM, device=device)

    def ours(x: Tensor) -> Tensor:
        return layer(x, global_tokens)

    def attended(x: Tensor) -> Tensor:
        q, k, v, top, far_k, far_v = heads
        rows = attention(top, far_k, far_v)
        return local_attention(q, k, v, window, global_tokens=global_tokens, global_rows=rows).flatten(2)

    if projected:
        heads = give(peer, x, global_tokens)

    def theirs(x: Tensor) -> Tensor:
        found = peer(
            x, attention_mask=flags, is_index_masked=flags < 0, is_index_global_attn=flags > 0,
            is_global_attn=global_tokens > 0,
        )  # fmt: skip
        return found[0]

    make = training if train else inference
    one, other = make(attended if projected else ours, x), make(theirs, x)
    return Case(
        f"local_attention{'' if projected else ' layer'} {'forward+backward' if train else 'forward'}",
        f"B{batch} L{TOKENS} 12x64 window {window}, {global_tokens} global",
        f"transformers {transformers.__version__} Longformer",
        one,
        other,
        target,
        difference(one, other),
    )


def give(peer: LongformerSelfAttention, x: Tensor, count: int) -> list[Tensor]:
    """Project once, put the results in place of the peer's projections, and return them with heads apart."""
    turned = x.transpose(0, 1)  # the peer's order: tokens, batch
    inputs = {"query": turned, "key": turned, "value": turned, "query_global": turned[:count]}
    inputs |= {"key_global": turned, "value_global": turned}
    for name, value in inputs.items():
        setattr(peer, name, Given(getattr(peer, name), value))
    return [
        getattr(peer, name).found.transpose(0, 1).unflatten(2, (HEADS, -1)).contiguous() for name in inputs
    ]

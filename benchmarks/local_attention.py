"""Band and global attention against transformers' Longformer self-attention with the same weights.

Both are whole layers, with their projections: Longformer-base's sizes, 1024 tokens, the first one global.
`window` counts tokens to each side; Longformer's attention_window is twice that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.layers.local_attention import LongformerAttention

DIM, HEADS, TOKENS = 768, 12, 1024


def cases(device: str) -> Iterator[Case]:
    """The target's line, the window of Recformer, no global token, a batch, and training."""
    yield case(device, window=64, target=3.0)
    yield case(device, window=64, batch=4, target=3.0)
    yield case(device, window=32)
    yield case(device, window=64, global_tokens=0)
    yield case(device, window=64, train=True)


def case(
    device: str,
    window: int,
    batch: int = 1,
    global_tokens: int = 1,
    train: bool = False,
    target: float | None = None,
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

    def theirs(x: Tensor) -> Tensor:
        found = peer(
            x, attention_mask=flags, is_index_masked=flags < 0, is_index_global_attn=flags > 0,
            is_global_attn=global_tokens > 0,
        )  # fmt: skip
        return found[0]

    # Both draw their cotangent from the state that they start with.
    def make(function):  # type: ignore[no-untyped-def]
        torch.manual_seed(1)
        return (training if train else inference)(function, x)

    one, other = make(ours), make(theirs)
    return Case(
        f"local_attention {'forward+backward' if train else 'forward'}",
        f"B{batch} L{TOKENS} 12x64 window {window}, {global_tokens} global",
        f"transformers {transformers.__version__} Longformer",
        one,
        other,
        target,
        difference(one, other),
    )

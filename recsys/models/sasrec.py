"""SASRec: a history read forwards, each item foretelling the next. Kang and McAuley 2018, arXiv 1808.09781.

The layers are BERT's, as in RecBole (the paper's have norms before attention and ReLU). Trained with
cross-entropy over the catalogue it is the strong sibling of BERT4Rec (Klenitskiy and Vasilev 2023, arXiv
2309.07602). Shapes and tokens as in BERT4Rec, without [MASK].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.sizes import check_sizes
from manyheads.recsys.masking import newest
from manyheads.recsys.models.encoder import (
    FIRST,
    HistoryEncoder,
    Items,
    Packed,
    Positions,
    Sizes,
    initialise,
)


class SASRec(nn.Module):
    """The encoder, whose states are compared with the items' table.

    Args:
        num_items: Items of the catalogue.
        sizes: Of the encoder, whose table has a pad besides.
        eps: Of the norms.
    """

    def __init__(self, num_items: int, sizes: Sizes, eps: float = 1e-12) -> None:
        super().__init__()
        self.num_items = num_items
        self.encoder = HistoryEncoder(sizes, causal=True, eps=eps)
        initialise(self)

    def forward(self, batch: Tensor | Packed, at: Tensor | None = None) -> Tensor:
        """Give tokens the states that items are compared with; arguments, shapes and errors as BERT4Rec's."""
        x: Tensor = self.encoder(batch)
        return x if at is None else x.flatten(0, -2)[at]

    def items(self) -> Items:
        """Return what states are compared with."""
        return Items(self.encoder.item_embedding.weight[FIRST:])

    def queries(self, histories: Packed) -> Tensor:
        """Return what foretells each history's next item: the state of its last, `[B, H]`.

        Of a history that is too long the newest items count.

        Raises:
            ValueError: A history is empty (looked at on a CPU).
        """
        lengths = histories.lengths
        if lengths.is_cpu and not torch.compiler.is_compiling() and (lengths == 0).any():
            raise ValueError("a history is empty: SASRec has nothing to go on from")
        kept = newest(histories, self.encoder.sizes.max_len)
        y: Tensor = self(kept, kept.starts[1:].long() - 1)
        return y


def sasrec(
    num_items: int,
    max_len: int = 200,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    inner_size: int = 0,
    hidden_dropout: float = 0.2,
    attn_dropout: float = 0.2,
    count_from: Positions = "start",
) -> SASRec:
    """Build a SASRec.

    Args:
        num_items: Items of the catalogue.
        max_len: Items of a history at most.
        hidden_size: Width, a multiple of heads.
        layers: Layers.
        heads: Heads of attention.
        inner_size: Width within the feed-forward nets; 0 is four times hidden_size.
        hidden_dropout: Probability, in training, for what layers add, and for the embeddings.
        attn_dropout: Probability that an attention weight is dropped, in training.
        count_from: Positions are counted from the "start" of a history, as RecBole does, or from its "end",
            as the paper's code does: the newest item then has the same one in all.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Example:
        >>> model = sasrec(num_items=3416)
    """
    check_sizes("sasrec", {"num_items": num_items})
    sizes = Sizes(
        num_items + 1,
        max_len,
        hidden_size,
        layers,
        heads,
        inner_size,
        hidden_dropout,
        attn_dropout,
        count_from,
    )
    return SASRec(num_items, sizes)

"""BERT4Rec: a history read from both sides, hidden items to be guessed. Sun et al. 2019, arXiv 1904.06690.

Shapes: B histories, N tokens of a row, T of a packed batch, M masked places, H width. Tokens are 0 for a pad,
n + 1 for item number n, and num_items + 1 for [MASK].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import DataError
from manyheads.core.layers.norm import LayerNorm
from manyheads.core.products import project
from manyheads.core.sizes import check_sizes
from manyheads.recsys.masking import ask
from manyheads.recsys.models.encoder import (
    FIRST,
    HistoryEncoder,
    Items,
    Packed,
    Positions,
    Sizes,
    initialise,
)


class BERT4Rec(nn.Module):
    """The encoder, a head, and the items' table again, with a bias an item.

    Args:
        num_items: Items of the catalogue.
        sizes: Of the encoder, whose table has a pad and [MASK] besides.
        eps: Of the norms.
    """

    def __init__(self, num_items: int, sizes: Sizes, eps: float = 1e-12) -> None:
        super().__init__()
        self.num_items = num_items
        self.encoder = HistoryEncoder(sizes, causal=False, eps=eps)
        self.output_ffn = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.output_ln = LayerNorm(sizes.hidden_size, eps)
        self.output_bias = nn.Parameter(torch.zeros(num_items + FIRST))
        initialise(self)

    @property
    def mask_token(self) -> int:
        """What hides an item."""
        return self.num_items + FIRST

    def forward(self, batch: Tensor | Packed, at: Tensor | None = None) -> Tensor:
        """Give tokens the states that items are compared with.

        Args:
            batch: Rows with pads on either side, or packed histories.
            at: The places that are wanted, in the flattened batch; None means all.

        Shape:
            Tokens `[B, N]` or packed `[T]`; at `[M]`; the result `[M, H]`, else `[B, N, H]` or `[T, H]`.

        Raises:
            ValueError: A history is longer than the model has positions.
        """
        x = self.encoder(batch)
        if at is not None:
            x = x.flatten(0, -2)[at]  # before the head: most states are not asked for
        y: Tensor = self.output_ln(F.gelu(project(self.output_ffn, x)))
        return y

    def items(self) -> Items:
        """Return what states are compared with."""
        rows = slice(FIRST, self.num_items + FIRST)
        return Items(self.encoder.item_embedding.weight[rows], self.output_bias[FIRST:])

    def queries(self, histories: Packed) -> Tensor:
        """Return what foretells each history's next item: the state of a [MASK] behind it, `[B, H]`.

        Of a history that is too long the newest items count.
        """
        asked = ask(histories, self.encoder.sizes.max_len, self.mask_token)
        y: Tensor = self(asked, asked.starts[1:].long() - 1)
        return y


def bert4rec(
    num_items: int,
    max_len: int = 200,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    inner_size: int = 0,
    hidden_dropout: float = 0.2,
    attn_dropout: float = 0.2,
    count_from: Positions = "start",
) -> BERT4Rec:
    """Build a BERT4Rec; the sizes are those of MovieLens-1M.

    Args:
        num_items: Items of the catalogue.
        max_len: Tokens of a history at most, a [MASK] among them.
        hidden_size: Width, a multiple of heads.
        layers: Layers.
        heads: Heads of attention.
        inner_size: Width within the feed-forward nets; 0 is four times hidden_size.
        hidden_dropout: Probability, in training, for what layers add, and for the embeddings.
        attn_dropout: Probability that an attention weight is dropped, in training.
        count_from: Positions are counted from the "start" of a history, as the published code does, or from
            its "end": the newest item then has the same one in all.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Example:
        >>> model = bert4rec(num_items=3416)
    """
    check_sizes("bert4rec", {"num_items": num_items})
    sizes = Sizes(
        num_items + 2,
        max_len,
        hidden_size,
        layers,
        heads,
        inner_size,
        hidden_dropout,
        attn_dropout,
        count_from,
    )
    return BERT4Rec(num_items, sizes)


_TABLES = {
    "cls/predictions/transform/dense": "output_ffn",
    "cls/predictions/transform/LayerNorm": "output_ln",
    "bert/embeddings/LayerNorm": "encoder.LayerNorm",
}
_LAYER = {
    "attention/self/query": "multi_head_attention.query",
    "attention/self/key": "multi_head_attention.key",
    "attention/self/value": "multi_head_attention.value",
    "attention/output/dense": "multi_head_attention.dense",
    "attention/output/LayerNorm": "multi_head_attention.LayerNorm",
    "intermediate/dense": "feed_forward.dense_1",
    "output/dense": "feed_forward.dense_2",
    "output/LayerNorm": "feed_forward.LayerNorm",
}
_LEAVES = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def from_tensorflow(variables: Mapping[str, Tensor], mask_id: int) -> dict[str, Tensor]:
    """Turn the variables of the published code into our weights.

    There the rows of the table are a pad, the items, and three special tokens of which one is [MASK]; the row
    of token type 0 is added to every position, and here is a part of the positions' table.

    Args:
        variables: Of a checkpoint, by name; those of the optimiser are left out.
        mask_id: The row of [MASK] (its place among the last three differs from run to run).

    Raises:
        DataError: A variable is missing or unknown, or `mask_id` is not one of the last three rows.

    Source:
        FeiSun/BERT4Rec, TensorFlow 1.12.
    """
    found = {key: value for key, value in variables.items() if not _optimiser(key)}
    try:
        table = found.pop("bert/embeddings/word_embeddings")
        types = found.pop("bert/embeddings/token_type_embeddings")
        places = found.pop("bert/embeddings/position_embeddings")
        bias = found.pop("cls/predictions/output_bias")
    except KeyError as error:
        raise DataError(f"the BERT4Rec variables lack {error}") from error
    items = len(table) - 4
    if not items < mask_id < len(table):
        raise DataError(f"mask_id {mask_id} is not one of the last three of {len(table)} rows")
    state = {
        "encoder.item_embedding.weight": torch.cat([table[: items + 1], table[mask_id : mask_id + 1]]),
        "encoder.position_embedding.weight": places + types[0],
        "output_bias": bias[: items + 1],
    }
    for key, value in found.items():
        path, _, leaf = key.rpartition("/")
        state[f"{_name(path, key)}.{_LEAVES[leaf]}"] = value.t() if leaf == "kernel" else value
    return {key: value.contiguous() for key, value in state.items()}


def _name(path: str, key: str) -> str:
    layer = re.fullmatch(r"bert/encoder/layer_(\d+)/(.+)", path)
    if layer and layer[2] in _LAYER:
        return f"encoder.trm_encoder.layer.{layer[1]}.{_LAYER[layer[2]]}"
    if path not in _TABLES:
        raise DataError(f"the BERT4Rec variables have an unknown {key}")
    return _TABLES[path]


def _optimiser(key: str) -> bool:
    return key == "global_step" or key.endswith(("/adam_m", "/adam_v")) or key.startswith("bert/pooler/")

"""A pre-norm transformer: blocks that write a residual stream and read it through norms alone.

Source: Xiong et al. 2020 (arXiv 2002.04745).
"""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.core.errors import UsageError, did_you_mean
from manyheads.core.layers.attention import MultiHeadAttention
from manyheads.core.layers.mlp import GATES, GatedMlp, Mlp
from manyheads.core.layers.norm import NORMS


class PreNormBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`.

    Args:
        dim: Width of the stream.
        num_heads: Query heads.
        hidden_dim: Width inside the Mlp (of one half, if gated).
        num_kv_heads, head_dim, qkv_bias: As in `MultiHeadAttention`.
        norm: "layer", "rms" or "crms".
        mlp: An activation ("gelu", "relu", ...) for an Mlp or a gate ("swiglu", ...) for a GatedMlp.
        dropout: Of attention weights, hidden elements and what the branches write, in training.

    Shape:
        x: `[B, N, dim]`; bias and mask as in `MultiHeadAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        norm: str = "layer",
        mlp: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, dim)
        self.attn = MultiHeadAttention(
            dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, qkv_bias=qkv_bias, dropout=dropout
        )
        self.norm2 = make_norm(norm, dim)
        self.mlp: Mlp | GatedMlp
        if mlp in GATES:
            self.mlp = GatedMlp(dim, hidden_dim, gate=mlp, dropout=dropout)
        else:
            self.mlp = Mlp(dim, hidden_dim, activation=mlp, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, *, bias: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Run the block on a stream."""
        stream, branch = self.step(x, None, bias=bias, mask=mask, causal=causal)
        return stream + branch

    def step(
        self,
        stream: Tensor,
        branch: Tensor | None,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the block with its additions left to the norms, which do them in the same pass.

        Args:
            branch: What the block before wrote and has not been added to the stream yet; None at the start.

        Returns:
            The stream, and what is still to be added to it.
        """
        if branch is None:
            y = self.norm1(stream)
        else:
            y, stream = self.norm1(branch, residual=stream)
        branch = self.dropout(self.attn(y, bias=bias, mask=mask, causal=causal))
        y, stream = self.norm2(branch, residual=stream)
        return stream, self.dropout(self.mlp(y))


class PreNormStack(nn.Module):
    """An optional projection in, pre-norm blocks, a final norm, an optional projection out.

    Args:
        dim: Width of the stream.
        depth: Blocks.
        in_dim: Width of the input, which `embed` projects to `dim`; None means that the input is the stream.
        out_dim: Width that `head` projects to; None means that the final norm is the output.
        num_heads, hidden_dim, num_kv_heads, head_dim, norm, mlp, dropout: As in `PreNormBlock`.

    Shape:
        x: `[B, N, in_dim or dim]`; the result `[B, N, out_dim or dim]`.

    Example:
        >>> stack = PreNormStack(384, depth=12, num_heads=6, hidden_dim=1536, norm="rms", mlp="swiglu")
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        num_heads: int,
        hidden_dim: int,
        in_dim: int | None = None,
        out_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm: str = "layer",
        mlp: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Identity() if in_dim is None else nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                dim,
                num_heads,
                hidden_dim,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                norm=norm,
                mlp=mlp,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = make_norm(norm, dim)
        self.head = nn.Identity() if out_dim is None else nn.Linear(dim, out_dim)

    def forward(
        self, x: Tensor, *, bias: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Run the stack."""
        stream, branch = self.embed(x), None  # type: Tensor, Tensor | None
        for block in self.blocks:
            assert isinstance(block, PreNormBlock)
            stream, branch = block.step(stream, branch, bias=bias, mask=mask, causal=causal)
        y = self.norm(stream) if branch is None else self.norm(branch, residual=stream)[0]
        return self.head(y)


def make_norm(name: str, dim: int) -> nn.Module:
    """Make the norm of a name in `manyheads.core.layers.norm.NORMS`.

    Raises:
        UsageError: No such norm.
    """
    if name not in NORMS:
        raise UsageError(f"no norm {name!r}{did_you_mean(name, NORMS)} (there are {', '.join(NORMS)})")
    return NORMS[name](dim)

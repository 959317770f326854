"""The public operations. Layout: B batch, N tokens, H heads, D head dim, L length; docs give shapes."""

from manyheads.core.ops.attention import attention

__all__ = ["attention"]

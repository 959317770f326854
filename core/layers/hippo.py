"""Initial state matrices of structured state spaces: HiPPO-LegS and the diagonal forms made from it.

Of a real system's conjugate pairs one half is kept, the one with negative imaginary parts. Source: Gu et al.
2021 (S4, arXiv 2111.00396), Gu et al. 2022 (S4D, arXiv 2206.11893).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def legs(size: int) -> tuple[Tensor, Tensor]:
    """The HiPPO-LegS system `x' = A x + B u`, which keeps a state's Legendre coefficients.

    Shape:
        A: `[size, size]`, lower triangular; B: `[size]`; float64.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    return -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1), root


def normal_plus_low_rank(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in the basis where it is diagonal minus rank one: `A = diag(lambda) - P P^*`.

    Args:
        size: Of the real system; even.

    Shape:
        lambda, P, B: `[size / 2]`, complex128, with the eigenvalues' imaginary parts ascending to 0.

    Raises:
        ValueError: size is odd.
    """
    if size % 2 or size <= 0:
        raise ValueError(f"d_state must be even, since states come in conjugate pairs, not {size}")
    matrix, drive = legs(size)
    low = (torch.arange(size, dtype=torch.float64) + 0.5).sqrt()
    skew = matrix + low[:, None] * low + 0.5 * torch.eye(size, dtype=torch.float64)
    imaginary, basis = torch.linalg.eigh(-1j * skew)
    half = basis[:, : size // 2].mH  # onto the half that is kept
    eigenvalues = torch.complex(torch.full_like(imaginary, -0.5), imaginary)[: size // 2]
    return eigenvalues, half @ low.to(half.dtype), half @ drive.to(half.dtype)


def diagonal(kind: str, size: int) -> Tensor:
    """The diagonal of a state matrix, `[size / 2]`, complex128.

    Args:
        kind: "diag-legs", the eigenvalues of the normal part of HiPPO-LegS; "diag-inv", their simple
            approximation; "diag-lin", equally spaced frequencies.

    Raises:
        ValueError: No such kind, or size is odd.
    """
    if kind == "diag-legs":
        return normal_plus_low_rank(size)[0]
    if size % 2 or size <= 0:
        raise ValueError(f"d_state must be even, since states come in conjugate pairs, not {size}")
    n = torch.arange(size // 2, dtype=torch.float64)
    if kind == "diag-inv":
        imaginary = size / math.pi * (size / (2 * n + 1) - 1)
    elif kind == "diag-lin":
        imaginary = math.pi * n
    else:
        raise ValueError(f"init must be 'diag-legs', 'diag-inv' or 'diag-lin', not {kind!r}")
    return torch.complex(torch.full_like(n, -0.5), -imaginary)

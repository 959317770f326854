"""The state spaces inside S4 and S4D: each gives its convolution kernel, and runs as a recurrence.

`x_t = dA x_{t-1} + dB u_t`, `y_t = C x_t`: the kernel is `K_l = C dA^l dB`. States come in conjugate pairs of
which one is kept, so that every sum over states is twice a real part. Names, shapes and signs of the
parameters are those of the official code: complex ones with a last axis [re, im], `A = -exp(A_real) - i
A_imag`, `inv_dt = log dt`.

Source: Gu et al. 2021 (S4, arXiv 2111.00396), Gu et al. 2022 (S4D, arXiv 2206.11893).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.core.layers.hippo import diagonal, normal_plus_low_rank
from manyheads.core.ops.precision import wide

# Tokens that the dense recurrence of `DplrKernel.advance` takes in one step.
_CHUNK = 64


class DiagonalKernel(nn.Module):
    """A diagonal state space for each channel, as S4D has it inside the S4 block.

    Args:
        dim: Channels H.
        d_state: Real states a channel, twice N.
        channels: Outputs a channel, c: rows of C.
        init: See `manyheads.core.layers.hippo.diagonal`.
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: Range of the initial step sizes.

    Shape:
        kernel: `[c, H, L]`; state: `[B, H, N]`, complex; a token in: `[B, H]`, out: `[B, c, H]`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        *,
        channels: int = 1,
        init: str = "diag-legs",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization must be 'zoh' or 'bilinear', not {discretization!r}")
        self.discretization = discretization
        states = diagonal(init, d_state).repeat(dim, 1)
        self.inv_dt = nn.Parameter(log_steps(dim, dt_min, dt_max)[:, None])
        self.A_real = nn.Parameter((-states.real).log().float())
        self.A_imag = nn.Parameter(-states.imag.float())
        self.B = nn.Parameter(as_real(torch.ones(1, *states.shape, dtype=torch.complex64)))
        self.C = nn.Parameter(as_real(torch.randn(channels, *states.shape, dtype=torch.complex64)))

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log dA `[H, N]`, dB `[H, N]` and C `[c, H, N]`."""
        dt, states = wide(self.inv_dt).exp(), continuous(self.A_real, self.A_imag)
        drive, read = as_complex(self.B)[0], as_complex(self.C)
        log, step = discretize(dt * states, self.discretization)
        return log, dt * step * drive, read

    def forward(self, length: int) -> Tensor:
        """The kernel."""
        log, drive, read = self.discrete()
        return vandermonde(read * drive, log, length)

    def response(self, state: Tensor, length: int) -> Tensor:
        """What a state alone puts out in the steps after it: `[B, c, H, L]`."""
        log, _, read = self.discrete()
        return vandermonde(read * (log.exp() * state)[:, None], log, length)

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """The state after the tokens u `[B, L, H]`."""
        log, drive, _ = self.discrete()
        return advance(log, drive, u, state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, `[B, H]`: the outputs `[B, c, H]` and the state after it."""
        log, drive, read = self.discrete()
        state = log.exp() * state + drive * u[..., None]
        return 2 * (read * state[:, None]).sum(-1).real, state

    def init_state(self, batch_size: int) -> Tensor:
        """The state before the first token."""
        return self.A_real.new_zeros(batch_size, *self.A_real.shape, dtype=as_complex(self.C).dtype)


class DplrKernel(nn.Module):
    """A state space of diagonal minus rank one, `A = diag - P P^*`, for each channel, discretised bilinearly.

    Its kernel of length l is the inverse transform of the truncated generating function
    `C~ (I - dA w)^{-1} dB` at the l-th roots of unity w, `C~ = C (I - dA^l)`, which Woodbury's identity turns
    into sums over the diagonal. The parameter is C until the first forward, or `set_length`, and C~
    afterwards: that step writes over it, outside of autograd, and keeps l in the buffer `l_kernel`, so
    gradients are those of C~, as in the official code. A longer sequence doubles l as often as it must.

    Arguments and shapes as `DiagonalKernel`; the init is HiPPO-LegS.
    """

    l_kernel: Tensor

    def __init__(
        self, dim: int, d_state: int = 64, *, channels: int = 1, dt_min: float = 1e-3, dt_max: float = 0.1
    ) -> None:
        super().__init__()
        states, low, drive = (x.repeat(dim, 1) for x in normal_plus_low_rank(d_state))
        self.inv_dt = nn.Parameter(log_steps(dim, dt_min, dt_max)[:, None])
        self.A_real = nn.Parameter((-states.real).log().float())
        self.A_imag = nn.Parameter(-states.imag.float())
        self.B = nn.Parameter(as_real(drive[None].to(torch.complex64)))
        self.C = nn.Parameter(as_real(torch.randn(channels, *states.shape, dtype=torch.complex64)))
        self.P = nn.Parameter(as_real(low[None].to(torch.complex64)))
        self.register_buffer("l_kernel", torch.tensor(0))
        self._length = 0  # l_kernel, without asking the device for it
        self._read: tuple[Any, Tensor] | None = None
        self.register_load_state_dict_post_hook(_read_length)

    @torch.no_grad()
    def set_length(self, length: int) -> None:
        """Make the kernel at least so long: turn C into C~, or lengthen C~."""
        while self._length < length:
            power = length if self._length == 0 else self._length
            read = both(as_complex(self.C).to(torch.complex128))  # [c, H, 2N]
            moved = torch.einsum("chm,hmn->chn", read, torch.linalg.matrix_power(self._dense()[0], power))
            read = read - moved if self._length == 0 else read + moved
            self.C.copy_(as_real(read[..., : self.C.shape[2]]))
            self._length += power
            self.l_kernel.fill_(self._length)

    def forward(self, length: int) -> Tensor:
        """The kernel."""
        self.set_length(length)
        return self._generate(as_complex(self.B), length)[0]

    def response(self, state: Tensor, length: int) -> Tensor:
        """What a state alone puts out in the steps after it: `[B, c, H, L]`."""
        self.set_length(length)
        dt, states, low = self._continuous()
        # The input vector B' for which dB' is dA times the state.
        pulled = 2 * (low.conj() * state).sum(-1, keepdim=True).real
        return self._generate(state / dt + (states * state - low * pulled) / 2, length)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, `[B, H]`: the outputs `[B, c, H]` and the state after it."""
        dt, states, low = self._continuous()
        h = dt / 2
        pulled = 2 * (low.conj() * state).sum(-1, keepdim=True).real
        right = state + h * (states * state - low * pulled) + dt * as_complex(self.B)[0] * u[..., None]
        inverse = 1 / (1 - h * states)
        solved = inverse * right
        weight = h / (1 + h * 2 * (inverse * low.abs().square()).sum(-1, keepdim=True).real)
        state = solved - inverse * low * (weight * 2 * (low.conj() * solved).sum(-1, keepdim=True).real)
        return 2 * (self._plain_read() * state[:, None]).sum(-1).real, state

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """The state after the tokens u `[B, L, H]`."""
        transition, drive = self._dense()
        state = both(state).to(transition.dtype)
        powers = [drive]  # dA^j dB, [H, 2N]
        for _ in range(min(_CHUNK, u.shape[1]) - 1):
            powers.append(torch.einsum("hmn,hn->hm", transition, powers[-1]))
        held = torch.stack(powers[::-1], -1)  # [H, 2N, T]
        far = torch.linalg.matrix_power(transition, len(powers))
        first = u.shape[1] % len(powers)
        for tokens in (u[:, :first], *u[:, first:].split(len(powers), 1)):
            some = tokens.shape[1]
            if some:
                move = far if some == len(powers) else torch.linalg.matrix_power(transition, some)
                state = torch.einsum("hmn,bhn->bhm", move, state)
                state = state + torch.einsum("hmt,bth->bhm", held[..., -some:], tokens.to(state.dtype))
        return state[..., : self.P.shape[2]].to(as_complex(self.C).dtype)

    def init_state(self, batch_size: int) -> Tensor:
        """The state before the first token."""
        return self.A_real.new_zeros(batch_size, *self.A_real.shape, dtype=as_complex(self.C).dtype)

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt `[H, 1]`, the diagonal `[H, N]` and P `[H, N]`."""
        return wide(self.inv_dt).exp(), continuous(self.A_real, self.A_imag), as_complex(self.P)[0]

    def _generate(self, drive: Tensor, length: int) -> Tensor:
        """The response `[S, c, H, L]` to an impulse into each of the drives `[S, H, N]`."""
        size, read = self._length, as_complex(self.C)
        dt, states, low = self._continuous()
        angle = torch.arange(size // 2 + 1, device=dt.device, dtype=torch.float64) * (-2 * math.pi / size)
        nodes = torch.polar(torch.ones_like(angle), angle).to(states.dtype)
        # With 2 (1 - w) / (1 + w) for the bilinear transform, multiplied by 1 + w so that nothing divides by
        # it at w = -1.
        base, slope = 2 * (1 - nodes), 1 + nodes  # [F]
        pole = (dt * states)[..., None]
        direct = dt[..., None] / (base - pole * slope)  # [H, N, F]
        mirror = dt[..., None] / (base - pole.conj() * slope)

        def cauchy(left: Tensor, right: Tensor) -> Tensor:
            product = left * right
            return product @ direct + product.conj() @ mirror

        # For each channel, [H, rows, N] against [H, N, F].
        drives, reads = drive.movedim(1, 0), read.movedim(1, 0)  # [H, S, N], [H, c, N]
        lows = low[:, None]
        plain = cauchy((drives[:, :, None] * reads[:, None]).flatten(1, 2), torch.ones_like(lows))
        plain = plain.unflatten(1, (drives.shape[1], -1))  # [H, S, c, F]
        out, into = cauchy(reads, lows), cauchy(drives, lows.conj())
        loop = 1 + slope * cauchy(lows, lows.conj())
        response = 2 * (plain - slope * (into / loop)[:, :, None] * out[:, None])
        return torch.fft.irfft(response, n=size)[..., :length].permute(1, 2, 0, 3)

    def _dense(self) -> tuple[Tensor, Tensor]:
        """dA `[H, 2N, 2N]` and dB `[H, 2N]` of the pairs, complex128."""
        dt, states, low = (x.to(torch.complex128) for x in self._continuous())
        pairs, ranks = both(states), both(low)
        half = dt[..., None] / 2 * (torch.diag_embed(pairs) - ranks[..., None] * ranks[..., None, :].conj())
        one = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
        drive = dt * both(as_complex(self.B)[0].to(half.dtype))
        found = torch.linalg.solve(one - half, torch.cat([one + half, drive[..., None]], -1))
        return found[..., :-1], found[..., -1]

    def _plain_read(self) -> Tensor:
        """C `[c, H, N]`, from C~ where the parameter holds that; kept while nothing changes."""
        read = as_complex(self.C)
        if self._length == 0:
            return read
        given = list(self.parameters())
        key = (self._length, *((p._version, p.data_ptr(), p.dtype) for p in given))
        if not torch.is_grad_enabled() and self._read is not None and self._read[0] == key:
            return self._read[1]
        power = torch.linalg.matrix_power(self._dense()[0], self._length)
        one = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
        rows = both(read.to(power.dtype)).movedim(0, 1)  # [H, c, 2N]
        solved = torch.linalg.solve(one - power, rows, left=False).movedim(1, 0)
        found = solved[..., : read.shape[-1]].to(read.dtype)
        if not torch.is_grad_enabled():
            self._read = (key, found)
        return found


def _read_length(module: nn.Module, _: object) -> None:
    module._length = int(module.l_kernel)  # type: ignore[assignment, arg-type]


def log_steps(dim: int, dt_min: float, dt_max: float) -> Tensor:
    """Logarithms of step sizes, uniform between those of the ends: `[dim]`."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min and dt_max must be positive and in order, not {dt_min} and {dt_max}")
    return torch.rand(dim) * math.log(dt_max / dt_min) + math.log(dt_min)


def discretize(dt_states: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """log dA, and dB / (dt B), of a diagonal system with the products dt A."""
    if how == "zoh":
        return dt_states, torch.expm1(dt_states) / dt_states
    inverse = 1 / (1 - dt_states / 2)
    return ((1 + dt_states / 2) * inverse).log(), inverse


def vandermonde(weights: Tensor, log: Tensor, length: int) -> Tensor:
    """Twice the real part of the sum over n of weights_n exp(l log_n): `[..., H, N]` to `[..., H, L]`."""
    powers = _powers(log, length)
    return 2 * torch.einsum("...hn,hnl->...hl", weights, powers).real


def advance(log: Tensor, drive: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """The state `[B, H, N]` of a diagonal system after the tokens u `[B, L, H]`."""
    powers = _powers(log, u.shape[1]).flip(-1)
    taken = drive * torch.einsum("hnl,blh->bhn", powers, u.to(powers.dtype))
    return (u.shape[1] * log).exp() * state + taken


def _powers(log: Tensor, length: int) -> Tensor:
    return (log[..., None] * torch.arange(length, device=log.device, dtype=log.real.dtype)).exp()


def continuous(log_real: Tensor, imaginary: Tensor) -> Tensor:
    """The diagonal of A from its parameters."""
    return torch.complex(-wide(log_real).exp(), -wide(imaginary))


def both(x: Tensor) -> Tensor:
    """The kept states and their conjugates, one after the other."""
    return torch.cat([x, x.conj()], -1)


def as_complex(x: Tensor) -> Tensor:
    """A parameter with a last axis [re, im] as a complex tensor."""
    return torch.view_as_complex(wide(x).contiguous())


def as_real(x: Tensor) -> Tensor:
    """A complex tensor with a last axis [re, im]."""
    return torch.view_as_real(x.resolve_conj()).contiguous()

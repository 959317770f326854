"""The selective scan as Triton kernels: a program walks one sequence with a block of channels in registers.

Tiles are [N, BLOCK], channels along the lanes: what is summed over the states stays within a thread. The
backward makes a chunk's states again from the kept one, puts them into scratch memory of its own, and walks
back over them. README.md has the derivation.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0912, PLR0915, SIM102

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp(x):
    """e^x as 2^n 2^r, n integer and |r| <= 1/2: tl.exp rounds x log2(e), which products of decays add up.

    Below -87 zero, above 88 infinity.
    """
    z = tl.where(x < -87.0, -87.0, x)
    z = tl.where(z > 88.0, 88.0, z)
    shifted = z * 1.4426950408889634 + 12583039.0  # 3 * 2^22 + 127: the last bits are n + 127
    n = shifted - 12583039.0
    r = (z - n * 0.693359375) + n * 2.12194440e-4
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    y = tl.exp2(r * 1.4426950408889634) * power
    y = tl.where(x > 88.0, float("inf"), y)
    return tl.where(x < -87.0, 0.0, y)


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e), e = exp(-|x|), by the series of 2 atanh(s), s = e / (2 + e), 2 s = e - s e."""
    e = _exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = q * (1 / 17) + 1 / 15
    p = p * q + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return tl.where(x > 0, x, 0.0) + (e - s * (e - 2.0 * (p * q)))


@triton.jit
def _sequence(starts, number, length):
    """The first row and the length of a sequence."""
    if starts is None:
        start = number.to(tl.int64) * length
    else:
        start = tl.load(starts + number).to(tl.int64)
        length = (tl.load(starts + number + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def _step_size(delta, channel, bias, inside, SOFTPLUS: tl.constexpr):
    """The raw and the final step size of a block of channels."""
    raw = tl.load(delta + channel, inside, other=0.0).to(tl.float32) + bias
    return raw, _softplus(raw) if SOFTPLUS else raw


@triton.jit
def _channels(vector, channel, inside):
    if vector is None:
        return tl.zeros(channel.shape, tl.float32)
    return tl.load(vector + channel, inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    u,
    delta,
    a,
    b,
    c,
    skip,
    z,
    bias,
    first,
    starts,
    y,
    last,
    kept,
    length,
    d,
    n,
    u_row,
    delta_row,
    b_row,
    c_row,
    z_row,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y, the last states, and every CHUNK steps the state."""
    number = tl.program_id(0)
    start, steps = _sequence(starts, number, length)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, N)
    inside, real = channel < d, state < n
    mask = real[:, None] & inside[None, :]
    rate = tl.load(a + channel[None, :] * n + state[:, None], mask, other=0.0).to(tl.float32)  # [N, BLOCK]
    extra = _channels(skip, channel, inside)
    shift = _channels(bias, channel, inside)
    corner = channel[None, :] * n + state[:, None]
    states = number.to(tl.int64) * d * n  # where a sequence's states begin
    h = tl.zeros([N, BLOCK], tl.float32)
    if first is not None:
        h = tl.load(first + states + corner, mask, other=0.0).to(tl.float32)
    slot = start // CHUNK + number
    for i in range(steps):
        t = start + i
        if REVERSE:
            t = start + steps - 1 - i
        if kept is not None:
            if i % CHUNK == 0:
                at = kept + (slot + i // CHUNK) * n * d
                tl.store(at + state[:, None] * d + channel[None, :], h, mask)
        _, dt = _step_size(delta + t * delta_row, channel, shift, inside, SOFTPLUS)
        now = tl.load(u + t * u_row + channel, inside, other=0.0).to(tl.float32)
        bt = tl.load(b + t * b_row + state, real, other=0.0).to(tl.float32)
        ct = tl.load(c + t * c_row + state, real, other=0.0).to(tl.float32)
        h = _exp(dt[None, :] * rate) * h + (dt * now)[None, :] * bt[:, None]
        out = tl.sum(h * ct[:, None], 0)
        if skip is not None:
            out += extra * now
        if z is not None:
            gate = tl.load(z + t * z_row + channel, inside, other=0.0).to(tl.float32)
            out *= gate / (1.0 + _exp(-gate))
        tl.store(y + t * d + channel, out.to(y.dtype.element_ty), inside)
    tl.store(last + states + corner, h, mask)


@triton.jit(do_not_specialize=["length", "total"])
def backward_kernel(
    dy,
    dlast,
    u,
    delta,
    a,
    b,
    c,
    skip,
    z,
    bias,
    starts,
    kept,
    scratch,
    du,
    ddelta,
    dz,
    da,
    db,
    dc,
    dskip,
    dbias,
    dfirst,
    length,
    total,
    d,
    n,
    dy_row,
    u_row,
    delta_row,
    b_row,
    c_row,
    z_row,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of a sequence's block of channels, and its shares of those that others share."""
    number, column = tl.program_id(0), tl.program_id(1)
    start, steps = _sequence(starts, number, length)
    lane = tl.arange(0, BLOCK)
    channel = column * BLOCK + lane
    state = tl.arange(0, N)
    inside, real = channel < d, state < n
    mask = real[:, None] & inside[None, :]
    rate = tl.load(a + channel[None, :] * n + state[:, None], mask, other=0.0).to(tl.float32)  # [N, BLOCK]
    extra = _channels(skip, channel, inside)
    shift = _channels(bias, channel, inside)
    corner = channel[None, :] * n + state[:, None]
    states = number.to(tl.int64) * d * n  # where a sequence's states begin
    gh = tl.zeros([N, BLOCK], tl.float32)
    if dlast is not None:
        gh = tl.load(dlast + states + corner, mask, other=0.0).to(tl.float32)
    # float64: sums over the whole sequence, where float32 would lose more than the plain formula does.
    sum_a = tl.zeros([N, BLOCK], tl.float64)
    sum_skip = tl.zeros([BLOCK], tl.float64)
    sum_bias = tl.zeros([BLOCK], tl.float64)
    program = number.to(tl.int64) * tl.num_programs(1) + column
    own = scratch + program * (CHUNK * N * BLOCK)
    tile = state[:, None] * BLOCK + lane[None, :]
    slot = start // CHUNK + number
    chunks = tl.cdiv(steps, CHUNK)
    for back in range(chunks):
        k = chunks - 1 - back
        begin = k * CHUNK
        count = tl.minimum(CHUNK, steps - begin)
        at = kept + (slot + k) * n * d
        h = tl.load(at + state[:, None] * d + channel[None, :], mask, other=0.0)
        for i in range(count):
            t = start + begin + i
            if REVERSE:
                t = start + steps - 1 - begin - i
            tl.store(own + i * (N * BLOCK) + tile, h)  # the state before step i
            _, dt = _step_size(delta + t * delta_row, channel, shift, inside, SOFTPLUS)
            now = tl.load(u + t * u_row + channel, inside, other=0.0).to(tl.float32)
            bt = tl.load(b + t * b_row + state, real, other=0.0).to(tl.float32)
            h = _exp(dt[None, :] * rate) * h + (dt * now)[None, :] * bt[:, None]
        tl.debug_barrier()  # the scratch is read as another thread may have written it
        for j in range(count):
            i = count - 1 - j
            t = start + begin + i
            if REVERSE:
                t = start + steps - 1 - begin - i
            before = tl.load(own + i * (N * BLOCK) + tile)
            raw, dt = _step_size(delta + t * delta_row, channel, shift, inside, SOFTPLUS)
            now = tl.load(u + t * u_row + channel, inside, other=0.0).to(tl.float32)
            bt = tl.load(b + t * b_row + state, real, other=0.0).to(tl.float32)
            ct = tl.load(c + t * c_row + state, real, other=0.0).to(tl.float32)
            g = tl.load(dy + t * dy_row + channel, inside, other=0.0).to(tl.float32)
            decay = _exp(dt[None, :] * rate)
            x = dt * now
            h = decay * before + x[None, :] * bt[:, None]
            if z is not None:
                gate = tl.load(z + t * z_row + channel, inside, other=0.0).to(tl.float32)
                share = 1.0 / (1.0 + _exp(-gate))
                out = tl.sum(h * ct[:, None], 0)
                if skip is not None:
                    out += extra * now
                slope = share + gate * share * (1.0 - share)
                tl.store(dz + t * d + channel, (g * out * slope).to(dz.dtype.element_ty), inside)
                g *= gate * share
            to_row = (column.to(tl.int64) * total + t) * n
            tl.store(dc + to_row + state, tl.sum(h * g[None, :], 1), real)
            grad = gh + g[None, :] * ct[:, None]
            tl.store(db + to_row + state, tl.sum(grad * x[None, :], 1), real)
            into = tl.sum(grad * bt[:, None], 0)
            gh = grad * decay
            pull = gh * before
            sum_a += (pull * dt[None, :]).to(tl.float64)
            slope = tl.sum(pull * rate, 0) + into * now
            if SOFTPLUS:
                slope *= 1.0 / (1.0 + _exp(-raw))
            tl.store(ddelta + t * d + channel, slope.to(ddelta.dtype.element_ty), inside)
            if dbias is not None:
                sum_bias += slope.to(tl.float64)
            into *= dt
            if skip is not None:
                into += g * extra
                sum_skip += (g * now).to(tl.float64)
            tl.store(du + t * d + channel, into.to(du.dtype.element_ty), inside)
        tl.debug_barrier()  # the next chunk writes over the scratch
    tl.store(da + states + corner, sum_a.to(tl.float32), mask)
    if dskip is not None:
        tl.store(dskip + number.to(tl.int64) * d + channel, sum_skip.to(tl.float32), inside)
    if dbias is not None:
        tl.store(dbias + number.to(tl.int64) * d + channel, sum_bias.to(tl.float32), inside)
    if dfirst is not None:
        tl.store(dfirst + states + corner, gh, mask)

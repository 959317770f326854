"""MossFormer2's block stack against ClearerVoice's; and either of its blocks alone.

ClearerVoice itself is the peer where it is installed (see `benchmarks.peers`), and elsewhere its formulation,
written out below in torch's own operations, on the weights of our modules: groups filled up to their size
with a product for each of the two values, convolutions of [B, C, S] between transposes, and the memory's
convolutions two-dimensional with groups and gaps. Four seconds at 8 kHz are 3,999 frames. Both sides run two
of the 24 blocks, which are alike, at the published width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import Case, difference, inference, training
from manyheads.speech.models.mossformer2 import MemoryBlocks

DEPTH, FRAMES, DIM, GROUP = 2, 3999, 512, 256
State = dict[str, Tensor]
Block = Callable[[Tensor], Tensor]


def convolved(p: State, name: str, x: Tensor, scale_norm: bool) -> Tensor:
    """A convolution module: norm, linear map, SiLU, and 17 taps with a residual, between transposes."""
    if scale_norm:
        length = torch.norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        x = x / length.clamp(min=1e-5) * p[f"{name}.mdl.0.g"]
    else:
        x = F.layer_norm(x, x.shape[-1:], p[f"{name}.mdl.0.weight"], p[f"{name}.mdl.0.bias"])
    x = F.silu(F.linear(x, p[f"{name}.mdl.1.weight"], p[f"{name}.mdl.1.bias"]))
    taps = p[f"{name}.mdl.3.sequential.1.conv.weight"]
    return x + F.conv1d(x.transpose(1, 2), taps, padding=8, groups=len(taps)).transpose(1, 2)


def rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first channels by the frame's number."""
    angles = (torch.arange(x.shape[1], device=x.device)[:, None] * freqs).repeat_interleave(2, -1)
    turned, kept = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack((-b, a), -1).flatten(-2)
    return torch.cat((turned * angles.cos() + crossed * angles.sin(), kept), -1)


def attended(p: State, x: Tensor) -> Tensor:
    """A block of gated attention."""
    late, same = x.chunk(2, -1)
    given = torch.cat((F.pad(late, (0, 0, 1, -1)), same), -1)
    v, u = convolved(p, "to_hidden", given, True).chunk(2, -1)
    qk = convolved(p, "to_qk", given, True)
    four = torch.einsum("...d,hd->...hd", qk, p["qk_offset_scale.gamma"]) + p["qk_offset_scale.beta"]
    four = [rotated(each, p["rotary_pos_emb.freqs"]) for each in four.unbind(-2)]
    frames, fill = x.shape[1], -x.shape[1] % GROUP
    grouped = (F.pad(each, (0, 0, 0, fill)).unflatten(1, (-1, GROUP)) for each in (*four, v, u))
    quad_q, lin_q, quad_k, lin_k, gv, gu = grouped
    own = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask = F.pad(own, (0, fill)).unflatten(1, (-1, GROUP))
    weights = F.relu(torch.einsum("...id,...jd->...ij", quad_q, quad_k) / GROUP) ** 2
    weights = weights.masked_fill(~mask[:, :, None], 0.0)
    found = []
    for value in (gv, gu):
        local = torch.einsum("...ij,...jd->...id", weights, value)
        sums = torch.einsum("bgnd,bgne->bde", lin_k, value) / frames
        far = torch.einsum("bgnd,bde->bgne", lin_q, sums)
        found.append((local + far).flatten(1, 2)[:, :frames])
    out = (found[1] * v) * torch.sigmoid(found[0] * u)
    return x + convolved(p, "to_out", out, True)


def remembered(p: State, x: Tensor) -> Tensor:
    """A block of gated memory, its convolutions two-dimensional."""

    def normed(name: str, y: Tensor) -> Tensor:  # over the channels of [B, C, S]
        y = F.layer_norm(y.transpose(1, 2), (y.shape[1],), p[f"{name}.weight"], p[f"{name}.bias"])
        return y.transpose(1, 2)

    y = F.prelu(F.conv1d(x.transpose(1, 2), p["conv1.0.weight"], p["conv1.0.bias"]), p["conv1.1.weight"])
    y = normed("norm1", y).transpose(1, 2)
    u, v = (convolved(p, f"gated_fsmn.to_{each}", y, False) for each in "uv")
    name = "gated_fsmn.fsmn"
    z = F.relu(F.linear(u, p[f"{name}.linear.weight"], p[f"{name}.linear.bias"]))
    skip = F.linear(z, p[f"{name}.project.weight"]).unsqueeze(1).permute(0, 3, 2, 1)  # [B, C, S, 1]
    for i, gap in ((1, 1), (2, 2)):
        taps = p[f"{name}.conv.conv{i}.weight"]
        z = F.conv2d(F.pad(skip, (0, 0, 19 * gap, 19 * gap)), taps, dilation=(gap, 1), groups=len(taps))
        z = F.instance_norm(z, weight=p[f"{name}.conv.norm{i}.weight"], bias=p[f"{name}.conv.norm{i}.bias"])
        z = F.prelu(z, p[f"{name}.conv.prelu{i}.weight"])
        skip = torch.cat((z, skip), 1)
    y = v * (u + z.permute(0, 3, 2, 1).squeeze(1)) + y
    y = F.conv1d(normed("norm2", y.transpose(1, 2)), p["conv2.weight"], p["conv2.bias"])
    return x + y.transpose(1, 2)


def cases(device: str) -> Iterator[Case]:
    """Yield the stack's lines, forward with the issue's target, and those of its two blocks."""
    blocks = MemoryBlocks(DEPTH, DIM, 128, GROUP, 256, 0.0).to(device).eval()
    for layer in blocks.layers:  # as trained: from the first draw on, the local part would be next to nothing
        torch.nn.init.normal_(layer.qk_offset_scale.gamma)
    label, theirs = peer(blocks, device)
    x = torch.randn(1, FRAMES, DIM, device=device)
    shape = f"B1 S{FRAMES} N{DIM} group{GROUP}"
    for name, ours, other, target in (
        (f"{DEPTH} blocks", blocks, theirs[0], 3.0),
        ("attention block", blocks.layers[0], theirs[1], None),
        ("memory block", blocks.fsmn[0], theirs[2], None),
    ):
        a, b = inference(ours, x), inference(other, x)
        yield Case(f"mossformer2 {name} forward", shape, label, a, b, target, difference(a, b))
    a, b = training(blocks, x), training(theirs[0], x)

    def apart() -> float:
        # Where an input of PReLU or ReLU is next to zero, rounding decides on its slope, and a few gradients
        # jump: all but the most distant thousandth of them count, together.
        ours, other = a()[0], b()[0]  # type: ignore[index]
        distances = (ours - other).abs().flatten().sort().values
        return (distances[: len(distances) * 999 // 1000].norm() / other.norm()).item()

    name = f"mossformer2 {DEPTH} blocks forward+backward"
    yield Case(name, f"{shape}, to the input", label, a, b, difference=apart)


def peer(blocks: MemoryBlocks, device: str) -> tuple[str, tuple[Block, Block, Block]]:
    """What ours is measured against, with its weights: the stack, its first attention, its first memory."""
    weights = {key: value.detach() for key, value in blocks.state_dict().items()}
    if peers.is_installed("clearvoice"):
        theirs = peers.clearvoice_blocks(DIM, DEPTH, GROUP).to(device)
        theirs.load_state_dict(weights, strict=True)
        return peers.label("clearvoice"), (theirs, theirs.layers[0], theirs.fsmn[0])  # type: ignore[index, return-value]
    attention = [_of(weights, f"layers.{i}.") for i in range(DEPTH)]
    memory = [_of(weights, f"fsmn.{i}.") for i in range(DEPTH)]

    def stack(x: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = remembered(memory[i], attended(attention[i], x))
        return x

    parts = (stack, lambda x: attended(attention[0], x), lambda x: remembered(memory[0], x))
    return f"ClearerVoice's formulation, torch {torch.__version__}", parts


def _of(weights: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

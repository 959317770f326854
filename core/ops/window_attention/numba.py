"""The steps between window attention's products as compiled loops: one pass each, without temporaries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.window_attention import numba_kernels
from manyheads.core.ops.window_attention.cpu import Block, put, take
from manyheads.core.ops.window_attention.geometry import Geometry, layout


class NumbaSteps:
    """The steps of `cpu.Steps`, by numba."""

    align = 32  # keys of a row of scores: whole vectors, so that loops leave no rest to single steps

    def __init__(self, where: Geometry, bias: Tensor | None, scale: float, shape: Sequence[int]) -> None:
        self.where, self.map, self.scale = where, layout(where), np.float32(scale)
        *_, n, padded = shape
        self.index = self.map.places.numpy()
        self.region = F.pad(self.map.region, (0, padded - n)).numpy()
        self.bias = np.full((shape[0], n, padded), -np.inf, np.float32)
        self.bias[:, :, :n] = 0 if bias is None else bias.float().numpy()

    def take(self, images: Sequence[Tensor], block: Block, outs: Sequence[Tensor]) -> None:
        """As `cpu.Steps.take`."""
        if images[0].dtype != torch.float32 or any(x.stride(-1) != 1 for x in images):
            for x, out in zip(images, outs, strict=True):
                take(x, block, self.map.places[block.windows], out)
            return
        found = [block.of(x) for x in images]
        index, width = self.index[block.windows], self.where.width
        if len(found) == 3 and len({x.stride() for x in found}) == 1:
            q, k, v = (_memory(x) for x in found)
            down, right, head, _ = found[0].stride()
            out_q, out_k, out_v = (out.numpy() for out in outs)
            numba_kernels.take_three(q, k, v, down, right, head, index, width, out_q, out_k, out_v)
            return
        for image, out in zip(found, outs, strict=True):
            down, right, head, _ = image.stride()
            numba_kernels.take(_memory(image), down, right, head, index, width, out.numpy())

    def put(self, x: Tensor, block: Block, out: Tensor) -> None:
        """As `cpu.Steps.put`."""
        if out.dtype == torch.float32:
            image = out[block.image].flatten(0, 1).numpy()
            numba_kernels.put(x.numpy(), self.index[block.windows], block.heads.start, image)
        else:
            put(x, block, self.map.places[block.windows], out)

    def weights(self, q: Tensor, k: Tensor, block: Block, out: Tensor) -> None:
        """As `cpu.Steps.weights`."""
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=out.flatten(0, 1))
        plain = max(0, self.map.plain - block.windows.start)
        region, bias = self.region[block.windows], self.bias[block.heads]
        numba_kernels.softmax(out.numpy(), bias, region, plain, self.scale)

    def gradient(self, weights: Tensor, grad: Tensor, dbias: Tensor) -> None:
        """As `cpu.Steps.gradient`."""
        numba_kernels.gradient(weights.numpy(), grad.numpy(), dbias.numpy(), self.scale)


def _memory(image: Tensor) -> np.ndarray:
    """All that an image's strides reach, as one row: numba then knows that the last axis is dense."""
    length = 1 + sum((n - 1) * s for n, s in zip(image.shape, image.stride(), strict=True))
    return image.as_strided((length,), (1,)).numpy()

"""Turn the LayerNorms of a trained pre-norm model into RMSNorm or CRMSNorm without changing its outputs.

LayerNorm ignores the mean of what it reads. Where everything that reads the residual stream is a LayerNorm,
whatever writes the stream may therefore be made zero-mean, and LayerNorm becomes RMSNorm. A zero-mean stream
of d entries needs d - 1 of them: the last is minus the sum of the others, and RMSNorm becomes CRMSNorm.

Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (arXiv 2305.14858).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.norm import CRMSNorm, LayerNorm, RMSNorm
from manyheads.core.layers.transformer import PreNormStack

Target = Literal["rms", "crms"]
_TOLERANCE = 1e-9  # of the check, which runs in float64: a stack that fits agrees to rounding


@dataclass(frozen=True)
class Stream:
    """What touches a model's residual stream, by dotted names.

    Attributes:
        writers: Linear, Embedding and convolution modules whose outputs are added to the stream, and
            parameters that are (`[..., d]`: position embeddings, class tokens).
        norms: Each LayerNorm that reads the stream, with the Linear layers that read its output. The final
            norm of a model whose output it is has none.
    """

    writers: Sequence[str]
    norms: Mapping[str, Sequence[str]]


def convert(model: nn.Module, stream: Stream, example: Tensor, *, to: Target) -> nn.Module:
    """Return a copy of a pre-norm model with RMSNorm or CRMSNorm for LayerNorm and the same outputs.

    "rms" folds the norms' shifts into the layers that read them; a norm without readers keeps its shift.
    "crms" folds scales too and drops the last entry of the stream. Dropout between a writer and the stream
    puts a mean back in training: outputs then agree in evaluation only.

    Args:
        stream: What writes the stream and what reads it; `stream_of` says it for a PreNormStack.
        example: An input. Both models run on it in float64, and the conversion is refused if they differ.
        to: "rms" or "crms".

    Raises:
        UsageError: The model is not pre-norm, or the stream is not as described: a name is missing or of the
            wrong kind, a parameter is shared, or the outputs differ.

    Example:
        >>> light = convert(stack, stream_of(stack), torch.randn(1, 16, 32), to="rms")
    """
    if to not in ("rms", "crms"):
        raise UsageError(f"convert: to must be 'rms' or 'crms', not {to!r}")
    converted = copy.deepcopy(model).double().eval()
    _refuse_shared(converted, stream)
    wanted = _run(copy.deepcopy(converted), example)
    with torch.no_grad():
        for name in stream.writers:
            _write(converted, name, drop=to == "crms")
        for name, readers in stream.norms.items():
            _replace_norm(converted, name, [_linear(converted, reader) for reader in readers], to)
    _check_outputs(converted, example, wanted)
    _restore(converted, model)
    return converted.train(model.training)


def stream_of(stack: PreNormStack) -> Stream:
    """Say what touches the stream of a PreNormStack that has an `embed` (give it `in_dim`).

    Raises:
        UsageError: The stack takes the stream itself as its input, which nothing here could make zero-mean.
    """
    if not isinstance(stack.embed, nn.Linear):
        raise UsageError(
            "the stack's input is its stream, whose mean cannot be removed; build it with in_dim"
        )
    names = [f"blocks.{i}" for i in range(len(stack.blocks))]
    norms = {f"{name}.{norm}": (f"{name}.{reader}",) for name in names for norm, reader in _READS}
    final = ("head",) if isinstance(stack.head, nn.Linear) else ()
    writers = [f"{name}.{writer}" for name in names for writer in ("attn.proj", "mlp.fc2")]
    return Stream(["embed", *writers], {**norms, "norm": final})


_READS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))


def remove_mean(weight: Tensor, axis: int = 0) -> Tensor:
    """Project a weight so that what it writes along an axis sums to zero.

    Shape:
        weight: any; the result likewise.
    """
    return weight - weight.mean(axis, keepdim=True)


def fold_affine(reader: nn.Linear, weight: Tensor | None, bias: Tensor | None) -> None:
    """Move a norm's scale w and shift b into its reader: `W (w * x + b) + c = (W w) x + (c + W b)`."""
    if bias is not None:
        shift = reader.weight @ bias  # [out]
        reader.bias = nn.Parameter(shift if reader.bias is None else reader.bias + shift)
    if weight is not None:
        reader.weight = nn.Parameter(reader.weight * weight)


def drop_input(reader: nn.Linear) -> None:
    """Let a Linear read d - 1 entries of a zero-mean row of d: the last is minus the sum of the others."""
    reader.weight = nn.Parameter(reader.weight[:, :-1] - reader.weight[:, -1:])
    reader.in_features -= 1


def _write(model: nn.Module, name: str, drop: bool) -> None:
    """Make a writer zero-mean, and for CRMSNorm write all entries but the last."""
    holder, leaf, target = _holder(model, name)
    if isinstance(target, nn.Parameter):
        setattr(holder, leaf, _narrow(target, -1, drop))
    elif isinstance(target, nn.Embedding):
        target.weight = _narrow(target.weight, 1, drop)
        target.embedding_dim -= drop
    elif isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        target.weight = _narrow(target.weight, 0, drop)
        if target.bias is not None:
            target.bias = _narrow(target.bias, 0, drop)
        if isinstance(target, nn.Linear):
            target.out_features -= drop
        else:
            target.out_channels -= drop
    else:
        kind = type(target).__name__
        raise UsageError(
            f"writer {name!r} is a {kind}; a Linear, Embedding, convolution or parameter can be converted"
        )


def _narrow(weight: Tensor, axis: int, drop: bool) -> nn.Parameter:
    centred = remove_mean(weight, axis)
    return nn.Parameter(centred.narrow(axis, 0, centred.shape[axis] - 1).clone() if drop else centred)


def _replace_norm(model: nn.Module, name: str, readers: Sequence[nn.Linear], to: Target) -> None:
    holder, leaf, norm = _holder(model, name)
    if not isinstance(norm, nn.LayerNorm | LayerNorm):
        raise UsageError(f"norm {name!r} is a {type(norm).__name__}, not a LayerNorm")
    width = norm.dim if isinstance(norm, LayerNorm) else norm.normalized_shape[-1]
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) > 1:
        raise UsageError(f"norm {name!r} spans {len(norm.normalized_shape)} axes; the stream is one")
    if to == "crms" and not readers:
        raise UsageError(
            f"norm {name!r} has no readers: with CRMSNorm its output would lose an entry; convert to 'rms'"
        )
    for reader in readers:
        if reader.in_features != width:
            raise UsageError(
                f"a reader of {name!r} takes {reader.in_features} entries, and the norm gives {width}"
            )
        fold_affine(reader, norm.weight if to == "crms" else None, norm.bias)
        if to == "crms":
            drop_input(reader)
    new: RMSNorm | CRMSNorm
    if to == "crms":
        new = CRMSNorm(width - 1, norm.eps)
    else:
        new = RMSNorm(width, norm.eps, weight=norm.weight is not None)
        new.weight = norm.weight
        new.bias = None if readers else norm.bias
    setattr(holder, leaf, new)


def _refuse_shared(model: nn.Module, stream: Stream) -> None:
    """Refuse a writer, norm or reader whose parameters are used elsewhere too, and names that occur twice."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    readers = [reader for found in stream.norms.values() for reader in found]
    named = Counter(stream.writers) | Counter([*stream.norms, *readers])  # a layer may both read and write
    for name, times in named.items():
        target = _holder(model, name)[2]
        parameters = list(target.parameters()) if isinstance(target, nn.Module) else [target]
        if times > 1 or any(uses[id(p)] > 1 for p in parameters):
            raise UsageError(
                f"{name!r} is used in more than one place; its weights cannot be changed for one"
            )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = _holder(model, name)[2]
    if not isinstance(found, nn.Linear):
        raise UsageError(f"reader {name!r} is a {type(found).__name__}, not a Linear")
    return found


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module | Tensor]:
    """The module that holds a name, the last part of the name, and what it names."""
    path, _, leaf = name.rpartition(".")
    try:
        holder = model.get_submodule(path)
        return holder, leaf, getattr(holder, leaf)
    except AttributeError as error:
        raise UsageError(f"the model has no {name!r}: {error}") from error


def _run(model: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(example.double() if example.is_floating_point() else example)
    if not isinstance(out, Tensor):
        raise UsageError(f"the model returns a {type(out).__name__}; wrap it so that it returns a tensor")
    return out


def _restore(converted: nn.Module, model: nn.Module) -> None:
    """Give parameters and buffers back the dtypes of the model, and what was frozen its state."""
    known = dict(model.named_parameters())
    usual = next(iter(known.values()))
    for name, parameter in converted.named_parameters():
        like = known.get(name, usual)  # a shift that was folded into a reader without one is new
        parameter.data = parameter.data.to(like.dtype)
        parameter.requires_grad_(like.requires_grad)
    for name, buffer in model.named_buffers():
        holder, leaf, _ = _holder(converted, name)
        setattr(holder, leaf, buffer.clone())


def _check_outputs(converted: nn.Module, example: Tensor, wanted: Tensor) -> None:
    why = (
        "the stream is not as described, or the model is not pre-norm (something reads or writes it besides)"
    )
    try:
        found = _run(converted, example)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the converted model does not run: {why}: {error}") from error
    difference = (found - wanted).abs().max().item() if found.shape == wanted.shape else float("inf")
    if not difference <= _TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise UsageError(f"the converted model's output differs by {difference:.1e}: {why}")

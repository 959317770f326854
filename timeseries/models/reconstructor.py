"""Filling gaps and finding anomalies: windows rebuilt from what is observed of them.

As in the time-series library, a forecaster whose horizon is its own window serves as the network; gaps are
zeros after the window is standardised by its observed values.

Source: arXiv 2210.02186, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.catalog import builder, create_model, find
from manyheads.core.errors import UsageError, did_you_mean
from manyheads.timeseries.models.blocks import check_choices, check_positive
from manyheads.timeseries.models.classifier import Encode, encoder_of
from manyheads.timeseries.models.forecaster import window_statistics
from manyheads.timeseries.reconstruction.masks import linear

STEPWISE = ("informer", "autoformer")  # their encoder's tokens are steps
BASES = ("itransformer", "s_mamba", "iflowformer", "patchtst", "dlinear", *STEPWISE)
FILLS = ("zeros", "line")
_OURS = ("seq_len", "pred_len", "use_norm", "enc_in", "c_out", "label_len", "outputs")


class StepDecoder(nn.Module):
    """An encoder whose tokens are steps, and one linear map from each to the values of its step.

    Args:
        parts: The embedding and the encoder, under their names in the forecaster.
        encode: Makes tokens with them.
        d_model: Width of a token.
        channels: Values a step.

    Shape:
        x `[B, L, N]` -> `[B, L, N]`.
    """

    def __init__(self, parts: dict[str, nn.Module], encode: Encode, d_model: int, channels: int) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.projection = nn.Linear(d_model, channels)
        self.variates = channels
        self._encode = encode

    def forward(self, x: Tensor, x_mark: Tensor | None = None) -> Tensor:
        """Rebuild a window; the calendar is not used."""
        return self.projection(self._encode(x)[:, 0])


class Reconstructor(nn.Module):
    """Standardise windows by their observed values, fill the gaps plainly, and rebuild all of them.

    Args:
        base: Maps the standardised window and its calendar features to a window.
        fill: "zeros" in the gaps; or the "line" between the values around them, to which the base then adds.

    Shape:
        x, observed (bool) `[B, L, N]`, x_mark `[B, L, M]` -> `[B, L, N]`, in the units of x. Of x only what
        is observed is read.
    """

    def __init__(self, base: nn.Module, fill: str) -> None:
        super().__init__()
        self.base, self.fill = base, fill

    @property
    def variates(self) -> int | None:
        """How many variates it takes; None for any number."""
        return getattr(self.base, "variates", None)

    def forward(self, x: Tensor, observed: Tensor, x_mark: Tensor | None = None) -> Tensor:
        """Rebuild windows."""
        known = torch.where(observed, x, 0.0)
        loc, scale = window_statistics(known, observed, "standard")
        assert loc is not None
        assert scale is not None
        z = torch.where(observed, (known - loc) / scale, 0.0)
        if self.fill == "line":
            z = linear(z, observed)
            return (self.base(z, x_mark) + z) * scale + loc
        return self.base(z, x_mark) * scale + loc


def reconstructor(
    base: str,
    seq_len: int,
    channels: int,
    arguments: dict[str, bool | int | float | str | None] | None = None,
    fill: str = "zeros",
) -> Reconstructor:
    """Build a reconstructor on a forecaster of the catalogue.

    Args:
        base: The forecaster's catalogue name.
        seq_len: Steps of the window.
        channels: Values a step; binding where the base takes a fixed number.
        arguments: The forecaster's own options.
        fill: What gaps hold: "zeros", or the "line" between the values around them, which the base corrects.

    Raises:
        UsageError: A size is not positive, the base cannot serve, or an argument is not the base's.

    Example:
        >>> model = reconstructor("itransformer", seq_len=96, channels=7, arguments={"d_model": 64})
        >>> model(torch.zeros(2, 96, 7), torch.ones(2, 96, 7, dtype=torch.bool)).shape
        torch.Size([2, 96, 7])
    """
    check_positive("reconstructor", locals(), ("seq_len", "channels"))
    check_choices("reconstructor", locals(), {"fill": FILLS})
    if base not in BASES:
        raise UsageError(
            f"no base {base!r} to reconstruct with{did_you_mean(base, BASES)} ({', '.join(BASES)})"
        )
    given = dict(arguments or {})
    fixed = [name for name in _OURS if name in given]
    if fixed:
        raise UsageError(f"{fixed[0]} is no option here: the reconstructor sets it")
    if base in STEPWISE:
        return Reconstructor(_by_steps(base, seq_len, channels, given), fill)
    if "use_norm" in builder(find(base)).__annotations__:
        given["use_norm"] = False  # done here, without what is missing
    return Reconstructor(create_model(base, seq_len=seq_len, pred_len=seq_len, **given), fill)


def _by_steps(
    base: str, seq_len: int, channels: int, arguments: dict[str, bool | int | float | str | None]
) -> StepDecoder:
    """Take the encoder of a forecaster whose tokens are steps."""
    if arguments.get("distil"):
        raise UsageError(f"{base}: distil halves the steps, which a reconstruction needs all; leave it out")
    if "distil" in builder(find(base)).__annotations__:
        arguments["distil"] = False
    sizes = {"seq_len": seq_len, "pred_len": 1, "enc_in": channels, "label_len": 0}
    model = create_model(base, **arguments, **sizes).eval()  # a trial run leaves no trace
    parts, encode = encoder_of(model)
    with torch.no_grad():
        d_model = encode(torch.zeros(1, seq_len, channels)).shape[-1]
    return StepDecoder(parts, encode, d_model, channels).train()

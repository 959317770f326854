"""Where somebody speaks: silero's network, or a gate on the level.

Both take windows of 32 ms as they come and give each a number from 0 to 1. Source of the network: the
package silero-vad, which carries its weights (MIT); it hears speech in noise. The gate hears whatever is
louder than what it was lately at its quietest: it needs no package, and takes music and doors for speech.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError, did_you_mean

Kind: TypeAlias = Literal["silero", "energy", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WINDOWS = {8000: 256, 16000: 512}  # samples that silero takes at its two rates
WINDOW_MS = 32
QUIET = 1e-10  # mean square that stands for digital silence: -100 dB


class Detector(Protocol):
    """Tells speech; keeps what it needs of earlier windows."""

    @property
    def window(self) -> int:
        """Samples of a window."""

    def push(self, samples: Tensor) -> Tensor:
        """Take whole windows `[n * window]`; return how likely each is speech, `[n]`."""

    def reset(self) -> None:
        """Begin another recording."""


def make_detector(kind: Kind, sample_rate: int) -> Detector | None:
    """Build a detector; None of "none".

    Raises:
        UsageError: No such kind, silero-vad is not installed, or it does not know this rate.
    """
    if kind not in KINDS:
        raise UsageError(f"no vad {kind!r}{did_you_mean(str(kind), KINDS)} (vad: {', '.join(KINDS)})")
    if kind == "none":
        return None
    return Silero(sample_rate) if kind == "silero" else EnergyGate(sample_rate)


def window_of(sample_rate: int) -> int:
    """Samples of a window of 32 ms."""
    return WINDOWS.get(sample_rate, sample_rate * WINDOW_MS // 1000)


def levels(samples: Tensor, window: int) -> Tensor:
    """The level of each window in decibels of full scale, without its mean: `[n * window]` to `[n]`."""
    windows = samples.reshape(-1, window)
    spread = (windows - windows.mean(1, keepdim=True)).square().mean(1)
    return 10 * spread.clamp(min=QUIET).log10()


class Silero:
    """Silero's network, from the files of the package.

    Args:
        sample_rate: 8000 or 16000, in Hz.

    Raises:
        UsageError: Another rate, or the package is not installed.
    """

    def __init__(self, sample_rate: int) -> None:
        if sample_rate not in WINDOWS:
            raise UsageError(
                f"silero knows 8000 and 16000 Hz, and the model takes {sample_rate}: choose vad energy"
            )
        self.sample_rate, self.window = sample_rate, WINDOWS[sample_rate]
        self._network = _load_network()

    def push(self, samples: Tensor) -> Tensor:
        """Take whole windows; return how likely each is speech."""
        with torch.inference_mode():
            found = [self._network(each[None], self.sample_rate)[0, 0] for each in _windows(samples, self)]
            return torch.stack(found) if found else torch.zeros(0)

    def reset(self) -> None:
        """Begin another recording."""
        self._network.reset_states()


def _load_network() -> Any:
    """Load the network without importing its package, which would set torch's threads to one."""
    found = importlib.util.find_spec("silero_vad")
    if found is None or found.origin is None:
        raise UsageError(
            "vad silero needs the package silero-vad: install manyheads[speech], or choose vad energy"
        )
    path = Path(found.origin).parent / "data" / "silero_vad.jit"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, the form they publish
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"vad silero: {path} cannot be loaded ({str(error).splitlines()[0]})") from error


class EnergyGate:
    """A gate on the level above the noise.

    The noise is the lowest level so far, which rises by a decibel a second, so that the gate follows noise
    that grows; it never counts as lower than `least - margin`, or a gap of digital silence would open the
    gate for all that follows. A window counts for half where it is `margin` above the noise.

    Args:
        sample_rate: In Hz.
        margin: Above the noise, in decibels.
        least: Of speech, in decibels of full scale.
        rise: Of the noise, in decibels a second.
        start: The noise before the first window: a recording may begin with speech.
    """

    def __init__(
        self,
        sample_rate: int,
        margin: float = 10.0,
        least: float = -55.0,
        rise: float = 1.0,
        start: float = -50.0,
    ) -> None:
        self.sample_rate, self.window = sample_rate, window_of(sample_rate)
        self.margin, self.least, self.start = margin, least, start
        self._rise = rise * self.window / sample_rate  # a window
        self._noise = start

    def push(self, samples: Tensor) -> Tensor:
        """Take whole windows; return how likely each is speech."""
        loud = levels(_windows(samples, self).flatten(), self.window).double()
        if not len(loud):
            return torch.zeros(0)
        floor = self.least - self.margin
        risen = torch.arange(1, len(loud) + 1, dtype=torch.float64) * self._rise
        noise = (loud.clamp(min=floor) - risen).cummin(0).values.clamp(max=self._noise) + risen
        self._noise = float(noise[-1])
        return ((loud - noise - self.margin) / 2).sigmoid().float()

    def reset(self) -> None:
        """Begin another recording."""
        self._noise = self.start


def _windows(samples: Tensor, detector: Detector) -> Tensor:
    """Cut samples into windows `[n, window]`.

    Raises:
        DataError: They are no whole windows.
    """
    if samples.ndim != 1 or len(samples) % detector.window:
        raise DataError(f"vad: {list(samples.shape)} samples are no whole windows of {detector.window}")
    return samples.reshape(-1, detector.window)

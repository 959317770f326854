"""What is said, and how: the utterances of a part of a data set, as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Utterance(NamedTuple):
    """One recording and its text.

    Shape:
        samples `[L]`, float32, at the rate that was asked for.
    """

    samples: Tensor
    text: str


class Utterances(Protocol):
    """The utterances of one part."""

    @property
    def source(self) -> str:
        """Where they come from, for messages."""

    @property
    def ids(self) -> Sequence[str]:
        """Their names."""

    @property
    def texts(self) -> Sequence[str]:
        """Their texts, in the first epoch."""

    @property
    def seconds(self) -> NDArray[np.floating]:
        """How long each is; where they are made anew each epoch, about how long."""

    def read(self, index: int, epoch: int = 0) -> Utterance:
        """Read or make one.

        Raises:
            BadRecord: It cannot be used; why.
        """

"""What a recogniser's folder says beside its model: front end, normalisation and units, as plain JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import torch

from manyheads.core.errors import DataError
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.tokens import Tokens
from manyheads.speech.vocabulary import Characters, Pieces, Vocabulary

Kind = Literal["characters", "sentencepiece", "published"]
_KINDS = ("characters", "sentencepiece", "published")


@dataclass(frozen=True)
class Features:
    """How samples become rows of numbers.

    Args:
        mels: Channels of the filter bank.
        frame_ms: Length of its frames, in milliseconds.
        hop_ms: From a frame to the next, in milliseconds.
        stack: Frames that are put side by side.
        stride: At every how many-th frame.
    """

    mels: int = 80
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    stack: int = 7
    stride: int = 6

    def front_end(self, sample_rate: int, cmvn: torch.Tensor | None = None, dither: float = 0.0) -> FrontEnd:
        """Build the front end; cmvn as `FrontEnd` has it."""
        return FrontEnd(cmvn, sample_rate, **asdict(self), dither=dither)


@dataclass(frozen=True)
class Preprocessing:
    """From samples to rows, and from units to text.

    Args:
        sample_rate: In Hz.
        features: How samples become rows.
        cmvn: What is added to each channel of a row, and what it is then multiplied with; None for neither.
        kind: Of the units.
        names: The units, in the order of their ids.
        model: A sentencepiece model in base64, if the units are its pieces.
        spelling: The pieces of each word, if the units are a published list with a `seg_dict`.

    Shape:
        cmvn `[2, stack * mels]`.
    """

    sample_rate: int
    features: Features
    cmvn: tuple[tuple[float, ...], tuple[float, ...]] | None
    kind: Kind
    names: tuple[str, ...]
    model: str | None = None
    spelling: Mapping[str, tuple[str, ...]] | None = None

    @classmethod
    def of(
        cls,
        sample_rate: int,
        features: Features,
        cmvn: torch.Tensor | None,
        vocabulary: Vocabulary,
    ) -> Preprocessing:
        """Describe a front end and its units."""
        both = None if cmvn is None else (tuple(cmvn[0].tolist()), tuple(cmvn[1].tolist()))
        names = vocabulary.names
        if isinstance(vocabulary, Pieces):
            model = base64.b64encode(vocabulary.model).decode()
            return cls(sample_rate, features, both, "sentencepiece", names, model)
        if isinstance(vocabulary, Tokens):
            return cls(
                sample_rate, features, both, "published", names, spelling=vocabulary.spelling
            )  # fmt: skip
        return cls(sample_rate, features, both, "characters", names)

    def to_json(self) -> dict[str, object]:
        """Write it as plain JSON."""
        return {
            "sample_rate": self.sample_rate,
            "front_end": asdict(self.features),
            "cmvn": None if self.cmvn is None else [list(each) for each in self.cmvn],
            "tokens": {
                "kind": self.kind,
                "names": list(self.names),
                "model": self.model,
                "spelling": None
                if self.spelling is None
                else {word: list(pieces) for word, pieces in self.spelling.items()},
            },
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, object]) -> Preprocessing:
        """Read it back; a config is data from elsewhere, so everything is checked.

        Raises:
            DataError: Something is missing or is not what it must be.
        """
        rate, front, cmvn = saved.get("sample_rate"), saved.get("front_end"), saved.get("cmvn")
        tokens = saved.get("tokens")
        _expect(_whole(rate) and 1000 <= rate <= 384_000, "sample_rate", "whole Hz from 1000 to 384000")  # type: ignore[operator]
        _expect(isinstance(front, Mapping), "front_end", "an object")
        _expect(isinstance(tokens, Mapping), "tokens", "an object")
        assert isinstance(front, Mapping) and isinstance(tokens, Mapping)
        features = _features(front)
        _expect(cmvn is None or _rows(cmvn, features.stack * features.mels), "cmvn",
                f"null or 2 rows of {features.stack * features.mels} finite numbers")  # fmt: skip
        kind, names = tokens.get("kind"), tokens.get("names")
        _expect(kind in _KINDS, "tokens.kind", f"one of {', '.join(_KINDS)}")
        _expect(isinstance(names, list) and len(names) > 3 and all(isinstance(n, str) for n in names),
                "tokens.names", "a list of more than three strings")  # fmt: skip
        model, spelling = tokens.get("model"), tokens.get("spelling")
        _expect(
            isinstance(model, str) == (kind == "sentencepiece"),
            "tokens.model",
            "there for sentencepiece alone",
        )
        _expect(spelling is None or kind == "published", "tokens.spelling", "there for published lists alone")
        _expect(spelling is None or _is_spelling(spelling), "tokens.spelling", "lists of strings by word")
        found = cls(
            int(rate),  # type: ignore[call-overload]
            features,
            None if cmvn is None else tuple(tuple(map(float, row)) for row in cmvn),  # type: ignore[arg-type, attr-defined]
            kind,  # type: ignore[arg-type]
            tuple(names),  # type: ignore[arg-type]
            model,
            None if spelling is None else {word: tuple(parts) for word, parts in spelling.items()},
        )
        found.tokens()
        return found

    def front_end(self, dither: float = 0.0) -> FrontEnd:
        """Build the front end."""
        cmvn = None if self.cmvn is None else torch.tensor(self.cmvn, dtype=torch.float32)
        return self.features.front_end(self.sample_rate, cmvn, dither)

    def tokens(self) -> Vocabulary:
        """Build the list of units."""
        return self._tokens

    @cached_property
    def _tokens(self) -> Vocabulary:
        if self.kind == "characters":
            return Characters(self.names)
        if self.kind == "published":
            return Tokens(self.names, self.spelling)
        try:
            model = base64.b64decode(self.model or "", validate=True)
        except binascii.Error as error:
            raise DataError(f"preprocessing: tokens.model is not base64 ({error})") from error
        return Pieces(self.names, model)


def _features(saved: Mapping[object, object]) -> Features:
    """Read the front end's numbers, all of them and no others."""
    wanted = asdict(Features())
    _expect(set(saved) == set(wanted), "front_end", f"an object of {', '.join(wanted)}")
    for name in ("mels", "stack", "stride"):
        value = saved[name]
        _expect(_whole(value) and 1 <= value <= 512, f"front_end.{name}", "whole, from 1 to 512")  # type: ignore[operator]
    for name in ("frame_ms", "hop_ms"):
        value = saved[name]
        good = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 1000
        _expect(good, f"front_end.{name}", "milliseconds from 1 to 1000")
    return Features(**saved)  # type: ignore[arg-type]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rows(value: object, size: int) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    rows = [row for row in value if isinstance(row, list) and len(row) == size]
    return len(rows) == 2 and all(
        isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < float("inf")
        for row in rows
        for x in row
    )


def _is_spelling(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts)
        for parts in value.values()
    )


def _expect(holds: bool, key: str, what: str) -> None:
    if not holds:
        raise DataError(f"preprocessing: {key} must be {what}")

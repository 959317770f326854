"""Subtitles: SubRip (`.srt`) and WebVTT (`.vtt`) files of what was recognised.

A segment becomes one cue or several: of at most two lines, cut between words where their times are known, in
proportion to the text where they are not. Cues follow one another and never overlap.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

Format: TypeAlias = Literal["srt", "vtt"]
Word: TypeAlias = tuple[str, tuple[int, int]]  # text, start and end in milliseconds

LINE = 42  # columns; a Chinese, Japanese or Korean character takes two
LINES = 2
LONGEST_MS = 7000
PAUSE_MS = 1500  # between two words that a cue does not span
_WIDE = "WF"


class Cue(NamedTuple):
    """A subtitle: its lines, and when it is shown, in milliseconds."""

    start: int
    end: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """A segment that was recognised.

    Args:
        text: What was said; nothing is shown of an empty one.
        start, end: In milliseconds of the recording.
        words: The words of the text, in order, with their times; empty where the model gives none.
    """

    text: str
    start: int
    end: int
    words: tuple[Word, ...] = ()


class Writer:
    """Writes the subtitles of one recording, segment by segment, in order.

    Args:
        format: Of the file.
    """

    def __init__(self, format: Format) -> None:
        self.format, self.count, self.last = format, 0, 0
        self.head = "WEBVTT\n\n" if format == "vtt" else ""  # of a file, also one without cues

    def write(self, said: Said) -> str:
        """Return a segment's cues as the file has them; nothing of an empty text."""
        return "".join(map(self._cue, cues(said)))

    def _cue(self, cue: Cue) -> str:
        start = max(cue.start, self.last)
        self.last = max(cue.end, start + 1)  # a cue of no length is not allowed
        self.count += 1
        times = f"{clock(start, self.format)} --> {clock(self.last, self.format)}"
        return "\n".join((str(self.count), times, *(escape(x, self.format) for x in cue.lines), "", ""))


def clock(ms: int, format: Format) -> str:
    """Write a time.

    Example:
        >>> clock(3723004, "srt")
        '01:02:03,004'
    """
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{',' if format == 'srt' else '.'}{ms:03d}"


def escape(line: str, format: Format) -> str:
    """Keep a line from being read as markup or as a cue's times.

    SubRip has no escapes: there an arrow of two dashes becomes the sign for it, and a `<` or `{` that would
    begin a tag gets a word joiner behind it, which is not seen.
    """
    if format == "vtt":
        return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([<{])(?=\S)", "\\1\u2060", line.replace("-->", "\u2192"))


def cues(said: Said) -> list[Cue]:
    """Cut a segment into cues."""
    words = _words(said)
    found: list[Cue] = []
    held: list[Word] = []
    for word in words:
        if held and not _fits([*held, word]):
            found.append(_cue(held))
            held = []
        held.append(word)
    return [*found, _cue(held)] if held else found


def _words(said: Said) -> list[Word]:
    """The words as they are shown: as long as a line at most, with the space that stands before each."""
    text = " ".join("".join(" " if _is_control(c) else c for c in said.text).split())
    shown = list(_pieces(text))
    times = _times(said, text, shown)
    return list(zip(shown, times, strict=True))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")


def _pieces(text: str) -> Iterator[str]:
    """Cut text where a line may end: before a space or a wide character; and where it has to."""
    piece = ""
    for character in text:
        new = character == " " or is_wide(character) or (piece != "" and is_wide(piece[-1]))
        if piece and ((new and piece != " ") or columns(piece + character) > LINE):
            yield piece
            piece = ""
        piece += character
    if piece:
        yield piece


def _times(said: Said, text: str, shown: Sequence[str]) -> list[tuple[int, int]]:
    """When each piece is said: as the words that it overlaps in the text, else by its share of the text."""
    length = max(len(text), 1)
    bounds, place = [0], 0
    for piece in shown:
        place += len(piece)
        bounds.append(place)
    known = _located(said.words, text)
    found, last = [], said.start
    for a, b in pairwise(bounds):
        inside = [time for begin, end, time in known if begin < b and end > a] if known else []
        if inside:
            start, stop = min(t[0] for t in inside), max(t[1] for t in inside)
        elif known:  # no word of the model's: punctuation, say
            start = stop = last
        else:
            start, stop = (said.start + (said.end - said.start) * x // length for x in (a, b))
        start = min(max(start, last), said.end)
        last = min(max(stop, start), said.end)
        found.append((start, last))
    return found


def _located(words: Sequence[Word], text: str) -> list[tuple[int, int, tuple[int, int]]]:
    """Find the words in the text, in order; none at all if one is missing."""
    found, place = [], 0
    for word, time in words:
        at = text.find(word, place)
        if at < 0:
            return []
        place = at + len(word)
        found.append((at, place, time))
    return found


def _fits(words: Sequence[Word]) -> bool:
    gap = words[-1][1][0] - words[-2][1][1] if len(words) > 1 else 0
    short = words[-1][1][1] - words[0][1][0] <= LONGEST_MS
    return short and gap <= PAUSE_MS and len(wrap([word for word, _ in words])) <= LINES


def _cue(words: Sequence[Word]) -> Cue:
    return Cue(words[0][1][0], words[-1][1][1], tuple(wrap([word for word, _ in words])))


def wrap(pieces: Sequence[str]) -> list[str]:
    """Put pieces on lines of at most the width."""
    lines: list[str] = []
    line = ""
    for piece in pieces:
        if line and columns(line + piece) > LINE:
            lines.append(line)
            line = ""
        line += piece if line else piece.lstrip()
    return [*lines, line] if line else lines


def is_wide(character: str) -> bool:
    """Tell whether a character takes two columns."""
    return unicodedata.east_asian_width(character) in _WIDE


def columns(text: str) -> int:
    """The columns that text takes."""
    return sum(2 if is_wide(character) else 1 for character in text)

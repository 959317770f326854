"""Subtitle files: times, lines, cuts, markup, and that they can be parsed again."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from manyheads.speech.recognition.subtitles import (
    LINE,
    LINES,
    LONGEST_MS,
    Said,
    Writer,
    clock,
    columns,
    cues,
    escape,
    wrap,
)

TIMES = {
    "srt": re.compile(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})"),
    "vtt": re.compile(r"(\d\d):(\d\d):(\d\d)\.(\d{3}) --> (\d\d):(\d\d):(\d\d)\.(\d{3})"),
}


def parsed(text, format):
    """Read a file strictly: (start, end, lines) of each cue, numbered from 1."""
    if format == "vtt":
        assert text.startswith("WEBVTT\n\n")
        text = text.removeprefix("WEBVTT\n\n")
    assert text == "" or text.endswith("\n\n")
    found = []
    for number, block in enumerate(text.split("\n\n")[:-1], 1):
        head, times, *lines = block.split("\n")
        assert head == str(number) and lines and all(lines)
        h1, m1, s1, ms1, h2, m2, s2, ms2 = map(int, TIMES[format].fullmatch(times).groups())
        start, end = (
            (h * 60 + m) * 60000 + s * 1000 + ms for h, m, s, ms in ((h1, m1, s1, ms1), (h2, m2, s2, ms2))
        )
        found.append((start, end, lines))
    return found


def written(said, format):
    writer = Writer(format)
    return writer.head + "".join(map(writer.write, said))


def spread(text, start, end):
    """A segment whose words take its time evenly."""
    words = text.split()
    bounds = [start + (end - start) * number // len(words) for number in range(len(words) + 1)]
    return Said(text, start, end, tuple(zip(words, pairwise(bounds), strict=True)))


def test_clock():
    assert clock(0, "srt") == "00:00:00,000" and clock(3_723_004, "vtt") == "01:02:03.004"
    assert clock(36_000_000 * 11, "srt") == "110:00:00,000"


def test_short_segments_are_one_cue():
    text = written([Said("four two", 0, 900), Said("", 1000, 2000), Said("seven", 2000, 2500)], "srt")
    assert text == "1\n00:00:00,000 --> 00:00:00,900\nfour two\n\n2\n00:00:02,000 --> 00:00:02,500\nseven\n\n"
    assert written([Said("four", 0, 900)], "vtt") == "WEBVTT\n\n1\n00:00:00.000 --> 00:00:00.900\nfour\n\n"
    assert written([Said("  ", 0, 900)], "srt") == "" and written([], "vtt") == "WEBVTT\n\n"


def test_long_segments_are_cut_between_words():
    text = " ".join(f"word{number}" for number in range(60))
    found = cues(spread(text, 5000, 35000))
    assert len(found) >= 5
    assert " ".join(" ".join(cue.lines) for cue in found) == text
    for before, after in pairwise(found):
        assert before.end <= after.start
        assert after.lines[0].split()[0] not in before.lines[-1].split()
    for cue in found:
        first, last = (
            int(word.removeprefix("word")) for word in (cue.lines[0].split()[0], cue.lines[-1].split()[-1])
        )
        assert (cue.start, cue.end) == (5000 + first * 500, 5500 + last * 500)


def test_a_pause_begins_a_cue():
    words = (("one", (0, 400)), ("two", (500, 900)), ("three", (3000, 3400)))
    assert [(cue.start, cue.end, cue.lines) for cue in cues(Said("one two three", 0, 3500, words))] == [
        (0, 900, ("one two",)),
        (3000, 3400, ("three",)),
    ]


def test_text_without_words_is_shared_out():
    text = " ".join(["abcd"] * 40)
    found = cues(Said(text, 0, 20_000))
    assert found[0].start == 0 and found[-1].end == 20_000
    assert all(a.end == b.start for a, b in pairwise(found))
    other = cues(Said("not these words", 0, 1000, (("but", (0, 10)), ("those", (10, 20)))))
    assert [(cue.start, cue.end) for cue in other] == [(0, 1000)]


def test_chinese_takes_two_columns_and_breaks_anywhere():
    text = "你好世界" * 20
    words = tuple((character, (n * 100, n * 100 + 100)) for n, character in enumerate(text))
    found = cues(Said(text, 0, 8000, words))
    assert "".join(line for cue in found for line in cue.lines) == text
    assert all(len(line) <= LINE // 2 for cue in found for line in cue.lines)
    assert [cue.start for cue in found] == [0, 4200]


def test_markup_and_control_characters():
    assert escape("a --> b <i>&", "vtt") == "a --&gt; b &lt;i&gt;&amp;"
    assert escape("a --> b <i>x {\\an8} 1 < 2", "srt") == "a \u2192 b <\u2060i>x {\u2060\\an8} 1 < 2"
    text = written([Said("a\n\n2\n00:00:01,000 --> 00:00:02,000\nb\u2028c", 0, 900)], "srt")
    assert len(parsed(text, "srt")) == 1


def test_wrap():
    assert wrap(["a" * LINE, "b"]) == ["a" * LINE, "b"] and wrap([]) == []
    assert wrap(["one", " two"]) == ["one two"] and columns("a你") == 3
    (cue,) = cues(Said("x" * 60, 0, 1000))
    assert cue.lines == ("x" * LINE, "x" * 18)


@pytest.mark.parametrize("format", ["srt", "vtt"])
@pytest.mark.parametrize("seed", range(10))
def test_any_text_gives_a_valid_file(format, seed):
    draw = random.Random(seed)
    place, said = 0, []
    for _ in range(30):
        start = place + draw.randint(0, 3000)
        place = start + draw.randint(0, 30000)
        letters = "abc <>&{}\n-你。é\u200b\t" if seed % 2 else "abcdef    "
        text = "".join(draw.choice(letters) for _ in range(draw.randint(0, 400)))
        one = Said(text, start, place)
        said.append(spread(text, start, place) if text.split() and draw.random() < 0.5 else one)
    found = parsed(written(said, format), format)
    assert len(found) > 20
    last = 0
    for start, end, lines in found:
        assert last <= start < end and len(lines) <= LINES
        assert not any("-->" in line for line in lines)
        if format == "srt":
            assert all(columns(line.replace("\u2060", "")) <= LINE for line in lines)
        last = end


def test_slow_speech_is_cut_by_time():
    found = cues(spread("one two three four five six seven", 0, 14_000))
    assert [cue.end - cue.start for cue in found] == [6000, 6000, 2000] and LONGEST_MS == 7000


def test_ten_hours_do_not_drift():
    said = [spread("ten words " * 5, ms, ms + 3000) for ms in range(0, 36_000_000, 60_000)]
    found = parsed(written(said, "srt"), "srt")
    assert [start for start, _, _ in found] == list(range(0, 36_000_000, 60_000))
    assert {end - start for start, end, _ in found} == {3000}

"""Error rates: by hand, beside torchmetrics', and what each normaliser does."""

import csv
from pathlib import Path

import numpy as np
import pytest
from torchmetrics.text import CharErrorRate, WordErrorRate

from manyheads.speech.recognition import report
from manyheads.speech.recognition.metrics import Edits, compare, normalize, total


@pytest.mark.parametrize(
    ("text", "basic", "chinese"),
    [
        ("Don't  stop, Mr. Bell!", "don't stop mr bell", "don'tstopmrbell"),
        ("  the press-man -- 'so'  ", "the press-man so", "thepress-manso"),
        ("你好\uff0c世界。\uff21\uff22 c", "你好 世界 ab c", "你好世界abc"),
        ("Straße 5%", "straße 5", "straße5"),
        ("...", "", ""),
    ],
)
def test_normalisers(text: str, basic: str, chinese: str) -> None:
    assert normalize(text, "none") == text
    assert normalize(text, "basic") == basic
    assert normalize(text, "chinese") == chinese


def test_errors_by_hand() -> None:
    references = ["12345", "777", "", "0"]
    hypotheses = ["1235", "7787", "9", ""]
    found = compare(references, hypotheses, "character")
    assert found.edits == [Edits(4, 0, 1, 0), Edits(3, 0, 0, 1), Edits(0, 0, 0, 1), Edits(0, 0, 1, 0)]
    assert found.confused == {("4", ""): 1, ("", "8"): 1, ("", "9"): 1, ("0", ""): 1}
    assert total(found.edits).rate == pytest.approx(4 / 9)
    words = compare(["a b c"], [" a x  c d"], "word")
    assert words.edits == [Edits(2, 1, 0, 1)]
    assert words.confused == {("b", "x"): 1, ("", "d"): 1}
    assert compare(["你好"], ["你号"], "character").confused == {("好", "号"): 1}
    assert total([]).rate == 0


def test_rates_are_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc "), rng.integers(4, 30))).strip() + "a" for _ in range(200)]
    texts = [" ".join(text.split()) for text in texts]
    for by, metric in (("character", CharErrorRate()), ("word", WordErrorRate())):
        edits = compare(texts[:100], texts[100:], by).edits  # type: ignore[arg-type]
        assert total(edits).rate == pytest.approx(float(metric(texts[100:], texts[:100])), rel=1e-5)


def test_a_test_leaves_texts_and_a_picture(tmp_path: Path) -> None:
    references, hypotheses = ["12 3", "456", "7"], ["12 3", "446", ""]
    characters, words = (compare(references, hypotheses, by) for by in ("character", "word"))
    tested = report.Tested(
        ["a", "b", "c"], references, hypotheses, characters.edits, words.edits, characters.confused, "basic"
    )
    lines = tested.write(tmp_path)
    assert lines[0] == "characters: 25.00% errors of 8 (S 1, D 1, I 0; normaliser: basic)"
    assert lines[1] == "words: 50.00% errors of 4 (S 1, D 1, I 0; normaliser: basic)"
    with (tmp_path / "texts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["hypothesis"] for row in rows] == hypotheses
    assert [row["substitutions"] for row in rows] == ["0", "1", "0"]
    assert (tmp_path / "errors.png").stat().st_size > 5000

"""The interpreter tests, each op's in a pytest process of its own with TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyheads.core.aot import KERNEL_OPS
from manyheads.core.testing import run_interpreter_tests

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreter"


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_kernels_in_the_interpreter(op):
    passed = run_interpreter_tests(FOLDER / f"test_{op}.py")
    print(f"{op}: {passed} interpreter tests passed")
    assert passed > 0


def test_every_file_is_run():
    assert {path.stem for path in FOLDER.glob("test_*.py")} == {f"test_{op}" for op in KERNEL_OPS}


def test_a_failure_is_reported(tmp_path):
    broken = tmp_path / "test_broken.py"
    broken.write_text(
        "import pytest\n@pytest.mark.interpreter\ndef test_it():\n    assert 'as it' == 'should be'\n"
    )
    with pytest.raises(AssertionError, match="should be"):
        run_interpreter_tests(broken)


def test_a_file_without_tests_is_a_failure(tmp_path):
    empty = tmp_path / "test_empty.py"
    empty.write_text("")
    with pytest.raises(AssertionError):
        run_interpreter_tests(empty)

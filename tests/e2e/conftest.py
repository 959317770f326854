"""The environment that the commands run in: a fresh one by the README, or this one with --here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--here", action="store_true", help="e2e: use this environment instead of a fresh one")


@pytest.fixture(scope="session")
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `manyheads` of a clone that was installed by the README's test command, or of this environment."""
    if request.config.getoption("--here", default=False):
        return Path(sys.executable).parent / "manyheads"
    clone = tmp_path_factory.mktemp("fresh") / "manyheads"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, clone], check=True)
    found = re.search(
        r"<!-- test command -->\s*```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found is not None
    install = found[1].rpartition(" && ")[0]  # but for running the tests
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")}
    subprocess.run(["bash", "-euo", "pipefail", "-c", install], cwd=clone, env=environment, check=True)
    return clone / ".venv/bin/manyheads"

"""The house's rules: imports run one way, by absolute names; files and functions keep their measures."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOMAINS = ("vision", "timeseries", "speech", "graph", "recsys")
ROOMS = ("core", *DOMAINS, "apps")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Modules that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
            if node.module == "manyheads":
                found += [f"manyheads.{alias.name}" for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def test_sources_are_found() -> None:
    assert len(SOURCES) > 20
    assert {room(path) for path in SOURCES} >= {"core", "timeseries", "apps"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_apps_domains_core(path: Path) -> None:
    allowed = {"core": {"core"}, "apps": set(ROOMS)}.get(room(path), {"core", room(path)})
    for name in imports(path):
        assert not name.startswith("."), f"relative import in {path}"
        parts = name.split(".")
        assert parts[0] not in ROOMS, f"{path}: import {name} as manyheads.{name}"
        if parts[0] == "manyheads" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in allowed, f"{path}: {room(path)} must not import {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_tests_import_the_package_by_its_name(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & set(ROOMS)


def test_importing_the_package_leaves_no_second_core() -> None:
    code = (
        "import sys, manyheads.apps.cli; from manyheads.core import catalog;"
        "catalog.entries(); assert 'core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        "jit" in ast.unparse(decorator) or ast.unparse(decorator) == "kernel"
        for decorator in node.decorator_list
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_measures(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60 or is_kernel(node), f"{node.name} has {lines} lines"
            if node.name == "__init__":
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 13, f"{node.name} at {node.lineno}"
        if isinstance(node, ast.ClassDef):
            parents = {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}
            assert not any("Mixin" in parent or parent == "ABC" for parent in parents)

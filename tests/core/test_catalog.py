"""The catalogue: tables read by themselves, families that share a builder, patterns of names."""

import subprocess
import sys

import pytest

from manyheads.core import catalog
from manyheads.core.catalog import Entry
from manyheads.core.errors import UsageError


def build(variant: str, width: int = 4) -> tuple[str, int]:
    return variant, width


def entry(name: str, variant: str | None = None) -> Entry:
    return Entry(name, "vision", "classification", f"{__name__}:build", "", "", "", variant)


def test_reading_the_catalogue_imports_no_domain() -> None:
    code = (
        "import sys; from manyheads.core import catalog, datasets; catalog.entries(); datasets.datasets();"
        "assert not [m for m in sys.modules if m.startswith(('manyheads.vision', 'torch', 'timm'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_builder_of_a_family_gets_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "find", lambda name: entry(name, "tiny"))
    assert catalog.create_model("any", width=8) == ("tiny", 8)
    with pytest.raises(UsageError, match="takes no argument 'variant'"):
        catalog.create_model("any", variant="large")


def test_patterns() -> None:
    found = [entry("swin_tiny"), entry("swin_base"), entry("vit_tiny")]
    assert [e.name for e in catalog.matching(found, "swin*")] == ["swin_tiny", "swin_base"]
    assert catalog.matching(found, None) == found
    with pytest.raises(UsageError, match="no model fits 'swin_tinny'; did you mean 'swin_tiny'"):
        catalog.matching(found, "swin_tinny")
    assert "itransformer" in catalog.list_models("timeseries", "i*")

"""Every family of the catalogue, exported as the table says it can be."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

from manyheads.apps.export_table import EXPORTS
from manyheads.apps.exportable import Exportable, Inputs
from manyheads.apps.exporting import Exported, NotExportable, export
from manyheads.core.catalog import entries

Small = dict[str, Callable[[], Exportable]]
EACH_DOMAIN = ("vit", "itransformer", "mossformer", "message_passing", "sasrec")
SLOW = tuple(family for family in EXPORTS if family not in EACH_DOMAIN)
# Builders of fixed sizes, whose family stands in the table by the one of any size.
SAME = {
    "vim": "vim_tiny_patch16_224 vim_tiny_patch16_stride8_224 vim_small_patch16_224 "
    "vim_small_patch16_stride8_224 vim_base_patch16_224",
    "cct": "cct_2_3x2_32 cct_4_3x2_32 cct_6_3x1_32 cct_7_3x1_32 cct_7_3x2_32 cct_14_7x2_224 cct_14_7x2_384",
    "mossformer": "mossformer_base mossformer_large",
    "paraformer": "paraformer_large",
    "graph_transformer": "graph_transformer_zinc graph_transformer_pattern graph_transformer_cluster",
    "gps": "gps_zinc",
    "recformer": "recformer_base",
}


def attempt(what: Exportable, format: str, path: Path) -> Exported:
    assert what.draw is not None
    batches: dict[int, Inputs] = {}

    def batch(size: int) -> Inputs:
        assert what.draw is not None
        return batches.setdefault(size, what.draw(size))

    return export(what, batch, format, path, 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize(
    "family", [*EACH_DOMAIN, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_the_table_says_what_can_be_exported(family: str, format: str, small: Small, tmp_path: Path) -> None:
    """All families: pytest -m "slow or not slow" tests/apps/exporting (five minutes)."""
    torch.manual_seed(0)
    path = tmp_path / ("model.pt2" if format == "torch" else "model.onnx")
    reason = EXPORTS[family][format]
    if family not in small:
        pytest.skip(f"no input of tensors can be drawn: {reason}")
    if reason:
        with pytest.raises(NotExportable):
            attempt(small[family](), format, path)
        assert not list(tmp_path.iterdir())
        return
    made = attempt(small[family](), format, path)
    assert path.stat().st_size > 500
    assert [each.size for each in made.parity] == [1, 3]
    assert all(each.largest > 0 for each in made.parity)
    assert any(isinstance(axis, str) for each in made.inputs for axis in cast("list[object]", each["shape"]))
    if format == "torch":
        targets = [
            str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"
        ]
        assert targets
        assert not [target for target in targets if "manyheads" in target]  # runs where there is none


def test_every_family_of_the_catalogue_is_in_the_table() -> None:
    same = {name: family for family, names in SAME.items() for name in names.split()}
    found = {entry.builder.partition(":")[2] for entry in entries()}
    assert {same.get(name, name) for name in found} <= set(EXPORTS)

"""Every kind of block against timm's, and the catalogue's names against the installed timm's."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm

from manyheads.core import catalog
from manyheads.vision.models import maxvit, swin, vit

ROOT = Path(__file__).parents[2]
# One for each kind of attention, bias and partition; differential attention stays timm's.
KINDS = (
    "test_vit",
    "vit_base_patch16_xp_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_siglip_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit3_base_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_relpos_small_patch16_224",
    "vit_relpos_medium_patch16_cls_224",
    "vit_srelpos_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "test_maxvit",
    "test_coatnet",
    "maxvit_tiny_tf_224",
    "maxvit_rmlp_pico_rw_256",
    "maxvit_tiny_pm_256",
)


@pytest.fixture(scope="module")
def parity():
    """benchmarks/parity.py, which is not in the package."""
    sys.path.insert(0, str(ROOT))
    try:
        spec = importlib.util.spec_from_file_location("benchmarks.parity", ROOT / "benchmarks" / "parity.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.parametrize(
    "modules", [vit.MODULES, swin.MODULES, maxvit.MODULES], ids=["vit", "swin", "maxvit"]
)
def test_the_catalogue_has_every_architecture_of_timms_modules(modules):
    family = modules[0] if len(modules) == 1 else modules
    builder = {"maxxvit": "maxvit"}.get(family, "swin" if "swin_transformer" in modules else "vit")
    ours = [e.name for e in catalog.entries("vision") if e.builder.endswith(f".{builder}:{builder}")]
    theirs = {name for module in modules for name in timm.list_models(module=module)}
    assert len(ours) == len(set(ours)) > 30
    assert set(ours) == theirs


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_gradients_are_timms(parity, name):
    line = parity.compare_with_timm(catalog.find(name))
    assert line.keys_equal and line.parameters == line.original_parameters
    assert line.outputs <= 1e-4 and line.gradients <= 1e-3
    assert line.replaced > 0 or name.startswith("vit_dpwee")
    assert line.ok


def test_a_wrong_bias_is_seen(parity, monkeypatch):
    from manyheads.vision.models import maxvit_blocks

    true = maxvit_blocks.bias_of
    monkeypatch.setattr(maxvit_blocks, "bias_of", lambda attn: true(attn).transpose(1, 2))
    assert not parity.compare_with_timm(catalog.find("test_maxvit")).ok


@pytest.mark.slow
def test_the_whole_table(parity):
    lines = list(parity.lines(catalog.entries("vision"), full=False))
    assert len(lines) > 300
    assert [line.name for line in lines if not line.ok] == []

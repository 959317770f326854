"""Molecules: atoms and bonds by hand, against torch-geometric's, and what is refused."""

from __future__ import annotations

import builtins

import pytest
import torch
from rdkit import Chem
from torch_geometric.utils import from_smiles

from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.graph import conversion, molecules
from manyheads.graph.conversion import convert
from manyheads.graph.molecules import ZINC_ATOMS, Molecule, smiles_to_graph, types

MANY = (
    "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "C[C@H](N)C(=O)[O-]", "F/C=C/F", "F/C=C\\F",
    "[Na+].[Cl-]", "C", "[H][H]", "CCC1=[O+][Cu-3]2([O+]=C(CC)C1)[O+]=C(CC)CC(CC)=[O+]2", "[CH3]", "c1ccsc1",
    "*CC*", "OS(=O)(=O)F", "[2H]C([2H])[2H]", "FP(F)(F)(F)F", "N#Cc1ccncc1", "[Fe+2]", "S(F)(F)(F)(F)(F)F",
    "[O-][N+](=O)c1ccccc1",
)  # fmt: skip


def names(graph: Molecule) -> list[str]:
    return [ZINC_ATOMS[i] for i in graph.x.tolist()]


def test_a_molecule_by_hand():
    graph = smiles_to_graph("C[C@H](O)C#N", "zinc")
    assert names(graph) == ["C", "C H1", "O", "C", "N"]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2, 1, 3, 3, 4], [1, 0, 2, 1, 3, 1, 4, 3]]
    assert graph.edge_attr.tolist() == [1, 1, 1, 1, 1, 1, 3, 3]
    # as the published featuriser: number, chirality, degree, charge, hydrogens, radicals, hybridisation,
    # aromatic, in a ring
    graph = smiles_to_graph("C[C@H](O)C#N", "ogb")
    assert graph.x[1].tolist() == [5, 2, 4, 5, 1, 0, 2, 0, 0]
    assert graph.x[4].tolist() == [6, 0, 1, 5, 0, 0, 0, 0, 0]
    assert graph.edge_attr[0].tolist() == [0, 0, 0]
    assert graph.edge_attr[6].tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("smiles", "wanted"),
    [
        ("C[NH3+]", ["C", "N H3 +"]),
        ("CC(=O)[O-]", ["C", "C", "O", "O -"]),
        ("c1cc[nH]c1", ["C", "C", "C", "N", "C"]),
        ("C[n+]1ccccc1", ["C", "N +", "C", "C", "C", "C", "C"]),
        ("C[PH2]=O", ["C", "P H2", "O"]),
        ("BrC[S-]", ["Br", "C", "S -"]),
    ],
)
def test_atom_types(smiles, wanted):
    assert names(smiles_to_graph(smiles, "zinc")) == wanted


@pytest.mark.parametrize(
    ("one", "other"), [("CCO", "[CH3][CH2][OH]"), ("c1ccccc1", "C1=CC=CC=C1"), (" CCO\n", "CCO")]
)
def test_an_atom_is_the_same_however_it_is_written(one, other):
    first, second = smiles_to_graph(one, "zinc"), smiles_to_graph(other, "zinc")
    assert torch.equal(first.x, second.x)
    assert sorted(first.edge_attr.tolist()) == sorted(second.edge_attr.tolist())


def test_rings_are_written_with_single_and_double_bonds():
    bonds = smiles_to_graph("c1ccccc1", "zinc").edge_attr
    assert bonds.bincount(minlength=4).tolist() == [0, 6, 6, 0]
    assert smiles_to_graph("c1ccccc1", "ogb").edge_attr[:, 0].unique().tolist() == [3]


@pytest.mark.parametrize("smiles", MANY)
def test_columns_are_torch_geometrics_by_another_count(smiles):
    """Both list rdkit's values: theirs in other orders, and more of them."""
    ours, theirs = smiles_to_graph(smiles, "ogb"), from_smiles(smiles)
    hybrid = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4}
    wanted = theirs.x.clone()
    wanted[:, 0] = (theirs.x[:, 0] - 1) % 119
    wanted[:, 6] = torch.tensor([hybrid.get(i, 5) for i in theirs.x[:, 6].tolist()])
    assert torch.equal(ours.x, wanted)
    count = len(ours.x)
    order = (ours.edge_index[0] * count + ours.edge_index[1]).argsort()
    assert torch.equal(ours.edge_index[:, order], theirs.edge_index)
    kinds, stereo = {1: 0, 2: 1, 3: 2, 12: 3}, {0: 0, 1: 5, 2: 1, 3: 2, 4: 3, 5: 4}
    rows = [[kinds.get(a, 4), stereo[b], c] for a, b, c in theirs.edge_attr.tolist()]
    assert ours.edge_attr[order].tolist() == rows
    for column, size in enumerate(types("ogb")[0]):
        assert 0 <= int(ours.x[:, column].min()) <= int(ours.x[:, column].max()) < size


def test_several_molecules_and_single_atoms_are_graphs():
    graph = smiles_to_graph("[Na+].[Cl-]", "ogb")
    assert graph.x.shape == (2, 9)
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_attr.shape == (0, 3)
    assert smiles_to_graph("C", "zinc").edge_attr.shape == (0,)


@pytest.mark.parametrize(
    ("smiles", "why"),
    [
        ("", "no SMILES"),
        ("  ", "no SMILES"),
        (None, "no SMILES"),
        (float("nan"), "no SMILES"),
        (7, "no SMILES"),
        ("hello", "not a SMILES: 'hello'"),
        ("C1CC", "not a SMILES: 'C1CC'"),
        ("CCO ethanol", "has a blank in it"),
        ("CC(C)(C)(C)C", "atom # 1 C, 5, is greater than permitted"),
        ("c1cccc1", "not a molecule: 'c1cccc1': Can't kekulize mol"),
        ("C" * 1025, "a molecule of 1025 atoms is too large"),
        ("C" * 10_001, "a SMILES of 10001 characters is too large"),
    ],
)
@pytest.mark.parametrize("features", ["zinc", "ogb"])
def test_bad_smiles_are_refused_with_the_reason(smiles, why, features, capfd):
    with pytest.raises(BadRecord) as error:
        smiles_to_graph(smiles, features)
    assert why in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # rdkit says nothing of its own


@pytest.mark.parametrize(
    ("smiles", "atom"), [("C[Si](C)C", "Si"), ("C[B-](C)(C)C", "B -"), ("[Na+]", "Na +")]
)
def test_zinc_refuses_unknown_atoms_by_name(smiles, atom):
    with pytest.raises(BadRecord, match=f"'{atom.replace('+', '[+]')}'"):
        smiles_to_graph(smiles, "zinc")
    assert len(smiles_to_graph(smiles, "ogb").x)


def test_zinc_refuses_unknown_bonds_by_name():
    with pytest.raises(BadRecord, match="'DATIVE'"):
        smiles_to_graph("CN(C)(C)->O", "zinc")


def test_features_are_two():
    assert types("zinc") == ([28], [4])
    assert len(set(ZINC_ATOMS)) == 28
    with pytest.raises(UsageError, match="no features 'x'"):
        smiles_to_graph("C", "x")


def test_without_rdkit_the_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("rdkit"):
            raise ImportError
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    molecules.rdkit.cache_clear()
    with pytest.raises(UsageError, match=r"manyheads\[chem\]"):
        smiles_to_graph("C")


def test_bad_rows_by_policy(caplog):
    with pytest.raises(DataError, match="SMILES, row 1: not a SMILES: 'xx', and 1 more rows are bad"):
        convert(["CC", "xx", "CO", None], "ogb")
    found = convert(["CC", "xx", "CO", None], "ogb", "skip")
    assert found.rows.tolist() == [0, 2]
    assert [row for row, _ in found.bad] == [1, 3]
    assert "row 1: not a SMILES: 'xx'; 2 of 4 rows are left out" in caplog.text
    with pytest.raises(DataError, match="no row has a molecule"):
        convert(["xx"], "ogb", "skip")
    with pytest.raises(DataError, match="there are no rows"):
        convert([], "ogb")


def test_what_was_converted_is_kept(tmp_path, monkeypatch):
    smiles = ["CC", "xx", "CO"]
    first = convert(smiles, "ogb", "skip", tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(conversion, "smiles_to_graph", None)  # not asked again
    second = convert(smiles, "ogb", "skip", tmp_path)
    assert second.bad == first.bad
    assert torch.equal(second.rows, first.rows)
    for name in ("x", "edge_index", "edge_attr", "nodes", "edges"):
        assert torch.equal(getattr(second.graphs, name), getattr(first.graphs, name))
    with pytest.raises(DataError, match="row 1"):
        convert(smiles, "ogb", "error", tmp_path)
    with pytest.raises(TypeError):  # other rows, other features
        convert(["CC"], "ogb", "skip", tmp_path)
    with pytest.raises(TypeError):
        convert(smiles, "zinc", "skip", tmp_path)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(TypeError):  # cut off: it is converted again
        convert(smiles, "ogb", "skip", tmp_path)


def test_atoms_keep_the_order_of_the_smiles():
    for smiles in MANY:
        wanted = [atom.GetAtomicNum() for atom in Chem.MolFromSmiles(smiles).GetAtoms()]
        assert ((smiles_to_graph(smiles).x[:, 0] + 1) % 119).tolist() == wanted

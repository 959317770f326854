"""From SMILES to graphs, by rdkit: atoms are nodes in the order of the SMILES, each bond two edges.

Two ways to number atoms and bonds, `features`:
- "zinc": one atom type of the 28 below, and one bond type of none, single, double, triple; rings are written
  with single and double bonds. The types are those that published models of ZINC tell apart; their order
  is our own, the most frequent first.
- "ogb": nine columns of an atom and three of a bond (Hu et al. 2020, arXiv 2005.00687); what a column does
  not list is its last number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from manyheads.core.errors import BadRecord, UsageError

Features: TypeAlias = Literal["zinc", "ogb"]
FEATURES = ("zinc", "ogb")
MOST_ATOMS = 1024
MOST_CHARACTERS = 10_000  # of a SMILES; it is parsed before its atoms can be counted

# Element, hydrogens where a SMILES has to name them (charged, chiral or unusual atoms), charge. The first
# twenty occur in the JTNN lists of ZINC, by frequency.
ZINC_ATOMS = (
    "C", "N", "O", "C H1", "S", "F", "Cl", "N H1 +", "O -", "N H2 +", "Br", "N +", "N H3 +", "N -",
    "I", "S -", "P", "N H1 -", "O +", "O H1 +", "S +", "P H1", "P H2", "C H2 -", "P +", "S H1 +", "C H1 -",
    "P H1 +",
)  # fmt: skip
ZINC_BONDS = ("NONE", "SINGLE", "DOUBLE", "TRIPLE")

_CHIRAL = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER")
_HYBRID = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
_BOND = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
_STEREO = ("STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY")
# Categories of each column, the last one for all that is not listed; of stereo and the yes-or-no columns
# every value is listed.
OGB_ATOMS = (119, len(_CHIRAL) + 1, 12, 12, 10, 6, len(_HYBRID) + 1, 2, 2)
OGB_BONDS = (len(_BOND) + 1, len(_STEREO), 2)


class Molecule(NamedTuple):
    """One graph.

    Shape:
        x int64 `[n]` ("zinc") or `[n, 9]` ("ogb"); edge_index int64 `[2, e]`, a bond's two directions one
        after the other; edge_attr int64 `[e]` or `[e, 3]`.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor


def types(features: Features) -> tuple[list[int], list[int]]:
    """Return the categories of each column of atoms and of bonds.

    Raises:
        UsageError: No such features.
    """
    known: dict[str, tuple[list[int], list[int]]] = {
        "zinc": ([len(ZINC_ATOMS)], [len(ZINC_BONDS)]),
        "ogb": (list(OGB_ATOMS), list(OGB_BONDS)),
    }
    if features not in known:
        raise UsageError(f"molecules: no features {features!r} (there are {', '.join(FEATURES)})")
    return known[features]


def smiles_to_graph(smiles: object, features: Features = "ogb") -> Molecule:
    """Return the graph of a SMILES.

    Args:
        smiles: One molecule, or several with dots between; hydrogens stay with their atoms.
        features: "zinc" or "ogb".

    Raises:
        BadRecord: It is no SMILES, describes no possible molecule, is too large, or has an atom or a bond
            that "zinc" does not know; says which.
        UsageError: No such features, or rdkit is not installed.

    Example:
        >>> smiles_to_graph("CO", "zinc").x
        tensor([0, 2])
    """
    types(features)
    molecule = parse(smiles)
    return _zinc(molecule) if features == "zinc" else _ogb(molecule)


def parse(smiles: object) -> Any:
    """Return rdkit's molecule of a SMILES; raises as `smiles_to_graph`."""
    if not isinstance(smiles, str) or not (text := smiles.strip()):
        raise BadRecord("no SMILES")
    if len(text) > MOST_CHARACTERS:
        raise BadRecord(f"a SMILES of {len(text)} characters is too large (at most {MOST_CHARACTERS})")
    if len(text.split()) > 1:
        raise BadRecord(f"not a SMILES, it has a blank in it: {_short(text)}")
    chem = rdkit()
    molecule = chem.MolFromSmiles(text)
    if molecule is None:
        raise BadRecord(_reason(chem, text))
    if not (atoms := molecule.GetNumAtoms()):
        raise BadRecord("a SMILES without atoms")
    if atoms > MOST_ATOMS:
        raise BadRecord(f"a molecule of {atoms} atoms is too large (at most {MOST_ATOMS})")
    return molecule


@lru_cache(maxsize=1)
def rdkit() -> ModuleType:
    """Return `rdkit.Chem`, which keeps its remarks to itself.

    Raises:
        UsageError: It is not installed.
    """
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise UsageError("SMILES are read by rdkit: pip install 'manyheads[chem]'") from None
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    return Chem


def _reason(chem: Any, text: str) -> str:
    """Say why rdkit refuses a SMILES."""
    molecule = chem.MolFromSmiles(text, sanitize=False)
    if molecule is None:
        return f"not a SMILES: {_short(text)}"
    problems = chem.DetectChemistryProblems(molecule)
    why = problems[0].Message().strip() if problems else "rdkit cannot make sense of it"
    return f"not a molecule: {_short(text)}: {why}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def zinc_atom(atom: Any) -> str:
    """Name an atom as the list above does, however its SMILES writes it."""
    chem = rdkit()
    charge, hydrogens = atom.GetFormalCharge(), atom.GetTotalNumHs()
    named = (
        charge
        or atom.GetChiralTag() != chem.ChiralType.CHI_UNSPECIFIED
        or atom.GetTotalValence() > chem.GetPeriodicTable().GetDefaultValence(atom.GetAtomicNum())
    )
    parts = [atom.GetSymbol()]
    parts += [f"H{hydrogens}"] if named and hydrogens else []
    parts += [("+" if charge > 0 else "-") * abs(charge)] if charge else []
    return " ".join(parts)


def _zinc(molecule: Any) -> Molecule:
    rdkit().Kekulize(molecule, clearAromaticFlags=True)
    atoms, bonds = _numbers(ZINC_ATOMS), _numbers(ZINC_BONDS)
    rows = []
    for atom in molecule.GetAtoms():
        name = zinc_atom(atom)
        if name not in atoms:
            raise BadRecord(
                f"atom {name!r} is none of the 28 that features 'zinc' knows; 'ogb' has every atom"
            )
        rows.append(atoms[name])

    def bond_type(bond: Any) -> int:
        name = str(bond.GetBondType())
        if name not in bonds:
            raise BadRecord(f"a bond {name!r} is none of those that features 'zinc' knows")
        return bonds[name]

    edge_index, edge_attr = _bonds(molecule, bond_type, ())
    return Molecule(torch.tensor(rows), edge_index, edge_attr)


def _ogb(molecule: Any) -> Molecule:
    chiral, hybrid, kinds, stereo = _ogb_numbers()
    rows = [
        (
            (atom.GetAtomicNum() - 1) % 119,  # atom 0, any atom, is the last
            chiral.get(atom.GetChiralTag(), len(chiral)),
            min(atom.GetTotalDegree(), 11),
            atom.GetFormalCharge() + 5 if abs(atom.GetFormalCharge()) <= 5 else 11,
            min(atom.GetTotalNumHs(), 9),
            min(atom.GetNumRadicalElectrons(), 5),
            hybrid.get(atom.GetHybridization(), len(hybrid)),
            int(atom.GetIsAromatic()),
            int(atom.IsInRing()),
        )
        for atom in molecule.GetAtoms()
    ]

    def bond_type(bond: Any) -> tuple[int, int, int]:
        return (
            kinds.get(bond.GetBondType(), len(kinds)),
            # rdkit knows two more, of hindered rotation: to the published list they are none
            stereo.get(bond.GetStereo(), 0),
            int(bond.GetIsConjugated()),
        )

    edge_index, edge_attr = _bonds(molecule, bond_type, (len(OGB_BONDS),))
    return Molecule(torch.tensor(rows), edge_index, edge_attr)


def _bonds(
    molecule: Any, bond_type: Callable[[Any], object], width: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    pairs, rows = [], []
    for bond in molecule.GetBonds():
        first, second, row = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), bond_type(bond)
        pairs += [(first, second), (second, first)]
        rows += [row, row]
    edge_index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    return edge_index, torch.tensor(rows, dtype=torch.int64).reshape(-1, *width)


@lru_cache(maxsize=1)
def _ogb_numbers() -> list[dict[Any, int]]:
    """Numbers of rdkit's values: of chirality, hybridisation, bonds and stereo."""
    chem = rdkit()
    kinds = (chem.ChiralType, chem.HybridizationType, chem.BondType, chem.BondStereo)
    listed = (_CHIRAL, _HYBRID, _BOND, _STEREO)
    return [
        {kind.names[name]: i for i, name in enumerate(names)}
        for kind, names in zip(kinds, listed, strict=True)
    ]


@lru_cache
def _numbers(names: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}

"""Pictures of explanations: molecules with coloured atoms and bonds, and a node among its neighbours.

Colours are those of matplotlib's `RdBu` (what adds is blue, what takes away red) and `Greens`, which
colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

Floats: TypeAlias = NDArray[np.floating[Any]]
DPI = 130
SIDE = 900  # pixels of a drawn molecule
NOTED = 6  # atoms with their number written beside them, at most
_SIGNED, _WEIGHT = "RdBu", "Greens"
_LONGEST = 110  # letters of a line
_NAME = 9  # letters on a node
_MARGIN = 25  # pixels


@dataclass(frozen=True)
class Shown:
    """What is drawn of nodes and edges, and what it is called.

    Args:
        title, subtitle: Above the picture.
        nodes: A number of each node, its sign told by colour; None for none.
        edges: A number of each edge.
        signed: Whether the edges' numbers are attributions too, and not weights.
        node_label, edge_label: Of the colour bars.
        names: The nodes' names, to be written on them.
    """

    title: str
    subtitle: str
    nodes: Floats | None = None
    edges: Floats | None = None
    signed: bool = False
    node_label: str = "attribution of the atom"
    edge_label: str = "attention along the bond"
    names: Sequence[str] = field(default=())


def draw_molecule(molecule: Any, shown: Shown, path: Path) -> None:
    """Draw a molecule.

    Args:
        molecule: As rdkit has it.
        shown: Numbers of its atoms, and of its bonds in rdkit's order.
        path: The picture to write, by its ending.
    """
    molecule_figure(molecule, shown).savefig(path, dpi=DPI)


def molecule_figure(molecule: Any, shown: Shown) -> Figure:
    """Return the figure of `draw_molecule`."""
    from matplotlib.image import imread

    norms = _norms(shown)
    pixels = _cropped(imread(io.BytesIO(_png(molecule, shown, norms))))
    figure, axis = _figure(6.4, 6.4 * pixels.shape[0] / pixels.shape[1], shown, norms)
    axis.imshow(pixels, interpolation="lanczos")
    return figure


def _cropped(pixels: Floats) -> Floats:
    """Cut white margins off, as far as what is left is not too small to have a title."""
    ink = np.asarray((pixels[..., :3] < 1).any(-1))
    found = []
    for axis, least in ((1, SIDE // 3), (0, SIDE * 2 // 3)):
        places = np.flatnonzero(ink.max(axis))
        low, high = int(places[0]) - _MARGIN, int(places[-1]) + _MARGIN
        more = max(0, least - (high - low))
        low, high = low - more // 2, high + more // 2
        found.append(slice(max(0, low), min(high, ink.shape[1 - axis])))
    return pixels[found[0], found[1]]


def _png(molecule: Any, shown: Shown, norms: tuple[Normalize | None, Normalize | None]) -> bytes:
    from rdkit.Chem import Draw, rdDepictor
    from rdkit.Chem.Draw import rdMolDraw2D

    molecule = Draw.rdMolDraw2D.PrepareMolForDrawing(molecule, kekulize=True)
    rdDepictor.StraightenDepiction(molecule)
    atoms = list(range(molecule.GetNumAtoms())) if shown.nodes is not None else []
    bonds = list(range(molecule.GetNumBonds())) if shown.edges is not None else []
    signed, weight = _map(_SIGNED), _map(_SIGNED if shown.signed else _WEIGHT)
    colours = {i: tuple(signed(norms[0](shown.nodes[i]))[:3]) for i in atoms}  # type: ignore[index,misc]
    lines = {i: tuple(weight(norms[1](shown.edges[i]))[:3]) for i in bonds}  # type: ignore[index,misc]
    if shown.nodes is not None:
        _note(molecule, shown.nodes)
    canvas = rdMolDraw2D.MolDraw2DCairo(SIDE, SIDE * 2 // 3)
    options: Any = canvas.drawOptions()
    options.useBWAtomPalette()
    options.bondLineWidth, options.highlightBondWidthMultiplier = 2, 14
    options.fixedBondLength, options.padding, options.annotationFontScale = 70, 0.08, 0.55
    options.continuousHighlight, options.circleAtoms, options.atomHighlightsAreCircles = False, True, True
    canvas.DrawMolecule(
        molecule,
        highlightAtoms=atoms,
        highlightAtomColors=colours,
        highlightAtomRadii=dict.fromkeys(atoms, 0.36),
        highlightBonds=bonds,
        highlightBondColors=lines,
    )
    canvas.FinishDrawing()
    return bytes(canvas.GetDrawingText())


def _note(molecule: Any, numbers: Floats) -> None:
    """Write the largest numbers beside their atoms."""
    largest = np.abs(numbers).max(initial=0)
    for i in np.argsort(-np.abs(numbers), kind="stable")[:NOTED]:
        if abs(numbers[i]) > 0.3 * largest:
            molecule.GetAtomWithIdx(int(i)).SetProp("atomNote", f"{numbers[i]:+.2g}")


def draw_graph(edge_index: NDArray[np.integer[Any]], about: Sequence[int], shown: Shown, path: Path) -> None:
    """Draw a graph, or a part of one: nodes that are near by edges lie near each other.

    Args:
        edge_index: Edges; each pair of nodes once.
        about: The nodes that it is about, with a ring around them.
        shown: Numbers of all nodes and edges.
        path: The picture to write, by its ending.

    Shape:
        edge_index `[2, E]`.
    """
    graph_figure(edge_index, about, shown).savefig(path, dpi=DPI)


def graph_figure(edge_index: NDArray[np.integer[Any]], about: Sequence[int], shown: Shown) -> Figure:
    """Return the figure of `draw_graph`."""
    from matplotlib.collections import LineCollection

    norms = _norms(shown, rooted=True)
    figure, axis = _figure(7.2, 6.4, shown, norms)
    count = len(shown.names)
    places = layout(edge_index, count)
    lines: dict[str, Any] = {"colors": "0.75", "linewidths": 1.0}
    if shown.edges is not None and norms[1] is not None:
        depth = np.asarray(norms[1](shown.edges))
        lines["colors"] = _map(_SIGNED if shown.signed else _WEIGHT)(depth)
        lines["linewidths"] = 1.0 + 4.0 * np.abs(2 * depth - 1 if shown.signed else depth)
        order = np.argsort(lines["linewidths"], kind="stable")
        edge_index = edge_index[:, order]
        lines = {key: value[order] for key, value in lines.items()}
    axis.add_collection(LineCollection(list(places[edge_index.T]), zorder=1, **lines))
    colours = "0.9" if shown.nodes is None or norms[0] is None else _map(_SIGNED)(norms[0](shown.nodes))
    size = float(np.clip(9000 / max(count, 1), 120, 520))
    rings = np.where(np.isin(np.arange(count), list(about)), 2.5, 0.6)
    x, y = places.T
    axis.scatter(x, y, size, colours, edgecolors="black", linewidths=rings.tolist(), zorder=2)
    for left, up, name in zip(x, y, shown.names, strict=True):
        text = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
        axis.text(left, up, text, ha="center", va="center", fontsize=6.5, zorder=3, parse_math=False)
    axis.margins(0.08)
    axis.set_aspect("equal")
    return figure


def layout(edge_index: NDArray[np.integer[Any]], nodes: int, rounds: int = 200) -> Floats:
    """Lay nodes out so that distances in the plane are like steps along edges (stress majorization).

    Shape:
        edge_index `[2, E]`; the result `[nodes, 2]`.

    Source:
        Gansner, Koren and North 2004, Graph Drawing by Stress Majorization.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import shortest_path

    angle = np.arange(nodes) * 2.399963  # the golden angle: no two nodes begin at one place
    places = np.sqrt(np.arange(nodes) + 0.5)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    ones = np.ones(edge_index.shape[1])
    links = coo_array((ones, edge_index), shape=(nodes, nodes)).tocsr()
    steps = shortest_path(links, directed=False, unweighted=True)
    finite = np.isfinite(steps)
    steps = np.where(finite, steps, steps[finite].max(initial=0) + 1)
    weights = 1 / np.maximum(steps, 1) ** 2
    np.fill_diagonal(weights, 0)
    inverse = np.linalg.pinv(np.diag(weights.sum(1)) - weights)
    for _ in range(rounds):
        apart = np.linalg.norm(places[:, None] - places, axis=-1)
        ratio = weights * steps / np.maximum(apart, 1e-9)
        places = inverse @ (ratio.sum(1)[:, None] * places - ratio @ places)
    return places


def _norms(shown: Shown, rooted: bool = False) -> tuple[Normalize | None, Normalize | None]:
    """How numbers become colours: attributions about zero, weights from zero.

    Args:
        shown: The numbers.
        rooted: Take attributions by their roots: a node's own is so much larger than its neighbours'.
    """
    from matplotlib.colors import FuncNorm, Normalize

    def about_zero(numbers: Floats) -> Normalize:
        largest = float(np.abs(numbers).max(initial=0)) or 1.0
        if rooted:
            root = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2)
            return FuncNorm(root, -largest, largest)
        return Normalize(-largest, largest)

    nodes = None if shown.nodes is None else about_zero(shown.nodes)
    if shown.edges is None:
        return nodes, None
    if shown.signed:
        return nodes, about_zero(shown.edges)
    return nodes, Normalize(0, float(shown.edges.max(initial=0)) or 1.0)


def _figure(
    width: float, height: float, shown: Shown, norms: tuple[Normalize | None, Normalize | None]
) -> tuple[Figure, Axes]:
    """A figure with titles and colour bars, and the axis to draw on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width + 0.9 * sum(n is not None for n in norms), height + 0.8))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_title(f"{_short(shown.title)}\n", loc="left", fontsize=10.5, parse_math=False)
    axis.text(
        0, 1.01, _short(shown.subtitle), transform=axis.transAxes, fontsize=8.5, color="0.3", parse_math=False
    )
    maps = (_SIGNED, _SIGNED if shown.signed else _WEIGHT)
    for norm, colours, label in zip(norms, maps, (shown.node_label, shown.edge_label), strict=True):
        if norm is not None:
            bar = figure.colorbar(ScalarMappable(norm, _map(colours)), ax=axis, shrink=0.9, aspect=25)
            bar.set_label(label, fontsize=9)
            bar.ax.tick_params(labelsize=8)
    return figure, axis


def _map(name: str) -> Colormap:
    """A map of colours without its darkest ends: black letters stay readable on it."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    ends = (0.1, 0.9) if name == _SIGNED else (0.05, 0.8)
    return ListedColormap(colormaps[name](np.linspace(*ends, 256)))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"

"""The tools of the page, one a task: what a visitor gives, and how the rows are shown."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.apps.serving.payload import Blobs, Csv, Graph, Served, Table
from manyheads.core import hub

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.apps.serving.page import Ask, Found

CLASSES = 5  # bars of a picture's likeliest classes
VOICES = 4  # players of separated speakers
SHOWN = 12  # series that a picture of forecasts holds
DIGITS = 4  # behind the point
PAST = 3  # times the horizon, of the history in such a picture
CARD = "display:inline-block;vertical-align:top;width:260px;background:#fff;border-radius:8px;margin:4px"
CAPTION = "padding:0 8px 6px;color:#374151;font-size:12px;overflow-wrap:anywhere"
HEIGHT = 320  # of a picture that is given, in pixels: a small one is not to become a strip


def build(served: Served, ask: Ask) -> None:
    """Make the tool of a model, in the page that is open."""
    tools = {
        ("vision", "classification"): images,
        ("timeseries", "forecast"): series,
        ("speech", "recognition"): transcript,
        ("speech", "separation"): voices,
        ("recsys", "recommendation"): history,
    }
    if served.domain == "graph":
        preprocessing = hub.read_config(served.folder).preprocessing
        (molecules if preprocessing.get("input") == "smiles" else network)(ask)
        return
    tools.get((served.domain, served.task), table)(ask)


def images(ask: Ask) -> None:
    """A picture: its likeliest classes as bars, and what the model looks at."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            given = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard", "webcam"], height=HEIGHT
            )
            button = gr.Button("Classify", variant="primary")
        with gr.Column():
            bars = gr.Label(label="Classes", num_top_classes=CLASSES)
            seen = gr.Image(label="What it looks at", interactive=False, buttons=["download", "fullscreen"])

    async def run(path: str | None) -> tuple[dict[str, float], Any]:
        found = await ask(_blob("images", "image", path, "a picture"), {"top_k": CLASSES}, picture=True)
        return _chances(found), _picture(found)

    button.click(run, given, [bars, seen], api_visibility="private")


def _chances(found: Found) -> dict[str, float]:
    """The classes of the first row with their probabilities: `label`, `label_2`, and so on."""
    row = found["rows"][0] if found["rows"] else {}
    names = [name for name in row if name == "label" or name.startswith("label_")]
    return {
        str(row[name]): row[name.replace("label", "probability")] for name in names if row[name] is not None
    }


def _picture(found: Found) -> Any:
    from PIL import Image

    content = found.get("files", {}).get("explanation.png")
    return None if content is None else Image.open(io.BytesIO(base64.b64decode(content)))


def series(ask: Ask) -> None:
    """A CSV of series: their forecasts, drawn behind their past, and as a table."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1):
            gr.Markdown("Series as a CSV: `unique_id, ds, y`, or a date column and a column a series.")
            given = gr.File(label="CSV", file_types=[".csv"])
            button = gr.Button("Forecast", variant="primary")
        with gr.Column(scale=2):
            plot = gr.Plot(label="Forecasts", show_label=False)
    rows = gr.Dataframe(label="Rows", interactive=False, max_height=320)

    async def run(path: str | None) -> tuple[Any, pd.DataFrame]:
        content = _content(path, "a CSV file")
        found = await ask(Csv("csv", content))
        frame = _frame(found)
        return _fan(content, frame), frame

    button.click(run, given, [plot, rows], api_visibility="private")


def _fan(content: bytes, forecasts: pd.DataFrame) -> Any:
    """Draw each series' last steps, its forecast, and the bands between pairs of quantiles."""
    import pandas as pd
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    past = _long(pd.read_csv(io.BytesIO(content)))
    names = list(forecasts["unique_id"].unique())[:SHOWN]
    alike = forecasts.groupby("unique_id")["ds"].agg(tuple).nunique() == 1
    figure = Figure(figsize=(8, 1.7 * len(names) + 0.6), layout="constrained")
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=alike)[:, 0]
    names_of = [str(column) for column in forecasts if str(column).startswith("yhat_q")]
    quantiles = sorted((float(name.removeprefix("yhat_q")), name) for name in names_of)
    pairs = [pair for pair in zip(quantiles, reversed(quantiles), strict=True) if pair[0] < pair[1]]
    for axis, name in zip(axes, names, strict=True):
        ahead = forecasts[forecasts["unique_id"] == name]
        when = pd.to_datetime(ahead["ds"], errors="coerce")
        if past is not None:
            own = past[past["unique_id"].astype(str) == str(name)].tail(PAST * len(ahead))
            before = pd.to_datetime(own["ds"], errors="coerce")
            axis.plot(before, own["y"], color="#6b7280", linewidth=1, label="past")
        for i, ((a, low), (b, high)) in enumerate(pairs):  # the widest and lightest first
            shade = _shade(0.2 + 0.4 * i / len(pairs))
            told = f"{a:g} to {b:g}"
            axis.fill_between(when, ahead[low], ahead[high], color=shade, linewidth=0, label=told)
        axis.plot(when, ahead["yhat"], color="#4f46e5", linewidth=1.6, label="forecast")
        axis.set_title(str(name), fontsize=11, loc="left")
        locator = AutoDateLocator(maxticks=7)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _shade(strength: float) -> tuple[float, float, float]:
    """The forecast's colour, mixed with white."""
    return 1 - 0.61 * strength, 1 - 0.6 * strength, 1 - 0.05 * strength


def _long(frame: pd.DataFrame) -> pd.DataFrame | None:
    """A table as `unique_id, ds, y`; None where it has another form."""
    if {"unique_id", "ds", "y"} <= set(frame.columns):
        return frame[["unique_id", "ds", "y"]].dropna()
    first, *others = frame.columns
    if not others:
        return None
    long = frame.melt(id_vars=first, value_vars=others, var_name="unique_id", value_name="y")
    return long.rename(columns={first: "ds"})[["unique_id", "ds", "y"]].dropna()


def transcript(ask: Ask) -> None:
    """A recording: its text, with times, and subtitles."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            given = _audio("Recording")
            how = gr.Radio(["silero", "energy", "none"], value="energy", label="How speech is found")
            button = gr.Button("Transcribe", variant="primary")
        with gr.Column():
            text = gr.Textbox(label="Text", lines=4, interactive=False)
            subtitles = gr.Textbox(label="Subtitles (SRT)", lines=6, interactive=False)
    rows = gr.Dataframe(label="Segments", interactive=False, max_height=320)

    async def run(path: str | None, vad: str) -> tuple[str, str, pd.DataFrame]:
        settings: dict[str, str | int] = {"vad": vad, "subtitles": "srt"}
        found = await ask(_blob("recordings", "audio", path, "a recording"), settings)
        frame = _frame(found)
        kept = frame[[name for name in ("start_ms", "end_ms", "text") if name in frame]]
        made = [base64.b64decode(each).decode() for each in found.get("files", {}).values()]
        return " ".join(str(each) for each in kept.get("text", [])), "\n".join(made), kept

    button.click(run, [given, how], [text, subtitles, rows], api_visibility="private")


def _audio(label: str) -> Any:
    import gradio as gr

    return gr.Audio(label=label, type="filepath", sources=["upload", "microphone"], buttons=["download"])


def voices(ask: Ask) -> None:
    """A mixture: a player for each speaker."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            given = _audio("Mixture")
            button = gr.Button("Separate", variant="primary")
        with gr.Column():
            players = [
                gr.Audio(label=f"Speaker {i + 1}", visible=i < 2, buttons=["download"]) for i in range(VOICES)
            ]

    async def run(path: str | None) -> list[Any]:
        import soundfile

        found = await ask(_blob("recordings", "audio", path, "a recording"))
        heard = []
        for name, content in sorted(found.get("files", {}).items())[:VOICES]:
            samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="int16")
            heard.append(gr.Audio(value=(rate, samples), label=Path(name).stem, visible=True))
        return heard + [gr.Audio(visible=False)] * (VOICES - len(heard))

    button.click(run, given, players, api_visibility="private")


def molecules(ask: Ask) -> None:
    """SMILES, one a line: the predictions, and the drawings."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            given = gr.Textbox(label="SMILES, one a line", lines=4, placeholder="CCO")
            button = gr.Button("Predict", variant="primary")
            rows = gr.Dataframe(label="Predictions", interactive=False, max_height=320)
        with gr.Column():
            drawn = gr.HTML(label="Drawings")

    async def run(text: str | None) -> tuple[pd.DataFrame, str]:
        smiles = [line.strip() for line in (text or "").splitlines() if line.strip()]
        _need(smiles, "a SMILES")
        found = await ask(Table("smiles", {"smiles": list(smiles), "id": list(smiles)}))
        good = [str(row["id"]) for row in found["rows"]]
        frame = _frame(found).rename(columns={"id": "SMILES"})
        last = sorted(frame, key=lambda name: name == "SMILES")  # long: a narrow window shows what is first
        return frame[last], "".join(_drawing(each) for each in good[:SHOWN])

    button.click(run, given, [rows, drawn], api_visibility="private")


def _drawing(smiles: str) -> str:
    """A molecule as SVG, on a light ground, with its SMILES below."""
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or molecule.GetNumAtoms() > 200:
        return ""
    drawer = rdMolDraw2D.MolDraw2DSVG(260, 200)
    drawer.DrawMolecule(molecule)
    drawer.FinishDrawing()
    svg = drawer.GetDrawingText().partition("?>")[2] or drawer.GetDrawingText()
    told = f'<div style="{CAPTION}">{html.escape(smiles)}</div>'
    return f'<div style="{CARD}">{svg}{told}</div>'


def network(ask: Ask) -> None:
    """A graph as two tables, of nodes and of edges: a row a node, a graph or a pair."""
    import gradio as gr

    with gr.Row():
        nodes = gr.File(label="Nodes (CSV)", file_types=[".csv"])
        edges = gr.File(label="Edges (CSV)", file_types=[".csv"])
    button = gr.Button("Predict", variant="primary")
    rows = gr.Dataframe(label="Rows", interactive=False, max_height=420)

    async def run(first: str | None, second: str | None) -> pd.DataFrame:
        tables = [
            _columns(_content(each, f"a table of {what}"))
            for each, what in ((first, "nodes"), (second, "edges"))
        ]
        return _frame(await ask(Graph("nodes", *tables)))

    button.click(run, [nodes, edges], rows, api_visibility="private")


def _columns(content: bytes) -> dict[str, list[Any]]:
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(content))
    empty = frame.isna()
    return {
        str(name): [
            None if gap else cell for cell, gap in zip(frame[name].tolist(), empty[name], strict=True)
        ]
        for name in frame.columns
    }


def history(ask: Ask) -> None:
    """What was chosen so far, oldest first: what comes next."""
    import gradio as gr

    with gr.Row():
        with gr.Column():
            given = gr.Textbox(label="Items chosen so far, oldest first, one a line", lines=8)
            count = gr.Slider(1, 50, value=10, step=1, label="How many")
            button = gr.Button("Recommend", variant="primary")
        with gr.Column(scale=2):
            rows = gr.Dataframe(label="Recommendations", interactive=False, max_height=480)

    async def run(text: str | None, top_k: int) -> pd.DataFrame:
        items = [line.strip() for line in (text or "").splitlines() if line.strip()]
        _need(items, "an item")
        chosen = Table(
            "interactions",
            {"user_id": ["you"] * len(items), "item_id": list(items), "timestamp": list(range(len(items)))},
        )
        frame = _frame(await ask(chosen, {"top_k": int(top_k)}))
        return frame[[name for name in ("rank", "item_id", "score") if name in frame]]

    button.click(run, [given, count], rows, api_visibility="private")


def table(ask: Ask) -> None:
    """A CSV: its rows."""
    import gradio as gr

    given = gr.File(label="CSV", file_types=[".csv"])
    button = gr.Button("Predict", variant="primary")
    rows = gr.Dataframe(label="Rows", interactive=False, max_height=480)

    async def run(path: str | None) -> pd.DataFrame:
        return _frame(await ask(Csv("csv", _content(path, "a CSV file"))))

    button.click(run, given, rows, api_visibility="private")


def _need(given: Sequence[object] | str | None, what: str) -> None:
    import gradio as gr

    if not given:
        raise gr.Error(f"give {what} first", print_exception=False)


def _content(path: str | None, what: str) -> bytes:
    _need(path, what)
    return Path(str(path)).read_bytes()


def _blob(field: str, column: str, path: str | None, what: str) -> Blobs:
    content = _content(path, what)
    return Blobs(field, column, ((Path(str(path)).name[:200], content),))


def _frame(found: Found) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(found["rows"]).round(DIGITS)

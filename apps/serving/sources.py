"""From a request's payload to what a predictor takes as its source; runs in the workers.

Here stands what a request may hold beside the size of its body, and an example of a source for each domain,
by which a model is tried before it is called ready.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.apps.serving.payload import Blobs, Columns, Csv, Graph, Limits, Payload
from manyheads.core.errors import BadRecord, DataError, ManyheadsError
from manyheads.core.predictor import AnyPredictor, Bad

if TYPE_CHECKING:
    import pandas as pd


TOGETHER = 4  # times the pixels of one image: those of all images of a request


def source_of(payload: Payload, predictor: AnyPredictor, domain: str, folder: Callable[[], Path]) -> object:
    """Return the source of a request.

    Args:
        payload: What came.
        predictor: Whose source.
        domain: Its domain.
        folder: Makes an empty one, for files where the predictor reads files.
    """
    import pandas as pd

    if isinstance(payload, Csv):
        path = folder() / "input.csv"
        path.write_bytes(payload.content)
        return path
    if isinstance(payload, Graph):
        graph = folder() / "graph"  # which is its id
        graph.mkdir()
        for name in ("nodes", "edges", "pairs"):
            columns: Columns | None = getattr(payload, name)
            if columns is not None:
                pd.DataFrame(columns).to_csv(graph / f"{name}.csv", index=False)
        return graph
    if isinstance(payload, Blobs):
        ids, contents = zip(*payload.items, strict=True)
        return pd.DataFrame({"id": ids, payload.column: pd.Series(contents, dtype=object)})
    return pd.DataFrame(payload.columns).rename(columns=_names(predictor, domain))


def _names(predictor: Any, domain: str) -> dict[str, str]:
    """What the columns of a request are called in the model's own tables."""
    if domain == "graph":
        return {"smiles": predictor.options.smiles_column, "id": predictor.options.id_column}
    if domain == "recsys":
        of = predictor.preprocessing.columns
        return {"user_id": of.user, "item_id": of.item, "timestamp": of.timestamp or "timestamp"}
    return {}


def screen(payload: Payload, limits: Limits) -> tuple[Payload, list[Bad]]:
    """Set aside images and recordings that are larger than a request may hold; headers alone are read.

    Raises:
        DataError: All images together are too large, or all recordings too long.
    """
    if not isinstance(payload, Blobs):
        return payload, []
    check: Callable[[bytes], None] = _Seconds(limits.seconds)
    if payload.column == "image":
        check = _Pixels(limits.pixels)
    good, bad = [], []
    for id, content in payload.items:
        try:
            check(content)
            good.append((id, content))
        except BadRecord as error:
            bad.append(Bad(id, str(error)))
    return Blobs(payload.field, payload.column, tuple(good)), bad


class _Pixels:
    """Refuses images with more pixels than allowed, each or all together, before any is decoded."""

    def __init__(self, most: int) -> None:
        self.most, self.sum = most, 0

    def __call__(self, content: bytes) -> None:
        from PIL import Image

        from manyheads.vision.images import FORMATS

        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            raise BadRecord(f"too many pixels: at most {self.most:,}") from None
        except Exception:  # the domain's own reader says what is wrong with it
            return
        if width * height > self.most:
            raise BadRecord(f"too many pixels: {width} x {height}, at most {self.most:,}")
        self.sum += width * height
        if self.sum > TOGETHER * self.most:
            raise DataError(f"the images have too many pixels: at most {TOGETHER * self.most:,} a request")


class _Seconds:
    """Refuses recordings that are longer, all together, than allowed."""

    def __init__(self, most: float) -> None:
        self.most, self.sum = most, 0.0

    def __call__(self, content: bytes) -> None:
        from manyheads.speech.audio import inspect

        seconds = inspect(content).seconds
        self.sum += seconds
        if seconds > self.most:
            raise BadRecord(f"too long: {seconds:.1f} s, at most {self.most:g} s a request")
        if self.sum > self.most:
            raise DataError(f"the recordings are too long together: at most {self.most:g} s a request")


def example(predictor: AnyPredictor, domain: str) -> pd.DataFrame:
    """Return a source of one record that a model can predict.

    Raises:
        DataError: None can be made up, as of a model whose categories are not known here.
    """
    try:
        return _EXAMPLES[domain](predictor)
    except ManyheadsError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"no example of a source can be made up ({type(error).__name__})") from error


def _image(predictor: Any) -> pd.DataFrame:
    import pandas as pd
    from PIL import Image

    height, width = predictor.preprocessing.size
    content = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(content, "JPEG")
    return pd.DataFrame({"image": [content.getvalue()]})


def _series(predictor: Any) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    if isinstance(getattr(predictor, "channels", None), tuple):  # classifies
        waves = {name: np.sin(np.arange(predictor.seq_len)) for name in predictor.channels}
        return pd.DataFrame({predictor.id_column or "unique_id": "example", **waves})
    of = predictor.preprocessing
    covariates = of.treatment.covariates
    if covariates.past.columns or covariates.future.columns or covariates.static.columns:
        raise DataError("no example of a source with covariates can be made up")
    times = pd.date_range("2020-01-01", periods=of.seq_len, freq=of.freq)
    waves = {name: np.sin(np.arange(of.seq_len)) for name in of.columns}
    return pd.DataFrame({of.time_column or "ds": times, **waves})


def _recording(predictor: Any) -> pd.DataFrame:
    import numpy as np
    import pandas as pd
    import soundfile

    content = io.BytesIO()
    noise = np.random.default_rng(0).normal(size=2 * predictor.sample_rate) / 10
    soundfile.write(content, noise, predictor.sample_rate, format="WAV", subtype="PCM_16")
    return pd.DataFrame({"audio": [content.getvalue()]})


def _molecule(predictor: Any) -> pd.DataFrame:
    import pandas as pd

    if predictor.preprocessing.input != "smiles":
        raise DataError("no example of a graph can be made up")
    return pd.DataFrame({predictor.options.smiles_column: ["CCO"], predictor.options.id_column: ["example"]})


def _history(predictor: Any) -> pd.DataFrame:
    import pandas as pd

    of, items = predictor.preprocessing.columns, predictor.ids.ids[:5]
    columns: dict[str, Any] = {of.user: "example", of.item: items}
    return pd.DataFrame(columns | ({of.timestamp: range(len(items))} if of.timestamp else {}))


_EXAMPLES: dict[str, Callable[[Any], pd.DataFrame]] = {
    "vision": _image,
    "timeseries": _series,
    "speech": _recording,
    "graph": _molecule,
    "recsys": _history,
}

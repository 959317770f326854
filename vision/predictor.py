"""Images in, labels or features out: what batch jobs and serving see. Torch only, no lightning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.core.predictor import Row
from manyheads.vision.containers import Data
from manyheads.vision.preprocessing import Preprocessing
from manyheads.vision.sources import Listing, list_images

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig

OutputKind: TypeAlias = Literal["label", "probabilities", "logits", "features"]
KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
TOP_K = 5
MOST_THREADS = 8


@dataclass(frozen=True)
class Record:
    """An image, not yet decoded; a file not yet read; or what is wrong with it."""

    id: str
    data: Data | BadRecord


class Shard:
    """A range of a listing; sent to another process it takes its own range alone."""

    def __init__(self, listing: Listing, start: int, stop: int) -> None:
        self.listing, self.start, self.stop = listing, start, stop

    def __reduce__(self) -> tuple[type[Shard], tuple[Listing, int, int]]:
        return Shard, (self.listing[self.start : self.stop], 0, self.stop - self.start)


@dataclass(frozen=True)
class Outputs:
    """What rows are made of.

    Args:
        labels: Names of the classes in the model's order.
        temperature: Divides the logits before they become probabilities.
        multi_label: Each label has a probability of its own (a sigmoid); else they sum to 1 (a softmax).
        kind: `label` (the top labels, each with its probability), or a list of numbers a row: `probabilities`
            or `logits` in the labels' order, or `features`, the pooled ones before the classifier.
        top_k: How many labels.

    Raises:
        DataError: What a model folder says does not fit.
        UsageError: The model has not got this kind, or so many labels.
    """

    labels: tuple[str, ...]
    temperature: float = 1.0
    multi_label: bool = False
    kind: OutputKind = "label"
    top_k: int = TOP_K

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise DataError(f"the model's preprocessing has temperature = {self.temperature}")
        if self.kind not in KINDS:
            close = did_you_mean(str(self.kind), KINDS)
            raise UsageError(f"no output kind {self.kind!r}{close} (kinds: {', '.join(KINDS)})")
        if self.kind != "features" and not self.labels:
            raise UsageError("the model has no classifier: --output-kind features is all that it gives")
        if self.kind == "label" and not 1 <= self.top_k <= len(self.labels):
            raise UsageError(f"--top-k {self.top_k}: the model has {len(self.labels)} labels")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a row and their Arrow types."""
        if self.kind != "label":
            return {"id": "string", self.kind: "list<float32>"}
        ends = ["", *(f"_{n}" for n in range(2, self.top_k + 1))]
        ranked = {f"{name}{end}": kind for end in ends for name, kind in _PAIR.items()}
        return {"id": "string", **ranked}

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities `[B, K]`, float64."""
        scaled = logits.double() / self.temperature
        return scaled.sigmoid() if self.multi_label else scaled.softmax(dim=-1)


_PAIR = {"label": "string", "probability": "float32"}


class Predictor:
    """Classifies images, or gives their features.

    A source is a folder, an image, a pattern, a CSV or parquet file with a column `image` (paths or bytes), a
    zip or tar archive, several of these, or a DataFrame; `sources` says more.

    Args:
        model: An image model with timm's interface.
        preprocessing: How images become its input.
        outputs: What rows are made of.
    """

    batch_size = 32
    shard_size = 1024  # a part file of some 50 KB; a job that is killed loses seconds

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, outputs: Outputs) -> None:
        self.model, self.preprocessing, self.outputs = model.eval(), preprocessing, outputs

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        A folder whose preprocessing is empty takes the numbers of the model's own `pretrained_cfg`.

        Raises:
            DataError: The folder's preprocessing or labels do not fit the model.
        """
        saved: Mapping[str, Any] = config.preprocessing
        own = getattr(model, "pretrained_cfg", None) or {}
        preprocessing = Preprocessing.from_json(saved) if saved else Preprocessing.from_timm(own)
        classes = int(cast(int, getattr(model, "num_classes", 0)))
        labels = config.labels or saved.get("labels") or [str(i) for i in range(classes)]
        if len(labels) != classes:
            raise DataError(f"the model folder has {len(labels)} labels, its model {classes} classes")
        return cls(
            model,
            preprocessing,
            Outputs(
                tuple(map(str, labels)),
                float(saved.get("temperature", 1.0)),
                bool(saved.get("multi_label", False)),
                "label" if classes else "features",
                min(TOP_K, classes),
            ),
        )

    @property
    def columns(self) -> Mapping[str, str]:
        """`id` and the output kind's columns: `label, probability, label_2 ...`, or a list of float32."""
        return self.outputs.columns

    @property
    def settings(self) -> dict[str, str | int]:
        """The output kind and, of labels, how many."""
        top_k = {"top_k": self.outputs.top_k} if self.outputs.kind == "label" else {}
        return {"output_kind": self.outputs.kind, **top_k}

    def configure(self, settings: core.Settings) -> Predictor:
        """Return this model's predictor with another output kind, or number of labels.

        Raises:
            UsageError: No such kind, or not so many labels.
        """
        kind = cast(OutputKind, settings.get("output_kind", self.outputs.kind))
        if "top_k" in settings and kind != "label":
            raise UsageError(f"--top-k goes with --output-kind label, not with {kind}")
        top_k = int(settings.get("top_k", self.outputs.top_k))
        of = self.outputs
        outputs = Outputs(of.labels, of.temperature, of.multi_label, kind, top_k)
        return Predictor(self.model, self.preprocessing, outputs)

    @property
    def prepare_threads(self) -> int:
        """PIL and numpy release Python's lock: as many as torch may use here."""
        return min(MOST_THREADS, torch.get_num_threads())

    def predict(
        self, source: core.Source, output_kind: OutputKind | None = None, top_k: int | None = None
    ) -> pd.DataFrame:
        """Predict a whole source in memory.

        Raises:
            DataError: What is wrong with the source or an image.
            UsageError: No such output kind, or not so many labels.

        Example:
            >>> manyheads.load("runs/cct/model").predict("photos", top_k=3)
        """
        asked = {"output_kind": output_kind, "top_k": top_k}
        settings = {name: value for name, value in asked.items() if value is not None}
        return core.predict(self.configure(settings) if settings else self, source)

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` images; none is opened.

        Raises:
            DataError: A table or archive cannot be used.
            UsageError: No such source.
        """
        listing = list_images(source)
        count = len(listing)
        return [Shard(listing, start, min(start + size, count)) for start in range(0, count, size)]

    def named_files(self, source: core.Source) -> Iterator[str]:
        """Yield the image files that a source's tables name."""
        return list_images(source).named_files()

    def read(self, shard: Shard) -> Iterator[Record]:
        """Stream a shard's images."""
        for ref, data in shard.listing.stream(shard.start, shard.stop):
            yield Record(ref.id, data)

    def prepare(self, record: Record) -> Tensor:
        """Decode an image and make the model's input of it.

        Shape:
            `[C, H, W]`.

        Raises:
            BadRecord: It cannot be used, and why.
        """
        if isinstance(record.data, BadRecord):
            raise record.data
        return self.preprocessing.load(record.data)

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        """Stack samples `[B, C, H, W]`."""
        return torch.stack(list(samples))

    def forward(self, batch: Tensor) -> Tensor:
        """Run the model.

        Shape:
            Logits `[B, K]`, or features `[B, D]`.
        """
        model: Any = self.model
        weight = next(model.parameters())
        with torch.inference_mode():
            batch = batch.to(weight.device, weight.dtype)
            if self.outputs.kind == "features":
                out = model.forward_head(model.forward_features(batch), pre_logits=True)
            else:
                out = model(batch)
        if out.ndim != 2:
            raise DataError(f"the model gives {tuple(out.shape)} a batch, not a row an image (global_pool?)")
        return cast(Tensor, out.float().cpu())

    def rows(self, outputs: Tensor, records: Sequence[Record]) -> list[Row]:
        """Make a row an image."""
        of = self.outputs
        if of.kind != "label":
            lists = of.probabilities(outputs).float() if of.kind == "probabilities" else outputs
            pairs = zip(records, lists.numpy(), strict=True)
            return [{"id": record.id, of.kind: values} for record, values in pairs]
        values, order = of.probabilities(outputs).sort(dim=-1, descending=True, stable=True)
        names, found = list(self.columns), []
        tops = zip(values[:, : of.top_k].tolist(), order[:, : of.top_k].tolist(), strict=True)
        for record, (top, classes) in zip(records, tops, strict=True):
            ranked = [each for k, p in zip(classes, top, strict=True) for each in (of.labels[k], p)]
            found.append(dict(zip(names, (record.id, *ranked), strict=True)))
        return found

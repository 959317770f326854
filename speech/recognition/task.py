"""Training and testing a recogniser: Paraformer's losses, error rates of greedy recognition."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core import optimization
from manyheads.core.catalog import builder, create_model, find
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer
from manyheads.core.start import load_weights
from manyheads.core.training import of_all
from manyheads.speech.models.paraformer import Paraformer, greedy
from manyheads.speech.models.paraformer_losses import Objective
from manyheads.speech.recognition.metrics import Normalizer, compare, normalize, total
from manyheads.speech.recognition.report import Tested

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.speech.recognition.data import RecognitionData
    from manyheads.speech.recognition.loading import UtteranceBatch

Plain = bool | int | float | str | None


class Recognizer(LightningModule):
    """Train a Paraformer, and measure it over whole splits.

    Logs of training and validation each loss (`train_loss`, `train_decoder`, `train_count`, `train_ctc`) and
    `train_accuracy`, the share of tokens that the first pass has right; of validation and test the character
    and word error rates `val_cer` and `val_wer` of greedy recognition. The best epoch is that of the lowest
    `val_cer`. A test logs beside them `test_substitutions`, `test_deletions` and `test_insertions` of
    characters, `test_characters` and `test_utterances`, and its report names the normaliser.

    Args:
        vocab_size: Units; the data say it.
        input_size: Channels of a row; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        objective: What is minimised.
        optimizer: AdamW, its rate by step, averaged weights.
        start: A model folder that training goes on from: its weights, units, mean and deviation.
        normalizer: What is done to both texts before errors are counted: none (beside what the data do for
            training) | basic (lower case, no punctuation, single spaces) | chinese (that, and no spaces).

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.vocab_size", "model.vocab_size", "instantiate"),
        ("data.input_size", "model.input_size", "instantiate"),
        ("model.start", "data.start", "parse"),
    )

    def __init__(
        self,
        vocab_size: int,
        input_size: int,
        name: str = "paraformer",
        arguments: dict[str, Plain] | None = None,
        objective: Objective = Objective(),  # noqa: B008  # frozen, as those below
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        start: str | None = None,
        normalizer: Normalizer = "none",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"name": name, "objective": asdict(objective), "optimizer": asdict(optimizer)}
        )
        self.name, self.objective, self.optimizer, self.normalizer = name, objective, optimizer, normalizer
        self.builder_arguments = _recipe(name, arguments or {}, vocab_size, input_size, objective.ctc > 0)
        model = create_model(name, **self.builder_arguments)
        if not isinstance(model, Paraformer):
            raise UsageError(f"{name} is not trained here: a Paraformer is")
        if start is not None:
            load_weights(model, name, start)
        self.model = model
        self._found: list[tuple[int, list[int]]] = []  # numbers of utterances, units
        self._measured: list[tuple[int, dict[str, float]]] = []  # of validation's batches
        self._tested: Tested | None = None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return "val_cer", "min"

    def training_step(self, batch: UtteranceBatch) -> Tensor:
        """Return the loss of a batch."""
        losses = self._losses(batch, self.objective)
        self._log_losses(losses, len(batch["lengths"]))
        return losses["loss"]

    def validation_step(self, batch: UtteranceBatch) -> None:
        """Recognise a batch; its losses are those of the first pass, to which nothing is shown."""
        losses = self._losses(batch, replace(self.objective, glancing=0.0))
        self._measured.append((len(batch["lengths"]), {key: float(value) for key, value in losses.items()}))
        self._recognise(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and the error rates of all utterances."""
        seen, self._measured = of_all(self.trainer, self._measured), []
        count = sum(size for size, _ in seen)
        means = {key: sum(size * losses[key] for size, losses in seen) / count for key in seen[0][1]}
        self.log_dict({f"val_{key}": value for key, value in means.items()})
        self.log_dict({f"val_{key}": value for key, value in self._errors()[0].items()}, prog_bar=True)

    def test_step(self, batch: UtteranceBatch) -> None:
        """Recognise a batch."""
        self._recognise(batch)

    def on_test_epoch_end(self) -> None:
        """Log the error rates and the errors of all utterances."""
        rates, self._tested = self._errors("test")
        edits = total(self._tested.characters)
        found = {
            **rates,
            "substitutions": float(edits.substitutions),
            "deletions": float(edits.deletions),
            "insertions": float(edits.insertions),
            "characters": float(edits.units),
            "utterances": float(len(self._tested.references)),
        }
        self.log_dict({f"test_{key}": value for key, value in found.items()})

    def report(self, folder: Path) -> list[str]:
        """Write the last test's texts, errors and picture into a folder.

        Returns:
            Lines to print.
        """
        assert self._tested is not None
        return self._tested.write(folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a schedule by step.

        Raises:
            UsageError: The run has no end that the schedule needs.
        """
        batches = len(self._data.train_dataloader())
        return optimization.configure(self.model, self.optimizer, optimization.NEVER, self.trainer, batches)

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights, if that is wanted."""
        return optimization.make_callbacks(self.optimizer, optimization.NEVER, self.trainer, self.monitor)

    def _losses(self, batch: UtteranceBatch, objective: Objective) -> dict[str, Tensor]:
        return self.model.losses(
            batch["features"], batch["lengths"], batch["text"], batch["text_lengths"], objective
        )

    def _log_losses(self, losses: dict[str, Tensor], size: int) -> None:
        values = {f"train_{key}": value.detach() for key, value in losses.items()}
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)

    def _recognise(self, batch: UtteranceBatch) -> None:
        """Keep what is recognised."""
        found = self.model.packed(batch["features"], batch["lengths"])
        self._found += zip(batch["index"].tolist(), greedy(found.logits, found.counts), strict=True)

    def _errors(self, part: Literal["val", "test"] = "val") -> tuple[dict[str, float], Tested]:
        """Compare all texts since the last call, of all processes."""
        found = sorted(of_all(self.trainer, self._found), key=lambda each: each[0])
        self._found = []
        data = self._data
        utterances = data.utterances[part]
        # What the units cannot write is an error, too: the true texts are those of the data, not their units.
        normalizer = data.normalizer if self.normalizer == "none" else self.normalizer
        references = [normalize(utterances.texts[index], normalizer) for index, _ in found]
        hypotheses = [normalize(data.vocabulary.text(ids), normalizer) for _, ids in found]
        ids = [utterances.ids[index] for index, _ in found]
        characters, words = (compare(references, hypotheses, by) for by in ("character", "word"))
        tested = Tested(
            ids, references, hypotheses, characters.edits, words.edits, characters.confused, normalizer
        )
        return {"cer": total(characters.edits).rate, "wer": total(words.edits).rate}, tested

    @property
    def _data(self) -> RecognitionData:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def _recipe(
    name: str, arguments: dict[str, Plain], vocab_size: int, input_size: int, ctc: bool
) -> dict[str, Json]:
    """Return everything that the catalogue's builder gets.

    Raises:
        UsageError: `arguments` decide what is decided elsewhere, or the model has fixed what is not as fixed.
    """
    entry = find(name)
    if entry.task != "recognition":
        raise UsageError(f"{name} is for {entry.task}, not for recognition")
    known = inspect.signature(builder(entry)).parameters
    decided: dict[str, Json] = {"vocab_size": vocab_size, "input_size": input_size, "ctc": ctc}
    places = {"vocab_size": "the data", "input_size": "the data", "ctc": "objective.ctc"}
    for key in decided:
        if key in arguments:
            raise UsageError(f"model.arguments.{key} is decided by {places[key]}")
    if ctc and "ctc" not in known:
        raise UsageError(f"{name} has no CTC head: set objective.ctc to 0, or take `paraformer`")
    if "input_size" not in known and input_size != 560:
        raise UsageError(f"{name} takes rows of 560 channels, and the features have {input_size}")
    return {key: value for key, value in decided.items() if key in known} | dict(arguments)

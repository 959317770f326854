"""The recogniser's training, on a small Paraformer: what it logs, learns, keeps and refuses."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer, rate
from manyheads.speech.models.paraformer import greedy
from manyheads.speech.models.paraformer_losses import Objective
from manyheads.speech.recognition.data import Augment, Features, Joining, Loading, RecognitionData
from manyheads.speech.recognition.preprocessing import Preprocessing
from manyheads.speech.recognition.start import read_preprocessing
from manyheads.speech.recognition.task import Recognizer

DATA = os.environ.get("MANYHEADS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")
SMALL = {"dim": 32, "heads": 2, "units": 64, "encoder_blocks": 2, "decoder_blocks": 1, "dropout": 0.1}
QUICK = Optimizer(learning_rate=3e-3, warmup_steps=2)


@pytest.fixture(scope="module")
def data() -> RecognitionData:
    """Few short utterances."""
    found = RecognitionData(
        sample_rate=8000,
        features=Features(mels=20, stack=5, stride=5),
        augment=Augment(speeds=[1.0], frequency_masks=0, time_masks=0),
        loading=Loading(batch_seconds=30.0, buckets=4, cmvn_seconds=30.0),
        joining=Joining(train=48, val=24, test=24, longest=3),
    )
    found.setup()
    return found


def make(data: RecognitionData, **options: Any) -> Recognizer:
    torch.manual_seed(0)
    return Recognizer(
        data.vocab_size, data.input_size, **({"arguments": SMALL, "optimizer": QUICK} | options)
    )


def trainer(epochs: int = 1, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@needs_data
def test_it_learns_logs_and_reports(data: RecognitionData, tmp_path: Path) -> None:
    task = make(data, objective=Objective(ctc=0.3, glancing=0.5, mwer=0.05))
    run = trainer(5)
    run.fit(task, data)
    figures = run.callback_metrics
    parts = {"loss", "accuracy", "decoder", "count", "ctc", "mwer"}
    assert {f"{part}_{name}" for part in ("train", "val") for name in parts} <= figures.keys()
    assert {"val_cer", "val_wer"} <= figures.keys()
    assert figures["train_loss"] < 8
    (tested,) = run.test(task, data, verbose=False)
    assert tested["test_utterances"] == 24
    errors = sum(tested[f"test_{kind}"] for kind in ("substitutions", "deletions", "insertions"))
    assert tested["test_cer"] == pytest.approx(errors / tested["test_characters"])
    lines = task.report(tmp_path)
    assert "normaliser: none" in lines[0]
    with (tmp_path / "texts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(data.utterances["test"].ids)
    assert [row["reference"] for row in rows] == list(data.utterances["test"].texts)


@needs_data
def test_validation_is_what_the_model_folder_recognises(data: RecognitionData, tmp_path: Path) -> None:
    task, run = make(data), trainer(1)
    run.fit(task, data)
    run.test(task, data, verbose=False)
    hub.save(
        tmp_path / "model",
        task.model,
        domain="speech",
        name=task.name,
        arguments=task.builder_arguments,
        preprocessing=data.preprocessing(),
    )
    model, config = hub.load_model(tmp_path / "model")
    saved = Preprocessing.from_json(config.preprocessing)
    front_end, tokens = saved.front_end(), saved.tokens()
    goes_on = make(data, start=str(tmp_path / "model"))
    assert all(value.equal(goes_on.model.state_dict()[key]) for key, value in task.model.state_dict().items())
    begun = RecognitionData(
        sample_rate=8000, features=data.features, joining=data.joining, start=str(tmp_path / "model")
    )
    assert begun.preprocessing() == data.preprocessing()
    with pytest.raises(UsageError, match=r"start: .* has sample_rate 8000, and the data 16000"):
        read_preprocessing(str(tmp_path / "model"), 16000, data.features)
    with pytest.raises(UsageError, match=r"do not fit: .*ctc"):
        make(data, start=str(tmp_path / "model"), objective=Objective(ctc=0.3))
    assert task._tested is not None
    for index in range(6):
        samples, _ = data.utterances["test"].read(index)
        with torch.no_grad():
            found = model.eval()(front_end(samples)[None])
        assert tokens.text(greedy(found.logits, found.counts)[0]) == task._tested.hypotheses[index]


@needs_data
def test_random_numbers_decide_what_is_glanced_at(data: RecognitionData) -> None:
    task = make(data, arguments=SMALL | {"dropout": 0.0})
    task.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = next(iter(data.val_dataloader()))  # the longest

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(task.training_step(batch).detach())

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_rates_by_step() -> None:
    cosine = Optimizer(warmup_steps=9, min_lr=0.1)
    assert [rate(cosine, 109, step) for step in (0, 4, 9, 59, 109)] == pytest.approx([0.1, 0.5, 1, 0.55, 0.1])
    root = Optimizer(warmup_steps=100, schedule="inverse_root")
    assert [rate(root, 0, step) for step in (100, 400, 1600)] == pytest.approx([1, 0.5, 0.25])
    assert rate(Optimizer(warmup_steps=0, schedule="constant"), 0, 7) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"arguments": {"vocab_size": 9}}, "vocab_size is decided by the data"),
        ({"arguments": {"ctc": True}}, "ctc is decided by objective.ctc"),
        ({"name": "paraformer_large", "arguments": {}, "objective": Objective(ctc=0.3)}, "has no CTC head"),
        (
            {"name": "paraformer_large", "arguments": {}},
            "takes rows of 560 channels, and the features have 100",
        ),
        ({"arguments": {"dim": 32, "heads": 5}}, "heads"),
        ({"name": "mossformer", "arguments": {}}, "mossformer is for separation"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Recognizer(14, 100, **options)


def test_a_model_of_the_catalogue_is_built_from_the_folders_arguments() -> None:
    task = Recognizer(14, 100, arguments=SMALL, objective=Objective(ctc=0.3))
    again = create_model(task.name, **task.builder_arguments)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in task.model.state_dict().items()
    }

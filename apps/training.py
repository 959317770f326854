"""`manyheads DOMAIN fit|validate|test|predict`: one LightningCLI for every task of every domain.

A task gives its LightningModule and LightningDataModule; the rest (run folder, checkpoints, resuming, the
model folder at the end of a fit) is the same. The trainer's options are a closed list of plain values: no
option names a class, so that no config can run code.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from jsonargparse import ArgumentError, ArgumentParser, capture_parser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from manyheads.apps import options
from manyheads.apps.callbacks import EpochLines, Resumable, Validated
from manyheads.apps.stopping import Stopped
from manyheads.core import hub
from manyheads.core.catalog import DOMAINS, Task, load_class, tasks
from manyheads.core.errors import UsageError, did_you_mean

BEST, LAST, MODEL = "best.ckpt", "last.ckpt", "model"


class Trained(Protocol):
    """What a task's LightningModule offers beside training: its plain module, and how that is built.

    `LINKS` names options that the data module decides for the task, as (source, target, when): when is
    "parse", or "instantiate" for what is known only of the data module itself.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]]
    model: nn.Module
    name: str

    @property
    def builder_arguments(self) -> Mapping[str, hub.Json]:
        """Everything that the catalogue needs to build the module again."""


@runtime_checkable
class Calibrated(Protocol):
    """A task that takes more than weights from the validation rows."""

    def calibration(self) -> Mapping[str, object]:
        """What the model folder's predictor needs of that; plain JSON."""


class Data(Protocol):
    """What a task's LightningDataModule offers: its file, and what prediction must repeat of it."""

    @property
    def path(self) -> Path:
        """The file that the data come from."""

    def preprocessing(self) -> Mapping[str, object]:
        """What the model folder's predictor needs; plain JSON."""


def build_trainer(
    max_epochs: int = 10,
    max_steps: int = -1,
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto",
    devices: int | Literal["auto"] = 1,
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    limit_train_batches: int | float = 1.0,
    limit_val_batches: int | float = 1.0,
    limit_test_batches: int | float = 1.0,
    check_val_every_n_epoch: int = 1,
    log_every_n_steps: int = 50,
    deterministic: bool = True,
) -> Trainer:
    """Build the trainer from plain values.

    Args:
        max_epochs: Epochs to train at most.
        max_steps: Optimizer steps to train at most; -1 for no limit.
        accelerator: Where to run.
        devices: How many devices.
        precision: Arithmetic of the forward and backward passes.
        accumulate_grad_batches: Batches an optimizer step.
        gradient_clip_val: Largest gradient norm.
        limit_train_batches: How many training batches an epoch: a count, or a share between 0 and 1.
        limit_val_batches: The same for validation.
        limit_test_batches: The same for the test.
        check_val_every_n_epoch: Validate after every so many epochs.
        log_every_n_steps: Log the training loss every so many steps.
        deterministic: Refuse operations whose result varies between runs.
    """
    return Trainer(
        max_epochs=max_epochs,
        max_steps=max_steps,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        limit_train_batches=limit_train_batches,
        limit_val_batches=limit_val_batches,
        limit_test_batches=limit_test_batches,
        check_val_every_n_epoch=check_val_every_n_epoch,
        log_every_n_steps=log_every_n_steps,
        deterministic=deterministic,
        logger=False,
        enable_checkpointing=False,  # fit adds its own
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )


class CLI(LightningCLI):
    """The parser and the instances of one call; `run` below acts on them."""

    def __init__(self, task: Task, prog: str, args: Sequence[str]) -> None:
        self.task = task
        super().__init__(
            load_class(task.training),
            load_class(task.data),
            save_config_callback=None,
            trainer_class=build_trainer,
            parser_kwargs={
                "exit_on_error": False,
                "prog": prog,
                "description": "Every option can stand in the config, too.",
            },
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take a seed, always a number: a saved config must repeat its run."""
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of weights, dropout and window order."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run folder needs, and link what task and data share."""
        add = parser.add_argument
        add("--task", type=str, default=self.task.name, help="What is trained; the options are this task's.")
        add("--output", type=str, default=None, help="Run folder (default: runs/<name of the config>).")
        add("--overwrite", type=bool, default=False, help="fit: replace the run that is in the folder.")
        add(
            "--ckpt_path", type=str, default=None, help="fit: resume from it; else: measure it, not the best."
        )
        add(
            "--patience",
            type=int,
            default=3,
            help="fit: stop after so many epochs without a better val_loss.",
        )
        for source, target, when in cast(Trained, self.model_class).LINKS:
            parser.link_arguments(source, target, apply_on=when)
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:  # type: ignore[override]
        """Parse what the dispatcher hands over, whatever this process was started with."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer from the closed list of options."""
        return build_trainer(**self.config_init["trainer"])


def make_cli(domain: str, task: Task, action: str, args: Sequence[str]) -> CLI:
    """Parse arguments and build task, data and trainer.

    Raises:
        UsageError: An option or a config does not fit; one line.
    """
    try:
        return CLI(task, f"manyheads {domain} {action}", args)
    except ArgumentError as error:
        raise UsageError(explain_error(str(error), options.known_options(domain, task.name))) from error


def make_parser(domain: str, task: Task, action: str) -> ArgumentParser:
    """Return the parser of an action, without parsing anything."""
    return capture_parser(make_cli, domain, task, action, [])


def explain_error(message: str, known: Sequence[str]) -> str:
    """Turn jsonargparse's answer into a line or two: the key, the value, what was expected."""
    unknown = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message)
    if unknown:
        key = f"{unknown[1]}.{unknown[2]}"
        return f"the config has an unknown key {key!r}{did_you_mean(f'--{key}', known).replace('--', '')}"
    wrong = re.search(r'Parser key "([\w.]+)":', message)
    given = re.findall(r"(?:Given value|Got value): (.*)", message)
    if wrong and given:
        expected = re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", message, re.MULTILINE)
        kinds = " or ".join(re.sub(r"<class '(\w+)'>|typing\.", r"\1", kind) for kind in expected)
        return f"{wrong[1]} does not take {given[-1][:80]!r}; it takes {kinds[:200]}"
    return " ".join(message.split())[:300]


def run(domain: str, task: Task, action: str, args: Sequence[str]) -> int:
    """Run one action from parsed-down arguments (config names already resolved to files)."""
    quieten()
    cli = make_cli(domain, task, action, args)
    folder = run_folder(cli)
    try:
        if action == "predict":
            return predict(cli, folder)
        if action == "fit":
            fit(domain, cli, folder)
        else:
            measure(action, cli, folder)
    except SIGTERMException as error:  # lightning's own answer, which would exit with 0
        raise Stopped(signal.SIGTERM) from error
    return 0


def run_folder(cli: CLI) -> Path:
    """Return where a call's run lies: --output, else `runs/<name of the config>`."""
    return Path(cli.config["output"] or Path("runs") / Path(str(cli.config["config"][-1])).stem)


def quieten() -> None:
    """Silence lightning's adverts and hints; errors and our own lines stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def fit(domain: str, cli: CLI, folder: Path) -> None:
    """Train into a run folder: config, log, best and last checkpoint, and the model folder.

    Raises:
        UsageError: The folder holds a run and neither --ckpt_path nor --overwrite was given.
    """
    resume = checkpoint_path(cli, None)
    if resume is not None:
        load_weights(cli.model, resume)  # refuses another model's before anything is written
    if resume is None and (folder / LAST).exists():
        if not cli.config["overwrite"]:
            raise UsageError(
                f"{folder} holds a run: resume it with --ckpt_path {folder / LAST}, choose another --output,"
                " or replace it with --overwrite true"
            )
        for stale in (BEST, LAST):
            (folder / stale).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    cli.config["output"] = str(folder)  # the saved config finds its run
    cli.parser.save(cli.config, str(folder / "config.yaml"), overwrite=True)
    checkpoint = ModelCheckpoint(
        folder,
        "best",
        monitor="val_loss",
        save_last=True,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    trainer = cli.trainer
    trainer.callbacks += [  # type: ignore[attr-defined]
        EarlyStopping("val_loss", patience=cli.config["patience"]),
        Validated(),
        EpochLines(),
        Resumable(folder / LAST),
        checkpoint,
    ]
    trainer.logger = CSVLogger(folder, name="logs")
    parameters = sum(p.numel() for p in cli.model.parameters())
    print(f"{cli.config['model']['name']}: {parameters:,} parameters; run folder {folder}", flush=True)
    start = time.perf_counter()
    trainer.fit(cli.model, cli.datamodule, ckpt_path=resume, weights_only=True)
    seconds = time.perf_counter() - start
    summary: dict[str, hub.Json] = {
        "best_val_loss": float(checkpoint.best_model_score or math.nan),
        "epochs": trainer.current_epoch,
        "seed": cli.config["seed_everything"],
    }
    load_weights(cli.model, folder / BEST)
    write_model_folder(domain, cast(Trained, cli.model), cast(Data, cli.datamodule), folder / MODEL, summary)
    print(
        f"best val_loss {checkpoint.best_model_score:.4f} after {summary['epochs']} epochs, {seconds:.0f} s"
    )
    print(f"model folder {folder / MODEL}")
    print(f"next: manyheads {domain} test --config {folder / 'config.yaml'}")


def write_model_folder(
    domain: str, task: Trained, data: Data, path: Path, training: dict[str, hub.Json]
) -> None:
    """Save a trained task's plain module with everything that prediction needs."""
    preprocessing = {**data.preprocessing(), **(task.calibration() if isinstance(task, Calibrated) else {})}
    hub.save(
        path,
        task.model,
        domain=domain,
        name=task.name,
        arguments=task.builder_arguments,
        preprocessing=cast(Mapping[str, hub.Json], preprocessing),
        training=training,
    )


def load_weights(task: LightningModule, path: Path) -> None:
    """Load a checkpoint's weights into a task, strictly.

    Raises:
        UsageError: The checkpoint is of another model.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    try:
        task.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} does not fit the config's model: {first}") from error


def checkpoint_path(cli: CLI, default: Path | None) -> Path | None:
    """Return --ckpt_path as a local file, or the default.

    Raises:
        UsageError: No such file; addresses of other machines are refused.
    """
    given = cli.config["ckpt_path"]
    path = Path(given) if given else default
    if path is not None and not path.is_file():
        hint = "" if given else " (fit first, or give --ckpt_path)"
        raise UsageError(f"no checkpoint file {path}{hint}")
    return path


def measure(action: str, cli: CLI, folder: Path) -> dict[str, float]:
    """Validate or test the run's best checkpoint; print the figures and keep them as JSON beside it."""
    path = checkpoint_path(cli, folder / BEST)
    assert path is not None
    load_weights(cli.model, path)
    step = cli.trainer.validate if action == "validate" else cli.trainer.test
    figures = dict(step(cli.model, cli.datamodule, verbose=False)[0])
    for name, value in figures.items():
        print(f"{name:14} {value:.6g}")
    target = folder / f"{action}.json"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {target} (checkpoint {path})")
    return figures


def predict(cli: CLI, folder: Path) -> int:
    """Forecast past the end of the config's data with the run's model, as a batch job."""
    from manyheads.apps.jobs import JobOptions, run_job

    if not (folder / MODEL).is_dir():
        raise UsageError(f"no model folder {folder / MODEL}: fit first")
    output = folder / "forecasts"
    result = run_job(
        JobOptions(
            model=str(folder / MODEL),
            inputs=[str(cast(Data, cli.datamodule).path)],
            output=output,
            resume=output.exists(),
        )
    )
    return result.exit_code


def write_help(domain: str, task: Task) -> str:
    """Return the text that `configs/<domain>/help/<task>.txt` holds, at 110 columns."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        return make_parser(domain, task, "ACTION").format_help()
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


if __name__ == "__main__":
    for each in DOMAINS:
        for known in tasks(each).values():
            (options.CONFIGS / each / "help" / f"{known.name}.txt").write_text(write_help(each, known))

"""`manyheads DOMAIN fit|validate|test|predict`: one LightningCLI for every task of every domain.

A task gives its LightningModule and LightningDataModule; the rest (run folder, checkpoints, resuming, the
model folder at the end of a fit) is the same.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from manyheads.apps import options
from manyheads.apps.callbacks import EpochLines, Resumable, Validated
from manyheads.apps.curves import draw_curves
from manyheads.apps.scaling import end_with_parent, is_sharded
from manyheads.apps.stopping import Stopped
from manyheads.apps.trained import Calibrated, Data, Labelled, Monitored, Reported, Trained
from manyheads.apps.trainer import CLI, make_cli, write_help
from manyheads.core import files, hub
from manyheads.core.catalog import DOMAINS, Task, tasks
from manyheads.core.errors import UsageError

UNUSED = "not used in producing the loss"  # what lightning says of DDP
BEST, LAST, MODEL, LOGS, CURVES = "best.ckpt", "last.ckpt", "model", "logs", "curves.png"


def run(domain: str, task: Task, action: str, args: Sequence[str]) -> int:
    """Run one action from parsed-down arguments (config names already resolved to files)."""
    quieten()
    cli = make_cli(domain, task, action, args)
    folder = run_folder(cli)
    if not cli.trainer.is_global_zero:
        end_with_parent()
    try:
        if action == "predict":
            return predict(domain, cli, folder)
        if action == "fit":
            fit(domain, cli, folder)
        else:
            measure(action, cli, folder)
    except SIGTERMException as error:  # lightning's own answer, which would exit with 0
        raise Stopped(signal.SIGTERM) from error
    except RuntimeError as error:
        if UNUSED not in str(error):
            raise
        raise UsageError(
            "a batch does not use every parameter of this model: set trainer.strategy to ddp_find_unused"
        ) from error
    except Stopped:
        if cli.trainer.is_global_zero:
            raise  # of several processes the first one speaks; where another fails, lightning kills all
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

    Of several processes the first one alone writes.

    Raises:
        UsageError: The folder holds a run and neither --ckpt_path nor --overwrite was given.
    """
    resume = checkpoint_path(cli, None)
    if resume is not None:
        load_weights(cli.model, resume)  # refuses another model's before anything is written
    if cli.trainer.is_global_zero:
        begin_folder(cli, folder, fresh=resume is None)
    trained = copy.deepcopy(cli.model) if is_sharded(cli.trainer) else cli.model  # what has whole parameters
    figure, mode = monitored(cli.model)
    checkpoint = ModelCheckpoint(
        folder,
        "best",
        monitor=figure,
        mode=mode,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    trainer = cli.trainer
    trainer.callbacks += [  # type: ignore[attr-defined]
        EarlyStopping(figure, mode=mode, patience=cli.config["patience"]),
        Validated(),
        EpochLines(figure),
        checkpoint,
        Resumable(folder / LAST, cli.config["save_every_n_steps"], cli.config["seed_everything"]),
    ]
    trainer.logger = CSVLogger(folder, name=LOGS)
    if trainer.is_global_zero:
        parameters = sum(p.numel() for p in cli.model.parameters())
        print(f"{cli.config['model']['name']}: {parameters:,} parameters; run folder {folder}", flush=True)
    start = time.perf_counter()
    trainer.fit(cli.model, cli.datamodule, ckpt_path=resume, weights_only=True)
    seconds = time.perf_counter() - start
    if not trainer.is_global_zero:
        return
    score = math.nan if checkpoint.best_model_score is None else float(checkpoint.best_model_score)
    summary: dict[str, hub.Json] = {
        f"best_{figure}": score if math.isfinite(score) else None,
        "epochs": trainer.current_epoch,
        "seed": cli.config["seed_everything"],
    }
    trained.trainer = trainer
    load_weights(trained, folder / BEST)
    write_model_folder(domain, cast(Trained, trained), cast(Data, cli.datamodule), folder / MODEL, summary)
    draw_curves(folder / LOGS, folder / CURVES, cli.config["reference"])
    epochs = "1 epoch" if trainer.current_epoch == 1 else f"{trainer.current_epoch} epochs"
    print(f"best {figure} {score:.4f} after {epochs}, {seconds:.0f} s; {folder / CURVES}")
    print(f"model folder {folder / MODEL}")
    print(f"next: manyheads {domain} test --config {folder / 'config.yaml'}")


def begin_folder(cli: CLI, folder: Path, fresh: bool) -> None:
    """Make a run folder ready, and keep the config in it.

    Raises:
        UsageError: It holds a run, and a fresh one may not replace that.
    """
    if fresh and (folder / LAST).exists():
        if not cli.config["overwrite"]:
            raise UsageError(
                f"{folder} holds a run: resume it with --ckpt_path {folder / LAST}, choose another --output,"
                " or replace it with --overwrite true"
            )
        for stale in (BEST, LAST, CURVES):
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / LOGS, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for cut in folder.glob(f"{files.TEMPORARY}*.ckpt"):  # a killed run's
        files.remove(cut)
    cli.config["output"] = str(folder)  # the saved config finds its run
    cli.parser.save(cli.config, str(folder / "config.yaml"), overwrite=True)


def monitored(task: LightningModule) -> tuple[str, Literal["min", "max"]]:
    """Return the figure by which an epoch is the best one, and which of its values is."""
    return task.monitor if isinstance(task, Monitored) else ("val_loss", "min")


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
        labels=list(data.labels) if isinstance(data, Labelled) else None,
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
    if not cli.trainer.is_global_zero:
        return figures
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}} {value:.6g}")
    target = folder / f"{action}.json"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(figures, indent=2) + "\n")
    if action == "test" and isinstance(cli.model, Reported):
        print("\n".join(cli.model.report(folder)))
    print(f"written to {target} (checkpoint {path})")
    return figures


def predict(domain: str, cli: CLI, folder: Path) -> int:
    """Run the run's model on the config's data, as a batch job: forecasts go on past their end."""
    from manyheads.apps.jobs import JobOptions, run_job

    if not (folder / MODEL).is_dir():
        raise UsageError(f"no model folder {folder / MODEL}: fit first")
    output = folder / ("forecasts" if domain == "timeseries" else "predictions")
    result = run_job(
        JobOptions(
            model=str(folder / MODEL),
            inputs=[str(cast(Data, cli.datamodule).path)],
            output=output,
            resume=output.exists(),
        )
    )
    return result.exit_code


if __name__ == "__main__":
    for each in DOMAINS:
        for known in tasks(each).values():
            target = options.CONFIGS / each / "help" / f"{known.name}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(write_help(each, known))

"""The parser of `manyheads DOMAIN fit|validate|test|predict`, and the trainer it builds.

A task gives its LightningModule and LightningDataModule. The trainer's options are a closed list of plain
values: no option names a class, so that no config can run code.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

from jsonargparse import ArgumentError, ArgumentParser, capture_parser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from manyheads.apps import options
from manyheads.apps.scaling import Compile, Compiled, Sharded, Spread, Unscaled, WholeFiles, make_strategy
from manyheads.apps.trained import Trained
from manyheads.core.catalog import Task, load_class
from manyheads.core.errors import UsageError, did_you_mean


def build_trainer(
    max_epochs: int = 10,
    max_steps: int = -1,
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto",
    devices: int | Literal["auto"] = 1,
    num_nodes: int = 1,
    strategy: Spread = "auto",
    compile: Compile = "none",
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    limit_train_batches: int | float = 1.0,
    limit_val_batches: int | float = 1.0,
    limit_test_batches: int | float = 1.0,
    check_val_every_n_epoch: int = 1,
    log_every_n_steps: int = 50,
    sync_batchnorm: bool = False,
    deterministic: bool = True,
) -> Trainer:
    """Build the trainer from plain values.

    Args:
        max_epochs: Epochs to train at most.
        max_steps: Optimizer steps to train at most; -1 for no limit.
        accelerator: Where to run.
        devices: How many devices, each with a process of its own; a batch size is that of each process.
        num_nodes: Machines, each with so many devices; torchrun or a scheduler starts the command on each.
        strategy: "ddp" holds the model on each device; "ddp_find_unused" is for a model of which a batch does
            not use every parameter; "fsdp" cuts another one over the devices. "auto" is ddp, where there are
            several.
        compile: What compiles the model's blocks: torch.compile with this backend.
        precision: Arithmetic of the forward and backward passes.
        accumulate_grad_batches: Batches of each process an optimizer step.
        gradient_clip_val: Largest gradient norm.
        limit_train_batches: How many training batches an epoch: a count, or a share between 0 and 1.
        limit_val_batches: The same for validation.
        limit_test_batches: The same for the test.
        check_val_every_n_epoch: Validate after every so many epochs.
        log_every_n_steps: Log the training loss every so many steps.
        sync_batchnorm: Take batch statistics over all processes; GPUs alone.
        deterministic: Refuse operations whose result varies between runs.
    """
    given: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("compile", "strategy")}
    callbacks: list[Callback] = [] if compile == "none" else [Compiled(compile)]
    callbacks += [Sharded()] if strategy == "fsdp" else []
    callbacks += [Unscaled()] if precision != "32-true" and gradient_clip_val else []
    return Trainer(
        **given,
        strategy=make_strategy(strategy, devices, num_nodes),
        plugins=WholeFiles(),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,  # fit adds its own
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )


class CLI(LightningCLI):
    """The parser and the instances of one call; `run` in training.py acts on them."""

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
            help="fit: stop after so many epochs without a better one on the validation split.",
        )
        add(
            "--reference",
            type=dict[str, float] | None,
            default=None,
            help="fit: values to mark in curves.png, of others' work, as {val_loss: 0.38}.",
        )
        add(
            "--save_every_n_steps",
            type=int,
            default=0,
            help="fit: write last.ckpt after so many optimizer steps, too, for a run that may be killed.",
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

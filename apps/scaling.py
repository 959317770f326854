"""How a run is spread over devices, compiled and written: DDP, FSDP, torch.compile, checkpoints.

Checkpoints hold the plain names and whole tensors of one process, whatever the run does: a run over several
processes can be measured, and gone on with, by one.
"""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from manyheads.core import files
from manyheads.core.errors import UsageError

Spread = Literal["auto", "ddp", "ddp_find_unused", "fsdp"]
Compile = Literal["none", "inductor", "aot_eager", "eager"]
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def make_strategy(kind: Spread, devices: int | str, num_nodes: int) -> str | Strategy:
    """Return how a run is spread over devices; "auto" is one device, or DDP over several.

    Raises:
        UsageError: FSDP cannot cut a model over one device or over a number that is not known.
    """
    if kind == "auto":
        return "auto"
    if kind != "fsdp":
        return DDPStrategy(find_unused_parameters=kind == "ddp_find_unused")
    if devices == "auto" or int(devices) * num_nodes < 2:
        raise UsageError(
            "trainer.strategy fsdp cuts the model over devices: set trainer.devices to 2 or more"
        )
    return ModelParallelStrategy(
        data_parallel_size=int(devices) * num_nodes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def is_sharded(trainer: Trainer) -> bool:
    """Whether each process holds a part of the parameters alone."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def end_with_parent() -> None:
    """End this process when the one that started it is gone: it would wait for that for half an hour."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return a model's repeated parts: the outermost modules in lists and sequences, but single layers."""
    found: list[nn.Module] = []
    for child in model.children():
        listed = isinstance(child, nn.ModuleList | nn.Sequential)
        items = [each for each in child.children() if any(True for _ in each.children())] if listed else []
        trained = [each for each in items if any(True for _ in each.parameters())]
        found += trained or blocks(child)
    return found


class Compiled(Callback):
    """Compiles the model's blocks in place, where they run: the names of parameters stay.

    Blocks are alike, and one compilation serves them all; so whatever method a task calls is compiled.
    """

    def __init__(self, backend: Compile) -> None:
        self.backend = backend

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have them compiled when they are called first."""
        model = pl_module.model
        assert isinstance(model, nn.Module)
        for block in blocks(model) or [model]:
            block.compile(backend=self.backend)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go back to what is not compiled: what comes after a run calls each shape once."""
        for module in pl_module.modules():
            module._compiled_call_impl = None


class Sharded(Callback):
    """Cuts parameters, gradients and optimizer state over the processes, block by block (FSDP)."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what lightning does once the processes know each other.

        Raises:
            UsageError: The run averages its weights, which takes whole ones.
        """
        if any(isinstance(each, WeightAveraging) for each in trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError("trainer.strategy fsdp keeps no averaged weights: set ema_decay to 0")
        pl_module.configure_model = partial(_cut, pl_module)  # type: ignore[method-assign]


def _cut(task: LightningModule) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = task.device_mesh
    assert mesh is not None
    if any(isinstance(p, torch.distributed.tensor.DTensor) for p in task.parameters()):
        return  # validated after it was trained
    for block in blocks(task.model):  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(task, mesh=mesh["data_parallel"])
    for step in STEPS:
        register_fsdp_forward_method(task, step)


class Unscaled(Callback):
    """Lets gradients be clipped in mixed precision.

    A fused optimizer takes the scale of 16-bit gradients out itself, behind the clipping; so lightning clips
    none, though bfloat16 has no scale. Where an optimizer does not, lightning takes the scale out first.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so of each optimizer."""
        for optimizer in trainer.optimizers:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whenever a process or the machine stops.

    Lightning writes to the system's folder of temporary files, and moves that without bringing it to the
    disk; from another file system such a move is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write beside the checkpoint, flush, rename."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = files.temporary(path)
        torch.save(checkpoint, written)
        files.flush(written)
        files.commit(written, path)

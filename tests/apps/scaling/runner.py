"""Runs the command line in forked processes: what it imports is imported once, for all of them.

Reads a line of JSON for each round: a list of {"args", "env", "kill_at", "out"}, started side by side.
Answers with a line: their exit codes. `kill_at` kills a process behind that step, before anything is saved.
An empty line ends it.
"""

import json
import os
import signal
import sys
import traceback
from typing import Any

import manyheads.graph.data
import manyheads.graph.task
import manyheads.recsys.data
import manyheads.recsys.task
import manyheads.speech.recognition.task
import manyheads.speech.separation.task
import manyheads.timeseries.classification.task
import manyheads.timeseries.reconstruction.task
import manyheads.timeseries.task
import manyheads.vision.task  # noqa: F401
from manyheads.apps import callbacks, cli, training  # noqa: F401


def kill_at(step: int) -> None:
    """Have this process killed behind a step."""
    end_batch = callbacks.Resumable.on_train_batch_end

    def ending(self: callbacks.Resumable, trainer: Any, *args: Any) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        end_batch(self, trainer, *args)

    callbacks.Resumable.on_train_batch_end = ending  # type: ignore[method-assign]


def start(spec: dict[str, Any]) -> int:
    """Fork a process that runs one call; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        target = os.open(spec["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.environ.update(spec["env"])
        if spec["kill_at"] is not None:
            kill_at(spec["kill_at"])
        code = cli.main(spec["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    while line := sys.stdin.readline().strip():
        children = [start(spec) for spec in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

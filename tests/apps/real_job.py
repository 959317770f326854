"""A job as a script, for tests that kill it: `python real_job.py OPTIONS`, where OPTIONS is JSON.

Beside those of `JobOptions`: `fault`, a point of the protocol and a shard at which the process is killed, and
`marker`, a file that is made then, so that it happens once.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core.errors import ManyheadsError


def end_at(point, index, marker, reached, at):
    """Kill this process at a point of the protocol, once."""
    if (reached, at) == (point, index) and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    """Run the job; print the error, if there is one."""
    options = json.loads(sys.argv[1])
    fault, marker = options.pop("fault", None), options.pop("marker", None)
    try:
        result = run_job(JobOptions(**options), fault=partial(end_at, *fault, marker) if fault else None)
    except ManyheadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())

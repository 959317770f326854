"""Lists for all users as a batch job: killed and resumed it leaves the same bytes; it holds the log alone.

`pytest -m slow tests/apps/test_jobs_recsys.py -s` prints the figures.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.recsys.logs import Columns
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.text_preprocessing import TextCut, TextPreprocessing
from manyheads.recsys.texts import TextTokens, item_texts
from manyheads.recsys.vocabulary import Vocabulary

pytestmark = [
    pytest.mark.slow,
]
COMMAND = """
import sys
from manyheads.apps.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)  # MiB; ru_maxrss would count the parent's memory at the fork
sys.exit(code)
"""
ITEMS = 20_000


def save(path: Path) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    arguments = {"num_items": ITEMS, "max_len": 50, "hidden_size": 32}
    kept = Preprocessing(Columns(), Vocabulary(map(str, range(ITEMS))), np.arange(ITEMS))
    hub.save(
        path,
        create_model("sasrec", **arguments),
        domain="recsys",
        name="sasrec",
        arguments=arguments,
        preprocessing=kept.to_json(),
    )
    return path


def save_of_texts(path: Path, table: Path, items: int = 2000, new: int = 500) -> Path:
    """A model folder with random weights that reads items, and a table with new ones among them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = [
        {"title": " ".join(map(str, rng.integers(0, 99, 3))), "kind": f"k{n % 9}"} for n in range(items + new)
    ]
    tokens = TextTokens.train([text for row in rows[:items] for text in row.values()], 400)
    cut = TextCut("item_id", ("title", "kind"), 3, 32, 5, 100)
    texts = TextPreprocessing(tokens, cut, item_texts(tokens, rows[:items]))
    kept = Preprocessing(Columns(), Vocabulary(map(str, range(items))), np.arange(items))
    arguments = {"vocab_size": 400, "num_items": items, "hidden_size": 32, "layers": 1, "positions": 102}
    hub.save(
        path,
        create_model("recformer", **arguments),
        domain="recsys",
        name="recformer",
        arguments=arguments,
        preprocessing=kept.to_json() | texts.to_json(),
    )
    pd.DataFrame(rows).assign(item_id=range(items + new)).to_parquet(table)
    return path


def write_log(path: Path, users: int, items: int = ITEMS) -> Path:
    """Twenty events a user, rows of all mixed."""
    rng = np.random.default_rng(0)
    size = 20 * users
    columns = {
        "user_id": rng.permutation(np.repeat(np.arange(users), 20)),
        "item_id": rng.integers(0, items, size),
        "timestamp": rng.integers(0, 10**9, size),
    }
    pd.DataFrame(columns).to_parquet(path)
    return path


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["numbers", "texts"])
def test_a_killed_job_goes_on_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    users, options = (6000, ["--shard-size", 500]) if kind == "numbers" else (1200, ["--shard-size", 100])
    if kind == "numbers":
        model, log = save(tmp_path / "model"), write_log(tmp_path / "log.parquet", users)
    else:
        items = tmp_path / "items.parquet"
        model, log = (
            save_of_texts(tmp_path / "model", items),
            write_log(tmp_path / "log.parquet", users, 2500),
        )
        options += ["--items", items]
    job = ("predict", model, log, "--quiet", *options, "-o")
    whole = start(*job, tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()[1]
    killed = start(*job, tmp_path / "cut")
    while len(list((tmp_path / "cut").glob("part-*"))) < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = contents(tmp_path / "cut").keys() & contents(tmp_path / "whole").keys()
    assert "_SUCCESS" not in done
    resumed = start(*job, tmp_path / "cut", "--resume")
    assert resumed.wait() == 0, resumed.communicate()[1]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    rows = pd.concat([pd.read_parquet(part) for part in sorted((tmp_path / "cut").glob("part-*"))])
    assert rows["user_id"].nunique() == users and len(rows) == 10 * users
    if kind == "texts":
        assert (rows["item_id"].astype(int) >= 2000).any()  # new ones


def test_memory_grows_by_the_logs_numbers_alone(tmp_path: Path) -> None:
    model, used = save(tmp_path / "model"), {}
    for users in (2000, 20_000):
        log = write_log(tmp_path / f"log{users}.parquet", users)
        run = start("predict", model, log, "--quiet", "-o", tmp_path / str(users))
        out, err = run.communicate()
        assert run.returncode == 0, err
        used[users] = float(out.split()[-1])
    print(f"peak memory by users, in MiB: {used}")
    assert used[20_000] - used[2000] < 200  # scores of all users and items would take 1,600

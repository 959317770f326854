"""RecBole beside us: the same log of MovieLens 100K, the same split, the same model.

RecBole is no dependency of ours and pins old packages, so it has an environment of its own, which needs what
our side needs, too:

    pip install torch 'numpy<2' 'pandas<3' scipy scikit-learn pyyaml tqdm colorama colorlog==4.7.2 tabulate \\
        texttable psutil tensorboard thop 'pyarrow<20' numba transformers tokenizers
    pip install --no-deps recbole==1.2.1
    PYTHONPATH=src:. python -m benchmarks recsys
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAME: dict[str, Any] = {
    "use_gpu": False,
    "train_neg_sample_args": None,
    "loss_type": "CE",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": "full",
    },
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
    "show_progress": False,
}


def installed(package: str = "recbole") -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None


def version(package: str) -> str:
    """Return a peer's name and version."""
    return f"{package} {importlib.metadata.version(package)}"


def examples() -> Path:
    """Return where RecBole keeps its copy of MovieLens 100K."""
    (root,) = importlib.util.find_spec("recbole").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(root) / "dataset_example"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """RecBole reads the command line, and tells much."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.argv = argv


def configure(length: int, **more: object) -> Any:
    """Return RecBole's config of BERT4Rec on MovieLens 100K."""
    from recbole.config import Config

    options = SAME | {"data_path": str(examples()), "MAX_ITEM_LIST_LENGTH": length} | more
    with quiet():
        return Config("BERT4Rec", "ml-100k", config_dict=options)

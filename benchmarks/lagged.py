"""The lagged forecasters against the transformers library: a training step, and sampling forecasts.

Run: python -m benchmarks lagged, in an environment with the test extra.

Both sides have the same weights and inputs, at the library's default sizes. Their losses differ by the draws
of dropout and of sampled keys; that the two compute the same is shown in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import torch

from benchmarks.measure import Case, Step
from manyheads.core.catalog import create_model
from manyheads.timeseries.models.checkpoints import load_weights
from manyheads.timeseries.models.lagged import History, Target, negative_log_likelihood
from manyheads.timeseries.models.pretrained import builder_arguments

CONFIG = {
    "prediction_length": 24,
    "context_length": 48,
    "lags_sequence": [1, 2, 3, 4, 23, 24, 25],
    "num_time_features": 4,
    "num_parallel_samples": 50,
}
BATCH = 32


def cases(device: str) -> Iterator[Case]:
    """Yield two lines a model."""
    import transformers

    peer = f"transformers {version('transformers')}, torch {torch.__version__}"
    classes = {
        "informer": (transformers.InformerConfig, transformers.InformerForPrediction),
        "autoformer": (transformers.AutoformerConfig, transformers.AutoformerForPrediction),
    }
    for kind, (config_class, model_class) in classes.items():
        reference = model_class(config_class(**CONFIG))
        name, arguments = builder_arguments(CONFIG | {"model_type": kind})
        model = create_model(name, **arguments)
        load_weights(model, reference.state_dict(), "transformers")
        yield from _lines(kind, model.to(device), reference.to(device), peer, device)


def _lines(
    kind: str, model: torch.nn.Module, reference: torch.nn.Module, peer: str, device: str
) -> Iterator[Case]:
    length = 48 + 25
    past = torch.randn(BATCH, length, device=device).cumsum(1)
    time, ahead = torch.randn(BATCH, length, 4, device=device), torch.randn(BATCH, 24, 4, device=device)
    truth, seen = torch.randn(BATCH, 24, device=device), torch.ones_like(past)
    history = History(past[..., None], seen[..., None], torch.cat([time[:, -48:], ahead], dim=1))
    target = Target(truth[..., None], torch.ones_like(truth)[..., None])
    given = {
        "past_values": past,
        "past_observed_mask": seen,
        "past_time_features": time,
        "future_time_features": ahead,
    }

    def ours() -> None:
        known = (history, target) if kind == "informer" else (history,)
        negative_log_likelihood(model.train().distribution(*known), target).backward()

    def theirs() -> None:
        reference.train()(**given, future_values=truth).loss.backward()

    def sampling(called: torch.nn.Module, *inputs: History, **named: torch.Tensor) -> Step:
        return lambda: called.eval().generate(*inputs, **named)

    shape = f"B{BATCH} 48->24 d64"
    yield Case(f"{kind}_lagged forward, backward", shape, peer, ours, theirs)
    samples = f"{shape}, 50 samples"
    yield Case(
        f"{kind}_lagged generate", samples, peer, sampling(model, history), sampling(reference, **given)
    )

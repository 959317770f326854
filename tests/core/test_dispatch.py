"""The choice of a backend: what is taken, why, and what a forced backend that cannot run says."""

from __future__ import annotations

import threading

import pytest
import torch

from manyheads.core import dispatch
from manyheads.core.dispatch import choose, explain, triton_blocked, use_backend
from manyheads.core.errors import UsageError

FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("MANYHEADS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def attention_on(device="cpu", dtype=FLOAT, **features):
    return choose("attention", device=device, dtype=dtype, **features).backend


@pytest.mark.parametrize(
    ("device", "features", "backend"),
    [
        ("cpu", {}, "torch"),
        ("cpu", {"learned_bias": True}, "cpu"),
        ("cpu", {"learned_bias": True, "dropout": True}, "torch"),
        ("cpu", {"kind": "sigmoid"}, "cpu"),
        ("cpu", {"kind": "sigmoid", "dropout": True}, "reference"),
        ("cuda", {}, "torch"),
        ("cuda", {"learned_bias": True}, "triton"),
        ("cuda", {"post_scale": True}, "triton"),
        ("cuda", {"kind": "sigmoid", "head_dim": 512}, "reference"),
    ],
)
def test_attention(device, features, backend):
    assert attention_on(device, **features) == backend


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert attention_on("cuda", learned_bias=True) == "torch"
    assert "not triton: triton is not installed" in explain(
        "attention", device="cuda", dtype=FLOAT, learned_bias=True
    )
    with use_backend("triton"), pytest.raises(UsageError, match="triton is not installed"):
        attention_on("cuda")


def test_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attention_on("cpu", learned_bias=True) == "triton"
    with use_backend("triton"):
        with pytest.raises(UsageError, match="bfloat16 products are wrong"):
            attention_on("cpu", torch.bfloat16)
        with pytest.raises(UsageError, match="runs CPU tensors"):
            attention_on("cuda")


def test_float64_has_no_kernel():
    assert "float64" in triton_blocked(dispatch.Call("cuda", torch.float64, {}))
    assert attention_on("cuda", torch.float64, kind="sigmoid") == "reference"


def test_use_backend_nests_and_ends():
    with use_backend("reference"):
        assert attention_on() == "reference"
        with use_backend("torch", op="attention"):
            assert attention_on() == "torch"
            assert choose("rms_norm", device="cpu", dtype=FLOAT).backend == "reference"
            with use_backend("cpu"):
                assert attention_on() == "cpu"
        assert attention_on() == "reference"
    assert attention_on(learned_bias=True) == "cpu"


def test_use_backend_ends_with_an_error():
    with pytest.raises(ValueError), use_backend("reference"):
        raise ValueError
    assert attention_on() == "torch"


def test_a_thread_does_not_see_another_threads_backend():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(attention_on()))
        thread.start()
        thread.join()
    assert seen == ["torch"]


@pytest.mark.parametrize(
    ("value", "backend"),
    [("reference", "reference"), ("attention=cpu,rms_norm=reference", "cpu"), ("rms_norm=reference", "torch"),
     ("auto", "torch"), ("", "torch")],
)  # fmt: skip
def test_environment(value, backend, monkeypatch):
    monkeypatch.setenv("MANYHEADS_BACKEND", value)
    assert attention_on() == backend
    with use_backend("reference"):
        assert attention_on() == "reference"


def test_what_was_asked_for_is_named(monkeypatch):
    monkeypatch.setenv("MANYHEADS_BACKEND", "reference")
    choice = choose("attention", device="cpu", dtype=FLOAT)
    assert choice.reason == "asked for by MANYHEADS_BACKEND=reference"
    assert "not torch: another was asked for" in explain("attention", device="cpu", dtype=FLOAT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tritn", "no backend 'tritn'; did you mean 'triton'"),
        ("atention=cpu", "no op 'atention'; did you mean 'attention'"),
    ],
)  # fmt: skip
def test_wrong_names(value, message, monkeypatch):
    monkeypatch.setenv("MANYHEADS_BACKEND", value)
    with pytest.raises(UsageError, match=message):
        attention_on()
    op, _, backend = value.rpartition("=")
    with pytest.raises(UsageError, match=message), use_backend(backend, op=op or None):
        pass


def test_unknown_op():
    with pytest.raises(UsageError, match="no op 'atention'; did you mean 'attention'"):
        choose("atention", device="cpu", dtype=FLOAT)


def test_a_backend_that_an_op_lacks():
    with use_backend("torch"), pytest.raises(UsageError, match=r"crms_norm has no backend 'torch', .*it has"):
        choose("crms_norm", device="cpu", dtype=FLOAT)


def test_explain_says_why_not():
    text = explain("attention", device="cpu", dtype=FLOAT, learned_bias=True)
    first, second = text.splitlines()
    assert first == "attention on cpu float32 -> cpu: torch has no fast gradient of a bias"
    assert second == "  not triton: it needs a CUDA device, and the tensors are on cpu"

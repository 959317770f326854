"""Recognition while a recording goes on, over a websocket: the rows of the model alone, and its bounds."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import manyheads

RATE = 8000


@pytest.fixture(scope="module")
def model(serving_tools, tmp_path_factory):
    return serving_tools.recognition_model(tmp_path_factory.mktemp("stream") / "model", streaming=True)


@pytest.fixture
def server(serving_tools, model):
    with serving_tools.Local({"talk": model}, quiet=True, streams=2) as found:
        yield found


def address(server):
    return server.url.replace("http", "ws") + "/v1/models/talk/stream"


def messages(socket):
    """What the server still says."""
    found = []
    with contextlib.suppress(ConnectionClosed):
        found.extend(json.loads(message) for message in socket)
    return found


def begin(socket, **more):
    socket.send(json.dumps({"sample_rate": RATE, "encoding": "float32", **more}))
    return json.loads(socket.recv(timeout=60))


@pytest.mark.parametrize("size", [37, 4000, 10**9])
def test_rows_are_those_of_the_recording_without_a_server(server, model, serving_tools, size):
    samples = serving_tools.sound(3.1)
    stream = manyheads.load(model).stream(endpoints="energy")
    wanted = [*stream.push(samples), *stream.finish()]
    assert any(row["text"] for row in wanted)
    if size == 37:  # many small messages: a second of them is enough
        samples = samples[: RATE // 2]
        stream = manyheads.load(model).stream(endpoints="energy")
        wanted = [*stream.push(samples), *stream.finish()]
    with connect(address(server)) as socket:
        ready = begin(socket, endpoints="energy")
        assert ready["type"] == "ready"
        assert ready["latency_ms"] == stream.latency_ms
        for start in range(0, len(samples), size):
            socket.send(samples[start : start + size].tobytes())
        socket.send('{"type": "finish"}')
        found = messages(socket)
    assert found.pop() == {"type": "done"}
    assert [row.pop("type") for row in found] == ["row"] * len(found)
    assert found == [dict(row) for row in wanted]


def test_whole_numbers_are_samples_too(server, model, serving_tools):
    whole = (serving_tools.sound(2.0) * 32768).astype("<i2")
    stream = manyheads.load(model).stream()
    wanted = [*stream.push(whole.astype(np.float32) / np.float32(32768)), *stream.finish()]
    with connect(address(server)) as socket:
        begin(socket, encoding="pcm16")
        socket.send(whole.tobytes())
        socket.send('{"type": "finish"}')
        found = messages(socket)
    assert [{**row, "type": "row"} for row in wanted] == [
        {**row, "type": "row"} for row in found if row["type"] == "row"
    ]


@pytest.mark.parametrize(
    ("first", "then", "code"),
    [
        ("no json", None, "invalid_request"),
        ('{"sample_rate": 16000}', None, "invalid_request"),
        ('{"sample_rate": 8000, "other": 1}', None, "invalid_request"),
        (b"\x00\x01", None, "invalid_request"),
        ('{"sample_rate": 8000}', b"\x00", "invalid_data"),
        ('{"sample_rate": 8000, "encoding": "float32"}', np.float32("nan").tobytes(), "invalid_data"),
        ('{"sample_rate": 8000}', "[" * 100_000, "invalid_request"),
    ],
)
def test_what_is_wrong_is_said_and_the_server_goes_on(server, first, then, code):
    with connect(address(server)) as socket:
        socket.send(first)
        if then is not None:
            assert json.loads(socket.recv(timeout=60))["type"] == "ready"
            socket.send(then)
        found = messages(socket)[-1]
    assert (found["type"], found["code"]) == ("error", code)
    assert found["request_id"]
    assert server.client.get("/readyz").status_code == 200
    assert server.service.streams.open == 0


def test_no_more_go_on_than_allowed_and_silent_ones_are_ended(server):
    server.service.streams.idle_s = 1.0
    with connect(address(server)) as one, connect(address(server)) as two:
        assert [begin(each)["type"] for each in (one, two)] == ["ready", "ready"]
        with connect(address(server)) as three:
            assert messages(three)[-1]["code"] == "busy"
        assert [messages(each)[-1]["code"] for each in (one, two)] == ["idle", "idle"]
    with connect(address(server)) as again:
        assert begin(again)["type"] == "ready"


def test_a_recording_has_an_end(server, serving_tools):
    server.service.streams.seconds = 1.0
    with connect(address(server)) as socket:
        begin(socket)
        socket.send(serving_tools.sound(2.0).tobytes())
        assert messages(socket)[-1]["code"] == "too_long"


def test_a_model_of_whole_recordings_says_so(serving_tools, tmp_path):
    folder = serving_tools.recognition_model(tmp_path / "model")
    with serving_tools.Local({"talk": folder}, quiet=True) as server:
        with connect(address(server)) as socket:
            assert messages(socket)[-1]["code"] == "no_stream"
        with connect(address(server).replace("talk", "other")) as socket:
            assert messages(socket)[-1]["code"] == "no_model"

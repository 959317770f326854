"""What no honest client sends: each gets its answer, and the server and its workers go on."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hostile(load_helper):
    return load_helper(ROOT / "benchmarks" / "serving_hostile.py")


@pytest.fixture(scope="module")
def server(serving_tools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "series").mkdir()
    models = {
        "vision": serving_tools.vision_model(folder / "vision"),
        "timeseries": serving_tools.series_model(folder / "series")[0],
        "speech": serving_tools.recognition_model(folder / "speech"),
        "graph": serving_tools.graph_model(folder / "graph"),
        "recsys": serving_tools.recsys_model(folder / "recsys"),
    }
    with serving_tools.Local(models, quiet=True, max_body_mb=2, max_pixels=50_000_000) as found:
        found.image = serving_tools.encoded((30, 30))
        found.home = str(folder)
        yield found


def silent(opened):
    """Whether the other end closes a connection without a word."""
    try:
        return opened.recv(1000) == b""
    except ConnectionResetError:
        return True


def is_well(server):
    answer = server.predict("vision", content=server.image, headers={"content-type": "image/jpeg"})
    return answer.status_code == 200


def test_each_request_gets_its_answer(server, hostile):
    wrong = []
    for request in hostile.requests(2 << 20):
        begin = time.monotonic()
        answer = server.client.post(
            f"/v1/models/{request.model}/predict", content=request.content(), headers=request.headers
        )
        seconds = time.monotonic() - begin
        if answer.status_code not in request.statuses:
            wrong.append((request.name, answer.status_code, answer.text[:300]))
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["request_id"] == answer.headers["x-request-id"]
            assert error["code"]
            if answer.status_code == 422:
                assert error["details"][0]["field"], (request.name, error)
            assert not re.search(r"/tmp|/work|/home|manyheads-|Traceback|\.py", answer.text), (
                request.name,
                answer.text,
            )
            assert server.home not in answer.text
        assert seconds < 30, request.name
    assert wrong == []
    assert is_well(server)


def test_bytes_on_a_socket(server, hostile):
    address = urlsplit(server.url)
    said = {name: talk(address.hostname, address.port) for name, talk in hostile.raw().items()}
    refused = {
        name: answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/1.1 ") else b""
        for name, answer in said.items()
    }
    wanted = {
        "not HTTP": b"400",
        "a header of 100 KB": b"400",
        "an address of 100 KB": b"400",
        "two lengths": b"400",
        "a length and chunks": b"400",
        "a negative length": b"400",
        "a length of 30 digits": b"400",
        "a broken chunk": b"400",
        "100,000 chunks of a byte": b"422",
        "another way to the models": b"404",
        "TRACE": b"404",
        "another host": b"421",
        "gone within the headers": b"",
        "gone within the body": b"",
        "gone before the answer": b"",
    }
    assert refused == wanted
    assert is_well(server)
    assert server.service.active == 0


def test_slow_clients_are_cut_off(server, hostile, monkeypatch):
    from manyheads.apps.serving import protocol

    monkeypatch.setattr(protocol, "HEADERS_S", 1.0)
    monkeypatch.setattr(server.guard, "rules", replace(server.guard.rules, pause_s=1.0))
    address = urlsplit(server.url)
    headers, body = hostile.slow(address.hostname, address.port, 20)
    with headers, body:
        begin = time.monotonic()
        assert silent(headers)
        assert b" 408 " in body.recv(1000)
        assert time.monotonic() - begin < 10
    assert is_well(server)


def test_many_slow_clients_leave_room_for_others(server, hostile):
    address = urlsplit(server.url)
    opened = [each for _ in range(100) for each in hostile.slow(address.hostname, address.port, 20)]
    try:
        assert is_well(server)
    finally:
        for each in opened:
            each.close()
    with socket.create_connection((address.hostname, address.port)):
        assert is_well(server)

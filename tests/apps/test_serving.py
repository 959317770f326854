"""The server around its models: options, tokens, queues, deadlines, dead workers, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from manyheads.apps import cli, serving
from manyheads.apps.serving.metrics import Metrics
from manyheads.apps.serving.payload import About, Answer, Failed, Served, Table, Work
from manyheads.apps.serving.process import Plan
from manyheads.apps.serving.queue import Model, Policy, Refused

TOKEN = "a-token-of-a-few-characters"
ABOUT = About("0" * 64, {"id": "string"}, {}, 8, "cpu", 0.1, 0.1)


class FakeWorker:
    """A worker that takes as long as each request says; '1!' is not given up; 'die' ends it."""

    def __init__(self, connection, arguments):
        self.connection, self.cancelled = connection, arguments[2]
        self.batches, self.seen, self.starts = [], [], 0
        self.closing = threading.Lock()  # closed twice at once, it would close another's file
        self.thread = threading.Thread(target=self.work, daemon=True)

    def start(self):
        self.thread.start()

    def kill(self):
        with self.closing:
            self.connection.close()

    def join(self, timeout=None):
        pass

    def work(self):
        try:
            self.connection.send(ABOUT)
            while True:
                works = self.connection.recv()
                self.batches.append(len(works))
                answers = []
                for place, work in enumerate(works):
                    [what] = work.payload.columns["do"]
                    if what == "die":
                        self.kill()
                        return
                    stubborn = str(what).endswith("!")
                    end = time.monotonic() + float(str(what).rstrip("!"))
                    while time.monotonic() < end and (stubborn or not self.cancelled[place]):
                        time.sleep(0.002)
                    self.seen.append(bool(self.cancelled[place]))
                    answers.append(Answer(b"{}", records=1))
                self.connection.send(answers)
        except (EOFError, OSError):
            pass


def do(what):
    return Work(Table("rows", {"do": [what]}))


def with_model(test, policy=None, **plan):
    """Run a coroutine with a model of fake workers; they are what it gets as its second argument."""
    made = []

    def start(connection, arguments):
        made.append(FakeWorker(connection, arguments))
        return made[-1]

    async def run():
        served = Served("fake", Path(), "vision", "classification", "fake")
        model = Model(Plan(served, start=start, **plan), policy or Policy(), Metrics())
        await model.start()
        try:
            await test(model, made)
        finally:
            await model.close()

    asyncio.run(run())


async def outcome(model, what, left=None):
    try:
        return (await model.submit(do(what), left)).body
    except Refused as error:
        return error.problem.status


def test_requests_go_together_while_a_worker_is_busy():
    async def test(model, workers):
        model.rate.each = 1e-6
        first = asyncio.create_task(outcome(model, 0.2))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(outcome(model, 0.0)) for _ in range(10)]
        assert await asyncio.gather(first, *others) == [b"{}"] * 11
        assert workers[0].batches == [1, 8, 2]

    with_model(test, batch=8)


def test_long_requests_go_alone():
    async def test(model, workers):
        model.rate.each = 2.0
        assert await asyncio.gather(*(outcome(model, 0.0) for _ in range(3))) == [b"{}"] * 3
        assert workers[0].batches[0] == 1

    with_model(test)


def test_beyond_the_queue_is_429_at_once_with_a_time_to_come_back():
    async def test(model, workers):
        busy = asyncio.create_task(outcome(model, 0.5))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(outcome(model, 0.0)) for _ in range(4)]
        await asyncio.sleep(0.02)
        begin = time.monotonic()
        with pytest.raises(Refused) as refused:
            await model.submit(do(0.0))
        assert time.monotonic() - begin < 0.3
        assert refused.value.problem.status == 429
        assert refused.value.retry_after >= 1
        assert await asyncio.gather(busy, *waiting) == [b"{}"] * 5
        assert await outcome(model, 0.0) == b"{}"

    with_model(test, Policy(queue=4))


def test_what_could_not_be_answered_in_time_is_not_admitted():
    async def test(model, workers):
        model.rate.each = 10.0
        busy = asyncio.create_task(outcome(model, 0.3))
        await asyncio.sleep(0.05)
        more = [asyncio.create_task(outcome(model, 0.0)) for _ in range(8)]
        found = await asyncio.gather(*more)
        assert found.count(429) >= 6  # each ahead takes ten seconds, and the deadline is thirty
        assert await busy == b"{}"

    with_model(test)


def test_what_waits_and_will_be_too_late_is_turned_away_early():
    """Eight were admitted while requests took a moment; then one takes a second and more."""

    async def test(model, workers):
        model.rate.each = 0.01
        begin = time.monotonic()
        slow = asyncio.create_task(outcome(model, "1.5!"))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(outcome(model, 0.1)) for _ in range(8)]
        found = await asyncio.gather(*waiting)
        assert 429 in found
        assert set(found) <= {200, 429, b"{}"}
        assert found == sorted(found, key=lambda each: each == 429)  # the last ones
        assert await slow == b"{}"
        assert time.monotonic() - begin < 10

    with_model(test, Policy(deadline_s=4))


def test_after_the_deadline_is_504_and_what_waits_is_never_begun():
    async def test(model, workers):
        busy = asyncio.create_task(outcome(model, "1.0!"))
        await asyncio.sleep(0.05)
        waits = asyncio.create_task(outcome(model, 0.0))
        assert await asyncio.gather(busy, waits) == [504, 504]
        assert not model.waiting
        assert workers[0].seen == []
        await asyncio.sleep(1.0)
        model.rate.each = 0.0
        assert await outcome(model, 0.0) == b"{}"
        assert workers[0].seen == [True, False]

    with_model(test, Policy(deadline_s=0.4))


def test_what_a_client_left_is_given_up():
    async def test(model, workers):
        left = asyncio.get_running_loop().create_future()
        busy = asyncio.create_task(outcome(model, 30, left))
        await asyncio.sleep(0.1)
        left.set_result(None)
        assert await busy == 499
        assert await outcome(model, 0.0) == b"{}"
        assert workers[0].seen == [True, False]

    with_model(test)


def test_a_dead_worker_is_replaced_and_what_it_had_is_503():
    async def test(model, workers):
        assert await outcome(model, "die") == 503
        while not model.ready:
            assert await outcome(model, 0.0) == 503
            await asyncio.sleep(0.01)
        assert await outcome(model, 0.0) == b"{}"
        assert len(workers) == 2

    with_model(test)


def test_a_worker_that_hangs_is_ended():
    async def test(model, workers):
        begin = time.monotonic()
        assert await outcome(model, 30) == 503
        assert time.monotonic() - begin < 10
        while not model.ready:
            await asyncio.sleep(0.01)
        assert await outcome(model, 0.0) == b"{}"

    with_model(test, stuck_s=0.3)


def test_a_model_that_does_not_load_is_an_error():
    class Broken(FakeWorker):
        def work(self):
            self.connection.send(Failed("the folder is damaged"))

    async def run():
        served = Served("fake", Path(), "vision", "classification", "fake")
        model = Model(Plan(served, start=Broken), Policy(), Metrics())
        with pytest.raises(cli.ManyheadsError, match="the folder is damaged"):
            await model.start()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--port", "70000"], "--port takes 0 to 65535"),
        (["model", "--queue", "0"], "--queue must be above 0"),
        (["model", "--deadline", "nan"], "--deadline must be above 0"),
        (["model", "--wait-ms", "-1"], "--wait-ms must be 0 or more"),
        (["a b=model"], "'a b' is no name for an address"),
        (["../=model"], "is no name for an address"),
        (["model", "--token-file", "nowhere"], "--token-file nowhere cannot be read: No such file"),
        (["model", "--prot", "1"], "did you mean '--port'?"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    assert cli.main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("runs/cats/model", "cats"),
        ("runs/cats/", "cats"),
        ("org/cats@v1", "cats"),
        ("x=org/cats", "x"),
        ("cats", "cats"),
    ],
)
def test_names_of_models(reference, name):
    assert serving.split(reference)[0] == name


def test_token_files(tmp_path, capsys):
    for content in ("short", "two words of some length", "ümlaute-sind-auch-keine"):
        (tmp_path / "token").write_text(content)
        assert cli.main(["serve", "model", "--token-file", str(tmp_path / "token")]) == 2
        assert "must hold one word of 16 ASCII characters or more" in capsys.readouterr().err


def test_help_imports_no_torch_and_no_server():
    code = (
        "import sys\n"
        "from manyheads.apps.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--token-file" in done.stdout


@pytest.fixture(scope="module")
def model(serving_tools, tmp_path_factory):
    return serving_tools.vision_model(tmp_path_factory.mktemp("serving") / "cct")


@pytest.fixture(scope="module")
def image(serving_tools):
    return {"content": serving_tools.encoded((30, 30)), "headers": {"content-type": "image/jpeg"}}


def test_a_token_is_asked_for_but_by_probes(serving_tools, model, image, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    with serving_tools.Local({"cct": model}, quiet=True, token_file=tmp_path / "token") as server:
        assert server.client.get("/livez").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/models/cct/predict", "/nothing"):
            answer = server.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "no_token")
        for wrong in (
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            TOKEN,
            "Bearer",
            "Basic ###",
            "Bearer ü".encode(),
        ):
            assert server.client.get("/v1/models", headers={"authorization": wrong}).status_code == 401
        right = {"authorization": f"Bearer {TOKEN}"}
        assert server.client.get("/v1/models", headers=right).status_code == 200
        assert server.client.get("/v1/models", auth=("anyone", TOKEN)).status_code == 200
        request = {**image, "headers": {**image["headers"], **right}}
        assert server.predict("cct", **request).status_code == 200
        schema = server.client.get("/openapi.json", headers=right).json()
        assert schema["security"] == [{"token": []}]


def test_every_answer_has_an_id_and_what_protects_browsers(serving_tools, model, image):
    with serving_tools.Local({"cct": model}, quiet=True) as server:
        for path in ("/livez", "/v1/models", "/nothing"):
            headers = server.client.get(path).headers
            assert headers["x-request-id"]
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
            assert "server" not in headers
        given = {"x-request-id": "job-7.1"}
        assert server.client.get("/nothing", headers=given).json()["error"]["request_id"] == "job-7.1"
        forged = {"x-request-id": "a\tb<script>"}
        assert "<" not in server.client.get("/nothing", headers=forged).headers["x-request-id"]
        assert server.client.get("/livez", headers={"host": "rebound.example"}).status_code == 421
        evil = {"headers": {**image["headers"], "origin": "http://evil.example"}}
        assert server.predict("cct", content=image["content"], **evil).status_code == 403


def test_metrics_and_openapi_tell_what_happened(serving_tools, model, image):
    with serving_tools.Local({"cct": model}, quiet=True) as server:
        assert server.predict("cct", **image).status_code == 200
        assert server.predict("cct", content=b"text", headers=image["headers"]).status_code == 422
        text = server.client.get("/metrics").text
        assert 'manyheads_requests_total{model="cct",status="200"} 1.0' in text
        assert 'manyheads_requests_total{model="cct",status="422"} 1.0' in text
        assert 'manyheads_records_total{kind="bad",model="cct"} 1.0' in text
        assert "manyheads_body_bytes 0.0" in text
        described = server.client.get("/openapi.json").json()
        assert described["openapi"].startswith("3.1")
        schemas = described["components"]["schemas"]
        assert schemas["VisionRequest"]["properties"]["images"]["maxItems"] == 64
        assert schemas["File"]["properties"]["data"]["contentEncoding"] == "base64"
        assert "probability" in schemas["cct.Rows"]["properties"]["rows"]["items"]["properties"]
        referred = set(json.dumps(described).split("#/components/schemas/")[1:])
        assert {each.split('"')[0] for each in referred} <= set(schemas)


def until(holds):
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(pid):
    """The worker processes of a server."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for each in lists for child in each.read_text().split()]
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_the_command_serves_survives_its_worker_and_drains(serving_tools, model, image, tmp_path):
    """Real workers: killed ones come back; SIGTERM finishes what was admitted, and the exit code is 0."""
    with serving_tools.Command(f"cct={model}", "--wait-ms", "1500", "--deadline", "120") as server:
        assert server.first.startswith("ready in ")
        assert server.predict("cct", **image).status_code == 200
        [worker] = workers_of(server.process.pid)
        with ThreadPoolExecutor(8) as pool:
            os.kill(worker, signal.SIGSTOP)
            asked = [pool.submit(server.predict, "cct", **image) for _ in range(4)]
            time.sleep(2.0)  # they are in the worker
            os.kill(worker, signal.SIGKILL)
            found = {each.result().status_code for each in asked}
            assert 503 in found
            assert found <= {200, 503}  # what was not in it yet is answered by the next one
            assert server.client.get("/livez").status_code == 200
            until(lambda: server.client.get("/readyz").status_code == 200)
            assert server.predict("cct", **image).status_code == 200
            [worker] = workers_of(server.process.pid)
            asked = [pool.submit(server.predict, "cct", **image) for _ in range(4)]
            time.sleep(0.5)  # they wait for others, in the queue: the next worker answers them
            os.kill(worker, signal.SIGKILL)
            assert [each.result().status_code for each in asked] == [200] * 4
            os.kill(workers_of(server.process.pid)[0], signal.SIGKILL)  # noticed without a request
            until(lambda: server.client.get("/readyz").status_code == 503)
            until(lambda: server.client.get("/readyz").status_code == 200)
            asked = [pool.submit(server.predict, "cct", **image) for _ in range(4)]
            time.sleep(0.7)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert server.client.get("/readyz").status_code == 503
            late = server.predict("cct", **image)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert [each.result().status_code for each in asked] == [200] * 4
        assert server.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            server.client.get("/livez")
    text = "".join(server.errors)
    assert "a worker process died; it is started anew" in text
    assert "Traceback" not in text
    assert str(tmp_path.parent) not in text


def test_a_second_signal_ends_at_once(serving_tools, model, image):
    options = (f"cct={model}", "--wait-ms", "20000", "--quiet")
    with serving_tools.Command(*options) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.predict, "cct", **image)
        time.sleep(0.5)
        begin = time.monotonic()
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(15) == 143
        assert time.monotonic() - begin < 15


def test_a_port_that_is_taken_and_a_damaged_model_are_said_in_a_line(serving_tools, model, tmp_path, capsys):
    from manyheads.apps.serving import run

    with run.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(model), "--port", str(port)]) == 2
        assert f"cannot listen at 127.0.0.1:{port} (Address already in use): choose another --port" in (
            capsys.readouterr().err
        )
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:-1] if file.suffix == ".safetensors" else content)
    with pytest.raises(AssertionError, match="damaged or replaced"), serving_tools.Command(damaged):
        pass

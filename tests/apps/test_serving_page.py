"""The page: what it shows, that it asks no one else, and in a browser filled, clicked and read.

The browser test is slow, and needs Chromium and playwright: `pytest -m slow tests/apps/test_serving_page.py`.
With MANYHEADS_PICTURES set to a folder it leaves pictures of the tools there: wide, narrow, light and dark.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from manyheads.apps.serving import tools as page_tools
from manyheads.apps.serving.payload import Blobs, Work

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ("vision", "timeseries", "recognition", "separation", "graph", "graph_tables", "recsys")


@pytest.fixture(scope="module")
def page(serving_tools, tmp_path_factory):
    cases = {name: serving_tools.CASES[name](tmp_path_factory.mktemp(name)) for name in NAMES}
    with serving_tools.Local({name: case.model for name, case in cases.items()}, ui=True) as server:
        yield server, cases


def test_the_page_loads_nothing_from_elsewhere(page):
    server, _ = page
    found = server.client.get("/", follow_redirects=True)
    assert found.status_code == 200 and found.url.path.startswith("/ui")
    policy = found.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "frame-ancestors 'none'" in policy
    for kind in ("src", "href"):
        for address in re.findall(rf'{kind}="(https?:)?//([^/"]+)', found.text):
            assert address[1].startswith("127.0.0.1"), address
    assert server.client.get("/favicon.ico").status_code == 204
    assert server.client.get("/v1/models").headers["content-security-policy"].startswith("default-src 'none'")


def test_a_tool_a_model(page):
    server, _ = page
    config = server.client.get("/ui/config").json()
    tabs = [each["props"].get("label") for each in config["components"] if each["type"] == "tabitem"]
    assert tabs == list(NAMES)
    buttons = {each["props"]["value"] for each in config["components"] if each["type"] == "button"}
    assert buttons >= {"Classify", "Forecast", "Transcribe", "Separate", "Predict", "Recommend"}
    assert {each["api_visibility"] for each in config["dependencies"]} == {"private"}


def test_an_answer_has_a_picture_where_it_is_asked_for(page):
    server, cases = page
    content = next(cases["vision"].inputs[0].iterdir()).read_bytes()
    model = server.service.models["vision"]
    work = Blobs("images", "image", (("a", content),))

    async def run(picture):
        answer = await server.service.predict(model, Work(work, {"top_k": 5}, picture=picture))
        return json.loads(answer.body)

    with_map, without = (
        asyncio.run_coroutine_threadsafe(run(picture), server.loop).result(60) for picture in (True, False)
    )
    assert "files" not in without and with_map["rows"] == without["rows"]
    assert page_tools._picture(with_map).size[0] == 384
    chances = page_tools._chances(with_map)
    assert len(chances) == 5 and 0 < sum(chances.values()) <= 1


def test_pictures_of_forecasts():
    hours = pd.date_range("2024-01-01", periods=48, freq="h")
    past = pd.DataFrame({"date": hours, "a": np.arange(48.0), "b": np.ones(48)})
    ahead = pd.date_range(hours[-1], periods=13, freq="h")[1:]
    forecasts = pd.concat(
        pd.DataFrame({"unique_id": name, "ds": ahead, "yhat": 1.0, "yhat_q0.1": 0.0, "yhat_q0.9": 2.0})
        for name in ("a", "b")
    )
    figure = page_tools._fan(past.to_csv(index=False).encode(), forecasts)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    assert all(len(axis.lines) == 2 and len(axis.collections) == 1 for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["past", "0.1 to 0.9", "forecast"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert list(page_tools._long(past).columns) == ["unique_id", "ds", "y"]
    assert page_tools._long(past[["date"]]) is None


def test_drawings_and_tables():
    assert page_tools._drawing("CCO").count("<svg") == 1
    assert ">C[C@@H](N)C-&gt;[Cu]</div>" in page_tools._drawing("C[C@@H](N)C->[Cu]")
    assert page_tools._drawing("no molecule") == page_tools._drawing("C" * 300) == ""
    assert page_tools._columns(b"a,b\n1,x\n,y\n") == {"a": [1.0, None], "b": ["x", "y"]}


def _fill(view, cases, tools, folder, sync_api):
    """Fill each tool, click, and wait for what comes; the tool's name and what is read."""

    def tab(name):
        found = view.get_by_role("tab", name=name, exact=True).filter(visible=True)
        if not found.count():  # a narrow window keeps some in a menu
            view.locator(".overflow-menu > button").click()
            found = view.locator(".overflow-dropdown button", has_text=re.compile(f"^\\s*{name}\\s*$"))
        found.first.click()
        return view.get_by_role("tabpanel").filter(visible=True)

    def files(panel, *paths):
        for place, path in enumerate(paths):
            panel.locator("input[type=file]").nth(place).set_input_files(str(path))
        view.wait_for_timeout(1500)

    panel = tab("vision")
    files(panel, next(cases["vision"].inputs[0].iterdir()))
    panel.get_by_role("button", name="Classify").click()
    panel.get_by_text(re.compile(r"class \d")).first.wait_for(timeout=60_000)
    panel.locator("img").nth(1).wait_for(timeout=60_000)
    yield "vision", panel

    panel = tab("timeseries")
    files(panel, cases["timeseries"].inputs[0])
    panel.get_by_role("button", name="Forecast").click()
    panel.locator("img").first.wait_for(timeout=60_000)
    yield "timeseries", panel

    talk = folder / "talk.wav"
    soundfile.write(talk, tools.sound(3.0), tools.RATE)
    panel = tab("recognition")
    files(panel, talk)
    panel.get_by_role("button", name="Transcribe").click()
    sync_api.expect(panel.get_by_label("Subtitles (SRT)")).to_have_value(re.compile("-->"), timeout=60_000)
    yield "recognition", panel

    panel = tab("separation")
    files(panel, talk)
    panel.get_by_role("button", name="Separate").click()
    panel.get_by_text(re.compile("talk.+[12]")).nth(1).wait_for(timeout=60_000)
    yield "separation", panel

    panel = tab("graph")
    panel.get_by_role("textbox").first.fill("\n".join(tools.SMILES))
    panel.get_by_role("button", name="Predict").click()
    panel.locator("svg rect, svg path.bond-0").first.wait_for(timeout=60_000)
    yield "graph", panel

    panel = tab("recsys")
    panel.get_by_role("textbox").first.fill("3\n5\n8")
    panel.get_by_role("button", name="Recommend").click()
    panel.get_by_text("score").first.wait_for(timeout=60_000)
    yield "recsys", panel


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_in_a_browser(page, serving_tools, tmp_path, width, scheme):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    server, cases = page
    pictures = Path(os.environ.get("MANYHEADS_PICTURES", tmp_path))
    asked: list[str] = []
    with sync_api.sync_playwright() as player:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = player.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", rules]
        )
        view = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        view.on("request", lambda request: asked.append(request.url))
        view.goto(f"{server.url}/ui/")
        view.get_by_role("button", name="Classify").wait_for(timeout=60_000)
        for name, _ in _fill(view, cases, serving_tools, tmp_path, sync_api):
            view.screenshot(path=pictures / f"{name}-{scheme}.png", full_page=True)
        browser.close()
    assert len(asked) > 20
    assert not [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]

"""The page of `manyheads serve --ui`: a tool a model, in a browser, without any outside request.

Gradio draws it, mounted on the server's own application. What a visitor gives goes the way of any request:
the same admission, deadlines and limits, the same rows. Uploads are kept for minutes, in a folder of this
process. Analytics, sharing, fonts of other hosts and the list of endpoints are off.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response

from manyheads.apps.serving.app import Service
from manyheads.apps.serving.guard import PAGE
from manyheads.apps.serving.payload import Payload, Served, Settings, Work
from manyheads.apps.serving.queue import Model, Refused
from manyheads.core import hub
from manyheads.core.errors import UsageError

KEPT_S = 600  # seconds that an upload stays, at most twice
Found: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[..., Awaitable[Found]]


def mount(app: FastAPI, service: Service) -> None:
    """Add the page to the server's application.

    Raises:
        UsageError: Gradio is missing.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="manyheads-page-"))
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise UsageError("--ui needs gradio: pip install 'manyheads[ui]'") from error
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

    @app.get("/", include_in_schema=False)
    async def start() -> RedirectResponse:
        return RedirectResponse(PAGE)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    gr.mount_gradio_app(
        app,
        page(service),
        path=PAGE,
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )


def page(service: Service) -> Any:
    """Return the page, a `gradio.Blocks`: a tab a model."""
    import gradio as gr

    from manyheads.apps.serving.tools import build

    with gr.Blocks(title="Manyheads", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as blocks:
        gr.Markdown("# Manyheads")
        with gr.Tabs():
            for name, model in service.models.items():
                served = model.plan.model
                with gr.Tab(name):
                    gr.Markdown(f"{_what(served)}, {served.task}")
                    build(served, asking(service, model))
    return blocks


def _what(served: Served) -> str:
    """The model's name, with that of the network in it where it has one."""
    base = hub.read_config(served.folder).arguments.get("base")
    return f"`{served.catalog_name}`" + (f" of `{base}`" if base else "")


def asking(service: Service, model: Model) -> Ask:
    """Return the function by which a tool asks a model: what it gives, and the rows that come of it."""
    import gradio as gr

    async def ask(payload: Payload, settings: Settings | None = None, picture: bool = False) -> Found:
        service.active += 1
        try:
            service.check_open()
            model.check_admission()
            answer = await service.predict(model, Work(payload, settings or {}, picture=picture))
        except Refused as error:
            raise gr.Error(error.problem.message, duration=None, print_exception=False) from None
        finally:
            service.active -= 1
        found: Found = json.loads(answer.body)
        for each in found["bad"]:
            gr.Warning(f"{each['id']}: {each['reason']}")
        return found

    return ask

"""The HTTP application: OpenAI's image interface, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from .. import __version__
from ..denoise import StepRecord
from ..errors import BusyError, HstError
from .answers import OutputFormat, ServerError, encode, error_body, model_entry, report, status_of
from .drawing import Drawn
from .guard import Guard
from .pictures import PictureStore
from .request import FieldError, ImageRequest
from .schema import PICTURE, REQUEST, RESPONSES
from .service import ImageService, Ticket

__all__ = ["make_app"]


def make_app(service: ImageService, *, keys: Sequence[str] = (), local: bool = False) -> FastAPI:
    """An application around a service, which it starts and closes with itself.

    Args:
        keys: see `hst_trt.server.guard.Guard`, which has `local` too.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="hst_trt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, keys=keys, body_bytes=service.limits.body_bytes, local=local)
    store = PictureStore()
    entry = model_entry(service.bundle, service.machine, service.limits)

    @app.exception_handler(HstError)
    async def refuse(_: Request, error: HstError) -> JSONResponse:
        headers = {"retry-after": str(error.retry_after)} if isinstance(error, BusyError) else None
        return JSONResponse(error_body(error), status_of(error), headers)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        refusal = ServerError(error.status_code, f"{request.method} is not possible there: {error.detail}")
        return JSONResponse(error_body(refusal), error.status_code, error.headers)

    @app.post("/v1/images/generations", openapi_extra=REQUEST, responses=RESPONSES)
    async def generate(request: Request) -> Response:
        """Draws pictures."""
        asked, drawing = await asyncio.to_thread(service.check, await _json(request))
        answering = _Answering(asked, str(request.base_url), store)
        if asked.stream:
            steps: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def on_step(t: int, count: int, record: StepRecord) -> None:
                event = {"step": t + 1, "steps": count, "stage": record.step.stage.value, "large_tokens": record.tokens}
                with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                    loop.call_soon_threadsafe(steps.put_nowait, event)

            ticket = service.submit(drawing, on_step)
            return StreamingResponse(_events(service, ticket, steps, answering), media_type="text/event-stream")
        ticket = service.submit(drawing)
        drawn = await _unless_gone(request, ticket)
        if drawn is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(await asyncio.to_thread(answering.whole, drawn, ticket.queued_seconds))

    @app.get("/v1/images/files/{name}", response_class=Response, responses=PICTURE)
    async def picture(name: str) -> Response:
        """A picture that was asked for by URL."""
        content = store.get(name)
        if content is None:
            raise ServerError(404, "there is no such picture", fix="draw it again; pictures are kept for an hour at most")
        return Response(content, media_type=f"image/{name.rpartition('.')[2]}")

    @app.get("/v1/models", responses={401: RESPONSES[401]})
    async def models() -> dict[str, Any]:
        """The one model that this server draws with."""
        return {"object": "list", "data": [entry]}

    @app.get("/health/live", responses={503: {"description": "It cannot."}})
    async def live() -> JSONResponse:
        """Whether this process can still be expected to draw; if not, it is to be started anew."""
        return JSONResponse({"status": service.state}, 503 if service.state == "failed" else 200)

    @app.get("/health/ready", responses={503: {"description": "Not now."}})
    async def ready() -> JSONResponse:
        """Whether requests should be sent here now."""
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """What runs here."""
        manifest = service.bundle.manifest
        return {
            "version": __version__,
            "bundle": manifest.name,
            "fingerprint": manifest.fingerprint,
            "backend": manifest.target.backend,
        }

    page = files("hst_trt.server") / "page"

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response((page / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    app.mount("/page", StaticFiles(directory=str(page)))
    return app


class _Answering:
    """Pictures in the form that a request asked for."""

    def __init__(self, asked: ImageRequest, base_url: str, store: PictureStore) -> None:
        self._format: OutputFormat = asked.output_format or "png"
        self._by_url = asked.response_format == "url"
        self._base_url, self._store = base_url, store

    def whole(self, drawn: Drawn, queued_seconds: float) -> dict[str, Any]:
        data = [self._image(drawn, k) for k in range(len(drawn.images))]
        return {"created": int(time.time()), "data": data, **self._common(drawn, queued_seconds)}

    def events(self, drawn: Drawn, queued_seconds: float) -> list[dict[str, Any]]:
        common = {"created_at": int(time.time()), **self._common(drawn, queued_seconds)}
        return [{"index": k, **self._image(drawn, k), **common} for k in range(len(drawn.images))]

    def _common(self, drawn: Drawn, queued_seconds: float) -> dict[str, Any]:
        size = f"{drawn.drawing.width}x{drawn.drawing.height}"
        return {"output_format": self._format, "size": size, "hst_trt": report(drawn, queued_seconds)}

    def _image(self, drawn: Drawn, k: int) -> dict[str, Any]:
        content = encode(drawn.images[k], self._format)
        if self._by_url:
            return {
                "url": f"{self._base_url}v1/images/files/{self._store.add(content, self._format)}",
                "seed": drawn.drawing.seed,
            }
        return {"b64_json": base64.b64encode(content).decode(), "seed": drawn.drawing.seed}


async def _json(request: Request) -> object:
    """The decoded body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send others to any server without asking it first
        raise ServerError(415, "a request is JSON", found=kind or "no content-type", fix="send content-type: application/json")
    try:
        return json.loads(await request.body(), object_pairs_hook=_once)
    except FieldError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as exc:
        raise FieldError("the body is not JSON", field=None, found=type(exc).__name__) from exc


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, refused if a name is in it twice: who checked the request before may have read the other value."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise FieldError("a field is there twice in one object", field=None, fix="give each once")
    return fields


async def _unless_gone(request: Request, ticket: Ticket) -> Drawn | None:
    """What was drawn; None, with the work given up, if the client has closed the connection."""

    async def closed() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    future: asyncio.Future[Any] = asyncio.wrap_future(ticket.future)
    gone: asyncio.Future[Any] = asyncio.create_task(closed())
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        return future.result() if future.done() else None
    finally:
        gone.cancel()
        future.cancel()


async def _events(
    service: ImageService, ticket: Ticket, steps: asyncio.Queue[dict[str, Any]], answering: _Answering
) -> AsyncIterator[str]:
    """Server-sent events: the place in the queue, each step, each picture, or an error. Closing it gives up the work."""
    future: asyncio.Future[Any] = asyncio.wrap_future(ticket.future)
    next_step: asyncio.Future[Any] = asyncio.create_task(steps.get())
    place: int | None = None
    try:
        while not future.done() or next_step.done():
            if next_step.done():
                yield _event("image_generation.progress", next_step.result())
                next_step = asyncio.create_task(steps.get())
            elif (now := service.position(ticket)) is not None and now != place:
                place = now
                yield _event("image_generation.queued", {"position": place})
            await asyncio.wait({future, next_step}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        for event in await asyncio.to_thread(answering.events, future.result(), ticket.queued_seconds):
            yield _event("image_generation.completed", event)
    except Exception as error:
        yield _event("error", error_body(error))
    finally:
        next_step.cancel()
        future.cancel()


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n"

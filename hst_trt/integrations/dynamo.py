"""A worker of NVIDIA Dynamo: its frontend answers HTTP and hands each request to one of many workers.

Dynamo finds the workers, spreads the requests and leaves out workers that died; `ImageService` checks, queues and draws. This
module joins the two. It was written for, and is tested with, ai-dynamo 1.6.1: which exception becomes which HTTP status, and
which takes a worker out of the routing, is that version's and stands nowhere in its documents.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ..errors import BusyError, DeadlineError, HstError, IncompatibleError, RequestError
from ..server.answers import encode, error_body
from ..server.drawing import Drawn
from ..server.request import FieldError, ImageRequest
from ..server.service import ImageService, Ticket

__all__ = ["make_engine", "request_fields", "run_worker"]

log = logging.getLogger(__name__)

_PASSED_ON_BY_FRONTEND = "media_passthrough"
_PROBE = "_HEALTH_CHECK"
_SHUTDOWN_SECONDS = "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT"


def run_worker(service: ImageService, model_name: str) -> None:
    """Serves until the process gets SIGTERM or SIGINT, and then until what it was given is answered.

    Discovery, namespace and transport are set by Dynamo's own environment variables, as its frontend's are.

    Raises:
        IncompatibleError: Dynamo's runtime could not start, or failed.
        HstError: the service failed.
    """
    engine = make_engine(service, model_name)
    from dynamo.common.backend.run import run
    from dynamo.common.backend.worker import WorkerConfig
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig
    from dynamo.llm import ModelInput

    # Dynamo ends a worker 30 seconds after it asked it to finish, which would lose what takes longer.
    os.environ.setdefault(_SHUTDOWN_SECONDS, str(math.ceil(service.deadline) + 10))

    async def engine_and_settings(argv: list[str] | None) -> tuple[Any, WorkerConfig]:
        environment = argparse.ArgumentParser()
        DynamoRuntimeArgGroup().add_arguments(environment)
        return engine, WorkerConfig.from_runtime_config(
            DynamoRuntimeConfig.from_cli_args(environment.parse_args([])),
            model_name,
            served_model_name=model_name,
            model_input=ModelInput.Text,
            endpoint_types="images",
            # The frontend hands a request to any worker of the endpoint, so each model needs one of its own.
            component=re.sub("[^A-Za-z0-9-]", lambda other: f"_{ord(other[0]):x}_", f"hst-trt-{model_name}"),
            endpoint="generate",
            enable_kv_routing=False,
        )

    try:
        run(type(engine), engine_factory=engine_and_settings)
    except HstError:
        raise
    except Exception as exc:
        if service.failure is not None:
            raise service.failure from exc
        raise IncompatibleError(
            "Dynamo's runtime ended the worker",
            found=str(exc),
            fix="set DYN_DISCOVERY_BACKEND, ETCD_ENDPOINTS and the like as for the frontend; docs/dynamo.md has them",
        ) from exc
    finally:
        service.close()
    if service.failure is not None:
        raise service.failure


def make_engine(service: ImageService, model_name: str) -> Any:
    """A service as Dynamo's DiffusionEngine, which starts and closes it."""
    from dynamo.common.backend.engine import DiffusionEngine, EngineConfig
    from dynamo.common.backend.health_check import build_raw_health_check_payload
    from dynamo.common.backend.metrics import register_engine_registry
    from dynamo.llm import exceptions

    def for_frontend(error: Exception) -> Exception:
        """The exception that becomes the status that our own server answers with. The frontend shows the text of 400 only."""
        message = error_body(error)["error"]["message"]
        if isinstance(error, RequestError):
            return exceptions.InvalidArgument(message)
        if isinstance(error, BusyError):
            # the frontend leaves out a worker for some seconds that says EngineShutdown, and none is left if all are busy
            return exceptions.EngineShutdown(message) if service.failure else exceptions.HttpError(503, message)
        if isinstance(error, DeadlineError):
            return exceptions.ConnectionTimeout(message)  # an HttpError of 504 would count as a dead worker
        return exceptions.Unknown(message)

    def leave_when_failed() -> None:
        """A worker that can draw no more ends, so that whoever started it starts another."""
        if service.wait_for("failed", "draining") == "failed":
            os.kill(os.getpid(), signal.SIGTERM)

    class Engine(DiffusionEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            self._answering = 0

        @classmethod
        async def from_args(cls, argv: list[str] | None = None) -> Any:
            raise NotImplementedError("`run_worker` makes the engine")

        async def start(self, worker_id: int) -> EngineConfig:
            service.start()
            await asyncio.to_thread(service.wait_for, "ready", "failed", "draining")
            if service.failure is not None:
                raise service.failure
            threading.Thread(target=leave_when_failed, daemon=True).start()
            return EngineConfig(model=model_name, served_model_name=model_name)

        async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
            self._answering += 1
            try:
                asked, drawing = await asyncio.to_thread(_checked, service, request)
                drawn = await _unless_stopped(service.submit(drawing), context)
                yield await asyncio.to_thread(_answer, asked, drawn)
            except _GivenUp:
                raise exceptions.Cancelled("the client has gone") from None
            except Exception as exc:
                raise for_frontend(exc) from exc
            finally:
                self._answering -= 1

        async def cleanup(self) -> None:
            await asyncio.to_thread(service.close)
            while self._answering:  # drawn, but not yet sent; what is left when this returns is cancelled
                await asyncio.sleep(0.01)

        async def health_check_payload(self) -> dict[str, Any]:
            return build_raw_health_check_payload({"prompt": "a probe", "num_inference_steps": 1, "schedule": "small"})

        async def register_prometheus(self, metrics: Any) -> None:
            register_engine_registry(metrics, service.metrics.registry)

    return Engine()


def request_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a client sent, without the model, by which the frontend has chosen the worker.

    The frontend keeps fields that it knows where they were and puts others from the top level into ``extra_args``. Others
    inside ``nvext`` it drops, so nobody can tell that they were sent.
    """
    known = {name: value for name, value in request.items() if name not in ("model", "extra_args", _PROBE)}
    return known | (request.get("extra_args") or {}).get(_PASSED_ON_BY_FRONTEND, {})


def _checked(service: ImageService, request: Mapping[str, Any]) -> Any:
    asked, drawing = service.check(request_fields(request))
    for field, wanted in (
        ("stream", asked.stream),
        ("details", drawing.details),
        ("response_format", asked.response_format == "url"),
    ):
        if wanted:
            raise FieldError(
                f"{field} cannot be had here",
                field=field,
                found="Dynamo's frontend passes on pictures as b64_json, whole, and nothing beside them",
                fix="leave it out, or use `hst-trt serve`",
            )
    return asked, drawing


class _GivenUp(Exception):
    """Nobody waits for the answer."""


async def _unless_stopped(ticket: Ticket, context: Any) -> Drawn:
    """What is drawn; gives it up when Dynamo says that the client has gone, which ends the work at its next step."""
    drawn, stopped = asyncio.wrap_future(ticket.future), context.async_killed_or_stopped()
    try:
        await asyncio.wait((drawn, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            raise _GivenUp
        return drawn.result()
    finally:
        drawn.cancel()
        stopped.cancel()


def _answer(request: ImageRequest, drawn: Drawn) -> dict[str, Any]:
    output_format = request.output_format or "png"
    pictures = [base64.b64encode(encode(image, output_format)).decode() for image in drawn.images]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": picture} for picture in pictures],
        "output_format": output_format,
        "size": f"{drawn.drawing.width}x{drawn.drawing.height}",
    }

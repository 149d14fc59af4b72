"""``hst-trt serve``: a bundle behind HTTP."""

from __future__ import annotations

import math
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ..errors import MissingError, RequestError
from .console import bars, messages
from .options import find_bundle, service_options

__all__ = ["serve"]

_SHORTEST_KEY = 16


@click.command()
@click.argument("bundle", required=False)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this machine's need keys."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keys that clients must send, one a line.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Pipelines, each with its own weights."
)
@click.option(
    "--max-steps", type=click.IntRange(min=1), default=100, show_default=True, help="Steps that a request may ask for."
)
@service_options
def serve(
    bundle: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    workers: int,
    max_steps: int,
    device: int,
    deadline: float,
    **settings: Any,
) -> None:
    """Serve pictures over HTTP: OpenAI's image interface, metrics, and a page to look at.

    \b
    hst-trt serve
    hst-trt serve engines/sd35-h100.hstb --host 0.0.0.0 --api-key-file keys.txt
    """
    try:
        import uvicorn

        from ..server.app import make_app
        from ..server.guard import is_loopback
        from ..server.request import Limits
        from ..server.service import ImageService
    except ImportError as exc:
        raise MissingError(
            "serving needs packages that are not here", found=str(exc), fix='pip install "hst_trt[serve]"'
        ) from exc

    local = is_loopback(host)
    keys = [] if api_key_file is None else _read_keys(api_key_file)
    if not local and not keys:
        raise RequestError(
            f"{host} can be reached from other machines, and no key would be asked for",
            fix="give --api-key-file, or leave out --host to serve this machine only",
        )
    listening = _listen(host, port)
    with bars() as progress:
        checking = progress.add_task("checking", total=None, note="MiB")
        service = ImageService(
            find_bundle(bundle, device),
            workers=workers,
            device=device,
            deadline=deadline,
            **settings,
            limits=Limits(steps=max_steps),
            on_hash=lambda done, total: progress.update(checking, completed=done >> 20, total=total >> 20),
        )
    app = make_app(service, keys=keys, local=local and not keys)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit  # a second signal of any kind ends at once
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            server_header=False,
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=math.ceil(deadline) + 5,  # every request has ended then: who still reads does not read
        )
    )

    def watch() -> None:
        if service.wait_for("ready", "failed", "draining") == "ready":
            shown, at = listening.getsockname()[:2]
            messages.print(f"{service.bundle.manifest.name} is ready on http://{f'[{shown}]' if ':' in shown else shown}:{at}")
        if service.wait_for("failed", "draining") == "failed":
            server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    # uvicorn drains on SIGTERM and then raises it once more, for whoever handled it before: to have drained is a good end
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server.run(sockets=[listening])
    finally:
        service.close(drain=not server.force_exit)
    if service.failure is not None:
        raise service.failure
    if server.force_exit:
        raise KeyboardInterrupt  # requests were given up: not the good end that draining is


def _listen(host: str, port: int) -> socket.socket:
    """Before anything is loaded: a port that is taken shows at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as exc:
        raise RequestError(
            f"cannot listen on {host}, port {port}",
            found=exc.strerror or str(exc),
            fix="give another --port, or --port 0 for a free one",
        ) from exc
    # taken over by every connection; asyncio sets it on sockets of its own making only, and without it an answer's second
    # packet waits 40 ms for the first to be acknowledged
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _read_keys(file: Path) -> list[str]:
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        found = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise RequestError(
            f"the key file {file} cannot be read", found=found, fix="give a text file with one key a line"
        ) from exc
    if not keys or min(map(len, keys)) < _SHORTEST_KEY:
        raise RequestError(
            f"the key file {file} has {'a key that is too short' if keys else 'no key'}",
            fix=f"write keys of at least {_SHORTEST_KEY} characters, one a line: `openssl rand -hex 32`",
        )
    if file.stat().st_mode & 0o007:
        messages.print(f"warning: everyone on this machine can read {file}; `chmod 600` it")
    return keys

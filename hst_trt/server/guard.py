"""What stands before the application: keys, the size of a body, whom a browser was sent by, and headers of every answer.

Plain ASGI, because it has to see a body before anything reads it, and must not stand between a stream and its client.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import ServerError, error_body, status_of

__all__ = ["Guard", "is_loopback"]

log = logging.getLogger(__name__)

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class _BodyTooLarge(Exception):
    pass


class Guard:
    """Refuses what should not reach the application.

    Args:
        keys: of which a request to ``/v1`` has to bring one as a bearer token; none for no check.
        body_bytes: the most that a body may have, whether its header says so or not.
        local: whether the server listens to this machine only. Then a request must name this machine, so that no page from
            elsewhere, whose name was made to mean this machine, can use it.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], body_bytes: int, local: bool) -> None:
        self._app, self._body_bytes, self._local = app, body_bytes, local
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, taken, answered = Headers(scope=scope), 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._body_bytes:
                raise _BodyTooLarge
            return message

        async def marked(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self._app(scope, counted, marked)
        except ServerError as exc:
            await _refuse(exc)(scope, receive, marked)
        except _BodyTooLarge:
            await _refuse(self._too_large())(scope, receive, marked)
        except Exception:
            log.exception("a request failed")
            if answered:
                raise
            await JSONResponse(error_body(RuntimeError()), 500)(scope, receive, marked)

    def _check(self, path: str, headers: Headers) -> None:
        named = _HOST.fullmatch(headers.get("host", "localhost"))
        if self._local and not (named and is_loopback(named[1].strip("[]"))):
            raise ServerError(421, "this server answers to this machine's own name only", fix="ask localhost or 127.0.0.1")
        if self._keys and path.startswith("/v1/") and not path.startswith("/v1/images/files/"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self._knows(key.strip()):
                raise ServerError(401, "a key is needed", fix="send a known one as `Authorization: Bearer KEY`")
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may take it to end where we do not
            raise ServerError(400, "the body has two lengths", fix="send content-length or transfer-encoding")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self._body_bytes:
            raise self._too_large()

    def _knows(self, key: str) -> bool:
        """Compares with every key in a time that tells nothing of any: digests are of one length."""
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._keys])

    def _too_large(self) -> ServerError:
        return ServerError(413, f"the body is larger than {self._body_bytes} bytes", fix="send less")


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, whoever says it."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _refuse(error: ServerError) -> JSONResponse:
    extra = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(error_body(error), status_of(error), headers={"connection": "close", **extra})

"""What all routes share: the key, the body, deadlines, the log line, and errors in one shape."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import files
from .database import Unavailable
from .errors import Refused, unavailable
from .keys import Holder
from .log import named, told
from .service import Service

_BEARER = re.compile(rb"bearer +([\x21-\x7e]{1,200})", re.IGNORECASE)
PART = 2**18
"""Bytes of an answer that a client has to take in the time of one part."""


def service_of(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


async def holder_of(request: Request, *, admin: bool = False) -> Holder:
    """Whom the request's key belongs to.

    Raises:
        Refused: the key is missing, malformed, unknown, revoked or expired, all with the same answer; or it is not the
            kind of key that the route needs.
    """
    given = [value for name, value in request.headers.raw if name.lower() == b"authorization"]
    if len(given) > 1:
        raise Refused(400, "Expected one Authorization header, got several. Send one.", "invalid_header")
    found = _BEARER.fullmatch(given[0]) if given else None
    key = found[1].decode("ascii") if found else ""
    holder = await run_in_threadpool(service_of(request).keys.holder, key)
    if holder is None:
        raise Refused(401, "The API key is not valid. Send a valid key as a Bearer token.", "invalid_api_key")
    if admin and not holder.admin:
        raise Refused(403, "This route needs an admin key. Use one.", "admin_only")
    if not admin and holder.policy is None:
        raise Refused(403, "An admin key has no policy, so it cannot draw. Use the key of a tenant.", "no_policy")
    return holder


def enter(request: Request, holder: Holder, times: int = 1) -> None:
    """Counts a request as open, from before its body is read until its answer was taken.

    Args:
        request: the request.
        holder: whose it is.
        times: how many times as many requests of the tenant may be open as it may have jobs.

    Raises:
        Refused: so many are open.
    """
    service = service_of(request)
    if service.open[holder.tenant] >= times * service.limits.tenant:
        message = "There are too many open requests of this tenant. Close some, or try again later."
        raise Refused(429, message, "too_many_open", retry=5)
    service.open[holder.tenant] += 1
    request.scope["efface.open"].append(holder.tenant)


async def body_of(request: Request) -> Any:
    """The JSON of a request, bounded in size, depth and time.

    Raises:
        Refused: it is too large, too slow, no JSON, names an entry twice, or comes with a query.
    """
    limits = service_of(request).limits
    if request.query_params:
        raise Refused(400, "Expected no query parameters, got some. Send fields in the body.", "unexpected_query")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Expected the content type application/json. Send JSON.", "invalid_content_type")
    try:
        async with asyncio.timeout(limits.read):
            content = await _read(request, limits.body)
    except TimeoutError:
        message = f"The body did not arrive within {limits.read:g} seconds. Send it faster."
        raise Refused(408, message, "request_timeout") from None
    try:
        files.parse(content)  # bounds the depth, which the next line does not
        return json.loads(content, object_pairs_hook=_once)
    except ValueError:
        message = "The body is not JSON, has NaN or infinity, or names an entry twice. Correct it."
        raise Refused(400, message, "invalid_json") from None


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. One that names an entry twice would mean one thing here and another to a filter before."""
    found = dict(entries)
    if len(found) < len(entries):
        raise ValueError("an entry occurs twice")
    return found


async def _read(request: Request, most: int) -> bytes:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise Refused(413, f"Expected a body of at most {most:,} bytes. Send a shorter one.", "body_too_large")
    return content


def refused(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that ends with `Refused`."""
    assert isinstance(error, Refused)
    service_of(request).metrics.rejected.labels(error.code).inc()
    return JSONResponse(error.body(), error.status, error.headers())


def broken(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that ends with an error of the server, without its text."""
    told("error", request=request.scope.get("efface.request"), error=named(error))
    if isinstance(error, Unavailable):
        return refused(request, unavailable("The database cannot be used now. Try again later."))
    return refused(request, Refused(500, "The server failed. Tell the operator.", "server_error"))


def missing(request: Request, error: Exception) -> JSONResponse:
    """The answer to unknown routes and methods, in the shape of the API."""
    status = int(getattr(error, "status_code", 404))
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    words = {404: "There is no such route. Correct the path.", 405: "The route has no such method. Use another one."}
    return refused(request, Refused(status, words.get(status, "The request is not valid. Correct it."), code))


class Edge:
    """The outermost layer: request ids, ambiguous framing, deadlines for slow readers, the log line and metrics.

    Args:
        app: the application.
        service: the service.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, began, status = f"req_{secrets.token_hex(12)}", time.monotonic(), 0
        scope["efface.request"], scope["efface.open"] = name, list[str]()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(b"x-request-id", name.encode()), (b"cache-control", b"no-store")]
                headers.append((b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": [*message["headers"], *headers]}
            try:
                for part in _parts(message):
                    async with asyncio.timeout(self.service.limits.send):
                        await send(part)
            except TimeoutError:
                raise OSError("the client does not read its answer") from None

        raw = [header.lower() for header, _ in scope["headers"]]
        try:
            if b"transfer-encoding" in raw and b"content-length" in raw:
                error = Refused(400, "Expected one kind of framing, got two. Send a content length.", "invalid_header")
                await JSONResponse(error.body(), 400, error.headers())(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        finally:
            for tenant in scope["efface.open"]:
                self._leave(tenant)
            self._tell(scope, name, status, time.monotonic() - began)

    def _leave(self, tenant: str) -> None:
        self.service.open[tenant] -= 1
        if self.service.open[tenant] <= 0:
            del self.service.open[tenant]

    def _tell(self, scope: Mapping[str, Any], name: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        told("request", request=name, method=scope["method"], route=route, status=status, seconds=round(seconds, 4))


def _parts(message: Message) -> Iterator[Message]:
    """A message in parts of bounded size, because a server takes a part whole, however slow its reader is."""
    body = message.get("body", b"")
    more = message.get("more_body", False)
    for k in range(0, max(len(body), 1), PART):
        end = k + PART >= len(body)
        yield message if end and not k else {**message, "body": body[k : k + PART], "more_body": more or not end}

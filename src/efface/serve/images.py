"""`POST /v1/images/generations`: from a request to a committed job, and from a finished job to an answer."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import sqlalchemy as sql
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from .. import checks
from .claims import Picture
from .database import Unavailable
from .errors import Refused, unavailable
from .fields import ImageRequest, batch_facts, cost_of, key_of, parsed, size_of
from .http import body_of, enter, holder_of, service_of
from .jobs import LIVE, Job, New
from .keys import Holder
from .log import named, told
from .policies import effective
from .service import Service
from .watch import PAUSE, Watcher

routes = APIRouter()
LOOK = 0.2
"""Seconds between two looks for the partial pictures of a stream."""
_TOKEN = re.compile(r"[\x21-\x7e]{1,200}")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route for its OpenAPI description."""
    content = {"application/json": {"schema": ERROR}}
    return {status: {"description": "An error.", "content": content} for status in statuses}


BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}
}
SECURED: dict[str, Any] = {"security": [{"key": []}]}


@routes.post(
    "/v1/images/generations",
    responses=documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=BODY | SECURED,
)
async def generate(request: Request) -> Response:
    """Draws pictures under the policy of the key."""
    service = service_of(request)
    holder = await holder_of(request)
    if service.draining.is_set():
        raise unavailable("The server is shutting down. Try again on another one.", "draining")
    enter(request, holder)
    asked, again = parsed(await body_of(request)), _idempotency(request)
    name = await run_in_threadpool(accept, service, holder, asked, again, request.scope["efface.request"])
    if asked.stream:
        partial = bool(asked.partial_images)
        events = _events(request, service, holder, name, again is not None, partial)
        return StreamingResponse(events, media_type="text/event-stream")
    await _wait(request, service, holder, name, again is not None)
    return JSONResponse(await run_in_threadpool(answer, service, holder, name))


def _idempotency(request: Request) -> str | None:
    given = request.headers.getlist("idempotency-key")
    if len(given) > 1 or not all(_TOKEN.fullmatch(each) for each in given):
        message = "Expected one Idempotency-Key of 1 to 200 ASCII characters without blanks. Correct it."
        raise Refused(400, message, "invalid_header")
    return given[0] if given else None


def accept(service: Service, holder: Holder, asked: ImageRequest, idempotency: str | None, request: str) -> str:
    """Commits a job for a request, and returns its id.

    Raises:
        Refused: the model or a size is unknown, the policy refuses the request, or the queue is full.
    """
    if asked.model not in (None, service.model):
        message = f"There is no model {checks.shown(asked.model)}. Use {service.model!r}."
        raise Refused(404, message, "model_not_found", "model")
    size = size_of(asked, service.sizes)
    stored = service.policies.latest(holder.policy or "")
    if stored is None:
        raise Refused(403, "The policy of this key does not exist. Tell the operator.", "no_policy")
    try:
        policy = effective(stored.policy, asked.also_erase)
    except ValueError as error:
        raise Refused(400, checks.short(str(error), 500), "invalid_value", "also_erase") from None
    if asked.partial_images and not policy.partial_pictures:
        message = "The policy of this key allows no partial pictures. Leave out `partial_images`."
        raise Refused(403, message, "no_partial_images", "partial_images")
    if asked.guidance_scale is not None:
        try:
            policy.check_guidance(asked.guidance_scale)
        except ValueError as error:
            raise Refused(400, str(error), "invalid_value", "guidance_scale") from None
    facts = batch_facts(asked, service.model, size, policy)
    cost = cost_of(asked, size)
    if idempotency is None:  # without a write, for floods
        _check_room(service, cost, *service.jobs.load(holder.tenant, service.model), more=1)
    row = {name: getattr(asked, name) for name in ("prompt", "negative_prompt", "also_erase", "output_compression")}
    row |= {"n": asked.rows, "quality": asked.quality or "auto", "output_format": asked.output_format or "png"}
    row["partial_images"] = asked.partial_images or 0
    seed = secrets.randbelow(checks.SEEDS - asked.rows) if asked.seed is None else asked.seed
    row |= {"seed": seed, "size": f"{size[0]}x{size[1]}", "call": facts}
    body_hash = service.audit.keyed(f"{holder.policy}\n{asked.model_dump_json()}")
    own = (holder.tenant, holder.key, stored.id, stored.policy.hash, service.model, key_of(facts))
    new = New(*own, asked.rows, cost, asked.all_steps, json.dumps(row), body_hash, idempotency)

    def also(connection: sql.Connection) -> None:
        entry = {"job": new.id, "tenant": holder.tenant, "key": holder.key, "policy": stored.policy.hash}
        entry |= {"request": request, "prompt": service.audit.keyed(asked.prompt)}
        service.keys.spend(connection, holder.key, cost)  # before the audit log, as when a key is revoked
        service.audit.add(connection, "job accepted", entry)

    name, _ = service.jobs.accept(new, also, lambda *load: _check_room(service, cost, *load))
    service.arrived.ring()
    return name


def _check_room(service: Service, cost: float, total: int, own: int, waiting: float, more: int = 0) -> None:
    """Raises Refused if the live jobs with this one, or with `more`, are too many."""
    if total + more > service.limits.queue or own + more > service.limits.tenant:
        whose = "the queue" if total + more > service.limits.queue else "the queue of this tenant"
        retry = service.metrics.retry_after(waiting + cost)
        raise Refused(429, f"There is no room in {whose}. Try again later.", "queue_full", retry=retry)


async def _wait(request: Request, service: Service, holder: Holder, name: str, keep: bool) -> None:
    """Waits until a job has ended. If the client leaves, the job is cancelled, unless it can be asked for again."""
    watcher: Watcher = request.app.state.watcher
    ended = False
    try:
        async for state, _, _ in watcher.follow(name, service.limits.wait):
            ended = state not in LIVE
            if not ended and await request.is_disconnected():
                raise Refused(499, "The client left. Send the request again.", "client_left")
        if not ended:
            message = f"The pictures were not ready within {service.limits.wait:g} seconds. Send the request later."
            raise Refused(504, message, "timeout")
    finally:
        if not ended and not keep:
            _give_up(service, holder, name)


def _give_up(service: Service, holder: Holder, name: str) -> None:
    """Cancels a job that nobody waits for, in a thread, because the task of its request may have been cancelled.

    While the server shuts down it is the server that leaves, so the job stays.
    """
    if service.draining.is_set():
        return

    def act() -> None:
        try:
            cancel(service, holder, name)
        except Unavailable as error:  # it is drawn, and its pictures expire
            told("not cancelled", job=name, error=named(error))

    asyncio.get_running_loop().run_in_executor(None, act)


def cancel(service: Service, holder: Holder, name: str) -> bool:
    """Cancels a job of the holder's tenant, and deletes its pictures."""

    def also(connection: sql.Connection) -> None:
        service.audit.add(connection, "job cancelled", {"job": name, "tenant": holder.tenant, "key": holder.key})

    return service.jobs.cancel(holder.tenant, name, also)


def answer(service: Service, holder: Holder, name: str) -> dict[str, Any]:
    """The answer of a finished job. Raises Refused with the job's error if it failed."""
    job = service.jobs.get(holder.tenant, name)
    if job is None:
        raise Refused(404, "There is no such job. Correct its id.", "not_found")
    if job.state == "cancelled":
        raise Refused(409, "The job was cancelled. Send the request again.", "cancelled")
    if job.error is not None:
        raise job.error
    pictures = service.jobs.pictures(name)
    if not pictures:
        raise Refused(404, "The pictures of this job were deleted. Send the request again.", "expired")
    if not any(each.content is not None for each in pictures):
        raise Refused(500, "The job has no picture. Tell the operator.", "server_error")
    return made(job, pictures)


def made(job: Job, pictures: list[Picture]) -> dict[str, Any]:
    """The answer in the shape of the images API. Blocked pictures are left out of `data`."""
    data = [{"b64_json": base64.b64encode(each.content).decode()} for each in pictures if each.content is not None]
    own = {"job": job.id, "policy": job.policy_hash, "rows": [_shown(each.record) for each in pictures]}
    return {"created": int(job.created), "data": data, **_format(job.request), "background": "opaque", "efface": own}


def _format(request: Mapping[str, Any]) -> dict[str, Any]:
    return {name: request[name] for name in ("output_format", "size", "quality")}


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a tenant sees of a row's record."""
    acted = [{name: each[name] for name in ("concepts", "steps", "calls")} for each in record["acted"]]
    deltas = [{name: each[name] for name in ("concepts", "sha256")} for each in record["deltas"]]
    return {"outcome": record["outcome"], "policy": record["policy"], "acted": acted, "deltas": deltas}


class _PartialEvents:
    """The events of the partial pictures of a job, each once.

    Args:
        service: the service.
        holder: whose job it is.
        name: the id of the job.
        wanted: whether the request asked for any.
    """

    def __init__(self, service: Service, holder: Holder, name: str, wanted: bool) -> None:
        self._service, self._holder, self._name = service, holder, name
        self._wanted, self._next, self._looked = wanted, 0, 0.0

    async def new(self, *, now: bool = False) -> list[str]:
        """Those that were not returned yet. It asks the database only now and then, or `now`."""
        if not self._wanted or (not now and time.monotonic() - self._looked < LOOK):
            return []
        self._looked = time.monotonic()
        return await run_in_threadpool(self._found)

    def _found(self) -> list[str]:
        job = self._service.jobs.get(self._holder.tenant, self._name)
        found = self._service.jobs.partial(self._name, self._next) if job is not None else []
        made = []
        for number, content in found:
            self._next = number + 1
            facts = {"created_at": int(job.created), **_format(job.request), "background": "opaque"}  # type: ignore[union-attr]
            facts |= {"b64_json": base64.b64encode(content).decode(), "partial_image_index": number}
            made.append(_event("image_generation.partial_image", facts))
        return made


def _event(kind: str, facts: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n"


async def _events(
    request: Request, service: Service, holder: Holder, name: str, keep: bool, partial: bool
) -> AsyncIterator[str]:
    """Progress as comments and partial pictures, then a picture per event, or the error."""
    watcher: Watcher = request.app.state.watcher
    ended, last, partial_events = False, -1, _PartialEvents(service, holder, name, partial)
    yield f": accepted {name}\n\n"
    try:
        async for state, step, steps in watcher.follow(name, service.limits.wait, LOOK if partial else PAUSE):
            ended = state not in LIVE
            if step != last and not ended:
                last = step
                yield f": step {step} of {steps}\n\n"
            for event in () if ended else await partial_events.new():
                yield event
        if not ended:
            raise Refused(504, "The pictures were not ready in time. Send the request again later.", "timeout")
        found = await run_in_threadpool(answer, service, holder, name)
        for event in await partial_events.new(now=True):
            yield event
    except (Refused, Unavailable) as error:
        if isinstance(error, Unavailable):
            error = unavailable("The database cannot be used now. Try again later.")
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    finally:
        if not ended and not keep:  # the client left, or the time is over
            _give_up(service, holder, name)
    for each in found.pop("data"):
        yield _event("image_generation.completed", {"created_at": found["created"], **each, **found})
    yield "data: [DONE]\n\n"

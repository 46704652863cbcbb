"""The routes of Efface: models, jobs, policies and health."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from .. import checks, core
from .errors import Refused
from .fields import MOST_ROWS, MOST_STEPS, STEPS
from .http import body_of, enter, holder_of, service_of
from .images import SECURED, answer, cancel, documented
from .jobs import LIVE, Job
from .keys import Holder
from .policies import Stored
from .service import Service
from .watch import Watcher

routes = APIRouter()
NO_JOB = Refused(404, "There is no such job. Correct its id.", "not_found")


@routes.get("/v1/models", responses=documented(400, 401, 403), openapi_extra=SECURED)
async def models(request: Request) -> Response:
    """The model that is served, as a list."""
    await holder_of(request)
    return JSONResponse({"object": "list", "data": [_model(service_of(request))]})


@routes.get("/v1/models/{name:path}", responses=documented(400, 401, 403, 404), openapi_extra=SECURED)
async def model(request: Request, name: str) -> Response:
    """The model that is served."""
    await holder_of(request)
    if name != service_of(request).model:
        raise Refused(404, f"There is no model {checks.shown(name)}. List the models.", "model_not_found")
    return JSONResponse(_model(service_of(request)))


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": 0, "owned_by": "efface"}


@routes.get("/v1/efface/me", responses=documented(400, 401, 403), openapi_extra=SECURED)
async def me(request: Request) -> Response:
    """What a key may do: its policy in short, the model, and the bounds of a request."""
    service, holder = service_of(request), await holder_of(request)
    stored = await run_in_threadpool(service.policies.latest, holder.policy or "")
    if stored is None:
        raise Refused(403, "The policy of this key does not exist. Tell the operator.", "no_policy")
    erased = [concept.name for concept in stored.policy.concepts]
    policy: dict[str, Any] = {"name": stored.name, "version": stored.policy.version, "hash": stored.policy.hash}
    policy |= {"unguarded": stored.policy.unguarded, "erase": erased, "gate": stored.policy.gate is not None}
    policy["partial_pictures"] = stored.policy.partial_pictures
    facts: dict[str, Any] = {"tenant": holder.tenant, "policy": policy, "model": service.model}
    facts |= {"sizes": [f"{width}x{height}" for width, height in service.sizes], "most_images": MOST_ROWS}
    facts |= {"steps": STEPS["auto"], "most_steps": MOST_STEPS}
    facts["concepts"] = [name for name in core.shipped_concepts() if name not in erased]
    return JSONResponse(facts)


# ---------------------------------------------------------------- jobs


async def _job(request: Request, name: str) -> tuple[Service, Holder, Job]:
    service, holder = service_of(request), await holder_of(request)
    job = await run_in_threadpool(service.jobs.get, holder.tenant, name)
    if job is None:
        raise NO_JOB
    return service, holder, job


@routes.get("/v1/efface/jobs/{name}", responses=documented(400, 401, 403, 404, 429), openapi_extra=SECURED)
async def job(request: Request, name: str) -> Response:
    """The state of a job, and its answer or its error if it has ended."""
    service, holder, found = await _job(request, name)
    enter(request, holder)
    facts: dict[str, Any] = {"id": found.id, "state": found.state, "step": found.step, "steps": found.steps}
    facts |= {"created": int(found.created), "error": None, "result": None}
    if found.state not in LIVE:
        try:
            facts["result"] = await run_in_threadpool(answer, service, holder, name)
        except Refused as error:
            facts |= error.body()
    return JSONResponse(facts)


@routes.delete("/v1/efface/jobs/{name}", responses=documented(400, 401, 403, 404, 429), openapi_extra=SECURED)
async def delete(request: Request, name: str) -> Response:
    """Cancels a job, and deletes its pictures."""
    service, holder, _ = await _job(request, name)
    enter(request, holder, 2)  # who has as many open requests as it may have, may end them
    if not await run_in_threadpool(cancel, service, holder, name):
        raise NO_JOB
    return JSONResponse({"id": name, "deleted": True})


@routes.get("/v1/efface/jobs/{name}/events", responses=documented(400, 401, 403, 404, 429), openapi_extra=SECURED)
async def events(request: Request, name: str) -> Response:
    """The progress of a job, as server-sent events. If the reader leaves, the job goes on."""
    service, holder, _ = await _job(request, name)
    enter(request, holder)
    watcher: Watcher = request.app.state.watcher

    async def told() -> AsyncIterator[str]:
        last: tuple[str, int, int] | None = None
        async for now in watcher.follow(name, service.limits.wait):
            if now != last:
                last = now
                yield f"data: {json.dumps(dict(zip(('state', 'step', 'steps'), now, strict=True)))}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(told(), media_type="text/event-stream")


# ---------------------------------------------------------------- policies


def _shown(stored: Stored) -> dict[str, Any]:
    return {"name": stored.name, "hash": stored.policy.hash, **stored.policy.as_json()}


@routes.get("/v1/efface/policies", responses=documented(400, 401, 403), openapi_extra=SECURED)
async def policies(request: Request) -> Response:
    """The latest version of each policy. Needs an admin key."""
    await holder_of(request, admin=True)
    found = await run_in_threadpool(service_of(request).policies.list)
    return JSONResponse({"object": "list", "data": [_shown(each) for each in found]})


@routes.get("/v1/efface/policies/{name}", responses=documented(400, 401, 403, 404), openapi_extra=SECURED)
async def policy(request: Request, name: str) -> Response:
    """The latest version of a policy. Needs an admin key."""
    await holder_of(request, admin=True)
    found = await run_in_threadpool(service_of(request).policies.latest, name)
    if found is None:
        raise Refused(404, "There is no such policy. Correct its name.", "not_found")
    return JSONResponse(_shown(found))


POLICY = {
    "type": "object",
    "properties": {name: {} for name in ("erase", "deltas", "gate", "partial_pictures", "unguarded")},
    "additionalProperties": False,
}


@routes.put(
    "/v1/efface/policies/{name}",
    responses=documented(400, 401, 403, 408, 413, 415),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": POLICY}}}} | SECURED,
)
async def store(request: Request, name: str) -> Response:
    """Stores a new version of a policy, which acts from the next request on. Needs an admin key."""
    holder = await holder_of(request, admin=True)
    body = await body_of(request)
    if not isinstance(body, dict):
        raise Refused(400, "Expected the entries of a policy as a JSON object. Correct the body.", "invalid_value")
    try:
        found = await run_in_threadpool(service_of(request).policies.add, name, body, holder.key)
    except (ValueError, TypeError) as error:
        raise Refused(400, checks.short(str(error), 500), "invalid_policy") from None
    return JSONResponse(_shown(found))


# ---------------------------------------------------------------- health


@routes.get("/healthz")
async def healthz() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@routes.get("/readyz", responses=documented(503))
async def readyz(request: Request) -> Response:
    """The database answers and has room, a worker is warm and draws, and the server is not shutting down."""
    service = service_of(request)
    try:
        with anyio.fail_after(5.0):
            there = await anyio.to_thread.run_sync(service.database.usable, abandon_on_cancel=True)
    except (OSError, ValueError):  # also `Unavailable`, and a time-out
        there = False
    warm = service.warm.is_set() and not service.stalled.is_set()
    facts = {"database": there, "worker": warm, "draining": service.draining.is_set()}
    ready = facts["database"] and facts["worker"] and not facts["draining"]
    return JSONResponse(facts | {"status": "ready" if ready else "not ready"}, 200 if ready else 503)

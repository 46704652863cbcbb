"""A worker: claims whole batches, draws them, and finishes each job once."""

from __future__ import annotations

import contextvars
import functools
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sql

from .. import files
from ..guard import DELIVERED
from ..progress import Cancelled
from .backend import REFUSALS, Backend, Drawn, Row, encoded
from .database import Unavailable
from .errors import Refused
from .fair import Fair
from .jobs import LOST, Claim, Picture
from .leases import Leases
from .log import named, told
from .policies import effective
from .pulse import Pulse
from .service import Service

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..guard import Policy

FAILURES = (RuntimeError, ValueError, TypeError, OSError, MemoryError)
PAUSE = 0.05
EXPIRE = 60.0
"""Seconds between deletions of old jobs."""
T = TypeVar("T")


class Worker(threading.Thread):
    """Draws the queued jobs until it is stopped. An error of unknown kind ends it; others take its jobs.

    Args:
        service: the service.
        backend: what draws.
        name: its name in the table of jobs. None: a random one.
    """

    def __init__(self, service: Service, backend: Backend, name: str | None = None) -> None:
        super().__init__(name=name or f"worker-{secrets.token_hex(6)}", daemon=True)
        self._service, self._backend, self._jobs = service, backend, service.jobs
        self._fair, self._leases = Fair(service.limits.rows), Leases(service.limits.lease)
        self._stop_asked = threading.Event()
        self._swept = self._expired = -EXPIRE
        self._entry: tuple[int, str] | None = None  # the last one of the audit log, when it was looked for
        self._shown: dict[str, list[str]] = {}  # job to the SHA-256 of its partial pictures
        self._context = contextvars.copy_context()  # what the caller allows, such as downloads of detectors

    def run(self) -> None:
        self._context.run(self._run)

    def _run(self) -> None:
        self._service.warm.set()
        try:
            while not self._stop_asked.is_set():
                try:
                    drew = self.once()
                except Unavailable:
                    self._leases.forget()
                    self._stop_asked.wait(1.0)
                    continue
                if not drew:
                    self._stop_asked.wait(PAUSE)
        finally:
            self._service.warm.clear()

    def stop(self) -> None:
        """Ends the worker after its batch."""
        self._stop_asked.set()

    def once(self) -> int:
        """Draws one batch, and returns the number of its jobs; 0 if none is queued."""
        self._sweep()
        waiting = self._jobs.waiting(self._service.model)
        self._service.metrics.queue.set(len(waiting))
        chosen = self._fair.choose(waiting)
        claims = self._jobs.claim([job.id for job in chosen], self.name) if chosen else []
        if claims:
            self._draw(claims)
        return len(claims)

    def _sweep(self) -> None:
        """Takes jobs from workers that died, and deletes old pictures."""
        now, limits = time.monotonic(), self._service.limits
        if now - self._swept < limits.lease / 5:
            return
        self._swept = now
        for name, fence, beat in self._leases.dead(self._jobs.running()):
            self._jobs.release(name, fence, beat, self._lost(name))
        self._check_log()
        if now - self._expired >= min(EXPIRE, limits.keep):
            self._expired = now
            self._jobs.expire(limits.keep)

    def _check_log(self) -> None:
        """Tells if the end of the audit log was cut off while this worker runs, which the chain does not show."""
        audit, metrics = self._service.audit, self._service.metrics
        if self._entry is not None and not audit.has(*self._entry):
            told("audit log cut off", entry=self._entry[0])
            metrics.cut.inc()
        self._entry = audit.last()
        metrics.entries.set(self._entry[0])

    def _lost(self, name: str) -> Callable[[sql.Connection, str], None]:
        """Writes the end of a job that workers lost to the audit log."""

        def also(connection: sql.Connection, state: str) -> None:
            facts = {"job": name, "state": state, "error": LOST.code, "rows": [], "worker": self.name}
            self._service.audit.add(connection, "job finished", facts)

        return also

    # ---- one batch

    def _draw(self, claims: Sequence[Claim]) -> None:
        with Pulse(self._service, claims) as pulse:
            self._work(claims, pulse)
        if pulse.missed:
            self._leases.forget()

    def _work(self, claims: Sequence[Claim], pulse: Pulse) -> None:
        ready: list[tuple[Claim, list[Row]]] = []
        for claim in claims:
            try:
                rows = self._stubborn(functools.partial(self._rows, claim))
            except Refused as error:
                self._finish(claim, [], error)
                continue
            if rows is None:  # stopped without the database: others take the jobs
                return
            ready.append((claim, rows))
        if not ready:
            return
        began = time.monotonic()
        drawn, failure = self._attempt(ready, pulse)
        if drawn:
            seconds, cost = time.monotonic() - began, sum(claim.cost for claim, _ in ready)
            self._service.metrics.drew(len(drawn), cost, seconds)
            for claim, some in ready:
                mine, drawn = drawn[: len(some)], drawn[len(some) :]
                self._deliver(claim, [_proven(row, each) for row, each in zip(some, mine, strict=True)])
        elif failure is not None and len(ready) > 1:  # one request may spoil the batch of others
            for claim, _ in ready:
                self._work([claim], pulse)
        else:
            for claim, _ in ready:
                self._finish(claim, [], CANCELLED if failure is None else _failed(failure))

    def _attempt(
        self, ready: Sequence[tuple[Claim, list[Row]]], pulse: Pulse
    ) -> tuple[list[Drawn], BaseException | None]:
        """The rows of a batch, or the error of the drawing; neither if nobody waits for it any more."""
        owned = [(claim, row) for claim, some in ready for row in some]
        call, made = ready[0][0].request["call"], list[Drawn]()
        try:
            with pulse.drawing({claim.id for claim, _ in ready}) as on_step:
                most = self._service.limits.rows
                for k in range(0, len(owned), most):  # a job may have more rows than fit
                    part = owned[k : k + most]
                    show = functools.partial(self._show, part)
                    made += self._backend.draw([row for _, row in part], call, on_step, show)
            return made, None
        except Cancelled:
            return [], None
        except FAILURES as error:
            told("drawing failed", error=named(error), jobs=[claim.id for claim, _ in ready])
            return [], error

    def _show(self, owned: Sequence[tuple[Claim, Row]], k: int, number: int, picture: Image) -> None:
        """Stores a partial picture. One that cannot be stored now is left out."""
        claim, row = owned[k]
        content = self._encoded(claim, picture, row.policy.hash)
        try:
            if self._jobs.show(claim, number, content):
                self._shown.setdefault(claim.id, []).append(files.sha256(content))
        except Unavailable as error:
            told("partial picture left out", job=claim.id, error=named(error))

    def _rows(self, claim: Claim) -> list[Row]:
        """The rows of a job. Raises Refused if its policy is not the stored one, or its prompt is too long."""
        request = claim.request
        try:
            stored = self._service.policies.version(claim.policy)
            policy = None if stored is None else effective(stored.policy, request["also_erase"])
        except ValueError:
            policy = stored = None
        if stored is None or policy is None or stored.policy.hash != claim.policy_hash:
            raise Refused(
                500, "The policy of this request is not the stored one. Tell the operator.", "policy_not_applied"
            )
        for name in ("prompt", "negative_prompt"):
            if request[name] and (lost := self._backend.cut_off(request[name])):
                got = f"got one that is {len(lost)} characters too long"  # errors are kept, so it quotes nothing
                message = f"Expected a `{name}` that the model reads to its end, {got}. Shorten it."
                raise Refused(400, message, "prompt_too_long", name)
        self._check(policy, bool(request["also_erase"]))
        partial = int(request.get("partial_images", 0))  # jobs of earlier versions have none
        if partial and not self._backend.shows:
            message = "This model shows no partial pictures. Leave out `partial_images`."
            raise Refused(400, message, "invalid_value", "partial_images")
        seeds = range(request["seed"], request["seed"] + claim.rows)
        return [Row(request["prompt"], request["negative_prompt"], seed, policy, partial) for seed in seeds]

    def _check(self, policy: Policy, more: bool) -> None:
        """Raises Refused if the policy cannot draw, so that it does not spoil a batch."""
        try:
            self._backend.check(policy)
        except REFUSALS as error:
            told("policy refused", policy=policy.hash, error=named(error), why=str(error))
            if more:
                message = "The policy of this key cannot act with `also_erase`. Leave it out, or tell the operator."
                raise Refused(400, message, "invalid_value", "also_erase") from None
            raise Refused(500, "The policy of this key cannot act. Tell the operator.", "policy_not_applied") from None

    def _deliver(self, claim: Claim, drawn: Sequence[Drawn]) -> None:
        """Finishes a job with its pictures, unless a row is not proven or all are blocked."""
        metrics = self._service.metrics
        for each in drawn:
            for seen in each.record["detections"]:
                for concept in seen:
                    metrics.hits.labels(concept).inc()
        error = None
        if unproven := [each for each in drawn if each.record["outcome"] == "not proven"]:
            metrics.unproven.inc(len(unproven))
            message = (
                "The record does not prove that the policy acted, so the pictures are withheld. Tell the operator."
            )
            error = Refused(500, message, "policy_not_applied")
        elif all(each.picture is None for each in drawn):
            message = "A detector found erased concepts in every picture. Change the prompt."
            error = Refused(403, message, "content_blocked", "prompt")
        pictures = [self._picture(claim, each) for each in drawn]
        self._finish(claim, pictures, error)

    def _picture(self, claim: Claim, drawn: Drawn) -> Picture:
        record = dict(drawn.record)
        if drawn.picture is None:
            return Picture(None, record)
        content = self._encoded(claim, drawn.picture, str(record["policy"]))
        return Picture(content, record | {"sha256": files.sha256(content)})

    def _encoded(self, claim: Claim, picture: Image, policy: str) -> bytes:
        facts, request = {"efface:model": self._service.model, "efface:policy": policy}, claim.request
        return encoded(picture, request["output_format"], request["output_compression"], facts)

    def _finish(self, claim: Claim, pictures: Sequence[Picture], error: Refused | None) -> None:
        request = claim.request
        facts = {
            "job": claim.id,
            "tenant": claim.tenant,
            "key": claim.key,
            "policy": claim.policy_hash,
            "also_erase": request["also_erase"],
            "model": self._service.model,
            "call": request["call"],
            "seed": request["seed"],
            "prompt": self._service.audit.keyed(request["prompt"]),
            "error": None if error is None else error.code,
            "rows": [each.record for each in pictures],
            "partial_pictures": list(dict.fromkeys(self._shown.pop(claim.id, []))),
            "worker": self.name,
        }

        def also(connection: sql.Connection, state: str) -> None:
            self._service.audit.add(connection, "job finished", facts | {"state": state})

        if state := self._stubborn(lambda: self._jobs.finish(claim, pictures, error, also)):
            self._service.metrics.finished.labels(state).inc()

    def _stubborn(self, act: Callable[[], T]) -> T | None:
        """Tries again while the database is away. None if the worker is stopped meanwhile."""
        while True:
            try:
                return act()
            except Unavailable:
                if self._stop_asked.wait(0.5):
                    return None


CANCELLED = Refused(409, "The request was cancelled. Send it again.", "cancelled")


def _proven(row: Row, drawn: Drawn) -> Drawn:
    """A row, which has a picture only if its record is that of its own policy, with each concept and each delta."""
    record, policy = drawn.record, row.policy
    deltas = [each["sha256"] for each in record["deltas"]] == [each.sha256 for each in policy.deltas]
    acted = {name for each in record["acted"] for name in each["concepts"]}
    if record["outcome"] not in DELIVERED:
        return Drawn(None, record)
    if record["policy"] == policy.hash and deltas and all(c.name in acted for e in policy.erase for c in e.concepts):
        return drawn
    return Drawn(None, {**record, "outcome": "not proven", "why": "the record is not that of the row's policy"})


def _failed(error: BaseException) -> Refused:
    """The error of a drawing that failed. Its text stays in the server's log."""
    return Refused(500, f"Drawing failed with {type(error).__name__}. Tell the operator.", "drawing_failed")

"""A worker: claims whole batches, draws them, and finishes each job once."""

from __future__ import annotations

import contextvars
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from ..guard import DELIVERED
from ..progress import Cancelled
from .backend import REFUSALS, Backend, Drawn, Row
from .claims import Claim, End
from .database import Unavailable
from .ends import Done, Ends
from .errors import Refused
from .fair import Fair
from .jobs import EXPIRED, MOST
from .leases import Leases
from .log import named, told
from .policies import effective
from .pulse import Pulse
from .service import Service

if TYPE_CHECKING:
    from ..guard import Policy

FAILURES = (RuntimeError, ValueError, TypeError, OSError, MemoryError)
PAUSE, SELDOM = 0.05, 0.25
"""Seconds between two looks for jobs: if no application of this process could ring, and if one can."""
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
        self._ends = Ends(service, self.name)
        self._ending: list[Future[None]] = []  # of the batch before
        self._stop_asked, self._woken = threading.Event(), threading.Event()
        self._missed = threading.Event()  # heartbeats, since the last sweep
        self._swept = self._expired = -EXPIRE
        self._entry: tuple[int, str] | None = None  # the last one of the audit log, when it was looked for
        self._context = contextvars.copy_context()  # what the caller allows, such as downloads of detectors

    def run(self) -> None:
        self._context.run(self._run)

    def _run(self) -> None:
        service = self._service
        with (
            service.arrived.heard(self._woken.set),
            service.ended.ringing(),
            ThreadPoolExecutor(1, f"{self.name}-ends") as background,
        ):
            service.warm.set()
            try:
                while not self._stop_asked.is_set():
                    self._turn(background)
                self._settle()
            finally:
                service.warm.clear()

    def _turn(self, background: Executor) -> None:
        """Draws a batch, or waits for jobs."""
        self._woken.clear()
        try:
            if self.once(background):
                return
        except Unavailable:
            self._missed.set()
            self._stop_asked.wait(1.0)
            return
        self._woken.wait(min(SELDOM, self._service.limits.lease / 5) if self._service.arrived.rings else PAUSE)

    def stop(self) -> None:
        """Ends the worker after its batch."""
        self._stop_asked.set()
        self._woken.set()

    def once(self, background: Executor | None = None) -> int:
        """Draws one batch, and returns the number of its jobs; 0 if none is queued.

        Args:
            background: ends the jobs while the next batch is drawn. None: they have ended when it returns.
        """
        self._sweep()
        waiting = self._jobs.waiting(self._service.model, max(MOST, self._service.limits.queue))
        self._service.metrics.queue.set(len(waiting))
        chosen = self._fair.choose(waiting)
        if any(job.again for job in chosen):  # it may end workers, so no other job is drawn or ends beside it
            self._settle()
            background = None
        claims = self._jobs.claim([job.id for job in chosen], self.name) if chosen else []
        if claims:
            self._draw(claims, background)
        else:
            self._settle()
        return len(claims)

    def _sweep(self) -> None:
        """Takes jobs from workers that died, and deletes old pictures."""
        now, limits = time.monotonic(), self._service.limits
        if now - self._swept < limits.lease / 5:
            return
        self._swept = now
        if self._missed.is_set():
            self._missed.clear()
            self._leases.forget()
        for name, fence, beat in self._leases.dead(self._jobs.running()):
            self._jobs.release(name, fence, beat, self._ends.lost(name))
        self._check_log()
        if now - self._expired >= min(EXPIRE, limits.keep) and self._jobs.expire(limits.keep) < EXPIRED:
            self._expired = now  # else there are more, for the next sweep

    def _check_log(self) -> None:
        """Tells if the end of the audit log was cut off while this worker runs, which the chain does not show."""
        audit, metrics = self._service.audit, self._service.metrics
        if self._entry is not None and not audit.has(*self._entry):
            told("audit log cut off", entry=self._entry[0])
            metrics.cut.inc()
        self._entry = audit.last()
        metrics.entries.set(self._entry[0])

    # ---- one batch

    def _draw(self, claims: Sequence[Claim], background: Executor | None) -> None:
        pulse = Pulse(self._service, claims, self._missed.set)
        if background is None:
            with pulse:
                for done in self._work(claims, pulse):
                    self._end(done)
            return
        pulse.start()
        ending = list[Future[None]]()
        try:
            for done in self._work(claims, pulse):
                self._settle()  # pictures of one batch at most wait
                ending.append(background.submit(self._end, done))
        finally:
            self._ending += [*ending, background.submit(pulse.end)]

    def _settle(self) -> None:
        """Waits until the jobs of the batch before have ended. Raises what went wrong with them."""
        while self._ending:
            self._ending.pop(0).result()

    def _work(self, claims: Sequence[Claim], pulse: Pulse) -> Iterator[list[Done]]:
        """Draws jobs, and yields each part of them when it is done."""
        ready: list[tuple[Claim, list[Row]]] = []
        for claim in claims:
            try:
                rows = self._stubborn(functools.partial(self._rows, claim))
            except Refused as error:
                yield [Done(claim, error=error)]
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
            yield _divided(ready, drawn)
        elif failure is not None and len(ready) > 1:  # one request may spoil the batch of others
            for claim, _ in ready:
                yield from self._work([claim], pulse)
        else:
            yield [Done(claim, error=CANCELLED if failure is None else _failed(failure)) for claim, _ in ready]

    def _end(self, done: Sequence[Done]) -> None:
        """Ends jobs. They stay with this worker while the database is away, until the worker is stopped."""
        ends = [self._made(each) for each in done]
        self._stubborn(lambda: self._ends.commit(ends))

    def _made(self, done: Done) -> End:
        """A job with its encoded pictures. Pictures that cannot be encoded fail their own job only."""
        try:
            return self._ends.made(done)
        except FAILURES as error:
            told("encoding failed", error=named(error), job=done.claim.id)
            return self._ends.made(Done(done.claim, error=_failed(error)))

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
                    show = functools.partial(self._ends.show, part)
                    made += self._backend.draw([row for _, row in part], call, on_step, show)
            return made, None
        except Cancelled:
            return [], None
        except FAILURES as error:
            told("drawing failed", error=named(error), jobs=[claim.id for claim, _ in ready])
            return [], error

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

    def _stubborn(self, act: Callable[[], T]) -> T | None:
        """Tries again while the database is away. None if the worker is stopped meanwhile."""
        while True:
            try:
                return act()
            except Unavailable:
                if self._stop_asked.wait(0.5):
                    return None


CANCELLED = Refused(409, "The request was cancelled. Send it again.", "cancelled")


def _divided(ready: Sequence[tuple[Claim, list[Row]]], drawn: Sequence[Drawn]) -> list[Done]:
    """The rows of a batch, by job."""
    made, left = list[Done](), iter(drawn)
    for claim, rows in ready:
        made.append(Done(claim, [_proven(row, each) for row, each in zip(rows, islice(left, len(rows)), strict=True)]))
    return made


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

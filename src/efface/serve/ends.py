"""How a worker ends jobs: it encodes their pictures, and commits them with the entries of the audit log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sql

from .. import files
from .backend import Drawn, Row, encoded
from .claims import Claim, End, Picture
from .database import Unavailable
from .errors import Refused
from .jobs import LOST
from .log import named, told
from .service import Service

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Done:
    """A job that was drawn, or could not be.

    Args:
        claim: the job.
        drawn: its rows.
        error: why there are none.
    """

    claim: Claim
    drawn: Sequence[Drawn] = ()
    error: Refused | None = None


class Ends:
    """Ends the jobs of one worker.

    Args:
        service: the service.
        worker: the name of the worker.
    """

    def __init__(self, service: Service, worker: str) -> None:
        self._service, self._worker = service, worker

    def show(self, owned: Sequence[tuple[Claim, Row]], k: int, number: int, picture: Image) -> None:
        """Stores a partial picture. One that cannot be stored now is left out."""
        claim, row = owned[k]
        content = self._encoded(claim, picture, row.policy.hash)
        facts = {"job": claim.id, "tenant": claim.tenant, "number": number, "sha256": files.sha256(content)}

        def also(connection: sql.Connection) -> None:
            self._service.audit.add(connection, "partial picture", facts | {"worker": self._worker})

        try:
            if self._service.jobs.show(claim, number, content, also):
                self._service.ended.ring()
        except Unavailable as error:
            told("partial picture left out", job=claim.id, error=named(error))

    def made(self, done: Done) -> End:
        """A job with its encoded pictures, unless a row is not proven or all are blocked."""
        metrics, drawn = self._service.metrics, done.drawn
        for each in drawn:
            for seen in each.record["detections"]:
                for concept in seen:
                    metrics.hits.labels(concept).inc()
        error = done.error
        if unproven := [each for each in drawn if each.record["outcome"] == "not proven"]:
            metrics.unproven.inc(len(unproven))
            message = (
                "The record does not prove that the policy acted, so the pictures are withheld. Tell the operator."
            )
            error = Refused(500, message, "policy_not_applied")
        elif error is None and all(each.picture is None for each in drawn):
            message = "A detector found erased concepts in every picture. Change the prompt."
            error = Refused(403, message, "content_blocked", "prompt")
        pictures = [self._picture(done.claim, each) for each in drawn]
        return End(done.claim, pictures, error, self._entry(done.claim, pictures, error))

    def commit(self, ends: Sequence[End]) -> None:
        """Ends jobs in one transaction, and wakes the requests that wait for them.

        Raises:
            Unavailable: the database is away. Nothing was changed.
        """
        states = self._service.jobs.finish_all(ends)
        for state in filter(None, states):
            self._service.metrics.finished.labels(state).inc()
        self._service.ended.ring()

    def lost(self, name: str) -> Callable[[sql.Connection, str], None]:
        """Writes the end of a job that workers lost to the audit log."""

        def also(connection: sql.Connection, state: str) -> None:
            facts = {"job": name, "state": state, "error": LOST.code, "rows": [], "worker": self._worker}
            self._service.audit.add(connection, "job finished", facts)

        return also

    def _entry(
        self, claim: Claim, pictures: Sequence[Picture], error: Refused | None
    ) -> Callable[[sql.Connection, str], None]:
        """Writes the end of a job to the audit log."""
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
            "worker": self._worker,
        }

        def also(connection: sql.Connection, state: str) -> None:
            self._service.audit.add(connection, "job finished", facts | {"state": state})

        return also

    def _picture(self, claim: Claim, drawn: Drawn) -> Picture:
        record: Mapping[str, Any] = dict(drawn.record)
        if drawn.picture is None:
            return Picture(None, record)
        content = self._encoded(claim, drawn.picture, str(record["policy"]))
        return Picture(content, {**record, "sha256": files.sha256(content)})

    def _encoded(self, claim: Claim, picture: Image, policy: str) -> bytes:
        facts, request = {"efface:model": self._service.model, "efface:policy": policy}, claim.request
        return encoded(picture, request["output_format"], request["output_compression"], facts)

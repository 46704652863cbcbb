"""Which queued jobs form the next batch: deficit round robin over tenants."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .jobs import Waiting


class Fair:
    """Chooses batches so that tenants with queued jobs get equal shares of the cost.

    Tenants form a ring. At its turn a tenant gets a quantum of credit. If it pays the oldest job, this job picks the
    batching key, and the turn lasts as long as the credit. Jobs of the same key fill the batch: the tenant's own, then
    those of whoever has most credit, who pay for them and may go into debt. A tenant in debt waits until its turns have
    paid it. A debt is at most `rows` quanta, so that who filled rows that nobody else wanted does not wait for hours
    later. One without queued jobs loses its credit, but keeps its debt.

    Args:
        rows: the largest number of rows in a batch. A job with more rows is a batch by itself.
        quantum: the credit that a tenant gets at its turn. 0: the largest cost of a queued job.
    """

    def __init__(self, rows: int, quantum: float = 0.0) -> None:
        self.rows, self.quantum = rows, quantum
        self.ring: deque[str] = deque()
        self.credit: dict[str, float] = {}
        self._turn: str | None = None  # who has got the credit of its turn

    def choose(self, queued: Sequence[Waiting]) -> list[Waiting]:
        """The next batch, from jobs in the order of their arrival; [] if there are none."""
        by_tenant: dict[str, list[Waiting]] = {}
        for job in queued:
            by_tenant.setdefault(job.tenant, []).append(job)
        self._update(by_tenant)
        if not by_tenant:
            return []
        quantum = self.quantum or max(job.cost for job in queued)
        self.credit |= {tenant: max(self.credit[tenant], -self.rows * quantum) for tenant in by_tenant}
        while True:
            tenant = self.ring[0]
            if self._turn != tenant:
                self._turn = tenant
                self.credit[tenant] += quantum
            if self.credit[tenant] >= by_tenant[tenant][0].cost:
                return self._filled(tenant, by_tenant)
            self.ring.rotate(-1)
            self._turn = None

    def _update(self, by_tenant: dict[str, list[Waiting]]) -> None:
        self.ring = deque(tenant for tenant in self.ring if tenant in by_tenant)
        self.ring.extend(tenant for tenant in by_tenant if tenant not in self.ring)
        debts = {tenant: credit for tenant, credit in self.credit.items() if tenant in by_tenant or credit < 0}
        self.credit = dict.fromkeys(by_tenant, 0.0) | debts

    def _filled(self, tenant: str, by_tenant: dict[str, list[Waiting]]) -> list[Waiting]:
        first = by_tenant[tenant][0]
        others = [each for each in self.ring if each != tenant]
        same = {each: deque(job for job in by_tenant[each] if job.batch == first.batch) for each in (tenant, *others)}
        chosen = [same[tenant].popleft()]
        self.credit[tenant] -= first.cost
        room = self.rows - first.rows
        while same[tenant] and same[tenant][0].rows <= room and self.credit[tenant] >= same[tenant][0].cost:
            room -= self._take(same, tenant, chosen)
        while fitting := [each for each in (*others, tenant) if same[each] and same[each][0].rows <= room]:
            room -= self._take(same, max(fitting, key=self.credit.__getitem__), chosen)
        return chosen

    def _take(self, same: dict[str, deque[Waiting]], tenant: str, chosen: list[Waiting]) -> int:
        job = same[tenant].popleft()
        self.credit[tenant] -= job.cost
        chosen.append(job)
        return job.rows

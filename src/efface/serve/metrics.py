"""Prometheus metrics. No label holds a prompt, a key or a tenant."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("efface_requests", "HTTP requests.", ["route", "code"], **more)
        self.seconds = Histogram(
            "efface_request_duration_seconds", "HTTP requests.", ["route"], buckets=SECONDS, **more
        )
        self.queue = Gauge("efface_queue_jobs", "Jobs that are queued.", **more)
        self.rows = Histogram("efface_batch_rows", "Rows of a batch.", buckets=(1, 2, 4, 8, 16, 32), **more)
        self.rejected = Counter("efface_rejected", "Requests that were not accepted.", ["reason"], **more)
        self.finished = Counter("efface_jobs_finished", "Jobs that ended, by their state.", ["state"], **more)
        self.unproven = Counter("efface_policy_failures", "Rows whose policy was not proven.", **more)
        self.hits = Counter("efface_detector_hits", "Detections by the gates of policies.", ["concept"], **more)
        self.entries = Gauge("efface_audit_last_entry", "The number of the last entry of the audit log.", **more)
        self.cut = Counter("efface_audit_faults", "Times that an entry of the audit log was gone.", **more)
        self.cost_rate = Gauge("efface_cost_per_second", "Drawing speed: rows x steps x megapixels x 2.", **more)
        self.rate = 0.0

    def drew(self, rows: int, cost: float, seconds: float) -> None:
        """Counts a batch, and follows the drawing speed."""
        self.rows.observe(rows)
        new = cost / max(seconds, 1e-6)
        self.rate = new if not self.rate else 0.8 * self.rate + 0.2 * new
        self.cost_rate.set(self.rate)

    def retry_after(self, cost: float) -> int:
        """Seconds until so much queued cost is drawn, from 1 to 120."""
        return int(min(max(cost / self.rate if self.rate else 5.0, 1.0), 120.0))

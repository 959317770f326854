"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server; each has a registry of its own, so that several can be in a process."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        ProcessCollector(registry=of)
        PlatformCollector(registry=of)
        self.requests = Counter(
            "manyheads_requests_total", "Answers, by model and HTTP status.", ["model", "status"], registry=of
        )
        self.seconds = Histogram(
            "manyheads_request_seconds",
            "From a request's first byte to its answer.",
            ["model"],
            buckets=SECONDS,
            registry=of,
        )
        self.batch_seconds = Histogram(
            "manyheads_batch_seconds", "A worker's time for a batch.", ["model"], buckets=SECONDS, registry=of
        )
        self.batch_size = Histogram(
            "manyheads_batch_requests",
            "Requests that were answered together.",
            ["model"],
            buckets=SIZES,
            registry=of,
        )
        self.records = Counter(
            "manyheads_records_total", "Records, good or bad.", ["model", "kind"], registry=of
        )
        self.queue = Gauge("manyheads_queue_requests", "Requests that wait.", ["model"], registry=of)
        self.workers = Gauge("manyheads_workers_ready", "Workers that answer.", ["model"], registry=of)
        self.restarts = Counter(
            "manyheads_worker_restarts_total", "Workers that died or hung.", ["model"], registry=of
        )
        self.sessions = Gauge("manyheads_stream_sessions", "Recordings that go on.", ["model"], registry=of)
        self.held = Gauge("manyheads_body_bytes", "Bytes of request bodies in memory.", registry=of)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)

"""Metrics of the service for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from device_runtime.serve.events import Subscription
from device_runtime.serve.station import Station
from ssd_edge.classes import UNKNOWN
from ssd_edge.system import VERSION

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LEARNS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
LEVELS = ("collecting", "stable", "moderate", "drifted")


class Metrics:
    """Counters of the service, and values that are read when someone asks.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        registry = self._registry = CollectorRegistry()
        self._predictions = Counter(
            "ssd_edge_predictions", "Predicted images.", ("source", "answer"), registry=registry
        )
        self._seconds = Histogram(
            "ssd_edge_predict_seconds",
            "Time from a request (http) or the arrival of a frame (camera) to its answer.",
            ("source",),
            buckets=SECONDS,
            registry=registry,
        )
        self._learns = Histogram(
            "ssd_edge_learn_seconds", "Time of learns.", ("state",), buckets=LEARNS, registry=registry
        )
        registry.register(_Now(station))
        ProcessCollector(registry=registry)
        self._events: Subscription = station.events.subscribe(wake=self._count)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [Route("/metrics", self.show)]

    def show(self, request: Request) -> Response:
        """Return the metrics as text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def predicted(self, source: str, seconds: float, labels: Sequence[str]) -> None:
        """Count a request or a frame.

        Args:
            source: ``http`` or ``camera``.
            seconds: Time until its answer.
            labels: The answers.
        """
        self._seconds.labels(source).observe(seconds)
        unknown = sum(label == UNKNOWN for label in labels)
        self._predictions.labels(source, UNKNOWN).inc(unknown)
        self._predictions.labels(source, "known").inc(len(labels) - unknown)

    def learned(self, state: str, seconds: float) -> None:
        """Count a learn that has ended."""
        self._learns.labels(state).observe(seconds)

    def _count(self) -> None:
        """Count the answers of cameras, in the thread that gives them."""
        while (event := self._events.get(0)) is not None:
            if event.kind == "answer" and event.fields["label"] is not None:
                self.predicted("camera", event.fields["latency_ms"] / 1000, [event.fields["label"]])


class _Now(Collector):
    """Values that are read when someone asks.

    Args:
        station: The device and what runs beside it.
    """

    def __init__(self, station: Station) -> None:
        self._station = station

    def collect(self) -> Iterable[Metric]:
        """Yield the values."""
        station = self._station
        snapshot = station.device.snapshot
        yield _gauge("info", "Version and bundle.", {(VERSION, snapshot.bundle.name): 1}, "version", "bundle")
        yield _gauge("generation", "Number of the current generation.", {(): snapshot.generation.number})
        yield _gauge("classes", "Classes that are known.", {(): len(snapshot.registry.names)})
        yield _gauge("waiting_requests", "Requests that are predicted or wait for it.", {(): station.waiting})
        states = [job.state for job in station.jobs.list()]
        waits = {(state,): states.count(state) for state in ("waiting", "running")}
        yield _gauge("jobs", "Learns that wait or run.", waits, "state")
        yield _gauge("captures", "Captures that are open.", {(): len(station.captures.list())})
        running = {(feed.id,): feed.state == "running" for feed in station.feeds()}
        yield _gauge("camera_running", "1 while a camera gives frames.", running, "camera")
        report = None if station.cameras is None else station.cameras.drift()
        if report is not None:
            levels = {(level,): report.level == level for level in LEVELS}
            yield _gauge("drift_level", "1 for the level of drift of what the cameras show.", levels, "level")
            if report.psi is not None:
                yield _gauge("drift_index", "Population stability index of what the cameras show.", {(): report.psi})
        yield _gauge("tray", "Moments in the tray.", {(): len(station.tray.list())})


def _gauge(name: str, help: str, values: Mapping[Any, float], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"ssd_edge_{name}", help, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family

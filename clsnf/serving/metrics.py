"""What a server counts and measures, for Prometheus.

One table names all metrics. They are shown at ``/metrics`` and, inside Ray, at Ray's own endpoint
too. Behind one address several replicas may answer ``/metrics`` in turn, so each series carries the
name of its replica, and no counter ever runs backwards. To see all replicas at once, scrape Ray's
endpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

log = logging.getLogger("clsnf.serving")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Stands for a category that does not exist: names from requests must not make series.
UNKNOWN_CATEGORY = "-"

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SCORES = tuple(round(0.05 * i, 2) for i in range(1, 20))
_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Metric(NamedTuple):
    """A metric of the server; ``bounds`` are those of a histogram's buckets."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...] = ()


METRICS = {
    "clsnf_requests_total": Metric(
        "counter", "Requests by outcome.", ("category", "endpoint", "status")
    ),
    "clsnf_request_seconds": Metric(
        "histogram", "Time from request to answer.", ("category", "endpoint"), _SECONDS
    ),
    "clsnf_network_seconds": Metric(
        "histogram", "Time of the network for a batch.", ("category",), _SECONDS
    ),
    "clsnf_batch_images": Metric("histogram", "Images in a batch.", ("category",), _BATCHES),
    "clsnf_verdicts_total": Metric(
        "counter", "Images by verdict: good or defect.", ("category", "verdict")
    ),
    "clsnf_score": Metric("histogram", "Image scores.", ("category",), _SCORES),
    "clsnf_drift": Metric(
        "gauge",
        "Looks of the last 50 images or so, as standard deviations from the normal images the "
        "model was calibrated on.",
        ("category", "look"),
    ),
    "clsnf_readers_replaced_total": Metric(
        "counter",
        "Processes that read images and were replaced: late, gone (their client) or died.",
        ("cause",),
    ),
    "clsnf_waiting_images": Metric("gauge", "Images that wait for their answer.", ()),
    "clsnf_model_bytes": Metric("gauge", "Parameters of loaded models.", ("category", "version")),
    "clsnf_model_loads_total": Metric("counter", "Models loaded from disk.", ("category",)),
    "clsnf_passed_on_total": Metric(
        "counter",
        "Requests passed on to the replica that a category belongs to, by outcome: answered, not "
        "taken, not reached, lost (with it), left (by the client).",
        ("category", "outcome"),
    ),
    "clsnf_models_refused": Metric(
        "gauge", "Models that do not serve though they lie in the folder.", ()
    ),
    "clsnf_thresholds_refused": Metric(
        "gauge", "Thresholds in force that are not what their file says.", ()
    ),
    "clsnf_metric_errors_total": Metric(
        "counter", "Values that could not be recorded, by metric.", ("metric",)
    ),
}


class MetricSink(Protocol):
    """Where values go; `labels` in the order of the metric's."""

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None: ...

    def clear(self, name: str) -> None:
        """Drop all series of a gauge."""


class PrometheusSink:
    """The metrics of this process, for ``/metrics``."""

    def __init__(self, replica: str) -> None:
        self._registry, self._replica = CollectorRegistry(), replica
        self._series: dict[str, Counter | Gauge | Histogram] = {}
        for name, metric in METRICS.items():
            labels = (*metric.labels, "replica")
            if metric.kind == "histogram":
                self._series[name] = Histogram(
                    name, metric.help, labels, buckets=metric.bounds, registry=self._registry
                )
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                self._series[name] = kind(name, metric.help, labels, registry=self._registry)

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        series = self._series[name].labels(*labels, self._replica)
        if isinstance(series, Counter):
            series.inc(value)
        elif isinstance(series, Gauge):
            series.set(value)
        else:
            series.observe(value)

    def clear(self, name: str) -> None:
        self._series[name].clear()

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)


class ServerMetrics:
    """Records values in every sink.

    Args:
        replica: name of this replica, a label of every series at ``/metrics``.
        make_sink: makes one more sink, such as Ray's; None for ``/metrics`` alone.
    """

    def __init__(
        self, replica: str = "0", make_sink: Callable[[], MetricSink] | None = None
    ) -> None:
        self._prometheus = PrometheusSink(replica)
        self._sinks: list[MetricSink] = [self._prometheus]
        self._told: set[str] = set()
        if make_sink is not None:
            with self._guarded("all metrics of Ray"):
                self._sinks.append(make_sink())

    def record(self, name: str, value: float, *labels: str) -> None:
        """Add to a counter, set a gauge, observe in a histogram. Never fails."""
        for sink in self._sinks:
            with self._guarded(name):
                sink.record(name, value, labels)

    def clear(self, name: str) -> None:
        """Drop all series of a gauge. Never fails."""
        for sink in self._sinks:
            with self._guarded(name):
                sink.clear(name)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Count what fails in the block, and say it once for each metric.

        A request must not fail because something about it can't be counted.
        """
        try:
            yield
        except Exception as error:
            self._prometheus.record("clsnf_metric_errors_total", 1, (name,))
            if name not in self._told:
                self._told.add(name)
                log.warning("%s can't be recorded: %s %s", name, type(error).__name__, error)

    def text(self) -> bytes:
        """What ``/metrics`` answers."""
        return self._prometheus.text()

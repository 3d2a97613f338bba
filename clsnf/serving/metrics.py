"""What a server counts and measures, for Prometheus: one table of meters, shown at ``/metrics``
and, inside Ray, also told to Ray.

Unusual: behind one address several replicas may answer ``/metrics`` in turn, so each series carries
    its replica's name, and none of
them ever runs backwards. Whoever wants all replicas at every look scrapes Ray's own endpoint, which
has the same figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "-"  # stands for a category that does not exist: names from requests must not make series

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SCORES = tuple(round(0.05 * i, 2) for i in range(1, 20))
_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Meter(NamedTuple):
    """``kind``: counter, gauge or histogram; ``bounds`` of a histogram's buckets."""

    kind: str
    about: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...] = ()


METERS = {
    "clsnf_requests_total": Meter(
        "counter", "Requests by outcome.", ("category", "endpoint", "status")
    ),
    "clsnf_request_seconds": Meter(
        "histogram", "Time from request to answer.", ("category", "endpoint"), _SECONDS
    ),
    "clsnf_network_seconds": Meter(
        "histogram", "Time of the network for a batch.", ("category",), _SECONDS
    ),
    "clsnf_batch_images": Meter("histogram", "Images in a batch.", ("category",), _BATCHES),
    "clsnf_verdicts_total": Meter(
        "counter", "Images by verdict: good or defect.", ("category", "verdict")
    ),
    "clsnf_score": Meter("histogram", "Image scores.", ("category",), _SCORES),
    "clsnf_drift": Meter(
        "gauge",
        "Looks of the last 50 images or so, as standard deviations from the normal images the "
        "model was calibrated on.",
        ("category", "look"),
    ),
    "clsnf_waiting_images": Meter("gauge", "Images that wait for their answer.", ()),
    "clsnf_model_bytes": Meter("gauge", "Parameters of loaded models.", ("category", "version")),
    "clsnf_models_refused": Meter(
        "gauge", "1 while the last winners that should have rolled in were refused.", ()
    ),
}


class Sink(Protocol):
    """Where figures go; `labels` in the order of the meter's."""

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None: ...

    def forget(self, name: str) -> None:
        """Drop all series of a gauge."""


class PrometheusSink:
    """Figures of this process, for ``/metrics``."""

    def __init__(self, replica: str) -> None:
        self._registry, self._replica = CollectorRegistry(), replica
        self._series: dict[str, Counter | Gauge | Histogram] = {}
        for name, meter in METERS.items():
            labels = (*meter.labels, "replica")
            if meter.kind == "histogram":
                self._series[name] = Histogram(
                    name, meter.about, labels, buckets=meter.bounds, registry=self._registry
                )
            else:
                kind = Counter if meter.kind == "counter" else Gauge
                self._series[name] = kind(name, meter.about, labels, registry=self._registry)

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        series = self._series[name].labels(*labels, self._replica)
        if isinstance(series, Counter):
            series.inc(value)
        elif isinstance(series, Gauge):
            series.set(value)
        else:
            series.observe(value)

    def forget(self, name: str) -> None:
        self._series[name].clear()

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)


class Meters:
    """Records figures in every sink."""

    def __init__(self, replica: str = "0", more: Callable[[], Sink] | None = None) -> None:
        self._own = PrometheusSink(replica)
        self._sinks: list[Sink] = [self._own] + ([more()] if more else [])

    def record(self, name: str, value: float, *labels: str) -> None:
        """Add to a counter, set a gauge, observe in a histogram."""
        for sink in self._sinks:
            sink.record(name, value, labels)

    def forget(self, name: str) -> None:
        for sink in self._sinks:
            sink.forget(name)

    def text(self) -> bytes:
        """What ``/metrics`` answers."""
        return self._own.text()

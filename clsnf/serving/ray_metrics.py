"""Figures told to Ray, whose own Prometheus endpoint shows those of all replicas of a node."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from clsnf.serving.metrics import METERS


class RaySink:
    """A :class:`clsnf.serving.metrics.Sink`; made inside a replica, whose name Ray adds."""

    def __init__(self) -> None:
        self._series: dict[str, Any] = {}
        for name, meter in METERS.items():
            labels: Any = meter.labels  # Ray's annotation speaks of one label
            if meter.kind == "histogram":
                self._series[name] = metrics.Histogram(
                    name, meter.about, list(meter.bounds), labels
                )
            elif meter.kind == "counter":
                self._series[name] = metrics.Counter(
                    name.removesuffix("_total"), meter.about, labels
                )  # Ray adds it again
            else:
                self._series[name] = metrics.Gauge(name, meter.about, labels)

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        tags = dict(zip(METERS[name].labels, labels, strict=True))
        series = self._series[name]
        match METERS[name].kind:
            case "histogram":
                series.observe(value, tags)
            case "counter":
                series.inc(value, tags)
            case _:
                series.set(value, tags)

    def forget(self, name: str) -> None:
        """Ray keeps a gauge until its process ends."""

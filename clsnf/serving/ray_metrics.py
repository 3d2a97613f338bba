"""The server's metrics for Ray, whose Prometheus endpoint shows all replicas of a node."""

from __future__ import annotations

import string
from typing import Any
from urllib.parse import quote

from ray.serve import metrics

from clsnf.serving.metrics import METRICS

# Ray takes tags in ASCII alone: other characters are percent-encoded, as in a URL.
_SAFE = string.punctuation.replace("%", "").replace('"', "").replace("\\", "") + " "


class RaySink:
    """A :class:`clsnf.serving.metrics.MetricSink`; made inside a replica, whose name Ray adds.

    Values of labels that are not plain ASCII are percent-encoded: ``Größe`` is ``Gr%C3%B6%C3%9Fe``.
    """

    def __init__(self) -> None:
        self._series: dict[str, Any] = {}
        for name, metric in METRICS.items():
            labels: Any = metric.labels  # Ray's annotation allows one label only; Ray takes several
            if metric.kind == "histogram":
                self._series[name] = metrics.Histogram(
                    name, metric.help, list(metric.bounds), labels
                )
            elif metric.kind == "counter":  # Ray adds the suffix again
                self._series[name] = metrics.Counter(
                    name.removesuffix("_total"), metric.help, labels
                )
            else:
                self._series[name] = metrics.Gauge(name, metric.help, labels)

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        texts = [quote(label, safe=_SAFE) for label in labels]
        tags = dict(zip(METRICS[name].labels, texts, strict=True))
        series = self._series[name]
        match METRICS[name].kind:
            case "histogram":
                series.observe(value, tags)
            case "counter":
                series.inc(value, tags)
            case _:
                series.set(value, tags)

    def clear(self, name: str) -> None:
        """Nothing: Ray keeps a gauge until its process ends."""

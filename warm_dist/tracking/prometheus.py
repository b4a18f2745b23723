"""The newest metrics as Prometheus text, served by rank 0 on request. The only place with prometheus_client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from warm_dist.errors import PortError


class Exporter:
    """`http://HOST:PORT/metrics`: gauges warm_dist_KIND_NAME of the newest lines, warm_dist_rank_NAME{rank="K"} of each rank.

    Raises PortError if the port cannot be had.
    """

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            raise PortError(f"tracking.prometheus_port: {host}:{port} cannot be bound ({error.strerror})") from None

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._gauge(f"warm_dist_{kind}_{name}", f"{name} of the newest {kind} line of metrics.jsonl").set(value)

    def show_ranks(self, ranks: list[dict[str, float]]) -> None:
        """Every rank's own figures."""
        for rank, figures in enumerate(ranks):
            for name, value in figures.items():
                gauge = self._gauge(f"warm_dist_rank_{name}", f"{name} of one rank", ["rank"])
                gauge.labels(str(rank)).set(value)

    def follow(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge warm_dist_NAME that is asked for its value whenever somebody reads."""
        self._gauge(f"warm_dist_{name}", text).set_function(value)

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Any:
        from prometheus_client import Gauge

        name = name.replace("/", "_")
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, labels or [], registry=self._registry)
        return self._gauges[name]

"""Serves the newest metrics to Prometheus, from rank 0. The only module that uses prometheus_client."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from warm_dist.errors import ConfigError, PortError


class Exporter:
    """Serves `http://HOST:PORT/metrics`: gauges warm_dist_KIND_NAME, and warm_dist_rank_NAME{rank="K"} for each rank.

    Raises PortError if the port cannot be bound, ConfigError if the host is not this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                where = f"{host!r} is no address of this machine ({error.strerror})"
                raise ConfigError(f"tracking.prometheus_host: {where}; 127.0.0.1 serves this machine only") from None
            raise PortError(f"tracking.prometheus_port: {host}:{port} cannot be bound ({error.strerror})") from None

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """Set the gauges to the numbers of one record of metrics.jsonl."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._gauge(f"warm_dist_{kind}_{name}", f"{name} of the newest {kind} line of metrics.jsonl").set(value)

    def show_ranks(self, ranks: list[dict[str, float]]) -> None:
        """Set the gauges of every rank, in the order of ranks."""
        for rank, figures in enumerate(ranks):
            for name, value in figures.items():
                gauge = self._gauge(f"warm_dist_rank_{name}", f"{name} of one rank", ["rank"])
                gauge.labels(str(rank)).set(value)

    def follow(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge warm_dist_NAME whose value is computed at each request. text: its help."""
        self._gauge(f"warm_dist_{name}", text).set_function(value)

    def close(self) -> None:
        """Stop serving and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Any:
        from prometheus_client import Gauge

        name = name.replace("/", "_")
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, labels or [], registry=self._registry)
        return self._gauges[name]

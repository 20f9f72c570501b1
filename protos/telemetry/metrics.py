"""Prometheus metrics of a service: counts of finished calls, and samples taken when the page is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.telemetry.call_record import CallRecord

PORT_OFFSET = 100
"""Default offset of the metrics port from the service's own port."""
LOOPBACK = "127.0.0.1"
_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0, 1800.0)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSample:
    """A current value."""

    name: str
    """Metric name without the prefix "stillhouse_"."""
    help: str
    value: float
    kind: Literal["gauge", "counter"] = "gauge"
    labels: Mapping[str, str] = field(default_factory=dict)


MetricSource = Callable[[], Iterable[MetricSample]]


class Metrics:
    """Call observer with its own registry and metrics page."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, CPU seconds, open files
        self._calls = Counter(
            "stillhouse_calls",
            "Calls that have ended, by outcome.",
            ("rpc", "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "stillhouse_call_seconds",
            "Time from a call's arrival to its end.",
            ("rpc",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._page: tuple[WSGIServer, threading.Thread] | None = None

    def __call__(self, call: CallRecord) -> None:
        """Counts a finished call."""
        rpc = call.method.rpartition("/")[2]
        self._calls.labels(rpc, call.outcome).inc()
        self._seconds.labels(rpc).observe(call.seconds)

    def watch_calls(self, running: Callable[[], Mapping[str, int]]) -> None:
        """Exposes the calls in progress, which `running` counts by rpc."""

        def readings() -> Iterator[MetricSample]:
            for method, number in running().items():
                yield MetricSample(
                    name="calls_in_progress",
                    help="Calls that have not ended.",
                    value=number,
                    labels={"rpc": method.rpartition("/")[2]},
                )

        self.add(readings)

    def add(self, readings: MetricSource) -> None:
        """Exposes the samples of `readings`, called from another thread whenever the page is read."""
        self.registry.register(_Read(readings))

    def listen(self, listen: str, *, host: str = LOOPBACK, port: int | None = None) -> str | None:
        """The address of the page of a service at `listen`, or None if there is none.

        `port` None means PORT_OFFSET above that of `listen`, and no page if that is a socket file; such a port may be
        taken, which costs the page and not the service. 0 means no page.

        Raises:
            StillhouseError: INVALID_CONFIG if the `port` that was asked for cannot be had.
        """
        wanted = port if port is not None else _offset(listen)
        if not wanted:
            return None
        try:
            self._page = start_http_server(wanted, host, self.registry)
        except (OSError, OverflowError) as error:
            if port is None:
                log.warning("no metrics", why=str(error), port=wanted)
                return None
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"--metrics-port {wanted} on {host} cannot be had ({error}). Give another, or 0 for none.",
            ) from error
        return f"{host}:{wanted}"

    def close(self) -> None:
        """Show the page no longer."""
        if self._page is not None:
            server, thread = self._page
            server.shutdown()
            server.server_close()
            thread.join()
            self._page = None


def _offset(listen: str) -> int:
    port = listen.rpartition(":")[2]
    return int(port) + PORT_OFFSET if port.isdecimal() and int(port) else 0


class _Read(Collector):
    def __init__(self, readings: MetricSource) -> None:
        self._readings = readings

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Any] = {}
        try:
            taken = list(self._readings())
        except Exception:  # the rest of the page is worth having
            log.exception("readings not taken")
            return
        for each in taken:
            if each.name not in families:
                make = CounterMetricFamily if each.kind == "counter" else GaugeMetricFamily
                families[each.name] = make(f"stillhouse_{each.name}", each.help, labels=tuple(each.labels))
            families[each.name].add_metric(tuple(each.labels.values()), each.value)
        yield from families.values()

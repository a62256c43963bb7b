"""What `/metrics` shows, for Prometheus: the engine's counts and how long clients wait."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mmfree_jax.serve.engine import Engine

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _EngineCounts(Collector):
    """The engine's statistics, read whenever they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> "Iterable[Metric]":
        now = self._engine.statistics()
        gauges = {
            "slots": "Rows of the batch.",
            "running": "Requests in a slot.",
            "waiting": "Requests in the queue.",
            "prefix_bytes": "Of cached states.",
            "prefix_entries": "Cached states.",
            "sessions": "Named sessions.",
            "session_bytes": "Of named sessions.",
        }
        counters = {
            "prompt_tokens": "Tokens of prompts, read or cached.",
            "completion_tokens": "Tokens given out.",
            "prefix_hits": "Prompts for a part of which a state was cached.",
            "prefix_misses": "Prompts for which none was.",
            "prefix_tokens_saved": "Tokens of prompts that were not read for that reason.",
            "device_failures": "Calls of the device that failed.",
        }
        for name, text in gauges.items():
            yield GaugeMetricFamily(f"mmfree_{name}", text, value=getattr(now, name))
        for name, text in counters.items():
            yield CounterMetricFamily(f"mmfree_{name}", text, value=getattr(now, name))
        ended = CounterMetricFamily("mmfree_ended", "Requests that have ended.", labels=["reason"])
        for reason, count in sorted(now.ended.items()):
            ended.add_metric([reason], count)
        yield ended


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCounts(engine))
        self._responses = Counter(
            "mmfree_responses", "HTTP responses.", ["endpoint", "status"], registry=self._registry
        )
        self._first_token = Histogram(
            "mmfree_first_token_seconds",
            "From a request's arrival to its first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._answer = Histogram(
            "mmfree_answer_seconds",
            "From a request's arrival to the end of its answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )

    def count_response(self, endpoint: str, status: int) -> None:
        """Counts a response of an endpoint, or of none where the request was refused before."""
        self._responses.labels(endpoint, str(status)).inc()

    def observe_answer(self, first_token_s: float | None, whole_s: float) -> None:
        """Notes how long an answer took (seconds)."""
        if first_token_s is not None:
            self._first_token.observe(first_token_s)
        self._answer.observe(whole_s)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)

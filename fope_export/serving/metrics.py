"""What Prometheus is told: the names that dashboards of vLLM have, with our prefix."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fope_export.serving.calls import Call
from fope_export.serving.engine import Counts, Engine
from fope_export.serving.host import Host

PREFIX = "fope_export"
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
NOW: tuple[tuple[str, str, Callable[[Engine], int]], ...] = (
    ("num_requests_running", "Requests that have a slot.", lambda engine: engine.running),
    ("num_requests_waiting", "Requests that wait for one.", lambda engine: engine.waiting),
)
SO_FAR: tuple[tuple[str, str, Callable[[Counts], int]], ...] = (
    ("prompt_tokens", "Tokens of prompts.", lambda counts: counts.prompt_tokens),
    ("generation_tokens", "Tokens of answers.", lambda counts: counts.new_tokens),
    ("prefix_cache_queries", "Tokens of prompts that were looked for.", lambda counts: counts.prompt_tokens),
    ("prefix_cache_hits", "Tokens of prompts that were there.", lambda counts: counts.cached_tokens),
    ("spec_decode_num_drafts", "Steps that looked at guessed tokens.", lambda counts: counts.looks),
    ("spec_decode_num_draft_tokens", "Tokens that were guessed.", lambda counts: counts.guesses),
    ("spec_decode_num_accepted_tokens", "Of these, those that were drawn.", lambda counts: counts.right_guesses),
)


class Metrics:
    """Counted in the event loop's thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"labelnames": ["model_name"], "namespace": PREFIX, "registry": self._registry}
        self._first = Histogram("time_to_first_token_seconds", "Until a first token.", buckets=LONG, **common)
        self._between = Histogram("inter_token_latency_seconds", "Between two chunks.", buckets=SHORT, **common)
        self._whole = Histogram("e2e_request_latency_seconds", "Until an answer was whole.", buckets=LONG, **common)
        self._ended = Counter(
            "request_success", "Answers that are whole.", labelnames=["model_name", "finished_reason"],
            namespace=PREFIX, registry=self._registry,
        )  # fmt: skip

    def token(self, call: Call) -> None:
        """Something was told of it."""
        if call.before:
            self._between.labels(call.host.name).observe(call.last - call.before)
        else:
            self._first.labels(call.host.name).observe(call.first - call.began)

    def end(self, call: Call) -> None:
        """It is over."""
        if call.over and not call.failure:
            self._whole.labels(call.host.name).observe(max(call.last - call.began, 0.0))
            for reason in call.reasons:
                self._ended.labels(call.host.name, reason).inc()

    def page(self, hosts: Iterable[Host]) -> bytes:
        """As Prometheus reads it."""
        engines = {host.name: host.engine for host in hosts if host.engine is not None}
        families: list[Metric] = []
        for name, text, read in NOW:
            gauge = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["model_name"])
            families.append(gauge)
            for model, engine in engines.items():
                gauge.add_metric([model], read(engine))
        for name, text, count in SO_FAR:
            counter = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=["model_name"])
            families.append(counter)
            for model, engine in engines.items():
                counter.add_metric([model], count(engine.counts))
        return generate_latest(self._registry) + generate_latest(_Made(families))


class _Made(CollectorRegistry):
    """What was counted elsewhere."""

    def __init__(self, families: Sequence[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

"""What Prometheus collects: how the engine stands, and how long requests had to wait."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minipaged.engine.outputs import RequestOutput
from minipaged.request.sequence import RequestId
from minipaged.serving.state import EngineState
from minipaged.serving.stream import Stream

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Observes the outputs of an AsyncEngine, and renders all metrics on demand."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._first_token = Histogram(
            "minipaged_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=LONG,
            registry=registry,
        )
        self._inter_token = Histogram(
            "minipaged_inter_token_latency_seconds",
            "From one token of a request to its next",
            buckets=SHORT,
            registry=registry,
        )
        self._end_to_end = Histogram(
            "minipaged_request_latency_seconds",
            "From the arrival of a request to its last token",
            buckets=LONG,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "minipaged_prompt_tokens", "Tokens of prompts that began to run", registry=registry
        )
        self._cached_tokens = Counter(
            "minipaged_cached_prompt_tokens",
            "Those of them that were found in the prefix cache",
            registry=registry,
        )
        self._generated_tokens = Counter(
            "minipaged_generation_tokens", "Tokens of finished outputs", registry=registry
        )
        self._ended = Counter(
            "minipaged_requests", "Requests that ended, and how", ["outcome"], registry=registry
        )
        self._last_tokens: WeakKeyDictionary[Stream, dict[RequestId, float]] = WeakKeyDictionary()

    def observe(self, stream: Stream, output: RequestOutput, when: float) -> None:
        """Take note of an output; see `AsyncEngine.observers`."""
        last_tokens = self._last_tokens.setdefault(stream, {})
        before = last_tokens.get(output.request_id)
        reason = output.finish_reason
        if reason != "abort":  # an aborted request got no token with it
            if before is None:
                self._first_token.observe(when - stream.arrived)
                self._prompt_tokens.inc(len(output.prompt_token_ids))
                self._cached_tokens.inc(output.num_cached_tokens)
            else:
                self._inter_token.observe(when - before)
        last_tokens[output.request_id] = when
        if output.finished:
            self._end_to_end.observe(when - stream.arrived)
            self._generated_tokens.inc(sum(len(c.token_ids) for c in output.outputs))
            self._ended.labels(reason or "stop").inc()

    def refused(self, reason: str) -> None:
        """Count a request that never ran."""
        self._ended.labels(reason).inc()

    def render(self, state: EngineState) -> bytes:
        """Everything in Prometheus' text format."""
        collector = _StateCollector(state)
        self._registry.register(collector)
        try:
            return generate_latest(self._registry)
        finally:
            self._registry.unregister(collector)


class _StateCollector:
    """Shows an engine's state to the registry."""

    def __init__(self, state: EngineState) -> None:
        self.state = state

    def collect(self) -> Iterator[Metric]:
        state = self.state
        for name, text, value in (
            ("running", "Requests in the batch", state.running),
            ("waiting", "Requests that hold no block", state.waiting),
            ("swapped", "Requests whose blocks lie in the host pool", state.swapped),
        ):
            yield GaugeMetricFamily(f"minipaged_requests_{name}", text, value)
        blocks = GaugeMetricFamily(
            "minipaged_blocks", "Blocks of the pools by state", labels=["pool", "state"]
        )
        for kind in ("exclusive", "shared", "cached", "free"):
            blocks.add_metric(["device", kind], getattr(state, f"{kind}_blocks"))
        blocks.add_metric(["host", "used"], state.used_host_blocks)
        blocks.add_metric(["host", "free"], state.free_host_blocks)
        yield blocks
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked for", state.prefix_queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found", state.prefix_hit_tokens),
            ("steps", "Iterations", state.steps),
        ):
            yield CounterMetricFamily(f"minipaged_{name}", text, value)
        preemptions = CounterMetricFamily(
            "minipaged_preemptions", "Requests that lost their blocks", labels=["mode"]
        )
        preemptions.add_metric(["recompute"], state.recomputations)
        preemptions.add_metric(["swap"], state.swaps)
        yield preemptions

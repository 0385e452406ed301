"""Numbers for Prometheus, with the names of vLLM's after ``pos2d:``."""

import time
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pos2d.runtime.serving.jobs import EngineLoad
from pos2d.runtime.text.completions import Event

PREFIX = "pos2d:"
# Upper bounds of the classes, in seconds: between tokens, and for whole requests.
STEPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
REQUESTS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
# Weight of the newest request in the mean time of requests, from which clients are told when to try again.
NEWEST = 0.1
ABORTED = "abort"


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds_per_request = 1.0
        self._running = self._gauge("num_requests_running", "Requests that are being answered.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for their first step.")
        self._branches = self._gauge("num_branches_running", "Branches that are being written.")
        self._usage = self._gauge("kv_cache_usage_perc", "Part of the KV budget that running requests have; 1 is all.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self._queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up in the KV cache.")
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts that were in the KV cache already.")
        self._success = self._counter("request_success", "Branches that ended, by reason.", ("finished_reason",))
        self._refused = self._counter("requests_refused", "Requests that were refused, by status.", ("status",))
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.", REQUESTS)
        self._between = self._histogram("inter_token_latency_seconds", "Between two steps of a request.", STEPS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.", REQUESTS)
        self._queue = self._histogram("request_queue_time_seconds", "From the request to its first step.", REQUESTS)

    def follow(self, prompt_tokens: int) -> "FollowedRequest":
        """Count a request from now on, whose prompts and context have ``prompt_tokens`` tokens."""
        return FollowedRequest(self, prompt_tokens)

    def answered(self, status: int) -> None:
        """Count the status of an answer."""
        if status >= 400:
            self._refused.labels(str(status)).inc()

    def text(self, load: EngineLoad) -> tuple[bytes, str]:
        """All numbers as Prometheus reads them, and the content type."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._branches.set(load.branches)
        self._usage.set(load.kv_tokens / load.kv_budget)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=bounds)


class FollowedRequest:
    """One request, from its submission to its end. A step costs one observation, whatever the number of branches."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._submitted = time.monotonic()
        self._last: float | None = None
        self._tokens = 0
        self._reasons: dict[str, int] = {}

    def step(self, events: Sequence[Event], cached_tokens: int, admitted_at: float | None) -> None:
        """Count the events of a step."""
        now, metrics = time.monotonic(), self._metrics
        if self._last is None:
            metrics._first.observe(now - self._submitted)
            metrics._queue.observe(max(0.0, (admitted_at or now) - self._submitted))
            metrics._prompt_tokens.inc(self._prompt_tokens)
            metrics._queries.inc(self._prompt_tokens)
            metrics._hits.inc(cached_tokens)
        else:
            metrics._between.observe(now - self._last)
        self._last = now
        for event in events:
            self._tokens += event.token is not None
            if event.finish_reason is not None:
                reason = event.finish_reason
                self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def end(self, unfinished: int) -> None:
        """Count the end of the request, and ``unfinished`` branches that nobody wanted any more."""
        metrics = self._metrics
        metrics._generation_tokens.inc(self._tokens)
        for reason, count in self._reasons.items():
            metrics._success.labels(reason).inc(count)
        if unfinished:
            metrics._success.labels(ABORTED).inc(unfinished)
        elif self._last is not None:
            seconds = self._last - self._submitted
            metrics._whole.observe(seconds)
            metrics.seconds_per_request += NEWEST * (seconds - metrics.seconds_per_request)

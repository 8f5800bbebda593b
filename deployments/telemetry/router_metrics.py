"""The metrics of a router: its completions, as they wait, commit blocks and end."""

from __future__ import annotations

import time
from collections import Counter

from twotower.deployments.telemetry.instruments import Instruments, open_instruments
from twotower.deployments.telemetry.names import ROUTER, Labels
from twotower.towers.decoding.services import Block


class RouterMetrics:
    """Counters, gauges and histograms of a router that serves `model`."""

    def __init__(self, model: str, instruments: Instruments | None = None) -> None:
        self.model = model
        self.instruments = instruments or open_instruments(ROUTER)
        self._present: Counter[tuple[str, str, str]] = Counter()

    def labels(self, mode: str, pair: str) -> Labels:
        """The labels of a completion."""
        return {"model": self.model, "mode": mode, "pair": pair}

    def let_in(self, key: str) -> None:
        """Counts a request of a caller."""
        labels = {"model": self.model, "key": key}
        self.instruments.add("requests_by_key_total", 1, labels)

    def answered_by_error(self, code: str) -> None:
        """Counts a request whose answer was an error of that gRPC status."""
        labels = {"model": self.model, "code": code}
        self.instruments.add("request_errors_total", 1, labels)

    def change(self, gauge: str, labels: Labels, by: int) -> None:
        """Changes how many completions run, or wait."""
        key = gauge, labels["mode"], labels["pair"]
        self._present[key] += by
        self.instruments.set(gauge, self._present[key], labels)


class CompletionMetrics:
    """Measures one completion, from `arrived` (of the monotonic clock) on."""

    def __init__(self, metrics: RouterMetrics, mode: str, arrived: float) -> None:
        self._metrics = metrics
        self._to = metrics.instruments
        self._mode = mode
        self._arrived = arrived
        self._waiting = metrics.labels(mode, "")
        self._running: Labels | None = None
        self._labels = self._waiting
        self._last = arrived
        self.first_s: float | None = None
        metrics.change("num_requests_waiting", self._waiting, 1)

    def moved_to(self, pair: str) -> None:
        """Notes the pair that serves from now on."""
        self._labels = self._metrics.labels(self._mode, pair)
        if self._running is not None:
            self._metrics.change("num_requests_running", self._running, -1)
            self._runs()

    def committed(self, block: Block, prompt_tokens: int, cached_tokens: int) -> None:
        """Measures a block that was committed now; of the first also what was cached."""
        now, to, labels, tokens = time.monotonic(), self._to, self._labels, len(block.token_ids)
        if self._running is None:
            self._begins(block, now, prompt_tokens, cached_tokens)
        else:
            to.observe("block_latency_seconds", now - self._last, labels)
            if tokens:
                each = (now - self._last) / tokens
                to.observe("inter_token_latency_seconds", each, labels)
        self._last = now
        to.add("generation_tokens_total", tokens, labels)
        to.add("nfe_total", block.nfe, labels)
        to.add("context_passes_total", block.context_passes, labels)
        if block.nfe:
            to.observe("tokens_per_nfe", tokens / block.nfe, labels)
        if block.drafted_tokens:
            self._drafted(block)
        if block.timing is not None and block.timing.commit_s:
            to.observe("commit_latency_seconds", block.timing.commit_s, labels)
        if block.timing is not None and block.nfe:
            to.observe("state_transfer_seconds", block.timing.transfer_s, labels)

    def ended(self, reason: str) -> float:
        """Counts the end of the completion; returns the seconds since it arrived."""
        if self._running is None:
            self._metrics.change("num_requests_waiting", self._waiting, -1)
        else:
            self._metrics.change("num_requests_running", self._running, -1)
        seconds = time.monotonic() - self._arrived
        self._to.observe("e2e_request_latency_seconds", seconds, self._labels)
        labels = {**self._labels, "finished_reason": reason}
        self._to.add("request_success_total", 1, labels)
        return seconds

    def _runs(self) -> None:
        self._running = self._labels
        self._metrics.change("num_requests_running", self._running, 1)

    def _begins(self, block: Block, now: float, prompt_tokens: int, cached_tokens: int) -> None:
        to, labels = self._to, self._labels
        self._metrics.change("num_requests_waiting", self._waiting, -1)
        self._runs()
        self.first_s = now - self._arrived
        to.observe("time_to_first_token_seconds", self.first_s, labels)
        to.add("prompt_tokens_total", prompt_tokens, labels)
        to.add("prefix_cache_queries_total", prompt_tokens, labels)
        to.add("prefix_cache_hits_total", cached_tokens, labels)
        if block.timing is not None:
            to.observe("request_queue_time_seconds", block.timing.queue_s, labels)
            to.observe("prefill_seconds", block.timing.prefill_s, labels)

    def _drafted(self, block: Block) -> None:
        looked_up, taken = block.lookup_drafted_tokens, block.lookup_accepted_tokens
        self._drafted_by("lookup", looked_up, taken)
        self._drafted_by(
            "denoiser", block.drafted_tokens - looked_up, block.accepted_tokens - taken
        )
        if block.drafted_by == "denoiser":
            # A block of lookups holds several drafts.
            self._to.observe("accepted_length", block.accepted_tokens, self._labels)

    def _drafted_by(self, source: str, drafted: int, accepted: int) -> None:
        if drafted:
            labels = {**self._labels, "source": source}
            self._to.add("drafted_tokens_total", drafted, labels)
            self._to.add("accepted_tokens_total", accepted, labels)

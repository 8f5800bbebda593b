"""Every metric of the service: name, kind, meaning, labels.

Suffixes are those that dashboards of other inference servers know. The names are exported with the
prefix `twotower_`; Ray's own ports put `ray_` before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "twotower_"
Kind = Literal["counter", "gauge", "histogram"]
Labels = dict[str, str]

# The pair that served, "" before one has it.
_REQUEST = ("model", "mode", "pair")
_TOWER = ("model", "pair", "tower")
# Steps of about 1, 2, 5, from a millisecond to a hundred seconds.
SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
# From a token that took many passes to a block that took one.
_PER_PASS = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
# Ray takes no bound of 0: drafts of which nothing was accepted are below the first.
_LENGTHS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)


@dataclass(frozen=True)
class Instrument:
    """What a metric is; `boundaries` are the upper bounds of a histogram's buckets."""

    kind: Kind
    text: str
    labels: tuple[str, ...]
    boundaries: tuple[float, ...] = ()


Table = dict[str, Instrument]


def _counter(text: str, labels: tuple[str, ...] = _REQUEST) -> Instrument:
    return Instrument("counter", text, labels)


def _gauge(text: str, labels: tuple[str, ...]) -> Instrument:
    return Instrument("gauge", text, labels)


def _histogram(text: str, boundaries: tuple[float, ...] = SECONDS) -> Instrument:
    return Instrument("histogram", text, _REQUEST, boundaries)


# Kept by each router.
ROUTER: Table = {
    "num_requests_running": _gauge("Completions that have had a block.", _REQUEST),
    "num_requests_waiting": _gauge("Completions that wait for their first block.", _REQUEST),
    "prompt_tokens_total": _counter("Tokens of prompts."),
    "generation_tokens_total": _counter("Tokens of outputs."),
    "nfe_total": _counter("Passes of the denoiser tower for blocks."),
    "context_passes_total": _counter("Passes of the context tower for blocks."),
    "drafted_tokens_total": _counter(
        "Drafted tokens that the context tower has checked, by source: lookup or denoiser.",
        (*_REQUEST, "source"),
    ),
    "accepted_tokens_total": _counter(
        "Drafted tokens that it has accepted, by source.", (*_REQUEST, "source")
    ),
    "prefix_cache_queries_total": _counter("Tokens of prompts looked up in prefix caches."),
    "prefix_cache_hits_total": _counter("Tokens of prompts found in prefix caches."),
    "request_success_total": _counter(
        "Completions that have ended, by reason: stop, length, abort or error.",
        (*_REQUEST, "finished_reason"),
    ),
    "request_errors_total": _counter(
        "Requests that were answered by an error, by gRPC status.", ("model", "code")
    ),
    "requests_by_key_total": _counter("Prompts that were let in, by key.", ("model", "key")),
    "time_to_first_token_seconds": _histogram("From a request to its first block."),
    "inter_token_latency_seconds": _histogram(
        "Time between two blocks, a token of the later; one observation a block."
    ),
    "block_latency_seconds": _histogram("Time between two blocks of a completion."),
    "e2e_request_latency_seconds": _histogram("From a request to the end of its completion."),
    "request_queue_time_seconds": _histogram("Time in the queue of a pair."),
    "prefill_seconds": _histogram("Time in which a pair has read a prompt."),
    "commit_latency_seconds": _histogram("Time in which the context tower has read a block."),
    "state_transfer_seconds": _histogram(
        "Time that a block has waited for its context's state to reach the denoiser."
    ),
    "tokens_per_nfe": _histogram("Tokens of a block per pass of the denoiser.", _PER_PASS),
    "accepted_length": _histogram("Accepted tokens of a draft of the denoiser.", _LENGTHS),
}

# Kept by each pair, from the counters of its towers.
PAIR: Table = {
    "rows": _gauge("Rows that are open or wait for room.", _TOWER),
    "queued_rows": _gauge("Rows that wait for a slot and pages.", _TOWER),
    "slots": _gauge("Slots of Mamba states.", _TOWER),
    "slots_used": _gauge("Slots of Mamba states in use.", _TOWER),
    "kv_cache_usage_perc": _gauge(
        "Share of the pages of K/V in use, the prefix cache's included; 1 is all.", _TOWER
    ),
    "state_bytes": _gauge("Bytes of slots and pages in use.", _TOWER),
    "prefix_cache_entries": _gauge("Snapshots in the prefix cache.", _TOWER),
    "prefix_cache_bytes": _gauge("Bytes of snapshots in the prefix cache.", _TOWER),
    "prefix_cache_prompt_hits_total": _counter(
        "Prompts of which the prefix cache had a part.", _TOWER
    ),
    "prefix_cache_prompt_misses_total": _counter(
        "Prompts of which the prefix cache had nothing.", _TOWER
    ),
    "busy_share": _gauge("Share of the time since the last report spent in passes.", _TOWER),
    "passes_total": _counter("Passes of a tower.", _TOWER),
    "pass_rows_total": _counter("Rows of all passes together.", _TOWER),
    "pass_tokens_total": _counter("Tokens of all passes together.", _TOWER),
    "pass_seconds_total": _counter("Seconds of all passes together.", _TOWER),
    "state_links": _gauge(
        "Links between towers, by the transport that carries their states: grpc, gloo or nccl.",
        (*_TOWER, "transport"),
    ),
    "state_transfers_total": _counter("Updates of states that denoisers have taken.", _TOWER),
    "state_transfer_bytes_total": _counter("Bytes of these updates.", _TOWER),
    "state_transfer_seconds_total": _counter(
        "Seconds from the end of the pass that made an update to its receipt.", _TOWER
    ),
    "eased": _gauge("Share of the way to their floors on which rows begin now.", ("model", "pair")),
}

# Made with the page of metrics.
PAGE: Table = {
    "node_up": _gauge("1 if a node of the cluster has given its metrics to this page.", ("node",)),
}

ALL: Table = {**ROUTER, **PAIR, **PAGE}


def sample_names(name: str) -> list[str]:
    """The full names of a metric's series, as Prometheus has them."""
    suffixes = ("_bucket", "_count", "_sum") if ALL[name].kind == "histogram" else ("",)
    return [PREFIX + name + suffix for suffix in suffixes]

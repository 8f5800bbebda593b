"""The load of a pair, as gauges and as signals."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from twotower.deployments.pair.autoscaling import PairSignals
from twotower.deployments.pair.metrics import COUNTERS, GAUGES, LINKS, PairMetrics, signals
from twotower.deployments.telemetry.instruments import LocalInstruments
from twotower.deployments.telemetry.names import PAIR
from twotower.towers.engine.stats import EngineStats


def stats(**changed: float) -> EngineStats:
    """STATS with some others."""
    return replace(STATS, **changed)  # type: ignore[arg-type]


STATS = EngineStats(
    rows=5,
    queued_rows=0,
    pending_work=0,
    passes=10,
    pass_rows=50,
    pass_tokens=500,
    prefill_tokens=0,
    pass_seconds=1.0,
    clock_seconds=10.0,
    busy_share=0.1,
    slots=8,
    slots_used=5,
    pages=100,
    pages_used=20,
)


def exported(instruments: LocalInstruments) -> dict[tuple[str, str], float]:
    """Values by name and tower, all of one model and one pair."""
    found = {}
    text = (instruments.text() or b"").decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert (sample.labels["model"], sample.labels["pair"]) == ("tiny", "p1")
            name = sample.name.removeprefix("twotower_")
            if "transport" in sample.labels:
                name += f" {sample.labels['transport']}"
            if not name.endswith("_created"):
                found[name, sample.labels.get("tower", "")] = sample.value
    return found


def test_gauges_follow_the_stats_and_counters_what_is_added() -> None:
    instruments = LocalInstruments(PAIR)
    report = PairMetrics("tiny", "p1", instruments)
    first = replace(STATS, rows=3, queued_rows=2, slots_used=4, cache_entries=6, cache_hits=2)
    alone = replace(STATS, slots=None, slots_used=None, pages=None, pages_used=None)
    report.report({"context": first, "denoiser": replace(alone, rows=1)}, eased=0.0)
    later = replace(
        first,
        rows=0,
        clock_seconds=12.0,
        pass_seconds=2.5,
        passes=14,
        pages_used=50,
        grpc_links=1,
        gloo_links=0,
        nccl_links=2,
        transfers=3,
        transfer_bytes=3000,
        transfer_seconds=0.5,
    )
    report.report({"context": later}, eased=0.25)
    found = exported(instruments)
    assert {name: value for (name, tower), value in found.items() if tower == "context"} == {
        "rows": 0,
        "queued_rows": 2,
        "slots": 8,
        "slots_used": 4,
        "kv_cache_usage_perc": 0.5,
        "prefix_cache_entries": 6,
        "prefix_cache_prompt_hits_total": 2,
        "busy_share": 0.75,
        "passes_total": 14,
        "pass_rows_total": 50,
        "pass_tokens_total": 500,
        "pass_seconds_total": 2.5,
        "state_links grpc": 1,
        "state_links gloo": 0,
        "state_links nccl": 2,
        "state_transfers_total": 3,
        "state_transfer_bytes_total": 3000,
        "state_transfer_seconds_total": 0.5,
    }
    assert {name for name, tower in found if tower == "denoiser"} == {
        *("rows", "queued_rows", "busy_share"),
        *("passes_total", "pass_rows_total", "pass_tokens_total", "pass_seconds_total"),
    }
    assert found["eased", ""] == 0.25


def test_a_tower_that_was_started_anew_counts_on() -> None:
    instruments = LocalInstruments(PAIR)
    report = PairMetrics("tiny", "p1", instruments)
    for passes in (10, 4, 5):
        report.report({"denoiser": replace(STATS, passes=passes)}, eased=0.0)
    assert exported(instruments)["passes_total", "denoiser"] == 10 + 4 + 1


def test_every_metric_of_a_pair_has_a_source() -> None:
    known = {field.name for field in fields(EngineStats)}
    assert {*GAUGES.values(), *COUNTERS.values(), *LINKS.values()} <= known
    others = {"kv_cache_usage_perc", "busy_share", "eased", "state_links"}
    assert {*GAUGES, *COUNTERS, *others} == set(PAIR)


def test_signals_say_what_two_readings_show() -> None:
    before = {"context": stats(), "denoiser": stats()}
    now = {
        "context": stats(rows=7, queued_rows=2, passes=14, pass_seconds=1.2, pages_used=99),
        "denoiser": stats(pages_used=60, passes=10),
    }
    found = signals(before, now)
    assert found == {
        "rows": 5,
        "queued_rows": 2,
        # 12 pages a row, 40 left: three rows, as many as there are slots.
        "free_slots": 3,
        "context_pass_s": pytest.approx(0.05),
        "passes": 14,
    }
    now["denoiser"] = replace(now["denoiser"], pages_used=90)
    assert signals(before, now)["free_slots"] == pytest.approx(10 / 18)
    assert set(found) <= set(PairSignals._fields)


def test_signals_of_one_context_tower_alone_or_with_several_denoisers() -> None:
    alone = {"context": stats()}
    assert signals(alone, alone) == {"rows": 5, "queued_rows": 0, "free_slots": 3, "passes": 10}
    several = {
        "context": stats(slots=16, rows=9, slots_used=9),
        "denoiser": stats(slots_used=4),
        "denoiser_1": stats(slots_used=6),
    }
    later = {name: replace(t, passes=12, pass_seconds=1.5) for name, t in several.items()}
    later["denoiser_1"] = stats(slots_used=6, passes=14, pass_seconds=1.3, queued_rows=1)
    found = signals(several, later)
    assert (found["rows"], found["queued_rows"], found["free_slots"]) == (8, 1, 4 + 2)
    assert found["denoiser_pass_s"] == pytest.approx((0.5 + 0.3) / (2 + 4))


def test_a_denoiser_that_shares_the_context_towers_memory_has_room_as_it_has() -> None:
    shared = stats(slots=None, slots_used=None, pages=None, pages_used=None)
    towers = {"context": stats(), "denoiser": shared}
    assert signals(towers, towers)["free_slots"] == 3

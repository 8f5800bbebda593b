"""The policy against loads whose answer is known, and its adapter inside Serve's own machinery."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from twotower.deployments.pair.autoscaling import (
    MEMORY_FILL,
    UNKNOWN,
    PairAutoscaling,
    PairScaling,
    PairSignals,
    ServePairScaling,
    Tick,
    serve_settings,
)

with warnings.catch_warnings():
    # Ray's own models use a spelling that pydantic has deprecated; ours may not.
    warnings.simplefilter("ignore")
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig

OPTIONS = PairAutoscaling(
    max_pairs=50,
    target_rows_per_pair=10.0,
    smoothing_s=5.0,
    scale_down_after_s=60.0,
    hysteresis=0.1,
    zero_after_s=100.0,
)
SLOTS = 20
STEP_S = 2.0
Load = Callable[[float], float]


def changed(**options: Any) -> PairAutoscaling:
    """OPTIONS with some others."""
    return OPTIONS.model_copy(update=options)


def tick(time: float, pairs: int, rows: float, *, queued: float = 0.0) -> Tick:
    """Rows spread evenly over the pairs, all of which report at once; no pair: all are queued."""
    if not pairs:
        return Tick(time, 0, [], rows + queued, rows + queued)
    each = rows / pairs
    signal = PairSignals(min(each, SLOTS), max(0.0, each - SLOTS), max(0.0, SLOTS - each))
    return Tick(time, pairs, [signal._replace(read_at=time)] * pairs, rows + queued, queued)


def followed(load: Load, seconds: float, options: PairAutoscaling = OPTIONS) -> list[int]:
    """The number of pairs after each tick, every new pair up at once."""
    scaling, pairs, found = PairScaling(options), max(1, options.min_pairs), []
    for step in range(int(seconds / STEP_S)):
        time = step * STEP_S
        pairs = scaling.pairs_for(tick(time, pairs, load(time)))
        found.append(pairs)
    return found


def changes(pairs: Sequence[int]) -> list[int]:
    return [b - a for a, b in pairwise(pairs) if a != b]


def square(low: float, high: float, period: float) -> Load:
    return lambda time: low if time % period < period / 2 else high


@pytest.mark.parametrize(
    ("rows", "pairs"), [(0, 1), (5, 1), (10, 1), (11, 2), (95, 10), (9999, 50)]
)
def test_a_steady_load_gets_its_rows_over_the_target(rows: float, pairs: int) -> None:
    assert followed(lambda _: rows, 300)[-1] == pairs


def test_pairs_come_within_the_smoothing_and_go_after_the_window() -> None:
    found = followed(lambda time: 100.0 if 100 <= time < 200 else 5.0, 400)
    times = {pairs: index * STEP_S for index, pairs in reversed(list(enumerate(found)))}
    up = times[10]
    # Of the step from half a pair to ten, 14 % is missing after two time constants.
    assert 100 + 2 * OPTIONS.smoothing_s <= up <= 100 + 6 * OPTIONS.smoothing_s
    down = next(index * STEP_S for index, pairs in enumerate(found) if pairs == 1 and index > 100)
    assert 200 + OPTIONS.scale_down_after_s <= down <= 240 + OPTIONS.scale_down_after_s
    assert found[int(258 / STEP_S)] == 10


@pytest.mark.parametrize("period", [4.0, 20.0, 60.0, 90.0])
def test_a_square_wave_within_the_window_moves_nothing_after_its_first_peak(period: float) -> None:
    found = followed(square(5, 200, period), 1200)
    assert min(changes(found)) > 0, "a pair went while the wave went on"
    settled = int((period + 10 * OPTIONS.smoothing_s) / STEP_S)
    assert changes(found[settled:]) == []


def test_a_slow_square_wave_moves_each_way_once_in_a_period() -> None:
    moves = changes(followed(square(5, 200, 600), 3000))
    turns = sum((a > 0) != (b > 0) for a, b in pairwise(moves))
    # Five peaks, and the calms between them.
    assert turns == 2 * 5 - 2
    # Without smoothing, window and margin the same wave and a noisy load do turn.
    abrupt = changed(smoothing_s=0.0, scale_down_after_s=0.0, hysteresis=0.0)
    assert len(changes(followed(square(5, 200, 20), 1200, abrupt))) > 100


def test_a_load_that_trembles_around_a_border_moves_nothing() -> None:
    noise = random.Random(3)
    found = followed(lambda _: 30 + noise.uniform(-2, 2), 3000)
    assert changes(found[20:]) == []


# So many that all pairs of options occur.
@pytest.mark.parametrize("seed", range(20))
def test_more_load_never_gives_fewer_pairs(seed: int) -> None:
    draw = random.Random(seed)
    options = changed(min_pairs=draw.choice((0, 1, 3)), smoothing_s=draw.choice((0.0, 5.0, 30.0)))
    less, more = PairScaling(options), PairScaling(options)
    fewer = wanted = draw.randint(1, 6)
    rows = 0.0
    for step in range(600):
        time = step * STEP_S
        if draw.random() < 0.1:
            rows = draw.choice((0.0, 3.0, 40.0, 300.0)) * draw.random()
        fewer = less.pairs_for(tick(time, fewer, rows))
        wanted = more.pairs_for(tick(time, wanted, rows + draw.choice((0.0, 0.5, 30.0))))
        assert fewer <= wanted, (step, rows)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_whatever_comes(seed: int) -> None:
    draw = random.Random(seed)
    options = changed(min_pairs=2, max_pairs=7)
    odd = (0.0, 1.0, 55.0, 1e12, -4.0, math.inf, -math.inf, UNKNOWN)
    runs = []
    for _ in range(2):
        draw = random.Random(seed)
        scaling, pairs, found = PairScaling(options), 3, []
        for step in range(400):
            time = STEP_S * step + draw.choice((0.0, 0.0, -50.0, 400.0))
            signals = [
                PairSignals(*(draw.choice(odd) for _ in range(5)), time + draw.choice((0.0, -99.0)))
                for _ in range(draw.randint(0, pairs))
            ]
            asked = Tick(time, pairs, signals, draw.choice(odd), draw.choice(odd))
            pairs = scaling.pairs_for(asked)
            found.append(pairs)
        assert set(found) <= set(range(2, 8))
        runs.append(found)
    assert runs[0] == runs[1]


def test_without_signals_the_number_stays_and_a_calm_is_not_assumed() -> None:
    scaling, pairs = PairScaling(OPTIONS), 1
    for step in range(60):
        pairs = scaling.pairs_for(tick(step * STEP_S, pairs, 80))
    assert pairs == 8
    for step in range(60, 300):
        time = step * STEP_S
        assert scaling.pairs_for(Tick(time, 8, [PairSignals()] * 8)) == 8
    # Then nothing is left: only a whole window of that lets pairs go.
    found = [scaling.pairs_for(tick(step * STEP_S, 8, 0)) for step in range(300, 360)]
    last_kept = max(index for index, wanted in enumerate(found) if wanted == 8)
    assert abs(last_kept * STEP_S - OPTIONS.scale_down_after_s) <= 2 * STEP_S


@pytest.mark.parametrize("stale", [False, True])
def test_pairs_that_do_not_report_are_covered_by_the_router(stale: bool) -> None:
    scaling, pairs = PairScaling(OPTIONS), 4
    for step in range(200):
        time = step * STEP_S
        known = PairSignals(10, 0, 10, read_at=time)
        lost = PairSignals(0, 0, 20, read_at=time - 31) if stale else PairSignals()
        pairs = scaling.pairs_for(Tick(time, pairs, [known, lost, lost, lost], requests=40))
    assert pairs == 4
    # With the router silent as well, what is known may raise the number but not lower it.
    scaling = PairScaling(OPTIONS)
    for step in range(200):
        time = step * STEP_S
        few = [PairSignals(1, 0, 19, read_at=time), PairSignals()]
        assert scaling.pairs_for(Tick(time, 4, few)) == 4
    many = [PairSignals(20, 80, 0, read_at=time + 60), PairSignals()]
    assert scaling.pairs_for(Tick(time + 60, 4, many)) == 10


def test_a_controller_that_starts_anew_keeps_the_pairs_for_a_window() -> None:
    scaling = PairScaling(OPTIONS)
    found = [scaling.pairs_for(tick(step * STEP_S, 9, 0)) for step in range(60)]
    kept = int(OPTIONS.scale_down_after_s / STEP_S)
    assert found[:kept] == [9] * kept
    assert found[kept:] == sorted(found[kept:], reverse=True)
    assert found[kept + int(5 * OPTIONS.smoothing_s / STEP_S)] == 1


def test_the_last_pair_goes_after_a_calm_and_comes_with_the_first_row() -> None:
    options = changed(min_pairs=0)
    found = followed(lambda time: 4.0 if time < 100 or time >= 400 else 0.0, 500, options)
    gone = found.index(0) * STEP_S
    assert 98 + options.zero_after_s <= gone <= 100 + options.zero_after_s
    assert set(found[int(gone / STEP_S) : int(400 / STEP_S)]) == {0}
    assert found[int(400 / STEP_S)] == 1
    assert 0 not in followed(lambda time: 1.0 if time % 90 < 2 else 0.0, 2000, options)
    assert 0 not in followed(lambda _: 0.0, 2000)


def test_a_service_without_pairs_stays_without_while_nobody_asks() -> None:
    scaling = PairScaling(changed(min_pairs=0))
    assert [scaling.pairs_for(tick(step * STEP_S, 0, 0)) for step in range(100)] == [0] * 100
    assert scaling.pairs_for(tick(300.0, 0, 0, queued=1)) == 1


@pytest.mark.parametrize(("worked", "gone"), [(False, True), (True, False)])
def test_only_work_keeps_the_last_pair(worked: bool, gone: bool) -> None:
    """Questions after its health count as requests; short rows show in the passes only."""
    scaling = PairScaling(changed(min_pairs=0))
    found = []
    for step in range(200):
        time = step * STEP_S
        passes = 7 + (step // 20 if worked else 0)
        signals = PairSignals(0, 0, SLOTS, passes=passes, read_at=time)
        found.append(scaling.pairs_for(Tick(time, 1, [signals], 0.3 * (step % 3), 0)))
    assert (0 in found) == gone


@pytest.mark.parametrize(
    ("signals", "max_pass_s", "pairs"),
    [
        # 20 rows on each of two pairs: over the target of 10 that is four pairs.
        (PairSignals(20, 0, 20), None, 4),
        # Only 8 rows fit, of which a share is to be used.
        (PairSignals(8, 12, 0), None, math.ceil(40 / (8 * MEMORY_FILL))),
        # Passes that take twice as long as they may: half of the rows.
        (PairSignals(8, 12, 12, 0.01, 0.2), 0.1, 10),
        (PairSignals(8, 12, 12, 0.16, 0.02), 0.1, 8),
        (PairSignals(8, 12, 12, 0.05, 0.02), 0.1, 4),
        (PairSignals(1, 19, 12, 9.0, 9.0), 0.1, 40),
    ],
)
def test_a_pair_that_holds_less_counts_for_less(
    signals: PairSignals, max_pass_s: float | None, pairs: int
) -> None:
    scaling = PairScaling(changed(max_pass_s=max_pass_s, smoothing_s=0.0))
    assert scaling.pairs_for(Tick(0, 1, [signals._replace(read_at=0)] * 2, 40, 0)) == pairs


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_pairs": -1},
        {"max_pairs": 0},
        {"min_pairs": 4, "max_pairs": 3},
        {"target_rows_per_pair": 0.5},
        {"target_rows_per_pair": math.nan},
        {"hysteresis": 1.0},
        {"smoothing_s": -1.0},
        {"zero_after_s": math.inf},
        {"max_pass_s": math.nan},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}|max_pairs"):
        PairAutoscaling(**{"max_pairs": 2, **wrong})


class Point:
    """A point of a series as Serve keeps it."""

    def __init__(self, timestamp: float, value: float) -> None:
        self.timestamp = timestamp
        self.value = value


def serve_context(time: float, pairs: int, rows: float, reporting: int) -> Any:
    """What Serve hands to a policy, with the fields that ours reads."""
    names = [f"pair-{index}" for index in range(pairs)]
    values = {"rows": rows, "queued_rows": 0.0, "free_slots": SLOTS - rows}
    series = {
        name: {pair: [Point(time - 9, 99.0), Point(time - 1, value)] for pair in names[:reporting]}
        for name, value in values.items()
    }
    return SimpleNamespace(
        current_time=time,
        target_num_replicas=pairs,
        running_replicas=names,
        total_num_requests=rows * pairs,
        total_queued_requests=0.0,
        raw_metrics=series,
    )


@pytest.fixture
def serve_config() -> AutoscalingConfig:
    options = changed(smoothing_s=0.0, metrics_interval_s=10.0)
    return AutoscalingConfig(**serve_settings(options))


def test_serve_takes_the_settings_and_adds_no_manners_of_its_own(
    serve_config: AutoscalingConfig,
) -> None:
    assert (serve_config.min_replicas, serve_config.max_replicas) == (1, 50)
    assert serve_config.initial_replicas == 1
    assert serve_config.upscale_delay_s == serve_config.downscale_delay_s == 0
    assert serve_config.look_back_period_s > serve_config.metrics_interval_s
    from_zero = AutoscalingConfig(**serve_settings(changed(min_pairs=0, metrics_interval_s=10.0)))
    assert (from_zero.min_replicas, from_zero.initial_replicas) == (0, 1)


def test_the_pickled_policy_decides_once_an_interval(serve_config: AutoscalingConfig) -> None:
    policy = serve_config.policy
    made = policy.get_policy()(**policy.policy_kwargs)
    assert made(serve_context(0.0, 2, 15.0, reporting=2))[0] == 3
    # Within the interval nothing is decided, after it the newest points are read.
    assert made(serve_context(9.9, 2, 18.0, reporting=2)) == (2, {})
    assert made(serve_context(10.0, 2, 18.0, reporting=1))[0] == 4
    assert made(serve_context(20.0, 4, 0.0, reporting=0))[0] == 4


def test_serve_gives_the_policy_the_last_word(serve_config: AutoscalingConfig) -> None:
    """Through the wrapper with which Serve applies its own delays and factors."""
    ours = ServePairScaling(**serve_config.policy.policy_kwargs)
    wrapped = _apply_autoscaling_config(ours)

    def asked(time: float, pairs: int, rows: float, running: int) -> int:
        context = serve_context(time, pairs, rows, reporting=pairs)
        context.current_num_replicas = running
        context.config = serve_config
        context.policy_state = {}
        wanted: int = wrapped(context)[0]
        return wanted

    assert asked(0.0, 2, 15.0, running=2) == 3
    assert [asked(time, 3, 1.0, running=3) for time in (10.0, 30.0, 50.0)] == [3, 3, 3]
    assert asked(80.0, 3, 1.0, running=3) == 1


def test_the_module_that_serve_pickles_is_light() -> None:
    code = (
        "import sys, twotower.deployments.pair.autoscaling; "
        "assert not {'torch', 'ray', 'grpc', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

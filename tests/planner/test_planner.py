"""The planner against figures derived apart from it, and against hand-made cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from twotower.bench.options import defaults_for
from twotower.bench.report import Report
from twotower.cli.main import app
from twotower.planner import commits
from twotower.planner.devices import DEVICES, device_named
from twotower.planner.estimates import Estimate, break_even
from twotower.planner.floors import Ceilings
from twotower.planner.flow import in_step_pair, simulate_pair
from twotower.planner.gpu_memory import row_bytes, tower_bytes
from twotower.planner.measured import MeasuredPasses, read_measured
from twotower.planner.passes import FLOOR, Passes
from twotower.planner.plan import Plan, make_plan
from twotower.planner.question import Question, formats_named, model_config
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE, TINY
from twotower.planner.speedup import PassSeconds
from twotower.planner.text import to_dict, to_text
from twotower.towers.errors import ConfigError

# Denoiser passes a block at which the released model would be 2.42 times as fast as AR.
HEADLINE = BLOCK / 5.6
GOLDEN = Path(__file__).parents[1] / "golden"


def found(plan: Plan, name: str, experts: str = "full") -> Estimate:
    (own,) = [own for own in plan.estimates if (own.name, own.experts) == (name, experts)]
    return own


def floors(batch: int, **more: Any) -> Plan:
    """On an H200 at its measured ceilings, every pass at its floor."""
    more = {"tokens_per_nfe": HEADLINE, "most_denoisers": 1, **more}
    return make_plan(Question("h200", batch=batch, **more), reached=FLOOR)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(1, 0.73), (16, 1.37), (32, 1.78), (48, 1.88), (64, 1.87), (96, 1.75), (128, 1.63)],
)
def test_speed_up_of_both_towers_on_one_gpu(batch: int, expected: float) -> None:
    """Derived by hand from bytes and operations of every operator."""
    plan = floors(batch, experts=("full",))
    ratio = found(plan, "colocated").in_step / found(plan, "AR").in_step
    assert ratio == pytest.approx(expected, rel=0.01)
    assert found(plan, "colocated").ceiling == pytest.approx(found(plan, "colocated").in_step)


@pytest.mark.parametrize(("batch", "expected"), [(1, 0.98), (16, 1.41), (64, 1.61), (128, 1.32)])
def test_speed_up_with_experts_in_eight_bits(batch: int, expected: float) -> None:
    """The hand figures put all positions through the head, these the masked ones."""
    plan = floors(batch, experts=("fp8",))
    ratio = found(plan, "colocated", "fp8").in_step / found(plan, "AR", "fp8").in_step
    assert ratio == pytest.approx(expected, rel=0.04)
    assert ratio > expected * 0.99


def test_sixty_four_rows_out_of_step() -> None:
    """4.05 thousand tokens/s of AR; 7.6 in step, 5.1 to 6.1 as extensions wait for company."""
    plan = floors(64)
    assert found(plan, "AR").tokens_per_s == pytest.approx(4050, rel=0.01)
    own = found(plan, "colocated")
    assert own.in_step == pytest.approx(7600, rel=0.02)
    assert 5100 < own.tokens_per_s < 7000


@pytest.mark.parametrize(("cost", "steps"), [(1.0, 15.0), (2.0, 7.0)])
def test_break_even(cost: float, steps: float) -> None:
    """A block takes n denoiser passes and one of the context tower, each `cost` AR steps."""
    even = break_even(lambda n: BLOCK / (cost * (n + 1)), 1.0)
    assert even == pytest.approx(BLOCK / steps, rel=1e-6)
    assert break_even(lambda n: BLOCK / (cost * (n + 1)), 9.0) is None
    assert break_even(lambda _: 2.0, 1.0) == 1.0


def test_an_estimate_equals_ar_where_it_says_so() -> None:
    first = floors(64, experts=("full",), most_denoisers=3)
    for name in ("colocated", "1:1", "1:3"):
        even = found(first, name).break_even
        assert even is not None
        again = floors(64, experts=("full",), most_denoisers=3, tokens_per_nfe=even)
        own, ar = found(again, name), found(again, "AR")
        assert own.in_step / own.gpus == pytest.approx(ar.in_step, rel=1e-6)


def test_weights_are_those_of_the_released_shapes() -> None:
    full = tower_bytes(LARGE, fp8=False)
    assert full["context"] == 31_577_940_288 * 2
    assert full["denoiser"] - full["context"] == 30_022_272 * 2
    assert sum(full.values()) == 63_185_902_848 * 2
    routed = 23 * 128
    values, scales = routed * 9_977_856, routed * (1856 + 2688) * 4
    assert tower_bytes(LARGE, fp8=True)["context"] == full["context"] - values + scales


def test_a_row_is_a_slot_and_pages() -> None:
    slot = 48_234_496 + 23 * 6144 * 3 * 2
    assert row_bytes(LARGE, 4096) == slot + 4096 * 6144
    # Pages of 64 tokens.
    assert row_bytes(LARGE, 4097) - row_bytes(LARGE, 4096) == 64 * 6144


def test_which_placements_fit() -> None:
    small = {"batch": 16, "most_denoisers": 1}
    h100 = make_plan(Question("h100", **small))
    assert not found(h100, "colocated").fits
    assert found(h100, "colocated").tokens_per_s == 0
    assert found(h100, "1:1").fits
    assert found(h100, "colocated", "fp8").fits
    assert found(make_plan(Question("h200", **small)), "colocated").fits


def test_a_context_tower_has_the_rows_of_all_its_denoisers() -> None:
    plan = make_plan(Question("h100", experts=("full",)))
    pairs = [own for own in plan.estimates if own.name.startswith("1:")]
    # The first that does not fit is the last to be tried.
    assert [own.fits for own in pairs] == [True] * (len(pairs) - 1) + [False]
    for own in pairs:
        context, denoiser = own.memory
        assert (context.rows, denoiser.rows) == (64 * own.denoisers, 64)
    one, two = pairs[0].memory[0], pairs[1].memory[0]
    assert two.states - one.states == 64 * row_bytes(LARGE, 4096 + BLOCK)


def test_what_does_not_fit_is_refused_with_its_arithmetic() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(Question("l40s", experts=("full",)))
    text = str(caught.value)
    memory = DEVICES["l40s"].memory_bytes
    assert f"{tower_bytes(LARGE, fp8=False)['context']} weights" in text
    assert f"has {memory}" in text
    fits = found(make_plan(Question("l40s", experts=("fp8",), batch=1)), "AR", "fp8").memory[0]
    parts = fits.weights + fits.states + fits.runtime
    assert parts + fits.work <= fits.needed <= memory
    assert f"needs {fits.needed} bytes" in fits.arithmetic()


def test_prompts_shift_the_work_to_the_context_tower() -> None:
    question = {"gpu": "h200", "tokens_per_nfe": 2.85, "experts": ("full",)}
    without = make_plan(Question(**question))  # type: ignore[arg-type]
    with_prompts = make_plan(Question(**question, output_tokens=512))  # type: ignore[arg-type]
    assert (without.denoisers["full"] or 0) > 4
    assert with_prompts.denoisers["full"] == 1
    for own in with_prompts.estimates:
        assert own.tokens_per_s < found(without, own.name).tokens_per_s
    # 3,584 prompt tokens a row at most as fast as the products alone: 6.5 GFLOP each.
    assert with_prompts.passes[0].floor_ms["prefill"] > 1e3 * 3584 * 6.5e9 / 790e12


def test_the_best_is_the_best() -> None:
    plan = make_plan(Question("h200", tokens_per_nfe=6.0))
    assert plan.best.per_gpu == max(own.per_gpu for own in plan.estimates)
    assert all(own.tokens_per_s <= own.ceiling * 1.35 for own in plan.estimates)


def test_measured_tokens_per_pass() -> None:
    assert commits.tokens_per_nfe("plain", 0.8) == 1.32
    assert commits.tokens_per_nfe("open", 0.5) == 2.04
    assert commits.tokens_per_nfe("code", 0.8) == 2.35
    assert commits.tokens_per_nfe("plain", 0.75) == pytest.approx((1.48 + 1.32) / 2)
    assert commits.tokens_per_nfe("open", 1.0) == 1.0


@pytest.mark.parametrize("steps", [1.9, 5.6, 8.0, 12.0, 15.0])
def test_drawn_blocks_take_the_steps_that_were_asked_for(steps: float) -> None:
    rows = commits.rows_of_blocks(steps, 64, 16)
    blocks = [block for row in rows for block in row]
    assert {sum(block) for block in blocks} == {BLOCK}
    assert sum(map(len, blocks)) / len(blocks) == pytest.approx(steps, rel=0.02)
    assert rows == commits.rows_of_blocks(steps, 64, 16)
    assert len({tuple(row) for row in rows}) > 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Question("h900"), "gpu: got 'h900', expected one of a100-80"),
        (lambda: Question(batch=0), "batch: got 0"),
        (lambda: Question(context=8), "context: got 8"),
        (lambda: Question(output_tokens=4096), "output_tokens: got 4096, expected 1 to 4095"),
        (lambda: Question(lookup_tokens=0.9), "lookup_tokens: got 0.9, expected 1 to 16"),
        (lambda: Question(cycle_tokens=17), "cycle_tokens: got 17, expected 1 to 16"),
        (lambda: Question(gamma=0.3).steps, "gamma: got 0.3, expected 0.5 to 1"),
        (lambda: Question(text="poem").steps, "text: got 'poem'"),
        (lambda: Question(tokens_per_nfe=17).steps, "tokens_per_nfe: got 17, expected 1 to 16"),
        (lambda: formats_named("int3"), "experts: got 'int3'"),
        (lambda: model_config("no-such-folder"), "no-such-folder"),
    ],
)
def test_wrong_questions_are_refused_by_name(make: Callable[[], object], named: str) -> None:
    with pytest.raises(Exception, match=named.replace("[", r"\[")):
        make()


def constant(denoise: float, extend: float) -> PassSeconds:
    return PassSeconds(lambda _: denoise, lambda _: extend)


def test_one_row_takes_its_steps_its_update_and_an_extension() -> None:
    flow = simulate_pair([[[(4, 4, 4, 4)]]], constant(1.0, 2.0), lambda fresh: 0.5 * fresh)
    assert flow.tokens_per_s == pytest.approx(16 / (4 + 0.5 + 2))
    assert flow.context_busy == pytest.approx(2 / 6.5)
    assert flow.denoiser_busy == pytest.approx(4.5 / 6.5)
    assert flow.context_busy + flow.denoiser_busy == pytest.approx(1.0)
    assert in_step_pair(1, BLOCK, 4, 1, constant(1.0, 2.0), 0.5) == pytest.approx(16 / 6.5)


def test_two_denoisers_take_turns_at_the_context_tower() -> None:
    """One pass and one extension of a second each: by the hand-drawn chart the context tower never
    rests, each denoiser half of the time."""
    flow = simulate_pair([[[(16,)]], [[(16,)]]], constant(1.0, 1.0), lambda _: 0.0, rounds=40)
    assert flow.tokens_per_s == pytest.approx(16, rel=0.05)
    assert flow.context_busy == pytest.approx(1.0, abs=0.05)
    assert flow.denoiser_busy == pytest.approx(0.5, abs=0.05)


def test_denoisers_add_up_until_the_context_tower_is_full() -> None:
    schedules = [commits.rows_of_blocks(5.6, 8, 8, seed=own) for own in range(6)]
    free = [
        simulate_pair(schedules[:count], constant(1.0, 1e-6), lambda _: 0.0).tokens_per_s
        for count in (1, 2, 6)
    ]
    assert free[1] == pytest.approx(2 * free[0], rel=0.1)
    assert free[2] == pytest.approx(6 * free[0], rel=0.1)
    # An extension of one second whatever its rows: at most all rows in each.
    full = simulate_pair(schedules, constant(1e-6, 1.0), lambda _: 0.0)
    assert full.context_busy == pytest.approx(1.0, abs=0.01)
    assert full.tokens_per_s <= 6 * 8 * BLOCK


def test_measured_passes_stand_in_for_modelled_ones() -> None:
    model = Passes(LARGE, DEVICES["h200"].ceilings(), 4096, fp8=False)
    twice = [(rows, 2 * model.denoise(rows)) for rows in (16, 64)]
    rising = [(16, model.ar(16)), (64, 3 * model.ar(64))]
    measured = MeasuredPasses("a test", 4096, {"denoise": twice, "ar": rising})
    known = replace(model, measured=measured)
    for rows in (1, 16, 30, 64, 128):
        assert known.denoise(rows) == pytest.approx(2 * model.denoise(rows))
        assert known.extend(rows) == model.extend(rows)
    assert known.ar(32) == pytest.approx(2 * model.ar(32))


def report(tmp_path: Path, **changes: Any) -> Path:
    """A report as `twotower bench` writes it, of one measurement."""
    options = {**asdict(defaults_for("30b", "cuda")), **changes.get("options", {})}
    own = Report(options, {"device": changes.get("device", "NVIDIA H200")})
    own.ceilings = asdict(Ceilings(4.2e12, 700e12, 50e12))
    passes = [
        {"kind": "denoise", "rows_a_pass": 64.0, "ms": 40.0},
        {"kind": "extend", "rows_a_pass": 64.0, "ms": 30.0},
    ]
    ar = [{"kind": "ar", "rows_a_pass": 64.0, "ms": ms} for ms in (19.0, 21.0)]
    own.add("decode", {"rows": 64, "passes": passes}, *({"rows": 64, "passes": [at]} for at in ar))
    path = tmp_path / "bench.json"
    own.write(path)
    return path


def test_a_report_of_the_benchmark_is_read(tmp_path: Path) -> None:
    question = Question("h200", tokens_per_nfe=HEADLINE, most_denoisers=1)
    known = read_measured(report(tmp_path), LARGE, question)
    assert known.seconds["ar"] == [(64.0, pytest.approx(0.020))]
    plan = make_plan(question, LARGE, [known])
    assert {own.experts for own in plan.estimates} == {"full"}
    assert plan.passes[0].expected_ms["denoise"] == pytest.approx(40.0)
    assert found(plan, "AR").tokens_per_s == pytest.approx(64 / 0.020)
    in_step = 64 * BLOCK / (5.6 * 0.040 + 0.030)
    assert found(plan, "colocated").in_step == pytest.approx(in_step)
    by_name = {own.name: own for own in plan.inputs}
    assert by_name["passes"].basis == "measured"
    assert by_name["passes"].value == "ar, denoise, extend"
    assert by_name["ceilings"].value == "4.2 TB/s, 700 TFLOP/s"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"options": {"preset": "tiny"}}, "the shape 'tiny'"),
        ({"options": {"dtype": "float32"}}, "got 'float32', expected 'bfloat16'"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "expected a H200"),
    ],
)
def test_a_report_of_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        read_measured(report(tmp_path, **changes), LARGE, Question("h200"))


def stats(tmp_path: Path, prefill_tokens: int) -> Path:
    context = {"passes": 10, "pass_tokens": 10 * 32 * 16, "prefill_tokens": prefill_tokens}
    denoiser = {"passes": 50, "pass_rows": 50 * 60, "pass_seconds": 2.0}
    path = tmp_path / "stats.json"
    body = {"context": {**context, "pass_seconds": 0.3}, "denoiser": denoiser}
    path.write_text(json.dumps(body))
    return path


def test_stats_of_a_running_pair_are_read(tmp_path: Path) -> None:
    known = read_measured(stats(tmp_path, 0), LARGE, Question("h200", context=1024))
    assert known.context == 1024
    assert known.seconds["denoise"] == [(60.0, pytest.approx(0.04))]
    assert known.seconds["extend"] == [(32.0, pytest.approx(0.03))]
    with pytest.raises(ConfigError, match="50% of prompt tokens"):
        read_measured(stats(tmp_path, 5 * 32 * 16), LARGE, Question("h200"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"context": {}, "denoiser": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"measured: other\.json"):
        read_measured(path, LARGE, Question("h200"))


def test_devices_promise_no_more_than_their_datasheets() -> None:
    for device in DEVICES.values():
        ceilings = device.ceilings()
        assert 0.5 < ceilings.bytes_per_s / device.bandwidth < 1
        assert 0.5 < ceilings.matmul_flops / device.bf16_flops < 1
        assert "datasheet" in device.source
    assert "measured" not in device_named("h100").ceilings_source()
    with pytest.raises(ConfigError, match="gpu: got 'tpu'"):
        device_named("tpu")


def test_a_checkpoint_of_another_shape() -> None:
    config = model_config(str(GOLDEN / "tiny_a"))
    plan = make_plan(Question("h100", batch=4), config)
    assert all(own.fits for own in plan.estimates)
    assert make_plan(Question("h100", batch=4), TINY).best.tokens_per_s > 0


def test_the_command(tmp_path: Path) -> None:
    arguments = ["plan", "--gpu", "h100", "--context", "4096", "--batch", "64", "--gamma", "0.8"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    plan = make_plan(Question("h100"))
    assert shown.stdout.strip() == to_text(plan)
    for word in ("1:3", "colocated", "does not fit", "measured", "assumed", "datasheet"):
        assert word in shown.stdout
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(to_dict(plan)))
    known = ["--gpu", "h200", "--measured", str(report(tmp_path)), "--experts", "full"]
    assert "bench.json: NVIDIA H200" in CliRunner().invoke(app, ["plan", *known]).stdout
    refused = CliRunner().invoke(app, ["plan", "--gpu", "l40s", "--experts", "full"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: nothing fits: AR GPU: needs ")

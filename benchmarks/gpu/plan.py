"""The stages of each plan, in their order, with limits of time.

Stages that say most and those most likely to fail come first. Times are limits, not estimates; each
stage writes its figures as it goes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

_KERNELS = "tests/kernels"
# The longest first, so that none of them is the last to begin.
TEST_FILES = (
    "tests/towers/engine/test_on_gpu.py",
    f"{_KERNELS}/test_mamba_scan_triton.py",
    f"{_KERNELS}/test_experts_triton.py",
    f"{_KERNELS}/test_attention_triton.py",
    f"{_KERNELS}/test_replay_triton.py",
    f"{_KERNELS}/test_unmask_triton.py",
    f"{_KERNELS}/test_norm_triton.py",
    f"{_KERNELS}/test_mamba_triton.py",
    f"{_KERNELS}/test_router_triton.py",
    f"{_KERNELS}/test_linear_triton.py",
    f"{_KERNELS}/test_determinism.py",
    f"{_KERNELS}/test_expert_tiles_triton.py",
    f"{_KERNELS}/test_commit.py",
    f"{_KERNELS}/test_chunk_scan_triton.py",
    f"{_KERNELS}/test_linear_triton.py",
    f"{_KERNELS}/test_overlap.py",
    f"{_KERNELS}/test_pass_buffers.py",
    f"{_KERNELS}/test_draft_lines.py",
    "tests/towers/engine/test_deterministic.py",
    "tests/towers/verify/test_on_device.py",
    "tests/towers/engine/test_device_steps.py",
    "tests/towers/engine/test_context_drafts.py",
    "tests/towers/engine/test_deterministic.py",
)
DRY_TEST_FILES = (f"{_KERNELS}/test_rows.py", f"{_KERNELS}/test_philox.py")
_GOLDEN = ("tiny_a", "tiny_b")


@dataclass(frozen=True)
class Stage:
    """Processes that run side by side, `workers` at a time, each for at most `seconds`.

    `{out}` in an argument is the file for a process's figures (JSON).
    """

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    workers: int = 1


def stages(plan: str, *, dry: bool = False) -> list[Stage]:
    """The stages of a plan; `dry` runs the same programs at tiny shapes on a CPU.

    Raises ValueError for an unknown plan.
    """
    if plan not in PLANS:
        raise ValueError(f"plan: got {plan!r}, expected one of {', '.join(PLANS)}")
    return PLANS[plan](_Shape.tiny() if dry else _Shape())


@dataclass(frozen=True)
class _Shape:
    """Shapes, device and tests of a run; those of a dry run differ."""

    preset: str = "30b"
    device: str = "cuda"
    rows: tuple[int, ...] = (1, 16, 64)
    many: int = 128
    tests: tuple[str, ...] = TEST_FILES
    prompt: int = 3000
    verified: tuple[str, ...] = ()

    @classmethod
    def tiny(cls) -> _Shape:
        few = ("--kinds", "extend", "score")
        return cls("tiny", "cpu", (1, 2), 3, DRY_TEST_FILES, 70, few)

    def program(self, name: str, *arguments: object) -> tuple[str, ...]:
        """The command of a program of this folder."""
        words = ("--device", self.device, "--out", "{out}", *map(str, arguments))
        return (sys.executable, "-m", f"benchmarks.gpu.{name}", *words)

    def bench(self, sections: str, batches: Sequence[int], *more: object) -> tuple[str, ...]:
        """`twotower bench` over some sections and numbers of rows."""
        words = ["--preset", self.preset, "--device", self.device, "--sections", sections]
        words += ["--batches", ",".join(map(str, batches)), "--out", "{out}", "--no-compiled"]
        return (sys.executable, "-m", "twotower.bench", *words, *map(str, more))


def _ceilings(shape: _Shape) -> Stage:
    return Stage("ceilings", 60, (shape.program("ceilings"),))


def _checks(shape: _Shape) -> Stage:
    """Kernels at real shapes, the recorded cases and the engines' steps, on the device."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".")
    options = ("-p", "no:cacheprovider", "-m", "not slow", "-rf", "--tb=short", "--maxfail=8")
    tests = [(*pytest, *options, name) for name in shape.tests]
    replay = (sys.executable, "-m", "benchmarks.gpu.verify", "--device", shape.device, "--folder")
    verify = [(*replay, name, *shape.verified) for name in _GOLDEN]
    return Stage("checks", 200, (*tests, *verify), workers=8)


def _products(shape: _Shape) -> Stage:
    tokens = ("1", "16", "64", "256", "1024", "2048") if shape.device == "cuda" else ("1", "8")
    program = shape.program("products", "--preset", shape.preset, "--tokens", *tokens)
    return Stage("products", 120, (program,))


def _speed(shape: _Shape, rows: int, *more: object) -> Stage:
    """Passes and decoding of so many rows, and where a pass's time goes."""
    name = f"speed-{rows}" + ("-fp8" if "fp8" in more else "")
    name += "-products" if "--expert-products" in more else ""
    return Stage(name, 120, (shape.bench("speed,operators", (rows,), *more),))


def _fp8_products(shape: _Shape) -> list[Stage]:
    """The same with experts in 8 bits whose products are in 8 bits too."""
    fp8 = ("--experts", "fp8", "--expert-products", "fp8")
    return [_speed(shape, rows, *fp8) for rows in (*shape.rows, shape.many)]


def _deterministic(shape: _Shape, *more: object) -> Stage:
    """What it costs that a row has the same bits in any batch, and how often it has others
    without."""
    plain = shape.bench("invariance,speed", shape.rows, "--repeats", 1, *more)
    return Stage("deterministic", 120, ((*plain, "--deterministic"), plain))


def _profile(shape: _Shape, *more: object) -> Stage:
    rows = shape.rows[:2]
    program = shape.program("profile_passes", "--preset", shape.preset, "--rows", *rows, *more)
    return Stage("profile", 120, (program,))


def _draft_passes(shape: _Shape, *more: object) -> Stage:
    """Passes over drafts of all lengths, as `verified` with lookups runs them."""
    rows = (*shape.rows, shape.many)
    program = shape.program("draft_passes", "--preset", shape.preset, "--rows", *rows, *more)
    return Stage("draft-passes", 120, (program,))


def _default_service(shape: _Shape, *more: object) -> Stage:
    few = shape.rows[-1] if shape.device == "cuda" else 5
    arguments = ("--preset", shape.preset, "--rows", few, "--prompt", shape.prompt, *more)
    return Stage("default-service", 120, (shape.program("default_service", *arguments),))


def _tune(shape: _Shape, *more: object) -> Stage:
    """The card's launch table; it compiles in processes side by side before it measures."""
    rows = shape.rows if shape.device == "cuda" else shape.rows[:1]
    words = ("--preset", shape.preset, "--device", shape.device, "--tune", "{out}")
    batches = ("--batches", ",".join(map(str, rows)))
    name = "tune" + ("-fp8" if "fp8" in more else "")
    command = (sys.executable, "-m", "twotower.bench", *words, *batches, *map(str, more))
    return Stage(name, 200, (command,))


def _continuous(shape: _Shape) -> list[Stage]:
    """Decoding of rows that do not end their blocks together."""
    return [
        Stage(f"continuous-{rows}", 120, (shape.bench("continuous", (rows,)),))
        for rows in (*shape.rows[1:], shape.many)
    ]


def _rest(shape: _Shape) -> list[Stage]:
    """Stages that run last."""
    long = ("--long-context", "1024") if shape.device == "cpu" else ()
    scans = ("--scans", "256") if shape.device == "cpu" else ()
    return [
        *_continuous(shape),
        Stage("baseline", 150, (shape.bench("speed,baseline", shape.rows[:2]),)),
        Stage("attention", 120, (shape.bench("attention", shape.rows[1:2], *long),)),
        Stage("scans", 90, (shape.bench("scans", shape.rows[:1], *scans),)),
        _speed(shape, shape.many),
        Stage("verified", 150, (shape.bench("verified", (*shape.rows, shape.many)),)),
        _tune(shape),
        _tune(shape, "--experts", "fp8"),
    ]


def _h200(shape: _Shape) -> list[Stage]:
    speeds = [_speed(shape, rows) for rows in shape.rows]
    return [
        _ceilings(shape),
        _checks(shape),
        speeds[0],
        _profile(shape),
        _products(shape),
        *speeds[1:],
        _deterministic(shape),
        _draft_passes(shape),
        _default_service(shape),
        *_fp8_products(shape),
        *_rest(shape),
    ]


def _h100(shape: _Shape) -> list[Stage]:
    """Both towers fit with experts in 8 bits only."""
    fp8 = ("--experts", "fp8")
    return [
        _ceilings(shape),
        _checks(shape),
        *(_speed(shape, rows, *fp8) for rows in shape.rows[:2]),
        *_fp8_products(shape),
        _profile(shape, *fp8),
        _deterministic(shape, *fp8),
        _draft_passes(shape, *fp8),
        _products(shape),
        _default_service(shape, *fp8),
        _tune(shape, *fp8),
    ]


def _two(shape: _Shape) -> list[Stage]:
    """Tests and speed of the state channel between two cards."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", "-rf")
    channel_tests = "tests/cluster/channel"
    on_cards = (f"{channel_tests}/test_nccl.py", f"{channel_tests}/test_self_test.py")
    names = on_cards if shape.device == "cuda" else shape.tests[:1]
    channel = (sys.executable, "-m", "benchmarks.channel", "--transport")
    transport = "nccl" if shape.device == "cuda" else "gloo"
    return [
        _ceilings(shape),
        Stage("nccl-tests", 120, ((*pytest, "-p", "no:cacheprovider", *names),)),
        Stage("nccl-channel", 120, ((*channel, transport),)),
    ]


PLANS = {"h200": _h200, "h100": _h100, "two": _two}

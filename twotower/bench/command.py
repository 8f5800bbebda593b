"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch

from twotower.bench.markdown import markdown
from twotower.bench.options import SECTIONS, BenchOptions, defaults_for
from twotower.bench.plot import NO_MATPLOTLIB, can_plot, plot
from twotower.bench.random_towers import EXPERT_FORMATS
from twotower.bench.suite import run_suite
from twotower.bench.tune import tune
from twotower.kernels.launch_table import LaunchTable, using
from twotower.kernels.quantized import EXPERT_PRODUCTS
from twotower.planner.schedules import PROFILES
from twotower.planner.shapes import PRESETS
from twotower.towers.checkpoint.weights import DTYPES, parse_device
from twotower.towers.errors import ConfigError, cut_off, shorten
from twotower.towers.limits import limit_threads

# Around the measurements; its value gets the number of those done, of all, and the next name.
Watch = Callable[[], AbstractContextManager[Callable[[int, int, str], None] | None]]


def main(
    arguments: Sequence[str],
    program: str = "python -m twotower.bench",
    watch: Watch = nullcontext,
) -> int:
    """Measures, writes the report and prints its tables; returns the exit code: 1 if a measurement
    failed, 2 for wrong arguments."""
    parser = _parser(program)
    args = parser.parse_args(arguments)
    try:
        options = _options(args)
        for path in (args.out, args.table, args.plot, args.tune):
            _check_writable(path)
        launches = LaunchTable.read(args.launch_table) if args.launch_table else None
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    limit_threads()
    if args.tune is not None:
        place = options.preset, torch.device(options.device), options.batches
        tune(*place, args.tune, _say, options.experts)
        return 0
    wants_plot = args.plot is not None
    if wants_plot and not can_plot():
        # Said before the measurements, which take long.
        print(f"{NO_MATPLOTLIB}; going on without a picture", file=sys.stderr)
        wants_plot = False
    with watch() as progress, using(launches) if launches is not None else nullcontext():
        report = run_suite(options, args.out, _say, progress)
    report.write(args.out)
    tables = markdown(report.to_dict())
    if args.table is not None:
        args.table.write_text(tables, encoding="utf-8")
    if wants_plot:
        plot(report.to_dict(), args.plot)
    print(tables)
    return 1 if report.any_failed() else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {cut_off(message, 300)}. See `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


def _check_writable(path: Path | None) -> None:
    """Raises ValueError if no file can be written to `path`."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{shorten(str(path))}: {error.strerror}") from None
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file's name")


def _options(args: argparse.Namespace) -> BenchOptions:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parse_device(device)
    given: dict[str, Any] = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name in BenchOptions.__dataclass_fields__
    }
    return replace(defaults_for(args.preset, device), **(given | {"device": device}))


def _parser(program: str) -> _Parser:
    parser = _Parser(
        prog=program,
        description="Speed of both towers in one process at any shape: random weights on the "
        "device, recorded commit schedules, floors from the ceilings of the run, plain PyTorch "
        "beside it. Without a GPU the preset tiny shows that everything runs.",
        epilog="On a GPU that holds both towers: --preset 30b --plot bench.png --table bench.md. "
        "Where a command may run for a few minutes only, measure section by section: --minutes 9 "
        "--sections speed,baseline, and so on; each run makes its towers anew within seconds.",
    )
    add = parser.add_argument
    add("--preset", default="tiny", choices=list(PRESETS), help="shape of the model")
    add("--device", help="cpu or cuda; cuda where there is one")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, otherwise float32")
    add(
        "--experts", choices=EXPERT_FORMATS, help="format of routed experts; full: that of the rest"
    )
    add("--expert-products", choices=EXPERT_PRODUCTS, help="how experts in fp8 are multiplied")
    add("--unique", type=float, help="experts a layer that one row's block reads; 0: as it comes")
    add("--batches", type=_numbers, help="rows decoded together, the most important first")
    add("--context", type=int, help="tokens that each row has read")
    add("--long-context", type=int, help="longest context of the attention's measurement")
    add("--long-rows", type=int, help="its rows")
    add("--profiles", type=_names, help=f"commit schedules, of {', '.join(PROFILES)}")
    add("--sections", type=_names, help=f"what to measure, in this order, of {', '.join(SECTIONS)}")
    add("--rounds", type=int, help="times that a run goes through its profile")
    add("--repeats", type=int, help="runs of everything; medians count")
    add("--scans", type=int, help="seeded block scans, at least")
    add("--scan-rows", type=int, help="rows of one pass of them")
    add("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile beside eager")
    add(
        "--deterministic",
        action="store_true",
        default=None,
        help="towers that give a row the same bits in any batch; what that costs is the difference",
    )
    add("--minutes", type=float, help="no step begins after so many")
    add("--seed", type=int, help="of weights, tokens and orders of blocks")
    add("--out", type=Path, default=Path("bench.json"), help="the report, written step by step")
    add("--plot", type=Path, help="a picture (PNG); needs the extra `bench`")
    add("--tune", type=Path, help="measure nothing but how kernels are launched, into this table")
    add("--launch-table", type=Path, help="launch kernels as this table says, not the card's own")
    add("--table", type=Path, help="the tables as markdown")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))

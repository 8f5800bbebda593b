"""Kernels that are launched before the last has ended: every one waits first, before all else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from tests.support.comparing import assert_same_bits, normal
from tests.support.hopper import compile_all
from twotower.kernels import norm_triton
from twotower.kernels.launch_table import EMPTY, LaunchTable, using
from twotower.kernels.overlap_triton import overlap

KERNELS = Path(norm_triton.__file__).parent
ON = LaunchTable("", {"overlap": [{"programmatic": True}]})
CPU = torch.device("cpu")
# Helpers that other kernels call, and the sum of experts that no pass launches any more.
ALONE = {"_combine_kernel"}


def kernels() -> list[tuple[str, ast.FunctionDef]]:
    """Functions of all kernel files that are launched: those whose name ends so."""
    return [
        (f"{path.stem}.{node.name}", node)
        for path in sorted(KERNELS.glob("*_triton.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and node.name not in ALONE
    ]


@pytest.mark.parametrize(("name", "kernel"), kernels(), ids=[name for name, _ in kernels()])
def test_a_kernel_waits_before_it_does_anything(name: str, kernel: ast.FunctionDef) -> None:
    """What is launched after it relies on that: a program that returns early would otherwise let
    the next kernel read what the one before has not written."""
    body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
    assert ast.unparse(body[0]) == "wait(waits)", name
    assert kernel.args.args[-1].arg == "waits", name


def test_a_table_turns_it_on() -> None:
    assert overlap(CPU) == {"waits": False}
    with using(ON):
        assert overlap(CPU) == {"waits": True, "launch_pdl": True}
    with using(EMPTY):
        assert overlap(CPU) == {"waits": False}


def test_the_machine_code_waits_only_where_it_is_on() -> None:
    from dataclasses import replace

    from tests.kernels.test_norm_triton import LAUNCHES

    plain = LAUNCHES[0]
    waiting = replace(plain, constants={**plain.constants, "waits": True})
    off, on = compile_all([plain, waiting])
    assert not {"ACQBULK", "PREEXIT"} & {*off.instructions}
    assert on.instructions["ACQBULK"] == on.instructions["PREEXIT"] == 1
    assert on.spills == 0


@pytest.mark.gpu
def test_a_chain_of_launches_gives_the_bits_that_it_gives_without() -> None:
    device = torch.device("cuda")
    hidden = normal(64, 2688).bfloat16().to(device)
    weight = normal(2688, seed=1).bfloat16().to(device)

    def chain() -> torch.Tensor:
        x = hidden
        for _ in range(50):
            _, x = norm_triton.add_norm(hidden, x, None, weight, 1e-5, None, False)
        return x

    want = chain()
    with using(ON):
        for _ in range(20):
            assert_same_bits(chain(), want)

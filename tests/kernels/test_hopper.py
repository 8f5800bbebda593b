"""The compile harness sees what is in the machine code."""

from __future__ import annotations

import pytest

from tests.support.hopper import Compiled, CompileError, Launch, compile_all, compile_for_hopper

SAMPLES = "tests.support.hopper_samples"
PRODUCT = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
COPY = {"source": "*fp32", "target": "*fp32", "count": "i32"}
SQUARE = {"rows": 64, "inner": 64, "columns": 64}
LAUNCHES = {
    "copy": Launch(f"{SAMPLES}:copy", COPY, {"block": 512}),
    "unaligned": Launch(
        f"{SAMPLES}:copy",
        {"source": "*fp32:1", "target": "*fp32", "count": "i32:16"},
        {"block": 512},
    ),
    "aligned": Launch(f"{SAMPLES}:copy", {**COPY, "count": "i32:16"}, {"block": 512}),
    "wide": Launch(f"{SAMPLES}:product", PRODUCT, SQUARE),
    "narrow": Launch(f"{SAMPLES}:product", PRODUCT, {**SQUARE, "rows": 16}),
    "eight warps": Launch(f"{SAMPLES}:product", PRODUCT, SQUARE, 8, 2),
    "hoarder": Launch(
        f"{SAMPLES}:hoarder",
        {"source": "*fp32", "target": "*fp32", "rounds": "i32"},
        {"block": 4096},
        num_warps=1,
    ),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(LAUNCHES, compile_all(list(LAUNCHES.values())), strict=True))


def test_a_spill_is_seen(compiled: dict[str, Compiled]) -> None:
    hoarder = compiled["hoarder"]
    assert hoarder.spill_stores > 100
    assert hoarder.spill_loads > 100
    assert hoarder.spills == hoarder.spill_stores + hoarder.spill_loads


@pytest.mark.parametrize("name", ["copy", "wide", "narrow"])
def test_a_kernel_that_fits_has_no_spills(compiled: dict[str, Compiled], name: str) -> None:
    assert compiled[name].spills == 0
    assert 8 < compiled[name].registers < 128


def test_tensor_core_instructions_are_told_apart(compiled: dict[str, Compiled]) -> None:
    """wgmma wants 64 rows; 16 rows give mma.sync."""
    assert compiled["wide"].instructions["HGMMA"] > 0
    assert compiled["wide"].instructions["HMMA"] == 0
    assert compiled["narrow"].instructions["HMMA"] > 0
    assert compiled["narrow"].instructions["HGMMA"] == 0
    assert compiled["copy"].instructions["HMMA"] == 0


def test_shared_memory_holds_both_operands(compiled: dict[str, Compiled]) -> None:
    assert compiled["wide"].shared_bytes == 2 * 64 * 64 * 2
    assert compiled["copy"].shared_bytes == 0


def test_options_reach_the_compiler(compiled: dict[str, Compiled]) -> None:
    """Twice the warps hold half of the sums each."""
    assert compiled["eight warps"].registers < compiled["wide"].registers


def test_alignment_makes_loads_wide(compiled: dict[str, Compiled]) -> None:
    loads = {name: compiled[name].instructions["LDG"] for name in ("aligned", "unaligned")}
    assert loads["unaligned"] == 4 * loads["aligned"]


def test_what_does_not_compile_is_named() -> None:
    with pytest.raises(CompileError, match=r"(?s)impossible.*power of 2"):
        compile_for_hopper(f"{SAMPLES}:impossible", {"out": "*i32"}, {"size": 48})


def test_arguments_must_be_complete() -> None:
    with pytest.raises(CompileError, match=r"\['block', 'size'\] are on one side only"):
        compile_for_hopper(f"{SAMPLES}:copy", {**COPY, "size": "i32"}, {})


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(CompileError, match=r"tests\.kernels\.nowhere"):
        compile_for_hopper("tests.kernels.nowhere:kernel", {}, {})

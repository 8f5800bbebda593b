"""The faults of `make mutants` stay applicable while the source moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools import mutants
from tools.faults import FAULTS, Fault
from tools.mutants import FaultError, source_of, verdict_of

SOURCE = "def double(x):\n    return 2 * x\n"
TEST = "from kernels.double import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
FAULT = Fault("double: triples", "kernels", "2 * x", "3 * x", "test_double")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in (("kernels/double.py", SOURCE), ("tests/test_double.py", TEST)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return tmp_path


def test_each_fault_has_its_place_and_its_tests() -> None:
    wrong = []
    for fault in FAULTS:
        try:
            source_of(mutants.ROOT, fault)
            mutants.tests_of(mutants.ROOT, fault)
        except FaultError as error:
            wrong.append(str(error))
    assert wrong == [], "\n".join(wrong)
    assert len(FAULTS) >= 30


def test_a_fault_is_caught_or_missed_and_taken_back(tree: Path) -> None:
    assert verdict_of(tree, FAULT) == "caught"
    assert verdict_of(tree, replace(FAULT, new="x * 2")) == "missed"
    assert (tree / "kernels/double.py").read_text() == SOURCE


def test_a_fault_that_does_not_apply_is_an_error(tree: Path) -> None:
    with pytest.raises(FaultError, match=r"'4 \* x' must stand once in kernels: nowhere"):
        source_of(tree, replace(FAULT, old="4 * x"))
    with pytest.raises(FaultError, match=r"must stand once in kernels: kernels/double.py \(2\)"):
        source_of(tree, replace(FAULT, old="x"))
    with pytest.raises(FaultError, match=r"0 files are called test_triple.py"):
        mutants.tests_of(tree, replace(FAULT, tests="test_triple"))
    with pytest.raises(FaultError, match=r"pytest ended with 2"):
        verdict_of(tree, replace(FAULT, old="return", new="retrun"))


def test_all_faults_are_run_and_those_missed_counted(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = replace(FAULT, name="double: turned", new="x * 2")
    assert mutants.run(tree, [FAULT, missed]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| double: triples | kernels/double.py | ")
    assert lines[2].endswith(" | caught |")
    assert lines[3].endswith(" | missed |")
    assert lines[-1] == "1 of 2 faults are caught"

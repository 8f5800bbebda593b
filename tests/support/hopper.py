"""Triton kernels compiled for an H100 or H200 (sm_90) where no GPU is: what the machine code holds.

    compile_for_hopper(path, signature, constants, num_warps=4, num_stages=3) -> Compiled
    compile_all([Launch(path, signature, constants, num_warps, num_stages), ...]) -> [Compiled, ...]

    Compiled(registers, spill_stores, spill_loads, shared_bytes, instructions)

`path` is "package.module:kernel", a name and not the function: under the interpreter the function
in the test's process cannot be compiled, so a process of its own imports it without the
interpreter; it stays for the next launches.

`signature` gives the type of every argument that is not in `constants`: "*bf16", "*fp32", "i32",
"i64", "fp32". Pointers count as multiples of 16 bytes, as tensors from torch are; ":16" after an
integer's type ("i32:16") says that it is a multiple of 16, as Triton finds at a launch, and most
strides are. "*bf16:1" is a pointer of any alignment, "i32:1" is "i32". A value that is 1 (say a
stride) goes to `constants`: Triton makes it a constant too.

    LAUNCHES = [Launch("twotower.kernels.norm_triton:_norm_kernel",
                       {"x": "*bf16", "out": "*bf16", "stride": "i32:16", "eps": "fp32"},
                       {"width": 2688, "block": 4096}, num_warps=8)]

    def test_norm_compiles() -> None:
        for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
            assert compiled.spills == 0, launch

`instructions` counts opcodes without their modifiers, as `instructions["HGMMA"]`, "HMMA", "UTMALDG"
or "LDGSTS"; what does not occur counts 0. CompileError names the launch and the compiler's words.
The Triton is that of the Python that runs the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import re
import select
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600.0
_REGISTERS = re.compile(r"\bREG:(\d+)")
# "        /*00a0*/              @!P0 LDG.E.128 R4, ..."
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


class CompileError(Exception):
    """A kernel does not compile for sm_90."""


@dataclass(frozen=True)
class Launch:
    """A kernel, the types of its arguments, its constants and options."""

    path: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """Figures of a compiled launch: registers per thread, bytes of shared memory per program."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """STL and LDL: registers that were put into memory."""
        return self.spill_stores + self.spill_loads


def compile_for_hopper(
    path: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compiles a single launch. Raises CompileError."""
    return compile_all([Launch(path, signature, constants, num_warps, num_stages)])[0]


def compile_all(launches: Sequence[Launch]) -> list[Compiled]:
    """All launches in the compiling process, results in their order. Raises CompileError at the
    first."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "launches"), Path(folder, "compiled")
        asked.write_bytes(pickle.dumps([vars(launch) for launch in launches]))
        _Compiler.running().run(asked, answered)
        results: list[dict[str, Any] | str] = pickle.loads(answered.read_bytes())
    return [_checked(launch, result) for launch, result in zip(launches, results, strict=True)]


class _Compiler:
    """The process that compiles, one for all tests of this process: importing torch and Triton
    takes longer than most kernels. It ends when its input does."""

    _only: ClassVar[_Compiler | None] = None

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hopper"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        atexit.register(self.end)

    @classmethod
    def running(cls) -> _Compiler:
        """The one that runs, or a new one."""
        if cls._only is None or cls._only._process.poll() is not None:
            cls._only = cls()
        return cls._only

    def run(self, asked: Path, answered: Path) -> None:
        """Has the launches in one file compiled into another. Raises CompileError if the process
        ends or takes too long over it."""
        questions, answers = self._process.stdin, self._process.stdout
        assert questions
        assert answers
        with contextlib.suppress(BrokenPipeError):
            print(asked, answered, sep="\t", file=questions, flush=True)
        ready, _, _ = select.select([answers], [], [], TIMEOUT_S)
        if not (ready and answers.readline()):
            self.end()
            self._said.seek(0)
            ended = self._process.returncode
            raise CompileError(f"the compiling process ended with {ended}: {self._said.read()}")

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def _checked(launch: Launch, result: dict[str, Any] | str) -> Compiled:
    if isinstance(result, str):
        raise CompileError(f"{launch}: {result}")
    return Compiled(**result)


def _compile(launch: Launch) -> dict[str, Any]:
    """In the process of its own: the fields of a Compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = launch.path.partition(":")
    function = getattr(importlib.import_module(module), name)
    constants = dict(launch.constants)
    if "waits" in function.arg_names:
        # Launches wait for one another only where a card's table says so.
        constants.setdefault("waits", False)
    missing = set(function.arg_names) ^ ({*launch.signature} | {*constants})
    if missing:
        raise ValueError(f"arguments: {sorted(missing)} are on one side only")
    types, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        kind, _, multiple = launch.signature.get(argument, "constexpr").partition(":")
        types[argument] = "constexpr" if argument in constants else kind
        if multiple == "16" or (kind.startswith("*") and not multiple):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, types, constants, attributes)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        # As a launch has it by default; not said, Triton 3.9 warns.
        "enable_fp_fusion": True,
    }
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {**_read(made.asm["cubin"]), "shared_bytes": made.metadata.shared}


def _read(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers = _REGISTERS.search(usage)
    assert registers, f"no registers in {usage!r}"
    instructions = Counter(_OPCODE.findall(code))
    assert instructions["EXIT"], "no machine code was read"
    return {
        "registers": int(registers[1]),
        "spill_stores": instructions["STL"],
        "spill_loads": instructions["LDL"],
        "instructions": instructions,
    }


def _cuobjdump(flag: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout


def _results(launches: Sequence[Launch]) -> Iterator[dict[str, Any] | str]:
    for launch in launches:
        result: dict[str, Any] | str = ""
        try:
            # ptxas's complaints are part of the error; its chatter is not.
            with contextlib.redirect_stdout(sys.stderr):
                result = _compile(launch)
        except Exception:
            result = traceback.format_exc()
        yield result


def main() -> None:
    """Reads a line with two paths, compiles the launches in one file, writes what came of them into
    the other, says so with a line; until the input ends."""
    # Whatever else writes to stdout does so to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked, answered = map(Path, line.rstrip("\n").split("\t"))
        launches = [Launch(**fields) for fields in pickle.loads(asked.read_bytes())]
        answered.write_bytes(pickle.dumps(list(_results(launches))))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Regenerates the protobuf modules beside the .proto files, or checks that they are up to date.

`python -m twotower.protos.generate` writes, `... --check` compares and exits with 1 on a
difference. Needs grpcio-tools (the `dev` extra) at the version that wrote the committed files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Paths through the import package, so that generated imports read `from twotower.protos.v1`.
SOURCES = (
    "twotower/protos/v1/generation.proto",
    "twotower/protos/v1/state.proto",
    "twotower/protos/kserve/inference.proto",
)
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def compile_into(folder: Path) -> None:
    """Runs protoc on every source; writes modules below `folder`. Raises RuntimeError."""
    from grpc_tools import _protoc_compiler

    flags = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    for source in SOURCES:
        arguments = ["protoc", f"-I{ROOT}", *flags, source]
        if _protoc_compiler.run_main([part.encode() for part in arguments]):
            raise RuntimeError(f"protoc failed on {source}")


def generated_files() -> list[str]:
    """Paths of all generated modules, relative to the repository's root."""
    return [source.replace(".proto", suffix) for source in SOURCES for suffix in SUFFIXES]


def stale_files() -> list[str]:
    """Generated modules that differ from what their sources give now."""
    with tempfile.TemporaryDirectory() as folder:
        compile_into(Path(folder))
        return [
            name
            for name in generated_files()
            if not (ROOT / name).exists()
            or (ROOT / name).read_bytes() != (Path(folder) / name).read_bytes()
        ]


def main(arguments: list[str]) -> int:
    """Writes or, with `--check`, compares; returns the exit code."""
    if arguments == ["--check"]:
        stale = stale_files()
        for name in stale:
            print(f"{name}: differs from its .proto; run python -m twotower.protos.generate")
        return 1 if stale else 0
    compile_into(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

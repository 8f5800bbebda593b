"""Who may import whom: kernels <- towers <- cluster <- deployments."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "towers", "cluster", "deployments")
# Beside the standard library and twotower itself.
ALLOWED = {
    "kernels": {"torch", "triton"},
    "towers": {
        "huggingface_hub",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    },
}
PURE = tuple(ALLOWED)
ENVIRONMENT = ("environ", "environb", "getenv")


def files_of(layer: str) -> list[Path]:
    return sorted(path for path in (ROOT / layer).rglob("*.py") if "__pycache__" not in path.parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def every_file() -> list[tuple[str, Path]]:
    return [(layer, path) for layer in LAYERS for path in files_of(layer)]


def test_there_is_something_to_check() -> None:
    for layer in LAYERS:
        assert len(files_of(layer)) > 3
        assert (ROOT / "twotower" / layer).resolve() == ROOT / layer


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_itself_and_those_below(layer: str) -> None:
    below = set(LAYERS[: LAYERS.index(layer) + 1])
    if layer not in PURE:
        below.add("protos")
    wrong = []
    for path in files_of(layer):
        for line, name in imports_of(path):
            parts = name.split(".")
            if parts[0] in LAYERS:
                wrong.append(f"{path.name}:{line}: {name}, not through twotower")
            for_its_version = name == "twotower" and layer not in PURE
            inside = len(parts) > 1 and parts[1] in below
            if parts[0] == "twotower" and not inside and not for_its_version:
                wrong.append(f"{path.name}:{line}: {name}")
    assert wrong == []


@pytest.mark.parametrize("layer", PURE)
def test_kernels_and_towers_need_few_packages(layer: str) -> None:
    wrong = []
    for path in files_of(layer):
        for line, name in imports_of(path):
            package = name.split(".")[0]
            known = {"twotower", *sys.stdlib_module_names, *ALLOWED[layer]}
            if package not in known:
                wrong.append(f"{path.name}:{line}: {name}")
    assert wrong == []


@pytest.mark.parametrize("layer", PURE)
def test_kernels_and_towers_read_no_environment(layer: str) -> None:
    wrong = []
    for path in files_of(layer):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
                wrong.append(f"{path.name}:{node.lineno}")
        for line, name in imports_of(path):
            if name in {f"os.{member}" for member in ENVIRONMENT}:
                wrong.append(f"{path.name}:{line}: {name}")
    assert wrong == []


SCRIPT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "grpc", "google", "pydantic", "typer"):
            raise ImportError(f"blocked: {name}")
        return None

sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"ray", "grpc"}, loaded
"""


def test_kernels_and_towers_import_without_ray_and_grpc() -> None:
    modules = []
    for layer in PURE:
        for path in files_of(layer):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules.append(".".join(("twotower", *parts)).removesuffix(".__init__"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_public_name_is_light() -> None:
    """`twotower --help` must not wait for torch."""
    code = "import sys, twotower; assert not {'torch', 'ray', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)

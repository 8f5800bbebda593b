"""Who may import whom: kernels <- towers <- protos <- cluster <- deployments <- the face."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "towers", "protos", "cluster", "deployments")
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

# What anybody may import: they import each other and nothing else.
WORDS = "kernels towers/errors towers/limits towers/request towers/config"
# Each wing, and what it may import beside WORDS. A wing is a folder; a file that stands at the top
# of its folder is a wing of its own. The order is that of the arrows: each line uses lines above.
WINGS = {
    "kernels": "",
    "towers/errors": "",
    "towers/limits": "",
    "towers/request": "",
    "towers/config": "",
    "towers/state": "",
    "towers/text": "",
    "towers/model": "towers/state",
    "towers/decoding": "towers/text",
    "towers/checkpoint": "towers/state towers/model",
    "towers/engine": "towers/state towers/model towers/decoding towers/checkpoint",
    "towers/training": "towers/state",
    "towers/verify": "towers/state towers/model towers/decoding towers/checkpoint towers/engine",
    "protos": "",
    "cluster/topology": "towers/engine",
    "cluster/channel": "towers/state protos cluster/topology",
    "cluster/calls": "cluster/channel",
    "cluster/services": "towers/model towers/decoding towers/checkpoint towers/engine "
    "towers/verify cluster/topology cluster/channel cluster/calls",
    "cluster/placement": "cluster/topology cluster/channel cluster/services",
    "deployments/settings_file": "",
    "deployments/access": "deployments/settings_file",
    "deployments/telemetry": "towers/decoding",
    "deployments/pair": "towers/decoding towers/engine cluster/services deployments/telemetry",
    "deployments/config": "towers/text towers/checkpoint towers/engine protos cluster/topology "
    "deployments/settings_file deployments/access deployments/telemetry deployments/pair",
    "deployments/routing": "towers/decoding protos cluster/services deployments/pair",
    "deployments/completions": "towers/text towers/decoding towers/checkpoint protos "
    "cluster/services deployments/access deployments/telemetry deployments/config "
    "deployments/pair deployments/routing",
    "deployments/http": "towers/text towers/decoding protos cluster/services deployments/access "
    "deployments/telemetry deployments/config deployments/completions",
    "deployments/router": "towers/decoding protos cluster/placement deployments/access "
    "deployments/config deployments/completions deployments/http",
    "deployments/app": "cluster/topology cluster/services cluster/placement deployments/telemetry "
    "deployments/config deployments/pair deployments/router",
    "deployments/server": "protos cluster/placement deployments/telemetry deployments/config "
    "deployments/http "
    "deployments/router deployments/app",
    "client": "protos",
    "data": "protos client",
    "batch": "towers/checkpoint client data deployments/settings_file deployments/config "
    "deployments/server",
    "planner": "towers/state towers/checkpoint towers/engine towers/decoding",
    "bench": "towers/state towers/model towers/decoding towers/checkpoint towers/engine planner",
    "call_loop": "",
    "streams": "towers/decoding call_loop",
    "results": "towers/decoding",
    "api": "towers/text towers/decoding towers/checkpoint towers/engine towers/verify call_loop "
    "streams results",
    "transformers": "towers/checkpoint streams api",
    "agreement": "api results",
    "sweep": "towers/text towers/model towers/checkpoint towers/engine bench api results",
    "evaluation": "towers/text towers/model towers/state towers/checkpoint towers/engine protos "
    "client call_loop results api",
    "cli": "towers/text towers/checkpoint towers/training towers/verify cluster/placement "
    "deployments/access deployments/config deployments/router deployments/server client planner "
    "bench api streams agreement batch sweep evaluation",
}
# A door: its names lead to the public ones.
PUBLIC = "__init__"


def files_of(layer: str) -> list[Path]:
    return sorted(path for path in (ROOT / layer).rglob("*.py") if "__pycache__" not in path.parts)


def face_files() -> list[Path]:
    """The files of `twotower/` itself, without what its links lead to."""
    own = {path.name for path in (ROOT / "twotower").iterdir() if not path.is_symlink()}
    return [path for path in files_of("twotower") if path.relative_to(ROOT).parts[1] in own | {""}]


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


def wing_of(parts: tuple[str, ...]) -> str:
    """The wing of a module, named by its parts after `twotower`."""
    inside = parts[0] in ("towers", "cluster", "deployments") and len(parts) > 1
    return "/".join(parts[:2]) if inside else parts[0]


def modules() -> Iterator[tuple[str, Path]]:
    """Every source file with its wing."""
    for layer in LAYERS:
        for path in files_of(layer):
            yield wing_of(path.relative_to(ROOT).with_suffix("").parts), path
    for path in face_files():
        yield wing_of(path.relative_to(ROOT / "twotower").with_suffix("").parts), path


def test_there_is_something_to_check() -> None:
    for layer in LAYERS:
        assert len(files_of(layer)) > 3
        assert (ROOT / "twotower" / layer).resolve() == ROOT / layer
    assert {wing for wing, _ in modules()} >= set(WINGS)


def test_wings_use_what_they_may() -> None:
    wrong = []
    for wing, path in modules():
        if (path.name == "__init__.py" and path.stat().st_size == 0) or wing == PUBLIC:
            continue
        where = path.relative_to(ROOT)
        if wing not in WINGS:
            wrong.append(f"{where}: no wing {wing!r} in WINGS: put the file into one, or add it")
            continue
        may = {wing, *WORDS.split(), *WINGS[wing].split()}
        for line, name in imports_of(path):
            parts = name.split(".")
            if parts[0] in LAYERS:
                wrong.append(f"{where}:{line}: {name} has to be imported as twotower.{name}")
            if parts[0] != "twotower" or len(parts) == 1:
                continue
            used = wing_of(tuple(parts[1:]))
            if used not in may:
                wrong.append(f"{where}:{line}: {wing} may not use {used} ({name})")
    assert wrong == [], "\n" + "\n".join(wrong)


def test_wings_are_drawn_without_a_circle() -> None:
    words = {word: set[str]() for word in WORDS.split()}
    graph = {wing: set(uses.split()) | set(words) for wing, uses in WINGS.items()} | words
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"wings use each other: {' -> '.join(error.args[1])}")


def test_no_arrow_of_the_drawing_is_unused() -> None:
    """WINGS says what is so, not what might be."""
    used: dict[str, set[str]] = {}
    for wing, path in modules():
        for _, name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "twotower" and len(parts) > 1:
                used.setdefault(wing, set()).add(wing_of(tuple(parts[1:])))
    unused = [
        f"{wing} does not use {other}"
        for wing, others in WINGS.items()
        for other in others.split()
        if other not in used.get(wing, set())
    ]
    assert unused == []


@pytest.mark.parametrize("layer", ["kernels", "towers", "cluster", "deployments"])
def test_no_two_files_import_each_other(layer: str) -> None:
    names = {
        ".".join(("twotower", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in files_of(layer)
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {used for _, used in imports_of(path)}
        graph[name] = {known for used in found for known in (used, used.rpartition(".")[0])}
        graph[name] &= set(names)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other: {' -> '.join(error.args[1])}")


def test_towers_has_a_dozen_doors() -> None:
    entries = [path for path in (ROOT / "towers").iterdir() if not path.name.startswith("__")]
    assert len(entries) <= 12, sorted(path.name for path in entries)


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

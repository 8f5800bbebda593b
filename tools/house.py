"""Figures of the source, counted from its syntax trees, as the table of docs/architecture.md.

    python -m tools.house            # prints the table
    python -m tools.house --write    # puts it between the markers of the page
    python -m tools.house --check    # exit code 1 unless the page has the figures of the whole
    python -m tools.house --way      # the hops of a request, and the file that names each

Generated code (`*_pb2*`) does not count. A function's lines are those from its `def` to its end. It
is typed if all of its parameters (but self and cls) and its result are annotated. The share of
docstrings is that of all functions, private ones and those inside of functions included. A class is
public if its name has no underscore in front.
"""

from __future__ import annotations

import argparse
import ast
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, BEGIN, END = "docs/architecture.md", "<!-- house -->", "<!-- /house -->"
LAYERING = "tests/test_layering.py"
WHOLE = "| the whole | |"
# Each is a row of the table; a folder's row leaves out folders below it that have a row.
FOLDERS = (
    "kernels",
    "towers",
    "protos",
    "cluster",
    "deployments",
    "twotower",
    "twotower/planner",
    "twotower/bench",
    "benchmarks",
    "tools",
)
# Classes of these count towards the one figure for the whole house.
COUNTED = ("kernels", "towers", "cluster", "deployments", "twotower", "benchmarks")

# The way of a request for one block from the wire to a kernel, in the order of the calls, one hop a
# file. Its figures are the number of these files and of all public classes that they define. Every
# hop has to exist, and a hop before it has to name it: to import from its module, to use the last
# part of its symbol as an attribute, or to have its dotted path in a string. What Serve or Ray
# connects may instead be named by a file of WIRING, which does not count.
WAY = (
    ("deployments/router/ingress.py", "add_generation"),
    ("deployments/router/router.py", "Router.Generate"),
    ("deployments/routing/attempts.py", "Attempts.blocks"),
    ("deployments/pair/tower_pair.py", "TowerPair.generate"),
    ("towers/decoding/generation.py", "generate_blocks"),
    ("cluster/services/pair_towers.py", "PairTowers.on_denoiser"),
    ("cluster/services/tower_services.py", "DenoiserTowerService.denoise_block"),
    ("towers/engine/denoiser_engine.py", "DenoiserEngine.denoise_block"),
    ("towers/engine/engine.py", "Engine"),
    ("towers/engine/scheduler.py", "BatchLoop"),
    ("towers/model/denoiser_tower.py", "DenoiserTower.forward"),
    ("towers/model/backbone.py", "Tower"),
    ("kernels/dispatch.py", "mamba_scan"),
    ("kernels/mamba_scan.py", "mamba_scan"),
)
WIRING = ("deployments/app.py", "cluster/placement/start.py")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class HouseError(Exception):
    """The source or the page is not as this file says; the message names the place."""


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Prints, writes or checks the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    doing.add_argument("--check", action="store_true", help=f"compare with the table of {PAGE}")
    doing.add_argument("--way", action="store_true", help="show who names each hop of a request")
    args = parser.parse_args(arguments)
    try:
        if args.way:
            print("\n".join(f"{hop}: named by {namer}" for hop, namer in way(root)))
        elif args.check:
            check(root)
        elif args.write:
            before, _, after = parts_of_page(root)
            text = f"{before}{BEGIN}\n{table(root)}\n{END}{after}"
            (root / PAGE).write_text(text, encoding="utf-8")
        else:
            print(table(root))
    except HouseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check(root: Path) -> None:
    """Raises HouseError if the page has no table between its markers, or other figures of the
    whole: those of folders change with every commit and are as of the last `--write`."""
    _, inside, _ = parts_of_page(root)
    texts = table(root), inside.rstrip()
    counted, written = (text.partition(WHOLE)[2].split("\n") for text in texts)
    wrong = [f"  counted: {line}" for line in counted if line not in written]
    wrong += [f"  {PAGE}: {line}" for line in written if line not in counted]
    if wrong:
        head = f"{PAGE}: other figures than counted; python -m tools.house --write"
        raise HouseError("\n".join([head, *wrong]))


def parts_of_page(root: Path) -> tuple[str, str, str]:
    """The page before, between and after its markers. Raises HouseError if one is missing."""
    page = root / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise HouseError(
            f"{PAGE}: no {BEGIN} or no {END} behind it; add both, on lines of their own"
        )
    return before, inside, after


def table(root: Path) -> str:
    """All figures as Markdown: a line per folder, then the whole house."""
    head = (
        "| folder | files | lines | lines of a file: median (p90, max) "
        "| of a function | typed | docstrings | public classes | Protocols |"
    )
    lines = [head, "|" + "---|" * 9]
    lines += [_folder_line(root, folder) for folder in FOLDERS]
    hops = [hop for hop, _ in way(root)]
    classes = [name for path, _ in WAY for name in public_classes(parsed(root / path))]
    wings, arrows = wings_of(root)
    whole = [
        (f"public classes in {', '.join(COUNTED)}", sum(_classes_below(root, COUNTED))),
        (
            "wings, and arrows between them (those to WORDS left out), without a circle",
            f"{wings}, {arrows}",
        ),
        (
            "files from a gRPC request to a kernel, and public classes in them",
            f"{len(hops)}, {len(classes)}",
        ),
    ]
    return "\n".join([*lines, "", WHOLE, "|---|---|", *(f"| {a} | {b} |" for a, b in whole)])


def _folder_line(root: Path, folder: str) -> str:
    paths = [path for path in sources(root, folder) if _row_of(root, path) == folder]
    trees = [parsed(path) for path in paths]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, Function)]
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    cells = [
        f"`{folder}`",
        f"{len(paths)}",
        f"{sum(sizes):,}",
        _spread(sizes),
        _spread(lengths),
        _share([is_typed(node) for node in functions]),
        _share([ast.get_docstring(node) is not None for node in functions]),
        f"{sum(len(public_classes(tree)) for tree in trees)}",
        f"{sum(map(_protocols, trees))}",
    ]
    return f"| {' | '.join(cells)} |"


def sources(root: Path, folder: str) -> list[Path]:
    """The hand-written Python files below a folder; links are other folders' files."""
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        parents = path.relative_to(root).parents
        if "_pb2" not in path.name and not any((root / parent).is_symlink() for parent in parents):
            found.append(path)
    return found


def _row_of(root: Path, path: Path) -> str:
    parents = [parent.as_posix() for parent in path.relative_to(root).parents]
    return next(parent for parent in parents if parent in FOLDERS)


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file. Raises HouseError if there is none."""
    if not path.exists():
        raise HouseError(f"{path}: no such file")
    return ast.parse(path.read_text(encoding="utf-8"))


def public_classes(tree: ast.Module) -> list[str]:
    """Names of a file's public classes, wherever in it."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return [node.name for node in nodes if not node.name.startswith("_")]


def _classes_below(root: Path, folders: Sequence[str]) -> Iterator[int]:
    for folder in folders:
        for path in sources(root, folder):
            yield len(public_classes(parsed(path)))


def _protocols(tree: ast.Module) -> int:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sum(any("Protocol" in ast.unparse(base) for base in node.bases) for node in nodes)


def is_typed(node: Function) -> bool:
    """True if every parameter but self and cls, and the result, have annotations."""
    own = node.args
    given = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
    wanted = [arg for arg in given if arg is not None and arg.arg not in ("self", "cls")]
    return node.returns is not None and all(arg.annotation is not None for arg in wanted)


def wings_of(root: Path) -> tuple[int, int]:
    """Wings and arrows of the layering test. Raises HouseError if there are none, or a circle."""
    for node in parsed(root / LAYERING).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WINGS":
            uses = {wing: set(text.split()) for wing, text in ast.literal_eval(node.value).items()}
            try:
                TopologicalSorter(uses).prepare()
            except ValueError as error:
                raise HouseError(f"{LAYERING}: {error}") from None
            return len(uses), sum(map(len, uses.values()))
    raise HouseError(f"{LAYERING}: no WINGS")


def way(root: Path) -> list[tuple[str, str]]:
    """Every hop of WAY, and the file that names it. Raises HouseError for a hop that does not
    exist or that no file names."""
    found: list[tuple[str, str]] = []
    for index, (path, symbol) in enumerate(WAY):
        if not _defines(parsed(root / path).body, symbol.split(".")):
            raise HouseError(f"{path}: no {symbol}, a hop of WAY in tools/house.py")
        before = [own for own, _ in reversed(WAY[:index])]
        namers = (own for own in (*before, *WIRING) if _names(root / own, path, symbol))
        namer = next(namers, None) if index else "Serve's proxy"
        if namer is None:
            raise HouseError(f"{path}: no hop of WAY in tools/house.py before {symbol} names it")
        found.append((f"{path} {symbol}", namer))
    return found


def _defines(body: Sequence[ast.stmt], parts: Sequence[str]) -> bool:
    for node in body:
        named = isinstance(node, Function | ast.ClassDef) and node.name == parts[0]
        if named and len(parts) > 1:
            return isinstance(node, ast.ClassDef) and _defines(node.body, parts[1:])
        if named or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == parts[0]):
            return True
    return False


def _names(namer: Path, path: str, symbol: str) -> bool:
    """True if a file imports from the module of `path`, has its dotted name in a string, or uses
    the last part of `symbol` as an attribute."""
    module = ".".join(("twotower", *Path(path).with_suffix("").parts))
    for node in ast.walk(parsed(namer)):
        if isinstance(node, ast.ImportFrom):
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            if module in {node.module, *imported}:
                return True
        elif isinstance(node, ast.Attribute):
            if "." in symbol and node.attr == symbol.rpartition(".")[2]:
                return True
        elif isinstance(node, ast.Constant) and f"{module}." in str(node.value):
            return True
    return False


def _spread(values: Sequence[int]) -> str:
    """Median, and in brackets the value that nine tenths do not exceed and the largest."""
    if not values:
        return "-"
    ninth = sorted(values)[math.ceil(0.9 * len(values)) - 1]
    return f"{statistics.median(values):g} ({ninth}, {max(values)})"


def _share(values: Sequence[bool]) -> str:
    return f"{sum(values) / len(values):.0%}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())

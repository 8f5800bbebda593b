"""Writes docs/configuration.md from the pydantic models of the service's settings.

`python -m tools.configuration` writes, `... --check` compares and exits with 1 on a difference.
Names, types, defaults, limits and descriptions are read from the models, and the least values of
what an engine checks from its options.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twotower.deployments.config import ServiceConfig
from twotower.towers.engine.options import LEAST

Schema = dict[str, Any]
TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """<!-- Written by `make configuration` from deployments/config.py; do not edit. -->

# Configuration

The settings of a service. They stand in a YAML file (`twotower serve --config FILE`), under `args`
of a Serve config (`cluster/manifests/serve.yaml`), or are options of `twotower serve`, which win
over the file. A name that is not here and a value outside its limits are refused, with the name.
A *row* is one sequence in the towers, a *pair* one context tower with its denoisers. Requests have
parameters of their own: see [protos/v1/generation.proto](../protos/v1/generation.proto).

```yaml
model: /models/nemotron-twotower
device: cuda
dtype: bfloat16
max_num_seqs: 64
autoscaling: {min_pairs: 1, max_pairs: 4}
```
"""
HEADER = "| setting | type | default | limits | meaning |\n|---|---|---|---|---|"
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
# Counts are 32 bits wide everywhere: not a limit that anybody meets.
LARGEST_COUNT = 2**31 - 1
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}


def page(model: type[BaseModel]) -> str:
    """The whole page: a section for `model` and one for each model that a setting of it holds."""
    schema = model.model_json_schema()
    parts = [INTRODUCTION, *_section("Service", "", schema, schema.get("$defs", {}))]
    return "\n".join(parts) + "\n"


def _section(title: str, above: str, schema: Schema, models: Schema) -> Iterator[str]:
    """A model's heading, docstring and table; then the sections of the models in its settings.
    `above` is the prefix of its settings' names, such as `autoscaling.`."""
    yield f"## {title}\n\n{inspect.cleandoc(schema.get('description', ''))}\n\n{HEADER}"
    required = schema.get("required", [])
    nested: list[tuple[str, str]] = []
    for name, field in schema["properties"].items():
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        default = _default(field, name in required)
        limits = _limits([*_engine_limit(name, kinds), *kinds])
        cells = [_kinds(kinds), default, limits, field.get("description", "")]
        yield f"| `{above}{name}` | " + " | ".join(_escaped(cell) for cell in cells) + " |"
        # A list holds its models as items.
        nested += [(name, kind["$ref"].rpartition("/")[2]) for kind in kinds if "$ref" in kind]
        items = [kind["items"] for kind in kinds if kind.get("type") == "array"]
        nested += [
            (f"{name}[]", item["$ref"].rpartition("/")[2]) for item in items if "$ref" in item
        ]
    for name, model in nested:
        yield ""
        yield from _section(f"`{above}{name}`", f"{above}{name}.", models[model], models)


def _engine_limit(name: str, kinds: list[Schema]) -> list[Schema]:
    """The least value of a setting that the model leaves to the engine to check."""
    known = name in LEAST and not any("minimum" in kind for kind in kinds)
    return [{"minimum": LEAST[name]}] if known else []


def _kinds(kinds: list[Schema]) -> str:
    return " or ".join(_kind(kind) for kind in kinds)


def _kind(kind: Schema) -> str:
    if "$ref" in kind:
        return "settings below"
    if "enum" in kind:
        return _choices(kind["enum"])
    if kind["type"] == "object":
        return f"names with a {TYPES[kind['additionalProperties']['type']]} each"
    if kind["type"] == "array":
        return f"list of {_kind(kind['items'])}"
    return TYPES[kind["type"]]


def _default(field: Schema, required: bool) -> str:
    if required:
        return "required"
    value = field.get("default")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value in (None, {}) else f"`{value}`"


def _limits(kinds: list[Schema]) -> str:
    found = [
        f"{words} {kind[bound]:,}"
        for kind in kinds
        for bound, words in BOUNDS.items()
        if kind.get(bound, LARGEST_COUNT) != LARGEST_COUNT
    ]
    return ", ".join([*found, *(_pattern(kind["pattern"]) for kind in kinds if "pattern" in kind)])


def _pattern(pattern: str) -> str:
    """A pattern of alternatives, `^(a|b)$`, as these; any other as it is."""
    words = re.fullmatch(r"\^\(([\w|]+)\)\$", pattern)
    return f"`{pattern}`" if words is None else _choices(words[1].split("|"))


def _choices(choices: list[str]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", " ")


def main(arguments: list[str]) -> int:
    """Writes or, with `--check`, compares; returns the exit code."""
    text = page(ServiceConfig)
    if arguments == ["--check"]:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == text
        if not same:
            print(f"docs/{TARGET.name}: differs from the settings; run make configuration")
        return 0 if same else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

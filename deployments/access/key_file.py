"""The file of API keys: a YAML list of ApiKey's fields, which holds hashes and no keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from twotower.deployments.access.keys import ApiKey, check_distinct
from twotower.deployments.settings_file import read_yaml
from twotower.towers.errors import ConfigError

_KEYS = TypeAdapter(list[ApiKey])


def read_keys(path: Path) -> list[ApiKey]:
    """The keys in a file, at least one. Raises ConfigError that names file and field.

    It repeats no value: somebody may have put a key where its hash belongs.
    """
    raw = read_yaml(path)
    if not raw or not isinstance(raw, list):
        raise ConfigError(f"{path.name}: expected a list of at least one key")
    try:
        keys = _KEYS.validate_python(raw)
        check_distinct(keys)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{path.name}: {located(first['loc'])}: {first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    return keys


def make_entry(
    name: str, sha256: str, max_concurrent: int | None, tokens_per_minute: int | None, admin: bool
) -> ApiKey:
    """A key of these fields. Raises ConfigError."""
    try:
        return ApiKey(
            name=name,
            sha256=sha256,
            max_concurrent=max_concurrent,
            tokens_per_minute=tokens_per_minute,
            admin=admin,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{located(first['loc'])}: {first['msg']}") from None


def entry_text(key: ApiKey) -> str:
    """A key's entry of the file, without the fields that have their defaults."""
    return yaml.safe_dump([key.model_dump(exclude_defaults=True)], sort_keys=False)


def located(place: Sequence[int | str]) -> str:
    """Where in a list of keys an error is: `keys[2].sha256`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    text = "".join(parts).removeprefix(".")
    text = f"keys{text}" if text.startswith("[") else text
    # An unknown field's name is the file's text.
    return text if text.isprintable() and len(text) <= 80 else "a field"

"""Names and values of a YAML file of settings, before they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from twotower.towers.errors import ConfigError


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError, with the line if it is known."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: bytes that are no text, and dates that are none.
        raise ConfigError(f"{path.name}: unreadable ({_reason(error)})") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a settings file. Raises ConfigError, with the line if it is known."""
    raw = read_yaml(path)
    if not isinstance(raw or {}, dict):
        raise ConfigError(f"{path.name}: expected a mapping, got {type(raw).__name__}")
    return dict(raw or {})


def check_names(settings: Mapping[Any, Any], above: str = "") -> None:
    """Raises ConfigError for a key that is no text: YAML reads 1, on or 2026-01-01 as others."""
    for key, value in settings.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"{above}{key}: got a key of type {type(key).__name__}, expected a name "
                "(in quotes if it is one)"
            )
        if isinstance(value, dict):
            check_names(value, f"{above}{key}.")


def _reason(error: Exception) -> str:
    """The reason why a file cannot be read and the line, as far as known, in one line."""
    reason = type(error).__name__
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        reason += f" in line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(reason.split())

"""The file of keys, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.deployments.access.key_file import entry_text, make_entry, read_keys
from twotower.deployments.access.keys import ApiKey
from twotower.towers.errors import ConfigError

ENTRY = f"- name: a\n  sha256: {'0' * 63}a\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "keys.yaml: expected a list of at least one key"),
        ("[]", "keys.yaml: expected a list of at least one key"),
        ("name: a", "keys.yaml: expected a list of at least one key"),
        ("- [", "keys.yaml: unreadable"),
        ("- tt-secret", r"keys.yaml: keys\[0\]: "),
        ("- name: a", r"keys.yaml: keys\[0\].sha256: Field required"),
        (ENTRY + "- name: b\n  sha256: tt-secret", r"keys.yaml: keys\[1\].sha256: "),
        (ENTRY + "  key: tt-secret", r"keys.yaml: keys\[0\].key: Extra"),
        (ENTRY + "  max_concurrent: 0", r"keys\[0\].max_concurrent: .*greater than or equal to 1"),
        (ENTRY + "  admin: maybe", r"keys\[0\].admin: "),
        (ENTRY + ENTRY, "keys.yaml: name: got 'a' 2 times"),
        (ENTRY + ENTRY.replace("name: a", "name: b"), "sha256: got one for 'a' and 'b'"),
    ],
)
def test_wrong_files_are_named_without_their_values(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)
    assert "0000" not in str(caught.value)


def test_entries_make_a_file(tmp_path: Path) -> None:
    entries = [
        make_entry("a", "0" * 64, None, None, False),
        make_entry("b", "1e" * 32, 3, 1000, True),
    ]
    path = tmp_path / "keys.yaml"
    path.write_text("".join(entry_text(entry) for entry in entries))
    assert read_keys(path) == entries
    assert entries[1] == ApiKey(
        name="b", sha256="1e" * 32, max_concurrent=3, tokens_per_minute=1000, admin=True
    )


def test_wrong_fields_of_a_new_entry() -> None:
    with pytest.raises(ConfigError, match="name: "):
        make_entry("a b", "0" * 64, None, None, False)
    with pytest.raises(ConfigError, match="max_concurrent: "):
        make_entry("a", "0" * 64, 0, None, False)

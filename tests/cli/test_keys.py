"""`twotower key`, and the options of other commands that concern keys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from twotower.cli.main import app
from twotower.deployments.access.key_file import read_keys


def test_a_new_key_is_on_stderr_and_its_entry_on_stdout(tmp_path: Path) -> None:
    options = ["--max-concurrent", "3", "--tokens-per-minute", "500", "--admin"]
    made = CliRunner().invoke(app, ["key", "new", "ann", *options])
    assert made.exit_code == 0
    plain = made.stderr.strip()
    assert plain.startswith("tt-")
    assert plain not in made.stdout
    (entry,) = yaml.safe_load(made.stdout)
    assert entry == {
        "name": "ann",
        "sha256": hashlib.sha256(plain.encode()).hexdigest(),
        "max_concurrent": 3,
        "tokens_per_minute": 500,
        "admin": True,
    }
    second = CliRunner().invoke(app, ["key", "new", "bob"])
    path = tmp_path / "keys.yaml"
    path.write_text(made.stdout + second.stdout)
    assert [key.name for key in read_keys(path)] == ["ann", "bob"]
    assert second.stderr != made.stderr


def test_a_wrong_name_makes_no_key() -> None:
    made = CliRunner().invoke(app, ["key", "new", "two words"])
    assert made.exit_code == 2
    assert made.stdout == ""
    assert "error: name: " in made.stderr
    assert "tt-" not in made.stderr


def test_help_says_which_stream_has_what() -> None:
    text = CliRunner().invoke(app, ["key", "new", "--help"]).output
    assert "stderr gets the key itself" in " ".join(text.split())
    assert CliRunner().invoke(app, ["key", "--help"]).exit_code == 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `twotower serve` would run with, in place of running it."""
    taken: list[Any] = []

    def supervise(work: Any, *_: Any) -> int:
        taken.append(work.args[0])
        return 0

    monkeypatch.setattr("twotower.deployments.server.supervisor.supervise", supervise)
    return taken


def test_serve_takes_keys_and_addresses(served: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(CliRunner().invoke(app, ["key", "new", "ann"]).stdout)
    options = ["--api-keys", str(path), "--http-host", "0.0.0.0"]
    done = CliRunner().invoke(app, ["serve", *options])
    assert done.exit_code == 0, done.output
    assert [key.name for key in served[0].api_keys] == ["ann"]
    assert (served[0].http_host, served[0].allow_anonymous) == ("0.0.0.0", False)
    CliRunner().invoke(app, ["serve", "--allow-anonymous"])
    assert served[1].allow_anonymous
    assert served[1].api_keys == []


def test_a_wrong_file_of_keys_is_named(served: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("- name: ann\n  sha256: tt-secret\n")
    done = CliRunner().invoke(app, ["serve", "--api-keys", str(path)])
    assert done.exit_code == 2
    assert "keys.yaml: keys[0].sha256: " in done.stderr
    assert "secret" not in done.output
    assert served == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_generate_hands_its_key_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(
        "twotower.cli.generate.generate_remotely", lambda *args: taken.append(args[:2])
    )
    option = ["--api-key", "tt-secret"] if how == "option" else []
    env = {"TWOTOWER_API_KEY": "tt-secret"} if how == "variable" else {}
    arguments = ["generate", "x", "--target", "host:1", *option]
    assert CliRunner().invoke(app, arguments, env=env).exit_code == 0
    assert taken == [("host:1", "tt-secret")]


@pytest.mark.parametrize("key", ["tt-secret\n", "tt-secret\udcff", "sécret"])
def test_a_key_that_no_header_holds_is_not_repeated(key: str) -> None:
    arguments = ["generate", "x", "--target", "127.0.0.1:1", "--api-key", key]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "api" in done.stderr
    assert "cret" not in done.output


def test_help_does_not_show_the_variable_of_the_environment() -> None:
    env = {"TWOTOWER_API_KEY": "tt-secret"}
    text = CliRunner().invoke(app, ["generate", "--help"], env=env).output
    assert "TWOTOWER_API_KEY" in text
    assert "secret" not in text

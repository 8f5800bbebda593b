"""Folders, homes and variables that a cluster of one's own may find around it."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from twotower.cluster.placement import surroundings
from twotower.cluster.placement.surroundings import (
    SOCKET_PATH_BYTES,
    make_folder,
    most_bytes,
    prepare,
    read_by_ray,
    runtime_folder,
    shared_memory,
)
from twotower.towers.errors import ConfigError


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for TMPDIR with a path of few bytes; pytest's own are long."""
    short = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setattr(surroundings, "_OTHER_PLACES", (str(other_place(short)),))
    other_place(short).mkdir()
    yield short
    shutil.rmtree(short)


def other_place(temporary: Path) -> Path:
    """What stands for /tmp where TMPDIR does not do."""
    return temporary / "o"


def point(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """TMPDIR, as Python has read it."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def fits(folder: Path) -> bool:
    """Whether Linux takes the path of a socket as deep as Ray's are."""
    sockets = folder / "session_2026-11-26_20-15-30_123456_4194304" / "sockets"
    sockets.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(str(sockets / "plasma_store"))
        except OSError:
            return False
    return True


def test_a_folder_is_made_below_tmpdir(temporary: Path) -> None:
    folder = make_folder()
    assert folder.parent == temporary
    assert fits(folder)


@pytest.mark.parametrize("letter", ["x", "ü", " "])
def test_the_longest_tmpdir_that_can_be_used_is_used(
    temporary: Path, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = most_bytes() - len(os.fsencode(temporary)) - 1
    inside = temporary / (letter * (room // len(letter.encode()))).ljust(room // 2, "x")
    inside.mkdir()
    point(monkeypatch, inside)
    folder = make_folder()
    assert folder.parent == inside
    assert fits(folder)


def test_a_longer_tmpdir_is_left_for_another_place(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = temporary / ("x" * (most_bytes() - len(os.fsencode(temporary))))
    inside.mkdir()
    point(monkeypatch, inside)
    folder = make_folder()
    assert folder.parent == other_place(temporary)
    assert fits(folder)
    # One byte more than the limit, and no more: the limit is not too careful.
    assert len(os.fsencode(inside)) == most_bytes() + 1
    assert not fits(Path(tempfile.mkdtemp(prefix="tt-", dir=inside)))


def test_a_folder_that_is_gone_is_left_for_another_place(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point(monkeypatch, temporary / "gone")
    assert make_folder().parent == other_place(temporary)


def test_no_place_at_all_is_one_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("x" * SOCKET_PATH_BYTES)
    point(monkeypatch, long)
    monkeypatch.setattr(surroundings, "_OTHER_PLACES", ("/dev/null/tmp",))
    wanted = f"^TMPDIR: got no folder .*x is longer than {most_bytes()} bytes; /dev/null/tmp: "
    with pytest.raises(ConfigError, match=wanted) as caught:
        make_folder()
    assert "\n" not in str(caught.value)


def home_of(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Where libraries find their home after `prepare`."""
    for name in ("HOME", "LOGNAME", "USER"):
        if name in environ:
            monkeypatch.setenv(name, environ[name])
        else:
            monkeypatch.delenv(name, raising=False)
    prepare(environ, folder)
    return Path(environ.get("HOME") or os.path.expanduser("~"))


def test_a_home_that_works_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ein Häuschen"
    home.mkdir()
    environ = {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    assert home_of(environ, monkeypatch, tmp_path) == home
    assert environ.keys() == {"HOME", "XDG_CACHE_HOME", "RAY_grpc_enable_http_proxy"}


@pytest.mark.parametrize("home", ["/dev/null/home", "relative/home"])
def test_a_home_that_cannot_be_written_to_is_replaced(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"HOME": home, "XDG_CACHE_HOME": "/dev/null/cache"}
    assert home_of(environ, monkeypatch, tmp_path) == tmp_path / "home"
    assert (tmp_path / "home").is_dir()
    assert environ["XDG_CACHE_HOME"] == str(tmp_path / "cache")
    assert re.fullmatch("[0-9a-f]{64}", environ["RAY_AUTH_TOKEN"])
    token = environ["RAY_AUTH_TOKEN"]
    prepare(environ, tmp_path)
    assert environ["RAY_AUTH_TOKEN"] == token


def test_a_home_that_may_not_be_entered_is_replaced() -> None:
    """Somebody else's: not even what is in it can be asked about. As another user, since root may
    enter everything, and in a folder that pytest has not closed to others."""
    with tempfile.TemporaryDirectory() as place:
        folder, home = Path(place), Path(place) / "locked"
        (home / ".cache" / "huggingface").mkdir(parents=True)
        home.chmod(0)
        folder.chmod(0o777)
        program = f"""
import os
from pathlib import Path
from twotower.cluster.placement.surroundings import prepare

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.chdir("/")
prepare(os.environ, Path({place!r}))
print(os.environ["HOME"], "HF_HOME" in os.environ)
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        home.chmod(0o700)
        assert done.stdout.split() == [f"{place}/home", "False"], done.stderr


def test_a_token_that_was_given_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HOME": "/dev/null/home", "RAY_AUTH_TOKEN_PATH": "/etc/token"}
    home_of(environ, monkeypatch, tmp_path)
    assert environ["RAY_AUTH_TOKEN_PATH"] == "/etc/token"
    assert "RAY_AUTH_TOKEN" not in environ


def test_models_that_were_downloaded_before_are_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "old" / ".cache" / "huggingface"
    models.mkdir(parents=True)
    monkeypatch.setattr(surroundings, "_writable", lambda folder: folder != tmp_path / "old")
    environ = {"HOME": str(tmp_path / "old")}
    home_of(environ, monkeypatch, tmp_path)
    assert environ["HF_HOME"] == str(models)
    given = {"HOME": str(tmp_path / "old"), "HF_HOME": "/models"}
    home_of(given, monkeypatch, tmp_path)
    assert given["HF_HOME"] == "/models"


@pytest.mark.parametrize("error", [KeyError, OSError, ImportError])
def test_a_user_without_a_name_gets_one(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> str:
        raise error("uid not found")

    monkeypatch.setattr(getpass, "getuser", fails)
    environ: dict[str, str] = {"HOME": str(tmp_path)}
    prepare(environ, tmp_path)
    assert environ["LOGNAME"] == environ["USER"] == f"uid-{os.getuid()}"


def test_variables_of_another_cluster_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {
        "HOME": str(tmp_path),
        "RAY_ADDRESS": "ray://elsewhere:10001",
        "RAY_CLIENT_MODE": "1",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "{",
        "RAY_grpc_enable_http_proxy": "1",
        "RAY_memory_usage_threshold": "0.9",
        "PYTHONWARNINGS": "error",
        "PYTHONOPTIMIZE": "2",
    }
    prepare(environ, tmp_path)
    assert environ == {
        "HOME": str(tmp_path),
        "RAY_grpc_enable_http_proxy": "0",
        "RAY_memory_usage_threshold": "0.9",
        "PYTHONOPTIMIZE": "1",
    }


def test_deprecations_in_libraries_are_no_errors(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare({"HOME": str(tmp_path), "PYTHONWARNINGS": "error"}, tmp_path)
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    prepare({"HOME": str(tmp_path)}, tmp_path)
    assert Path.cwd() == Path("/")


def test_the_folder_goes_with_its_block(tmp_path: Path) -> None:
    with runtime_folder({"HOME": str(tmp_path)}) as folder:
        (folder / "session").mkdir()
    assert not folder.exists()


def test_the_object_store_goes_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "_SHARED_MEMORY", tmp_path)
    assert shared_memory(tmp_path / "other") is None
    monkeypatch.setattr(surroundings, "_SHARED_MEMORY", Path("/dev/null/shm"))
    assert shared_memory(tmp_path / "other") == str(tmp_path / "other")


def test_only_what_somebody_else_has_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"HOME": "/dev/null/home", "RAY_odd": "?", "GRPC_TRACE": "all", "RAYON": "1"}
    home_of(environ, monkeypatch, tmp_path)
    assert "RAY_AUTH_TOKEN" in environ
    assert read_by_ray(environ) == ["GRPC_TRACE", "RAY_odd"]

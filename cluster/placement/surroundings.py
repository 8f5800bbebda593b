"""Surroundings of Ray on one machine: a folder for its sockets, a home, a user name, and no
variables that lead to another cluster. Imports no Ray: some of it is read on import."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from twotower.towers.errors import ConfigError

# Linux takes no longer path of a unix socket.
SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_PREFIX = "tt-"
_RANDOM_BYTES = 8
_SHARED_MEMORY = Path("/dev/shm")
# Where a folder can be instead if TMPDIR is too long or not writable.
_OTHER_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
# They name a cluster, a job or a hook that has nothing to do with a cluster started here.
_OTHER_CLUSTER = (
    "RAY_ADDRESS",
    "RAY_CLIENT_MODE",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING",
    "RAY_REDIS_ADDRESS",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_gcs_server_port_wait_time_s",
)
_PROXY_SWITCH, _TOKEN = "RAY_grpc_enable_http_proxy", "RAY_AUTH_TOKEN"
_TOKEN_SOURCES = (_TOKEN, "RAY_AUTH_TOKEN_PATH")
_READ_BY_RAY = ("RAY_", "GRPC_")


@contextmanager
def runtime_folder(environ: MutableMapping[str, str]) -> Iterator[Path]:
    """A folder for a new cluster, with the environment prepared for it; removed again."""
    folder = make_folder()
    try:
        prepare(environ, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder() -> Path:
    """A new folder for Ray's files and sockets: below TMPDIR if the sockets' paths are short enough
    there, otherwise elsewhere. Raises ConfigError if there is no place."""
    tried = []
    for place in dict.fromkeys((_preferred_place(), *_OTHER_PLACES)):
        if len(os.fsencode(place)) > most_bytes():
            tried.append(f"{place} is longer than {most_bytes()} bytes")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError as error:
            tried.append(f"{place}: {error.strerror or error}")
    raise ConfigError(f"TMPDIR: got no folder for sockets and logs ({'; '.join(tried)})")


def shared_memory(folder: Path) -> str | None:
    """The folder of Ray's object store: None for Ray's default, `folder` where that cannot be."""
    return None if _writable(_SHARED_MEMORY) else str(folder)


def most_bytes() -> int:
    """Longest path below which Ray's sockets can be."""
    return SOCKET_PATH_BYTES - len("/" + _PREFIX) - _RANDOM_BYTES - len(_LONGEST_SOCKET)


def prepare(environ: MutableMapping[str, str], folder: Path) -> None:
    """Sets and removes variables so that a cluster of this process's own starts and works; `folder`
    stands in for a home that cannot be written to. Safe to call again."""
    for name in _OTHER_CLUSTER:
        environ.pop(name, None)
    # Ray's own channels stay on this machine: no proxy can lead there.
    environ[_PROXY_SWITCH] = "0"
    if "error" in environ.get("PYTHONWARNINGS", ""):
        del environ["PYTHONWARNINGS"]
        _show_no_deprecations()
    if environ.get("PYTHONOPTIMIZE", "") not in ("", "0", "1"):
        # Ray appends to docstrings, which 2 takes away.
        environ["PYTHONOPTIMIZE"] = "1"
    _name_user(environ)
    _give_home(environ, folder)
    _stand_somewhere()


def read_by_ray(environ: Mapping[str, str]) -> list[str]:
    """Names of variables that Ray reads, less those that may be from here: it ends without a word
    over a value that it cannot read."""
    own = (_PROXY_SWITCH, _TOKEN)
    return sorted(name for name in environ if name.startswith(_READ_BY_RAY) and name not in own)


def _show_no_deprecations() -> None:
    """Restores Python's default: a library's deprecation is no reason not to serve."""
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)


def _stand_somewhere() -> None:
    """Ray asks for the working folder, which may have been removed."""
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")


def _preferred_place() -> str:
    try:
        # Absolute, as the processes of Ray need not share this one's working folder.
        return os.path.abspath(tempfile.gettempdir())
    except OSError:
        return _OTHER_PLACES[0]


def _name_user(environ: MutableMapping[str, str]) -> None:
    """Libraries name their caches after the user, who may have a number only."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        environ["LOGNAME"] = environ["USER"] = f"uid-{os.getuid()}"


def _give_home(environ: MutableMapping[str, str], folder: Path) -> None:
    """Ray keeps a token, Triton its kernels and the hub its files below HOME."""
    home = Path(os.path.expanduser("~"))
    if not _writable(home):
        # What has been downloaded before stays where it is found.
        models = home / ".cache" / "huggingface"
        if home.is_absolute() and _readable(models):
            environ.setdefault("HF_HOME", str(models))
        home = folder / "home"
        home.mkdir(exist_ok=True)
        environ["HOME"] = str(home)
        if not any(environ.get(name) for name in _TOKEN_SOURCES):
            # Of the environment rather than a file: Ray has asked for a token by now.
            environ[_TOKEN] = secrets.token_hex(32)
    cache = environ.get("XDG_CACHE_HOME")
    if cache and not _writable(Path(cache)):
        environ["XDG_CACHE_HOME"] = str(folder / "cache")


def _writable(folder: Path) -> bool:
    return folder.is_absolute() and _there(folder) and os.access(folder, os.W_OK | os.X_OK)


def _readable(folder: Path) -> bool:
    return _there(folder) and os.access(folder, os.R_OK | os.X_OK)


def _there(folder: Path) -> bool:
    # Not Path.is_dir: it raises where a folder above may not be entered, such as another's HOME.
    return os.path.isdir(folder)

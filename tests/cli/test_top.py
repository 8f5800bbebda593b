"""`twotower top` against a small real HTTP server, with rates worked out by hand."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.support.terminal import run_in_terminal
from twotower.cli.main import app
from twotower.cli.readings import Rates, Reading, StatsClient

KEY = "operator-key"


def tower(clock: float, seconds: float, passes: int, **more: float) -> dict[str, float]:
    return {
        "rows": 3,
        "queued_rows": 1,
        "pending_work": 0,
        "passes": passes,
        "pass_rows": 2 * passes,
        "pass_tokens": 32 * passes,
        "prefill_tokens": 0,
        "pass_seconds": seconds,
        "clock_seconds": clock,
        "busy_share": 0.5,
        **more,
    }


def reading(clock: float, tokens: int, nfe: int, context: dict[str, float]) -> dict[str, Any]:
    """What the service says at `clock`, at which it has written `tokens` in `nfe` passes."""
    return {
        "model": "pystdlib",
        "version": "0.1.0",
        "uptime_s": 3600.0 + clock,
        "router": {
            "running": 3,
            "waiting": 2,
            "requests_total": 10 + int(clock),
            "generation_tokens_total": tokens,
            "prompt_tokens_total": 4 * tokens,
            "nfe_total": nfe,
            "context_passes_total": nfe // 4,
        },
        "pairs": [
            {
                "pair": "a1",
                "towers": {
                    "context": context,
                    "denoiser": tower(clock, 0.95 * clock, nfe, mirrors=3),
                },
                "eased": 0.25,
            }
        ],
        "clock_s": clock,
    }


# Four seconds in which 600 tokens were written in 200 passes and 2,400 read; the context tower was
# busy for one of them, the denoiser for 3.8.
POOL = {"slots": 16, "slots_used": 3, "pages": 4096, "pages_used": 120, "state_bytes": 12 << 20}
CACHE = {"cache_hits": 9, "cache_misses": 3}
FIRST = reading(100.0, 1000, 400, tower(100.0, 40.0, 200, **POOL, **CACHE))
SECOND = reading(104.0, 1600, 600, tower(104.0, 41.0, 220, **POOL, **CACHE))


class Service:
    """Answers GET /admin/stats with one reading after the other, the last again and again."""

    def __init__(self, *answers: dict[str, Any] | bytes | int, key: str | None = None) -> None:
        self.answers = list(answers)
        self.asked = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.asked += 1
                answer = service.answers[min(service.asked, len(service.answers)) - 1]
                if self.path != "/admin/stats":
                    self.send_error(404)
                elif key is not None and self.headers["Authorization"] != f"Bearer {key}":
                    self.send_error(401)
                elif isinstance(answer, int):
                    self.send_error(answer)
                else:
                    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing of it on stderr."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.target = f"127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self) -> Service:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


def top(target: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["top", "--target", target, "--interval", "0.1", *options])


def cells(line: str) -> list[str]:
    return line.split()


def test_one_table_has_the_rates_between_two_readings() -> None:
    with Service(FIRST, SECOND) as service:
        result = top(service.target, "--once")
        assert service.asked == 2
        target = service.target
    assert (result.exit_code, result.stderr) == (0, "")
    head, rows, tokens, blank, names, context, denoiser = result.stdout.splitlines()
    assert head == f"pystdlib 0.1.0 on {target}, up 1:01:44"
    assert rows == "rows: 3 running, 2 waiting; requests: 114, 1.0/s"
    assert tokens == (
        "tokens/s: 150.0 written, 600.0 read; tokens/NFE: 3.00; "
        "passes/s: 50.0 denoiser, 12.5 context"
    )
    assert blank == ""
    assert cells(names)[:3] == ["pair", "tower", "busy"]
    # 20 passes in 4 s, of which it was busy for 1; 9 of 12 prompts were in the cache.
    assert cells(context) == [
        *["a1", "context", "25%", "5.0", "3", "1", "3/16", "120/4,096", "12.0", "75%", "-"]
    ]
    assert cells(denoiser) == [
        *["a1", "denoiser", "95%", "50.0", "3", "1", "-", "-", "-", "-", "25%"]
    ]


def test_a_pipe_gets_a_table_for_each_interval() -> None:
    with Service(FIRST, SECOND, 503) as service:
        result = top(service.target)
    assert result.stdout.count("tokens/s: 150.0 written") == 1
    assert result.exit_code == 2
    assert "answered 503" in result.stderr


def test_counters_that_begin_anew_have_no_rate() -> None:
    anew = reading(108.0, 10, 4, tower(108.0, 0.5, 2, **POOL, **CACHE))
    rates = Rates(Reading.model_validate(SECOND), Reading.model_validate(anew))
    context = anew["pairs"][0]["towers"]["context"]
    assert rates.per_second("generation_tokens_total") is None
    assert rates.tokens_per_nfe() is None
    assert rates.busy_share("a1", "context", context) is None
    rates = Rates(Reading.model_validate(FIRST), Reading.model_validate(SECOND))
    assert rates.busy_share("another pair", "context", context) is None
    idle = {**SECOND, "router": FIRST["router"]}
    rates = Rates(Reading.model_validate(FIRST), Reading.model_validate(idle))
    assert rates.per_second("generation_tokens_total") == 0.0
    # Nothing was written by no pass.
    assert rates.tokens_per_nfe() is None


def the_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_key_is_sent_where_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOTOWER_API_KEY", raising=False)
    with Service(FIRST, SECOND, key=KEY) as service:
        line = the_line(top(service.target, "--once"))
        assert "refused with 401" in line
        assert "--api-key or TWOTOWER_API_KEY" in line
        wrong = the_line(top(service.target, "--once", "--api-key", "wrong-secret"))
        assert "refused with 401" in wrong
        assert "wrong-secret" not in wrong
        assert top(service.target, "--once", "--api-key", KEY).exit_code == 0
        monkeypatch.setenv("TWOTOWER_API_KEY", KEY)
        assert top(service.target, "--once").exit_code == 0
    assert "é" not in the_line(top(service.target, "--once", "--api-key", "clé"))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in FIRST.items() if key != name}


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (403, "refused with 403"),
        (404, "answered 404 to GET /admin/stats, expected 200; is it the HTTP port"),
        (500, "answered 500"),
        (b"", "Invalid JSON"),
        (b"<html>", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[1]", "the answer: "),
        (without("router"), "router: Field required"),
        ({**FIRST, "router": {**FIRST["router"], "running": -1}}, "router.running: "),
        ({**FIRST, "clock_s": "\x1b[2J" * 500}, "clock_s: "),
        (json.dumps({**FIRST, "clock_s": float("nan")}).encode(), "clock_s: "),
    ],
)
def test_answers_that_are_no_stats(answer: dict[str, Any] | bytes | int, named: str) -> None:
    with Service(answer) as service:
        line = the_line(top(service.target, "--once"))
    assert service.target in line
    assert named in line
    assert line.isprintable()


def test_nobody_there() -> None:
    assert "127.0.0.1:1: no answer ([Errno 111] Connection refused)" in the_line(top("127.0.0.1:1"))


@pytest.mark.parametrize(
    "target",
    ["", "127.0.0.1", "host:", "host:99999", "host:0", "::1", "ftp://host:1", "http://",
     "host:8000/path", "http://user:secret@host:1", "http://host:1/?q"],
)  # fmt: skip
def test_targets_that_are_none(target: str) -> None:
    line = the_line(top(target))
    assert "target: got " in line
    assert line.endswith("expected host:port, or http(s)://host:port")


@pytest.mark.parametrize("target", ["http://127.0.0.1:9", "https://host", "[::1]:8000", "host:1/"])
def test_targets_that_are_some(target: str) -> None:
    StatsClient(target, None).close()


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "0.01", "9e9"])
def test_intervals_out_of_their_limits(interval: str) -> None:
    line = the_line(CliRunner().invoke(app, ["top", "--interval", interval]))
    assert "interval: got " in line
    assert "expected 0.1 to 3600 seconds" in line


def test_names_of_a_service_are_not_obeyed_by_the_terminal() -> None:
    named = {**SECOND, "model": "\x1b[2Jx", "pairs": [{**SECOND["pairs"][0], "pair": "[red]\x07"}]}
    with Service(FIRST, named) as service:
        result = top(service.target, "--once")
    assert result.stdout.startswith("\\x1b[2Jx 0.1.0 on ")
    assert "[red]\\x07" in result.stdout


@pytest.fixture
def service() -> Iterator[Service]:
    with Service(FIRST, SECOND) as service:
        yield service


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_a_terminal_shows_it_live_until_a_key(key: bytes, service: Service) -> None:
    pressed = []

    def watch(sent: bytes, _: object, reader: int) -> None:
        # The second page has rates.
        if not pressed and b"150.0 written" in sent:
            service.answers.append(503)
        if not pressed and b"answered 503" in sent:
            pressed.append(os.write(reader, b"x" + key))

    command = ["twotower.cli", "top", "--target", service.target, "--interval", "0.2"]
    ended = run_in_terminal(command, columns=100, watch=watch)
    assert pressed
    assert ended.code == 0
    assert not ended.screen.cursor_is_hidden
    # The other screen was used, and left.
    assert ended.sent.index(b"\x1b[?1049h") < ended.sent.rindex(b"\x1b[?1049l")

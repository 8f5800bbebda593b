"""What is written of requests, and what never is."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter

from tests.deployments.http.conftest import FrontHere, Fronts
from twotower.deployments.access.keys import ApiKey, new_key
from twotower.deployments.telemetry.logs import LOGGER, serve_logging

MARKER = "MARKEDWORD"


class Lines(logging.Handler):
    """Keeps the lines of Serve's log, as a replica with JSON writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def completions(self) -> list[dict[str, object]]:
        """The lines of completions."""
        found = [json.loads(line) for line in self.lines]
        return [line for line in found if line["message"].startswith("completion ")]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log of Serve and of everything else, from before the front is made."""
    handler, serve, root = Lines(), logging.getLogger(LOGGER), logging.getLogger()
    level = serve.level
    serve.setLevel(logging.INFO)
    for logger in (serve, root):
        logger.addHandler(handler)
    yield handler
    for logger in (serve, root):
        logger.removeHandler(handler)
    serve.setLevel(level)


async def test_one_line_for_each_completion(lines: Lines, fronts: Fronts) -> None:
    serve = logging.getLogger(LOGGER)
    serve.propagate, propagated = False, serve.propagate
    front = fronts()
    body = {"prompt": [5, 6, 7], "max_tokens": 5, "mode": "ar", "n": 2, "ignore_eos": True}
    answer = await front.client.post(
        "/v1/completions", json=body, headers={"x-request-id": "mine-1"}
    )
    assert answer.status_code == 200
    await front.refused({"prompt": [5], "max_tokens": 5000})
    serve.propagate = propagated
    first, second = lines.completions()
    for line in (first, second):
        seconds, ttft = line.pop("seconds"), line.pop("ttft")
        assert isinstance(seconds, float)
        assert isinstance(ttft, float)
        assert 0 < ttft <= seconds < 60
        wanted = {
            "request_id": "mine-1",
            "key": "anonymous",
            "mode": "ar",
            "pair": "",
            "prompt_tokens": 3,
            "output_tokens": 5,
            "nfe": 0,
            "finish_reason": "length",
            "code": "OK",
        }
        assert {name: line[name] for name in wanted} == wanted
        assert str(line["message"]).startswith("completion request_id=mine-1 key=anonymous mode=ar")


async def test_a_request_names_all_of_its_lines(
    lines: Lines, front: FrontHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("something")

    monkeypatch.setattr(front.handle.context, "prefill", broken)
    await front.client.post(
        "/v1/completions", json={"prompt": [5, 6]}, headers={"x-request-id": "mine-2"}
    )
    written = [json.loads(line) for line in lines.lines]
    failed = [line for line in written if "failed" in line["message"]]
    assert failed
    assert {line["request_id"] for line in failed} == {"mine-2"}
    [ended] = {line["message"]: line for line in lines.completions()}.values()
    assert (ended["finish_reason"], ended["code"]) == ("error", "INTERNAL")


async def test_no_prompt_output_or_key_in_any_line(
    lines: Lines, fronts: Fronts, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().setLevel(logging.DEBUG)
    key, digest = new_key()
    front = fronts(api_keys=[ApiKey(name="owner", sha256=digest)])
    headers = {"authorization": f"Bearer {key}"}
    texts = [f"{MARKER} a", [300, 301, 302]]
    bodies: list[dict[str, object]] = [
        {
            "prompt": text,
            "mode": mode,
            "echo": True,
            "logprobs": 1,
            "stream": stream,
            "user": MARKER,
        }
        for text in texts
        for mode, stream in (("ar", False), ("mask_diffusion", True))
    ]
    bodies += [
        {"prompt": MARKER * 2000},
        {"prompt": MARKER, "temperature": MARKER},
        {"prompt": MARKER, MARKER: 1},
        {"prompt": MARKER, "stop": [MARKER], "model": MARKER},
    ]
    statuses = []
    for body in bodies:
        answer = await front.client.post("/v1/completions", json=body, headers=headers)
        statuses.append(answer.status_code)
    wrong = {"authorization": f"Bearer {key}{MARKER}"}
    answer = await front.client.post("/v1/completions", json=bodies[0], headers=wrong)
    logging.getLogger().setLevel(logging.WARNING)
    assert [*statuses, answer.status_code] == [200] * 4 + [400] * 3 + [404, 401]
    whole = "\n".join([*lines.lines, *capfd.readouterr()])
    assert len(lines.completions()) >= 4
    # Ids in a row: a number alone may be part of a request's name.
    assert not re.search(r"300\D{1,2}301", whole)
    for secret in (MARKER, key, digest):
        assert secret not in whole


def test_settings_of_serve() -> None:
    assert serve_logging("json") == {"encoding": "JSON"}
    assert serve_logging("text") == {"encoding": "TEXT"}

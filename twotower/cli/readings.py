"""Readings of a service's `GET /admin/stats`, and what lies between two of them."""

from __future__ import annotations

from typing import Annotated

import httpx
from pydantic import BaseModel, Field, ValidationError

from twotower.towers.errors import InvalidRequestError, UnavailableError, shorten

PATH = "/admin/stats"
TIMEOUT_S = 5.0

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
# The names of EngineStats.report().
TowerReading = dict[str, Number | None]


class RouterReading(BaseModel):
    """Requests in flight, and counters since the start."""

    running: Count
    waiting: Count
    requests_total: Count
    generation_tokens_total: Count
    prompt_tokens_total: Count
    nfe_total: Count
    context_passes_total: Count


class PairReading(BaseModel):
    """A pair's towers by name; `eased` is the share of the way to their floors that rows which
    begin now are served with."""

    pair: str
    towers: dict[str, TowerReading]
    eased: Number | None = None


class Reading(BaseModel):
    """All that a service says at a moment; `clock_s` is that of its clock, in seconds."""

    model: str
    version: str
    uptime_s: Number
    router: RouterReading
    pairs: list[PairReading]
    clock_s: Number


class Rates:
    """What happened between two readings of a service. None stands for what they do not tell: a
    counter that is missing or has begun anew, or a division by nothing."""

    def __init__(self, before: Reading, now: Reading) -> None:
        self._before, self._now = before, now
        self._seconds = now.clock_s - before.clock_s
        self._towers = {
            (pair.pair, tower): values
            for pair in before.pairs
            for tower, values in pair.towers.items()
        }

    def per_second(self, counter: str) -> float | None:
        """Growth per second of a counter of the router."""
        return ratio(self._grown(counter), self._seconds)

    def tokens_per_nfe(self) -> float | None:
        """Tokens written per denoiser pass."""
        return ratio(self._grown("generation_tokens_total"), self._grown("nfe_total"))

    def busy_share(self, pair: str, tower: str, now: TowerReading) -> float | None:
        """Share of the time that a tower spent in passes."""
        before = self._towers.get((pair, tower), {})
        seconds = grown(before, now, "clock_seconds")
        return ratio(grown(before, now, "pass_seconds"), seconds)

    def tower_per_second(
        self, pair: str, tower: str, now: TowerReading, counter: str
    ) -> float | None:
        """Growth per second of a counter of a tower."""
        before = self._towers.get((pair, tower), {})
        return ratio(grown(before, now, counter), grown(before, now, "clock_seconds"))

    def _grown(self, counter: str) -> float | None:
        return grown(self._before.router.model_dump(), self._now.router.model_dump(), counter)


def grown(before: TowerReading, now: TowerReading, counter: str) -> float | None:
    """By how much a counter has grown; None if it is not in both, or has begun anew."""
    first, last = before.get(counter), now.get(counter)
    return None if first is None or last is None or last < first else last - first


def ratio(part: float | None, whole: float | None) -> float | None:
    """A quotient, or None where there is none."""
    return None if part is None or whole is None or whole <= 0 else part / whole


class StatsClient:
    """Reads the stats of the service at `target`, `host:port` or a URL, with an API key if it wants
    one. Raises InvalidRequestError for another target."""

    def __init__(self, target: str, api_key: str | None) -> None:
        self._url = _url(target)
        self._target = target
        try:
            headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
            # The proxies of the environment are for the world outside.
            self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False, headers=headers)
        except UnicodeEncodeError:
            # Without the key itself, which is a secret.
            raise InvalidRequestError("api_key", "...", "ASCII") from None

    def read(self) -> Reading:
        """Raises UnavailableError, in one line, if nothing useful comes back."""
        try:
            response = self._client.get(self._url)
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(f"{self._target}: no answer ({reason})") from None
        if response.status_code in (401, 403):
            raise UnavailableError(
                f"{self._target}: refused with {response.status_code}, expected the key of an "
                "operator; give it by --api-key or TWOTOWER_API_KEY"
            )
        if response.status_code != 200:
            raise UnavailableError(
                f"{self._target}: answered {response.status_code} to GET {PATH}, expected 200; "
                "is it the HTTP port of a TwoTower service?"
            )
        return self._parsed(response.content)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _parsed(self, content: bytes) -> Reading:
        try:
            return Reading.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the answer"
            raise UnavailableError(
                f"{self._target}: GET {PATH}: {field}: {first['msg']}, "
                f"got {shorten(first['input'])}"
            ) from None


def _url(target: str) -> str:
    expected = "host:port, or http(s)://host:port"
    url = target if target.startswith(("http://", "https://")) else f"http://{target}"
    try:
        parsed = httpx.URL(url)
        port = parsed.port
    except (httpx.InvalidURL, ValueError):
        raise InvalidRequestError("target", target, expected) from None
    bare = not parsed.host or (port is None and url != target)
    wrong = port is not None and not 1 <= port <= 65535
    if bare or wrong or parsed.path not in ("", "/") or parsed.query or parsed.userinfo:
        raise InvalidRequestError("target", target, expected)
    return f"{url.rstrip('/')}{PATH}"

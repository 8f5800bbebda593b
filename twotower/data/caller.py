"""Calls of a running service's HTTP front, many at a time, until each has an answer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from twotower.client.keys import authorization
from twotower.data.places import Places
from twotower.data.replies import TRANSIENT, Reply, error_body, read_reply
from twotower.data.targets import Target, Targets
from twotower.protos.backoff import backoff_s
from twotower.towers.errors import InvalidRequestError

KEY_VARIABLE = "TWOTOWER_API_KEY"
CONNECT_S = 10.0
# Failures of the service itself that say nothing of when to come back: each may be the row's fault.
MOST_FAULTS = {200: 3, 500: 8}
_FULL = (429, 503)


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    `status` is the service's last status, 0 if it never answered; `body` the service's answer, or
    OpenAI's error object `{"error": {"message", "type", "param", "code"}}`. `attempts` counts how
    often it was sent.
    """

    status: int
    body: dict[str, Any]
    request_id: str
    attempts: int

    @property
    def ok(self) -> bool:
        """True for a completion."""
        return self.status == 200 and "error" not in self.body

    @property
    def permanent(self) -> bool:
        """True if the same request would be refused again: 4xx other than 408, 409, 425 and 429,
        or any other status that is no passing state of a service."""
        return not self.ok and self.status != 0 and self.status not in TRANSIENT


@dataclass
class _Call:
    """A request on its way: its bytes, when it is given up, and what was heard so far."""

    path: str
    content: bytes
    deadline: float = float("inf")
    attempts: int = 0
    waits: int = 0
    faults: dict[int, int] = field(default_factory=dict)
    last: Reply = field(default_factory=lambda: Reply(0, error_body(0, "never sent")))

    def given_up(self, now: float) -> bool:
        """True if `last` is what remains to be said."""
        status = self.last.status
        if self.last.ok or (status and status not in TRANSIENT and not self.last.bad_answer):
            return True
        return now >= self.deadline or self.faults.get(status, 0) >= MOST_FAULTS.get(
            status, 1 << 30
        )

    def answer(self) -> Answer:
        return Answer(self.last.status, self.last.body, self.last.request_id, self.attempts)


class ServiceCaller:
    """Posts requests to one or several services; belongs to the event loop that made it.

    `targets`: addresses of HTTP fronts, `http://HOST:PORT`, `https://...` or `HOST:PORT`. At most
    `concurrency` requests are in flight. `api_key` None means the environment's TWOTOWER_API_KEY.
    A request that gets no completion is tried again for `patience_s` seconds from when it was first
    sent. Proxies that the environment names are not used. Raises InvalidRequestError.

    A service that is full (429, 503) is left alone for as long as it says (Retry-After), and fewer
    requests are sent to it from then on. One that does not answer is left out for up to 5 s. Each
    request goes to the service that has the fewest of ours. Nothing of a request is ever logged.

    The loop is written out, not taken from a library of retries: what is tried again depends on
    places and services that all requests share, which such libraries do not know of.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        *,
        concurrency: int,
        api_key: str | None = None,
        patience_s: float = 600.0,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise InvalidRequestError("concurrency", concurrency, "a whole number from 1 on")
        if not patience_s > 0.0:
            raise InvalidRequestError("patience_s", patience_s, "seconds above 0")
        self._targets = Targets(targets)
        self._places = Places(concurrency)
        self._patience_s = patience_s
        self._headers = {"content-type": "application/json", **_authorization(api_key)}
        self._session: aiohttp.ClientSession | None = None

    @property
    def places(self) -> Places:
        """The places for requests in flight."""
        return self._places

    async def post(self, url: str, body: Mapping[str, Any]) -> Answer:
        """The answer to a request to the path `url`, such as "/v1/completions".

        Waits for a place, and for as long as there is hope: until a completion, a permanent error,
        3 answers that are none, 8 errors of status 500, or the end of its patience.
        """
        call = _Call(url, json.dumps(body).encode())
        while not call.given_up(_now()):
            await self._attempt(call)
        return call.answer()

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _attempt(self, call: _Call) -> None:
        """Sends it once, in a place; then waits as long as that one reply asks for."""
        of_round = await self._places.take(first=call.attempts > 0)
        try:
            if not call.attempts:
                call.deadline = _now() + self._patience_s
            target = self._targets.best(_now())
            while (rest := min(target.rests_until, call.deadline) - _now()) > 0.0:
                await asyncio.sleep(rest)
                target = self._targets.best(_now())
            if _now() < call.deadline:
                await self._send(call, target)
                pause = self._learn(call, target, of_round)
            else:
                pause = 0.0
        finally:
            self._places.give_back()
        if pause:
            await asyncio.sleep(min(pause, max(0.0, call.deadline - _now())))

    async def _send(self, call: _Call, target: Target) -> None:
        limit = aiohttp.ClientTimeout(total=call.deadline - _now(), sock_connect=CONNECT_S)
        call.attempts += 1
        target.in_flight += 1
        try:
            async with self._open().post(
                target.url + call.path,
                data=call.content,
                headers=self._headers,
                timeout=limit,
                allow_redirects=False,
            ) as response:
                call.last = read_reply(response, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError)
            text = f"{target.url}: {type(error).__name__}"
            # The last status stays: it says more than that the line went dead.
            status = call.last.status if call.last.status in TRANSIENT else 0
            call.last = Reply(status, error_body(0, text), unreached=refused, lost=not refused)
        finally:
            target.in_flight -= 1

    def _learn(self, call: _Call, target: Target, of_round: int) -> float:
        """What the reply says about the service; the seconds that this request is to wait."""
        reply = call.last
        if reply.unreached:
            target.rest(_now(), None)
            return 0.0
        if reply.lost:
            call.waits += 1
            return backoff_s(call.waits)
        if reply.status in _FULL:
            self._places.refused(of_round)
            target.rest(_now(), reply.retry_after_s)
            return 0.0
        target.answered()
        if reply.ok:
            self._places.answered()
            return 0.0
        call.waits += 1
        call.faults[reply.status] = call.faults.get(reply.status, 0) + 1
        return backoff_s(call.waits) if not call.given_up(_now()) else 0.0

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Places bound the connections; each is kept for the next request.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session


def _authorization(api_key: str | None) -> dict[str, str]:
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    return authorization(key) if key else {}


def _now() -> float:
    return asyncio.get_running_loop().time()

"""Addresses of services, and which service is next."""

from __future__ import annotations

import pytest

from twotower.data.targets import LONGEST_REST_S, Targets, target_url
from twotower.towers.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("  host:80 ", "http://host:80"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http://host", "http://host"),
        ("https://host:8443/", "https://host:8443"),
        ("http://host:8000/v1", "http://host:8000"),
        ("https://host/models/a/v1/", "https://host/models/a"),
    ],
)
def test_good_addresses(given: str, url: str) -> None:
    assert target_url(given) == url


@pytest.mark.parametrize(
    "given",
    ["", "host", "host:port", "host:99999", "ftp://host:1", "http://", "dns:///host:1", "a b:1"],
)
def test_bad_addresses(given: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^target: got .*, expected http://HOST:PORT"):
        target_url(given)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        target_url("http://somebody:secret@host:1")
    assert "secret" not in str(caught.value)


def test_none_and_the_same_one_twice() -> None:
    with pytest.raises(InvalidRequestError, match="at least one address"):
        Targets([])
    targets = Targets(["host:1", "http://host:1/", "host:2"])
    first = targets.best(0.0)
    first.in_flight = 1
    second = targets.best(0.0)
    second.in_flight = 2
    assert [first.url, second.url] == ["http://host:1", "http://host:2"]
    assert targets.best(0.0) is first


def test_one_that_rests_is_left_out_and_comes_back() -> None:
    targets = Targets(["a:1", "b:1"])
    a = targets.best(0.0)
    a.rest(100.0, 3.0)
    assert targets.best(102.9).url == "http://b:1"
    assert 103.0 <= a.rests_until <= 103.75
    assert targets.best(104.0) is a
    b = next(t for t in (targets.best(101.0),))
    b.rest(100.0, 30.0)
    # Both rest: the one that is back first.
    assert targets.best(101.0) is a


def test_failures_in_a_row_make_longer_rests_up_to_a_limit() -> None:
    target = Targets("a:1").best(0.0)
    now, rests = 0.0, []
    for _ in range(12):
        target.rest(now, None)
        rests.append(target.rests_until - now)
        # A whole wave of requests fails at once, and counts once.
        target.rest(now, None)
        assert target.rests_until - now == rests[-1]
        now = target.rests_until
    assert rests[0] <= 0.1 + 1e-9
    assert 2.5 <= rests[-1] <= 5.0
    target.answered()
    target.rest(now, None)
    assert target.rests_until - now <= 0.1 + 1e-9
    target.rest(now, 1e9)
    assert target.rests_until - now <= 1.25 * LONGEST_REST_S

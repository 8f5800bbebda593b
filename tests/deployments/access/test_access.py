"""Who is let in, and as whom."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.deployments.access.access import Access
from twotower.deployments.access.errors import (
    ForbiddenError,
    RateLimitError,
    UnauthenticatedError,
)
from twotower.deployments.access.keys import ApiKey
from twotower.deployments.access.peers import is_loopback_peer

# Not drawn: they stand in names of cases, which every process of a run has to find alike.
PLAIN, ROOT = "tt-" + "a" * 43, "tt-" + "b" * 43
SHA256, ROOT_SHA256 = (hashlib.sha256(key.encode()).hexdigest() for key in (PLAIN, ROOT))
KEYS = [
    ApiKey(name="ann", sha256=SHA256, max_concurrent=5, tokens_per_minute=100),
    ApiKey(name="root", sha256=ROOT_SHA256, admin=True),
]
HERE, ELSEWHERE = "ipv4:127.0.0.1:51234", "ipv4:192.0.2.7:51234"


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:127.0.0.1:51234",
        "ipv4:127.8.9.1:1",
        "ipv6:%5B::1%5D:51234",
        "ipv6:[::1]:51234",
        "ipv6:%5B::ffff:127.0.0.1%5D:1",
        "ipv6:%5B::1%25lo%5D:1",
        "unix:",
        "unix:/run/twotower.sock",
        "unix-abstract:name",
        "127.0.0.1",
        "127.0.0.1:80",
        "::1",
        "[::1]:80",
        "::ffff:127.0.0.1",
    ],
)
def test_loopback_peers(peer: str) -> None:
    assert is_loopback_peer(peer)


@pytest.mark.parametrize(
    "peer",
    [
        None,
        "",
        "ipv4:10.0.0.1:51234",
        "ipv4:128.0.0.1:51234",
        "ipv6:%5B2001:db8::1%5D:51234",
        "ipv6:%5B::ffff:10.0.0.1%5D:1",
        "ipv6:%5B::7f00:1%5D:1",
        "0.0.0.0",
        "::",
        "localhost",
        "127.0.0.1.example.com",
        "ipv4:127.0.0.1.example.com:1",
        "ipv4:127.1:1",
        "http://127.0.0.1",
        "ipv4:",
        "unknown",
        "127.0.0.1" + " " * 300,
    ],
)
def test_all_others_are_elsewhere(peer: str | None) -> None:
    assert not is_loopback_peer(peer)


@given(st.text(max_size=300), st.sampled_from(["", "ipv4:", "ipv6:", "ipv6:%5B"]))
def test_no_text_breaks_the_reading_of_a_peer(text: str, before: str) -> None:
    peer = before + text
    if is_loopback_peer(peer):
        assert "127." in peer or "::1" in peer or ":1" in peer or peer.startswith("unix")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "  Bearer  "])
@pytest.mark.parametrize("peer", [HERE, ELSEWHERE, None])
def test_a_key_names_its_holder_from_anywhere(scheme: str, peer: str | None) -> None:
    access = Access(KEYS)
    caller = access.caller(f"{scheme} {PLAIN} ", peer)
    assert (caller.name, caller.admin) == ("ann", False)
    with pytest.raises(ForbiddenError, match="'ann' is none"):
        caller.check_admin()
    access.caller(f"Bearer {ROOT}", peer).check_admin()


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        PLAIN,
        f"Basic {PLAIN}",
        f"Bearer{PLAIN}",
        f"Bearer\n{PLAIN}",
        f"Bearer {PLAIN}x",
        f"Bearer {PLAIN[:-1]}",
        f"Bearer {PLAIN} {PLAIN}",
        f"Bearer {SHA256}",
        "Bearer " + "x" * (1 << 20),
        "Bearer \udcff\ud800é",
    ],
)
@pytest.mark.parametrize("peer", [HERE, "unix:", ELSEWHERE])
def test_with_keys_nobody_else_is_let_in(given: str | None, peer: str) -> None:
    with pytest.raises(UnauthenticatedError, match="authorization: got ") as caught:
        Access(KEYS).caller(given, peer)
    assert PLAIN[3:20] not in str(caught.value)
    assert SHA256[:20] not in str(caught.value)


@given(st.text())
def test_no_header_breaks_the_reading(text: str) -> None:
    with pytest.raises(UnauthenticatedError):
        Access(KEYS).caller(text, HERE)
    with pytest.raises(UnauthenticatedError):
        Access(KEYS).caller(f"Bearer {text}", HERE)


def test_without_keys_only_this_machine_is_let_in() -> None:
    access = Access()
    # Clients of other services send a key always.
    for authorization in (None, "Bearer anything"):
        here = access.caller(authorization, HERE)
        assert (here.name, here.admin) == ("anonymous", True)
        for peer in (ELSEWHERE, None, "unknown"):
            with pytest.raises(UnauthenticatedError, match="its own machine only"):
                access.caller(authorization, peer)


def test_what_a_front_forwards_is_not_of_this_machine() -> None:
    with pytest.raises(UnauthenticatedError):
        Access().caller(None, HERE, forwarded=True)
    assert not Access(allow_anonymous=True).caller(None, HERE, forwarded=True).admin
    assert Access(KEYS).caller(f"Bearer {ROOT}", HERE, forwarded=True).admin


def test_anonymous_callers_from_elsewhere_are_no_admins() -> None:
    access = Access(allow_anonymous=True)
    assert not access.caller(None, ELSEWHERE).admin
    assert not access.caller(None, None).admin
    assert access.caller(None, HERE).admin


def test_requests_of_one_key_share_its_limits() -> None:
    access = Access(KEYS)
    for peer in (HERE, ELSEWHERE) * 2 + (HERE,):
        access.caller(f"Bearer {PLAIN}", peer).limits.admit()
    with pytest.raises(RateLimitError, match="5 requests run"):
        access.caller(f"Bearer {PLAIN}", HERE).limits.admit()
    for _ in range(20):
        access.caller(f"Bearer {ROOT}", HERE).limits.admit()


@pytest.mark.parametrize(("share", "most"), [(1, 5), (2, 2), (5, 1), (9, 1)])
def test_routers_share_a_limit(share: int, most: int) -> None:
    limits = Access(KEYS, share=share).caller(f"Bearer {PLAIN}", HERE).limits
    for _ in range(most):
        limits.admit()
    with pytest.raises(RateLimitError, match=f"expected at most {most}"):
        limits.admit()


def test_it_is_light() -> None:
    code = (
        "import sys, twotower.deployments.access.access, twotower.deployments.access.key_file\n"
        "assert not {'torch', 'ray', 'grpc'} & set(sys.modules)"
    )
    top = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=top, check=True, timeout=60)

"""What pages in a browser may do with a service that needs no key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.deployments.access.access import Access, Caller
from twotower.deployments.access.errors import ForbiddenError
from twotower.deployments.access.keys import ApiKey, new_key
from twotower.deployments.access.pages import check_page

HERE = Access().caller(None, "127.0.0.1")
ELSEWHERE = Access(allow_anonymous=True).caller(None, "192.0.2.1")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, None),
        (None, "localhost:8000"),
        ("http://localhost:8000", "localhost:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        (None, "[::1]"),
        ("https://page.example", "localhost:8000"),
        (None, "a.localhost:8000"),
    ],
)
def test_own_pages_and_allowed_ones_may_call(origin: str | None, host: str | None) -> None:
    check_page(HERE, origin, host, ["https://page.example"])


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://evil.example",
        "http://localhost:3000",
        "http://localhost",
        "https://page.example.evil.example",
    ],
)
@pytest.mark.parametrize("caller", [HERE, ELSEWHERE])
def test_pages_of_other_sites_may_not(caller: Caller, origin: str) -> None:
    with pytest.raises(ForbiddenError, match="origin: got another site's page"):
        check_page(caller, origin, "localhost:8000", ["https://page.example"])


@pytest.mark.parametrize("host", ["evil.example:8000", "evil.example", "localhost.evil.example"])
def test_a_name_that_somebody_has_turned_to_loopback_is_refused(host: str) -> None:
    with pytest.raises(ForbiddenError, match="host: got a name"):
        check_page(HERE, f"http://{host}", host)
    # Others than this machine have a name by which they are called.
    check_page(ELSEWHERE, f"http://{host}", host)


def test_who_has_a_key_may_call_from_any_page() -> None:
    plain, sha256 = new_key()
    caller = Access([ApiKey(name="ann", sha256=sha256)]).caller(f"Bearer {plain}", None)
    check_page(caller, "https://other.example", "host")


@given(st.text(), st.text())
def test_no_header_breaks_the_reading(origin: str, host: str) -> None:
    if origin.partition("://")[2].lower() != host.lower():
        with pytest.raises(ForbiddenError, match="origin: "):
            check_page(HERE, origin, host)

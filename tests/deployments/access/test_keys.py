"""API keys: what is kept of them, and what finds them."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from twotower.deployments.access import keys
from twotower.deployments.access.keys import ApiKey, Keyring, new_key


def hashed(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()


def test_a_new_key_is_256_random_bits_and_comes_with_its_hash() -> None:
    made = [new_key() for _ in range(20)]
    assert len({plain for plain, _ in made}) == 20
    for plain, sha256 in made:
        assert plain.startswith("tt-")
        # 43 characters of base64 hold 256 bits.
        assert len(plain) == 46
        assert sha256 == hashed(plain)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a" * 65}, "name"),
        ({"name": "two words"}, "name"),
        ({"name": "line\n"}, "name"),
        ({"name": "naïve"}, "name"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"sha256": "g" * 64}, "sha256"),
        ({"sha256": "0" * 64 + "\n"}, "sha256"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"tokens_per_minute": 0}, "tokens_per_minute"),
        ({"key": "tt-x"}, "key"),
    ],
)
def test_wrong_fields(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ApiKey(**{"name": "a", "sha256": "0" * 64, **changes})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_a_hash_is_not_in_the_repr() -> None:
    assert "abcdef" not in repr(ApiKey(name="a", sha256="abcdef" + "0" * 58))


RING = Keyring(
    [ApiKey(name=name, sha256=hashed(f"tt-{name}").upper()) for name in ("ann", "bob", "cid")]
)


@pytest.mark.parametrize("name", ["ann", "bob", "cid"])
def test_a_key_is_found(name: str) -> None:
    found = RING.find(f"tt-{name}")
    assert found is not None
    assert found.name == name


@given(st.text())
def test_any_other_text_is_unknown(presented: str) -> None:
    expected = presented[3:] if presented in ("tt-ann", "tt-bob", "tt-cid") else None
    found = RING.find(presented)
    assert (found.name if found else None) == expected


@pytest.mark.parametrize("presented", ["", "\ud800", "é" * 10, "tt-ann ", "x" * (1 << 20)])
def test_odd_texts_are_unknown(presented: str) -> None:
    assert RING.find(presented) is None


@pytest.mark.parametrize("presented", ["tt-ann", "tt-cid", "none"])
def test_every_entry_is_compared(presented: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def counted(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, given)

    monkeypatch.setattr(keys, "hmac", type("Hmac", (), {"compare_digest": staticmethod(counted)}))
    RING.find(presented)
    assert len(compared) == 3


def test_an_empty_keyring_knows_nobody() -> None:
    assert Keyring([]).find("") is None


def test_names_and_hashes_are_distinct() -> None:
    one, two = ApiKey(name="a", sha256="0" * 64), ApiKey(name="a", sha256="1" * 64)
    with pytest.raises(ValueError, match="name: got 'a' 2 times"):
        Keyring([one, two])
    twin = ApiKey(name="b", sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256: got one for 'a' and 'b'") as caught:
        Keyring([one, twin])
    assert "000" not in str(caught.value)

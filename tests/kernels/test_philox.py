"""Random numbers against the published known answers of Philox4x32-10."""

from __future__ import annotations

import pytest
import torch

from tests.support.comparing import assert_same_bits
from tests.support.statistics import uniformity
from twotower.kernels import philox
from twotower.kernels.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF
# The vectors that come with the Random123 library: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    words = philox4x32(key[0] | key[1] << 32, (c0, c1, c2, c3))
    assert words.tolist() == list(want)


def scalar_philox(key: int, counter: list[int]) -> list[int]:
    """The same rounds on Python's whole numbers."""
    low, high = key & ONES, key >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ low,
            second & ONES,
            (first >> 32) ^ counter[3] ^ high,
            first & ONES,
        ]
        low, high = (low + 0x9E3779B9) & ONES, (high + 0xBB67AE85) & ONES
    return counter


@pytest.mark.parametrize("key", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_uniforms_are_counted_by_position_step_token_and_domain(key: int) -> None:
    positions = torch.tensor([0, 7, 4_000_000])
    got = uniforms(key, positions, step=5, domain=2, vocab_size=11)
    assert got.shape == (3, 11)
    for row, position in enumerate(positions.tolist()):
        for token in range(11):
            word = scalar_philox(key, [position, 5, token // 4, 2])[token % 4]
            assert float(got[row, token]) == ((word >> 9) + 0.5) / 2**23


@pytest.mark.parametrize(("word", "value"), [(0, 2.0**-24), (ONES, 1.0 - 2.0**-24)])
def test_the_ends_are_open(word: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "philox4x32", lambda *_: torch.full((1, 1, 4), word))
    got = uniforms(1, torch.tensor([0]), 0, 1, 4)
    assert got.tolist() == [[value] * 4]
    assert bool(torch.isfinite(torch.log(-torch.log(got))).all())


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it() -> None:
    whole = uniforms(9, torch.arange(40), 3, 1, 130)
    for position in (0, 17, 39):
        alone = uniforms(9, torch.tensor([position]), 3, 1, 130)
        assert_same_bits(alone[0], whole[position])
    assert_same_bits(uniforms(9, torch.arange(40), 3, 1, 77), whole[:, :77])


def test_lines_may_each_have_their_own_key_step_and_domain() -> None:
    keys = [1, 2**62 + 5, -1, 1]
    own = torch.tensor(keys), torch.tensor([5, 5, 9, 2**31]), torch.tensor([0, 7, 0, 3])
    domains = torch.tensor([1, 2, 1, 2])
    whole = uniforms(own[0], own[1], own[2], domains, 77)
    for line, key in enumerate(keys):
        # A negative key stands for the same 64 bits without a sign.
        for same in (key, key % 2**64):
            position, step, domain = own[1][line : line + 1], int(own[2][line]), int(domains[line])
            alone = uniforms(same, position, step, domain, 77)
            assert_same_bits(whole[line : line + 1], alone, line)
    mixed = uniforms(own[0], own[1], 3, domains, 77)
    assert_same_bits(mixed, uniforms(own[0], own[1], torch.full((4,), 3), domains, 77))


@pytest.mark.parametrize("counted", [False, True])
def test_a_key_may_be_a_tensor(counted: bool) -> None:
    """The known answers in one call, with a key and a counter each."""
    keys = [key[0] | key[1] << 32 for _, key, _ in KNOWN]
    signed = torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys])
    c0, c1, c2, c3 = (torch.tensor(words) for words in zip(*(c for c, _, _ in KNOWN), strict=True))
    if counted:
        words = philox4x32(signed[:, None], (c0[:, None], c1[:, None], c2[:, None], c3[:, None]))
        words = words[:, 0]
    else:
        words = philox4x32(signed, (c0, c1, c2, c3))
    assert words.tolist() == [list(want) for _, _, want in KNOWN]


def test_every_part_of_the_counter_and_the_key_matters() -> None:
    base = uniforms(1, torch.tensor([5]), 3, 1, 64)
    others = [
        uniforms(2, torch.tensor([5]), 3, 1, 64),
        uniforms(1 + (1 << 32), torch.tensor([5]), 3, 1, 64),
        uniforms(1, torch.tensor([6]), 3, 1, 64),
        uniforms(1, torch.tensor([5]), 4, 1, 64),
        uniforms(1, torch.tensor([5]), 3, 2, 64),
    ]
    for other in others:
        assert int((other == base).sum()) < 3


def test_they_are_uniform_and_do_not_follow_their_neighbours() -> None:
    drawn = uniforms(20, torch.arange(200), 0, 1, 500)
    assert uniformity(drawn) > 1e-3
    for left, right in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        both = torch.stack((left.flatten(), right.flatten()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.015

"""The scheduler's policy, by cases written by hand and by random traffic."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from twotower.towers.engine.options import PassLimits
from twotower.towers.engine.scheduler import PassScheduler


def scheduler(**limits: int) -> PassScheduler:
    given = {"max_num_batched_tokens": 512, "max_prefill_tokens": 64, **limits}
    return PassScheduler(PassLimits(**given))


def passes_of(schedule: PassScheduler) -> list[list[int]]:
    """All passes until nothing waits."""
    passes = []
    while schedule:
        passes.append(schedule.take())
    return passes


def test_nothing_waits() -> None:
    schedule = scheduler()
    assert len(schedule) == 0
    assert schedule.take() == []


def test_work_runs_in_order_of_arrival_within_both_limits() -> None:
    schedule = scheduler(max_num_batched_tokens=10, max_rows_per_pass=3)
    for ticket, tokens in enumerate([4, 4, 4, 11, 1, 9, 1, 1, 1, 1]):
        schedule.add(ticket, tokens)
    # The third waits though a later one would fit; the oversized one runs alone.
    assert passes_of(schedule) == [[0, 1], [2], [3], [4, 5], [6, 7, 8], [9]]


def test_blocks_that_have_begun_go_before_those_that_have_not() -> None:
    schedule = scheduler(max_rows_per_pass=2)
    for ticket in range(3):
        schedule.add(ticket, 16)
    assert schedule.take() == [0, 1]
    schedule.add(1, 16, begun=True)
    schedule.add(3, 16)
    schedule.add(0, 16, begun=True)
    assert passes_of(schedule) == [[1, 0], [2, 3]]


def test_prefill_alone_has_the_whole_pass() -> None:
    schedule = scheduler(max_num_batched_tokens=150, max_prefill_tokens=64)
    for ticket in range(5):
        schedule.add(ticket, 64, prefill=True)
    assert passes_of(schedule) == [[0, 1], [2, 3], [4]]


def test_prefill_beside_other_work_has_its_own_share() -> None:
    schedule = scheduler(max_num_batched_tokens=32, max_prefill_tokens=100)
    for ticket in (1, 2, 3):
        schedule.add(ticket, 50, prefill=True)
    for ticket in (11, 12, 13):
        schedule.add(ticket, 16)
    assert passes_of(schedule) == [[11, 12, 1, 2], [13], [3]]


def test_prefill_rests_for_one_pass_after_each_that_it_had() -> None:
    schedule = scheduler()
    for ticket in range(3):
        schedule.add(ticket, 64, prefill=True)
    passes = []
    for ticket in range(100, 106):
        schedule.add(ticket, 16)
        passes.append(schedule.take())
    assert passes == [[100, 0], [101], [102, 1], [103], [104, 2], [105]]


def test_work_that_arrives_during_a_pass_of_prefill_is_not_held_up_by_the_next_piece() -> None:
    schedule = scheduler()
    schedule.add(0, 64, prefill=True)
    assert schedule.take() == [0]
    schedule.add(1, 64, prefill=True)
    schedule.add(2, 16)
    assert passes_of(schedule) == [[2], [1]]


def test_prefill_keeps_running_once_it_is_alone_again() -> None:
    schedule = scheduler()
    for ticket in range(3):
        schedule.add(ticket, 512, prefill=True)
    assert passes_of(schedule) == [[0], [1], [2]]


def test_pieces_beyond_a_limit_run_alone_of_their_kind() -> None:
    schedule = scheduler(max_num_batched_tokens=10, max_prefill_tokens=20)
    for ticket, tokens in ((1, 30), (2, 1)):
        schedule.add(ticket, tokens, prefill=True)
    schedule.add(3, 11)
    assert schedule.take() == [3, 1]
    schedule.add(4, 1)
    assert passes_of(schedule) == [[4], [2]]


def test_withdrawn_work_leaves_its_room_to_others() -> None:
    schedule = scheduler(max_num_batched_tokens=2)
    for ticket in range(4):
        schedule.add(ticket, 1)
    schedule.withdraw(0)
    schedule.withdraw(0)
    schedule.withdraw(99)
    assert len(schedule) == 3
    assert passes_of(schedule) == [[1, 2], [3]]


def test_misuse_is_refused() -> None:
    schedule = scheduler()
    schedule.add(1, 1, prefill=True)
    with pytest.raises(ValueError, match="ticket: 1 waits already"):
        schedule.add(1, 1)
    with pytest.raises(ValueError, match="tokens: got 0, expected at least 1"):
        schedule.add(2, 0)
    with pytest.raises(ValueError, match="begun"):
        schedule.add(2, 1, prefill=True, begun=True)
    assert len(schedule) == 1


@dataclass
class Piece:
    """What the random traffic knows of a ticket: a row's step, or a piece of a prompt."""

    tokens: int
    steps_left: int
    prefill: bool
    begun: bool = False

    @property
    def kind(self) -> str:
        return "prefill" if self.prefill else "begun" if self.begun else "other"


class Traffic:
    """Random arrivals, blocks of many steps, and withdrawals, with every invariant checked."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.limits = PassLimits(
            max_num_batched_tokens=self.random.choice([1, 16, 40, 512]),
            max_rows_per_pass=self.random.choice([None, 1, 3, 16]),
            max_prefill_tokens=self.random.choice([1, 64, 130]),
        )
        self.schedule = PassScheduler(self.limits)
        self.waiting: dict[int, Piece] = {}
        self.next_ticket = 0
        self.had_prefill = False

    def arrive(self, piece: Piece) -> None:
        self.schedule.add(self.next_ticket, piece.tokens, piece.prefill, piece.begun)
        self.waiting[self.next_ticket] = piece
        self.next_ticket += 1

    def new_piece(self) -> Piece:
        if self.random.random() < 0.3:
            tokens = self.random.choice([64, 64, 3, 200])
            return Piece(tokens, self.random.randint(1, 20), prefill=True)
        tokens = self.random.choice([1, 16, 16, 50])
        return Piece(tokens, self.random.randint(1, 8), prefill=False)

    def withdraw_some(self) -> None:
        for ticket in list(self.waiting):
            if self.random.random() < 0.02:
                del self.waiting[ticket]
                self.schedule.withdraw(ticket)

    def run_pass(self) -> list[int]:
        """Takes a pass, checks it, and lets what is not done come back."""
        taken = self.schedule.take()
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(self.waiting), "a ticket that was withdrawn or ran before"
        assert bool(taken) == bool(self.waiting)
        self.check_order(taken)
        self.check_limits(taken)
        self.check_prefill(taken)
        for ticket in taken:
            piece = self.waiting.pop(ticket)
            if piece.steps_left > 1:
                begun = not piece.prefill
                self.arrive(Piece(piece.tokens, piece.steps_left - 1, piece.prefill, begun))
        assert len(self.schedule) == len(self.waiting)
        return taken

    def check_order(self, taken: list[int]) -> None:
        for kind in ("begun", "other", "prefill"):
            mine = [t for t in taken if self.waiting[t].kind == kind]
            queue = [t for t, piece in self.waiting.items() if piece.kind == kind]
            assert mine == queue[: len(mine)]
        if any(self.waiting[t].kind == "other" for t in taken):
            left = set(self.waiting) - set(taken)
            assert not any(self.waiting[t].kind == "begun" for t in left)

    def check_limits(self, taken: list[int]) -> None:
        work = [self.waiting[t].tokens for t in taken if not self.waiting[t].prefill]
        pieces = [self.waiting[t].tokens for t in taken if self.waiting[t].prefill]
        share = self.limits.max_prefill_tokens if work else self.limits.max_num_batched_tokens
        most = self.limits.max_rows_per_pass
        for kind, budget in ((work, self.limits.max_num_batched_tokens), (pieces, share)):
            assert len(kind) <= 1 or sum(kind) <= budget
            assert most is None or len(kind) <= most

    def check_prefill(self, taken: list[int]) -> None:
        has = any(self.waiting[t].prefill for t in taken)
        shared = any(not self.waiting[t].prefill for t in taken)
        assert not (has and self.had_prefill and shared), "two shares of prefill in a row"
        waits = any(piece.prefill for piece in self.waiting.values())
        assert has or not waits or self.had_prefill, "prefill sat out a pass without cause"
        self.had_prefill = has


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_keeps_order_and_limits(seed: int) -> None:
    traffic = Traffic(seed)
    for _ in range(120):
        for _ in range(traffic.random.choice([0, 0, 1, 2, 6])):
            traffic.arrive(traffic.new_piece())
        traffic.withdraw_some()
        traffic.run_pass()
    work_left = sum(piece.steps_left for piece in traffic.waiting.values())
    for _ in range(2 * work_left):
        traffic.run_pass()
    assert not traffic.waiting


@pytest.mark.parametrize("kind", ["other", "prefill"])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_waits_for_ever_beside_endless_traffic(seed: int, kind: str) -> None:
    """New blocks and prompts keep coming faster than they can run; a ticket among them is taken
    within the time that the blocks before it need: their steps, at worst one at a time, and two
    passes for every prefill piece."""
    traffic = Traffic(seed)
    for _ in range(30):
        for _ in range(3):
            traffic.arrive(traffic.new_piece())
        traffic.run_pass()
    ahead = [piece for piece in traffic.waiting.values() if piece.prefill == (kind == "prefill")]
    bound = 2 * len(ahead) + 2 if kind == "prefill" else sum(p.steps_left for p in ahead) + 1
    watched = traffic.next_ticket
    traffic.arrive(Piece(16, 1, prefill=kind == "prefill"))
    for _ in range(bound):
        if watched in traffic.run_pass():
            return
        for _ in range(3):
            traffic.arrive(traffic.new_piece())
    pytest.fail(f"not taken within {bound} passes")


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_delays_work_by_one_pass_of_prefill_at_most(seed: int) -> None:
    """Pieces that fit into a pass arrive while passes run, beside a prompt without an end: from
    arrival to the end of its own pass, each meets one pass that has prefill, or none."""
    draw = random.Random(seed)
    schedule = scheduler(max_rows_per_pass=4)
    ticket, met = 0, []
    waiting: dict[int, int] = {}
    running_prefill = False
    for _ in range(300):
        ticket += 2
        if draw.random() < 0.9:
            schedule.add(ticket, 64, prefill=True)
        for _ in range(draw.choice([0, 0, 1, 2]) if len(waiting) < 3 else 0):
            ticket += 2
            schedule.add(ticket + 1, 16)
            waiting[ticket + 1] = int(running_prefill)
        taken = schedule.take()
        running_prefill = any(t % 2 == 0 for t in taken)
        waiting = {t: count + int(running_prefill) for t, count in waiting.items()}
        met += [waiting.pop(t) for t in taken if t % 2]
    assert len(met) > 100
    assert max(met) == 1

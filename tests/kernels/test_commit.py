"""Commits on the device, reference and kernel, against the rules on the host."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_same_bits
from tests.support.hopper import Launch, compile_all
from twotower.kernels import commit as reference
from twotower.kernels import commit_triton as kernels
from twotower.kernels.commit import RULES, Drafts, threshold_below
from twotower.towers.decoding.unmasking import (
    BlockDraft,
    CommitName,
    CommitRule,
    ReplayRule,
    ThresholdRule,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
MASK = 3
QUOTAS = 6
# Few values, so that ties are common, and those of the usual thresholds.
CONFIDENCES = torch.tensor([0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 1.0])
# Products of fp32 numbers near one: a threshold among them tells roundings apart.
NEAR_ONE = 1.0 - torch.arange(1, 9) / 37

Commit = Callable[[Drafts, Tensor, Tensor, Tensor, Tensor, Tensor], None]
Select = Callable[[Drafts, Tensor, int], Tensor]
COMMITS = pytest.mark.parametrize("commit", [reference.commit, kernels.commit])
SELECTS = pytest.mark.parametrize("select", [reference.select_masked, kernels.select_masked])


def empty_drafts(slots: int, width: int) -> Drafts:
    """No slot is in use: all positions are committed and carry marks that nothing may change."""
    return Drafts(
        torch.full((slots, width), 77, device=DEVICE),
        torch.zeros((slots, width), dtype=torch.int32, device=DEVICE),
        torch.full((slots, width), 0.25, device=DEVICE),
        torch.full((slots, width), -9.0, device=DEVICE),
        torch.full((slots,), 5, dtype=torch.int32, device=DEVICE),
        torch.full((slots,), 8, dtype=torch.int32, device=DEVICE),
        torch.full((slots,), 0.5, device=DEVICE),
        torch.zeros((slots,), dtype=torch.int32, device=DEVICE),
        torch.full((slots, QUOTAS), -1, dtype=torch.int32, device=DEVICE),
        torch.zeros((slots,), dtype=torch.int32, device=DEVICE),
    )


def begin(drafts: Drafts, slot: int, draft: BlockDraft, rule: CommitRule) -> None:
    """Puts a block of the host into a slot."""
    own = slice(len(draft.token_ids))
    drafts.tokens[slot, own] = torch.tensor(draft.token_ids, device=DEVICE)
    drafts.commit_steps[slot, own] = torch.tensor(draft.commit_steps, device=DEVICE).int()
    drafts.confidences[slot, own] = torch.tensor(draft.confidences, device=DEVICE)
    drafts.log_probs[slot, own] = torch.tensor(draft.log_probs, device=DEVICE)
    drafts.step[slot] = 0
    drafts.remaining[slot] = len(draft.masked)
    drafts.quota[slot] = -1
    drafts.rule[slot] = RULES.index("released")
    if isinstance(rule, ThresholdRule):
        drafts.steps[slot] = rule.steps_per_block
        drafts.threshold[slot] = threshold_below(rule.threshold)
        drafts.rule[slot] = RULES.index(rule.name)
    if isinstance(rule, ReplayRule):
        schedule = [*rule.schedule, *[10_000] * QUOTAS][:QUOTAS]
        drafts.quota[slot] = torch.tensor(schedule, device=DEVICE).int()


def assert_is(drafts: Drafts, slot: int, draft: BlockDraft) -> None:
    length = len(draft.token_ids)
    assert drafts.tokens[slot, :length].tolist() == draft.token_ids
    assert drafts.commit_steps[slot, :length].tolist() == draft.commit_steps
    assert drafts.confidences[slot, :length].tolist() == draft.confidences
    assert drafts.log_probs[slot, :length].tolist() == draft.log_probs
    assert int(drafts.remaining[slot]) == len(draft.masked)
    assert int(drafts.step[slot]) == draft.step


def random_rule(choose: random.Random, length: int) -> CommitRule:
    if choose.random() < 0.3:
        return ReplayRule(tuple(choose.choices(range(length + 2), k=choose.randint(0, QUOTAS - 1))))
    threshold = choose.choice([0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 1.0])
    return ThresholdRule(threshold, choose.randint(1, 2 * length), choose.choice(RULES))


def predictions(
    seed: int, rows: int, length: int, among: Tensor = CONFIDENCES
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, confidences with many ties, log-probabilities; [rows, length] each."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> Tensor:
        return torch.randint(high, (rows, length), generator=generator)

    confidence = among[drawn(len(among))]
    return (drawn(1000).to(DEVICE), confidence.to(DEVICE), -drawn(64).float().to(DEVICE) / 16)


def run_to_the_end(
    commit: Commit,
    drafts: Drafts,
    slots: Sequence[int],
    on_host: Sequence[BlockDraft],
    seed: int,
    among: Tensor = CONFIDENCES,
) -> None:
    """Steps until all are done, compared after each; what is committed already predicts NaN."""
    length = len(on_host[0].token_ids)
    where = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    step = 0
    while not all(draft.done for draft in on_host):
        token, confidence, log_prob = predictions(1000 * seed + step, len(slots), length, among)
        masked = drafts.commit_steps[where.long(), :length] < 0
        given = (token, confidence.where(masked, NAN), log_prob.where(masked, NAN), masked)
        commit(drafts, where, *given)
        for row, draft in enumerate(on_host):
            if not draft.done:
                parts = (token[row], confidence[row], log_prob[row])
                draft.commit(*(part[draft.masked].tolist() for part in parts))
            assert_is(drafts, slots[row], draft)
        step += 1
        assert step <= 2 * length + QUOTAS


@pytest.mark.parametrize("length", [1, 2, 5, 8, 17])
@pytest.mark.parametrize(("commit", "rows"), [(reference.commit, 60), (kernels.commit, 12)])
def test_blocks_are_those_of_the_host(commit: Commit, rows: int, length: int) -> None:
    choose = random.Random(length)
    drafts = empty_drafts(rows + 3, length + 2)
    untouched = [tensor.clone() for tensor in vars(drafts).values()]
    slots = choose.sample(range(rows + 3), rows)
    on_host = []
    for slot in slots:
        rule = random_rule(choose, length)
        known = [choose.randrange(1000) for _ in range(choose.choice([0, 0, 1, length // 2]))]
        on_host.append(BlockDraft(length, MASK, rule, known))
        begin(drafts, slot, on_host[-1], rule)
    run_to_the_end(commit, drafts, slots, on_host, length)
    others = [slot for slot in range(rows + 3) if slot not in slots]
    for after, before in zip(vars(drafts).values(), untouched, strict=True):
        assert_same_bits(after[others], before[others])
        if after.shape[-1:] == (length + 2,):
            assert_same_bits(after[:, length:], before[:, length:])


@pytest.mark.parametrize(("commit", "seeds"), [(reference.commit, 8), (kernels.commit, 2)])
@pytest.mark.parametrize("name", ["product", "leading"])
def test_running_products_are_rounded_as_on_the_host(
    commit: Commit, seeds: int, name: CommitName
) -> None:
    """Every threshold is the product of some run itself, in fp32: of numbers that differ from it in
    their last bit some are above it."""
    rows, length = 24, 12
    for seed in range(seeds):
        _, confidence, _ = predictions(1000 * seed, rows, length, NEAR_ONE)
        drafts, on_host = empty_drafts(rows, length), []
        for slot in range(rows):
            product = confidence[slot, 0].cpu()
            for factor in confidence[slot, 1 : 2 + slot % (length - 2)].cpu():
                product = product * factor
            threshold = float(torch.nextafter(product, torch.tensor(0.0)))
            rule = ThresholdRule(float(product) if slot % 2 else threshold, 12, name)
            on_host.append(BlockDraft(length, MASK, rule))
            begin(drafts, slot, on_host[-1], rule)
        run_to_the_end(commit, drafts, range(rows), on_host, seed, NEAR_ONE)


@COMMITS
@pytest.mark.parametrize(
    ("name", "threshold", "steps", "committed"),
    [
        ("released", 0.85, 9, [2, 5]),
        ("released", 0.99, 9, [5]),
        ("leftmost", 0.85, 9, [2, 5]),
        ("leftmost", 0.99, 9, [1]),
        ("leftmost", 0.99, 2, [1, 2, 5]),
        ("product", 0.85, 9, [1]),
        ("product", 0.71, 9, [1, 2]),
        ("product", 0.5, 9, [1, 2, 4]),
        ("product", 0.99, 2, [1, 2, 5]),
        ("leading", 0.85, 2, [1]),
        ("leading", 0.85, 1, [1, 2, 4, 5, 6]),
    ],
)
def test_rules_by_hand(
    commit: Commit, name: CommitName, threshold: float, steps: int, committed: list[int]
) -> None:
    drafts, rule = empty_drafts(1, 7), ThresholdRule(threshold, steps, name)
    begin(drafts, 0, BlockDraft(7, MASK, rule), rule)
    # Two are committed already, and their predictions nothing.
    drafts.commit_steps[0, [0, 3]] = 0
    drafts.remaining[0] = 5
    confidence = torch.tensor([[NAN, 0.8, 0.9, NAN, 0.7, 0.98, 0.1]], device=DEVICE)
    token = torch.arange(7, device=DEVICE)[None]
    before = drafts.tokens.clone()
    commit(drafts, int32(0), token, confidence, confidence, ~confidence.isnan())
    changed = (drafts.tokens != before).nonzero()[:, 1].tolist()
    assert changed == committed
    assert int(drafts.remaining[0]) == 5 - len(committed)


def full_drafts(slots: int, length: int, steps: int = 4, name: CommitName = "released") -> Drafts:
    drafts = empty_drafts(slots, length)
    rule = ThresholdRule(0.85, steps, name)
    for slot in range(slots):
        begin(drafts, slot, BlockDraft(length, MASK, rule), rule)
    return drafts


def clone(drafts: Drafts) -> Drafts:
    return Drafts(*(tensor.clone() for tensor in vars(drafts).values()))


def assert_same(got: Drafts, want: Drafts) -> None:
    for field in fields(Drafts):
        assert_same_bits(getattr(got, field.name), getattr(want, field.name), field.name)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("length", "name"), [(64, "released"), (100, "leftmost"), (256, "released"), (256, "product")]
)
def test_the_kernel_commits_wide_blocks_like_the_reference(length: int, name: CommitName) -> None:
    got = full_drafts(2, length, 3, name)
    want = clone(got)
    for step in range(3):
        given = predictions(step, 2, length)
        finite = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
        kernels.commit(got, int32(1, 0), *given, finite)
        reference.commit(want, int32(1, 0), *given, finite)
        assert_same(got, want)
    assert want.remaining.tolist() == [0, 0]


def test_pairs_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PAIRS", 64)
    got = full_drafts(2, 13)
    want = clone(got)
    given = (*predictions(1, 2, 13), torch.ones(2, 13, dtype=torch.bool, device=DEVICE))
    kernels.commit(got, int32(0, 1), *given)
    reference.commit(want, int32(0, 1), *given)
    assert_same(got, want)


@COMMITS
def test_of_equals_the_leftmost(commit: Commit) -> None:
    drafts = full_drafts(1, 6, steps=3)
    confidence = torch.tensor([[0.5, 0.8, 0.2, 0.8, 0.8, 0.5]], device=DEVICE)
    token = torch.arange(6, device=DEVICE)[None]
    commit(drafts, int32(0), token, confidence, confidence.log(), confidence > 0)
    assert drafts.commit_steps.tolist() == [[-1, 0, -1, 0, -1, -1]]
    assert drafts.tokens.tolist() == [[MASK, 1, MASK, 3, MASK, MASK]]
    assert drafts.remaining.tolist() == [4]


@COMMITS
@pytest.mark.parametrize(("quota", "left"), [((2, 3), [10, 7, 6]), ((2, -1), [10, 9, 8])])
def test_a_step_without_a_quota_takes_the_rule(
    commit: Commit, quota: tuple[int, int], left: list[int]
) -> None:
    drafts = full_drafts(1, 12, steps=50)
    drafts = Drafts(**{**vars(drafts), "quota": int32(*quota)[None]})
    token = torch.zeros(1, 12, dtype=torch.int64, device=DEVICE)
    unsure = torch.full((1, 12), 0.5, device=DEVICE)
    for remaining in left:
        commit(drafts, int32(0), token, unsure, unsure.log(), unsure > 0)
        assert drafts.remaining.tolist() == [remaining]


@COMMITS
def test_padding_is_neither_read_nor_written(commit: Commit) -> None:
    drafts = full_drafts(3, 4)
    token, confidence, log_prob = predictions(0, 4, 4)
    alone = clone(drafts)
    finite = torch.tensor([[False], [True], [False], [False]], device=DEVICE).repeat(1, 4)
    confidence = confidence.where(finite, NAN)
    commit(drafts, int32(-1, 2, -1, -1), token, confidence, log_prob, finite)
    commit(alone, int32(2), *(part[1:2] for part in (token, confidence, log_prob, finite)))
    assert_same(drafts, alone)
    assert drafts.step.tolist() == [0, 0, 1]


@COMMITS
def test_a_prediction_that_is_not_finite_fails_its_row_for_good(commit: Commit) -> None:
    drafts = full_drafts(2, 5)
    given = predictions(0, 2, 5)
    good = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    bad = good.clone()
    bad[0, 3] = False
    before = clone(drafts)
    commit(drafts, int32(0, 1), *given, bad)
    assert drafts.remaining[0] == -1
    before.remaining[0] = -1
    commit(drafts, int32(0), *(part[:1] for part in (*given, good)))
    for after, was in zip(vars(drafts).values(), vars(before).values(), strict=True):
        assert_same_bits(after[0], was[0])
    assert int(drafts.step[1]) == 1
    assert int(drafts.remaining[1]) < 5


@COMMITS
def test_what_is_committed_may_be_predicted_not_finite(commit: Commit) -> None:
    drafts = full_drafts(1, 4, steps=1)
    drafts.commit_steps[0, 1] = 0
    given = predictions(0, 1, 4)
    finite = torch.tensor([[True, False, True, True]], device=DEVICE)
    commit(drafts, int32(0), *given, finite)
    assert drafts.remaining.tolist() == [0]
    assert drafts.tokens[0, 1] == MASK


@COMMITS
def test_a_block_that_is_done_is_left_alone(commit: Commit) -> None:
    drafts = full_drafts(1, 4, steps=1)
    finite = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    commit(drafts, int32(0), *predictions(0, 1, 4), finite)
    done = clone(drafts)
    commit(drafts, int32(0), *predictions(1, 1, 4), finite)
    assert_same(drafts, done)
    assert (drafts.remaining.tolist(), drafts.step.tolist()) == ([0], [1])


@COMMITS
def test_predictions_may_be_columns_of_wider_ones_and_there_may_be_no_quotas(
    commit: Commit,
) -> None:
    drafts = full_drafts(2, 6)
    drafts = Drafts(**{**vars(drafts), "quota": drafts.quota[:, :0].contiguous()})
    plain = clone(drafts)
    given = (*predictions(0, 2, 10), torch.ones(2, 10, dtype=torch.bool, device=DEVICE))
    commit(drafts, int32(1, 0), *(part[:, 2:8] for part in given))
    commit(plain, int32(1, 0), *(part[:, 2:8].contiguous() for part in given))
    assert_same(drafts, plain)
    assert drafts.step.tolist() == [1, 1]


def test_the_threshold_in_fp32_tells_the_same_confidences_apart() -> None:
    for threshold in (0.0, 0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0 - 1e-12, 1.0):
        near = torch.tensor(threshold)
        around = torch.stack([near, *(torch.nextafter(near, torch.tensor(x)) for x in (-1.0, 2.0))])
        got = around > torch.tensor(threshold_below(threshold))
        assert got.tolist() == [value > threshold for value in around.tolist()]


@SELECTS
@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("chance", [0.0, 0.4, 1.0])
def test_masked_tokens_are_listed_in_order(
    select: Select, length: int, chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that one chunk does not take all.
    monkeypatch.setattr(kernels, "_CHUNK", 16)
    generator = torch.Generator().manual_seed(length)
    drafts = empty_drafts(6, 8)
    masked = torch.rand(6, 8, generator=generator) < chance
    drafts.commit_steps[masked.to(DEVICE)] = -1
    slots = [4, -1, 0, 5, -1, 2, 3]
    want = [
        row * length + position
        for row, slot in enumerate(slots)
        for position in range(length)
        if slot >= 0 and masked[slot, position]
    ]
    got = select(drafts, int32(*slots), length)
    assert got.dtype == torch.int32
    assert got.tolist() == want + [-1] * (len(slots) * length - len(want))
    assert select(drafts, int32(-1, -1), length).tolist() == [-1] * (2 * length)


def _commit_launch(block: int, chunk: int, warps: int) -> Launch:
    pairs = ("tokens", "token")
    floats = ("confidences", "log_probs", "threshold", "confidence", "log_prob")
    ints = ("commit_steps", "step", "steps", "rule", "quota", "remaining", "slots")
    strides = ("token_stride", "confidence_stride", "log_prob_stride", "finite_stride")
    signature = {
        **dict.fromkeys(pairs, "*i64"),
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(ints, "*i32"),
        "finite": "*i1",
        **dict.fromkeys(("width", "length", *strides, "quotas"), "i32"),
    }
    constants = {"block": block, "chunk": chunk}
    return Launch("twotower.kernels.commit_triton:_commit_kernel", signature, constants, warps)


LAUNCHES = [
    _commit_launch(16, 16, 1),
    _commit_launch(64, 64, 4),
    _commit_launch(256, 16, 4),
    Launch(
        "twotower.kernels.commit_triton:_select_kernel",
        {
            **dict.fromkeys(("commit_steps", "slots", "lines"), "*i32"),
            **dict.fromkeys(("width", "length", "total"), "i32"),
        },
        {"chunk": 1024},
    ),
]


def test_the_real_shapes_compile_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [16, 64, 256])
def test_128_rows_to_their_end(length: int, name: CommitName) -> None:
    got = full_drafts(128, length, name=name)
    want = clone(got)
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    for step in range(4):
        listed = kernels.select_masked(got, slots, length)
        assert_same_bits(listed, reference.select_masked(want, slots, length))
        given = predictions(step, 128, length)
        finite = torch.ones(128, length, dtype=torch.bool, device=DEVICE)
        kernels.commit(got, slots, *given, finite)
        reference.commit(want, slots, *given, finite)
        assert_same(got, want)
    assert want.remaining.tolist() == [0] * 128

"""What a denoiser's step reads and writes of drafts, reference and kernel, against plain Python."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from twotower.kernels import draft_lines as reference
from twotower.kernels import draft_lines_triton as kernels
from twotower.kernels.commit import Drafts
from twotower.kernels.draft_lines import WORDS, DraftSampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, WIDTH, HIDDEN, MASK = 6, 12, 20, 3
EITHER = pytest.mark.parametrize("module", [reference, kernels])
LENGTHS = pytest.mark.parametrize("length", [1, 5, WIDTH])
# Rows in the order of a pass, the last of them padding.
ROWS = [4, 0, 5, -1]


def drafts_of(seed: int = 0) -> Drafts:
    """Drafts in which every number differs; one row has failed, one has more masked positions than
    a short block."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.arange(SLOTS * WIDTH).view(SLOTS, WIDTH)
    remaining = torch.tensor([3, 0, 7, 1, -1, WIDTH], dtype=torch.int32)
    real = torch.rand(3, SLOTS, WIDTH, generator=generator)
    numbers = torch.randint(0, 9, (4, SLOTS), generator=generator, dtype=torch.int32)
    made = Drafts(
        whole + 2**33,
        (whole % 5 - 1).int(),
        real[0],
        -real[1],
        numbers[0] + 1,
        numbers[1],
        real[2, :, 0],
        numbers[2],
        torch.zeros(SLOTS, 2, dtype=torch.int32),
        remaining,
    )
    return Drafts(*(own.contiguous().to(DEVICE) for own in vars(made).values()))


def sampling_of(seed: int = 1) -> DraftSampling:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 50, (SLOTS, len(WORDS)), generator=generator)
    words[:, WORDS.index("fixed_step")] = torch.tensor([0, 1] * (SLOTS // 2))
    words[:, WORDS.index("key")] -= 2**62
    words[:, WORDS.index("eos_from")] = words[:, WORDS.index("start")] + 2
    temperature = torch.rand(SLOTS, generator=generator)
    return DraftSampling(words.to(DEVICE), temperature.to(DEVICE), MASK)


def slots_of(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@EITHER
@LENGTHS
def test_blocks_are_read_by_slot(module: ModuleType, length: int) -> None:
    drafts = drafts_of()
    tokens, masked = module.read_blocks(drafts, slots_of(ROWS), length)
    own = drafts.tokens.tolist()
    want = [own[max(slot, 0)][i] for slot in ROWS for i in range(length)]
    assert tokens.tolist() == want
    left = [min(max(int(drafts.remaining[slot]), 0), length) if slot >= 0 else 0 for slot in ROWS]
    assert masked.tolist() == [count for count in left for _ in range(length)]
    assert tokens.dtype == masked.dtype == torch.int64


@EITHER
@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lines_have_their_tokens_state_and_their_drafts_draw(
    module: ModuleType, length: int, dtype: torch.dtype
) -> None:
    drafts, sampling = drafts_of(), sampling_of()
    total = len(ROWS) * length
    wide = normal(total, HIDDEN + 4).to(dtype).to(DEVICE)
    lines = torch.tensor([total - length - 1, 0, 2 % total, -1], dtype=torch.int32, device=DEVICE)
    picked, batch = module.read_lines(
        wide[:, :HIDDEN], lines, drafts, slots_of(ROWS), sampling, length
    )
    assert picked.dtype == dtype
    for line, token in enumerate(lines.tolist()[:3]):
        assert_same_bits(picked[line], wide[token, :HIDDEN])
        slot, place = max(ROWS[token // length], 0), token % length
        words = dict(zip(WORDS, sampling.words[slot].tolist(), strict=True))
        position = words["start"] + place
        step = 0 if words["fixed_step"] else int(drafts.step[slot])
        barred = words["eos"] if position < words["eos_from"] else -1
        got = [int(getattr(batch, name)[line]) for name in ("key", "position", "step", "domain")]
        assert got == [words["key"], position, step, words["domain"]]
        assert (int(batch.excluded[line]), int(batch.barred[line])) == (MASK, barred)
        assert float(batch.temperature[line]) == float(sampling.temperature[slot])


@EITHER
@LENGTHS
def test_predictions_go_back_to_their_tokens(module: ModuleType, length: int) -> None:
    rows = 3
    total = rows * length
    lines = torch.randperm(total, generator=torch.Generator().manual_seed(length))[: total // 2 + 1]
    padded = torch.cat([lines.sort().values, torch.tensor([-1, -1])]).int().to(DEVICE)
    count = len(padded)
    ids = torch.arange(count) + 2**40
    parts = normal(2, count)
    finite = torch.arange(count) % 2 == 0
    drawn = [own.to(DEVICE) for own in (ids, parts[0], parts[1], finite)]
    placed = module.spread_lines(drawn, padded, rows, length)
    for part, whole in zip(drawn, placed, strict=True):
        assert whole.shape == (rows, length)
        assert whole.dtype == part.dtype
        assert whole.flatten()[padded[:-2].long()].tolist() == part[:-2].tolist()


@EITHER
@LENGTHS
def test_drafts_are_packed_exactly(module: ModuleType, length: int) -> None:
    drafts = drafts_of()
    out = torch.full((len(ROWS), 1 + 4 * length), -5.0, dtype=torch.float64, device=DEVICE)
    module.pack_drafts(drafts, slots_of(ROWS), out)
    parts = (drafts.tokens, drafts.commit_steps, drafts.confidences, drafts.log_probs)
    for row, slot in enumerate(ROWS[:-1]):
        want = [float(drafts.remaining[slot])]
        want += [value for part in parts for value in part[slot, :length].double().tolist()]
        assert out[row].tolist() == want


PATH = "twotower.kernels.draft_lines_triton"
INTS = ["width", "length"]
LAUNCHES = [
    Launch(
        f"{PATH}:_read_kernel",
        {
            "tokens": "*i64",
            **dict.fromkeys(["remaining", "slots"], "*i32"),
            **dict.fromkeys(["block", "masked"], "*i64"),
            **dict.fromkeys(INTS, "i32"),
        },
        {"lanes": 16},
        num_warps=1,
    ),
    Launch(
        f"{PATH}:_lines_kernel",
        {
            **dict.fromkeys(["hidden", "picked"], "*bf16"),
            **dict.fromkeys(["lines", "slots", "step"], "*i32"),
            **dict.fromkeys(["words", "numbers"], "*i64"),
            **dict.fromkeys(["temperature", "temperatures"], "*fp32"),
            **dict.fromkeys(["count", "length", "total", "excluded"], "i32"),
            **dict.fromkeys(["width", "hidden_stride"], "i32:16"),
        },
        {"block": 4096},
    ),
    Launch(
        f"{PATH}:_spread_kernel",
        {
            **dict.fromkeys(["ids", "ids_out"], "*i64"),
            **dict.fromkeys(
                ["confidences", "log_probs", "confidences_out", "log_probs_out"], "*fp32"
            ),
            **dict.fromkeys(["finite", "finite_out"], "*i1"),
            "lines": "*i32",
            "count": "i32",
        },
        {"block": 256},
    ),
    Launch(
        f"{PATH}:_pack_kernel",
        {
            "tokens": "*i64",
            **dict.fromkeys(["commit_steps", "remaining", "slots"], "*i32"),
            **dict.fromkeys(["confidences", "log_probs"], "*fp32"),
            "out": "*fp64",
            **dict.fromkeys(INTS, "i32"),
        },
        {"lanes": 16},
        num_warps=1,
    ),
]


def test_they_compile_for_hopper_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch

"""Training: corpus, tokenizer, differentiable towers against recorded cases, resume, learning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.autograd import gradcheck

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.training import SHIPPED_CONFIG, TrainingOptions, train
from twotower.towers.training.batches import BatchShape, MaskRule, draw_masks, draw_sequences
from twotower.towers.training.corpus import TokenArray, encode_files, is_held_out, read_corpus
from twotower.towers.training.export import export_model, load_for_training
from twotower.towers.training.loop import Budget, Phase, Progress, rate_factor
from twotower.towers.training.losses import (
    Objective,
    context_loss,
    denoiser_loss,
    held_out_context,
)
from twotower.towers.training.model import Loads, context_hidden, denoiser_hidden
from twotower.towers.training.optimizer import OptimizerSettings, newton_schulz
from twotower.towers.training.own_text import draw_tokens, write_own_blocks, write_own_text
from twotower.towers.training.parameters import (
    CONTEXT_HEAD,
    DENOISER_HEAD,
    Parameters,
    initial_context,
    initial_denoiser,
    split_experts,
    stack_experts,
)
from twotower.towers.training.scan import causal_conv, chunk_scan, take_rows
from twotower.towers.training.tokenizer import BOS, EOS, SPECIAL_TOKENS, train_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
TINY = replace(
    SHIPPED_CONFIG,
    vocab_size=320,
    hidden_size=32,
    layer_pattern="ME*M",
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24,
)
TINY_SHAPE = BatchShape(rows=4, length=32, block_size=8)
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n\tx = 10\r\n  # mixed\n" * 6,
    "naïve = '日本語 🎉' + \"\\x00\" * 17   \nif x<|eos|>y: pass\n\n\n    deep\t\tend",
    "",
    "".join(chr(code) for code in range(1, 256)),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS[:1] * 20, TINY.vocab_size)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty files of code-like text, and a file in each folder that is left out."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        body = f"def function_{number}(value):\n    return value + {number}\n\n\n" * 12
        (root / f"module_{number}.py").write_text(body, encoding="utf-8")
    for folder in ("encodings", "site-packages"):
        (root / folder).mkdir()
        (root / folder / "table.py").write_text("x = 1\n" * 100, encoding="utf-8")
    (root / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    (root / "short.py").write_text("x = 1\n", encoding="utf-8")
    return root


def random_parameters(seed: int = 0) -> Parameters:
    """Both tiny towers with every tensor away from its special start."""
    generator = torch.Generator().manual_seed(seed)
    context = initial_context(TINY, generator)
    params = {**context, **initial_denoiser(TINY, context, generator)}
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in params.items()
    }


def test_corpus_leaves_out_tables_other_encodings_and_short_files(corpus: Path) -> None:
    paths = [file.path for file in read_corpus(corpus)]
    assert paths == sorted(f"module_{number}.py" for number in range(40))


def test_split_is_fixed_and_near_a_tenth() -> None:
    names = [f"package/module_{number}.py" for number in range(2000)]
    held_out = [name for name in names if is_held_out(name)]
    assert held_out == [name for name in names if is_held_out(name)]
    assert 140 < len(held_out) < 260
    # Recorded: a change of the split would let a trained model see its held-out files.
    recorded_split = {
        "__hello__.py": True,
        "ast.py": True,
        "abc.py": False,
        "json/decoder.py": False,
    }
    assert {name: is_held_out(name) for name in recorded_split} == recorded_split


def test_streams_hold_whole_files_between_bos_and_eos(tokenizer: Tokenizer, corpus: Path) -> None:
    files = read_corpus(corpus)[:3]
    stream = encode_files(tokenizer, files).tolist()
    assert stream.count(BOS) == stream.count(EOS) == 3
    first = stream[1 : stream.index(EOS)]
    assert stream[0] == BOS
    assert tokenizer.decode(first) == files[0].text


@pytest.mark.parametrize("text", TEXTS, ids=["code", "unicode", "empty", "latin"])
def test_every_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(len(SPECIAL_TOKENS)))


def test_special_tokens_and_indentation_have_their_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert tokenizer.encode("\n    ").ids == [tokenizer.encode("\n    return").ids[0]]


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_context_tower_agrees_with_recorded_logits(name: str) -> None:
    config, params, golden = recorded(name)
    cases = [key for key in golden if key.startswith("prefill") and key.endswith("/logits_all")]
    assert len(cases) >= 6
    for key in cases:
        tokens = golden[key.replace("logits_all", "tokens")]
        length = tokens.shape[1]
        hidden, _ = context_hidden(params, config, F.pad(tokens, (0, -length % 16)), 16)
        difference = (F.linear(hidden, params[CONTEXT_HEAD])[:, :length] - golden[key]).abs().max()
        assert difference < 2e-3, f"{key}: {difference:.2e}"


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_denoiser_agrees_with_recorded_logits(name: str) -> None:
    config, params, golden = recorded(name)
    cases = [key for key in golden if key.startswith("denoise") and f"{key[:-7]}/t" in golden]
    cases = [key for key in cases if key.endswith("/logits")]
    # Training knows no prompts shorter than the convolution's history.
    cases = [key for key in cases if golden[f"{key[:-7]}/prompt"].shape[1] >= config.conv_kernel]
    assert len(cases) >= 3
    for key in cases:
        case = key.removesuffix("/logits")
        prompt, blocks = golden[f"{case}/prompt"], golden[f"{case}/xt"][:, None]
        rows, length = prompt.shape
        # The prompt as a single block: the state after it is the border of a second one.
        _, memory = context_hidden(params, config, F.pad(prompt, (0, length)), length)
        timesteps = golden[f"{case}/t"].expand(rows)[:, None]
        hidden = denoiser_hidden(
            params, config, blocks, timesteps, memory.from_block(1), torch.tensor([length])
        )
        difference = (F.linear(hidden, params[DENOISER_HEAD])[:, 0] - golden[key]).abs().max()
        assert difference < 2e-3, f"{key}: {difference:.2e}"


def recorded(name: str) -> tuple[TwoTowerConfig, Parameters, dict[str, Tensor]]:
    folder = GOLDEN / name
    released: Parameters = {}
    for path in folder.glob("model*.safetensors"):
        released.update({key: value.float() for key, value in load_file(path).items()})
    config = TwoTowerConfig.from_file(folder / "config.json")
    return config, stack_experts(released), load_file(folder / "golden.safetensors")


def test_blocks_side_by_side_equal_one_after_the_other() -> None:
    params = random_parameters()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, TINY.vocab_size, (3, 40), generator=generator)
    blocks = tokens.view(3, 5, 8)[:, 1:]
    masks = draw_masks(3, 4, 8, MaskRule(0.5), generator)
    noisy = blocks.masked_fill(masks.masked, TINY.mask_token_id)
    _, memory = context_hidden(params, TINY, tokens, 8)
    starts = torch.arange(8, 40, 8)
    together = denoiser_hidden(params, TINY, noisy, masks.timesteps, memory.from_block(1), starts)
    for index, start in enumerate(starts.tolist()):
        _, alone = context_hidden(params, TINY, F.pad(tokens[:, :start], (0, 8)), 8)
        for layer in alone.keys:
            alone.keys[layer] = alone.keys[layer][:, :start]
            alone.values[layer] = alone.values[layer][:, :start]
        one = denoiser_hidden(
            params,
            TINY,
            noisy[:, index : index + 1],
            masks.timesteps[:, index : index + 1],
            alone.from_block(start // 8),
            torch.tensor([start]),
        )
        torch.testing.assert_close(together[:, index : index + 1], one, atol=1e-5, rtol=1e-5)


def test_scan_equals_plain_recurrence() -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, chunks, length, heads, groups, width, size = 2, 3, 4, 4, 2, 5, 3
    x, b, c = (
        draw(rows, chunks, length, heads, size),
        draw(rows, chunks, length, groups, width),
        draw(rows, chunks, length, groups, width),
    )
    dt, rate, skip = F.softplus(draw(rows, chunks, length, heads)), -draw(heads).exp(), draw(heads)
    y, borders = chunk_scan(x, b, c, dt, rate, skip, None)
    for head in range(heads):
        group = head // (heads // groups)
        state = torch.zeros(rows, width, size, dtype=torch.float64)
        for step in range(chunks * length):
            at = (slice(None), *divmod(step, length))
            if step % length == 0:
                torch.testing.assert_close(borders[:, step // length, head], state)
            now = dt[at][:, head, None, None]
            added = b[at][:, group, :, None] * x[at][:, head, None, :]
            state = torch.exp(now * rate[head]) * state + now * added
            expected = (c[at][:, group, :, None] * state).sum(1) + skip[head] * x[at][:, head]
            torch.testing.assert_close(y[at][:, head], expected)
        torch.testing.assert_close(borders[:, -1, head], state)


def test_own_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    padded = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert gradcheck(causal_conv, (padded, weight))
    order = torch.tensor([1, 0, 2, 0, 2, 1]).argsort(stable=True)
    inverse = order.argsort()
    rows = torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert gradcheck(lambda taken: take_rows(taken, order // 2, inverse), (rows,))


def test_denoiser_starts_as_the_plain_tower_at_any_timestep() -> None:
    generator = torch.Generator().manual_seed(4)
    context = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in initial_context(TINY, generator).items()
    }
    params = {**context, **initial_denoiser(TINY, context, generator)}
    tokens = torch.randint(4, TINY.vocab_size, (2, 16), generator=generator)
    hidden, memory = context_hidden(params, TINY, tokens, 8)
    # A block of one token is causal either way, so both towers must agree on it.
    _, before = context_hidden(params, TINY, F.pad(tokens[:, :8], (0, 8)), 8)
    for timestep in (0.1, 1.0):
        block = denoiser_hidden(
            params,
            TINY,
            tokens[:, None, 8:9],
            torch.full((2, 1), timestep),
            before.from_block(1),
            torch.tensor([8]),
        )
        torch.testing.assert_close(block[:, 0, 0], hidden[:, 8], atol=1e-5, rtol=1e-5)
    assert set(memory.keys) == set(TINY.layers_of("*"))


def test_masks_match_their_timesteps_and_suffix_share() -> None:
    generator = torch.Generator().manual_seed(5)
    masks = draw_masks(64, 15, 16, MaskRule(1.0), generator)
    counts = masks.masked.sum(-1)
    assert torch.equal(counts / 16, masks.timesteps)
    assert set(counts.flatten().tolist()) == set(range(1, 17))
    # A suffix has no unmasked position after a masked one.
    assert not (masks.masked[..., :-1] & ~masks.masked[..., 1:]).any()
    scattered = draw_masks(64, 15, 16, MaskRule(0.0), generator).masked
    assert (scattered[..., :-1] & ~scattered[..., 1:]).any()


def test_a_draft_masks_all_or_all_but_the_first_and_weighs_less_to_its_end() -> None:
    generator = torch.Generator().manual_seed(5)
    masks = draw_masks(64, 15, 16, MaskRule(0.0, draft_share=1.0, position_decay=0.5), generator)
    counts = masks.masked.sum(-1)
    assert set(counts.flatten().tolist()) == {15, 16}
    assert 0.2 < (counts == 16).float().mean() < 0.3
    assert masks.masked[..., 1:].all()
    assert torch.equal(masks.timesteps, counts / 16)
    # The first masked position has weight 1, whichever it is, and each later one half as much.
    expected = 0.5 ** (torch.arange(16) - (16 - counts[..., None]))
    assert torch.equal(masks.weights[masks.masked], expected.expand_as(masks.weights)[masks.masked])
    scattered = draw_masks(64, 15, 16, MaskRule(0.0, position_decay=0.5), generator)
    assert torch.equal(scattered.weights, torch.ones(64, 15, 16))


def test_loss_is_the_weighted_mean_over_masked_positions_and_own_blocks() -> None:
    params, objective = random_parameters(), Objective(TINY, TINY_SHAPE)
    generator = torch.Generator().manual_seed(10)
    tokens = torch.randint(4, TINY.vocab_size, (2, 32), generator=generator)
    own = torch.randint(4, TINY.vocab_size, (1, 3, 8), generator=generator)
    masks = draw_masks(2, 3, 8, MaskRule(1.0, 0.5, position_decay=0.7), generator)
    loss = denoiser_loss(objective, params, params, tokens, masks, own_blocks=own)
    blocks = torch.cat([tokens[:1].view(1, 4, 8)[:, 1:], own])
    _, memory = context_hidden(params, TINY, tokens, 8)
    noisy = blocks.masked_fill(masks.masked, TINY.mask_token_id)
    hidden = denoiser_hidden(
        params, TINY, noisy, masks.timesteps, memory.from_block(1), torch.tensor([8, 16, 24])
    )
    log_probs = F.linear(hidden, params[DENOISER_HEAD]).log_softmax(-1)
    chosen = log_probs.gather(-1, blocks[..., None])[..., 0]
    weights = masks.weights * masks.masked
    torch.testing.assert_close(loss, -(weights * chosen).sum() / weights.sum())


def test_own_blocks_continue_the_tokens_before_them_greedily() -> None:
    params = random_parameters(6)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(4, TINY.vocab_size, (3, 24), generator=generator)
    blocks = write_own_blocks(params, TINY, tokens, 8, torch.zeros(3), generator)
    assert blocks.shape == (3, 2, 8)
    for block in range(2):
        prompts = tokens[:, : 8 * (block + 1)]
        length = prompts.shape[1] + 8
        alone = write_own_text(params, TINY, prompts, length, 8, torch.zeros(3), generator)
        assert torch.equal(blocks[:, block], alone[:, -8:])


def test_own_text_is_the_greedy_continuation() -> None:
    params = random_parameters(6)
    generator = torch.Generator().manual_seed(6)
    prompts = torch.randint(4, TINY.vocab_size, (3, 8), generator=generator)
    written = write_own_text(params, TINY, prompts, 24, 8, torch.zeros(3), generator)
    assert torch.equal(written[:, :8], prompts)
    hidden, _ = context_hidden(params, TINY, written, 8)
    best = F.linear(hidden, params[CONTEXT_HEAD]).argmax(-1)
    assert torch.equal(written[:, 8:], best[:, 7:-1])


def test_own_text_follows_the_distribution_at_temperature_one() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = draw_tokens(logits.expand(20_000, 4), torch.ones(20_000), generator)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.015, rtol=0)


def test_orthogonal_update_has_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(7)
    for shape in ((2, 24, 64), (2, 64, 24)):
        values = torch.linalg.svdvals(
            newton_schulz(torch.randn(shape, generator=generator), 5).float()
        )
        assert 0.6 < values.min() <= values.max() < 1.3


def test_rate_rises_stays_and_falls() -> None:
    assert rate_factor(0, 0.0) == pytest.approx(1 / 60)
    assert rate_factor(100, 0.45) == 1.0
    assert rate_factor(100, 1.0) == pytest.approx(0.02)
    assert rate_factor(100, 0.725) == pytest.approx(0.51)


def test_phase_learns_and_continues_exactly(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = encode_files(tokenizer, read_corpus(corpus))
    objective = Objective(TINY, TINY_SHAPE)
    whole = make_phase(tmp_path / "whole.pt")
    before = held_out_context(objective, whole.cast(torch.float32), stream, 2)
    run_phase(whole, objective, stream)
    after = held_out_context(objective, whole.cast(torch.float32), stream, 2)
    assert after < before - 0.2, f"{before:.3f} to {after:.3f}"
    monkeypatch.setattr("twotower.towers.training.loop.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_phase(make_phase(tmp_path / "cut.pt"), objective, stream, stop_after=7)
    resumed = make_phase(tmp_path / "cut.pt")
    assert resumed.restore()
    assert resumed.record.steps == 7
    run_phase(resumed, objective, stream)
    for name, value in whole.params.items():
        assert torch.equal(value, resumed.params[name]), name


def test_each_step_is_told_with_its_share_and_loss(tmp_path: Path) -> None:
    stream = np.arange(500, dtype=np.uint16) % 40
    told: list[tuple[float, float, str]] = []
    phase = make_phase(tmp_path / "phase.pt")
    run_phase(
        phase,
        Objective(TINY, TINY_SHAPE),
        stream,
        shown=lambda *values: told.append(values),
    )
    assert [(share, whole) for share, whole, _ in told] == [(n / 20, 1.0) for n in range(1, 21)]
    # The mean of the losses that were told is what the record has of all steps.
    losses = [float(note.rpartition(" ")[2]) for _, _, note in told]
    assert sum(losses) / 20 == pytest.approx(phase.record.losses[-1][1], abs=1e-3)
    assert told[6][2].startswith("context, step 7, loss ")


def make_phase(path: Path) -> Phase:
    generator = torch.Generator().manual_seed(8)
    params = initial_context(TINY, generator)
    return Phase("context", params, OptimizerSettings(), generator, path)


def run_phase(
    phase: Phase,
    objective: Objective,
    stream: TokenArray,
    stop_after: int | None = None,
    shown: Progress | None = None,
) -> None:
    """20 steps, or an interrupt in the step after `stop_after`."""

    def loss(params: Parameters, _progress: float, loads: Loads) -> Tensor:
        if phase.record.steps == stop_after:
            raise KeyboardInterrupt
        tokens = draw_sequences(stream, 4, TINY_SHAPE.length + 1, phase.generator)
        return context_loss(objective, params, tokens, loads)

    phase.run(
        Budget(steps=20),
        torch.float32,
        loss,
        TINY_SHAPE.rows * TINY_SHAPE.length,
        lambda _params: 0.0,
        lambda _line: None,
        shown,
    )


def test_whole_run_exports_a_readable_model(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    touched: list[int] = []
    monkeypatch.setattr("twotower.towers.training.pipeline.keep_pages", touched.append)
    monkeypatch.setattr("twotower.towers.training.pipeline.free_bytes", lambda _: 1000)
    options = TrainingOptions(
        out_dir=tmp_path / "model",
        work_dir=tmp_path / "work",
        context_steps=4,
        own_text_minutes=0.0,
        denoiser_steps=4,
        threads=torch.get_num_threads(),
        dtype="float32",
        corpus=corpus,
        config=TINY,
        shape=TINY_SHAPE,
        own_text_prompt=8,
        own_text_rows=4,
        held_out_batches=1,
        touch_bytes=3_500_000_000,
    )
    told: list[tuple[float, float, str]] = []
    folder = train(options, lines.append, lambda *values: told.append(values))
    assert [note.partition(",")[0] for _, _, note in told] == [
        *["context"] * 4,
        "writing own text",
        *["denoiser"] * 4,
    ]
    assert [told[3][0], told[4][0], told[8][0]] == [1.0, told[4][1], 1.0]
    # All of them would be more than there is.
    assert touched == [500]
    config, params, tokenizer = load_for_training(folder)
    assert config == TINY
    assert set(params) == set(random_parameters())
    names = set(load_file(folder / "model.safetensors"))
    assert "denoiser_tower.layers.1.mixer.experts.7.down_proj.weight" in names
    assert names == set(split_experts(params))
    assert tokenizer.decode(tokenizer.encode(TEXTS[1]).ids) == TEXTS[1]
    assert any(line.startswith("denoiser step 4") for line in lines)


def tiny_run(corpus: Path, folder: Path, **changes: Any) -> Path:
    """Trains a tiny model in a few steps; its export lies in `folder`."""
    settings: dict[str, Any] = {
        "out_dir": folder / "model",
        "work_dir": folder / "work",
        "own_text_minutes": 0.0,
        "denoiser_steps": 3,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "corpus": corpus,
        "shape": TINY_SHAPE,
        "own_text_prompt": 8,
        "own_text_rows": 4,
        "held_out_batches": 1,
        "touch_bytes": 0,
    }
    return train(TrainingOptions(**{**settings, **changes}), lambda _: None)


def test_a_model_is_trained_on_with_its_context_tower_as_it_was(
    corpus: Path, tmp_path: Path
) -> None:
    first = tiny_run(corpus, tmp_path / "first", context_steps=2, config=TINY)
    second = tiny_run(
        corpus,
        tmp_path / "second",
        context_minutes=0.0,
        start_from=first,
        rate=0.5,
        own_text_from=0.0,
        own_text_share=0.25,
        own_block_share=0.25,
        draft_share=0.5,
        position_decay=0.8,
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert DENOISER_HEAD in changed
    assert not [name for name in changed if name.startswith("context_")]
    for name in ("config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    records = [json.loads((folder / "training.json").read_text()) for folder in (first, second)]
    assert records[1]["start"] == records[0]
    assert set(records[1]["phases"]) == {"denoiser"}
    assert records[1]["own_text"]["rows"] == 4
    assert records[1]["own_text"]["rows_with_own_blocks"] == 4


def test_own_blocks_alone_can_fill_a_batch(corpus: Path, tmp_path: Path) -> None:
    folder = tiny_run(
        corpus,
        tmp_path,
        context_steps=1,
        config=TINY,
        own_text_from=0.0,
        own_text_share=0.0,
        own_block_share=1.0,
    )
    own = json.loads((folder / "training.json").read_text())["own_text"]
    assert (own["rows"], own["rows_with_own_blocks"]) == (0, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix_share", 1.5),
        ("draft_share", -0.1),
        ("position_decay", 1.5),
        ("own_text_from", float("nan")),
        ("rate", 11.0),
    ],
)
def test_shares_and_rates_have_limits(field: str, value: float, tmp_path: Path) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}: got"):
        TrainingOptions(out_dir=tmp_path, work_dir=tmp_path, **changed)


def test_a_phase_without_time_trains_nothing() -> None:
    assert Budget().progress(0, 0.0) == 1.0


def test_too_large_a_model_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.towers.training.export.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="expected at most 1000"):
        export_model(tmp_path, TINY, random_parameters(), tokenizer)

"""Measures every figure of the shipped model's card and writes the card.

    python -m benchmarks.model_card twotower/models/pystdlib

Writes README.md into the model's folder and prints the figures as one JSON object. Takes about
three minutes on one core. The held-out text is that of the running interpreter's standard library.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.card_text import card
from benchmarks.ngram import trigram_loss
from benchmarks.prompts import Prompt, completes, held_out_prompts
from twotower import GenerationResult, TwoTower
from twotower.towers.request.modes import Mode
from twotower.towers.training.batches import BatchShape, draw_sequences
from twotower.towers.training.corpus import (
    SourceFile,
    TokenArray,
    encode_files,
    read_corpus,
    standard_library,
)
from twotower.towers.training.export import load_for_training
from twotower.towers.training.losses import (
    HELD_OUT_SEED,
    Objective,
    held_out_context,
    held_out_denoiser,
)

PROMPTS = 50
NEW_TOKENS = 64
THRESHOLDS = (0.5, 0.8, 0.9)
SHIPPED_THRESHOLD = 0.8
EVALUATION_BATCHES = 8
MASK_COUNTS = (1, 4, 8, 16)
SAMPLES = 3


def main() -> None:
    """Parses the arguments, measures, writes the card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model, with its training.json")
    parser.add_argument("--corpus", type=Path, default=None, help="default: standard library")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    files = read_corpus(args.corpus or standard_library())
    prompts = held_out_prompts(files, PROMPTS)
    record = json.loads((args.model / "training.json").read_text(encoding="utf-8"))
    losses = held_out_losses(args.model, files)
    model = TwoTower.from_pretrained(args.model)
    ar = decode(model, prompts, "ar")
    diffusions = {gamma: decode(model, prompts, "mask_diffusion", gamma) for gamma in THRESHOLDS}
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    figures = {
        "config": config,
        "losses": losses,
        "decodings": [
            decoding_figures(model, prompts, "ar", None, ar),
            *(
                decoding_figures(model, prompts, "mask_diffusion", gamma, results)
                for gamma, results in diffusions.items()
            ),
        ],
        "prompts": len(prompts),
        "valid_true_text": true_text_valid(model, prompts),
        "new_tokens": NEW_TOKENS,
        "bytes": sum(path.stat().st_size for path in model_files(args.model)),
    }
    text = card(record, figures, samples(prompts, ar, diffusions[SHIPPED_THRESHOLD]))
    (args.model / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(figures, indent=1))


def model_files(folder: Path) -> list[Path]:
    """The model's files: config, weights, tokenizer."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return [folder / name for name in names]


def held_out_losses(folder: Path, files: Sequence[SourceFile]) -> dict[str, Any]:
    """Nats per token on the same held-out sequences for both towers and a 3-gram, in fp32."""
    config, params, tokenizer = load_for_training(folder)
    held_out_files = [file for file in files if file.held_out]
    held_out = encode_files(tokenizer, held_out_files)
    train = encode_files(tokenizer, [file for file in files if not file.held_out])
    size = sum(len(file.text.encode("utf-8")) for file in held_out_files)
    objective, shape = Objective(config, BatchShape()), BatchShape()
    context = held_out_context(objective, params, held_out, EVALUATION_BATCHES)
    masked = {
        str(count): held_out_denoiser(
            objective, params, params, held_out, EVALUATION_BATCHES // 2, count
        )
        for count in MASK_COUNTS
    }
    return {
        "parameters": sum(value.numel() for value in params.values()),
        "context": context,
        "context_bits_per_byte": context * len(held_out) / size / 0.6931471805599453,
        "trigram": held_out_trigram(train, held_out, config.vocab_size, shape),
        "denoiser": held_out_denoiser(objective, params, params, held_out, EVALUATION_BATCHES),
        "denoiser_by_masks": masked,
        "tokens": EVALUATION_BATCHES * shape.rows * shape.length,
    }


def held_out_trigram(
    train: TokenArray, held_out: TokenArray, vocab_size: int, shape: BatchShape
) -> float:
    """Loss of a 3-gram fitted on all training tokens, on the sequences that test the towers."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    rows = [
        draw_sequences(held_out, shape.rows, shape.length + 1, generator)
        for _ in range(EVALUATION_BATCHES)
    ]
    return trigram_loss(train, vocab_size, torch.cat(rows).numpy())


def decode(
    model: TwoTower, prompts: Sequence[Prompt], mode: Mode, threshold: float = SHIPPED_THRESHOLD
) -> list[GenerationResult]:
    """Greedy completions of all prompts in one batch."""
    return model.generate(
        [prompt.text for prompt in prompts],
        mode=mode,
        max_tokens=NEW_TOKENS,
        confidence_threshold=threshold,
        eos_token_id=model.config.eos_token_id,
    )


def decoding_figures(
    model: TwoTower,
    prompts: Sequence[Prompt],
    mode: Mode,
    threshold: float | None,
    results: Sequence[GenerationResult],
) -> dict[str, Any]:
    """Figures of a way of decoding. `repeated` is the share of 4-grams that occurred before in the
    same completion, `loss` the context tower's mean loss in nats of the completions, `valid` the
    number of completions that are valid Python."""
    tokens = sum(len(result.token_ids) for result in results)
    nfe = sum(result.nfe for result in results) if mode == "mask_diffusion" else 0
    pairs = zip(prompts, results, strict=True)
    return {
        "mode": mode,
        "threshold": threshold,
        "tokens": tokens,
        "nfe": nfe,
        "repeated": repeated_share([result.token_ids for result in results]),
        "loss": mean_loss(model, prompts, results),
        "valid": sum(completes(prompt.text, result.text) for prompt, result in pairs),
        "tokens_per_nfe": tokens / nfe if nfe else None,
    }


def true_text_valid(model: TwoTower, prompts: Sequence[Prompt]) -> int:
    """The number of prompts that are valid Python with the text of their file, cut to as many
    tokens as the completions."""
    assert model.tokenizer is not None
    passed = 0
    for prompt in prompts:
        ids = model.tokenizer.encode(prompt.rest)[:NEW_TOKENS]
        passed += completes(prompt.text, model.tokenizer.decode(ids))
    return passed


def repeated_share(rows: Sequence[Sequence[int]]) -> float:
    """Share of the 4-grams that occurred earlier in the same row."""
    total = repeated = 0
    for row in rows:
        grams = list(zip(row, row[1:], row[2:], row[3:], strict=False))
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / max(1, total)


def mean_loss(
    model: TwoTower, prompts: Sequence[Prompt], results: Sequence[GenerationResult]
) -> float:
    """The context tower's mean loss in nats of the generated tokens."""
    losses: list[float] = []
    for prompt, result in zip(prompts, results, strict=True):
        ids = model.encode(prompt.text)
        losses += [-value for value in model.score([*ids, *result.token_ids])[len(ids) - 1 :]]
    return sum(losses) / max(1, len(losses))


def samples(
    prompts: Sequence[Prompt], ar: Sequence[GenerationResult], diffusion: Sequence[GenerationResult]
) -> list[tuple[str, str, str, str]]:
    """File, prompt, ar text and mask_diffusion text of the first prompts."""
    rows = zip(prompts, ar, diffusion, strict=True)
    return [(prompt.path, prompt.text, a.text, b.text) for prompt, a, b in rows][:SAMPLES]


if __name__ == "__main__":
    main()

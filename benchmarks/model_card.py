"""Every figure of the shipped model's card, measured again, and the card itself.

    python -m benchmarks.model_card twotower/models/pystdlib

Writes README.md into the model's folder and prints the figures as one JSON object. Takes about
three minutes on one core. The held-out text is that of the running interpreter's standard library.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.card_text import card
from benchmarks.ngram import TrigramModel
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


@dataclass(frozen=True)
class Decoding:
    """What one way of decoding gave on all prompts, greedy.

    `repeated` is the share of 4-grams that occurred before in the same completion; `loss` the
    context tower's mean loss in nats of the completions.
    """

    mode: Mode
    threshold: float | None
    tokens: int
    nfe: int
    repeated: float
    loss: float
    valid: int
    texts: list[str]

    @property
    def tokens_per_nfe(self) -> float | None:
        return self.tokens / self.nfe if self.nfe else None


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
    decodings = [decode(model, prompts, "ar", None)]
    decodings += [decode(model, prompts, "mask_diffusion", gamma) for gamma in THRESHOLDS]
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    figures = {
        "config": config,
        "losses": losses,
        "decodings": [summary(decoding) for decoding in decodings],
        "prompts": len(prompts),
        "valid_true_text": true_text_valid(model, prompts),
        "new_tokens": NEW_TOKENS,
        "bytes": sum(path.stat().st_size for path in model_files(args.model)),
    }
    text = card(record, figures, samples(prompts, decodings))
    (args.model / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(figures, indent=1))


def model_files(folder: Path) -> list[Path]:
    """The files that make the model: config, weights, tokenizer."""
    return [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")]


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
        "trigram": trigram_loss(train, held_out, config.vocab_size, shape),
        "denoiser": held_out_denoiser(objective, params, params, held_out, EVALUATION_BATCHES),
        "denoiser_by_masks": masked,
        "tokens": EVALUATION_BATCHES * shape.rows * shape.length,
    }


def trigram_loss(
    train: TokenArray, held_out: TokenArray, vocab_size: int, shape: BatchShape
) -> float:
    """Loss of a 3-gram fitted on all training tokens, on the sequences the towers are tested on."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    rows = [
        draw_sequences(held_out, shape.rows, shape.length + 1, generator)
        for _ in range(EVALUATION_BATCHES)
    ]
    return TrigramModel(train, vocab_size).loss(torch.cat(rows).numpy())


def decode(
    model: TwoTower, prompts: Sequence[Prompt], mode: Mode, threshold: float | None
) -> Decoding:
    """Greedy completions of all prompts in one batch, and what they are worth."""
    results = model.generate(
        [prompt.text for prompt in prompts],
        mode=mode,
        max_tokens=NEW_TOKENS,
        confidence_threshold=SHIPPED_THRESHOLD if threshold is None else threshold,
        eos_token_id=model.config.eos_token_id,
    )
    pairs = list(zip(prompts, results, strict=True))
    return Decoding(
        mode,
        threshold,
        sum(len(result.token_ids) for result in results),
        sum(result.nfe for result in results) if mode == "mask_diffusion" else 0,
        repeated_share([result.token_ids for result in results]),
        mean_loss(model, prompts, results),
        sum(completes(prompt.text, result.text) for prompt, result in pairs),
        [result.text for result in results],
    )


def true_text_valid(model: TwoTower, prompts: Sequence[Prompt]) -> int:
    """How many prompts pass with their file's own text, cut as the completions are."""
    assert model.tokenizer is not None
    passed = 0
    for prompt in prompts:
        ids = model.tokenizer.encode(prompt.rest)[:NEW_TOKENS]
        passed += completes(prompt.text, model.tokenizer.decode(ids))
    return passed


def repeated_share(rows: Sequence[Sequence[int]], size: int = 4) -> float:
    """Share of the `size`-grams that occurred earlier in their own row."""
    total = repeated = 0
    for row in rows:
        grams = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
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


def summary(decoding: Decoding) -> dict[str, Any]:
    """A decoding's figures without its texts."""
    plain = asdict(decoding)
    del plain["texts"]
    return {**plain, "tokens_per_nfe": decoding.tokens_per_nfe}


def samples(
    prompts: Sequence[Prompt], decodings: Sequence[Decoding]
) -> list[tuple[str, str, str, str]]:
    """File, prompt, ar text and mask_diffusion text of the first prompts: no picking."""
    ar = next(decoding for decoding in decodings if decoding.mode == "ar")
    diffusion = next(one for one in decodings if one.threshold == SHIPPED_THRESHOLD)
    rows = zip(prompts, ar.texts, diffusion.texts, strict=True)
    return [(prompt.path, prompt.text, one, two) for prompt, one, two in rows][:SAMPLES]


if __name__ == "__main__":
    main()

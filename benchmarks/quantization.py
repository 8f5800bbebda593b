"""Compares a model with routed experts in 8 bits with the model that it was made from.

    python -m benchmarks.quantization [--model DIR] [--prompts 100] [--tokens 64]

Quantizes a checkpoint into a scratch folder, then decodes held-out prompts, greedy, with three
models: as it was, with 8-bit experts that are widened, and with products in 8 bits (a CPU computes
these with widened values, which differs by the order of a sum alone). Of each: tokens per denoiser
call, outputs equal to those of the model as it was, the context tower's loss on held-out text and
the denoiser's at masked positions of its last blocks. Per layer: the relative RMS error of the
weights, and that of the denoiser's MoE outputs (shared expert included), each on the input that the
unquantized tower's layer gets, over blocks half masked. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.prompts import held_out_prompts
from twotower.agreement import comparison, outputs
from twotower.kernels.quantized import EXPERT_PRODUCTS, ExpertProducts
from twotower.kernels.rows import Rows
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.checkpoint.weights import (
    load_context_tower,
    load_denoiser_tower,
    resolve_checkpoint,
)
from twotower.towers.config.model_config import MOE, TwoTowerConfig
from twotower.towers.model.backbone import moe
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import MoeWeights
from twotower.towers.request.params import GenerationParams
from twotower.towers.text.tokenizer import load_tokenizer
from twotower.towers.training.corpus import read_corpus, standard_library

SCORED_TOKENS = 256
BLOCK = 16
# Masks at every second position, as in the middle of a block's denoising.
MASKED = range(0, BLOCK, 2)
OTHERS = range(1, BLOCK, 2)


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--threshold", type=float, default=0.8, help="confidence threshold")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(resolve_checkpoint(args.model), Path(scratch) / "quantized", args)
    print(json.dumps(figures, indent=2))


def measure(before: Path, after: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run; the quantized checkpoint goes to `after`."""
    report = quantize_checkpoint(before, after)
    prompts, texts = token_ids(before, args.prompts)
    config = TwoTowerConfig.from_file(before / "config.json")
    params = GenerationParams(
        max_tokens=args.tokens,
        block_size=BLOCK,
        confidence_threshold=args.threshold,
        eos_token_id=config.eos_token_id,
    )
    exact = outputs(before, prompts, texts, params)
    products: dict[str, Any] = {}
    for name in EXPERT_PRODUCTS:
        own = outputs(after, prompts, texts, params, expert_products=name)
        products[name] = {
            "denoiser_moe_outputs": output_errors(before, after, texts, name),
            "outputs": asdict(comparison(exact, own)),
            "denoiser_loss": denoiser_loss(after, texts, name),
        }
    return {
        "machine": machine(args.threads),
        "shape": {
            "hidden": config.hidden_size,
            "pattern": config.layer_pattern,
            "experts": config.n_routed_experts,
            "dtype": "float32",
            "block": BLOCK,
            "tokens": args.tokens,
            "confidence_threshold": args.threshold,
        },
        "weights": asdict(report),
        "denoiser_loss_before": denoiser_loss(before, texts),
        **products,
    }


def token_ids(folder: Path, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out prompts, and each prompt with its continuation in the file, as token ids."""
    tokenizer = load_tokenizer(folder)
    found = held_out_prompts(read_corpus(standard_library()), count)
    if tokenizer is None or len(found) < count:
        raise ValueError(f"prompts: got {count}, expected a tokenizer and at most {len(found)}")
    prompts = [tokenizer.encode(prompt.text) for prompt in found]
    texts = [tokenizer.encode(prompt.text + prompt.rest)[:SCORED_TOKENS] for prompt in found]
    return prompts, texts


def output_errors(
    before: Path,
    after: Path,
    texts: Sequence[list[int]],
    expert_products: ExpertProducts = "widened",
) -> dict[str, float]:
    """Relative RMS error of each of the denoiser's MoE layers, over all texts."""
    plain = load_denoiser_tower(before)
    quantized = load_denoiser_tower(after, expert_products=expert_products)
    error = dict.fromkeys(plain.config.layers_of(MOE), 0.0)
    size = dict(error)
    for layer, x in moe_inputs(before, plain, texts):
        exact, rounded = (_moe(tower, layer, x) for tower in (plain, quantized))
        error[layer] += float((rounded - exact).double().square().sum())
        size[layer] += float(exact.double().square().sum())
    return {str(layer): (error[layer] / size[layer]) ** 0.5 for layer in error}


def moe_inputs(
    folder: Path, denoiser: DenoiserTower, texts: Sequence[list[int]]
) -> Iterator[tuple[int, Tensor]]:
    """Layer and its normed input [16, H]: the last block of each text, half masked, in context."""
    seen = dict[str, Tensor]()
    for _ in hidden_states(folder, denoiser, texts, [MASKED], seen):
        for layer in denoiser.config.layers_of(MOE):
            yield layer, seen[f"mixer_in.{layer}"]


def denoiser_loss(
    folder: Path, texts: Sequence[list[int]], expert_products: ExpertProducts = "widened"
) -> float:
    """Mean loss in nats of the masked tokens in the last block of each text, each half of it masked
    once, after the context as the same checkpoint reads it."""
    denoiser = load_denoiser_tower(folder, expert_products=expert_products)
    losses: list[Tensor] = []
    walk = hidden_states(folder, denoiser, texts, [MASKED, OTHERS], expert_products=expert_products)
    for hidden, wanted, masked in walk:
        scores = denoiser.logits(hidden[list(masked)]).double().log_softmax(-1)
        losses.append(-scores.gather(1, torch.tensor(wanted)[list(masked), None]).flatten())
    return float(torch.cat(losses).mean())


@torch.inference_mode()
def hidden_states(
    folder: Path,
    denoiser: DenoiserTower,
    texts: Sequence[list[int]],
    patterns: Sequence[range],
    seen: dict[str, Tensor] | None = None,
    expert_products: ExpertProducts = "widened",
) -> Iterator[tuple[Tensor, list[int], range]]:
    """For the last block of each text and each pattern of masks: the denoiser's hidden states
    [16, H] after the context, the block's tokens, the pattern. `seen` gets what layers saw."""
    context = load_context_tower(folder, expert_products=expert_products)
    for text in (text for text in texts if len(text) > BLOCK):
        known, block = text[:-BLOCK], list(text[-BLOCK:])
        state = context.new_state(len(text))
        context.forward([known], [state])
        context.advance(state, len(known))
        for masked in patterns:
            draft = list(block)
            for position in masked:
                draft[position] = denoiser.config.mask_token_id
            note = None if seen is None else seen.__setitem__
            yield denoiser.forward([draft], [len(masked) / BLOCK], [state], note), block, masked


@torch.inference_mode()
def _moe(tower: DenoiserTower, layer: int, x: Tensor) -> Tensor:
    mixer = tower.weights.layers[layer].mixer
    assert isinstance(mixer, MoeWeights)
    no_pages = torch.zeros(1, 1, dtype=torch.int32)
    return moe(x, mixer, tower.config, Rows.build([len(x)], [0], [0], no_pages, 1))


if __name__ == "__main__":
    main()

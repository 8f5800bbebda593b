"""The model card's prose around its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Of the denoiser that was trained on; see `twotower train --help` for what each figure sets.
_TRAINED_ON = """
Then the denoiser alone was **trained on for verified decoding** (threads: {threads}, {dtype},
{processor}), at {rate:g} of the rates with a warm-up and decay of their own. {share:.0%} of its
rows were {rows} texts of the context tower; {block_share:.0%} were corpus text with a block written
by the tower at each of {contexts} x {blocks} borders, since so near to a corpus its text does not
yet repeat itself. In these rows {draft:.0%} of the blocks were masked as a draft is, whole or all
but the first token; and where the masks were the end of a block, each position weighed {decay:g} of
the one before, since a draft's token counts only if all before it were accepted.
"""

BLOCK = 16
Sample = tuple[str, str, str, str]

_CARD = """\
---
license: apache-2.0
library_name: twotower
pipeline_tag: text-generation
tags: [block-diffusion, two-tower, mamba-2, code]
---
# pystdlib: a two-tower model that fits in a package

Two towers of {parameters} parameters in all, {megabytes:.1f} MB with the tokenizer, trained on a
CPU on the source of Python's standard library. It is there so that every mode, threshold and
transport of TwoTower can be tried on a laptop with text that one can judge at a glance. It writes
code that looks like the library's; it does not write code that works.

Every number below was computed by `python -m benchmarks.model_card MODEL_FOLDER`, except those of
the training run, which are from its record `training.json`.

## Model

A context tower reads prompt and committed tokens; a denoiser tower fills blocks of 16 masks. Both
have {layers} layers `{pattern}` (M Mamba-2, E mixture of experts, * attention), hidden size
{hidden}, a vocabulary of {vocab} and weights of their own. The layout of the files is that of the
released 30B checkpoint.

## Data

`.py` files in UTF-8 of the standard library of Python {python}, without `encodings`, `pydoc_data`
and `site-packages`: {train_files} files, {train_millions:.1f} M characters, {train_tokens:.2f} M
tokens. A fixed tenth, chosen by a hash of the path, was held out: {held_out_files} files,
{held_out_tokens:.2f} M tokens. The tokenizer is a byte-level BPE fitted on the training files, in
which a line break and the indentation after it are one token. So end a prompt at the end of a
line, before its break.

## Training

{training_rows}

Machine: {processor}; {threads} threads, {dtype}, shared with other work, so that the speeds are a
lower bound. {rows} sequences of {length} tokens a step. Muon for the matrices inside mixers, AdamW
for the rest; warm-up, constant rate, then linear decay to 2 %.

The context tower was trained first and then frozen. The denoiser started as its copy, with a time
conditioning that changes nothing. Each block had n of 16 positions masked, n drawn uniformly, and
t = n/16, which are the values that decoding uses; {suffix:.0%} of the blocks had their last n
positions masked, the others random ones. In the second half of its time, half of its rows were
{own_rows} texts of {own_length} tokens **written by the context tower itself** from corpus prompts
(temperature 0, 0.5 and 0.8): this makes it commit more tokens per call.
{trained_on}
## Loss on held-out files

Nats per token, fp32, weights as shipped, {loss_tokens} tokens in sequences of {length}.

| model | loss |
|---|---|
| 3-gram, interpolated, fitted on the same training tokens | {trigram:.3f} |
| context tower, next token | {context:.3f} ({bits:.2f} bits per byte) |
| denoiser, masked tokens, 1 to 16 masks per block at random | {denoiser:.3f} |
{mask_rows}

A block of 16 masks has no neighbours to lean on: its later positions are guesses, and the loss
says so.

## Decoding

Greedy, {prompts} prompts from held-out library code (the first lines of functions and classes,
chosen by a fixed rule), {new_tokens} new tokens each, fp32, one CPU core.

| mode | threshold | tokens per denoiser call | repeated 4-grams | loss of the text | valid Python |
|---|---|---|---|---|---|
{decoding_rows}

*Loss of the text* is the context tower's mean loss in nats of what was written. *Valid Python*
counts completions that, cut at their last full line and put after their prompt, pass Python's
`tokenize` without an error; a completion without a full line does not pass. The files' own text,
cut at the same length, passes {true_valid} of {prompts} times, since a cut may fall inside a
bracket or a docstring.

Greedy text of so small a model loops. Sampling at a temperature of 0.6 loops less.

## Samples

The first {sample_count} of the prompts, greedy, not picked.

{samples}

## Limits

Trained on sequences of {length} tokens: longer contexts work and were not tuned. Blocks other than
16 were not trained. Names and APIs in its text are often invented. Passages of the standard
library, which is under the PSF licence, may come back word for word.
"""


def card(record: dict[str, Any], figures: dict[str, Any], samples: Sequence[Sample]) -> str:
    """The card in Markdown, from training.json, the measured figures and sample texts."""
    last, record = record, record.get("start") or record
    corpus, losses, config = record["corpus"], figures["losses"], figures["config"]
    return _CARD.format(
        parameters=f"{losses['parameters'] / 1e6:.2f} M",
        megabytes=figures["bytes"] / 1e6,
        layers=len(config["hybrid_override_pattern"]),
        pattern=config["hybrid_override_pattern"],
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        python=corpus["python"],
        train_files=corpus["train_files"],
        train_millions=corpus["train_characters"] / 1e6,
        train_tokens=corpus["train_tokens"] / 1e6,
        held_out_files=corpus["held_out_files"],
        held_out_tokens=corpus["held_out_tokens"] / 1e6,
        training_rows=_training_rows(record, last),
        trained_on=_trained_on(last) if "start" in last else "",
        processor=record["machine"]["processor"],
        threads=record["machine"]["threads"],
        dtype=record["machine"]["dtype"],
        rows=record["batch"]["rows"],
        length=record["batch"]["length"],
        suffix=record["suffix_share"],
        own_rows=record["own_text"]["rows"],
        own_length=record["own_text"]["length"],
        loss_tokens=losses["tokens"],
        trigram=losses["trigram"],
        context=losses["context"],
        bits=losses["context_bits_per_byte"],
        denoiser=losses["denoiser"],
        mask_rows=_mask_rows(losses["denoiser_by_masks"]),
        prompts=figures["prompts"],
        new_tokens=figures["new_tokens"],
        decoding_rows=_decoding_rows(figures["decodings"], figures["prompts"]),
        true_valid=figures["valid_true_text"],
        sample_count=len(samples),
        samples="\n\n".join(_sample(*sample) for sample in samples),
    )


def _trained_on(record: dict[str, Any]) -> str:
    """The paragraph on a run that started from a trained model."""
    own, machine, batch = record["own_text"], record["machine"], record["batch"]
    return _TRAINED_ON.format(
        processor=machine["processor"],
        threads=machine["threads"],
        dtype=machine["dtype"],
        rate=record["rate"],
        share=int(batch["rows"] * own["share"]) / batch["rows"],
        rows=own["rows"],
        block_share=int(batch["rows"] * own["own_block_share"]) / batch["rows"],
        contexts=own["rows_with_own_blocks"],
        blocks=batch["length"] // BLOCK - 1,
        draft=record["draft_share"],
        decay=record["position_decay"],
    )


def _training_rows(first: dict[str, Any], last: dict[str, Any]) -> str:
    """A row for each phase of the first run, and of the last if it went on from there."""
    rows = ["| tower | steps | tokens | minutes | tokens/s |", "|---|---|---|---|---|"]
    phases = list(first["phases"].items())
    if last is not first:
        phases += [(f"{name}, trained on", phase) for name, phase in last["phases"].items()]
    for name, phase in phases:
        rows.append(
            f"| {name} | {phase['steps']} | {phase['tokens'] / 1e6:.1f} M "
            f"| {phase['seconds'] / 60:.0f} | {phase['tokens_per_second']:.0f} |"
        )
    return "\n".join(rows)


def _mask_rows(by_masks: dict[str, float]) -> str:
    return "\n".join(
        f"| denoiser, {count} of 16 masked | {loss:.3f} |" for count, loss in by_masks.items()
    )


def _decoding_rows(decodings: Sequence[dict[str, Any]], prompts: int) -> str:
    rows = []
    for decoding in decodings:
        threshold = "" if decoding["threshold"] is None else f"{decoding['threshold']:g}"
        speed = "" if decoding["tokens_per_nfe"] is None else f"{decoding['tokens_per_nfe']:.2f}"
        rows.append(
            f"| {decoding['mode']} | {threshold} | {speed} | {decoding['repeated']:.0%} "
            f"| {decoding['loss']:.2f} | {decoding['valid']} of {prompts} |"
        )
    return "\n".join(rows)


def _sample(path: str, prompt: str, ar: str, diffusion: str) -> str:
    return (
        f"`{path}`, prompt:\n\n```python\n{prompt}\n```\n\n"
        f"`ar`:\n\n```python\n{_shown(ar)}\n```\n\n"
        f"`mask_diffusion`, threshold 0.8:\n\n```python\n{_shown(diffusion)}\n```"
    )


def _shown(text: str) -> str:
    """Completion text inside a code fence: without outer breaks and fences."""
    return text.strip("\n").replace("```", "` ` `")

"""Sampling parameters of a request, checked on construction."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.logit_bias import biased_within, checked_bias
from twotower.towers.request.modes import MODES, TRAITS, Mode, ModeTraits
from twotower.towers.request.number_checks import check_real, check_whole
from twotower.towers.request.token_ids import check_ids, check_text, plain_number, text_list

FinishReason = Literal["stop", "length"]
Quality = Literal["ar", "near", "fast"]
DraftSource = Literal["any", "lookup", "denoiser"]
Acceptance = Literal["strict", "mix"]
CommitRuleName = Literal["released", "leftmost", "product"]
TokenSource = Literal["context", "denoiser"]
MAX_BLOCK_SIZE = 256
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_PENALTY = 2.0
MAX_TOP_LOGPROBS = 20
SEED_BITS = 63
# Completions of a request: rows that it puts into the queue at once.
MAX_CHOICES = 128
# Parameters with a fixed set of values.
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "quality": get_args(Quality),
    "draft_source": get_args(DraftSource),
    "acceptance": get_args(Acceptance),
    "commit_rule": get_args(CommitRuleName),
    "first_token": get_args(TokenSource),
}
_NO_NUMBERS = (*CHOICES, "stop", "logit_bias", "provisional")
# The mix that auto's qualities accept drafts with; at 0.3 the loss over ar is within noise.
_QUALITY_MIX: dict[Quality, float] = {"ar": 0.0, "near": 0.3, "fast": 0.3}
# Who draws the first token of a block unless the request says so.
_FIRST_TOKEN: dict[CommitRuleName, TokenSource] = {
    "released": "denoiser",
    "leftmost": "context",
    "product": "context",
}
# Floors of a service under load; where nothing else waits they have no effect.
FLOORS = ("min_steps_per_block", "min_confidence_threshold")
# Not sent with a request: the first is the model's, the second is set by the block loop.
_NOT_SENT = ("eos_token_id", "eos_from")


@dataclass(frozen=True)
class GenerationParams:
    """Parameters of one row. Raises InvalidRequestError on construction.

    Numbers may be numpy's or tensors without dimensions; they are kept as Python's.
    `temperature` 0 is greedy. `top_k`, `top_p` and `min_p` narrow the draw, in this order, after
    the temperature. `seed` None means that one is drawn. `eos_token_id` None means no EOS.
    `steps_per_block` matters to mask_diffusion only, `confidence_threshold` to it and to verified;
    ar and mock_ar hand out `block_size` tokens at a time. Neither EOS nor one of the `stop` strings
    (kept as a tuple) ends the output before it has `min_tokens` tokens. `min_steps_per_block` and
    `min_confidence_threshold` are floors down to which mask_diffusion may be served where rows
    wait; None: as asked.

    In mask_diffusion `commit_rule` chooses the positions that a step commits: those above the
    threshold, and where there is none the most confident (`released`) or the leftmost masked one
    (`leftmost`); or the leading masked positions while the product of their confidences is above
    the threshold, at least one (`product`). `first_token` tells which tower draws the first token
    of a block: the context tower has its logits from the pass that read the block before; None:
    the denoiser with the released rule, the context tower with the others.

    In verified, drafts of up to `block_size` tokens come from `draft_source`: `lookup` (what has
    followed the last tokens where they stood before in prompt or output), `denoiser`, in at most
    `draft_steps` passes, or `any` of the two or none, whichever pays. `acceptance` of a denoiser's
    draft is `strict` (the context tower draws the same token) or `mix`: the draw from
    `mix_ratio` * denoiser + (1 - `mix_ratio`) * context in log-probabilities, with the same noise,
    is the same token. Drafts of other sources are always checked strictly.

    `quality` is what auto may give up for speed: nothing, so that its tokens are those of ar
    (`ar`); what a mix of 0.3 gives up (`near`); what mask_diffusion does (`fast`).

    `logit_bias` (a mapping or pairs, kept as pairs by token id) and the two penalties change what
    is drawn, before temperature and filters and at temperature 0 too: score(token) = logit +
    logit_bias[token] - frequency_penalty * count(token) - presence_penalty * [count(token) > 0].
    Counted are the output's tokens before the position, those of a resumed output too and those of
    the prompt not: in ar and mock_ar all of them, in verified those of the draft as well, in
    mask_diffusion those of earlier blocks and of positions of this block that earlier steps have
    committed, wherever they are. Confidences and log-probabilities stay those of the model.

    The next two shape the answer and no token. `top_logprobs` is the number of most probable tokens
    to give at each position, with their log-probabilities; with `provisional` a stream also gives
    drafts of a block that is being denoised. `eos_from`, the absolute position from which EOS may
    be drawn, is set by the block loop, not by users.
    """

    mode: Mode = "mask_diffusion"
    max_tokens: int = 64
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    eos_token_id: int | None = None
    draft_steps: int = 1
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    min_steps_per_block: int | None = None
    min_confidence_threshold: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    provisional: bool = False
    quality: Quality = "ar"
    draft_source: DraftSource = "any"
    acceptance: Acceptance = "strict"
    mix_ratio: float = 0.3
    commit_rule: CommitRuleName = "leftmost"
    first_token: TokenSource | None = None
    eos_from: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in _NO_NUMBERS:
                number = plain_number(getattr(self, field.name))
                object.__setattr__(self, field.name, number)
        for name, choices in CHOICES.items():
            chosen = getattr(self, name)
            if chosen not in choices and not (name == "first_token" and chosen is None):
                raise InvalidRequestError(name, chosen, f"one of {', '.join(choices)}")
        check_whole("max_tokens", self.max_tokens, 1)
        check_whole("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_whole("steps_per_block", self.steps_per_block, 1)
        check_real("confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        check_real("temperature", self.temperature, 0.0)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_real("top_p", self.top_p, 0.0, 1.0, open_below=True)
        if self.min_p is not None:
            check_real("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**SEED_BITS - 1)
        if self.eos_token_id is not None:
            check_whole("eos_token_id", self.eos_token_id, 0)
        check_whole("draft_steps", self.draft_steps, 1, MAX_BLOCK_SIZE)
        check_real("mix_ratio", self.mix_ratio, 0.0, 1.0)
        check_whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.min_steps_per_block is not None:
            check_whole("min_steps_per_block", self.min_steps_per_block, 1, self.steps_per_block)
        if self.min_confidence_threshold is not None:
            high = self.confidence_threshold
            check_real("min_confidence_threshold", self.min_confidence_threshold, 0.0, high)
        check_real("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        check_real("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        check_whole("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if not isinstance(self.provisional, bool):
            raise InvalidRequestError("provisional", self.provisional, "true or false")
        check_whole("eos_from", self.eos_from, 0)
        object.__setattr__(self, "stop", _checked_stop(self.stop))

    @property
    def traits(self) -> ModeTraits:
        """Properties of the mode."""
        return TRAITS[self.mode]

    @property
    def uses_denoiser(self) -> bool:
        """True if the row is opened in a denoiser tower where there is one."""
        drafts = self.traits.chooses or self.draft_source != "lookup"
        return self.traits.denoiser == "always" or (self.traits.denoiser == "optional" and drafts)

    @property
    def needs_denoiser(self) -> bool:
        """True if the row cannot be served without a denoiser tower."""
        traits = self.traits
        only = self.draft_source == "denoiser" and not traits.chooses
        return traits.denoiser == "always" or (traits.denoiser == "optional" and only)

    @property
    def mirrored_at_once(self) -> bool:
        """True if the denoiser follows every commit; otherwise its mirror is brought up to date
        before a draft."""
        return self.needs_denoiser

    @property
    def starts_with_context(self) -> bool:
        """True if a block of mask_diffusion begins with a token of the context tower."""
        if self.traits.unit != "block":
            return False
        return (self.first_token or _FIRST_TOKEN[self.commit_rule]) == "context"

    @property
    def may_commit_whole(self) -> bool:
        """True if a denoiser's block may be committed unchecked, as mask_diffusion does."""
        return self.traits.chooses and self.quality == "fast"

    @property
    def mix(self) -> float:
        """The denoiser's share in the acceptance of its drafts, 0 where it is strict."""
        return self.mix_ratio if self.acceptance == "mix" else 0.0

    def resolved(self) -> GenerationParams:
        """The parameters with the acceptance that auto's quality stands for."""
        if not self.traits.chooses:
            return self
        mix = _QUALITY_MIX[self.quality]
        acceptance: Acceptance = "mix" if mix else "strict"
        return replace(self, acceptance=acceptance, mix_ratio=mix, draft_steps=1)

    def committed_whole(self) -> GenerationParams:
        """The parameters of a block that is denoised as in mask_diffusion and accepted whole."""
        return replace(self, acceptance="mix", mix_ratio=1.0, draft_steps=self.steps_per_block)

    @property
    def penalizes(self) -> bool:
        """True if a draw depends on the tokens that the output has already."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def with_seed(self) -> GenerationParams:
        """The same parameters with a seed: the given one, or one drawn now."""
        if self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(SEED_BITS))

    def for_prompt(self, prompt_tokens: int) -> GenerationParams:
        """The same parameters for a prompt of that length: `eos_from` is its absolute position."""
        return replace(self, eos_from=prompt_tokens + self.min_tokens)

    @property
    def may_be_eased(self) -> bool:
        """True if the request has a floor that matters to its mode."""
        floors = (self.min_steps_per_block, self.min_confidence_threshold)
        return self.traits.can_be_eased and floors != (None, None)

    def eased(self, share: float) -> GenerationParams:
        """The parameters at `share` (0 to 1) of the way to their floors, without floors: a row is
        served with the same parameters to its end."""
        steps, threshold = self.steps_per_block, self.confidence_threshold
        if self.may_be_eased and self.min_steps_per_block is not None:
            steps -= round(share * (steps - self.min_steps_per_block))
        if self.may_be_eased and self.min_confidence_threshold is not None:
            floor = self.min_confidence_threshold
            # The difference may fall below the floor in its last bit.
            threshold = max(floor, threshold - share * (threshold - floor))
        return replace(
            self,
            steps_per_block=steps,
            confidence_threshold=threshold,
            min_steps_per_block=None,
            min_confidence_threshold=None,
        )

    def context_tokens(self, prompt_tokens: int) -> int:
        """Context positions that the row may need: prompt and output, up to whole blocks."""
        if self.traits.unit == "draft":
            # A draft is a whole block wherever it starts, so the last may reach past max_tokens.
            return prompt_tokens + self.max_tokens + self.block_size
        unit = self.block_size if self.traits.unit == "block" else 1
        return prompt_tokens + -(-self.max_tokens // unit) * unit

    def most_tokens(self, prompt_tokens: int, max_context: int) -> int:
        """The largest `max_tokens` for which such a prompt has room; may be below 1."""
        room = max_context - prompt_tokens
        if self.traits.unit == "draft":
            return room - self.block_size
        return room - room % self.block_size if self.traits.unit == "block" else room

    def check_row(
        self, prompt: list[int], vocab_size: int, max_context: int, generated: list[int]
    ) -> None:
        """Checks prompt and already generated ids against a model's limits.

        Raises InvalidRequestError for an empty prompt, an id outside [0, vocab_size), a resume
        that the mode cannot continue, or a row longer than `max_context` tokens.
        """
        if not prompt:
            raise InvalidRequestError("prompt", [], "at least 1 token")
        check_ids("prompt", prompt, vocab_size)
        check_ids("generated_token_ids", generated, vocab_size)
        if self.eos_token_id is not None and self.eos_token_id >= vocab_size:
            raise InvalidRequestError("eos_token_id", self.eos_token_id, f"below {vocab_size}")
        biased_within(self.logit_bias, vocab_size)
        if len(generated) >= self.max_tokens:
            raise InvalidRequestError(
                "generated_token_ids", f"{len(generated)} ids", f"fewer than {self.max_tokens}"
            )
        if self.traits.unit == "block" and len(generated) % self.block_size:
            raise InvalidRequestError(
                "generated_token_ids",
                f"{len(generated)} ids",
                f"whole blocks of {self.block_size}",
            )
        if self.eos_token_id is not None and self.eos_token_id in generated:
            place = generated.index(self.eos_token_id)
            raise InvalidRequestError(
                f"generated_token_ids[{place}]",
                self.eos_token_id,
                "no end-of-text token: an output that has one is complete",
            )
        needed = self.context_tokens(len(prompt))
        if needed > max_context:
            raise InvalidRequestError(
                "max_tokens",
                f"{len(prompt)} prompt + {self.max_tokens} new tokens, {needed} in whole blocks",
                f"at most {max_context} tokens of context",
            )


# The list of sampling parameters: proto, codec, client, Python API and command line follow it.
SAMPLING_PARAMETERS = tuple(
    field.name for field in fields(GenerationParams) if field.name not in _NOT_SENT
)


def row_key(seed: int) -> int:
    """The 64-bit random key of a row, a hash of the request's seed."""
    # The 0 was a row's number within its request; without it every key would be another one.
    digest = hashlib.blake2b(f"{seed}/0".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def check_stop_count(count: int) -> None:
    """Raises InvalidRequestError for more stop strings than a request may have."""
    if count > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"{count} strings", f"at most {MAX_STOP_STRINGS} strings")


def _checked_stop(stop: object) -> tuple[str, ...]:
    strings = text_list("stop", stop)
    check_stop_count(len(strings))
    for index, text in enumerate(strings):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            length = f"a string of 1 to {MAX_STOP_LENGTH} characters"
            raise InvalidRequestError(f"stop[{index}]", text, length)
        check_text(f"stop[{index}]", text)
    return tuple(strings)

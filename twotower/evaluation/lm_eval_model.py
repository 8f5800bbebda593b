"""lm-eval's model class over a model in this process or a service; importing it registers it.

Needs the extra `eval`. Tokenization of pairs, caching and request plumbing are lm-eval's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

# lm-eval adds its own names only where there are none yet.
import lm_eval.models  # noqa: F401
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from twotower.evaluation.backend import Asked, Backend, Bounding, Likelihood, Pair, Spent
from twotower.evaluation.parameters import base_params, described, request_params, seeds_of
from twotower.evaluation.special_tokens import Ends, ends_of
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import GenerationParams

Judge = Literal["context", "denoiser"]
JUDGES: tuple[Judge, ...] = get_args(Judge)
DEFAULT_BATCH = 16
# As lm-eval's own models, for tasks that set no length.
DEFAULT_MAX_TOKENS = 256
# Batches that go to a model together: its places stay full, and a cache gets them as they come.
_BATCHES_AT_A_TIME = 8

T = TypeVar("T")


@register_model("twotower")
class TwoTowerLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A two-tower model for lm-eval.

    `pretrained` is a folder, a hub id or None for the shipped model; `target` (host:port) is a
    service in place of it. `mode` and further arguments (`block_size`, `confidence_threshold`, ...)
    are parameters of completions, which a task's own generation arguments go before; `max_tokens`
    is for tasks that set no length. `likelihood` says which tower judges continuations, `samples`
    how many masks a block of the denoiser's bound has. `batch_size` rows are in flight at a time.
    Empty contexts are `prefix_token_id`, the end-of-text token if left out. `backend` replaces
    what the first arguments load. Raises TwoTowerError.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        target: str | None = None,
        mode: str = "mask_diffusion",
        likelihood: str = "context",
        samples: int = 32,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        device: str | None = None,
        dtype: str = "float32",
        api_key: str | None = None,
        prefix_token_id: int | None = None,
        backend: Backend | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.base = base_params(mode, max_tokens, params)
        self.judge = _judge(likelihood)
        check_whole("samples", samples, 1)
        self.samples = samples
        self.spent = Spent()
        # Before a model is loaded for nothing, everything else has been checked.
        self.backend = backend or _opened(
            pretrained, target, device or "cpu", dtype, api_key, self.batch_size
        )
        if self.judge == "denoiser" and not isinstance(self.backend, Bounding):
            limit = "context where there is a target: services do not judge with the denoiser"
            raise InvalidRequestError("likelihood", likelihood, limit)
        self._ends: Ends = ends_of(self.backend)
        self._prefix_token_id = prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token. Raises InvalidRequestError for a model without one."""
        if self.backend.eos_token_id is None:
            name = self.backend.name
            raise InvalidRequestError("prefix_token_id", None, f"an id, as {name} has no EOS")
        return self.backend.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.eot_token_id if self._prefix_token_id is None else self._prefix_token_id

    @property
    def max_length(self) -> int:
        """Most tokens of a context, whose continuation ends at most one token behind it."""
        return self.backend.max_context - 1

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a completion whose task sets no length."""
        return self.base.max_tokens

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests calls the tokenizer."""
        return self.backend.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model."""
        return {
            "model_name": self.backend.name,
            "likelihood": self.judge,
            "samples": self.samples if self.judge == "denoiser" else None,
            "params": described(self.base),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts before one (not with
        `add_special_tokens` False) and without those that it puts behind."""
        if not string:
            return [] if add_special_tokens is False else list(self._ends.before)
        return self._ends.cut(
            self.backend.encode(string), keep_before=add_special_tokens is not False
        )

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ids."""
        return self.backend.decode(tokens)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completion of each request's (context, arguments)."""
        arguments = [request.args for request in requests]
        texts: list[str] = []
        for part in self._parts(self._asked(arguments), "write", disable_tqdm):
            for written in self.backend.write(part):
                self.spent.add_written(written)
                self.cache_hook.add_partial("generate_until", arguments[len(texts)], written.text)
                texts.append(written.text)
        return texts

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each request's whole text, in windows of the model's length."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        pairs = [pair for each in windows for pair in each]
        found = iter(self._judged(pairs, disable_tqdm))
        sums = [math.fsum(next(found).log_prob for _ in each) for each in windows]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_options: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted_pair(context, continuation) for _, context, continuation in requests]
        found = self._judged(pairs, disable_tqdm)
        answers = [(one.log_prob, one.is_greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _asked(self, arguments: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Asked]:
        """Prompts and parameters, with a seed for each and prompts cut to what has room."""
        seeds = seeds_of(self.base.seed or 0, [context for context, _ in arguments])
        eos = self.backend.eos_token_id
        asked = []
        for (context, wanted), seed in zip(arguments, seeds, strict=True):
            params = request_params(self.base, wanted, eos)
            if "seed" not in wanted:
                params = replace(params, seed=seed)
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            asked.append(Asked(self._fitted(prompt, params), params))
        return asked

    def _fitted(self, prompt: list[int], params: GenerationParams) -> list[int]:
        """The end of a prompt that leaves room for the completion."""
        room = self.backend.max_context - params.context_tokens(0)
        if room < 1:
            most = params.most_tokens(1, self.backend.max_context)
            raise InvalidRequestError("max_tokens", params.max_tokens, f"at most {most}")
        self.spent.cut_prompts += len(prompt) > room
        return prompt[-room:]

    def _fitted_pair(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair, with as much of the end of its context as has room."""
        room = self.backend.max_context - len(continuation)
        if room < 1:
            limit = f"a continuation of at most {self.max_length} tokens"
            raise InvalidRequestError("continuation", f"{len(continuation)} tokens", limit)
        self.spent.cut_prompts += len(context) > room
        return Pair(context[-room:], continuation)

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [Pair(*make_disjoint_window(window)) for window in windows]

    def _judged(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[Likelihood]:
        """The likelihood of each pair under the tower that judges."""
        found: list[Likelihood] = []
        for part in self._parts(pairs, "score", disable_tqdm):
            for pair, likelihood in zip(part, self._likelihoods(part), strict=True):
                self.spent.add_likelihood(pair, likelihood)
                found.append(likelihood)
        return found

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        if self.judge == "denoiser":
            assert isinstance(self.backend, Bounding), "checked when the model was made"
            return self.backend.bound(pairs, self.samples, self.base.block_size)
        scores = iter(
            self.backend.score(
                [[*pair.context, *pair.continuation] for pair in pairs if pair.continuation]
            )
        )
        return [
            _summed(pair, next(scores)) if pair.continuation else Likelihood(0.0, True)
            for pair in pairs
        ]

    def _parts(self, items: Sequence[T], name: str, disable_tqdm: bool) -> Iterator[Sequence[T]]:
        """The items in the portions that go to the model, with a bar of what is done on a
        terminal."""
        size = self.batch_size * _BATCHES_AT_A_TIME
        with tqdm(total=len(items), desc=f"twotower {name}", disable=disable_tqdm or None) as bar:
            for start in range(0, len(items), size):
                part = items[start : start + size]
                yield part
                bar.update(len(part))


def _summed(pair: Pair, scored: Any) -> Likelihood:
    """The likelihood of a pair's continuation from the scores of both together."""
    count = len(pair.continuation)
    is_greedy = list(scored.best[-count:]) == list(pair.continuation)
    return Likelihood(math.fsum(scored.log_probs[-count:]), is_greedy)


def _judge(name: str) -> Judge:
    """The tower that judges. Raises InvalidRequestError for another name."""
    for judge in JUDGES:
        if judge == name:
            return judge
    raise InvalidRequestError("likelihood", name, f"one of {', '.join(JUDGES)}")


def _batch_size(given: int | str | None, most: int | None) -> int:
    """The number of lm-eval's `batch_size`, which may be a text or `auto`."""
    if given is None or str(given).startswith("auto"):
        return most or DEFAULT_BATCH
    try:
        size = int(given)
    except ValueError:
        size = 0
    check_whole("batch_size", size if size else given, 1)
    return size


def _opened(
    pretrained: str | None,
    target: str | None,
    device: str,
    dtype: str,
    api_key: str | None,
    rows: int,
) -> Backend:
    """The service at `target`, or a checkpoint in this process."""
    if target is not None:
        from twotower.evaluation.over_grpc import OverGrpc

        return OverGrpc(target, api_key=api_key, calls=rows)
    from twotower.evaluation.in_process import InProcess

    return InProcess(pretrained, device=device, dtype=dtype, rows=rows)

"""`twotower generate`: its options, and a completion by a service or by a model in this process.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twotower.cli.options import ApiKey, Device, Dtype, ExpertProducts, Model
from twotower.cli.progress import hub_bars, is_live, working

if TYPE_CHECKING:
    from twotower.api import TwoTower
    from twotower.client import GenerationStream as ServiceStream
    from twotower.streams import GenerationStream
    from twotower.towers.request.results import TextBlock, TopLogProbs, Usage
    from twotower.towers.text.tokenizer import Tokenizer

_GRPC_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    target: Annotated[
        str | None, typer.Option(help="host:port of a running service; otherwise in process.")
    ] = None,
    api_key: ApiKey = None,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    expert_products: ExpertProducts = "widened",
    mode: Annotated[
        str,
        typer.Option(
            help="mask_diffusion (blocks in parallel), ar (one by one, by the context tower), "
            "verified (ar's tokens, drafts that the context tower checks), auto (chosen for speed, "
            "within --quality) or mock_ar (one by one, by the denoiser)."
        ),
    ] = "mask_diffusion",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    block_size: Annotated[int, typer.Option(help="Tokens that are denoised together.")] = 16,
    steps_per_block: Annotated[int, typer.Option(help="Most denoiser passes per block.")] = 16,
    confidence_threshold: Annotated[
        float, typer.Option(help="Commit a token at this probability; lower is faster.")
    ] = 0.8,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k best tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this much probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens of this share of the best one's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a draw exactly.")] = None,
    draft_steps: Annotated[
        int, typer.Option(help="Most denoiser passes per draft in verified.")
    ] = 1,
    quality: Annotated[
        str,
        typer.Option(
            help="What auto may give up for speed: ar (nothing, ar's tokens), near (a mix of 0.3) "
            "or fast (as mask_diffusion)."
        ),
    ] = "ar",
    draft_source: Annotated[
        str,
        typer.Option(
            help="Where drafts of verified come from: lookup (repetitions in the text), denoiser, "
            "or any."
        ),
    ] = "any",
    acceptance: Annotated[
        str,
        typer.Option(
            help="When a denoiser's draft is accepted in verified: strict (ar's token) or mix (of "
            "both towers)."
        ),
    ] = "strict",
    mix_ratio: Annotated[
        float, typer.Option(help="The denoiser's share in that mix, 0 to 1.")
    ] = 0.3,
    commit_rule: Annotated[
        str,
        typer.Option(
            help="What a step of mask_diffusion commits: above the threshold, else the first "
            "(leftmost) or best (released); or a leading run (product)."
        ),
    ] = "leftmost",
    first_token: Annotated[
        str | None,
        typer.Option(
            help="Tower that draws the first token of a block in mask_diffusion: context (unless "
            "the rule is released) or denoiser."
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Nothing ends the text before so many.")] = 0,
    min_steps_per_block: Annotated[
        int | None, typer.Option(help="Fewest steps that a service with a long queue may take.")
    ] = None,
    min_confidence_threshold: Annotated[
        float | None, typer.Option(help="Lowest threshold that such a service may use.")
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="Off the score of each token that the text has; -2 to 2.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="The same for each time that it has it.")
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=BIAS", help="Added to a token's score; may be given several times."
        ),
    ] = None,
    top_logprobs: Annotated[
        int, typer.Option(help="Print so many of the most probable tokens at each position.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Print each token's log-probability at the end.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="On a terminal too, print text and nothing else.")
    ] = False,
) -> None:
    """Complete a text: stdout gets the text as it is committed, stderr what it cost.

    A terminal shows each block while it is filled, unless NO_COLOR is set or TERM is dumb.
    """
    sampling = {
        "mode": mode,
        "max_tokens": max_tokens,
        "block_size": block_size,
        "steps_per_block": steps_per_block,
        "confidence_threshold": confidence_threshold,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "draft_steps": draft_steps,
        "quality": quality,
        "draft_source": draft_source,
        "acceptance": acceptance,
        "mix_ratio": mix_ratio,
        "commit_rule": commit_rule,
        "first_token": first_token,
        "min_tokens": min_tokens,
        "min_steps_per_block": min_steps_per_block,
        "min_confidence_threshold": min_confidence_threshold,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": biases(logit_bias or []),
        "top_logprobs": top_logprobs,
        "stop": stop or [],
    }
    text = standard_input() if prompt == "-" else prompt
    if target is not None:
        generate_remotely(target, api_key, text, sampling, ignore_eos, logprobs, plain)
    else:
        options = sampling, ignore_eos, logprobs, plain
        generate_here(model, device, dtype, text, *options, expert_products)


def generate_remotely(
    target: str,
    api_key: str | None,
    prompt: str,
    sampling: dict[str, Any],
    ignore_eos: bool,
    logprobs: bool,
    plain: bool,
) -> None:
    """Streams a completion of a service to stdout."""
    from twotower.client import Client

    _check_target(target)
    begin = time.perf_counter()
    with Client(target, api_key=api_key) as client:
        stream = client.generate(
            prompt,
            **sampling,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            provisional=_is_shown(plain),
        )
        with _shown(sampling, plain) as show:
            for block in stream:
                show(block)
    _report(stream, time.perf_counter() - begin)
    if stream.steps_per_block is not None:
        used = f"{stream.steps_per_block} steps, threshold {stream.confidence_threshold:g}"
        typer.echo(f"served with {used}", err=True)
    if logprobs:
        _report_log_probs(stream.token_ids, stream.log_probs)
    _report_top_log_probs(stream.top_log_probs)


def _check_target(target: str) -> None:
    """`host:port`, or what gRPC knows by a scheme. Raises InvalidRequestError for anything else:
    gRPC would try port 443, or 65535 for -1."""
    from twotower.towers.errors import InvalidRequestError

    if target.startswith(_GRPC_SCHEMES):
        return
    host, _, port = target.rpartition(":")
    bare = ":" in host and not host.startswith("[")
    known = port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535
    if not host.isascii() or not host or bare or not known:
        raise InvalidRequestError("target", target, "host:port")


def generate_here(
    model: str | None,
    device: str,
    dtype: str,
    prompt: str,
    sampling: dict[str, Any],
    ignore_eos: bool,
    logprobs: bool,
    plain: bool,
    expert_products: str,
) -> None:
    """Streams a completion of a model in this process to stdout."""
    from twotower.towers.errors import InvalidRequestError
    from twotower.towers.request.params import FLOORS, GenerationParams

    # Before a checkpoint is fetched for nothing.
    GenerationParams(**sampling)
    loaded = _loaded(model, device, dtype, expert_products, plain)
    if loaded.tokenizer is None:
        raise InvalidRequestError("prompt", prompt, "a model that has a tokenizer")
    here: dict[str, Any] = {name: one for name, one in sampling.items() if name not in FLOORS}
    here["eos_token_id"] = None if ignore_eos else loaded.config.eos_token_id
    here["provisional"] = _is_shown(plain)
    begin = time.perf_counter()
    with (
        closing(loaded.stream(prompt, **here)) as stream,
        _shown(sampling, plain, loaded.tokenizer) as show,
    ):
        for block in stream:
            show(block)
    _report(stream, time.perf_counter() - begin)
    if logprobs:
        _report_log_probs(stream.token_ids, stream.log_probs)
    _report_top_log_probs(stream.top_log_probs)


def biases(given: Sequence[str]) -> list[tuple[int, float]]:
    """Pairs of `ID=BIAS`. Raises InvalidRequestError for another form."""
    from twotower.towers.errors import InvalidRequestError

    pairs = []
    for text in given:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise InvalidRequestError("logit_bias", text, "ID=BIAS, as 42=-1.5") from None
    return pairs


def _loaded(
    model: str | None, device: str, dtype: str, expert_products: str, plain: bool
) -> TwoTower:
    """The model, with a bar of what is read of it."""
    with working("starting", wanted=not plain):
        from twotower.api import TwoTower
        from twotower.towers.checkpoint.weights import (
            parse_dtype,
            parse_expert_products,
            resolve_checkpoint,
        )

        # Before a checkpoint is fetched for nothing.
        parse_dtype(dtype)
        parse_expert_products(expert_products)
    with hub_bars():
        folder = resolve_checkpoint(model)
    with working("loading", "bytes", wanted=not plain) as bar:
        return TwoTower.from_pretrained(
            folder, device, dtype, progress=bar, expert_products=expert_products
        )


def _is_shown(plain: bool) -> bool:
    return not plain and is_live(sys.stdout)


@contextmanager
def _shown(
    sampling: dict[str, Any], plain: bool, tokenizer: Tokenizer | None = None
) -> Iterator[Callable[[TextBlock], None]]:
    """What shows the items of a stream: blocks as they are filled, or text alone. A service gives
    no tokenizer."""
    if not _is_shown(plain):
        yield lambda block: write(block.text)
        return
    from rich.console import Console

    from twotower.cli.live import BlockDisplay

    console = Console(file=sys.stdout, force_terminal=True, highlight=False)
    mode, masked = sampling["mode"], sampling["mode"] == "mask_diffusion"
    size = sampling["block_size"] if masked else 0
    decode = None if tokenizer is None else tokenizer.decode
    with BlockDisplay(console, mode, size, sampling["max_tokens"], decode) as display:
        yield display.take


def standard_input() -> str:
    """All of stdin, as UTF-8 whatever the locale. Raises ValueError for other bytes."""
    if sys.stdin is None:
        raise ValueError("prompt: got - with stdin closed, expected a text there")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt: got byte 0x{error.object[error.start]:02x} at {error.start} of stdin, "
            "expected UTF-8"
        ) from None


def write(text: str) -> None:
    """Shows a piece of text at once."""
    # Not by `typer.echo`, which leaves out what it takes for colours.
    if sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _report(stream: GenerationStream | ServiceStream, seconds: float) -> None:
    """Says what a stream that has ended cost, and the seed that repeats it."""
    assert stream.usage is not None, "a stream that ended well has its usage"
    tokens, nfe = stream.usage.completion_tokens, stream.usage.nfe
    per_pass = f"{tokens / nfe:.2f} tokens/NFE, " if nfe else ""
    if stream.usage.drafted_tokens:
        per_pass = _of_drafts(stream.usage)
    typer.echo(
        f"\n{tokens} tokens, {nfe} NFE, {per_pass}{tokens / seconds:.1f} tokens/s, "
        f"seed {stream.seed}",
        err=True,
    )


def _of_drafts(usage: Usage) -> str:
    """Figures of a text that was drafted and checked, where passes of both towers count."""
    passes = usage.nfe + usage.context_passes
    return (
        f"{usage.context_passes} context passes, {usage.completion_tokens / passes:.2f} "
        f"tokens/pass, accepted {usage.accepted_tokens} of {usage.drafted_tokens} drafted "
        f"(lookup {usage.lookup_accepted_tokens} of {usage.lookup_drafted_tokens}), "
    )


def _report_log_probs(token_ids: Sequence[int], log_probs: Sequence[float]) -> None:
    """One line per token: its id and its natural-log probability."""
    for token, log_prob in zip(token_ids, log_probs, strict=True):
        typer.echo(f"{token}\t{log_prob:.6f}", err=True)


def _report_top_log_probs(positions: Sequence[TopLogProbs]) -> None:
    """One line per position: the most probable tokens, ids with natural-log probabilities."""
    for top in positions:
        typer.echo("\t".join(f"{token}={log_prob:.6f}" for token, log_prob in top), err=True)

"""`twotower generate`: its options, and a completion by a service or by a model in this process.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twotower.cli.options import Device, Dtype, Model

if TYPE_CHECKING:
    from twotower.client import GenerationStream as ServiceStream
    from twotower.streams import GenerationStream
    from twotower.towers.request.results import TopLogProbs

_GRPC_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    target: Annotated[
        str | None, typer.Option(help="host:port of a running service; otherwise in process.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TWOTOWER_API_KEY",
            help="Key for that service. Other users of this machine see options, so better set "
            "the variable.",
        ),
    ] = None,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    mode: Annotated[
        str,
        typer.Option(
            help="mask_diffusion (blocks in parallel), ar (one by one, by the context tower), "
            "verified (ar's tokens, drafted by the denoiser) or mock_ar (one by one, by the "
            "denoiser)."
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
) -> None:
    """Complete a text: stdout gets the text as it is committed, stderr what it cost."""
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
        generate_remotely(target, api_key, text, sampling, ignore_eos, logprobs)
    else:
        generate_here(model, device, dtype, text, sampling, ignore_eos, logprobs)


def generate_remotely(
    target: str,
    api_key: str | None,
    prompt: str,
    sampling: dict[str, Any],
    ignore_eos: bool,
    logprobs: bool,
) -> None:
    """Streams a completion of a service to stdout."""
    from twotower.client import Client

    _check_target(target)
    begin = time.perf_counter()
    with Client(target, api_key=api_key) as client:
        stream = client.generate(prompt, **sampling, ignore_eos=ignore_eos, logprobs=logprobs)
        for block in stream:
            write(block.text)
    _report(stream, time.perf_counter() - begin)
    if stream.steps_per_block is not None:
        used = f"{stream.steps_per_block} steps, threshold {stream.confidence_threshold:g}"
        typer.echo(f"served with {used}", err=True)
    if logprobs:
        _report_log_probs(stream.token_ids, stream.log_probs)


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
) -> None:
    """Streams a completion of a model in this process to stdout."""
    from twotower.api import TwoTower
    from twotower.towers.checkpoint.weights import parse_dtype, resolve_checkpoint
    from twotower.towers.errors import InvalidRequestError
    from twotower.towers.request.params import FLOORS, GenerationParams

    # Both before a checkpoint is fetched for nothing.
    GenerationParams(**sampling)
    parse_dtype(dtype)
    loaded = TwoTower.from_pretrained(resolve_checkpoint(model), device, dtype)
    if loaded.tokenizer is None:
        raise InvalidRequestError("prompt", prompt, "a model that has a tokenizer")
    eos = None if ignore_eos else loaded.config.eos_token_id
    here = {name: value for name, value in sampling.items() if name not in FLOORS}
    begin = time.perf_counter()
    with closing(loaded.stream(prompt, **here, eos_token_id=eos)) as stream:
        for block in stream:
            write(block.text)
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
    typer.echo(
        f"\n{tokens} tokens, {nfe} NFE, {per_pass}{tokens / seconds:.1f} tokens/s, "
        f"seed {stream.seed}",
        err=True,
    )


def _report_log_probs(token_ids: Sequence[int], log_probs: Sequence[float]) -> None:
    """One line per token: its id and its natural-log probability."""
    for token, log_prob in zip(token_ids, log_probs, strict=True):
        typer.echo(f"{token}\t{log_prob:.6f}", err=True)


def _report_top_log_probs(positions: Sequence[TopLogProbs]) -> None:
    """One line per position: the most probable tokens, ids with natural-log probabilities."""
    for top in positions:
        typer.echo("\t".join(f"{token}={log_prob:.6f}" for token, log_prob in top), err=True)

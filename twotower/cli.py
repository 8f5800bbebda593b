"""The `twotower` command. Heavy imports happen inside the commands, so that help comes at once."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twotower.cli_errors import CommandGroup

if TYPE_CHECKING:
    from twotower.deployments.config import ServiceConfig

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve and try two-tower block-diffusion language models.\n\n"
    "A small model ships inside the package, so every command works as it is:\n\n"
    "  twotower generate 'def main():'      complete a text, no server needed\n\n"
    "  twotower serve                       start the gRPC service on port 9000",
)

Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or Hugging Face id; the shipped model if left out."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Number format: float32 or bfloat16.")]
Config = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML file of settings; options here win."),
]
_GRPC_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
Verbose = Annotated[bool, typer.Option(help="Show the logs of all processes.")]


@app.command()
def serve(
    model: Model = None,
    config: Config = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 9000 if left out.")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Port of Ray Serve's HTTP side, loopback only; 8000.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default) or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default) or bfloat16.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each tower; half of the CPUs it may use.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and output together.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Requests that a pair of towers works on at once.")
    ] = None,
    max_queued_requests: Annotated[
        int | None, typer.Option(help="Requests that wait for a pair; more are refused.")
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option(help="Share of a device's free memory for states and K/V.")
    ] = None,
    prefix_cache_mib: Annotated[
        int | None, typer.Option(help="MiB of snapshots in the prefix cache; 0 turns it off.")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="How states travel: grpc (default), gloo or nccl.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Number of pairs of towers.")] = None,
    verbose: Verbose = False,
) -> None:
    """Start the service on this machine; Ctrl-C stops it."""
    settings = {
        "model": model,
        "grpc_port": grpc_port,
        "http_port": http_port,
        "device": device,
        "dtype": dtype,
        "threads_per_tower": threads,
        "max_context": max_context,
        "max_num_seqs": max_num_seqs,
        "max_queued_requests": max_queued_requests,
        "memory_fraction": memory_fraction,
        "prefix_cache_mib": prefix_cache_mib,
        "transport": transport,
        "num_pairs": pairs,
    }
    _serve(config, settings, verbose)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    target: Annotated[
        str | None, typer.Option(help="host:port of a running service; otherwise in process.")
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
        "stop": stop or [],
    }
    text = _standard_input() if prompt == "-" else prompt
    if target is not None:
        _generate_remotely(target, text, sampling, ignore_eos, logprobs)
    else:
        _generate_here(model, device, dtype, text, sampling, ignore_eos, logprobs)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder of recorded cases.")
    ],
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Replay recorded cases on this machine's kernels; exit code 1 if any differs."""
    _verify(folder, device, dtype)


@app.command()
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Checkpoint folder or Hugging Face id.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="New folder for the quantized checkpoint.")
    ],
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Decode a few prompts with both and compare.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Store a model's routed experts in 8 bits; stdout gets a report as JSON.

    Device and dtype are those of the comparison.
    """
    _quantize(source, target, evaluate, device, dtype)


@app.command()
def train(
    out_dir: Annotated[Path, typer.Argument(help="Folder that receives the model.")],
    work_dir: Annotated[
        Path, typer.Option(help="Folder for tokens and checkpoints of the run.")
    ] = Path("runs/train"),
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of .py files; Python's own library if left out.")
    ] = None,
    context_minutes: Annotated[float, typer.Option(help="Time for the context tower.")] = 38.0,
    denoiser_minutes: Annotated[float, typer.Option(help="Time for the denoiser tower.")] = 40.0,
    context_steps: Annotated[int | None, typer.Option(help="Steps instead of time.")] = None,
    denoiser_steps: Annotated[int | None, typer.Option(help="Steps instead of time.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; what this processor multiplies faster."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train a small two-tower model from source code, as the shipped one was."""
    settings: dict[str, Any] = {
        "out_dir": out_dir,
        "work_dir": work_dir,
        "corpus": corpus,
        "context_minutes": context_minutes,
        "denoiser_minutes": denoiser_minutes,
        "context_steps": context_steps,
        "denoiser_steps": denoiser_steps,
        "threads": threads,
        "seed": seed,
        "resume": resume,
    }
    if dtype is not None:
        settings["dtype"] = dtype
    _train(settings)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure both towers' speed in process; `twotower bench --help` lists its options."""
    from twotower.bench.command import main as measure

    raise typer.Exit(measure(context.args, "twotower bench"))


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(help="a100-80, h100, h200, b200, l40s or gb10.")] = "h100",
    context: Annotated[
        int, typer.Option(help="Tokens of a row, prompt and output together.")
    ] = 4096,
    batch: Annotated[int, typer.Option(help="Rows that a denoiser works on at once.")] = 64,
    gamma: Annotated[
        float, typer.Option(help="Threshold, from which follow the tokens a denoiser pass commits.")
    ] = 0.8,
    text: Annotated[
        str, typer.Option(help="What is written: plain, open, code or arithmetic.")
    ] = "plain",
    tokens_per_nfe: Annotated[
        float | None, typer.Option(help="Tokens a pass commits, in place of gamma and text.")
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(
            help="Output of a row; the rest is a prompt to be read. Not given: no prompt."
        ),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="Format of routed experts: full, fp8 or both.")
    ] = "both",
    most_denoisers: Annotated[
        int, typer.Option(help="Most denoisers of a context tower; 7 fill a host of 8 GPUs.")
    ] = 7,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint; the released 30B model's shape if left out.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Report of `twotower bench`, or pair stats."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Memory and tokens/s of ways to place the towers on a kind of GPU; needs no GPU itself."""
    question = {
        "gpu": gpu,
        "context": context,
        "batch": batch,
        "gamma": gamma,
        "text": text,
        "tokens_per_nfe": tokens_per_nfe,
        "output_tokens": output_tokens,
        "experts": experts,
        "most_denoisers": most_denoisers,
    }
    _plan(question, model, measured, as_json)


def main() -> None:
    """Entry of the console script."""
    app()


def _serve(config: Path | None, settings: dict[str, Any], verbose: bool) -> None:
    from twotower.cluster.surroundings import runtime_folder
    from twotower.deployments.supervisor import held_signals, supervise

    with held_signals() as held, runtime_folder(os.environ) as folder:
        # Its libraries look for their folders when they are imported.
        from twotower.deployments.config import ServiceConfig

        service_config = (
            ServiceConfig.from_settings(settings)
            if config is None
            else ServiceConfig.from_file(config, **settings)
        )
        typer.echo("starting the towers ...", err=True)
        work = partial(_run_service, service_config, folder, verbose)
        code = supervise(work, service_config.graceful_shutdown_timeout_s, held)
    raise typer.Exit(code)


def _run_service(
    config: ServiceConfig, folder: Path, verbose: bool, ready: Callable[[], None]
) -> int:
    """The service, in a process of its own, until SIGTERM; returns the exit code."""
    from twotower.deployments.ray_messages import RayMessages
    from twotower.deployments.server import LocalService
    from twotower.deployments.waiting import WaitingPairs

    stdout = sys.stdout
    messages = stdout if verbose else RayMessages(sys.stderr)
    with (
        redirect_stdout(messages),
        WaitingPairs(lambda line: typer.echo(line, err=True)),
        LocalService(config, verbose=verbose, folder=folder) as service,
    ):
        # Ray has its own idea of SIGTERM, so this comes after its start.
        stop = _stop_signals()
        ready()
        command = f"twotower generate 'def main():' --target {service.address}"
        typer.echo(f"ready on {service.address}   try: {command}", file=stdout)
        while os.read(stop, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        typer.echo("stopping ...", err=True)
    return 0


def _stop_signals() -> int:
    """A descriptor from which a byte can be read for each SIGINT and SIGTERM from now on.

    Not an event that a handler sets: the handler may interrupt whoever waits for the event while
    he holds its lock, and it does not run while another thread has got the signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: None)
    signal.set_wakeup_fd(writer)
    return reader


def _generate_remotely(
    target: str, prompt: str, sampling: dict[str, Any], ignore_eos: bool, logprobs: bool
) -> None:
    from twotower.client import Client

    _check_target(target)
    begin = time.perf_counter()
    with Client(target) as client:
        stream = client.generate(prompt, **sampling, ignore_eos=ignore_eos, logprobs=logprobs)
        for block in stream:
            _write(block.text)
    assert stream.usage is not None, "a stream that ended well has its usage"
    seconds = time.perf_counter() - begin
    _report(stream.usage.completion_tokens, stream.usage.nfe, seconds, stream.seed)
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


def _generate_here(
    model: str | None,
    device: str,
    dtype: str,
    prompt: str,
    sampling: dict[str, Any],
    ignore_eos: bool,
    logprobs: bool,
) -> None:
    from twotower.in_process import InProcessModel
    from twotower.towers.params import GenerationParams
    from twotower.towers.weights import parse_dtype, resolve_checkpoint

    # Both before a checkpoint is fetched for nothing.
    params = GenerationParams(**sampling)
    parse_dtype(dtype)
    loaded = InProcessModel(resolve_checkpoint(model), device, dtype)
    begin = time.perf_counter()
    stream = loaded.stream(prompt, params, ignore_eos=ignore_eos)
    for text in stream:
        _write(text)
    seconds = time.perf_counter() - begin
    _report(len(stream.log.token_ids), stream.log.nfe, seconds, stream.seed)
    if logprobs:
        _report_log_probs(stream.log.token_ids, stream.log_probs)


def _verify(folder: Path, device: str, dtype: str) -> None:
    from twotower.towers.verify import verify_folder

    if not verify_folder(folder, device, dtype, typer.echo):
        raise typer.Exit(1)


def _quantize(source: str, target: Path, evaluate: bool, device: str, dtype: str) -> None:
    from twotower.agreement import compare
    from twotower.towers.quantization import quantize_checkpoint
    from twotower.towers.tokenizer import load_tokenizer
    from twotower.towers.weights import parse_device, parse_dtype, resolve_checkpoint

    folder = resolve_checkpoint(source)
    # Here and not after an hour of work.
    parse_device(device)
    parse_dtype(dtype)
    if evaluate and load_tokenizer(folder) is None:
        raise ValueError(f"--evaluate: {folder} has no tokenizer for its prompts")
    report = quantize_checkpoint(folder, target)
    typer.echo(report.table(), err=True)
    figures = asdict(report)
    if evaluate:
        figures["evaluation"] = asdict(compare(folder, target, device=device, dtype=dtype))
    typer.echo(json.dumps(figures, indent=2))


def _train(settings: dict[str, Any]) -> None:
    from twotower.towers.training import TrainingOptions, train

    train(TrainingOptions(**settings), typer.echo)


def _plan(
    settings: dict[str, Any], model: str | None, measured: Path | None, as_json: bool
) -> None:
    from twotower.planner.measured import read_measured
    from twotower.planner.plan import make_plan
    from twotower.planner.question import Question, formats_named, model_config
    from twotower.planner.text import to_dict, to_text

    question = Question(**{**settings, "experts": formats_named(settings["experts"])})
    config = model_config(model)
    known = read_measured(measured, config, question) if measured is not None else None
    answer = make_plan(question, config, known)
    typer.echo(json.dumps(to_dict(answer), indent=2) if as_json else to_text(answer))


def _standard_input() -> str:
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


def _write(text: str) -> None:
    # Not by `typer.echo`, which leaves out what it takes for colours.
    if sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _report(tokens: int, nfe: int, seconds: float, seed: int | None) -> None:
    per_pass = f"{tokens / nfe:.2f} tokens/NFE, " if nfe else ""
    typer.echo(
        f"\n{tokens} tokens, {nfe} NFE, {per_pass}{tokens / seconds:.1f} tokens/s, seed {seed}",
        err=True,
    )


def _report_log_probs(token_ids: Sequence[int], log_probs: Sequence[float]) -> None:
    """One line per token: its id and its natural-log probability."""
    for token, log_prob in zip(token_ids, log_probs, strict=True):
        typer.echo(f"{token}\t{log_prob:.6f}", err=True)


if __name__ == "__main__":
    main()

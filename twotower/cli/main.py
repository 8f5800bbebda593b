"""The `twotower` command and its options; `commands` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from twotower.cli import commands
from twotower.cli.batch import batch
from twotower.cli.errors import CommandGroup
from twotower.cli.evaluate import evaluate
from twotower.cli.generate import generate
from twotower.cli.keys import keys
from twotower.cli.options import Device, Dtype, Model
from twotower.cli.plan import plan
from twotower.cli.sweep import sweep
from twotower.cli.top import top

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

Config = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML file of settings; options here win."),
]
Verbose = Annotated[bool, typer.Option(help="Show the logs of all processes.")]


@app.command()
def serve(
    model: Model = None,
    config: Config = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 9000 if left out.")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Port of the HTTP side; 8000 if left out.")
    ] = None,
    http_host: Annotated[
        str | None,
        typer.Option(help="Address on which HTTP is taken; 127.0.0.1, this machine only."),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="YAML list of keys, as `twotower key new` prints them; then every request needs "
            "one. Without keys only this machine is answered.",
        ),
    ] = None,
    allow_anonymous: Annotated[
        bool | None,
        typer.Option("--allow-anonymous", help="Without keys, answer other machines as well."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default) or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default) or bfloat16.")] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="On cuda, the same bits for a row in any batch."),
    ] = None,
    expert_products: Annotated[
        str | None,
        typer.Option(
            help="How routed experts in 8 bits are multiplied: widened (default, in the number "
            "format), or fp8 (with tokens in 8 bits too)."
        ),
    ] = None,
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
        "http_host": http_host,
        "allow_anonymous": allow_anonymous,
        "device": device,
        "dtype": dtype,
        "deterministic": deterministic,
        "expert_products": expert_products,
        "num_threads": threads,
        "max_context": max_context,
        "max_num_seqs": max_num_seqs,
        "max_queued_requests": max_queued_requests,
        "memory_fraction": memory_fraction,
        "prefix_cache_mib": prefix_cache_mib,
        "transport": transport,
        "num_pairs": pairs,
    }
    commands.serve(config, settings, api_keys, verbose)


app.command()(generate)
app.command()(batch)
app.command("eval")(evaluate)
app.add_typer(keys, name="key")
app.command()(top)
app.command()(sweep)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder of recorded cases.")
    ],
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Replay recorded cases on this machine's kernels; exit code 1 if any differs."""
    commands.verify(folder, device, dtype)


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
    commands.quantize(source, target, evaluate, device, dtype)


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
    start_from: Annotated[
        Path | None,
        typer.Option(help="Folder of an exported model to train on; a tower without time stays."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Factor of the learning rates.")] = 1.0,
    own_text_from: Annotated[
        float, typer.Option(help="Share of the denoiser's time after which own text begins.")
    ] = 0.5,
    own_text_share: Annotated[
        float, typer.Option(help="Then the share of rows that the context tower wrote.")
    ] = 0.5,
    own_block_share: Annotated[
        float, typer.Option(help="And of corpus rows with blocks that it wrote.")
    ] = 0.0,
    draft_share: Annotated[
        float, typer.Option(help="Share of these rows' blocks masked as a draft of verified mode.")
    ] = 0.0,
    position_decay: Annotated[
        float, typer.Option(help="Weight of each position there over that of the one before.")
    ] = 1.0,
) -> None:
    """Train a small two-tower model from source code, as the shipped one was, or train it on."""
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
        "start_from": start_from,
        "rate": rate,
        "own_text_from": own_text_from,
        "own_text_share": own_text_share,
        "own_block_share": own_block_share,
        "draft_share": draft_share,
        "position_decay": position_decay,
    }
    if dtype is not None:
        settings["dtype"] = dtype
    commands.train(settings)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure both towers' speed in process; `twotower bench --help` lists its options."""
    commands.bench(context.args)


app.command()(plan)


def main() -> None:
    """Entry of the console script."""
    app()


if __name__ == "__main__":
    main()

"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or Hugging Face id; the shipped model if left out."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Number format: float32 or bfloat16.")]
ExpertProducts = Annotated[
    str,
    typer.Option(
        help="How routed experts in 8 bits are multiplied: widened (in the number format), or fp8 "
        "(with tokens in 8 bits too)."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="TWOTOWER_API_KEY",
        help="Key for that service. Other users of this machine see options, so better set "
        "the variable.",
    ),
]

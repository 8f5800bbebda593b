"""`twotower key`: makes the keys that a service asks its callers for."""

from __future__ import annotations

from typing import Annotated

import typer

keys = typer.Typer(no_args_is_help=True, help="Make API keys of a service.")


@keys.callback()
def _group() -> None:
    """Makes `new` a command of its own: a group with one command would take its place."""


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="What its owner is called in logs and metrics.")],
    max_concurrent: Annotated[
        int | None, typer.Option(help="Requests that the key may have at a time.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens of prompts and outputs that the key may use.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="The key may use the admin routes as well.")
    ] = False,
) -> None:
    """Make a key: stderr gets the key itself, once, stdout what the service needs of it.

    stdout is an entry for the file of `twotower serve --api-keys`; it holds the key's hash, from
    which nobody can find the key. stderr is not part of it, so this adds an entry to the file
    and shows the key, which is kept nowhere, on the terminal:

      twotower key new alice >> keys.yaml

    In a script, `2> alice.key` puts the key into a file; see that no log collects stderr.
    """
    from twotower.deployments.access.key_file import entry_text, make_entry
    from twotower.deployments.access.keys import new_key

    plain, sha256 = new_key()
    entry = make_entry(name, sha256, max_concurrent, tokens_per_minute, admin)
    typer.echo(entry_text(entry), nl=False)
    typer.echo(plain, err=True)

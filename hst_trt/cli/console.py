"""What the commands print with: tables on stdout, bars and messages on stderr, bars only where someone watches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["bars", "messages", "print_json", "tables"]

# Markup stays off: prompts and tensor shapes have square brackets. Lines are only wrapped where a terminal shows them.
messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
tables = Console(highlight=False, markup=False, soft_wrap=True)


def print_json(schema: str, content: dict[str, Any]) -> None:
    """One object on stdout, its `schema` first."""
    click.echo(json.dumps({"schema": schema, **content}, indent=2))


@contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """Progress bars; nothing at all is printed where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=messages, disable=quiet or not messages.is_terminal) as progress:
        yield progress

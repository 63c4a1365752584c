"""What a command prints on stdout: one JSON document, or lines and tables for people."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import click

from vmkeep.cli.asked import Asked
from vmkeep.cli.exits import one_line
from vmkeep.cli.stdout import own

__all__ = ["document", "line", "remark", "table"]

_WIDE = 10_000  # columns; a table that goes to a file or a pipe must not be cut


def document(content: object) -> None:
    """The one JSON document of a command."""
    click.echo(json.dumps(content, indent=2), file=own())


def line(text: str) -> None:
    """One line of a result."""
    click.echo(one_line(text), file=own())


def remark(asked: Asked, text: str) -> None:
    """Something worth knowing beside the result: on stderr, so that stdout stays what it is."""
    if not asked.quiet:
        click.echo(f"vmkeep: {one_line(text)}", err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table; the columns in `right` are aligned to the right."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - 0.1 s, where there is a table only
    from rich.console import Console  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(one_line(cell)) for cell in row))
    if own().isatty():
        Console(file=own()).print(made)
        return
    plain = io.StringIO()
    Console(file=plain, width=_WIDE).print(made)
    click.echo("\n".join(text.rstrip() for text in plain.getvalue().splitlines()), file=own())

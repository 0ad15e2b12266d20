"""How the command line prints what the operator API answers: tables for people, JSON for programs.

Promises: nothing of an answer is read as markup; an id that the next command needs is never cut off; a file or a pipe
is wide enough for every table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console: Final = Console()
errors: Final = Console(stderr=True)

_PIPE_WIDTH: Final = 160
_WHOLE: Final = frozenset({"fingerprint", "digest"})


def print_page(rows: Sequence[Any], columns: Sequence[str], after: str | None, empty: str) -> None:
    """A page of a list, and how to go on; `empty` is said of none."""
    if not rows:
        console.print(empty)
        return
    print_table(rows, columns)
    if after is not None:
        console.print(f"there are more: --after {after}", style="dim", highlight=False, soft_wrap=True)


def print_table(rows: Sequence[Any], columns: Sequence[str]) -> None:
    """Some columns of some rows; words that do not fit are folded."""
    # An id that is cut off cannot be given to the next command.
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column.endswith("_id") or column in _WHOLE)
    for row in rows:
        table.add_row(*(escape(text(row[column])) for column in columns))
    _print_wide(table)


def print_fields(fields: dict[str, Any]) -> None:
    """One thing, a line for each field."""
    table = Table("field", "value", show_header=False, box=None, pad_edge=False)
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), escape(text(value)))
    _print_wide(table)


def _print_wide(table: Table) -> None:
    """As wide as the terminal; a file or a pipe has no edge to break lines for."""
    console.print(table, width=None if console.is_terminal else _PIPE_WIDTH)


def text(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def print_json(value: Any) -> None:
    """For programs, on standard output."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")

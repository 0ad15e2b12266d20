"""How the command line prints what the operator API answers: tables for people, JSON for programs.

Promises: nothing of an answer is read as markup; an id that the next command needs is never cut off; a file or a pipe
is wide enough for every table, and on a terminal that is too narrow for one each row has lines of its own.
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
_FOLDED: Final = 24
"""Characters from which on a column may be folded without becoming hard to read."""


def print_page(rows: Sequence[Any], columns: Sequence[str], after: str | None, empty: str) -> None:
    """A page of a list, and how to go on; `empty` is said of none."""
    if not rows:
        console.print(empty)
        return
    print_table(rows, columns)
    if after is not None:
        console.print(f"there are more: --after {after}", style="dim", highlight=False, soft_wrap=True)


def print_table(rows: Sequence[Any], columns: Sequence[str]) -> None:
    """Some columns of some rows; words that do not fit are folded, and too many of them make each row a block."""
    if console.is_terminal and _least_width(rows, columns) > console.width:
        for row in rows:
            print_fields({column: row[column] for column in columns})
            console.print()
        return
    # An id that is cut off cannot be given to the next command.
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=_whole(column))
    for row in rows:
        table.add_row(*(escape(text(row[column])) for column in columns))
    _print_wide(table)


def _whole(column: str) -> bool:
    return column.endswith("_id") or column in _WHOLE


def _least_width(rows: Sequence[Any], columns: Sequence[str]) -> int:
    """Characters below which a table of these rows is columns of single syllables."""
    width = 0
    for column in columns:
        longest = max((len(text(row[column])) for row in rows), default=0)
        width += max(len(column), longest if _whole(column) else min(longest, _FOLDED)) + 2
    return width


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

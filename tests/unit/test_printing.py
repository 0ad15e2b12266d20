"""Lists of the command line can be read on any terminal, and their ids copied."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from deploy import printing
from deploy.cli_approvals import _QUEUE, _line

EVENT = "0123456789abcdef0123456789abcdef"
APPROVAL: dict[str, Any] = {
    "event_id": EVENT,
    "revision": 1,
    "priority": 120,
    "amount": "12500.00",
    "currency": "EUR",
    "due_at": "2026-01-31T12:00:00Z",
    "overdue": True,
    "approved_by": 0,
    "approvers_needed": 2,
    "claimed_by": "ben@example.org",
    "reasons": ["HIGH_AMOUNT", "NEW_SUBJECT"],
}


def printed(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    out = io.StringIO()
    monkeypatch.setattr(printing, "console", Console(file=out, width=width, force_terminal=True, color_system=None))
    printing.print_page([_line(APPROVAL)] * 2, _QUEUE, None, "nothing")
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 200])
def test_what_waits_for_people_is_read_whole_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = printed(monkeypatch, width)
    assert max(map(len, lines)) <= width
    for word in (EVENT, "12500.00 EUR", "2026-01-31 12:00", "overdue", "ben@example.org", "HIGH_AMOUNT", "NEW_SUBJECT"):
        assert sum(word in line for line in lines) == 2, f"{word} is broken"


def test_a_terminal_that_is_wide_enough_has_a_line_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([line for line in printed(monkeypatch, 160) if EVENT in line and "HIGH_AMOUNT" in line]) == 2
    assert len(printed(monkeypatch, 80)) > 2 * len(_QUEUE)

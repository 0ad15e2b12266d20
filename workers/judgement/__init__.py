"""What decides: scorecards, policies and guardrails, interpreted from registered content.

Pure: nothing here reads a clock, a file or an environment. Content is checked when it is first
used and then kept by digest, so that a version is compiled once in a process.
"""

from __future__ import annotations

from contracts.failures import InvalidModelStateError

UNREADABLE: tuple[type[Exception], ...] = (InvalidModelStateError, ArithmeticError, LookupError, TypeError, ValueError)
"""What a stage takes for "this artifact cannot judge this event": it fails closed and never raises for it."""

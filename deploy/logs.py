"""Structured logs: JSON lines with an allow-list of fields, so that no payload can slip in."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import structlog

from contracts.telemetry import LOG_FIELDS, current_correlation


def _correlate(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    correlation = current_correlation()
    for name in ("tenant", "correlation_id", "traceparent", "event_id"):
        value = getattr(correlation, name)
        if value is not None:
            line.setdefault(name, value)
    return line


def _allow_listed(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    error = line.pop("exc_info", None)
    if error:
        kind = sys.exc_info()[1] if error is True else error
        frames = _frames(kind) if isinstance(kind, BaseException) else None
        line["error_detail"] = frames
    return {name: value for name, value in line.items() if name in LOG_FIELDS}


def _frames(error: BaseException) -> str:
    """Where it was raised, never its text: a text may hold payload."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}:{f.name}" for f in reversed(frames))


def configure(level: str, role: str) -> None:
    """Log JSON lines to stderr from `level` on, each with this process's role."""

    def with_role(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        line["role"] = role
        return line

    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _correlate,
            with_role,
            _allow_listed,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(LibraryLine(role))
    logging.basicConfig(level=logging.ERROR, handlers=[lines])


class LibraryLine(logging.Formatter):
    """What a library logs: who, where and which error, never its text, which may hold payload."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One JSON line, without the traceback's text."""
        line = {
            "event": record.name,
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
            "role": self._role,
            "error_detail": f"{record.filename}:{record.lineno}:{record.funcName}",
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line["exception_class"] = type(error).__name__
            line["error_detail"] = _frames(error) or line["error_detail"]
        return json.dumps(line)

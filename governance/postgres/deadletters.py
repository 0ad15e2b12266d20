"""The table of dead letters: what was parked, why, and the bytes to replay.

Promises: a letter is stored once, whatever is repeated. Does not replay: that is an operator's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.ports import Clock, DeadLetter
from governance.audit import chain_of
from governance.postgres.engine import clean, columns, moment, transaction

_COLUMNS: Final = (
    *("letter_id", "tenant", "event_id", "stage", "category", "problem", "exception_class", "fingerprint"),
    *("attempts", "first_failed_at", "last_failed_at", "parked_at", "body"),
)
_INSERT: Final = text(
    """
    INSERT INTO dead_letters (letter_id, tenant, event_id, stage, category, problem, exception_class, fingerprint,
                              attempts, first_failed_at, last_failed_at, parked_at, body)
    SELECT * FROM unnest(
        CAST(:letter_id AS text[]), CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:stage AS text[]),
        CAST(:category AS text[]), CAST(:problem AS text[]), CAST(:exception_class AS text[]),
        CAST(:fingerprint AS text[]), CAST(:attempts AS integer[]), CAST(:first_failed_at AS timestamptz[]),
        CAST(:last_failed_at AS timestamptz[]), CAST(:parked_at AS timestamptz[]), CAST(:body AS bytea[]))
    ON CONFLICT DO NOTHING
    """
)


class PostgresDeadLetters:
    """The port DeadLetters over the table `dead_letters`; letters without a tenant belong to the system."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Insert each letter once, open; a repeat changes nothing. `parked_at` is the injected clock's."""
        if not letters:
            return
        now = self._clock.now()
        rows = [_row(letter, now) for letter in sorted(letters, key=lambda letter: letter.letter_id)]
        async with transaction(self._engine, [letter.scope for letter in letters]) as connection:
            await connection.execute(_INSERT, columns(rows, _COLUMNS))


def _row(letter: DeadLetter, now: datetime) -> tuple[Any, ...]:
    return (
        clean(letter.letter_id),
        chain_of(letter.scope),
        clean(letter.event_id),
        clean(letter.stage),
        clean(letter.category),
        clean(letter.problem),
        clean(letter.exception_class),
        clean(letter.fingerprint),
        letter.attempts,
        _moment_or(letter.first_failed_at, now),
        _moment_or(letter.last_failed_at, now),
        now,
        letter.body,
    )


def _moment_or(value: str, fallback: datetime) -> datetime:
    """A letter is kept even when its times cannot be read: it may come from a broken message."""
    try:
        return moment(value)
    except ValueError:
        return fallback

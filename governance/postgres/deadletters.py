"""The table of dead letters as the parking sink writes it.

Promises: a letter is stored once, whatever is repeated, and closed at once when a stage parked it whose event is
decided by then. Letters of the audit and of labels are never closed by a decision: what they hold is still missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.ports import Clock, DeadLetter
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from governance.audit import SYSTEM_CHAIN, chain_of
from governance.columns import clean, moment
from governance.deadletters import LetterSummary
from governance.postgres.corrections import lock_events
from governance.postgres.engine import columns, transaction

_COLUMNS: Final = (
    *("letter_id", "tenant", "event_id", "stage", "category", "problem", "exception_class", "fingerprint"),
    *("attempts", "first_failed_at", "last_failed_at", "parked_at", "replays", "body"),
)
_INSERT: Final = text(
    """
    INSERT INTO dead_letters (letter_id, tenant, event_id, stage, category, problem, exception_class, fingerprint,
                              attempts, first_failed_at, last_failed_at, parked_at, replays, body, status)
    SELECT k.*, CASE WHEN k.stage = ANY(CAST(:stages AS text[])) AND EXISTS (
                         SELECT 1 FROM decisions d WHERE d.tenant = k.tenant AND d.event_id = k.event_id)
                     THEN 'closed' ELSE 'open' END
      FROM unnest(
        CAST(:letter_id AS text[]), CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:stage AS text[]),
        CAST(:category AS text[]), CAST(:problem AS text[]), CAST(:exception_class AS text[]),
        CAST(:fingerprint AS text[]), CAST(:attempts AS integer[]), CAST(:first_failed_at AS timestamptz[]),
        CAST(:last_failed_at AS timestamptz[]), CAST(:parked_at AS timestamptz[]), CAST(:replays AS integer[]),
        CAST(:body AS bytea[]))
        AS k(letter_id, tenant, event_id, stage, category, problem, exception_class, fingerprint, attempts,
             first_failed_at, last_failed_at, parked_at, replays, body)
    ON CONFLICT DO NOTHING
    """
)
SUMMARY: Final = """
    SELECT letter_id, tenant, event_id, stage, category, problem, exception_class, fingerprint, status, attempts,
           replays, first_failed_at, last_failed_at, parked_at FROM dead_letters
"""
_OF_EVENT: Final = text(f"{SUMMARY} WHERE tenant = :tenant AND event_id = :event_id ORDER BY parked_at, letter_id")


async def letters_of(connection: AsyncConnection, scope: TenantScope, event_id: str) -> tuple[LetterSummary, ...]:
    """Every letter of one event, the oldest first, inside the caller's transaction."""
    rows = await connection.execute(_OF_EVENT, {"tenant": scope.tenant_id, "event_id": event_id})
    return tuple(summary(row) for row in rows.mappings())


def summary(row: Any) -> LetterSummary:
    """A row of `SUMMARY` for people; the system's letters have no tenant."""
    found = {name: row[name] for name in LetterSummary.model_fields}
    return LetterSummary.model_validate(found | {"tenant": None if row["tenant"] == SYSTEM_CHAIN else row["tenant"]})


class PostgresDeadLetters:
    """The port DeadLetters over the table `dead_letters`; letters without a tenant belong to the system."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Insert each letter once; a repeat changes nothing. `parked_at` is the injected clock's."""
        if not letters:
            return
        now = self._clock.now()
        rows = [_row(letter, now) for letter in sorted(letters, key=lambda letter: letter.letter_id)]
        events = [(one.scope, clean(one.event_id)) for one in letters if one.scope is not None and one.stage in STAGES]
        async with transaction(self._engine, [letter.scope for letter in letters]) as connection:
            # Before the look at decisions: one that is being written now would not be seen, nor see the letter.
            await lock_events(connection, (), exclusive=events)
            await connection.execute(_INSERT, columns(rows, _COLUMNS) | {"stages": list(STAGES)})


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
        letter.replays,
        letter.body,
    )


def _moment_or(value: str, fallback: datetime) -> datetime:
    """A letter is kept even when its times cannot be read: it may come from a broken message."""
    try:
        return moment(value)
    except ValueError:
        return fallback

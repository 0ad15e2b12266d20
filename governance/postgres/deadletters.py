"""The table of dead letters: what was parked, why, and the bytes to replay.

Promises: a letter is stored once, whatever is repeated; whoever looks sees sizes and digests, never a payload. Does
not replay: that is an operator's transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.codec import Entry, decode_carrier
from contracts.failures import NotKnownError, UndecodableEntryError
from contracts.ports import Clock, DeadLetter
from contracts.tenancy import TenantScope
from governance.audit import chain_of
from governance.postgres.cursors import decode_cursor, encode_cursor
from governance.postgres.engine import clean, columns, moment, transaction

MAX_PAGE: Final = 200

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
_SUMMARY: Final = """
    SELECT letter_id, event_id, stage, category, problem, exception_class, fingerprint, status, attempts, replays,
           first_failed_at, last_failed_at, parked_at FROM dead_letters
"""
_OF_EVENT: Final = text(f"{_SUMMARY} WHERE tenant = :tenant AND event_id = :event_id ORDER BY parked_at, letter_id")
_LIST: Final = text(
    f"""
    {_SUMMARY}
     WHERE tenant = :tenant
       AND (CAST(:status AS text) IS NULL OR status = CAST(:status AS text))
       AND (CAST(:stage AS text) IS NULL OR stage = CAST(:stage AS text))
       AND (CAST(:category AS text) IS NULL OR category = CAST(:category AS text))
       AND (CAST(:fingerprint AS text) IS NULL OR fingerprint = CAST(:fingerprint AS text))
       AND (CAST(:parked_at AS timestamptz) IS NULL
            OR (parked_at, letter_id) < (CAST(:parked_at AS timestamptz), CAST(:letter_id AS text)))
     ORDER BY parked_at DESC, letter_id DESC LIMIT :limit
    """
)
_SHOW: Final = text("SELECT * FROM dead_letters WHERE tenant = :tenant AND letter_id = :letter_id")

LetterStatus = Literal["open", "closed", "replayed", "discarded"]


class LetterSummary(BaseModel):
    """One dead letter without its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    letter_id: str
    event_id: str
    stage: str
    category: str
    problem: str
    exception_class: str
    fingerprint: str
    status: LetterStatus
    attempts: int
    replays: int
    first_failed_at: datetime
    last_failed_at: datetime
    parked_at: datetime


class LetterEntry(BaseModel):
    """One entry inside a letter, as its header says: `n` and `digest` name the version, `size` is in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    event_id: str
    stage: str
    n: int
    digest: str
    body_digest: str
    attempts: int
    suspect: bool
    size: int


class LetterView(BaseModel):
    """One dead letter with the size (bytes) and SHA-256 of what would be replayed; no entries: it cannot be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    letter: LetterSummary
    size: int
    sha256: str
    entries: tuple[LetterEntry, ...]


class LetterPage(BaseModel):
    """Some dead letters, the newest first; `next` continues where they end, null at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    letters: tuple[LetterSummary, ...]
    next: str | None


class LetterFilter(BaseModel):
    """Which letters; what is None does not matter."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    status: LetterStatus | None = "open"
    stage: str | None = None
    category: str | None = None
    fingerprint: str | None = None


async def letters_of(connection: AsyncConnection, scope: TenantScope, event_id: str) -> tuple[LetterSummary, ...]:
    """Every letter of one event, the oldest first, inside the caller's transaction."""
    rows = await connection.execute(_OF_EVENT, {"tenant": scope.tenant_id, "event_id": event_id})
    return tuple(LetterSummary.model_validate(dict(row)) for row in rows.mappings())


async def list_letters(
    engine: AsyncEngine, scope: TenantScope, wanted: LetterFilter, *, after: str | None = None, limit: int = 50
) -> LetterPage:
    """A tenant's letters, at most `MAX_PAGE`. Raises InvalidMetadataError for a cursor that this list did not make."""
    size = max(1, min(limit, MAX_PAGE))
    place = (None, None) if after is None else decode_cursor(after, (datetime, str))
    values: dict[str, Any] = {name: value and clean(value) for name, value in wanted.model_dump().items()}
    values |= {"tenant": scope.tenant_id, "parked_at": place[0], "letter_id": place[1], "limit": size + 1}
    async with transaction(engine, [scope]) as connection:
        rows = (await connection.execute(_LIST, values)).mappings().all()
    letters = tuple(LetterSummary.model_validate(dict(row)) for row in rows[:size])
    more = len(rows) > size
    return LetterPage(
        letters=letters, next=encode_cursor((letters[-1].parked_at, letters[-1].letter_id)) if more else None
    )


async def show_letter(engine: AsyncEngine, scope: TenantScope, letter_id: str) -> LetterView:
    """One letter of a tenant. Raises NotKnownError, for another tenant's letter too."""
    key = {"tenant": scope.tenant_id, "letter_id": clean(letter_id)}
    async with transaction(engine, [scope]) as connection:
        row = (await connection.execute(_SHOW, key)).mappings().one_or_none()
    if row is None:
        raise NotKnownError("no such dead letter is known to this tenant")
    body = bytes(row["body"])
    letter = LetterSummary.model_validate({name: row[name] for name in LetterSummary.model_fields})
    return LetterView(letter=letter, size=len(body), sha256=hashlib.sha256(body).hexdigest(), entries=_entries(body))


def _entries(body: bytes) -> tuple[LetterEntry, ...]:
    try:
        found = decode_carrier(body)
    except UndecodableEntryError:
        return ()
    return tuple(
        LetterEntry(
            event_id=entry.header.event,
            stage=entry.header.stage,
            n=entry.header.n,
            digest=entry.header.digest,
            body_digest=entry.header.body_digest,
            attempts=entry.header.attempts,
            suspect=entry.header.suspect,
            size=len(entry.body),
        )
        for entry in found
        if isinstance(entry, Entry)
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

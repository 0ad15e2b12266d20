"""What two decisions about one thing must not do at once: corrections, people's answers and the pipeline's first ones.

Promises: whoever is about to write under an event's key or to take its place holds the event's lock until the
transaction ends, and locks are taken in one order everywhere. Decisions of different events never wait for each other
here. A circle of corrections is broken where it would close: of events that correct each other, one stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from contracts.tenancy import TenantScope
from governance.postgres.engine import columns

Key = tuple[TenantScope, str]

# unnest keeps the order of the array; the locks are taken row by row in it.
_LOCK: Final = text(
    """
    SELECT count(CASE WHEN k.exclusive THEN CAST(pg_advisory_xact_lock(k.number) AS text)
                      ELSE CAST(pg_advisory_xact_lock_shared(k.number) AS text) END)
      FROM unnest(CAST(:number AS bigint[]), CAST(:exclusive AS boolean[])) AS k(number, exclusive)
    """
)
_TRY_LOCK: Final = text("SELECT pg_try_advisory_xact_lock(CAST(:number AS bigint))")

# `above`: the event, and whatever took its place before. To supersede one of those would close a circle.
_SUPERSEDE: Final = text(
    """
    WITH RECURSIVE k AS (
        SELECT * FROM unnest(CAST(:tenant AS text[]), CAST(:event_id AS text[]), CAST(:corrects AS text[]),
                             CAST(:at AS timestamptz[])) AS k(tenant, event_id, corrects, at)),
    above(tenant, bottom, event_id) AS (
        SELECT k.tenant, k.event_id, k.event_id FROM k
        UNION
        SELECT a.tenant, a.bottom, n.superseded_by FROM above a
         CROSS JOIN LATERAL (
            SELECT d.superseded_by FROM decisions d
             WHERE d.tenant = a.tenant AND d.event_id = a.event_id AND d.superseded_by IS NOT NULL LIMIT 1) n),
    marked AS (
        UPDATE decisions d SET superseded_by = k.event_id FROM k
         WHERE d.tenant = k.tenant AND d.event_id = k.corrects AND d.superseded_by IS NULL
           AND NOT EXISTS (
                SELECT 1 FROM above a
                 WHERE a.tenant = k.tenant AND a.bottom = k.event_id AND a.event_id = k.corrects)
        RETURNING d.tenant, d.event_id),
    closed AS (
        UPDATE approvals a SET status = 'superseded', closed_at = k.at, close_reason = 'superseded by ' || k.event_id
          FROM k JOIN (SELECT DISTINCT tenant, event_id FROM marked) m
            ON m.tenant = k.tenant AND m.event_id = k.corrects
         WHERE a.tenant = m.tenant AND a.event_id = m.event_id AND a.status = 'open'
        RETURNING 1)
    SELECT DISTINCT tenant, event_id FROM marked
    """
)
_CORRECTION: Final = ("tenant", "event_id", "corrects", "at")


async def lock_events(connection: AsyncConnection, keys: Iterable[Key], *, exclusive: Iterable[Key] = ()) -> None:
    """Hold these events until the transaction ends: `keys` beside others, `exclusive` ones alone.

    Call it once, before anything else is locked. A lock that others hold for 2 s is a DatabaseError.
    """
    modes = dict.fromkeys(map(_number, keys), False) | dict.fromkeys(map(_number, exclusive), True)
    numbers = sorted(modes)
    await connection.execute(_LOCK, {"number": numbers, "exclusive": [modes[number] for number in numbers]})


async def try_lock_event(connection: AsyncConnection, key: Key) -> bool:
    """Hold one event alone if nobody else holds it now."""
    return bool((await connection.execute(_TRY_LOCK, {"number": _number(key)})).scalar_one())


@dataclass(frozen=True, slots=True)
class Correction:
    """A decided event, in order of (tenant, event), and the event whose place it takes; `at`: when it was decided.

    `superseded_by`: what already took its own place, if anything.
    """

    tenant: str
    event_id: str
    corrects: str
    at: datetime
    superseded_by: str | None


async def supersede(connection: AsyncConnection, corrections: Sequence[Correction]) -> Sequence[tuple[str, str]]:
    """Put decided events in the place of what they correct; returns the (tenant, event) pairs that gave way.

    Needs the exclusive locks of the corrected events. What is not decided yet is marked when it is. One statement as
    long as no correction touches what another one does; else one after the other, since the first to come counts.
    """
    gone: list[tuple[str, str]] = []
    for wave in _waves(corrections):
        rows = [(each.tenant, each.event_id, each.corrects, each.at) for each in wave]
        found = await connection.execute(_SUPERSEDE, columns(rows, _CORRECTION))
        gone += [(row.tenant, row.event_id) for row in found]
    return gone


def _waves(corrections: Sequence[Correction]) -> Iterator[list[Correction]]:
    """The corrections in order, cut wherever one touches an event that its wave has touched."""
    wave: list[Correction] = []
    touched: set[tuple[str, str | None]] = set()
    for each in corrections:
        mine = {(each.tenant, name) for name in (each.event_id, each.corrects, each.superseded_by) if name}
        if touched & mine:
            yield wave
            wave, touched = [], set()
        wave.append(each)
        touched |= mine
    if wave:
        yield wave


def _number(key: Key) -> int:
    """A 64-bit name; two events that share one wait for each other, which is harmless."""
    scope, event_id = key
    digest = hashlib.sha256(f"riskfleet.event\0{scope.tenant_id}\0{event_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)

"""The versions of the topology that run, by a table: read again and again, changed by `riskfleet topology`.

Promises: without rows the first version runs alone with the partitions of the settings, so an installation that never
changed them has none. A version takes new entries only from the moment that its row names, by the database's clock,
after which every process has read it. The number of a version is never used twice. Declares and removes no queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.failures import InvalidWorkflowStateError
from contracts.topology import Layout, Layouts
from governance.postgres.directory import tenant_ids
from governance.postgres.engine import transaction

LEAD_S: Final = 10
"""Seconds between a version's row and its first entry: five readings of the slowest process."""

_BUSY: Final = "the topology is being changed already: repeat in a minute"

_READ: Final = text(
    """
    SELECT version, partitions, filling_from <= now() AS fills, retired_at IS NOT NULL AS retired,
           removed_at IS NOT NULL AS removed
      FROM layouts ORDER BY version
    """
)
_LOCK: Final = text("SELECT pg_advisory_xact_lock(hashtext('layouts'))")
_FIRST: Final = text(
    "INSERT INTO layouts (version, partitions, filling_from) VALUES (1, :partitions, now()) ON CONFLICT DO NOTHING"
)
_ADD: Final = text(
    """
    INSERT INTO layouts (version, partitions, filling_from)
    VALUES (:version, :partitions, now() + make_interval(secs => :lead))
    """
)
_RETIRE: Final = text("UPDATE layouts SET retired_at = now() WHERE version = :version AND retired_at IS NULL")
_TAKE_BACK: Final = text("UPDATE layouts SET retired_at = NULL WHERE version = :version AND removed_at IS NULL")
_REMOVED: Final = text("UPDATE layouts SET removed_at = now() WHERE version = :version AND removed_at IS NULL")
_IN_OUTBOX: Final = text(
    """
    SELECT routing_key, count(*) AS messages FROM outbox
     WHERE routing_key = ANY(CAST(:queues AS text[])) GROUP BY routing_key
    """
)


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """One version as the table has it. `fills`: its time to take new entries has come."""

    layout: Layout
    fills: bool
    retired: bool
    removed: bool


class PostgresLayouts:
    """The running versions as of the last `refresh`: a RunningLayouts that changes while its process runs."""

    def __init__(self, engine: AsyncEngine, partitions: int) -> None:
        """`partitions`: of the first version, as long as the table is empty."""
        self._engine = engine
        self._partitions = partitions
        self._now = Layouts.first(partitions)

    @property
    def running(self) -> tuple[Layout, ...]:
        """Oldest first."""
        return self._now.running

    @property
    def newest(self) -> Layout:
        """Where new entries and all audit records go."""
        return self._now.newest

    @property
    def old(self) -> tuple[Layout, ...]:
        """The versions that drain."""
        return self._now.old

    def of(self, version: str) -> Layout:
        """The layout on which an entry stays. Raises MessagingFailureError for one that is not known here."""
        return self._now.of(version)

    async def refresh(self) -> None:
        """Read the table again. Raises DatabaseError; what was read before holds until then."""
        self._now = running_of(await self.rows(), self._partitions)

    async def rows(self) -> tuple[LayoutRow, ...]:
        """Every version that there ever was, oldest first; empty while the first one runs alone."""
        async with transaction(self._engine, ()) as connection:
            return await _rows(connection)

    async def planned(self, partitions: int) -> Layout:
        """The version after the last one, with so many partitions; nothing is written.

        Raises InvalidWorkflowStateError while the last one takes no entries yet.
        """
        rows = await self.rows()
        if rows and not rows[-1].fills:
            raise InvalidWorkflowStateError(_BUSY)
        return Layout(f"v{rows[-1].layout.number + 1 if rows else 2}", partitions)

    async def add(self, layout: Layout) -> None:
        """Let a version run whose queues are there; it takes new entries after `LEAD_S`.

        Raises InvalidWorkflowStateError when another version was added meanwhile or is not yet taken up.
        """
        async with transaction(self._engine, ()) as connection:
            await connection.execute(_LOCK)
            await connection.execute(_FIRST, {"partitions": self._partitions})
            rows = await _rows(connection)
            if rows[-1].layout.number + 1 != layout.number or not rows[-1].fills:
                raise InvalidWorkflowStateError(_BUSY)
            values = {"version": layout.number, "partitions": layout.partitions, "lead": LEAD_S}
            await connection.execute(_ADD, values)

    async def retire(self, layout: Layout) -> None:
        """Nobody consumes the version's queues any more, within seconds."""
        await self._change(_RETIRE, layout)

    async def take_back(self, layout: Layout) -> None:
        """A retired version runs again: its queues held something after all."""
        await self._change(_TAKE_BACK, layout)

    async def removed(self, layout: Layout) -> None:
        """The version's queues are gone."""
        await self._change(_REMOVED, layout)

    async def waiting_in_outbox(self, layout: Layout) -> dict[str, int]:
        """By queue of this version, the messages of committed commands that are still to go out to it."""
        scopes = [*await tenant_ids(self._engine), None]
        async with transaction(self._engine, scopes) as connection:
            found = await connection.execute(_IN_OUTBOX, {"queues": list(layout.work_queues())})
            return {row.routing_key: int(row.messages) for row in found}

    async def _change(self, statement: object, layout: Layout) -> None:
        async with transaction(self._engine, ()) as connection:
            await connection.execute(_LOCK)
            await connection.execute(statement, {"version": layout.number})  # type: ignore[call-overload]  # one of the texts above


def running_of(rows: tuple[LayoutRow, ...], partitions: int) -> Layouts:
    """What runs by the table's rows; `partitions`: of the first version, when there is none."""
    running = [row for row in rows if not row.retired]
    filling = [row.layout for row in running if row.fills]
    if not filling:  # no row at all; the last version is never retired
        return Layouts.first(partitions)
    return Layouts(tuple(row.layout for row in running), filling[-1].version)


async def _rows(connection: AsyncConnection) -> tuple[LayoutRow, ...]:
    found: list[Row[tuple[int, int, bool, bool, bool]]] = list(await connection.execute(_READ))
    return tuple(LayoutRow(Layout(f"v{r.version}", r.partitions), r.fills, r.retired, r.removed) for r in found)

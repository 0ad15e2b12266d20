"""`riskfleet topology apply --partitions` and `retire`: another number of partitions, while the fleet runs.

Promises: a version's queues are there before anybody hears of it. An old version's queues are removed only after they
were empty for a minute of readings, nobody consumes them and nothing can be published to them any more; until the last
step it can run again, and does when something turns up. Every step may be repeated, by whoever is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from contracts.failures import InvalidWorkflowStateError
from contracts.ports import Clock
from contracts.topology import RUNGS, WORK, Layout, rung_exchange, topology_of
from deploy.settings import Settings, SettingsError
from governance.postgres import engine as pg
from governance.postgres.layouts import LayoutRow, PostgresLayouts
from resilience.management import BrokerManagement
from resilience.partitioning import Drain, DrainPolicy, DrainState, drain

_EVERY_S: Final = 5.0
_LEFT_S: Final = 60.0
_COUNTED_S: Final = 12.0
"""The management API's counters lag by up to 5 s; a process reads the versions every 2 s."""


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[tuple[BrokerManagement, PostgresLayouts]]:
    """The broker's management and the versions that run. Raises DatabaseError."""
    engine = pg.create_engine(settings.need("database_url"), pool_size=1)
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    try:
        layouts = PostgresLayouts(engine, settings.partitions)
        await layouts.refresh()
        yield management, layouts
    finally:
        await management.close()
        await pg.dispose(engine)


@dataclass(frozen=True, slots=True)
class VersionReport:
    """One version: `state` is filling (takes new entries), announced (will), draining, or retired (half removed)."""

    version: str
    partitions: int
    state: str
    left: int


@dataclass(frozen=True, slots=True)
class TopologyReport:
    """The versions that have queues, oldest first, and what the broker lacks or holds otherwise, a sentence each."""

    versions: list[VersionReport]
    differences: list[str]


async def examine(settings: Settings) -> TopologyReport:
    """Which versions run, what is left in them, and whether the broker is as it should be."""
    async with opened(settings) as (management, layouts):
        rows = await _rows(layouts)
        differences = await management.differences(topology_of(layouts.running))
        versions = []
        for row in rows:
            if row.removed:
                continue
            depths = await left(management, layouts, row.layout)
            state = _state(row, layouts.newest)
            held = sum(depth or 0 for depth in depths.values())
            versions.append(VersionReport(row.layout.version, row.layout.partitions, state, held))
            if row.retired:
                differences.append(f"{row.layout.version} is half removed: run 'riskfleet topology retire' again")
        return TopologyReport(versions, differences)


async def _rows(layouts: PostgresLayouts) -> Sequence[LayoutRow]:
    """Every version; the first one as if it had a row, while none has."""
    return await layouts.rows() or [LayoutRow(layouts.newest, fills=True, retired=False, removed=False)]


def _state(row: LayoutRow, newest: Layout) -> str:
    if row.retired:
        return "retired"
    if not row.fills:
        return "announced"
    return "filling" if row.layout == newest else "draining"


async def change(settings: Settings, partitions: int) -> Layout:
    """Let a new version run beside the others; an unchanged number of partitions changes nothing.

    Raises InvalidWorkflowStateError while another change is under way.
    """
    async with opened(settings) as (management, layouts):
        last = layouts.running[-1]
        if last.partitions == partitions:
            return last
        made = await layouts.planned(partitions)
        await management.apply(topology_of([*layouts.running, made]))
        await layouts.add(made)
        return made


async def left(management: BrokerManagement, layouts: PostgresLayouts, layout: Layout) -> dict[str, int | None]:
    """Messages in each queue of a version that there is, None where they are not counted yet."""
    standing = await management.standing(layout.work_queues())
    depths = {name: one.messages if one else None for name, one in standing.items()}
    waiting = await layouts.waiting_in_outbox(layout)
    for queue, count in waiting.items():  # committed commands' messages are in no queue yet
        depths[queue] = (depths.get(queue) or 0) + count
    return depths


async def retire(settings: Settings, version: str, patience_s: float, clock: Clock, say: Callable[[str], None]) -> None:
    """Remove an old version's queues once they are empty; `patience_s`: how long to wait for that.

    Raises SettingsError for a version that there is not, InvalidWorkflowStateError when it must not go (yet).
    """
    async with opened(settings) as (management, layouts):
        row = _found(await _rows(layouts), version)
        if row.removed:
            say(f"{version} is removed already")
            return
        if not row.retired:
            if row.layout not in layouts.old:
                raise InvalidWorkflowStateError(f"{version} takes new entries, or will: only an older version can go")
            await _drained(management, layouts, row.layout, patience_s, clock)
            say(f"{version} was empty for {DrainPolicy().quiet_s:.0f} s; nobody consumes it any more")
            await layouts.retire(row.layout)
        await _remove(management, layouts, row.layout)
        say(f"{version} is removed: {len(row.layout.work_queues())} queues")


def _found(rows: Sequence[LayoutRow], version: str) -> LayoutRow:
    for row in rows:
        if row.layout.version == version:
            return row
    raise SettingsError(f"there is no topology version {version}: see 'riskfleet topology check'")


async def _drained(
    management: BrokerManagement, layouts: PostgresLayouts, layout: Layout, patience_s: float, clock: Clock
) -> None:
    deadline = clock.monotonic() + patience_s
    policy, state = DrainPolicy(), DrainState()
    while True:
        seen = drain(layout, await left(management, layouts, layout), policy, state, clock.now())
        if seen.retire:
            return
        state = seen.state
        if clock.monotonic() > deadline:
            raise InvalidWorkflowStateError(f"{layout.version} is not drained: {_why(seen)}; nothing was removed")
        await asyncio.sleep(_EVERY_S)


def _why(seen: Drain) -> str:
    if seen.left:
        queue, depth = max(seen.left.items(), key=lambda item: item[1])
        return f"{sum(seen.left.values())} messages are left, {depth} of them for {queue}"
    if seen.unread:
        return f"{len(seen.unread)} queues could not be read, such as {seen.unread[0]}"
    return f"it was not empty for {DrainPolicy().quiet_s:.0f} s yet; give it longer with --wait"


async def _remove(management: BrokerManagement, layouts: PostgresLayouts, layout: Layout) -> None:
    """Unconsumed, then unbound, then empty, then gone: in that order nothing can be lost in between."""
    queues = layout.work_queues()
    consumers = await _consumers(management, layout)
    for _ in range(round(_LEFT_S / _EVERY_S)):
        if not consumers:
            break
        await asyncio.sleep(_EVERY_S)
        consumers = await _consumers(management, layout)
    if consumers:
        raise InvalidWorkflowStateError(
            f"{consumers} consumers still hold {layout.version}: is a process older than this release, or cut off from "
            "PostgreSQL? Stop it, and run this again"
        )
    for queue in queues:
        await management.unbind(WORK, queue)
    await asyncio.sleep(_COUNTED_S)
    found: Mapping[str, int | None] = await left(management, layouts, layout)
    if any(depth != 0 for depth in found.values()):
        await management.apply(topology_of([layout]))
        await layouts.take_back(layout)
        raise InvalidWorkflowStateError(f"something came for {layout.version} at last: it runs again; retire it later")
    for name, _ttl in RUNGS:
        await management.delete_exchange(rung_exchange(name, layout.version))
    for queue in queues:
        await management.delete_queue(queue)
    await layouts.removed(layout)


async def _consumers(management: BrokerManagement, layout: Layout) -> int:
    standing = await management.standing(layout.work_queues())
    return sum(one.consumers for one in standing.values() if one)

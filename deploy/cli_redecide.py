"""`riskfleet redecide`: decisions made again from their pinned versions, and compared byte for byte.

For whoever has to show that a decision can be explained by what it was made from: an auditor, or an engineer before an
upgrade. Reads PostgreSQL, sends and writes nothing, and may run beside the fleet.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import Progress

from contracts.events import event_id_of
from contracts.tenancy import TenantScope
from deploy import local, settings
from deploy.printing import console, errors, print_json
from deploy.runtime import SystemClock

if TYPE_CHECKING:
    from governance.postgres import AsyncEngine
    from workers.redecision import Redecision

_SHOWN: Final = 20
_EVER: Final = datetime(1970, 1, 1, tzinfo=UTC)

Tenant = Annotated[str, typer.Option(help="Whose decisions.")]
Events = Annotated[list[str] | None, typer.Argument(help="Event ids (32 hex digits), or the sender's own ids.")]
Last = Annotated[int, typer.Option(min=1, max=1_000_000, help="Without events: the newest so many.")]
Since = Annotated[datetime | None, typer.Option(help="Only what was decided from this time (UTC) on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(redecide)


def redecide(
    tenant: Tenant, events: Events = None, last: Last = 1_000, since: Since = None, as_json: AsJson = False
) -> None:
    """Make decisions again from their pinned versions and stored facts, and compare. Exit 1 when any differs."""
    found, missing = asyncio.run(_redecide(tenant, events or [], last, since, as_json))
    other = [one for one in found if not one.identical]
    if as_json:
        counts = {"decided_again": len(found), "identical": len(found) - len(other), "not_decided": missing}
        print_json({"tenant": tenant, **counts, "different": [asdict(one) for one in other]})
    else:
        _print(tenant, found, other, missing)
    raise typer.Exit(1 if other or missing else 0)


def _print(tenant: str, found: list[Redecision], other: list[Redecision], missing: list[str]) -> None:
    for name in missing:
        errors.print(f"{name}: no decision of {tenant}", style="red", highlight=False)
    for one in other[:_SHOWN]:
        if one.problem:
            console.print(f"{one.event_id}: {one.problem}", style="red", highlight=False, markup=False)
            continue
        console.print(f"{one.event_id}: {one.outcome_then} then, {one.outcome_now} now", highlight=False)
        for place in one.differences[:_SHOWN]:
            line = f"  {place.pointer}: {place.then!r} then, {place.now!r} now"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(other) > _SHOWN:
        console.print(f"and {len(other) - _SHOWN:,} more that differ: --json shows all", style="dim")
    if found:
        same = len(found) - len(other)
        console.print(f"{len(found):,} decided again: {same:,} identical to the byte, {len(other):,} different")
    elif not missing:
        console.print(f"{tenant} has no decision there")


async def _redecide(
    tenant: str, events: list[str], last: int, since: datetime | None, quiet: bool
) -> tuple[list[Redecision], list[str]]:
    from deploy import keys
    from governance.postgres import engine as pg
    from governance.postgres.directory import tenant_ids
    from governance.postgres.ledger import PostgresLedger
    from governance.postgres.registry import PostgresRegistry
    from workers.redecision import redecide as again

    loaded, scope = local.found_settings(), TenantScope(tenant)
    engine = pg.create_engine(loaded.need("database_url"), application_name="riskfleet-redecide")
    try:
        if scope not in await tenant_ids(engine):
            raise settings.SettingsError(f"there is no tenant {tenant}; see riskfleet tenants")
        registry = PostgresRegistry(engine, SystemClock(), keys.artifact_verifier(loaded))
        ledger, found, missing = PostgresLedger(engine), list[Any](), list[str]()
        with Progress(console=errors, disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
            bar = progress.add_task("decided again", total=len(events) or last)
            async for page, absent in pages(engine, scope, events, last, since):
                found += await again(page, registry, ledger)
                missing += absent
                progress.advance(bar, len(page))
        return found, missing
    finally:
        await pg.dispose(engine)


async def pages(
    engine: AsyncEngine, scope: TenantScope, events: list[str], last: int, since: datetime | None
) -> AsyncIterator[tuple[list[tuple[str, bytes]], list[str]]]:
    """Pages of stored states; with each the names among `events` that nothing was decided for."""
    from governance.postgres.decided import PAGE, newest_states, states_of

    if not events:
        start = _EVER if since is None else since.replace(tzinfo=UTC) if since.tzinfo is None else since
        async for page in newest_states(engine, scope, last, start, datetime.now(UTC)):
            yield page, []
        return
    for begin in range(0, len(events), PAGE):
        names = events[begin : begin + PAGE]
        ids = [name if re.fullmatch(r"[0-9a-f]{32}", name) else event_id_of(scope, name) for name in names]
        stored = await states_of(engine, scope, ids)
        absent = [name for name, event_id in zip(names, ids, strict=True) if event_id not in stored]
        yield [(event_id, stored[event_id]) for event_id in dict.fromkeys(ids) if event_id in stored], absent

"""`riskfleet history`: the feature state and what it is made from."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console

from contracts.tenancy import TenantScope
from deploy import local, settings
from deploy.runtime import RandomIds, SystemClock

if TYPE_CHECKING:
    from governance.postgres.past import PostgresPast
    from resilience.redis_features import RedisFeatureStore

history_app = typer.Typer(no_args_is_help=True, help="Velocity: what was seen of each subject and counterparty.")
console = Console()
errors = Console(stderr=True)


@history_app.callback()
def _group() -> None:
    """Velocity: what was seen of each subject and counterparty."""


@history_app.command("rebuild")
def rebuild(
    tenant: Annotated[str | None, typer.Argument(help="One tenant; default: every tenant.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Merge every event and label of the tables into the feature state, and call it whole. May run at any time, again
    and beside the fleet. Exit 1 when the state was lost once more meanwhile.
    """
    found = asyncio.run(_rebuild(local.found_settings(), tenant))
    if as_json:
        sys.stdout.write(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        for one in found:
            said = "whole" if one["complete"] else "lost again meanwhile: run it once more"
            console.print(f"{one['tenant']}: {one['events']:,} events in {one['seconds']:.1f} s, {said}")
        if not found:
            console.print("there is no tenant yet")
    raise typer.Exit(0 if all(one["complete"] for one in found) else 1)


@history_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Past events: NDJSON, or CSV with --map.")],
    tenant: Annotated[str, typer.Option(help="Whose events they are.")],
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", help="CSV: FIELD=COLUMN, e.g. amount.value=total, or FIELD=:constant; repeat."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Load past events and their labels into the feature state; nothing is decided about them. Goes on where an earlier
    import of the same file ended.
    """
    pairs = [item.partition("=") for item in columns or []]
    if wrong := [field for field, equals, column in pairs if not (field and equals and column)]:
        raise typer.BadParameter(f"--map {wrong[0]}: write FIELD=COLUMN")
    mapped = {field: column for field, _, column in pairs}
    began = time.monotonic()
    count = asyncio.run(_import(local.found_settings(), tenant, file, mapped))
    seconds = time.monotonic() - began
    if as_json:
        found = {"tenant": tenant, "events": count, "seconds": round(seconds, 3)}
        sys.stdout.write(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        console.print(f"{tenant}: {count:,} events in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f} a second)")


async def _import(loaded: settings.Settings, tenant: str, file: Path, columns: dict[str, str]) -> int:
    from deploy.importing import import_file
    from workers.velocity import HealingFeatures

    async with _opened(loaded, tenant) as (store, past, (scope,)):
        count = await import_file(scope, file, columns, store, past, _progress)
        (mark,) = await store.marks([scope])
        if not mark.complete:  # a new tenant, or a state that was lost: its first event should not wait for this
            await HealingFeatures(store, past).rebuild(scope, _progress)
        return count


def _progress(count: int) -> None:
    if sys.stderr.isatty():
        errors.print(f"{count:,} events", end="\r")


@asynccontextmanager
async def _opened(
    loaded: settings.Settings, tenant: str | None
) -> AsyncIterator[tuple[RedisFeatureStore, PostgresPast, list[TenantScope]]]:
    """The feature state, the tables, and the tenants that are meant. Raises SettingsError when there is no such one."""
    from governance.postgres import engine as pg
    from governance.postgres.directory import tenant_ids
    from governance.postgres.past import PostgresPast
    from resilience.redis import connect
    from resilience.redis_features import RedisFeatureStore

    engine = pg.create_engine(loaded.need("database_url"), application_name="riskfleet-history")
    client = connect(loaded.need("redis_url"), timeout_s=30.0)
    try:
        known = list(await tenant_ids(engine))
        scopes = known if tenant is None else [TenantScope(tenant)]
        if unknown := [str(scope) for scope in scopes if scope not in known]:
            raise settings.SettingsError(f"there is no tenant {unknown[0]}; see riskfleet tenants")
        yield RedisFeatureStore(client, SystemClock(), RandomIds()), PostgresPast(engine), scopes
    finally:
        await client.aclose()
        await pg.dispose(engine)


async def _rebuild(loaded: settings.Settings, tenant: str | None) -> list[dict[str, str | int | float | bool]]:
    from workers.velocity import HealingFeatures

    found: list[dict[str, str | int | float | bool]] = []
    async with _opened(loaded, tenant) as (store, past, scopes):
        healing = HealingFeatures(store, past)
        for scope in scopes:
            began, counts = time.monotonic(), [0]

            def merged(count: int, counts: list[int] = counts) -> None:
                counts.append(count)
                _progress(count)

            whole = await healing.rebuild(scope, merged)
            seconds = round(time.monotonic() - began, 3)
            found.append({"tenant": scope.tenant_id, "events": counts[-1], "seconds": seconds, "complete": whole})
    return found

"""`riskfleet history`: the feature state and what it is made from."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated

import orjson
import typer
from rich.console import Console

from contracts.tenancy import TenantScope
from deploy import local, settings
from deploy.runtime import RandomIds, SystemClock
from deploy.servers import running_urls

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
    found = asyncio.run(_rebuild(_found_settings(), tenant))
    if as_json:
        sys.stdout.write(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        for one in found:
            said = "whole" if one["complete"] else "lost again meanwhile: run it once more"
            console.print(f"{one['tenant']}: {one['events']:,} events in {one['seconds']:.1f} s, {said}")
        if not found:
            console.print("there is no tenant yet")
    raise typer.Exit(0 if all(one["complete"] for one in found) else 1)


async def _rebuild(loaded: settings.Settings, tenant: str | None) -> list[dict[str, str | int | float | bool]]:
    from governance.postgres import engine as pg
    from governance.postgres.directory import tenant_ids
    from governance.postgres.past import PostgresPast
    from resilience.redis import connect
    from resilience.redis_features import RedisFeatureStore
    from workers.velocity import HealingFeatures

    engine = pg.create_engine(loaded.need("database_url"), application_name="riskfleet-history")
    client = connect(loaded.need("redis_url"), timeout_s=30.0)
    healing = HealingFeatures(RedisFeatureStore(client, SystemClock(), RandomIds()), PostgresPast(engine))
    found: list[dict[str, str | int | float | bool]] = []
    try:
        known = list(await tenant_ids(engine))
        scopes = known if tenant is None else [TenantScope(tenant)]
        if unknown := [str(scope) for scope in scopes if scope not in known]:
            raise settings.SettingsError(f"there is no tenant {unknown[0]}; see riskfleet tenants")
        for scope in scopes:
            began, counts = time.monotonic(), [0]

            def merged(count: int, counts: list[int] = counts) -> None:
                counts.append(count)
                if sys.stderr.isatty():
                    errors.print(f"{count:,} events", end="\r")

            whole = await healing.rebuild(scope, merged)
            seconds = round(time.monotonic() - began, 3)
            found.append({"tenant": scope.tenant_id, "events": counts[-1], "seconds": seconds, "complete": whole})
    finally:
        await client.aclose()
        await pg.dispose(engine)
    return found


def _found_settings() -> settings.Settings:
    """Settings with the servers of a local fleet that is running here, when no URL is given."""
    loaded = settings.load()
    urls = running_urls(loaded.data_dir) if local.given_urls(loaded) is None else None
    return loaded if urls is None else local.with_servers(loaded, urls)

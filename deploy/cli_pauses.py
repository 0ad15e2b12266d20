"""`riskfleet pauses`: stages and tenants that are paused, pausing and resuming, through the operator API.

Promises: a command acts with its caller's own credential; it holds within 5 s. Holds no rule of its own.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contracts.topology import Stage
from deploy import settings
from deploy.operator import client_from_environment
from deploy.settings import SettingsError

pauses_app = typer.Typer(no_args_is_help=True, help="Pause a stage or a tenant: its events wait, none is lost.")

console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="The tenant, at its doors.")]
InStage = Annotated[Stage | None, typer.Option("--stage", help="The stage, for every tenant.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept for ever.")]


@pauses_app.command("list")
def list_pauses(as_json: AsJson = False) -> None:
    """What is paused now, as far as it is yours to see."""
    with client_from_environment(settings.load().data_dir) as client:
        found = client.get("/ops/v1/pauses")
    if as_json:
        _print_json(found)
    elif not found["pauses"]:
        console.print("nothing is paused")
    else:
        table = Table("what", "reason", "set by", "set at", "until")
        for pause in found["pauses"]:
            shown = (_what(pause), pause["reason"], pause["set_by"], pause["set_at"], pause["until"] or "resumed")
            table.add_row(*(escape(cell) for cell in shown))
        console.print(table)


@pauses_app.command()
def pause(reason: Reason, tenant: Tenant = None, stage: InStage = None, as_json: AsJson = False) -> None:
    """Pause until somebody resumes it; seen everywhere within 5 s."""
    path = _path(tenant, stage)
    with client_from_environment(settings.load().data_dir) as client:
        found = client.put(path, {"reason": reason})
    if as_json:
        _print_json(found)
    else:
        console.print(f"paused: {_what(found)}", highlight=False)


@pauses_app.command()
def resume(reason: Reason, tenant: Tenant = None, stage: InStage = None) -> None:
    """Let it go on, whoever paused it; seen everywhere within 5 s."""
    path = _path(tenant, stage)
    with client_from_environment(settings.load().data_dir) as client:
        client.delete(path, {"reason": reason})
    console.print(f"goes on: {tenant or stage}", highlight=False)


def _path(tenant: str | None, stage: Stage | None) -> str:
    if (tenant is None) == (stage is None):
        raise SettingsError("which one? give --tenant or --stage, not both")
    if stage is not None:
        return f"/ops/v1/tenants/_shared/pauses/{stage.value}"
    return f"/ops/v1/tenants/{quote(str(tenant), safe='')}/pauses/doors"


def _what(pause: Any) -> str:
    return f"stage {pause['place']}" if pause["tenant"] is None else f"tenant {pause['tenant']}"


def _print_json(value: Any) -> None:
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")

"""The command line `riskfleet`.

Exit codes: 0 done · 1 failed or not verified · 2 wrong usage or settings · 3 a dependency is not reachable.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import httpx
import orjson
import typer
from rich.console import Console
from rich.table import Table

from contracts.failures import InfrastructureError, RiskfleetError
from contracts.tenancy import TenantScope
from contracts.topology import Stage
from deploy import (
    cli_backtest,
    cli_bench,
    cli_people,
    cli_redecide,
    cli_train,
    keys,
    local,
    logs,
    provision,
    relayout,
    role,
    settings,
    submit,
)
from deploy import doctor as doctor_checks
from deploy.cli_approvals import approvals_app
from deploy.cli_dlq import dlq_app
from deploy.cli_history import history_app
from deploy.cli_pauses import pauses_app
from deploy.cli_registry import halt_app, registry_app
from deploy.processes import ServersError
from deploy.runtime import SystemClock
from governance.audit import AuditReport
from governance.postgres import engine as pg
from governance.postgres.audit import PostgresAuditLog
from governance.postgres.directory import tenant_ids
from governance.postgres.layouts import LEAD_S

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Real-time risk and compliance decisions.")
topology_app = typer.Typer(no_args_is_help=True, help="The AMQP topology: exchanges, queues, bindings, policies.")
db_app = typer.Typer(no_args_is_help=True, help="The PostgreSQL schema.")
audit_app = typer.Typer(no_args_is_help=True, help="The tamper-evident audit.")
events_app = typer.Typer(no_args_is_help=True, help="Submit events, and see where one is.")
keys_app = typer.Typer(no_args_is_help=True, help="Key material of this installation.")
config_app = typer.Typer(no_args_is_help=True, help="Settings.")
for name, group in {
    "topology": topology_app,
    "db": db_app,
    "audit": audit_app,
    "events": events_app,
    "keys": keys_app,
    "config": config_app,
    "registry": registry_app,
    "halt": halt_app,
    "approvals": approvals_app,
    "dlq": dlq_app,
    "pauses": pauses_app,
    "history": history_app,
}.items():
    app.add_typer(group, name=name)
cli_people.attach(app)
cli_bench.attach(app)
cli_train.attach(app)
cli_redecide.attach(app)
cli_backtest.attach(app)

console = Console()
errors = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HealthPort = Annotated[int | None, typer.Option(help="Health port of this process; 0: a free one.")]
Url = Annotated[str, typer.Option(help="The gateway.", envvar="RISKFLEET_URL")]


class Sink(StrEnum):
    """The sinks."""

    AUDIT = "audit"
    METRICS = "metrics"
    PARKING = "parking"


def _settings() -> settings.Settings:
    return settings.load()


@app.command()
def up(
    demo: Annotated[
        bool, typer.Option("--demo", help="Stream real loan applications and show what was decided.")
    ] = False,
    oneshot: Annotated[
        bool, typer.Option("--oneshot", envvar="ONESHOT", help="Stop after the table; exit 1 unless all adds up.")
    ] = False,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="All roles in one process, in memory, without servers; nothing is kept.")
    ] = False,
) -> None:
    """The whole fleet on this machine: servers, schema, topology, every role."""
    logs.configure("warning", "up")
    if embedded:
        if demo or oneshot:
            raise typer.BadParameter("--embedded streams nothing: use it alone, or try 'riskfleet decide FILE'")
        from deploy.trial import up_embedded

        raise typer.Exit(up_embedded(_settings(), console))
    raise typer.Exit(local.up(_settings(), demo=demo, oneshot=oneshot))


@app.command()
def decide(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSON object or array, NDJSON, or CSV.")],
    columns: Annotated[
        list[str] | None, typer.Option("--map", help="CSV: FIELD=COLUMN, e.g. amount.value=total; repeat.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decide a file of events in memory and show what came out: the one-minute way to try the engine."""
    from deploy.trial import decide_file, decisions_table

    logs.configure("error", "decide")
    began = time.monotonic()
    tried = decide_file(_settings(), file, columns or [], None if as_json else errors)
    if as_json:
        _print_json([item.to_json() for item in tried])
    else:
        console.print(decisions_table(tried, time.monotonic() - began))
    raise typer.Exit(1 if any(item.problem for item in tried) else 0)


@app.command()
def gateway() -> None:
    """The HTTP door; it answers health on its own port."""
    role.run("gateway", None, None)


@app.command()
def ingress(health_port: HealthPort = None) -> None:
    """The AMQP door."""
    role.run("ingress", None, health_port)


@app.command()
def control() -> None:
    """The operator API: registry, approvals, people, tenants."""
    role.run("control", None, None)


@app.command()
def autoscaler() -> None:
    """Decides how many workers each stage should have; answers on RISKFLEET_SCALING_PORT and starts nothing."""
    role.run("autoscaler", None, None)


@app.command()
def worker(stage: Stage, health_port: HealthPort = None) -> None:
    """One stage's worker over all partitions."""
    role.run("worker", stage, health_port)


@app.command()
def sink(kind: Sink, health_port: HealthPort = None) -> None:
    """One sink."""
    role.run("sink", kind, health_port)


@topology_app.command("apply")
def topology_apply(
    partitions: Annotated[
        int | None, typer.Option(min=1, max=100, help="Another number of queues per stage: a new version of them.")
    ] = None,
) -> None:
    """Make every exchange, queue, binding and policy; existing ones stay."""
    loaded = local.found_settings()
    count = asyncio.run(provision.apply_topology(loaded))
    console.print(f"topology applied: {count} things asserted")
    if partitions is not None:
        layout = asyncio.run(relayout.change(loaded, partitions))
        console.print(
            f"{layout.version} with {layout.partitions} partitions takes new entries (a new version from {LEAD_S} s on)"
        )


@topology_app.command("retire")
def topology_retire(
    version: Annotated[str, typer.Argument(help="An old version, such as v1.")],
    wait: Annotated[float, typer.Option(min=60, help="Seconds to wait until it was empty for a minute.")] = 120.0,
) -> None:
    """Remove an old version's queues, once they were empty for a minute and nobody consumes them."""
    asyncio.run(relayout.retire(local.found_settings(), version, wait, SystemClock(), console.print))


@topology_app.command("check")
def topology_check(as_json: AsJson = False) -> None:
    """Compare the broker with what this release wants."""
    loaded = local.found_settings()

    report = asyncio.run(relayout.examine(loaded))
    differences = report.differences
    if as_json:
        _print_json(asdict(report))
    else:
        for one in report.versions:
            line = f"{one.version}: {one.partitions} partitions, {one.state}, {one.left} messages left"
            console.print(line, highlight=False)
        console.print("\n".join(differences) or "the topology is as this release wants it", highlight=False)
        note = "not readable from here: advanced.config must hold dead_letter_worker_publisher_confirm_timeout, 3000"
        console.print(note, style="dim", highlight=False)
    raise typer.Exit(1 if differences else 0)


@db_app.command("upgrade")
def db_upgrade(
    demo: Annotated[bool, typer.Option("--demo", help="Also make the demo tenant, while no user exists.")] = False,
) -> None:
    """Bring the schema to this release."""
    loaded = local.found_settings()
    asyncio.run(provision.migrate(loaded))
    console.print("the schema is up to date")
    if demo:
        made = asyncio.run(provision.demo(loaded))
        where = provision.credentials_file(loaded.data_dir)
        console.print(
            f"demo tenant made; credentials in {where}" if made else "a user exists already: nothing was made"
        )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """A round trip through every dependency; versions; safe settings."""
    findings = asyncio.run(doctor_checks.examine(local.found_settings()))
    if as_json:
        _print_json([finding.to_json() for finding in findings])
    else:
        table = Table("check", "", "found", "ms")
        for f in findings:
            table.add_row(f.check, "[green]ok[/]" if f.ok else "[red]failed[/]", f.found, f"{f.ms:.0f}")
        console.print(table)
    raise typer.Exit(0 if all(f.ok for f in findings) else 3)


@audit_app.command("verify")
def audit_verify(
    tenant: Annotated[
        str | None, typer.Argument(help="One tenant; default: every tenant and the system chain.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify hash chains and compare every decision's trail with them. Exit 1 when anything is wrong."""
    loaded = local.found_settings()

    async def verify() -> list[AuditReport]:
        engine = pg.create_engine(loaded.need("database_url"))
        try:
            scopes: list[TenantScope | None] = [TenantScope(tenant)] if tenant else [*await tenant_ids(engine), None]
            log = PostgresAuditLog(engine, SystemClock())
            return [await log.verify(scope) for scope in scopes]
        finally:
            await pg.dispose(engine)

    reports = asyncio.run(verify())
    if as_json:
        _print_json([asdict(report) for report in reports])
    else:
        table = Table("chain", "records", "decisions", "missing", "orphans", "verdict")
        for r in reports:
            verdict = "[green]verified[/]" if r.intact and not r.missing else f"[red]{r.problem}[/]"
            table.add_row(r.tenant, *(f"{n:,}" for n in (r.records, r.decisions, r.missing, r.orphans)), verdict)
        console.print(table)
    raise typer.Exit(0 if all(r.intact and not r.missing for r in reports) else 1)


@events_app.command("submit")
def events_submit(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSON object or array, NDJSON, or CSV.")],
    url: Url = "http://127.0.0.1:8080",
    key: Annotated[
        str | None, typer.Option(envvar="RISKFLEET_API_KEY", help="API key; default: the demo tenant's.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--map", help="CSV: FIELD=COLUMN, e.g. amount.value=total; repeat.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a file's events through HTTP; one line for each that was refused."""
    answers = submit.submit_file(file, url, _api_key(key), columns or [])
    refused = [answer for answer in answers if not answer.accepted]
    if as_json:
        _print_json([asdict(answer) for answer in answers])
    else:
        for answer in refused:
            errors.print(f"event {answer.index + 1}: {answer.status} {answer.detail}", style="red", highlight=False)
        console.print(f"{len(answers) - len(refused)} of {len(answers)} events accepted")
    raise typer.Exit(1 if refused else 0)


@events_app.command("show")
def events_show(
    event: Annotated[str, typer.Argument(help="An event id (32 hex digits), or the sender's own id.")],
    url: Url = "http://127.0.0.1:8080",
    key: Annotated[
        str | None, typer.Option(envvar="RISKFLEET_API_KEY", help="API key; default: the demo tenant's.")
    ] = None,
) -> None:
    """Where an event is, and what was decided, as JSON."""
    _print_json(submit.show(event, url, _api_key(key)))


@keys_app.command("init")
def keys_init() -> None:
    """Make missing key material; existing keys stay."""
    made = keys.init(_settings().data_dir)
    console.print("\n".join(f"made {path}" for path in made) or "every key exists already")


@config_app.command("example")
def config_example() -> None:
    """Every variable with its default, in the form of `.env.example`."""
    sys.stdout.write(settings.example())


def _api_key(given: str | None) -> str:
    if given:
        return given
    credentials = provision.demo_credentials(_settings().data_dir)
    if credentials is None:
        raise settings.SettingsError("no API key: give --key or RISKFLEET_API_KEY")
    return credentials.api_key


def _print_json(value: object) -> None:
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode() + "\n")


def main() -> None:
    """Run the command line; a known error is one sentence on stderr, never a traceback."""
    try:
        app()
    except (InfrastructureError, httpx.TransportError) as error:
        errors.print(f"not reachable: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(3)
    except settings.SettingsError as error:
        errors.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except (RiskfleetError, ServersError) as error:
        errors.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

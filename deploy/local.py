"""`riskfleet up`: the whole fleet on this machine, from servers to decided demo events.

Promises that a second start reuses everything of the first, and that Ctrl-C drains: doors close first,
then stages in pipeline order, then sinks, then the servers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import uvloop
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from contracts.failures import InfrastructureError
from contracts.topology import STAGES
from deploy import provision
from deploy.demo import loan_applications
from deploy.fleet import Fleet, RoleSpec
from deploy.processes import port_is_free
from deploy.servers import ServerUrls, StartedServers, ensure_servers, running_urls
from deploy.settings import Settings, SettingsError, environment_of, load
from deploy.stream import StreamReport, stream

_READY_S = 60.0
_GRACE_S = 25.0  # a role that is stuck leaves by itself before that
_ROLE = (sys.executable, "-m", "deploy.role")


def given_urls(settings: Settings) -> ServerUrls | None:
    """The URLs that the environment names, None when it names none. Raises SettingsError for only some."""
    names = ("database_url", "migration_database_url", "redis_url", "rabbitmq_url", "rabbitmq_management_url")
    given = [name for name in names if getattr(settings, name) is not None]
    if not given:
        return None
    return ServerUrls(*(settings.need(name) for name in names))


def with_servers(settings: Settings, urls: ServerUrls) -> Settings:
    """The settings with these servers' URLs."""
    return settings.model_copy(
        update={
            "database_url": SecretStr(urls.database),
            "migration_database_url": SecretStr(urls.migration_database),
            "redis_url": SecretStr(urls.redis),
            "rabbitmq_url": SecretStr(urls.rabbitmq),
            "rabbitmq_management_url": SecretStr(urls.rabbitmq_management),
        }
    )


def found_settings() -> Settings:
    """Settings with the servers of a local fleet that is running here, when no URL is given."""
    loaded = load()
    urls = running_urls(loaded.data_dir) if given_urls(loaded) is None else None
    return loaded if urls is None else with_servers(loaded, urls)


def roles(health_base: int, *, scaled: bool = False) -> list[RoleSpec]:
    """Every role of a local fleet in stop order; each has a health port from `health_base` on (the two
    HTTP doors answer health on their own). `scaled`: with the autoscaler.
    """
    named = [
        ("gateway", ("gateway",)),
        ("ingress", ("ingress",)),
        *((str(stage), ("worker", str(stage))) for stage in STAGES),
        *((f"sink-{name}", ("sink", name)) for name in ("parking", "audit", "metrics")),
        ("control", ("control",)),
        *([("autoscaler", ("autoscaler",))] if scaled else []),
    ]
    return [
        RoleSpec(
            name, (*_ROLE, *argv, "--health-port", str(health_base + i if health_base else 0)), _order(name), _GRACE_S
        )
        for i, (name, argv) in enumerate(named)
    ]


def _order(role: str) -> int:
    """Doors first, then stages in pipeline order, then sinks together: what is handed on finds somebody to take it."""
    stages = [str(stage) for stage in STAGES]
    if role in stages:
        return 1 + stages.index(role)
    return len(stages) + 1 if role.startswith("sink-") else 0


def obey(settings: Settings, fleet: Fleet) -> None:
    """Have as many workers of each stage as the autoscaler wants; while it does not answer, as many as there are."""
    for stage in STAGES:
        url = f"http://{settings.health_host}:{settings.scaling_port}/ops/v1/scaling/{stage}"
        try:
            answer = httpx.get(url, timeout=1)
        except httpx.TransportError:
            return
        if answer.status_code == 200:
            fleet.scale(str(stage), min(max(int(answer.json()["desired"]), 1), settings.workers_max))


def up(settings: Settings, *, demo: bool, oneshot: bool, health_base: int = 9100) -> int:
    """Run the fleet until Ctrl-C, or until the demo's table when `oneshot`. Returns the exit code."""
    console = Console()
    say: Callable[[str], None] = lambda line: console.print(line, style="dim", highlight=False)  # noqa: E731
    if settings.http_port and not port_is_free(settings.http_port):
        raise SettingsError(
            f"port {settings.http_port} is taken (another fleet?); stop it, or set RISKFLEET_HTTP_PORT to a free one"
        )
    if settings.control_port and not port_is_free(settings.control_port):
        raise SettingsError(
            f"port {settings.control_port} is taken (another fleet?); stop it, or set RISKFLEET_CONTROL_PORT"
        )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(lambda: list(loan_applications()) if demo else [])  # while the servers start
        urls, servers = ensure_servers(given_urls(settings), settings.data_dir, say)
    try:
        events = reading.result()
        settings = with_servers(settings, urls)
        credentials = asyncio.run(_prepare(settings, say))
        scaled = settings.workers_max > 1

        def look() -> None:
            if servers is not None:
                servers.ensure_alive()
            if scaled:
                obey(settings, fleet)

        fleet = Fleet(roles(health_base, scaled=scaled), _environment(settings), settings.data_dir / "logs", say, look)
        fleet.start()
        try:
            _wait_ready(settings, fleet, stop)
            code = 0
            if demo and not stop.is_set():
                if credentials is None:
                    raise SettingsError("no demo credentials here; remove the data directory to start afresh")
                code = _demo(settings, credentials, events, fleet, stop, console)
            if not oneshot and not stop.is_set():
                _show_urls(console, settings, health_base, servers)
                fleet.run_until(stop.is_set)
        finally:
            say("draining …")
            fleet.stop()
        return code
    finally:
        if servers is not None:
            servers.stop()


async def _prepare(settings: Settings, say: Callable[[str], None]) -> provision.DemoCredentials | None:
    began = time.monotonic()
    await provision.migrate(settings)
    count = await provision.apply_topology(settings)
    await provision.demo(settings)
    say(f"schema and topology ready ({count} things, {time.monotonic() - began:.1f} s)")
    return provision.demo_credentials(settings.data_dir)


def _environment(settings: Settings) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
    absolute = settings.model_copy(update={"data_dir": settings.data_dir.resolve()})
    return kept | environment_of(absolute)


def _wait_ready(settings: Settings, fleet: Fleet, stop: threading.Event) -> None:
    """Until the gateway is ready. The stages need no wait: queues hold what comes before them."""
    url = f"http://{settings.http_host}:{settings.http_port}/health/ready"
    deadline = time.monotonic() + _READY_S
    while not stop.is_set():
        fleet.tick()
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"the gateway was not ready after {_READY_S:.0f} s; its log is in the data directory"
            )
        time.sleep(0.1)


def _demo(
    settings: Settings,
    credentials: provision.DemoCredentials,
    events: list[dict[str, object]],
    fleet: Fleet,
    stop: threading.Event,
    console: Console,
) -> int:
    """Stream in a thread; supervise in this one, since children die with the thread that started them."""
    result: list[StreamReport | BaseException] = []

    def work() -> None:
        try:
            result.append(uvloop.run(stream(settings, credentials, events, show=console.is_terminal)))
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            result.append(error)

    thread = threading.Thread(target=work, name="stream", daemon=True)
    thread.start()
    fleet.run_until(lambda: stop.is_set() or not thread.is_alive())
    if not result:
        return 1
    if isinstance(result[0], BaseException):
        raise result[0]
    show_report(console, result[0])
    return 0 if result[0].complete else 1


def show_report(console: Console, report: StreamReport) -> None:
    """The table at the end of a stream."""
    c, a = report.counts, report.audit
    table = Table(title=f"{report.sent:,} loan applications, half by HTTP, half by AMQP")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_row("events", f"{c.events:,}")
    table.add_row("decisions (revision 1)", f"{c.decisions:,}")
    for outcome, count in c.by_outcome.items():
        table.add_row(f"  {outcome}", f"{count:,}")
    table.add_row("open dead letters", f"{c.dead_letters:,}")
    table.add_row("messages left in queues", f"{report.queued:,}")
    table.add_section()
    table.add_row("sent, events/s", f"{report.sent / max(report.sending_s, 1e-9):,.0f}")
    table.add_row("settled, events/s (audit included)", f"{report.sent / max(report.settled_s, 1e-9):,.0f}")
    table.add_row("receipt to decision, p50", f"{report.latencies.p50_s * 1000:,.0f} ms")
    table.add_row("receipt to decision, p99", f"{report.latencies.p99_s * 1000:,.0f} ms")
    table.add_section()
    table.add_row("audit records", f"{a.records:,}")
    table.add_row("audit", f"{'verified' if a.intact else 'NOT VERIFIED: ' + str(a.problem)}")
    table.add_row("missing / orphans", f"{a.missing:,} / {a.orphans:,}")
    console.print(table)
    if not report.complete:
        console.print("[bold red]not complete[/]: events, decisions and queues above do not add up")


def _show_urls(console: Console, settings: Settings, health_base: int, servers: StartedServers | None) -> None:
    base = f"http://{settings.http_host}:{settings.http_port}"
    names = [role.name for role in roles(health_base)]
    metrics = f"http://{settings.health_host}:{health_base + names.index('sink-metrics')}/metrics"
    operators = f"http://{settings.control_host}:{settings.control_port}"
    console.print(f"gateway   {base}/v1/events   health {base}/health/ready", highlight=False)
    console.print(f"documents {base}/docs", highlight=False)
    console.print(f"operators {operators}/ops/v1   (riskfleet login)", highlight=False)
    console.print(f"metrics   {metrics}", highlight=False)
    console.print(f"demo key  in {provision.credentials_file(settings.data_dir)}", highlight=False)
    console.print(f"people    in {provision.first_login_file(settings.data_dir)}", highlight=False)
    console.print(f"logs      in {Path(settings.data_dir) / 'logs'}", highlight=False)
    if servers is not None:
        console.print("Ctrl-C drains and stops everything; the data stays for the next start", highlight=False)

"""The command `riskfleet bench`."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from deploy import local, logs, settings
from deploy.provision import DemoCredentials, demo_credentials
from deploy.servers import running_urls


class BenchDoor(StrEnum):
    """The doors."""

    HTTP = "http"
    AMQP = "amqp"


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    events: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many events.")] = 10_000,
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="Events per second, open loop; latency from the intended moment.")
    ] = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Lay down a backlog, start the stages, time it to the last audit record.")
    ] = False,
    door: Annotated[
        BenchDoor, typer.Option(help="Where a rate goes in; HTTP waits for each decision.")
    ] = BenchDoor.HTTP,
    tenants: Annotated[int, typer.Option(min=1, max=10_000, help="How many tenants send.")] = 1,
    skew: Annotated[float, typer.Option(min=0.0, max=4.0, help="Zipf exponent over the tenants; 0: all alike.")] = 0.0,
    payload: Annotated[int, typer.Option(min=0, max=16_384, help="Bytes added to each event.")] = 0,
    single: Annotated[
        bool, typer.Option("--single", help="A backlog of one event per message, not of the door's carriers.")
    ] = False,
    stages: Annotated[str, typer.Option(help="Workers of each stage: 2, or retrieval=2,decision=3.")] = "1",
    partitions: Annotated[int, typer.Option(min=1, max=99, help="Queues per stage.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the events.")] = 1,
    patience: Annotated[float, typer.Option(min=1.0, help="Seconds without progress until the run gives up.")] = 60.0,
    url: Annotated[
        str | None, typer.Option(help="The gateway of a fleet that runs here; default: a private fleet.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with drawings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """What a fleet carries and what an event costs, and whether each was decided once (exit 1 if not)."""
    from deploy.bench.plan import BenchPlan, stage_counts
    from deploy.bench.report import html as page
    from deploy.bench.report import table
    from deploy.bench.run import bench as run_private

    if drain == (rate is not None):
        raise settings.SettingsError("give one of --drain and --rate")
    if url is not None and (drain or door is BenchDoor.AMQP or tenants > 1 or stages != "1"):
        raise settings.SettingsError("--url measures a running fleet as it is: use it with --rate over HTTP only")
    logs.configure("error", "bench")
    errors = Console(stderr=True)
    plan = BenchPlan(
        events, rate, door.value, tenants, skew, payload, single, partitions, seed, stage_counts(stages), patience
    )
    say = lambda line: errors.print(line, style="dim", highlight=False)  # noqa: E731
    # A benchmark that is told to end takes its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if url is None:
        report = run_private(plan, say)
    else:
        import uvloop

        from deploy.bench.run import measure

        report = uvloop.run(measure(_Running(url), plan, say))
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
    if as_json:
        option = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
        sys.stdout.write(orjson.dumps(report.to_json(), option=option, default=str).decode() + "\n")
    else:
        Console().print(table(report))
    raise typer.Exit(0 if report.good else 1)


class _Running:
    """A fleet that runs on this machine and is measured as it is; whose processes are known only by its servers."""

    def __init__(self, url: str) -> None:
        from httpx import URL

        loaded = settings.load()
        found = running_urls(loaded.data_dir) if local.given_urls(loaded) is None else None
        loaded = loaded if found is None else local.with_servers(loaded, found)
        where = URL(url)
        self.settings = loaded.model_copy(update={"http_host": where.host, "http_port": where.port or 80})
        made = demo_credentials(loaded.data_dir)
        if made is None:
            raise settings.SettingsError(
                "no demo credentials in the data directory: the load is sent as the demo tenant"
            )
        self.tenants: list[DemoCredentials] = [made]
        self._fleet = loaded.data_dir / "logs" / "fleet.json"

    def pids(self) -> dict[str, list[int]]:
        """What the fleet's supervisor wrote down."""
        if not self._fleet.exists():
            return {}
        return {name: [pid] for name, pid in orjson.loads(self._fleet.read_bytes()).items()}

    def start_stages(self) -> None:
        """They run already."""

    def stages_ready(self) -> bool:
        """Whoever runs a fleet has its stages run."""
        return True

"""Runs every rival and riskfleet in turn on fresh private servers and writes docs/performance.md with its plot.

    python -m tests.load.rivals.run [--quick] [--rounds 3] [--only celery,riskfleet] [--venvs DIR] [--out docs]

Each rival lives in a virtual environment of its own below `--venvs`. A round runs all contenders one after another, the
order turned by one each round, so that a slow minute of the machine does not meet the same one always; figures are
medians over the rounds with the least and the greatest beside them. The clock of a drain runs from the first step
(riskfleet: from the moment when all stage workers consume, which is earlier) to the last row.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import redis
import sqlalchemy

from deploy.bench.machine import Cost, costs, cpu_between, hardware
from deploy.bench.run import percentiles
from deploy.servers import NativeServers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SERVERS: Final = ("rabbitmq", "redis", "postgresql")
_WORK = ["psycopg[binary]", "redis", "hiredis", "orjson"]


@dataclass(frozen=True)
class Rival:
    """How a contender is installed and started; `differs` says where its work is not equal to ours."""

    name: str
    mechanism: str
    packages: tuple[str, ...]
    worker: tuple[str, ...]
    settings: str
    differs: str


RIVALS: Final = (
    Rival(
        "celery",
        "tasks over RabbitMQ",
        ("celery<6",),
        ("-m", "celery", "-A", "celery_rival", "worker", "--loglevel=ERROR", "--without-gossip", "--without-mingle"),
        "acks late, quorum queue, confirms, prefork 2 per core, prefetch 16",
        "5 audit rows in the decision's transaction, no chain; no locks, no fencing",
    ),
    Rival(
        "dramatiq",
        "actors over RabbitMQ",
        ("dramatiq[rabbitmq]",),
        ("-m", "dramatiq", "dramatiq_rival", "--processes", str(os.cpu_count() or 2), "--threads", "4"),
        "ack after the step, confirms, one process per core with 4 threads",
        "as Celery; classic durable queues instead of quorum queues",
    ),
    Rival(
        "dbos",
        "workflows in PostgreSQL",
        ("dbos",),
        ("dbos_rival.py", "worker"),
        "every step checkpointed, 32 workflows at a time, queue polled every 0.1 s",
        "as Celery; no broker",
    ),
    Rival(
        "faststream",
        "FastStream, one message at a time",
        ("faststream[rabbit]", "asyncpg", "uvloop"),
        ("faststream_rival.py", "worker"),
        "quorum queues, confirms, uvloop, prefetch 64, pool of 8",
        "as Celery",
    ),
)


@dataclass
class Figures:
    """What one contender came to over the rounds."""

    events_per_s: list[float] = field(default_factory=list)
    cpu_all: list[float] = field(default_factory=list)
    cpu_clients: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    rate: float = 0.0
    problems: list[str] = field(default_factory=list)


def say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def install(rival: Rival, venvs: Path) -> Path:
    """The rival's interpreter, its packages installed."""
    directory, stamp = venvs / rival.name, venvs / rival.name / ".installed"
    if not stamp.exists():
        say(f"installing {rival.name} into {directory}")
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        packages = [*rival.packages, *_WORK]
        subprocess.run([directory / "bin/python", "-m", "pip", "-q", "install", *packages], check=True, timeout=600)
        stamp.touch()
    return directory / "bin/python"


def version_of(python: Path, rival: Rival) -> str:
    code = f"from importlib.metadata import version; print(version({rival.name!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def fresh_servers() -> Iterator[NativeServers]:
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-rivals-"))
    directory.chmod(0o711)
    native = NativeServers(directory)
    try:
        native.start()
        yield native
    finally:
        native.stop()
        shutil.rmtree(directory, ignore_errors=True)


class Trial:
    """One rival on fresh servers."""

    def __init__(self, rival: Rival, python: Path, native: NativeServers) -> None:
        urls = native.urls()
        self._rival, self._python, self._native = rival, python, native
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | {
            "RIVAL_RABBITMQ": urls.rabbitmq.partition("?")[0],
            "RIVAL_REDIS": urls.redis,
            "RIVAL_DATABASE": urls.migration_database,
            "PYTHONPATH": str(HERE),
        }
        self._redis = redis.Redis.from_url(urls.redis)
        url = urls.migration_database.replace("postgresql://", "postgresql+asyncpg://")
        self._database = Rows(url)

    def drain(self, events: int, within_s: float) -> tuple[float, float, float]:
        """events/s, CPU seconds per 1,000 of everything, and of the workers alone."""
        self._client("fill", str(events))
        with self._worker() as worker:
            self._until(lambda: self._redis.exists("rival:started"), within_s, 0.02)
            before = self._costs(worker)
            began = float(self._redis.get("rival:started") or 0)
            self._until(lambda: self._database.decided() >= events, within_s, 0.25)
            after = self._costs(worker)
        used = cpu_between(before, after)
        self._check(events)
        rate = events / (self._database.last() - began)
        scale = 1_000 / events
        return rate, sum(used.values()) * scale, used["clients"] * scale

    def rate(self, rate: float, events: int, within_s: float) -> dict[str, float]:
        """Latency (ms) from the intended moment to the decision's row."""
        self._redis.flushdb()
        self._database.clear()
        with self._worker():
            # A first event shows that the worker consumes; it is not measured.
            self._client("rate", "10", "1")
            self._until(lambda: self._database.decided() >= 1, within_s, 0.1)
            self._database.clear()
            self._client("rate", str(rate), str(events))
            self._until(lambda: self._database.decided() >= events, within_s, 0.25)
        return percentiles(self._database.latencies())

    def _client(self, *arguments: str) -> None:
        script = [str(self._python), f"{self._rival.name}_rival.py", *arguments]
        subprocess.run(script, cwd=HERE, env=self._environment, check=True, timeout=600)

    @contextmanager
    def _worker(self) -> Iterator[int]:
        argv = [str(self._python), *self._rival.worker]
        process = subprocess.Popen(
            argv, cwd=HERE, env=self._environment, stdout=subprocess.DEVNULL, stderr=sys.stderr, start_new_session=True
        )
        self._process = process
        try:
            yield process.pid
        finally:
            self._process = None
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def _costs(self, worker: int) -> dict[str, Cost]:
        return costs({name: [pid] for name, pid in self._native.pids().items()} | {"clients": [worker]})

    def _check(self, events: int) -> None:
        audited = self._database.audited()
        assert audited == 5 * events, f"{self._rival.name}: {audited} audit rows for {events} events"

    def _until(self, good: Any, within_s: float, every_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not good():
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(f"{self._rival.name}: its worker ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._rival.name} did not finish within {within_s:.0f} s")
            time.sleep(every_s)


class Rows:
    """What PostgreSQL holds of a rival's work."""

    def __init__(self, url: str) -> None:
        self._url = url

    def decided(self) -> int:
        return int(self._one("SELECT count(*) FROM rival_decisions"))

    def audited(self) -> int:
        return int(self._one("SELECT count(*) FROM rival_audit"))

    def last(self) -> float:
        return float(self._one("SELECT extract(epoch FROM max(decided_at)) FROM rival_decisions"))

    def latencies(self) -> list[float]:
        rows = self._rows("SELECT extract(epoch FROM decided_at) - intended FROM rival_decisions")
        return [float(row[0]) * 1_000 for row in rows]

    def clear(self) -> None:
        self._rows("TRUNCATE rival_decisions, rival_audit", answers=False)

    def _one(self, sql: str) -> Any:
        return self._rows(sql)[0][0]

    def _rows(self, sql: str, *, answers: bool = True) -> Sequence[Any]:
        import asyncio

        from sqlalchemy.ext.asyncio import create_async_engine

        async def ask() -> Sequence[Any]:
            engine = create_async_engine(self._url)
            try:
                async with engine.begin() as connection:
                    result = await connection.execute(sqlalchemy.text(sql))
                    return result.all() if answers else ()
            finally:
                await engine.dispose()

        return asyncio.run(ask())


def ours(*arguments: str) -> dict[str, Any]:
    """One run of `riskfleet bench` in a process of its own."""
    argv = [sys.executable, "-m", "deploy.cli", "bench", "--json", *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"riskfleet bench ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_ours(figures: Figures, kind: str, events: int, rate: float, rated: int) -> None:
    single = ["--single"] if kind.endswith("single") else []
    drained = ours("--drain", "--events", str(events), *single)
    figures.events_per_s.append(drained["events_per_s"])
    figures.cpu_all.append(drained["cpu_s_per_1000"])
    clients = {k: v for k, v in drained["cpu_s_per_1000_by_kind"].items() if k not in SERVERS}
    figures.cpu_clients.append(sum(clients.values()))
    if not single:
        figures.rate = rate
        figures.p99_ms.append(ours("--rate", str(rate), "--events", str(rated))["p99_ms"])


def run_rival(figures: Figures, rival: Rival, python: Path, sizes: tuple[int, float, int]) -> None:
    events, rate, rated = sizes
    with fresh_servers() as native:
        trial = Trial(rival, python, native)
        carried, cpu, clients = trial.drain(events, 300)
        figures.events_per_s.append(carried)
        figures.cpu_all.append(cpu)
        figures.cpu_clients.append(clients)
        # A rate that a rival does not carry would measure the length of its queue.
        figures.rate = rate if carried > 1.2 * rate else max(5.0, round(carried / 2 / 5) * 5.0)
        figures.p99_ms.append(trial.rate(figures.rate, rated, 300).get("p99", 0.0))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median with the least and the greatest."""
    if not values:
        return "–"
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} … {high:,.{digits}f})"


def page(found: Mapping[str, Figures], versions: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The text of docs/performance.md."""
    rivals = {rival.name: rival for rival in RIVALS}
    rows = [
        f"| {name} {versions.get(name, '')} | {spread(f.events_per_s)} | {spread(f.cpu_all, 2)} | "
        f"{spread(f.cpu_clients, 2)} | {spread(f.p99_ms)} at {f.rate:.0f}/s |"
        for name, f in sorted(found.items(), key=lambda item: -median(item[1].events_per_s or [0]))
    ]
    notes = [
        f"| {name} | {rivals[name].mechanism} | {rivals[name].settings} | {rivals[name].differs} |"
        for name in found
        if name in rivals
    ]
    machine = ", ".join(f"{key} {value}" for key, value in hardware().items())
    problems = [f"* {name}: {problem}" for name, f in found.items() for problem in f.problems]
    return "\n".join(
        [
            "# Performance",
            "",
            (
                "Written by `make bench-rivals`. Four chained steps, each reading and writing a state in Redis, the "
                "last ending in a decision and five audit rows in PostgreSQL; durable, at least once; every server on "
                "the same cores and counted. Medians (least … greatest) of interleaved rounds."
            ),
            "",
            "| engine | events/s, draining a backlog | CPU s per 1,000 events | of it clients | p99, ms |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "![events per second](performance.svg)",
            "",
            "## What is not equal",
            "",
            (
                "Ours does more: each event is locked and fenced at every step, its five audit records stand in a hash "
                "chain per tenant that is verified after each run, the real stages run (history, policies, model), "
                "and its p99 ends when the HTTP caller holds the decision; a rival's ends at its row. CPU of the load "
                "generator is not counted for anybody; ours includes idle doors and sinks."
            ),
            "",
            "| rival | mechanism | settings | differs from ours |",
            "|---|---|---|---|",
            *notes,
            "",
            "## Method",
            "",
            f"{machine}. "
            + ", ".join(f"{key} {value}" for key, value in settings.items())
            + ". A drain of ours runs from the moment "
            "when every stage worker consumes to the last audit record; of a rival from its first step to its last "
            "row. A rate is open loop, latencies count from the intended moment. Servers are private and fresh "
            "for every run.",
            *(["", "## What went wrong", "", *problems] if problems else []),
            "",
        ]
    )


def plot(found: Mapping[str, Figures]) -> str:
    """Bars of events/s with their spread."""
    ordered = sorted(((n, f) for n, f in found.items() if f.events_per_s), key=lambda i: -median(i[1].events_per_s))
    top = max((max(f.events_per_s) for _, f in ordered), default=1.0)
    marks = []
    for i, (name, f) in enumerate(ordered):
        y, scale = 10 + 30 * i, 440 / top
        low, middle, high = min(f.events_per_s), median(f.events_per_s), max(f.events_per_s)
        colour = "#2463a8" if name.startswith("riskfleet") else "#9aa5ad"
        marks += [
            f"<text x='150' y='{y + 14}' text-anchor='end'>{name}</text>",
            f"<rect x='160' y='{y}' width='{middle * scale:.1f}' height='18' fill='{colour}'/>",
            f"<path d='M{160 + low * scale:.1f} {y + 9}H{160 + high * scale:.1f}' stroke='#222'/>",
            f"<text x='{168 + high * scale:.1f}' y='{y + 14}'>{middle:,.0f}</text>",
        ]
    style = "<style>text{font:13px system-ui,sans-serif}</style>"
    height = 30 * len(ordered) + 12
    box = f"viewBox='0 0 680 {height}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {box}>{style}{''.join(marks)}</svg>\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every rival and riskfleet in turn, on this machine.")
    parser.add_argument("--quick", action="store_true", help="one round of few events, for trying")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=5_000, help="of a rival's backlog")
    parser.add_argument("--our-events", type=int, default=20_000, help="of our backlog, which drains faster")
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--only", default="", help="names, comma separated")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".rivals")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    # A run that is told to end takes its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = 1 if given.quick else given.rounds
    events, own = (300, 1_000) if given.quick else (given.events, given.our_events)
    rated = int(given.rate * (3 if given.quick else 20))
    every = [*(rival.name for rival in RIVALS), "riskfleet", "riskfleet-single"]
    names = [name for name in every if not given.only or name in given.only.split(",")]
    rivals = {rival.name: rival for rival in RIVALS}
    pythons = {name: install(rivals[name], given.venvs) for name in names if name in rivals}
    versions = {name: version_of(python, rivals[name]) for name, python in pythons.items()}
    found = {name: Figures() for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            say(f"round {number + 1} of {rounds}: {name}")
            try:
                if name in rivals:
                    run_rival(found[name], rivals[name], pythons[name], (events, given.rate, rated))
                else:
                    run_ours(found[name], name, own, given.rate, rated)
            except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
                found[name].problems.append(f"round {number + 1}: {error}")
                say(f"{name}: {error}")
            say(f"{name}: {found[name]}")
    settings = {"rounds": rounds, "events": events, "our events": own, "seed": 1}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "performance.md").write_text(page(found, versions, settings), encoding="utf-8")
    (given.out / "performance.svg").write_text(plot(found), encoding="utf-8")
    return 1 if any(figures.problems for figures in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make chaos`: the fleet under load and a seeded nemesis, judged by a checker that believes nobody.

    python -m tests.faults.chaos [--minutes 30] [--seed 1] [--rate 60] [--evidence docs/evidence/chaos.json]

Prints a line every ten seconds and a table at the end. Exit codes: 0 every promise held and the faults bit, 1 a promise
was broken or the run is void, 2 wrong usage, 3 the servers could not be started. A failed run keeps its directory.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
import structlog
import uvloop

from contracts.failures import InfrastructureError
from contracts.ports import DecisionRow
from deploy.embedded import embedded
from deploy.native import find_binaries
from deploy.processes import ServersError
from deploy.settings import Settings
from resilience.management import BrokerManagement
from tests.faults import observing
from tests.faults.armed import places_of
from tests.faults.checker import Bites, Floors, Key, Observations, Verdict, judge
from tests.faults.clients import Clients, Doors
from tests.faults.load import (
    SHAPES,
    Door,
    History,
    LoadProfile,
    Op,
    Submission,
    Variant,
    accepted_events,
    arrivals,
    body_of,
    canary,
)
from tests.faults.nemesis import Deeds, Kind, Nemesis, Profile, overlapping, plan
from tests.faults.rig import ChaosRig, chaos_rig, own_servers

LONG_MINUTES: Final = 30.0
_MOST_UNDECIDED: Final = 1_500
_SETTLE_S: Final = 240.0
_PROGRESS_S: Final = 10.0
_GETS: Final = 1_500


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is told. `rate`: mean events per second over all tenants."""

    minutes: float = LONG_MINUTES
    seed: int = 1
    rate: float = 60.0
    tenants: tuple[str, ...] = ("acme", "globex", "initech")
    lease_ms: int = 2_000

    @property
    def part(self) -> float:
        """How much of the long profile this is."""
        return self.minutes / LONG_MINUTES

    def faults(self, roles: Sequence[str]) -> Profile:
        """The long profile's faults, or their share of them; every kind comes at least once."""

        def some(count: int) -> int:
            return max(1, round(count * self.part))

        return Profile(
            seconds=self.minutes * 60,
            roles=tuple(roles),
            kills=some(600),
            pauses=max(3, some(150)),
            proxy=max(7, some(150)),
            redis=some(40),
            postgresql=some(30),
            rabbitmq=some(20),
            flushes=some(10),
            terms=some(20),
            lease_s=self.lease_ms / 1000,
        )

    def floors(self) -> Floors:
        """What must have happened at least."""
        return Floors() if self.part >= 1 else Floors().scaled(self.part)


@dataclass
class Report:
    """A run and its verdict."""

    options: Options
    verdict: Verdict
    observations: Observations
    deeds: Deeds
    counts: dict[str, int]
    versions: dict[str, str]
    took_s: float
    defects: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every promise held, the faults bit, and the clients and the supervisor had no defect of their own."""
        return self.verdict.sound and not self.verdict.void and not self.defects

    def to_json(self, command: str) -> dict[str, Any]:
        """The evidence."""
        restarts = sorted(self.deeds.restarts_s)
        return {
            "command": command,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.options.seed,
            "minutes": self.options.minutes,
            "rate": self.options.rate,
            "took_s": round(self.took_s, 1),
            "hardware": hardware(),
            "versions": self.versions,
            "faults": dict(self.deeds.done),
            "faults_total": sum(self.deeds.done.values()),
            "failpoints": dict(sorted(self.deeds.places.items())),
            "restart_s": {"median": _middle(restarts), "longest": round(restarts[-1], 2) if restarts else None},
            "server_back_s": {name: _middle(times) for name, times in sorted(self.deeds.servers_s.items())},
            "counts": self.counts,
            "bites": asdict(self.observations.bites),
            "rules": [asdict(rule) for rule in self.verdict.rules],
            "void_unless": [asdict(rule) for rule in self.verdict.bites],
            "defects": self.defects,
            "verdict": "passed" if self.passed else "void" if self.verdict.sound and not self.defects else "broken",
        }


def hardware() -> dict[str, Any]:
    """The machine, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model = "unknown"
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "cpu": model, "kernel": platform.release()}


def _middle(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


async def twin_outcomes() -> dict[int, str]:
    """The outcome of every shape in a run without faults: the same rooms in one process."""
    bodies = [
        orjson.dumps(body_of(Submission(0, f"twin-{shape}", Variant.MEANT, shape, Door.HTTP), "demo"))
        for shape in range(SHAPES)
    ]
    async with embedded(Settings(environment="test")) as fleet:
        answers = await fleet.decide(bodies)
    outcomes = {}
    for shape, answer in enumerate(answers):
        assert isinstance(answer, DecisionRow), f"the twin refused shape {shape}: {answer}"
        outcomes[shape] = str(answer.outcome)
    assert set(outcomes.values()) == {"APPROVED", "REQUIRE_APPROVAL", "REJECTED"}, "the shapes miss an outcome"
    return outcomes


class Run:
    """One run on a rig."""

    def __init__(self, rig: ChaosRig, options: Options, say: Any) -> None:
        self._rig, self._options, self._say = rig, options, say
        self._history = History(rig.directory / "history.jsonl")
        self._clients = Clients(Doors(rig.http, rig.urls.rabbitmq), rig.tenants, self._history, options.seed)
        self._nemesis = Nemesis(rig, self._history.now)
        self._listeners = [observing.Listener(rig.urls.rabbitmq, tenant) for tenant in rig.tenants]
        metrics = f"http://127.0.0.1:{rig.ports['sink-metrics']}/metrics"
        self._sampler = observing.Sampler(metrics, rig.urls.rabbitmq_management)
        self._room = asyncio.Event()
        self._progress = (0, 0, 0)

    async def go(self) -> Report:
        """Load and faults, then quiet, then every question that an outsider can ask."""
        began = time.monotonic()
        twin = await twin_outcomes()
        rig, options = self._rig, self._options
        url = await observing.make_observer(rig.urls.migration_database, rig.urls.database)
        database = observing.Database(url, rig.scopes)
        for listener, tenant in zip(self._listeners, rig.tenants, strict=True):
            listener.start([canary(other.tenant) for other in rig.tenants if other is not tenant])
        self._sampler.start()
        await self._clients.start()
        watching = asyncio.create_task(self._watch(database))
        try:
            profile = options.faults(rig.roles)
            # Faults that wait for their place take longer than planned; the load goes on until the last has struck.
            load = arrivals(options.seed, LoadProfile(options.minutes * 150 + 120, options.rate, len(rig.tenants)))
            playing = asyncio.create_task(self._clients.play(load, room=self._room))
            await self._nemesis.run(plan(options.seed, profile))
            playing.cancel()
            await self._nemesis.heal()
            healed = time.monotonic()
            self._say("healed; settling")
            decided_s, audited_s = await self._settled(database, healed)
        finally:
            watching.cancel()
            await self._clients.close()
        await self._sampler.stop()
        try:
            report = await self._judged(database, twin, decided_s, audited_s)
        finally:
            await database.close()
            for listener in self._listeners:
                await asyncio.to_thread(listener.stop)
            self._history.close()
        report.took_s = time.monotonic() - began
        return report

    async def _watch(self, database: observing.Database) -> None:
        """A line every ten seconds, and room for load only while the fleet is not too far behind."""
        next_line = 0.0
        self._room.set()
        while True:
            with suppress(InfrastructureError, OSError):
                self._progress = await database.progress()
            accepted = len(accepted_events(self._history.lines))
            if accepted - self._progress[1] > _MOST_UNDECIDED:
                self._room.clear()
            else:
                self._room.set()
            if self._history.now() >= next_line:
                next_line = self._history.now() + _PROGRESS_S
                self._line(accepted)
            await asyncio.sleep(1.0)

    def _line(self, accepted: int) -> None:
        deeds = self._nemesis.deeds
        self._say(
            f"{self._history.now():6.0f} s  accepted {accepted:,}  decided {self._progress[1]:,}"
            f"  parked {self._progress[2]:,}  unanswered {self._clients.unanswered:,}"
            f"  faults {sum(deeds.done.values()):,} (kills {deeds.kills}, at places {deeds.placed})"
            f"  redelivered {self._sampler.redelivered:,}"
            f"  stale {self._sampler.total('riskfleet_stale_writes_refused_total'):,}"
        )

    async def _settled(self, database: observing.Database, healed: float) -> tuple[float | None, float | None]:
        """Seconds from healing until everything is decided (or parked, or rejected) and audited."""
        answering = asyncio.create_task(self._clients.settle(_SETTLE_S))

        async def all_ended() -> bool:
            if not answering.done():
                return False
            ended = await database.ended()
            for listener in self._listeners:
                ended |= self._rejected(listener)
            return not {key for key, valid in self._accepted_valid().items() if valid} - ended

        async def all_audited() -> bool:
            return all(chain.intact and not chain.missing for chain in await database.chains())

        first = await observing.until(all_ended, _SETTLE_S)
        decided_s = None if first is None else time.monotonic() - healed
        await answering
        second = await observing.until(all_audited, _SETTLE_S)
        audited_s = None if second is None else time.monotonic() - healed
        await observing.until(self._queues_empty, 90)
        return decided_s, audited_s

    def _rejected(self, listener: observing.Listener) -> set[Key]:
        return {(one.tenant, one.event_id) for one in list(listener.rejections.values())}

    def _accepted_valid(self) -> dict[Key, bool]:
        return {
            (line.tenant, line.event_id): line.variant is not Variant.INVALID
            for line in self._history.lines
            if line.op is Op.OK
        }

    async def _queues_empty(self) -> bool:
        rig = self._rig
        return await observing.unacked(rig.urls.rabbitmq_management, rig.scopes, rig.settings.partitions) == 0

    async def _judged(
        self, database: observing.Database, twin: Mapping[int, str], decided_s: float | None, audited_s: float | None
    ) -> Report:
        rig = self._rig
        tables = await database.tables()
        seen, foreign = [*tables.decisions], [*tables.foreign]
        for place, tenant in enumerate(rig.tenants):
            others = [canary(other.tenant) for other in rig.tenants if other is not tenant]
            feed, found = await observing.read_feed(rig.http, tenant, others)
            seen += feed
            foreign += found
            mine = [one.key[1] for one in tables.decisions if one.key[0] == tenant.tenant]
            seen += await observing.get_events(rig.http, tenant, mine[:: max(1, len(mine) // _GETS)])
            stranger = rig.tenants[(place + 1) % len(rig.tenants)]
            foreign += await observing.foreign_reads(rig.http, stranger, mine[:20])
            seen += self._listeners[place].seen.values()
            foreign += self._listeners[place].foreign
        depths = await asyncio.to_thread(observing.depths, rig.urls.rabbitmq, rig.scopes, rig.settings.partitions)
        observations = Observations(
            lines=self._history.lines,
            events=tables.events,
            seen=seen,
            letters=tables.letters,
            rejections=[one for listener in self._listeners for one in listener.rejections.values()],
            chains=await database.chains(),
            trails=tables.trails,
            foreign_canaries=foreign,
            depths=depths,
            twin=twin,
            decided_s=decided_s,
            audited_s=audited_s,
            bites=self._bites(),
        )
        verdict = judge(observations, self._options.floors())
        counts = self._counts(observations)
        return Report(
            self._options, verdict, observations, self._nemesis.deeds, counts, await versions(rig), 0.0, self._defects()
        )

    def _defects(self) -> list[str]:
        """What went wrong beside the promises: clients that died, roles that ended by a defect or did not drain.

        Exit codes 0 and 3 are none: told to end, and a server that was away while the role started.
        """
        ended = [line for line in self._rig.said if "ended with exit code" in line]
        crashed = [line for line in ended if not line.partition("exit code ")[2].startswith(("0;", "3;"))]
        return [*self._clients.defects, *crashed, *(line for line in self._rig.said if "did not drain" in line)]

    def _bites(self) -> Bites:
        deeds, sampler = self._nemesis.deeds, self._sampler
        spans = overlapping(deeds.spans)
        answers = [
            line
            for line in self._history.lines
            if line.variant is Variant.MEANT
            and line.op in (Op.OK, Op.UNKNOWN)
            and any(start <= line.at_s <= end for start, end in spans)
        ]
        wanted = {place for role in self._rig.roles for place in places_of(role)}
        return Bites(
            redeliveries=sampler.redelivered,
            duplicates_suppressed=sampler.total("riskfleet_duplicates_suppressed_total"),
            stale_writes_refused=sampler.total("riskfleet_stale_writes_refused_total"),
            confirms_lost=self._rig.proxies["rabbitmq"].tally.confirms_lost,
            decision_conflicts=sampler.total("riskfleet_decision_conflicts_total"),
            requests_during_faults=len(answers),
            accepted_during_faults=sum(line.op is Op.OK for line in answers),
            kills=deeds.kills,
            pauses=deeds.pauses,
            at_failpoints=deeds.placed,
            failpoints={place: deeds.places[place] for place in sorted(wanted)},
            kills_in_half_settled=deeds.half_settled,
            pauses_across_flush=deeds.across_flush,
        )

    def _counts(self, seen: Observations) -> dict[str, int]:
        sampler = self._sampler
        return {
            "accepted": len(accepted_events(seen.lines)),
            "attempts": sum(line.op is Op.INVOKE for line in seen.lines),
            "unknown": sum(line.op is Op.UNKNOWN for line in seen.lines),
            "without_a_definite_answer": self._clients.unanswered,
            "left_out_for_want_of_room": self._clients.skipped,
            "events": len(seen.events),
            "decided": sum(one.observer == "rows" for one in seen.seen),
            "parked": len(seen.letters),
            "parked_open": sum(letter.status == "open" for letter in seen.letters),
            "rejections": len(seen.rejections),
            "audit_records": sum(chain.records for chain in seen.chains),
            "orphans": sum(chain.orphans for chain in seen.chains),
            "messages_to_upstream": sum(listener.messages for listener in self._listeners),
            "seen_by_get": sum(one.observer == "get" for one in seen.seen),
            "audit_duplicates_suppressed": sampler.labelled("riskfleet_audit_records_total", "present"),
            "suspects": sampler.total("riskfleet_suspects_total"),
            "lock_waits": sampler.total("riskfleet_lock_waits_total"),
            "fell_back_from_a_place": self._nemesis.deeds.fell_back,
        }


async def versions(rig: ChaosRig) -> dict[str, str]:
    """Of the engine and the servers."""
    from deploy.runtime import RandomIds
    from governance.postgres import create_engine
    from governance.postgres import engine as pg
    from resilience.redis import RedisStateStore, connect

    engine = create_engine(rig.urls.database, pool_size=1)
    store = RedisStateStore(connect(rig.urls.redis), RandomIds().token())
    management = BrokerManagement(rig.urls.rabbitmq_management)
    try:
        return {
            "riskfleet": rig.settings.version,
            "python": platform.python_version(),
            "rabbitmq": await management.version(),
            "redis": await store.version(),
            "postgresql": await pg.ping(engine),
        }
    finally:
        await management.close()
        await store.close()
        await engine.dispose()


def table(report: Report) -> str:
    """For people."""
    c, bites = report.counts, report.observations.bites
    rows: list[tuple[str, str]] = [
        ("seed, minutes", f"{report.options.seed}, {report.options.minutes:g}"),
        ("faults", f"{sum(report.deeds.done.values()):,}"),
        *((f"  {kind}", f"{report.deeds.done[kind]:,}") for kind in Kind),
        ("kills and pauses at named places", f"{bites.at_failpoints:,} of {bites.kills + bites.pauses:,}"),
        ("a killed role is back at work after", f"{_middle(report.deeds.restarts_s)} s (median)"),
        *(
            (f"{name} answers again after", f"{_middle(times)} s (median), {max(times):.1f} s (longest)")
            for name, times in report.deeds.servers_s.items()
        ),
        *((name.replace("_", " "), f"{count:,}") for name, count in c.items()),
        ("", ""),
        *((rule.name, _said(rule.holds, rule.found)) for rule in report.verdict.rules),
        ("", ""),
        *((rule.name, _said(rule.holds, rule.found)) for rule in report.verdict.bites),
        *(("defect", defect) for defect in report.defects),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for rule in report.verdict.broken:
        lines += [f"NOT: {rule.name}: {example}" for example in rule.examples]
    verdict = "PASSED" if report.passed else "VOID" if report.verdict.sound and not report.defects else "BROKEN"
    return "\n".join([*lines, f"{verdict} in {report.took_s:.0f} s"])


def _said(holds: bool, found: str) -> str:
    return found if holds else f"{found}  <-- NOT"


def hush() -> None:
    """Our own clients meet every fault too; what their libraries say about it is not what the run is about."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    for name in ("aiormq", "aio_pika", "pika", "asyncio", "httpx"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def run(options: Options, directory: Path, say: Any) -> Report:
    """One whole run with servers of its own below `directory`."""
    hush()
    # PostgreSQL's account must be able to pass through.
    directory.chmod(0o711)
    (directory / "fleet").mkdir()

    async def inside(native: Any) -> Report:
        servers_dir = directory / "servers"
        fleet_dir = directory / "fleet"
        async with chaos_rig(native, servers_dir, fleet_dir, tenants=options.tenants, lease_ms=options.lease_ms) as rig:
            return await Run(rig, options, say).go()

    with own_servers(directory / "servers") as native:
        return uvloop.run(inside(native))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=LONG_MINUTES, help="minutes under faults (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="of load and faults (default 1)")
    parser.add_argument("--rate", type=float, default=60.0, help="mean events per second (default 60)")
    parser.add_argument("--evidence", type=Path, help="write the evidence here (JSON)")
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.rate <= 0:
        parser.error("--minutes and --rate are more than nothing")
    if missing := find_binaries()[1]:
        sys.stderr.write(f"not installed: {', '.join(missing)}; make test installs them with YES=1\n")
        return 3

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    # Told to end, also in the background, it ends in order: what was started is stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    options = replace(Options(), minutes=given.minutes, seed=given.seed, rate=given.rate)
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-chaos-"))
    say(f"seed {options.seed}, {options.minutes:g} minutes, {options.rate:g} events/s, in {directory}")
    try:
        report = run(options, directory, say)
    except ServersError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    say(table(report))
    if given.evidence is not None:
        command = f"make chaos MINUTES={options.minutes:g} SEED={options.seed} RATE={options.rate:g}"
        given.evidence.parent.mkdir(parents=True, exist_ok=True)
        document = orjson.dumps(report.to_json(command), option=orjson.OPT_INDENT_2)
        given.evidence.write_bytes(document + b"\n")
    if report.passed:
        shutil.rmtree(directory, ignore_errors=True)
        return 0
    say(f"history, logs and what fired stay in {directory / 'fleet'}")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""One run of a plan: the fleet, its clients and its faults in virtual time, then the oracle.

Promises that clients behave as the protocol tells them: an answer that is unknown or 503 is asked for again under the
same identity, until there is one. The run ends once every client has its answer, nothing is left to happen and the
queues ran dry; not running dry within the deadline is a violation.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from random import Random
from typing import Any, Final

import orjson

from contracts.failures import classify
from contracts.ports import Confirm, Message
from contracts.tenancy import TenantScope
from contracts.topology import INGEST, STAGES, WORK, stage_queue
from gateway.intake import Admission, Refusal, Submission
from governance.memory.audit import RECORDS
from governance.memory.ledger import DECISIONS
from governance.memory.records import DEAD_LETTERS
from tests.simulation.fleet import LEASE_S, TENANTS, Fleet, Process
from tests.simulation.loop import Life, VirtualLoop
from tests.simulation.oracle import Answered, Observed, orphans, violations
from tests.simulation.plans import LONGEST_S, Fault, Mode, Plan, Sent, Strike

DEADLINE_S: Final = 900.0
_CLIENT_TIMEOUT_S: Final = 8.0
_RUNS: Final = itertools.count()
_COLLECT_EVERY: Final = 16


@dataclass
class Result:
    """What came of a run."""

    plan: Plan
    violations: list[str]
    trace: int
    virtual_s: float
    seen: dict[str, int]
    struck: int
    hits: dict[str, int] = field(default_factory=dict)


class Run:
    """A plan on a fleet."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = Random(plan.seed)
        self.loop = VirtualLoop(self.random)  # type: ignore[abstract] # what it lacks needs a real world
        self.answers: list[Answered] = []
        self.struck = 0
        self._left: list[list[Any]] = [[strike, strike.hit] for strike in plan.strikes]
        self._poisons = 0
        self._seen: list[Message] = []

    def result(self) -> Result:
        """Run to the end."""
        self.loop.owned(self.loop.world).run(self._make)
        dry = self.loop.run(self._main())
        fleet = self.fleet
        found = violations(self._observed(), self.answers, self._poisons)
        if not dry:
            waiting = {name: depth for name, depth in fleet.broker.depths().items() if _busy(name, depth)}
            found.append(f"the queues did not run dry within {DEADLINE_S} s: {sorted(waiting)}")
        found += [f"a task ended with {type(e['exception']).__name__}: {e['exception']}" for e in self.loop.errors]
        return Result(
            self.plan, found, self.loop.trace, self.loop.time(), self._counted(), self.struck,
            {f"{kind}:{place}": n for (kind, place), n in fleet.counts.hits.items()},
        )  # fmt: skip

    def _observed(self) -> Observed:
        fleet = self.fleet
        return Observed(fleet.database, fleet.broker, fleet.redis, TENANTS, fleet.counts.faults["kill"])

    def _counted(self) -> dict[str, int]:
        fleet = self.fleet
        return {
            **{name.removeprefix("riskfleet_"): n for name, n in fleet.counts.metrics.items()},
            **{f"fault {name}": n for name, n in fleet.counts.faults.items()},
            "deliveries": fleet.deliveries,
            "redelivered": fleet.redelivered,
            "accepted": sum(answer.accepted for answer in self.answers),
            "decided": len(fleet.database.contents(DECISIONS)),
            "records": len(fleet.database.contents(RECORDS)),
            "letters": len(fleet.database.contents(DEAD_LETTERS)),
            "orphans": orphans(self._observed()),
        }

    def _make(self) -> None:
        asyncio._set_running_loop(self.loop)
        try:
            self.fleet = Fleet(self.loop, self.random, partitions=self.plan.partitions, workers=self.plan.workers)
        finally:
            asyncio._set_running_loop(None)
        self.fleet.on_reach, self.fleet.on_armed = self._reach, self._armed

    async def _main(self) -> bool:
        ticking = asyncio.create_task(self.fleet.broker.run())
        clients = [asyncio.create_task(self._send(group)) for group in _groups(self.plan.sent)]
        for fault in self.plan.faults:
            self.loop.call_later(fault.at, self._happen, fault)
        healed = max((_healed(fault) for fault in self.plan.faults), default=0.0)
        calm = 0
        while calm < 2 and self.loop.time() < DEADLINE_S:
            await asyncio.sleep(1.0)
            ready = all(client.done() for client in clients) and self.loop.time() > healed + 1
            calm = calm + 1 if ready and self._quiet() else 0
        ticking.cancel()
        return calm >= 2

    def _quiet(self) -> bool:
        fleet = self.fleet
        if any(process.life is not Life.RUNNING for process in fleet.processes.values()):
            return False
        return not any(_busy(name, depth) for name, depth in fleet.broker.depths().items())

    # --- clients --------------------------------------------------------------------------------------------

    async def _send(self, group: Sequence[Sent]) -> None:
        await asyncio.sleep(group[0].at)
        if group[0].door == "amqp":
            await self._upstream(group[0])
            return
        wanted = [Answered(TENANTS[one.tenant], one.identity, one.body, one.door) for one in group]
        left = list(wanted)
        while left:
            verdicts = await self._ask(group[0].tenant, left)
            for answer, verdict in zip(tuple(left), verdicts, strict=True):
                if isinstance(verdict, Admission):
                    answer.accepted, answer.decision = True, verdict.decision
                elif isinstance(verdict, Refusal) and classify(verdict.error).status < 500:
                    answer.refused = classify(verdict.error).problem
                else:
                    continue
                left.remove(answer)
            if left:
                await asyncio.sleep(1.0)
        self.answers += wanted

    async def _ask(self, tenant: int, wanted: Sequence[Answered]) -> Sequence[Admission | Refusal | None]:
        """One request to some gateway; nothing for each item when no answer came in time."""
        gateways = [p for p in self.fleet.of_kind("gateway") if p.intake is not None]
        gateway = self.random.choice(gateways) if gateways else None
        if gateway is None:
            return [None] * len(wanted)
        work = self.loop.create_task(_request(gateway, TENANTS[tenant], wanted), context=gateway.context)
        await asyncio.wait({work}, timeout=_CLIENT_TIMEOUT_S)
        return work.result() if work.done() else [None] * len(wanted)

    async def _upstream(self, one: Sent) -> None:
        scope = TENANTS[one.tenant]
        answer = Answered(scope, one.identity, one.body, "amqp")
        kind = orjson.loads(one.body)["kind"]
        publisher = self.fleet.broker.publisher("upstream", user=f"up-{scope}")
        message = Message(
            INGEST, f"{scope}.{kind}", one.body, one.identity, user_id=f"up-{scope}", content_type="application/json"
        )
        while (await publisher.publish([message]))[0] is not Confirm.CONFIRMED:  # noqa: ASYNC110 - asked again
            await asyncio.sleep(1.0)
        answer.accepted = True
        self.answers.append(answer)

    # --- faults ---------------------------------------------------------------------------------------------

    def _live(self) -> list[list[Any]]:
        return self._left[:1] if self.plan.chained else self._left

    def _armed(self, process: Process, place: str) -> bool:
        return any((s.kind, s.place, left) == (process.kind, place, 1) for s, left in self._live())

    def _reach(self, process: Process, place: str) -> bool:
        for row in self._live():
            strike: Strike = row[0]
            if (strike.kind, strike.place) != (process.kind, place):
                continue
            row[1] -= 1
            if row[1] <= 0:
                self._left.remove(row)
                self.struck += 1
                self._strike(process, strike.mode)
                return True
        return False

    def _strike(self, process: Process, mode: Mode) -> None:
        if mode is Mode.PAUSE:
            self.fleet.stop(process, LEASE_S + 20)  # long enough for another to take over
        else:
            self.fleet.kill(process, restart_s=1.0 if mode is Mode.RESTART else 60.0, known_dead=mode is Mode.RESTART)

    def _happen(self, fault: Fault) -> None:
        fleet, counts = self.fleet, self.fleet.counts.faults
        process = next((p for p in fleet.of_kind(fault.kind) if p.life is Life.RUNNING), None)
        size = int(fault.size)
        match fault.what:
            case "kill" if process:
                fleet.kill(process, known_dead=self.random.random() < 0.5)
            case "kill-step" if process:
                process.at_step = (process.steps + size, lambda: fleet.kill(process))
            case "pause" if process:
                fleet.stop(process, fault.size)
            case "drain" if process:
                fleet.drain(process)
            case "skew" if process:
                process.clock.skew = timedelta(seconds=fault.size)
                counts["skew"] += 1
            case "cut" if process:
                counts["cut"] += fleet.broker.cut(process.boot)
            case "lose-confirms" | "lose-messages" | "refuse" if process:
                name = fault.what.replace("-", "_")
                setattr(process.publisher_faults, name, getattr(process.publisher_faults, name) + size)
                counts[fault.what] += size
            case "duplicate":
                self._duplicate(size)
            case "poison":
                self._poison(fault.kind if fault.kind in STAGES else STAGES[0])
            case _:
                self._server(fault)

    def _server(self, fault: Fault) -> None:
        fleet = self.fleet
        fleet.counts.faults[fault.what] += 1
        match fault.what:
            case "broker-restart":
                fleet.broker.restart()
            case "alarm":
                fleet.broker.alarm(True)
                self.loop.call_later(fault.size, fleet.broker.alarm, False)
            case "flush":
                fleet.flush()
            case "lost-tail":
                fleet.redis.forget_since(fleet.clock.now() - timedelta(seconds=min(fault.size, fault.at)))
            case "redis-down":
                fleet.redis.down = True
                self.loop.call_later(fault.size, setattr, fleet.redis, "down", False)
            case "db-fail":
                fleet.database.fail_next(int(fault.size))
            case "db-lost-reply":
                fleet.database.lose_replies(int(fault.size))
            case "db-down":
                fleet.database.down = True
                self.loop.call_later(fault.size, setattr, fleet.database, "down", False)

    def _duplicate(self, number: int) -> None:
        """Messages that wait at the stages once more, as a broker may: now, and again much later."""
        for stage in STAGES:
            for partition in range(self.plan.partitions):
                self._seen += self.fleet.broker.ready(stage_queue(stage, partition))
        for message in self._seen[:number]:
            self.fleet.broker._accept(self.fleet.broker.user, message)
            self.loop.call_later(20.0, self.fleet.broker._accept, self.fleet.broker.user, message)
            self.fleet.counts.faults["duplicate"] += 2

    def _poison(self, stage: str) -> None:
        body = b"RFC1\x00\x01 poison %d" % self._poisons
        self._poisons += 1
        message = Message(WORK, stage_queue(stage, 0), body, f"poison-{self._poisons}")
        self.fleet.broker._accept(self.fleet.broker.user, message)
        self.fleet.counts.faults["poison"] += 1


async def _request(gateway: Process, scope: TenantScope, wanted: Sequence[Answered]) -> list[Admission | Refusal]:
    template = Submission(scope, None, b"", None, None, None, "http")
    assert gateway.intake is not None
    if len(wanted) == 1:
        answers = [await gateway.intake.admit(replace(template, body=wanted[0].body))]
    else:
        answers = await gateway.intake.admit_batch([one.body for one in wanted], template)
    await gateway.reach("answered")
    return answers


def _groups(sent: Sequence[Sent]) -> list[list[Sent]]:
    """Items of one batch of one tenant go together; everything else alone."""
    groups: dict[tuple[Any, ...], list[Sent]] = {}
    for number, one in enumerate(sent):
        key = (one.tenant, one.batch) if one.door == "batch" else (number,)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _healed(fault: Fault) -> float:
    """When a fault is over (s). What a lost tail brings back holds its lock until the lease has run out."""
    return fault.at + (LEASE_S if fault.what == "lost-tail" else min(fault.size, LONGEST_S))


def _busy(name: str, depth: Any) -> bool:
    return not name.startswith("up.") and depth.ready + depth.unacked + depth.stuck > 0


def run(plan: Plan) -> Result:
    """Run a plan. What dead tasks hold is thrown away here, in silence: their processes are gone.

    Nothing is collected meanwhile: the `finally` of a dead process of one run must not run inside another.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    collecting = gc.isenabled()
    gc.disable()
    try:
        return Run(plan).result()
    finally:
        if next(_RUNS) % _COLLECT_EVERY == 0:
            gc.collect()
            gc.freeze()  # what is there for good need not be looked through again
        sys.unraisablehook = hook
        if collecting:
            gc.enable()

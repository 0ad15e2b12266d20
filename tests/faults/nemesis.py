"""The nemesis: a plan of faults as a pure function of seed and profile, and its execution on a fleet of our own.

Promises: the same seed and profile give the same plan; only processes and servers of the given rig are touched, each
by its number; whatever it did is written down as it happened; `heal` leaves no fault behind. Does not promise that a
planned fault bites: what is armed and not passed in time falls back to a kill or a pause wherever the process is, and
is counted as such.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

import orjson

from tests.faults.armed import HALF_SETTLED, Order, places_of
from tests.faults.proxy import FaultProxy, Way, Weather

SERVERS: Final = ("rabbitmq", "redis", "postgresql")
_ARMED_FOR_S: Final = 30.0
_LOOK_S: Final = 0.05
_FLUSH_WAIT_S: Final = 30.0
_CUT_WAIT_S: Final = 20.0
HALF_SETTLED_ENTRIES: Final = 8


class Kind(StrEnum):
    """The kinds of fault."""

    KILL = "kill"  # SIGKILL of a role
    TERM = "term"  # SIGTERM of a role: it drains
    PAUSE = "pause"  # SIGSTOP beyond the lease, then SIGCONT
    PROXY = "proxy"
    REDIS = "redis"  # SIGKILL and restart, half of them with a lost tail
    POSTGRESQL = "postgresql"
    RABBITMQ = "rabbitmq"
    FLUSH = "flush"  # FLUSHALL


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault. `place`: a named failpoint of the role, None: wherever it is at that time.

    `how` is what a proxy does, or `lost-tail`; `for_s` how long a pause or a proxy's fault lasts; `sever`: the
    connections of a paused role to RabbitMQ are lost meanwhile, so that somebody else takes over; `least_entries`: the
    carrier that the place must be passed with (of a FLUSHALL: the pauses that it waits for).
    """

    kind: Kind
    target: str
    place: str | None = None
    how: str = ""
    for_s: float = 0.0
    sever: bool = False
    least_entries: int = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """How much of each, over `seconds`; the first and the last `calm_s` stay without faults. `lease_s` is the fleet's.

    `placed` is the share of kills and pauses at named places; `full` the share of kills that wait at a place inside a
    settlement for a carrier of 8 entries or more. Around each FLUSHALL `across` roles are paused.
    """

    seconds: float
    roles: tuple[str, ...]
    kills: int
    pauses: int
    proxy: int
    redis: int
    postgresql: int
    rabbitmq: int
    flushes: int
    terms: int = 0
    lease_s: float = 2.0
    calm_s: float = 3.0
    placed: float = 0.85
    full: float = 0.42
    across: int = 3


ACROSS: Final = "across"
"""How a pause is that lasts from before a FLUSHALL until after it."""

PROXY_FAULTS: Final = ("latency", "throttle", "reset", "half-open-up", "half-open-down", "refuse", "cut-confirms")


def plan(seed: int, profile: Profile) -> list[tuple[float, Fault]]:
    """(seconds from the beginning, fault), sorted by time: each kind evenly, at random in its slot."""
    chance = random.Random(f"nemesis:{seed}")
    planned: list[tuple[float, Fault]] = []
    planned += _over(chance, profile, _kills(chance, profile))
    planned += _over(chance, profile, [Fault(Kind.TERM, role) for role in _dealt(chance, profile.roles, profile.terms)])
    planned += _over(chance, profile, _proxy_faults(chance, profile.proxy))
    tails = ["lost-tail" if i % 2 else "" for i in range(profile.redis)]
    planned += _over(chance, profile, [Fault(Kind.REDIS, "redis", how=how) for how in tails])
    planned += _over(chance, profile, [Fault(Kind.POSTGRESQL, "postgresql")] * profile.postgresql)
    planned += _over(chance, profile, [Fault(Kind.RABBITMQ, "rabbitmq")] * profile.rabbitmq)
    across = min(profile.pauses, profile.flushes * profile.across)
    each = across // max(profile.flushes, 1)
    flushes = _over(
        chance, profile, [Fault(Kind.FLUSH, "redis", for_s=profile.lease_s * 1.5, least_entries=each)] * profile.flushes
    )
    planned += flushes
    planned += _around(chance, profile, [at_s for at_s, _ in flushes], across)
    planned += _over(chance, profile, _pauses(chance, profile, profile.pauses - across))
    return sorted(planned, key=lambda item: item[0])


def _over(chance: random.Random, profile: Profile, faults: Sequence[Fault]) -> list[tuple[float, Fault]]:
    room = profile.seconds - 2 * profile.calm_s
    slot = room / max(len(faults), 1)
    return [(round(profile.calm_s + (i + chance.random()) * slot, 3), fault) for i, fault in enumerate(faults)]


def _dealt(chance: random.Random, choices: Sequence[str], number: int) -> list[str]:
    """Each choice equally often, in random order: nothing is missed by bad luck."""
    found: list[str] = []
    while len(found) < number:
        found += chance.sample(list(choices), len(choices))
    return found[:number]


def _kills(chance: random.Random, profile: Profile) -> list[Fault]:
    pairs = [f"{role}|{place}" for role in profile.roles for place in places_of(role)]
    halves = [pair for pair in pairs if pair.partition("|")[2] in HALF_SETTLED]
    full, placed = round(profile.kills * profile.full), round(profile.kills * profile.placed)
    faults = [
        Fault(Kind.KILL, role, place, least_entries=HALF_SETTLED_ENTRIES)
        for role, _, place in (pair.partition("|") for pair in _evenly(chance, halves, full))
    ]
    faults += [
        Fault(Kind.KILL, role, place)
        for role, _, place in (pair.partition("|") for pair in _evenly(chance, pairs, placed - full))
    ]
    faults += [Fault(Kind.KILL, role) for role in _dealt(chance, profile.roles, profile.kills - placed)]
    chance.shuffle(faults)
    return faults


def _pauses(chance: random.Random, profile: Profile, number: int) -> list[Fault]:
    pairs = [f"{role}|{place}" for role in profile.roles for place in places_of(role)]
    placed = round(number * profile.placed)
    faults = []
    for pair in _evenly(chance, pairs, placed):
        role, _, place = pair.partition("|")
        faults.append(_pause(chance, profile, role, place))
    faults += [_pause(chance, profile, role, None) for role in _dealt(chance, profile.roles, number - placed)]
    chance.shuffle(faults)
    return faults


def _pause(chance: random.Random, profile: Profile, role: str, place: str | None) -> Fault:
    # Beyond the lease whatever the rounding; half of them lose their connections, so that another takes over.
    for_s = round(profile.lease_s * (1.3 + chance.random()), 2)
    return Fault(Kind.PAUSE, role, place, for_s=for_s, sever=chance.random() < 0.7)


def _evenly(chance: random.Random, pairs: Sequence[str], number: int) -> list[str]:
    """Pairs dealt so that each *place* comes equally often, whatever the number of roles that pass it."""
    by_place: dict[str, list[str]] = {}
    for pair in pairs:
        by_place.setdefault(pair.partition("|")[2], []).append(pair)
    return [chance.choice(by_place[place]) for place in _dealt(chance, sorted(by_place), number)]


def _around(
    chance: random.Random, profile: Profile, flushes: Sequence[float], number: int
) -> list[tuple[float, Fault]]:
    """Pauses that begin before a FLUSHALL, with locks in hand, and end after it; the FLUSHALL waits for them."""
    stages = [role for role in profile.roles if "claimed" in places_of(role)] or list(profile.roles)
    found = []
    for i in range(number):
        at_s = max(0.0, flushes[i % len(flushes)] - 2.0)
        role, place = stages[i % len(stages)], chance.choice(("claimed", "worked"))
        found.append((at_s, replace(_pause(chance, profile, role, place), how=ACROSS, for_s=profile.lease_s * 1.5)))
    return found


def _proxy_faults(chance: random.Random, number: int) -> list[Fault]:
    faults = []
    for name in _dealt(chance, PROXY_FAULTS, number):
        target = "rabbitmq" if name == "cut-confirms" else chance.choice(SERVERS)
        for_s = round(0.5 + chance.random() * 2.5, 2)
        faults.append(Fault(Kind.PROXY, target, how=name, for_s=for_s))
    return faults


def weather_of(how: str) -> Weather:
    """What a proxy's fault is; `reset` is no weather."""
    match how:
        case "latency":
            return Weather(latency_s=0.25)
        case "throttle":
            return Weather(bytes_per_s=40_000)
        case "half-open-up":
            return Weather(swallow=frozenset({Way.UP}))
        case "half-open-down":
            return Weather(swallow=frozenset({Way.DOWN}))
        case "refuse":
            return Weather(refuse=True)
        case "cut-confirms":
            return Weather(cut_confirms=True)
    raise ValueError(f"there is no such weather: {how}")


class Rig(Protocol):
    """The fleet that is tormented."""

    @property
    def arm_dir(self) -> Path:
        """Where processes look for their orders."""

    @property
    def fired_file(self) -> Path:
        """Where they write that they fired."""

    @property
    def proxies(self) -> Mapping[str, FaultProxy]:
        """By server."""

    async def pids(self) -> Mapping[str, int]:
        """The numbers of the roles that run now."""

    async def at_work(self, role: str) -> bool:
        """Whether the role's process has started and listens on its health port."""

    async def kill_server(self, name: str, *, lose_tail: bool = False) -> None:
        """SIGKILL a server; its supervisor starts it again."""

    async def server_back(self, name: str, within_s: float) -> None:
        """Wait until it answers."""

    async def flush(self) -> None:
        """FLUSHALL."""

    async def all_back(self, within_s: float) -> None:
        """Wait until every server answers and every role runs."""


@dataclass
class Deeds:
    """What was done: counts by kind, kills and pauses by place, and the moments between which faults were active."""

    done: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    pauses: int = 0
    placed: int = 0
    fell_back: int = 0
    half_settled: int = 0
    across_flush: int = 0
    restarts_s: list[float] = field(default_factory=list)
    servers_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    spans: list[tuple[float, float]] = field(default_factory=list)
    log: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Paused:
    role: str
    pid: int
    began: float
    across: bool = False


class Nemesis:
    """Carries a plan out."""

    def __init__(self, rig: Rig, now: Callable[[], float]) -> None:
        """`now` is the clock of the run's history, in seconds."""
        self._rig, self._now = rig, now
        self.deeds = Deeds()
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[dict[str, object]]] = {}
        # One fault at a time per role: a kill of a role that is just starting would only ever hit its imports.
        self._roles: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._weather: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._servers: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._paused: dict[int, _Paused] = {}
        self._flushed = asyncio.Event()
        self._holding: set[asyncio.Task[None]] = set()
        self._read_to = 0

    async def run(self, planned: Sequence[tuple[float, Fault]]) -> None:
        """Begin each fault at its time; returns when the last has ended."""
        began = self._now()
        tasks: set[asyncio.Task[None]] = set()
        watcher = asyncio.create_task(self._watch_fired())
        try:
            for at_s, fault in planned:
                await asyncio.sleep(max(0.0, began + at_s - self._now()))
                task = asyncio.create_task(self._commit(fault))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        finally:
            for task in list(tasks):
                task.cancel()
            watcher.cancel()

    async def heal(self) -> None:
        """End every fault: proxies calm, stopped processes continued, arming files gone, all back."""
        for proxy in self._rig.proxies.values():
            await proxy.heal()
        for paused in list(self._paused.values()):
            _signal(paused.pid, signal.SIGCONT)
        for file in self._rig.arm_dir.glob("*.arm"):
            file.unlink(missing_ok=True)
        await self._rig.all_back(90.0)

    async def _commit(self, fault: Fault) -> None:
        began = self._now()
        act: Mapping[Kind, Callable[[Fault], Awaitable[bool]]] = {
            Kind.KILL: self._strike,
            Kind.PAUSE: self._strike,
            Kind.TERM: self._term,
            Kind.PROXY: self._proxy,
            Kind.REDIS: self._server,
            Kind.POSTGRESQL: self._server,
            Kind.RABBITMQ: self._server,
            Kind.FLUSH: self._flush,
        }
        if await act[fault.kind](fault):
            self.deeds.done[str(fault.kind)] += 1
            self._note(str(fault.kind), target=fault.target, place=fault.place, how=fault.how, began=began)
        self.deeds.spans.append((began, self._now()))

    def _note(self, what: str, **more: object) -> None:
        self.deeds.log.append({"at_s": round(self._now(), 3), "what": what} | more)

    # --- processes ------------------------------------------------------------------------------------

    async def _strike(self, fault: Fault) -> bool:
        """Kill or pause a role, at its place if it passes there in time."""
        role = fault.target
        async with self._roles[role]:
            fired = await self._at_place(fault, role) if fault.place else None
            pid = int(str(fired["pid"])) if fired else await self._running(role)
            if fired is None:
                self.deeds.fell_back += fault.place is not None
                _signal(pid, signal.SIGKILL if fault.kind is Kind.KILL else signal.SIGSTOP)
            else:
                self._count_place(fault, fired)
            if fault.kind is Kind.KILL:
                self.deeds.kills += 1
                await self._back(role, pid)
            else:
                self.deeds.pauses += 1
                await self._hold(fault, role, pid)
        return True

    def _count_place(self, fault: Fault, fired: Mapping[str, object]) -> None:
        self.deeds.placed += 1
        self.deeds.places[str(fired["place"])] += 1
        many = int(str(fired["entries"])) >= HALF_SETTLED_ENTRIES
        if fault.kind is Kind.KILL and many and fired["place"] in HALF_SETTLED:
            self.deeds.half_settled += 1

    async def _running(self, role: str) -> int:
        while True:
            pid = (await self._rig.pids()).get(role)
            if pid is not None:
                return pid
            await asyncio.sleep(_LOOK_S)

    async def _at_place(self, fault: Fault, role: str) -> dict[str, object] | None:
        """Arm the place and wait for it; None when nothing passed there (or nothing large enough) in time."""
        assert fault.place is not None
        self._numbers += 1
        number, file = self._numbers, self._rig.arm_dir / f"{role}.arm"
        future: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        least = fault.least_entries
        order = Order(number, fault.place, "kill" if fault.kind is Kind.KILL else "stop", least)
        deadline = self._now() + _ARMED_FOR_S
        _write(file, order)
        try:
            while self._now() < deadline:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ARMED_FOR_S * 2 / 3 if least > 1 else _ARMED_FOR_S):
                        return await asyncio.shield(future)
                if least > 1:  # no large carrier came: any will do
                    least = 1
                    _write(file, replace(order, least_entries=1))
            file.unlink(missing_ok=True)
            await asyncio.sleep(0.3)  # it may have fired just now
            return future.result() if future.done() else None
        finally:
            self._waiting.pop(number, None)

    async def _watch_fired(self) -> None:
        """Read what processes wrote before they fired."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self._rig.fired_file.exists():
                continue
            with self._rig.fired_file.open("rb") as file:
                file.seek(self._read_to)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read_to += len(whole)
            for line in whole.splitlines():
                fired = orjson.loads(line)
                self._note("fired", **fired)
                future = self._waiting.get(fired["number"])
                if future is not None and not future.done():
                    future.set_result(fired)

    async def _back(self, role: str, gone: int) -> None:
        """Wait until the supervisor has started the role again and it is at work."""
        began = self._now()
        while True:
            pid = (await self._rig.pids()).get(role, gone)
            if pid != gone and await self._rig.at_work(role):
                break
            await asyncio.sleep(_LOOK_S)
        self.deeds.restarts_s.append(self._now() - began)

    async def _hold(self, fault: Fault, role: str, pid: int) -> None:
        """Keep a stopped process stopped, perhaps cut off from RabbitMQ, then let it go on as if nothing had been."""
        paused = _Paused(role, pid, self._now(), across=fault.how == ACROSS)
        self._paused[pid] = paused
        if fault.sever:
            ports = local_ports(pid)
            self._rig.proxies["rabbitmq"].reset(ports)
        if paused.across:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_WAIT_S):
                    await self._flushed.wait()
        await asyncio.sleep(fault.for_s)
        _signal(pid, signal.SIGCONT)
        self._paused.pop(pid, None)

    async def _term(self, fault: Fault) -> bool:
        role = fault.target
        async with self._roles[role]:
            pid = await self._running(role)
            _signal(pid, signal.SIGTERM)
            await self._back(role, pid)
        return True

    # --- servers and the network ---------------------------------------------------------------------------

    async def _server(self, fault: Fault) -> bool:
        async with self._servers[fault.target]:
            await self._rig.kill_server(fault.target, lose_tail=fault.how == "lost-tail")
            began = self._now()
            await self._rig.server_back(fault.target, 90.0)
            self.deeds.servers_s[fault.target].append(self._now() - began)
        return True

    async def _flush(self, fault: Fault) -> bool:
        """FLUSHALL, once enough processes are stopped with locks in hand (or none comes any more)."""
        async with self._servers["redis"]:
            deadline = self._now() + _FLUSH_WAIT_S * 2 / 3
            while self._now() < deadline:
                if sum(paused.across for paused in self._paused.values()) >= fault.least_entries:
                    break
                await asyncio.sleep(_LOOK_S)
            await self._stop_more(fault)
            held = {paused.pid for paused in self._paused.values()}
            await self._rig.flush()
            # Who was stopped before and is stopped after was paused across it.
            self.deeds.across_flush += len(held & {paused.pid for paused in self._paused.values()})
            self._flushed.set()
            self._flushed = asyncio.Event()
        return True

    async def _stop_more(self, fault: Fault) -> None:
        """Where too few came to their places in time, stop workers wherever they are."""
        missing = fault.least_entries - sum(paused.across for paused in self._paused.values())
        for role, pid in (await self._rig.pids()).items():
            if missing <= 0:
                break
            if "claimed" in places_of(role) and not self._roles[role].locked():
                missing -= 1
                self.deeds.pauses += 1
                _signal(pid, signal.SIGSTOP)
                pause = Fault(Kind.PAUSE, role, how=ACROSS, for_s=fault.for_s)
                task = asyncio.create_task(self._hold(pause, role, pid))
                self._holding.add(task)
                task.add_done_callback(self._holding.discard)
        await asyncio.sleep(0)  # they are on the list of the paused now

    async def _proxy(self, fault: Fault) -> bool:
        proxy = self._rig.proxies[fault.target]
        async with self._weather[fault.target]:
            if fault.how == "reset":
                proxy.reset()
                return True
            lost = proxy.tally.confirms_lost
            await proxy.set(weather_of(fault.how))
            if fault.how == "cut-confirms":  # nothing is cut while nobody publishes
                deadline = self._now() + _CUT_WAIT_S
                while self._now() < deadline:
                    if proxy.tally.confirms_lost > lost:
                        break
                    await asyncio.sleep(_LOOK_S)
            await asyncio.sleep(fault.for_s)
            await proxy.heal()
        return True


def local_ports(pid: int) -> set[int]:
    """The local TCP ports of a process's connections, stopped or not (proc(5))."""
    inodes = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                name = str(link.readlink())
                if name.startswith("socket:["):
                    inodes.add(name[8:-1])
    ports = set()
    with suppress(OSError):
        for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _write(file: Path, order: Order) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_bytes(order.to_bytes())
    temporary.replace(file)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def overlapping(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans joined where they touch, in order: the times in which at least one fault was active."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined

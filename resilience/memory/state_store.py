"""Redis in memory: `MemoryRedis` is the server, `MemoryStateStore` one process's StateStore on it.

Promises: what `resilience/scripts/*.lua` and `resilience.redis` answer, field by field: the claim table,
fencing by token, times to live, heartbeats, suspects. On request it fails as a server does: unreachable,
a reply lost after the call was carried out, FLUSHALL, a lost tail of writes. Does not promise: memory
limits, eviction, or a cluster's partial failures.

`alive` knows heartbeats only: processes in one memory have no process numbers to look up, so who ends
one says so by `MemoryRedis.silence`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from contracts.codec import Entry
from contracts.failures import StateStoreError
from contracts.limits import NO_LIMITS, TenantLimits
from contracts.ports import (
    Advance,
    Claim,
    ClaimRequest,
    ClaimVerdict,
    Clock,
    Held,
    Leaving,
    Peek,
    Reservation,
    Reserved,
    StageBacklog,
)
from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from contracts.velocity import Mark, Sample, Verdict
from resilience.limiter import conform
from resilience.redis import StatePolicy, status_of

Key = tuple[TenantScope, str]
Wire = Callable[[], Awaitable[None]]
T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_SWEEP_AT_LEAST = 1024


@dataclass(slots=True)
class Cell:
    """One state hash (its letters stand in `resilience.redis`); times in ms of the server's clock, None = for ever."""

    version: int
    digest: str
    body_digest: str
    stored: bytes | None
    output: bytes | None = None
    lock: str | None = None
    until: int = 0
    holder: str = ""
    owes: bool = False
    last: str | None = None
    status: str = ""
    expires: int | None = None
    gone: bool = False


@dataclass(slots=True)
class Suspect:
    """Who runs a suspect alone, and how many died doing so."""

    holder: str
    deaths: int
    expires: int | None = None


@dataclass(slots=True)
class _Change:
    at: int
    table: MutableMapping[Any, Any]
    key: Any
    before: Any


class MemoryRedis:
    """What a Redis server holds, and its clock. `down` = it answers nobody.

    `undo_s` is how far back `forget_since` can go (seconds); 0 keeps nothing for it. State that ran out is
    invisible at once, and swept away as writes go on.
    """

    def __init__(self, clock: Clock, *, undo_s: float = 0.0) -> None:
        self.cells: dict[Key, Cell] = {}
        self.alone: dict[tuple[TenantScope, str, str], Suspect] = {}
        self.beats: dict[str, int] = {}
        self.members: dict[tuple[TenantScope, int], dict[str, int]] = {}
        self.trusted: dict[str, bool] = {}
        self.attempts: dict[tuple[str, TenantScope, int], int] = {}
        self.arrivals: dict[TenantScope, int] = {}
        self.samples: dict[str, tuple[Sample, ...]] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.epochs: dict[TenantScope, tuple[Mark, int]] = {}
        self.sequences: dict[TenantScope, int] = {}
        self.run = 1
        self.down = False
        self._clock = clock
        self._undo_ms = round(undo_s * 1000)
        self._changes: deque[_Change] = deque()
        self._writes = 0

    @property
    def now_ms(self) -> int:
        """The server's time, as the scripts read it."""
        return _ms(self._clock.now())

    def flush(self) -> None:
        """FLUSHALL: states, suspects, heartbeats, backlog, rates and features."""
        tables: tuple[dict[Any, Any], ...] = (self.cells, self.alone, self.beats, self.trusted, self.attempts)
        tables += (self.arrivals, *self.members.values(), self.samples, self.verdicts, self.epochs, self.sequences)
        for table in tables:
            for key in list(table):
                self._write(table, key, None)

    def silence(self, boot: str) -> None:
        """The process is gone for certain: its heartbeat counts no more."""
        self.beats.pop(boot, None)

    def forget_since(self, moment: datetime) -> None:
        """A restart that lost the writes since `moment` (aware). Raises ValueError when `undo_s` is too short."""
        since = _ms(moment)
        if self.now_ms - since > self._undo_ms:
            raise ValueError("undo_s is shorter than the tail to lose: make the MemoryRedis with a longer one")
        self.run += 1
        while self._changes and self._changes[-1].at >= since:
            change = self._changes.pop()
            if change.before is None:
                change.table.pop(change.key, None)
            else:
                change.table[change.key] = change.before

    def cell(self, key: Key, now: int) -> Cell | None:
        """The state under a key, if it did not run out."""
        found = self.cells.get(key)
        return None if found is None or (found.expires is not None and now > found.expires) else found

    def suspect(self, key: tuple[TenantScope, str, str], now: int) -> Suspect | None:
        """Who runs a suspect alone, if that did not run out."""
        found = self.alone.get(key)
        return None if found is None or (found.expires is not None and now > found.expires) else found

    def beating(self, boot: str, now: int) -> bool:
        """Whether the process has a heartbeat that did not run out."""
        return self.beats.get(boot, -1) >= now

    def put(self, key: Key, cell: Cell) -> None:
        """Store a state."""
        self._write(self.cells, key, cell)

    def touch(self, key: Key) -> Cell:
        """The state under an existing key, to be changed in place."""
        self._remember(self.cells, key)
        return self.cells[key]

    def put_suspect(self, key: tuple[TenantScope, str, str], suspect: Suspect | None) -> None:
        """Store or remove who runs a suspect alone."""
        self._write(self.alone, key, suspect)

    def waiting(self, scope: TenantScope, n: int) -> dict[str, int]:
        """The backlog set of a tenant's events at version `n`: event id to when it was received (ms)."""
        return self.members.setdefault((scope, n), {})

    def enter(self, key: Key, n: int, received_ms: int) -> None:
        """An event enters the backlog of a version, unless it is there."""
        scope, event_id = key
        if n < len(STAGES) and event_id not in self.waiting(scope, n):
            self._write(self.waiting(scope, n), event_id, received_ms or self.now_ms)

    def leave(self, key: Key, n: int) -> None:
        """An event leaves the backlog of a version, if it is there."""
        scope, event_id = key
        if event_id in self.waiting(scope, n):
            self._write(self.waiting(scope, n), event_id, None)

    def count(self, what: str, scope: TenantScope, n: int) -> None:
        """Count an attempt at version `n` that was claimed or advanced."""
        key = (what, scope, n)
        self._write(self.attempts, key, self.attempts.get(key, 0) + 1)

    def counted(self, what: str, scopes: Sequence[TenantScope], n: int) -> int:
        """So many attempts of these tenants."""
        return sum(self.attempts.get((what, scope, n), 0) for scope in scopes)

    def keep(self, table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Store a value of a table of features, or remove it with None."""
        self._write(table, key, value)

    def arrive(self, scope: TenantScope, arrival_us: int) -> None:
        """Remember the theoretical arrival time of a tenant's next event (see `resilience.limiter`)."""
        self._write(self.arrivals, scope, arrival_us)

    def trust(self, stages: Sequence[str]) -> None:
        """Remember that these stages' backlogs are whole."""
        for stage in stages:
            self._write(self.trusted, stage, True)

    def beat(self, boot: str, until: int) -> None:
        """Store a heartbeat."""
        self._write(self.beats, boot, until)

    def _write(self, table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        self._remember(table, key)
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
        self._writes += 1
        if self._writes >= max(_SWEEP_AT_LEAST, len(self.cells) // 2):
            self._writes = 0
            self._sweep()

    def _remember(self, table: MutableMapping[Any, Any], key: Any) -> None:
        if not self._undo_ms:
            return
        now, before = self.now_ms, table.get(key)
        self._changes.append(_Change(now, table, key, replace(before) if isinstance(before, Cell) else before))
        while self._changes[0].at < now - self._undo_ms:
            self._changes.popleft()

    def _sweep(self) -> None:
        """Amortised: the tables are looked through once in half as many writes as there are states."""
        now = self.now_ms
        for key in [k for k, c in self.cells.items() if c.expires is not None and now > c.expires]:
            del self.cells[key]
        for name in [k for k, s in self.alone.items() if s.expires is not None and now > s.expires]:
            del self.alone[name]
        for boot in [b for b, until in self.beats.items() if now > until]:
            del self.beats[boot]
        for scope in [s for s, at in self.arrivals.items() if at < now * 1000]:
            del self.arrivals[scope]


class MemoryStateStore:
    """StateStore of one process, `boot`, on a MemoryRedis.

    `lose_replies` = so many next calls are carried out and still raise StateStoreError. `wire` is awaited
    before and after each call: a simulation lets others run there, waits, or raises StateStoreError for a
    request or a reply that is lost.
    """

    def __init__(
        self, server: MemoryRedis, boot: str, policy: StatePolicy | None = None, *, wire: Wire | None = None
    ) -> None:
        self.server = server
        self.boot = boot
        self.lose_replies = 0
        self._policy = policy or StatePolicy()
        self._wire = wire

    async def _call(self, work: Callable[[int], T]) -> T:
        """One round trip: `work` is what the server does in one step, at its time."""
        if self._wire is not None:
            await self._wire()
        if self.server.down:
            raise StateStoreError
        answer = work(self.server.now_ms)
        if self._wire is not None:
            await self._wire()
        if self.lose_replies > 0:
            self.lose_replies -= 1
            raise StateStoreError
        return answer

    async def reserve(self, entries: Sequence[Entry], limits: Sequence[TenantLimits] = ()) -> Sequence[Reservation]:
        """Store version 0 of each entry unless its identity is known, or its tenant is at a limit."""
        allowed = {e.header.scope: limit for e, limit in zip(entries, limits, strict=bool(limits))}
        return await self._call(
            lambda now: [self._reserve(e, allowed.get(e.header.scope, NO_LIMITS), now) for e in entries]
        )

    def _reserve(self, entry: Entry, limits: TenantLimits, now: int) -> Reservation:
        h = entry.header
        key = (h.scope, h.event)
        cell = self.server.cell(key, now)
        if cell is None:
            if limits.undecided_events is not None and self._is_full(h.scope, limits.undecided_events, now):
                return Reservation(Reserved.FULL, 0, None)
            if wait_ms := self._take(h.scope, limits, now):
                return Reservation(Reserved.LIMITED, 0, None, wait_ms)
            fresh = Cell(0, h.digest, h.body_digest, entry.body, expires=self._state_end(now))
            self.server.put(key, fresh)
            self.server.enter(key, 0, h.received_ms)
            return Reservation(Reserved.NEW, 0, entry.body or None)
        if cell.body_digest != h.body_digest:
            return Reservation(Reserved.CONFLICT, cell.version, None)
        if cell.version == 0:
            self._return(key, h.received_ms)
        return Reservation(Reserved.REPEAT, cell.version, (cell.stored or None) if cell.version == 0 else None)

    def _take(self, scope: TenantScope, limits: TenantLimits, now: int) -> int:
        """In how many ms one more is allowed at the tenant's rate; 0: it is, and was taken."""
        if limits.rate is None:
            return 0
        arrival, wait_ms = conform(self.server.arrivals.get(scope), limits.rate, now * 1000)
        if arrival is not None and not wait_ms:
            self.server.arrive(scope, arrival)
        return wait_ms

    def _is_full(self, scope: TenantScope, limit: int, now: int) -> bool:
        if self._undecided(scope) < limit:
            return False
        for n in range(len(STAGES)):
            self._prune(scope, n, self._dead_ms(now))
        return self._undecided(scope) >= limit

    def _undecided(self, scope: TenantScope) -> int:
        return sum(len(self.server.waiting(scope, n)) for n in range(len(STAGES)))

    def _prune(self, scope: TenantScope, n: int, dead_ms: int) -> None:
        for event_id in [e for e, received in self.server.waiting(scope, n).items() if received < dead_ms]:
            self.server.leave((scope, event_id), n)

    def _return(self, key: Key, received_ms: int) -> None:
        """An event that had left is under way again."""
        if self.server.cells[key].gone:
            cell = self.server.touch(key)
            cell.gone = False
            self.server.enter(key, cell.version, received_ms)

    async def claim(self, requests: Sequence[ClaimRequest], token: str) -> Sequence[Claim]:
        """Lock and compare, the first row of the claim table that fits; the token is the command's id."""
        return await self._call(lambda now: [self._claim(request, token, now) for request in requests])

    def _claim(self, request: ClaimRequest, token: str, now: int) -> Claim:
        h = request.entry.header
        key = (h.scope, h.event)
        cell = self.server.cell(key, now)
        if cell is None and not request.install_absent:
            return Claim(ClaimVerdict.ABSENT, token, -1)
        if cell is None or cell.body_digest != h.body_digest or cell.version < h.n:
            self.server.put(key, self._installed(request.entry, token, now))
            for n in range(len(STAGES)):
                if n != h.n:
                    self.server.leave(key, n)
            self.server.enter(key, h.n, h.received_ms)
            self.server.count("claimed", h.scope, h.n)
            return Claim(ClaimVerdict.INSTALLED, token, h.n, request.entry.body or None, owes_trail=True)
        if cell.version > h.n:
            return Claim(ClaimVerdict.DONE, token, cell.version, cell.stored or None, cell.output or None)
        if cell.lock is not None and cell.lock != token and cell.until > now:
            return Claim(ClaimVerdict.LOCKED, token, cell.version, lease_ms=cell.until - now, holder=cell.holder)
        cell = self.server.touch(key)
        cell.lock, cell.until, cell.holder = token, now + self._policy.lease_ms, self.boot
        self._return(key, h.received_ms)
        self.server.count("claimed", h.scope, h.n)
        verdict = ClaimVerdict.GO if cell.digest == h.digest else ClaimVerdict.TWIN
        stored = request.entry.body if verdict is ClaimVerdict.GO else cell.stored
        return Claim(verdict, token, cell.version, stored or None, owes_trail=cell.owes)

    def _installed(self, entry: Entry, token: str, now: int) -> Cell:
        """Ends any lease on the old state; the whole trail is owed, whoever finishes this version."""
        h = entry.header
        return Cell(
            h.n,
            h.digest,
            h.body_digest,
            entry.body,
            lock=token,
            until=now + self._policy.lease_ms,
            holder=self.boot,
            owes=True,
            expires=self._state_end(now),
        )

    async def advance(self, moves: Sequence[Advance]) -> Sequence[bool]:
        """Store the next version and release the lock; False where the lock is no longer this token's."""
        return await self._call(lambda now: [self._advance(move, now) for move in moves])

    def _advance(self, m: Advance, now: int) -> bool:
        key = (m.scope, m.event_id)
        cell = self.server.cell(key, now)
        if cell is None:
            return False
        if (cell.lock, cell.version, cell.digest) == (m.token, m.expected_version, m.expected_digest):
            next_one = Cell(m.version, m.digest, m.body_digest, None, last=m.token, status=m.status)
            if m.tombstone:
                next_one.expires = now + self._policy.tombstone_ttl_s * 1000
            else:
                next_one.stored, next_one.output, next_one.expires = m.stored, m.output, self._state_end(now)
            self.server.put(key, next_one)
            self.server.leave(key, m.expected_version)
            self.server.count("advanced", m.scope, m.expected_version)
            self.server.enter(key, m.version, m.received_ms)
            return True
        # A repeat after a lost reply finds its own move.
        return (cell.last, cell.version, cell.digest) == (m.token, m.version, m.digest)

    async def release(self, held: Sequence[Held], leaving: Sequence[Leaving] = ()) -> None:
        """Give locks back without advancing, and take events off the backlog; what is not so any more is left alone."""
        if held or leaving:
            await self._call(lambda now: self._release(held, leaving, now))

    def _release(self, held: Sequence[Held], leaving: Sequence[Leaving], now: int) -> None:
        for one in held:
            key = (one.scope, one.event_id)
            cell = self.server.cell(key, now)
            if cell is not None and cell.lock == one.token:
                cell = self.server.touch(key)
                cell.lock, cell.until, cell.holder = None, 0, ""
        for left in leaving:
            key = (left.scope, left.event_id)
            cell = self.server.cell(key, now)
            at = None if cell is None else (cell.version, cell.body_digest)
            if at == (left.n, left.body_digest) and left.n < len(STAGES):
                self.server.touch(key).gone = True
                self.server.leave(key, left.n)

    async def backlog(self, scopes: Sequence[TenantScope], now: datetime) -> Sequence[StageBacklog]:
        """One per stage; also drops what outlived its state."""
        return await self._call(lambda _: [self._backlog(scopes, n, now) for n in range(len(STAGES))])

    def _backlog(self, scopes: Sequence[TenantScope], n: int, now: datetime) -> StageBacklog:
        for scope in scopes:
            self._prune(scope, n, self._dead_ms(_ms(now)))
        received = [ms for scope in scopes for ms in self.server.waiting(scope, n).values()]
        return StageBacklog(
            len(received),
            min(received, default=None),
            self.server.trusted.get(STAGES[n], False),
            self.server.counted("claimed", scopes, n),
            self.server.counted("advanced", scopes, n),
        )

    async def undecided(self, scopes: Sequence[TenantScope], now: datetime) -> Sequence[int]:
        """Events of each tenant at any stage."""
        dead = self._dead_ms(_ms(now))

        def count(scope: TenantScope) -> int:
            return sum(ms >= dead for n in range(len(STAGES)) for ms in self.server.waiting(scope, n).values())

        return await self._call(lambda _: [count(scope) for scope in scopes])

    async def trust(self, stages: Sequence[str]) -> None:
        """Say that everything which waits for these stages is counted now."""
        await self._call(lambda _: self.server.trust(stages))

    def _dead_ms(self, now: int) -> int:
        return now - self._policy.state_ttl_s * 1000

    async def peek(self, keys: Sequence[Key]) -> Sequence[Peek | None]:
        """Read without claiming."""
        return await self._call(lambda now: [_peek(self.server.cell(key, now)) for key in keys])

    async def beat(self) -> None:
        """Say that this process is alive."""
        await self._call(lambda now: self.server.beat(self.boot, now + self._policy.heartbeat_ttl_s * 1000))

    async def alive(self, boots: Sequence[str]) -> Sequence[bool]:
        """Whether each process beats."""
        return await self._call(lambda now: [self.server.beating(boot, now) for boot in boots])

    async def begin_alone(self, scope: TenantScope, event_id: str, stage: str) -> int:
        """Note that this process runs a suspect alone; answers how many holders died doing so.

        Three round trips, as on the real server: another process may come between them.
        """
        key = (scope, event_id, stage)
        found = await self._call(lambda now: self.server.suspect(key, now))
        holder = found.holder if found else ""
        died = bool(holder) and holder != self.boot and not (await self.alive([holder]))[0]

        def note(now: int) -> int:
            known = self.server.suspect(key, now)
            deaths = (known.deaths if known else 0) + died
            self.server.put_suspect(key, Suspect(self.boot, deaths, self._state_end(now)))
            return deaths

        return await self._call(note)

    async def end_alone(self, scope: TenantScope, event_id: str, stage: str) -> None:
        """The suspect settled: forget it."""
        await self._call(lambda _now: self.server.put_suspect((scope, event_id, stage), None))

    async def ping(self) -> None:
        """One round trip; raises StateStoreError."""
        await self._call(lambda _now: None)

    async def close(self) -> None:
        """Nothing is connected."""

    def _state_end(self, now: int) -> int:
        return now + self._policy.state_ttl_s * 1000


def _ms(moment: datetime) -> int:
    return (moment - _EPOCH) // _MILLISECOND


def _peek(cell: Cell | None) -> Peek | None:
    if cell is None:
        return None
    return Peek(cell.version, status_of(cell.version, cell.status), cell.body_digest, cell.stored, cell.holder)

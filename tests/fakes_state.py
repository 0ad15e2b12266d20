"""In-memory twins for the runner: a state store with the Lua scripts' semantics, a ledger that opens approvals,
a broker that loses confirms, and a registry with the packaged defaults."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contracts.codec import Entry, decode_carrier, record_of_entry
from contracts.failures import StateStoreError
from contracts.lifecycle import Status
from contracts.ports import (
    ActiveSet,
    Advance,
    Artifact,
    Claim,
    ClaimRequest,
    ClaimVerdict,
    Confirm,
    DecisionRow,
    Held,
    Message,
    Peek,
    Reservation,
    Reserved,
)
from contracts.state import EventState, Pin, Thresholds
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, REJECTED, WORK
from tests.fakes import InMemoryLedger

Key = tuple[TenantScope, str]
DEFAULTS = Path(__file__).parents[1] / "governance" / "defaults"


class CrashError(BaseException):
    """The process dies here: nothing that it would have done afterwards happens."""


@dataclass
class Cell:
    """One state hash; the letters of the real one are in resilience/redis.py."""

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


@dataclass
class StateWorld:
    """What a Redis server holds, and its clock (ms)."""

    cells: dict[Key, Cell] = field(default_factory=dict)
    alone: dict[tuple[TenantScope, str, str], tuple[str, int]] = field(default_factory=dict)
    beats: set[str] = field(default_factory=set)
    now_ms: int = 0

    def flush(self) -> None:
        self.cells.clear()
        self.alone.clear()
        self.beats.clear()


@dataclass
class TwinStateStore:
    """One process's StateStore on a world; `dead` = the process is gone, `down` = the server is.

    `fuse` = the process dies before it can give a lock back.
    """

    world: StateWorld
    boot: str = "boot-1"
    lease_ms: int = 10_000
    dead: bool = False
    down: bool = False
    fuse: bool = False

    def kill(self) -> None:
        self.dead = True
        self.world.beats.discard(self.boot)

    def _check(self) -> None:
        if self.dead:
            raise CrashError
        if self.down:
            raise StateStoreError

    async def reserve(self, entries: Sequence[Entry]) -> Sequence[Reservation]:
        self._check()
        return [self._reserve(entry) for entry in entries]

    def _reserve(self, entry: Entry) -> Reservation:
        h = entry.header
        cell = self.world.cells.get((h.scope, h.event))
        if cell is None:
            self.world.cells[h.scope, h.event] = Cell(0, h.digest, h.body_digest, entry.body)
            return Reservation(Reserved.NEW, 0, entry.body)
        if cell.body_digest != h.body_digest:
            return Reservation(Reserved.CONFLICT, cell.version, None)
        return Reservation(Reserved.REPEAT, cell.version, cell.stored if cell.version == 0 else None)

    async def claim(self, requests: Sequence[ClaimRequest], token: str) -> Sequence[Claim]:
        self._check()
        return [self._claim(request, token) for request in requests]

    def _claim(self, request: ClaimRequest, token: str) -> Claim:
        h, now = request.entry.header, self.world.now_ms
        key = (h.scope, h.event)
        cell = self.world.cells.get(key)
        if cell is None and not request.install_absent:
            return Claim(ClaimVerdict.ABSENT, token, -1)
        if cell is None or cell.body_digest != h.body_digest or cell.version < h.n:
            self.world.cells[key] = Cell(
                h.n,
                h.digest,
                h.body_digest,
                request.entry.body,
                lock=token,
                until=now + self.lease_ms,
                holder=self.boot,
                owes=True,
            )
            return Claim(ClaimVerdict.INSTALLED, token, h.n, request.entry.body, owes_trail=True)
        if cell.version > h.n:
            return Claim(ClaimVerdict.DONE, token, cell.version, cell.stored, cell.output)
        if cell.lock and cell.lock != token and cell.until > now:
            return Claim(ClaimVerdict.LOCKED, token, cell.version, lease_ms=cell.until - now, holder=cell.holder)
        cell.lock, cell.until, cell.holder = token, now + self.lease_ms, self.boot
        verdict = ClaimVerdict.GO if cell.digest == h.digest else ClaimVerdict.TWIN
        stored = request.entry.body if verdict is ClaimVerdict.GO else cell.stored
        return Claim(verdict, token, cell.version, stored, owes_trail=cell.owes)

    async def advance(self, moves: Sequence[Advance]) -> Sequence[bool]:
        self._check()
        return [self._advance(move) for move in moves]

    def _advance(self, m: Advance) -> bool:
        cell = self.world.cells.get((m.scope, m.event_id))
        if cell is None:
            return False
        if (cell.lock, cell.version, cell.digest) == (m.token, m.expected_version, m.expected_digest):
            stored, output = (None, None) if m.tombstone else (m.stored, m.output)
            self.world.cells[m.scope, m.event_id] = Cell(
                m.version, m.digest, m.body_digest, stored, output, last=m.token
            )
            return True
        return (cell.last, cell.version, cell.digest) == (m.token, m.version, m.digest)

    async def release(self, held: Sequence[Held]) -> None:
        if held and self.fuse:
            self.kill()
        if held:
            self._check()
        for h in held:
            cell = self.world.cells.get((h.scope, h.event_id))
            if cell and cell.lock == h.token:
                cell.lock, cell.until, cell.holder = None, 0, ""

    async def peek(self, keys: Sequence[Key]) -> Sequence[Peek | None]:
        self._check()
        cells = [self.world.cells.get(key) for key in keys]
        return [None if c is None else Peek(c.version, "", c.body_digest, c.stored, c.holder) for c in cells]

    async def beat(self) -> None:
        self._check()
        self.world.beats.add(self.boot)

    async def alive(self, boots: Sequence[str]) -> Sequence[bool]:
        self._check()
        return [boot in self.world.beats for boot in boots]

    async def begin_alone(self, scope: TenantScope, event_id: str, stage: str) -> int:
        self._check()
        holder, count = self.world.alone.get((scope, event_id, stage), ("", 0))
        count += bool(holder) and holder != self.boot and holder not in self.world.beats
        self.world.alone[scope, event_id, stage] = (self.boot, count)
        return count

    async def end_alone(self, scope: TenantScope, event_id: str, stage: str) -> None:
        self._check()
        self.world.alone.pop((scope, event_id, stage), None)


@dataclass
class TwinLedger(InMemoryLedger):
    """Also opens approvals; `before_decide` runs once inside the next decide, before its insert."""

    approvals: list[Key] = field(default_factory=list)
    before_decide: Callable[[], None] | None = None

    async def decide(self, states: Sequence[EventState]) -> Sequence[DecisionRow]:
        hook, self.before_decide = self.before_decide, None
        if hook:
            hook()
        new = [state for state in states if (state.scope, state.event_id) not in self.rows]
        rows = await super().decide(states)
        self.approvals += [(s.scope, s.event_id) for s in new if s.status is Status.AWAITING_APPROVAL]
        return rows


@dataclass
class TwinBroker:
    """Publisher and queues. The next `lost` calls answer UNKNOWN; `arrives` says whether those messages got through.

    `crash` = the process dies before the next call sends anything.
    """

    queues: dict[str, deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    messages: list[Message] = field(default_factory=list)
    lost: int = 0
    arrives: bool = True
    crash: bool = False

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        if self.crash:
            self.crash = False
            raise CrashError
        unknown, self.lost = self.lost > 0, max(self.lost - 1, 0)
        if not unknown or self.arrives:
            for message in messages:
                self._route(message)
        return [Confirm.UNKNOWN if unknown else Confirm.CONFIRMED for _ in messages]

    def _route(self, message: Message) -> None:
        self.messages.append(message)
        if message.exchange not in (DECISIONS, REJECTED):
            self.queues[message.routing_key].append(message.body)

    def decisions(self) -> list[Message]:
        return [m for m in self.messages if m.exchange == DECISIONS]

    def rejections(self) -> list[Message]:
        return [m for m in self.messages if m.exchange == REJECTED]

    def parked(self) -> list[Message]:
        return [m for m in self.messages if m.exchange == WORK and ".parked." in m.routing_key]

    def ladder(self) -> list[Message]:
        return [m for m in self.messages if ".retry." in m.exchange]

    def to_stage(self, stage: str) -> list[Message]:
        return [m for m in self.messages if m.exchange == WORK and f".{stage}.p" in m.routing_key]

    def audited(self) -> set[str]:
        """The ids of every audit record that was published."""
        bodies = [m.body for m in self.messages if m.exchange == WORK and ".audit.p" in m.routing_key]
        entries = [entry for body in bodies for entry in decode_carrier(body)]
        return {record_of_entry(entry).record_id for entry in entries if isinstance(entry, Entry)}


class DefaultsRegistry:
    """The packaged base model, guardrail and policy sets, active for everybody; `error` is raised once instead."""

    def __init__(self) -> None:
        names = {"model": "model-base", "guardrail": "guardrail-base", "risk": "policy-risk"}
        names |= {"compliance": "policy-compliance"}
        self.pins = {kind: Pin(name=name, version=1, digest=name) for kind, name in names.items()}
        self.content = {name: json.loads((DEFAULTS / f"{name}.json").read_text())["content"] for name in names.values()}
        self.errors: list[BaseException] = []

    async def active(self, scopes: Sequence[TenantScope], kind: str, event_types: Sequence[str]) -> Sequence[ActiveSet]:
        if self.errors:
            raise self.errors.pop(0)
        one = ActiveSet(self.pins["model"], self.pins[kind], self.pins["guardrail"], Thresholds())
        return [one for _ in scopes]

    async def revoked(self, pins: Sequence[Pin]) -> Sequence[bool]:
        return [False for _ in pins]

    async def artifacts(self, pins: Sequence[Pin]) -> Sequence[Artifact]:
        if self.errors:
            raise self.errors.pop(0)
        return [Artifact("any", pin, self.content[pin.digest]) for pin in pins]

"""What the runner's tests add to the in-memory twins: processes that die in the middle, a ledger that opens approvals,
a publisher that loses confirms, and a registry with the packaged defaults."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from contracts.codec import Entry, decode_carrier, record_of_entry
from contracts.failures import StateStoreError
from contracts.lifecycle import Status
from contracts.ports import (
    ActiveSet,
    Artifact,
    Confirm,
    DecisionRow,
    Held,
    Leaving,
    Message,
)
from contracts.state import EventState, Pin, Thresholds
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, REJECTED, WORK
from resilience.memory import MemoryRedis, MemoryStateStore, SteppingClock
from resilience.redis import StatePolicy
from tests.fakes import InMemoryLedger

Key = tuple[TenantScope, str]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DEFAULTS = Path(__file__).parents[1] / "governance" / "defaults"


class CrashError(BaseException):
    """The process dies here: nothing that it would have done afterwards happens."""


class Beats(dict[str, int]):
    """Heartbeats that last until they are discarded."""

    def add(self, boot: str) -> None:
        self[boot] = 1 << 62

    def discard(self, boot: str) -> None:
        self.pop(boot, None)


class StateWorld(MemoryRedis):
    """A server with a clock of its own (ms), whose heartbeats do not run out."""

    beats: Beats

    def __init__(self) -> None:
        self._own = SteppingClock(EPOCH)
        super().__init__(self._own)
        self.beats = Beats()

    @property
    def now_ms(self) -> int:
        return super().now_ms

    @now_ms.setter
    def now_ms(self, now: int) -> None:
        self._own.moment = EPOCH + timedelta(milliseconds=now)


class TwinStateStore(MemoryStateStore):
    """One process's StateStore on a world; `dead` = the process is gone, `down` = the server is.

    `fuse` = the process dies before it can give a lock back.
    """

    def __init__(self, world: StateWorld, boot: str = "boot-1", lease_ms: int = 10_000) -> None:
        super().__init__(world, boot, StatePolicy(lease_ms), wire=self._check)
        self.world = world
        self.dead = self.down = self.fuse = False

    def kill(self) -> None:
        self.dead = True
        self.world.silence(self.boot)

    async def _check(self) -> None:
        if self.dead:
            raise CrashError
        if self.down:
            raise StateStoreError

    async def release(self, held: Sequence[Held], leaving: Sequence[Leaving] = ()) -> None:
        if held and self.fuse:
            self.kill()
        await super().release(held, leaving)

    async def beat(self) -> None:
        await self._check()
        self.world.beats.add(self.boot)


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

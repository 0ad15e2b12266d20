"""Fakes of what the HTTP door gained beside the intake: a feed, replies and time that a test holds in its hands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from contracts.events import Event
from contracts.failures import InvalidMetadataError, LimitExceededError
from contracts.identity import Grant, Principal, Role
from contracts.outcomes import Decision, Outcome, PolicyResult, PolicyVerdict
from contracts.ports import FeedPage
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from gateway.health import HealthDoor, HealthReport
from gateway.http import HttpPorts, create_app
from gateway.labelling import LabelDesk
from gateway.waiting import Waiting, WaitPolicy
from tests.fakes import DoorParts, SteppingClock


async def settle() -> None:
    """Let everything run that can: a fixed number of turns of the loop, no time."""
    for _ in range(50):
        await asyncio.sleep(0)


@dataclass
class HeldReplies:
    """Copies arrive when a test says so. Waiting begins with the call, as the port promises."""

    address: str = "risk.v1.reply.boot"
    waits: dict[str, asyncio.Future[bytes | None]] = field(default_factory=dict)

    def wait(self, event_id: str, timeout_s: float) -> Awaitable[bytes | None]:
        self.waits[event_id] = asyncio.get_running_loop().create_future()
        return self.waits[event_id]

    def arrive(self, event_id: str, copy: bytes | None) -> None:
        self.waits[event_id].set_result(copy)


@dataclass
class HeldTime:
    """A clock whose pauses last until the test passes the time."""

    clock: SteppingClock = field(default_factory=SteppingClock)
    pauses: list[tuple[float, asyncio.Future[None]]] = field(default_factory=list)

    async def pause(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pauses.append((self.clock.elapsed + seconds, future))
        await future

    async def step(self, seconds: float) -> None:
        """Pass some time, after and before everything that can run has run."""
        await settle()
        self.clock.step(seconds)
        for due, future in self.pauses:
            if due <= self.clock.elapsed and not future.done():
                future.set_result(None)
        await settle()


@dataclass
class PassingTime(HeldTime):
    """Time passes as soon as somebody waits for it."""

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.clock.step(seconds)


@dataclass
class InMemoryFeed:
    """Every decision of a tenant in order; a cursor is the number of decisions before it."""

    decisions: dict[TenantScope, list[bytes]] = field(default_factory=dict)

    async def page(self, scope: TenantScope, after: str | None, limit: int) -> FeedPage:
        held: Sequence[bytes] = self.decisions.get(scope, [])
        start = 0
        if after is not None:
            if not (
                after.startswith("c") and after[1:].isdecimal() and after.isascii() and int(after[1:]) <= len(held)
            ):
                raise InvalidMetadataError("after is not a cursor of this feed")
            start = int(after[1:])
        page = tuple(held[start : start + limit])
        return FeedPage(page, f"c{start + len(page)}" if page else None)


@dataclass
class FixedSimulator:
    """Approves everything; `full` says that too many run."""

    full: bool = False

    async def simulate(self, scope: TenantScope, event: Event) -> Decision:
        if self.full:
            raise LimitExceededError
        return Decision(
            event_id="0" * 32,
            tenant_id=scope.tenant_id,
            kind=event.kind,
            outcome=Outcome.APPROVED,
            score=1.0,
            reasons=(),
            policy=PolicyVerdict(result=PolicyResult.PASS),
            guardrails=(),
            versions={},
            decided_at="2026-01-31T12:00:01Z",
        )


def health_door(report: HealthReport | Exception = HealthReport(ready=True)) -> HealthDoor:  # noqa: B008 - frozen
    async def check() -> HealthReport:
        if isinstance(report, Exception):
            raise report
        return report

    return HealthDoor("test", "0.1.0", check, CollectorRegistry())


@dataclass
class WholeDoor:
    """A gateway that has every part, on fakes. Keys: `rf_acme_key` (SERVICE), and `rf_acme_<role>` for every role."""

    parts: DoorParts = field(default_factory=DoorParts)
    feed: InMemoryFeed = field(default_factory=InMemoryFeed)
    replies: HeldReplies = field(default_factory=HeldReplies)
    simulator: FixedSimulator = field(default_factory=FixedSimulator)
    policy: WaitPolicy = field(default_factory=WaitPolicy)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    time_passes: bool = False

    def __post_init__(self) -> None:
        parts = self.parts
        self.time = (PassingTime if self.time_passes else HeldTime)(parts.clock)
        for role in Role:
            grants = frozenset({Grant("acme", role)})
            parts.directory.keys[f"rf_acme_{role.lower()}"] = Principal("key:x", "", grants, TenantScope("acme"))
        parts.directory.keys["rf_unbound"] = Principal("user:1", "1", frozenset({Grant("acme", Role.SERVICE)}))
        self.waiting = Waiting(
            self.replies, parts.ledger, parts.clock, self.policy, stopping=self.stopping, pause=self.time.pause
        )
        labels = LabelDesk(parts.publisher, parts.telemetry, parts.clock, parts.refusals)
        self.ports = HttpPorts(
            parts.directory,
            parts.directory,
            parts.ledger,
            parts.store,
            parts.ids,
            self.feed,
            labels,
            self.simulator,
            self.waiting,
        )

    def app(self) -> Starlette:
        layouts = Layouts.first(self.parts.partitions)
        return create_app(self.parts.intake, self.ports, self.parts.refusals, health_door(), layouts=layouts)

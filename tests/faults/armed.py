"""A role of the fleet that can be told to die or to stop at a named place: `python -m tests.faults.armed ROLE …`.

Runs `deploy.role` as it is; the places lie around the calls of its adapters (before or after a claim, an advance, a
commit, a publish, an ack), so nothing of this exists in a release. A place is armed while the process runs, through a
file that names it; the process writes down that it fired before it fires, removes the file, and sends itself SIGKILL
or SIGSTOP: nothing after that place runs, as when the machine is gone. Promises that a place that was not armed costs
one stat(2).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from contracts.topology import STAGES

ARM_FILE: Final = "RISKFLEET_CHAOS_ARM"
"""The variable that names this process's arming file; the launcher takes it away before the role reads its settings."""
FIRED_FILE: Final = "RISKFLEET_CHAOS_FIRED"

DELIVERED, OWNED, CLAIMED, WORKED, ADVANCED = "delivered", "owned", "claimed", "worked", "advanced"
PUBLISHING, HALF_PUBLISHED, PUBLISHED, HALF_ACKED, ACKED = (
    *("publishing", "half-published", "published", "half-acked", "acked"),
)
DECIDED, COMMITTED = "decided", "committed"
RESERVED, SENDING, CONFIRMED = "reserved", "sending", "confirmed"
LOCKED, APPENDED = "locked", "appended"

_SETTLING: Final = (ADVANCED, PUBLISHING, HALF_PUBLISHED, PUBLISHED, HALF_ACKED, ACKED)
HALF_SETTLED: Final = frozenset({*_SETTLING, COMMITTED, APPENDED}) - {ACKED}
"""Places at which a part of what a carrier's entries owe is done for good, the rest is not, and it is not acked."""

_STAGE_PLACES: Final = (DELIVERED, CLAIMED, WORKED, *_SETTLING)


def places_of(role: str) -> tuple[str, ...]:
    """The places that a role passes under load; `role` is its name in the fleet, with or without a number."""
    kind = role.rpartition("-")[0] if role[-1:].isdigit() else role
    match kind:
        case "retrieval":
            return (*_STAGE_PLACES, OWNED)
        case "decision":
            return (*_STAGE_PLACES, DECIDED, COMMITTED)
        case str(stage) if stage in STAGES:
            return _STAGE_PLACES
        case "gateway" | "ingress":
            return (RESERVED, SENDING, CONFIRMED)
        case "sink-audit":
            return (DELIVERED, LOCKED, APPENDED, ACKED)
    return ()


@dataclass(frozen=True, slots=True)
class Order:
    """What an arming file says: fire at `place` once a carrier of at least `least_entries` passes it."""

    number: int
    place: str
    action: str  # kill or stop
    least_entries: int = 1

    def to_bytes(self) -> bytes:
        """For the file."""
        return orjson.dumps(self)


class Trigger:
    """This process's arming file, looked at whenever a place is passed."""

    def __init__(self, arm: Path, fired: Path, role: str) -> None:
        self._arm, self._fired, self._role = arm, fired, role
        self._stamp = 0
        self._order: Order | None = None
        self.entries = 0
        """Entries of the largest carrier in hand; at a door, of the group that was reserved together."""

    def passing(self, place: str) -> None:
        """Fire if this place is armed; comes back after a SIGCONT only."""
        order = self._current()
        if order is None or order.place != place or self.entries < order.least_entries:
            return
        line = {
            "number": order.number,
            "role": self._role,
            "place": place,
            "action": order.action,
            "entries": self.entries,
            "pid": os.getpid(),
            "at": time.time(),
        }
        self._order = None
        self._arm.unlink(missing_ok=True)  # first: whoever comes after us must not die of the same order
        with self._fired.open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")
        os.kill(os.getpid(), signal.SIGSTOP if order.action == "stop" else signal.SIGKILL)

    def armed_at(self, place: str) -> bool:
        """Whether this very place is armed and would fire."""
        order = self._current()
        return order is not None and order.place == place and self.entries >= order.least_entries

    def _current(self) -> Order | None:
        try:
            stamp = self._arm.stat().st_mtime_ns
        except OSError:
            self._order = None
            return None
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._order = Order(**orjson.loads(self._arm.read_bytes()))
            except (OSError, orjson.JSONDecodeError, TypeError):
                self._order = None
        return self._order


Call = Callable[..., Awaitable[Any]]


def around(owner: Any, name: str, trigger: Trigger, *, before: str | None = None, after: str | None = None) -> None:
    """Let each call of a method pass a place before it, or after it came back."""
    original: Call = getattr(owner, name)

    async def call(self: Any, first: Sequence[Any], *rest: Any, **named: Any) -> Any:
        if name == "reserve":
            trigger.entries = len(first)
        if before is not None:
            trigger.passing(before)
        result = await original(self, first, *rest, **named)
        if after is not None:
            trigger.passing(after)
        return result

    setattr(owner, name, call)


def around_publish(owner: Any, trigger: Trigger, before: str, half: str | None, after: str) -> None:
    """Places around a publish, and one in its middle: half of the messages confirmed, the rest not sent."""
    original: Call = owner.publish

    async def publish(self: Any, messages: Sequence[Any]) -> Any:
        if not any(message.confirm for message in messages):
            return await original(self, messages)
        trigger.passing(before)
        if half is not None and len(messages) > 1 and trigger.armed_at(half):
            await original(self, messages[: len(messages) // 2])
            trigger.passing(half)
        confirms = await original(self, messages)
        trigger.passing(after)
        return confirms

    owner.publish = publish


def _arm_consumer(trigger: Trigger) -> None:
    from resilience import rabbit

    work = rabbit.RabbitConsumer._settle
    ack = rabbit._ack
    count = [0, 0]

    async def settle(self: Any, group: Sequence[Any], settled: Sequence[Any]) -> Any:
        count[:] = [0, len(group)]
        return await work(self, group, settled)

    async def acked(held: Any) -> None:
        if count[0] and count[0] >= count[1] // 2:
            trigger.passing(HALF_ACKED)
        await ack(held)
        count[0] += 1
        if count[0] >= count[1]:
            trigger.passing(ACKED)

    def delivered(handler: Call) -> Call:
        async def handle(deliveries: Sequence[Any]) -> Any:
            trigger.entries = max(delivery.events for delivery in deliveries)
            trigger.passing(DELIVERED)
            return await handler(deliveries)

        return handle

    begin = rabbit.RabbitConsumer.__init__

    def init(self: Any, url: str, queues: Any, handler: Call, probe: Any, policy: Any) -> None:
        begin(self, url, queues, delivered(handler), probe, policy)

    rabbit.RabbitConsumer.__init__ = init  # type: ignore[method-assign]
    rabbit.RabbitConsumer._settle = settle  # type: ignore[method-assign]
    rabbit._ack = acked


def arm(role: str, trigger: Trigger) -> None:
    """Put the places of a role around its adapters."""
    from governance.postgres.audit import PostgresAuditLog
    from governance.postgres.ledger import PostgresLedger
    from resilience.rabbit import RabbitPublisher
    from resilience.redis import RedisStateStore

    if role in ("gateway", "ingress"):
        around(RedisStateStore, "reserve", trigger, after=RESERVED)
        around_publish(RabbitPublisher, trigger, SENDING, None, CONFIRMED)
        return
    _arm_consumer(trigger)
    around(PostgresLedger, "record_events", trigger, after=OWNED)
    around(RedisStateStore, "claim", trigger, after=CLAIMED)
    around(PostgresLedger, "decide", trigger, before=DECIDED, after=COMMITTED)
    around(RedisStateStore, "advance", trigger, before=WORKED, after=ADVANCED)
    around(PostgresAuditLog, "_lock_heads", trigger, after=LOCKED)
    around(PostgresAuditLog, "append", trigger, after=APPENDED)
    around_publish(RabbitPublisher, trigger, PUBLISHING, HALF_PUBLISHED, PUBLISHED)


def say_where(*_: object) -> None:
    """On SIGUSR1: where every task of this process waits, into its log. Asked of a role that does not come back."""
    import asyncio

    for task in asyncio.all_tasks(asyncio.get_running_loop()):
        sys.stderr.write(f"TASK {task.get_name()}\n")
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


def main() -> int:
    """Arm and run the role that the arguments name."""
    from deploy import role

    signal.signal(signal.SIGUSR1, say_where)
    arm_file, fired_file = os.environ.pop(ARM_FILE, None), os.environ.pop(FIRED_FILE, None)
    if arm_file is not None and fired_file is not None:
        named = Path(arm_file).stem
        arm(sys.argv[1], Trigger(Path(arm_file), Path(fired_file), named))
    return role.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

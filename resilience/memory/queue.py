"""One queue in memory: order, returned deliveries, limits, time to live and dead letters, as RabbitMQ keeps them.

Pure of time: `now` is an argument (whole microseconds). Promises the quorum queue's rules where they differ from a
classic queue's: returned deliveries go first and are counted, a delivery limit, dead-lettering at least once, and a
soft refusal (the message that crosses the limit is taken, then nothing until the queue is down to four fifths of it).
Knows nothing of exchanges: what dies is handed to `bury`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from contracts.ports import Message

DELIVERY_COUNT = "x-delivery-count"
LETTERS_AT_ONCE = 32
"""How many dead letters a queue tries at once; more that have no target hold up all behind them, as in RabbitMQ."""
_SOFT_LIMIT = 0.8
_KNOWN = frozenset(
    {
        "message-ttl",
        "max-length",
        "max-length-bytes",
        "overflow",
        "dead-letter-exchange",
        "dead-letter-routing-key",
        "dead-letter-strategy",
        "delivery-limit",
    }
)


class Death(StrEnum):
    """Why a message left its queue without being acked."""

    EXPIRED = "expired"
    MAXLEN = "maxlen"
    DELIVERY_LIMIT = "delivery_limit"


@dataclass(frozen=True, slots=True)
class Limits:
    """A policy's definition, read: what holds for one queue (`ttl` in microseconds)."""

    ttl: int | None = None
    length: int | None = None
    size: int | None = None
    refuses: bool = False
    exchange: str | None = None
    routing_key: str | None = None
    at_least_once: bool = False
    deliveries: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether the queue has a limit of length or bytes."""
        return self.length is not None or self.size is not None


def limits_of(definition: Mapping[str, Any], kind: str) -> Limits:
    """The limits of a queue of that kind. Raises ValueError for a key or value that this broker does not know."""
    if unknown := set(definition) - _KNOWN:
        raise ValueError(f"the memory broker does not know the policy keys {sorted(unknown)}")
    overflow = definition.get("overflow", "drop-head")
    if overflow not in ("drop-head", "reject-publish"):
        raise ValueError(f"the memory broker does not know the overflow {overflow!r}")
    strategy = definition.get("dead-letter-strategy", "at-most-once")
    if strategy not in ("at-most-once", "at-least-once"):
        raise ValueError(f"the memory broker does not know the dead-letter-strategy {strategy!r}")
    quorum, refuses, ttl = kind == "quorum", overflow == "reject-publish", definition.get("message-ttl")
    return Limits(
        ttl=None if ttl is None else ttl * 1000,
        length=definition.get("max-length"),
        size=definition.get("max-length-bytes"),
        refuses=refuses,
        exchange=definition.get("dead-letter-exchange"),
        routing_key=definition.get("dead-letter-routing-key"),
        # RabbitMQ falls back to at-most-once where its conditions are not met.
        at_least_once=quorum and refuses and strategy == "at-least-once",
        deliveries=definition.get("delivery-limit") if quorum else None,
    )


@dataclass(slots=True)
class Stored:
    """A message in a queue; `returns` counts how often a holder gave it back or died."""

    message: Message
    size: int
    position: int
    expires: int | None
    returns: int = 0


@dataclass(slots=True)
class Letter:
    """A dead letter that its target did not take yet; `left` = queues still to be reached, None = not routed yet."""

    message: Message
    size: int
    retry_at: int
    reason: Death
    left: tuple[str, ...] | None = None


@dataclass(slots=True, eq=False)
class Subscription:
    """One consumer of one queue: what it holds, and how much it may."""

    queue: MemoryQueue
    prefetch: int
    receive: Callable[[Subscription, int, Stored], None]
    held: dict[int, Stored] = field(default_factory=dict)
    tags: int = 0

    def hand(self, stored: Stored) -> None:
        """Give it one message."""
        self.tags += 1
        self.held[self.tags] = stored
        self.queue.unacked += 1
        self.receive(self, self.tags, stored)


Bury = Callable[["MemoryQueue", Stored, Death], None]


class MemoryQueue:
    """One queue. `kind` is quorum or classic; `transient` queues do not outlive a restart of the broker."""

    def __init__(self, name: str, kind: str, limits: Limits, bury: Bury) -> None:
        self.name = name
        self.kind = kind
        self.quorum = kind == "quorum"
        self.limits = limits
        self.transient = False
        self.idle: int | None = None
        self.used_at = 0
        self.unacked = 0
        self.subscriptions: deque[Subscription] = deque()
        self.stuck: deque[Letter] = deque()
        self.behind: deque[Letter] = deque()
        self.wake_at: int | None = None
        self._bury = bury
        self._ready: deque[Stored] = deque()
        self._returned: deque[Stored] = deque()
        self._bytes = 0
        self._stuck_bytes = 0
        self._position = 0
        self._refusing = False

    def __len__(self) -> int:
        """How many messages are ready."""
        return len(self._ready) + len(self._returned)

    def __bool__(self) -> bool:
        """A queue is never false, however empty."""
        return True

    def ready(self) -> tuple[Message, ...]:
        """The ready messages, the next one first."""
        return tuple(stored.message for stored in (*self._returned, *self._ready))

    def refuses(self, size: int) -> bool:
        """Whether a message of this size would be nacked."""
        limits = self.limits
        if not limits.refuses or not limits.bounded:
            return False
        if self.quorum:
            return self._refusing
        too_many = limits.length is not None and len(self) >= limits.length
        return too_many or (limits.size is not None and self._bytes + size > limits.size)

    def append(self, message: Message, now: int) -> None:
        """Put a message at the end."""
        ttl, size = self.limits.ttl, len(message.body)
        self._position += 1
        self._ready.append(Stored(message, size, self._position, None if ttl is None else now + ttl))
        self._bytes += size

    def take(self, now: int) -> Stored | None:
        """The next message that did not run out, off the queue."""
        if self.limits.ttl is not None:
            self.expire(now)
        if not self._returned and not self._ready:
            return None
        return self._pop()

    def _pop(self) -> Stored:
        stored = (self._returned or self._ready).popleft()
        self._bytes -= stored.size
        return stored

    def give_back(self, some: Iterable[Stored]) -> None:
        """Deliveries whose holder is gone, in the order in which it had them."""
        for stored in some:
            stored.returns += 1
            limit = self.limits.deliveries
            if limit is not None and stored.returns > limit:
                self._bury(self, stored, Death.DELIVERY_LIMIT)
                continue
            self._returned.append(stored)
            self._bytes += stored.size
        if not self.quorum:  # a classic queue restores the old order
            self._returned = deque(sorted(self._returned, key=lambda stored: stored.position))

    def expire(self, now: int) -> int:
        """Bury what ran out; only the head is looked at, as every message has the same time to live."""
        count = 0
        while (head := self._head()) is not None and head.expires is not None and head.expires <= now:
            self._bury(self, self._pop(), Death.EXPIRED)
            count += 1
        return count

    def _head(self) -> Stored | None:
        line = self._returned or self._ready
        return line[0] if line else None

    def enforce(self) -> None:
        """Drop from the head what is over the limit, or begin or end to refuse."""
        if not self.limits.refuses:
            while len(self) and self._over():
                self._bury(self, self._pop(), Death.MAXLEN)
        elif self._over():
            self._refusing = True
        elif self._refusing:
            self._refusing = self._over(_SOFT_LIMIT)

    def _over(self, part: float = 1.0) -> bool:
        limits = self.limits
        if limits.length is not None and len(self) + len(self.stuck) + len(self.behind) > int(limits.length * part):
            return True
        return limits.size is not None and self._bytes + self._stuck_bytes > int(limits.size * part)

    @property
    def held_up(self) -> bool:
        """Whether so many dead letters wait for their targets that the next ones are not even tried."""
        return len(self.stuck) >= LETTERS_AT_ONCE

    def stick(self, letter: Letter) -> None:
        """Keep a dead letter until its target takes it; it counts towards the limits."""
        (self.behind if self.held_up else self.stuck).append(letter)
        self._stuck_bytes += letter.size

    def unstick(self, line: deque[Letter]) -> Letter:
        """The oldest dead letter of `stuck` or `behind`, to be tried."""
        letter = line.popleft()
        self._stuck_bytes -= letter.size
        return letter

    def next_due(self) -> int | None:
        """When something happens here by itself, if anything does."""
        head, dues = self._head(), []
        if head is not None and head.expires is not None:
            dues.append(head.expires)
        if self.stuck:
            dues.append(self.stuck[0].retry_at)
        if self.idle is not None and not self.subscriptions:
            dues.append(self.used_at + self.idle)
        return min(dues, default=None)

    def lose_transient(self) -> int:
        """A restart: a classic queue keeps persistent messages only, a quorum queue keeps all. How many went."""
        if self.quorum:
            return 0
        kept = [stored for stored in (*self._returned, *self._ready) if stored.message.persistent]
        gone = len(self) - len(kept)
        self._returned, self._ready = deque(), deque(kept)
        self._bytes = sum(stored.size for stored in kept)
        return gone

    def purge(self) -> int:
        """Remove every ready message; answers how many."""
        count = len(self)
        self._ready.clear()
        self._returned.clear()
        self._bytes = 0
        return count


def delivered_headers(queue: MemoryQueue, stored: Stored) -> dict[str, Any]:
    """The headers of a delivery: a quorum queue says how often the message came back."""
    headers = dict(stored.message.headers)
    if queue.quorum and stored.returns:
        headers[DELIVERY_COUNT] = stored.returns
    return headers


def letter_message(queue: MemoryQueue, message: Message, reason: Death, at: datetime) -> Message:
    """The message as it leaves for the dead-letter exchange: who buried it stands in `x-death`, the last one first."""
    limits, headers = queue.limits, dict(message.headers)
    raw = headers.get("x-death")
    deaths = [death for death in raw if isinstance(death, Mapping)] if isinstance(raw, list | tuple) else []
    known = next((d for d in deaths if (d.get("queue"), d.get("reason")) == (queue.name, reason)), {})
    deaths = [death for death in deaths if death is not known]
    latest = {
        "count": known.get("count", 0) + 1,
        "reason": str(reason),
        "queue": queue.name,
        "time": at.replace(microsecond=0),
        "exchange": message.exchange,
        "routing-keys": [message.routing_key],
    }
    headers["x-death"] = [latest, *deaths]
    headers.setdefault("x-first-death-reason", str(reason))
    headers.setdefault("x-first-death-queue", queue.name)
    headers.setdefault("x-first-death-exchange", message.exchange)
    key = message.routing_key if limits.routing_key is None else limits.routing_key
    return replace(message, exchange=limits.exchange or "", routing_key=key, headers=headers, mandatory=False)


def is_cycle(queue: str, message: Message) -> bool:
    """Whether a dead letter came through this queue before; without a rejection between, RabbitMQ drops it then."""
    return any(death["queue"] == queue for death in message.headers["x-death"])

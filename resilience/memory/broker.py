"""RabbitMQ in memory: exchanges, policies, confirms, dead letters and faults, for one process.

Promises what the conformance suite proves of this broker and of RabbitMQ alike: routing, confirms and returns,
refusal by full queues, redelivery with its count, the delivery limit, times to live and the retry ladder, at
least once where the policy says so. Does not promise durability, permissions, or fair shares between publishers.

Nothing here looks at a clock by itself: what expires does so when `advance` is called, and `run` calls it when the
next thing is due, waiting by the injected `sleep`. Publishing, settling and dead-lettering happen within one step
of the event loop, so a test or a simulation sees no half-done change.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from contracts.failures import MessagingFailureError
from contracts.ports import Clock, Confirm, Message
from contracts.topology import Binding, Exchange, Policy, Topology
from resilience.memory.consumer import MemoryConsumer
from resilience.memory.queue import (
    Death,
    Letter,
    Limits,
    MemoryQueue,
    Stored,
    Subscription,
    is_cycle,
    letter_message,
    limits_of,
)
from resilience.memory.time import Sleep, first_of, microseconds
from resilience.rabbit import ConsumerPolicy, Handler, Probe

_CACHED_ROUTES = 10_000
_TEMPORARY = 60_000_000
_SHORTEST_WAIT_S = 0.001


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """A passive look at a queue: `stuck` counts dead letters that wait for their target."""

    name: str
    ready: int
    unacked: int
    consumers: int
    stuck: int


@dataclass
class Faults:
    """What goes wrong with the next messages, as counts that run down.

    `lose_messages`: nothing arrives, the answer is UNKNOWN. `refuse`: nothing arrives, the answer is REFUSED.
    `lose_confirms`: the message arrives, the answer is UNKNOWN. `only` chooses which messages they strike.
    """

    lose_messages: int = 0
    refuse: int = 0
    lose_confirms: int = 0
    only: Callable[[Message], bool] | None = None

    def strike(self, message: Message) -> tuple[bool, Confirm | None]:
        """Whether the message arrives, and the answer if it is not the broker's own."""
        if not (self.lose_messages or self.refuse or self.lose_confirms) or (self.only and not self.only(message)):
            return True, None
        if self.lose_messages:
            self.lose_messages -= 1
            return False, Confirm.UNKNOWN
        if self.refuse:
            self.refuse -= 1
            return False, Confirm.REFUSED
        self.lose_confirms -= 1
        return True, Confirm.UNKNOWN


@dataclass(eq=False)
class Connection:
    """A client's connection: its subscriptions, its exclusive queues, and whom to tell when it is lost."""

    name: str
    lost: Callable[[], None]
    alive: bool = True
    subscriptions: list[Subscription] = field(default_factory=list)
    exclusive: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Exchange:
    type: str
    alternate: str | None
    bindings: dict[tuple[str, str], None] = field(default_factory=dict)
    routes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def targets(self, key: str) -> tuple[str, ...]:
        """The queues that a routing key reaches, each once."""
        found = self.routes.get(key)
        if found is None:
            matches = self._matches(key)
            found = tuple(dict.fromkeys(queue for pattern, queue in self.bindings if matches(pattern)))
            if len(self.routes) >= _CACHED_ROUTES:
                self.routes.clear()
            self.routes[key] = found
        return found

    def _matches(self, key: str) -> Callable[[str], bool]:
        if self.type == "fanout":
            return lambda _pattern: True
        if self.type == "direct":
            return lambda pattern: pattern == key
        words = _words(key)
        return lambda pattern: topic_matches(_words(pattern), words)


def _words(key: str) -> list[str]:
    return key.split(".") if key else []


def topic_matches(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """Whether a topic pattern fits: `*` is one word, `#` any number of words."""
    reached = {0}
    for part in pattern:
        if part == "#":
            reached = set(range(min(reached), len(words) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(words) and part in ("*", words[at])}
        if not reached:
            return False
    return len(words) in reached


@dataclass(slots=True)
class _Blocked:
    """A message that a blocked connection sent: it arrives when the alarm ends, whoever waits for it or not."""

    connection: Connection
    message: Message
    user: str
    answer: asyncio.Future[Confirm]


class MemoryBroker:
    """One broker with a topology. Raises ValueError for a topology that does not fit together.

    `user` is the broker user of publishers that name none; `dead_letter_retry_s` is how long a dead letter waits
    that its target did not take (seconds). `faults` strike every publisher that has none of its own.
    """

    def __init__(
        self,
        topology: Topology,
        clock: Clock,
        *,
        sleep: Sleep = asyncio.sleep,
        user: str = "riskfleet",
        dead_letter_retry_s: float = 3.0,
    ) -> None:
        self.clock = clock
        self.sleep = sleep
        self.user = user
        self.faults = Faults()
        self.dropped: Counter[tuple[str, str]] = Counter()
        """Messages that are gone, by queue and reason: dropped heads, expired ones without a target, transient ones."""
        self.down = False
        self._alarm = False
        self._retry = microseconds(dead_letter_retry_s)
        self._exchanges: dict[str, _Exchange] = {}
        self._queues: dict[str, MemoryQueue] = {}
        self._policies: dict[str, Policy] = {}
        self._connections: dict[Connection, None] = {}
        self._blocked: list[_Blocked] = []
        self._due: list[tuple[int, int, str]] = []
        self._numbers = itertools.count()
        self._sooner = asyncio.Event()
        self._apply(topology)

    # --- topology -------------------------------------------------------------------------------------------

    async def apply(self, wanted: Topology) -> int:
        """Make everything that is wanted; existing things stay. Returns how many things were asserted.

        Raises MessagingFailureError when an existing queue or exchange is another.
        """
        self._check_up()
        try:
            return self._apply(wanted)
        except ValueError as error:
            raise MessagingFailureError(f"the broker refused the topology: {error}") from error

    def _apply(self, wanted: Topology) -> int:
        for exchange in wanted.exchanges:
            self._declare_exchange(exchange)
        for policy in wanted.policies:
            re.compile(policy.pattern)
            limits_of(policy.definition, "quorum")
            self._policies[policy.name] = policy
        if wanted.policies:
            for existing in self._queues.values():
                existing.limits = self._limits(existing.name, existing.kind)
                self._tend(existing)
        for queue in wanted.queues:
            self.declare(queue.name, queue.type)
        for binding in wanted.bindings:
            self.bind(binding)
        return len(wanted.exchanges) + len(wanted.policies) + len(wanted.queues) + len(wanted.bindings)

    def _declare_exchange(self, wanted: Exchange) -> None:
        if wanted.type not in ("direct", "topic", "fanout"):
            raise ValueError(f"exchange {wanted.name} has the unknown type {wanted.type}")
        alternate = wanted.arguments.get("alternate-exchange")
        found = self._exchanges.setdefault(wanted.name, _Exchange(wanted.type, alternate))
        if (found.type, found.alternate) != (wanted.type, alternate):
            raise ValueError(f"exchange {wanted.name} is {found.type} with alternate {found.alternate}")

    def declare(self, name: str, kind: str = "quorum") -> None:
        """Make a queue; an existing one stays. Raises ValueError when it is of another kind, or the kind is unknown."""
        if kind not in ("quorum", "classic"):
            raise ValueError(f"queue {name} has the unknown type {kind}")
        found = self._queues.get(name)
        if found is None:
            self._queues[name] = MemoryQueue(name, kind, self._limits(name, kind), self._bury)
        elif found.kind != kind:
            raise ValueError(f"queue {name} is {found.kind}, wanted {kind}")

    def declare_exclusive(self, connection: Connection, name: str, *, max_length: int | None = None) -> None:
        """A queue that dies with its connection. Raises MessagingFailureError when another connection has it."""
        self._check_up()
        if name in self._queues and name not in connection.exclusive:
            raise MessagingFailureError(f"the queue {name} belongs to another connection")
        queue = MemoryQueue(name, "classic", Limits(length=max_length), self._bury)
        queue.transient = True
        self._queues[name] = queue
        connection.exclusive.append(name)

    async def declare_temporary(self, name: str) -> None:
        """A quorum queue that is removed after a minute without consumers."""
        self._check_up()
        self.declare(name)
        queue = self._queues[name]
        queue.idle, queue.used_at = _TEMPORARY, self._now()
        self._tend(queue)

    async def delete_queue(self, name: str) -> None:
        """Remove a queue with its messages and bindings; its absence is no error."""
        self._check_up()
        self._remove(name)

    def _remove(self, name: str) -> None:
        if self._queues.pop(name, None) is None:
            return
        for exchange in self._exchanges.values():
            exchange.bindings = {(key, queue): None for key, queue in exchange.bindings if queue != name}
            exchange.routes.clear()

    def bind(self, binding: Binding) -> None:
        """Bind a queue to an exchange. Raises ValueError when one of them is missing."""
        exchange = self._exchanges.get(binding.exchange)
        if exchange is None or binding.queue not in self._queues:
            raise ValueError(f"cannot bind {binding.exchange} to {binding.queue}: one of them is missing")
        exchange.bindings[binding.key, binding.queue] = None
        exchange.routes.clear()

    def unbind(self, binding: Binding) -> None:
        """Undo a binding; its absence is no error."""
        exchange = self._exchanges.get(binding.exchange)
        if exchange is not None:
            exchange.bindings.pop((binding.key, binding.queue), None)
            exchange.routes.clear()

    def _limits(self, name: str, kind: str) -> Limits:
        """Of the policies that match a name the one with the highest priority holds, alone."""
        fitting = [policy for policy in self._policies.values() if re.search(policy.pattern, name)]
        best = max(fitting, key=lambda policy: policy.priority, default=None)
        return limits_of(best.definition, kind) if best else Limits()

    # --- looking --------------------------------------------------------------------------------------------

    def lookup(self, name: str) -> QueueDepth | None:
        """A passive look at a queue; None when there is none."""
        queue = self._queues.get(name)
        if queue is None:
            return None
        return QueueDepth(
            name, len(queue), queue.unacked, len(queue.subscriptions), len(queue.stuck) + len(queue.behind)
        )

    def depths(self) -> dict[str, QueueDepth]:
        """Every queue."""
        return {name: found for name in self._queues if (found := self.lookup(name))}

    async def depth(self, names: Sequence[str]) -> int:
        """Messages (ready and unacked) in these queues together."""
        found = (self.lookup(name) for name in set(names))
        return sum(depth.ready + depth.unacked for depth in found if depth)

    def ready(self, name: str) -> tuple[Message, ...]:
        """The ready messages of a queue, the next one first; empty when there is no such queue."""
        queue = self._queues.get(name)
        return queue.ready() if queue else ()

    def purge(self, name: str) -> int:
        """Remove a queue's ready messages; answers how many."""
        queue = self._queues.get(name)
        return queue.purge() if queue else 0

    # --- clients --------------------------------------------------------------------------------------------

    def publisher(
        self, name: str = "publisher", *, user: str | None = None, timeout_s: float = 5.0, faults: Faults | None = None
    ) -> MemoryPublisher:
        """A Publisher on a connection of its own, as a broker user."""
        return MemoryPublisher(self, name, user or self.user, timeout_s, faults)

    def consumer(
        self,
        queues: Sequence[str],
        handler: Handler,
        probe: Probe,
        policy: ConsumerPolicy | None = None,
        *,
        name: str = "consumer",
    ) -> MemoryConsumer:
        """A consumer with the interface and the grouping of `resilience.rabbit.RabbitConsumer`; start it."""
        return MemoryConsumer(self, queues, handler, probe, policy or ConsumerPolicy(), name)

    def connect(self, name: str, lost: Callable[[], None]) -> Connection:
        """A connection; `lost` is called when the broker ends it. Raises MessagingFailureError while it is down."""
        self._check_up()
        connection = Connection(name, lost)
        self._connections[connection] = None
        return connection

    def subscribe(
        self,
        connection: Connection,
        name: str,
        prefetch: int,
        receive: Callable[[Subscription, int, Stored], None],
    ) -> None:
        """Consume a queue that exists. Raises MessagingFailureError when it does not, or is another's alone."""
        queue = self._queues.get(name)
        if queue is None or not connection.alive:
            raise MessagingFailureError(f"cannot consume {name}: was 'riskfleet topology apply' run?")
        if queue.transient and name not in connection.exclusive:
            raise MessagingFailureError(f"the queue {name} belongs to another connection")
        subscription = Subscription(queue, prefetch, receive)
        connection.subscriptions.append(subscription)
        queue.subscriptions.append(subscription)
        self._tend(queue)

    def unsubscribe(self, connection: Connection, name: str) -> None:
        """Consume a queue no more; what it handed out stays there until it is settled or the connection ends."""
        for subscription in connection.subscriptions:
            line = subscription.queue.subscriptions
            if subscription.queue.name == name and subscription in line:
                line.remove(subscription)

    def ack(self, subscription: Subscription, tags: Iterable[int]) -> None:
        """Settle deliveries; the next ones follow at once."""
        queue = subscription.queue
        for tag in tags:
            if subscription.held.pop(tag, None) is not None:
                queue.unacked -= 1
        self._tend(queue)

    def disconnect(self, connection: Connection) -> None:
        """End a connection: what its subscriptions hold goes back to the queues, counted."""
        if not connection.alive:
            return
        connection.alive = False
        self._connections.pop(connection, None)
        self._answer_blocked(connection)
        for subscription in connection.subscriptions:
            queue = subscription.queue
            queue.used_at = self._now()
            if subscription in queue.subscriptions:
                queue.subscriptions.remove(subscription)
            held, subscription.held = subscription.held, {}
            queue.unacked -= len(held)
            queue.give_back(held.values())
        for name in connection.exclusive:
            self._remove(name)
        for subscription in connection.subscriptions:
            self._tend(subscription.queue)

    # --- publishing -----------------------------------------------------------------------------------------

    def send(self, connection: Connection, user: str, message: Message) -> Confirm | asyncio.Future[Confirm]:
        """What a publisher's message meets: an answer, or while the memory alarm lasts the promise of one."""
        if self._alarm:
            answer: asyncio.Future[Confirm] = asyncio.get_running_loop().create_future()
            self._blocked.append(_Blocked(connection, message, user, answer))
            return answer
        return self._accept(user, message)

    def _accept(self, user: str, message: Message) -> Confirm:
        if not self.acceptable(user, message):
            return Confirm.UNKNOWN
        targets = self._route(message.exchange, message.routing_key)
        refused = self._enqueue(targets, message)
        if refused:
            return Confirm.REFUSED
        return Confirm.CONFIRMED if targets or not message.mandatory else Confirm.UNROUTABLE

    def acceptable(self, user: str, message: Message) -> bool:
        """False for what closes the channel: a missing exchange, or a user_id that is not the publisher's."""
        if message.exchange and message.exchange not in self._exchanges:
            return False
        return message.user_id is None or message.user_id == user

    def _route(self, name: str, key: str) -> tuple[str, ...]:
        """The queues that a message reaches; an exchange that finds none asks its alternate."""
        if not name:
            return (key,) if key in self._queues else ()
        exchange, asked = self._exchanges.get(name), set[str]()
        while exchange is not None:
            if targets := exchange.targets(key):
                return targets
            alternate = exchange.alternate
            if alternate is None or alternate in asked:
                return ()
            asked.add(alternate)
            exchange = self._exchanges.get(alternate)
        return ()

    def _enqueue(self, targets: Iterable[str], message: Message) -> tuple[str, ...]:
        """Put a message into its queues; answers those that refused it."""
        refused: tuple[str, ...] = ()
        now = self._now()
        for name in targets:
            queue = self._queues[name]
            if queue.refuses(len(message.body)):
                refused += (name,)
                continue
            queue.append(message, now)
            self._tend(queue)
        return refused

    def _tend(self, queue: MemoryQueue) -> None:
        """Hand ready messages to whoever has room, the consumers in turn; then see to limits and times."""
        if queue.subscriptions:
            self._dispatch(queue)
        if queue.limits.bounded:
            queue.enforce()
        due = queue.next_due()
        if due is not None and (queue.wake_at is None or due < queue.wake_at):
            queue.wake_at = due
            heapq.heappush(self._due, (due, next(self._numbers), queue.name))
            self._sooner.set()

    def _dispatch(self, queue: MemoryQueue) -> None:
        line = queue.subscriptions
        now, without_room = self._now(), 0
        while len(queue) and without_room < len(line):
            subscription = line[0]
            line.rotate(-1)
            if len(subscription.held) >= subscription.prefetch:
                without_room += 1
                continue
            without_room = 0
            stored = queue.take(now)
            if stored is None:
                return
            subscription.hand(stored)

    # --- dead letters ---------------------------------------------------------------------------------------

    def _bury(self, queue: MemoryQueue, stored: Stored, reason: Death) -> None:
        """Send a message on to the dead-letter exchange, once or until it is taken; without one it is dropped."""
        if queue.limits.exchange is None:
            self.dropped[queue.name, reason] += 1
            return
        letter = Letter(letter_message(queue, stored.message, reason, self.clock.now()), stored.size, 0, reason)
        if queue.limits.at_least_once:
            self._post(queue, letter)
        elif not self._forward(letter):
            self.dropped[queue.name, reason] += 1

    def _post(self, queue: MemoryQueue, letter: Letter) -> None:
        """Forward a letter, or keep it for the next try."""
        if queue.held_up or not self._forward(letter):
            letter.retry_at = self._now() + self._retry
            queue.stick(letter)

    def _forward(self, letter: Letter) -> bool:
        """Whether every target has it now; a cycle without a rejection is no target."""
        if letter.left is None:
            targets = self._route(letter.message.exchange, letter.message.routing_key)
            targets = tuple(name for name in targets if not is_cycle(name, letter.message))
            if not targets:
                return False
        else:
            targets = tuple(name for name in letter.left if name in self._queues)
        letter.left = self._enqueue(targets, letter.message)
        return not letter.left

    # --- time -----------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return microseconds(self.clock.monotonic())

    def next_due(self) -> float | None:
        """When the next thing happens by itself (seconds on the clock's `monotonic`), if anything does."""
        due = self._next_due()
        return None if due is None else due / 1_000_000

    def _next_due(self) -> int | None:
        while self._due:
            due, _, name = self._due[0]
            queue = self._queues.get(name)
            if queue is not None and queue.wake_at == due:
                return due
            heapq.heappop(self._due)
        return None

    async def advance(self) -> int:
        """Do everything that is due by the clock, then let others run; answers how many queues were attended to."""
        now, attended = self._now(), 0
        while (due := self._next_due()) is not None and due <= now:
            queue = self._queues[heapq.heappop(self._due)[2]]
            queue.wake_at = None
            self._attend(queue, now)
            attended += 1
        await self.sleep(0)
        return attended

    def _attend(self, queue: MemoryQueue, now: int) -> None:
        if queue.idle is not None and not queue.subscriptions and now >= queue.used_at + queue.idle:
            self._remove(queue.name)
            return
        queue.expire(now)
        for _ in range(len(queue.stuck)):
            if queue.stuck[0].retry_at > now:
                break
            self._post(queue, queue.unstick(queue.stuck))
        while queue.behind and not queue.held_up:
            self._post(queue, queue.unstick(queue.behind))
        self._tend(queue)

    async def run(self) -> None:
        """Advance whenever something is due, for ever: the embedded mode's one background task."""
        while True:
            await self.advance()
            self._sooner.clear()
            due = self.next_due()
            waits: list[Awaitable[object]] = [self._sooner.wait()]
            if due is not None:
                waits.append(self.sleep(max(due - self.clock.monotonic(), _SHORTEST_WAIT_S)))
            await first_of(*waits)

    # --- faults ---------------------------------------------------------------------------------------------

    def cut(self, name: str) -> int:
        """Kill every connection of that name, as a broken network does; their owners connect again. How many."""
        found = [connection for connection in self._connections if connection.name == name]
        for connection in found:
            self.disconnect(connection)
            connection.lost()
        return len(found)

    def alarm(self, on: bool) -> None:
        """The memory alarm: publishes hang; what was sent meanwhile arrives when it ends."""
        self._alarm = on
        if on:
            return
        blocked, self._blocked = self._blocked, []
        for one in blocked:
            confirm = self._accept(one.user, one.message)
            if not one.answer.done():
                one.answer.set_result(confirm)

    def _answer_blocked(self, connection: Connection) -> None:
        """What a blocked connection had sent is lost with it."""
        for one in self._blocked:
            if one.connection is connection and not one.answer.done():
                one.answer.set_result(Confirm.UNKNOWN)
        self._blocked = [one for one in self._blocked if one.connection is not connection]

    def crash(self) -> None:
        """The broker is gone until `recover`: connections are lost, deliveries go back, transient things are gone."""
        self.down = True
        for connection in list(self._connections):
            self.disconnect(connection)
            connection.lost()
        for queue in list(self._queues.values()):
            if queue.transient:
                self._remove(queue.name)
            elif gone := queue.lose_transient():
                self.dropped[queue.name, "restart"] += gone

    def recover(self) -> None:
        """The broker answers again; consumers find it by themselves."""
        self.down = False

    def restart(self) -> None:
        """Crash and recover."""
        self.crash()
        self.recover()

    def _check_up(self) -> None:
        if self.down:
            raise MessagingFailureError("the memory broker is down")


class MemoryPublisher:
    """Publisher of one broker user. `timeout_s` is how long it waits for an answer (seconds).

    Connected from the start, and again after a lost connection as soon as the broker is up.
    """

    def __init__(
        self, broker: MemoryBroker, name: str, user: str, timeout_s: float, faults: Faults | None = None
    ) -> None:
        self._broker = broker
        self._name = name
        self._user = user
        self._timeout_s = timeout_s
        self._faults = faults
        self._connection: Connection | None = None
        self._closed = False

    async def start(self) -> None:
        """Connect. Raises MessagingFailureError when the broker is down."""
        self._closed = False
        self._connected()

    def _connected(self) -> Connection:
        if self._connection is None or not self._connection.alive:
            self._connection = self._broker.connect(self._name, lambda: None)
        return self._connection

    async def publish(self, messages: Sequence[Message]) -> Sequence[Confirm]:
        """Publish all and await their confirms together; one Confirm per message."""
        if self._closed or self._broker.down:
            await self._broker.sleep(0)
            return [Confirm.UNKNOWN] * len(messages)
        connection, closed = self._connected(), False
        answers: list[Confirm | asyncio.Future[Confirm]] = []
        for message in messages:
            if closed:
                answers.append(Confirm.UNKNOWN)  # what follows on a channel that was closed is not read
                continue
            answers.append(self._send(connection, message))
            closed = not self._broker.acceptable(self._user, message)
        waiting = [answer for answer in answers if isinstance(answer, asyncio.Future)]
        if waiting:
            await first_of(asyncio.gather(*waiting), self._broker.sleep(self._timeout_s))
        else:
            await self._broker.sleep(0)
        return [_known(answer) if isinstance(answer, asyncio.Future) else answer for answer in answers]

    def _send(self, connection: Connection, message: Message) -> Confirm | asyncio.Future[Confirm]:
        faults = self._faults or self._broker.faults
        arrives, forced = faults.strike(message)
        answer = self._broker.send(connection, self._user, message) if arrives else Confirm.UNKNOWN
        if not message.confirm:
            return Confirm.CONFIRMED
        return forced or answer

    async def ping(self) -> None:
        """Publish a message that nobody receives and await its confirm. Raises MessagingFailureError."""
        nobody = Message("", "risk.ping", b"", f"ping:{self._name}", persistent=False, mandatory=False)
        if (await self.publish([nobody]))[0] is not Confirm.CONFIRMED:
            raise MessagingFailureError("the memory broker did not confirm a message")

    async def close(self) -> None:
        """Close the connection; later publishes are UNKNOWN."""
        self._closed = True
        if self._connection is not None:
            self._broker.disconnect(self._connection)


def _known(answer: asyncio.Future[Confirm]) -> Confirm:
    return answer.result() if answer.done() and not answer.cancelled() else Confirm.UNKNOWN

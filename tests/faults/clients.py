"""The clients of a chaos run: they send what the plan says when it says, and write down what they saw.

An answer that is no answer (503, a lost connection, no confirm) is `unknown`, and the same bytes go out again under the
same identity, as the protocol tells clients, until there is a definite answer or `close` gives up.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import httpx
import orjson

from contracts.events import event_id_of
from contracts.failures import MessagingFailureError
from contracts.ports import Confirm, Message
from contracts.tenancy import TenantScope
from contracts.topology import INGEST
from deploy import stream
from deploy.provision import DemoCredentials
from resilience.rabbit import RabbitPublisher
from tests.faults.load import Arrival, Door, History, Line, Op, Submission, Variant, body_of, shown_in

_SENDERS: Final = 12
_BATCH: Final = 25
_LONGEST_WAIT_S: Final = 6.0
_UNKNOWN: Final = (408, 429, 500, 502, 503, 504)
PROBLEM: Final = "urn:riskfleet:problem:"


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the clients knock: the gateway, and the broker as an administrator's URL names it."""

    http: str
    amqp: str


class Clients:
    """All clients of some tenants."""

    def __init__(self, doors: Doors, tenants: Sequence[DemoCredentials], history: History, seed: int) -> None:
        """Nothing is connected yet."""
        self._doors, self._tenants, self._history = doors, tenants, history
        self._chance = random.Random(f"clients:{seed}")
        self._queues: dict[tuple[int, Door], asyncio.Queue[Submission]] = {
            (tenant, door): asyncio.Queue() for tenant in range(len(tenants)) for door in Door
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._trusted = ssl.create_default_context()  # made once: each client would read the certificates again
        self.unanswered = 0
        self.skipped = 0
        self._tries: dict[Submission, int] = {}
        self.defects: list[str] = []
        self._stopped = False

    async def start(self) -> None:
        """Begin to send what comes in."""
        for (tenant, door), queue in self._queues.items():
            senders = {Door.HTTP: _SENDERS, Door.BATCH: 2, Door.AMQP: 1}[door]
            work = {Door.HTTP: self._singles, Door.BATCH: self._batches, Door.AMQP: self._messages}[door]
            for _ in range(senders):
                self._spawn(work(self._tenants[tenant], queue))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.defects.append(repr(error))  # a client that died would look like a fleet that is quiet

    def submit(self, submission: Submission) -> None:
        """Send this now, whatever else is under way."""
        self.unanswered += 1
        self._queues[submission.tenant, submission.door].put_nowait(submission)

    async def play(self, planned: Sequence[Arrival], *, room: asyncio.Event) -> None:
        """Submit each arrival at its time. While there is no `room` new events are left out (and counted), never held
        back: a load that waits for the fleet would hide what the fleet cannot do.
        """
        began = self._history.now()
        left_out: set[tuple[int, str]] = set()
        for arrival in planned:
            await asyncio.sleep(max(0.0, began + arrival.at_s - self._history.now()))
            submission = arrival.submission
            key = (submission.tenant, submission.identity)
            first = submission.variant is not Variant.OTHER and not submission.repeat
            if (first and not room.is_set()) or key in left_out:
                left_out.add(key)
                self.skipped += 1
                continue
            self.submit(submission)

    async def settle(self, within_s: float) -> int:
        """Wait until everything has a definite answer; how many have none at the deadline."""
        deadline = self._history.now() + within_s
        while True:
            if not self.unanswered or self._history.now() > deadline:
                return self.unanswered
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Give up on what has no answer."""
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- the history -----------------------------------------------------------------------------------

    def _line(
        self,
        submission: Submission,
        op: Op,
        status: int = 0,
        problem: str = "",
        shown: tuple[int, str, str] | None = None,
    ) -> None:
        tenant = self._tenants[submission.tenant].tenant
        self._history.add(
            Line(
                round(self._history.now(), 4),
                op,
                submission.door,
                tenant,
                submission.identity,
                event_id_of(TenantScope(tenant), submission.identity),
                submission.variant,
                status,
                problem,
                shown,
            )
        )

    def _answered(self, submission: Submission, status: int, document: dict[str, Any]) -> bool:
        """Write an answer down; True when it is definite."""
        problem = str(document.get("type", "")).removeprefix(PROBLEM)
        if status in (200, 202):
            self._line(submission, Op.OK, status, shown=shown_in(document.get("decision")))
        elif status in _UNKNOWN:
            self._line(submission, Op.UNKNOWN, status, problem)
            return False
        else:
            self._line(submission, Op.FAIL, status, problem)
        self.unanswered -= 1
        return True

    def _again(self, submission: Submission) -> None:
        """The same identity once more, after a while that doubles: a client that hammers keeps a fleet down."""
        tries = self._tries[submission] = self._tries.get(submission, 0) + 1

        async def later() -> None:
            await asyncio.sleep(min(0.25 * 2 ** min(tries, 6), _LONGEST_WAIT_S) * (0.5 + self._chance.random()))
            self._queues[submission.tenant, submission.door].put_nowait(submission)

        if not self._stopped:
            self._spawn(later())

    # --- the doors ---------------------------------------------------------------------------------------

    async def _singles(self, tenant: DemoCredentials, queue: asyncio.Queue[Submission]) -> None:
        # A client each: one pool shared by all costs several times the CPU, which is the fleet's here.
        async with self._client(tenant) as client:
            while True:
                submission = await queue.get()
                body = orjson.dumps(body_of(submission, tenant.tenant))
                self._line(submission, Op.INVOKE)
                status, document = await _post(client, "/v1/events", body)
                if not self._answered(submission, status, document):
                    self._again(submission)

    async def _batches(self, tenant: DemoCredentials, queue: asyncio.Queue[Submission]) -> None:
        async with self._client(tenant) as client:
            while True:
                some = await _some(queue, _BATCH, 0.05)
                body = orjson.dumps([body_of(one, tenant.tenant) for one in some])
                for one in some:
                    self._line(one, Op.INVOKE)
                status, document = await _post(client, "/v1/events/batch", body)
                results = document.get("results") if status == 200 else [{"status": status}] * len(some)
                for one, result in zip(some, results or [], strict=True):
                    problem = result.get("problem") or {}
                    if not self._answered(one, result["status"], result | {"type": problem.get("type", "")}):
                        self._again(one)

    def _client(self, tenant: DemoCredentials) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {tenant.api_key}", "Content-Type": "application/json"}
        return httpx.AsyncClient(base_url=self._doors.http, headers=headers, timeout=15, verify=self._trusted)

    async def _messages(self, tenant: DemoCredentials, queue: asyncio.Queue[Submission]) -> None:
        url = stream.as_user(self._doors.amqp, tenant.broker_user, tenant.broker_password)
        while True:
            publisher = RabbitPublisher(url, name=f"upstream-{tenant.tenant}", timeout_s=3.0)
            try:
                await publisher.start()
                while await self._publish(publisher, tenant, await _some(queue, _BATCH, 0.02)):
                    pass
            except MessagingFailureError:
                await asyncio.sleep(0.5)
            finally:
                with suppress(Exception):
                    async with asyncio.timeout(2):
                        await publisher.close()

    async def _publish(self, publisher: RabbitPublisher, tenant: DemoCredentials, some: Sequence[Submission]) -> bool:
        """One group; False when the connection is to be made anew."""
        messages = []
        for one in some:
            body = body_of(one, tenant.tenant)
            self._line(one, Op.INVOKE)
            messages.append(
                Message(
                    exchange=INGEST,
                    routing_key=f"{tenant.tenant}.{body['kind']}",
                    body=orjson.dumps(body),
                    message_id=one.identity,
                    content_type="application/json",
                    user_id=tenant.broker_user,
                )
            )
        well = True
        for one, confirm in zip(some, await publisher.publish(messages), strict=True):
            if confirm is Confirm.CONFIRMED:
                self._line(one, Op.OK)
                self.unanswered -= 1
            else:
                self._line(one, Op.UNKNOWN, problem=str(confirm))
                self._again(one)
                well = well and confirm is not Confirm.UNKNOWN
        return well


async def _post(client: httpx.AsyncClient, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and document; 503 for no answer at all."""
    try:
        answer = await client.post(path, content=body)
        return answer.status_code, orjson.loads(answer.content)
    except Exception:  # noqa: BLE001 - a socket that is reset while it connects is an AttributeError of the event loop
        return 503, {}


async def _some(queue: asyncio.Queue[Submission], most: int, linger_s: float) -> list[Submission]:
    """What waits in a queue, at least one."""
    found = [await queue.get()]
    await asyncio.sleep(linger_s)
    while len(found) < most and not queue.empty():
        found.append(queue.get_nowait())
    return found

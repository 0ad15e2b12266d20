"""What must be true when the last fault has healed and the queues ran dry, read from outside.

Reads the tables, the queues and what clients were told; nothing of a process. Answers sentences, one per violation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import orjson

from contracts.events import body_digest_of, event_id_of, parse_event
from contracts.outcomes import Outcome
from contracts.ports import DecisionRow, Message
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS as DECISIONS_EXCHANGE
from governance.audit import chain_of
from governance.memory import MemoryDatabase
from governance.memory.audit import RECORDS, _verify
from governance.memory.ledger import APPROVALS, DECISIONS, EVENTS, StoredDecision
from governance.memory.records import DEAD_LETTERS, StoredLetter
from resilience.memory.broker import MemoryBroker
from resilience.memory.state_store import MemoryRedis

_RANK = {Outcome.APPROVED: 0, Outcome.REQUIRE_APPROVAL: 1, Outcome.REJECTED: 2}
_CONFLICT = "idempotency-conflict"
_DIED = "invalid-workflow-state"


@dataclass
class Answered:
    """A submission and what its sender was told in the end."""

    scope: TenantScope
    identity: str
    body: bytes
    door: str
    accepted: bool = False
    refused: str | None = None
    decision: DecisionRow | None = None

    @property
    def event_id(self) -> str:
        """The id that its identity stands for."""
        return event_id_of(self.scope, self.identity)

    @property
    def digest(self) -> str:
        """The digest of its body."""
        return body_digest_of(parse_event(orjson.loads(self.body)).canonical_bytes())


@dataclass(frozen=True)
class Observed:
    """Where the oracle looks. `kills`: how many processes died."""

    database: MemoryDatabase
    broker: MemoryBroker
    redis: MemoryRedis
    tenants: Sequence[TenantScope]
    kills: int


def violations(seen: Observed, answers: Sequence[Answered], poisons: int) -> list[str]:
    """Every broken promise, as a sentence."""
    rows = {(row.tenant, row.event_id): row for row in seen.database.contents(DECISIONS)}
    letters = seen.database.contents(DEAD_LETTERS)
    return [
        *_nothing_lost(answers, rows, letters),
        *_nothing_invented(seen, answers, rows),
        *_parks(seen, letters, poisons),
        *_one_outcome(seen, rows),
        *_never_more_permissive(answers, rows),
        *_asked(seen, rows),
        *_audited(seen),
        *_isolated(seen),
        *_nothing_left(seen),
    ]


def _nothing_lost(
    answers: Sequence[Answered], rows: dict[tuple[str, str], StoredDecision], letters: Sequence[StoredLetter]
) -> list[str]:
    found = []
    for one in answers:
        key = (one.scope.tenant_id, one.event_id)
        row = rows.get(key)
        parked = [letter.problem for letter in letters if (letter.tenant, letter.event_id) == key]
        if one.decision is not None and one.decision.body_digest != one.digest:
            found.append(f"{one.identity} was answered with the decision about another body")
        if not one.accepted:
            if one.refused not in (_CONFLICT, "identity-conflict", "idempotency-conflict"):
                found.append(f"{one.identity} was refused with {one.refused}")
            elif row is None and not parked:
                found.append(f"{one.identity} was refused as a conflict with nothing")
        elif row is None and not parked:
            found.append(f"{one.identity} of {one.scope} was accepted and is lost")
        elif row is not None and row.body_digest != one.digest and not parked and one.door != "amqp":
            found.append(f"{one.identity}: another body was decided, and nobody was told")
    return found


def _nothing_invented(
    seen: Observed, answers: Sequence[Answered], rows: dict[tuple[str, str], StoredDecision]
) -> list[str]:
    known = {(one.scope.tenant_id, one.event_id): set[str]() for one in answers}
    for one in answers:
        known[one.scope.tenant_id, one.event_id].add(one.digest)
    found = [
        f"{key} was decided and never sent" for key, row in rows.items() if row.body_digest not in known.get(key, ())
    ]
    events = {(row.tenant, row.event_id): row.body_digest for row in seen.database.contents(EVENTS)}
    return found + [
        f"{key} was decided on another body than the one that owns it"
        for key, row in rows.items()
        if events.get(key) != row.body_digest
    ]


def _parks(seen: Observed, letters: Sequence[StoredLetter], poisons: int) -> list[str]:
    found = []
    undecodable = [letter for letter in letters if not letter.event_id]
    if len(undecodable) != poisons:
        found.append(f"{poisons} poison messages ended as {len(undecodable)} dead letters")
    expected = {_CONFLICT, _DIED} if seen.kills >= 4 else {_CONFLICT}
    return found + [
        f"{letter.event_id} was parked at {letter.stage}: {letter.problem} {letter.exception_class}"
        for letter in letters
        if letter.event_id and letter.problem not in expected
    ]


def _one_outcome(seen: Observed, rows: dict[tuple[str, str], StoredDecision]) -> list[str]:
    found = []
    sent: dict[tuple[str, str], set[bytes]] = {}
    for scope, message in _sent(seen):
        if message.exchange == DECISIONS_EXCHANGE:
            sent.setdefault((scope.tenant_id, str(message.headers["event_id"])), set()).add(message.body)
    for key, bodies in sent.items():
        row = rows.get(key)
        if row is None or bodies != {row.decision}:
            found.append(f"{key} was published with {len(bodies)} outcomes that PostgreSQL does not hold alone")
    return found + [f"the decision about {key} was never published" for key in rows if key not in sent]


def _sent(seen: Observed) -> list[tuple[TenantScope, Message]]:
    return [(scope, message) for scope in seen.tenants for message in seen.broker.ready(f"up.{scope}.all")]


def _never_more_permissive(answers: Sequence[Answered], rows: dict[tuple[str, str], StoredDecision]) -> list[str]:
    found = []
    for one in answers:
        row = rows.get((one.scope.tenant_id, one.event_id))
        if row is not None and row.body_digest == one.digest:
            without = faultless(_shape(one.body))
            if _RANK[Outcome(row.outcome)] < _RANK[without]:
                found.append(f"{one.identity} is {row.outcome}, and {without} without faults")
    return found


def _shape(body: bytes) -> bytes:
    """The body without what names it: its outcome depends on the rest alone, since its subject is its own."""
    document = orjson.loads(body)
    return orjson.dumps(
        {**document, "id": "order", "subject": {"type": "customer", "id": "c"}}, option=orjson.OPT_SORT_KEYS
    )


@cache
def faultless(body: bytes) -> Outcome:
    """The outcome of an event when nothing goes wrong."""
    from tests.simulation.plans import Plan, Sent
    from tests.simulation.run import Run

    run = Run(Plan(0, (Sent(0, "order", body, "http", 0.0),)))
    run.loop.owned(run.loop.world).run(run._make)
    run.loop.run(run._main())
    (row,) = run.fleet.database.contents(DECISIONS)
    return Outcome(row.outcome)


def _asked(seen: Observed, rows: dict[tuple[str, str], StoredDecision]) -> list[str]:
    """What waits for a person is in front of one."""
    asked = {(row.tenant, row.event_id) for row in seen.database.contents(APPROVALS)}
    waiting = [key for key, row in rows.items() if row.outcome == Outcome.REQUIRE_APPROVAL]
    return [f"{key} waits for a person, and none is asked" for key in waiting if key not in asked]


def orphans(seen: Observed) -> int:
    """Records of versions that no decision stands on: what was computed twice after Redis forgot."""
    reports = [seen.database.apply([scope], lambda tx, scope=scope: _verify(tx, scope, None)) for scope in seen.tenants]  # type: ignore[misc]
    return sum(report.orphans for report in reports)


def _audited(seen: Observed) -> list[str]:
    found = []
    for scope in seen.tenants:
        report = seen.database.apply([scope], lambda tx, scope=scope: _verify(tx, scope, None))  # type: ignore[misc]
        if not report.intact or report.missing:
            found.append(f"the audit of {scope} does not hold: {report.problem}")
    return found


def _isolated(seen: Observed) -> list[str]:
    found = []
    for scope in seen.tenants:
        foreign = [f"canary-{other}".encode() for other in seen.tenants if other != scope]
        texts = [message.body for owner, message in _sent(seen) if owner == scope]
        texts += [
            row.decision + row.state for row in seen.database.contents(DECISIONS) if row.tenant == scope.tenant_id
        ]
        texts += [row.link.body for row in seen.database.contents(RECORDS) if row.tenant == chain_of(scope)]
        if any(canary in text for text in texts for canary in foreign):
            found.append(f"something of another tenant is in what belongs to {scope}")
    return found


def _nothing_left(seen: Observed) -> list[str]:
    now = seen.redis.now_ms
    locked = [key for key, cell in seen.redis.cells.items() if cell.lock is not None and cell.until > now]
    found = [f"a lock was left behind on {event} of {scope}" for scope, event in locked]
    return found + [f"{n} messages were dropped from {queue}: {why}" for (queue, why), n in seen.broker.dropped.items()]

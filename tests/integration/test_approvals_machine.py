"""Any order of answers, claims, reopenings and expiries on a real PostgreSQL, beside a model of the rules.

The model is what docs/operations.md promises people: who may answer what, when it is decided, and what is written for
it. Each example is a tenant of its own, so that a failure is replayed by its operations alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.failures import AuthorizationError, ConflictError, RiskfleetError
from contracts.state import Thresholds
from contracts.topology import DECISIONS, Layouts
from governance.approvals import ApprovalStatus, Cause
from governance.postgres import PostgresLedger, create_tenant
from governance.postgres.approvals import Approvals
from tests.fakes import RecordingTelemetry
from tests.integration import test_approvals
from tests.integration.test_approvals import ANN, BOB, CAT, PARTITIONS, Room, set_policy
from tests.integration.test_postgres import SetClock, fresh_scope

pytestmark = pytest.mark.integration

PEOPLE = {person.person: person for person in (ANN, BOB, CAT)}
EXPIRY_S, CLAIM_S = 3_600.0, 900.0
AMOUNTS = {"small": ("10.00", 1), "large": ("5000.00", 2)}
OPENED_AT = SetClock(0.0).now()

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(("approve", "reject", "claim", "release")),
            st.sampled_from(sorted(AMOUNTS)),
            st.sampled_from(sorted(PEOPLE)),
            st.sampled_from((0,) * 8 + (-1, 1)),
        ),
        st.tuples(st.just("open"), st.sampled_from(sorted(AMOUNTS)), st.sampled_from(sorted(PEOPLE)), st.just(0)),
        st.tuples(st.just("wait"), st.sampled_from((60.0, 1_000.0, 3_000.0))),
        st.tuples(st.just("expire")),
    ),
    min_size=12,
    max_size=40,
)


@dataclass
class Modelled:
    """One event as the rules have it; times are the clock's seconds."""

    needed: int
    opened_s: float
    revision: int = 1
    about: int = 1
    status: ApprovalStatus = ApprovalStatus.OPEN
    opened_by: str | None = None
    voters: set[str] = field(default_factory=set)
    holder: str | None = None
    claimed_s: float = 0.0
    decided_by: list[str] = field(default_factory=lambda: ["pipeline"])
    records: Counter[str] = field(default_factory=Counter)

    def _open(self, named: int) -> None:
        if named != self.about or self.status is not ApprovalStatus.OPEN:
            raise ConflictError

    def _close(self, status: ApprovalStatus, by: str) -> None:
        self.status, self.revision = status, self.revision + 1
        self.decided_by.append(by)
        self.records[f"approval.{status}"] += 1

    def approve(self, who: str, named: int, now: float) -> None:
        self._open(named)
        if who == self.opened_by:
            raise AuthorizationError
        if who in self.voters:
            raise ConflictError
        self.voters.add(who)
        if len(self.voters) >= self.needed:
            self._close(ApprovalStatus.APPROVED, who)
        else:
            self.records["approval.voted"] += 1

    def reject(self, who: str, named: int, now: float) -> None:
        self._open(named)
        if who in self.voters:
            raise ConflictError
        self._close(ApprovalStatus.REJECTED, who)

    def claim(self, who: str, named: int, now: float) -> None:
        self._open(named)
        if self.holder not in (None, who) and now < self.claimed_s + CLAIM_S:
            raise ConflictError
        self.holder, self.claimed_s = who, now
        self.records["approval.claimed"] += 1

    def release(self, who: str, named: int, now: float) -> None:
        self._open(named)
        if self.holder == who:
            self.holder = None
            self.records["approval.released"] += 1

    def open(self, who: str, named: int, now: float) -> None:
        if self.status is ApprovalStatus.OPEN:
            raise ConflictError
        self.status, self.about, self.opened_by, self.opened_s = ApprovalStatus.OPEN, self.revision, who, now
        self.voters, self.holder = set(), None
        self.records["approval.opened"] += 1

    def expire(self, now: float) -> None:
        if self.status is ApprovalStatus.OPEN and now >= self.opened_s + EXPIRY_S:
            self._close(ApprovalStatus.EXPIRED, "pipeline")


database, engine = test_approvals.database, test_approvals.engine


async def new_room(engine: AsyncEngine) -> Room:
    scope, clock, telemetry = fresh_scope(), SetClock(), RecordingTelemetry()
    await create_tenant(engine, scope, "Acme", thresholds=Thresholds())
    approvals = Approvals(engine, clock, Layouts.first(PARTITIONS), telemetry)
    room = Room(engine, scope, clock, telemetry, approvals, PostgresLedger(engine))
    await set_policy(room, expiry_s=int(EXPIRY_S), expiry_outcome="REJECTED", four_eyes_amount="1000")
    return room


async def outcome_of(work: Callable[[], Any]) -> type[RiskfleetError] | None:
    """The kind of error that a command ended with; None when it was carried out."""
    try:
        answer = work()
        if answer is not None:
            await answer
    except RiskfleetError as error:
        return type(error)
    return None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
async def test_any_order_of_commands_is_what_the_rules_say(
    engine: AsyncEngine, operations: list[tuple[Any, ...]]
) -> None:
    room = await new_room(engine)
    real: dict[str, str] = {}
    model: dict[str, Modelled] = {}
    for name, (value, needed) in AMOUNTS.items():
        real[name] = (await room.waiting(name, amount={"value": value, "currency": "EUR"})).event_id
        model[name] = Modelled(needed, (OPENED_AT - SetClock(0.0).now()).total_seconds())
    for operation in operations:
        room.clock.seconds += 1.0  # no two commands of one person at one moment: they would be one record
        match operation:
            case ("wait", seconds):
                room.clock.seconds += seconds
            case ("expire",):
                await room.approvals.expire_due()
                for one in model.values():
                    one.expire(room.clock.seconds)
            case (what, name, who, off):
                named = model[name].about + off
                expected = await outcome_of(lambda: getattr(model[name], what)(who, named, room.clock.seconds))  # noqa: B023
                told = {"cause": Cause.CONTESTED, "reason": "because"} if what == "open" else {"revision": named}
                told |= {"reason": "because"} if what in ("approve", "reject") else {}
                found = await outcome_of(
                    lambda: getattr(room.approvals, what)(PEOPLE[who], room.scope, real[name], **told)  # noqa: B023
                )
                assert found is expected, operation
    written, sent = Counter[tuple[str, str]](), Counter[str]()
    for record in await room.records():
        written[record["event_id"], record["action"]] += 1
    for message in await room.messages():
        if message.exchange == DECISIONS:
            sent[message.message_id] += 1
    for name, one in model.items():
        view = await room.approvals.show(room.scope, real[name])
        assert (view.approval.revision, view.approval.status) == (one.about, one.status)
        assert {vote.person for vote in view.votes if vote.vote == "approve"} >= one.voters
        revisions = await room.revisions(real[name])
        assert [row[0] for row in revisions] == list(range(1, one.revision + 1))
        assert [row[3] or "pipeline" for row in revisions] == one.decided_by
        # Every change stands in the audit once, and every later revision was sent once.
        assert {action: n for (event, action), n in written.items() if event == real[name]} == dict(one.records)
        assert [sent[f"{real[name]}:{n}"] for n in range(2, one.revision + 1)] == [1] * (one.revision - 1)

"""Rules of replays and discards that need no table: what is tried, what is sent again, and who may do so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from contracts.codec import encode_carrier, entry_of
from contracts.failures import AuthorizationError, DatabaseError, ModelNotApprovedError, NotKnownError
from contracts.identity import EVERYWHERE, Grant, Permission, Principal, Role
from contracts.outcomes import Decision, Outcome
from contracts.settlement import failure_headers, letter_from, replays_of, undelivered_letters
from contracts.state import EventState
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from governance.deadletters import Letter, LetterPolicy, Standing, dry_run, reach_of, why_not
from tests.conformance.databases import AT, decided, received
from workers.settling import park, park_bytes

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
READ = Permission.DEADLETTERS_READ


def of_state(state: EventState, stage: str = "retrieval", **changes: object) -> Letter:
    found = park(entry_of(state, stage), ModelNotApprovedError(), AT).letter
    made = Letter(
        *(found.letter_id, found.scope, found.event_id, found.stage, found.problem, found.fingerprint),
        *("open", found.replays, found.body),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class Judge:
    """A redecider that decides, or fails."""

    def __init__(self, answer: Outcome | Exception) -> None:
        self.answer = answer
        self.asked: list[EventState] = []

    async def redecide(self, state: EventState) -> Decision:
        self.asked.append(state)
        if isinstance(self.answer, Exception):
            raise self.answer
        final = decided(received(state.scope), self.answer).decided
        assert final is not None
        return final.decision


async def test_a_dry_run_says_what_each_letter_would_come_to() -> None:
    state = received(ACME)
    label = Letter("l", ACME, "", "labels", "p", "f", "open", 0, b"garbage")
    found = [
        (of_state(state), Standing(owner=state.body_digest)),
        (of_state(state), Standing(state.body_digest, "REJECTED", 2)),
        (of_state(state, status="replayed"), Standing()),
        (of_state(state, replays=3), Standing()),
        (label, Standing()),
    ]
    judge = Judge(Outcome.APPROVED)
    ran = await dry_run(found, judge, LetterPolicy(), Layouts.first(4))
    assert [(each.result, each.now, each.then) for each in ran.results] == [
        ("decides", None, "APPROVED"),
        ("noop", "REJECTED", "REJECTED"),
        ("noop", None, None),
        ("refused", None, None),
        ("refused", None, None),
    ]
    assert (ran.counts, ran.changes) == ({"decides": 1, "noop": 2, "refused": 2}, {"undecided → APPROVED": 1})
    assert [one.event_id for one in judge.asked] == [state.event_id]


async def test_a_dry_run_of_what_is_still_broken_says_so_and_a_server_s_failure_is_no_answer() -> None:
    found = [(of_state(received(ACME)), Standing())]
    ran = await dry_run(found, Judge(ModelNotApprovedError()), LetterPolicy(), Layouts.first(4))
    assert (ran.results[0].result, "ModelNotApprovedError" in ran.results[0].why) == ("parks", True)
    ran = await dry_run(found, Judge(ZeroDivisionError("their secret")), LetterPolicy(), Layouts.first(4))
    assert (ran.results[0].result, "secret" in ran.results[0].why) == ("parks", False)
    with pytest.raises(DatabaseError):
        await dry_run(found, Judge(DatabaseError()), LetterPolicy(), Layouts.first(4))


def test_a_park_after_a_replay_is_another_letter_and_keeps_its_count() -> None:
    entry, error = entry_of(received(ACME), "retrieval"), ModelNotApprovedError()
    names = {park(entry.evolve(replays=n, attempts=a), error, AT).letter.letter_id for n in range(3) for a in range(3)}
    assert len(names) == 9
    assert len({park_bytes(b"x", "labels", error, AT, replays=n).letter.letter_id for n in range(3)}) == 3
    again = park(entry.evolve(replays=2), error, AT)
    assert letter_from(failure_headers(again.letter), again.letter.body) == again.letter
    assert b'"replays":2' in again.record.body
    (often,) = undelivered_letters({}, encode_carrier((entry.evolve(replays=2),)), AT)
    assert often.replays == 2
    # The release before reads a first park as it always did.
    assert "replays" not in str(failure_headers(park(entry, error, AT).letter))
    assert entry.message_id != entry.evolve(replays=1).message_id


@pytest.mark.parametrize(("value", "count"), [(2, 2), (True, 0), (-1, 0), ("3", 0), (None, 0), (2**40, 0)])
def test_a_count_of_replays_that_cannot_be_one_is_none(value: object, count: int) -> None:
    assert replays_of({"x-riskfleet-replays": value}) == count


def test_whoever_may_touch_nothing_of_a_tenant_does_not_know_it() -> None:
    def somebody(*grants: Grant, scope: TenantScope | None = None) -> Principal:
        return Principal("user:a", "a", frozenset(grants), scope)

    own = somebody(Grant("acme", Role.ANALYST))
    assert reach_of(own, READ).scopes == (ACME,)
    assert reach_of(own, READ, "acme").scopes == (ACME,)
    for foreign in ("globex", "_system", "NOT A TENANT", "*"):
        with pytest.raises(NotKnownError):
            reach_of(own, READ, foreign)
    for place in (None, "acme"):
        with pytest.raises(AuthorizationError):
            reach_of(own, Permission.DEADLETTERS_RESOLVE, place)
        with pytest.raises(AuthorizationError):
            reach_of(somebody(Grant("acme", Role.VIEWER)), READ, place)
    every = somebody(Grant(EVERYWHERE, Role.ADMIN))
    assert reach_of(every, READ).everybody
    assert (reach_of(every, READ, "globex").scopes, reach_of(every, READ, "_system").scopes) == ((GLOBEX,), (None,))
    bound = replace(every, scope=ACME)
    assert (reach_of(bound, READ).scopes, reach_of(bound, READ).everybody) == ((ACME,), False)
    for foreign in ("globex", "_system"):
        with pytest.raises(NotKnownError):
            reach_of(bound, READ, foreign)


def test_bytes_of_another_release_wait_for_a_release_that_reads_them() -> None:
    state = received(ACME)
    entry = entry_of(state, "retrieval")
    newer = replace(entry, body=entry.body.replace(b'"schema":1', b'"schema":99'))
    assert newer.body != entry.body
    why = why_not(of_state(state, body=encode_carrier((newer,))), Layouts.first(4))
    assert why is not None
    assert "cannot be decoded" in why
    assert why_not(of_state(state), Layouts.first(4)) is None

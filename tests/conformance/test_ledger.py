"""What every Ledger promises: one owner, one outcome, and corrections that take a place whichever comes first."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from contracts.failures import InvalidWorkflowStateError
from contracts.outcomes import Outcome
from contracts.state import EventState, SubjectHistory
from contracts.tenancy import TenantScope
from tests.conformance import databases
from tests.conformance.databases import Bench, canonical, decided, fresh_scope, lost, received

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size

REASONS = ("R1", "R2\N{REPLACEMENT CHARACTER}")


def some(scope: TenantScope, size: int, **fields: Any) -> list[EventState]:
    return [received(scope, f"e{i}", **fields) for i in range(size)]


def keys(states: list[EventState]) -> list[tuple[TenantScope, str]]:
    return [(state.scope, state.event_id) for state in states]


# --- events -------------------------------------------------------------------------------------------


async def test_nothing_asked_is_nothing_answered(database: Bench) -> None:
    ledger = database.ledger
    assert list(await ledger.record_events([])) == []
    assert list(await ledger.decide([])) == []
    assert list(await ledger.decisions([])) == []
    assert list(await ledger.known([])) == []
    assert list(await ledger.histories([])) == []


async def test_the_first_body_owns_the_identity(database: Bench, scope: TenantScope, size: int) -> None:
    first, other = some(scope, size), some(scope, size, text="another body")
    answers = await database.ledger.record_events(first)
    assert [(a.body_digest, a.decision) for a in answers] == [(s.body_digest, None) for s in first]
    again = await database.ledger.record_events(other[::-1])
    assert [a.body_digest for a in again] == [s.body_digest for s in first[::-1]]
    assert list(await database.ledger.known([*keys(first), (scope, "0" * 32)])) == [True] * size + [False]


async def test_a_call_with_one_identity_twice_is_answered_by_position(database: Bench, scope: TenantScope) -> None:
    first, other, third = received(scope), received(scope, text="x"), received(scope, "e0")
    answers = await database.ledger.record_events([first, other, third, first])
    assert [a.body_digest for a in answers] == [first.body_digest] * 2 + [third.body_digest, first.body_digest]


async def test_concurrent_bodies_of_an_identity_have_one_owner(database: Bench, scope: TenantScope, size: int) -> None:
    batches = [some(scope, size, text=f"body {i}")[:: 1 if i % 2 else -1] for i in range(3)]
    answers = await asyncio.gather(*(database.ledger.record_events(batch) for batch in batches))
    owners: dict[str, set[str]] = {}
    for batch, rows in zip(batches, answers, strict=True):
        for state, row in zip(batch, rows, strict=True):
            owners.setdefault(state.event_id, set()).add(row.body_digest)
    assert {len(found) for found in owners.values()} == {1}


async def test_a_lost_reply_to_a_recording_is_healed_by_repeating_it(
    database: Bench, scope: TenantScope, size: int
) -> None:
    states = some(scope, size)
    await lost(database, lambda: database.ledger.record_events(states))
    assert list(await database.ledger.known(keys(states))) == [True] * size
    answers = await database.ledger.record_events(states)
    assert [a.body_digest for a in answers] == [s.body_digest for s in states]


async def test_odd_texts_do_not_fail_their_call(database: Bench, scope: TenantScope) -> None:
    plain, last = received(scope, "odd"), received(scope, "late", amount=None)
    party = plain.event.subject.model_copy(update={"type": "a\0b", "id": "x\0"})
    changes = {"id": "nul\0", "subject": party, "occurred_at": "0001-01-01T00:00:00+14:00"}
    odd = replace(plain, event=plain.event.model_copy(update=changes), correlation_id="c\0")
    late = replace(last, event=last.event.model_copy(update={"occurred_at": "9999-12-31T23:59:59-14:00"}))
    answers = await database.ledger.record_events([odd, late])
    assert [a.body_digest for a in answers] == [odd.body_digest, late.body_digest]
    assert list(await database.ledger.histories([odd, late])) == [SubjectHistory()] * 2


# --- histories ----------------------------------------------------------------------------------------


def earlier(scope: TenantScope, name: str, ago: timedelta = timedelta(), **fields: Any) -> EventState:
    at = datetime(2026, 1, 31, 12, tzinfo=UTC) - ago
    return received(scope, name, occurred_at=at.isoformat(), **fields)


async def test_a_history_counts_the_subject_before_the_event(database: Bench, scope: TenantScope) -> None:
    now = earlier(scope, "now")
    states = [
        now,
        earlier(scope, "same moment"),
        earlier(scope, "hour", timedelta(hours=1)),
        earlier(scope, "just inside a day", timedelta(hours=24) - timedelta(microseconds=1)),
        earlier(scope, "just outside a day", timedelta(hours=24)),
        earlier(scope, "week", timedelta(days=7), amount={"value": "0.000000001", "currency": "EUR"}),
        earlier(scope, "back", timedelta(days=8), amount={"value": "-2.5", "currency": "EUR"}),
        earlier(scope, "dollars", timedelta(days=7), amount={"value": "1000", "currency": "USD"}),
        earlier(scope, "no amount", timedelta(days=29), amount=None),
        earlier(scope, "just outside 30 days", timedelta(days=30)),
        earlier(scope, "old", timedelta(days=40)),
        earlier(scope, "later", timedelta(hours=-1)),
        earlier(scope, "somebody else", timedelta(hours=1), subject={"type": "customer", "id": "c2"}),
        earlier(scope, "something else", timedelta(hours=1), subject={"type": "account", "id": "c1"}),
        received(fresh_scope(), "foreign"),
    ]
    await database.ledger.record_events(states)
    history, dollars, none, new = await database.ledger.histories(
        [
            now,
            earlier(scope, "now", amount={"value": "1", "currency": "USD"}),
            earlier(scope, "now", amount=None),
            received(scope, "new", subject={"type": "customer", "id": "c9"}),
        ]
    )
    first = "2025-12-22T12:00:00Z"
    counted = {"events_1d": 3, "events_30d": 8, "first_seen_at": first}
    assert history == SubjectHistory(**counted, amount_30d="47.500000001")
    assert dollars == SubjectHistory(**counted, amount_30d="1000")
    assert none == SubjectHistory(**counted, amount_30d="0")
    assert new == SubjectHistory()


async def test_a_history_adds_amounts_exactly(database: Bench, scope: TenantScope, size: int) -> None:
    amount = {"value": "999999999999999.999999999", "currency": "EUR"}
    states = [earlier(scope, f"e{i}", timedelta(hours=1), amount=amount) for i in range(size)]
    await database.ledger.record_events(states)
    (history, *_) = await database.ledger.histories([earlier(scope, "now"), *states])
    total = 999999999999999999999999 * size
    assert history.amount_30d == f"{total // 10**9}.{total % 10**9:09d}"
    assert history.events_1d == size


# --- decisions ----------------------------------------------------------------------------------------


async def test_the_first_decision_stands(database: Bench, scope: TenantScope, size: int) -> None:
    states = some(scope, size)
    await database.ledger.record_events(states)
    winners = [decided(s, Outcome.REQUIRE_APPROVAL) for s in states]
    losers = [decided(s, Outcome.REJECTED, 99) for s in states]
    won = await database.ledger.decide(winners)
    assert list(await database.ledger.decide(losers)) == list(won)
    for winner, row in zip(winners, won, strict=True):
        assert (row.revision, row.outcome, row.body_digest) == (1, "REQUIRE_APPROVAL", winner.body_digest)
        assert (row.decision, row.state) == (canonical(winner), winner.to_bytes())
        assert await database.approvals(scope, winner.event_id) == [(1, "open", REASONS)]
    assert [a.decision for a in await database.ledger.record_events(states)] == list(won)
    found = await database.ledger.decisions([(scope, "f" * 32), *keys(states)])
    assert list(found) == [None, *won]


async def test_only_the_winner_opens_an_approval(database: Bench, scope: TenantScope) -> None:
    state = received(scope)
    both = [decided(state, Outcome.APPROVED), decided(state, Outcome.REQUIRE_APPROVAL)]
    answers = await database.ledger.decide(both)
    assert [row.outcome for row in answers] == ["APPROVED", "APPROVED"]
    assert await database.approvals(scope, state.event_id) == []


async def test_concurrent_decisions_agree(database: Bench, scope: TenantScope, size: int) -> None:
    states = some(scope, size)
    batches = [[decided(s, outcome) for s in states[:: 1 if i % 2 else -1]] for i, outcome in enumerate(Outcome)]
    answers = await asyncio.gather(*(database.ledger.decide(batch) for batch in batches))
    seen: dict[str, set[tuple[bytes, bytes]]] = {}
    for batch, rows in zip(batches, answers, strict=True):
        for state, row in zip(batch, rows, strict=True):
            seen.setdefault(state.event_id, set()).add((row.decision, row.state))
    assert {len(found) for found in seen.values()} == {1}
    for state, stands in zip(states, await database.ledger.decisions(keys(states)), strict=True):
        assert stands is not None
        opened = await database.approvals(scope, state.event_id)
        assert bool(opened) == (stands.outcome == "REQUIRE_APPROVAL")


async def test_a_lost_reply_to_a_decision_is_healed_by_repeating_it(
    database: Bench, scope: TenantScope, size: int
) -> None:
    states = [decided(s, Outcome.REQUIRE_APPROVAL) for s in some(scope, size)]
    await lost(database, lambda: database.ledger.decide(states))
    rows = await database.ledger.decide([decided(s, Outcome.APPROVED, 1) for s in some(scope, size)])
    assert [row.state for row in rows] == [state.to_bytes() for state in states]
    for state in states:
        assert await database.approvals(scope, state.event_id) == [(1, "open", REASONS)]


async def test_a_person_s_answer_is_the_highest_revision(database: Bench, scope: TenantScope) -> None:
    state = decided(received(scope), Outcome.REQUIRE_APPROVAL)
    await database.ledger.decide([state])
    answer = await database.add_revision(state, 2, Outcome.REJECTED)
    (row,) = await database.ledger.decide([state])
    assert (row.revision, row.outcome, row.decision) == (2, "REJECTED", answer)
    assert (await database.ledger.decisions(keys([state])))[0] == row


async def test_a_state_without_a_decision_is_refused_and_its_neighbours_are_not_applied(
    database: Bench, scope: TenantScope
) -> None:
    good = decided(received(scope, "good"))
    with pytest.raises(InvalidWorkflowStateError):
        await database.ledger.decide([good, received(scope, "bad")])
    assert list(await database.ledger.decisions(keys([good]))) == [None]


async def test_tenants_do_not_see_each_other(database: Bench, scope: TenantScope, size: int) -> None:
    other = fresh_scope()
    mine, theirs = some(scope, size), some(other, size)
    await database.ledger.record_events([*mine, *theirs])
    await database.ledger.decide([decided(s) for s in theirs])
    foreign = [(scope, state.event_id) for state in theirs]
    assert list(await database.ledger.known(foreign)) == [False] * size
    assert list(await database.ledger.decisions(foreign)) == [None] * size
    assert list(await database.ledger.decisions(keys(mine))) == [None] * size
    (history,) = await database.ledger.histories([received(scope, "new")])
    assert history.events_30d == size


# --- corrections --------------------------------------------------------------------------------------


def correcting(wrong: EventState, name: str = "fix", **fields: Any) -> EventState:
    return received(wrong.scope, name, corrects=wrong.event_id, **fields)


async def test_a_correction_takes_the_place_of_what_it_corrects(database: Bench, scope: TenantScope, size: int) -> None:
    wrong = some(scope, size)
    fixes = [correcting(state, f"fix{i}") for i, state in enumerate(wrong)]
    await database.ledger.decide([decided(s, Outcome.REQUIRE_APPROVAL) for s in wrong])
    await database.ledger.decide([decided(s, Outcome.REQUIRE_APPROVAL) for s in fixes])
    for state, fix in zip(wrong, fixes, strict=True):
        assert await database.superseded(scope, state.event_id) == [fix.event_id]
        assert await database.approvals(scope, state.event_id) == [(1, "superseded", REASONS)]
        assert await database.superseded(scope, fix.event_id) == [None]
        assert await database.approvals(scope, fix.event_id) == [(1, "open", REASONS)]


async def test_what_was_corrected_before_it_was_decided_opens_no_approval(
    database: Bench, scope: TenantScope, size: int
) -> None:
    wrong = some(scope, size)
    fixes = [correcting(state, f"fix{i}") for i, state in enumerate(wrong)]
    assert [row.outcome for row in await database.ledger.decide([decided(s) for s in fixes])] == ["APPROVED"] * size
    rows = await database.ledger.decide([decided(s, Outcome.REQUIRE_APPROVAL) for s in wrong])
    assert [row.outcome for row in rows] == ["REQUIRE_APPROVAL"] * size
    for state, fix in zip(wrong, fixes, strict=True):
        assert await database.superseded(scope, state.event_id) == [fix.event_id]
        assert await database.approvals(scope, state.event_id) == []


@pytest.mark.parametrize("turned", [False, True])
async def test_a_correction_in_the_same_call_counts_whatever_the_order(
    database: Bench, scope: TenantScope, turned: bool
) -> None:
    wrong = received(scope)
    states = [decided(s, Outcome.REQUIRE_APPROVAL) for s in (wrong, correcting(wrong))]
    await database.ledger.decide(states[:: -1 if turned else 1])
    assert await database.superseded(scope, wrong.event_id) == [states[1].event_id]
    assert await database.approvals(scope, wrong.event_id) == []
    assert await database.approvals(scope, states[1].event_id) == [(1, "open", REASONS)]


async def test_a_correction_decided_at_the_same_time_counts(database: Bench, scope: TenantScope, size: int) -> None:
    wrong = some(scope, size)
    fixes = [correcting(state, f"fix{i}") for i, state in enumerate(wrong)]
    await asyncio.gather(
        database.ledger.decide([decided(s, Outcome.REQUIRE_APPROVAL) for s in wrong]),
        database.ledger.decide([decided(s) for s in fixes[::-1]]),
    )
    for state, fix in zip(wrong, fixes, strict=True):
        assert await database.superseded(scope, state.event_id) == [fix.event_id]
        assert "open" not in {status for _, status, _ in await database.approvals(scope, state.event_id)}


async def test_a_correction_supersedes_every_revision(database: Bench, scope: TenantScope) -> None:
    wrong = decided(received(scope), Outcome.REQUIRE_APPROVAL)
    await database.ledger.decide([wrong])
    await database.add_revision(wrong, 2, Outcome.APPROVED)
    fix = decided(correcting(wrong))
    await database.ledger.decide([fix])
    assert await database.superseded(scope, wrong.event_id) == [fix.event_id] * 2


@pytest.mark.parametrize("late", [False, True])
async def test_of_two_corrections_the_one_decided_first_holds(database: Bench, scope: TenantScope, late: bool) -> None:
    wrong = received(scope)
    first, second = decided(correcting(wrong, "first")), decided(correcting(wrong, "second"))
    for state in (first, second, decided(wrong)) if late else (decided(wrong), first, second):
        await database.ledger.decide([state])
    assert await database.superseded(scope, wrong.event_id) == [first.event_id]


async def test_a_correction_of_what_nobody_knows_is_decided_all_the_same(database: Bench, scope: TenantScope) -> None:
    fix = decided(received(scope, corrects="0" * 32))
    (row,) = await database.ledger.decide([fix])
    assert row.decision == canonical(fix)
    assert await database.superseded(scope, fix.event_id) == [None]


async def test_a_correction_that_did_not_win_supersedes_nothing(database: Bench, scope: TenantScope) -> None:
    wrong, owner = decided(received(scope)), decided(received(scope, "fix"))
    await database.ledger.decide([wrong, owner])
    await database.ledger.decide([decided(correcting(wrong, "fix"))])
    assert await database.superseded(scope, wrong.event_id) == [None]


async def test_a_repeated_correction_changes_nothing(database: Bench, scope: TenantScope) -> None:
    wrong = decided(received(scope), Outcome.REQUIRE_APPROVAL)
    fix = decided(correcting(wrong))
    await database.ledger.decide([wrong])
    await lost(database, lambda: database.ledger.decide([fix]))
    await database.ledger.decide([fix])
    assert await database.superseded(scope, wrong.event_id) == [fix.event_id]
    assert await database.approvals(scope, wrong.event_id) == [(1, "superseded", REASONS)]


async def test_events_that_correct_each_other_leave_one_standing(database: Bench, scope: TenantScope) -> None:
    names = ["a", "b", "c"]
    ids = [received(scope, name).event_id for name in names]
    ring = [received(scope, name, corrects=ids[(i + 1) % 3]) for i, name in enumerate(names)]
    for state in ring:
        await database.ledger.decide([decided(state)])
    superseded = [await database.superseded(scope, event_id) for event_id in ids]
    assert superseded.count([None]) == 1


async def test_an_event_does_not_supersede_itself(database: Bench, scope: TenantScope) -> None:
    alone = received(scope, corrects=received(scope).event_id)
    await database.ledger.decide([decided(alone, Outcome.REQUIRE_APPROVAL)])
    assert await database.superseded(scope, alone.event_id) == [None]
    assert await database.approvals(scope, alone.event_id) == [(1, "open", REASONS)]


async def test_nobody_corrects_another_tenant_s_event(database: Bench, scope: TenantScope) -> None:
    theirs = decided(received(fresh_scope()), Outcome.REQUIRE_APPROVAL)
    await database.ledger.decide([theirs])
    await database.ledger.decide([decided(received(scope, corrects=theirs.event_id))])
    assert await database.superseded(theirs.scope, theirs.event_id) == [None]
    assert await database.approvals(theirs.scope, theirs.event_id) == [(1, "open", REASONS)]

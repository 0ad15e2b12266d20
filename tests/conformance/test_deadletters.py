"""What every DeadLetters promises: a letter is stored once, whatever it looks like, and closed by a decision."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from contracts.outcomes import Outcome
from contracts.ports import DeadLetter
from contracts.tenancy import TenantScope
from tests.conformance import databases
from tests.conformance.databases import AT, Bench, decided, fresh_scope, letter, lost, received

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size

FIRST = "2026-01-31T12:00:00+00:00"


def expected(letters: list[DeadLetter], status: str = "open") -> list[tuple[str, str, str, int, str, bytes]]:
    return sorted((one.letter_id, one.event_id, status, one.attempts, FIRST, one.body) for one in letters)


async def test_a_letter_is_stored_once(database: Bench, scope: TenantScope, size: int) -> None:
    letters = [letter(scope, f"e{i}", body=b"%d\0" % i) for i in range(size)]
    await database.letters.park([])
    await database.letters.park([*letters, letters[0]])
    await database.letters.park([replace(one, attempts=9, body=b"other") for one in letters[::-1]])
    assert await database.letters_of(scope) == expected(letters)


async def test_a_lost_reply_is_healed_by_repeating_the_call(database: Bench, scope: TenantScope, size: int) -> None:
    letters = [letter(scope, f"e{i}") for i in range(size)]
    await lost(database, lambda: database.letters.park(letters))
    await database.letters.park(letters)
    assert await database.letters_of(scope) == expected(letters)


async def test_concurrent_sinks_store_each_letter_once(database: Bench, scope: TenantScope, size: int) -> None:
    letters = [letter(scope, f"e{i}") for i in range(size)]
    await asyncio.gather(*(database.letters.park(letters[::step]) for step in (1, -1, 1)))
    assert await database.letters_of(scope) == expected(letters)


async def test_a_letter_from_a_broken_message_is_kept(database: Bench, scope: TenantScope) -> None:
    odd = letter(scope, "e\0", stage="s\0", problem="", first_failed_at="?", last_failed_at="", attempts=0)
    early = letter(scope, "early", first_failed_at="0001-01-01T00:00:00+14:00")
    await database.letters.park([odd, early])
    now = database.clock.now().isoformat()
    rows = {row[0]: row[1:] for row in await database.letters_of(scope)}
    assert rows[odd.letter_id] == ("e\N{REPLACEMENT CHARACTER}", "open", 0, now, b"b")
    assert rows[early.letter_id] == ("early", "open", 3, "0001-01-02T00:00:00+00:00", b"b")


async def test_tenants_and_the_system_do_not_see_each_other_s_letters(database: Bench, scope: TenantScope) -> None:
    other = fresh_scope()
    mine, theirs, nobody = letter(scope, "mine"), letter(other, "theirs"), letter(None, "")
    await database.letters.park([theirs, nobody, mine])
    assert await database.letters_of(scope) == expected([mine])
    assert await database.letters_of(other) == expected([theirs])
    assert expected([nobody])[0] in await database.letters_of(None)
    # Its name is taken: not overwritten, and nothing is told about whose it is.
    await database.letters.park([replace(mine, letter_id=theirs.letter_id)])
    assert await database.letters_of(other) == expected([theirs])
    assert await database.letters_of(scope) == expected([mine])


async def test_a_decision_closes_the_letters_of_its_event_alone(database: Bench, scope: TenantScope, size: int) -> None:
    states = [decided(received(scope, f"e{i}"), Outcome.APPROVED) for i in range(size)]
    closed = [letter(scope, state.event_id) for state in states for _ in range(2)]
    other = letter(scope, "another event")
    foreign = letter(fresh_scope(), states[0].event_id)
    await database.letters.park([*closed, other, foreign])
    await database.ledger.decide(states)
    assert await database.letters_of(scope) == sorted(expected(closed, "closed") + expected([other]))
    assert foreign.scope is not None
    assert await database.letters_of(foreign.scope) == expected([foreign])
    await database.letters.park(closed)
    assert await database.letters_of(scope) == sorted(expected(closed, "closed") + expected([other]))
    assert closed[0].first_failed_at == AT


async def test_a_decision_that_lost_closes_letters_too(database: Bench, scope: TenantScope) -> None:
    """The event is decided, whoever decided it: a letter that was parked in between is settled as well."""
    state = received(scope)
    await database.ledger.decide([decided(state)])
    late = letter(scope, state.event_id)
    await database.letters.park([late])
    await database.ledger.decide([decided(state, Outcome.REJECTED)])
    assert await database.letters_of(scope) == expected([late], "closed")


async def test_a_letter_that_comes_after_the_decision_is_closed_at_once(database: Bench, scope: TenantScope) -> None:
    """What the audit or the labels lost is still lost: those letters stay open, whenever the decision came."""
    state = decided(received(scope))
    before = [letter(scope, state.event_id, stage=stage) for stage in ("decision", "audit", "labels")]
    await database.letters.park(before)
    await database.ledger.decide([state])
    after = [letter(scope, state.event_id, stage=stage) for stage in ("retrieval", "audit", "labels")]
    await database.letters.park(after)
    settled = [before[0], after[0]]
    assert await database.letters_of(scope) == sorted(expected(settled, "closed") + expected([*before[1:], *after[1:]]))


async def test_a_letter_and_a_decision_at_once_leave_no_open_letter(database: Bench, scope: TenantScope) -> None:
    states = [decided(received(scope, f"race-{i}")) for i in range(40)]
    letters = [letter(scope, state.event_id) for state in states]
    await asyncio.gather(
        *(database.ledger.decide([state]) for state in states),
        *(database.letters.park([one]) for one in letters),
    )
    assert await database.letters_of(scope) == expected(letters, "closed")

"""Backlog sets: membership is a function of the state, and the cap on undecided events is exact."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.codec import Entry, EntryHeader
from contracts.limits import NO_LIMITS, TenantLimits
from contracts.ports import Advance, ClaimRequest, Held, Leaving, Reserved
from contracts.tenancy import TenantScope
from tests.conformance.conftest import StateStores

pytestmark = pytest.mark.conformance

TOKEN = "1" * 32
SCOPES = (TenantScope("acme"), TenantScope("globex"))
SLOW = 0.001
"""Per second: so slow that nothing is earned while a test runs."""
NOW = datetime.now(UTC)
NOW_MS = round(NOW.timestamp() * 1000)


def entry(place: int, n: int = 0, *, body: str = "body", received_ms: int | None = None) -> Entry:
    """Version n of event `place`, received a second later than the one before; tenants alternate."""
    tenant = SCOPES[place % 2].tenant_id
    received = NOW_MS - 60_000 + place * 1_000 if received_ms is None else received_ms
    header = EntryHeader(tenant, f"{place:032x}", "risk", "retrieval", n, f"d-{n}-{body}", body, received_ms=received)
    return Entry(header, f"stored {place} {n} {body}".encode())


def move(one: Entry) -> Advance:
    h = one.header
    final = h.n == 3
    return Advance(
        h.scope,
        h.event,
        TOKEN,
        h.n,
        h.digest,
        h.n + 1,
        f"d-{h.n + 1}-{h.body_digest}",
        h.body_digest,
        b"",
        b"",
        tombstone=final,
        status="approved" if final else "",
        received_ms=h.received_ms,
    )


def capped(undecided: int) -> TenantLimits:
    return TenantLimits(undecided_events=undecided)


def paced(rate_per_s: float, burst: int, undecided: int | None = None) -> TenantLimits:
    return TenantLimits(rate_per_s=rate_per_s, burst=burst, undecided_events=undecided)


def leaving(one: Entry) -> Leaving:
    h = one.header
    return Leaving(h.scope, h.event, h.n, h.body_digest)


async def counts(store: object, scopes: Sequence[TenantScope] = SCOPES, now: datetime = NOW) -> list[int]:
    return [one.events for one in await store.backlog(scopes, now)]  # type: ignore[attr-defined]  # also a Backlogs


async def test_an_event_is_counted_where_it_is_and_nowhere_once_it_is_decided(stores: StateStores, size: int) -> None:
    store = stores.process()
    await store.reserve([entry(place) for place in range(size)])
    seen = [await counts(store)]
    for n in range(4):
        some = [entry(place, n) for place in range(size)]
        await store.claim([ClaimRequest(one) for one in some], TOKEN)
        assert await counts(store) == seen[-1]
        assert set(await store.advance([move(one) for one in some])) == {True}
        seen.append(await counts(store))
    assert seen == [[size if at == n else 0 for at in range(4)] for n in range(5)]
    (first, *_) = await store.backlog(SCOPES, NOW)  # type: ignore[attr-defined]
    assert (first.claimed, first.advanced) == (size, size)


async def test_the_oldest_is_told_by_when_it_was_received_and_tenants_apart(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(place) for place in (4, 3, 6)])
    (first, *_) = await store.backlog(SCOPES, NOW)  # type: ignore[attr-defined]
    assert (first.events, first.oldest_ms) == (3, entry(3).header.received_ms)
    (acme, *_) = await store.backlog(SCOPES[:1], NOW)  # type: ignore[attr-defined]
    assert (acme.events, acme.oldest_ms) == (2, entry(4).header.received_ms)
    assert await store.undecided(SCOPES, NOW) == [2, 1]  # type: ignore[attr-defined]
    assert await store.backlog((), NOW) != []  # type: ignore[attr-defined]


async def test_what_is_parked_leaves_and_comes_back_with_its_replay(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = [entry(place, 1) for place in range(size)]
    await store.claim([ClaimRequest(one, True) for one in some], TOKEN)
    held = [Held(one.header.scope, one.header.event, TOKEN) for one in some]
    for _ in range(2):  # repeating is harmless
        await store.release(held, [leaving(one) for one in some])
        assert await counts(store) == [0, 0, 0, 0]
    await store.claim([ClaimRequest(one) for one in some], TOKEN)
    assert await counts(store) == [0, size, 0, 0]


async def test_only_what_is_still_as_it_was_leaves(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(0)])
    await store.release((), [leaving(entry(0, 1)), leaving(entry(0, body="another")), leaving(entry(2))])
    assert await counts(store) == [1, 0, 0, 0]


async def test_what_was_not_known_to_be_accepted_counts_again_when_it_is_repeated(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(0)])
    await store.release((), [leaving(entry(0))])
    assert await counts(store) == [0, 0, 0, 0]
    assert [one.verdict for one in await store.reserve([entry(0)], [capped(1)])] == [Reserved.REPEAT]
    assert await counts(store) == [1, 0, 0, 0]


async def test_a_reinstalled_event_is_counted_in_one_place(stores: StateStores, size: int) -> None:
    store = stores.process()
    await store.reserve([entry(place) for place in range(size)])
    await store.claim([ClaimRequest(entry(place, 2)) for place in range(size)], TOKEN)
    assert await counts(store) == [0, 0, size, 0]
    await store.claim([ClaimRequest(entry(place, 1, body="another")) for place in range(size)], TOKEN)
    assert await counts(store) == [0, size, 0, 0]


async def test_an_entry_of_an_earlier_release_is_as_old_as_its_first_claim(stores: StateStores) -> None:
    store = stores.process()
    await store.claim([ClaimRequest(entry(0, 1, received_ms=0), True)], TOKEN)
    found = (await store.backlog(SCOPES, datetime(2020, 1, 1, tzinfo=UTC)))[1]  # type: ignore[attr-defined]
    assert found.oldest_ms is not None
    assert found.oldest_ms > 1_500_000_000_000


async def test_leftovers_are_counted_no_longer_than_a_state_can_live(stores: StateStores) -> None:
    store = stores.process(state_ttl_s=100)
    await store.reserve([entry(0, received_ms=NOW_MS - 90_000), entry(1, received_ms=NOW_MS - 10_000)])
    later = NOW + timedelta(seconds=20)
    assert await store.undecided(SCOPES, later) == [0, 1]  # type: ignore[attr-defined]
    assert await counts(store, now=later) == [1, 0, 0, 0]
    assert await counts(store) == [1, 0, 0, 0]  # it was dropped


async def test_flushall_forgets_the_backlog_and_that_it_was_whole(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(0)])
    await store.trust(["retrieval"])  # type: ignore[attr-defined]
    assert [one.whole for one in await store.backlog(SCOPES, NOW)] == [True, False, False, False]  # type: ignore[attr-defined]
    await stores.wipe()
    after = await store.backlog(SCOPES, NOW)  # type: ignore[attr-defined]
    assert [(one.events, one.whole, one.claimed) for one in after] == [(0, False, 0)] * 4


# --- the cap ----------------------------------------------------------------------------------------------


async def test_no_more_than_the_limit_are_admitted_and_known_ones_pass(stores: StateStores) -> None:
    store = stores.process()
    some = [entry(2 * place) for place in range(6)]
    verdicts = [one.verdict for one in await store.reserve([*some, entry(1)], [capped(4)] * 6 + [NO_LIMITS])]
    assert verdicts == [Reserved.NEW] * 4 + [Reserved.FULL] * 2 + [Reserved.NEW]
    again = [one.verdict for one in await store.reserve(some, [capped(4)] * 6)]
    assert again == [Reserved.REPEAT] * 4 + [Reserved.FULL] * 2
    assert await store.peek([(some[5].header.scope, some[5].header.event)]) == [None]
    await store.release((), [leaving(some[0])])
    assert [one.verdict for one in await store.reserve([some[5]], [capped(4)])] == [Reserved.NEW]


async def test_events_at_every_stage_count_until_they_are_decided(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(0)], [capped(1)])
    for n in range(4):
        assert [one.verdict for one in await store.reserve([entry(2)], [capped(1)])] == [Reserved.FULL]
        await store.claim([ClaimRequest(entry(0, n))], TOKEN)
        await store.advance([move(entry(0, n))])
    assert [one.verdict for one in await store.reserve([entry(2)], [capped(1)])] == [Reserved.NEW]


async def test_many_doors_at_once_admit_no_more_than_the_limit(stores: StateStores) -> None:
    doors = [stores.process(f"door-{number}") for number in range(8)]
    answers = await asyncio.gather(
        *(door.reserve([entry(2 * (8 * i + k)) for k in range(8)], [capped(20)] * 8) for i, door in enumerate(doors))
    )
    found = [one.verdict for some in answers for one in some]
    assert (found.count(Reserved.NEW), found.count(Reserved.FULL)) == (20, 44)


async def test_leftovers_of_dead_states_take_no_room(stores: StateStores) -> None:
    store = stores.process(state_ttl_s=100)
    await store.reserve([entry(0, received_ms=1)], [capped(1)])
    assert [one.verdict for one in await store.reserve([entry(2)], [capped(1)])] == [Reserved.NEW]


# --- the rate ---------------------------------------------------------------------------------------------


async def test_a_burst_passes_and_what_is_beyond_is_told_when_to_come_again(stores: StateStores) -> None:
    some = [entry(2 * place) for place in range(6)]
    answers = await stores.process().reserve([*some, entry(1)], [paced(SLOW, 5)] * 6 + [NO_LIMITS])
    assert [one.verdict for one in answers] == [Reserved.NEW] * 5 + [Reserved.LIMITED, Reserved.NEW]
    assert (answers[5].version, answers[5].stored) == (0, None)
    assert 990_000 <= answers[5].wait_ms <= 1_000_000
    assert await stores.process().peek([(some[5].header.scope, some[5].header.event)]) == [None]


async def test_a_repeat_passes_at_any_rate_and_uses_up_none(stores: StateStores) -> None:
    store, limits = stores.process(), [paced(SLOW, 2)]
    for _ in range(3):
        assert (await store.reserve([entry(0)], limits))[0].verdict in (Reserved.NEW, Reserved.REPEAT)
    verdicts = [(await store.reserve([entry(place)], limits))[0].verdict for place in (2, 4, 0, 4)]
    assert verdicts == [Reserved.NEW, Reserved.LIMITED, Reserved.REPEAT, Reserved.LIMITED]
    (other,) = await store.reserve([entry(0, body="another")], limits)
    assert other.verdict is Reserved.CONFLICT


async def test_what_finds_no_room_uses_up_no_rate(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(0)], [paced(SLOW, 2, undecided=1)])
    for place in (2, 4):
        (full,) = await store.reserve([entry(place)], [paced(SLOW, 2, undecided=1)])
        assert full.verdict is Reserved.FULL
    (new,) = await store.reserve([entry(2)], [paced(SLOW, 2)])
    assert new.verdict is Reserved.NEW


async def test_what_was_told_is_kept_and_not_before(stores: StateStores) -> None:
    store, limits = stores.process(), [paced(4, 2)]
    await store.reserve([entry(0), entry(2)], limits * 2)
    (refused,) = await store.reserve([entry(4)], limits)
    assert refused.verdict is Reserved.LIMITED
    assert 1 <= refused.wait_ms <= 250
    await stores.wait(refused.wait_ms)
    found = [one.verdict for one in await store.reserve([entry(4), entry(6)], limits * 2)]
    assert found == [Reserved.NEW, Reserved.LIMITED]


async def test_many_doors_at_once_let_no_more_in_than_the_burst(stores: StateStores) -> None:
    doors = [stores.process(f"door-{number}") for number in range(8)]
    answers = await asyncio.gather(
        *(
            door.reserve([entry(2 * (8 * i + k)) for k in range(8)], [paced(SLOW, 20)] * 8)
            for i, door in enumerate(doors)
        )
    )
    found = [one.verdict for some in answers for one in some]
    assert (found.count(Reserved.NEW), found.count(Reserved.LIMITED)) == (20, 44)


async def test_a_state_store_that_forgot_gives_the_burst_anew(stores: StateStores) -> None:
    store = stores.process()
    await store.reserve([entry(0)], [paced(SLOW, 1)])
    await stores.wipe()
    (new,) = await store.reserve([entry(2)], [paced(SLOW, 1)])
    assert new.verdict is Reserved.NEW


# --- any order of operations ------------------------------------------------------------------------------


@dataclass
class Model:
    """What each event is, by the rules alone: version, body, and whether it left."""

    at: dict[int, tuple[int, str, bool]] = field(default_factory=dict)
    locked: set[int] = field(default_factory=set)

    def counted(self) -> list[int]:
        here = [n for n, _, gone in self.at.values() if not gone and n < 4]
        return [here.count(n) for n in range(4)]

    def reserve(self, place: int, body: str) -> None:
        n, owner, _ = self.at.get(place, (0, body, False))
        if n == 0 and owner == body:
            self.at[place] = (0, body, False)

    def claim(self, place: int, n: int, body: str) -> None:
        known = self.at.get(place)
        if known is None or known[1] != body or known[0] <= n:
            self.at[place] = (n, body, False)
            self.locked.add(place)

    def advance(self, place: int, n: int, body: str) -> None:
        if self.at.get(place, (9, "", False))[:2] == (n, body) and place in self.locked:
            self.at[place] = (n + 1, body, False)
            self.locked.discard(place)

    def leave(self, place: int, n: int, body: str) -> None:
        if self.at.get(place, (9, "", False))[:2] == (n, body):
            self.at[place] = (n, body, True)

    def release(self, place: int) -> None:
        self.locked.discard(place)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "claim", "advance", "leave", "release", "flush"]),
        st.integers(0, 4),
        st.integers(0, 3),
        st.sampled_from(["body", "other"]),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
async def test_an_event_is_in_a_set_exactly_while_it_is_undecided_and_not_parked(
    stores: StateStores, steps: list[tuple[str, int, int, str]]
) -> None:
    await stores.wipe()
    store, model = stores.process(), Model()
    for what, place, n, body in steps:
        one = entry(place, n, body=body)
        if what == "reserve":
            await store.reserve([entry(place, body=body)])
            model.reserve(place, body)
        elif what == "claim":
            await store.claim([ClaimRequest(one, True)], TOKEN)
            model.claim(place, n, body)
        elif what == "advance":
            (won,) = await store.advance([move(one)])
            if won or place in model.locked:
                model.advance(place, n, body)
        elif what == "leave":
            await store.release((), [leaving(one)])
            model.leave(place, n, body)
        elif what == "release":
            await store.release([Held(one.header.scope, one.header.event, TOKEN)])
            model.release(place)
        else:
            await stores.wipe()
            model = Model()
        assert await counts(store) == model.counted(), (what, place, n, body)
    undecided: list[int] = list(await store.undecided(SCOPES, NOW))  # type: ignore[attr-defined]
    assert sum(undecided) == sum(model.counted())

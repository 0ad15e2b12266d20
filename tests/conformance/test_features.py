"""What every FeatureStore promises: idempotent by event, the same in any order, bounded, honest about its losses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from random import Random

import pytest

from contracts.failures import StateStoreError
from contracts.ports import FeatureStore
from contracts.tenancy import TenantScope
from contracts.velocity import (
    CLEARED,
    FRAUD,
    NO_VERDICT,
    Mark,
    Marking,
    Observation,
    Sample,
    Sighting,
    VelocityPolicy,
    Verdict,
)
from deploy.runtime import RandomIds, SystemClock
from resilience.memory import CountingIds, MemoryFeatureStore, MemoryRedis, SteppingClock
from resilience.redis import connect
from resilience.redis_features import RedisFeatureStore
from tests.conformance.conftest import DATABASE, wire_to

pytestmark = pytest.mark.conformance

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
AT = 4_000_000_000_000
SMALL = VelocityPolicy(keep=4, slack=2)


def sighting(
    number: int, at: int = AT, *, scope: TenantScope = ACME, subject: int = 1, other: int | None = 9
) -> Sighting:
    """Event `number`, at some ms since 1900."""
    counterparty = None if other is None else f"{other:032x}"
    return Sighting(scope, f"{number:032x}", at, f"{subject:032x}", counterparty, float(number), b"EUR")


def seen(observation: Observation) -> list[int]:
    """The events that it saw of its subject."""
    return events(observation.subject, observation.sequence)


def events(samples: tuple[Sample, ...] | None, before: int = 1 << 50) -> list[int]:
    assert samples is not None
    return [int.from_bytes(sample[1], "big") for sample in samples if sample[2] < before]


@dataclass
class Features:
    """Makes stores on one server. `wipe` is FLUSHALL; `lose_reply`: the next answer is lost once it was carried out."""

    make: Callable[[VelocityPolicy], FeatureStore]
    wipe: Callable[[], Awaitable[object]]
    lose_reply: Callable[[FeatureStore], None]

    def store(self, policy: VelocityPolicy | None = None) -> FeatureStore:
        return self.make(policy or VelocityPolicy())

    async def whole(self, *scopes: TenantScope) -> FeatureStore:
        """A store whose tenants' histories are complete."""
        store = self.store()
        assert list(await store.complete(await store.marks(scopes))) == [True] * len(scopes)
        return store


@pytest.fixture(params=["twin", pytest.param("redis", marks=pytest.mark.integration)])
async def features(request: pytest.FixtureRequest) -> AsyncIterator[Features]:
    if request.param == "twin":
        server = MemoryRedis(SteppingClock())
        ids = CountingIds()

        async def flush() -> None:
            server.flush()

        def lose(store: FeatureStore) -> None:
            assert isinstance(store, MemoryFeatureStore)
            store.lose_replies = 1

        yield Features(lambda policy: MemoryFeatureStore(server, ids, policy), flush, lose)
        return
    url: str = request.getfixturevalue("servers").redis
    async with wire_to(url) as wire:
        client = connect(wire.url(url, f"/{DATABASE}"))

        def lose_reply(store: FeatureStore) -> None:
            wire.swallow = 1

        await client.flushdb()
        yield Features(
            lambda policy: RedisFeatureStore(client, SystemClock(), RandomIds(), policy), client.flushdb, lose_reply
        )
        await client.flushdb()
        await client.aclose()
        await client.connection_pool.disconnect()


async def test_nothing_is_observed_by_nobody(features: Features) -> None:
    store = features.store()
    assert list(await store.observe([])) == []
    assert list(await store.marks([])) == []
    assert list(await store.complete([])) == []
    await store.merge([])
    await store.mark([])


async def test_an_event_sees_what_was_observed_before_it_in_the_same_call_too(features: Features) -> None:
    store = await features.whole(ACME)
    first, second, third = await store.observe([sighting(1), sighting(2), sighting(3, subject=2)])
    assert [seen(one) for one in (first, second, third)] == [[], [1], []]
    assert events(third.counterparty, third.sequence) == [1, 2]
    assert [one.sequence for one in (first, second, third)] == [1, 2, 3]
    (fourth,) = await store.observe([sighting(4)])
    assert seen(fourth) == [1, 2]
    assert (fourth.sequence, fourth.complete, fourth.since_ms) == (4, True, None)
    assert fourth.epoch == first.epoch


async def test_samples_hold_what_the_event_said(features: Features) -> None:
    store = await features.whole(ACME)
    given = replace(sighting(7), attribute=b"attribut", verdict=Verdict(FRAUD, AT + 5))
    await store.observe([given])
    (looked,) = await store.observe([sighting(8)])
    nine, one = (9).to_bytes(16, "big")[:8], (1).to_bytes(16, "big")[:8]
    common = (AT, (7).to_bytes(16, "big"), 1, 7.0, b"EUR", FRAUD, AT + 5)
    assert looked.subject[0] == (*common, nine, b"attribut")
    assert looked.counterparty is not None
    assert looked.counterparty[0] == (*common, one, b"attribut")


async def test_a_repeat_is_answered_as_the_first_time(features: Features) -> None:
    store = await features.whole(ACME)
    await store.observe([sighting(1, AT - 5)])
    (first,) = await store.observe([sighting(2)])
    await store.observe([sighting(3, AT - 3), sighting(4, AT + 9)])
    again, twice = await store.observe([sighting(2), sighting(2)])
    for repeat in (again, twice):
        assert (repeat.epoch, repeat.sequence, seen(repeat)) == (first.epoch, first.sequence, seen(first))
    (after,) = await store.observe([sighting(5)])
    assert sorted(seen(after)) == [1, 2, 3, 4]


async def test_a_lost_reply_is_healed_by_repeating_the_call(features: Features) -> None:
    store = await features.whole(ACME)
    await store.observe([sighting(1)])
    features.lose_reply(store)
    with pytest.raises(StateStoreError):
        await store.observe([sighting(2)])
    (healed,) = await store.observe([sighting(2)])
    assert (healed.sequence, seen(healed)) == (2, [1])
    (after,) = await store.observe([sighting(3)])
    assert (after.sequence, seen(after)) == (3, [1, 2])


async def test_looking_records_nothing(features: Features) -> None:
    store = await features.whole(ACME)
    await store.observe([sighting(1)])
    for _ in range(2):
        (looked,) = await store.observe([sighting(2)], record=False)
        assert (seen(looked), looked.sequence, looked.complete) == ([1], 2, True)
    (known,) = await store.observe([sighting(1)], record=False)
    assert (known.sequence, seen(known)) == (1, [])
    (unknown,) = await store.observe([sighting(1, scope=GLOBEX)], record=False)
    assert not unknown.complete
    assert not (await store.marks([GLOBEX]))[0].complete


async def test_any_order_and_any_repeats_come_to_the_same_history(features: Features) -> None:
    """Ties in time are there too; only the sequences tell how they came."""
    some = [sighting(n, AT + n // 3 * 1000, subject=n % 2) for n in range(40)]
    ends = []
    for seed in (None, 1, 2):
        await features.wipe()
        store = features.store(VelocityPolicy(keep=10, slack=2))
        feed = list(some) if seed is None else [*some, *some[::7]]
        if seed is not None:
            Random(seed).shuffle(feed)
        for start in range(0, len(feed), 5):
            await store.observe(feed[start : start + 5])
        looked = await store.observe([sighting(99, subject=0), sighting(99, subject=1)], record=False)
        ends.append([[(*s[:2], *s[3:]) for s in one.subject] for one in looked])
    assert ends[0] == ends[1] == ends[2]
    assert [len(one) for one in ends[0]] == [12, 12]


async def test_a_history_is_bounded_in_number_and_in_age(features: Features) -> None:
    store = features.store(SMALL)
    await store.observe([sighting(n, AT + n) for n in range(50)])
    (full,) = await store.observe([sighting(99)], record=False)
    assert events(full.subject) == [44, 45, 46, 47, 48, 49]
    await store.observe([sighting(60, AT + 40 * 86_400_000)])
    (aged,) = await store.observe([sighting(99)], record=False)
    assert events(aged.subject) == [60]


async def test_a_call_sees_all_that_it_adds_however_much_is_kept(features: Features) -> None:
    store = features.store(SMALL)
    answers = await store.observe([sighting(n, AT + n) for n in range(50)])
    assert [seen(one)[-4:] for one in answers] == [list(range(max(n - 4, 0), n)) for n in range(50)]


async def test_tenants_share_nothing(features: Features) -> None:
    store = await features.whole(ACME, GLOBEX)
    mixed = [sighting(n, scope=(ACME, GLOBEX)[n % 2]) for n in range(8)]
    answers = await store.observe(mixed)
    assert [seen(one) for one in answers] == [list(range(n % 2, n, 2)) for n in range(8)]
    assert [one.sequence for one in answers] == [1, 1, 2, 2, 3, 3, 4, 4]


async def test_concurrent_processes_give_each_event_its_own_sequence(features: Features) -> None:
    await features.whole(ACME)
    stores = [features.store() for _ in range(4)]
    answers = await asyncio.gather(*(s.observe([sighting(10 * i + n) for n in range(5)]) for i, s in enumerate(stores)))
    flat = [one for some in answers for one in some]
    assert sorted(one.sequence for one in flat) == list(range(1, 21))
    assert [len(seen(one)) for one in sorted(flat, key=lambda one: one.sequence)] == list(range(20))


async def test_a_lost_history_is_said_to_be_incomplete_until_its_own_epoch_is_completed(features: Features) -> None:
    store = await features.whole(ACME)
    (before,) = await store.observe([sighting(1)])
    (old,) = await store.marks([ACME])
    await features.wipe()
    (lost,) = await store.observe([sighting(2)])
    assert (lost.complete, seen(lost)) == (False, [])
    assert lost.since_ms is not None
    assert lost.epoch != before.epoch
    assert list(await store.complete([old])) == [False]
    (mark,) = await store.marks([ACME])
    assert mark == Mark(ACME, lost.epoch, lost.since_ms)
    assert list(await store.complete([mark])) == [True]
    (after,) = await store.observe([sighting(3)])
    assert (after.complete, after.since_ms, after.epoch) == (True, None, lost.epoch)


async def test_merged_events_were_known_before_the_epoch_and_change_nothing_that_is_there(features: Features) -> None:
    store = await features.whole(ACME)
    (own,) = await store.observe([sighting(5)])
    past = [sighting(n, AT - 1000 + n) for n in range(4)]
    for _ in range(2):
        await store.merge([*past, sighting(5)])
    (again,) = await store.observe([sighting(5)])
    assert (again.sequence, seen(again)) == (own.sequence, [0, 1, 2, 3])
    (new,) = await store.observe([sighting(6)])
    assert seen(new) == [0, 1, 2, 3, 5]


async def test_an_event_that_was_merged_before_it_came_is_observed_when_it_comes(features: Features) -> None:
    store = await features.whole(ACME)
    await store.merge([sighting(1), sighting(2)])
    await store.observe([sighting(3)])
    (late,) = await store.observe([sighting(1)])
    assert (late.sequence, seen(late)) == (2, [2, 3])


async def test_merging_in_any_order_bounds_a_history_too(features: Features) -> None:
    store = features.store(SMALL)
    some = [sighting(n, AT + n) for n in range(30)]
    Random(3).shuffle(some)
    for start in range(0, 30, 7):
        await store.merge(some[start : start + 7])
    (looked,) = await store.observe([sighting(99)], record=False)
    assert events(looked.subject) == [24, 25, 26, 27, 28, 29]


def verdicts(observation: Observation) -> list[tuple[int, int]]:
    assert observation.counterparty is not None
    assert [s[5:7] for s in observation.subject] == [s[5:7] for s in observation.counterparty]
    return [(sample[5], sample[6]) for sample in observation.subject]


async def test_of_an_events_labels_the_later_holds_in_any_order(features: Features) -> None:
    store = await features.whole(ACME)
    await store.observe([sighting(1), sighting(2, AT + 1)])
    early, late, worse = Verdict(FRAUD, 100), Verdict(CLEARED, 200), Verdict(FRAUD, 200)
    for first, second, holds in ((early, late, late), (late, early, late), (late, worse, worse), (worse, late, worse)):
        for one in (first, second, first):
            await store.mark([Marking(ACME, sighting(1).event_id, one, sighting(1))])
        (looked,) = await store.observe([sighting(99)], record=False)
        assert verdicts(looked) == [(holds.verdict, holds.known), (0, 0)]


async def test_a_label_may_come_before_its_event(features: Features) -> None:
    store = await features.whole(ACME)
    known, unknown = sighting(1), sighting(2)
    await store.mark(
        [
            Marking(ACME, known.event_id, Verdict(FRAUD, 100), known),
            Marking(ACME, unknown.event_id, Verdict(CLEARED, 70)),
            Marking(ACME, unknown.event_id, Verdict(FRAUD, 50)),
        ]
    )
    await store.observe([known, unknown])
    (looked,) = await store.observe([sighting(99)], record=False)
    assert verdicts(looked) == [(FRAUD, 100), (CLEARED, 70)]
    (again,) = await store.observe([unknown])
    assert verdicts(again)[1] == (CLEARED, 70)


async def test_merging_takes_over_later_verdicts(features: Features) -> None:
    store = await features.whole(ACME)
    await store.observe([sighting(1)])
    await store.merge([replace(sighting(1), verdict=Verdict(FRAUD, 100))])
    await store.merge([replace(sighting(1), verdict=Verdict(CLEARED, 50)), replace(sighting(2), verdict=NO_VERDICT)])
    (looked,) = await store.observe([sighting(99)], record=False)
    assert verdicts(looked) == [(FRAUD, 100), (0, 0)]


async def test_an_event_without_a_counterparty_has_a_subject_only(features: Features) -> None:
    store = await features.whole(ACME)
    first, second = await store.observe([sighting(1, other=None), sighting(2, other=None)])
    assert (first.counterparty, second.counterparty, seen(second)) == (None, None, [1])

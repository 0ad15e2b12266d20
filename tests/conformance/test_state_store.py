"""The state store's promises: every row of the claim table, fencing by token, reservations, suspects and beats."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from contracts.codec import Entry, EntryHeader
from contracts.failures import StateStoreError
from contracts.lifecycle import Status
from contracts.ports import Advance, Claim, ClaimRequest, ClaimVerdict, Held, Reserved, StateStore
from tests.conformance.conftest import SHORT_LEASE_MS, StateStores

pytestmark = pytest.mark.conformance

MINE, OTHER = "1" * 32, "2" * 32
STAGES = ("retrieval", "scoring", "guardrail", "decision")


def entry(place: int, n: int = 1, *, digest: str = "d", body: str = "body") -> Entry:
    """The message of version n of event `place`; tenants alternate."""
    tenant = ("acme", "globex")[place % 2]
    header = EntryHeader(tenant, f"{place:032x}", "risk", STAGES[n], n, f"{digest}-{n}", body)
    return Entry(header, f"stored {place} {n} {digest} {body}".encode())


def entries(size: int, n: int = 1, *, digest: str = "d", body: str = "body") -> list[Entry]:
    return [entry(place, n, digest=digest, body=body) for place in range(size)]


async def claim(store: StateStore, some: Sequence[Entry], token: str = MINE, *, install: bool = True) -> list[Claim]:
    claims = await store.claim([ClaimRequest(one, install) for one in some], token)
    assert len(claims) == len(some)
    return list(claims)


def move(one: Entry, token: str = MINE, *, tombstone: bool = False) -> Advance:
    """From the version of `one` to the next."""
    h = one.header
    n = 4 if tombstone else h.n + 1
    stored = b"" if tombstone else f"next of {h.event}".encode()
    return Advance(
        h.scope, h.event, token, h.n, h.digest, n, f"next-{n}", h.body_digest, stored, b"owed", tombstone=tombstone
    )


async def advance(store: StateStore, some: Sequence[Entry], token: str = MINE, *, tombstone: bool = False) -> set[bool]:
    answers = await store.advance([move(one, token, tombstone=tombstone) for one in some])
    assert len(answers) == len(some)
    return set(answers)


def verdicts(claims: Sequence[Claim]) -> set[ClaimVerdict]:
    return {one.verdict for one in claims}


def held(some: Sequence[Entry], token: str) -> list[Held]:
    return [Held(one.header.scope, one.header.event, token) for one in some]


# --- claim ------------------------------------------------------------------------------------------------


async def test_nothing_is_absent_until_install_is_allowed(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    for one in await claim(store, some, install=False):
        assert (one.verdict, one.stored, one.owes_trail) == (ClaimVerdict.ABSENT, None, False)
    assert await store.peek([(e.header.scope, e.header.event) for e in some]) == [None] * size
    for message, got in zip(some, await claim(store, some), strict=True):
        assert (got.verdict, got.version, got.stored) == (ClaimVerdict.INSTALLED, 1, message.body)
        assert (got.owes_trail, got.token) == (True, MINE)


async def test_another_bodys_version_is_replaced_whatever_its_version(stores: StateStores, size: int) -> None:
    store = stores.process()
    taken = entries(size, 2, body="another")
    await claim(store, taken, OTHER)
    some = entries(size, 1)
    for one, got in zip(some, await claim(store, some, install=False), strict=True):
        assert (got.verdict, got.version, got.stored, got.owes_trail) == (ClaimVerdict.INSTALLED, 1, one.body, True)
    assert await advance(store, taken, OTHER) == {False}
    assert await advance(store, some) == {True}


async def test_a_lost_tail_is_replaced_by_the_message(stores: StateStores, size: int) -> None:
    store = stores.process()
    await store.reserve(entries(size, 0))
    for got in await claim(store, entries(size, 2), install=False):
        assert (got.verdict, got.version, got.owes_trail) == (ClaimVerdict.INSTALLED, 2, True)


async def test_a_newer_version_is_done_and_gives_what_it_stored_and_owes(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    await claim(store, some)
    assert await advance(store, some) == {True}
    for one, got in zip(some, await claim(store, some, OTHER), strict=True):
        stored = f"next of {one.header.event}".encode()
        assert (got.verdict, got.version, got.stored, got.output) == (ClaimVerdict.DONE, 2, stored, b"owed")


async def test_a_newer_version_is_done_even_while_it_is_locked(stores: StateStores, size: int) -> None:
    store = stores.process()
    await claim(store, entries(size, 2), OTHER)
    assert verdicts(await claim(store, entries(size, 1))) == {ClaimVerdict.DONE}
    assert await advance(store, entries(size, 2), OTHER) == {True}


async def test_a_tombstone_is_done_without_bytes(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size, 3)
    await claim(store, some)
    assert await advance(store, some, tombstone=True) == {True}
    for got in await claim(store, some, OTHER):
        assert (got.verdict, got.version, got.stored, got.output) == (ClaimVerdict.DONE, 4, None, None)


async def test_what_another_holds_is_locked_for_the_rest_of_its_lease(stores: StateStores, size: int) -> None:
    some = entries(size)
    await claim(stores.process("one"), some, OTHER)
    for got in await claim(stores.process("two"), some):
        assert got.verdict is ClaimVerdict.LOCKED
        assert got.stored is None
        assert 0 < got.lease_ms <= 10_000
        assert got.holder == "elsewhere:one:1"
    assert await advance(stores.process("one"), some, OTHER) == {True}


async def test_the_stored_version_goes_on(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size, 0)
    await store.reserve(some)
    for one, got in zip(some, await claim(store, some), strict=True):
        assert (got.verdict, got.version, got.stored, got.owes_trail) == (ClaimVerdict.GO, 0, one.body, False)


async def test_of_two_siblings_the_stored_one_wins(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size, 0)
    await store.reserve(some)
    for one, got in zip(some, await claim(store, entries(size, 0, digest="other")), strict=True):
        assert (got.verdict, got.stored, got.owes_trail) == (ClaimVerdict.TWIN, one.body, False)
    assert await advance(store, some) == {True}


async def test_a_repeated_claim_finds_its_own_lock(stores: StateStores, size: int) -> None:
    """After a lost reply: the token is the command's id. An own install reads as GO, and owes the trail as before."""
    store = stores.process()
    some = entries(size)
    for first, again in zip(await claim(store, some), await claim(store, some), strict=True):
        assert again.verdict in (ClaimVerdict.GO, ClaimVerdict.INSTALLED)
        assert replace(again, verdict=first.verdict) == first
    fresh = entries(size, 0, body="fresh")
    await stores.wipe()
    await store.reserve(fresh)
    assert await claim(store, fresh) == await claim(store, fresh)


async def test_install_ends_a_lease(stores: StateStores, size: int) -> None:
    one, two = stores.process("one"), stores.process("two")
    await one.reserve(entries(size, 0))
    await claim(one, entries(size, 0), OTHER)
    assert verdicts(await claim(two, entries(size, 1))) == {ClaimVerdict.INSTALLED}
    assert await advance(one, entries(size, 0), OTHER) == {False}
    assert await advance(two, entries(size, 1)) == {True}


async def test_the_trail_is_owed_after_the_installer_died(stores: StateStores, size: int) -> None:
    some = entries(size)
    await claim(stores.process("one", SHORT_LEASE_MS), some, OTHER)
    await stores.expire()
    two = stores.process("two")
    for got in await claim(two, some):
        assert (got.verdict, got.owes_trail) == (ClaimVerdict.GO, True)
    await two.release(held(some, MINE))
    for got in await claim(two, entries(size, digest="other"), "3" * 32):
        assert (got.verdict, got.owes_trail) == (ClaimVerdict.TWIN, True)
    assert await advance(two, some, "3" * 32) == {True}
    after = [replace_version(one) for one in some]
    for got in await claim(two, after, "4" * 32):
        assert (got.verdict, got.owes_trail) == (ClaimVerdict.GO, False)


def replace_version(one: Entry) -> Entry:
    """The message of the version that `advance` stored."""
    return one.evolve(n=2, digest="next-2")


async def test_one_call_answers_every_row_in_order(stores: StateStores) -> None:
    store = stores.process()
    await claim(store, [entry(0)], OTHER)
    await claim(store, [entry(1)])
    await store.advance([move(entry(1))])
    await store.reserve([entry(2, 0)])
    got = await claim(store, [entry(0), entry(1), entry(2), entry(3)], install=False)
    wanted = [ClaimVerdict.LOCKED, ClaimVerdict.DONE, ClaimVerdict.INSTALLED, ClaimVerdict.ABSENT]
    assert [one.verdict for one in got] == wanted


# --- advance, release -------------------------------------------------------------------------------------


async def test_advance_needs_my_lock_and_the_expected_version(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    await claim(store, some)
    assert await advance(store, some, OTHER) == {False}
    assert await advance(store, entries(size, 2)) == {False}
    assert await advance(store, entries(size, digest="other")) == {False}
    assert await advance(store, some) == {True}
    assert await advance(store, some) == {True}  # repeated after a lost reply
    assert set(await store.advance([replace(move(one), digest="sibling") for one in some])) == {False}
    assert await advance(store, some, OTHER) == {False}


async def test_a_repeated_advance_to_a_tombstone_answers_the_same(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size, 3)
    await claim(store, some)
    assert await advance(store, some, tombstone=True) == {True}
    assert await advance(store, some, tombstone=True) == {True}


async def test_a_repeated_advance_is_lost_once_the_next_version_is_there(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    await claim(store, some)
    await advance(store, some)
    after = [replace_version(one) for one in some]
    assert verdicts(await claim(store, after, OTHER)) == {ClaimVerdict.GO}
    assert await advance(store, after, OTHER) == {True}
    assert await advance(store, some) == {False}


async def test_advance_creates_nothing_after_flushall(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    await claim(store, some)
    await stores.wipe()
    assert await advance(store, some) == {False}
    assert await store.peek([(e.header.scope, e.header.event) for e in some]) == [None] * size
    await claim(store, some, OTHER)  # another installs
    assert await advance(store, some) == {False}
    assert await advance(store, some, OTHER) == {True}


async def test_advance_releases_the_lock(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    await claim(store, some)
    await advance(store, some)
    assert verdicts(await claim(store, [replace_version(one) for one in some], OTHER)) == {ClaimVerdict.GO}


async def test_after_its_lease_an_old_holder_moves_nothing(stores: StateStores, size: int) -> None:
    one, two = stores.process("one", SHORT_LEASE_MS), stores.process("two")
    some = entries(size)
    await claim(one, some, OTHER)
    await stores.expire()
    assert verdicts(await claim(two, some)) == {ClaimVerdict.GO}
    assert await advance(one, some, OTHER) == {False}
    assert await advance(two, some) == {True}


async def test_release_gives_my_lock_back_and_leaves_anothers(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size)
    await claim(store, some)
    await store.release(held(some, OTHER))
    assert verdicts(await claim(store, some, OTHER)) == {ClaimVerdict.LOCKED}
    await store.release(held(some, MINE))
    await store.release(held(some, MINE))
    assert await advance(store, some) == {False}
    assert verdicts(await claim(store, some, OTHER)) == {ClaimVerdict.GO}
    await store.release([])


# --- reservations -----------------------------------------------------------------------------------------


async def test_reserve_keeps_the_first_bytes(stores: StateStores, size: int) -> None:
    store = stores.process()
    some = entries(size, 0)
    for one, got in zip(some, await store.reserve(some), strict=True):
        assert (got.verdict, got.version, got.stored) == (Reserved.NEW, 0, one.body)
    for one, got in zip(some, await store.reserve(entries(size, 0, digest="later")), strict=True):
        assert (got.verdict, got.version, got.stored) == (Reserved.REPEAT, 0, one.body)
    for got in await store.reserve(entries(size, 0, body="other")):
        assert (got.verdict, got.stored) == (Reserved.CONFLICT, None)
    await claim(store, some)
    await advance(store, some)
    for got in await store.reserve(some):
        assert (got.verdict, got.version, got.stored) == (Reserved.REPEAT, 1, None)


async def test_peek_reads_without_claiming(stores: StateStores, size: int) -> None:
    store = stores.process("one")
    some = entries(size, 0)
    keys = [(e.header.scope, e.header.event) for e in some]
    await store.reserve(some)
    for one, found in zip(some, await store.peek(keys), strict=True):
        assert found is not None
        assert (found.version, found.body_digest, found.stored, found.holder) == (0, "body", one.body, "")
    await claim(store, some)
    assert {found.holder for found in await store.peek(keys) if found} == {"elsewhere:one:1"}


async def test_a_conflict_stays_one_whatever_came_after(stores: StateStores, size: int) -> None:
    """A changed body is told from a repeat as long as anything is known of the identity."""
    store = stores.process()
    some, changed = entries(size, 0), entries(size, 0, body="changed")
    await store.reserve(some)
    await claim(store, some)
    assert {got.verdict for got in await store.reserve(changed)} == {Reserved.CONFLICT}
    await advance(store, some)
    for got in await store.reserve(changed):
        assert (got.verdict, got.version, got.stored) == (Reserved.CONFLICT, 1, None)


async def test_an_identity_belongs_to_its_tenant(stores: StateStores) -> None:
    store = stores.process()
    ours = entry(0, 0)
    theirs = ours.evolve(tenant="globex", body_digest="theirs")
    for one in (ours, theirs):
        (got,) = await store.reserve([one])
        assert (got.verdict, got.stored) == (Reserved.NEW, one.body)
    assert verdicts(await claim(store, [ours])) == {ClaimVerdict.GO}
    assert verdicts(await claim(store, [theirs], OTHER)) == {ClaimVerdict.GO}
    assert await advance(store, [theirs]) == {False}
    assert await advance(store, [theirs], OTHER) == {True}
    (left,) = await store.peek([(ours.header.scope, ours.header.event)])
    assert left is not None
    assert left.version == 0


async def test_of_two_who_reserve_one_identity_at_once_one_is_new(stores: StateStores) -> None:
    """10,000 identities, each by two processes at the same time, in carriers of 50."""
    some = [entry(place, 0) for place in range(10_000)]
    carriers = [some[at : at + 50] for at in range(0, len(some), 50)]
    one, two = stores.process("one"), stores.process("two")
    gate = asyncio.Semaphore(16)

    async def reserve(store: StateStore, carrier: list[Entry]) -> list[tuple[str, Reserved]]:
        async with gate:
            answers = await store.reserve(carrier)
        return [(e.header.event, got.verdict) for e, got in zip(carrier, answers, strict=True)]

    calls = [reserve(store, carrier) for carrier in carriers for store in (one, two)]
    found = Counter(answer for answers in await asyncio.gather(*calls) for answer in answers)
    assert len(found) == 2 * len(some)
    assert set(found.values()) == {1}


async def test_two_processes_that_claim_at_once_never_both_hold(stores: StateStores, size: int) -> None:
    some = entries(size, 0)
    one, two = stores.process("one"), stores.process("two")
    await one.reserve(some)
    answers = await asyncio.gather(claim(one, some, MINE), claim(two, some, OTHER))
    for pair in zip(*answers, strict=True):
        assert {got.verdict for got in pair} == {ClaimVerdict.GO, ClaimVerdict.LOCKED}
    assert await advance(one, some, MINE) | await advance(two, some, OTHER) == {True, False}


# --- times to live ----------------------------------------------------------------------------------------


async def test_a_state_runs_out(stores: StateStores) -> None:
    size = 64
    store = stores.process(state_ttl_s=1)
    some, installed = entries(size, 0), [entry(1_000 + place) for place in range(size)]
    keys = [(e.header.scope, e.header.event) for e in (*some, *installed)]
    await store.reserve(some)
    await claim(store, installed)
    await stores.wait(1_000)
    assert await store.peek(keys) == [None] * 2 * size
    assert await advance(store, installed) == {False}
    assert {got.verdict for got in await store.reserve(entries(size, 0, body="later"))} == {Reserved.NEW}


async def test_an_advance_begins_the_states_life_anew_and_a_claim_does_not(stores: StateStores) -> None:
    store = stores.process(state_ttl_s=1)
    moved, claimed = entry(0, 0), entry(1, 0)
    keys = [(e.header.scope, e.header.event) for e in (moved, claimed)]
    await store.reserve([moved, claimed])
    await claim(store, [moved])
    await stores.wait(600)
    assert await advance(store, [moved]) == {True}
    assert verdicts(await claim(store, [claimed])) == {ClaimVerdict.GO}
    await stores.wait(500)
    kept, gone = await store.peek(keys)
    assert kept is not None
    assert (kept.version, gone) == (1, None)


async def test_a_tombstone_answers_repeats_until_it_runs_out(stores: StateStores) -> None:
    size = 64
    store = stores.process(tombstone_ttl_s=1)
    some, repeat = entries(size, 3), entries(size, 0)
    keys = [(e.header.scope, e.header.event) for e in some]
    await claim(store, some)
    assert await advance(store, some, tombstone=True) == {True}
    for got in await store.reserve(repeat):
        assert (got.verdict, got.version, got.stored) == (Reserved.REPEAT, 4, None)
    assert {got.verdict for got in await store.reserve(entries(size, 0, body="changed"))} == {Reserved.CONFLICT}
    for found in await store.peek(keys):
        assert found is not None
        assert (found.version, found.stored, found.holder) == (4, None, "")
    await stores.wait(1_000)
    assert await store.peek(keys) == [None] * size
    assert {got.verdict for got in await store.reserve(repeat)} == {Reserved.NEW}


async def test_peek_tells_the_status(stores: StateStores, size: int) -> None:
    store = stores.process()
    keys = [(e.header.scope, e.header.event) for e in entries(size)]
    for n, status in enumerate((Status.RECEIVED, Status.CREATED, Status.VALIDATED, Status.PROCESSING)):
        await claim(store, entries(size, n))
        assert {found.status for found in await store.peek(keys) if found} == {status}
    last = [replace(move(one, tombstone=True), status=Status.AWAITING_APPROVAL) for one in entries(size, 3)]
    assert set(await store.advance(last)) == {True}
    assert {found.status for found in await store.peek(keys) if found} == {Status.AWAITING_APPROVAL}


# --- lost replies, lost memory ----------------------------------------------------------------------------


async def test_whatever_loses_its_reply_may_be_repeated(stores: StateStores, size: int) -> None:
    store = stores.process()
    warm, some = [entry(5_000, 0)], entries(size, 0)
    for one in (warm, some):  # the first round teaches a real server the scripts, and opens the connection
        for step in ("reserve", "claim", "advance", "release"):

            async def call(step: str = step, one: list[Entry] = one) -> object:
                match step:
                    case "reserve":
                        answers = await store.reserve(one)
                        assert one is warm or {got.verdict for got in answers} == {Reserved.REPEAT}  # carried out
                        return [(got.version, got.stored) for got in answers]
                    case "claim":
                        return await claim(store, one)
                    case "advance":
                        return await advance(store, one)
                    case _:
                        await store.release(held(one, MINE))
                        return None

            if one is some:
                stores.lose_reply(store)
                with pytest.raises(StateStoreError):
                    await call()  # nothing can be asserted of an answer that is lost
            first = await call()
            assert await call() == first
    (found, *_) = await store.peek([(e.header.scope, e.header.event) for e in some])
    assert found is not None
    assert (found.version, found.holder) == (1, "")


async def test_flushall_between_claim_and_advance_leaves_it_to_whoever_claims_next(
    stores: StateStores, size: int
) -> None:
    one, two = stores.process("one"), stores.process("two")
    some = entries(size)
    await claim(one, some)
    await stores.wipe()
    assert verdicts(await claim(two, some, OTHER)) == {ClaimVerdict.INSTALLED}
    assert await advance(one, some) == {False}
    await one.release(held(some, MINE))
    assert verdicts(await claim(one, some)) == {ClaimVerdict.LOCKED}
    assert await advance(two, some, OTHER) == {True}
    for got in await claim(one, some):
        assert (got.verdict, got.output) == (ClaimVerdict.DONE, b"owed")


# --- suspects and beats -----------------------------------------------------------------------------------


async def test_a_process_is_alive_while_it_beats(stores: StateStores) -> None:
    one, two = stores.process("one"), stores.process("two")
    boots = ["elsewhere:one:1", "elsewhere:two:1", ""]
    assert await one.alive(boots) == [False, False, False]
    await one.beat()
    await two.beat()
    assert await two.alive(boots) == [True, True, False]
    await stores.silence("one")
    assert await two.alive(boots) == [False, True, False]
    await stores.process("short", heartbeat_ttl_s=1).beat()
    assert await two.alive(["elsewhere:short:1"]) == [True]
    await stores.wait(1_000)
    assert await two.alive(["elsewhere:short:1"]) == [False]


async def test_only_dead_holders_of_a_suspect_count(stores: StateStores) -> None:
    one, two, three = (stores.process(boot) for boot in ("one", "two", "three"))
    h = entry(0).header
    for store in (one, two, three):
        await store.beat()
    assert await one.begin_alone(h.scope, h.event, "scoring") == 0
    assert await one.begin_alone(h.scope, h.event, "scoring") == 0
    assert await two.begin_alone(h.scope, h.event, "scoring") == 0  # one lives
    await stores.silence("two")
    assert await three.begin_alone(h.scope, h.event, "scoring") == 1
    assert await three.begin_alone(h.scope, h.event, "guardrail") == 0
    await stores.silence("three")
    assert await one.begin_alone(h.scope, h.event, "scoring") == 2
    silent = stores.process("silent")
    assert await silent.begin_alone(h.scope, h.event, "decision") == 0
    assert await silent.begin_alone(h.scope, h.event, "decision") == 0  # nobody counts against himself
    await one.end_alone(h.scope, h.event, "scoring")
    assert await two.begin_alone(h.scope, h.event, "scoring") == 0

"""What only the twin of Redis can be asked for: an unreachable server, lost replies, a lost tail of writes.

What it has in common with Redis is in tests/conformance/test_state_store.py.
"""

from __future__ import annotations

import re
from datetime import timedelta
from importlib.resources import files

import pytest

from contracts.codec import Entry, EntryHeader
from contracts.failures import StateStoreError
from contracts.ports import Advance, ClaimRequest, ClaimVerdict, Held, Reserved
from resilience.memory import CountingIds, MemoryRedis, MemoryStateStore, SteppingClock
from resilience.redis import StatePolicy

TOKEN = "1" * 32


def entry(place: int = 0, n: int = 0) -> Entry:
    return Entry(EntryHeader("acme", f"{place:032x}", "risk", "retrieval", n, f"d-{n}", "body"), b"stored")


def move(one: Entry, token: str = TOKEN) -> Advance:
    h = one.header
    return Advance(h.scope, h.event, token, h.n, h.digest, h.n + 1, f"d-{h.n + 1}", h.body_digest, b"next", b"owed")


async def test_a_server_that_is_down_carries_nothing_out() -> None:
    server = MemoryRedis(SteppingClock())
    store = MemoryStateStore(server, "one")
    server.down = True
    h = entry().header
    for call in (
        store.reserve([entry()]),
        store.claim([ClaimRequest(entry(), True)], TOKEN),
        store.advance([move(entry())]),
        store.release([Held(h.scope, h.event, TOKEN)]),
        store.peek([(h.scope, h.event)]),
        store.beat(),
        store.alive(["one"]),
        store.begin_alone(h.scope, h.event, "scoring"),
        store.end_alone(h.scope, h.event, "scoring"),
        store.ping(),
    ):
        with pytest.raises(StateStoreError):
            await call
    server.down = False
    assert (server.cells, server.alone, server.beats) == ({}, {}, {})
    await store.ping()


async def test_a_lost_reply_was_carried_out() -> None:
    server = MemoryRedis(SteppingClock())
    store = MemoryStateStore(server, "one")
    store.lose_replies = 1
    with pytest.raises(StateStoreError):
        await store.reserve([entry()])
    (again,) = await store.reserve([entry()])
    assert (again.verdict, again.stored) == (Reserved.REPEAT, b"stored")


async def test_a_wire_may_lose_the_request_or_the_reply() -> None:
    server, fails = MemoryRedis(SteppingClock()), [True]

    async def wire() -> None:
        if fails.pop():
            raise StateStoreError

    store = MemoryStateStore(server, "one", wire=wire)
    with pytest.raises(StateStoreError):
        await store.reserve([entry()])
    assert not server.cells
    fails += [True, False]  # popped from the end: the request passes, the reply is lost
    with pytest.raises(StateStoreError):
        await store.reserve([entry()])
    assert len(server.cells) == 1


async def test_a_lost_tail_takes_the_last_writes_and_no_other() -> None:
    clock = SteppingClock()
    server = MemoryRedis(clock, undo_s=2)
    store = MemoryStateStore(server, "one")
    old, new = entry(0), entry(1)
    await store.reserve([old])
    await store.claim([ClaimRequest(old)], TOKEN)
    clock.step(1)
    moment = clock.now()
    assert list(await store.advance([move(old)])) == [True]
    await store.reserve([new])
    await store.beat()
    await store.begin_alone(new.header.scope, new.header.event, "scoring")
    clock.step(1)
    server.flush()
    server.forget_since(moment)
    kept, gone = await store.peek([(one.header.scope, one.header.event) for one in (old, new)])
    assert gone is None
    assert kept is not None
    assert (kept.version, kept.holder, kept.stored) == (0, "one", b"stored")
    assert (server.alone, server.beats) == ({}, {})
    assert list(await store.advance([move(old)])) == [True]  # the lock came back too: its holder goes on


async def test_a_tail_longer_than_what_can_be_undone_is_an_error() -> None:
    clock = SteppingClock()
    server = MemoryRedis(clock, undo_s=2)
    clock.step(10)
    server.forget_since(clock.now() - timedelta(seconds=2))
    with pytest.raises(ValueError, match="undo_s"):
        server.forget_since(clock.now() - timedelta(seconds=3))


async def test_what_ran_out_is_swept_away() -> None:
    """Memory stays bounded by what lives, whatever was written before."""
    clock = SteppingClock()
    server = MemoryRedis(clock)
    store = MemoryStateStore(server, "one", StatePolicy(state_ttl_s=1))
    for place in range(10_000):
        clock.step(0.01)
        await store.reserve([entry(place)])
    assert len(server.cells) < 1_500


async def test_a_lease_lasts_to_its_last_millisecond() -> None:
    clock = SteppingClock()
    store = MemoryStateStore(MemoryRedis(clock), "one")
    await store.claim([ClaimRequest(entry(), True)], TOKEN)
    clock.step(9.999)
    (late,) = await store.claim([ClaimRequest(entry())], "2" * 32)
    assert (late.verdict, late.lease_ms) == (ClaimVerdict.LOCKED, 1)
    clock.step(0.001)
    (after,) = await store.claim([ClaimRequest(entry())], "2" * 32)
    assert after.verdict is ClaimVerdict.GO


async def test_two_processes_of_one_server_see_the_same() -> None:
    server, ids = MemoryRedis(SteppingClock()), CountingIds()
    one, two = MemoryStateStore(server, "one"), MemoryStateStore(server, "two")
    await one.reserve([entry()])
    await one.claim([ClaimRequest(entry())], ids.token())
    (got,) = await two.claim([ClaimRequest(entry())], ids.token())
    assert (got.verdict, got.holder, got.lease_ms) == (ClaimVerdict.LOCKED, "one", 10_000)


def test_ids_are_well_formed_and_never_repeat() -> None:
    ids = CountingIds()
    made = [ids.token() for _ in range(3)] + [ids.uuid7() for _ in range(3)]
    assert len(set(made)) == 6
    assert all(re.fullmatch(r"[0-9a-f]{32}", token) for token in made[:3])
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-8[0-9a-f]{3}-[0-9a-f]{12}", u) for u in made[3:])


def test_the_twin_reads_no_clock_and_no_chance_of_its_own() -> None:
    rooms = [path for path in (files("resilience") / "memory").iterdir() if path.name.endswith(".py")]
    assert len(rooms) >= 5
    forbidden = r"\bimport (random|secrets|threading|time|uuid)\b|datetime\.now|call_later|\bloop\.time"
    assert [path.name for path in rooms if re.search(forbidden, path.read_text())] == []

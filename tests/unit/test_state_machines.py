"""State machines over the twins: whatever order calls come in, the few rules that everything stands on hold."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from contracts.codec import Entry, EntryHeader
from contracts.ports import Advance, ClaimRequest, ClaimVerdict, Held, Reserved
from contracts.state import AuditRecord
from contracts.tenancy import TenantScope
from governance.memory import MemoryAuditLog, MemoryDatabase
from resilience.memory.state_store import MemoryRedis, MemoryStateStore
from resilience.memory.time import SteppingClock
from resilience.redis import StatePolicy

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
EVENTS = st.sampled_from(("e1", "e2"))
WORKERS = st.sampled_from((0, 1, 2))
BODIES = st.sampled_from(("a", "b"))


def now(work: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that never waits: the twins do not, without a wire."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a twin waited")


def entry(event: str, n: int, body: str) -> Entry:
    header = EntryHeader("acme", event, "risk", "scoring", n, f"{event}{n}{body}", body)
    return Entry(header, f"{event} {n} {body}".encode())


class Door(RuleBasedStateMachine):
    """The reservation: the first body owns an identity until Redis forgets, and its bytes are what repeats get."""

    def __init__(self) -> None:
        super().__init__()
        self.server = MemoryRedis(SteppingClock())
        self.store = MemoryStateStore(self.server, "door")
        self.owner: dict[str, str] = {}

    @rule(event=EVENTS, body=BODIES)
    def submit(self, event: str, body: str) -> None:
        (answer,) = now(self.store.reserve([entry(event, 0, body)]))
        owner = self.owner.setdefault(event, body)
        if answer.verdict is Reserved.CONFLICT:
            assert owner != body
            assert answer.stored is None
        else:
            assert owner == body
            assert answer.stored == entry(event, 0, body).body

    @rule()
    def flush(self) -> None:
        self.server.flush()
        self.owner.clear()


class Fence(RuleBasedStateMachine):
    """Lock and fence: only the last one who was let in moves an event, and nobody moves one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = SteppingClock()
        self.server = MemoryRedis(self.clock)
        policy = StatePolicy(10_000, 604_800, 86_400)
        self.workers = [MemoryStateStore(self.server, f"boot-{n}", policy) for n in range(3)]
        self.tokens = 0
        self.holds: dict[tuple[int, str], tuple[str, int, str]] = {}
        self.let_in: dict[str, str] = {}
        self.versions: dict[str, int] = {}

    @rule(worker=WORKERS, event=EVENTS, n=st.integers(0, 2))
    def claim(self, worker: int, event: str, n: int) -> None:
        self.tokens += 1
        token, one = f"t{self.tokens}", entry(event, n, "a")
        cell = self.server.cell((ACME, event), self.server.now_ms)
        held = cell is not None and cell.lock is not None and cell.until > self.server.now_ms
        (answer,) = now(self.workers[worker].claim([ClaimRequest(one, install_absent=True)], token))
        if answer.verdict in (ClaimVerdict.GO, ClaimVerdict.TWIN):
            assert not held, "two holders of one lease"
        if answer.verdict in (ClaimVerdict.GO, ClaimVerdict.TWIN, ClaimVerdict.INSTALLED):
            found = self.server.cells[ACME, event]
            self.holds[worker, event] = (token, found.version, found.digest)
            self.let_in[event], self.versions[event] = token, found.version

    @rule(worker=WORKERS, event=EVENTS, final=st.booleans())
    def advance(self, worker: int, event: str, final: bool) -> None:
        mine = self.holds.get((worker, event))
        if mine is None:
            return
        token, version, digest = mine
        new = entry(event, version + 1, "a")
        move = Advance(
            ACME, event, token, version, digest, version + 1, new.header.digest, "a", new.body, b"", tombstone=final
        )
        (moved,) = now(self.workers[worker].advance([move]))
        repeated = self.let_in.get(event) == f"moved {token}"
        if moved and not repeated:
            assert self.let_in.get(event) == token, "moved by one who was not let in last"
            self.let_in[event], self.versions[event] = f"moved {token}", version + 1

    @rule(worker=WORKERS, event=EVENTS)
    def release(self, worker: int, event: str) -> None:
        mine = self.holds.pop((worker, event), None)
        if mine is None:
            return
        now(self.workers[worker].release([Held(ACME, event, mine[0])]))
        if self.let_in.get(event) == mine[0]:
            self.let_in[event] = ""

    @rule(seconds=st.sampled_from((1.0, 11.0)))
    def wait(self, seconds: float) -> None:
        self.clock.step(seconds)

    @rule()
    def flush(self) -> None:
        self.server.flush()
        self.let_in.clear()
        self.versions.clear()

    @invariant()
    def only_moves_that_were_allowed_are_there(self) -> None:
        there = {event: cell.version for (_, event), cell in self.server.cells.items()}
        assert there == self.versions


class Chain(RuleBasedStateMachine):
    """The audit chain: each record once, in its own tenant's chain, without a gap, whatever fails or is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.database = MemoryDatabase(SteppingClock())
        self.log = MemoryAuditLog(self.database)
        self.there: dict[TenantScope, set[str]] = {ACME: set(), GLOBEX: set()}

    @rule(
        records=st.lists(st.tuples(st.sampled_from((ACME, GLOBEX)), st.integers(0, 12)), max_size=6),
        fate=st.sampled_from(("answered", "answered", "failed", "lost")),
    )
    def append(self, records: list[tuple[TenantScope, int]], fate: str) -> None:
        rows = [AuditRecord(scope, f"{scope} {n}", "e1", n, "d", f'{{"n":{n}}}'.encode()) for scope, n in records]
        if fate == "failed" and rows:
            self.database.fail_next(1)
        if fate == "lost" and rows:
            self.database.lose_replies(1)
        try:
            answers = now(self.log.append(rows))
            assert fate == "answered" or not rows
            seen: set[str] = set()
            for row, fresh in zip(rows, answers, strict=True):
                assert row.scope is not None
                assert fresh == (row.record_id not in self.there[row.scope] | seen)
                seen.add(row.record_id)
        except Exception:
            if fate == "answered":
                raise
        if fate != "failed":
            for row in rows:
                assert row.scope is not None
                self.there[row.scope].add(row.record_id)

    @invariant()
    def every_chain_is_whole(self) -> None:
        for scope, there in self.there.items():
            report = now(self.log.verify(scope))
            assert (report.problem, report.records) == (None, len(there))


_SHORT = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestDoor = Door.TestCase
TestFence = Fence.TestCase
TestChain = Chain.TestCase
for _case in (TestDoor, TestFence, TestChain):
    _case.settings = _SHORT
del _case  # pytest would collect it once more

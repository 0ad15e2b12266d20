"""Two versions of the topology side by side: an entry stays where it is, and an old version goes when it is empty."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.failures import MessagingFailureError
from contracts.tenancy import TenantScope
from contracts.topology import RUNGS, STAGES, VERSION, Layout, Layouts, topology, topology_of
from resilience.partitioning import Drain, DrainPolicy, DrainState, drain, moved
from tests.unit.test_docs import table_of

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
V1, V2 = Layout("v1", 4), Layout("v2", 8)
BOTH = Layouts((V1, V2))
VECTORS = {row[0]: [int(n) for n in row[2:]] for row in table_of("docs/architecture.md", "## Slots and partitions")}
SCOPES = st.from_regex(r"[a-z0-9]{1,12}", fullmatch=True).map(TenantScope)


def test_the_published_vectors_hold_on_either_side() -> None:
    assert len(VECTORS) >= 6
    for tenant, (on_four, on_eight) in VECTORS.items():
        scope = TenantScope(tenant)
        assert BOTH.of("v1").stage_queue("scoring", scope) == f"risk.v1.scoring.p{on_four:02d}"
        assert BOTH.newest.stage_queue("scoring", scope) == f"risk.v2.scoring.p{on_eight:02d}"
        assert BOTH.of("v2").audit_queue(scope) == f"risk.v2.audit.p{on_eight:02d}"
    assert V1.audit_queue(None) == "risk.v1.audit.p00"


@settings(max_examples=50)
@given(SCOPES, st.integers(1, 60), st.integers(1, 40))
def test_growing_moves_tenants_into_new_partitions_only(scope: TenantScope, before: int, more: int) -> None:
    old, new = Layout("v1", before), Layout("v2", before + more)
    if moved([scope], old, new):
        assert scope.partition(new.partitions) >= before
    assert moved([scope], old, Layout("v3", before)) == ()


def test_an_entry_stays_on_its_version_and_a_new_one_goes_to_the_newest() -> None:
    assert BOTH.of("v1") == V1
    assert BOTH.of("v2") == BOTH.newest == V2
    assert BOTH.old == (V1,)


def test_an_entry_of_a_version_that_does_not_run_is_never_put_elsewhere() -> None:
    with pytest.raises(MessagingFailureError, match="not known here"):
        BOTH.of("v3")


def test_a_worker_consumes_every_version() -> None:
    queues = [queue for layout in BOTH.running for queue in layout.stage_queues("scoring")]
    assert queues[:4] == [f"risk.v1.scoring.p0{p}" for p in range(4)]
    assert queues[4:] == [f"risk.v2.scoring.p0{p}" for p in range(8)]


def test_a_version_that_is_only_announced_is_consumed_and_takes_no_entry() -> None:
    announced = Layouts((V1, V2), filling="v1")
    assert announced.running == (V1, V2)
    assert announced.newest == V1
    assert announced.old == ()
    assert Layouts((V1, V2), filling="v2").old == (V1,)
    with pytest.raises(ValueError, match="does not run"):
        Layouts((V1,), filling="v2")


@pytest.mark.parametrize("partitions", [1, 4, 64])
def test_what_must_drain_is_all_that_comes_with_a_version(partitions: int) -> None:
    one, other = Layout(VERSION, 4), Layout("v2", partitions)
    beside = {queue.name for queue in topology_of([one, other]).queues}
    assert set(other.work_queues()) == beside - {queue.name for queue in topology(4).queues}
    assert len(other.work_queues()) == 5 * partitions + len(RUNGS)


def test_a_new_versions_queues_are_limited_by_the_policies_that_there_are() -> None:
    assert topology_of([V1, V2]).policies == topology(4).policies
    for queue in V2.work_queues():
        twin = queue.replace("v2", "v1", 1)
        ours, theirs = ([p.name for p in topology(4).policies if re.search(p.pattern, name)] for name in (queue, twin))
        assert ours == theirs
        assert len(ours) == 1


def test_versions_share_no_queue() -> None:
    assert not set(V1.work_queues()) & set(V2.work_queues())


@pytest.mark.parametrize("bad", [("1", 4), ("v0", 4), ("v01", 4), ("v1.x", 4), ("v1", 0), ("v1", 101)])
def test_a_layout_without_names_is_refused(bad: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=r"version is|partitions"):
        Layout(*bad)


@pytest.mark.parametrize("bad", [(), (V2, V1), (V1, V1), (Layout("v10", 2), Layout("v9", 2))])
def test_versions_run_once_each_and_in_order(bad: tuple[Layout, ...]) -> None:
    with pytest.raises(ValueError, match="oldest first"):
        Layouts(bad)
    assert Layouts((Layout("v9", 2), Layout("v10", 2))).newest.version == "v10"


# --- draining ---------------------------------------------------------------------------------------

EMPTY: Mapping[str, int | None] = dict.fromkeys(V1.work_queues(), 0)
POLICY = DrainPolicy(quiet_s=120, gap_s=30)


def read(*readings: tuple[float, Mapping[str, int | None]]) -> list[Drain]:
    state, made = DrainState(), []
    for seconds, depths in readings:
        made.append(drain(V1, depths, POLICY, state, NOW + timedelta(seconds=seconds)))
        state = made[-1].state
    return made


def test_a_version_is_retired_after_it_was_empty_for_long_enough() -> None:
    made = read(*((s, EMPTY) for s in range(0, 151, 30)))
    assert [one.retire for one in made] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("queue", V1.work_queues())
def test_one_message_anywhere_begins_the_wait_anew(queue: str) -> None:
    made = read(*((s, EMPTY) for s in range(0, 91, 30)), (120, {**EMPTY, queue: 1}), *((s, EMPTY) for s in (150, 240)))
    assert made[4].left == {queue: 1}
    assert not any(one.retire for one in made)


def test_what_could_not_be_read_is_not_empty() -> None:
    queue = V1.work_queues()[-1]
    unread = {name: depth for name, depth in EMPTY.items() if name != queue}
    for depths in (unread, {**EMPTY, queue: None}):
        made = read(*((s, depths) for s in range(0, 301, 30)))
        assert not any(one.retire for one in made)
        assert made[-1].unread == (queue,)


def test_nobody_looking_proves_nothing() -> None:
    assert not read((0, EMPTY), (121, EMPTY))[-1].retire


def test_another_versions_messages_do_not_hold_it_up() -> None:
    busy = {**EMPTY, **{V2.stage_queue(stage, TenantScope("acme")): 9 for stage in STAGES}}
    assert read(*((s, busy) for s in range(0, 121, 30)))[-1].retire


def test_a_patience_that_proves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="gap_s"):
        DrainPolicy(quiet_s=10, gap_s=30)

"""The topology as data: each queue has one policy, none is weaker than meant, and everything is bound."""

from __future__ import annotations

import re

import pytest

from contracts.tenancy import TenantScope
from contracts.topology import (
    DECISIONS,
    DELIVERY_RUNGS,
    INGEST,
    METRICS_QUEUE,
    PARKED_SOURCES,
    REJECTED,
    RUNGS,
    STAGES,
    UNROUTED,
    WORK,
    Policy,
    Topology,
    delivery_rung,
    first_rung,
    tenant_ingest,
    topology,
)

PARTITIONS = 3
LIMIT = 1 << 20


def whole() -> Topology:
    return topology(PARTITIONS, queue_bytes=LIMIT)


def policies_of(queue: str) -> list[Policy]:
    return [policy for policy in whole().policies if re.search(policy.pattern, queue)]


def policy_of(queue: str) -> dict[str, object]:
    (policy,) = policies_of(queue)
    return policy.definition


EXTRA = (TenantScope("acme").ingest_queue, TenantScope("retry").ingest_queue, "up.acme.decisions")
NAMES = tuple(queue.name for queue in whole().queues)
STAGE_QUEUES = tuple(f"risk.v1.{stage}.p{p:02d}" for stage in STAGES for p in range(PARTITIONS))


@pytest.mark.parametrize("queue", [*NAMES, *EXTRA])
def test_every_queue_has_exactly_one_policy(queue: str) -> None:
    assert len(policies_of(queue)) == 1


def test_no_policy_reaches_a_queue_of_somebody_else() -> None:
    for queue in ("acme.decisions", "amq.gen-1", "risk.vx.retrieval.p00", "xrisk.v1.metrics", "risk.v1.retry.11s"):
        assert policies_of(queue) == []


def test_names_are_the_documented_ones() -> None:
    wanted = {*STAGE_QUEUES, "risk.v1.metrics", "risk.v1.labels", "risk.v1.delivery", "risk.ingest.unrouted"}
    wanted |= {f"risk.v1.audit.p{p:02d}" for p in range(PARTITIONS)}
    wanted |= {f"risk.v1.parked.{source}" for source in PARKED_SOURCES}
    wanted |= {f"risk.v1.retry.{name}" for name, _ in RUNGS}
    wanted |= {f"risk.v1.delivery.{name}" for name in ("1s", "5s", "15s", "30s")}
    assert set(NAMES) == wanted
    assert len(NAMES) == len(wanted)
    kinds = {exchange.name: exchange.type for exchange in whole().exchanges}
    assert {name: kinds[name] for name in (INGEST, DECISIONS, REJECTED)} == {
        "risk.ingest": "topic",
        "risk.decisions": "topic",
        "risk.rejected": "topic",
    }
    (ingest,) = [exchange for exchange in whole().exchanges if exchange.name == INGEST]
    assert ingest.arguments == {"alternate-exchange": UNROUTED}


def test_all_but_metrics_are_quorum_queues() -> None:
    assert {queue.name for queue in whole().queues if queue.type != "quorum"} == {METRICS_QUEUE}
    assert all(queue.arguments == {"x-queue-type": queue.type} for queue in whole().queues)


@pytest.mark.parametrize("queue", STAGE_QUEUES)
def test_stage_queues_refuse_and_dead_letter_at_least_once(queue: str) -> None:
    assert policy_of(queue) == {
        "max-length-bytes": LIMIT,
        "overflow": "reject-publish",
        "delivery-limit": 20,
        "dead-letter-exchange": WORK,
        "dead-letter-routing-key": f"risk.v1.parked.{queue.split('.')[2]}",
        "dead-letter-strategy": "at-least-once",
    }


@pytest.mark.parametrize(("name", "ttl"), DELIVERY_RUNGS)
def test_undelivered_decisions_have_rungs_of_their_own(name: str, ttl: int) -> None:
    """They may fill: no queue of a stage shares one, and all of them return to the one delivery queue."""
    assert policy_of(f"risk.v1.delivery.{name}") == {
        "max-length-bytes": LIMIT // 4,
        "overflow": "reject-publish",
        "message-ttl": ttl,
        "dead-letter-exchange": WORK,
        "dead-letter-routing-key": "risk.v1.delivery",
        "dead-letter-strategy": "at-least-once",
    }
    assert delivery_rung(ttl) == f"risk.v1.delivery.{name}"


@pytest.mark.parametrize(("name", "ttl"), RUNGS)
def test_rungs_return_what_expires_to_the_queue_that_it_came_from(name: str, ttl: int) -> None:
    definition = policy_of(f"risk.v1.retry.{name}")
    assert definition == {
        "max-length-bytes": LIMIT,
        "overflow": "reject-publish",
        "message-ttl": ttl,
        "dead-letter-exchange": WORK,
        "dead-letter-strategy": "at-least-once",
    }
    assert ttl <= 30_000


def test_only_metrics_and_upstream_queues_drop() -> None:
    dropping = {policy.pattern for policy in whole().policies if policy.definition.get("overflow") != "reject-publish"}
    assert dropping == {r"^risk\.v1\.metrics$", r"^up\."}
    assert all("max-length" in p.definition or "max-length-bytes" in p.definition for p in whole().policies[-3:])


def test_every_queue_of_ours_is_bound_and_every_binding_has_its_ends() -> None:
    bindings = {(b.exchange, b.queue, b.key) for b in whole().bindings}
    work = [*STAGE_QUEUES, *(n for n in NAMES if ".audit." in n or ".parked." in n), METRICS_QUEUE]
    assert {(WORK, name, name) for name in work} <= bindings
    assert {(f"risk.v1.retry.{name}", f"risk.v1.retry.{name}", "#") for name, _ in RUNGS} <= bindings
    assert (UNROUTED, UNROUTED, "") in bindings
    assert {queue for _, queue, _ in bindings} == set(NAMES)
    assert {exchange for exchange, _, _ in bindings} <= {exchange.name for exchange in whole().exchanges}


def test_dead_letter_targets_exist() -> None:
    targets = {(b.exchange, b.key) for b in whole().bindings}
    for policy in whole().policies:
        key = policy.definition.get("dead-letter-routing-key")
        if key is not None:
            assert (policy.definition["dead-letter-exchange"], key) in targets


@pytest.mark.parametrize(
    ("wait", "rung"), [(0, "100ms"), (100, "100ms"), (101, "1s"), (7_000, "15s"), (30_000, "30s"), (90_000, "30s")]
)
def test_the_first_rung_that_waits_long_enough(wait: int, rung: str) -> None:
    assert first_rung(wait) == rung


def test_a_tenants_ingest_queue_takes_its_own_keys_only() -> None:
    scope = TenantScope("acme")
    part = tenant_ingest(scope.ingest_queue, scope.tenant_id)
    assert [queue.name for queue in part.queues] == ["risk.ingest.acme"]
    assert [(b.exchange, b.queue, b.key) for b in part.bindings] == [("risk.ingest", "risk.ingest.acme", "acme.#")]
    assert policy_of("risk.ingest.acme")["overflow"] == "reject-publish"


@pytest.mark.parametrize("partitions", [1, 4, 64])
def test_names_do_not_repeat_whatever_the_number_of_partitions(partitions: int) -> None:
    names = [queue.name for queue in topology(partitions).queues]
    assert len(names) == len(set(names))
    assert [b for b in topology(partitions).bindings if b.queue not in names] == []

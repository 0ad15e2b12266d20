"""The ingress takes up the queues of new tenants, and one whose queue is missing holds up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from contracts.failures import MessagingFailureError
from contracts.ports import TenantProfile
from contracts.state import Thresholds
from contracts.tenancy import TenantScope
from deploy.wiring import discover


class Consumer:
    """Consumes what is there."""

    def __init__(self, missing: set[str]) -> None:
        self.missing, self.queues = missing, set[str]()

    async def add_queue(self, queue: str) -> None:
        if queue in self.missing:
            raise MessagingFailureError
        self.queues.add(queue)

    async def drop_queue(self, queue: str) -> None:
        self.queues.discard(queue)


class Tenants:
    """Three tenants, of which nobody is paused."""

    def __init__(self) -> None:
        self.looked = asyncio.Event()

    async def tenants(self) -> list[TenantProfile]:
        return [TenantProfile(TenantScope(name), name, name, Thresholds()) for name in ("acme", "globex", "initech")]

    async def doors(self, scopes: Sequence[TenantScope]) -> list[None]:
        self.looked.set()
        return [None] * len(scopes)


async def test_a_tenant_without_its_queue_holds_up_no_other() -> None:
    queues = [TenantScope(name).ingest_queue for name in ("acme", "globex", "initech")]
    consumer, known = Consumer({queues[0]}), Tenants()
    task = asyncio.create_task(discover(cast("Any", consumer), cast("Any", known), cast("Any", known)))
    await asyncio.wait_for(known.looked.wait(), 5)
    await asyncio.sleep(0)
    task.cancel()
    assert consumer.queues == set(queues[1:])

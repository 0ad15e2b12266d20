"""What the conformance suites run against: the in-memory twin, and the real adapter on a private server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from contracts.ports import StateStore
from resilience.redis import RedisStateStore, StatePolicy, connect
from tests.fakes_state import StateWorld, TwinStateStore

LEASE_MS = 10_000
SHORT_LEASE_MS = 60
DATABASE = 9  # the integration tests use 0


@dataclass
class StateStores:
    """Makes processes on one server. `expire` waits until a short lease has run out; `wipe` is FLUSHALL."""

    make: Callable[[str, int], StateStore]
    wipe: Callable[[], Awaitable[object]]
    expire: Callable[[], Awaitable[None]]
    silence: Callable[[str], Awaitable[object]]

    def process(self, boot: str = "one", lease_ms: int = LEASE_MS) -> StateStore:
        return self.make(f"elsewhere:{boot}:1", lease_ms)


@pytest.fixture(params=["twin", pytest.param("redis", marks=pytest.mark.integration)])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[StateStores]:
    """State stores on an empty server."""
    if request.param == "twin":
        world = StateWorld()

        async def wipe() -> None:
            world.flush()

        async def pass_lease() -> None:
            world.now_ms += SHORT_LEASE_MS

        async def forget(boot: str) -> None:
            world.beats.discard(f"elsewhere:{boot}:1")

        yield StateStores(lambda boot, lease: TwinStateStore(world, boot, lease), wipe, pass_lease, forget)
        return
    url = urlsplit(request.getfixturevalue("servers").redis)._replace(path=f"/{DATABASE}").geturl()
    client = connect(url)

    async def run_out() -> None:
        # Redis keeps the time of a lease: a key of the same length that is gone says that it ran out.
        await client.set("lease", b"1", px=SHORT_LEASE_MS + 1)
        async with asyncio.timeout(5):
            while await client.exists("lease"):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.005)

    async def silent(boot: str) -> None:
        await client.delete(f"rf:hb:elsewhere:{boot}:1")

    await client.flushdb()
    try:
        yield StateStores(
            lambda boot, lease: RedisStateStore(client, boot, StatePolicy(lease_ms=lease)),
            client.flushdb,
            run_out,
            silent,
        )
    finally:
        await client.flushdb()
        await client.aclose()
        await client.connection_pool.disconnect()


@pytest.fixture(params=[1, 2, 64])
def size(request: pytest.FixtureRequest) -> int:
    """How many entries one call carries."""
    number: int = request.param
    return number

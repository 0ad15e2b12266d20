"""Connections that were reset while they lay in a pool: the failure of a server, on the very loop of the roles."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest
import uvloop

from contracts.failures import StateStoreError
from deploy.servers import ServerUrls
from resilience.redis import RedisStateStore, connect
from tests.faults.proxy import FaultProxy


@pytest.mark.integration
def test_a_reset_of_idle_connections_to_redis_is_its_failure_and_heals(servers: ServerUrls) -> None:
    """Schedule: a role is idle, a router forgets its connections, the next heartbeat is written to a closed transport.

    It raised a RuntimeError of the event loop, which ended every role at once and was a 500 at the door.
    """

    async def run() -> None:
        parts = urlsplit(servers.redis)
        assert parts.hostname is not None
        assert parts.port is not None
        proxy = FaultProxy(parts.hostname, parts.port)
        port = await proxy.start()
        login = parts.netloc.rpartition("@")[0]
        store = RedisStateStore(connect(f"redis://{login}@127.0.0.1:{port}/0"), "chaos:1:reset")
        try:
            await store.beat()
            assert proxy.reset() == 1
            await asyncio.sleep(0.1)  # the loop learns of it; what it then says of the transport is the point
            with pytest.raises(StateStoreError):
                await store.beat()
            await store.beat()
        finally:
            await store.close()
            await proxy.close()

    uvloop.run(run())

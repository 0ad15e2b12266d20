"""Private servers come back from any kill with their data, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pika
import pytest
import redis

from deploy.native import find_binaries
from deploy.processes import Record, identify
from deploy.servers import NativeServers, ServersError, running_urls

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    if missing := find_binaries()[1]:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"not installed: {', '.join(missing)}")
    made = Path(tempfile.mkdtemp(prefix="riskfleet-test-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def native(directory: Path) -> Iterator[NativeServers]:
    native = NativeServers(directory)
    native.start()
    yield native
    native.stop()


async def put(native: NativeServers) -> None:
    urls = native.urls()
    connection = await asyncpg.connect(urls.migration_database)
    await connection.execute("CREATE TABLE IF NOT EXISTS kept (n int); INSERT INTO kept VALUES (1)")
    await connection.close()
    with redis.Redis.from_url(urls.redis) as client:
        client.set("kept", "1")
    await asyncio.sleep(1.1)  # appendfsync everysec may lose the last second, and says so
    with pika.BlockingConnection(pika.URLParameters(urls.rabbitmq)) as amqp:
        channel = amqp.channel()
        channel.confirm_delivery()
        channel.queue_declare("kept", durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_purge("kept")
        channel.basic_publish("", "kept", b"1", pika.BasicProperties(delivery_mode=2), mandatory=True)


async def kept(native: NativeServers) -> tuple[Any, Any, Any]:
    urls = native.urls()
    connection = await asyncpg.connect(urls.migration_database)
    row = await connection.fetchval("SELECT n FROM kept LIMIT 1")
    await connection.close()
    with redis.Redis.from_url(urls.redis) as client:
        value = client.get("kept")
    with pika.BlockingConnection(pika.URLParameters(urls.rabbitmq)) as amqp:
        # Fetched, not counted: the count is a statistic, which lags behind a restart.
        _, _, message = amqp.channel().basic_get("kept")
    return row, value, message


@pytest.mark.parametrize("name", ["redis", "postgresql", "rabbitmq"])
async def test_a_killed_server_comes_back_on_its_port_with_its_data(native: NativeServers, name: str) -> None:
    await put(native)
    before, urls = native.pids(), native.urls()
    native.kill(name)
    assert name not in native.pids()
    assert native.ensure_alive() == [name]
    native.wait_ready()
    after = native.pids()
    assert {other for other in after if after[other] != before[other]} == {name}
    assert native.urls() == urls
    assert await kept(native) == (1, b"1", b"1")


async def test_the_roles_can_do_no_more_than_they_must(native: NativeServers) -> None:
    application = await asyncpg.connect(native.urls().database)
    owner = await asyncpg.connect(native.urls().migration_database)
    try:
        query = "SELECT rolsuper, rolbypassrls, rolcreaterole FROM pg_roles WHERE rolname = current_user"
        assert tuple(await application.fetchrow(query)) == (False, False, False)
        assert tuple(await owner.fetchrow(query)) == (False, False, True)
        assert await owner.fetchval("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'riskfleet'") == (
            "riskfleet_owner"
        )
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await application.execute("CREATE TABLE mine (n int)")
    finally:
        await application.close()
        await owner.close()


def test_redis_asks_for_a_password_and_never_evicts(native: NativeServers) -> None:
    url = native.urls().redis
    with redis.Redis.from_url(url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    with (
        redis.Redis.from_url("redis://127.0.0.1" + url[url.rindex(":") :]) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_a_second_fleet_cannot_take_the_same_directory(native: NativeServers, directory: Path) -> None:
    with pytest.raises(ServersError, match="another fleet"):
        NativeServers(directory).start()
    assert running_urls(directory) == native.urls()


async def test_everything_starts_again_after_all_was_killed_and_stop_leaves_nothing(
    native: NativeServers, directory: Path
) -> None:
    """The machine's worst moment: all servers and their supervisor die at once, and a new supervisor comes."""
    await put(native)
    urls = native.urls()
    for pid in native.pids().values():
        os.kill(pid, signal.SIGKILL)
    assert native.start() == urls
    assert await kept(native) == (1, b"1", b"1")
    record = Record(directory / "servers.json")
    epmd = record.process("epmd")
    assert epmd is not None
    pids = [*native.pids().values(), epmd.pid]
    assert len(pids) == 4
    native.stop()
    # The port mapper is nobody's child: the system may take it off its table a moment after it ended.
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if identify(pid) is not None]) and time.monotonic() < deadline:  # noqa: ASYNC110 - no event
        await asyncio.sleep(0.05)
    assert left == []
    assert running_urls(directory) is None

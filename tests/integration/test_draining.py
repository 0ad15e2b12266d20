"""Every role is told to stop while it works, while it starts and while a server hangs: it leaves in time with code 0,
and nothing that was accepted is lost, decided twice or left locked.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import redis.asyncio as aioredis

from deploy import local
from deploy.servers import NativeServers
from deploy.settings import environment_of
from tests.integration.fleet_fixture import ROOT, RunningFleet, eventually, free_port, show, some_events

pytestmark = pytest.mark.integration

SEED = 20261124
NAMES = [spec.name for spec in local.roles(0)]
MOST_S = 25.0
"""A role that is told to stop has left after that (seconds)."""


def argv_of(role: str, port: int) -> tuple[str, ...]:
    (spec,) = [spec for spec in local.roles(0) if spec.name == role]
    return (*spec.argv[:-1], str(port))


def environment(fleet: RunningFleet, port: int) -> dict[str, str]:
    """A role beside the fleet's own: on another port, in the same servers."""
    own = fleet.settings.model_copy(update={"http_port": port, "control_port": port})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
    return kept | environment_of(own) | {"PYTHONPATH": str(ROOT)}


@contextmanager
def roles_beside(fleet: RunningFleet) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """One process of every role, by the port on which it answers once it serves."""
    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for name in NAMES:
            port = free_port()
            log = (fleet.settings.data_dir / "logs" / f"beside-{name}.log").open("ab")
            started[port] = subprocess.Popen(
                argv_of(name, port), cwd=ROOT, env=environment(fleet, port), stdout=log, stderr=subprocess.STDOUT
            )
            log.close()
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


async def listens(process: subprocess.Popen[bytes]) -> None:
    """Until the process has a handler for SIGTERM: before, the kernel ends it, and nothing has begun."""

    status = Path(f"/proc/{process.pid}/status")

    async def caught() -> bool:
        lines = (await asyncio.to_thread(status.read_text)).splitlines()
        (line,) = [line for line in lines if line.startswith("SigCgt")]
        return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    await eventually("a handler for SIGTERM", caught, bool, 20)


async def serves(port: int) -> None:
    """Until the role that has this port is ready."""

    async def look() -> int:
        try:
            async with httpx.AsyncClient(timeout=5) as client:
                return (await client.get(f"http://127.0.0.1:{port}/health/ready")).status_code
        except httpx.TransportError:
            return 0

    await eventually(f"port {port} ready", look, lambda status: status == 200, 40)


async def stop_all(started: dict[int, subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes of processes that are told to stop at once; None for one that stays too long."""
    began = time.monotonic()
    for process in started.values():
        process.terminate()

    async def look() -> bool:
        return all(process.poll() is not None for process in started.values())

    with suppress(AssertionError):
        await eventually("all have left", look, bool, MOST_S)
    show("all had left after", round(time.monotonic() - began, 1), "s")
    return [process.poll() for process in started.values()]


async def locks(fleet: RunningFleet) -> list[str]:
    """The states in Redis that some process holds."""
    client = aioredis.Redis.from_url(fleet.settings.need("redis_url"))
    try:
        keys = [key async for key in client.scan_iter(match="rf:*", count=1000) if await client.type(key) == b"hash"]
        return [key.decode() for key in keys if await client.hget(key, "l")]
    finally:
        await client.aclose()


async def test_every_role_drains_under_load_and_nothing_is_lost(fleet: RunningFleet) -> None:
    show("seed", SEED)
    chance = random.Random(SEED)
    events = {name: some_events(f"drain-{name}", 400, SEED) for name in fleet.upstreams}
    sending = [asyncio.create_task(fleet.send(name, some)) for name, some in events.items()]
    names = [name for name in fleet.pids() if name != "gateway"]  # the streams' client has no patience for a door
    chance.shuffle(names)
    for name in names:
        pid = fleet.pids()[name]
        os.kill(pid, signal.SIGTERM)
        await fleet.wait_restarted(name, pid)
        await asyncio.sleep(chance.random() / 4)
    await asyncio.gather(*sending)
    pid = fleet.pids()["gateway"]
    os.kill(pid, signal.SIGTERM)
    await fleet.wait_restarted("gateway", pid)
    await fleet.wait_ready()
    for name, some in events.items():
        found = await fleet.wait_decided(name, some, within_s=90)
        assert set(found.values()) == {1}
        assert (await fleet.verified(fleet.scope(name))).missing == 0
    await fleet.assert_empty()
    assert await locks(fleet) == []
    ended = [line for line in fleet.said if "starting it again" in line]
    assert len(ended) == len(names) + 1
    assert [line for line in ended if "ended with exit code 0" not in line] == []


@pytest.mark.parametrize("after_s", [0.0, 0.8])
async def test_every_role_may_be_stopped_while_it_starts(fleet: RunningFleet, after_s: float) -> None:
    with roles_beside(fleet) as started:
        for process in started.values():
            await listens(process)
        await asyncio.sleep(after_s)
        assert await stop_all(started) == [0] * len(NAMES)


@pytest.mark.parametrize("server", ["redis", "postgresql", "rabbitmq"])
async def test_every_role_may_be_stopped_while_a_server_hangs(fleet: RunningFleet, server: str) -> None:
    """A hanging server is the longest that a role can wait: its handlers are stuck in calls to it."""
    native = fleet.native
    if native is None:
        pytest.skip("the servers are not ours to stop")
    some = some_events(f"hang-{server}", 300, SEED)
    with roles_beside(fleet) as started:
        for port in started:
            await serves(port)
        sending = asyncio.create_task(fleet.send("acme", some))
        await fleet.wait_decided("acme", some, 5)
        with stopped(fleet, native, server):
            await asyncio.sleep(1)  # all of them are in the middle of a call now, and some paused
            assert await stop_all(started) == [0] * len(NAMES)
    await asyncio.gather(sending, return_exceptions=True)
    await fleet.wait_ready()
    await fleet.send("acme", some)  # what was not accepted is sent again under its own name
    found = await fleet.wait_decided("acme", some, within_s=90)
    assert set(found.values()) == {1}
    await fleet.assert_empty()
    assert await locks(fleet) == []


@contextmanager
def stopped(fleet: RunningFleet, native: NativeServers, name: str) -> Iterator[None]:
    """The server's processes stand still inside the block."""
    pid = fleet.thread.call(lambda _: native.pids())[name]
    family = [pid, *_descendants(pid)]
    _tell(family, signal.SIGSTOP)
    try:
        yield
    finally:
        _tell(family, signal.SIGCONT)


def _tell(family: list[int], what: signal.Signals) -> None:
    for one in family:
        with suppress(ProcessLookupError):
            os.kill(one, what)


def _descendants(pid: int) -> list[int]:
    try:
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # ended while we looked, as PostgreSQL's workers do
        return []
    return children + [grand for child in children for grand in _descendants(child)]

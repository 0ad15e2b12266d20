"""The rig of a chaos run: a real fleet on servers of its own, with a fault proxy before each server.

Two processes of every stage and two audit sinks, so that there is always somebody who takes over. The fleet knows the
proxies only; clients, checkers and the nemesis know the servers. Everything of it ends with the context.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import orjson
import redis.asyncio as aioredis
from pydantic import SecretStr

from contracts.tenancy import TenantScope
from contracts.topology import STAGES
from deploy import keys, local, provision
from deploy.fleet import BackoffPolicy, Fleet, RoleSpec
from deploy.processes import Record, free_port
from deploy.provision import DemoCredentials
from deploy.servers import NativeServers, ServerUrls
from deploy.settings import Settings, environment_of
from tests.faults.armed import ARM_FILE, FIRED_FILE
from tests.faults.proxy import FaultProxy
from tests.integration.fleet_fixture import ROOT, FleetThread, eventually

_TWICE: Final = (*map(str, STAGES), "sink-audit")
NOT_KILLED: Final = ("sink-metrics", "control")
"""The metrics sink counts for the checker; what it holds dies with it. Operators' commands are not under test here."""


@dataclass
class ChaosRig:
    """A running fleet and everything that can be done to it."""

    settings: Settings
    urls: ServerUrls
    native: NativeServers
    thread: FleetThread
    tenants: list[DemoCredentials]
    proxies: dict[str, FaultProxy]
    directory: Path
    ports: Mapping[str, int]
    servers_dir: Path
    said: list[str] = field(default_factory=list)

    @property
    def arm_dir(self) -> Path:
        """Where arming files lie."""
        return self.directory / "arm"

    @property
    def fired_file(self) -> Path:
        """What fired."""
        return self.directory / "fired.jsonl"

    @property
    def http(self) -> str:
        """The gateway."""
        return f"http://{self.settings.http_host}:{self.settings.http_port}"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that may be killed."""
        return tuple(name for name in self.ports if name not in NOT_KILLED)

    @property
    def scopes(self) -> list[TenantScope]:
        """The tenants."""
        return [TenantScope(made.tenant) for made in self.tenants]

    async def pids(self) -> Mapping[str, int]:
        """As the supervisor published them: asking it would disturb it."""
        with suppress(OSError, orjson.JSONDecodeError):
            found: dict[str, int] = orjson.loads((self.directory / "logs" / "fleet.json").read_bytes())
            return found
        return {}

    async def at_work(self, role: str) -> bool:
        """Whether something listens on the role's health port: it does once the role consumes."""
        return await _listens(self.ports[role])

    async def kill_server(self, name: str, *, lose_tail: bool = False) -> None:
        """SIGKILL a server, in the supervisor's thread, which also starts it again."""

        def kill(_: Fleet) -> None:
            self.native.kill(name)
            if lose_tail and name == "redis":
                cut_tail(self.servers_dir / "redis" / "appendonlydir")

        await asyncio.to_thread(self.thread.call, kill)

    async def server_back(self, name: str, within_s: float) -> None:
        """Wait until it answers."""
        process = self.native._processes[name]

        async def look() -> bool:
            return await asyncio.to_thread(lambda: process.alive() and process.server.ready())

        await eventually(f"{name} answers", look, bool, within_s)

    async def flush(self) -> None:
        """FLUSHALL, straight to the server."""
        client = aioredis.Redis.from_url(self.urls.redis)
        try:
            await client.flushall()
        finally:
            await client.aclose()

    async def all_back(self, within_s: float) -> None:
        """Wait until every server answers and every role is at work."""
        for name in ("rabbitmq", "redis", "postgresql"):
            await self.server_back(name, within_s)

        async def missing() -> list[str]:
            running = await self.pids()
            return [role for role in self.ports if role not in running or not await self.at_work(role)]

        try:
            await eventually("every role at work", missing, lambda names: not names, within_s)
        except AssertionError:
            running = await self.pids()
            for role in await missing():
                if role in running:
                    os.kill(running[role], signal.SIGUSR1)
            await asyncio.sleep(1.0)
            raise AssertionError(f"not at work: {await missing()} of {dict(running)}; {self.said[-5:]}") from None


@asynccontextmanager
async def chaos_rig(
    native: NativeServers, servers_dir: Path, directory: Path, *, tenants: Sequence[str], lease_ms: int = 2_000
) -> AsyncIterator[ChaosRig]:
    """Schema, topology, tenants, proxies and the fleet; ends all of them but the servers. `native` are started."""
    urls = native.urls()
    proxies = {
        "rabbitmq": FaultProxy(*_place(urls.rabbitmq), confirms=True),
        "redis": FaultProxy(*_place(urls.redis)),
        "postgresql": FaultProxy(*_place(urls.database)),
    }
    used: set[int] = set()
    for proxy in proxies.values():
        used.add(await proxy.start(_port(used)))
    plain = Settings(
        environment="test",
        http_port=_port(used),
        control_port=_port(used),
        data_dir=directory,
        lease_ms=lease_ms,
        publish_timeout_s=2.0,
    )
    direct = local.with_servers(plain, urls)
    try:
        made = await _provision(direct, tenants)
        settings = direct.model_copy(
            update={
                "database_url": SecretStr(_through(urls.database, proxies["postgresql"])),
                "redis_url": SecretStr(_through(urls.redis, proxies["redis"])),
                "rabbitmq_url": SecretStr(_through(urls.rabbitmq, proxies["rabbitmq"])),
            }
        )
        (directory / "arm").mkdir()
        specs, ports = _roles(settings, directory, used)
        said: list[str] = []
        thread = FleetThread(lambda: _fleet(settings, specs, native, said))
        rig = ChaosRig(direct, urls, native, thread, made, proxies, directory, ports, servers_dir, said)
        thread.start()
        try:
            await rig.all_back(90)
            yield rig
        finally:
            for proxy in proxies.values():
                await proxy.heal()
            await asyncio.to_thread(thread.stop)
    finally:
        for proxy in proxies.values():
            await proxy.close()


async def _provision(settings: Settings, names: Sequence[str]) -> list[DemoCredentials]:
    await provision.migrate(settings)
    await provision.apply_topology(settings)
    keys.init(settings.data_dir)
    tag = secrets.token_hex(3)
    pepper = keys.pepper(settings)
    return [await provision.create_upstream(settings, TenantScope(f"{name}-{tag}"), name, pepper) for name in names]


def _roles(settings: Settings, directory: Path, used: set[int]) -> tuple[list[RoleSpec], dict[str, int]]:
    """Every role but control, armed, some of them twice; and the port on which each shows that it is at work."""
    specs, ports = [], {}
    for spec in local.roles(0):
        if spec.name == "control":
            continue
        for name in (f"{spec.name}-1", f"{spec.name}-2") if spec.name in _TWICE else (spec.name,):
            ports[name] = settings.http_port if spec.name == "gateway" else _port(used)
            specs.append(_armed(replace(spec, name=name), directory, ports[name]))
    return specs, ports


def _armed(spec: RoleSpec, directory: Path, port: int) -> RoleSpec:
    """The role with another module in front; the variables are the process's own."""
    words = spec.argv[spec.argv.index("deploy.role") + 1 : -1]
    variables = ((ARM_FILE, str(directory / "arm" / f"{spec.name}.arm")), (FIRED_FILE, str(directory / "fired.jsonl")))
    argv = (sys.executable, "-m", "tests.faults.armed", *words, str(port))
    return replace(spec, argv=argv, variables=variables)


def _fleet(settings: Settings, specs: Sequence[RoleSpec], native: NativeServers, said: list[str]) -> Fleet:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RISKFLEET_")}
    return Fleet(
        specs,
        kept | environment_of(settings) | {"PYTHONPATH": str(ROOT)},
        settings.data_dir / "logs",
        said.append,
        on_tick=native.ensure_alive,
        # Deaths are what this is about: whoever dies is back at once, as under a supervisor with other machines.
        backoff=BackoffPolicy(first_s=0.05, factor=1.0),
    )


@contextmanager
def own_servers(directory: Path) -> Iterator[NativeServers]:
    """Private servers below a directory that is removed at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o711)
    native = NativeServers(directory)
    try:
        native.start()
        yield native
    finally:
        native.stop()
        shutil.rmtree(directory, ignore_errors=True)


def superuser_url(urls: ServerUrls, servers_dir: Path) -> str:
    """PostgreSQL as its superuser, who makes the observer's role."""
    password = Record(servers_dir / "servers.json").secret("postgresql_superuser")
    return _rewritten(urls.database, netloc=f"postgres:{password}@{urlsplit(urls.database).netloc.rpartition('@')[2]}")


def cut_tail(directory: Path, share: float = 0.02) -> int:
    """Cut the end off a dead Redis's append-only file, as a machine does that loses power; answers the bytes."""
    files = sorted(directory.glob("*.incr.aof"), key=lambda file: file.stat().st_mtime)
    if not files:
        return 0
    size = files[-1].stat().st_size
    cut = min(int(size * share) + 1_000, size // 2)
    os.truncate(files[-1], size - cut)
    return cut


def _through(url: str, proxy: FaultProxy) -> str:
    login, at, _ = urlsplit(url).netloc.rpartition("@")
    return _rewritten(url, netloc=f"{login}{at}127.0.0.1:{proxy.port}")


def _rewritten(url: str, **parts: Any) -> str:
    return urlunsplit(urlsplit(url)._replace(**parts))


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def _port(used: set[int]) -> int:
    port = free_port(used)
    used.add(port)
    return port


async def _listens(port: int) -> bool:
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection("127.0.0.1", port, family=socket.AF_INET)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True

"""Redis: the current version, lock and stored output of each event, and the heartbeats of processes.

Every change is one Lua script, and every script may be repeated: the lock token is the command's id.
Promises fencing by token equality: after a takeover, or after FLUSHALL, the old holder's `advance`
answers False. Does not promise durability: PostgreSQL and the messages carry what Redis forgets.

A state is a hash: v version · d digest · b body digest · s stored bytes · o output · l lock token ·
u lease end (ms, server's clock) · h holder's boot id · w whole trail owed · k token of the last advance ·
t status of a final version.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import redis.asyncio as aioredis
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from contracts.codec import Entry
from contracts.failures import StateStoreError
from contracts.lifecycle import FINAL_VERSION, VERSION_OF
from contracts.ports import (
    Advance,
    Claim,
    ClaimRequest,
    ClaimVerdict,
    Held,
    Peek,
    Reservation,
    Reserved,
)
from contracts.tenancy import TenantScope

_STATUS_OF_VERSION = {version: status for status, version in VERSION_OF.items() if version < FINAL_VERSION}


@dataclass(frozen=True, slots=True)
class StatePolicy:
    """Times of the state store: lease (ms), state and tombstone lifetimes (s), heartbeat lifetime (s)."""

    lease_ms: int = 10_000
    state_ttl_s: int = 7 * 86_400
    tombstone_ttl_s: int = 86_400
    heartbeat_ttl_s: int = 6


def connect(url: str, *, timeout_s: float = 2.0, connections: int = 32) -> aioredis.Redis:
    """A client with short timeouts that never repeats a command by itself; nothing is connected yet."""
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return aioredis.Redis(connection_pool=pool)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """Translate what the client raises into StateStoreError, once."""
    try:
        yield
    except (redis.exceptions.RedisError, OSError, TimeoutError, RuntimeError) as error:
        # RuntimeError is uvloop's word for a transport whose peer reset it while it lay in the pool.
        raise StateStoreError(
            f"Redis does not answer ({type(error).__name__}); is it up, and is REDIS_URL right?"
        ) from error


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


class RedisStateStore:
    """StateStore on one Redis or Valkey server (7.0 or later). `boot` names this process."""

    def __init__(self, client: aioredis.Redis, boot: str, policy: StatePolicy | None = None) -> None:
        """Loads the scripts' texts; connects on first use."""
        self._client = client
        self._boot = boot
        self._policy = policy or StatePolicy()
        scripts = files("resilience") / "scripts"
        self._scripts = {
            name: client.register_script((scripts / f"{name}.lua").read_text())
            for name in ("reserve", "claim", "advance", "release")
        }

    async def _run(self, name: str, keys: Sequence[str], args: Iterable[Any]) -> Any:
        async with _translated():
            return await self._scripts[name](keys=keys, args=list(args))

    async def reserve(self, entries: Sequence[Entry]) -> Sequence[Reservation]:
        """Store version 0 of each entry unless its identity is known."""
        keys = [e.header.scope.state_key(e.header.event) for e in entries]
        args: list[Any] = [self._policy.state_ttl_s]
        for entry in entries:
            args += (entry.header.digest, entry.header.body_digest, entry.body)
        rows = await self._run("reserve", keys, args)
        return [Reservation(Reserved(_text(verdict)), version, stored or None) for verdict, version, stored in rows]

    async def claim(self, requests: Sequence[ClaimRequest], token: str) -> Sequence[Claim]:
        """One script call for the whole sequence; see the claim table in docs/protocol.md."""
        keys = [r.entry.header.scope.state_key(r.entry.header.event) for r in requests]
        p = self._policy
        args: list[Any] = [token, p.lease_ms, self._boot, p.state_ttl_s]
        for request in requests:
            h = request.entry.header
            args += (h.n, h.digest, h.body_digest, int(request.install_absent), request.entry.body)
        rows = await self._run("claim", keys, args)
        return [_claim(token, request, row) for request, row in zip(requests, rows, strict=True)]

    async def advance(self, moves: Sequence[Advance]) -> Sequence[bool]:
        """One script call; False where the lock is no longer this token's."""
        keys = [m.scope.state_key(m.event_id) for m in moves]
        args: list[Any] = [self._policy.state_ttl_s, self._policy.tombstone_ttl_s]
        for m in moves:
            args += (m.token, m.expected_version, m.expected_digest, m.version, m.digest, m.body_digest)
            args += (m.stored, m.output, int(m.tombstone), m.status)
        return [row == 1 for row in await self._run("advance", keys, args)]

    async def release(self, held: Sequence[Held]) -> None:
        """Give locks back without advancing."""
        if held:
            await self._run("release", [h.scope.state_key(h.event_id) for h in held], [h.token for h in held])

    async def peek(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[Peek | None]:
        """Read versions without claiming, in one round trip."""
        async with _translated(), self._client.pipeline(transaction=False) as pipe:
            for scope, event_id in keys:
                pipe.hmget(scope.state_key(event_id), ["v", "b", "s", "h", "t"])
            rows = await pipe.execute()
        return [
            None
            if version is None
            else Peek(int(version), status_of(int(version), _text(status)), _text(body), stored, _text(holder))
            for version, body, stored, holder, status in rows
        ]

    async def beat(self) -> None:
        """Say that this process is alive."""
        async with _translated():
            await self._client.set(_heartbeat_key(self._boot), b"1", ex=self._policy.heartbeat_ttl_s)

    async def alive(self, boots: Sequence[str]) -> Sequence[bool]:
        """Whether each process beats; a process of this host is also looked up, since a beat outlives a kill."""
        async with _translated(), self._client.pipeline(transaction=False) as pipe:
            for boot in boots:
                pipe.exists(_heartbeat_key(boot))
            beats = await pipe.execute()
        return [bool(beat) and _may_run(boot, self._boot) for boot, beat in zip(boots, beats, strict=True)]

    async def begin_alone(self, scope: TenantScope, event_id: str, stage: str) -> int:
        """Note that this process runs a suspect alone; answers how many holders died doing so."""
        key = scope.suspect_key(event_id, stage)
        async with _translated():
            holder = _text(await self._client.hget(key, "h"))
        died = bool(holder) and holder != self._boot and not (await self.alive([holder]))[0]
        async with _translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.hincrby(key, "c", 1 if died else 0)
            pipe.hset(key, "h", self._boot)
            pipe.expire(key, self._policy.state_ttl_s)
            return int((await pipe.execute())[0])

    async def end_alone(self, scope: TenantScope, event_id: str, stage: str) -> None:
        """The suspect settled."""
        async with _translated():
            await self._client.delete(scope.suspect_key(event_id, stage))

    async def ping(self) -> None:
        """One round trip; raises StateStoreError."""
        async with _translated():
            await self._client.ping()

    async def eviction_policy(self) -> str:
        """`maxmemory-policy` of the server; anything but noeviction would lose state silently."""
        async with _translated():
            return _text((await self._client.config_get("maxmemory-policy")).get("maxmemory-policy"))

    async def version(self) -> str:
        """The server's version."""
        async with _translated():
            return str((await self._client.info("server"))["redis_version"])

    async def script_round_trip_ms(self) -> float:
        """Run a script over a key that does not exist; returns how long it took (ms)."""
        began = asyncio.get_running_loop().time()
        await self._run("release", ["rf:{s0000}:doctor"], ["-"])
        return (asyncio.get_running_loop().time() - began) * 1000

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()


def _claim(token: str, request: ClaimRequest, row: Sequence[Any]) -> Claim:
    verdict, version, stored, output, owes, lease_ms, holder = row
    kind = ClaimVerdict(_text(verdict))
    if kind in (ClaimVerdict.GO, ClaimVerdict.INSTALLED):
        stored = request.entry.body
    return Claim(kind, token, version, stored or None, output or None, owes == 1, lease_ms, _text(holder))


def status_of(version: int, final: str) -> str:
    """The status of a stored version: the version tells it until it is final, then `advance` was told.

    "" for a final version that was advanced without a status: the ledger has it.
    """
    return final if version >= FINAL_VERSION else _STATUS_OF_VERSION[version]


def _heartbeat_key(boot: str) -> str:
    return f"rf:hb:{boot}"


def new_boot_id(token: str) -> str:
    """The id of this process: host, pid and a random token."""
    return f"{socket.gethostname()}:{os.getpid()}:{token[:12]}"


def _may_run(boot: str, mine: str) -> bool:
    """False when `boot` is a process of this host that is certainly gone."""
    host, pid, _ = (*boot.split(":"), "", "")[:3]
    if boot == mine or host != socket.gethostname() or not pid.isdigit():
        return True
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

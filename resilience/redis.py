"""Redis: the current version, lock and stored output of each event, heartbeats of processes, and tenants' rates.

Every change is one Lua script, and every script may be repeated: the lock token is the command's id.
Promises fencing by token equality: after a takeover, or after FLUSHALL, the old holder's `advance`
answers False. Does not promise durability: PostgreSQL and the messages carry what Redis forgets.

A state is a hash: v version · d digest · b body digest · s stored bytes · o output · l lock token ·
u lease end (ms, server's clock) · h holder's boot id · w whole trail owed · k token of the last advance ·
t status of a final version · g the event left the backlog.

Backlog: a sorted set per tenant and stage holds the ids of the events whose state is at that stage's version, unless it
has `g`. Sets are a tenant's own because a script may touch one cluster slot only and a tenant has one, and because a
tenant's undecided events are then the sum of its four sets: no fifth to keep in step. Readers add them up.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from typing import Any

import hiredis
import redis.asyncio as aioredis
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript

from contracts.codec import Entry
from contracts.failures import StateStoreError
from contracts.lifecycle import FINAL_VERSION, VERSION_OF
from contracts.limits import NO_LIMITS, TenantLimits
from contracts.ports import (
    Advance,
    Claim,
    ClaimRequest,
    ClaimVerdict,
    Held,
    Leaving,
    Peek,
    Reservation,
    Reserved,
    StageBacklog,
)
from contracts.tenancy import TenantScope
from contracts.topology import STAGES

_STATUS_OF_VERSION = {version: status for status, version in VERSION_OF.items() if version < FINAL_VERSION}


@dataclass(frozen=True, slots=True)
class StatePolicy:
    """Times of the state store: lease (ms), state and tombstone lifetimes (s), heartbeat lifetime (s)."""

    lease_ms: int = 10_000
    state_ttl_s: int = 7 * 86_400
    tombstone_ttl_s: int = 86_400
    heartbeat_ttl_s: int = 6


class _Connection(aioredis.Connection):
    """Commands are packed in C: the asyncio client packs in Python, argument by argument, and a script has many.

    A URL of another scheme (rediss://, unix://) names its own class, and is packed in Python.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        """The bytes of one command; its name may be of several words."""
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        return [hiredis.pack_command((*name.split(), *args[1:]))]


def connect(url: str, *, timeout_s: float = 2.0, connections: int = 32) -> aioredis.Redis:
    """A client with short timeouts that never repeats a command by itself; nothing is connected yet."""
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        connection_class=_Connection,
        max_connections=connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return aioredis.Redis(connection_pool=pool)


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Translate what the client raises into StateStoreError, once."""
    try:
        yield
    except (redis.exceptions.RedisError, OSError, TimeoutError, RuntimeError) as error:
        # RuntimeError is uvloop's word for a transport whose peer reset it while it lay in the pool.
        raise StateStoreError(
            f"Redis does not answer ({type(error).__name__}); is it up, and is REDIS_URL right?"
        ) from error


Client = aioredis.Redis
Script = AsyncScript


def register(client: Client, text: str) -> Script:
    """A script of this text; nothing is sent yet."""
    return client.register_script(text)


async def run_all(client: Client, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
    """Run a script with each (keys, arguments), in one round trip; one that may be repeated.

    A server that does not know it yet is told it, and asked again.
    """
    async with translated():
        answers = await _evaluate(client, script, calls)
        if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
            await client.script_load(script.script)
            answers = await _evaluate(client, script, calls)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


async def _evaluate(client: Client, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
    async with client.pipeline(transaction=False) as pipe:
        for keys, args in calls:
            pipe.evalsha(script.sha, len(keys), *keys, *args)
        return list(await pipe.execute(raise_on_error=False))


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
        before = {
            "reserve": ("backlog", "limit"),
            "claim": ("backlog",),
            "advance": ("backlog",),
            "release": ("backlog",),
        }
        self._scripts = {
            name: client.register_script("".join((scripts / f"{part}.lua").read_text() for part in (*parts, name)))
            for name, parts in before.items()
        }

    async def _run(self, name: str, keys: Sequence[str], args: Iterable[Any]) -> Any:
        async with translated():
            return await self._scripts[name](keys=keys, args=list(args))

    async def reserve(self, entries: Sequence[Entry], limits: Sequence[TenantLimits] = ()) -> Sequence[Reservation]:
        """Store version 0 of each entry unless its identity is known, or its tenant is at a limit."""
        tenants = _Tenants()
        keys: list[str] = []
        args: list[Any] = [len(entries), self._policy.state_ttl_s]
        for entry in entries:
            h = entry.header
            keys.append(h.scope.state_key(h.event))
            args += (tenants.place(h.scope), h.received_ms, h.digest, h.body_digest, entry.body)
        allowed = {e.header.scope: limit for e, limit in zip(entries, limits, strict=bool(limits))}
        for scope in tenants.places:
            limit = allowed.get(scope, NO_LIMITS)
            undecided, rate = limit.undecided_events, limit.rate
            args += (
                "" if undecided is None else undecided,
                *(("", "") if rate is None else (rate.interval_us, rate.span_us)),
            )
        rates = [scope.limit_key("submit") for scope in tenants.places]
        rows = await self._run("reserve", keys + tenants.keys() + rates, args)
        return [Reservation(Reserved(_text(verdict)), n, stored or None, wait) for verdict, n, stored, wait in rows]

    async def claim(self, requests: Sequence[ClaimRequest], token: str) -> Sequence[Claim]:
        """One script call for the whole sequence; see the claim table in docs/protocol.md."""
        p, tenants = self._policy, _Tenants()
        keys: list[str] = []
        args: list[Any] = [len(requests), token, p.lease_ms, self._boot, p.state_ttl_s]
        for request in requests:
            h, scope = request.entry.header, request.entry.header.scope
            keys.append(scope.state_key(h.event))
            args += (tenants.place(scope), h.received_ms, h.n, h.digest, h.body_digest)
            args += (int(request.install_absent), request.entry.body)
        rows = await self._run("claim", keys + tenants.keys(), args)
        return [_claim(token, request, row) for request, row in zip(requests, rows, strict=True)]

    async def advance(self, moves: Sequence[Advance]) -> Sequence[bool]:
        """One script call; False where the lock is no longer this token's."""
        tenants = _Tenants()
        keys = [m.scope.state_key(m.event_id) for m in moves]
        args: list[Any] = [len(moves), self._policy.state_ttl_s, self._policy.tombstone_ttl_s]
        for m in moves:
            args += (tenants.place(m.scope), m.received_ms)
            args += (m.token, m.expected_version, m.expected_digest, m.version, m.digest, m.body_digest)
            args += (m.stored, m.output, int(m.tombstone), m.status)
        return [row == 1 for row in await self._run("advance", keys + tenants.keys(), args)]

    async def release(self, held: Sequence[Held], leaving: Sequence[Leaving] = ()) -> None:
        """Give locks back without advancing, and take events off the backlog."""
        if not held and not leaving:
            return
        tenants = _Tenants()
        keys = [one.scope.state_key(one.event_id) for one in held]
        keys += [one.scope.state_key(one.event_id) for one in leaving]
        args: list[Any] = [len(held), len(leaving), *(one.token for one in held)]
        for left in leaving:
            args += (tenants.place(left.scope), left.n, left.body_digest)
        await self._run("release", keys + tenants.keys(), args)

    async def backlog(self, scopes: Sequence[TenantScope], now: datetime) -> Sequence[StageBacklog]:
        """One per stage, in one round trip; also drops what outlived its state."""
        async with translated(), self._client.pipeline(transaction=False) as pipe:
            for n, stage in enumerate(STAGES):
                pipe.exists(_whole_key(stage))
                for scope in scopes:
                    pipe.zremrangebyscore(f"{scope.backlog_key}:{n}", "-inf", f"({self._dead_ms(now)}")
                    pipe.zcard(f"{scope.backlog_key}:{n}")
                    pipe.zrange(f"{scope.backlog_key}:{n}", 0, 0, withscores=True)
                    pipe.hmget(f"{scope.backlog_key}:c", [f"c{n}", f"a{n}"])
            rows = iter(await pipe.execute())
        found = []
        for _ in STAGES:
            whole, events, oldest, claimed, advanced = next(rows) == 1, 0, [], 0, 0
            for _ in scopes:
                _, count, first, attempts = next(rows), next(rows), next(rows), next(rows)
                events += count
                oldest += [int(score) for _, score in first]
                claimed, advanced = claimed + int(attempts[0] or 0), advanced + int(attempts[1] or 0)
            found.append(StageBacklog(events, min(oldest, default=None), whole, claimed, advanced))
        return found

    async def undecided(self, scopes: Sequence[TenantScope], now: datetime) -> Sequence[int]:
        """Events of each tenant at any stage, in one round trip."""
        async with translated(), self._client.pipeline(transaction=False) as pipe:
            for scope in scopes:
                for n in range(len(STAGES)):
                    pipe.zcount(f"{scope.backlog_key}:{n}", self._dead_ms(now), "+inf")
            counts = await pipe.execute()
        return [sum(counts[i : i + len(STAGES)]) for i in range(0, len(counts), len(STAGES))]

    async def trust(self, stages: Sequence[str]) -> None:
        """Say that everything which waits for these stages is counted now."""
        if stages:
            async with translated():
                await self._client.mset({_whole_key(stage): b"1" for stage in stages})

    def _dead_ms(self, now: datetime) -> int:
        """Received before this (ms since 1970): counted no more, whatever is left of its state."""
        return round(now.timestamp() * 1000) - self._policy.state_ttl_s * 1000

    async def peek(self, keys: Sequence[tuple[TenantScope, str]]) -> Sequence[Peek | None]:
        """Read versions without claiming, in one round trip."""
        async with translated(), self._client.pipeline(transaction=False) as pipe:
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
        async with translated():
            await self._client.set(_heartbeat_key(self._boot), b"1", ex=self._policy.heartbeat_ttl_s)

    async def alive(self, boots: Sequence[str]) -> Sequence[bool]:
        """Whether each process beats; a process of this host is also looked up, since a beat outlives a kill."""
        async with translated(), self._client.pipeline(transaction=False) as pipe:
            for boot in boots:
                pipe.exists(_heartbeat_key(boot))
            beats = await pipe.execute()
        return [bool(beat) and _may_run(boot, self._boot) for boot, beat in zip(boots, beats, strict=True)]

    async def begin_alone(self, scope: TenantScope, event_id: str, stage: str) -> int:
        """Note that this process runs a suspect alone; answers how many holders died doing so."""
        key = scope.suspect_key(event_id, stage)
        async with translated():
            holder = _text(await self._client.hget(key, "h"))
        died = bool(holder) and holder != self._boot and not (await self.alive([holder]))[0]
        async with translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.hincrby(key, "c", 1 if died else 0)
            pipe.hset(key, "h", self._boot)
            pipe.expire(key, self._policy.state_ttl_s)
            return int((await pipe.execute())[0])

    async def end_alone(self, scope: TenantScope, event_id: str, stage: str) -> None:
        """The suspect settled."""
        async with translated():
            await self._client.delete(scope.suspect_key(event_id, stage))

    async def ping(self) -> None:
        """One round trip; raises StateStoreError."""
        async with translated():
            await self._client.ping()

    async def eviction_policy(self) -> str:
        """`maxmemory-policy` of the server; anything but noeviction would lose state silently."""
        async with translated():
            return _text((await self._client.config_get("maxmemory-policy")).get("maxmemory-policy"))

    async def version(self) -> str:
        """The server's version."""
        async with translated():
            return str((await self._client.info("server"))["redis_version"])

    async def memory_bytes(self) -> int:
        """`used_memory` of the server."""
        async with translated():
            return int((await self._client.info("memory"))["used_memory"])

    async def script_round_trip_ms(self) -> float:
        """Run a script over a key that does not exist; returns how long it took (ms)."""
        began = asyncio.get_running_loop().time()
        await self._run("release", ["rf:{s0000}:doctor"], [1, 0, "-"])
        return (asyncio.get_running_loop().time() - began) * 1000

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()


@dataclass(slots=True)
class _Tenants:
    """The tenants of one script call, each with its place from 1 on: their backlogs are the call's last keys."""

    places: dict[TenantScope, int] = field(default_factory=dict)

    def place(self, scope: TenantScope) -> int:
        return self.places.setdefault(scope, len(self.places) + 1)

    def keys(self) -> list[str]:
        return [scope.backlog_key for scope in self.places]


def _whole_key(stage: str) -> str:
    return f"rf:whole:{stage}"


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

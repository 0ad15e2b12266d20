"""The limiter's promises, of the twin and of Redis: the same answers to the same questions at the same moments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from contracts.failures import StateStoreError
from contracts.telemetry import Measurement
from contracts.tenancy import TenantScope
from deploy.servers import ServerUrls
from resilience.limiter import Allowance, Limiter, RateLimit, Take
from resilience.memory import MemoryLimiter, SteppingClock
from resilience.redis import RedisLimiter, connect
from tests.conformance.conftest import DATABASE, wire_to

pytestmark = pytest.mark.conformance

ACME, GLOBEX, INITECH = (TenantScope(name) for name in ("acme", "globex", "initech"))
SLOW = RateLimit(0.001, 5)
"""So slow that nothing is earned while a test runs."""


@dataclass
class Limiters:
    """Limiters of several processes on one server; `wait` lets so many milliseconds of its time pass."""

    make: Callable[[], Limiter]
    wait: Callable[[int], Awaitable[None]]
    seen: list[Measurement]


@pytest.fixture(
    params=[
        "twin",
        pytest.param("redis", marks=pytest.mark.integration),
        pytest.param("redis, a call per slot", marks=pytest.mark.integration),
    ]
)
async def limiters(request: pytest.FixtureRequest) -> AsyncIterator[Limiters]:
    seen: list[Measurement] = []
    if request.param == "twin":
        clock = SteppingClock()
        one = MemoryLimiter(clock, seen.append)

        async def step(milliseconds: int) -> None:
            clock.step(milliseconds / 1000)

        yield Limiters(lambda: one, step, seen)
        return
    url: str = request.getfixturevalue("servers").redis
    async with wire_to(url) as wire:
        client = connect(wire.url(url, f"/{DATABASE}"))
        await client.flushdb()

        async def wait(milliseconds: int) -> None:
            # The server keeps the time: its clock says when it passed.
            until = await _microseconds() + milliseconds * 1000
            async with asyncio.timeout(5 + milliseconds / 1000):
                while await _microseconds() < until:  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(0.002)

        async def _microseconds() -> int:
            seconds, micros = await client.time()
            return int(seconds) * 1_000_000 + int(micros)

        per_slot = "slot" in request.param
        yield Limiters(lambda: RedisLimiter(client, seen.append, per_slot=per_slot), wait, seen)
        await client.flushdb()
        await client.aclose()
        await client.connection_pool.disconnect()


async def test_a_burst_passes_and_what_is_beyond_is_told_when_to_come_again(limiters: Limiters) -> None:
    (first, *_, last) = await limiters.make().take([Take(ACME, "submit", SLOW)] * 6)
    assert first == Allowance(allowed=True, retry_after_ms=0, remaining=4)
    assert (last.allowed, last.remaining) == (False, 0)
    assert 990_000 <= last.retry_after_ms <= 1_000_000


async def test_one_call_serves_many_tenants_and_keeps_them_apart(limiters: Limiters) -> None:
    takes = [Take(scope, "submit", SLOW, cost) for cost in (4, 1, 1) for scope in (ACME, GLOBEX, INITECH)]
    answers = await limiters.make().take(takes)
    assert [one.allowed for one in answers] == [True] * 6 + [False] * 3
    assert [one.remaining for one in answers] == [1] * 3 + [0] * 6
    assert [one.labels["tenant"] for one in limiters.seen] == ["acme", "globex", "initech"]


async def test_limits_of_one_tenant_do_not_touch_each_other(limiters: Limiters) -> None:
    limiter = limiters.make()
    assert [
        one.allowed for one in await limiter.take([Take(ACME, "submit", SLOW, 5), Take(ACME, "simulate", SLOW)])
    ] == [
        True,
        True,
    ]


async def test_a_refused_take_costs_nothing(limiters: Limiters) -> None:
    limiter = limiters.make()
    answers = await limiter.take([Take(ACME, "x", SLOW, 3), Take(ACME, "x", SLOW, 3), Take(ACME, "x", SLOW, 2)])
    assert [one.allowed for one in answers] == [True, False, True]


async def test_processes_share_a_limit(limiters: Limiters) -> None:
    answers = await asyncio.gather(*(limiters.make().take([Take(ACME, "x", SLOW)]) for _ in range(12)))
    assert sum(one.allowed for (one,) in answers) == 5


async def test_what_was_told_is_kept_and_not_before(limiters: Limiters) -> None:
    limiter, limit = limiters.make(), RateLimit(5, 2)
    assert all(one.allowed for one in await limiter.take([Take(ACME, "x", limit)] * 2))
    (refused,) = await limiter.take([Take(ACME, "x", limit)])
    assert not refused.allowed
    assert 1 <= refused.retry_after_ms <= 200
    await limiters.wait(refused.retry_after_ms)
    first, second = await limiter.take([Take(ACME, "x", limit)] * 2)
    assert (first.allowed, second.allowed) == (True, False)


async def test_a_whole_burst_is_earned_again_in_its_time_and_no_more(limiters: Limiters) -> None:
    limiter, limit = limiters.make(), RateLimit(50, 5)
    await limiter.take([Take(ACME, "x", limit, 5)])
    await limiters.wait(250)
    (answer,) = await limiter.take([Take(ACME, "x", limit)])
    assert answer == Allowance(allowed=True, retry_after_ms=0, remaining=4)


async def test_no_question_has_no_answer(limiters: Limiters) -> None:
    assert list(await limiters.make().take([])) == []


@pytest.mark.integration
async def test_a_lost_answer_is_an_error_and_was_counted(servers: ServerUrls) -> None:
    url = servers.redis
    async with wire_to(url) as wire:
        client, direct = (
            connect(wire.url(url, f"/{DATABASE}"), timeout_s=0.5),
            connect(url.rsplit("/", 1)[0] + f"/{DATABASE}"),
        )
        await direct.flushdb()
        limiter = RedisLimiter(client)
        await limiter.take([Take(ACME, "x", SLOW)])
        wire.swallow = 1
        with pytest.raises(StateStoreError):
            await limiter.take([Take(ACME, "x", SLOW)])
        (answer,) = await RedisLimiter(direct).take([Take(ACME, "x", SLOW)])
        assert answer.remaining == 2
        assert await direct.keys("*") == [ACME.limit_key("x").encode()]
        assert 0 < await direct.pttl(ACME.limit_key("x")) <= 3 * 1_000_000
        await direct.flushdb()
        for one in (client, direct):
            await one.aclose()
            await one.connection_pool.disconnect()

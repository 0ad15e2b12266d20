"""The fault proxy does what it says, on real sockets: a nemesis that does not hurt proves nothing."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop

from tests.faults.proxy import CALM, ConfirmReader, FaultProxy, Way, Weather

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def behind(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = echo, *, confirms: bool = False
) -> AsyncIterator[FaultProxy]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], confirms=confirms)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        server.close()


async def client(proxy: FaultProxy) -> Streams:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def say(streams: Streams, data: bytes) -> bytes:
    reader, writer = streams
    writer.write(data)
    await writer.drain()
    async with asyncio.timeout(5):
        return await reader.readexactly(len(data))


async def silence(reader: asyncio.StreamReader, seconds: float = 0.15) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await reader.read(1) == b""
    except TimeoutError:
        return True


async def dead(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        try:
            return await reader.read(1) == b""
        except ConnectionError:
            return True


async def test_in_good_weather_every_byte_comes_through_in_order() -> None:
    async with behind() as proxy:
        streams = await client(proxy)
        data = bytes(range(256)) * 16_384  # 4 MiB: more than any buffer on the way
        reader, writer = streams

        async def send() -> None:
            writer.write(data)
            await writer.drain()

        sending = asyncio.create_task(send())
        async with asyncio.timeout(10):
            assert await reader.readexactly(len(data)) == data
        await sending
        assert (proxy.tally.connections, proxy.tally.swallowed) == (1, 0)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_many_clients_that_speak_at_once_are_all_heard(run: Callable[[Any], None]) -> None:
    async def one(proxy: FaultProxy, number: int) -> None:
        streams = await client(proxy)
        for _ in range(5):
            assert await say(streams, b"x" * (100 + number)) == b"x" * (100 + number)
        streams[1].close()

    async def all_of_them() -> None:
        async with behind() as proxy:
            await asyncio.gather(*(one(proxy, number) for number in range(100)))

    run(all_of_them())


async def test_the_end_of_one_side_reaches_the_other() -> None:
    async with behind() as proxy:
        reader, writer = await client(proxy)
        await say((reader, writer), b"x")
        writer.write_eof()
        assert await dead(reader)
        writer.close()


async def test_latency_delays_both_ways_and_keeps_the_order() -> None:
    async with behind() as proxy:
        streams = await client(proxy)
        await say(streams, b"warm")
        await proxy.set(Weather(latency_s=0.1))
        began = time.monotonic()
        assert await say(streams, b"one") == b"one"
        assert time.monotonic() - began >= 0.2
        await proxy.heal()
        began = time.monotonic()
        assert await say(streams, b"two") == b"two"
        assert time.monotonic() - began < 0.2


async def test_throttling_bounds_the_bytes_of_a_second() -> None:
    async with behind() as proxy:
        streams = await client(proxy)
        await proxy.set(Weather(bytes_per_s=100_000))
        began = time.monotonic()
        await say(streams, b"x" * 10_000)
        assert time.monotonic() - began >= 0.2  # 0.1 s each way


async def test_a_reset_is_a_reset_and_new_connections_work() -> None:
    async with behind() as proxy:
        reader, writer = await client(proxy)
        await say((reader, writer), b"x")
        assert proxy.reset() == 1
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        assert await say(await client(proxy), b"y") == b"y"
        assert proxy.connections == 1


async def test_only_the_connections_of_the_given_ports_are_reset() -> None:
    async with behind() as proxy:
        first, second = await client(proxy), await client(proxy)
        for streams in (first, second):
            await say(streams, b"x")
        port = first[1].get_extra_info("sockname")[1]
        assert proxy.reset({port}) == 1
        assert await dead(first[0])
        assert await say(second, b"y") == b"y"


@pytest.mark.parametrize("way", list(Way))
async def test_a_half_open_connection_looks_alive_until_it_is_healed_by_a_reset(way: Way) -> None:
    heard: list[bytes] = []

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(100):
                heard.append(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async with behind(answering) as proxy:
        reader, writer = await client(proxy)
        await say((reader, writer), b"1")
        await proxy.set(Weather(swallow=frozenset({way})))
        writer.write(b"2")
        await writer.drain()
        assert await silence(reader)
        assert heard == ([b"1"] if way is Way.UP else [b"1", b"2"])
        assert proxy.tally.swallowed == 1
        await proxy.heal()
        assert await dead(reader)


async def test_a_refused_port_refuses_and_opens_again() -> None:
    async with behind() as proxy:
        streams = await client(proxy)
        await say(streams, b"x")
        await proxy.set(Weather(refuse=True))
        with pytest.raises(ConnectionRefusedError):
            await client(proxy)
        assert await say(streams, b"y") == b"y"
        await proxy.set(CALM)
        assert await say(await client(proxy), b"z") == b"z"


async def test_a_server_that_is_down_is_a_reset_for_its_client() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    proxy = FaultProxy("127.0.0.1", port)
    await proxy.start()
    try:
        reader, _ = await client(proxy)
        assert await dead(reader)
        assert proxy.tally.refused == 1
    finally:
        await proxy.close()


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


CONFIRM = frame(1, struct.pack(">HHQB", 60, 80, 7, 0))
OTHERS = frame(1, struct.pack(">HH", 60, 60) + b"deliver") + frame(8, b"") + frame(3, b"\x00\x3c\x00\x50" * 9)


def test_confirms_are_found_wherever_the_chunks_end() -> None:
    stream = OTHERS + CONFIRM + OTHERS + CONFIRM + CONFIRM + OTHERS
    for size in range(1, len(stream) + 1):
        reader, count = ConfirmReader(), 0
        for start in range(0, len(stream), size):
            count += len(reader.confirms(stream[start : start + size]))
        assert count == 3, f"in chunks of {size} bytes"
    assert ConfirmReader().confirms(stream)[0] == len(OTHERS)


async def test_the_cut_falls_exactly_between_a_publish_and_its_confirm() -> None:
    """The server got the publish and confirmed it; its client hears what came before the confirm, and no more."""
    published = asyncio.Event()

    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while await reader.read(100):
                published.set()
                writer.write(OTHERS + CONFIRM + OTHERS + CONFIRM)
                await writer.drain()
        writer.close()

    async with behind(broker, confirms=True) as proxy:
        reader, writer = await client(proxy)
        writer.write(b"publish")
        async with asyncio.timeout(5):
            calm = await reader.readexactly(2 * len(OTHERS + CONFIRM))
        assert calm == (OTHERS + CONFIRM) * 2
        await proxy.set(Weather(cut_confirms=True))
        published.clear()
        writer.write(b"publish")
        async with asyncio.timeout(5):
            await published.wait()
            assert await reader.readexactly(len(OTHERS)) == OTHERS
        assert await silence(reader)
        assert proxy.tally.confirms_lost == 2
        await proxy.heal()
        assert await dead(reader)

"""A TCP proxy that misbehaves on command, in front of RabbitMQ, Redis or PostgreSQL.

Promises: bytes are never reordered, changed or invented, only late, dropped from some moment on, or ended by a reset;
`heal` ends every fault for connections to come, and those whose bytes were dropped are reset, since no stream goes on
after a hole. With `confirms=True` it reads the server's AMQP frames, so that it can cut a connection exactly between a
publish and its confirm and count the confirms that the broker gave and nobody received. Knows no payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, cast

_HIGH_WATER: Final = 1 << 20
_RESET: Final = struct.pack("ii", 1, 0)
_BASIC_ACK: Final = b"\x00\x3c\x00\x50"
_FRAME_HEAD: Final = 7
_METHOD_HEAD: Final = 11


class Way(StrEnum):
    """The direction of bytes."""

    UP = "up"  # client to server
    DOWN = "down"  # server to client


@dataclass(frozen=True, slots=True)
class Weather:
    """What holds for every connection now: seconds of latency each way, bytes per second (0: no limit), ways that
    swallow, whether new connections are refused, and whether the next confirm ends its connection.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    swallow: frozenset[Way] = frozenset()
    refuse: bool = False
    cut_confirms: bool = False


CALM: Final = Weather()


class ConfirmReader:
    """Finds `basic.ack` frames in what an AMQP server sends: on a publisher's channel these are the confirms."""

    def __init__(self) -> None:
        self._skip = 0  # bytes of the current frame that are still to come
        self._head = b""  # the beginning of a frame, as long as it is shorter than a method's head

    def confirms(self, chunk: bytes) -> list[int]:
        """Where in this chunk each confirm begins; 0 for one that began in the chunk before."""
        found, place = [], 0
        while place < len(chunk):
            if self._skip:
                step = min(self._skip, len(chunk) - place)
                self._skip -= step
                place += step
                continue
            began = max(0, place - len(self._head))
            taken = chunk[place : place + _METHOD_HEAD - len(self._head)]
            self._head += taken
            place += len(taken)
            if len(self._head) < _METHOD_HEAD:
                short = len(self._head) >= _FRAME_HEAD and self._size() + 8 <= len(self._head)
                if not short:  # an empty frame (heartbeat) is shorter than a method's head
                    break
            size = self._size() + 8
            if self._head[:1] == b"\x01" and self._head[_FRAME_HEAD:_METHOD_HEAD] == _BASIC_ACK:
                found.append(began)
            beyond = len(self._head) - size
            self._skip, self._head = max(0, -beyond), b""
            place -= max(0, beyond)
        return found

    def _size(self) -> int:
        return int.from_bytes(self._head[3:_FRAME_HEAD], "big")


@dataclass(slots=True)
class Tally:
    """What a proxy did: connections taken and reset, bytes swallowed, and confirms that never came through."""

    connections: int = 0
    refused: int = 0
    resets: int = 0
    swallowed: int = 0
    confirms_lost: int = 0


class _Side(asyncio.Protocol):
    """One end of a connection: what it receives goes to the other end."""

    def __init__(self, link: _Link, way: Way) -> None:
        self._link, self._way = link, way

    def data_received(self, data: bytes) -> None:
        self._link.received(self._way, data)

    def pause_writing(self) -> None:
        self._link.flow(self._way, go=False)

    def resume_writing(self) -> None:
        self._link.flow(self._way, go=True)

    def eof_received(self) -> bool:
        self._link.ended(self._way)
        return True  # the other way may still have something to say

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.gone(self._way)


@dataclass(slots=True)
class _Lane:
    """One way of a connection: what waits in it because of latency or throttling."""

    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    held_bytes: int = 0
    task: asyncio.Task[None] | None = None
    ended: bool = False


class _Link:
    """A client's connection and the one to the server behind it."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self._ends: dict[Way, asyncio.Transport] = {}  # by the way that arrives *from* this end
        self._lanes = {way: _Lane() for way in Way}
        self._reader = ConfirmReader() if proxy.confirms else None
        self._early: list[bytes] | None = []  # what the client said before the server was reached
        self.port = 0
        self.damaged = False  # bytes of it were swallowed
        self.deaf = False  # cut at a confirm: nothing reaches the client any more

    def attach(self, way: Way, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(_HIGH_WATER)
        self._ends[way] = transport

    def received(self, way: Way, data: bytes) -> None:
        """Hand on, hold back or drop."""
        weather, tally = self._proxy.weather, self._proxy.tally
        if way is Way.DOWN and self._reader is not None:
            data = self._cut(data, self._reader.confirms(data))
        if way in weather.swallow:
            tally.swallowed += len(data)
            self.damaged = True
            return
        lane = self._lanes[way]
        if not data:
            return
        if lane.task is None and not weather.latency_s and not weather.bytes_per_s:
            self._write(way, data)
            return
        now = asyncio.get_running_loop().time()
        lane.waiting.append((now + weather.latency_s, data))
        lane.held_bytes += len(data)
        if lane.held_bytes > _HIGH_WATER:
            self._pause(way)
        if lane.task is None:
            lane.task = asyncio.create_task(self._release(way))

    def _cut(self, data: bytes, confirms: list[int]) -> bytes:
        """What still reaches the client of a chunk with confirms at these places."""
        weather, tally = self._proxy.weather, self._proxy.tally
        lost = self.deaf or Way.DOWN in weather.swallow
        if confirms and weather.cut_confirms and not lost:
            self.deaf = self.damaged = True
            tally.confirms_lost += len(confirms)
            tally.swallowed += len(data) - confirms[0]
            return data[: confirms[0]]
        if lost:
            tally.confirms_lost += len(confirms)
        if self.deaf:
            tally.swallowed += len(data)
            return b""
        return data

    async def _release(self, way: Way) -> None:
        """Hand on what waits, each when it is due; the weather may change meanwhile."""
        lane, loop = self._lanes[way], asyncio.get_running_loop()
        while lane.waiting:
            due, data = lane.waiting.popleft()
            await asyncio.sleep(max(0.0, due - loop.time()))
            rate = self._proxy.weather.bytes_per_s
            if rate:
                await asyncio.sleep(len(data) / rate)
            lane.held_bytes -= len(data)
            self._write(way, data)
            if lane.held_bytes < _HIGH_WATER // 2:
                self.flow(_other(way), go=True)
        lane.task = None
        if lane.ended:
            self._close_after(way)

    def _write(self, way: Way, data: bytes) -> None:
        other = self._ends.get(_other(way))
        if self._early is not None and way is Way.UP:
            self._early.append(data)
        elif other is not None and not other.is_closing():
            other.write(data)

    def reached(self, server: asyncio.Transport) -> None:
        """The server is connected: it gets what the client has said so far."""
        self.attach(Way.DOWN, server)
        early, self._early = self._early or [], None
        for data in early:
            server.write(data)

    def _pause(self, way: Way) -> None:
        with contextlib.suppress(RuntimeError):
            self._ends[way].pause_reading()

    def flow(self, way: Way, *, go: bool) -> None:
        """The end that bytes of the other way come out at has room again, or has none."""
        source = self._ends.get(_other(way))
        if source is None or source.is_closing():
            return
        with contextlib.suppress(RuntimeError):
            (source.resume_reading if go else source.pause_reading)()

    def ended(self, way: Way) -> None:
        lane = self._lanes[way]
        lane.ended = True
        if lane.task is None:
            self._close_after(way)

    def _close_after(self, way: Way) -> None:
        other = self._ends.get(_other(way))
        if other is not None and not other.is_closing() and way not in self._proxy.weather.swallow and not self.deaf:
            other.close()

    def gone(self, way: Way) -> None:
        """One end is closed: a swallowed stream's other end learns nothing of it until the connection is reset."""
        self._ends.pop(way, None)
        swallowing = way in self._proxy.weather.swallow or (way is Way.DOWN and self.deaf)
        if not swallowing and self._lanes[way].task is None:
            self._close_after(way)
        if not self._ends:
            self._proxy.forget(self)

    def reset(self) -> None:
        """End both ends by RST, as a router does that has forgotten the connection."""
        for lane in self._lanes.values():
            if lane.task is not None:
                lane.task.cancel()
        for end in list(self._ends.values()):
            raw = end.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.abort()
        self._proxy.forget(self)


class FaultProxy:
    """One proxy on a port of its own before one server. Single-threaded: its methods belong to its event loop."""

    def __init__(self, host: str, port: int, *, confirms: bool = False) -> None:
        """`host` and `port` are the server's; `confirms` for an AMQP server."""
        self._target = (host, port)
        self.confirms = confirms
        self.weather = CALM
        self.tally = Tally()
        self.port = 0
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._connecting: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> int:
        """Listen on 127.0.0.1 and answer the port."""
        self.port = port
        await self._listen()
        return self.port

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self) -> asyncio.Protocol:
        return _Client(self)

    def accepted(self, link: _Link, transport: asyncio.Transport) -> None:
        """A client came: reach the server for it."""
        self.tally.connections += 1
        self._links.add(link)
        link.port = transport.get_extra_info("peername")[1]
        task = asyncio.get_running_loop().create_task(self._reach(link, transport))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _reach(self, link: _Link, client: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        try:
            server, _ = await loop.create_connection(lambda: _Side(link, Way.DOWN), *self._target)
        except OSError:
            self.tally.refused += 1
            link.reset()
            return
        link.reached(server)
        if client.is_closing():
            link.reset()

    def forget(self, link: _Link) -> None:
        """A connection is over."""
        self._links.discard(link)

    async def set(self, weather: Weather) -> None:
        """Change the weather for every connection, old and new. Refusing closes the port itself."""
        before, self.weather = self.weather, weather
        if weather.refuse and self._server is not None:
            self._server.close()
            self._server = None
        if not weather.refuse and self._server is None:
            await self._listen()
        if before.swallow - weather.swallow or (before.cut_confirms and not weather.cut_confirms):
            for link in [link for link in self._links if link.damaged]:
                self.tally.resets += 1
                link.reset()

    async def heal(self) -> None:
        """Good weather; what lost bytes is reset."""
        await self.set(CALM)

    def reset(self, ports: Collection[int] | None = None) -> int:
        """Reset every connection, or those of clients with these local ports; answers how many."""
        links = [link for link in self._links if ports is None or link.port in ports]
        for link in links:
            self.tally.resets += 1
            link.reset()
        return len(links)

    @property
    def connections(self) -> int:
        """How many connections there are now."""
        return len(self._links)

    async def close(self) -> None:
        """Stop listening and reset what is left."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connecting):
            task.cancel()
        for link in list(self._links):
            link.reset()
        await asyncio.sleep(0)


class _Client(_Side):
    """The client's end, made before its connection to the server."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        super().__init__(_Link(proxy), Way.UP)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        client = cast("asyncio.Transport", transport)  # uvloop's own kind is none by birth
        self._link.attach(Way.UP, client)
        self._proxy.accepted(self._link, client)


def _other(way: Way) -> Way:
    return Way.DOWN if way is Way.UP else Way.UP

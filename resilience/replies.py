"""Who waits for a copy of which decision in one process: every Replies adapter without its transport."""

from __future__ import annotations

import asyncio


class ReplyBoard:
    """Waits by event id. A copy that nobody waits for is dropped; several who wait for one event all get it."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[bytes | None]]] = {}

    def wait(self, event_id: str, timeout_s: float) -> asyncio.Future[bytes | None]:
        """The next copy of this event's decision, None after `timeout_s` seconds; waiting begins with the call."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[bytes | None] = loop.create_future()
        timer = loop.call_later(timeout_s, _answer, reply, None)
        self._waiting.setdefault(event_id, set()).add(reply)

        def forget(_: object) -> None:
            timer.cancel()
            waiting = self._waiting.get(event_id, set())
            waiting.discard(reply)
            if not waiting:
                self._waiting.pop(event_id, None)

        reply.add_done_callback(forget)
        return reply

    def answer(self, event_id: str, body: bytes) -> None:
        """Hand a copy to everybody who waits for it."""
        for reply in tuple(self._waiting.get(event_id, ())):
            _answer(reply, body)

    def close(self) -> None:
        """Answer everybody who still waits with None."""
        for waiting in list(self._waiting.values()):
            for reply in tuple(waiting):
                _answer(reply, None)


def _answer(reply: asyncio.Future[bytes | None], body: bytes | None) -> None:
    if not reply.done():
        reply.set_result(body)

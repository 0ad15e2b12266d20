"""How a role ends: told by SIGTERM or SIGINT, it drains and leaves with code 0, whatever it is doing.

Promises: before a loop runs nothing is held, and the signal ends the process at once; while a role starts it is
cancelled and closes what it opened; a role that serves stops in its own order. What is stuck, in a handler or in a
server that hangs, is abandoned after `GRACE_S`: it was not acked, so the broker gives it again, and its locks end with
their lease. A role that fails leaves within `LEAVE_S` too, so that its supervisor starts it again: a client's task that
will not be cancelled must not keep a process that does nothing. Does not decide what to stop first: that is each role's
affair.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from contracts.failures import InfrastructureError

log = structlog.get_logger("role")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

GRACE_S: Final = 21.0
"""Seconds between the signal and the end of the process at the latest; below the grace of every supervisor of ours."""


LEAVE_S: Final = 8.0
"""Seconds between a role's failure and the end of its process at the latest."""


@dataclass(slots=True)
class _Ending:
    """`orderly`: the role serves, and listens to `stop` itself."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    orderly: bool = False


_ending: ContextVar[_Ending | None] = ContextVar("riskfleet_ending", default=None)


def end_at_once() -> None:
    """The first thing that a process does: until its role runs, a signal ends it with code 0."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))


async def until_told(role: Coroutine[Any, Any, None], grace_s: float = GRACE_S) -> None:
    """Run a role to its end, or until it is told to stop and has drained. Raises what it raised, unless it was told.

    A server that is away while a role drains is no failure: nothing was acked.
    """
    loop, ending = asyncio.get_running_loop(), _Ending()

    def told(*_: object) -> None:
        # Not the loop's own handler: this one comes through while a handler of ours blocks the loop.
        if not ending.stop.is_set():
            loop.call_soon_threadsafe(ending.stop.set)
            watchdog = threading.Timer(grace_s, _abandon)
            watchdog.daemon = True
            watchdog.start()

    for number in SIGNALS:
        signal.signal(number, told)
    _ending.set(ending)
    work, waiting = asyncio.ensure_future(role), asyncio.ensure_future(ending.stop.wait())
    await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not ending.orderly and not work.done():
        work.cancel()
    try:
        await work
    except asyncio.CancelledError:
        if not ending.stop.is_set():
            raise
    except InfrastructureError as error:
        if not ending.stop.is_set():
            raise
        log.warning("role.stopped_without_a_server", exception_class=type(error).__name__)
    log.info("role.stopped")


async def left_when_failed(role: Coroutine[Any, Any, None], leave_s: float = LEAVE_S) -> None:
    """Run the only coroutine of a process. Raises what it raised; if the loop then does not end, the process does."""
    try:
        await role
    except BaseException as error:
        # The codes of `deploy.role`: a server that is not reachable, or anything else.
        watchdog = threading.Timer(leave_s, os._exit, (3 if isinstance(error, InfrastructureError) else 1,))
        watchdog.daemon = True
        watchdog.start()
        raise


def stop_signal() -> asyncio.Event:
    """Set once the process is told to stop; who asks for it stops by itself from then on."""
    ending = _ending.get()
    if ending is None:  # not under `until_told`: a loop of somebody else's
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, stop.set)
        return stop
    ending.orderly = True
    return ending.stop


def _abandon() -> None:
    os.write(2, b'{"event": "role.abandoned", "reason": "did not drain in time; what was not acked comes again"}\n')
    os._exit(0)

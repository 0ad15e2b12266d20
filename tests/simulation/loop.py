"""An event loop with virtual time in which whole processes die, stop and go on, all by a seed.

Promises: the same seed gives the same order of callbacks, every time. Callbacks of one process run in the order in
which they were scheduled, as in reality; which process runs next is drawn. A dead process never runs another line, not
even a `finally`; a stopped one goes on where it was, its timers late. Time moves only when nobody can run. Serves no
sockets, threads, signals or subprocesses: what needs them does not belong into a simulation.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from enum import Enum
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

_TRACE_MASK = (1 << 61) - 1


class Life(Enum):
    """What a process is."""

    RUNNING = "running"
    STOPPED = "stopped"
    DEAD = "dead"


class Owner:
    """Whose callbacks these are: one process, or the world around them. `number` names it in the trace."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.life = Life.RUNNING
        self.ready: deque[Handle] = deque()
        self.steps = 0
        self.at_step: tuple[int, Callable[[], None]] | None = None
        """Call this before the step of that number, which may find its owner dead."""


OWNER: contextvars.ContextVar[Owner] = contextvars.ContextVar("owner")
"""The process in whose name code runs; tasks and callbacks inherit it."""


class Handle:
    """One scheduled callback, what `call_soon` and `call_at` answer."""

    __slots__ = ("_args", "_callback", "_context", "_when", "gone", "owner")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context, when: float
    ) -> None:
        self._callback, self._args, self._context, self._when = callback, args, context, when
        self.owner = context[OWNER]
        self.gone = False

    def cancel(self) -> None:
        """It will not run."""
        self.gone = True

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.gone

    def when(self) -> float:
        """The time at which it is due (s)."""
        return self._when

    def run(self) -> None:
        """Call it in its context."""
        self._context.run(self._callback, *self._args)


class VirtualLoop(asyncio.AbstractEventLoop):
    """The loop. Code runs in it only between `run` and its return."""

    def __init__(self, random: Random) -> None:
        self.world = Owner(0)
        self.trace = 0
        self.errors: list[dict[str, Any]] = []
        self._random = random
        self._now = 0.0
        self._timers: list[tuple[float, int, Handle]] = []
        self._numbers = itertools.count()
        self._active: list[Owner] = []
        self._graveyard: list[Handle] = []

    # --- what asyncio asks of a loop ------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Schedule a callback of its context's process."""
        handle = Handle(callback, args, context or contextvars.copy_context(), self._now)
        self._enqueue(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Schedule a callback in `delay` seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Schedule a callback at a time."""
        handle = Handle(callback, args, context or contextvars.copy_context(), when)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        """A task of the current process, or of the context's."""
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        """Never."""
        return False

    def is_running(self) -> bool:
        """Always, as far as code in it can tell."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody awaited; a task that died with its process is no error."""
        if not isinstance(context.get("exception", asyncio.CancelledError()), asyncio.CancelledError):
            self.errors.append(context)

    # --- running --------------------------------------------------------------------------------------------

    def owned(self, owner: Owner) -> contextvars.Context:
        """A context for code of that process."""
        context = contextvars.Context()
        context.run(OWNER.set, owner)
        return context

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run the world's task to its end and answer its result. Raises RuntimeError when nothing is left to run."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(main, context=self.owned(self.world))
            while not task.done():
                self._step()
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def go_on(self, owner: Owner) -> None:
        """A stopped process runs again; what came meanwhile is waiting for it."""
        owner.life = Life.RUNNING
        if owner.ready and owner not in self._active:
            self._active.append(owner)

    def _enqueue(self, handle: Handle) -> None:
        owner = handle.owner
        if owner.life is Life.DEAD:
            self._graveyard.append(handle)  # kept: what a dead task holds must not be closed, and run its `finally`
            return
        owner.ready.append(handle)
        if owner.life is Life.RUNNING and len(owner.ready) == 1:
            self._active.append(owner)

    def _step(self) -> None:
        active = self._active
        while not active:
            self._pass_time()
        place = int(self._random.random() * len(active)) if len(active) > 1 else 0
        owner = active[place]
        if owner.life is not Life.RUNNING or not owner.ready:
            active[place] = active[-1]
            active.pop()
            if owner.life is Life.DEAD:
                self._graveyard += owner.ready
                owner.ready.clear()
            return
        owner.steps += 1
        if owner.at_step is not None and owner.steps >= owner.at_step[0]:
            struck, owner.at_step = owner.at_step[1], None
            self.owned(self.world).run(struck)
            return
        handle = owner.ready.popleft()
        if not owner.ready:
            active[place] = active[-1]
            active.pop()
        self.trace = (self.trace * 1_000_003 + owner.number + 1) & _TRACE_MASK
        if not handle.gone:
            handle.run()

    def _pass_time(self) -> None:
        while self._timers and self._timers[0][2].gone:
            heapq.heappop(self._timers)
        if not self._timers:
            raise RuntimeError("nothing is left to run: the simulation hangs")
        self._now = max(self._now, self._timers[0][0])
        while self._timers and self._timers[0][0] <= self._now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.gone:
                self._enqueue(handle)

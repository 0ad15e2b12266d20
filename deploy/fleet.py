"""The local supervisor: every role of the fleet as its own process, restarted when it dies, stopped in order.

Promises: one crashing role never stops another; a role that keeps crashing is started ever more rarely; at a stop the
doors close before the stages behind them and the sinks close last, each with its own grace; when the supervisor itself
is killed its roles are told to drain and end; `scale` starts and drains copies of a role. Does not promise: to know how
many copies there should be, or supervision across machines (Kubernetes does that); it stands in for it on a developer's
machine and in tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Final, Protocol

from deploy.nursery import Nursery, NurseryError, forkable

_TICK_S: Final = 0.1
_ON_TICK_EVERY_S: Final = 1.0
_KILL_WAIT_S: Final = 5.0
_LOG_LIMIT_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """One role: its name (also of its log), its command, its place in the stop order and its time to drain.

    Roles of a smaller `order` are stopped first: doors, then stages in pipeline order, then sinks, so that whatever a
    stopping role still hands on finds somebody who takes it. `grace_s` seconds pass between SIGTERM and SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    order: int
    grace_s: float
    variables: tuple[tuple[str, str], ...] = ()
    """Of its environment, beside the fleet's."""


class Process(Protocol):
    """What the supervisor needs of a process: a `subprocess.Popen`, or a child of the nursery."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def terminate(self) -> None:
        """SIGTERM."""

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """How soon a dead role is started again: `first_s` seconds, `factor` times longer at each death in a row, at most
    `limit_s`; a role that ran `healthy_s` seconds starts from the beginning.
    """

    first_s: float = 0.5
    factor: float = 2.0
    limit_s: float = 30.0
    healthy_s: float = 30.0


def restart_delay(policy: BackoffPolicy, deaths_in_a_row: int) -> float:
    """Seconds between a death and the next start; `deaths_in_a_row` counts this one."""
    # The exponent is bounded because a role may die for days and a float power overflows.
    return min(policy.limit_s, policy.first_s * policy.factor ** min(deaths_in_a_row - 1, 32))


def deaths_after(policy: BackoffPolicy, deaths_in_a_row: int, ran_s: float) -> int:
    """The new count of deaths in a row when a role died after `ran_s` seconds."""
    return 1 if ran_s >= policy.healthy_s else deaths_in_a_row + 1


@dataclass(slots=True)
class _Running:
    """What the supervisor knows of one role now."""

    spec: RoleSpec
    process: Process | None = None
    started_at: float = 0.0
    deaths: int = 0
    start_at: float = 0.0
    stopping: bool = field(default=False)


class Fleet:
    """Starts, watches and stops the roles. Single-threaded: call every method from the thread that made it, because
    Linux ties the parent-death signal of a child to the thread that started it.
    """

    def __init__(
        self,
        roles: Sequence[RoleSpec],
        env: Mapping[str, str],
        log_dir: Path,
        say: Callable[[str], None],
        on_tick: Callable[[], object] | None = None,
        backoff: BackoffPolicy = BackoffPolicy(),
    ) -> None:
        """`env` is the roles' complete environment; `on_tick` is called about once a second between checks."""
        names = [role.name for role in roles]
        if len(set(names)) != len(names):
            raise ValueError(f"role names must differ, got {names}")
        self._roles = {role.name: _Running(role) for role in roles}
        self._env, self._log_dir, self._say, self._on_tick = dict(env), log_dir, say, on_tick
        self._backoff = backoff
        self._next_on_tick = 0.0
        self._nursery: Nursery | None = None

    def start(self) -> None:
        """Start every role, the last in the stop order first, so that no door opens before there is a stage behind."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for running in sorted(self._roles.values(), key=lambda r: -r.spec.order):
            self._launch(running)
        self._publish()

    def run_until(self, stop: Callable[[], bool]) -> None:
        """Supervise until `stop()` answers True; it is asked about ten times a second. Does not stop the roles."""
        while not stop():
            self.tick()
            time.sleep(_TICK_S)

    def tick(self) -> None:
        """One look at every role: note deaths, start again what is due, call `on_tick` when a second has passed."""
        now = time.monotonic()
        changed = False
        for running in list(self._roles.values()):
            if running.stopping:
                changed = self._note_end(running, now) or changed
                continue
            if running.process is not None and running.process.poll() is not None:
                self._note_death(running, now)
                changed = True
            if running.process is None and now >= running.start_at:
                self._launch(running)
                changed = True
        if changed:
            self._publish()
        if self._on_tick is not None and now >= self._next_on_tick:
            self._next_on_tick = now + _ON_TICK_EVERY_S
            self._on_tick()

    def scale(self, role: str, count: int) -> None:
        """Have `count` processes of a role, itself included: copies are started now, those too many drain meanwhile.

        The last one started goes first. Raises KeyError for a role that there is not, ValueError below 1.
        """
        if count < 1:
            raise ValueError("a role that is supervised has at least one process")
        spec = self._roles[role].spec
        for number in range(2, count + 1):
            name = f"{role}-{number}"
            if name not in self._roles:
                self._roles[name] = _Running(replace(spec, name=name, argv=_own_port(spec.argv)))
                self._say(f"starting {name}")
                self._launch(self._roles[name])
        number = count + 1
        while (running := self._roles.get(f"{role}-{number}")) is not None:
            if not running.stopping:
                self._say(f"stopping {running.spec.name}")
                running.stopping, running.start_at = True, time.monotonic() + running.spec.grace_s
                if running.process is not None:
                    running.process.terminate()
            number += 1
        self._publish()

    def _note_end(self, running: _Running, now: float) -> bool:
        """Whether a copy that was told to stop has ended; past its grace it is killed."""
        if running.process is not None and running.process.poll() is None:
            if now < running.start_at:
                return False
            self._say(f"{running.spec.name} did not drain within {running.spec.grace_s:.0f} s; killing it")
        self._kill(running)
        self._roles.pop(running.spec.name, None)
        return True

    def stop(self) -> None:
        """Stop the roles group by group in ascending order; SIGTERM, their grace, then SIGKILL. May be called twice."""
        try:
            in_order = sorted(self._roles.values(), key=lambda r: r.spec.order)
            for _, group in groupby(in_order, key=lambda r: r.spec.order):
                self._stop_group(list(group))
        finally:
            # An impatient second Ctrl-C ends the waiting above, but must not leave processes behind.
            for running in self._roles.values():
                self._kill(running)
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None
            self._publish()

    def pids(self) -> dict[str, int]:
        """The process numbers of the roles that run now."""
        live = ((name, running.process) for name, running in self._roles.items())
        return {name: process.pid for name, process in live if process is not None and process.poll() is None}

    def _launch(self, running: _Running) -> None:
        spec, log = running.spec, self._log_dir / f"{running.spec.name}.log"
        if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        try:
            running.process = self._started(spec, log)
        except OSError as error:
            self._say(f"{spec.name} could not be started: {error}")
            running.deaths += 1
            running.start_at = time.monotonic() + restart_delay(self._backoff, running.deaths)
            return
        running.started_at = time.monotonic()

    def _started(self, spec: RoleSpec, log: Path) -> Process:
        env = self._env | dict(spec.variables)
        if forkable(spec.argv):
            if self._nursery is not None and self._nursery.lost:
                self._nursery.close()
            if self._nursery is None or self._nursery.lost:
                self._nursery = Nursery(_dies_with_parent(), self._env, self._log_dir / "nursery.log")
            with contextlib.suppress(NurseryError):  # then as any other command
                return self._nursery.start(spec.argv, env, log)
        with log.open("ab") as output:
            # Its own session: Ctrl-C on the terminal reaches the supervisor alone, which then stops in order.
            return subprocess.Popen(
                [*_dies_with_parent(), *spec.argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _note_death(self, running: _Running, now: float) -> None:
        if running.process is None:
            return
        status = running.process.returncode or 0
        running.process = None
        running.deaths = deaths_after(self._backoff, running.deaths, now - running.started_at)
        delay = restart_delay(self._backoff, running.deaths)
        running.start_at = now + delay
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        log = self._log_dir / f"{running.spec.name}.log"
        self._say(f"{running.spec.name} {how}; starting it again in {delay:.1f} s (log: {log})")

    def _stop_group(self, group: Sequence[_Running]) -> None:
        began = time.monotonic()
        for running in group:
            running.stopping = True
            if running.process is not None:
                # To the role alone, not to its group: how its own children end is the role's affair.
                running.process.terminate()
        for running in group:
            if running.process is None:
                continue
            try:
                running.process.wait(max(0.0, began + running.spec.grace_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"{running.spec.name} did not drain within {running.spec.grace_s:.0f} s; killing it")
            self._kill(running)

    @staticmethod
    def _kill(running: _Running) -> None:
        """Make sure that nothing of the role is left, also no child of it (they share its process group)."""
        running.stopping = True
        process = running.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_KILL_WAIT_S)
        running.process = None

    def _publish(self) -> None:
        """Write `fleet.json` (role name to pid) in one step, so that a reader never sees half of it."""
        if not self._log_dir.exists():
            return
        temporary = self._log_dir / ".fleet.json.new"
        temporary.write_text(json.dumps(self.pids(), indent=1) + "\n")
        temporary.replace(self._log_dir / "fleet.json")


def _own_port(argv: Sequence[str]) -> tuple[str, ...]:
    """The command of a copy: two processes cannot have one health port, so a copy takes a free one."""
    if "--health-port" not in argv:
        return tuple(argv)
    place = list(argv).index("--health-port") + 1
    return (*argv[:place], "0", *argv[place + 1 :])


def _dies_with_parent() -> list[str]:
    """A prefix that has the kernel send SIGTERM to the role when the supervisor dies by whatever means.

    setpriv(1) asks for that (PR_SET_PDEATHSIG, which exec keeps) and becomes the role. The same by `preexec_fn` would
    run Python between fork and exec, which can deadlock as soon as any thread exists. SIGTERM and not SIGKILL: the
    servers live on, so the roles can still drain. Where there is no setpriv, killed supervisors leave roles behind.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []

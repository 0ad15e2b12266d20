"""Finds the three servers a fleet needs: the URLs it was given, or private instances that it starts.

Promises: servers that were given are never touched, nor are services that Debian starts by itself; private instances
keep data, ports and passwords in their data directory and come back with them after any kill; nothing is installed
without consent (a terminal's yes, or YES=1). Does not promise: high availability, or a private instance for more than
one fleet at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Protocol, Self

from deploy import containers
from deploy.native import Binaries, PostgresServer, RabbitServer, RedisServer, find_binaries
from deploy.processes import HOST, Record, Server, ServerProcess, ServersError, port_is_free, tail

__all__ = ["NativeServers", "ServerUrls", "ServersError", "StartedServers", "ensure_servers", "running_urls"]

Say = Callable[[str], None]

DEFAULT_DATA_DIR: Final = Path(".riskfleet")
START_DEADLINE_S: Final = 60.0
_LAUNCHES: Final = 6  # a killed server's children or names may outlive it for a moment, so a first launch may fail
_RELAUNCH_PAUSE_S: Final = 0.5
_PORT_PATIENCE_S: Final = 3.0
# What each server gets to finish in: RabbitMQ closes its queues, PostgreSQL writes a checkpoint.
_STOP_GRACE_S: Final[Mapping[str, float]] = {"rabbitmq": 20.0, "redis": 10.0, "postgresql": 20.0}


@dataclass(frozen=True, slots=True)
class ServerUrls:
    """Where the servers are. The URLs hold passwords, so no print of this object shows them."""

    database: str = field(repr=False)
    migration_database: str = field(repr=False)
    redis: str = field(repr=False)
    rabbitmq: str = field(repr=False)
    rabbitmq_management: str = field(repr=False)


def _silent(_: str) -> None:
    return


class NativeServers:
    """One private instance each of RabbitMQ, Redis and PostgreSQL below `data_dir`; a context that starts and stops.

    `say` receives one line per thing worth telling a person. Not thread-safe: one supervisor calls it.
    """

    def __init__(self, data_dir: Path, say: Say = _silent) -> None:
        self._dir = data_dir.resolve()
        self._say = say
        self._lock_file: IO[str] | None = None
        self._record: Record | None = None
        self._rabbit: RabbitServer | None = None
        self._processes: dict[str, ServerProcess] = {}
        self._abort = threading.Event()
        self._next_launch: dict[str, float] = {}

    def __enter__(self) -> Self:
        """Start; the URLs are at `urls()`."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop whatever runs."""
        self.stop()

    def start(self) -> ServerUrls:
        """Start (or find still running) all three side by side and answer their URLs once each of them answers.

        Raises ServersError when programs are missing, when another fleet holds the data directory, or when a server
        is not ready within 60 seconds (the message ends with the tail of its log).
        """
        binaries, missing = find_binaries()
        if binaries is None:
            raise ServersError(_missing_message(missing))
        self._open(binaries)
        self._abort.clear()
        began = time.monotonic()
        try:
            with ThreadPoolExecutor(max_workers=3) as pool:
                futures = [pool.submit(self._bring_up, p, began + START_DEADLINE_S) for p in self._processes.values()]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self._abort.set()
                    raise
        except BaseException:
            self.stop()
            raise
        self._say(f"servers ready after {time.monotonic() - began:.1f} s in {self._dir}")
        return self.urls()

    def urls(self) -> ServerUrls:
        """The URLs of the started servers."""
        if self._record is None:
            raise ServersError("the servers are not started; call start() first")
        return _urls(self._record)

    def pids(self) -> dict[str, int]:
        """The process numbers of the servers that run now: of `rabbitmq`, `redis` and `postgresql`."""
        found = {name: process.pid() for name, process in self._processes.items()}
        return {name: pid for name, pid in found.items() if pid is not None}

    def ensure_alive(self) -> list[str]:
        """Launch again every server that died, on its old port and data, and answer their names.

        Takes well under a millisecond when all are alive and never waits for a server to become ready (`wait_ready`
        does), so a supervisor may call it every second. A server that keeps dying is launched once in two seconds.
        """
        restarted = []
        for name, process in self._processes.items():
            if process.alive() or time.monotonic() < self._next_launch.get(name, 0.0):
                continue
            self._say(f"{name} died; starting it again")
            self._next_launch[name] = time.monotonic() + 2.0
            try:
                process.launch()
            except (OSError, ServersError) as error:
                self._say(f"{name} could not be started: {error}")
                continue
            restarted.append(name)
        return restarted

    def wait_ready(self, timeout_s: float = START_DEADLINE_S) -> None:
        """Wait until all three answer, launching again what dies meanwhile. Raises ServersError at the deadline."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes.values():
            while not (process.alive() and process.server.ready()):
                if time.monotonic() > deadline:
                    raise ServersError(_not_ready_message(process, timeout_s))
                self.ensure_alive()
                time.sleep(0.05)

    def kill(self, name: str) -> None:
        """SIGKILL the server of that name (for PostgreSQL its postmaster) and wait until it is gone: a fault test."""
        self._processes[name].end(signal.SIGKILL, 5.0)

    def stop(self) -> None:
        """Stop the three servers side by side, each within its grace, then by SIGKILL; then our own epmd.

        The fleet has drained before, so no server waits for another; epmd goes last, because a RabbitMQ that is
        stopping still signs off there.
        """
        if self._processes:
            with ThreadPoolExecutor(len(self._processes)) as pool:
                # On SIGTERM RabbitMQ stops as by `rabbitmqctl stop`, without starting a second Erlang machine for it.
                ends = [
                    pool.submit(process.end, process.server.stop_signal, _STOP_GRACE_S[name])
                    for name, process in self._processes.items()
                ]
            for end in ends:
                end.result()
        if self._rabbit is not None:
            self._rabbit.stop_epmd()
        self._processes, self._rabbit, self._record = {}, None, None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _open(self, binaries: Binaries) -> None:
        for directory in (self._dir, self._dir / "logs", self._dir / "redis", self._dir / "rabbitmq"):
            if not directory.exists():
                directory.mkdir(parents=True)
                # PostgreSQL's account must be able to pass through, but has nothing to list or read here.
                directory.chmod(0o711 if directory == self._dir else 0o700)
        if self._lock_file is None:
            self._lock_file = (self._dir / "lock").open("w")
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock_file.close()
                self._lock_file = None
                raise ServersError(
                    f"another fleet runs its servers in {self._dir}; stop it, or choose another data directory"
                ) from None
        self._record = Record(self._dir / "servers.json")
        self._rabbit = RabbitServer(binaries, self._record, self._dir / "rabbitmq")
        kinds: tuple[Server, ...] = (
            self._rabbit,
            RedisServer(binaries, self._record, self._dir / "redis"),
            PostgresServer(binaries, self._record, self._dir / "postgresql"),
        )
        logs = self._dir / "logs"
        self._processes = {kind.name: ServerProcess(kind, self._record, logs / f"{kind.name}.log") for kind in kinds}

    def _bring_up(self, process: ServerProcess, deadline: float) -> None:
        began, launches = time.monotonic(), 0
        adopted = process.alive()
        while True:
            if self._abort.is_set():
                return
            alive = process.alive()
            if alive and process.server.ready():
                took = time.monotonic() - began
                self._say(f"{process.server.name} {'runs already' if adopted else f'ready after {took:.1f} s'}")
                return
            if time.monotonic() > deadline or (not alive and launches >= _LAUNCHES):
                raise ServersError(_not_ready_message(process, time.monotonic() - began))
            if not alive:
                adopted = False
                if launches:
                    time.sleep(_RELAUNCH_PAUSE_S)
                self._free_ports(process)
                process.launch()
                launches += 1
            time.sleep(0.05)

    def _free_ports(self, process: ServerProcess) -> None:
        """Give up remembered ports that somebody else took while the server was down.

        A server that was killed a moment ago still holds its own until its last thread has gone, so wait for that
        first: a new port is a new URL, which no role that runs would learn.
        """
        record = self._record
        if record is None:
            return
        deadline = time.monotonic() + _PORT_PATIENCE_S
        for name in process.server.ports:
            ours = name == "epmd" and record.process("epmd") is not None
            free = ours or port_is_free(record.port(name))
            while not free and time.monotonic() < deadline and not self._abort.is_set():
                time.sleep(0.05)
                free = port_is_free(record.port(name))
            if not free:
                self._say(f"port {record.port(name)} of {name} is taken by another program; choosing a new one")
                record.forget_port(name)


def _urls(record: Record) -> ServerUrls:
    postgresql = f"{HOST}:{record.port('postgresql')}/riskfleet"
    rabbit_login = f"riskfleet:{record.secret('rabbitmq')}@{HOST}"
    return ServerUrls(
        database=f"postgresql://riskfleet_app:{record.secret('postgresql_app')}@{postgresql}",
        migration_database=f"postgresql://riskfleet_owner:{record.secret('postgresql_owner')}@{postgresql}",
        redis=f"redis://:{record.secret('redis')}@{HOST}:{record.port('redis')}/0",
        # By default a dead peer is noticed after three minutes.
        rabbitmq=f"amqp://{rabbit_login}:{record.port('rabbitmq')}/?heartbeat=10",
        rabbitmq_management=f"http://{rabbit_login}:{record.port('rabbitmq_management')}",
    )


def _not_ready_message(process: ServerProcess, waited_s: float) -> str:
    log = process.log
    return f"{process.server.name} is not ready after {waited_s:.0f} s; its log {log} ends with:\n{tail(log)}"


def _missing_message(missing: list[str]) -> str:
    return (
        f"missing on this machine: {', '.join(missing)}. Either set DATABASE_URL, REDIS_URL and RABBITMQ_URL to "
        f"running servers, or install them (Debian, as root: apt-get install {' '.join(missing)}), "
        "or let riskfleet do that: run it on a terminal or with YES=1"
    )


def running_urls(data_dir: Path) -> ServerUrls | None:
    """The URLs of private servers that some fleet runs in `data_dir` now; None when not all three run."""
    path = data_dir.resolve() / "servers.json"
    if not path.exists():
        return None
    record = Record(path)
    running = all(record.process(name) is not None for name in _STOP_GRACE_S)
    return _urls(record) if running else None


class StartedServers(Protocol):
    """Servers that were started here, and must be stopped here."""

    def ensure_alive(self) -> list[str]:
        """Start again what ended; the names of what was started."""
        ...

    def stop(self) -> None:
        """Stop all of them; their data stays."""
        ...


def ensure_servers(
    given: ServerUrls | None, data_dir: Path, say: Say = _silent
) -> tuple[ServerUrls, StartedServers | None]:
    """Answer URLs of three servers: the given ones, else private instances, installed first where that is allowed.

    Where programs are missing and a Docker engine answers, the three run in containers instead. The second value must
    be stopped by the caller; it is None for given servers. Raises ServersError, whose message says what to do.
    """
    if given is not None:
        return given, None
    _, missing = find_binaries()
    if missing and containers.engine_answers():
        compose = containers.ContainerServers(say)
        return compose.start(), compose
    if missing:
        _install(missing, say)
    servers = NativeServers(data_dir, say)
    return servers.start(), servers


def _install(missing: list[str], say: Say) -> None:
    """Install Debian packages through apt, with consent. Raises ServersError when that is impossible or refused."""
    prefix = _root_prefix()
    if shutil.which("apt-get") is None or prefix is None or not _consent(missing, say):
        raise ServersError(_missing_message(missing))
    say(f"installing {', '.join(missing)} with apt-get; this takes a minute or two")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # sudo drops the environment, so the variable goes through env(1).
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    steps = [[*apt, "update"], [*apt, "install", "--no-install-recommends", *missing]]
    for step in steps:
        result = subprocess.run(
            step, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        output = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        if result.returncode != 0 and "update" in step:
            say(f"apt-get update failed; trying with the lists that are here:\n{output}")
        elif result.returncode != 0:
            raise ServersError(f"apt-get could not install {' '.join(missing)}:\n{output}")
    if still := find_binaries()[1]:
        raise ServersError(f"apt-get succeeded, but the programs are not found. {_missing_message(still)}")


def _root_prefix() -> list[str] | None:
    """The command that makes us root, empty when we are; None when there is no way."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    quiet = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    # On a terminal sudo may ask for the password itself, from /dev/tty.
    return ["sudo"] if quiet or sys.stdin.isatty() else None


def _consent(missing: list[str], say: Say) -> bool:
    if os.environ.get("YES") == "1":
        return True
    if not sys.stdin.isatty():
        return False
    say(f"riskfleet needs {', '.join(missing)}, which this machine does not have.")
    with contextlib.suppress(EOFError):
        return input("Install with apt-get now? [Y/n] ").strip().lower() in ("", "y", "yes")
    return False


def main() -> int:
    """Make sure that the three servers' programs are on this machine (`make test` calls this before pytest)."""

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    try:
        _, missing = find_binaries()
        if missing:
            _install(missing, say)
    except ServersError as error:
        say(str(error))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

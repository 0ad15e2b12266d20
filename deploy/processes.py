"""The process of a server: started in its own session, found again after the supervisor's death, ended by signal.

Promises: a recorded process is never confused with a later one of the same number; passwords are readable by their
owner only; ports lie where no outgoing connection takes them. Does not promise: anything beyond Linux (it reads /proc),
and it decides nothing: when to start, restart and stop is `deploy.servers`' affair.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HOST = "127.0.0.1"
_LOG_LIMIT_BYTES = 16 * 1024 * 1024


class ServersError(RuntimeError):
    """A server this fleet needs could not be found, installed or started; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same number: pid, boot and start tick."""

    pid: int
    started: str


def identify(pid: int) -> Identity | None:
    """The identity of a running process; None when there is none, or only its zombie."""
    try:
        # The name in parentheses may hold spaces; the fields after the last one are fixed (proc(5): 3 state, 22 start).
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else Identity(pid, f"{boot}:{fields[19]}")


class Record:
    """What outlives the supervisor: ports, passwords and process identities, in one file that only its owner reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._content: dict[str, dict[str, str]] = {"ports": {}, "secrets": {}, "processes": {}, "notes": {}}
        if path.exists():
            try:
                self._content |= json.loads(path.read_text())
            except ValueError as error:
                raise ServersError(
                    f"{path} is damaged ({error}); remove its directory to start with new data"
                ) from None

    def secret(self, name: str) -> str:
        """The password of that name (48 hexadecimal digits), made at first use."""
        return self._ensure("secrets", name, lambda: secrets.token_hex(24))

    def port(self, name: str) -> int:
        """The remembered port of that name, chosen at first use."""
        with self._lock:
            taken = {int(port) for port in self._content["ports"].values()}
            return int(self._ensure("ports", name, lambda: str(free_port(taken))))

    def forget_port(self, name: str) -> None:
        """Choose another port at the next use."""
        self._put("ports", name, None)

    def process(self, name: str) -> Identity | None:
        """The recorded process of that name, if it still runs."""
        pid, _, started = self._content["processes"].get(name, "").partition("@")
        if not pid:
            return None
        current = identify(int(pid))
        return current if current is not None and current.started == started else None

    def remember_process(self, name: str, process: Identity | None) -> None:
        """Record (or with None forget) the process of that name."""
        self._put("processes", name, f"{process.pid}@{process.started}" if process else None)

    def note(self, name: str) -> str | None:
        """A remembered fact, such as where PostgreSQL's data lies."""
        return self._content["notes"].get(name)

    def remember(self, name: str, value: str) -> None:
        """Remember a fact."""
        self._put("notes", name, value)

    def _ensure(self, section: str, name: str, make: Callable[[], str]) -> str:
        with self._lock:
            if name not in self._content[section]:
                self._put(section, name, make())
            return self._content[section][name]

    def _put(self, section: str, name: str, value: str | None) -> None:
        with self._lock:
            if value is None:
                self._content[section].pop(name, None)
            else:
                self._content[section][name] = value
            write_private(self._path, json.dumps(self._content, indent=1))


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file in one step, never readable by others, not even for a moment."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    temporary.replace(path)


def free_port(taken: set[int]) -> int:
    """A free TCP port on 127.0.0.1 below the range that the kernel gives to outgoing connections.

    From that range a client that keeps trying a dead server's port would sooner or later be given the very same port
    as its own, connect to itself and keep the server from coming back.
    """
    low, high = 20_000, 32_000
    for _ in range(2_000):
        port = low + secrets.randbelow(high - low)
        if port not in taken and port_is_free(port):
            return port
    raise ServersError(f"no free port between {low} and {high} on {HOST}; end what occupies them")


def port_is_free(port: int) -> bool:
    """Whether a server could listen on that port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log file, for an error message."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


class Server(Protocol):
    """One kind of server: pure knowledge of its files, command and readiness; the process is `ServerProcess`'s."""

    @property
    def name(self) -> str:
        """Its name in records, logs and answers."""

    @property
    def ports(self) -> tuple[str, ...]:
        """The names of the ports it listens on."""

    @property
    def stop_signal(self) -> signal.Signals:
        """The signal that makes it finish in order."""

    def prepare(self) -> None:
        """Write what the server reads; may be called before every start."""

    def command(self) -> list[str]:
        """The program and its arguments; it must become the server itself (exec), so that its pid is the server's."""

    def environment(self) -> Mapping[str, str]:
        """The complete environment; nothing is inherited, so that a variable of the caller cannot change the server."""

    def ready(self) -> bool:
        """Whether the server answers with our password now. Never raises; answers within a few seconds."""


class ServerProcess:
    """The process of one server: launched in its own session, found again by its record, ended by signal."""

    def __init__(self, server: Server, record: Record, log: Path) -> None:
        self.server, self.log = server, log
        self._record = record
        self._child: subprocess.Popen[bytes] | None = None

    def alive(self) -> bool:
        """Whether the process runs; also collects our own dead child, which else would stay a zombie."""
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        return self._record.process(self.server.name) is not None

    def pid(self) -> int | None:
        """The number of the running process."""
        process = self._record.process(self.server.name)
        return process.pid if process else None

    def launch(self) -> None:
        """Start the server without waiting for it. Its own session keeps a terminal's Ctrl-C away from it: the fleet
        drains through the servers first.
        """
        self.server.prepare()
        if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.server.command(),
                env=dict(self.server.environment()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        self._record.remember_process(self.server.name, identify(self._child.pid))

    def end(self, sig: signal.Signals, grace_s: float) -> None:
        """Send `sig`, wait up to `grace_s` seconds, then SIGKILL. A dead process is no error."""
        pid = self.pid()
        if pid is not None:
            send_signal(pid, sig)
            if not self._gone(grace_s):
                send_signal(pid, signal.SIGKILL)
                self._gone(5.0)
        self._record.remember_process(self.server.name, None)

    def _gone(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def send_signal(pid: int, sig: signal.Signals) -> None:
    """Send a signal; a process that is gone is no error."""
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return

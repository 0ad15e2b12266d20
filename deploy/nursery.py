"""The nursery: one process that has imported what the roles need, and forks a role when it is asked for one.

A role that is started by itself spends almost two seconds of CPU on imports; forked from here it begins at once, and
shares the memory of what was imported. Only commands of the form `python -m MODULE …` of this very interpreter are
forked; the nursery opens nothing, starts no thread and runs nothing of a role itself, so a fork copies no state.

Promises: the supervisor hears of every end of its roles; when the supervisor dies the nursery ends, and when the
nursery ends its roles are told (SIGTERM) to drain. Does not promise to start a second nursery: the supervisor does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deploy.processes import identify

PRELOAD: Final = (
    "uvloop",
    *(f"deploy.{name}" for name in ("wiring", "control", "autoscaler", "credentials", "role", "stopping")),
    *(f"gateway.{name}" for name in ("http", "ingress", "labelling", "waiting")),
    *(f"governance.postgres.{name}" for name in ("audit", "deadletters", "directory", "feed", "labels", "ledger")),
    *(f"governance.postgres.{name}" for name in ("past", "pauses", "registry")),
    *(f"workers.{name}" for name in ("gate", "runner", "simulation", "velocity")),
    *(f"workers.sinks.{name}" for name in ("audit", "delivery", "labels", "metrics", "parking")),
)
"""What a role imports sooner or later."""

_ANSWER_S: Final = 60.0
_LOST: Final = -signal.SIGTERM
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


class NurseryError(OSError):
    """The nursery did not start a role."""


class Child:
    """A forked role; as much of `subprocess.Popen` as the supervisor uses. Made by `Nursery.start`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery
        self._identity = identify(pid)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.end_of(self.pid)
            if self.returncode is None and self._nursery.lost and identify(self.pid) != self._identity:
                self.returncode = _LOST  # nobody is left who could say how it ended
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM; a process that is gone is no error."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code


class Nursery:
    """The supervisor's side. Single-threaded, as the supervisor is."""

    def __init__(self, prefix: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """`prefix` stands before the command (what ties its life to ours); of `env` it is given what Python needs,
        and no role's secrets.
        """
        ours, theirs = socket.socketpair()
        kept = {name: value for name, value in env.items() if name.startswith("PYTHON") or name in ("PATH", "HOME")}
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "deploy.nursery"],
                env=kept,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._socket, self._rest = ours, b""
        self._answers: list[dict[str, Any]] = []
        self._ends: dict[int, int] = {}
        self.lost = False

    @property
    def pid(self) -> int:
        """Of the nursery itself."""
        return self._process.pid

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        """Fork a role. Raises NurseryError when that did not work."""
        request = {"module": argv[2], "arguments": argv[3:], "env": dict(env), "log": str(log)}
        try:
            self._socket.settimeout(_ANSWER_S)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            self.lost = True
            raise NurseryError("the nursery is gone") from error
        deadline = time.monotonic() + _ANSWER_S
        while not self._answers:
            self._read(deadline - time.monotonic())
            if self.lost or time.monotonic() >= deadline:
                self.close()  # or it might still fork what is started in another way by then
                raise NurseryError("the nursery does not answer")
        answer = self._answers.pop(0)
        if "pid" not in answer:
            raise NurseryError(str(answer["error"]))
        return Child(self, int(answer["pid"]))

    def end_of(self, pid: int) -> int | None:
        """How a child ended, if it did; forgotten once told."""
        self._read(0.0)
        return self._ends.pop(pid, None)

    def _read(self, within_s: float) -> None:
        if self.lost or not select.select([self._socket], [], [], max(0.0, within_s))[0]:
            return
        try:
            some = self._socket.recv(65_536)
        except OSError:
            some = b""
        if not some:
            self.lost = True
            return
        *lines, self._rest = (self._rest + some).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ended" in message:
                self._ends[message["ended"]] = message["code"]
            else:
                self._answers.append(message)

    def close(self) -> None:
        """End the nursery; roles that still run are told to drain."""
        self._socket.close()
        self.lost = True
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def forkable(argv: Sequence[str]) -> bool:
    """Whether a command is one that the nursery can fork."""
    return len(argv) > 2 and argv[0] == sys.executable and argv[1] == "-m"


def serve(channel: socket.socket) -> None:
    """Fork what is asked for and report what ended, until the supervisor is gone."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    rest = b""
    while True:
        ready = select.select([channel.fileno(), reader], [], [])[0]
        if reader in ready:
            os.read(reader, 4096)
            _report(channel)
        if channel.fileno() in ready:
            some = channel.recv(65_536)
            if not some:
                return
            *lines, rest = (rest + some).split(b"\n")
            for line in lines:
                channel.sendall(json.dumps(_fork(json.loads(line), channel)).encode() + b"\n")


def _report(channel: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended = {"ended": found[0], "code": os.waitstatus_to_exitcode(found[1])}
            channel.sendall(json.dumps(ended).encode() + b"\n")


def _fork(request: dict[str, Any], channel: socket.socket) -> dict[str, Any]:
    """In the nursery the answer; in the child this never returns."""
    waiting, begun = os.pipe()
    nursery = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(waiting)
        os.close(begun)
        return {"error": f"fork failed: {error}"}
    if pid:
        os.close(begun)
        os.read(waiting, 1)  # until it leads its own group, or is dead: it may be killed as a group from then on
        os.close(waiting)
        return {"pid": pid}
    code = 1
    try:
        os.close(waiting)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        libc.prctl(_PR_SET_NAME, "-".join(request["arguments"][:2]).encode()[:15])
        channel.close()
        os.close(begun)
        if os.getppid() == nursery:
            code = _become(request)
    except BaseException:  # noqa: BLE001 - what a process does with it that has nobody above
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(request: dict[str, Any]) -> int:
    """Run a module as the interpreter would: its arguments, its environment, its streams; the exit code."""
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["module"], *request["arguments"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    return 0


def main() -> None:
    """Import, and serve the socket that is standard input. A module that cannot be imported is the role's to report."""
    channel = socket.socket(fileno=os.dup(0))
    for name in PRELOAD:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    serve(channel)


if __name__ == "__main__":
    main()

"""Roles that are forked from the nursery end, are seen to end, and are told to end, as any process of the fleet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from deploy.fleet import Fleet, RoleSpec
from deploy.nursery import PRELOAD, Child, Nursery, NurseryError, forkable
from deploy.processes import identify
from tests.unit.test_fleet import QUICK, until

MODULE = """
import os, signal, sys, time
what = sys.argv[1]
print(what, sys.argv[2:], os.environ.get("COLOUR"), os.environ.get("SECRET"), os.getpid() == os.getpgrp(), flush=True)
if what == "code":
    raise SystemExit(int(sys.argv[2]))
if what == "text":
    raise SystemExit("went wrong")
if what == "error":
    raise ValueError("broken")
if what == "drain":
    signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), os._exit(0)))
if what == "sleep" or what == "drain":
    time.sleep(60)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tiny_role.py").write_text(MODULE)
    root = Path(__file__).resolve().parents[2]
    return dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{root}", "SECRET": "of a role"}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    directory = tmp_path_factory.mktemp("nursery")
    root = Path(__file__).resolve().parents[2]
    made = Nursery((), dict(os.environ) | {"PYTHONPATH": f"{directory}:{root}"}, directory / "nursery.log")
    (directory / "tiny_role.py").write_text(MODULE)
    yield made
    made.close()


def start(nursery: Nursery, env: dict[str, str], tmp_path: Path, *words: str) -> Child:
    return nursery.start((sys.executable, "-m", "tiny_role", *words), env, tmp_path / "role.log")


def test_everything_that_is_imported_beforehand_exists() -> None:
    assert [name for name in PRELOAD if find_spec(name) is None] == []


def test_only_a_module_of_this_interpreter_is_forked() -> None:
    assert forkable((sys.executable, "-m", "deploy.role", "gateway"))
    assert not forkable((sys.executable, "-c", "pass"))
    assert not forkable(("/usr/bin/python3", "-m", "deploy.role"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("code", "0"), 0, ""),
        (("code", "3"), 3, ""),
        (("text",), 1, "went wrong"),
        (("error",), 1, "ValueError: broken"),
    ],
)
def test_a_role_ends_with_its_code_and_writes_its_log(
    nursery: Nursery, env: dict[str, str], tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    child = start(nursery, env | {"COLOUR": "blue"}, tmp_path, *words)
    assert child.wait(10) == code
    assert child.poll() == code
    log = (tmp_path / "role.log").read_text()
    assert log.startswith(f"{words[0]} {list(words[1:])!r} blue of a role True")
    assert says in log


def test_a_killed_role_is_known_by_its_signal_and_a_running_one_runs(
    nursery: Nursery, env: dict[str, str], tmp_path: Path
) -> None:
    child, other = start(nursery, env, tmp_path, "sleep", "scoring"), start(nursery, env, tmp_path, "sleep")
    assert child.poll() is None
    assert Path(f"/proc/{child.pid}/comm").read_text() == "sleep-scoring\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.terminate()
    assert other.wait(10) == -signal.SIGTERM
    other.terminate()


def test_what_cannot_be_imported_is_the_roles_own_failure(
    nursery: Nursery, env: dict[str, str], tmp_path: Path
) -> None:
    child = nursery.start((sys.executable, "-m", "no_such_role"), env, tmp_path / "role.log")
    assert child.wait(10) == 1
    assert "no_such_role" in (tmp_path / "role.log").read_text()


def test_the_nursery_itself_holds_no_roles_secrets(env: dict[str, str], tmp_path: Path) -> None:
    nursery = Nursery((), env, tmp_path / "nursery.log")
    try:
        start(nursery, env, tmp_path, "code", "0").wait(60)
        environment = Path(f"/proc/{nursery.pid}/environ").read_bytes()
        assert b"of a role" not in environment
    finally:
        nursery.close()


def test_a_fleet_outlives_its_nursery(env: dict[str, str], tmp_path: Path) -> None:
    """Its roles are told to drain, come back from a new nursery, and end with the fleet."""
    lines: list[str] = []
    spec = RoleSpec("one", (sys.executable, "-m", "tiny_role", "drain"), 0, 5.0, (("COLOUR", "red"),))
    fleet = Fleet([spec], env, tmp_path / "logs", lines.append, None, QUICK)
    fleet.start()
    log = tmp_path / "logs" / "one.log"
    try:
        until(lambda: log.exists() and "drain [] red" in log.read_text())
        first = fleet.pids()["one"]
        parent = int(Path(f"/proc/{first}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(parent, signal.SIGKILL)
        until(lambda: fleet.pids().get("one", first) != first, 30, fleet.tick)
        assert "told" in log.read_text()
        second = fleet.pids()["one"]
        assert identify(second) is not None
    finally:
        fleet.stop()
    assert identify(second) is None


def test_a_nursery_that_is_gone_is_said_to_be(env: dict[str, str], tmp_path: Path) -> None:
    nursery = Nursery((), env, tmp_path / "nursery.log")
    child = start(nursery, env, tmp_path, "sleep")
    os.kill(nursery.pid, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGTERM
    with pytest.raises(NurseryError):
        start(nursery, env, tmp_path, "sleep")
    nursery.close()

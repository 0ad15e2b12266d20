"""The supervisor keeps its promises with real, tiny processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.fleet import BackoffPolicy, Fleet, RoleSpec, deaths_after, restart_delay
from deploy.processes import identify

QUICK = BackoffPolicy(first_s=0.05, factor=2.0, limit_s=0.2, healthy_s=30.0)
SLEEPER = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def role(name: str, code: str, order: int = 0, grace_s: float = 5.0) -> RoleSpec:
    return RoleSpec(name, (sys.executable, "-S", "-c", code), order, grace_s)


def until(condition: Callable[[], object], within_s: float = 10.0, step: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        step()
        time.sleep(0.02)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def fleets(tmp_path: Path, lines: list[str]) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(*roles: RoleSpec, on_tick: Callable[[], object] | None = None) -> Fleet:
        made.append(Fleet(roles, dict(os.environ), tmp_path, lines.append, on_tick, QUICK))
        made[-1].start()
        return made[-1]

    yield make
    for fleet in made:
        fleet.stop()


@given(deaths=st.integers(1, 10_000))
def test_the_wait_grows_with_every_death_up_to_its_limit(deaths: int) -> None:
    policy = BackoffPolicy()
    assert policy.first_s <= restart_delay(policy, deaths) <= restart_delay(policy, deaths + 1) <= policy.limit_s


def test_a_role_that_was_healthy_for_long_starts_from_the_beginning() -> None:
    policy = BackoffPolicy()
    assert [restart_delay(policy, n) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert deaths_after(policy, 7, ran_s=29.9) == 8
    assert deaths_after(policy, 7, ran_s=30.0) == 1


def test_a_killed_role_comes_back_and_its_neighbour_does_not_notice(
    fleets: Callable[..., Fleet], tmp_path: Path, lines: list[str]
) -> None:
    fleet = fleets(role("one", SLEEPER), role("two", SLEEPER))
    before = fleet.pids()
    os.kill(before["one"], signal.SIGKILL)
    until(lambda: fleet.pids().get("one", before["one"]) != before["one"], step=fleet.tick)
    assert fleet.pids()["two"] == before["two"]
    assert json.loads((tmp_path / "fleet.json").read_text()) == fleet.pids()
    assert "one was killed by SIGKILL" in lines[0]


def test_a_role_that_keeps_crashing_is_started_ever_more_rarely(fleets: Callable[..., Fleet], lines: list[str]) -> None:
    fleet = fleets(role("broken", "raise SystemExit(3)"))
    until(lambda: len(lines) >= 4, step=fleet.tick)
    assert [line.split("again in ")[1][:3] for line in lines[:4]] == ["0.1", "0.1", "0.2", "0.2"]
    assert "exit code 3" in lines[0]


def test_a_command_that_does_not_exist_is_reported_and_harms_no_neighbour(
    fleets: Callable[..., Fleet], lines: list[str]
) -> None:
    fleet = fleets(RoleSpec("ghost", ("/nonexistent/role",), 0, 1.0), role("one", SLEEPER))
    until(lambda: len(lines) >= 1, step=fleet.tick)
    assert "ghost" in lines[0]
    assert "one" in fleet.pids()


def test_doors_close_before_the_stages_behind_them(fleets: Callable[..., Fleet], tmp_path: Path) -> None:
    end = textwrap.dedent("""
        import signal, sys, time
        def end(*_):
            time.sleep(0.1)
            open({log!r}, "a").write({name!r} + " ")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        open({log!r} + {name!r}, "w").close()
        time.sleep(60)
    """)
    log = str(tmp_path / "ended")
    names = {"sink": 30, "door": 10, "stage": 20}
    fleet = fleets(*(role(name, end.format(log=log, name=name), order) for name, order in names.items()))
    until(lambda: all(Path(log + name).exists() for name in names))
    fleet.stop()
    assert Path(log).read_text().split() == ["door", "stage", "sink"]
    assert fleet.pids() == {}


def test_a_role_that_does_not_drain_is_killed_after_its_grace(
    fleets: Callable[..., Fleet], tmp_path: Path, lines: list[str]
) -> None:
    fleet = fleets(role("stubborn", STUBBORN, grace_s=0.3))
    until(lambda: (tmp_path / "stubborn.log").read_text().startswith("up"))
    pid = fleet.pids()["stubborn"]
    began = time.monotonic()
    fleet.stop()
    assert 0.25 < time.monotonic() - began < 3.0
    assert identify(pid) is None
    assert "did not drain" in lines[-1]


def test_roles_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from deploy.fleet import Fleet, RoleSpec
role = RoleSpec("one", (sys.executable, "-c", {SLEEPER!r}), 0, 1.0)
fleet = Fleet([role], dict(os.environ), Path({str(tmp_path)!r}), print)
fleet.start()
fleet.run_until(lambda: False)
"""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    record = tmp_path / "fleet.json"
    try:
        until(record.exists)
        pid = json.loads(record.read_text())["one"]
        # setpriv needs a moment to ask the kernel and become the role.
        until(lambda: b"time.sleep" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2])
    finally:
        supervisor.kill()
        supervisor.wait()
    until(lambda: identify(pid) is None)


def test_on_tick_is_called_about_once_a_second(fleets: Callable[..., Fleet]) -> None:
    calls: list[float] = []
    fleet = fleets(role("one", SLEEPER), on_tick=lambda: calls.append(time.monotonic()))
    end = time.monotonic() + 1.3
    fleet.run_until(lambda: time.monotonic() > end)
    assert len(calls) == 2


def test_copies_are_started_and_drained_one_by_one_and_the_role_itself_stays(
    fleets: Callable[..., Fleet], lines: list[str]
) -> None:
    fleet = fleets(role("one", SLEEPER), role("two", SLEEPER))
    first = fleet.pids()["one"]
    fleet.scale("one", 3)
    assert set(fleet.pids()) == {"one", "one-2", "one-3", "two"}
    killed = fleet.pids()["one-2"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: fleet.pids().get("one-2", killed) != killed, step=fleet.tick)
    fleet.scale("one", 1)
    until(lambda: set(fleet.pids()) == {"one", "two"}, step=fleet.tick)
    fleet.tick()
    fleet.scale("one", 2)
    assert fleet.pids()["one"] == first
    assert "one-2" in fleet.pids()
    assert not [line for line in lines if "did not drain" in line]
    with pytest.raises(ValueError, match="at least one"):
        fleet.scale("one", 0)


def test_a_copy_that_does_not_drain_is_killed_after_its_grace(
    fleets: Callable[..., Fleet], tmp_path: Path, lines: list[str]
) -> None:
    fleet = fleets(role("stubborn", STUBBORN, grace_s=0.3))
    fleet.scale("stubborn", 2)
    until(lambda: (tmp_path / "stubborn-2.log").read_text().startswith("up"))
    fleet.scale("stubborn", 1)
    until(lambda: set(fleet.pids()) == {"stubborn"}, step=fleet.tick)
    assert "stubborn-2 did not drain" in lines[-1]


def test_two_roles_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must differ"):
        Fleet([role("one", SLEEPER), role("one", SLEEPER)], {}, tmp_path, print)

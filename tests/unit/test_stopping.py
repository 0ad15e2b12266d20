"""A process that is told to stop leaves with code 0, whatever it is doing: starting, serving, failing, or stuck."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HEAD = """
import asyncio, time
from contracts.failures import DatabaseError
from deploy.stopping import end_at_once, stop_signal, until_told

def say(word):
    print(word, flush=True)

end_at_once()
"""

STARTING = """
async def role():
    try:
        say("up")
        await asyncio.sleep(60)
    finally:
        say("closed")
"""

SERVING = """
async def role():
    stop = stop_signal()
    say("up")
    await stop.wait()
    await asyncio.sleep(0.1)
    say("closed")
"""

SERVER_AWAY = """
async def role():
    stop = stop_signal()
    say("up")
    await stop.wait()
    say("closed")
    raise DatabaseError
"""

STUCK = """
async def role():
    stop = stop_signal()
    say("up")
    await stop.wait()
    say("closed")
    await asyncio.shield(asyncio.sleep(60))
"""

BLOCKED = """
async def role():
    stop_signal()
    say("up")
    end = time.monotonic() + 60
    while time.monotonic() < end:  # a handler that never gives the loop back
        pass
"""

RUN = "\nasyncio.run(until_told(role(), 1.0))\n"


def told(program: str) -> tuple[int, str, float]:
    """Exit code, what it said, and the seconds between the signal and its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
        return process.returncode, said, time.monotonic() - began
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("role", "closes"), [(STARTING, True), (SERVING, True), (SERVER_AWAY, True), (STUCK, True), (BLOCKED, False)]
)
def test_whoever_is_told_to_stop_leaves_in_time_with_code_0(role: str, closes: bool) -> None:
    code, said, seconds = told(HEAD + role + RUN)
    assert code == 0
    assert ("closed\n" in said) is closes
    assert seconds < 5


def test_before_a_role_runs_there_is_nothing_to_finish() -> None:
    code, _, seconds = told(HEAD + 'say("up")\ntime.sleep(60)\n')
    assert code == 0
    assert seconds < 5


def test_a_role_that_fails_by_itself_is_not_taken_for_one_that_stopped() -> None:
    program = HEAD + "async def role():\n    raise DatabaseError('away')\n" + RUN
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DatabaseError" in done.stderr


@pytest.mark.parametrize(("error", "code"), [("MessagingFailureError", 3), ("RiskfleetError", 1)])
def test_a_role_that_fails_leaves_although_a_task_will_not_be_cancelled(error: str, code: int) -> None:
    """As the AMQP client's own: its task that connects again takes a cancellation for one more failed try."""
    program = f"""
import asyncio
from contracts.failures import MessagingFailureError, RiskfleetError
from deploy.stopping import left_when_failed, until_told

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue

async def role():
    global kept
    kept = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    raise {error}("the start failed")

asyncio.run(left_when_failed(until_told(role()), leave_s=0.5))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert ended.returncode == code, ended.stderr

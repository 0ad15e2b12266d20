"""Another number of partitions under load: every accepted event is decided once, and the old queues go when empty."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import orjson
import pytest

from contracts.failures import InvalidWorkflowStateError
from contracts.topology import Layout
from deploy import relayout
from deploy.runtime import SystemClock
from deploy.settings import Settings, environment_of
from resilience.management import BrokerManagement
from tests.integration.fleet_fixture import RunningFleet, eventually, show, some_events

pytestmark = pytest.mark.integration

SETTINGS = {"partitions": 8}
V1, V2, V3 = Layout("v1", 8), Layout("v2", 13), Layout("v3", 5)


async def states(settings: Settings) -> dict[str, str]:
    """What `topology check` says of the versions; it finds nothing else to say."""
    report = await relayout.examine(settings)
    assert report.differences == []
    return {one.version: one.state for one in report.versions}


async def held(settings: Settings, layout: Layout, stage: str) -> int:
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    try:
        return await management.depth(layout.stage_queues(stage))
    finally:
        await management.close()


async def there(settings: Settings, layout: Layout) -> set[str]:
    """Queues of a version that the broker has."""
    management = BrokerManagement(settings.need("rabbitmq_management_url"))
    try:
        return set(await management.standing(layout.work_queues()))
    finally:
        await management.close()


async def retire(settings: Settings, version: str, patience_s: float) -> None:
    await relayout.retire(settings, version, patience_s, SystemClock(), show)


class Load:
    """Events through both doors for two tenants, until it is told to stop."""

    def __init__(self, fleet: RunningFleet) -> None:
        self._fleet = fleet
        self._stop = asyncio.Event()
        self.sent: dict[str, list[dict[str, Any]]] = {"acme": [], "globex": []}

    async def run(self) -> None:
        number = 0
        while not self._stop.is_set():
            for name in self.sent:
                events = some_events(f"{name}-{number}", 20, number)
                await self._fleet.send(name, events)
                self.sent[name] += events
            number += 1

    def stop(self) -> None:
        self._stop.set()


async def test_eight_thirteen_five_partitions_under_load_lose_and_repeat_nothing(fleet: RunningFleet) -> None:
    settings = fleet.settings
    load = Load(fleet)
    sending = asyncio.create_task(load.run())
    try:
        await eventually("v1 alone", lambda: states(settings), lambda found: found == {"v1": "filling"}, 30)
        assert await relayout.change(settings, 13) == V2
        scoring = fleet.pids()["scoring"]
        os.kill(scoring, signal.SIGSTOP)  # so that entries of both versions are certainly under way at once
        try:
            await eventually("v2 at scoring", lambda: held(settings, V2, "scoring"), lambda n: n > 0, 60)
            assert await held(settings, V1, "scoring") > 0
            assert await states(settings) == {"v1": "draining", "v2": "filling"}
            with pytest.raises(InvalidWorkflowStateError, match=r"v1 is not drained: \d+ messages are left"):
                await retire(settings, "v1", 0)
        finally:
            os.kill(scoring, signal.SIGCONT)
        assert await relayout.change(settings, 13) == V2
        assert await relayout.change(settings, 5) == V3
        both = {"v1": "draining", "v2": "draining", "v3": "filling"}
        await eventually("v3 takes new entries", lambda: states(settings), lambda found: found == both, 60)
        await asyncio.gather(retire(settings, "v1", 240), retire(settings, "v2", 240))
    finally:
        load.stop()
        await sending
    for name, events in load.sent.items():
        show(name, len(events), "events accepted")
        decided = await fleet.wait_decided(name, events, within_s=120)
        assert set(decided.values()) == {1}
        assert len(decided) == len(events)
        report = await fleet.verified(fleet.scope(name))
        assert report.decisions == len(events)
        assert not await fleet.rows(fleet.scope(name), "SELECT 1 FROM dead_letters")
    await fleet.verified(None)
    assert await states(settings) == {"v3": "filling"}
    assert await there(settings, V1) == await there(settings, V2) == set()
    assert await there(settings, V3) == set(V3.work_queues())
    await fleet.assert_empty()


def topology(fleet: RunningFleet, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "topology", *words]
    environment = os.environ | environment_of(fleet.settings)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_commands_say_what_runs_and_refuse_what_would_lose_something(fleet: RunningFleet) -> None:
    checked = topology(fleet, "check", "--json")
    report = orjson.loads(checked.stdout)
    newest = report["versions"][-1]
    assert (checked.returncode, report["differences"], newest["state"]) == (0, [], "filling")
    told = topology(fleet, "check")
    assert f"{newest['version']}: {newest['partitions']} partitions, filling, 0 messages left" in told.stdout
    same = topology(fleet, "apply", "--partitions", str(newest["partitions"]))
    assert (same.returncode, newest["version"] in same.stdout) == (0, True)
    assert orjson.loads(topology(fleet, "check", "--json").stdout) == report
    refusals = {
        ("retire", newest["version"]): (1, "only an older version can go"),
        ("retire", "v99"): (2, "there is no topology version v99"),
        ("retire", "one"): (2, "there is no topology version one"),
        ("retire", "v99", "--wait", "5"): (2, "--wait"),
        ("apply", "--partitions", "101"): (2, "--partitions"),
    }
    for words, (code, why) in refusals.items():
        answer = topology(fleet, *words)
        assert (answer.returncode, why in " ".join(answer.stderr.split())) == (code, True), answer.stderr
    assert orjson.loads(topology(fleet, "check", "--json").stdout) == report

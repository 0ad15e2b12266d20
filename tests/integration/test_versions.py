"""Another number of partitions under load: every accepted event is decided once, and the old queues go when empty."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from contracts.failures import InvalidWorkflowStateError
from contracts.topology import Layout
from deploy import relayout
from deploy.runtime import SystemClock
from deploy.settings import Settings, SettingsError
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
            waits = lambda layout: held(settings, layout, "scoring")  # noqa: E731
            await eventually("entries of v2 at scoring", lambda: waits(V2), lambda n: n > 0, 60)
            assert await waits(V1) > 0
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


async def test_the_newest_version_and_one_that_there_never_was_cannot_be_retired(fleet: RunningFleet) -> None:
    newest = (await relayout.examine(fleet.settings)).versions[-1].version
    if newest != "v1":
        with pytest.raises(InvalidWorkflowStateError, match="only an older version"):
            await retire(fleet.settings, newest, 0)
    with pytest.raises(SettingsError, match="no old topology version v9"):
        await retire(fleet.settings, "v9", 0)

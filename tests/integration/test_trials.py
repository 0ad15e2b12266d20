"""What is told of models that are only tried, from decisions on a real PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.state import EventState, Shadow
from contracts.tenancy import TenantScope
from governance.postgres import PostgresLedger, create_tenant
from governance.postgres.looking import Looking
from tests.integration import test_approvals
from tests.integration.test_postgres import decided, fresh_scope, received

pytestmark = pytest.mark.integration

LONG_AGO, FAR_OFF = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


database, engine = test_approvals.database, test_approvals.engine


def tried(scope: TenantScope, identity: str, score: float | None) -> EventState:
    """A decided event whose challenger said `score`; its model said 20.5."""
    state = decided(received(scope, identity))
    assert state.validated is not None
    shadow = Shadow(rollout="spring", version="cards@4", score=score, flips=score is None or score > 40)
    return replace(state, validated=state.validated.model_copy(update={"shadow": shadow}))


async def test_a_tenants_trials_are_summed_from_its_own_decisions(engine: AsyncEngine) -> None:
    scope, other = fresh_scope(), fresh_scope()
    for each in (scope, other):
        await create_tenant(engine, each, "A tenant")
    ledger, looking = PostgresLedger(engine), Looking(engine)
    empty = await looking.trials(scope, LONG_AGO)
    assert (empty.looked_at, empty.tried) == (0, ())
    states = [tried(scope, f"e{n}", score) for n, score in enumerate((30.5, 60.5, None))]
    states += [decided(received(scope, "plain")), tried(other, "elsewhere", 99.0)]
    await ledger.record_events(states)
    await ledger.decide(states)
    found = await looking.trials(scope, LONG_AGO)
    assert found.looked_at == 4
    (one,) = found.tried
    assert (one.rollout, one.version, one.events, one.unscored, one.flips) == ("spring", "cards@4", 3, 1, 2)
    assert (one.mean_shift, one.largest_shift) == (25.0, 40.0)
    assert (await looking.trials(scope, FAR_OFF)).looked_at == 0

"""The role `control`: the operator API, and the loops that only read tables: relay, expiry, and the reconciler.

Promises: what a command committed is published by this process or by the next one that starts; two of them may run side
by side. Stops in this order: the API first, so that no command begins; then the expiry; then the relay, which has a
moment to send what was committed last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from deploy import keys
from deploy.credentials import authenticator, token_issuer
from deploy.settings import Settings
from deploy.stopping import stop_signal
from deploy.wiring import Kit, background, healing, health_door, kit, pauses, registry
from gateway.control.app import create_control
from gateway.control.desk import Desk
from gateway.health import CollectorRegistry, serve
from governance.passwords import Passwords
from governance.postgres.approvals import Approvals
from governance.postgres.commands import PeoplePolicy, PeoplePorts
from governance.postgres.directory import PostgresDirectory, tenant_ids
from governance.postgres.gate import RegistryGate
from governance.postgres.ledger import PostgresLedger
from governance.postgres.letters import PostgresLetterDesk
from governance.postgres.looking import Looking
from governance.postgres.missing import PostgresMissing
from governance.postgres.outbox import PostgresOutbox
from governance.postgres.people import People
from governance.registry import Validator, loads_as
from resilience.management import BrokerManagement
from resilience.reconciler import Reconciler
from resilience.relay import OutboxRelay
from workers.judgement.checks import load_guardrail
from workers.judgement.models import coverage, load_model
from workers.judgement.policies import check_policy
from workers.judgement.reasons import load_catalogue
from workers.judgement.rollout import load_trial
from workers.judgement.screening import load_names
from workers.simulation import StageSimulator
from workers.stages import StagePorts

_LAST_WORD_S = 2.0
_DRY_RUNS = 8
"""Letters that are decided again at once, half of them of one tenant."""


def validators() -> Mapping[str, Validator]:
    """What looks at content before it is submitted: the very functions that read it when it decides."""
    return {
        "model": loads_as("model", load_model, coverage),
        "policy": loads_as("policy", check_policy),
        "guardrail": loads_as("guardrail", load_guardrail),
        "lists": loads_as("lists", load_names),
        "reasons": loads_as("reasons", load_catalogue),
        "trial": loads_as("trial", load_trial),
    }


async def run_control(settings: Settings) -> None:
    """The operator API, until SIGTERM or SIGINT. Raises SettingsError without the keys that it signs with."""
    async with kit(settings, "control") as k:
        management = BrokerManagement(settings.need("rabbitmq_management_url"))
        try:
            await _serve(settings, k, management)
        finally:
            await management.close()


async def _serve(settings: Settings, k: Kit, management: BrokerManagement) -> None:
    pepper = keys.pepper(settings)
    directory = PostgresDirectory(k.engine, k.clock, pepper)
    relay = OutboxRelay(PostgresOutbox(k.engine), k.publisher, k.telemetry)
    approvals = Approvals(k.engine, k.clock, k.layouts, k.telemetry)
    reconciler = Reconciler(PostgresMissing(k.engine), k.publisher, k.telemetry, k.clock, k.layouts)
    tokens = token_issuer(settings)
    ports = PeoplePorts(k.engine, k.clock, k.ids, Passwords(), k.layouts, tokens, management)
    people = People(ports, PeoplePolicy(pepper, settings.token_ttl))
    velocity = healing(k)
    dry_ports = StagePorts(PostgresLedger(k.engine), registry(k), velocity, recording=False)
    desk = Desk(
        credentials=authenticator(settings, directory, k.clock),
        exists=people.tenants.exists,
        gate=RegistryGate(k.engine, k.clock, k.layouts, keys.artifact_signer(settings), validators()),
        people=people,
        approvals=approvals,
        looking=Looking(k.engine, k.state_store),
        letters=PostgresLetterDesk(k.engine, k.clock, k.ids, k.layouts),
        redecider=StageSimulator(dry_ports, k.clock, k.ids, _DRY_RUNS),
        pauses=pauses(k),
        telemetry=k.telemetry,
        clock=k.clock,
        committed=relay.wake,
    )

    door = health_door(k, CollectorRegistry(), lambda: None)
    app = create_control(desk, door, k.ids)
    stop, last = stop_signal(), asyncio.Event()
    relaying = asyncio.create_task(relay.run(last), name="relay")
    relaying.add_done_callback(lambda _: stop.set())  # without it, commands would commit and say nothing to anybody
    try:
        loops = (
            approvals.run_expiry(stop, committed=relay.wake),
            reconciler.run(),
            velocity.run(partial(tenant_ids, k.engine)),
        )
        async with background(k, stop, *loops):
            await serve(app, settings.control_host, settings.control_port, stop=stop)
    finally:
        last.set()
        relay.wake()
        await asyncio.wait({relaying}, timeout=_LAST_WORD_S)
        relaying.cancel()
        (ended,) = await asyncio.gather(relaying, return_exceptions=True)
    if isinstance(ended, Exception):
        raise ended

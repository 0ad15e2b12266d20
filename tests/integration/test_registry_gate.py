"""What the gate promises: nothing decides that was not approved by somebody else than its author.

The commands are tried as their callers give them; the same rules once more by plain SQL, as any other program that
has the application's role could try it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.codec import Entry, decode_carrier, record_of_entry
from contracts.failures import (
    AuthorizationError,
    ConflictError,
    InvalidModelStateError,
    InvalidRequestError,
    NotKnownError,
)
from contracts.identity import EVERYWHERE, Grant, Principal, Role
from contracts.ports import Artifact, TenantProfile
from contracts.state import Pin, Thresholds
from contracts.telemetry import TRANSITIONS as TRANSITIONS_COUNTED
from contracts.tenancy import TenantScope
from contracts.topology import Layouts
from deploy.migrations.upgrade import role_of, upgrade
from deploy.runtime import RandomIds, SystemClock
from deploy.servers import ServerUrls
from gateway.calls import routes
from gateway.control.desk import Desk
from gateway.control.registry import calls
from gateway.web import application
from governance.postgres.engine import create_engine, transaction
from governance.postgres.gate import RegistryGate
from governance.postgres.registry import PostgresRegistry
from governance.registry import (
    KINDS,
    MAX_CONTENT_BYTES,
    TRANSITIONS,
    Choice,
    Draft,
    Version,
    VersionKey,
    VersionStatus,
    release_artifacts,
)
from governance.signing import Signer, Verifier
from tests.fakes import InMemoryDirectory, RecordingTelemetry

pytestmark = pytest.mark.integration

RACES = int(os.environ.get("RISKFLEET_TEST_RACES", "40"))
SIGNER = Signer(b"s" * 32)
WHY = "as agreed"


def person(name: str, *roles: Role, actor: str = "") -> Principal:
    return Principal(actor or f"user:{name}", name, frozenset(Grant(EVERYWHERE, role) for role in roles))


ANN, BOB, CYD = person("ann", Role.ANALYST), person("bob", Role.APPROVER), person("cyd", Role.APPROVER)


def sound(content: Any, catalogues: Sequence[Artifact] = (), /) -> Sequence[tuple[str, str]]:
    if content.get("type") == "wordless":
        return () if any("WORD" in catalogue.content["codes"] for catalogue in catalogues) else (("", "has no words"),)
    return (("/type", "is not one that decides"),) if content.get("type") == "broken" else ()


@pytest.fixture(scope="module")
def database(servers: ServerUrls) -> ServerUrls:
    upgrade(servers.migration_database, role_of(servers.database))
    return servers


@pytest.fixture
async def engine(database: ServerUrls) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(database.database, pool_size=8)
    yield engine
    await engine.dispose()


@pytest.fixture
async def owner(database: ServerUrls) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(database.migration_database, pool_size=1)
    yield engine
    await engine.dispose()


@pytest.fixture
def gate(engine: AsyncEngine) -> RegistryGate:
    return RegistryGate(
        engine,
        SystemClock(),
        Layouts.first(4),
        SIGNER,
        dict.fromkeys((kind for kind in KINDS if kind != "prompt"), sound),
    )


@pytest.fixture
def reader(engine: AsyncEngine) -> PostgresRegistry:
    return PostgresRegistry(engine, SystemClock(), Verifier([SIGNER.public]))


@pytest.fixture
def scope() -> TenantScope:
    return TenantScope("t" + secrets.token_hex(6))


def draft(name: str = "own", kind: str = "model", **fields: Any) -> Draft:
    document = {
        "kind": kind,
        "name": name,
        "content": {"type": "scorecard", "salt": secrets.token_hex(8)},
        "reason": "a better one",
        "owner": "risk team",
        "purpose": "orders events by risk",
        "use_tag": "fraud",
        "limitations": "expert points",
        "evidence": {"auc": 0.8},
    }
    return Draft.model_validate(document | fields)


async def registered(gate: RegistryGate, scope: TenantScope | None, given: Draft | None = None) -> Version:
    return await gate.register(ANN, scope, given or draft())


async def submitted(gate: RegistryGate, scope: TenantScope | None, given: Draft | None = None) -> Version:
    version = await registered(gate, scope, given)
    return await gate.submit(ANN, scope, version.key, version.digest, WHY)


async def approved(gate: RegistryGate, scope: TenantScope | None, given: Draft | None = None) -> Version:
    version = await submitted(gate, scope, given)
    return await gate.approve(BOB, scope, version.key, version.digest, WHY)


async def active(
    gate: RegistryGate, scope: TenantScope | None, given: Draft | None = None, at: str = "risk"
) -> Version:
    version = await approved(gate, scope, given)
    return (await gate.activate(CYD, scope, [choice(version, at)], WHY))[0]


def choice(version: Version, at: str = "risk") -> Choice:
    return Choice(kind=version.kind, name=version.name, version=version.version, scope_key=at)


async def rows(engine: AsyncEngine, scopes: Sequence[TenantScope | None], sql: str, **values: Any) -> list[Any]:
    async with transaction(engine, scopes) as connection:
        return list((await connection.execute(text(sql), values)).all())


async def outcomes(calls: Sequence[Awaitable[Any]]) -> list[str]:
    """What each of some calls at once came to: "done", or the name of its error."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    return sorted("done" if not isinstance(each, BaseException) else type(each).__name__ for each in results)


async def model_of(reader: PostgresRegistry, scope: TenantScope) -> Pin | None:
    return (await reader.active([scope], "risk", ["login"]))[0].model


async def status(gate: RegistryGate, scope: TenantScope | None, version: Version) -> str:
    return (await gate.show(scope, version.key)).status


# --- the way of a version -----------------------------------------------------------------------------


async def test_a_version_decides_once_it_was_approved_by_somebody_else_and_activated(
    gate: RegistryGate, reader: PostgresRegistry, scope: TenantScope
) -> None:
    given = draft(valid_until="2099-12-31T00:00:00Z", validator="vic")
    version = await active(gate, scope, given)
    assert (version.version, version.author, version.approver, version.status) == (1, "ann", "bob", "active")
    assert (version.key_id, version.validator, version.valid_until) == (SIGNER.key_id, "vic", "2099-12-31T00:00:00Z")
    (found,) = await reader.active([scope], "risk", ["payment.card"])
    assert found.model == Pin(name="own", version=1, digest=version.digest)
    assert (await reader.artifacts([found.model]))[0].content == given.content
    shown = await gate.show(scope, version.key)
    assert (shown.content, shown.evidence) == (given.content, {"auc": 0.8})
    own = [placement for placement in await gate.active(scope) if not placement.shared]
    assert [(p.kind, p.scope_key, p.name, p.version, p.usable) for p in own] == [("model", "risk", "own", 1, True)]


async def test_every_command_writes_its_record_in_its_own_transaction(
    gate: RegistryGate, engine: AsyncEngine, scope: TenantScope
) -> None:
    version = await active(gate, scope)
    with pytest.raises(ConflictError):
        await gate.approve(CYD, scope, version.key, version.digest, WHY)
    await gate.set_halt(BOB, scope, "*", "incident")
    await gate.clear_halt(BOB, scope, "*", "over")
    await gate.revoke(CYD, scope, version.key, version.digest, "wrong")
    bodies = [bytes(row.body) for row in await rows(engine, [scope], "SELECT body FROM outbox ORDER BY position")]
    entries = [entry for body in bodies for entry in decode_carrier(body) if isinstance(entry, Entry)]
    records = [orjson.loads(record_of_entry(entry).body) for entry in entries]
    assert [(record["action"], record["person"]) for record in records] == [
        ("registry.registered", "ann"),
        ("registry.submitted", "ann"),
        ("registry.approved", "bob"),
        ("registry.activated", "cyd"),
        ("halt.set", "bob"),
        ("halt.cleared", "bob"),
        ("registry.revoked", "cyd"),
    ]
    assert all(record["tenant"] == scope.tenant_id and record["detail"]["reason"] for record in records)
    assert records[2]["subject"] == {"kind": "model", "name": "own", "version": 1, "digest": version.digest}


async def test_versions_registered_at_once_get_different_numbers(gate: RegistryGate, scope: TenantScope) -> None:
    made = await asyncio.gather(*(registered(gate, scope) for _ in range(6)))
    assert sorted(version.version for version in made) == [1, 2, 3, 4, 5, 6]


async def test_the_same_content_is_not_registered_twice_unless_the_first_may_not_be_used(
    gate: RegistryGate, scope: TenantScope
) -> None:
    given = draft()
    first = await registered(gate, scope, given)
    with pytest.raises(ConflictError, match=r"own version 1 \(draft\)"):
        await registered(gate, scope, given.model_copy(update={"name": "other"}))
    await gate.reject(BOB, scope, first.key, first.digest, "no evaluation")
    assert (await registered(gate, scope, given)).version == 2
    assert await outcomes([registered(gate, scope, again) for again in [draft()] * 3]) == ["ConflictError"] * 2 + [
        "done"
    ]


async def test_nobody_approves_their_own_version_with_whatever_credential(
    gate: RegistryGate, scope: TenantScope
) -> None:
    version = await submitted(gate, scope)
    for other_self in (person("ann", *Role), person("ann", Role.APPROVER, actor="key:rfk_000000000000")):
        with pytest.raises(AuthorizationError, match="own version"):
            await gate.approve(other_self, scope, version.key, version.digest, WHY)
    assert await status(gate, scope, version) == "submitted"


async def test_a_credential_without_a_person_commands_nothing(gate: RegistryGate, scope: TenantScope) -> None:
    nobody = Principal("key:demo", "", frozenset({Grant(EVERYWHERE, Role.APPROVER)}))
    version = await submitted(gate, scope)
    commands = [
        gate.register(nobody, scope, draft()),
        gate.submit(nobody, scope, version.key, version.digest, WHY),
        gate.approve(nobody, scope, version.key, version.digest, WHY),
        gate.activate(nobody, scope, [choice(version)], WHY),
        gate.set_halt(nobody, scope, "*", WHY),
    ]
    assert await outcomes(commands) == ["AuthorizationError"] * 5


async def test_an_approval_is_of_the_content_that_the_approver_names(gate: RegistryGate, scope: TenantScope) -> None:
    version = await submitted(gate, scope)
    with pytest.raises(ConflictError, match=version.digest):
        await gate.approve(BOB, scope, version.key, "0" * 64, WHY)
    with pytest.raises(InvalidRequestError):
        await gate.approve(BOB, scope, version.key, version.digest, " ")


async def test_content_that_cannot_be_used_is_not_submitted(gate: RegistryGate, scope: TenantScope) -> None:
    async def wrong(given: Draft) -> tuple[tuple[str, str], ...]:
        version = await registered(gate, scope, given)
        with pytest.raises(InvalidRequestError) as caught:
            await gate.submit(ANN, scope, version.key, version.digest, WHY)
        assert await status(gate, scope, version) == "draft"
        return caught.value.pointers

    assert await wrong(draft(kind="policy", content={"type": "broken"})) == (
        ("/content/type", "is not one that decides"),
    )
    assert [pointer for pointer, _ in await wrong(draft(evidence={}))] == ["/evidence"]
    prompt = draft(kind="prompt", content={"template": "Hello {{name}}", "variables": {}})
    assert [pointer for pointer, _ in await wrong(prompt)] == ["/content/template"]


async def test_a_model_may_leave_its_words_to_a_catalogue_that_decides_where_it_will(
    gate: RegistryGate, scope: TenantScope
) -> None:
    model = await registered(gate, scope, draft(content={"type": "wordless"}))
    words = {"type": "catalogue", "codes": {"WORD": {"text": "a word", "adverse_action": "A word."}}}
    catalogue = await approved(gate, scope, draft("words", "reasons", content=words))

    async def submit() -> Version:
        return await gate.submit(ANN, scope, model.key, model.digest, WHY)

    with pytest.raises(InvalidRequestError):
        await submit()  # approved is not yet active
    await gate.activate(CYD, scope, [choice(catalogue)], WHY)
    assert (await submit()).status is VersionStatus.SUBMITTED


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"validator": "ann"}, "/validator"),
        ({"valid_until": "2001-01-01T00:00:00Z"}, "/valid_until"),
        ({"content": {"text": "x" * MAX_CONTENT_BYTES}}, "/content"),
    ],
)
async def test_a_version_that_could_never_be_used_is_not_registered(
    gate: RegistryGate, scope: TenantScope, fields: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await registered(gate, scope, draft(**fields))
    assert [place for place, _ in caught.value.pointers] == [pointer]


async def test_another_tenants_versions_do_not_exist(gate: RegistryGate, scope: TenantScope) -> None:
    version = await submitted(gate, scope)
    other = TenantScope(scope.tenant_id + "x")
    assert await gate.list(other) == []
    calls = [gate.show(other, version.key), gate.approve(BOB, other, version.key, version.digest, WHY)]
    assert await outcomes(calls) == ["NotKnownError"] * 2
    assert [each.key for each in await gate.list(scope, "model", VersionStatus.SUBMITTED)] == [version.key]


# --- what decides -------------------------------------------------------------------------------------


async def test_what_is_replaced_is_retired_when_it_decides_nowhere_else(gate: RegistryGate, scope: TenantScope) -> None:
    first, second = await active(gate, scope), await approved(gate, scope)
    await gate.activate(CYD, scope, [choice(first, "risk:login")], WHY)
    await gate.activate(CYD, scope, [choice(second)], WHY)
    assert (await status(gate, scope, first), await status(gate, scope, second)) == ("active", "active")
    with pytest.raises(ConflictError, match="risk:login"):
        await gate.retire(CYD, scope, first.key, first.digest, WHY)
    await gate.activate(CYD, scope, [choice(second, "risk:login")], WHY)
    assert await status(gate, scope, first) == "retired"
    with pytest.raises(ConflictError, match="already active"):
        await gate.activate(CYD, scope, [choice(second), choice(second, "risk:login")], WHY)


async def test_versions_become_active_together_or_not_at_all(
    gate: RegistryGate, engine: AsyncEngine, scope: TenantScope
) -> None:
    """A reader that asks all the time sees model and policy of one number only."""
    pairs = [(await approved(gate, scope), await approved(gate, scope, draft("rules", "policy"))) for _ in range(2)]
    with pytest.raises(ConflictError, match="draft"):
        await gate.activate(CYD, scope, [choice(pairs[0][0]), choice(await registered(gate, scope), "compliance")], WHY)
    assert [placement for placement in await gate.active(scope) if not placement.shared] == []
    await gate.activate(CYD, scope, [choice(version) for version in pairs[0]], WHY)
    seen, over = set(), asyncio.Event()

    async def look() -> None:
        while not over.is_set():
            reader = PostgresRegistry(engine, SystemClock(), Verifier([SIGNER.public]))
            (found,) = await reader.active([scope], "risk", ["login"])
            seen.add((found.model and found.model.version, found.policy and found.policy.version))

    looking = [asyncio.create_task(look()) for _ in range(2)]
    for pair in itertools.islice(itertools.cycle(reversed(pairs)), 20):
        await gate.activate(CYD, scope, [choice(version) for version in pair], WHY)
    over.set()
    await asyncio.gather(*looking)
    assert seen == {(1, 1), (2, 2)}


async def test_a_rollback_brings_back_what_was_active_before_and_goes_further_when_repeated(
    gate: RegistryGate, reader: PostgresRegistry, scope: TenantScope
) -> None:
    versions = [await active(gate, scope) for _ in range(3)]
    for expected in (2, 1):
        back = await gate.rollback(CYD, scope, "model", "risk", WHY)
        assert back is not None
        assert (back.version, back.status) == (expected, "active")
    assert [await status(gate, scope, version) for version in versions] == ["active", "retired", "retired"]
    assert await gate.rollback(CYD, scope, "model", "risk", WHY) is None
    model = await model_of(reader, scope)
    assert model is not None
    assert model.name != "own"  # the whole installation's decides again
    assert await status(gate, scope, versions[0]) == "retired"
    with pytest.raises(ConflictError, match="nothing was activated"):
        await gate.rollback(CYD, scope, "model", "risk", WHY)
    history = await gate.history(scope, "model", "risk")
    assert [(each.action, each.version) for each in history] == [
        *(("activate", version) for version in (1, 2, 3)),
        *(("rollback", version) for version in (2, 1, None)),
    ]


async def test_a_rollback_to_what_was_revoked_is_refused(gate: RegistryGate, scope: TenantScope) -> None:
    first, second = await active(gate, scope), await active(gate, scope)
    await gate.revoke(BOB, scope, first.key, first.digest, WHY)
    with pytest.raises(ConflictError, match="revoked"):
        await gate.rollback(CYD, scope, "model", "risk", WHY)
    assert await status(gate, scope, second) == "active"


async def test_a_revoked_version_decides_nowhere_and_nothing_takes_its_place(
    gate: RegistryGate, reader: PostgresRegistry, scope: TenantScope
) -> None:
    version = await active(gate, scope)
    pin = Pin(name=version.name, version=version.version, digest=version.digest)
    await gate.revoke(BOB, scope, version.key, version.digest, "harmful")
    assert await model_of(reader, scope) is None
    assert list(await reader.revoked([pin])) == [True]
    assert [placement.usable for placement in await gate.active(scope) if not placement.shared] == [False]
    calls = [
        gate.activate(CYD, scope, [choice(version, "compliance")], WHY),
        gate.approve(CYD, scope, version.key, version.digest, WHY),
    ]
    assert await outcomes(calls) == ["ConflictError"] * 2


async def test_in_the_place_of_a_revoked_version_a_person_puts_another(gate: RegistryGate, scope: TenantScope) -> None:
    first, second = await active(gate, scope), await active(gate, scope)
    await gate.revoke(BOB, scope, second.key, second.digest, "harmful")
    back = await gate.rollback(CYD, scope, "model", "risk", WHY)
    assert back is not None
    assert (back.version, back.status) == (first.version, "active")
    await gate.revoke(BOB, scope, first.key, first.digest, "harmful too")
    third = await active(gate, scope)
    assert [await status(gate, scope, each) for each in (first, second, third)] == ["revoked", "revoked", "active"]


async def test_a_version_whose_validation_expired_does_not_decide(
    gate: RegistryGate, reader: PostgresRegistry, engine: AsyncEngine, scope: TenantScope
) -> None:
    until = datetime.now(UTC) + timedelta(seconds=1)
    version = await active(gate, scope, draft(valid_until=until.isoformat()))
    late = await submitted(gate, scope, draft(valid_until=until.isoformat()))
    assert await model_of(reader, scope) is not None
    async with asyncio.timeout(5):
        while True:
            if await model_of(reader, scope) is None:
                break
            await asyncio.sleep(0.05)
    assert datetime.now(UTC) - until < timedelta(seconds=2)
    calls = [
        gate.activate(CYD, scope, [choice(version, "compliance")], WHY),
        gate.approve(BOB, scope, late.key, late.digest, WHY),
    ]
    assert await outcomes(calls) == ["ConflictError"] * 2
    move = "INSERT INTO registry_active (tenant, kind, scope_key, name, version) VALUES (:t, 'model', 'x', 'own', 1)"
    with pytest.raises(DBAPIError, match="has not expired"):
        await rows(engine, [scope], move, t=scope.tenant_id)


async def test_a_change_is_seen_within_two_seconds_without_a_restart(
    gate: RegistryGate, reader: PostgresRegistry, scope: TenantScope
) -> None:
    await active(gate, scope)
    assert await model_of(reader, scope) is not None
    second = await active(gate, scope)
    async with asyncio.timeout(2):
        while True:
            model = await model_of(reader, scope)
            if model is not None and model.version == second.version:
                break
            await asyncio.sleep(0.02)


async def test_a_halt_holds_for_its_tenant_and_model_or_for_all(
    gate: RegistryGate, engine: AsyncEngine, scope: TenantScope
) -> None:
    await active(gate, scope)
    other = TenantScope(scope.tenant_id + "x")

    async def halted(where: TenantScope) -> bool:
        reader = PostgresRegistry(engine, SystemClock(), Verifier([SIGNER.public]))
        return (await reader.active([where], "risk", ["login"]))[0].halted

    for place, model, holds in [
        (scope, "*", [True, False]),
        (scope, "own", [True, False]),
        (scope, "another", [False, False]),
        (None, "own", [True, False]),
        (None, "*", [True, True]),
    ]:
        halt = await gate.set_halt(BOB, place, model, "incident")
        assert [await halted(scope), await halted(other)] == holds, (place, model)
        assert halt in await gate.halts(scope)
        await gate.clear_halt(BOB, place, model, "over")
    assert not await halted(scope)
    with pytest.raises(NotKnownError):
        await gate.clear_halt(BOB, scope, "*", "over")


async def test_what_every_tenant_uses_goes_through_the_same_gate(
    gate: RegistryGate, reader: PostgresRegistry, engine: AsyncEngine, scope: TenantScope
) -> None:
    name, place = "shared-" + secrets.token_hex(4), "risk:test." + secrets.token_hex(4)
    version = await active(gate, None, draft(name), place)
    (found,) = await reader.active([scope], "risk", [place.removeprefix("risk:")])
    assert found.model == Pin(name=name, version=1, digest=version.digest)
    assert (await reader.artifacts([found.model]))[0].pin == found.model
    records = await rows(
        engine, [None], "SELECT tenant FROM outbox WHERE position(:name IN encode(body, 'escape')) > 0", name=name
    )
    assert {record.tenant for record in records} == {"_system"}
    assert len(records) == 4
    with pytest.raises(ConflictError, match="nothing was active at this place before"):
        await gate.rollback(CYD, None, "model", place, WHY)
    default = await gate.history(None, "model", "risk")
    assert (default[0].action, default[0].activated_by) == ("activate", "riskfleet")


async def test_signatures_of_an_older_key_hold_as_long_as_it_is_trusted(
    gate: RegistryGate, engine: AsyncEngine, scope: TenantScope
) -> None:
    version = await active(gate, scope)
    pin = Pin(name=version.name, version=version.version, digest=version.digest)
    newer = Signer(b"n" * 32)
    both = PostgresRegistry(engine, SystemClock(), Verifier([newer.public, SIGNER.public]))
    assert (await both.artifacts([pin]))[0].pin == pin
    with pytest.raises(InvalidModelStateError, match="not trusted"):
        await PostgresRegistry(engine, SystemClock(), Verifier([newer.public])).artifacts([pin])


async def test_a_diff_names_the_lines_that_changed(gate: RegistryGate, scope: TenantScope) -> None:
    first = await registered(gate, scope, draft(content={"a": 1, "b": 2}))
    second = await registered(gate, scope, draft(content={"a": 1, "b": 3}))
    lines = await gate.diff(scope, first.key, second.key)
    assert lines[:2] == ["--- model own version 1", "+++ model own version 2"]
    assert [line for line in lines[2:] if line[0] in "+-"] == ['-  "b": 2', '+  "b": 3']


# --- through the operator API -------------------------------------------------------------------------


@dataclass
class Office:
    """The registry's calls over the real gate; a bearer credential is the name of a person."""

    http: httpx.AsyncClient
    telemetry: RecordingTelemetry
    committed: list[str]

    async def ask(self, who: str, method: str, path: str, body: Any = None, **query: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {who}", "Content-Type": "application/json"}
        content = None if body is None else orjson.dumps(body)
        return await self.http.request(method, path, content=content, params=query or None, headers=headers)


@pytest.fixture
async def office(gate: RegistryGate, scope: TenantScope) -> AsyncIterator[Office]:
    roles = {"ann": Role.ANALYST, "bob": Role.APPROVER, "vic": Role.VIEWER, "ada": Role.ADMIN}
    directory = InMemoryDirectory()
    directory.profiles[scope] = TenantProfile(scope, "Acme", None, Thresholds())
    for name, role in roles.items():
        directory.keys[name] = Principal(f"user:{name}", name, frozenset({Grant(scope.tenant_id, role)}))
    directory.keys["eve"] = Principal("user:eve", "eve", frozenset({Grant("other", role) for role in Role}))
    telemetry, committed = RecordingTelemetry(), list[str]()
    nothing: Any = None
    desk = Desk(
        credentials=directory,
        exists=directory.serves,
        gate=gate,
        people=nothing,
        approvals=nothing,
        looking=nothing,
        letters=nothing,
        redecider=nothing,
        pauses=nothing,
        telemetry=telemetry,
        clock=SystemClock(),
        committed=lambda: committed.append("committed"),
    )
    app = application(routes(calls(desk)), RandomIds())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://control") as http:
        yield Office(http, telemetry, committed)


async def test_a_version_goes_its_way_through_the_api(office: Office, scope: TenantScope) -> None:
    root = f"/ops/v1/tenants/{scope}/registry"
    given = draft().model_dump(mode="json")
    made = await office.ask("ann", "POST", root, given)
    assert made.status_code == 201, made.text
    version = made.json()
    one, why = f"{root}/model/own/1", {"digest": version["digest"], "reason": WHY}
    assert (await office.ask("ann", "POST", f"{one}/submit", why)).json()["status"] == "submitted"
    shown = (await office.ask("vic", "GET", one)).json()
    assert (shown["content"], shown["status"]) == (given["content"], "submitted")
    assert (await office.ask("bob", "POST", f"{one}/approve", why)).json()["approver"] == "bob"
    go = {"activations": [{"kind": "model", "name": "own", "version": 1, "scope_key": "risk"}], "reason": WHY}
    assert (await office.ask("bob", "POST", f"{root}/activate", go)).json()["versions"][0]["status"] == "active"
    listed = (await office.ask("vic", "GET", root, kind="model", status="active")).json()["versions"]
    assert [(each["version"], each["evidence"]) for each in listed] == [(1, {})]  # a report may be 500 KB
    assert shown["evidence"] == given["evidence"]
    placed = (await office.ask("vic", "GET", f"{root}/active")).json()["active"]
    assert [each["name"] for each in placed if not each["shared"]] == ["own"]
    history = await office.ask("vic", "GET", f"{root}/history", kind="model", scope_key="risk")
    assert [each["action"] for each in history.json()["history"]] == ["activate"]
    back = {"kind": "model", "scope_key": "risk", "reason": WHY}
    assert (await office.ask("bob", "POST", f"{root}/rollback", back)).json() == {"version": None}
    assert (await office.ask("bob", "POST", f"{one}/revoke", why)).json()["status"] == "revoked"
    assert len(office.committed) == 6
    counted = [each.labels["to"] for each in office.telemetry.measurements if each.metric == TRANSITIONS_COUNTED]
    assert counted == ["draft", "submitted", "approved", "active", "revoked"]


async def test_halts_go_through_the_api(office: Office, scope: TenantScope) -> None:
    path, why = f"/ops/v1/tenants/{scope}/halts", {"reason": "incident"}
    assert (await office.ask("ann", "PUT", f"{path}/*", why)).status_code == 403
    assert (await office.ask("ada", "PUT", f"{path}/%2A", why)).json()["model"] == "*"
    assert (await office.ask("bob", "PUT", f"{path}/own", why)).status_code == 200
    found = (await office.ask("vic", "GET", path)).json()["halts"]
    assert [each["model"] for each in found if not each["shared"]] == ["*", "own"]
    assert (await office.ask("bob", "DELETE", f"{path}/*", why)).status_code == 204
    assert (await office.ask("bob", "DELETE", f"{path}/*", why)).status_code == 404
    assert (await office.ask("bob", "DELETE", f"{path}/own", {})).status_code == 422


async def test_what_cannot_be_done_is_a_problem_document(
    office: Office, gate: RegistryGate, scope: TenantScope
) -> None:
    root = f"/ops/v1/tenants/{scope}/registry"
    version = await submitted(gate, scope)
    one, why = f"{root}/model/own/1", {"digest": version.digest, "reason": WHY}
    given = draft().model_dump(mode="json")
    wrong_version = {"kind": "model", "name": "own", "version": 2**40, "scope_key": "risk"}
    refused: list[tuple[int, str, str, str, Any]] = [
        (401, "nobody", "GET", root, None),
        (404, "eve", "GET", root, None),
        (404, "eve", "POST", f"{one}/approve", why),
        (403, "vic", "POST", root, given),
        (403, "ann", "POST", f"{one}/approve", why),
        (403, "bob", "GET", "/ops/v1/tenants/_shared/registry", None),
        (404, "bob", "POST", f"{root}/model/own/9/approve", why),
        (404, "bob", "GET", f"{root}/model/own/99999999999999999999", None),
        (404, "bob", "GET", f"{root}/model/own/{'9' * 5_000}", None),
        (401, "nobody", "GET", f"{root}/model/own/{'9' * 5_000}", None),
        (404, "bob", "GET", f"{root}/model/own/\u0661", None),
        (404, "bob", "GET", f"{root}/model/own/-1", None),
        (404, "bob", "GET", f"{root}/model/OWN/1", None),
        (404, "bob", "GET", f"{root}/code/own/1", None),
        (404, "bob", "GET", f"{root}/model/own/x", None),
        (409, "bob", "POST", f"{one}/approve", why | {"digest": "0" * 64}),
        (409, "bob", "POST", f"{one}/retire", why),
        (409, "ann", "POST", root, given | {"content": (await gate.show(scope, version.key)).content}),
        (422, "bob", "POST", f"{one}/approve", {"digest": version.digest}),
        (422, "bob", "POST", f"{one}/approve", why | {"approver": "ann"}),
        (422, "ann", "POST", root, given | {"kind": "code"}),
        (422, "ann", "POST", root, []),
        (400, "ann", "POST", root, given | {"content": {"text": "\0"}}),
        (422, "bob", "POST", f"{root}/activate", {"activations": [wrong_version], "reason": WHY}),
        (422, "bob", "POST", f"{root}/activate", {"activations": [], "reason": WHY}),
        (422, "bob", "POST", f"{root}/rollback", {"kind": "model", "scope_key": "everything", "reason": WHY}),
        (422, "bob", "GET", f"{root}?status=good", None),
        (422, "bob", "GET", f"{root}/model/own/diff?from=1", None),
        (404, "bob", "GET", f"{root}/model/own/diff?from=1&to=2", None),
        (404, "bob", "PUT", f"/ops/v1/tenants/{scope}/halts/OWN", {"reason": WHY}),
        (405, "bob", "DELETE", root, None),
    ]
    for status, who, method, path, body in refused:
        answer = await office.ask(who, method, path, body)
        assert answer.status_code == status, (who, method, path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
    assert office.committed == []
    assert [each.status for each in await gate.list(scope)] == ["submitted"]


# --- races --------------------------------------------------------------------------------------------


async def test_of_many_who_do_the_same_at_once_one_does_it(
    gate: RegistryGate, engine: AsyncEngine, scope: TenantScope
) -> None:
    """RISKFLEET_TEST_RACES rounds; two to four approvals at once, then as many activations."""
    for race in range(RACES):
        version, rivals = await submitted(gate, scope), 2 + race % 3
        people = [person(f"p{i}", Role.APPROVER) for i in range(rivals)]
        expected = ["ConflictError"] * (rivals - 1) + ["done"]
        approvals = [gate.approve(each, scope, version.key, version.digest, WHY) for each in people]
        assert await outcomes(approvals) == expected
        activations = [gate.activate(each, scope, [choice(version)], WHY) for each in people]
        assert await outcomes(activations) == expected
    for table in ("registry_approvals", "registry_activations"):
        found = await rows(
            engine, [scope], f"SELECT version FROM {table} WHERE tenant = :t ORDER BY 1", t=scope.tenant_id
        )
        assert [row.version for row in found] == list(range(1, RACES + 1))


async def test_of_approval_and_rejection_at_once_one_holds(gate: RegistryGate, scope: TenantScope) -> None:
    for _ in range(5):
        version = await submitted(gate, scope)
        calls = [
            gate.approve(BOB, scope, version.key, version.digest, WHY),
            gate.reject(CYD, scope, version.key, version.digest, WHY),
        ]
        assert await outcomes(calls) == ["ConflictError", "done"]


# --- the tables, against any other program ------------------------------------------------------------


async def test_the_tables_hold_the_same_moves_as_the_code(engine: AsyncEngine) -> None:
    found = await rows(engine, [], "SELECT from_status, to_status FROM registry_transitions")
    assert {tuple(row) for row in found} == {(str(start), str(to)) for start, to in TRANSITIONS}


def update(changes: str) -> str:
    return f"UPDATE registry_versions SET {changes}"


def approve(found: str, who: str = "eve", digest: str = "digest") -> str:
    read = f"SELECT tenant, kind, name, version, {digest}, '{who}', '', now() FROM registry_versions"
    return f"INSERT INTO registry_approvals {read} WHERE tenant = :t AND status = '{found}'"


def insert(columns: str = "", values: str = "", **fields: str) -> str:
    given = {"tenant": ":t", "digest": "encode(sha256('{}'), 'hex')", "author": "'ann'"} | fields
    return (
        f"INSERT INTO registry_versions (kind, name, version, content, reason, tenant, digest, author{columns})"
        f" VALUES ('model', 'm', 1, '{{}}', '', {', '.join(given.values())}{values})"
    )


_ACTIVATE = (
    "INSERT INTO registry_active SELECT tenant, kind, 'x', name, version FROM registry_versions WHERE tenant = :t"
)
_REPLACE = "UPDATE registry_active SET version = v.version FROM registry_versions v WHERE v.tenant = :t"
_DONE = ", status, approver, approved_at"
_CHANGES = [
    (update("content = '{}', digest = encode(sha256('{}'), 'hex')"), "permission denied"),
    (update("author = 'eve'"), "permission denied"),
    (update("evidence = '{}'"), "permission denied"),
    (update("valid_until = NULL"), "permission denied"),
    ("DELETE FROM registry_versions", "permission denied"),
    ("UPDATE registry_approvals SET approver = 'eve'", "permission denied"),
    ("DELETE FROM registry_approvals", "permission denied"),
    ("UPDATE registry_activations SET activated_by = 'eve'", "permission denied"),
    ("DELETE FROM registry_activations", "permission denied"),
    ("INSERT INTO registry_transitions VALUES ('draft', 'active')", "permission denied"),
    (update("approver = 'eve' WHERE status = 'active'"), "an approval never changes"),
    (update("signature = '' WHERE status = 'active'"), "an approval never changes"),
    (update("approver = 'eve' WHERE status = 'draft'"), "an approval never changes"),
    (update("submitted_at = now() WHERE status = 'active'"), "submitted once"),
    (
        update("status = 'approved', approver = 'eve', approved_at = now() WHERE status = 'submitted'"),
        "approved by a row",
    ),
    (approve("submitted", who="ann"), "nobody approves their own version"),
    (approve("submitted", digest="repeat('0', 64)"), "the digest is another"),
    (approve("draft"), "only a submitted version"),
    (approve("active"), "only a submitted version"),
    (f"{_ACTIVATE} AND status = 'submitted'", "only an approved version"),
    (f"{_REPLACE} AND v.status = 'draft'", "only an approved version"),
    (insert(_DONE, ", 'active', 'bob', now()"), "begins as a draft"),
    (insert(", approver", ", 'bob'"), "begins as a draft"),
    (insert(digest="repeat('0', 64)"), "registry_versions_content"),
    (insert(author="''"), "registry_versions_persons"),
    (insert(tenant="'*'"), "row-level security"),
]


@pytest.mark.parametrize(("change", "refusal"), _CHANGES)
async def test_no_program_gets_past_the_tables(
    gate: RegistryGate, engine: AsyncEngine, scope: TenantScope, change: str, refusal: str
) -> None:
    await active(gate, scope)
    await registered(gate, scope)
    await submitted(gate, scope)
    with pytest.raises(DBAPIError, match=refusal):
        async with transaction(engine, [scope]) as connection:
            await connection.execute(text(change), {"t": scope.tenant_id} if ":t" in change else {})


async def test_no_program_makes_a_move_that_is_not_in_the_table(
    gate: RegistryGate, engine: AsyncEngine, owner: AsyncEngine, scope: TenantScope
) -> None:
    """Every pair of statuses, tried from a row that the owner of the tables put into the first one."""
    version = await active(gate, scope)
    for start, to in itertools.permutations(VersionStatus, 2):
        async with transaction(owner, [scope]) as connection:
            await connection.execute(text("ALTER TABLE registry_versions DISABLE TRIGGER gate"))
            await connection.execute(text("UPDATE registry_versions SET status = :s"), {"s": start})
            await connection.execute(text("ALTER TABLE registry_versions ENABLE ALWAYS TRIGGER gate"))
        change = rows(engine, [scope], "UPDATE registry_versions SET status = :s RETURNING 1", s=to)
        if (start, to) in TRANSITIONS:
            assert len(await change) == 1, (start, to)
        else:
            with pytest.raises(DBAPIError, match=f"may not go from {start} to {to}"):
                await change
    assert version.version == 1


async def test_the_gate_says_conflict_when_only_the_tables_know_better(
    gate: RegistryGate, owner: AsyncEngine, scope: TenantScope
) -> None:
    """An approval row without its status, as no command leaves it behind."""
    version = await submitted(gate, scope)
    async with transaction(owner, [scope]) as connection:
        await connection.execute(
            text(
                "INSERT INTO registry_approvals SELECT tenant, kind, name, version, digest, 'eve', '', now()"
                " FROM registry_versions WHERE tenant = :t"
            ),
            {"t": scope.tenant_id},
        )
    with pytest.raises(ConflictError, match="refuses"):
        await gate.approve(BOB, scope, version.key, version.digest, WHY)


async def test_a_version_that_was_never_registered_is_not_known(gate: RegistryGate, scope: TenantScope) -> None:
    key = VersionKey("model", "none", 1)
    calls = [
        gate.show(scope, key),
        gate.submit(ANN, scope, key, "0" * 64, WHY),
        gate.approve(BOB, scope, key, "0" * 64, WHY),
        gate.revoke(BOB, scope, key, "0" * 64, WHY),
        gate.activate(CYD, scope, [Choice(kind="model", name="none", version=1, scope_key="risk")], WHY),
    ]
    assert await outcomes(calls) == ["NotKnownError"] * 5


async def test_a_name_of_the_release_belongs_to_the_release_where_every_tenant_looks(
    gate: RegistryGate, scope: TenantScope
) -> None:
    brought = next(artifact for artifact in release_artifacts() if artifact.kind == "model")
    with pytest.raises(InvalidRequestError) as refused:
        await registered(gate, None, draft(brought.name))
    assert [pointer for pointer, _ in refused.value.pointers] == ["/name"]
    assert (await registered(gate, scope, draft(brought.name))).name == brought.name

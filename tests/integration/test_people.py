"""People with names, against real servers: logins, grants, keys, tenants, and what a tenant's broker user cannot do."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pika
import pytest
import typer
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from typer.testing import CliRunner

from contracts.failures import (
    AuthenticationError,
    AuthorizationError,
    ConflictError,
    InvalidRequestError,
    MessagingFailureError,
    NotKnownError,
)
from contracts.identity import EVERYWHERE, Grant, Permission, Principal, Role
from contracts.tenancy import TenantScope
from contracts.topology import Layouts, topology
from deploy.cli_people import attach
from deploy.migrations.upgrade import role_of, upgrade
from deploy.runtime import RandomIds, SystemClock
from deploy.servers import ServerUrls
from gateway.calls import openapi, routes
from gateway.control.desk import Desk
from gateway.control.people import calls
from gateway.web import application
from governance.identity import Authenticator
from governance.passwords import Passwords
from governance.postgres import PostgresDirectory, create_engine, tenants, transaction
from governance.postgres.commands import PeoplePolicy, PeoplePorts
from governance.postgres.people import People
from governance.postgres.tenants import Changes, upstream_user
from governance.tokens import TokenIssuer
from resilience.management import BrokerManagement
from tests.fakes import RecordingTelemetry, SteppingClock

pytestmark = pytest.mark.integration

PEPPER = b"p" * 32
PASSWORD = "correct horse battery"
ROOT = Principal("user:root", "root", frozenset({Grant(EVERYWHERE, Role.ADMIN)}))


@pytest.fixture(scope="module")
def prepared(servers: ServerUrls) -> ServerUrls:
    upgrade(servers.migration_database, role_of(servers.database))

    async def apply() -> None:
        management = BrokerManagement(servers.rabbitmq_management)
        try:
            await management.apply(topology(1))
        finally:
            await management.close()

    asyncio.run(apply())
    return servers


@dataclass
class House:
    """Everything behind the desk; `clock` stands still unless a test moves it."""

    engine: AsyncEngine
    clock: SteppingClock
    management: BrokerManagement
    people: People
    directory: PostgresDirectory
    credentials: Authenticator
    ports: PeoplePorts
    policy: PeoplePolicy
    urls: ServerUrls

    async def user(self, *grants: tuple[TenantScope | None, Role], password: str | None = PASSWORD) -> str:
        """A new user with these grants."""
        user_id = "u" + secrets.token_hex(6)
        await self.people.create(ROOT, user_id, "Somebody", password=password)
        for scope, role in grants:
            await self.people.grant(ROOT, user_id, scope, role)
        return user_id

    async def tenant(self, prefix: str = "t") -> TenantScope:
        """A new tenant without a broker user."""
        scope = TenantScope(prefix + secrets.token_hex(6))
        async with transaction(self.engine, [scope]) as connection:
            await connection.execute(text("INSERT INTO tenants (tenant_id, name) VALUES (:t, 'T')"), {"t": str(scope)})
        return scope

    async def records(self, scope: TenantScope | None, action: str) -> list[dict[str, Any]]:
        """What the outbox holds of one action."""
        async with transaction(self.engine, [scope]) as connection:
            rows = await connection.execute(text("SELECT body FROM outbox ORDER BY position"))
            bodies = [bytes(row.body) for row in rows]
        found = []
        for body in bodies:
            start = body.find(b'{"action"')
            while start >= 0:
                document, length = json.JSONDecoder().raw_decode(body[start:].decode("utf-8", "replace"))
                found.append(document)
                start = body.find(b'{"action"', start + length)
        return [document for document in found if document["action"] == action]

    async def as_user(self, user_id: str, scope: TenantScope | None = None) -> Principal | None:
        """Who the doors see when the user logs in and calls."""
        token = (await self.people.login(user_id, PASSWORD, scope)).token
        return await self.credentials.principal(token)


@pytest.fixture
async def house(prepared: ServerUrls) -> AsyncIterator[House]:
    engine = create_engine(prepared.database, pool_size=8)
    management, clock = BrokerManagement(prepared.rabbitmq_management), SteppingClock()
    issuer = TokenIssuer(private=Ed25519PrivateKey.generate().private_bytes_raw())
    ports = PeoplePorts(
        engine, clock, RandomIds(), Passwords(memory_kib=64, passes=1), Layouts.first(1), issuer, management
    )
    policy = PeoplePolicy(PEPPER, failed_login_s=0)
    directory = PostgresDirectory(engine, clock, PEPPER)
    credentials = Authenticator(directory, directory, issuer, clock)
    yield House(engine, clock, management, People(ports, policy), directory, credentials, ports, policy, prepared)
    await management.close()
    await engine.dispose()


# --- logins -------------------------------------------------------------------------------------------


async def test_a_login_is_a_token_that_the_doors_know(house: House) -> None:
    scope = await house.tenant()
    user = await house.user((scope, Role.ANALYST))
    found = await house.as_user(user, scope)
    assert found == Principal(f"user:{user}", user, frozenset({Grant(str(scope), Role.ANALYST)}), scope)
    (record,) = [r for r in await house.records(None, "user.logged_in") if r["subject"] == {"user": user}]
    assert record["detail"] == {"tenant": str(scope)}
    with pytest.raises(NotKnownError):
        await house.people.login(user, PASSWORD, TenantScope("t-elsewhere"))
    with pytest.raises(NotKnownError):
        await house.people.login(user, PASSWORD, await house.tenant())


@pytest.mark.parametrize("user", ["nobody", "", "Root", "x" * 300, "a b", "ä", "a\x00b", "' OR 1=1 --", "root\n"])
async def test_an_unknown_or_malformed_user_is_answered_like_a_wrong_password(house: House, user: str) -> None:
    known = await house.user()
    with pytest.raises(AuthenticationError) as wrong:
        await house.people.login(known, "not the password at all")
    with pytest.raises(AuthenticationError) as unknown:
        await house.people.login(user, "not the password at all")
    assert unknown.value.detail == wrong.value.detail


async def test_every_failed_login_costs_one_comparison_and_the_same_time_at_least(house: House) -> None:
    compared: list[str] = []

    class Recording(Passwords):
        def _same(self, password: bytes, stored: str) -> bool:
            compared.append(stored.rpartition("$")[0].rpartition("$")[0])
            return super()._same(password, stored)

    ports = replace(house.ports, passwords=Recording(memory_kib=64, passes=1), clock=SystemClock())
    people = People(ports, replace(house.policy, failed_login_s=0.2))
    known, disabled, locked, foreign = [await house.user(password=p) for p in (PASSWORD, PASSWORD, PASSWORD, None)]
    await house.people.disable(ROOT, disabled)
    async with transaction(house.engine, ()) as connection:
        query = text("UPDATE users SET locked_until = now() + interval '1 hour' WHERE user_id = :u")
        await connection.execute(query, {"u": locked})
    users = [known, disabled, locked, foreign, "nobody", "Not An Id", ""]
    details = []
    for user in users:
        began = time.perf_counter()
        with pytest.raises(AuthenticationError) as raised:
            await people.login(user, "not the password at all")
        assert time.perf_counter() - began >= 0.2
        details.append(raised.value.detail)
    assert len(compared) == len(users)
    assert set(compared) == {"$argon2id$v=19$m=64,t=1,p=1"}
    assert len(set(details)) == 1
    for user in (disabled, locked):
        with pytest.raises(AuthenticationError):
            await people.login(user, PASSWORD)


async def test_a_lock_and_its_record_are_one_commit(house: House) -> None:
    class Dying(Passwords):
        async def matches(self, password: str, stored: str | None) -> bool:
            raise RuntimeError("the process ended here")

    user = await house.user()
    people = People(replace(house.ports, passwords=Dying(memory_kib=64, passes=1)), house.policy)
    for _ in range(10):
        with pytest.raises(RuntimeError):
            await people.login(user, PASSWORD)
    async with transaction(house.engine, ()) as connection:
        query = text("SELECT locked_until FROM users WHERE user_id = :u")
        assert (await connection.execute(query, {"u": user})).scalar_one() is not None
    assert len([r for r in await house.records(None, "user.locked") if r["subject"] == {"user": user}]) == 1


async def test_a_right_tenth_guess_opens_the_lock_again_and_the_audit_says_so(house: House) -> None:
    user = await house.user()
    for _ in range(9):
        with pytest.raises(AuthenticationError):
            await house.people.login(user, "wrong")
    await house.people.login(user, PASSWORD)
    for action in ("user.locked", "user.unlocked"):
        assert len([r for r in await house.records(None, action) if r["subject"] == {"user": user}]) == 1, action
    await house.people.login(user, PASSWORD)


async def test_ten_wrong_guesses_lock_for_a_quarter_of_an_hour(house: House) -> None:
    user = await house.user()
    for _ in range(10):
        with pytest.raises(AuthenticationError):
            await house.people.login(user, "wrong")
    with pytest.raises(AuthenticationError):
        await house.people.login(user, PASSWORD)
    assert len([r for r in await house.records(None, "user.locked") if r["subject"] == {"user": user}]) == 1
    house.clock.step(899)
    with pytest.raises(AuthenticationError):
        await house.people.login(user, PASSWORD)
    house.clock.step(1)
    await house.people.login(user, PASSWORD)
    for _ in range(9):
        with pytest.raises(AuthenticationError):
            await house.people.login(user, "wrong")
    await house.people.login(user, PASSWORD)


async def test_guesses_that_arrive_at_once_are_counted_one_by_one(house: House) -> None:
    user = await house.user()
    compared: list[str] = []

    class Counting(Passwords):
        async def matches(self, password: str, stored: str | None) -> bool:
            if stored is not None:
                compared.append(password)
            return await super().matches(password, stored)

    people = People(replace(house.ports, passwords=Counting(memory_kib=64, passes=1)), house.policy)
    tried = await asyncio.gather(*(people.login(user, f"guess {i}") for i in range(30)), return_exceptions=True)
    assert {type(answer) for answer in tried} == {AuthenticationError}
    assert len(compared) == 10


async def test_a_disabled_user_comes_in_no_more_and_may_be_let_in_again(house: House) -> None:
    user = await house.user((None, Role.VIEWER))
    token = (await house.people.login(user, PASSWORD)).token
    assert await house.credentials.principal(token) is not None
    house.clock.step(1)
    await house.people.disable(ROOT, user, "left")
    house.clock.step(4)
    assert await house.credentials.principal(token) is None
    with pytest.raises(AuthenticationError):
        await house.people.login(user, PASSWORD)
    await house.people.enable(ROOT, user)
    house.clock.step(4)
    assert await house.credentials.principal(token) is None, "a token of before does not come back to life"
    assert await house.as_user(user) is not None
    (record,) = [r for r in await house.records(None, "user.disabled") if r["subject"] == {"user": user}]
    assert (record["person"], record["detail"]) == ("root", {"reason": "left"})


async def test_logging_out_everywhere_and_a_new_password_end_every_token(house: House) -> None:
    user = await house.user((None, Role.VIEWER))
    token = (await house.people.login(user, PASSWORD)).token
    me = await house.credentials.principal(token)
    assert me is not None
    house.clock.step(1)
    await house.people.logout_everywhere(me)
    house.clock.step(4)
    assert await house.credentials.principal(token) is None
    again = (await house.people.login(user, PASSWORD)).token
    assert await house.credentials.principal(again) is not None

    with pytest.raises(AuthorizationError):
        await house.people.set_password(me, user, "another long password", "wrong")
    with pytest.raises(InvalidRequestError):
        await house.people.set_password(me, user, "short", PASSWORD)
    house.clock.step(1)
    await house.people.set_password(me, user, "another long password", PASSWORD)
    house.clock.step(4)
    assert await house.credentials.principal(again) is None
    with pytest.raises(AuthenticationError):
        await house.people.login(user, PASSWORD)
    await house.people.login(user, "another long password")
    other = await house.user()
    with pytest.raises(AuthorizationError):
        await house.people.set_password(me, other, "another long password")


async def test_a_hash_of_other_parameters_is_made_anew_at_login(house: House) -> None:
    user = await house.user()

    async def stored() -> str:
        async with transaction(house.engine, ()) as connection:
            query = text("SELECT password_hash FROM users WHERE user_id = :u")
            return str((await connection.execute(query, {"u": user})).scalar_one())

    before = await stored()
    stronger = People(replace(house.ports, passwords=Passwords(memory_kib=128, passes=2)), house.policy)
    await stronger.login(user, PASSWORD)
    after = await stored()
    assert ("m=64,t=1" in before, "m=128,t=2" in after) == (True, True)
    await stronger.login(user, PASSWORD)
    assert await stored() == after


async def test_a_user_of_an_identity_provider_is_found_by_its_subject(house: House) -> None:
    subject = secrets.token_hex(8)
    assert await house.directory.person_of("https://idp.example", subject) is None
    user = "u" + secrets.token_hex(6)
    await house.people.create(ROOT, user, "From elsewhere", oidc=("https://idp.example", subject))
    house.clock.step(4)
    found = await house.directory.person_of("https://idp.example", subject)
    assert found is not None
    assert (found.user_id, found.grants) == (user, frozenset())
    assert await house.directory.person_of("https://other.example", subject) is None
    assert await house.directory.person_of("https://idp.example", "\x00") is None
    with pytest.raises(AuthenticationError):
        await house.people.login(user, "")
    with pytest.raises(ConflictError):
        await house.people.create(ROOT, user + "2", "Twin", oidc=("https://idp.example", subject))


# --- grants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "Ana", "ANA", "-ana", "ana ana", "ä", "a" * 128, "ana\n", "a/b", "a\x00"])
async def test_nobody_is_two_people_by_spelling(house: House, user: str) -> None:
    with pytest.raises(InvalidRequestError):
        await house.people.create(ROOT, user, "Ana", password=PASSWORD)


async def test_a_user_is_made_once(house: House) -> None:
    user = await house.user()
    with pytest.raises(ConflictError):
        await house.people.create(ROOT, user, "Again", password=PASSWORD)


async def test_a_tenants_administrator_gives_roles_in_its_tenant_and_nowhere_else(house: House) -> None:
    own, other = await house.tenant(), await house.tenant()
    boss_id, user = await house.user((own, Role.ADMIN)), await house.user()
    boss = await house.as_user(boss_id)
    assert boss is not None
    assert await house.people.grant(boss, user, own, Role.APPROVER)
    assert not await house.people.grant(boss, user, own, Role.APPROVER)
    assert len(await house.records(own, "user.granted")) == 2
    with pytest.raises(NotKnownError):
        await house.people.grant(boss, user, other, Role.VIEWER)
    with pytest.raises(NotKnownError):
        await house.people.grant(boss, user, TenantScope("t-nowhere"), Role.VIEWER)
    with pytest.raises(AuthorizationError):
        await house.people.grant(boss, user, None, Role.VIEWER)
    with pytest.raises(AuthorizationError):
        await house.people.grant(boss, boss_id, own, Role.APPROVER)
    with pytest.raises(AuthorizationError):
        await house.people.revoke(boss, boss_id, own, Role.ADMIN)
    with pytest.raises(NotKnownError):
        await house.people.grant(boss, "nobody", own, Role.VIEWER)
    with pytest.raises(InvalidRequestError):
        await house.people.grant(boss, user, own, Role.SERVICE)
    for command in (house.people.disable(boss, user), house.people.enable(boss, user)):
        with pytest.raises(AuthorizationError):
            await command
    with pytest.raises(AuthorizationError):
        await house.people.create(boss, "u-new", "New")
    with pytest.raises(AuthorizationError):
        await house.people.set_password(boss, user, "another long password")
    found = {each.user: each.grants for each in await house.people.users(boss)}
    assert found == {boss_id: (Grant(str(own), Role.ADMIN),), user: (Grant(str(own), Role.APPROVER),)}
    await house.people.revoke(boss, user, own, Role.APPROVER)
    with pytest.raises(NotKnownError):
        await house.people.revoke(boss, user, own, Role.APPROVER)


async def test_an_analyst_administers_nobody(house: House) -> None:
    own = await house.tenant()
    ana = await house.as_user(await house.user((own, Role.ANALYST), (own, Role.APPROVER)))
    assert ana is not None
    assert ana.may(Permission.REGISTRY_AUTHOR, own)
    assert ana.may(Permission.REGISTRY_APPROVE, own)
    with pytest.raises(AuthorizationError):
        await house.people.grant(ana, await house.user(), own, Role.VIEWER)
    assert await house.people.users(ana) == ()


async def test_one_administrator_of_the_installation_always_remains(house: House) -> None:
    async with transaction(house.engine, ()) as connection:
        await connection.execute(text("DELETE FROM memberships WHERE tenant = '*' AND role = 'ADMIN'"))
    one, two = [await house.user((None, Role.ADMIN)) for _ in range(2)]
    first, second = await house.as_user(one), await house.as_user(two)
    assert first is not None
    assert second is not None
    with pytest.raises(AuthorizationError):
        await house.people.disable(first, one)
    with pytest.raises(AuthorizationError):
        await house.people.revoke(first, one, None, Role.ADMIN)
    # Each removes the other at the same moment: one of them must fail, round after round.
    for way in (0, 1) * 5:
        answers = await asyncio.gather(
            house.people.revoke(first, two, None, Role.ADMIN) if way else house.people.disable(first, two),
            house.people.disable(second, one) if way else house.people.revoke(second, one, None, Role.ADMIN),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers if isinstance(answer, Exception)] == [ConflictError]
        for user in (one, two):
            await house.people.enable(ROOT, user)
            await house.people.grant(ROOT, user, None, Role.ADMIN)
    await house.people.revoke(ROOT, one, None, Role.ADMIN)
    async with transaction(house.engine, ()) as connection:
        query = text(
            "SELECT user_id FROM memberships JOIN users USING (user_id)"
            " WHERE tenant = '*' AND role = 'ADMIN' AND disabled_at IS NULL"
        )
        last = str((await connection.execute(query)).scalar_one())
    for command in (house.people.disable(ROOT, last), house.people.revoke(ROOT, last, None, Role.ADMIN)):
        with pytest.raises(ConflictError):
            await command


# --- keys ---------------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_listed_without_its_secret(house: House) -> None:
    scope = await house.tenant()
    user = await house.user((scope, Role.ADMIN))
    boss = await house.as_user(user)
    assert boss is not None
    made = await house.people.tenants.create_key(boss, scope, role=Role.VIEWER, label="reports", expires_in_s=3_600)
    found = await house.credentials.principal(made.api_key)
    assert found == Principal(f"key:{made.key_id}", user, frozenset({Grant(str(scope), Role.VIEWER)}), scope)
    (listed,) = await house.people.tenants.keys(scope)
    assert (listed.key_id, listed.role, listed.label, listed.owner) == (made.key_id, Role.VIEWER, "reports", user)
    secret = made.api_key.removeprefix(made.key_id + "_")
    assert secret not in listed.model_dump_json()
    assert secret not in json.dumps(await house.records(scope, "key.created"))
    assert await house.credentials.principal(made.key_id + "_" + "A" * 43) is None
    for role in (Role.ADMIN, Role.APPROVER, Role.ANALYST):
        with pytest.raises(InvalidRequestError):
            await house.people.tenants.create_key(boss, scope, role=role)


async def test_an_expiry_holds_at_once_though_the_key_is_remembered(house: House) -> None:
    scope = await house.tenant()
    made = await house.people.tenants.create_key(ROOT, scope, expires_in_s=62)
    house.clock.step(61)
    assert await house.credentials.principal(made.api_key) is not None
    house.clock.step(1)
    assert await house.credentials.principal(made.api_key) is None


async def test_a_revoked_key_opens_nothing_five_seconds_later(house: House) -> None:
    scope, other = await house.tenant(), await house.tenant()
    made = await house.people.tenants.create_key(ROOT, scope)
    assert await house.credentials.principal(made.api_key) is not None
    with pytest.raises(NotKnownError):
        await house.people.tenants.revoke_key(ROOT, other, made.key_id)
    await house.people.tenants.revoke_key(ROOT, scope, made.key_id, "leaked")
    await house.people.tenants.revoke_key(ROOT, scope, made.key_id)
    house.clock.step(4)
    assert await house.credentials.principal(made.api_key) is None
    assert [r["detail"] for r in await house.records(scope, "key.revoked")] == [{"reason": "leaked"}]


async def test_a_rotated_key_and_its_successor_overlap(house: House) -> None:
    scope = await house.tenant()
    old = await house.people.tenants.create_key(ROOT, scope, label="shop", expires_in_s=86_400)
    house.clock.step(10)
    new = await house.people.tenants.rotate_key(ROOT, scope, old.key_id)
    assert new.expires_at == house.clock.now() + timedelta(seconds=86_400)
    assert await house.credentials.principal(old.api_key) is not None
    assert await house.credentials.principal(new.api_key) is not None
    house.clock.step(3_600)
    assert await house.credentials.principal(old.api_key) is None
    assert await house.credentials.principal(new.api_key) is not None
    with pytest.raises(ConflictError):
        await house.people.tenants.rotate_key(ROOT, scope, old.key_id)
    with pytest.raises(InvalidRequestError):
        await house.people.tenants.rotate_key(ROOT, scope, new.key_id, 7 * 86_400 + 1)
    with pytest.raises(NotKnownError):
        await house.people.tenants.rotate_key(ROOT, await house.tenant(), new.key_id)
    labels = [key.label for key in await house.people.tenants.keys(scope)]
    assert labels == ["shop", "shop"]


async def test_a_key_goes_on_when_its_owner_is_disabled_and_the_list_says_so(house: House) -> None:
    scope = await house.tenant()
    user = await house.user((scope, Role.ADMIN))
    boss = await house.as_user(user)
    assert boss is not None
    made = await house.people.tenants.create_key(boss, scope)
    await house.people.disable(ROOT, user)
    house.clock.step(4)
    assert await house.credentials.principal(made.api_key) is not None
    assert [key.owner_disabled for key in await house.people.tenants.keys(scope)] == [True]


# --- tenants ------------------------------------------------------------------------------------------


async def test_a_tenant_is_made_whole_and_once(house: House) -> None:
    scope = TenantScope("t" + secrets.token_hex(6))
    answers = await asyncio.gather(
        *(house.people.tenants.create(ROOT, scope, "Acme", Changes({"review_from": 30})) for _ in range(3)),
        return_exceptions=True,
    )
    made = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(made) == 1, answers
    assert {type(answer) for answer in answers if isinstance(answer, BaseException)} == {ConflictError}
    assert (made[0].tenant.tenant, made[0].tenant.thresholds.review_from) == (str(scope), 30)
    found = await house.credentials.principal(made[0].key.api_key)
    assert found is not None
    assert found.scope == scope
    with connected(house, scope, made[0].broker_password) as connection:
        assert connection.is_open
    (record,) = await house.records(scope, "tenant.created")
    text_of_it = json.dumps(record)
    assert made[0].broker_password not in text_of_it
    assert made[0].key.api_key not in text_of_it


async def test_a_tenant_whose_making_was_cut_off_is_made_by_repeating_it(house: House) -> None:
    scope = TenantScope("t" + secrets.token_hex(6))

    class CutOff:
        async def open_upstream(self, scope: TenantScope, user: str, password: str) -> None:
            await house.management.open_upstream(scope, user, password)
            raise MessagingFailureError

        async def suspend_upstream(self, user: str) -> None:
            raise MessagingFailureError

        async def resume_upstream(self, scope: TenantScope, user: str) -> None:
            raise MessagingFailureError

    cut = People(replace(house.ports, broker=CutOff()), house.policy)
    with pytest.raises(MessagingFailureError):
        await cut.tenants.create(ROOT, scope, "Acme")
    with pytest.raises(NotKnownError):
        await house.people.tenants.show(scope)
    made = await house.people.tenants.create(ROOT, scope, "Acme")
    with connected(house, scope, made.broker_password) as connection:
        assert connection.is_open


async def test_a_broker_that_hangs_holds_no_lock_longer_than_postgresql_allows(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = TenantScope("t" + secrets.token_hex(6))

    class Hanging:
        async def open_upstream(self, scope: TenantScope, user: str, password: str) -> None:
            await asyncio.sleep(60)

        suspend_upstream = resume_upstream = open_upstream  # never reached

    assert tenants._BROKER_S < 5  # idle_in_transaction_session_timeout
    monkeypatch.setattr(tenants, "_BROKER_S", 0.2)
    hung = People(replace(house.ports, broker=cast("Any", Hanging())), house.policy)
    began = time.monotonic()
    with pytest.raises(MessagingFailureError):
        await hung.tenants.create(ROOT, scope, "Acme")
    assert time.monotonic() - began < 3
    with pytest.raises(NotKnownError):
        await house.people.tenants.show(scope)


async def test_limits_are_checked_and_every_change_of_thresholds_is_a_version(house: House) -> None:
    scope = await house.tenant()
    first = await house.people.tenants.limit(ROOT, scope, Changes({"hard_limit": 80, "auto_reject": False}), "why")
    assert (first.thresholds.version, first.thresholds.hard_limit, first.thresholds.auto_reject) == (2, 80, False)
    policy = {"sla_s": 60, "expiry_s": 120, "expiry_outcome": "APPROVED", "four_eyes_amount": "1000"}
    second = await house.people.tenants.limit(
        ROOT, scope, Changes(approval_policy=policy, limits={"undecided_events": 5})
    )
    assert (second.thresholds.version, second.thresholds.hard_limit) == (2, 80)
    assert second.approval_policy.model_dump(mode="json") == policy
    assert second.limits.undecided_events == 5
    for wrong in (
        Changes({"review_from": 101}),
        Changes({"review_from": 90, "reject_from": 10}),
        Changes({"unknown": 1}),
        Changes({"version": 9}),
        Changes({"amount_limit": "many"}),
        Changes({"amount_limit": "\u0661\u0662"}),
        Changes({"auto_reject": {"a": 1}}),
        Changes(approval_policy={"expiry_outcome": "MAYBE"}),
        Changes(approval_policy={"four_eyes_amount": "-1"}),
        Changes(approval_policy={"unknown": 1}),
        Changes(limits={"undecided_events": 0}),
        Changes(limits={"rate_per_s": 5}),
        Changes(limits={"rate_per_s": -1, "burst": 1}),
        Changes(limits={"rate_per_s": float("inf"), "burst": 1}),
        Changes(limits={"rate_per_s": 5, "burst": 0}),
    ):
        with pytest.raises(InvalidRequestError):
            await house.people.tenants.limit(ROOT, scope, wrong)
    assert await house.people.tenants.show(scope) == second
    rate = {"rate_per_s": 7.5, "burst": 30}
    paced = await house.people.tenants.limit(ROOT, scope, Changes(limits=rate))
    assert paced.limits.model_dump() == rate | {"undecided_events": 5}
    house.clock.step(6)
    assert {one.scope: one.limits for one in await house.directory.tenants()}[scope] == paced.limits
    freed = await house.people.tenants.limit(ROOT, scope, Changes(limits={"rate_per_s": None, "burst": None}))
    assert freed.limits == second.limits
    boss = await house.as_user(await house.user((scope, Role.ADMIN)))
    assert boss is not None
    with pytest.raises(AuthorizationError):
        await house.people.tenants.limit(boss, scope, Changes({"hard_limit": 100}))
    with pytest.raises(AuthorizationError):
        await house.people.tenants.create(boss, TenantScope("t-new"), "New")
    with pytest.raises(NotKnownError):
        await house.people.tenants.limit(ROOT, TenantScope("t-nowhere"), Changes({"hard_limit": 100}))


async def test_a_suspended_tenant_s_doors_are_shut_until_it_is_resumed(house: House) -> None:
    scope = TenantScope("t" + secrets.token_hex(6))
    made = await house.people.tenants.create(ROOT, scope, "Acme")
    user = await house.user((scope, Role.ANALYST))
    bound = (await house.people.login(user, PASSWORD, scope)).token
    house.clock.step(4)
    assert await house.credentials.principal(made.key.api_key) is not None
    assert await house.credentials.principal(bound) is not None
    upstream = connected(house, scope, made.broker_password)
    channel = upstream.channel()
    publish(channel, f"{scope}.risk", upstream_user(scope))  # so that the broker remembers that it may
    await house.people.tenants.suspend(ROOT, scope, "not paid")
    house.clock.step(4)
    assert await house.credentials.principal(made.key.api_key) is None
    assert await house.credentials.principal(bound) is None
    with pytest.raises(NotKnownError):
        await house.people.login(user, PASSWORD, scope)
    with pytest.raises(pika.exceptions.AMQPError):
        publish(channel, f"{scope}.risk", upstream_user(scope), confirm=False)
    with pytest.raises(ConflictError):
        await house.people.tenants.rotate_broker_password(ROOT, scope)
    with connected(house, scope, made.broker_password) as again, pytest.raises(pika.exceptions.AMQPError):
        publish(again.channel(), f"{scope}.risk", upstream_user(scope))
    assert scope in {profile.scope for profile in await house.directory.tenants()}
    await house.people.tenants.resume(ROOT, scope)
    house.clock.step(4)
    assert await house.credentials.principal(made.key.api_key) is not None
    with connected(house, scope, made.broker_password) as again:
        publish(again.channel(), f"{scope}.risk", upstream_user(scope))


# --- what a broker user can and cannot do -------------------------------------------------------------


def connected(house: House, scope: TenantScope, password: str) -> pika.BlockingConnection:
    parts = urlsplit(house.urls.rabbitmq)
    credentials = pika.PlainCredentials(upstream_user(scope), password)
    return pika.BlockingConnection(pika.ConnectionParameters(parts.hostname, parts.port, "/", credentials))


def publish(channel: Any, key: str, user: str | None, exchange: str = "risk.ingest", *, confirm: bool = True) -> None:
    """One confirmed message; `confirm` False: the channel was told before."""
    if confirm:
        channel.confirm_delivery()
    properties = pika.BasicProperties(message_id="m", user_id=user, delivery_mode=2)
    channel.basic_publish(exchange, key, b"{}", properties, mandatory=True)


@dataclass
class Upstream:
    scope: TenantScope
    connection: pika.BlockingConnection

    def __call__(self) -> Any:
        """A channel of its own: the broker closes the one on which it refuses."""
        return self.connection.channel()


@pytest.fixture
async def pair(house: House) -> AsyncIterator[tuple[Upstream, Upstream]]:
    """A tenant and one whose name begins with the first one's."""
    name = "t" + secrets.token_hex(6)
    scopes = [TenantScope(name), TenantScope(f"{name}-2")]
    made = [await house.people.tenants.create(ROOT, scope, "Pair") for scope in scopes]
    found = [
        Upstream(scope, connected(house, scope, each.broker_password)) for scope, each in zip(scopes, made, strict=True)
    ]
    yield found[0], found[1]
    for each in found:
        with suppress(pika.exceptions.AMQPError):
            each.connection.close()


async def test_an_upstream_publishes_binds_and_reads_its_own(pair: tuple[Upstream, Upstream]) -> None:
    for own in pair:
        channel, queue = own(), f"up.{own.scope}.decisions"
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
        for exchange in ("risk.decisions", "risk.rejected"):
            for key in (f"{own.scope}.#", f"{own.scope}.risk.*"):
                channel.queue_bind(queue, exchange, key)
        assert channel.basic_get(queue) == (None, None, None)
        publish(channel, f"{own.scope}.risk", upstream_user(own.scope))
        publish(channel, f"{own.scope}.label", upstream_user(own.scope))


async def test_an_upstream_cannot_touch_what_is_not_its_own(pair: tuple[Upstream, Upstream]) -> None:
    refused: dict[str, int] = {}
    for own, other in (pair, pair[::-1]):
        mine, theirs, user = f"up.{own.scope}.q", f"up.{other.scope}.q", upstream_user(own.scope)
        other().queue_declare(theirs, durable=True)
        own().queue_declare(mine, durable=True)
        attempts: dict[str, Any] = {
            "declare another's queue": lambda c, q=f"up.{other.scope}.new": c.queue_declare(q, durable=True),
            "declare a queue of the fleet": lambda c: c.queue_declare("risk.v1.decision.p77", durable=True),
            "read another's queue": lambda c, q=theirs: c.basic_get(q),
            "purge another's queue": lambda c, q=theirs: c.queue_purge(q),
            "delete another's queue": lambda c, q=theirs: c.queue_delete(q),
            "read its own ingest queue": lambda c, s=own.scope: c.basic_get(s.ingest_queue),
            "read another's ingest queue": lambda c, s=other.scope: c.basic_get(s.ingest_queue),
            "read the fleet's work": lambda c: c.basic_get("risk.v1.decision.p00"),
            "bind another's decisions": lambda c, q=mine, s=other.scope: c.queue_bind(q, "risk.decisions", f"{s}.#"),
            "bind another's refusals": lambda c, q=mine, s=other.scope: c.queue_bind(q, "risk.rejected", f"{s}.#"),
            "bind everybody's decisions": lambda c, q=mine: c.queue_bind(q, "risk.decisions", "#"),
            "bind by a wildcard": lambda c, q=mine: c.queue_bind(q, "risk.decisions", "*.risk.*"),
            "bind its prefix": lambda c, q=mine, s=own.scope: c.queue_bind(q, "risk.decisions", str(s)),
            "bind what comes in": lambda c, q=mine, s=own.scope: c.queue_bind(q, "risk.ingest", f"{s}.#"),
            "bind the work exchange": lambda c, q=mine: c.queue_bind(q, "risk.v1.work", "risk.v1.decision.p00"),
            "publish with another's key": lambda c, s=other.scope, u=user: publish(c, f"{s}.risk", u),
            "publish with no tenant": lambda c, u=user: publish(c, "risk", u),
            "publish as another user": lambda c, s=own.scope, o=other.scope: publish(c, f"{s}.risk", upstream_user(o)),
            "publish a decision": lambda c, s=own.scope, u=user: publish(c, f"{s}.risk.APPROVED", u, "risk.decisions"),
            "publish work": lambda c, u=user: publish(c, "risk.v1.decision.p00", u, "risk.v1.work"),
            "publish past the exchanges": lambda c, u=user: publish(c, "risk.v1.decision.p00", u, ""),
            "dead-letter into the work": lambda c, s=own.scope: c.queue_declare(
                f"up.{s}.dl", durable=True, arguments={"x-dead-letter-exchange": "risk.v1.work"}
            ),
            "dead-letter past the exchanges": lambda c, s=own.scope: c.queue_declare(
                f"up.{s}.dl", durable=True, arguments={"x-dead-letter-exchange": ""}
            ),
        }
        for what, attempt in attempts.items():
            try:
                attempt(own())
            except pika.exceptions.ChannelClosedByBroker as error:
                refused[what] = error.reply_code
        assert set(attempts) - set(refused) == set()
    # 403 is a permission, 406 the verified user.
    assert {what for what, code in refused.items() if code != 403} == {"publish as another user"}
    assert all(each.connection.is_open for each in pair)


async def test_the_old_broker_password_opens_nothing_after_a_rotation(
    house: House, pair: tuple[Upstream, Upstream]
) -> None:
    scope = pair[0].scope
    user, password = await house.people.tenants.rotate_broker_password(ROOT, scope)
    assert user == upstream_user(scope)
    with connected(house, scope, password) as connection:
        publish(connection.channel(), f"{scope}.risk", user)
    with pytest.raises(pika.exceptions.AMQPError):
        connected(house, scope, "the old one")


# --- over HTTP ----------------------------------------------------------------------------------------


def the_app(house: House) -> Starlette:
    """The calls of people alone; nobody else is behind this desk."""
    nothing = cast("Any", None)
    desk = Desk(
        credentials=house.credentials,
        exists=house.people.tenants.exists,
        gate=nothing,
        people=house.people,
        approvals=nothing,
        looking=nothing,
        letters=nothing,
        redecider=nothing,
        pauses=nothing,
        telemetry=RecordingTelemetry(),
        clock=house.clock,
        committed=lambda: None,
    )
    return application(routes(calls(desk)), RandomIds())


@asynccontextmanager
async def client(house: House) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(the_app(house))
    async with httpx.AsyncClient(transport=transport, base_url="http://control") as made:
        yield made


async def test_a_day_at_the_desk(house: House) -> None:
    root = await house.user((None, Role.ADMIN))
    async with client(house) as http:
        answer = await http.post("/ops/v1/login", json={"user": root, "password": PASSWORD})
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        as_root = {"Authorization": f"Bearer {answer.json()['token']}"}
        me = (await http.get("/ops/v1/me", headers=as_root)).json()
        assert me == {
            "actor": f"user:{root}",
            "person": root,
            "tenant": None,
            "grants": [{"tenant": "*", "role": "ADMIN"}],
        }

        tenant = "t" + secrets.token_hex(6)
        made = await http.post("/ops/v1/tenants", json={"tenant": tenant, "name": "Acme"}, headers=as_root)
        assert made.status_code == 201, made.text
        key = made.json()["key"]
        assert (
            await http.post("/ops/v1/tenants", json={"tenant": tenant, "name": "A"}, headers=as_root)
        ).status_code == 409

        ana = "u" + secrets.token_hex(6)
        new = {"user": ana, "name": "Ana", "password": PASSWORD}
        assert (await http.post("/ops/v1/users", json=new, headers=as_root)).status_code == 201
        grants = {"tenant": tenant, "role": "ADMIN"}
        path = f"/ops/v1/users/{ana}/grants"
        assert (await http.put(path, json=grants, headers=as_root)).status_code == 201
        assert (await http.put(path, json=grants, headers=as_root)).status_code == 204
        login = {"user": ana, "password": PASSWORD, "tenant": tenant}
        as_ana = {"Authorization": f"Bearer {(await http.post('/ops/v1/login', json=login)).json()['token']}"}

        listed = (await http.get("/ops/v1/tenants", headers=as_ana)).json()["tenants"]
        assert [each["tenant"] for each in listed] == [tenant]
        limits = {"thresholds": {"hard_limit": 70.5}, "reason": "pilot"}
        answer = await http.put(f"/ops/v1/tenants/{tenant}/limits", json=limits, headers=as_root)
        assert answer.json()["thresholds"]["hard_limit"] == 70.5
        keys = f"/ops/v1/tenants/{tenant}/keys"
        another = (await http.post(keys, headers=as_ana)).json()
        rotated = await http.post(f"{keys}/{another['key_id']}/rotate", json={"overlap_s": 0}, headers=as_ana)
        assert rotated.status_code == 201
        assert (await http.request("DELETE", f"{keys}/{key['key_id']}", headers=as_ana)).status_code == 204
        assert len((await http.get(keys, headers=as_ana)).json()["keys"]) == 3
        for verb, status in (("suspend", "suspended"), ("resume", "active")):
            turned = await http.post(f"/ops/v1/tenants/{tenant}/{verb}", headers=as_root)
            assert turned.json()["status"] == status, turned.text
        answer = await http.post(f"/ops/v1/tenants/{tenant}/broker-password", headers=as_root)
        assert answer.json()["broker_user"] == f"up-{tenant}"
        change = {"password": "a new long password", "current": PASSWORD}
        assert (await http.post(f"/ops/v1/users/{ana}/password", json=change, headers=as_ana)).status_code == 204
        assert (await http.post(f"/ops/v1/users/{ana}/disable", headers=as_root)).json()["disabled_at"] is not None
        assert (await http.post(f"/ops/v1/users/{ana}/enable", headers=as_root)).json()["disabled_at"] is None
        assert (await http.request("DELETE", path, json=grants, headers=as_root)).status_code == 204
        assert (await http.post("/ops/v1/logout-everywhere", headers=as_root)).status_code == 204


@pytest.mark.parametrize("word", ["%00", "a%00b", "%FF", "%F0%9F%98%80", "x" * 300, "%27%20OR%201=1", "..%2F.."])
async def test_no_word_in_a_path_or_query_is_a_defect(house: House, word: str) -> None:
    scope = await house.tenant()
    as_root = {
        "Authorization": f"Bearer {(await house.people.login(await house.user((None, Role.ADMIN)), PASSWORD)).token}"
    }
    bodies: dict[str, Any] = {"grants": {"tenant": str(scope), "role": "VIEWER"}, "password": {"password": PASSWORD}}
    async with client(house) as http:
        for method, path in every_call():
            if "{" in path:
                whole = path.replace("{user}", word).replace("{key}", word)
                whole = whole.replace("{tenant}", word if whole == path else str(scope))
                body = bodies.get(path.rpartition("/")[2])
                answer = await http.request(method, whole, headers=as_root, json=body)
                assert answer.status_code in (404, 405, 415, 422), (method, whole, answer.text)
        for path in ("/ops/v1/users", "/ops/v1/tenants"):
            assert (await http.get(f"{path}?after={word}", headers=as_root)).status_code in (200, 422)
            assert (await http.get(f"{path}?after=a&after=b", headers=as_root)).status_code == 422


def every_call() -> Sequence[tuple[str, str]]:
    return [(call.method, call.path) for call in calls(cast("Any", None))]


async def test_a_service_key_operates_nothing(house: House) -> None:
    scope = await house.tenant()
    made = await house.people.tenants.create_key(ROOT, scope)
    key = {"Authorization": f"Bearer {made.api_key}"}
    async with client(house) as http:
        for method, path in every_call():
            where = path.replace("{tenant}", str(scope)).replace("{user}", "root").replace("{key}", made.key_id)
            answer = await http.request(method, where, headers=key)
            allowed = (method, path) in {
                ("GET", "/ops/v1/me"),
                ("GET", "/ops/v1/tenants"),
                ("GET", "/ops/v1/tenants/{tenant}"),
            }
            refused = (415,) if path in ("/ops/v1/login", "/ops/v1/users/{user}/password") else (403,)
            assert answer.status_code in ((200,) if allowed else refused), (method, path, answer.text)
            assert "problem+json" in answer.headers["content-type"] or allowed
            wrong = await http.request(method, where, headers={"Authorization": f"Bearer {made.key_id}_{'A' * 43}"})
            assert wrong.status_code == (415 if path == "/ops/v1/login" else 401), (method, path)


async def test_a_foreign_tenant_looks_like_one_that_does_not_exist(house: House) -> None:
    own, other = await house.tenant(), await house.tenant()
    user = await house.user((own, Role.ADMIN))
    as_boss = {"Authorization": f"Bearer {(await house.people.login(user, PASSWORD)).token}"}
    async with client(house) as http:
        answers = []
        for tenant in (str(other), "t-nowhere", "Not-A-Tenant", "_shared"):
            for method, path in every_call():
                if "{tenant}" in path:
                    where = path.replace("{tenant}", tenant).replace("{key}", "rfk_0123456789ab")
                    answers.append(await http.request(method, where, headers=as_boss))
            body = {"tenant": tenant, "role": "VIEWER"}
            if tenant.islower() and tenant[0] != "_":
                answers.append(await http.put("/ops/v1/users/root/grants", json=body, headers=as_boss))
        assert {(answer.status_code, answer.json()["detail"]) for answer in answers} == {
            (404, "no such tenant is known to you")
        }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"user": 1, "password": "x"}', 422),
        (b'{"user": "a", "password": "b", "admin": true}', 422),
        (b'{"user": "a", "user": "b", "password": "c"}', 400),
        (b'{"user": "a", "password": "\\ud800"}', 400),
        (b'{"user": "a", "password": "' + b"x" * 20_000 + b'"}', 413),
        (b'{"user": "a", "password": "wrong"}', 401),
        (b'{"user": "a", "password": "wrong", "tenant": "Not A Tenant"}', 422),
    ],
)
async def test_a_bad_login_is_a_problem_document(house: House, body: bytes, status: int) -> None:
    async with client(house) as http:
        answer = await http.post("/ops/v1/login", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert "x" * 100 not in answer.text


# --- the command line ---------------------------------------------------------------------------------


@asynccontextmanager
async def control(house: House) -> AsyncIterator[str]:
    """The calls on a real socket; its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(the_app(house), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def test_the_command_line_does_what_the_desk_does(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ana, tenant = await house.user((None, Role.ADMIN)), "u" + secrets.token_hex(6), "t" + secrets.token_hex(6)
    app = typer.Typer()
    attach(app)

    async def run(*words: str, stdin: str | None = None) -> Any:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(words), stdin)
        assert result.exit_code == 0, (words, result.output, result.exception)
        return json.loads(result.stdout) if "--json" in words else result.stdout

    async def refused(*words: str, stdin: str | None = None) -> BaseException:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(words), stdin)
        assert result.exit_code != 0
        assert result.exception is not None
        return result.exception

    async with control(house) as url:
        monkeypatch.setenv("RISKFLEET_CONTROL_URL", url)
        monkeypatch.setenv("RISKFLEET_DATA_DIR", str(tmp_path))
        wrong = await refused("login", "--user", root, "--password-stdin", stdin="not it at all\n")
        assert "password is wrong" in str(wrong)
        assert "nobody is logged in" in str(await refused("users", "list"))
        await run("login", "--user", root, "--password-stdin", stdin=f"{PASSWORD}\n")
        session = tmp_path / "keys" / "session.json"
        assert session.stat().st_mode & 0o777 == 0o600
        assert PASSWORD not in session.read_text()

        made = await run("tenants", "create", tenant, "--name", "Acme", "--json")
        assert (await house.credentials.principal(made["key"]["api_key"])) is not None
        await run("users", "create", ana, "--name", "Ana", "--password-stdin", stdin=f"{PASSWORD}\n")
        await run("users", "role", ana, "ADMIN", "--tenant", tenant)
        assert [u["user"] for u in await run("users", "list", "--json") if u["user"] == ana] == [ana]
        limited = await run(
            "tenants", "limit", tenant, "--hard-limit", "66.5", "--no-auto-reject", "--sla-s", "60", "--json"
        )
        assert (limited["thresholds"]["hard_limit"], limited["thresholds"]["auto_reject"]) == (66.5, False)
        assert "66.5" in await run("tenants", "show", tenant)
        assert "above reject_from" in str(await refused("tenants", "limit", tenant, "--review-from", "99"))
        assert "nothing to change" in str(await refused("tenants", "limit", tenant))

        await run("login", "--user", ana, "--tenant", tenant, "--password-stdin", stdin=f"{PASSWORD}\n")
        key = await run("apikeys", "create", "--label", "[bold]shop", "--json")
        new = await run("apikeys", "rotate", key["key_id"], "--overlap-s", "0", "--json")
        await run("apikeys", "revoke", new["key_id"], "--reason", "test")
        keys = await run("apikeys", "list", "--json")
        assert sorted(each["label"] for each in keys) == ["[bold]shop", "[bold]shop", "first key"]
        await run("apikeys", "list")
        assert "does not permit" in str(await refused("tenants", "suspend", tenant))
        await run("users", "password", ana, "--password-stdin", stdin=f"{PASSWORD}\na new long password\n")
        await run("login", "--user", root, "--password-stdin", stdin=f"{PASSWORD}\n")
        for verb in ("suspend", "resume", "broker-password"):
            await run("tenants", verb, tenant)
        for verb in ("disable", "enable"):
            await run("users", verb, ana)
        for group in ("tenants", "users"):
            await run(group, "list")
        await run("users", "role", ana, "ADMIN", "--tenant", tenant, "--remove")
        await run("logout", "--everywhere")
        assert not session.exists()


def test_the_calls_are_documented() -> None:
    document = openapi("people", "1", "", calls(cast("Any", None)))
    assert len(document["paths"]) == 17
    assert "Tenant" in document["components"]["schemas"]

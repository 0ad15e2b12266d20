"""What every Directory and its API keys promise: who is who, at most five seconds old."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from contracts.failures import InvalidMetadataError, InvalidTenantError
from contracts.identity import Permission
from contracts.ports import TenantProfile
from contracts.state import Thresholds
from contracts.tenancy import TenantScope
from tests.conformance import databases
from tests.conformance.databases import AGE_S, Bench, fresh_scope

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size


async def profiles(database: Bench, scopes: set[TenantScope]) -> list[TenantProfile]:
    """Of some tenants, in the order given; other tests' tenants stand in the same table."""
    return [profile for profile in await database.directory.tenants() if profile.scope in scopes]


async def test_tenants_are_listed_in_order_of_their_ids(database: Bench, size: int) -> None:
    scopes = {fresh_scope() for _ in range(size)}
    for one in scopes:
        await database.create_tenant(one, f"Name of {one}", f"up-{one}", Thresholds(review_from=30))
    expected = [
        TenantProfile(one, f"Name of {one}", f"up-{one}", Thresholds(review_from=30)) for one in sorted(scopes, key=str)
    ]
    assert await profiles(database, scopes) == expected


async def test_a_new_tenant_is_listed_within_five_seconds(database: Bench, scope: TenantScope) -> None:
    assert await profiles(database, {scope}) == []
    await database.create_tenant(scope, "Acme")
    database.clock.step(AGE_S)
    assert await profiles(database, {scope}) == [TenantProfile(scope, "Acme", None, Thresholds())]


async def test_a_tenant_is_made_once(database: Bench, scope: TenantScope) -> None:
    assert await database.create_tenant(scope, "Acme", f"up-{scope}")
    assert not await database.create_tenant(scope, "Other", f"other-{scope}")
    with pytest.raises(InvalidMetadataError):
        await database.create_tenant(fresh_scope(), "Thief", f"up-{scope}")
    assert [profile.name for profile in await profiles(database, {scope})] == ["Acme"]
    assert await database.create_tenant(fresh_scope(), "Free", f"other-{scope}")


async def test_of_concurrent_makers_one_wins(database: Bench, scope: TenantScope) -> None:
    made = await asyncio.gather(*(database.create_tenant(scope, f"name {i}") for i in range(4)))
    assert sorted(made) == [False, False, False, True]


async def test_a_key_names_its_tenant_and_may_submit(database: Bench, scope: TenantScope) -> None:
    await database.create_tenant(scope)
    key = await database.create_key(scope)
    principal = await database.directory.principal(key)
    assert principal is not None
    assert (principal.scope, principal.actor, principal.person) == (scope, f"key:{key[:16]}", "")
    assert principal.may(Permission.EVENTS_SUBMIT, scope)
    assert not principal.may(Permission.EVENTS_SUBMIT, fresh_scope())


async def test_keys_that_nobody_made_name_nobody(database: Bench, scope: TenantScope) -> None:
    await database.create_tenant(scope)
    key = await database.create_key(scope)
    changed = key[:-1] + ("A" if key[-1] != "A" else "B")
    for bearer in (changed, "", "nonsense", key + "\0", key.upper(), "\ud800"):
        assert await database.directory.principal(bearer) is None
    assert await database.directory.principal(key) is not None


async def test_a_key_of_an_unknown_tenant_cannot_be_made(database: Bench, scope: TenantScope) -> None:
    with pytest.raises(InvalidTenantError):
        await database.create_key(scope)


async def test_a_revoked_key_is_shut_out_within_five_seconds(database: Bench, scope: TenantScope) -> None:
    await database.create_tenant(scope)
    key, other = await database.create_key(scope), await database.create_key(scope)
    assert await database.directory.principal(key) is not None
    await database.change_key(key)
    database.clock.step(AGE_S)
    assert await database.directory.principal(key) is None
    assert await database.directory.principal(other) is not None


async def test_a_key_expires_at_its_time(database: Bench, scope: TenantScope) -> None:
    await database.create_tenant(scope)
    key = await database.create_key(scope)
    await database.change_key(key, expires_at=database.clock.now() + timedelta(seconds=60))
    database.clock.step(59)
    assert await database.directory.principal(key) is not None
    database.clock.step(1)
    assert await database.directory.principal(key) is None


async def test_a_suspended_tenant_is_listed_and_not_served(database: Bench, scope: TenantScope) -> None:
    await database.create_tenant(scope)
    key = await database.create_key(scope)
    assert await database.directory.serves(scope)
    assert not await database.directory.serves(fresh_scope())
    await database.suspend(scope)
    database.clock.step(AGE_S)
    assert len(await profiles(database, {scope})) == 1
    assert not await database.directory.serves(scope)
    assert await database.directory.principal(key) is None

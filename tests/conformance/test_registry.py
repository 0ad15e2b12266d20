"""What every Registry promises: the most specific approved version decides, or none, and content is what was pinned."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

import pytest

from contracts.events import canonical_json
from contracts.failures import InvalidModelStateError, ModelNotApprovedError
from contracts.ports import ActiveSet
from contracts.state import Pin, Thresholds
from contracts.tenancy import TenantScope
from governance.registry import VersionStatus, release_artifacts
from tests.conformance import databases
from tests.conformance.databases import AGE_S, Bench, fresh_scope

bench_name, urls, database = databases.bench_name, databases.urls, databases.database
scope, size = databases.scope, databases.size

LONG_AGO, FAR_OFF = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def content() -> bytes:
    """Of a digest of its own."""
    return canonical_json({"n": secrets.token_hex(8)})


async def active(database: Bench, scope: TenantScope, event_type: str = "login", kind: str = "risk") -> ActiveSet:
    database.clock.step(AGE_S)
    (found,) = await database.registry.active([scope], kind, [event_type])
    return found


async def test_nothing_asked_is_nothing_answered(database: Bench) -> None:
    assert list(await database.registry.active([], "risk", [])) == []
    assert list(await database.registry.artifacts([])) == []
    assert list(await database.registry.revoked([])) == []


async def test_what_the_release_brings_decides_for_a_new_tenant(database: Bench, scope: TenantScope, size: int) -> None:
    scopes = [fresh_scope() for _ in range(size)]
    released = {artifact.pin: artifact for artifact in release_artifacts()}
    for found in await database.registry.active(scopes, "risk", ["payment.card"] * size):
        assert (found.thresholds, found.halted) == (Thresholds(), False)
        pins = [pin for pin in (found.model, found.policy, found.guardrail) if pin is not None]
        assert len(pins) == 3
        for artifact in await database.registry.artifacts(pins):
            assert canonical_json(dict(artifact.content)) == released[artifact.pin].content
            assert artifact.kind == released[artifact.pin].kind
        assert list(await database.registry.revoked(pins)) == [False] * 3
    (loan,) = await database.registry.active([scope], "risk", ["loan.application"])
    assert loan.model is not None
    assert loan.model in {pin for pin, one in released.items() if "risk:loan.application" in one.scopes}


async def test_the_most_specific_version_decides(database: Bench, scope: TenantScope) -> None:
    await database.create_tenant(scope, thresholds=Thresholds(hard_limit=80))
    mine = await database.register(scope, "own", content(), at="risk")
    special = await database.register(scope, "special", content(), at="risk:payment.card")
    other = fresh_scope()
    asked = ([scope, scope, other, scope], ["login", "payment.card", "login", "loan.application"])
    first, second, third, fourth = await database.registry.active(asked[0], "risk", asked[1])
    assert (first.model, second.model) == (mine, special)
    assert fourth.model == mine  # the tenant's own for the kind beats the installation's for the type
    assert third.model not in (mine, special, None)
    assert (first.thresholds.hard_limit, third.thresholds) == (80, Thresholds())
    assert (await active(database, scope, kind="compliance")).model not in (mine, special, None)


async def test_what_the_installation_uses_at_a_place_is_every_tenants(database: Bench, scope: TenantScope) -> None:
    event_type = "t" + secrets.token_hex(8)
    shared = await database.register(None, event_type, content(), at=f"risk:{event_type}")
    assert (await active(database, scope, event_type)).model == shared
    mine = await database.register(scope, "own", content(), at="risk")
    assert (await active(database, scope, event_type)).model == mine


@pytest.mark.parametrize("status", list(VersionStatus))
async def test_a_version_that_may_not_decide_leaves_its_place_empty(
    database: Bench, scope: TenantScope, status: VersionStatus
) -> None:
    """Never the next more general one: somebody chose this one, and somebody stopped it."""
    pin = await database.register(scope, "own", content(), status=status, at="risk")
    usable = status in (VersionStatus.APPROVED, VersionStatus.ACTIVE)
    found = await active(database, scope)
    assert found.model == (pin if usable else None)
    assert found.policy is not None
    if usable or status is VersionStatus.RETIRED:
        assert (await database.registry.artifacts([pin]))[0].pin == pin
    else:
        with pytest.raises(ModelNotApprovedError):
            await database.registry.artifacts([pin])
    assert list(await database.registry.revoked([pin])) == [status is VersionStatus.REVOKED]


@pytest.mark.parametrize(("valid_until", "valid"), [(LONG_AGO, False), (FAR_OFF, True), (None, True)])
async def test_a_version_whose_validation_has_expired_decides_nothing_more_and_can_be_read(
    database: Bench, scope: TenantScope, valid_until: datetime | None, valid: bool
) -> None:
    pin = await database.register(scope, "own", content(), valid_until=valid_until, at="risk")
    assert (await active(database, scope)).model == (pin if valid else None)
    assert (await database.registry.artifacts([pin]))[0].pin == pin
    assert list(await database.registry.revoked([pin])) == [False]


@pytest.mark.parametrize("kind", ["lists", "reasons"])
async def test_a_tenant_need_not_screen_or_have_words_and_is_told_when_it_wants_to_and_cannot(
    database: Bench, scope: TenantScope, kind: str
) -> None:
    found = await active(database, scope)
    assert (getattr(found, kind), found.lost) == (None, ())
    pin = await database.register(scope, "own", content(), at="risk", kind=kind)
    found = await active(database, scope)
    assert (getattr(found, kind), found.lost) == (pin, ())
    other = fresh_scope()
    await database.register(other, "own", content(), valid_until=LONG_AGO, at="risk", kind=kind)
    found = await active(database, other)
    assert (getattr(found, kind), found.lost) == (None, (kind,))


async def test_a_trial_is_told_beside_what_decides(database: Bench, scope: TenantScope) -> None:
    assert (await active(database, scope)).trial is None
    pin = await database.register(scope, "spring", content(), at="risk", kind="trial")
    found = await active(database, scope)
    assert (found.trial, found.lost) == (pin, ())
    assert found.model is not None


async def test_a_revocation_is_seen_within_two_seconds(database: Bench, scope: TenantScope) -> None:
    pin = await database.register(scope, "own", content(), at="risk")
    assert (await active(database, scope)).model == pin
    assert list(await database.registry.revoked([pin, pin])) == [False, False]
    await database.set_status(scope, pin, VersionStatus.REVOKED)
    database.clock.step(2)
    (found,) = await database.registry.active([scope], "risk", ["login"])
    assert found.model is None
    assert list(await database.registry.revoked([pin, pin])) == [True, True]


async def test_a_tenant_s_copy_cannot_revoke_what_every_tenant_uses(database: Bench, scope: TenantScope) -> None:
    """A pin names no tenant, and everybody knows the content of what the release brings."""
    shared = next(artifact for artifact in release_artifacts() if artifact.kind == "model")
    copy = await database.register(scope, shared.name, shared.content, status=VersionStatus.REVOKED)
    assert copy == shared.pin
    assert list(await database.registry.revoked([copy])) == [False]
    assert (await active(database, fresh_scope())).model is not None


async def test_content_is_found_by_its_pin_whoever_owns_it(database: Bench, size: int) -> None:
    written = [content() for _ in range(size)]
    pins = [await database.register(fresh_scope(), f"m{i}", one) for i, one in enumerate(written)]
    found = await database.registry.artifacts([*pins, pins[0]])
    assert [(artifact.pin, canonical_json(dict(artifact.content))) for artifact in found] == [
        *zip(pins, written, strict=True),
        (pins[0], written[0]),
    ]


async def test_a_tenant_s_versions_decide_for_nobody_else(database: Bench, scope: TenantScope) -> None:
    other = fresh_scope()
    pin = await database.register(scope, "own", content(), at="risk")
    assert (await active(database, other)).model not in (pin, None)
    await database.halt(scope)
    assert not (await active(database, other)).halted


async def test_what_is_not_pinned_exactly_is_not_found(database: Bench, scope: TenantScope) -> None:
    pin = await database.register(scope, "own", content())
    unknown = [
        Pin(name="own", version=1, digest="0" * 64),
        Pin(name="own", version=2, digest=pin.digest),
        Pin(name="other", version=1, digest=pin.digest),
    ]
    for one in unknown:
        with pytest.raises(ModelNotApprovedError):
            await database.registry.artifacts([pin, one])
    assert list(await database.registry.revoked([*unknown, pin])) == [False] * 4


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 63 + "}", "0" * 63 + "٥", "'; DROP TABLE events; --"])
async def test_a_digest_that_is_none_is_refused(database: Bench, digest: str) -> None:
    pin = Pin(name="m", version=1, digest=digest)
    with pytest.raises(InvalidModelStateError):
        await database.registry.artifacts([pin])
    with pytest.raises(InvalidModelStateError):
        await database.registry.revoked([pin])


@pytest.mark.parametrize("stored", [b"[1]", b"", b"{", b'"a"', b"\0\xff"])
async def test_content_that_is_no_json_object_is_refused(database: Bench, scope: TenantScope, stored: bytes) -> None:
    pin = await database.register(scope, "own", stored)
    with pytest.raises(InvalidModelStateError):
        await database.registry.artifacts([pin])


# --- halts --------------------------------------------------------------------------------------------


async def test_a_halted_tenant_is_halted_until_it_is_lifted(database: Bench, scope: TenantScope) -> None:
    await database.halt(scope)
    found = await active(database, scope)
    assert found.halted
    assert found.model is not None
    assert (await active(database, scope, kind="compliance")).halted
    await database.halt(scope, lift=True)
    assert not (await active(database, scope)).halted


@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_halted_model_halts_where_it_decides(database: Bench, scope: TenantScope, everywhere: bool) -> None:
    name = "m" + secrets.token_hex(8)
    await database.register(scope, name, content(), at="risk:login")
    await database.halt(None if everywhere else scope, name)
    try:
        assert (await active(database, scope)).halted
        assert not (await active(database, scope, "payment.card")).halted
        assert not (await active(database, fresh_scope())).halted
    finally:
        await database.halt(None if everywhere else scope, name, lift=True)


async def test_a_halt_of_a_model_that_may_not_decide_halts_nothing(database: Bench, scope: TenantScope) -> None:
    """Nothing decides there at all: that is told by the missing model."""
    name = "m" + secrets.token_hex(8)
    await database.register(scope, name, content(), status=VersionStatus.REVOKED, at="risk")
    await database.halt(scope, name)
    found = await active(database, scope)
    assert (found.model, found.halted) == (None, False)


async def test_a_halt_of_everything_halts_every_tenant(database: Bench, scope: TenantScope) -> None:
    await database.halt(None)
    try:
        assert (await active(database, scope)).halted
    finally:
        await database.halt(None, lift=True)
    assert not (await active(database, scope)).halted

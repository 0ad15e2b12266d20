"""Who calls: keys and tokens become principals by what the installation knows, and by nothing that they say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contracts.failures import DatabaseError
from contracts.identity import EVERYWHERE, Grant, Permission, Person, Principal, Role
from contracts.tenancy import TenantScope
from governance.identity import Authenticator
from governance.tokens import MAX_TOKEN_BYTES, TokenIssuer
from tests.fakes import SteppingClock

ACME, GLOBEX = TenantScope("acme"), TenantScope("globex")
KEY = "rfk_0123456789ab_" + "a" * 43


@dataclass
class Book:
    """Users, tenants and one API key, in memory; `down` answers as a database that does not."""

    people: dict[str, Person] = field(default_factory=dict)
    active: set[TenantScope] = field(default_factory=lambda: {ACME, GLOBEX})
    down: bool = False

    async def person(self, user_id: str) -> Person | None:
        if self.down:
            raise DatabaseError
        return self.people.get(user_id)

    async def person_of(self, issuer: str, subject: str) -> Person | None:
        raise AssertionError("nobody comes from elsewhere here")

    async def serves(self, scope: TenantScope) -> bool:
        return scope in self.active

    async def principal(self, bearer: str) -> Principal | None:
        grants = frozenset({Grant("acme", Role.SERVICE)})
        return Principal("key:rfk_0123456789ab", "ana", grants, ACME) if bearer == KEY else None


@pytest.fixture
def clock() -> SteppingClock:
    return SteppingClock()


@pytest.fixture
def tokens() -> TokenIssuer:
    return TokenIssuer(private=Ed25519PrivateKey.from_private_bytes(b"\x01" * 32).private_bytes_raw())


@pytest.fixture
def book() -> Book:
    ana = Person("ana", frozenset({Grant("acme", Role.ANALYST)}))
    return Book({"ana": ana, "root": Person("root", frozenset({Grant(EVERYWHERE, Role.ADMIN)}))})


@pytest.fixture
def door(book: Book, tokens: TokenIssuer, clock: SteppingClock) -> Authenticator:
    return Authenticator(book, book, tokens, clock)


def token(tokens: TokenIssuer, clock: SteppingClock, user: str, scope: TenantScope | None = None) -> str:
    return tokens.issue(user, scope, clock.now(), 600, "j")


async def test_a_token_is_its_user_with_the_grants_of_the_table(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock
) -> None:
    assert await door.principal(token(tokens, clock, "ana")) == Principal(
        "user:ana", "ana", frozenset({Grant("acme", Role.ANALYST)}), None
    )


async def test_an_api_key_is_looked_up_and_nothing_else_is(door: Authenticator, book: Book) -> None:
    book.down = True
    found = await door.principal(KEY)
    assert found is not None
    assert found.actor == "key:rfk_0123456789ab"
    assert await door.principal(KEY[:-1] + "b") is None
    for permission in (Permission.USERS_MANAGE, Permission.KEYS_MANAGE, Permission.APPROVALS_DECIDE, Permission.HALT):
        assert not found.may(permission, ACME)


async def test_a_bound_token_holds_in_its_tenant_only(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock
) -> None:
    found = await door.principal(token(tokens, clock, "root", ACME))
    assert found is not None
    assert found.scope == ACME
    assert found.may(Permission.KEYS_MANAGE, ACME)
    assert not found.may(Permission.KEYS_MANAGE, GLOBEX)
    assert not found.may(Permission.TENANTS_MANAGE, None)


async def test_a_token_bound_to_a_tenant_without_a_grant_or_out_of_service_is_nobodys(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock, book: Book
) -> None:
    assert await door.principal(token(tokens, clock, "ana", ACME)) is not None
    assert await door.principal(token(tokens, clock, "ana", GLOBEX)) is None
    assert await door.principal(token(tokens, clock, "root", TenantScope("nowhere"))) is None
    book.active.discard(ACME)
    assert await door.principal(token(tokens, clock, "ana", ACME)) is None
    assert await door.principal(token(tokens, clock, "ana")) is not None


async def test_a_disabled_or_unknown_user_is_nobody(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock, book: Book
) -> None:
    good = token(tokens, clock, "ana")
    book.people["ana"] = replace(book.people["ana"], disabled=True)
    assert await door.principal(good) is None
    assert await door.principal(token(tokens, clock, "nobody")) is None


async def test_a_login_ends_every_token_before_the_one_after_it(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock, book: Book
) -> None:
    clock.step(0.4)
    before = token(tokens, clock, "ana")
    clock.step(0.2)
    book.people["ana"] = replace(book.people["ana"], tokens_valid_from=clock.now())
    assert await door.principal(before) is None
    assert await door.principal(token(tokens, clock, "ana")) is not None
    clock.step(0.1)
    assert await door.principal(token(tokens, clock, "ana")) is not None


@pytest.mark.parametrize(
    "bearer", ["", " ", "x", "a.b.c", "..", "rfk_", "rfk_x", "\x00", "ä.ö.ü", "x" * (MAX_TOKEN_BYTES + 1), "." * 9_000]
)
async def test_what_is_malformed_is_nobody_and_costs_no_question(door: Authenticator, book: Book, bearer: str) -> None:
    book.down = True
    assert await door.principal(bearer) is None


async def test_expired_and_foreign_tokens_cost_no_question_either(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock, book: Book
) -> None:
    book.down = True
    old = token(tokens, clock, "ana")
    clock.moment += timedelta(hours=1)
    assert await door.principal(old) is None
    other = TokenIssuer(private=b"\x02" * 32)
    assert await door.principal(token(other, clock, "ana")) is None


async def test_a_database_that_does_not_answer_is_said_and_is_no_wrong_credential(
    door: Authenticator, tokens: TokenIssuer, clock: SteppingClock, book: Book
) -> None:
    book.down = True
    with pytest.raises(DatabaseError):
        await door.principal(token(tokens, clock, "ana"))


async def test_without_token_keys_api_keys_still_open(book: Book, clock: SteppingClock, tokens: TokenIssuer) -> None:
    door = Authenticator(book, book, None, clock)
    assert await door.principal(KEY) is not None
    assert await door.principal(token(tokens, clock, "ana")) is None

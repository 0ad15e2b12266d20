"""API keys and passwords: their form, and that only the right secret matches."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import InvalidRequestError, LimitExceededError
from governance.access import KEY_BYTES, matches, new_api_key, parse_api_key
from governance.passwords import MAX_BYTES, SALT_BYTES, Passwords
from governance.postgres.commands import PeoplePolicy
from governance.postgres.people import LoggedIn
from governance.postgres.tenants import MadeKey

PEPPER = b"pepper"


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_a_made_key_is_parsed_and_matches(token: bytes) -> None:
    key, key_id, mac = new_api_key(token, PEPPER)
    assert re.fullmatch(r"rfk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", key)
    presented = parse_api_key(key)
    assert presented is not None
    assert presented.key_id == key_id
    assert key.startswith(key_id)
    assert matches(presented, mac, PEPPER)
    assert not matches(presented, mac, b"another pepper")


def test_another_secret_does_not_match() -> None:
    _, _, mac = new_api_key(bytes(KEY_BYTES), PEPPER)
    other, _, _ = new_api_key(bytes(6) + b"\x01" * 32, PEPPER)
    presented = parse_api_key(other)
    assert presented is not None
    assert not matches(presented, mac, PEPPER)


@pytest.mark.parametrize("size", [0, KEY_BYTES - 1, KEY_BYTES + 1])
def test_too_little_randomness_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="random bytes"):
        new_api_key(bytes(size), PEPPER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rfk_",
        "rfk_0123456789ab_" + "a" * 42,
        "rfk_0123456789AB_" + "a" * 43,
        "rfk_0123456789ab_" + "a" * 43 + "\n",
        " rfk_0123456789ab_" + "a" * 43,
        "rfk_0123456789ab_" + "ä" * 43,
        "rfk_0123456789ab_" + "a" * 42 + "\0",
    ],
)
def test_what_is_not_formed_like_a_key_is_none(text: str) -> None:
    assert parse_api_key(text) is None


# --- passwords ----------------------------------------------------------------------------------------

SALT = bytes(range(SALT_BYTES))
GOOD = "correct horse battery"


@pytest.fixture
def quick() -> Passwords:
    return Passwords(memory_kib=64, passes=1)


async def test_only_the_right_password_matches(quick: Passwords) -> None:
    stored = await quick.hash(GOOD, SALT)
    assert GOOD not in stored
    assert await quick.matches(GOOD, stored)
    for wrong in ("", GOOD + " ", GOOD.upper(), GOOD[:-1], "\x00", "\ud800", "x" * 5_000):
        assert not await quick.matches(wrong, stored)


async def test_nobody_has_the_password_that_unknown_users_are_compared_with(quick: Passwords) -> None:
    assert not await quick.matches("nobody", None)
    assert not await quick.matches("nobody", "")
    assert not await quick.matches(GOOD, "not a hash at all")


async def test_two_spellings_of_one_character_are_one_password(quick: Passwords) -> None:
    stored = await quick.hash("caf\u00e9 au lait, s'il vous", SALT)
    assert await quick.matches("cafe\u0301 au lait, s'il vous", stored)


@pytest.mark.parametrize("password", ["", "short", "x" * 11, "x" * (MAX_BYTES + 1), "ä" * 600])
async def test_a_password_that_cannot_be_one_is_refused_without_repeating_it(quick: Passwords, password: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await quick.hash(password, SALT)
    assert not password or password not in raised.value.detail


async def test_a_longer_password_than_there_can_be_never_matches_its_beginning(quick: Passwords) -> None:
    stored = await quick.hash("x" * MAX_BYTES, SALT)
    assert await quick.matches("x" * MAX_BYTES, stored)
    assert not await quick.matches("x" * (MAX_BYTES + 1), stored)


async def test_the_parameters_are_owasp_s_and_others_are_outdated(quick: Passwords) -> None:
    passwords = Passwords()
    stored = await passwords.hash(GOOD, SALT)
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert not passwords.outdated(stored)
    for other in (await quick.hash(GOOD, SALT), "not a hash", "$argon2i$v=19$m=19456,t=2,p=1$AAAAAAAAAAA$AAAA"):
        assert passwords.outdated(other)


async def test_a_comparison_does_not_stop_the_loop() -> None:
    passwords = Passwords(memory_kib=32_768, passes=2)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(turn())
    await asyncio.sleep(0)
    began = time.perf_counter()
    await passwords.matches(GOOD, None)
    ticker.cancel()
    assert turns > 10, (turns, time.perf_counter() - began)


async def test_a_flood_of_comparisons_is_bounded(quick: Passwords) -> None:
    slow = Passwords(memory_kib=8_192, passes=2)
    answers = await asyncio.gather(*(slow.matches(GOOD, None) for _ in range(60)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, LimitExceededError)]
    assert len(refused) == 28
    assert [answer for answer in answers if answer is not False and answer not in refused] == []
    assert not await slow.matches(GOOD, None)


async def test_a_flood_of_new_passwords_keeps_nobody_from_logging_in() -> None:
    """Who is logged in may change the own password: hashes and comparisons share what waits."""
    slow = Passwords(memory_kib=8_192, passes=2)
    salt = bytes(SALT_BYTES)
    answers = await asyncio.gather(*(slow.hash(GOOD, salt) for _ in range(60)), return_exceptions=True)
    assert sum(isinstance(answer, LimitExceededError) for answer in answers) == 28
    assert await slow.matches(GOOD, await slow.hash(GOOD, salt))


def test_no_secret_is_in_what_a_value_prints() -> None:
    api_key, key_id, _ = new_api_key(bytes(range(KEY_BYTES)), b"pepper of a test")
    presented = parse_api_key(api_key)
    assert presented is not None
    at = datetime(2026, 1, 31, tzinfo=UTC)
    values = [
        presented,
        PeoplePolicy(b"pepper of a test"),
        LoggedIn("a.b.c-token", at, None),
        MadeKey(api_key=api_key, key_id=key_id, expires_at=None),
    ]
    printed = repr(values) + str(values[-1])
    assert not [word for word in (presented.secret, "pepper of", "a.b.c-token") if word in printed]

"""API keys: their form, and that only the right secret under the right pepper matches."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governance.access import KEY_BYTES, matches, new_api_key, parse_api_key

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

"""Signatures of approvals, and the key files behind them."""

from __future__ import annotations

import dataclasses
import stat
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from contracts.failures import EncryptionError, InvalidModelStateError
from deploy import keys
from deploy.settings import Settings, SettingsError
from governance.signing import Signer, Statement, Verifier, key_id

AT = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
SAID = Statement("model", "acme", "own", 3, "d" * 64, "ann", "bob", AT, AT + timedelta(days=365))
OLD, NEW = Signer(b"o" * 32), Signer(b"n" * 32)


def test_a_signature_holds_for_exactly_what_was_approved() -> None:
    verifier, signature = Verifier([NEW.public]), NEW.sign(SAID)
    verifier.check(SAID, NEW.key_id, signature)
    changes: dict[str, Any] = {
        "kind": "policy",
        "tenant": "*",
        "name": "other",
        "version": 4,
        "digest": "e" * 64,
        "author": "eve",
        "approver": "eve",
        "approved_at": AT + timedelta(microseconds=1),
        "valid_until": None,
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(Statement)}
    for name, value in changes.items():
        with pytest.raises(InvalidModelStateError, match="does not fit"):
            verifier.check(dataclasses.replace(SAID, **{name: value}), NEW.key_id, signature)


def test_the_same_moment_elsewhere_is_the_same_statement() -> None:
    """PostgreSQL gives times back in the zone of its session."""
    there = AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert dataclasses.replace(SAID, approved_at=there).signed_bytes() == SAID.signed_bytes()


@pytest.mark.parametrize(
    ("named", "signature", "problem"),
    [
        (None, None, "is not signed"),
        (NEW.key_id, None, "is not signed"),
        (None, NEW.sign(SAID), "is not signed"),
        (OLD.key_id, OLD.sign(SAID), "not trusted"),
        (NEW.key_id, OLD.sign(SAID), "does not fit"),
        (NEW.key_id, b"", "does not fit"),
        (NEW.key_id, bytes(64), "does not fit"),
    ],
)
def test_a_missing_foreign_or_wrong_signature_says_what_is_wrong(
    named: str | None, signature: bytes | None, problem: str
) -> None:
    with pytest.raises(InvalidModelStateError, match=f"model own version 3.*{problem}"):
        Verifier([NEW.public]).check(SAID, named, signature)


def test_keys_can_be_changed_without_a_gap() -> None:
    both = Verifier([OLD.public, NEW.public])
    for signer in (OLD, NEW):
        both.check(SAID, signer.key_id, signer.sign(SAID))
    assert OLD.key_id != NEW.key_id == key_id(NEW.public)
    assert len(NEW.key_id) == 16


def test_material_that_is_no_key_is_refused() -> None:
    with pytest.raises(EncryptionError):
        Signer(b"short")
    with pytest.raises(EncryptionError):
        Verifier([b"short"])


# --- files --------------------------------------------------------------------------------------------


def settings(directory: Path, **fields: Any) -> Settings:
    return Settings.model_validate({"data_dir": directory} | fields)


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (directory / "keys").iterdir()}


def test_keys_are_made_once_whole_and_for_their_owner_only(tmp_path: Path) -> None:
    made = keys.init(tmp_path)
    assert {path.name for path in made} == {"pepper", "artifact.key", "artifact.pub", "token.key", "token.pub"}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == (0o044 if path.suffix == ".pub" else 0)
    before = content(tmp_path)
    assert keys.init(tmp_path) == []
    assert content(tmp_path) == before
    keys.artifact_verifier(settings(tmp_path)).check(
        SAID, keys.artifact_signer(settings(tmp_path)).key_id, keys.artifact_signer(settings(tmp_path)).sign(SAID)
    )


@pytest.mark.parametrize("lost", ["pepper", "artifact.pub", "token.pub"])
def test_a_half_made_directory_is_completed_and_nothing_in_it_replaced(tmp_path: Path, lost: str) -> None:
    keys.init(tmp_path)
    before = content(tmp_path)
    (tmp_path / "keys" / lost).unlink()
    assert [path.name for path in keys.init(tmp_path)] == [lost]
    after = content(tmp_path)
    assert {name: text for name, text in after.items() if name != "pepper"} == {
        name: text for name, text in before.items() if name != "pepper"
    }
    assert len(after["pepper"]) == 64


def test_a_host_that_only_checks_gets_no_private_key(tmp_path: Path) -> None:
    keys.init(tmp_path)
    (tmp_path / "keys" / "artifact.key").unlink()
    (tmp_path / "keys" / "token.key").unlink()
    assert keys.init(tmp_path) == []
    with pytest.raises(SettingsError, match="no private key"):
        keys.artifact_signer(settings(tmp_path))
    assert keys.token_private(settings(tmp_path)) is None
    assert len(keys.token_publics(settings(tmp_path))) == 1


def test_many_processes_that_start_at_once_agree_on_one_set_of_keys(tmp_path: Path) -> None:
    together, made = threading.Barrier(6), list[Path]()

    def start() -> None:
        together.wait()
        made.extend(keys.init(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(content(tmp_path)) == 5
    signer = keys.artifact_signer(settings(tmp_path))
    keys.artifact_verifier(settings(tmp_path)).check(SAID, signer.key_id, signer.sign(SAID))


def test_public_keys_of_the_settings_stand_before_the_files(tmp_path: Path) -> None:
    keys.init(tmp_path)
    given = settings(tmp_path, artifact_keys=f"{OLD.public.hex()}, {NEW.public.hex()}", token_keys=OLD.public.hex())
    for signer in (OLD, NEW):
        keys.artifact_verifier(given).check(SAID, signer.key_id, signer.sign(SAID))
    assert keys.token_publics(given) == [OLD.public]


def test_what_is_missing_or_broken_says_what_to_do_and_never_the_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="keys init"):
        keys.artifact_verifier(settings(tmp_path))
    with pytest.raises(SettingsError, match="keys init"):
        keys.pepper(settings(tmp_path))
    assert keys.token_publics(settings(tmp_path)) == []
    with pytest.raises(SettingsError, match="RISKFLEET_ARTIFACT_KEYS") as caught:
        keys.artifact_verifier(settings(tmp_path, artifact_keys="c0ffee"))
    assert "c0ffee" not in str(caught.value)
    keys.init(tmp_path)
    (tmp_path / "keys" / "token.key").write_text("broken")
    (tmp_path / "keys" / "pepper").write_text("")
    for read in (keys.token_private, keys.pepper):
        with pytest.raises(SettingsError):
            read(settings(tmp_path))
    assert keys.pepper(settings(tmp_path, pepper=SecretStr("p"))) == b"p"

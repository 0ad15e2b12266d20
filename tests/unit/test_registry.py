"""The registry's rules: its moves, its history, what a release brings, and how the command line asks for things."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from contracts.events import canonical_json
from contracts.failures import ConflictError, InvalidModelStateError
from contracts.identity import PERMISSIONS, Permission, Role
from contracts.ports import Artifact
from deploy import cli_registry
from deploy.operator import OperatorClient
from deploy.settings import SettingsError
from gateway.calls import openapi
from gateway.control import registry as door
from governance.registry import (
    KINDS,
    TRANSITIONS,
    Activation,
    Draft,
    VersionKey,
    VersionStatus,
    active_before,
    check_move,
    loads_as,
    permission_for,
    release_artifacts,
)
from workers.judgement.screening import load_names

S = VersionStatus

# --- moves --------------------------------------------------------------------------------------------


def test_a_version_decides_only_after_an_approval() -> None:
    """Whatever way is taken: without the move to approved, no way leads to active."""
    reached, front = {S.DRAFT}, [S.DRAFT]
    while front:
        start = front.pop()
        for to in {to for origin, to in TRANSITIONS if origin == start} - reached - {S.APPROVED}:
            reached.add(to)
            front.append(to)
    assert reached == {S.DRAFT, S.SUBMITTED, S.REJECTED}


def test_rejected_and_revoked_are_final_and_nothing_else_is() -> None:
    assert {status for status in S if status not in {start for start, _ in TRANSITIONS}} == {S.REJECTED, S.REVOKED}


@pytest.mark.parametrize("start", S)
@pytest.mark.parametrize("to", S)
def test_a_move_that_is_not_in_the_table_is_a_conflict_that_names_the_allowed_ones(start: S, to: S) -> None:
    if (start, to) in TRANSITIONS:
        check_move("it", start, to)
        return
    with pytest.raises(ConflictError, match=f"it is {start} and may not become {to}; allowed: "):
        check_move("it", start, to)


def test_a_move_needs_one_permission_wherever_it_starts() -> None:
    for (_, to), permission in TRANSITIONS.items():
        assert permission_for(to) == permission


def test_no_role_both_writes_and_approves_and_programs_do_neither() -> None:
    for role, permissions in PERMISSIONS.items():
        assert not {Permission.REGISTRY_AUTHOR, Permission.REGISTRY_APPROVE} <= permissions, role
    assert not set(TRANSITIONS.values()) & PERMISSIONS[Role.SERVICE]


# --- drafts -------------------------------------------------------------------------------------------

DRAFT: dict[str, Any] = {
    "kind": "policy",
    "name": "rules",
    "content": {"type": "cel"},
    "reason": "new law",
    "owner": "compliance",
    "purpose": "stops what the law stops",
    "use_tag": "aml",
    "limitations": "screens no list",
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "code"},
        {"name": "../etc"},
        {"name": "A"},
        {"name": "x" * 64},
        {"content": {}},
        {"content": "text"},
        {"reason": ""},
        {"use_tag": "ads"},
        {"valid_until": "tomorrow"},
        {"valid_until": "2030-01-01T00:00:00"},
        {"version": 7},
        {"author": "somebody else"},
        {"status": "approved"},
    ],
)
def test_a_draft_says_what_it_is_and_nothing_about_who_or_which(wrong: dict[str, Any]) -> None:
    Draft.model_validate(DRAFT)
    with pytest.raises(ValidationError):
        Draft.model_validate(DRAFT | wrong)


def test_what_cannot_be_read_when_it_decides_is_a_finding() -> None:
    seen = []

    def load(artifact: Artifact) -> None:
        seen.append((artifact.kind, artifact.pin.digest))
        if "rules" not in artifact.content:
            raise InvalidModelStateError("has no rules")

    validate = loads_as("policy", load)
    assert list(validate({"rules": []})) == []
    assert list(validate({"b": 1, "a": 2})) == [("", "has no rules")]
    assert seen[1] == ("policy", hashlib.sha256(b'{"a":2,"b":1}').hexdigest())


# --- history ------------------------------------------------------------------------------------------


def entry(action: str, version: int | None) -> Activation:
    return Activation.model_validate(
        {
            "kind": "model",
            "scope_key": "risk",
            "action": action,
            "name": None if version is None else "m",
            "version": version,
            "activated_by": "ann",
            "reason": "r",
            "activated_at": "2026-01-31T12:00:00Z",
        }
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_repeated_rollbacks_go_back_through_every_activation(versions: list[int]) -> None:
    history = [entry("activate", version) for version in versions]
    for expected in reversed(versions[:-1]):
        back = active_before(history)
        assert back == VersionKey("model", "m", expected)
        history.append(entry("rollback", expected))
    assert active_before(history) is None
    with pytest.raises(ConflictError):
        active_before([*history, entry("rollback", None)])


def test_an_activation_after_a_rollback_is_what_the_next_rollback_takes_away() -> None:
    history = [entry("activate", 1), entry("activate", 2), entry("rollback", 1), entry("activate", 3)]
    assert active_before(history) == VersionKey("model", "m", 1)


def test_nothing_can_be_rolled_back_where_nothing_was_activated() -> None:
    with pytest.raises(ConflictError):
        active_before([])


# --- what a release brings ----------------------------------------------------------------------------


def test_a_release_brings_a_usable_set_for_every_kind_of_event() -> None:
    artifacts = release_artifacts()
    for place in ("risk", "compliance"):
        assert {a.kind for a in artifacts if place in a.scopes} == {"model", "policy", "guardrail"}
    for artifact in artifacts:
        assert artifact.digest == hashlib.sha256(artifact.content).hexdigest()
        assert artifact.content == canonical_json(orjson.loads(artifact.content))
        assert artifact.limitations
    assert len({(a.kind, a.name, a.version) for a in artifacts}) == len(artifacts)


# --- the calls and the command line -------------------------------------------------------------------


def test_every_call_is_documented_with_the_permission_of_its_move() -> None:
    calls = door.calls(None)  # type: ignore[arg-type] # the document is made without a desk
    document = openapi("t", "1", "a", calls)
    needed = {call.operation: call.permission for call in calls}
    assert needed["approveVersion"] == needed["revokeVersion"] == Permission.REGISTRY_APPROVE
    assert needed["submitVersion"] == needed["registerVersion"] == Permission.REGISTRY_AUTHOR
    assert needed["activateVersions"] == needed["retireVersion"] == Permission.REGISTRY_ACTIVATE
    assert None not in needed.values()
    path = document["paths"]["/ops/v1/tenants/{tenant}/registry/{kind}/{name}/{version}/approve"]["post"]
    assert [p["name"] for p in path["parameters"]] == ["tenant", "kind", "name", "version"]
    assert set(KINDS) == set(document["components"]["schemas"]["Draft"]["properties"]["kind"]["enum"])


VERSION = {
    "kind": "model",
    "name": "own",
    "version": 2,
    "status": "submitted",
    "digest": "d" * 64,
    "author": "ann",
    "approver": None,
    "use_tag": "fraud",
    "valid_until": None,
    "reason": "see [1]",
    "evidence": {},
    "content": {"type": "scorecard"},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, Any]]:
    """Requests that the command line makes, answered by a server that has one version."""
    requests: list[tuple[str, str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append((request.method, request.url.raw_path.decode(), orjson.loads(request.content or b"null")))
        if request.url.path.endswith(("/registry", "/activate")) and request.method != "PUT":
            return httpx.Response(200, json={"versions": [VERSION]})
        if request.method == "DELETE":
            return httpx.Response(204)
        if "/halts" in request.url.path:
            return httpx.Response(200, json={"model": "*"})
        return httpx.Response(200, json=VERSION)

    def client() -> OperatorClient:
        return OperatorClient("http://control", "token", httpx.MockTransport(answer))

    monkeypatch.setattr(cli_registry, "_client", client)
    monkeypatch.setenv("RISKFLEET_DATA_DIR", str(tmp_path))
    return requests


def run(*words: str) -> str:
    result = CliRunner().invoke(cli_registry.registry_app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_approving_names_the_digest_that_was_read(asked: list[tuple[str, str, Any]]) -> None:
    words = ("approve", "model", "own", "2", "--tenant", "acme", "--reason", "sound")
    with pytest.raises(SettingsError, match="--digest"):
        run(*words)
    with pytest.raises(SettingsError, match="read it again"):
        run(*words, "--digest", "e" * 12)
    assert all(method == "GET" for method, _, _ in asked)
    run(*words, "--digest", "d" * 12)
    path = "/ops/v1/tenants/acme/registry/model/own/2/approve"
    assert asked[-1] == ("POST", path, {"digest": "d" * 64, "reason": "sound"})


def test_a_publishers_files_become_a_version_that_can_be_registered(tmp_path: Path) -> None:
    names, aliases, out = tmp_path / "sdn.csv", tmp_path / "alt.csv", tmp_path / "lists.json"
    names.write_text('36,"AEROCARIBBEAN AIRLINES",-0-,"CUBA"\n173,"ANGLO-CARIBBEAN CO.",-0-,"CUBA"\n\x1a\n')
    aliases.write_text('36,12,"aka","AERO-CARIBBEAN",-0-\n')
    words = ("--name", "sdn", "--source", "a test", "--owner", "compliance", "--out", str(out))
    said = run("names", str(names), "--aliases", str(aliases), *words)
    assert "3 names of 2 entries" in said
    draft = Draft.model_validate_json(out.read_bytes())
    assert draft.kind == "lists"
    assert not loads_as("lists", load_names)(draft.content)
    names.write_text("not,a list\n")
    with pytest.raises(InvalidModelStateError, match=r"sdn\.csv line 1"):
        run("names", str(names), *words)


def test_versions_are_activated_together(asked: list[tuple[str, str, Any]]) -> None:
    run("activate", "model/own/2@risk", "policy/rules/1@risk:login", "--shared", "--reason", "go")
    (_, path, body) = asked[-1]
    assert path == "/ops/v1/tenants/_shared/registry/activate"
    assert body["activations"] == [
        {"kind": "model", "name": "own", "version": 2, "scope_key": "risk"},
        {"kind": "policy", "name": "rules", "version": 1, "scope_key": "risk:login"},
    ]
    with pytest.raises(SettingsError, match="KIND/NAME/VERSION@SCOPE"):
        run("activate", "model/own@risk", "--shared", "--reason", "go")


def test_what_is_printed_is_a_table_or_json(asked: list[tuple[str, str, Any]]) -> None:
    assert orjson.loads(run("list", "--tenant", "acme", "--json")) == {"versions": [VERSION]}
    assert "own" in run("list", "--tenant", "acme")
    assert "see [1]" in run("show", "model", "own", "2", "--tenant", "acme")
    assert "halted: *" in run("halt", "set", "--tenant", "acme", "--reason", "incident")
    assert asked[-1] == ("PUT", "/ops/v1/tenants/acme/halts/%2A", {"reason": "incident"})
    run("halt", "clear", "--tenant", "acme", "--reason", "over")


def test_a_command_needs_to_know_where(asked: list[tuple[str, str, Any]]) -> None:
    with pytest.raises(SettingsError, match="which tenant"):
        run("list")
    with pytest.raises(SettingsError, match="not both"):
        run("list", "--tenant", "acme", "--shared")
    assert asked == []

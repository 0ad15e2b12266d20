"""The command line of dead letters: what it asks for, what it says, and that it sends nothing without a yes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import orjson
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from deploy import cli_dlq, printing
from deploy.operator import OperatorClient, OperatorError
from deploy.settings import SettingsError
from governance.deadletters import LetterGroup, LetterSummary

AT = "2026-01-31T12:00:00.123456Z"
ROOT = "/ops/v1/dead-letters"
Answers = dict[str, Any]


class Wire:
    """Answers by method and path; a callable is asked with the body."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = f"{request.method} {request.url.path.removeprefix(ROOT) or '/'}"
        body = orjson.loads(request.content) if request.content else dict(request.url.params)
        self.asked.append((name, body))
        found = self.answers[name]
        answer = found(body) if callable(found) else found
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Wire]]:
    app = typer.Typer()
    app.add_typer(cli_dlq.dlq_app, name="dlq")

    def invoke(words: Sequence[str], answers: Answers) -> tuple[Any, Wire]:
        wire = Wire(answers)
        client = OperatorClient("http://control", "token", httpx.MockTransport(wire))
        monkeypatch.setattr(cli_dlq, "_client", lambda: client)
        return CliRunner().invoke(app, ["dlq", *words]), wire

    return invoke


def letter(number: int = 0) -> dict[str, Any]:
    found = dict.fromkeys(LetterSummary.model_fields, "x") | {"status": "open", "attempts": 5, "replays": 0}
    found |= {"tenant": "acme", "stage": "scoring", "problem": "model-not-approved"}
    return found | {"first_failed_at": AT, "last_failed_at": AT, "parked_at": AT, "letter_id": f"{number:032x}"}


def group() -> dict[str, Any]:
    return LetterGroup(
        fingerprint="0123456789abcdef",
        count=1_234,
        open=1_200,
        closed=30,
        replayed=4,
        discarded=0,
        tenants=("acme", "globex"),
        stages=("guardrail", "scoring"),
        category="POLICY_VIOLATION",
        problem="model-not-approved",
        exception_class="ModelNotApprovedError",
        first_parked_at=AT,
        last_parked_at=AT,
    ).model_dump(mode="json")


def done(body: Any, result: str = "replayed") -> dict[str, Any]:
    about = {"event_id": "e", "why": "because", "replays": 1, "due_at": AT, "failed": False, "result": result}
    return {"action": "replay", "results": [about | {"letter_id": name} for name in body["letter_ids"]], "counts": {}}


def dry(body: Any) -> dict[str, Any]:
    about = {"event_id": "e", "result": "decides", "now": None, "then": "APPROVED", "why": ""}
    results = [about | {"letter_id": name} for name in body["letter_ids"]]
    number = len(results)
    return {"results": results, "counts": {"decides": number}, "changes": {"undecided → APPROVED": number}}


def page(number: int) -> dict[str, Any]:
    return {"letters": [letter(i) for i in range(number)], "next": None}


ALONE = {"alone": 100, "within_s": 3_600, "left": 100, "most_replays": 3}


def test_groups_and_lists_fit_eighty_columns(
    run: Callable[..., tuple[Any, Wire]], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Console(width=80, force_terminal=True, color_system=None)
    for module in (printing, cli_dlq):
        monkeypatch.setattr(module, "console", narrow)
    for words, answers in (
        (("groups",), {"GET /groups": {"groups": [group()], "next": None}}),
        (("list", "--status", "all"), {"GET /": page(2)}),
    ):
        with narrow.capture() as captured:
            assert run(words, answers)[0].exit_code == 0
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= 80
        assert ("0123456789abcdef" in captured.get()) or (f"{1:032x}" in captured.get())


def test_filters_go_to_the_server_and_an_empty_list_says_what_that_means(run: Callable[..., tuple[Any, Wire]]) -> None:
    shown, wire = run(("list", "--stage", "scoring", "--older-than", "15m", "--tenant", "acme"), {"GET /": page(0)})
    assert "no dead letter is like this" in shown.output
    asked = wire.asked[0][1]
    assert (asked["stage"], asked["tenant"], asked["status"]) == ("scoring", "acme", "open")
    assert asked["parked_before"].endswith("+00:00")
    assert "nothing of yours is parked" in run(("list",), {"GET /": page(0)})[0].output
    assert isinstance(run(("list", "--older-than", "soon"), {})[0].exception, SettingsError)


def test_nothing_is_sent_without_a_yes_a_reason_and_a_choice(run: Callable[..., tuple[Any, Wire]]) -> None:
    answers = {"GET /": page(2), "GET /allowance": ALONE, "POST /dry-run": dry}
    for words in (
        ("replay", "--all", "--reason", "x"),
        ("replay", "--reason", "x", "--yes"),
        ("replay", "--all", "--yes"),
        ("discard", "abc", "--tenant", "acme", "--reason", "x", "--yes"),
        ("discard", "--request", "r", "abc"),
    ):
        refused, wire = run(words, answers)
        assert isinstance(refused.exception, SettingsError), words
        assert not {"POST /replay", "POST /discard"} & set(wire.names())


def test_a_replay_goes_in_batches_and_says_what_was_left(run: Callable[..., tuple[Any, Wire]]) -> None:
    def some(body: Any) -> Any:
        return done(body, "refused" if "0" * 32 in body["letter_ids"] else "replayed")

    answers = {"GET /": page(5), "GET /allowance": ALONE, "POST /replay": some}
    words = ("replay", "--fingerprint", "f", "--reason", "fixed", "--yes", "--batch", "2", "--rate", "5", "--force")
    shown, wire = run(words, answers)
    bodies = [body for name, body in wire.asked if name == "POST /replay"]
    assert [len(body["letter_ids"]) for body in bodies] == [2, 2, 1]
    assert {(body["reason"], body["rate_per_s"], body["force"]) for body in bodies} == {("fixed", 5.0, True)}
    assert shown.exit_code == 1
    for wanted in ("2 refused", "3 replayed", "because", "0" * 32):
        assert wanted in shown.output
    printed, _ = run((*words, "--json"), answers | {"POST /replay": done})
    assert (printed.exit_code, orjson.loads(printed.output)["counts"]) == (0, {"replayed": 5})


def test_more_than_one_may_alone_becomes_a_request(run: Callable[..., tuple[Any, Wire]]) -> None:
    asked = {"request_id": "r-1", "action": "discard", "status": "open"}
    answers = {"GET /": page(5), "GET /allowance": ALONE | {"left": 4}, "POST /requests": asked}
    shown, wire = run(("discard", "--all", "--reason", "gone", "--yes"), answers)
    assert (shown.exit_code, wire.names()[-1]) == (1, "POST /requests")
    assert "riskfleet dlq confirm r-1" in shown.output
    left = asked | {"status": "confirmed", "remaining": ["a", "b"]}
    shown, wire = run(
        ("discard", "--request", "r-1", "--yes"),
        {"GET /requests/r-1": left, "POST /discard": lambda body: done(body, "discarded")},
    )
    assert (shown.exit_code, wire.asked[-1][1]) == (0, {"letter_ids": ["a", "b"], "request_id": "r-1"})


def test_a_dry_run_adds_its_batches_up(run: Callable[..., tuple[Any, Wire]]) -> None:
    shown, wire = run(("dry-run", "--all"), {"GET /": page(60), "POST /dry-run": dry})
    assert wire.names() == ["GET /", "POST /dry-run", "POST /dry-run"]
    for wanted in ("60 undecided → APPROVED", "60 would be decided", "nothing was sent"):
        assert wanted in shown.output


def test_a_letter_is_shown_without_its_payload_unless_asked(run: Callable[..., tuple[Any, Wire]]) -> None:
    act = {"at": AT, "person": "ann", "action": "replay", "result": "noop", "reason": "[red]", "why": "w"}
    view = {"letter": letter(), "size": 2_048, "sha256": "ab" * 32, "entries": [], "resend": "cannot be decoded"}
    view |= {"history": [act | {"request_id": None}], "related": [letter(1)]}
    name = f"{0:032x}"
    shown, wire = run(("show", name), {f"GET /{name}": view})
    for wanted in ("2,048 bytes", "cannot be decoded", "not a carrier", "[red]", f"{1:032x}"):
        assert wanted in shown.output
    assert wire.names() == [f"GET /{name}"]
    refused = httpx.Response(403, json={"detail": "the credential does not permit deadletters:payload"})
    shown, _ = run(
        ("show", name, "--payload", "--reason", "x"), {f"GET /{name}": view, f"POST /{name}/reveal": refused}
    )
    assert isinstance(shown.exception, OperatorError)


def test_a_cut_connection_says_how_far_it_came(run: Callable[..., tuple[Any, Wire]]) -> None:
    calls = iter((done, None))

    def some(body: Any) -> Any:
        answer = next(calls)
        if answer is None:
            raise httpx.ConnectError("gone")
        return answer(body)

    shown, _ = run(
        ("replay", *(f"{i}" for i in range(4)), "--batch", "2", "--reason", "x", "--yes"),
        {"GET /allowance": ALONE, "POST /replay": some},
    )
    assert isinstance(shown.exception, httpx.ConnectError)

"""`riskfleet approvals`: what waits for people, through the operator API.

Promises: a command acts with its caller's own credential, and an answer names the revision that its sender read, so
that a screen of yesterday decides nothing. Holds no rule of its own. Prints no payload: the API has none.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer

from deploy import settings
from deploy.operator import OperatorClient, client_from_environment, load_session
from deploy.printing import console, print_fields, print_json, print_page, print_table, text
from deploy.settings import SettingsError

approvals_app = typer.Typer(no_args_is_help=True, help="Decisions that wait for people.")


class Status(StrEnum):
    """Where an approval stands."""

    OPEN = "open"
    APPROVED = "approved"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"


class Cause(StrEnum):
    """Why people look again."""

    REOPENED = "reopened"
    CONTESTED = "contested"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="The tenant; default: the one of the login.")]
Event = Annotated[str, typer.Argument(help="The event's id, 32 hex digits.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept for ever.")]
Seen = Annotated[int, typer.Option("--revision", min=1, help="The revision that you read; 'show' prints it.")]
After = Annotated[str | None, typer.Option("--after", help="Go on after this cursor.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=200, help="How many at most.")]

_QUEUE = ("event_id", "revision", "priority", "amount", "votes", "due", "claimed_by", "reasons")
_EMPTY = {
    Status.OPEN: "nothing waits for people: every event of this tenant was decided without them, or by them",
    Status.APPROVED: "no approval was approved by people yet",
    Status.REJECTED: "no approval was rejected by people yet",
    Status.SUPERSEDED: "no correction took the place of an event that waited for people",
    Status.EXPIRED: "people decided everything in time",
}


@approvals_app.command("list")
def list_approvals(
    status: Annotated[Status, typer.Option(help="Which.")] = Status.OPEN,
    tenant: Tenant = None,
    after: After = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """Approvals, the most urgent first."""
    with _client() as client:
        page = client.get(f"{_root(tenant)}/approvals", status=status.value, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [_line(approval) for approval in page["approvals"]]
    print_page(rows, _QUEUE, page["next"], _EMPTY[status] if after is None else "the page before was the last one")


@approvals_app.command("show")
def show_approval(event: Event, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """One approval: what is asked, who voted, and why the pipeline asks."""
    with _client() as client:
        view = client.get(_path(tenant, event))
    if as_json:
        print_json(view)
        return
    print_fields({name: value for name, value in view["approval"].items() if value not in (None, "")})
    if view["votes"]:
        print_table(view["votes"], ("person", "vote", "reason", "voted_at"))
    else:
        console.print("nobody voted on this revision yet", style="dim")
    for each in view["decisions"]:
        decision = each["decision"]
        by = each["decider"] or each["decided_by"]
        console.print(
            f"revision {each['revision']}: {each['outcome']} by {by} at {each['decided_at']}, score "
            f"{text(decision.get('score'))}, policy {decision['policy']['result']}",
            highlight=False,
            markup=False,
        )
        print_table(decision["reasons"], ("code", "text", "weight"))


@approvals_app.command()
def claim(event: Event, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Say for 15 minutes that you are looking; everybody else may still decide."""
    _courtesy("claim", event, tenant, as_json)


@approvals_app.command()
def release(event: Event, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Give your claim back."""
    _courtesy("release", event, tenant, as_json)


@approvals_app.command()
def note(
    event: Event,
    said: Annotated[str, typer.Argument(help="The note.")],
    revision: Seen,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Add a note for whoever decides."""
    with _client() as client:
        found = client.post(f"{_path(tenant, event)}/note", {"revision": revision, "reason": said})
    _done(found, f"noted on {event}", as_json)


@approvals_app.command()
def approve(event: Event, revision: Seen, reason: Reason, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Approve, or give the first of two votes."""
    _answer("approve", event, revision, reason, tenant, as_json)


@approvals_app.command()
def reject(event: Event, revision: Seen, reason: Reason, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Reject; one person is enough."""
    _answer("reject", event, revision, reason, tenant, as_json)


@approvals_app.command("open")
def open_approval(
    event: Event,
    reason: Reason,
    cause: Annotated[Cause, typer.Option(help="Looked at again, or contested by somebody.")] = Cause.REOPENED,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """Ask people about a decided event again."""
    with _client() as client:
        found = client.post(f"{_path(tenant, event)}/open", {"cause": cause.value, "reason": reason})
    _done(found, f"people are asked about revision {found['revision']} of {event}", as_json)


@approvals_app.command()
def report(
    since: Annotated[str | None, typer.Option(help="From when, RFC 3339; default: 30 days.")] = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """How approvals were decided, how long they took, and what waits."""
    with _client() as client:
        found = client.get(f"{_root(tenant)}/approvals-report", since=since)
    if as_json:
        print_json(found)
        return
    closed = ", ".join(f"{count:,} {status}" for status, count in found["closed"].items())
    print_fields(
        {
            "since": found["since"],
            "closed": closed or "none",
            "open": f"{found['open']:,} ({found['overdue']:,} overdue)",
            "oldest open": _seconds(found["oldest_open_s"]),
            "time to decide p50": _seconds(found["dwell_p50_s"]),
            "time to decide p95": _seconds(found["dwell_p95_s"]),
            "overrides": f"{found['overrides']:,} of {found['reviewed']:,} final answers that people looked at again",
            "agreement": f"{found['agreed']:,} of {found['second_votes']:,} second votes",
        }
    )


def _courtesy(action: str, event: str, tenant: str | None, as_json: bool) -> None:
    """Claims decide nothing, so the revision may be read here."""
    with _client() as client:
        path = _path(tenant, event)
        revision = client.get(path)["approval"]["revision"]
        found = client.post(f"{path}/{action}", {"revision": revision})
    holder = found["claimed_by"]
    _done(found, f"{event} is claimed by {holder}" if holder else f"nobody has claimed {event}", as_json)


def _answer(action: str, event: str, revision: int, reason: str, tenant: str | None, as_json: bool) -> None:
    with _client() as client:
        found = client.post(f"{_path(tenant, event)}/{action}", {"revision": revision, "reason": reason})
    approval = found["approval"]
    if found["decision"] is None:
        votes = f"{approval['approved_by']} of {approval['approvers_needed']}"
        sentence = f"vote {votes} on {event}: another person decides with the next one"
    else:
        sentence = f"{event} is {found['decision']['outcome']}, revision {found['decision']['revision']}"
    if found["claimed_by"]:
        sentence += f"; {found['claimed_by']} had claimed it"
    _done(found, sentence, as_json)


def _client() -> OperatorClient:
    return client_from_environment(settings.load().data_dir)


def _root(tenant: str | None) -> str:
    session = None if tenant else load_session(settings.load().data_dir)
    chosen = tenant or (session.tenant if session else None)
    if not chosen:
        raise SettingsError("which tenant? give --tenant, or log in with one")
    return f"/ops/v1/tenants/{quote(chosen, safe='')}"


def _path(tenant: str | None, event: str) -> str:
    return f"{_root(tenant)}/approvals/{quote(event, safe='')}"


def _line(approval: Any) -> dict[str, Any]:
    amount = " ".join(filter(None, (approval["amount"], approval["currency"])))
    due = (approval["due_at"] or "-")[:16].replace("T", " ") + (" overdue" if approval["overdue"] else "")
    votes = f"{approval['approved_by']}/{approval['approvers_needed']}"
    shown = {"amount": amount or None, "due": due, "votes": votes, "reasons": ", ".join(approval["reasons"][:4])}
    return dict(approval) | shown


def _done(found: Any, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} s"

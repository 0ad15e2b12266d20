"""`riskfleet dlq`: dead letters, for whoever is called at night, through the operator API.

Promises: nothing is sent before its sender saw how many letters it is about, and said yes; a command that was cut off
is given again, and sends nothing twice. Holds no rule of its own, and shows no payload that was not asked for.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final
from urllib.parse import quote

import httpx
import typer
from rich.progress import Progress

from deploy import settings
from deploy.operator import OperatorClient, client_from_environment
from deploy.printing import console, errors, print_fields, print_json, print_page, print_table
from deploy.settings import SettingsError

dlq_app = typer.Typer(no_args_is_help=True, help="Dead letters: what was parked, and what to do about it.")


class LetterStatus(StrEnum):
    """Where a dead letter stands."""

    OPEN = "open"
    CLOSED = "closed"
    REPLAYED = "replayed"
    DISCARDED = "discarded"
    ALL = "all"


_ROOT: Final = "/ops/v1/dead-letters"
_GROUPS: Final = ("fingerprint", "open", "all", "tenants", "stages", "failure", "last")
_LETTERS: Final = ("letter_id", "tenant", "stage", "problem", "replays", "parked")
_ENTRIES: Final = ("stage", "n", "digest", "attempts", "replays", "suspect", "size")
_ACTS: Final = ("at", "person", "action", "result", "reason", "why")
_REQUESTS: Final = ("request_id", "action", "status", "done", "requested_by", "answered_by", "expires")
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_PAGE: Final = 200
_DRY_BATCH: Final = 50
_SHOWN: Final = 20

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Letters = Annotated[list[str] | None, typer.Argument(help="Letters by id; or choose them by the options below.")]
LetterName = Annotated[str, typer.Argument(help="The letter's id; 'list' prints it.")]
Request = Annotated[str, typer.Argument(help="The request's id; 'requests' prints it.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only of this tenant; _system: of nobody.")]
Stage = Annotated[str | None, typer.Option("--stage", help="Only of this stage.")]
Category = Annotated[str | None, typer.Option("--category", help="Only of this category.")]
Problem = Annotated[str | None, typer.Option("--problem", help="Only with this problem.")]
Fingerprint = Annotated[str | None, typer.Option("--fingerprint", help="Only of this group; 'groups' prints it.")]
Older = Annotated[str | None, typer.Option("--older-than", help="Parked longer ago, as 90s, 15m, 2h or 3d.")]
Newer = Annotated[str | None, typer.Option("--newer-than", help="Parked since, as 90s, 15m, 2h or 3d.")]
Which = Annotated[LetterStatus, typer.Option("--status", help="Which.")]
After = Annotated[str | None, typer.Option("--after", help="Go on after this cursor.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=_PAGE, help="How many at most.")]
Every = Annotated[bool, typer.Option("--all", help="Every open letter that is yours; else name some.")]
Most = Annotated[int, typer.Option("--max", min=1, max=5_000, help="How many letters at most, the newest first.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=_PAGE, help="Letters in one transaction.")]
Rate = Annotated[float, typer.Option("--rate", min=0.1, max=1_000, help="How many go out in a second at most.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept for ever.")]
Force = Annotated[bool, typer.Option("--force", help="Also what was replayed too often already.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
ByRequest = Annotated[str | None, typer.Option("--request", help="Carry out this confirmed request.")]


@dataclass(frozen=True, slots=True)
class _Order:
    """What a person wants done. `request` names a confirmed request, whose own reason, force and rate then hold."""

    action: str
    reason: str
    batch: int
    yes: bool
    as_json: bool
    request: str | None = None
    force: bool = False
    rate: float = 20.0

    def body(self, letter_ids: Sequence[str]) -> dict[str, Any]:
        """The command about some letters."""
        body: dict[str, Any] = {"letter_ids": list(letter_ids)}
        if self.request is not None:
            return body | {"request_id": self.request}
        extra = {"force": self.force, "rate_per_s": self.rate} if self.action == "replay" else {}
        return body | {"reason": self.reason} | extra


@dlq_app.command("groups")
def list_groups(
    status: Which = LetterStatus.OPEN,
    tenant: Tenant = None,
    stage: Stage = None,
    category: Category = None,
    problem: Problem = None,
    fingerprint: Fingerprint = None,
    older_than: Older = None,
    newer_than: Newer = None,
    after: After = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """Letters by cause, the newest first. Begin here."""
    wanted = _wanted(status, tenant, stage, category, problem, fingerprint, older_than, newer_than)
    with _client() as client:
        page = client.get(f"{_ROOT}/groups", **wanted, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [_group_line(group) for group in page["groups"]]
    print_page(rows, _GROUPS, page["next"], _empty(wanted))


@dlq_app.command("list")
def list_letters(
    status: Which = LetterStatus.OPEN,
    tenant: Tenant = None,
    stage: Stage = None,
    category: Category = None,
    problem: Problem = None,
    fingerprint: Fingerprint = None,
    older_than: Older = None,
    newer_than: Newer = None,
    after: After = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """Dead letters, the newest first."""
    wanted = _wanted(status, tenant, stage, category, problem, fingerprint, older_than, newer_than)
    with _client() as client:
        page = client.get(_ROOT, **wanted, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    columns = _LETTERS if status is LetterStatus.OPEN else (*_LETTERS, "status")
    print_page([_letter_line(one) for one in page["letters"]], columns, page["next"], _empty(wanted))


@dlq_app.command("show")
def show_letter(
    letter: LetterName,
    payload: Annotated[bool, typer.Option("--payload", help="Its bytes too; needs a permission and --reason.")] = False,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """One letter: why it was parked, what was done about it, and whether it can be sent again."""
    path = f"{_ROOT}/{quote(letter, safe='')}"
    with _client() as client:
        view = client.get(path)
        shown = client.post(f"{path}/reveal", {"reason": reason}) if payload else None
    if as_json:
        print_json(view if shown is None else view | {"payload": shown})
        return
    resend = view["resend"] or "can be sent again"
    print_fields(view["letter"] | {"size": f"{view['size']:,} bytes", "sha256": view["sha256"], "replay": resend})
    if view["entries"]:
        print_table([each | {"digest": each["digest"][:12]} for each in view["entries"]], _ENTRIES)
    else:
        console.print("its bytes are not a carrier that this release reads", style="dim")
    if view["history"]:
        print_table([each | {"at": _short(each["at"])} for each in view["history"]], _ACTS)
    if view["related"]:
        console.print("other letters of its event:", style="dim")
        print_table([_letter_line(one) for one in view["related"]], ("letter_id", "stage", "status", "parked"))
    if shown is not None:
        print_json(shown["event"] if shown["event"] is not None else {"body_base64": shown["body"]})


@dlq_app.command("dry-run")
def dry_run(
    letters: Letters = None,
    tenant: Tenant = None,
    stage: Stage = None,
    category: Category = None,
    problem: Problem = None,
    fingerprint: Fingerprint = None,
    older_than: Older = None,
    newer_than: Newer = None,
    every: Every = False,
    most: Most = 100,
    as_json: AsJson = False,
) -> None:
    """Decide letters again without sending anything: what a replay would do now."""
    wanted = _wanted(LetterStatus.OPEN, tenant, stage, category, problem, fingerprint, older_than, newer_than)
    with _client() as client:
        names = _chosen(client, letters, wanted, every, most)
        ran = _dry(client, names, quiet=as_json)
    if as_json:
        print_json(ran)
    elif not names:
        console.print(_empty(wanted))
    else:
        _print_dry(ran)


@dlq_app.command()
def replay(
    letters: Letters = None,
    reason: Reason = "",
    tenant: Tenant = None,
    stage: Stage = None,
    category: Category = None,
    problem: Problem = None,
    fingerprint: Fingerprint = None,
    older_than: Older = None,
    newer_than: Newer = None,
    every: Every = False,
    most: Most = 100,
    rate: Rate = 20.0,
    batch: Batch = 100,
    force: Force = False,
    request: ByRequest = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send letters again, each once, to where they came from. Exit 1 when one was refused or a request is needed."""
    wanted = _wanted(LetterStatus.OPEN, tenant, stage, category, problem, fingerprint, older_than, newer_than)
    order = _Order("replay", reason, batch, yes, as_json, request, force, rate)
    raise typer.Exit(_carry_out(order, letters, wanted, every, most))


@dlq_app.command()
def discard(
    letters: Letters = None,
    reason: Reason = "",
    tenant: Tenant = None,
    stage: Stage = None,
    category: Category = None,
    problem: Problem = None,
    fingerprint: Fingerprint = None,
    older_than: Older = None,
    newer_than: Newer = None,
    every: Every = False,
    most: Most = 100,
    batch: Batch = 100,
    request: ByRequest = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Give letters up: their events fail. Exit 1 when a request is needed."""
    wanted = _wanted(LetterStatus.OPEN, tenant, stage, category, problem, fingerprint, older_than, newer_than)
    order = _Order("discard", reason, batch, yes, as_json, request)
    raise typer.Exit(_carry_out(order, letters, wanted, every, most))


@dlq_app.command("requests")
def list_requests(as_json: AsJson = False) -> None:
    """Commands about many letters, which another person confirms."""
    with _client() as client:
        found = client.get(f"{_ROOT}/requests")
    if as_json:
        print_json(found)
    else:
        print_page([_request_line(one) for one in found["requests"]], _REQUESTS, None, "nobody has made a request")


@dlq_app.command()
def confirm(request: Request, yes: Yes = False, as_json: AsJson = False) -> None:
    """Confirm somebody else's request; it can be carried out for an hour then."""
    with _client() as client:
        path = f"{_ROOT}/requests/{quote(request, safe='')}"
        asked = client.get(path)
        if not as_json:
            print_fields({name: value for name, value in asked.items() if name != "remaining"})
        _ask(f"Confirm this {asked['action']} of {asked['count']:,} letters?", yes)
        found = client.post(f"{path}/confirm")
    _done(found, f"confirmed: riskfleet dlq {found['action']} --request {request}", as_json)


@dlq_app.command()
def withdraw(request: Request, as_json: AsJson = False) -> None:
    """Withdraw a request, confirmed or not; what it has done stays done."""
    with _client() as client:
        found = client.post(f"{_ROOT}/requests/{quote(request, safe='')}/withdraw")
    _done(found, f"withdrawn: {request}", as_json)


# --- carrying out -------------------------------------------------------------------------------------


def _carry_out(order: _Order, letters: list[str] | None, wanted: dict[str, Any], every: bool, most: int) -> int:
    """Exit code: 0 all is done, 1 something was refused, or a request was made that waits for another person."""
    if order.request is None and not order.reason.strip():
        raise SettingsError("say why: --reason")
    with _client() as client:
        if order.request is not None:
            if letters or every or any(value for name, value in wanted.items() if name != "status"):
                raise SettingsError("a request names its own letters: give --request alone")
            asked = client.get(f"{_ROOT}/requests/{quote(order.request, safe='')}")
            names = list(asked["remaining"])
        else:
            names = _chosen(client, letters, wanted, every, most)
        if not names:
            _nothing(order, wanted)
            return 0
        if order.request is None and len(names) > (left := client.get(f"{_ROOT}/allowance")["left"]):
            return _request(client, order, names, left)
        if not order.yes and order.action == "replay" and not order.as_json:
            _print_dry(_dry(client, names, quiet=False))
        _ask(f"{order.action.capitalize()} {len(names):,} letters?", order.yes)
        return _print_done(order, _in_batches(client, order, names))


def _nothing(order: _Order, wanted: dict[str, Any]) -> None:
    if order.as_json:
        print_json({"action": order.action, "results": [], "counts": {}})
    else:
        console.print("nothing is left of this request" if order.request else _empty(wanted))


def _request(client: OperatorClient, order: _Order, names: Sequence[str], left: int) -> int:
    _ask(f"{len(names):,} letters, and {left:,} are left to you alone: ask another person to confirm?", order.yes)
    body = {"action": order.action, "letter_ids": list(names), "reason": order.reason}
    extra = {"force": order.force, "rate_per_s": order.rate} if order.action == "replay" else {}
    made = client.post(f"{_ROOT}/requests", body | extra)
    sentence = (
        f"nothing is done yet: another person confirms with 'riskfleet dlq confirm {made['request_id']}', then either "
        f"of you runs 'riskfleet dlq {order.action} --request {made['request_id']}'"
    )
    _done(made, sentence, order.as_json)
    return 1


def _in_batches(client: OperatorClient, order: _Order, names: Sequence[str]) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    with Progress(console=errors, transient=True, disable=order.as_json or not errors.is_terminal) as progress:
        task = progress.add_task(order.action, total=len(names))
        try:
            for start in range(0, len(names), order.batch):
                some = names[start : start + order.batch]
                done += client.post(f"{_ROOT}/{order.action}", order.body(some))["results"]
                progress.advance(task, len(some))
        except httpx.TransportError:
            errors.print(f"{len(done):,} of {len(names):,} letters are answered for; give the same command again")
            raise
    return done


def _print_done(order: _Order, results: Sequence[dict[str, Any]]) -> int:
    counts = Counter(each["result"] for each in results)
    if order.as_json:
        print_json({"action": order.action, "results": list(results), "counts": dict(counts)})
        return 1 if counts["refused"] else 0
    console.print(", ".join(f"{number:,} {_WORDS[word]}" for word, number in counts.items()), highlight=False)
    failed = sum(each["failed"] for each in results)
    if failed:
        console.print(f"{failed:,} events have failed", highlight=False)
    last = max((each["due_at"] for each in results if each["due_at"]), default=None)
    if last is not None:
        console.print(f"the last one goes out at {_short(last)} UTC", style="dim", highlight=False)
    left = [each for each in results if each["result"] in ("refused", "noop")]
    if left:
        print_table(left[:_SHOWN], ("letter_id", "result", "why"))
        if len(left) > _SHOWN:
            console.print(f"and {len(left) - _SHOWN:,} more: --json has all", style="dim", highlight=False)
    return 1 if counts["refused"] else 0


_WORDS: Final = {
    "replayed": "replayed",
    "discarded": "discarded",
    "noop": "left as they were",
    "refused": "refused",
    "decides": "would be decided",
    "resends": "would be sent to their sink again",
    "parks": "would fail again",
}


def _dry(client: OperatorClient, names: Sequence[str], *, quiet: bool) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    counts, changes = Counter[str](), Counter[str]()
    with Progress(console=errors, transient=True, disable=quiet or not errors.is_terminal) as progress:
        task = progress.add_task("dry-run", total=len(names))
        for start in range(0, len(names), _DRY_BATCH):
            some = list(names[start : start + _DRY_BATCH])
            ran = client.post(f"{_ROOT}/dry-run", {"letter_ids": some})
            results += ran["results"]
            counts.update(ran["counts"])
            changes.update(ran["changes"])
            progress.advance(task, len(some))
    return {"results": results, "counts": dict(counts), "changes": dict(changes)}


def _print_dry(ran: dict[str, Any]) -> None:
    print_table(ran["results"][:_SHOWN], ("letter_id", "result", "now", "then", "why"))
    if len(ran["results"]) > _SHOWN:
        console.print(f"and {len(ran['results']) - _SHOWN:,} more: --json has all", style="dim", highlight=False)
    for change, number in ran["changes"].items():
        console.print(f"{number:,} {change}", highlight=False, markup=False)
    console.print(", ".join(f"{number:,} {_WORDS[word]}" for word, number in ran["counts"].items()), highlight=False)
    console.print("nothing was sent", style="dim")


# --- choosing -----------------------------------------------------------------------------------------


def _chosen(
    client: OperatorClient, letters: list[str] | None, wanted: dict[str, Any], every: bool, most: int
) -> list[str]:
    """The letters that a command is about."""
    chosen = any(value for name, value in wanted.items() if name != "status")
    if letters:
        if chosen or every:
            raise SettingsError("name letters, or choose them by options: not both")
        return list(dict.fromkeys(letters))
    if not chosen and not every:
        raise SettingsError("which letters? name them, or give --fingerprint, --tenant, --stage or another filter")
    names: list[str] = []
    after = None
    while len(names) < most:
        page = client.get(_ROOT, **wanted, after=after, limit=min(most - len(names), _PAGE))
        names += [one["letter_id"] for one in page["letters"]]
        after = page["next"]
        if after is None:
            break
    return names


def _wanted(
    status: LetterStatus,
    tenant: str | None,
    stage: str | None,
    category: str | None,
    problem: str | None,
    fingerprint: str | None,
    older_than: str | None,
    newer_than: str | None,
) -> dict[str, Any]:
    return {
        "status": status.value,
        "tenant": tenant,
        "stage": stage,
        "category": category,
        "problem": problem,
        "fingerprint": fingerprint,
        "parked_before": _ago(older_than, "--older-than"),
        "parked_from": _ago(newer_than, "--newer-than"),
    }


def _ago(span: str | None, option: str) -> str | None:
    if span is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", span)
    if match is None:
        raise SettingsError(f"{option} is a number and s, m, h or d, as 15m")
    return (datetime.now(UTC) - timedelta(seconds=int(match[1]) * _UNITS[match[2]])).isoformat()


def _empty(wanted: dict[str, Any]) -> str:
    filtered = any(value for name, value in wanted.items() if name != "status") or wanted["status"] != "open"
    return "no dead letter is like this" if filtered else "no dead letters: nothing of yours is parked"


# --- small --------------------------------------------------------------------------------------------


def _ask(question: str, yes: bool) -> None:
    """Go on only with a yes; where nobody can be asked, --yes must have been given."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError("nobody can be asked here: give --yes")
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)


def _client() -> OperatorClient:
    return client_from_environment(settings.load().data_dir)


def _done(found: Any, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _group_line(group: Any) -> dict[str, Any]:
    tenants = group["tenants"]
    return {
        "fingerprint": group["fingerprint"],
        "open": f"{group['open']:,}",
        "all": f"{group['count']:,}",
        "tenants": tenants[0] if len(tenants) == 1 else f"{len(tenants):,}",
        "stages": ", ".join(group["stages"]),
        "failure": " ".join(filter(None, (group["category"], group["problem"], group["exception_class"]))),
        "last": _short(group["last_parked_at"]),
    }


def _letter_line(letter: Any) -> dict[str, Any]:
    return dict(letter) | {"parked": _short(letter["parked_at"])}


def _request_line(asked: Any) -> dict[str, Any]:
    return dict(asked) | {"done": f"{asked['done']:,} of {asked['count']:,}", "expires": _short(asked["expires_at"])}


def _short(at: str) -> str:
    """A moment without its year and fractions; the servers' times are UTC."""
    return at[5:19].replace("T", " ")

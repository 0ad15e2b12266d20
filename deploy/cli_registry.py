"""`riskfleet registry`: versions of what decides, their approvals, and halts, through the operator API.

Promises: a command acts with its caller's own credential, and names the digest that was read when it began, so that
what is approved is what was looked at. Holds no rule of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer

from contracts.failures import MalformedBodyError
from deploy import settings
from deploy.operator import OperatorClient, client_from_environment, load_session
from deploy.printing import console, print_fields, print_json, print_table
from deploy.settings import SettingsError

registry_app = typer.Typer(
    no_args_is_help=True, help="What decides: models, prompts, policies, guardrails, lists, trials."
)
halt_app = typer.Typer(no_args_is_help=True, help="Stop automatic decisions, and let them go on.")
registry_app.add_typer(halt_app, name="halt")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="The tenant; default: the one of the login.")]
Shared = Annotated[bool, typer.Option("--shared", help="What every tenant uses.")]
Kind = Annotated[str, typer.Argument(help="model, prompt, policy, guardrail, lists, reasons or trial.")]
Name = Annotated[str, typer.Argument(help="Its name.")]
Number = Annotated[int, typer.Argument(min=1, help="Its number.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept for ever.")]
Digest = Annotated[
    str | None,
    typer.Option("--digest", help="Digest of the content that you read, or its first 12 digits; 'approve' needs it."),
]
Model = Annotated[str, typer.Argument(help="The name of a model, or * for all.")]
_SHORT_DIGEST = 12
_PLACEMENT = ("kind", "scope_key", "name", "version", "shared", "usable", "activated_by", "activated_at")
_TRIED = ("rollout", "version", "events", "unscored", "flips", "mean_shift", "largest_shift")
_VERSION = ("kind", "name", "version", "status", "author", "approver", "use_tag", "valid_until", "digest")

ScopeKey = Annotated[str, typer.Argument(help="Where: an event kind, or kind:type, as risk:loan.application.")]


@registry_app.command("list")
def list_versions(
    tenant: Tenant = None,
    shared: Shared = False,
    kind: Annotated[str | None, typer.Option(help="One kind only.")] = None,
    status: Annotated[str | None, typer.Option(help="One status only.")] = None,
    active: Annotated[bool, typer.Option("--active", help="What decides where, instead of versions.")] = False,
    as_json: AsJson = False,
) -> None:
    """Versions, newest first; or what decides where."""
    with _client() as client:
        root = _root(tenant, shared)
        found = (
            client.get(f"{root}/registry/active")
            if active
            else client.get(f"{root}/registry", kind=kind, status=status)
        )
    if as_json:
        print_json(found)
    elif active:
        print_table(found["active"], _PLACEMENT)
    else:
        print_table([each | {"digest": each["digest"][:12]} for each in found["versions"]], _VERSION)


@registry_app.command()
def show(
    kind: Kind, name: Name, version: Number, tenant: Tenant = None, shared: Shared = False, as_json: AsJson = False
) -> None:
    """One version with its content."""
    with _client() as client:
        found = client.get(_path(tenant, shared, kind, name, version))
    if as_json:
        print_json(found)
        return
    print_fields({name: value for name, value in found.items() if name not in ("content", "evidence")})
    for field in ("evidence", "content"):
        console.print(field, style="dim")
        print_json(found[field])


@registry_app.command()
def diff(
    kind: Kind,
    name: Name,
    before: Annotated[int, typer.Argument(min=1, help="The number of a version.")],
    after: Annotated[int, typer.Argument(min=1, help="The number of another.")],
    tenant: Tenant = None,
    shared: Shared = False,
    as_json: AsJson = False,
) -> None:
    """Two versions compared."""
    with _client() as client:
        path = f"{_root(tenant, shared)}/registry/{quote(kind)}/{quote(name)}/diff"
        found = client.get(path, **{"from": before, "to": after})
    if as_json:
        print_json(found)
    else:
        console.print("\n".join(found["lines"]) or "no difference", highlight=False, markup=False, soft_wrap=True)


@registry_app.command()
def register(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="A version as JSON: kind, name, content, owner, purpose, use_tag …"
        ),
    ],
    tenant: Tenant = None,
    shared: Shared = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; default: the file's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a draft."""
    try:
        draft = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"{file} is not JSON: {error}") from None
    if not isinstance(draft, dict):
        raise MalformedBodyError(f"{file} is not a JSON object")
    with _client() as client:
        path = f"{_root(tenant, shared)}/registry"
        _done(client.post(path, draft | ({"reason": reason} if reason else {})), as_json)


@registry_app.command("trials")
def report_trials(
    since: Annotated[str | None, typer.Option(help="From when, RFC 3339; default: 7 days.")] = None,
    tenant: Tenant = None,
    as_json: AsJson = False,
) -> None:
    """How models that are tried did beside those that decide."""
    with _client() as client:
        found = client.get(f"{_root(tenant, False)}/trials-report", since=since)
    if as_json:
        print_json(found)
    elif not found["tried"]:
        console.print(f"no shadow score in {found['looked_at']:,} decisions since {found['since']}")
    else:
        print_table(found["tried"], _TRIED)


@registry_app.command("names")
def read_sanctions(
    names: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The list, in the layout of sdn.csv.")],
    name: Annotated[str, typer.Option(help="The name of the version.")],
    source: Annotated[str, typer.Option(help="Where the list is from, and as of when; kept with it.")],
    owner: Annotated[str, typer.Option(help="Who answers for it.")],
    aliases: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Its aliases, in the layout of alt.csv.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file for 'register'.")] = Path("lists.json"),
) -> None:
    """Make a version of kind lists from a publisher's files, ready to be registered."""
    from workers.judgement.screening import content_of, index_names, read_names

    listed = read_names(names, aliases)
    index_names(listed)
    draft = {
        "kind": "lists",
        "name": name,
        "content": content_of(listed, source),
        "owner": owner,
        "purpose": "names that a person looks at before a decision about them",
        "use_tag": "aml",
        "limitations": "Does not transliterate, and does not know which alias is weak.",
        "reason": f"names from {source}",
    }
    out.write_bytes(orjson.dumps(draft))
    entries = len({each.number for each in listed})
    console.print(f"{len(listed):,} names of {entries:,} entries: {out}")
    console.print(f"next: riskfleet registry register {out}")


def _move(action: str, about: str) -> None:
    def move(
        kind: Kind,
        name: Name,
        version: Number,
        reason: Reason,
        digest: Digest = None,
        tenant: Tenant = None,
        shared: Shared = False,
        as_json: AsJson = False,
    ) -> None:
        path = _path(tenant, shared, kind, name, version)
        if digest is None and action == "approve":
            raise SettingsError("give --digest of the content that you read; 'riskfleet registry show' prints it")
        with _client() as client:
            read = _whole_digest(client.get(path)["digest"], digest)
            _done(client.post(f"{path}/{action}", {"digest": read, "reason": reason}), as_json)

    move.__doc__ = about
    registry_app.command(action)(move)


def _whole_digest(found: str, given: str | None) -> str:
    if given is None or (len(given) >= _SHORT_DIGEST and found.startswith(given)):
        return found
    raise SettingsError(f"the digest of this version is {found}: read it again, then decide")


for _action, _about in {
    "submit": "Ask for approval: the content is checked.",
    "approve": "Approve another person's version, and sign it.",
    "reject": "Refuse a version, for ever.",
    "retire": "Put an approved version away; it can be activated again.",
    "revoke": "Take an approval back, for ever; where it is active, events ask a person.",
}.items():
    _move(_action, _about)


@registry_app.command()
def activate(
    versions: Annotated[list[str], typer.Argument(help="KIND/NAME/VERSION@SCOPE, e.g. model/own/2@risk; repeat.")],
    reason: Reason,
    tenant: Tenant = None,
    shared: Shared = False,
    as_json: AsJson = False,
) -> None:
    """Let approved versions decide, all of them from one moment on."""
    body = {"activations": [_choice(each) for each in versions], "reason": reason}
    with _client() as client:
        found = client.post(f"{_root(tenant, shared)}/registry/activate", body)
    if as_json:
        print_json(found)
    else:
        for each in found["versions"]:
            console.print(_sentence(each), highlight=False)


def _choice(word: str) -> dict[str, Any]:
    version, _, scope_key = word.partition("@")
    parts = version.split("/")
    if len(parts) != 3 or not parts[2].isdecimal() or not scope_key:
        raise SettingsError(f"{word!r} is not KIND/NAME/VERSION@SCOPE, such as model/own/2@risk")
    return {"kind": parts[0], "name": parts[1], "version": int(parts[2]), "scope_key": scope_key}


@registry_app.command()
def rollback(
    kind: Kind,
    scope_key: ScopeKey,
    reason: Reason,
    tenant: Tenant = None,
    shared: Shared = False,
    as_json: AsJson = False,
) -> None:
    """Let the version decide that was active at a place before."""
    body = {"kind": kind, "scope_key": scope_key, "reason": reason}
    with _client() as client:
        found = client.post(f"{_root(tenant, shared)}/registry/rollback", body)
    if as_json:
        print_json(found)
    elif found["version"] is None:
        console.print("the tenant has nothing of its own there any more: the shared version decides")
    else:
        console.print(_sentence(found["version"]), highlight=False)


@halt_app.command("set")
def halt_set(
    reason: Reason, model: Model = "*", tenant: Tenant = None, shared: Shared = False, as_json: AsJson = False
) -> None:
    """Stop automatic decisions: every event asks a person, within 2 s."""
    with _client() as client:
        found = client.put(f"{_root(tenant, shared)}/halts/{quote(model)}", {"reason": reason})
    if as_json:
        print_json(found)
    else:
        console.print(f"halted: {found['model']}", highlight=False)


@halt_app.command("clear")
def halt_clear(reason: Reason, model: Model = "*", tenant: Tenant = None, shared: Shared = False) -> None:
    """Let automatic decisions go on."""
    with _client() as client:
        client.delete(f"{_root(tenant, shared)}/halts/{quote(model)}", {"reason": reason})
    console.print(f"goes on: {model}", highlight=False)


@halt_app.command("list")
def halt_list(tenant: Tenant = None, shared: Shared = False, as_json: AsJson = False) -> None:
    """Halts that hold here."""
    with _client() as client:
        found = client.get(f"{_root(tenant, shared)}/halts")
    if as_json:
        print_json(found)
    else:
        print_table(found["halts"], ("model", "shared", "reason", "set_by", "set_at"))


def _client() -> OperatorClient:
    return client_from_environment(settings.load().data_dir)


def _root(tenant: str | None, shared: bool) -> str:
    if shared and tenant:
        raise SettingsError("give --tenant or --shared, not both")
    if shared:
        return "/ops/v1/tenants/_shared"
    session = load_session(settings.load().data_dir)
    chosen = tenant or (session.tenant if session else None)
    if not chosen:
        raise SettingsError("which tenant? give --tenant, or --shared for what every tenant uses")
    return f"/ops/v1/tenants/{quote(chosen)}"


def _path(tenant: str | None, shared: bool, kind: str, name: str, version: int) -> str:
    return f"{_root(tenant, shared)}/registry/{quote(kind)}/{quote(name)}/{version}"


def _done(version: Any, as_json: bool) -> None:
    if as_json:
        print_json(version)
    else:
        console.print(_sentence(version), highlight=False)


def _sentence(version: Any) -> str:
    return (
        f"{version['kind']} {version['name']} version {version['version']} is {version['status']} ({version['digest']})"
    )

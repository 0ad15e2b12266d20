"""`riskfleet login`, `users`, `apikeys` and `tenants`: people, keys and tenants, through the operator API.

Promises: a command acts with its caller's own credential; a password is read from the terminal or standard input,
never from an argument that other processes can see; a secret is printed once. Holds no rule of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from contracts.identity import EVERYWHERE, Role
from deploy import settings
from deploy.operator import (
    OperatorClient,
    Session,
    client_from_environment,
    control_url,
    load_session,
    save_session,
    session_file,
)
from deploy.printing import console, print_fields, print_json, print_table
from deploy.settings import SettingsError

users_app = typer.Typer(no_args_is_help=True, help="People: who there is, and what they may do.")
apikeys_app = typer.Typer(no_args_is_help=True, help="API keys of a tenant; a secret is shown once.")
tenants_app = typer.Typer(no_args_is_help=True, help="Tenants: their doors, limits and broker users.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept for ever.")]
User = Annotated[str, typer.Argument(help="The user's id.")]
TenantName = Annotated[str, typer.Argument(help="The tenant's id.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="The tenant; default: the one of the login.")]
Key = Annotated[str, typer.Argument(help="The key's public id, rfk_…")]
FromStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")]


def attach(app: typer.Typer) -> None:
    """Join these commands to the command line."""
    app.command()(login)
    app.command()(logout)
    for name, group in {"users": users_app, "apikeys": apikeys_app, "tenants": tenants_app}.items():
        app.add_typer(group, name=name)


def login(
    user: Annotated[str, typer.Option("--user", prompt="User", help="The user's id.")],
    password_stdin: FromStdin = False,
    tenant: Annotated[
        str | None, typer.Option(help="Bind the login to one tenant, as the ingest gateway needs.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The operator API.")] = None,
) -> None:
    """Log in; the token lies in the data directory, readable by its owner only, until it expires."""
    data_dir = settings.load().data_dir
    where = url or control_url(load_session(data_dir))
    body = {"user": user, "password": _password(password_stdin)} | ({"tenant": tenant} if tenant else {})
    with OperatorClient(where, None) as client:
        made = client.post("/ops/v1/login", body)
    save_session(data_dir, Session(where, user, made["token"], made["expires_at"], made["tenant"]))
    place = f" in tenant {tenant}" if tenant else ""
    console.print(f"{user} is logged in{place} until {made['expires_at']}", highlight=False)


def logout(
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="End every login of yours, on every machine.")
    ] = False,
) -> None:
    """Forget the login that is kept here."""
    if everywhere:
        with _client() as client:
            client.post("/ops/v1/logout-everywhere")
    session_file(settings.load().data_dir).unlink(missing_ok=True)
    console.print("logged out everywhere, within 5 s" if everywhere else "logged out here")


# --- users --------------------------------------------------------------------------------------------


@users_app.command("list")
def list_users(as_json: AsJson = False) -> None:
    """The users whom you administer, with their roles."""
    with _client() as client:
        found = _pages(client, "/ops/v1/users", "users")
    rows = [each | {"roles": _roles(each["grants"]), "disabled": each["disabled_at"] is not None} for each in found]
    _show(found, rows, ("user", "name", "roles", "disabled", "by_password"), as_json)


@users_app.command("create")
def create_user(
    user: User,
    name: Annotated[str, typer.Option(help="What they are called.")],
    password_stdin: FromStdin = False,
    oidc_issuer: Annotated[str | None, typer.Option(help="They log in by this OpenID Connect issuer.")] = None,
    oidc_subject: Annotated[str | None, typer.Option(help="What that issuer calls them (`sub`).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a user without any role; give one with 'users role'."""
    if (oidc_issuer is None) != (oidc_subject is None):
        raise SettingsError("give --oidc-issuer and --oidc-subject together")
    body: dict[str, Any] = {"user": user, "name": name}
    if oidc_issuer:
        body["oidc"] = {"issuer": oidc_issuer, "subject": oidc_subject}
    else:
        body["password"] = _password(password_stdin, confirm=True)
    with _client() as client:
        made = client.post("/ops/v1/users", body)
    _done(made, f"user {user} made, without any role yet", as_json)


@users_app.command("role")
def change_role(
    user: User,
    role: Role,
    tenant: Tenant = None,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="In the whole installation.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take it away instead.")] = False,
    reason: Reason = "",
) -> None:
    """Give a user a role in a tenant, or take it away."""
    if everywhere and tenant:
        raise SettingsError("give --tenant or --everywhere, not both")
    place = EVERYWHERE if everywhere else _tenant(tenant)
    body, path = {"tenant": place, "role": str(role), "reason": reason}, f"/ops/v1/users/{quote(user, safe='')}/grants"
    with _client() as client:
        if remove:
            client.delete(path, body)
        else:
            client.put(path, body)
    verb = "is no longer" if remove else "is"
    console.print(f"{user} {verb} {role} {'everywhere' if everywhere else f'in {place}'}", highlight=False)


@users_app.command("disable")
def disable_user(user: User, reason: Reason = "", as_json: AsJson = False) -> None:
    """Let a user in no more. The API keys they made are their tenant's and go on; 'apikeys list' shows them."""
    _command(f"/ops/v1/users/{quote(user, safe='')}/disable", reason, f"{user} is disabled", as_json)


@users_app.command("enable")
def enable_user(user: User, reason: Reason = "", as_json: AsJson = False) -> None:
    """Let a disabled or locked user in again."""
    _command(f"/ops/v1/users/{quote(user, safe='')}/enable", reason, f"{user} is enabled", as_json)


@users_app.command("password")
def change_password(user: User, password_stdin: FromStdin = False) -> None:
    """Set a password. For your own, give the current one first: from standard input, one a line."""
    session = load_session(settings.load().data_dir)
    own = session is not None and session.user == user
    current = _password(password_stdin, "Current password") if own else None
    body = {"password": _password(password_stdin, "New password", confirm=True)} | ({"current": current} if own else {})
    with _client() as client:
        client.post(f"/ops/v1/users/{quote(user, safe='')}/password", body)
    console.print(f"the password of {user} is changed, and every login of theirs ended", highlight=False)


# --- API keys -----------------------------------------------------------------------------------------


@apikeys_app.command("list")
def list_keys(tenant: Tenant = None, as_json: AsJson = False) -> None:
    """A tenant's keys, without their secrets."""
    with _client() as client:
        found = client.get(f"{_root(tenant)}/keys")["keys"]
    columns = ("key_id", "role", "label", "owner", "owner_disabled", "created_at", "expires_at", "revoked_at")
    _show(found, found, columns, as_json)


@apikeys_app.command("create")
def create_key(
    tenant: Tenant = None,
    role: Annotated[Role, typer.Option(help="SERVICE submits and reads; VIEWER reads.")] = Role.SERVICE,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires_in_s: Annotated[int | None, typer.Option(help="Seconds until it ends; default: never.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; its secret is shown now and never again."""
    body = {"role": str(role), "label": label, "expires_in_s": expires_in_s}
    with _client() as client:
        made = client.post(f"{_root(tenant)}/keys", body)
    _done(made, f"{made['api_key']}\nkeep it: it is not shown again", as_json)


@apikeys_app.command("rotate")
def rotate_key(
    key: Key,
    tenant: Tenant = None,
    overlap_s: Annotated[int, typer.Option(help="Seconds that the old key goes on.")] = 3_600,
    as_json: AsJson = False,
) -> None:
    """Make a key that takes another's place."""
    with _client() as client:
        made = client.post(f"{_root(tenant)}/keys/{quote(key, safe='')}/rotate", {"overlap_s": overlap_s})
    _done(made, f"{made['api_key']}\nkeep it: it is not shown again; {key} ends in {overlap_s} s", as_json)


@apikeys_app.command("revoke")
def revoke_key(key: Key, tenant: Tenant = None, reason: Reason = "") -> None:
    """End a key for good, within 5 s."""
    with _client() as client:
        client.delete(f"{_root(tenant)}/keys/{quote(key, safe='')}", {"reason": reason})
    console.print(f"{key} is revoked", highlight=False)


# --- tenants ------------------------------------------------------------------------------------------


@tenants_app.command("list")
def list_tenants(as_json: AsJson = False) -> None:
    """The tenants that you may read."""
    with _client() as client:
        found = _pages(client, "/ops/v1/tenants", "tenants")
    _show(found, found, ("tenant", "name", "status", "broker_user", "created_at"), as_json)


@tenants_app.command("create")
def create_tenant(
    tenant: TenantName, name: Annotated[str, typer.Option(help="Its name.")], as_json: AsJson = False
) -> None:
    """Make a tenant with its broker user, ingest queue and first API key; the secrets are shown now and never again."""
    with _client() as client:
        made = client.post("/ops/v1/tenants", {"tenant": tenant, "name": name})
    lines = [
        f"tenant {tenant} made; keep these, they are not shown again",
        f"API key          {made['key']['api_key']}",
        f"broker user      {made['tenant']['broker_user']}",
        f"broker password  {made['broker_password']}",
    ]
    _done(made, "\n".join(lines), as_json)


@tenants_app.command("show")
def show_tenant(tenant: TenantName, as_json: AsJson = False) -> None:
    """One tenant with its thresholds, approval policy and limits."""
    with _client() as client:
        found = client.get(_root(tenant))
    if as_json:
        print_json(found)
    else:
        _print_tenant(found)


@tenants_app.command("limit")
def limit_tenant(
    tenant: TenantName,
    review_from: Annotated[float | None, typer.Option(help="Scores from here on ask a person, 0–100.")] = None,
    reject_from: Annotated[float | None, typer.Option(help="Scores from here on reject, 0–100.")] = None,
    hard_limit: Annotated[float | None, typer.Option(help="A prior above it asks a person, 0–100.")] = None,
    amount_limit: Annotated[str | None, typer.Option(help="Amounts above it ask a person.")] = None,
    auto_reject: Annotated[bool | None, typer.Option(help="Whether the pipeline may reject by itself.")] = None,
    sla_s: Annotated[int | None, typer.Option(help="Seconds until an approval is overdue.")] = None,
    expiry_s: Annotated[int | None, typer.Option(help="Seconds until an approval expires; 0: never.")] = None,
    expiry_outcome: Annotated[str | None, typer.Option(help="What an expired approval becomes.")] = None,
    four_eyes_amount: Annotated[str | None, typer.Option(help="Amounts from here on need two people.")] = None,
    undecided_events: Annotated[
        int | None, typer.Option(help="Events that may be under way at once; 0: no limit.")
    ] = None,
    rate_per_s: Annotated[float | None, typer.Option(help="New events per second, with --burst; 0: no limit.")] = None,
    burst: Annotated[int | None, typer.Option(help="New events that may come at once.")] = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Change thresholds, approval policy or limits; what is not named stays."""
    body = {
        "thresholds": _given(
            review_from=review_from,
            reject_from=reject_from,
            hard_limit=hard_limit,
            amount_limit=amount_limit,
            auto_reject=auto_reject,
        ),
        "approval_policy": _given(
            sla_s=sla_s, expiry_s=expiry_s, expiry_outcome=expiry_outcome, four_eyes_amount=four_eyes_amount
        ),
        "limits": _limits(undecided_events, rate_per_s, burst),
    }
    if not any(body.values()):
        raise SettingsError("nothing to change: name at least one value; see 'riskfleet tenants limit --help'")
    with _client() as client:
        found = client.put(f"{_root(tenant)}/limits", body | {"reason": reason})
    if as_json:
        print_json(found)
    else:
        _print_tenant(found)


def _limits(undecided_events: int | None, rate_per_s: float | None, burst: int | None) -> dict[str, Any]:
    """What is to change of a tenant's limits; 0 takes one away, and a rate takes its burst along."""
    if rate_per_s == 0 and burst is not None:
        raise SettingsError("--rate-per-s 0 takes the rate away: leave --burst out")
    given: dict[str, Any] = {} if undecided_events is None else {"undecided_events": undecided_events or None}
    if rate_per_s == 0:
        return given | {"rate_per_s": None, "burst": None}
    return given | (_given(rate_per_s=rate_per_s, burst=burst) or {})


@tenants_app.command("suspend")
def suspend_tenant(tenant: TenantName, reason: Reason = "", as_json: AsJson = False) -> None:
    """Shut a tenant's doors; what was accepted before is still decided."""
    _command(f"{_root(tenant)}/suspend", reason, f"tenant {tenant} is suspended", as_json)


@tenants_app.command("resume")
def resume_tenant(tenant: TenantName, reason: Reason = "", as_json: AsJson = False) -> None:
    """Open a suspended tenant's doors again."""
    _command(f"{_root(tenant)}/resume", reason, f"tenant {tenant} is active", as_json)


@tenants_app.command("broker-password")
def broker_password(tenant: TenantName, as_json: AsJson = False) -> None:
    """Give the tenant's broker user another password; it is shown now and never again."""
    with _client() as client:
        made = client.post(f"{_root(tenant)}/broker-password")
    _done(made, f"broker user      {made['broker_user']}\nbroker password  {made['broker_password']}", as_json)


# --- what they share ----------------------------------------------------------------------------------


def _client() -> OperatorClient:
    return client_from_environment(settings.load().data_dir)


def _tenant(given: str | None) -> str:
    session = load_session(settings.load().data_dir)
    chosen = given or (session.tenant if session else None)
    if not chosen:
        raise SettingsError("which tenant? give --tenant, or log in with one")
    return chosen


def _root(tenant: str | None) -> str:
    return f"/ops/v1/tenants/{quote(_tenant(tenant), safe='')}"


def _password(from_stdin: bool, prompt: str = "Password", *, confirm: bool = False) -> str:
    if from_stdin:
        line = sys.stdin.readline().rstrip("\r\n")
        if not line:
            raise SettingsError("standard input holds no password")
        return line
    return str(typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True))


def _pages(client: OperatorClient, path: str, name: str) -> list[Any]:
    found: list[Any] = []
    after: str | None = None
    while True:
        page = client.get(path, after=after)
        found += page[name]
        after = page["next"]
        if after is None:
            return found


def _command(path: str, reason: str, said: str, as_json: bool) -> None:
    with _client() as client:
        found = client.post(path, {"reason": reason})
    _done(found, said, as_json)


def _done(document: Any, said: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _show(documents: Sequence[Any], rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json(documents)
        return
    print_table(rows, columns)


def _print_tenant(found: Mapping[str, Any]) -> None:
    fields: dict[str, Any] = {}
    for field, value in found.items():
        for name, part in value.items() if isinstance(value, dict) else (("", value),):
            fields[f"{field} {name}".strip()] = part
    print_fields(fields)


def _roles(grants: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(
        f"{grant['role']} {'everywhere' if grant['tenant'] == EVERYWHERE else grant['tenant']}" for grant in grants
    )


def _given(**values: object) -> dict[str, object] | None:
    return {name: value for name, value in values.items() if value is not None} or None

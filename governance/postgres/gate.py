"""The one gate through which everything comes that decides: commands of people on the registry, and its halts.

Promises: what decides was approved by somebody else than its author, for exactly the content that the approver named,
and signed at that moment; several versions become active together or not at all; each command writes its audit record
in its own transaction. The commands of one tenant run one after another, so that of two people who do the same thing
one is told that the other was faster (ConflictError). The tables' triggers hold the same rules against any other
program. Does not ask whether the caller has the permission: the door before it does.

A revoked version stays where it is active and nothing takes its place: events there ask a person until somebody
activates another version or rolls back. To go on silently with another version would be a decision of nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from sqlalchemy import Row, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from contracts.events import canonical_json
from contracts.failures import AuthorizationError, ConflictError, InvalidRequestError, NotKnownError
from contracts.identity import Principal
from contracts.ports import Artifact, Clock
from contracts.state import AuditRecord, Pin
from contracts.tenancy import TenantScope
from contracts.topology import RunningLayouts
from governance.audit import operator_record
from governance.columns import moment
from governance.postgres.engine import sqlstate, transaction
from governance.postgres.outbox import enqueue_records
from governance.prompts import check_prompt, diff
from governance.registry import (
    KINDS,
    MAX_CONTENT_BYTES,
    SHARED,
    Activation,
    Choice,
    Draft,
    Halt,
    Kind,
    Placement,
    Validator,
    Version,
    VersionKey,
    VersionStatus,
    active_before,
    check_move,
    digest_of,
    release_artifacts,
)
from governance.signing import Signer, Statement

MAX_LISTED: Final = 1_000
_REFUSED_BY_THE_TABLES: Final = frozenset({"23503", "23505", "23514"})

_LOCK: Final = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))")
_FIELDS: Final = """
    kind, name, version, digest, status, author, approver, reason, created_at, approved_at, owner, purpose, use_tag,
    limitations, evidence, validator, valid_until, submitted_at, key_id,
    coalesce(valid_until <= now(), false) AS expired
"""
_LISTED: Final = _FIELDS.replace(" evidence,", " CAST('{}' AS jsonb) AS evidence,")
_THIS: Final = "kind = :kind AND tenant = :tenant AND name = :name AND version = :version"

# Content that may not be used any more can be registered anew: a new evaluation, a new validation.
_TWIN: Final = text(
    """
    SELECT name, version, status FROM registry_versions
     WHERE kind = :kind AND tenant = :tenant AND digest = :digest AND status NOT IN ('rejected', 'revoked')
       AND (valid_until IS NULL OR valid_until > now())
     ORDER BY created_at DESC LIMIT 1
    """
)
_INSERT: Final = text(
    f"""
    INSERT INTO registry_versions (tenant, kind, name, version, digest, content, author, reason, created_at, owner,
                                   purpose, use_tag, limitations, evidence, validator, valid_until)
    SELECT :tenant, :kind, :name, coalesce(max(v.version), 0) + 1, :digest, :content, :author, :reason,
           CAST(:at AS timestamptz), :owner, :purpose, :use_tag, :limitations, CAST(CAST(:evidence AS text) AS jsonb),
           :validator, CAST(:valid_until AS timestamptz)
      FROM registry_versions v WHERE v.kind = :kind AND v.tenant = :tenant AND v.name = :name
    RETURNING {_FIELDS}
    """  # noqa: S608 - our own constant
)
_SHOW: Final = text(f"SELECT {_FIELDS}, content FROM registry_versions WHERE {_THIS}")  # noqa: S608
_LOCKED: Final = text(f"SELECT {_FIELDS} FROM registry_versions WHERE {_THIS} FOR UPDATE")  # noqa: S608
_LIST: Final = text(
    f"""
    SELECT {_LISTED} FROM registry_versions
     WHERE tenant = :tenant AND kind = coalesce(CAST(:kind AS text), kind)
       AND status = coalesce(CAST(:status AS text), status)
     ORDER BY created_at DESC, kind, name, version DESC LIMIT :limit
    """  # noqa: S608 - our own constant
)
_MOVE: Final = text(
    f"""
    UPDATE registry_versions SET status = :status,
           submitted_at = CASE WHEN :status = 'submitted' THEN CAST(:at AS timestamptz) ELSE submitted_at END
     WHERE {_THIS} RETURNING {_FIELDS}
    """  # noqa: S608 - our own constant
)
_APPROVAL: Final = text(
    """
    INSERT INTO registry_approvals (tenant, kind, name, version, digest, approver, reason, approved_at)
    VALUES (:tenant, :kind, :name, :version, :digest, :approver, :reason, CAST(:at AS timestamptz))
    """
)
_APPROVE: Final = text(
    f"""
    UPDATE registry_versions SET status = 'approved', approver = :approver, approved_at = CAST(:at AS timestamptz),
           signature = :signature, key_id = :key_id
     WHERE {_THIS} RETURNING {_FIELDS}
    """  # noqa: S608 - our own constant
)
_PLACE: Final = "tenant = :tenant AND kind = :kind AND scope_key = :scope_key"
_AT_PLACE: Final = text(f"SELECT name, version FROM registry_active WHERE {_PLACE}")  # noqa: S608
_SOMEWHERE: Final = text(
    f"SELECT scope_key FROM registry_active WHERE {_THIS} ORDER BY scope_key"  # noqa: S608
)
_PUT: Final = text(
    """
    INSERT INTO registry_active (tenant, kind, scope_key, name, version, activated_at, activated_by)
    VALUES (:tenant, :kind, :scope_key, :name, :version, CAST(:at AS timestamptz), :person)
    ON CONFLICT (kind, tenant, scope_key) DO UPDATE
       SET name = excluded.name, version = excluded.version, activated_at = excluded.activated_at,
           activated_by = excluded.activated_by
    """
)
_TAKE_AWAY: Final = text(f"DELETE FROM registry_active WHERE {_PLACE}")  # noqa: S608
_REMEMBER: Final = text(
    """
    INSERT INTO registry_activations (tenant, kind, scope_key, action, name, version, activated_by, reason,
                                      activated_at)
    VALUES (:tenant, :kind, :scope_key, :action, :name, CAST(:version AS integer), :person, :reason,
            CAST(:at AS timestamptz))
    """
)
_HISTORY: Final = text(
    """
    SELECT kind, scope_key, action, name, version, activated_by, reason, activated_at FROM (
        SELECT * FROM registry_activations
         WHERE tenant = :tenant AND kind = coalesce(CAST(:kind AS text), kind)
           AND scope_key = coalesce(CAST(:scope_key AS text), scope_key)
         ORDER BY id DESC LIMIT CAST(:limit AS bigint)) newest
     ORDER BY id
    """
)
_ACTIVE: Final = text(
    """
    SELECT a.kind, a.scope_key, a.name, a.version, v.digest, a.tenant = '*' AS shared, a.activated_by, a.activated_at,
           v.status IN ('approved', 'active') AND (v.valid_until IS NULL OR v.valid_until > now()) AS usable
      FROM registry_active a
      JOIN registry_versions v
        ON v.kind = a.kind AND v.tenant = a.tenant AND v.name = a.name AND v.version = a.version
     WHERE a.tenant IN (:tenant, '*') ORDER BY a.kind, a.scope_key, a.tenant = '*'
    """
)
_SET_HALT: Final = text(
    """
    INSERT INTO halts (tenant, model, reason, set_by, set_at)
    VALUES (:tenant, :model, :reason, :person, CAST(:at AS timestamptz))
    ON CONFLICT (tenant, model) DO UPDATE
       SET reason = excluded.reason, set_by = excluded.set_by, set_at = excluded.set_at
    """
)
_CLEAR_HALT: Final = text("DELETE FROM halts WHERE tenant = :tenant AND model = :model RETURNING model")
_HALTS: Final = text(
    """
    SELECT model, reason, set_by, set_at, tenant = '*' AS shared FROM halts
     WHERE tenant IN (:tenant, '*') ORDER BY tenant = '*' DESC, model
    """
)


@dataclass(slots=True)
class _Command:
    """One command's transaction, who gives it, when and why; its audit records go out with it."""

    connection: AsyncConnection
    scope: TenantScope | None
    caller: Principal
    reason: str
    at: datetime
    records: list[AuditRecord]

    @property
    def tenant(self) -> str:
        return _owner(self.scope)

    async def run(self, statement: Any, **values: Any) -> Any:
        return await self.connection.execute(statement, {"tenant": self.tenant} | values)

    def note(self, action: str, subject: Mapping[str, str | int], **detail: str | int) -> None:
        """Write down what was done; the reason goes with it."""
        told = {"reason": self.reason, **detail}
        self.records.append(operator_record(self.scope, action, self.caller, _said_at(self.at), subject, told))


class RegistryGate:
    """Commands and views of the registry. A scope of None is what every tenant uses.

    `validators` look at content before it is submitted, one per kind; prompts have one of their own. Every command
    raises AuthorizationError for a caller behind whom there is no person, NotKnownError for a version that is not
    there, and ConflictError when it is not in the state that the command needs.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        clock: Clock,
        layouts: RunningLayouts,
        signer: Signer,
        validators: Mapping[str, Validator],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._layouts = layouts
        self._signer = signer
        self._released = frozenset((brought.kind, brought.name) for brought in release_artifacts())
        self._validators: Mapping[str, Validator] = {"prompt": check_prompt, **validators}
        missing = [kind for kind in KINDS if kind not in self._validators]
        if missing:
            raise ValueError(f"nothing looks at the content of a {missing[0]} before it is submitted")

    # --- versions -------------------------------------------------------------------------------------

    async def register(self, caller: Principal, scope: TenantScope | None, draft: Draft) -> Version:
        """Add a version as a draft, with the next number of its name.

        Raises InvalidRequestError with pointers, and ConflictError naming the usable version of the same content.
        """
        author = _person(caller)
        content = canonical_json(draft.content)
        valid_until = None if draft.valid_until is None else moment(draft.valid_until)
        self._check_draft(scope, draft, author, content, valid_until)
        values = draft.model_dump(include={"kind", "name", "owner", "purpose", "use_tag", "limitations", "validator"})
        values |= {"digest": digest_of(content), "content": content, "author": author, "valid_until": valid_until}
        async with self._command(caller, scope, draft.reason) as command:
            twin = (await command.run(_TWIN, kind=draft.kind, digest=values["digest"])).first()
            if twin is not None:
                raise ConflictError(f"{draft.kind} {twin.name} version {twin.version} ({twin.status}) is this content")
            evidence = canonical_json(draft.evidence).decode()
            row = await command.run(_INSERT, **values, reason=draft.reason, at=command.at, evidence=evidence)
            version = _version(row.one())
            command.note("registry.registered", _subject(version))
        return version

    def _check_draft(
        self, scope: TenantScope | None, draft: Draft, author: str, content: bytes, valid_until: datetime | None
    ) -> None:
        wrong = []
        if scope is None and (draft.kind, draft.name) in self._released:
            # The next release may bring that version: `db upgrade` would find another content under its number.
            wrong.append(("/name", "belongs to the release; take another name for what every tenant uses"))
        if len(content) > MAX_CONTENT_BYTES:
            wrong.append(("/content", f"is larger than {MAX_CONTENT_BYTES:,} bytes"))
        if draft.validator == author:
            wrong.append(("/validator", "must be somebody else than the author"))
        if valid_until is not None and valid_until <= self._clock.now():
            wrong.append(("/valid_until", "must lie in the future"))
        if wrong:
            raise InvalidRequestError("the version cannot be registered", pointers=tuple(wrong))

    async def submit(
        self, caller: Principal, scope: TenantScope | None, key: VersionKey, digest: str, reason: str
    ) -> Version:
        """Ask for approval. Raises InvalidRequestError with pointers when the content cannot be used."""
        _person(caller)
        found = await self.show(scope, key)
        check_move(str(key), found.status, VersionStatus.SUBMITTED)
        _check_digest(found, digest)
        # Content never changes, so it is looked at outside the transaction: compiling may take its time.
        catalogues = await self._catalogues(scope) if key.kind == "model" else ()
        findings = await asyncio.to_thread(self._validators[key.kind], found.content or {}, catalogues)
        wrong = [(f"/content{pointer}", why) for pointer, why in findings]
        if key.kind == "model" and not found.evidence:
            wrong.append(("/evidence", "a model is submitted with its evaluation report; register it with one"))
        if wrong:
            raise InvalidRequestError(f"{key} cannot be submitted: register a corrected one", pointers=tuple(wrong))
        return await self._change(caller, scope, key, digest, reason, VersionStatus.SUBMITTED)

    async def _catalogues(self, scope: TenantScope | None) -> Sequence[Artifact]:
        """The catalogues of reasons that decide in a scope."""
        chosen = {
            (None if place.shared else scope, VersionKey("reasons", place.name, place.version)): place
            for place in await self.active(scope)
            if place.kind == "reasons" and place.usable
        }
        found = []
        for owner, key in chosen:
            version = await self.show(owner, key)
            pin = Pin(name=version.name, version=version.version, digest=version.digest)
            found.append(Artifact("reasons", pin, version.content or {}))
        return found

    async def approve(
        self, caller: Principal, scope: TenantScope | None, key: VersionKey, digest: str, reason: str
    ) -> Version:
        """Approve exactly the content of this digest, and sign it. Raises AuthorizationError for one's own version."""
        approver = _person(caller)
        async with self._command(caller, scope, reason) as command:
            found = await _locked(command, key, digest)
            if found.author == approver:
                raise AuthorizationError("nobody approves their own version; ask somebody else")
            check_move(str(key), found.status, VersionStatus.APPROVED)
            _check_unexpired(found)
            statement = self._statement(command, found, approver)
            who = {"approver": approver, "at": command.at, **_values(key)}
            await command.run(_APPROVAL, **who, digest=digest, reason=reason)
            signed = {"signature": self._signer.sign(statement), "key_id": self._signer.key_id}
            version = _version((await command.run(_APPROVE, **who, **signed)).one())
            command.note("registry.approved", _subject(version), key_id=self._signer.key_id)
        return version

    def _statement(self, command: _Command, found: Version, approver: str) -> Statement:
        return Statement(
            kind=found.kind,
            tenant=command.tenant,
            name=found.name,
            version=found.version,
            digest=found.digest,
            author=found.author,
            approver=approver,
            approved_at=command.at,
            valid_until=None if found.valid_until is None else moment(found.valid_until),
        )

    async def reject(
        self, caller: Principal, scope: TenantScope | None, key: VersionKey, digest: str, reason: str
    ) -> Version:
        """Refuse a draft or a submitted version, for ever."""
        return await self._change(caller, scope, key, digest, reason, VersionStatus.REJECTED)

    async def retire(
        self, caller: Principal, scope: TenantScope | None, key: VersionKey, digest: str, reason: str
    ) -> Version:
        """Put an approved version away; it can be activated again. Raises ConflictError while it decides anywhere."""
        return await self._change(caller, scope, key, digest, reason, VersionStatus.RETIRED)

    async def revoke(
        self, caller: Principal, scope: TenantScope | None, key: VersionKey, digest: str, reason: str
    ) -> Version:
        """Take an approval back, for ever. Where the version is active, events ask a person from now on."""
        return await self._change(caller, scope, key, digest, reason, VersionStatus.REVOKED)

    async def _change(
        self,
        caller: Principal,
        scope: TenantScope | None,
        key: VersionKey,
        digest: str,
        reason: str,
        target: VersionStatus,
    ) -> Version:
        async with self._command(caller, scope, reason) as command:
            found = await _locked(command, key, digest)
            check_move(str(key), found.status, target)
            places = ", ".join((await command.run(_SOMEWHERE, **_values(key))).scalars())
            if places and target is VersionStatus.RETIRED:
                raise ConflictError(f"{key} decides for {places}: activate another version there first")
            version = await _moved(command, key, target)
            command.note(f"registry.{target}", _subject(version), **({"places": places} if places else {}))
        return version

    # --- what decides ---------------------------------------------------------------------------------

    async def activate(
        self, caller: Principal, scope: TenantScope | None, choices: Sequence[Choice], reason: str
    ) -> Sequence[Version]:
        """Let approved versions decide, all of them from one moment on; gives them as they are now, by position.

        A version that is replaced and decides nowhere else is retired. Raises ConflictError for one that is not
        approved or has expired, and when nothing would change.
        """
        places = [(choice.kind, choice.scope_key) for choice in choices]
        if not places or len(set(places)) != len(places):
            raise InvalidRequestError("name at least one version, and each place once")
        async with self._command(caller, scope, reason) as command:
            changed = [
                await _placed(command, choice.key, choice.scope_key, "activate")
                for choice in sorted(choices, key=lambda choice: (choice.kind, choice.scope_key))
            ]
            if not any(changed):
                named = ", ".join(f"{choice.key} for {choice.scope_key}" for choice in choices)
                raise ConflictError(f"already active: {named}")
            return [await _locked(command, choice.key) for choice in choices]

    async def rollback(
        self, caller: Principal, scope: TenantScope | None, kind: Kind, scope_key: str, reason: str
    ) -> Version | None:
        """Let the version decide that was active before; once more, and the one before that.

        None: a tenant's first version was taken away, and the whole installation's decides again. Raises ConflictError
        when there is none before, or when it may not be used any more.
        """
        async with self._command(caller, scope, reason) as command:
            rows = await command.run(_HISTORY, kind=kind, scope_key=scope_key, limit=None)
            key = active_before([_activation(row) for row in rows])
            if key is not None:
                await _placed(command, key, scope_key, "rollback")
                return await _locked(command, key)
            if scope is None:
                raise ConflictError("nothing was active at this place before; activate another version instead")
            current = (await command.run(_AT_PLACE, kind=kind, scope_key=scope_key)).one_or_none()
            await command.run(_TAKE_AWAY, kind=kind, scope_key=scope_key)
            await _remember(command, kind, scope_key, "rollback", None)
            if current is not None:
                await _retire_unless_active(command, VersionKey(kind, current.name, current.version))
            command.note("registry.rolled_back", {"kind": kind, "scope_key": scope_key, "name": "", "version": 0})
        return None

    async def set_halt(self, caller: Principal, scope: TenantScope | None, model: str, reason: str) -> Halt:
        """Stop automatic decisions of a model, or of all ("*"): within 2 s every event asks a person."""
        person = _person(caller)
        async with self._command(caller, scope, reason) as command:
            await command.run(_SET_HALT, model=model, reason=reason, person=person, at=command.at)
            command.note("halt.set", {"model": model})
        return Halt(model=model, reason=reason, set_by=person, set_at=_said_at(command.at), shared=scope is None)

    async def clear_halt(self, caller: Principal, scope: TenantScope | None, model: str, reason: str) -> None:
        """Let automatic decisions go on. Raises NotKnownError when there is no such halt."""
        async with self._command(caller, scope, reason) as command:
            if (await command.run(_CLEAR_HALT, model=model)).one_or_none() is None:
                raise NotKnownError(f"there is no halt of {model} here")
            command.note("halt.cleared", {"model": model})

    # --- views ----------------------------------------------------------------------------------------

    async def list(
        self, scope: TenantScope | None, kind: Kind | None = None, status: VersionStatus | None = None
    ) -> Sequence[Version]:
        """Versions without content and evidence, which `show` has, newest first, 1,000 at most."""
        async with transaction(self._engine, [scope]) as connection:
            values = {"tenant": _owner(scope), "kind": kind, "status": status, "limit": MAX_LISTED}
            return [_version(row) for row in await connection.execute(_LIST, values)]

    async def show(self, scope: TenantScope | None, key: VersionKey) -> Version:
        """A version with its content. Raises NotKnownError."""
        async with transaction(self._engine, [scope]) as connection:
            row = (await connection.execute(_SHOW, {"tenant": _owner(scope), **_values(key)})).one_or_none()
        if row is None:
            raise NotKnownError(f"there is no {key} here")
        return _version(row).model_copy(update={"content": orjson.loads(bytes(row.content))})

    async def diff(self, scope: TenantScope | None, before: VersionKey, after: VersionKey) -> Sequence[str]:
        """A unified diff of two versions' contents, by line. Raises NotKnownError."""
        first, second = await self.show(scope, before), await self.show(scope, after)
        return await asyncio.to_thread(diff, first.content or {}, second.content or {}, (str(before), str(after)))

    async def active(self, scope: TenantScope | None) -> Sequence[Placement]:
        """What decides at which place: the tenant's own, and the whole installation's."""
        async with transaction(self._engine, [scope]) as connection:
            rows = await connection.execute(_ACTIVE, {"tenant": _owner(scope)})
            return [Placement(**_plain(row)) for row in rows]

    async def history(
        self, scope: TenantScope | None, kind: Kind | None = None, scope_key: str | None = None
    ) -> Sequence[Activation]:
        """Changes of what decides, oldest first: the newest 1,000."""
        async with transaction(self._engine, [scope]) as connection:
            values = {"tenant": _owner(scope), "kind": kind, "scope_key": scope_key, "limit": MAX_LISTED}
            return [_activation(row) for row in await connection.execute(_HISTORY, values)]

    async def halts(self, scope: TenantScope | None) -> Sequence[Halt]:
        """Halts that hold for a tenant: its own, and those for every tenant."""
        async with transaction(self._engine, [scope]) as connection:
            return [Halt(**_plain(row)) for row in await connection.execute(_HALTS, {"tenant": _owner(scope)})]

    @asynccontextmanager
    async def _command(self, caller: Principal, scope: TenantScope | None, reason: str) -> AsyncIterator[_Command]:
        """The transaction of one command; the commands of one tenant wait for each other, 2 s at most."""
        _person(caller)
        if not reason.strip():
            raise InvalidRequestError("say why", pointers=(("/reason", "must not be empty"),))
        try:
            async with transaction(self._engine, [scope], shared=scope is None) as connection:
                await connection.execute(_LOCK, {"key": f"riskfleet.registry {_owner(scope)}"})
                command = _Command(connection, scope, caller, reason, self._clock.now(), [])
                yield command
                await enqueue_records(connection, scope, command.records, self._layouts)
        except DBAPIError as error:
            # Only what passes our own checks comes here: the tables know something that we did not.
            if sqlstate(error) not in _REFUSED_BY_THE_TABLES:
                raise
            raise ConflictError("the registry refuses this: look at the version again, then decide") from error


async def _locked(command: _Command, key: VersionKey, digest: str | None = None) -> Version:
    """The version, held until the command ends. Raises NotKnownError, and ConflictError for another digest."""
    row = (await command.run(_LOCKED, **_values(key))).one_or_none()
    if row is None:
        raise NotKnownError(f"there is no {key} here")
    version = _version(row)
    if digest is not None:
        _check_digest(version, digest)
    return version


async def _moved(command: _Command, key: VersionKey, target: VersionStatus) -> Version:
    row = await command.run(_MOVE, **_values(key), status=str(target), at=command.at)
    return _version(row.one())


async def _placed(command: _Command, key: VersionKey, scope_key: str, action: str) -> bool:
    """Make a version active at a place, and retire the one it replaces; False when it is there already."""
    place = {"kind": key.kind, "scope_key": scope_key}
    current = (await command.run(_AT_PLACE, **place)).one_or_none()
    found = await _locked(command, key)
    if found.status is not VersionStatus.ACTIVE:
        check_move(str(key), found.status, VersionStatus.ACTIVE)
    _check_unexpired(found)
    if current is not None and (current.name, current.version) == (key.name, key.version):
        return False
    if found.status is not VersionStatus.ACTIVE:
        await _moved(command, key, VersionStatus.ACTIVE)
    person = _person(command.caller)
    await command.run(_PUT, **place, name=key.name, version=key.version, at=command.at, person=person)
    await _remember(command, key.kind, scope_key, action, key)
    replaced = "none"
    if current is not None:
        replaced = f"{current.name} version {current.version}"
        await _retire_unless_active(command, VersionKey(key.kind, current.name, current.version))
    done = "registry.activated" if action == "activate" else "registry.rolled_back"
    command.note(done, _subject(found) | {"scope_key": scope_key}, replaced=replaced)
    return True


async def _retire_unless_active(command: _Command, key: VersionKey) -> None:
    """A version that decides nowhere any more is retired; one that was revoked stays revoked."""
    if (await command.run(_SOMEWHERE, **_values(key))).first() is None:
        found = await _locked(command, key)
        if found.status is VersionStatus.ACTIVE:
            await _moved(command, key, VersionStatus.RETIRED)


async def _remember(command: _Command, kind: Kind, scope_key: str, action: str, key: VersionKey | None) -> None:
    await command.run(
        _REMEMBER,
        kind=kind,
        scope_key=scope_key,
        action=action,
        name=key.name if key else None,
        version=key.version if key else None,
        person=_person(command.caller),
        reason=command.reason,
        at=command.at,
    )


def _person(caller: Principal) -> str:
    if not caller.person:
        raise AuthorizationError("no person is answerable for this credential, so it commands nothing here")
    return caller.person


def _check_digest(version: Version, digest: str) -> None:
    if version.digest != digest:
        raise ConflictError(f"the digest of {version.key} is {version.digest}: read it again, then decide")


def _check_unexpired(version: Version) -> None:
    if version.expired:
        raise ConflictError(f"the validation of {version.key} expired: register it anew with a new validation")


def _owner(scope: TenantScope | None) -> str:
    return SHARED if scope is None else scope.tenant_id


def _values(key: VersionKey) -> dict[str, str | int]:
    return {"kind": key.kind, "name": key.name, "version": key.version}


def _subject(version: Version) -> dict[str, str | int]:
    return {**_values(version.key), "digest": version.digest}


def _version(row: Row[Any]) -> Version:
    fields = _plain(row)
    fields.pop("content", None)
    return Version(**fields)


def _activation(row: Row[Any]) -> Activation:
    return Activation(**_plain(row))


def _plain(row: Row[Any]) -> dict[str, Any]:
    return {name: _said_at(value) if isinstance(value, datetime) else value for name, value in row._asdict().items()}


def _said_at(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")

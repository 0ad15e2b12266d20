"""The registry's rules as values: what a version is, how it moves, and what a release brings along.

One mechanism for everything that decides: models, prompts, policies and guardrails. Promises: one table says which
moves there are and what each needs (the database holds the same table, and a test compares the two); nobody approves
their own version; what a release brings is known by its digest. Pure, but for reading the release's own files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, Field

from contracts.events import Moment, canonical_json
from contracts.failures import ConflictError, RiskfleetError
from contracts.identity import EVERYWHERE, Permission
from contracts.ports import Artifact
from contracts.state import Pin

DEFAULTS: Final = Path(__file__).resolve().parent / "defaults"
SHARED: Final = EVERYWHERE
"""The owner of versions that every tenant may use; no tenant id looks like it."""

ANY_MODEL: Final = "*"
"""The model of a halt that holds whatever the model."""

MAX_CONTENT_BYTES: Final = 4_194_304
"""Of canonical content: some 2,000 trees of 31 leaves, or 60,000 names."""

RELEASE_AUTHOR, RELEASE_APPROVER = "riskfleet", "riskfleet-release"

Kind = Literal["model", "prompt", "policy", "guardrail", "lists", "reasons", "trial"]
UseTag = Literal["fraud", "aml", "credit"]
KINDS: Final[tuple[Kind, ...]] = ("model", "prompt", "policy", "guardrail", "lists", "reasons", "trial")

Finding = tuple[str, str]


class Validator(Protocol):
    """Looks at a version's content and gives (JSON pointer into it, reason) for everything that is wrong with it.

    `catalogues` of reasons decide in the same scope: a model may leave its words to them.
    """

    def __call__(self, content: Mapping[str, Any], catalogues: Sequence[Artifact] = (), /) -> Sequence[Finding]:
        """What is wrong; empty when the content may be submitted."""
        ...


class VersionStatus(StrEnum):
    """Where a version stands. Rejected and revoked are final."""

    DRAFT = "draft"
    SUBMITTED = "submitted"
    APPROVED = "approved"
    ACTIVE = "active"
    REJECTED = "rejected"
    RETIRED = "retired"
    REVOKED = "revoked"


_S, _P = VersionStatus, Permission
TRANSITIONS: Final[Mapping[tuple[VersionStatus, VersionStatus], Permission]] = {
    (_S.DRAFT, _S.SUBMITTED): _P.REGISTRY_AUTHOR,
    (_S.DRAFT, _S.REJECTED): _P.REGISTRY_APPROVE,
    (_S.SUBMITTED, _S.APPROVED): _P.REGISTRY_APPROVE,
    (_S.SUBMITTED, _S.REJECTED): _P.REGISTRY_APPROVE,
    (_S.APPROVED, _S.ACTIVE): _P.REGISTRY_ACTIVATE,
    (_S.APPROVED, _S.RETIRED): _P.REGISTRY_ACTIVATE,
    (_S.APPROVED, _S.REVOKED): _P.REGISTRY_APPROVE,
    (_S.ACTIVE, _S.RETIRED): _P.REGISTRY_ACTIVATE,
    (_S.ACTIVE, _S.REVOKED): _P.REGISTRY_APPROVE,
    (_S.RETIRED, _S.ACTIVE): _P.REGISTRY_ACTIVATE,
    (_S.RETIRED, _S.REVOKED): _P.REGISTRY_APPROVE,
}
"""Every move, and what its caller needs. To revoke is to take an approval back, so it needs the same."""


def permission_for(target: VersionStatus) -> Permission:
    """What a move to `target` needs; it is the same from everywhere."""
    return next(needed for (_, to), needed in TRANSITIONS.items() if to == target)


def check_move(what: str, current: VersionStatus, target: VersionStatus) -> None:
    """Raise ConflictError unless the table has the move."""
    if (current, target) not in TRANSITIONS:
        allowed = ", ".join(to for start, to in TRANSITIONS if start == current) or "nothing: it is final"
        raise ConflictError(f"{what} is {current} and may not become {target}; allowed: {allowed}")


Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9][a-z0-9._-]*$")]
ScopeKey = Annotated[
    str, Field(max_length=160, pattern=r"^(risk|compliance)(:[a-z0-9_]+(\.[a-z0-9_]+)*)?$", examples=["risk"])
]
"""Where a version decides: an event kind, or a kind and one event type of it, as `risk:loan.application`."""

Said = Annotated[str, Field(min_length=1, max_length=2_000)]
_IN: Final = ConfigDict(frozen=True, extra="forbid", strict=True)
_OUT: Final = ConfigDict(frozen=True)


class Draft(BaseModel):
    """A version as its author hands it in. `evidence` is the evaluation report, `validator` who made it.

    `valid_until`: when its validation expires, and with it its use.
    """

    model_config = _IN
    kind: Kind
    name: Name
    content: Annotated[dict[str, Any], Field(min_length=1)]
    reason: Said
    owner: Annotated[str, Field(min_length=1, max_length=256)]
    purpose: Said
    use_tag: UseTag
    limitations: Annotated[str, Field(min_length=1, max_length=4_000)]
    evidence: dict[str, Any] = Field(default_factory=dict)
    validator: Annotated[str, Field(min_length=1, max_length=127)] | None = None
    valid_until: Moment | None = None


@dataclass(frozen=True, slots=True)
class VersionKey:
    """Which version."""

    kind: Kind
    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.kind} {self.name} version {self.version}"


class Choice(BaseModel):
    """Let this version decide at this place."""

    model_config = _IN
    kind: Kind
    name: Name
    version: Annotated[int, Field(ge=1, lt=2**31)]
    scope_key: ScopeKey

    @property
    def key(self) -> VersionKey:
        """The version that is meant."""
        return VersionKey(self.kind, self.name, self.version)


class Version(BaseModel):
    """A registered version. Times are RFC 3339 in UTC; `content` is there when one version is asked for."""

    model_config = _OUT
    kind: Kind
    name: str
    version: int
    digest: str
    status: VersionStatus
    author: str
    reason: str
    owner: str
    purpose: str
    use_tag: UseTag
    limitations: str
    evidence: dict[str, Any]
    validator: str | None
    valid_until: str | None
    expired: bool
    created_at: str
    submitted_at: str | None
    approver: str | None
    approved_at: str | None
    key_id: str | None
    content: dict[str, Any] | None = None

    @property
    def key(self) -> VersionKey:
        """Which version this is."""
        return VersionKey(self.kind, self.name, self.version)


class Placement(BaseModel):
    """What decides at a place now. `usable` false: it was revoked or has expired, so events there ask a person.

    `shared`: the whole installation's, which decides for a tenant where it has nothing of its own.
    """

    model_config = _OUT
    kind: Kind
    scope_key: str
    name: str
    version: int
    digest: str
    shared: bool
    usable: bool
    activated_by: str
    activated_at: str


class Activation(BaseModel):
    """One change of what decides at a place; a rollback without a version took the tenant's own away."""

    model_config = _OUT
    kind: Kind
    scope_key: str
    action: Literal["activate", "rollback"]
    name: str | None
    version: int | None
    activated_by: str
    reason: str
    activated_at: str


class Halt(BaseModel):
    """A stop of automatic decisions: of one model's, or of all ("*"). `shared`: for every tenant."""

    model_config = _OUT
    model: str
    reason: str
    set_by: str
    set_at: str
    shared: bool


def active_before(history: Sequence[Activation]) -> VersionKey | None:
    """The version that a rollback brings back, from one place's history, oldest first; None: nothing of its own.

    Activations pile up and a rollback takes the topmost away, so that repeated rollbacks go further back. Raises
    ConflictError when there is nothing to roll back.
    """
    pile: list[VersionKey] = []
    for each in history:
        if each.action == "rollback":
            pile = pile[:-1]
        elif each.name is not None and each.version is not None:
            pile.append(VersionKey(each.kind, each.name, each.version))
    if not pile:
        raise ConflictError("nothing was activated at this place, so nothing can be rolled back")
    return pile[-2] if len(pile) > 1 else None


@dataclass(frozen=True, slots=True)
class ReleaseArtifact:
    """A version that a release brings: approved by its being released, known by its digest, never signed."""

    kind: Kind
    name: str
    version: int
    content: bytes
    purpose: str
    use_tag: UseTag
    limitations: str
    evidence: Mapping[str, Any]
    scopes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical content."""
        return digest_of(self.content)

    @property
    def pin(self) -> Pin:
        """How events name it."""
        return Pin(name=self.name, version=self.version, digest=self.digest)


def release_artifacts(directory: Path = DEFAULTS) -> tuple[ReleaseArtifact, ...]:
    """What this release brings, in order of the file names.

    A default that changes gets a new file with a new version, and the old file stays: an installation that still uses
    the old version trusts it by this list alone.
    """
    documents = (orjson.loads(path.read_bytes()) for path in sorted(directory.glob("*.json")))
    return tuple(
        ReleaseArtifact(
            kind=document["kind"],
            name=document["name"],
            version=document["version"],
            content=canonical_json(document["content"]),
            purpose=document["purpose"],
            use_tag=document["use"],
            limitations=document["limitations"],
            evidence=document.get("evidence", {}),
            scopes=tuple(document["scopes"]),
        )
        for document in documents
    )


def digest_of(content: bytes) -> str:
    """SHA-256 (hex) of canonical content."""
    return hashlib.sha256(content).hexdigest()


def loads_as(
    kind: Kind,
    load: Callable[[Artifact], object],
    more: Callable[[Artifact, Sequence[Artifact]], Sequence[str]] = lambda _, __: (),
) -> Validator:
    """A Validator out of what reads the content when it decides: what cannot be read cannot be submitted.

    Any RiskfleetError of `load` is one finding about the whole content; `more` finds what else is wrong with content
    that can be read, all of it at once.
    """

    def validate(content: Mapping[str, Any], catalogues: Sequence[Artifact] = ()) -> Sequence[Finding]:
        digest = digest_of(canonical_json(dict(content)))
        artifact = Artifact(kind, Pin(name="content", version=0, digest=digest), content)
        try:
            load(artifact)
            return tuple(("", reason) for reason in more(artifact, catalogues))
        except RiskfleetError as error:
            return (("", error.detail),)

    return validate

"""The tables as SQLAlchemy Core knows them: columns, keys and indexes of the current release.

The migrations make the tables, by frozen SQL of their own, with policies, triggers and grants; a test compares the
two. `tenant` is the first column of every key: no index and no predicate works across tenants by accident.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import UserDefinedType

metadata: Final = MetaData()


class Xid8(UserDefinedType[int]):
    """A 64-bit transaction id; queries cast it to text, since the driver has no number for it."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """The type's name in DDL."""
        return "xid8"


def _text(name: str, *, null: bool = False) -> Column[str]:
    return Column(name, Text, nullable=null)


def _bytes(name: str) -> Column[bytes]:
    return Column(name, LargeBinary, nullable=False)


def _at(name: str, *, null: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=null)


def _made(name: str = "created_at") -> Column[object]:
    """Bookkeeping of rows that people make: the server's clock is good enough."""
    return Column(name, DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _int(name: str, default: str | None = None) -> Column[int]:
    return Column(name, Integer, nullable=False, server_default=default)


def _said(name: str, default: str = "") -> Column[str]:
    return Column(name, Text, nullable=False, server_default=default)


def _json(name: str) -> Column[object]:
    return Column(name, JSONB, nullable=False, server_default="{}")


def _big(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _status(default: str) -> Column[str]:
    return Column("status", Text, nullable=False, server_default=default)


events = Table(
    "events",
    metadata,
    *(_text("tenant"), _text("event_id"), _text("identity", null=True), _text("body_digest"), _text("kind")),
    *(
        _text("type"),
        _text("subject_type"),
        _text("subject_id"),
        Column("amount", Numeric),
        _text("currency", null=True),
    ),
    *(_at("occurred_at"), _at("received_at"), _text("correlation_id"), _bytes("body")),
    PrimaryKeyConstraint("tenant", "event_id"),
    Index("events_received", "tenant", "received_at"),
    Index("events_subject", "tenant", "subject_type", "subject_id", "occurred_at"),
)

decisions = Table(
    "decisions",
    metadata,
    *(_text("tenant"), _text("event_id"), _int("revision"), _text("outcome"), _text("decided_by")),
    *(_text("body_digest"), _text("digest"), _bytes("decision"), _bytes("state"), Column("score", Numeric)),
    *(_at("decided_at"), _text("superseded_by", null=True), _text("corrects", null=True), _text("decider", null=True)),
    Column("feed_xid", Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
    PrimaryKeyConstraint("tenant", "event_id", "revision"),
    CheckConstraint("outcome IN ('APPROVED', 'REQUIRE_APPROVAL', 'REJECTED')", name="decisions_outcome"),
    CheckConstraint("decided_by IN ('pipeline', 'person')", name="decisions_decided_by"),
    CheckConstraint("revision >= 1", name="decisions_revision"),
    Index("decisions_decided", "tenant", "decided_at", "event_id"),
    Index("decisions_feed", "tenant", "feed_xid", "event_id", "revision"),
    Index("decisions_corrects", "tenant", "corrects", postgresql_where=text("corrects IS NOT NULL")),
)

approvals = Table(
    "approvals",
    metadata,
    *(_text("tenant"), _text("event_id"), _int("revision"), _at("opened_at"), _status("open")),
    *(Column("reasons", ARRAY(Text), nullable=False), _text("closed_by", null=True), _at("closed_at", null=True)),
    *(_said("kind", "risk"), _said("cause", "decision"), _text("opened_by", null=True), _int("priority", "0")),
    *(Column("amount", Numeric), _text("currency", null=True), _int("approvers_needed", "1")),
    *(_at("due_at", null=True), _at("expires_at", null=True), _said("expiry_outcome", "REJECTED")),
    *(_text("claimed_by", null=True), _at("claimed_at", null=True), _text("note", null=True)),
    *(_text("close_reason", null=True), _text("open_reason", null=True)),
    PrimaryKeyConstraint("tenant", "event_id", "revision"),
    CheckConstraint("status IN ('open', 'approved', 'rejected', 'superseded', 'expired')", name="approvals_status"),
    CheckConstraint("cause IN ('decision', 'reopened', 'contested')", name="approvals_cause"),
    CheckConstraint("expiry_outcome IN ('REJECTED', 'APPROVED')", name="approvals_expiry_outcome"),
    CheckConstraint("approvers_needed BETWEEN 1 AND 2", name="approvals_needed"),
    Index("approvals_open", "tenant", "opened_at", postgresql_where=text("status = 'open'")),
    Index("approvals_expiring", "expires_at", postgresql_where=text("status = 'open'")),
)

approval_votes = Table(
    "approval_votes",
    metadata,
    *(_text("tenant"), _text("event_id"), _int("revision"), _text("person"), _text("vote"), _text("reason")),
    _at("voted_at"),
    PrimaryKeyConstraint("tenant", "event_id", "revision", "person"),
    CheckConstraint("vote IN ('approve', 'reject')", name="approval_votes_vote"),
    ForeignKeyConstraint(
        ["tenant", "event_id", "revision"],
        ["approvals.tenant", "approvals.event_id", "approvals.revision"],
        name="approval_votes_approval",
    ),
)

audit_records = Table(
    "audit_records",
    metadata,
    *(_text("tenant"), _big("seq"), _text("record_id"), _text("event_id"), _int("n"), _text("digest")),
    *(_bytes("body"), _bytes("prev_hash"), _bytes("hash"), _at("recorded_at")),
    PrimaryKeyConstraint("tenant", "seq"),
    UniqueConstraint("tenant", "record_id", name="audit_records_record"),
    Index("audit_records_event", "tenant", "event_id"),
)

audit_heads = Table(
    "audit_heads", metadata, _text("tenant"), _big("seq"), _bytes("hash"), PrimaryKeyConstraint("tenant")
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    *(_text("tenant"), _big("seq"), _bytes("hash"), _text("key_id"), _bytes("signature"), _at("signed_at")),
    PrimaryKeyConstraint("tenant", "seq"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    *(_text("letter_id"), _text("tenant"), _text("event_id"), _text("stage"), _text("category"), _text("problem")),
    *(_text("exception_class"), _text("fingerprint"), _int("attempts"), _at("first_failed_at"), _at("last_failed_at")),
    *(_at("parked_at"), _status("open"), Column("replays", Integer, nullable=False, server_default="0")),
    *(_bytes("body"), Column("failed", Boolean, nullable=False, server_default="false")),
    PrimaryKeyConstraint("letter_id"),
    CheckConstraint("status IN ('open', 'closed', 'replayed', 'discarded')", name="dead_letters_status"),
    Index("dead_letters_event", "tenant", "event_id"),
    CheckConstraint("NOT failed OR status = 'discarded'", name="dead_letters_failed"),
    Index("dead_letters_open", "tenant", "parked_at", postgresql_where=text("status = 'open'")),
    Index("dead_letters_group", "tenant", "fingerprint", "parked_at"),
)

letter_history = Table(
    "letter_history",
    metadata,
    *(_text("tenant"), _text("letter_id"), Column("number", BigInteger, Identity(always=True), nullable=False)),
    *(_at("at"), _text("action"), _text("result"), _text("actor"), _text("person"), _text("reason"), _text("why")),
    _text("request_id", null=True),
    PrimaryKeyConstraint("tenant", "letter_id", "number"),
    CheckConstraint("action IN ('replay', 'discard', 'reveal')", name="letter_history_action"),
    Index("letter_history_person", "tenant", "person", "at"),
    Index("letter_history_request", "tenant", "request_id", postgresql_where=text("request_id IS NOT NULL")),
)

letter_requests = Table(
    "letter_requests",
    metadata,
    *(_text("tenant"), _text("request_id"), _text("action"), Column("letter_ids", ARRAY(Text), nullable=False)),
    *(Column("force", Boolean, nullable=False), Column("rate_per_s", Numeric, nullable=False), _text("reason")),
    *(_text("requested_by"), _at("requested_at"), _at("expires_at"), _status("open")),
    *(_text("answered_by", null=True), _at("answered_at", null=True)),
    PrimaryKeyConstraint("tenant", "request_id"),
    CheckConstraint("action IN ('replay', 'discard')", name="letter_requests_action"),
    CheckConstraint("status IN ('open', 'confirmed', 'withdrawn')", name="letter_requests_status"),
    CheckConstraint(
        "status <> 'confirmed' OR (answered_by IS NOT NULL AND answered_by <> requested_by)",
        name="letter_requests_four_eyes",
    ),
)

replay_pace = Table(
    "replay_pace",
    metadata,
    *(_int("id"), _at("next_due_at")),
    PrimaryKeyConstraint("id"),
    CheckConstraint("id = 1", name="replay_pace_one"),
)

outbox = Table(
    "outbox",
    metadata,
    *(_text("tenant"), _text("message_id"), _text("exchange"), _text("routing_key")),
    *(_json("headers"), _bytes("body"), _made()),
    Column("position", BigInteger, Identity(always=True), nullable=False),
    *(_said("content_type", "application/octet-stream"), _text("correlation_id", null=True)),
    Column("mandatory", Boolean, nullable=False, server_default="true"),
    _at("due_at", null=True),
    PrimaryKeyConstraint("tenant", "message_id"),
    Index("outbox_position", "position"),
)

labels = Table(
    "labels",
    metadata,
    *(_text("tenant"), _text("label_id"), _text("event_id"), _text("label"), _text("source")),
    *(_at("effective_at"), _at("received_at"), _bytes("body")),
    PrimaryKeyConstraint("tenant", "label_id"),
    Index("labels_event", "tenant", "event_id"),
)

registry_versions = Table(
    "registry_versions",
    metadata,
    *(_text("tenant"), _text("kind"), _text("name"), _int("version"), _text("digest"), _bytes("content")),
    *(_status("draft"), _text("author"), _text("approver", null=True), _text("reason"), _made()),
    *(_at("approved_at", null=True), _said("owner"), _said("purpose"), _said("use_tag", "fraud")),
    *(_said("limitations"), _json("evidence"), _text("validator", null=True), _at("valid_until", null=True)),
    *(_at("submitted_at", null=True), Column("signature", LargeBinary), _text("key_id", null=True)),
    PrimaryKeyConstraint("kind", "tenant", "name", "version"),
    UniqueConstraint("kind", "tenant", "name", "version", "digest", name="registry_versions_exact"),
    CheckConstraint("use_tag IN ('fraud', 'aml', 'credit')", name="registry_versions_use"),
    CheckConstraint("digest = encode(sha256(content), 'hex')", name="registry_versions_content"),
    CheckConstraint("validator <> author", name="registry_versions_validator"),
    CheckConstraint("author <> '' AND approver <> ''", name="registry_versions_persons"),
    CheckConstraint(
        "kind IN ('model', 'prompt', 'policy', 'guardrail', 'lists', 'reasons', 'trial')", name="registry_versions_kind"
    ),
    CheckConstraint(
        "status IN ('draft', 'submitted', 'approved', 'active', 'rejected', 'retired', 'revoked')",
        name="registry_versions_status",
    ),
    CheckConstraint("approver <> author", name="registry_versions_four_eyes"),
    CheckConstraint(
        "status NOT IN ('approved', 'active') OR (approver IS NOT NULL AND approved_at IS NOT NULL)",
        name="registry_versions_approved",
    ),
    Index("registry_versions_digest", "digest"),
)

registry_transitions = Table(
    "registry_transitions",
    metadata,
    *(_text("from_status"), _text("to_status")),
    PrimaryKeyConstraint("from_status", "to_status"),
)

registry_approvals = Table(
    "registry_approvals",
    metadata,
    *(_text("tenant"), _text("kind"), _text("name"), _int("version"), _text("digest"), _text("approver")),
    *(_text("reason"), _at("approved_at")),
    PrimaryKeyConstraint("kind", "tenant", "name", "version"),
    CheckConstraint("approver <> ''", name="registry_approvals_person"),
    ForeignKeyConstraint(
        ["kind", "tenant", "name", "version", "digest"],
        [f"registry_versions.{name}" for name in ("kind", "tenant", "name", "version", "digest")],
        name="registry_approvals_exact",
    ),
)

registry_active = Table(
    "registry_active",
    metadata,
    *(_text("tenant"), _text("kind"), _text("scope_key"), _text("name"), _int("version"), _made("activated_at")),
    _said("activated_by"),
    PrimaryKeyConstraint("kind", "tenant", "scope_key"),
    ForeignKeyConstraint(
        ["kind", "tenant", "name", "version"],
        [f"registry_versions.{name}" for name in ("kind", "tenant", "name", "version")],
        name="registry_active_version",
    ),
)

registry_activations = Table(
    "registry_activations",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    *(_text("tenant"), _text("kind"), _text("scope_key"), _text("action"), _text("name", null=True)),
    *(Column("version", Integer), _text("activated_by"), _text("reason"), _at("activated_at")),
    PrimaryKeyConstraint("id"),
    CheckConstraint("action IN ('activate', 'rollback')", name="registry_activations_action"),
    CheckConstraint(
        "num_nulls(name, version) = 0 OR (num_nulls(name, version) = 2 AND action = 'rollback')",
        name="registry_activations_version",
    ),
    Index("registry_activations_place", "tenant", "kind", "scope_key", "id"),
)

halts = Table(
    "halts",
    metadata,
    *(_text("tenant"), _said("model", "*"), _text("reason"), _text("set_by"), _at("set_at")),
    PrimaryKeyConstraint("tenant", "model"),
)

pauses = Table(
    "pauses",
    metadata,
    *(_text("tenant"), _text("place"), _text("reason"), _text("set_by"), _at("set_at"), _at("until", null=True)),
    PrimaryKeyConstraint("tenant", "place"),
    CheckConstraint("(tenant = '*') = (place <> 'doors')", name="pauses_place"),
)

probes = Table(
    "probes",
    metadata,
    *(Column("partition", Integer, nullable=False, autoincrement=False), _at("sent_at"), _at("left_at")),
    PrimaryKeyConstraint("partition"),
)

layouts = Table(
    "layouts",
    metadata,
    *(Column(name, Integer, nullable=False, autoincrement=False) for name in ("version", "partitions")),
    *(_at("filling_from"), _at("retired_at", null=True), _at("removed_at", null=True)),
    PrimaryKeyConstraint("version"),
    CheckConstraint("version BETWEEN 1 AND 9999", name="layouts_version"),
    CheckConstraint("partitions BETWEEN 1 AND 100", name="layouts_partitions"),
)

imported_history = Table(
    "imported_history",
    metadata,
    *(_text("tenant"), _text("source"), _int("part"), _bytes("packed")),
    PrimaryKeyConstraint("tenant", "source", "part"),
)

tenants = Table(
    "tenants",
    metadata,
    *(_text("tenant_id"), _text("name"), _text("broker_user", null=True)),
    *(_json("thresholds"), _made(), _status("active"), _json("approval_policy"), _json("limits")),
    PrimaryKeyConstraint("tenant_id"),
    UniqueConstraint("broker_user", name="tenants_broker_user"),
    CheckConstraint("tenant_id ~ '^[a-z0-9][a-z0-9-]{0,62}$'", name="tenants_id"),
    CheckConstraint("status IN ('active', 'suspended')", name="tenants_status"),
)

users = Table(
    "users",
    metadata,
    *(_text("user_id"), _text("name"), _text("password_hash", null=True), _made()),
    *(_at("disabled_at", null=True), _text("oidc_issuer", null=True), _text("oidc_subject", null=True)),
    *(_at("tokens_valid_from", null=True), _int("failed_logins", "0"), _at("locked_until", null=True)),
    PrimaryKeyConstraint("user_id"),
    UniqueConstraint("oidc_issuer", "oidc_subject", name="users_oidc"),
    CheckConstraint("user_id ~ '^[a-z0-9][a-z0-9._@-]{0,126}$'", name="users_id"),
)

memberships = Table(
    "memberships",
    metadata,
    *(_text("user_id"), _text("tenant"), _text("role"), _text("granted_by"), _made("granted_at")),
    PrimaryKeyConstraint("user_id", "tenant", "role"),
    CheckConstraint("role IN ('ADMIN', 'ANALYST', 'APPROVER', 'VIEWER')", name="memberships_role"),
    ForeignKeyConstraint(["user_id"], ["users.user_id"], name="memberships_user"),
)

api_keys = Table(
    "api_keys",
    metadata,
    _text("key_id"),
    Column("tenant", Text, ForeignKey("tenants.tenant_id", name="api_keys_tenant"), nullable=False),
    *(_bytes("mac"), Column("role", Text, nullable=False, server_default="SERVICE"), _made()),
    *(_at("revoked_at", null=True), _said("owner"), _said("label"), _at("expires_at", null=True)),
    PrimaryKeyConstraint("key_id"),
    CheckConstraint("role IN ('SERVICE', 'VIEWER')", name="api_keys_role"),
    Index("api_keys_by_tenant", "tenant"),
)

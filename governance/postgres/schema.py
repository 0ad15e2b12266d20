"""The tables as SQLAlchemy Core knows them: columns, keys and indexes of the current release.

The migrations make the tables, by frozen SQL of their own, with policies, triggers and grants; a test compares the
two. `tenant` is the first column of every key: no index and no predicate works across tenants by accident.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
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

metadata: Final = MetaData()


def _text(name: str, *, null: bool = False) -> Column[str]:
    return Column(name, Text, nullable=null)


def _bytes(name: str) -> Column[bytes]:
    return Column(name, LargeBinary, nullable=False)


def _at(name: str, *, null: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=null)


def _made(name: str = "created_at") -> Column[object]:
    """Bookkeeping of rows that people make: the server's clock is good enough."""
    return Column(name, DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _int(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False)


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
    Index("events_subject", "tenant", "subject_type", "subject_id", "occurred_at"),
)

decisions = Table(
    "decisions",
    metadata,
    *(_text("tenant"), _text("event_id"), _int("revision"), _text("outcome"), _text("decided_by")),
    *(_text("body_digest"), _text("digest"), _bytes("decision"), _bytes("state"), Column("score", Numeric)),
    *(_at("decided_at"), _text("superseded_by", null=True)),
    PrimaryKeyConstraint("tenant", "event_id", "revision"),
    CheckConstraint("outcome IN ('APPROVED', 'REQUIRE_APPROVAL', 'REJECTED')", name="decisions_outcome"),
    CheckConstraint("decided_by IN ('pipeline', 'person')", name="decisions_decided_by"),
    CheckConstraint("revision >= 1", name="decisions_revision"),
    Index("decisions_decided", "tenant", "decided_at", "event_id"),
)

approvals = Table(
    "approvals",
    metadata,
    *(_text("tenant"), _text("event_id"), _int("revision"), _at("opened_at"), _status("open")),
    *(Column("reasons", ARRAY(Text), nullable=False), _text("closed_by", null=True), _at("closed_at", null=True)),
    PrimaryKeyConstraint("tenant", "event_id", "revision"),
    CheckConstraint("status IN ('open', 'approved', 'rejected', 'superseded')", name="approvals_status"),
    Index("approvals_open", "tenant", "opened_at", postgresql_where=text("status = 'open'")),
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
    _bytes("body"),
    PrimaryKeyConstraint("letter_id"),
    CheckConstraint("status IN ('open', 'closed', 'replayed', 'discarded')", name="dead_letters_status"),
    Index("dead_letters_event", "tenant", "event_id"),
    Index("dead_letters_open", "tenant", "parked_at", postgresql_where=text("status = 'open'")),
)

outbox = Table(
    "outbox",
    metadata,
    *(_text("tenant"), _text("message_id"), _text("exchange"), _text("routing_key")),
    *(Column("headers", JSONB, nullable=False, server_default="{}"), _bytes("body"), _made()),
    PrimaryKeyConstraint("tenant", "message_id"),
    Index("outbox_created", "created_at"),
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
    _at("approved_at", null=True),
    PrimaryKeyConstraint("kind", "tenant", "name", "version"),
    CheckConstraint("kind IN ('model', 'prompt', 'policy', 'guardrail')", name="registry_versions_kind"),
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

registry_active = Table(
    "registry_active",
    metadata,
    *(_text("tenant"), _text("kind"), _text("scope_key"), _text("name"), _int("version"), _made("activated_at")),
    PrimaryKeyConstraint("kind", "tenant", "scope_key"),
)

tenants = Table(
    "tenants",
    metadata,
    *(_text("tenant_id"), _text("name"), _text("broker_user", null=True)),
    *(Column("thresholds", JSONB, nullable=False, server_default="{}"), _made(), _status("active")),
    PrimaryKeyConstraint("tenant_id"),
    UniqueConstraint("broker_user", name="tenants_broker_user"),
    CheckConstraint("tenant_id ~ '^[a-z0-9][a-z0-9-]{0,62}$'", name="tenants_id"),
)

users = Table(
    "users",
    metadata,
    *(_text("user_id"), _text("name"), _text("role"), _text("password_hash", null=True), _made()),
    _at("disabled_at", null=True),
    PrimaryKeyConstraint("user_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    _text("key_id"),
    Column("tenant", Text, ForeignKey("tenants.tenant_id", name="api_keys_tenant"), nullable=False),
    *(_bytes("mac"), Column("role", Text, nullable=False, server_default="SERVICE"), _made()),
    _at("revoked_at", null=True),
    PrimaryKeyConstraint("key_id"),
    Index("api_keys_by_tenant", "tenant"),
)

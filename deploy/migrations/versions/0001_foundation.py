"""The foundation: tables, row-level security, and an audit that refuses to be changed.

Frozen: later releases add revisions and never edit this one, so it repeats the tables as SQL instead of importing
them. Grants and the default artifacts are not here: `deploy.migrations.upgrade` renews them at every upgrade.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE events (
    tenant text NOT NULL, event_id text NOT NULL, identity text, body_digest text NOT NULL, kind text NOT NULL,
    type text NOT NULL, subject_type text NOT NULL, subject_id text NOT NULL, amount numeric, currency text,
    occurred_at timestamptz NOT NULL, received_at timestamptz NOT NULL, correlation_id text NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (tenant, event_id));
CREATE INDEX events_subject ON events (tenant, subject_type, subject_id, occurred_at);

CREATE TABLE decisions (
    tenant text NOT NULL, event_id text NOT NULL, revision integer NOT NULL, outcome text NOT NULL,
    decided_by text NOT NULL, body_digest text NOT NULL, digest text NOT NULL, decision bytea NOT NULL,
    state bytea NOT NULL, score numeric, decided_at timestamptz NOT NULL, superseded_by text,
    PRIMARY KEY (tenant, event_id, revision),
    CONSTRAINT decisions_outcome CHECK (outcome IN ('APPROVED', 'REQUIRE_APPROVAL', 'REJECTED')),
    CONSTRAINT decisions_decided_by CHECK (decided_by IN ('pipeline', 'person')),
    CONSTRAINT decisions_revision CHECK (revision >= 1));
CREATE INDEX decisions_decided ON decisions (tenant, decided_at, event_id);

CREATE TABLE approvals (
    tenant text NOT NULL, event_id text NOT NULL, revision integer NOT NULL, opened_at timestamptz NOT NULL,
    status text NOT NULL DEFAULT 'open', reasons text[] NOT NULL, closed_by text, closed_at timestamptz,
    PRIMARY KEY (tenant, event_id, revision),
    CONSTRAINT approvals_status CHECK (status IN ('open', 'approved', 'rejected', 'superseded')));
CREATE INDEX approvals_open ON approvals (tenant, opened_at) WHERE status = 'open';

CREATE TABLE audit_records (
    tenant text NOT NULL, seq bigint NOT NULL, record_id text NOT NULL, event_id text NOT NULL, n integer NOT NULL,
    digest text NOT NULL, body bytea NOT NULL, prev_hash bytea NOT NULL, hash bytea NOT NULL,
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, seq),
    CONSTRAINT audit_records_record UNIQUE (tenant, record_id));
CREATE INDEX audit_records_event ON audit_records (tenant, event_id);

CREATE TABLE audit_heads (
    tenant text NOT NULL, seq bigint NOT NULL, hash bytea NOT NULL, PRIMARY KEY (tenant));

CREATE TABLE audit_checkpoints (
    tenant text NOT NULL, seq bigint NOT NULL, hash bytea NOT NULL, key_id text NOT NULL, signature bytea NOT NULL,
    signed_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, seq));

CREATE TABLE dead_letters (
    letter_id text NOT NULL, tenant text NOT NULL, event_id text NOT NULL, stage text NOT NULL,
    category text NOT NULL, problem text NOT NULL, exception_class text NOT NULL, fingerprint text NOT NULL,
    attempts integer NOT NULL, first_failed_at timestamptz NOT NULL, last_failed_at timestamptz NOT NULL,
    parked_at timestamptz NOT NULL, status text NOT NULL DEFAULT 'open', replays integer NOT NULL DEFAULT 0,
    body bytea NOT NULL,
    PRIMARY KEY (letter_id),
    CONSTRAINT dead_letters_status CHECK (status IN ('open', 'closed', 'replayed', 'discarded')));
CREATE INDEX dead_letters_event ON dead_letters (tenant, event_id);
CREATE INDEX dead_letters_open ON dead_letters (tenant, parked_at) WHERE status = 'open';

CREATE TABLE outbox (
    tenant text NOT NULL, message_id text NOT NULL, exchange text NOT NULL, routing_key text NOT NULL,
    headers jsonb NOT NULL DEFAULT '{}', body bytea NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, message_id));
CREATE INDEX outbox_created ON outbox (created_at);

CREATE TABLE labels (
    tenant text NOT NULL, label_id text NOT NULL, event_id text NOT NULL, label text NOT NULL, source text NOT NULL,
    effective_at timestamptz NOT NULL, received_at timestamptz NOT NULL, body bytea NOT NULL,
    PRIMARY KEY (tenant, label_id));
CREATE INDEX labels_event ON labels (tenant, event_id);

CREATE TABLE registry_versions (
    tenant text NOT NULL, kind text NOT NULL, name text NOT NULL, version integer NOT NULL, digest text NOT NULL,
    content bytea NOT NULL, status text NOT NULL DEFAULT 'draft', author text NOT NULL, approver text,
    reason text NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), approved_at timestamptz,
    PRIMARY KEY (kind, tenant, name, version),
    CONSTRAINT registry_versions_kind CHECK (kind IN ('model', 'prompt', 'policy', 'guardrail')),
    CONSTRAINT registry_versions_status CHECK (
        status IN ('draft', 'submitted', 'approved', 'active', 'rejected', 'retired', 'revoked')),
    CONSTRAINT registry_versions_four_eyes CHECK (approver <> author),
    CONSTRAINT registry_versions_approved CHECK (
        status NOT IN ('approved', 'active') OR (approver IS NOT NULL AND approved_at IS NOT NULL)));
CREATE INDEX registry_versions_digest ON registry_versions (digest);

CREATE TABLE registry_active (
    tenant text NOT NULL, kind text NOT NULL, scope_key text NOT NULL, name text NOT NULL, version integer NOT NULL,
    activated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, tenant, scope_key));

CREATE TABLE tenants (
    tenant_id text NOT NULL, name text NOT NULL, broker_user text, thresholds jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(), status text NOT NULL DEFAULT 'active',
    PRIMARY KEY (tenant_id),
    CONSTRAINT tenants_broker_user UNIQUE (broker_user),
    CONSTRAINT tenants_id CHECK (tenant_id ~ '^[a-z0-9][a-z0-9-]{0,62}$'));

CREATE TABLE users (
    user_id text NOT NULL, name text NOT NULL, role text NOT NULL, password_hash text,
    created_at timestamptz NOT NULL DEFAULT now(), disabled_at timestamptz,
    PRIMARY KEY (user_id));

CREATE TABLE api_keys (
    key_id text NOT NULL, tenant text NOT NULL, mac bytea NOT NULL, role text NOT NULL DEFAULT 'SERVICE',
    created_at timestamptz NOT NULL DEFAULT now(), revoked_at timestamptz,
    PRIMARY KEY (key_id),
    CONSTRAINT api_keys_tenant FOREIGN KEY (tenant) REFERENCES tenants (tenant_id));
CREATE INDEX api_keys_by_tenant ON api_keys (tenant)
"""

# After the first transaction of a connection an unset variable reads as '', not as NULL: both mean "nobody".
_FUNCTIONS = """
CREATE FUNCTION rf_tenants() RETURNS text[] LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT coalesce(nullif(current_setting('rf.tenants', true), ''), '{}')::text[] $$;

CREATE FUNCTION rf_digests() RETURNS text[] LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT coalesce(nullif(current_setting('rf.digests', true), ''), '{}')::text[] $$;

CREATE FUNCTION rf_refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'the audit is append-only: % on % is refused', TG_OP, TG_TABLE_NAME; END $$;

CREATE FUNCTION rf_forward_only() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN
    IF NEW.tenant <> OLD.tenant OR NEW.seq <= OLD.seq THEN
        RAISE EXCEPTION 'the audit is append-only: a head moves forward only';
    END IF;
    RETURN NEW;
END $$
"""

# A sub-select is evaluated once per statement; the bare function would be called for every row. The collation changes
# no answer, and keeps the policy out of index conditions: counted a second time beside our own `tenant = …`, it makes
# the planner take any index that begins with the tenant and read all of its rows.
_OWN = 'tenant COLLATE "C" = ANY ((SELECT rf_tenants())::text[])'

_TENANT_TABLES = (
    *("events", "decisions", "approvals", "audit_records", "audit_heads", "audit_checkpoints"),
    *("dead_letters", "outbox", "labels"),
)
_REGISTRY_TABLES = ("registry_versions", "registry_active")
# tenants, users and api_keys have none: a credential is looked up before anybody knows whose it is.

# A trigger per statement: one per row would not fire for rows that row-level security hides. ALWAYS: also in a
# session that plays back replication.
_REFUSALS = (
    ("audit_records", "UPDATE OR DELETE"),
    ("audit_records", "TRUNCATE"),
    ("audit_checkpoints", "UPDATE OR DELETE"),
    ("audit_checkpoints", "TRUNCATE"),
    ("audit_heads", "DELETE"),
    ("audit_heads", "TRUNCATE"),
)


def upgrade() -> None:
    for script in (_TABLES, _FUNCTIONS):
        for statement in _statements(script):
            op.execute(statement)
    for table in (*_TENANT_TABLES, *_REGISTRY_TABLES):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own_tenants ON {table} USING ({_OWN}) WITH CHECK ({_OWN})")
    for table in _REGISTRY_TABLES:
        op.execute(f"CREATE POLICY shared ON {table} FOR SELECT USING (tenant = '*')")
    op.execute(
        "CREATE POLICY by_digest ON registry_versions FOR SELECT USING (digest = ANY ((SELECT rf_digests())::text[]))"
    )
    for table, operations in _REFUSALS:
        name = f"refuse_{operations.split(' ', maxsplit=1)[0].lower()}"
        op.execute(
            f"CREATE TRIGGER {name} BEFORE {operations} ON {table} FOR EACH STATEMENT EXECUTE FUNCTION rf_refuse()"
        )
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}")
    op.execute(
        "CREATE TRIGGER forward_only BEFORE UPDATE ON audit_heads FOR EACH ROW EXECUTE FUNCTION rf_forward_only()"
    )
    op.execute("ALTER TABLE audit_heads ENABLE ALWAYS TRIGGER forward_only")


def _statements(script: str) -> list[str]:
    """One statement per call, as the driver wants it; none of ours ends a line with a semicolon inside a body."""
    parts, current, inside = [], [], False
    for line in script.strip().splitlines():
        inside ^= line.count("$$") % 2 == 1
        current.append(line)
        if line.endswith(";") and not inside:
            parts.append("\n".join(current).removesuffix(";"))
            current = []
    return [*parts, "\n".join(current)]

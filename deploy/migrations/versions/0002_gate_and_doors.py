"""People, one gate for everything that decides, approvals with votes, and what the doors of this release need.

Frozen, as every revision. The rules that no program may get past stand here as constraints and triggers: content
never changes, a status moves only as `registry_transitions` says, nobody approves their own version, an approval is
bound to a digest, and what is activated was approved and has not expired.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLES = """
ALTER TABLE decisions ADD COLUMN corrects text;
ALTER TABLE decisions ADD COLUMN decider text;
ALTER TABLE decisions ADD COLUMN feed_xid xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX decisions_feed ON decisions (tenant, feed_xid, event_id, revision);
CREATE INDEX decisions_corrects ON decisions (tenant, corrects) WHERE corrects IS NOT NULL;

ALTER TABLE approvals DROP CONSTRAINT approvals_status;
ALTER TABLE approvals ADD CONSTRAINT approvals_status CHECK (
    status IN ('open', 'approved', 'rejected', 'superseded', 'expired'));
ALTER TABLE approvals ADD COLUMN kind text NOT NULL DEFAULT 'risk';
ALTER TABLE approvals ADD COLUMN cause text NOT NULL DEFAULT 'decision';
ALTER TABLE approvals ADD COLUMN opened_by text;
ALTER TABLE approvals ADD COLUMN priority integer NOT NULL DEFAULT 0;
ALTER TABLE approvals ADD COLUMN amount numeric;
ALTER TABLE approvals ADD COLUMN currency text;
ALTER TABLE approvals ADD COLUMN approvers_needed integer NOT NULL DEFAULT 1;
ALTER TABLE approvals ADD COLUMN due_at timestamptz;
ALTER TABLE approvals ADD COLUMN expires_at timestamptz;
ALTER TABLE approvals ADD COLUMN expiry_outcome text NOT NULL DEFAULT 'REJECTED';
ALTER TABLE approvals ADD COLUMN claimed_by text;
ALTER TABLE approvals ADD COLUMN claimed_at timestamptz;
ALTER TABLE approvals ADD COLUMN note text;
ALTER TABLE approvals ADD COLUMN close_reason text;
ALTER TABLE approvals ADD COLUMN open_reason text;
ALTER TABLE approvals ADD CONSTRAINT approvals_cause CHECK (cause IN ('decision', 'reopened', 'contested'));
ALTER TABLE approvals ADD CONSTRAINT approvals_expiry_outcome CHECK (expiry_outcome IN ('REJECTED', 'APPROVED'));
ALTER TABLE approvals ADD CONSTRAINT approvals_needed CHECK (approvers_needed BETWEEN 1 AND 2);
CREATE INDEX approvals_expiring ON approvals (expires_at) WHERE status = 'open';

CREATE TABLE approval_votes (
    tenant text NOT NULL, event_id text NOT NULL, revision integer NOT NULL, person text NOT NULL, vote text NOT NULL,
    reason text NOT NULL, voted_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, event_id, revision, person),
    CONSTRAINT approval_votes_vote CHECK (vote IN ('approve', 'reject')),
    CONSTRAINT approval_votes_approval FOREIGN KEY (tenant, event_id, revision)
        REFERENCES approvals (tenant, event_id, revision));

ALTER TABLE outbox ADD COLUMN position bigint NOT NULL GENERATED ALWAYS AS IDENTITY;
ALTER TABLE outbox ADD COLUMN content_type text NOT NULL DEFAULT 'application/octet-stream';
ALTER TABLE outbox ADD COLUMN correlation_id text;
ALTER TABLE outbox ADD COLUMN mandatory boolean NOT NULL DEFAULT true;
DROP INDEX outbox_created;
CREATE INDEX outbox_position ON outbox (position);

CREATE TABLE registry_transitions (
    from_status text NOT NULL, to_status text NOT NULL, PRIMARY KEY (from_status, to_status));
INSERT INTO registry_transitions (from_status, to_status) VALUES
    ('draft', 'submitted'), ('draft', 'rejected'), ('submitted', 'approved'), ('submitted', 'rejected'),
    ('approved', 'active'), ('approved', 'retired'), ('approved', 'revoked'), ('active', 'retired'),
    ('active', 'revoked'), ('retired', 'active'), ('retired', 'revoked');

ALTER TABLE registry_versions ADD COLUMN owner text NOT NULL DEFAULT '';
ALTER TABLE registry_versions ADD COLUMN purpose text NOT NULL DEFAULT '';
ALTER TABLE registry_versions ADD COLUMN use_tag text NOT NULL DEFAULT 'fraud';
ALTER TABLE registry_versions ADD COLUMN limitations text NOT NULL DEFAULT '';
ALTER TABLE registry_versions ADD COLUMN evidence jsonb NOT NULL DEFAULT '{}';
ALTER TABLE registry_versions ADD COLUMN validator text;
ALTER TABLE registry_versions ADD COLUMN valid_until timestamptz;
ALTER TABLE registry_versions ADD COLUMN submitted_at timestamptz;
ALTER TABLE registry_versions ADD COLUMN signature bytea;
ALTER TABLE registry_versions ADD COLUMN key_id text;
ALTER TABLE registry_versions ADD CONSTRAINT registry_versions_use CHECK (use_tag IN ('fraud', 'aml', 'credit'));
ALTER TABLE registry_versions ADD CONSTRAINT registry_versions_content CHECK (
    digest = encode(sha256(content), 'hex'));
ALTER TABLE registry_versions ADD CONSTRAINT registry_versions_validator CHECK (validator <> author);
ALTER TABLE registry_versions ADD CONSTRAINT registry_versions_persons CHECK (author <> '' AND approver <> '');
ALTER TABLE registry_versions ADD CONSTRAINT registry_versions_exact UNIQUE (kind, tenant, name, version, digest);

CREATE TABLE registry_approvals (
    tenant text NOT NULL, kind text NOT NULL, name text NOT NULL, version integer NOT NULL, digest text NOT NULL,
    approver text NOT NULL, reason text NOT NULL, approved_at timestamptz NOT NULL,
    PRIMARY KEY (kind, tenant, name, version),
    CONSTRAINT registry_approvals_person CHECK (approver <> ''),
    CONSTRAINT registry_approvals_exact FOREIGN KEY (kind, tenant, name, version, digest)
        REFERENCES registry_versions (kind, tenant, name, version, digest));

ALTER TABLE registry_active ADD COLUMN activated_by text NOT NULL DEFAULT '';
ALTER TABLE registry_active ADD CONSTRAINT registry_active_version FOREIGN KEY (kind, tenant, name, version)
    REFERENCES registry_versions (kind, tenant, name, version);

CREATE TABLE registry_activations (
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY, tenant text NOT NULL, kind text NOT NULL,
    scope_key text NOT NULL, action text NOT NULL, name text, version integer, activated_by text NOT NULL,
    reason text NOT NULL, activated_at timestamptz NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT registry_activations_action CHECK (action IN ('activate', 'rollback')),
    CONSTRAINT registry_activations_version CHECK (
        num_nulls(name, version) = 0 OR (num_nulls(name, version) = 2 AND action = 'rollback')));
CREATE INDEX registry_activations_place ON registry_activations (tenant, kind, scope_key, id);
INSERT INTO registry_activations (tenant, kind, scope_key, action, name, version, activated_by, reason, activated_at)
    SELECT tenant, kind, scope_key, 'activate', name, version, 'upgrade', 'active before the upgrade', activated_at
      FROM registry_active;

CREATE TABLE halts (
    tenant text NOT NULL, model text NOT NULL DEFAULT '*', reason text NOT NULL, set_by text NOT NULL,
    set_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, model));

ALTER TABLE tenants ADD COLUMN approval_policy jsonb NOT NULL DEFAULT '{}';
ALTER TABLE tenants ADD COLUMN limits jsonb NOT NULL DEFAULT '{}';
ALTER TABLE tenants ADD CONSTRAINT tenants_status CHECK (status IN ('active', 'suspended'));

CREATE TABLE memberships (
    user_id text NOT NULL, tenant text NOT NULL, role text NOT NULL, granted_by text NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, tenant, role),
    CONSTRAINT memberships_role CHECK (role IN ('ADMIN', 'ANALYST', 'APPROVER', 'VIEWER')),
    CONSTRAINT memberships_user FOREIGN KEY (user_id) REFERENCES users (user_id));
INSERT INTO memberships (user_id, tenant, role, granted_by) SELECT user_id, '*', role, 'upgrade' FROM users;
ALTER TABLE users DROP COLUMN role;
ALTER TABLE users ADD COLUMN oidc_issuer text;
ALTER TABLE users ADD COLUMN oidc_subject text;
ALTER TABLE users ADD COLUMN tokens_valid_from timestamptz;
ALTER TABLE users ADD COLUMN failed_logins integer NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN locked_until timestamptz;
ALTER TABLE users ADD CONSTRAINT users_oidc UNIQUE (oidc_issuer, oidc_subject);
ALTER TABLE users ADD CONSTRAINT users_id CHECK (user_id ~ '^[a-z0-9][a-z0-9._@-]{0,126}$');

ALTER TABLE api_keys ADD COLUMN owner text NOT NULL DEFAULT '';
ALTER TABLE api_keys ADD COLUMN label text NOT NULL DEFAULT '';
ALTER TABLE api_keys ADD COLUMN expires_at timestamptz;
ALTER TABLE api_keys ADD CONSTRAINT api_keys_role CHECK (role IN ('SERVICE', 'VIEWER'))
"""

# Whoever owns the table made it, and brings the release's own artifacts: the only rows that begin as more than drafts.
_FUNCTIONS = """
CREATE FUNCTION rf_registry_version() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN
    IF TG_OP = 'INSERT' THEN
        IF (NEW.status <> 'draft'
            OR num_nonnulls(NEW.submitted_at, NEW.approver, NEW.approved_at, NEW.signature, NEW.key_id) > 0)
           AND NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'MEMBER') THEN
            RAISE EXCEPTION 'a version begins as a draft' USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF (NEW.tenant, NEW.kind, NEW.name, NEW.version, NEW.digest, NEW.content, NEW.author, NEW.reason, NEW.created_at,
        NEW.owner, NEW.purpose, NEW.use_tag, NEW.limitations, NEW.evidence, NEW.validator, NEW.valid_until)
       IS DISTINCT FROM
       (OLD.tenant, OLD.kind, OLD.name, OLD.version, OLD.digest, OLD.content, OLD.author, OLD.reason, OLD.created_at,
        OLD.owner, OLD.purpose, OLD.use_tag, OLD.limitations, OLD.evidence, OLD.validator, OLD.valid_until) THEN
        RAISE EXCEPTION 'a version never changes: register a new one' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status <> OLD.status AND NOT EXISTS (
        SELECT 1 FROM registry_transitions t WHERE t.from_status = OLD.status AND t.to_status = NEW.status) THEN
        RAISE EXCEPTION 'a version may not go from % to %', OLD.status, NEW.status USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.submitted_at IS DISTINCT FROM OLD.submitted_at
       AND NOT (OLD.status = 'draft' AND NEW.status = 'submitted') THEN
        RAISE EXCEPTION 'a version is submitted once' USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.approver, NEW.approved_at, NEW.signature, NEW.key_id)
       IS DISTINCT FROM (OLD.approver, OLD.approved_at, OLD.signature, OLD.key_id)
       AND NOT (OLD.status = 'submitted' AND NEW.status = 'approved') THEN
        RAISE EXCEPTION 'an approval never changes' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status = 'approved' AND OLD.status <> 'approved' AND NOT EXISTS (
        SELECT 1 FROM registry_approvals a
         WHERE a.kind = NEW.kind AND a.tenant = NEW.tenant AND a.name = NEW.name AND a.version = NEW.version
           AND a.digest = NEW.digest AND a.approver = NEW.approver AND a.approved_at = NEW.approved_at) THEN
        RAISE EXCEPTION 'a version is approved by a row in registry_approvals' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION rf_registry_approval() RETURNS trigger LANGUAGE plpgsql AS
$$ DECLARE found registry_versions%ROWTYPE;
BEGIN
    SELECT * INTO found FROM registry_versions v
     WHERE v.kind = NEW.kind AND v.tenant = NEW.tenant AND v.name = NEW.name AND v.version = NEW.version FOR UPDATE;
    IF found.status IS DISTINCT FROM 'submitted' THEN
        RAISE EXCEPTION 'only a submitted version can be approved' USING ERRCODE = 'check_violation';
    END IF;
    IF found.digest <> NEW.digest THEN
        RAISE EXCEPTION 'an approval is of one content: the digest is another' USING ERRCODE = 'check_violation';
    END IF;
    IF found.author = NEW.approver THEN
        RAISE EXCEPTION 'nobody approves their own version' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION rf_registry_active() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN
    -- Locked, so that a revocation that commits first is seen, and one that comes later finds this row.
    PERFORM 1 FROM registry_versions v
      WHERE v.kind = NEW.kind AND v.tenant = NEW.tenant AND v.name = NEW.name AND v.version = NEW.version
        AND v.status IN ('approved', 'active') AND v.approver IS NOT NULL
        AND (v.valid_until IS NULL OR v.valid_until > now()) FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'only an approved version whose validation has not expired can be active'
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$
"""

_OWN = 'tenant COLLATE "C" = ANY ((SELECT rf_tenants())::text[])'
_OWN_TABLES = ("approval_votes", "registry_approvals", "registry_activations", "halts")
_SHARED_TABLES = ("registry_approvals", "registry_activations", "halts")
_TRIGGERS = (
    ("registry_versions", "INSERT OR UPDATE", "rf_registry_version"),
    ("registry_approvals", "INSERT", "rf_registry_approval"),
    ("registry_active", "INSERT OR UPDATE", "rf_registry_active"),
)


def upgrade() -> None:
    for script in (_TABLES, _FUNCTIONS):
        for statement in _statements(script):
            op.execute(statement)
    for table in _OWN_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own_tenants ON {table} USING ({_OWN}) WITH CHECK ({_OWN})")
    for table in _SHARED_TABLES:
        op.execute(f"CREATE POLICY shared ON {table} FOR SELECT USING (tenant = '*')")
    for table, operations, function in _TRIGGERS:
        op.execute(f"CREATE TRIGGER gate BEFORE {operations} ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()")
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER gate")


def _statements(script: str) -> list[str]:
    """One statement per call, as the driver wants it."""
    parts, current, inside = [], [], False
    for line in script.strip().splitlines():
        inside ^= line.count("$$") % 2 == 1
        current.append(line)
        if line.endswith(";") and not inside:
            parts.append("\n".join(current).removesuffix(";"))
            current = []
    return [*parts, "\n".join(current)]

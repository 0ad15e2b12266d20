"""Dead letters that people replay and discard: what they did, what a second person confirms, and the pace.

Frozen, as every revision. Rules that no program may get past: an event fails with a discarded letter only, nobody
confirms their own request, and what was done about a letter is never changed.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TABLES = """
ALTER TABLE dead_letters ADD COLUMN failed boolean NOT NULL DEFAULT false;
ALTER TABLE dead_letters ADD CONSTRAINT dead_letters_failed CHECK (NOT failed OR status = 'discarded');
CREATE INDEX dead_letters_group ON dead_letters (tenant, fingerprint, parked_at);

ALTER TABLE outbox ADD COLUMN due_at timestamptz;

CREATE TABLE letter_history (
    tenant text NOT NULL, letter_id text NOT NULL, number bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL, action text NOT NULL, result text NOT NULL, actor text NOT NULL, person text NOT NULL,
    reason text NOT NULL, why text NOT NULL, request_id text,
    PRIMARY KEY (tenant, letter_id, number),
    CONSTRAINT letter_history_action CHECK (action IN ('replay', 'discard', 'reveal')));
CREATE INDEX letter_history_person ON letter_history (tenant, person, at);
CREATE INDEX letter_history_request ON letter_history (tenant, request_id) WHERE request_id IS NOT NULL;

CREATE TABLE letter_requests (
    tenant text NOT NULL, request_id text NOT NULL, action text NOT NULL, letter_ids text[] NOT NULL,
    force boolean NOT NULL, rate_per_s numeric NOT NULL, reason text NOT NULL, requested_by text NOT NULL,
    requested_at timestamptz NOT NULL, expires_at timestamptz NOT NULL, status text NOT NULL DEFAULT 'open',
    answered_by text, answered_at timestamptz,
    PRIMARY KEY (tenant, request_id),
    CONSTRAINT letter_requests_action CHECK (action IN ('replay', 'discard')),
    CONSTRAINT letter_requests_status CHECK (status IN ('open', 'confirmed', 'withdrawn')),
    CONSTRAINT letter_requests_four_eyes CHECK (
        status <> 'confirmed' OR (answered_by IS NOT NULL AND answered_by <> requested_by)));

CREATE TABLE replay_pace (
    id integer NOT NULL, next_due_at timestamptz NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT replay_pace_one CHECK (id = 1));
INSERT INTO replay_pace (id, next_due_at) VALUES (1, now())
"""

_OWN = 'tenant COLLATE "C" = ANY ((SELECT rf_tenants())::text[])'
_OWN_TABLES = ("letter_history", "letter_requests")


def upgrade() -> None:
    for statement in _TABLES.strip().split(";\n"):
        op.execute(statement)
    for table in _OWN_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own_tenants ON {table} USING ({_OWN}) WITH CHECK ({_OWN})")

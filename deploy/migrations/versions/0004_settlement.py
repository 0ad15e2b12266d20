"""What the reconciler stands on: probes that came through, and events and decisions by their time; and pauses.

Frozen, as every revision. Probes belong to partitions, so no tenant's policy can hold for them.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0002"
branch_labels = None
depends_on = None

_OWN = 'tenant COLLATE "C" = ANY ((SELECT rf_tenants())::text[])'


def upgrade() -> None:
    op.execute("CREATE INDEX events_received ON events (tenant, received_at)")
    op.execute(
        "CREATE TABLE probes (partition integer NOT NULL, sent_at timestamptz NOT NULL, left_at timestamptz NOT NULL, "
        "PRIMARY KEY (partition))"
    )
    op.execute(
        "CREATE TABLE pauses (tenant text NOT NULL, stage text NOT NULL DEFAULT '*', reason text NOT NULL, "
        "set_by text NOT NULL, set_at timestamptz NOT NULL, PRIMARY KEY (tenant, stage), "
        "CONSTRAINT pauses_what CHECK ((tenant = '*') <> (stage = '*')))"
    )
    op.execute("ALTER TABLE pauses ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE pauses FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY own_tenants ON pauses USING ({_OWN}) WITH CHECK ({_OWN})")
    op.execute("CREATE POLICY shared ON pauses FOR SELECT USING (tenant = '*')")

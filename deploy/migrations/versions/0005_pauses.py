"""What is paused: stages for everybody (tenant "*"), and tenants at the doors.

Frozen, as every revision.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_OWN = 'tenant COLLATE "C" = ANY ((SELECT rf_tenants())::text[])'


def upgrade() -> None:
    op.execute(
        "CREATE TABLE pauses (tenant text NOT NULL, place text NOT NULL, reason text NOT NULL, set_by text NOT NULL, "
        "set_at timestamptz NOT NULL, until timestamptz, PRIMARY KEY (tenant, place), "
        "CONSTRAINT pauses_place CHECK ((tenant = '*') = (place <> 'doors')))"
    )
    op.execute("ALTER TABLE pauses ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE pauses FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY own_tenants ON pauses USING ({_OWN}) WITH CHECK ({_OWN})")
    op.execute("CREATE POLICY shared ON pauses FOR SELECT USING (tenant = '*')")

"""Past events that operators load from files: what velocity is rebuilt from, beside events and labels.

Frozen, as every revision. A row is a part of a file, packed; parts come once each.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_OWN = 'tenant COLLATE "C" = ANY ((SELECT rf_tenants())::text[])'


def upgrade() -> None:
    op.execute(
        "CREATE TABLE imported_history (tenant text NOT NULL, source text NOT NULL, part integer NOT NULL, "
        "packed bytea NOT NULL, PRIMARY KEY (tenant, source, part))"
    )
    op.execute("ALTER TABLE imported_history ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE imported_history FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY own_tenants ON imported_history USING ({_OWN}) WITH CHECK ({_OWN})")

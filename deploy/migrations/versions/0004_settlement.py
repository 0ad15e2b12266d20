"""What the reconciler stands on: probes that came through, and events by the time of their receipt.

Frozen, as every revision. Probes belong to partitions, so no tenant's policy can hold for them.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE INDEX events_received ON events (tenant, received_at)")
    op.execute(
        "CREATE TABLE probes (partition integer NOT NULL, sent_at timestamptz NOT NULL, left_at timestamptz NOT NULL, "
        "PRIMARY KEY (partition))"
    )

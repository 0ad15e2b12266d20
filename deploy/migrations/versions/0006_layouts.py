"""The versions of the topology that run, and the one that takes new entries.

Frozen, as every revision. Versions belong to the installation, so no tenant's policy can hold for them.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "CREATE TABLE layouts (version integer NOT NULL, "
        "partitions integer NOT NULL, filling_from timestamptz NOT NULL, "
        "retired_at timestamptz, removed_at timestamptz, PRIMARY KEY (version), "
        "CONSTRAINT layouts_version CHECK (version BETWEEN 1 AND 9999), "
        "CONSTRAINT layouts_partitions CHECK (partitions BETWEEN 1 AND 100))"
    )

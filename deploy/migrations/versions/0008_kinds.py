"""Lists of names, catalogues of reasons and trials of models are registered like everything that decides.

Frozen, as every revision. A release that does not know these kinds never asks for them.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE registry_versions DROP CONSTRAINT registry_versions_kind")
    op.execute(
        "ALTER TABLE registry_versions ADD CONSTRAINT registry_versions_kind "
        "CHECK (kind IN ('model', 'prompt', 'policy', 'guardrail', 'lists', 'reasons', 'trial'))"
    )

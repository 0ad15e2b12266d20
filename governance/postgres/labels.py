"""The table of labels: late ground truth, each once.

Promises: a label is stored once, whatever is repeated and in whatever order it comes; the answer says which were new.
Does not look whether the event exists: a label may come first. Does not say which of an event's labels holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.labels import Label
from governance.columns import clean, label_row
from governance.postgres.engine import columns, transaction

Key = tuple[str, str]

_COLUMNS: Final = (*("tenant", "label_id", "event_id", "label", "source", "effective_at", "received_at", "body"),)
_INSERT: Final = text(
    """
    INSERT INTO labels (tenant, label_id, event_id, label, source, effective_at, received_at, body)
    SELECT * FROM unnest(
        CAST(:tenant AS text[]), CAST(:label_id AS text[]), CAST(:event_id AS text[]), CAST(:label AS text[]),
        CAST(:source AS text[]), CAST(:effective_at AS timestamptz[]), CAST(:received_at AS timestamptz[]),
        CAST(:body AS bytea[]))
    ON CONFLICT DO NOTHING
    RETURNING tenant, label_id
    """
)


class PostgresLabelBook:
    """The port LabelBook over the table `labels`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def record(self, labels: Sequence[Label]) -> Sequence[bool]:
        """Insert each label once, in one transaction; by position, False = it was already there (or twice here).

        Raises DomainValidationError, before anything is written, when a time of one of them cannot be read: its
        neighbours are good, so the caller sends smaller parts until the bad one stands alone.
        """
        if not labels:
            return ()
        # Sorted: two sinks with the same labels wait for each other, and never for ever. Stable: the first one wins.
        rows = sorted((label_row(label) for label in labels), key=lambda row: (row[0], row[1]))
        async with transaction(self._engine, [label.scope for label in labels]) as connection:
            inserted = {
                (row.tenant, row.label_id) for row in await connection.execute(_INSERT, columns(rows, _COLUMNS))
            }
        return _first_of_each([(label.scope.tenant_id, clean(label.label_id)) for label in labels], inserted)


def _first_of_each(keys: Sequence[Key], inserted: set[Key]) -> tuple[bool, ...]:
    """By position: the row with this key was inserted, and this is its first position."""
    left, new = set(inserted), []
    for key in keys:
        new.append(key in left)
        left.discard(key)
    return tuple(new)

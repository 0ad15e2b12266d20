"""The decision feed: every revision of a tenant's decisions, in an order in which nothing appears behind a reader.

A row carries the number of the transaction that inserted it (`feed_xid`). Numbers are given when a transaction first
writes and not when it commits, so the order of numbers alone is no safe order: a lower number may become visible after
a higher one was read. A page therefore ends before the oldest transaction that is still running (`xmin` of the reading
statement's own snapshot): everything below has ended, everything that begins later gets a higher number, and so a
cursor never has to go back. Source: the PostgreSQL manual, "Transaction ID and Snapshot Information Functions".

The price: one long transaction that writes, anywhere on the same server and in any of its databases, holds every feed
back until it ends (nothing is lost, it comes later); a prepared transaction that is forgotten holds it for ever. Our
own are ended by the server after seconds (`idle_in_transaction_session_timeout`, `statement_timeout`). Who holds it:

    SELECT pid, datname, usename, application_name, state, xact_start, backend_xid
      FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY age(backend_xid) DESC;
    SELECT gid, database, prepared, transaction FROM pg_prepared_xacts ORDER BY age(transaction) DESC;

Transaction numbers belong to one server. Readers start without a cursor after a restore. Rows restored from a dump
into a new server may carry numbers that lie ahead of its own; they stay hidden until they are numbered afresh, once,
by a superuser before the fleet starts (row-level security hides them from everybody else, the owner too):
`UPDATE decisions SET feed_xid = pg_current_xact_id()`.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from contracts.ports import FeedPage
from contracts.tenancy import TenantScope
from governance.feed import START, FeedPosition, check_limit, check_reachable, decode, encode
from governance.postgres.engine import transaction

_HORIZON: Final = text("SELECT CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint) AS xmin")
# The driver has no number for xid8, so it travels as text. The row comparison is the index decisions_feed.
_PAGE: Final = text(
    """
    SELECT CAST(CAST(feed_xid AS text) AS bigint) AS number, event_id, revision, decision FROM decisions
     WHERE tenant = :tenant AND feed_xid < pg_snapshot_xmin(pg_current_snapshot())
       AND (feed_xid, event_id, revision) > (CAST(CAST(:number AS text) AS xid8), :event_id, :revision)
     ORDER BY feed_xid, event_id, revision LIMIT :limit
    """
)


class PostgresDecisionFeed:
    """The port DecisionFeed over the table `decisions`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def page(self, scope: TenantScope, after: str | None, limit: int) -> FeedPage:
        """At most `limit` decisions after a cursor (None: from the beginning), in commit-safe order.

        An empty page means "nothing more yet": ask again with the same cursor. Raises InvalidMetadataError for a
        cursor that this feed did not make, one that lies ahead of it, and a limit below 1.
        """
        check_limit(limit)
        place = START if after is None else decode(after)
        values = {"tenant": scope.tenant_id, "number": str(place.transaction), "limit": limit}
        async with transaction(self._engine, [scope]) as connection:
            if after is not None:
                check_reachable(place, (await connection.execute(_HORIZON)).scalar_one())
            after_row = {"event_id": place.event_id, "revision": place.revision}
            rows = (await connection.execute(_PAGE, values | after_row)).all()
        if not rows:
            return FeedPage((), None)
        last = FeedPosition(rows[-1].number, rows[-1].event_id, rows[-1].revision)
        return FeedPage(tuple(bytes(row.decision) for row in rows), encode(last))

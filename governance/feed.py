"""The cursor of the decision feed: where a reader stands, as text that means nothing to it.

Promises: what `encode` made is read back exactly, and any other text is refused. Says nothing about whether the place
exists: a feed that was restored from a copy knows that, not the text.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

from contracts.failures import InvalidMetadataError

_PREFIX: Final = "d1_"
"""Says what the text is, and how it is made: a later release reads both its own and this one."""

_PLACE: Final = re.compile(r"(0|[1-9][0-9]{0,18}):(0|[1-9][0-9]{0,9}):([^\x00]{1,256})", re.DOTALL)
_MAX_TEXT: Final = 1500
_MAX_TRANSACTION: Final = 2**63 - 1
_MAX_REVISION: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, order=True)
class FeedPosition:
    """A place in the feed: the number of the transaction that wrote a decision, then the decision's own key."""

    transaction: int
    event_id: str
    revision: int


START: Final = FeedPosition(0, "", 0)
"""Before every decision."""


def encode(position: FeedPosition) -> str:
    """The position as URL-safe text."""
    place = f"{position.transaction}:{position.revision}:{position.event_id}"
    return _PREFIX + base64.urlsafe_b64encode(place.encode()).rstrip(b"=").decode()


def decode(cursor: str) -> FeedPosition:
    """The position in a text that `encode` made. Raises InvalidMetadataError for any other text."""
    position = _decode(cursor)
    # Base64 has several texts for some bytes; only the one that was given out is a cursor.
    if position is None or encode(position) != cursor:
        raise InvalidMetadataError("the cursor was not made by this feed; start again without a cursor")
    return position


def _decode(cursor: str) -> FeedPosition | None:
    if len(cursor) > _MAX_TEXT or not cursor.startswith(_PREFIX) or not cursor.isascii():
        return None
    text = cursor.removeprefix(_PREFIX)
    try:
        place = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    match = _PLACE.fullmatch(place)
    if match is None:
        return None
    position = FeedPosition(int(match[1]), match[3], int(match[2]))
    within = position.transaction <= _MAX_TRANSACTION and position.revision <= _MAX_REVISION
    return position if within else None


def check_reachable(position: FeedPosition, horizon: int) -> None:
    """Refuse a position at or after the first transaction that no reader has been shown yet: nobody was ever there.

    It comes from another database, or from this one before an older copy of it was restored.
    """
    if position.transaction >= horizon:
        raise InvalidMetadataError(
            "the cursor lies ahead of this feed, as after the restore of an older copy; start again without a cursor"
        )


def check_limit(limit: int) -> None:
    """Refuse a page of no decisions. Raises InvalidMetadataError."""
    if limit < 1:
        raise InvalidMetadataError("a page of the feed has at least one decision; ask for 1 or more")

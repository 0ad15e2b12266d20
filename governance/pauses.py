"""What may be paused, and how a pause looks to people. Pure: rows and caches are elsewhere.

A stage is paused for the whole installation, a tenant at its doors only: what it sent before goes on.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from contracts.topology import STAGES

DOORS: Final = "doors"
"""The place at which a tenant is paused."""

PLACES: Final = (DOORS, *map(str, STAGES))
BREAKER: Final = "park breaker"
"""Who made a pause that nobody asked for."""


class StandingPause(BaseModel):
    """A pause that holds now. `tenant` is null for a stage; `until` is null unless it ends by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tenant: str | None
    place: str
    reason: str
    set_by: str
    set_at: str
    until: str | None

"""The short profile of `make chaos`: every kind of fault, a load in bursts, and the same checker."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import need_binaries
from tests.faults.chaos import Options, run, table
from tests.faults.nemesis import Kind
from tests.integration.fleet_fixture import show

MINUTES = float(os.environ.get("CHAOS_MINUTES", "0.75"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
RATE = float(os.environ.get("CHAOS_RATE", "20"))


@pytest.mark.integration
def test_every_promise_holds_under_every_kind_of_fault() -> None:
    """Two minutes in all: start, faults, settling and every question that an outsider can ask."""
    need_binaries()
    directory = Path(tempfile.mkdtemp(prefix="riskfleet-chaos-"))
    report = run(Options(minutes=MINUTES, seed=SEED, rate=RATE), directory, show)
    show(table(report))
    assert [rule for rule in report.verdict.rules if not rule.holds] == []
    # How much happens in so short a time is the machine's to say; `make chaos` is void below its floors.
    for rule in report.verdict.bites:
        if not rule.holds:
            show(f"below its floor: {rule}")
    assert report.defects == []
    assert {kind for kind in Kind if report.deeds.done[kind] == 0} == set()
    shutil.rmtree(directory, ignore_errors=True)

"""One `riskfleet bench` in a process of its own, as a person would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.fleet_fixture import show

ROOT = Path(__file__).resolve().parents[2]


def run_bench(*arguments: str, within_s: float = 600) -> dict[str, Any]:
    """The JSON of a run that found every event decided once; fails with what the run said otherwise."""
    argv = [sys.executable, "-m", "deploy.cli", "bench", "--json", *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=within_s, check=False)
    assert done.returncode == 0, (
        f"{' '.join(arguments)}: exit {done.returncode}: {done.stdout[:600]} {done.stderr[-2000:]}"
    )
    found: dict[str, Any] = json.loads(done.stdout)
    names = ("events", "decided", "lost", "double", "events_per_s", "cpu_s_per_1000", "p50_ms", "p99_ms", "max_ms")
    show(*arguments, {name: found[name] for name in names})
    return found

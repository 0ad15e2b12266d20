"""A benchmark says the truth of a small backlog: every event decided once, and every figure that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from contracts.topology import STAGES
from deploy.bench.plan import BenchPlan, bench_events, stage_counts
from deploy.bench.run import percentiles
from deploy.cli import app
from deploy.settings import SettingsError
from tests.conftest import need_binaries
from tests.load.bench_run import run_bench


@pytest.mark.integration
def test_a_small_backlog_is_drained_without_a_loss_or_a_second_decision(tmp_path: Path) -> None:
    need_binaries()
    page = tmp_path / "bench.html"
    found = run_bench("--drain", "--events", "200", "--tenants", "2", "--html", str(page))
    assert (found["events"], found["decided"], found["lost"], found["double"]) == (200, 200, 0, 0)
    assert found["audit_intact"]
    assert found["missing_records"] == 0
    assert min(found[name] for name in ("events_per_s", "cpu_s_per_1000", "p50_ms", "p95_ms", "p99_ms", "max_ms")) > 0
    assert {*STAGES, "gateway", "sink-audit", "rabbitmq", "redis", "postgresql"} <= set(found["cpu_s_per_1000_by_kind"])
    text = page.read_text()
    assert "decided once" in text
    assert "http" not in text.split("<h2>Settings</h2>")[0]  # nothing is loaded from elsewhere


def test_the_same_seed_sends_the_same_events_and_skew_favours_the_first_tenant() -> None:
    plan = BenchPlan(events=2_000, rate=None, tenants=10, skew=1.0, payload=450, seed=7)
    events = list(bench_events(plan))
    assert events == list(bench_events(plan))
    counts = [sum(tenant == number for tenant, _ in events) for number in range(10)]
    assert counts[0] > 3 * counts[9] > 0
    assert sum(len(value) for value in events[0][1]["attributes"].values()) == 450


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 51.0, "p95": 96.0, "p99": 100.0, "max": 100.0}
    assert percentiles([]) == {}


@pytest.mark.parametrize("text", ["", "0", "17", "scoring", "scoring=x", "cooking=2", "scoring=0"])
def test_a_stage_count_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--stages"):
        stage_counts(text)


def test_stage_counts_name_stages_or_all() -> None:
    assert stage_counts("3") == dict.fromkeys(STAGES, 3)
    assert stage_counts("scoring=2") == dict.fromkeys(STAGES, 1) | {"scoring": 2}


@pytest.mark.parametrize(
    "arguments", [[], ["--drain", "--rate", "5"], ["--url", "http://127.0.0.1:1", "--drain"]], ids=str
)
def test_a_benchmark_that_contradicts_itself_starts_nothing(arguments: list[str]) -> None:
    assert isinstance(CliRunner().invoke(app, ["bench", *arguments]).exception, SettingsError)

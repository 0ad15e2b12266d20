"""The documentation says what the code does: its tables, vectors and commands are compared with it."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest
import typer

from contracts.failures import FAILURES, Category
from contracts.lifecycle import TRANSITIONS
from contracts.telemetry import AUTOSCALER_METRICS, METRICS
from contracts.tenancy import TenantScope
from deploy.cli import app
from deploy.local import roles
from deploy.settings import example

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))

_OPS = "docs/operations.md"
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?<![\w./:-])(?:\.venv/bin/)?riskfleet ([a-z]+)(?: ([a-z][a-z-]*))?")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head; backticks are left out."""
    below = text_of(page).split(f"\n{heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(below) if line.startswith("|"))
    lines = list(takewhile(lambda line: line.startswith("|"), below[start:]))[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def commands_of(application: typer.Typer) -> dict[str, set[str]]:
    """Every command with its subcommands; empty for one that is no group."""
    named = {c.name or getattr(c.callback, "__name__", ""): set[str]() for c in application.registered_commands}
    for group in application.registered_groups:
        assert group.name is not None
        assert group.typer_instance is not None
        named[str(group.name)] = set(commands_of(group.typer_instance))
    return named


def unknown_commands(text: str) -> list[str]:
    """The `riskfleet` commands in the code of a page that the command line does not have."""
    known = commands_of(app)
    found = [match for code in _CODE.findall(text) for match in _COMMAND.findall(code)]
    return [
        f"{command} {word}".strip()
        for command, word in found
        if command not in known or (known[command] and word not in known[command])
    ]


def test_the_example_of_the_environment_is_the_one_that_the_code_prints() -> None:
    assert text_of(".env.example") == example()


def test_the_lifecycle_in_the_documentation_is_the_one_that_the_code_obeys() -> None:
    rows = {source: set(targets.split(", ")) for source, targets in table_of("docs/architecture.md", "## Lifecycle")}
    assert rows == {str(s): {str(t) for t in targets} or {"nothing"} for s, targets in TRANSITIONS.items()}


def test_the_published_vectors_of_slots_and_partitions_hold() -> None:
    rows = table_of("docs/architecture.md", "## Slots and partitions")
    assert len(rows) >= 6
    for tenant, *numbers in rows:
        scope = TenantScope(tenant)
        assert [int(n) for n in numbers] == [scope.slot, scope.partition(4), scope.partition(8)], tenant


def test_every_problem_has_a_row_in_the_runbook_that_says_what_the_code_does() -> None:
    rows = table_of("docs/operations.md", "## Problems")
    wanted = {
        row.problem: [str(row.status), str(row.category), str(row.severity), str(row.disposition)]
        for row in FAILURES.values()
    }
    assert {problem: columns[:4] for problem, *columns in rows} == wanted
    assert all(columns[4] for _, *columns in rows)


def test_every_category_of_dead_letters_has_a_row_in_the_runbook() -> None:
    assert [row[0] for row in table_of("docs/operations.md", "## Dead letters")] == [str(c) for c in Category]


def test_every_metric_has_a_row_in_the_runbook_with_its_type_labels_and_meaning() -> None:
    rows = {name: cells for name, *cells in table_of(_OPS, "## Metrics")}
    wanted = {m.name: [str(m.type), ", ".join(m.labels) or "none"] for m in (*METRICS.values(), *AUTOSCALER_METRICS)}
    assert {name: cells[:2] for name, cells in rows.items()} == wanted
    assert all(cells[2] for cells in rows.values())


def test_the_ports_in_the_runbook_are_those_of_a_local_fleet() -> None:
    ports = {spec.name: int(spec.argv[-1]) for spec in roles(9100)}
    stated = {
        role: [int(n) for n in re.findall(r"\d+", port)] for role, _, port in table_of(_OPS, "## Roles and ports")
    }
    assert stated["AMQP door"] == [ports["ingress"]]
    assert stated["stages"] == [ports["retrieval"], ports["decision"]]
    assert stated["sinks"] == [ports["sink-parking"], ports["sink-metrics"]]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_documentation_exists(page: str) -> None:
    assert unknown_commands(text_of(page)) == []


def test_the_check_of_commands_can_fail() -> None:
    assert unknown_commands("`riskfleet dance` and\n```sh\nriskfleet topology dance\n```\n") == [
        "dance",
        "topology dance",
    ]
    assert unknown_commands("`riskfleet topology`") == ["topology"]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    broken = [link for link in _LINK.findall(text_of(page)) if not ((ROOT / page).parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_documentation_names_exist(page: str) -> None:
    named = re.findall(
        r"`((?:contracts|gateway|workers|governance|resilience|deploy|tests|docs)/[\w./-]+)`", text_of(page)
    )
    assert [name for name in named if not (ROOT / name).exists()] == []

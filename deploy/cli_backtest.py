"""`riskfleet backtest`: what a version that is not registered yet would have decided, beside what was decided.

For whoever writes a rule or trains a model and wants to know which decisions flip before asking anybody to approve it.
Reads PostgreSQL, sends and writes nothing, and may run beside the fleet.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer
from rich.progress import Progress

from contracts.events import canonical_json
from contracts.failures import MalformedBodyError
from contracts.ports import Artifact
from contracts.state import Pin
from contracts.tenancy import TenantScope
from deploy import local, settings
from deploy.cli_redecide import AsJson, Last, Since, Tenant, pages
from deploy.printing import console, errors, print_fields, print_json, print_table
from deploy.runtime import SystemClock
from deploy.settings import SettingsError

if TYPE_CHECKING:
    from workers.backtest import BacktestReport, Compared

_SHOWN: Final = 20

Candidate = Annotated[
    list[Path],
    typer.Option(
        exists=True, dir_okay=False, help="A version as JSON, as for 'registry register'; several of several kinds."
    ),
]


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(backtest)


def backtest(
    tenant: Tenant, candidate: Candidate, last: Last = 1_000, since: Since = None, as_json: AsJson = False
) -> None:
    """Decide again with candidates in the place of what decided: which outcomes flip, by rule and by segment."""
    candidates = [read_candidate(path) for path in candidate]
    kinds = [artifact.kind for artifact in candidates]
    if len(set(kinds)) != len(kinds):
        raise SettingsError("name one candidate of a kind: two would decide at one place")
    compared, report = asyncio.run(_backtest(tenant, candidates, last, since, quiet=as_json))
    flipped = [one for one in compared if one.flips and not one.problem]
    if as_json:
        document = asdict(report) | {"outcomes": [[*pair, count] for pair, count in sorted(report.outcomes.items())]}
        shown = [
            asdict(one) | {name: sorted(getattr(one, name)) for name in ("rules_then", "rules_now")} for one in flipped
        ]
        print_json({"tenant": tenant, **document, "flipped": shown})
        return
    _print(tenant, report, flipped)


def read_candidate(path: Path) -> Artifact:
    """The candidate of a file. Raises MalformedBodyError for what is no version, SettingsError for a kind that decides
    nothing, and InvalidModelStateError for content that could not be submitted.
    """
    from deploy.control import validators
    from workers.backtest import KINDS

    try:
        draft = orjson.loads(path.read_bytes())
        kind, name, content = str(draft["kind"]), str(draft["name"]), dict(draft["content"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise MalformedBodyError(
            f"{path} is no version: it needs kind, name and content, as for 'registry register'"
        ) from None
    if kind not in KINDS:
        raise SettingsError(f"{path}: a {kind} decides nothing that was decided; one of {', '.join(KINDS)}")
    wrong = validators()[kind](content)
    if wrong:
        raise MalformedBodyError(f"{path} could not be submitted: {'; '.join(why for _, why in wrong[:5])}")
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    now = datetime.now(UTC).isoformat()
    return Artifact(kind, Pin(name=name, version=0, digest=digest), content, approved_at=now)


async def _backtest(
    tenant: str, candidates: Sequence[Artifact], last: int, since: datetime | None, *, quiet: bool
) -> tuple[list[Compared], BacktestReport]:
    from deploy import keys
    from governance.postgres import engine as pg
    from governance.postgres.decided import frauds_of
    from governance.postgres.directory import tenant_ids
    from governance.postgres.ledger import PostgresLedger
    from governance.postgres.registry import PostgresRegistry
    from workers.backtest import backtest as again
    from workers.backtest import summed

    loaded, scope = local.found_settings(), TenantScope(tenant)
    engine = pg.create_engine(loaded.need("database_url"), application_name="riskfleet-backtest")
    try:
        if scope not in await tenant_ids(engine):
            raise settings.SettingsError(f"there is no tenant {tenant}; see riskfleet tenants")
        registry = PostgresRegistry(engine, SystemClock(), keys.artifact_verifier(loaded))
        ledger, found, truth = PostgresLedger(engine), list[Any](), dict[str, bool]()
        with Progress(console=errors, disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
            bar = progress.add_task("decided again", total=last)
            async for page, _ in pages(engine, scope, [], last, since):
                found += await again(page, candidates, registry, ledger)
                truth |= await frauds_of(engine, scope, [event_id for event_id, _ in page])
                progress.advance(bar, len(page))
        return found, summed(found, truth)
    finally:
        await pg.dispose(engine)


def _print(tenant: str, report: BacktestReport, flipped: Sequence[Compared]) -> None:
    if not report.events + report.problems:
        console.print(f"{tenant} has no decision there")
        return
    rows = [
        {"then": then, "with the candidate": now, "events": n} for (then, now), n in sorted(report.outcomes.items())
    ]
    print_table(rows, ("then", "with the candidate", "events"))
    rules = [{"rule": name, "then": then, "now": now} for name, (then, now) in report.rules.items() if then != now]
    if rules:
        print_table(rules, ("rule", "then", "now"))
    segments = [{"segment": name, "events": n, "flips": flips} for name, (n, flips) in report.segments.items() if flips]
    if segments:
        print_table(segments, ("segment", "events", "flips"))
    for one in flipped[:_SHOWN]:
        console.print(f"{one.event_id}: {one.outcome_then} then, {one.outcome_now} now", highlight=False)
    if len(flipped) > _SHOWN:
        console.print(f"and {len(flipped) - _SHOWN:,} more that flip: --json shows all", style="dim")
    print_fields(
        {
            "decided again": f"{report.events:,}" + (f" ({report.problems:,} could not be)" if report.problems else ""),
            "flips": f"{report.flips:,}",
            "score": "the same"
            if not report.largest_shift
            else f"mean {report.mean_shift:+}, at most {report.largest_shift:+}",
            "labelled": f"{report.labelled:,}",
            "precision": f"{_share(report.before.precision)} then, {_share(report.after.precision)} now",
            "recall": f"{_share(report.before.recall)} then, {_share(report.after.recall)} now",
        }
    )


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.3f}"

"""The one-minute way to try the engine: `riskfleet up --embedded` and `riskfleet decide FILE`.

Both run the embedded fleet of `deploy.embedded`: real rooms, twins instead of servers, nothing kept.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from contracts.failures import RiskfleetError, classify
from contracts.ports import DecisionRow
from deploy.embedded import BANNER, embedded
from deploy.processes import port_is_free
from deploy.settings import Settings, SettingsError
from deploy.stopping import end_at_once, stop_signal, until_told
from deploy.submit import read_events
from gateway.health import serve
from gateway.intake import Refusal

_SAMPLE = {
    "id": "sample-1",
    "kind": "risk",
    "type": "payment.card",
    "occurred_at": "2026-01-31T12:00:00Z",
    "subject": {"type": "customer", "id": "c-1001"},
    "amount": {"value": "129.90", "currency": "EUR"},
}


@dataclass(frozen=True, slots=True)
class Tried:
    """One event of a file and its answer: a decision document, or a problem."""

    index: int
    event: Any
    decision: dict[str, Any] | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"index": self.index, "decision": self.decision, "problem": self.problem}


def decide_file(settings: Settings, file: Path, columns: Sequence[str], console: Console | None) -> list[Tried]:
    """Decide every event of a file (JSON, NDJSON, CSV with a map); `console` shows progress.

    Raises DomainValidationError when the file cannot be read as events.
    """
    events = read_events(file, columns)

    async def run() -> list[DecisionRow | Refusal]:
        with contextlib.ExitStack() as stack:
            tick = stack.enter_context(Progress(console=console, transient=True)) if console else None
            task = tick.add_task("deciding", total=len(events)) if tick else None

            def decided(count: int) -> None:
                if tick is not None and task is not None:
                    tick.update(task, completed=count)

            async with embedded(settings) as fleet:
                return await fleet.decide(events, decided)

    return [_tried(i, event, answer) for i, (event, answer) in enumerate(zip(events, uvloop.run(run()), strict=True))]


def _tried(index: int, event: bytes | RiskfleetError, answer: DecisionRow | Refusal) -> Tried:
    sent: Any = {}
    if isinstance(event, bytes):
        with contextlib.suppress(orjson.JSONDecodeError):
            sent = orjson.loads(event)
    if isinstance(answer, DecisionRow):
        return Tried(index, sent, orjson.loads(answer.decision), None)
    places = "; ".join(f"{pointer} {reason}" for pointer, reason in answer.error.pointers)
    detail = f"{classify(answer.error).problem}: {answer.error.detail}"
    return Tried(index, sent, None, f"{detail} ({places})" if places else detail)


def decisions_table(tried: Sequence[Tried], seconds: float, limit: int = 50) -> Table:
    """The first `limit` decisions, and how many of each outcome there are in all."""
    counts = Counter(item.decision["outcome"] if item.decision else "refused" for item in tried)
    said = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
    table = Table(title=f"{len(tried):,} events in {seconds:.1f} s: {said}", caption=BANNER)
    for name in ("event", "type", "amount", "outcome", "score", "why"):
        right = name in ("amount", "score")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name == "outcome")
    for item in tried[:limit]:
        event = item.event if isinstance(item.event, dict) else {}
        given = event.get("amount")
        amount = given if isinstance(given, dict) else {}
        table.add_row(
            str(event.get("id") or f"#{item.index + 1}"),
            str(event.get("type", "")),
            f"{amount.get('value', '')} {amount.get('currency', '')}".strip(),
            *(_verdict(item)),
        )
    if len(tried) > limit:
        table.add_row(f"… {len(tried) - limit:,} more: --json shows all", "", "", "", "", "")
    return table


def _verdict(item: Tried) -> tuple[str, str, str]:
    if item.decision is None:
        return "[red]refused[/]", "", item.problem or ""
    colour = {"APPROVED": "green", "REJECTED": "red"}.get(item.decision["outcome"], "yellow")
    score = item.decision.get("score")
    reasons = item.decision["reasons"][:2] + [r for r in item.decision["reasons"][2:] if not r["weight"]][:1]
    return (
        f"[{colour}]{item.decision['outcome']}[/]",
        "" if score is None else f"{score:.1f}",
        "; ".join(reason["text"] for reason in reasons),
    )


def up_embedded(settings: Settings, console: Console) -> int:
    """Serve the embedded fleet until Ctrl-C; decides one sample event at once. Returns the exit code."""
    if settings.http_port and not port_is_free(settings.http_port):
        raise SettingsError(f"port {settings.http_port} is taken; set RISKFLEET_HTTP_PORT to a free one")
    began = time.monotonic()

    async def run() -> None:
        async with embedded(settings) as fleet:
            stop = stop_signal()
            (answer,) = await fleet.decide([orjson.dumps(_SAMPLE)])
            outcome = answer.outcome if isinstance(answer, DecisionRow) else answer.error.detail
            console.print(f"[bold yellow]{BANNER}[/]", highlight=False)
            console.print(f"first decision after {time.monotonic() - began:.1f} s: {outcome}", highlight=False)

            def bound(port: int) -> None:
                url = f"http://{settings.http_host}:{port}"
                console.print(f"gateway   {url}   documents {url}/docs   metrics {url}/metrics", highlight=False)
                console.print(f"API key   {fleet.api_key}", highlight=False)
                console.print(f"try       {_curl(url, fleet.api_key)}", highlight=False, soft_wrap=True)
                console.print("Ctrl-C ends it", highlight=False)

            await serve(fleet.app, settings.http_host, settings.http_port, stop=stop, on_bound=bound)

    end_at_once()
    uvloop.run(until_told(run()))
    return 0


def _curl(url: str, key: str) -> str:
    body = orjson.dumps(_SAMPLE | {"id": "mine-1"}).decode()
    return (
        f"curl -s {url}/v1/events -H 'Authorization: Bearer {key}' -H 'Prefer: wait=5' "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )

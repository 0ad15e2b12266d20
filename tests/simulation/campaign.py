"""Many runs: over both cores, with progress, a sum of what was seen, and every failure made small.

`python -m tests.simulation.campaign --help`. A campaign is one of the exhaustive lists or a range of seeds; ranges can
be run apart and at other times, since a seed is a whole run.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

import orjson
import structlog

from tests.simulation.fleet import ALL_PLACES
from tests.simulation.plans import Plan, number_of_pairs, pair_plans, random_plan, single_plans
from tests.simulation.run import Result, run

EVIDENCE: Final = Path("docs/evidence/simulation.json")
FLOORS: Final = {
    "redelivered": 500,
    "duplicates_suppressed_total": 300,
    "suspects_total": 10,
    "lock_waits_total": 200,
    "stale_writes_refused_total": 10,
    "fault kill": 500,
    "fault stop": 250,
    "fault lose-confirms": 60,
    "fault flush": 20,
    "orphans": 5,
}
"""Per 1,000 random seeds: below these a campaign has shown nothing, and fails."""
_CHUNK: Final = 50


@dataclass
class Tally:
    """The sum of some runs."""

    runs: int = 0
    struck: int = 0
    events: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[Plan, list[str]]] = field(default_factory=list)
    virtual_s: float = 0.0

    def add(self, result: Result) -> None:
        """One more run."""
        self.runs += 1
        self.struck += result.struck
        self.events += len(result.plan.sent)
        self.seen.update(result.seen)
        self.hits.update(result.hits)
        self.virtual_s += result.virtual_s
        if result.violations:
            self.failed.append((result.plan, result.violations))

    def merge(self, other: Tally) -> None:
        """The runs of another process."""
        self.runs += other.runs
        self.struck += other.struck
        self.events += other.events
        self.seen.update(other.seen)
        self.hits.update(other.hits)
        self.virtual_s += other.virtual_s
        self.failed += other.failed


def say(line: object) -> None:
    """A line to people."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def quiet() -> None:
    """No log lines, no words about coroutines of processes that were killed."""
    warnings.simplefilter("ignore", RuntimeWarning)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.unraisablehook = lambda _: None


def tally(plans: Iterable[Plan]) -> Tally:
    """Run them here, one after another."""
    total = Tally()
    for plan in plans:
        total.add(run(plan))
    return total


def _chunk(work: tuple[str, int, int]) -> Tally:
    quiet()
    what, start, stop = work
    return tally(plans_of(what, start, stop))


def plans_of(what: str, start: int, stop: int) -> Iterator[Plan]:
    """Some plans of a list (`singles`, `pairs`), or those of some seeds."""
    match what:
        case "singles":
            return islice(single_plans(), start, stop)
        case "pairs":
            return islice(pair_plans(), start, stop)
    return (random_plan(seed) for seed in range(start, stop))


def campaign(what: str, start: int, stop: int, jobs: int) -> Tally:
    """Run a range over `jobs` processes; stops early after twenty failures."""
    work = [(what, at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
    total, began, spoke = Tally(), time.monotonic(), 0.0
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for part in pool.imap_unordered(_chunk, work):
            total.merge(part)
            if time.monotonic() - spoke > 10:
                spoke = time.monotonic()
                rate = total.runs / (spoke - began)
                left = (stop - start - total.runs) / rate if rate else 0.0
                say(f"{what}: {total.runs:,} of {stop - start:,}, {len(total.failed)} failed, {left / 60:.0f} min left")
            if len(total.failed) >= 20:
                pool.terminate()
                break
    return total


def shrink(plan: Plan) -> Plan:
    """The smallest plan by leaving things out one by one that still breaks a promise."""
    smaller = True
    while smaller:
        smaller = False
        for name in ("faults", "strikes", "sent"):
            for place in range(len(getattr(plan, name))):
                parts = getattr(plan, name)
                tried = replace(plan, **{name: parts[:place] + parts[place + 1 :]})
                if tried.sent and run(tried).violations:
                    plan, smaller = tried, True
                    break
    return plan


def told(plan: Plan, broken: Sequence[str]) -> str:
    """A failure, with the way to see it again."""
    again = f"  again: python -m tests.simulation.campaign --seed {plan.seed}"
    lines = [f"seed {plan.seed}: {'; '.join(broken[:3])}", again]
    lines += [f"  {part}" for part in (*plan.strikes, *plan.faults)]
    return "\n".join(lines + [f"  {one.door} {one.identity} at {one.at:.2f} s" for one in plan.sent])


def below_floors(total: Tally) -> list[str]:
    """What a random campaign of this size should have met more often."""
    return [
        f"{name}: {total.seen[name]} of at least {floor * total.runs // 1000}"
        for name, floor in FLOORS.items()
        if total.seen[name] < floor * total.runs // 1000
    ]


def report(name: str, total: Tally, seconds: float) -> str:
    """A table for people."""
    seen = total.seen
    rows = [
        ("runs", total.runs), ("virtual hours", round(total.virtual_s / 3600, 1)), ("submissions", total.events),
        ("accepted", seen["accepted"]), ("decided", seen["decided"]), ("dead letters", seen["letters"]),
        ("strikes at named places", total.struck), ("kills", seen["fault kill"]), ("pauses", seen["fault stop"]),
        ("redelivered", seen["redelivered"]), ("suppressed duplicates", seen["duplicates_suppressed_total"]),
        ("refused stale writes", seen["stale_writes_refused_total"]), ("suspects", seen["suspects_total"]),
        ("lost confirms", seen["fault lose-confirms"]), ("orphaned records", seen["orphans"]),
        ("broken promises", len(total.failed)), ("seconds", round(seconds)),
    ]  # fmt: skip
    return "\n".join([f"{name}", *(f"  {label:<26} {value:>12,}" for label, value in rows)])


def evidence_of(name: str, total: Tally, start: int, stop: int, seconds: float) -> dict[str, object]:
    """A part of the evidence file."""
    return {
        "campaign": name,
        "from": start,
        "to": stop,
        "runs": total.runs,
        "failed": len(total.failed),
        "seconds": round(seconds, 1),
        "virtual_hours": round(total.virtual_s / 3600, 2),
        "strikes": total.struck,
        "seen": dict(sorted(total.seen.items())),
        "least_hit_place": min(total.hits.values(), default=0),
        "places_hit": len(total.hits),
        "places": len(ALL_PLACES),
    }


def write(parts: Sequence[dict[str, object]]) -> None:
    """Put parts into the evidence file, in place of those of the same campaign and range."""
    known = orjson.loads(EVIDENCE.read_bytes())["parts"] if EVIDENCE.exists() else []
    mine = {(part["campaign"], part["from"], part["to"]) for part in parts}
    kept = [part for part in known if (part["campaign"], part["from"], part["to"]) not in mine]
    document = {
        "command": "python -m tests.simulation.campaign --only CAMPAIGN --from FROM --to TO; all of it: make simulate",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "at": time.strftime("%Y-%m-%d"),
        "parts": [*kept, *parts],
    }
    EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
    EVIDENCE.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Simulate the fleet under faults, by seeds and by exhaustive lists.")
    parser.add_argument("--seed", type=int, help="run one seed, shrink it if it fails, and say what was seen")
    parser.add_argument("--from", dest="start", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--to", dest="stop", type=int, default=100_000, help="seed to stop before (default 100,000)")
    parser.add_argument("--only", choices=("singles", "pairs", "seeds"), help="one of the three campaigns")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("--no-evidence", action="store_true", help=f"leave {EVIDENCE} as it is")
    chosen = parser.parse_args(arguments)
    quiet()
    if chosen.seed is not None:
        result = run(random_plan(chosen.seed))
        say(told(shrink(result.plan), result.violations) if result.violations else f"seed {chosen.seed} holds")
        say(f"{dict(result.seen)} trace {result.trace:x}")
        return 1 if result.violations else 0
    every = len(list(single_plans()))
    ranges = {"singles": (0, every), "pairs": (0, number_of_pairs()), "seeds": (chosen.start, chosen.stop)}
    say(f"{len(ALL_PLACES)} failpoints, {every:,} single plans, {number_of_pairs():,} pairs; seeds {ranges['seeds']}")
    broken, parts = False, []
    for name, (start, stop) in ranges.items():
        if chosen.only not in (None, name):
            continue
        began = time.monotonic()
        total = campaign(name, start, stop, chosen.jobs)
        seconds = time.monotonic() - began
        say(report(name, total, seconds))
        for plan, violated in total.failed[:5]:
            say(told(shrink(plan) if name == "seeds" else plan, violated))
        vacuous = below_floors(total) if name == "seeds" else []
        say("\n".join(f"void: {line}" for line in vacuous) or "  met its floors")
        broken = broken or bool(total.failed or vacuous)
        parts.append(evidence_of(name, total, start, stop, seconds))
    if not chosen.no_evidence:
        write(parts)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

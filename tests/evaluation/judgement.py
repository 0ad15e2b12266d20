"""Figures of the guardrails and of screening on public data: `python -m tests.evaluation.judgement [--shared DIR]`.

Prints JSON. What has no data is named under `not_run` and never counted as good. Times are CPU time of this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import string
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from workers.judgement.injection import DEFAULT_LIMIT, look_for_injection
from workers.judgement.personal import find_personal
from workers.judgement.screening import fold, index_names, read_names, screen

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SEED = 20181
TYPOS = 5_000
KINDS = {"CREDIT_CARD": "card", "EMAIL_ADDRESS": "email", "IBAN_CODE": "iban", "PHONE_NUMBER": "phone"}
BASELINE = re.compile(
    r"(?i)\b(ignore|disregard|forget)\s+(all\s+|any\s+|the\s+)*(previous|prior|above)\s+(instructions|rules|prompts)\b"
)


def personal(sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall by kind, and hits that overlap nothing of their kind per 1,000 sentences."""
    there: Counter[str] = Counter()
    found: Counter[str] = Counter()
    false, began = 0, time.process_time()
    for each in sentences:
        hits = [hit for hit in find_personal(each["full_text"]) if hit.kind != "national_id"]
        wanted = [
            (KINDS[span["entity_type"]], span["start_position"], span["end_position"])
            for span in each["spans"]
            if span["entity_type"] in KINDS
        ]
        for kind, start, end in wanted:
            there[kind] += 1
            found[kind] += any(hit.kind == kind and hit.start < end and hit.end > start for hit in hits)
        false += sum(
            not any(hit.kind == kind and hit.start < end and hit.end > start for kind, start, end in wanted)
            for hit in hits
        )
    return {
        "sentences": len(sentences),
        "recall": {kind: round(found[kind] / there[kind], 4) for kind in sorted(there)},
        "false_hits_per_1000": round(false * 1000 / len(sentences), 2),
        "us_per_sentence": round((time.process_time() - began) * 1e6 / len(sentences), 1),
    }


def injection(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall and false positives of the signals, and of one plain expression."""
    bad, good = ([row["text"] for row in rows if row["label"] == label] for label in ("malicious", "benign"))
    tests = {
        "signals": lambda text: look_for_injection(text).strength >= DEFAULT_LIMIT,
        "plain_regex": lambda text: BASELINE.search(text) is not None,
    }
    return {"malicious": len(bad), "benign": len(good)} | {
        name: {"recall": round(sum(map(test, bad)) / len(bad), 4), "false_positives": sum(map(test, good))}
        for name, test in tests.items()
    }


def screening(names: Path, aliases: Path, people: list[str]) -> dict[str, Any]:
    """Top-1 after one random edit of a listed name, and hits on ordinary names (and on pairs made of their words)."""
    listed, rng = index_names(read_names(names, aliases)), random.Random(SEED)
    chosen = rng.sample(range(len(listed.names)), TYPOS)
    asked = [(listed.names[place], typo(listed.names[place].name, rng)) for place in chosen]
    began = time.process_time()
    hits = [screen(listed, written) for _, written in asked]
    spent = time.process_time() - began
    right = sum(
        hit is not None and (hit.listed.number == wanted.number or fold(hit.listed.name) == fold(wanted.name))
        for (wanted, _), hit in zip(asked, hits, strict=True)
    )
    first, last = (sorted({name.split()[end] for name in people}) for end in (0, -1))
    ordinary = people + [f"{rng.choice(first)} {rng.choice(last)}" for _ in range(TYPOS)]
    return {
        "listed": len(listed.names),
        "typos": TYPOS,
        "top1": round(right / TYPOS, 4),
        "us_per_name": round(spent * 1e6 / TYPOS, 1),
        "ordinary": len(ordinary),
        "false_positives": round(sum(screen(listed, name) is not None for name in ordinary) / len(ordinary), 5),
    }


def typo(name: str, rng: random.Random) -> str:
    """One letter left out, put in, replaced or swapped with the next; the name comes out changed."""
    while True:
        at, letter = rng.randrange(len(name)), rng.choice(string.ascii_uppercase)
        changed = rng.choice(
            (
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :],
            )
        )
        if changed != name and changed.strip():
            return changed


def corpus() -> Path | None:
    """The file of the package `bastioncorpus`, when it is installed."""
    spec = importlib.util.find_spec("bastioncorpus")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((path for place in places if (path := Path(place) / "corpus" / "injections.jsonl").exists()), None)


def figures(shared: Path) -> dict[str, Any]:
    """Everything that there is data for."""
    done: dict[str, Any] = {"seed": SEED}
    missing: dict[str, str] = {}
    sentences = shared / "pii" / "sentences.json"
    rows = json.loads(sentences.read_text()) if sentences.exists() else []
    if rows:
        done["personal"] = personal(rows)
    else:
        missing["personal"] = f"no {sentences}"
    if (path := corpus()) is not None:
        done["injection"] = injection([json.loads(line) for line in path.read_text().splitlines()])
    else:
        missing["injection"] = "install bastioncorpus"
    ofac = shared / "ofac-2019"
    spans = [span["entity_value"] for row in rows for span in row["spans"] if span["entity_type"] == "PERSON"]
    people = sorted({name for name in spans if len(name.split()) > 1})
    if people and (ofac / "sdn.csv").exists():
        done["screening"] = screening(ofac / "sdn.csv", ofac / "alt.csv", people)
    else:
        missing["screening"] = f"no {ofac}"
    return done | ({"not_run": missing} if missing else {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with pii/ and ofac-2019/")
    sys.stdout.write(json.dumps(figures(parser.parse_args().shared), indent=1) + "\n")

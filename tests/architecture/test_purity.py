"""Pure rooms stay pure: no clock, no chance, no environment, no log where a decision is made."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE_ROOMS = ("contracts", "workers/stages", "workers/judgement")
FORBIDDEN_MODULES = {"random", "secrets", "logging", "structlog"}
FORBIDDEN_NAMES = {
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "time.time",
    "time.time_ns",
    "time.monotonic",
    "time.perf_counter",
    "time.sleep",
    "uuid.uuid1",
    "uuid.uuid4",
    "uuid4",
    "os.environ",
    "os.getenv",
    "os.urandom",
}


def impurities(source: str) -> list[str]:
    """What a module imports or names that a pure room must not, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(f"{node.lineno}: from {node.module}")
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found += [f"{node.lineno}: from … import {name}" for name in names if name in FORBIDDEN_NAMES]
        elif isinstance(node, ast.Attribute):
            tail = ".".join(ast.unparse(node).split(".")[-2:])
            if tail in FORBIDDEN_NAMES:
                found.append(f"{node.lineno}: {tail}")
    return found


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_pure_rooms_read_no_clock_chance_environment_or_log(room: str) -> None:
    modules = sorted((ROOT / room).rglob("*.py"))
    assert modules
    assert {str(path.relative_to(ROOT)): hits for path in modules if (hits := impurities(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import choice",
        "import structlog",
        "from os import environ",
        "from uuid import uuid4",
        "import datetime as d\nd.datetime.now()",
        "from datetime import datetime\nnow = datetime.now",
        "import time\ntime.time()",
        "import os\nos.environ['X']",
    ],
)
def test_the_purity_check_can_fail(source: str) -> None:
    assert impurities(source)

"""`python -m deploy.documents [--check]`: write the documents that are generated from the code, or compare them.

Each is a function of the code alone, so two runs write the same bytes. `docs/schema.sql` is not among them: it needs a
database (`deploy.migrations.dump`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from gateway.asyncapi import asyncapi
from gateway.control.app import openapi_document as operator_document
from gateway.documents import API_VERSION, document_bytes, problems_markdown
from gateway.http import openapi_document

DOCUMENTS: Final[Mapping[str, Callable[[], bytes]]] = {
    "docs/openapi.json": openapi_document,
    "docs/openapi-ops.json": operator_document,
    "docs/asyncapi.json": lambda: document_bytes(asyncapi(API_VERSION)),
    "docs/problems.md": problems_markdown,
}
"""Each document and what makes its bytes; one line adds another."""

ROOT: Final = Path(__file__).resolve().parents[1]


def drifted(root: Path = ROOT) -> list[str]:
    """The documents that are missing below `root`, or differ from the code."""
    return [
        name for name, made in DOCUMENTS.items() if not (root / name).is_file() or (root / name).read_bytes() != made()
    ]


def write(root: Path = ROOT) -> list[str]:
    """Write what differs; returns the names of what was written."""
    names = drifted(root)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(DOCUMENTS[name]())
    return names


def main(arguments: list[str], root: Path = ROOT) -> int:
    """0 done; 1 when `--check` finds a difference; 2 for wrong usage."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m deploy.documents [--check]\n")
        return 2
    names = drifted(root) if arguments else write(root)
    for name in names:
        sys.stdout.write(f"{name}: {'differs; run python -m deploy.documents' if arguments else 'written'}\n")
    return 1 if arguments and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

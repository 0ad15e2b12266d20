"""`python -m deploy.documents [--check] [--schema]`: write what is generated from the code, or compare it.

Each is a function of the code alone, so two runs write the same bytes. `docs/schema.sql` needs a database: `--schema`
starts private servers for it, which takes some seconds, and `make documents` does all of it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from deploy.settings import example
from gateway.asyncapi import asyncapi
from gateway.control.app import openapi_document as operator_document
from gateway.documents import API_VERSION, document_bytes, problems_markdown
from gateway.http import openapi_document

DOCUMENTS: Final[Mapping[str, Callable[[], bytes]]] = {
    "docs/openapi.json": openapi_document,
    "docs/openapi-ops.json": operator_document,
    "docs/asyncapi.json": lambda: document_bytes(asyncapi(API_VERSION)),
    "docs/problems.md": problems_markdown,
    ".env.example": lambda: example().encode(),
}
"""Each document and what makes its bytes; one line adds another."""

SCHEMA: Final = "docs/schema.sql"

ROOT: Final = Path(__file__).resolve().parents[1]


Documents = Mapping[str, Callable[[], bytes]]


def schema() -> bytes:
    """The schema after every migration, from a database of its own. Raises RuntimeError that says what is missing."""
    from deploy.migrations.dump import dump
    from deploy.migrations.upgrade import role_of, upgrade
    from deploy.servers import NativeServers

    with tempfile.TemporaryDirectory(prefix="riskfleet-schema-") as directory:
        # PostgreSQL's account must be able to pass through.
        Path(directory).chmod(0o711)
        with NativeServers(Path(directory)) as servers:
            urls = servers.urls()
            upgrade(urls.migration_database, role_of(urls.database))
            return dump(urls.migration_database).encode()


def drifted(root: Path = ROOT, documents: Documents = DOCUMENTS) -> dict[str, bytes]:
    """The documents that are missing below `root` or differ from the code, as they should be."""
    made = {name: make() for name, make in documents.items()}
    return {
        name: body for name, body in made.items() if not (root / name).is_file() or (root / name).read_bytes() != body
    }


def write(root: Path = ROOT, documents: Documents = DOCUMENTS) -> list[str]:
    """Write what differs; returns the names of what was written."""
    found = drifted(root, documents)
    for name, body in found.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return list(found)


def main(arguments: list[str], root: Path = ROOT) -> int:
    """0 done; 1 when `--check` finds a difference; 2 for wrong usage; 3 when there is no database to ask."""
    if not set(arguments) <= {"--check", "--schema"} or len(set(arguments)) != len(arguments):
        sys.stderr.write("usage: python -m deploy.documents [--check] [--schema]\n")
        return 2
    check = "--check" in arguments
    documents = {**DOCUMENTS, SCHEMA: schema} if "--schema" in arguments else DOCUMENTS
    try:
        names = list(drifted(root, documents)) if check else write(root, documents)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    for name in names:
        sys.stdout.write(f"{name}: {'differs; run make documents' if check else 'written'}\n")
    return 1 if check and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m deploy.migrations.dump [URL]`: the schema of an upgraded database as SQL, for `docs/schema.sql`.

Without a URL a private server is started, upgraded, dumped and removed. Prints to
standard output; needs `pg_dump` on PATH. Two runs over the same schema print the same bytes.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from contracts.failures import RiskfleetError
from deploy.migrations.upgrade import apply, role_of
from deploy.processes import ServersError


def dump(url: str) -> str:
    """The schema without owners, comments and settings. Raises RuntimeError when pg_dump is missing or fails."""
    program = shutil.which("pg_dump")
    if program is None:
        raise RuntimeError("pg_dump is not installed")
    done = subprocess.run(
        [program, "--schema-only", "--no-owner", "--no-comments", "--exclude-table=alembic_version", "--dbname", url],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"pg_dump failed: {done.stderr.strip()[-500:]}")
    # Newer releases print a random token in \restrict, and every release its version.
    noise = re.compile(r"^(--.*|SET .*|SELECT pg_catalog\.set_config.*|\\(un)?restrict.*)\n", re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", noise.sub("", done.stdout)).strip() + "\n"


def fresh() -> str:
    """The schema that this release makes in an empty database. Raises ServersError, DatabaseError or RuntimeError."""
    from deploy.servers import NativeServers

    directory = Path(tempfile.mkdtemp(prefix="riskfleet-schema-"))
    directory.chmod(0o711)  # PostgreSQL's own account passes through it
    native = NativeServers(directory)
    try:
        native.start()
        urls = native.urls()
        asyncio.run(apply(urls.migration_database, role_of(urls.database)))
        return dump(urls.migration_database)
    finally:
        native.stop()
        shutil.rmtree(directory, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Print the dump; 2 for wrong usage, 3 when it cannot be made."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        sys.stderr.write("usage: python -m deploy.migrations.dump [URL]\n")
        return 2
    try:
        sys.stdout.write(dump(arguments[0]) if arguments else fresh())
    except (ServersError, RiskfleetError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

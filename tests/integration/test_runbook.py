"""What the pages print as SQL runs on the schema of this release, and the schema that they show is this release's."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from deploy.local import with_servers
from deploy.migrations.dump import fresh
from deploy.provision import migrate
from deploy.servers import ServerUrls
from deploy.settings import Settings
from tests.conftest import need_binaries

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
_SQL = re.compile(r"^```sql\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ENDS = ("BEGIN", "COMMIT", "ROLLBACK PREPARED")


@pytest.fixture(scope="module")
def upgraded(servers: ServerUrls, tmp_path_factory: pytest.TempPathFactory) -> ServerUrls:
    """The servers with the schema of this release."""
    asyncio.run(migrate(with_servers(Settings(data_dir=tmp_path_factory.mktemp("data")), servers)))
    return servers


def statements() -> list[str]:
    """Every statement of the runbook's SQL but those that end a transaction."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    found = [part.strip() for block in _SQL.findall(text) for part in block.split(";")]
    return [part for part in found if part and not part.startswith(_ENDS)]


async def run(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        ran = []
        for statement in statements():
            await connection.execute(statement)
            ran.append(statement)
        await transaction.rollback()
        return ran
    finally:
        await connection.close()


def test_the_sql_of_the_runbook_runs(upgraded: ServerUrls) -> None:
    assert len(asyncio.run(run(upgraded.migration_database))) >= 4


def test_the_schema_in_the_documentation_is_what_the_migrations_make() -> None:
    """On a database of its own: other tests take constraints away to see what happens."""
    need_binaries()
    written = (ROOT / "docs" / "schema.sql").read_text(encoding="utf-8")
    assert fresh() == written, "run make documents"

"""Alembic's entry: runs on the connection, and inside the transaction, that `deploy.migrations.upgrade` opened.

There is no alembic.ini and no offline mode; the caller's lock and commit stand around everything here.
"""

from alembic import context

from governance.postgres.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()

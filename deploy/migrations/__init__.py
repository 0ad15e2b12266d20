"""The database's schema, made and changed by Alembic only; `deploy.migrations.upgrade` is the way in."""
